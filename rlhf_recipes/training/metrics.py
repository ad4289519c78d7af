"""What a training recipe reports of its held-out rows: estimates with n and a 95 % interval, beside a baseline."""

from collections.abc import Callable, Iterable

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.data.load import shorter_wins
from rlhf_recipes.errors import Refusal


def _refuse_diverged(numbers: Iterable[float]) -> None:
    """Refuse what a model says of held-out rows where it is NaN or infinite: no metric can be made of it.

    Raises:
        Refusal: says what to lower.
    """
    if not np.isfinite(np.fromiter(numbers, dtype=float)).all():
        raise Refusal(
            "held-out rows: what the trained model says of them is not finite, so the training has diverged. Start "
            "again with a lower trainer.learning_rate and overwrite=true; doctor=strict ends such a run with its last "
            "good weights."
        )


def preference_margins(logps: list[dict], reference: list[dict], reward: str) -> list[float]:
    """Implicit reward of chosen minus rejected, in nats, up to the factor beta that no comparison depends on.

    `log_ratio`: log pi/pi_ref (y|x), the reward of DPO (arXiv:2305.18290, equation 5).
    `average_logp`: log pi(y|x) / |y|, the reward of SimPO (arXiv:2405.14734, equation 3) and what ORPO's odds are
    made of (arXiv:2403.07691, equation 3); it needs no reference.
    """
    if reward == "average_logp":
        return [p["chosen_logp"] / p["chosen_tokens"] - p["rejected_logp"] / p["rejected_tokens"] for p in logps]
    return [
        (p["chosen_logp"] - q["chosen_logp"]) - (p["rejected_logp"] - q["rejected_logp"])
        for p, q in zip(logps, reference, strict=True)
    ]


def preference_metrics(
    rows: list[dict], logps: list[dict], reference: list[dict], reward: str, start: list[dict] | None = None
) -> dict:
    """Held-out metrics of a policy on preference pairs.

    Args:
        reference: the reference's log-probabilities, which margins are from.
        start: those before training, which changes are from; None: the reference's.
    """
    _refuse_diverged(pair[f"{side}_logp"] for pair in logps for side in ("chosen", "rejected"))
    prompts = clusters(rows)
    margins, start = preference_margins(logps, reference, reward), start or reference
    pairs = list(zip(logps, start, strict=True))
    return {
        **accuracy_metrics(rows, margins, preference_margins(start, reference, reward)),
        "reward_margin": stats.mean(margins, prompts),
        "chosen_logp_change": stats.mean([p["chosen_logp"] - q["chosen_logp"] for p, q in pairs], prompts),
        "rejected_logp_change": stats.mean([p["rejected_logp"] - q["rejected_logp"] for p, q in pairs], prompts),
        **{
            f"{side}_logp_change_per_token": stats.ratio_of_sums(
                [p[f"{side}_logp"] - q[f"{side}_logp"] for p, q in pairs],
                [p[f"{side}_tokens"] for p, _ in pairs],
                prompts,
            )
            for side in ("chosen", "rejected")
        },
        "baseline_shorter_wins": stats.estimate(shorter_wins(rows), prompts),
    }


def reward_metrics(rows: list[dict], scores: list[dict], before: list[dict]) -> dict:
    """Held-out metrics of a reward model: accuracy on pairs, margin, mean and standard deviation of its rewards;
    `before` are the scores before training."""
    _refuse_diverged(pair[side] for pair in scores for side in ("chosen", "rejected"))
    prompts = clusters(rows)
    margins, margins_before = ([s["chosen"] - s["rejected"] for s in each] for each in (scores, before))
    return {
        **accuracy_metrics(rows, margins, margins_before),
        "reward_margin": stats.mean(margins, prompts),
        "mean_reward": stats.mean([(s["chosen"] + s["rejected"]) / 2 for s in scores], prompts),
        "sd_reward": _deviation([s["chosen"] for s in scores] + [s["rejected"] for s in scores], prompts * 2),
        "baseline_shorter_wins": stats.estimate(shorter_wins(rows), prompts),
    }


def label_metrics(rows: list[dict], logps: list[tuple[float, int]], reference: list[tuple[float, int]]) -> dict:
    """Held-out metrics of a policy on answers labelled good or bad; `reference` are those before training.

    `auroc` ranks them by beta log pi/pi_ref (y|x), the reward of KTO (arXiv:2402.01306), which no beta
    changes: the probability that a good answer scores above a bad one. `baseline_length` ranks them by their
    characters. `reward_margin` is the good ones' mean of log pi/pi_ref less that of the bad ones, in nats. Where both
    halves of a pair are held out, the metrics of pairs follow.
    """
    _refuse_diverged(logp for logp, _ in logps)
    prompts, good = clusters(rows), np.array([row["label"] for row in rows], dtype=bool)
    changes = np.array([p[0] - q[0] for p, q in zip(logps, reference, strict=True)])
    ranked, still = stats.area(changes, good), stats.area(np.zeros(len(rows)), good)
    apart = {
        "auroc": ranked,
        "auroc_change": lambda weights: ranked(weights) - still(weights),
        "reward_margin": _mean_difference(changes, good),
    }
    found = {
        name: stats.of_rarer(stats.resampled(of, len(rows), prompts), good, prompts) for name, of in apart.items()
    }
    for name, side in (("chosen", good), ("rejected", ~good)):
        of_side = [i for i in range(len(rows)) if side[i]]
        found[f"{name}_logp_change_per_token"] = stats.ratio_of_sums(
            changes[of_side], [logps[i][1] for i in of_side], [prompts[i] for i in of_side]
        )
    lengths = [len(row["completion"][-1]["content"]) for row in rows]
    found["baseline_length"] = stats.auroc(lengths, good, prompts)
    pairs, margins = _whole_pairs(rows, changes)
    if pairs:
        found |= accuracy_metrics(pairs, margins, [0.0] * len(pairs))
        found["baseline_shorter_wins"] = stats.estimate(shorter_wins(pairs), clusters(pairs))
    return found


def _whole_pairs(rows: list[dict], changes) -> tuple[list[dict], list[float]]:
    """The pairs of which both halves are among the rows, and how much more the chosen half's value is."""
    halves: dict[int, dict[bool, int]] = {}
    for i, row in enumerate(rows):
        if row["pair"] is not None:
            halves.setdefault(row["pair"], {})[row["label"]] = i
    prompts = clusters(rows)
    whole = [(both[True], both[False]) for both in halves.values() if len(both) == 2]
    pairs = [
        {
            "cluster": prompts[chosen],
            "prompt_id": rows[chosen]["prompt_id"],
            "chosen": rows[chosen]["completion"],
            "rejected": rows[rejected]["completion"],
        }
        for chosen, rejected in whole
    ]
    return pairs, [float(changes[chosen] - changes[rejected]) for chosen, rejected in whole]


def demonstration_metrics(rows: list[dict], logps: list[tuple[float, int]]) -> dict:
    """Perplexity of held-out completions: exp of the mean negative log-probability per token."""
    _refuse_diverged(logp for logp, _ in logps)
    prompts = clusters(rows)
    losses, tokens = [-logp for logp, _ in logps], [tokens for _, tokens in logps]
    return {"perplexity": stats.ratio_of_sums(losses, tokens, prompts, exponential=True)}


def episode_metrics(rows: list[dict], episodes: list[dict], before: list[dict]) -> dict:
    """Held-out metrics of one sampled answer to each prompt: reward, KL to the reference (nats), length, endings.

    `before` are the answers before training; `reward_change` pairs the two answers to each prompt, so that its
    interval is free of how much prompts differ.
    """
    _refuse_diverged(each["kl"] for each in episodes)
    prompts = clusters(rows)
    names = {"reward": "reward", "kl": "kl", "kl_k3": "kl_k3", "completion_tokens": "completions/mean_length"}
    means = {k: stats.mean([e[key] for e in episodes], prompts) for k, key in names.items()}
    change = stats.difference([e["reward"] for e in episodes], [e["reward"] for e in before], prompts)
    return {
        **means,
        "reward_change": change,
        "eos_rate": stats.estimate([e["completions/eos_rate"] for e in episodes], prompts),
    }


def accuracy_metrics(rows: list[dict], margins: list[float], before: list[float]) -> dict:
    """Share of the pairs whose margin is positive, how it changed (paired), and what length has to do with it.

    `length_bias` is the accuracy where the chosen reply is the longer one, less that where it is the shorter; 0 where
    one of the two never is.
    """
    prompts, right = clusters(rows), wins(margins)
    shorter = np.array(shorter_wins(rows))
    apart = np.flatnonzero(shorter != 0.5)
    of_apart = [prompts[i] for i in apart]
    bias = _mean_difference(np.array(right)[apart], shorter[apart] == 0)
    if len(set(shorter[apart])) == 2:
        found = stats.of_rarer(stats.resampled(bias, len(apart), of_apart), shorter[apart] == 0, of_apart)
    else:
        found = stats.mean([0.0] * len(rows), prompts)
    return {
        "preference_accuracy": stats.estimate(right, prompts),
        # No share either: a difference that is the same for all pairs is no point on a scale from 0 to 1.
        "accuracy_change": stats.difference(right, wins(before), prompts),
        "length_bias": found,
    }


def wins(margins: list[float]) -> list[float]:
    """1 where the margin is positive, 0.5 where it is exactly zero, else 0."""
    return [0.5 if margin == 0 else float(margin > 0) for margin in margins]


def _mean_difference(values_N: np.ndarray, side_N: np.ndarray) -> Callable[[np.ndarray], float]:
    """The mean of one side less that of the other, as a statistic of weights; nan where a side has none."""

    def difference(weights_N) -> float:
        sides = [(weights_N * side) for side in (side_N, ~side_N)]
        if not all(side.any() for side in sides):
            return float("nan")
        mean, other = (float(side @ values_N / side.sum()) for side in sides)
        return mean - other

    return difference


def _deviation(values: list[float], prompts: list[str]) -> stats.Estimate:
    """The standard deviation, of the population."""
    values_N = np.array(values, dtype=float)

    def deviation(weights_N) -> float:
        mean = np.average(values_N, weights=weights_N)
        return float(np.sqrt(np.average((values_N - mean) ** 2, weights=weights_N)))

    return stats.resampled(deviation, len(values), prompts)
