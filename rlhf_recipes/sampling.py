"""Drawing the next token, logits exact enough for it, and the KL that samples estimate.

Shapes: B sequences, K completion tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class Draws:
    """Tokens from softmax(logits), for each row by random numbers of its own seed: what a row draws depends on that
    alone, not on batch, process or what ran before.

    A row has one uniform number for each of its tokens, and the token is where the cumulative distribution passes it.

    Args:
        tokens: how many a row draws at most.
    """

    def __init__(self, seeds: list[int], device: torch.device, tokens: int):
        self.drawn = 0
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.rand(tokens, generator=generator, dtype=torch.float64) for generator in generators]
        self.uniform_BK = torch.stack(drawn).to(device)

    def draw(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        """The next token of these of the rows, (B,); the others have ended."""
        k, self.drawn = self.drawn, self.drawn + 1
        return quantile(logits_BV, self.uniform_BK[rows, k])


def quantile(logits_BV: Tensor, at_B: Tensor) -> Tensor:
    """The first token at which the cumulative distribution of each row exceeds `at`, in [0, 1); (B,).

    In float64: of float32's 24 bits a vocabulary of 128,000 would leave the rare tokens few."""
    cumulative_BV = logits_BV.softmax(1).cumsum(1, dtype=torch.float64)
    at_B1 = at_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, at_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def float32_head(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """A language-model head whose logits, (..., H) -> (..., V), are float32 whatever the precision around: bfloat16
    knows 8.0 and 8.0625 and nothing between, up to 0.1 nats a token.

    A GPU multiplies 16-bit numbers into 32; a CPU does not, and its copy of the weights lives as long as what is
    returned."""
    weight, bias = head.weight, head.bias
    if weight.device.type != "cuda":
        weight, bias = weight.float(), None if bias is None else bias.float()
    return partial(_float32_linear, weight=weight, bias=bias)


@contextmanager
def in_place_of(head: nn.Module, forward: Callable[[Tensor], Tensor]):
    """The head computes `forward` meanwhile."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _float32_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if weight.dtype == torch.float32:
            return nn.functional.linear(x.float(), weight, bias)
        y = torch.mm(x.to(weight.dtype).flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias


def kl_estimates(logps: Tensor, reference_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of KL(pi, pi_ref) at sampled tokens (Schulman 2020, "Approximating KL Divergence").

    With r = pi_ref/pi: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (biased, of low variance), k3 = r - 1 - log r
    (unbiased, never negative).
    """
    log_r = reference_logps - logps
    return -log_r, log_r.square() / 2, log_r.exp() - 1 - log_r
