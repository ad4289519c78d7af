"""People as the judge: what waits for them, and what they said.

A person sees a pair under one principle, drawn for its prompt. p is the mean over people of what each said of it (1,
0, 1/2 for a tie, repetitions averaged), `spread` their standard deviation, `flip` that most of those who saw both
orders chose by the place. A pair that everybody skipped, or that people are not shown, is not answered.
"""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import ranks, secrets
from rlhf_recipes.cai import dataset, gate
from rlhf_recipes.cai.backend import Backend, Journal, Message, Work
from rlhf_recipes.cai.constitution import Constitution
from rlhf_recipes.cai.judge import Judge, Judgement, Pair
from rlhf_recipes.cai.make_pairs import PairMaker
from rlhf_recipes.commands import command
from rlhf_recipes.data import readers
from rlhf_recipes.data.formats import pair_id
from rlhf_recipes.errors import Refusal
from rlhf_recipes.overrides import written
from rlhf_recipes.run import GATE, Run
from rlhf_recipes.run_folder import read_result, write_atomically
from rlhf_recipes.signals import TakenBack

WAITING, JUDGEMENTS = "to_label.jsonl", "judgements.jsonl"


def check(cfg: DictConfig) -> None:
    """Refuse what people cannot be asked for.

    Raises:
        Refusal: a gate alone, or a part of the run.
    """
    if cfg.gate.only:
        raise Refusal("gate.only=true: asks a model what it is worth. Leave it out with judge=people.")
    if cfg.shards:
        raise Refusal(f"shards={cfg.shards}: people label the whole run. Leave it out with judge=people.")


def unfit(prompt: list[Message], first: str, second: str, held: dict[str, str] | None = None) -> str | None:
    """Why people are not shown two replies, `empty`, `identical` or `secret`; or None.

    Args:
        held: `secrets.in_environment`, for many pairs.
    """
    if not first.strip() or not second.strip():
        return "empty"
    if first.strip() == second.strip():
        return "identical"
    texts = (first, second, *(turn["content"] for turn in prompt))
    return "secret" if any(secrets.find(text, held) for text in texts) else None


class People:
    """With the interface of `judge.Judge`, as far as pairs are made with it."""

    places = 0

    def __init__(self, cfg: DictConfig, constitution: Constitution, families: dict[str, str | None]):
        self.labels, self.constitution, self.seed, self.families = cfg.judge.labels, constitution, cfg.seed, families
        self.backend, self.name, self.waiting = self, "people", {}
        self.result = ranks.by_first(read_result, Path(self.labels)) or {}
        self.said: dict[str, dict[str, list[dict]]] = ranks.by_first(self._read)

    def comparing(self, pairs: list[Pair], what: str) -> Work:
        yield from ()
        return [self._judgement(pair) for pair in pairs]

    def unclear(self, verdict: Judgement, limits: Any) -> str | None:
        """`Judge.unclear`, but that who chose by the place has not called the replies equal."""
        return "disputed" if verdict.flip else Judge.unclear(self, verdict, limits)

    def finished(self) -> bool:
        """Whether people are done with what waits."""
        done = self.result.get("labels", {}).get("pairs", 0)
        return done >= len(self.waiting) and self.said.keys() <= self.waiting.keys()

    def write(self, path: Path) -> None:
        """What waits, as recipes/label.py reads it."""
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.waiting.values()))

    def _judgement(self, pair: Pair) -> Judgement:
        if unfit(pair.prompt, pair.first, pair.second):
            return Judgement(None)
        name = pair_id(pair.prompt_id, pair.first, pair.second)
        [principle] = self.constitution.draw(1, self.seed, "judge", pair.prompt_id)
        self.waiting.setdefault(name, {
            "id": name, "prompt_id": pair.prompt_id, "family": self.families.get(pair.prompt_id),
            "prompt": pair.prompt, "first": pair.first, "second": pair.second, "principle": principle.id,
            "question": principle.judgement,
        })  # fmt: skip
        said = self.said.get(name)
        if not said:
            return Judgement(None)
        p = [
            fmean(row["p"] if row["first"].strip() == pair.first.strip() else 1 - row["p"] for row in rows)
            for rows in said.values()
        ]
        flips = [
            any(row["flip"] for row in rows) for rows in said.values() if any(row["flip"] is not None for row in rows)
        ]
        return Judgement(
            p=fmean(p), by_principle={principle.id: fmean(p)}, spread=pstdev(p), mass=1.0,
            flip=sum(flips) * 2 > len(flips),
        )  # fmt: skip

    def _read(self) -> dict[str, dict[str, list[dict]]]:
        """Pair -> person -> rows."""
        path, found = Path(self.labels) / JUDGEMENTS, {}
        if not path.is_file() or not path.stat().st_size:
            return found
        for where, row in readers.read_file(str(path)):
            try:
                name = pair_id(row["prompt_id"], row["first"], row["second"])
                p, person, _ = float(row["p"]), row["judge"], row["flip"]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise Refusal(f"{where}: is no judgement of recipes/label.py ({error!r:.80}). Restore it.") from error
            found.setdefault(name, {}).setdefault(person, []).append({**row, "p": p})
        return found


def make(
    run: Run, cfg: DictConfig, generator: Backend, principles: Constitution, rows: Sequence[dict],
    earlier: Iterable[tuple[list[Path], dict]],
) -> dict[str, Any]:  # fmt: skip
    """The pairs of a run, as entries of its result.

    Args:
        earlier: of `dataset.write`.

    Raises:
        TakenBack: they wait for people; the answers are kept, and the same command goes on.
    """
    ranks.by_first((run.dir / GATE).touch)  # from which an interrupted run goes on
    if not ranks.by_first((run.dir / WAITING).exists):  # which is written when all is answered
        gate.confirm(gate.estimate(cfg, list(cfg.sources), rows, generator, None))
    people = People(cfg, principles, {row["prompt_id"]: row["family"] for row in rows})
    maker = PairMaker(generator, people, principles, list(cfg.sources), cfg)
    folder, size = run.dir / "shards", cfg.shard_size
    for n, start in enumerate(range(0, len(rows), size)):
        maker.records(rows[start : start + size], Journal(folder / f"{n:05d}" / "answers.jsonl"), "")
    if not people.waiting:
        raise Refusal("judge=people: no pair of replies is left to label. Give more prompts, or loosen filters.")
    if not people.finished():
        people.write(run.dir / WAITING)
        raise TakenBack(_wait(run, people))
    shards = maker.shards(rows, folder)
    told = people.result["labels"]
    return {
        "main": people.result["main"], "people": told, "constitution": principles.summary(), "judge": people.name,
        "generator": generator.name, "labelled_by": "people", "judged_by": "people",
        "provenance": maker.provenance(), **dataset.write(shards, run.dir, maker.provenance(), earlier),
        "spent": maker.spent(run.dir / GATE, shards),
    }  # fmt: skip


def _wait(run: Run, people: People) -> str:
    place = Path(people.labels)
    where = [f"run_name={place.name}"] if place.parent == Path("outputs/label") else [f"hydra.run.dir={place}"]
    typed = f"{command('label')} {written('pairs', str(run.dir))} {shlex.join(where)}"
    return f"{len(people.waiting)} pairs wait for people, who label them with: {typed}. Then this command goes on."
