"""Works of many prompts at one time: each goes on when what it asked is answered, so that endpoints always have work.

As many prompts are under way as keep each place of the generator's endpoints busy, twice; another begins when one
ends. A constant number does not swing as a limit on what waits would (CONWIP, Spearman, Woodruff and Hopp 1990): what
the slower of two models cannot take waits for it. Nothing else grows with the number of prompts.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.cai.backend import Answer, Ask, Journal, Request, Work
from rlhf_recipes.cai.flight import Flight

AHEAD = 2  # prompts under way for each place at the generator


@dataclass
class _Shard:
    """Prompts whose answers share a journal.

    Attributes:
        works: those that wait for the answer of a key.
        left: prompts that are not done.
    """

    path: Path
    journal: Journal
    records: list[Any]
    left: int
    works: dict[str, list["_Going"]] = field(default_factory=dict)


@dataclass
class _Going:
    """A prompt under way: its place in the shard, what it asked last, and how many keys of that are unanswered."""

    shard: _Shard
    place: int
    work: Work
    asked: Ask
    missing: int = 0


class Overlap:
    """Makes shards of endpoints' answers.

    Args:
        work: of a row.
        write: the records of a shard, when it is complete.
        servers: that are asked; the first is the generator.

    Attributes:
        done: prompts.
        in_flight: requests.
    """

    def __init__(self, work: Callable[[dict], Work], write: Callable[[Path, list], None], servers: Sequence[Any]):
        self.work, self.write, self.servers = work, write, servers
        self.done = self.in_flight = self._under_way = 0

    def run(self, shards: Iterable[tuple[Path, Iterable[dict]]]) -> Iterator[list[tuple[Request, Answer]]]:
        """Make the shards, with answers.jsonl beside each; yields what is answered as it comes."""
        most = AHEAD * self.servers[0].places
        with Flight(*self.servers) as flight:
            prompts = self._prompts(shards)
            while True:
                while self._under_way < most and (prompt := next(prompts, None)):
                    self._under_way += 1
                    self._start(flight, *prompt)
                if not self._under_way:
                    return
                groups = defaultdict(list)
                for shard, request, answer in flight.take():
                    groups[shard.path].append((shard, request, answer))
                for answered in groups.values():
                    shard = answered[0][0]
                    group = [(request, answer) for _, request, answer in answered]
                    shard.journal.write(group)
                    for request, _ in group:
                        self._heard(flight, shard, request.key)
                    self.in_flight = flight.left
                    yield group

    def _prompts(self, shards: Iterable[tuple[Path, Iterable[dict]]]) -> Iterator[tuple[_Shard, int, dict]]:
        for path, rows in shards:
            rows = list(rows)
            shard = _Shard(path, Journal(path.parent / "answers.jsonl"), [None] * len(rows), len(rows))
            yield from ((shard, place, row) for place, row in enumerate(rows))

    def _start(self, flight: Flight, shard: _Shard, place: int, row: dict) -> None:
        work = self.work(row)
        self._go_on(flight, _Going(shard, place, work, next(work)))

    def _heard(self, flight: Flight, shard: _Shard, key: str) -> None:
        """Let the works that waited for nothing else go on."""
        for going in shard.works.pop(key):
            going.missing -= 1
            if not going.missing:
                self._go_on(flight, going)

    def _go_on(self, flight: Flight, going: _Going) -> None:
        """Until an answer is missing, or all is done."""
        shard = going.shard
        while not self._sent(flight, going):
            try:
                going.asked = going.work.send([shard.journal.answers[each.key] for each in going.asked.requests])
            except StopIteration as ended:
                shard.records[going.place] = ended.value
                shard.left -= 1
                self._under_way -= 1
                self.done += 1
                if not shard.left:
                    self.write(shard.path, shard.records)
                return

    def _sent(self, flight: Flight, going: _Going) -> int:
        """How many of the answers asked for are missing; they are sent for."""
        shard = going.shard
        missing = {each.key: each for each in going.asked.requests if each.key not in shard.journal.answers}
        for key, request in missing.items():
            if key not in shard.works:
                flight.put(going.asked.backend, request, shard)
            shard.works.setdefault(key, []).append(going)
        going.missing = len(missing)
        return going.missing
