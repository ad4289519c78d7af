"""Configs: what a recipe accepts, how it is refused in one line, and the only place that instantiates.

Everything at module level is cheap (no torch, no trl), so that `--help` and a refusal answer at once.
"""

import functools
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.config_source import ConfigSource
from omegaconf import MISSING, DictConfig, OmegaConf

from rlhf_recipes import guard
from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.methods import TRLS_OWN


@dataclass
class ModelConfig:
    """Keys of `model`. Each file under conf/model/ documents its values."""

    id: str = MISSING  # public name, written into adapters and cards
    path: str | None = None  # what is loaded: null = id, "embedded", or a local folder
    revision: str | None = None
    dtype: str = "auto"  # auto: bfloat16 where the hardware computes in it, else float16 (GPU), float32 (CPU)
    attn_implementation: str | None = None  # null: the library's choice for this hardware
    lora_targets: Any = "all-linear"
    pad_token: str | None = None  # null: the tokenizer's own
    # What the chat template reads beside the messages, in every rendering; null: left to the template.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None  # a run (or adapter folder) whose LoRA is continued
    adapter_base: str | None = None  # same: adapters that name another base are of this one, as the user says
    trust_remote_code: bool = False  # run the Python files that the model's folder brings


def part_of(shards: str | None) -> tuple[int, int]:
    """(number of the first part, from 0; every how-manyth is made) of `shards`, k/n: all of them without it.

    Raises:
        Refusal: it is no such part.
    """
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shards or "1/1")
    if not found or int(found[1]) > int(found[2]):
        raise Refusal(f"shards={shards}: must be k/n, the k-th of n jobs, as in 3/8. Change it.")
    return int(found[1]) - 1, int(found[2])


def _own(id: str, value: Any, otherwise: Any = None, *, _parent_: DictConfig) -> Any:
    return value if _parent_.id == id else otherwise


# `${own:<id>,<value>}` beside an `id`: the value belongs to the model of that id; with another the key is null, or the
# third argument.
OmegaConf.register_new_resolver("own", _own)
# `${part:3/8}`: what the folder of a part of a run has behind the run's name, .3-of-8; of null, nothing.
OmegaConf.register_new_resolver("part", lambda shards: f".{str(shards).replace('/', '-of-')}" if shards else "")
guard.look_at_what_hydra_composes()
_store = ConfigStore.instance()
# Hydra copies its sources, and this with them, for each composition and for each group that --help lists; what it
# takes out of the store it copies again.
ConfigStore.__deepcopy__ = lambda self, memo: self
# Beside the groups, not in them: nobody can choose these. A node without the struct flag takes keys that its YAML does
# not list, so every argument of the wrapped class is overridable without `+`; `build` refuses what the class does not
# have.
_model = OmegaConf.structured(ModelConfig)
OmegaConf.set_struct(_model.chat_template_kwargs, False)
_store.store(name="model_schema", node=_model)
_store.store(name="open", node=OmegaConf.create({}, flags={"struct": False}))


# What lies in conf/accelerate/ is for Accelerate's launcher, no group: neither --help nor a completion lists it.
_list_group = ConfigSource._list_add_result


def _list_our_group(self, files: list[str], file_path: str, file_name: str, results_filter: Any) -> None:
    if file_path.lstrip("/").split("/")[0] != "accelerate":
        _list_group(self, files, file_path, file_name, results_filter)


ConfigSource._list_add_result = _list_our_group

CONF = Path(__file__).with_name("conf")  # in a wheel; in a checkout it lies beside the package
if not CONF.is_dir():
    CONF = Path(__file__).parents[1] / "conf"

WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "None": "null",
    "list": "a list [a,b]",
    "dict": "a mapping",
}


def check_value(key: str, value: Any, rule: Any) -> None:
    """Refuse a value that is not of the type `rule`, or not one of the words of the tuple `rule`.

    Raises:
        Refusal: names the key as typed.
    """
    if isinstance(rule, tuple):
        if value not in rule:
            raise Refusal(f"{key}={value}: not one of {', '.join(rule)}{nearest(str(value), rule)}")
    elif (isinstance(value, bool) and rule is not bool) or not isinstance(value, rule):
        names = getattr(rule, "__name__", str(rule)).removeprefix("int | float").split(" | ")
        kind = " or ".join(WORDS[name or "float"] for name in names)
        raise Refusal(f"{key}={typed(value)}: must be {kind}. Change or quote it.")


def typed(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def build(node: DictConfig, where: str, **derived) -> Any:
    """Instantiate the class that `node._target_` names, after checking every key against it.

    Args:
        node: `_target_` plus arguments under the class's own names.
        where: the node's key on the command line, for messages (`trainer`).
        derived: values for arguments that the node leaves unset.

    Raises:
        Refusal: a key the class does not have, with the nearest one that it has, or a value of a wrong type.
    """
    from rlhf_recipes.typecheck import fits, parameters

    target = guard.find_class(node._target_, where)
    known = parameters(target)
    given = OmegaConf.to_container(node, resolve=True)
    given.pop("_target_")
    for key, value in given.items():
        if known.get(key) is float and type(value) is int:
            given[key] = float(value)  # 5 for 5.0: bitsandbytes insists
        if key not in known:
            raise Refusal(f"{where}.{key}: {node._target_} has no such field{nearest(key, known)}")
        if not fits(value, known[key]):
            expected = getattr(known[key], "__name__", None) or str(known[key]).replace("typing.", "")
            raise Refusal(f"{where}.{key}={typed(value)}: {node._target_} takes {expected} here, not {_kind(value)}.")
    # Hydra's instantiate converts nothing here that `to_container` has not converted, and turns errors of the class
    # into its own; a plain call keeps them readable.
    try:
        return target(**{**{k: v for k, v in derived.items() if k in known}, **given})
    except Refusal as error:  # a class of ours, which begins with the argument
        raise Refusal(f"{where}.{error}") from error
    except (ValueError, TypeError) as error:
        raise Refusal(f"{where}: {node._target_} refuses it: {first_line(error)}") from error


@functools.cache
def trainer_recipes() -> dict[str, str]:
    """The recipe of each class that `trainer._target_` may name: those of conf/trainer, and TRL's own of a method."""
    files = {OmegaConf.load(file).get("_target_"): file.stem for file in (CONF / "trainer").glob("*.yaml")}
    own = {target: recipe for target, (recipe, _) in TRLS_OWN.items()}
    return own | {target: recipe for target, recipe in files.items() if target}


def import_function(reference: str, where: str) -> Any:
    """The function behind `module:function`; modules of the current folder count.

    Args:
        where: the key on the command line, for messages.

    Raises:
        Refusal: there is none.
    """
    import importlib

    module, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refusal(f"{where}={reference}: cannot be imported ({error}). Give module:function.") from error


def flatten(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts as (dotted key, value)."""
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [leaf for key, value in node.items() for leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key))]


def plain(node: DictConfig) -> SimpleNamespace:
    """The values of a node without nodes of its own, to be looked at often: OmegaConf takes 20 µs for each look."""
    return SimpleNamespace(**OmegaConf.to_container(node, resolve=True))


def in_sweep() -> bool:
    """Whether this is one of several jobs (-m)."""
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _kind(value: Any) -> str:
    return "null" if value is None else f"the {type(value).__name__} '{value}'"
