"""Bad input: exit code 2, one line that names the culprit, nothing lost, torch left alone where nothing needs it."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import LIMIT, TINY_ID, snapshot, wait_for, weights, write_adapter, write_checkpoint, write_pairs

from rlhf_recipes.errors import Refusal

# Read by every Python that has it on its path: which modules were loaded, on the way out.
WITNESS = """
import atexit, os, sys
seen = os.environ.get("RLHF_TEST_MODULES")
if seen:
    atexit.register(lambda: open(seen, "w").write("\\n".join(sys.modules)))
"""
HIDES_BITSANDBYTES = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] == "bitsandbytes" else find(name, *rest)
)
"""
SLEEPLESS = """
import time
sleep = time.sleep

def nap(seconds):
    if seconds >= 0.5:
        raise AssertionError(f"it sleeps for {seconds} s")
    sleep(seconds)

time.sleep = nap
"""
SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyz"
CLOSED_PORT = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}


@pytest.fixture
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITNESS)
    return folder


@pytest.fixture
def refuse(run_recipe, light_python, site, tmp_path_factory):
    """refuse(recipe, *overrides, cwd): the one line; asserts what holds for every refusal."""

    def refused(recipe, *overrides, cwd, env=None, torch=False, secret=None):
        seen = tmp_path_factory.mktemp("seen") / "modules"
        before = snapshot(cwd)
        path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        env = {"PYTHONPATH": path, "RLHF_TEST_MODULES": seen, **(env or {})}
        done = run_recipe(recipe, *overrides, cwd=cwd, env=env, python=None if torch else light_python)
        assert done.returncode == 2, done
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), done
        assert "Traceback" not in done.stdout + done.stderr
        assert secret is None or secret not in done.stdout + done.stderr
        after = snapshot(cwd)
        changed = {name for name, content in after.items() if before.get(name) != content}
        assert before.items() <= after.items() and {after[name] for name in changed} <= {"folder"}, (before, after)
        assert all(len(Path(name).parts) < 3 for name in changed), "an empty run folder was left"
        if not torch:
            assert "torch" not in seen.read_text().splitlines(), "torch was imported"
        return lines[0].removeprefix("error: ")

    return refused


# ---- keys


@pytest.mark.parametrize(
    ("recipe", "override", "says"),
    [
        ("dpo", "modle=qwen3_4b", "modle: there is no such key; did you mean 'model'?"),
        ("dpo", "model.adaptor=x", "model.adaptor: there is no such key; did you mean 'model.adapter'?"),
        ("reward", "data.sead=1", "data.sead: there is no such key; did you mean 'data.seed'?"),
        ("dpo", "+data.sead=1", "data.sead: no such key; did you mean 'seed'?"),
        ("dpo", "+model.adaptor=x", "model.adaptor: recipes/dpo.py has no such key; did you mean 'model.adapter'?"),
        ("sft", "+run_nam=x", "run_nam: recipes/sft.py has no such key; did you mean 'run_name'?"),
        ("dpo", "experiment=pipeline/demo", "stages: recipes/dpo.py has no such key."),
        ("dpo", "data.seed=x", "data.seed=x: must be a whole number."),
        ("dpo", "model.revision=[1]", "model.revision=[1]: Cannot convert 'list' to string"),
        ("dpo", "overwrite=perhaps", "overwrite=perhaps: must be true or false."),
        ("dpo", "trainer.push_to_hub=true", "trainer.push_to_hub=true: would upload every checkpoint as it is."),
        ("dpo", "resume=autp", "resume=autp: not one of auto, never; did you mean 'auto'?"),
        ("dpo", "run_name=null", "run_name=null: must be text."),
        ("dpo", "model=qwen3_0_6", "model=qwen3_0_6: there is no such option; did you mean 'qwen3_0_6b'? Options: "),
        (
            "dpo",
            "quantization=fp4",
            "quantization=fp4: there is no such option; did you mean 'nf4'? Options: int8, nf4",
        ),
        ("pipeline", "experiment=pipeline/dem", "experiment=pipeline/dem: there is no such option; did you mean "),
        ("dpo", "trainer=sft", "trainer: trl.SFTConfig is not for dpo, which takes trl.DPOConfig."),
        ("dpo", "data=local", "data.path: required, but not set. Add data.path=<value>"),
        ("evaluate", "prompts=8", "runs: a list of run folders, at least one"),
        ("pipeline", "run_name=x", "stages: required, but not set."),
        ("ppo", "run_name=x", "reward_funcs: required, but not set."),
        ("ppo", "reward_funcs=1", "reward_funcs=1: must be text or a list [a,b]."),
        ("ppo", "reward_funcs=[]", "reward_funcs: empty. Give a run of recipes/reward.py"),
        (
            "ppo",
            "reward_funcs=nowhere:score",
            "reward_funcs=nowhere:score: cannot be imported (No module named 'nowhere')",
        ),
        (
            "ppo",
            "reward_funcs=json:lodas",
            "reward_funcs=json:lodas: cannot be imported (module 'json' has no attribute",
        ),
        ("dpo", "trainer.beta=0.1,0.2", "Ambiguous value for argument 'trainer.beta=0.1,0.2'"),
        ("dpo", "trainer.beta", "Error parsing override 'trainer.beta'"),
        ("dpo", "model.adapter=nowhere", "model.adapter=nowhere: does not exist. Give a run folder"),
    ],
)
def test_keys_and_values(refuse, tmp_path, recipe, override, says):
    assert refuse(recipe, override, cwd=tmp_path).startswith(says)


def test_a_policy_is_no_reward_model(refuse, tmp_path):
    write_adapter(tmp_path / "sft", recipe="sft")
    (tmp_path / "empty").mkdir()
    line = refuse("ppo", "reward_funcs=sft", cwd=tmp_path)
    assert line == "reward_funcs=sft: is a run of sft. Give one of recipes/reward.py."
    line = refuse("ppo", "reward_funcs=empty", cwd=tmp_path)
    assert line == "reward_funcs=empty: holds no model (is the run finished?). Give another."


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.betaa=0.2", "trainer.betaa: trl.DPOConfig has no such field; did you mean 'beta'?"),
    ],
)
def test_arguments_of_the_wrapped_classes(refuse, tmp_path, override, says):
    """They need the class, hence torch, but no model: there is none at this path."""
    (tmp_path / "model").mkdir()
    line = refuse("dpo", override, f"model.path={tmp_path / 'model'}", cwd=tmp_path, torch=True)
    assert line == says


@pytest.mark.parametrize(
    "override",
    [
        f"trainer.hub_token={SECRET}",
        f"model.id={SECRET}",
        f"+trainer.hf_token={SECRET}",
        "trainer.hub_token=anything",
        f"trainer.run_name={SECRET},x",
        f"model.revision=[{SECRET}]",
    ],
)
def test_a_literal_secret_is_shown_nowhere(refuse, tmp_path, override):
    line = refuse("dpo", override, cwd=tmp_path, secret=SECRET)
    assert line.startswith(override.lstrip("+").partition("=")[0]) or "<secret>" in line
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in text for text in texts)


def test_half_precision_that_nothing_here_computes_in(refuse, tmp_path):
    line = refuse("dpo", "trainer.fp16=true", cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}, torch=True)
    assert line == "trainer.fp16=true: needs a CUDA GPU, and none is used here: it would do nothing. Leave it out."


# ---- data


def _line(number, content):
    def change(path):
        write_pairs(path)
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number - 1] = content + b"\n"
        path.write_bytes(b"".join(lines))

    return change


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: write_pairs(path.with_name("perfs.jsonl")), "prefs.jsonl: no such file; did you mean 'perfs.js"),
        (lambda path: path.write_bytes(b""), "prefs.jsonl: empty, no rows in it."),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "prefs.jsonl:1: a binary file"),
        (
            lambda path: path.write_bytes(b"PK\x03\x04 spreadsheet"),
            "prefs.jsonl: a binary file (a zip or spreadsheet)",
        ),
        (lambda path: path.write_text('{"prompt": "a", "chosen": "b"}\n' * 9), "prefs.jsonl: no column 'rejected'"),
        (_line(7, b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}'), "prefs.jsonl:7: not UTF-8 (byte 0xe9"),
        (_line(5, b'{"prompt": "a", "chosen": '), "prefs.jsonl:5: not valid JSON"),
        (_line(3, b'{"prompt": "a", "chosen": 5, "rejected": "b"}'), "prefs.jsonl:3: "),
        (lambda path: path.mkdir(), "prefs.jsonl: a folder, but "),
    ],
    ids=["missing", "empty", "binary", "zip", "no_rejected", "latin1", "broken_line", "wrong_type", "folder"],
)
def test_data(refuse, tmp_path, make, says):
    make(tmp_path / "prefs.jsonl")
    assert refuse("dpo", "data=local", "data.path=prefs.jsonl", cwd=tmp_path).startswith(says)


# ---- runs and adapters


def test_adapters(refuse, tmp_path):
    write_adapter(tmp_path / "other", base="org/other")
    line = refuse("dpo", "model.adapter=other", cwd=tmp_path)
    assert line.startswith("model.adapter=other: was trained on org/other, not on model.id=HuggingFaceTB/")
    (tmp_path / "unfinished").mkdir()
    line = refuse("dpo", "model.adapter=unfinished", cwd=tmp_path)
    assert line.startswith("model.adapter=unfinished: has no adapter in it (is the run finished?)")


def test_an_adapter_that_is_cut_off(refuse, tiny_model_overrides, tmp_path):
    write_adapter(tmp_path / "cut")
    (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").write_bytes(weights()[:-1])
    line = refuse("dpo", *tiny_model_overrides, "model.adapter=cut", cwd=tmp_path, torch=True)
    assert line.startswith("cut/adapter/adapter_model.safetensors: is cut off or damaged. Copy it again")


@pytest.fixture
def finished(tmp_path):
    folder = write_adapter(tmp_path / "outputs" / "dpo" / "main", recipe="dpo")
    (folder / "config.yaml").write_text("rlhf_recipes: dpo\nrun_name: main\n")
    return folder


def test_a_finished_run_is_not_overwritten(refuse, finished, tmp_path):
    line = refuse("dpo", cwd=tmp_path)
    assert line.startswith("run_name=main: outputs/dpo/main holds a finished run.") and "overwrite=true" in line


def test_overwrite_takes_nothing_until_all_else_is_accepted(refuse, finished, tmp_path):
    refuse("dpo", "overwrite=true", "data=local", "data.path=missing.jsonl", cwd=tmp_path)
    refuse("dpo", "overwrite=true", "lora.r=abc", "quantization=none", cwd=tmp_path, torch=True)


def test_an_interrupted_run_with_other_settings(refuse, compose, tmp_path):
    from omegaconf import OmegaConf

    from rlhf_recipes import run, run_folder

    folder = tmp_path / "outputs" / "dpo" / "main"
    write_checkpoint(folder, 3)
    run_folder.mark(folder, "dpo", OmegaConf.to_yaml(run.resolved(compose("dpo", "trainer.beta=0.2"))))
    line = refuse("dpo", "trainer.beta=0.3", cwd=tmp_path)
    assert line.startswith(
        "trainer.beta=0.3: outputs/dpo/main holds an interrupted run with trainer.beta=0.2. Give that value"
    )


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("hydra.run.dir=afile", "afile: File exists."),
        ("hydra.run.dir=afile/below", "afile/below: Not a directory."),
        ("hydra.run.dir=/proc/none/here", "/proc/none: "),
        ("hydra.run.dir=.", "hydra.run.dir=.: holds afile and is no run folder."),
        ("hydra.run.dir=project", "hydra.run.dir=project: holds README.md and is no run folder."),
    ],
)
def test_a_place_that_takes_no_run(refuse, tmp_path, place, says):
    (tmp_path / "afile").write_text("mine")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert refuse("dpo", place, "overwrite=true", cwd=tmp_path).startswith(says)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options): a file system of 256 KiB."""
    if not shutil.which("mount"):
        pytest.skip("no mount here")
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode:
            pytest.skip("this user may not mount")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True)


def test_a_read_only_disk(refuse, small_disk, tmp_path):
    small_disk("size=64k,ro")
    assert refuse("dpo", "hydra.run.dir=disk/run", cwd=tmp_path).startswith("disk/run: Read-only file system.")


def test_a_full_disk(refuse, run_recipe, small_disk, tiny_overrides, tmp_path):
    """It fills up at the first checkpoint; a run that was there stays."""
    place = small_disk("size=512k")
    kept = write_adapter(place / "kept", recipe="dpo")
    before = snapshot(kept)
    done = run_recipe("dpo", *tiny_overrides, "quantization=none", "hydra.run.dir=disk/run", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.endswith(errors[0] + "\n"), done
    assert "the disk is full" in errors[0] or "No space left on device" in errors[0]
    assert snapshot(kept) == before and not (place / "run" / "result.json").exists()


# ---- model and hub


@pytest.fixture
def hub():
    """A Hub on the loopback that knows org/gated and nothing else."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            gated = "org/gated" in self.path
            self.send_response(403 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "*"}
    server.shutdown()


def test_no_network_for_a_data_set(refuse, tmp_path):
    line = refuse("dpo", "data=ultrafeedback", cwd=tmp_path)
    assert line.startswith("data.path=HuggingFaceH4/ultrafeedback_binarized: ") and "HF_HUB_OFFLINE=1" in line
    line = refuse("dpo", "data=ultrafeedback", cwd=tmp_path, env=CLOSED_PORT)
    assert "the Hub cannot be reached" in line


def test_a_data_set_that_is_gated_or_unknown(refuse, hub, tmp_path):
    line = refuse("dpo", "data=local", "data.path=org/gated", cwd=tmp_path, env=hub)
    assert line.startswith("data.path=org/gated: a gated data set.") and "hf auth login" in line
    line = refuse("dpo", "data=local", "data.path=org/nothing", cwd=tmp_path, env=hub)
    assert line.startswith("data.path=org/nothing: no file or folder here, and no data set on the Hub")


def test_no_network_for_a_model(refuse, tmp_path, tmp_path_factory):
    """Said at once: transformers would try again, each file for half a minute."""
    sleepless = tmp_path_factory.mktemp("sleepless")
    (sleepless / "sitecustomize.py").write_text(SLEEPLESS)
    env = CLOSED_PORT | {"PYTHONPATH": sleepless}
    line = refuse("dpo", "model=smollm2_135m_hub", cwd=tmp_path, env=env, torch=True)
    assert line.startswith("model.id=HuggingFaceTB/SmolLM2-135M-Instruct: the Hub cannot be reached and the cache")


def test_a_model_that_may_not_be_fetched(refuse, tmp_path):
    line = refuse("dpo", "model=smollm2_135m_hub", "quantization=none", cwd=tmp_path, torch=True)
    assert line.startswith("model.id=HuggingFaceTB/SmolLM2-135M-Instruct: not in the cache, and HF_HUB_OFFLINE=1 bars")


def test_a_gated_model(refuse, hub, tmp_path):
    line = refuse("dpo", "model=gemma3_4b", "model.id=org/gated", cwd=tmp_path, env=hub, torch=True)
    assert line.startswith("model.id=org/gated: is gated. Accept its terms on its page, then `hf auth login`")


def test_a_model_that_is_nowhere(compose, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RepositoryNotFoundError

    from rlhf_recipes import models

    class Unknown(RepositoryNotFoundError):
        def __init__(self):  # without the answer of a server
            Exception.__init__(self, "Make sure it is no private or gated repo.")

    def unknown(*_, **__):
        raise Unknown

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", unknown)
    for override, says in [
        ("model.id=org/nothing", "model.id=org/nothing: the Hub has no such model, or your token may not see it."),
        ("model.path=nowhere", "model.path=nowhere: no such folder."),
        (f"model.path={tmp_path}", f"model.path={tmp_path}: no config.json in it"),
    ]:
        with pytest.raises(ValueError) as caught:
            models.load_tokenizer(compose("dpo", "model=smollm2_135m_hub", override).model)
        assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def _one_lost(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return tensors


LACKING = {
    "one lost": (
        _one_lost,
        {},
        "1 of the model's weights, which would be random (model.layers.1.mlp.up_proj.weight).",
    ),
    "of a compiled model": (
        lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
        {},
        "21 of the model's weights, which would be random (lm_head.weight, model.embed_tokens.weight, "
        "model.layers.0.input_layernorm.weight, …).",
    ),
    "a head that was tied": (
        lambda tensors: tensors,
        {"tie_word_embeddings": False},
        "1 of the model's weights, which would be random (lm_head.weight).",
    ),
}


@pytest.fixture
def lacking(tiny_model, tmp_path):
    """lacking(change, config): a copy of the tiny model with changed tensors and another config.json."""
    from safetensors.torch import load_file, save_file

    def made(change, config):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return made


@pytest.mark.parametrize("case", LACKING)
def test_a_model_whose_files_lack_weights(compose, lacking, case):
    """transformers makes them random, and says so in a report that nobody sees."""
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import models

    change, config, says = LACKING[case]
    folder = lacking(change, config)
    for quantization in ("none", "nf4"):
        cfg = compose("dpo", f"model.path={folder}", f"model.id={TINY_ID}", f"quantization={quantization}")
        with pytest.raises(Refusal) as caught:
            models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)
        assert str(caught.value) == f"model.path={folder}: its files lack {says} Fetch or save it again."


def test_a_reward_model_whose_files_lack_weights(compose, tiny_model, lacking, tmp_path):
    """The head of a run that starts is new; that of a model that scores is not."""
    from types import SimpleNamespace

    from transformers import AutoModelForSequenceClassification

    from rlhf_recipes import models
    from rlhf_recipes.ppo import rewards

    folder = lacking(_one_lost, {})
    cfg = compose("reward", f"model.path={folder}", f"model.id={TINY_ID}", "quantization=none")
    with pytest.raises(Refusal, match=r"lack 1 of the model's weights, which would be random \(model\.layers\.1"):
        models.load_base(cfg.model, cfg.quantization, AutoModelForSequenceClassification, num_labels=1)
    args = SimpleNamespace(model_init_kwargs=None, device="cpu")
    for path, lost in ((folder, "model.layers.1.mlp.up_proj.weight"), (tiny_model, "score.weight")):
        with pytest.raises(Refusal, match=rf"^reward_funcs=\S+: its files lack .*\({lost}[),]"):
            rewards._load_classifier(str(path), args)
    cfg.model.path = str(tiny_model)
    models.load_base(cfg.model, cfg.quantization, AutoModelForSequenceClassification, num_labels=1)


def test_weights_of_other_shapes_than_a_model_says(compose, lacking):
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import models

    folder = lacking(lambda tensors: tensors, {"vocab_size": 2000})
    cfg = compose("dpo", f"model.path={folder}", f"model.id={TINY_ID}", "quantization=none")
    with pytest.raises(Refusal, match=rf"^model\.path={folder}: its weights are of other shapes than its config"):
        models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)


UNKNOWN = "is of a kind that this transformers has no"
KINDS = {
    "granite scores nothing": ("GraniteConfig", "reward", f"{UNKNOWN} sequence classifier of (granite). Choose anoth"),
    "t5 continues nothing": ("T5Config", "dpo", f"{UNKNOWN} causal language model of (t5). Choose another model."),
    "t5 continues nothing to score": ("T5Config", "reward", f"{UNKNOWN} causal language model of (t5). Choose"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_model_of_another_kind(compose, tmp_path, case):
    import transformers

    from rlhf_recipes import models

    kind, recipe, says = KINDS[case]
    getattr(transformers, kind)().save_pretrained(tmp_path)
    cfg = compose(recipe, f"model.path={tmp_path}", f"model.id={TINY_ID}", "quantization=none")
    with pytest.raises(Refusal) as caught:
        models.check(cfg.model, cfg.quantization, cfg.lora, scores=recipe == "reward")
    assert str(caught.value).startswith(f"model.path={tmp_path}: {says}") and "\n" not in str(caught.value)


def test_a_model_whose_score_head_reads_no_last_token(compose, tiny_model, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from rlhf_recipes import models

    config = BertConfig(vocab_size=1000, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    cfg = compose("reward", f"model.path={tmp_path}", f"model.id={TINY_ID}", "quantization=none")
    with pytest.raises(
        Refusal, match=rf"^model\.id={TINY_ID}: transformers gives bert no score head that reads the l"
    ):
        models.load_reward_model(cfg.model, cfg.quantization, cfg.lora, None)


@pytest.mark.parametrize(
    ("quantization", "scores", "refused"),
    [("nf4", False, False), ("nf4", True, True), ("none", False, True), ("int8", False, True)],
)
def test_a_model_that_is_packed_already(compose, tiny_model, tmp_path, quantization, scores, refused):
    """transformers takes what its files say, whatever it is asked for."""
    from rlhf_recipes import models

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "config.json"
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": packed}))
    recipe = "reward" if scores else "dpo"
    cfg = compose(recipe, f"model.path={folder}", f"model.id={TINY_ID}", f"quantization={quantization}")
    if not refused:
        models.check(cfg.model, cfg.quantization, cfg.lora, scores=scores)
        return
    with pytest.raises(Refusal) as caught:
        models.check(cfg.model, cfg.quantization, cfg.lora, scores=scores)
    what = "a score head would be packed, too" if scores else "quantization would not be applied"
    says = f"model.path={folder}: is packed by its own files (nf4); {what}. Give the unpacked model"
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("config", [{"model_type": "qwen9"}, {"hidden_size": 64}])
def test_a_model_of_no_known_kind(compose, tmp_path, config):
    from rlhf_recipes import models

    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = compose("dpo", f"model.path={tmp_path}", f"model.id={TINY_ID}", "quantization=none")
    with pytest.raises(Refusal) as caught:
        models.check(cfg.model, cfg.quantization, cfg.lora)
    says = f"model.path={tmp_path}: this transformers does not know its kind (model_type: {config.get('model_type')})."
    assert str(caught.value) == f"{says} Update it, or choose another model."


def test_a_tokenizer_that_is_not_there_or_not_the_model_s(compose, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    from rlhf_recipes import models

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    count = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    cfg = compose("dpo", f"model.path={folder}", f"model.id={TINY_ID}", "model.pad_token=null")
    with pytest.raises(Refusal) as caught:
        models.load_tokenizer(cfg.model)
    assert str(caught.value) == (
        f"model.pad_token=<pad>: is token {count} of the tokenizer of {folder}, whose model has {count}, from 0 on. "
        "Name one that the model has."
    )
    for path in [*folder.glob("*token*"), *folder.glob("*.jinja")]:
        path.unlink()
    with pytest.raises(Refusal) as caught:
        models.load_tokenizer(cfg.model)
    assert str(caught.value).startswith(f"model.path={folder}: has no tokenizer that can be read. Put its files besid")


def test_nf4_without_bitsandbytes(refuse, site, tmp_path):
    with open(site / "sitecustomize.py", "a") as file:
        file.write(HIDES_BITSANDBYTES)
    line = refuse("dpo", cwd=tmp_path)
    assert line.startswith("quantization: bitsandbytes is not installed.") and "quantization=none" in line


# ---- evaluate, pipeline


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["runs=[a,nowhere]"], "runs=nowhere: does not exist."),
        (["runs=[]"], "runs: a list of run folders, at least one"),
        (["runs=a"], "runs=a: must be a list [a,b]."),
        (["runs=[reward]"], "runs=reward: is a run of reward, not a policy; a reward model goes to reward_model="),
        (["runs=[other]"], "runs=other: was trained on org/other, not on model.id="),
        (["runs=[a]", "parent=nowhere"], "parent=nowhere: does not exist."),
        (["runs=[a]", "reward_model=nowhere"], "reward_model=nowhere: does not exist."),
        (["runs=[a]", "reward_model=a"], "reward_model=a: is a run of dpo, not a run of recipes/reward.py."),
        (["runs=[a]", "judge_function=nowhere:f"], "judge_function=nowhere:f: cannot be imported"),
        (["runs=[a]", "judge_function=json:nothing"], "judge_function=json:nothing: cannot be imported"),
        (["runs=[a]", "thresholds.max_kll=1"], "thresholds.max_kll: there is no such key; did you mean 'thresholds."),
        (["runs=[a]", "+thresholds.max_kll=1"], "thresholds.max_kll: recipes/evaluate.py has no such key; did you me"),
        (["runs=[a]", "thresholds.max_kl=abc"], "thresholds.max_kl=abc: must be a number or null."),
        (["runs=[a]", "prompts=many"], "prompts=many: must be a whole number or null."),
    ],
)
def test_evaluate(refuse, tmp_path, overrides, says):
    write_adapter(tmp_path / "a", recipe="dpo")
    write_adapter(tmp_path / "reward", recipe="reward")
    write_adapter(tmp_path / "other", base="org/other", recipe="dpo")
    assert refuse("evaluate", *overrides, f"model.id={TINY_ID}", cwd=tmp_path).startswith(says)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("sft", "stages=sft: must be a list"),
        ("[{name:a}]", "stages: each entry is {name: sft, recipe: sft, overrides: [...]}, not"),
        ("[{name:a,recipe:dpo,overrides:['publish=true','repo_id=a/b']}]", "stages.a: publish=true: not in a"),
        ("[{name:a,recipe:dop}]", "stages.a.recipe=dop: no such recipe; did you mean 'dpo'?"),
        ("[{name:a,recipe:dpo,override:[]}]", "stages.a.override: there is no such key."),
        ("[{name:a,recipe:dpo},{name:a,recipe:sft}]", "stages.a: two stages have this name"),
        ("[{name:a,recipe:sft},{name:b,recipe:dpo,overrides:['modle=x']}]", "stages.b: modle: there is no such key;"),
        ("[{name:a,recipe:sft},{name:b,recipe:dpo,overrides:['data.seed=x']}]", "stages.b: data.seed=x: must be a"),
        ("[{name:a,recipe:sft},{name:b,recipe:dpo,overrides:['data=local']}]", "stages.b: data.path: required"),
        ("[{name:a,recipe:sft},{name:b,recipe:dpo,overrides:['lora=null']}]", "stages.b: lora=null: must be one of"),
    ],
)
def test_pipeline(refuse, tmp_path, stages, says):
    """All stages are checked before the first starts, and before overwrite=true takes anything."""
    finished = write_adapter(tmp_path / "outputs" / "pipeline" / "main" / "a", recipe="sft")
    (finished / "config.yaml").write_text("rlhf_recipes: sft\nrun_name: main\n")
    assert refuse("pipeline", f"stages={stages}", "overwrite=true", cwd=tmp_path).startswith(says)


# ---- and Ctrl-C


def test_ctrl_c_is_one_line(start_recipe, tiny_overrides, tmp_path):
    process = start_recipe("dpo", *tiny_overrides, "trainer.max_steps=5000", "quantization=none", cwd=tmp_path)
    wait_for(tmp_path / "outputs" / "dpo" / "main" / "config.yaml", process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert [line for line in stderr.splitlines() if " · " not in line] == [
        "Interrupted. The same command continues from the last checkpoint."
    ]


# ---- the witness itself


def test_the_witness_sees_torch(site, warm_python, clean_env, tmp_path):
    seen = tmp_path / "modules"
    (tmp_path / "warm_torch.py").write_text("import torch")
    env = {**clean_env, "PYTHONPATH": str(site), "RLHF_TEST_MODULES": str(seen)}
    subprocess.run([warm_python, "-m", "warm_torch"], cwd=tmp_path, env=env, check=True)
    assert "torch" in seen.read_text().splitlines()
