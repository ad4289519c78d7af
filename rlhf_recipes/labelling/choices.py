"""What people chose, on disk before the next pair is shown."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_recipes.errors import Refusal
from rlhf_recipes.labelling.pairs import Pair
from rlhf_recipes.labelling.plan import Item

WORDS = ("first", "second", "tie", "skip")
OTHER = {"first": "second", "second": "first"}
FIELDS = ("annotator", "item", "pair", "show", "left", "choice", "note", "seconds")


class Choices:
    """A file of choices, one line each, appended and synced; after an undone one comes one whose `choice` is null.

    `choice` is first, second, tie or skip, of the pair as it lies in its file; `left` says which of the two stood on
    the left; `first` is `digest` of the text that was the first one then, and may be missing. A line that a kill cut
    short goes when the next is written: its answer had not been taken.

    Attributes:
        kept: what counts, annotator -> item -> line, in the order in which they were made.

    Raises:
        Refusal: a line is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.kept = path, {}
        self._cut_short: tuple[int, bytes] | None = None  # where such a line begins, and it
        for line in self._lines():
            self._take(line)

    def of(self, annotator: str) -> dict[str, dict[str, Any]]:
        return self.kept.setdefault(annotator, {})

    def add(self, annotator: str, item: Item, choice: str, note: str = "", seconds: float | None = None) -> None:
        """Keep a choice: it is on disk when this returns."""
        left = "first" if item.first_left else "second"
        values = (annotator, item.key, item.pair.id, item.show, left, choice, note or None, seconds)
        self._append({**dict(zip(FIELDS, values, strict=True)), "first": digest(item.pair.first)})

    def turn(self, pairs: Iterable[Pair]) -> None:
        """Turn what was chosen of a pair whose two replies have changed places in the file since then."""
        sides = {pair.id: (digest(pair.first), digest(pair.second)) for pair in pairs}
        for made in self.kept.values():
            for key, each in made.items():
                first, second = sides.get(each["pair"], (None, None))
                if second and each.get("first") == second:
                    turned = {name: OTHER.get(each[name], each[name]) for name in ("choice", "left")}
                    made[key] = {**each, **turned, "first": first}

    def undo(self, annotator: str) -> dict[str, Any] | None:
        """Take back this person's last choice, which is returned; None where there is none."""
        made = self.of(annotator)
        if not made:
            return None
        last = made[next(reversed(made))]
        self._append({**last, "choice": None, "note": None, "seconds": None})
        return last

    def _append(self, entry: dict[str, Any]) -> None:
        # Half a surrogate pair is no UTF-8.
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self.path.open("ab+") as file:
            if self._cut_short:
                self._leave_out(file, *self._cut_short)
                self._cut_short = None
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else b"\n" + line  # an editor may have saved the last one without
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._take(json.loads(line))

    @staticmethod
    def _leave_out(file: BinaryIO, begin: int, cut_short: bytes) -> None:
        """Take a line out of a file, unless somebody has; what was written behind it since stays."""
        file.seek(begin)
        found = file.read()
        if found.startswith(cut_short):
            file.truncate(begin)
            file.write(found.removeprefix(cut_short))

    def _take(self, entry: dict[str, Any]) -> None:
        made = self.of(entry["annotator"])
        made.pop(entry["item"], None)
        if entry["choice"] is not None:
            made[entry["item"]] = entry

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        begin = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                if entry is None and not line.endswith(b"\n"):
                    self._cut_short = begin, line
                    return
                if not _is_choice(entry):
                    raise Refusal(f"{self.path}:{number}: is no choice. Remove the line: that pair is shown again.")
                begin += len(line)
                yield entry


def digest(text: str) -> str:
    """16 hex digits of a reply, up to spaces around it."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _is_choice(entry: Any) -> bool:
    if not isinstance(entry, dict) or not set(FIELDS) <= entry.keys():
        return False
    texts = all(isinstance(entry[key], str) for key in FIELDS[:5]) and isinstance(entry.get("first", ""), str)
    return texts and entry["choice"] in (None, *WORDS)


class Session:
    """One person's work: what is next, what is left.

    Args:
        changed: is called after each choice and each undo.
    """

    def __init__(self, annotator: str, items: list[Item], choices: Choices, changed: Callable[[], None]):
        self.annotator, self.items, self._choices, self._changed = annotator, items, choices, changed
        self._notes: dict[str, str] = {}  # of choices that were undone, by item

    @property
    def made(self) -> dict[str, dict[str, Any]]:
        return self._choices.of(self.annotator)

    @property
    def left(self) -> int:
        return sum(item.key not in self.made for item in self.items)

    @property
    def done(self) -> int:
        return len(self.items) - self.left

    @property
    def note(self) -> str:
        """What was noted of the current item before it was taken back."""
        item = self.current()
        return self._notes.get(item.key, "") if item else ""

    def current(self) -> Item | None:
        """The one that was taken back last, else the first that is left."""
        left = {item.key: item for item in self.items if item.key not in self.made}
        undone = next((left[key] for key in reversed(self._notes) if key in left), None)
        return undone or next(iter(left.values()), None)

    def choose(self, key: str, place: str, note: str, seconds: float | None = None) -> bool:
        """Keep what was chosen (left, right, tie, skip) of the current item; False for another one, which a page shows
        that is out of date."""
        item = self.current()
        if item is None or item.key != key:
            return False
        self._choices.add(self.annotator, item, item.meant(place), note, seconds)
        self._notes.pop(key, None)
        self._changed()
        return True

    def undo(self) -> bool:
        """Take back the last choice; its pair is shown next, with its note."""
        undone = self._choices.undo(self.annotator)
        if undone is None:
            return False
        self._notes[undone["item"]] = undone["note"] or ""
        self._changed()
        return True
