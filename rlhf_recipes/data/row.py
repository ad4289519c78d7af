"""One row under the user's column names, read under ours."""

import ast
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.data.messages import Drop, Messages, as_messages, is_messages, listed
from rlhf_recipes.errors import Refusal

GOOD = ("true", "1", "1.0", "yes", "up", "thumbs up", "👍", "good", "accepted", "desirable", "like", "liked",
        "positive", "chosen", "preferred", "correct", "right")  # fmt: skip
BAD = ("false", "0", "0.0", "no", "down", "thumbs down", "👎", "bad", "rejected", "undesirable",
       "dislike", "disliked", "negative", "dispreferred", "incorrect", "wrong")  # fmt: skip
UNRATED = ("", "n/a", "na", "nan", "none", "null", "-")
MISSING = object()
LARGEST = sys.float_info.max
LITERAL_LIMIT = 2**20  # characters of a list in Python's notation, whose parser takes a hundred times their memory


def at(values: Any, name: str) -> Any:
    """What lies under a column's name or a path into it: `input.messages`, `completions.response` (of each of a list),
    `responses.0`; `MISSING` where nothing does."""
    if name in values:
        return values[name]
    for part in name.split("."):
        values = as_list(values) if isinstance(values, str) and values.startswith("[") else values
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit():
            if int(part) >= len(values):
                return MISSING
            values = values[int(part)]
        elif isinstance(values, list):
            values = [each.get(part) if isinstance(each, Mapping) else None for each in values]
        else:
            return MISSING
    return values


@dataclass
class Row:
    """One row.

    Attributes:
        where: file and line or row.
        values: by the file's column names.
        columns: our names -> those of the file, or None.
        unread: how often a key of a message was not read, over all rows; added to.
        ignore: columns and keys of messages that the user leaves unread.
        held: how often the prompt held what a column adds to it, over all rows; added to.
    """

    where: str
    values: dict[str, Any]
    columns: Mapping[str, str | None]
    unread: Counter = field(default_factory=Counter)
    ignore: Collection[str] = ()
    held: Counter = field(default_factory=Counter)

    def has(self, key: str) -> bool:
        name = self.columns.get(key)
        return name is not None and at(self.values, name) is not MISSING

    def value(self, key: str) -> Any:
        if not self.has(key):
            raise Refusal(f"{self.where}: {self.columns.get(key)}: missing. Add it or remove the row.")
        return at(self.values, self.columns[key])

    def optional(self, key: str) -> Any:
        return self.value(key) if self.has(key) else None

    def wrong(self, key: str, rule: str, value: Any) -> Refusal:
        kinds = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false"}
        kind = kinds.get(type(value), f"{value!r:.40}")
        return Refusal(f"{self.where}: {self.columns[key]}: {rule}, not {kind}. Mend or remove the row.")

    def text(self, key: str) -> str:
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "must be text", value)
        return value or ""

    def label(self, key: str) -> str | None:
        """Text of an optional column; None where it is absent or blank."""
        value = self.optional(key)
        if value is not None and not isinstance(value, str):
            name = self.columns[key]
            raise Refusal(
                f"{self.where}: {name}: must be text, not {value!r:.40}. Mend it, or set data.columns.{key}=null."
            )
        return value or None

    def number(self, key: str, rule: str, low: float = -LARGEST, high: float = LARGEST) -> float | None:
        """A finite number of an optional column; None where it is absent, null or blank."""
        value = self.optional(key)
        if value in (None, ""):
            return None
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9.eE+-]{1,40}\s*", value):  # CSV holds text alone
            value = as_number(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, rule, value)
        return float(value)

    def good(self, key: str) -> bool | None:
        """Whether an answer is labelled good: true or 1, or a word for it; None where the label is null or blank."""
        value = self.value(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        good = as_good(value)
        if good is None:
            raise self.wrong(key, "must be true or false (or 1 or 0, thumbs up or thumbs down)", value)
        return good

    def items(self, key: str) -> list:
        """A list, or one written as JSON or as Python writes it, which is how CSV holds it; [] where it is null."""
        value = self.value(key)
        if value in (None, ""):
            return []
        if isinstance(value, str) and value.startswith("["):
            parsed = as_list(value)
            if parsed is None:
                raise self.wrong(key, "must be a list (as JSON)", value)
            value = parsed
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list", value)
        return value

    def numbers(self, key: str, count: int) -> list[float | None]:
        """Finite numbers, also as text; None for those that are null, blank or `N/A`."""
        values = self.items(key) or [None] * count
        if len(values) != count:
            rule = f"{len(values)} entries for {count} {self.columns['responses']}"
            raise Refusal(f"{self.where}: {self.columns[key]}: {rule}. Mend or remove the row.")
        found = []
        for value in values:
            if isinstance(value, str):
                value = None if value.strip().lower() in UNRATED else as_number(value)
            elif isinstance(value, float) and math.isnan(value):
                value = None
            if isinstance(value, bool | str) or not (value is None or isinstance(value, int | float)):
                raise self.wrong(key, "must hold finite numbers", value)
            if value is not None and not abs(value) <= LARGEST:
                raise self.wrong(key, "must hold finite numbers", value)
            found.append(value)
        return found

    def texts(self, key: str, value: Any) -> str | list | None:
        """A value of this column as it lies in the file: text, or a list of messages whatever their spelling."""
        if isinstance(value, dict) and is_messages(value):
            return listed(f"{self.where}: {self.columns[key]}", value)
        if value is not None and not isinstance(value, str | list):
            rule = "must hold texts" if key == "responses" else "must be text or a list of messages"
            raise self.wrong(key, rule, value)
        return value

    def turns(self, key: str, value: Any, role: str) -> Messages:
        """`messages` of a value of this column."""
        if is_messages(value) or isinstance(value, list):
            return as_messages(f"{self.where}: {self.columns[key]}", value, self.unread, self.ignore)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "must be text or a list of messages", value)
        return [{"role": role, "content": value or ""}]

    def conversation(self, key: str) -> Messages:
        value = self.value(key)
        value = value if is_messages(value) else self.items(key)
        return as_messages(f"{self.where}: {self.columns[key]}", value, self.unread, self.ignore)

    def history(self, key: str) -> Messages:
        """Earlier turns: messages, or a list of [user, assistant] texts (LLaMA-Factory's)."""
        value = self.optional(key)
        if value in (None, "", []):
            return []
        if is_messages(value):
            return as_messages(f"{self.where}: {self.columns[key]}", value, self.unread, self.ignore)
        turns = []
        for pair in self.items(key):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
                raise self.wrong(key, "must hold messages or pairs of texts [user, assistant]", pair)
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return turns

    def watch(self, columns: Mapping[str, str]) -> None:
        """Leave the row out for what these columns (name -> reason) say and nobody would hear."""
        for name, reason in columns.items():
            value = at(self.values, name)
            if value is not MISSING and not is_blank(value):
                raise Drop(reason, f"{name} is not read")


def is_blank(value: Any) -> bool:
    """Whether a value is null or empty, or a list of such."""
    if isinstance(value, list):
        return all(is_blank(each) for each in value)
    return value in (None, "", {}, "[]", "{}")


def as_good(value: Any) -> bool | None:
    """True or false of a label in any of its spellings; None where it is none."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    word = " ".join(value.lower().replace("_", " ").split()) if isinstance(value, str) else ""
    return word in GOOD if word in (*GOOD, *BAD) else None


def as_list(text: str) -> list | None:
    """The list that a text holds as JSON or as Python's repr; None where it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = as_literal(text)
    return value if isinstance(value, list) else None


def as_literal(text: str) -> Any:
    """What a text holds in Python's notation; None where it holds nothing of it, or is too long."""
    if len(text) > LITERAL_LIMIT:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
