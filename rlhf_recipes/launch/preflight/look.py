"""A look before the spend: configs, rows, the template, access, disk, memory by role, and real steps.

    python recipes/dpo.py preflight=true                            # look, and stop
    python recipes/dpo.py preflight=true preflight.measure=false    # no step is run
    python recipes/dpo.py sweep=dpo_beta                            # a sweep looks at all its jobs first

What is seen is printed and kept as preflight.json in the folder of the run, sweep or pipeline. A job that could not
run (its memory is predicted not to fit, its first step fails) stops everything before anything starts, with the
nearest setting that would fit; `preflight.fails=warn` starts all the same. What a recipe refuses is refused here.
"""

import itertools
import json
import math
import multiprocessing
import os
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import memory, methods, ranks, run, run_folder
from rlhf_recipes.commands import command
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import cards, keys, publish_after
from rlhf_recipes.launch.preflight.report import JobReport
from rlhf_recipes.launch.refusals import as_refusal
from rlhf_recipes.overrides import of_this_run, written

FILE = "preflight.json"


def instead_of_run(cfg: DictConfig, recipe: str, overrides: list[str]) -> None:
    """Look at one run, and print the command that starts it.

    Raises:
        Refusal: it could not run.
    """
    from rlhf_recipes.launch.preflight.job import Job

    started = run.Run.start(cfg, recipe)
    if cfg.publish:
        ranks.by_first(publish_after.check_ready, cfg, recipe)
    look([Job("", recipe, cfg, overrides)], started.dir, cfg.preflight, processes=ranks.world_size())
    print(f"next      {command(recipe)} {shlex.join(_without_preflight(of_this_run()))}".rstrip(), flush=True)


def before_sweep(cfg: DictConfig) -> None:
    """Look at the jobs of a sweep that are to be trained: those without a result, with `overwrite` all; each distinct
    shape runs its steps once.

    Args:
        cfg: the config of the launch, Hydra's own node included.

    Raises:
        Refusal: a job's config is refused, it could not run, or its folder holds a finished run of another config.
    """
    from rlhf_recipes.launch.preflight.job import Job

    folder = run.relative(Path(cfg.hydra.sweep.dir).absolute())
    with _environment_kept():
        jobs = [Job(*each) for each in sweep_jobs(cfg)]
        jobs = [job for job in jobs if cfg.overwrite or not _is_finished(folder / job.name, job.cfg)]
        if jobs:
            launcher = cfg.hydra.launcher
            each = launcher.get("nodes", 1) * launcher.get("tasks_per_node", 1)  # submitit's
            started = look if launcher._target_.endswith("BasicLauncher") else partial(_apart, look)
            elsewhere = "slurm" in launcher._target_.lower()
            at_once = 1 if elsewhere else _at_once(cfg.hydra, len(jobs), each)
            started(jobs, folder, cfg.preflight, elsewhere=elsewhere, processes=each, at_once=at_once)


def _is_finished(folder: Path, cfg: DictConfig) -> bool:
    """Whether a job was done already with this config.

    Raises:
        Refusal: it was, with another one.
    """
    result = run_folder.read_result(folder)
    if result and result["config_sha256"] != config_sha256(run.resolved(cfg)):
        raise Refusal(
            f"run_name={cfg.run_name}: {folder} holds a finished run of other settings. Choose another run_name, or "
            "replace it with overwrite=true."
        )
    return result is not None


def _at_once(hydra: DictConfig, jobs: int, processes: int) -> int:
    """How many processes of a sweep share a card, or this machine's memory where there is none, at a time."""
    launcher, sweeper = hydra.launcher, hydra.get("sweeper") or {}
    if launcher._target_.endswith("BasicLauncher"):
        return processes
    asked = sweeper.get("n_jobs") or sweeper.get("max_batch_size") or jobs  # Optuna's, and Hydra's own
    if workers := launcher.get("n_jobs"):  # joblib's
        asked = min(asked, workers if workers > 0 else max(1, os.cpu_count() + 1 + workers))
    return math.ceil(asked * processes / len(os.environ.get(cards.BEFORE, "").split(",")))


def before_pipeline(stages: list, folder: Path, settings: DictConfig) -> None:
    """Look at the training stages of a pipeline that have no result.

    Raises:
        Refusal: a stage could not run.
    """
    from rlhf_recipes.launch.preflight.job import Job

    todo = [stage for stage in stages if stage.recipe in methods.METHODS and stage.status != "finished"]
    if todo:
        _apart(look, [Job(s.name, s.recipe, s.cfg, s.overrides, folder) for s in todo], folder, settings)


def _apart(function: Callable, *args, **kwargs) -> Any:
    """Call it in a process of its own where there is a card: libraries start CUDA in whoever asks them, and its
    context keeps half a GiB of the card for as long as that process lives, beside the jobs that it starts.

    Args:
        function: it, its arguments, its value and what it raises can be pickled.
    """
    if any(Path(device).exists() for device in cards.DEVICES):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            if pool.submit(memory.on_gpu).result():  # else none can be used, or not in a fork
                return pool.submit(function, *args, **kwargs).result()
    return function(*args, **kwargs)


def look(
    jobs: list, folder: Path, settings: DictConfig, elsewhere: bool = False, processes: int = 1, at_once: int = 1
) -> None:
    """Examine the jobs, print what is seen, and keep it in `folder`.

    Args:
        elsewhere: the jobs run on other machines, whose memory is not this one's.
        processes: of each job; where this is one of them, the first runs the steps and writes.
        at_once: processes that share a card, or this machine's memory, at a time.

    Raises:
        Refusal: a job could not run, unless `settings.fails` is warn and something would start.
    """
    run.hide_gpus([job.cfg for job in jobs])
    run.environment()
    from rlhf_recipes.launch.preflight import disk, printed
    from rlhf_recipes.launch.preflight import job as examination

    kept = folder / FILE
    measured = ranks.by_first(lambda: run_folder.read_json(kept).get("measured", {}) if kept.is_file() else {})
    measured = {shape: took for shape, took in measured.items() if "error" not in took}  # it may have been mended
    looked_at = examination.Cache(measured, settings.measure and not elsewhere, elsewhere, processes, at_once)
    found: list[JobReport] = []
    print(printed.head(jobs), flush=True)
    for each in jobs:
        found.append(examination.examine(each, looked_at))
        print(printed.describe(found[-1], found[:-1]), flush=True)
    report = {"jobs": found, "disk": disk.needed(found, folder), "measured": looked_at.measured}
    ranks.by_first(folder.mkdir, parents=True, exist_ok=True)
    run_folder.write_atomically(kept, json.dumps(report, indent=2, ensure_ascii=False, default=asdict) + "\n")
    print(printed.summary(report), flush=True)
    reasons = [*(reason for seen in found for reason in seen.stops), *report["disk"]["stops"]]
    if reasons and (settings.only or settings.fails == "stop"):
        raise Refusal(
            f"preflight: {reasons[0]}" + ("" if settings.only else " Or start all the same: preflight.fails=warn")
        )


def sweep_jobs(cfg: DictConfig) -> Iterator[tuple[str, str, DictConfig, list[str]]]:
    """(name, recipe, config, overrides) of every job; of a search, whose jobs nobody knows before, the corners of its
    space.

    Raises:
        Refusal: a job's config is refused, or two jobs of a grid have one name.
    """
    import hydra

    choices, is_search = _choices(cfg)
    recipe, given = cfg.hydra.job.config_name, OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False)
    started: dict[str, tuple[str, ...]] = {}
    for number, chosen in enumerate(itertools.product(*choices.values())):
        own = [*given, *chosen, f"hydra.job.num={number}"]
        try:
            composed = hydra.compose(recipe, overrides=own, return_hydra_config=True)
            name = str(composed.hydra.sweep.subdir)
            # Hydra names a job's folder when it starts it.
            job_cfg = OmegaConf.masked_copy(composed, [key for key in composed if key not in ("hydra", "output_dir")])
            keys.check(job_cfg, recipe)
        except Exception as error:
            raise Refusal(f"{' '.join(chosen)}: {as_refusal(error, recipe) or error}") from error
        if name in started and not is_search:
            raise Refusal(_shared(name, started[name], chosen, choices, composed))
        started[name] = chosen
        yield name, recipe, job_cfg, list(chosen)


def _choices(cfg: DictConfig) -> tuple[dict[str, list[str]], bool]:
    """The overrides that each key takes in turn, as Hydra's sweepers part them (the last word on a key counts); and
    whether some are the ends of an interval that is searched."""
    params = OmegaConf.to_container(cfg.hydra.sweeper.get("params") or OmegaConf.create(), resolve=False)
    typed = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)  # what refers to a key means each job's
    texts = [*(f"{key}={value}" for key, value in params.items()), *typed]
    choices, searched = {}, set()
    for override in OverridesParser.create().parse_overrides(texts):
        key = override.get_key_element()
        searched.discard(key)
        if override.is_interval_sweep():
            values = [str(override.value().start), str(override.value().end)]
            searched.add(key)
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values] if not override.is_delete() else [override.input_line]
    return choices, bool(searched)


def _shared(
    name: str, first: tuple[str, ...], second: tuple[str, ...], choices: dict[str, list[str]], job: DictConfig
) -> str:
    """Why two jobs cannot both have the folder `name`, and names that tell all jobs apart: by what is swept, or by
    their numbers where that is no short value."""
    swept = {key.lstrip("+"): both for key, *both in zip(choices, first, second, strict=True) if len(choices[key]) > 1}
    differs = [key for key, (one, other) in swept.items() if one != other]
    if not differs:
        return f"{' '.join(one for one, _ in swept.values())}: is given twice. Leave one out."
    values = [OmegaConf.select(job, key) for key in swept]
    if all(isinstance(value, str | int | float) and os.sep not in str(value) for value in values):
        short = [key.rpartition(".")[2] for key in swept]
        words = short if len(set(short)) == len(short) else list(swept)
        apart = ",".join(f"{word}=${{{key}}}" for word, key in zip(words, swept, strict=True))
    else:
        apart = "${hydra.job.num}"
    said = f"{differs[0]}: jobs that differ in it would share the folder {name}."
    return f"{said} Add {written('hydra.sweep.subdir', apart)}."


def _without_preflight(overrides: list[str]) -> list[str]:
    return [each for each in overrides if not each.lstrip("+").startswith("preflight")]


@contextmanager
def _environment_kept():
    """A sweep's launcher decides how many threads a job has: what is set to look stays here."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
