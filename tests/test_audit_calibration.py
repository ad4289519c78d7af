"""Calibration: scores by hand, a calibrated simulation, a planted temperature."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.audit import calibration as c


def simulate(n=5000, factor=1.0, seed=0, spread=2.0):
    """Margins of which sigmoid(margin) is the true chance to be right, then blown up by `factor`."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, spread, n))
    right = rng.random(n) < c.probability(size)
    return factor * np.where(right, size, -size)


def pairs(n, families=("a", "b")):
    return [{"prompt_id": str(i), "family": families[i % len(families)]} for i in range(n)]


def figures(section):
    return {figure.key: figure.estimate for figure in section["figures"]}


def test_ece_by_hand_on_four_bins():
    confidences = np.array([0.9, 0.5, 0.6, 0.8, 0.55, 0.7, 0.65, 0.95])
    correct = np.array([1, 1, 0, 0, 1, 1, 0, 1.0])
    # by confidence: (.5, .55 | 1, 1) .95; (.6, .65 | 0, 0) 1.25; (.7, .8 | 1, 0) .5; (.9, .95 | 1, 1) .15
    assert c.ece(confidences, correct, bins=4) == pytest.approx((0.95 + 1.25 + 0.5 + 0.15) / 8)
    assert c.ece(confidences, correct, bins=1) == pytest.approx(abs(correct.sum() - confidences.sum()) / 8)
    order = [3, 1, 0, 2, 7, 5, 4, 6]
    assert c.ece(confidences[order], correct[order], bins=4) == pytest.approx(0.35625)


def test_equal_confidences_share_a_bin():
    assert c.ece(np.full(30, 0.5), np.arange(30) % 2) == 0
    assert list(stats.equal_mass_bins([0.5, 0.5, 0.9, 0.7], bins=4)) == [0, 0, 3, 2]


def test_scores_by_hand():
    margins = [math.log(3), -math.log(3), 0]  # P = .75, .25, .5
    assert c.brier(margins) == pytest.approx([0.0625, 0.5625, 0.25])
    assert c.nll(margins) == pytest.approx([-math.log(0.75), -math.log(0.25), math.log(2)])
    confidences, correct = c.symmetrise(margins)
    assert confidences == pytest.approx([0.75, 0.75, 0.5]) and list(correct) == [1, 0, 0.5]
    assert c.probability([2.0], 2.0)[0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert np.isfinite(c.nll([-1e6, 1e6])).all()


def test_scores_of_probabilities_by_hand():
    margins, p_N = [math.log(3), -math.log(3)], [0.75, 0.5]  # P = .75, .25
    assert c.brier(margins, 1.0, p_N) == pytest.approx([0.75 * 0.0625 + 0.25 * 0.5625, 0.5 * (0.5625 + 0.0625)])
    log = [-0.75 * math.log(0.75) - 0.25 * math.log(0.25), -0.5 * math.log(0.25 * 0.75)]
    assert c.nll(margins, 1.0, p_N) == pytest.approx(log)
    assert list(c.symmetrise(margins, 1.0, p_N)[1]) == [0.75, 0.5]
    assert c.temperature([2 * math.log(3)] * 2, p_N=[0.75, 0.75]) == pytest.approx(2)


def test_a_model_that_has_learned_the_probabilities_is_calibrated():
    p_N = np.random.default_rng(0).uniform(0.5, 0.99, 600)
    margins = np.log(p_N / (1 - p_N))
    rows = [{**pair, "p": p} for pair, p in zip(pairs(600), p_N, strict=True)]
    found = figures(c.audit(margins[:300], margins[300:], rows[300:], validation_p=p_N[:300]))
    assert found["ece"].value < 1e-9 and found["temperature"].value == pytest.approx(1)
    assert found["slope"].value == pytest.approx(1, abs=1e-6) and found["brier_gain"].value == pytest.approx(
        0, abs=1e-9
    )
    assert figures(c.audit([], margins[300:], pairs(300)))["ece"].value > 0.2  # were every label certain


def test_a_calibrated_model_has_a_small_ece():
    margins = simulate()
    assert c.ece(*c.symmetrise(margins)) <= 0.02
    mean, top = c.chance_ece(c.symmetrise(margins)[0])
    assert 0 < mean < top < 0.03
    few, _ = c.chance_ece(c.symmetrise(margins[:100])[0])
    assert few > 3 * mean  # the bias grows as pairs become fewer


def test_the_planted_temperature_is_found():
    assert c.temperature(simulate(20000, 2.5)) == pytest.approx(2.5, rel=0.05)
    assert c.temperature(100 * simulate(20000)) == pytest.approx(100, rel=0.05)
    # one margin m right r times of n: sigmoid(m / T) = r / n
    assert c.temperature([1, 1, 1, -1]) == pytest.approx(1 / math.log(3))
    assert c.temperature([1, 2]) is None and c.temperature([1, -2]) is None and c.temperature([]) is None
    assert c.temperature([1, -1], np.array([3.0, 1.0])) == pytest.approx(1 / math.log(3))
    assert stats.temperature([1, 2]) == 0 and stats.temperature([1, -2]) == math.inf and stats.temperature([]) == 0


def test_the_planted_slope_and_intercept_are_found():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 3, 20000)
    y = rng.random(20000) < c.probability(0.4 + 0.6 * x)
    assert c.logistic(x, y) == pytest.approx((0.4, 0.6), abs=0.05)
    # two groups: logits of 1/4 and 3/4 at x = -1, 1
    assert c.logistic([-1] * 4 + [1] * 4, [0, 0, 0, 1, 0, 1, 1, 1]) == pytest.approx((0, math.log(3)))
    assert np.isnan(c.logistic([-1, 1], [0, 1])[1])


def test_the_likelihood_has_no_slope_at_the_fit():
    """Its derivatives by a and b, sum w (y - p) and sum w x (y - p), are 0, with margins of hundreds too."""
    rng = np.random.default_rng(2)
    x, weights = rng.standard_cauchy(300) * 50, rng.integers(0, 3, 300).astype(float)
    y = rng.random(300) < c.probability(x / 20)
    a, b = c.logistic(x, y, weights)
    left_N = weights * (y - c.probability(a + b * x))
    assert left_N.sum() == pytest.approx(0, abs=1e-6) and left_N @ x / np.abs(x).max() == pytest.approx(0, abs=1e-6)


def test_the_audit_of_a_model_that_is_too_sure():
    section = c.audit(simulate(2000, 2.5, 1), simulate(2000, 2.5, 2), pairs(2000))
    found = figures(section)
    assert found["temperature"].low < 2.5 < found["temperature"].high
    assert found["ece"].low > 0.05 > found["ece_after"].value
    assert found["slope"].high < 1 and found["slope_after"].low < 1 < found["slope_after"].high
    assert found["slope_after"].value == pytest.approx(found["slope"].value * found["temperature"].value)
    assert abs(found["intercept"].value) < 0.2
    assert found["brier_gain"].low > 0 and found["brier_after"].value < found["brier"].value
    assert found["nll_after"].value < found["nll"].value
    assert [len(series["x"]) for series in section["plots"][0]["series"]] == [15, 15, 2]
    names = [table["caption"] for table in section["tables"]]
    assert names == [
        "Against what needs no margin",
        f"Share right by confidence, T = {found['temperature'].value:.2f}",
        "Calibration by family",
    ]
    assert sum(row[1] for row in section["tables"][1]["rows"]) == 2000


def test_the_same_audit_is_the_same_bit_for_bit():
    once, again = (c.audit(simulate(200, 2.5, 1), simulate(200, 2.5, 2), pairs(200)) for _ in range(2))
    assert json.dumps(once, default=asdict) == json.dumps(again, default=asdict)


def test_degenerate_input():
    assert "skipped" in c.audit([], [], [])
    for margins in ([1.0], [0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [-1.0, -2.0]):
        section = c.audit([], margins, pairs(len(margins), (None,)))
        assert figures(section)["temperature"].value is None
        assert figures(section)["slope"].value is None
        assert len(section["tables"]) == 2
        json.dumps(section, default=asdict)
    assert any("no validation pair is ranked wrong" in note for note in c.audit([1, 2], [1, -1], pairs(2))["notes"])


def test_bad_margins():
    with pytest.raises(ValueError, match=r"^margins\[1\] = nan: must be finite\."):
        c.audit([1.0], [1.0, math.nan], pairs(2))
    with pytest.raises(ValueError, match=r"^margins = 1 numbers: 2 rows\."):
        c.audit([1.0], [1.0], pairs(2))


def test_few_pairs_share_a_bin():
    """Ten pairs a bin at least, fifteen bins at most."""
    assert [c.bins_for(n) for n in (0, 9, 19, 20, 149, 150, 10_000)] == [1, 1, 1, 2, 14, 15, 15]
    margins = np.linspace(-1, 3, 25)
    rows = [{"prompt_id": str(i), "family": "a" if i < 12 else "b"} for i in range(25)]
    found = c.audit(margins, margins, rows)
    (by_bin,) = [table for table in found["tables"] if table["caption"].startswith("Share right by confidence")]
    assert [row[1] for row in by_bin["rows"]] == [13, 12]
    assert "in 2 bins" in found["notes"][0]


def test_squared_error_by_hand():
    # bin 0: gaps .1, .3: mean .2, variance .01; bin 1: gaps -.2, .2, .3: mean .1, variance (.04 + .04 + .09) / 3 - .01
    bins, gaps = np.array([0, 0, 1, 1, 1]), np.array([0.1, 0.3, -0.2, 0.2, 0.3])
    second = 0.17 / 3 - 0.01
    assert c.squared_error(bins, gaps) == pytest.approx((2 * (0.04 - 0.01) + 3 * (0.01 - second / 2)) / 5)
    assert c.squared_error(bins, gaps, noise=0) == pytest.approx((2 * 0.04 + 3 * 0.01) / 5)
    assert c.squared_error(bins, gaps, np.array([1, 1, 0, 0, 0.0])) == pytest.approx(0.03)
    assert math.isnan(c.squared_error(np.arange(3), np.ones(3)))


def test_the_gate_is_passed_by_a_calibrated_model_and_not_by_another():
    """Simulated at the fewest pairs with which it is measured."""
    from rlhf_recipes.audit import gates, verdict

    gate = next(each for each in gates.GATES if each.threshold == "max_calibration_error")

    def states(factor, pairs_in_all, times):
        found = []
        for seed in range(times):
            confidences, correct = c.symmetrise(simulate(pairs_in_all, factor, seed, spread=1.2))
            error = c.debiased_error(confidences, correct, None)
            if error.value is None:
                found.append("not measured")
            else:
                assert 0 <= error.low <= error.value <= error.high <= 1
                found.append(verdict._state(error, gate, 0.05, 20)[0])
        return found

    right = states(1.0, c.GATE_PAIRS, 5)
    assert right.count("pass") >= 4 and "fail" not in right, right
    assert states(2.5, c.GATE_PAIRS, 2) == ["fail"] * 2
    assert states(1.0, c.GATE_PAIRS - 1, 1) == ["not measured"]
