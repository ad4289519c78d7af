"""Did it help? Runs against their parent on the same held-out prompts and pairs, with a verdict.

Examples:

    python recipes/evaluate.py 'runs=[outputs/dpo/main]'
    python recipes/evaluate.py 'runs=[outputs/sft/main,outputs/dpo/main]' reward_model=outputs/reward/main
    python recipes/evaluate.py 'runs=[outputs/dpo/main]' judge=server judge.model=Qwen/Qwen3-32B 'tasks=[arc_easy]'
    python recipes/evaluate.py checkpoints=outputs/ppo/main 'reward_model=[outputs/reward/a,outputs/reward/b]'
    python recipes/evaluate.py 'sweeps=[outputs/dpo/dpo_beta,outputs/simpo/simpo_beta_gamma]' run_name=frontier
    python recipes/evaluate.py 'runs=[outputs/dpo/main]' prompts=null shards=3/8
"""

import sys

from rlhf_recipes import config, ranks
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.evaluation import sweeps
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import GATE, Run
from rlhf_recipes.text import line


@recipe("evaluate")
def main(cfg):
    _, jobs = config.part_of(cfg.shards)
    run = Run.start(cfg, "evaluate")
    if cfg.sweeps:
        return sweeps.join(run, cfg.sweeps, cfg.sweep)
    parts = [] if cfg.shards else ranks.by_first(run.all_parts)
    from rlhf_recipes import models
    from rlhf_recipes.evaluation import checkpoints, judges, measure, measurements, page, summary, table, tasks

    candidates = measure.find(cfg.runs, cfg.parent, cfg.model.id, cfg.checkpoints, cfg.model.adapter_base)
    scorers = measure.find_scorer(cfg.reward_model, cfg.model.id, cfg.model.adapter_base)
    given = [each.adapter for each in [*candidates, *scorers] if each.adapter and each.step is None]
    named_bases = models.check_named_bases(cfg.model, given)
    proxy = measure.find_proxy(cfg.checkpoints, cfg.model.id)
    models.check_templates(cfg.model, [each.adapter for each in candidates if each.adapter])
    models.check_templates(cfg.model, [each.adapter for each in [*scorers, proxy] if each], reward=True)
    judge_adapter = judges.check(cfg)
    function = config.import_function(cfg.judge_function, "judge_function") if cfg.judge_function else None
    pairs = load_pairs(cfg.data)
    harness = tasks.find(cfg.tasks, cfg.lm_eval)
    scored_by = measure.Scorers(scorers, proxy, function, harness)
    if parts:
        found, judge = measure.join(cfg, [measurements.read(part) for part in parts], pairs), None
    else:
        found = measure.measure(cfg, candidates, scored_by, pairs)
        judge = judges.load(cfg, judge_adapter)

    run.create()
    if judge:
        found = measure.judged(judge, found, pairs.test, run.dir / GATE, cfg.judging)
    if cfg.shards:
        found.write(run.dir)
        run.write_result(run.record(shards=cfg.shards, counts=pairs.report, **named_bases))
        return print(f"  next      the command without shards=, when all {jobs} are done", flush=True)
    evaluation = ranks.by_first(summary.summarise, found, cfg.thresholds)
    if cfg.checkpoints:
        evaluation["checkpoints"] = ranks.by_first(checkpoints.compare, found, evaluation)

    if ranks.is_first():
        page.write_page(evaluation, run.dir / "report.html")
    main = summary.headline(evaluation)
    run.write_result(run.record(main=main, evaluation=evaluation, counts=pairs.report, **named_bases))
    print(f"\n{table.as_text(evaluation)}\n")
    for name, system in evaluation["systems"].items():
        if "verdict" in system:
            print(line(f"{name}: {system['verdict']['verdict']}. {' '.join(system['verdict']['reasons'])}"))
    for said in [evaluation["correction"], *evaluation.get("checkpoints", {}).get("says", [])]:
        if said:
            print(line(said))
    print(f"  page  {line(run.dir / 'report.html')}", flush=True)
    code = cfg.exit_codes[evaluation["verdict"]]
    return sys.exit(code) if code else None


if __name__ == "__main__":
    main()
