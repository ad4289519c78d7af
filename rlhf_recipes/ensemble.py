"""Several reward models as one: the mean, the worst case and the spread of their standardised scores.

A reward is identified only up to an offset, and a scale, for each member (the pairwise loss sees differences alone),
so each member's score is taken in standard deviations of its scores of the same K reference answers:

    z_m(x, y) = (r_m(x, y) - mean_m) / sd_m,   mean z = sum_m z_m / M,   worst case = min_m z_m,   spread = sd over m

(Coste et al. 2023, arXiv:2310.02743; the spread is the population's). Shapes: M members, N answers.
"""

import numpy as np

from rlhf_recipes.errors import Refusal

SMALLEST = 1e-9  # standard deviation in means: less is what rounding leaves
LAMBDA = 0.5  # of `combine`; best-of-n in Coste et al.


def standardise(rewards, reference_MK) -> np.ndarray:
    """Each member's rewards, shape (M, ...), less its mean and over its standard deviation on K reference answers.

    What is not finite there is left out. A member whose reference scores are all equal is only centred.
    """
    rewards = np.asarray(rewards, float)
    mean_M, sd_M = _scales(reference_MK)
    shape = (-1, *[1] * (rewards.ndim - 1))
    return (rewards - mean_M.reshape(shape)) / sd_M.reshape(shape)


def aligned(rewards_MX, reference_MK) -> np.ndarray:
    """The members on one scale, that of the average member: `standardise` times the mean of their standard deviations,
    so that a margin is in nats and no member weighs more for having a wider scale. One member stays as it is."""
    rewards_MX = np.asarray(rewards_MX, float)
    if len(rewards_MX) == 1:
        return rewards_MX
    return standardise(rewards_MX, reference_MK) * _scales(reference_MK)[1].mean()


def _scales(reference_MK) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each member's scores; 1 where they are equal but for their last bits."""
    reference_MK = np.ma.masked_invalid(np.asarray(reference_MK, float))
    mean_M, sd_M = (np.ma.filled(found, 0.0) for found in (reference_MK.mean(1), reference_MK.std(1)))
    return mean_M, np.where(sd_M > SMALLEST * np.abs(mean_M), sd_M, 1)


def disagreement(margins_MN) -> np.ndarray:
    """How far members disagree on a pair, for what they make of its margin at all, shape (N,): the standard deviation
    over members of the margin over the mean of its size; 0 where no member sees a difference.

    The deviation alone shrinks with the margins, and a pair on which all are lost looks like one on which all agree.
    """
    margins_MN = np.asarray(margins_MN, float)
    size_N = np.abs(margins_MN).mean(0)
    # two members that contradict each other have exactly 1, whatever the last bit says
    return np.round(margins_MN.std(0) / np.where(size_N > 0, size_N, 1), 9)


def combine(rewards, how: str, lam: float = LAMBDA) -> np.ndarray:
    """One reward out of those of M members, shape (M, ...) -> (...); they must be on one scale.

    "mean"; "min", the worst case; "uwo", mean - lam * variance (Coste et al. 2023, arXiv:2310.02743, eq. 5), with the
    population variance (over M, not M - 1); "std", the population standard deviation.
    """
    rewards = np.asarray(rewards, float)
    if how == "mean":
        return rewards.mean(0)
    if how == "min":
        return rewards.min(0)
    if how == "uwo":
        return rewards.mean(0) - lam * rewards.var(0)
    if how == "std":
        return rewards.std(0)
    raise Refusal(f"how = {how}: must be one of mean, min, uwo, std.")


def answers(scores_MN, reward_models: dict[str, list[dict]]) -> list[dict]:
    """For each answer its `reward` (mean z), `worst`, `spread` and the members' z, `members`; the reference answers
    are both replies of the held-out pairs in `reward_models`."""
    z_MN = standardise(scores_MN, np.concatenate(_sides(reward_models), axis=1))
    columns = [z_MN.mean(0), combine(z_MN, "min"), combine(z_MN, "std"), z_MN.T]
    names = ("reward", "worst", "spread", "members")
    return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]


def pooled(reward_models: dict[str, list[dict]]) -> list[dict]:
    """The held-out pairs as the ensemble's mean scores them."""
    sides_2MN = _sides(reward_models)
    chosen_N, rejected_N = (standardise(own, np.concatenate(sides_2MN, axis=1)).mean(0) for own in sides_2MN)
    rows = next(iter(reward_models.values()))
    scores = zip(rows, chosen_N.tolist(), rejected_N.tolist(), strict=True)
    return [row | {"chosen": chosen, "rejected": rejected} for row, chosen, rejected in scores]


def disputed(own: dict, parent: dict) -> bool:
    """Whether some member prefers the parent's answer."""
    return any(a < b - 1e-9 for a, b in zip(own["members"], parent["members"], strict=True))


def _sides(reward_models: dict[str, list[dict]]) -> list[np.ndarray]:
    """Scores of the chosen replies, and of the rejected, each of shape (M, N)."""
    return [
        np.array([[row[side] for row in rows] for rows in reward_models.values()], dtype=float)
        for side in ("chosen", "rejected")
    ]
