"""What every part of an audit comes to: figures, and tables, plots and examples as plain dicts.

A part is a module with one function `audit(...)` that takes rows and numbers, loads no model, and returns
`section(...)`, or `skipped(...)` with what to give it. `page` draws them, `verdict` holds their figures against its
gates.

Estimates are those of `stats`, clustered by prompt; shares are in [0, 1].
"""

from dataclasses import dataclass

from rlhf_recipes.stats import Estimate


@dataclass(frozen=True)
class Baseline:
    """What a trivial rule reaches, `value` in the unit of the estimate that it stands beside."""

    name: str
    value: float


@dataclass(frozen=True)
class Figure:
    """One number; see `figure`."""

    key: str
    title: str
    estimate: Estimate
    unit: str
    better: str | None
    baseline: Baseline | None
    says: str


def section(
    key: str,
    title: str,
    question: str,
    *,
    figures: list[Figure],
    tables: list[dict] | None = None,
    plots: list[dict] | None = None,
    examples: list[dict] | None = None,
    notes: list[str] | None = None,
) -> dict:
    """One part of the audit.

    Args:
        key: names it in audit.json and in the gates.
        question: what it answers, in the words of a reader who knows no statistics.
        notes: what limits its figures (the power of a test, what was not measured), a sentence each.
    """
    return {
        "key": key,
        "title": title,
        "question": question,
        "figures": list(figures),
        "tables": list(tables or []),
        "plots": list(plots or []),
        "examples": list(examples or []),
        "notes": list(notes or []),
    }


def skipped(key: str, title: str, question: str, why: str) -> dict:
    """A part that could not be measured; `why` says what to give it."""
    return section(key, title, question, figures=[]) | {"skipped": why}


def figure(
    key: str,
    title: str,
    estimate: Estimate,
    *,
    unit: str = "",
    better: str | None = None,
    baseline: tuple[str, float] | None = None,
    says: str = "",
) -> Figure:
    """One number.

    Args:
        unit: "%" for a share in [0, 1], else nats, tokens, ... or nothing.
        better: higher | lower | None.
        baseline: what a trivial rule reaches, (its name, value in the unit of the estimate).
        says: its definition, with the formula and its source.
    """
    return Figure(key, title, estimate, unit, better, baseline and Baseline(*baseline), says)


def table(caption: str, columns: list[str], rows: list[list], note: str = "") -> dict:
    """Cells are text, numbers, estimates of shares or None; the first column names the row."""
    return {"caption": caption, "columns": columns, "rows": rows, "note": note}


def dots(caption: str, rows: list[tuple[str, Estimate]], xlabel: str, line: tuple[str, float] | None = None) -> dict:
    """A share with its interval for each name; `line`: (name, value) of the baseline."""
    named = [{"name": name, "estimate": estimate} for name, estimate in rows]
    return {"kind": "dots", "caption": caption, "rows": named, "xlabel": xlabel, "line": line and list(line)}


def lines(caption: str, xlabel: str, ylabel: str, series: list[dict], marks: list[tuple[str, float]] = ()) -> dict:
    """Curves over one axis.

    Args:
        series: of `curve`.
        marks: vertical lines, (name, x).
    """
    drawn = {"kind": "lines", "caption": caption, "xlabel": xlabel, "ylabel": ylabel, "series": series}
    return drawn | {"marks": [list(mark) for mark in marks]}


def curve(name: str, x: list[float], y: list[float], low=None, high=None, points: bool = True) -> dict:
    """A series of `lines`; low and high are its 95 % band. points=False: a fit, drawn as a dashed line."""
    return {"name": name, "x": list(x), "y": list(y), "low": low and list(low), "high": high and list(high),
            "points": points}  # fmt: skip


def grid(caption: str, rows: list[str], columns: list[str], counts: list[list[int]], enough: int) -> dict:
    """Counts by row and column; cells with fewer than `enough` stand out, those with none most."""
    return {"kind": "grid", "caption": caption, "rows": rows, "columns": columns, "counts": counts, "enough": enough}


def example(title: str, texts: list[tuple[str, str]], note: str = "") -> dict:
    """Texts side by side, each with its name: a pair and its scores, an answer and its edit."""
    return {"title": title, "texts": [{"name": name, "text": text} for name, text in texts], "note": note}


def examples(caption: str, rows: list[dict]) -> dict:
    return {"caption": caption, "rows": rows}
