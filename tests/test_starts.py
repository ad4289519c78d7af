"""What a command does not do twice, or not at all, before it runs."""

from types import SimpleNamespace

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from rlhf_recipes import compiling
from rlhf_recipes.config import CONF
from rlhf_recipes.launch import composing


@pytest.fixture
def started(monkeypatch):
    """started(*overrides): as Hydra starts a command, (its config, how often one was composed)."""
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", ConfigLoaderImpl.load_configuration)
    composing.once()

    def start(*overrides, place="rlhf_recipes.conf", name="dpo"):
        composed = []
        compose = ConfigLoaderImpl._load_configuration_impl

        def noted(*args, **kwargs):
            composed.append(compose(*args, **kwargs))
            return composed[-1]

        monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", noted)
        GlobalHydra.instance().clear()
        initialize = hydra.initialize_config_dir if place.startswith("/") else hydra.initialize_config_module
        with initialize(place, version_base="1.3", job_name=name):
            command = GlobalHydra.instance().hydra
            overrides = [*overrides]
            if command.get_mode(name, overrides) is None:
                overrides += ["hydra.mode=RUN"]
            return command.compose_config(name, overrides, RunMode.RUN), len(composed)

    return start


@pytest.mark.parametrize("place", ["rlhf_recipes.conf", str(CONF)])
def test_a_run_is_composed_once(started, place, monkeypatch):
    overrides = ["trainer.beta=0.3", "quantization=none", "run_name='a=b'", "hydra.run.dir=elsewhere"]
    cfg, count = started(*overrides, place=place)
    assert count == 1
    monkeypatch.setattr(composing, "_is_for", lambda *_: False)
    again, count = started(*overrides, place=place)
    assert count == 2
    assert OmegaConf.to_yaml(cfg) == OmegaConf.to_yaml(again) and cfg.hydra.mode == again.hydra.mode == RunMode.RUN


@pytest.mark.parametrize("override", ["hydra.mode=RUN", "data.columns.prompt='x(y)'"])
def test_what_may_be_otherwise_is_composed_again(started, override):
    assert started(override)[1] == 2


def test_the_grid_of_a_sweep_is_refused_where_none_is_started(started):
    with pytest.raises(hydra.errors.ConfigCompositionException, match="multirun"):
        started("trainer.beta=0.1,0.5")


def test_a_group_that_a_file_of_the_user_s_leaves_open_is_asked_for(started, tmp_path):
    (tmp_path / "own.yaml").write_text("defaults: [{model: '???'}, _self_]\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "one.yaml").write_text("id: one\n")
    with pytest.raises(hydra.errors.ConfigCompositionException, match="You must specify 'model'"):
        started(place=str(tmp_path), name="own")


@pytest.mark.slow
def test_the_compiler_is_imported_by_who_compiles(monkeypatch, libraries):
    import torch
    from bitsandbytes.backends.default import ops

    assert type(ops.__spec__.loader) is compiling._Loader
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(SimpleNamespace(**how)) or function)
    larger = compiling._compiled_when_called(max, dynamic=False)
    assert not asked
    assert (larger(1, 2), larger(2, 1)) == (2, 2) and asked == [SimpleNamespace(dynamic=False)]
