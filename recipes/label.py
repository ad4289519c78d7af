"""People label: two replies side by side on a page of this machine, their choices as pairs and as judgements.

Examples:

    python recipes/label.py pairs=outputs/audit/main/disputed.jsonl annotator=anna
    python recipes/label.py pairs=outputs/audit/main/label_next.jsonl model.adapter=outputs/dpo/main
"""

from rlhf_recipes.labelling import labels, pairs
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run


@recipe("label")
def main(cfg):
    people = labels.check(cfg)
    run = Run.start(cfg, "label")
    found = pairs.find(cfg)

    if not found.prompts:
        run.create()
    else:
        from rlhf_recipes.cai.load import load_one
        from rlhf_recipes.data.fit import describe, fit
        from rlhf_recipes.labelling import answers

        policy = load_one(cfg.model if cfg.generator.kind == "local" else cfg.generator, cfg, run.parent)
        prompts = found.prompts
        if tokenizer := getattr(policy, "tokenizer", None):
            prompts = fit(prompts, tokenizer, cfg.max_prompt_length)
        print(describe(prompts.report), flush=True)
        run.create()
        found = pairs.collect(answers.answer(prompts, found.order, policy, cfg, run.dir), cfg.pairs)
    print(found.describe(cfg.pairs), flush=True)
    return labels.collect(run, cfg, found.pairs, people)


if __name__ == "__main__":
    main()
