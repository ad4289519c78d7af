"""Examples in files of Arrow that are mapped into memory: what is looked at is read, a thousand rows at a time.

    writer = Writer(("prompt", "chosen", "rejected", "family", "prompt_id", "p"))
    for example in examples:
        writer.add(example)
    rows = writer.rows()  # a sequence: rows[3], rows[:10], rows.select([5, 2]), for row in rows
    dataset = rows.to_dataset()  # of the same files, nothing is copied

The files lie in a folder of this process under TMPDIR, beside what trainers derive from them; they go with the last
rows that lie in them, the folder goes with the process. Of a process that was killed the next one removes it.
"""

import atexit
import fcntl
import functools
import hashlib
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc

from rlhf_recipes.errors import Refusal, first_line

Example = dict[str, Any]

BATCH = 1_000  # rows that are Python's objects at a time
# Rows, and characters of text, that are written together; rows in any order are gathered faster from few large parts.
PART_ROWS, PART_CHARACTERS = 5_000, 2**25
PREFIX, LOCK = "rlhf-recipes-rows-", "lock"

TURNS = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
KINDS = {"family": pyarrow.string(), "prompt_id": pyarrow.string(), "split": pyarrow.string(),
         "p": pyarrow.float64(), "margin": pyarrow.float64(), "label": pyarrow.bool_(),
         "pair": pyarrow.int64()}  # fmt: skip


class Rows(Sequence):
    """Examples in some order; equal to any sequence of the same examples.

    Args:
        files: in which they lie.
        index: (R,) which of their rows, counted over all files.
    """

    def __init__(self, files: "tuple[_File, ...]", index: np.ndarray):
        self.files, self.index = files, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: int | slice) -> "Example | Rows":
        if isinstance(which, slice):
            return self.select(np.arange(len(self))[which])
        return self._read(self.index[[which]])[0]

    def __iter__(self) -> Iterator[Example]:
        for batch in self.batches():
            yield from batch

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None

    def __add__(self, other: Iterable[Example]) -> list[Example]:
        return [*self, *other]

    @property
    def keys(self) -> list[str]:
        """What every example has."""
        return self.files[0].schema.names

    def batches(self, size: int = BATCH) -> Iterator[list[Example]]:
        for start in range(0, len(self), size):
            yield self._read(self.index[start : start + size])

    def select(self, numbers: Sequence[int]) -> "Rows":
        """Those of these numbers, in their order."""
        return Rows(self.files, self.index[np.asarray(numbers, dtype=np.int64)])

    @staticmethod
    def joined(*selected: "Rows") -> "Rows":
        """Rows selected from the same, one after another."""
        return Rows(selected[0].files, np.concatenate([rows.index for rows in selected]))

    def find(self, others: "Rows") -> np.ndarray:
        """The numbers under which rows selected from these are here."""
        order = np.argsort(self.index)
        return order[np.searchsorted(self.index[order], others.index)]

    def replaced(self, numbers: Sequence[int], others: "Rows") -> "Rows":
        """With other rows in the place of those of these numbers."""
        index = self.index.copy()
        index[np.asarray(numbers, dtype=np.int64)] = others.index + sum(file.count for file in self.files)
        return Rows((*self.files, *others.files), index)

    def column(self, key: str) -> pyarrow.ChunkedArray:
        """The values of a key that holds no messages."""
        whole = pyarrow.chunked_array([part.column(key) for file in self.files for part in file.parts], KINDS[key])
        return whole.take(pyarrow.array(self.index))

    def groups(self, key: str) -> list[int]:
        """A number for each, the same where the value under the key is the same."""
        return self.column(key).combine_chunks().dictionary_encode().indices.to_pylist()

    def count(self, key: str) -> int:
        """How many have a value under a key."""
        return len(self) - self.column(key).null_count if key in self.keys else 0

    def digest(self, keys: Sequence[str]) -> str:
        """16 hex digits of what they hold under these keys, and of their order."""
        found = hashlib.blake2b(repr(keys).encode(), digest_size=8)
        for batch in self.batches():
            found.update(repr([[example[key] for key in keys] for example in batch]).encode())
        return found.hexdigest()

    def to_dataset(self):
        """A `datasets.Dataset` of the same files."""
        from datasets import Dataset, concatenate_datasets

        whole = concatenate_datasets([Dataset.from_file(str(file.path)) for file in self.files])
        return whole.select(self.index)

    def _read(self, index: np.ndarray) -> list[Example]:
        order = np.argsort(index, kind="stable")
        ordered, found, first = index[order], [], 0
        for file in self.files:
            inside = ordered[np.searchsorted(ordered, first) : np.searchsorted(ordered, first + file.count)] - first
            found += file.take(inside)
            first += file.count
        examples: list[Example] = [{}] * len(found)
        for place, example in zip(order.tolist(), found, strict=True):
            examples[place] = example
        return examples


class Writer:
    """Writes examples into a file, one after another.

    Args:
        keys: of every example; those that are none of `KINDS` hold messages. A value that is missing is None.

    Raises:
        Refusal: no room.
    """

    def __init__(self, keys: Iterable[str]):
        self.schema = pyarrow.schema([(key, KINDS.get(key, TURNS)) for key in keys])
        self._waiting: list[Example] = []
        self._characters = self._count = 0
        with _room():
            handle, path = tempfile.mkstemp(".arrow", dir=_folder(os.getpid()))
        self._path = Path(path)
        self._discard = weakref.finalize(self, _unlink, self._path, os.getpid())
        self._file = os.fdopen(handle, "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self.schema)

    def add(self, example: Example) -> None:
        self._waiting.append(example)
        self._characters += sum(
            len(turn["content"]) for turns in example.values() if isinstance(turns, list) for turn in turns
        )
        if len(self._waiting) >= PART_ROWS or self._characters >= PART_CHARACTERS:
            self._write()

    def rows(self) -> Rows:
        """All of them, in order; ends the writing."""
        self._write()
        with _room():
            self._stream.close()
            self._file.close()
        self._discard.detach()
        return Rows((_File(self._path, self.schema),), np.arange(self._count))

    def _write(self) -> None:
        if not self._waiting:
            return
        columns = [_column(field, [example.get(field.name) for example in self._waiting]) for field in self.schema]
        with _room():
            self._stream.write_batch(pyarrow.record_batch(columns, schema=self.schema))
        self._count += len(self._waiting)
        self._waiting, self._characters = [], 0


def written(examples: Iterable[Example], keys: Iterable[str] = ()) -> Rows:
    """Rows of examples that have the keys of the first; rows themselves as they are."""
    if isinstance(examples, Rows):
        return examples
    writer = None
    for example in examples:
        writer = writer or Writer(keys or example)
        writer.add(example)
    return (writer or Writer(keys)).rows()


def select(rows: Sequence[Example], numbers: Sequence[int]) -> Sequence[Example]:
    """Those of these numbers, of rows or of a list."""
    return rows.select(numbers) if isinstance(rows, Rows) else [rows[number] for number in numbers]


class _File:
    """A written file, which is mapped into memory, and is deleted when nobody in the process that wrote it holds it.
    Pickled, it is that file."""

    def __init__(self, path: Path, schema: pyarrow.Schema, owner: int | None = None):
        self.path, self.schema, self.owner = path, schema, owner or os.getpid()
        with open(path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.parts = list(pyarrow.ipc.open_stream(pyarrow.py_buffer(self._map)))
        self.starts = np.cumsum([0, *(part.num_rows for part in self.parts)])
        self.count = int(self.starts[-1])
        weakref.finalize(self, _unlink, path, self.owner)

    def __reduce__(self):
        return _File, (self.path, self.schema, self.owner)

    def take(self, index: np.ndarray) -> list[Example]:
        """The rows of these numbers, which ascend."""
        taken = []
        cuts = np.searchsorted(index, self.starts)
        for part, start, begin, end in zip(self.parts, self.starts, cuts, cuts[1:], strict=False):
            if end > begin:
                taken.append(part.take(pyarrow.array(index[begin:end] - start)))
                # What was copied need not stay: pages that were touched count as this process's memory.
                self._map.madvise(mmap.MADV_DONTNEED)
        return _examples(pyarrow.concat_batches(taken)) if taken else []


def _column(field: pyarrow.Field, values: list) -> pyarrow.Array:
    """Of values, or of messages: far faster than pyarrow, which looks at every dict."""
    if field.type != TURNS:
        return pyarrow.array(values, field.type)
    turns = [turn for each in values for turn in each or ()]
    texts = [pyarrow.array([turn[key] for turn in turns], pyarrow.string()) for key in ("role", "content")]
    ends = np.cumsum([0, *(len(each or ()) for each in values)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(ends, pyarrow.StructArray.from_arrays(texts, fields=list(TURNS.value_type)))


def _examples(part: pyarrow.RecordBatch) -> list[Example]:
    columns = []
    for column in part.columns:
        if column.type != TURNS:
            columns.append(column.to_pylist())
            continue
        roles, texts = (column.values.field(key).to_pylist() for key in ("role", "content"))
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        ends = column.offsets.to_pylist()
        columns.append([turns[begin:end] for begin, end in pairwise(ends)])
    return [dict(zip(part.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


@functools.cache
def _folder(owner: int) -> Path:
    """Of this process: a fork has one of its own. The folders of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), open(left, "ab") as lock:  # another user's, or held by a process that lives
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / f".{LOCK}", os.O_CREAT | os.O_RDWR)
    with suppress(OSError):  # a file system without locks: nobody takes the folder for left
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / f".{LOCK}").rename(folder / LOCK)
    atexit.register(_remove, folder, owner)
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _unlink(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = error.strerror or first_line(error)
        raise Refusal(
            f"TMPDIR={tempfile.gettempdir()}: rows cannot be written ({what}). Free space, or set TMPDIR to a folder "
            "that has as much of it as the data takes."
        ) from error
