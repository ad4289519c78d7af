"""Shared fixtures: a model that trains in seconds, a recipe as a subprocess, the embedded model."""

import contextlib
import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import quick
import warm

from rlhf_recipes import compiling

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CLINIC = ROOT / "rlhf_recipes" / "assets" / "clinic"
SHARED = ROOT.parent / "shared" / "data"
# SmolLM2's: a system turn is added where there is none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_ID = "tests/tiny"
LIMIT = 300  # seconds: where a test waits for what must come, a busy machine is no error
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # as Run.start does
os.environ["OMP_NUM_THREADS"] = "1"  # matrices of 64 rows: threads would wait for each other
compiling.when_called()  # as Run.start does
# What takes longest starts first, so that no core idles at the end; one of the first two trains in its own process,
# while the other waits for the warm Python.
LONGEST = (
    "test_processes.py", "test_forward.py", "test_measure.py", "test_resume.py", "test_sweep.py", "test_hub_faults.py",
    "test_recipes.py", "test_ppo.py", "test_engine.py", "test_fsdp.py", "test_conf.py", "test_preflight.py",
    "test_publish.py", "test_rounds.py", "test_stages.py", "test_audit.py", "test_families.py", "test_doctor.py",
    "test_trainers.py", "test_browser.py", "test_bad_input.py", "test_code.py", "test_cai.py", "test_kept_runs.py",
    "test_planted_secrets.py", "test_cai_data.py", "test_cai_server.py", "test_cai_local.py", "test_ppo_server.py",
    "test_account.py", "test_run_folder.py", "test_publish_files.py", "test_data.py", "test_cards.py", "test_hub.py",
    "test_limits.py", "test_extras.py", "test_others_text.py", "test_label_models.py", "test_fuzz_data.py",
    "test_template.py", "test_cai_reward.py", "test_label.py", "test_kto.py", "test_warm.py", "test_wheel.py",
    "test_reward.py", "test_evaluation_summary.py", "test_embedded.py", "test_page.py", "test_audit_page.py",
    "test_audit_calibration.py", "test_audit_consistency.py", "test_audit_coverage.py", "test_docs.py",
    "test_forks.py", "test_audit_uncertainty.py", "test_cai_judge.py", "test_publish_private.py", "test_preference.py",
)  # fmt: skip
# Files that simulate, serve or parse for long, most of their tests.
SLOW = (
    "test_audit_calibration.py", "test_audit_consistency.py", "test_audit_page.py", "test_audit_uncertainty.py",
    "test_cai_data.py", "test_cai_judge.py", "test_cai_server.py", "test_extras.py", "test_fuzz_data.py",
    "test_limits.py", "test_page.py", "test_preflight.py",
)  # fmt: skip

SHARED_ROOM = pytest.StashKey[dict]()


def pytest_configure(config):
    """The process that outlives all workers offers them the same two Pythons: libraries are imported once."""
    if hasattr(config, "workerinput"):
        config.stash[SHARED_ROOM] = config.workerinput["shared_room"]
        return
    offered = contextlib.ExitStack()
    config.add_cleanup(offered.close)
    folder = tempfile.TemporaryDirectory(prefix="rlhf-recipes-tests-", ignore_cleanup_errors=True)
    room = Path(offered.enter_context(folder))
    (room / "hf_home").mkdir()
    env = offline(room / "hf_home")
    pythons = {kind: str(offered.enter_context(warm.offer(room / kind, env, kind))) for kind in ("warm", "light")}
    config.stash[SHARED_ROOM] = {"env": env, **pythons}


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_configure_node(node):
    node.workerinput["shared_room"] = node.config.stash[SHARED_ROOM]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: to look for garbage among it takes seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Files by their length; whatever loads a model or runs a recipe is slow."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        if item.path.name in SLOW or {"tiny_model", "embedded_model", "warm_python"} & set(item.fixturenames):
            item.add_marker("slow")


@dataclass
class Finished:
    """What a recipe left behind when its process ended."""

    returncode: int
    stdout: str
    stderr: str

    def __str__(self):
        return f"exit {self.returncode}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random Llama (2 layers, width 64, 1,000 tokens) that chats in ChatML: always the same weights."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in names]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((CLINIC / "pairs.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=CHATML,
        unk_token=names[0],
        bos_token=names[1],
        eos_token=names[2],
        pad_token=names[0],
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_overrides(tiny_model):
    """The tiny model instead of the embedded one: for any recipe that has a model."""
    return [f"model.path={tiny_model}", f"model.id={TINY_ID}"]


def build_terse(tiny: Path, folder: Path) -> Path:
    """The tiny model, which never ends by itself, with every fifth token as one that ends a reply."""
    shutil.copytree(tiny, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, *range(300, 1000, 5)]}))
    return folder


@pytest.fixture(scope="session")
def terse(tiny_model, tmp_path_factory):
    """See `build_terse`."""
    folder = build_terse(tiny_model, tmp_path_factory.mktemp("terse") / "model")
    return [f"model.path={folder}", f"model.id={TINY_ID}"]


@pytest.fixture(scope="session")
def tiny_overrides(tiny_model_overrides):
    """Two optimiser steps of four rows each on the tiny model, and one checkpoint: for any recipe that trains."""
    return [
        *tiny_model_overrides,
        "data.train_size=8",
        "data.eval_size=4",
        "trainer.max_steps=2",
        "trainer.save_steps=0.9",
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=2",
    ]


def offline(hf_home):
    """The environment of a subprocess that reaches no hub and touches nobody's caches."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "RLHF_", "HYDRA_"))}
    return {
        **kept,
        "HF_HOME": str(hf_home),
        "HF_HUB_OFFLINE": "1",
        **({"RLHF_RECIPES_CACHE": os.environ["RLHF_RECIPES_CACHE"]} if "RLHF_RECIPES_CACHE" in os.environ else {}),
    }


@pytest.fixture(scope="session")
def clean_env(pytestconfig):
    """That of the warm Pythons: with what libraries set in this process there would be none."""
    return dict(pytestconfig.stash[SHARED_ROOM]["env"])


@pytest.fixture(scope="session")
def warm_python(pytestconfig):
    """The path of a Python that has imported the libraries already, in `clean_env`: see tests/warm.py."""
    return pytestconfig.stash[SHARED_ROOM]["warm"]


@pytest.fixture(scope="session")
def light_python(pytestconfig):
    """The same, of one that has imported none of the large libraries."""
    return pytestconfig.stash[SHARED_ROOM]["light"]


@pytest.fixture(scope="session")
def run_recipe(clean_env, warm_python):
    """run_recipe(name, *overrides, cwd, env=None, cold=False): `python -m rlhf_recipes.recipes.<name>`, to its end.

    `env` is added to `clean_env`; a value of None removes the variable. `cold`: by a Python that has imported nothing;
    `python`: by another one; `kill`: with a death sentence, see tests/killed.py.
    """

    def run(name, *overrides, cwd, env=None, cold=False, python=None, kill=None):
        python = python or (sys.executable if cold else warm_python)
        module = ["killed", kill, name] if kill else [f"rlhf_recipes.recipes.{name}"]
        done = subprocess.run(
            [python, "-m", *module, *overrides],
            cwd=cwd,
            env=merged(clean_env, {"PYTHONPATH": TESTS} if kill else env),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def start_recipe(clean_env, warm_python):
    """start_recipe(name, *overrides, cwd, env=None, cold=False, python=None): the same as a running process, of the
    recipe's own id where it is cold; what still runs at the end of a test is killed with its children.

    `holds`: where it would write such a path, it waits while `cwd / "held"` is there, see tests/held.
    """
    started = []

    def start(name, *overrides, cwd, env=None, cold=False, python=None, holds=None):
        if holds:
            env = {"PYTHONPATH": TESTS / "held", "RLHF_TEST_HOLDS": holds}
        # Ignored in what a shell put behind itself, and so in what that starts. A `preexec_fn` that changes this would
        # have all memory of this process copied.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [python or (sys.executable if cold else warm_python), "-m", f"rlhf_recipes.recipes.{name}", *overrides],
            cwd=cwd,
            env=merged(clean_env, env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to its group is what Ctrl-C sends
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def embedded_model():
    """Folder of the prepared embedded model; the first call fetches it from the package index."""
    from rlhf_recipes import embedded

    return embedded.prepare()


@pytest.fixture(scope="session")
def shared_data():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is not here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def composing():
    quick.compose_once()
    quick.sync_nothing()


@pytest.fixture(autouse=True)
def signals_heard_as_before():
    """A child process inherits what its parent ignores."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def compose():
    """compose(recipe, *overrides): the config that the command line `<recipe> <overrides>` gives."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    import rlhf_recipes.config  # noqa: F401  registers the nodes that the groups start from

    def composed(name, *overrides):
        GlobalHydra.instance().clear()
        with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name=name):
            cfg = hydra.compose(name, overrides=list(overrides))
        cfg.output_dir = f"outputs/{name}/{cfg.run_name}"  # known to a running Hydra alone
        return cfg

    return composed


@dataclass
class Trained:
    """What a recipe in this process left behind."""

    dir: Path
    cfg: object
    trainer: object

    @property
    def result(self):
        """result.json with its estimates, as the package reads it."""
        from rlhf_recipes.stats import Estimate

        return json.loads((self.dir / "result.json").read_text(encoding="utf-8"), object_hook=Estimate.of)

    @property
    def log(self):
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def weights(self):
        from safetensors.torch import load_file

        return load_file(self.dir / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def libraries():
    """The large ones are imported, and do less."""
    for name in warm.PRELOADED:
        import_module(name)
    quick.settle()


@pytest.fixture(scope="session")
def train(compose, tiny_overrides, libraries):
    """train(recipe, folder, *overrides, drawn=False): a training recipe in this process, two steps on the tiny model.

    It runs in the parent of `folder`, so that a chain is named by relative paths as on a command line. It writes
    checkpoints where an override says which. `drawn`: with its pictures.
    """

    def trained(recipe, folder, *overrides, drawn=False):
        module = import_module(f"rlhf_recipes.recipes.{recipe}")
        saves = any(override.startswith("trainer.save_") for override in overrides)
        cfg = compose(recipe, *tiny_overrides, *overrides, *([] if saves else ["trainer.save_strategy=no"]))
        cfg.output_dir = folder.name
        seen = []

        def finish(job, trainer, **kwargs):
            seen.append(trainer)
            return original(job, trainer, **kwargs)

        original, module.finish = module.finish, finish
        try:
            with contextlib.chdir(folder.parent), contextlib.nullcontext() if drawn else quick.pictures_sketched():
                module.main.__wrapped__(cfg)
        finally:
            module.finish = original
        return Trained(folder, cfg, seen[0])

    return trained


@pytest.fixture(scope="session")
def trained_once(train, tmp_path_factory):
    """trained_once(recipe, *overrides): of `train`, in a folder `run` that is only read; made once by a worker."""

    @functools.cache
    def once(recipe, *overrides):
        return train(recipe, tmp_path_factory.mktemp(recipe) / "run", *overrides)

    return once


def stir(model):
    """Weights at which every token before matters; as initialised, a tiny model repeats its last token."""
    import torch

    with torch.no_grad():
        for weights in model.model.layers.parameters():
            if weights.ndim == 2:
                weights *= 6
    return model.eval()


def skip_without(target):
    """TRL may lose an experimental trainer: what is said of one holds as long as it is there."""
    if target.startswith("trl.experimental."):
        import pytest

        pytest.importorskip(target.rpartition(".")[0])


def merged(env, changes):
    both = {**env, **(changes or {})}
    return {key: str(value) for key, value in both.items() if value is not None}


def free_port():
    """A port that nobody has, below those that the system itself gives to whoever connects."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def wait_for(path, process):
    """Until a path is there, which a living process makes."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, (path, process.poll())
        time.sleep(0.01)


def snapshot(folder):
    """Path -> SHA-256 (files) or "folder", of everything below."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def write_pairs(path, count=24):
    """A jsonl of `count` preference pairs."""
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def weights(named="weights"):
    """The bytes of a safetensors file without a tensor, for each name others."""
    header = json.dumps({"__metadata__": {"name": named}}).encode()
    return len(header).to_bytes(8, "little") + header


def write_adapter(folder, base=TINY_ID, **result):
    """A folder that passes for a run: adapter_config.json, weights, and result.json with `result`."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights())
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_checkpoint(folder, step, state='{"global_step": %d, "max_steps": 900, "epoch": 0.5}'):
    """What passes for a whole checkpoint of the run in a folder; `state`: its trainer_state.json, None for none."""
    path = folder / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    header = json.dumps({"__metadata__": {"of": f"step {step}"}}).encode()
    (path / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        zipfile.ZipFile(path / name, "w").close()
    if state:
        (path / "trainer_state.json").write_text(state % step if "%d" in state else state)
    return path


@dataclass
class Rendered:
    """What a Markdown renderer makes of a text: its elements in order, its table cells, and the text that is shown.

    `links` and `images` are their addresses; `autolinks` is what GitHub and the Hub would make a link of, beyond them.
    """

    tags: list[str]
    cells: list[list[str]]
    text: str
    links: list[str]
    images: list[str]
    autolinks: list[str]


def rendered(source):
    """Markdown as GitHub has it: tables, strikethrough, raw HTML."""
    import re
    from html.parser import HTMLParser

    from markdown_it import MarkdownIt

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found = Rendered([], [], "", [], [], [])
            self.plain, self.open = "", []  # text outside of links and code

        def handle_starttag(self, tag, attrs):
            self.found.tags.append(tag)
            self.open.append(tag)
            if tag == "a":
                self.found.links.append(dict(attrs).get("href"))
            if tag == "img":
                self.found.images.append(dict(attrs).get("src"))
            if tag == "tr":
                self.found.cells.append([])
            if tag in ("td", "th"):
                self.found.cells[-1].append("")

        def handle_endtag(self, tag):
            if tag in self.open:
                self.open = self.open[: len(self.open) - 1 - self.open[::-1].index(tag)]

        def handle_comment(self, data):
            self.found.tags.append("!--")

        def handle_data(self, data):
            self.found.text += data
            if {"td", "th"} & set(self.open):
                self.found.cells[-1][-1] += data
            if not {"a", "code"} & set(self.open):
                self.plain += data

    reader = Reader()
    reader.feed(MarkdownIt("gfm-like", {"linkify": False}).render(source))
    reader.close()
    auto = r"(?i)(?:https?|ftp)://\S+|\bwww\.\S+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    reader.found.autolinks = re.findall(auto, reader.plain)
    return reader.found
