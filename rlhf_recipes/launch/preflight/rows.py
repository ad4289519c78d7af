"""What a training would be fed: its rows, and one of them as the model gets it; no model is loaded.

Counts are of all rows. Shares that stand for the data behind them (how often the longer reply was chosen, say) are
estimates over the train rows, clustered by prompt.
"""

import copy
import itertools
import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import inference, methods, model_files, stats
from rlhf_recipes.data.account import told
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.data.load import Splits, shorter_wins
from rlhf_recipes.data.template import encode_prompt
from rlhf_recipes.text_metrics import refuses

# Train rows that are looked at for the end of their replies.
LOOKED_AT = 256
SAID = ("duplicate", "leakage", "over_length", "no_answer_left", "same_tokens")  # under their own names
NEAR = 0.8  # Jaccard similarity of the words of two prompts


def examine(splits: Splits, sizes: list[int]) -> dict[str, Any]:
    """Counts and estimates of the rows that `data.fit` left.

    Args:
        sizes: tokens of each train row as it would be trained on.
    """
    report, train = splits.report, splits.train
    prompts = clusters(train)
    left_out = report["dropped"]["over_length"]
    empty = sum(report["dropped"].get(reason, 0) for reason in ("no_answer_left", "same_tokens"))
    fate = " (left out)" if left_out else " (cut)" if report["over_length_truncated"] else ""
    found = {
        **{key: report[key] for key in ("source", "split", "train", "test", "max_length", "neutralised")},
        "tokens": {**report["tokens"], "train": sum(sizes)},
        "over_length": {
            "rows": sum(report["over_length"].values()),
            "of": report["train"] + report["test"] + left_out + empty,
            "fate": fate + (f", {empty} rows left out for want of an answer to learn from" if empty else ""),
        },
        "told": told(report),
        **{key: report["dropped"][key] for key in ("duplicate", "leakage")},
        "dropped": {reason: count for reason, count in report["dropped"].items() if count and reason not in SAID},
        "near_duplicates": near_duplicates(train, splits.test),
    }
    if "rejected" in train[0]:
        refused = [tuple(refuses(row[side][-1]["content"]) for side in ("chosen", "rejected")) for row in train]
        found["chosen_longer"] = stats.estimate([1 - shorter for shorter in shorter_wins(train)], prompts)
        found["length_correlation"] = length_correlation(_said(train, "chosen"), _said(train, "rejected"), prompts)
        found["both_refuse"] = stats.estimate([float(c and r) for c, r in refused], prompts)
        found["only_chosen_refuses"] = stats.estimate([float(c and not r) for c, r in refused], prompts)
    elif "completion" in train[0]:
        found["refuses"] = stats.estimate([float(refuses(row["completion"][-1]["content"])) for row in train], prompts)
    return found


def _said(rows: Iterable[dict], side: str) -> Iterable[str]:
    return (row[side][-1]["content"] for row in rows)


def length_correlation(chosen: Iterable[str], rejected: Iterable[str], prompts: list[str]) -> stats.Estimate:
    """Pearson's correlation of being the chosen reply (1 or 0) with the logarithm of its characters, over all replies;
    0 where all are equally long."""
    logs = [math.log(max(len(text), 1)) for texts in (chosen, rejected) for text in texts]
    if len(set(logs)) == 1:
        return stats.ratio_of_sums([0.0] * len(prompts), [1.0] * len(prompts), prompts)
    return stats.pearson([1.0] * len(prompts) + [0.0] * len(prompts), logs, prompts * 2)


def near_duplicates(train: Iterable[dict], test: Iterable[dict]) -> int:
    """Test rows whose user turns are nearly those of a train row: `NEAR` of their words in common."""
    from rlhf_recipes.text_metrics import jaccard, near_duplicate_keys

    held_out = [(text, near_duplicate_keys(text).tolist()) for text in map(_asked, test)]
    wanted = {key for _, keys in held_out for key in keys}
    known: dict[int, str] = {}
    for text in map(_asked, train):
        known |= dict.fromkeys(wanted.intersection(near_duplicate_keys(text).tolist()), text)
    found = 0
    for text, keys in held_out:
        candidates = {known[key] for key in keys if key in known}
        found += any(jaccard(text, other) >= NEAR for other in candidates)
    return found


def example(recipe: str, args, splits: Splits, tokenizer, model: DictConfig, target: str = "") -> dict[str, Any]:
    """The first row of the trainer's first batch as text, its trained tokens between ⟦ and ⟧ (of a reward model the
    one whose score counts; of prompts nothing), and how many replies end with EOS.

    Returns:
        `text`; `eos`, the tokens that end a reply; `ends`, an estimate over the first rows (None for prompts alone).
    """
    stops = inference.stop_ids(model_files.load_generation_config(model), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(recipe, args, splits, tokenizer, folder, target)
        batch = next(iter(trainer.get_train_dataloader()))
    text = _marked(tokenizer, *_first(batch, trainer))
    ends = None
    rows = trainer.train_dataset
    key = next((key for key in (methods.of(recipe, target).replies, "chosen_ids") if key in rows.column_names), None)
    if key:
        # A template may close a turn with a line break.
        replies = [[*row.get("prompt_ids", []), *row[key]][: args.max_length] for row in rows]
        ended = [float(not set(stops).isdisjoint(ids[-3:])) for ids in replies]
        first = splits.train[: max(LOOKED_AT, len(rows))]
        cluster = dict(zip((row["prompt_id"] for row in first), clusters(first), strict=True))
        ids = [cluster[each] for each in rows["prompt_id"]] if "prompt_id" in rows.column_names else range(len(rows))
        ends = stats.estimate(ended, list(map(str, ids)))
    return {"text": text, "eos": tokenizer.convert_ids_to_tokens(stops), "ends": ends}


def _trainer(recipe: str, args, splits: Splits, tokenizer, folder: str, target: str = ""):
    """The recipe's trainer of the first rows, in their order, with a model of one layer in place of the real one: how
    rows are tokenised, cut and put together does not depend on it."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    args = copy.copy(args)
    args.output_dir, args.report_to, args.precompute_ref_log_probs = folder, [], False
    args.train_sampling_strategy = "sequential"
    size = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip
    auto, task = (AutoModelForCausalLM, "CAUSAL_LM")
    if recipe == "reward":
        auto, task = (AutoModelForSequenceClassification, "SEQ_CLS")
    # Functions in place of reward models: nothing is scored.
    kwargs = {"reward_funcs": [len] * len(args.reward_weights or [1.0])} if methods.of(recipe).samples else {}
    count = max(LOOKED_AT, getattr(args, "prompts_per_rollout", 0))
    few = replace(splits, train=splits.train[:count], test=splits.test[:1])
    train_dataset, eval_dataset = few.to_datasets()
    return methods.trainer_class(recipe, target)(
        model=auto.from_config(size),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=1, target_modules="all-linear", task_type=task),
        **kwargs,
    )


def _first(batch, trainer) -> tuple[list[int], list[bool]]:
    """Tokens of the first row of a batch, padding left out, and which of them are trained."""
    import torch

    if isinstance(batch, list):  # of what samples: rows
        ids = encode_prompt(trainer.processing_class, batch[0]["prompt"])
        return ids, [False] * len(ids)
    side = "chosen_" if "chosen_input_ids" in batch else ""
    ids = batch[f"{side}input_ids"][0].tolist()
    present = batch[f"{side}attention_mask"][0].tolist() if f"{side}attention_mask" in batch else [1] * len(ids)
    if f"{side}labels" in batch:
        trained = [label != -100 for label in batch[f"{side}labels"][0].tolist()]
    elif "completion_mask" in batch:
        trained = [mark == 1 for mark in batch["completion_mask"][0].tolist()]
    else:
        pad_id = trainer.model.config.get_text_config().pad_token_id
        at = inference.read_positions(torch.tensor([ids]), torch.tensor([present]), pad_id)
        trained = [place == at for place in range(len(ids))]
    kept = [place for place, there in enumerate(present) if there]
    return [ids[place] for place in kept], [trained[place] for place in kept]


def _marked(tokenizer, ids: list[int], trained: list[bool]) -> str:
    text = ""
    for marked, group in itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        part = tokenizer.decode([token for token, _ in group])
        text += f"⟦{part}⟧" if marked else part
    return text if any(trained) else f"{text}⟦⟧"


def _asked(row: dict) -> str:
    return "\n".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
