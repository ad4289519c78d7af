"""Who is shown which pair, in which order and places: decided by the seed, so that the same command goes on."""

import hashlib
from dataclasses import dataclass

from rlhf_recipes.labelling.pairs import Pair

# How often a pair is shown: NEW once; some of them once more, as before or with the places changed.
NEW, AGAIN, SWAPPED = "new", "again", "swapped"
APART = 10  # items at least between a pair and its second showing, where there are as many


@dataclass(frozen=True)
class Item:
    """A pair as a person is shown it.

    Attributes:
        show: NEW, AGAIN or SWAPPED.
        first_left: whether the pair's first reply stands on the left.
    """

    pair: Pair
    show: str
    first_left: bool

    @property
    def key(self) -> str:
        return f"{self.pair.id}.{self.show}"

    def in_places(self) -> tuple[str, str]:
        """The replies on the left and on the right."""
        return (self.pair.first, self.pair.second) if self.first_left else (self.pair.second, self.pair.first)

    def meant(self, place: str) -> str:
        """`left` and `right` as first and second; tie and skip as they are."""
        if place not in ("left", "right"):
            return place
        return "first" if (place == "left") == self.first_left else "second"

    def stands(self, choice: str) -> str:
        """`meant` the other way round: where the reply stands that was chosen."""
        if choice not in ("first", "second"):
            return choice
        return "left" if (choice == "first") == self.first_left else "right"


def items(pairs: list[Pair], annotator: str, twice: float, swapped: float, seed: int) -> list[Item]:
    """What one person is shown, in order: the pairs in theirs, and some of them once more.

    Args:
        twice, swapped: shares of the pairs that are shown again, in the same places and with these changed; at least
            one pair each, unless the share is 0. No pair is shown three times.
    """
    apart = min(APART, max(1, len(pairs) // 3))
    early = [number for number in range(len(pairs)) if number + apart < len(pairs)]
    drawn = sorted(early, key=lambda number: _draw(seed, annotator, pairs[number].id, "again"))
    counts = [max(1, round(share * len(pairs))) if share else 0 for share in (twice, swapped)]
    shows = dict(zip(drawn, [AGAIN] * counts[0] + [SWAPPED] * counts[1], strict=False))
    placed = []
    for number, pair in enumerate(pairs):
        # Of the texts, not of the file's sides, which may change places between two showings.
        first_left = (_draw(seed, annotator, pair.id, "place") < 0.5) == (pair.first.strip() < pair.second.strip())
        placed.append((float(number), Item(pair, NEW, first_left)))
        if show := shows.get(number):
            late = number + apart + 0.5 + _draw(seed, annotator, pair.id, "when") * (len(pairs) - number - apart)
            placed.append((late, Item(pair, show, first_left == (show == AGAIN))))
    return [item for _, item in sorted(placed, key=lambda each: each[0])]


def _draw(*what: object) -> float:
    """A number in [0, 1) that these decide alone."""
    digest = hashlib.sha256("/".join(map(str, what)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48
