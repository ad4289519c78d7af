"""Runs that an earlier version has left: they are read, continued, and made again with the same numbers.

They lie in tests/kept/runs as the commands in tests/kept/commands.json wrote them, without pictures and large pages.
"""

import contextlib
import csv
import hashlib
import json
import math
import platform
import re
import shutil
from importlib import import_module, metadata
from pathlib import Path

import pytest
import quick
import yaml
from conftest import build_terse, snapshot

KEPT = Path(__file__).parent / "kept"
# Folder -> recipe and overrides; in the order in which one reads what another has left.
COMMANDS = json.loads((KEPT / "commands.json").read_text())
TRAINED = ("sft", "dpo", "reward", "ppo", "orpo", "simpo")
PASSING = ("peak_memory_gib", "device", "versions", "machine", "local_files_only")
LEARNING_RATE = 0.01


def reading(model):
    """What the numbers of a run depend on beside its command.

    Returns:
        `vocabulary` (hash) and `loss`, which tell the model; `gradient` (hash) of that loss, `kernels` and `versions`:
        where they are the same, this machine rounds alike; `architecture`, whose random numbers may be others.
    """
    import torch
    from transformers import AutoModelForCausalLM

    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(3, 99)[None]
    loss = policy(input_ids=ids, labels=ids).loss
    loss.backward()
    gradient = b"".join(weights.grad.numpy().tobytes() for weights in policy.parameters())
    return {
        "vocabulary": hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest(),
        "loss": loss.item(),
        "gradient": hashlib.sha256(gradient).hexdigest(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "trl", "peft")},
        "architecture": platform.machine(),
    }


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return build_terse(tiny_model, tmp_path_factory.mktemp("kept") / "model")


@pytest.fixture(scope="module")
def exact(model):
    """Whether numbers must be the recorded ones bit for bit; None: another model, or other random numbers."""
    recorded, here = json.loads((KEPT / "recorded.json").read_text()), reading(model)
    same = all(here[key] == recorded[key] for key in ("vocabulary", "architecture"))
    return here == recorded if same and math.isclose(here["loss"], recorded["loss"], rel_tol=1e-5) else None


@pytest.fixture
def room(model, tmp_path):
    """The folder in which the commands ran: the model and the kept runs."""
    shutil.copytree(KEPT / "runs", tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("tokenizer_config.json"):
        shutil.copy(KEPT / "tokenizer.json", path.parent)  # kept once: it is the same in every folder
    shutil.copytree(model, tmp_path / "model")
    return tmp_path


@pytest.fixture
def again(compose, room, libraries, warm_python, monkeypatch):
    """again(folder): the command that has left this folder, in this process."""
    monkeypatch.setattr("sys.executable", warm_python)  # of the fresh process that loads what is published

    def ran(folder):
        recipe, *overrides = COMMANDS[folder]
        cfg = compose(recipe, *overrides)
        cfg.output_dir = folder
        with contextlib.chdir(room), quick.pictures_sketched():
            import_module(f"rlhf_recipes.recipes.{recipe}").main.__wrapped__(cfg)

    return ran


def passing(key):
    """Whether a value is that of the moment, the machine or the libraries, and no result of the command."""
    return key in PASSING or any(part in key for part in ("seconds", "per_second", "runtime"))


def content(path):
    """A file as plain containers; None for a kind that holds no results."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    if path.suffix == ".md":  # what tables say, by heading or first cell
        lines = [line for line in path.read_text().splitlines() if line.startswith(("#", "|"))]
        return {line.split("|")[1] if "|" in line else line: line for line in lines}
    if path.suffix == ".csv":
        with path.open() as file:
            return [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file)]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return {name: weights.tolist() for name, weights in load_file(path).items()}
    return None


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def differences(kept, found, exact, tolerance, where):
    """Where `found` is not what was kept; keys that were added to it are not looked at."""
    if isinstance(kept, dict) and isinstance(found, dict):
        for key in kept:
            if key not in found:
                yield f"{where}: {key} is missing"
            elif not passing(key):
                yield from differences(kept[key], found[key], exact, tolerance, f"{where}: {key}")
    elif isinstance(kept, list) and isinstance(found, list):
        if len(kept) != len(found) and exact is not None:
            yield f"{where}: {len(found)} entries, not {len(kept)}"
        for index, pair in enumerate(zip(kept, found, strict=False)):
            yield from differences(*pair, exact, tolerance, f"{where}: {index}")
    elif exact is None or kept == found or (kept != kept and found != found):  # both are NaN
        return
    elif exact and isinstance(kept, float) and isinstance(found, float) and math.isclose(kept, found, rel_tol=1e-12):
        return  # the last bit, by the order of a sum
    elif exact or not is_close(kept, found, tolerance):
        yield f"{where}: {found}, not {kept}"


def is_close(kept, found, tolerance):
    """Whether rounding alone makes the difference: of numbers, or of the digits and hashes in a text."""
    if isinstance(kept, str) and isinstance(found, str):
        kept, found = (re.sub(r"[0-9a-f]{12,}|\d", "", text) for text in (kept, found))
        return kept == found
    numbers = isinstance(kept, float) and isinstance(found, (int, float))
    return numbers and math.isclose(kept, found, rel_tol=1e-3, abs_tol=tolerance)


def compare(kept, found, exact):
    """Every file of a kept folder against that of a folder made again."""
    said = []
    for path in sorted(path for path in kept.rglob("*") if path.is_file()):
        name = path.relative_to(kept)
        if path.name == "probe.json":  # written by who published the run
            continue
        if not (found / name).is_file():
            said.append(f"{name} is missing")
            continue
        # Adam's steps move a weight by about the learning rate, however small its gradient: rounding by far less.
        tolerance = LEARNING_RATE / 10 if path.suffix == ".safetensors" else 1e-4
        strict = True if path.name == "config.yaml" else exact
        said += differences(content(path), content(found / name), strict, tolerance, name)
    assert not said, "\n".join(said)
    if exact is None:
        pytest.skip("read, but no number compared: the tiny model or the random numbers are others here")


def config_sha256(folder):
    return json.loads((folder / "result.json").read_text())["config_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*TRAINED, "evaluate", "frontier", "audit", "cai", "publish"])
def test_the_same_command_gives_the_same(again, room, exact, folder):
    """From the kept runs that it names: parents, reward models, sweeps, checkpoints, a publication to replace."""
    shutil.rmtree(room / folder)
    again(folder)
    kept = KEPT / "runs" / folder
    assert config_sha256(room / folder) == config_sha256(kept)
    compare(kept, room / folder, exact)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*TRAINED, "evaluate", "frontier", "audit", "cai"])
def test_a_kept_run_is_finished(again, room, folder):
    before = snapshot(room / folder)
    with pytest.raises(ValueError, match=f"{folder} holds a finished run"):
        again(folder)
    assert snapshot(room / folder) == before


@pytest.mark.slow
def test_the_jobs_of_a_sweep_are_kept(run_recipe, room, exact):
    recipe, *overrides = COMMANDS["betas"]
    before = [snapshot(room / "betas" / job) for job in "01"]
    done = run_recipe(recipe, *overrides, cwd=room)
    assert done.returncode == 0 and done.stdout.count("finished before, kept") == 2, done
    assert [snapshot(room / "betas" / job) for job in "01"] == before
    compare(KEPT / "runs" / "betas", room / "betas", exact)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(again, room, exact, capsys):
    """From its kept checkpoint, to where it comes without interruption."""
    again("interrupted")
    assert "Continuing interrupted from step 3." in capsys.readouterr().out
    (room / "interrupted").rename(room / "continued")
    again("interrupted")
    assert json.loads((room / "continued" / "result.json").read_text())["resumed_from"] == "checkpoint-3"
    assert json.loads((room / "interrupted" / "result.json").read_text())["resumed_from"] is None
    (room / "continued" / "result.json").unlink()
    compare(room / "continued", room / "interrupted", exact)
