"""What an audit comes to: each figure against a limit, and a paragraph in plain words.

A gate passes where the whole 95 % interval is on the right side of its limit, fails where it is wholly on the wrong
side, and is unclear between. A figure without an interval (a count of the data at hand) is decided by its value. The
limit itself is enough, except where it is what no understanding at all reaches, as a gain of 0.
"""

import difflib
import math
import re
from dataclasses import dataclass

from rlhf_recipes import stats
from rlhf_recipes.audit.gates import GATES, THRESHOLDS, Gate
from rlhf_recipes.audit.section import Figure
from rlhf_recipes.errors import Refusal

STATES = ("fail", "unclear", "not measured", "pass")  # worst first
LEADS = {
    "trust": "This reward signal can be trusted for prompts like those audited",
    "caution": "Use this reward signal with caution, for ranking answers to prompts like those audited",
    "do not trust": "Do not train or select against this reward signal yet",
}
ROUNDING = 1e-9
SHOWN = 5  # sentences of the paragraph about one state


@dataclass
class Outcome:
    """What a gate comes to: the gate with its limit as it was asked, and what was found.

    Attributes:
        value: of the figure, with `low`, `high`, `n` and `clusters`; None where it was not measured.
        more: how many more prompts would settle it.
        state: of STATES.
        by_chance: whether the figure is not told apart from `chance`.
        name: which of several the figure is about.
        why: why it is unclear or not measured.
        says: what its passing or failing means.
    """

    section: str
    figure: str
    threshold: str
    limit: float
    side: str
    source: str
    todo: str
    title: str
    unit: str
    vital: bool
    needs: str
    chance: float | None
    strict: bool
    counted: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    more: int | None = None
    state: str = "not measured"
    by_chance: bool = False
    n: int = 0
    clusters: int = 0
    name: str = ""
    why: str = ""
    says: str = ""


def check(thresholds: dict) -> dict:
    """All limits, the default where `thresholds` has none.

    Raises:
        Refusal: an unknown name, or a limit that is no number.
    """
    for name, limit in thresholds.items():
        if name not in THRESHOLDS:
            near = difflib.get_close_matches(str(name), THRESHOLDS, 1, 0.3) or list(THRESHOLDS)[:1]
            raise Refusal(f"thresholds.{name} = {limit}: there is no such limit. Did you mean '{near[0]}'?")
        number = isinstance(limit, int | float) and not isinstance(limit, bool) and math.isfinite(limit)
        if limit is not None and not number:
            raise Refusal(f"thresholds.{name} = {limit}: must be a number. Give one, or null to switch it off.")
    return THRESHOLDS | dict(thresholds)


def decide(sections: list[dict], thresholds: dict) -> dict:
    """Every gate with what was found, worst first, and what they come to.

    do not trust: a vital gate fails; accuracy is not told apart from a coin; more gates fail than pass; or fewer than
    a third of those that were measured pass.
    trust: the vital gates pass, none fails, and more than half of all gates pass.
    caution: everything else.

    Returns:
        `verdict`, `headline`, `gates` (of `Outcome`), `counts` (state -> gates), `by_chance` (whether accuracy is not
        told apart from a coin, be its limit null or not) and `off` (names of the thresholds that are null).
    """
    limits = check(thresholds)
    gates = [_outcome(gate, sections, limits) for gate in GATES if limits[gate.threshold] is not None]
    gates.sort(key=lambda g: (STATES.index(g.state), not g.vital))
    by_chance = any(
        _outcome(gate, sections, limits | {gate.threshold: gate.chance}).by_chance
        for gate in GATES
        if gate.chance is not None
    )
    overall = _overall(gates, by_chance)
    return {
        "verdict": overall,
        "headline": _headline(gates, overall),
        "gates": gates,
        "counts": _counts(gates),
        "by_chance": by_chance,
        "off": [name for name, limit in limits.items() if limit is None],
    }


def paragraph(sections: list[dict], decided: dict, label_next: list[dict]) -> str:
    """What to trust, what not and what to collect next; paragraphs are separated by a blank line.

    Args:
        decided: of `decide`, by these sections.
    """
    gates = decided["gates"]
    found = {state: [g for g in gates if g.state == state] for state in STATES}
    parts = [
        _trusted(decided, found["pass"]),
        _distrusted(found["fail"]),
        _open(gates, sections),
        _collect(found["unclear"], label_next),
    ]
    return "\n\n".join(" ".join(part) for part in parts if part)


def _outcome(gate: Gate, sections: list[dict], limits: dict) -> Outcome:
    fixed = {key: value for key, value in gate._asdict().items() if key not in ("passes", "fails")}
    outcome = Outcome(**fixed | {"limit": limits[gate.threshold]})
    figure, outcome.why = _figure(gate, sections)
    outcome.by_chance = gate.chance is not None
    if figure is not None:
        found = _finite_bounds(figure.estimate)
        outcome.value, outcome.low, outcome.high = found.value, found.low, found.high
        outcome.n, outcome.clusters = found.n, found.clusters
        least = limits["min_prompts"] or 0
        outcome.state, outcome.why, outcome.more = _state(found, gate, outcome.limit, least)
        if gate.chance is not None:
            outcome.by_chance = _state(found, gate._replace(strict=True), gate.chance, least)[0] != "pass"
        outcome.name = figure.title.partition(": ")[2]
    outcome.says = _sentence({"pass": gate.passes, "fail": gate.fails}.get(outcome.state, ""), outcome)
    return outcome


def _figure(gate: Gate, sections: list[dict]) -> tuple[Figure | None, str]:
    for part in sections:
        if part["key"] == gate.section:
            if part.get("skipped"):
                return None, part["skipped"]
            for figure in part["figures"]:
                if figure.key == gate.figure and _finite(figure.estimate):
                    return figure, ""
            return None, gate.needs
    return None, "This part of the audit was not run."


def _finite(e: stats.Estimate | None) -> bool:
    return e is not None and e.value is not None and math.isfinite(e.value)


def _finite_bounds(e: stats.Estimate) -> stats.Estimate:
    """A bound that is not finite is none."""
    return e.mapped(lambda x: x if math.isfinite(x) else None)


def _state(e: stats.Estimate, gate: Gate, limit: float, min_prompts: int) -> tuple[str, str, int | None]:
    """State, in words why it is unclear, and how many more prompts would settle it."""
    sign = 1 if gate.side == "min" else -1
    low, high = e.low, e.high

    def holds(x: float) -> bool:
        return sign * (x - limit) > 0 or (x == limit and not gate.strict)

    if low is None or high is None:
        if e.clusters < 2:
            return "unclear", "A single prompt gives no interval.", None
        return ("pass" if holds(e.value) else "fail"), "", None
    if e.clusters < min_prompts:
        those = _verb(e.clusters, f"{gate.counted.replace('prompts', 'prompt', 1)} is", f"{gate.counted} are")
        why = f"{e.clusters} {those} too few to decide on; {min_prompts} are the least."
        return "unclear", why, min_prompts - e.clusters
    if not low - ROUNDING <= e.value <= high + ROUNDING:
        return "unclear", "The figure is biased with so few rows: its interval does not hold its own value.", None
    near, far = (low, high) if gate.side == "min" else (high, low)
    if holds(near):
        return "pass", "", None
    if not holds(far):
        return "fail", "", None
    more = _more(e, limit)
    settles = f"{_some(more)} more {gate.counted} would settle it in four of five tries" if more else None
    return "unclear", f"The interval includes the limit; {settles or 'the value is too close to it to settle'}.", more


def _more(e: stats.Estimate, limit: float) -> int | None:
    """Prompts beyond those at hand that would settle it (`stats.needed`), to two digits; None: more than 40 times
    those at hand."""
    number = stats.needed(e, limit)
    if number is None or number > 40 * e.clusters:
        return None
    number = max(1, number - e.clusters)
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


def _some(number: int) -> str:
    return "a few" if number < 10 else f"about {number:,}"


def _counts(gates: list[Outcome]) -> dict[str, int]:
    return {state: sum(g.state == state for g in gates) for state in STATES}


def _overall(gates: list[Outcome], by_chance: bool) -> str:
    counts, vital = _counts(gates), [g.state for g in gates if g.vital]
    measured = len(gates) - counts["not measured"]
    if (
        not measured
        or by_chance
        or "fail" in vital
        or counts["fail"] > counts["pass"]
        or 3 * counts["pass"] < measured
    ):
        return "do not trust"
    sure = all(state == "pass" for state in vital) and not counts["fail"] and 2 * counts["pass"] > len(gates)
    return "trust" if sure else "caution"


def _headline(gates: list[Outcome], overall: str) -> str:
    says = {"trust": "Trust it within limits", "caution": "Use with caution", "do not trust": "Do not trust it yet"}
    return f"{says[overall]}: {_tally(gates)}."


def _tally(gates: list[Outcome]) -> str:
    """`of 18 checks 9 pass, 3 fail, 4 are undecided and 2 were not measured`"""
    if not gates:
        return "every check is switched off"
    counts = _counts(gates)
    parts = [f"{counts['pass']} {_verb(counts['pass'], 'passes', 'pass')}"] if counts["pass"] else ["none passes"]
    parts += [f"{counts['fail']} {_verb(counts['fail'], 'fails', 'fail')}"] if counts["fail"] else ["none fails"]
    if counts["unclear"]:
        parts.append(f"{counts['unclear']} {_verb(counts['unclear'], 'is', 'are')} undecided")
    if counts["not measured"]:
        parts.append(f"{counts['not measured']} {_verb(counts['not measured'], 'was', 'were')} not measured")
    return f"of {len(gates)} {_verb(len(gates), 'check', 'checks')} {_listed(parts)}"


def _verb(number: int, one: str, many: str) -> str:
    return one if number == 1 else many


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _trusted(decided: dict, passed: list[Outcome]) -> list[str]:
    gates = decided["gates"]
    said = [f"{LEADS[decided['verdict']]}: {_tally(gates)}."]
    if decided["by_chance"]:
        said.append("Nothing shows that it knows more than a coin: its accuracy is not told apart from 50 %.")
    doubtful = {(g.section, g.figure) for g in gates if g.state in ("fail", "unclear")}
    # half of a range that holds would be a half-truth
    whole = [g for g in passed if g.vital or (g.section, g.figure) not in doubtful]
    said += [g.says for g in whole[:SHOWN]]
    if any(g.low is not None for g in gates):
        said.append("Brackets hold the range that the choice of prompts leaves open (95 % intervals).")
    return said


def _distrusted(failed: list[Outcome]) -> list[str]:
    said = ["What not to trust."] if failed else []
    for g in failed[:SHOWN]:
        said += [g.says, g.todo]
    rest = len(failed) - SHOWN
    if rest > 0:
        said.append(f"{rest} more {_verb(rest, 'check fails', 'checks fail')}, in the table below.")
    return said


def _open(gates: list[Outcome], sections: list[dict]) -> list[str]:
    unclear, missing = ([g for g in gates if g.state == state] for state in ("unclear", "not measured"))
    said = ["What is open."] if unclear or missing else []
    if unclear:
        listed = [f"{_lower(g.title)} ({_number(g.value, g.unit)}, asked is {asked(g)})" for g in unclear[:SHOWN]]
        if len(unclear) > SHOWN:
            listed.append(f"{len(unclear) - SHOWN} more")
        said.append(f"The data is too small to decide on {_listed(listed)}.")
    if missing:
        said.append(f"Not measured, which is no pass: {_listed(_missing(gates, sections))}.")
    return said


def _missing(gates: list[Outcome], sections: list[dict]) -> list[str]:
    """Parts of which no gate was measured, and of the others the gates."""
    titles = {part["key"]: part["title"] for part in sections}
    known = {g.section for g in gates if g.state != "not measured"}
    names = [
        g.title if g.section in known else titles.get(g.section, g.section) for g in gates if g.state == "not measured"
    ]
    return list(dict.fromkeys(map(_lower, names)))


def _collect(unclear: list[Outcome], label_next: list[dict]) -> list[str]:
    said = []
    wanted = [(not g.vital, g.more, g.title, g.counted) for g in unclear if g.more]
    if wanted:
        _, more, title, counted = min(wanted)
        said.append(f"{_upper(_some(more))} more {counted} would settle “{title}” in four of five tries.")
    if label_next:
        kinds = list(dict.fromkeys(str(row["family"]) for row in label_next if row.get("family")))
        of = f", of the {_verb(len(kinds), 'kind', 'kinds')} {_listed(kinds)}" if 0 < len(kinds) <= 4 else ""
        many = _verb(len(label_next), "prompt listed below is", f"{len(label_next)} prompts listed below are")
        said.append(f"The {many} the most worth labelling{of}.")
    return ["What to collect next.", *said] if said else []


def _lower(title: str) -> str:
    """For use inside a sentence."""
    return title[:1].lower() + re.sub(", (lower|upper) limit$", "", title[1:])


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(template: str, g: Outcome) -> str:
    name = f" ({g.name})" if g.name else ""  # last: it may come from data
    return _upper(template.replace("{value}", shown(g)).replace("{limit}", _limit(g)).replace("{name}", name))


def shown(g: Outcome) -> str:
    """`71.0 % [67.9 to 74.1]`"""
    if g.value is None:
        return "–"
    value = _number(g.value, g.unit)
    if g.low is None or g.high is None or g.low == g.high:
        return value
    low, high = (_number(bound, g.unit, bare=True) for bound in (g.low, g.high))
    return f"{value} [{low} to {high}]"


def asked(g: Outcome) -> str:
    """`at least 65 %`"""
    least, most = ("more than", "less than") if g.strict else ("at least", "at most")
    return f"{least if g.side == 'min' else most} {_limit(g)}"


def _limit(g: Outcome) -> str:
    return re.sub(r"\.0(?!\d)", "", _number(g.limit, g.unit))


def _number(x: float, unit: str, bare: bool = False) -> str:
    share = unit in ("%", "points")
    digits = 1 if share else 2
    said = stats.format_number(100 * x if share else x, digits).replace("-", "−")
    return said if bare or not unit else f"{said} {unit}"
