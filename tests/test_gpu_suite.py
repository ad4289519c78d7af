"""tests/gpu as far as a CPU goes: its command runs and leaves its files, and what it asks of the recipes composes."""

import json
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import LIMIT, ROOT, merged

from rlhf_recipes.launch import keys


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "gpu")
    import test_on_a_gpu

    return test_on_a_gpu


def test_its_command_leaves_what_is_read(warm_python, clean_env, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(warm_python)
    env = {"SMALL": 1, "OUT": tmp_path / "out", "PATH": f"{tmp_path}/bin:{clean_env['PATH']}"}
    done = subprocess.run(
        ["bash", ROOT / "tests" / "gpu" / "run.sh", "-k", "versions or quantized"],
        cwd=tmp_path, env=merged(clean_env, env), capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"card": None, "cuda": None}.items() <= json.loads((tmp_path / "out" / "gpu.json").read_text())[
        "versions"
    ].items()
    cases = {
        case.get("name"): [each.tag for each in case]
        for case in ElementTree.parse(tmp_path / "out" / "gpu.xml").iter("testcase")
    }
    assert cases == {"test_versions": [], "test_a_weight_is_quantized_to_the_same_bits": ["skipped"]}
    assert "1 passed, 1 skipped" in (tmp_path / "out" / "log").read_text()


def test_a_test_over_its_limit_ends(suite, monkeypatch, tmp_path):
    """In its own time, not the suite's; one for which too little is left is not begun."""
    monkeypatch.setattr(suite, "OUT", tmp_path)
    monkeypatch.setattr(suite, "BEGIN", time.monotonic())
    slept = []
    with pytest.raises(pytest.fail.Exception, match=r"over 0\.2 s"), suite.limited("slow", 0.2):
        slept.append(time.sleep(5))
    assert not slept
    assert json.loads((tmp_path / "gpu.json").read_text())["slow"]["failed"] == "over its limit"
    monkeypatch.setattr(suite, "LIMIT", 1.0)
    with pytest.raises(pytest.skip.Exception, match="s are left of 1"), suite.limited("late", 20):
        pytest.fail("it was begun")


def test_what_it_asks_of_the_recipes_composes(suite, compose, tiny_overrides):
    model = tiny_overrides[:2]
    asked = [(recipe, [*tiny_overrides, *suite.episodes(recipe), *more]) for recipe, more in suite.CASES.values()]
    asked += [
        (recipe, [*model, *suite.pairs(), f"trainer.per_device_train_batch_size={n}"])
        for recipe, n in suite.SIDES.items()
    ]
    asked += [
        ("ppo", [*model, *suite.rollouts(2), *more, "reward_funcs=words:count"]) for more in suite.CRITICS.values()
    ]
    for recipe, overrides in asked:
        keys.check(compose(recipe, *overrides), recipe)


def test_its_wheels_are_those_of_the_constraints():
    text = (ROOT / "tests" / "gpu" / "wheels.sh").read_text()
    names = text.partition('names="')[2].partition('"')[0].split()
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {*names, "antlr4-python3-runtime"} <= pinned
    assert {Path(line).name for line in (ROOT / ".gitignore").read_text().splitlines()} >= {".whl", "gpu-out"}
