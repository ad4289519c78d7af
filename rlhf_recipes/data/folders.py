"""Which files of a folder are which split.

A folder is one of these, looked for in this order:

1. saved by `save_to_disk`;
2. a clone from the Hub whose README.md names the files of each split (`configs:` in its head);
3. files of any kind that `readers` knows, in it, in its `data/`, or in a folder named like a split. A file is of the
   split that its name says, without its ending and the number of its part: `train.jsonl`, `train_00.csv`,
   `data/train-00000-of-00002.parquet`, `train/0.arrow`. Names are matched whole: `train_sft` is not `train`; only
   what all begin with alike (`prefs_train`, `prefs_test`) is taken off. What alone is not named like a split is
   `train`.

Folders beside these are configurations, which `data.name` chooses.
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.data import arrow_rows, readers
from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.run_folder import refuse_growth
from rlhf_recipes.secrets import reason
from rlhf_recipes.text import line

# What people call the rows to test on, in the order in which they are looked for.
HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "held_out", "heldout", "holdout")
SPLIT_WORD = re.compile(rf"(^|[-_. ])(train|training|{'|'.join(HELD_OUT)})([-_. ]|$)", re.IGNORECASE)
PREFIXED = re.compile(rf"(.+)[-_. ](train|{'|'.join(HELD_OUT)})", re.IGNORECASE)
# Numbers of parts: of the Hub, of Spark and Dask, behind the name of a split, alone.
OF = re.compile(r"[-_](\d+)[-_]of[-_](\d+)(-[0-9a-f]{16})?$")
PART = re.compile(r"(?:^|[-_. ])part[-_. ]?(\d+)(-.*)?$", re.IGNORECASE)
NUMBER = re.compile(r"(?:^|[-_. ])(\d+)$")
NO_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "metadata.json",
)
MOST_FILES, DEEPEST, HEAD_LIMIT = 10_000, 4, 2**20


@dataclass
class Folder:
    """The splits of a folder.

    Attributes:
        path: as the user typed it.
        files: of each split, in the order in which they are read.
        saved: the splits of `save_to_disk`, in place of files.
        configurations: of which one must be chosen; empty where there is nothing to choose.
    """

    path: str
    files: dict[str, list[Path]] = field(default_factory=dict)
    saved: dict[str, Any] = field(default_factory=dict)
    configurations: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.saved, *self.files)

    def rows(self, split: str) -> Iterator[readers.Located] | None:
        """Rows of one split; None where there is no such split.

        Raises:
            Refusal: a configuration must be chosen first; files of the split are missing, or there twice.
        """
        if split in self.saved:
            return readers.numbered(f"{self.path}/{split}", readers.undecoded(self.saved[split]))
        if split in self.files:
            if not self.files[split]:
                raise Refusal(f"{self.path}: none of the files that README.md names for {split} is here. Fetch them.")
            _check_parts(self.path, split, self.files[split])
            return itertools.chain.from_iterable(readers.read_file(str(file)) for file in self.files[split])
        if self.configurations:
            names = ", ".join(self.configurations)
            raise Refusal(f"{self.path}: several configurations: {names}. Name one with data.name, or give a file.")
        return None

    def unused(self, read: tuple[str, ...]) -> list[str]:
        """The splits that hold what none of these does."""
        files = self._files(read)
        return [name for name in self.names if name not in read and not (files and files >= self._files((name,)))]

    def unread(self, read: tuple[str, ...]) -> list[str]:
        """The files, or saved splits, that belong to none of these; nothing of other configurations."""
        if self.saved or self.configurations:
            return [name for name in self.saved if name not in read]
        folder = os.path.expanduser(self.path)
        return sorted(os.path.relpath(file, folder) for file in self._files(self.names) - self._files(read))

    def _files(self, splits: tuple[str, ...]) -> set[Path]:
        return {file for split in splits for file in self.files.get(split, ())}


def find(path: str, name: str | None = None) -> Folder:
    """The splits of a folder, or of one of its configurations.

    Raises:
        Refusal: damaged, without a data file, or without this configuration.
    """
    if name:
        _refuse_outside(f"data.name={name}", name)
    try:
        return _find(path, Path(os.path.expanduser(path)), name)
    except OSError as error:
        raise Refusal(f"{path}: not readable ({error.strerror}). Check its permissions.") from error


def _find(path: str, folder: Path, name: str | None) -> Folder:
    place = folder / name if name else folder
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return Folder(path, saved=_saved(path, place))
    documented, default = _of_readme(path, folder)
    by_name = _by_name(path, folder)
    if not documented and not by_name:
        raise Refusal(
            f"{path}: a folder, but neither saved by DatasetDict.save_to_disk nor with files of data in it. "
            f"Give one of these, or a single file; data ends in {readers.KNOWN}."
        )
    if name:
        configurations = by_name | documented
        chosen = "" if name == "default" and name not in configurations else name
        if chosen not in configurations:
            there = list(filter(None, configurations))
            way = f"It has: {', '.join(there)}." if there else "It has none: set data.name=null."
            raise Refusal(f"data.name={name}: no such configuration in {path}{nearest(name, there)} {way}")
        return Folder(path, configurations[chosen])
    here = by_name.get("", {})
    if documented and default is None:  # train_prefs.parquet goes by its own name, and never for the train of another
        meant = set(itertools.chain.from_iterable(documented.values()))
        here = {split: files for split, files in here.items() if split not in meant}
        return Folder(path, here, configurations=tuple(documented))
    if documented:  # what it does not name goes by its own name
        others = [files for config in documented.keys() - {default} for files in documented[config].values()]
        elsewhere = set(itertools.chain.from_iterable(others))
        named = {split: files for split, files in here.items() if elsewhere.isdisjoint(files)}
        return Folder(path, named | documented[default])
    if "" not in by_name and len(by_name) > 1:
        return Folder(path, configurations=tuple(by_name))
    first = "" if "" in by_name else next(iter(by_name))
    beside = {config: groups for config, groups in by_name.items() if config != first}
    return Folder(
        path,
        by_name[first] | {f"{config}/{split}": files for config in beside for split, files in beside[config].items()},
    )


def _saved(path: str, folder: Path) -> dict[str, Any]:
    _refuse_saved(path, folder)
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
        for split in data.values() if isinstance(data, DatasetDict) else [data]:
            # What is mapped is as it lies on the disk: an offset that points elsewhere would be followed.
            split.data.validate(full=True)
    except Exception as error:
        raise Refusal(
            f"{path}: a damaged save_to_disk folder ({type(error).__name__}: {reason(error)}). Save it again."
        ) from error
    return dict(data) if isinstance(data, DatasetDict) else {"train": data}  # a single saved Dataset has no splits


def _refuse_saved(path: str, folder: Path) -> None:
    """Refuse files elsewhere that a saved folder names as its own, and rows that are too large, before `datasets` maps
    them; what else is wrong it says itself."""
    import pyarrow

    listed = _entries(folder / "dataset_dict.json", "splits")
    for split in [""] if listed is None else filter(None, listed):
        _refuse_outside(f"{path}/dataset_dict.json: {split}", str(split))
        place = folder / str(split)
        for entry in _entries(place / "state.json", "_data_files") or ():
            name = str(entry.get("filename") if isinstance(entry, dict) else entry)
            _refuse_outside(f"{path}: {line(split)} state.json: {line(name)}", name)
            if (place / name).is_file():
                with pyarrow.memory_map(str(place / name)) as source:
                    arrow_rows.refuse_huge_batches(f"{path}/{name}", source, 0, readers.LINE_LIMIT)


def _entries(file: Path, key: str) -> list | None:
    """A list in a JSON file; None where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return found if isinstance(found, list) else None


def _data_files(path: str, folder: Path) -> Iterator[Path]:
    seen = 0
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(each for each in folders if not each.startswith((".", "_")) and depth + 1 < DEEPEST)
        seen += len(names)
        if seen > MOST_FILES:
            raise Refusal(f"{path}: more than {MOST_FILES} files. Give the folder of one data set, or a single file.")
        for name in sorted(names):
            if name.lower().endswith(readers.KINDS) and not name.startswith((".", "_")) and name not in NO_DATA:
                yield Path(place, name)


def _by_name(path: str, folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Configuration ("" for the folder itself) -> split -> files, by what they are called."""
    found: dict[str, dict[str, list[Path]]] = {}
    for file in _data_files(path, folder):
        parents = list(file.relative_to(folder).parts[:-1])
        split = _parts(file)[0]
        if parents and SPLIT_WORD.search(parents[-1]):
            split = parents.pop()
        plain = split.lower().replace("-", "_")
        split = plain if plain in ("train", *HELD_OUT) else split
        groups = found.setdefault("/".join(each for each in parents if each != "data"), {})
        groups.setdefault(split, []).append(file)
    for groups in found.values():
        for files in groups.values():
            files.sort(key=lambda file: (file.parent, _parts(file)[1], file))
    return {config: _plainly(groups) for config, groups in found.items()}


def _parts(file: Path) -> tuple[str, int, int | None]:
    """(name without ending and number, number of the part, how many there are)."""
    name = file.name[: -len(readers.ending(file.name))]
    if match := OF.search(name):
        return name[: match.start()], int(match[1]), int(match[2])
    if match := PART.search(name):
        return name[: match.start()] or "part", int(match[1]), None
    if (match := NUMBER.search(name)) and (not match.start() or SPLIT_WORD.search(name[: match.start()])):
        return name[: match.start()] or "part", int(match[1]), None
    return name, 0, None


def _plainly(groups: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """The splits as they are asked for; see the head of this module."""
    if "train" in groups:
        return groups
    matches = {name: match for name in groups if (match := PREFIXED.fullmatch(name))}
    words = {name: match[2].lower() for name, match in matches.items()}
    renamed = {words.get(name, name): files for name, files in groups.items()}
    if (
        "train" in words.values()
        and len({match[1] for match in matches.values()}) == 1
        and len(renamed) == len(groups)
    ):
        return renamed
    others = [name for name in groups if not SPLIT_WORD.search(name)]
    if len(others) == 1 and not any("train" in name.lower() for name in groups if name not in others):
        groups = {"train" if name in others else name: files for name, files in groups.items()}
    return groups


def _check_parts(path: str, split: str, files: list[Path]) -> None:
    """Refuse a split that is there twice, or not whole."""
    endings = [readers.ending(file.name) for file in files]
    kinds = {ending.removesuffix(".gz").removesuffix(".zst") for ending in endings}
    bare = {str(file)[: -len(ending)] for file, ending in zip(files, endings, strict=True)}
    parts = Counter((file.parent, name, count) for file in files for name, _, count in [_parts(file)])
    if len(kinds) > 1 or len(bare) < len(files) or len({key[:2] for key in parts}) < len(parts):
        names = ", ".join(file.name for file in files)
        raise Refusal(f"{path}: split {split} is there more than once: {names}. Give one file, or remove the others.")
    for (_, name, count), there in parts.items():
        if count and there < count:
            raise Refusal(f"{path}: split {split}: {there} of {count} parts of {name} are here. Fetch the others.")


def _of_readme(path: str, folder: Path) -> tuple[dict[str, dict[str, list[Path]]], str | None]:
    """(configuration -> split -> files, the one that is meant where none is named) of a data set's card."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}, None
    import yaml

    where = f"{path}/README.md"
    with open(readme, encoding="utf-8", errors="replace") as stream:
        text = stream.read(HEAD_LIMIT)
    head = re.match(r"\s*---[ \t]*\n(.*?)\n---", text, re.DOTALL)
    try:
        refuse_growth(head[1] if head else "")
        card = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refusal(
            f"{where}: its head is not valid YAML ({first_line(error)}). Mend it, or give a file."
        ) from error
    listed = card.get("configs") if isinstance(card, dict) else None
    if listed is None:
        return {}, None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise Refusal(f"{where}: configs: must be a list of config_name and data_files. Mend it, or give a file.")
    found, default = {}, None
    for each in listed:
        config = str(each.get("config_name", "default"))
        found[config] = _documented(where, folder, each)
        default = config if each.get("default") is True or config == "default" else default
    return found, next(iter(found)) if len(found) == 1 else default


def _documented(where: str, folder: Path, config: dict[str, Any]) -> dict[str, list[Path]]:
    """split -> files of one entry of `configs`."""
    inside, listed = str(config.get("data_dir") or "."), config.get("data_files")
    _refuse_outside(f"{where}: data_dir: {inside}", inside)
    folder = folder / inside
    if listed is None:
        return _by_name(where, folder).get("", {})
    if isinstance(listed, dict):
        listed = [{"split": split, "path": globs} for split, globs in listed.items()]
    listed = listed if isinstance(listed, list) else [listed]
    if not all(isinstance(each, dict) for each in listed):
        listed = [{"split": "train", "path": listed}]
    found = {}
    for each in listed:
        globs = each.get("path")
        globs = globs if isinstance(globs, list) else [globs]
        files = [file for glob in globs for file in _globbed(where, folder, glob)]
        found[str(each.get("split", "train"))] = list(dict.fromkeys(files))
    return found


def _globbed(where: str, folder: Path, glob: Any) -> list[Path]:
    if not isinstance(glob, str):
        raise Refusal(f"{where}: data_files: {glob!r:.80} is no path. Mend it, or give a file.")
    _refuse_outside(f"{where}: data_files: {glob}", glob)
    try:
        files = sorted(folder.glob(glob))
    except (ValueError, NotImplementedError, OSError) as error:
        raise Refusal(f"{where}: data_files: {glob} ({first_line(error)}). Mend it, or give a file.") from error
    is_plain = not re.search(r"[*?\[]", glob)  # a file that is named, whatever its kind, is said to be of none
    return [file for file in files if file.is_file() and (is_plain or file.name.lower().endswith(readers.KINDS))]


def _refuse_outside(where: str, path: str) -> None:
    if path.startswith(("/", "~", "\\")) or "://" in path or ".." in re.split(r"[/\\]", path):
        raise Refusal(f"{where}: must be inside the folder. Mend it, or give a file.")
