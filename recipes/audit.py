"""What did the preference signal capture, and where can it not be trusted? One page, worst figure first.

Examples:

    python recipes/audit.py reward_model=outputs/reward/main
    python recipes/audit.py reward_model=outputs/reward/ensemble gold=my_gold:score checkpoints=outputs/ppo/main
"""

import sys

from rlhf_recipes import config, data, run
from rlhf_recipes.audit import report, steps, verdict


@config.recipe("audit")
def main(cfg):
    config.check(cfg)
    verdict.check(cfg.thresholds)
    job = run.start(cfg, "audit")
    sources = steps.find(cfg)
    pairs = data.load_pairs(cfg.data)

    from rlhf_recipes import models

    tokenizer = models.load_tokenizer(cfg.model)
    pairs = data.fit(pairs, tokenizer, cfg.max_length, cfg.data.too_long)
    print(data.describe(pairs.report), flush=True)
    run.claim(job)

    findings = steps.take(cfg, sources, pairs, tokenizer, job)
    audit = report.build(cfg, sources, pairs, findings)
    report.finish(job, audit, findings)
    code = cfg.exit_codes[audit["verdict"]["verdict"].replace(" ", "_")]
    return sys.exit(code) if code else None


if __name__ == "__main__":
    main()
