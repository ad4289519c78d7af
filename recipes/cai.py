"""Constitutional AI: pairs from self-critique and AI judgement. Bai et al. 2022, https://arxiv.org/abs/2212.08073

Examples:

    python recipes/cai.py constitution=clinic
    python recipes/cai.py experiment=cai/demo
"""

from rlhf_recipes import ranks
from rlhf_recipes.cai import constitution, earlier, gate, make_pairs, people
from rlhf_recipes.cai.load import find_judge, load
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.rows import written
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import GATE, Run


@recipe("cai")
def main(cfg):
    make_pairs.check(cfg)
    if cfg.judge.kind == "people":
        people.check(cfg)
    named = find_judge(cfg)
    run = Run.start(cfg, "cai")
    principles = constitution.load(cfg.constitution)
    gold = gate.load_gold(cfg)
    before = earlier.find(cfg.earlier)
    prompts = earlier.prompts(cfg, before)

    from rlhf_recipes.cai import backend, dataset, fingerprint, report

    generator, judge = load(cfg, run.parent, named, principles)
    if tokenizer := getattr(generator, "tokenizer", None):
        prompts = fit(prompts, tokenizer, cfg.max_prompt_length, cfg.data.too_long)
    print(describe(prompts.report), flush=True)
    run.create()
    make_pairs.adopt(run)

    rows = written({**row, "split": name} for name in ("test", "train") for row in getattr(prompts, name))
    taken = [(each.shards, each.provenance) for each in before]
    if cfg.judge.kind == "people":
        made = people.make(run, cfg, generator, principles, rows, taken)
        return report.finish(run, made | {"counts": prompts.report})

    asked = judge.backend
    journal = backend.Journal(run.dir / GATE)
    used = {"judge": asked} if cfg.gate.only else {"generator": generator, "judge": asked}
    needed = gate.longest(cfg, cfg.sources, rows, gold)
    ranks.by_first(fingerprint.check, used, needed, journal, cfg.judging.votes)
    worth = gate.examine(judge, gold, cfg, journal)
    print(gate.describe(worth), flush=True)
    result = {"main": gate.headline(worth), "gate": worth, "constitution": principles.summary(), "judge": asked.name}
    if not cfg.gate.only:
        sources, judge = gate.decide(worth, judge, cfg)
        maker = make_pairs.PairMaker(generator, judge, principles, sources, cfg)
        if left := maker.left(rows, run.dir / "shards"):
            gate.confirm(gate.estimate(cfg, sources, left, generator, judge))
        shards = maker.shards(rows, run.dir / "shards")
        made = {"shards": cfg.shards} if cfg.shards else dataset.write(shards, run.dir, maker.provenance(), taken)
        result |= {"generator": generator.name, "labelled_by": "judge" if judge else "construction", **made}
        result |= {"provenance": maker.provenance(), "judged_by": cfg.judge.kind}
        result |= {"spent": maker.spent(run.dir / GATE, shards), "counts": prompts.report}
    return report.finish(run, result)


if __name__ == "__main__":
    main()
