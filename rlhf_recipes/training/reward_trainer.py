"""A reward model that learns from probabilities: TRL's RewardTrainer with soft labels."""

import copy

from trl import RewardTrainer


class SoftLabelRewardTrainer(RewardTrainer):
    """Bradley-Terry with the probability p that "chosen" is the better reply, from the column `p` of the data:

        loss = -[p log sigma(delta) + (1 - p) log sigma(-delta)] = -log sigma(delta) + (1 - p) delta

    with delta = r(chosen) - r(rejected) (Bai et al. 2022, arXiv:2212.08073, section 4.1; Lee et al. 2023,
    arXiv:2309.00267). The first term, and everything else, is TRL's; without the column, or at p = 1, so is the loss.
    A row without p counts as p = 1.

    Rows over `max_length`, which TRL's leaves out, are cut: `data.fit` has left out those that should be.
    """

    def __init__(self, *args, train_dataset, eval_dataset, **kwargs):
        train_dataset, eval_dataset = (_carried(each) for each in (train_dataset, eval_dataset))
        super().__init__(*args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        uncut = copy.copy(args)
        uncut.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, dataset_name)
        return dataset.map(_cut, batched=True, fn_kwargs={"max_length": args.max_length})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        p_B = inputs.pop(CARRIER, None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if p_B is not None:
            chosen_B, rejected_B = outputs.logits.squeeze(-1).chunk(2)
            loss = loss + ((1 - p_B) * (chosen_B - rejected_B)).mean()
        return (loss, outputs) if return_outputs else loss


# The one column of numbers that TRL's dataset preparation and collator let through; its margin is not used here.
CARRIER = "margin"


def _cut(rows: dict, max_length: int | None) -> dict:
    return {side: [ids[:max_length] for ids in rows[side]] for side in ("chosen_ids", "rejected_ids")}


def _carried(dataset):
    if "p" not in dataset.column_names:
        return dataset
    return dataset.map(lambda row: {CARRIER: 1.0 if row["p"] is None else row["p"]}, remove_columns="p")
