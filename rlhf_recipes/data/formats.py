"""The shapes of rows (`data.format`), turned into prompt and answers in TRL's conversational format.

A row gives candidates: an example (`prompt`, and for each side a list of one message), or the name of the
reason why it gives none. What is wrong with a column or a type is a `Refusal` with row and key.
"""

import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf_recipes.errors import Refusal

PREFERENCES = ("pairs", "hh_rlhf", "ratings", "rankings")
FORMATS = (*PREFERENCES, "labelled", "messages")
REQUIRED = {
    "pairs": (),  # the sides, and a prompt unless these are whole conversations
    "hh_rlhf": (),
    "labelled": ("completion", "label"),  # likewise
    "messages": ("messages",),
    "ratings": ("prompt", "responses", "scores"),
    "rankings": ("prompt", "responses", "ranks"),
}
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "messages",
    "responses",
    "scores",
    "ranks",
    "family",
    "split",
    "p",
)
OPTIONAL_COLUMNS = ("prompt", "completion", "family", "split", "p")
ROLES = ("system", "user", "assistant")
SIDES = ("chosen", "rejected", "completion")
GOOD = ("true", "1", "yes", "up", "thumbs up", "👍", "good", "accepted", "desirable")
BAD = ("false", "0", "no", "down", "thumbs down", "👎", "bad", "rejected", "undesirable")
PROMPT_TURNS = re.compile("s?(ua)*u")  # roles by their first letter
TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")

Messages = list[dict[str, str]]
Candidate = dict[str, Any] | str


@dataclass
class Row:
    """One row under the user's column names, read under ours."""

    where: str
    values: dict[str, Any]
    columns: dict[str, str | None]

    def has(self, key: str) -> bool:
        return self.columns[key] in self.values

    def value(self, key: str) -> Any:
        if not self.has(key):
            raise Refusal(f"{self.where}: {self.columns[key]}: missing. Add it or remove the row.")
        return self.values[self.columns[key]]

    def wrong(self, key: str, rule: str, value: Any) -> Refusal:
        kinds = {type(None): "null", dict: "an object", list: "a list", str: "text", bool: "true or false"}
        kind = kinds.get(type(value), f"{value!r:.40}")
        return Refusal(f"{self.where}: {self.columns[key]}: {rule}, not {kind}. Mend or remove the row.")

    def text(self, key: str) -> str:
        value = self.value(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "must be text", value)
        return value or ""

    def label(self, key: str) -> str | None:
        """Text of an optional column; None where it is absent or blank."""
        value = self.values.get(self.columns[key])
        if value is not None and not isinstance(value, str):
            at = f"{self.where}: {self.columns[key]}"
            raise Refusal(f"{at}: must be text, not {value!r:.40}. Mend it, or set data.columns.{key}=null.")
        return value or None

    def probability(self, key: str) -> float | None:
        """A number from 0 to 1 of an optional column; None where it is absent, null or blank."""
        value = self.values.get(self.columns[key])
        if value in (None, ""):
            return None
        if isinstance(value, str) and re.fullmatch(r"[0-9.eE+-]+", value):  # CSV holds text alone
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self.wrong(key, "must be a probability from 0 to 1", value)
        return float(value)

    def good(self, key: str) -> bool | None:
        """Whether an answer is labelled good: true or 1, or a word for it; None where the label is null or blank."""
        value = self.value(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, bool | int | float) and value in (0, 1):
            return bool(value)
        word = " ".join(value.lower().replace("_", " ").split()) if isinstance(value, str) else ""
        if word not in (*GOOD, *BAD):
            raise self.wrong(key, "must be true or false (or 1 or 0, thumbs up or thumbs down)", value)
        return word in GOOD

    def items(self, key: str) -> list:
        """A list, or one written as JSON, which is how CSV holds it."""
        value = self.value(key)
        if isinstance(value, str) and value.startswith("["):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise self.wrong(key, "must be a list (as JSON)", value) from error
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list", value)
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        values = self.items(key)
        if len(values) != count:
            rule = f"{len(values)} entries for {count} {self.columns['responses']}"
            raise Refusal(f"{self.where}: {self.columns[key]}: {rule}. Mend or remove the row.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.wrong(key, "must hold finite numbers", value)
        return values

    def messages(self, key: str, role: str) -> Messages:
        """Text as one message of `role`, or a list of messages."""
        value = self.value(key)
        if not isinstance(value, list):
            if value is not None and not isinstance(value, str):
                raise self.wrong(key, "must be text or a list of messages", value)
            return [{"role": role, "content": value or ""}]
        return [self._message(f"{self.columns[key]}[{index}]", turn) for index, turn in enumerate(value)]

    def conversation(self, key: str) -> Messages:
        return [self._message(f"{self.columns[key]}[{index}]", turn) for index, turn in enumerate(self.items(key))]

    def _message(self, name: str, turn: Any) -> dict[str, str]:
        at = f"{self.where}: {name}"
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            found = f" (found: {', '.join(map(str, turn))})" if isinstance(turn, dict) else ""
            raise Refusal(f"{at}: must be a message with role and content{found}. Convert the column.")
        role, content = turn["role"], turn["content"]
        if role not in ROLES:
            raise Refusal(f"{at}.role: {role!r:.40} is not one of {', '.join(ROLES)}. Rename or remove it.")
        if content is not None and not isinstance(content, str):
            raise Refusal(f"{at}.content: must be text. Mend or remove the row.")
        return {"role": role, "content": content or ""}


def check_columns(row: Row, shape: str, sides: tuple[str, ...]) -> None:
    """Refuse a source whose first row lacks a column that its shape needs or that the user named.

    Raises:
        Refusal: `file: no column ...`, with the nearest name that it has.
    """
    if not sides:
        if shape not in ("hh_rlhf", "messages") and row.has("prompt"):
            return
        sides = ("completion",)
    needed = list(REQUIRED[shape])
    if shape in ("pairs", "hh_rlhf", "labelled"):
        needed += _side_columns(row, sides, shape) if shape != "labelled" else []
        whole = shape == "hh_rlhf" or (row.has(needed[0]) and isinstance(row.value(needed[0]), list))
        needed = needed if whole else ["prompt", *needed]
    needed += [key for key in OPTIONAL_COLUMNS if row.columns[key] not in (key, None)]
    for key in needed:
        if not row.has(key):
            raise Refusal(_no_column(row, key, [row.columns[other] for other in needed]))


def _no_column(row: Row, key: str, taken: list[str | None]) -> str:
    source = row.where.rpartition(":")[0]
    found = ", ".join(map(str, row.values)) or "none"
    message = f"{source}: no column '{row.columns[key] or key}' (found: {found:.200})."
    if key == "prompt" and str(row.values.get(row.columns["chosen"], "")).lstrip().startswith("Human:"):
        return f"{message} These are transcripts: set data.format=hh_rlhf."
    free = [str(name) for name in row.values if name not in taken]
    near = difflib.get_close_matches(row.columns[key] or key, free, n=1, cutoff=0.5)
    return f"{message} Name it with data.columns.{key}={near[0] if near else '<its name>'}"


def candidates(row: Row, shape: str, reduce: str, sides: tuple[str, ...]) -> Iterator[Candidate]:
    """What one row gives: an example per pair of answers, or the reason why there is none.

    Args:
        row: the row.
        shape: `data.format`.
        reduce: `data.reduce`, for ratings and rankings.
        sides: the answers an example has: (chosen, rejected), (completion,) or none; from labelled rows (completion,)
            takes the good ones, and anything else both kinds, with their `label`.
    """
    found = _from_shape(row, shape, reduce, sides)
    yield from ((_fault(each) or each) if isinstance(each, dict) else each for each in found)


def _from_shape(row: Row, shape: str, reduce: str, sides: tuple[str, ...]) -> list[Candidate]:
    if not sides and shape not in ("hh_rlhf", "messages") and row.has("prompt"):
        prompt = row.messages("prompt", "user")
        return [{"prompt": prompt} if prompt else "empty"]
    if not sides:
        answered = _from_shape(row, shape, reduce, ("completion",))
        return [{"prompt": each["prompt"]} if isinstance(each, dict) else each for each in answered]
    match shape:
        case "pairs":
            return [_from_sides(row, sides)]
        case "hh_rlhf":
            return [_from_transcripts(row, sides)]
        case "labelled":
            return [_from_label(row, sides)]
        case "messages":
            return [_from_conversation(row)]
        case "ratings":
            return _from_scores(row, "scores", reduce, sides)
        case "rankings":
            return _from_scores(row, "ranks", reduce, sides)


def _side_columns(row: Row, sides: tuple[str, ...], shape: str) -> list[str]:
    """A demonstration's completion is its own column, else the chosen answer of a pair."""
    use_chosen = shape == "hh_rlhf" or not row.has("completion")
    return ["chosen" if side == "completion" and use_chosen else side for side in sides]


def _from_sides(row: Row, sides: tuple[str, ...]) -> Candidate:
    """Sides are text, [assistant], or whole conversations, whose shared context then is the prompt."""
    prompt = row.messages("prompt", "user") if row.has("prompt") else []
    conversations = [row.messages(column, "assistant") for column in _side_columns(row, sides, "pairs")]
    if not all(conversations):
        return "empty"
    contexts = [turns[:-1] or prompt for turns in conversations]
    if not all(contexts):
        if not row.has("prompt"):
            row.value("prompt")
        return "empty"
    if any(_stripped(context) != _stripped(contexts[0]) for context in contexts):
        return "context_differs"
    if prompt and not _agrees(prompt, contexts[0]):
        return "context_differs"
    return {
        "prompt": contexts[0],
        **{side: turns[-1:] for side, turns in zip(sides, conversations, strict=True)},
    }


def _from_label(row: Row, sides: tuple[str, ...]) -> Candidate:
    label = row.good("label")
    if label is None:
        return "unlabelled"
    found = _from_sides(row, ("completion",))
    if sides != ("completion",):
        return found if isinstance(found, str) else {**found, "label": label}
    return found if label else "labelled_bad"  # no demonstration


def _agrees(prompt: Messages, context: Messages) -> bool:
    """Whether the prompt column is the context, or its first or last user turn (as in UltraFeedback)."""
    asked = [turn for turn in _stripped(context) if turn[0] == "user"]
    return _stripped(prompt) in (_stripped(context), asked[:1], asked[-1:])


def _stripped(messages: Messages) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in messages]


def _from_transcripts(row: Row, sides: tuple[str, ...]) -> Candidate:
    texts = [row.text(column) for column in _side_columns(row, sides, "hh_rlhf")]
    conversations = [parse_transcript(text) for text in texts]
    if any(len(turns) < 2 for turns in conversations):
        return "roles" if all(text.strip() for text in texts) else "empty"
    contexts = [turns[:-1] for turns in conversations]
    if any(context != contexts[0] for context in contexts):
        return "context_differs"
    return {
        "prompt": contexts[0],
        **{side: turns[-1:] for side, turns in zip(sides, conversations, strict=True)},
    }


def parse_transcript(text: str) -> Messages:
    r"""Turns of an HH-RLHF transcript, each stripped at its ends; [] for text that is no transcript.

    Only `\n\nHuman:` and `\n\nAssistant:` start a turn; colons, blank lines, these words elsewhere stay.
    """
    before, *parts = TRANSCRIPT_TURN.split(text)
    if before.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_conversation(row: Row) -> Candidate:
    turns = row.conversation("messages")
    if len(turns) < 2:
        return "roles" if turns else "empty"
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _from_scores(row: Row, key: str, reduce: str, sides: tuple[str, ...]) -> list[Candidate]:
    """Pairs of answers by score (high is best) or rank (1 is best): all k(k-1)/2, or best with worst."""
    prompt, answers = row.messages("prompt", "user"), row.items("responses")
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise row.wrong("responses", "must hold texts", answer)
    goodness = [-value if key == "ranks" else value for value in row.numbers(key, len(answers))]
    if len(answers) < len(sides):
        return ["empty"]
    order = sorted(range(len(answers)), key=lambda index: -goodness[index])  # stable: the first of equals leads
    turns = [[{"role": "assistant", "content": answer or ""}] for answer in answers]
    if len(sides) == 1:
        return [{"prompt": prompt, sides[0]: turns[order[0]]}]
    compared = combinations(order, 2) if reduce == "all" else [(order[0], order[-1])]
    return [
        "tie"
        if goodness[better] == goodness[worse]
        else {"prompt": prompt, "chosen": turns[better], "rejected": turns[worse]}
        for better, worse in compared
    ]


def _fault(example: dict[str, Any]) -> str | None:
    """Why an example cannot be trained on, or None."""
    answers = [example[side][0] for side in SIDES if side in example]
    said = [turn["content"] for turn in [*example["prompt"], *answers] if turn["role"] != "system"]
    if not all(text.strip() for text in said):
        return "empty"
    roles = "".join(turn["role"][0] for turn in example["prompt"])
    if not PROMPT_TURNS.fullmatch(roles) or any(turn["role"] != "assistant" for turn in answers):
        return "roles"
    if len({turn["content"].strip() for turn in answers}) < len(answers):
        return "identical"
    return None


def prompt_id(prompt: Messages) -> str:
    """16 hex digits that tell prompts apart, whatever their case, spacing and Unicode form."""
    turns = [f"{turn['role']}: {unicodedata.normalize('NFKC', turn['content']).casefold()}" for turn in prompt]
    text = "\n".join(" ".join(turn.split()) for turn in turns)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def opening_id(prompt: Messages) -> str:
    """`prompt_id` of the prompt up to its first user turn, shared by the stages of one conversation."""
    first = next(index for index, turn in enumerate(prompt) if turn["role"] == "user")
    return prompt_id(prompt[: first + 1])
