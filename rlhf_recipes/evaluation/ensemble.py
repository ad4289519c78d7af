"""Several reward models as one: the mean, the worst case and the spread of their standardised scores.

Reward models have scales and origins of their own, so each member's score is taken in standard deviations of its
scores of the held-out replies, the same replies for all:

    z_m(x, y) = (r_m(x, y) - mean_m) / sd_m,   mean z = sum_m z_m / M,   worst case = min_m z_m,   spread = sd over m

(Coste et al. 2023, arXiv:2310.02743; the spread is the population's). Shapes: M members, N answers.
"""

from pathlib import Path

import numpy as np


def members(reference: str | list[str] | None) -> list[str]:
    """The runs that `reward_model` names: one, several, or those in the folder of a sweep (`reward=ensemble`).

    Raises:
        ValueError: the list is empty or names a run twice, or a job of the sweep is not finished.
    """
    if reference is None:
        return []
    if not isinstance(reference, str):
        folders = list(map(str, reference))
        if len(set(folders)) < len(folders) or not folders:
            raise ValueError(f"reward_model={folders}: must name one run or more, each once. Change the list.")
        return folders
    folder = Path(reference)
    if (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return [reference]
    jobs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    for job in jobs:
        if not (job / "result.json").is_file():
            raise ValueError(f"reward_model={reference}: {job.name} is not finished. Finish it, or list the others.")
    return [str(job) for job in jobs] or [reference]


def standards(reward_models: dict[str, list[dict]]) -> list[tuple[float, float]]:
    """(mean, standard deviation) of each member's scores of the held-out replies, chosen and rejected."""
    found = []
    for rows in reward_models.values():
        scores = np.array([row[side] for row in rows for side in ("chosen", "rejected")], dtype=float)
        scores = scores[np.isfinite(scores)]
        sd = float(scores.std()) if len(scores) else 0.0
        found.append((float(scores.mean()) if len(scores) else 0.0, sd or 1.0))
    return found


def combine(scores_MN: list[list[float]], scales: list[tuple[float, float]]) -> list[dict]:
    """For each answer its `reward` (mean z), `worst`, `spread` and the members' z, `members`."""
    mean_M, sd_M = np.array(scales).T
    z_NM = ((np.array(scores_MN, dtype=float).T - mean_M) / sd_M).reshape(-1, len(scales))
    return [
        {"reward": float(z_M.mean()), "worst": float(z_M.min()), "spread": float(z_M.std()), "members": z_M.tolist()}
        for z_M in z_NM
    ]


def pooled(reward_models: dict[str, list[dict]]) -> list[dict]:
    """The held-out pairs as the ensemble's mean scores them."""
    scales = standards(reward_models)
    rows = list(reward_models.values())
    sides = {
        side: combine([[row[side] for row in own] for own in rows], scales) if rows[0] else []
        for side in ("chosen", "rejected")
    }
    return [row | {side: sides[side][n]["reward"] for side in ("chosen", "rejected")} for n, row in enumerate(rows[0])]


def disputed(own: dict, parent: dict) -> bool:
    """Whether some member prefers the parent's answer."""
    return any(a < b - 1e-9 for a, b in zip(own["members"], parent["members"], strict=True))
