"""Estimates by hand, and the properties that an interval must have."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.stats import Estimate


def test_estimate_is_the_mean_with_its_rows_and_clusters():
    e = stats.estimate([1, 0, 1, 1, 0.5], ["a", "a", "b", "c", "c"])
    assert e.value == pytest.approx(0.7)
    assert (e.n, e.clusters) == (5, 3)
    assert e.low < e.value < e.high


def test_two_clusters_by_hand():
    # a draw of two clusters holds only the first in 1/4 of the resamples, only the second in 1/4: both quantiles
    e = stats.estimate([0, 0, 3], ["a", "a", "b"])
    assert (e.value, e.low, e.high) == (1.0, 0.0, 3.0)


def test_the_same_rows_give_the_same_interval():
    values = np.random.default_rng(3).normal(size=50)
    assert stats.estimate(values) == stats.estimate(list(values))


def test_no_rows_and_one_cluster():
    assert stats.estimate([]) == Estimate(None, None, None, 0, 0)
    one = stats.estimate([0.3, 0.4], ["a", "a"])
    assert (one.value, one.low, one.high, one.clusters) == (pytest.approx(0.35), None, None, 1)


def test_all_alike_takes_wilsons_interval_over_clusters():
    # p = 1, n = 10: low = 1 / (1 + z^2 / 10) = 0.7225 (Wilson 1927)
    e = stats.estimate([1] * 10)
    assert (e.low, e.high) == (pytest.approx(1 / (1 + stats.Z95**2 / 10)), pytest.approx(1))
    doubled = stats.estimate([1] * 20, [i // 2 for i in range(20)])
    assert (doubled.low, doubled.n) == (pytest.approx(e.low), 20)
    none = stats.estimate([0] * 10)
    assert (none.low, none.high) == (0, pytest.approx(1 - e.low))
    # an end that misses the value by rounding would be an interval without its value
    alike = [(stats.estimate([0] * n), stats.estimate([1] * n)) for n in range(1, 300)]
    assert all(zeros.low == 0 and ones.high == 1 for zeros, ones in alike)
    assert {stats.simultaneous(ones, 7, 0, 1).high for _, ones in alike} == {1}


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = (rng.random((300, 80)) < 0.6).astype(float)
    intervals = [stats.estimate(draw, resamples=400) for draw in draws]
    covered = np.mean([e.low <= 0.6 <= e.high for e in intervals])
    assert 0.91 <= covered <= 0.98


def test_clustered_rows_cover_only_with_their_clusters():
    rng = np.random.default_rng(1)
    hits = {"rows": 0, "prompts": 0}
    for _ in range(150):
        values, prompts = np.repeat(rng.normal(size=40), 5), np.repeat(np.arange(40), 5)
        rows, clustered = stats.estimate(values, resamples=300), stats.estimate(values, prompts, resamples=300)
        assert clustered.high - clustered.low > 1.5 * (rows.high - rows.low)
        hits["rows"] += rows.low <= 0 <= rows.high
        hits["prompts"] += clustered.low <= 0 <= clustered.high
    assert hits["rows"] / 150 < 0.75
    assert hits["prompts"] / 150 > 0.88


def test_difference_is_paired():
    hardness = np.random.default_rng(2).normal(0, 10, 100)
    e = stats.difference(hardness + 1, hardness)
    assert e.value == pytest.approx(1)
    assert e.high - e.low < 1e-9  # prompts differ a hundred times more than the systems do


def test_ratio_of_sums_and_perplexity_by_hand():
    # 6 nats over 4 tokens, 2 nats over 4 tokens: exp(8 / 8) = e, which the mean of exp(1.5) and exp(0.5) is not
    assert stats.ratio_of_sums([6, 2], [4, 4]).value == 1.0
    e = stats.ratio_of_sums([6, 2], [4, 4], exponential=True)
    assert [e.value, e.low, e.high] == pytest.approx([math.e, math.exp(0.5), math.exp(1.5)])


def test_length_control_recovers_the_win_rate_at_equal_length():
    rng = np.random.default_rng(0)
    longer = rng.normal(10, 20, 3000)
    truth = 1 / (1 + np.exp(-(-0.4 + 2 * np.tanh(longer / longer.std()))))
    wins = (rng.random(3000) < truth).astype(float)
    e = stats.length_controlled_win_rate(wins, longer, resamples=200)
    assert wins.mean() > 0.52  # wins by length alone
    assert e.value == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.03)
    assert e.high < 0.5


def test_length_control_by_hand_where_the_fit_is_saturated():
    # d = -1 wins 1 of 4, d = +1 wins 3 of 4: logits -ln 3 and +ln 3, so ln 1 = 0 at d = 0
    d, wins = [-1] * 4 + [1] * 4, [1, 0, 0, 0, 1, 1, 1, 0]
    assert stats.length_controlled_win_rate(wins, d).value == pytest.approx(0.5, abs=1e-6)
    # d = -1 wins 3 of 4 and d = +1 wins 3 of 4: length says nothing
    wins = [1, 1, 1, 0, 1, 1, 1, 0]
    assert stats.length_controlled_win_rate(wins, d).value == pytest.approx(0.75, abs=2e-3)


@pytest.mark.parametrize(("wins", "lengths"), [([1, 0, 1], [5, 5, 5]), ([1, 1, 1], [1, 2, 3]), ([], [])])
def test_length_control_without_anything_to_control_is_the_plain_rate(wins, lengths):
    assert stats.length_controlled_win_rate(wins, lengths) == stats.estimate(wins)


def test_length_control_stays_finite_where_length_decides_every_win():
    d = np.arange(-20, 21)
    e = stats.length_controlled_win_rate((d > 0).astype(float), d)
    assert 0 <= e.low <= e.value <= e.high <= 1


def test_on_disk_an_estimate_is_an_object_of_its_five_numbers():
    mean, kept = stats.estimate(np.array([1, 2, 2]), ["a", "a", "b"]), {"value": 1.0, "n": 3}
    text = json.dumps({"mean": mean, "other": kept}, default=asdict)
    assert list(json.loads(text)["mean"]) == ["value", "low", "high", "n", "clusters"]
    assert json.loads(text, object_hook=Estimate.of) == {"mean": mean, "other": kept}


def test_an_estimate_in_another_unit():
    percent = Estimate(0.0, None, None, 7, 1).mapped(lambda share: 100 * share - 50)
    assert percent == Estimate(-50.0, None, None, 7, 1)


def test_overlap():
    def interval(low, high):
        return Estimate(low, low, high, 2)

    assert stats.overlap(interval(0, 2), interval(1, 3))
    assert stats.overlap(interval(0, 1), interval(1, 2))
    assert not stats.overlap(interval(0, 1), interval(1.1, 2))
    assert stats.overlap(interval(None, None), interval(1, 2))


def test_needed_by_hand():
    # 100 prompts give +-10 points; 5 points need twice the precision, so four times the prompts, and 80 % power
    # ((1.96 + 0.84) / 1.96)^2 = 2.043 times as many
    e = Estimate(0.55, 0.45, 0.65, 100, 100)
    assert stats.needed(e, 0.5) == pytest.approx(818, abs=1)
    assert stats.needed(replace(e, value=0.5), 0.5) is None
    assert stats.needed(replace(e, low=None), 0.5) is None


@pytest.mark.parametrize(
    ("share", "n", "target", "comparisons"),
    [(0.6, 60, 0.5, 1), (0.62, 40, 0.5, 1), (0.7, 80, 0.65, 1), (0.6, 60, 0.5, 6)],
)
def test_so_many_prompts_settle_it_in_four_of_five_tries(share, n, target, comparisons):
    """Simulated, where the value seen is the true one; half of the tries would be a coin."""

    def found(wins, size):
        """Of so many wins; the interval is Wald's, whose percentile bootstrap it is on average."""
        p = wins / size
        half = stats.Z95 * math.sqrt(p * (1 - p) / size)
        return stats.simultaneous(Estimate(p, p - half, p + half, size, size), comparisons, 0, 1)

    seen = found(share * n, n)
    size = stats.needed(seen, target, comparisons)
    wins = np.random.default_rng(0).binomial(size, share, 2000)
    settled = np.mean([found(each, size).low > target for each in wins])
    assert 0.74 < settled < 0.88, (size, settled)


def test_an_interval_of_several_at_once():
    e = Estimate(0.9, 0.7, 0.98, 40, 40)
    wide = stats.simultaneous(e, 10, 0, 1)
    assert stats.simultaneous(e, 1, 0, 1) is e and 0 < wide.low < 0.7 and 0.98 < wide.high < 1
    # 2.807 standard errors for 10, of 40 clusters 2.807 / sqrt(1 - 2.807^2 / 40) = 3.133
    line = stats.simultaneous(Estimate(2.0, 1.0, 3.0, 40, 40), 10)
    assert (line.low, line.high) == (
        pytest.approx(2 - 3.133 / 1.96, abs=1e-3),
        pytest.approx(2 + 3.133 / 1.96, abs=1e-3),
    )
    alike = stats.simultaneous(stats.estimate([1] * 20), 10, 0, 1)
    assert (alike.low, alike.high) == (pytest.approx(1 / (1 + 2.807**2 / 20), abs=1e-3), 1.0)
    assert stats.simultaneous(stats.estimate([0.3]), 10).low is None
    ends = stats.simultaneous(Estimate(0.95, 0.8, 1.0, 20, 20), 5, 0, 1)
    assert ends.high == 1.0 and 0 < ends.low < 0.8
    assert stats.simultaneous(Estimate(0.9, 0.5, 1.0, 7, 7), 10, 0, 1).low == 0  # so few clusters bound nothing


def test_the_worst_of_several_hides_none_that_is_surely_bad():
    found = {"few": Estimate(0.5, 0.3, 0.7, 24, 24), "many": Estimate(0.52, 0.5, 0.54, 2400, 2400)}
    few, many = (stats.simultaneous(each, 2, 0, 1) for each in found.values())
    name, worst = stats.extreme(found, "higher", 0, 1)
    assert (name, worst.value, worst.n) == ("few", 0.5, 24)
    assert (worst.low, worst.high) == (few.low, many.high) and worst.high < 0.55
    name, worst = stats.extreme(found, "lower", 0, 1)  # the highest is the worst
    assert (name, worst.value, worst.low, worst.high) == ("many", 0.52, many.low, few.high)
    assert stats.extreme({"one": found["few"]}, "lower") == ("one", found["few"])
    single = Estimate(0.4, None, None, 1, 1)
    assert stats.extreme(found | {"single": single}, "higher") == ("single", single)


def test_the_true_best_is_among_those_not_told_apart_from_the_best():
    """Ten checkpoints of one mean: a given one is told apart from whatever looks best in at most 5 % of 200 trials."""
    rng = np.random.default_rng(0)
    lost = once = 0
    for _ in range(200):
        rewards = rng.normal(size=(10, 40)) + rng.normal(size=40)
        best = int(rewards.mean(1).argmax())
        gap = stats.difference(rewards[best], rewards[0], resamples=200)
        lost += best != 0 and stats.ahead(gap, 9)
        once += best != 0 and gap.low > 0  # without a correction
    assert lost <= 10 < once, (lost, once)


def _nearly_all(n=40, seed=0):
    """Values that follow x but for a hair."""
    x = np.random.default_rng(seed).exponential(size=n)
    return x, x + 0.1 * np.random.default_rng(seed + 1).normal(size=n)


RANGES = {
    "correlation": (lambda x, y: stats.pearson(x, y), -1, 1),
    "AUROC": (lambda x, y: stats.auroc(x, y > np.median(y)), 0, 1),
    "share": (lambda x, y: stats.estimate(x < x.max()), 0, 1),
    "ratio": (lambda x, y: stats.ratio_of_sums(x, x + 1e-3), 0, 1),
    "length controlled": (lambda x, y: stats.length_controlled_win_rate(x < x.max(), y), 0, 1),
    "of all at once": (lambda x, y: stats.simultaneous(stats.estimate(x < x.max()), 50, 0, 1), 0, 1),
    "difference of all at once": (
        lambda x, y: stats.simultaneous(stats.difference(x < x.max(), x > 9), 50, -1, 1), -1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_no_interval_leaves_its_range(name):
    measure, low, high = RANGES[name]
    for seed in range(10):
        e = measure(*_nearly_all(seed=seed))
        assert low <= e.low <= e.value <= e.high <= high, (seed, e)


def test_pearson_is_the_resampled_correlation():
    x, y = _nearly_all()
    clusters = [i // 2 for i in range(40)]
    fast, slow = stats.pearson(x, y, clusters), stats.resampled(lambda w: stats.correlation(x, y, w), 40, clusters)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high))
    assert stats.pearson(x, np.ones(40)).value is None and stats.pearson([], []).value is None
    assert stats.pearson([1.0, 2.0], [1.0, 2.0], ["a", "a"]).low is None
    # of two clusters most resamples hold one alone
    assert stats.pearson([1.0, 2.0], [3.0, 4.0]).high <= 1
    with pytest.raises(ValueError, match="must be paired"):
        stats.pearson([1.0], [1.0, 2.0])


def test_format():
    e = Estimate(0.643, 0.6118, 0.6712, 992)
    assert stats.format_estimate(e, percent=True) == "64.3 % [61.2, 67.1]"
    assert stats.format_estimate(e) == "0.643 [0.612, 0.671]"
    assert stats.format_estimate(e, percent=True, sign=True) == "+64.3 % [+61.2, +67.1]"
    assert stats.format_estimate(replace(e, low=None)) == "0.643"
    assert stats.format_estimate(stats.estimate([])) == "–"
    assert stats.format_number(-0.00001) == "0.0"
    assert stats.format_number(12345.6, 0) == "12,346"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: stats.estimate([1.0, float("nan")]), r"values\[1\] = nan: must be finite"),
        (lambda: stats.estimate([1.0, 2.0], ["a"]), "clusters = 1 ids"),
        (lambda: stats.difference([1.0], [1.0, 2.0]), "must be paired"),
        (lambda: stats.ratio_of_sums([1.0], [1.0, 2.0]), "denominators = 2 rows"),
        (lambda: stats.length_controlled_win_rate([1.0], []), "length_differences = 0 rows"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_auroc_by_hand():
    # of the four pairs (positive, negative): 3 > 1, 3 > 2, 2 > 1 and one tie
    e = stats.auroc([3, 2, 2, 1], [True, True, False, False], resamples=200)
    assert e.value == pytest.approx(3.5 / 4) and e.n == 4 and e.low <= e.value <= e.high
    assert stats.auroc([1, 2], [True, True]).value is None
    assert stats.auroc([], []) == Estimate(None, None, None, 0, 0)


def test_two_kinds_are_told_apart_by_no_more_than_the_rarer_has():
    scores = np.random.default_rng(0).normal(size=100)
    assert stats.auroc(scores, np.arange(100) < 3).clusters == 3
    assert stats.auroc(scores, np.arange(100) >= 6, np.arange(100) // 2).clusters == 3


def test_auroc_is_that_of_scikit_learn_for_any_weights():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, positive, weights = rng.integers(0, 9, 80), rng.random(80) < 0.3, rng.integers(0, 3, 80)
    assert stats.area(scores, positive)(weights) == pytest.approx(
        roc_auc_score(positive, scores, sample_weight=weights)
    )


def test_a_draw_of_few_clusters_is_looked_at_once():
    """Of four clusters there are 35: the interval is that of all thousand."""
    x, ids, seen = np.array([0.1, 0.7, 0.2, 0.9, 0.4, 0.3]), np.array([0, 0, 1, 2, 3, 3]), []

    def mean(weights):
        seen.append(weights.tobytes())
        return float((weights * x).sum() / weights.sum())

    found = stats.resampled(mean, 6, ids.tolist())
    once = seen[1:]  # behind the value itself
    drawn = np.random.default_rng(0).multinomial(4, np.full(4, 1 / 4), size=1000).astype(float)[:, ids]
    assert len(once) == len({*once}) == len(np.unique(drawn, axis=0)) <= 35
    assert (found.low, found.high) == tuple(np.quantile([mean(weights) for weights in drawn], (0.025, 0.975)))


def test_resampled_covers_as_the_bootstrap_of_a_mean_does():
    x = np.random.default_rng(5).normal(size=400)
    clusters = np.arange(400) // 2
    mine = stats.resampled(lambda w: float((w * x).sum() / w.sum()), 400, clusters)
    mean = stats.estimate(x, clusters)
    assert mine.value == pytest.approx(mean.value) and mine.clusters == 200
    assert [mine.low, mine.high] == pytest.approx([mean.low, mean.high], abs=0.01)


def test_sigmoid_of_numbers_and_arrays():
    assert stats.sigmoid([0, math.log(3), -math.log(3)]) == pytest.approx([0.5, 0.75, 0.25])
    assert stats.sigmoid(1e6) == 1 and stats.sigmoid(-1e6) == 0


def test_correlation_is_numpys_with_rows_repeated_by_their_weight():
    rng = np.random.default_rng(4)
    x, y, weights = rng.normal(size=50), rng.normal(size=50), rng.integers(0, 4, 50)
    repeated = np.corrcoef(np.repeat(x, weights), np.repeat(y, weights))[0, 1]
    assert stats.correlation(x, y, weights) == pytest.approx(repeated)
    assert math.isnan(stats.correlation(x, np.full(50, 0.1), weights))


def test_temperature_has_the_least_loss():
    rng = np.random.default_rng(6)
    margins = rng.normal(0.3, 2, 80)

    def loss(t: float) -> float:
        return float(np.logaddexp(0, -margins / t).mean())

    best = stats.temperature(margins)
    assert loss(best) <= min(loss(t) for t in np.geomspace(0.05, 50, 2000))
    # ten thousand times the margins, ten thousand times the temperature
    assert stats.temperature(1e4 * margins) == pytest.approx(1e4 * best, rel=1e-9)


def test_calibration_error_by_hand():
    # by confidence: (.6, .7 | 0, 1) gap -.3; (.8, .9 | 1, 1) gap .3
    confidences, correct = np.array([0.9, 0.6, 0.8, 0.7]), np.array([1, 0, 1, 1.0])
    bins = stats.equal_mass_bins(confidences, 2)
    assert bins.tolist() == [1, 0, 1, 0]
    assert stats.calibration_error(bins, correct - confidences) == pytest.approx(0.6 / 4)
    # the row of .6 twice: -.9 of a weight of 5
    assert stats.calibration_error(bins, correct - confidences, np.array([1, 2, 1, 1])) == pytest.approx(1.2 / 5)
