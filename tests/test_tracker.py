"""A tracker: asked for before a model loads, no part of what a run computes, told of samples and the result."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from transformers import integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rlhf_recipes import run
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.launch import keys
from rlhf_recipes.stats import Estimate
from rlhf_recipes.training import callbacks

SAMPLES = [
    {"step": step, "prompt": [{"role": "user", "content": f"q{step}"}], "completion": f"a|{step}", "reward": 0.5}
    for step in (1, 2)
]
BEFORE = {"reward": Estimate(0.25, 0.0, 0.5, 4)}
AFTER = {"reward": Estimate(0.75, 0.5, 1.0, 4)}


@pytest.mark.parametrize(
    ("override", "installed", "says"),
    [
        ("tracker=wandb", (), "tracker=wandb: wandb is not installed. pip install wandb, or choose tracker=none."),
        ("trainer.report_to=wandb", ("trackio",), "tracker=wandb: wandb is not installed. pip install wandb, or "),
        ("trainer.report_to=[trackio,wandb]", ("trackio",), "tracker=wandb: wandb is not installed."),
        ("trainer.report_to=mlflow", ("wandb",), "trainer.report_to=mlflow: mlflow is not installed. pip install ml"),
        ("trainer.report_to=all", (), "trainer.report_to=all: no tracker is installed. pip install tensorboard, or "),
        ("trainer.report_to=wandbb", ("wandb",), "trainer.report_to=wandbb: not one of "),
        ("trainer.report_to=[none,wandb]", ("wandb",), "trainer.report_to=none: not one of "),
        ("tracker=wandb", ("wandb",), None),
        ("tracker=tensorboard", ("tensorboardX",), None),
        ("trainer.report_to=all", ("mlflow",), None),
        ("trainer.report_to=kubeflow", (), None),
        ("trainer.report_to=[none]", (), None),
        ("trainer.report_to=null", (), None),
        ("trainer.report_to=none", (), None),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused(compose, monkeypatch, override, installed, says):
    monkeypatch.setattr(keys, "_installed", lambda package: package in (*installed, "bitsandbytes"))
    cfg = compose("dpo", override)
    if says is None:
        keys.check(cfg, "dpo")
        return
    with pytest.raises(keys.Refusal) as caught:
        keys.check(cfg, "dpo")
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_trackers_are_those_of_transformers():
    assert set(keys.TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_the_key_goes_over_the_group(compose):
    assert compose("dpo", "tracker=wandb").trainer.report_to == "wandb"
    assert compose("dpo", "tracker=wandb", "trainer.report_to=[trackio]").trainer.report_to == ["trackio"]
    assert compose("dpo").trainer.report_to == "none"


@pytest.mark.parametrize("before", [{}, {"report_to": "none"}, {"report_to": ["wandb", "trackio"]}])
def test_a_tracker_is_no_part_of_what_a_run_computes(compose, tmp_path, before):
    """A run is continued with another, also one whose config.yaml has no such key."""
    given = run.resolved(compose("dpo", "tracker=tensorboard"))
    kept = given | {"trainer": {key: value for key, value in given["trainer"].items() if key != "report_to"} | before}
    assert config_sha256(kept) == config_sha256(given)
    run.Run(tmp_path, "dpo", kept).write_config()
    assert run._other_config(run.Run(tmp_path, "dpo", given)) is None
    given["trainer"]["beta"] = 0.7
    assert run._other_config(run.Run(tmp_path, "dpo", given)).startswith("trainer.beta=0.7: ")


def test_the_steps_of_a_preflight_are_not_tracked():
    from rlhf_recipes.launch.preflight import real_steps

    own = real_steps._overrides("dpo", ["tracker=wandb", "trainer.report_to=all"], SimpleNamespace(), "folder")
    assert own[-1] == "hydra.mode=RUN" and "trainer.report_to=none" in own[own.index("trainer.report_to=all") + 1 :]


# ---- what a tracker is told


class Tracked:
    """A trainer at the end of a run of PPO, with one of transformers' callbacks."""

    def __init__(self, callback):
        self.callback_handler = SimpleNamespace(callbacks=[callback], on_log=self.log)
        self.state = SimpleNamespace(global_step=2, is_world_process_zero=True)
        self.args, self.control, self.model, self.samples = None, None, None, SAMPLES[:1]
        self.logged = []

    def log(self, args, state, control, logs):
        self.logged.append(logs)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_tables_as_the_tracker_takes_them(monkeypatch, name):
    """A stand-in with the functions of wandb's and trackio's that are called."""
    calls = []
    module = ModuleType(name)
    module.Table = lambda columns, data: (columns, data)
    module.log = calls.append
    module.finish = lambda: calls.append("finish")
    module.login = lambda: calls.append("login")
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    kind = {"wandb": integrations.WandbCallback, "trackio": integrations.TrackioCallback}[name]
    callback = kind.__new__(kind)
    callback._trackio, callback._initialized, callback._space_id = module, True, None
    trainer = Tracked(callback)
    tracker = callbacks.Tracker(trainer)
    assert calls == (["finish", "login"] if name == "wandb" else [])  # of a job that failed before
    calls.clear()
    tracker.on_train_begin(None, trainer.state, None)
    tracker.on_log(None, trainer.state, None)
    assert calls == []  # shown before the run was interrupted
    secret = {**SAMPLES[1], "completion": "key 0123456789abcdef0123456789abcdef01234567"}
    trainer.samples = [*SAMPLES, secret]
    tracker.on_log(None, trainer.state, None)
    answer = "a|2" if name == "wandb" else "a\\|2"
    rows = [["user: q2", answer, 0.5], ["user: q2", "key <secret>" if name == "wandb" else "key &lt;secret&gt;", 0.5]]
    assert calls == [{"samples": (["prompt", "completion", "reward"], rows), "train/global_step": 2}]
    calls.clear()
    tracker.on_log(None, trainer.state, None)
    assert calls == []
    tracker.finish(BEFORE, AFTER)
    columns = ["metric", "before", "after", "low", "high", "n"]
    table = (columns, [["reward", 0.25, 0.75, 0.5, 1.0, 4]])
    assert calls == [{"held_out": table, "train/global_step": 2}, "finish"]
    assert trainer.logged == [{"test_reward": 0.75}]


def test_nobody_is_logged_in(monkeypatch):
    wandb = ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})

    def login():
        raise wandb.Error("No API key configured. Use `wandb login` to log in.")

    wandb.login, wandb.finish = login, lambda: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    callback = integrations.WandbCallback.__new__(integrations.WandbCallback)
    with pytest.raises(keys.Refusal, match=r"^tracker=wandb: No API key configured. Use `wandb login` to log in. Or "):
        callbacks.Tracker(Tracked(callback))


def test_tensorboard(train, monkeypatch, tmp_path):
    """What TensorBoard itself reads of a run of PPO, whose log is the one of a run without a tracker."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "lengths.py").write_text("def score(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    overrides = ("reward_funcs=lengths:score", "trainer.max_completion_length=8", "doctor=none")
    trained = train("ppo", tmp_path / "run", *overrides, "tracker=tensorboard")
    folders = {path.parent for path in (tmp_path / "run" / "checkpoints" / "runs").rglob("events.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop()))
    events.Reload()
    texts = {
        tag: [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
        for tag in ("samples/text_summary", "held_out/text_summary")
    }
    assert texts["samples/text_summary"][0].startswith("| prompt | completion | reward |\n| --- | --- | --- |\n| ")
    assert sum(text.count("\n") - 1 for text in texts["samples/text_summary"]) == len(trained.trainer.samples)
    (held_out,) = texts["held_out/text_summary"]
    reward = trained.result["metrics"]["reward"]
    assert f"| reward | 1.0 | {reward.value} | {reward.low} | {reward.high} | {reward.n} |" in held_out
    (event,) = events.Scalars("test/reward")
    assert math.isclose(event.value, reward.value, rel_tol=1e-6) and event.step == 2
    assert [row["step"] for row in trained.log if "loss" in row] == [1, 2]
    assert not any(key.startswith("test_") for row in trained.log for key in row)
    assert "report_to" not in (tmp_path / "run" / "README.md").read_text()
