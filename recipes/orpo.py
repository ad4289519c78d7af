"""ORPO on preference pairs. Hong et al. 2024, https://arxiv.org/abs/2403.07691

Examples:

    python recipes/orpo.py
    python recipes/orpo.py data=ultrafeedback model=qwen3_0_6b trainer.beta=0.25
"""

from rlhf_recipes import run
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.training.finish import finish


@recipe("orpo")
def main(cfg):
    job = run.start(cfg, "orpo")
    pairs = load_pairs(cfg.data)

    from trl.experimental.orpo import ORPOTrainer

    from rlhf_recipes import inference, models
    from rlhf_recipes.training import callbacks, metrics

    args = models.training_args(cfg.trainer, job)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    tokenizer = models.load_tokenizer(cfg.model)
    pairs = fit(pairs, tokenizer, args.max_length, cfg.data.too_long)
    print(describe(pairs.report))
    train_dataset, eval_dataset = pairs.to_datasets(job.shared)
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora)
    trainer = ORPOTrainer(
        model=policy,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    models.keep_adapter_in_float32(trainer, cfg.model.adapter)
    callbacks.watch(trainer, job)
    run.claim(job)

    before = run.once(
        job, pairs.test, lambda: inference.pair_logps(trainer.model, tokenizer, pairs.test, "Held out, before")
    )
    trainer.train(resume_from_checkpoint=job.checkpoint)
    after = inference.pair_logps(trainer.model, tokenizer, pairs.test, "Held out, after")

    models.save_adapter(trainer.model, tokenizer, job.adapter, cfg.model)
    return finish(
        job,
        trainer,
        main="preference_accuracy",
        before=metrics.preference_metrics(pairs.test, before, before, "average_logp"),
        metrics=metrics.preference_metrics(pairs.test, after, before, "average_logp"),
        counts=pairs.report,
    )


if __name__ == "__main__":
    main()
