"""Rows as the model takes them: control tokens made plain, no longer than it can read, and each with an answer."""

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_recipes import ranks
from rlhf_recipes.data.account import told
from rlhf_recipes.data.load import KEYS, Splits, check_keys, finished
from rlhf_recipes.data.rows import Example, Rows, Writer, written
from rlhf_recipes.data.tally import EXAMPLES
from rlhf_recipes.data.tokens import BATCH, PROMPT_THOUGHTS, Measured, Plain, Sizes, measure, percentiles, refusal
from rlhf_recipes.errors import Refusal
from rlhf_recipes.text import line

MOST = 0.5  # share of the rows beyond which what the template changes is no matter of single rows


@ranks.once_a_machine
def fit(
    splits: Splits, tokenizer, max_length: int | None, too_long: str = "drop", truncation_mode: str = "keep_start"
) -> Splits:
    """Splits with control tokens neutralised and, under `drop`, without rows over `max_length`; in every row something
    is left to learn from.

    Args:
        splits: what one of the `load_` functions returned.
        tokenizer: with a chat template.
        max_length: tokens of prompt plus the longest answer, template included; None for no limit.
        too_long: `drop`; `truncate` (the trainer cuts them: kept and counted where that leaves tokens of every answer,
            else dropped as `no_answer_left`; as `same_tokens` where it leaves the same of both); `stop`.
        truncation_mode: the trainer's: which end it keeps.

    Returns:
        Splits with `sizes`.

    Raises:
        Refusal: no chat template, nothing left, rows over the length with `stop`, or a template that does not render
            what most rows say.
    """
    if not tokenizer.chat_template:
        raise Refusal("model: its tokenizer has no chat template. Choose an instruction-tuned model.")
    check_keys("data", {"too_long": too_long}, {"too_long": KEYS["too_long"]})
    kept, sizes, lengths = {}, {}, []
    dropped, over, cut = Counter(template=0, over_length=0), Counter(train=0, test=0), 0
    neutral, altered, prompt_cut = Counter(rows=0, occurrences=0), Counter(), 0
    examples = dict(splits.report["examples"])
    for name, given in (("train", splits.train), ("test", splits.test)):
        plain = Plain(tokenizer)
        rewritten = _Rewritten(written(given), plain)
        found = measure(rewritten, len(given), tokenizer, name, _kept(max_length, truncation_mode))
        rows, reasons = rewritten.rows(), _reasons(found, max_length, too_long, truncation_mode)
        for reason, out in reasons.items():
            dropped[reason] += len(out)
            places = examples.get(reason, [])
            for row in out[: EXAMPLES - len(places)]:
                place = splits.places[name][row] if splits.places else f"{name} {row + 1}"
                said = f" ({refusal(rows[row], tokenizer)})" if reason == "template" else ""
                places = [*places, place + said]
            examples[reason] = places
        is_left = np.ones(len(rows), dtype=bool)
        for out in reasons.values():
            is_left[out] = False
        left = np.flatnonzero(is_left)
        kept[name], sizes[name] = rows.select(left), found.sizes[left]
        lengths.append(found.sizes.longest[~found.refused])
        over[name] = found.sizes.over(max_length)
        cut += sizes[name].over(max_length)
        neutral.update(plain.counts)
        altered.update(found.altered)
        prompt_cut += int(found.prompt_cut[left].sum())
    lengths = np.concatenate(lengths)
    tokens = percentiles(lengths)
    if too_long == "stop" and over.total():
        raise Refusal(
            f"data.too_long=stop: {over.total()} of {len(lengths)} rows exceed trainer.max_length={max_length}"
            f" (p50 {tokens['p50']}, p95 {tokens['p95']}, max {tokens['max']} tokens). "
            "Raise trainer.max_length, or set data.too_long=drop or truncate."
        )
    report = {
        **splits.report,
        "dropped": {**splits.report["dropped"], **dropped},
        "examples": examples,
        "over_length": dict(over),
        "over_length_truncated": cut,
        "neutralised": dict(neutral),
        "altered": dict(altered),
        "prompt_cut": prompt_cut,
        "max_length": max_length,
        "tokens": tokens,
    }
    emptied = any(getattr(splits, name) and not rows for name, rows in kept.items())
    _check_rendered(report, len(lengths), nothing_left=emptied)
    return _sized(finished(kept["train"], kept["test"], report), sizes, truncation_mode)


def _sized(splits: Splits, sizes: dict[str, Sizes], truncation_mode: str = "keep_start") -> Splits:
    """The splits with the sizes of their rows, and what a trainer will hold of them in the report."""
    cut = splits.report["max_length"], truncation_mode
    splits.sizes = sizes
    splits.kept = _kept(*cut) if splits.report["over_length_truncated"] else slice(None)
    splits.report["fitted"] = {name: each.cut(*cut).totals() for name, each in sizes.items()}
    return splits


def reordered(splits: Splits, train: Rows, test: Rows, dropped: dict[str, int]) -> Splits:
    """Some of the rows of fitted `splits`, in another order; `dropped`: what became of the others."""
    orders = {"train": splits.train.find(train), "test": splits.test.find(test)}
    report = {**splits.report, "dropped": {**splits.report["dropped"], **dropped}}
    return _sized(finished(train, test, report), {name: splits.sizes[name][order] for name, order in orders.items()})


class _Rewritten:
    """Rows as `Plain` makes them, some at a time; those that it changes are written once more."""

    def __init__(self, given: Rows, plain: Plain):
        self._given, self._plain = given, plain
        self._numbers, self._writer = array("q"), None

    def __iter__(self) -> Iterator[list[Example]]:
        number = 0
        for before in self._given.batches(BATCH):
            after = self._plain(before)
            for one, other in zip(before, after, strict=True):
                if other is not one:
                    self._writer = self._writer or Writer(self._given.keys)
                    self._writer.add(other)
                    self._numbers.append(number)
                number += 1
            yield after

    def rows(self) -> Rows:
        """All of them, once they were looked at; what was the same row of a file twice is so again."""
        if not self._writer:
            return self._given
        index = self._given.index[np.asarray(self._numbers)]
        _, first, again = np.unique(index, return_index=True, return_inverse=True)
        return self._given.replaced(self._numbers, self._writer.rows().select(first[again]))


def _kept(max_length: int | None, truncation_mode: str) -> slice:
    """Which tokens of a row are left after a cut."""
    return slice(-max_length, None) if max_length and truncation_mode == "keep_end" else slice(max_length)


def _reasons(found: Measured, max_length: int | None, too_long: str, truncation_mode: str) -> dict[str, np.ndarray]:
    """Why rows are left out -> the numbers of those; of several reasons for one row the first here."""
    left = found.sizes.cut(max_length, truncation_mode)
    faults = {"template": found.refused}
    if too_long == "drop":
        faults["over_length"] = (found.sizes.whole > left.whole).any(1)
    if found.answers:
        faults["no_answer_left"] = left.trained.min(1) == 0
    faults["same_tokens"] = found.alike
    reasons, fine = {}, np.ones(len(found.refused), dtype=bool)
    for reason, has_it in faults.items():
        if (has_it & fine).any():
            reasons[reason] = np.flatnonzero(has_it & fine)
        fine &= ~has_it
    return reasons


def _check_rendered(report: dict[str, Any], rows: int, nothing_left: bool) -> None:
    """Refuse rows that the template refuses, or of which it leaves out, or rewrites, what they are for.

    Thoughts in a prompt are no such thing: templates leave out those of earlier turns by design.

    Raises:
        Refusal: it refuses what would be left; or it does the other with most rows.
    """
    if report["dropped"]["template"] and nothing_left:
        raise Refusal(
            f"{report['source']}: the model's chat template refuses {report['dropped']['template']} rows, e.g. "
            f"{report['examples']['template'][0]}, and nothing is left. Choose a model whose template takes such "
            "turns, or take them out of the rows."
        )
    if report.get("text") == "plain":
        return
    lost = {what: count for what, count in report["altered"].items() if what != PROMPT_THOUGHTS}
    if sum(lost.values()) > MOST * rows:
        what = " and ".join(f"the {what} of {count}" for what, count in lost.items())
        raise Refusal(
            f"{report['source']}: the chat template leaves out or rewrites {what} of {rows} rows. Choose a model "
            "whose template keeps it, or train on what this one makes of them: data.text=plain."
        )


def left_out(report: dict[str, Any]) -> str:
    """How many rows were left out, by reason."""
    left = []
    for reason, count in report["dropped"].items():
        said = report["examples"].get("template") if reason == "template" else None
        left += [f"{count} {reason}" + (f", e.g. {said[0]}" if said else "")] if count else []
    return f"dropped {', '.join(left) or 'none'}"


def describe(report: dict[str, Any], key: str = "data") -> str:
    """The lines that a recipe prints of what a key names: what is used, how it is read, and what was left out or
    changed."""
    used = f"{key}: {report['source']}: {report['train']} train, {report['test']} test rows of {report['rows']}"
    notes = [left_out(report)]
    if report.get("repeated"):
        notes.append(f"drawn with replacement, {report['different']} different train rows")
    if any(report["capped"].values()):
        notes.append("capped {train} train, {test} test".format(**report["capped"]))
    if report.get("over_length_truncated"):
        notes.append(f"{report['over_length_truncated']} over max_length, left to the trainer to truncate")
    if report.get("neutralised", {}).get("rows"):
        notes.append("control tokens made plain in {rows} rows ({occurrences} times)".format(**report["neutralised"]))
    for what, count in report.get("altered", {}).items():
        notes.append(f"the template leaves out or rewrites the {what} of {count} rows")
    if report.get("prompt_cut"):
        notes.append(
            f"the template begins the answers of {report['prompt_cut']} rows otherwise than its generation prompt: "
            "trained from where they part"
        )
    if unread := report.get("unread_files"):
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        notes.append(f"not read: {', '.join(unread[:5])}{more}")
    if "tokens" in report:
        notes.append("tokens p50 {p50}, p95 {p95}, max {max}".format(**report["tokens"]))
    lines = [f"{line(used)} ({line(report['split'])})", *told(report), "; ".join(notes)]
    return "\n      ".join(map(line, lines))
