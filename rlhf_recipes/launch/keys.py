"""What the command line takes: keys, types and words, checked before anything is loaded."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_recipes import guard
from rlhf_recipes.commands import command
from rlhf_recipes.config import CONF, ModelConfig, check_value, flatten, in_sweep
from rlhf_recipes.errors import Refusal, nearest

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
# What the extra `audit` installs, and the module of each.
AUDIT_PACKAGES = {
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "networkx": "networkx",
    "krippendorff": "krippendorff",
}


def check(cfg: DictConfig, recipe: str | None = None) -> None:
    """Refuse what needs no library to be seen: unknown keys, wrong types, values left open, secrets.

    Args:
        recipe: whose primary config names the keys there are; None: that of the running command.

    Raises:
        Refusal: the first offence, naming its key as typed on the command line.
    """
    leaves = flatten(OmegaConf.to_container(cfg, resolve=False))
    _refuse_unknown([key for key, _ in leaves], recipe or _running())
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise Refusal(f"{key}: required, but not set. Add {key}=<value> to the command.")
    try:
        guard.refuse_secrets_of(cfg)
    except OmegaConfBaseException as error:  # a reference to a key that is not there
        raise Refusal(str(error)) from error
    for key, value in leaves:
        rule = KEYS.get(key) or KEYS.get(key.rpartition(".")[0] + ".*")
        if rule and not (isinstance(value, str) and "${" in value):
            check_value(key, value, rule)
    if "publish" in cfg and cfg.publish != (cfg.repo_id is not None):
        raise Refusal(f"publish={str(cfg.publish).lower()}: goes with repo_id=<user/name>. Give both, or none.")
    if cfg.get("publish") and in_sweep():
        raise Refusal(f"publish=true: not in a sweep. Publish its best job: {command('publish')} run=<job>.")
    if OmegaConf.select(cfg, "trainer.push_to_hub"):
        raise Refusal(
            "trainer.push_to_hub=true: would upload every checkpoint as it is. Use publish=true repo_id=<user/name>, "
            "which proves what it uploads."
        )
    quantization = OmegaConf.select(cfg, "quantization._target_") or ""
    if quantization.endswith("BitsAndBytesConfig") and not _installed("bitsandbytes"):
        raise Refusal(
            "quantization: bitsandbytes is not installed. pip install bitsandbytes, or add quantization=none."
        )
    if (recipe or _running()) == "audit":
        for package, module in AUDIT_PACKAGES.items():
            if not _installed(module):
                raise Refusal(f'The audit needs {package}. pip install "rlhf-recipes[audit]".')


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
            raise Refusal(f"{key}: recipes/{recipe}.py has no such key{nearest(key, [*known, *groups])}")


def _running() -> str | None:
    return HydraConfig.get().job.config_name if HydraConfig.initialized() else None


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
