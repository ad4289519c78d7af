"""The win rate: how often an answer beats its parent's, by reward or by judge, plain and length-controlled."""

from rlhf_recipes import stats
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.evaluation.measurements import Measurements

TIE = 1e-9  # rewards and margins closer than this count as equal


def win_rates(measurements: Measurements, own: dict, base: dict, name: str) -> dict:
    """Win rate against the parent, plain and length-controlled; empty where no answer was scored."""
    tokens, ids = own["tokens"]
    lengths = [None if None in pair else pair[0] - pair[1] for pair in zip(tokens, base["tokens"][0], strict=True)]
    if judgements := judged(measurements, name):
        wins, prompts = [row["p"] for row in judgements], [row["prompt_id"] for row in measurements.answers]
        if [row["prompt_id"] for row in judgements] != prompts:
            # one judgement of several answers to a prompt: their mean length difference
            lengths = [
                mean(d for d, p in zip(lengths, prompts, strict=True) if p == row["prompt_id"] and d is not None)
                for row in judgements
            ]
        ids = clusters(judgements)
    else:
        wins = [beats(a, b) for a, b in zip(own["reward"][0], base["reward"][0], strict=True)]
    rows = [row for row in zip(wins, lengths, ids, strict=True) if row[0] is not None]
    if not rows:
        return {}
    controlled = [row for row in rows if row[1] is not None]
    return {
        "win_rate": stats.estimate([r[0] for r in rows], [r[2] for r in rows]),
        "win_rate_length_controlled": stats.length_controlled_win_rate(
            *([r[i] for r in controlled] for i in range(3))
        ),
    }


def judged(measurements: Measurements, name: str) -> list[dict]:
    """What a judge said of a system's answers, each with the cluster of its prompt."""
    answers = measurements.answers
    cluster = dict(zip((row["prompt_id"] for row in answers), clusters(answers), strict=True))
    rows = measurements.judgements.get(name) or []
    return [row | {"cluster": cluster.get(row["prompt_id"], row["prompt_id"])} for row in rows]


def judge_quality(rows: list[dict]) -> dict:
    """How far the judge can be relied on; empty where no judge compared the answers."""
    asked = [row for row in rows if row.get("asked")]
    if not asked:
        return {}
    answered = [row for row in asked if row["answered"]]
    ids = clusters(answered)
    return {
        "judge_answers": stats.estimate([row["answered"] for row in asked], clusters(asked)),
        "judge_consistency": stats.estimate([not row["flip"] for row in answered], ids),
        "judge_position_gap": stats.mean([row["gap"] for row in answered], ids),
        "judge_ties": stats.estimate([row["tie"] for row in rows], clusters(rows)),
    }


def beats(a: float | None, b: float | None) -> float | None:
    """1 if a is larger, 0 if b is, 0.5 for a tie."""
    if a is None or b is None:
        return None
    return 0.5 if abs(a - b) <= TIE else float(a > b)


def mean(numbers) -> float | None:
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else None
