"""Preferences and demonstrations: load, validate, split, neutralise, fit to a length.

    splits = load_pairs(cfg.data)  # before a model loads: imports neither torch nor transformers
    splits = fit(splits, tokenizer, cfg.trainer.max_length, cfg.data.too_long)
    print(describe(splits.report))

What becomes of what is found (`Splits.report` has the counts, with up to three places each under `examples`):

| found                                                           | what happens                          |
| --------------------------------------------------------------- | ------------------------------------- |
| file missing, unreadable, empty, binary, not UTF-8, unparsable  | stops, with file and line             |
| column missing, value of a wrong type, unknown role             | stops, with row and key               |
| no train or no test rows left                                   | stops, with what was dropped          |
| null or blank text in a user or assistant turn                  | dropped: `empty`                      |
| nan, None, null as a library writes an empty cell               | dropped: `missing`                    |
| text without the structure that the file's texts have           | dropped: `unreadable`                 |
| calls of tools, their turns and lists; pictures, sound          | dropped: `tools`, `media`             |
| a conversation whose last turn has the weight 0                 | dropped: `unweighted`                 |
| turns out of order: [system,] user, assistant, user, assistant  | dropped: `roles`                      |
| chosen and rejected that answer different contexts              | dropped: `context_differs`            |
| chosen that equals rejected after stripping                     | dropped: `identical`                  |
| two answers with the same score or rank, or said to be as good, |                                       |
| also by a `p` of exactly 0.5                                    | dropped: `tie`                        |
| fewer answers with a score than an example needs                | dropped: `unrated`                    |
| fewer answers than an example needs                             | dropped: `unpaired`                   |
| a message of a tree that was deleted, or follows one            | dropped: `deleted`                    |
| a message of a tree whose parent is not in the file             | dropped: `orphan`                     |
| an answer without a label, two without a preference             | dropped: `unlabelled`                 |
| a pair whose `p` is below 0.5                                   | turned round, counted: `turned_round` |
| most rows left out for one of `NAMED`                           | stops, with the override              |
| an answer labelled bad, where demonstrations are asked for      | dropped: `labelled_bad`               |
| a token, key or password, of a known shape or the environment's | dropped: `secret`                     |
| the same example before it in the same split                    | dropped: `duplicate`                  |
| a train row whose prompt is in test too                         | dropped: `leakage`                    |
| roles that the chat template refuses (`fit`)                    | dropped: `template`                   |
| more than `max_length` tokens (`fit`)                           | `data.too_long`: drop, truncate, stop |
| no token of an answer within `max_length`, or at all (`fit`)    | dropped: `no_answer_left`             |
| two answers of the same tokens up to `max_length` (`fit`)       | dropped: `same_tokens`                |
| text that the chat template leaves out or rewrites (`fit`)      | counted: `altered`; most rows: stops  |
| control tokens typed into a message (`fit`)                     | rewritten, counted: `neutralised`     |
| no micro-batch of other prompts (`micro_batches`)               | dropped: `unplaced`                   |
| more rows than `train_size` or `eval_size`                      | left out, counted: `capped`           |
| files and splits beside those that are asked for                | named: `unread_files`                 |
| a train row drawn again by `bootstrap`                          | kept, counted: `repeated`; of what is |
|                                                                 | left `different` ones                 |

`p` of a pair is the probability that its chosen answer is the better one. In every recipe the likelier answer is the
chosen one: where pairs are read, where they are taken apart, and where the better answer alone is imitated. `reward`
learns the probability, every other recipe the order alone; and all that is called accuracy counts a pair as right
where the chosen answer comes first, whatever its p.

`candidates` (one a row; more for ratings reduced to all pairs, two for a pair taken apart into labelled answers) = all
dropped and capped + train - repeated + test.
Prompts are held out by the turn that opens them, so that no conversation continues on the other side.
"""

import os
import random
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import ranks, secrets
from rlhf_recipes.config import check_value
from rlhf_recipes.data import formats, preference, recognise, sources
from rlhf_recipes.data.columns import COLUMNS
from rlhf_recipes.data.keys import Keys, different_keys
from rlhf_recipes.data.messages import Drop
from rlhf_recipes.data.row import Row
from rlhf_recipes.data.rows import Example, Rows, Writer, written
from rlhf_recipes.data.split import split
from rlhf_recipes.data.table import Placed, Table
from rlhf_recipes.data.tally import Tally
from rlhf_recipes.errors import Refusal, nearest

if TYPE_CHECKING:
    from rlhf_recipes.data.tokens import Sizes

KEYS = {
    "path": str,
    "test_path": str | None,
    "name": str | None,
    "revision": str | None,
    "format": recognise.FORMATS,
    "text": ("auto", "plain"),
    "preference": preference.SCALES,
    "columns": dict,
    "ignore": list,
    "reduce": ("all", "best_worst"),
    "train_split": str,
    "test_split": str | None,
    "test_size": int | float | None,
    "train_size": int | None,
    "eval_size": int | None,
    "bootstrap": int | None,
    "too_long": ("drop", "truncate", "stop"),
    "seed": int,
}


@dataclass
class Splits:
    """Examples to train on and to hold out, in TRL's conversational format.

    Attributes:
        train: pairs (`prompt`, `chosen`, `rejected`), demonstrations (`prompt`, `completion`), labelled answers
            (`prompt`, `completion`, `label`) or prompts, all lists of messages but for the label, each with `family`
            (str or None) and `prompt_id` (hash of the prompt without case and spacing), pairs with `p` (probability
            that chosen is better, at least 0.5, None where nothing says) and `margin` (where there is a column of it),
            labelled answers with `pair` (a number that both halves of a pair have, else None), in seeded order. What a
            loader returns are `data.rows.Rows`.
        test: likewise; shares no `prompt_id` with `train`.
        report: the counts described at the head of this module; JSON-able.
        source: the Hub id, `clinic`, or the name of the file or folder.
        places: where the rows of `train` and `test` stand, before `fit`.
        sizes: `data.tokens.Sizes` of the rows of `train` and `test`, after `fit`.
        kept: which of its tokens a trainer keeps of each conversation: fewer than all where `fit` left some to cut.
    """

    train: Sequence[Example]
    test: Sequence[Example]
    report: dict[str, Any]
    source: str
    places: dict[str, Sequence[str]] = field(default_factory=dict)
    sizes: dict[str, "Sizes"] = field(default_factory=dict)
    kept: slice = field(default_factory=lambda: slice(None))

    def to_datasets(self, folder: Path | None = None):
        """(train, test) as `datasets.Dataset`s of the same features.

        Args:
            folder: where they shall lie, for as many runs as use the same rows; what a trainer derives from them
                (tokens, the reference's log-probabilities) is then kept beside them. None: where they were read to.
        """
        from datasets import load_from_disk

        splits = [written(each) for each in (self.train, self.test)]
        unsaid = [key for key in ("p", "margin") if not any(each.count(key) for each in splits)]
        datasets = []
        for each in splits:
            dataset = each.to_dataset()
            dataset = dataset.remove_columns([key for key in unsaid if key in dataset.column_names])
            if folder:
                dataset = load_from_disk(ranks.by_first(_saved, dataset, folder / each.digest(dataset.column_names)))
            datasets.append(dataset)
        return datasets[0], datasets[1]


def _saved(dataset, place: Path) -> Path:
    if not place.exists():
        scratch = place.with_name(f".{place.name}.{os.getpid()}")  # jobs of a sweep may write side by side
        dataset.save_to_disk(scratch)
        with suppress(OSError):  # another job was faster
            scratch.rename(place)
    return place


def load_pairs(node: DictConfig, whole: bool = False) -> Splits:
    """Preference pairs from a data node (conf/data/base.yaml documents its keys).

    Args:
        whole: whether all rows are `train`, and none is held out.

    Raises:
        Refusal: on one line, for what the table at the head of this module stops at.
    """
    return _load(node, ("chosen", "rejected"), whole=whole)


def load_labelled(node: DictConfig) -> Splits:
    """Answers labelled good or bad: the columns `completion` and `label`, or both halves of a preference pair.

    Raises:
        Refusal: on one line, for what the table at the head of this module stops at.
    """
    return _load(node, ("chosen", "rejected"), labelled=True)


def load_demonstrations(node: DictConfig) -> Splits:
    """Prompts with one good answer each: the column `completion`, else the chosen, best rated or last answer.

    Raises:
        Refusal: on one line, for what the table at the head of this module stops at.
    """
    return _load(node, ("completion",))


def load_prompts(node: DictConfig, whole: bool = False) -> Splits:
    """Prompts alone: the column `prompt`, else what the answers of a row answer; each prompt once.

    Args:
        whole: whether all rows are `train`, and none is held out.

    Raises:
        Refusal: on one line, for what the table at the head of this module stops at.
    """
    return _load(node, (), whole=whole)


# By what a method's rows are (`methods.Method.rows`).
LOADERS = {
    "pairs": load_pairs,
    "labelled answers": load_labelled,
    "demonstrations": load_demonstrations,
    "prompts": load_prompts,
}


def check(node: DictConfig) -> None:
    """Refuse a data node with an unknown key or a value of a wrong type; nothing is read.

    Raises:
        Refusal: names the key as typed.
    """
    _settings(node)


@ranks.once_a_machine
def _load(node: DictConfig, sides: tuple[str, ...], labelled: bool = False, whole: bool = False) -> Splits:
    data = {**_settings(node), "whole": whole}
    taken = ("auto", *recognise.PREFERENCES, *(["labelled"] if labelled else []))
    if data["format"] not in taken and "rejected" in sides:
        raise Refusal(f"data.format={data['format']}: holds no preferences. Choose one of {', '.join(taken)}.")
    try:
        return _attempt(data, sides, labelled)
    except _OtherwiseRead as found:
        return _attempt(data, sides, labelled, found)


class _OtherwiseRead(Exception):
    """Later rows of the train and of the test source, which show that these are to be read in another way."""

    def __init__(self, train: list[Placed], test: list[Placed]):
        self.train, self.test = train, test


def _attempt(
    data: dict[str, Any], sides: tuple[str, ...], labelled: bool, shown: _OtherwiseRead | None = None
) -> Splits:
    """The splits, by the first rows of each source and by those that an attempt before it raised.

    Raises:
        _OtherwiseRead: rows that none was read by; never where some are given.
    """
    tally, keys = Tally(), Keys()
    rows, test_rows, told = sources.find(data, sides)
    first = second = Table(rows, data, sides, labelled, tally, shown.train if shown else [])
    if test_rows is not None:
        second = Table(test_rows, data, sides, labelled, tally, shown.test if shown else [], first.layout)
    has_margin = first.layout.columns["margin"] or second.layout.columns["margin"]
    writer = Writer(_columns(sides, labelled, has_margin))
    try:
        if test_rows is not None:
            _read(second, data, sides, labelled, tally, keys, writer)
        test = None if test_rows is None else np.arange(len(keys))
        _read(first, data, sides, labelled, tally, keys, writer)
    except Refusal:  # unless rows up to this one show that all are to be read in another way
        if shown is not None or all([first.is_settled(), second.is_settled()]):
            raise
    if not all([first.is_settled(), second.is_settled()]) and shown is None:
        raise _OtherwiseRead(first.later.rows, second.later.rows)
    train = np.arange(0 if test is None else len(test), len(keys))
    column = first.layout.columns["split"] or second.layout.columns["split"]
    train, test, how = split(keys, train, test, data, told.test, column)
    train, test = (tally.left(keys, each, keys.are_first(each), "duplicate") for each in (train, test))
    train = tally.left(keys, train, ~keys.share_prompts(train, test), "leakage")
    found = {"train": len(train), "test": len(test)}
    repeated = 0
    if data["bootstrap"] is None:
        train = keys.shuffled(train, data["seed"])[: data["train_size"]]
    elif len(train):
        drawn = random.Random(data["bootstrap"]).choices(range(len(train)), k=data["train_size"] or len(train))
        train = train[drawn]
        repeated = len(train) - len(different_keys(train))
    test = keys.shuffled(test, data["seed"])[: data["eval_size"]]
    report = {
        "source": sources.source_name(data["path"]),
        "format": first.layout.format,
        "text": data["text"],
        "split": "; ".join((how, *told.notes)),
        **({"unread_files": told.unread} if told.unread else {}),
        "rows": tally.rows,
        "candidates": tally.candidates,
        "dropped": dict(tally.dropped),
        "examples": tally.examples,
        **({"whole": True} if data["whole"] else {}),
        "capped": {"train": found["train"] - len(train) + repeated, "test": found["test"] - len(test)},
        "repeated": repeated,
        **_account(data, first, second, tally),
    }
    unheard = [each for each in data["ignore"] if each in first.later.unheard & second.later.unheard]
    report |= {"ignored_nothing": unheard} if unheard else {}
    examples = writer.rows()
    train_rows, test_rows = examples.select(train), examples.select(test)
    soft = {key: train_rows.count(key) + test_rows.count(key) + tally.soft[key] for key in ("p", "margin")}
    report |= {"soft": {key: count for key, count in soft.items() if count}} if any(soft.values()) else {}
    splits = finished(train_rows, test_rows, report)
    splits.places = {"train": keys.places(train), "test": keys.places(test)}
    return splits


def _columns(sides: tuple[str, ...], labelled: bool, has_margin: Any) -> list[str]:
    """What every example has."""
    if labelled:
        return ["prompt", "completion", "label", "pair", "family", "prompt_id"]
    of_pairs = ["p", *(["margin"] if has_margin else [])] if "rejected" in sides else []
    return ["prompt", *sides, "family", "prompt_id", *of_pairs]


def finished(train: Rows, test: Rows, report: dict[str, Any]) -> Splits:
    """
    Raises:
        Refusal: no rows are left.
    """
    for name, rows in (("train", train), ("test", test)):
        if not rows and not (name == "test" and report.get("whole")):
            counts = [f"{count} {reason}" for reason, count in report["dropped"].items() if count]
            place = next((f", e.g. {places[0]}" for places in report["examples"].values()), "")
            raise Refusal(
                f"{report['source']}: no {name} rows left of {report['rows']} "
                f"({', '.join(counts) or 'none dropped'}{place}; {report['split']}). "
                "Check data.format, data.columns and trainer.max_length, or give more rows."
            )
    report = {**report, "train": len(train), "test": len(test)}
    report |= {"different": len(different_keys(train.index))} if report.get("repeated") else {}
    return Splits(train, test, report, report["source"])


def _settings(node: DictConfig) -> dict[str, Any]:
    """The node as a plain dict with every key checked."""
    data = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    check_keys("data", data, KEYS)
    check_keys("data.columns", data["columns"], dict.fromkeys(COLUMNS, str | None))
    for key in ("train_size", "eval_size"):
        if data[key] is not None and data[key] < 1:
            raise Refusal(f"data.{key}={data[key]}: must be at least 1, or null for all rows. Change it.")
    size = data["test_size"]
    if size is not None and not (0 < size < 1 or (size >= 1 and size == int(size))):
        raise Refusal(f"data.test_size={size}: must be a fraction below 1 or a count of prompts. Change it.")
    return data


def check_keys(where: str, values: dict[str, Any], rules: dict[str, Any]) -> None:
    for key in values:
        if key not in rules:
            raise Refusal(f"{where}.{key}: no such key{nearest(str(key), rules)} See conf/data/base.yaml.")
    for key, rule in rules.items():
        if key not in values or values[key] in ("???", ""):
            raise Refusal(f"{where}.{key}: required, but not set. Add {where}.{key}=<value>.")
        check_value(f"{where}.{key}", values[key], rule)


def _read(
    table: Table,
    data: dict[str, Any],
    sides: tuple[str, ...],
    labelled: bool,
    tally: Tally,
    keys: Keys,
    writer: Writer,
) -> None:
    """Write every example that the rows give; what they do not give goes into the tally."""
    layout, reading = table.layout, table.reading
    held, own = secrets.in_environment(), Tally()
    for where, values in table.rows:
        row = Row(where, values, layout.columns, tally.unread_keys, data["ignore"], tally.held)
        row, p = _likelier_first(row, layout, sides)
        own.rows += 1
        family, split = row.label("family"), row.label("split")
        tally.compare(layout.scores, values)
        for candidate in formats.candidates(row, layout, sides, data["reduce"], reading):
            own.candidates += 1
            if isinstance(candidate, Drop):
                own.drop(candidate, where)
                continue
            if p == 0.5:
                own.drop(Drop("tie"), where)
                continue
            tally.turned_round += row.columns["chosen"] != layout.columns["chosen"]
            labels = {"family": family, "prompt_id": formats.prompt_id(candidate["prompt"])}
            soft = candidate.pop("p", p)
            if "rejected" in sides and not labelled:
                labels["p"] = soft
                if layout.columns["margin"]:
                    labels["margin"] = row.number("margin", "must be a number")
            else:
                tally.soft["p"] += soft is not None
                tally.soft["margin"] += row.optional("margin") not in (None, "")
            if any(secrets.find(said, held) for said in (family or "", *_texts(candidate))):
                own.drop(Drop("secret"), where)  # a model would learn it, and samples and pages would show it
                continue
            examples = _halves(candidate, tally.candidates + own.candidates) if labelled else [candidate]
            own.candidates += len(examples) - 1
            for example in examples:
                example |= labels
                keys.add(where, example, split)
                writer.add(example)
    own.refuse_most(sources.source_name(data["path"]))
    if reading is not None:
        reading.refuse_if_most(sources.source_name(data["path"]))
    tally.add(own)


def _likelier_first(row: Row, layout: recognise.Layout, sides: tuple[str, ...]) -> tuple[Row, float | None]:
    """The row of a pair with the likelier answer as its chosen one, and the probability that this one is better; None
    where nothing says, or nothing is made of the pair."""
    is_pair = layout.format in ("pairs", "hh_rlhf") and row.has("chosen") and row.has("rejected")
    if not is_pair or not sides or ("completion" in sides and row.has("completion")):
        return row, None
    p = row.number("p", "must be a probability from 0 to 1", 0, 1)
    if p is None or p >= 0.5:
        return row, p
    turned = {**row.columns, "chosen": row.columns["rejected"], "rejected": row.columns["chosen"]}
    return replace(row, columns=turned), 1 - p


def _is_found(data: dict[str, Any], layout: recognise.Layout) -> bool:
    """Whether the format, or a column of it, is another than the user's or the default's word."""
    return data["format"] == "auto" or any(
        name not in (None, data["columns"][key]) for key, name in layout.columns.items()
    )


def _account(data: dict[str, Any], first: Table, second: Table, tally: Tally) -> dict[str, Any]:
    """What is said of the columns and of the texts, where there is something to say."""
    layout, tested = first.layout, second.layout
    readings = {"": first.reading} | ({"test: ": second.reading} if second is not first else {})
    unread = dict.fromkeys((*layout.unread, *tested.unread, *(f"{key} (of messages)" for key in tally.unread_keys)))
    found = {
        "joined": dict(tally.joined),
        "held": dict(tally.held),
        "read_as": recognise.said(layout) if _is_found(data, layout) else None,
        "test_read_as": recognise.said(tested) if tested.columns != layout.columns else None,
        "unread": list(unread),
        "turned_round": tally.turned_round,
        "own_scores": tally.own_scores and {"columns": layout.scores, **tally.own_scores},
        "texts": [whose + said for whose, each in readings.items() if each is not None for said in each.lines()],
    }
    return {key: value for key, value in found.items() if value}


def _halves(candidate: Example, number: int) -> list[Example]:
    """The labelled answers of a pair, which carry its number; of an answer that has a label already, itself."""
    if "label" in candidate:
        return [{**candidate, "pair": None}]
    return [
        {"prompt": candidate["prompt"], "completion": candidate[side], "label": side == "chosen", "pair": number}
        for side in ("chosen", "rejected")
    ]


def _texts(example: Example) -> list[str]:
    return [turn["content"] for turns in example.values() if isinstance(turns, list) for turn in turns]


def shorter_wins(rows: Iterable[Example]) -> list[float]:
    """The baseline "the shorter answer wins": per pair 1.0 if chosen has fewer characters, 0.5 if as many."""
    sizes = [(len(row["chosen"][-1]["content"]), len(row["rejected"][-1]["content"])) for row in rows]
    return [float(chosen < rejected) + 0.5 * (chosen == rejected) for chosen, rejected in sizes]
