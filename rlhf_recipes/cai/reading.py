"""What is read out of a chat completion: the text, how likely each option is, whether it is a thought, the counts."""

import math
import re
from typing import Any

from rlhf_recipes.cai.backend import THOUGHT, token_count
from rlhf_recipes.endpoint import ANSWER_BYTES

VOTE = 0.99  # probability of the option that a text without log-probabilities names; the others share the rest
LOWEST = -9999.0  # what servers write for a log-probability of minus infinity
HIGHEST = 0.01  # a log-probability may be above 0 by rounding
TOKEN_BYTES = 512  # of each token asked for and each listed beside it: text, log-probability, its bytes as numbers
AROUND = " \t\r\n▁Ġ()[].,:*`'\"‘’“”"  # what may stand around an option within its token


class OfOthers(ValueError):
    """Log-probabilities do not belong to the tokens beside them."""


def logps(tokens: list[dict], options: tuple[str, ...], begun: bool = False) -> list[float] | None:
    """Log-probability in nats of each option at the first token that names one; None without such a token.

    Args:
        tokens: `choices[0].logprobs.content` of a response.
        begun: the options are what the answer goes on with: at its first token, whatever that is, if any is listed.
    """
    for token in tokens[:1] if begun else tokens:
        if (begun or token["token"].strip(AROUND) in options) and token["top_logprobs"]:
            likes = [
                (other["token"].strip(AROUND), log_probability(other["logprob"])) for other in token["top_logprobs"]
            ]
            lowest = min(logp for _, logp in likes)
            own = [[logp for name, logp in likes if name == option] for option in options]
            return [_log_sum(found) if found else lowest - 1 for found in own] if any(own) else None
    return None


def vote(text: str, options: tuple[str, ...]) -> list[float] | None:
    """Log-probabilities that stand for a text which names one option; None where it names none or several."""
    named = set(re.findall(rf"(?<![^\W_])({'|'.join(map(re.escape, options))})(?![^\W_])", text))
    if len(named) != 1:
        return None
    return [math.log(VOTE if option in named else (1 - VOTE) / (len(options) - 1)) for option in options]


def listed(token: dict) -> dict[str, float]:
    """The tokens that are listed beside one, each with its log-probability in nats."""
    return {other["token"]: log_probability(other["logprob"]) for other in token["top_logprobs"]}


def _log_sum(logps: list[float]) -> float:
    return max(logps) + math.log(sum(math.exp(logp - max(logps)) for logp in logps))


def log_probability(value: Any) -> float:
    """In nats, of what stands for one in JSON.

    Raises:
        TypeError: it is none.
    """
    if type(value) not in (int, float) or not value <= HIGHEST:  # NaN neither
        raise TypeError("no log-probability")
    return float(max(value, LOWEST))


def check_tokens(choice: dict, body: dict, options: tuple[str, ...]) -> None:
    """Without temperature the likeliest token is written: it is one of those that are listed as likely. Looked at are
    the tokens that name an option; all where there are none.

    Raises:
        OfOthers: it is not.
    """
    for token in (choice.get("logprobs") or {}).get("content") or () if body["temperature"] == 0 else ():
        listed = [other["token"] for other in token.get("top_logprobs") or ()]
        named = not options or token["token"].strip(AROUND) in options
        if named and listed and token["token"] not in listed:
            raise OfOthers


def said(choice: dict) -> str:
    """What is said, as one text or in parts; parts that are no text (what a model thought) are left out."""
    content = choice["message"].get("content") or ""
    if isinstance(content, list):
        content = "".join([part["text"] for part in content if part["type"] == "text"])
    if not isinstance(content, str):
        raise TypeError("no text")
    return content


def thinks(choice: dict) -> bool:
    """Whether what is said is a thought, in the text or, where the endpoint takes thoughts out, in place of one."""
    message, text = choice["message"], said(choice)
    return bool(THOUGHT.search(text) or (not text and (message.get("reasoning_content") or message.get("reasoning"))))


def counts(usage: Any) -> dict[str, int]:
    usage = usage if isinstance(usage, dict) else {}
    names = {"prompt_tokens": "prompt_tokens", "tokens": "completion_tokens"}
    return {ours: token_count(usage.get(name)) for ours, name in names.items()}


def most_bytes(max_tokens: int, top_logprobs: int = 0) -> int:
    """What an answer may have, in bytes."""
    return ANSWER_BYTES + TOKEN_BYTES * max_tokens * (1 + top_logprobs)
