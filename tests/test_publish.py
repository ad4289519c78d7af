"""recipes/publish.py as a user runs it, against a loopback Hub: published is what plain code loads again."""

import json
import re
import shutil
import subprocess
import sys

import hub_server
import pytest
import yaml
from conftest import TINY_ID, merged
from hub_server import TOKEN

LEARNS = ("trainer.learning_rate=0.01", "trainer.warmup_steps=0", "data.eval_size=24")
BASE = {"README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n"}


@pytest.fixture(scope="module")
def hub(tiny_model):
    started = hub_server.start()
    started.put(TINY_ID, tiny_model, **BASE)
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture(scope="module")
def here(train, tmp_path_factory):
    """A folder with runs: sft, dpo after it in 4-bit, reward."""
    folder = tmp_path_factory.mktemp("runs")
    train("sft", folder / "sft", *LEARNS)
    train("dpo", folder / "dpo", *LEARNS, "model.adapter=sft")
    train("reward", folder / "reward", *LEARNS, "quantization=none")
    return folder


@pytest.fixture(scope="module")
def publish(run_recipe, hub, here, tmp_path_factory):
    """publish(*overrides, recipe="publish", env=None): the recipe with an empty cache of its own."""

    def published(*overrides, recipe="publish", env=None):
        home = tmp_path_factory.mktemp("home")
        given = {**hub.environment(home), "TMPDIR": str(tmp_path_factory.mktemp("tmp")), **(env or {})}
        return run_recipe(recipe, *overrides, cwd=here, env=given)

    return published


@pytest.fixture(scope="module")
def plain(hub, clean_env, tmp_path_factory):
    """plain(code): what Python prints in an empty folder with an empty cache, where this package is not on the path."""

    def run(code):
        folder = tmp_path_factory.mktemp("empty")
        env = merged(clean_env, {**hub.environment(folder / "home"), "PYTHONPATH": None})
        blocked = "import sys\nsys.modules['rlhf_recipes'] = None\n"
        done = subprocess.run([sys.executable, "-c", blocked + code], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def card_of(hub, repo_id, kind="model"):
    text = hub.repos[kind, repo_id].files["README.md"].decode()
    return text, yaml.safe_load(text.split("---\n")[1])


def snippet_of(text):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def probe_of(hub, repo_id):
    return json.loads(hub.repos["model", repo_id].files["probe.json"])


PROBES = """
import json, torch
from pathlib import Path
rows = [json.loads(line) for line in Path({pairs!r}).read_text().splitlines()]
rows = [row for row in rows if row["split"] == "test"][:4]
"""
LOGPS = """
for row in rows:
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    reply = [{"role": "assistant", "content": row["chosen"]}]
    whole = tokenizer.apply_chat_template(row["prompt"] + reply, return_dict=False)
    with torch.no_grad():
        logits = policy(torch.tensor([whole])).logits[0, :-1].float().log_softmax(-1)
    print(logits.gather(1, torch.tensor(whole[1:])[:, None])[len(ids) - 1 :].sum().item() / (len(whole) - len(ids)))
"""
SCORES = """
for row in rows:
    reply = [{"role": "assistant", "content": row["chosen"]}]
    with torch.no_grad():
        print(reward_model(torch.tensor([tokenizer.apply_chat_template(row["prompt"] + reply, return_dict=False)])).logits.item())
"""


def test_an_sft_dpo_adapter(hub, here, publish, plain):
    from rlhf_recipes.data import CLINIC

    done = publish("run=dpo", "repo_id=ada/desk", "tag=v1", "force=true")
    assert done.returncode == 0, done
    assert f"published {hub.url}/ada/desk/tree/" in done.stdout
    assert TOKEN not in str(done)
    repo = hub.repos["model", "ada/desk"]
    assert repo.private and [c["title"] for c in repo.commits.values()][-1].endswith("proven")
    assert repo.tags["v1"] == repo.branches["main"]
    assert {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "result.json", "probe.json", "curves.png",
            "tokenizer.json", "chat_template.jinja"} <= repo.files.keys()  # fmt: skip
    assert repo.files["adapter_model.safetensors"] == (here / "dpo/adapter/adapter_model.safetensors").read_bytes()
    text, head = card_of(hub, "ada/desk")
    sha = hub.repos["model", TINY_ID].branches["main"]
    assert head["base_model"] == TINY_ID and head["base_model_relation"] == "adapter"
    assert head["license"] == "apache-2.0" and head["tags"][0] == "rlhf-recipes"
    assert json.loads(repo.files["adapter_config.json"])["revision"] == sha
    measured = json.loads((here / "dpo/result.json").read_text())["metrics"]["preference_accuracy"]
    metrics = {metric["type"]: metric for metric in head["model-index"][0]["results"][0]["metrics"]}
    assert metrics["preference_accuracy"]["value"] == round(measured["value"], 6)
    assert metrics["preference_accuracy"]["args"]["n"] == measured["n"] == 24
    assert "**Proven by a round trip**" in text and "32 log-probabilities" in text and "Not proven" not in text
    code = snippet_of(text)
    assert f"revision={sha!r}" in code and "load_in_4bit=True" in code

    found = plain(code + PROBES.format(pairs=str(CLINIC / "pairs.jsonl")) + LOGPS).splitlines()[-4:]
    probe = probe_of(hub, "ada/desk")
    stored = [value / scale for value, scale in zip(probe["values"], probe["scale"], strict=True)]
    assert [float(line) for line in found] == pytest.approx(stored[:4], abs=0.02)
