"""TRL's own ORPO and CPO (SimPO) trainers, on what the chat template makes of a row.

They train where `trainer._target_` names their config, as long as TRL has them. They put a BOS before a prompt and an
EOS behind an answer that do not begin and end with one: behind the line break that ends a turn of ChatML it is a
second EOS, and before a prompt a context that no other pass has seen. So their rows are tokens before they see them.
"""

from rlhf_recipes import inference

SIDES = ("chosen", "rejected")


class _OfTemplate:
    """Its rows are tokens before TRL, which would render and tokenise messages, sees them.

    As in TRL's DPOTrainer an answer starts where the prompt with its generation prompt and the conversation part, in
    the answer in which they do so first. `max_length` keeps the first tokens, and None all.
    """

    def __init__(self, train_dataset, eval_dataset, processing_class, args, **kwargs):
        tokens = {"tokenizer": processing_class, "max_length": args.max_length}
        train_dataset, eval_dataset = (
            each.map(_tokenised, fn_kwargs=tokens, remove_columns=["prompt", *SIDES], num_proc=args.dataset_num_proc)
            for each in (train_dataset, eval_dataset)
        )
        super().__init__(
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            args=args,
            **kwargs,
        )

    def tokenize_row(self, feature, model=None) -> dict:
        return {}  # nothing to add


def __getattr__(name: str):
    # each when it is asked for: TRL may lose either
    if name == "ORPOTrainer":
        from trl.experimental.orpo import ORPOTrainer as trls_own
    elif name == "CPOTrainer":
        from trl.experimental.cpo import CPOTrainer as trls_own
    else:
        raise AttributeError(name)
    return type(name, (_OfTemplate, trls_own), {})


def _tokenised(row: dict, tokenizer, max_length: int | None) -> dict:
    encoded = {side: inference.encode(tokenizer, row["prompt"], row[side]) for side in SIDES}
    start = min(start for _, start in encoded.values())
    tokens = {"prompt": encoded["chosen"][0][:start]}
    tokens |= {side: ids[:max_length] for side, (ids, _) in encoded.items()}
    return {
        **{f"{part}_input_ids": ids for part, ids in tokens.items()},
        **{f"{part}_attention_mask": [1] * len(ids) for part, ids in tokens.items()},
        **{f"{side}_labels": [-100] * start + tokens[side][start:] for side in SIDES},
    }
