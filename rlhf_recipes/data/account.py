"""An account of every column of a source.

Each one is used, known (family, split, p, margin, the answers' own scores), or named as unread. One that would change
what a row means is never merely named: it decides, it is joined to the prompt, its rows are left out and counted, or
the source is refused with the override that settles it.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf_recipes.data import preference
from rlhf_recipes.data.columns import ALIASES, COLUMNS, Source, spelled
from rlhf_recipes.data.messages import MEDIA_KEYS, TOOL_KEYS
from rlhf_recipes.data.recognise import BAD, Layout
from rlhf_recipes.data.row import MISSING, as_good, as_list, at, is_blank
from rlhf_recipes.errors import Refusal

PARTS = ("system", "input", "history", *ALIASES["system"], *ALIASES["input"], *ALIASES["history"])
# Parts of the prompt where they are texts, as is what may be a prompt itself, where another column is read as that.
TEXTS = (
    *("prompt", *ALIASES["prompt"]),
    *("passage", "document", "documents", "docs", "article", "background", "persona", "scenario", "paragraph"),
    *("story", "premise", "knowledge", "evidence", "facts", "source_text", "query_context", "preamble", "sys"),
    *("developer", "guidelines", "instructions", "few_shot", "dialogue", "dialog", "conversation_history"),
    *("context_messages", "previous_messages"),
)
TOOLS = (*TOOL_KEYS, "tool", "available_tools", "available_functions")
MEDIA = (*MEDIA_KEYS, "picture", "pictures", "image_path", "image_paths", "photo", "img")

# What a column of demonstrations may say of each, in values such as true and false or good and bad; and `BAD`.
GOOD = re.compile(
    "(?:is_|was_)?(?:accepted|approved|correct|preferred|chosen|selected|helpful|safe|good|passed)|quality"
)
# Of a pair: that the two stand the other way round. A bare `flip` is cai's own: its judge fell for the place.
FLIPS = re.compile("(?:is_|was_)?(?:flipped|swap|swapped|reversed|inverted)")

NAMES = 20  # columns that one line names


def accounted(source: Source, layout: Layout, sides: tuple[str, ...]) -> Layout:
    """The layout with what is not read.

    Raises:
        Refusal: a column that changes what a row means and is not read.
    """
    if part := unread_part(source, layout):
        raise Refusal(
            f"{source.name}: column {part!r} holds a part of the prompt and is not read. Name it with "
            f"data.columns.input={part} (or system, or history), or leave it unread: data.ignore=[{part}]"
        )
    scores = _own_scores(source) if "rejected" in sides and layout.format == "pairs" else None
    unread, watched = [], {}
    for name, kind in _beside(source, layout):
        if name in (scores or ()):
            continue
        word = _word(source, name)
        if word in TOOLS or word in MEDIA:
            watched[name] = "tools" if word in TOOLS else "media"
            continue
        if kind == "empty":
            continue
        is_nulled = _is_nulled(source, name)
        if _may_label(source, layout, name, word, sides) and not is_nulled:
            what = "bad" if BAD.fullmatch(word) else "good"
            raise Refusal(
                f"{source.name}: column {name!r} may say whether an answer is {what} and is not read. Write true "
                f"or false (or 1 or 0; null to leave a row out) and set data.columns.label={name}, or leave it "
                f"unread: data.ignore=[{name}]"
            )
        if "rejected" in sides and not is_nulled and _may_decide(source, layout, name, word):
            x, y = layout.columns["chosen"], layout.columns["rejected"]
            scale = "" if preference.is_clear(source, name, (x, y)) else " data.preference=index (or another)"
            raise Refusal(
                f"{source.name}: column {name!r} may say which answer is the better one and is not read. Let it "
                f"decide: data.format=preference data.columns.first={x} data.columns.second={y} "
                f"data.columns.preference={name}{scale}; or leave it unread: data.ignore=[{name}]"
            )
        unread.append(name)
    return replace(layout, watched=watched, scores=scores, unread=tuple(unread))


def unread_part(source: Source, layout: Layout) -> str | None:
    """The first column that holds a part of the prompt and is not read; None where there is none."""
    held = (name for name, kind in _beside(source, layout) if kind != "empty" and not _is_nulled(source, name))
    return next((name for name in held if _is_part(source, layout, name)), None)


def _beside(source: Source, layout: Layout) -> Iterator[tuple[str, str]]:
    """What is not read, with its kind: columns, and keys inside of columns that are."""
    read = used(layout)
    for name, kind in {**source.kinds, **source.inner}.items():
        if name not in read and (name in source.top or name.rpartition(".")[0] in read):
            yield name, kind


def _word(source: Source, name: str) -> str:
    return spelled(name if name in source.top else name.rpartition(".")[2])


def _is_nulled(source: Source, name: str) -> bool:
    """Whether the user set the column to null: data.columns.system=null."""
    return name in COLUMNS and source.columns.get(name) is None


def used(layout: Layout) -> set[str]:
    """The columns that are read, and those that they lie in."""
    names = {name for name in (*layout.columns.values(), *(layout.models or ())) if name}
    return names | {name.partition(".")[0] for name in names}


def told(report: dict[str, Any]) -> list[str]:
    """The lines of a report (`Splits.report`) about its columns and texts."""
    lines = []
    if joined := report.get("joined"):
        lines.append(f"{joined['messages']} messages of trees are {joined['prompts']} prompts and their replies")
    if report.get("read_as"):
        lines.append(f"read as {report['read_as']}")
    if report.get("test_read_as"):
        lines.append(f"its test rows as {report['test_read_as']}")
    for name, count in report.get("held", {}).items():
        lines.append(f"{name} of {count} rows stands in their prompt: not joined to it again")
    if report.get("ignored_nothing"):
        lines.append(f"data.ignore: there is no {' and no '.join(report['ignored_nothing'])}")
    if unread := report.get("unread"):
        others = f" and {len(unread) - NAMES} others" if len(unread) > NAMES else ""
        lines.append(f"not read: {', '.join(unread[:NAMES])}{others}")
    soft = report.get("soft", {})
    if soft:
        said = " and ".join(f"{key} of {count} rows" for key, count in soft.items())
        lines.append(f"{said}: learned from by reward alone")
    if report.get("turned_round"):
        lines.append(f"{report['turned_round']} pairs turned round, whose p is below 0.5")
    if scores := report.get("own_scores"):
        lines.append(
            f"by the file's own scores ({', '.join(scores['columns'])}), {scores['ties']} of {scores['of']} pairs are "
            f"ties and {scores['against']} the other way round"
        )
    return [*lines, *report.get("texts", [])]


def _may_decide(source: Source, layout: Layout, name: str, word: str) -> bool:
    """Whether a column beside chosen and rejected may say which of the two is better, and it varies.

    By its name; by its values, where the answers' names say nothing (`response_0`, `response_1`).
    """
    if layout.format not in ("pairs", "hh_rlhf") or name not in source.top or not _varies(source, name):
        return False
    sides = layout.columns["chosen"], layout.columns["rejected"]
    unsaid = all(sides) and preference.markers(*sides) and preference.may_be_verdicts(source.values[name], sides)
    return bool(unsaid) or any(each.fullmatch(word) for each in (preference.DECIDES, preference.OF_ONE, FLIPS))


def _is_part(source: Source, layout: Layout, name: str) -> bool:
    """Whether a column, by its name and what it holds, is a part of the prompt that most prompts do not hold."""
    kind = source.kinds[name] if name in source.kinds else source.inner[name]
    word = _word(source, name)
    is_part = word in PARTS or (word in TEXTS and kind in ("text", "messages", "lists", "texts"))
    return is_part and not _is_held(source, layout, name)


def _is_held(source: Source, layout: Layout, name: str) -> bool:
    """Whether most prompts, or conversations where these hold them, say the text of a column already."""
    keys = ("prompt", "messages", "chosen", "first", "completion")
    whole = next((layout.columns[key] for key in keys if layout.columns.get(key)), None)
    pairs = [(at(row, name), at(row, whole)) for row in source.rows] if whole else []
    pairs = [(part, said) for part, said in pairs if part is not MISSING and not is_blank(part)]
    held = [isinstance(part, str) and part.strip() in "\n".join(_texts(said)) for part, said in pairs]
    return sum(held) * 2 > len(held)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a text, or in messages, be they written as JSON."""
    listed = as_list(value) if isinstance(value, str) and value.startswith("[") else None
    value = value if listed is None else listed
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(each)


def _may_label(source: Source, layout: Layout, name: str, word: str, sides: tuple[str, ...]) -> bool:
    """Whether a column beside demonstrations may say which are good: by its name, and it varies; by names that other
    columns have as well, where its values say good and bad."""
    is_demonstration = sides == ("completion",) and (layout.columns["completion"] or layout.format == "messages")
    if not is_demonstration or not _varies(source, name):
        return False
    if word in ("label", *ALIASES["label"]):
        return True
    says = GOOD.fullmatch(word) or BAD.fullmatch(word)
    return bool(says) and all(as_good(value) is not None for value in source.values[name] if value not in (None, ""))


def _varies(source: Source, name: str) -> bool:
    """Whether a column holds several short values."""
    if name not in source.top or source.kinds[name] not in preference.SHORT:
        return False
    values = {str(value) for value in source.values[name] if value not in (None, "")}
    return len(values) > 1 and preference.is_verdict(source.values[name])


def _own_scores(source: Source) -> tuple[str, str] | None:
    """The columns of numbers that score the chosen and the rejected answer of a pair."""
    for name in source.kinds:
        word = spelled(name)
        if source.kinds[name] == "number" and "chosen" in word and re.search("score|rating|reward", word):
            for other in source.kinds:
                if spelled(other) == word.replace("chosen", "rejected") and source.kinds[other] == "number":
                    return name, other
    return None
