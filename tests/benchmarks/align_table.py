"""What the cells of does_it_align.py say together: a table, a picture, and the alarms beside gold."""

import json
import math
from itertools import pairwise
from pathlib import Path

from rlhf_recipes import stats
from rlhf_recipes.stats import Estimate, format_estimate

EQUAL_KL = (0.5, 1.0)  # nats an answer, at which methods are compared
COLUMNS = (
    "world", "method", "runs", "gold gained", "KL", *(f"gold gained at KL {kl:g}" for kl in EQUAL_KL),
    "proxy gained", "regret: the last", "by the proxy", "by evaluate", "by the doctor", "by the audit",
)  # fmt: skip
OF_SIZE = ("too_little_data",)  # what the doctor says of the number of held-out rows is no alarm


def load(folder: Path) -> dict[tuple[str, str, int], dict]:
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-*-*.json"))]
    return {(cell["world"], cell["method"], cell["seed"]): cell for cell in cells}


def show(folder: Path, table: bool, plot: Path | None, alarms: bool) -> None:
    cells = load(folder)
    if table:
        print_rows(COLUMNS, rows(cells))
    if alarms:
        heard = courses(cells)
        print_rows(("world", "method", "seed", "gold", "doctor", "audit", "evaluate"), heard)
        print_rows(("alarm", "where gold fell", "where gold gained", "where it did neither"), shares(heard))
    if plot:
        draw(cells, plot)


def print_rows(head: tuple, body: list[tuple]) -> None:
    print("| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", sep="\n")
    for row in body:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


# ---- Gold


def course(cells: dict, cell: dict) -> list[dict]:
    """The points of a run, the anchor's first."""
    own = cell["points"]
    return own if own[0]["step"] == 0 else [cells[cell["world"], "anchor", cell["seed"]]["points"][0], *own]


def gained(pairs: list[tuple[list[float], list[float]]]) -> Estimate:
    """Of (start, end) of several seeds, prompt by prompt; a prompt's seeds are one cluster."""
    starts = [value for start, _ in pairs for value in start]
    ends = [value for _, end in pairs for value in end]
    return stats.difference(ends, starts, [str(i) for start, _ in pairs for i in range(len(start))])


def at_kl(points: list[dict], kl: float, key: str = "gold") -> list[float] | None:
    """Each prompt's value where the mean KL first comes to `kl`, between two points in a straight line over the KL;
    None where it never does."""
    for before, after in pairwise(points):
        low, high = mean(before["kl"]), mean(after["kl"])
        if low <= kl <= high and high > low:
            share = (kl - low) / (high - low)
            return [(1 - share) * a + share * b for a, b in zip(before[key], after[key], strict=True)]
    return None


def rows(cells: dict) -> list[tuple]:
    found = []
    for world, method in dict.fromkeys((w, m) for w, m, _ in cells if m != "anchor"):
        several = [cell for (w, m, _), cell in cells.items() if (w, m) == (world, method)]
        several = [cell for cell in several if (world, "anchor", cell["seed"]) in cells]
        runs = [course(cells, cell) for cell in several]
        if not runs:
            continue
        equal = []
        for kl in EQUAL_KL:
            there = [(run[0]["gold"], at) for run in runs if (at := at_kl(run, kl))]
            of = "" if len(there) == len(runs) else f" ({len(there)} of {len(runs)} runs)"
            equal.append(f"{shown(gained(there))}{of}" if there else "does not get there")
        regrets = [regret(cells, cell) for cell in several]
        found.append(
            (world, method, len(runs), shown(gained([(run[0]["gold"], run[-1]["gold"]) for run in runs])),
             f"{mean([mean(run[-1]['kl']) for run in runs]):.1f}", *equal,
             shown(gained([(run[0]["proxy"], run[-1]["proxy"]) for run in runs])),
             *(over(regrets, key) for key in ("last", "proxy", "evaluate", "doctor", "audit")))
        )  # fmt: skip
    return found


def regret(cells: dict, cell: dict) -> dict[str, float | None]:
    """Gold that the choice of each loses against the run's best point, the anchor among them."""
    points = course(cells, cell)
    golds = [mean(point["gold"]) for point in points]
    alarm = alarms_of(cells, cell)
    others = [mean(point["other"]) for point in points] if "other" in points[-1] else None
    chosen = {
        "last": len(points) - 1,
        "proxy": highest([mean(point["proxy"]) for point in points]),
        "evaluate": others and highest(others),
        "doctor": 0 if alarm["doctor"] else len(points) - 1,
        "audit": 0 if alarm["audit"] else len(points) - 1,
    }
    return {key: None if at is None else max(golds) - golds[at] for key, at in chosen.items()}


def highest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def over(regrets: list[dict], key: str) -> str:
    values = [each[key] for each in regrets if each[key] is not None]
    return f"{mean(values):.2f}" if values else "-"


# ---- Alarms


def alarms_of(cells: dict, cell: dict) -> dict[str, bool | None]:
    """Doctor: a finding of level broken. Audit: its first gate, that the reward models are not shown to beat a coin on
    held-out pairs; of one model its own accuracy. Evaluate: its main rule, that a reward model the run has not seen
    does not prefer the end to the anchor beyond the interval (None where there is none)."""
    points = course(cells, cell)
    findings = [each for each in cell["doctor"]["findings"] if each["rule"] not in OF_SIZE]
    evaluated = None
    if "other" in points[-1]:
        wins = [0.5 if a == b else float(a > b) for a, b in zip(points[-1]["other"], points[0]["other"], strict=True)]
        evaluated = (stats.estimate(wins, list(map(str, range(len(wins))))).low or 0.0) <= 0.5
    return {
        "doctor": any(each["level"] == "broken" for each in findings),
        "audit": not all((each["low"] or 0.0) > 0.5 for each in cell["accuracies"]),
        "evaluate": evaluated,
    }


def courses(cells: dict) -> list[tuple]:
    """What gold did in each run, and which alarms rang: fell, from its best point (the anchor among them) by more than
    its interval; gained, over the anchor by as much; else neither."""
    found = []
    for (world, method, seed), cell in cells.items():
        if method in ("anchor", "best_of_n") or (world, "anchor", seed) not in cells:
            continue
        points = course(cells, cell)
        golds = [mean(point["gold"]) for point in points]
        best, last = points[highest(golds)], points[-1]
        fall, gain = (gained([(each["gold"], last["gold"])]) for each in (best, points[0]))
        what = "fell" if (fall.high or 0.0) < 0 else "gained" if (gain.low or 0.0) > 0 else "neither"
        rang = alarms_of(cells, cell)
        found.append((world, method, seed, what, *(word(rang[key]) for key in ("doctor", "audit", "evaluate"))))
    return found


def word(rang: bool | None) -> str:
    return {True: "alarm", False: "no", None: "-"}[rang]


def shares(heard: list[tuple]) -> list[tuple]:
    """Of the runs where gold fell, gained or did neither, how many each alarm rang in."""
    found = []
    for place, name in enumerate(("doctor", "audit", "evaluate"), 4):
        cells = []
        for what in ("fell", "gained", "neither"):
            rang = [float(row[place] == "alarm") for row in heard if row[3] == what and row[place] != "-"]
            said = format_estimate(stats.estimate(rang), percent=True) if rang else "-"
            cells.append(f"{said} of {len(rang)}")
        found.append((name, *cells))
    return found


# ---- Picture


def draw(cells: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    worlds = list(dict.fromkeys(world for world, _, _ in cells))
    figure = Figure(figsize=(11, 4.2 * len(worlds)), layout="constrained")
    grid = figure.subplots(len(worlds), 2, squeeze=False)
    colours = (
        "#2b7bba",
        "#c9731a",
        "#4c9a57",
        "#8456a8",
        "#b03a48",
        "#7d858c",
        "#1f9ea3",
        "#a88a2c",
        "#d16ba5",
        "#444",
        "#7a4b2b",
    )
    methods = list(dict.fromkeys(method for _, method, _ in cells if method != "anchor"))
    for line, world in zip(grid, worlds, strict=True):
        for axes, key in zip(line, ("gold", "proxy"), strict=True):
            for colour, method in zip(colours * 2, methods, strict=False):
                runs = [course(cells, c) for (w, m, s), c in cells.items()
                        if (w, m) == (world, method) and (w, "anchor", s) in cells]  # fmt: skip
                if not runs:
                    continue
                steps = list(zip(*runs, strict=False))
                x = [math.sqrt(max(0.0, mean([mean(point["kl"]) for point in step]))) for step in steps]
                y = [
                    gained([(run[0][key], point[key]) for run, point in zip(runs, step, strict=True)])
                    for step in steps
                ]
                axes.plot(x, [each.value for each in y], "o-", markersize=3.5, color=colour, label=method)
                axes.plot([x[-1]] * 2, [y[-1].low, y[-1].high], color=colour, linewidth=1, alpha=0.5)
            axes.axhline(0, color="#7d858c", linewidth=0.8, linestyle=":")
            axes.set_title(f"{world}: {key} gained", fontsize=10)
            axes.set_xlabel("√KL to the anchor, √nats an answer")
        line[0].legend(frameon=False, fontsize=7.5)
    figure.savefig(path, dpi=110)


def shown(estimate: Estimate) -> str:
    return format_estimate(estimate, digits=2, sign=True)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
