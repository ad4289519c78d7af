"""Rows out of JSON, in whichever shape a library wrote it.

| the text holds                                         | e.g. of                                   | rows           |
| ------------------------------------------------------ | ----------------------------------------- | -------------- |
| objects, each on its line, spread over lines or joined | `to_json(lines=True)`, `jq`               | each object    |
| lists of objects, one or several                       | `json.dump`, datasets' `lines=False`      | each entry     |
| one object around a list of objects                    | `{"data": [...]}`, the Hub viewer's rows  | each entry     |
| one object of lists of one length                      | `json.dump(dataset.to_dict())`            | by position    |
| objects of objects under numbers                       | pandas' `to_json()`, `orient="index"`     | by number      |
| `columns` and `data`                                   | pandas' `orient="split"`, `"tight"`       | each of `data` |
| lists of lists; lists by split; objects by other names | `orient="values"`                         | none: refused  |

Objects on lines of their own are read a line at a time; a value that goes on beyond its line, with all behind it.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from rlhf_recipes.errors import Refusal
from rlhf_recipes.secrets import reason

HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
SPACE = re.compile(r"\s*")
# Keys under which files keep their rows beside notes of their own.
WRAPPERS = ("data", "rows", "instances", "examples", "items", "records", "samples", "results", "entries", "pairs")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
OF_TABLES = ("columns", "data", "index", "index_names", "column_names")
WAY = 'Write a row a line: pandas\' to_json(orient="records", lines=True).'


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    Raises:
        ValueError: a key that appears twice, of which json keeps the last value.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r:.40} appears twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def rows(path: str, lines: Iterator[tuple[int, str]], most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a text: `path:line` of objects that follow one another, `path:row` of lists and tables.

    Args:
        lines: numbered from 1.
        most: characters of what is not one value a line.

    Raises:
        Refusal: not JSON, more than `most`, or a shape that has no rows.
    """
    values = _values(path, lines, most)
    first, second = next(values, None), next(values, None)
    if first is None:
        return
    values = chain((first,), () if second is None else (second,), values)
    if _table(path, *first, alone=second is None) is None:
        for number, value in values:
            yield f"{path}:{number}", _row(f"{path}:{number}", value)
        return
    count = 0
    for number, value in values:
        entries = _table(path, number, value, alone=second is None)
        for entry in [value] if entries is None else entries:
            count += 1
            yield f"{path}:{count}", _row(f"{path}:{count}", entry)


def too_large(path: str, most: int) -> Refusal:
    whole = f"{most >> 20} MiB of JSON, which is read whole"
    return Refusal(f"{path}: more than {whole}. Write it as .jsonl, a row a line.")


def _values(path: str, lines: Iterator[tuple[int, str]], most: int) -> Iterator[tuple[int, Any]]:
    """Every value of the text with the line that it begins on."""
    for number, line in lines:
        try:
            value = DECODER.decode(line)
            _refuse_half_pairs(value, line)
        except json.JSONDecodeError as error:
            if not line.strip():
                continue
            try:
                joined = list(_sequence(line, number))
            except json.JSONDecodeError:
                yield from _spread(path, number, line, error, lines, most)
                return
            except (ValueError, RecursionError) as inner:
                raise _unreadable(f"{path}:{number}", inner) from inner
            yield from joined
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            raise _unreadable(f"{path}:{number}", error) from error
        else:
            yield number, value


def _spread(path: str, number: int, line: str, error: json.JSONDecodeError, lines, most: int):
    """The values of a line that none ends on, and of all lines behind it."""
    parts, size, goes_on = [line], len(line), line.rstrip().endswith(("[", "{", ",", ":"))
    for _, other in lines:
        if not goes_on and other.strip():
            goes_on = other.lstrip().startswith((",", ":", "]", "}"))
            if not goes_on:
                raise _invalid(path, number, error) from error
        size += len(other)
        if size > most:
            raise too_large(path, most)
        parts.append(other)
    try:
        yield from _sequence("".join(parts), number)
    except json.JSONDecodeError as inner:
        following = next(filter(str.strip, parts[1:]), "")
        # Its own fault, or that of a row that was cut off before the next one.
        if inner.lineno == 1 or (line.lstrip().startswith("{") and _is_object(following)):
            raise _invalid(path, number, error) from error
        raise _invalid(path, number + inner.lineno - 1, inner) from inner
    except (ValueError, RecursionError) as inner:
        raise _unreadable(f"{path}:{number}", inner) from inner


def _sequence(text: str, line: int) -> Iterator[tuple[int, Any]]:
    """(line, value) of values with nothing but space between them."""
    at = SPACE.match(text).end()
    line += text.count("\n", 0, at)
    while at < len(text):
        value, end = DECODER.raw_decode(text, at)
        _refuse_half_pairs(value, text, at, end)
        yield line, value
        end = SPACE.match(text, end).end()
        line += text.count("\n", at, end)
        at = end


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_half_pairs(value: Any, text: str, begin: int = 0, end: int = sys.maxsize) -> None:
    """Raise for half of a surrogate pair, which json reads but no tokenizer takes."""
    if HALF_PAIR.search(text, begin, end):
        json.dumps(value, ensure_ascii=False).encode()


def _invalid(path: str, number: int, error: json.JSONDecodeError) -> Refusal:
    what = f"{error.msg.removesuffix(' at')} at character {error.colno}"
    cut = not error.doc[error.pos :].strip() and error.doc.lstrip().startswith("[")
    way = "The file is cut off: write or fetch it again." if cut else "Mend or remove the line."
    return Refusal(f"{path}:{number}: not valid JSON ({what}). {way}")


def _unreadable(where: str, error: Exception) -> Refusal:
    return Refusal(f"{where}: not readable JSON ({reason(error)}). Mend or remove the line.")


def _row(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")
        if isinstance(value, str) and _is_object(value):
            kind = "a text that is JSON itself (encoded twice)"
        raise Refusal(f'{where}: {kind}, but a row is an object like {{"prompt": ...}}. Mend or remove it.')
    if "row_idx" in value and isinstance(value.get("row"), dict):  # of the Hub's viewer
        if value.get("truncated_cells"):
            raise Refusal(f"{where}: the Hub's viewer cut {value['truncated_cells']!r:.80}. Download the data set.")
        return value["row"]
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def _table(path: str, number: int, value: Any, alone: bool) -> list[Any] | None:
    """The rows that a value holds; None where it is a row itself.

    Args:
        alone: nothing else is in the file. An object of lists is a row among others, a table alone.
    """
    if isinstance(value, list):
        if value and all(isinstance(entry, list) for entry in value):
            raise Refusal(f'{path}: lists of lists (pandas\' orient="values"), without names of columns. {WAY}')
        are_rows = not value or (isinstance(value[0], dict) and not _is_message(value[0]))
        return value if are_rows else _row(f"{path}:{number}", value)
    if not isinstance(value, dict) or not value:
        return None
    if {"columns", "data"} <= value.keys() <= set(OF_TABLES):
        names, data = value["columns"], value["data"]
        is_sound = isinstance(names, list) and isinstance(data, list) and len({*map(str, names)}) == len(names)
        if not is_sound or not all(isinstance(cells, list) and len(cells) == len(names) for cells in data):
            raise Refusal(f'{path}: pandas\' orient="split", but not a cell for each column. {WAY}')
        return [dict(zip(map(str, names), cells, strict=True)) for cells in data]
    return _by_key(path, value, alone)


def _by_key(path: str, value: dict[str, Any], alone: bool) -> list[Any] | None:
    """The rows of an object of objects or of lists; None where it is a row itself."""
    inner = list(value.values())
    if all(isinstance(each, dict) and each and not _is_message(each) for each in inner):
        keys = inner[0].keys()
        if all(map(str.isdigit, value)):
            return inner
        same = all(each.keys() == keys for each in inner)
        if same and all(map(str.isdigit, keys)):
            return [{name: cells[key] for name, cells in value.items()} for key in keys]
        if alone and len(inner) == 1:
            return _by_key(path, inner[0], alone)
        if alone and same:
            raise Refusal(
                f"{path}: an object of {len(inner)} objects with the same keys: rows by name, or columns by name of a "
                f"row. {WAY}"
            )
        return None
    if not alone:
        return None
    lists = [key for key, each in value.items() if isinstance(each, list) and not any(map(_is_message, each))]
    of_rows = [key for key in lists if value[key] and all(isinstance(entry, dict) for entry in value[key])]
    if len(of_rows) == len(value) > 1 and all(key in SPLITS for key in value):
        files = ", ".join(f"{key}.json" for key in value)
        raise Refusal(f"{path}: one object of the splits {', '.join(value)}. Write a folder of {files}, and give it.")
    wrapped = [key for key in of_rows if len(value) == 1 or key in WRAPPERS]
    if len(wrapped) == 1:
        return value[wrapped[0]]
    if len(lists) < len(value):
        return None
    sizes = {key: len(value[key]) for key in lists}
    if len(set(sizes.values())) > 1:
        raise Refusal(f"{path}: one object of columns of different lengths ({sizes!r:.120}). {WAY}")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*inner, strict=True)]
