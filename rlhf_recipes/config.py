"""Configs: what a recipe accepts, how it is refused in one line, and the only place that instantiates.

Everything at module level is cheap (no torch, no trl), so that `--help` and a refusal answer at once.
"""

import difflib
import functools
import os
import re
import sys
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from rlhf_recipes import guard, secrets, text


@dataclass
class ModelConfig:
    """Keys of `model`. Each file under conf/model/ documents its values."""

    id: str = MISSING  # public name, written into adapters and cards
    path: str | None = None  # what is loaded: null = id, "embedded", or a local folder
    revision: str | None = None
    dtype: str = "auto"  # auto: bfloat16 where the hardware computes in it, else float32
    attn_implementation: str | None = None  # null: the library's choice for this hardware
    lora_targets: Any = "all-linear"
    pad_token: str | None = None  # null: the tokenizer's own
    adapter: str | None = None  # a run (or adapter folder) whose LoRA is continued
    trust_remote_code: bool = False  # run the Python files that the model's folder brings


guard.look_at_what_hydra_composes()
_store = ConfigStore.instance()
# Beside the groups, not in them: nobody can choose these. A node without the struct flag takes keys that its YAML does
# not list, so every argument of the wrapped class is overridable without `+`; `build` refuses what the class does not
# have.
_store.store(name="model_schema", node=ModelConfig)
_store.store(name="open", node=OmegaConf.create({}, flags={"struct": False}))

WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"

# Files of a group that others are made of.
PARTS = ("base", "common")
CONF = Path(__file__).with_name("conf")  # in a wheel; in a checkout it lies beside the package
if not CONF.is_dir():
    CONF = Path(__file__).parents[1] / "conf"

# What our own keys take: types, or the tuple of the words that are allowed. `data` checks its own.
KEYS = {
    "run_name": str,
    "resume": ("auto", "never"),
    "overwrite": bool,
    "allow_target": list | None,
    "doctor": ("warn", "strict", "none"),
    "preflight.only": bool,
    "preflight.measure": bool,
    "preflight.fails": ("stop", "warn"),
    "runs": list,
    "parent": str,
    "checkpoints": str | list | None,
    "reward_model": str | list | None,
    "judge_function": str | None,
    "tasks": list,
    "lm_eval.include_path": str | None,
    "lm_eval.limit": int | None,
    "lm_eval.num_fewshot": int | None,
    "lm_eval.apply_chat_template": bool,
    "lm_eval.batch_size": int,
    "prompts": int | None,
    "max_new_tokens": int,
    "temperature": int | float,
    "seed": int,
    "harmful_families": list,
    "max_length": int,
    "reward_funcs": str | list,
    "max_prompt_length": int,
    "shard_size": int,
    "sources": list,
    "generate.max_new_tokens": int,
    "generate.n_samples": int,
    "generate.*": int | float,
    "revise.n_revisions": int,
    "revise.critique": bool,
    "revise.few_shot": int,
    "revise.max_new_tokens": int,
    "revise.*": int | float,
    "judging.mode": ("logprob", "cot"),
    "judging.principles_per_pair": int,
    "judging.prior_correction": bool,
    "judging.min_option_mass": int | float,
    "judging.min_calibration_pairs": int | None,
    "judging.cot_tokens": int,
    "judging.tie_margin": int | float,
    "gate.gold": str,
    "gate.pairs": int,
    "gate.fails": ("contrastive", "stop", "ignore"),
    "gate.only": bool,
    "gate.*": int | float,
    "route.*": int | float,
    "filters.*": int | float,
    "generator.kind": ("local", "server"),
    "judge.kind": ("local", "server"),
    "thresholds.metric": ("auto", "win_rate", "preference_accuracy"),
    "thresholds.length_controlled": bool,
    "thresholds.worst_case": bool,
    "thresholds.*": int | float | None,
    "exit_codes.*": int,
    "judgements": list,
    "deployment": str | None,
    "stress": str | None,
    "gold": str | list | None,
    "samples": int,
    "proxy": ("first", "mean", "min", "uwo", "trained"),
    "ledger_pairs": int,
    "stress_pairs": int,
    "probe_pairs": int,
    "credit_pairs": int,
    "ppo_run": str | None,
    "sweeps": list,
    "sweep.prompts": int,
    "sweep.max_new_tokens": int,
    "sweep.reward_model": str | None,
    "sweep.max_kl": int | float | None,
    "sweep.max_length_ratio": int | float | None,
    "stages": list,
    "shared": list,
    "next": list,
    "publish": bool,
    "run": str | None,
    "pairs": str | None,
    "repo_id": str | None,
    "folder": str | None,
    "public": bool,
    "revision": str,
    "tag": str | None,
    "commit_message": str | None,
    "create_pr": bool,
    "license": str | None,
    "evaluation": str | None,
    "merged": bool,
    "force": bool,
    "max_merge_drift": int | float,
    "max_base_drift": int | float,
    "max_file_gib": int | float,
}
WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "None": "null",
    "list": "a list [a,b]",
    "dict": "a mapping",
}
# How the libraries (safetensors, torch) say that a file could not be written.
UNWRITTEN = ("No space left on device", "Read-only file system", "iostream error", "inline_container")


def recipe(name: str):
    """Decorate `main(cfg)` of recipes/<name>.py: Hydra over conf/<name>.yaml, errors of use on one line.

    A refusal exits with 2, an interruption with 130. Whatever is no refusal keeps its traceback;
    HYDRA_FULL_ERROR=1 shows it for refusals too.
    """

    def decorate(main):
        @functools.wraps(main)
        def run_job(cfg: DictConfig):
            if in_sweep() and "trainer" in cfg:
                from rlhf_recipes import sweep

                return sweep.job(main, cfg)
            with _OneLine(), _no_empty_folder():  # inside Hydra, which would announce the failure on a line of its own
                if "trainer" in cfg and cfg.preflight.only:
                    from rlhf_recipes import preflight

                    return preflight.alone(cfg, name, list(HydraConfig.get().overrides.task))
                return _published(main, cfg, name) if cfg.get("publish") else main(cfg)

        @functools.wraps(main)
        def launch():
            _leave_script_folder()
            sys.excepthook = _print_traceback
            sys.argv[1:] = spelled_out(sys.argv[1:])
            with _OneLine(name):
                if any(argument.startswith("--exp") for argument in sys.argv[1:]):
                    raise ValueError("--experimental-rerun: reads a pickle, which can run code. Give the overrides.")
                hydra.main(version_base="1.3", config_path="../conf", config_name=name)(run_job)()

        return launch

    return decorate


def spelled_out(arguments: list[str]) -> list[str]:
    """The command line with `preflight=true` written as Hydra takes it: a node cannot be a switch as well."""
    return [re.sub(r"^preflight=(true|false)$", r"preflight.only=\1", each, flags=re.IGNORECASE) for each in arguments]


def _published(main, cfg: DictConfig, recipe: str):
    """`publish=true`: look whether it may be published, run the recipe, publish what it made."""
    from rlhf_recipes import hub, memory

    check(cfg, recipe)
    hub.check_ready(cfg, recipe)
    value = main(cfg)
    memory.forget_peak()  # the model, too: it is loaded again
    asked = hub.options(cfg, recipe)
    hub.tell(asked, hub.publish(asked))
    return value


def check(cfg: DictConfig, recipe: str | None = None) -> None:
    """Refuse what needs no library to be seen: unknown keys, wrong types, values left open, secrets.

    Args:
        recipe: whose primary config names the keys there are; None: that of the running command.

    Raises:
        ValueError: the first offence, naming its key as typed on the command line.
    """
    leaves = flatten(OmegaConf.to_container(cfg, resolve=False))
    _refuse_unknown([key for key, _ in leaves], recipe or _running())
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{key}: required, but not set. Add {key}=<value> to the command.")
    guard.refuse_secrets_of(cfg)
    for key, value in leaves:
        rule = KEYS.get(key) or KEYS.get(key.rpartition(".")[0] + ".*")
        if rule and not (isinstance(value, str) and "${" in value):
            check_value(key, value, rule)
    if "publish" in cfg and cfg.publish != (cfg.repo_id is not None):
        raise ValueError(f"publish={str(cfg.publish).lower()}: goes with repo_id=<user/name>. Give both, or none.")
    if cfg.get("publish") and in_sweep():
        raise ValueError("publish=true: not in a sweep. Publish its best job: python recipes/publish.py run=<job>.")
    if OmegaConf.select(cfg, "trainer.push_to_hub"):
        raise ValueError(
            "trainer.push_to_hub=true: would upload every checkpoint as it is. Use publish=true repo_id=<user/name>, "
            "which proves what it uploads."
        )
    quantization = OmegaConf.select(cfg, "quantization._target_") or ""
    if quantization.endswith("BitsAndBytesConfig") and not _installed("bitsandbytes"):
        raise ValueError(
            "quantization: bitsandbytes is not installed. pip install bitsandbytes, or add quantization=none."
        )


def check_value(key: str, value: Any, rule: Any) -> None:
    """Refuse a value that is not of the type `rule`, or not one of the words of the tuple `rule`.

    Raises:
        ValueError: names the key as typed.
    """
    if isinstance(rule, tuple):
        if value not in rule:
            raise ValueError(f"{key}={value}: not one of {', '.join(rule)}{nearest(str(value), rule)}")
    elif (isinstance(value, bool) and rule is not bool) or not isinstance(value, rule):
        names = getattr(rule, "__name__", str(rule)).removeprefix("int | float").split(" | ")
        kind = " or ".join(WORDS[name or "float"] for name in names)
        raise ValueError(f"{key}={'null' if value is None else value}: must be {kind}. Change or quote it.")


def build(node: DictConfig, where: str, **derived) -> Any:
    """Instantiate the class that `node._target_` names, after checking every key against it.

    Args:
        node: `_target_` plus arguments under the class's own names.
        where: the node's key on the command line, for messages (`trainer`).
        derived: values for arguments that the node leaves unset.

    Raises:
        ValueError: a key the class does not have, with the nearest one that it has, or a value of a wrong type.
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
            raise ValueError(f"{where}.{key}: {node._target_} has no such field{nearest(key, known)}")
        if not fits(value, known[key]):
            expected = getattr(known[key], "__name__", None) or str(known[key]).replace("typing.", "")
            raise ValueError(f"{where}.{key}={value}: {node._target_} takes {expected} here, not {_kind(value)}.")
    # Hydra's instantiate converts nothing here that `to_container` has not converted, and turns errors of the class
    # into its own; a plain call keeps them readable.
    try:
        return target(**{**{k: v for k, v in derived.items() if k in known}, **given})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {node._target_} refuses it: {_first_line(error)}") from error


def import_function(reference: str, where: str) -> Any:
    """The function behind `module:function`; modules of the current folder count.

    Args:
        where: the key on the command line, for messages.

    Raises:
        ValueError: there is none.
    """
    import importlib

    module, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}={reference}: cannot be imported ({error}). Give module:function.") from error


def flatten(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts as (dotted key, value)."""
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [leaf for key, value in node.items() for leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key))]


def nearest(word: str, known) -> str:
    """`; did you mean 'beta'?`, or a full stop when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else "."


class _OneLine:
    """Turn errors of use into one line on stderr and an exit code; let everything else through."""

    def __init__(self, config_name: str | None = None):
        self.config_name = config_name

    def __enter__(self):
        if self.config_name:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines
        return self

    def __exit__(self, kind, error, trace):
        if error is None or WANTS_TRACEBACK:
            return False
        if isinstance(error, BrokenPipeError):  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE
        if isinstance(error, KeyboardInterrupt):
            below = "\n" if sys.stderr.isatty() else ""  # the progress line is still being written
            said = str(error) or "Interrupted. The same command continues from the last checkpoint."
            print(f"{below}{text.line(secrets.redact(said))}", file=sys.stderr)
            sys.exit(130)
        line = as_refusal(error, self.config_name)
        if line is None:
            return False
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def _no_empty_folder():
    """Hydra makes the run's folder before the recipe starts: where the recipe leaves nothing in it, it goes."""
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            Path(HydraConfig.get().runtime.output_dir).rmdir()


def as_refusal(error: BaseException, config_name: str | None) -> str | None:
    """What an error of use says on one line, without secrets and control characters; None for any other error."""
    said = _refusal(error, config_name)
    return said and text.line(" ".join(secrets.redact(said).split()))


def _refusal(error: BaseException, config_name: str | None) -> str | None:
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _unknown_key(error, config_name) or _not_taken(error) or str(error)
    if isinstance(error, ValueError) and raised_here(error):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}. What was saved before is untouched."
    if any(sign in str(error) for sign in UNWRITTEN):
        return (
            f"a file could not be written ({_first_line(error).rstrip('.')}): the disk is full or read-only. What was "
            "saved before is untouched; free space, then run the same command again."
        )
    return None


def raised_here(error: BaseException) -> bool:
    package = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and package in Path(frames[-1].filename).resolve().parents


def _unknown_key(error: Exception, config_name: str | None) -> str | None:
    found = re.search(r"Could not override '([^']+)'", str(error))
    if not found:
        return None
    key = found.group(1)
    detail = str(error.__cause__ or "").splitlines()
    if detail and not re.search(r"is not in struct|not in '\w+Config'", detail[0]):
        return f"{key}: {detail[0]}."
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
        known = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
    leaves = [leaf for leaf, _ in flatten(known)]
    return f"{key}: there is no such key{nearest(key, leaves + list(known))} `--help` lists the keys."


def _not_taken(error: Exception) -> str | None:
    found = re.match(r"Error merging override (\S+)", str(error))
    reason = found and _first_line(error.__cause__ or error)
    return found and f"{found.group(1)}: {reason}."


def _unknown_option(error: Exception) -> str:
    lines = str(error).splitlines()
    wanted = re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']+)'", str(error))
    if not wanted:
        return lines[0]
    group, option = wanted.groups()
    # The message lists the files of one folder; those of ours may lie deeper (experiment=pipeline/demo).
    options = {line.strip() for line in lines if line.startswith("\t") and "provider=" not in line}
    options |= {str(file.relative_to(CONF / group).with_suffix("")) for file in (CONF / group).rglob("*.yaml")}
    options = sorted(options - {*PARTS})
    listed = ", ".join(options) or "none"
    return f"{group}={option}: there is no such option{nearest(option, options)} Options: {listed}."


def _refuse_unknown(keys: list[str], recipe: str | None) -> None:
    """A file under conf/experiment/, or `+key=value`, may bring keys that nothing reads."""
    if recipe is None:
        return
    own = [OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False) for name in (recipe, "run")]
    groups = {group for entry in own[0].pop("defaults") if isinstance(entry, dict) for group in entry}
    known = [key for node in own for key, _ in flatten(node) if not key.startswith("hydra.")]
    known += [f"model.{key}" for key in ModelConfig.__dataclass_fields__]
    for key in keys:
        open_group = key.partition(".")[0] in groups - {"model"}  # checked against the class, or by rlhf_recipes.data
        if not open_group and not any(f"{name}.".startswith(f"{key}.") for name in known):
            raise ValueError(f"{key}: recipes/{recipe}.py has no such key{nearest(key, [*known, *groups])}")


def _running() -> str | None:
    return HydraConfig.get().job.config_name if HydraConfig.initialized() else None


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def in_sweep() -> bool:
    """Whether this is one of several jobs (-m)."""
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _leave_script_folder() -> None:
    # `python recipes/dpo.py` puts recipes/ first on the path, where evaluate.py would pass for the package `evaluate`;
    # `python -m` puts the current folder there, and so would the processes that libraries start.
    first = Path(sys.path[0] or ".").resolve()
    script = first == Path(sys.argv[0]).resolve().parent and (first / "pipeline.py").exists()
    if script or (first == Path.cwd() and first != Path(__file__).parents[1]):
        sys.path.pop(0)
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def _print_traceback(kind, error, trace) -> None:
    """Of a bug: an exception's message may hold what was in the environment."""
    print(text.shown(secrets.redact("".join(traceback.format_exception(kind, error, trace)))), end="", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _kind(value: Any) -> str:
    return "null" if value is None else f"the {type(value).__name__} '{value}'"
