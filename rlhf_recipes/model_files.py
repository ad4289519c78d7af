"""The files of a model, others' mostly: where they lie, what is fetched, and that they run nothing here."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_recipes import embedded, places
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.text import line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


# What transformers says of a config.json without a model type, or with one of a later time.
OF_NO_KIND = ("does not recognize this architecture", "Unrecognized model in")
# Of a config.json, ten times what the largest models have and more.
LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 10**6, "intermediate_size": 10**7, "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4, "head_dim": 10**5, "vocab_size": 10**8, "num_experts": 10**5, "num_labels": 10**6,
}  # fmt: skip


def folder_or_id(model: DictConfig) -> str:
    """Where the weights are: the prepared embedded model, a local folder, or the Hub id."""
    if model.path == "embedded":
        return str(embedded.prepare())
    return model.path or model.id


def load_config(model: DictConfig) -> "PretrainedConfig":
    """What the model's config.json says, of its text part where it has several; no weights.

    Raises:
        Refusal: the model cannot be found or fetched, or names code that would be run.
    """
    from transformers import AutoConfig

    return read(model, AutoConfig.from_pretrained).get_text_config()


def load_generation_config(model: DictConfig) -> "GenerationConfig":
    """What the model will be loaded with: its generation_config.json, or without one what its config.json says.

    Raises:
        Refusal: the model cannot be found or fetched.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder_or_id(model), revision=model.revision)
    except OSError:
        shape = read(model, AutoConfig.from_pretrained)
        return GenerationConfig.from_model_config(shape)


def download_bytes(model: DictConfig) -> int:
    """What is to be fetched before the model can be loaded: its weights on the Hub, where the cache lacks them.

    Raises:
        Refusal: they cannot be found.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    path = folder_or_id(model)
    if Path(path).is_dir() or _is_cached(model, path):
        return 0
    try:
        files = HfApi().model_info(path, revision=model.revision, files_metadata=True).siblings or []
    except (OSError, HTTPError) as error:
        raise Refusal(f"model.id={model.id}: {_hub_refusal(error)}") from error
    sizes = {file.rfilename: file.size or 0 for file in files if file.rfilename.endswith(".safetensors")}
    parts = [name for name in sizes if re.match(r"model(-\d+-of-\d+)?\.safetensors$", name)]  # others are copies
    return sum(sizes[name] for name in parts or sizes)


def _is_cached(model: DictConfig, path: str) -> bool:
    """Whether the Hub's cache holds all weights: one file, or an index and each shard that it names."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(path, name, revision=model.revision)
        return found if isinstance(found, str) else None

    if cached("model.safetensors"):
        return True
    index = cached("model.safetensors.index.json")
    shards = json.loads(Path(index).read_text(encoding="utf-8")).get("weight_map") or {} if index else {}
    return bool(shards) and all(map(cached, set(shards.values())))


def read(model: DictConfig, load: Callable, **kwargs) -> Any:
    """What `load`, a `from_pretrained` of transformers, makes of the model's files.

    Raises:
        Refusal: the model cannot be found, fetched or read, is larger than any, or names code that would be run.
    """
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from transformers import PreTrainedConfig, dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # what a library loads by itself is refused, too, not asked about
    path = folder_or_id(model)
    if model.path not in (None, "embedded") and not Path(path).is_dir():
        raise Refusal(f"model.path={model.path}: no such folder. Give a folder with a model, or leave it out.")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise Refusal(f"model.path={path}: no config.json in it, so no model. Give a folder saved by transformers.")
    key = "model.path" if Path(path).is_dir() else "model.id"
    if not Path(path).is_dir():
        if not places.on_hub(path, "model.id", bare=True):
            raise Refusal(f"model.id={path}: no folder here, and no id of the Hub. Check it; a folder may be given.")
        places.say_from_hub("model", path)
    try:
        if not Path(path).is_dir():
            _ask_hub(path, model.revision)
        refuse_sizes(_config_in(path), key, path)
        found = load(path, revision=model.revision, trust_remote_code=model.get("trust_remote_code") is True, **kwargs)
        if isinstance(found, PreTrainedConfig):
            refuse_sizes(found.to_dict(), key, path)
            if not model.get("trust_remote_code"):
                refuse_kernels(found, key, path)
        return found
    except ValueError as error:
        if isinstance(error, Refusal):
            raise
        if any(sign in str(error) for sign in OF_NO_KIND):
            kind = line(str(_config_in(path).get("model_type")))
            raise Refusal(
                f"{key}={path}: this transformers does not know its kind (model_type: {kind}). Update it, or choose "
                "another model."
            ) from error
        if "backend tokenizer" in str(error):
            raise Refusal(
                f"{key}={path}: has no tokenizer that can be read. Put its files beside the weights (tokenizer.json)."
            ) from error
        if "trust_remote_code" not in str(error):
            raise
        raise Refusal(
            f"{key}={path}: brings Python code of its own, which would run here (auto_map). Read it; if you trust "
            "it, add model.trust_remote_code=true."
        ) from error
    except SafetensorError as error:
        said = first_line(error).rstrip(".")
        raise Refusal(f"{key}={path}: its weights are cut off or damaged ({said}). Fetch them again.") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise Refusal(
            f"{key}={path}: its weights are of other shapes than its config.json says (vocab_size, say). Save both "
            "again."
        ) from error
    except (OSError, HTTPError) as error:
        if Path(path).is_dir():
            raise Refusal(f"model.path={path}: {first_line(error)}") from error
        raise Refusal(f"model.id={model.id}: {_hub_refusal(error)}") from error


def read_weights(model: DictConfig, auto_class: type, heads: tuple[str, ...] = (), **kwargs) -> "PreTrainedModel":
    """`read` of a model with all of its weights.

    Raises:
        Refusal: as `read` and `whole`.
    """
    return whole(read(model, auto_class.from_pretrained, output_loading_info=True, **kwargs), where(model), heads)


def where(model: DictConfig) -> str:
    """Key and value of what names the files."""
    path = folder_or_id(model)
    return f"{'model.path' if Path(path).is_dir() else 'model.id'}={path}"


def whole(
    loaded: tuple["PreTrainedModel", dict[str, Any]], where: str, heads: tuple[str, ...] = ()
) -> "PreTrainedModel":
    """The model of a `from_pretrained` that was asked for its `output_loading_info`.

    Args:
        where: its key and value.
        heads: names of modules that may be new.

    Raises:
        Refusal: its files lack weights, which transformers has made random.
    """
    found, info = loaded
    lacks = sorted(name for name in info["missing_keys"] if name.partition(".")[0] not in heads)
    if lacks:
        names = ", ".join([*map(line, lacks[:3]), *["…"] * (len(lacks) > 3)])
        raise Refusal(
            f"{where}: its files lack {len(lacks)} of the model's weights, which would be random ({names}). Fetch or "
            "save it again."
        )
    return found


def _config_in(folder: str) -> dict:
    """What a folder's config.json says; nothing of an id of the Hub, and of what transformers refuses by itself."""
    file = Path(folder) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def refuse_sizes(config: dict, key: str, path: str) -> None:
    """Refuse a config.json of more than any model has, before a module is made for each.

    Raises:
        Refusal: it says so.
    """
    for part in (config, *(each for each in config.values() if isinstance(each, dict))):
        for name, most in LARGEST.items():
            size = part.get(name)
            if isinstance(size, int | float) and not size <= most:
                said = f"{name}={str(size)[:20]}"
                raise Refusal(f"{key}={path}: its config.json says {said}, more than any model has. Mend it.")


def refuse_kernels(config: "PretrainedConfig", key: str, path: str) -> None:
    """Refuse a config.json that names a kernel on the Hub, which transformers would fetch and run.

    Raises:
        Refusal: it does.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for kind in ("attn", "experts"):
            named = str(getattr(part, f"_{kind}_implementation", None))
            if "/" in named:
                raise Refusal(
                    f"{key}={path}: its config.json names a kernel on the Hub, code that would be run here "
                    f"({kind}_implementation: {line(named)}). Take it out."
                )


def _ask_hub(repo: str, revision: str | None) -> None:
    """Raise at once for a model that can be neither fetched nor found in the cache; `transformers` would retry."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str)
    if not cached and not constants.HF_HUB_OFFLINE:
        HfApi().auth_check(repo)


def _hub_refusal(error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause = error.__cause__ or error
    missing = isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError)  # its subclass
    if missing or "is not a valid model identifier" in str(error):
        return "the Hub has no such model, or your token may not see it. Check the name; a folder goes to model.path."
    if isinstance(cause, GatedRepoError) or "gated repo" in str(error):
        return "is gated. Accept its terms on its page, then `hf auth login` (or HF_TOKEN)."
    if "does not appear to have a file named config.json" in str(error):
        return (
            "the repository has no config.json, so no model that transformers reads (an adapter, or GGUF?). Name the "
            "model itself."
        )
    if isinstance(cause, RevisionNotFoundError) or "is not a valid git identifier" in str(error):
        return "the Hub's model has no such revision. Check model.revision."
    if HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE=1 bars the Hub. Unset it, or use model=smollm2_135m."
    return (
        "the Hub cannot be reached and the cache does not hold it. Check the network, or use model=smollm2_135m, "
        "which needs none."
    )
