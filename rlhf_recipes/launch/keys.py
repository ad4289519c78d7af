"""What the command line takes: keys, types and words, checked before anything is loaded."""

import functools
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_recipes import guard
from rlhf_recipes.commands import command
from rlhf_recipes.config import CONF, ModelConfig, check_value, flatten, in_sweep, typed
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.launch import settings
from rlhf_recipes.launch.refusals import choices
from rlhf_recipes.overrides import PLAIN

# What our own keys take that their default does not say (the words that are allowed, more than one type, null); any
# other takes the type of its default in the YAML. `data`, and what a class stands behind, check their own.
KEYS = {
    "resume": ("auto", "never"),
    "allow_target": list | None,
    "doctor": ("warn", "strict", "none"),
    "preflight.fails": ("stop", "warn"),
    "checkpoints": str | list | None,
    "reward_model": str | list | None,
    "judge_function": str | None,
    "lm_eval.include_path": str | None,
    "lm_eval.limit": int | None,
    "lm_eval.num_fewshot": int | None,
    "scored_pairs": int | None,
    "prompts": int | None,
    "reward_funcs": str | list,
    "judging.mode": ("logprob", "cot"),
    "judging.min_calibration_pairs": int | None,
    "gate.fails": ("contrastive", "stop", "ignore"),
    "filters.*": int | float,
    "shards": str | None,
    "first": str | None,
    "reference": str | None,
    "generator.kind": ("local", "server"),
    "generate.pairs": ("all", "best_worst"),
    "judge.kind": ("local", "server", "reward", "function", "people"),
    "judge.reward_model": str | list,
    "judge.margin": int | float,
    "judge.max_disagreement": int | float,
    "judge.function": str,
    "thresholds.metric": ("auto", "win_rate", "preference_accuracy"),
    "thresholds.length_controlled": bool,
    "thresholds.worst_case": bool,
    "thresholds.*": int | float | None,
    "deployment": str | None,
    "stress": str | None,
    "gold": str | list | None,
    "annotator": str | list,
    "benchmark": str | None,
    "baseline_answers": str | None,
    "proxy": ("first", "mean", "min", "uwo", "trained"),
    "ppo_run": str | None,
    "sweep.reward_model": str | None,
    "sweep.generator": dict | None,
    "sweep.max_kl": int | float | None,
    "sweep.max_length_ratio": int | float | None,
    "stages": list,
    "loop.gates.*": int | float | None,
    "launch": str | None,
    "run": str | None,
    "pairs": str | None,
    "repo_id": str | None,
    "folder": str | None,
    "tag": str | None,
    "commit_message": str | None,
    "license": str | None,
    "evaluation": str | None,
    "max_file_gib": int | float,
}
# The same of a model behind an endpoint, and of one in this process.
KEYS |= {
    f"{group}.{key}": taken
    for group in ("generator", "judge")
    for key, taken in {
        "base_url": str | list,
        "api_key_env": str | None,
        "timeout": int | float,
        "prompt_price": int | float | None,
        "completion_price": int | float | None,
    }.items()
} | {
    "judge.id": str,
    "judge.dtype": str,
    "judge.trust_remote_code": bool,
    **{
        f"judge.{key}": str | None
        for key in ("path", "revision", "attn_implementation", "pad_token", "adapter", "adapter_base")
    },
}
# What the extras `audit` and `label` install, and the module of each.
AUDIT_PACKAGES = {
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "networkx": "networkx",
    "krippendorff": "krippendorff",
}
LABEL_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn"}
# Recipes with an extra of their own name.
EXTRAS = {"audit": ("The audit", AUDIT_PACKAGES), "label": ("The page", LABEL_PACKAGES)}
# What `trainer.report_to` may name, and the packages one of which it needs.
TRACKERS = {
    **{name: (name,) for name in ("wandb", "trackio", "mlflow", "comet_ml", "clearml", "codecarbon", "dagshub")},
    **{name: (name,) for name in ("dvclive", "neptune", "swanlab")},
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml-core",),
    "flyte": ("flytekit",),
    "kubeflow": (),  # a server, whose address is in the environment
}
# What `trainer.optim` needs where it matches, the first of them: a package, and its module.
OPTIMIZERS = {
    "galore": ("galore-torch", "galore_torch"),
    "apollo": ("apollo-torch", "apollo_torch"),
    "lomo|adalomo": ("lomo-optim", "lomo_optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("torch-optimi", "optimi"),
    "adamw_torch_[48]bit": ("torchao", "torchao"),
    ".*(8bit|bnb)|paged|ademamix|lion": ("bitsandbytes", "bitsandbytes"),
}
# Groups whose keys are ours, and the file that has all of them.
OURS = {"preflight": "base", "sweep": "base", "reward": "ensemble"}
# Groups with a file for each `kind`.
KINDS = ("generator", "judge")
# Mappings of which something else knows the keys: the chat template; and what measures a sweep by an endpoint.
MAPPINGS = (*(f"{group}.chat_template_kwargs." for group in ("model", *KINDS)), "sweep.generator.")


def check(cfg: DictConfig, recipe: str | None = None) -> None:
    """Refuse what needs no library to be seen: unknown keys, wrong types, values left open, secrets.

    Args:
        recipe: whose primary config names the keys there are; None: that of the running command.

    Raises:
        Refusal: the first offence, naming its key as typed on the command line.
    """
    node, recipe = OmegaConf.to_container(cfg, resolve=False), recipe or _running()
    leaves = flatten(node)
    _refuse_unknown(node, recipe)
    if recipe:
        primary, groups = _primary(recipe)
        _refuse_no_mapping(node, {group: {} for group in groups} | primary)
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise Refusal(f"{key}: required, but not set. Add {key}=<value> to the command.")
    try:
        guard.refuse_secrets_of(cfg)
    except OmegaConfBaseException as error:  # a reference to a key that is not there
        raise Refusal(str(error)) from error
    own = (defaults(recipe) if recipe else {}) | of_kind("generator", "server")
    for group in KINDS:
        own |= of_kind(group, _kind(node, group))
    for key, value in leaves:
        like = key.removeprefix("sweep.") if key.startswith("sweep.generator.") else key
        taken = rule(like, own.get(like))
        if taken and not (isinstance(value, str) and "${" in value):
            check_value(key, value, taken)
    if any(part.startswith(".") and part != ".." for part in Path(str(cfg.get("run_name"))).parts):
        raise Refusal(f"run_name={cfg.run_name}: a name that begins with a dot is for what is set aside. Change it.")
    if "publish" in cfg and cfg.publish != (cfg.repo_id is not None):
        raise Refusal(f"publish={str(cfg.publish).lower()}: goes with repo_id=<user/name>. Give both, or none.")
    if cfg.get("publish") and in_sweep():
        raise Refusal(f"publish=true: not in a sweep. Publish its best job: {command('publish')} run=<job>.")
    if elsewhere := OmegaConf.select(cfg, "trainer.output_dir"):
        raise Refusal(
            f"trainer.output_dir={elsewhere}: a trainer writes, and removes old checkpoints, in its run's folder "
            "alone. Use run_name=<name>, or hydra.run.dir=<folder>."
        )
    if OmegaConf.select(cfg, "trainer.push_to_hub"):
        raise Refusal(
            "trainer.push_to_hub=true: would upload every checkpoint as it is. Use publish=true repo_id=<user/name>, "
            "which proves what it uploads."
        )
    settings.check(cfg, recipe)
    _refuse_missing_tracker(OmegaConf.select(cfg, "trainer.report_to"))
    _refuse_missing_packages(OmegaConf.select(cfg, "trainer") or {})
    quantization = OmegaConf.select(cfg, "quantization._target_") or ""
    if quantization.endswith("BitsAndBytesConfig") and not _installed("bitsandbytes"):
        raise Refusal(
            "quantization: bitsandbytes is not installed. pip install bitsandbytes, or add quantization=none."
        )
    for extra, (what, packages) in EXTRAS.items():
        for package, module in packages.items() if (recipe or _running()) == extra else ():
            if not _installed(module):
                raise Refusal(f'{what} needs {package}. pip install "rlhf-recipes[{extra}]".')


def chosen(recipe: str, overrides: list[str]) -> list[str]:
    """The overrides without those that choose null of a group that is null in the primary config as well, which Hydra
    does not take.

    Raises:
        Refusal: what is no name, for any other group; a key or a group of the primary config is deleted.
    """
    _, groups = _primary(recipe)
    needed = [*defaults(recipe), *(group for group, name in groups.items() if name)]
    kept = []
    for override in overrides:
        deleted = override.startswith("~") and override[1:].partition("=")[0]
        if deleted and any(f"{key}.".startswith(f"{deleted}.") for key in needed):
            raise Refusal(f"{override}: recipes/{recipe}.py reads it. Leave it out, or give it another value.")
        group, _, value = override.lstrip("+").partition("=")
        is_group = group in groups or "/" in group or (CONF / group).is_dir()
        given = [] if not is_group or PLAIN.fullmatch(value) else _values(override)
        given = [each for each in given if not isinstance(each, str | list | dict)]
        if given == [None] and groups.get(group, "") is None:
            continue
        if given and group not in groups and "/" not in group:
            raise Refusal(f"{group}: recipes/{recipe}.py has no such group.")
        if given:
            options = f"one of {', '.join(choices(group))}, or left out" if choices(group) else "left out"
            raise Refusal(f"{group}={typed(given[0])}: must be {options}.")
        kept.append(override)
    return kept


def _values(override: str) -> list[Any]:
    """What an override, or each job of its sweep, sets; [] of one that Hydra does not take, or that deletes."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return []
    if parsed.is_discrete_sweep():
        key = parsed.get_key_element()
        return [value for text in parsed.sweep_string_iterator() for value in _values(f"{key}={text}")]
    return [] if parsed.is_sweep_override() or parsed.is_delete() else [parsed.value()]


@functools.cache
def defaults(recipe: str) -> dict[str, Any]:
    """Our own keys of a recipe, dotted, and their defaults."""
    node, groups = _primary(recipe)
    ours = {group: _written(group, OURS[group]) for group in groups.keys() & OURS.keys()}
    return dict(flatten(node | {group: written.get(group, written) for group, written in ours.items()}))


@functools.cache
def of_kind(group: str, kind: str | None) -> dict[str, Any]:
    """The keys of a generator or a judge, dotted, and their defaults; none of a kind that there is not."""
    return dict(flatten({group: _written(group, kind)})) if kind in KEYS[f"{group}.kind"] else {}


def takes(recipe: str, override: str) -> bool:
    """Whether a recipe has the group that an override is about, or the key where it is of no group."""
    node, groups = _primary(recipe)
    return override.lstrip("+~").partition("=")[0].partition(".")[0] in groups | node


def rule(key: str, default: Any) -> Any:
    """What `check_value` holds a key of ours against: what KEYS says, else the type of its default; None where
    neither is known, as of one that refers to another key. A number that may have a fraction may be a whole one."""
    listed = KEYS.get(key) or KEYS.get(key.rpartition(".")[0] + ".*")
    if listed or default is None or str(default).startswith("${"):
        return listed
    return int | float if isinstance(default, float) else type(default)


@functools.cache
def _primary(recipe: str) -> tuple[dict, dict[str, str | None]]:
    """The primary config of a recipe as it is written, without Hydra's node, and what it chooses of each group."""
    shared, own = (OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")) for name in ("run", recipe))
    entries = [entry for entry in own.pop("defaults") if isinstance(entry, dict)]
    groups = {group: name for entry in entries for group, name in entry.items()}
    return {key: value for key, value in (shared | own).items() if key != "hydra"}, groups


def _refuse_unknown(cfg: dict, recipe: str | None) -> None:
    """A file under conf/experiment/, or `+key=value`, may bring keys that nothing reads."""
    if recipe is None:
        return
    _, groups = _primary(recipe)
    kinds = {group: _kind(cfg, group) for group in groups.keys() & KINDS}
    known = [*defaults(recipe), *(f"model.{key}" for key in ModelConfig.__dataclass_fields__)]
    for group, kind in kinds.items():
        known += [f"{group}.kind", *of_kind(group, kind), *(each[:-1] for each in MAPPINGS if each.startswith(group))]
    # Others are checked against the class, or by rlhf_recipes.data; a kind that there is not, by its own key.
    unknown = {group for group, kind in kinds.items() if kind not in (None, *KEYS[f"{group}.kind"])}
    opened = groups.keys() - {"model", *OURS, *kinds} | unknown
    for key, _ in flatten(cfg):
        is_open = key.partition(".")[0] in opened or key.startswith(MAPPINGS)
        if not is_open and not any(f"{name}.".startswith(f"{key}.") for name in known):
            raise Refusal(f"{key}: recipes/{recipe}.py has no such key{nearest(key, [*known, *groups])}")


def _refuse_no_mapping(cfg: dict, primary: dict, above: str = "") -> None:
    """Of what is a mapping in the primary config, one is read."""
    for key, own in primary.items():
        given = cfg.get(key, {})
        if isinstance(own, dict) and not isinstance(given, dict):
            each = f"{above}{key}.{next(iter(own), '<key>')}"
            raise Refusal(
                f"{above}{key}={typed(given)}: is a mapping. Set, or lift, each by its own key: {each}=<value>."
            )
        if isinstance(own, dict):
            _refuse_no_mapping(given, own, f"{above}{key}.")


def _kind(cfg: dict, group: str) -> str | None:
    chosen = cfg.get(group)
    return str(chosen["kind"]) if isinstance(chosen, dict) and "kind" in chosen else None


def _written(group: str, name: str) -> dict[str, Any]:
    """A file of a group as it is written, without what it builds on."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    return {key: value for key, value in node.items() if key != "defaults"}


def _refuse_missing_tracker(report_to: Any) -> None:
    """The trainer would find out when the model is loaded."""
    names = list(report_to) if OmegaConf.is_list(report_to) else [report_to]
    if names in (["none"], [None]):
        return
    installed = {name for name, packages in TRACKERS.items() if any(map(_installed, packages))}
    if names == ["all"]:
        if not installed:
            raise Refusal(
                "trainer.report_to=all: no tracker is installed. pip install tensorboard, or choose tracker=none."
            )
        return
    for name in names:
        check_value("trainer.report_to", name, (*TRACKERS, *(("none", "all") if len(names) == 1 else ())))
        packages = TRACKERS[name]
        if packages and name not in installed:
            where = "tracker" if (CONF / "tracker" / f"{name}.yaml").is_file() else "trainer.report_to"
            raise Refusal(
                f"{where}={name}: {packages[0]} is not installed. pip install {packages[0]}, or choose tracker=none."
            )


def _refuse_missing_packages(trainer: DictConfig | dict) -> None:
    """The trainer would find out at its first step."""
    given = str(trainer.get("optim"))
    package, module = next((needed for name, needed in OPTIMIZERS.items() if re.match(name, given)), ("", ""))
    if module and not _installed(module):
        raise Refusal(f"trainer.optim={given}: {package} is not installed. pip install {package}, or choose another.")
    if trainer.get("use_liger_kernel") and not _installed("liger_kernel"):
        raise Refusal("trainer.use_liger_kernel=true: liger-kernel is not installed. pip install liger-kernel.")


def _running() -> str | None:
    return HydraConfig.get().job.config_name if HydraConfig.initialized() else None


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package.partition("-")[0]) is not None
