"""The end of a machine: who hears of it, when a process ends, with which exit status."""

import os
import signal
import sys

import hydra
import pytest

from rlhf_recipes import ranks, signals
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch.recipe import recipe
from rlhf_recipes.launch.refusals import OneLine


@pytest.fixture(autouse=True)
def listening(monkeypatch):
    """This process as it was at its start."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in {"_told": None, "_training": False, "_requeue": None}.items():
        monkeypatch.setattr(signals, name, value)


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_it_ends_at_once_in_one_line(number, capsys):
    signals.listen()
    with pytest.raises(SystemExit) as end, OneLine():
        os.kill(os.getpid(), number)
    said = f"Ended by {number.name}. What was done before is kept. The same command goes on.\n"
    assert end.value.code == 75 and capsys.readouterr().err == said
    os.kill(os.getpid(), number)  # the end is under way: a second one changes nothing


@pytest.mark.parametrize(("error", "code"), [(Refusal("data.path=x: no."), 2), (ZeroDivisionError(), 1)])
def test_a_launcher_that_ends_all_changes_nothing_about_why(error, code, capsys):
    """torchrun sends SIGTERM to the others when one has ended, which may have said why, too."""
    signals.listen()
    with pytest.raises(SystemExit) as end, OneLine():
        raise error
    os.kill(os.getpid(), signal.SIGTERM)
    assert end.value.code == code and "SIGTERM" not in capsys.readouterr().err


def test_ctrl_c_that_a_launcher_sends_again_changes_nothing(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "end", lambda code: None)  # nobody has said why
    with pytest.raises(SystemExit) as end, OneLine():
        raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 130 and capsys.readouterr().err.startswith("Interrupted. ")


def test_ctrl_c_twice_is_one_line_too(capfd):
    """The second meets a process that ends, in whatever it does then."""
    child = os.fork()
    if child == 0:
        try:
            with OneLine():
                raise KeyboardInterrupt
        except SystemExit:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert capfd.readouterr().err == "Interrupted. The same command continues from the last checkpoint.\n"


def test_what_is_finished_was_not_taken_back(monkeypatch):
    monkeypatch.setattr(hydra, "main", lambda **asked: lambda job: signals.listen)
    for name, value in {"argv": ["rlhf-cai"], "path": [*sys.path], "excepthook": sys.excepthook}.items():
        monkeypatch.setattr(sys, name, value)
    recipe("cai")(print)()
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_heard_before_the_config_is_composed(monkeypatch, capsys):
    monkeypatch.setattr(hydra, "main", lambda **asked: lambda job: lambda: os.kill(os.getpid(), signal.SIGTERM))
    for name, value in {"argv": ["rlhf-cai"], "path": [*sys.path], "excepthook": sys.excepthook}.items():
        monkeypatch.setattr(sys, name, value)
    with pytest.raises(SystemExit) as end:
        recipe("cai")(print)()
    assert end.value.code == 75 and capsys.readouterr().err.startswith("Ended by SIGTERM. ")


def test_a_training_ends_between_two_steps():
    signals.listen()
    signals.train(True)
    assert not signals.told()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.told()
    with pytest.raises(signals.TakenBack, match=r"^Ended by SIGTERM. Step 3 is saved. The same command goes on.$"):
        signals.end("Step 3 is saved.")


def test_one_that_comes_after_the_last_step_is_heard_too():
    signals.listen()
    signals.train(True)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(signals.TakenBack, match="The training was over"):
        signals.train(False)


def test_submitit_puts_its_job_into_the_queue_when_the_checkpoint_is_there():
    calls = []

    def checkpoint_and_try_requeue(number, frame):
        calls.append(number)
        raise SystemExit(255)

    def bypass(number, frame):
        calls.append("bypass")

    signal.signal(signal.SIGTERM, bypass)
    signal.signal(signal.SIGUSR2, checkpoint_and_try_requeue)
    signals.listen()
    signals.train(True)
    os.kill(os.getpid(), signal.SIGTERM)
    assert calls == ["bypass"] and not signals.told()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert calls == ["bypass"] and signals.told(), "not before there is a checkpoint"
    with pytest.raises(SystemExit):
        signals.end("Step 3 is saved.")
    assert calls == ["bypass", signal.SIGUSR2]


def test_submitit_calls_its_handler_so():
    from submitit.core.job_environment import SignalHandler

    assert SignalHandler.checkpoint_and_try_requeue.__name__ == "checkpoint_and_try_requeue"
