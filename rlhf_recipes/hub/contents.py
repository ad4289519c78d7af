"""What is published of a run: its files, gathered in one folder, without what is of no use to others.

Of a training: the adapter in safetensors with tokenizer and chat template, `config.yaml`, `result.json`, the curves
and `probe.json`. Of recipes/cai.py: the splits, the accounts of what became of the pairs, and the constitution.
"""

import fnmatch
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes import run
from rlhf_recipes.card import PAPERS, without_folder
from rlhf_recipes.config import nearest

WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
PICTURES = ("curves.png", "doctor.png", "metrics.jsonl")
DATA = ("*.parquet", "funnel.json", "ledger.json", "funnel.png")
CARD, PROBE, PAGE = "README.md", "probe.json", "evaluation.html"
# What an earlier publication may have left where this one is of another kind: adapter or merged, with a page or not.
REPLACEABLE = ("*.safetensors", "*.safetensors.index.json", ADAPTER_CONFIG, "config.json", "generation_config.json",
               CARD, PROBE, PAGE)  # fmt: skip


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
        """Of a training, the run of recipes/cai.py that made its pairs, where it is still there."""
        folder = Path(self.config["data"]["path"])
        made_by = run.read_result(folder) if folder.is_dir() else None
        return find(None, str(folder)) if self.key == "run" and made_by and made_by.get("recipe") == "cai" else None

    @property
    def splits(self) -> list[str]:
        """Of a data set, those that the card's metadata names: not empty, of train and test."""
        written = self.result["funnel"]["written"]
        return [name for name, count in written.items() if count and name.startswith(("train_", "test_"))]


def find(run_folder: str | None, pairs_folder: str | None) -> Source:
    """The run to publish.

    Raises:
        ValueError: none is named, or both are, or it is not finished, or of a recipe that makes nothing to publish.
    """
    if (run_folder is None) == (pairs_folder is None):
        raise ValueError("run: give a run of a training (run=<folder>), or one of recipes/cai.py (pairs=<folder>).")
    key, folder = ("run", run_folder) if pairs_folder is None else ("pairs", pairs_folder)
    where, path = f"{key}={folder}", Path(folder)
    if not path.is_dir():
        near = nearest(path.name, [f.name for f in path.parent.glob("*")]) if path.parent.is_dir() else "."
        raise ValueError(f"{where}: no such folder{near}")
    result, config = _read(where, path / "result.json"), _read(where, path / "config.yaml")
    made_by = result.get("recipe")
    if key == "pairs" and made_by != "cai":
        raise ValueError(f"{where}: is a run of {made_by}, not of recipes/cai.py. Use run={folder}.")
    if key == "run" and made_by == "cai":
        raise ValueError(f"{where}: is a data set. Use pairs={folder}.")
    if key == "run" and made_by not in PAPERS:
        raise ValueError(f"{where}: is a run of {made_by}, which makes no adapter. Name one of {', '.join(PAPERS)}.")
    if result.get("status") != "finished":
        raise ValueError(f"{where}: its status is {result.get('status')}. Let it finish first.")
    return Source(key, path, config, result)


def _read(where: str, path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{where}: no {path.name} in it, so no finished run. Name a run that has ended.")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # json's, yaml's and omegaconf's share no base
        raise ValueError(f"{where}: {path.name} cannot be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {path.name} is no mapping. Restore the file, or run the recipe again.")
    return content


def gather(source: Source, base: dict, page: Path | None, folder: Path) -> None:
    """Copy what is published into `folder`, all but weights, card and `probe.json`.

    Args:
        base: `revision`, to be written into the adapter's config.
        page: report.html of an evaluation.
    """
    for name, content in (("result.json", source.result), ("config.yaml", source.config)):
        portable = without_folder(content)
        text = json.dumps(portable, indent=2, ensure_ascii=False) + "\n"
        run.write_atomically(folder / name, text if name.endswith("json") else OmegaConf.to_yaml(portable))
    for pattern in DATA if source.key == "pairs" else PICTURES:
        for file in sorted(source.dir.glob(pattern)):
            _copy(file, folder / file.name)
    if page:
        _copy(page, folder / PAGE)
    made = source if source.key == "pairs" else source.pairs
    if made:
        run.write_atomically(folder / "constitution.yaml", OmegaConf.to_yaml(made.config["constitution"]))
    if source.key == "pairs":
        return
    for pattern in TOKENIZER:
        for file in sorted(source.adapter.glob(pattern)):
            _copy(file, folder / file.name)
    adapter_config = json.loads((source.adapter / ADAPTER_CONFIG).read_text()) | {"revision": base["revision"]}
    run.write_atomically(folder / ADAPTER_CONFIG, json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    _copy(source.adapter / WEIGHTS, folder / WEIGHTS)


def _copy(file: Path, to: Path) -> None:
    shutil.copyfile(file, to)  # the content alone: neither dates nor permissions


def is_replaceable(path: str) -> bool:
    """Whether a file may be of an earlier publication that this one takes the place of."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in REPLACEABLE)


def hashes(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
