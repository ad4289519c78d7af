"""Supervised fine-tuning on demonstrations, 4-bit with LoRA. Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

Examples:

    python recipes/sft.py
    python recipes/sft.py data=ultrachat model=qwen3_4b trainer.learning_rate=1e-4
"""

from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_demonstrations
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("sft")
def main(cfg):
    run = Run.start(cfg, "sft")
    demonstrations = load_demonstrations(cfg.data)

    from trl import SFTTrainer

    from rlhf_recipes import inference, models, sharding
    from rlhf_recipes.preference import forward
    from rlhf_recipes.training import account, callbacks, metrics

    args = models.training_args(cfg.trainer, run)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    tokenizer = models.load_tokenizer(cfg.model)
    demonstrations = fit(demonstrations, tokenizer, args.max_length, cfg.data.too_long, args.truncation_mode)
    print(describe(demonstrations.report))
    train_dataset, eval_dataset = demonstrations.to_datasets(run.shared)
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, run.parent)
    trainer = SFTTrainer(
        model=policy,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    models.keep_adapter_in_float32(trainer, run.parent)
    forward.speed_up(trainer, cfg.fast_forward)
    account.check(trainer, demonstrations)
    callbacks.watch(trainer, run)
    run.create()
    sharding.prepare(trainer)

    before = inference.demonstration_logps(
        trainer.model, tokenizer, demonstrations.test, "Held out, before", kept=demonstrations.kept
    )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    after = inference.demonstration_logps(
        trainer.model, tokenizer, demonstrations.test, "Held out, after", kept=demonstrations.kept
    )

    models.save_adapter(trainer.model, tokenizer, run.adapter, cfg.model)
    return finish(
        run,
        trainer,
        main="perplexity",
        before=metrics.demonstration_metrics(demonstrations.test, before),
        metrics=metrics.demonstration_metrics(demonstrations.test, after),
        counts=demonstrations.report,
    )


if __name__ == "__main__":
    main()
