"""frontier.png: quality against the distance paid for it, sqrt(KL), as Gao et al. 2022 scale it (arXiv:2210.10760)."""

import math
from pathlib import Path

from rlhf_recipes.drawing import COLOURS, MARKERS, PARENT_COLOUR, clip
from rlhf_recipes.evaluation.definitions import METRICS
from rlhf_recipes.stats import Estimate

NAME = 60  # characters of a job's
FEW = 8  # jobs whose names and intervals have room
DRAWS = {"win_rate": 0.5, "accuracy_log_ratio": 0.5}


def plot(rows: list[dict], objective: str, best: str | None, path: Path) -> None:
    """A curve for each method, ordered by KL, intervals on both axes, and the hull of what no other job beats.

    Args:
        rows: of `sweep.rebuild`; those without a value, or whose KL is not finite, are left out.
        objective: key of METRICS on the vertical axis.
        best: the system that is ringed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    scale = 100 if METRICS[objective][1] == "%" else 1
    points = [
        (_root(row["metrics"]["kl_k1"]), [scale * x for x in _bounds(row["metrics"][objective])], row)
        for row in rows
        if row["value"] is not None and row["metrics"]["kl_k1"].value is not None
    ]
    points.sort(key=lambda point: point[0][1])
    with rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 5) if len(points) <= FEW else (10, 6.5), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        for i, method in enumerate(dict.fromkeys(row["recipe"] for _, _, row in points)):
            own = [point for point in points if point[2]["recipe"] == method]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axes.plot([x[1] for x, _, _ in own], [y[1] for _, y, _ in own], color=colour, linewidth=0.9, alpha=0.6)
            for x, y, row in own:
                faint = 0.7 if len(points) <= FEW else 0.25
                axes.plot([x[1]] * 2, [y[0], y[2]], color=colour, linewidth=1.2, alpha=faint)
                axes.plot([x[0], x[2]], [y[1]] * 2, color=colour, linewidth=1.2, alpha=faint)
                if row["system"] == best:
                    axes.plot(x[1], y[1], "o", markersize=15, markerfacecolor="none", markeredgecolor=colour)
            axes.plot([x[1] for x, _, _ in own], [y[1] for _, y, _ in own], marker, color=colour, label=clip(method))
        hull = pareto([(x[1], y[1]) for x, y, _ in points])
        axes.plot(*zip(*hull, strict=True), color=PARENT_COLOUR, linestyle="--", linewidth=1, label="Pareto hull")
        if objective in DRAWS:
            axes.axhline(scale * DRAWS[objective], color=PARENT_COLOUR, linestyle=":", linewidth=0.9)
        axes.set_xlim(left=0)
        axes.set_xlabel("√KL to the reference, √nats per answer (own samples at temperature 1)")
        axes.set_ylabel(METRICS[objective][0] + (", %" if scale == 100 else ""))
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        first = [point for point in points if point[2]["system"] == best or (point[0][1], point[1][1]) in hull]
        _name(figure, axes, [*first, *(point for point in points if point not in first)])
        figure.savefig(path)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in quality at the same KL or less, in order of KL."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


def _name(figure, axes, points: list) -> None:
    """Write the jobs' names beside their points, where no other name is yet; who finds no place has the table."""
    figure.draw_without_rendering()  # the layout decides how far apart points are
    taken: list = []
    for x, y, row in points:
        for right, up in ((5, 5), (5, -11), (-5, 5), (-5, -11)):
            side = "left" if right > 0 else "right"
            text = axes.annotate(
                clip(row["job"], NAME),
                (x[1], y[1]),
                (right, up),
                textcoords="offset points",
                ha=side,
                fontsize=7.5,
                annotation_clip=True,
            )
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _bounds(e: Estimate) -> list[float]:
    return [e.value if x is None else x for x in (e.low, e.value, e.high)]


def _root(e: Estimate) -> list[float]:
    return [math.sqrt(max(x, 0.0)) for x in _bounds(e)]
