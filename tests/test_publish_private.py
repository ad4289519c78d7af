"""What must not leave this machine, and what of a run folder is code: seen before a model loads, and never shown."""

import hashlib
import json
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
from conftest import snapshot
from hub_server import TOKEN
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_hub import add_line, change, configured, publish, refused, run, server, told, trained  # noqa: F401

# ruff: noqa: F811

WORD = "correct-horse-battery-staple"
HARD = 'pa"ss\\word <é> of ours'
HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def environment(monkeypatch):
    """Three secrets of the kinds that have no shape of their own."""
    monkeypatch.setenv("CLINIC_DB_PASSWORD", WORD)
    monkeypatch.setenv("BACKUP_PASSPHRASE", HARD)
    monkeypatch.setenv("WANDB_API_KEY", HEX)


@pytest.fixture
def pairs(run):
    """A folder that passes for a finished run of recipes/cai.py, until its card is written."""
    folder = run.parent / "pairs"
    folder.mkdir()
    write_rows(folder, "Which day suits you?")
    result = {"recipe": "cai", "status": "finished", "funnel": {"written": {"train_prefs": 1}}}
    (folder / "result.json").write_text(json.dumps(result))
    config = {"constitution": {"name": "mine"}, "data": {"path": "x.jsonl"}, "generator": {"kind": "local"}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder


def write_rows(folder, text, split="train_prefs"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": [{"role": "user", "content": said}]} for said in ("Hello.", text)]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def behind_the_picture(run):
    with (run / "curves.png").open("ab") as file:
        file.write(b"aws_access_key_id = AKIA" + b"Q" * 16)


def inside_the_picture(run):
    path, chunk = run / "curves.png", b"tEXtnote\0" + TOKEN.encode()
    data, size = path.read_bytes(), struct.pack(">I", len(chunk) - 4)
    path.write_bytes(data[:-12] + size + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[-12:])


def in_metadata(run):
    """Of the weights, and let the result say that these were trained."""
    from rlhf_recipes.references import adapter_sha256

    path = run / "adapter" / "adapter_model.safetensors"
    note = "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0" + ".c2lnbmF0dXJl"
    save_file(load_file(path), path, metadata={"format": "pt", "note": note})
    change(run / "result.json", lambda result: result.update(adapter_sha256=adapter_sha256(run / "adapter")))


def in_numbers(run):
    """The bytes of a tensor."""
    import torch

    from rlhf_recipes.references import adapter_sha256

    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    values = torch.frombuffer(bytearray(("?" * 3 + WORD + "?" * 9).encode()), dtype=torch.float32)
    name = next(iter(tensors))
    tensors[name].view(-1)[5 : 5 + len(values)] = values
    save_file(tensors, path)
    change(run / "result.json", lambda result: result.update(adapter_sha256=adapter_sha256(run / "adapter")))


def in_vocabulary(run):
    change(run / "adapter" / "tokenizer.json", lambda content: content.update(note="ghp_" + "a1B2" * 9))


def in_adapter_config(run):
    change(run / "adapter" / "adapter_config.json", lambda content: content.update(note="xoxb-" + "123456789012-abc"))


def escaped(run):
    """JSON may write any letter in another way."""
    path = run / "adapter" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"note": "\\u0068f_' + "A1" * 15 + '",', 1))


def in_template(run):
    (run / "adapter" / "additional_chat_templates").mkdir()
    (run / "adapter" / "additional_chat_templates" / "tool.jinja").write_text("{# " + HEX + " #}")


def in_model(run):
    (run / "adapter" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05\0\xff" + WORD.encode() + b"\x15\0")


def in_constitution(run):
    OmegaConf.update(cfg := OmegaConf.load(run.parent / "pairs" / "config.yaml"), "constitution.name", TOKEN)
    OmegaConf.save(cfg, run.parent / "pairs" / "config.yaml")


PLANTED = {
    "environment": (told(note=f"it is {WORD}!"), "result.json:"),
    "environment, escaped": (told(note=[{"deep": HARD}]), "result.json:"),
    "token in the config": (configured("trainer.hub_token", TOKEN), "config.yaml:"),
    "URL with a password": (configured("data.path", "https://me:s3cretly@example.org/x.jsonl"), "config.yaml:"),
    "key in the config": (configured("trainer.api_key", HEX), "config.yaml:"),
    "private key": (add_line("metrics.jsonl", "-----BEGIN OPENSSH PRIVATE KEY-----"), "metrics.jsonl:"),
    "vocabulary": (in_vocabulary, "tokenizer.json:"),
    "model of a tokenizer": (in_model, "tokenizer.model:"),
    "template": (in_template, "additional_chat_templates/tool.jinja:"),
    "escaped letters": (escaped, "tokenizer_config.json:"),
    "adapter config": (in_adapter_config, "adapter_config.json:"),
    "behind a picture": (behind_the_picture, "curves.png:"),
    "inside a picture": (inside_the_picture, "curves.png:"),
    "metadata of the weights": (in_metadata, "adapter_model.safetensors:"),
    "bytes of the weights": (in_numbers, "adapter_model.safetensors:"),
    "row": (lambda run: write_rows(run.parent / "pairs", f"My key is {HEX}, keep it."), "train_prefs.parquet:2:"),
    "row, escaped": (lambda run: write_rows(run.parent / "pairs", HARD), "train_prefs.parquet:2:"),
    "constitution": (in_constitution, "config.yaml:2:"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_a_secret_is_refused_by_the_name_of_its_file(run, pairs, refused, environment, monkeypatch, planted):
    plant, says = PLANTED[planted]
    plant(run)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    named = "pairs=pairs" if planted in ("row", "row, escaped", "constitution") else "run=dpo"
    before = snapshot(run.parent)
    said = refused(named, "license=mit", "folder=x", "force=true")
    assert said.startswith(says), said
    secrets = (WORD, HARD, HARD[:8], HEX, TOKEN, "s3cretly", "BEGIN", "ghp_", "xoxb", "eyJ", "AKIA", "hf_")
    assert not any(secret in said for secret in secrets), said
    assert snapshot(run.parent) == before


def test_words_that_are_no_secrets(run, pairs, monkeypatch):
    """Long names with hyphens; what a vocabulary has anyway; weights, which are any bytes."""
    from rlhf_recipes.publish import contents, scan

    monkeypatch.setenv("ADMIN_PASSWORD", "password")
    staged = run.parent / "staged"
    staged.mkdir()
    write_rows(staged, "task-specific-fine-tuning, risk-stratification-tools, hf_baseline1_of_the_desk")
    (staged / "tokenizer.json").write_text(json.dumps({"vocab": {"password": 1, "secret": 1234567, "api_key": 22}}))
    numbers = np.random.default_rng(0).integers(0, 256, 2**25 + 12345, np.uint8)
    (staged / "model.safetensors").write_bytes(numbers.tobytes())
    scan.files(staged, False, {}, contents.hashes(staged))
    (staged / "notes.txt").write_text("password")
    with pytest.raises(ValueError, match=r"^notes.txt:1: holds the value of the environment variable ADMIN_PASSWORD"):
        scan.files(staged, False, {}, contents.hashes(staged))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 5, 2**24 - 30, 2**24 - 9, 2**24 + 1, 2**25 + 12000])
def test_a_secret_anywhere_in_a_large_file(tmp_path, place):
    from rlhf_recipes.publish import contents, scan

    data = bytearray(np.random.default_rng(1).integers(0, 256, 2**25 + 12345, np.uint8).tobytes())
    data[place : place + len(TOKEN) + 2] = b"\0" + TOKEN.encode() + b"\0"
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"^model.safetensors: holds what looks like a token"):
        scan.files(tmp_path, False, {}, contents.hashes(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("curves.png", b"-----BEGIN"),
        ("curves.png", b"\x89PNG\r\n\x1a\n"),
        ("doctor.png", b"\x89PNG\r\n\x1a\nzTXt" * 9),
    ],
)
def test_what_is_no_picture(run, refused, name, content):
    (run / name).write_bytes(content)
    assert refused("run=dpo", "license=mit", "folder=x", "force=true").startswith(f"{name}: is no picture as PNG, or")


@pytest.mark.parametrize(
    "link", ["curves.png", "metrics.jsonl", "result.json", "adapter/vocab.bin", "adapter/vocab.txt", "adapter", "note"]
)
def test_a_link_that_leads_out(run, refused, tmp_path_factory, link):
    outside = tmp_path_factory.mktemp("outside")
    target, path = outside / "credentials", run / link
    if path.exists():
        path.rename(target)
    else:
        target.write_text("mine")
    path.symlink_to(target)
    assert refused("run=dpo", "license=mit", "folder=x", "force=true").startswith(
        f"run=dpo: {link} is a link that leads out of it."
    )
    assert not (run.parent / "x").exists()


def test_a_link_that_stays_inside(run, publish):
    (run / "curves.png").rename(run / "first.png")
    (run / "curves.png").symlink_to("first.png")
    published = publish("run=dpo", "license=mit", "folder=x")["files"]
    assert "curves.png" in published and "first.png" not in published
    assert not (run.parent / "x" / "curves.png").is_symlink()


def test_an_evaluation_that_leads_out(run, refused):
    (run.parent / "evaluate").mkdir()
    reasons = {"verdict": "ship", "reasons": ["It is."]}
    info = {"path": "dpo", "adapter_sha256": json.loads((run / "result.json").read_text())["adapter_sha256"]}
    systems = {"dpo": {"info": info, "metrics": {}, "verdict": reasons}}
    found = {"recipe": "evaluate", "evaluation": {"parent": "base", "systems": systems}}
    (run.parent / "evaluate" / "result.json").write_text(json.dumps(found))
    (run.parent / "mine.txt").write_text("mine")
    (run.parent / "evaluate" / "report.html").symlink_to(run.parent / "mine.txt")
    said = refused("run=dpo", "license=mit", "folder=x", "evaluation=evaluate")
    assert said.startswith("evaluation=evaluate: report.html is a link that leads out of it.")


def test_no_row_of_the_data(run, publish):
    """PPO puts samples into its result; files with other names stay where they are."""
    prompt = "My name is Grace and I have diabetes."
    told(samples=[{"prompt": [{"role": "user", "content": prompt}], "completion": prompt}])(run)
    for name in ("samples.jsonl", "adapter/vocab.bin", "adapter/tokenizer.bak", "adapter/notes.jinja", "x.parquet"):
        (run / name).write_text(prompt)
    publish("run=dpo", "license=mit", "folder=x")
    published = [path for path in (run.parent / "x").rglob("*") if path.is_file()]
    assert len(published) > 8 and not any(b"Grace" in path.read_bytes() for path in published)
    assert "samples" not in json.loads((run.parent / "x" / "result.json").read_text())


# ---- a run folder is data


TOUCH = {"_target_": "os.system", "command": "touch pwned"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (configured("quantization", TOUCH), "run=dpo: quantization in config.yaml names {'_target_': 'os.system',"),
        (configured("quantization", "x"), "run=dpo: quantization in config.yaml names x, which"),
        (configured("quantization._target_", "pwn.Pwned"), "run=dpo: quantization in config.yaml names"),
        (configured("quantization", {"_target_": "transformers.BitsAndBytesConfig", "x=print(1), y": 1}),
         "quantization.x=print(1), y: transformers.BitsAndBytesConfig has no such field"),
        (configured("model.dtype", "float32); print(1"), "model.dtype=float32); print(1: not a torch dtype."),
        (configured("model.attn_implementation", "evil/kernel"), "run=dpo: model.attn_implementation in config"),
        (configured("model.pad_token", "${oc.env:HOME}"), "run=dpo: model.pad_token in config.yaml is not resolved."),
        (configured("data.path", "${oc.env:HOME}"), "run=dpo: data.path in config.yaml is not resolved."),
        (lambda run: (run / "config.yaml").write_text("model: {}"), "run=dpo: config.yaml has no model.id."),
        (lambda run: change(run / "adapter/adapter_config.json", lambda c: c.update(megatron_config={"a": 1},
                                                                                    megatron_core="pwn")),
         "run=dpo: adapter/adapter_config.json names code (megatron_config)"),
        (lambda run: change(run / "adapter/tokenizer_config.json",
                            lambda c: c.update(auto_map={"AutoTokenizer": ["pwn.Pwned", None]})),
         "run=dpo: adapter/tokenizer_config.json names code (auto_map)"),
    ],
)  # fmt: skip
def test_a_run_that_names_code(run, refused, spoil, says):
    (run.parent / "pwn.py").write_text("open('pwned', 'w')\nclass Pwned: pass\n")
    (run / "adapter" / "pwn.py").write_text("open('pwned', 'w')\nclass Pwned: pass\n")
    spoil(run)
    said = refused("run=dpo", "license=mit", "folder=x", "force=true")
    assert said.startswith(says) and os.environ["HOME"] not in said, said
    assert not (run.parent / "pwned").exists() and not (run.parent / "x").exists()


@pytest.mark.parametrize("group", ["trainer", "lora"])
def test_a_class_that_conf_does_not_name_is_not_imported(run, publish, monkeypatch, group):
    (run.parent / f"pwn_{group}.py").write_text("open('pwned', 'w')\nclass Pwned: pass\n")
    monkeypatch.syspath_prepend(run.parent)
    configured(f"{group}._target_", f"pwn_{group}.Pwned")(run)
    publish("run=dpo", "license=mit", "folder=x")
    assert not (run.parent / "pwned").exists()
    assert f"| `{group}." in (run.parent / "x" / "README.md").read_text()


def test_the_snippet_holds_no_code_of_the_run(run, publish):
    """Readers run it as it stands."""
    import ast

    configured("model.revision", 'x", trust_remote_code="yes')(run)
    change(run / "probe.json", lambda found: found.update(dtype="float32, trust_remote_code=True"))
    publish("run=dpo", "license=mit", "folder=x")
    code = (run.parent / "x" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert not [word for word in ast.walk(ast.parse(code)) if getattr(word, "arg", "") == "trust_remote_code"]


# ---- the fresh process


def test_it_runs_nothing_of_the_current_folder(run):
    from rlhf_recipes.publish import round_trip

    for name in ("json", "yaml", "hydra", "datasets", "torch", "pip"):
        (run.parent / f"{name}.py").write_text(f"open('pwned-{name}', 'w')\n")
    assert round_trip.in_fresh_process({"folder": str(run), "splits": []}) == {}
    assert not list(run.parent.glob("pwned*"))


def test_what_it_is_given(run, environment, monkeypatch):
    """As many threads as this process has, and no secret, be it in a variable, a file or a URL."""
    import torch

    from rlhf_recipes.publish import round_trip

    given = {"HF_TOKEN": TOKEN, "HTTPS_PROXY": "http://me:s3cretly@proxy:8080", "GIT_AUTH": f"Bearer {HEX}"}
    given |= {"HF_TOKEN_PATH": "/somewhere/token", "PIN_KEY": "1234", "HF_HOME": "/cache"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []

    def note(command, env, stdin, **_):
        seen.append((command, env, stdin))
        stderr = f"Traceback\nOSError: \x1b[2J{WORD} {TOKEN} is no token\n"
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(round_trip.subprocess, "run", note)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        task = round_trip.task(run, OmegaConf.to_container(OmegaConf.load(run / "config.yaml")), reward=False)
        with pytest.raises(ValueError) as caught:
            round_trip.in_fresh_process(task)
    finally:
        torch.set_num_threads(threads)
    assert str(caught.value) == "a fresh process cannot load it (OSError: ␛[2J<secret> <secret> is no token)"
    ((command, env, stdin),) = seen
    assert "-P" in command and stdin == subprocess.DEVNULL
    assert env["OMP_NUM_THREADS"] == "3" and task["threads"] == 3
    assert env["HF_HOME"] == "/cache" and "PATH" in env and env["HF_HUB_OFFLINE"] == "1"
    assert not os.path.exists(env["HF_TOKEN_PATH"]) and env["HF_TOKEN_PATH"] != "/somewhere/token"
    held = " ".join([*command, *env.values()])
    assert not any(secret in held for secret in (WORD, HARD, HEX, TOKEN, "s3cretly", "1234"))


def test_it_computes_with_as_many_threads(monkeypatch, tmp_path):
    import torch

    from rlhf_recipes.publish import round_trip

    threads = torch.get_num_threads()
    monkeypatch.setattr(round_trip, "measure", lambda task: {"threads": torch.get_num_threads()})
    (tmp_path / "task.json").write_text(json.dumps({"threads": 3}))
    try:
        round_trip._main(str(tmp_path / "task.json"), str(tmp_path / "answer.json"))
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "answer.json").read_text()) == {"threads": 3}


@pytest.mark.parametrize("other", [{"threads": 99}, {"device": "GPU"}, {"kernels": "AVX1024"}, {"versions": {}}])
def test_numbers_of_another_machine_are_measured_anew(run, other):
    from rlhf_recipes.publish import contents
    from rlhf_recipes.publish import publish as publishing

    source = contents.find("dpo", None)
    kept = publishing._probe(source)
    change(run / "probe.json", lambda found: found.update(values=[0.0] * 32, machine={**found["machine"], **other}))
    assert publishing._probe(source) == kept == json.loads((run / "probe.json").read_text())
    change(run / "probe.json", lambda found: found.update(values=[1.0] * 32))
    assert publishing._probe(source)["values"] == [1.0] * 32  # of this machine they are kept


def test_the_terms_of_pairs_that_were_taken_over_are_known_or_asked_for(tmp_path, monkeypatch):
    from rlhf_recipes.publish import base_model, contents

    monkeypatch.setattr(base_model, "describe", lambda *_: "known")
    own = {"data": {"path": "clinic"}, "generator": {"kind": "local"}, "model": {"id": "org/a"}}
    runs = {
        "same": {}, "prompts": {"data": {"path": "x.jsonl"}}, "served": {"generator": {"kind": "server"}},
        "other": {"model": {"id": "org/b"}},
    }  # fmt: skip
    for name, change_of in runs.items():
        (tmp_path / name).mkdir()
        OmegaConf.save(own | change_of, tmp_path / name / "config.yaml")
    for name in (*runs, "gone"):
        source = contents.Source(
            "pairs", tmp_path, own | {"earlier": [str(tmp_path / "same"), str(tmp_path / name)]}, {}
        )
        if name == "same":
            assert base_model.describe_generator(source, None, None) == "known"
            continue
        with pytest.raises(
            ValueError, match=rf"^license: the terms of the pairs of earlier=\S*{name} are not known here"
        ):
            base_model.describe_generator(source, None, None)


def test_a_folder_of_the_cache_is_held_against_its_own_commit(tmp_path):
    """Not against what the Hub has since."""
    from types import SimpleNamespace

    from rlhf_recipes.publish import base_model, contents

    weights = b"weights of the first commit"
    folder = tmp_path / "hub" / "models--org--a" / "snapshots" / "aaaa"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    told = {"aaaa": hashlib.sha256(weights).hexdigest(), None: "0" * 64}

    def model_info(repo, revision, files_metadata):
        files = [SimpleNamespace(lfs=SimpleNamespace(sha256=told[revision]))]
        return SimpleNamespace(sha="bbbb", card_data={"license": "mit"}, siblings=files)

    def described(model_id):
        model = {"id": model_id, "path": str(folder), "revision": None}
        source = contents.Source("run", tmp_path, {"model": model}, {})
        found = base_model.describe(source, None, SimpleNamespace(model_info=model_info))
        return found["revision"], found["same"]

    assert described("org/a") == ("aaaa", True)
    assert described("org/other") == ("bbbb", False)  # of another model's cache no commit is asked for
