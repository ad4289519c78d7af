"""Drawing the next token."""

import torch
from torch import Tensor


def draw(logits_BV: Tensor, generators: list[torch.Generator]) -> Tensor:
    """A token for each row from softmax(logits), shape (B, 1).

    argmax(logits - log E) with E ~ Exp(1) is such a draw (Gumbel-max). Each row has a generator of its own, so that
    what it draws depends on its seed alone, not on batch, process or what ran before.
    """
    noise_BV = torch.stack(
        [
            torch.empty_like(row_V).exponential_(generator=generator)
            for row_V, generator in zip(logits_BV, generators, strict=True)
        ]
    )
    return (logits_BV - noise_BV.log()).argmax(1, keepdim=True)


def kl_estimates(logps: Tensor, reference_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of KL(pi, pi_ref) at sampled tokens (Schulman 2020, "Approximating KL Divergence").

    With r = pi_ref/pi: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (biased, of low variance), k3 = r - 1 - log r
    (unbiased, never negative).
    """
    log_r = reference_logps - logps
    return -log_r, log_r.square() / 2, log_r.exp() - 1 - log_r
