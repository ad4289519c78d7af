"""Judges that read no constitution: reward models, and a function of the user's. They are asked, kept and counted as a
language model is: `backend.Backend`.

For the rewards r_m of M members, each on the scale of the average member (a reward is identified up to an offset and a
scale of its own), and replies y1, y2:

    d_m = r_m(x, y1) - r_m(x, y2)        p = sigma(mean over m of d_m / T)        spread = `ensemble.disagreement` of d

A reward model scores each reply by itself: the order of the two has no say, and n replies are n questions. A function
is asked in both orders.
"""

import math
from collections.abc import Callable, Container, Iterator
from numbers import Real
from typing import Any

import numpy as np
from omegaconf import DictConfig

from rlhf_recipes import ensemble, models, ranks
from rlhf_recipes.cai.backend import Answer, Ask, Journal, Request, Work, in_step
from rlhf_recipes.cai.judge import EXTREMES, Judgement, Pair
from rlhf_recipes.cai.prompt_templates import assistant
from rlhf_recipes.data.template import as_taken, render
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.errors import Refusal, users_function
from rlhf_recipes.references import ModelRef

ROWS = 64  # replies, or questions to a function, that are answered and written together


class Rewards:
    """`backend.Backend` of reward models on one base, each on in turn. The base is loaded for the first reply."""

    places = 0

    def __init__(self, model: DictConfig, quantization: DictConfig, members: list[ModelRef]):
        self.settings, self.members = (model, quantization), members
        self.name = " + ".join(f"{each.reference} ({(each.sha256 or '')[:12]})" for each in members)
        self._loaded: tuple | None = None

    def answer(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        """`values`: the reward of the conversation by each member. What is scored together is the same however much
        of it is known."""
        for start in range(0, len(requests), ROWS):
            group = requests[start : start + ROWS]
            if any(request.key not in known for request in group):
                yield list(zip(group, self._scored(group, what), strict=True))

    def _scored(self, group: list[Request], what: str) -> list[Answer]:
        from rlhf_recipes import inference

        tokenizer, reward_models = self._load()
        rows = [{"prompt": request.messages[:-1], "completion": request.messages[-1:]} for request in group]
        plain, _ = neutralise(rows, tokenizer)
        turns = [as_taken(tokenizer, row["prompt"]) + row["completion"] for row in plain]
        values_MB = [
            inference.rewards(reward_models.using(member.adapter), tokenizer, turns, f"{what}, {member.name}")
            for member in self.members
        ]
        for request, values in zip(group, zip(*values_MB, strict=True), strict=True):
            if not all(map(math.isfinite, values)):
                raise Refusal(f"judge.reward_model: {self.name} gives {values} for an answer to {request.prompt_id}.")
        sizes = [len(render(tokenizer, each, return_dict=False)) for each in turns]
        return [
            {"values": list(values), "prompt_tokens": size, "tokens": 0}
            for values, size in zip(zip(*values_MB, strict=True), sizes, strict=True)
        ]

    def _load(self) -> tuple:
        if self._loaded is None:
            from rlhf_recipes.adapters import RewardModels

            folders = [member.adapter for member in self.members]
            self._loaded = models.load_tokenizer(self.settings[0]), RewardModels(*self.settings, folders)
        return self._loaded


class RewardJudge:
    """Replies compared by their rewards, with the interface of `judge.Judge`.

    Args:
        settings: conf/judge/reward.yaml.

    Attributes:
        ordered: whether what it says may depend on the order of the replies.
        temperature: by which its log-odds are divided; None: its probabilities are taken as they are.
    """

    ordered = False

    def __init__(self, backend: Rewards, settings: DictConfig):
        self.backend, self.margin, self.max_disagreement = backend, settings.margin, settings.max_disagreement
        self.temperature = 1.0
        self.deviations_M = _deviations(backend.members)

    def learn_priors(self, journal: Journal) -> None:
        """There are none: a reward has no place in which a reply gains."""

    def compare(self, pairs: list[Pair], journal: Journal, what: str) -> list[Judgement]:
        return in_step([self.comparing(pairs, what)], journal)[0]

    def comparing(self, pairs: list[Pair], what: str) -> Work:
        requests = {
            (pair.prompt_id, text): Request(pair.prompt_id, "judge.reward", [*pair.prompt, assistant(text)])
            for pair in pairs
            for text in (pair.first, pair.second)
        }
        answers = yield Ask(self.backend, what, list(requests.values()))
        values = {key: np.array(answer["values"]) for key, answer in zip(requests, answers, strict=True)}
        return [
            self._judgement(values[pair.prompt_id, pair.first] - values[pair.prompt_id, pair.second]) for pair in pairs
        ]

    def _judgement(self, margins_M: np.ndarray) -> Judgement:
        margins_M = margins_M / self.deviations_M * self.deviations_M.mean() / self.temperature
        names = [member.name for member in self.backend.members]
        return Judgement(
            p=_sigma(margins_M.mean()),
            by_principle=dict(zip(names, map(_sigma, margins_M), strict=True)) if len(names) > 1 else {},
            spread=float(ensemble.disagreement(margins_M[:, None])[0]),
            mass=1.0,
        )

    def unclear(self, verdict: Judgement, limits: Any) -> str | None:
        """Why a pair is not taken: `disputed` where members disagree, unless all are within `judge.margin`; `tie`
        within it; or None."""

        def within(p: float) -> bool:
            return abs(math.log(p / (1 - p))) <= self.margin

        if verdict.spread > self.max_disagreement and not all(map(within, verdict.by_principle.values())):
            return "disputed"
        return "tie" if within(verdict.p) else None


class Function:
    """`backend.Backend` of a function: (prompts, first, second) -> probability that the first is better, of each."""

    places = 0

    def __init__(self, function: Callable, name: str):
        self.function, self.name = function, name

    def answer(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        left = [request for request in requests if request.key not in known]
        for start in range(0, len(left), ROWS):
            group = left[start : start + ROWS]
            prompts = [request.messages[:-2] for request in group]
            sides = [[request.messages[place]["content"] for request in group] for place in (-2, -1)]
            said = asked(self.function, prompts, *sides, where=f"judge.function={self.name}")
            yield [(r, {"values": [float(p)], "tokens": 0}) for r, p in zip(group, said, strict=True)]


class FunctionJudge:
    """A function's choices, with the interface of `judge.Judge`; see `RewardJudge` for the attributes."""

    ordered = True
    temperature = None

    def __init__(self, backend: Function):
        self.backend = backend

    def learn_priors(self, journal: Journal) -> None:
        """There are none to be learned of a function."""

    def compare(self, pairs: list[Pair], journal: Journal, what: str) -> list[Judgement]:
        return in_step([self.comparing(pairs, what)], journal)[0]

    def comparing(self, pairs: list[Pair], what: str) -> Work:
        requests = [
            Request(pair.prompt_id, f"judge.function.{order}", [*pair.prompt, *map(assistant, texts)])
            for pair in pairs
            for order, texts in (("AB", (pair.first, pair.second)), ("BA", (pair.second, pair.first)))
        ]
        answers = yield Ask(self.backend, what, requests)
        said = [answer["values"][0] for answer in answers]
        return [
            Judgement(p=(ab + 1 - ba) / 2, position_gap=ab + ba - 1, flip=(ab - 0.5) * (0.5 - ba) < 0, mass=1.0)
            for ab, ba in zip(said[::2], said[1::2], strict=True)
        ]

    def unclear(self, verdict: Judgement, limits: Any) -> str | None:
        """Why a pair is not taken: `disputed` where the order decides, or within `route.accept_margin`; `tie` within
        `route.tie_margin`; or None."""
        distance = abs(verdict.p - 0.5)
        if not verdict.flip and distance < limits.tie_margin:
            return "tie"
        return "disputed" if verdict.flip or distance < limits.accept_margin else None


def asked(judge: Callable, prompts: list, first: list[str], second: list[str], where: str) -> list[float]:
    """What a function says of each pair; of several processes the first asks.

    Args:
        where: key and value as typed, for refusals.

    Raises:
        Refusal: it raises, or gives not as many probabilities as there are pairs.
    """

    def ask() -> list[float]:
        with users_function(where):
            return list(judge(prompts, first, second))

    said = ranks.by_first(ask)
    if len(said) != len(prompts):
        raise Refusal(f"{where}: gave {len(said)} probabilities for {len(prompts)} pairs. Give one for each.")
    for p in said:
        if not isinstance(p, Real) or not 0 <= p <= 1:
            raise Refusal(f"{where}: gave {p!r:.40}. Give the probability that the first answer is better, 0 to 1.")
    return said


def _deviations(members: list[ModelRef]) -> np.ndarray:
    """The standard deviation of each member's rewards of held-out replies, as its run reports them, shape (M,); 1 of
    all where one does not."""
    found = [getattr(member.metrics.get("sd_reward"), "value", None) for member in members]
    if len(members) > 1 and not all(found):
        silent = ", ".join(member.name for member, sd in zip(members, found, strict=True) if not sd)
        print(f"judge.reward_model: {silent} does not say the deviation of its rewards; all are taken as they are.")
    return np.array(found, float) if all(found) else np.ones(len(members))


def _sigma(margin: float) -> float:
    return float(np.clip(1 / (1 + math.exp(-min(max(margin, -50.0), 50.0))), *EXTREMES))
