"""The backend `server`: any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, a hosted one).

Requests are sent one by one, `concurrency` of them at once to each endpoint of the model: it batches. Each is on a
thread of its own (`flight`), so that the endpoint is busy while the caller writes what is answered.
"""

import random
import re
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rlhf_recipes import endpoint, ranks
from rlhf_recipes.cai import fingerprint, reading
from rlhf_recipes.cai.backend import Answer, Request
from rlhf_recipes.cai.flight import Flight, LeftOut
from rlhf_recipes.data.template import folded
from rlhf_recipes.endpoint import TOLD, Endpoint, Failure
from rlhf_recipes.errors import Refusal
from rlhf_recipes.progress import Line

LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more (a day's quota) is not waited for
CHOICE_TOKENS = 8  # of a choice: some models put a space, a bracket or "The answer is" before the letter
TOP_LOGPROBS = (20, 5, 0)  # asked for in this order, until the endpoint takes it; 0: none
# A template's own words, which some endpoints send as an error of theirs (500).
REFUSED_ROLES = re.compile(r"system role|roles must alternate", re.IGNORECASE)
# An answer is begun in the middle of a word: an endpoint that continues the assistant's last turn ends the word. vLLM
# and SGLang want to be told, llama.cpp and TGI continue such a turn untold; llama.cpp gives what was begun back, which
# no answer of so few tokens has by itself.
BEGUN = (
    {"role": "user", "content": "Name the days of the week, in order."},
    {"role": "assistant", "content": "Monday, Tuesday, Wed"},
)
ENDED, ENDED_TOKENS = "nesday", 4
CONTINUES = ({"continue_final_message": True, "add_generation_prompt": False}, {})


class Server:
    """A model behind an OpenAI-compatible endpoint, or behind several.

    An endpoint of several that fails `max_attempts` times in a row is left out for a while (`flight`).

    Args:
        base_url: the endpoint's, which mostly ends in /v1; or those of all endpoints that serve the model.
        model: as the endpoint calls it.
        chat_template_kwargs: what its template reads, sent with every request where there is any; None: not sent.
        api_key_env: environment variable that holds the key; None: the endpoint wants none.
        concurrency: requests in flight at each endpoint, at most 1,000.
        timeout: seconds that a request waits for the endpoint to answer.
        max_attempts: times that a request is sent before the run ends.
        role: the key above these, for messages.

    Raises:
        Refusal: a URL is none, holds a secret or stands there twice, or the variable is not set.
    """

    def __init__(
        self,
        *,
        base_url: str | Sequence[str],
        model: str,
        chat_template_kwargs: dict[str, Any] | None = None,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 120,
        max_attempts: int = 6,
        role: str = "",
    ):
        addresses = endpoint.addresses(base_url, role)
        if not (1 <= concurrency <= 1000 and timeout > 0 and max_attempts >= 1):
            raise Refusal("concurrency (at most 1000), timeout and max_attempts must be above 0. Change them.")
        self.model, self.concurrency, self.timeout, self.max_attempts = model, concurrency, timeout, max_attempts
        self._endpoints = [Endpoint(address, api_key_env, timeout) for address in addresses]
        hosts = [each.host for each in self._endpoints]
        self.host, self.api_key_env = ", ".join(hosts), api_key_env
        self.name = f"{model} at {', '.join(dict.fromkeys(re.sub(r':[0-9]+$', '', each) for each in hosts))}"
        self.served: dict[str, Any] | None = None  # of `introduced`, when it was looked at
        self._lock, self._unsaid = threading.Lock(), threading.Lock()
        self._top_logprobs, self._repeats = TOP_LOGPROBS[0], 0
        self._continuing, self._continues = threading.Lock(), []
        told = (chat_template_kwargs or {}).items()
        self._template_kwargs, self._folds = {key: value for key, value in told if value is not None}, False

    def answer(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        """Answers as they come; those that are ready together are a group. Of several processes the first asks, and
        the others are given what it was answered when all is.

        A generation has `text`, `finished`, and `prompt_tokens` and `tokens` (0 where the endpoint does not count). A
        choice has `logps` and the counts: log-probabilities in nats of the first token that names an option, summed
        over its variants ("A", " A", "(A"). An option that is not listed there lies below the lowest that is, and gets
        that less 1. Without log-probabilities, the option that the text names gets log 0.99. The `prefix` of a choice
        is sent where the endpoint continues an answer that is begun for it, and the first token after it counts alone,
        whatever is drawn; elsewhere the model begins its answer itself.

        Raises:
            Refusal: refused, or `max_attempts` times without an answer; after what was answered is yielded.
        """
        if not ranks.is_first():
            yield from ranks.from_first(None)
            return
        told = []
        for group in self._groups(requests, known, what):
            yield group
            told += [group] if ranks.world_size() > 1 else []
        ranks.from_first(told)

    def _groups(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        todo = [request for request in requests if request.key not in known]
        if any(request.prefix and not request.options for request in todo):
            raise Refusal("The server backend cannot begin a model's answer for it: a generation has no prefix.")
        line = Line(what, len(requests), len(requests) - len(todo))
        done = line.first
        with Flight(self) as flight:
            for request in todo:
                flight.put(self, request)
            while done < len(requests):
                group = flight.take()
                yield [(request, answer) for _, request, answer in group]
                done += len(group)
                line.update(done, f"{self._repeats} sent again" if self._repeats else "")

    @property
    def places(self) -> int:
        """Requests in flight at a time, at all endpoints."""
        return self.concurrency * len(self._endpoints)

    def connected(self) -> list[Endpoint]:
        """The endpoints; those whose connections were closed, since a call was not heard out, with others."""
        self._endpoints = [each.renewed() if each.closed.is_set() else each for each in self._endpoints]
        return self._endpoints

    def is_back(self, at: Endpoint) -> bool:
        """Whether an endpoint that was left out answers, by the same model."""
        try:
            found = self.introduced(at)["served"]
            why = fingerprint.changed(self.served, found) if self.served else None
        except _Renamed as refused:
            why = refused.names
        except (Refusal, LeftOut):
            return False
        if why:
            print(f"{at.host}: serves another model ({why}), and stays left out.", file=sys.stderr)
        return why is None

    def leave_out(self, at: Endpoint, why: str) -> None:
        at.is_out, at.looked_at = True, time.monotonic()
        print(f"{at.host}: {why}. It is left out, its prompts go to the others.", file=sys.stderr)

    def listed(self, at: Endpoint) -> list[dict[str, Any]]:
        """The models that an endpoint says it serves, each with its `id`; none where it has no such list."""
        with suppress(Failure, TypeError, LookupError):
            found = at.ask("/models")["data"]
            return [each for each in found if isinstance(each["id"], str)]
        return []

    def introduced(self, at: Endpoint) -> Answer:
        """How the model answers `fingerprint.QUESTION`; `served`: what `fingerprint.changed` compares.

        Raises:
            Refusal: as `answer`, or it calls itself by another name than it is asked for.
            LeftOut: it fails too often, and is not the last endpoint.
        """
        asked = Request("", "served", fingerprint.QUESTION, max_new_tokens=fingerprint.TOKENS)
        found = self._answered(at, asked, self._introduction)
        named = at.named
        if named and not fingerprint.is_called(self.model, named):
            raise Refusal(
                f"{at.host}: calls its model {at.plain(named)[:TOLD]}, not {self.model}. Set model to what it is."
            )
        found["served"]["model"] = named and at.plain(named)
        return found

    def _introduction(self, at: Endpoint, request: Request) -> Answer:
        def read(choice: dict) -> Answer:
            tokens = (choice.get("logprobs") or {}).get("content") or []
            likes = [[each["token"], reading.listed(each)] for each in tokens if each.get("top_logprobs")]
            return {"text": reading.said(choice), "finished": True, "served": {"tokens": likes}}

        for asked in ({"logprobs": True, "top_logprobs": fingerprint.LISTED}, {}):
            try:
                return self._post(at, request, read, max_tokens=request.max_new_tokens, temperature=0, **asked)
            except _Rejected:
                if not asked:
                    raise

    def taken(self, at: Endpoint, request: Request) -> Answer:
        """An answer; to the system text in the first user turn, where the endpoint takes no system turn."""
        if not self._folds:
            try:
                return self._answered(at, request)
            except _Rejected:
                if request.messages[0]["role"] != "system":
                    raise
        answer = self._answered(at, replace(request, messages=folded(request.messages)))
        self._folds = True
        return answer

    def _answered(self, at: Endpoint, request: Request, ask: Callable | None = None) -> Answer:
        """An answer that is no thought: a model that begins with one is asked again, told not to think.

        Raises:
            Refusal: it thinks all the same, the endpoint does not pass it on, or `chat_template_kwargs` decides it.
        """
        ask, sent = ask or (self._choice if request.options else self._generation), self._template_kwargs
        with suppress(_Thinks):
            return ask(at, request)
        if "enable_thinking" not in sent:
            self._template_kwargs = {**sent, "enable_thinking": False}
            with suppress(_Thinks, _Rejected):
                return ask(at, request)
        raise Refusal(
            f"{self.host}: {self.model} thinks aloud before it answers (<think>). Turn that off where it is served, "
            "set chat_template_kwargs of this judge or generator to what its template reads (enable_thinking: false), "
            "or choose another model."
        )

    def _generation(self, at: Endpoint, request: Request) -> Answer:
        def read(choice: dict) -> Answer:
            return {"text": reading.said(choice), "finished": choice.get("finish_reason") == "stop"}

        sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        return self._post(at, request, read, max_tokens=request.max_new_tokens, **sampling)

    def _choice(self, at: Endpoint, request: Request) -> Answer:
        continued = self._continued(at) if request.prefix else None
        begun = continued is not None
        if begun:
            turn = {"role": "assistant", "content": request.prefix}
            request = replace(request, messages=[*request.messages, turn])

        def read(choice: dict) -> Answer:
            tokens = (choice.get("logprobs") or {}).get("content") or []
            if any(token.get("top_logprobs") for token in tokens):
                return {"logps": reading.logps(tokens, request.options, begun)}
            if reading.said(choice) and self._unsaid.acquire(blocking=False):
                print(f"{self.host} gives no log-probabilities: options are read from the text.", file=sys.stderr)
            return {"logps": reading.vote(reading.said(choice), request.options)}

        for top in [count for count in TOP_LOGPROBS if count <= self._top_logprobs]:
            asked = {"logprobs": True, "top_logprobs": top} if top else {}
            asked |= {"max_tokens": 1 if begun else CHOICE_TOKENS, "temperature": 0} | (continued or {})
            try:
                answer = self._post(at, request, read, **asked)
            except _Rejected:
                if not top:
                    raise
            else:
                self._top_logprobs = min(self._top_logprobs, top)
                return answer

    def _continued(self, at: Endpoint) -> dict[str, Any] | None:
        """What a request says so that the endpoint continues its last turn; None where nothing makes it. Found out
        before the first choice is asked for, and said."""

        def read(choice: dict) -> Answer:
            return {"text": reading.said(choice)}

        with self._continuing:
            if not self._continues:
                request, found = Request("", "continues", list(BEGUN)), None
                for said in CONTINUES:
                    with suppress(_Rejected, _Thinks):
                        asked = {"max_tokens": ENDED_TOKENS, "temperature": 0} | said
                        answer = self._post(at, request, read, **asked)
                        if answer["text"].removeprefix(BEGUN[-1]["content"]).startswith(ENDED):
                            found = said
                            break
                self._continues = [found]
                how = "does not continue an answer that is begun for it: options are looked for in its own words"
                if found is not None:
                    how = (
                        f"continues an answer that is begun for it ({', '.join(found) or 'untold'}): options follow it"
                    )
                print(f"{self.host} {how}.", file=sys.stderr)
            return self._continues[0]

    def _post(self, at: Endpoint, request: Request, read: Callable[[dict], Answer], **body) -> Answer:
        """What `read` finds in the first choice of the response, and the counts; sent again where that may help."""
        body = {"model": self.model, "messages": request.messages, **body}
        if self._template_kwargs:
            body["chat_template_kwargs"] = self._template_kwargs
        most = reading.most_bytes(body["max_tokens"], body.get("top_logprobs", 0))
        chance = random.Random(request.key)
        for attempt in range(1, self.max_attempts + 1):
            failed, wait, limited = "no chat completion in its answer", 0.0, False
            advice, refused = "See that base_url is right", None
            try:
                response = at.ask("/chat/completions", body, most=most)
                choice = response["choices"][0]
                refused = self._renamed(at, response.get("model"))
                if not refused:
                    reading.check_tokens(choice, body, request.options)
                    if reading.thinks(choice):
                        raise _Thinks
                    answer = read(choice) | reading.counts(response.get("usage"))
                    at.failures = 0
                    return answer
            except Failure as failure:
                refused = self._refusal(at, failure)
                if not failure.unread:
                    failed, advice = self._told(failure)
                wait, limited = failure.wait, failure.status == 429
            except reading.OfOthers:
                failed, advice = "log-probabilities of other tokens than it wrote", "Choose another endpoint"
            except (ValueError, TypeError, LookupError, AttributeError):
                pass  # it has not the shape of a chat completion
            if refused:
                raise refused
            if not limited and self._fails(at):
                raise LeftOut(f"{failed} ({at.failures} times in a row)")
            if wait > LONGEST_WAIT:
                advice = f"It asks for a pause of {wait:.6g} s: wait"
            if attempt == self.max_attempts or wait > LONGEST_WAIT or at.closed.is_set():
                raise Refusal(
                    f"{at.host}: {failed} (attempt {attempt}). {advice}, then run the same command again; what was "
                    "answered is kept."
                )
            with self._lock:
                self._repeats += 1
            at.closed.wait(endpoint.pause(attempt, wait, chance))

    def _told(self, failure: Failure) -> tuple[str, str]:
        """What went wrong, and what to do."""
        if failure.late:
            return f"{failure} (timeout={self.timeout:g})", "Raise timeout or lower concurrency"
        if not failure.status:
            return str(failure), "See that it runs and that base_url is right"
        return str(failure), "Lower concurrency" if failure.status == 429 else "See its log"

    def _fails(self, at: Endpoint) -> bool:
        """Whether the endpoint that failed is to be left out: it did so too often in a row, and is not the last."""
        with self._lock:
            at.failures += 1
            others = any(not each.is_out for each in self._endpoints if each is not at)
            return others and at.failures >= self.max_attempts and not at.closed.is_set()

    def _renamed(self, at: Endpoint, named: Any) -> Refusal | None:
        """Why an answer is refused that another model gave than the one that was looked at."""
        before, now = at.named, named if isinstance(named, str) else at.named
        if self.served and before not in (None, now):  # so is the next of its answers: it keeps the name it had
            return _Renamed(at.host, f"{at.plain(before)[:99]}, then {at.plain(now)[:99]}")
        at.named = now
        return None

    def _refusal(self, at: Endpoint, failure: Failure) -> Refusal | None:
        """Where asking again is of no use."""
        status, told = failure.status, failure.told
        if failure.points_to:
            return Refusal(
                f"{at.host}: status {status}, it points to {failure.points_to}, which is not followed: requests go to "
                "base_url alone. Set base_url to the address that answers."
            )
        of_roles = REFUSED_ROLES.search(told)
        if not (failure.final or of_roles):
            return None
        if not status:
            return Refusal(f"{at.host}: {failure}. See that base_url and model are right.")
        if status in (400, 422) or "logprobs" in told or of_roles:
            return _Rejected(f"{at.host}: status {status}, it does not take the request: {told[:TOLD]}")
        if status in (401, 403):
            key = f"the key in {self.api_key_env}" if self.api_key_env else "requests without a key"
            return Refusal(f"{at.host}: status {status}, it does not take {key}. Check api_key_env.")
        known = f"no model {self.model!r} there" if status == 404 else told[:TOLD]
        return Refusal(f"{at.host}: status {status}, {known}. Check model and base_url.")


class _Renamed(Refusal):
    """An endpoint serves another model than the one that was looked at; `names`: both."""

    def __init__(self, host: str, names: str):
        super().__init__(
            f"{host}: serves another model than before ({names}). Serve that one again, then run the same command; "
            "what was answered is kept."
        )
        self.names = names


class _Rejected(Refusal):
    """The endpoint does not take the request as it is."""


class _Thinks(Exception):
    """An answer is a thought, or begins with one."""
