"""A row's prompt and answers as its columns give them, and what such a text may be writing down."""

import json
import re
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.data.row import LITERAL_LIMIT, as_literal

FEW = 3  # words of an answer that may be a label

Messages = list[dict[str, Any]]
Text = str | Messages | None

# A message list as json, str(list), str(array) or repr(array) writes it; a message alone.
STRUCTURE = re.compile(r"\s*+(?:array\()?\[?\s{0,9}\{\s{0,9}['\"](?:role|from|content|value)['\"]\s{0,9}:")
NAMED = re.compile(r"['\"](?:role|from)['\"]\s{0,9}:")
# Strings of Python's notation (an open one to the end: linear), and what numpy writes otherwise.
NUMPY = re.compile(
    r"""('(?:[^'\\]++|\\.)*+(?:'|\\?\Z)|"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))|(\}\s*(?=\{))|(array\()|(,\s*dtype=object\))""",
    re.DOTALL,
)
NAMES, PARTS = ("role", "from"), ("content", "value")
SHOWN = re.compile(r"b['\"]|\['")


@dataclass(frozen=True)
class Raw:
    """One row after its columns are mapped.

    Attributes:
        prompt: text, messages, or None where the answers are whole conversations.
        answers: text or messages each.
    """

    prompt: Text
    answers: tuple[Text, ...]


def texts_of(raw: Raw) -> list[str]:
    return [prompt_text(raw.prompt), *map(answer_text, raw.answers)]


def prompt_text(prompt: Text) -> str:
    """A prompt's text, that of its only message too; '' for what is in turns already."""
    if isinstance(prompt, str):
        return prompt
    return answer_text(prompt) if prompt and len(prompt) == 1 else ""


def answer_text(answer: Text) -> str:
    """An answer's text: of a conversation, its last message's."""
    if isinstance(answer, str):
        return answer
    last = answer[-1] if answer else None
    if not isinstance(last, dict):
        return ""
    content = last["content"] if "content" in last else last.get("value")
    return content if isinstance(content, str) else ""


def with_text(answer: Text, text: str) -> Text:
    if isinstance(answer, str):
        return text
    key = "content" if "content" in answer[-1] else "value"
    return [*answer[:-1], {**answer[-1], key: text}]


def messages_in(text: str) -> Messages | None:
    """The messages that a text writes down as JSON or as Python or numpy show them; None for other text."""
    if not STRUCTURE.match(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _literal(text)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        return None
    good = all(
        isinstance(turn, dict) and any(name in turn for name in NAMES) and any(part in turn for part in PARTS)
        for turn in found
    )
    return found if good else None


def like_messages(text: str) -> bool:
    """Whether a text is messages written down, be it that they do not parse; not what else JSON is written for."""
    if not STRUCTURE.match(text) or not NAMED.search(text):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return messages_in(text) is not None


def _literal(text: str) -> Any:
    if len(text) > LITERAL_LIMIT:
        return None
    return as_literal(NUMPY.sub(lambda each: each[1] or (each[2] and "},") or (each[3] and "(") or ")", text))


def list_in(text: Text) -> list[str] | None:
    """The texts that a text lists as JSON; None for other text."""
    if not isinstance(text, str) or not re.match(r"\s*+\[\s{0,9}\"", text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and found and all(isinstance(each, str) for each in found) else None


def unquoted(text: str) -> str:
    """What bytes, a list of one text, or a text in quotes say as Python or JSON write them; other text as it is."""
    if not (SHOWN.match(text) or text[:1] == '"') or len(text) > LITERAL_LIMIT:
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = as_literal(text)
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if isinstance(found, bytes):
        found = found.decode(errors="replace")
    return found if isinstance(found, str) else text


def says_much(text: str) -> bool:
    """Whether a text has more words than what many texts may hold by chance."""
    text = text.strip()
    return len(text.split(None, FEW - 1)) >= FEW or (not text.isascii() and len(text) >= 8)


def rest_after(prompt: str, answer: str) -> str | None:
    """What follows the prompt in an answer that begins with it, at the end of a word; None for other answers.

    A prompt of one or two words says nothing: an answer may begin with what it is about.
    """
    bare = prompt.strip()
    if not bare or not answer.lstrip().startswith(bare) or not says_much(bare):
        return None
    rest = answer.lstrip()[len(bare) :]
    if rest[:1].isalnum() and bare[-1].isalnum():
        return None
    rest = rest.removeprefix(prompt[len(prompt.rstrip()) :])
    first = rest.lstrip("\r\n")
    return rest[1:] if first == rest and rest[:1] == " " and rest[1:2].strip() else first
