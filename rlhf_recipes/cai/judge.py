"""A judge's soft label for two replies, and what the label is worth.

For replies y1, y2, principles k and both orders o, with l = log P(A) - log P(B) in nats:

    s_k,AB =   l(y1 in A, y2 in B) - prior_k        prior_k: the same log-odds between replies that say nothing
    s_k,BA = -(l(y2 in A, y1 in B) - prior_k)
    p_k    = (sigma(s_k,AB) + sigma(s_k,BA)) / 2
    p      = sigma(logit(mean over k of p_k) / T)   probability that y1 is the better reply

So p(y1, y2) + p(y2, y1) = 1 and p(y, y) = 1/2 whatever the judge does, and a fixed preference for a letter or a place
cancels. Both orders in probability space: Lee et al. 2023 (arXiv:2309.00267); an ensemble of principles and soft
labels: Bai et al. 2022 (arXiv:2212.08073, section 4.3); the prior: Zhao et al. 2021 (arXiv:2102.09690); the
temperature T, 1 where nothing is known: Guo et al. 2017 (arXiv:1706.04599).
"""

import math
from copy import copy
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
from omegaconf import DictConfig

from rlhf_recipes import stats
from rlhf_recipes.cai import prompt_templates
from rlhf_recipes.cai.backend import Ask, Backend, Journal, Message, Request, Work, in_step
from rlhf_recipes.cai.constitution import Constitution, Principle
from rlhf_recipes.config import plain
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.text_metrics import refuses

THINK = "Think about it step by step, in a few sentences, before you answer."
THEN = "Answer with the letter of one option alone."
# Chain of thought commits itself to 0 or 1; Bai et al. 2022, section 4.3, clamp its probabilities to 40-60 %.
CLAMP = (0.40, 0.60)
BINS = 10  # of the calibration error, of equal mass
EXTREMES = (1e-6, 1 - 1e-6)  # a probability beyond them has no log-odds to speak of
TEMPERATURES = (0.05, 50.0)  # the least and the greatest that is fitted


@dataclass(frozen=True)
class Pair:
    """Two replies to the same prompt, to be compared."""

    prompt_id: str
    prompt: list[Message]
    first: str
    second: str


@dataclass
class Judgement:
    """What a judge says of a pair.

    Attributes:
        p: probability that the first reply is better; None where it did not answer (`mass` below the limit).
        by_principle: the same under each principle.
        spread: standard deviation of these.
        position_gap: mean over principles of sigma(s_AB) - sigma(s_BA); positive: the reply in place A gains.
        flip: whether the better reply changes with the order.
        mass: P(A) + P(B), the lowest of all questions: what the judge put on answering at all.
    """

    p: float | None
    by_principle: dict[str, float] = field(default_factory=dict)
    spread: float = 0.0
    position_gap: float = 0.0
    flip: bool = False
    mass: float = 0.0


class Judge:
    """A backend that compares replies under a constitution.

    Args:
        settings: conf/cai.yaml, `judging`.
        seed: decides which principles a pair is judged under.

    Attributes:
        ordered: whether what it says may depend on the order of the replies.
    """

    ordered = True

    def __init__(self, backend: Backend, constitution: Constitution, settings: DictConfig, seed: int):
        self.backend, self.constitution, self.settings, self.seed = backend, constitution, plain(settings), seed
        self.temperature = 1.0
        self.priors: dict[str, float] = {}
        self.asking = 0  # another is answered anew, though the question be the same

    def learn_priors(self, journal: Journal) -> None:
        """prior_k of every principle: the mean over replies without content (`prompt_templates.CONTENT_FREE`)."""
        if not self.settings.prior_correction:
            return
        prompt = [prompt_templates.user(prompt_templates.CONTENT_FREE[0])]
        pairs = [Pair("content-free", prompt, text, text) for text in prompt_templates.CONTENT_FREE]
        asked = [self._question(pair, p, False) for p in self.constitution.principles for pair in pairs]
        [answers] = in_step([self._asking(asked, "judge: prior")], journal)
        odds = [_log_odds(answer["logps"]) for answer in answers]
        count = len(pairs)
        for n, principle in enumerate(self.constitution.principles):
            read = [value for value in odds[n * count : (n + 1) * count] if value is not None]
            self.priors[principle.id] = fmean(read) if read else 0.0

    def again(self, asking: int) -> "Judge":
        """The same judge, asked once more: under other draws of principles, and of the answers themselves."""
        other = copy(self)
        other.asking, other.seed = asking, self.seed + asking
        return other

    def compare(self, pairs: list[Pair], journal: Journal, what: str) -> list[Judgement]:
        """A judgement of each pair under `principles_per_pair` principles drawn for its prompt, in both orders."""
        [judgements] = in_step([self.comparing(pairs, what)], journal)
        return judgements

    def comparing(self, pairs: list[Pair], what: str) -> Work:
        """`compare`, as a work that asks as it goes."""
        drawn = [
            self.constitution.draw(self.settings.principles_per_pair, self.seed, "judge", pair.prompt_id)
            for pair in pairs
        ]
        asked = []
        for pair, principles in zip(pairs, drawn, strict=True):
            for principle in principles:
                asked += [self._question(pair, principle, swapped) for swapped in (False, True)]
        answers = yield from self._asking(asked, what)
        logps = [answer["logps"] for answer in answers]
        orders = list(zip(logps[::2], logps[1::2], strict=True))  # (AB, BA) of each pair under each of its principles
        judgements, begin = [], 0
        for principles in drawn:
            end = begin + len(principles)
            judgements.append(self._judgement(principles, orders[begin:end]))
            begin = end
        return judgements

    def unclear(self, verdict: Judgement, limits: Any) -> str | None:
        """Why a pair is not taken: `tie` or `disputed`, by the limits of conf/cai.yaml, `route`; or None. Voices that
        contradict each other half and half come to 1/2, and are no tie."""
        if verdict.spread > limits.max_spread:
            return "disputed"
        margin = abs(verdict.p - 0.5)
        if margin < limits.tie_margin:
            return "tie"
        return "disputed" if margin < limits.accept_margin or verdict.flip else None

    def _question(self, pair: Pair, principle: Principle, swapped: bool) -> Request:
        first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        return Request(
            pair.prompt_id,
            f"judge.{principle.id}.{'BA' if swapped else 'AB'}",
            prompt_templates.judgement(pair.prompt, first, second, principle),
            prefix=prompt_templates.VERDICT,
            options=prompt_templates.LETTERS,
            seed=self.asking,
        )

    def _asking(self, requests: list[Request], what: str) -> Work:
        if self.settings.mode == "cot":
            thinking = [
                replace(r, messages=_with(r.messages, THINK), prefix="", options=(),
                        max_new_tokens=self.settings.cot_tokens)
                for r in requests
            ]  # fmt: skip
            thoughts = yield Ask(self.backend, f"{what}, thinking", thinking)
            choices = []
            for request, question, thought in zip(requests, thinking, thoughts, strict=True):
                said = prompt_templates.plain([prompt_templates.assistant(thought["text"])])
                messages = [*question.messages, *said, prompt_templates.user(THEN)]
                choices.append(replace(request, messages=messages))
            requests = choices
        return (yield Ask(self.backend, what, requests))

    def _judgement(self, principles: list[Principle], answers: list[tuple]) -> Judgement:
        logps = [values for both in answers for values in both]
        mass = min((sum(map(math.exp, values)) if values else 0.0) for values in logps)
        if mass < self.settings.min_option_mass:
            return Judgement(None, mass=mass)
        low, high = CLAMP if self.settings.mode == "cot" else (0.0, 1.0)
        sides = []  # plain numbers: arrays of two take longer to make than to compute with
        for principle, (ab, ba) in zip(principles, answers, strict=True):
            prior = self.priors.get(principle.id, 0.0)
            both = (_log_odds(ab) - prior, prior - _log_odds(ba))
            sides.append([min(max(_sigmoid(odds), low), high) for odds in both])
        count, p_K = len(sides), [(one + other) / 2 for one, other in sides]
        mean = sum(p_K) / count
        first, second = (round(sum(side) / count - 0.5, 9) for side in zip(*sides, strict=True))
        return Judgement(
            p=float(tempered(mean, self.temperature)),
            by_principle={principle.id: p for principle, p in zip(principles, p_K, strict=True)},
            spread=math.sqrt(sum((p - mean) ** 2 for p in p_K) / count),
            position_gap=sum(one - other for one, other in sides) / count,
            flip=first * second < 0,
            mass=mass,
        )


def validate_judge(judge: Judge, gold: list[dict], judgements: list[Judgement], limits: DictConfig) -> dict[str, Any]:
    """What a judge is worth on pairs whose better reply is known, beside what needs no model.

    Args:
        gold: rows with `prompt_id`, `chosen`, `rejected`.
        judgements: of (chosen, rejected).
        limits: conf/cai.yaml, `gate`.

    Returns:
        Estimates (`parsed`, `swap_consistency`, `agreement`, `kappa`, `position_gap`, `calibration_error`, `brier`),
        `baselines`, the paired gain over the best of them, `temperature`, and `checks`: what the gate asks, what it
        found. `passed` when every check did. Rows that the judge did not answer count as half right.
    """
    ids = clusters(gold)
    p = np.array([0.5 if j.p is None else j.p for j in judgements])
    read = [j.p is not None for j in judgements]
    right = _correct(p)
    baselines = {name: stats.estimate(values, ids) for name, values in _baselines(gold).items()}
    best = max(baselines, key=lambda name: baselines[name].value)
    agreement = stats.estimate(right, ids)
    found = {
        "parsed": stats.estimate(read, ids),
        "swap_consistency": stats.estimate(
            [not j.flip for j in judgements if j.p is not None], [i for i, r in zip(ids, read, strict=True) if r]
        ),
        "agreement": agreement,
        # With both orders of every pair counted, the two labels are equally frequent on both sides: kappa = 2 a - 1.
        "kappa": agreement.mapped(lambda a: 2 * a - 1),
        "position_gap": stats.mean([j.position_gap for j in judgements], ids),
        "mass": stats.estimate([j.mass for j in judgements], ids),
        "baselines": baselines,
        "best_baseline": best,
        "gain": stats.difference(right, _baselines(gold)[best], ids),
        "ordered": judge.ordered,
        **_calibration(p, ids),
    }
    checks = [
        _check("answers", found["parsed"].value, limits.min_parsed),
        *(
            [_check("same winner after a swap", found["swap_consistency"].value, limits.min_swap_consistency)]
            if judge.ordered
            else []
        ),
        _check(f"gain over '{best}', lower bound", found["gain"].low, 0.0, strict=True),
    ]
    return {**found, "checks": checks, "passed": all(check["passed"] for check in checks)}


def fit_temperature(p: np.ndarray) -> float:
    """`stats.temperature` of the log-odds logit(p) of "the first is better", within `TEMPERATURES`."""
    clipped = np.clip(p, *EXTREMES)
    return float(np.clip(stats.temperature(np.log(clipped / (1 - clipped))), *TEMPERATURES))


def calibration_error(p: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass, with the confidence max(p, 1 - p), since the label is always
    "the first"."""
    # p and 1 - p of one confidence differ in their last bits: rounded, they share a bin.
    confidence = np.round(np.maximum(p, 1 - p), 9)
    return stats.calibration_error(stats.equal_mass_bins(confidence, bins), _correct(p) - confidence)


def _calibration(p: np.ndarray, ids: list[str]) -> dict[str, Any]:
    """Errors before and after a temperature that was fitted on the other half of the prompts."""
    halves = {name: n % 2 for n, name in enumerate(dict.fromkeys(ids))}
    half = np.array([halves[name] for name in ids])
    after = p.copy()
    for side in (0, 1):
        if (half == side).any() and (half != side).any():
            after[half == side] = tempered(p[half == side], fit_temperature(p[half != side]))
    return {
        "temperature": fit_temperature(p),
        "calibration_error": {"before": calibration_error(p), "after": calibration_error(after), "n": len(p)},
        "brier": {
            "before": stats.estimate((1 - p) ** 2, ids),
            "after": stats.estimate((1 - after) ** 2, ids),
        },
    }


def tempered(p, temperature: float):
    """sigma(logit(p) / temperature)."""
    clipped = np.clip(p, *EXTREMES)
    return 1 / (1 + ((1 - clipped) / clipped) ** (1 / temperature))


def _baselines(gold: list[dict]) -> dict[str, np.ndarray]:
    """Per pair 1 where the rule picks the chosen reply, 1/2 where it cannot tell."""
    sizes = np.array([[len(row[side][-1]["content"]) for side in ("chosen", "rejected")] for row in gold])
    refusals = np.array([[refuses(row[side][-1]["content"]) for side in ("chosen", "rejected")] for row in gold])
    longer = (np.sign(sizes[:, 0] - sizes[:, 1]) + 1) / 2
    declines = (refusals[:, 0].astype(float) - refusals[:, 1] + 1) / 2
    return {
        "the longer wins": longer,
        "the shorter wins": 1 - longer,
        "the refusal wins": declines,
        "the refusal loses": 1 - declines,
        "the first wins": np.full(len(gold), 0.5),
    }


def _check(name: str, value: float | None, needed: float, strict: bool = False) -> dict[str, Any]:
    passed = value is not None and (value > needed if strict else value >= needed)
    return {"name": name, "value": value, "needed": needed, "passed": bool(passed)}


def _correct(p: np.ndarray) -> np.ndarray:
    return (np.sign(p - 0.5) + 1) / 2


def _sigmoid(odds: float) -> float:
    return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))


def _log_odds(logps: list[float] | None) -> float | None:
    return None if logps is None else logps[0] - logps[1]


def _with(messages: list[Message], text: str) -> list[Message]:
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']} {text}"}]
