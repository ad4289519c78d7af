"""SIGTERM and SIGUSR1, by which Slurm, a spot machine or a container's host takes a machine back.

A training ends after the step at hand, with a checkpoint; anything else at once. The exit status is 75, and the same
command goes on: a batch script requeues by it.

And SIGALRM, which ends what somebody else's file makes this process compute.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlhf_recipes import ranks
from rlhf_recipes.errors import Refusal

EXIT = 75  # EX_TEMPFAIL of <sysexits.h>: the same command, later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class TakenBack(KeyboardInterrupt):
    """The process was told to end; it says so in one line, with the exit status `EXIT`."""


_training = False
_told: signal.Signals | None = None
# Of submitit, which puts the job into the queue again.
_requeue = None


def listen() -> None:
    """End by these signals as this module says, from here on.

    In a job of submitit its own signal is one of them: its handler comes after ours, and puts the job into the queue
    again. SIGTERM is nothing there, since its own follows.
    """
    global _requeue
    for number in (*SIGNALS, signal.SIGUSR2):
        before = signal.getsignal(number)
        if getattr(before, "__name__", "") == "checkpoint_and_try_requeue":
            _requeue = before
        elif before is not signal.SIG_DFL or number not in SIGNALS:
            continue
        signal.signal(number, _hear)


def train(yes: bool) -> None:
    """Say that a training begins, which ends between two steps alone, or has ended."""
    global _training
    _training = yes
    if not yes and _told:
        end("The training was over.")


def ignore() -> None:
    """The end of this process is under way: a second signal, such as a launcher sends to all when one has ended,
    changes nothing about what it says and its exit status. Ctrl-C is one of them where there are several processes:
    the terminal sends it, and torchrun again."""
    numbers = [*SIGNALS]
    with suppress(Refusal):  # there is no telling how many
        numbers += [signal.SIGINT] if ranks.world_size() > 1 else []
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def end_at_once(code: int) -> None:
    """All is said, and libraries end what they began: Ctrl-C once more ends this process with the same exit status,
    not with a traceback of whatever it meets."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))


def told() -> bool:
    """Whether any of the processes of this run was told to end; each of them asks after the same step."""
    return any(ranks.gather([_told is not None]))


def end(state: str) -> None:
    """End this process.

    Raises:
        TakenBack: says `state`.
    """
    ignore()
    said = f"Ended by {_told.name}. {state}" if _told else f"Ended. {state}"
    if _requeue:
        print(said, file=sys.stderr, flush=True)
        _requeue(signal.SIGUSR2, None)  # the first process ends here
        signal.pause()  # the others must not end the job before it is in the queue
    raise TakenBack(f"{said} The same command goes on.")


def _hear(number: int, frame) -> None:
    global _told
    _told = signal.Signals(number)
    if not _training:
        end("What was done before is kept.")


def exit_status(error: KeyboardInterrupt) -> int:
    return EXIT if isinstance(error, TakenBack) else 130


@contextmanager
def ended(seconds: float, says: str) -> Iterator[None]:
    """End what computes for longer: Python's own code, and a regular expression. A single call of another library is
    not interrupted, and in other threads, or on a system without timers, nothing is.

    Args:
        seconds: that this thread computes; what others take meanwhile is waited for.

    Raises:
        Refusal: `says`.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    begin, started = time.thread_time(), time.monotonic()

    def ring(*_) -> None:
        left = seconds - (time.thread_time() - begin)
        if left <= 0:
            raise Refusal(says)
        signal.setitimer(signal.ITIMER_REAL, left)

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
