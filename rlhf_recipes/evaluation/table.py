"""An evaluation as a terminal shows it."""

import textwrap

from rlhf_recipes import stats
from rlhf_recipes.evaluation import fixed_answers
from rlhf_recipes.evaluation.summary import SHOWN_FAMILY
from rlhf_recipes.text import line


def as_text(evaluation: dict) -> str:
    """The evaluation as a terminal shows it: one row per system, at most 110 columns."""
    rows = [["", "pref. acc. %", "win rate %", "LC %", "KL", "tokens", "refuses", "rep. %", "ppl", "n", "verdict"]]
    rows += [_table_row(name, system) for name, system in evaluation["systems"].items()]
    beside = {BASELINES[name]: e for name, e in evaluation["baselines"].items()}
    models = evaluation["reward_models"].items()
    beside |= {f"RM {_short(name, 11)}": model["accuracy"] for name, model in models}
    rows += [[name, _cell(e, 100), *[""] * 7, str(e.n), ""] for name, e in beside.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= 110 else " "
    text = str.ljust, *[str.rjust] * 9, str.ljust
    lines = [gap.join(f(c, w) for f, c, w in zip(text, row, widths, strict=True)).rstrip() for row in rows]
    tasks = {name: system["tasks"] for name, system in evaluation["systems"].items()}
    notes = [_task_line(task, tasks) for task in tasks[evaluation["parent"]]]
    last = list(models)[-1:]  # of several, their mean
    notes += [said for name, model in last if (said := _family_line(name, model["families"]))]
    for said in fixed_answers.as_text(against) if (against := evaluation.get("baseline_answers")) else ():
        notes.append(textwrap.fill(line(said), 110, subsequent_indent="  "))
    notes += [
        "[95 % interval, bootstrap over prompts] · LC: win rate at equal length · KL: nats per answer",
        f"refuses: % of harmful/harmless prompts · n: pairs/answers · parent: {line(evaluation['parent'])[:50]}",
    ]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:], *notes])


def _table_row(name: str, system: dict) -> list[str]:
    m, accuracy = system["metrics"], system["preference_accuracy"]
    refusals = (_point(m[key], 100, 0) for key in ("refusal_harmful", "refusal_harmless"))
    return [
        _short(name),
        _cell(accuracy, 100),
        _cell(m.get("win_rate"), 100),
        _point(m.get("win_rate_length_controlled"), 100, 1),
        _point(m["kl_k1"], 1, 1),
        _point(m["tokens"], 1, 0),
        "/".join(refusals),
        _point(m["repetition"], 100, 1),
        _point(m.get("perplexity"), 1, 2),
        f"{accuracy.n}/{m['tokens'].n}",
        system["verdict"]["verdict"] if "verdict" in system else "parent",
    ]


def _task_line(task: str, systems: dict) -> str:
    """Accuracy of each system on a task, and its paired difference to the parent in points."""
    shown = []
    for name, tasks in systems.items():
        gain = tasks[task]["difference"]
        change = f" ({stats.format_estimate(gain, percent=True, sign=True).replace(' %', '')})" if gain else ""
        shown.append(f"{_short(name)} {_cell(tasks[task]['accuracy'], 100)}{change}")
    one = next(iter(systems.values()))[task]
    said = f"{task} ({one['metric']}, n {one['accuracy'].n}), %, and points to the parent: {' · '.join(shown)}"
    return textwrap.fill(line(said), 110, subsequent_indent="  ")


def _family_line(name: str, families: dict) -> str | None:
    """The weakest family of a reward model, of those with pairs enough to say so."""
    enough = {family: e for family, e in families.items() if e.n >= SHOWN_FAMILY}
    if len(enough) < 2:
        return None
    family, e = min(enough.items(), key=lambda item: item[1].value)
    return f"RM {_short(name, 11)} is weakest on {_short(family, 30)}: {_cell(e, 100)} % (n {e.n})"


BASELINES = {"shorter_wins": "shorter wins", "longer_wins": "longer wins", "coin": "coin"}


def _cell(e: stats.Estimate | None, scale: float) -> str:
    if e is None or e.value is None:
        return "–"
    if e.low is None or e.low == e.high:
        return f"{scale * e.value:.1f}"
    return f"{scale * e.value:.1f} [{scale * e.low:.1f}, {scale * e.high:.1f}]"


def _point(e: stats.Estimate | None, scale: float, digits: int) -> str:
    return "–" if e is None or e.value is None else stats.format_number(scale * e.value, digits)


def _short(name: str, width: int = 14) -> str:
    name = line(name)
    return name if len(name) <= width else name[: width - 1] + "…"
