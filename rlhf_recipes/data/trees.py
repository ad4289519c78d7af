"""Trees of messages (OpenAssistant's), joined into prompts with ranked replies.

A row is a message: `message_id`, `parent_id` (null at the root), `role`, `text`, and `rank` among the replies to one
prompt (0 is best); or a whole tree, whose `prompt` holds its `replies`, and these theirs. Each prompt becomes a row of
the format rankings: `prompt` (the turns from the root on), `responses`, `ranks`, and what its own row holds besides.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_recipes.data.messages import ROLE, Drop
from rlhf_recipes.data.row import as_good

KEYS = ("message_id", "parent_id", "role", "text", "rank", "replies")

Located = tuple[str, dict[str, Any]]


def are_trees(row: Mapping[str, Any]) -> bool:
    return {"message_id", "parent_id", "role", "text"} <= row.keys() or _is_nested(row)


def _is_nested(row: Mapping[str, Any]) -> bool:
    prompt = row.get("prompt")
    return isinstance(prompt, dict) and {"role", "text", "replies"} <= prompt.keys()


def join(rows: Iterator[Located]) -> tuple[list[Located], list[tuple[Drop, str]]]:
    """The prompts of all trees with their replies, in the order of the file, and the messages that belong to none.

    A message that was deleted, or whose parent is not in the file, takes all that follows it along.

    Returns:
        Rows of the format rankings, the first rank as 1, an only reply as the best; (why, where) of each message left
        out.
    """
    messages = [each for where, row in rows for each in _messages(where, row)]
    known = {message["message_id"]: message for _, message in messages}
    replies: dict[Any, list[dict]] = {}
    lost, prompts = [], []
    for where, message in messages:
        path = _path(message, known)
        if isinstance(path, Drop):
            lost.append((path, where))
        elif ROLE.get(message["role"]) == "assistant" and message["parent_id"] is not None:
            replies.setdefault(message["parent_id"], []).append(message)
        else:
            prompts.append((where, message, path))
    return [(where, _joined(message, path, replies)) for where, message, path in prompts], lost


def _messages(where: str, row: dict[str, Any]) -> Iterator[Located]:
    """The messages of a row: itself, or all of a nested tree."""
    if not _is_nested(row):
        yield where, {"rank": None, **row, "parent_id": row["parent_id"] or None}
        return
    waiting = [(None, row["prompt"])]
    while waiting:
        parent, message = waiting.pop()
        own = message.get("message_id") or id(message)
        yield where, {"rank": None, **message, "message_id": own, "parent_id": parent}
        waiting += [(own, reply) for reply in reversed(message.get("replies") or [])]


def _path(message: dict[str, Any], known: Mapping[Any, dict]) -> list[dict] | Drop:
    """The messages from the root to this one."""
    path = [message]
    while path[-1]["parent_id"] is not None:
        parent = known.get(path[-1]["parent_id"])
        if parent is None or len(path) > len(known):
            return Drop("orphan", f"its parent {path[-1]['parent_id']!s:.40} is not in the file")
        path.append(parent)
    if any(as_good(each.get("deleted")) for each in path):
        return Drop("deleted", "" if as_good(message.get("deleted")) else "one before it")
    return path[::-1]


def _joined(message: dict[str, Any], path: list[dict], replies: Mapping[Any, list[dict]]) -> dict[str, Any]:
    answers = replies.get(message["message_id"], [])
    ranks = [each["rank"] for each in answers]
    if len(answers) == 1:
        ranks = [0]
    return {
        **{key: value for key, value in message.items() if key not in KEYS},
        "prompt": [{"role": each["role"], "content": each["text"]} for each in path],
        "responses": [each["text"] for each in answers],
        "ranks": [rank + 1 if isinstance(rank, int | float) else rank for rank in ranks],
    }
