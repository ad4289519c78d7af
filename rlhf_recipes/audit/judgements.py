"""Who judged which answer the better: what disagreement and consistency are computed from.

A judgement is a dict, one judge's word on two answers to one prompt under one principle:

| key             | value                                                                        |
| --------------- | ---------------------------------------------------------------------------- |
| `prompt_id`     | tells prompts apart; in a file it is read where there is no `prompt`, whose  |
|                 | own id (`formats.prompt_id`) is that of the pairs                            |
| `prompt`        | messages, or None; in a file also text                                       |
| `first`         | an answer                                                                    |
| `second`        | another answer                                                               |
| `p`             | probability in [0, 1] that the first is the better; 1/2 is a tie             |
| `judge`         | a name; `human` and `data` stand for labels                                  |
| `principle`     | a name, or None                                                              |
| `family`        | of the prompt, or None                                                       |
| `flip`          | whether the better answer changes with the order they are shown in, or None  |

Answers are the same where their texts are, up to spaces around them.
"""

import difflib
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.data import formats, readers, table
from rlhf_recipes.data.messages import Drop, Messages
from rlhf_recipes.errors import Refusal
from rlhf_recipes.run_folder import write_atomically

DATA = "data"
LABELS = ("human", DATA)
LABELLED = "judgements.jsonl"  # in the folder of a run of recipes/label.py
ANSWERS = {"first": 1.0, "second": 0.0, "tie": 0.5}
KEYS = ("prompt_id", "prompt", "first", "second", "p", "judge", "principle", "family", "flip")
OPTIONAL = KEYS[6:]

Judgement = dict[str, Any]
Pair = tuple[str, str, str]  # prompt_id and two answers, in the order of their texts


def load(path: str) -> list[Judgement]:
    """Judgements from a file with one a row (.jsonl, .json, .csv, .parquet, .gz), from a file of `export` that people
    have labelled, from the folder of a run of recipes/label.py, or from one of recipes/cai.py, where every principle
    that a pair was judged under is one.

    Raises:
        Refusal: not readable, or a row that is no judgement, with file, row and key.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return load(str(folder / LABELLED)) if (folder / LABELLED).is_file() else list(_of_run(path))
    rows = list(readers.read_file(path))
    if rows and {"id", "label"} <= rows[0][1].keys() and "p" not in rows[0][1]:
        return labels(path)
    return [_read(where, row, prompt) for (where, row), prompt in zip(rows, table.prompts(rows), strict=True)]


def from_pairs(rows: Iterable[dict]) -> list[Judgement]:
    """Preference rows (`data.load_pairs`) as judgements of the judge `data`: p is the row's, or 1.0 where it has
    none."""
    return [_of_row(row, DATA, None, 1.0 if row.get("p") is None else row["p"], None) for row in rows]


def by_pair(judgements: Iterable[Judgement]) -> dict[Pair, list[tuple[float, Judgement]]]:
    """For each pair of answers what was said of it: the probability that its first answer (in the order of the texts)
    is the better, and the judgement it is from. An answer beside itself is left out."""
    found: dict[Pair, list[tuple[float, Judgement]]] = {}
    for judgement in judgements:
        first, second = judgement["first"].strip(), judgement["second"].strip()
        if first == second:
            continue
        swapped = first > second
        pair = (judgement["prompt_id"], *((second, first) if swapped else (first, second)))
        found.setdefault(pair, []).append((1 - judgement["p"] if swapped else judgement["p"], judgement))
    return found


def clusters(judgements: Iterable[Judgement]) -> dict[str, str]:
    """`formats.clusters` of each prompt id, by the first judgement that has the prompt itself."""
    known: dict[str, Judgement] = {}
    for judgement in judgements:
        if not known.get(judgement["prompt_id"], {}).get("prompt"):
            known[judgement["prompt_id"]] = judgement
    return dict(zip(known, formats.clusters(known.values()), strict=True))


def by_judge(said: list[tuple[float, Judgement]]) -> dict[str, dict[str | None, float]]:
    """p of each judge under each of its principles, repetitions averaged; `said` is of one pair, from `by_pair`."""
    found: dict[str, dict[str | None, list[float]]] = {}
    for p, judgement in said:
        found.setdefault(judgement["judge"], {}).setdefault(judgement["principle"], []).append(p)
    return {judge: {name: fmean(ps) for name, ps in each.items()} for judge, each in sorted(found.items())}


def export(path: str, disputed: list[dict], seed: int = 0) -> int:
    """Write the disputed pairs (`disagreement.disputed`) for people to label; the number of rows.

    Each line has `id`, `prompt_id`, `family`, `prompt`, `first`, `second`, `label` (null: write first, second or tie)
    and `why`, the reasons it is disputed. Which answer comes first is drawn by the seed and the pair, so that nobody
    can tell which one was chosen.

    Raises:
        Refusal: the file is there with labels in it, or is none that this wrote.
    """
    file = Path(path).expanduser()
    if file.exists() and file.stat().st_size:
        done = len(labels(path))
        if done:
            raise Refusal(f"{path}: has {done} labels, which are never overwritten. Give another path.")
    lines = []
    for case in disputed:
        name = formats.pair_id(case["prompt_id"], case["first"], case["second"])
        sides = sorted((case["first"], case["second"]))
        random.Random(f"{seed}:{name}").shuffle(sides)
        row = {"id": name, **{key: case[key] for key in ("prompt_id", "family", "prompt")}}
        row |= {"first": sides[0], "second": sides[1], "label": None, "why": case["why"]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(file, "".join(lines))
    return len(lines)


def labels(path: str) -> list[Judgement]:
    """What people answered in a file of `export`, as judgements of the judge `human`; rows without a label are left
    out.

    Raises:
        Refusal: a label that is none, a text that was changed, a pair that appears twice, with file, row and key.
    """
    found, seen = [], {}
    rows = list(readers.read_file(path))
    for (where, row), prompt in zip(rows, table.prompts(rows), strict=True):
        if "label" not in row or "id" not in row:
            raise Refusal(f"{where}: {'id' if 'id' not in row else 'label'}: missing. Label a file of the export.")
        label = row["label"].strip().lower() if isinstance(row["label"], str) else row["label"]
        if label is not None and label != "" and label not in tuple(ANSWERS):
            raise Refusal(f"{where}: label = {row['label']!r:.40}: must be first, second, tie or null. Mend it.")
        plain = _read(where, {**row, "p": ANSWERS[label] if label else 0.5, "judge": "human"}, prompt)
        exported = row.get("prompt_id") or plain["prompt_id"]
        if row["id"] != formats.pair_id(exported, plain["first"], plain["second"]):
            raise Refusal(f"{where}: id = {row['id']!r:.40}: not of these answers. Restore the row's texts.")
        if row["id"] in seen:
            raise Refusal(f"{where}: id = {row['id']}: is in {seen[row['id']]} too. Remove one of the two rows.")
        seen[row["id"]] = where
        if label:
            found.append(plain)
    return found


def _of_run(path: str) -> Iterator[Judgement]:
    import pyarrow
    import pyarrow.parquet

    from rlhf_recipes.cai.dataset import PREFS

    files = [file for split in PREFS if (file := Path(path).expanduser() / f"{split}.parquet").is_file()]
    if not files:
        raise Refusal(f"{path}: a folder without {PREFS[0]}.parquet. Give a run of recipes/cai.py, or a file.")
    for file in files:
        try:
            empty = pyarrow.parquet.read_metadata(file).num_rows == 0
        except pyarrow.ArrowException:
            empty = False  # the reader says what is wrong with it
        for where, row in () if empty else readers.read_file(str(file)):
            try:
                principles = json.loads(row["by_principle"])
                if not principles:
                    yield _of_row(
                        row, row["judge"] or "construction", None, 1.0 if row["p"] is None else row["p"], None
                    )
                for name, p in principles.items():
                    yield _of_row(row, row["judge"] or "judge", name, p, row["flip"])
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise Refusal(f"{where}: not a pair of recipes/cai.py ({error!r:.80}). Make it again.") from error


def _of_row(row: dict, judge: str, principle: str | None, p: float, flip: bool | None) -> Judgement:
    first, second = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    return {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "first": first, "second": second, "p": float(p),
            "judge": judge, "principle": principle, "family": row.get("family"), "flip": flip}  # fmt: skip


def _read(where: str, row: dict[str, Any], prompt: Messages | Drop) -> Judgement:
    """One row of a file, checked.

    Args:
        prompt: of `table.prompts`.
    """
    for key in row:
        # `flips` or `principal` would be silently without effect; columns like nothing here are the user's own
        if key not in KEYS and (meant := difflib.get_close_matches(key, OPTIONAL, n=1, cutoff=0.8)):
            raise Refusal(f"{where}: {key}: unknown key; did you mean '{meant[0]}'? Rename or remove it.")
    found = {key: _text(where, row, key) for key in ("first", "second", "judge")}
    if found["first"].strip() == found["second"].strip():
        raise Refusal(f"{where}: second: the same text as first. Remove the row.")
    p = row.get("p")
    if isinstance(p, str):  # CSV holds text alone
        try:
            p = float(p)
        except ValueError:
            p = row["p"]
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1 or math.isnan(p):
        raise Refusal(f"{where}: p = {row.get('p')!r:.40}: must be a probability from 0 to 1. Mend or remove it.")
    for key in ("principle", "family"):
        found[key] = row.get(key) or None
        if found[key] is not None and not isinstance(found[key], str):
            raise Refusal(f"{where}: {key} = {found[key]!r:.40}: must be text or null. Mend or remove it.")
    flip = {"true": True, "false": False, "": None}.get(row["flip"].lower(), row["flip"]) if isinstance(
        row.get("flip"), str) else row.get("flip")  # fmt: skip
    if flip is not None and not isinstance(flip, bool):
        raise Refusal(f"{where}: flip = {flip!r:.40}: must be true, false or null. Mend or remove it.")
    if isinstance(prompt, Drop):
        raise Refusal(f"{where}: prompt: {prompt}. Remove it or the row.")
    if row.get("prompt_id") not in (None, ""):
        prompt_id = _text(where, row, "prompt_id")
    elif not prompt:
        raise Refusal(f"{where}: prompt_id: missing, and no prompt to take it from. Add one of the two.")
    if prompt:  # the user's own id would meet no pair
        prompt_id = formats.prompt_id(prompt)
    return {"prompt_id": prompt_id, "prompt": prompt or None, **found, "p": float(p), "flip": flip}


def _text(where: str, row: dict, key: str) -> str:
    value = row.get(key)
    if value is None:
        raise Refusal(f"{where}: {key}: missing. Add it or remove the row.")
    if not isinstance(value, str) or not value.strip():
        raise Refusal(f"{where}: {key} = {value!r:.40}: must be text that is not blank. Mend or remove the row.")
    return value
