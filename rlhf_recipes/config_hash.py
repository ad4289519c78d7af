"""What of a config says what a run computes, and its hash: what goes on from what is there goes by it."""

import hashlib
import json
from typing import Any

from rlhf_recipes.config import flatten

# Where a run lies, whether it may continue, by which forward and in which parts say nothing about what it computes.
_NOT_COMPUTED = (
    *("run_name", "resume", "overwrite", "sweep", "preflight", "allow_target"),
    *("fast_forward", "shards", "annotator", "host", "port"),
)
# Of `trainer`, in the same way.
_NOT_TRAINED = ("report_to", "vllm_server_base_url", "vllm_server_api_key_env", "vllm_server_timeout")
# Keys that earlier runs lack, at the values with which these compute the same.
_ADDED = {
    "model.adapter_base": None,
    "judge.adapter_base": None,
    "model.chat_template_kwargs": {},
    "generator.chat_template_kwargs": {},
    "judge.chat_template_kwargs": {},
    "scored_pairs": None,
    "judging.votes": False,
    "judging.asked_again": 0.25,
    "baseline_answers": None,
    "generate.pairs": "all",
    "earlier": [],
    "first": None,
    "reference": None,
    "data.text": "auto",
    "data.preference": "auto",
    "data.ignore": [],
    "benchmark": None,
    "thresholds.min_gold_gain": 0.0,
    **{
        f"data.columns.{key}": key
        for key in ("label", "system", "input", "history", "first", "second", "preference", "margin")
    },
}


def config_sha256(config: dict) -> str:
    """Hash of what a run computes: the config without its place and name."""
    return hashlib.sha256(json.dumps(computed(config), sort_keys=True, default=str).encode()).hexdigest()


def computed(config: dict) -> dict:
    """The config without what says nothing about the result: unless it is strict, the doctor only reads, and a tracker
    is only told."""
    watched = () if config.get("doctor") == "strict" else ("doctor",)
    published = ("publish", "repo_id") if "publish" in config else ()
    kept = {key: value for key, value in config.items() if key not in (*_NOT_COMPUTED, *watched, *published)}
    if "trainer" in kept:
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key not in _NOT_TRAINED}
    for path, value in _ADDED.items():
        kept = _without(kept, path.split("."), value)
    if (kept.get("data") or {}).get("format") == "auto":
        kept["data"] = {**kept["data"], "format": "pairs"}  # the default of runs that lack the keys above
    return kept


def other_setting(stored: dict, given: dict) -> tuple[str, Any, Any] | None:
    """(dotted key, its stored value, the given one) of the first setting, by name, in which two configs compute
    something else; None where no key tells."""
    before, after = (dict(flatten(computed(config))) for config in (stored, given))
    differs = (key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key))
    return next(((key, before.get(key), after.get(key)) for key in differs), None)


def _without(config: dict, path: list[str], value: Any) -> dict:
    """The config without the key at a path, where it has this value."""
    key, *rest = path
    if key not in config or (rest and not isinstance(config[key], dict)):
        return config
    if rest:
        return {**config, key: _without(config[key], rest, value)}
    return config if config[key] != value else {each: held for each, held in config.items() if each != key}
