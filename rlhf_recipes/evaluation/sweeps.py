"""A sweep: every job is measured alike and is one row; after each, the table, the page and the picture are made again.

    <sweep>/rows/<job>.json     what came of a job: its overrides, status, seconds, memory; of a finished one why a
                                later command could not run it (`later_failure`)
    <sweep>/<job>/              the run, with measurements.json: its answers, log-probabilities, KL, and its parent's
    <sweep>/sweep.csv           a line for each job, every estimate with n and its 95 % interval
    <sweep>/report.html         all jobs side by side
    <sweep>/frontier.png        quality against the square root of KL

The last three are made of the first two alone: a sweep that was killed loses no row, and the same command goes on.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import config, ranks
from rlhf_recipes.commands import command
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import measurements
from rlhf_recipes.evaluation.measurements import Measurements
from rlhf_recipes.overrides import written
from rlhf_recipes.run import Run
from rlhf_recipes.run_folder import read_json, write_atomically
from rlhf_recipes.text import cell, line
from rlhf_recipes.training.doctor_record import BROKEN

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
        Refusal: it is a loss, or unknown.
    """
    if "loss" in str(node.objective):
        raise Refusal(
            f"sweep.objective={node.objective}: a loss depends on beta itself (DPO's is -log sigmoid(beta * margin)) "
            f"and ranks nothing across beta. Choose one of {', '.join(OBJECTIVES)}."
        )
    config.check_value("sweep.objective", node.objective, OBJECTIVES)


def name(row: dict) -> str:
    """How tables call the job."""
    return row.get("system") or row["job"]


def read(folder: Path) -> list[dict]:
    """The rows of a sweep, in the order of their jobs' names.

    Raises:
        Refusal: the folder holds none.
    """
    files = sorted((folder / ROWS).glob("*.json"), key=lambda path: _natural(path.stem))
    if not files:
        raise Refusal(f"sweeps={folder}: holds no rows of a sweep. Give the folder of one, outputs/dpo/dpo_beta say.")
    return [read_json(path) | {"folder": str(folder)} for path in files]


def rebuild(folders: list[Path], out: Path, node: DictConfig) -> dict:
    """Write sweep.csv, report.html and frontier.png of one or several sweeps into `out`.

    Args:
        node: `sweep` of the config: objective and budgets.

    Returns:
        `rows`, each with the `value` of the `objective`; `best`, the system with the highest value within the budgets,
        and those that are `equal` to it: not told apart by the paired difference, corrected for the number of jobs
        (`stats.ahead`); `optimised`, the jobs that were trained on the reward which ranks them; whether page and
        picture were `drawn`.
    """
    from rlhf_recipes import stats
    from rlhf_recipes.evaluation import frontier, measure, page, summary

    rows = [row for folder in folders for row in read(folder)]
    measured = _measurements(rows)
    alike = measured and not measure.difference(list(measured.values()))
    # Jobs of one sweep over models or data: a table, but nothing to compare.
    merged = measure.merge(list(measured.values())) if alike or (measured and len(folders) > 1) else None
    evaluation = summary.summarise(merged) if merged else None
    for row in rows:
        own = measured.get(row["system"])
        found = (evaluation or summary.summarise(own))["systems"][row["system"]]["metrics"] if own else {}
        row["metrics"] = {key: found.get(key) for key in METRICS}
    objective = _objective(node.objective, rows)
    for row in rows if not measured else []:  # reward models, say: what each recipe is about
        row["metrics"][objective] = row.get("main", {}).get("after")
    for row in rows:
        e = row["metrics"][objective]
        row["value"] = e and e.value

    def apart(a: dict, b: dict, others: int) -> bool:
        if not measured:
            return not stats.overlap(a["metrics"][objective], b["metrics"][objective])
        return stats.ahead(summary.compare(merged, objective, a["system"], b["system"]), others)

    systems = evaluation["systems"] if evaluation and objective in ("win_rate", "reward") else {}
    optimised = [name for name, system in systems.items() if system["optimised"]]
    table = {"rows": rows, "objective": objective, "drawn": merged is not None, "optimised": optimised}
    table |= _best(rows, objective, node, apart) if merged or not measured else _NONE | {"why_none": DIFFERENT}
    write_atomically(out / "sweep.csv", _csv(rows))
    if merged and ranks.is_first():
        page.write_page(evaluation, out / "report.html")
        frontier.plot(rows, objective, table["best"], out / "frontier.png")
    return table


def join(run: Run, folders: list[str], node: DictConfig) -> None:
    """One table, page and frontier of several sweeps, as they were measured.

    Raises:
        Refusal: a folder holds no sweep, or they were not measured alike.
    """
    check(node)
    for folder in folders:
        read(Path(folder))
    run.create()
    table = rebuild([Path(folder) for folder in folders], run.dir, node)
    best = next((row for row in table["rows"] if name(row) == table["best"]), None)
    none = {"value": None, "low": None, "high": None, "n": 0}
    estimate = best["metrics"][table["objective"]] if best else none
    run.write_result(run.record(main={"name": table["objective"], "before": none, "after": estimate}, **table))
    print(describe(table, run.dir), flush=True)


def describe(table: dict, out: Path) -> str:
    """The table as a terminal shows it, the best job, and what lies where."""
    from rlhf_recipes.evaluation.definitions import METRICS as DEFINED
    from rlhf_recipes.stats import format_estimate

    objective = DEFINED.get(table["objective"], [table["objective"].replace("_", " ")])[0].lower()
    lines = [["job", objective, "KL, nats", "length", "s", "GiB", "doctor", ""]]
    for row in table["rows"]:
        percent = table["objective"] in ("win_rate", "accuracy_log_ratio", "preference_accuracy")
        m, reason = row["metrics"], row.get("reason") or row.get("later_failure") or row.get("stopped") or ""
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
    if table["optimised"]:
        said += f" Trained on the reward that ranks them, so no proof of a gain: {', '.join(table['optimised'])}."
    return "\n".join(["", text[0], "─" * min(max(map(len, text)), 110), *text[1:], "", line(said), files])


def _next(best: dict, out: Path) -> str:
    if best["recipe"] == "reward":
        return f"{command('audit')} {written('reward_model', str(out))}"
    return f"{command('evaluate')} {written('runs', [str(Path(best['folder']) / best['job'])])}"


def _measurements(rows: list[dict]) -> dict[str, Measurements]:
    """Name -> measurements of the jobs that have any; two of one name are called by their sweep too. A row's `system`
    becomes that name, or None."""
    from rlhf_recipes.evaluation import measure

    jobs = Counter((row.get("recipe"), row["job"]) for row in rows)
    found = {}
    for row in rows:
        known, own = measurements.find(Path(row["folder"]) / row["job"]), row.get("system")
        alone = jobs[row.get("recipe"), row["job"]] == 1
        row["system"] = f"{row['recipe'] if alone else row['folder']} {row['job']}" if own and known else None
        if row["system"]:
            found[row["system"]] = measure.rename(known, own, row["system"])
    return found


def _objective(asked: str, rows: list[dict]) -> str:
    """The metric that the objective stands for: a key of METRICS, or what the recipe is about where nothing is
    measured beside a parent."""
    if not any(row["system"] for row in rows):
        return next((row["main"]["name"] for row in rows if "main" in row), "preference_accuracy")
    if asked == "auto":
        asked = "win_rate" if any(row["metrics"]["win_rate"] for row in rows) else "preference_accuracy"
    return "accuracy_log_ratio" if asked == "preference_accuracy" else asked


def may_be_best(row: dict) -> bool:
    """Whether a job may be the best: it was measured, and the doctor does not call it broken."""
    return row["value"] is not None and row.get("doctor") != BROKEN


def _best(rows: list[dict], objective: str, node: DictConfig, apart: Callable[[dict, dict, int], bool]) -> dict:
    def within(row: dict, metric: str, limit: float | None) -> bool:
        e = row["metrics"][metric]
        return limit is None or (e is not None and e.value is not None and e.value <= limit)

    candidates = [row for row in rows if may_be_best(row)]
    allowed = [r for r in candidates if within(r, "kl_k1", node.max_kl)
               and within(r, "length_ratio", node.max_length_ratio)]  # fmt: skip
    if not allowed:
        budgets = "no job is within sweep.max_kl and sweep.max_length_ratio"
        return _NONE | {"why_none": budgets if candidates else "no job was measured and is not broken"}
    lower = objective == "perplexity"
    best = min(allowed, key=lambda row: row["value"] if lower else -row["value"])
    equal = [name(row) for row in allowed if row is not best and not apart(best, row, len(allowed) - 1)]
    return {"best": name(best), "equal": equal}


def _csv(rows: list[dict]) -> str:
    given = [dict(_overrides(row)) for row in rows]
    names = dict.fromkeys(key for each in given for key in each)
    # what is the same for all jobs is in their config.yaml
    keys = [name for name in names if len({each.get(name) for each in given}) > 1]
    metrics = dict.fromkeys(key for row in rows for key in row["metrics"])
    estimates = [f"{m}{part}" for m in metrics for part in ("", "_low", "_high", "_n")]
    fields = ["sweep", "job", *keys, "recipe", "status", *estimates, "seconds", "peak_memory_gib", "doctor",
              "adapter_sha256", "reason"]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writerow({field: cell(field) for field in fields})
    for row in rows:
        numbers = {
            f"{metric}{part}": number
            for metric, e in row["metrics"].items()
            if e
            for part, number in (("", e.value), ("_low", e.low), ("_high", e.high), ("_n", e.n))
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
