"""Publish a run on the Hub, and prove by a round trip that what lies there is what was trained.

Examples:

    python recipes/publish.py run=outputs/dpo/main folder=published
    python recipes/publish.py run=outputs/dpo/main repo_id=<user>/<name> evaluation=outputs/evaluate/main
"""

from rlhf_recipes import config


@config.recipe("publish")
def main(cfg):
    config.check(cfg)

    from rlhf_recipes import hub

    job = hub.start(cfg)
    return hub.record(job, cfg, hub.publish(cfg))


if __name__ == "__main__":
    main()
