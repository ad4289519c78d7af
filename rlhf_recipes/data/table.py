"""A source of rows: which are looked at first, how all are read by them, and what later rows show beside."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rlhf_recipes.data import formats, recognise, texts, trees
from rlhf_recipes.data.account import accounted, unread_part, used
from rlhf_recipes.data.columns import COLUMNS, Later, Source
from rlhf_recipes.data.messages import Drop, Messages
from rlhf_recipes.data.row import Row
from rlhf_recipes.data.tally import Tally
from rlhf_recipes.errors import Refusal

Placed = tuple[str, dict[str, Any]]  # where a row stands, and the row


def prompts(rows: Sequence[Placed]) -> Iterator[Messages | Drop]:
    """What each row asks, where its answers are read elsewhere: its `prompt` with the parts that other columns hold;
    [] for none; or why it cannot be read.

    A text is read as most of the texts are; messages are taken as they are.

    Raises:
        Refusal: a prompt of a wrong type, or a part of it that is not joined to it.
    """
    if not rows:
        return
    own = ["question"]  # what is asked of the answers, no part of their prompt
    source = Source(rows, dict(zip(COLUMNS, COLUMNS, strict=True)), own)
    layout = recognise.of_prompts(source, "prompt")
    if part := unread_part(source, layout):
        raise Refusal(
            f"{source.name}: column {part!r} holds a part of the prompt and is not read. Put it into prompt, or "
            "remove the column."
        )
    layout = accounted(source, layout, ())
    texts = [(where, row) for where, row in rows if isinstance(row.get("prompt"), str)]
    reading = _reading(texts[: recognise.SAMPLE], {"text": "auto"}, layout, ())
    for where, values in rows:
        row = Row(where, values, layout.columns)
        try:
            is_text = isinstance(values.get("prompt"), str)
            yield formats.asked(row, layout, reading if is_text else None) if row.has("prompt") else []
        except Drop as drop:
            yield drop


class Table:
    """Rows of a source and how they are read.

    Args:
        rows: all of them.
        data: the checked data node.
        sides: the answers that an example has.
        labelled: whether answers labelled good or bad are wanted.
        tally: takes what joining messages of trees leaves out.
        shown: later rows (`Later.rows`), which say beside the first ones how all are read.
        like: the layout of the train rows, for test rows.

    Attributes:
        rows: all of them, each of which is looked at once it is read.
        layout: what is read as what.
        reading: how texts are read; None: letter by letter.
        later: what the rows after the first show.

    Raises:
        Refusal: the format, or a column that is not there or cannot be left unread.
    """

    def __init__(
        self,
        rows: Iterator[Placed],
        data: dict[str, Any],
        sides: tuple[str, ...],
        labelled: bool,
        tally: Tally,
        shown: list[Placed],
        like: recognise.Layout | None = None,
    ):
        rows, form = _joined(rows, data, tally)
        head, rows = _looked_at(rows)
        self._head, self._data, self._sides = [*head, *shown], data, sides

        def layout(source: Source) -> recognise.Layout:
            if like is not None:
                return recognise.same(source, like, data, sides, labelled)
            return recognise.recognise(source, {**data, "format": form}, sides, labelled)

        self._layout = layout
        source = Source(self._head, data["columns"], data["ignore"])
        self.layout = accounted(source, layout(source), sides)
        self.reading = _reading(head, data, self.layout, sides)
        # Words say what they mean; what numbers mean, a value that comes late may change.
        numbers = () if self.layout.scale == "names" else ("preference", "label")
        read = used(self.layout) - {self.layout.columns[key] for key in numbers}
        self.later = Later(source, read, data["ignore"])
        self.rows = self._watched(rows)

    def is_settled(self) -> bool:
        """Whether all rows, which have been read, are rightly read; `layout` then has what of them is not read.

        Raises:
            Refusal: a column of later rows that cannot be left unread.
        """
        if self.later.rows:
            source = Source([*self._head, *self.later.rows], self._data["columns"], self._data["ignore"])
            layout = accounted(source, self._layout(source), self._sides)
            if replace(layout, unread=()) != replace(self.layout, unread=()):
                return False
            self.layout = replace(layout, unread=(*layout.unread, *self.later.beyond))
        return True

    def _watched(self, rows: Iterator[Placed]) -> Iterator[Placed]:
        for where, row in rows:
            self.later.look(where, row)
            yield where, row


def _looked_at(rows: Iterator[Placed]) -> tuple[list[Placed], Iterator[Placed]]:
    """The first rows, and all of them."""
    head = list(itertools.islice(rows, recognise.SAMPLE))
    return head, itertools.chain(head, rows)


def _joined(rows: Iterator, data: dict[str, Any], tally: Tally) -> tuple[Iterator, str]:
    """Trees of messages as prompts with ranked replies, other rows as they are; and the format they now have."""
    head, rows = _looked_at(rows)
    if data["format"] not in ("auto", "trees"):
        return rows, data["format"]
    if not head or not all(trees.are_trees(row) for _, row in head):
        if data["format"] == "trees":
            found = ", ".join(head[0][1]) if head else "none"
            raise Refusal(
                f"data.format=trees: rows need message_id, parent_id, role and text (found: {found:.200}). "
                "Set data.format=auto."
            )
        return rows, data["format"]
    prompts, lost = trees.join(rows)
    for drop, where in lost:
        tally.rows, tally.candidates = tally.rows + 1, tally.candidates + 1
        tally.drop(drop, where)
    replies = sum(len(row["responses"]) for _, row in prompts)
    tally.joined.update(messages=len(prompts) + replies + len(lost), prompts=len(prompts))
    return iter(prompts), "rankings"


def _reading(
    head: list, data: dict[str, Any], layout: recognise.Layout, sides: tuple[str, ...]
) -> texts.Reading | None:
    """How the texts of a source are read, by its first rows."""
    if data["text"] == "plain":
        return None
    found = []
    for where, values in head:
        with suppress(Refusal):  # said when the row is read
            raw = formats.raw(Row(where, values, layout.columns), layout, sides)
            if raw and all(isinstance(each, str | list | None) for each in (raw.prompt, *raw.answers)):
                found.append(raw)
    return texts.look(found)
