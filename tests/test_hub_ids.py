"""What is taken for an id of the Hub, and that whoever reads from there is told."""

import json
import os

import pytest
from conftest import write_adapter, write_pairs

from rlhf_recipes import models, places, references
from rlhf_recipes.data import load, readers
from rlhf_recipes.evaluation import measure
from rlhf_recipes.launch.refusals import as_refusal


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: `outputs/pears`, `data` with a file, the file `notes`, a model, a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "pears").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data" / "pairs.jsonl")
    (tmp_path / "notes").write_text("notes\n")
    places.say_from_hub.cache_clear()
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """Nothing reaches the Hub; what was asked for there."""
    import datasets
    import huggingface_hub
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    asked = []

    def ask(first, *args, **kwargs):
        asked.append(first)
        raise OSError("no Hub in tests")

    for owner, name in [
        (AutoTokenizer, "from_pretrained"),
        (AutoConfig, "from_pretrained"),
        (AutoModelForSequenceClassification, "from_pretrained"),
        (datasets, "load_dataset"),
    ]:
        monkeypatch.setattr(owner, name, ask)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda self, repo, **_: asked.append(repo))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return asked


def refusal(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and as_refusal(caught.value, None)
    return str(caught.value)


def load_pairs(compose, path):
    return load.load_pairs(compose("dpo", "data=local", f"data.path='{path}'").data)


def load_model(compose, name):
    return models.load_tokenizer(compose("dpo", "model=smollm2_135m_hub", f"model.id='{name}'").model)


def find_reward(compose, name):
    return references.find_rewards([name])


def load_classifier(compose, name):
    from types import SimpleNamespace

    from rlhf_recipes.ppo import rewards

    return rewards._load_classifier(name, SimpleNamespace(model_init_kwargs=None, device="cpu"))


READERS = {
    "data.path": load_pairs,
    "model.id": load_model,
    "reward_funcs": find_reward,
    "reward_funcs ": load_classifier,
}


@pytest.mark.parametrize("key", READERS)
@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("outputs/pairs", "outputs is a folder here, and there is no outputs/pairs; did you mean 'pears'? Mend"),
        ("data/train", "data is a folder here, and there is no data/train. Mend the path"),
        ("notes/train", "notes is a file here, and there is no notes/train. Mend the path"),
    ],
)
def test_a_path_that_is_not_there_is_no_id(here, hub, compose, key, reference, says):
    assert refusal(READERS[key], compose, reference).startswith(f"{key.strip()}={reference}: {says}")
    assert hub == []


@pytest.mark.parametrize("key", READERS)
@pytest.mark.parametrize(
    "reference", ["./x/y", "./outputs/pairs", "~/x", "a/b/", "a/b/c", "../x/y", "/x/y", "a//b", "a b"]
)
def test_what_looks_like_a_path_is_no_id(here, hub, compose, key, reference):
    assert reference in refusal(READERS[key], compose, reference)
    assert hub == []


@pytest.mark.parametrize("key", READERS)
def test_an_id_is_asked_for_and_told_once(here, hub, compose, key, capsys):
    for _ in range(2):
        if key == "reward_funcs":
            (found,) = READERS[key](compose, "org/name")  # looked for when it is loaded
            assert (found.kind, found.reference) == (references.HUB, "org/name")
        else:
            refusal(READERS[key], compose, "org/name")
    out = capsys.readouterr().out
    if key != "reward_funcs":
        assert hub[0] == "org/name"
        what = {"data.path": "data", "model.id": "model"}.get(key, "reward model")
        assert out.count(f"{what}: org/name, from the Hub\n") == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("org/adapter does not appear to have a file named config.json. Checkout 'https://huggingface.co/org/adapter' "
         "for available files.",
         "the repository has no config.json, so no model that transformers reads (an adapter, or GGUF?). Name"),
        ("v2 is not a valid git identifier (branch name, tag name or commit id) that exists for this model name.",
         "the Hub's model has no such revision. Check model.revision."),
        ("Connection refused", "the Hub cannot be reached and the cache does not hold it."),
    ],
)  # fmt: skip
def test_what_the_hub_lacks_is_no_broken_network(error, says):
    from rlhf_recipes import model_files

    assert model_files._hub_refusal(OSError(error)).startswith(says)


def test_what_is_to_be_fetched_are_the_shards_that_are_read(compose, monkeypatch, tmp_path):
    """Not a copy in one file, and not nothing where the cache has the index alone."""
    from types import SimpleNamespace

    import huggingface_hub

    from rlhf_recipes import model_files

    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in zip(shards, (5, 7), strict=True)]
    files.append(SimpleNamespace(rfilename="consolidated.safetensors", size=12))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files), raising=True
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    cached = {index.name: str(index), shards[0]: "here"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _, name, **__: cached.get(name))
    model = compose("dpo", "model=smollm2_135m_hub", "model.id=org/big").model
    assert model_files.download_bytes(model) == 12
    cached[shards[1]] = "here"
    assert model_files.download_bytes(model) == 0


def test_a_broken_link_is_here(here):
    (here / "data" / "gone").symlink_to(here / "nowhere")
    assert not readers.is_hub_id("data/gone")


def test_names_here_are_shown_as_text(here):
    (here / "data" / "tra\x1b[2Jin").mkdir()
    said = refusal(places.on_hub, "data/train", "data.path")
    assert "did you mean" in said and "\x1b" not in said


def test_a_run_is_never_looked_for_on_the_hub(here, hub, compose):
    """`runs`, `parent`, `reward_model`, `model.adapter`, `judge.adapter`, `sweep.reward_model`: folders alone."""
    write_adapter(here / "outputs" / "dpo", recipe="dpo")
    for call, key in [
        (lambda: measure.find(["org/name"], "base", "tests/tiny"), "runs"),
        (lambda: measure.find(["outputs/dpo"], "org/name", "tests/tiny"), "parent"),
        (lambda: measure.find_scorer("org/name", "tests/tiny"), "reward_model"),
        (lambda: references.find("org/name", "model.adapter", "tests/tiny"), "model.adapter"),
        (lambda: references.find("org/name", "judge.adapter"), "judge.adapter"),
    ]:
        assert refusal(call).startswith(f"{key}=org/name: does not exist.")
    assert hub == []


def test_what_lies_here_is_not_from_the_hub(here, compose, capsys, tiny_model):
    splits = load_pairs(compose, "data/pairs.jsonl")
    assert splits.source == "pairs.jsonl"
    os.symlink(tiny_model, here / "tiny")
    models.load_tokenizer(compose("dpo", "model.path=tiny", "model.id=outputs/tiny").model)  # a name, not looked for
    models.load_tokenizer(compose("dpo", "model=smollm2_135m_hub", "model.id=tiny").model)
    assert "from the Hub" not in capsys.readouterr().out


def test_the_base_that_an_adapter_names_is_told(here, hub, capsys, compose):
    """An adapter from elsewhere decides which base is loaded beside the policy: it is said, or refused as a path."""
    from types import SimpleNamespace

    from rlhf_recipes.ppo import rewards

    roles = SimpleNamespace(shared=True, causal=SimpleNamespace(public_id="a/policy", name_or_path="a/policy"))
    args = SimpleNamespace(model_init_kwargs=None, device="cpu")
    for base, says in [("org/base", "neither a run"), ("outputs/base", "outputs is a folder here")]:
        folder = write_adapter(here / f"rm-{base[:2]}", base=base)
        assert says in refusal(rewards.load, str(folder), roles, None, None, args)
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert hub == ["org/base"] and "reward model: org/base, from the Hub" in capsys.readouterr().out


def test_no_code_of_a_data_set_runs():
    """Scripts are gone from `datasets`; were they back, nothing here would ask for them."""
    import inspect

    import datasets

    assert "trust_remote_code" not in inspect.signature(datasets.load_dataset).parameters
