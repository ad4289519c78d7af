"""The backend `server`: any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, a hosted one).

Requests are sent one by one, `concurrency` of them at once to each endpoint of the model: it batches. Each is on a
thread of its own (`flight`), so that the endpoint is busy while the caller writes what is answered.
"""

import email.utils
import math
import os
import random
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urljoin, urlsplit

from rlhf_recipes import ranks, text
from rlhf_recipes.cai import served
from rlhf_recipes.cai.backend import THOUGHT, Answer, Request, token_count
from rlhf_recipes.cai.flight import Flight, LeftOut
from rlhf_recipes.data.template import folded
from rlhf_recipes.errors import Refusal
from rlhf_recipes.progress import Line
from rlhf_recipes.secrets import redact

CONNECT_SECONDS = 10.0  # at most, to connect; also how long a caller that stops early may have to wait
BACKOFF_SECONDS, BACKOFF_CAP = 1.0, 30.0  # the first wait at most, doubled with each attempt, and the last
LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more (a day's quota) is not waited for
CHOICE_TOKENS = 8  # of a choice: some models put a space, a bracket or "The answer is" before the letter
TOP_LOGPROBS = (20, 5, 0)  # asked for in this order, until the endpoint takes it; 0: none
VOTE = 0.99  # probability of the option that a text without log-probabilities names; the others share the rest
LOWEST = -9999.0  # what servers write for a log-probability of minus infinity
HIGHEST = 0.01  # a log-probability may be above 0 by rounding
# Bytes of an answer, decompressed: so many at most, and for each token asked for and each listed beside it (its text
# in JSON, its log-probability and its bytes as numbers).
ANSWER_BYTES, TOKEN_BYTES = 2**20, 512
URL = re.compile(r"https?://(([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?)(/[^\s?#@]*)?")
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
AROUND = " \t\r\n▁Ġ()[].,:*`'\"‘’“”"  # what may stand around an option within its token


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

    Raises:
        Refusal: the openai package is missing, a URL is none, holds a secret or stands there twice, or the variable
            is not set.
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
    ):
        try:
            import openai  # noqa: F401
        except ImportError:
            raise Refusal('The server backend needs openai. pip install "rlhf-recipes[server]".') from None
        several = isinstance(base_url, Sequence) and not isinstance(base_url, str)
        addresses = [str(address) for address in (base_url if several else [base_url])]
        urls = [URL.fullmatch(address) for address in addresses]
        if not urls or not all(urls):
            raise Refusal("base_url: must be like http://localhost:8000/v1; a key goes where api_key_env says.")
        if len({address.rstrip("/") for address in addresses}) < len(addresses):
            raise Refusal("base_url: names an endpoint twice. Leave one out.")
        if not (1 <= concurrency <= 1000 and timeout > 0 and max_attempts >= 1):
            raise Refusal("concurrency (at most 1000), timeout and max_attempts must be above 0. Change them.")
        self.model, self.api_key_env = model, api_key_env
        self.concurrency, self.timeout, self.max_attempts = concurrency, timeout, max_attempts
        self.name = f"{model} at {', '.join(dict.fromkeys(url[2] for url in urls))}"
        self.host = ", ".join(url[1] for url in urls)
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else "none"
        if not (self._key and self._key.isascii() and self._key.isprintable()):
            raise Refusal(f"{api_key_env}: not set, or not a key. export {api_key_env}=<the key for {self.host}>.")
        self._endpoints = [_Connections(url[0], url[1], self._key, timeout) for url in urls]
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

    def connected(self) -> list["_Connections"]:
        """The endpoints; those whose connections were closed, since a call was not heard out, with others."""
        self._endpoints = [each.renewed() if each.closed.is_set() else each for each in self._endpoints]
        return self._endpoints

    def is_back(self, connections: "_Connections") -> bool:
        """Whether an endpoint that was left out answers, by the same model."""
        with suppress(Refusal, LeftOut):
            found = self.introduced(connections)["served"]
            why = served.changed(self.served, found) if self.served else None
            if why:
                print(f"{connections.host}: serves another model ({why}), and stays left out.", file=sys.stderr)
            return why is None
        return False

    def leave_out(self, connections: "_Connections", why: str) -> None:
        connections.is_out, connections.looked_at = True, time.monotonic()
        print(f"{connections.host}: {why}. It is left out, its prompts go to the others.", file=sys.stderr)

    def listed(self, connections: "_Connections") -> list[dict[str, Any]]:
        """The models that an endpoint says it serves, each with its `id`; none where it has no such list."""
        import openai

        with suppress(openai.OpenAIError, ValueError, TypeError, LookupError, RecursionError):
            found = connections.get("/models")["data"]
            return [each for each in found if isinstance(each["id"], str)]
        return []

    def introduced(self, connections: "_Connections") -> Answer:
        """How the model answers `served.QUESTION`; `served`: what `served.changed` compares.

        Raises:
            Refusal: as `answer`, or it calls itself by another name than it is asked for.
            LeftOut: it fails too often, and is not the last endpoint.
        """
        asked = Request("", "served", served.QUESTION, max_new_tokens=served.TOKENS)
        found = self._answered(connections, asked, self._introduction)
        named = connections.named
        if named and not served.is_called(self.model, named):
            raise Refusal(
                f"{connections.host}: calls its model {self._plain(named)[:200]}, not {self.model}. Set model to what "
                "it is."
            )
        found["served"]["model"] = named and self._plain(named)
        return found

    def _introduction(self, connections: "_Connections", request: Request) -> Answer:
        def read(choice: dict) -> Answer:
            tokens = (choice.get("logprobs") or {}).get("content") or []
            likes = [
                [each["token"], {other["token"]: _logp(other["logprob"]) for other in each["top_logprobs"]}]
                for each in tokens
                if each.get("top_logprobs")
            ]
            return {"text": _text(choice), "finished": True, "served": {"tokens": likes}}

        for asked in ({"logprobs": True, "top_logprobs": served.LISTED}, {}):
            try:
                return self._post(
                    connections, request, read, max_tokens=request.max_new_tokens, temperature=0, **asked
                )
            except _Rejected:
                if not asked:
                    raise

    def taken(self, connections: "_Connections", request: Request) -> Answer:
        """An answer; to the system text in the first user turn, where the endpoint takes no system turn."""
        if not self._folds:
            try:
                return self._answered(connections, request)
            except _Rejected:
                if request.messages[0]["role"] != "system":
                    raise
        answer = self._answered(connections, replace(request, messages=folded(request.messages)))
        self._folds = True
        return answer

    def _answered(self, connections: "_Connections", request: Request, ask: Callable | None = None) -> Answer:
        """An answer that is no thought: a model that begins with one is asked again, told not to think.

        Raises:
            Refusal: it thinks all the same, the endpoint does not pass it on, or `chat_template_kwargs` decides it.
        """
        ask, sent = ask or (self._choice if request.options else self._generation), self._template_kwargs
        with suppress(_Thinks):
            return ask(connections, request)
        if "enable_thinking" not in sent:
            self._template_kwargs = {**sent, "enable_thinking": False}
            with suppress(_Thinks, _Rejected):
                return ask(connections, request)
        raise Refusal(
            f"{self.host}: {self.model} thinks aloud before it answers (<think>). Turn that off where it is served, "
            "set chat_template_kwargs of this judge or generator to what its template reads (enable_thinking: false), "
            "or choose another model."
        )

    def _generation(self, connections: "_Connections", request: Request) -> Answer:
        def read(choice: dict) -> Answer:
            return {"text": _text(choice), "finished": choice.get("finish_reason") == "stop"}

        sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        return self._post(connections, request, read, max_tokens=request.max_new_tokens, **sampling)

    def _choice(self, connections: "_Connections", request: Request) -> Answer:
        continued = self._continued(connections) if request.prefix else None
        begun = continued is not None
        if begun:
            turn = {"role": "assistant", "content": request.prefix}
            request = replace(request, messages=[*request.messages, turn])

        def read(choice: dict) -> Answer:
            tokens = (choice.get("logprobs") or {}).get("content") or []
            if any(token.get("top_logprobs") for token in tokens):
                return {"logps": logps(tokens, request.options, begun)}
            if _text(choice) and self._unsaid.acquire(blocking=False):
                print(f"{self.host} gives no log-probabilities: options are read from the text.", file=sys.stderr)
            return {"logps": vote(_text(choice), request.options)}

        for top in [count for count in TOP_LOGPROBS if count <= self._top_logprobs]:
            asked = {"logprobs": True, "top_logprobs": top} if top else {}
            asked |= {"max_tokens": 1 if begun else CHOICE_TOKENS, "temperature": 0} | (continued or {})
            try:
                answer = self._post(connections, request, read, **asked)
            except _Rejected:
                if not top:
                    raise
            else:
                self._top_logprobs = min(self._top_logprobs, top)
                return answer

    def _continued(self, connections: "_Connections") -> dict[str, Any] | None:
        """What a request says so that the endpoint continues its last turn; None where nothing makes it. Found out
        before the first choice is asked for, and said."""

        def read(choice: dict) -> Answer:
            return {"text": _text(choice)}

        with self._continuing:
            if not self._continues:
                request, found = Request("", "continues", list(BEGUN)), None
                for said in CONTINUES:
                    with suppress(_Rejected, _Thinks):
                        asked = {"max_tokens": ENDED_TOKENS, "temperature": 0} | said
                        answer = self._post(connections, request, read, **asked)
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

    def _post(self, connections: "_Connections", request: Request, read: Callable[[dict], Answer], **body) -> Answer:
        """What `read` finds in the first choice of the response, and the counts; sent again where that may help."""
        import openai

        body = {"model": self.model, "messages": request.messages, **body}
        if self._template_kwargs:
            body["chat_template_kwargs"] = self._template_kwargs
        chance = random.Random(request.key)
        for attempt in range(1, self.max_attempts + 1):
            status, wait, refused = 0, 0.0, None
            try:
                response = connections.post(body)
                choice = response["choices"][0]
                refused = self._renamed(connections, response.get("model"))
                if not refused:
                    _check_tokens(choice, body, request.options)
                    if _thinks(choice):
                        raise _Thinks
                    answer = read(choice) | _counts(response.get("usage"))
                    connections.failures = 0
                    return answer
            except _TooLong as error:
                refused = f"{connections.host}: {error}. See that base_url and model are right."
            except openai.APITimeoutError:
                failure, advice = f"no answer in time (timeout={self.timeout:g})", "Raise timeout or lower concurrency"
            except openai.APIConnectionError:
                failure, advice = "no connection", "See that it runs and that base_url is right"
            except openai.APIStatusError as error:
                status, told, wait = error.status_code, error.response.text, _retry_after(error.response.headers)
                elsewhere = _host(connections.base_url, error.response.headers.get("location"))
                failure, advice = f"status {status}", "Lower concurrency" if status == 429 else "See its log"
            except _OfOthers:
                failure, advice = "log-probabilities of other tokens than it wrote", "Choose another endpoint"
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                # The body has not the shape of a chat completion.
                failure, advice = "no chat completion in its answer", "See that base_url is right"
            # Raised here, not above, no error has one of the client's, which hold the key, as its context.
            if 300 <= status < 400:
                refused = (
                    f"{connections.host}: status {status}, it points to {elsewhere}, which is not followed: requests "
                    "go to base_url alone. Set base_url to the address that answers."
                )
            if refused:
                raise Refusal(refused)
            if status and (REFUSED_ROLES.search(told) or (status not in (408, 409, 429) and status < 500)):
                raise self._refusal(connections.host, status, told)
            if status != 429 and self._fails(connections):
                raise LeftOut(f"{failure} ({connections.failures} times in a row)")
            if wait > LONGEST_WAIT:
                advice = f"It asks for a pause of {wait:.6g} s: wait"
            if attempt == self.max_attempts or wait > LONGEST_WAIT or connections.closed.is_set():
                raise Refusal(
                    f"{connections.host}: {failure} (attempt {attempt}). {advice}, then run the same command again; "
                    "what was answered is kept."
                )
            with self._lock:
                self._repeats += 1
            pause = wait + chance.uniform(0, min(BACKOFF_CAP, BACKOFF_SECONDS * 2 ** (attempt - 1)))
            connections.closed.wait(pause)

    def _fails(self, connections: "_Connections") -> bool:
        """Whether the endpoint that failed is to be left out: it did so too often in a row, and is not the last."""
        with self._lock:
            connections.failures += 1
            others = any(not each.is_out for each in self._endpoints if each is not connections)
            return others and connections.failures >= self.max_attempts and not connections.closed.is_set()

    def _renamed(self, connections: "_Connections", named: Any) -> str | None:
        """Why an answer is refused that another model gave than the one that was looked at."""
        before, connections.named = connections.named, named if isinstance(named, str) else connections.named
        if not self.served or before in (None, connections.named):
            return None
        return (
            f"{connections.host}: serves another model than before ({self._plain(before)[:99]}, then "
            f"{self._plain(connections.named)[:99]}). Serve that one again, then run the same command; what was "
            "answered is kept."
        )

    def _plain(self, told: str) -> str:
        """On one line, without secrets."""
        told = told.replace(self._key, "<secret>") if self.api_key_env else told
        return redact(" ".join(text.line(told).split()))

    def _refusal(self, host: str, status: int, told: str) -> Refusal:
        told = self._plain(told)
        if status in (400, 422) or "logprobs" in told or REFUSED_ROLES.search(told):
            return _Rejected(f"{host}: status {status}, it does not take the request: {told[:200]}")
        if status in (401, 403):
            key = f"the key in {self.api_key_env}" if self.api_key_env else "requests without a key"
            return Refusal(f"{host}: status {status}, it does not take {key}. Check api_key_env.")
        known = f"no model {self.model!r} there" if status == 404 else told[:200]
        return Refusal(f"{host}: status {status}, {known}. Check model and base_url.")


class _Rejected(Refusal):
    """The endpoint does not take the request as it is."""


class _Thinks(Exception):
    """An answer is a thought, or begins with one."""


class _OfOthers(ValueError):
    """Log-probabilities do not belong to the tokens beside them."""


class _TooLong(ValueError):
    """An answer goes on beyond its limit."""


class _Connections:
    """An endpoint: the client and its sockets. Shutting one down is what ends a request that another thread waits for.

    It follows no redirect, which would send a prompt to whatever address an answer names, and reads no answer beyond
    the bytes that were asked for.

    Attributes:
        failures: in a row, of all requests.
        named: what the endpoint called the model in its last answer.
        is_out, looked_at: whether it is left out, and since when, or when it was looked for last (`flight`).
    """

    def __init__(self, base_url: str, host: str, key: str, timeout: float):
        import openai

        self.base_url, self.host, self._key, self._timeout = base_url, host, key, timeout
        self.failures, self.is_out, self.looked_at = 0, False, 0.0
        self.named: str | None = None

        def watch(request: Any) -> None:
            request.extensions["trace"] = self._note  # httpx then tells of each step of the request

        class Client(openai.DefaultHttpxClient):
            def send(client, request: Any, *, stream: bool = False, **kwargs) -> Any:
                return _limited(super().send(request, stream=True, **kwargs), self._asked.bytes)

        self.closed, self._asked = threading.Event(), threading.local()
        self._sockets, self._lock = weakref.WeakSet(), threading.Lock()
        self.client = openai.OpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            http_client=Client(event_hooks={"request": [watch]}, follow_redirects=False),
        )

    def post(self, body: dict) -> Any:
        """The answer to a chat completion, as JSON.

        Raises:
            _TooLong: it goes on beyond `most_bytes`.
        """
        self._asked.bytes = most_bytes(body["max_tokens"], body.get("top_logprobs", 0))
        return self.client.post("/chat/completions", body=body, cast_to=object)

    def get(self, path: str) -> Any:
        """What is there, as JSON."""
        self._asked.bytes = ANSWER_BYTES
        return self.client.get(path, cast_to=object)

    def renewed(self) -> "_Connections":
        other = _Connections(self.base_url, self.host, self._key, self._timeout)
        other.is_out, other.looked_at, other.named = self.is_out, self.looked_at, self.named
        return other

    def close(self) -> None:
        self.closed.set()
        with self._lock:
            for connected in self._sockets:
                with suppress(OSError):  # it is closed, or TLS has taken it over
                    connected.shutdown(socket.SHUT_RDWR)
        self.client.close()

    def _note(self, event: str, info: dict) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._sockets.add(info["return_value"].get_extra_info("socket"))
            if self.closed.is_set():
                self.close()


def most_bytes(max_tokens: int, top_logprobs: int = 0) -> int:
    """What an answer may have, in bytes."""
    return ANSWER_BYTES + TOKEN_BYTES * max_tokens * (1 + top_logprobs)


def logps(tokens: list[dict], options: tuple[str, ...], begun: bool = False) -> list[float] | None:
    """Log-probability in nats of each option at the first token that names one; None without such a token.

    Args:
        tokens: `choices[0].logprobs.content` of a response.
        begun: the options are what the answer goes on with: at its first token, whatever that is, if any is listed.
    """
    for token in tokens[:1] if begun else tokens:
        if (begun or token["token"].strip(AROUND) in options) and token["top_logprobs"]:
            listed = [(other["token"].strip(AROUND), _logp(other["logprob"])) for other in token["top_logprobs"]]
            lowest = min(logp for _, logp in listed)
            own = [[logp for name, logp in listed if name == option] for option in options]
            return [_log_sum(found) if found else lowest - 1 for found in own] if any(own) else None
    return None


def vote(text: str, options: tuple[str, ...]) -> list[float] | None:
    """Log-probabilities that stand for a text which names one option; None where it names none or several."""
    named = set(re.findall(rf"(?<![^\W_])({'|'.join(map(re.escape, options))})(?![^\W_])", text))
    if len(named) != 1:
        return None
    return [math.log(VOTE if option in named else (1 - VOTE) / (len(options) - 1)) for option in options]


def _log_sum(logps: list[float]) -> float:
    return max(logps) + math.log(sum(math.exp(logp - max(logps)) for logp in logps))


def _logp(value: Any) -> float:
    if type(value) not in (int, float) or not value <= HIGHEST:  # NaN neither
        raise TypeError("no log-probability")
    return float(max(value, LOWEST))


def _check_tokens(choice: dict, body: dict, options: tuple[str, ...]) -> None:
    """Without temperature the likeliest token is written: it is one of those that are listed as likely. Looked at are
    the tokens that name an option; all where there are none.

    Raises:
        _OfOthers: it is not.
    """
    for token in (choice.get("logprobs") or {}).get("content") or () if body["temperature"] == 0 else ():
        listed = [other["token"] for other in token.get("top_logprobs") or ()]
        named = not options or token["token"].strip(AROUND) in options
        if named and listed and token["token"] not in listed:
            raise _OfOthers


def _text(choice: dict) -> str:
    """What is said, as one text or in parts; parts that are no text (what a model thought) are left out."""
    content = choice["message"].get("content") or ""
    if isinstance(content, list):
        content = "".join([part["text"] for part in content if part["type"] == "text"])
    if not isinstance(content, str):
        raise TypeError("no text")
    return content


def _thinks(choice: dict) -> bool:
    """Whether what is said is a thought, in the text or, where the endpoint takes thoughts out, in place of one."""
    message, text = choice["message"], _text(choice)
    return bool(THOUGHT.search(text) or (not text and (message.get("reasoning_content") or message.get("reasoning"))))


def _counts(usage: Any) -> dict[str, int]:
    usage = usage if isinstance(usage, dict) else {}
    names = {"prompt_tokens": "prompt_tokens", "tokens": "completion_tokens"}
    return {ours: token_count(usage.get(name)) for ours, name in names.items()}


def _limited(response: Any, most: int) -> Any:
    """A streamed response as a whole one, read to `most` bytes: a small one may be gigabytes when it is unpacked."""
    content = bytearray()
    try:
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > most:
                raise _TooLong(f"an answer of more than {most / 2**20:.1f} MiB, which is not read")
    finally:
        response.close()
    headers = response.headers.copy()
    headers.pop("content-encoding", None)
    return type(response)(response.status_code, headers=headers, content=bytes(content), request=response.request)


def _host(base_url: str, location: str | None) -> str:
    """Where a redirect points: scheme, host and port, without path and user."""
    with suppress(ValueError):
        url = urlsplit(urljoin(base_url, location or "mailto:"))
        if url.hostname and re.fullmatch(r"[\w.:-]+", url.hostname):
            host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
            return f"{url.scheme}://{host}" + (f":{url.port}" if url.port else "")
    return "somewhere else"


def _retry_after(headers: Any) -> float:
    """Seconds that the endpoint asks to wait, 0 where it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
