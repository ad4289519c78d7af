"""The modules that `lora` and adapters name, against those of a model whose weights nobody has read yet."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rlhf_recipes import embedded, same_weights
from rlhf_recipes.adapter_files import shapes
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.references import ADAPTER_CONFIG, WEIGHTS
from rlhf_recipes.run_folder import read_json
from rlhf_recipes.text import line

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

# Arguments of PEFT that name modules; those of a pattern by an expression for the end of their names.
NAMING = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
# What of two configs must agree for an adapter of the one to fit the other.
COMPARED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip
# The matrices of a LoRA layer, and which of their sizes is which of the layer's: (r, in), (out, r).
SIZES = {"A.weight": ("in_features", 1), "B.weight": ("out_features", 0)}


def named(lora: "PeftConfig") -> dict[str, list]:
    """What `lora` names of the model: modules by the argument that names them, and layers by their numbers."""
    found = {key: getattr(lora, key, None) for key in (*NAMING, "layers_to_transform")}
    return {
        key: [value] if isinstance(value, str | int) else sorted(value)
        for key, value in found.items()
        if value is not None and value != "all-linear" and value not in ({}, [])
    }


def check(model: DictConfig, lora: "PeftConfig", network: "PreTrainedModel") -> None:
    """Refuse modules and layers that are not there: PEFT leaves them out in silence as long as it finds others.

    Args:
        network: the model, with or without weights.

    Raises:
        Refusal: the first of them, with the name nearest to it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D
    takes_lora = {name: isinstance(module, kinds) for name, module in network.named_modules() if name}
    takes_lora["score"] = True  # of a reward model
    endings = sorted({name.rpartition(".")[2] for name, taken in takes_lora.items() if taken})
    for key, words in named(lora).items():
        if key == "layers_to_transform":
            count = network.config.get_text_config().num_hidden_layers
            for layer in words:
                if layer >= count:
                    raise Refusal(f"lora.{key}: {model.id} has layers 0 to {count - 1}, not {layer}. Change it.")
            continue
        is_pattern = isinstance(getattr(lora, key), str | dict)
        own = key == "target_modules" and model.get("lora_targets", "all-linear") != "all-linear"
        where = "model.lora_targets" if own else f"lora.{key}"
        for word in words:
            found = [name for name in takes_lora if _is_named(word, name, where, key, is_pattern)]
            if not found:
                near = nearest(word.rpartition(".")[2], endings)
                raise Refusal(
                    f"{where}: {model.id} has no module {word}{near} Its layers end in {', '.join(endings)}."
                )
            if key == "target_modules" and not any(takes_lora[name] for name in found):
                raise Refusal(
                    f"{where}: {word} is no layer that LoRA can be put on. Choose from {', '.join(endings)}."
                )


def refuse_other_model(model: DictConfig) -> None:
    """Refuse a folder that holds another model than `model.id`, the name that adapters and cards would bear.

    Raises:
        Refusal: its config and that of the id, where that is at hand, differ.
    """
    folder = _at_hand(model.path) if model.path not in (None, "embedded") else None
    if folder is None:
        return
    known = _at_hand(model.id)
    theirs = embedded.SHAPE if model.id == embedded.PUBLIC_ID else _config(known) if known else {}
    ours = _config(folder)
    for key in COMPARED:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise Refusal(
                f"model.path={model.path}: has {key} {ours[key]}, and model.id={model.id} has {theirs[key]}. Say "
                "which model it is, for what is trained on it bears that name: model.id=<its public name>."
            )


def other_bases(model: DictConfig, adapters: Iterable[str | Path]) -> dict[str, str | None]:
    """What adapters call their base, by their folders, of those that call it other than `model.id`."""
    bases = {str(each): read_json(Path(each) / ADAPTER_CONFIG).get("base_model_name_or_path") for each in adapters}
    return {adapter: base for adapter, base in bases.items() if base != model.id}


def compare(model: DictConfig, bases: dict[str, str | None], network: "PreTrainedModel", path: str) -> None:
    """Compare adapters of other names of the base with the model, and say that the rest is the user's word.

    Args:
        bases: of `other_bases`.
        network: the model, with or without weights.
        path: of the model, a folder or an id of the Hub.

    Raises:
        Refusal: an adapter has a module that is not in the model, or is of another shape there; or the base that it
            names is at hand, and its config or its weights are others.
    """
    own = _at_hand(path)
    layers, ours = dict(network.named_modules()), network.config.get_text_config().to_dict()
    for adapter, base in bases.items():
        folder = _at_hand(str(base))
        theirs = _config(folder) if folder else {}
        for key in COMPARED:
            if key in theirs and key in ours and theirs[key] != ours[key]:
                raise Refusal(
                    f"model.adapter_base=same: {base}, the base of {adapter}, has {key} {theirs[key]}, and {model.id} "
                    f"has {ours[key]}. Choose the model it belongs to."
                )
        for name, shape in shapes(Path(adapter) / WEIGHTS).items():
            if ".lora_" not in name:  # a module that was trained in full
                continue
            path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            size, axis = SIZES.get(part, ("", 0))
            has = getattr(layers[path], size, shape[axis]) if path in layers else None
            if has != shape[axis]:
                what = f"{size}={has}" if has else "no such module"
                raise Refusal(
                    f"model.adapter_base=same: {adapter} has {name} of shape {list(shape)}, {model.id} has {what}. "
                    "Choose the model it belongs to."
                )
        compared, differs = same_weights.compare(own, folder) if own and folder else (0, None)
        if differs:
            raise Refusal(
                f"model.adapter_base=same: {base}, the base of {adapter}, has other weights than {model.id}: "
                f"{differs}. Choose the model it belongs to."
            )
        and_config = " and the config of that base" if theirs else ""
        weights = f"{compared} of its matrices were compared" if compared else "the weights were not compared"
        print(
            f"{adapter}: names the base {line(str(base))}, taken for {model.id} as you say (model.adapter_base=same). "
            f"Its modules{and_config} fit; {weights}.",
            flush=True,
        )


def _at_hand(base: str) -> Path | None:
    """The folder of a model here or in the Hub's cache; None where there is no config.json."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    found = Path(base) / "config.json"
    if not found.is_file():
        with suppress(HFValidationError):  # a path of another machine
            cached = try_to_load_from_cache(base, "config.json")
            found = Path(cached) if isinstance(cached, str) else found
    return found.parent if found.is_file() else None


def _config(folder: Path) -> dict:
    """Its config.json, of its text part where it has several."""
    config = read_json(folder / "config.json")
    return config.get("text_config", config)


def _is_named(word: str, name: str, where: str, key: str, is_pattern: bool) -> bool:
    """Whether PEFT takes `word` for the module `name`."""
    if not is_pattern:
        return name == word or name.endswith(f".{word}")
    before = r"(.*\.)?" if key.endswith("pattern") else ""
    try:
        return re.fullmatch(f"{before}({word})", name) is not None
    except re.error as error:
        raise Refusal(f"{where}: {word} is no regular expression ({error}). Change it.") from error
