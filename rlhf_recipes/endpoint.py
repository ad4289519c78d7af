"""An endpoint that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, a hosted one): its address, its key, and what it
answers, or in a few words why not."""

import email.utils
import json
import math
import os
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

from rlhf_recipes import text
from rlhf_recipes.errors import Refusal
from rlhf_recipes.secrets import redact

CONNECT_SECONDS = 10.0  # at most, to connect; also how long a caller that stops early may have to wait
BACKOFF_SECONDS, BACKOFF_CAP = 1.0, 30.0  # the first wait at most, doubled with each attempt, and the last
ANSWER_BYTES = 2**20  # of an answer, decompressed, at most
TOLD = 200  # characters of an endpoint's own words, in a message
URL = re.compile(r"https?://(([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?)(/[^\s?#@]*)?")


class Failure(Exception):
    """A request without an answer: in words, "no connection" or "status 500".

    Attributes:
        status: of HTTP, 0 where none came.
        told: the endpoint's own words, on one line, without secrets.
        wait: seconds that it asks to wait.
        points_to: where a redirect leads, which is not followed.
        late: the time was up.
        unread: an answer came that is no JSON.
        final: to ask again is of no use.
    """

    def __init__(self, says: str, *, status: int = 0, told: str = "", wait: float = 0.0, points_to: str = "",
                 late: bool = False, unread: bool = False, final: bool = False):  # fmt: skip
        super().__init__(says)
        self.status, self.told, self.wait, self.points_to = status, told, wait, points_to
        self.late, self.unread = late, unread
        self.final = final or (0 < status < 500 and status not in (408, 409, 429))


def addresses(given: str | Sequence[str], role: str = "") -> list[str]:
    """The addresses of a `base_url`, which is one or a list.

    Args:
        role: the key above it, for messages.

    Raises:
        Refusal: one is none or holds a secret, or stands there twice.
    """
    where = f"{role}.base_url" if role else "base_url"
    several = isinstance(given, Sequence) and not isinstance(given, str)
    found = [str(address) for address in (given if several else [given])]
    if not found or not all(map(URL.fullmatch, found)):
        raise Refusal(f"{where}: must be like http://localhost:8000/v1; a key goes where api_key_env says.")
    if len({address.rstrip("/") for address in found}) < len(found):
        raise Refusal(f"{where}: names an endpoint twice. Leave one out.")
    return found


class Endpoint:
    """An address, and connections to it. Shutting them down is what ends a request that another thread waits for.

    It follows no redirect, which would send a prompt to whatever address an answer names, and reads no answer beyond
    the bytes that were asked for, nor beyond its time: a byte a minute would keep it reading for years.

    Args:
        api_key_env: environment variable that holds the key; None: the endpoint wants none.
        timeout: seconds that a request waits for the whole of an answer.
        who: needs the openai package, for a message.

    Attributes:
        host: with its port.
        closed: set when the connections were shut down.
        failures: in a row, of all requests; `named`: what it called the model in its last answer; `is_out`,
            `looked_at`: whether it is left out of several, and since when, or when it was looked for last. Kept by who
            asks.

    Raises:
        Refusal: the openai package is missing, or the variable is not set.
    """

    def __init__(self, base_url: str, api_key_env: str | None = None, timeout: float = 120.0,
                 who: str = "The server backend"):  # fmt: skip
        try:
            import openai
        except ImportError:
            raise Refusal(f'{who} needs openai. pip install "rlhf-recipes[server]".') from None
        self.base_url, self.host = base_url, URL.fullmatch(base_url)[1]
        self.api_key_env, self._timeout, self._who = api_key_env, timeout, who
        # Without a key something must be sent, which is none's secret.
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else "none"
        if not (self._key and self._key.isascii() and self._key.isprintable()):
            raise Refusal(f"{api_key_env}: not set, or not a key. export {api_key_env}=<the key for {self.host}>.")
        self.failures, self.is_out, self.looked_at = 0, False, 0.0
        self.named: str | None = None

        def watch(request: Any) -> None:
            request.extensions["trace"] = self._note  # httpx then tells of each step of the request

        class Client(openai.DefaultHttpxClient):
            def send(client, request: Any, *, stream: bool = False, **kwargs) -> Any:
                return _limited(super().send(request, stream=True, **kwargs), self._asked.bytes)

        self.closed, self._asked = threading.Event(), threading.local()
        self._sockets, self._lock = weakref.WeakSet(), threading.Lock()
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key,
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            http_client=Client(event_hooks={"request": [watch]}, follow_redirects=False),
        )

    def ask(self, path: str, body: dict | None = None, *, words: bool = False, most: int = ANSWER_BYTES,
            timeout: float | None = None) -> Any:  # fmt: skip
        """What the endpoint answers, as JSON.

        Args:
            path: behind the address, or from its root where it has a scheme of its own.
            body: is posted; None: the path is got.
            words: a text is due, whatever it is.
            most: bytes of an answer.
            timeout: of this request.

        Raises:
            Failure: there is none.
        """
        import openai

        client = self._client.with_options(timeout=timeout) if timeout else self._client
        self._asked.bytes, self._asked.until = most, time.monotonic() + (timeout or self._timeout)
        try:
            told = client.get(path, cast_to=str) if body is None else client.post(path, body=body, cast_to=str)
            return told if words else json.loads(told)
        except _TooLong as error:
            failure = Failure(str(error), final=True)
        except openai.APITimeoutError:
            failure = Failure("no answer in time", late=True)
        except openai.APIStatusError as error:
            failure = self._refused(error.response)
        except openai.OpenAIError:
            failure = Failure("no connection")
        except (ValueError, RecursionError):
            failure = Failure("no JSON in its answer", unread=True)
        # Raised here, not above, no error has one of the client's, which hold the key, as its context.
        try:
            raise failure
        finally:
            del failure  # with its traceback it would keep this frame, and all that called

    def plain(self, told: str) -> str:
        """On one line, without secrets."""
        told = told.replace(self._key, "<secret>") if self.api_key_env else told
        return redact(" ".join(text.line(told).split()))

    def renewed(self) -> "Endpoint":
        """With other connections."""
        other = Endpoint(self.base_url, self.api_key_env, self._timeout, self._who)
        other.is_out, other.looked_at, other.named = self.is_out, self.looked_at, self.named
        return other

    def close(self) -> None:
        self.closed.set()
        with self._lock:
            for connected in self._sockets:
                with suppress(OSError):  # it is closed, or TLS has taken it over
                    connected.shutdown(socket.SHUT_RDWR)
        self._client.close()

    def _note(self, event: str, info: dict) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            stream = info["return_value"]
            stream.read = self._in_time(stream.read)
            with self._lock:
                self._sockets.add(stream.get_extra_info("socket"))
            if self.closed.is_set():
                self.close()

    def _in_time(self, read: Callable) -> Callable:
        """What reads from a connection, until the request of this thread has had its time: httpx's own limit begins
        anew with each byte."""

        def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
            left = getattr(self._asked, "until", math.inf) - time.monotonic()
            left = left if timeout is None else min(left, timeout)
            return read(max_bytes, None if left == math.inf else max(left, 1e-3))

        return read_in_time

    def _refused(self, response: Any) -> Failure:
        told, headers = response.text, response.headers
        with suppress(ValueError, AttributeError, RecursionError):
            content = json.loads(told)
            message = content.get("error", content)
            message = message if isinstance(message, str) else message.get("message")
            told = message if isinstance(message, str) else told
        status = response.status_code
        points_to = _host(self.base_url, headers.get("location")) if 300 <= status < 400 else ""
        return Failure(
            f"status {status}", status=status, told=self.plain(told), wait=retry_after(headers), points_to=points_to
        )


class _TooLong(ValueError):
    """An answer goes on beyond its limit."""


def pause(attempt: int, wait: float, chance: random.Random) -> float:
    """Seconds between an attempt, from 1, and the next: what is asked for, and a share of a growing backoff."""
    return wait + chance.uniform(0, min(BACKOFF_CAP, BACKOFF_SECONDS * 2 ** (attempt - 1)))


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


def retry_after(headers: Any) -> float:
    """Seconds that the endpoint asks to wait, 0 where it does not."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        with suppress(ValueError, TypeError, OverflowError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
