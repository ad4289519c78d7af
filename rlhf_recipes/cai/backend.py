"""What a generator or a judge is asked, what it answers, and the file in which answers outlive the process.

A backend has a `name` (model and adapter, for provenance) and `answer(requests, known)`, which yields groups of
answered requests: `local.Local` computes a batch at a time, `server.Server` asks an endpoint for one at a time. A
group is written as one line before the next is waited for, so that a killed run asks nothing twice. Each of several
processes is given every group.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Container, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rlhf_recipes import ranks
from rlhf_recipes.errors import Refusal

MOST_TOKENS = 2**40  # of one answer; a larger count is none
# How an answer begins that is a thought; a thought that the template began ends on a line of its own.
THOUGHT = re.compile(r"\A\s*(?:<(?:seed:)?think>|\[THINK\])|^(?:</(?:seed:)?think>|\[/THINK\])", re.MULTILINE)

_written = json.JSONEncoder(ensure_ascii=False).encode
_sorted = json.JSONEncoder(sort_keys=True).encode

Message = dict[str, str]
# Of a generation: `text`, `finished` (it ended by itself). Of a choice: `logps`, a log-probability in nats for each
# option, or None where no option could be read from the answer. Of a score: `values`.
# Of each: `prompt_tokens`, `tokens`.
Answer = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        prompt_id, step: what it is for, e.g. `critique.1`; in the file beside the answer.
        messages: the conversation, in the chat format.
        prefix: how the answer begins, put into the model's mouth.
        options: with options, their log-probabilities after `prefix` are asked for, not a text.
        seed: of this request alone: what is drawn does not depend on what else is asked.
    """

    prompt_id: str
    step: str
    messages: list[Message]
    prefix: str = ""
    options: tuple[str, ...] = ()
    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def key(self) -> str:
        """Hash of all that the answer depends on; equal requests have one answer."""
        known = vars(self).get("_key")  # `cached_property` takes a lock, each time
        if known is None:
            asked = {name: value for name, value in vars(self).items() if name not in ("prompt_id", "step")}
            known = vars(self)["_key"] = hashlib.sha256(_sorted(asked).encode()).hexdigest()[:24]
        return known


@dataclass(frozen=True)
class Ask:
    """Questions to a backend that may be put at one time; `what`: for the progress line."""

    backend: "Backend"
    what: str
    requests: list[Request]


# A work that asks as it goes: it yields what it asks, is sent the answers in their order, and returns what it makes.
Work = Generator[Ask, list[Answer], Any]


class Backend(Protocol):
    """A model behind an interface of one method.

    Attributes:
        places: requests that it answers at a time, each by itself; 0 where it makes batches of them.
    """

    name: str
    places: int

    def answer(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        """Answers, in groups, in the order in which they come.

        What a request is answered does not depend on `known`: where answers depend on the batch (rounding), batches
        are made of all `requests`, and those whose keys are all known are left out.

        Args:
            requests: with different keys; all have options, or none has. Their settings may differ.
            known: keys that need no answer.
            what: for the progress line.
        """
        ...


class Journal:
    """Answers on disk, by key: one JSON line for each group, appended and flushed before anything builds on it.

    Opening one changes nothing. A line that a kill cut short goes when the next is written: its group was not
    answered. An answer that is none (`sound`) is not known: it is asked for again.

    Raises:
        Refusal: a line of the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self._whole, self._cut_short = path, 0, False
        self.answers: dict[str, Answer] = ranks.by_first(self._read)

    def _read(self) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            for end, group in groups(self.path):
                self._whole = end
                answers |= {entry["key"]: counted(entry["answer"]) for entry in group if sound(entry["answer"])}
            self._cut_short = self.path.stat().st_size > self._whole
        return answers

    def write(self, group: list[tuple[Request, Answer]]) -> None:
        """Keep what was answered; of several processes, each of which was given it, the first writes."""
        entries = [{"prompt_id": r.prompt_id, "step": r.step, "key": r.key, "answer": answer} for r, answer in group]
        text = _written(entries)
        try:
            line = text.encode()
        except UnicodeEncodeError:
            # Half a surrogate pair, which a cut-off emoji leaves, is no UTF-8. What is remembered is what was written.
            line = text.encode("utf-8", "replace")
            entries = json.loads(line)
        if ranks.is_first():
            self._append(line + b"\n")
        self.answers.update((entry["key"], entry["answer"]) for entry in entries)

    def _append(self, line: bytes) -> None:
        if self._cut_short:
            os.truncate(self.path, self._whole)
            self._cut_short = False
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def groups(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each whole line of a journal: the byte behind it, and its entries (`prompt_id`, `step`, `key`, `answer`).

    Raises:
        Refusal: a line is damaged.
    """
    end = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                group = json.loads(line)
                whole = all({"step", "key", "answer"} <= entry.keys() for entry in group)
            except (ValueError, TypeError, AttributeError, RecursionError):
                whole = False
            if not whole:
                raise Refusal(f"{path}:{number}: is damaged. Remove the line: what it held is then asked for again.")
            end += len(line)
            yield end, group


def sound(answer: Any) -> bool:
    """Whether an answer has a text, values that are numbers, or log-probabilities that are numbers (or None)."""
    if isinstance(answer, dict) and "values" in answer:
        values = answer["values"]
        return isinstance(values, list) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not isinstance(answer, dict) or "logps" not in answer:
        return isinstance(answer, dict) and isinstance(answer.get("text"), str)
    logps = answer["logps"]
    return logps is None or (isinstance(logps, list) and all(type(p) in (int, float) and -1e9 < p < 1 for p in logps))


def token_count(value: Any) -> int:
    """A number of tokens as somebody else's JSON gives it; 0 for what is none."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else 0


def counted(answer: Answer) -> Answer:
    """The answer with counts that are numbers."""
    return {**answer, **{key: token_count(answer[key]) for key in ("prompt_tokens", "tokens") if key in answer}}


def in_step(
    works: list[Work],
    journal: Journal,
    what: str = "",
    heard: Callable[[str, float, list[Answer]], None] | None = None,
) -> list[Any]:
    """What works that ask for the same in the same order come to: what all of them ask at a time is put as one.

    Args:
        what: before what the works say, in the progress line.
        heard: is told what was asked, the seconds it took and the answers, where none was there before.
    """
    made: list[Any] = [None] * len(works)
    answers: dict[int, list[Answer] | None] = dict.fromkeys(range(len(works)))  # of the works that go on
    while answers:
        asked: dict[int, Ask] = {}
        for n, given in answers.items():
            try:
                asked[n] = works[n].send(given)
            except StopIteration as ended:
                made[n] = ended.value
        found = iter(_put(list(asked.values()), journal, what, heard) if asked else ())
        answers = {n: list(islice(found, len(each.requests))) for n, each in asked.items()}
    return made


def _put(
    asks: list[Ask], journal: Journal, what: str, heard: Callable[[str, float, list[Answer]], None] | None
) -> list[Answer]:
    """The answers to all that is asked for at a time."""
    requests = [request for each in asks for request in each.requests]
    begin, before = time.monotonic(), len(journal.answers)
    answers = ask(asks[0].backend, requests, journal, f"{what}{asks[0].what}")
    if heard and len(journal.answers) - before == len(requests):
        heard(asks[0].what, time.monotonic() - begin, answers)
    return answers


def ask(backend: Backend, requests: list[Request], journal: Journal, what: str) -> list[Answer]:
    """An answer for each request, from the journal or from the backend, in the order given."""
    unique = list({request.key: request for request in requests}.values())
    if any(request.key not in journal.answers for request in unique):
        for group in backend.answer(unique, frozenset(journal.answers), what):
            journal.write(group)
    return [journal.answers[request.key] for request in requests]
