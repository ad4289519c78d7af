"""doctor.png: what the doctor's rules look at, each quantity with the range in which a healthy run ends."""

import math
from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.drawing import COLOURS, INK, PARENT_COLOUR, TITLE, clip
from rlhf_recipes.training import doctor_rules
from rlhf_recipes.training.doctor_record import (
    BROKEN,
    MIN_ROWS,
    WATCH,
    Record,
    accuracy_key,
    margin_key,
    margin_limit,
    points,
)

COLUMNS = 3
REACH = 3  # a limit further from the curve than this many times its range is out of sight
HEALTHY = "#2e9b73"
LEVELS = {WATCH: "#c9731a", BROKEN: "#b03a48"}


@dataclass
class Panel:
    """One quantity.

    Attributes:
        title: what it is.
        unit: of the y axis.
        rules: names of those that look at it.
        points: (step, value) of the log.
        held_out: (step, estimate).
        low: of the healthy range; None: no lower limit.
        high: the same above.
    """

    title: str
    unit: str
    rules: tuple[str, ...]
    points: list[tuple[int, float]]
    held_out: list[tuple[int, dict]]
    low: float | None = None
    high: float | None = None


def plot(record: Record, findings: list[dict], path: str | Path, title: str) -> None:
    """Write the page: a panel's heading has the colour of the worst finding about it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [panel for panel in panels(record) if panel.points or panel.held_out]
    rows = max(1, math.ceil(len(shown) / COLUMNS))
    with rc_context({"font.size": 8, "axes.titlesize": 9, "text.parse_math": False}):
        figure = Figure(figsize=(9, 0.7 + 1.9 * rows), dpi=100, layout="constrained")
        figure.suptitle(clip(title, TITLE), fontsize=11)
        for index, panel in enumerate(shown):
            axes = figure.add_subplot(rows, COLUMNS, index + 1)
            _draw(axes, panel)
            about = [finding for finding in findings if finding["rule"] in panel.rules]
            mark = f"{about[0]['level']}: " if about else ""
            colour = LEVELS[about[0]["level"]] if about else INK
            axes.set_title(f"{mark}{panel.title}", loc="left", color=colour, fontweight="bold" if about else "normal")
        figure.supxlabel("optimizer step · shaded: where a healthy run ends · squares: held out, with 95 % intervals")
        figure.savefig(path, format="png")


def _draw(axes, panel: Panel) -> None:
    if panel.points:
        few = len(panel.points) <= 25
        axes.plot(*zip(*panel.points, strict=True), color=COLOURS[0], linewidth=1.2, markersize=3,
                  marker="o" if few else None)  # fmt: skip
    for step, e in panel.held_out:
        low, high = (e.value if bound is None else bound for bound in (e.low, e.high))
        axes.plot([step, step], [low, high], color=PARENT_COLOUR, linewidth=2)
        axes.plot(step, e.value, "s", color=PARENT_COLOUR, markersize=5)
    limits = [limit for limit in (panel.low, panel.high) if limit is not None]
    if limits:
        bottom, top = axes.get_ylim()
        near = [limit for limit in limits if bottom - REACH * (top - bottom) < limit < top + REACH * (top - bottom)]
        axes.update_datalim([(axes.dataLim.x0, limit) for limit in near])
        axes.autoscale_view()
        bottom, top = axes.get_ylim()
        low, high = (bottom if panel.low is None else panel.low), (top if panel.high is None else panel.high)
        axes.axhspan(low, high, color=HEALTHY, alpha=0.15, linewidth=0)
        for limit in near:
            axes.axhline(limit, color=HEALTHY, linewidth=0.8)
        axes.set_ylim(bottom, top)
    axes.set_ylabel(panel.unit)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.spines[["top", "right"]].set_visible(False)


def panels(record: Record) -> list[Panel]:
    """What a run of this recipe may show."""
    end = record.rows[-1]["step"] if record.rows else 0

    def curve(key):
        return points(record, key)

    def held_out(key):
        both = [(0, record.before.get(key)), (end, record.after.get(key))]
        return [(step, estimate) for step, estimate in both if estimate and estimate.value is not None]

    def of_start(key, share, rows=1):
        first = [value for _, value in curve(key)[:rows]]
        return share * sum(first) / len(first) if first else None

    pairs = [
        Panel("Reward margin", "as trained", ("reward_saturation",), curve(margin_key(record)), [],
              0, margin_limit(record)),
        Panel("Accuracy", "share of pairs", ("label_noise", "over_fitting"), curve(accuracy_key(record)),
              held_out("preference_accuracy"), doctor_rules.NOISE_ACCURACY, 1),
        Panel("Accuracy gained", "share of pairs", ("too_little_data", "reward_against_preference"), [],
              held_out("accuracy_change"), 0),
        Panel("Accuracy, longer less shorter", "share of pairs", ("length_drift",), [], held_out("length_bias"),
              -doctor_rules.LENGTH_GAP, doctor_rules.LENGTH_GAP),
    ]  # fmt: skip
    found = {
        "sft": [
            Panel("Perplexity", "of held-out replies", ("over_fitting",), [], held_out("perplexity"), None,
                  record.before["perplexity"].high if "perplexity" in record.before else None),
        ],
        "reward": pairs,
        "prompts": [
            Panel("Reward", "mean of a rollout", (), curve("reward"), held_out("reward")),
            Panel("Reward gained", "mean of the answers", ("too_little_data", "reward_against_preference"), [],
                  held_out("reward_change"), 0),
            Panel("Deviation of the rewards", "in a rollout", ("reward_saturation",), curve("reward_std"), [],
                  of_start("reward_std", doctor_rules.EQUAL_REWARDS, max(MIN_ROWS, len(curve("reward_std")) // 4))),
            Panel("KL to the reference", "nats a completion", ("kl_runaway", "wrong_reference"), curve("kl"),
                  held_out("kl"), None,
                  doctor_rules.KL_WATCH * getattr(record.args, "kl_target", doctor_rules.KL_TARGET)),
            Panel("Length", "tokens", ("length_drift",), curve("completions/mean_length"),
                  held_out("completion_tokens"),
                  *(of_start("completions/mean_length", ratio) for ratio in doctor_rules.LENGTH_RATIOS)),
            Panel("Ended with EOS", "share of completions", ("no_eos",), curve("completions/eos_rate"),
                  held_out("eos_rate"), doctor_rules.EOS_SHARE, 1),
            Panel("Distinct bigrams", "share", ("collapse",), curve("completions/distinct_2"), [],
                  of_start("completions/distinct_2", doctor_rules.COLLAPSING)),
        ],
    }.get("prompts" if record.method.samples else record.recipe) or [
        Panel("Chosen replies", "change, nats a token", ("likelihood_displacement", "wrong_reference"),
              doctor_rules.displacements(record), held_out("chosen_logp_change_per_token"), -doctor_rules.DISPLACED),
        *pairs,
    ]  # fmt: skip
    return [
        *found,
        Panel("Entropy", "nats a token", ("collapse",), curve("entropy"), [],
              None if record.recipe == "sft" else of_start("entropy", doctor_rules.COLLAPSING)),
        Panel("Gradient norm", "before clipping", ("not_finite",), curve("grad_norm"), []),
        Panel("Without a gradient", "share of the tensors", ("dead_gradients",),
              curve("dead_gradients"), [], 0, 0),
    ]  # fmt: skip
