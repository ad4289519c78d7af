"""Figures for pages and the pages themselves: one file without scripts or requests, legible on paper and in the dark.

Figures are inline SVG whose ink is `currentColor`, so that they follow the light or dark scheme of the reader; every
series differs in its marker as well as in its colour.
"""

import functools
import re
from pathlib import Path

from rlhf_recipes import ranks
from rlhf_recipes.stats import Estimate, format_number
from rlhf_recipes.text import line, shown

INK = "#010203"  # replaced by currentColor in the SVG
PARENT_COLOUR = "#7d858c"
COLOURS = ("#2b7bba", "#c9731a", "#2e9b73", "#a2589f", "#b03a48", "#8a7a1f")  # legible on white and on near-black
MARKERS = "Ds^vPX"
TITLE = 100  # characters of a picture's


def write(template: Path, path: str | Path, **values) -> None:
    """Render a Jinja template, which may include `style.css`, to an HTML file. Of several processes the first
    writes."""
    if ranks.is_first():
        Path(path).write_text(rendered(template, **values), encoding="utf-8", newline="\n")


def rendered(template: Path, **values) -> str:
    """A template as HTML: every value is escaped, and control characters in it are shown as what they are."""
    return _environment(template.parent).get_template(template.name).render(**values)


@functools.cache
def _environment(folder: Path):
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    return environment


def dot(axes, e: Estimate, y: float, colour: str, marker: str, size: float = 7) -> None:
    """A share and its interval, in %, on row `y`."""
    if e.low is not None:
        axes.plot([100 * e.low, 100 * e.high], [y, y], color=colour, linewidth=1.6)
    axes.plot(100 * e.value, y, marker, color=colour, markersize=size, markeredgewidth=1.6)


def legend(axes) -> None:
    """Above the axes, on the right."""
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def name_rows(axes, names: list[str]) -> None:
    """A name for each row, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def clip(name: object, width: int = 20) -> str:
    """A name for a plot: one line that is short enough for the margin, and not with the underscore that hides a label
    from its legend."""
    plain = " ".join(line(name).split()) or "–"
    plain = f"\u2060{plain}" if plain.startswith("_") else plain
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def figure(caption: str, alt: str, draw, height: float, name: str | None = None) -> dict:
    """An SVG of 4.6 inches width, which a phone shows at about its natural size.

    Args:
        draw: takes the axes.
        name: keeps the ids inside apart from those of other figures on the page; the caption, unless two share it.
    """
    import io
    import warnings

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": line(name or caption), "text.parse_math": False,
        "font.size": 9, "text.color": INK,
        "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.7,
    }  # fmt: skip
    text = io.StringIO()
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text, not matplotlib's
        figure = Figure(figsize=(4.6, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=INK)
        axes.set_axisbelow(True)
        draw(axes)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return {"caption": caption, "alt": alt, "svg": _inline(text.getvalue())}


def _inline(svg: str):
    """The <svg> element for use inside HTML: ink follows the page, no prolog or metadata, no id that could clash."""
    from markupsafe import Markup

    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    # matplotlib escapes the names that it draws, so this text is safe to mark as such
    return Markup(svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1))
