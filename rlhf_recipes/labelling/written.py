"""What others read of it: `judgements.jsonl`, every word of everybody, and `preferences.jsonl`, a row for a pair."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.cai.people import JUDGEMENTS
from rlhf_recipes.labelling.choices import Choices
from rlhf_recipes.labelling.pairs import Pair
from rlhf_recipes.labelling.plan import NEW, SWAPPED
from rlhf_recipes.run_folder import write_atomically

PREFERENCES = "preferences.jsonl"
P = {"first": 1.0, "second": 0.0, "tie": 0.5}


def write(folder: Path, pairs: list[Pair], choices: Choices) -> None:
    """Both files, of the pairs that somebody has chosen in; what was skipped is in neither."""
    for name, rows in ((JUDGEMENTS, judgements(pairs, choices)), (PREFERENCES, preferences(pairs, choices))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomically(folder / name, "".join(lines))


def judgements(pairs: list[Pair], choices: Choices) -> Iterator[dict[str, Any]]:
    """As `audit.judgements` reads them: a pair that a person was shown twice is there twice; `flip` says of one that
    was shown in both orders whether the better reply changed with them."""
    told = _by_pair(choices)
    for pair in pairs:
        for annotator, said in told.get(pair.id, {}).items():
            words = {each["show"]: each["choice"] for each in said}
            both = words.keys() >= {NEW, SWAPPED}
            flip = {words[NEW], words[SWAPPED]} == {"first", "second"} if both else None
            for each in said:
                yield {
                    **_of(pair), "p": P[each["choice"]], "judge": annotator, "principle": pair.principle,
                    "flip": flip if each["show"] in (NEW, SWAPPED) else None, "note": each["note"],
                }  # fmt: skip


def preferences(pairs: list[Pair], choices: Choices) -> Iterator[dict[str, Any]]:
    """As `data.format=preference` reads them: `preference` is first, second or tie, by the mean of what people said
    (1, 0, 1/2 for a tie): two ties and a first are first. What one person said of a pair counts once, however often it
    was shown."""
    told = _by_pair(choices)
    for pair in pairs:
        if said := told.get(pair.id):
            p = fmean(fmean(P[each["choice"]] for each in own) for own in said.values())
            word = "tie" if p == 0.5 else "first" if p > 0.5 else "second"
            yield {**_of(pair), "preference": word, "people": len(said)}


def _of(pair: Pair) -> dict[str, Any]:
    return {key: getattr(pair, key) for key in ("prompt_id", "family", "prompt", "first", "second")}


def _by_pair(choices: Choices) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Pair -> annotator -> lines that are no skip."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for annotator, made in choices.kept.items():
        for each in made.values():
            if each["choice"] in P:
                found.setdefault(each["pair"], {}).setdefault(annotator, []).append(each)
    return found
