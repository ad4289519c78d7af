"""A reward model that learns from probabilities and margins: TRL's RewardTrainer with soft labels."""

import copy

import pyarrow.compute as pc
from datasets import Features, List, Value
from trl import RewardTrainer


class SoftLabelRewardTrainer(RewardTrainer):
    """Bradley-Terry with the probability p that "chosen" is the better reply and the margin m by which it should win,
    from the columns `p` and `margin` of the data:

        loss = -[p log sigma(delta) + (1 - p) log sigma(-delta)] = -log sigma(delta) + (1 - p) delta

    with delta = r(chosen) - r(rejected) - m (Bai et al. 2022, arXiv:2212.08073, section 4.1; Lee et al. 2023,
    arXiv:2309.00267; the margin: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2). The first term, and everything
    else, is TRL's; without the column p, or at p = 1, so is the loss. A row without p counts as p = 1, one without a
    margin as m = 0.

    Rows over `max_length`, which TRL's leaves out, are cut: `data.fit` has left out those that should be.
    """

    def __init__(self, *args, train_dataset, eval_dataset, **kwargs):
        train_dataset, eval_dataset = (_carried(each) for each in (train_dataset, eval_dataset))
        super().__init__(*args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        uncut = copy.copy(args)
        uncut.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, dataset_name)
        if args.max_length is None or _longest(dataset) <= args.max_length:
            return dataset
        return dataset.map(_cut, batched=True, fn_kwargs={"max_length": args.max_length})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        p_B = None
        if CARRIER in inputs:
            p_B, inputs[CARRIER] = inputs[CARRIER].unbind(1)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if p_B is not None:
            chosen_B, rejected_B = outputs.logits.squeeze(-1).chunk(2)
            loss = loss + ((1 - p_B) * (chosen_B - rejected_B - inputs[CARRIER])).mean()
        return (loss, outputs) if return_outputs else loss


# The one column of numbers that TRL's dataset preparation and collator let through: here p and the margin of a row.
CARRIER = "margin"
WITHOUT = {"p": 1.0, CARRIER: 0.0}
TOKENS = ("chosen_ids", "rejected_ids")
BATCH = 10_000  # rows that are looked at together


def _longest(dataset) -> int:
    """Tokens of the longest conversation, from the lengths of the columns."""
    tables = dataset.select_columns(list(TOKENS)).with_format("arrow").iter(BATCH)
    lengths = (pc.max(pc.list_value_length(table[side])).as_py() for table in tables for side in TOKENS)
    return max(lengths, default=0)


def _cut(rows: dict, max_length: int) -> dict:
    return {side: [ids[:max_length] for ids in rows[side]] for side in TOKENS}


def _carried(dataset):
    given = [key for key in WITHOUT if key in dataset.column_names]
    if not given:
        return dataset

    def both(row):
        return {CARRIER: [without if row.get(key) is None else row[key] for key, without in WITHOUT.items()]}

    features = Features({**dataset.features, CARRIER: List(Value("float64"))})
    features.pop("p", None)
    return dataset.map(both, remove_columns=given, features=features)
