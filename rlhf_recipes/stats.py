"""Estimates with 95 % intervals: means, paired differences, ratios and length-controlled win rates.

Rows that share a prompt are not independent, so every interval resamples *clusters* (prompt ids), never rows:
the percentile bootstrap over clusters (Efron & Tibshirani 1993, chapter 13; Field & Welsh 2007 for clusters).
With fewer than about 20 clusters such an interval is too narrow; a caller that decides something checks it. No
interval leaves the range of what it is of: the statistic itself is resampled, never a linear approximation of it.

On disk an estimate is an object of its five numbers: `json.dumps(..., default=dataclasses.asdict)` writes it,
`json.loads(..., object_hook=Estimate.of)` reads it back.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from statistics import NormalDist

import numpy as np

from rlhf_recipes.errors import Refusal

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
Z80 = 0.8416212335729143  # 80 % quantile: the power that `needed` asks for
BLOCK = 2**20  # numbers of a block of resamples
FEW = 16  # clusters, of which many of a thousand draws are the same
RIDGE = 1e-2  # keeps the logistic fit finite where lengths separate wins from losses


@dataclass(frozen=True)
class Estimate:
    """A number that was measured, with its 95 % interval.

    Attributes:
        value: None without rows.
        low: lower end of the interval; None, as `high`, where a single cluster leaves nothing to resample.
        high: upper end.
        n: rows.
        clusters: independent units among them; 0 where nobody counts them.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int = 0

    @classmethod
    def of(cls, entry: dict) -> "Estimate | dict":
        """The estimate that an object of a JSON file is; any other object, and one without numbers, as it is."""
        names = {field.name for field in fields(cls)}
        if not names - {"clusters"} <= entry.keys() <= names:
            return entry
        measured = all(_is_number(entry[name]) or entry[name] is None for name in ("value", "low", "high"))
        counted = all(_is_number(entry.get(name, 0)) for name in ("n", "clusters"))
        return cls(**entry) if measured and counted else entry

    def mapped(self, f: Callable[[float], float | None]) -> "Estimate":
        """Value and interval in another unit.

        Args:
            f: increasing, where there is an interval.
        """
        value, low, high = (None if x is None else f(x) for x in (self.value, self.low, self.high))
        return replace(self, value=value, low=low, high=high)


def _is_number(value) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**1000)


def estimate(values, clusters=None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean of `values`, shares or numbers from 0 to 1, with a 95 % interval over clusters.

    mean = sum_i x_i / n, resampled as sum_g w_g S_g / sum_g w_g n_g with S_g, n_g the sum and the count of
    cluster g and w ~ Multinomial(G, 1/G). Where all values are 0 (or all 1) every resample is the same, so
    the interval is Wilson's (1927) with n = G, which does not collapse to a point.

    Args:
        values: n finite numbers.
        clusters: n hashable ids (prompts); None makes each row its own cluster.

    Raises:
        Refusal: lengths differ, or a value is not finite.
    """
    values = _finite(values, "values")
    if len(values) and values[0] in (0.0, 1.0) and np.all(values == values[0]):
        return _wilson(values[0], len(values), _count_clusters(clusters, len(values)))
    return mean(values, clusters, resamples, seed)


def mean(values, clusters=None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """As `estimate`, of what is no share: where all values are alike, as a KL to itself is, so is every resample, and
    the interval is that point."""
    values = _finite(values, "values")
    return ratio_of_sums(values, np.ones(len(values)), clusters, resamples=resamples, seed=seed)


def difference(a, b, clusters=None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean of the paired differences a_i - b_i (row i of both is the same prompt), as in `estimate`."""
    a, b = _finite(a, "a"), _finite(b, "b")
    if len(a) != len(b):
        raise Refusal(f"a, b = {len(a)}, {len(b)} rows: must be paired. Keep the rows that both have.")
    return mean(a - b, clusters, resamples, seed)


def ratio_of_sums(
    numerators, denominators, clusters=None, exponential: bool = False, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """sum_i a_i / sum_i b_i with a 95 % interval over clusters; `exponential` takes exp of all three numbers.

    Perplexity is `exponential` over (negative log-likelihoods in nats, tokens): long texts weigh more, as
    they should, which a mean of per-text perplexities would get wrong.
    """
    numerators, denominators = _finite(numerators, "numerators"), _finite(denominators, "denominators")
    ids = _codes(clusters, len(numerators))
    if len(denominators) != len(numerators):
        raise Refusal(f"denominators = {len(denominators)} rows: {len(numerators)} are needed.")
    if denominators.sum() == 0:
        return _result(None, None, None, len(numerators), 0)
    groups = int(ids.max()) + 1
    bounds = (None, None)
    if groups > 1:
        a_R, b_R = _resampled_sums((numerators, denominators), ids, resamples, seed)
        # a resample may hold only clusters without a denominator (empty texts)
        bounds = np.quantile(a_R[b_R != 0] / b_R[b_R != 0], (0.025, 0.975))
    numbers = (numerators.sum() / denominators.sum(), *bounds)
    if exponential:
        numbers = [None if x is None else _exp(x) for x in numbers]
    return _result(*numbers, len(numerators), groups)


def pearson(x, y, clusters=None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Pearson's correlation of n paired numbers with a 95 % interval over clusters, in [-1, 1].

    Every resample has its own means and deviations; those in which x or y does not vary are left out. It is a function
    of six sums, so that millions of rows are resampled as fast as their clusters.
    """
    x, y = _finite(x, "x"), _finite(y, "y")
    if len(x) != len(y):
        raise Refusal(f"x, y = {len(x)}, {len(y)} rows: must be paired. Keep the rows that both have.")
    ids = _codes(clusters, len(x))
    groups = int(ids.max(initial=-1)) + 1
    value = correlation(x, y, np.ones(len(x))) if len(x) else math.nan
    if math.isnan(value) or groups < 2:
        return _result(None if math.isnan(value) else value, None, None, len(x), groups)
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()  # sums of squares far from 0 would lose digits
    columns = (np.ones(len(x)), x, y, x * x, y * y, x * y)
    n_R, x_R, y_R, xx_R, yy_R, xy_R = _resampled_sums(columns, ids, resamples, seed)
    spreads_R = np.maximum(n_R * xx_R - x_R**2, 0) * np.maximum(n_R * yy_R - y_R**2, 0)
    vary_R = spreads_R > 1e-24 * n_R**4
    found_R = ((n_R * xy_R - x_R * y_R)[vary_R] / np.sqrt(spreads_R[vary_R])).clip(-1, 1)
    return _result(value, *np.quantile(found_R, (0.025, 0.975)), len(x), groups)


def resampled(statistic: Callable, n: int, clusters=None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Any statistic of weighted rows, with a 95 % interval over clusters; one resample at a time, so in flat memory.

    Few clusters are drawn alike again and again: each draw is looked at once.

    Args:
        statistic: weights of the n rows (how often each was drawn, all 1 for the value itself) -> a number, or nan
            where such a draw does not define it; those resamples are left out. The same weights give the same number.
    """
    ids = _codes(clusters, n)
    value = statistic(np.ones(n)) if n else math.nan
    groups = int(ids.max()) + 1 if n else 0
    if math.isnan(value):
        return _result(None, None, None, n, groups)
    if groups < 2:
        return _result(value, None, None, n, groups)
    known: dict[bytes, float] = {}

    def of(weights_G: np.ndarray) -> float:
        if groups > FEW:
            return statistic(weights_G[ids])
        draw = weights_G.tobytes()
        if draw not in known:
            known[draw] = statistic(weights_G[ids])
        return known[draw]

    drawn = (of(weights_G) for weights_RG in _weights(groups, resamples, seed) for weights_G in weights_RG)
    found = [x for x in drawn if not math.isnan(x)]
    return _result(value, *np.quantile(found, (0.025, 0.975)), n, groups)


def auroc(scores, positive, clusters=None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Probability that a positive row scores above a negative one, a tie counting one half; 1/2 is a coin.

    Args:
        scores: n finite numbers.
        positive: n booleans. All alike: `value` is None.

    Returns:
        With the clusters of the rarer kind, `of_rarer`.
    """
    scores, positive = _finite(scores, "scores"), np.asarray(list(positive), dtype=bool)
    if len(scores) != len(positive):
        raise Refusal(f"positive = {len(positive)} rows: {len(scores)} scores. Pass as many.")
    return of_rarer(resampled(area(scores, positive), len(scores), clusters, resamples, seed), positive, clusters)


def of_rarer(e: Estimate, positive, clusters=None) -> Estimate:
    """The estimate of what tells two kinds of rows apart, with the clusters of the rarer kind: no more carry it,
    however many the other kind has."""
    positive = np.asarray(list(positive), dtype=bool)
    ids = _codes(clusters, len(positive))
    return replace(e, clusters=min(len(np.unique(ids[side])) for side in (positive, ~positive)))


def area(scores_N: np.ndarray, positive_N: np.ndarray) -> Callable[[np.ndarray], float]:
    """AUROC as a statistic of weights, for `resampled`: scores are ranked once, so that a resample costs O(n)."""
    codes = np.unique(scores_N, return_inverse=True)[1]
    size = codes.max(initial=-1) + 1

    def of(weights_N: np.ndarray) -> float:
        above, below = (np.bincount(codes, weights_N * side, size) for side in (positive_N, ~positive_N))
        total = above.sum() * below.sum()
        return float(above @ (np.cumsum(below) - 0.5 * below)) / total if total else math.nan

    return of


def length_controlled_win_rate(
    wins, length_differences, clusters=None, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Win rate that would remain if both answers had the same length.

    AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475) without its terms per instruction:

        P(win_i) = sigmoid(a + b * tanh(d_i / s)),  win rate at d = 0 is sigmoid(a)

    with d_i the length of the system's answer minus the opponent's and s the standard deviation of d. Fitted
    by Newton's method with a small ridge; the interval refits every resample of clusters. Where lengths do
    not vary, or every row is won (or lost), nothing can be controlled for: the plain win rate is returned.

    Args:
        wins: n numbers in [0, 1]; 0.5 is a tie, a judge's probability is taken as it is.
        length_differences: n numbers in one unit (tokens here).
    """
    wins, lengths = _finite(wins, "wins"), _finite(length_differences, "length_differences")
    if len(wins) != len(lengths):
        raise Refusal(f"length_differences = {len(lengths)} rows: {len(wins)} wins. Pass as many.")
    if len(wins) == 0 or lengths.std() == 0 or np.all(wins == wins[0]):
        return estimate(wins, clusters, resamples, seed)
    ids = _codes(clusters, len(wins))
    groups = int(ids.max()) + 1
    x = np.tanh(lengths / lengths.std())
    start = _logistic(np.ones((1, len(wins))), x, wins, np.zeros((1, 2)), steps=50)
    low = high = None
    if groups > 1:
        weights_RN = np.concatenate(list(_weights(groups, resamples, seed)))[:, ids]
        refits_R2 = _logistic(weights_RN, x, wins, np.repeat(start, resamples, axis=0), steps=12)
        low, high = np.quantile(sigmoid(refits_R2[:, 0]), (0.025, 0.975))
    return _result(sigmoid(start[0, 0]), low, high, len(wins), groups)


def sigmoid(x):
    """1 / (1 + exp(-x)) of a number or an array, without overflow at either end."""
    return 0.5 * (1 + np.tanh(np.asarray(x, float) / 2))


def correlation(x, y, weights) -> float:
    """Pearson's r of weighted rows; nan where x or y does not vary."""
    x, y = x - np.average(x, weights=weights), y - np.average(y, weights=weights)
    xx, yy = (weights * x * x).sum(), (weights * y * y).sum()
    if min(xx, yy) <= 1e-24 * weights.sum():
        return math.nan
    return float((weights * x * y).sum() / math.sqrt(xx * yy))


def equal_mass_bins(values, bins: int) -> np.ndarray:
    """Bin of each value, shape (n,), by rank, so that bins hold equally many; equal values share a bin."""
    values = np.asarray(values, float)
    ranks = np.searchsorted(np.sort(values), values, side="left")
    return ranks * bins // max(1, len(values))


def calibration_error(bins_N, gaps_N, weights_N=None) -> float:
    """Expected calibration error: sum_b |sum_i in b w_i gap_i| / sum_i w_i.

    Args:
        bins_N: bin of each row, of `equal_mass_bins` of the confidences.
        gaps_N: correct (1, 0, or 0.5 for a tie) less confidence.
    """
    weights_N = np.ones(len(gaps_N)) if weights_N is None else weights_N
    return float(np.abs(np.bincount(bins_N, weights_N * gaps_N)).sum() / weights_N.sum())


def temperature(margins, weights=None) -> float:
    """T of the least mean NLL of sigmoid(margin / T) (Guo et al. 2017, arXiv:1706.04599).

    0 where no pair is wrong, since any smaller T is better; infinite where the mean margin is not above 0, since a
    coin is better than any T.

    Args:
        margins: n log-odds of the right label in nats, below 0 where a pair is wrong.
    """
    margins = np.asarray(margins, float)
    weights = np.ones(len(margins)) if weights is None else weights
    drawn = margins[weights > 0]
    if not (drawn < 0).any():
        return 0.0
    if weights @ margins <= 0:
        return math.inf
    scale = float(np.abs(drawn).max())
    scaled = margins / scale

    def slope(b: float) -> float:
        """Derivative of the log-likelihood by b = scale / T: above 0 at b = 0, and falling."""
        return float(weights @ (scaled * sigmoid(-b * scaled)))

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return scale / high


def overlap(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals share a point; an unknown bound excludes nothing."""
    if None in (a.low, a.high, b.low, b.high):
        return True
    return a.low <= b.high and b.low <= a.high


def simultaneous(e: Estimate, comparisons: int, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """The estimate with an interval that is one of `comparisons`, all of which hold at once in 95 % of cases
    (Bonferroni): the best of many is no longer ahead by having been picked.

    Each end moves away from the value to z / sqrt(1 - z^2 / clusters) in place of z(0.975) standard errors, with z the
    normal quantile of 1 - 0.025 / comparisons: the score test's, whose variance is about the limit and not about the
    value, since so far out a normal interval of few clusters is too narrow. Between `low` and `high`, which it never
    leaves, it moves on the scale of log-odds. Where every row is alike it is Wilson's interval at that level.
    """
    if comparisons < 2 or e.low is None:
        return e
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    if (low, high) == (0, 1) and e.value in (0.0, 1.0):
        return _wilson(e.value, e.n, e.clusters, z)
    stretch = z / math.sqrt(1 - z**2 / e.clusters) / Z95 if e.clusters > z**2 else math.inf
    bounded = math.isfinite(high - low) and low < e.value < high

    def unbound(x: float) -> float:
        with np.errstate(divide="ignore"):  # an end of the range is infinitely far
            return float(np.log(x - low) - np.log(high - x)) if bounded else x

    def moved(end: float) -> float:
        if end == e.value:
            return end
        x = unbound(e.value) + stretch * (unbound(end) - unbound(e.value))
        return low + (high - low) * float(sigmoid(x)) if bounded else min(max(x, low), high)

    return replace(e, low=moved(e.low), high=moved(e.high))


def extreme(
    found: dict[str, Estimate], better: str, low: float = -math.inf, high: float = math.inf
) -> tuple[str, Estimate]:
    """Name and value of the worst of several, with an interval that is one of all at once.

    Its ends are the worst of all ends, be they those of the one that is named or not: one that is surely bad is not
    hidden by one that looks worse and of which little is known.

    Args:
        found: at least one, each with a value.
        better: higher | lower, which way is better; the worst is the lowest or the highest.
        low, high: of the range, as in `simultaneous`.
    """
    worst = {"higher": min, "lower": max}[better]
    name = worst(found, key=lambda name: found[name].value)
    at_once = [simultaneous(e, len(found), low, high) for e in found.values() if e.low is not None]
    if found[name].low is None:
        return name, found[name]
    ends = (worst(e.low for e in at_once), worst(e.high for e in at_once))
    return name, replace(found[name], low=ends[0], high=ends[1])


def ahead(difference: Estimate, others: int) -> bool:
    """Whether what was picked as the best of `others` + 1 is told apart from one of them, by their paired difference.

    In 95 % of cases the true best is among those that are not (multiple comparisons with the best, Hsu 1984, Annals of
    Statistics 12, 1136; here by Bonferroni).
    """
    low = simultaneous(difference, others).low
    return low is not None and low > 0


def needed(e: Estimate, target: float, comparisons: int = 1) -> int | None:
    """Roughly how many clusters would put `target` outside the interval in four of five tries (80 % power), if the
    value is the true one.

    The half-width shrinks with the square root of the clusters, and another sample's value lies on either side of the
    true one: needed = clusters * (half-width / |value - target| * (z + z(0.8)) / z)^2, z that of the interval.
    None where that cannot be said (no interval, or the value is the target).

    Args:
        comparisons: those for which the interval is `simultaneous`.
    """
    if e.low is None or e.value == target:
        return None
    half = e.value - e.low if e.value > target else e.high - e.value
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    return math.ceil(e.clusters * (half / (e.value - target) * (z + Z80) / z) ** 2)


def format_estimate(e: Estimate | None, percent: bool = False, digits: int | None = None, sign: bool = False) -> str:
    """`64.3 % [61.2, 67.1]`; the value alone without an interval (or one of no width), else a dash."""
    if e is None or e.value is None:
        return "–"
    scale, unit = (100, " %") if percent else (1, "")
    digits = (1 if percent else 3) if digits is None else digits
    value, low, high = (
        None if x is None else format_number(x * scale, digits, sign) for x in (e.value, e.low, e.high)
    )
    bare = low is None or e.low == e.high
    return f"{value}{unit}" if bare else f"{value}{unit} [{low}, {high}]"


def format_number(x: float, digits: int = 1, sign: bool = False) -> str:
    """Fixed digits, thousands separated, never `-0.0`."""
    return f"{round(x, digits) + 0.0:{'+' if sign else ''},.{digits}f}"


def _result(value, low, high, n, clusters) -> Estimate:
    """Of numpy's numbers, which JSON does not know."""
    return Estimate(*(None if x is None else float(x) for x in (value, low, high)), int(n), int(clusters))


def _wilson(p: float, n: int, clusters: int, z: float = Z95) -> Estimate:
    """Wilson's score interval of the proportion p at n = clusters."""
    z2 = z**2
    centre = (p + z2 / (2 * clusters)) / (1 + z2 / clusters)
    half = z / (1 + z2 / clusters) * math.sqrt(p * (1 - p) / clusters + z2 / (4 * clusters**2))
    # at 0 and at 1 one end is p itself, but for rounding
    low, high = 0.0 if p == 0 else max(0.0, centre - half), 1.0 if p == 1 else min(1.0, centre + half)
    return _result(p, low, high, n, clusters)


def _finite(values, name: str) -> np.ndarray:
    values = np.asarray(list(values), dtype=float)
    if not np.all(np.isfinite(values)):
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise Refusal(f"{name}[{row}] = {values[row]}: must be finite. Drop and count such rows first.")
    return values


def _codes(clusters, n: int) -> np.ndarray:
    """Cluster ids as 0..G-1 in the order of first appearance, shape (n,)."""
    if clusters is None:
        return np.arange(n)
    clusters = list(clusters)
    if len(clusters) != n:
        raise Refusal(f"clusters = {len(clusters)} ids: {n} values. Pass one id for each value.")
    order = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    return np.array([order[c] for c in clusters], dtype=int)


def _count_clusters(clusters, n: int) -> int:
    return len(set(_codes(clusters, n)))


def _resampled_sums(columns, ids_N: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The sum of each column over the rows of each resample of clusters, shape (columns, R)."""
    groups = int(ids_N.max()) + 1
    sums_GK = np.stack([np.bincount(ids_N, column, groups) for column in columns], 1)
    return np.concatenate([weights_RG @ sums_GK for weights_RG in _weights(groups, resamples, seed)]).T


def _weights(groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn in each resample, shape (R, G), in blocks of some: many clusters take no more
    memory than few."""
    if groups * resamples <= BLOCK:
        yield _few_weights(groups, resamples, seed)
        return
    rng, rows = np.random.default_rng(seed), max(1, BLOCK // groups)
    for start in range(0, resamples, rows):
        yield _draw(rng, groups, min(rows, resamples - start))


@functools.lru_cache(maxsize=4)  # a report's figures are of the same clusters, and to draw takes most of their time
def _few_weights(groups: int, resamples: int, seed: int) -> np.ndarray:
    weights_RG = _draw(np.random.default_rng(seed), groups, resamples)
    weights_RG.flags.writeable = False
    return weights_RG


def _draw(rng: np.random.Generator, groups: int, resamples: int) -> np.ndarray:
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)


def _logistic(weights_RN, x_N, y_N, start_R2, steps: int) -> np.ndarray:
    """Newton's method for R weighted logistic regressions y ~ a + b x at once; (a, b) as shape (R, 2)."""
    a, b = start_R2[:, 0].copy(), start_R2[:, 1].copy()
    for _ in range(steps):
        p = sigmoid(a[:, None] + b[:, None] * x_N)
        error, curve = weights_RN * (y_N - p), weights_RN * p * (1 - p)
        gradient_a, gradient_b = error.sum(1) - RIDGE * a, error @ x_N - RIDGE * b
        h_aa, h_ab, h_bb = curve.sum(1) + RIDGE, curve @ x_N, curve @ x_N**2 + RIDGE
        determinant = h_aa * h_bb - h_ab**2
        step_a = (h_bb * gradient_a - h_ab * gradient_b) / determinant
        step_b = (h_aa * gradient_b - h_ab * gradient_a) / determinant
        a += np.clip(step_a, -2, 2)  # a full step can overshoot where the fit is nearly separable
        b += np.clip(step_b, -2, 2)
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return np.stack([a, b], axis=1)


def _exp(x: float) -> float:
    return float(np.exp(min(x, 700.0)))  # a diverged model overflows a double
