"""PPO on prompts. Schulman et al. 2017, https://arxiv.org/abs/1707.06347

Examples:

    python recipes/ppo.py reward_funcs=outputs/reward/main
    python recipes/ppo.py reward_funcs=outputs/reward/main model.adapter=outputs/sft/main trainer.kl_coef=0.1
"""

from rlhf_recipes import ppo, references
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_prompts
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("ppo")
def main(cfg):
    run = Run.start(cfg, "ppo")
    rewards = references.find_rewards(cfg.reward_funcs, cfg.model.id, cfg.model.adapter_base)
    anchor = None
    if cfg.reference:
        anchor = references.find_policy(cfg.reference, "reference", cfg.model.id, cfg.model.adapter_base)
    prompts = load_prompts(cfg.data)

    from rlhf_recipes import models, packing
    from rlhf_recipes.training import account, callbacks, metrics

    args = models.training_args(cfg.trainer, run)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    models.check_rewards(cfg.model, rewards)
    tokenizer = models.load_tokenizer(cfg.model)
    prompts = fit(prompts, tokenizer, cfg.max_prompt_length, cfg.data.too_long)
    print(describe(prompts.report))
    args.check_servers(cfg.max_prompt_length)
    args.check_prompts(len(prompts.train))
    train_dataset, eval_dataset = prompts.to_datasets()
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, run.parent)
    if cfg.fast_forward:
        packing.allow(policy)
    trainer = ppo.PPOTrainer(
        model=policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
        reference=anchor and anchor.adapter,
    )
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
        reference=anchor and anchor.lineage,
        stopped=trainer.stopped,
        rewards=[each.identity for each, weight in zip(rewards, trainer.scores.weights_R, strict=True) if weight],
        samples=trainer.samples[-4:],
    )


if __name__ == "__main__":
    main()
