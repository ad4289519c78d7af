"""Did it help? Runs against their parent on the same held-out prompts and pairs, with a verdict.

Examples:

    python recipes/evaluate.py 'runs=[outputs/dpo/main]'
    python recipes/evaluate.py 'runs=[outputs/sft/main,outputs/dpo/main]' reward_model=outputs/reward/main
    python recipes/evaluate.py 'sweeps=[outputs/dpo/dpo_beta,outputs/simpo/simpo_beta_gamma]' run_name=frontier
"""

import sys

from rlhf_recipes import config, data, run, sweep


@config.recipe("evaluate")
def main(cfg):
    config.check(cfg)
    job = run.start(cfg, "evaluate")
    if cfg.sweeps:
        return sweep.join(job, cfg.sweeps, cfg.sweep)
    pairs = data.load_pairs(cfg.data)

    from rlhf_recipes.evaluation import page, summary, systems

    candidates = systems.find(cfg.runs, cfg.parent, cfg.model.id)
    scorer = systems.find_scorer(cfg.reward_model, cfg.model.id)
    judge = config.import_function(cfg.judge_function, "judge_function") if cfg.judge_function else None
    measurements = systems.measure(cfg, candidates, scorer, pairs, judge)
    evaluation = summary.summarise(measurements, cfg.thresholds)

    run.claim(job)
    page.write_page(evaluation, job.dir / "report.html")
    main = summary.headline(evaluation)
    run.write_result(job, run.record(job, main=main, evaluation=evaluation, counts=pairs.report))
    print(f"\n{summary.table(evaluation)}\n")
    for name, system in evaluation["systems"].items():
        if "verdict" in system:
            print(f"{name}: {system['verdict']['verdict']}. {' '.join(system['verdict']['reasons'])}")
    print(f"  page  {job.dir / 'report.html'}", flush=True)
    code = cfg.exit_codes[evaluation["verdict"]]
    return sys.exit(code) if code else None


if __name__ == "__main__":
    main()
