"""Accuracy on tasks of lm-evaluation-harness, beside the parent's: what alignment cost elsewhere.

The harness (https://github.com/EleutherAI/lm-evaluation-harness, the extra "eval") loads the data, asks and scores;
each example's score is kept, so that systems are compared on the same examples.
"""

import contextlib
import io
import logging
import os
import sys
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.text import line

# Of the metrics that a task gives per example, the first of these, else its first that is a mean.
METRICS = ("acc", "exact_match")
FEWSHOT_SEED = 1234  # the harness's own


def find(names: list[str], settings: DictConfig) -> dict[str, dict[str, Any]]:
    """The harness's tasks with their data: name -> leaf name -> task (a group has several leaves).

    Args:
        settings: conf/evaluate.yaml, `lm_eval`.

    Raises:
        Refusal: the harness is not installed, there is no such task, its data cannot be loaded, it runs code that
            a model writes, or it scores no single example.
    """
    if isinstance(names, str):
        raise Refusal(f"tasks={names}: must be a list: 'tasks=[{names}]'.")
    if not names:
        return {}
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise Refusal(f'tasks={_list(names)}: needs lm_eval. pip install "rlhf-recipes[eval]".') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = settings.include_path
    if folder is not None and not os.path.isdir(folder):
        raise Refusal(f"lm_eval.include_path={folder}: no such folder. Give the one that has the task's YAML file.")
    own = TaskManager(include_path=folder, include_defaults=False) if folder else None
    # The harness's own list takes seconds to read.
    manager = own if own and set(names) <= set(own.all_tasks) else TaskManager(include_path=folder)
    found = {}
    for name in names:
        if name not in manager.all_tasks:
            raise Refusal(f"tasks=[{name}]: no such task{nearest(str(name), manager.all_tasks)}")
        found[name] = _load(manager, name)
        for leaf, task in found[name].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise Refusal(f"tasks=[{name}]: {leaf} runs code that the model writes. Use lm_eval in a sandbox.")
            metric_of(task, leaf)
    return found


def metric_of(task, leaf: str) -> str:
    """The metric of an example that is taken: a share, or a number whose mean over examples is the result.

    Raises:
        Refusal: there is none.
    """
    better = task.higher_is_better()
    means = [
        name
        for name, function in task.aggregation().items()
        if getattr(function, "__name__", "") == "mean" and better.get(name)
    ]
    first = next((name for name in METRICS if name in means), None) or next(iter(means), None)
    if first is None:
        raise Refusal(f"tasks=[{leaf}]: has no accuracy for each example. Choose a task that has, arc_easy say.")
    return first


def score(model, tokenizer, found: dict[str, dict[str, Any]], settings: DictConfig, what: str) -> dict[str, dict]:
    """Name -> `metric`, `ids` of the examples and their `values`, in one order for every model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    leaves = {leaf: task for tasks in found.values() for leaf, task in tasks.items()}
    for task in leaves.values():
        own = task.get_config("num_fewshot")
        asked = own if settings.num_fewshot is None or own == 0 else settings.num_fewshot  # 0 is part of the task
        task.set_config(key="num_fewshot", value=asked or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    print(f"{line(what)}: {len(leaves)} task{'s' * (len(leaves) > 1)} of lm_eval", flush=True)
    # Its bars are for people.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        scored = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
            task_dict={"tasks": leaves},
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            bootstrap_iters=0,
        )
    results = {}
    for name, tasks in found.items():
        metrics = {leaf: metric_of(task, leaf) for leaf, task in tasks.items()}
        rows = [(leaf, row) for leaf in tasks for row in _first_filter(scored["samples"][leaf])]
        results[name] = {
            "metric": "/".join(dict.fromkeys(metrics.values())),
            "ids": [f"{leaf}:{row['doc_id']}" for leaf, row in rows],
            "values": [float(row[metrics[leaf]]) for leaf, row in rows],
        }
    return results


def _load(manager, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # what datasets, the hub and a YAML file raise shares no base
        reason = first_line(error)[:160].rstrip(".")
        raise Refusal(
            f"tasks=[{name}]: its data cannot be loaded ({reason}). Connect to the hub, or name a task on local files "
            "with lm_eval.include_path."
        ) from error


def _first_filter(samples: list[dict]) -> list[dict]:
    """One row for each example: a task with several filters of its answers (strict, lenient) counts the first."""
    return sorted((row for row in samples if row["filter"] == samples[0]["filter"]), key=lambda row: row["doc_id"])


def _list(names) -> str:
    return f"[{','.join(map(str, names))}]"
