"""Reward model on preference pairs. Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5

Examples:

    python recipes/reward.py
    python recipes/reward.py model.adapter=outputs/sft/main
"""

from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("reward")
def main(cfg):
    run = Run.start(cfg, "reward")
    pairs = load_pairs(cfg.data)

    from rlhf_recipes import inference, models, sharding
    from rlhf_recipes.preference import forward
    from rlhf_recipes.training import account, callbacks, metrics
    from rlhf_recipes.training.reward_trainer import SoftLabelRewardTrainer

    args = models.training_args(cfg.trainer, run)
    models.check(cfg.model, cfg.quantization, cfg.lora, scores=True)
    tokenizer = models.load_tokenizer(cfg.model)
    pairs = fit(pairs, tokenizer, args.max_length, cfg.data.too_long)
    print(describe(pairs.report))
    train_dataset, eval_dataset = pairs.to_datasets(run.shared)
    reward_model, lora = models.load_reward_model(cfg.model, cfg.quantization, cfg.lora, run.parent)
    trainer = SoftLabelRewardTrainer(
        model=reward_model,
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

    before = inference.pair_rewards(trainer.model, tokenizer, pairs.test, "Held out, before", kept=pairs.kept)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    after = inference.pair_rewards(trainer.model, tokenizer, pairs.test, "Held out, after", kept=pairs.kept)

    models.save_adapter(trainer.model, tokenizer, run.adapter, cfg.model)
    models.prove_reload(
        trainer.model, run.adapter, lambda: inference.pair_rewards(trainer.model, tokenizer, pairs.test[:8])
    )
    return finish(
        run,
        trainer,
        main="preference_accuracy",
        before=metrics.reward_metrics(pairs.test, before, before),
        metrics=metrics.reward_metrics(pairs.test, after, before),
        counts=pairs.report,
    )


if __name__ == "__main__":
    main()
