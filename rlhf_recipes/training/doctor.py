"""The doctor: what a run's own figures say about it, one line for each thing found, and what could not be asked."""

from rlhf_recipes import text
from rlhf_recipes.training.doctor_record import (
    HEALTHY,
    LEVELS,
    MIN_ROWS,
    Record,
    accuracy_key,
    decides,
    ends,
    margin_key,
    margin_limit,
    points,
)
from rlhf_recipes.training.doctor_rules import (
    RULES,
    collapse,
    kl_runaway,
    label_noise,
    over_fitting,
    reward_saturation,
)


def examine(record: Record) -> dict:
    """`verdict` (healthy, watch or broken: the worst level), `findings`, the worst first, as plain dicts, and
    `unasked`: the rules that could not be asked, each with the reason, as it follows "not asked: <rule>, "."""
    findings = []
    for rule in RULES:
        found = rule(record) if record.rows else None
        if found:
            findings.append({"rule": rule.__name__, "step": record.rows[-1]["step"], **vars(found)})
    findings.sort(key=lambda finding: -LEVELS.index(finding["level"]))
    verdict = findings[0]["level"] if findings else HEALTHY
    told = [finding["rule"] for finding in findings]
    return {
        "verdict": verdict,
        "findings": findings,
        "unasked": {rule: why for rule, why in unasked(record).items() if rule not in told},
    }


def unasked(record: Record) -> dict[str, str]:
    """Of the rules that a column of the log alone can tell: those whose column is not there, or too short for a
    beginning and an end where they compare these; and saturation where the loss has no limit."""
    if not record.rows:
        return {}
    method, columns, found = record.method, {}, {}
    if record.recipe not in ("sft", "reward"):
        columns[collapse] = "entropy"
    if method.samples or method.saturated is not None:
        columns[reward_saturation] = "reward_std" if method.samples else margin_key(record)
    if method.samples and not decides(record.after.get("kl")):
        columns[kl_runaway] = "kl"  # TRL's RLOOTrainer logs none with a beta of 0
    if method.preferences:
        columns[over_fitting] = columns[label_noise] = accuracy_key(record)
    for rule, key in columns.items():
        series = points(record, key)
        if not series:
            found[rule.__name__] = f"for which the log has no {key}"
        elif rule is reward_saturation and not method.samples and margin_limit(record) is None:
            found[rule.__name__] = "which has no limit with this loss"
        elif rule in (collapse, reward_saturation) and ends(series) is None:
            found[rule.__name__] = f"for which {2 * MIN_ROWS} rows of the log or rollouts are needed"
    return found


def said(report: dict) -> list[str]:
    """A line for each finding, or the verdict; and one for what was not asked."""
    lines = [line(finding) for finding in report["findings"]] or [report["verdict"]]
    return lines + ([not_asked(report)] if report.get("unasked") else [])


def not_asked(report: dict) -> str:
    rules: dict[str, list[str]] = {}
    for rule, why in report["unasked"].items():
        rules.setdefault(why, []).append(rule.replace("_", " "))
    return "not asked: " + "; ".join(f"{' and '.join(names)}, {why}" for why, names in rules.items())


def line(finding: dict) -> str:
    """One line: what, how bad, since when, what was seen, what it means, what changes it."""
    name = finding["rule"].replace("_", " ")
    return text.line(
        f"{finding['level']}: {name} (step {finding['step']}): {finding['saw']}; {finding['means']}. "
        f"To change it: {finding['change']}"
    )
