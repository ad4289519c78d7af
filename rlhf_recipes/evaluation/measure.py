"""Measure several runs on one base model: each is an adapter that is switched on in turn."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import ensemble, lineage, methods, models, ranks, references
from rlhf_recipes import inference as m
from rlhf_recipes.adapters import BASE, Policies, RewardModels, System
from rlhf_recipes.cai.backend import Journal
from rlhf_recipes.cai.judge import Judge
from rlhf_recipes.config import part_of
from rlhf_recipes.data.fit import fit
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.data.load import Splits
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import fixed_answers, judges, served_policies
from rlhf_recipes.evaluation import tasks as harness
from rlhf_recipes.evaluation.measurements import Measurements
from rlhf_recipes.references import ModelRef, folder_of

NEUTRAL = Path(__file__).parents[1] / "assets" / "neutral.txt"


def find(
    runs: list[str], parent: str, base_model: str, steps_of: str | None = None, adapter_base: str | None = None
) -> list[System]:
    """The systems that `parent`, `runs` and `checkpoints` name, in this order.

    Args:
        steps_of: a run all of whose checkpoints are systems, in the order of their steps.
        adapter_base: see `references.find`.

    Raises:
        Refusal: a run is not there, is no policy, was trained on another base, is the parent, or is named twice.
    """
    if isinstance(runs, str) or not (runs or steps_of):
        raise Refusal("runs: a list of run folders, at least one: 'runs=[outputs/dpo/main]'.")
    compared = parent != BASE and references.find_policy(parent, "parent", base_model, adapter_base)
    found = [_system(compared) if compared else System(BASE)]
    for folder in runs:
        system = _system(references.find_policy(folder, "runs", base_model, adapter_base))
        if Path(system.adapter).resolve() in [Path(s.adapter).resolve() for s in found if s.adapter]:
            raise Refusal(f"runs={folder}: is the parent, or named twice. Leave it out.")
        found.append(system)
    found += map(_system, references.find_checkpoints(steps_of, base_model) if steps_of else [])
    return _named_apart(found)


def find_scorer(reference: str | list[str] | None, base_model: str, adapter_base: str | None = None) -> list[System]:
    """The reward models that `reward_model` names: none, one, or the members of an ensemble.

    Raises:
        Refusal: a run is not there, is no reward model, or was trained on another base.
    """
    found = references.find_reward_models(reference, "reward_model", base_model, adapter_base)
    return _named_apart([_system(each) for each in found])


def find_proxy(run_folder: str | None, base_model: str) -> System | None:
    """The reward model that a run of recipes/ppo.py was optimised against; None where it was something else, or is not
    there."""
    reference = run_folder and references.config_of(run_folder).get("reward_funcs")
    if not isinstance(reference, str):
        reference = reference[0] if reference and len(reference) == 1 else None
    if not reference or not references.is_adapter(reference):
        return None
    found = references.find(reference, "reward_funcs")
    return _system(found) if found.is_reward_model and found.base == base_model else None


@dataclass(frozen=True)
class Scorers:
    """What the systems are scored by, each only where it is given.

    Attributes:
        reward_models: one, or the members of an ensemble.
        proxy: another reward model, whose scores are kept apart.
        judge: the function of `judges.by_function`.
        tasks: of `tasks.find`.
    """

    reward_models: list[System]
    proxy: System | None = None
    judge: Callable | None = None
    tasks: dict | None = None


def measure(
    cfg: DictConfig, systems: list[System], scorers: Scorers, pairs: Splits, before: Measurements | None = None
) -> Measurements:
    """What `summary.summarise` takes: log-probabilities, answers with their KL to the parent, rewards.

    Of a job with `shards=k/n` its part: every n-th pair, paragraph and task, and the prompts of every n-th batch,
    which is answered as in a run of all.

    Args:
        before: measurements on the same pairs with the same settings; what they say of the parent is not measured
            again.
    """
    tokenizer = models.load_tokenizer(cfg.model)
    fixed = fixed_answers.load(cfg, tokenizer)
    judges.look(cfg, pairs.test, fixed)
    rows, prompts, kept = _rows(cfg, tokenizer, pairs)
    first, parts = part_of(cfg.shards)
    rows = rows[first::parts]
    policies = _policies(cfg, tokenizer, systems, rows, kept, [*prompts, *fixed])
    texts = NEUTRAL.read_text(encoding="utf-8").strip().split("\n\n")[first::parts]
    parent, fresh = systems[0], systems[1:] if before else systems
    logps, neutral, answers = _known(before, parent) if before else ({}, {}, {})
    folders = dict.fromkeys(folder for s in fresh for folder in (s.reference, s.adapter))
    if policies.scores:
        logps |= {
            folder: policies.pair_logps(folder, tokenizer, rows, kept) for folder in folders if folder not in logps
        }
        neutral |= {s.name: policies.neutral(s, tokenizer, texts) for s in fresh}
    answers |= {s.name: policies.answers(s, parent, tokenizer, prompts, cfg) for s in fresh}
    places = [place for place, answer in enumerate(answers[parent.name]) if answer]
    prompts, answers = [prompts[n] for n in places], {name: [own[n] for n in places] for name, own in answers.items()}
    chosen = {name: scorers.tasks[name] for name in list(scorers.tasks or {})[first::parts]}
    scored = {}
    for s in fresh if chosen else []:
        with policies.using(s.adapter) as model, m.measuring(model):
            scored[s.name] = ranks.by_first(harness.score, model, tokenizer, chosen, cfg.lm_eval, s.name)
    others = _fixed(cfg, fixed, policies, tokenizer, systems) if fixed else {}
    del policies  # its memory is the reward models'
    given = {s.name: answers[s.name] for s in fresh}
    known = before.reward_models if before else {}
    reward_models = _reward(cfg, scorers, tokenizer, rows, kept, prompts, given, known)
    judged = systems[1:] if scorers.judge else []
    found = Measurements(
        parent=parent.name,
        systems=[s.name for s in systems],
        info={s.name: _info(s) | _optimised(s, parent, scorers.reward_models) for s in systems},
        pairs=[_pair(i, row, systems if logps else [], logps) for i, row in enumerate(rows)],
        answers=[_answer(i, row, cfg.harmful_families, answers) for i, row in enumerate(prompts)],
        judgements={s.name: judges.by_function(scorers.judge, prompts, answers, s.name, parent.name) for s in judged},
        reward_models=reward_models,
        neutral=neutral,
        tasks=_tasks(scored),
        fixed=others,
        settings=_settings(cfg, scorers, pairs),
    )
    return fixed_answers.compare(scorers.judge, found, None, cfg.judging) if scorers.judge else found


def judged(judge: Judge, found: Measurements, rows: list[dict], path: Path, judging: DictConfig) -> Measurements:
    """What a model says of the answers, against the parent's and those of `baseline_answers`.

    Args:
        rows, path: as of `judges.compare`.
    """
    found = judges.compare(judge, found, rows, path, judging.tie_margin)
    return fixed_answers.compare(judge, found, Journal(path), judging)


def difference(measurements: list[Measurements]) -> str | None:
    """In what they were not measured alike, and what to do; None where parent, settings, pairs and prompts agree."""
    first = measurements[0]
    weights = [each.info.get(each.parent, {}).get("adapter_sha256") for each in measurements]
    for other, parent in zip(measurements[1:], weights[1:], strict=True):
        for key in ("parent", "settings"):
            here, there = getattr(first, key), getattr(other, key)
            if here != there:
                return f"measured with different {key}, {here} and {there}."
        if parent != weights[0]:
            here, there = (str(each)[:12] for each in (weights[0], parent))
            return f"{first.parent} had other weights (SHA-256 {here} and {there}). Measure both against one parent."
        for key in ("pairs", "answers"):
            here, there = getattr(first, key), getattr(other, key)
            if [row["prompt_id"] for row in there] != [row["prompt_id"] for row in here]:
                return f"measured on different {key}. Give both the same data and prompts."
    return None


def join(cfg: DictConfig, parts: list[Measurements], pairs: Splits) -> Measurements:
    """The measurements of all jobs `shards=k/n`, in the order of k, as one run would have made them.

    Raises:
        Refusal: they were not measured alike, or not on these pairs.
    """
    if cfg.baseline_answers:
        raise Refusal(f"baseline_answers={cfg.baseline_answers}: parts that are joined have none. Leave it out.")
    rows, prompts, _ = _rows(cfg, models.load_tokenizer(cfg.model), pairs)
    typed = sum(part.settings.pop(judges.TYPED, 0) for part in parts)
    whole = parts[0]
    for part in parts:
        for key in ("parent", "systems", "info", "settings"):
            here, there = getattr(whole, key), getattr(part, key)
            if here != there:
                raise Refusal(f"shards: measured with different {key}, {here} and {there}. Measure all parts alike.")

    def in_turn(lists: list[list]) -> list:
        joined = [None] * sum(map(len, lists))
        for number, own in enumerate(lists):
            joined[number :: len(lists)] = own
        return joined

    def by_prompt(lists: list[list[dict]]) -> list[dict]:
        found = {row["prompt_id"]: row for own in lists for row in own}
        return [found[row["prompt_id"]] for row in prompts if row["prompt_id"] in found]

    joined = replace(
        whole,
        pairs=in_turn([part.pairs for part in parts]),
        answers=by_prompt([part.answers for part in parts]),
        judgements={name: by_prompt([part.judgements[name] for part in parts]) for name in whole.judgements},
        reward_models={name: in_turn([part.reward_models[name] for part in parts]) for name in whole.reward_models},
        neutral={name: in_turn([part.neutral[name] for part in parts]) for name in whole.neutral},
        tasks={name: next(part.tasks[name] for part in parts if name in part.tasks) for name in cfg.tasks},
        settings=whole.settings | ({judges.TYPED: typed} if typed else {}),
    )
    answered = sum(len(part.answers) for part in parts)
    for found, asked in ((joined.pairs, rows), (joined.answers, prompts)):
        if [row["prompt_id"] for row in found] != [row["prompt_id"] for row in asked] or answered != len(prompts):
            raise Refusal(
                "shards: their prompts are not those of the data, each once. Put the data back; or measure all parts "
                "again, on cards of one size, with overwrite=true."
            )
    for name in joined.systems if len(joined.reward_models) > 1 else []:
        own = [row["systems"][name] for row in joined.answers]
        scores_MN = list(zip(*(answer["members"] for answer in own), strict=True))
        for answer, more in zip(own, ensemble.answers(scores_MN, joined.reward_models), strict=True):
            answer |= more
    return joined


def merge(measurements: list[Measurements]) -> Measurements:
    """One set of measurements from several of the same parent on the same pairs and prompts with the same settings.

    Raises:
        Refusal: they differ in one of these.
    """
    if differ := difference(measurements):
        raise Refusal(f"sweeps: {differ}")
    merged = copy.deepcopy(measurements[0])
    for other in measurements[1:]:
        for key in ("pairs", "answers"):
            for row, more in zip(getattr(merged, key), getattr(other, key), strict=True):
                row["systems"] |= more["systems"]
        merged.systems += [name for name in other.systems if name not in merged.systems]
        merged.info |= other.info
        merged.judgements |= other.judgements
        merged.reward_models |= other.reward_models
        merged.neutral |= other.neutral
    return merged


def rename(measurements: Measurements, old: str, new: str) -> Measurements:
    """The measurements with another name for one of their systems."""

    def renamed(by_system: dict) -> dict:
        return {new if name == old else name: value for name, value in by_system.items()}

    return replace(
        measurements,
        systems=[new if name == old else name for name in measurements.systems],
        info=renamed(measurements.info),
        pairs=[row | {"systems": renamed(row["systems"])} for row in measurements.pairs],
        answers=[row | {"systems": renamed(row["systems"])} for row in measurements.answers],
        judgements=renamed(measurements.judgements),
        neutral=renamed(measurements.neutral),
    )


def _known(before: Measurements, parent: System) -> tuple[dict, dict, dict]:
    """Log-probabilities of the pairs, neutral text and answers that measurements hold of the parent."""
    logps, answers = ([row["systems"][parent.name] for row in rows] for rows in (before.pairs, before.answers))
    return {parent.adapter: logps}, {parent.name: before.neutral[parent.name]}, {parent.name: answers}


def _policies(
    cfg: DictConfig,
    tokenizer,
    systems: list[System],
    rows: list[dict],
    kept: slice,
    prompts: list[dict],
) -> Policies:
    """The systems in this process, or at an endpoint."""
    if not served_policies.is_asked(cfg):
        return Policies(cfg.model, cfg.quantization, systems, cfg.fast_forward)
    sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
    lengths = [len(m.encode(tokenizer, row["prompt"], row[side])[0][kept]) + 1 for row, side in sides]
    lengths += [len(m.encode(tokenizer, row["prompt"], None)[0]) + cfg.max_new_tokens + 1 for row in prompts]
    policies = served_policies.Served(cfg, tokenizer, systems, lengths)
    served_policies.refuse_unscored(cfg, policies)
    return policies


def _fixed(cfg: DictConfig, rows: list[dict], policies: Policies, tokenizer, systems: list[System]) -> dict:
    """Each system's answers to instructions that a file has answers to."""
    how, asked = m.Sampling(cfg.max_new_tokens, cfg.temperature, cfg.seed), [row["prompt"] for row in rows]
    answers = {s.name: policies.generate(s.adapter, tokenizer, asked, how, f"{s.name}: instructions") for s in systems}
    return fixed_answers.answered(cfg.baseline_answers, rows, tokenizer, answers)


def _rows(cfg: DictConfig, tokenizer, pairs: Splits) -> tuple[list[dict], list[dict], slice]:
    """The pairs that are measured, each with its cluster, the prompts that are answered, and `Splits.kept`."""
    fitted = fit(pairs, tokenizer, cfg.max_length, cfg.data.too_long)
    rows = [row | {"cluster": cluster} for row, cluster in zip(fitted.test, clusters(fitted.test), strict=True)]
    prompts = list({row["prompt_id"]: row for row in rows}.values())[: cfg.prompts]
    return rows[: cfg.scored_pairs], prompts, fitted.kept


def _reward(
    cfg: DictConfig,
    scorers: Scorers,
    tokenizer,
    rows: list[dict],
    kept: slice,
    prompts: list[dict],
    answers: dict,
    known: dict,
) -> dict:
    """The scores that each reward model gives the pairs, unless known; and give every answer its `reward`, of several
    reward models their mean, worst case and spread (of a part their scores alone: they are held against all pairs),
    and its `proxy`.

    Args:
        kept: of the tokens of each pair.
        answers: of each system, one for each of the prompts.
    """
    members, proxies = scorers.reward_models, [scorers.proxy] if scorers.proxy else []
    if not (members or proxies):
        return known
    folders = [Path(each.adapter) for each in (*members, *proxies)]
    readers = RewardModels(cfg.model, cfg.quantization, folders, cfg.fast_forward)
    for member in [] if known else members:
        reader = readers.using(Path(member.adapter))
        rewards = m.pair_rewards(reader, tokenizer, rows, f"{member.name}: pairs", kept)
        known[member.name] = [_labels(row) | each for row, each in zip(rows, rewards, strict=True)]

    def scores(scorer: System, own: list[dict], what: str) -> list[float]:
        return _score(readers.using(Path(scorer.adapter)), tokenizer, prompts, own, what)

    for name, own in answers.items():
        scores_MN = [scores(member, own, f"{member.name} of {name}") for member in members]
        if len(members) == 1:
            found = [{"reward": reward} for reward in scores_MN[0]]
        elif cfg.shards:
            found = [{"members": list(each)} for each in zip(*scores_MN, strict=True)] if members else [{}] * len(own)
        else:
            found = ensemble.answers(scores_MN, known) if members else [{}] * len(own)
        for proxy in proxies:
            values = scores(proxy, own, f"proxy of {name}")
            found = [each | {"proxy": value} for each, value in zip(found, values, strict=True)]
        for answer, more in zip(own, found, strict=True):
            answer |= more
    return known


def _settings(cfg: DictConfig, scorers: Scorers, pairs: Splits) -> dict[str, Any]:
    """What two sets of measurements must share to be compared."""
    return (
        {
            "model": cfg.model.id,
            "quantization": served_policies.quantization(cfg),
            "data": pairs.source,
            "reward_model": ", ".join(map(_hashed, scorers.reward_models)) or None,
            "temperature": cfg.temperature,
            "max_new_tokens": cfg.max_new_tokens,
            "seed": cfg.seed,
        }
        | ({"chat_template_kwargs": told} if (told := models.template_kwargs(cfg.model)) else {})
        | ({"proxy": _hashed(scorers.proxy)} if scorers.proxy else {})
        | ({"judge_function": cfg.judge_function} if scorers.judge else {})
        | ({"lm_eval": dict(cfg.lm_eval) | {"version": metadata.version("lm_eval")}} if scorers.tasks else {})
    )


def _score(reward_model, tokenizer, prompts: list[dict], answers: list[dict], what: str) -> list[float]:
    """The reward of each answer to its prompt."""
    turns = [{"completion": [{"role": "assistant", "content": answer["text"]}]} for answer in answers]
    asked = [{"prompt": row["prompt"], **turn} for row, turn in zip(prompts, turns, strict=True)]
    # A policy may spell a control token in plain letters; the reward model must read letters too.
    conversations = [row["prompt"] + row["completion"] for row in neutralise(asked, tokenizer)[0]]
    return m.rewards(reward_model, tokenizer, conversations, f"rewards by {what}")


def _tasks(scored: dict[str, dict]) -> dict[str, dict]:
    """Task -> `metric`, `ids` of its examples, and the `values` of each system."""
    one = next(iter(scored.values()), {})
    return {
        task: {
            "metric": first["metric"],
            "ids": first["ids"],
            "values": {s: own[task]["values"] for s, own in scored.items()},
        }
        for task, first in one.items()
    }


def _hashed(scorer: System) -> str:
    return f"{scorer.name} ({str(scorer.sha256)[:12]})"


def _system(found: ModelRef) -> System:
    if found.step is not None:
        name = f"step {found.step}"
    else:
        name = found.name if found.recipe in (None, found.name) else f"{found.recipe}/{found.name}"
    start = found.start and str(found.start)
    rewards, judges = lineage.trained_on(found), lineage.labelled_by(found)
    return System(name, str(found.adapter), found.recipe, start, found.step, rewards, judges, found.sha256)


def _named_apart(systems: list[System]) -> list[System]:
    """Those of one name are called by their folders."""
    names = [system.name for system in systems]
    for system in systems:
        if system.adapter and names.count(system.name) > 1:
            system.name = str(folder_of(system.adapter))
            if system.name == BASE:
                system.name = f"./{BASE}"
    return systems


def _labels(row: dict) -> dict:
    chosen, rejected = (len(row[side][-1]["content"]) for side in ("chosen", "rejected"))
    labels = {key: row[key] for key in ("prompt_id", "cluster", "family")}
    return labels | {"chosen_chars": chosen, "rejected_chars": rejected}


def _pair(i: int, row: dict, systems: list[System], logps: dict) -> dict:
    def of(system: System) -> dict:
        own = logps[system.adapter][i]
        if "chosen_reference_logp" in own:  # measured before
            return own
        reference = logps[system.reference][i]
        return own | {
            "chosen_reference_logp": reference["chosen_logp"],
            "rejected_reference_logp": reference["rejected_logp"],
        }

    return _labels(row) | {"systems": {system.name: of(system) for system in systems}}


def _answer(i: int, row: dict, harmful: list[str], answers: dict) -> dict:
    shown = ("text", "tokens", "finished", "k1", "k3", "reward")
    more = ("worst", "spread", "members", "proxy")
    return {
        **{key: row[key] for key in ("prompt_id", "cluster", "family")},
        "prompt": "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
        if len(row["prompt"]) > 1
        else row["prompt"][0]["content"],
        "harmful": row["family"] in harmful,
        "systems": {
            name: {key: given[i].get(key) for key in shown} | {key: given[i][key] for key in more if key in given[i]}
            for name, given in answers.items()
        },
    }


def _optimised(system: System, parent: System, scorers: list[System]) -> dict[str, list[str]]:
    """`optimised`: those of the reward models that score which the system was trained on and its parent was not;
    `labelled_by`: the judges of what it, and not its parent, was trained on."""
    rewards = {reward for _, reward in system.rewards - parent.rewards}
    names = [scorer.name for scorer in scorers if scorer.sha256 in rewards]
    judges = sorted({judge for _, judge in system.judges - parent.judges})
    return ({"optimised": names} if names else {}) | ({"labelled_by": judges} if judges else {})


def _info(system: System) -> dict[str, Any]:
    return {
        "recipe": system.recipe,
        "path": system.adapter and str(folder_of(system.adapter)),
        "adapter_sha256": system.sha256,
        "method_reward": methods.of(system.recipe).reward,
    } | ({} if system.step is None else {"step": system.step})
