"""One page of the rounds: what the judge, the proxy and the KL did, what the labels cost, which gates hold."""

from pathlib import Path
from typing import Any

from rlhf_recipes import drawing
from rlhf_recipes.drawing import COLOURS, MARKERS, PARENT_COLOUR
from rlhf_recipes.stats import Estimate, format_estimate

TEMPLATE = Path(__file__).with_name("rounds.html.jinja")
APART = 0.03  # of the two systems of points, so that both intervals are seen
NAMES = (
    ("judge", "judge, wins over the anchor"), ("against_last", "judge, wins over the last policy"),
    ("proxy", "reward model (the proxy), wins over the anchor"), ("kl", "KL to the anchor, nats an answer"),
    ("over_length", "reward model over the best rule of length"), ("disputed", "disputed pairs"),
    ("place", "distance from one half of the left one, worst person"),
    ("known", "labeller on known pairs, less the first round"), ("pairs", "pairs labelled"),
    ("questions", "questions to the labeller"), ("usd", "USD"),
)  # fmt: skip


def write(found: dict[str, Any], path: Path) -> None:
    """
    Args:
        found: of `rounds.Rounds.read`.
    """
    rounds = found["rounds"]
    if not rounds:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = drawing.figure(
        "What each round did",
        _alt(rounds),
        lambda axes: _draw(axes, rounds),
        height=3.4,
    )
    drawing.write(
        TEMPLATE,
        path,
        headline=_headline(found),
        picture=picture,
        rounds=[_row(each) for each in rounds],
        names=NAMES,
        gates=[(each["round"], gate) for each in rounds for gate in each["gates"]],
        stopped=found["stopped"],
        ended=found["ended"],
        keep=found["keep"],
        anchor=found["anchor"],
    )


def _headline(found: dict[str, Any]) -> str:
    count = len(found["rounds"])
    if stopped := found["stopped"]:
        return f"Stopped in round {stopped['round']} of {found['asked']}: {stopped['gate']}"
    if ended := found["ended"]:
        return f"Ended at {ended['stage']}"
    if count == found["asked"] and found["keep"] == found["rounds"][-1]["policy"]:
        return f"{count} rounds, every gate holds" if count > 1 else "One round, every gate holds"
    return f"Round {count} of {found['asked']}, every gate holds so far"


def _row(each: dict[str, Any]) -> dict[str, Any]:
    costs = each.get("labels", [])
    usd = [cost["usd"] for cost in costs]
    return {
        "round": each["round"],
        **{
            key: format_estimate(each.get(key), percent=key != "kl")
            for key in ("judge", "against_last", "proxy", "kl", "over_length", "disputed", "place", "known")
        },
        "pairs": sum(cost["pairs"] for cost in costs),
        "questions": sum(cost["questions"] for cost in costs),
        "usd": "–" if None in usd else f"{sum(usd):.2f}",
    }


def _draw(axes, rounds: list[dict[str, Any]]) -> None:
    """Win rates over the anchor on the left axis, KL and labels so far on the right one."""
    axes.axhline(50, color=PARENT_COLOUR, linewidth=0.8, linestyle=":")
    for place, (key, words) in enumerate(
        (("judge", "judge, wins over the anchor"), ("proxy", "reward model, the same"))
    ):
        told = [
            (each["round"] + place * APART, each[key])
            for each in rounds
            if key in each and each[key].value is not None
        ]
        axes.plot(
            [n for n, _ in told],
            [100 * e.value for _, e in told],
            color=COLOURS[place],
            marker=MARKERS[place],
            label=words,
        )
        for n, e in told:
            if e.low is not None:
                axes.plot([n, n], [100 * e.low, 100 * e.high], color=COLOURS[place], linewidth=1)
    kl = [(each["round"], each["kl"].value) for each in rounds if "kl" in each and each["kl"].value is not None]
    labels, so_far = [], 0
    for each in rounds:
        so_far += sum(cost["pairs"] for cost in each.get("labels", []))
        labels.append((each["round"], so_far))
    beside = axes.twinx()
    beside.spines[["top"]].set_visible(False)
    series = ((kl, "KL, nats an answer"), (labels, "labels so far, tens"))
    for place, (told, words) in enumerate(series, 2):
        scale = 1 if place == 2 else 10
        beside.plot(
            [n for n, _ in told], [value / scale for _, value in told],
            color=COLOURS[place], marker=MARKERS[place], linestyle="--", label=words,
        )  # fmt: skip
    beside.set_ylim(bottom=0)
    beside.set_ylabel("dashed: nats, tens of labels")
    axes.set_ylim(0, 100)
    axes.set_xticks([each["round"] for each in rounds])
    axes.set_xlabel("round")
    axes.set_ylabel("wins, %")
    handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _alt(rounds: list[dict[str, Any]]) -> str:
    said = [
        f"round {each['round']}: judge {_percent(each.get('judge'))}, reward model {_percent(each.get('proxy'))}, "
        f"KL {format_estimate(each.get('kl'))}"
        for each in rounds
    ]
    return "; ".join(said)


def _percent(found: Estimate | None) -> str:
    return format_estimate(found, percent=True)
