"""From prompts to judged pairs: draft, critique and revise, candidates, judge, route.

A shard is a folder with `answers.jsonl` (what models answered, as it came) and, when it is complete, `records.jsonl`:
one record a prompt, with everything that was said about it. Nothing of a shard stays in memory.

A model in this process works on a shard at a time, on all its prompts step by step: batches are made of what all of
them ask. Endpoints are kept busy by prompts that go on each by itself, those of the next shards among them.
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import ranks
from rlhf_recipes.cai import filters, fingerprint, prompt_templates
from rlhf_recipes.cai.backend import (
    Answer,
    Ask,
    Backend,
    Journal,
    Message,
    Request,
    Work,
    groups,
    in_step,
    token_count,
)
from rlhf_recipes.cai.constitution import Constitution
from rlhf_recipes.cai.judge import Judge, Judgement, Pair
from rlhf_recipes.cai.load import refuse_unread
from rlhf_recipes.cai.overlap import Overlap
from rlhf_recipes.config import part_of, plain
from rlhf_recipes.data.rows import select
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.overrides import of_this_run
from rlhf_recipes.progress import Line
from rlhf_recipes.run import GATE, Run
from rlhf_recipes.run_folder import write_atomically

# Of one prompt: `prompt_id`, `family`, `split`, `prompt`, `draft`, `steps`, `pairs`; see `PairMaker.record`.
Record = dict[str, Any]
SOURCES = ("revision", "on_policy", "contrastive")


def check(cfg: DictConfig, typed: Iterable[str] | None = None) -> None:
    """Refuse settings that no run can be made of.

    Args:
        typed: as `load.refuse_unread` takes them; None: those of this process.

    Raises:
        Refusal: an unknown kind of pairs, a count that is too small, a setting that is not read, or what the judge
            cannot have.
    """
    for source in cfg.sources:
        if source not in SOURCES:
            raise Refusal(f"sources=[{source}]: not one of {', '.join(SOURCES)}{nearest(str(source), SOURCES)}")
    least = {"shard_size": 1, "generate.max_new_tokens": 1, "revise.max_new_tokens": 1, "revise.n_revisions": 1,
             "generate.n_samples": 2, "judging.principles_per_pair": 1, "gate.pairs": 2}  # fmt: skip
    for key, value in least.items():
        given = OmegaConf.select(cfg, key)
        if given < value:
            raise Refusal(f"{key}={given}: must be at least {value}. Change it.")
    part_of(cfg.shards)
    if cfg.shards and cfg.publish:
        raise Refusal(f"publish=true: not with shards={cfg.shards}, a part. Give it to the command without shards.")
    if not cfg.sources:
        raise Refusal(f"sources=[]: makes no pairs. Choose from {', '.join(SOURCES)}.")
    if cfg.filters.min_words > cfg.filters.max_words:
        raise Refusal(f"filters.min_words={cfg.filters.min_words}: is over filters.max_words. Change one.")
    if "on_policy" in cfg.sources and cfg.generator.kind == "local" and cfg.generate.temperature == 0:
        raise Refusal(
            "generate.temperature=0: the samples of on_policy would be alike. Raise it, or set sources=[revision]."
        )
    for key in ("margin", "max_disagreement"):
        if cfg.judge.kind == "reward" and cfg.judge[key] < 0:
            raise Refusal(f"judge.{key}={cfg.judge[key]}: must be at least 0. Change it.")
    refuse_unread(cfg, typed=of_this_run() if typed is None else typed)


@dataclass
class PairMaker:
    """What turns prompts into records.

    Attributes:
        judge: None where its verdicts are not to be trusted: contrastive pairs then carry the label that they were
            made for.
        sources: which pairs are made, of `SOURCES`.
        settings: the config, conf/cai.yaml.
    """

    generator: Backend
    judge: Judge | None
    constitution: Constitution
    sources: list[str]
    settings: DictConfig
    seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self):
        self._seed, self._generate, self._revising, self._filters, self._limits = (
            self.settings.seed,
            *(plain(self.settings[key]) for key in ("generate", "revise", "filters", "route")),
        )

    def provenance(self) -> dict[str, Any]:
        """What every row says of where it comes from; the constitution, where somebody read it."""
        read = isinstance(self.judge, Judge) or {"revision", "contrastive"} & set(self.sources)
        return {
            "constitution": self.constitution.sha256 if read else None,
            "generator": self.generator.name,
            "judge": self.judge.backend.name if self.judge else None,
            "seed": self.settings.seed,
        }

    def spent(self, gate: Path, shards: list[Path]) -> dict[str, Any]:
        """Calls and tokens of the gate and all shards, whenever they were made; the pace of writing in this process;
        the cost."""
        calls: Counter = Counter()
        for path in (gate, *(shard.parent / "answers.jsonl" for shard in shards)):
            for entry in (entry for _, group in groups(path) for entry in group):
                _add(calls, entry["step"], entry["answer"] if isinstance(entry["answer"], dict) else {})
        usd = self._usd(calls)
        return {
            "calls": calls["generator"] + calls["judge"],
            "judged": calls["judge"],
            "prompt_tokens": calls["generator_prompt_tokens"] + calls["judge_prompt_tokens"],
            "completion_tokens": calls["generator_tokens"] + calls["judge_tokens"],
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "usd": None if usd is None else round(usd, 2),
        }

    def _usd(self, calls: Counter) -> float | None:
        """What counted calls cost; None where an endpoint has no price."""
        costs = [
            price(self.settings[kind], calls[f"{kind}_prompt_tokens"], calls[f"{kind}_tokens"])
            for kind in ("generator", "judge")
        ]
        return None if None in costs else sum(costs)

    def shards(self, prompts: Sequence[dict], folder: Path) -> list[Path]:
        """`records.jsonl` of each shard, in order, made or found; of a part of the run, of its own shards alone.

        Args:
            prompts: rows, of which a slice at a time is looked at.
        """
        size, count, (own, left) = self.settings.shard_size, self._count(prompts), self._parts(prompts, folder)
        for path in own.keys() - left.keys():
            self._same_prompts(path, prompts[own[path] * size : (own[path] + 1) * size])
        rows = ((path, prompts[n * size : (n + 1) * size]) for path, n in left.items())
        backends = [self.generator, *([self.judge.backend] if self.judge else [])]
        if ranks.world_size() == 1 and all(backend.places for backend in backends):
            self._overlap(rows, backends, sum(min(size, len(prompts) - n * size) for n in left.values()))
        else:
            for path, some in rows:
                what = f"shard {left[path] + 1}/{count}: " if count > 1 else ""
                write_records(path, self.records(some, Journal(path.parent / "answers.jsonl"), what))
        return list(own)

    def left(self, prompts: Sequence[dict], folder: Path) -> Sequence[dict]:
        """The prompts of the shards that `shards` has yet to make."""
        size, (_, left), numbers = self.settings.shard_size, self._parts(prompts, folder), range(len(prompts))
        return select(prompts, [each for n in left.values() for each in numbers[n * size : (n + 1) * size]])

    def _count(self, prompts: Sequence[dict]) -> int:
        return -(-len(prompts) // self.settings.shard_size)

    def _parts(self, prompts: Sequence[dict], folder: Path) -> tuple[dict[Path, int], dict[Path, int]]:
        """`records.jsonl` -> number, of the shards of this part of the run, and of those of them that are not made."""
        first, parts = part_of(self.settings.shards)
        own = {folder / f"{n:05d}" / "records.jsonl": n for n in range(first, self._count(prompts), parts)}
        return own, {path: n for path, n in own.items() if not ranks.by_first(path.exists)}

    def _overlap(self, shards: Iterable[tuple[Path, Sequence[dict]]], servers: list[Backend], total: int) -> None:
        """Prompts go on each by itself."""
        begin, line, tokens = time.monotonic(), Line("prompts", total), Counter()
        overlap = Overlap(self.record, write_records, servers)
        for group in overlap.run(shards):
            for request, answer in group:
                _add(tokens, request.step, answer)
            usd, notes = self._usd(tokens), [f"{overlap.in_flight} in flight"]
            if usd and overlap.done:
                notes.append(f"{usd:,.2f} USD, about {usd * total / overlap.done:,.2f} in all")
            line.update(overlap.done, " · ".join(notes))
        self.tokens += tokens["generator_tokens"]
        self.seconds += time.monotonic() - begin

    @staticmethod
    def _same_prompts(done: Path, prompts: list[dict]) -> None:
        if [record["prompt_id"] for record in read(done)] != [row["prompt_id"] for row in prompts]:
            raise Refusal(
                f"{done}: was made of other prompts than the data has. Put the data back, choose another run_name, or "
                "start afresh with overwrite=true."
            )

    def records(self, prompts: Sequence[dict], journal: Journal, what: str) -> list[Record]:
        """What is said about each prompt, all of them in step."""
        return in_step([self.record(row) for row in prompts], journal, what, self._heard)

    def _heard(self, what: str, seconds: float, answers: list[Answer]) -> None:
        if not what.startswith("judge"):
            self.seconds += seconds
            self.tokens += sum(answer["tokens"] for answer in answers)

    def record(self, row: dict) -> Work:
        """Everything that is said about a prompt.

        Returns:
            `prompt_id`, `family`, `split` and `prompt`; `draft` and `steps` (principle, critique, revision, `unfit`:
            why it is not used, or None) where revisions are made; `pairs`: `source`, `first`, `second`, `principle`,
            `unfit`, and of the judge `p`, `by_principle`, `spread`, `position_gap`, `flip`, `mass`; `route`: accepted,
            tie, disputed, unanswered, not_better (a revision), or None for what is unfit.
        """
        record: Record = {key: row[key] for key in ("prompt_id", "family", "split", "prompt")}
        record |= {"steps": [], "pairs": []}
        if "revision" in self.sources:
            yield from self._revise(record)
        if "on_policy" in self.sources:
            yield from self._sample(record)
        if "contrastive" in self.sources:
            yield from self._contrast(record)
        for pair in record["pairs"]:
            pair["unfit"] = pair["unfit"] or filters.unfit_pair(pair["first"], pair["second"], self._filters)
            asked = (turn["content"] for turn in record["prompt"])
            pair["speaks_to_judge"] = filters.speaks_to_judge(*asked, pair["first"], pair["second"])
        yield from self._judge(record)
        if self._generate.pairs == "best_worst":
            _keep_best_and_worst(record)
        return record

    def _write(self, record: Record, step: str, messages: list[Message] | None) -> Work:
        """A text; `messages` None asks nothing."""
        part = self._revising if step.startswith(("critique", "revision")) else self._generate
        prompt_id, asked = record["prompt_id"], []
        if messages is not None:
            sampling = {"max_new_tokens": part.max_new_tokens, "temperature": part.temperature, "top_p": part.top_p}
            seed = _seed(self._seed, prompt_id, step)
            asked = [Request(prompt_id, step, prompt_templates.plain(messages), **sampling, seed=seed)]
        answers = yield Ask(self.generator, step, asked)
        return answers[0] if asked else {"text": "", "finished": True}

    def _revise(self, record: Record) -> Work:
        """Draft, then `n_revisions` times a critique and a revision under one principle, each from a clean context."""
        revise, prompt = self._revising, record["prompt"]
        draft = yield from self._write(record, "draft", prompt)
        text = filters.strip_preamble(draft["text"])
        record["draft"] = {"text": text, "unfit": self._unfit(text, draft["finished"])}
        # "" is asked nothing: no pair can come of a draft that is unfit.
        current = "" if record["draft"]["unfit"] else text
        for n in range(1, revise.n_revisions + 1):
            [principle] = self.constitution.draw(1, self._seed, "revise", record["prompt_id"], n)
            asked = self.constitution, prompt, current
            said = ""
            if revise.critique:
                messages = prompt_templates.critique(*asked, principle, revise.few_shot) if current else None
                said = (yield from self._write(record, f"critique.{n}", messages))["text"]
            messages = prompt_templates.revision(*asked, said or None, principle, revise.few_shot) if current else None
            answer = yield from self._write(record, f"revision.{n}", messages)
            if current:
                text = filters.strip_preamble(answer["text"])
                unfit = self._unfit(text, answer["finished"]) or filters.unfit_revision(current, said, text)
                record["steps"].append({"principle": principle.id, "critique": said, "revision": text, "unfit": unfit})
                # What is no reply is not revised further: the next step starts from the last one that was.
                current = current if unfit else text
        fit = [step for step in record["steps"] if not step["unfit"]]
        last = (fit or record["steps"] or [{"revision": "", "unfit": None, "principle": None}])[-1]
        unfit = last["unfit"] or record["draft"]["unfit"]
        pair = self._pair("revision", last["revision"], record["draft"]["text"], unfit, last["principle"])
        record["pairs"].append(pair)

    def _sample(self, record: Record) -> Work:
        """Several answers of the generator to the prompt, every two of them a pair."""
        answers = []
        for n in range(1, self._generate.n_samples + 1):
            answers.append((yield from self._write(record, f"sample.{n}", record["prompt"])))
        for first, second in itertools.combinations(answers, 2):
            record["pairs"].append(self._of_two("on_policy", first, second))

    def _contrast(self, record: Record) -> Work:
        """One answer under the good, one under the bad system prompt (RLCD, Yang et al. 2023, arXiv:2307.12950)."""
        good = yield from self._write(record, "contrast.good", _under(self.constitution.good, record["prompt"]))
        bad = yield from self._write(record, "contrast.bad", _under(self.constitution.bad, record["prompt"]))
        record["pairs"].append(self._of_two("contrastive", good, bad))

    def _of_two(self, source: str, first: Answer, second: Answer) -> dict:
        unfit = self._unfit(first["text"], first["finished"]) or self._unfit(second["text"], second["finished"])
        return self._pair(source, first["text"], second["text"], unfit)

    def _unfit(self, text: str, finished: bool) -> str | None:
        return filters.unfit_reply(text, finished, self._filters)

    @staticmethod
    def _pair(source: str, first: str, second: str, unfit: str | None, principle: str | None = None) -> dict:
        return {"source": source, "first": first, "second": second, "principle": principle, "unfit": unfit}

    def _judge(self, record: Record) -> Work:
        asked = [pair for pair in record["pairs"] if not pair["unfit"]]
        verdicts = [None] * len(asked)
        if self.judge:
            pairs = [Pair(record["prompt_id"], record["prompt"], pair["first"], pair["second"]) for pair in asked]
            verdicts = yield from self.judge.comparing(pairs, "judge")
        judged = iter(verdicts)
        for pair in record["pairs"]:
            verdict = None if pair["unfit"] else next(judged)
            pair |= vars(verdict or Judgement(None))
            pair["route"] = None if pair["unfit"] else self._route(pair, verdict)

    def _route(self, pair: dict, verdict: Judgement | None) -> str:
        if verdict is None:
            return "accepted"  # by construction: `PairMaker.judge` is None for contrastive pairs alone
        if verdict.p is None:
            return "unanswered"
        if unclear := self.judge.unclear(verdict, self._limits):
            return unclear
        if pair["source"] == "revision" and verdict.p < 0.5:
            return "not_better"
        return "accepted"


def adopt(run: Run) -> None:
    """Take over what the jobs `shards=k/n` of this run have made, each in a folder beside it.

    Raises:
        Refusal: one of them was made with other settings, or by other models behind the endpoints.
    """
    ranks.by_first(_adopt, run)


def _adopt(run: Run) -> None:
    first: dict[str, tuple[Path, dict]] = {}
    for part in run.parts():
        gate = part / GATE
        if gate.exists() and not (run.dir / GATE).exists():
            write_atomically(run.dir / GATE, gate.read_text(encoding="utf-8"))
        for step, found in fingerprint.kept(gate).items() if gate.exists() else ():
            other, begun = first.setdefault(step, (part, found))
            if why := fingerprint.changed(begun, found):
                raise Refusal(
                    f"{part}: its {step.partition('.')[0]} was another model than that of {other} ({why}). Remove "
                    "one of the folders, and make its shards again."
                )
        for done in sorted(part.glob("shards/*/records.jsonl")):
            own = run.dir / "shards" / done.parent.name
            if not (own / done.name).exists():
                own.mkdir(parents=True, exist_ok=True)
                for name in ("answers.jsonl", done.name):  # a shard with the second is a finished one
                    write_atomically(own / name, (done.parent / name).read_text(encoding="utf-8"))


def write_records(path: Path, records: list[Record]) -> None:
    """A shard's, which is complete with them."""
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read(path: Path) -> Iterator[Record]:
    """The records of a shard.

    Raises:
        Refusal: a line of it is damaged.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise Refusal(
                    f"{path}:{number}: is damaged. Remove the file: the shard is then made again of its answers, "
                    "which are kept beside it."
                ) from error
            yield record


def price(node: DictConfig, prompt_tokens: float, completion_tokens: float) -> float | None:
    """USD; 0 for a model in this process and for people, None for an endpoint without a price."""
    if node.kind != "server":
        return 0.0
    if node.prompt_price is None or node.completion_price is None:
        return None
    return (prompt_tokens * node.prompt_price + completion_tokens * node.completion_price) / 1e6


def _add(calls: Counter, step: str, answer: Answer) -> None:
    """Count a call and its tokens as the generator's or the judge's."""
    kind = "judge" if step.startswith("judge") else "generator"
    calls[kind] += 1
    calls[f"{kind}_prompt_tokens"] += token_count(answer.get("prompt_tokens"))
    calls[f"{kind}_tokens"] += token_count(answer.get("tokens"))


def _keep_best_and_worst(record: Record) -> None:
    """Of a record's pairs of two samples leave the one whose replies are furthest apart by the mean of p over all that
    each was compared with; where none was compared, the first, which says why."""
    sampled = [pair for pair in record["pairs"] if pair["source"] == "on_policy"]
    chances: dict[str, list[float]] = {}
    for pair in sampled:
        if pair["p"] is not None:
            chances.setdefault(pair["first"], []).append(pair["p"])
            chances.setdefault(pair["second"], []).append(1 - pair["p"])
    means = {text: sum(found) / len(found) for text, found in chances.items()}
    compared = [pair for pair in sampled if pair["p"] is not None] or sampled[:1]
    kept = max(compared, key=lambda pair: abs(means.get(pair["first"], 0) - means.get(pair["second"], 0)))
    record["pairs"] = [pair for pair in record["pairs"] if pair["source"] != "on_policy" or pair is kept]


def _under(system: str, prompt: list[Message]) -> list[Message]:
    """The prompt behind a system prompt; its own, where it has one, follows."""
    if prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": system}, *prompt]


def _seed(*parts: Any) -> int:
    """31 bits, which every endpoint takes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1
