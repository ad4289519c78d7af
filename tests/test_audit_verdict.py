"""The gates of an audit and what they come to."""

import math
import re

import numpy as np
import pytest

from rlhf_recipes.audit import preference, verdict
from rlhf_recipes.audit.section import figure, section, skipped
from rlhf_recipes.stats import Estimate

GATES = {gate.threshold: gate for gate in verdict.GATES}


def e(value, low=None, high=None, n=400, clusters=None) -> Estimate:
    return Estimate(value, low, high, n, n if clusters is None else clusters)


def accuracy(*numbers, baseline=("the shorter answer", 0.58), **more) -> dict:
    one = figure("accuracy", "Accuracy", e(*numbers, **more), unit="%", baseline=baseline)
    return section("preference", "Preference accuracy", "?", figures=[one])


def outcome(name: str, parts: list[dict], **thresholds) -> verdict.Outcome:
    gates = verdict.decide(parts, thresholds)["gates"]
    return next(g for g in gates if g.threshold == name)


def good(limit: float, side: str, by: float) -> float:
    return limit + by if side == "min" else limit - by


def every(states: dict[str, str], default: str = "pass") -> list[dict]:
    """Sections whose figures bring each gate (by threshold) into a state; a figure with two limits has one of them."""
    figures: dict = {}
    for gate in verdict.GATES:
        state = states.get(gate.threshold, default)
        by = {"pass": 0.002, "fail": -0.1, "unclear": 0.0}.get(state)
        if by is None:
            continue
        value = good(gate.limit, gate.side, by)
        half = 0.05 if state == "unclear" else 0.001
        if (gate.section, gate.figure) not in figures or state != "pass":
            one = figure(gate.figure, "Title: worst", e(value, value - half, value + half), unit="%")
            figures[gate.section, gate.figure] = one
    keys = dict.fromkeys(section for section, _ in figures)
    return [section(k, f"Part {k}", "?", figures=[f for (s, _), f in figures.items() if s == k]) for k in keys]


@pytest.mark.parametrize(
    ("numbers", "state"),
    [
        ((0.71, 0.66, 0.75), "pass"),
        ((0.70, 0.65, 0.75), "pass"),  # the limit itself is on the right side
        ((0.70, 0.64, 0.75), "unclear"),
        ((0.62, 0.58, 0.65), "unclear"),
        ((0.60, 0.56, 0.649), "fail"),
        ((0.70,), "pass"),  # counted, not estimated
        ((0.60,), "fail"),
    ],
)
def test_an_interval_decides(numbers, state):
    assert outcome("min_accuracy", [accuracy(*numbers)]).state == state


def test_an_upper_limit_is_the_mirror_image():
    def probe(*numbers):
        one = figure("worst_probe", "Most successful trick: padding", e(*numbers), unit="%")
        return outcome("max_probe_share", [section("probes", "Probes", "?", figures=[one])]).state

    assert probe(0.50, 0.45, 0.55) == "pass"
    assert probe(0.53, 0.48, 0.58) == "unclear"
    assert probe(0.60, 0.551, 0.65) == "fail"


def test_few_prompts_decide_nothing():
    found = outcome("min_accuracy", [accuracy(0.9, 0.8, 1.0, n=200, clusters=19)])
    assert found.state == "unclear" and "19 prompts are too few" in found.why and found.more == 1
    assert outcome("min_accuracy", [accuracy(0.9, 0.8, 1.0, clusters=19)], min_prompts=None).state == "pass"
    assert outcome("min_accuracy", [accuracy(0.9, n=7, clusters=1)]).why == "A single prompt gives no interval."
    one = figure("auroc_std", "Errors found", e(0.9, 0.8, 1.0, n=100, clusters=1))
    found = outcome("min_uncertainty_auroc", [section("uncertainty", "Uncertainty", "?", figures=[one])])
    assert found.why == "1 prompt of the rarer kind is too few to decide on; 20 are the least."


def test_a_biased_figure_decides_nothing():
    found = outcome("min_accuracy", [accuracy(0.6, 0.61, 0.64)])
    assert found.state == "unclear" and "biased" in found.why and found.more is None


def test_unclear_says_how_many_more_prompts_would_settle_it():
    # half-width below the value .04, distance to the limit .02: (.04 / .02)^2 = 4 times the 400 prompts, times 2.043
    # for 80 % power, so 2,868 more
    found = outcome("min_accuracy", [accuracy(0.67, 0.63, 0.71)])
    assert "about 2,900 more prompts would settle it in four of five tries" in found.why and found.more == 2900
    close = outcome("min_accuracy", [accuracy(0.651, 0.611, 0.691)])
    assert "too close" in close.why


def test_accuracy_is_held_against_length_too():
    def gain(*numbers):
        one = figure("accuracy_over_length", "Accuracy over length", e(*numbers), unit="%")
        return outcome("min_gain_over_baseline", [section("preference", "Preference accuracy", "?", figures=[one])])

    assert gain(0.13, 0.08, 0.18).state == "pass"
    assert gain(-0.09, -0.14, -0.04).state == "fail"
    assert gain(0.13, 0.0, 0.18).state == "unclear"  # not shown to be more than nothing
    assert verdict.asked(gain(0.13, 0.0, 0.18)) == "more than 0 points"


def test_a_model_that_is_the_rule_of_length_knows_no_more():
    rows = [{"prompt_id": str(i), "family": None, "prompt": [{"role": "user", "content": f"question {i}"}],
             "chosen": [{"content": "long"}], "rejected": [{"content": "no"}]} for i in range(60)]  # fmt: skip
    parts = [preference.audit(rows, np.ones(60), rows)]
    assert outcome("min_gain_over_baseline", parts).state == "fail"
    right = outcome("min_accuracy", parts)
    assert right.state == "pass" and not right.by_chance  # 60 of 60 is above a coin
    assert outcome("min_accuracy", [accuracy(0.66, 0.5, 0.8)]).by_chance


def test_not_measured_says_why():
    assert outcome("min_accuracy", []).why == "This part of the audit was not run."
    parts = [accuracy(None), skipped("uncertainty", "Meter", "?", "Train an ensemble.")]
    assert outcome("min_uncertainty_auroc", parts).why == "Train an ensemble."
    assert "too few rows" in outcome("min_accuracy", parts).why
    assert outcome("max_exposure_gap", [skipped("coverage", "", "?", "") | {"skipped": None}]).why == (
        "Needs deployment=<file of prompts>."
    )
    assert outcome("min_accuracy", [accuracy(math.nan, math.nan, math.nan)]).state == "not measured"
    assert outcome("min_accuracy", [accuracy(0.7, math.nan, math.nan)]).low is None


def test_a_name_from_data_is_not_a_template():
    one = figure("worst_probe", "Most successful trick: {value}{limit}", e(0.9, 0.8, 0.95), unit="%")
    found = outcome("max_probe_share", [section("probes", "Probes", "?", figures=[one])])
    assert "({value}{limit}) raises its reward 90.0 % [80.0 to 95.0] of the time." in found.says


def test_gates_are_sound():
    assert len(GATES) == len(verdict.GATES) and set(GATES) | {"min_prompts"} == set(verdict.THRESHOLDS)
    for gate in verdict.GATES:
        assert gate.side in ("min", "max") and gate.threshold.startswith(gate.side)
        assert gate.source and gate.todo.endswith(".") and "{value}" in gate.passes and "{value}" in gate.fails
        assert gate.passes.endswith(".") and gate.fails.endswith(".")


def test_limits_can_be_moved_and_switched_off():
    parts = [accuracy(0.6, 0.58, 0.62)]
    assert outcome("min_accuracy", parts, min_accuracy=0.5).state == "pass"
    decided = verdict.decide(parts, {"min_accuracy": None})
    assert decided["off"] == ["min_accuracy"]
    assert "min_accuracy" not in [g.threshold for g in decided["gates"]]


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ({"min_acuracy": 0.7}, "thresholds.min_acuracy = 0.7: there is no such limit. Did you mean 'min_accuracy'?"),
        ({"zzz": 1}, "there is no such limit. Did you mean"),
        ({"min_accuracy": "0.7"}, "thresholds.min_accuracy = 0.7: must be a number. Give one, or null"),
        ({"min_accuracy": True}, "must be a number"),
        ({"min_accuracy": math.nan}, "must be a number"),
    ],
)
def test_bad_limits_are_refused_in_one_line(thresholds, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        verdict.decide([], thresholds)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("states", "default", "overall"),
    [
        ({}, "pass", "trust"),
        ({"max_probe_share": "unclear"}, "pass", "trust"),
        ({"max_probe_share": "fail"}, "pass", "caution"),
        ({"min_accuracy": "unclear"}, "pass", "caution"),
        ({"min_gain_over_baseline": "fail"}, "pass", "do not trust"),
        ({"min_accuracy": "fail"}, "pass", "do not trust"),
        ({"min_accuracy": "pass", "min_gain_over_baseline": "pass"}, "fail", "do not trust"),
        ({"min_accuracy": "pass", "min_gain_over_baseline": "pass"}, "absent", "caution"),
        ({}, "absent", "do not trust"),  # nothing was measured
    ],
)
def test_the_rule_for_the_whole(states, default, overall):
    assert verdict.decide(every(states, default), {})["verdict"] == overall


@pytest.mark.parametrize(
    ("numbers", "clusters", "passes", "overall"),
    [
        ((0.52, 0.40, 0.67), 100, 1, "do not trust"),  # a coin, and 1 of 26 checks passes
        ((0.52, 0.40, 0.67), 100, 25, "do not trust"),  # whatever else passes
        ((0.60, 0.55, 0.66), 100, 25, "caution"),
        ((0.90, 0.75, 0.99), 19, 25, "do not trust"),  # too few prompts to tell
        ((0.66,), 100, 25, "caution"),  # counted: not a coin
        ((0.45,), 100, 25, "do not trust"),
        ((0.60, 0.55, 0.66), 100, 1, "do not trust"),  # too little else is shown
    ],
)
def test_a_coin_is_never_trusted_with_caution(numbers, clusters, passes, overall):
    names = [gate.threshold for gate in verdict.GATES]
    known = dict.fromkeys(names[passes:], "unclear")
    parts = [part for part in every(known) if part["key"] != "preference"] + [accuracy(*numbers, clusters=clusters)]
    decided = verdict.decide(parts, {})
    assert decided["verdict"] == overall, decided["headline"]
    coin = "not told apart from 50 %" in verdict.paragraph(parts, decided, [])
    assert coin == (numbers[0] < 0.6 or clusters < 20)


def test_a_coin_is_not_trusted_where_its_limit_is_off_either():
    parts = [part for part in every({}) if part["key"] != "preference"] + [accuracy(0.5, 0.45, 0.55)]
    decided = verdict.decide(parts, {"min_accuracy": None})
    assert decided["verdict"] == "do not trust" and decided["headline"].startswith("Do not trust it yet")
    text = verdict.paragraph(parts, decided, [])
    assert text.startswith("Do not train or select against") and "not told apart from 50 %" in text
    parts[-1] = accuracy(0.6, 0.55, 0.65)
    assert (
        verdict.decide(parts, {"min_accuracy": None})["verdict"] == "caution"
    )  # the other vital gate is not measured


def test_headline_counts_in_correct_grammar():
    decided = verdict.decide(every({"max_probe_share": "fail", "min_alpha": "absent"}), {})
    assert (
        decided["headline"]
        == f"Use with caution: of {len(GATES)} checks {len(GATES) - 2} pass, 1 fails and 1 was not measured."
    )
    assert decided["counts"] == {"fail": 1, "unclear": 0, "not measured": 1, "pass": len(GATES) - 2}
    assert [g.state for g in decided["gates"]][:2] == ["fail", "not measured"]


def paragraph(parts, label_next=()):
    return verdict.paragraph(parts, verdict.decide(parts, {}), list(label_next))


def test_paragraph_of_a_sound_signal():
    text = paragraph(every({}))
    assert text.startswith("This reward signal can be trusted for prompts like those audited: of")
    assert "The reward model prefers the chosen answer in 65.2 % [65.1 to 65.3] of held-out pairs." in text
    assert "What not to trust" not in text and "What is open" not in text and "What to collect" not in text


def test_paragraph_of_a_weak_signal():
    prompts = [{"prompt": "p", "family": family, "why": "w"} for family in ("triage", "grief", "triage")]
    text = paragraph(
        every({"min_stress_accuracy": "fail", "max_probe_share": "unclear", "min_alpha": "absent"}), prompts
    )
    assert text.startswith("Use this reward signal with caution")
    assert "On the hardest stress test (worst) it is right in only 45.0 % [44.9 to 45.1] of pairs" in text
    assert (
        "The data is too small to decide on wins of the most successful trick (55.0 %, asked is at most 55 %)." in text
    )
    assert "Not measured, which is no pass: agreement of the judges" in text
    assert "The 3 prompts listed below are the most worth labelling, of the kinds triage and grief." in text


def test_paragraph_says_half_a_range_only_whole():
    figures = [figure("slope", "Slope", e(0.6, 0.5, 0.7))]
    text = paragraph([section("calibration", "Calibration", "?", figures=figures)])
    assert "It is too sure of itself (calibration slope 0.60 [0.50 to 0.70]; 1 is perfect)." in text
    assert "sure enough" not in text


def test_paragraph_names_what_more_prompts_would_settle():
    text = paragraph([accuracy(0.67, 0.63, 0.71)], [{"prompt": "p", "family": None, "why": "w"}])
    assert "About 2,900 more prompts would settle “Accuracy on held-out pairs” in four of five tries." in text
    assert text.endswith("The prompt listed below is the most worth labelling.")


@pytest.mark.parametrize("default", ["pass", "fail", "unclear", "absent"])
def test_every_paragraph_is_clean(default):
    parts = every({}, default)
    text = paragraph(parts)
    assert not re.search(r"[{}]|None(?! of)|nan|  | ,|\.\.|\b1 (pass|fail|are|were)\b", text)
    assert paragraph(parts) == text
    for sentence in re.split(r"(?<=[.])\s+(?=\S)", text):
        assert sentence[0].isupper() or sentence[0].isdigit()
