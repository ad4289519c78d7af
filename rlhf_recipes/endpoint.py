"""An endpoint that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, a hosted one): its address, its key, and what it
answers, or in a few words why not."""

import email.utils
import functools
import json
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

    Attributes:
        host: with its port.
        closed: set when the connections were shut down.
        failures: in a row, of all requests; `named`: what it called the model in the last answer that was taken;
            `is_out`, `looked_at`: whether it is left out of several, and since when, or when it was looked for last.
            Kept by who asks.

    Raises:
        Refusal: the variable is not set.
    """

    def __init__(self, base_url: str, api_key_env: str | None = None, timeout: float = 120.0):
        self.base_url, self.host = base_url, URL.fullmatch(base_url)[1]
        self.api_key_env, self._timeout = api_key_env, timeout
        self._key = os.environ.get(api_key_env, "").strip() if api_key_env else ""
        if api_key_env and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise Refusal(f"{api_key_env}: not set, or not a key. export {api_key_env}=<the key for {self.host}>.")
        self.failures, self.is_out, self.looked_at = 0, False, 0.0
        self.named: str | None = None
        self.closed, self._lock = threading.Event(), threading.Lock()
        self._connections: set[_Connection] = set()
        self._free: list[_Connection] = []

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
        import httpx2

        url = path if urlsplit(path).scheme else self.base_url.rstrip("/") + path
        try:
            with self._connection() as connection:
                status, headers, told = connection.told(url, body, most, timeout or self._timeout)
            if not 200 <= status < 300:
                failure = self._refused(status, headers, told)
            else:
                return told if words else json.loads(told)
        except _TooLong as error:
            failure = Failure(str(error), final=True)
        except httpx2.TimeoutException:
            failure = Failure("no answer in time", late=True)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError):
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
        told = told.replace(self._key, "<secret>") if self._key else told
        return redact(" ".join(text.line(told).split()))

    def renewed(self) -> "Endpoint":
        """With other connections."""
        other = Endpoint(self.base_url, self.api_key_env, self._timeout)
        other.is_out, other.looked_at, other.named = self.is_out, self.looked_at, self.named
        return other

    def close(self) -> None:
        with self._lock:
            self.closed.set()
            free, self._free = self._free, []
            for connection in self._connections:
                connection.shut_down()
        for connection in free:
            connection.client.close()

    @contextmanager
    def _connection(self) -> Iterator["_Connection"]:
        """One that no other thread uses, for a request.

        Raises:
            OSError: they were shut down.
        """
        with self._lock:
            if self.closed.is_set():
                raise ConnectionAbortedError
            connection = self._free.pop() if self._free else _Connection(self._key)
            self._connections.add(connection)
        try:
            yield connection
        finally:
            with self._lock:
                is_kept = not self.closed.is_set()
                if is_kept:
                    self._free.append(connection)
            if not is_kept:
                connection.client.close()

    def _refused(self, status: int, headers: Any, told: str) -> Failure:
        with suppress(ValueError, AttributeError, RecursionError):
            content = json.loads(told)
            message = content.get("error", content)
            message = message if isinstance(message, str) else message.get("message")
            told = message if isinstance(message, str) else told
        points_to = _host(self.base_url, headers.get("location")) if 300 <= status < 400 else ""
        return Failure(
            f"status {status}", status=status, told=self.plain(told), wait=retry_after(headers), points_to=points_to
        )


class _Connection:
    """A client for one request at a time. One that many threads share looks, for each request, at all the connections
    that it holds."""

    def __init__(self, key: str):
        import httpx2

        headers = {"User-Agent": "rlhf-recipes"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.client = httpx2.Client(verify=_trusted(), headers=headers, follow_redirects=False)
        self._socket: socket.socket | None = None
        self._until, self._is_shut = math.inf, False

    def told(self, url: str, body: dict | None, most: int, timeout: float) -> tuple[int, Any, str]:
        """Status, headers and text of an answer, of `most` bytes unpacked, in so many seconds."""
        import httpx2

        self._until = time.monotonic() + timeout
        limit = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        asked = {"json": body} if body is not None else {}
        method, extensions = "GET" if body is None else "POST", {"trace": self._note}
        content = bytearray()
        with self.client.stream(method, url, timeout=limit, extensions=extensions, **asked) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > most:
                    raise _TooLong(f"an answer of more than {most / 2**20:.1f} MiB, which is not read")
        return response.status_code, response.headers, content.decode("utf-8", "replace")

    def shut_down(self) -> None:
        self._is_shut = True
        with suppress(OSError, AttributeError):  # it is closed, or TLS has taken it over; or there is none
            self._socket.shutdown(socket.SHUT_RDWR)

    def _note(self, event: str, info: dict) -> None:
        """The steps of a request, as httpx tells of them."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            stream = info["return_value"]
            stream.read = self._in_time(stream.read)
            self._socket = stream.get_extra_info("socket")
            if self._is_shut:
                self.shut_down()

    def _in_time(self, read: Callable) -> Callable:
        """What reads from a connection, until its request has had its time: httpx's own limit begins anew with each
        byte."""

        def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
            left = self._until - time.monotonic()
            return read(max_bytes, max(left if timeout is None else min(left, timeout), 1e-3))

        return read_in_time


@functools.cache
def _trusted() -> Any:
    """The certificates that all connections trust: to read them takes longer than a request."""
    import httpx2

    return httpx2.create_ssl_context()


class _TooLong(ValueError):
    """An answer goes on beyond its limit."""


def pause(attempt: int, wait: float, chance: random.Random) -> float:
    """Seconds between an attempt, from 1, and the next: what is asked for, and a share of a growing backoff."""
    return wait + chance.uniform(0, min(BACKOFF_CAP, BACKOFF_SECONDS * 2 ** (attempt - 1)))


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
