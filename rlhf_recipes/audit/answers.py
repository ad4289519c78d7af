"""Answers to hold a proxy reward against gold: many samples of each prompt, and the samples of a run's checkpoints.

Gold is another reward model or ensemble, a function, or a person's labels; what it says of an answer counts, what the
proxy says is what would be optimised.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from rlhf_recipes import config, ensemble, lineage, ranks, references
from rlhf_recipes.audit.scoring import Ensemble
from rlhf_recipes.data import formats
from rlhf_recipes.errors import Refusal, nearest, users_function
from rlhf_recipes.evaluation import served_policies
from rlhf_recipes.references import ModelRef, adapter_sha256, folder_of
from rlhf_recipes.run_folder import read_json, read_result, write_atomically
from rlhf_recipes.text import line

Score = Callable[[list[dict], list[str], str], np.ndarray]
Asked = tuple[str, str]  # prompt_id and an answer
TO_LABEL = "to_label.jsonl"


@dataclass(frozen=True)
class KeptRun:
    """A run whose checkpoints are held against gold.

    Attributes:
        folder: as typed.
        steps: (step, adapter folder) of each checkpoint, and of its end.
        start: adapter folder of what it started from, None for the base.
        rewards: what it was optimised against, of `ModelRef.identity`.
    """

    folder: str
    steps: list[tuple[int, Path]]
    start: Path | None
    rewards: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Gold:
    """What knows better.

    Attributes:
        kind: in words.
        source: where `load_gold` finds it: labels, a function, or members of an ensemble.
        identities: of `ModelRef.identity`, what tells whether a run was optimised against it.
    """

    kind: str
    source: Any
    identities: frozenset[str] = frozenset()


def find_gold(cfg: DictConfig, proxies: list[ModelRef]) -> Gold | None:
    """What `gold` names, None without it.

    Raises:
        Refusal: it is not there; it is one of the proxies, or nothing is held against it: nothing could be found out.
    """
    if not cfg.gold:
        return None
    if not cfg.samples and not cfg.checkpoints:
        raise Refusal(
            f"gold={cfg.gold}: says nothing with samples=0 and no checkpoints. Set samples=16, or leave it out."
        )
    reference = cfg.gold if isinstance(cfg.gold, str) else list(cfg.gold)
    if isinstance(reference, str) and reference.endswith((".jsonl", ".jsonl.gz")):
        return Gold(f"labels in {Path(reference).name}", _labels(reference))
    if isinstance(reference, str) and ":" in reference and not Path(reference).exists():
        function = config.import_function(reference, "gold")
        return Gold(f"the function {reference}", function, frozenset({reference}))
    members = references.find_reward_models(reference, "gold", cfg.model.id, cfg.model.adapter_base)
    if {member.sha256 for member in members} & {proxy.sha256 for proxy in proxies}:
        raise Refusal(f"gold={cfg.gold}: is the reward model itself. Give one that learned from other pairs.")
    kind = "a reward model" if len(members) == 1 else f"the mean of {len(members)} reward models"
    identities = frozenset(member.identity for member in members)
    return Gold(f"{kind}, {folder_of(members[0].adapter)}", members, identities)


def load_gold(cfg: DictConfig, source: Any, tokenizer, folder: Path, reference: list[list[dict]]) -> Score:
    """Gold of answers to the prompts of rows, as a function of (rows, texts, what they are).

    Args:
        reference: conversations whose scores give each member of an ensemble its scale.
    """
    if isinstance(source, dict):
        return Labels(source, folder / TO_LABEL)
    if callable(source):
        return lambda rows, texts, part: _call(source, cfg.gold, rows, texts)
    models = Ensemble(cfg.model, cfg.quantization, tokenizer, source, folder / "scores", cfg.fast_forward)
    reference_MK = models.score(reference, "gold.held-out").rewards_MC if len(source) > 1 else None

    def mean(rows: list[dict], texts: list[str], part: str) -> np.ndarray:
        rewards_MC = models.score(_conversations(rows, texts), f"gold.{part}").rewards_MC
        return rewards_MC[0] if reference_MK is None else ensemble.aligned(rewards_MC, reference_MK).mean(0)

    return mean


def best_of_n(
    cfg: DictConfig, policy, proxies: Ensemble, reference_MK, gold: Score, prompts: list[dict]
) -> list[dict]:
    """Entries of `overoptimisation.audit`: the best of n by one proxy; of an ensemble by its mean, first as what every
    part audits, by one member, by its worst case and by its UWO.

    Args:
        policy: `Sampler`; its start answers each prompt `cfg.samples` times.
        reference_MK: scores that give each proxy its scale.
    """
    samples = cfg.samples
    rows = [row for row in prompts for _ in range(samples)]
    texts = [answer["text"] for answer in policy.answers(None, rows, "best-of-n")]
    shape = (len(prompts), samples)
    gold_PS = gold(rows, texts, "best-of-n").reshape(shape)
    rewards_MC = proxies.score(_conversations(rows, texts), "best-of-n").rewards_MC
    return [
        {"name": WORDS[how], "proxy_PS": proxy_C.reshape(shape), "gold_PS": gold_PS,
         "prompt_ids": formats.clusters(prompts)}
        for how, proxy_C in _proxies(rewards_MC, reference_MK).items()
    ]  # fmt: skip


def checkpoints(
    cfg: DictConfig, kept: KeptRun, policy, proxies: Ensemble, reference_MK, gold: Score, prompts: list[dict]
) -> dict:
    """Entry of `overoptimisation.audit`: the start of a run and each of its checkpoints, all on the same prompts."""
    how = _proxy(cfg, kept.folder, proxies.members)
    rows = []
    for step, adapter in [(0, None), *kept.steps]:
        part = f"{_slug(kept.folder)}.{step}"
        answers = policy.answers(adapter, prompts, part, kl=True)
        texts = [answer["text"] for answer in answers]
        rewards_MP = proxies.score(_conversations(prompts, texts), part).rewards_MC
        proxy_P = rewards_MP[how] if isinstance(how, int) else _proxies(rewards_MP, reference_MK)[how]
        rows.append({"step": step, "kl_P": np.array([answer["k1"] for answer in answers]), "proxy_P": proxy_P,
                     "gold_P": gold(prompts, texts, part)})  # fmt: skip
    ids = formats.clusters(prompts)
    said = f"reward model {how + 1}" if isinstance(how, int) else WORDS[how]
    return {"name": kept.folder, "rows": rows, "proxy_kind": said, "prompt_ids": ids}


def find_run(folder: str, base_model: str) -> KeptRun:
    """A run with its checkpoints, and its end where it is finished.

    Raises:
        Refusal: see `references.find_checkpoints`.
    """
    found = references.find_checkpoints(folder, base_model)
    steps = {each.step: each.adapter for each in found}
    end = (read_result(Path(folder)) or {}).get("steps")
    if isinstance(end, int):
        steps.setdefault(end, Path(folder) / "adapter")
    rewards = frozenset(reward for _, reward in lineage.trained_on(found[-1]))
    return KeptRun(folder, sorted(steps.items()), found[0].start, rewards)


class Sampler:
    """One base with the adapters that answer, sampled at temperature 1: the start of a run and its checkpoints.

    Args:
        parent: a run folder or None for the base: the start that best-of-n picks from and that KL is measured to.
        keep: folder for the answers, so that an interrupted audit goes on where it was.
    """

    def __init__(self, cfg: DictConfig, tokenizer, parent: Path | None, adapters: list[Path], keep: Path):
        self.cfg, self.tokenizer, self.parent, self.adapters, self.keep = cfg, tokenizer, parent, adapters, keep
        self._policies = None

    def answers(self, adapter: Path | None, rows: list[dict], part: str, kl: bool = False) -> list[dict]:
        """`text` and, with `kl`, `k1` (nats) of one answer to the prompt of each row; adapter None: the start."""
        from rlhf_recipes import inference

        used = adapter or self.parent
        asked = [row["prompt"] for row in rows]
        settings = [self.cfg.max_new_tokens, self.cfg.seed, self.cfg.model.id, kl]
        settings += [served_policies.quantization(self.cfg)] if served_policies.is_asked(self.cfg) else []
        hashes = [folder and adapter_sha256(folder) for folder in (used, self.parent)]
        key = hashlib.sha256(json.dumps([asked, settings, hashes]).encode()).hexdigest()
        path = self.keep / f"{part}.answers.json"
        known = ranks.by_first(lambda: read_json(path) if path.is_file() else {})
        if known.get("key") == key and "answers" in known:
            return known["answers"]
        how = inference.Sampling(self.cfg.max_new_tokens, temperature=1.0, seed=self.cfg.seed)
        policies = self._loaded(asked)
        if kl:
            refuse_without_kl(policies)
        answers = policies.generate(used and str(used), self.tokenizer, asked, how, f"{part}: answers")
        if kl:
            encoded = [(answer["ids"], answer["start"]) for answer in answers]
            own, reference = (
                policies.token_logps(folder and str(folder), self.tokenizer, encoded, f"{part}: KL")
                for folder in (used, self.parent)
            )
            for answer, p, q in zip(answers, own, reference, strict=True):
                answer["k1"] = inference.kl_terms(p, q)[0]
        kept = [{key: answer[key] for key in ("text", "k1") if key in answer} for answer in answers]
        ranks.by_first(self.keep.mkdir, parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"key": key, "answers": kept}, ensure_ascii=False))
        return kept

    def _loaded(self, asked: list):
        if self._policies is None:
            from rlhf_recipes import inference
            from rlhf_recipes.adapters import Policies, System

            folders = [self.parent, *self.adapters]
            found = [System(str(folder), folder and str(folder)) for folder in folders]
            if served_policies.is_asked(self.cfg):
                ids = [inference.encode(self.tokenizer, prompt, None)[0] for prompt in asked]
                lengths = [len(each) + self.cfg.max_new_tokens + 1 for each in ids]
                self._policies = served_policies.Served(self.cfg, self.tokenizer, found, lengths)
            else:
                self._policies = Policies(self.cfg.model, self.cfg.quantization, found, self.cfg.fast_forward)
        return self._policies


def refuse_without_kl(policies: Any) -> None:
    """KL needs log-probabilities of given texts.

    Raises:
        Refusal: an endpoint has none.
    """
    if not policies.scores:
        raise Refusal(f"checkpoints: {policies.name} gives no log-probabilities of a prompt, so no KL. Use vLLM.")


FIRST = "first"
WORDS = {"mean": "mean of the ensemble", FIRST: "one reward model", "min": "worst case of the ensemble",
         "uwo": "mean − λ variance of the ensemble"}  # fmt: skip


def _proxies(rewards_MC: np.ndarray, reference_MK: np.ndarray) -> dict[str, np.ndarray]:
    """What could be optimised: one reward model, and what an ensemble makes of all, on one scale."""
    if len(rewards_MC) == 1:
        return {FIRST: rewards_MC[0]}
    scaled_MC = ensemble.standardise(rewards_MC, reference_MK)
    return {how: rewards_MC[0] if how == FIRST else ensemble.combine(scaled_MC, how) for how in WORDS}


def _proxy(cfg: DictConfig, folder: str, reward_models: list[ModelRef]) -> str | int:
    """What a run was trained on: one of the reward models, by its index, or what was made of them all. Where its
    config names neither, the mean stands for it."""
    if len(reward_models) == 1:
        return FIRST
    if cfg.proxy != "trained":
        return cfg.proxy
    config = references.config_of(folder)
    paid = lineage.rewarding(config)
    if not all(map(references.is_adapter, paid)):  # a function, or not there
        return "mean"
    hashes = [adapter_sha256(references.adapter_in(each)) for each in paid]
    known = [each.sha256 for each in reward_models]
    if len(hashes) == 1 and hashes[0] in known:
        return known.index(hashes[0])
    how = config["trainer"].get("reward_ensemble")
    return how if sorted(hashes) == sorted(known) and how in WORDS else "mean"


def _conversations(rows: list[dict], texts: list[str]) -> list[list[dict]]:
    said = [[{"role": "assistant", "content": text}] for text in texts]
    return [row["prompt"] + turn for row, turn in zip(rows, said, strict=True)]


def _call(function: Callable, name: str, rows: list[dict], texts: list[str]) -> np.ndarray:
    completions = [[{"role": "assistant", "content": text}] for text in texts]

    def ask() -> list:
        with users_function(f"gold={name}"):
            return [*function(prompts=[row["prompt"] for row in rows], completions=completions)]

    found = ranks.by_first(ask)
    scores = np.array([np.nan if score is None else score for score in found], dtype=float)
    if scores.shape != (len(rows),) or not np.isfinite(scores).all():
        raise Refusal(f"gold={name}: gave {len(scores)} scores for {len(rows)} answers, or one that is not finite.")
    return scores


@dataclass
class Labels:
    """Gold of a file of labels.

    Attributes:
        known: of `_labels`.
        path: where the answers that have none are written.
        missing: these, as rows of the file.
    """

    known: dict[Asked, float]
    path: Path
    missing: dict[Asked, dict] = field(default_factory=dict)

    def __call__(self, rows: list[dict], texts: list[str], part: str) -> np.ndarray:
        """nan where there is none; `refuse_missing` says which."""
        wanted = [(row["prompt_id"], text) for row, text in zip(rows, texts, strict=True)]
        for asked, row in zip(wanted, rows, strict=True):
            if asked not in self.known:
                self.missing[asked] = {"prompt": row["prompt"], "answer": asked[1], "gold": None}
        return np.array([self.known.get(asked, math.nan) for asked in wanted])

    def refuse_missing(self) -> None:
        """
        Raises:
            Refusal: answers have no label. All of them are in the file then, once, beside what people wrote into it.
        """
        if not self.missing:
            return
        ranks.by_first(self._append)
        also = ", with the labels that you have in it" if self.known else ""
        raise Refusal(
            f"gold: {len(self.missing)} answers have no label. They are in {self.path}: put a number into `gold` of "
            f"each and give that file{also}."
        )

    def _append(self) -> None:
        there = {asked for _, asked, _ in _rows(str(self.path))} if _has_rows(self.path) else set()
        rows = [row for asked, row in self.missing.items() if asked not in there]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _has_rows(path: Path) -> bool:
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def _labels(path: str) -> dict[Asked, float]:
    """Gold of a file of labels; of none where it is not there or empty, as before the first audit.

    Raises:
        Refusal: a row that is no label, or two labels of one answer, with file, row and key.
    """
    file = Path(path).expanduser()
    if not _has_rows(file):
        near = nearest(file.name, [each.name for each in file.parent.glob("*.jsonl*") if each != file])
        print(line(f"gold={path}: no labels yet{near} The answers to label will be written into {TO_LABEL}."))
        return {}
    labels: dict[Asked, tuple[float, str]] = {}
    for where, asked, gold in _rows(path):
        if gold is not None:
            known, place = labels.setdefault(asked, (gold, where))
            if known != gold:
                raise Refusal(
                    f"{where}: gold = {gold:g}: {place} says {known:g} of the same answer. Remove one of the two."
                )
    return {asked: gold for asked, (gold, _) in labels.items()}


def _rows(path: str) -> Iterator[tuple[str, Asked, float | None]]:
    """Where each row of a file of labels stands, its answer and its gold, None where there is none yet."""
    from rlhf_recipes.data import readers, table
    from rlhf_recipes.data.messages import Drop
    from rlhf_recipes.data.row import Row

    rows, most = list(readers.read_file(path)), sys.float_info.max
    for (where, values), prompt in zip(rows, table.prompts(rows), strict=True):
        row = Row(where, values, {key: key for key in ("prompt", "answer", "gold")})
        if isinstance(prompt, Drop) or not prompt:
            raise Refusal(f"{where}: prompt: {prompt or 'missing'}. Mend or remove the row.")
        row.value("gold")
        yield (
            where,
            (formats.prompt_id(prompt), row.text("answer")),
            row.number("gold", "must be a number", -most, most),
        )


def _slug(folder: str) -> str:
    return "-".join(Path(folder).parts[-2:])
