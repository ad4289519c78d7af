"""What is seen of one job before it runs."""

import copy
import hashlib
import heapq
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, memory, methods, model_files, models, ranks, references, run, sharding
from rlhf_recipes.commands import launched
from rlhf_recipes.data.fit import fit
from rlhf_recipes.data.labelled import micro_batches
from rlhf_recipes.data.load import LOADERS, load_labelled
from rlhf_recipes.data.tokens import Sizes
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.launch.preflight import disk, predict_memory, real_steps, rows
from rlhf_recipes.launch.preflight.report import JobReport
from rlhf_recipes.launch.refusals import as_refusal

GIB = predict_memory.GIB
# Runs over many lengths took up to so much more than predicted: within it a job is warned of, not stopped.
MARGIN = 0.5
SHORTEST = 128  # tokens that a proposal leaves
LOOKED_AT = 32  # micro-batches of most tokens, of which one fills the largest rows
CARDS = (2, 4, 8)  # over which a model may be sharded
FEW_ENDS, MANY_CUT, SOME_REFUSALS = 0.9, 0.05, 0.01


@dataclass
class Job:
    """A recipe with its composed config.

    Attributes:
        name: of a sweep's job or a pipeline's stage; "" for a run alone.
        overrides: as on the command line.
        later: the folder in which earlier stages of a pipeline will have written what this one reads.
    """

    name: str
    recipe: str
    cfg: DictConfig
    overrides: list[str]
    later: Path | None = None


@dataclass
class Cache:
    """What jobs have in common is looked at once.

    Attributes:
        measured: what real steps came to, by the job's shape.
        measure: whether to run any.
        elsewhere: the jobs run on another machine.
        processes: of each job.
        at_once: processes that share what memory is free.
    """

    measured: dict[str, dict]
    measure: bool
    elsewhere: bool
    processes: int = 1
    at_once: int = 1
    rows: dict[str, tuple] = field(default_factory=dict)
    examples: dict[tuple[str, str, str], dict] = field(default_factory=dict)

    @cached_property
    def libraries(self) -> int:
        """Bytes of a process that has imported what a recipe does, before it reads anything."""
        import bitsandbytes  # noqa: F401
        import datasets  # noqa: F401
        import peft  # noqa: F401
        from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

        return memory.resident()


def examine(job: Job, looked_at: Cache) -> JobReport:
    """Everything about a job that can be known before it runs."""
    found = JobReport(job.name, job.recipe)
    try:
        _look(job, looked_at, found)
    except Refusal as error:
        found.stops.append(f"{job.name or job.recipe}: {as_refusal(error)}")
    return found


def _look(job: Job, looked_at: Cache, found: JobReport) -> None:
    """Fill in what `examine` returns.

    Raises:
        Refusal: the recipe would refuse the job.
    """
    cfg, recipe = job.cfg, job.recipe
    libraries = looked_at.libraries  # before anything is read
    args = models.training_args(cfg.trainer, run.Run(Path(), recipe, {}))
    models.check(cfg.model, cfg.quantization, cfg.lora, scores=recipe == "reward")
    tokenizer = models.load_tokenizer(cfg.model)
    found.settings = _settings(cfg, args)
    found.model = {"id": cfg.model.id, "download_gib": model_files.download_bytes(cfg.model) / GIB}
    later = _made_later(job)
    if cfg.model.adapter and str(cfg.model.adapter) not in later:  # as `Run.start` will
        references.find(cfg.model.adapter, "model.adapter", cfg.model.id, cfg.model.adapter_base)
    if str(cfg.data.path) in later:
        found.watch.append(f"{cfg.data.path} is made by an earlier stage: not looked at")
        return
    predict = partial(predict_memory.predict, cfg, libraries=libraries, rewards=_reward_models(cfg, later))
    key, splits, sizes, found.rows = _rows(job, args, tokenizer, looked_at)
    try:
        found.example = _example(key, job, args, splits, tokenizer, looked_at)
    except Refusal:
        raise
    except Exception as error:  # what TRL says of its arguments
        found.stops.append(f"{job.name or recipe}: its trainer cannot be made: {first_line(error)}")
        return
    found.watch += _remarks(found.rows, found.example, recipe)
    steps = real_steps.total_steps(recipe, args, real_steps.rows_trained(args, sizes), looked_at.processes)
    found.settings |= {"processes": looked_at.processes} if looked_at.processes > 1 else {}
    found.settings["steps"] = steps
    largest = _largest(recipe, args, sizes, steps)
    try:
        base = predict_memory.backbone(cfg, recipe)
    except Refusal as error:  # not the kind of model that the counts are of
        found.watch.append(str(error))
    else:
        if base.fast:
            largest = _fast(largest, args, splits.sizes["train"], base.config.hidden_size, steps)
        _memory(found, job, args, base, largest, predict, looked_at.elsewhere, looked_at.at_once)
        found.lora |= disk.checkpoints(args, steps)
    if looked_at.measure and sharding.is_on():
        found.watch.append("no step is taken: it would be of one process, with the whole model")
    elif looked_at.measure and cfg.trainer.get("rollout") == "server":
        found.watch.append("no step is taken: its completions would be asked of the servers")
    elif looked_at.measure and not found.stops and not later:
        shape = _shape(cfg, recipe, sizes)
        if shape not in looked_at.measured:
            print(f"  steps    real ones of {job.name or recipe}, in a process of their own ...", flush=True)
            took = ranks.by_first(real_steps.measure, recipe, job.overrides, args, splits, sizes)
            looked_at.measured[shape] = took
        found.step = looked_at.measured[shape]
        if "error" in found.step:
            found.stops.append(f"{job.name or recipe}: its first step fails: {found.step['error']}")


def _settings(cfg: DictConfig, args) -> dict[str, Any]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "max_completion_length",
             "learning_rate", "beta", "simpo_gamma", "disable_prompt_loss", "kl_coef", "cliprange", "label_smoothing",
             "loss_type", "num_train_epochs", "gradient_checkpointing", "bf16", "seed")  # fmt: skip
    kept = {name: getattr(args, name) for name in names if getattr(args, name, None) not in (None, "")}
    kind = (
        "nf4" if cfg.quantization.get("load_in_4bit") else "int8" if cfg.quantization.get("load_in_8bit") else "none"
    )
    return {"adapter": cfg.model.adapter, "quantization": kind, "lora r": cfg.lora.get("r"), **kept}


def _made_later(job: Job) -> list[str]:
    """What the job reads that an earlier stage of its pipeline has yet to write."""
    if job.later is None:
        return []
    read = [job.cfg.data.path, job.cfg.model.adapter, job.cfg.get("reference"), *_rewards(job.cfg)]
    return [str(each) for each in read if each and Path(each).is_relative_to(job.later) and not Path(each).exists()]


def _rewards(cfg: DictConfig) -> list[str]:
    given = cfg.get("reward_funcs") or []
    return [given] if isinstance(given, str) else list(given)


def _reward_models(cfg: DictConfig, later: list[str]) -> int:
    """How many reward models `reward_funcs` names, as adapters on the policy's base; `later` are yet to be made.

    Raises:
        Refusal: the recipe would refuse one of them.
    """
    given = _rewards(cfg)
    present = [each for each in given if each not in later]
    found = references.find_rewards(present, cfg.model.id, cfg.model.adapter_base) if present else []
    models.check_rewards(cfg.model, found)
    return len(given) - len(present) + sum(each.kind != references.FUNCTION for each in found)


def _rows(job: Job, args, tokenizer, looked_at: Cache) -> tuple:
    """(key, splits, tokens of each train row, the report about them), read once for jobs with the same data."""
    cfg, recipe = job.cfg, job.recipe
    max_length = cfg.max_prompt_length if methods.of(recipe).samples else args.max_length
    read = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("data", "model")}
    load = LOADERS[methods.of(recipe).rows]
    how = {"truncation_mode": args.truncation_mode} if hasattr(args, "truncation_mode") else {}
    node = {"read": load.__name__, **read, "max_length": max_length, **how}
    if load is load_labelled:
        node |= {name: getattr(args, name) for name in ("per_device_train_batch_size", "loss_type", "seed")}
    key = json.dumps(node, sort_keys=True)
    if key not in looked_at.rows:
        splits = fit(load(cfg.data), tokenizer, max_length, cfg.data.too_long, **how)
        if load is load_labelled:
            splits = micro_batches(splits, args)
        sizes = splits.sizes["train"].cut(max_length).longest.tolist()
        looked_at.rows[key] = splits, sizes, rows.examine(splits, sizes)
    splits, sizes, report = looked_at.rows[key]
    if methods.of(recipe).samples:
        args.check_prompts(len(splits.train))
    return key, splits, sizes, report


def _example(key: str, job: Job, args, splits, tokenizer, looked_at: Cache) -> dict[str, Any]:
    """A row as the job's trainer has it, once for jobs of a recipe with the same data."""
    target = job.cfg.trainer._target_
    if (job.recipe, target, key) not in looked_at.examples:
        found = rows.example(job.recipe, args, splits, tokenizer, job.cfg.model, target)
        looked_at.examples[job.recipe, target, key] = found
    return looked_at.examples[job.recipe, target, key]


def _largest(recipe: str, args, sizes: list[int], steps: int) -> predict_memory.Batch:
    """The micro-batch with the longest row: every other is padded to it."""
    batch = args.per_device_train_batch_size
    count = steps * args.gradient_accumulation_steps
    if methods.of(recipe).samples:  # where a completion ends nobody knows
        completion = args.max_completion_length
        tokens = max(sizes) + completion
        return predict_memory.Batch(batch, tokens, count, completion, args.prompts_per_rollout)
    padded = list(itertools.islice(real_steps.padded_lengths(sizes, batch), count))
    longest = args.max_length if getattr(args, "packing", False) else max(sizes)
    return predict_memory.Batch(2 * batch if methods.of(recipe).rows == "pairs" else batch, longest, len(set(padded)))


def _fast(largest: predict_memory.Batch, args, sizes: Sizes, hidden_size: int, steps: int) -> predict_memory.Batch:
    """With `fast_forward`: the answers alone that are scored, and sequences that lie together in rows."""
    kept = sizes.cut(args.max_length, getattr(args, "truncation_mode", "keep_start"))
    if getattr(args, "packing", False):
        return largest
    if getattr(args, "disable_prompt_loss", True) and getattr(args, "completion_only_loss", None) is not False:
        largest = replace(largest, completion=int(kept.trained.max()))  # else other tokens count too
    is_pair = kept.whole.shape[1] == 2
    tokens = kept.whole[:, 0] + kept.trained[:, 1] if is_pair else kept.whole[:, 0]
    in_rows = _in_rows(largest, args, tokens.tolist(), hidden_size, steps)
    return in_rows if in_rows.forward_tokens < largest.forward_tokens else largest


def _in_rows(
    largest: predict_memory.Batch, args, tokens: list[int], hidden_size: int, steps: int
) -> predict_memory.Batch:
    """The rows of the micro-batch that fills most of them.

    Args:
        tokens: that each pair, or each row, takes.
    """
    from rlhf_recipes.packing import filled_up, find_rows

    batch = args.per_device_train_batch_size
    tokens = tokens * -(-batch // len(tokens))  # a micro-batch is full
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        drawn = [sorted(tokens)[-batch:]]
    else:
        drawn = itertools.islice(real_steps.micro_batches(tokens, batch), steps * args.gradient_accumulation_steps)
    for each in heapq.nlargest(LOOKED_AT, drawn, key=sum):
        rows = find_rows(each, hidden_size) or [[i] for i in range(len(each))]
        length = filled_up(max(sum(each[i] for i in row) for row in rows))
        if len(rows) * length > largest.rows * largest.row_tokens:
            largest = replace(largest, rows=len(rows), row_tokens=length)
    return largest


def _memory(
    found: JobReport, job: Job, args, base: predict_memory.Backbone, batch: predict_memory.Batch,
    predict: Callable[..., dict], elsewhere: bool, at_once: int = 1,
) -> None:  # fmt: skip
    """Fill in `lora` and `memory`, and judge what is needed by what is free."""
    found.lora = {"numbers": base.lora, "bytes": base.lora * (4 + 4 + predict_memory.state_bytes(args.optim))}
    predict = partial(predict, cards=ranks.world_size() if sharding.is_on() else 1)
    found.memory = predict(args, base, batch) | {"free_gib": None}
    if elsewhere:
        return
    peak, free = found.memory["peak_gib"], memory.free() / GIB / at_once
    found.memory["free_gib"] = free
    each = f" for each of {at_once} processes at a time (hydra.launcher)" if at_once > 1 else ""
    needs = f"{job.name or job.recipe}: needs about {peak:.1f} GiB at its peak, {free:.1f} GiB are free{each}."
    if peak > free:
        fitting = proposal(job.recipe, args, batch, lambda args, batch: predict(args, base, batch)["peak_gib"] <= free)
        advice = f"It fits with {' '.join(fitting)}" if fitting else "Choose a smaller model or another machine"
        parts = _in_parts(job, args, base, batch, predict, free) if found.memory["where"] == "cuda" else ""
        found.stops.append(f"{needs} {advice}.{parts}")
    elif peak * (1 + MARGIN) > free:
        found.watch.append(f"memory is tight: {needs}")


def _in_parts(job: Job, args, base, batch: predict_memory.Batch, predict: Callable[..., dict], free: float) -> str:
    """The command that shards it over the fewest cards like this one that have room for it; "" where none does."""
    if methods.of(job.recipe).samples or job.cfg.quantization.get("load_in_8bit") or sharding.is_on():
        return ""
    for cards in CARDS:
        needs = partial(predict, cards=cards)

        def fits(args, batch, needs=needs) -> bool:
            return needs(args, base, batch)["peak_gib"] <= free

        changes = proposal(job.recipe, args, batch, fits)
        if changes or fits(args, batch):
            file = run.relative(config.CONF / "accelerate" / "fsdp2_qlora.yaml")
            packed = ["quantization=nf4_fsdp"] if job.cfg.quantization.get("load_in_4bit") else []
            words = " ".join([launched(job.recipe, file), *packed, *changes])
            return f" Or in parts, on {cards} such cards: {words}."
    return ""


def proposal(
    recipe: str, args, batch: predict_memory.Batch, fits: Callable[[Any, predict_memory.Batch], bool]
) -> list[str]:
    """The overrides nearest to what was asked that fit; empty where none do.

    First a smaller micro-batch, which changes nothing that is learned; then checkpointing, which costs time; then
    PPO's value head; last shorter rows.
    """
    args, changes = copy.copy(args), {}

    def change(key: str, value) -> None:
        setattr(args, key, value)
        changes[f"trainer.{key}"] = str(value).lower()

    while not fits(args, batch) and args.per_device_train_batch_size % 2 == 0:
        change("per_device_train_batch_size", args.per_device_train_batch_size // 2)
        change("gradient_accumulation_steps", args.gradient_accumulation_steps * 2)
        batch = batch.halved()
    if not fits(args, batch) and not args.gradient_checkpointing:
        change("gradient_checkpointing", True)
    if not fits(args, batch) and getattr(args, "value", "") == "separate":
        change("value", "head")
    while not fits(args, batch) and not methods.of(recipe).samples and batch.tokens // 2 >= SHORTEST:
        batch = batch.shortened()
        change("max_length", batch.tokens)
    return [f"{key}={value}" for key, value in changes.items()] if fits(args, batch) else []


def _shape(cfg: DictConfig, recipe: str, sizes: list[int]) -> str:
    """Hash of what the seconds and the memory of a step depend on, which are no rates (floats), seeds and names.

    Args:
        sizes: tokens of each train row.
    """
    node = run.resolved(cfg)
    kept = {key: node[key] for key in ("model", "quantization", "lora", "data")}
    trainer = {key: value for key, value in node["trainer"].items() if type(value) is not float and "seed" not in key}
    others = (*(node.get(key) for key in ("reward_funcs", "max_prompt_length", "fast_forward")), recipe, sorted(sizes))
    text = json.dumps([kept, trainer, others], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remarks(report: dict, example: dict, recipe: str) -> list[str]:
    """What a person should know of the rows before they are trained on."""
    said = []
    over = report["over_length"]
    if over["rows"] > MANY_CUT * over["of"]:
        key = "max_prompt_length" if methods.of(recipe).samples else "trainer.max_length"
        share = over["rows"] / over["of"]
        said.append(f"{share:.0%} of the rows are over {key}={report['max_length']}{over['fate']}: raise it.")
    if example["ends"] and example["ends"].value < FEW_ENDS:
        said.append(
            f"only {example['ends'].value:.0%} of the replies end with {' or '.join(example['eos'])}: the model "
            "will not learn to stop. Check the chat template, or raise trainer.max_length."
        )
    if report["near_duplicates"]:
        said.append(
            f"{report['near_duplicates']} of {report['test']} test prompts nearly are train prompts: held-out figures "
            "will flatter. Remove them."
        )
    longer = report.get("chosen_longer")
    if longer and longer.low is not None and not longer.low <= 0.5 <= longer.high:
        rule = "longer" if longer.value > 0.5 else "shorter"
        share = max(longer.value, 1 - longer.value)
        said.append(f"'the {rule} reply wins' is right for {share:.0%} of the pairs: compare accuracies with that.")
    refused = report.get("both_refuse")
    if refused and (refused.low or 0) > SOME_REFUSALS:
        said.append(
            f"both replies of {refused.value:.0%} of the pairs refuse: such pairs make both less likely "
            "(arXiv:2410.08847). Drop them."
        )
    return said
