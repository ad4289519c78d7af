"""SIGKILL at any moment, the same command again: the adapter is the one of a run that nobody disturbed."""

import functools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import LIMIT, wait_for

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
    # Step 3, whose checkpoint is continued, lies inside a rollout.
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
# Where a run dies, one after another, and the step that the next launch must continue from. Which checkpoint that is
# does not depend on the method: one dies everywhere. What is in the checkpoint does. What is left to do behind the
# last one depends on the loop, TRL's or PPO's own.
KILLS = (
    ("step 2", None),  # no checkpoint yet
    ("step 5", 3),
    ("weights of 6", 3),  # the checkpoint's folder is there, without optimizer and trainer_state.json
    ("half the state of 9", 6),  # trainer_state.json is cut off
    ("told in 10", 10),  # by a signal that it can hear: it saves that step, and ends
    ("adapter", 12),  # trained, but nothing saved: not even the 14th step of 14 is done twice
)
INSIDE, AT_THE_END = KILLS[1], KILLS[-1]
KILLED = dict.fromkeys(CASES, (INSIDE,)) | {"dpo": KILLS, "ppo": (INSIDE, AT_THE_END)}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second")


@pytest.fixture(scope="module")
def launch(warm_python, clean_env):
    """launch(recipe, overrides, cwd, kill=None): the recipe, with a death sentence where one is given."""

    def launched(recipe, overrides, cwd, kill=""):
        module = ["killed", kill, recipe] if kill else [f"rlhf_recipes.recipes.{recipe}"]
        return subprocess.run(
            [warm_python, "-m", *module, *overrides], cwd=cwd, env={**clean_env, "PYTHONPATH": Path(__file__).parent},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT,
        )  # fmt: skip

    return launched


@pytest.fixture(scope="module")
def room(launch, tiny_model_overrides, tmp_path_factory):
    """A folder with an sft run `parent` to chain from, and a reward run `judge`."""
    folder = tmp_path_factory.mktemp("room")
    done = launch("sft", [*tiny_model_overrides, *STEPS, "trainer.max_steps=2", "hydra.run.dir=parent"], folder)
    assert done.returncode == 0, done.stdout
    done = launch("reward", [*tiny_model_overrides, *STEPS, "trainer.max_steps=2", "hydra.run.dir=judge"], folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def undisturbed(launch, room, tiny_model_overrides):
    """undisturbed(case): the folder of its run that nobody disturbed."""

    @functools.cache
    def whole(case):
        recipe, own = CASES[case]
        done = launch(recipe, [*tiny_model_overrides, *STEPS, *own, f"hydra.run.dir={case}_whole"], room)
        assert done.returncode == 0, done.stdout
        return room / f"{case}_whole"

    return whole


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("seconds/")} for row in rows]


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_run_ends_with_the_same_adapter(launch, room, undisturbed, tiny_model_overrides, case):
    recipe, own = CASES[case]
    arguments = [*tiny_model_overrides, *STEPS, *own]
    whole, killed = undisturbed(case), room / f"{case}_killed"
    last_step = result(whole)["steps"]
    assert last_step == (14 if case == "dpo" else 12)
    continued = None
    for kill, next_start in KILLED[case]:
        done = launch(recipe, [*arguments, f"hydra.run.dir={killed.name}"], room, kill)
        assert done.returncode == (75 if "told" in kill else -signal.SIGKILL), done.stdout
        if "told" in kill:
            said = "Ended by SIGUSR1. Step 10 of 14 is saved. The same command goes on."
            assert done.stdout.splitlines()[-1] == said and "Traceback" not in done.stdout
        assert ("Continuing" in done.stdout) == (continued is not None)
        assert continued is None or f"from step {continued}." in done.stdout
        assert not (killed / "result.json").exists()
        continued = next_start
    done = launch(recipe, [*arguments, f"hydra.run.dir={killed.name}"], room)
    assert done.returncode == 0, done.stdout
    assert result(killed)["resumed_from"] == f"checkpoint-{continued}"

    assert adapter(killed) == adapter(whole)
    assert metrics(killed) == metrics(whole)
    for key in ("main", "before", "metrics", "adapter_sha256", "steps", "doctor"):
        assert result(killed)[key] == result(whole)[key], key
    assert not (killed / "checkpoints").exists()


@pytest.mark.slow
def test_never_starts_afresh(launch, room, tiny_model_overrides):
    arguments = [*tiny_model_overrides, *STEPS, "trainer.max_steps=5", "hydra.run.dir=never"]
    assert launch("sft", arguments, room, "step 5").returncode == -signal.SIGKILL
    assert (room / "never" / "checkpoints" / "checkpoint-3").is_dir()
    done = launch("sft", [*arguments, "resume=never"], room, "step 2")
    assert done.returncode == -signal.SIGKILL and "Continuing" not in done.stdout
    # Nothing of the first attempt is left to continue from.
    done = launch("sft", arguments, room)
    assert done.returncode == 0 and "Continuing" not in done.stdout
    assert result(room / "never")["resumed_from"] is None


@pytest.mark.slow
def test_kill_from_outside(start_recipe, run_recipe, undisturbed, tiny_model_overrides, tmp_path):
    """The real command line and a signal from another process, when the second checkpoint is being written."""
    arguments = [*tiny_model_overrides, *STEPS, *CASES["sft"][1]]
    holds = "checkpoint-6/trainer_state.json"
    process = start_recipe("sft", *arguments, "run_name=killed", cwd=tmp_path, holds=holds)
    folder = tmp_path / "outputs" / "sft" / "killed"
    wait_for(tmp_path / "held", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_recipe("sft", *arguments, "run_name=killed", cwd=tmp_path)
    assert done.returncode == 0 and "from step 3." in done.stdout, done
    assert adapter(folder) == adapter(undisturbed("sft"))
    assert metrics(folder) == metrics(undisturbed("sft"))
