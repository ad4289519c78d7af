"""`@recipe("dpo")` over a recipe's `main(cfg)`: Hydra, and what stands around a run."""

import functools
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import commands, locks, overrides, ranks, sharding, signals
from rlhf_recipes.config import in_sweep
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import cards, composing, out_of_memory
from rlhf_recipes.launch.keys import check, chosen
from rlhf_recipes.launch.refusals import OneLine, print_bug

# What many processes cannot share.
ALONE = ("pipeline", "publish", "label")


def recipe(name: str):
    """Decorate `main(cfg)` of recipes/<name>.py: Hydra over conf/<name>.yaml, errors of use on one line.

    A refusal exits with 2, an interruption with 130, the end of a machine (`signals`) with 75. Whatever is no refusal
    keeps its traceback; HYDRA_FULL_ERROR=1 shows it for refusals too.
    """

    def decorate(main):
        @functools.wraps(main)
        def run_job(cfg: DictConfig):
            signals.listen()
            if in_sweep() and "trainer" in cfg:
                from rlhf_recipes.launch import sweep

                return sweep.run_job(main, cfg)
            # Inside Hydra, which would announce the failure on a line of its own.
            with OneLine(), _no_empty_folder(), out_of_memory.told(cfg):
                check(cfg)
                if name != "publish" and not OmegaConf.select(cfg, "trainer.use_cpu"):
                    cards.take_one(name, overrides.of_this_run())
                sharding.check(cfg, name)
                if "trainer" in cfg and cfg.preflight.only:
                    from rlhf_recipes.launch.preflight import look

                    return look.instead_of_run(cfg, name, list(HydraConfig.get().overrides.task))
                return _published(main, cfg, name) if cfg.get("publish") else main(cfg)

        @functools.wraps(main)
        def launch():
            _leave_script_folder()
            commands.remember(sys.argv[0])
            sys.excepthook = print_bug
            sys.argv[1:] = spelled_out(sys.argv[1:])
            with OneLine(name):
                signals.listen()
                if name in ALONE and ranks.world_size() > 1:
                    raise Refusal(
                        f"WORLD_SIZE={ranks.world_size()}: {name} is one process, which starts others where it needs "
                        "them. Start it with python, not with a launcher."
                    )
                if not ranks.is_first():  # the first process says what all would say
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if any(argument.startswith("--exp") for argument in sys.argv[1:]):
                    raise Refusal("--experimental-rerun: reads a pickle, which can run code. Give the overrides.")
                sys.argv[1:] = chosen(name, sys.argv[1:])
                composing.once()
                hydra.main(version_base="1.3", config_path="../conf", config_name=name)(run_job)()
                ranks.leave()
                signals.ignore()

        return launch

    return decorate


def spelled_out(arguments: list[str]) -> list[str]:
    """The command line as Hydra takes it: `preflight=true` as a key, for a node cannot be a switch as well, and names
    that its grammar has no words for in quotes."""
    given = [
        re.sub(r"^preflight=(true|false)$", r"preflight.only=\1", each, flags=re.IGNORECASE) for each in arguments
    ]
    return [overrides.quoted(each) for each in given]


def _published(main, cfg: DictConfig, recipe: str):
    """`publish=true`: look whether it may be published, run the recipe unless it is finished, publish what it made."""
    from rlhf_recipes import memory, run
    from rlhf_recipes.launch import publish_after
    from rlhf_recipes.publish import publish

    run.environment()
    ranks.by_first(publish_after.check_ready, cfg, recipe)
    if ranks.by_first(publish_after.finished, cfg):
        value = None
        print(f"{run.relative(Path(cfg.output_dir))}: finished before, kept.", flush=True)
    else:
        value = main(cfg)
    if not ranks.is_first():
        return value
    ranks.leave()
    memory.forget_peak()  # the model, too: it is loaded again
    asked = publish_after.options(cfg, recipe)
    publish.print_outcome(asked, publish.publish(asked))
    return value


@contextmanager
def _no_empty_folder():
    """Hydra makes the run's folder before the recipe starts: where the recipe leaves nothing in it, it goes. Nobody
    holds it then."""
    try:
        yield
    finally:
        locks.release_all()
        with suppress(OSError):  # not empty
            Path(HydraConfig.get().runtime.output_dir).rmdir()


def _leave_script_folder() -> None:
    # `python recipes/dpo.py` puts recipes/ first on the path, where evaluate.py would pass for the package `evaluate`;
    # `python -m` puts the current folder there, and so would the processes that libraries start.
    first = Path(sys.path[0] or ".").resolve()
    script = first == Path(sys.argv[0]).resolve().parent and (first / "pipeline.py").exists()
    if script or (first == Path.cwd() and first != Path(__file__).parents[2]):
        sys.path.pop(0)
    os.environ.setdefault("PYTHONSAFEPATH", "1")
