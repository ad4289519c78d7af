"""What a person looks at: report.html of an evaluation and curves.png of a training run."""

import json
import math
from pathlib import Path

from rlhf_recipes.drawing import COLOURS, INK, MARKERS, PARENT_COLOUR, clip, dot, figure, legend, name_rows, write
from rlhf_recipes.evaluation import checkpoints
from rlhf_recipes.evaluation.definitions import METRICS
from rlhf_recipes.evaluation.table import BASELINES
from rlhf_recipes.stats import Estimate, format_estimate

SHOWN_ANSWERS = 200

# what an estimate is compared with to call it better or worse, where that is no difference to the parent
DRAWS = {"win_rate": 0.5, "win_rate_length_controlled": 0.5, "win_rate_worst_case": 0.5, "perplexity_ratio": 1.0}
SYMBOLS = {"ship": "✓", "hold": "–", "worse": "✗"}
# verdict and standing of the main metric -> the headline
SAYS = {
    ("ship", "above"): "Ship {name}: better than {parent}, and within every limit.",
    ("hold", "above"): "Hold {name}: better than {parent}, but perhaps beyond a limit.",
    ("hold", "level"): "Hold {name}: not shown to be better than {parent}.",
    ("worse", "above"): "Do not ship {name}: it beats {parent}, but breaks a limit.",
    ("worse", "level"): "Do not ship {name}: no better than {parent}, and it breaks a limit.",
    ("worse", "below"): "Do not ship {name}: worse than {parent}.",
}


def write_page(evaluation: dict, path: str | Path) -> None:
    """Write the evaluation (of `summary.summarise`) as one self-contained HTML file."""
    found = evaluation.get("checkpoints")
    write(
        Path(__file__).with_name("page.html.jinja"),
        path,
        **{key: value for key, value in evaluation.items() if key not in ("checkpoints", "baseline_answers")},
        baseline_answers=evaluation.get("baseline_answers"),
        checkpoints=found,
        checkpoint_rows=_checkpoint_rows(found, evaluation["systems"]) if found else [],
        task_rows=_task_rows(evaluation["systems"]),
        against_rows=_against_rows(evaluation.get("baseline_answers")),
        family_models=_family_models(evaluation["reward_models"]),
        family_rows=_family_rows(_family_models(evaluation["reward_models"])),
        headline=_headline(evaluation),
        symbols=SYMBOLS,
        rows=_rows(evaluation),
        baseline_rows=_baseline_rows(evaluation),
        figures=_figures(evaluation),
        shown=_worst_first(evaluation["answers"])[:SHOWN_ANSWERS],
        definitions=[
            (title, text)
            for key, (title, _, _, text) in METRICS.items()
            if any(key in system["metrics"] for system in evaluation["systems"].values())
        ],
        settings_rows=[(key, _plain(value)) for key, value in evaluation["settings"].items()],
    )


def _headline(evaluation: dict) -> str:
    name = evaluation["recommended"]
    if name is None:
        return f"{evaluation['parent']}, measured"
    found = evaluation["systems"][name]["verdict"]
    return SAYS[found["verdict"], found["standing"]].format(name=name, parent=evaluation["parent"])


def _rows(evaluation: dict) -> list[dict]:
    """One row per metric that any system has: title, direction, and a cell for each system."""
    systems = evaluation["systems"]
    rows = []
    for key, (title, unit, better, _) in METRICS.items():
        cells = [_value_cell(key, unit, better, system) for system in systems.values()]
        if any(cell["value"] != "–" for cell in cells):
            rows.append({"title": title, "unit": unit, "better": better, "cells": cells})
    return rows


def _value_cell(key: str, unit: str, better: str | None, system: dict) -> dict:
    e = system["metrics"].get(key)
    if e is None or e.value is None:
        return {"value": "–", "interval": "", "n": 0, "mark": None}
    shown = format_estimate(e, percent=unit == "%", digits=1 if unit in ("%", "nats", "tokens") else 2)
    value, interval = _split(shown)
    return {
        "value": value.removesuffix(" %"),
        "interval": interval,
        "n": e.n,
        "mark": _mark(key, better, system),
    }


def _mark(key: str, better: str | None, system: dict) -> str | None:
    """better or worse where the interval of the difference to the parent excludes a draw."""
    e = system["metrics"][key] if key in DRAWS else system["differences"].get(key)
    if better is None or e is None or e.low is None:
        return None
    draw = DRAWS.get(key, 0.0)
    if e.low <= draw <= e.high:
        return None
    return "better" if (e.low > draw) == (better == "higher") else "worse"


def _baseline_rows(evaluation: dict) -> list[tuple[str, str, int]]:
    """What preference accuracy is held against: reward models and trivial rules, (title, estimate, n)."""
    named = {f"Reward model {name}": model["accuracy"] for name, model in evaluation["reward_models"].items()}
    named |= {BASELINES[key].capitalize(): e for key, e in evaluation["baselines"].items()}
    return [(title, format_estimate(e, percent=True), e.n) for title, e in named.items()]


def _against_rows(found: dict | None) -> list[dict]:
    """A row for each system against fixed answers: its win rates and what asking twice moved."""
    rows = []
    for name, own in found["systems"].items() if found else ():
        rates = [format_estimate(own[key], percent=True) for key in ("win_rate", "win_rate_length_controlled")]
        again = own["asked_again"]
        moved = f"{100 * again['moved']:+.1f} points, n {again['n']}" if again else "–"
        rows.append({"name": name, "cells": [*map(_split, rates), (moved, "")]})
    return rows


def _task_rows(systems: dict) -> list[dict]:
    """A row for each task: its metric, n, and for each system accuracy, change and a mark where that is no chance."""
    tasks = next(iter(systems.values()))["tasks"]
    return [
        {
            "title": name,
            "metric": task["metric"],
            "n": task["accuracy"].n,
            "cells": [_task_cell(system["tasks"][name]) for system in systems.values()],
        }
        for name, task in tasks.items()
    ]


def _task_cell(task: dict) -> dict:
    gain = task["difference"]
    change = format_estimate(gain, percent=True, sign=True).replace(" %", " points") if gain else ""
    mark = None
    if gain and gain.low is not None and not gain.low <= 0 <= gain.high:
        mark = "better" if gain.low > 0 else "worse"
    value, interval = _split(format_estimate(task["accuracy"], percent=True))
    return {"value": value, "interval": interval, "change": change.replace("-", "−"), "mark": mark}


def _split(shown: str) -> tuple[str, str]:
    """Value and interval of a formatted estimate."""
    value, _, interval = shown.partition(" [")
    return value.replace("-", "−"), f"[{interval}".replace("-", "−") if interval else ""


def _family_models(models: dict) -> dict:
    return {name: model for name, model in models.items() if model["families"]}


def _family_rows(models: dict) -> list[dict]:
    """A row for each family of the pairs, that on which the reward models are worst first: n, the accuracy of each,
    and of the shorter reply."""
    families: dict[str, list] = {}
    for model in models.values():
        for family, e in model["families"].items():
            families.setdefault(family, []).append(e.value)
    first = next(iter(models.values()), None)
    order = sorted(families, key=lambda family: sum(families[family]) / len(families[family]))
    return [
        {
            "title": family,
            "n": max(model["families"][family].n for model in models.values() if family in model["families"]),
            "cells": [
                _split(format_estimate(model["families"].get(family), percent=True))
                for model in [*models.values(), {"families": first["shorter_wins_by_family"]}]
            ],
        }
        for family in order
    ]


def _checkpoint_rows(found: dict, systems: dict) -> list[dict]:
    """A row for each step, in order."""
    rows = []
    for row in found["rows"]:
        system = systems[row["system"]]
        note = "keep" if row["system"] == found["keep"] else "equal" if row["system"] in found["equal"] else ""
        shown = [
            format_estimate(row["kl"], digits=1),
            format_estimate(row["gold"], digits=2, sign=True),
            format_estimate(row["proxy"], digits=2, sign=True),
            format_estimate(system["metrics"].get("win_rate"), percent=True),
            system["verdict"]["verdict"] if "verdict" in system else "parent",
        ]
        rows.append({"step": row["step"], "note": note, "cells": [cell.replace("-", "−") for cell in shown]})
    return rows


def _worst_first(answers: list[dict]) -> list[dict]:
    """Answers by the largest loss in reward of any system, then by what became odd."""

    def badness(row):
        systems = row["systems"].values()
        return min((s["change"] or 0 for s in systems), default=0), -sum(len(s["flags"]) for s in systems)

    return sorted(answers, key=badness)


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figures(evaluation: dict) -> list[dict]:
    """Captions, alternative texts and SVG of every plot that the measurements allow."""
    plots = (_accuracy_plot, _checkpoint_plot, _frontier_plot, _length_plot, _family_plot, _reward_model_plot)
    drawn = [draw(evaluation) for draw in plots]
    return [figure for figure in drawn if figure]


def _styles(evaluation: dict) -> dict[str, tuple[str, str]]:
    """Colour and marker of each system."""
    tuned = [name for name in evaluation["systems"] if name != evaluation["parent"]]
    styles = {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(tuned)}
    return {evaluation["parent"]: (PARENT_COLOUR, "o")} | styles


def _accuracy_plot(evaluation: dict) -> dict | None:
    styles = _styles(evaluation)
    rows = [(name, s["preference_accuracy"], *styles[name]) for name, s in evaluation["systems"].items()]
    models = evaluation["reward_models"].items()
    title = "reward model" if len(models) == 1 else "RM"
    rows += [(f"{title} {name}", model["accuracy"], INK, "*") for name, model in models]
    rows += [(BASELINES[key], e, PARENT_COLOUR, "|") for key, e in evaluation["baselines"].items() if key != "coin"]
    rows = [row for row in rows if row[1].value is not None]
    if not rows:
        return None

    def draw(axes):
        for y, (_, e, colour, marker) in enumerate(rows):
            dot(axes, e, y, colour, marker)
        name_rows(axes, [clip(row[0]) for row in rows])
        axes.axvline(50, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("held-out pairs ranked correctly, %")

    said = ", ".join(f"{name} {format_estimate(e, percent=True)}" for name, e, *_ in rows)
    caption = "Preference accuracy (dotted line: a coin)"
    return figure(caption, f"Preference accuracy. {said}.", draw, 0.9 + 0.34 * len(rows))


def _frontier_plot(evaluation: dict) -> dict | None:
    """Gain against the distance paid for it; sqrt(KL) is the scale of Gao et al. 2022 (arXiv:2210.10760)."""
    styles, systems = _styles(evaluation), evaluation["systems"]
    key = "win_rate" if any("win_rate" in s["metrics"] for s in systems.values()) else "preference_accuracy"
    points = []
    for name, system in systems.items():
        y, kl = system["metrics"].get(key, system.get(key)), system["metrics"]["kl_k1"].value
        if name == evaluation["parent"] and key == "win_rate":
            y = Estimate(0.5, None, None, 0)
        if kl is not None and y is not None and y.value is not None:
            points.append((name, math.sqrt(max(kl, 0.0)), y))
    if len(points) < 2:
        return None
    title = "Win rate against the parent" if key == "win_rate" else "Preference accuracy"

    def draw(axes):
        for name, x, y in points:
            colour, marker = styles[name]
            low, high = (y.value if bound is None else bound for bound in (y.low, y.high))
            axes.plot([x, x], [100 * low, 100 * high], color=colour, linewidth=1.6)
            axes.plot(x, 100 * y.value, marker, color=colour, markersize=7, label=clip(name))
        axes.axhline(50, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(left=-0.04 * (axes.get_xlim()[1] or 1))
        axes.set_xlabel("√KL to the parent, √nats per answer")
        axes.set_ylabel(f"{title.lower()}, %")
        legend(axes)

    said = ", ".join(f"{n}: {format_estimate(y, percent=True)} at √KL {x:.1f}" for n, x, y in points)
    return figure(f"{title} by how far the model moved", f"{title} by square root of KL. {said}.", draw, 3.0)


def _length_plot(evaluation: dict) -> dict | None:
    styles = _styles(evaluation)
    lengths = {
        name: [row["systems"][name]["tokens"] for row in evaluation["answers"] if name in row["systems"]]
        for name in evaluation["systems"]
    }
    # An endpoint may not say how long an answer was.
    lengths = {name: counted for name, own in lengths.items() if (counted := [n for n in own if n is not None])}
    if not lengths:
        return None

    def draw(axes):
        boxes = axes.boxplot(
            list(lengths.values()), positions=range(len(lengths)), orientation="horizontal", widths=0.5,
            patch_artist=True, flierprops={"marker": ".", "markersize": 3, "markeredgecolor": INK},
        )  # fmt: skip
        for part in ("whiskers", "caps", "medians"):
            for line in boxes[part]:
                line.set_color(INK)
        for box, name in zip(boxes["boxes"], lengths, strict=True):
            box.set(facecolor=styles[name][0], edgecolor=INK, alpha=0.75)
        name_rows(axes, [clip(name) for name in lengths])
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens per answer")

    said = ", ".join(f"{name} median {sorted(v)[len(v) // 2]} tokens" for name, v in lengths.items())
    return figure(
        "Length of the answers (box: middle half, line: median)",
        f"Answer length. {said}.",
        draw,
        0.9 + 0.42 * len(lengths),
    )


def _checkpoint_plot(evaluation: dict) -> dict | None:
    return checkpoints.plot(evaluation["checkpoints"]) if "checkpoints" in evaluation else None


def _reward_model_plot(evaluation: dict) -> dict | None:
    """Accuracy of each reward model on each family of the pairs."""
    models = _family_models(evaluation["reward_models"])
    rows = [row["title"] for row in _family_rows(models)]
    if len(rows) < 2:
        return None
    shown = models if len(models) <= 6 else dict([list(models.items())[-1]])  # many members: their ensemble alone
    styles = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(shown)}
    return _by_family("Reward models by family, the worst first", shown, styles, {f: clip(f, 30) for f in rows})


def _family_plot(evaluation: dict) -> dict | None:
    styles, systems = _styles(evaluation), evaluation["systems"]
    families = list(dict.fromkeys(f for system in systems.values() for f in system["families"]))
    if not families:
        return None
    counts = {f: max(s["families"][f].n for s in systems.values() if f in s["families"]) for f in families}
    rows = {f: f"{clip(f, 26)} ({counts[f]})" for f in families}
    return _by_family("Preference accuracy by family (pairs in brackets)", systems, styles, rows)


def _by_family(caption: str, shown: dict, styles: dict, rows: dict[str, str]) -> dict:
    """A row for each family (name -> label), in it the accuracy of all that is shown (name -> `families`)."""
    shifts = [0.7 * (i + 0.5) / len(shown) - 0.35 for i in range(len(shown))]

    def draw(axes):
        for (name, each), shift in zip(shown.items(), shifts, strict=True):
            colour, marker = styles[name]
            for y, family in enumerate(rows):
                if family in each["families"]:
                    dot(axes, each["families"][family], y + shift, colour, marker, size=5)
            axes.plot([], [], marker, color=colour, label=clip(name))
        name_rows(axes, list(rows.values()))
        axes.axvline(50, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("held-out pairs ranked correctly, %")
        legend(axes)

    said = "; ".join(
        f"{f}: " + ", ".join(f"{n} {format_estimate(s['families'].get(f), percent=True)}" for n, s in shown.items())
        for f in rows
    )
    return figure(caption, f"{caption}. {said}.", draw, 1.2 + (0.15 + 0.1 * len(shown)) * len(rows))
