"""What is executed: no code of the current folder, of a config, or of a model that nobody asked for."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import merged, snapshot
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from rlhf_recipes import config, guard
from rlhf_recipes.launch.refusals import as_refusal

LEAVES_A_FILE = "import pathlib; pathlib.Path({witness!r}).touch()\n"


@pytest.fixture
def trap(tmp_path_factory):
    """trap(folder, *names): modules of these names in a folder, and the file that is there if one of them ran."""
    witness = tmp_path_factory.mktemp("witness") / "ran"

    def laid(folder, *names):
        for name in names:
            (folder / f"{name}.py").write_text(LEAVES_A_FILE.format(witness=str(witness)))
        return witness

    return laid


@pytest.fixture
def experiment(compose, tmp_path):
    """experiment(text, *overrides): the config of dpo under an experiment file that somebody sent."""
    (tmp_path / "experiment").mkdir()

    def composed(text, *overrides, recipe="dpo"):
        (tmp_path / "experiment" / "sent.yaml").write_text(f"# @package _global_\n{text}\n")
        return compose(recipe, f"hydra.searchpath=[file://{tmp_path}]", "experiment=sent", *overrides)

    return composed


# ---- the current folder


MODULES = ("pip", "yaml", "json", "queue", "evaluate", "random", "socket", "torch", "trl")


@pytest.mark.slow
def test_pip_is_that_of_this_python(trap, tmp_path, monkeypatch):
    from rlhf_recipes import embedded

    ran = trap(tmp_path, *MODULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="could not be fetched"):
        embedded._download(tmp_path)
    assert not ran.exists()


@pytest.mark.slow
def test_the_steps_of_a_preflight_take_nothing_from_the_current_folder(trap, tmp_path, monkeypatch, clean_env):
    from rlhf_recipes.data.load import Splits
    from rlhf_recipes.launch.preflight import real_steps

    ran = trap(tmp_path, *MODULES)
    monkeypatch.chdir(tmp_path)
    for key, value in clean_env.items():
        monkeypatch.setenv(key, value)
    splits = Splits(train=[{"prompt": "a"}], test=[], report={}, source="x")
    args = SimpleNamespace(per_device_train_batch_size=1, prompts_per_rollout=1, num_mini_batches=1)
    seen = real_steps.measure("dpo", ["modle=x"], args, splits, [1])
    assert seen["error"].startswith("modle: there is no such key;") and not ran.exists()


@pytest.mark.slow
def test_what_is_imported_later_is_not_the_current_folders(clean_env, trap, tmp_path):
    """`python -m`, as a user types it, puts the current folder first; modules of the user come last, if at all."""
    ran = trap(tmp_path, "torch")
    (tmp_path / "mine.py").write_text("def score(completions): return 1\n")
    code = """
import os, sys
from rlhf_recipes import config
from rlhf_recipes.launch import recipe
sys.path[0] = os.getcwd()
recipe._leave_script_folder()
import torch
assert config.import_function("mine:score", "reward_funcs")(None) == 1
assert sys.path[-1] == os.getcwd() and sys.path.count(os.getcwd()) == 1
assert os.environ["PYTHONSAFEPATH"] == "1"  # of the processes that libraries start
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=clean_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not ran.exists()


@pytest.mark.slow
def test_a_run_in_a_folder_of_such_files(trap, tmp_path, clean_env, tiny_overrides):
    ran = trap(tmp_path, *MODULES)
    command = [Path(sys.executable).with_name("rlhf-dpo"), *tiny_overrides, "quantization=none"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs/dpo/main/result.json").exists() and not ran.exists()


def test_a_pickled_config_is_not_read(run_recipe, tmp_path):
    done = run_recipe("dpo", "--experimental-rerun", "config.pickle", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: --experimental-rerun: reads a pickle, which can run"
    )


# ---- classes


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "builtins.eval", "pickle.loads", "evil.Config", "torch.load", "system",
     "datasets.load_dataset", "trl.DPOTrainer", "transformers.pipeline", "transformers.AutoModel",
     "peft.PeftModel", "rlhf_recipes.run.remove", ".os.system", "trl.os.system", "hydra.utils.instantiate"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["trainer", "lora", "quantization"])
def test_only_config_classes_are_built(trap, tmp_path, monkeypatch, where, target):
    ran = trap(tmp_path, "evil")
    monkeypatch.syspath_prepend(tmp_path)
    node = OmegaConf.create({"_target_": target, "command": "id"})
    with pytest.raises(ValueError) as caught:
        config.build(node, where)
    message = str(caught.value)
    assert message.startswith(f"{where}._target_={target}: ") and "\n" not in message
    assert "cannot be imported" in message or f"'allow_target=[{target}]'" in message
    assert not ran.exists()


def test_a_subclass_is_built():
    assert (
        type(config.build(OmegaConf.create({"_target_": "peft.LoHaConfig", "r": 4}), "lora")).__name__ == "LoHaConfig"
    )
    node = OmegaConf.create({"_target_": "transformers.EetqConfig", "weights": "int8"})
    assert type(config.build(node, "quantization")).__name__ == "EetqConfig"


def test_what_the_user_allows_is_built(compose, tmp_path, monkeypatch):
    (tmp_path / "my_config.py").write_text("class Mine:\n    def __init__(self, r: int = 1):\n        self.r = r\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = OmegaConf.create({"_target_": "my_config.Mine", "r": 3})
    with pytest.raises(ValueError, match=r"^lora._target_=my_config.Mine: is no config class of trl"):
        config.build(node, "lora")
    instance = HydraConfig.instance()
    monkeypatch.setattr(instance, "cfg", instance.cfg)
    instance.set_config(_with_hydra("dpo", "allow_target=[my_config.Mine]"))
    assert config.build(node, "lora").r == 3
    with pytest.raises(ValueError, match="is no config class"):
        config.build(OmegaConf.create({"_target_": "os.system"}), "lora")


def _with_hydra(recipe, *overrides):
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name=recipe):
        return hydra.compose(recipe, overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("dpo", "allow_target: [os.system]"),
        ("dpo", "hydra: {sweeper: {params: {allow_target: '[os.system]'}}}"),
        ("dpo", "hydra: {sweeper: {params: {++allow_target: '[os.system]'}}}"),
        ("pipeline", "stages: [{name: a, recipe: dpo, overrides: ['allow_target=[os.system]']}]"),
        ("pipeline", "stages: []\nshared: [' +allow_target=[os.system]']"),
    ],
)
def test_a_file_allows_nothing(experiment, recipe, text):
    with pytest.raises(ValueError) as caught:
        experiment(text, recipe=recipe)
    assert "allow_target" in str(caught.value) and "which only the command line" in str(caught.value)


# ---- what Hydra does before a recipe starts


LOGGING = "hydra: {{job_logging: {{version: 1, {}}}}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "hydra: {job: {env_set: {HF_ENDPOINT: 'http://127.0.0.1'}}}",
            "hydra.job.env_set.HF_ENDPOINT: a config sets ",
        ),
        ("hydra: {job: {env_copy: [HOME]}}", "hydra.job.env_set.HOME: a config sets no environment variables. Set "),
        (
            "hydra: {callbacks: {x: {_target_: os.system, command: id}}}",
            "hydra.callbacks.x._target_=os.system: is no ",
        ),
        (
            "hydra: {callbacks: {sweep: {_target_: evil.Callback}}}",
            "hydra.callbacks.sweep._target_=evil.Callback: is ",
        ),
        (
            "hydra: {callbacks: {sweep: {x: {_target_: os.system}}}}",
            "hydra.callbacks.sweep.x._target_=os.system: is n",
        ),
        ("hydra: {callbacks: {x: {_target_: hydra.utils.call}}}", "hydra.callbacks.x._target_=hydra.utils.call: is n"),
        (
            "hydra: {callbacks: {x: [{_target_: os.system}]}}",
            "hydra.callbacks.x._target_=os.system: is no part of Hyd",
        ),
        (
            "hydra: {launcher: {_target_: evil.Launcher}}",
            "hydra.launcher._target_=evil.Launcher: is no part of Hydra.",
        ),
        (
            "hydra: {sweeper: {_target_: hydra_plugins.os.system}}",
            "hydra.sweeper._target_=hydra_plugins.os.system: is ",
        ),
        (
            LOGGING.format("filters: {x: {(): os.system}}"),
            "hydra.job_logging.filters.x.()=os.system: logging that run",
        ),
        (
            LOGGING.format("handlers: {x: {class: evil.Handler}}"),
            "hydra.job_logging.handlers.x.class=evil.Handler: log",
        ),
        (
            LOGGING.format("handlers: {x: {class: logging.StreamHandler, stream: ext://evil.x}}"),
            "hydra.job_logging.ha",
        ),
        (
            LOGGING.format("handlers: {x: {class: logging.FileHandler, filename: thesis.tex}}"),
            "hydra.job_logging.hand",
        ),
        (
            "hydra: {hydra_logging: {formatters: {x: {(): os.system}}}}",
            "hydra.hydra_logging.formatters.x.()=os.system",
        ),
        (
            "hydra: {output_subdir: /somewhere}",
            "hydra.output_subdir=/somewhere: Hydra would write outside the run fol",
        ),
        ("hydra: {output_subdir: ../..}", "hydra.output_subdir=../..: Hydra would write outside the run folder."),
    ],
)
def test_hydra_is_asked_for_nothing_else(experiment, text, says):
    with pytest.raises(ValueError) as caught:
        experiment(text)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defaults", "text", "says"),
    [
        (
            "override /hydra/sweeper: optuna",
            "sampler: {_target_: os.system}",
            "hydra.sweeper.sampler._target_=os",
        ),
        (
            "override /hydra/sweeper: optuna",
            "custom_search_space: os.system",
            "hydra.sweeper.custom_search_space=os.sy",
        ),
        (
            "override /hydra/launcher: submitit_slurm",
            "setup: ['id']",
            "hydra.launcher.setup: holds commands for a shell",
        ),
        (
            "override /hydra/launcher: submitit_slurm",
            'comment: "x\\nid"',
            "hydra.launcher.comment: holds commands for ",
        ),
    ],
)
def test_plugins_are_asked_for_nothing_else(experiment, defaults, text, says):
    part = "sweeper" if "sweeper" in defaults else "launcher"
    with pytest.raises(ValueError) as caught:
        experiment(f"defaults:\n  - {defaults}\nhydra:\n  {part}:\n    {text}")
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"],
        ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random"],
        ["hydra/job_logging=default", "hydra/hydra_logging=default"],
        ["+hydra.callbacks.log._target_=hydra.experimental.callbacks.LogJobReturnCallback"],
        ["+hydra.callbacks.mine._target_=my.Callback", "allow_target=[my.Callback]"],
        ["hydra.output_subdir=.hydra", "hydra.verbose=true"],
    ],
)
def test_what_hydra_has_itself_is_free(compose, overrides):
    compose("dpo", *overrides)


def test_a_package_of_configs_is_not_imported(compose, trap, tmp_path, monkeypatch):
    ran = trap(tmp_path, "evil")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^hydra.searchpath: names a package, which would be imported."):
        compose("dpo", "hydra.searchpath=[pkg://evil]")
    assert not ran.exists()


@pytest.mark.parametrize(
    "option", ["lora=open", "quantization=open", "trainer=open", "model=schema", "model=model_schema"]
)
def test_the_empty_node_is_no_option(compose, experiment, option):
    from hydra.errors import MissingConfigException

    group, _, name = option.partition("=")
    for composed in (lambda: compose("dpo", option), lambda: experiment(f"defaults: [override /{group}: {name}]")):
        with pytest.raises(MissingConfigException) as caught:
            composed()
        assert as_refusal(caught.value, "dpo").startswith(f"{option}: there is no such option. Options: ")


def test_a_callback_that_was_sent_does_not_run(run_recipe, trap, tmp_path):
    """Through the whole recipe: one line, nothing written; in a sweep over experiments, too."""
    ran = trap(tmp_path, "evil")
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    sent = tmp_path / "conf" / "experiment" / "sent.yaml"
    sent.write_text("# @package _global_\nhydra: {callbacks: {x: {_target_: evil.Callback}}}\n")
    shutil.copy(sent, sent.with_name("other.yaml"))
    before = snapshot(tmp_path)
    for chosen in (["experiment=sent"], ["-m", "experiment=sent"], ["-m", "experiment=sent,other"]):
        done = run_recipe("dpo", "--config-dir", "conf", *chosen, cwd=tmp_path, env={"PYTHONPATH": tmp_path})
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
        assert "hydra.callbacks.x._target_=evil.Callback: is no part of Hydra." in done.stderr
        assert not ran.exists() and snapshot(tmp_path).items() - before.items() <= {("outputs", "folder")}


# ---- models that bring code


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

pathlib.Path({witness!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tiny_model, tmp_path, trap, monkeypatch):
    """with_code(model=True, tokenizer=True): the tiny model with a Python file of its own, and the trap."""
    import transformers.dynamic_module_utils as modules

    ran = trap(tmp_path)
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))

    def made(model=True, tokenizer=True):
        folder = tmp_path / "own"
        shutil.copytree(tiny_model, folder)
        (folder / "own.py").write_text(CODE.format(witness=str(ran)))
        if model:
            classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
            _change(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)
        if tokenizer:
            own = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
            _change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
        return folder, ran

    return made


def _change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _loads():
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import model_files, models

    none = OmegaConf.create()
    return {
        "config": model_files.load_config,
        "tokenizer": models.load_tokenizer,
        "weights": lambda model: models.load_base(model, none, AutoModelForCausalLM),
    }


@pytest.mark.parametrize("what", ["config", "tokenizer", "weights"])
@pytest.mark.parametrize("stdin", ["y\n", ""])
def test_code_of_a_model_is_refused(compose, with_code, monkeypatch, what, stdin):
    folder, ran = with_code()
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin * 9))
    cfg = compose("dpo", f"model.path={folder}", "model.id=tests/own")
    with pytest.raises(ValueError) as caught:
        _loads()[what](cfg.model)
    assert str(caught.value) == (
        f"model.path={folder}: brings Python code of its own, which would run here (auto_map). Read it; if you trust "
        "it, add model.trust_remote_code=true."
    )
    assert not ran.exists()


def test_code_that_is_not_needed_does_not_run(compose, with_code):
    """transformers has the class itself: that is used, whatever the folder offers."""
    folder, ran = with_code(model=False, tokenizer=False)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _change(folder / "config.json", auto_map=classes)
    cfg = compose("dpo", f"model.path={folder}")
    assert type(_loads()["weights"](cfg.model)).__name__ == "LlamaForCausalLM" and not ran.exists()


def test_code_that_is_trusted_runs(compose, with_code):
    folder, ran = with_code()
    cfg = compose("dpo", f"model.path={folder}", "model.id=tests/own", "model.trust_remote_code=true")
    assert type(_loads()["config"](cfg.model)).__name__ == "OwnConfig" and ran.exists()
    assert type(_loads()["tokenizer"](cfg.model)).__name__ == "OwnTokenizer"
    assert type(_loads()["weights"](cfg.model)).__name__ == "OwnModel"
    from rlhf_recipes.launch.preflight import predict_memory
    from rlhf_recipes.run import resolved

    assert resolved(cfg)["model"]["trust_remote_code"] is True
    assert predict_memory.backbone(cfg, "dpo").config.model_type == "own"


def test_a_library_that_loads_by_itself_does_not_ask(compose, with_code, tiny_model):
    from transformers import AutoTokenizer

    folder, ran = with_code()
    _loads()["config"](compose("dpo", f"model.path={tiny_model}").model)
    with pytest.raises(ValueError):
        AutoTokenizer.from_pretrained(folder)
    assert not ran.exists()


def test_code_of_a_reward_model_is_refused(with_code):
    from rlhf_recipes.ppo import rewards

    folder, ran = with_code()
    with pytest.raises(ValueError, match=r"^reward_funcs=\S+: brings Python code of its own, which is not run"):
        rewards._load_classifier(str(folder), SimpleNamespace(model_init_kwargs=None, device="cpu"))
    assert not ran.exists()


def test_weights_that_are_a_pickle_run_nothing(compose, tiny_model, tmp_path, trap):
    """pytorch_model.bin is read with weights_only: tensors, or an error."""
    import pickle

    import torch

    ran = trap(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return Path.touch, (ran,)

    torch.save({"lm_head.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        _loads()["weights"](compose("dpo", f"model.path={folder}").model)
    assert not ran.exists()


@pytest.mark.slow
def test_nothing_is_asked_of_a_user(run_recipe, with_code, tmp_path):
    folder, ran = with_code()
    done = run_recipe("dpo", f"model.path={folder}", "model.id=tests/own", "quantization=none", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert "model.trust_remote_code=true" in done.stderr and "[y/N]" not in done.stdout and not ran.exists()


def test_the_witnesses_see(trap, tmp_path, clean_env):
    ran = trap(tmp_path, "yaml")
    subprocess.run([sys.executable, "-m", "yaml"], cwd=tmp_path, env=merged(clean_env, {}), check=True)
    assert ran.exists() and guard.HYDRA_TARGETS.fullmatch("rlhf_recipes.launch.sweep.Summary")
