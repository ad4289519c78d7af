"""What did the preference signal capture, and where can it not be trusted? One page, worst figure first.

Examples:

    python recipes/audit.py reward_model=outputs/reward/main
    python recipes/audit.py reward_model=outputs/reward/ensemble gold=my_gold:score checkpoints=outputs/ppo/main
"""

import sys

from rlhf_recipes.audit import report, run_audit, verdict
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.run import Run


@recipe("audit")
def main(cfg):
    verdict.check(cfg.thresholds)
    run = Run.start(cfg, "audit")
    sources = run_audit.find(cfg)
    pairs = load_pairs(cfg.data)

    from rlhf_recipes import models

    tokenizer = models.load_tokenizer(cfg.model)
    pairs = fit(pairs, tokenizer, cfg.max_length, cfg.data.too_long)
    print(describe(pairs.report), flush=True)
    run.create()

    findings = run_audit.take(cfg, sources, pairs, tokenizer, run)
    audit = report.build(cfg, sources, pairs, findings)
    report.finish(run, audit, findings)
    code = cfg.exit_codes[audit["verdict"]["verdict"].replace(" ", "_")]
    return sys.exit(code) if code else None


if __name__ == "__main__":
    main()
