"""What becomes of rows, counted: what is left out and why, with the first places of each reason."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_recipes.data.keys import Keys
from rlhf_recipes.data.messages import Drop
from rlhf_recipes.data.row import as_number
from rlhf_recipes.errors import Refusal

# Reasons that are no oversight where most rows have them: what most rows are then, and what their owner can do.
NAMED = {
    "tools": "call tools, which is not trained on. data.ignore=[tools,tool_calls] takes the texts beside the calls, "
    "where no turn is a tool's",
    "media": "hold pictures or sound, which is not trained on. data.ignore=[<their columns, keys or types>] "
    "takes the texts",
    "unrated": "have no score. Name the right column with data.columns.scores",
    "unlabelled": "have no label. Name the right column with data.columns.label or data.columns.preference",
}

REASONS = ("empty", "roles", "context_differs", "identical", "tie", "secret", "duplicate", "leakage")
EXAMPLES = 3  # places of a reason that are named


@dataclass
class Tally:
    rows: int = 0
    candidates: int = 0
    dropped: Counter = field(default_factory=lambda: Counter(dict.fromkeys(REASONS, 0)))
    examples: dict[str, list[str]] = field(default_factory=dict)
    turned_round: int = 0
    soft: Counter = field(default_factory=Counter)
    unread_keys: Counter = field(default_factory=Counter)
    own_scores: Counter = field(default_factory=Counter)
    joined: Counter = field(default_factory=Counter)
    held: Counter = field(default_factory=Counter)

    def drop(self, drop: Drop, where: str) -> None:
        self.dropped[drop.reason] += 1
        places = self.examples.setdefault(drop.reason, [])
        if len(places) < EXAMPLES:
            places.append(f"{Path(where).name} ({drop.detail})" if drop.detail else Path(where).name)

    def left(self, keys: Keys, numbers: np.ndarray, good: np.ndarray, reason: str) -> np.ndarray:
        """Those of the examples that are good; the others are dropped."""
        for number in numbers[~good]:
            self.drop(Drop(reason), keys.where(number))
        return numbers[good]

    def add(self, other: "Tally") -> None:
        self.rows += other.rows
        self.candidates += other.candidates
        self.dropped.update(other.dropped)
        for reason, places in other.examples.items():
            self.examples[reason] = [*self.examples.get(reason, []), *places][:EXAMPLES]

    def compare(self, scores: tuple[str, str] | None, values: dict[str, Any]) -> None:
        """Count what a pair's own scores say of its label."""
        chosen, rejected = (as_number(str(values.get(name))) for name in scores or (None, None))
        if isinstance(chosen, float) and isinstance(rejected, float):
            self.own_scores.update(of=1, ties=chosen == rejected, against=chosen < rejected)

    def refuse_most(self, source: str) -> None:
        for reason, what in NAMED.items():
            if 2 * self.dropped[reason] > self.candidates:
                place = self.examples[reason][0]
                raise Refusal(f"{source}: {self.dropped[reason]} of {self.candidates} rows {what} (e.g. {place}).")
