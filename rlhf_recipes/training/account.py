"""What a trainer holds is what was counted: its tokenised rows against the sizes that `data.fit` found."""

import numpy as np
import pyarrow.compute as pc

from rlhf_recipes.data.load import Splits
from rlhf_recipes.data.template import encode_prompt
from rlhf_recipes.data.tokens import Sizes

BATCH = 10_000  # rows that are looked at together
MASKED = -100
PROMPTS = 256  # that are encoded once more, where a trainer encodes them only when it answers them


def check(trainer, splits: Splits) -> None:
    """Compare rows, tokens and trained tokens of a trainer's datasets with those of `splits`, both as they are cut.

    Raises:
        RuntimeError: they differ: what would be trained is not what was counted and shown.
    """
    args = trainer.args
    packing = getattr(args, "packing", False)
    uncut = packing and args.packing_strategy != "bfd"  # packed rows are split, not cut
    cut = None if uncut else splits.report["max_length"], getattr(args, "truncation_mode", "keep_start")
    for name, dataset in (("train", trainer.train_dataset), ("test", trainer.eval_dataset)):
        counted = splits.sizes[name].cut(*cut).totals()
        if hasattr(trainer, "samples"):
            first = dataset.select(range(min(PROMPTS, len(dataset))))
            tokens = sum(len(encode_prompt(trainer.processing_class, prompt)) for prompt in first["prompt"])
            held = {"rows": len(dataset), "tokens": tokens}
            counted["tokens"] = splits.sizes[name][: len(first)].totals()["tokens"]
        else:
            held = _sizes(dataset).cut(*cut).totals()
            if packing:
                del held["rows"]
            if not _trains_answers_alone(trainer, dataset):
                del held["trained_tokens"]
        for what, number in held.items():
            if number != counted[what]:
                raise RuntimeError(
                    f"{name} rows: the trainer holds {number} {what.replace('_', ' ')}, {counted[what]} were counted."
                )


def _trains_answers_alone(trainer, dataset) -> bool:
    """A reward model scores conversations; SFT trains on more, or on less, where it is told so."""
    scored = "chosen_ids" in dataset.column_names and "prompt_ids" not in dataset.column_names
    all_tokens = getattr(trainer, "completion_only_loss", True) is False
    return not (scored or all_tokens or getattr(trainer.args, "assistant_only_loss", False))


def _sizes(dataset) -> Sizes:
    """Those of the tokenised rows, from the lengths of their columns."""
    columns = dataset.column_names
    if "labels" in columns:
        sides = {"input_ids": "labels"}
    elif "chosen_labels" in columns:
        sides = {f"{side}_input_ids": f"{side}_labels" for side in ("chosen", "rejected")}
    else:
        sides = {side: "prompt_ids" for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in columns}
    wanted = [column for column in {*sides, *sides.values()} if column in columns]
    parts = [np.zeros((2, 0, len(sides)), dtype=np.int64)]
    for table in dataset.select_columns(wanted).with_format("arrow").iter(BATCH):
        pairs = []
        for ids, other in sides.items():
            whole = _lengths(table, ids)
            if other == "prompt_ids":  # a reward model's rows have none
                prompt = _lengths(table, other) if other in columns else 0
                pairs.append((whole + prompt, whole))
            else:
                pairs.append((whole, _unmasked(table, other)))
        parts.append(np.array(pairs).transpose(1, 2, 0))
    return Sizes(*np.concatenate(parts, axis=1))


def _lengths(table, column: str) -> np.ndarray:
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def _unmasked(table, column: str) -> np.ndarray:
    """How many labels of each row count."""
    lists = table[column].combine_chunks()
    ends = np.cumsum(_lengths(table, column))
    counted = np.concatenate([[0], np.cumsum(lists.flatten().to_numpy() != MASKED)])
    return counted[ends] - counted[np.concatenate([[0], ends[:-1]])]
