"""Calibration: whether a reward model that is 80 % sure is right 80 % of the time.

P(chosen better) = sigmoid(margin / T). The label is always "chosen", so what is checked is symmetrised: confidence
max(P, 1 - P) in [0.5, 1], correct where margin > 0, a tie one half. Where the label is a probability p, "chosen" is
the better answer in a share p of the outcomes, and the rejected one in the rest.

Shapes: N pairs; p_N is 1 where a label is certain.
"""

import math
from dataclasses import replace
from functools import cache

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import section
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.errors import Refusal

KEY, TITLE = "calibration", "Calibration"
QUESTION = "When the reward model is sure, is it right as often as it claims?"
BINS, IN_A_BIN = 15, 10  # at most, and at least in each: fewer pairs say nothing of a share
# Of the gate's error: its noise grows with the bins. Of 60 perfectly calibrated models (margins of sd 1.2) 59 pass the
# limit of 5 points with so many pairs, 49 with 1,500.
GATE_BINS, GATE_PAIRS = 5, 2000
DRAWS = 200
COIN = "a coin"
_NONE = stats.estimate([])


def probability(margins, temperature: float = 1.0) -> np.ndarray:
    """sigmoid(margin / T)."""
    return stats.sigmoid(np.asarray(margins, float) / temperature)


def symmetrise(margins, temperature: float = 1.0, p_N=1.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidence in [0.5, 1] and correct (1, 0, or 0.5 for a tie; p and 1 - p of a probability), each shape (N,)."""
    margins = np.asarray(margins, float)
    return probability(np.abs(margins), temperature), 0.5 * (1 + np.sign(margins) * (2 * np.asarray(p_N, float) - 1))


def bins_for(size: int) -> int:
    """How many bins so many pairs are put into."""
    return max(1, min(BINS, size // IN_A_BIN))


def ece(confidences, correct, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass."""
    confidences = np.asarray(confidences, float)
    return stats.calibration_error(stats.equal_mass_bins(confidences, bins), np.asarray(correct, float) - confidences)


def squared_error(bins_N, gaps_N, weights_N=None, noise: float = 1.0) -> float:
    """Squared calibration error, sum_b n_b/n (mean_b(gap)^2 - noise var_b(gap) / (n_b - 1)), without what chance adds
    to the square of a mean (Kumar et al. 2019, arXiv:1909.10155): 0 on average of a perfectly calibrated model.

    Args:
        bins_N, gaps_N, weights_N: as in `stats.calibration_error`.
        noise: how often chance was added: 2 in a resample of rows that are a sample themselves.
    """
    weights_N = np.ones(len(gaps_N)) if weights_N is None else weights_N
    n, total, squares = (np.bincount(bins_N, weights_N * gaps_N**power) for power in (0, 1, 2))
    n, total, squares = n[n > 1], total[n > 1], squares[n > 1]
    if not len(n):
        return math.nan
    means = total / n
    return float((n @ (means**2 - noise * (squares / n - means**2) / (n - 1))) / n.sum())


def debiased_error(confidences, correct, ids) -> stats.Estimate:
    """Root of `squared_error`, 0 where that is below 0, with its percentile interval; no value under `GATE_PAIRS`."""
    if len(correct) < GATE_PAIRS:
        return _NONE
    codes, gaps = stats.equal_mass_bins(confidences, GATE_BINS), np.asarray(correct, float) - confidences
    found = stats.resampled(lambda weights: squared_error(codes, gaps, weights, noise=2.0), len(gaps), ids)
    found = replace(found, value=squared_error(codes, gaps))
    return found.mapped(lambda square: math.sqrt(max(0.0, square)))


def chance_ece(confidences, bins: int = BINS, seed: int = 0) -> tuple[float, float]:
    """Mean and 95 % quantile of the ECE that a perfectly calibrated model with these confidences has by chance.

    ECE is a sum of absolute values, so it is above 0 for any finite N: correct ~ Bernoulli(confidence), drawn anew.
    """
    confidences, rng = np.asarray(confidences, float), np.random.default_rng(seed)
    codes = stats.equal_mass_bins(confidences, bins)
    drawn = [(rng.random(len(codes)) < confidences) - confidences for _ in range(DRAWS)]
    found = [stats.calibration_error(codes, gaps) for gaps in drawn]
    return float(np.mean(found)), float(np.quantile(found, 0.95))


def brier(margins, temperature: float = 1.0, p_N=1.0) -> np.ndarray:
    """p (1 - P)^2 + (1 - p) P^2 of each pair, shape (N,); a coin has 0.25."""
    found_N, p_N = probability(margins, temperature), np.asarray(p_N, float)
    return p_N * (1 - found_N) ** 2 + (1 - p_N) * found_N**2


def nll(margins, temperature: float = 1.0, p_N=1.0) -> np.ndarray:
    """-p ln P - (1 - p) ln(1 - P) of each pair in nats, shape (N,); a coin has ln 2."""
    scaled_N = np.asarray(margins, float) / temperature
    return np.logaddexp(0, -scaled_N) + (1 - np.asarray(p_N, float)) * scaled_N


def temperature(margins, weights=None, p_N=1.0) -> float | None:
    """`stats.temperature`; None where no T is best: no pair is wrong, or a coin is better than any."""
    margins, p_N = np.asarray(margins, float), np.broadcast_to(np.asarray(p_N, float), len(margins))
    if (p_N < 1).any():  # both outcomes, each by its share
        weights = np.ones(len(margins)) if weights is None else weights
        margins, weights = np.concatenate([margins, -margins]), np.concatenate([weights * p_N, weights * (1 - p_N)])
    found = stats.temperature(margins, weights)
    return found if 0 < found < math.inf else None


def logistic(x, y, weights=None, shares=None) -> tuple[float, float]:
    """Intercept a and slope b of P(y = 1) = sigmoid(a + b x), by likelihood; nan, nan where x separates y.

    Args:
        shares: of the outcomes in which y is as it stands; in the others it is the opposite. None: all.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = np.asarray(x, float), np.asarray(y, float)
    weights = np.ones(len(x)) if weights is None else weights
    if shares is not None:
        x, y = np.concatenate([x, x]), np.concatenate([y, 1 - y])
        weights = np.concatenate([weights * shares, weights * (1 - shares)])
    drawn = weights > 0
    if _separated(x[drawn], y[drawn]):
        return math.nan, math.nan
    scale = float(np.abs(x).max())
    fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    fit.fit((x / scale)[:, None], y > 0.5, sample_weight=weights)
    return float(fit.intercept_[0]), float(fit.coef_[0, 0] / scale)


def audit(
    validation_margins,
    margins,
    rows: list[dict],
    validation_ids=None,
    bins: int | None = None,
    seed: int = 0,
    validation_p=1.0,
) -> dict:
    """Calibration of one reward model (of an ensemble: of its mean), before and after a temperature.

    Args:
        validation_margins: margins of pairs that are not among `rows`; the temperature is fitted to them alone. May
            be empty: nothing is shown after a temperature then.
        margins: chosen minus rejected of the N pairs of `rows`.
        validation_ids: clusters of the validation pairs, for the temperature's interval.
        bins: by default `bins_for` the N pairs.
        validation_p: of the validation pairs; that of `rows` stands in them.
    """
    validation, margins = _finite(validation_margins, "validation_margins"), _finite(margins, "margins")
    if len(margins) != len(rows):
        raise Refusal(f"margins = {len(margins)} numbers: {len(rows)} rows. Pass one for each row.")
    if not len(margins):
        return section.skipped(KEY, TITLE, QUESTION, "Give test pairs and their margins.")
    ids, bins = clusters(rows), bins or bins_for(len(rows))
    p_N = np.array([1.0 if row.get("p") is None else row["p"] for row in rows])
    fitted = temperature(validation, p_N=validation_p)
    figures, tables, curves = [], [], []
    chances = [t and chance_ece(symmetrise(margins, t)[0], bins, seed=seed) for t in (1.0, fitted)]
    rate = float(np.mean(symmetrise(validation, 1.0, validation_p)[1])) if len(validation) else None
    for t, chance, after in zip((1.0, fitted), chances, (False, True), strict=True):
        figures += _errors(margins, p_N, t, ids, bins, chance, after)
        if t is not None:
            curves.append(_reliability(margins, p_N, t, ids, f"T = {t:.2f}", bins))
    exact = _NONE if fitted is None else debiased_error(*symmetrise(margins, fitted, p_N), ids)
    figures.append(section.figure(
        "error_after", "Calibration error less chance, after the temperature", exact, unit="%", better="lower",
        baseline=("a perfectly calibrated model", 0.0), says="√Σ_b n_b/N ((share right − mean confidence)² − its "
        f"variance by chance), {GATE_BINS} bins of equal mass (arXiv:1909.10155); from {GATE_PAIRS:,} pairs on.",
    ))  # fmt: skip
    figures += _slopes(margins, p_N, ids, fitted, seed)
    figures.append(section.figure(
        "temperature", "Temperature", _temperature(validation, validation_p, validation_ids, fitted),
        baseline=("as trained", 1.0),
        says="T that margins are to be divided by, of the least NLL on the validation pairs (arXiv:1706.04599).",
    ))  # fmt: skip
    if fitted is not None:
        gain = stats.difference(brier(margins, 1.0, p_N), brier(margins, fitted, p_N), ids)
        figures.append(section.figure("brier_gain", "Brier score saved by the temperature", gain, better="higher",
                                      baseline=("no temperature", 0.0), says="Paired by pair."))  # fmt: skip
    t = fitted or 1.0
    tables = [_summary(margins, p_N, fitted, rate), _by_bin(margins, p_N, t, ids, bins)]
    if families := _by_family(margins, p_N, t, rows, ids, seed):
        tables.append(families)
    diagonal = section.curve("perfect", [0.5, 1.0], [0.5, 1.0], points=False)
    plot = section.lines("Reliability: how often it is right, by how sure it is (with 95 % intervals)",
                         "confidence", "share right", [*curves, diagonal])  # fmt: skip
    notes = _notes(validation, margins, fitted, chances[0], bins)
    if (p_N < 1).any():
        notes.append(
            "Labels are probabilities p: of a pair p or 1 − p is right. Errors by chance are of certain labels."
        )
    return section.section(KEY, TITLE, QUESTION, figures=figures, tables=tables, plots=[plot], notes=notes)


def _reflected(e: stats.Estimate) -> stats.Estimate:
    """The basic bootstrap interval, 2 value - quantiles: an ECE of resamples is biased upward once more, and the
    percentiles with it, by about as much as the ECE itself (Efron & Tibshirani 1993, section 13.4); at least the value
    itself is in it."""
    if e.low is None:
        return e
    low, high = max(0.0, 2 * e.value - e.high), min(1.0, 2 * e.value - e.low)
    return replace(e, low=min(e.value, low), high=max(e.value, high))


def _separated(x, y) -> bool:
    """Whether a threshold on x parts y (ties allowed), so that no finite slope is best."""
    ones, zeros = x[y > 0.5], x[y <= 0.5]
    if not len(ones) or not len(zeros) or x.min() == x.max():
        return True
    return ones.min() >= zeros.max() or ones.max() <= zeros.min()


def _errors(margins, p_N, t, ids, bins: int, chance: tuple[float, float] | None, after: bool) -> list[section.Figure]:
    """ECE, beside `chance_ece`, Brier and NLL at temperature t; without a value where there is no t."""
    found = {"ece": _NONE, "brier": _NONE, "nll": _NONE}
    if t is not None:
        confidences, correct = symmetrise(margins, t, p_N)
        codes, gaps = stats.equal_mass_bins(confidences, bins), correct - confidences
        error = stats.resampled(lambda weights: stats.calibration_error(codes, gaps, weights), len(gaps), ids)
        found = {
            "ece": _reflected(error),
            "brier": stats.estimate(brier(margins, t, p_N), ids),
            "nll": stats.mean(nll(margins, t, p_N), ids),
        }
    by_chance = chance and ("a perfectly calibrated model by chance", chance[0])
    suffix, when = ("_after", " after the temperature") if after else ("", "")
    texts = {
        "ece": ("Expected calibration error", "%", by_chance,
                f"Σ_b n_b/N |share right − mean confidence|, {_bins(bins)} of equal mass, confidence max(P, 1−P)."),
        "brier": ("Brier score", "", (COIN, 0.25), "Mean (1 − P)², P = sigmoid(margin / T)."),
        "nll": ("Negative log-likelihood", "nats", (COIN, math.log(2)), "Mean −ln P, P = sigmoid(margin / T)."),
    }  # fmt: skip
    return [
        section.figure(key + suffix, title + when, found[key], unit=unit, better="lower", baseline=base, says=says)
        for key, (title, unit, base, says) in texts.items()
    ]


def _slopes(margins, p_N, ids, fitted, seed: int) -> list[section.Figure]:
    """Slope and intercept; dividing margins by T multiplies the slope by T and leaves the intercept."""
    y = np.random.default_rng(seed).integers(0, 2, len(margins))
    x = np.where(y == 1, margins, -margins)
    shares = p_N if (p_N < 1).any() else None

    @cache  # slope and intercept ask for the same resamples
    def fit(weights: bytes) -> tuple[float, float]:
        return logistic(x, y, np.frombuffer(weights), shares)

    def estimate(which: int) -> stats.Estimate:
        return stats.resampled(lambda weights: fit(weights.tobytes())[which], len(x), ids, resamples=300)

    intercept, slope = estimate(0), estimate(1)
    after = _NONE if fitted is None else slope.mapped(lambda b: b * fitted)
    says = (
        "b of P(first better) = sigmoid(a + b · margin), pairs in random order; under 1: too sure, over 1: not enough."
    )
    check = "a of the same fit: near 0 by the random order, a check on the fit rather than on the model."
    title, ideal = "Calibration slope", ("ideal", 1.0)
    return [
        section.figure("slope", title, slope, baseline=ideal, says=says),
        section.figure("slope_after", f"{title} after the temperature", after, baseline=ideal, says=says),
        section.figure("intercept", "Calibration intercept", intercept, baseline=("ideal", 0.0), says=check),
    ]


def _temperature(validation, p_N, ids, fitted) -> stats.Estimate:
    if fitted is None:
        return _NONE

    def statistic(weights) -> float:
        found = temperature(validation, weights, p_N)
        return math.nan if found is None else found

    return stats.resampled(statistic, len(validation), ids, resamples=300)


def _reliability(margins, p_N, t: float, ids, name: str, bins: int) -> dict:
    confidences, correct = symmetrise(margins, t, p_N)
    groups = _groups(stats.equal_mass_bins(confidences, bins))
    at = [stats.estimate(correct[group], [ids[i] for i in group]) for group in groups]
    low = [e.value if e.low is None else e.low for e in at]
    high = [e.value if e.high is None else e.high for e in at]
    return section.curve(
        name, [float(confidences[group].mean()) for group in groups], [e.value for e in at], low, high
    )


def _groups(codes) -> list[np.ndarray]:
    return [np.flatnonzero(codes == code) for code in np.unique(codes)]


def _by_bin(margins, p_N, t: float, ids, bins: int) -> dict:
    confidences, correct = symmetrise(margins, t, p_N)
    rows = []
    for group in _groups(stats.equal_mass_bins(confidences, bins)):
        low, high, mean = (100 * f(confidences[group]) for f in (np.min, np.max, np.mean))
        right = stats.estimate(correct[group], [ids[i] for i in group])
        rows.append([f"{low:.1f} to {high:.1f} %", len(group), f"{mean:.1f} %", right])
    return section.table(
        f"Share right by confidence, T = {t:.2f}", ["confidence", "n", "mean confidence", "right"], rows
    )


def _summary(margins, p_N, fitted, rate) -> dict:
    """Scores beside what needs no margin's size: a coin, and one confidence for all, the accuracy on validation."""
    _, correct = symmetrise(margins, 1.0, p_N)
    accuracy = float(correct.mean())
    rows = [["as trained (T = 1)", accuracy, *(round(float(f(margins, 1.0, p_N).mean()), 4) for f in (brier, nll))]]
    if fitted is not None:
        scores = (round(float(f(margins, fitted, p_N).mean()), 4) for f in (brier, nll))
        rows.append([f"with T = {fitted:.2f}", accuracy, *scores])
    if rate is not None and 0 < rate < 1:
        loss = -accuracy * math.log(rate) - (1 - accuracy) * math.log(1 - rate)
        score = accuracy * (1 - rate) ** 2 + (1 - accuracy) * rate**2
        rows.append([f"always {rate:.0%} sure (base rate of validation)", accuracy, round(score, 4), round(loss, 4)])
    rows.append([COIN, 0.5, 0.25, round(math.log(2), 4)])
    rows = [[name, f"{100 * share:.1f} %", *rest] for name, share, *rest in rows]
    return section.table("Against what needs no margin", ["", "accuracy", "Brier", "NLL (nats)"], rows)


def _by_family(margins, p_N, t: float, rows: list[dict], clusters_N: list[str], seed: int) -> dict | None:
    confidences, correct = symmetrise(margins, t, p_N)
    lines = []
    for family in sorted({row["family"] for row in rows if row["family"] is not None}):
        at = [i for i, row in enumerate(rows) if row["family"] == family]
        ids, bins = [clusters_N[i] for i in at], bins_for(len(at))
        error = ece(confidences[at], correct[at], bins)
        chance, _ = chance_ece(confidences[at], bins, seed=seed)
        over = stats.difference(confidences[at], correct[at], ids)
        lines.append([family, len(at), stats.estimate(correct[at], ids), f"{100 * confidences[at].mean():.1f} %", over,
                      f"{100 * error:.1f} %", f"{100 * chance:.1f} %"])  # fmt: skip
    lines.sort(key=lambda line: -abs(line[4].value))
    columns = ["family", "n", "right", "confidence", "confidence − right", "ECE", "ECE by chance"]
    note = f"At T = {t:.2f}, worst first. Read ECE against ECE by chance: with few pairs both are large."
    return section.table("Calibration by family", columns, lines, note) if lines else None


def _notes(validation, margins, fitted, chance: tuple[float, float], bins: int) -> list[str]:
    mean, top = chance
    notes = [
        f"With {len(margins)} pairs in {_bins(bins)} a perfectly calibrated model has an ECE of {100 * mean:.1f} % by "
        f"chance, and above {100 * top:.1f} % once in twenty: less than that cannot be told from calibrated."
    ]  # fmt: skip
    if fitted is None:
        why = (
            "no validation pairs were given" if not len(validation)
            else "no validation pair is ranked wrong, so any smaller T fits better" if validation.min() >= 0
            else "the mean validation margin is not above 0, so a coin fits better than any T"
        )  # fmt: skip
        notes.append(f"No temperature is fitted: {why}.")
    elif len(validation) < 100:
        notes.append(f"The temperature is fitted to {len(validation)} pairs only: see its interval.")
    if margins.min() >= 0 or margins.max() <= 0:
        notes.append("Every pair is ranked alike, so slope and intercept cannot be fitted.")
    return notes


def _bins(count: int) -> str:
    return f"{count} bin{'s' * (count > 1)}"


def _finite(values, name: str) -> np.ndarray:
    values = np.asarray(list(values if values is not None else []), float)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise Refusal(f"{name}[{row}] = {values[row]}: must be finite. Drop and count such pairs first.")
    return values
