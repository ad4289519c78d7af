"""Several recipes in a row, each in a process of its own: what is finished is kept, what was interrupted continues.

Examples:

    python recipes/pipeline.py experiment=pipeline/demo
    python recipes/pipeline.py experiment=pipeline/demo run_name=mine 'shared=["model=qwen3_4b"]'
    python recipes/pipeline.py experiment=pipeline/rounds rounds=3
"""

import sys

from rlhf_recipes.launch import pipeline, rounds
from rlhf_recipes.launch.preflight import look
from rlhf_recipes.launch.recipe import recipe


@recipe("pipeline")
def main(cfg):
    plan = pipeline.plan(cfg)
    look.before_pipeline(plan.stages, plan.dir, cfg.preflight)
    if cfg.preflight.only:
        return
    loop = rounds.Rounds(cfg, plan.dir, plan.stages) if cfg.rounds else None
    if loop:
        print(loop.budget(), flush=True)
    status = pipeline.execute(plan, loop.stop if loop else bool)
    found = loop.write() if loop else {"rounds": [], "ended": None}
    pipeline.print_summary(plan, cfg.next, keep=found["keep"] if found["rounds"] else None)
    if found["rounds"] or found["ended"]:
        print(rounds.describe(found), flush=True)
    if found["rounds"]:
        print(f"page     {plan.dir / rounds.PAGE}", flush=True)
        status = status or cfg.loop.exit_codes["stopped" if found["stopped"] else "finished"]
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
