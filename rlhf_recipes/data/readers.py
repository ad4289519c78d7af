"""Rows out of files and the Hub, each with the place it came from; a bad file is one line of text.

Every reader yields `(where, row)`. `where` is `file:line` (jsonl, csv) or `file:row` (a json list, parquet,
the Hub; rows count from 1); `row` is a dict under the file's own column names. Local files are read with the
standard library and pyarrow alone, so a refusal needs neither torch nor datasets. All refusals are
`Refusal`s. `json_rows`, `csv_rows` and `arrow_rows` know what is in a file, `folders` which files are which split.
"""

import ast
import functools
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_recipes import places
from rlhf_recipes.data import arrow_rows, csv_rows, json_rows
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.secrets import reason
from rlhf_recipes.text import line as one_line

Located = tuple[str, dict[str, Any]]

LINES, WHOLE, TABLES = (".jsonl", ".ndjson"), (".json",), {".csv": ",", ".tsv": "\t"}
TEXT_KINDS = (*LINES, *WHOLE, *TABLES)
ARROW_KINDS = (".arrow", ".feather")
PACKED = ("", ".gz", ".zst")
KINDS = (*(f"{kind}{packed}" for packed in PACKED for kind in TEXT_KINDS), ".parquet", *ARROW_KINDS)
KNOWN = f"{', '.join(TEXT_KINDS)} (each also .gz or .zst), .parquet, {', '.join(ARROW_KINDS)}"
FILE_ENDINGS = (*KINDS, ".txt", ".xlsx", ".gz", ".zst", ".zip")
MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip or spreadsheet",
    b"ARROW1": "Arrow",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
# Bytes, unpacked: of a line or a row, and of a file that is read whole. A megabyte of gzip may be a gigabyte of text.
LINE_LIMIT, JSON_LIMIT = 64 * 2**20, 2**30


def is_hub_id(path: str) -> bool:
    """Whether `path` names a repository: `org/name`, not here on disk, and without the ending of a file.

    Raises:
        Refusal: `org` is a folder or file here; see `places.on_hub`.
    """
    return not path.lower().endswith(FILE_ENDINGS) and places.on_hub(path, "data.path")


def read_file(path: str) -> Iterator[Located]:
    """Rows of one file of `KNOWN` kinds.

    Raises:
        Refusal: missing, unreadable, empty, binary or malformed, with the line or row.
    """
    file = Path(os.path.expanduser(path))
    kind = _kind(path, file)
    try:
        _refuse_pointer(path, file)
        is_text = kind.startswith(TEXT_KINDS)
        rows = _text_rows(path, file, kind) if is_text else arrow_rows.rows(path, file, kind == ".parquet", LINE_LIMIT)
        first = next(rows, None)
        if first is None:
            raise Refusal(f"{path}: empty, no rows in it. Give a file with at least one row.")
        yield first
        yield from rows
    except (EOFError, zlib.error) as error:
        raise Refusal(f"{path}: the gzip data is damaged or cut off ({error}). Copy it again.") from error
    except OSError as error:  # gzip and pyarrow raise their own OSError for data that is none of theirs
        if isinstance(error, gzip.BadGzipFile):
            raise Refusal(f"{path}: not a valid gzip file ({error}). Compress it again, or drop .gz.") from error
        if error.strerror is None:
            raise Refusal(f"{path}: not valid or cut off ({reason(error)}). Copy or write it again.") from error
        raise Refusal(f"{path}: not readable ({error.strerror}). Check its permissions.") from error


class Hub:
    """The splits of a data set on the Hub.

    Attributes:
        names: of the splits there are, as far as they are known: after `rows` was asked for one.
    """

    def __init__(self, path: str, name: str | None, revision: str | None):
        self.path, self.name, self.revision = path, name, revision
        self.names: tuple[str, ...] = ()

    def rows(self, split: str) -> Iterator[Located] | None:
        """Rows of one split; None where there is no such split.

        Raises:
            Refusal: not reachable, gated, unknown, or no such configuration or revision.
        """
        from huggingface_hub.constants import HF_HUB_OFFLINE

        where = f"data.path={self.path}"
        reach_hub(self.path, HF_HUB_OFFLINE)
        places.say_from_hub("data", self.path)
        from datasets import load_dataset

        try:
            with _from_there_alone(where):
                data = load_dataset(self.path, self.name, revision=self.revision, split=split)
        except Refusal:
            raise
        except ValueError as error:
            if "unknown split" in str(error).lower():
                self.names = _listed(r"Should be one of (\[.*\])", error)
                return None
            if names := ", ".join(_listed(r"available configs: (\[.*\])", error)):
                raise Refusal(f"{where}: several configurations: {names}. Name one of them with data.name.") from error
            raise Refusal(f"{where}: {reason(error)}. Check data.name and data.revision.") from error
        except Exception as error:
            if HF_HUB_OFFLINE:
                raise Refusal(
                    f"{where}: no file or folder here, not in the cache, and HF_HUB_OFFLINE=1 bars it. "
                    "Unset it, or give a local file."
                ) from error
            raise Refusal(
                f"{where}: cannot be loaded ({type(error).__name__}: {reason(error)}). "
                "Check data.name and data.revision, or give a local file."
            ) from error
        self.names = tuple(getattr(getattr(data, "info", None), "splits", None) or self.names)
        return numbered(f"{self.path}[{split}]", undecoded(data))

    def unused(self, read: tuple[str, ...]) -> list[str]:
        """The splits there are beside these."""
        parts = {part for split in read for part in re.split(r"\+|\[[^]]*\]", split)}  # of train[:10%]+validation
        return [name for name in self.names if name not in parts]

    def unread(self, read: tuple[str, ...]) -> list[str]:
        """They, as rows of theirs would be named."""
        return [f"{self.path}[{name}]" for name in self.unused(read)]


@contextmanager
def _from_there_alone(where: str) -> Iterator[None]:
    """Meanwhile `datasets` looks for the files that a card names on the Hub alone: it would take any path of this
    machine for rows of the data set, and ask any address for them.

    Raises:
        Refusal: the card names one.
    """
    from datasets import data_files

    resolve = data_files.resolve_pattern

    @functools.wraps(resolve)
    def resolved(pattern: str, *args, **kwargs) -> list[str]:
        place = str(pattern).rpartition("::")[2]  # of an archive, that itself
        if place.startswith(("/", "~", "\\")) or re.match(r"(?!hf:)\w+:", place):
            raise Refusal(
                f"{where}: its card names files elsewhere ({one_line(pattern)[:80]}). Fetch it, and mend the card."
            )
        return resolve(pattern, *args, **kwargs)

    data_files.resolve_pattern = resolved
    try:
        yield
    finally:
        data_files.resolve_pattern = resolve


def _listed(pattern: str, error: Exception) -> tuple[str, ...]:
    """The names that `datasets` lists in what it says."""
    match = re.search(pattern, str(error))
    try:
        return tuple(map(str, ast.literal_eval(match[1]))) if match else ()
    except (ValueError, SyntaxError):
        return ()


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
        raise Refusal(f"{path}: not a regular file. Give a file that ends in one of {KNOWN}.")
    if kind := ending(file.name):
        return kind
    raise Refusal(f"{path}: unknown kind of file. Give one that ends in {KNOWN}.")


def ending(name: str) -> str:
    """The one of `KINDS` that a file's name ends in, "" for none."""
    return max((kind for kind in KINDS if name.lower().endswith(kind)), key=len, default="")


def _refuse_pointer(path: str, file: Path) -> None:
    """What a clone or a download leaves in place of a file, whatever its ending."""
    with open(file, "rb") as stream:
        head = stream.read(100)
    if head.startswith(LFS_POINTER):
        raise Refusal(f"{path}: a Git LFS pointer, not the data. Run `git lfs pull` where it was cloned.")
    if WEB_PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        raise Refusal(f"{path}: a web page, not data. Download the file itself.")


def _text_rows(path: str, file: Path, kind: str) -> Iterator[Located]:
    with _unpacked(file, kind) as stream:
        is_whole = kind.startswith(WHOLE) and not kind.startswith(LINES)
        lines = _decoded(path, stream, JSON_LIMIT if is_whole else LINE_LIMIT)
        delimiter = next((TABLES[each] for each in TABLES if kind.startswith(each)), None)
        if delimiter:
            yield from csv_rows.rows(path, lines, delimiter, LINE_LIMIT)
        else:
            yield from json_rows.rows(path, _bounded(path, lines) if is_whole else lines, JSON_LIMIT)


def _unpacked(file: Path, kind: str):
    if kind.endswith(".gz"):
        return gzip.open(file, "rb")
    if not kind.endswith(".zst"):
        return open(file, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"), 2**16)


def _decoded(path: str, stream, most: int) -> Iterator[tuple[int, str]]:
    """Numbered lines of at most so many bytes as text; the first line without its byte order mark."""
    for number, raw in enumerate(iter(functools.partial(stream.readline, most + 1), b""), 1):
        if number == 1:
            _refuse_magic(path, raw)
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > most:
            if most == JSON_LIMIT:
                raise json_rows.too_large(path, most)
            raise Refusal(f"{path}:{number}: a line of more than {most >> 20} MiB. Mend or remove it.")
        if b"\0" in raw:
            raise Refusal(f"{path}:{number}: a binary file (NUL byte), not text. Give {', '.join(TEXT_KINDS)}.")
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refusal(
                f"{path}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1}). "
                "Save the file as UTF-8."
            ) from error


def _bounded(path: str, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The lines of a .json, which may be one value over all of them."""
    size = 0
    for number, line in lines:
        size += len(line)
        if size > JSON_LIMIT:
            raise json_rows.too_large(path, JSON_LIMIT)
        yield number, line


def _refuse_magic(path: str, head: bytes) -> None:
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            raise Refusal(f"{path}: a binary file ({what}), not text. Rename it to what it is, or convert it.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refusal(f"{path}:1: not UTF-8 (UTF-16 byte order mark). Save the file as UTF-8.")


def undecoded(data):
    """A Dataset whose pictures, sound and the like are what lies in its files: decoded, a row would have whatever file
    or address it names opened, and no recipe reads them."""
    found = [getattr(getattr(data, "info", None), "features", None) or {}]
    while found:
        feature = found.pop()
        if isinstance(feature, dict | list | tuple):
            found += feature.values() if isinstance(feature, dict) else feature
        elif inner := getattr(feature, "feature", None):
            found.append(inner)
        elif type(feature).__name__ != "Json" and hasattr(feature, "decode"):
            feature.decode = False
    return data


def numbered(name: str, rows) -> Iterator[Located]:
    return ((f"{name}:{number}", row) for number, row in enumerate(rows, 1))
