"""What endpoints serve, looked at before the first prompt is paid for: the model that was asked for, the one that the
run began with, log-probabilities for a judge, room for the longest request.

What a model writes to a question is its fingerprint, kept in the gate's journal: the tokens that it likes best at
each place. It is the model's, not the machine's: with another batch or processor log-probabilities move, but a little.
"""

import math
from pathlib import Path
from typing import Any

from rlhf_recipes.cai.backend import Backend, Journal, Message, Request, groups
from rlhf_recipes.cai.flight import LeftOut
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.text import line

QUESTION: list[Message] = [{"role": "user", "content": "Write the first sentence of a story about the sea."}]
TOKENS, LISTED = 8, 5  # of the answer, and how many are listed at each place
# Probability that moves to other tokens, at most; 0.065 was the most between two programs with the same weights.
MOST_MOVED = 0.1
SHOWN = 5  # names of models


def check(
    backends: dict[str, Backend], needed: dict[str, int], journal: Journal | None = None, votes: bool = False
) -> None:
    """Refuse endpoints that cannot do what a run will ask of them.

    Args:
        backends: of `generator` and `judge`; those that are in this process are not looked at.
        needed: tokens of the longest request to each, with its answer.
        journal: in which the fingerprints are kept; None: they are not.
        votes: a judge may answer without log-probabilities.

    Raises:
        Refusal: a model is not served, its context is too small, it gives no log-probabilities where it judges, or it
            is another than the run began with; endpoints of a list serve different models.
    """
    known = journal.answers if journal else {}
    for role, server in backends.items():
        if not server.places:
            continue
        question = Request("", f"{role}.served", QUESTION, max_new_tokens=TOKENS, seed=role == "judge")
        first = known.get(question.key, {}).get("served")
        for endpoint in server.connected():
            try:
                _check_listed(role, server, endpoint, needed[role])
                answer = server.introduced(endpoint)
            except LeftOut as error:
                server.leave_out(endpoint, str(error))
                continue
            found = answer["served"]
            if role == "judge" and not found["tokens"] and not votes:
                raise Refusal(
                    f"judge.base_url={endpoint.base_url}: gives no log-probabilities of answers. Serve the model "
                    "where it does (vLLM, SGLang, llama.cpp), or set judging.votes=true: the letter that its text "
                    "names then counts 99 %."
                )
            if first and (why := changed(first, found)):
                begun = question.key in known
                raise Refusal(
                    f"{role}.base_url={endpoint.base_url}: serves another model than "
                    f"{'this run began with' if begun else 'the endpoint before it'} ({why}). Serve that one again, "
                    "or start afresh with overwrite=true or another run_name."
                )
            first = first or found
        if journal and question.key not in known:
            journal.write([(question, answer)])
        server.served = first


def _check_listed(role: str, server: Any, endpoint: Any, needed: int) -> None:
    """By the list of models, where the endpoint has one."""
    listed = {each["id"]: each for each in server.listed(endpoint)}
    if listed and not any(is_called(server.model, each) for each in listed):
        names = sorted(listed)
        raise Refusal(
            f"{role}.model={server.model}: {endpoint.host} serves {', '.join(map(line, names[:SHOWN]))}"
            f"{' and others' if len(names) > SHOWN else ''}{nearest(server.model, names)}"
        )
    room = listed.get(server.model, {}).get("max_model_len")
    if type(room) is int and room < needed:
        raise Refusal(
            f"{role}.model={server.model}: the longest request with its answer may have {needed} tokens, its context "
            f"at {endpoint.host} has {room}. Serve it with a longer one, lower generate.max_new_tokens and "
            "revise.max_new_tokens, or leave out the longest prompts."
        )


def is_called(asked: str, named: str) -> bool:
    """Whether a name may be that of the model asked for: with or without its owner and its version."""
    short, other = (name.casefold().rpartition("/")[2] for name in (asked, named))
    return short.startswith(other) or other.startswith(short)


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """The fingerprints of a gate's journal, by step."""
    entries = (entry for _, group in groups(path) for entry in group)
    return {entry["step"]: entry["answer"]["served"] for entry in entries if entry["step"].endswith(".served")}


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why two fingerprints are not of one model; None where they may be.

    Args:
        before, after: `model`, its name as the endpoint says it, or None; `tokens`, of each place [token, {token: its
            log-probability in nats}], none where the endpoint gives none.
    """
    if before["model"] and after["model"] and before["model"] != after["model"]:
        return f"{line(before['model'])}, then {line(after['model'])}"
    for place, ((token, likes), (other, others)) in enumerate(zip(before["tokens"], after["tokens"], strict=False), 1):
        moved = sum(
            abs(math.exp(likes.get(each, -math.inf)) - math.exp(others.get(each, -math.inf)))
            for each in likes | others
        )
        if moved / 2 > MOST_MOVED:
            return f"{moved / 2:.0%} of the probability of token {place} of a test answer has moved"
        if token != other:
            break  # both were as likely: what follows is of another text
    return None
