"""Publish a run on the Hub, and prove by a round trip that what lies there is what was trained.

Examples:

    python recipes/publish.py run=outputs/dpo/main folder=published
    python recipes/publish.py run=outputs/dpo/main repo_id=<user>/<name> evaluation=outputs/evaluate/main
"""

from rlhf_recipes.launch.recipe import recipe


@recipe("publish")
def main(cfg):
    from rlhf_recipes.publish import publish

    run = publish.start(cfg)
    return publish.record(run, cfg, publish.publish(cfg))


if __name__ == "__main__":
    main()
