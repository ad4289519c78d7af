"""What the files of an adapter bring: tensors of its own, and nothing that runs, fetches or changes the base.

A base is loaded once; policy, reference, reward models and the runs that are compared are adapters on it, each on in
turn. PEFT puts every tensor of an adapter's file where its name says, into the base too, and some settings rewrite the
base when the adapter is put on it: it would stay so for all others, and for the base itself in a comparison.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes import signals
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.text import line

# Starts of LoRA that take their weights out of the base's.
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings under which PEFT changes the base's layers or weights.
CHANGES_BASE = ("layer_replication", "kasa_config")
# Kinds that are no adapter beside the base: they load others that they name, or train the base's own weights.
NO_ADAPTERS = ("XLORA", "OSF")
# How the tensors of a kind are called where its own name does not begin theirs.
PREFIXES = {"ADALORA": "lora_", "LOHA": "hada_", "VERA": "vera_", "PVERA": "pvera_"}
HEADS = ("score", "classifier")  # of a reward model, which PEFT keeps beside the base's
BESIDE = ("token_adapter", "trainable_tokens_")  # rows of an embedding, kept in the same way
# What PEFT reads as regular expressions, of the names of modules, and names such as models have.
PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
MODULES = (
    "lm_head", "score", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0",
    "model.layers.0.self_attn.q_proj", "model.layers.31.mlp.down_proj", "model.language_model.layers.7.self_attn",
    "model.vision_tower.encoder.layers.11.mlp.fc1",
)  # fmt: skip
PATTERN_SECONDS = 1.0  # of computing, for all of them; those that people write take milliseconds
MOST_SHOWN = 80  # characters of a name


def flaw(config: dict[str, Any], weights: Path) -> str | None:
    """Why an adapter is not loaded, and what to do; None where it is.

    Args:
        config: its adapter_config.json.
        weights: its adapter_model.safetensors.

    Raises:
        Refusal: the weights cannot be read.
    """
    kind = config.get("peft_type") or "LORA"
    if config.get("megatron_config") is not None:
        return "its megatron_config names a module that PEFT would import. Take it out of adapter_config.json."
    if not isinstance(kind, str) or kind.upper() in NO_ADAPTERS or not _is_known(kind):
        return f"peft_type={_shown(kind)}: is no kind of adapter that is put beside a base. Save it as LoRA."
    if found := _changes_base(config):
        return f"{found} changes the base, which others stand on. Convert the adapter to plain LoRA."
    if found := _endless(config):
        return f"{found}. List the modules by their names."
    tensors = shapes(weights)
    for name in tensors:
        if _is_the_bases(name, kind.upper(), config):
            return (
                f"holds {_shown(name)}, which would be put in place of the base's, which others stand on. Save the "
                "adapter without it (save_embedding_layers=False; lora.bias=none)."
            )
    return _too_high(config, tensors) if kind.upper() == "LORA" else None


def shapes(weights: Path) -> dict[str, list[int]]:
    """The tensors of a safetensors file, by its header.

    Raises:
        Refusal: it is none, is cut off, or its header does not fit what follows.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise Refusal(f"{weights}: is cut off or damaged. Copy it again, or train it again.") from error


def _is_known(kind: str) -> bool:
    """Whether PEFT has such a kind; only of a rare one PEFT is asked, which takes seconds to import."""
    if kind in ("LORA", *PREFIXES):
        return True
    from peft import PeftType

    return kind in PeftType.__members__


def _changes_base(config: dict[str, Any]) -> str | None:
    start = str(config.get("init_lora_weights", True))
    if start.lower().startswith(REWRITES_BASE):
        return f"init_lora_weights={_shown(start)}"
    return next((f"{key}={_shown(config[key])}" for key in CHANGES_BASE if config.get(key)), None)


def _endless(config: dict[str, Any]) -> str | None:
    """What is wrong with its expressions: one is none, or the name of a module occupies one without end."""
    says = f"its expressions for names of modules take more than {PATTERN_SECONDS:g} s"
    try:
        with signals.ended(PATTERN_SECONDS, says):
            for key in PATTERNS:
                for pattern in _expressions(key, config.get(key)):
                    for name in MODULES:
                        pattern.fullmatch(name)
    except Refusal as refusal:
        return str(refusal)
    return None


def _expressions(key: str, given: Any) -> Iterator[re.Pattern]:
    """What PEFT makes of a setting; names without a sign of an expression are left out.

    Raises:
        Refusal: one is no expression.
    """
    whole = key in ("target_modules", "exclude_modules")  # as a list these are endings of names
    listed = given if isinstance(given, list | dict) and not whole else []
    for each in [given] if isinstance(given, str) else map(str, listed):
        if re.fullmatch(r"[\w.]+|all-linear", each):
            continue
        try:
            yield re.compile(each if whole else rf"(.*\.)?({each})($|\..*)")
        except (re.error, RecursionError, OverflowError) as error:
            raise Refusal(f"{key}: {_shown(each)} is no regular expression ({first_line(error)})") from error


def _is_the_bases(name: str, kind: str, config: dict[str, Any]) -> bool:
    """Whether a tensor has the name of a weight of the base, not of what stands beside one."""
    path = f".{name.removeprefix('base_model.model.')}."
    own = (PREFIXES.get(kind, f"{kind.lower()}_"), *BESIDE)
    if any(f".{prefix}" in path for prefix in own):
        return False
    saved = config.get("modules_to_save")
    beside = (*HEADS, *(map(str, saved) if isinstance(saved, list) else ()))
    if any(f".{module}." in path for module in beside):
        return False
    return kind == "LORA" or name.endswith((".weight", ".bias"))


def _too_high(config: dict[str, Any], tensors: dict[str, list[int]]) -> str | None:
    """A rank that no matrix has, and for which memory would be taken first."""
    pattern = config.get("rank_pattern") or {}
    named = [config.get("r", 8), *(pattern.values() if isinstance(pattern, dict) else ())]
    if not all(type(rank) is int for rank in named):
        return f"r={_shown(named[0])}: its ranks must be whole numbers. Mend adapter_config.json."
    has = max((shape[0] for name, shape in tensors.items() if ".lora_A." in name and shape), default=None)
    highest = max(named[1:] if _has_ranks_for_all(config) else named)
    if has is None or highest <= has:
        return None
    return f"names the rank {highest}, and its matrices have up to {has}. Write that into adapter_config.json."


def _has_ranks_for_all(config: dict[str, Any]) -> bool:
    """Whether `rank_pattern` has one for each of the modules that are listed, so that `r` is that of none."""
    pattern, targets = config.get("rank_pattern"), config.get("target_modules")
    if not (isinstance(pattern, dict) and isinstance(targets, list) and targets):
        return False
    expressions = list(_expressions("rank_pattern", pattern))
    with signals.ended(PATTERN_SECONDS, "rank_pattern: takes too long"):
        return all(
            any(f".{target}".endswith(f".{name}") for name in pattern) or any(e.fullmatch(target) for e in expressions)
            for target in map(str, targets)
        )


def _shown(value: Any) -> str:
    said = line(value)
    return said if len(said) <= MOST_SHOWN else f"{said[:MOST_SHOWN]}…"
