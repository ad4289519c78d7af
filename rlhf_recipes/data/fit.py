"""Rows as the model takes them: control tokens made plain, and no longer than it can read."""

from collections import Counter
from typing import Any

from rlhf_recipes.data.load import KEYS, Splits, check_keys, finished
from rlhf_recipes.data.tokens import lengths, neutralise, percentiles
from rlhf_recipes.errors import Refusal
from rlhf_recipes.text import line


def fit(splits: Splits, tokenizer, max_length: int | None, too_long: str = "drop") -> Splits:
    """Splits with control tokens neutralised and, under `drop`, without rows over `max_length`.

    Args:
        splits: what one of the `load_` functions returned.
        tokenizer: with a chat template.
        max_length: tokens of prompt plus the longest answer, template included; None for no limit.
        too_long: `drop`; `truncate` (kept and counted: the trainer cuts them); `stop`.

    Raises:
        Refusal: no chat template, nothing left, or rows over the length with `stop`.
    """
    if not tokenizer.chat_template:
        raise Refusal("model: its tokenizer has no chat template. Choose an instruction-tuned model.")
    check_keys("data", {"too_long": too_long}, {"too_long": KEYS["too_long"]})
    kept, sizes = {}, []
    over, refused, neutral = Counter(), Counter(), Counter(rows=0, occurrences=0)
    for name, rows in (("train", splits.train), ("test", splits.test)):
        rows, counts = neutralise(rows, tokenizer)
        neutral.update(counts)
        sized = list(zip(rows, lengths(rows, tokenizer, name), strict=True))
        taken = [(row, size) for row, size in sized if size is not None]
        short = [row for row, size in taken if max_length is None or size <= max_length]
        refused[name], over[name] = len(sized) - len(taken), len(taken) - len(short)
        kept[name] = short if too_long == "drop" else [row for row, _ in taken]
        sizes += [size for _, size in taken]
    tokens = percentiles(sizes)
    if too_long == "stop" and over.total():
        raise Refusal(
            f"data.too_long=stop: {over.total()} of {len(sizes)} rows exceed trainer.max_length={max_length}"
            f" (p50 {tokens['p50']}, p95 {tokens['p95']}, max {tokens['max']} tokens). "
            "Raise trainer.max_length, or set data.too_long=drop or truncate."
        )
    too_many = over.total() if too_long == "drop" else 0
    report = {
        **splits.report,
        "dropped": {**splits.report["dropped"], "template": refused.total(), "over_length": too_many},
        "over_length": dict(over),
        "over_length_truncated": over.total() if too_long == "truncate" else 0,
        "neutralised": dict(neutral),
        "max_length": max_length,
        "tokens": tokens,
    }
    return finished(kept["train"], kept["test"], report)


def describe(report: dict[str, Any]) -> str:
    """The two lines that a recipe prints: what is used, and what was left out or changed."""
    used = f"data: {report['source']}: {report['train']} train, {report['test']} test rows of {report['rows']}"
    left = [f"{count} {reason}" for reason, count in report["dropped"].items() if count]
    notes = [f"dropped {', '.join(left)}" if left else "dropped none"]
    if report.get("repeated"):
        notes.append(f"drawn with replacement, {report['train'] - report['repeated']} different train rows")
    if any(report["capped"].values()):
        notes.append("capped {train} train, {test} test".format(**report["capped"]))
    if report.get("over_length_truncated"):
        notes.append(f"{report['over_length_truncated']} over max_length, left to the trainer to truncate")
    if report.get("neutralised", {}).get("rows"):
        notes.append("control tokens made plain in {rows} rows ({occurrences} times)".format(**report["neutralised"]))
    if unread := report.get("unread_files"):
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        notes.append(f"not read: {', '.join(unread[:5])}{more}")
    if "tokens" in report:
        notes.append("tokens p50 {p50}, p95 {p95}, max {max}".format(**report["tokens"]))
    return f"{line(used)} ({line(report['split'])})\n      {line('; '.join(notes))}"
