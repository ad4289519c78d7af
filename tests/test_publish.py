"""recipes/publish.py as a user runs it, against a loopback Hub: published is what plain code loads again."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import hub_server
import pytest
import yaml
from conftest import LIMIT, TINY_ID, merged
from hub_server import TOKEN
from test_cai import SMALL

LEARNS = ("trainer.learning_rate=0.01", "trainer.warmup_steps=0", "data.eval_size=24")
WITHOUT_US = """
import sys
for name in [name for name in sys.modules if name.startswith("rlhf_recipes")]:
    del sys.modules[name]
sys.modules["rlhf_recipes"] = None
"""
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
def plain(hub, clean_env, warm_python, tmp_path_factory):
    """plain(code, cold=False): what Python prints in an empty folder with an empty cache, without this package."""

    def run(code, cold=False):
        folder, module = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("module")
        (module / "warm_plain.py").write_text(f"{WITHOUT_US}{code}")
        env = merged(clean_env, {**hub.environment(folder / "home"), "PYTHONPATH": module})
        command = [sys.executable if cold else warm_python, "-m", "warm_plain"]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
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
    ids = tokenizer.apply_chat_template(row["prompt"] + reply, return_dict=False)
    with torch.no_grad():
        print(reward_model(torch.tensor([ids])).logits.item())
"""


def test_an_sft_dpo_adapter(hub, here, publish, plain):
    from rlhf_recipes.data.sources import CLINIC

    done = publish("run=dpo", "repo_id=ada/desk", "tag=v1", "force=true")
    assert done.returncode == 0, done
    assert f"published {hub.url}/ada/desk/tree/" in done.stdout
    assert TOKEN not in str(done)
    repo = hub.repos["model", "ada/desk"]
    assert repo.private and [c["title"] for c in repo.commits.values()][-1].endswith("proven")
    assert repo.tags["v1"] == repo.branches["main"]
    assert {"adapter_config.json", "config.yaml", "result.json", "probe.json", "curves.png"} <= repo.files.keys()
    assert {"tokenizer.json", "chat_template.jinja"} <= repo.files.keys()
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
    assert f'revision="{sha}"' in code and "load_in_4bit=True" in code

    printed = plain(code + PROBES.format(pairs=str(CLINIC / "pairs.jsonl")) + LOGPS, cold=True)
    found = printed.splitlines()[-4:]
    probe = probe_of(hub, "ada/desk")
    stored = [value / scale for value, scale in zip(probe["values"], probe["scale"], strict=True)]
    assert [float(line) for line in found] == pytest.approx(stored[:4], abs=0.02)


def test_again_it_uploads_nothing(hub, publish):
    repo, before = hub.repos["model", "ada/desk"], hub.seen.copy()
    head = repo.branches["main"]
    done = publish("run=dpo", "repo_id=ada/desk", "force=true")
    assert done.returncode == 0 and "nothing is uploaded" in done.stdout, done
    assert f"published {hub.url}/ada/desk/tree/{head}" in done.stdout
    writes = ("create", "preupload", "batch", "upload", "commit", "branch", "tag", "settings")
    assert repo.branches["main"] == head and all(hub.seen[step] == before[step] for step in writes)


def test_the_token_goes_to_the_hub_alone(hub, here):
    assert all(TOKEN not in path for _, _, path in hub.log)
    assert hub.tokens_at_cdn == 0 and hub.seen["download"] > 0
    files = [path.read_bytes() for path in here.rglob("*") if path.is_file()]
    commits = [commit for repo in hub.repos.values() for commit in repo.commits.values()]
    files += [data for commit in commits for data in commit["files"].values()]
    assert files and not any(TOKEN.encode() in data for data in files)


def test_a_reward_model_with_its_score_head(hub, publish, plain):
    from rlhf_recipes.data.sources import CLINIC

    done = publish("run=reward", "repo_id=ada/judge", "public=true", "revision=trial", "commit_message=First")
    assert done.returncode == 0, done
    repo = hub.repos["model", "ada/judge"]
    assert not repo.private and list(repo.files) == [".gitattributes"]  # main is as it was made
    repo.branches["main"] = repo.branches["trial"]
    text, head = card_of(hub, "ada/judge")
    assert head["pipeline_tag"] == "text-classification" and "32 scores" in text
    assert [c["title"] for c in repo.commits.values()][1:] == ["First", "First, proven"]
    found = plain(snippet_of(text) + PROBES.format(pairs=str(CLINIC / "pairs.jsonl")) + SCORES).splitlines()[-4:]
    assert [float(line) for line in found] == pytest.approx(probe_of(hub, "ada/judge")["values"][:4], abs=0.02)


def test_merged_weights(hub, publish, plain):
    from rlhf_recipes.data.sources import CLINIC

    done = publish("run=dpo", "repo_id=ada/desk-merged", "merged=true", "force=true", "max_merge_drift=0.5")
    assert done.returncode == 0, done
    repo = hub.repos["model", "ada/desk-merged"]
    assert "model.safetensors" in repo.files and "adapter_config.json" not in repo.files
    text, head = card_of(hub, "ada/desk-merged")
    assert head["base_model_relation"] == "finetune" and head["library_name"] == "transformers"
    assert "lora" not in head["tags"] and "peft" not in snippet_of(text)
    drift = float(re.search(r"by ([\d.e-]+) nats per reply token on average", text)[1])
    assert 0 < drift < 0.5
    found = plain(snippet_of(text) + PROBES.format(pairs=str(CLINIC / "pairs.jsonl")) + LOGPS).splitlines()[-4:]
    probe = probe_of(hub, "ada/desk-merged")
    stored = [value / scale for value, scale in zip(probe["values"], probe["scale"], strict=True)]
    assert [float(line) for line in found] == pytest.approx(stored[:4], abs=0.02)
    adapter = probe_of(hub, "ada/desk")
    both = zip(probe["values"], adapter["values"], adapter["scale"], strict=True)
    assert sum(abs(a - b) / n for a, b, n in both) / 32 == pytest.approx(drift, rel=0.1)


@pytest.fixture(scope="module")
def pairs(run_recipe, terse, here):
    done = run_recipe("cai", *SMALL, *terse, "gate.fails=contrastive", cwd=here)
    assert done.returncode == 0, done
    return here / "outputs" / "cai" / "main"


def test_a_data_set(hub, publish, plain, pairs):
    done = publish(f"pairs={pairs.relative_to(pairs.parents[2])}", "repo_id=ada/pairs", "license=mit")
    assert done.returncode == 0, done
    repo = hub.repos["dataset", "ada/pairs"]
    assert f"published {hub.url}/datasets/ada/pairs/tree/" in done.stdout
    text, head = card_of(hub, "ada/pairs", "dataset")
    result = json.loads((pairs / "result.json").read_text())
    assert head["license"] == "mit" and "Proven by a round trip" in text
    assert result["constitution"]["sha256"] in text and b"principles:" in repo.files["constitution.yaml"]
    shown = "print([pairs[name].num_rows for name in pairs], pairs['train'][0]['chosen'])"
    rows = plain(snippet_of(text) + shown)
    written = result["funnel"]["written"]
    assert str([written["train_prefs"], written["test_prefs"]]) in rows and "'role': 'assistant'" in rows

    hub.fault = lambda step, number, path: "corrupt" if step == "download" else None
    done = publish(f"pairs={pairs}", "repo_id=ada/spoiled", "license=mit")
    hub.fault = lambda step, number, path: None
    assert done.returncode == 2 and "came back with SHA-256" in done.stderr and "published" not in done.stdout, done
    text, head = card_of(hub, "ada/spoiled", "dataset")
    assert "broken" in head["tags"] and "> **Broken.**" in text

    (pairs / "result.json").write_text(json.dumps(result | {"generator": f"{pairs}/model"}))
    done = publish(f"pairs={pairs}", "repo_id=ada/pairs", "license=mit")
    assert done.returncode == 0 and b"/tmp" not in b"".join(repo.files.values()), done


def test_publish_true_on_a_recipe(hub, publish, tiny_overrides):
    """The same command again, after an upload that failed, does not train again."""
    options = [*tiny_overrides, *LEARNS, "quantization=none", "run_name=direct", "publish=true", "repo_id=ada/direct"]
    hub.fault = lambda step, number, path: 403 if step == "commit" and "ada/direct" in path else None
    done = publish(*options, recipe="sft")
    hub.fault = lambda step, number, path: None
    assert done.returncode == 2 and "sft finished in" in done.stdout and "published" not in done.stdout, done
    done = publish(*options, recipe="sft")
    assert done.returncode == 0 and "sft finished in" not in done.stdout, done
    assert "outputs/sft/direct: finished before, kept." in done.stdout
    assert f"published {hub.url}/ada/direct/tree/" in done.stdout
    assert b"Proven by a round trip" in hub.repos["model", "ada/direct"].files["README.md"]


def test_ctrl_c(hub, here, start_recipe, tmp_path):
    """While it is downloaded: one line that says what is there."""
    hub.fault = lambda step, number, path: "hang" if step == "resolve" and "ada/stopped" in path else None
    process = start_recipe("publish", "run=sft", "repo_id=ada/stopped", "force=true", cwd=here,
                           env=hub.environment(tmp_path / "home"))  # fmt: skip
    end = time.monotonic() + LIMIT
    while not any(step == "resolve" and "ada/stopped" in path for step, _, path in hub.log):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    hub.go_on.set()
    _, stderr = process.communicate(timeout=LIMIT)
    hub.fault = lambda step, number, path: None
    lines = [line for line in stderr.splitlines() if " · " not in line]
    assert process.returncode == 130 and len(lines) == 1, stderr
    assert lines[0].startswith("Interrupted. Revision ") and "its card says 'not proven'" in lines[0]
    assert b"**Not proven.**" in hub.repos["model", "ada/stopped"].files["README.md"]


def test_publish_true_is_refused_before_the_training(hub, publish, here, tiny_overrides):
    for options, says in [
        (["publish=true"], "publish=true: goes with repo_id=<user/name>."),
        (["repo_id=ada/x"], "publish=false: goes with repo_id=<user/name>."),
        (["publish=true", "repo_id=bob/x"], "repo_id=bob/x: your token is ada's, who may not make repos of bob."),
    ]:
        done = publish(*tiny_overrides, *options, "run_name=refused", recipe="sft")
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done
        assert not (here / "outputs" / "sft" / "refused").exists()


def test_a_dry_run(here, run_recipe):
    """Without a Hub: the same files in a folder, loaded from there."""
    done = run_recipe("publish", "run=sft", "folder=dry", "license=mit", "force=true", cwd=here)
    assert done.returncode == 0, done
    again = "run=sft license=mit force=true repo_id=<user>/<name>"
    assert f"next      python -m rlhf_recipes.recipes.publish {again}" in done.stdout
    assert "32 log-probabilities are within" in done.stdout
    assert "**Not proven.**" in (here / "dry" / "README.md").read_text()
    result = json.loads((here / "outputs" / "publish" / "main" / "result.json").read_text())
    assert result["files"].keys() == {path.name for path in (here / "dry").iterdir()}
