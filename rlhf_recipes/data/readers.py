"""Rows out of files, folders and the Hub, each with the place it came from; a bad file is one line of text.

Every reader yields `(where, row)`. `where` is `file:line` (jsonl, csv) or `file:row` (a json list, parquet,
the Hub; rows count from 1); `row` is a dict under the file's own column names. Local files are read with the
standard library and pyarrow alone, so a refusal needs neither torch nor datasets. All refusals are
`Refusal`s.
"""

import csv
import functools
import gzip
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes import places
from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.secrets import redact

Located = tuple[str, dict[str, Any]]

TEXT_KINDS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
KINDS = (*TEXT_KINDS, ".parquet")
FILE_ENDINGS = (*KINDS, ".txt", ".tsv", ".xlsx", ".arrow", ".gz", ".zip")
MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip or spreadsheet",
    b"ARROW1": "Arrow",
}
CSV_CELL_LIMIT = 2**31 - 1  # csv's own limit of 128 KiB, of the whole process, refuses long conversations
PARQUET_BATCH = 1000  # rows unpacked at a time
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
# Bytes, unpacked: of a line or a row, and of a file that is read whole. A megabyte of gzip may be a gigabyte of text.
LINE_LIMIT, JSON_LIMIT = 64 * 2**20, 2**30


def is_hub_id(path: str) -> bool:
    """Whether `path` names a repository: `org/name`, not here on disk, and without the ending of a file.

    Raises:
        Refusal: `org` is a folder or file here; see `places.on_hub`.
    """
    return not path.lower().endswith(FILE_ENDINGS) and places.on_hub(path, "data.path")


def read_file(path: str) -> Iterator[Located]:
    """Rows of one .jsonl, .json, .csv (each also .gz) or .parquet file.

    Raises:
        Refusal: missing, unreadable, empty, binary or malformed, with the line or row.
    """
    file = Path(os.path.expanduser(path))
    kind = _kind(path, file)
    try:
        rows = _parquet_rows(path, file) if kind == ".parquet" else _text_rows(path, file, kind)
        first = next(rows, None)
        if first is None:
            raise Refusal(f"{path}: empty, no rows in it. Give a file with at least one row.")
        yield first
        yield from rows
    except OSError as error:  # gzip raises its own OSError for data that is no gzip
        if isinstance(error, gzip.BadGzipFile) or error.strerror is None:
            raise Refusal(f"{path}: not a valid gzip file ({error}). Compress it again, or drop .gz.") from error
        raise Refusal(f"{path}: not readable ({error.strerror}). Check its permissions.") from error
    except (EOFError, zlib.error) as error:
        raise Refusal(f"{path}: the gzip data is damaged or cut off ({error}). Copy it again.") from error


def read_folder(path: str, split: str) -> Iterator[Located] | None:
    """Rows of one split of a saved DatasetDict or of a folder of `<split>*.parquet`; None without that split.

    Raises:
        Refusal: the folder is neither.
    """
    folder = Path(os.path.expanduser(path))
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_split(path, folder, split)
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files and not any(folder.glob("*.parquet")):
        raise Refusal(
            f"{path}: a folder, but neither saved by DatasetDict.save_to_disk nor with train*.parquet in it. "
            "Give one of these, or a single file."
        )
    return itertools.chain.from_iterable(read_file(str(file)) for file in files) if files else None


def reach_hub(path: str, offline: bool) -> None:
    """Refuse a Hub id that this machine cannot load, before `datasets` retries for half a minute.

    Raises:
        Refusal: no network, no such repository, or gated without access; never with a token in it.
    """
    if offline:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    where = f"data.path={path}"
    try:
        HfApi().auth_check(path, repo_type="dataset")
    except GatedRepoError as error:
        raise Refusal(
            f"{where}: a gated data set. Accept its terms at https://huggingface.co/datasets/{path}, then log"
            " in with `hf auth login` or set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise Refusal(
            f"{where}: no file or folder here, and no data set on the Hub that you can see. Check the "
            "spelling; a private one needs `hf auth login` or HF_TOKEN."
        ) from error
    except (HTTPError, OSError) as error:  # HTTPError: of the HTTP library that huggingface_hub uses
        raise Refusal(
            f"{where}: no file or folder here, and the Hub cannot be reached ({type(error).__name__}). "
            "Connect to a network, give a local file, or set HF_HUB_OFFLINE=1 if it was downloaded before."
        ) from error


def read_hub(path: str, name: str | None, revision: str | None, split: str) -> Iterator[Located] | None:
    """Rows of one split of a Hub data set; None where it has no such split.

    Raises:
        Refusal: not reachable, gated, unknown, or no such configuration or revision.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    reach_hub(path, HF_HUB_OFFLINE)
    places.say_from_hub("data", path)
    from datasets import load_dataset

    try:
        data = load_dataset(path, name, revision=revision, split=split)
    except ValueError as error:
        if "Unknown split" in str(error) or "unknown split" in str(error):
            return None
        raise Refusal(f"data.path={path}: {_reason(error)}. Check data.name and data.revision.") from error
    except Exception as error:
        if HF_HUB_OFFLINE:
            raise Refusal(
                f"data.path={path}: no file or folder here, not in the cache, and HF_HUB_OFFLINE=1 bars it. "
                "Unset it, or give a local file."
            ) from error
        raise Refusal(
            f"data.path={path}: cannot be loaded ({type(error).__name__}: {_reason(error)}). "
            "Check data.name and data.revision, or give a local file."
        ) from error
    return _numbered(f"{path}[{split}]", data)


def _kind(path: str, file: Path) -> str:
    """The ending that tells how to read the file; refuses what is missing or of no known kind."""
    try:
        mode = file.stat().st_mode
    except PermissionError as error:
        raise Refusal(f"{path}: not readable ({error.strerror}). Check its permissions.") from error
    except OSError as error:
        folder = file.parent
        siblings = os.listdir(folder) if folder.is_dir() else []
        hint = nearest(file.name, siblings) if folder.is_dir() else f", nor the folder {folder}."
        raise Refusal(f"{path}: no such file{hint} Give the path of your data.") from error
    if not stat.S_ISREG(mode):
        raise Refusal(f"{path}: not a regular file. Give a file that ends in one of {', '.join(KINDS)}.")
    for kind in sorted(KINDS, key=len, reverse=True):
        if file.name.lower().endswith(kind):
            return kind
    raise Refusal(f"{path}: unknown kind of file. Give one that ends in {', '.join(KINDS)}.")


def _text_rows(path: str, file: Path, kind: str) -> Iterator[Located]:
    with gzip.open(file, "rb") if kind.endswith(".gz") else open(file, "rb") as stream:
        is_read_whole = ".json" in kind and ".jsonl" not in kind
        lines = _decoded(path, stream, JSON_LIMIT if is_read_whole else LINE_LIMIT)
        if ".csv" in kind:
            yield from _csv_rows(path, lines)
        elif ".jsonl" in kind:
            yield from _jsonl_rows(path, lines)
        else:
            yield from _json_rows(path, lines)


def _decoded(path: str, stream, most: int) -> Iterator[tuple[int, str]]:
    """Numbered lines of at most so many bytes as text; the first line without its byte order mark."""
    for number, raw in enumerate(iter(functools.partial(stream.readline, most + 1), b""), 1):
        if number == 1:
            _refuse_magic(path, raw)
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > most:
            raise _too_large(path) if most == JSON_LIMIT else _too_long(path, number, "a line")
        if b"\0" in raw:
            raise Refusal(f"{path}:{number}: a binary file (NUL byte), not text. Give {', '.join(TEXT_KINDS)}.")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(
                f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1}). "
                "Save the file as UTF-8."
            ) from error


def _too_long(path: str, number: int, what: str) -> Refusal:
    return Refusal(f"{path}:{number}: {what} of more than {LINE_LIMIT >> 20} MiB. Mend or remove it.")


def _too_large(path: str) -> Refusal:
    most = f"{JSON_LIMIT >> 20} MiB of JSON"
    return Refusal(f"{path}: more than {most}, which is read whole. Write it as .jsonl, a row a line.")


def _refuse_magic(path: str, head: bytes) -> None:
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise Refusal(f"{path}: a binary file ({what}), not text. Rename it to what it is, or convert it.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refusal(f"{path}:1: not UTF-8 (UTF-16 byte order mark). Save the file as UTF-8.")


def _jsonl_rows(path: str, lines: Iterator[tuple[int, str]]) -> Iterator[Located]:
    for number, line in lines:
        if line.strip():
            yield f"{path}:{number}", _object(f"{path}:{number}", _parsed(f"{path}:{number}", line))


def _json_rows(path: str, lines: Iterator[tuple[int, str]]) -> Iterator[Located]:
    """A JSON list of rows, or one row a line; the first character tells which."""
    numbered, size = [], 0
    for number, line in lines:
        numbered.append((number, line))
        size += len(line)
        if size > JSON_LIMIT:
            raise _too_large(path)
    text = "".join(line for _, line in numbered)
    if not text.lstrip().startswith("["):
        yield from _jsonl_rows(path, iter(numbered))
        return
    try:
        rows = json.loads(text)
        _refuse_half_pairs(rows, text)
    except json.JSONDecodeError as error:
        raise Refusal(f"{path}:{error.lineno}: not valid JSON ({_shortly(error)}). Mend the list there.") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not readable JSON ({_reason(error)}). Mend the list.") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}:{number}", _object(f"{path}:{number}", row)


def _parsed(where: str, line: str) -> Any:
    try:
        row = json.loads(line)
        _refuse_half_pairs(row, line)
        return row
    except json.JSONDecodeError as error:
        raise Refusal(f"{where}: not valid JSON ({_shortly(error)}). Mend or remove the line.") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        raise Refusal(f"{where}: not readable JSON ({_reason(error)}). Mend or remove the line.") from error


def _refuse_half_pairs(value: Any, text: str) -> None:
    """Raise for half of a surrogate pair, which json reads but no tokenizer takes."""
    if HALF_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()


def _shortly(error: json.JSONDecodeError) -> str:
    return f"{error.msg} at character {error.colno}"


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(row), f"a {type(row).__name__}")
        raise Refusal(f'{where}: {kind}, but a row is an object like {{"prompt": ...}}. Mend or remove it.')
    return row


def _csv_rows(path: str, lines: Iterator[tuple[int, str]]) -> Iterator[Located]:
    header, start, size = None, 1, 0

    def texts() -> Iterator[str]:
        nonlocal size
        for _, line in lines:
            size += len(line)
            if size > LINE_LIMIT:  # a quote that is never closed, say
                raise _too_long(path, start, "a row")
            yield line

    csv.field_size_limit(CSV_CELL_LIMIT)
    reader = csv.reader(texts(), strict=True)
    while True:
        size = 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise Refusal(f"{path}:{start}: not valid CSV ({error}). Mend the quotes of this row.") from error
        if cells is None:
            return
        where, start = f"{path}:{start}", reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            twice = next((name for index, name in enumerate(cells) if name in cells[:index]), None)
            if twice is not None:
                raise Refusal(f"{where}: column {twice!r} appears twice. Rename one.")
        elif len(cells) != len(header):
            raise Refusal(f"{where}: {len(cells)} cells under {len(header)} columns. Quote cells that hold commas.")
        else:
            yield where, dict(zip(header, map(_cell, cells), strict=True))


def _cell(text: str) -> Any:
    """A cell, or the message list that it holds as JSON: CSV has no other way to write one."""
    if not text.startswith("[{"):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    messages = all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    return value if messages else text


def _parquet_rows(path: str, file: Path) -> Iterator[Located]:
    if file.stat().st_size == 0:
        return
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        _refuse_huge_rows(path, table.metadata)
        number = 0
        for batch in table.iter_batches(PARQUET_BATCH):
            for index in range(batch.num_rows):
                number += 1
                yield f"{path}:{number}", _arrow_row(f"{path}:{number}", batch, index)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "strerror", None):
            raise
        raise Refusal(f"{path}: not a readable parquet file ({_reason(error)}). Write it again.") from error


def _refuse_huge_rows(path: str, metadata) -> None:
    """By what the file says of each of its groups of rows, before one is unpacked."""
    number = 1
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        if group.total_byte_size > LINE_LIMIT * max(group.num_rows, 1):
            raise _too_long(path, number, "rows")
        number += group.num_rows


def _arrow_row(where: str, batch, index: int) -> dict[str, Any]:
    try:
        return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        raise Refusal(f"{where}: not UTF-8 ({error.reason}). Mend or remove the row.") from error


def _saved_split(path: str, folder: Path, split: str) -> Iterator[Located] | None:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:
        raise Refusal(
            f"{path}: a damaged save_to_disk folder ({type(error).__name__}: {_reason(error)}). Save it again."
        ) from error
    if not isinstance(data, DatasetDict):  # a single saved Dataset has no splits
        return _numbered(path, data) if split == "train" else None
    return _numbered(f"{path}/{split}", data[split]) if split in data else None


def _numbered(name: str, rows) -> Iterator[Located]:
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))


def _reason(error: Exception) -> str:
    return redact(first_line(error))[:200].rstrip(".")
