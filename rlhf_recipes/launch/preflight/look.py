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
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import cards, keys, publish_after
from rlhf_recipes.launch.preflight.report import JobReport
from rlhf_recipes.launch.refusals import as_refusal
from rlhf_recipes.overrides import of_this_run

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
        Refusal: a job's config is refused, or it could not run.
    """
    from rlhf_recipes.launch.preflight.job import Job

    folder = run.relative(Path(cfg.hydra.sweep.dir).absolute())
    with _environment_kept():
        jobs = [Job(*each) for each in sweep_jobs(cfg)]
        jobs = [job for job in jobs if cfg.overwrite or not (folder / job.name / "result.json").is_file()]
        if jobs:
            launcher = cfg.hydra.launcher
            each = launcher.get("nodes", 1) * launcher.get("tasks_per_node", 1)  # submitit's
            started = look if launcher._target_.endswith("BasicLauncher") else partial(_apart, look)
            started(jobs, folder, cfg.preflight, elsewhere="slurm" in launcher._target_.lower(), processes=each)


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


def look(jobs: list, folder: Path, settings: DictConfig, elsewhere: bool = False, processes: int = 1) -> None:
    """Examine the jobs, print what is seen, and keep it in `folder`.

    Args:
        elsewhere: the jobs run on other machines, whose memory is not this one's.
        processes: of each job; where this is one of them, the first runs the steps and writes.

    Raises:
        Refusal: a job could not run, unless `settings.fails` is warn.
    """
    run.hide_gpus([job.cfg for job in jobs])
    run.environment()
    from rlhf_recipes.launch.preflight import job as examination
    from rlhf_recipes.launch.preflight import printed

    kept = folder / FILE
    measured = ranks.by_first(lambda: run_folder.read_json(kept).get("measured", {}) if kept.is_file() else {})
    measured = {shape: took for shape, took in measured.items() if "error" not in took}  # it may have been mended
    looked_at = examination.Cache(measured, settings.measure and not elsewhere, elsewhere, processes)
    found: list[JobReport] = []
    print(printed.head(jobs), flush=True)
    for each in jobs:
        found.append(examination.examine(each, looked_at))
        print(printed.describe(found[-1], found[:-1]), flush=True)
    report = {"jobs": found, "disk": examination.disk(found, folder), "measured": looked_at.measured}
    ranks.by_first(folder.mkdir, parents=True, exist_ok=True)
    run_folder.write_atomically(kept, json.dumps(report, indent=2, ensure_ascii=False, default=asdict) + "\n")
    print(printed.summary(report), flush=True)
    reasons = [*(reason for seen in found for reason in seen.stops), *report["disk"]["stops"]]
    if reasons and settings.fails == "stop":
        raise Refusal(f"preflight: {reasons[0]} Or start all the same: preflight.fails=warn")


def sweep_jobs(cfg: DictConfig) -> Iterator[tuple[str, str, DictConfig, list[str]]]:
    """(name, recipe, config, overrides) of every job; of a search, whose jobs nobody knows before, the corners of its
    space.

    Raises:
        Refusal: a job's config is refused.
    """
    import hydra

    params = OmegaConf.to_container(cfg.hydra.sweeper.get("params") or OmegaConf.create(), resolve=False)
    texts = [*(f"{key}={value}" for key, value in params.items()), *cfg.hydra.overrides.task]
    choices = []
    for override in OverridesParser.create().parse_overrides(texts):
        key = override.get_key_element()
        if override.is_interval_sweep():
            values = [str(override.value().start), str(override.value().end)]
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        choices.append([f"{key}={value}" for value in values] if not override.is_delete() else [override.input_line])
    recipe = cfg.hydra.job.config_name
    for number, chosen in enumerate(itertools.product(*choices)):
        own = [*chosen, f"hydra.job.num={number}"]
        try:
            composed = hydra.compose(recipe, overrides=own, return_hydra_config=True)
            name = str(composed.hydra.sweep.subdir)
            # Hydra names a job's folder when it starts it.
            job_cfg = OmegaConf.masked_copy(composed, [key for key in composed if key not in ("hydra", "output_dir")])
            keys.check(job_cfg, recipe)
        except Exception as error:
            raise Refusal(f"{' '.join(chosen)}: {as_refusal(error, recipe) or error}") from error
        yield name, recipe, job_cfg, list(chosen)


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
