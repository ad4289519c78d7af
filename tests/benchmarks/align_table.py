"""What the cells of does_it_align.py say together: a table, a picture, and the alarms beside gold."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rlhf_recipes import stats
from rlhf_recipes.evaluation import verdict
from rlhf_recipes.stats import Estimate, format_estimate

EQUAL_KL = (0.5, 1.0)  # nats an answer, at which methods are compared
COLUMNS = (
    "world", "method", "runs", "gold gained", "KL", *(f"gold gained at KL {kl:g}" for kl in EQUAL_KL),
    "proxy gained", "regret: the last", "by the proxy", "by evaluate", "by the doctor", "by the audit",
)  # fmt: skip
# Methods that are bad on purpose, for the alarms alone; labellers who are, and who stands beside them.
APART = ("_overdone", "_flipped", "_left", "_good")
# Rounds against one run with as many labels; labellers who go bad in round two against good ones.
COMPARED = (
    ("rounds_of_dpo", "dpo"),
    ("rounds_of_dpo_flipped", "rounds_of_dpo_good"),
    ("rounds_of_dpo_left", "rounds_of_dpo_good"),
)
FAR = 10.0  # nats an answer
OF_SIZE = ("too_little_data",)  # what the doctor says of the number of held-out rows is no alarm


def load(folder: Path) -> dict[tuple[str, str, int], dict]:
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-*-*.json"))]
    return {(cell["world"], cell["method"], cell["seed"]): cell for cell in cells}


def show(folder: Path, table: bool, plot: Path | None, alarms: bool) -> None:
    cells = load(folder)
    if table:
        print_rows(COLUMNS, rows(cells))
        head = ("world", "gold of", "over", "runs", "at the end", *(f"at KL {kl:g}" for kl in EQUAL_KL))
        print_rows(head, [row for pair in COMPARED for row in one_over_another(cells, *pair)])
    if alarms:
        heard = courses(cells)
        print_rows(("world", "method", "seed", "gold", *heard[0].alarms), each_run(heard))
        head = ("before gold fell", "by then", "ever", "where it gained", "where it did neither")
        print_rows(("alarm", *head), shares(heard))
        print_rows(("rule of the doctor", *head), rules(heard))
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
    """A row for each world and method; a star where the gold gained is beyond its interval after correction for the
    number of methods in that world (Bonferroni)."""
    found, listed = [], dict.fromkeys((w, m) for w, m, _ in cells if m != "anchor" and not m.endswith(APART))
    for world, method in listed:
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
        gain = gained([(run[0]["gold"], run[-1]["gold"]) for run in runs])
        among_all = stats.simultaneous(gain, sum(w == world for w, _ in listed))
        beyond = among_all.low is not None and not among_all.low <= 0 <= among_all.high
        found.append(
            (world, method, len(runs), shown(gain) + " *" * beyond,
             f"{mean([mean(run[-1]['kl']) for run in runs]):.1f}", *equal,
             shown(gained([(run[0]["proxy"], run[-1]["proxy"]) for run in runs])),
             *(over(regrets, key) for key in ("last", "proxy", "evaluate", "doctor", "audit")))
        )  # fmt: skip
    return found


def one_over_another(cells: dict, method: str, other: str) -> list[tuple]:
    """A row for each world: gold of a method over another one's, of the seeds that have both."""
    found = []
    for world in dict.fromkeys(world for world, _, _ in cells):
        both = [
            [course(cells, cells[world, each, seed]) for each in (other, method)]
            for w, m, seed in cells
            if (w, m) == (world, method) and (world, other, seed) in cells
        ]
        if both:
            equal = [[(at_kl(less, kl), at_kl(more, kl)) for less, more in both] for kl in EQUAL_KL]
            there = [[pair for pair in pairs if None not in pair] for pairs in equal]
            at_end = shown(gained([(less[-1]["gold"], more[-1]["gold"]) for less, more in both]))
            at_equal = (f"{shown(gained(pairs))} ({len(pairs)})" if pairs else "-" for pairs in there)
            found.append((world, method, other, len(both), at_end, *at_equal))
    return found


def regret(cells: dict, cell: dict) -> dict[str, float | None]:
    """Gold that the choice of each loses against the run's best point, the anchor among them."""
    points = course(cells, cell)
    golds = [mean(point["gold"]) for point in points]
    others = [mean(point["other"]) for point in points] if "other" in points[-1] else None
    rang = alarms(points, cell["accuracies"])
    chosen = {
        "last": len(points) - 1,
        "proxy": highest([mean(point["proxy"]) for point in points]),
        "evaluate": others and highest(others),
        "doctor": last_before(rang["doctor, broken"]),
        "audit": last_before(rang["audit"]),
    }
    return {key: None if at is None else max(golds) - golds[at] for key, at in chosen.items()}


def last_before(rang: list[bool]) -> int:
    """The point before the first alarm, the anchor at least; the last where there is none."""
    return max(rang.index(True) - 1, 0) if any(rang) else len(rang) - 1


def highest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def over(regrets: list[dict], key: str) -> str:
    values = [each[key] for each in regrets if each[key] is not None]
    return f"{mean(values):.2f}" if values else "-"


# ---- Alarms


def alarms(points: list[dict], accuracies: list[dict]) -> dict[str, list[bool]]:
    """Whether each rings at each point of a run, the anchor's first.

    Doctor: a finding of the log so far, of level broken or any. Audit: its first gate, that the reward models are not
    shown to beat a coin on held-out pairs; of one model its own accuracy. Evaluate: its verdict of the point against
    the anchor by a reward model that the run has not seen, worse or no `ship`; perplexity is not measured. Beside them
    what needs no tool: a KL over FAR nats an answer; the proxy below an earlier point by more than its interval. Best
    of n, which keeps its policy, has those of doctor and audit.
    """
    found = [[each for each in point.get("doctor", []) if each["rule"] not in OF_SIZE] for point in points]
    rang = {
        "doctor, broken": [any(each["level"] == "broken" for each in several) for several in found],
        "doctor, anything": [bool(several) for several in found],
        "audit": [not all((each["low"] or 0.0) > 0.5 for each in accuracies)] * len(points),
    }
    if "other" not in points[-1]:
        return rang
    verdicts = ["ship", *(judged(point, points[0]) for point in points[1:])]
    return rang | {
        "evaluate, worse": [each == "worse" for each in verdicts],
        "evaluate, no ship": [each != "ship" for each in verdicts],
        f"KL over {FAR:g}": [mean(point["kl"]) > FAR for point in points],
        "proxy falls": [False, *falls(points, "proxy")],
    }


def judged(point: dict, anchor: dict) -> str:
    """Evaluate's verdict by what was measured here."""
    wins = [0.5 if a == b else float(a > b) for a, b in zip(point["other"], anchor["other"], strict=True)]
    ids = list(map(str, range(len(wins))))
    metrics = {
        "win_rate": stats.estimate(wins, ids),
        "kl_k1": stats.mean(point["kl"], ids),
        "length_ratio": stats.ratio_of_sums(point["tokens"], anchor["tokens"], ids),
    }
    differences = {key: stats.difference(point[key], anchor[key], ids) for key in ("repetition", "eos_rate")}
    system = {"metrics": metrics, "differences": differences, "nonfinite": 0}
    return verdict.decide(system, "the anchor", verdict.THRESHOLDS)["verdict"]


def falls(points: list[dict], key: str) -> list[bool]:
    """Of each point but the first whether it lies below the best before it by more than the interval."""
    means = [mean(point[key]) for point in points]
    bests = [points[highest(means[:k])][key] for k in range(1, len(points))]
    return [(gained([(best, point[key])]).high or 0.0) < 0 for best, point in zip(bests, points[1:], strict=True)]


@dataclass
class Course:
    """What gold did in a run, and the alarms.

    Attributes:
        fell: the point at which it first lay below an earlier one (the anchor among them) by more than the interval.
        gained: whether it ended above the anchor by as much.
        alarms: by name, whether it rings at each point.
        rules: of the doctor, those that said something at each point.
    """

    world: str
    method: str
    seed: int
    fell: int | None
    gained: bool
    alarms: dict[str, list[bool]]
    rules: list[set[str]]

    @property
    def says(self) -> str:
        return "neither" if self.fell is None and not self.gained else "gained" if self.fell is None else "fell"


def courses(cells: dict) -> list[Course]:
    found = []
    for (world, method, seed), cell in cells.items():
        if method in ("anchor", "best_of_n") or (world, "anchor", seed) not in cells:
            continue
        points = course(cells, cell)
        fallen = [False, *falls(points, "gold")]
        gain = (gained([(points[0]["gold"], points[-1]["gold"])]).low or 0.0) > 0
        rules = [{each["rule"] for each in point.get("doctor", [])} for point in points]
        fell = fallen.index(True) if any(fallen) else None
        found.append(Course(world, method, seed, fell, gain, alarms(points, cell["accuracies"]), rules))
    return found


def each_run(several: list[Course]) -> list[tuple]:
    """What gold did in each run, and the number of the checkpoint at which each alarm first rang."""
    return [
        (one.world, one.method, one.seed, one.says + (f" at {one.fell}" if one.fell else ""),
         *(rang.index(True) if any(rang) else "no" for rang in one.alarms.values()))
        for one in several
    ]  # fmt: skip


def shares(several: list[Course]) -> list[tuple]:
    """How often each alarm rang, in the columns of `when`."""
    names = list(several[0].alarms) if several else []
    return [(name, *map(share, when(several, lambda one, name=name: one.alarms[name]))) for name in names]


def rules(several: list[Course]) -> list[tuple]:
    """The same of each rule of the doctor that said anything."""
    names = sorted({name for one in several for point in one.rules for name in point})
    told = {name: when(several, lambda one, name=name: [name in point for point in one.rules]) for name in names}
    return [(name.replace("_", " "), *(f"{sum(rang)} of {len(rang)}" for rang in told[name])) for name in names]


def when(several: list[Course], rang: Callable[[Course], list[bool]]) -> list[list[bool]]:
    """Of the runs where gold fell whether it had rung before, by then, and ever; of those where gold gained, and where
    it did neither, whether it rang at all."""
    fell, gained, neither = ([one for one in several if one.says == says] for says in ("fell", "gained", "neither"))
    before, by_then = ([any(rang(one)[: one.fell + more]) for one in fell] for more in (0, 1))
    return [before, by_then, *([any(rang(one)) for one in runs] for runs in (fell, gained, neither))]


def share(rang: list[bool]) -> str:
    said = format_estimate(stats.estimate(list(map(float, rang))), percent=True) if rang else "-"
    return f"{said} of {len(rang)}"


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
    methods = list(dict.fromkeys(m for _, m, _ in cells if m != "anchor" and not m.endswith(APART)))
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
