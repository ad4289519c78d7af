"""Real steps of a job, run by its own recipe in a process of its own: seconds, and the peak that they took.

The rows are the longest of the data, two micro-batches of them, so that what a run takes at most is taken here.
"""

import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from rlhf_recipes import methods, ranks
from rlhf_recipes.config import CONF, flatten
from rlhf_recipes.data.load import Splits
from rlhf_recipes.launch.refusals import NOTE

MICRO_BATCHES = 2
# What the process that takes the steps is not told: two steps of a model must never be published.
NOT_THE_STEPS = ("data=", "data.", "run_name=", "output_dir=", "preflight", "publish=", "repo_id=")
TEST_ROWS = 4
SIMULATED = 200  # micro-batches drawn to know what padding makes of the rows


def measure(recipe: str, overrides: list[str], args, splits: Splits, sizes: list[int]) -> dict:
    """Train the job's model on two micro-batches (what samples: one rollout).

    Args:
        overrides: the job's, as on the command line.
        args: the built `trainer`.
        sizes: tokens of each train row.

    Returns:
        `seconds` of an optimizer step on the data as they are, and `peak_gib`; or `error`, why the job cannot run.
    """
    count = (
        args.prompts_per_rollout if methods.of(recipe).samples else MICRO_BATCHES * args.per_device_train_batch_size
    )
    longest = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if is_packed(args):
        full = count * args.max_length
        count = 1 + sum(tokens < full for tokens in itertools.accumulate(sizes[i] for i in longest))
    longest = longest[:count]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", [splits.train[i] for i in longest]), ("test", splits.test[:TEST_ROWS])):
            lines = [json.dumps({key: value for key, value in row.items() if key != "family"}) for row in rows]
            (Path(folder) / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        command = [
            sys.executable,
            "-P",  # the current folder holds data, not code
            "-m",
            f"rlhf_recipes.recipes.{recipe}",
            *_overrides(recipe, overrides, args, folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=ranks.alone_env())
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(NOTE)]
            refusal = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), said[-1:])
            killed = "the system ended it, most likely for want of memory" if done.returncode == -9 else ""
            return {"error": killed or "".join(refusal) or f"exit status {done.returncode}"}
        run = Path(folder) / "run"
        peaks = json.loads((run / "result.json").read_text())["peak_memory_gib"]
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sampled = methods.of(recipe).samples
    seconds = _sampled_seconds(log, args) if sampled else _seconds(log, args, sizes, longest)
    return {"seconds": seconds, "peak_gib": peaks.get("cuda", peaks["process"])}


def _overrides(recipe: str, overrides: list[str], args, folder: str) -> list[str]:
    """The job's command line on the chosen rows, at the end of which nothing of the data node is the job's, in
    whatever file it stands; nor is what would publish, or look again."""
    data = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "base.yaml"))
    keys = {f"data.{key}": "null" if value is None else value for key, value in flatten(data)}
    del keys["data.path"]
    # The rows are written as they shall be read.
    keys |= {"data.test_path": f"{folder}/test.jsonl", "data.test_size": "null", "data.text": "plain"}
    keys |= {"data.too_long": "truncate"}
    if methods.of(recipe).rows == "labelled answers":  # as the rows are written, though the job's may be pairs
        keys["data.format"] = "labelled"
    own = [each for each in overrides if not each.lstrip("+~").startswith(NOT_THE_STEPS)]
    if recipe == "ppo":  # a clip that one step has no use for would be refused
        steps = {"max_steps": args.num_mini_batches, "num_ppo_epochs": 1, "cliprange": 0.2, "dual_clip": "null"}
    elif methods.of(recipe).samples:
        steps = {"max_steps": 1}
    else:
        steps = {"max_steps": MICRO_BATCHES, "gradient_accumulation_steps": 1}
    steps |= {"save_strategy": "no", "load_best_model_at_end": "false", "logging_steps": 1, "report_to": "none"}
    return [
        *own, "data=local", f"data.path={folder}/train.jsonl",
        *(f"{key}={value}" for key, value in keys.items()), *(f"trainer.{k}={v}" for k, v in steps.items()),
        "publish=false", "repo_id=null", "preflight.only=false", "doctor=none", "overwrite=true",
        f"hydra.run.dir={folder}/run", "hydra.mode=RUN",
    ]  # fmt: skip


def _seconds(log: list[dict], args, sizes: list[int], longest: list[int]) -> float:
    """Of an optimizer step: those of the long micro-batches, less what the data's own are shorter after padding."""
    batch = args.per_device_train_batch_size
    micro = next(row["train_runtime"] for row in reversed(log) if "train_runtime" in row) / MICRO_BATCHES
    if is_packed(args):  # every row is filled
        return micro * args.gradient_accumulation_steps
    padded = list(itertools.islice(padded_lengths(sizes, batch), SIMULATED))
    here = [max(sizes[i] for i in longest[start : start + batch]) for start in range(0, len(longest), batch)]
    share = (sum(padded) / len(padded)) / (sum(here) / len(here))
    return micro * share * args.gradient_accumulation_steps


def _sampled_seconds(log: list[dict], args) -> float:
    """Of an optimizer step: its update, and its part of the rollout."""
    if whole := next((row["step_time"] for row in log if "step_time" in row), None):  # TRL's, which begins with one
        return whole
    row = next(row for row in log if "seconds/rollout" in row)
    return row["seconds/update"] + (row["seconds/rollout"] + row["seconds/scoring"]) / args.steps_per_rollout


def padded_lengths(sizes: list[int], batch: int) -> Iterator[int]:
    """Lengths to which micro-batches are padded."""
    return map(max, micro_batches(sizes, batch))


def micro_batches(sizes: list[int], batch: int) -> Iterator[list[int]]:
    """Tokens of the rows of each, epoch after epoch in a drawn order."""
    draw = random.Random(0)
    while True:
        order = draw.sample(sizes, len(sizes))
        yield from (order[start : start + batch] for start in range(0, len(order), batch))


def is_packed(args) -> bool:
    """Whether SFT lays several rows end to end, up to `max_length`."""
    return bool(getattr(args, "packing", False))


def rows_trained(args, sizes: list[int]) -> int:
    """Train rows of an epoch; packed, as many as their tokens fill, or a few more."""
    return math.ceil(sum(sizes) / args.max_length) if is_packed(args) else len(sizes)


def total_steps(recipe: str, args, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run over `rows` train rows, by so many processes."""
    if args.max_steps > 0:
        return args.max_steps
    if methods.of(recipe).samples:
        rollouts = rows * getattr(args, "num_generations", 1) // (args.prompts_per_rollout * processes)
        return math.ceil(args.num_train_epochs * rollouts * args.steps_per_rollout)
    micro_batches = math.ceil(rows / (args.per_device_train_batch_size * processes))
    return math.ceil(args.num_train_epochs * max(1, math.ceil(micro_batches / args.gradient_accumulation_steps)))
