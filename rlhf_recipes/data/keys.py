"""What tells examples apart, in 48 bytes each: by it they are split, freed of duplicates and put in order, while they
themselves lie in a file.

An example's number is its place in that file. Prompts are told apart by their hashes of 64 bits, examples by 128 bits.
"""

import hashlib
import json
import random
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_recipes.data import formats
from rlhf_recipes.data.rows import Example
from rlhf_recipes.errors import Refusal

STEP = 50_000  # keys that are compared at a time


class Keys:
    """Of N examples.

    Attributes:
        prompts: (N,) `prompt_id` as a number.
        openings: (N,) `formats.opening_id` likewise.
        pairs: (N,) the number that both halves of a pair have, else 0.
        splits: (N,) the split that the row names, as its place in `split_names`; 0: none.
    """

    def __init__(self):
        self.prompts, self.openings, self.pairs, self.splits = array("Q"), array("Q"), array("I"), array("I")
        self.split_names: dict[str | None, int] = {None: 0}
        self._said, self._lines, self._files = array("Q"), array("I"), array("I")
        self._file_names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, where: str, example: Example, split: str | None) -> None:
        """
        Raises:
            Refusal: half of a surrogate pair, which is no text.
        """
        said = [value for value in example.values() if isinstance(value, list | bool)]
        try:
            text = json.dumps(said, ensure_ascii=False).encode()
            (example["family"] or "").encode()
        except UnicodeEncodeError as error:
            raise Refusal(f"{where}: half of a surrogate pair, which is no text. Mend or remove the row.") from error
        self._said.frombytes(hashlib.blake2b(text, digest_size=16).digest())
        prompt = example["prompt"]
        self.prompts.append(int(example["prompt_id"], 16))
        self.openings.append(int(formats.opening_id(prompt), 16) if len(prompt) > 1 else self.prompts[-1])
        self.pairs.append(example.get("pair") or 0)
        self.splits.append(self.split_names.setdefault(split or None, len(self.split_names)))
        file, _, line = where.rpartition(":")
        self._files.append(self._file_names.setdefault(file, len(self._file_names)))
        self._lines.append(int(line))

    def where(self, number: int) -> str:
        """File and line."""
        return f"{list(self._file_names)[self._files[number]]}:{self._lines[number]}"

    def places(self, numbers: np.ndarray) -> "Places":
        lines, files = (np.asarray(each)[numbers] for each in (self._lines, self._files))
        return Places([Path(name).name for name in self._file_names], files, lines)

    def are_first(self, numbers: np.ndarray) -> np.ndarray:
        """(len(numbers),) whether no example before says the same."""
        low, high = np.asarray(self._said).reshape(-1, 2).T
        order = numbers[np.argsort(low[numbers], kind="stable")]  # stable: of the same examples the first leads
        ordered = low[order]
        alike = np.flatnonzero(ordered[1:] == ordered[:-1])
        alike = alike[high[order[alike + 1]] == high[order[alike]]]
        return ~are_in(numbers, order[alike + 1])

    def share_prompts(self, numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(len(numbers),) whether the prompt of each is that of one of the others."""
        prompts = np.asarray(self.prompts)
        return are_in(prompts[numbers], prompts[others])

    def shuffled(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """In seeded order, both halves of a pair together: a smaller cap takes a subset of a larger one."""
        pairs = np.asarray(self.pairs)[numbers]
        if not pairs.any():
            return numbers[drawn(len(numbers), seed)]
        together = np.where(pairs > 0, pairs.astype(np.int64), -1 - np.arange(len(numbers)))
        _, first, groups = np.unique(together, return_index=True, return_inverse=True)
        by_first = np.empty_like(first)  # groups are drawn by where they begin
        by_first[np.argsort(first)] = np.arange(len(first))
        turn = np.empty_like(first)
        turn[drawn(len(first), seed)] = np.arange(len(first))
        return numbers[np.argsort(turn[by_first[groups]], kind="stable")]


class Places(Sequence):
    """Where rows stand: file and line as text, which is made when it is asked for."""

    def __init__(self, names: list[str], files: np.ndarray, lines: np.ndarray):
        self._names, self._files, self._lines = names, files, lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> str:
        return f"{self._names[self._files[number]]}:{self._lines[number]}"


def different_keys(values: np.ndarray) -> np.ndarray:
    """Each once, in order: `numpy.unique` without its table of hashes."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(values) else ordered


def are_in(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(len(values),) whether each is among the others; what `numpy.isin` says, in little memory."""
    found = np.zeros(len(values), dtype=bool)
    others = np.sort(others)
    for start in range(0, len(values) if len(others) else 0, STEP):
        some = values[start : start + STEP]
        found[start : start + STEP] = others[np.searchsorted(others, some).clip(max=len(others) - 1)] == some
    return found


def drawn(count: int, seed: int) -> np.ndarray:
    """All numbers below `count` in the order of `random.Random(seed).sample`, which would hold each as an object."""
    draw, left, order = random.Random(seed), array("I", range(count)), array("I")
    for last in range(count - 1, -1, -1):
        place = draw.randrange(last + 1)
        order.append(left[place])
        left[place] = left[last]
    return np.asarray(order)
