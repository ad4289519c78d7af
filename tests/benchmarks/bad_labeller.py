"""Which gate of the rounds stops a labeller who goes bad in round two, and how often a good one is stopped.

    python tests/benchmarks/bad_labeller.py

Plain numbers, no model: an answer is its gold, a standard normal number; the labeller is a function that is asked in
both orders by the judge that labels in recipes/cai.py, routed by its limits, and looked at by the gates of
`launch.rounds`, at their defaults. What training would make of the labels is not in it: the gates on win rate, KL and
reward model are not asked.
"""

import argparse
import hashlib
from types import SimpleNamespace

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.cai.judge import Pair
from rlhf_recipes.cai.scored import Function, FunctionJudge
from rlhf_recipes.config import CONF
from rlhf_recipes.launch import rounds

CARELESS = 0.05  # of the pairs that a good labeller gets wrong
FLIPPED = 0.3


def chance(*parts) -> float:
    """In [0, 1), the same for the same parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) / 2**64


def good(a: str, b: str) -> bool:
    """Whether the first is called better; wrong on the same pairs whichever comes first."""
    return (float(a.split()[0]) > float(b.split()[0])) != (chance("careless", *sorted((a, b))) < CARELESS)


LABELLERS = {
    "good": good,
    "flips 30 % of its answers": lambda a, b: good(a, b) != (chance("answer", a, b) < FLIPPED),
    "flips 30 % of the pairs, in both orders": lambda a, b: good(a, b) != (chance("pair", *sorted((a, b))) < FLIPPED),
    "always takes the left": lambda a, b: True,
}


def label(labeller, count: int, seed: int) -> tuple[list[bool], list[bool], float]:
    """Of `count` pairs: whether each is disputed, whether its label is the gold one; and the share of wrong labels of
    those that are accepted."""
    limits = SimpleNamespace(tie_margin=0.05, accept_margin=0.1)
    golds = np.random.default_rng(seed).standard_normal((count, 2))
    pairs = [Pair(f"{seed}.{n}", [], f"{a} {seed}.{n}.0", f"{b} {seed}.{n}.1") for n, (a, b) in enumerate(golds)]
    judge = FunctionJudge(
        Function(lambda _, first, second: [float(labeller(a, b)) for a, b in zip(first, second, strict=True)], "it")
    )
    work = judge.comparing(pairs, "judge")
    asked = next(work)
    answers = [answer for group in asked.backend.answer(asked.requests, (), "") for _, answer in group]
    try:
        work.send(answers)
    except StopIteration as ended:
        judged = ended.value
    disputed = [judge.unclear(each, limits) == "disputed" for each in judged]
    right = [(each.p > 0.5) == (a > b) for each, (a, b) in zip(judged, golds, strict=True)]
    accepted = [r for r, d in zip(right, disputed, strict=True) if not d]
    return disputed, right, 1 - float(np.mean(accepted)) if accepted else float("nan")


def stopped(labeller, labels: int, known: int, seed: int, limits: dict) -> tuple[int | None, str, float]:
    """Round and gate that end a loop of two rounds, or (None, ""); and the share of wrong labels in round two."""
    begun, wrong = None, float("nan")
    for k, who in ((1, good), (2, labeller)):
        disputed, _, wrong = label(who, labels, seed * 10 + k)
        _, right, _ = label(who, known, seed * 10)  # the same pairs in both rounds
        agreement = stats.estimate(right)
        begun = agreement.value if begun is None else begun
        for gate, found, side in (
            ("max_disputed", stats.estimate(disputed), "max"),
            ("min_known_change", rounds._change(agreement, begun), "min"),
        ):
            if rounds._misses(found, limits[gate], side):
                return k, gate, wrong
    return None, "", wrong


def main() -> None:
    from omegaconf import OmegaConf

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loops", type=int, default=200)
    args = parser.parse_args()
    limits = OmegaConf.load(CONF / "pipeline.yaml").loop.gates
    columns = (
        "labels, known pairs",
        "stopped in 1",
        "in 2, by disputed",
        "in 2, by known pairs",
        "not",
        "wrong labels",
    )
    print(f"| labeller from round two on | {' | '.join(columns)} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, labeller in LABELLERS.items():
        for labels, known in ((24, 32), (100, 200)):
            runs = [stopped(labeller, labels, known, seed, limits) for seed in range(args.loops)]
            counts = [
                sum(when == 1 for when, _, _ in runs),
                sum((when, gate) == (2, "max_disputed") for when, gate, _ in runs),
                sum((when, gate) == (2, "min_known_change") for when, gate, _ in runs),
                sum(when is None for when, _, _ in runs),
            ]
            wrong = [share for _, _, share in runs if not np.isnan(share)]
            said = f"{np.mean(wrong):.0%}" if wrong else "none is accepted"
            print(f"| {name} | {labels}, {known} | {' | '.join(f'{n} of {args.loops}' for n in counts)} | {said} |")


if __name__ == "__main__":
    main()
