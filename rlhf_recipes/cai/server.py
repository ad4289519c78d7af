"""The backend `server`: any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, a hosted one).

Requests are sent one by one, `concurrency` of them at once: the endpoint batches. Each is in flight on a thread of its
own, so that the endpoint is busy while the caller writes what is answered.
"""

import email.utils
import math
import os
import queue
import random
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from typing import Any

from rlhf_recipes.cai.backend import Answer, Request
from rlhf_recipes.progress import Line
from rlhf_recipes.secrets import redact

CONNECT_SECONDS = 10.0  # at most, to connect; also how long a caller that stops early may have to wait
BACKOFF_SECONDS, BACKOFF_CAP = 1.0, 30.0  # the first wait at most, doubled with each attempt, and the last
LONGEST_WAIT = 600.0  # seconds; an endpoint that asks for more (a day's quota) is not waited for
BACKLOG = 4  # answers that wait for the caller, per request in flight; a caller that stops asking stops the rest
CHOICE_TOKENS = 8  # of a choice: some models put a space, a bracket or "The answer is" before the letter
TOP_LOGPROBS = (20, 5, 0)  # asked for in this order, until the endpoint takes it; 0: none
VOTE = 0.99  # probability of the option that a text without log-probabilities names; the others share the rest
LOWEST = -9999.0  # what servers write for a log-probability of minus infinity
AROUND = " \t\r\n▁Ġ()[].,:*`'\"‘’“”"  # what may stand around an option within its token


class Server:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        base_url: the endpoint's, which mostly ends in /v1.
        model: as the endpoint calls it.
        api_key_env: environment variable that holds the key; None: the endpoint wants none.
        concurrency: requests in flight, at most 1,000.
        timeout: seconds that a request waits for the endpoint to answer.
        max_attempts: times that a request is sent before the run ends.

    Raises:
        ValueError: the openai package is missing, the URL is none or holds a secret, or the variable is not set.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 120,
        max_attempts: int = 6,
    ):
        try:
            import openai  # noqa: F401
        except ImportError:
            raise ValueError('The server backend needs openai. pip install "rlhf-recipes[server]".') from None
        url = re.fullmatch(r"https?://(([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?)(/[^\s?#@]*)?", base_url)
        if not url:
            raise ValueError("base_url: must be like http://localhost:8000/v1; a key goes where api_key_env says.")
        if not (1 <= concurrency <= 1000 and timeout > 0 and max_attempts >= 1):
            raise ValueError("concurrency (at most 1000), timeout and max_attempts must be above 0. Change them.")
        self.base_url, self.model, self.api_key_env = base_url, model, api_key_env
        self.concurrency, self.timeout, self.max_attempts = concurrency, timeout, max_attempts
        self.name, self.host = f"{model} at {url[2]}", url[1]
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else "none"
        if not (self._key and self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"{api_key_env}: not set, or not a key. export {api_key_env}=<the key for {self.host}>.")
        self._connections = _Connections(base_url, self._key, timeout)
        self._lock, self._unsaid = threading.Lock(), threading.Lock()
        self._top_logprobs, self._repeats = TOP_LOGPROBS[0], 0

    def answer(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        """Answers as they come; those that are ready together are a group.

        A generation has `text`, `finished`, and `prompt_tokens` and `tokens` (0 where the endpoint does not count). A
        choice has `logps` and the counts: log-probabilities in nats of the first token that names an option, summed
        over its variants ("A", " A", "(A"). An option that is not listed there lies below the lowest that is, and gets
        that less 1. Without log-probabilities, the option that the text names gets log 0.99. The `prefix` of a choice
        is not sent: few chat endpoints continue one.

        Raises:
            ValueError: refused, or `max_attempts` times without an answer; after what was answered is yielded.
        """
        todo = [request for request in requests if request.key not in known]
        if any(request.prefix and not request.options for request in todo):
            raise ValueError("The server backend cannot begin a model's answer for it: a generation has no prefix.")
        line = Line(what, len(requests), len(requests) - len(todo))
        pending, ready, room = iter(todo), queue.SimpleQueue(), threading.Semaphore(BACKLOG * self.concurrency)
        if self._connections.closed.is_set():  # an earlier call was not heard out
            self._connections = _Connections(self.base_url, self._key, self.timeout)
        connections = self._connections

        def work() -> None:
            try:
                while room.acquire() and not connections.closed.is_set():
                    with self._lock:
                        request = next(pending, None)
                    if request is None:
                        break
                    ask = self._choice if request.options else self._generation
                    ready.put((request, ask(connections, request)))
                ready.put(None)
            except BaseException as error:
                ready.put(error)
                connections.close()  # the other threads end too

        threads = [threading.Thread(target=work, name="endpoint", daemon=True) for _ in todo[: self.concurrency]]
        done, running, failures = line.first, len(threads), []
        try:
            for thread in threads:
                thread.start()
            while running:
                news = [ready.get()]
                while not ready.empty():
                    news.append(ready.get())
                group = [pair for pair in news if isinstance(pair, tuple)]
                running -= len(news) - len(group)
                failures += [error for error in news if isinstance(error, BaseException)]
                if group:
                    yield group
                    room.release(len(group))
                    done += len(group)
                    line.update(done, f"{self._repeats} sent again" if self._repeats else "")
            if failures:
                raise failures[0]
        finally:
            if running:  # the caller stops early
                connections.close()
                room.release(self.concurrency)
            for thread in threads:
                if thread.ident:  # it was started
                    thread.join()

    def _generation(self, connections: "_Connections", request: Request) -> Answer:
        def read(choice: dict) -> Answer:
            return {"text": _text(choice), "finished": choice.get("finish_reason") == "stop"}

        sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        return self._post(connections, request, read, max_tokens=request.max_new_tokens, **sampling)

    def _choice(self, connections: "_Connections", request: Request) -> Answer:
        def read(choice: dict) -> Answer:
            tokens = (choice.get("logprobs") or {}).get("content") or []
            if any(token.get("top_logprobs") for token in tokens):
                return {"logps": logps(tokens, request.options)}
            if _text(choice) and self._unsaid.acquire(blocking=False):
                print(f"{self.host} gives no log-probabilities: options are read from the text.", file=sys.stderr)
            return {"logps": vote(_text(choice), request.options)}

        for top in [count for count in TOP_LOGPROBS if count <= self._top_logprobs]:
            asked = {"logprobs": True, "top_logprobs": top} if top else {}
            try:
                answer = self._post(connections, request, read, max_tokens=CHOICE_TOKENS, temperature=0, **asked)
            except _Rejected:
                if not top:
                    raise
            else:
                self._top_logprobs = min(self._top_logprobs, top)
                return answer

    def _post(self, connections: "_Connections", request: Request, read: Callable[[dict], Answer], **body) -> Answer:
        """What `read` finds in the first choice of the response, and the counts; sent again where that may help."""
        import openai

        body = {"model": self.model, "messages": request.messages, **body}
        chance = random.Random(request.key)
        for attempt in range(1, self.max_attempts + 1):
            status, wait = 0, 0.0
            try:
                response = connections.client.post("/chat/completions", body=body, cast_to=object)
                usage = response.get("usage") or {}
                counts = {"prompt_tokens": "prompt_tokens", "tokens": "completion_tokens"}
                return read(response["choices"][0]) | {ours: usage.get(name) or 0 for ours, name in counts.items()}
            except openai.APITimeoutError:
                failure, advice = f"no answer in time (timeout={self.timeout:g})", "Raise timeout or lower concurrency"
            except openai.APIConnectionError:
                failure, advice = "no connection", "See that it runs and that base_url is right"
            except openai.APIStatusError as error:
                status, told, wait = error.status_code, error.response.text, _retry_after(error.response.headers)
                failure, advice = f"status {status}", "Lower concurrency" if status == 429 else "See its log"
            except (ValueError, TypeError, LookupError, AttributeError):  # read as a chat completion, it is none
                failure, advice = "no chat completion in its answer", "See that base_url is right"
            # Raised here, not above, no error has one of the client's, which hold the key, as its context.
            if status and status not in (408, 409, 429) and status < 500:
                raise self._refusal(status, told)
            if wait > LONGEST_WAIT:
                advice = f"It asks for a pause of {wait:.0f} s: wait"
            if attempt == self.max_attempts or wait > LONGEST_WAIT or connections.closed.is_set():
                raise ValueError(
                    f"{self.host}: {failure} (attempt {attempt}). {advice}, then run the same command again; what was "
                    "answered is kept."
                )
            with self._lock:
                self._repeats += 1
            pause = wait + chance.uniform(0, min(BACKOFF_CAP, BACKOFF_SECONDS * 2 ** (attempt - 1)))
            connections.closed.wait(pause)

    def _refusal(self, status: int, told: str) -> ValueError:
        told = " ".join((told.replace(self._key, "<secret>") if self.api_key_env else told).split())
        if status in (400, 422) or "logprobs" in told:
            return _Rejected(f"{self.host}: status {status}, it does not take the request: {redact(told)[:200]}")
        if status in (401, 403):
            key = f"the key in {self.api_key_env}" if self.api_key_env else "requests without a key"
            return ValueError(f"{self.host}: status {status}, it does not take {key}. Check api_key_env.")
        known = f"no model {self.model!r} there" if status == 404 else redact(told)[:200]
        return ValueError(f"{self.host}: status {status}, {known}. Check model and base_url.")


class _Rejected(ValueError):
    """The endpoint does not take the request as it is."""


class _Connections:
    """The client and its sockets: shutting one down is what ends a request that another thread waits for."""

    def __init__(self, base_url: str, key: str, timeout: float):
        import openai

        def watch(request: Any) -> None:
            request.extensions["trace"] = self._note  # httpx then tells of each step of the request

        self.closed = threading.Event()
        self._sockets, self._lock = weakref.WeakSet(), threading.Lock()
        self.client = openai.OpenAI(
            base_url=base_url,
            api_key=key,
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [watch]}),
        )

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


def logps(tokens: list[dict], options: tuple[str, ...]) -> list[float] | None:
    """Log-probability in nats of each option at the first token that names one; None without such a token.

    Args:
        tokens: `choices[0].logprobs.content` of a response.
    """
    for token in tokens:
        if token["token"].strip(AROUND) in options and token["top_logprobs"]:
            listed = [(other["token"].strip(AROUND), max(other["logprob"], LOWEST)) for other in token["top_logprobs"]]
            lowest = min(logp for _, logp in listed)
            own = [[logp for name, logp in listed if name == option] for option in options]
            return [_log_sum(found) if found else lowest - 1 for found in own]
    return None


def vote(text: str, options: tuple[str, ...]) -> list[float] | None:
    """Log-probabilities that stand for a text which names one option; None where it names none or several."""
    named = set(re.findall(rf"(?<![^\W_])({'|'.join(map(re.escape, options))})(?![^\W_])", text))
    if len(named) != 1:
        return None
    return [math.log(VOTE if option in named else (1 - VOTE) / (len(options) - 1)) for option in options]


def _log_sum(logps: list[float]) -> float:
    return max(logps) + math.log(sum(math.exp(logp - max(logps)) for logp in logps))


def _text(choice: dict) -> str:
    return choice["message"].get("content") or ""


def _retry_after(headers: Any) -> float:
    """Seconds that the endpoint asks to wait, 0 where it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        with suppress(ValueError, TypeError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
