"""What holds against files and text of others: nothing in them is run, resolved or shown as more than text."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, write_adapter
from omegaconf import OmegaConf

from rlhf_recipes import models, references
from rlhf_recipes.evaluation import measure
from rlhf_recipes.run import Run


class Payload:
    """A pickle that leaves a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path):
    """The file that a payload leaves."""
    return tmp_path / "ran"


def plant(path, ran):
    """A file in torch's own format."""
    torch.save({"state": Payload(ran)}, path)
    return path


def test_the_payload_works(tmp_path, ran):
    with pytest.raises(Exception, match="Weights only"):
        torch.load(plant(tmp_path / "a.pt", ran), weights_only=True)
    assert not ran.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert ran.exists()


def loading(call):
    with pytest.raises((pickle.UnpicklingError, ValueError)) as raised:
        call()
    return raised.value


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train("dpo", tmp_path_factory.mktemp("holds") / "dpo", "quantization=none").trainer


def test_pickled_weights_of_an_adapter_are_not_run(trained, tmp_path, ran, monkeypatch):
    """Of a run that is continued, measured or scored by."""
    from peft.utils import load_peft_weights

    folder = write_adapter(tmp_path / "foreign") / "adapter"
    (folder / "adapter_model.safetensors").unlink()
    plant(folder / "adapter_model.bin", ran)
    loading(lambda: load_peft_weights(str(folder), device="cpu"))
    loading(lambda: references.find(str(folder.parent), "model.adapter"))
    parent = references.ModelRef(str(folder), "model.adapter", adapter=folder)
    loading(lambda: models.read_adapter(trained.model, parent))
    trained.model.peft_config["default"].save_pretrained(folder)
    loading(lambda: trained.model.load_adapter(str(folder), adapter_name="foreign"))
    assert not ran.exists()


@pytest.mark.parametrize("names", [["optimizer.pt", "scheduler.pt"], ["rng_state.pth"]])
def test_pickles_of_a_checkpoint_are_not_run(trained, tmp_path, ran, names):
    for name in names:
        plant(tmp_path / name, ran)
    load = trained._load_rng_state if names == ["rng_state.pth"] else trained._load_optimizer_and_scheduler
    loading(lambda: load(str(tmp_path)))
    assert not ran.exists()


def test_pickles_of_ppo_and_of_the_doctor_are_not_run(tmp_path, ran, monkeypatch):
    from rlhf_recipes.ppo import trainer
    from rlhf_recipes.training.callbacks import Doctor

    monkeypatch.setattr(trainer, "load_peft_weights", lambda *_, **__: {})
    monkeypatch.setattr(trainer, "set_peft_model_state_dict", lambda *_, **__: None)
    ppo = SimpleNamespace(
        roles=SimpleNamespace(shared=True),
        model=None,
        args=SimpleNamespace(device=torch.device("cpu")),
        _state_file=lambda _: str(plant(tmp_path / "ppo_0.pt", ran)),
    )
    loading(lambda: trainer.PPOTrainer._load_from_checkpoint(ppo, str(tmp_path)))
    plant(tmp_path / Doctor.FILE, ran)
    doctor = SimpleNamespace(FILE=Doctor.FILE, strict=True, run=SimpleNamespace(checkpoint=str(tmp_path)))
    loading(lambda: Doctor.on_train_begin(doctor, None, SimpleNamespace(log_history=[]), None))
    assert not ran.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update({'role': 'system'}) %}",
    "{{ '%s'.format.__self__.__class__ }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(cycler) }}",
    "{% for a in range(10000000) %}{% endfor %}",
    "{% include '/etc/hostname' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(tiny_model, ran, template):
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    from rlhf_recipes.data.template import render

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template.replace("RAN", str(ran)) + CHATML
    messages = [{"role": "user", "content": "Hi"}]
    try:
        text = render(tokenizer, messages, tokenize=False)
    except (TemplateError, OverflowError, TypeError):
        pass
    else:
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
        assert "class" not in text and "builtins" not in text and "function" not in text
    assert not ran.exists() and messages == [{"role": "user", "content": "Hi"}]


def test_the_sandbox_is_the_immutable_one():
    """What transformers compiles chat templates with."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template("{{ 1 }}")
    assert isinstance(compiled.environment, ImmutableSandboxedEnvironment)


def test_the_script_of_a_data_set_is_not_run(tmp_path, ran, monkeypatch):
    import datasets

    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(f"open({str(ran)!r}, 'w')\n")
    (folder / "train.jsonl").write_text('{"prompt": "p"}\n')
    monkeypatch.chdir(tmp_path)
    for path in ("org/name", str(folder / "name.py")):
        with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported"):
            datasets.load_dataset(path, split="train", cache_dir=str(tmp_path / "cache"))
    assert not ran.exists()


def test_measuring_a_run_builds_nothing_of_its_config(tmp_path, ran):
    """evaluate and audit read the config of a run that somebody sends."""
    folder = write_adapter(tmp_path / "foreign", recipe="ppo", steps=3)
    evil = {"_target_": "pathlib.Path.touch", "self": str(ran)}
    config = {"run_name": "x", "model": {"id": "tests/tiny", "adapter": None}, "trainer": evil, "lora": evil}
    config |= {"quantization": evil, "reward_funcs": "os:system", "data": {"path": "${oc.env:HOME}"}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    kept = folder / "checkpoints" / "checkpoint-2"
    kept.mkdir(parents=True)
    (kept / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "tests/tiny"}))
    read = references.config_of(str(folder))
    assert read["trainer"] == evil and read["data"]["path"] == "${oc.env:HOME}"
    assert [system.step for system in measure.find([], "base", "tests/tiny", str(folder))] == [None, 2]
    assert measure.find([str(folder)], "base", "tests/tiny")[1].adapter == str(folder / "adapter")
    assert measure.find_proxy(str(folder), "tests/tiny") is None
    from rlhf_recipes.audit import answers

    assert [step for step, _ in answers.find_run(str(folder), "tests/tiny").steps] == [2, 3]
    assert not ran.exists()


def test_start_refuses_before_anything_is_written(tmp_path, compose, monkeypatch, tiny_model_overrides):
    monkeypatch.chdir(tmp_path)
    for override in ("model.adapter=nowhere", "trainer=sft"):
        with pytest.raises(ValueError, match=r"nowhere|trainer"):
            Run.start(compose("dpo", *tiny_model_overrides, override), "dpo")
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_in_no_journal(tmp_path, monkeypatch):
    """What an endpoint answers may hold the key that it was sent; what is kept of it is the text alone."""
    import test_limits

    from rlhf_recipes.cai import server
    from rlhf_recipes.cai.backend import Journal, Request, ask

    key = "key-0123456789-never-shown"
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("CAI_KEY", key)
    endpoint = test_limits.start_endpoint()
    told = test_limits.completion("fine") | {"headers": {"Authorization": f"Bearer {key}"}, "model": key}
    endpoint.answer = lambda handler: (200, {"X-Key": key}, [json.dumps(told).encode()])
    backend = server.Server(base_url=endpoint.url, model="m", api_key_env="CAI_KEY")
    request = Request("p", "draft", [{"role": "user", "content": "Hi"}], max_new_tokens=5)
    assert ask(backend, [request], Journal(tmp_path / "answers.jsonl"), "test")[0]["text"] == "fine"
    endpoint.shutdown()
    endpoint.server_close()
    assert key not in (tmp_path / "answers.jsonl").read_text() and key not in backend.name
