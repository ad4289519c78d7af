"""What is published of a run: its files, gathered in one folder, without what is of no use to others.

Of a training: the adapter in safetensors with tokenizer and chat template, `config.yaml`, `result.json`, the curves
and `probe.json`. Of recipes/cai.py: the splits, the accounts of what became of the pairs, and the constitution.
Files are taken by their exact names, and a run folder is data, whoever it comes from: no link leads out of it, and
nothing is imported because its config.yaml says so.
"""

import functools
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes import places
from rlhf_recipes.cai.dataset import PREFS, SFT
from rlhf_recipes.config import CONF, flatten, trainer_recipes
from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.methods import METHODS
from rlhf_recipes.run_folder import INPUTS, changed_input, read_result, refuse_growth, write_atomically
from rlhf_recipes.stats import Estimate
from rlhf_recipes.text import line
from rlhf_recipes.training.card import without_folder

WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Those that transformers writes; a template of several lies in a folder of its own.
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model",
              "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "bpe.codes",
              "normalizer.json")  # fmt: skip
TOKENIZER = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
PICTURES = ("curves.png", "doctor.png", "metrics.jsonl")
DATA = (*(f"{split}.parquet" for split in (*PREFS, *SFT)), "funnel.json", "ledger.json", "funnel.png")
CARD, PROBE, PAGE = "README.md", "probe.json", "evaluation.html"
# Of result.json: rows of the data that a policy was trained on.
PRIVATE = ("samples",)
# What a config.yaml must have to be published.
NEEDED = {"run": ("model.id", "model.dtype", "data.path"), "pairs": ("constitution",)}


@dataclass
class Source:
    """A finished run that is to be published.

    Attributes:
        key: how the user named it, `run` or `pairs`.
        dir: its folder.
        config: its resolved config.
        result: its result.json.
    """

    key: str
    dir: Path
    config: dict[str, Any]
    result: dict[str, Any]

    @property
    def recipe(self) -> str:
        return self.result["recipe"]

    @property
    def repo_type(self) -> str:
        return "dataset" if self.key == "pairs" else "model"

    @property
    def adapter(self) -> Path:
        return self.dir / "adapter"

    @property
    def pairs(self) -> "Source | None":
        """Of a training, the run of recipes/cai.py that made its pairs, where it is still there as it was read."""
        there = self._is_of_pairs and not self.pairs_changed
        return find(None, self.config["data"]["path"]) if there else None

    @functools.cached_property
    def pairs_changed(self) -> bool:
        """Of a training, whether the run of recipes/cai.py that its `data.path` names has other rows than it read."""
        path = self.config["data"]["path"]
        read = {f"data.path={path}": places.sha256(path)} if self._is_of_pairs else {}
        return changed_input(self.dir, read) is not None

    @property
    def _is_of_pairs(self) -> bool:
        folder = Path(self.config["data"]["path"])
        made_by = read_result(folder) if self.key == "run" and folder.is_dir() else None
        return bool(made_by) and made_by.get("recipe") == "cai"

    @property
    def splits(self) -> list[str]:
        """Of a data set, those that the card's metadata names: not empty, of train and test."""
        written = self.result["funnel"]["written"]
        return [name for name, count in written.items() if count and name.startswith(("train_", "test_"))]


def find(run_folder: str | None, pairs_folder: str | None) -> Source:
    """The run to publish.

    Raises:
        Refusal: none is named, or both are, or it is not finished, or of a recipe that makes nothing to publish.
    """
    if (run_folder is None) == (pairs_folder is None):
        raise Refusal("run: give a run of a training (run=<folder>), or one of recipes/cai.py (pairs=<folder>).")
    key, folder = ("run", run_folder) if pairs_folder is None else ("pairs", pairs_folder)
    where, path = f"{key}={folder}", Path(folder)
    if not path.is_dir():
        near = nearest(path.name, [f.name for f in path.parent.glob("*")]) if path.parent.is_dir() else "."
        raise Refusal(f"{where}: no such folder{near}")
    refuse_links(where, path)
    result, config = _read(where, path / "result.json"), _read(where, path / "config.yaml")
    made_by = result.get("recipe")
    if key == "pairs" and made_by != "cai":
        raise Refusal(f"{where}: is a run of {made_by}, not of recipes/cai.py. Use run={folder}.")
    if key == "run" and made_by == "cai":
        raise Refusal(f"{where}: is a data set. Use pairs={folder}.")
    if key == "run" and made_by not in METHODS:
        raise Refusal(f"{where}: is a run of {made_by}, which makes no adapter. Name one of {', '.join(METHODS)}.")
    if result.get("status") != "finished":
        raise Refusal(f"{where}: its status is {result.get('status')}. Let it finish first.")
    if key == "run":
        _refuse_incomplete(where, result)
    _refuse_code(where, key, config)
    return Source(key, path, config, result)


def _read(where: str, path: Path) -> dict:
    if not path.is_file():
        raise Refusal(f"{where}: no {path.name} in it, so no finished run. Name a run that has ended.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text, object_hook=Estimate.of)
        else:
            refuse_growth(text)
            content = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # json's, yaml's and omegaconf's share no base
        raise Refusal(f"{where}: {path.name} cannot be read ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise Refusal(f"{where}: {path.name} is no mapping. Restore the file, or run the recipe again.")
    content.pop(INPUTS, None)  # paths of this machine
    return content


def _refuse_incomplete(where: str, result: dict[str, Any]) -> None:
    """Refuse a result.json without the held-out figures that the card shows.

    Raises:
        Refusal: names the figure.
    """
    parts = {name: result.get(name) for name in ("main", "before", "metrics")}
    main, before, metrics = (each if isinstance(each, dict) else {} for each in parts.values())
    estimates = {f"main.{name}": main.get(name) for name in ("before", "after")}
    for name, after in metrics.items():
        estimates |= {f"before.{name}": before.get(name), f"metrics.{name}": after}
    missing = [name for name, each in parts.items() if not isinstance(each, dict)]
    missing += [name for name, each in estimates.items() if not isinstance(each, Estimate)]
    if missing:
        raise Refusal(
            f"{where}: result.json has no {line(missing[0])} as a training writes it. Restore the file, or run the "
            "recipe again."
        )


def refuse_links(where: str, folder: Path) -> None:
    """Refuse a folder with a link that leads out of it: a file of this machine would be published as the run's.

    Raises:
        Refusal: names the link.
    """
    inside = folder.resolve()
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in sorted(folders + files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                name = line(path.relative_to(folder))
                raise Refusal(f"{where}: {name} is a link that leads out of it. Replace it by what it stands for.")


def _refuse_code(where: str, key: str, config: dict[str, Any]) -> None:
    """What is built of a config.yaml is what conf/ names; the rest of it is data.

    Raises:
        Refusal: it names another class, code of the Hub, or something to be looked up on this machine.
    """
    leaves = dict(flatten(config))
    for needed in NEEDED[key]:
        if not any(f"{name}.".startswith(f"{needed}.") for name in leaves):
            raise Refusal(f"{where}: config.yaml has no {needed}. Restore the file, or run the recipe again.")
    for name, value in leaves.items():
        if "${" in str(value) and name.partition(".")[0] != "constitution":  # where it is text
            raise Refusal(f"{where}: {line(name)} in config.yaml is not resolved. Write its value there.")
    model, node = config.get("model") or {}, config.setdefault("quantization", {})
    if not isinstance(node, dict) or ("_target_" in node and node["_target_"] not in targets("quantization")):
        raise Refusal(
            f"{where}: quantization in config.yaml names {line(node)[:80]}, which is in no file of conf/quantization "
            "and is not run. Restore the file."
        )
    if "/" in str(model.get("attn_implementation")):  # transformers would fetch a kernel
        raise Refusal(f"{where}: model.attn_implementation in config.yaml is code on the Hub, which is not run.")
    if model.get("trust_remote_code"):
        raise Refusal(
            f"{where}: its model brings code (model.trust_remote_code in config.yaml), which is not run to publish it."
        )


@functools.cache
def targets(group: str) -> set[str]:
    """What the files of a group of conf/ build, and TRL's own trainers: the only classes that are imported for a run
    that is published."""
    if group == "trainer":
        return {*trainer_recipes()}
    nodes = [OmegaConf.load(file) for file in (CONF / group).glob("*.yaml")]
    return {node._target_ for node in nodes if "_target_" in node}


def gather(source: Source, base: dict, page: Path | None, folder: Path) -> None:
    """Copy what is published into `folder`, all but weights, card and `probe.json`.

    Args:
        base: `revision`, to be written into the adapter's config.
        page: report.html of an evaluation.
    """
    result = {key: value for key, value in source.result.items() if key not in PRIVATE}
    for name, content in (("result.json", result), ("config.yaml", source.config)):
        portable = without_folder(content)
        text = json.dumps(portable, indent=2, ensure_ascii=False, default=asdict) + "\n"
        write_atomically(folder / name, text if name.endswith("json") else OmegaConf.to_yaml(portable))
    for name in DATA if source.key == "pairs" else PICTURES:
        _copy(source.dir / name, folder / name)
    if page:
        _copy(page, folder / PAGE)
    made = source if source.key == "pairs" else source.pairs
    if made:
        write_atomically(folder / "constitution.yaml", OmegaConf.to_yaml(made.config["constitution"]))
    if source.key == "pairs":
        return
    templates = [f"{TEMPLATES}/{file.name}" for file in sorted((source.adapter / TEMPLATES).glob("*.jinja"))]
    for name in (*TOKENIZER, *templates):
        _copy(source.adapter / name, folder / name)
    adapter_config = json.loads((source.adapter / ADAPTER_CONFIG).read_text()) | {"revision": base["revision"]}
    write_atomically(folder / ADAPTER_CONFIG, json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    _copy(source.adapter / WEIGHTS, folder / WEIGHTS)


def _copy(file: Path, to: Path) -> None:
    """The content alone, neither dates nor permissions; nothing where there is no such file."""
    if file.is_file():
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, to)


def hashes(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
