"""RLOO on prompts. Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740

Examples:

    python recipes/rloo.py reward_funcs=outputs/reward/main
    python recipes/rloo.py reward_funcs=outputs/reward/main model.adapter=outputs/sft/main trainer.beta=0.1
"""

from rlhf_recipes import ppo, references
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_prompts
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("rloo")
def main(cfg):
    run = Run.start(cfg, "rloo")
    rewards = references.find_rewards(cfg.reward_funcs, cfg.model.id, cfg.model.adapter_base)
    prompts = load_prompts(cfg.data)

    from rlhf_recipes import models
    from rlhf_recipes.training import account, callbacks, metrics

    args = models.training_args(cfg.trainer, run)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    models.check_rewards(cfg.model, rewards)
    tokenizer = models.load_tokenizer(cfg.model)
    prompts = fit(prompts, tokenizer, cfg.max_prompt_length, cfg.data.too_long)
    print(describe(prompts.report))
    args.check_prompts(len(prompts.train))
    train_dataset, eval_dataset = prompts.to_datasets()
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, run.parent)
    trainer = ppo.RLOOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    models.keep_adapter_in_float32(trainer, run.parent)
    account.check(trainer, prompts)
    callbacks.watch(trainer, run)
    run.create()

    before = trainer.measure(eval_dataset, "Held out, before")
    trainer.train(resume_from_checkpoint=run.checkpoint)
    after = trainer.measure(eval_dataset, "Held out, after")

    models.save_adapter(trainer.model, tokenizer, run.adapter, cfg.model)
    return finish(
        run,
        trainer,
        main="reward",
        before=metrics.episode_metrics(prompts.test, before, before),
        metrics=metrics.episode_metrics(prompts.test, after, before),
        counts=prompts.report,
        rewards=[each.identity for each, weight in zip(rewards, trainer.scores.weights_R, strict=True) if weight],
        samples=trainer.samples[-4:],
    )


if __name__ == "__main__":
    main()
