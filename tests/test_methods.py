"""One row a training method; a method without one still ends with its result."""

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from rlhf_recipes import methods
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.data.load import LOADERS


def test_every_training_recipe_has_a_row():
    primaries = {file.stem: OmegaConf.load(file) for file in (ROOT / "conf").glob("*.yaml")}
    trained = {
        name
        for name, primary in primaries.items()
        if any(OmegaConf.is_dict(entry) and "trainer" in entry for entry in primary.get("defaults", []))
    }
    assert trained == methods.METHODS.keys()


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=lambda method: method.name)
def test_a_row_says_what_its_recipe_does(method):
    recipe = (ROOT / "recipes" / f"{method.name}.py").read_text(encoding="utf-8")
    assert f'main="{method.main}"' in recipe and LOADERS[method.rows].__name__ in recipe
    assert method.url in recipe.split('"""')[1]
    assert f'"{method.reward}"' in recipe or method.reward == "log_ratio"


def test_an_unknown_method_claims_nothing():
    unknown = methods.of("ipo")
    assert (unknown.cited, unknown.preferences, unknown.reference, unknown.replies) == ("ipo", False, False, "")
    assert methods.of(None).title == ""


def test_a_run_of_an_unknown_method_is_finished(train, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(methods.METHODS, "dpo")
    done = train("dpo", tmp_path / "run", "quantization=none", drawn=True)
    assert done.result["status"] == "finished" and done.result["recipe"] == "dpo"
    assert "\ndpo, trained with TRL" in (done.dir / "README.md").read_text(encoding="utf-8")
    assert (done.dir / "curves.png").is_file() and "warning" not in capsys.readouterr().err


def test_a_card_or_picture_that_fails_costs_a_warning(train, tmp_path, monkeypatch, capsys):
    from rlhf_recipes.training import card, curves, doctor_plot

    def fail(*_, **__):
        raise KeyError("ipo")

    for module, name in ((card, "write"), (curves, "plot_curves"), (doctor_plot, "plot")):
        monkeypatch.setattr(module, name, fail)
    done = train("dpo", tmp_path / "run", "quantization=none", drawn=True)
    said = capsys.readouterr().err
    assert done.result["status"] == "finished" and (done.dir / "adapter").is_dir()
    for file in ("README.md", "curves.png", "doctor.png"):
        assert f"warning: {file} was not written (KeyError: 'ipo')" in said and not (done.dir / file).exists()


def test_runs_from_before_labels_are_continued():
    """The column of the labels at its default says nothing about what a run computes."""
    before = {"data": {"path": "clinic", "columns": {"prompt": "prompt"}}, "seed": 1}
    after = {"data": {"path": "clinic", "columns": {"prompt": "prompt", "label": "label"}}, "seed": 1}
    renamed = {"data": {"path": "clinic", "columns": {"prompt": "prompt", "label": "thumb"}}, "seed": 1}
    assert config_sha256(before) == config_sha256(after) != config_sha256(renamed)
    assert after["data"]["columns"]["label"] == "label"
