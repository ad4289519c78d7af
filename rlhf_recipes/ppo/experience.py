"""What lies between sampling and updating: the order of the prompts, micro-batches with advantages, what is logged.

Shapes: B episodes, K completion tokens.
"""

from collections.abc import Callable, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Sampler

from rlhf_recipes.ppo import algorithm
from rlhf_recipes.ppo.roles import Batch


class RolloutSampler(Sampler):
    """Indices of prompts: each rollout's, as often as there are micro-batches made of it. Prompts that fill no whole
    rollout wait for the next epoch's order, which depends on seed and epoch alone."""

    def __init__(self, data: Sized, rollout: int, repeats: int, seed: int, epoch: Callable[[], int]):
        self.data, self.rollout, self.repeats, self.seed, self.epoch = data, rollout, repeats, seed, epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.data), generator=generator).tolist()
        for start in range(0, len(order) - self.rollout + 1, self.rollout):
            for _ in range(self.repeats):
                yield from order[start : start + self.rollout]

    def __len__(self):
        return len(self.data) // self.rollout * self.rollout * self.repeats


@dataclass
class MicroBatch:
    """Episodes that are trained on together, with what the rollout knows of them; (B, K) each.

    `old_logps` are the policy's before it moved: of the sampler, or, where the first step of a rollout uses the
    episodes, of that step itself, whose ratio is then exactly 1.
    """

    batch: Batch
    old_logps: Tensor
    reference_logps: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor | None = None
    returns: Tensor | None = None


def compute_advantages(micro_batches: list[MicroBatch], args, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Turn token rewards into returns and whitened advantages, over the whole rollout of all processes.

    Args:
        reduce: sums a tensor over the processes.

    Returns:
        For the log: moments of the advantages before whitening, where in the completions they lie, and how much of the
        returns the values explain.
    """
    masks = [m.batch.mask_BK for m in micro_batches]
    mask = _joined(masks)
    if args.whiten_rewards:
        token_rewards = algorithm.whiten(_joined([m.rewards for m in micro_batches]), mask, reduce, False)
        for m, part in zip(micro_batches, _parted(token_rewards, masks), strict=True):
            m.rewards = part
    for m in micro_batches:
        m.advantages, m.returns = algorithm.gae(m.rewards, m.old_values, m.batch.mask_BK, args.gamma, args.lam)
    shares_B3 = torch.cat([algorithm.shares(m.advantages, m.batch.mask_BK) for m in micro_batches])
    known_B3 = ~shares_B3.isnan()
    shares, counts = reduce(torch.stack([shares_B3.nan_to_num().sum(0), known_B3.sum(0)]).double())
    advantages = _joined([m.advantages for m in micro_batches])
    mean, std = algorithm.moments(advantages, mask, reduce)
    for m, part in zip(micro_batches, _parted(algorithm.whiten(advantages, mask, reduce), masks), strict=True):
        m.advantages = part
    returns, values = _joined([m.returns for m in micro_batches]), _joined([m.old_values for m in micro_batches])
    unexplained, total = (algorithm.moments(x, mask, reduce)[1] ** 2 for x in (returns - values, returns))
    explained = 1 - unexplained / (total + 1e-8)
    ends = zip(("first", "last", "uniform"), (shares / counts.clamp(min=1)).tolist(), strict=True)
    return {
        "advantage/mean": mean.item(),
        "advantage/std": std.item(),
        **{f"advantage/{end}_share": share for end, share in ends},
        "explained_variance": explained.item(),
    }


@dataclass
class Tally:
    """Sums and extremes of what is logged, until it is."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += values.detach().sum().item()
        total[1] += values.numel()

    def extremes(self, name: str, values: Tensor) -> None:
        self.least[name] = min(self.least.get(name, torch.inf), values.min().item())
        self.most[name] = max(self.most.get(name, -torch.inf), values.max().item())

    def drain(self, accelerator) -> dict[str, float]:
        """Means and extremes over all processes; the tally is empty then."""
        sums = torch.tensor(list(self.sums.values()), device=accelerator.device).reshape(-1, 2)
        sums = accelerator.reduce(sums, "sum")
        logs = {name: (total / count).item() for name, (total, count) in zip(self.sums, sums, strict=True)}
        for end, found, choose in (("min", self.least, torch.amin), ("max", self.most, torch.amax)):
            for name, value in found.items():
                gathered = accelerator.gather(torch.tensor([value], device=accelerator.device))
                logs[f"{name}/{end}"] = choose(gathered, 0).item()
        self.sums, self.least, self.most = {}, {}, {}
        return logs


def _joined(parts: list[Tensor]) -> Tensor:
    """(B, K) tensors of different K as one row."""
    return torch.cat([part.reshape(-1) for part in parts])


def _parted(joined: Tensor, likes: list[Tensor]) -> list[Tensor]:
    return [
        part.view_as(like) for part, like in zip(joined.split([like.numel() for like in likes]), likes, strict=True)
    ]
