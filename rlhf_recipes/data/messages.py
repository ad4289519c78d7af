"""Messages under one spelling, role and content, whatever the file's: from and value (ShareGPT), other names of the
roles, content in parts (OpenAI), a single message, a column of each key.

A message key that would change what is learned and has no place in `role, content` costs its row (`Drop`); any other
is counted as unread.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.errors import Refusal

Messages = list[dict[str, str]]

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "customer"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard", "agent"),
}
ROLE = {name: role for role, names in ROLES.items() for name in names}
TOOL_ROLES = ("tool", "function", "tool_call", "function_call", "tool_response", "function_response", "observation",
              "ipython")  # fmt: skip
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
TOOL_KEYS = ("tool_calls", "function_call", "tools", "functions")
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos", "files")
WEIGHT_KEYS = ("weight", "train", "training", "loss")


@dataclass(unsafe_hash=True)
class Drop(Exception):
    """Why a row, or one candidate of it, is left out.

    Attributes:
        reason: the name that it is counted under.
        detail: what the reason does not say (which turn, which role); may be blank.
    """

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def is_messages(value: Any) -> bool:
    """Whether a value has the form of messages: a list of them, one alone, or a column of each of their keys."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(turn, dict) and _keys(turn) for turn in value)
    return isinstance(value, dict) and _keys(value) is not None


def as_messages(at: str, value: list | dict, unread: Counter, ignore: Collection[str] = ()) -> Messages:
    """The messages of a value, in order.

    Args:
        at: file, row and column, for a refusal.
        unread: is added to: how often a key of a message was not read.
        ignore: keys that the user leaves unread (`data.ignore`).

    Raises:
        Refusal: no message, an unknown role, content that is no text.
        Drop: `tools`, `media` or `unweighted`, with the turn.
    """
    value = listed(at, value)
    last = len(value) - 1
    return [_message(f"{at}[{i}]", i, i == last, turn, unread, ignore) for i, turn in enumerate(value)]


def listed(at: str, value: Any) -> Any:
    """Messages that are one alone, or a column of each of their keys, as a list of them; anything else as it is.

    Raises:
        Refusal: columns of different lengths.
    """
    keys = _keys(value) if isinstance(value, dict) else None
    if not keys:
        return value
    if not all(isinstance(value[key], list) for key in keys):
        return [value]
    columns = {key: each for key, each in value.items() if isinstance(each, list)}
    if len({len(each) for each in columns.values()}) > 1:
        sizes = " and ".join(f"{len(each)} of {key}" for key, each in columns.items())
        raise Refusal(f"{at}: {sizes} for one conversation. Mend or remove the row.")
    return [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]


def _keys(turn: dict) -> tuple[str, str] | None:
    """The names under which a message has its role and its text."""
    role = next((key for key in ROLE_KEYS if key in turn), None)
    text = next((key for key in TEXT_KEYS if key in turn), None)
    return (role, text) if role and text else None


def _message(at: str, index: int, is_last: bool, turn: Any, unread: Counter, ignore: Collection[str]) -> dict:
    keys = _keys(turn) if isinstance(turn, dict) else None
    if isinstance(turn, dict) and "role" in turn and not keys:
        keys = ("role", "content") if any(turn.get(key) for key in TOOL_KEYS) else None  # a call has no text
    if not keys:
        found = f" (found: {', '.join(map(str, turn))})" if isinstance(turn, dict) else ""
        raise Refusal(f"{at}: must be a message with role and content{found}. Convert the column.")
    for key in turn:
        if key not in keys and key not in ignore:
            _account(key, turn[key], index, is_last, unread)
    named = turn[keys[0]]
    role = named.strip().lower() if isinstance(named, str) else ""
    if role in TOOL_ROLES:
        raise Drop("tools", f"turn {index + 1} is of the role {role}")
    if role not in ROLE:
        raise Refusal(f"{at}.{keys[0]}: {named!r:.40} is not one of {', '.join(ROLES)}. Rename or remove it.")
    return {"role": ROLE[role], "content": _text(f"{at}.{keys[1]}", turn.get(keys[1]), index, ignore)}


def _account(key: str, value: Any, index: int, is_last: bool, unread: Counter) -> None:
    if value in (None, "", [], {}):
        return
    if key in TOOL_KEYS:
        raise Drop("tools", f"turn {index + 1} has {key}")
    if key in MEDIA_KEYS:
        raise Drop("media", f"turn {index + 1} has {key}")
    if key in WEIGHT_KEYS:  # those of earlier turns are prompt, which nothing learns
        if is_last and not value:
            raise Drop("unweighted", f"{key} of turn {index + 1} is {value!r:.10}")
        return
    unread[key] += 1


def _text(at: str, content: Any, index: int, ignore: Collection[str]) -> str:
    """Text, or its parts one after the other, without those of a type that is left unread."""
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise Refusal(f"{at}: must be text. Mend or remove the row.")
        return content or ""
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind in ignore:
            continue
        elif isinstance(kind, str) and kind != "text":
            raise Drop("tools" if "tool" in kind else "media", f"turn {index + 1} holds a part of the type {kind:.30}")
        else:
            raise Refusal(
                f'{at}: must be text, or parts like {{"type": "text", "text": ...}}. Mend or remove the row.'
            )
    return "".join(texts)
