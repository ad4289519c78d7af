"""What labels are worth: how far a person agrees with themself, favours a place, and agrees with others."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from rlhf_recipes import stats
from rlhf_recipes.labelling.choices import Choices
from rlhf_recipes.labelling.plan import AGAIN, NEW, SWAPPED
from rlhf_recipes.stats import Estimate, format_estimate


def of_one(made: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of one person's choices.

    Returns:
        `chosen`, `ties`, `skipped`: counts. Estimates: `same_again`, the same choice when a pair was shown a second
        time, in either order; `same_swapped`, of those whose places were changed; `left`, the left one of the replies
        that were chosen (1/2: no place is favoured). `seconds_per_choice`, the median, or None.
    """
    made = list(made)
    told = [each for each in made if each["choice"] != "skip"]
    by_show = {(each["pair"], each["show"]): each["choice"] for each in told}
    same = {
        show: [(pair, choice == by_show[pair, NEW]) for (pair, at), choice in by_show.items()
               if at == show and (pair, NEW) in by_show]
        for show in (AGAIN, SWAPPED)
    }  # fmt: skip
    placed = [each for each in told if each["choice"] != "tie"]
    lefts = [each["choice"] == each["left"] for each in placed]
    seconds = sorted(each["seconds"] for each in made if isinstance(each["seconds"], int | float))
    return {
        "chosen": len(placed),
        "ties": len(told) - len(placed),
        "skipped": len(made) - len(told),
        "same_again": _share([*same[AGAIN], *same[SWAPPED]]),
        "same_swapped": _share(same[SWAPPED]),
        "left": stats.estimate(lefts, [each["pair"] for each in placed]),
        "seconds_per_choice": seconds[len(seconds) // 2] if seconds else None,
    }


def between(choices: Choices) -> dict[tuple[str, str], Estimate]:
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
            found[one, other] = _share([(pair, first[one][pair] == first[other][pair]) for pair in shared])
    return found


def figures(choices: Choices) -> dict[str, Any]:
    """All of it, as result.json keeps it."""
    return {
        "people": {name: of_one(made.values()) for name, made in choices.kept.items() if made},
        "between": {" and ".join(two): share for two, share in between(choices).items()},
    }


def describe(choices: Choices) -> str:
    """A line for each person, and for every two."""
    lines = []
    for name, made in choices.kept.items():
        if not made:
            continue
        own = of_one(made.values())
        said = f"{name}: chose in {own['chosen']}, {own['ties']} ties, {own['skipped']} skipped"
        said += (
            f"; the same choice again {_said(own['same_again'])}, with the places changed {_said(own['same_swapped'])}"
        )
        lines.append(f"{said}; the left one {_said(own['left'])}")
    lines += [f"{a} and {b}: the same choice {_said(share)}" for (a, b), share in between(choices).items()]
    return "\n".join(lines)


def _share(of: list[tuple[str, bool]]) -> Estimate:
    return stats.estimate([same for _, same in of], [pair for pair, _ in of])


def _said(share: Estimate) -> str:
    return f"{format_estimate(share, percent=True)} of {share.n}" if share.n else "not known"
