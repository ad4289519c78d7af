"""Rows out of CSV: the delimiter, the space behind it and the quotes are found in the first lines.

Comma, semicolon (of Excel, where the comma is the decimal sign), tab or bar; `"a", "b"` with a space; quotes doubled,
or behind a backslash (of Spark and MySQL). The dialect is the one in which the most rows have as many cells as the
header; where several fit, the usual one.
"""

import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from rlhf_recipes.errors import Refusal

CELL_LIMIT = 2**31 - 1  # csv's own limit of 128 KiB, of the whole process, refuses long conversations
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAMPLE_LINES, SAMPLE_CHARACTERS = 100, 2**20
EXCEL_HINT = re.compile(r'"?sep=([,;|\t])"?\s*', re.IGNORECASE)
LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")


def rows(path: str, lines: Iterator[tuple[int, str]], usual: str, most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:line`, row) of a table whose first line names the columns.

    Numbers in a first column without a name (the index that pandas and R write) and empty columns are left out.

    Args:
        lines: numbered from 1.
        usual: the delimiter of this kind of file.
        most: characters of a row.

    Raises:
        Refusal: a quote that is not closed, cells without a column, a column named twice, a row of more than `most`.
    """
    csv.field_size_limit(CELL_LIMIT)
    header, start, size = None, 1, 0
    pieces = _pieces(lines)
    sample, is_whole = _sample(pieces)
    hint = EXCEL_HINT.fullmatch(sample[0]) if sample else None
    if hint:
        sample[0] = "\n"  # keeps the count of lines
    dialect = _dialect(sample, is_whole, usual, hint[1] if hint else None)

    def texts() -> Iterator[str]:
        nonlocal size
        for text in chain(sample, pieces):
            size += len(text)
            if size > most:  # a quote that is never closed, say
                raise Refusal(f"{path}:{start}: a row of more than {most >> 20} MiB. Mend or remove it.")
            yield text

    reader = csv.reader(texts(), strict=True, **dialect)
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
            header = [name.strip() for name in cells]
            named = [(index, name) for index, name in enumerate(header) if name]
            blank = [index for index, name in enumerate(header) if index and not name]
            twice = next((name for index, name in named if name in header[:index]), None)
            if twice is not None:
                raise Refusal(f"{where}: column {twice!r} appears twice. Rename one.")
        elif len(cells) != len(header):
            what = DELIMITERS.get(dialect["delimiter"], repr(dialect["delimiter"]))
            raise Refusal(f"{where}: {len(cells)} cells under {len(header)} columns. Quote cells that hold {what}.")
        elif len(named) == len(header):
            yield where, dict(zip(header, map(_cell, cells), strict=True))
        else:
            lost = next((index for index in blank if cells[index].strip()), None)
            if lost is not None:
                raise Refusal(f"{where}: text under column {lost + 1}, which has no name. Name it in the first line.")
            row = {name: _cell(cells[index]) for index, name in named}
            yield where, row if header[0] or (cells[0] or "0").isdigit() else {"": cells[0], **row}


def _pieces(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """The lines, also of a file that ends them with a carriage return alone."""
    _, first = next(lines, (1, ""))
    if LONE_RETURN.search(first.rstrip("\r\n")):
        for text in chain((first,), (text for _, text in lines)):
            yield from filter(None, LONE_RETURN.split(text))
    else:
        yield first
        for _, text in lines:
            yield text


def _sample(pieces: Iterator[str]) -> tuple[list[str], bool]:
    """(first lines, whether they are all)."""
    sample, size = [], 0
    for text in pieces:
        sample.append(text)
        size += len(text)
        if len(sample) == SAMPLE_LINES or size > SAMPLE_CHARACTERS:
            return sample, False
    return sample, True


def _dialect(sample: list[str], is_whole: bool, usual: str, known: str | None) -> dict[str, Any]:
    """What `csv.reader` is told."""
    header = next((text for text in sample if text.strip()), "")
    quote = "'" if header.startswith("'") and '"' not in header else '"'
    best, chosen = None, {"delimiter": known or usual, "quotechar": quote}
    escaped = any(f"\\{quote}" in text for text in sample)
    for delimiter in [known] if known else sorted(DELIMITERS, key=lambda each: each != usual):
        for escape in ({}, {"escapechar": "\\", "doublequote": False})[: 1 + escaped]:
            for skip in (False, True):
                dialect = {"delimiter": delimiter, "quotechar": quote, "skipinitialspace": skip, **escape}
                table, is_sound = _table(sample, is_whole, dialect)
                columns = len(table[0]) if table else 0
                if columns < 2:
                    break
                agree = sum(len(cells) == columns for cells in table) / len(table)
                is_spaced = not skip and _is_spaced(sample, table[0], delimiter, quote)
                score = is_sound, agree, not is_spaced, columns
                if best is None or score > best:
                    best, chosen = score, dialect
                if not is_spaced:
                    break
    return chosen


def _table(sample: list[str], is_whole: bool, dialect: dict[str, Any]) -> tuple[list[list[str]], bool]:
    """(rows, whether all of the sample is valid); a row that the sample cuts off is left out."""
    table = []
    try:
        for cells in csv.reader((text[:SAMPLE_CHARACTERS] for text in sample), strict=True, **dialect):
            if cells:
                table.append(cells)
    except csv.Error as error:
        return table, not is_whole and "unexpected end" in str(error)
    return table, True


def _is_spaced(sample: list[str], header: list[str], delimiter: str, quote: str) -> bool:
    """Whether a space follows each delimiter of the header, or stands between one and a quote that opens a cell."""
    # Within a quoted cell a quote is doubled, or closes it.
    opens = re.compile(rf"{re.escape(delimiter)} +{quote}(?![{quote}{re.escape(delimiter)}\r\n]|$)")
    return all(name.startswith(" ") for name in header[1:]) or any(map(opens.search, sample))


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
