"""Train and test: by the source, by the rows' own split, else by prompts held out."""

import hashlib
from typing import Any

import numpy as np

from rlhf_recipes.data.keys import Keys, are_in, different_keys
from rlhf_recipes.data.sources import source_name
from rlhf_recipes.errors import Refusal


def split(keys: Keys, train: np.ndarray, test: np.ndarray | None, data: dict[str, Any], told: str, column: str | None):
    """(train, test, how): the test source, else none where all rows are wanted, else what the split column says, else
    prompts held out.

    Raises:
        Refusal: a row that the column gives to another split than its source's, or to none; nothing to hold out.
    """
    if test is not None:
        _refuse_misplaced(keys, train, test, data, column)
        return train, test, f"test: {told}"
    if data["whole"]:
        return train, train[:0], "none held out"
    if len(keys.split_names) > 1:
        return *_split_by_column(keys, data, column), f"test: column {column}"
    size, seed = data["test_size"], data["seed"]
    if size is None:
        raise Refusal(
            f"{source_name(data['path'])}: no test split. Give data.test_path, or hold out prompts: data.test_size=0.1"
        )
    openings = np.asarray(keys.openings)
    different = different_keys(openings)
    if len(different) == 1:  # one greeting opens all of them: they are told apart by what follows
        openings = np.asarray(keys.prompts)
        different = different_keys(openings)
    drawn = _held_out(different, size, seed)
    if len(different) == 1:
        raise Refusal(
            f"{source_name(data['path'])}: one prompt alone, and none to hold out. Give more, or data.test_path."
        )
    if len(drawn) == len(different) > 0:
        raise Refusal(
            f"data.test_size={size}: leaves nothing of {len(drawn)} prompts to train on. "
            "Lower it, or give data.test_path."
        )
    is_test = are_in(openings, drawn)
    return train[~is_test], train[is_test], f"test: {len(drawn)} of {len(different)} prompts held out, seed {seed}"


def _refuse_misplaced(
    keys: Keys, train: np.ndarray, test: np.ndarray, data: dict[str, Any], column: str | None
) -> None:
    """Refuse train rows that the column gives to another split, and test rows that it gives to the train split."""
    splits, mine = np.asarray(keys.splits).astype(np.int64), keys.split_names.get(data["train_split"], -1)
    for what, wrong in (("train", train[~np.isin(splits[train], (0, mine))]), ("test", test[splits[test] == mine])):
        for number in wrong[:1]:
            named = list(keys.split_names)[splits[number]]
            raise Refusal(
                f"{keys.where(number)}: {column}: {named!r:.40}, but the row is in the source of the {what} rows, "
                "which is read whole. Take such rows out, or set data.columns.split=null to ignore the column."
            )


def _split_by_column(keys: Keys, data: dict[str, Any], column: str | None) -> tuple[np.ndarray, np.ndarray]:
    wanted = [keys.split_names.get(data[key], -1) for key in ("train_split", "test_split")]
    splits = np.asarray(keys.splits).astype(np.int64)
    for number in np.flatnonzero(~np.isin(splits, wanted))[:1]:
        named, train, test = list(keys.split_names)[splits[number]], data["train_split"], data["test_split"]
        raise Refusal(
            f"{keys.where(number)}: {column}: {named!r:.40} is not {train} or {test}. "
            "Set data.train_split and data.test_split, or data.columns.split=null to ignore the column."
        )
    train, test = (np.flatnonzero(splits == each) for each in wanted)
    return train, test


def _held_out(ids: np.ndarray, size: float, seed: int) -> np.ndarray:
    """Of different hashes a count of them, or each with probability `size`, at least one.

    The draw depends on the prompt and the seed alone: what one recipe holds out stays held out in the next,
    whatever rows are added or dropped between them.
    """
    texts = (f"{seed}:{each:016x}".encode() for each in ids)
    draws = np.fromiter((int(hashlib.sha256(text).hexdigest()[:12], 16) / 16**12 for text in texts), float, len(ids))
    count = int(size) if size >= 1 else max(1, int((draws < size).sum()))
    if count < len(ids):  # the others need not be put in order
        drawn = draws <= np.partition(draws, count - 1)[count - 1]
        ids, draws = ids[drawn], draws[drawn]
    return ids[np.lexsort((ids, draws))[:count]]
