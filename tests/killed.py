"""A recipe with a death sentence: `python -m killed "step 5" dpo trainer.max_steps=9` ends by SIGKILL in step 5.

"told in 5" sends it SIGUSR1, which it can hear; "answered draft" ends a `cai` by a draft that it has just written;
"stage dpo" ends a pipeline before that stage; "operation 7" at its seventh change of a file below the current folder.

With other faults it may live: "nothing 0" has none, but counts these changes, into the file `operations`; "limit 4096"
lets no file grow beyond so many bytes, "more 100" the process by so many MiB; "memory in 5" finds no memory of a
device in step 5; "no number in 5" is a gradient of NaN; "clock back at 5" sets the clock back by a day when that step
is saved, and kills two steps later.
"""

import atexit
import functools
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

DAY = 86_400
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink")


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_end_of_step(moment, sentence):
    from rlhf_recipes.training import callbacks

    callbacks.Progress.on_step_end = lambda self, args, state, *_, **__: (
        sentence() if state.global_step == int(moment) else None
    )


def kill_at_step(moment):
    at_end_of_step(moment, die)


def tell_in_step(moment):
    at_end_of_step(moment, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def kill_behind_weights(moment):
    from transformers import Trainer

    save = Trainer._save_optimizer_and_scheduler
    Trainer._save_optimizer_and_scheduler = lambda self, folder: (
        die() if self.state.global_step == int(moment) else save(self, folder)
    )


def kill_in_state(moment):
    from transformers import TrainerState

    def cut_off(self, path):
        write(self, path)
        if self.global_step == int(moment):
            text = Path(path).read_text()
            Path(path).write_text(text[: len(text) // 2])
            die()

    write, TrainerState.save_to_json = TrainerState.save_to_json, cut_off


def kill_when_answered(moment):
    from rlhf_recipes.cai import backend

    def last(self, group):
        answered(self, group)
        if any(request.step.startswith(moment) for request, _ in group):
            die()

    answered, backend.Journal.write = backend.Journal.write, last


def kill_before_stage(moment):
    from rlhf_recipes.launch import pipeline

    run = pipeline._run
    pipeline._run = lambda stage, *rest: die() if stage.name == moment else run(stage, *rest)


def kill_at_adapter(_):
    from rlhf_recipes import models

    models.save_adapter = die


def kill_at_operation(moment):
    """A file that would be opened is left empty, one that a library writes by itself is left half."""
    import pyarrow.parquet
    import safetensors.torch
    import torch

    here, seen, last = os.path.join(os.getcwd(), ""), [0], int(moment)

    def is_here(path):
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(here)

    def count():
        seen[0] += 1
        return seen[0] == last

    def audit(event, args):
        if event == "open":
            path, _, flags = args
            if is_here(path) and (flags or 0) & WRITING and count():
                if flags & os.O_TRUNC:
                    os.truncate(path, 0) if os.path.exists(path) else os.mknod(path)
                die()
        elif event in CHANGES and is_here(args[0]) and count():
            die()

    def half(write, what, path, *args, **kwargs):
        done = write(what, path, *args, **kwargs)
        if is_here(path) and count():
            os.truncate(path, os.path.getsize(path) // 2)
            die()
        return done

    def close(writer):
        closed(writer)
        if is_here(writer.where) and count():
            os.truncate(writer.where, os.path.getsize(writer.where) // 2)
            die()

    safetensors.torch.serialize_file = functools.partial(half, safetensors.torch.serialize_file)
    torch.save = functools.partial(half, torch.save)
    closed, pyarrow.parquet.ParquetWriter.close = pyarrow.parquet.ParquetWriter.close, close
    sys.addaudithook(audit)
    if not last:
        atexit.register(lambda: Path("operations").write_text(str(seen[0])))


def limit_files(moment):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(moment), resource.RLIM_INFINITY))


def limit_memory(moment):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(moment) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def before_update(moment, fault):
    """When the gradients of that step are there, and nothing has looked at them."""
    from rlhf_recipes.training.callbacks import LeaveOut

    def look(self, args, state, control, **kwargs):
        if state.global_step + 1 == int(moment):
            fault([p.grad for group in self.trainer.optimizer.param_groups for p in group["params"]])
        return looked(self, args, state, control, **kwargs)

    looked, LeaveOut.on_pre_optimizer_step = LeaveOut.on_pre_optimizer_step, look


def no_memory(moment):
    import torch

    def fault(gradients):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has no more")

    before_update(moment, fault)


def no_number(moment):
    def fault(gradients):
        next(gradient for gradient in gradients if gradient is not None)[0] = float("nan")

    before_update(moment, fault)


def clock_back(moment):
    """What lies there is of tomorrow, then."""
    from transformers import Trainer

    save = Trainer._save_checkpoint

    def later(self, *args, **kwargs):
        if self.state.global_step == int(moment):
            for path in Path(self.args.output_dir).glob("checkpoint-*"):
                os.utime(path, (time.time() + DAY, time.time() + DAY))
        return save(self, *args, **kwargs)

    Trainer._save_checkpoint = later
    kill_at_step(int(moment) + 2)


ARMS = {
    "step": kill_at_step,
    "told in": tell_in_step,
    "weights of": kill_behind_weights,
    "half the state of": kill_in_state,
    "answered": kill_when_answered,
    "stage": kill_before_stage,
    "adapter": kill_at_adapter,
    "operation": kill_at_operation,
    "nothing": kill_at_operation,
    "limit": limit_files,
    "more": limit_memory,
    "memory in": no_memory,
    "no number in": no_number,
    "clock back at": clock_back,
}


def arm(what, moment=None):
    ARMS[what](moment)


if __name__ == "__main__":
    _, moment, recipe, *sys.argv[1:] = sys.argv
    arm(*moment.rsplit(" ", 1)) if " " in moment else arm(moment)
    runpy.run_module(f"rlhf_recipes.recipes.{recipe}", run_name="__main__", alter_sys=True)
