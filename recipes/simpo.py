"""SimPO on preference pairs. Meng et al. 2024, https://arxiv.org/abs/2405.14734

Examples:

    python recipes/simpo.py
    python recipes/simpo.py model.adapter=outputs/sft/main trainer.beta=2.5 trainer.simpo_gamma=1.4
"""

from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.methods import trainer_class
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("simpo")
def main(cfg):
    run = Run.start(cfg, "simpo")
    pairs = load_pairs(cfg.data)

    from rlhf_recipes import inference, models, sharding
    from rlhf_recipes.preference import forward
    from rlhf_recipes.training import account, callbacks, metrics

    args = models.training_args(cfg.trainer, run)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    tokenizer = models.load_tokenizer(cfg.model)
    pairs = fit(pairs, tokenizer, args.max_length, cfg.data.too_long)
    print(describe(pairs.report))
    train_dataset, eval_dataset = pairs.to_datasets(run.shared)
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, run.parent)
    trainer = trainer_class("simpo", cfg.trainer._target_)(
        model=policy,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    models.keep_adapter_in_float32(trainer, run.parent)
    forward.speed_up(trainer, cfg.fast_forward)
    account.check(trainer, pairs)
    callbacks.watch(trainer, run)
    run.create()
    sharding.prepare(trainer)

    before = run.cached(
        pairs.test,
        lambda: inference.pair_logps(trainer.model, tokenizer, pairs.test, "Held out, before", kept=pairs.kept),
    )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    after = inference.pair_logps(trainer.model, tokenizer, pairs.test, "Held out, after", kept=pairs.kept)

    models.save_adapter(trainer.model, tokenizer, run.adapter, cfg.model)
    return finish(
        run,
        trainer,
        main="preference_accuracy",
        before=metrics.preference_metrics(pairs.test, before, before, "average_logp"),
        metrics=metrics.preference_metrics(pairs.test, after, before, "average_logp"),
        counts=pairs.report,
    )


if __name__ == "__main__":
    main()
