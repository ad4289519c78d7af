"""From records to a data set: what repeats across prompts is dropped, the rest is counted and written as parquet.

Splits: `train_prefs`, `test_prefs` (accepted pairs), `train_sft`, `test_sft` (replies worth imitating), `ties`,
`disputed` (kept to be looked at, not averaged away). Two passes over the shards: the first keeps a few numbers of each
prompt and of each accepted pair, the longer ones in files, the second writes.

Shapes: P prompts, N pairs, A accepted pairs, B bands of `filters.near_duplicate_keys`.
"""

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlhf_recipes import ranks, stats
from rlhf_recipes.cai import filters, make_pairs, prompt_templates
from rlhf_recipes.cai.prompt_templates import assistant
from rlhf_recipes.data.formats import opening_id
from rlhf_recipes.run_folder import write_atomically
from rlhf_recipes.text_metrics import BANDS, near_duplicate_keys

PREFS, SFT = ("train_prefs", "test_prefs", "ties", "disputed"), ("train_sft", "test_sft")
# A closing sentence in more of the rows than this was learned by heart.
CLOSER_SHARE, CLOSER_ROWS = 0.01, 3
# Why a pair goes that is fit by itself; the first, None, is that it stays.
REPEATED = (None, "leakage", "near_duplicate", "closer")
# Intervals resample prompts in at most so many groups: as wide as with every prompt for itself, in bounded memory.
GROUPS = 1000


class Writer:
    """Parquet files of one folder, one for each split, written in batches."""

    def __init__(self, folder: Path, batch: int = 512):
        import pyarrow as pa
        import pyarrow.parquet as pq

        turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        text, number = pa.string(), pa.float64()
        provenance = [
            ("prompt_id", text), ("family", text), ("source", text), ("principle", text), ("constitution", text),
            ("generator", text), ("judge", text), ("seed", pa.int64()),
        ]  # fmt: skip
        judged = [
            ("p", number), ("by_principle", text), ("spread", number), ("position_gap", number), ("flip", pa.bool_()),
            ("mass", number), ("speaks_to_judge", pa.bool_()), ("draft", text), ("critique", text),
            ("revision", text), ("route", text),
        ]  # fmt: skip
        prefs = pa.schema([("prompt", turns), ("chosen", turns), ("rejected", turns), *provenance, *judged])
        sft = pa.schema([("prompt", turns), ("completion", turns), *provenance, ("p", number)])
        self.schemas = {**dict.fromkeys(PREFS, prefs), **dict.fromkeys(SFT, sft)}
        self.files = {
            name: pq.ParquetWriter(folder / f"{name}.parquet", schema) for name, schema in self.schemas.items()
        }
        self.rows: dict[str, list[dict]] = {name: [] for name in self.schemas}
        self.counts: Counter = Counter(dict.fromkeys(self.schemas, 0))
        self.batch = batch

    def add(self, split: str, row: dict) -> None:
        self.rows[split].append(row)
        self.counts[split] += 1
        if len(self.rows[split]) == self.batch:
            self._flush(split)

    def close(self) -> None:
        for split, file in self.files.items():
            self._flush(split)
            file.close()

    def _flush(self, split: str) -> None:
        import pyarrow as pa

        if self.rows[split]:
            self.files[split].write_table(pa.Table.from_pylist(self.rows[split], schema=self.schemas[split]))
            self.rows[split] = []


def write(
    shards: list[Path], folder: Path, provenance: dict[str, Any], earlier: Iterable[tuple[list[Path], dict]] = ()
) -> dict[str, Any]:
    """Write the splits, `funnel.json` and `ledger.json`.

    Args:
        provenance: `constitution`, `generator`, `judge`, `seed` of every row.
        earlier: shards of other runs and the provenance of each, whose rows come first.

    Returns:
        `funnel` (counts, and estimates of what was kept) and `ledger` (counts by family and source), both without
        what is of earlier runs but for what was `written`, and of that what is `earlier`; where there are such runs
        `earlier`, the provenance of each.
    """
    before = list(earlier)
    made = ranks.by_first(_write, [*before, (shards, provenance)], folder)
    return made | ({"earlier": [each for _, each in before]} if before else {})


def _write(runs: list[tuple[list[Path], dict[str, Any]]], folder: Path) -> dict[str, dict]:
    repeated_N = _repeated([shard for shards, _ in runs for shard in shards], folder)
    writer, number, before = Writer(folder), 0, {}
    for shards, provenance in runs:
        tally, before = _Tally(), dict(writer.counts)
        number = _write_run(shards, provenance, repeated_N, number, tally, writer)
    writer.close()
    funnel = tally.funnel(dict(writer.counts)) | ({"earlier": before} if len(runs) > 1 else {})
    made = {"funnel": funnel, "ledger": tally.ledger()}
    for name, content in made.items():
        text = json.dumps(content, indent=2, ensure_ascii=False, default=asdict)
        write_atomically(folder / f"{name}.json", text + "\n")
    return made


def _write_run(
    shards: list[Path], provenance: dict, repeated_N: np.ndarray, number: int, tally: "_Tally", writer: Writer
) -> int:
    """Tally and write the pairs of a run; the first of them has the given number, the number after the last is
    returned."""
    for record in _records(shards):
        tally.prompt(record)
        completions: set[str] = set()
        for pair in record["pairs"]:
            reason = pair["unfit"] or REPEATED[repeated_N[number]]
            number += 1
            route = None if reason else pair["route"]
            tally.pair(record, pair, reason, route)
            if route not in (None, "unanswered"):
                _write_pair(writer, record, pair, route, provenance, completions)
    return number


def _records(shards: Iterable[Path]) -> Iterator[make_pairs.Record]:
    for shard in shards:
        yield from make_pairs.read(shard)


def _sides(pair: dict) -> tuple[str, str]:
    """(chosen, rejected); by construction the first is chosen where nobody judged."""
    first, second = pair["first"], pair["second"]
    return (first, second) if pair["p"] is None or pair["p"] >= 0.5 else (second, first)


def _write_pair(writer: Writer, record: dict, pair: dict, route: str, provenance: dict, completions: set[str]) -> None:
    """One row, and one of the sft split where the pair is accepted and the prompt's `completions` lack the chosen
    reply: several pairs may have the same."""
    chosen, rejected = _sides(pair)
    judged, revised = pair["p"] is not None, pair["source"] == "revision"
    row = {
        "prompt": record["prompt"],
        **{key: record[key] for key in ("prompt_id", "family")},
        **{key: pair[key] for key in ("source", "principle")},
        **provenance,
        "p": max(pair["p"], 1 - pair["p"]) if judged else None,
    }
    # As p, of the chosen reply; the position gap is the same for both.
    by_principle = {k: p if chosen == pair["first"] else 1 - p for k, p in pair["by_principle"].items()}
    step = next((s for s in record["steps"] if not s["unfit"] and s["revision"] == pair["first"]), {})
    notes = {
        **{key: pair[key] if judged else None for key in ("spread", "position_gap", "flip", "mass")},
        "by_principle": json.dumps(by_principle),
        "speaks_to_judge": pair["speaks_to_judge"],
        "draft": record["draft"]["text"] if revised else None,
        "critique": step.get("critique") if revised else None,
        "revision": pair["first"] if revised else None,
        "route": route,
    }
    split = record["split"]
    target = {"accepted": f"{split}_prefs", "tie": "ties"}.get(route, "disputed")
    writer.add(target, {**row, **notes, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]})
    if route == "accepted" and chosen not in completions:
        completions.add(chosen)
        writer.add(f"{split}_sft", {**row, "completion": [assistant(chosen)]})


class _Keys:
    """What `near_duplicate_keys` gives, in a file for each band without a name: one is in memory at a time."""

    def __init__(self, folder: Path):
        self.files = [tempfile.TemporaryFile(dir=folder) for _ in range(BANDS)]  # noqa: SIM115

    def add(self, text: str) -> None:
        for file, key in zip(self.files, near_duplicate_keys(text), strict=True):
            file.write(key)

    def bands(self) -> Iterator[np.ndarray]:
        for file in self.files:
            with file:
                file.seek(0)
                yield np.fromfile(file, np.uint64)


def _repeated(shards: list[Path], folder: Path) -> np.ndarray:
    """Which pairs repeat others, as places in `REPEATED`, uint8 of shape (N,).

    A train prompt that is nearly one of the test split takes its pairs along. Of accepted pairs whose chosen replies
    are nearly the same, those of one prompt stay, a test prompt before a train prompt; of those that end in the same
    sentence, as many as may.
    """
    prompts, replies = _Keys(folder), _Keys(folder)
    pairs, test = array("I"), array("b")
    numbers, owners, closers = array("I"), array("I"), array("Q")
    total = 0
    for n, record in enumerate(_records(shards)):
        asked = "\n".join(turn["content"] for turn in record["prompt"] if turn["role"] != "system")
        prompts.add(asked)
        pairs.append(len(record["pairs"]))
        test.append(record["split"] == "test")
        for number, pair in enumerate(record["pairs"], total):
            if pair["route"] == "accepted":
                chosen, _ = _sides(pair)
                ending = filters.closer(chosen)
                numbers.append(number)
                owners.append(n)
                replies.add(chosen)
                closers.append(xxhash.xxh3_64_intdigest(ending.encode()) if ending else 0)
        total += len(record["pairs"])

    found_N = np.zeros(total, np.uint8)
    test_P, leaked_P = np.array(test, bool), np.zeros(len(test), bool)
    for keys_P in prompts.bands():
        leaked_P |= np.isin(keys_P, keys_P[test_P])
    leaked_P &= ~test_P
    found_N[np.repeat(leaked_P, np.asarray(pairs))] = REPEATED.index("leakage")

    owners_A, numbers_A = np.asarray(owners), np.asarray(numbers)
    left_A = np.argsort(~test_P[owners_A], kind="stable")
    left_A = left_A[~leaked_P[owners_A[left_A]]]
    for keys_A in replies.bands():
        _, first, inverse = np.unique(keys_A[left_A], return_index=True, return_inverse=True)
        alike = owners_A[left_A] != owners_A[left_A][first][inverse]
        found_N[numbers_A[left_A[alike]]] = REPEATED.index("near_duplicate")

    left_A = left_A[found_N[numbers_A[left_A]] == 0]
    most = int(max(CLOSER_ROWS, CLOSER_SHARE * len(left_A)))
    endings, inverse, counts = np.unique(np.asarray(closers)[left_A], return_inverse=True, return_counts=True)
    for n in np.flatnonzero((counts > most) & (endings != 0)):
        found_N[numbers_A[left_A[inverse == n][most:]]] = REPEATED.index("closer")
    return found_N


class _Tally:
    """Counts of what became of prompts and pairs; grows with families and principles, and 6 bytes a pair."""

    def __init__(self):
        self.prompts = self.pairs = self.steps = self.speaking = 0
        self.neutralised: Counter = Counter(rows=0, occurrences=0)
        self.reasons: Counter = Counter()
        self.step_reasons: Counter = Counter()
        self.routes: Counter = Counter()
        self.cells: dict[str, Counter] = {}
        self.principles: dict[str, Counter] = {}
        # Of every pair its group (prompt, or those that open with the same user turn) and whether it was accepted; of
        # accepted ones whether the longer was chosen.
        self.groups, self.accepted = array("H"), array("b")
        self.longer_groups, self.longer = array("H"), array("b")

    def prompt(self, record: dict) -> None:
        self.prompts += 1
        for step in record["steps"]:
            self.steps += 1
            if step["unfit"]:
                self.step_reasons[step["unfit"]] += 1

    def pair(self, record: dict, pair: dict, reason: str | None, route: str | None) -> None:
        self.pairs += 1
        opens = len(record["prompt"]) > 1
        group = (int(opening_id(record["prompt"]), 16) if opens else self.prompts) % GROUPS
        self.groups.append(group)
        self.accepted.append(route == "accepted")
        self.speaking += pair["speaks_to_judge"]
        asked = (turn["content"] for turn in record["prompt"])
        typed = prompt_templates.chat_tokens(*asked, pair["first"], pair["second"])
        self.neutralised.update(rows=typed > 0, occurrences=typed)
        cell = self.cells.setdefault(f"{record['family'] or 'none'}/{pair['source']}", Counter())
        cell["pairs"] += 1
        if reason:
            self.reasons[reason] += 1
            cell["unfit"] += 1
            return
        self.routes[route] += 1
        cell[route] += 1
        cell["flips"] += pair["flip"]
        if pair["principle"]:
            of = self.principles.setdefault(pair["principle"], Counter())
            of["revised"] += 1
            of["accepted"] += route == "accepted"
            of["better"] += (pair["p"] or 0.0) > 0.5
        chosen, rejected = map(len, _sides(pair))
        if route == "accepted" and chosen != rejected:
            self.longer_groups.append(group)
            self.longer.append(chosen > rejected)

    def funnel(self, written: dict[str, int]) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "revisions": {"made": self.steps, "unfit": dict(self.step_reasons)},
            "pairs": self.pairs,
            "unfit": dict(self.reasons),
            "routes": dict(self.routes),
            "speaks_to_judge": self.speaking,
            "neutralised": dict(self.neutralised),
            "written": written,
            "yield": stats.estimate(self.accepted, self.groups),
            "chosen_is_longer": stats.estimate(self.longer, self.longer_groups),
            "by_principle": {name: dict(counts) for name, counts in sorted(self.principles.items())},
        }

    def ledger(self) -> dict[str, dict[str, int]]:
        """Counts for each family and source; a family that has none of something says 0."""
        names = ("pairs", "unfit", "accepted", "tie", "disputed", "not_better", "unanswered", "flips")
        return {cell: {name: counts[name] for name in names} for cell, counts in sorted(self.cells.items())}
