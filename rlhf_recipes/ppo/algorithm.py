"""The formulas of PPO, on tensors alone.

Shapes: B episodes, K completion tokens, R reward functions. A mask is 1 where an episode has a token; its tokens come
first. Log-probabilities and KL are in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_recipes.errors import Refusal

ENSEMBLES = ("sum", "mean", "min", "uwo")
CONTROLLERS = ("fixed", "adaptive", "limit")


def token_rewards(scores_B: Tensor, kl_BK: Tensor, mask_BK: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * k1 at every token, and the score at the last one (Ziegler et al., arXiv:1909.08593)."""
    rewards_BK = -kl_coef * kl_BK * mask_BK
    last_B = mask_BK.sum(1).long() - 1
    rewards_BK[torch.arange(len(last_B), device=last_B.device), last_B] += scores_B
    return rewards_BK


def gae(rewards_BK: Tensor, values_BK: Tensor, mask_BK: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns they imply (Schulman et al., arXiv:1506.02438, equation 16).

        delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t

    The value after the last token is 0: the episode is over there, whether or not it ended with EOS.
    """
    advantages_BK = torch.zeros_like(values_BK)
    next_value_B = next_advantage_B = torch.zeros_like(values_BK[:, 0])
    for t in reversed(range(values_BK.shape[1])):
        delta_B = rewards_BK[:, t] + gamma * next_value_B - values_BK[:, t]
        next_advantage_B = mask_BK[:, t] * (delta_B + gamma * lam * next_advantage_B)
        next_value_B = mask_BK[:, t] * values_BK[:, t]
        advantages_BK[:, t] = next_advantage_B
    return advantages_BK, (advantages_BK + values_BK) * mask_BK


def returns_to_end(rewards_BK: Tensor, mask_BK: Tensor, gamma: float) -> Tensor:
    """What each token's episode still earned: sum over l >= 0 of gamma^l r_{t+l}. No value enters it, so that it can
    judge them; GAE's returns lean on the values the more, the smaller lam."""
    return gae(rewards_BK, torch.zeros_like(rewards_BK), mask_BK, gamma, lam=1.0)[1]


def shares(advantages_BK: Tensor, mask_BK: Tensor, tokens: int = 10) -> Tensor:
    """Share of |A_t| on the first and on the last `tokens` tokens of each completion, and what it would be if all
    tokens were alike, (B, 3); before whitening, which would move the zero. NaN where a completion has no advantage."""
    sizes_BK, mask_BK = advantages_BK.abs() * mask_BK, mask_BK.long()
    ends = (mask_BK.cumsum(1) <= tokens, mask_BK.flip(1).cumsum(1).flip(1) <= tokens)
    total_B = sizes_BK.sum(1)
    first_B, last_B = ((sizes_BK * end).sum(1) / total_B for end in ends)
    uniform_B = (tokens / mask_BK.sum(1)).clamp(max=1) + 0 * first_B
    return torch.stack([first_B, last_B, uniform_B], 1)


def moments(values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the masked values of all processes; `reduce` sums a tensor over them."""
    count, total = reduce(torch.stack([mask.sum(), (values * mask).sum()]).double())
    mean = total / count
    variance = reduce(((values - mean).square() * mask).sum().double()) / count
    return mean, variance.sqrt()


def whiten(values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor], shift_mean: bool = True) -> Tensor:
    """Masked values of standard deviation 1, and of mean 0 unless the mean is to stay."""
    mean, std = moments(values, mask, reduce)
    whitened = (values - mean) / (std + 1e-8)
    return ((whitened if shift_mean else whitened + mean) * mask).to(values.dtype)


def linear_fit(
    values: Tensor, targets: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Slope and offset of the least-squares line through the masked (value, target) of all processes; the slope is 0
    where the values are all alike. What it predicts is never worse than the mean of the targets."""
    (mean, deviation), (target_mean, _) = moments(values, mask, reduce), moments(targets, mask, reduce)
    products = (values - mean) * (targets - target_mean) * mask
    covariance, count = reduce(torch.stack([products.sum(), mask.sum()]).double())
    slope = (covariance / count / deviation**2).item() if deviation > 1e-6 else 0.0
    return slope, (target_mean - slope * mean).item()


def policy_objective(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate, to be maximised (Schulman et al., arXiv:1707.06347, equation 7).

        min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)

    With `dual_clip` c > 1 it is bounded from below by c A where A < 0 (Ye et al., arXiv:1912.09729).

    Returns:
        The objective, the ratio, and 1 where the clip decided.
    """
    ratio = (logps - old_logps).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    objective = torch.minimum(free, clipped)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return objective, ratio, (clipped < free).float()


def importance_weights(logps: Tensor, sampler_logps: Tensor, clip_max: float) -> Tensor:
    """min(policy / sampler, clip_max) of each token that another program drew.

    Truncated importance sampling (Ionides 2008), for tokens as in TRL's GRPOTrainer under
    `vllm_importance_sampling_mode=token_truncate`.

    Args:
        logps: the policy's before it moved.
    """
    return (logps - sampler_logps).exp().clamp(max=clip_max)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float | None) -> tuple[Tensor, Tensor]:
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), and 1 where the clip decided.

    Args:
        cliprange: eps, in the unit of the values; None: no clip.
    """
    if cliprange is None:
        return (values - returns).square() / 2, torch.zeros_like(values)
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    free_loss, clipped_loss = (values - returns).square(), (clipped - returns).square()
    return torch.maximum(free_loss, clipped_loss) / 2, (clipped_loss > free_loss).float()


def combine_rewards(rewards_BR: Tensor, weights_R: Tensor, how: str, uwo_coef: float) -> Tensor:
    """One reward for each episode; NaN marks a function that does not apply to it.

    `sum` of the weighted rewards; over an ensemble `mean`, `min` (worst case) or `uwo`, the mean less `uwo_coef` times
    the variance (Coste et al., arXiv:2310.02743). A weight of 0 takes a function out: it is logged, and nothing more.

    Raises:
        Refusal: no function applies to an episode.
    """
    weighted_BR = (rewards_BR * weights_R)[:, weights_R != 0]
    if weighted_BR.isnan().all(1).any():
        raise Refusal("reward_funcs: every function returned None for a completion. One at least must score it.")
    if how == "sum":
        return weighted_BR.nansum(1)
    if how == "min":
        return weighted_BR.nan_to_num(nan=torch.inf).amin(1)
    mean_B = weighted_BR.nanmean(1)
    if how == "mean":
        return mean_B
    return mean_B - uwo_coef * (weighted_BR - mean_B[:, None]).square().nanmean(1)


@dataclass
class KLController:
    """The coefficient of the KL penalty.

    `adaptive` (Ziegler et al., arXiv:1909.08593): after each rollout
    coef <- coef (1 + clip(KL / target - 1, -0.2, 0.2) / horizon), KL in nats per episode, horizon in rollouts (their
    K_beta is 1 / horizon = 0.1). `fixed` and `limit` leave it as it is.
    """

    controller: str
    coef: float
    target: float
    horizon: int

    def update(self, kl: float) -> None:
        if self.controller == "adaptive":
            error = min(max(max(kl, 0.0) / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of all rewards so far (Chan et al. 1979, the parallel form)."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def update(self, values: Tensor) -> None:
        n, mean, variance = len(values), values.mean().item(), values.var(correction=0).item()
        total, delta = self.count + n, mean - self.mean
        self.variance = (self.count * self.variance + n * variance + delta**2 * self.count * n / total) / total
        self.mean += delta * n / total
        self.count = total

    @property
    def deviation(self) -> float:
        return self.variance**0.5

    def normalise(self, values: Tensor) -> Tensor:
        return (values - self.mean) / (self.deviation + 1e-8)
