"""Win rate against answers that others wrote, as AlpacaEval counts it (Dubois et al. 2024, arXiv:2404.04475).

Each system answers the file's instructions; a judge says in both orders how probably its answer beats the file's, p_i
(`judges.verdict`). With d_i the length of the system's answer minus the file's, in tokens,

    win rate = mean p_i        at equal length = sigmoid(a) of P(win_i) = sigmoid(a + b tanh(d_i / s))

A share of the instructions is judged a second time, under other draws. Where each asking moves all verdicts by a
common t ~ N(0, tau^2) and each by its own e ~ N(0, sigma^2), means of two askings of R instructions differ by D with

    E[D^2] / 2 = tau^2 + sigma^2 / R,

the variance that the judge itself gives a mean. The bootstrap over instructions knows e, and nothing of t; so a bound
at a distance h from the value moves to sqrt(h^2 + 1.96^2 D^2 / 2). One D is a rough measure: beside it stands the
share of instructions that kept their winner.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import ranks, secrets, stats
from rlhf_recipes.cai.backend import Journal
from rlhf_recipes.cai.judge import Judge, Pair
from rlhf_recipes.data import formats, readers
from rlhf_recipes.data.messages import Drop
from rlhf_recipes.data.row import Row
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import judges
from rlhf_recipes.evaluation.measurements import Measurements
from rlhf_recipes.stats import Estimate
from rlhf_recipes.text import line

KEY = "baseline_answers"
BESIDE = ("system", "input", "history")  # columns that may hold more of what a row asks
SPLITS = ("eval", "test", "train")  # of a data set of the Hub, the first that it has
THEIRS = "theirs"


def load(cfg: DictConfig, tokenizer) -> list[dict]:
    """The rows of `baseline_answers`: `prompt_id`, `prompt` as a conversation, `output`; none without it.

    As of any data, a row with a secret is left out, and a control token that is typed into a prompt is made plain.

    Raises:
        Refusal: it is not there, a row has no instruction and output, or nobody judges.
    """
    name = cfg.get("baseline_answers")
    if not name:
        return []
    if not (cfg.get("judge") or cfg.judge_function):
        raise Refusal(f"{KEY}={name}: nobody compares the answers. Add judge=local, judge=server or judge_function.")
    if cfg.shards:
        raise Refusal(f"{KEY}={name}: not with shards={cfg.shards}. Leave one of them out.")
    try:
        rows = list(_located(name))
    except Refusal as error:
        raise Refusal(f"{KEY}={name}: {str(error).removeprefix(f'data.path={name}: ')}") from error
    held = secrets.in_environment()
    found = [_row(where, values) for where, values in rows]
    kept = [row for row in found if not any(secrets.find(text, held) for text in _texts(row))]
    if not kept:
        without = f" but {len(found)} with a secret" if found else ""
        raise Refusal(f"{KEY}={name}: holds no rows{without}. Give a file, each row with instruction and output.")
    plain, counts = neutralise(kept[: cfg.prompts], tokenizer)
    unread = dict.fromkeys(key for _, values in rows for key in values if key not in (*_asking(values), "output"))
    said = {
        "rows left out for a secret": len(found) - len(kept),
        "rows with typed control tokens made plain": counts["rows"],
        "columns unread": ", ".join(unread),
    }
    if ranks.is_first() and any(said.values()):
        notes = "; ".join(f"{what}: {count}" for what, count in said.items() if count)
        print(line(f"  baseline  {name}: {notes}"), flush=True)
    return plain


def _located(name: str):
    if not readers.is_hub_id(name):
        return readers.read_file(name)
    hub = readers.Hub(name, None, None)
    return next((rows for split in SPLITS if (rows := hub.rows(split)) is not None), ())


def _row(where: str, values: dict) -> dict:
    name, *beside = _asking(values)
    for text, key in ((values.get(name), "instruction"), (values.get("output"), "output")):
        if not isinstance(text, str) or not text.strip():
            raise Refusal(f"{where}: {key} is no text. Give instruction and output.")
    row = Row(where, values, {"prompt": name} | {key: key for key in beside})
    try:
        prompt = formats.prompt_in(row, values[name])
    except Drop as drop:
        raise Refusal(f"{where}: its history cannot be asked ({drop}). Remove the row.") from None
    return {"prompt_id": where, "prompt": prompt, "output": values["output"]}


def _asking(values: dict) -> tuple[str, ...]:
    """The columns of a row that are asked: its instruction, and what stands beside it."""
    return ("instruction" if "instruction" in values else "prompt", *BESIDE)


def _texts(row: dict) -> list[str]:
    return [*(turn["content"] for turn in row["prompt"]), row["output"]]


def answered(name: str, rows: list[dict], tokenizer, answers: dict[str, list[dict]]) -> dict[str, Any]:
    """What `Measurements.fixed` holds before it is judged.

    Args:
        answers: of each system, one for each row.
    """
    shown = ("text", "tokens", "finished")
    return {
        "name": name,
        "rows": [
            row
            | {"tokens": len(tokenizer(row["output"], add_special_tokens=False)["input_ids"])}
            | {"systems": {system: {key: own[n][key] for key in shown} for system, own in answers.items()}}
            for n, row in enumerate(rows)
        ],
    }


def compare(
    judge: Judge | Callable, found: Measurements, journal: Journal | None, judging: DictConfig
) -> Measurements:
    """The measurements with each system's verdicts against the fixed answers, where there are any: `judged`, of all
    rows, and `again`, of the first share of them.

    Args:
        judge: a model, or the function of `judges.by_function`.
        journal: that keeps a model's answers.
        judging: conf/evaluate.yaml, `judging`.
    """
    if not found.fixed:
        return found
    rows, judged = found.fixed["rows"], {}
    again = math.ceil(len(rows) * judging.asked_again)
    for name in found.systems:
        askings = []
        for asking, some in enumerate((rows, rows[:again])):
            own = [row["systems"][name]["text"] for row in some]
            askings.append(_verdicts(judge, some, own, journal, judging.tie_margin, asking, name) if some else [])
        judged[name] = dict(zip(("judged", "again"), askings, strict=True))
    return replace(found, fixed=found.fixed | {"systems": judged})


def _verdicts(judge, rows: list[dict], own: list[str], journal, tie: float, asking: int, name: str) -> list[dict]:
    if not isinstance(judge, Judge):
        answers = {name: [{"text": text} for text in own], THEIRS: [{"text": row["output"]} for row in rows]}
        return judges.by_function(judge, rows, answers, name, THEIRS)
    pairs = [Pair(row["prompt_id"], row["prompt"], text, row["output"]) for row, text in zip(rows, own, strict=True)]
    differ = [n for n, pair in enumerate(pairs) if pair.first != pair.second]
    said = judge.again(asking).compare([pairs[n] for n in differ], journal, f"judge: {name}, fixed answers")
    by_place = dict(zip(differ, said, strict=True))
    return [judges.verdict(pair.prompt_id, by_place.get(n), tie) for n, pair in enumerate(pairs)]


def summarise(fixed: dict[str, Any]) -> dict[str, Any]:
    """Of each system `win_rate`, `win_rate_length_controlled`, both as wide as the judge's own repeatability asks;
    `asked_again`: how many rows, `moved` (D) and `same_winner`, None where nothing was asked again."""
    found = {}
    for name, judged in fixed["systems"].items():
        wins = [each["p"] for each in judged["judged"]]
        ids = [row["prompt_id"] for row in fixed["rows"]]
        counted = [  # an endpoint may not say how long an answer was
            (win, own - row["tokens"], row["prompt_id"])
            for win, row in zip(wins, fixed["rows"], strict=True)
            if (own := row["systems"][name]["tokens"]) is not None
        ]
        repeated = _repeated(judged["judged"], judged["again"])
        moved = repeated["moved"] if repeated else 0.0
        rates = {
            "win_rate": stats.estimate(wins, ids),
            "win_rate_length_controlled": stats.length_controlled_win_rate(
                *([row[i] for row in counted] for i in range(3))
            ),
        }
        found[name] = {key: widened(rate, moved) for key, rate in rates.items()} | {"asked_again": repeated}
    return {"name": fixed["name"], "n": len(fixed["rows"]), "systems": found}


def _repeated(first: list[dict], again: list[dict]) -> dict[str, Any] | None:
    if not again:
        return None
    pairs = [(one["p"], other["p"]) for one, other in zip(first, again, strict=False)]
    return {
        "n": len(pairs),
        "moved": sum(b - a for a, b in pairs) / len(pairs),
        "same_winner": sum((a - 0.5) * (b - 0.5) > 0 or a == b for a, b in pairs) / len(pairs),
    }


def widened(rate: Estimate, moved: float) -> Estimate:
    """The estimate with the judge's own variance, D^2 / 2, in its interval."""
    if rate.value is None or rate.low is None:
        return rate
    more = stats.Z95**2 * moved**2 / 2
    low = rate.value - math.sqrt((rate.value - rate.low) ** 2 + more)
    high = rate.value + math.sqrt((rate.high - rate.value) ** 2 + more)
    return replace(rate, low=max(low, 0.0), high=min(high, 1.0))


def as_text(found: dict[str, Any]) -> list[str]:
    """A line for each system."""
    lines = []
    for name, own in found["systems"].items():
        rates = (stats.format_estimate(own[key], percent=True) for key in ("win_rate", "win_rate_length_controlled"))
        said = "{}, {} at equal length".format(*rates)
        if again := own["asked_again"]:
            moved, same = 100 * again["moved"], again["same_winner"]
            said += f"; {again['n']} asked twice: moved by {moved:+.1f} points, the same winner in {same:.0%}"
        lines.append(f"{name} against {found['name']} (n {found['n']}): {said}")
    return lines
