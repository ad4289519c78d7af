"""Over-optimisation: the estimator against brute force, the laws of arXiv:2210.10760, planted curves."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from rlhf_recipes.audit import overoptimisation as oo
from rlhf_recipes.audit import pressure, verdict


def brute_force(proxy, gold, n):
    """Mean gold of the best by proxy over all subsets of n, its ties shared evenly."""
    golds = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        golds.append(np.mean([gold[i] for i in subset if proxy[i] == top]))
    return np.mean(golds)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_best_of_n_is_the_mean_over_all_subsets(size, ties):
    rng = np.random.default_rng(size)
    proxy = rng.integers(0, 3, size).astype(float) if ties else rng.normal(size=size)
    gold, ns = rng.normal(size=size), range(1, size + 1)
    golds, proxies = pressure.best_of_n(proxy, gold, ns)
    np.testing.assert_allclose(golds, [brute_force(proxy, gold, n) for n in ns], atol=1e-12)
    np.testing.assert_allclose(proxies, [brute_force(proxy, proxy, n) for n in ns], atol=1e-12)


def test_best_of_n_by_hand_and_over_prompts():
    # ascending proxy 1, 2, 3 has gold 5, 0, 4; pairs pick 0, 4, 4; all of them 4
    golds, proxies = pressure.best_of_n([3, 1, 2], [4, 5, 0], [1, 2, 3])
    assert golds == pytest.approx([3, 8 / 3, 4])
    assert proxies == pytest.approx([2, 8 / 3, 3])
    both, _ = pressure.best_of_n([[3, 1, 2], [1, 1, 1]], [[4, 5, 0], [1, 2, 6]], [1, 2, 3])
    np.testing.assert_allclose(both, [[3, 8 / 3, 4], [3, 3, 3]])


def test_best_of_12500_samples_does_not_overflow():
    proxy = np.arange(12500.0)
    golds, _ = pressure.best_of_n(proxy, proxy, [1, 2, 1000, 12500])
    # the expected largest of n ranks 0..N-1 drawn without replacement is n (N + 1) / (n + 1) - 1
    assert golds == pytest.approx([n * 12501 / (n + 1) - 1 for n in (1, 2, 1000, 12500)], rel=1e-10)


def test_weights_are_the_ratio_of_binomials():
    exact = [math.comb(i - 1, 4) / math.comb(30, 5) for i in range(1, 31)]
    np.testing.assert_allclose(pressure._weights(5, 30), exact, rtol=1e-12)


KL = {1: 0, 2: 0.193, 4: 0.636, 16: 1.835, 64: 3.175, 1000: 5.909, 12500: 8.434}


@pytest.mark.parametrize(("n", "kl"), KL.items())
def test_kl_of_best_of_n(n, kl):
    assert pressure.kl_best_of_n(n) == pytest.approx(kl, abs=1e-3)
    assert pressure.kl_best_of_n(n) == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-9)


@pytest.mark.parametrize("arguments", [([1, 2], [1, 2], [3]), ([1, 2], [1], [1]), ([1, math.nan], [1, 2], [1])])
def test_best_of_n_refuses(arguments):
    with pytest.raises(ValueError, match=r"^.* = .*: .*\. .*\.$"):
        pressure.best_of_n(*arguments)


@pytest.mark.parametrize("form", ["best_of_n", "policy"])
def test_planted_alpha_and_beta_are_recovered(form):
    d, rng = np.linspace(0, 6, 25), np.random.default_rng(3)
    alpha, beta = 1.2, 0.15 if form == "best_of_n" else 0.5
    bend = d**2 if form == "best_of_n" else np.concatenate([[0], d[1:] * np.log(d[1:])])
    clean = alpha * d - beta * bend
    found = pressure.fit(d, clean + rng.normal(0, 0.01 * clean.max(), len(d)), form)
    assert found["alpha"] == pytest.approx(alpha, rel=0.05)
    assert found["beta"] == pytest.approx(beta, rel=0.05)
    exact = pressure.fit(d, clean, form)
    assert (exact["alpha"], exact["beta"], exact["rmse"]) == pytest.approx((alpha, beta, 0), abs=1e-9)


def test_peaks_by_hand():
    d = np.array([1.0, 2.0, 3.0])
    found = pressure.fit(d, d * (1.2 - 0.3 * d), "best_of_n")
    assert (found["peak"], found["height"]) == pytest.approx((2, 1.2))
    found = pressure.fit(d, d * (1.0 - 0.5 * np.log(d)), "policy")
    assert (found["peak"], found["height"]) == pytest.approx((math.e, 0.5 * math.e))  # exp(1/.5 - 1); d beta
    assert pressure.fit(d, d * (1 + 0.1 * d), "best_of_n")["peak"] is None  # bends upward
    assert pressure.fit(d, d * (-1 - 0.1 * d), "best_of_n")["peak"] == 0  # falls from the start
    assert pressure.fit([0, 1], [0, 1], "policy")["alpha"] is None
    with pytest.raises(ValueError, match="form = ppo: must be one of"):
        pressure.fit(d, d, "ppo")


def goodhart(prompts=60, samples=256, seed=0, strength=1.0):
    """Samples whose proxy is gold plus an error that pays more the further it goes, at the cost of gold."""
    rng = np.random.default_rng(seed)
    quality, hack = rng.normal(size=(2, prompts, samples))
    return quality + 1.5 * strength * hack, quality - strength * np.maximum(hack - 0.5, 0) ** 2


def figures(section):
    return {figure.key: figure.estimate for figure in section["figures"]}


def test_a_perfect_proxy_never_over_optimises():
    gold = np.random.default_rng(0).normal(size=(50, 128))
    section = oo.audit([{"name": "gold itself", "proxy_PS": gold, "gold_PS": gold, "gold_kind": "a rule"}])
    found = figures(section)
    assert found["best_of_n_gap"].value == 0
    assert found["best_of_n_gain"].value == pytest.approx(2.6, abs=0.2)  # expected largest of 128 normals: 2.62
    assert "not peaked" in " ".join(section["notes"]) or "no peak" in " ".join(section["notes"])
    assert found["best_of_n_gain_at_peak"].value is None


def test_a_planted_goodhart_proxy_peaks():
    proxy, gold = goodhart()
    section = oo.audit([{"name": "single proxy", "proxy_PS": proxy, "gold_PS": gold, "gold_kind": "a rule"}])
    found = figures(section)
    assert found["best_of_n_gap"].low > 0
    assert found["best_of_n_beta"].low > 0
    peak = found["best_of_n_peak"]
    assert 0 < peak.low < peak.value < peak.high < math.sqrt(pressure.kl_best_of_n(256))
    assert found["best_of_n_gain_at_peak"].low < found["best_of_n_gain_at_peak"].value
    [plot] = section["plots"]
    gold_curve, proxy_curve, fitted = plot["series"]
    assert gold_curve["low"][0] == gold_curve["high"][0] == 0  # the start is known, not estimated
    assert proxy_curve["y"] == sorted(proxy_curve["y"]) and gold_curve["y"][-1] < max(gold_curve["y"])
    assert gold_curve["y"][0] == 0 and fitted["points"] is False
    assert plot["marks"] == [["peak", pytest.approx(peak.value)]]


def test_seeds_are_put_together_and_a_better_proxy_is_compared():
    entries = []
    for name, strength in (("single proxy", 1.0), ("worst case", 0.3)):
        for seed in range(3):
            proxy, gold = goodhart(20, 64, seed, strength)
            entries.append({"name": name, "seed": seed, "proxy_PS": proxy, "gold_PS": gold, "gold_kind": "a rule"})
    section = oo.audit(entries)
    found = figures(section)
    assert (found["best_of_n_gain"].n, found["best_of_n_gain"].clusters) == (60, 20)
    assert found["best_of_n_gain_over_single_proxy_worst_case"].low > 0
    by_seed = [table for table in section["tables"] if table["caption"].endswith("by seed")]
    assert [row[0] for row in by_seed[0]["rows"]] == ["0", "1", "2", "all"]
    assert [plot["caption"] for plot in section["plots"]][-1].startswith("Gold of all, best of n")
    assert json.dumps(section, default=asdict) == json.dumps(oo.audit(entries), default=asdict)


def test_intervals_resample_prompts_not_rows():
    proxy, gold = goodhart(20, 32)
    entry = {"name": "a", "proxy_PS": proxy, "gold_PS": gold, "gold_kind": "a rule"}
    once, copied = figures(oo.audit([entry])), figures(oo.audit([entry, entry | {"seed": 1}]))
    for key in ("best_of_n_alpha", "best_of_n_gain", "best_of_n_gap"):
        assert asdict(copied[key]) == pytest.approx(asdict(once[key]) | {"n": 40})


def run(gold, proxy, prompts=40, noise=0.0):
    shift = np.random.default_rng(0).normal(size=prompts)
    rng = np.random.default_rng(1)
    return [
        {"step": 10 * i, "kl_P": np.full(prompts, float(i**2)), "proxy_P": shift + p,
         "gold_P": shift + g + noise * rng.normal(size=prompts)}
        for i, (g, p) in enumerate(zip(gold, proxy, strict=True))
    ]  # fmt: skip


def test_the_checkpoint_to_keep_goes_by_gold():
    kept = oo.checkpoint_to_keep(run([0, 1, 2, 1.5, 1], [0, 1, 2, 3, 4]))
    assert (kept["step"], kept["index"], kept["tied"], kept["earliest"]) == (20, 2, [20], 20)
    assert kept["gap"].value == pytest.approx(1)
    assert kept["onset"] == {"step": 30, "d": 3.0}


def test_no_onset_without_two_falls_in_a_row_under_a_rising_proxy():
    assert oo.checkpoint_to_keep(run([0, 1, 2, 1, 3], [0, 1, 2, 3, 4]))["onset"] is None
    assert oo.checkpoint_to_keep(run([0, 1, 2, 1, 1], [0, 1, 2, 1, 0]))["onset"] is None
    # the mean falls by .1, but by 3 up or down in half of the prompts each: one standard error is about .5
    sway = np.tile([3.0, -3.0], 20)
    rows = run([0, 1, 1, 1], [0, 1, 2, 3])
    for row in rows[2:]:
        row["gold_P"] = row["gold_P"] - 0.1 + sway
    assert oo.checkpoint_to_keep(rows)["onset"] is None
    noisy = oo.checkpoint_to_keep(run([0, 2, 2, 2, 2], [0, 1, 2, 3, 4], noise=0.5))
    assert 0 not in noisy["tied"] and len(noisy["tied"]) >= 2


def test_policies_and_best_of_n_never_share_a_plot():
    proxy, gold = goodhart(30, 32)
    d = np.arange(7.0)
    rows = run(d * (1 - 0.6 * np.log(np.maximum(d, 1))), d, noise=0.01)
    section = oo.audit([{"name": "a", "proxy_PS": proxy, "gold_PS": gold, "gold_kind": "a rule"}],
                       [{"name": "ppo", "rows": rows}])  # fmt: skip
    assert len(section["plots"]) == 2
    found = figures(section)
    assert found["policy_peak"].value == pytest.approx(math.exp(1 / 0.6 - 1), rel=0.05)
    assert found["policy_gap"].low > 0 and found["policy_kept"].value < 1
    assert "ppo: keep step 20" in " ".join(section["notes"])
    seeds = oo.audit(None, [{"name": "ppo", "seed": s, "rows": rows} for s in range(2)])
    assert figures(seeds)["policy_gain"].n == 80


def test_a_peak_far_beyond_what_was_measured_bounds_nothing():
    """Where some resamples hardly bend, their peaks lie at 1e5 and more: the peak has no upper end then."""
    d = np.arange(7.0)
    rows = run(d * (1 - 0.48 * np.log(np.maximum(d, 1))), d, prompts=16, noise=1.5)
    peak = figures(oo.audit(None, [{"name": "ppo", "rows": rows}]))["policy_peak"]
    assert peak.value == pytest.approx(3.2, abs=0.1)
    assert peak.high is None and peak.low is None


def test_nothing_to_go_on():
    assert "gold=" in oo.audit(None, [])["skipped"]
    flat = oo.audit([{"name": "a", "proxy_PS": [[1, 1]], "gold_PS": [[2, 2]], "gold_kind": ""}])
    assert figures(flat)["best_of_n_gain"].value == 0
    one = oo.audit([{"name": "a", "proxy_PS": [[1]], "gold_PS": [[2]], "gold_kind": ""}])
    assert figures(one)["best_of_n_alpha"].value is None
    with pytest.raises(ValueError, match="two rows or more"):
        oo.audit(None, [{"name": "a", "rows": run([0], [0])}])
    single = oo.audit([{"name": "a", "proxy_PS": [range(8)], "gold_PS": [range(8)], "gold_kind": ""}])
    assert figures(single)["best_of_n_alpha"].low is None  # one prompt: nothing to resample
    json.dumps([flat, one, single], allow_nan=False, default=asdict)


def test_a_run_that_was_trained_on_gold_shows_nothing():
    rows = run([0.0, 1.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0])
    for optimised in (False, True):
        part = oo.audit(checkpoints=[{"name": "ppo", "rows": rows, "optimised": optimised}])
        found = {figure.key: figure.estimate.value for figure in part["figures"]}
        assert (found["policy_kept"] is None) == (found["policy_gap"] is None) == optimised
        assert (found["policy_least_gain"] is None) == optimised
        assert any("gold is what the run was trained on" in note for note in part["notes"]) == optimised


def kept_of(*truths, prompts=40, noise=0.3, seed=0):
    """What each of several runs keeps, and the figure that the gate is about."""
    rng = np.random.default_rng(seed)
    runs = []
    for name, truth in zip("abc", truths, strict=False):
        rows = run(truth, range(len(truth)), prompts)
        for row in rows:
            row["gold_P"] = row["gold_P"] + noise * rng.normal(size=prompts)
        runs.append({"name": name, "rows": rows})
    return oo.audit(None, runs)


def test_a_last_checkpoint_that_happens_to_be_the_best_is_not_so_for_sure():
    """The best is picked again in each resample."""
    lucky = 0
    for seed in range(8):
        found = figures(kept_of([0, 1, 1, 1], noise=1, seed=seed))
        gap, kept = found["policy_gap"], found["policy_kept"]
        lucky += gap.value == 0
        assert gap.low < gap.high and kept.low < kept.high <= 1
    assert lucky  # in one of these the last is the best


def test_what_gains_nothing_keeps_nothing():
    for seed in range(5):
        section = kept_of([0, 0], noise=1, seed=seed)
        assert figures(section)["policy_kept"].value is None
        assert "none to lose" in " ".join(section["notes"])


def test_nothing_is_measured_where_no_answers_are_told_apart():
    """By one sample, by the proxy, by gold."""
    moving, still = np.random.default_rng(0).normal(size=(30, 2)), np.full((30, 2), 0.1)
    for proxy, gold in ((moving[:, :1], moving[:, :1]), (still, moving), (moving, still)):
        assert figures(oo.audit([{"name": "a", "proxy_PS": proxy, "gold_PS": gold}]))["best_of_n_gap"].value is None


def test_the_run_that_keeps_least_decides():
    section = kept_of([0, 1, 2], [0, 1.5, -0.5], [0, 1, 2])
    found = figures(section)
    assert found["policy_kept"].value == found["policy_kept_b"].value < 0 < found["policy_kept_a"].low
    assert found["policy_kept"].low < found["policy_kept_b"].low  # one of three
    [gate] = [g for g in verdict.decide([section], {})["gates"] if g.figure == "policy_kept"]
    assert (gate.state, gate.name) == ("fail", "b")
    rows = run([0, 1, 2], [0, 1, 2], 40)
    alone = oo.audit(None, [{"name": "a", "rows": rows, "optimised": True}, {"name": "b", "rows": rows}])
    assert figures(alone)["policy_kept"].value == 1 and figures(alone)["policy_kept_a"].value is None


def test_a_run_that_ends_below_its_start_fails():
    """Not by what it keeps: there is no gain of which it could keep a part."""

    def gate(*truths):
        section = kept_of(*truths)
        gates = {g.threshold: g for g in verdict.decide([section], {})["gates"]}
        return gates["min_gold_gain"], gates["min_gold_kept"].state

    assert (gate([0, -1, -2])[0].state, gate([0, -1, -2])[1]) == ("fail", "not measured")
    assert gate([0, 1, 2])[0].state == "pass" and gate([0, 0.02, 0])[0].state == "unclear"
    found, _ = gate([0, 1, 2], [0, -1, -2])  # the least of several decides
    assert (found.state, found.name) == ("fail", "b")
    assert found.low < gate([0, -1, -2])[0].low or found.low < -2
