"""Rendering a chat template, which is a program that came with the model, in bounded time."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_recipes import text
from rlhf_recipes.errors import Refusal

SECONDS = 10.0  # of computing, for one conversation


def render(tokenizer, conversation: list, **kwargs) -> Any:
    """`tokenizer.apply_chat_template`, which ends after `SECONDS`.

    transformers renders in jinja2's sandbox: a template reaches no file and no attribute of Python's, but may loop. A
    rendering is ended in the main thread of a system that has timers; a single operation on a large text is not
    interrupted, nor is the memory limited that it takes.

    Raises:
        Refusal: it takes longer.
    """
    with _ended(f"the chat template of {text.line(tokenizer.name_or_path)}"):
        return tokenizer.apply_chat_template(conversation, **kwargs)


@contextmanager
def _ended(what: str) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    begin, started = time.thread_time(), time.monotonic()

    def ring(*_: Any) -> None:
        left = SECONDS - (time.thread_time() - begin)
        if left <= 0:
            raise Refusal(
                f"{what}: takes more than {SECONDS:g} s for a conversation. Mend it, or choose another model."
            )
        signal.setitimer(signal.ITIMER_REAL, left)  # others computed meanwhile

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
