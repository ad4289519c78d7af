"""An audit's work in order: score once what every part asks for, then hand rows and numbers to the parts.

Models are here and in `scoring` and `answers`; the parts see arrays alone.
"""

import hashlib
import os
import random
from collections.abc import Container
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import ensemble, models, progress, ranks, references, run_folder
from rlhf_recipes.audit import answers, benchmark, credit, judgements, preference, stress, verdict
from rlhf_recipes.audit.scoring import Ensemble
from rlhf_recipes.data.fit import left_out
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.data.load import Splits, load_prompts
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import served_policies
from rlhf_recipes.references import ModelRef
from rlhf_recipes.run import SCORES, Run
from rlhf_recipes.text import line

# Prompts worth labelling that the file and the page have at most.
LISTED, SHOWN = 256, 10
# Of a data node: what it learns from, where else it has its held-out rows, and what the draw of these depends on.
ROWS, TEST, DRAWN = ("path", "name", "revision", "train_split"), ("test_path", "test_split"), ("test_size", "seed")


@dataclass
class Sources:
    """What an audit reads beside its pairs, checked before a model loads.

    Attributes:
        reward_models: one, or the members of an ensemble in order.
        stress: (pairs, templates) of a file.
        deployment: prompts of the place where the reward model is used, or None.
        judgements: labels of judges, of principles or of people.
        gold: of `answers.find_gold`, or None.
        checkpoints: runs whose checkpoints are held against gold.
        ppo: of `credit.read_run`, or None.
        questions: of the benchmark; none where none is asked for.
        own: judges whose words the labels of the pairs are.
    """

    reward_models: list[ModelRef]
    stress: tuple[list, list]
    deployment: list[dict] | None
    judgements: list[dict]
    gold: answers.Gold | None
    checkpoints: list[answers.KeptRun]
    ppo: dict | None
    questions: list[benchmark.Question] = field(default_factory=list)
    own: frozenset[str] = frozenset()


def find(cfg: DictConfig) -> Sources:
    """All that the config names.

    Raises:
        Refusal: on one line, for the first that is not there or not right.
    """
    given = cfg.reward_model if isinstance(cfg.reward_model, str) else list(cfg.reward_model)
    reward_models = references.find_reward_models(given, "reward_model", cfg.model.id, cfg.model.adapter_base)
    policy = [references.find(cfg.model.adapter, "model.adapter").adapter] if cfg.model.adapter else []  # it answers
    models.check_named_bases(cfg.model, [*policy, *(each.adapter for each in reward_models)])
    gold = answers.find_gold(cfg, reward_models)
    compared = [cfg.checkpoints] if isinstance(cfg.checkpoints, str) else list(cfg.checkpoints or [])
    if compared and not gold:
        raise Refusal("checkpoints: need gold=<another reward model, module:function or labels.jsonl>. Give it.")
    kept = [answers.find_run(each, cfg.model.id) for each in compared]
    scorers = [*reward_models, *(gold.source if gold and isinstance(gold.source, list) else [])]
    models.check_templates(cfg.model, [each.adapter for each in scorers], reward=True)
    models.check_templates(cfg.model, [*policy, *(adapter for run in kept for _, adapter in run.steps)])
    judged = [(path, judgements.load(path)) for path in cfg.judgements]
    labelled = _labelling(cfg.data)
    return Sources(
        reward_models,
        ([], []) if not cfg.stress else stress.load(stress.CLINIC if cfg.stress == "clinic" else cfg.stress),
        _deployment(cfg) if cfg.deployment else None,
        [each for _, said in judged for each in said],
        gold,
        kept,
        credit.read_run(cfg.ppo_run) if cfg.ppo_run else None,
        benchmark.load(cfg.benchmark) if cfg.benchmark else [],
        frozenset(each["judge"] for path, said in judged if _run_of(path) in labelled for each in said),
    )


def _run_of(path: str) -> Path:
    """The folder, or that of the file."""
    found = _place(path)
    return Path(found if os.path.isdir(found) else os.path.dirname(found))


def _place(path: str) -> str:
    """Compared and never opened: a config that others wrote may hold what is no path."""
    return os.path.abspath(os.path.expanduser(path))


def _labelling(data: DictConfig) -> set[Path]:
    """Folders of the runs of cai and label whose words the labels of the pairs are; with judge=people, of both."""
    found = {_run_of(data[key]) for key in ("path", "test_path") if data[key]}
    for home in filter(run_folder.marked, list(found)):
        judge = run_folder.read_config(home).get("judge")
        people = judge.get("labels") if isinstance(judge, dict) else None
        found |= {_run_of(people)} if isinstance(people, str) else set()
    return {home for home in found if run_folder.marked(home)}


def _doubts(cfg: DictConfig, reward_models: list[ModelRef], report: dict) -> list[str]:
    """Why pairs that are held out here may have been in the training of a reward model, a sentence for each reason.

    Args:
        report: on the pairs, of `data.load`.
    """
    found: dict[str, list[str]] = {}
    drawn = f"held out, seed {cfg.data.seed}" in report["split"]
    # rows of a test split or file are in the training of no other, but for those that the train rows hold too
    keys = (*ROWS, *TEST, *DRAWN) if drawn else (*ROWS, *TEST) if report["dropped"].get("leakage") else ROWS
    for member in reward_models:
        home = references.home_of(member.adapter)
        trained = run_folder.read_config(home).get("data") if run_folder.marked(home) else None
        if isinstance(trained, dict):
            other = [key for key in keys if _differ(key, trained.get(key), cfg.data[key])]
            why = ", ".join(f"data.{key}={trained.get(key)!s:.80} (here {cfg.data[key]})" for key in other)
            why = why and f"learned from {why}"
        else:
            why = "has no config that says which pairs it learned from"
        if why:
            found.setdefault(why, []).append(str(home))
    return [
        f"{', '.join(names)} {why}: pairs held out here may have been in that training, and train pairs not."
        for why, names in found.items()
    ]


def _differ(key: str, one: str | float | None, other: str | float | None) -> bool:
    if key in ("path", "test_path") and isinstance(one, str) and isinstance(other, str):
        return _place(one) != _place(other)
    return one != other


def _deployment(cfg: DictConfig) -> list[dict]:
    """Every prompt of a file, whatever its split."""
    node = {**OmegaConf.to_container(cfg.data, resolve=True), "path": cfg.deployment, "test_path": None}
    node |= {"format": "pairs", "train_size": None, "eval_size": None, "bootstrap": None}
    node["columns"] = {**node["columns"], "split": None}
    splits = load_prompts(OmegaConf.create(node))
    prompts, report = [*splits.train, *splits.test], splits.report
    print(line(f"deployment: {report['source']}: {len(prompts)} prompts of {report['rows']} rows; {left_out(report)}"))
    return prompts


@dataclass
class Findings:
    """What an audit found.

    Attributes:
        sections: of the report.
        label_next: prompts whose label would teach most, most first: `prompt`, `family`, `why`.
        disputed: pairs on which judges or the reward model disagree, for people to label.
    """

    sections: list[dict]
    label_next: list[dict]
    disputed: list[dict]


def take(cfg: DictConfig, found: Sources, pairs: Splits, tokenizer, run: Run) -> Findings:
    """Score what is needed, then every part in turn."""
    from rlhf_recipes.audit import (
        calibration,
        consistency,
        coverage,
        disagreement,
        overoptimisation,
        probes,
        uncertainty,
    )

    rows, train = [*pairs.test], pairs.train
    _look(cfg, found, rows)
    doubts = _doubts(cfg, found.reward_models, pairs.report)
    for doubt in doubts:
        print(line(doubt), flush=True)
    least = verdict.check(dict(cfg.thresholds))["min_prompts"] or 0  # of a figure that decides
    members = Ensemble(cfg.model, cfg.quantization, tokenizer, found.reward_models, run.dir / SCORES, cfg.fast_forward)
    held_out = members.score(_turns(rows), "held-out pairs", features=True, kept=pairs.kept)
    scored = Scored(members, held_out.rewards_MC)
    chosen_MN, rejected_MN = _sides(ensemble.aligned(held_out.rewards_MC, held_out.rewards_MC))
    sample = random.Random(cfg.seed).sample(train, min(cfg.ledger_pairs, len(train)))
    ledger = members.score(_turns(sample), "train pairs", features=True, first_alone=True, kept=pairs.kept)
    ledger_KF = ledger.features_CF
    margins_N = (chosen_MN - rejected_MN).mean(0)
    novelty_N2 = uncertainty.mahalanobis(ledger_KF, held_out.features_CF).reshape(-1, 2)
    ids = clusters(rows)
    validation = np.array([_in_first_half(each) for each in ids])
    test = [row for row, first in zip(rows, validation, strict=True) if not first]

    made = _edited(cfg, found, pairs, rows)
    stressed = scored.pairs(made["stress"], "stress")
    edited_MK, parts_MK = (scored.answers(made[name], name) for name in ("probes", "credit"))
    told = [*judgements.from_pairs(chain(train, rows)), *found.judgements]
    spreads_2N = _sides(ensemble.standardise(held_out.rewards_MC, held_out.rewards_MC))
    candidates = Candidates(rows, novelty_N2.max(1), (spreads_2N[0] - spreads_2N[1]).std(0), {})
    if found.deployment:
        candidates = _deployed(cfg, found.deployment, scored, _start(cfg, tokenizer, run), ledger_KF, novelty_N2)
    over = _against_gold(cfg, found, scored, tokenizer, rows, run) if found.gold else {}
    parts = {
        "preference": partial(preference.audit, rows, margins_N, train, doubts),
        "calibration": partial(
            calibration.audit, margins_N[validation], margins_N[~validation], test,
            [each for each, first in zip(ids, validation, strict=True) if first],
            validation_p=np.array([1.0 if row["p"] is None else row["p"] for row in rows])[validation],
        ),
        "uncertainty": partial(uncertainty.audit, rows, chosen_MN, rejected_MN, novelty_N2),
        "stress": partial(stress.audit, made["stress"], *stressed, rows, chosen_MN, rejected_MN, least),
        "probes": partial(probes.audit, made["probes"], edited_MK, rows, chosen_MN, rejected_MN, least),
        "over-optimisation": partial(overoptimisation.audit, **over),
        "coverage": partial(coverage.audit, train, **candidates.coverage),
        "disagreement": partial(
            disagreement.audit, told, rows, chosen_MN, rejected_MN, own=found.own, least=least,
        ),
        "consistency": partial(consistency.audit, told),
        "credit": partial(credit.audit, made["credit"], parts_MK, rows, found.ppo),
    }  # fmt: skip
    if found.questions:
        parts["benchmark"] = _benchmark(cfg, found, scored, tokenizer)
    done = []
    for names in progress.batches("figures", len(parts), [[name] for name in parts]):
        done += [ranks.by_first(parts[name]) for name in names]  # of numbers that all have
    return Findings(
        done,
        _label_next(candidates, len(chosen_MN), {row["prompt_id"] for row in chain(train, rows)}),
        disagreement.disputed(told, rows, chosen_MN, rejected_MN),
    )


def _look(cfg: DictConfig, found: Sources, rows: list[dict]) -> None:
    """An endpoint that will answer is asked what it can do before anything is scored.

    Raises:
        Refusal: it cannot do it.
    """
    asked = [row["prompt"] for row in (*(rows if found.gold else ()), *(found.deployment or ()))]
    if asked and (served := served_policies.look(cfg, asked)) and found.gold and found.checkpoints:
        answers.refuse_without_kl(served)


@dataclass(frozen=True)
class Candidates:
    """P prompts that could be labelled next, how far their answers are from the train pairs and how far the reward
    models differ on these; and arguments of `coverage.audit`."""

    rows: list[dict]
    novelty_P: np.ndarray
    spread_P: np.ndarray
    coverage: dict


def _deployed(cfg: DictConfig, prompts: list[dict], scored: "Scored", sampler, ledger_KF, novelty_N2) -> Candidates:
    """Answers to a sample of the deployment prompts; held-out answers stand beside them one by one, as they are."""
    from rlhf_recipes.audit import uncertainty

    rows = random.Random(cfg.seed).sample(prompts, min(cfg.prompts, len(prompts)))
    texts = [answer["text"] for answer in sampler.answers(None, rows, "deployment")]
    turns = [row["prompt"] + [{"role": "assistant", "content": t}] for row, t in zip(rows, texts, strict=True)]
    result = scored.ensemble.score(turns, "deployment", features=True)
    scaled_MP = ensemble.standardise(result.rewards_MC, scored.reference_MK)
    novelty_P = uncertainty.mahalanobis(ledger_KF, result.features_CF)
    ledger = {
        "deployment_prompts": [row["prompt"] for row in prompts],
        "features": {"held_out": novelty_N2.ravel(), "deployment": novelty_P},
        "generated": [{"prompt": row["prompt"], "text": text} for row, text in zip(rows, texts, strict=True)],
    }
    return Candidates(rows, novelty_P, scaled_MP.std(0), ledger)


def _label_next(candidates: Candidates, members: int, labelled: Container[str]) -> list[dict]:
    """Prompts worth labelling, each with the reason in words: of a deployment's sample all that `labelled` lacks, by
    `prompt_id`; of the held-out pairs, which all have a label, a few that are worth another."""
    from rlhf_recipes.audit import coverage

    answers = candidates.coverage.get("features")
    held_out, what = (answers["held_out"], "answers") if answers else (candidates.novelty_P, "pairs")
    left = [n for n, row in enumerate(candidates.rows) if not answers or row["prompt_id"] not in labelled]
    rows = [candidates.rows[n] for n in left]
    prompts = [row["prompt"][-1]["content"] for row in rows]
    families = [row["family"] or "" for row in rows]
    spread_P = candidates.spread_P[left] if members > 1 else None
    asked, k = [], LISTED if answers else SHOWN
    for worth in coverage.worth_labelling(prompts, candidates.novelty_P[left], spread_P, families, k):
        share = (held_out < worth["novelty"]).mean()
        said = [] if worth["uncertainty"] is None else [f"the reward models differ by {worth['uncertainty']:.2f}"]
        why = "; ".join([*said, f"further from the train pairs than {share:.0%} of the held-out {what}"])
        asked.append({"prompt": worth["prompt"], "family": worth["family"] or None, "why": why})
    return asked


@dataclass
class Scored:
    """Pair rows and answers through an ensemble whose members are on one scale in every part, `ensemble.aligned`.

    Attributes:
        reference_MK: the members' own scores of the held-out answers, which give each its scale.
    """

    ensemble: Ensemble
    reference_MK: np.ndarray

    def pairs(self, rows: list[dict], part: str) -> tuple[np.ndarray, np.ndarray]:
        """chosen_MN, rejected_MN"""
        return _sides(ensemble.aligned(self.ensemble.score(_turns(rows), part).rewards_MC, self.reference_MK))

    def answers(self, made: list[dict], part: str) -> np.ndarray:
        return self.conversations([row["prompt"] + row["completion"] for row in made], part)

    def conversations(self, turns: list[list[dict]], part: str) -> np.ndarray:
        return ensemble.aligned(self.ensemble.score(turns, part).rewards_MC, self.reference_MK)


def _edited(cfg: DictConfig, found: Sources, pairs: Splits, rows: list[dict]) -> dict[str, list[dict]]:
    """The edits of the held-out pairs that each of three parts scores."""
    from rlhf_recipes.audit import probes

    made = {
        "stress": stress.make(rows, *found.stress, limit=cfg.stress_pairs, seed=cfg.seed),
        "probes": probes.make(rows, limit=cfg.probe_pairs, seed=cfg.seed),
        "credit": credit.make(rows, limit=cfg.credit_pairs, seed=cfg.seed),
    }
    is_whole = pairs.sizes["test"].longest <= cfg.max_length  # beyond a cut an edit would be none
    return {
        part: [each for each in edits if each["source"] is None or is_whole[each["source"]]]
        for part, edits in made.items()
    }


def _benchmark(cfg: DictConfig, found: Sources, scored: "Scored", tokenizer) -> partial:
    """The part that a benchmark's questions make, those that fit."""
    asked = benchmark.fitting(found.questions, tokenizer, cfg.max_length)
    rewards_MC = scored.conversations([turns for each in asked for turns in each.conversations], "benchmark")
    left_out = len(found.questions) - len(asked)
    return partial(benchmark.audit, cfg.benchmark, asked, rewards_MC.mean(0), left_out)


def _turns(rows: list[dict]) -> list[list[dict]]:
    """The conversations of pairs, chosen and rejected in turn."""
    return [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]


def _sides(rewards_MC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of chosen and of rejected answers, which lie in turn."""
    return rewards_MC[:, ::2], rewards_MC[:, 1::2]


def _against_gold(cfg: DictConfig, found: Sources, scored: Scored, tokenizer, rows: list[dict], run: Run) -> dict:
    """Arguments of `overoptimisation.audit`."""
    prompts = list({row["prompt_id"]: row for row in rows}.values())[: cfg.prompts]
    gold = answers.load_gold(cfg, found.gold.source, tokenizer, run.dir, _turns(prompts))
    proxies = scored.ensemble, scored.reference_MK
    given = {}
    if cfg.samples:
        given["best_of_n"] = answers.best_of_n(cfg, _start(cfg, tokenizer, run), *proxies, gold, prompts)
    for kept in found.checkpoints:
        sampler = answers.Sampler(cfg, tokenizer, kept.start, [adapter for _, adapter in kept.steps], run.dir / SCORES)
        entry = answers.checkpoints(cfg, kept, sampler, *proxies, gold, prompts)
        entry["optimised"] = bool(kept.rewards & found.gold.identities)
        given.setdefault("checkpoints", []).append(entry)
    if isinstance(gold, answers.Labels):
        gold.refuse_missing()
    return {name: [entry | {"gold_kind": found.gold.kind} for entry in entries] for name, entries in given.items()}


def _start(cfg: DictConfig, tokenizer, run: Run) -> answers.Sampler:
    """The policy whose answers are looked at: `model.adapter`, or the base."""
    return answers.Sampler(cfg, tokenizer, run.parent and run.parent.adapter, [], run.dir / SCORES)


def _in_first_half(cluster: str) -> bool:
    return hashlib.sha256(cluster.encode()).digest()[0] < 128
