"""The page of an audit: complete, self-contained, escaped, the same each time."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.audit import page, verdict
from rlhf_recipes.audit.section import curve, dots, example, examples, figure, grid, lines, section, skipped, table

EVIL = '</svg></style><script>alert("x")</script>&<b>$\\frac$ <|im_end|>'
FAMILIES = ("booking", "triage", "medication", "billing", "consent and records of minors and their guardians", "grief")


def share(p: float, n: int, seed: int = 0) -> dict:
    return stats.estimate(np.random.default_rng(seed).random(n) < p)


def nothing(n: int = 0) -> dict:
    return {"value": None, "low": None, "high": None, "n": n, "clusters": 0}


def number(value: float, spread: float, n: int = 400) -> dict:
    return {"value": value, "low": value - spread, "high": value + spread, "n": n, "clusters": n}


def counted(value: float, n: int) -> dict:
    return {"value": value, "low": None, "high": None, "n": n, "clusters": n}


def sections() -> list[dict]:
    """Every kind of figure, plot, table and example that a part may hold."""
    x = [0.0, 0.4, 0.8, 1.2, 1.6, 2.0]
    proxy, gold = [0, 0.5, 0.9, 1.2, 1.45, 1.7], [0, 0.35, 0.52, 0.55, 0.44, 0.2]
    return [
        section(
            "preference",
            "Preference accuracy",
            "Does the reward model prefer the answers that people chose, and does it know more than a simple rule?",
            figures=[
                figure("accuracy", "Accuracy on held-out pairs", share(0.71, 420), unit="%", better="higher",
                       baseline=("the shorter answer", 0.58), says="Share of pairs whose margin is above 0."),
                figure("chosen_longer", "Chosen answer is the longer", share(0.42, 420, 1), unit="%",
                       says="Share of pairs; 50 % would say that length carries nothing."),
                figure("shorter_wins", "Accuracy of the shorter answer", share(0.58, 420, 1), unit="%"),
            ],
            plots=[
                dots("Accuracy by family (pairs in brackets)",
                     [(f, share(0.5 + 0.06 * i, 70 - 9 * i, i)) for i, f in enumerate(FAMILIES)]
                     + [("none", nothing())],
                     "pairs ranked as labelled, %", ("the shorter answer", 0.58)),
            ],
            tables=[
                table("By size of the margin", ["Margin", "Accuracy", "Mean length", "Pairs"],
                      [["below 0.5", share(0.55, 140, 3), 23.4, 140], ["0.5 to 1", share(0.7, 140, 4), 21, 140],
                       ["above 1", share(0.92, 140, 5), None, 140]], note="Thirds of the pairs."),
            ],
            examples=[
                examples("The pairs it gets most wrong", [
                    example(f"Pair {i}: margin −2.{i}", [("chosen, reward −1.1", "Take it with food. " * 8),
                            ("rejected, reward 1.0", "Sure! " + "It will be fine. " * 12)], "Family: medication.")
                    for i in range(3)
                ])
            ],
            notes=["With 420 pairs a difference of less than 5 points cannot be seen."],
        ),
        section(
            "calibration", "Calibration", "When it says 80 %, is it right in 80 % of cases?",
            figures=[
                figure("ece", "Calibration error", number(0.061, 0.02), unit="%", better="lower", says="15 bins."),
                figure("ece_tempered", "Calibration error, tempered", number(0.021, 0.015), unit="%", better="lower"),
                figure("brier", "Brier score", number(0.193, 0.011), better="lower", baseline=("a coin", 0.25)),
                figure("slope", "Calibration slope", number(0.74, 0.12)),
            ],
            plots=[
                lines("Reliability", "probability it gives", "share that is right",
                      [curve("as it is", [0.52, 0.6, 0.7, 0.8, 0.95], [0.5, 0.55, 0.66, 0.7, 0.86],
                             [0.42, 0.48, 0.6, 0.62, 0.8], [0.58, 0.62, 0.72, 0.78, 0.92]),
                       curve("temperature 1.31", [0.52, 0.58, 0.66, 0.75, 0.9], [0.5, 0.57, 0.66, 0.74, 0.88]),
                       curve("perfect", [0.5, 1.0], [0.5, 1.0], points=False)]),
            ],
        ),
        skipped("uncertainty", "Uncertainty meter", "Does it know when it does not know?",
                "One reward model has no spread. Train an ensemble with recipes/reward.py reward=ensemble."),
        section(
            "stress", "Stress route", "Does the order of two answers survive a change of the prompt?",
            figures=[
                figure("worst_family", "Worst family: typing errors", share(0.47, 60, 9), unit="%", better="higher",
                       baseline=("a coin", 0.5)),
                figure("accuracy_drop", "Accuracy lost", number(0.12, 0.05, 300), unit="%", better="lower"),
            ],
        ),
        section(
            "probes", "Hacking probes", "Which tricks raise the reward although the answer is no better?",
            figures=[
                figure("worst_probe", "Most successful trick: length padding", share(0.81, 120, 2), unit="%"),
                figure("length_r2", "Reward that length explains", number(0.08, 0.03), better="lower"),
                figure("accuracy_length_matched", "Accuracy at equal length", share(0.68, 130, 8), unit="%"),
            ],
            plots=[dots("How often the edited answer wins", [(f"trick {i}", share(0.1 * i, 60, i)) for i in range(8)],
                        "edited answer wins, %", ("no effect", 0.5))],
        ),
        section(
            "coverage", "Coverage ledger", "Which prompts and answers has the data seen, and which never?",
            figures=[
                figure("cells_covered", "Cells with at least 30 pairs", counted(0.42, 24), unit="%", better="higher"),
                figure("exposure_gap", "Exposure gap", counted(0.31, 800), unit="nats", better="lower"),
                figure("out_of_distribution", "Out of distribution", nothing(), unit="%"),
            ],
            plots=[grid("Pairs by family and style", list(FAMILIES), ["short", "long", "list", "refusal"],
                        [[120, 80, 31, 0], [64, 12, 30, 5], [44, 38, 0, 0], [90, 61, 7, 2], [29, 30, 31, 0],
                         [1234, 0, 0, 0]], 30)],
        ),
        section(
            "consistency", "Consistency", "Can one number for each answer explain the choices?",
            figures=[
                figure("rationalisable", "Prompts without a cycle", share(0.9, 50), unit="%"),
                figure("contradictory", "Pairs labelled both ways", counted(0.002, 420), unit="%"),
                figure("cyclic_triads", "Circular triples", nothing(), unit="%", baseline=("random", 0.25)),
            ],
        ),
        section(
            "overoptimisation", "Over-optimisation", "How far can it be optimised before the true quality falls?",
            figures=[figure("gap", "Gold lost at the end", number(0.2, 0.1, 64), unit="%", better="lower")],
            plots=[
                lines("Best of n: gold and proxy", "√KL, √nats", "mean score",
                      [curve("proxy: the reward model that is audited here", x, proxy, [y - 0.1 for y in proxy],
                             [y + 0.1 for y in proxy]),
                       curve("gold", x, gold, [y - 0.08 for y in gold], [y + 0.08 for y in gold]),
                       curve("fit d(α − βd)", list(np.linspace(0, 2, 60)), list(np.linspace(0, 2, 60) * 0.5),
                             points=False)],
                      [("peak of gold", 1.05), ("keep checkpoint 120", 1.2)]),
            ],
        ),
    ]  # fmt: skip


def audit(parts: list[dict] | None = None, thresholds: dict | None = None) -> dict:
    parts = sections() if parts is None else parts
    decided = verdict.decide(parts, thresholds or {})
    label = [{"prompt": f"Can I take two tablets at once? ({i})", "family": "medication", "why": "the members differ"}
             for i in range(10)]  # fmt: skip
    return {
        "title": "Audit of the clinic reward model",
        "subject": {"Reward model": "outputs/reward/clinic", "Data": "clinic pairs, held out"},
        "counts": {"Pairs": 420, "Prompts": 405, "Reward models": 1},
        "verdict": decided,
        "paragraph": verdict.paragraph(parts, decided["gates"], label),
        "sections": parts,
        "label_next": label,
        "settings": {"seed": 17, "resamples": 1000, "data": {"name": "clinic", "split": None}, "rate": math.nan},
    }


def written(found: dict, tmp_path) -> str:
    page.write_page(found, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")
