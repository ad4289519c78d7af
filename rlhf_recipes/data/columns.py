"""The columns of a source by the values of its first rows: what each holds, and under which names people know it."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_recipes.data.messages import is_messages
from rlhf_recipes.data.row import MISSING, UNRATED, as_list, at, is_blank
from rlhf_recipes.errors import Refusal

COLUMNS = (
    *("prompt", "system", "input", "history"),
    *("chosen", "rejected", "first", "second", "preference", "completion", "label", "messages"),
    *("responses", "scores", "ranks", "margin", "p", "family", "split"),
)
# Our name -> other names that people give the column, the likeliest first.
ALIASES = {
    key: tuple(names.split())
    for key, names in {
        "prompt": "question instruction query user_input input.messages problem request post input context history",
        "system": "system_prompt system_message system_instruction sys_prompt",
        "input": "context",
        "history": "context chat_history conversation_history previous_turns",
        "completion": "output response answer reply target",
        "messages": "conversations conversation dialogue dialog turns chat",
        "responses": "completions answers generations outputs candidates",
        "scores": "ratings rewards score rating reward",
        "ranks": "rank ranking rankings",
        "label": "labels thumbs thumbs_up feedback is_good liked upvoted desirable is_desirable kto_tag",
    }.items()
}
WORD = 40  # characters that a name, an id or a verdict may have; an answer may be as short, a column of answers is not
# What a column of several kinds counts as.
MIXED = (
    ({"word", "number"}, "word"),
    ({"flag", "number"}, "number"),
    ({"text", "word", "number"}, "text"),
    ({"text", "word", "messages"}, "messages"),
    ({"texts", "numbers"}, "texts"),
)
# Numbers of which the lower is better, and orders.
LOWER = re.compile("loss|perplexity|error|toxic|harm|penalty|distance|rank|order|position")
SEVERAL = object()  # in place of the one value of a column
EACH, MOST = 200, 1000  # rows that are kept of a column that comes late, and of all of them
NUMBER = re.compile(r"\s*[+-]?\d{1,15}(\.\d{1,15})?\s*")


class Source:
    """The columns of a file, or of another source, by the values of its first rows.

    Attributes:
        name: of the source.
        columns: our names -> the user's.
        rows: those that are looked at.
        top: the columns that are not left unread on purpose.
        values: of each column, and of each key of those that hold objects (`input.messages`).
        kinds: of each of these: see `kind`.
        inner: likewise of each key of the columns that hold lists of objects (`completions.model`).
        ignored: what of `ignore` there is, at any depth.
    """

    def __init__(self, rows: Sequence[tuple[str, dict]], columns: Mapping[str, str | None], ignore: Iterable[str]):
        self.name = rows[0][0].rpartition(":")[0]
        self.columns = columns
        self.rows = [row for _, row in rows]
        self.values: dict[str, list] = {}
        for row in self.rows:
            for name, value in row.items():
                if name not in ignore:
                    self.values.setdefault(str(name), []).append(value)
        self.top = list(self.values)
        for name in self.top:
            for inner in _keys(self.values[name]):
                path = f"{name}.{inner}"
                if path not in ignore and inner not in ignore:
                    self.values[path] = [value.get(inner) for value in self.values[name] if isinstance(value, dict)]
        for key in COLUMNS:
            path = self.typed(key)
            if path and path not in self.values:
                found = [value for value in (at(row, path) for row in self.rows) if value is not MISSING]
                self.values |= {path: found} if found else {}
        self.kinds = {name: kind(values) for name, values in self.values.items()}
        self.inner: dict[str, str] = {}
        for name in self.top:
            items = [item for value in self.values[name] for item in _objects(value)]
            for key in dict.fromkeys(key for item in items for key in item):
                if key not in ignore and f"{name}.{key}" not in ignore:
                    self.inner[f"{name}.{key}"] = kind([item.get(key) for item in items])
        names = {name for row in self.rows for name in _names(row)}
        self.ignored = {each for each in ignore if each in names or self.has(each)}

    def has(self, path: str) -> bool:
        return any(at(row, path) is not MISSING for row in self.rows)

    def typed(self, key: str) -> str | None:
        """The column that the user named, where it is not the one that goes by our name."""
        return self.columns.get(key) if self.columns.get(key) != key else None

    def named(self, key: str) -> str | None:
        """The column under the user's name or ours, where there is one."""
        name = self.columns.get(key)
        return name if name in self.kinds else None

    def find(self, key: str, kinds: Iterable[str], taken: Iterable[str | None] = ()) -> str | None:
        """The column under the user's name or ours, else the first under another usual one that holds these kinds."""
        if self.columns.get(key) is None:
            return None
        if self.named(key):
            return self.named(key)
        for alias in ALIASES.get(key, ()):
            for name in self.kinds:
                if spelled(name) == alias and self.kinds[name] in kinds and name not in taken:
                    return name
        return None

    def answers(self, taken: Iterable[str | None] = ()) -> list[str]:
        """Columns that hold texts or messages, no names, ids or verdicts."""
        return [name for name, held in self.kinds.items() if self._is_answer(name, held) and name not in taken]

    def _is_answer(self, name: str, held: str) -> bool:
        written = held == "texts" and all(isinstance(value, str) for value in self.values[name] if value)
        return held in ("text", "messages") or written  # a list of turns as JSON

    def _may_answer(self, name: str) -> bool:
        """Whether a column of single words or numbers may hold answers, by its name: not of models, ids, scores."""
        others = (
            "id index idx model source score rating reward label rank ranking name url lang language split p margin"
        )
        is_short = self.kinds[name] in ("word", "number", "flag", "empty")
        return is_short and not set(spelled(name).split("_")) & set(others.split())

    def no_column(self, key: str) -> Refusal:
        """That a column is not there, with the nearest that holds what it should."""
        name = self.columns.get(key) or key
        found = ", ".join(self.top) or "none"
        taken = [self.named(other) for other in COLUMNS]
        if key in ("scores", "ranks", "label", "preference", "margin", "p", "family", "split"):
            free = [each for each in self.kinds if each not in taken]
        else:
            taken += [self.find("prompt", ("text", "word", "messages"))] if key != "prompt" else []
            free = self.answers(taken) or [each for each in self.top if each not in taken and self._may_answer(each)]
        if key == "scores":
            free = [each for each in free if not LOWER.search(spelled(each))]
        near = difflib.get_close_matches(name, free, n=1, cutoff=0.5)
        near = near or (free if key == "prompt" and len(free) == 1 else [])
        return Refusal(
            f"{self.name}: no column '{name}' (found: {found:.200}). "
            f"Name it with data.columns.{key}={near[0] if near else '<its name>'}"
        )


class Later:
    """What rows show that the first ones of a source do not: columns absent or empty there, or of one value alone.

    Args:
        source: the first rows.
        read: columns that are read whatever they hold.
        ignore: keys and columns that are left unread on purpose.

    Attributes:
        rows: the first that show it, each with its place and with those columns alone.
        beyond: columns that came when there were `MOST` such rows.
        unheard: what of `ignore` no row has.
    """

    def __init__(self, source: Source, read: Iterable[str], ignore: Iterable[str]):
        self.rows: list[tuple[str, dict]] = []
        self.beyond: dict[str, None] = {}
        self.unheard = set(ignore) - source.ignored
        self._alike = {name: _only(values) for name, values in source.values.items()}
        self._nested = {name.rpartition(".")[0] for name in (*source.values, *source.inner)} & set(source.top)
        self._seen = {*read, *ignore, *(name for name, value in self._alike.items() if value is SEVERAL)}
        self._seen |= {name for name, held in source.inner.items() if held != "empty"}
        self._seen |= {f"{name}.{key}" for name in self._nested for key in ignore}
        self._count: Counter[str] = Counter()

    def look(self, where: str, row: Mapping[str, Any]) -> None:
        if self.unheard:
            self.unheard -= set(_names(row)) | {path for path in self.unheard if at(row, path) is not MISSING}
        shown = [name for name in row if name not in self._seen and self._shows(name, row[name])]
        columns = {name: row[name] for name in shown}
        for name in [each for each in row if each in self._nested]:
            inner = [path for path, value in _inside(name, row[name]) if self._shows(path, value)]
            columns |= {name: row[name]} if inner else {}
            shown += inner
        if columns and len(self.rows) < MOST:
            self.rows.append((where, columns))
        elif columns:
            self.beyond |= {name: None for name in shown if self._count[name] == 1}

    def _shows(self, name: str, value: Any) -> bool:
        if name in self._seen or is_blank(value) or value == self._alike.get(name):
            return False
        self._alike.setdefault(name, value)
        self._count[name] += 1
        if self._count[name] == EACH:
            self._seen.add(name)
        return True


def _only(values: Sequence[Any]) -> Any:
    """The one value that these have beside empty ones; `SEVERAL`; or None."""
    held = [value for value in values if _kind(value) != "empty"]
    return SEVERAL if any(value != held[0] for value in held) else next(iter(held), None)


def _inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What the keys of an object, or of a list of objects, hold."""
    for each in [value] if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(each, dict):
            yield from ((f"{name}.{key}", said) for key, said in each.items())


def kind(values: Sequence[Any]) -> str:
    """What a column holds, by its values that are not empty.

    One of empty, text, word (all without a blank), number, flag (bool), messages, texts, numbers, objects (lists of
    these), object, or mixed. Numbers may be written as text, messages and lists as JSON.
    """
    kinds = {_kind(value) for value in values} - {"empty"}
    for several, one in MIXED:
        if len(kinds) > 1 and kinds <= several:
            kinds = {one}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "empty"


def _kind(value: Any) -> str:
    if value is None or (isinstance(value, str | list | dict) and not value):
        return "empty"
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        listed = as_list(value) if value.startswith("[") else None
        if listed:
            return _kind(listed)
        if NUMBER.fullmatch(value):
            return "number"
        return "word" if len(value) <= WORD and len(value.split()) <= 1 else "text"
    if is_messages(value):
        return "messages"
    if isinstance(value, list):
        if all(each is None or isinstance(each, dict) for each in value):
            return "objects"
        if all(_is_rating(each) for each in value):
            return "numbers"
        return "texts" if all(each is None or isinstance(each, str) for each in value) else "lists"
    return "object" if isinstance(value, dict) else "mixed"


def _is_rating(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in UNRATED or NUMBER.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _keys(values: Sequence[Any]) -> list[str]:
    """The keys of a column of objects that are no messages."""
    keys: dict[str, None] = {}
    for value in values:
        if isinstance(value, dict) and not is_messages(value):
            keys |= dict.fromkeys(map(str, value))
    return list(keys)


def _objects(value: Any) -> list[dict]:
    """The objects of a list of objects that are no messages, be it written as JSON."""
    if isinstance(value, str) and value.startswith("["):
        value = as_list(value)
    if not isinstance(value, list) or is_messages(value):
        return []
    return [item for item in value if isinstance(item, dict) and not is_messages(item)]


def _names(value: Any) -> Iterator[str]:
    """The keys of a value at any depth, and the types of parts of a message."""
    if isinstance(value, dict):
        yield from value
        if isinstance(value.get("type"), str):
            yield value["type"]
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _names(each)


def spelled(name: str) -> str:
    """`betterResponse-ID` as `better_response_id`."""
    parted = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name)
    return re.sub(r"[\s\-/]+", "_", parted.strip()).lower().strip("_")
