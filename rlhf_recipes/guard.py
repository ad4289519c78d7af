"""What no config may do: hold a secret, or name code that its user did not ask for.

An experiment file may come from anybody. Hydra acts on a config before a recipe sees it: it makes callbacks, sets up
logging, changes the environment, makes folders. So each config is looked at when Hydra has composed it.
"""

import functools
import importlib
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_recipes import secrets
from rlhf_recipes.errors import Refusal

# Where the config classes live, and what they are.
LIBRARIES = ("trl", "transformers", "peft", "rlhf_recipes")
CONFIG_CLASSES = (
    ("transformers", "TrainingArguments"),
    ("peft", "PeftConfig"),
    ("transformers.utils.quantization_config", "QuantizationConfigMixin"),
)
# What Hydra's own node may name: our callback, Hydra's own parts and those of its plugins.
HYDRA_TARGETS = re.compile(
    r"rlhf_recipes\.launch\.sweep\.Summary|hydra\.experimental\.callbacks\.\w+Callback|optuna\.samplers\.\w+Sampler"
    r"|(hydra\._internal\.core_plugins|hydra_plugins\.\w+)\.\w+\.\w+(Launcher|Sweeper)"
)
LOGGING_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
OUTPUT_DIR = "${hydra.runtime.output_dir}/"
NAMED_VARIABLE = re.compile(r"oc\.env:\s*[\"']?(\w+)")
AS_TYPED = ("hydra.overrides.", "hydra.job.override_dirname")
SETS_TARGET = re.compile(r"[\s+~]*allow_target\b")
RUN_IT = "If you know that it is to be run, add 'allow_target=[{}]' to the command."
NO_SECRETS = "Remove it; tokens come from `hf auth login` or the environment variable HF_TOKEN."


def look_at_what_hydra_composes() -> None:
    """Refuse in one line what `refuse` refuses, wherever this process composes a config: runs, jobs, stages."""
    load = ConfigLoaderImpl.load_configuration
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def looked_at(self, config_name, overrides, *args, **kwargs):
        _refuse_overrides(overrides)
        cfg = load(self, config_name, overrides, *args, **kwargs)
        refuse(cfg)
        return cfg

    ConfigLoaderImpl.load_configuration = looked_at


def refuse(cfg: DictConfig) -> None:
    """Refuse a composed config, Hydra's node included, that holds a secret or names code.

    Raises:
        Refusal: the first offence, naming its key.
    """
    found, held = list(leaves(OmegaConf.to_container(cfg, resolve=False))), secrets.in_environment()
    refuse_secrets(found, held)
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        with suppress(OmegaConfBaseException):  # a value that is not set yet is not there yet either
            refuse_secrets([(key, str(OmegaConf.select(cfg, key)))], held)
    _refuse_target_from_file(cfg, found)
    allowed, typed = _allowed([*cfg.hydra.overrides.task]), [*cfg.hydra.overrides.hydra]
    for key, value in found:
        if key.startswith("hydra."):
            _refuse_hydra(key, value, allowed, typed)


def refuse_secrets(found: list[tuple[str, Any]], held: dict[str, str] | None = None) -> None:
    """Refuse keys that name a secret, whatever they hold but null, and texts that hold one or lead to one.

    Args:
        found: dotted keys and values, as `leaves` gives them.
        held: `secrets.in_environment`, for many calls; None: as it is.

    Raises:
        Refusal: it names the key and, where there is one, the variable; never the value.
    """
    held = secrets.in_environment() if held is None else held
    for key, value in found:
        if what := secrets.find(key, held):
            raise Refusal(f"a key of the config holds {what}. {NO_SECRETS}")
        if value is not None and any(secrets.KEY.search(part) for part in key.split(".")):
            raise Refusal(f"{key}: names a secret, which would be written into files. {NO_SECRETS}")
        if not isinstance(value, str):
            continue
        named = next((name for name in NAMED_VARIABLE.findall(value) if secrets.names_one(name)), None)
        what = f"the value of the environment variable {named}" if named else secrets.find(value, held)
        if what:
            raise Refusal(f"{key}: holds {what}, which would be written into files. {NO_SECRETS}")


def refuse_secrets_of(cfg: DictConfig) -> None:
    """The same of a recipe's config as it is written, and as it is when all that it refers to is filled in."""
    refuse_secrets(list(leaves(OmegaConf.to_container(cfg, resolve=False))))
    node = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "output_dir"])  # Hydra's, looked at before
    refuse_secrets(list(leaves(OmegaConf.to_container(node, resolve=True))))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is neither dict nor list below; the entries of a list share its key."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and node:
        for value in node:
            yield from leaves(value, prefix)
    else:
        yield prefix, node


def find_class(target: str, where: str) -> Any:
    """The class that a `_target_` names: a config class of the libraries, or what the user has allowed.

    Args:
        where: the node's key on the command line, for messages (`trainer`).

    Raises:
        Refusal: it is neither, or it is not there. Only modules of the libraries are imported to see that.
    """
    typed = [*HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    allowed = target in _allowed(typed)
    module, _, name = target.rpartition(".")
    refusal = f"{where}._target_={target}: is no config class of {', '.join(LIBRARIES[:3])}. {RUN_IT.format(target)}"
    if not allowed and module.partition(".")[0] not in LIBRARIES:
        raise Refusal(refusal)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refusal(
            f"{where}._target_={target}: cannot be imported ({error}). Check it, or leave it out."
        ) from error
    bases = tuple(getattr(importlib.import_module(home), base) for home, base in CONFIG_CLASSES)
    if not allowed and not (isinstance(found, type) and issubclass(found, bases)):
        raise Refusal(refusal)
    return found


def _allowed(overrides: list[str]) -> list[str]:
    """What `allow_target` lists on the command line."""
    if not (given := [each for each in overrides if "allow_target" in each]):
        return []
    typed = OverridesParser.create().parse_overrides(given)
    values = [each.value() for each in typed if each.key_or_group == "allow_target"]
    return [str(name) for value in values if isinstance(value, list) for name in value]


def _refuse_overrides(overrides: list[str]) -> None:
    """What Hydra would act on while it composes, or write as it was typed."""
    held = secrets.in_environment()
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_secrets([(key.lstrip("+~"), None if value in ("", "null") else value)], held)
        if "hydra.searchpath" in key and re.search(r"(?!file)\b\w+://", value):
            raise Refusal("hydra.searchpath: names a package, which would be imported. Give folders.")


def _refuse_target_from_file(cfg: DictConfig, found: list[tuple[str, Any]]) -> None:
    """`allow_target` guards against files, also those whose text becomes a command line: sweeps, pipelines."""
    for key, value in found:
        below = key != "allow_target" and re.search(r"(^|[.+~\s])allow_target\b", key)
        listed = isinstance(value, str) and not key.startswith(AS_TYPED) and SETS_TARGET.match(value)
        if below or listed:
            raise Refusal(f"{key}: sets allow_target, which only the command line itself may. Give it there.")
    typed = any(SETS_TARGET.match(each) for each in cfg.hydra.overrides.task)
    if cfg.get("allow_target") is not None and not typed:
        raise Refusal("allow_target: is set by a file, which only the command line may. Give it there.")


def _refuse_hydra(key: str, value: Any, allowed: list[str], typed: list[str]) -> None:
    last = key.rpartition(".")[2]
    if key.startswith(("hydra.job.env_set", "hydra.job.env_copy")) and value not in ({}, []):
        name = last if key.count(".") > 2 else value
        raise Refusal(f"{key}: a config sets no environment variables. Set {name} where you start the command.")
    named = last == "_target_" and not HYDRA_TARGETS.fullmatch(str(value))
    if (named or key == "hydra.sweeper.custom_search_space") and value not in (None, *allowed):
        raise Refusal(f"{key}={value}: is no part of Hydra. {RUN_IT.format(value)}")
    if key == "hydra.output_subdir" and value and (".." in value or value.startswith(("/", "~"))):
        raise Refusal(f"{key}={value}: Hydra would write outside the run folder. Give a name, or leave it out.")
    if key.startswith("hydra.launcher."):
        own = any(each.lstrip("+~").partition("=")[0] == key for each in typed)
        if (last == "setup" and value and not own) or "\n" in str(value):
            raise Refusal(f"{key}: holds commands for a shell. Give them on the command line: {key}=[...].")
    if key.startswith(("hydra.job_logging.", "hydra.hydra_logging.")):
        _refuse_logging(key, last, str(value))


def _refuse_logging(key: str, last: str, value: str) -> None:
    """Python's logging takes any callable as a class, any module in `ext://`, and any file to write into."""
    loads = "()" in key or (last == "class" and value not in LOGGING_CLASSES)
    reads = value.startswith(("ext://", "cfg://")) and value not in STREAMS
    writes = last == "filename" and not (value.startswith(OUTPUT_DIR) and ".." not in value)
    if loads or reads or writes:
        raise Refusal(f"{key}={value}: logging that runs or writes something else than Hydra's own. Leave it out.")
