"""Pressure on a proxy reward: the best of n by it without bias, its KL, and the laws of gold over sqrt(KL).

Shapes: P prompts, S samples of a prompt, K points of a curve; `least_squares` and `peak_of` take any leading axes.
"""

import math

import numpy as np

from rlhf_recipes.errors import Refusal

FORMS = {"best_of_n": "d (α − β d)", "policy": "d (α − β ln d)"}


def best_of_n(proxy, gold, ns) -> tuple[np.ndarray, np.ndarray]:
    """Expected gold and proxy reward of the best of n by the proxy, unbiased from S samples of one prompt.

        R(n) = sum_{i=n..S} C(i-1, n-1) / C(S, n) * gold_(i),   samples in ascending order of the proxy

    (the mean over all subsets of n; arXiv:2210.10760). Samples of equal proxy share their mean gold, which is the
    mean over all orders of them.

    Args:
        proxy, gold: shape (S,), or (P, S) for several prompts.
        ns: K sizes from 1 to S.

    Returns:
        gold and proxy, shape (K,) or (P, K).
    """
    proxy, gold = np.asarray(proxy, float), np.asarray(gold, float)
    if proxy.shape != gold.shape or proxy.ndim not in (1, 2):
        raise Refusal(
            f"proxy, gold = shapes {proxy.shape}, {gold.shape}: must be (S,) or (P, S). Score each sample by both."
        )
    if not (np.isfinite(proxy).all() and np.isfinite(gold).all()):
        raise Refusal("proxy, gold = nan or infinite: must be finite. Drop and count such prompts first.")
    size = proxy.shape[-1]
    if any(not 1 <= n <= size for n in ns):
        raise Refusal(f"ns = {list(ns)}: from 1 to the {size} samples of a prompt. Draw more or lower n.")
    weights_SK = np.stack([_weights(n, size) for n in ns], axis=1)
    shared = np.array([_share_ties(*row) for row in zip(np.atleast_2d(proxy), np.atleast_2d(gold), strict=True)])
    golds_PK, proxies_PK = shared @ weights_SK, np.sort(np.atleast_2d(proxy)) @ weights_SK
    return (golds_PK, proxies_PK) if proxy.ndim == 2 else (golds_PK[0], proxies_PK[0])


def kl_best_of_n(n: float) -> float:
    """KL in nats of best-of-n to its start, ln n - (n-1)/n: exact where samples never tie in the proxy, else an upper
    bound (Beirami et al. 2024, arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


def fit(d, gains, form: str) -> dict:
    """Least squares of gold gains over d = sqrt(KL), which pass through 0 at d = 0 (arXiv:2210.10760, eq. 1).

    "best_of_n": R = d (alpha - beta d), peak alpha / (2 beta); "policy": R = d (alpha - beta ln d), peak
    exp(alpha / beta - 1). Both are linear in alpha and beta.

    Args:
        d, gains: shape (K,); points at d = 0 add nothing.

    Returns:
        `alpha`, `beta`, `peak` (d), `height` (gain there) and `rmse`; peak and height are None where beta <= 0 (the
        curve bends upward: no peak), all are None with fewer than two different d > 0.
    """
    if form not in FORMS:
        raise Refusal(f"form = {form}: must be one of {', '.join(FORMS)}.")
    d, gains = np.asarray(d, float), np.asarray(gains, float)
    alpha, beta = least_squares(d, gains, form)
    if not np.isfinite(alpha):
        return dict.fromkeys(("alpha", "beta", "peak", "height", "rmse"))
    peak = float(peak_of(alpha, beta, form))
    rmse = float(np.sqrt(np.mean((gains - curve(d, alpha, beta, form)) ** 2)))
    found = {"alpha": float(alpha), "beta": float(beta), "peak": None, "height": None, "rmse": rmse}
    if math.isfinite(peak):
        found |= {"peak": peak, "height": float(curve(np.array(peak), alpha, beta, form))}
    return found


def _weights(n: int, size: int) -> np.ndarray:
    """C(i-1, n-1) / C(size, n) for i = 1..size; downward from i = size by their ratios, which cannot overflow."""
    i = np.arange(size, 1, -1)
    return np.concatenate([[n / size], n / size * np.cumprod(np.maximum(i - n, 0) / (i - 1))])[::-1]


def _share_ties(proxy_S: np.ndarray, gold_S: np.ndarray) -> np.ndarray:
    _, group_S, counts = np.unique(proxy_S, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group_S, gold_S) / counts, counts)


def _bend(d, form: str):
    """What beta multiplies."""
    return d**2 if form == "best_of_n" else d * np.log(np.where(d > 0, d, 1.0))


def curve(d, alpha, beta, form: str):
    return alpha * d - beta * _bend(d, form)


def least_squares(d, gains, form: str):
    """alpha, beta over the last axis; nan where two different d > 0 are missing."""
    x, z = d, -_bend(d, form)
    xx, xz, zz, xy, zy = ((a * b).sum(-1) for a, b in ((x, x), (x, z), (z, z), (x, gains), (z, gains)))
    determinant = xx * zz - xz**2
    determinant = np.where(determinant > 1e-9 * xx * zz, determinant, np.nan)
    return (zz * xy - xz * zy) / determinant, (xx * zy - xz * xy) / determinant


def peak_of(alpha, beta, form: str):
    """d of the peak; infinite where there is none."""
    safe = np.where(beta > 0, beta, 1.0)
    peak = np.maximum(alpha / (2 * safe), 0) if form == "best_of_n" else np.exp(np.minimum(alpha / safe - 1, 700))
    return np.where(beta > 0, peak, np.where(np.isnan(beta), np.nan, np.inf))
