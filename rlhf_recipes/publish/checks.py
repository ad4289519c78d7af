"""What is refused before anything is uploaded: a broken or unchanged adapter, one that got worse, secrets, sizes."""

import json
import math
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes import adapter_files, models
from rlhf_recipes.config import flatten
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.publish import contents, manifest, scan
from rlhf_recipes.references import adapter_sha256
from rlhf_recipes.run_folder import read_result
from rlhf_recipes.stats import format_estimate

LOWER_IS_BETTER = ("perplexity",)
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def options(cfg) -> None:
    """Refuse keys that do not go together, before anything is read.

    Raises:
        Refusal: names the key.
    """
    if (cfg.repo_id is None) == (cfg.folder is None):
        raise Refusal("repo_id: give repo_id=<user/name>, or folder=<path> for a dry run that uploads nothing.")
    if cfg.repo_id is not None:
        repo_id(cfg.repo_id)
    if cfg.folder is not None:
        for key, default in (("public", False), ("tag", None), ("create_pr", False), ("commit_message", None)):
            if cfg[key] != default:
                raise Refusal(f"{key}={cfg[key]}: folder={cfg.folder} uploads nothing. Leave one of them out.")
    for key in ("tag", "public"):
        if cfg.create_pr and cfg[key]:
            raise Refusal(f"{key}={cfg[key]}: not for a pull request, which is yet to be merged. Leave one out.")
    for key in ("revision", "tag", "commit_message"):
        if cfg[key] is not None and not cfg[key].strip():
            raise Refusal(f"{key}=: empty. Leave it out, or give it a value.")
    if cfg.pairs is not None:
        for key in ("merged", "evaluation"):
            if cfg[key]:
                raise Refusal(f"{key}={cfg[key]}: is for a model; pairs={cfg.pairs} is a data set. Leave it out.")
    for key in ("max_merge_drift", "max_base_drift", "max_file_gib"):
        if not 0 < cfg[key] < math.inf:
            raise Refusal(f"{key}={cfg[key]}: must be above 0.")


def repo_id(given: str) -> None:
    """Refuse a name that the Hub does not take."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(given)
    except HFValidationError as error:
        said = first_line(error).partition(":")[0].rstrip(".")
        raise Refusal(f"repo_id={given}: {said}. Use <user>/<name>.") from error
    if not REPO_ID.fullmatch(given):
        raise Refusal(f"repo_id={given}: must be <user>/<name>. Add the name of its owner.")


def source(source: contents.Source, force: bool) -> None:
    """Refuse a run that is not worth publishing, or not what its result says. Reads weights; loads no model.

    Raises:
        Refusal: names the run and what is wrong with it.
    """
    where = f"{source.key}={source.dir}"
    for key, value in flatten(source.result):
        if isinstance(value, float) and not math.isfinite(value):
            raise Refusal(f"{where}: {key} in result.json is {value}: the training has diverged. Train it again.")
    if source.key == "pairs":
        _data(where, source)
    else:
        _weights(where, source)
        if not force:
            _worse(where, source.result)


def _data(where: str, source: contents.Source) -> None:
    if "funnel" not in source.result:
        raise Refusal(f"{where}: asked the judge alone (gate.only=true) and made no pairs. Name another run.")
    written = source.result["funnel"]["written"]
    for split, count in written.items():
        if not (source.dir / f"{split}.parquet").is_file():
            raise Refusal(f"{where}: {split}.parquet is missing. Restore it, or run recipes/cai.py again.")
        if split == "train_prefs" and not count:
            raise Refusal(f"{where}: has no pairs to train on. Make more with recipes/cai.py.")


def _weights(where: str, source: contents.Source) -> None:
    config, weights = (source.adapter / name for name in (contents.ADAPTER_CONFIG, contents.WEIGHTS))
    unsafe = [file.name for file in source.adapter.glob("*") if file.suffix in (".bin", ".pt", ".pkl", ".pth")]
    for file in (config, weights):
        if not file.is_file():
            hint = f" {unsafe[0]} is a pickle, which can run code." if unsafe else ""
            raise Refusal(f"{where}: no adapter/{file.name} in it.{hint} Train it again.")
    adapter, tokenizer = _json(where, config), source.adapter / "tokenizer_config.json"
    base = adapter.get("base_model_name_or_path")
    if adapter.get("megatron_config"):  # peft imports what stands beside it
        raise Refusal(f"{where}: adapter/{config.name} names code (megatron_config), which is not run. Remove it.")
    if tokenizer.is_file() and "auto_map" in _json(where, tokenizer):
        raise Refusal(f"{where}: adapter/{tokenizer.name} names code (auto_map), which is not run. Remove it.")
    if base != source.config["model"]["id"]:
        raise Refusal(
            f"{where}: the adapter is for the base {base}, and config.yaml says {source.config['model']['id']}. "
            "Restore the one that was changed."
        )
    dtype = models.compute_dtype(OmegaConf.create(source.config["model"]))
    models.build_quantization(OmegaConf.create(source.config["quantization"]), dtype)
    digest = adapter_sha256(source.adapter)
    if digest != source.result.get("adapter_sha256"):
        raise Refusal(
            f"{where}: adapter/{weights.name} is not the file that the run wrote (SHA-256 {digest[:12]}, not "
            f"{str(source.result.get('adapter_sha256'))[:12]}). Restore it, or train it again."
        )
    if flaw := adapter_files.flaw(adapter, weights):
        raise Refusal(f"{where}: the adapter is not published: {flaw}")
    if digest == (source.result.get("parent") or {}).get("adapter_sha256"):
        raise Refusal(f"{where}: the adapter is its parent's, unchanged. Train it first.")
    _tensors(where, weights, source.recipe)


def _json(where: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"{where}: adapter/{file.name} is not valid JSON. Restore it.") from error
    if not isinstance(content, dict):
        raise Refusal(f"{where}: adapter/{file.name} is no mapping. Restore it.")
    return content


def _tensors(where: str, weights: Path, recipe: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{where}: adapter/{weights.name} cannot be read ({error}). Train it again.") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Refusal(f"{where}: {name} is not finite. Train it again at a lower learning rate.")
    second = [tensor for name, tensor in tensors.items() if "lora_B" in name]  # B starts at zero
    if second and not any(tensor.any() for tensor in second):
        raise Refusal(f"{where}: the adapter changes nothing (every lora_B is zero). Train it first.")
    if recipe == "reward" and not any("score" in name for name in tensors):
        raise Refusal(f"{where}: the score head is missing, and without it rewards are random. Train it again.")


def _worse(where: str, result: dict[str, Any]) -> None:
    main = result["main"]
    gain = main["after"].value - main["before"].value
    if gain * (-1 if main["name"] in LOWER_IS_BETTER else 1) < 0:
        shown = f"{format_estimate(main['before'])} -> {format_estimate(main['after'])}"
        raise Refusal(
            f"{where}: {main['name']} is worse than before the training, {shown}. Publish it all the same with "
            "force=true."
        )
    if (result.get("doctor") or {}).get("verdict") == "broken":
        raise Refusal(f"{where}: the doctor's verdict is broken. Publish it all the same with force=true.")


def evaluation(folder: str | None, source: contents.Source, force: bool) -> tuple[dict | None, Path | None]:
    """What an evaluation says of this run, and its page.

    Returns:
        (the run's entry with `parent`, `metrics`, `verdict`; report.html), or (None, None) where none is named.

    Raises:
        Refusal: it is none, does not speak of this run with these weights, or says that it is worse than its parent.
    """
    if folder is None:
        return None, None
    where = f"evaluation={folder}"
    result = read_result(Path(folder)) or {}
    if "evaluation" not in result:
        raise Refusal(f"{where}: no finished run of recipes/evaluate.py. Name one, or leave it out.")
    found = result["evaluation"]
    tuned = {name: entry for name, entry in found["systems"].items() if "verdict" in entry}
    name = next((name for name, entry in tuned.items() if _same(entry["info"]["path"], source.dir)), None)
    if name is None:
        raise Refusal(f"{where}: speaks of {', '.join(tuned)}, not of run={source.dir}. Evaluate this one.")
    entry, now = tuned[name], source.result.get("adapter_sha256")
    if (measured := entry["info"].get("adapter_sha256")) != now:
        which = f"other weights of {name} (SHA-256 {str(measured)[:12]}, not {str(now)[:12]})"
        what = which if measured else "weights that it does not name"
        raise Refusal(f"{where}: speaks of {what}. Evaluate run={source.dir} again.")
    if entry["verdict"]["verdict"] == "worse" and not force:
        raise Refusal(
            f"{where}: its verdict on {name} is worse: {entry['verdict']['reasons'][0].rstrip('.')}. Publish it all "
            "the same with force=true."
        )
    contents.refuse_links(where, Path(folder))
    page = Path(folder) / "report.html"
    return {"name": name, "parent": found["parent"], **entry}, page if page.is_file() else None


def _same(path: str | None, folder: Path) -> bool:
    return path is not None and Path(path).resolve() == folder.resolve()


def place(folder: Path, inputs: list[Path | str | None], record: str | None) -> None:
    """Refuse a place for a dry run that holds anything but an earlier one, or is another folder of the command.

    Args:
        inputs: the run, and the evaluation.
        record: folder of what the command says of itself; the place may lie in it.

    Raises:
        Refusal: says what is there.
    """
    given = folder.resolve()
    if record and Path(record).resolve().is_relative_to(given):
        raise Refusal(f"folder={folder}: is or holds {record}, where the command's record goes. Name another.")
    for other in (Path(other).resolve() for other in inputs if other):
        if given.is_relative_to(other) or other.is_relative_to(given):
            raise Refusal(f"folder={folder}: is, holds or lies in {other.name}. Name another, which may be new.")
    manifest.refuse_foreign(folder)


def files(folder: Path, max_file_gib: float, force: bool, seen: dict[str, str]) -> None:
    """Refuse what must not leave this machine, and what is too large; see `scan.files`.

    Raises:
        Refusal: names the file.
    """
    digests = contents.hashes(folder)
    for name in digests:
        gib = (folder / name).stat().st_size / 2**30
        if gib > max_file_gib:
            raise Refusal(f"{name}: {gib:.3g} GiB, more than max_file_gib={max_file_gib}. Raise the limit.")
    scan.files(folder, force, seen, digests)
