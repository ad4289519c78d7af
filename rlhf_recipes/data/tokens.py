"""What only a tokenizer can tell about text: control tokens typed into it, and how long it is."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlhf_recipes import progress
from rlhf_recipes.data.template import render
from rlhf_recipes.errors import Refusal, first_line

if TYPE_CHECKING:
    import numpy as np

# What begins and ends a turn, of families too whose tokenizer nobody has loaded: ChatML and Llama 3, Gemma 3 and 4,
# DeepSeek, Llama 2 and Mistral, Seed, EXAONE, GLM, MiniMax.
TEMPLATE_MARKER = re.compile(
    r"<\|[^\s<>|]{1,60}\|?>|<[^\s<>|]{1,60}\|>|<(?:start|end)_of_turn>|<｜[^｜<>\n]{1,60}｜>|</?s>|<</?SYS>>|"
    r"\[/?(?:INST|SYSTEM_PROMPT)\]|<seed:(?:bos|eos|pad)>|\[\|[^\s|\[\]]{1,60}\|\]|\[[gs]MASK\]|"
    r"\]~b\]|\]~!b\[|\[e~\[|\]![a-z]~\[|\]<\]"
)
# Parts of an answer that templates read: thoughts, calls of tools and what these returned.
TAG = re.compile(r"</?(?:seed:)?(?:think|tools?|tool_\w+)>|\[/?(?:THINK|AVAILABLE_TOOLS|TOOL_\w+)\]")
# What looks like a chat token of any family: an angle token without blanks, a bracket token in capitals. What stands
# in code and prose stays: a < b, [1], [A], [NH2], the [FAQ](of a link).
SHAPE = re.compile(
    rf"(?i:{TEMPLATE_MARKER.pattern}|{TAG.pattern}|"
    r"\[/?(?:ARGS|BOS|CLS|EOS|IMG|MASK|PAD|SEP|UNK)\]|\[control_\d+\]|\[unused\w*\d\])|"
    r"<(?=[^<>\s]{0,59}[\w|])[^<>\s]{1,60}>|\[/[A-Z][A-Z\d_]+\]|\[[A-Z]+_[A-Z\d_]+\]|\[[A-Z]{3}[A-Z\d]*\](?!\()"
)
# With a template whose generation prompt opens the thought, an answer may hold its end alone.
THOUGHTS = re.compile(r"(?:^|<think>).*?</think>", re.DOTALL)
PROMPT_THOUGHTS = "thoughts in a prompt"
SIDES = ("chosen", "rejected", "completion")
PASSES = 5
BATCH = 500
PROGRESS_ROWS = 2_000

Example = dict[str, Any]
Span = tuple[int, int]


def neutralise(rows: list[Example], tokenizer) -> tuple[list[Example], dict[str, int]]:
    """Rows whose messages hold no control token: a typed one gets a space after its first character.

    A control token is a special token of the tokenizer or a turn marker in its chat template. `<|im_end|>`
    becomes `< |im_end|>`, which reads alike and tokenises as text. In the turns of a prompt, other added tokens that
    have the shape of one are broken up too, and so are the tags that the template knows (`</think>`, `<tool_call>`):
    in the answers these may be what is to be learned.

    Returns:
        The rows (untouched ones are the same objects), and how many `rows` and `occurrences` were rewritten.

    Raises:
        Refusal: a text that keeps a control token whatever is done.
    """
    plain = Plain(tokenizer)
    found = [row for start in range(0, len(rows), BATCH) for row in plain(rows[start : start + BATCH])]
    return found, plain.counts


class Plain:
    """Takes control tokens out of rows, some at a time, as `neutralise` does.

    Attributes:
        counts: how many `rows` and `occurrences` were rewritten.
    """

    def __init__(self, tokenizer):
        self._controls = {"prompt": _Control(tokenizer, tags=True), **dict.fromkeys(SIDES, _Control(tokenizer))}
        self.counts = {"rows": 0, "occurrences": 0}

    def __call__(self, rows: list[Example]) -> list[Example]:
        for keys in (("prompt",), SIDES):
            texts = [turn["content"] for row in rows for key in keys for turn in row.get(key, [])]
            self._controls[keys[0]].watch(texts)
        return [self._row(row) for row in rows]

    def _row(self, row: Example) -> Example:
        changed, total = {}, 0
        for key, control in self._controls.items():
            turns = row.get(key, [])
            if any(control.suspects(turn["content"]) for turn in turns):
                texts = [control.plain(turn["content"]) for turn in turns]
                changed[key] = [{**turn, "content": text} for turn, (text, _) in zip(turns, texts, strict=True)]
                total += sum(found for _, found in texts)
        self.counts["rows"] += total > 0
        self.counts["occurrences"] += total
        return {**row, **changed} if changed else row


class _Control:
    """The control tokens of one tokenizer, and how to make typed ones plain text.

    Args:
        tags: whether added tokens that are not special count, and the tags of the template.
    """

    def __init__(self, tokenizer, tags: bool = False):
        every = tokenizer.added_tokens_decoder.values()
        # By shape: blanks and words of a domain are added tokens as well.
        added = [token for token in every if token.special or (tags and SHAPE.search(token.content))]
        special = {*tokenizer.all_special_tokens, *(token.content for token in added)} - {""}
        template = str(tokenizer.chat_template or "")
        spellings = special.union(TEMPLATE_MARKER.findall(template), TAG.findall(template) if tags else ())
        longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # The unknown token also stands for characters that the vocabulary lacks: only its spelling counts.
        self.ids = set(tokenizer.convert_tokens_to_ids(sorted(special))) - {tokenizer.unk_token_id}
        # A token marked `normalized` has other spellings (`[cls]`), which only encoding finds.
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
        raise Refusal(f"data: the text {text[:40]!r} keeps a control token of the tokenizer. Remove its row.")

    def _spans(self, text: str) -> list[Span]:
        spans = [match.span() for match in self.pattern.finditer(text)]
        if spans or not text:
            return spans
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [tuple(span) for token, span in tokens if token in self.ids]


@dataclass
class Sizes:
    """Tokens of R rows with S answers each, as arrays (R, S) of integers; prompts alone count as S = 1.

    Attributes:
        whole: prompt and answer, template included; of prompts alone, with the generation prompt.
        trained: those of the answer, which starts where the prompt with its generation prompt and the whole
            conversation diverge, in the answer in which this comes first (as TRL has it); of prompts alone 0.
    """

    whole: "np.ndarray"
    trained: "np.ndarray"

    def __getitem__(self, rows) -> "Sizes":
        return Sizes(self.whole[rows], self.trained[rows])

    def cut(self, max_length: int | None, truncation_mode: str = "keep_start") -> "Sizes":
        """What is left of them where only the first (`keep_end`: the last) `max_length` tokens are kept."""
        if max_length is None:
            return self
        whole = self.whole.clip(max=max_length)
        if truncation_mode == "keep_end":
            return Sizes(whole, self.trained.clip(max=max_length))
        return Sizes(whole, (whole - (self.whole - self.trained)).clip(min=0))

    @property
    def longest(self) -> "np.ndarray":
        """Tokens of each row with its longest answer."""
        return self.whole.max(1)

    def over(self, max_length: int | None) -> int:
        """How many rows are longer."""
        return 0 if max_length is None else int((self.longest > max_length).sum())

    def totals(self) -> dict[str, int]:
        return {"rows": len(self.whole), "tokens": int(self.whole.sum()), "trained_tokens": int(self.trained.sum())}


@dataclass
class Measured:
    """What R rows are once the template has rendered them.

    Attributes:
        sizes: of all rows; 0 where the template refuses one.
        answers: whether the rows have any.
        refused: (R,) whether the template refuses the conversation.
        prompt_cut: (R,) whether the generation prompt is not how the template begins the answers: what follows where
            they part is left out.
        alike: (R,) whether the answers of a pair differ in tokens alone that are not kept.
        altered: which text of a row is not in what the template made of it -> of how many rows.
    """

    sizes: Sizes
    answers: bool
    refused: "np.ndarray"
    prompt_cut: "np.ndarray"
    alike: "np.ndarray"
    altered: Counter = field(default_factory=Counter)


def measure(batches: Iterable[list[Example]], count: int, tokenizer, name: str, kept: slice) -> Measured:
    """Render every row, and count.

    Args:
        batches: the rows, some at a time, all with the same answers.
        count: of all rows.
        name: of the split, for the progress line.
        kept: which of its tokens a trainer keeps.
    """
    import numpy as np

    if count > PROGRESS_ROWS:
        batches = progress.batches(f"data: tokens of {name}", count, batches)
    batches = iter(batches)
    first = next(batches, [])
    sides = [side for side in SIDES if first and side in first[0]]
    whole, trained = np.zeros((2, count, len(sides) or 1), dtype=np.int32)
    found = Measured(Sizes(whole, trained), bool(sides), *np.zeros((3, count), dtype=bool))
    done = 0
    for rows in chain([first], batches):
        rendered = [_rendered(row, sides, tokenizer) for row in rows]
        texts = [text for _, texts in rendered for text in texts]
        encoded = iter(_encode(tokenizer, texts) if texts else [])
        for number, (row, (said, texts)) in enumerate(zip(rows, rendered, strict=True), done):
            if said:
                found.refused[number] = True
                continue
            prompt, answered = next(encoded), [next(encoded) for _ in sides]
            start = min((common_prefix(prompt, ids) for ids in answered), default=len(prompt))
            whole[number] = [len(ids) for ids in answered or [prompt]]
            trained[number] = whole[number] - start
            found.prompt_cut[number] = start < len(prompt)
            found.alike[number] = len(answered) > 1 and all(ids[kept] == answered[0][kept] for ids in answered)
            if what := _altered(row, dict(zip(sides, texts[1:], strict=True)), texts[0]):
                found.altered[what] += 1
        done += len(rows)
    return found


def common_prefix(ids: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    if ids == others[: len(ids)]:
        return len(ids)
    return next((n for n, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), len(others))


def _rendered(row: Example, sides: list[str], tokenizer) -> tuple[str, list[str]]:
    """What the template says of a row that it refuses, else ""; and what it makes of it: the prompt with the
    generation prompt, and for each answer the whole conversation."""
    from jinja2 import TemplateError

    try:
        prompt = render(tokenizer, row["prompt"], add_generation_prompt=True, tokenize=False)
        wholes = [render(tokenizer, row["prompt"] + row[side], tokenize=False) for side in sides]
    except TemplateError as error:
        return first_line(error), []
    return "", [prompt, *wholes]


def refusal(row: Example, tokenizer) -> str:
    """What the template says of a row that it refuses, and of which turn: the first with which it says so."""
    sides = [side for side in SIDES if side in row]
    said, _ = _rendered(row, sides, tokenizer)
    for turns in [row["prompt"] + row[side] for side in sides] or [row["prompt"]]:
        for count in range(1, len(turns) + 1):
            if _rendered({"prompt": turns[:count]}, [], tokenizer)[0] == said:
                return f"turn {count}, {turns[count - 1]['role']}: {said}"
    return said


def _altered(row: Example, wholes: dict[str, str], prompt: str) -> str | None:
    """Which text of the row is not in what the template made of it, the answers first; None: all is.

    Args:
        wholes: the rendered conversation for each answer.
        prompt: the rendered prompt.
    """
    for side, text in [*wholes.items(), *(("prompt", text) for text in wholes.values() or [prompt])]:
        for turn in row[side]:
            said = turn["content"].strip()
            if said not in text:
                spoken = THOUGHTS.sub("", said).strip()
                what = "thoughts" if spoken != said and spoken in text else "text"
                return f"{what} in a prompt" if side == "prompt" else f"{what} in an answer"
    return None


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def percentiles(values: Sequence[int]) -> dict[str, int]:
    """Nearest-rank p50 and p95, and the maximum; zeros for no values."""
    import numpy as np

    ordered = np.sort(np.asarray(values, dtype=np.int64)) if len(values) else [0]
    rank = {"p50": -(-50 * len(ordered) // 100), "p95": -(-95 * len(ordered) // 100), "max": len(ordered)}
    return {name: int(ordered[position - 1]) for name, position in rank.items()}
