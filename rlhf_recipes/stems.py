"""Sequences of tokens that begin alike, found so that what they begin with is computed once."""

import math
from itertools import pairwise


def count_shared(sequences: list[list[int]]) -> int:
    """Tokens with which all of the sequences begin."""
    low, high = min(sequences), max(sequences)  # what these two share, all that lie between them share
    return next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def find_stems(
    sequences: list[list[int]], least: int, most: int, tokens: float = math.inf
) -> tuple[list[list[int]], list[int]]:
    """Beginnings ("stems"), and for each sequence which of them is its; at least one token is left of each sequence.

    Sorted, sequences with a common beginning stand side by side. Of all ways to part them into runs, each with what
    all of the run share as its stem, this is the one that saves most tokens.

    Args:
        least: tokens of the stem of several sequences.
        most: sequences of a stem.
        tokens: that a stem and what is left of its sequences have together, where they are more than two.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    common = [0, *(min(count_shared([a, b]), len(a) - 1, len(b) - 1) for a, b in pairwise(ordered))]
    best = [(0, 0)]  # for the first n: tokens saved, and where their last run starts
    for end in range(1, len(ordered) + 1):
        found, width, length = [(best[-1][0], end - 1)], math.inf, len(ordered[end - 1])
        for start in range(end - 2, max(end - most, 0) - 1, -1):
            width, length = min(width, common[start + 1]), length + len(ordered[start])
            saved = (end - start - 1) * width
            if width < least or (length - saved > tokens and end - start > 2):
                break
            found.append((best[start][0] + saved, start))
        best.append(max(found))
    beginnings, member, end = [], [0] * len(order), len(order)
    while end:
        start = best[end][1]
        for i in order[start:end]:
            member[i] = len(beginnings)
        beginnings.append(ordered[start][: min(common[start + 1 : end], default=len(ordered[start]) - 1)])
        end = start
    return beginnings, member
