"""Where rows come from: a file, a folder, the Hub; the test rows beside the train rows."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.data import folders, readers
from rlhf_recipes.errors import Refusal

CLINIC = Path(__file__).parents[1] / "assets" / "clinic"


@dataclass
class Told:
    """What a report says of the source: of the test rows, of splits beside it, of files that nobody reads."""

    test: str = ""
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def find(data: dict[str, Any], sides: tuple[str, ...]) -> tuple[Iterator, Iterator | None, Told]:
    """Rows of the train source, and of the test source where the data has one of its own."""
    path, told = data["path"], Told()
    if path == "clinic":
        file = CLINIC / ("demonstrations.jsonl" if "completion" in sides else "pairs.jsonl")
        train, test = readers.read_file(str(file)), None
    elif readers.is_hub_id(path):
        train, test = _two_splits(data, readers.Hub(path, data["name"], data["revision"]), told)
    elif os.path.isdir(os.path.expanduser(path)):
        train, test = _two_splits(data, folders.find(path, data["name"]), told)
    else:
        train, test = readers.read_file(path), None
    if data["test_path"]:
        test, told.test = _test_rows(data), source_name(data["test_path"])
    return train, test, told


def _two_splits(
    data: dict[str, Any], source: readers.Hub | folders.Folder, told: Told
) -> tuple[Iterator, Iterator | None]:
    train, test, wanted = source.rows(data["train_split"]), None, data["test_split"]
    if train is None:
        raise _no_split("train_split", data["train_split"], data["path"], source.names)
    if not data["test_path"] and wanted is not None:
        test = source.rows(wanted)
        others = [name for name in folders.HELD_OUT if name in source.names and name != data["train_split"]]
        if test is None and wanted != "test":  # a name that was typed is never replaced; the default one may be
            raise _no_split("test_split", wanted, data["path"], source.names, " or to null to hold out data.test_size")
        if test is None and others:
            wanted = others[0]
            test = source.rows(wanted)
    read = (data["train_split"], *([] if test is None else [wanted]))
    unused = [name for name in source.unused(read) if name in folders.HELD_OUT]
    told.test, told.notes = f"split {wanted}", [f"split {name} is not used" for name in unused]
    told.unread = source.unread(read)
    return train, test


def _no_split(key: str, split: str, path: str, names: Sequence[str], way: str = "") -> Refusal:
    there = f"It has: {', '.join(names)}. Set data.{key} to one of them{way}." if names else "Name one it has."
    return Refusal(f"data.{key}={split}: no such split in {path}. {there}")


def _test_rows(data: dict[str, Any]) -> Iterator:
    """Of `test_path`: a file, or a folder's test split, or what alone is in it."""
    path = data["test_path"]
    if not os.path.isdir(os.path.expanduser(path)):
        return readers.read_file(path)
    folder = folders.find(path)
    wanted = (data["test_split"], *folders.HELD_OUT) if data["test_split"] in (None, "test") else (data["test_split"],)
    split = next((name for name in wanted if name in folder.names), "test")
    rows = folder.rows(folder.names[0] if len(folder.names) == 1 else split)
    if rows is None:
        raise _no_split("test_split", split, path, folder.names)
    return rows


def source_name(path: str) -> str:
    """What a report or a card may show: no folders of this machine."""
    return path if path == "clinic" or readers.is_hub_id(path) else Path(os.path.abspath(path)).name
