"""Recipes one after another, in this process as one of several, and what it writes.

    torchrun --nproc_per_node 2 -m warm_processes '{"<folder>": ["<recipe>", "<override>", ...], ...}' <seen>

<seen>.<rank>.json gets `writes`, what this process has opened for writing, renamed or removed in the current folder,
and `draws`, how many generators of random numbers it has made for each folder.
"""

import json
import os
import signal
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def note_writes() -> list[str]:
    """A list that grows with what is written below the current folder. Writers that are no Python's are told of by
    what calls them."""
    import pyarrow.parquet
    import safetensors.torch
    import torch

    seen: list[str] = []

    def note(path) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            path = Path(os.fsdecode(path)).absolute()
            if path.is_relative_to(Path.cwd()):
                seen.append(str(path.relative_to(Path.cwd())))

    def audit(event: str, args: tuple) -> None:
        if event == "open" and args[2] is not None and args[2] & WRITING:
            note(args[0])
        elif event == "os.rename":
            note(args[0])
            note(args[1])
        elif event == "os.remove" and args[1] != -1:
            pass  # a name below a folder that `shutil.rmtree` removes, which is noted
        elif event in ("os.remove", "os.truncate", "os.symlink", "shutil.rmtree"):
            note(args[0])

    def noted(owner, name: str, place: int) -> None:
        original = getattr(owner, name)

        def called(*args, **kwargs):
            note(args[place])
            return original(*args, **kwargs)

        setattr(owner, name, called)

    sys.addaudithook(audit)
    noted(safetensors.torch, "serialize_file", 1)
    noted(torch, "save", 1)
    noted(pyarrow.parquet, "ParquetWriter", 0)
    return seen


def short(completions, **kwargs):
    """A reward of a function."""
    return [-float(len(each if isinstance(each, str) else each[-1]["content"])) for each in completions]


def refuses_on_rank_1(completions, **kwargs):
    if os.environ.get("RANK") == "1":
        raise ValueError("not on this rank")
    return short(completions)


def kills_rank_1_once(completions, trainer_state, **kwargs):
    """The process is gone in its second rollout, unless it was before."""
    been = Path("been")
    if os.environ.get("RANK") == "1" and trainer_state.global_step == 2 and not been.exists():
        been.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return short(completions)


def count_draws() -> Counter:
    """A count, under the name of the job at hand, that grows with the generators that are made."""
    import numpy

    made, default_rng = Counter(), numpy.random.default_rng

    def counted(*args):
        made[made.job] += 1
        return default_rng(*args)

    numpy.random.default_rng = counted
    return made


def main(jobs: str, seen: str) -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    import rlhf_recipes.config  # noqa: F401  registers the nodes that the groups start from
    from rlhf_recipes import inference, ranks, run
    from rlhf_recipes.cai import local

    run.environment()
    writes, draws = note_writes(), count_draws()
    inference.BATCH_TOKENS, local.BATCH_ROWS = 600, 2  # so that there is something to share
    for folder, (recipe, *overrides) in json.loads(jobs).items():
        draws.job = folder
        GlobalHydra.instance().clear()
        with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name=recipe):
            cfg = hydra.compose(recipe, overrides=overrides)
        cfg.output_dir = folder
        try:
            import_module(f"rlhf_recipes.recipes.{recipe}").main.__wrapped__(cfg)
        except SystemExit as error:  # a verdict's
            assert not error.code, error
    Path(f"{seen}.{ranks.rank()}.json").write_text(json.dumps({"writes": writes, "draws": draws}))
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
