"""KTO on answers labelled good or bad. Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306

Examples:

    python recipes/kto.py
    python recipes/kto.py data=local data.format=labelled data.path=thumbs.jsonl trainer.desirable_weight=1.33
    python recipes/kto.py sweep=kto_beta model.adapter=outputs/sft/main
"""

from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.labelled import balance, micro_batches
from rlhf_recipes.data.load import load_labelled
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run
from rlhf_recipes.training.finish import finish


@recipe("kto")
def main(cfg):
    run = Run.start(cfg, "kto")
    answers = load_labelled(cfg.data)

    from trl import KTOTrainer

    from rlhf_recipes import inference, models, sharding
    from rlhf_recipes.preference import forward, reference
    from rlhf_recipes.training import account, callbacks, metrics

    args = models.training_args(cfg.trainer, run)
    precompute = reference.take_over(args, cfg.fast_forward)
    models.check(cfg.model, cfg.quantization, cfg.lora)
    tokenizer = models.load_tokenizer(cfg.model)
    answers = fit(answers, tokenizer, args.max_length, cfg.data.too_long)
    answers = micro_batches(answers, args)
    print(describe(answers.report), balance(answers.train, args), sep="\n")
    longest = args.max_length
    if run.shared and cfg.data.too_long == "drop":
        args.max_length = None  # none is longer; TRL's own look would tie the rows, and so their reference, to beta
    train_dataset, eval_dataset = answers.to_datasets(run.shared)
    policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, run.parent)
    trainer = KTOTrainer(
        model=policy,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    args.max_length = trainer.data_collator.max_length = longest  # of a prompt and another's answer, for the KL
    models.keep_adapter_in_float32(trainer, run.parent)
    forward.speed_up(trainer, cfg.fast_forward)
    account.check(trainer, answers)
    callbacks.watch(trainer, run)
    run.create()
    sharding.prepare(trainer)
    sums = reference.keep(trainer, run) if precompute else inference.logp_sums

    before = run.cached(
        answers.test,
        lambda: inference.demonstration_logps(
            trainer.model, tokenizer, answers.test, "Held out, before", sums, answers.kept
        ),
    )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    after = inference.demonstration_logps(trainer.model, tokenizer, answers.test, "Held out, after", kept=answers.kept)

    models.save_adapter(trainer.model, tokenizer, run.adapter, cfg.model)
    return finish(
        run,
        trainer,
        main="auroc",
        before=metrics.label_metrics(answers.test, before, before),
        metrics=metrics.label_metrics(answers.test, after, before),
        counts=answers.report,
    )


if __name__ == "__main__":
    main()
