"""The progress line: stage, step, what is measured, pace, ETA. In place on a terminal, every 10 s in a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator

from rlhf_recipes import ranks, text

LOG_SECONDS = 10


class Line:
    """One line about `total` steps of a stage; of several processes the first says it.

    Args:
        what: the stage; behind the pipeline's own stage where one is running.
        total: steps in all.
        done: steps that were done before, which the pace leaves out.
    """

    def __init__(self, what: str, total: int, done: int = 0):
        stage = os.environ.get("RLHF_RECIPES_STAGE", "")
        self.prefix = " ".join(part for part in (f"[{stage}]" if stage else "", what) if part)
        self.total, self.first, self.begin = total, done, time.monotonic()
        self.terminal, self.silent = sys.stderr.isatty(), not ranks.is_first()
        self.printed = self.begin

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are done."""
        moment, last = time.monotonic(), done >= self.total
        if self.silent or (not self.terminal and not last and moment - self.printed < LOG_SECONDS):
            return
        self.printed = moment
        pace = (moment - self.begin) / max(done - self.first, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self.total - done)))
        parts = [f"{self.prefix} {done}/{self.total}", note, f"{pace:.2f} s each", f"ETA {left}"]
        line = text.line(" · ".join(part for part in parts if part))
        print(f"\r\033[K{line}" if self.terminal else line, end="\n" if last or not self.terminal else "",
              file=sys.stderr, flush=True)  # fmt: skip


def batches(what: str, total: int, groups: Iterable[list]) -> Iterator[list]:
    """The groups, one after another, with a line that counts their members."""
    line, done = Line(what, total), 0
    for group in groups:
        yield group
        done += len(group)
        line.update(done)
