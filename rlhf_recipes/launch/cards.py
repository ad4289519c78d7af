"""Which of a machine's cards a process takes where no launcher gives it one.

transformers would spread one process over all that are visible (`nn.DataParallel`), which TRL's trainers refuse once
the model is loaded, or would multiply the batch by their number; so a process sees one card, and says how to use all.
"""

import os
import shlex
from pathlib import Path

from rlhf_recipes import commands, config, ranks, run
from rlhf_recipes.errors import Refusal
from rlhf_recipes.text import line

VISIBLE = "CUDA_VISIBLE_DEVICES"
# What was visible before one card was taken, for the jobs of a sweep in processes of their own.
BEFORE = "RLHF_RECIPES_CARDS"
# Of NVIDIA's driver, of AMD's, of Windows' beneath WSL: without one of them torch, slow to import, need not be asked.
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def take_one(recipe: str, overrides: list[str] | None = None) -> None:
    """Of several visible cards take the first, and say in a line how to use all. It comes before CUDA starts.

    Args:
        overrides: of the command, which is said again; None: it is a sweep.

    Raises:
        Refusal: `accelerate launch` was asked for several processes and started this one alone.
    """
    one = "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    if one and "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        raise Refusal(
            "--num_processes: accelerate launch has started one process, as it does with --cpu. Give --multi_gpu in "
            "its place, which starts all (on a machine without a card too), or --num_processes 1."
        )
    cards = _visible(os.environ.get(VISIBLE))
    if len(cards) < 2:
        return
    os.environ[BEFORE], os.environ[VISIBLE] = ",".join(cards), cards[0]
    said = f"{len(cards)} cards are visible, and {recipe} takes one. {_how_to_use_all(recipe, overrides, len(cards))}"
    print(line(said), flush=True)


def take_for_job(number: int) -> None:
    """Give a process that runs jobs of a sweep a card: that of its first job, which it keeps.

    Args:
        number: of the job in the sweep.
    """
    cards = _visible(os.environ.pop(BEFORE, None) or os.environ.get(VISIBLE))
    if len(cards) > 1:
        os.environ[VISIBLE] = cards[number % len(cards)]


def give_back(environment: dict[str, str]) -> dict[str, str]:
    """An environment for a launcher: with all cards that were visible before one was taken."""
    cards = environment.get(BEFORE)
    return {**environment, VISIBLE: cards} if cards else environment


def _visible(said: str | None) -> list[str]:
    """The cards that this process can choose from, as CUDA_VISIBLE_DEVICES names them; none where it is one of
    several, each with a card of its own, or where CUDA has started."""
    if said == "" or ranks.world_size() > 1 or not any(Path(device).exists() for device in DEVICES):
        return []
    import torch

    if torch.cuda.is_initialized():
        return []
    return said.split(",") if said else [str(each) for each in range(torch.cuda.device_count())]


def _how_to_use_all(recipe: str, overrides: list[str] | None, cards: int) -> str:
    if overrides is None:
        return f"Jobs on all of them: hydra/launcher=joblib hydra.launcher.n_jobs={cards}"
    file = run.relative(config.CONF / "accelerate" / "ddp.yaml")
    if recipe == "pipeline":
        return f"Each stage on all of them: launch={file}"
    words = shlex.join(each for each in overrides if not each.startswith("preflight.only="))
    return f"All of them: {commands.launched(recipe, file)} {words}".rstrip()
