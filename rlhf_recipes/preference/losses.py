"""Losses of pairs that need no reference, as functions of log-probabilities alone.

Shapes: P pairs, B sequences, T tokens. Log-probabilities are in nats; `chosen_P` and `rejected_P` are averages over
the tokens of an answer, log pi(y|x) / |y|.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def average_logps(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean log-probability of the tokens of each sequence that the mask marks, shape (B,)."""
    return (logps_BT * mask_BT).sum(1) / mask_BT.sum(1)


def nll_loss(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Negative log-likelihood of a token, mean over all that the mask marks: each counts alike, whichever its
    sequence."""
    return -(logps_BT * mask_BT).sum() / mask_BT.sum()


def simpo_loss(
    chosen_P: Tensor, rejected_P: Tensor, beta: float, simpo_gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log sigma(d) - e log sigma(-d) with d = beta (chosen - rejected) - gamma, shape (P,).

    e = 0 is SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6); e is the share of pairs whose label is taken to be
    wrong, as in conservative DPO and in TRL's CPOTrainer.
    """
    margin_P = beta * (chosen_P - rejected_P) - simpo_gamma
    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def log_odds_ratio(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected) with odds(y) = P(y) / (1 - P(y)), log P the average, shape (P,).

    ORPO's loss is the NLL of the chosen answer - lambda log sigma of it (Hong et al. 2024, arXiv:2403.07691, equations
    4, 6 and 7).
    """
    return chosen_P - rejected_P - (_log1mexp(chosen_P) - _log1mexp(rejected_P))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, without cancellation on either side of -log 2."""
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
