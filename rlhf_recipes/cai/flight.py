"""Requests on their way: each on a thread of its own, from when it is put in until its answer is taken out.

Of several endpoints of a model a prompt's id chooses (rendezvous hashing, Thaler and Ravishankar 1998): what an engine
has kept of a prompt serves the next request about it, and only the prompts of an endpoint that is lost go elsewhere. A
thread whose endpoint has nothing left takes from the longest queue. An endpoint that is left out is looked for every
`LOOK_SECONDS`, and used again when it answers.
"""

import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import xxhash

from rlhf_recipes.cai.backend import Answer, Request

BACKLOG = 4  # answers that wait for the caller, per request in flight; a caller that stops asking stops the rest
LOOK_SECONDS = 60.0  # between two looks at an endpoint that is left out

Put = tuple[Any, Request]


class LeftOut(Exception):
    """An endpoint fails too often in a row; says how."""


@dataclass
class _Stop:
    """An endpoint of a server, the requests that wait for it, and the threads that send them."""

    server: Any
    endpoint: Any
    changed: threading.Condition
    waiting: deque[Put] = field(default_factory=deque)
    threads: list[threading.Thread] = field(default_factory=list)
    idle: int = 0


class Flight:
    """A context, within which requests are under way.

    Args:
        servers: `server.Server`, each with its `concurrency` at each of its endpoints.

    Attributes:
        left: requests that are not answered.
    """

    def __init__(self, *servers: Any):
        lock = threading.Lock()
        self._lock, self._ended, self._ready = lock, False, queue.SimpleQueue()
        self._stops = {
            server: [_Stop(server, endpoint, threading.Condition(lock)) for endpoint in server.connected()]
            for server in servers
        }
        self._places = sum(server.places for server in servers)
        self._room = threading.Semaphore(BACKLOG * self._places)
        self.left = self._running = self._taken = 0  # not yet answered; threads; answers that the caller works on
        self._failures: list[BaseException] = []

    def __enter__(self) -> "Flight":
        with self._lock:
            for stop in self._all():
                if stop.endpoint.is_out:
                    self._start(stop)  # to look for it
        return self

    def __exit__(self, *_) -> None:
        self._end(hang_up=bool(self.left))
        for stop in self._all():
            if stop.endpoint.is_out:  # it may be looked at
                stop.endpoint.close()
            for thread in stop.threads:
                if thread.ident:  # it was started
                    thread.join()

    def put(self, server: Any, request: Request, tag: Any = None) -> None:
        """Send a request to one of the servers; `tag` comes back with its answer."""
        with self._lock:
            self.left += 1
            self._route(server, (tag, request))

    def take(self) -> list[tuple[Any, Request, Answer]]:
        """What is answered, some at least; only where something is under way.

        Raises:
            BaseException: what ended a thread, when all that was answered is taken.
        """
        if self._taken:
            self._room.release(self._taken)
        while self._running or not self._failures:
            news = [self._ready.get()]
            while not self._ready.empty():
                news.append(self._ready.get())
            group = [each for each in news if isinstance(each, tuple)]
            self._failures += [each for each in news if isinstance(each, BaseException)]
            self._taken = len(group)
            with self._lock:
                self.left -= len(group)
                self._running -= len(news) - len(group)
            if group:
                return group
        raise self._failures[0]

    def _all(self) -> list[_Stop]:
        return [stop for stops in self._stops.values() for stop in stops]

    def _end(self, hang_up: bool) -> None:
        with self._lock:
            self._ended = True
            for stop in self._all():
                stop.changed.notify_all()
        if hang_up:
            for stop in self._all():
                stop.endpoint.close()
        self._room.release(self._places)

    def _start(self, stop: _Stop) -> None:
        thread = threading.Thread(target=self._work, args=(stop,), name="endpoint", daemon=True)
        stop.threads.append(thread)
        self._running += 1
        thread.start()

    def _route(self, server: Any, put: Put) -> None:
        """To the endpoint of its prompt, and to a thread: one of its own, or of another that has nothing to do."""
        living = [stop for stop in self._stops[server] if not stop.endpoint.is_out]
        own = living[0]
        if len(living) > 1:
            own = max(living, key=lambda stop: _weight(stop.endpoint.base_url, put[1].prompt_id))
        own.waiting.append(put)
        for stop in (own, *living):
            if len(stop.waiting) <= stop.idle - (stop is not own):
                return stop.changed.notify()
            if len(stop.threads) < server.concurrency:
                return self._start(stop)

    def _work(self, stop: _Stop) -> None:
        """A thread: it makes each request ready with its answer, then None, or the error that ends all threads."""
        try:
            while self._room.acquire() and (put := self._next(stop)):
                try:
                    answer = stop.server.taken(stop.endpoint, put[1])
                except LeftOut as error:
                    self._room.release()
                    self._leave_out(stop, put, str(error))
                else:
                    self._ready.put((*put, answer))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
            self._end(hang_up=True)

    def _next(self, stop: _Stop) -> Put | None:
        """What a thread sends next; None at the end."""
        with self._lock:
            while not self._ended:
                seconds = None
                if not stop.endpoint.is_out:
                    longest = max(self._stops[stop.server], key=lambda other: len(other.waiting))
                    if queued := stop.waiting or longest.waiting:
                        return queued.popleft()
                elif (seconds := stop.endpoint.looked_at + LOOK_SECONDS - time.monotonic()) <= 0:
                    stop.endpoint.looked_at = time.monotonic()
                    self._look(stop)
                    continue
                stop.idle += 1
                stop.changed.wait(seconds)
                stop.idle -= 1
        return None

    def _look(self, stop: _Stop) -> None:
        """Use an endpoint again where it answers. The lock is held, but while it is looked at."""
        self._lock.release()
        try:
            is_back = stop.server.is_back(stop.endpoint)
        finally:
            self._lock.acquire()
        if is_back and stop.endpoint.is_out and not self._ended:
            print(f"{stop.endpoint.host}: answers, and is used again.", file=sys.stderr)
            stop.endpoint.is_out, stop.endpoint.failures = False, 0
            self._route_again(self._stops[stop.server])

    def _leave_out(self, stop: _Stop, put: Put, why: str) -> None:
        """An endpoint that is the last is not: a request that fails there ends the run."""
        stops = self._stops[stop.server]
        with self._lock:
            if not stop.endpoint.is_out and sum(not each.endpoint.is_out for each in stops) > 1:
                stop.server.leave_out(stop.endpoint, why)
                self._route_again([stop])
            self._route(stop.server, put)

    def _route_again(self, stops: list[_Stop]) -> None:
        moved = [put for stop in stops for put in stop.waiting]
        for stop in stops:
            stop.waiting.clear()
        for put in moved:
            self._route(stops[0].server, put)


def _weight(base_url: str, prompt_id: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{base_url} {prompt_id}".encode("utf-8", "replace"))
