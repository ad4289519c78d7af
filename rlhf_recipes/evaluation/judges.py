"""Win rate by the judge of cai: which of two answers is better under a constitution, asked in both orders.

An answer's verdict is the judge's probability p that it beats the parent's (`cai.judge`), or one half where the judge
does not know: the same text twice (nothing is asked), |p - 1/2| below `tie_margin`, another winner in the other order
(Zheng et al. 2023, arXiv:2306.05685, section 3.4), or no answer. The judge's answers lie in the run folder as they
come, so that an interrupted evaluation asks nothing twice.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import ranks
from rlhf_recipes.cai import constitution, fingerprint, gate, prompt_templates
from rlhf_recipes.cai.backend import Journal
from rlhf_recipes.cai.judge import Judge, Judgement, Pair
from rlhf_recipes.cai.load import find_judge_adapter, load_one
from rlhf_recipes.cai.scored import asked
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation.measurements import Measurements
from rlhf_recipes.references import ModelRef

# What compares policies, where a judge of cai labels pairs alone.
INSTEAD = {
    "reward": "reward_model=<run>",
    "function": "judge_function=<module:function>",
    "people": "judge=local or judge=server",
}
TYPED = "chat tokens made plain for the judge"  # their number, among the settings


def check(cfg: DictConfig) -> ModelRef | None:
    """Refuse what cannot judge; nothing is loaded or sent.

    Returns:
        What `judge.adapter` names.

    Raises:
        Refusal: two judges, one that labels pairs alone, an adapter of another base, an endpoint without its key, a
            broken constitution.
    """
    node = cfg.get("judge")
    if node is None:
        return None
    if cfg.judge_function:
        raise Refusal(f"judge_function={cfg.judge_function}: there is a judge already. Give one of the two.")
    if node.kind in INSTEAD:
        raise Refusal(f"judge={node.kind}: labels pairs in recipes/cai.py. Here give {INSTEAD[node.kind]}.")
    if cfg.judging.principles_per_pair < 1:
        raise Refusal(f"judging.principles_per_pair={cfg.judging.principles_per_pair}: must be at least 1. Change it.")
    constitution.load(cfg.constitution)
    if node.kind == "server":
        load_one(node, cfg, None)
    return find_judge_adapter(node)


def look(cfg: DictConfig, rows: list[dict], fixed: list[dict]) -> None:
    """Ask a judge's endpoint what it serves, before anything is measured.

    Args:
        rows: the held-out rows, which have the `prompt` of each `prompt_id` as a conversation.
        fixed: of `fixed_answers.load`.

    Raises:
        Refusal: of `fingerprint.check`.
    """
    if cfg.get("judge") is None or cfg.judge.kind != "server":
        return
    prompts = list({row["prompt_id"]: row["prompt"] for row in rows}.values())[: cfg.prompts]
    shown = max(map(gate.tokens, prompts), default=0) + 2 * cfg.max_new_tokens
    for row in fixed:
        theirs = gate.tokens([{"role": "assistant", "content": row["output"]}])
        shown = max(shown, gate.tokens(row["prompt"]) + theirs + cfg.max_new_tokens)
    needed = {"judge": gate.asked_of_judge(shown, cfg.judging)}
    backends = {"judge": load_one(cfg.judge, cfg, None)}
    ranks.by_first(fingerprint.check, backends, needed, votes=cfg.judging.votes)


def load(cfg: DictConfig, adapter: ModelRef | None) -> Judge | None:
    """The judge, ready to be asked; None without one.

    Args:
        adapter: of `check`.
    """
    if cfg.get("judge") is None:
        return None
    return Judge(load_one(cfg.judge, cfg, adapter), constitution.load(cfg.constitution), cfg.judging, cfg.seed)


def compare(judge: Judge, measurements: Measurements, rows: list[dict], path: Path, tie_margin: float) -> Measurements:
    """The measurements with `judgements` of each system's answers against the parent's.

    Args:
        rows: the held-out rows, which have the `prompt` of each `prompt_id` as a conversation.
        path: of the file that keeps the judge's answers.
    """
    prompts = {row["prompt_id"]: row["prompt"] for row in rows}
    parent, journal = measurements.parent, Journal(path)
    # Of a run that goes on: whether the model is the one that it began with.
    ranks.by_first(fingerprint.check, {"judge": judge.backend}, {"judge": 0}, journal, votes=True)
    judge.learn_priors(journal)
    judgements, typed = {}, 0
    for name in measurements.systems:
        if name == parent:
            continue
        pairs = [
            Pair(
                row["prompt_id"], prompts[row["prompt_id"]], *(row["systems"][each]["text"] for each in (name, parent))
            )
            for row in measurements.answers
        ]
        differ = [n for n, pair in enumerate(pairs) if pair.first != pair.second]
        typed += sum(prompt_templates.chat_tokens(pairs[n].first, pairs[n].second) for n in differ)
        answered = judge.compare([pairs[n] for n in differ], journal, f"judge: {name}")
        by_place = dict(zip(differ, answered, strict=True))
        judgements[name] = [verdict(pair.prompt_id, by_place.get(n), tie_margin) for n, pair in enumerate(pairs)]
    asked_of = {"judge": judge.backend.name, "constitution": f"{judge.constitution.name} {judge.constitution.version}"}
    asked_of |= {TYPED: typed} if typed else {}
    return replace(measurements, judgements=judgements, settings=measurements.settings | asked_of)


def verdict(prompt_id: str, judgement: Judgement | None, tie_margin: float) -> dict[str, Any]:
    """What a judgement comes to: `p`, one half where it is a `tie`; `asked`, False for the same text twice; and of
    what was asked `answered`, `flip` (None where not answered) and `gap`, the gain of the first place."""
    if judgement is None:
        return {"prompt_id": prompt_id, "p": 0.5, "tie": True, "asked": False}
    answered = judgement.p is not None
    tie = not answered or judgement.flip or abs(judgement.p - 0.5) < tie_margin
    return {
        "prompt_id": prompt_id,
        "p": 0.5 if tie else judgement.p,
        "tie": bool(tie),
        "asked": True,
        "answered": answered,
        "flip": judgement.flip if answered else None,
        "gap": judgement.position_gap if answered else None,
    }


def by_function(judge: Callable, prompts: list[dict], answers: dict, name: str, parent: str) -> list[dict]:
    """The same of a `judge_function`, which is asked of every pair; its mean probability is taken as it is."""
    conversations = [row["prompt"] for row in prompts]
    own, other = ([answer["text"] for answer in answers[key]] for key in (name, parent))
    where = f"judge_function={getattr(judge, '__name__', judge)}"
    first, second = asked(judge, conversations, own, other, where), asked(judge, conversations, other, own, where)
    rows = []
    for row, a, b, p, q in zip(prompts, own, other, first, second, strict=True):
        mean = (p + 1 - q) / 2
        found = {"prompt_id": row["prompt_id"], "p": mean, "tie": abs(mean - 0.5) < 1e-9, "asked": a != b}
        if a != b:
            found |= {"answered": True, "flip": (p - 0.5) * (0.5 - q) < 0, "gap": p + q - 1}
        rows.append(found)
    return rows
