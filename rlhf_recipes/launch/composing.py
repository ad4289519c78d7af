"""A command's config is composed once.

Hydra composes it to see whether it starts a sweep, and then to run it: twice the same where it starts none.
"""

import functools
import re
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig

from rlhf_recipes.config import CONF

RUN = "hydra.mode=RUN"  # what Hydra adds to the command in between
OURS = ("hydra.conf", str(CONF), "rlhf_recipes.conf", "")  # places of files, and of what is no file


def once() -> None:
    """Where Hydra's second composition would be its first, it gets that one."""
    load = ConfigLoaderImpl.load_configuration
    if hasattr(load, "composes_once"):
        return

    @functools.wraps(load)
    def load_once(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        seen = self.__dict__.pop("_seen", None)
        if seen and run_mode == RunMode.RUN and _is_for(config_name, overrides, *seen):
            cfg = seen[-1]
            cfg.hydra.mode = run_mode
            cfg.hydra.overrides.hydra.append(RUN)
            return cfg
        cfg = load(self, config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if run_mode == RunMode.MULTIRUN and not validate_sweep_overrides:  # the look
            self._seen = config_name, [*overrides], cfg
        return cfg

    load_once.composes_once = True
    ConfigLoaderImpl.load_configuration = load_once


def _is_for(config_name: str | None, overrides: list[str], name: str | None, seen: list[str], cfg: Any) -> bool:
    """Whether the config that was looked at is that of a run. The look lets pass overrides of a sweep, and groups that
    a file leaves to the command, which none of ours does."""
    sweeps = any(re.search(r"[,(]", each.partition("=")[2]) for each in seen)
    ours = all(source.path in OURS for source in cfg.hydra.runtime.config_sources)
    return name == config_name and overrides == [*seen, RUN] and ours and not sweeps and cfg.hydra.mode is None
