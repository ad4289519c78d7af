"""SIGKILL at any moment, the same command again: the adapter is the one of a run that nobody disturbed."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

STEPS = (
    "data.train_size=24",
    "data.eval_size=4",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.max_steps=12",
    "trainer.save_steps=3",
    "trainer.logging_steps=1",
    "trainer.learning_rate=1e-3",
)
# Dropout draws from the generators in every forward. An epoch has 12 steps.
CASES = {
    "sft": ("sft", ("lora.lora_dropout=0.1",)),
    "reward": ("reward", ("lora.lora_dropout=0.1", "trainer.disable_dropout=false")),
    "dpo": ("dpo", ("trainer.max_steps=14", "trainer.lr_scheduler_type=constant")),  # ends inside an epoch
    "chained_dpo": ("dpo", ("model.adapter=parent",)),
    "kto": ("kto", ("model.adapter=parent",)),
    # Steps 3 and 9, whose checkpoints are continued, lie inside a rollout.
    "ppo": (
        "ppo",
        (
            "model.adapter=parent",
            "reward_funcs=judge",
            "data.train_size=12",
            "trainer.num_ppo_epochs=2",
            "trainer.max_completion_length=6",
            "trainer.kl_controller=adaptive",
            "trainer.normalize_rewards=true",
        ),
    ),
}
CHAINED = "chained_dpo"
# Where a run dies, one after another, and the step that the next launch must continue from.
KILLS = (
    ("step 2", None),  # no checkpoint yet
    ("step 5", 3),
    ("weights of 6", 3),  # the checkpoint's folder is there, without optimizer and trainer_state.json
    ("half the state of 9", 6),  # trainer_state.json is cut off
    ("adapter", 12),  # trained, but nothing saved: not even the 14th step of 14 is done twice
)
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second")


@dataclass
class Outcome:
    exitcode: int
    output: str


@pytest.fixture(scope="module")
def launch(clean_env, tmp_path_factory):
    """launch(recipe, overrides, cwd, kill=None): the command in a process of its own, forked from one that has
    imported everything and computed nothing: a fresh process without ten seconds of imports."""
    server = multiprocessing.get_context("forkserver")
    trainers = [f"trl.trainer.{recipe}_trainer" for recipe in ("sft", "dpo", "kto", "reward")]
    server.set_forkserver_preload(["rlhf_recipes.models", "peft", "bitsandbytes", "matplotlib.pyplot", *trainers])
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        for key in set(os.environ) - set(clean_env):
            patch.delenv(key)
        for key, value in clean_env.items():
            patch.setenv(key, value)

        def launched(recipe, overrides, cwd, kill=None):
            log = logs / f"{len(list(logs.iterdir()))}.txt"
            process = server.Process(target=command, args=(recipe, list(overrides), str(cwd), kill, str(log)))
            process.start()
            process.join(120)
            if process.is_alive():
                process.kill()
            return Outcome(process.exitcode, log.read_text())

        yield launched


def command(recipe, overrides, cwd, kill, log):
    """What `python -m rlhf_recipes.recipes.<recipe> <overrides>` does, with a death sentence."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(cwd)
    sys.argv = [recipe, *overrides]
    if kill:
        arm(*kill.rsplit(" ", 1)) if " " in kill else arm(kill)
    importlib.import_module(f"rlhf_recipes.recipes.{recipe}").main()


def arm(what, moment=None):
    from transformers import Trainer, TrainerState

    from rlhf_recipes import models
    from rlhf_recipes.training import callbacks

    def die(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if what == "step":
        callbacks.Progress.on_step_end = lambda self, args, state, *_, **__: (
            die() if state.global_step == int(moment) else None
        )
    elif what == "weights of":
        save = Trainer._save_optimizer_and_scheduler
        Trainer._save_optimizer_and_scheduler = lambda self, folder: (
            die() if self.state.global_step == int(moment) else save(self, folder)
        )
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


@pytest.fixture(scope="module")
def room(launch, tiny_model_overrides, tmp_path_factory):
    """A folder with an sft run `parent` to chain from, and a reward run `judge`."""
    folder = tmp_path_factory.mktemp("room")
    done = launch("sft", [*tiny_model_overrides, *STEPS, "trainer.max_steps=2", "hydra.run.dir=parent"], folder)
    assert done.exitcode == 0, done.output
    done = launch("reward", [*tiny_model_overrides, *STEPS, "trainer.max_steps=2", "hydra.run.dir=judge"], folder)
    assert done.exitcode == 0, done.output
    return folder


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("seconds/")} for row in rows]


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_run_ends_with_the_same_adapter(launch, room, tiny_model_overrides, case):
    recipe, own = CASES[case]
    arguments = [*tiny_model_overrides, *STEPS, *own]
    for name in ("whole", "again"):
        done = launch(recipe, [*arguments, f"hydra.run.dir={case}_{name}"], room)
        assert done.exitcode == 0, done.output
    whole, again, killed = (room / f"{case}_{name}" for name in ("whole", "again", "killed"))
    assert adapter(whole) == adapter(again) and metrics(whole) == metrics(again)

    last_step = result(whole)["steps"]
    assert last_step == (14 if case == "dpo" else 12)
    continued = None
    for kill, next_start in KILLS:
        done = launch(recipe, [*arguments, f"hydra.run.dir={killed.name}"], room, kill)
        assert done.exitcode == -signal.SIGKILL, done.output
        assert ("Continuing" in done.output) == (continued is not None)
        assert continued is None or f"from step {continued}." in done.output
        assert not (killed / "result.json").exists()
        continued = next_start
    done = launch(recipe, [*arguments, f"hydra.run.dir={killed.name}"], room)
    assert done.exitcode == 0, done.output
    assert result(killed)["resumed_from"] == f"checkpoint-{continued}"

    assert adapter(killed) == adapter(whole)
    assert metrics(killed) == metrics(whole)
    for key in ("main", "before", "metrics", "adapter_sha256", "steps", "doctor"):
        assert result(killed)[key] == result(whole)[key], key
    assert not (killed / "checkpoints").exists()


@pytest.mark.slow
def test_never_starts_afresh(launch, room, tiny_model_overrides):
    arguments = [*tiny_model_overrides, *STEPS, "lora.lora_dropout=0.1", "hydra.run.dir=never"]
    assert launch("sft", arguments, room, "step 8").exitcode == -signal.SIGKILL
    assert (room / "never" / "checkpoints" / "checkpoint-6").is_dir()
    done = launch("sft", [*arguments, "resume=never"], room, "step 2")
    assert done.exitcode == -signal.SIGKILL and "Continuing" not in done.output
    # Nothing of the first attempt is left to continue from.
    done = launch("sft", arguments, room)
    assert done.exitcode == 0 and "Continuing" not in done.output
    assert result(room / "never")["resumed_from"] is None


@pytest.mark.slow
def test_kill_from_outside(start_recipe, run_recipe, launch, tiny_model_overrides, tmp_path):
    """The real command line and a signal from another process, when the second checkpoint is being written."""
    arguments = [*tiny_model_overrides, *STEPS, "lora.lora_dropout=0.1"]
    process = start_recipe("sft", *arguments, "run_name=killed", cwd=tmp_path)
    folder = tmp_path / "outputs" / "sft" / "killed"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "checkpoint-6").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_recipe("sft", *arguments, "run_name=killed", cwd=tmp_path)
    assert done.returncode == 0 and "Continuing" in done.stdout, done
    done = launch("sft", [*arguments, "hydra.run.dir=whole"], tmp_path)
    assert done.exitcode == 0, done.output
    assert adapter(folder) == adapter(tmp_path / "whole")
    assert metrics(folder) == metrics(tmp_path / "whole")
