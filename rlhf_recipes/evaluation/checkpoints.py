"""Checkpoints of one run against each other: gain against the distance paid for it, and the one to keep.

Gao et al. 2022 (arXiv:2210.10760): as KL grows, the reward that a policy is trained on, the proxy, keeps rising, while
what it stands for, the gold reward, rises, turns and falls. The gold here is the reward model of the evaluation; where
it is one that the run was trained on, no turn can be seen.
"""

import math
from dataclasses import replace
from typing import Any

from rlhf_recipes import stats
from rlhf_recipes.drawing import COLOURS, INK, MARKERS, figure, legend
from rlhf_recipes.evaluation import summary
from rlhf_recipes.evaluation.measurements import Measurements
from rlhf_recipes.stats import Estimate


def compare(measurements: Measurements, evaluation: dict) -> dict[str, Any]:
    """What the checkpoints say of each other.

    Args:
        evaluation: of `summary.summarise`.

    Returns:
        `rows`, parent first, in the order of steps: `system`, `step`, `kl` and the paired gains over the parent in
        `gold` and `proxy` reward, in standard deviations of the parent's rewards (None where not measured). `keep`,
        the system with the highest mean reward, `equal`, those not told apart from it (`stats.ahead`), `same`, whether
        the gold is or contains a reward model that the run was trained on, and `says`, all of it in sentences.
    """
    systems, parent = evaluation["systems"], evaluation["parent"]
    steps = {name: s["info"]["step"] for name, s in systems.items() if s["info"].get("step") is not None}
    order = [parent, *sorted(steps, key=steps.get)]
    rows = [
        {
            "system": name,
            "step": steps.get(name, 0),
            "kl": systems[name]["metrics"]["kl_k1"],
            "gold": _gain(measurements, systems, "reward", name, parent),
            "proxy": _gain(measurements, systems, "proxy", name, parent),
        }
        for name in order
    ]
    same = any(systems[name]["optimised"] for name in steps)
    found = {"rows": rows, "keep": None, "equal": [], "same": same, "parent": parent}
    tried = [row for row in rows if row["gold"]]
    if not tried:
        found["says"] = ["No checkpoint is named to keep: no reward model scored the answers. Give reward_model."]
        return found
    keep = max(tried, key=lambda row: row["gold"].value)
    for row in tried:
        if row is keep:
            continue
        gap = summary.compare(measurements, "reward", keep["system"], row["system"])
        if not stats.ahead(gap, len(tried) - 1):
            found["equal"].append(row["system"])
    found["keep"] = keep["system"]
    return found | {"says": _says(found, keep, tried[-1], measurements)}


def plot(found: dict) -> dict | None:
    """Gain in reward against sqrt(KL), a line through the steps for the gold and one for the proxy."""
    series = []
    for i, (key, name) in enumerate((("gold", "this reward model" if found["same"] else "gold"), ("proxy", "proxy"))):
        points = (
            []
            if key == "proxy" and found["same"]
            else [
                (math.sqrt(max(row["kl"].value, 0.0)), row[key], row["step"])
                for row in found["rows"]
                if row[key] and row["kl"].value is not None
            ]
        )
        if len(points) > 1:
            series.append((name, points, COLOURS[i], MARKERS[i]))
    if not series:
        return None

    def draw(axes):
        for name, points, colour, marker in series:
            for x, e, step in points:
                if e.low is not None:
                    axes.plot([x, x], [e.low, e.high], color=colour, linewidth=1.2, alpha=0.6)
                if name == series[0][0]:
                    axes.annotate(str(step), (x, e.value), (4, 4), textcoords="offset points", fontsize=7.5)
            xs, ys = [x for x, _, _ in points], [e.value for _, e, _ in points]
            axes.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=1.4, label=name)
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("√KL to the parent, √nats per answer (numbers: steps)")
        axes.set_ylabel("gain in reward, standard deviations")
        legend(axes)

    caption = "Gain by how far the run had moved, in the order of its steps"
    said = "; ".join(
        f"{name}: "
        + ", ".join(f"step {step} {stats.format_estimate(e, digits=2)} at √KL {x:.1f}" for x, e, step in points)
        for name, points, _, _ in series
    )
    return figure(caption, f"{caption}. {said}.", draw, 3.2)


def _gain(measurements: Measurements, systems: dict, metric: str, name: str, parent: str) -> Estimate | None:
    """Paired gain over the parent in standard deviations of the parent's own values."""
    if metric not in systems[name]["metrics"] or not systems[name]["metrics"][metric].n:
        return None
    if name == parent:
        return replace(systems[parent]["metrics"][metric], value=0.0, low=0.0, high=0.0)
    sd = summary.deviation(measurements, metric, parent) or 1.0
    return summary.compare(measurements, metric, name, parent).mapped(lambda gain: gain / sd)


def _says(found: dict, keep: dict, last: dict, measurements: Measurements) -> list[str]:
    equal = f"; not told apart from it: {', '.join(found['equal'])}" if found["equal"] else ""
    kept = f"{found['parent']} itself" if keep["system"] == found["parent"] else keep["system"]
    says = [f"The checkpoint to keep is {kept}, which has the highest mean reward{equal}."]
    if keep["system"] == found["parent"]:
        says = [f"No checkpoint has a higher mean reward than {kept}{equal}."]
    if found["same"]:
        says.append(
            "The reward model is, or contains, what the run was trained on, the proxy: nothing here can show "
            "over-optimisation. Give a reward model of other data or another seed."
        )
    if last is not keep and not found["same"]:
        fall = summary.compare(measurements, "reward", last["system"], keep["system"])
        rise = last["proxy"] and summary.compare(measurements, "proxy", last["system"], keep["system"])
        shown = stats.format_estimate(fall, digits=2, sign=True)
        sure = fall.high is not None and fall.high < 0
        climbs = f", while the proxy changes by {stats.format_estimate(rise, digits=2, sign=True)}" if rise else ""
        ending = "over-optimised" if sure and rise and (rise.low or 0) > 0 else "past its best" if sure else None
        says.append(
            f"From there to {last['system']} the reward changes by {shown}{climbs}"
            + (f": the run is {ending}." if ending else "; that may be chance.")
        )
    return says
