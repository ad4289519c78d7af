"""What only a tokenizer can tell about text: control tokens typed into it, and how long it is."""

import re
from typing import Any

from rlhf_recipes.data.template import render

TEMPLATE_MARKER = re.compile(r"<\|[\w-]+\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
SIDES = ("chosen", "rejected", "completion")
PASSES = 5
BATCH = 500
PROGRESS_ROWS = 2_000

Example = dict[str, Any]
Span = tuple[int, int]


def neutralise(rows: list[Example], tokenizer) -> tuple[list[Example], dict[str, int]]:
    """Rows whose messages hold no control token: a typed one gets a space after its first character.

    A control token is a special token of the tokenizer or a turn marker in its chat template. `<|im_end|>`
    becomes `< |im_end|>`, which reads alike and tokenises as text.

    Returns:
        The rows (untouched ones are the same objects), and how many `rows` and `occurrences` were rewritten.

    Raises:
        ValueError: a text that keeps a control token whatever is done.
    """
    control = _Control(tokenizer)
    counts = {"rows": 0, "occurrences": 0}
    plain_rows = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        control.watch([turn["content"] for row in batch for turns in _turns(row).values() for turn in turns])
        for row in batch:
            plain, found = _plain_row(row, control)
            plain_rows.append(plain)
            counts["rows"] += found > 0
            counts["occurrences"] += found
    return plain_rows, counts


def _turns(row: Example) -> dict[str, list[dict[str, str]]]:
    return {key: row[key] for key in ("prompt", *SIDES) if key in row}


def _plain_row(row: Example, control: "_Control") -> tuple[Example, int]:
    changed, total = {}, 0
    for key, turns in _turns(row).items():
        if any(control.suspects(turn["content"]) for turn in turns):
            texts = [control.plain(turn["content"]) for turn in turns]
            changed[key] = [{**turn, "content": text} for turn, (text, _) in zip(turns, texts, strict=True)]
            total += sum(found for _, found in texts)
    return ({**row, **changed}, total) if changed else (row, 0)


class _Control:
    """The control tokens of one tokenizer, and how to make typed ones plain text."""

    def __init__(self, tokenizer):
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = {*tokenizer.all_special_tokens, *(token.content for token in added)} - {""}
        spellings = special.union(TEMPLATE_MARKER.findall(str(tokenizer.chat_template or "")))
        longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # The unknown token also stands for characters that the vocabulary lacks: only its spelling counts.
        self.ids = set(tokenizer.convert_tokens_to_ids(sorted(special))) - {tokenizer.unk_token_id}
        # A special token marked `normalized` has other spellings (`[cls]`), which only encoding finds.
        self.has_other_spellings = any(token.normalized for token in added)
        self.tokenizer = tokenizer
        self.watched: set[str] = set()

    def watch(self, texts: list[str]) -> None:
        """Remember which of the texts hold a control token in another spelling."""
        if self.has_other_spellings:
            encoded = zip(texts, _encode(self.tokenizer, texts), strict=True)
            self.watched = {text for text, ids in encoded if not self.ids.isdisjoint(ids)}

    def suspects(self, text: str) -> bool:
        return self.pattern.search(text) is not None or text in self.watched

    def plain(self, text: str) -> tuple[str, int]:
        """The text with every control token broken up, and how many there were."""
        total = 0
        for _ in range(PASSES):
            spans = self._spans(text)
            if not spans:
                return text, total
            total += len(spans)
            for start, end in reversed(spans):
                inside = start + 1 if end - start > 1 else start  # one character has no inside: the space replaces it
                text = f"{text[:inside]} {text[start + 1 :]}"
        raise ValueError(f"data: the text {text[:40]!r} keeps a control token of the tokenizer. Remove its row.")

    def _spans(self, text: str) -> list[Span]:
        spans = [match.span() for match in self.pattern.finditer(text)]
        if spans or not text:
            return spans
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [tuple(span) for token, span in tokens if token in self.ids]


def lengths(rows: list[Example], tokenizer, name: str) -> list[int | None]:
    """Tokens of prompt plus longest answer (where there is one), template included; None where the template refuses
    the roles."""
    from tqdm import tqdm

    found = []
    hidden = len(rows) <= PROGRESS_ROWS
    with tqdm(total=len(rows), desc=f"data: tokens of {name}", unit=" rows", disable=hidden) as bar:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            found += _batch_lengths(batch, tokenizer)
            bar.update(len(batch))
    return found


def _batch_lengths(rows: list[Example], tokenizer) -> list[int | None]:
    from jinja2 import TemplateError

    sides = [side for side in SIDES if side in rows[0]]
    conversations = [row["prompt"] + row.get(side, []) for row in rows for side in sides or ["prompt alone"]]
    try:
        texts = [render(tokenizer, each, tokenize=False) for each in conversations]
    except TemplateError:
        if len(rows) == 1:
            return [None]
        return [length for row in rows for length in _batch_lengths([row], tokenizer)]
    counts = [len(ids) for ids in _encode(tokenizer, texts)]
    each = len(sides) or 1
    return [max(counts[start : start + each]) for start in range(0, len(counts), each)]


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def percentiles(values: list[int]) -> dict[str, int]:
    """Nearest-rank p50 and p95, and the maximum; zeros for no values."""
    ordered = sorted(values) or [0]
    rank = {"p50": -(-50 * len(ordered) // 100), "p95": -(-95 * len(ordered) // 100), "max": len(ordered)}
    return {name: ordered[position - 1] for name, position in rank.items()}
