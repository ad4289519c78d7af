"""Conversations that open alike are one cluster, wherever an interval is bootstrapped."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from rlhf_recipes.audit import (
    calibration,
    consistency,
    coverage,
    credit,
    disagreement,
    judgements,
    preference,
    probes,
    stress,
    uncertainty,
)
from rlhf_recipes.cai.judge import Judgement, validate_judge
from rlhf_recipes.data.formats import clusters, prompt_id
from rlhf_recipes.launch.preflight import rows as preflight
from rlhf_recipes.stats import Estimate
from rlhf_recipes.training import metrics

OPENINGS, STAGES = 24, 3
LIMITS = OmegaConf.create({"min_parsed": 0.9, "min_swap_consistency": 0.5})


def stage(opening, turns, greeting=""):
    """A pair after so many turns of a conversation."""
    said = [{"role": "user", "content": f"{greeting}Question {opening}. Is it so?"}]
    for turn in range(1, turns):
        said += [{"role": "assistant", "content": f"Answer {turn}."}, {"role": "user", "content": f"And {turn}?"}]
    replies = (
        f"Yes, {opening} it is. Indeed." + " Really." * turns,
        f"No, {turns} it is not. Never." + " Well." * opening,
    )
    chosen, rejected = replies if (opening + turns) % 3 else replies[::-1]
    row = {"prompt": said, "prompt_id": prompt_id(said), "family": f"f{opening % 2}", "p": None}
    return row | {
        side: [{"role": "assistant", "content": t}] for side, t in (("chosen", chosen), ("rejected", rejected))
    }


ROWS = [stage(opening, turns) for opening in range(OPENINGS) for turns in range(1, STAGES + 1)]
N = len(ROWS)
RNG = np.random.default_rng(0)
CHOSEN_MN, REJECTED_MN = RNG.normal(0.4, 1, (2, N)), RNG.normal(size=(2, N))
LOGPS = [{"chosen_logp": c, "rejected_logp": r, "chosen_tokens": 9, "rejected_tokens": 9}
         for c, r in zip(CHOSEN_MN[0], REJECTED_MN[0], strict=True)]  # fmt: skip
HALVES = [row | {"completion": row[side], "label": side == "chosen", "pair": i}
          for i, row in enumerate(ROWS) for side in ("chosen", "rejected")]  # fmt: skip


def audit_of(part, score=None):
    """A part of the audit on its own edits of ROWS, scored at random."""
    made = part.make(ROWS, limit=N)
    if part is stress:
        scores = RNG.normal(size=(2, 2, len(made)))
        return part.audit(made, *scores, ROWS, CHOSEN_MN, REJECTED_MN)
    scores = RNG.normal(size=(2, len(made)))
    return part.audit(made, scores, ROWS, *(() if part is credit else (CHOSEN_MN, REJECTED_MN)))


def told():
    """Two judges of every pair, one of whom is not given the prompts, and third answers to make rings."""
    found = judgements.from_pairs(ROWS)
    found += [each | {"judge": "other", "prompt": None, "p": 0.3 if i % 4 else 0.8, "flip": i % 5 == 0}
              for i, each in enumerate(found)]  # fmt: skip
    thirds = [each | {"second": "A third.", "p": 0.6} for each in found[:N]]
    return (
        found
        + thirds
        + [each | {"first": other["second"], "p": 0.7} for each, other in zip(thirds, found, strict=False)]
    )


def judged():
    said = [Judgement(float(p), {}, 0.1, 0.0, bool(i % 3), 1.0) for i, p in enumerate(RNG.uniform(0.2, 0.9, N))]
    return validate_judge(SimpleNamespace(ordered=True), ROWS, said, LIMITS)


MEASURED = {
    "pairs": lambda: metrics.preference_metrics(ROWS, LOGPS, LOGPS[::-1], "log_ratio"),
    "rewards": lambda: metrics.reward_metrics(
        ROWS, *[[{"chosen": c, "rejected": r} for c, r in zip(*m, strict=True)]
                for m in zip(CHOSEN_MN, REJECTED_MN, strict=True)]),
    "labels": lambda: metrics.label_metrics(HALVES, *[[(float(x), 9) for x in RNG.normal(size=2 * N)] for _ in "ab"]),
    "demonstrations": lambda: metrics.demonstration_metrics(ROWS, [(-9.0 - i % 5, 9) for i in range(N)]),
    "preflight": lambda: {"r": preflight.length_correlation(
        [r["chosen"][-1]["content"] for r in ROWS], [r["rejected"][-1]["content"] for r in ROWS], clusters(ROWS))},
    "a judge": judged,
    "preference": lambda: preference.audit(ROWS, (CHOSEN_MN - REJECTED_MN).mean(0), ROWS),
    "calibration": lambda: calibration.audit(*(CHOSEN_MN - REJECTED_MN)[::-1], ROWS, clusters(ROWS)),
    "uncertainty": lambda: uncertainty.audit(ROWS, CHOSEN_MN, REJECTED_MN),
    "stress": lambda: audit_of(stress),
    "probes": lambda: audit_of(probes),
    "credit": lambda: audit_of(credit),
    "coverage": lambda: coverage.audit(ROWS),
    "disagreement": lambda: disagreement.audit(told(), ROWS, CHOSEN_MN, REJECTED_MN),
    "consistency": lambda: consistency.audit(told()),
}  # fmt: skip


def estimates(found):
    """Every estimate in nested containers, and in the figures of a part."""
    if isinstance(found, Estimate):
        yield found
    elif isinstance(found, dict):
        for each in found.values():
            yield from estimates(each)
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from estimates(each)
    elif hasattr(found, "estimate"):
        yield found.estimate


@pytest.mark.slow
@pytest.mark.parametrize("what", MEASURED)
def test_stages_of_one_conversation_are_one_cluster(what):
    found = [each for each in estimates(MEASURED[what]()) if each.low is not None]
    assert found and max(each.clusters for each in found) <= OPENINGS, [e for e in found if e.clusters > OPENINGS]
    for each in found:
        assert not math.isnan(each.value) and each.low <= each.high


def test_clusters_are_openings_labels_or_prompts():
    alike = [stage(1, 1), stage(1, 3), stage(2, 1)]
    first, second, third = clusters(alike)
    assert first == second == alike[0]["prompt_id"] and third == alike[2]["prompt_id"]
    assert clusters([row | {"cluster": "made of"} for row in alike]) == ["made of"] * 3
    # one greeting that opens all conversations tells nothing apart
    greeted = [stage(1, turns) for turns in (2, 3)]
    assert clusters(greeted) == [row["prompt_id"] for row in greeted]
    assert clusters([{"prompt": "text", "prompt_id": "p"}, {"prompt_id": "q"}]) == ["p", "q"] and clusters([]) == []
