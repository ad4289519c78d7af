"""A recipe with a death sentence: `python -m killed "step 5" dpo trainer.max_steps=9` ends by SIGKILL in step 5.

"told in 5" sends it SIGUSR1, which it can hear; "answered draft" ends a `cai` by a draft that it has just written;
"stage dpo" ends a pipeline before that stage."""

import os
import runpy
import signal
import sys
from pathlib import Path


def arm(what, moment=None):
    from transformers import Trainer, TrainerState

    from rlhf_recipes import models
    from rlhf_recipes.training import callbacks

    def die(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if what in ("step", "told in"):
        sentence = die if what == "step" else lambda: os.kill(os.getpid(), signal.SIGUSR1)
        callbacks.Progress.on_step_end = lambda self, args, state, *_, **__: (
            sentence() if state.global_step == int(moment) else None
        )
    elif what == "weights of":
        save = Trainer._save_optimizer_and_scheduler
        Trainer._save_optimizer_and_scheduler = lambda self, folder: (
            die() if self.state.global_step == int(moment) else save(self, folder)
        )
    elif what == "answered":
        from rlhf_recipes.cai import backend

        def last(self, group):
            answered(self, group)
            if any(request.step.startswith(moment) for request, _ in group):
                die()

        answered, backend.Journal.write = backend.Journal.write, last
    elif what == "stage":
        from rlhf_recipes.launch import pipeline

        run = pipeline._run
        pipeline._run = lambda stage, *rest: die() if stage.name == moment else run(stage, *rest)
    elif what == "half the state of":

        def cut_off(self, path):
            write(self, path)
            if self.global_step == int(moment):
                text = Path(path).read_text()
                Path(path).write_text(text[: len(text) // 2])
                die()

        write, TrainerState.save_to_json = TrainerState.save_to_json, cut_off
    else:
        models.save_adapter = die


if __name__ == "__main__":
    _, moment, recipe, *sys.argv[1:] = sys.argv
    arm(*moment.rsplit(" ", 1)) if " " in moment else arm(moment)
    runpy.run_module(f"rlhf_recipes.recipes.{recipe}", run_name="__main__", alter_sys=True)
