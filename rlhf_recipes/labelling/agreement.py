"""What labels are worth: how far a person agrees with themself, favours a place, and agrees with others.

What is computed here takes `clusters`, of each pair by its id: what its intervals resample.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

from rlhf_recipes import stats
from rlhf_recipes.data import formats
from rlhf_recipes.labelling.choices import Choices
from rlhf_recipes.labelling.pairs import Pair
from rlhf_recipes.labelling.plan import AGAIN, NEW, SWAPPED
from rlhf_recipes.stats import Estimate, format_estimate


def clusters_of(pairs: Iterable[Pair]) -> dict[str, str]:
    """Pair -> `formats.clusters` of its prompt."""
    asked = {pair.id: {"prompt": pair.prompt, "prompt_id": pair.prompt_id} for pair in pairs}
    return dict(zip(asked, formats.clusters(asked.values()), strict=True))


def of_one(made: Iterable[dict[str, Any]], clusters: Mapping[str, str]) -> dict[str, Any]:
    """Of one person's choices.

    Returns:
        `chosen`, `ties`, `skipped`: counts. Estimates: `same_again`, the same choice when a pair was shown a second
        time, in either order; `same_swapped`, of those whose places were changed; `left`, the left one of the replies
        that were chosen (1/2: no place is favoured). `seconds_per_choice`, the median, or None.
    """
    made = list(made)
    told = [each for each in made if each["choice"] != "skip"]
    same = {show: _repeated(told, show) for show in (AGAIN, SWAPPED)}
    placed = [each for each in told if each["choice"] != "tie"]
    lefts = [each["choice"] == each["left"] for each in placed]
    seconds = sorted(each["seconds"] for each in made if isinstance(each["seconds"], int | float))
    return {
        "chosen": len(placed),
        "ties": len(told) - len(placed),
        "skipped": len(made) - len(told),
        "same_again": _share([*same[AGAIN], *same[SWAPPED]], clusters),
        "same_swapped": _share(same[SWAPPED], clusters),
        "left": _share(zip([each["pair"] for each in placed], lefts, strict=True), clusters),
        "seconds_per_choice": seconds[len(seconds) // 2] if seconds else None,
    }


def of_everybody(choices: Choices, clusters: Mapping[str, str]) -> Estimate:
    """`same_again` of everybody together."""
    made = [list(each.values()) for each in choices.kept.values()]
    return _share([same for own in made for show in (AGAIN, SWAPPED) for same in _repeated(own, show)], clusters)


def between(choices: Choices, clusters: Mapping[str, str]) -> dict[tuple[str, str], Estimate]:
    """For every two people: the share of pairs, of those that both have labelled, in which they chose the same at
    first sight."""
    first = {
        name: {e["pair"]: e["choice"] for e in made.values() if e["show"] == NEW and e["choice"] != "skip"}
        for name, made in choices.kept.items()
    }
    found = {}
    for one, other in combinations(sorted(first), 2):
        shared = sorted(first[one].keys() & first[other].keys())
        if shared:
            found[one, other] = _share([(pair, first[one][pair] == first[other][pair]) for pair in shared], clusters)
    return found


def figures(choices: Choices, clusters: Mapping[str, str]) -> dict[str, Any]:
    """All of it, as result.json keeps it."""
    return {
        "people": {name: of_one(made.values(), clusters) for name, made in choices.kept.items() if made},
        "between": {" and ".join(two): share for two, share in between(choices, clusters).items()},
    }


def describe(choices: Choices, clusters: Mapping[str, str]) -> str:
    """A line for each person, and for every two."""
    lines = []
    for name, made in choices.kept.items():
        if not made:
            continue
        own = of_one(made.values(), clusters)
        said = f"{name}: chose in {own['chosen']}, {own['ties']} ties, {own['skipped']} skipped"
        said += (
            f"; the same choice again {_said(own['same_again'])}, with the places changed {_said(own['same_swapped'])}"
        )
        lines.append(f"{said}; the left one {_said(own['left'])}")
    lines += [f"{a} and {b}: the same choice {_said(share)}" for (a, b), share in between(choices, clusters).items()]
    return "\n".join(lines)


def _repeated(made: Iterable[dict[str, Any]], show: str) -> list[tuple[str, bool]]:
    """Of one person's choices: each pair that was shown again in this way, and whether they chose the same."""
    told = {(each["pair"], each["show"]): each["choice"] for each in made if each["choice"] != "skip"}
    again = [(pair, choice) for (pair, at), choice in told.items() if at == show and (pair, NEW) in told]
    return [(pair, choice == told[pair, NEW]) for pair, choice in again]


def _share(of: Iterable[tuple[str, bool]], clusters: Mapping[str, str]) -> Estimate:
    of = list(of)
    return stats.estimate([found for _, found in of], [clusters[pair] for pair, _ in of])


def _said(share: Estimate) -> str:
    return f"{format_estimate(share, percent=True)} of {share.n}" if share.n else "not known"
