"""What people chose, on disk before the next pair is shown."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import Refusal
from rlhf_recipes.labelling.plan import Item

WORDS = ("first", "second", "tie", "skip")
FIELDS = ("annotator", "item", "pair", "show", "left", "choice", "note", "seconds")


class Choices:
    """A file of choices, one line each, appended and synced; after an undone one comes one whose `choice` is null.

    `choice` is first, second, tie or skip, of the pair as it lies in its file; `left` says which of the two stood on
    the left. A line that a kill cut short goes when the next is written: its answer had not been taken.

    Attributes:
        kept: what counts, annotator -> item -> line, in the order in which they were made.

    Raises:
        Refusal: a line is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.kept = path, {}
        self._whole = 0
        for end, line in self._lines():
            self._whole = end
            self._take(line)

    def of(self, annotator: str) -> dict[str, dict[str, Any]]:
        return self.kept.setdefault(annotator, {})

    def add(self, annotator: str, item: Item, choice: str, note: str = "", seconds: float | None = None) -> None:
        """Keep a choice: it is on disk when this returns."""
        left = "first" if item.first_left else "second"
        values = (annotator, item.key, item.pair.id, item.show, left, choice, note or None, seconds)
        self._append(dict(zip(FIELDS, values, strict=True)))

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
        if self.path.exists() and self.path.stat().st_size > self._whole:
            os.truncate(self.path, self._whole)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        made = self.of(entry["annotator"])
        made.pop(entry["item"], None)
        if entry["choice"] is not None:
            made[entry["item"]] = entry

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = json.loads(line)
                    whole = set(FIELDS) <= entry.keys() and entry["choice"] in (None, *WORDS)
                    whole = whole and all(isinstance(entry[key], str) for key in FIELDS[:5])
                except (ValueError, TypeError, AttributeError, RecursionError):
                    whole = False
                if not whole:
                    raise Refusal(f"{self.path}:{number}: is no choice. Remove the line: that pair is shown again.")
                end += len(line)
                yield end, entry


class Session:
    """One person's work: what is next, what is left.

    Args:
        changed: is called after each choice and each undo.
    """

    def __init__(self, annotator: str, items: list[Item], choices: Choices, changed: Callable[[], None]):
        self.annotator, self.items, self._choices, self._changed = annotator, items, choices, changed
        self.note = ""  # of a choice that was undone

    @property
    def made(self) -> dict[str, dict[str, Any]]:
        return self._choices.of(self.annotator)

    @property
    def left(self) -> int:
        return sum(item.key not in self.made for item in self.items)

    @property
    def done(self) -> int:
        return len(self.items) - self.left

    def current(self) -> Item | None:
        return next((item for item in self.items if item.key not in self.made), None)

    def choose(self, key: str, place: str, note: str, seconds: float | None = None) -> bool:
        """Keep what was chosen (left, right, tie, skip) of the current item; False for another one, which a page shows
        that is out of date."""
        item = self.current()
        if item is None or item.key != key:
            return False
        self._choices.add(self.annotator, item, item.meant(place), note, seconds)
        self.note = ""
        self._changed()
        return True

    def undo(self) -> bool:
        """Take back the last choice; its pair is shown next, with its note."""
        undone = self._choices.undo(self.annotator)
        if undone is None:
            return False
        self.note = undone["note"] or ""
        self._changed()
        return True
