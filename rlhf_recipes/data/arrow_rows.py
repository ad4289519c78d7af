"""Rows out of Parquet and Arrow: the file format (feather), or the stream of `save_to_disk`.

Kilobytes on the disk may be gigabytes unpacked, and more where rows repeat a text: what a file says of its sizes is
read first, and of a column no more than about `most` bytes are Python's at a time.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_recipes.data import arrow_headers
from rlhf_recipes.errors import Refusal
from rlhf_recipes.secrets import reason

BATCH = 1000  # rows unpacked at a time


def rows(path: str, file: Path, is_parquet: bool, most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:row`, row).

    Args:
        most: bytes of a row.

    Raises:
        Refusal: not readable, text that is no UTF-8, a column named twice, a row of more than `most`.
    """
    if file.stat().st_size == 0:
        return
    import pyarrow

    try:
        yield from _located(path, (_of_parquet if is_parquet else _of_arrow)(path, file, most), most)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "strerror", None):
            raise
        kind = "parquet" if is_parquet else "Arrow"
        raise Refusal(f"{path}: not a readable {kind} file ({reason(error)}). Write it again.") from error


def _of_parquet(path: str, file: Path, most: int) -> Iterator[Any]:
    """Batches of a group of rows at a time, whose columns unpack to no more than about `most` each.

    A text that a thousand rows repeat lies in the file once, in its group's dictionary of the column, whose longest
    entry says how many rows that may be. Other texts lie there as often as they are unpacked.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    _refuse_huge_groups(path, table.metadata, most)
    columns = [table.metadata.schema.column(i) for i in range(table.metadata.num_columns)]
    texts = [i for i, column in enumerate(columns) if column.physical_type == "BYTE_ARRAY"]
    named = [columns[i].path for i in texts]
    encoded = pyarrow.parquet.ParquetFile(file, metadata=table.metadata, read_dictionary=named)
    for number in range(table.num_row_groups):
        group, rows = table.metadata.row_group(number), BATCH
        for i, name in zip(texts, named, strict=True):
            chunk = group.column(i)
            values = -(-chunk.num_values // max(group.num_rows, 1))  # of a row, in the mean
            if rows * values * chunk.total_uncompressed_size > most:
                found = (max(map(_longest, batch.columns)) for batch in
                         encoded.iter_batches(BATCH, row_groups=[number], columns=[name]))  # fmt: skip
                rows = min(rows, max(most // (values * next(filter(None, found), 1)), 1))
        yield from table.iter_batches(rows, row_groups=[number])


def _longest(array) -> int:
    """Bytes of the longest text in the dictionaries of an array."""
    import pyarrow
    import pyarrow.compute

    found = [leaf.dictionary for leaf in _leaves(array) if isinstance(leaf, pyarrow.DictionaryArray)]
    return max((pyarrow.compute.max(pyarrow.compute.binary_length(each)).as_py() or 0 for each in found), default=0)


def _of_arrow(path: str, file: Path, most: int) -> Iterator[Any]:
    import pyarrow.ipc

    with pyarrow.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        refuse_huge_batches(path, source, 8 if is_file else 0, most)
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        # What is mapped is as it lies on the disk: an offset that points elsewhere would be followed.
        yield from (batch for batch in batches if batch.validate(full=True) is None)


def _located(path: str, batches: Iterator[Any], most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        twice = next((name for name, count in Counter(batch.schema.names).items() if count > 1), None)
        if twice is not None:
            raise Refusal(f"{path}: column {twice!r} appears twice. Rename one.")
        if batch.nbytes > most * max(batch.num_rows, 1):
            raise _too_long(path, number + 1, "rows", most)
        for part in _parts(path, number, batch, most):
            for row in _unpacked_rows(path, number, part):
                number += 1
                yield f"{path}:{number}", row


def _parts(path: str, number: int, batch, most: int) -> Iterator[Any]:
    """A batch in parts of so many rows that their texts come to no more than `most`.

    Args:
        number: of the rows before it.

    Raises:
        Refusal: a row alone comes to more.
    """
    begin, size = 0, BATCH
    while begin < batch.num_rows:
        part = batch.slice(begin, size)
        if sum(map(_bytes, part.columns)) > most:
            if part.num_rows == 1:
                raise _too_long(path, number + begin + 1, "a row", most)
            size = part.num_rows // 2
            continue
        yield part
        begin, size = begin + part.num_rows, min(2 * size, BATCH)


def _bytes(array) -> int:
    """What Python makes of an array's texts, those that are repeated as often as they are."""
    import pyarrow
    import pyarrow.compute

    size, texts = 0, (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary())
    for leaf in _leaves(array):
        if not isinstance(leaf, pyarrow.DictionaryArray):
            size += leaf.nbytes
        elif leaf.type.value_type in texts:
            sizes = pyarrow.compute.binary_length(leaf.dictionary)
            size += pyarrow.compute.sum(sizes.take(leaf.indices)).as_py() or 0
    return size


def _leaves(array) -> Iterator[Any]:
    """The arrays of texts and numbers in one of lists and structures."""
    inner = array.flatten() if hasattr(array, "flatten") else None
    if inner is None:
        yield array
    else:
        for each in inner if isinstance(inner, list) else [inner]:
            yield from _leaves(each)


def _unpacked_rows(path: str, number: int, batch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):  # which one is it?
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                where = f"{path}:{number + index + 1}"
                raise Refusal(f"{where}: not UTF-8 ({error.reason}). Mend or remove the row.") from error
        raise


def refuse_huge_batches(path: str, source, begin: int, most: int) -> None:
    """By what the header of each batch says, before one is unpacked.

    Args:
        begin: of the messages in the file.

    Raises:
        Refusal: its rows are too large.
    """
    import pyarrow.ipc

    source.seek(begin)
    number = 1
    with suppress(pyarrow.ArrowInvalid, struct.error):  # what reads the rows says what is wrong
        for message in pyarrow.ipc.MessageReader.open_stream(source):
            rows, size = arrow_headers.unpacked(message)
            if size > most * max(rows, 1):
                raise _too_long(path, number, "rows", most)
            number += rows * (message.type == "record batch")


def _refuse_huge_groups(path: str, metadata, most: int) -> None:
    """By what the file says of each of its groups of rows, before one is unpacked."""
    number = 1
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        if group.total_byte_size > most * max(group.num_rows, 1):
            raise _too_long(path, number, "rows", most)
        number += group.num_rows


def _too_long(path: str, number: int, what: str, most: int) -> Refusal:
    return Refusal(f"{path}:{number}: {what} of more than {most >> 20} MiB. Mend or remove it.")
