"""Several recipes in a row, each in a process of its own: what is finished is kept, what was interrupted continues.

Examples:

    python recipes/pipeline.py experiment=pipeline/demo
    python recipes/pipeline.py experiment=pipeline/demo run_name=mine 'shared=["model=qwen3_0_6b"]'
"""

import sys

from rlhf_recipes.launch import pipeline
from rlhf_recipes.launch.preflight import look
from rlhf_recipes.launch.recipe import recipe


@recipe("pipeline")
def main(cfg):
    plan = pipeline.plan(cfg)
    look.before_pipeline(plan.stages, plan.dir, cfg.preflight)
    if cfg.preflight.only:
        return
    status = pipeline.execute(plan)
    pipeline.print_summary(plan, cfg.next)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
