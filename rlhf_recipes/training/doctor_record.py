"""What the doctor's rules read and say: the record of a run, how its log and its held-out figures are read, findings.

The rewards of one training step are noise from few pairs. A rule about the log therefore compares the means of its
first and last quarter, of MIN_ROWS rows at least, and asks for SIGMAS standard errors beyond the limit. What a policy
says (its entropy, its lengths) can fall within a quarter: there the start is the first row. A rule about held-out
metrics asks for their whole 95 % interval beyond the limit, and for 20 prompts at least: with fewer it is too narrow.
No rule compares losses, whose scale depends on beta.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rlhf_recipes import methods, ranks
from rlhf_recipes.stats import Estimate

HEALTHY, WATCH, BROKEN = LEVELS = ("healthy", "watch", "broken")
SIGMAS = 3.0  # standard errors: the log is looked at some 50 times in a run, by a dozen rules
MIN_ROWS = 4  # of what is compared: fewer have no standard error to speak of
MIN_PROMPTS = 20  # held out: evaluate.py's limit
BY_DOCTOR = "doctor: "  # how Record.stopped begins where doctor=strict ended the run


@dataclass
class Record:
    """What is known of a run.

    Attributes:
        recipe: its name.
        rows: rows of the log that have a `loss`, under TRL's names.
        args: the trainer's arguments.
        max_steps: optimizer steps in all.
        facts: `reply_tokens` (mean of the chosen replies, tokens), `ends_with_eos` (share of the training replies);
            `anchored` where the reference is another run than the start; what is not known is left out.
        before: held-out metrics before training; empty while it trains.
        after: the same after training.
        stopped: why a trainer's own brake, or doctor=strict, ended the run.
        method: its row of `methods`.
    """

    recipe: str
    rows: list[dict]
    args: Any
    max_steps: int
    facts: dict = field(default_factory=dict)
    before: dict[str, Estimate] = field(default_factory=dict)
    after: dict[str, Estimate] = field(default_factory=dict)
    stopped: str | None = None

    @property
    def method(self) -> methods.Method:
        return methods.of(self.recipe)


@dataclass
class Finding:
    """What a rule sees, what it means, and which override changes it."""

    level: str
    saw: str
    means: str
    change: str


@dataclass
class Mean:
    """Mean of the rows at one end, and its standard error."""

    value: float
    error: float


def points(record: Record, key: str) -> list[tuple[int, float]]:
    """(step, value) of what was logged under `key`: of what samples, a row counts once for each rollout."""
    rows = [row for row in record.rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    if record.method.samples:
        rows = list({(row["step"] - 1) // record.args.steps_per_rollout: row for row in reversed(rows)}.values())[::-1]
    return [(row["step"], row[key]) for row in rows]


def ends(series: list[tuple[int, float]]) -> tuple[Mean, Mean] | None:
    """Means of the first and of the last quarter of what `points` gives, or of the first and the last MIN_ROWS of it
    where a quarter has fewer; None where there are no twice as many."""
    values = [value for _, value in series]
    size = max(MIN_ROWS, len(values) // 4)
    return (_mean(values[:size]), _mean(values[-size:])) if len(values) >= 2 * MIN_ROWS else None


def since_start(series: list[tuple[int, float]]) -> tuple[Mean, Mean] | None:
    """The first row, which is the untrained policy's, in the place of the first quarter of `ends`.

    Its error is the noise of a row by the differences of neighbours, sqrt(sum of (x_i+1 - x_i)^2 / 2 (n - 1)), which a
    trend hardly touches (von Neumann et al., Ann. Math. Statist. 12, 153, 1941).
    """
    found = ends(series)
    if found is None:
        return None
    squares = [(after - before) ** 2 for (_, before), (_, after) in pairwise(series)]
    return Mean(series[0][1], math.sqrt(sum(squares) / len(squares) / 2)), found[1]


def _mean(values: list[float]) -> Mean:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean, math.sqrt(variance / len(values)))


def surely_below(mean: Mean, limit: float, other_error: float = 0.0) -> bool:
    return mean.value + SIGMAS * math.hypot(mean.error, other_error) < limit


def surely_above(mean: Mean, limit: float, other_error: float = 0.0) -> bool:
    return mean.value - SIGMAS * math.hypot(mean.error, other_error) > limit


def below(estimate: Estimate | None, limit: float | None) -> bool:
    """Whether the whole interval lies below."""
    return decides(estimate) and limit is not None and estimate.high < limit


def above(estimate: Estimate | None, limit: float | None) -> bool:
    return decides(estimate) and limit is not None and estimate.low > limit


def decides(estimate: Estimate | None) -> bool:
    return bool(estimate) and estimate.low is not None and estimate.clusters >= MIN_PROMPTS


def width(estimate: Estimate) -> float:
    return 0.0 if None in (estimate.low, estimate.high) else estimate.high - estimate.low


def accuracy_key(record: Record) -> str:
    return "accuracy" if record.recipe == "reward" else "rewards/accuracies"


def margin_key(record: Record) -> str:
    return "margin" if record.recipe == "reward" else "rewards/margins"


def margin_limit(record: Record) -> float | None:
    """The reward margin from which on a pair teaches nothing more; None: there is none with this loss."""
    args, method = record.args, record.method
    given = getattr(args, "loss_type", None) or ()
    losses = {given} if isinstance(given, str) else set(given)
    further = any(getattr(args, key, 0) for key in ("label_smoothing", "cpo_alpha"))  # terms that no margin ends
    other = getattr(args, "f_divergence_type", "reverse_kl") != "reverse_kl"  # no log-ratio, as the logged rewards are
    if method.saturated is None or further or other or not losses <= set(method.saturating):
        return None
    return method.saturated + (getattr(args, method.margin_beyond) if method.margin_beyond else 0)


def pairs_a_step(record: Record) -> int:
    args = record.args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks.world_size()
