"""The checkpoint that an interrupted run goes on from: the newest that is whole."""

import fnmatch
import json
import sys
import zipfile
from pathlib import Path

from rlhf_recipes import adapter_files
from rlhf_recipes.run_folder import checkpoints

# What a checkpoint holds, by its files: of transformers, in one of these shapes where the model lies in parts. It goes
# on without the last three where they are not there, and to another end.
PARTS = {
    "weights": ("adapter_model.*", "model*.safetensors", "pytorch_model*"),
    "state of the optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "state of the schedule": ("scheduler.pt", "global_step*"),
    "state of the generators": ("rng_state.pth", "rng_state_*.pth"),
}


def find(folder: Path) -> str | None:
    """The newest checkpoint to continue from: one that was written to its end (`trainer_state.json` comes last) and is
    whole, and not the last step of all where that lies inside an epoch, since transformers would train one step too
    many.

    What cannot be read is skipped with a line, and stays where it is.

    Args:
        folder: the run's.
    """
    for checkpoint in reversed(checkpoints(folder)):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            if state["global_step"] >= state["max_steps"] and state["epoch"] % 1:
                continue
            reason = _flaw(checkpoint)
            if reason is None:
                return str(checkpoint)
        except FileNotFoundError:
            reason = "it was not written to its end"
        except OSError as error:
            reason = error.strerror
        except (ValueError, LookupError, TypeError):
            reason = "its trainer_state.json is damaged"
        print(f"{checkpoint}: is skipped, {reason}.", file=sys.stderr, flush=True)
    return None


def processes_of(checkpoint: Path) -> int | None:
    """How many processes wrote a checkpoint: each leaves the state of its generators; None where there is none."""
    found = [path for shape in PARTS["state of the generators"] for path in checkpoint.glob(shape)]
    return len(found) or None


def _flaw(checkpoint: Path) -> str | None:
    """Why a checkpoint that was written to its end is not whole; None where it is."""
    names = [path.name for path in checkpoint.iterdir()]
    for part, shapes in PARTS.items():
        if not any(fnmatch.fnmatchcase(name, shape) for name in names for shape in shapes):
            return f"it has no {part}"
    cut_off = (path.name for path in sorted(checkpoint.rglob("*")) if path.is_file() and not _is_whole(path))
    return next((f"its {name} is cut off or damaged" for name in cut_off), None)


def _is_whole(path: Path) -> bool:
    """Whether a file of safetensors, or of torch, is as long as its header says, and one of JSON can be read; of any
    other, True."""
    try:
        if path.suffix == ".json" and path.stat().st_size < 2**20:  # not a tokenizer's, which nobody reads again
            json.loads(path.read_bytes())
        if path.suffix in (".pt", ".pth"):
            zipfile.ZipFile(path).close()
        elif path.suffix == ".safetensors":
            adapter_files.shapes(path)
        return True
    except (ValueError, zipfile.BadZipFile):  # a Refusal is one
        return False
