"""What the reward model says of held-out pairs, beside what their lengths alone say."""

from collections.abc import Sequence

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import section
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.data.load import shorter_wins
from rlhf_recipes.training.metrics import wins

KEY, TITLE = "preference", "Held-out preferences"
QUESTION = "Does the reward model prefer what people preferred, on pairs that it has not seen?"
BINS = 4  # of the margin


def audit(rows: list[dict], margins_N, train: list[dict], doubts: Sequence[str] = ()) -> dict:
    """Accuracy on held-out pairs, by family and by how far apart the two rewards are.

    Args:
        rows: the N held-out pairs.
        margins_N: reward of chosen minus rejected; of an ensemble their mean.
        train: the pairs that it learned from, for what their lengths give away.
        doubts: why pairs that are held out here may not have been in its training, a sentence each.
    """
    margins_N = np.asarray(margins_N, dtype=float)
    ids, right = clusters(rows), wins(margins_N.tolist())
    shorter = shorter_wins(rows)
    share = sum(shorter) / max(len(shorter), 1)
    rule, baseline = max(("the shorter answer wins", share), ("the longer answer wins", 1 - share), key=lambda r: r[1])
    accuracy = stats.estimate(right, ids)
    longer = stats.estimate([1 - each for each in shorter_wins(train)], clusters(train))
    figures = [
        section.figure(
            "accuracy", "Preference accuracy", accuracy, unit="%", better="higher", baseline=(rule, baseline),
            says="Share of held-out pairs whose chosen answer gets the higher reward; a tie counts one half.",
        ),
        section.figure(
            "accuracy_over_length", "Accuracy over the better rule of length",
            stats.difference(right, shorter if share >= 0.5 else [1 - each for each in shorter], ids), unit="%",
            better="higher", baseline=("the rule itself", 0.0),
            says=f"Paired difference to “{rule}” on the same pairs.",
        ),
        section.figure(
            "chosen_longer", "Chosen answer is the longer one, train pairs", longer, unit="%",
            baseline=("balanced", 0.5), says="By characters. Far from one half, length alone earns reward.",
        ),
    ]  # fmt: skip
    families: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row["family"]:
            families.setdefault(row["family"], []).append(i)
    found = [
        (family, stats.estimate([right[i] for i in group], [ids[i] for i in group]))
        for family, group in families.items()
    ]
    found.sort(key=lambda each: each[1].value)
    plots = [section.dots("Preference accuracy by family, worst first", found, "pairs ranked correctly, %",
                          (rule, baseline))] if found else []  # fmt: skip
    return section.section(
        KEY, TITLE, QUESTION, figures=figures, tables=[_by_margin(margins_N, right, ids)], plots=plots,
        notes=[*doubts, *_notes(accuracy, found)],
    )  # fmt: skip


def _by_margin(margins_N: np.ndarray, right: list[float], ids: list[str]) -> dict:
    """Accuracy from the closest pairs to the clearest: a signal is right where it is sure."""
    order = np.argsort(np.abs(margins_N), kind="stable")
    rows = []
    for part in np.array_split(order, min(BINS, len(order))) if len(order) else []:
        sizes = np.abs(margins_N[part])
        found = stats.estimate([right[i] for i in part], [ids[i] for i in part])
        rows.append([f"{sizes[0]:.2f} to {sizes[-1]:.2f}", found, len(part)])
    return section.table(
        "Accuracy by the distance of the two rewards", ["|margin|", "accuracy", "pairs"], rows,
        "A reward model that knows what it knows is right more often in the lower rows.",
    )  # fmt: skip


def _notes(accuracy: stats.Estimate, found: list[tuple]) -> list[str]:
    notes = []
    if accuracy.low is not None:
        half = 50 * (accuracy.high - accuracy.low)
        notes.append(f"{accuracy.n} pairs tell accuracies apart that differ by about {half:.0f} points or more.")
    few = [family for family, e in found if e.n < 30]
    if few:
        notes.append(f"{len(few)} of {len(found)} families have fewer than 30 pairs: their intervals are wide.")
    return notes
