"""From prompts to judged pairs, a shard of prompts at a time: draft, critique and revise, candidates, judge, route.

A shard is a folder with `answers.jsonl` (what models answered, as it came) and, when it is complete, `records.jsonl`:
one record a prompt, with everything that was said about it. Nothing of a shard stays in memory.
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import ranks
from rlhf_recipes.cai import filters, prompt_templates
from rlhf_recipes.cai.backend import Answer, Backend, Journal, Message, Request, ask, groups, token_count
from rlhf_recipes.cai.constitution import Constitution
from rlhf_recipes.cai.judge import Judge, Judgement, Pair
from rlhf_recipes.cai.load import find_judge_adapter
from rlhf_recipes.config import part_of
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.references import ModelRef
from rlhf_recipes.run import GATE, Run
from rlhf_recipes.run_folder import write_atomically

# Of one prompt: `prompt_id`, `family`, `split`, `prompt`, `draft`, `steps`, `pairs`; see `Maker.records`.
Record = dict[str, Any]
SOURCES = ("revision", "on_policy", "contrastive")


def check(cfg: DictConfig) -> ModelRef | None:
    """Refuse what no run can be made of.

    Returns:
        What `judge.adapter` names.

    Raises:
        Refusal: an unknown kind of pairs, a count that is too small, or an adapter that the judge cannot have.
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
    return find_judge_adapter(cfg.judge)


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

    def provenance(self) -> dict[str, Any]:
        """What every row says of where it comes from."""
        return {
            "constitution": self.constitution.sha256,
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
                kind = "judge" if entry["step"].startswith("judge") else "generator"
                answer = entry["answer"] if isinstance(entry["answer"], dict) else {}
                calls[kind] += 1
                calls[f"{kind}_prompt_tokens"] += token_count(answer.get("prompt_tokens"))
                calls[f"{kind}_tokens"] += token_count(answer.get("tokens"))
        costs = [
            price(node, calls[f"{kind}_prompt_tokens"], calls[f"{kind}_tokens"])
            for kind, node in (("generator", self.settings.generator), ("judge", self.settings.judge))
        ]
        return {
            "calls": calls["generator"] + calls["judge"],
            "prompt_tokens": calls["generator_prompt_tokens"] + calls["judge_prompt_tokens"],
            "completion_tokens": calls["generator_tokens"] + calls["judge_tokens"],
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "usd": None if None in costs else round(sum(costs), 2),
        }

    def shards(self, prompts: list[dict], folder: Path) -> Iterator[Path]:
        """`records.jsonl` of each shard, in order, made or found; of a part of the run, of its own shards alone."""
        size, (first, parts) = self.settings.shard_size, part_of(self.settings.shards)
        count = -(-len(prompts) // size)
        for n in range(first, count, parts):
            done = folder / f"{n:05d}" / "records.jsonl"
            if ranks.by_first(done.exists):
                self._same_prompts(done, prompts[n * size : (n + 1) * size])
            else:
                what = f"shard {n + 1}/{count}: " if count > 1 else ""
                records = self.records(
                    prompts[n * size : (n + 1) * size], Journal(done.parent / "answers.jsonl"), what
                )
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
                write_atomically(done, "".join(lines))
            yield done

    @staticmethod
    def _same_prompts(done: Path, prompts: list[dict]) -> None:
        if [record["prompt_id"] for record in read(done)] != [row["prompt_id"] for row in prompts]:
            raise Refusal(
                f"{done}: was made of other prompts than the data has. Put the data back, choose another run_name, or "
                "start afresh with overwrite=true."
            )

    def records(self, prompts: list[dict], journal: Journal, what: str) -> list[Record]:
        """Everything that is said about each prompt.

        Returns:
            For each prompt its `prompt_id`, `family`, `split` and `prompt`; `draft` and `steps` (principle, critique,
            revision, `unfit`: why it is not used, or None) where revisions are made; `pairs`: `source`, `first`,
            `second`, `principle`, `unfit`, and of the judge `p`, `by_principle`, `spread`, `position_gap`, `flip`,
            `mass`; `route`: accepted, tie, disputed, unanswered, not_better (a revision), or None for what is unfit.
        """
        records: list[Record] = [
            {key: row[key] for key in ("prompt_id", "family", "split", "prompt")} | {"steps": [], "pairs": []}
            for row in prompts
        ]
        if "revision" in self.sources:
            self._revise(records, journal, what)
        if "on_policy" in self.sources:
            self._sample(records, journal, what)
        if "contrastive" in self.sources:
            self._contrast(records, journal, what)
        for record in records:
            for pair in record["pairs"]:
                pair["unfit"] = pair["unfit"] or filters.unfit_pair(
                    pair["first"], pair["second"], self.settings.filters
                )
                asked = (turn["content"] for turn in record["prompt"])
                pair["speaks_to_judge"] = filters.speaks_to_judge(*asked, pair["first"], pair["second"])
        self._judge(records, journal, what)
        return records

    def _write(self, records: list[Record], step: str, messages: list, journal: Journal, what: str) -> list[Answer]:
        """A text for each record; `messages` None asks nothing."""
        part = self.settings.revise if step.startswith(("critique", "revision")) else self.settings.generate
        asked = [
            Request(
                record["prompt_id"],
                step,
                prompt_templates.plain(each),
                max_new_tokens=part.max_new_tokens,
                temperature=part.temperature,
                top_p=part.top_p,
                seed=_seed(self.settings.seed, record["prompt_id"], step),
            )
            for record, each in zip(records, messages, strict=True)
            if each is not None
        ]
        begin, before = time.monotonic(), len(journal.answers)
        answers = ask(self.generator, asked, journal, f"{what}{step}")
        if len(journal.answers) - before == len(asked):  # none of them was there before
            self.seconds += time.monotonic() - begin
            self.tokens += sum(answer["tokens"] for answer in answers)
        given = iter(answers)
        return [next(given) if each is not None else {"text": "", "finished": True} for each in messages]

    def _revise(self, records: list[Record], journal: Journal, what: str) -> None:
        """Draft, then `n_revisions` times a critique and a revision under one principle, each from a clean context."""
        revise = self.settings.revise
        for record, draft in zip(
            records, self._write(records, "draft", [r["prompt"] for r in records], journal, what), strict=True
        ):
            text = filters.strip_preamble(draft["text"])
            record["draft"] = {"text": text, "unfit": self._unfit(text, draft["finished"])}
        # "" is asked nothing: no pair can come of a draft that is unfit.
        current = ["" if record["draft"]["unfit"] else record["draft"]["text"] for record in records]
        for n in range(1, revise.n_revisions + 1):
            drawn = [self.constitution.draw(1, self.settings.seed, "revise", r["prompt_id"], n)[0] for r in records]
            critiques: list[Answer | None] = [None] * len(records)
            if revise.critique:
                messages = [
                    prompt_templates.critique(self.constitution, r["prompt"], text, principle, revise.few_shot)
                    if text
                    else None
                    for r, text, principle in zip(records, current, drawn, strict=True)
                ]
                critiques = self._write(records, f"critique.{n}", messages, journal, what)
            said = ["" if c is None else c["text"] for c in critiques]
            messages = [
                prompt_templates.revision(self.constitution, r["prompt"], text, c or None, principle, revise.few_shot)
                if text
                else None
                for r, text, c, principle in zip(records, current, said, drawn, strict=True)
            ]
            revisions = self._write(records, f"revision.{n}", messages, journal, what)
            for i, (record, answer) in enumerate(zip(records, revisions, strict=True)):
                text = filters.strip_preamble(answer["text"])
                unfit = self._unfit(text, answer["finished"]) or filters.unfit_revision(current[i], said[i], text)
                step = {"principle": drawn[i].id, "critique": said[i], "revision": text, "unfit": unfit}
                if current[i]:
                    record["steps"].append(step)
                # What is no reply is not revised further: the next step starts from the last one that was.
                current[i] = current[i] if unfit else text
        for record in records:
            fit = [step for step in record["steps"] if not step["unfit"]]
            last = (fit or record["steps"] or [{"revision": "", "unfit": None, "principle": None}])[-1]
            record["pairs"].append(
                self._pair("revision", last["revision"], record["draft"]["text"],
                           last["unfit"] or record["draft"]["unfit"], last["principle"])
            )  # fmt: skip

    def _sample(self, records: list[Record], journal: Journal, what: str) -> None:
        """Several answers of the generator to each prompt, every two of them a pair."""
        prompts = [record["prompt"] for record in records]
        rounds = [
            self._write(records, f"sample.{n}", prompts, journal, what)
            for n in range(1, self.settings.generate.n_samples + 1)
        ]
        for record, *answers in zip(records, *rounds, strict=True):
            for first, second in itertools.combinations(answers, 2):
                unfit = self._unfit(first["text"], first["finished"]) or self._unfit(
                    second["text"], second["finished"]
                )
                record["pairs"].append(self._pair("on_policy", first["text"], second["text"], unfit))

    def _contrast(self, records: list[Record], journal: Journal, what: str) -> None:
        """One answer under the good, one under the bad system prompt (RLCD, Yang et al. 2023, arXiv:2307.12950)."""
        sides = [
            self._write(records, f"contrast.{name}", [_under(text, r["prompt"]) for r in records], journal, what)
            for name, text in (("good", self.constitution.good), ("bad", self.constitution.bad))
        ]
        for record, good, bad in zip(records, *sides, strict=True):
            unfit = self._unfit(good["text"], good["finished"]) or self._unfit(bad["text"], bad["finished"])
            record["pairs"].append(self._pair("contrastive", good["text"], bad["text"], unfit))

    def _unfit(self, text: str, finished: bool) -> str | None:
        return filters.unfit_reply(text, finished, self.settings.filters)

    @staticmethod
    def _pair(source: str, first: str, second: str, unfit: str | None, principle: str | None = None) -> dict:
        return {"source": source, "first": first, "second": second, "principle": principle, "unfit": unfit}

    def _judge(self, records: list[Record], journal: Journal, what: str) -> None:
        found = [(record, pair) for record in records for pair in record["pairs"]]
        asked = [(record, pair) for record, pair in found if not pair["unfit"]]
        if self.judge:
            pairs = [Pair(r["prompt_id"], r["prompt"], pair["first"], pair["second"]) for r, pair in asked]
            verdicts = self.judge.compare(pairs, journal, f"{what}judge")
            judged = {id(pair): verdict for (_, pair), verdict in zip(asked, verdicts, strict=True)}
        else:
            judged = {}
        for _, pair in found:
            verdict = judged.get(id(pair))
            pair |= vars(verdict or Judgement(None))
            pair["route"] = None if pair["unfit"] else self._route(pair, verdict)

    def _route(self, pair: dict, verdict: Judgement | None) -> str:
        limits = self.settings.route
        if verdict is None:
            return "accepted"  # by construction: `Maker.judge` is None for contrastive pairs alone
        if verdict.p is None:
            return "unanswered"
        margin = abs(verdict.p - 0.5)
        if margin < limits.tie_margin:
            return "tie"
        if margin < limits.accept_margin or verdict.flip or verdict.spread > limits.max_spread:
            return "disputed"
        if pair["source"] == "revision" and verdict.p < 0.5:
            return "not_better"
        return "accepted"


def adopt(run: Run) -> None:
    """Take over what the jobs `shards=k/n` of this run have made, each in a folder beside it.

    Raises:
        Refusal: one of them was made with other settings.
    """
    ranks.by_first(_adopt, run)


def _adopt(run: Run) -> None:
    for part in run.parts():
        gate = part / GATE
        if gate.exists() and not (run.dir / GATE).exists():
            write_atomically(run.dir / GATE, gate.read_text(encoding="utf-8"))
        for done in sorted(part.glob("shards/*/records.jsonl")):
            own = run.dir / "shards" / done.parent.name
            if not (own / done.name).exists():
                own.mkdir(parents=True, exist_ok=True)
                for name in ("answers.jsonl", done.name):  # a shard with the second is a finished one
                    write_atomically(own / name, (done.parent / name).read_text(encoding="utf-8"))


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
    """USD; 0 for a model in this process, None for an endpoint without a price."""
    if node.kind == "local":
        return 0.0
    if node.prompt_price is None or node.completion_price is None:
        return None
    return (prompt_tokens * node.prompt_price + completion_tokens * node.completion_price) / 1e6


def _under(system: str, prompt: list[Message]) -> list[Message]:
    """The prompt behind a system prompt; its own, where it has one, follows."""
    if prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": system}, *prompt]


def _seed(*parts: Any) -> int:
    """31 bits, which every endpoint takes."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1
