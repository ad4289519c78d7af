"""DPO on preference pairs. Rafailov et al. 2023, https://arxiv.org/abs/2305.18290

Examples:

    python recipes/dpo.py
    python recipes/dpo.py model.adapter=outputs/sft/main trainer.beta=0.1
    python recipes/dpo.py sweep=dpo_beta model.adapter=outputs/sft/main
"""

from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("dpo")
def main(cfg):
    run = Run.start(cfg, "dpo")
    pairs = load_pairs(cfg.data)

    from trl import DPOTrainer

    from rlhf_recipes import inference, models, sharding
    from rlhf_recipes.preference import forward, reference
    from rlhf_recipes.training import account, callbacks, metrics

    anchor = reference.find(cfg)
    args = models.training_args(cfg.trainer, run)
    precompute = reference.take_over(args, cfg.fast_forward)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    tokenizer = models.load_tokenizer(cfg.model)
    pairs = fit(pairs, tokenizer, args.max_length, cfg.data.too_long, args.truncation_mode)
    print(describe(pairs.report))
    if run.shared and cfg.data.too_long == "drop":
        args.max_length = None  # none is longer; TRL's own look would tie the rows, and so their reference, to beta
    train_dataset, eval_dataset = pairs.to_datasets(run.shared)
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, run.parent)
    trainer = DPOTrainer(
        model=policy,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    models.keep_adapter_in_float32(trainer, run.parent)
    reference.anchor(trainer, anchor)
    forward.speed_up(trainer, cfg.fast_forward)
    account.check(trainer, pairs)
    callbacks.watch(trainer, run)
    run.create()
    sharding.prepare(trainer)
    sums = reference.keep(trainer, run, anchor) if precompute else inference.logp_sums

    before = run.cached(
        pairs.test,
        lambda: inference.pair_logps(trainer.model, tokenizer, pairs.test, "Held out, before", sums, pairs.kept),
    )
    of_reference = reference.pair_logps(trainer, anchor, before, pairs)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    after = inference.pair_logps(trainer.model, tokenizer, pairs.test, "Held out, after", kept=pairs.kept)

    models.save_adapter(trainer.model, tokenizer, run.adapter, cfg.model)
    return finish(
        run,
        trainer,
        main="preference_accuracy",
        before=metrics.preference_metrics(pairs.test, before, of_reference, "log_ratio", before),
        metrics=metrics.preference_metrics(pairs.test, after, of_reference, "log_ratio", before),
        counts=pairs.report,
        reference=anchor and anchor.lineage,
    )


if __name__ == "__main__":
    main()
