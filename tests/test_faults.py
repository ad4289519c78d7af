"""Faults in the middle of a run, of recipes and of kinds that no other file has: see tests/benchmarks/faults.py."""

import json
import os
import signal

import pytest

from rlhf_recipes import run_folder
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import out_of_memory

SMALL = (
    "quantization=none",
    "data.train_size=8",
    "data.eval_size=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.max_steps=4",
    "trainer.save_steps=1",
    "trainer.learning_rate=1e-3",
)
# A rollout is used for two steps: some kills lie inside of one.
SAMPLED = ("reward_funcs=warm_processes:short", "trainer.num_generations=2", "trainer.max_completion_length=6",
           "trainer.num_iterations=2", "trainer.per_device_train_batch_size=4")  # fmt: skip
CASES = {"orpo": (), "simpo": (), "rloo": SAMPLED}
# Of the file operations of a whole run; the second and the third are counted from where the run goes on.
SHARES = (0.5, 0.2, 0.1)


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", CASES)
def test_killed_at_any_file_it_ends_with_the_same_adapter(run_recipe, tiny_model_overrides, tmp_path, recipe):
    command = (recipe, *tiny_model_overrides, *SMALL, *CASES[recipe])
    done = run_recipe(*command, "hydra.run.dir=whole", cwd=tmp_path, kill="nothing 0")
    assert done.returncode == 0, done
    operations = int((tmp_path / "operations").read_text())
    for share in SHARES:
        kill = f"operation {round(operations * share)}"
        done = run_recipe(*command, "hydra.run.dir=killed", cwd=tmp_path, kill=kill)
        assert done.returncode == -signal.SIGKILL, done
        assert ("Continuing killed from step" in done.stdout) == (share != SHARES[0])
    done = run_recipe(*command, "hydra.run.dir=killed", cwd=tmp_path, kill="nothing 0")
    assert done.returncode == 0 and "Continuing killed from step" in done.stdout, done
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert adapter(killed) == adapter(whole)
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))
    results = [json.loads((folder / "result.json").read_text()) for folder in (killed, whole)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["resumed_from"]


def test_no_memory_is_one_line_that_says_what_takes_it(run_recipe, tiny_model_overrides, tmp_path):
    done = run_recipe("dpo", *tiny_model_overrides, *SMALL, "run_name=x", cwd=tmp_path, kill="memory in 3")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "are needed about" in line and "activations" in line and "base" in line
    assert "trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=2" in line
    assert (tmp_path / "outputs/dpo/x/checkpoints/checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("std::bad_alloc"), r"out of main memory \(std::bad_alloc\)\."),
        (RuntimeError("can't start new thread"), r"out of main memory, or of threads \(can't start new thread\)\."),
        (BlockingIOError(11, "Resource temporarily unavailable"), r"out of main memory, or of processes \(\[Errno "),
        (OSError(12, "Cannot allocate memory"), r"out of main memory \(\[Errno 12\] Cannot allocate memory\)\."),
    ],
)
def test_what_libraries_call_too_little_main_memory(compose, tiny_model_overrides, error, says):
    with (
        pytest.raises(Refusal, match=rf"^{says}.* At the peak"),
        out_of_memory.told(compose("dpo", *tiny_model_overrides)),
    ):
        raise error


def test_a_gradient_that_is_no_number_costs_its_step_alone(run_recipe, tiny_model_overrides, tmp_path):
    from safetensors.torch import load_file

    done = run_recipe("sft", *tiny_model_overrides, *SMALL, "run_name=x", cwd=tmp_path, kill="no number in 2")
    assert done.returncode == 0 and done.stdout.count("is left out") == 1, done
    assert "\nstep 2: is left out, its gradient is not finite.\n" in done.stdout
    folder = tmp_path / "outputs" / "sft" / "x"
    assert all(weight.isfinite().all() for weight in load_file(folder / "adapter/adapter_model.safetensors").values())
    result = json.loads((folder / "result.json").read_text())
    assert result["steps_left_out"] == 1
    assert [each["saw"] for each in result["doctor"]["findings"] if each["rule"] == "not_finite"] == [
        "1 of 4 steps were left out, whose gradient was not finite"
    ]


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_a_training_that_diverged_says_so(train, tmp_path, recipe):
    with pytest.raises(ValueError, match=r"^held-out rows: what the trained model says of them is not finite, so the"):
        train(recipe, tmp_path / "run", "quantization=none", "trainer.learning_rate=1e30", "trainer.warmup_steps=0")


def test_the_newest_checkpoints_are_those_of_the_last_steps(train, tmp_path, monkeypatch):
    """Whatever the clock says: it is set back by a day at each of them."""
    left, age = [], os.path.getmtime

    def backwards(path):
        step = str(path).rpartition("checkpoint-")[2]
        return age(path) - (86_400 * int(step) if step.isdecimal() else 0)

    monkeypatch.setattr(os.path, "getmtime", backwards)
    drop = run_folder.drop_checkpoints
    monkeypatch.setattr(
        run_folder, "drop_checkpoints", lambda folder: (left.extend(run_folder.checkpoints(folder)), drop(folder))
    )
    train("sft", tmp_path / "run", "quantization=none", "trainer.max_steps=4", "trainer.save_steps=1")
    assert [path.name for path in left] == ["checkpoint-3", "checkpoint-4"]


def test_who_ends_before_the_card_is_written_has_not_finished(train, tmp_path, monkeypatch):
    """The same command then writes what is missing."""
    from rlhf_recipes.training import card

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(card, "write", interrupted)
        train("sft", tmp_path / "run", "quantization=none", "trainer.save_steps=1")
    assert not (tmp_path / "run" / "result.json").exists()
    done = train("sft", tmp_path / "run", "quantization=none", "trainer.save_steps=1")
    assert done.result["resumed_from"] and {"README.md", "curves.png"} <= {path.name for path in done.dir.iterdir()}
