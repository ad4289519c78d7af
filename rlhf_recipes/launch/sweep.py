"""One job of a sweep, and what Hydra does before the first and after the last."""

import json
import math
import os
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, locks, memory, ranks, run, run_folder
from rlhf_recipes.config_hash import computed
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import measurements
from rlhf_recipes.evaluation.sweeps import ROWS, check, describe, may_be_best, rebuild
from rlhf_recipes.launch import cards, keys, out_of_memory
from rlhf_recipes.launch.preflight import look
from rlhf_recipes.launch.refusals import as_refusal, print_error
from rlhf_recipes.secrets import redact
from rlhf_recipes.text import line, shown


def run_job(main, cfg: DictConfig) -> float:
    """Run one job of a sweep, measure it and write its row; a failure is a row too, or a word in that of the run which
    is there and finished.

    Returns:
        The objective, which is better when it is higher; minus infinity where the job failed.
    """
    _say_which_task()
    hydra = HydraConfig.get()
    folder, own = run.relative(Path(hydra.sweep.dir).absolute()), hydra.sweep.subdir
    row: dict[str, Any] = {"job": own, "overrides": list(hydra.overrides.task), "status": "failed"}
    begin, os.environ["RLHF_RECIPES_STAGE"] = time.monotonic(), own  # before every progress line
    path = folder / ROWS / f"{own}.json"
    earlier, parted = _text(path), False
    is_kept = not cfg.get("overwrite") and (folder / own / run_folder.RESULT).is_file()
    cards.take_for_job(hydra.job.num)
    memory.forget_peak()
    try:
        keys.check(cfg)
        check(cfg.sweep)
        result = run.finished(folder / own, cfg)  # another config is refused by `Run.start`
        if result:
            print(f"{folder / own}: finished before, kept.", flush=True)
        else:
            if cfg.sweep.generator and cfg.sweep.prompts:
                _look(cfg)
            with out_of_memory.told(cfg):
                main(cfg)
            result = run_folder.read_result(folder / own)
        row |= {"recipe": result["recipe"], "main": result["main"], "seconds": result["seconds"]}
        row |= {"peak_memory_gib": max(result["peak_memory_gib"].values()), "stopped": result.get("stopped")}
        row |= {key: result[key] for key in ("world_size", "nodes", "global_batch") if key in result}
        row |= {"doctor": (result.get("doctor") or {}).get("verdict"), "adapter_sha256": result["adapter_sha256"]}
        row |= {"system": _measure(folder / own, folder, cfg), "status": "finished"}
    except Exception as error:
        refusal, parted = as_refusal(error), ranks.is_parted(error)
        row["reason"] = line(redact(refusal or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        print(f"error: {own}: {row['reason']}", file=sys.stderr, flush=True)
        if not refusal:
            print(shown(redact(traceback.format_exc())), file=sys.stderr, flush=True)
    row["seconds_in_all"] = round(time.monotonic() - begin, 1)
    done, failed = row["status"] == "finished", row["status"] == "failed" and not parted
    before = json.loads(earlier) if failed and is_kept and earlier else {}
    if before.get("status") == "finished":
        row = before | {"later_failure": row["reason"]}  # what the row tells of is there still
    # A process that fails says why itself, for submitit may end all with the first that ends; that another has ended
    # says less.
    if failed or (ranks.is_first() and not (parted and _text(path) != earlier)):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row, indent=2, ensure_ascii=False, default=asdict)
        run_folder.write_atomically(path, text + "\n", by_any=failed)
    if done:
        ranks.barrier()  # for the row that the first process writes
    table = rebuild([folder], folder, cfg.sweep)
    if done:
        ranks.barrier()  # submitit may end all tasks with the first that ends
    own_rows = (r for r in table["rows"] if r["job"] == own and may_be_best(r) and not failed)
    return next((r["value"] for r in own_rows), -math.inf)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _say_which_task() -> None:
    """A job of several tasks (`hydra.launcher.tasks_per_node`) is one run of several processes: say so in the
    variables that a launcher sets."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        if job.num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            if job.num_nodes == 1:  # which need not know its own name
                os.environ["MASTER_ADDR"] = "127.0.0.1"


class Summary(Callback):
    """Refuses a sweep before its first job, and says what it came to; it fails where a job did.

    Hydra turns an exception of a callback into a warning; an exit passes.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        here = run.relative(Path(config.hydra.sweep.dir).absolute())
        try:
            if ranks.world_size() > 1:
                raise Refusal(
                    f"WORLD_SIZE={ranks.world_size()}: a sweep is one process, which starts its jobs. Start it with "
                    "python; a launcher of Hydra's gives each job several processes (hydra/launcher=submitit_slurm "
                    "hydra.launcher.tasks_per_node=2)."
                )
            run_folder.refuse_foreign(here, only="sweep")
            self.lock = locks.Lock(here)
            if "slurm" not in config.hydra.launcher._target_.lower():  # whose jobs run elsewhere
                cards.take_one(config.hydra.job.config_name)
            if "trainer" in config:
                check(config.sweep)
                look.before_sweep(config)
        except Exception as error:
            print_error(error)
        if "trainer" in config and config.preflight.only:
            sys.exit(0)
        run_folder.mark(here, "sweep")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = run.relative(Path(config.hydra.sweep.dir).absolute())
        if "trainer" in config and (folder / ROWS).is_dir():
            table = rebuild([folder], folder, config.sweep)
            print(describe(table, folder), flush=True)
            if any(row["status"] != "finished" or "later_failure" in row for row in table["rows"]):
                sys.exit(1)


def _measure(folder: Path, sweep: Path, cfg: DictConfig) -> str | None:
    """Measure the job beside its parent, unless that was done; its name among the systems, None for a reward model."""
    from rlhf_recipes import models
    from rlhf_recipes.adapters import BASE
    from rlhf_recipes.data.load import load_pairs
    from rlhf_recipes.evaluation import measure

    if cfg.sweep.prompts == 0 or not (folder / "adapter").is_dir():
        return None
    settings = _settings(cfg)
    result = run_folder.read_result(folder)
    if result["recipe"] == "reward":
        return None
    parent = (result["parent"] or {}).get("run") or BASE
    found = measure.find([str(folder)], parent, cfg.model.id, cfg.model.adapter_base)
    scorer = measure.find_scorer(settings.reward_model, cfg.model.id, cfg.model.adapter_base)
    fingerprint = {"adapter": result["adapter_sha256"], "parent": parent, "asked": OmegaConf.to_container(settings)}
    if weights := [each.sha256 for each in (found[0], *scorer) if each.sha256]:
        fingerprint["weights"] = weights
    known = measurements.find(folder)
    if known is None or _measured_as(known.fingerprint) != _measured_as(fingerprint):
        others = (measurements.find(path.parent) for path in sorted(sweep.glob(f"*/{measurements.FILE}")))
        alike = {**_measured_as(fingerprint), "adapter": None}
        measured = (m for m in others if m and m.fingerprint)  # recipes/evaluate.py writes none
        before = next((m for m in measured if {**_measured_as(m.fingerprint), "adapter": None} == alike), None)
        before = ranks.from_first(before)
        models.check_templates(cfg.model, [each.adapter for each in scorer], reward=True)
        try:
            pairs = load_pairs(cfg.data)
        except Refusal as error:  # ppo needs prompts alone
            print(f"{folder}: not measured beside its parent. {error}", file=sys.stderr, flush=True)
            return None
        known = measure.measure(settings, found, measure.Scorers(scorer), pairs, before)
        known.fingerprint = fingerprint
        known.write(folder)
    return found[1].name


def _settings(cfg: DictConfig) -> DictConfig:
    """Of the measurement: conf/evaluate.yaml, with what the job and its sweep say.

    Raises:
        Refusal: `sweep.generator` is no endpoint's.
    """
    settings = OmegaConf.load(config.CONF / "evaluate.yaml")
    shared = {key: cfg[key] for key in ("model", "quantization", "data", "fast_forward") if key in cfg}
    asked = {key: cfg.sweep[key] for key in ("prompts", "max_new_tokens", "reward_model")}
    if cfg.sweep.generator:
        server, given = OmegaConf.load(config.CONF / "generator" / "server.yaml"), cfg.sweep.generator
        if not OmegaConf.is_dict(given) or not given.get("model"):
            raise Refusal(f"sweep.generator={given}: must be like {{base_url: http://localhost:8000/v1, model: x}}.")
        for key in given:
            config.check_value("sweep.generator", key, tuple(server))
        asked["generator"] = OmegaConf.merge(server, given)
    return OmegaConf.merge(settings, shared, asked)


def _look(cfg: DictConfig) -> None:
    """Whether the endpoint that will measure the job can do it, before it is trained.

    Raises:
        Refusal: it cannot.
    """
    from rlhf_recipes.evaluation import served_policies

    settings = _settings(cfg)
    served = served_policies.look(settings)
    if served and not served.scores:
        raise Refusal(
            f"sweep.generator.base_url={settings.generator.base_url}: gives no log-probabilities of a prompt "
            "(prompt_logprobs), so no KL, and a sweep holds quality against it. Serve the model by vLLM, or set "
            "sweep.generator=null."
        )


def _measured_as(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What of a fingerprint decides what is measured: a key that is added to the configs, or its help, does not."""
    asked = {key: value for key, value in computed(fingerprint["asked"]).items() if key not in ("defaults", "hydra")}
    return {**fingerprint, "asked": asked}
