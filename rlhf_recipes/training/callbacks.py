"""What a run says while it trains: a progress line with ETA, metrics on disk, and what the doctor sees."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from rlhf_recipes import memory, methods, progress, ranks, run_folder, signals, text
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.run_folder import write_atomically
from rlhf_recipes.secrets import redact
from rlhf_recipes.training import doctor
from rlhf_recipes.training.doctor_record import BROKEN, BY_DOCTOR, Record

# What TRL and transformers count since the launch: wrong after a resume.
SINCE_LAUNCH = ("num_tokens", "train_loss")
SHOWN = ("reward", "kl", "loss", "eval_loss", "rewards/accuracies", "accuracy", "mean_token_accuracy")


def watch(trainer, run) -> None:
    """Replace the trainer's own printing by `Progress`, and keep metrics.jsonl in step with the training.

    Of several processes all have saved their part of a checkpoint before the first writes its last file.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(run.recipe))
    # These two add to the row: the doctor reads what LeaveOut adds, MetricsFile writes both.
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.fp16):
        trainer.add_callback(LeaveOut(trainer))
    if run.config["doctor"] != "none":
        trainer.add_callback(Doctor(run, trainer, strict=run.config["doctor"] == "strict"))
    trainer.add_callback(MetricsFile(run.dir / "metrics.jsonl"))
    trainer.add_callback(ReturnFreedMemory())
    trainer.add_callback(KeepNewest(trainer.args))
    trainer.add_callback(EndWhenTold())
    if trainer.args.report_to:
        trainer.add_callback(Tracker(trainer))
    if hasattr(trainer, "samples"):
        trainer.add_callback(SamplesFile(run.dir / "samples.jsonl", trainer))
    if ranks.world_size() > 1:
        save_own = trainer._save_rng_state
        trainer._save_rng_state = lambda folder: (save_own(folder), ranks.barrier())


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


class EndWhenTold(TrainerCallback):
    """A machine that is taken back: the step at hand is the last, and a checkpoint is written of it."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.told = False
        signals.train(True)

    def on_step_end(self, args, state, control, **kwargs):
        self.told = signals.told()
        if self.told:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.told:
            signals.end(f"Step {state.global_step} of {state.max_steps} is saved.")

    def on_train_end(self, args, state, control, **kwargs):
        signals.train(False)


class KeepNewest(TrainerCallback):
    """Of the checkpoints, those of the last `save_total_limit` steps.

    transformers goes by the times of their folders: where the clock was set back in between, it removes the newest.
    """

    def __init__(self, args):
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args, state, control, **kwargs):
        if not (args.should_save and self.limit):
            return
        there = run_folder.checkpoints(Path(args.output_dir).parent)
        older = [path for path in there if int(path.name.rpartition("-")[2]) <= state.global_step][: -self.limit]
        for path in older:
            if path != Path(state.best_model_checkpoint or ""):
                shutil.rmtree(path, ignore_errors=True)


class LeaveOut(TrainerCallback):
    """A step whose gradient is not finite changes nothing: every weight, and all that comes after, would be NaN.

    Each row of the log has their number as `steps_left_out`, from the first on, and so has every checkpoint. In
    float16 the scaler does this; PPO ends.
    """

    KEY = "steps_left_out"

    def __init__(self, trainer):
        self.trainer, self.count = trainer, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.count = state.stateful_callbacks.get(self.KEY, 0)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trained = [p for group in self.trainer.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if torch.nn.utils.get_total_norm([parameter.grad for parameter in trained]).isfinite():
            return
        for parameter in trained:
            parameter.grad = None
        self.count += 1
        state.stateful_callbacks[self.KEY] = self.count
        if state.is_world_process_zero:
            print(f"step {state.global_step + 1}: is left out, its gradient is not finite.", flush=True)

    def on_log(self, args, state, control, **kwargs):
        if self.count:
            state.log_history[-1][self.KEY] = self.count


class GrowingFile(TrainerCallback):
    """A file with a line for each entry of a list that grows. The first log of a launch writes it whole, so that after
    a resume it holds nothing of steps that were lost; each further one adds what has come."""

    def __init__(self, path: Path):
        self.path, self.lines = path, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.lines = 0

    def add(self, entries: list[dict], as_row: Callable[[dict], dict] = dict) -> None:
        """Write those that have no line yet."""
        if not ranks.is_first():
            return
        text = "".join(json.dumps(as_row(entry), ensure_ascii=False) + "\n" for entry in entries[self.lines :])
        if self.lines:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        else:
            write_atomically(self.path, text)
        self.lines = len(entries)


class MetricsFile(GrowingFile):
    """metrics.jsonl is the trainer's log history."""

    def on_log(self, args, state, control, **kwargs):
        def as_row(row: dict) -> dict:
            kept = {key: value for key, value in row.items() if key not in SINCE_LAUNCH}
            return {**kept, "max_steps": state.max_steps}

        self.add(state.log_history, as_row)


class SamplesFile(GrowingFile):
    """samples.jsonl: some completions of every rollout, with their scores."""

    def __init__(self, path: Path, trainer):
        super().__init__(path)
        self.trainer = trainer

    def on_log(self, args, state, control, **kwargs):
        self.add(self.trainer.samples)


class Tracker(TrainerCallback):
    """What a tracker (`trainer.report_to`) shows beside the numbers of the log, which transformers' callbacks send it:
    a table of PPO's samples with each log and, at the end, of the held-out metrics.

    A tracker without tables is sent the numbers of the held-out metrics alone.

    Raises:
        Refusal: nobody is logged in to wandb, before a step is taken.
    """

    def __init__(self, trainer):
        self.trainer, self.shown = trainer, 0
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback) and trainer.state.is_world_process_zero:
                import wandb

                wandb.finish()  # what a job of this sweep that failed has left open; transformers would go on in it
                try:
                    wandb.login()
                except wandb.Error as error:
                    raise Refusal(
                        f"tracker=wandb: {redact(first_line(error)).rstrip('.')}. Or keep everything here: set "
                        "WANDB_MODE=offline."
                    ) from error

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown = len(getattr(self.trainer, "samples", []))  # of the run that is continued

    def on_log(self, args, state, control, **kwargs):
        samples = getattr(self.trainer, "samples", [])[self.shown :]
        self.shown += len(samples)
        if samples and state.is_world_process_zero:
            rows = [[_shown_prompt(s["prompt"]), redact(s["completion"]), s["reward"]] for s in samples]
            self._show("samples", ["prompt", "completion", "reward"], rows)

    def finish(self, before: dict, metrics: dict) -> None:
        """Send the held-out metrics, as numbers (`test/<name>`) and as a table, and end the tracker's run.

        Args:
            before: name -> estimate before training.
            metrics: the same after training.
        """
        trainer = self.trainer
        if not trainer.state.is_world_process_zero:
            return
        numbers = {f"test_{name}": after.value for name, after in metrics.items() if after.value is not None}
        # Not trainer.log: the log history is the training's.
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, numbers)
        columns = ["metric", "before", "after", "low", "high", "n"]
        rows = [
            [name, before[name].value, after.value, after.low, after.high, after.n] for name, after in metrics.items()
        ]
        self._show("held_out", columns, rows)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback):
                import wandb

                wandb.finish()  # else the next job of a sweep would go on in it
            elif isinstance(callback, TrackioCallback | TensorBoardCallback):
                callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def _show(self, name: str, columns: list[str], rows: list[list]) -> None:
        """A table in each tracker that has some."""
        step = self.trainer.state.global_step
        escaped = [[text.markdown(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback):
                import wandb

                wandb.log({name: wandb.Table(columns=columns, data=rows), "train/global_step": step})
            elif isinstance(callback, TrackioCallback):
                import trackio

                trackio.log({name: trackio.Table(columns=columns, data=escaped), "train/global_step": step})
            elif isinstance(callback, TensorBoardCallback):
                lines = [columns, ["---"] * len(columns), *escaped]
                table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
                callback.tb_writer.add_text(name, table, step)
                callback.tb_writer.flush()


def _shown_prompt(prompt: str | list[dict]) -> str:
    """A prompt as one text: its turns below each other."""
    turns = prompt if isinstance(prompt, list) else [{"role": "", "content": prompt}]
    return redact("\n".join(f"{turn['role']}: {turn['content']}".removeprefix(": ") for turn in turns))


class Doctor(TrainerCallback):
    """Asks the doctor's rules whenever the trainer logs, and prints a line when a rule first finds something. They
    read the whole log: of one with more than `OFTEN` rows they are asked when it has grown by a hundredth, or when a
    row is not finite.

    Each row of the log gets `dead_gradients`, the share of the policy's (or reward model's) trained tensors without a
    gradient in the row's last step, unless that is left out; the first step always has a row. The rules read the log
    alone, which checkpoints keep: a resumed run has the verdict of one that was not.

    Args:
        strict: a broken run ends at once with its last good weights. A row tells of the weights before its step, so
            these are the ones before the step of the last finite row that was looked at without such a finding.
    """

    OFTEN = 200

    ROWS = 256  # training replies that are looked at for their length and their EOS
    FILE = "doctor.pt"  # the last good weights, beside a checkpoint

    def __init__(self, run, trainer, strict: bool):
        self.run, self.trainer, self.strict = run, trainer, strict
        self.stopped: str | None = None
        self._rows = 0
        self._said: set[tuple[str, str]] = set()
        self._dead: float | None = None
        self._before: list[torch.Tensor] = []  # the weights before the running step
        self._good: list[torch.Tensor] = []

    def record(self, before: dict | None = None, after: dict | None = None) -> Record:
        """What is known of the run; `before` and `after`, its held-out metrics, when it is over."""
        return Record(
            self.run.recipe,
            [row for row in self.trainer.state.log_history if "loss" in row],
            self.trainer.args,
            self.trainer.state.max_steps,
            self.facts,
            before or {},
            after or {},
            self.stopped or getattr(self.trainer, "stopped", None),
        )

    @cached_property
    def facts(self) -> dict:
        """Of the tokenised training replies (labelled ones: the good): mean length in tokens, and share that ends with
        EOS within max_length."""
        anchored = {"anchored": True} if self.run.config.get("reference") else {}
        data, limit = self.trainer.train_dataset, getattr(self.trainer.args, "max_length", None)
        key = methods.of(self.run.recipe, self.run.config["trainer"]["_target_"]).replies
        if not key or not hasattr(data, "select"):
            return anchored
        from rlhf_recipes.inference import stop_ids

        generation_config = self.trainer.model.generation_config
        stops, ends, lengths = set(stop_ids(generation_config, self.trainer.processing_class)), [], []
        for row in data.select(range(min(self.ROWS, len(data)))):
            if not row.get("label", True):
                continue
            ids = [*row.get("prompt_ids", []), *row[key]][:limit]
            ends.append(not stops.isdisjoint(ids[-3:]))  # a template may close a turn with a line break
            lengths.append(len(row[key]))
        if not lengths:
            return anchored
        return anchored | {"reply_tokens": sum(lengths) / len(lengths), "ends_with_eos": sum(ends) / len(ends)}

    def on_train_begin(self, args, state, control, **kwargs):
        self._rows = sum("loss" in row for row in state.log_history)
        kept = Path(self.run.checkpoint or "") / self.FILE
        if self.strict:
            self._good = torch.load(kept, weights_only=True) if kept.is_file() else self._weights()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.strict:
            self._before = self._weights()
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:  # each process has parts of them
            return
        left_out = all(parameter.grad is None for parameter in self._parameters())
        self._dead = None if left_out else dead_share(self.trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:  # where a policy still is its reference
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        if self._dead is not None:
            state.log_history[-1]["dead_gradients"] = round(self._dead, 4)
        self._rows += 1
        finite = all(math.isfinite(logs[key]) for key in ("loss", "grad_norm") if key in logs)
        if finite and self._rows > self.OFTEN and self._rows % (self._rows // 100):
            return
        findings = doctor.examine(self.record())["findings"]
        for finding in findings:
            if state.is_world_process_zero and (finding["rule"], finding["level"]) not in self._said:
                print(f"doctor: {doctor.line(finding)}", flush=True)
            self._said.add((finding["rule"], finding["level"]))
        broken = [finding for finding in findings if finding["level"] == BROKEN]
        if not broken:
            self._good = self._before if finite else self._good
        elif self.strict and not self.stopped and not getattr(self.trainer, "stopped", None):
            self.stopped = f"{BY_DOCTOR}{broken[0]['rule'].replace('_', ' ')} at step {state.global_step}"
            control.should_training_stop = True
            self._leave_unsaved(control)
            for parameter, good in zip(self._parameters(), self._good, strict=True):
                parameter.data.copy_(good)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            self._leave_unsaved(control)

    def on_save(self, args, state, control, **kwargs):
        if self.strict and state.is_world_process_zero:
            torch.save(self._good, Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)

    @staticmethod
    def _leave_unsaved(control) -> None:
        """A checkpoint of this step would be continued; `save_strategy=best` saves what it evaluates."""
        control.should_save = control.should_evaluate = False

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.trainer.optimizer.param_groups for parameter in group["params"]]

    def _weights(self) -> list[torch.Tensor]:
        return [parameter.detach().cpu().clone() for parameter in self._parameters()]


def dead_share(model) -> float:
    """Share of the trained tensors of `model` whose gradient is exactly zero or missing.

    With LoRA only those of the adapter "default". An A whose B is zero has no gradient by construction.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad or p.grad is not None}
    trained = {name: p for name, p in trained.items() if ".default" in name} or trained
    none = torch.zeros((), dtype=torch.bool, device=next(iter(trained.values())).device)
    alive = torch.stack([none if p.grad is None else p.grad.any() for p in trained.values()])
    counts = torch.stack(
        [trained[name.replace("_A.", "_B.")].any() if ".lora_A." in name else ~none for name in trained]
    )
    return (counts & ~alive).sum().item() / counts.sum().item()


class ReturnFreedMemory(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        memory.return_freed_memory()
