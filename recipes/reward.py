"""Reward model on preference pairs. Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5

Examples:

    python recipes/reward.py
    python recipes/reward.py model.adapter=outputs/sft/main
"""

from rlhf_recipes import config, data, run


@config.recipe("reward")
def main(cfg):
    config.check(cfg)
    job = run.start(cfg, "reward")
    pairs = data.load_pairs(cfg.data)

    from rlhf_recipes import callbacks, models
    from rlhf_recipes.evaluation import measure, metrics
    from rlhf_recipes.reward import SoftLabelRewardTrainer

    args = models.training_args(cfg.trainer, job)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    tokenizer = models.load_tokenizer(cfg.model)
    pairs = data.fit(pairs, tokenizer, args.max_length, cfg.data.too_long)
    print(data.describe(pairs.report))
    train_dataset, eval_dataset = pairs.to_datasets(job.shared)
    reward_model, lora = models.load_reward_model(cfg.model, cfg.quantization, cfg.lora)
    trainer = SoftLabelRewardTrainer(
        model=reward_model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    models.keep_adapter_in_float32(trainer, cfg.model.adapter)
    callbacks.watch(trainer, job)
    run.claim(job)

    before = measure.pair_rewards(trainer.model, tokenizer, pairs.test, "Held out, before")
    trainer.train(resume_from_checkpoint=job.checkpoint)
    after = measure.pair_rewards(trainer.model, tokenizer, pairs.test, "Held out, after")

    models.save_adapter(trainer.model, tokenizer, job.adapter, cfg.model)
    models.prove_reload(
        trainer.model, job.adapter, lambda: measure.pair_rewards(trainer.model, tokenizer, pairs.test[:8])
    )
    return run.finish(
        job,
        trainer,
        main="preference_accuracy",
        before=metrics.reward_metrics(pairs.test, before, before),
        metrics=metrics.reward_metrics(pairs.test, after, before),
        counts=pairs.report,
    )


if __name__ == "__main__":
    main()
