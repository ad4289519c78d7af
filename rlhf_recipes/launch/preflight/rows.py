"""What a training would be fed: its rows, and one of them as the model gets it; no model is loaded.

Counts are of all rows. Shares that stand for the data behind them (how often the longer reply was chosen, say) are
estimates over the train rows, clustered by prompt.
"""

import math
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from rlhf_recipes import inference, stats
from rlhf_recipes.data.load import Splits, shorter_wins
from rlhf_recipes.text_metrics import refuses

# Train rows that are looked at for the end of their replies.
LOOKED_AT = 256
NEAR = 0.8  # Jaccard similarity of the words of two prompts


def examine(splits: Splits, sizes: list[int]) -> dict[str, Any]:
    """Counts and estimates of the rows that `data.fit` left.

    Args:
        sizes: tokens of each train row as it would be trained on.
    """
    report, train = splits.report, splits.train
    prompts = [row["prompt_id"] for row in train]
    left_out = report["dropped"]["over_length"]
    found = {
        **{key: report[key] for key in ("source", "split", "train", "test", "max_length", "neutralised")},
        "tokens": {**report["tokens"], "train": sum(sizes)},
        "over_length": {
            "rows": sum(report["over_length"].values()),
            "of": report["train"] + report["test"] + left_out,
            "fate": " (left out)" if left_out else " (cut)" if report["over_length_truncated"] else "",
        },
        **{key: report["dropped"][key] for key in ("duplicate", "leakage")},
        "near_duplicates": near_duplicates(train, splits.test),
    }
    if "rejected" in train[0]:
        chosen, rejected = ([row[side][-1]["content"] for row in train] for side in ("chosen", "rejected"))
        refused = [(refuses(c), refuses(r)) for c, r in zip(chosen, rejected, strict=True)]
        found["chosen_longer"] = stats.estimate([1 - shorter for shorter in shorter_wins(train)], prompts)
        found["length_correlation"] = length_correlation(chosen, rejected, prompts)
        found["both_refuse"] = stats.estimate([float(c and r) for c, r in refused], prompts)
        found["only_chosen_refuses"] = stats.estimate([float(c and not r) for c, r in refused], prompts)
    elif "completion" in train[0]:
        found["refuses"] = stats.estimate([float(refuses(row["completion"][-1]["content"])) for row in train], prompts)
    return found


def length_correlation(chosen: list[str], rejected: list[str], prompts: list[str]) -> stats.Estimate:
    """Pearson's correlation of being the chosen reply (1 or 0) with the logarithm of its characters, over all replies.

    Both labels are as frequent, so r = mean(l_chosen - l_rejected) / (2 s), with s the deviation of all l; the
    interval resamples pairs and takes s as it is.
    """
    logs = [[math.log(max(len(text), 1)) for text in texts] for texts in (chosen, rejected)]
    pooled = [*logs[0], *logs[1]]
    mean = sum(pooled) / len(pooled)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in pooled) / len(pooled))
    shares = [(c - r) / (2 * deviation or 1) for c, r in zip(*logs, strict=True)]
    return stats.ratio_of_sums(shares, [1] * len(shares), prompts)


def near_duplicates(train: list[dict], test: list[dict]) -> int:
    """Test rows whose user turns are nearly those of a train row: `NEAR` of their words in common."""
    from rlhf_recipes.text_metrics import jaccard, near_duplicate_keys

    known: dict[int, str] = {}
    for text in map(_asked, train):
        known |= dict.fromkeys(near_duplicate_keys(text).tolist(), text)
    found = 0
    for text in map(_asked, test):
        candidates = {known[key] for key in near_duplicate_keys(text).tolist() if key in known}
        found += any(jaccard(text, other) >= NEAR for other in candidates)
    return found


def example(splits: Splits, tokenizer, model_path: str) -> dict[str, Any]:
    """The first train row as text with its trained tokens between ⟦ and ⟧, and how many replies end with EOS.

    Returns:
        `text`; `eos`, the tokens that end a reply; `ends`, an estimate over the first rows (None for prompts alone).
    """
    from transformers import GenerationConfig

    generation_config = GenerationConfig()
    with suppress(OSError):
        generation_config = GenerationConfig.from_pretrained(model_path)
    stops = inference.stop_ids(SimpleNamespace(generation_config=generation_config), tokenizer)
    side = next((side for side in ("chosen", "completion") if side in splits.train[0]), None)
    ids, start = inference.encode(tokenizer, splits.train[0]["prompt"], side and splits.train[0][side])
    text = f"{tokenizer.decode(ids[:start])}⟦{tokenizer.decode(ids[start:])}⟧"
    ends = None
    if side:
        looked_at = splits.train[:LOOKED_AT]
        limit = splits.report["max_length"]
        replies = [inference.encode(tokenizer, row["prompt"], row[side])[0][:limit] for row in looked_at]
        # A template may close a turn with a line break.
        ended = [float(not set(stops).isdisjoint(ids[-3:])) for ids in replies]
        ends = stats.estimate(ended, [row["prompt_id"] for row in looked_at])
    return {"text": text, "eos": tokenizer.convert_ids_to_tokens(stops), "ends": ends}


def _asked(row: dict) -> str:
    return "\n".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
