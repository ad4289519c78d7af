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
from rlhf_recipes.sampling import kl_estimates


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


def partition(lengths: list[int], mini_batch: int, micro_batch: int) -> list[list[int]]:
    """Indices of each micro-batch: mini-batches in the order of the prompts, each cut by length, to pad little.

    Args:
        lengths: tokens of each episode, prompt and completion.
    """
    parts = []
    for start in range(0, len(lengths), mini_batch):
        order = sorted(range(start, start + mini_batch), key=lengths.__getitem__)
        parts += [order[i : i + micro_batch] for i in range(0, mini_batch, micro_batch)]
    return parts


@dataclass
class MicroBatch:
    """Episodes that are trained on together, with what the rollout knows of them; (B, K) each.

    `old_logps` are the policy's own before it moved, not the sampler's, which rounds elsewhere; where the first step
    of a rollout uses the episodes, they are of that step itself, whose ratio is then exactly 1.
    """

    batch: Batch
    sampler_logps: Tensor
    old_logps: Tensor
    reference_logps: Tensor
    entropies: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor | None = None
    returns: Tensor | None = None


def compare_policies(micro_batches: list[MicroBatch], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """How far the policy of a rollout is from its reference, and its sampler from it.

    Args:
        reduce: sums a tensor over the processes.

    Returns:
        For the log: `kl` and `kl_k3` to the reference in nats per completion, `entropy` in nats per token, and of the
        sampler KL(sampler || policy) (k3) and the mean |difference| of the log-probabilities, in nats per token.
    """
    sums = []
    for m in micro_batches:
        k1, _, k3 = kl_estimates(m.old_logps, m.reference_logps)
        _, _, away = kl_estimates(m.sampler_logps, m.old_logps)
        columns = (m.batch.mask_BK, k1, k3, m.entropies, away, (m.old_logps - m.sampler_logps).abs())
        sums.append(torch.stack([m.batch.mask_BK.new_tensor(len(k1)), *(column.sum() for column in columns)]).double())
    episodes, tokens, kl, kl_k3, entropy, away, difference = reduce(sum(sums)).tolist()
    return {
        "kl": kl / episodes,
        "kl_k3": kl_k3 / episodes,
        "entropy": entropy / tokens,
        "sampling/kl": away / tokens,
        "sampling/logp_difference": difference / tokens,
    }


def warn_of_sampler(log: dict[str, float]) -> None:
    """Say so where, in the last rollout, the sampler was further from the policy than the policy from its reference.

    Args:
        log: what `compare_policies` and the lengths of the completions gave; empty where there was no rollout.
    """
    moved = log.get("kl_k3", 0.0) / max(log.get("completions/mean_length", 1.0), 1.0)
    if log.get("sampling/kl", 0.0) > moved:
        print(
            f"sampling: the last samples are {log['sampling/kl']:.1g} nats a token from the policy, which is "
            f"{moved:.1g} from its reference: rounding hides what it has learned. Take a higher "
            "trainer.learning_rate, or model.dtype=float32."
        )


def fit_values(
    micro_batches: list[MicroBatch], gamma: float, reduce: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Put the values of a rollout on the scale of its returns, by a line through them.

    A critic that starts from zeros, or from a reward model on another scale, is worse than a constant: its error would
    reach the policy as an advantage of early or of late tokens.

    Returns:
        Slope and offset, which the head needs as well.
    """
    masks = [m.batch.mask_BK for m in micro_batches]
    returns = [algorithm.returns_to_end(m.rewards, m.batch.mask_BK, gamma) for m in micro_batches]
    values = _joined([m.old_values for m in micro_batches])
    slope, offset = algorithm.linear_fit(values, _joined(returns), _joined(masks), reduce)
    for m in micro_batches:
        m.old_values = (slope * m.old_values + offset) * m.batch.mask_BK
    return slope, offset


def compute_advantages(micro_batches: list[MicroBatch], args, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Turn token rewards into returns and whitened advantages, over the whole rollout of all processes.

    Args:
        reduce: sums a tensor over the processes.

    Returns:
        For the log: moments of the advantages before whitening, where in the completions they lie, the deviation of
        what was earned from each token to the end, and how much of it the values explain.
    """
    masks = [m.batch.mask_BK for m in micro_batches]
    mask = _joined(masks)
    for m in micro_batches:
        m.advantages, m.returns = algorithm.gae(m.rewards, m.old_values, m.batch.mask_BK, args.gamma, args.lam)
    shares_B3 = torch.cat([algorithm.shares(m.advantages, m.batch.mask_BK) for m in micro_batches])
    known_B3 = ~shares_B3.isnan()
    shares, counts = reduce(torch.stack([shares_B3.nan_to_num().sum(0), known_B3.sum(0)]).double())
    advantages = _joined([m.advantages for m in micro_batches])
    mean, std = algorithm.moments(advantages, mask, reduce)
    for m, part in zip(micro_batches, _parted(algorithm.whiten(advantages, mask, reduce), masks), strict=True):
        m.advantages = part
    returns = _joined([algorithm.returns_to_end(m.rewards, m.batch.mask_BK, args.gamma) for m in micro_batches])
    errors = returns - _joined([m.old_values for m in micro_batches])
    unexplained, deviation = (algorithm.moments(x, mask, reduce)[1] for x in (errors, returns))
    ends = zip(("first", "last", "uniform"), (shares / counts.clamp(min=1)).tolist(), strict=True)
    return {
        "advantage/mean": mean.item(),
        "advantage/std": std.item(),
        **{f"advantage/{end}_share": share for end, share in ends},
        "return/std": deviation.item(),
        "explained_variance": (1 - unexplained**2 / (deviation**2 + 1e-8)).item(),
    }


def whiten_rewards(micro_batches: list[MicroBatch], reduce: Callable[[Tensor], Tensor]) -> None:
    """Give the token rewards of a rollout a standard deviation of 1; their mean stays."""
    masks = [m.batch.mask_BK for m in micro_batches]
    whitened = algorithm.whiten(_joined([m.rewards for m in micro_batches]), _joined(masks), reduce, False)
    for m, part in zip(micro_batches, _parted(whitened, masks), strict=True):
        m.rewards = part


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
