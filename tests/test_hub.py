"""What is refused before an upload, and what a Hub that fails leaves behind: never "published"."""

import json
import shutil
from pathlib import Path

import hub_server
import pytest
import torch
from conftest import TINY_ID, snapshot
from hub_server import TOKEN
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from rlhf_recipes import places, run_folder
from rlhf_recipes.overrides import quoted
from rlhf_recipes.stats import Estimate

BASE = {"README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n"}


@pytest.fixture(scope="module")
def trained(trained_once, tmp_path_factory):
    """A finished run of dpo that got better, with its 32 numbers."""
    from rlhf_recipes.publish import contents
    from rlhf_recipes.publish import publish as publishing

    made = trained_once("dpo", "quantization=none", "trainer.learning_rate=0.01", "trainer.warmup_steps=0")
    folder = shutil.copytree(made.dir, tmp_path_factory.mktemp("trained") / "dpo")
    change(folder / "result.json", lambda result: result["main"]["after"].update(value=0.75))
    publishing._probe(contents.find(str(folder), None))
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it, in the current folder."""
    shutil.copytree(trained, tmp_path / "dpo")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "dpo"


@pytest.fixture
def server(tiny_model, tmp_path, monkeypatch):
    """A Hub that this process's client speaks to, with the base model."""
    with hub_server.spoken_to(monkeypatch, tmp_path) as started:
        started.put(TINY_ID, tiny_model, **BASE)
        yield started


@pytest.fixture
def publish(compose, monkeypatch):
    """publish(*overrides): what `hub.publish` returns. It loads in this process, tests/test_publish.py in others."""
    from rlhf_recipes.launch import keys
    from rlhf_recipes.publish import publish as publishing

    monkeypatch.setattr(publishing.round_trip, "in_fresh_process", measured_once)

    def published(*overrides):
        cfg = compose("publish", *overrides)
        keys.check(cfg, "publish")
        return publishing.publish(cfg)

    return published


@pytest.fixture
def refused(publish):
    """refused(*overrides): the one line; what is refused has written nothing."""
    from rlhf_recipes.launch.refusals import as_refusal

    def line(*overrides):
        with pytest.raises(ValueError) as caught:
            publish(*overrides)
        said = as_refusal(caught.value, "publish")
        assert said and "\n" not in said and TOKEN not in said and said[-1] in ".?", said
        return said

    return line


MEASURED = {}


def measured_once(task):
    """What `measure` finds; of the same files it is known from before. The card is none of those that it reads."""
    from rlhf_recipes.publish import round_trip

    files = {name: content for name, content in snapshot(Path(task["folder"])).items() if name != "README.md"}
    key = json.dumps([{**task, "folder": None}, files], sort_keys=True)
    if key not in MEASURED:
        MEASURED[key] = json.dumps(round_trip.measure(task))
    return json.loads(MEASURED[key])


def change(path, how):
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def reweigh(run, how):
    """Change the tensors, and let the result say that these are the ones that were trained."""
    from rlhf_recipes.references import adapter_sha256

    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)
    change(run / "result.json", lambda result: result.update(adapter_sha256=adapter_sha256(run / "adapter")))


# ---- options and runs


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run=dpo"], "repo_id: give repo_id=<user/name>, or folder=<path> for a dry run that uploads nothing."),
        (["run=dpo", "repo_id=ada/x", "folder=x"], "repo_id: give repo_id=<user/name>, or folder=<path>"),
        (["run=dpo", "repo_id=desk"], "repo_id=desk: must be <user>/<name>. Add the name of its owner."),
        (["run=dpo", "repo_id=a/b/c"], "repo_id=a/b/c: Repo id must be in the form"),
        (["run=dpo", "repo_id=ada/--x"], "repo_id=ada/--x: "),
        (["run=dpo", "repo_id=ada/a b"], "repo_id=ada/a b: "),
        (["run=dpo", "repo_id=1"], "repo_id=1: must be text or null."),
        (["run=dpo", "folder=x", "public=true"], "public=True: folder=x uploads nothing. Leave one of them out."),
        (["run=dpo", "folder=x", "tag=v1"], "tag=v1: folder=x uploads nothing."),
        (["run=dpo", "repo_id=ada/x", "create_pr=true", "tag=v1"], "tag=v1: not for a pull request"),
        (["run=dpo", "repo_id=ada/x", "create_pr=true", "public=true"], "public=True: not for a pull request"),
        (["run=dpo", "repo_id=ada/x", "commit_message=''"], "commit_message=: empty."),
        (["run=dpo", "repo_id=ada/x", "max_merge_drift=0"], "max_merge_drift=0: must be above 0."),
        (["run=dpo", "repo_id=ada/x", "max_file_gib=many"], "max_file_gib=many: must be a number."),
        (["run=dpo", "repo_id=ada/x", "force=perhaps"], "force=perhaps: must be true or false."),
        (["pairs=dpo", "repo_id=ada/x", "merged=true"], "merged=True: is for a model; pairs=dpo is a data set."),
        (
            ["repo_id=ada/x"],
            "run: give a run of a training (run=<folder>), or one of recipes/cai.py (pairs=<folder>).",
        ),
        (["run=dpo", "pairs=dpo", "repo_id=ada/x"], "run: give a run of a training"),
        (["run=dop", "repo_id=ada/x"], "run=dop: no such folder; did you mean 'dpo'?"),
        (["run=.", "repo_id=ada/x"], "run=.: no result.json in it, so no finished run."),
        (["pairs=dpo", "repo_id=ada/x"], "pairs=dpo: is a run of dpo, not of recipes/cai.py. Use run=dpo."),
        (["run=dpo", "repo_id=ada/x", "evaluation=dpo"], "evaluation=dpo: no finished run of recipes/evaluate.py."),
        (["run=dpo", "+repo=ada/x"], "repo: recipes/publish.py has no such key; did you mean 'repo_id'?"),
        (["run=dpo", f"repo_id={TOKEN}"], "repo_id: holds what looks like a token or a key"),
    ],
)
def test_options(run, refused, overrides, says):
    before = snapshot(run)
    assert refused(*overrides).startswith(says)
    assert snapshot(run) == before


def forget(*path):
    return lambda run: run.joinpath(*path).unlink()


def told(**entries):
    return lambda run: change(run / "result.json", lambda result: result.update(entries))


def zero(tensors):
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def poison(tensors):
    next(iter(tensors.values()))[0, 0] = torch.nan


def evaluated(verdict, path="dpo", **other):
    def write(run):
        weights = {"adapter_sha256": json.loads((run / "result.json").read_text())["adapter_sha256"]} | other
        (run.parent / "evaluate").mkdir()
        reasons = ["Its answers beat those of base on 20.0 % [5.0, 35.0] of 20 prompts; 50 % is a draw."]
        entry = {"info": {"path": path} | weights, "metrics": {}}
        entry |= {"verdict": {"verdict": verdict, "reasons": reasons}}
        found = {"recipe": "evaluate", "evaluation": {"parent": "base", "systems": {"base": {}, "dpo": entry}}}
        (run.parent / "evaluate" / "result.json").write_text(json.dumps(found))

    return write


def pickled(run):
    (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / "adapter_model.bin")


def is_parents(run):
    digest = json.loads((run / "result.json").read_text())["adapter_sha256"]
    told(parent={"run": "sft", "recipe": "sft", "adapter_sha256": digest, "parent": None})(run)


def worse(run):
    change(run / "result.json", lambda result: result["main"]["after"].update(value=0.25))


def infinite(run):
    path = run / "result.json"
    path.write_text(path.read_text().replace('"seconds"', '"loss": Infinity, "seconds"', 1))


def add_line(name, line):
    def add(run):
        with (run / name).open("a") as file:
            file.write(line + "\n")

    return add


def configured(key, value):
    def set_key(run):
        cfg = OmegaConf.load(run / "config.yaml")
        OmegaConf.update(cfg, key, value)
        OmegaConf.save(cfg, run / "config.yaml")

    return set_key


@pytest.mark.parametrize(
    ("spoil", "overrides", "says"),
    [
        (forget("config.yaml"), [], "run=dpo: no config.yaml in it, so no finished run."),
        (lambda run: (run / "result.json").write_text("{"), [], "run=dpo: result.json cannot be read ("),
        (lambda run: (run / "result.json").write_text("[]"), [], "run=dpo: result.json is no mapping."),
        (lambda run: (run / "config.yaml").write_text("a: [b"), [], "run=dpo: config.yaml cannot be read ("),
        (told(recipe="evaluate"), [], "run=dpo: is a run of evaluate, which makes no adapter. Name one of sft,"),
        (told(recipe="cai"), [], "run=dpo: is a data set. Use pairs=dpo."),
        (told(status="running"), [], "run=dpo: its status is running. Let it finish first."),
        (told(main=None), [], "run=dpo: result.json has no main as a training writes it."),
        (told(main={"before": {}}), [], "run=dpo: result.json has no main.before as a training writes it."),
        (told(metrics={"x\n": {}}), [], "run=dpo: result.json has no before.x"),
        (infinite, [], "run=dpo: loss in result.json is inf: the training has diverged."),
        (forget("adapter", "adapter_model.safetensors"), [], "run=dpo: no adapter/adapter_model.safetensors in it."),
        (pickled, [], "run=dpo: no adapter/adapter_model.safetensors in it. adapter_model.bin is a pickle, which"),
        (forget("adapter", "adapter_config.json"), [], "run=dpo: no adapter/adapter_config.json in it."),
        (add_line("adapter/adapter_config.json", "}"), [], "run=dpo: adapter/adapter_config.json is not valid JSON."),
        (configured("model.id", "org/other"), [], f"run=dpo: the adapter is for the base {TINY_ID}, and config.yaml"),
        (add_line("adapter/adapter_model.safetensors", "x"), [], "run=dpo: adapter/adapter_model.safetensors is not"),
        (is_parents, [], "run=dpo: the adapter is its parent's, unchanged."),
        (lambda run: reweigh(run, zero), [], "run=dpo: the adapter changes nothing (every lora_B is zero)."),
        (lambda run: reweigh(run, poison), [], "run=dpo: base_model.model.model.layers."),
        (told(recipe="reward"), [], "run=dpo: the score head is missing, and without it rewards are random."),
        (worse, [], "run=dpo: preference_accuracy is worse than before the training, 0.500 -> 0.250"),
        (told(doctor={"verdict": "broken", "findings": []}), [], "run=dpo: the doctor's verdict is broken."),
        (evaluated("worse"), ["evaluation=evaluate"], "evaluation=evaluate: its verdict on dpo is worse: Its answers"),
        (evaluated("ship", "else"), ["evaluation=evaluate"], "evaluation=evaluate: speaks of dpo, not of run=dpo."),
        (evaluated("ship", adapter_sha256="0" * 64), ["evaluation=evaluate"],
         "evaluation=evaluate: speaks of other weights of dpo (SHA-256 000000000000, not "),
        (evaluated("ship", adapter_sha256=None), ["evaluation=evaluate", "force=true"],
         "evaluation=evaluate: speaks of weights that it does not name. Evaluate run=dpo again."),
        (told(note="see /home/grace/notes"), [], "result.json:"),
        (told(note=["see /Users/grace/x"]), [], "result.json:"),
        (told(note="is in C:\\Users\\grace\\x"), [], "result.json:"),
        (add_line("metrics.jsonl", '{"note": "' + TOKEN + '"}'), ["force=true"], "metrics.jsonl:"),
        (add_line("metrics.jsonl", "-----BEGIN RSA PRIVATE KEY-----"), ["force=true"], "metrics.jsonl:"),
        (add_line("adapter/chat_template.jinja", "AIza" + "x" * 35), ["force=true"], "chat_template.jinja:"),
        (lambda run: None, ["max_file_gib=1e-5"], "adapter_model.safetensors: 0.0"),
    ],
)  # fmt: skip
def test_runs(server, run, refused, spoil, overrides, says):
    spoil(run)
    line = refused("run=dpo", "repo_id=ada/x", *overrides)
    assert line.startswith(says), line
    kinds = {"result.json:": "a path of this or another machine", "jsonl:": "what looks like a token or a key"}
    assert all(kind in line for name, kind in kinds.items() if says.endswith(name))
    assert "grace" not in line and ("model", "ada/x") not in server.repos
    assert not any(method in ("POST", "PUT", "DELETE") for _, method, _ in server.log)


def test_a_place_for_a_dry_run(run, refused):
    """It takes nobody's files, not even those of the run itself."""
    (run.parent / "x").write_text("mine")
    assert refused("run=dpo", "license=mit", "folder=x") == "folder=x: is a file. Name a folder."
    before = snapshot(run)
    for folder in ("dpo", "dpo/adapter", "dpo/adapter/new"):
        said = refused("run=dpo", "license=mit", f"folder={folder}")
        assert said == f"folder={folder}: is, holds or lies in dpo. Name another, which may be new."
    assert snapshot(run) == before


def test_a_dry_run_again(run, publish):
    """It takes the place of the earlier one, of another kind too."""
    publish("run=dpo", "license=mit", "folder=x")
    done = publish("run=dpo", "license=mit", "folder=x", "merged=true", "max_merge_drift=1")
    assert done["files"].keys() == {path.name for path in (run.parent / "x").iterdir()}
    assert "model.safetensors" in done["files"] and "adapter_config.json" not in done["files"]
    assert done["revision"] is None and not done["uploaded"]


def test_what_a_dry_run_says_is_next(compose, capsys):
    """The command that uploads what lies in the folder."""
    from rlhf_recipes.publish import publish as publishing

    asked = ["evaluation=of it/x=1", "merged=true", "max_merge_drift=1", "license=mit"]
    cfg = compose("publish", "run=dpo", "folder=x", *map(quoted, asked))
    publishing.print_outcome(cfg, {"proof": None, "revision": None, "where": "x"})
    typed = "run=dpo license=mit 'evaluation=\"of it/x=1\"' merged=true max_merge_drift=1 repo_id=<user>/<name>\n"
    assert capsys.readouterr().out.endswith(f" {typed}")


def test_what_is_worse_is_published_with_force(server, run, publish):
    worse(run)
    evaluated("worse")(run)
    add_line("metrics.jsonl", "see /home/grace/x")(run)
    publish("run=dpo", "repo_id=ada/x", "force=true", "evaluation=evaluate")
    card = server.repos["model", "ada/x"].files["README.md"].decode()
    assert "Against base: **worse**. Its answers beat those of base on 20.0 %" in card


# ---- who may write where


@pytest.mark.parametrize(
    ("arrange", "overrides", "says"),
    [
        (lambda s, m: m.delenv("HF_TOKEN"), [], "repo_id=ada/x: no token. `hf auth login`, or the environment"),
        (lambda s, m: m.setenv("HF_TOKEN", "hf_" + "wrong"), [], "repo_id=ada/x: the Hub does not accept the token"),
        (lambda s, m: s.tokens[TOKEN].update(role="read"), [], "repo_id=ada/x: the token may only read."),
        (lambda s, m: None, ["repo_id=bob/x"], "repo_id=bob/x: your token is ada's, who may not make repos of bob."),
        (lambda s, m: None, ["repo_id=adda/x"], "repo_id=adda/x: your token is ada's, who may not make repos of adda"),
        (lambda s, m: s.put("bob/x", None), ["repo_id=bob/x"], "repo_id=bob/x: the token may not do that (403)."),
        (lambda s, m: s.put("bob/x", None, private=True), ["repo_id=bob/x"], "repo_id=bob/x: your token is ada's"),
        (lambda s, m: s.put("ada/x", None, "dataset"), [], "repo_id=ada/x: is the name of a data set already."),
        (lambda s, m: s.put("ada/x", None, "space"), [], "repo_id=ada/x: is the name of a space already."),
        (lambda s, m: s.put("ada/x", None), [], "repo_id=ada/x: is public already. Add public=true"),
        (lambda s, m: s.put("ada/x", None, private=True, **{"thesis.txt": b"mine"}), [],
         "repo_id=ada/x: holds 1 files that were not published from here (thesis.txt)."),
        (lambda s, m: s.put("ada/x", None, private=True).tags.update(v1="0"), ["tag=v1"], "tag=v1: ada/x has a tag"),
        (lambda s, m: s.repos.clear(), [], f"model.id={TINY_ID}: the base is not on the Hub, or your token may"),
        (lambda s, m: s.put(TINY_ID, None), [], f"license: {TINY_ID} states none, and what is built on it needs one."),
        (lambda s, m: s.put(TINY_ID, None, **{"README.md": b"---\nlicense: llama3.1\n---\n"}), ["license=mit"],
         f"license=mit: {TINY_ID} is under llama3.1, whose terms hold for what is built on it."),
        (lambda s, m: m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True), [],
         "repo_id=ada/x: the Hub may not be asked (HF_HUB_OFFLINE=1). Unset it. Nothing was uploaded."),
    ],
)  # fmt: skip
def test_who_may_write_where(server, run, refused, monkeypatch, arrange, overrides, says):
    arrange(server, monkeypatch)
    before = {key: repo.branches.copy() for key, repo in server.repos.items()}
    line = refused("run=dpo", *(overrides if "repo_id" in "".join(overrides) else ["repo_id=ada/x", *overrides]))
    assert line.startswith(says), line
    assert {key: repo.branches for key, repo in server.repos.items()} == before


def test_a_revision_that_the_base_does_not_have(server, run, refused):
    configured("model.revision", "v9")(run)
    line = refused("run=dpo", "repo_id=ada/x")
    assert line == f"model.revision=v9: {TINY_ID} has no such revision on the Hub."


def test_another_base_than_the_hub_has(server, run, refused, tiny_model, tmp_path):
    """The numbers with the Hub's weights are measured: too far is refused."""
    shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: tensor * 3 for name, tensor in tensors.items()}, tmp_path / "other" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    server.put(TINY_ID, tmp_path / "other", **BASE)
    line = refused("run=dpo", "repo_id=ada/x")
    assert line.startswith(
        f"run=dpo: was trained on other weights than {TINY_ID} has on the Hub; with those its numbers"
    )
    assert "max_base_drift=0.1" in line and ("model", "ada/x") not in server.repos


# ---- the numbers


def numbers(values, **entries):
    return {"values": values, "scale": [10] * len(values), "effect": 1.0, "dtype": "bfloat16", **entries}


def test_how_far_numbers_may_differ():
    from rlhf_recipes.publish import round_trip

    expected = numbers([-10.0, -20.0])
    assert round_trip.compare(expected, numbers([-10.0, -20.0]))["passed"]
    near = round_trip.compare(expected, numbers([-10.1, -20.0]))
    assert near["largest"] == pytest.approx(0.01) and near["allowed"] == 0.02 and near["passed"]
    assert not round_trip.compare(expected, numbers([-10.3, -20.0]))["passed"]
    assert not round_trip.compare(expected, numbers([-10.0, float("nan")]))["passed"]
    assert not round_trip.compare(numbers([-10.0, -20.0], dtype="float32"), numbers([-10.1, -20.0]))["passed"]
    assert not round_trip.compare(numbers([-10.0, -20.0], effect=0.05), numbers([-10.1, -20.0]))["passed"]
    with pytest.raises(ValueError):
        round_trip.compare(expected, numbers([-10.0]))
    assert round_trip.drift(expected, numbers([-11.0, -20.0])) == pytest.approx(0.05)


def test_the_fresh_process_gets_no_token(run, server, monkeypatch):
    """Nor has it one among its arguments, which everybody on the machine can list."""
    from rlhf_recipes.publish import round_trip

    seen = []

    def note(command, env, **_):
        seen.append((command, env))
        raise ValueError("seen")

    monkeypatch.setattr(round_trip.subprocess, "run", note)
    with pytest.raises(ValueError, match="seen"):
        round_trip.in_fresh_process({"folder": str(run)})
    ((command, env),) = seen
    assert TOKEN not in " ".join(command) and TOKEN not in env.values() and env["HF_HUB_OFFLINE"] == "1"


def test_merged_weights_that_are_too_far(server, run, refused):
    line = refused("run=dpo", "repo_id=ada/x", "merged=true", "max_merge_drift=1e-9")
    assert line.startswith("merged=true: merged weights differ from the adapter on its base by 0.0"), line
    assert ("model", "ada/x") not in server.repos


def test_a_pull_request(server, run, publish):
    publish("run=dpo", "repo_id=ada/asked", "merged=true", "max_merge_drift=1")
    repo = server.repos["model", "ada/asked"]
    head = repo.branches["main"]
    done = publish("run=dpo", "repo_id=ada/asked", "create_pr=true")
    assert done["where"] == f"{server.url}/ada/asked/tree/refs/pr/1"
    assert repo.branches["main"] == head and list(repo.pulls) == ["refs/pr/1"]
    proposed = repo.at("refs/pr/1")["files"]
    assert b"Proven by a round trip" in proposed["README.md"] and "adapter_model.safetensors" in proposed
    assert "model.safetensors" not in proposed
    again = publish("run=dpo", "repo_id=ada/asked", "create_pr=true")
    assert again["where"] == done["where"] and not again["uploaded"] and list(repo.pulls) == ["refs/pr/1"]


def test_merged_takes_the_place_of_the_adapter(server, run, publish):
    publish("run=dpo", "repo_id=ada/x", "tag=v1")
    repo = server.repos["model", "ada/x"]
    repo.add("main", "by hand", {**repo.files, "picture.png": b"mine"})
    publish("run=dpo", "repo_id=ada/x", "merged=true", "max_merge_drift=1")
    assert "adapter_model.safetensors" not in repo.files and "adapter_config.json" not in repo.files
    assert {"model.safetensors", "picture.png"} <= repo.files.keys()
    assert "adapter_model.safetensors" in repo.at("v1")["files"]


def test_the_constitution_of_its_pairs(server, run, publish):
    made = run.parent / "pairs"
    made.mkdir()
    constitution = {"name": "mine | <b>", "version": "2", "principles": 3, "sha256": "c" * 64}
    (made / "result.json").write_text(
        json.dumps({"recipe": "cai", "status": "finished", "constitution": constitution, "labelled_by": "judge"})
    )
    (made / "config.yaml").write_text("run_name: pairs\nconstitution:\n  name: mine\n")
    (made / "train_prefs.jsonl").write_text("{}")
    configured("data.path", "pairs")(run)
    read = {"data.path=pairs": places.sha256("pairs")}
    config = OmegaConf.to_yaml(OmegaConf.create(run_folder.read_config(run)))
    run_folder.mark(run, "dpo", f"{run_folder.INPUTS}: {json.dumps(read)}\n{config}")
    publish("run=dpo", "repo_id=ada/x")
    files = server.repos["model", "ada/x"].files
    assert files["constitution.yaml"] == b"name: mine\n"
    card = files["README.md"].decode()
    assert f"constitution *mine \\| &lt;b&gt;* (version 2, `constitution.yaml`, SHA-256 `{'c' * 64}`)" in card
    (made / "train_prefs.jsonl").write_text("{ }")  # made again, under another
    publish("run=dpo", "repo_id=ada/x")
    card = server.repos["model", "ada/x"].files["README.md"].decode()
    assert "under the constitution" not in card and "others lie in their folder since: the constitution" in card
    assert "constitution.yaml" not in server.repos["model", "ada/x"].files


def test_what_cannot_be_loaded(run, tmp_path, monkeypatch, warm_python):
    from rlhf_recipes.publish import publish as publishing

    monkeypatch.setattr("sys.executable", warm_python)
    shutil.copytree(run / "adapter", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    with pytest.raises(ValueError, match=r"^a fresh process cannot load it \(.+\)$"):
        publishing.round_trip.in_fresh_process(publishing.round_trip.task(tmp_path / "broken", config, reward=False))


# ---- the card


def test_text_cannot_break_the_card(run):
    import yaml
    from huggingface_hub import ModelCard

    from rlhf_recipes.publish import card, contents
    from rlhf_recipes.publish import publish as publishing

    nasty = "a|b `c` <b>d</b>\n---\n# Title\n```python\n| e |"
    source = contents.find("dpo", None)
    terms = {"license": "other", "license_name": "x: y", "license_link": "https://example.org/#a"}
    base = {"id": TINY_ID, "revision": None, "same": True, "origin": None, **terms}
    facts = card.Facts("ada/x", base, dtype="bfloat16", fingerprint="f" * 64)
    plain = card.write(source, facts, None)
    reasons = {"verdict": "hold", "reasons": [nasty]}
    rate = {"win_rate": Estimate(0.6, 0.4, 0.8, 20, 20)}
    facts.evaluation = {"name": "dpo", "parent": nasty, "verdict": reasons, "metrics": rate}
    facts.base["origin"] = nasty
    source.config["data"]["path"] = source.config["trainer"]["run_name"] = source.result["device"] = nasty
    text = card.write(source, facts, nasty)
    head = ModelCard(text).data.to_dict()
    assert head["license_name"] == "x: y" and "broken" in head["tags"]
    assert "| Win rate against the parent | 60.0 % [40.0, 80.0] | 20 |" in text
    assert text.count("```") == plain.count("```")
    body = text[text.index("\n# LoRA") :]
    assert all("`" in line.partition("<b>")[0] for line in body.splitlines() if "<b>" in line), body  # as code
    lines = [line for line in text.splitlines() if line.startswith("#")]
    assert [line for line in lines if line not in plain.splitlines()] == ["## Evaluation"]
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == TINY_ID
    assert publishing.card.is_proven(card.write(source, facts, {"n": 2, "files": 3}), "f" * 64)
    assert not publishing.card.is_proven(text, "f" * 64)


def test_every_setting_that_is_no_default(run):
    from rlhf_recipes.publish import card, contents

    source = contents.find("dpo", None)
    source.config["trainer"]["save_strategy"] = "steps"  # as in conf/
    table = card._settings(source.config)
    assert "| `trainer.learning_rate` | `0.01` |" in table and "| `trainer.max_steps` | `2` |" in table
    for default in ("trainer.beta", "lora.lora_dropout", "data.reduce", "data.columns", "trainer.save_strategy"):
        assert default not in table
    assert "| `data.train_size` | `8` |" in table


@pytest.mark.parametrize(
    ("path", "there"),
    [("Anthropic/hh-rlhf", True), ("org/name-v1.1", True), ("mine/prefs.jsonl", False), ("a/b.csv.gz", False),
     ("clinic", False), ("dpo/adapter", False)],
)  # fmt: skip
def test_data_that_the_metadata_names(run, path, there):
    from rlhf_recipes.publish import card, contents

    configured("data.path", path)(run)
    base = {"id": TINY_ID, "revision": None, "same": True, "origin": None, "license": "mit", "license_name": None,
            "license_link": None}  # fmt: skip
    text = card.write(contents.find("dpo", None), card.Facts("ada/x", base, dtype="bfloat16"), None)
    assert (f"datasets:\n- {path}\n" in text) == there
