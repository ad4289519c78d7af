"""From measurements to an evaluation: every metric with n and a 95 % interval, a verdict per tuned system.

`summarise` takes what was measured of each system (log-probabilities of pairs, sampled answers, rewards) and
returns dicts of estimates; nothing here loads a model. Intervals resample prompts, differences are paired.
"""

import math
from collections.abc import Callable

from rlhf_recipes import ensemble, stats
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import fixed_answers, verdict
from rlhf_recipes.evaluation.definitions import METRICS
from rlhf_recipes.evaluation.measurements import Measurements
from rlhf_recipes.evaluation.win_rate import TIE, judged
from rlhf_recipes.evaluation.win_rate import beats as _compare
from rlhf_recipes.evaluation.win_rate import judge_quality as _judge
from rlhf_recipes.evaluation.win_rate import win_rates as _win_rates
from rlhf_recipes.stats import Estimate
from rlhf_recipes.text_metrics import distinct_2, refuses, repeats_phrase

SHOWN_REGRESSIONS = 20
SHOWN_FAMILY = 5  # pairs that a family needs to be called the weakest


def summarise(measurements: Measurements, thresholds: dict | None = None) -> dict:
    """What the measurements say.

    Args:
        measurements: `parent`, `systems`, `pairs` and `answers` at the least.
        thresholds: overrides of verdict.THRESHOLDS.

    Returns:
        `systems`: per system its `metrics`, paired `differences` to the parent, `families` (preference
        accuracy), `preference_accuracy` (by the reward its method trains), `tasks`, `optimised` (reward models that
        score and that it was trained on), `labelled_by` (the judge, where it labelled what it was trained on) and
        `verdict`; `correction` of the verdicts for their number, in a sentence;
        `baselines`; `reward_models`; `recommended` and its `verdict`; `regressions`, worst first; `answers`, with what
        is odd about each; `baseline_answers`, of `fixed_answers.summarise`, where there are any.
    """
    unknown = set(thresholds or {}) - set(verdict.THRESHOLDS)
    if unknown:
        raise Refusal(f"thresholds = {sorted(unknown)}: no such limit. There are: {', '.join(verdict.THRESHOLDS)}.")
    thresholds = verdict.THRESHOLDS | dict(thresholds or {})
    parent, names = measurements.parent, list(measurements.systems)
    if parent not in names:
        raise Refusal(f"parent = {parent}: not among the systems. Choose one of {', '.join(names)}.")
    columns = {name: _columns(measurements, name) for name in names}
    systems = {name: _system(measurements, columns, name, parent) for name in names}
    tuned = [name for name in names if name != parent]
    decided = verdict.decide_all({name: systems[name] for name in tuned}, parent, thresholds)
    for name in tuned:
        systems[name]["verdict"] = decided[name]
    recommended = max(tuned, key=lambda name: verdict.rank(systems[name]["verdict"]), default=None)
    answers = _answers(measurements, parent)
    return {
        "parent": parent,
        "systems": systems,
        "recommended": recommended,
        "verdict": recommended and systems[recommended]["verdict"]["verdict"],
        "correction": verdict.correction(decided),
        "baselines": _baselines(measurements.pairs),
        "reward_models": _reward_models(measurements.reward_models),
        "answers": answers,
        "regressions": {name: _regressions(answers, name) for name in tuned},
        "counts": {
            "pairs": len(measurements.pairs),
            "answers": len(measurements.answers),
            "harmful_prompts": sum(row["harmful"] for row in measurements.answers),
            "task_examples": sum(len(task["ids"]) for task in measurements.tasks.values()),
            "neutral_paragraphs": max(map(len, measurements.neutral.values()), default=0),
        },
        "settings": measurements.settings,
        "thresholds": thresholds,
    } | ({"baseline_answers": fixed_answers.summarise(measurements.fixed)} if measurements.fixed else {})


def compare(measurements: Measurements, metric: str, a: str, b: str) -> Estimate:
    """Estimate of a system's metric minus another's, paired by prompt; `win_rate` is against the parent's reward."""
    columns = {name: _columns(measurements, name) for name in (a, b, measurements.parent)}
    if metric != "win_rate":
        return _paired(stats.difference, columns[a][metric], columns[b][metric])
    base, ids = columns[measurements.parent]["reward"]
    wins = [[_compare(x, y) for x, y in zip(columns[name]["reward"][0], base, strict=True)] for name in (a, b)]
    return _paired(stats.difference, (wins[0], ids), (wins[1], ids))


def deviation(measurements: Measurements, metric: str, name: str) -> float:
    """Standard deviation of a metric over a system's rows."""
    values = [value for value in _columns(measurements, name)[metric][0] if value is not None]
    mean = sum(values) / max(len(values), 1)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values), 1))


def headline(evaluation: dict) -> dict:
    """What result.json names as the main metric: the parent's value and the recommended system's. A judge gives the
    recommended system's wins over the parent, and the parent nothing."""
    before, after = (
        evaluation["systems"][name]["metrics"] for name in (evaluation["parent"], evaluation["recommended"])
    )
    won = after.get("win_rate")
    if won and won.n and ("judge_answers" in after or not before["reward"].n):
        return {"name": f"win_rate of {evaluation['recommended']}", "before": None, "after": won}
    for metric in ("reward", "accuracy_average_logp"):
        if before[metric].n:
            return {
                "name": f"{metric} of {evaluation['recommended']}",
                "before": before[metric],
                "after": after[metric],
            }
    raise Refusal("data: neither pairs nor scored answers are left to compare.")


def _columns(measurements: Measurements, name: str) -> dict[str, tuple[list, list]]:
    """Metric -> (one number or None per row, their clusters): rows line up across systems, so they pair."""
    pairs = [row["systems"].get(name) for row in measurements.pairs]
    answers = [(row["harmful"], row["systems"].get(name)) for row in measurements.answers]
    pair_ids, answer_ids = clusters(measurements.pairs), clusters(measurements.answers)

    def of_answers(value: Callable, harmful: bool | None = None):
        wanted = (s if harmful is None or bool(h) is harmful else None for h, s in answers)
        return [None if s is None else _number(value(s)) for s in wanted], answer_ids

    asked = {"reward_worst_case": "worst", "reward_spread": "spread", "proxy": "proxy"}  # measured on request
    more = {
        key: of_answers(lambda s, own=own: s.get(own))
        for key, own in asked.items()
        if any(s is not None and own in s for _, s in answers)
    }
    return {
        "accuracy_log_ratio": ([_win(s, _log_ratio_margin) for s in pairs], pair_ids),
        "accuracy_average_logp": ([_win(s, _average_margin) for s in pairs], pair_ids),
        "reward": of_answers(lambda s: s.get("reward")),
        "kl_k1": of_answers(lambda s: s.get("k1")),
        "kl_k3": of_answers(lambda s: s.get("k3")),
        "tokens": of_answers(lambda s: s["tokens"]),
        "refusal_harmful": of_answers(lambda s: refuses(s["text"]), harmful=True),
        "refusal_harmless": of_answers(lambda s: refuses(s["text"]), harmful=False),
        "distinct_2": of_answers(lambda s: distinct_2(s["text"])),
        "repetition": of_answers(lambda s: repeats_phrase(s["text"])),
        "eos_rate": of_answers(lambda s: s["finished"]),
        **more,
    }


def _system(measurements: Measurements, columns: dict, name: str, parent: str) -> dict:
    """Metrics, differences to the parent and families of one system."""
    own, base = columns[name], columns[parent]
    info = measurements.info.get(name, {})
    accuracy = f"accuracy_{info.get('method_reward') or 'log_ratio'}"
    families = [row["family"] for row in measurements.pairs]
    metrics = {key: _estimate(*own[key], of=stats.estimate if METRICS[key][1] == "%" else stats.mean) for key in own}
    metrics |= _perplexity(measurements, name, parent)
    tasks = _tasks(measurements, name, parent)
    if tasks:
        metrics["task_accuracy"] = _over_tasks(measurements.tasks, name)
    differences = {}
    if name != parent:
        metrics["length_ratio"] = _paired(stats.ratio_of_sums, own["tokens"], base["tokens"])
        metrics |= _win_rates(measurements, own, base, name)
        metrics |= _judge(judged(measurements, name))
        metrics |= _ensemble(measurements, own, base, name, parent)
        differences = {key: _paired(stats.difference, own[key], base[key]) for key in own if key in base}
        if tasks:
            differences["task_accuracy"] = _over_tasks(measurements.tasks, name, parent)
    judge = measurements.settings.get("judge") or measurements.settings.get("judge_function")
    return {
        "info": info,
        "metrics": {key: metrics[key] for key in METRICS if key in metrics},
        "differences": differences,
        "accuracy": accuracy,
        "preference_accuracy": metrics[accuracy],
        "families": _by_family(own[accuracy], families),
        "tasks": tasks,
        "optimised": [] if measurements.judgements.get(name) else info.get("optimised", []),
        "nonfinite": _nonfinite(measurements, name),
    } | ({"labelled_by": judge} if judge in info.get("labelled_by", []) else {})


def _ensemble(measurements: Measurements, own: dict, base: dict, name: str, parent: str) -> dict:
    """Wins by the worst case, and those that some member calls a loss; empty with one reward model."""
    key = "reward_worst_case"
    if key not in own or key not in base:
        return {}
    wins = [_compare(a, b) for a, b in zip(own[key][0], base[key][0], strict=True)]
    rows = [
        (cluster, row["systems"].get(name), row["systems"].get(parent))
        for row, cluster in zip(measurements.answers, clusters(measurements.answers), strict=True)
    ]
    won = [(i, s, p) for i, s, p in rows if s and p and (_change(s, p) or 0) > TIE]
    return {
        "win_rate_worst_case": _estimate(wins, own[key][1]),
        "disputed_wins": stats.estimate([ensemble.disputed(s, p) for _, s, p in won], [i for i, _, _ in won]),
    }


def _tasks(measurements: Measurements, name: str, parent: str) -> dict:
    """Task -> its `metric`, `accuracy`, and paired `difference` to the parent, None of the parent itself."""
    found = {}
    for task, scored in measurements.tasks.items():
        own, base = scored["values"][name], scored["values"][parent]
        found[task] = {
            "metric": scored["metric"],
            "accuracy": stats.estimate(own, scored["ids"]),
            "difference": None if name == parent else stats.difference(own, base, scored["ids"]),
        }
    return found


def _over_tasks(tasks: dict, name: str, parent: str | None = None) -> Estimate:
    """Mean over tasks of the mean over their examples, or of the paired differences to the parent."""
    numerators, weights, ids = [], [], []
    for task, scored in tasks.items():
        own, count = scored["values"][name], len(scored["ids"])
        base = scored["values"][parent] if parent else [0.0] * count
        numerators += [(a - b) / count for a, b in zip(own, base, strict=True)]
        weights += [1 / count] * count
        ids += [(task, example) for example in scored["ids"]]
    return stats.ratio_of_sums(numerators, weights, ids)


def _perplexity(measurements: Measurements, name: str, parent: str) -> dict:
    """Perplexity on neutral paragraphs, and its ratio to the parent's, per token of the parent."""
    neutral = measurements.neutral
    rows, base = neutral.get(name), neutral.get(parent)
    if not rows:
        return {}
    kept = [row for row in rows if math.isfinite(row[0])]
    result = {"perplexity": stats.ratio_of_sums([r[0] for r in kept], [r[1] for r in kept], exponential=True)}
    if base and name != parent:
        both = [(r, b) for r, b in zip(rows, base, strict=True) if math.isfinite(r[0]) and math.isfinite(b[0])]
        changes, tokens = [r[0] - b[0] for r, b in both], [b[1] for _, b in both]
        result["perplexity_ratio"] = stats.ratio_of_sums(changes, tokens, exponential=True)
    return result


def _baselines(pairs: list[dict]) -> dict:
    """Accuracies on the same pairs that need no model: the shorter answer, the longer one, a coin."""
    if not pairs:
        return {}
    ids = clusters(pairs)
    shorter = _shorter_wins(pairs)
    return {
        "shorter_wins": stats.estimate(shorter, ids),
        "longer_wins": stats.estimate([1 - win for win in shorter], ids),
        "coin": Estimate(0.5, 0.5, 0.5, len(pairs), len(set(ids))),
    }


def _shorter_wins(pairs: list[dict]) -> list:
    return [_compare(row["rejected_chars"], row["chosen_chars"]) for row in pairs]


def _reward_models(scored: dict[str, list[dict]]) -> dict:
    """Each reward model by itself and, of several, their mean as one."""
    if len(scored) > 1:
        scored = scored | {f"mean of {len(scored)}": ensemble.pooled(scored)}
    return {name: _reward_model(rows) for name, rows in scored.items()}


def _reward_model(rows: list[dict]) -> dict:
    """Held-out accuracy of a reward model, per family too, beside the baselines on its own pairs."""
    ids = clusters(rows)
    scores = [(_number(row["chosen"]), _number(row["rejected"])) for row in rows]
    wins = [_compare(*pair) for pair in scores]
    margins = [None if None in pair else pair[0] - pair[1] for pair in scores]
    return {
        "accuracy": _estimate(wins, ids),
        "margin": _estimate(margins, ids, of=stats.mean),
        "families": _by_family((wins, ids), [row["family"] for row in rows]),
        "shorter_wins_by_family": _by_family((_shorter_wins(rows), ids), [row["family"] for row in rows]),
        "baselines": _baselines(rows),
    }


def _answers(measurements: Measurements, parent: str) -> list[dict]:
    """Answers with the `change` in reward against the parent and `flags`: what became odd, in plain words."""
    rows = []
    for row in measurements.answers:
        base = row["systems"].get(parent)
        systems = {
            name: {
                **answer,
                "change": _change(answer, base) if name != parent and base else None,
                "flags": _flags(answer, base, row["harmful"]) if name != parent and base else [],
            }
            for name, answer in row["systems"].items()
        }
        rows.append({**row, "systems": systems})
    return rows


def _change(answer: dict, base: dict) -> float | None:
    a, b = _number(answer.get("reward")), _number(base.get("reward"))
    return None if a is None or b is None else a - b


def _flags(answer: dict, base: dict, harmful: bool) -> list[str]:
    """What the answer does that the parent's answer to the same prompt does not."""
    text, before = answer["text"], base["text"]
    checks = {
        "refuses a harmless request": not harmful and refuses(text) and not refuses(before),
        "no longer refuses a harmful request": harmful and refuses(before) and not refuses(text),
        "repeats itself": repeats_phrase(text) and not repeats_phrase(before),
        "was cut off at the token limit": base["finished"] and not answer["finished"],
        "is empty": bool(before.strip()) and not text.strip(),
    }
    return [words for words, holds in checks.items() if holds]


def _regressions(answers: list[dict], name: str) -> list[dict]:
    """Prompts on which the system lost most against the parent: by reward, else by the number of flags."""
    found = []
    for index, row in enumerate(answers):
        answer = row["systems"].get(name)
        if answer and ((answer["change"] or 0) < -TIE or answer["flags"]):
            found.append(
                {
                    "answer": index,
                    "prompt_id": row["prompt_id"],
                    "change": answer["change"],
                    "flags": answer["flags"],
                }
            )
    return sorted(found, key=lambda r: (r["change"] or 0, -len(r["flags"])))[:SHOWN_REGRESSIONS]


def _nonfinite(measurements: Measurements, name: str) -> int:
    """Measured numbers of a system that are nan or infinite."""
    measured = [row["systems"].get(name) or {} for row in measurements.pairs + measurements.answers]
    numbers = [x for system in measured for x in system.values() if isinstance(x, float)]
    numbers += [row[0] for row in measurements.neutral.get(name, [])]
    return sum(not math.isfinite(x) for x in numbers)


def _by_family(column: tuple[list, list], families: list) -> dict[str, Estimate]:
    groups: dict[str, tuple[list, list]] = {}
    for family, value, cluster in zip(families, *column, strict=True):
        if family is not None and value is not None:
            values, clusters = groups.setdefault(family, ([], []))
            values.append(value)
            clusters.append(cluster)
    return {family: stats.estimate(*group) for family, group in groups.items()}


def _estimate(values: list, clusters: list, of: Callable = stats.estimate) -> Estimate:
    kept = [(v, c) for v, c in zip(values, clusters, strict=True) if v is not None]
    return of([v for v, _ in kept], [c for _, c in kept])


def _paired(estimator: Callable, own: tuple[list, list], base: tuple[list, list]) -> Estimate:
    """estimator(a, b, clusters) over the rows that both systems have."""
    kept = [(a, b, c) for a, b, c in zip(own[0], base[0], own[1], strict=True) if a is not None and b is not None]
    return estimator(*([row[i] for row in kept] for i in range(3)))


def _win(system: dict | None, margin: Callable) -> float | None:
    value = None if system is None else margin(system)
    return None if _number(value) is None else _compare(value, 0.0)


def _log_ratio_margin(s: dict) -> float | None:
    if s.get("chosen_reference_logp") is None or s.get("rejected_reference_logp") is None:
        return None
    return (s["chosen_logp"] - s["chosen_reference_logp"]) - (s["rejected_logp"] - s["rejected_reference_logp"])


def _average_margin(s: dict) -> float:
    return s["chosen_logp"] / s["chosen_tokens"] - s["rejected_logp"] / s["rejected_tokens"]


def _number(x) -> float | None:
    """A finite float, or None: what is not finite is counted by `_nonfinite` instead."""
    return float(x) if x is not None and math.isfinite(x) else None
