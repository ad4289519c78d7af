"""The model card of a run: it parses, it tells the truth, and its code runs."""

import re

import pytest
import torch
import yaml
from conftest import TINY_ID
from huggingface_hub import ModelCard


@pytest.fixture(scope="module", params=("dpo", "reward"))
def trained(request, trained_once):
    return trained_once(request.param, "quantization=none", "trainer.learning_rate=0.01", "trainer.warmup_steps=0")


def rows(text, heading):
    """Cells of the table under a heading, split where Markdown splits them."""
    table = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_front_matter(trained):
    card = ModelCard.load(trained.dir / "README.md")
    data = card.data.to_dict()
    recipe = trained.result["recipe"]
    assert data["base_model"] == TINY_ID and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and recipe in data["tags"]
    assert data["pipeline_tag"] == ("text-classification" if recipe == "reward" else "text-generation")
    assert yaml.safe_load(card.content.split("---\n")[1]) == data


def test_tables_say_what_was_measured_and_set(trained):
    text, result = (trained.dir / "README.md").read_text(encoding="utf-8"), trained.result
    metrics = rows(text, "Held-out metrics")
    assert [row[0] for row in metrics] == [name.replace("_", " ") for name in result["metrics"]]
    assert all(len(row) == 4 and row[3] == str(result["metrics"][row[0].replace(" ", "_")].n) for row in metrics)
    settings = {key.strip("`"): value.strip("`") for key, value in rows(text, "Settings")}
    assert settings["trainer.learning_rate"] == "0.01" and settings["lora.r"] == "16"
    assert settings["data.path"] == '"clinic"' and settings["trainer.max_steps"] == "2"
    assert f"Seed 42, 2 steps, {result['seconds']:.0f} s" in text
    assert result["adapter_sha256"][:12] in text and f"trl {result['versions']['trl']}" in text


def test_snippet_runs(trained):
    from rlhf_recipes import inference, models

    card = (trained.dir / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert repr(TINY_ID) in snippet and "'<this adapter>'" in snippet
    snippet = snippet.replace(repr(TINY_ID), repr(trained.cfg.model.path))
    names = {}
    exec(snippet.replace("'<this adapter>'", repr(str(trained.dir / "adapter"))), names)

    tokenizer = models.load_tokenizer(trained.cfg.model)
    asked, said = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Good morning."}]
    if trained.result["recipe"] == "reward":
        loaded, trainers = (
            inference.rewards(model, tokenizer, [asked + said])
            for model in (names["reward_model"], trained.trainer.model)
        )
        untrained = names["model"].score.original_module.weight
        assert not torch.equal(names["model"].score.modules_to_save["default"].weight, untrained)
        assert loaded == pytest.approx(trainers, abs=2e-2)  # the snippet computes in float32
    else:
        loaded, trainers = (
            inference.completion_logps(model, tokenizer, [(asked, said)], "test")[0][0]
            for model in (names["policy"], trained.trainer.model)
        )
        assert loaded == pytest.approx(trainers, rel=1e-2)


NASTY = "a|b `c` \\| d\n---\n# Title\n```python\n| e |"


def test_values_cannot_break_the_card(trained):
    from rlhf_recipes.training import card

    config = yaml.safe_load((trained.dir / "config.yaml").read_text())
    plain = card.write(trained.result, config)
    config["data"]["columns"]["prompt"] = NASTY
    config["trainer"]["run_name"] = NASTY
    config["trainer"]["lr_scheduler_kwargs"] = {"x|`y\nz": 1}
    text = card.write(trained.result, config)
    assert ModelCard(text).data.to_dict() == ModelCard(plain).data.to_dict()
    assert text.count("\n---\n") == plain.count("\n---\n") and text.count("```") == plain.count("```")
    assert re.findall(r"^#+ .*$", text, re.MULTILINE) == re.findall(r"^#+ .*$", plain, re.MULTILINE)
    before, after = rows(plain, "Settings"), rows(text, "Settings")
    assert all(len(row) == 2 for row in after)
    assert {row[0] for row in after} - {row[0] for row in before} == {
        "`trainer.run_name`",
        r"`trainer.lr_scheduler_kwargs.x\|'y z`",
    }
    assert all(row[0].count("`") == row[1].count("`") == 2 for row in after)


def test_no_folder_of_this_machine(trained):
    """A data file is named, the folder it lies in is nobody's business."""
    from rlhf_recipes.training import card

    config = yaml.safe_load((trained.dir / "config.yaml").read_text())
    config["data"]["path"] = "/home/grace/secret project/prefs.jsonl"
    config["data"]["test_path"] = "~/held out/test.jsonl"
    config["trainer"]["output_dir"] = str(trained.dir)
    config["trainer"]["logging_dir"] = "C:\\Users\\grace\\logs"
    text = card.write(trained.result, config)
    for mine in ("/home", "grace", "secret project", "held out", str(trained.dir.parent), trained.cfg.model.path):
        assert mine not in text
    assert '`data.path` | `"prefs.jsonl"`' in text and '`data.test_path` | `"test.jsonl"`' in text
    config["data"]["path"] = "Anthropic/hh-rlhf"
    assert '`data.path` | `"Anthropic/hh-rlhf"`' in card.write(trained.result, config)


def test_chain_is_told_from_the_base(trained):
    from rlhf_recipes.training import card

    sft = {"run": "/home/grace/sft", "recipe": "sft", "adapter_sha256": "1" * 64, "parent": None}
    dpo = {"run": "outputs/dpo/main", "recipe": "dpo", "adapter_sha256": "2" * 64, "parent": sft}
    result = trained.result | {"parent": dpo, "adapter_sha256": "3" * 64, "recipe": "simpo"}
    config = yaml.safe_load((trained.dir / "config.yaml").read_text())
    line = f"`{TINY_ID}` → sft (`{'1' * 12}`) → dpo (`{'2' * 12}`) → **simpo** (`{'3' * 12}`)"
    text = card.write(result, config)
    assert line in text and "/home" not in text
