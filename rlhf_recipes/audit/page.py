"""report.html of an audit: one page for an engineer, a policy lead and an auditor."""

import math
import re
import textwrap
from dataclasses import replace
from pathlib import Path

from rlhf_recipes.audit.section import Figure
from rlhf_recipes.audit.verdict import STATES, Outcome, asked, shown
from rlhf_recipes.drawing import COLOURS, INK, MARKERS, clip, dot, figure, name_rows, write
from rlhf_recipes.stats import Estimate, format_estimate, format_number

SYMBOLS = {"pass": "✓", "fail": "✗", "unclear": "?", "not measured": "–"}
VERDICTS = {"trust": "✓", "caution": "!", "do not trust": "✗"}
CLASSES = {"pass": "good", "fail": "bad", "unclear": "wait", "not measured": "soft"}
CLASSES |= {"trust": "good", "caution": "wait", "do not trust": "bad"}

# what a page shows at most; it says how many there are
SHOWN_EXAMPLES = 20  # of each list
SHOWN_CHARACTERS = 1200  # of each text
SHOWN_ROWS = 100  # of a table
DRAWN_ROWS = 40  # of a plot
LEGEND = 56  # characters of a name; two columns where all are at most half as long
SAID_POINTS = 12  # of a curve, in the text that a screen reader says


def write_page(audit: dict, path: str | Path) -> None:
    """Write the audit as one self-contained HTML file.

    Args:
        audit: `title`; `subject` (name -> value: what was audited); `counts` (name -> number); `verdict` (of
            `verdict.decide`); `paragraph` (of `verdict.paragraph`); `sections`; `label_next` (dicts with prompt,
            family and why); `settings` (name -> value).
    """
    states = _states(audit["verdict"]["gates"])
    write(
        Path(__file__).with_name("page.html.jinja"),
        path,
        title=audit["title"],
        subject=audit["subject"].items(),
        counts=[(name, _cell(value)) for name, value in audit["counts"].items()],
        verdict=audit["verdict"],
        verdict_symbol=VERDICTS[audit["verdict"]["verdict"]],
        verdict_class=CLASSES[audit["verdict"]["verdict"]],
        paragraphs=[_led(_bound(part)) for part in audit["paragraph"].split("\n\n") if part.strip()],
        gates=[_gate(gate, audit["sections"]) for gate in audit["verdict"]["gates"]],
        sections=[_section(section, states) for section in audit["sections"]],
        label_next=[
            {key: _clipped(row.get(key), 300) for key in ("prompt", "family", "why")} for row in audit["label_next"]
        ],
        settings=[(name, _setting(value)) for name, value in audit["settings"].items()],
    )


def _bound(text: str) -> str:
    """A number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=%|points\b|nats\b)", "\u00a0", text)


def _led(paragraph: str) -> tuple[str, str]:
    """The words that a paragraph opens with (`What to collect next.`), and the rest."""
    lead, dot, rest = paragraph.partition(". ")
    return (f"{lead}.", rest) if dot and lead.startswith("What ") and len(lead) < 30 else ("", paragraph)


def _states(gates: list[Outcome]) -> dict:
    """(section, figure) -> the worst state of its gates."""
    worst = {}
    for gate in gates:
        key = gate.section, gate.figure
        if gate.state != "not measured":
            worst[key] = min(worst.get(key, gate.state), gate.state, key=STATES.index)
    return worst


def _mark(state: str) -> dict:
    return {"state": state, "symbol": SYMBOLS[state], "class": CLASSES[state]}


def _gate(gate: Outcome, sections: list[dict]) -> dict:
    value, _, interval = shown(gate).partition(" [")
    action = gate.todo if gate.state == "fail" else gate.why
    return {
        "title": gate.title,
        "name": _clipped(gate.name, 200),
        "value": value,
        "interval": interval and f"[{interval.replace(' to ', ', ')}",
        "n": gate.n,
        "asked": asked(gate),
        "source": gate.source,
        "mark": _mark(gate.state),
        "action": action,
        "strip": _strip(gate),
        "link": _id(gate.section) if any(s["key"] == gate.section for s in sections) else None,
    }


def _strip(gate: Outcome) -> dict | None:
    """Where the value, its interval and the limit lie, in % of a strip's width."""
    numbers = {key: getattr(gate, key) for key in ("value", "low", "high", "limit")}
    numbers = {key: number for key, number in numbers.items() if number is not None}
    if gate.value is None:
        return None
    low, high = min(numbers.values()), max(numbers.values())
    reach = high - low or abs(high) or 1.0
    at = {key: _percent((number - low) / reach) for key, number in numbers.items()}
    at.setdefault("low", at["value"])
    at.setdefault("high", at["value"])
    right = gate.side == "min"
    return at | {"good_from": at["limit"] if right else 0, "good_to": 100 if right else at["limit"]}


def _percent(share: float) -> float:
    return round(8 + 84 * share, 1)


def _section(section: dict, states: dict) -> dict:
    found = [states[section["key"], f.key] for f in section["figures"] if (section["key"], f.key) in states]
    measured = [f for f in section["figures"] if f.estimate and _finite(f.estimate.value)]
    grids = [_grid(plot) for plot in section["plots"] if plot["kind"] == "grid"]
    return {
        "id": _id(section["key"]),
        "title": section["title"],
        "question": section["question"],
        "skipped": section.get("skipped", ""),
        "mark": _mark(min(found, key=STATES.index)) if found else None,
        "figures": [_figure(f, states.get((section["key"], f.key))) for f in measured],
        "unmeasured": [f.title for f in section["figures"] if f not in measured],
        "plots": [
            drawn for i, plot in enumerate(section["plots"]) if (drawn := _plot(plot, f"{_id(section['key'])}-{i}"))
        ],
        "grids": [grid for grid in grids if grid],
        "tables": [_table(table) for table in section["tables"]],
        "examples": [_examples(group) for group in section["examples"] if group["rows"]],
        "notes": section["notes"],
    }


def _figure(f: Figure, state: str | None) -> dict:
    e = f.estimate
    value, _, interval = _estimate(e, f.unit == "%").partition(" [")
    baseline = f.baseline
    return {
        "title": f.title,
        "better": f"{f.better} is better" if f.better else "",
        "value": value if f.unit in ("", "%") else f"{value} {f.unit}",
        "interval": interval and f"[{interval}",
        "n": _cell(e.n),
        "clusters": _cell(e.clusters) if e.clusters != e.n else "",
        "baseline": baseline and {"name": baseline.name, "value": _baseline(baseline.value, f.unit)},
        "says": f.says,
        "mark": _mark(state) if state else None,
    }


def _estimate(e: Estimate, percent: bool) -> str:
    """As everywhere, with a true minus; numbers that are not finite are not printed."""
    clean = e.mapped(lambda x: x if _finite(x) else None)
    if clean.low is None or clean.high is None:
        clean = replace(clean, low=None, high=None)
    digits = None if percent or clean.value is None else _digits(clean.value)
    return format_estimate(clean, percent=percent, digits=digits).replace("-", "−")


def _digits(x: float) -> int:
    """After the point, for about three that count."""
    size = abs(x)
    return 0 if size >= 1000 or (size >= 10 and x == round(x)) else 1 if size >= 100 else 2 if size >= 1 else 3


def _baseline(value: float, unit: str) -> str:
    if not _finite(value):
        return "–"
    said = f"{format_number(100 * value)} %" if unit == "%" else format_number(value, _digits(value))
    return said.replace("-", "−")


def _finite(x) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _cell(value) -> str:
    """Text of a table cell: an estimate of a share, a number, a text, or a dash for nothing."""
    if isinstance(value, Estimate):
        return _estimate(value, percent=True)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return format_number(value, _digits(value)).replace("-", "−")
    return _clipped(value)


def _setting(value) -> str:
    import json

    if isinstance(value, dict | list):
        return _clipped(json.dumps(value, ensure_ascii=False, default=str))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _cell(value)


def _clipped(value, width: int = SHOWN_CHARACTERS) -> str:
    text = "" if value is None else str(value)
    more = len(text) - width
    return text if more <= 0 else f"{text[:width]}… ({more:,} more characters)"


def _id(key: str) -> str:
    return "part-" + re.sub(r"[^a-z0-9]+", "-", key.lower())


def _table(table: dict) -> dict:
    rows = table["rows"]
    return {
        "caption": table["caption"],
        "columns": [_cell(column) for column in table["columns"]],
        "rows": [[_table_cell(cell) for cell in row] for row in rows[:SHOWN_ROWS]],
        "note": table["note"],
        "more": f"The first {SHOWN_ROWS} of {len(rows):,} rows." if len(rows) > SHOWN_ROWS else "",
    }


def _table_cell(cell) -> dict:
    value, _, interval = _cell(cell).partition(" [") if isinstance(cell, Estimate) else (_cell(cell), "", "")
    number = isinstance(cell, Estimate | int | float) or cell is None
    return {"value": value, "interval": interval and f"[{interval}", "number": number,
            "n": _cell(cell.n) if isinstance(cell, Estimate) and cell.n else ""}  # fmt: skip


def _examples(group: dict) -> dict:
    rows = group["rows"]
    return {
        "caption": group["caption"],
        "more": f"The first {SHOWN_EXAMPLES} of {len(rows):,}." if len(rows) > SHOWN_EXAMPLES else "",
        "rows": [
            {
                "title": _clipped(row["title"], 200),
                "note": _clipped(row["note"]),
                "texts": [{"name": _clipped(t["name"], 200), "text": _clipped(t["text"])} for t in row["texts"]],
            }
            for row in rows[:SHOWN_EXAMPLES]
        ],
    }


def _grid(plot: dict) -> dict | None:
    """Cells with their count and, where there are too few, that in words."""
    if not plot["rows"] or not plot["columns"]:
        return None
    rows = [
        {"name": _clipped(name, 80), "cells": [_grid_cell(count, plot["enough"]) for count in counts]}
        for name, counts in zip(plot["rows"][:SHOWN_ROWS], plot["counts"], strict=False)
    ]
    low = sum(0 < count < plot["enough"] for counts in plot["counts"] for count in counts)
    none = sum(count == 0 for counts in plot["counts"] for count in counts)
    total = sum(len(counts) for counts in plot["counts"])
    said = (
        f"{total - low - none:,} of {total:,} cells have at least {plot['enough']}, {low:,} have fewer, {none:,} none."
    )
    if len(plot["rows"]) > SHOWN_ROWS:
        said += f" The first {SHOWN_ROWS} of {len(plot['rows']):,} rows."
    return {"caption": plot["caption"], "columns": [_clipped(c, 80) for c in plot["columns"]], "rows": rows,
            "says": said}  # fmt: skip


def _grid_cell(count: int, enough: int) -> dict:
    kind = "none" if count == 0 else "few" if count < enough else "enough"
    return {"count": _cell(count), "kind": kind}


def _plot(plot: dict, name: str) -> dict | None:
    """A drawing; None for a grid, which is a table, and where nothing can be drawn."""
    return {"dots": _dots, "lines": _lines, "grid": lambda *_: None}[plot["kind"]](plot, name)


def _dots(plot: dict, name: str) -> dict | None:
    rows = [row for row in plot["rows"] if row["estimate"] and _finite(row["estimate"].value)]
    caption = plot["caption"]
    if not rows:
        return None
    if len(rows) > DRAWN_ROWS:
        caption += f" (the first {DRAWN_ROWS} of {len(rows)})"
        rows = rows[:DRAWN_ROWS]
    names = [_folded(f"{clip(row['name'], 48)} ({row['estimate'].n:,})") for row in rows]
    line = plot["line"] if plot["line"] and _finite(plot["line"][1]) else None

    def draw(axes):
        for y, row in enumerate(rows):
            dot(axes, _drawable(row["estimate"]), y, COLOURS[0], "o", size=5)
        name_rows(axes, names)
        if line:
            axes.axvline(100 * line[1], color=INK, linewidth=0.9, linestyle="--", label=clip(line[0], LEGEND))
            _legend(axes)
        axes.margins(x=0.06)
        xlabel = clip(plot["xlabel"], 70)
        axes.set_xlabel(xlabel if "%" in xlabel else f"{xlabel}, %", loc="right")

    said = "; ".join(f"{row['name']} {_estimate(row['estimate'], True)}, n {row['estimate'].n}" for row in rows)
    if line:
        said += f". Dashed line: {line[0]} {_baseline(line[1], '%')}"
    return figure(
        caption,
        f"{caption}. {said}.",
        draw,
        0.95 + (0.34 if any("\n" in text for text in names) else 0.24) * len(rows),
        name,
    )


def _folded(text: str) -> str:
    """In two lines where one is too long for the margin."""
    return text if len(text) <= 30 else "\n".join(textwrap.wrap(text, 30, max_lines=2, placeholder="…"))


def _drawable(e: Estimate) -> Estimate:
    whole = _finite(e.low) and _finite(e.high)
    return e if whole else replace(e, low=None, high=None)


def _lines(plot: dict, name: str) -> dict | None:
    series = [cleaned for curve in plot["series"] if (cleaned := _clean(curve))["x"]]
    marks = [mark for mark in plot["marks"] if _finite(mark[1])]
    caption = plot["caption"]
    if not series:
        return None
    columns = 1 if any(len(name) > LEGEND / 2 for name in [c["name"] for c in series] + [m[0] for m in marks]) else 2

    def draw(axes):
        for i, curve in enumerate(series):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            few = len(curve["x"]) <= 30
            style = {"linestyle": "-", "marker": marker if few else None} if curve["points"] else {"linestyle": "--"}
            if curve["low"]:
                axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
            axes.plot(curve["x"], curve["y"], color=colour, linewidth=1.5, markersize=4.5,
                      label=clip(curve["name"], LEGEND), **style)  # fmt: skip
        for i, (mark, x) in enumerate(marks):
            axes.axvline(x, color=INK, linewidth=1, linestyle=(0, ((1, 2), (5, 2, 1, 2), (7, 3))[i % 3]),
                         label=clip(mark, LEGEND))  # fmt: skip
        axes.set_xlabel(clip(plot["xlabel"], 60))
        axes.set_ylabel(clip(plot["ylabel"], 36))
        if len(series) + len(marks) > 1:
            _legend(axes, columns)

    said = [_said(curve) for curve in series] + [f"{mark} at {_short(x)}" for mark, x in marks]
    alt = f"{caption}. {plot['ylabel']} over {plot['xlabel']}. {'. '.join(said)}."
    return figure(caption, alt, draw, 2.9 + 0.17 * math.ceil((len(series) + len(marks)) / columns), name)


def _clean(curve: dict) -> dict:
    """The points whose numbers are finite; no band where one of its ends is not."""
    x, y = curve["x"], curve["y"]
    keep = [i for i in range(len(x)) if _finite(x[i]) and _finite(y[i])]
    band = {"low": None, "high": None}
    if curve["low"] and curve["high"] and all(_finite(curve[end][i]) for i in keep for end in band):
        band = {end: [curve[end][i] for i in keep] for end in band}
    return curve | band | {"x": [x[i] for i in keep], "y": [y[i] for i in keep]}


def _said(curve: dict) -> str:
    """A curve in numbers, at evenly spread points where it has many."""
    number = len(curve["x"])
    step = max(1, (number - 1) / (SAID_POINTS - 1))
    picked = sorted({min(number - 1, round(i * step)) for i in range(min(number, SAID_POINTS))})
    points = ", ".join(f"{_short(curve['x'][i])}: {_short(curve['y'][i])}{_band(curve, i)}" for i in picked)
    return f"{curve['name']}: {points}"


def _band(curve: dict, i: int) -> str:
    return f" [{_short(curve['low'][i])}, {_short(curve['high'][i])}]" if curve["low"] else ""


def _short(x: float) -> str:
    return format_number(x, _digits(x)).replace("-", "−")


def _legend(axes, columns: int = 1) -> None:
    """Above the axes, from the left edge of the figure."""
    axes.figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=columns)
