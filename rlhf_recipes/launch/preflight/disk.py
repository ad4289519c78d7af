"""What runs take of a disk: what is fetched, what they leave, and checkpoints while they run."""

import math
import shutil
from pathlib import Path
from typing import Any

from rlhf_recipes.launch.preflight.predict_memory import GIB
from rlhf_recipes.launch.preflight.report import JobReport


def needed(found: list[JobReport], folder: Path) -> dict[str, Any]:
    """What the runs leave behind, and most checkpoints of one that runs."""
    trained = [seen.lora for seen in found if seen.lora]
    adapters = sum(4 * each["numbers"] * (1 + each["kept"]) for each in trained)
    checkpoints = max((each["checkpoints"] * each["bytes"] for each in trained), default=0)
    downloads = {seen.model["id"]: seen.model["download_gib"] for seen in found if seen.model}
    need = (adapters + checkpoints) / GIB + sum(downloads.values())
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free / GIB
    stops = (
        [f"{folder}: needs {need:.1f} GiB, {free:.1f} GiB are free. Free space or choose another."]
        if need > free
        else []
    )
    return {"need_gib": need, "free_gib": free, "stops": stops}


def checkpoints(args, steps: int) -> dict[str, int]:
    """How many `checkpoints` of a run lie there at a time, one of them being written, and of how many the adapter is
    `kept` when it is finished."""
    if args.save_strategy == "no":
        return {"checkpoints": 0, "kept": 0}
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)  # else a share of them
    written = args.num_train_epochs if args.save_strategy == "epoch" else steps / max(every, 1)
    written, limit = math.ceil(written), args.save_total_limit
    return {"checkpoints": min(written, limit + 1) if limit else written, "kept": 0 if limit else written}
