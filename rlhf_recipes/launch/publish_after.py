"""`publish=true`: what may be refused before a training, and the options of publishing after it."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, run, run_folder
from rlhf_recipes.publish import checks, contents, upload
from rlhf_recipes.publish.publish import connect, terms


def options(cfg: DictConfig, recipe: str) -> DictConfig:
    """The options of conf/publish.yaml for a recipe with `publish=true`."""
    defaults = OmegaConf.load(config.CONF / "publish.yaml")
    own = OmegaConf.masked_copy(defaults, [key for key in defaults if key not in ("defaults", "hydra")])
    folder = str(run.relative(Path(cfg.output_dir)))
    return OmegaConf.merge(own, {"pairs" if recipe == "cai" else "run": folder, "repo_id": cfg.repo_id})


def finished(cfg: DictConfig) -> bool:
    """Whether the run is there, trained with this config on what the config names as it lies there."""
    folder = run.relative(Path(cfg.output_dir))
    if not run.finished(folder, cfg):
        return False
    return run_folder.changed_input(folder, run.inputs_of(run.resolved(cfg))) is None


def check_ready(cfg: DictConfig, recipe: str) -> None:
    """Refuse a recipe with `publish=true` that could not publish, before it has trained for hours.

    Raises:
        Refusal: as for `connect`.
    """
    asked = options(cfg, recipe)
    checks.options(asked)
    source = contents.Source("pairs" if recipe == "cai" else "run", Path(cfg.output_dir), run.resolved(cfg), {})
    target = connect(asked, source.repo_type)
    with upload.state_in_errors(target):
        terms(source, None, target.api)
