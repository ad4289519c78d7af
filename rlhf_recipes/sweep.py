"""A sweep: every job is measured alike and is one row; after each, the table, the page and the picture are made again.

    <sweep>/rows/<job>.json     what came of a job: its overrides, status, seconds, memory
    <sweep>/<job>/              the run, with measurements.json: its answers, log-probabilities, KL, and its parent's
    <sweep>/sweep.csv           a line for each job, every estimate with n and its 95 % interval
    <sweep>/report.html         all jobs side by side
    <sweep>/frontier.png        quality against the square root of KL

The last three are made of the first two alone: a sweep that was killed loses no row, and the same command goes on.
"""

import csv
import io
import json
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, doctor, memory, preflight, run, run_folder
from rlhf_recipes.secrets import redact
from rlhf_recipes.text import cell, line, shown

ROWS = "rows"
DIFFERENT = "the jobs have different models or data"
_NONE: dict[str, Any] = {"best": None, "equal": []}
OBJECTIVES = ("auto", "win_rate", "reward", "preference_accuracy")
# A column of the table for each; see evaluation/definitions.py. The same estimator for all methods: the accuracy is
# that of the log-ratio to the parent.
METRICS = (
    "accuracy_log_ratio", "win_rate", "win_rate_length_controlled", "reward", "kl_k1", "kl_k3", "length_ratio",
    "distinct_2", "repetition", "eos_rate", "perplexity_ratio",
)  # fmt: skip


def check(node: DictConfig) -> None:
    """Refuse an objective that says nothing.

    Raises:
        ValueError: it is a loss, or unknown.
    """
    if "loss" in str(node.objective):
        raise ValueError(
            f"sweep.objective={node.objective}: a loss depends on beta itself (DPO's is -log sigmoid(beta * margin)) "
            f"and ranks nothing across beta. Choose one of {', '.join(OBJECTIVES)}."
        )
    config.check_value("sweep.objective", node.objective, OBJECTIVES)


def job(main, cfg: DictConfig) -> float:
    """Run one job of a sweep, measure it and write its row; a failure is a row too.

    Returns:
        The objective, which is better when it is higher; minus infinity where the job failed.
    """
    hydra = HydraConfig.get()
    folder, own = run.relative(Path(hydra.sweep.dir).absolute()), hydra.sweep.subdir
    row: dict[str, Any] = {"job": own, "overrides": list(hydra.overrides.task), "status": "failed"}
    begin, os.environ["RLHF_RECIPES_STAGE"] = time.monotonic(), own  # before every progress line
    memory.forget_peak()
    take_gpu(hydra.launcher.get("n_jobs", 1), hydra.job.num)
    try:
        check(cfg.sweep)
        result = _finished(folder / own, cfg)
        if result:
            print(f"{folder / own}: finished before, kept.", flush=True)
        else:
            main(cfg)
            result = run.read_result(folder / own)
        row |= {"recipe": result["recipe"], "main": result["main"], "seconds": result["seconds"]}
        row |= {"peak_memory_gib": max(result["peak_memory_gib"].values()), "stopped": result.get("stopped")}
        row |= {"doctor": (result.get("doctor") or {}).get("verdict"), "adapter_sha256": result["adapter_sha256"]}
        row |= {"system": _measure(folder / own, folder, cfg), "status": "finished"}
    except Exception as error:
        refusal = config.as_refusal(error, hydra.job.config_name)
        row["reason"] = line(redact(refusal or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        print(f"error: {own}: {row['reason']}", file=sys.stderr, flush=True)
        if not refusal:
            print(shown(redact(traceback.format_exc())), file=sys.stderr, flush=True)
    row["seconds_in_all"] = round(time.monotonic() - begin, 1)
    (folder / ROWS).mkdir(parents=True, exist_ok=True)
    run.write_atomically(folder / ROWS / f"{own}.json", json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    table = rebuild([folder], folder, cfg.sweep)
    return next((r["value"] for r in table["rows"] if r["job"] == own and _counts(r)), -math.inf)


def take_gpu(jobs_at_a_time: int, number: int) -> None:
    """Give a worker of a launcher that runs several jobs on one machine a GPU of its own: that of its first job, which
    it keeps.

    Args:
        jobs_at_a_time: joblib's `n_jobs`.
        number: of the job in the sweep.
    """
    import torch

    if jobs_at_a_time == 1 or torch.cuda.is_initialized():
        return
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(each) for each in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


class Summary(Callback):
    """Refuses a sweep before its first job, and says what it came to; it fails where a job did.

    Hydra turns an exception of a callback into a warning; an exit passes.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        here = run.relative(Path(config.hydra.sweep.dir).absolute())
        try:
            run_folder.refuse_foreign(here, only="sweep")
            self.lock = run_folder.Lock(here)
            if "trainer" in config:
                check(config.sweep)
                preflight.before_sweep(config)
        except ValueError as error:
            print(f"error: {line(redact(str(error)))}", file=sys.stderr)
            sys.exit(2)
        if "trainer" in config and config.preflight.only:
            sys.exit(0)
        run_folder.mark(here, "sweep")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = run.relative(Path(config.hydra.sweep.dir).absolute())
        if "trainer" in config and (folder / ROWS).is_dir():
            table = rebuild([folder], folder, config.sweep)
            print(describe(table, folder), flush=True)
            if any(row["status"] != "finished" for row in table["rows"]):
                sys.exit(1)


def name(row: dict) -> str:
    """How tables call the job."""
    return row.get("system") or row["job"]


def read(folder: Path) -> list[dict]:
    """The rows of a sweep, in the order of their jobs' names.

    Raises:
        ValueError: the folder holds none.
    """
    files = sorted((folder / ROWS).glob("*.json"), key=lambda path: _natural(path.stem))
    if not files:
        raise ValueError(
            f"sweeps={folder}: holds no rows of a sweep. Give the folder of one, outputs/dpo/dpo_beta say."
        )
    return [json.loads(path.read_text(encoding="utf-8")) | {"folder": str(folder)} for path in files]


def rebuild(folders: list[Path], out: Path, node: DictConfig) -> dict:
    """Write sweep.csv, report.html and frontier.png of one or several sweeps into `out`.

    Args:
        node: `sweep` of the config: objective and budgets.

    Returns:
        `rows`, each with the `value` of the `objective`; `best`, the system with the highest value within the budgets,
        and those that are `equal` to it: the paired difference has an interval that includes 0; whether page and
        picture were `drawn`.
    """
    from rlhf_recipes import stats
    from rlhf_recipes.evaluation import frontier, page, summary, systems

    rows = [row for folder in folders for row in read(folder)]
    measured = _measurements(rows)
    try:
        merged = systems.merge(list(measured.values())) if measured else None
    except ValueError:
        if len(folders) > 1:
            raise
        merged = None  # a sweep over models or data: a table, but nothing to compare
    evaluation = summary.summarise(merged) if merged else None
    for row in rows:
        own = measured.get(row["system"])
        found = (evaluation or summary.summarise(own))["systems"][row["system"]]["metrics"] if own else {}
        row["metrics"] = {key: found.get(key) for key in METRICS}
    objective = _objective(node.objective, rows)
    for row in rows if not measured else []:  # reward models, say: what each recipe is about
        row["metrics"][objective] = row.get("main", {}).get("after")
    for row in rows:
        row["value"] = (row["metrics"][objective] or {"value": None})["value"]

    def apart(a: dict, b: dict) -> bool:
        if not measured:
            return not stats.overlap(a["metrics"][objective], b["metrics"][objective])
        low = summary.compare(merged, objective, a["system"], b["system"])["low"]
        return low is not None and low > 0

    table = {"rows": rows, "objective": objective, "drawn": merged is not None}
    table |= _best(rows, objective, node, apart) if merged or not measured else _NONE | {"why_none": DIFFERENT}
    run.write_atomically(out / "sweep.csv", _csv(rows))
    if merged:
        page.write_page(evaluation, out / "report.html")
        frontier.plot(rows, objective, table["best"], out / "frontier.png")
    return table


def join(job: run.Run, folders: list[str], node: DictConfig) -> None:
    """One table, page and frontier of several sweeps, as they were measured.

    Raises:
        ValueError: a folder holds no sweep, or they were not measured alike.
    """
    check(node)
    for folder in folders:
        read(Path(folder))
    run.claim(job)
    table = rebuild([Path(folder) for folder in folders], job.dir, node)
    best = next((row for row in table["rows"] if name(row) == table["best"]), None)
    none = {"value": None, "low": None, "high": None, "n": 0}
    estimate = best["metrics"][table["objective"]] if best else none
    run.write_result(
        job, run.record(job, main={"name": table["objective"], "before": none, "after": estimate}, **table)
    )
    print(describe(table, job.dir), flush=True)


def describe(table: dict, out: Path) -> str:
    """The table as a terminal shows it, the best job, and what lies where."""
    from rlhf_recipes.evaluation.definitions import METRICS as DEFINED
    from rlhf_recipes.stats import format_estimate

    objective = DEFINED.get(table["objective"], [table["objective"].replace("_", " ")])[0].lower()
    lines = [["job", objective, "KL, nats", "length", "s", "GiB", "doctor", ""]]
    for row in table["rows"]:
        percent = table["objective"] in ("win_rate", "accuracy_log_ratio", "preference_accuracy")
        m, reason = row["metrics"], row.get("reason") or row.get("stopped") or ""
        peak = f"{row['peak_memory_gib']:.1f}" if "peak_memory_gib" in row else ""
        own = name(row)
        note = "best" if own == table["best"] else "equal to the best" if own in table["equal"] else ""
        lines.append(
            [own, format_estimate(m[table["objective"]], percent=percent), format_estimate(m["kl_k1"], digits=2),
             format_estimate(m["length_ratio"], digits=2), f"{row.get('seconds') or row['seconds_in_all']:.0f}",
             peak, row.get("doctor") or "", reason or note]
        )  # fmt: skip
    lines = [[line(each) for each in row] for row in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip() for row in lines]
    finished = [row for row in table["rows"] if row["status"] == "finished"]
    where = line(out)
    files = f"  table     {where}/sweep.csv"
    if table["drawn"]:
        files += f"\n  frontier  {where}/frontier.png\n  page      {where}/report.html"
    said = f"{len(finished)} of {len(table['rows'])} jobs finished."
    if table["best"]:
        said += f" Best by {objective}: {table['best']}"
        said += f"; not told apart from it: {', '.join(table['equal'])}." if table["equal"] else "."
        best = next(row for row in table["rows"] if name(row) == table["best"])
        files += f"\n  next      {line(_next(best, out))}"
    elif finished:
        said += f" None is named the best: {table['why_none']}."
    return "\n".join(["", text[0], "─" * min(max(map(len, text)), 110), *text[1:], "", line(said), files])


def _next(best: dict, out: Path) -> str:
    if best["recipe"] == "reward":
        return f"python recipes/audit.py reward_model={out}"
    return f"python recipes/evaluate.py 'runs=[\"{Path(best['folder']) / best['job']}\"]'"


def _finished(folder: Path, cfg: DictConfig) -> dict | None:
    """result.json of the job where it is done already with this config; another config is refused by `run.start`."""
    result = None if cfg.overwrite else run.read_result(folder)
    same = result and result["config_sha256"] == run.config_sha256(run.resolved(cfg))
    return result if same else None


def _measure(folder: Path, sweep: Path, cfg: DictConfig) -> str | None:
    """Measure the job beside its parent, unless that was done; its name among the systems, None for a reward model."""
    from rlhf_recipes import data
    from rlhf_recipes.evaluation import systems

    if cfg.sweep.prompts == 0 or not (folder / "adapter").is_dir():
        return None
    settings = OmegaConf.load(config.CONF / "evaluate.yaml")
    shared = {key: cfg[key] for key in ("model", "quantization", "data")}
    asked = {key: cfg.sweep[key] for key in ("prompts", "max_new_tokens", "reward_model")}
    settings = OmegaConf.merge(settings, shared, asked)
    result = run.read_result(folder)
    if result["recipe"] == "reward":
        return None
    parent = (result["parent"] or {}).get("run") or systems.BASE
    found = systems.find([str(folder)], parent, cfg.model.id)
    fingerprint = {"adapter": result["adapter_sha256"], "parent": parent, "asked": OmegaConf.to_container(settings)}
    known = _measured(folder)
    if known is None or known["fingerprint"] != fingerprint:
        others = (_measured(path.parent) for path in sorted(sweep.glob("*/measurements.json")))
        alike = {**fingerprint, "adapter": None}
        before = next((m for m in others if {**m["fingerprint"], "adapter": None} == alike), None)
        scorer = systems.find_scorer(settings.reward_model, cfg.model.id)
        try:
            pairs = data.load_pairs(cfg.data)
        except ValueError as error:  # ppo needs prompts alone
            print(f"{folder}: not measured beside its parent. {error}", file=sys.stderr, flush=True)
            return None
        known = systems.measure(settings, found, scorer, pairs, None, before)
        text = json.dumps({**known, "fingerprint": fingerprint}, ensure_ascii=False)
        run.write_atomically(folder / "measurements.json", text)
    return found[1].name


def _measurements(rows: list[dict]) -> dict[str, dict]:
    """Name -> measurements of the jobs that have any; two of one name are called by their sweep too. A row's `system`
    becomes that name, or None."""
    from rlhf_recipes.evaluation import systems

    jobs = Counter((row.get("recipe"), row["job"]) for row in rows)
    found = {}
    for row in rows:
        known, own = _measured(Path(row["folder"]) / row["job"]), row.get("system")
        alone = jobs[row.get("recipe"), row["job"]] == 1
        row["system"] = f"{row['recipe'] if alone else row['folder']} {row['job']}" if own and known else None
        if row["system"]:
            found[row["system"]] = systems.rename(known, own, row["system"])
    return found


def _measured(folder: Path) -> dict | None:
    path = folder / "measurements.json"
    return run.read_json(path) if path.is_file() else None


def _objective(asked: str, rows: list[dict]) -> str:
    """The metric that the objective stands for: a key of METRICS, or what the recipe is about where nothing is
    measured beside a parent."""
    if not any(row["system"] for row in rows):
        return next((row["main"]["name"] for row in rows if "main" in row), "preference_accuracy")
    if asked == "auto":
        asked = "win_rate" if any(row["metrics"]["win_rate"] for row in rows) else "preference_accuracy"
    return "accuracy_log_ratio" if asked == "preference_accuracy" else asked


def _counts(row: dict) -> bool:
    """Whether a job may be the best: it was measured, and the doctor does not call it broken."""
    return row["value"] is not None and row.get("doctor") != doctor.BROKEN


def _best(rows: list[dict], objective: str, node: DictConfig, apart: Callable[[dict, dict], bool]) -> dict:
    def within(row: dict, metric: str, limit: float | None) -> bool:
        return limit is None or (row["metrics"][metric] is not None and row["metrics"][metric]["value"] <= limit)

    candidates = [row for row in rows if _counts(row)]
    allowed = [r for r in candidates if within(r, "kl_k1", node.max_kl)
               and within(r, "length_ratio", node.max_length_ratio)]  # fmt: skip
    if not allowed:
        budgets = "no job is within sweep.max_kl and sweep.max_length_ratio"
        return _NONE | {"why_none": budgets if candidates else "no job was measured and is not broken"}
    lower = objective == "perplexity"
    best = min(allowed, key=lambda row: row["value"] if lower else -row["value"])
    equal = [name(row) for row in allowed if row is not best and not apart(best, row)]
    return {"best": name(best), "equal": equal}


def _csv(rows: list[dict]) -> str:
    given = [dict(_overrides(row)) for row in rows]
    keys = [
        key
        for key in dict.fromkeys(key for each in given for key in each)
        if len({each.get(key) for each in given}) > 1
    ]  # what is the same for all is in their config.yaml
    metrics = dict.fromkeys(key for row in rows for key in row["metrics"])
    estimates = [f"{m}{part}" for m in metrics for part in ("", "_low", "_high", "_n")]
    fields = ["sweep", "job", *keys, "recipe", "status", *estimates, "seconds", "peak_memory_gib", "doctor",
              "adapter_sha256", "reason"]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writerow({field: cell(field) for field in fields})
    for row in rows:
        numbers = {
            f"{metric}{part}": e[key]
            for metric, e in row["metrics"].items()
            if e
            for part, key in (("", "value"), ("_low", "low"), ("_high", "high"), ("_n", "n"))
        }
        reason = row.get("reason") or row.get("stopped")
        cells = {**dict(_overrides(row)), **row, **numbers, "sweep": row["folder"], "reason": reason}
        writer.writerow({field: cell(value) for field, value in cells.items()})
    return text.getvalue()


def _overrides(row: dict) -> list[tuple[str, str]]:
    split = (text.partition("=") for text in row["overrides"])
    return [(key, value) for key, _, value in split if key not in ("sweep", "run_name")]


def _natural(name: str) -> list:
    """Sorts beta=2 before beta=10."""
    import re

    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name))]
