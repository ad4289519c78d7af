"""Credit: how much of the reward each sentence of an answer carries.

With sentences 1..S of an answer y and R(a..b) the reward of an answer that is the sentences a to b alone:

    credit_s        = ((R(1..s) - R(1..s-1)) + (R(s..S) - R(s+1..S))) / 2
    leave one out_s = R(y) - R(y without s)

The credits telescope: sum_s credit_s = R(y) - R(empty answer), exactly. They are the Shapley value (1953) estimated
from two orders, front to back and back to front (antithetic permutations: Mitchell et al. 2022, JMLR 23(43)), which
for S <= 2 are all there are. Leave one out does not add up and stands beside them.

    made = make(rows)  # {"prompt", "completion", ...}: score each prompt + completion
    part = audit(made, scores_MK, rows, read_run("outputs/ppo/main"))

Shapes: M reward models, K conversations, S sentences, T tokens.
"""

import json
import math
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import section
from rlhf_recipes.data import formats
from rlhf_recipes.errors import Refusal

TITLE = "Where the reward comes from"
QUESTION = "Which sentences carry the reward: the whole answer, or how it opens and closes?"
SENTENCES = 12  # of a longer answer, neighbours are joined
TOKENS = 10  # at either end of an answer, for the advantages
EXAMPLES = 3
# What ends with a full stop and no sentence: before anything, and before a number.
ABBREVIATION = re.compile(
    r"(?:\b(?:dr|mr|mrs|ms|prof|rev|st|mt|sra?|hr|vs|e\.g|i\.e|cf|approx|z\. ?b|d\. ?h|bzw|(?-i:[A-HJ-Z]))"
    r"|^\s*\(?(?:\d{1,3}|[a-z]))\.$",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"\b(?:no|nr|nos|fig|vol|ch|p|pp|ca|room|tel)\.$", re.IGNORECASE)
BOUNDARY = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]*_]*+\s+|[。！？]+|\n\s*")


def split(text: str, most: int = SENTENCES) -> list[str]:
    """The sentences of a text, each with the space after it: joined, they are the text to the letter.

    A sentence ends at . ! ? … before a space, at 。！？ and at a line break; not after an abbreviation, an initial or
    the number of a list, nor before a small letter. A piece without a letter or a digit joins its neighbour; of more
    than `most` sentences, neighbours are joined.
    """
    pieces, start = [], 0
    for match in BOUNDARY.finditer(text):
        following, said = text[match.end() : match.end() + 1], text[start : match.end()].rstrip()
        goes_on = ABBREVIATION.search(said) or following.islower() or (following.isdigit() and NUMBERED.search(said))
        if "\n" in match[0] or not match[0][-1].isspace() or not goes_on:
            pieces.append(text[start : match.end()])
            start = match.end()
    pieces.append(text[start:])
    joined: list[str] = []
    for piece in pieces:
        wordless = not any(letter.isalnum() for letter in piece)
        if joined and (wordless or not any(letter.isalnum() for letter in joined[-1])):
            joined[-1] += piece
        elif piece:
            joined.append(piece)
    if len(joined) <= most:
        return joined
    edges = [round(i * len(joined) / most) for i in range(most + 1)]
    return ["".join(joined[a:b]) for a, b in pairwise(edges)]


def make(rows: list[dict], limit: int = 50, seed: int = 0) -> list[dict]:
    """The parts of both answers of `limit` pairs drawn by `seed`: 3 S - 2 for an answer of S sentences.

    Returns:
        {"prompt", "completion"} (messages) with `prompt_id`, `cluster`, `source` (index into `rows`), `side` and
        `kept`, the numbers of the sentences kept, () for the empty answer. Answers of one sentence are left out.
    """
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(limit, len(rows))))
    made, clusters = [], formats.clusters(rows)
    for source in drawn:
        row = rows[source]
        for side in ("chosen", "rejected"):
            sentences = split(row[side][-1]["content"])
            for kept in _subsets(len(sentences)) if len(sentences) > 1 else ():
                text = "".join(sentences[s] for s in kept)
                turn = [{**row[side][-1], "content": text if len(kept) == len(sentences) else text.strip()}]
                labels = {"prompt_id": row["prompt_id"], "cluster": clusters[source], "source": source, "side": side}
                made.append({"prompt": row["prompt"], "completion": turn, **labels, "kept": kept})
    return made


def _subsets(S: int) -> list[tuple[int, ...]]:
    """Every beginning, every end, and all but one, of sentences 0..S-1; each once."""
    everything = tuple(range(S))
    found = [everything[:s] for s in range(S + 1)] + [everything[s:] for s in range(S)]
    found += [everything[:s] + everything[s + 1 :] for s in range(S)]
    return list(dict.fromkeys(found))


def attribute(rewards: dict[tuple[int, ...], float]) -> tuple[np.ndarray, np.ndarray, float]:
    """(credit_S, leave_one_out_S, R(y) - R(empty)) of one answer.

    The credits add up to the third number to the last bit, in any order: rewards are rounded to a grid of 2^-46 of
    the largest (finer than a model's float32), on which all differences, halves and sums are exact in float64.

    Args:
        rewards: of every part in `make`, by the sentences kept.
    """
    S = max(len(kept) for kept in rewards)
    largest = max(abs(r) for r in rewards.values())
    step = 2.0 ** max(math.frexp(largest)[1] - 46, -1000)
    R = {kept: round(r / step) * step for kept, r in rewards.items()}
    y = tuple(range(S))
    forth = [R[y[: s + 1]] - R[y[:s]] for s in range(S)]
    back = [R[y[s:]] - R[y[s + 1 :]] for s in range(S)]
    credit_S = np.array([(a + b) / 2 for a, b in zip(forth, back, strict=True)])
    without_S = np.array([R[y] - R[y[:s] + y[s + 1 :]] for s in range(S)])
    return credit_S, without_S, R[y] - R[()]


def audit(made: list[dict], scores_MK, rows: list[dict], ppo: dict | None = None) -> dict:
    """The section `credit`: figures `first_share`, `last_share`, `credit_concentration`, `leave_one_out_agreement`,
    and of a PPO run `value_explained_variance`, `advantage_first_share`, `advantage_last_share`.

    Args:
        made: what `make(rows)` returned; the mean over the reward models is shared out.
        ppo: of `read_run`.

    Raises:
        Refusal: scores of another shape than `made`.
    """
    scores_MK = np.atleast_2d(np.asarray(scores_MK, float))
    if scores_MK.shape[1] != len(made):
        raise Refusal(f"made = {len(made)} rows: {scores_MK.shape[1]} scores. Pass one for each.")
    answers = _answers(made, scores_MK.mean(0))
    figures = [] if ppo is None else _ppo_figures(ppo)
    if not answers and not figures:
        why = "No answer of two sentences or more, and no PPO run: give it pairs with longer answers."
        return section.skipped("credit", TITLE, QUESTION, why)
    tables, plots, notes = [], [], []
    moved = [a for a in answers if np.abs(a["credit"]).sum() > 0]
    if answers and not moved:
        notes.append("The reward is the same whatever the answer says: there is no credit to share out.")
    if moved:
        shares = _shares(moved)
        figures = _sentence_figures(moved, shares) + figures
        names = ("first sentence", "sentences between", "last sentence")
        tables = [
            section.table(
                "Share of |credit| by place",
                ["place", "answers", "share", "if all sentences counted alike"],
                [
                    [name, share.n, share, replace(share, value=even, low=None, high=None)]
                    for name, (share, even) in zip(names, shares, strict=True)
                ],
            )
        ]
        even = shares[0][1]
        dots = [(name, share) for name, (share, _) in zip(names[::2], shares[::2], strict=True)]
        plots = [section.dots("Credit at the ends of an answer", dots, "share of |credit|", ("uniform", even))]
        notes.append(
            f"{len(moved)} answers to {len({a['cluster'] for a in moved})} prompts; parts of an answer read less "
            "fluently than the whole, and a reward model may mark that down."
        )
    if ppo is not None and not ppo.get("advantage"):
        notes.append("The PPO run has no record of its advantages by token.")
    examples = _examples(moved, rows)
    return section.section(
        "credit", TITLE, QUESTION, figures=figures, tables=tables, plots=plots, examples=examples, notes=notes
    )


def _answers(made: list[dict], scores_K) -> list[dict]:
    """One dict for each answer: where it is from, and its credits."""
    groups: dict[tuple, dict] = {}
    for row, score in zip(made, scores_K.tolist(), strict=True):
        group = groups.setdefault((row["source"], row["side"]), {"cluster": row["cluster"], "rewards": {}})
        group["rewards"][tuple(row["kept"])] = score
    answers = []
    for (source, side), group in groups.items():
        credit_S, without_S, total = attribute(group["rewards"])
        labels = {"source": source, "side": side, "cluster": group["cluster"]}
        answers.append({**labels, "credit": credit_S, "without": without_S, "total": total})
    return answers


def _shares(answers: list[dict]) -> list[tuple[dict, float]]:
    """(share of |credit|, uniform share) of the first sentence, those between, and the last; means over answers."""
    ids = [a["cluster"] for a in answers]
    sizes = np.array([len(a["credit"]) for a in answers])
    weights = [np.abs(a["credit"]) / np.abs(a["credit"]).sum() for a in answers]
    first, last = np.array([w[0] for w in weights]), np.array([w[-1] for w in weights])
    between = np.clip(1 - first - last, 0, 1) * (sizes > 2)  # of two sentences rounding would leave some
    even = float((1 / sizes).mean())
    return [
        (stats.estimate(first, ids), even),
        (stats.estimate(between, ids), 1 - 2 * even),
        (stats.estimate(last, ids), even),
    ]


def _sentence_figures(answers: list[dict], shares: list[tuple[dict, float]]) -> list[section.Figure]:
    ids = [a["cluster"] for a in answers]
    top = [float(np.abs(a["credit"]).max() / np.abs(a["credit"]).sum()) for a in answers]
    (first, even), _, (last, _) = shares
    says = (
        "Mean over answers of |credit| / sum of |credit|; credit_s averages what s adds from the front and the back."
    )
    owners = [a["cluster"] for a in answers for _ in a["credit"]]
    credit, without = (np.concatenate([a[key] for a in answers]) for key in ("credit", "without"))
    return [
        section.figure(
            "first_share",
            "Reward carried by the first sentence",
            first,
            unit="%",
            baseline=("uniform", even),
            says=says,
        ),
        section.figure(
            "last_share", "Reward carried by the last sentence", last, unit="%", baseline=("uniform", even), says=says
        ),
        section.figure(
            "credit_concentration",
            "Reward carried by the one sentence that counts most",
            stats.estimate(top, ids),
            unit="%",
            baseline=("uniform", even),
            says="Mean over answers of the largest |credit| / sum of |credit|.",
        ),
        section.figure(
            "leave_one_out_agreement",
            "Agreement of the two measures of credit",
            stats.pearson(credit, without, owners),
            better="higher",
            baseline=("no relation", 0.0),
            says="Pearson's r over sentences of credit and R(y) - R(y without the sentence).",
        ),
    ]


def _examples(answers: list[dict], rows: list[dict]) -> list[dict]:
    """The answers whose reward hangs on one sentence most, by the size of that sentence's credit."""
    shown = []
    for a in sorted(answers, key=lambda a: (-np.abs(a["credit"]).max(), a["source"], a["side"]))[:EXAMPLES]:
        row = rows[a["source"]]
        sentences = split(row[a["side"]][-1]["content"])
        parts = zip(a["credit"], a["without"], sentences, strict=True)
        texts = [("prompt", row["prompt"][-1]["content"])]
        texts += [(f"{credit:+.2f} (left out: {without:+.2f})", text.strip()) for credit, without, text in parts]
        side = {"chosen": "Better", "rejected": "Worse"}[a["side"]]
        shown.append(section.example(f"{side} answer", texts, f"The credits add up to {a['total']:+.2f}."))
    return [section.examples("Answers that hang on one sentence", shown)] if shown else []


def read_run(folder: str | Path) -> dict:
    """What a PPO run logged of credit: {"explained_variance": one value for each rollout, "advantage": {...}}.

    `advantage` has the same of `advantage/first_share`, `/last_share` and `/uniform_share` where they are logged (see
    `ppo.algorithm.shares`), else nothing.

    Raises:
        Refusal: no metrics.jsonl there, a line of it that is no JSON, or no `explained_variance` in it.
    """
    file = Path(folder) / "metrics.jsonl"
    if not file.is_file():
        raise Refusal(f"{folder}: no metrics.jsonl in it. Give the folder of a run of recipes/ppo.py.")
    steps = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            steps.append(json.loads(line))
        except ValueError as error:
            raise Refusal(f"{file}:{number}: not valid JSON. Mend or remove the line.") from error
    steps = [
        step for step in steps if isinstance(step, dict) and math.isfinite(step.get("explained_variance", math.nan))
    ]
    if not steps:
        raise Refusal(f"{file}: no explained_variance in it. Give the folder of a run of recipes/ppo.py.")
    # A rollout is trained on for several steps, each of which logs it again; its seconds tell it from the next.
    keys = ("explained_variance", "seconds/rollout", "seconds/scoring")
    rollouts = list({tuple(step.get(key) for key in keys): step for step in steps}.values())
    names = ("first_share", "last_share", "uniform_share")
    advantage = {
        name: [step[f"advantage/{name}"] for step in rollouts if f"advantage/{name}" in step] for name in names
    }
    return {
        "explained_variance": [float(step["explained_variance"]) for step in rollouts],
        "advantage": advantage if all(advantage.values()) else {},
    }


def _ppo_figures(ppo: dict) -> list[section.Figure]:
    """Of the second half of the rollouts, when the value function has seen something."""
    explained = ppo["explained_variance"][len(ppo["explained_variance"]) // 2 :]
    figures = [
        section.figure(
            "value_explained_variance",
            "Returns that the value function explains",
            stats.mean(explained),
            unit="%",
            better="higher",
            baseline=("the mean return", 0.0),
            says="1 - var(return - V) / var(return), where the return of a token is what was earned from it to the "
            "end (lam = 1); mean over the rollouts of the second half of the PPO run.",
        )
    ]
    for end in ("first", "last") if ppo.get("advantage") else ():
        uniform, shares = (ppo["advantage"][key] for key in ("uniform_share", f"{end}_share"))
        figures.append(
            section.figure(
                f"advantage_{end}_share",
                f"Advantage on the {end} {TOKENS} tokens",
                stats.mean(shares),
                unit="%",
                baseline=("uniform", float(np.mean(uniform))),
                says="Mean over answers of sum |A| on these tokens / sum |A| on all; rollouts of the PPO run.",
            )
        )
    return figures
