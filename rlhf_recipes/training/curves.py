"""curves.png: what a trainer logged, a panel for each kind of figure."""

import math
from pathlib import Path

from rlhf_recipes.drawing import COLOURS, TITLE, clip

# title, unit of the y axis, series of TRL's log history
PANELS = (
    ("Reward of the rollouts", "mean", ("reward",)),
    ("KL to the reference", "nats per completion", ("kl", "kl_k3")),
    ("Loss", "loss of the method", ("loss", "nll_loss")),
    ("Preference accuracy", "share of pairs", ("rewards/accuracies", "accuracy")),
    ("Reward margin", "chosen − rejected", ("rewards/margins", "margin")),
    ("Rewards", "reward", ("rewards/chosen", "rewards/rejected", "max_reward", "mean_reward", "min_reward")),
    ("Log-probability", "nats", ("logps/chosen", "logps/rejected")),
    ("Token accuracy", "share of tokens", ("mean_token_accuracy",)),
    ("Completion length", "tokens", ("completions/mean_length",)),
    ("Clipped", "share of tokens", ("clip_fraction/policy", "clip_fraction/value")),
    ("Explained variance", "of the returns", ("explained_variance",)),
    ("Entropy", "nats per token", ("entropy",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Learning rate", "per step", ("learning_rate",)),
)


def plot_curves(history: list[dict], path: str | Path, title: str) -> None:
    """Write the curves of a training run: a panel for each family of metrics that its log has.

    Args:
        history: TRL's `log_history`, rows with `step` and metrics; `eval_` marks the held-out ones.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [(*panel, found) for panel in PANELS if (found := _series(history, panel[2]))]
    columns = 2 if len(panels) <= 4 else 3
    rows = max(1, math.ceil(len(panels) / columns))
    with rc_context({"font.size": 9, "axes.titlesize": 10, "text.parse_math": False}):
        figure = Figure(figsize=(9, 0.5 + 2.3 * rows), dpi=100, layout="constrained")
        figure.suptitle(clip(title, TITLE), fontsize=11)
        if not panels:
            figure.text(0.5, 0.4, "No steps were logged.", ha="center")
        for index, (heading, unit, _, found) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            for i, (label, held_out, points) in enumerate(found):
                _curve(axes, label, held_out, points, _colour_of(label, i))
            axes.set_title(heading, loc="left")
            axes.set_ylabel(unit)
            axes.set_xlabel("optimizer step")
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if len(found) > 1:
                axes.legend(fontsize=7.5, frameon=False)
        figure.savefig(path, format="png")


def _series(history: list[dict], names: tuple[str, ...]) -> list[tuple[str, bool, list]]:
    """(label, held out, [(step, value)]) of the named metrics that were logged."""
    found = []
    for prefix in ("", "eval_"):
        for name in names:
            points = [(row["step"], row[prefix + name]) for row in history if _logged(row, prefix + name)]
            label = name.rsplit("/", 1)[-1].replace("_", " ")
            if points:
                found.append((f"{label}, held out" if prefix else label, bool(prefix), points))
    return found


def _logged(row: dict, key: str) -> bool:
    return "step" in row and isinstance(row.get(key), int | float) and math.isfinite(row[key])


def _curve(axes, label: str, held_out: bool, points: list, colour: str) -> None:
    few = held_out or len(points) <= 25
    axes.plot(
        *zip(*points, strict=True), label=label, color=colour, linewidth=1.4, markersize=4,
        linestyle="--" if held_out else "-", marker=("s" if held_out else "o") if few else None,
    )  # fmt: skip


def _colour_of(label: str, index: int) -> str:
    """Chosen and rejected keep their colours across panels."""
    if "chosen" in label or "rejected" in label:
        return COLOURS[1 if "rejected" in label else 0]
    return COLOURS[index % len(COLOURS)]
