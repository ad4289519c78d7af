"""What follows a training costs a step no more, the longer the training is."""

import json
import math
from types import SimpleNamespace

import pytest

from rlhf_recipes.training import callbacks


def log(state, watching, **row):
    state.log_history.append({"loss": 1.0, "step": len(state.log_history) + 1, **row})
    watching.on_log(None, state, SimpleNamespace(), logs=state.log_history[-1])


@pytest.fixture
def state():
    return SimpleNamespace(log_history=[], max_steps=9, is_world_process_zero=True, global_step=0)


def test_a_log_adds_its_lines_to_the_file(state, tmp_path):
    file = callbacks.MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_text('{"step": 99}\n')  # of steps that were lost
    file.on_train_begin(None, state, None)
    for _ in range(3):
        log(state, file, num_tokens=5.0)
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert rows == [{"loss": 1.0, "step": n, "max_steps": 9} for n in (1, 2, 3)]
    file.path.write_text("as it was\n")
    log(state, file)
    assert file.path.read_text() == 'as it was\n{"loss": 1.0, "step": 4, "max_steps": 9}\n'
    file.on_train_begin(None, state, None)
    log(state, file)
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_the_doctor_is_asked_seldom_once_the_log_is_long(state, monkeypatch):
    asked = []
    monkeypatch.setattr(callbacks.Doctor, "record", lambda self: asked.append(len(state.log_history)))
    monkeypatch.setattr(callbacks.doctor, "examine", lambda _: {"findings": []})

    def watching():
        found = callbacks.Doctor(SimpleNamespace(checkpoint=None), SimpleNamespace(state=state), strict=False)
        found.on_train_begin(None, state, None)
        return found

    one = watching()
    for _ in range(2000):
        log(state, one)
    assert asked[:200] == [*range(1, 201)] and len(asked) < 600 and asked[-1] == 2000
    rest = [each for each in asked if each > 1000]
    del state.log_history[1000:], asked[:]
    again = watching()
    for _ in range(1000):
        log(state, again)
    assert asked == rest, "who goes on asks where it would have"
    log(state, again, grad_norm=math.nan)
    assert asked[-1] == 2001
