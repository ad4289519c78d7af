"""Memory that was not enough, on one line: which role takes what, and the nearest setting that takes less."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from rlhf_recipes import config, memory, methods, ranks, run, sharding
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.lineage import rewarding
from rlhf_recipes.references import adapter_in

# A thread needs memory for its stack, a process for all that it shares; or the system has as many as it allows.
NO_THREAD, NO_PROCESS = "can't start new thread", "Resource temporarily unavailable"
# How torch says it of a device and of main memory, and the system of main memory.
SIGNS = (
    "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory",
    "can't allocate memory", "not enough memory: you tried to allocate", "Cannot allocate memory", NO_THREAD,
)  # fmt: skip
LESS = 0.8  # of what was predicted, where it did not fit
SHOWN = 5  # roles


@contextmanager
def told(cfg: DictConfig) -> Iterator[None]:
    """Around a run of this config.

    Raises:
        Refusal: in place of what the libraries raise where there is no memory.
    """
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold the model
        memory.make_room()
        raise Refusal(_said(error, cfg)) from error


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, *([torch.OutOfMemoryError] if torch else []))):
        return True
    if isinstance(error, BlockingIOError):  # also what a full pipe raises, with other words
        return NO_PROCESS in str(error)
    return not isinstance(error, Refusal) and any(sign in str(error) for sign in SIGNS)


def _said(error: Exception, cfg: DictConfig) -> str:
    place = "GPU memory" if any(kind in str(error) for kind in ("CUDA", "CUBLAS", "MPS")) else "main memory"
    place += ", or of threads" if NO_THREAD in str(error) else ", or of processes" if NO_PROCESS in str(error) else ""
    said = f"out of {place} ({first_line(error)[:160].rstrip('.')})."
    try:
        roles, changes = _predicted(cfg) if "trainer" in cfg else ("", [])
    except Exception:  # there may be too little memory to say more
        roles, changes = "", []
    if roles:
        said += f" At the peak, on rows of the greatest length, are needed about {roles} GiB."
    if changes:
        return f"{said} Less is taken with {' '.join(changes)} overwrite=true; preflight=true looks before a start."
    return f"{said} Choose a smaller model or quantization=nf4, or end what else takes memory of this machine."


def _predicted(cfg: DictConfig) -> tuple[str, list[str]]:
    """What each role takes, the largest first, and the overrides nearest to the config that take less."""
    from rlhf_recipes import models
    from rlhf_recipes.launch.preflight import predict_memory
    from rlhf_recipes.launch.preflight.job import proposal

    recipe = config.trainer_recipes()[cfg.trainer._target_]
    args = models.training_args(cfg.trainer, run.Run(Path(), recipe, {}))
    base, batch = predict_memory.backbone(cfg, recipe), _largest(cfg, recipe, args, predict_memory.Batch)
    predict = partial(
        predict_memory.predict,
        cfg,
        libraries=0.0,
        rewards=sum(adapter_in(each) is not None for each in rewarding(run.resolved(cfg))),
        cards=ranks.world_size() if sharding.is_on() else 1,
    )
    seen = predict(args, base, batch)
    limit = LESS * seen["peak_gib"]
    changes = proposal(recipe, args, batch, lambda args, batch: predict(args, base, batch)["peak_gib"] <= limit)
    largest = sorted(seen["roles"].items(), key=lambda each: -each[1])[:SHOWN]
    return ", ".join(f"{role} {gib:.2f}" for role, gib in largest), changes


def _largest(cfg: DictConfig, recipe: str, args, batch: type):
    """A micro-batch of the longest rows that the settings let through."""
    sequences = args.per_device_train_batch_size * (2 if methods.of(recipe).rows == "pairs" else 1)
    if methods.of(recipe).samples:
        completion = args.max_completion_length
        tokens = (cfg.max_prompt_length or completion) + completion
        return batch(sequences, tokens, completion=completion, prompts=args.prompts_per_rollout)
    return batch(sequences, args.max_length or 1024)
