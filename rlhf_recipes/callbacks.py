"""What a run says while it trains: a progress line with ETA, and metrics on disk."""

import json
from pathlib import Path

from transformers import PrinterCallback, TrainerCallback

from rlhf_recipes import memory, progress
from rlhf_recipes.run import write_atomically

# What TRL and transformers count since the launch: wrong after a resume.
SINCE_LAUNCH = ("num_tokens", "train_loss")
SHOWN = ("reward", "kl", "loss", "eval_loss", "rewards/accuracies", "accuracy", "mean_token_accuracy")


def watch(trainer, run) -> None:
    """Replace the trainer's own printing by `Progress`, and keep metrics.jsonl in step with the training."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(run.recipe))
    trainer.add_callback(MetricsFile(run.dir / "metrics.jsonl"))
    trainer.add_callback(ReturnFreedMemory())
    if hasattr(trainer, "samples"):
        trainer.add_callback(SamplesFile(run.dir / "samples.jsonl", trainer))


class Progress(TrainerCallback):
    """The progress line of a training, with the last logged loss and accuracy."""

    def __init__(self, recipe: str):
        self.recipe, self.metrics = recipe, ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.line = progress.Line(f"{self.recipe} step", state.max_steps, state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        seen = [f"{name.rpartition('/')[2]} {float(logs[name]):.3f}" for name in SHOWN if name in logs]
        self.metrics = " · ".join(seen) or self.metrics

    def on_step_end(self, args, state, control, **kwargs):
        self.line.update(state.global_step, self.metrics)


class MetricsFile(TrainerCallback):
    """metrics.jsonl is the trainer's log history: after a resume it holds no row of steps that were lost."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, **kwargs):
        rows = [{key: value for key, value in row.items() if key not in SINCE_LAUNCH} for row in state.log_history]
        lines = [json.dumps({**row, "max_steps": state.max_steps}) for row in rows]
        write_atomically(self.path, "\n".join(lines) + "\n")


class SamplesFile(TrainerCallback):
    """samples.jsonl: some completions of every rollout, with their scores."""

    def __init__(self, path: Path, trainer):
        self.path, self.trainer = path, trainer

    def on_log(self, args, state, control, **kwargs):
        lines = [json.dumps(sample, ensure_ascii=False) for sample in self.trainer.samples]
        write_atomically(self.path, "\n".join(lines) + "\n")


class ReturnFreedMemory(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        memory.return_freed_memory()
