"""What follows a training costs a step no more, the longer the training is."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

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


def test_a_checkpoint_knows_how_many_steps_were_left_out(tmp_path):
    """Also of a step behind the last row of the log."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, math.nan])
    trainer = SimpleNamespace(optimizer=torch.optim.SGD([weight]))
    callbacks.LeaveOut(trainer).on_pre_optimizer_step(None, left := TrainerState(), None)
    assert weight.grad is None
    left.save_to_json(tmp_path / "trainer_state.json")
    again = callbacks.LeaveOut(trainer)
    again.on_train_begin(None, TrainerState.load_from_json(tmp_path / "trainer_state.json"), None)
    assert again.count == 1


def test_what_the_doctor_stopped_is_not_saved_at_the_end_of_its_epoch():
    watching = callbacks.Doctor(None, None, strict=True)
    for watching.stopped, saves in ((None, True), ("doctor: cough at step 6", False)):
        control = TrainerControl(should_save=True, should_evaluate=True)
        watching.on_epoch_end(None, None, control)
        assert (control.should_save, control.should_evaluate) == (saves, saves)


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
