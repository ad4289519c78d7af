"""From prompts to a data set with stub models: what is counted adds up, a killed run continues to the same bytes.

As a script, `python test_cai_data.py <folder> <seconds a group>`, it is the run that is killed.
"""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from rlhf_recipes.cai import constitution, dataset, judge, make_pairs, report
from rlhf_recipes.cai.backend import Ask, Journal, Request, in_step
from rlhf_recipes.errors import Refusal
from rlhf_recipes.run import GATE
from rlhf_recipes.stats import Estimate
from rlhf_recipes.text_metrics import near_duplicate_keys

WORDS = [
    first + second + third for first in "bdfgklmnprst" for second in "aeiou" for third in ("ba", "lo", "ni", "ru")
]
CLOSING = "Let me know if you need anything else today."
SAME = (
    "Our desk takes this request now and a nurse calls you about it before the evening ends, so keep the phone near."
)
BIAS = 1.5  # log-odds by which the judge prefers the letter A
STEEPNESS = 0.6  # log-odds a grade
MASS = 0.9
# What a prompt's tag makes of its replies or of the judge, beside `plain`: grades differ, the revision is better.
TAGS = (
    "truncated", "short", "role", "announced", "loop", "noop", "echo", "refuse", "long", "closer", "same", "tie",
    "worse", "flip", "split", "mute", "mumble",
)  # fmt: skip


def text_of(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


class Stub:
    """A backend whose answers depend on the request alone; `asked` counts the requests by key. With places it is one
    of two endpoints."""

    def __init__(self, name, log=None, delay=0.0, size=4, places=0):
        self.name, self.log, self.delay, self.size = name, log, delay, size
        self.asked, self.requests = Counter(), []
        self.places, self.concurrency, self.lock = places, places // 2, threading.Lock()

    def connected(self):
        return [SimpleNamespace(base_url=url, is_out=False, close=lambda: None) for url in "ab"]

    def taken(self, endpoint, request):
        with self.lock:
            self.asked[request.key] += 1
        return self.reply(request)

    def answer(self, requests, known, what):
        left = [request for request in requests if request.key not in known]
        for n in range(0, len(left), self.size):
            group = left[n : n + self.size]
            self.asked.update(request.key for request in group)
            self.requests += group
            if self.log:
                with self.log.open("a") as file:
                    file.write("".join(f"{request.key}\n" for request in group))
            time.sleep(self.delay)
            yield [(request, self.reply(request)) for request in group]


class Generator(Stub):
    """Replies of pseudo-words that end in a grade, which the judge reads."""

    def reply(self, request):
        rng, shown = random.Random(request.key), request.messages[-1]["content"]
        step, tags = request.step.partition(".")[0], set(re.findall(r"\[(\w+)\]", shown))
        kind = request.step.rpartition(".")[2]
        if step == "critique":
            text = f"It leaves out what was asked first: {text_of(rng, 12)}."
        else:
            low, high = {"draft": (0, 3), "revision": (6, 9)}.get(step, (0, 9))
            low, high = {"good": (7, 9), "bad": (0, 2)}.get(kind, (low, high))
            if "tie" in tags:
                low = high = 5
            if "worse" in tags:
                low, high = 9 - high, 9 - low
            text = f"{text_of(rng, 14)} and grade {rng.randint(low, high)}, {text_of(rng, 6)}."
        if step == "revision":
            before = re.search(r"\nReply:\n> (.*)\n", shown)[1]
            if "noop" in tags:
                text = before.upper()
            if "echo" in tags:
                text = re.search(r"\nCritique:\n> (.*)\n", shown)[1]
        if request.step == "revision.2" and "dip" in tags:
            text = "No."
        if step not in ("critique", "draft"):
            changes = {
                "short": "No.",
                "role": f"{text}\nHuman: thanks",
                "announced": f"I have revised it: {text}",
                "loop": " ".join([text] * 4),
                "refuse": f"I cannot help with that. {text}",
                "long": f"{text} {text_of(rng, 60)}.",
                "closer": f"{text} {CLOSING}",
                "same": f"{SAME} It is grade {grade(text)}.",
            }
            text = next((changes[tag] for tag in tags if tag in changes), text)
        elif step == "draft" and "refuse" in tags:
            text = f"I cannot help with that. {text}"
        finished = not ("truncated" in tags and step in ("draft", "sample"))
        return {"text": text, "finished": finished, "prompt_tokens": 7, "tokens": 11}


class Grader(Stub):
    """A judge of grades: log-odds STEEPNESS * (grade in place A - grade in place B) + BIAS, and what the tags do."""

    def reply(self, request):
        shown = request.messages[-1]["content"]
        first, second = (grade(part) for part in shown.split("\nReply A:\n")[1].split("\n\nReply B:\n"))
        tags = set(re.findall(r"\[(\w+)\]", shown))
        odds = STEEPNESS * (first - second)
        if "flip" in tags:
            odds += abs(odds) + 0.3  # the place decides
        if "split" in tags:
            odds *= 1 if hashlib.sha256(shown.split("\n")[-5].encode()).digest()[0] % 2 else -1  # the principle does
        odds += BIAS
        logps = [math.log(MASS) - math.log1p(math.exp(-side)) for side in (odds, -odds)]
        if "mumble" in tags:
            logps = [value - 1 for value in logps]
        silent = "mute" in tags and first > second
        return {"logps": None if silent else logps, "prompt_tokens": 9, "tokens": 0}


def grade(text):
    found = re.search(r"grade (\d)", text)
    return int(found[1]) if found else 0


def prompts_of(count, tags=("plain", *TAGS), seed=0):
    """`count` rows; every third is of the test split, and some train prompts are one of these but for a word."""
    rng, rows = random.Random(seed), []
    for n in range(count):
        tag = tags[n % len(tags)]
        turn = n // len(tags)
        split = "test" if turn % 3 == 0 else "train"
        text = f"[{tag}] {text_of(rng, 45)}"
        family = tag
        if turn % 3 == 2 and tag == "plain":
            text, family = f"{rows[0]['prompt'][0]['content']} {text_of(rng, 1)}", "leak"
        messages = [{"role": "user", "content": text}]
        rows.append({"prompt_id": f"p{n:04d}", "family": family, "split": split, "prompt": messages})
    return sorted(rows, key=lambda row: row["split"])


def settings(**changes):
    cfg = OmegaConf.load(ROOT / "conf" / "cai.yaml")
    small = {
        "shard_size": 16, "revise": {"n_revisions": 1}, "judging": {"principles_per_pair": 2},
        "filters": {"max_words": 120}, "generator": {"kind": "local"}, "judge": {"kind": "local"},
    }  # fmt: skip
    return OmegaConf.merge(cfg, small, changes)


def make(
    folder,
    prompts,
    sources=("revision", "on_policy"),
    judged=True,
    log=None,
    delay=0.0,
    note=None,
    places=0,
    **changes,
):
    """A run of the stage with stubs: (maker, generator, grader, shards, what dataset.write returns)."""
    cfg = settings(**changes)
    principles = constitution.load(OmegaConf.load(ROOT / "conf" / "constitution" / "general.yaml"))
    stub = {"log": log, "delay": delay, "places": places}
    generator, grader = Generator("stub-generator", **stub), Grader("stub-judge", **stub)
    critic = judge.Judge(grader, principles, cfg.judging, cfg.seed) if judged else None
    folder.mkdir(exist_ok=True)
    if critic:
        critic.learn_priors(Journal(folder / "gate.jsonl"))
    maker = make_pairs.PairMaker(generator, critic, principles, list(sources), cfg)
    shards = maker.shards(prompts, folder / "shards")
    if note:
        note("writing")
    return maker, generator, grader, shards, dataset.write(shards, folder, maker.provenance())


def rows_of(folder, split):
    import pyarrow.parquet as pq

    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def records_of(shards):
    return [record for shard in shards for record in make_pairs.read(shard)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on 216 prompts of all kinds: its folder, prompts, shards and results."""
    folder = tmp_path_factory.mktemp("cai") / "run"
    prompts = prompts_of(216)
    maker, generator, grader, shards, found = make(folder, prompts)
    return {
        "folder": folder, "prompts": prompts, "maker": maker, "generator": generator, "grader": grader,
        "shards": shards, "records": records_of(shards), **found,
    }  # fmt: skip


def test_the_funnel_adds_up(made):
    funnel, ledger = made["funnel"], made["ledger"]
    pairs = [pair for record in made["records"] for pair in record["pairs"]]
    assert funnel["prompts"] == 216 and funnel["pairs"] == len(pairs) == 2 * 216
    assert sum(funnel["unfit"].values()) + sum(funnel["routes"].values()) == funnel["pairs"]
    assert set(funnel["unfit"]) == {*JUNK_REASONS, "leakage", "near_duplicate", "closer"}
    assert {*funnel["unfit"], *funnel["routes"]} == set(report.WORDS)  # the card has a word for each
    assert all(funnel["routes"][route] for route in ("accepted", "tie", "disputed", "not_better", "unanswered"))
    rows = {split: rows_of(made["folder"], split) for split in (*dataset.PREFS, *dataset.SFT)}
    assert {split: len(found) for split, found in rows.items()} == funnel["written"]
    routes, written = funnel["routes"], funnel["written"]
    assert written["train_prefs"] + written["test_prefs"] == routes["accepted"]
    assert written["ties"] == routes["tie"] and written["disputed"] == routes["disputed"] + routes["not_better"]
    for split in ("train", "test"):
        answers = {(row["prompt_id"], row["chosen"][0]["content"]) for row in rows[f"{split}_prefs"]}
        good = [(row["prompt_id"], row["completion"][0]["content"]) for row in rows[f"{split}_sft"]]
        assert sorted(good) == sorted(answers)
    totals = Counter()
    for cell in ledger.values():
        assert cell["pairs"] == sum(cell[key] for key in ("unfit", *(r for r in routes)) if key in cell)
        totals.update(cell)
    assert totals["pairs"] == funnel["pairs"] and totals["unfit"] == sum(funnel["unfit"].values())
    assert all(totals[route] == count for route, count in routes.items())
    assert funnel["yield"].n == funnel["pairs"] and funnel["yield"].clusters == 216
    assert funnel["yield"].value == pytest.approx(routes["accepted"] / funnel["pairs"])
    longer = [
        len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]) for s in dataset.PREFS[:2] for r in rows[s]
    ]
    assert funnel["chosen_is_longer"].n == sum(size != 0 for size in longer)
    assert funnel["chosen_is_longer"].value == pytest.approx(sum(s > 0 for s in longer) / sum(s != 0 for s in longer))
    assert funnel["revisions"] == {
        "made": sum(len(record["steps"]) for record in made["records"]),
        "unfit": dict(Counter(s["unfit"] for r in made["records"] for s in r["steps"] if s["unfit"])),
    }
    for name in ("funnel", "ledger"):
        text = (made["folder"] / f"{name}.json").read_text()
        assert json.loads(text, object_hook=Estimate.of) == made[name]


JUNK_REASONS = {
    "truncated": "truncated", "length": "short", "role_leak": "role", "preamble": "announced", "repetition": "loop",
    "no_op": "noop", "critique_copied": "echo", "both_refuse": "refuse", "length_imbalance": "long",
}  # fmt: skip


def test_planted_junk_is_unfit_for_its_reason(made):
    by_family = {}
    for record in made["records"]:
        for pair in record["pairs"]:
            by_family.setdefault((record["family"], pair["source"]), Counter())[pair["unfit"]] += 1
    for reason, tag in JUNK_REASONS.items():
        assert set(by_family[tag, "revision"]) == {reason}, tag
        if tag not in ("noop", "echo", "long"):  # these are made of revisions alone
            assert set(by_family[tag, "on_policy"]) == {reason}, tag
    for tag in ("plain", "tie", "worse", "flip", "split", "mute", "mumble", "closer", "leak"):
        assert set(by_family[tag, "revision"]) == {None}, tag


def expected(family, first, second, limits):
    """The route and p that the judge's known function gives, by the formula of rlhf_recipes/cai/judge.py."""
    difference = STEEPNESS * (grade(first) - grade(second))
    if family == "mumble" or (family == "mute" and difference):
        return "unanswered", None
    bias = abs(difference) + 0.3 if family == "flip" else 0.0
    both = [1 / (1 + math.exp(-difference - bias)), 1 / (1 + math.exp(-difference + bias))]
    p = sum(both) / 2
    if family == "split":
        return None, None
    if abs(p - 0.5) < limits.tie_margin:
        return "tie", p
    if abs(p - 0.5) < limits.accept_margin or (both[0] > 0.5) != (both[1] > 0.5):
        return "disputed", p
    return "accepted", p


def test_routes_are_what_the_judge_says(made):
    seen, limits = Counter(), settings().route
    for record in made["records"]:
        for pair in record["pairs"]:
            if pair["unfit"]:
                assert pair["route"] is None and pair["p"] is None
                continue
            route, p = expected(record["family"], pair["first"], pair["second"], limits)
            if route == "accepted" and pair["source"] == "revision" and p < 0.5:
                route = "not_better"
            if record["family"] == "split":
                assert pair["route"] in ("tie", "disputed", "accepted", "not_better")
                if pair["spread"] > 0.15:
                    assert pair["route"] == "disputed"
                seen["split", pair["spread"] > 0.15] += 1
                continue
            assert pair["route"] == route, (record["family"], pair)
            if p is not None:
                assert pair["p"] == pytest.approx(p, abs=1e-9)  # the preference for a letter is gone
                assert pair["mass"] == pytest.approx(MASS)
                assert len(pair["by_principle"]) == 2 and pair["spread"] < 1e-9
                assert (pair["position_gap"] > 0.1) == (record["family"] == "flip")
            seen[record["family"], route] += 1
    assert seen["tie", "tie"] and seen["worse", "not_better"] and seen["flip", "disputed"]
    assert seen["mute", "unanswered"] and seen["mumble", "unanswered"] and seen["split", True] and seen["split", False]


def test_rows_say_what_the_records_say(made):
    records = {record["prompt_id"]: record for record in made["records"]}
    provenance = made["maker"].provenance()
    for split in dataset.PREFS:
        for row in rows_of(made["folder"], split):
            record = records[row["prompt_id"]]
            texts = (row["chosen"][0]["content"], row["rejected"][0]["content"])
            pair = next(p for p in record["pairs"] if {p["first"], p["second"]} == set(texts))
            assert row["prompt"] == record["prompt"] and row["family"] == record["family"]
            assert {key: row[key] for key in provenance} == provenance
            assert row["p"] == max(pair["p"], 1 - pair["p"]) and row["p"] >= 0.5
            swapped = texts[0] != pair["first"]
            found = json.loads(row["by_principle"])
            assert found == pytest.approx({k: 1 - v if swapped else v for k, v in pair["by_principle"].items()})
            assert sum(found.values()) / len(found) == pytest.approx(row["p"])
            assert row["route"] == pair["route"] and row["principle"] == pair["principle"]
            if row["source"] == "revision":
                step = record["steps"][0]
                assert (row["draft"], row["revision"]) == (record["draft"]["text"], step["revision"])
                assert (row["critique"], row["principle"]) == (step["critique"], step["principle"])
            else:
                assert row["draft"] is row["critique"] is row["revision"] is row["principle"] is None
            if split in ("train_prefs", "test_prefs"):
                assert f"{record['split']}_prefs" == split and row["route"] == "accepted"
                assert row["source"] == "on_policy" or texts[0] == pair["first"]
    for split in dataset.SFT:
        for row in rows_of(made["folder"], split):
            assert row["p"] > 0.6 and f"{records[row['prompt_id']]['split']}_sft" == split


def test_no_test_prompt_is_in_train(made):
    train = {
        row["prompt"][0]["content"] for split in ("train_prefs", "train_sft") for row in rows_of(made["folder"], split)
    }
    test = {
        row["prompt"][0]["content"] for split in ("test_prefs", "test_sft") for row in rows_of(made["folder"], split)
    }
    assert train and test and not train & test
    held_out = {row["prompt"][0]["content"] for row in made["prompts"] if row["split"] == "test"}
    assert not train & held_out
    keys = {(n, key) for text in held_out for n, key in enumerate(near_duplicate_keys(text).tolist())}
    for text in train:
        assert keys.isdisjoint(enumerate(near_duplicate_keys(text).tolist()))
    leaks = sum(record["family"] == "leak" for record in made["records"])
    assert leaks and made["funnel"]["unfit"]["leakage"] == 2 * leaks
    assert made["ledger"]["leak/revision"]["unfit"] == leaks


def test_what_repeats_is_dropped(made):
    same = [record for record in made["records"] if record["family"] == "same"]
    first = same[0]["prompt_id"]
    kept = [row for split in dataset.PREFS[:2] for row in rows_of(made["folder"], split) if row["family"] == "same"]
    assert same[0]["split"] == "test" and {row["prompt_id"] for row in kept} <= {first}
    more = [pair for record in same[1:] for pair in record["pairs"] if pair["route"] == "accepted"]
    assert len(more) >= len(same) - 1 and made["funnel"]["unfit"]["near_duplicate"] == len(more)
    ends = [row for split in dataset.PREFS[:2] for row in rows_of(made["folder"], split)]
    ends = [row for row in ends if row["chosen"][0]["content"].endswith(CLOSING)]
    assert len(ends) == dataset.CLOSER_ROWS
    assert made["funnel"]["unfit"]["closer"] + len(ends) == sum(
        pair["route"] == "accepted"
        for record in made["records"]
        if record["family"] == "closer"
        for pair in record["pairs"]
    )


def test_requests_are_answered_once(made, tmp_path):
    for stub in (made["generator"], made["grader"]):
        assert stub.asked and set(stub.asked.values()) == {1}
    journals = sorted(made["folder"].rglob("*.jsonl"))
    entries = [entry for path in journals if path.name != "records.jsonl" for entry in answers_of(path)]
    assert (
        len(entries) == len({entry["key"] for entry in entries}) == len(made["generator"].asked + made["grader"].asked)
    )
    spent = made["maker"].spent(made["folder"] / "gate.jsonl", made["shards"])
    assert spent["calls"] == len(entries)
    assert spent["completion_tokens"] == 11 * len(made["generator"].asked)

    prompts, before = prompts_of(20), tmp_path / "run"
    _, generator, grader, shards, found = make(before, prompts)
    files = contents(before)
    assert generator.asked and grader.asked
    shards[0].unlink()  # as if killed before the records of a shard were written
    _, generator, grader, _, again = make(before, prompts)
    assert not generator.asked and not grader.asked and again == found and contents(before) == files


def answers_of(path):
    return [entry for line in path.read_text().splitlines() for entry in json.loads(line)]


def contents(folder):
    """File name -> bytes, of all that does not depend on the order in which answers came."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("answers.jsonl", "asked")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("places", [0, 6])
def test_neither_shard_size_nor_overlap_changes_anything(made, tmp_path, places, capsys):
    """With places prompts go on each by itself; half of what is answered is known before."""
    shards = tmp_path / "run" / "shards"
    _, generator, grader, _, _ = make(tmp_path / "run", made["prompts"], shard_size=50, places=places)
    assert {**generator.asked, **grader.asked} == {**made["generator"].asked, **made["grader"].asked}
    for n, path in enumerate(sorted(shards.glob("*/answers.jsonl"))):
        (path.parent / "records.jsonl").unlink()
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[n::2]))
    _, generator, grader, _, _ = make(tmp_path / "run", made["prompts"], shard_size=50, places=places)
    assert generator.asked and grader.asked and {*generator.asked.values(), *grader.asked.values()} == {1}
    assert ("prompts 216/216 · 0 in flight" in capsys.readouterr().err) == bool(places)
    keys = [entry["key"] for path in shards.glob("*/answers.jsonl") for entry in answers_of(path)]
    assert len(keys) == len(set(keys))
    for name in (*(f"{split}.parquet" for split in (*dataset.PREFS, *dataset.SFT)), "funnel.json", "ledger.json"):
        assert (tmp_path / "run" / name).read_bytes() == (made["folder"] / name).read_bytes(), name


def test_jobs_of_different_models_are_not_joined(tmp_path):
    parts = [tmp_path / f"main.{n}-of-2" for n in (1, 2)]
    for part, p in zip(parts, (0.7, 0.55), strict=True):
        likes = ["A", {"A": math.log(p), "B": math.log(1 - p)}]
        found = {"text": "A", "served": {"model": "m", "tokens": [likes]}}
        Journal(part / GATE).write([(Request("", "judge.served", []), found)])
    run = SimpleNamespace(dir=tmp_path / "main", parts=lambda: parts)
    run.dir.mkdir()
    with pytest.raises(Refusal, match=r"main\.2-of-2: its judge was another model than that of .*main\.1-of-2 \(15%"):
        make_pairs.adopt(run)


def test_data_sets_load(made, compose, tmp_path, monkeypatch):
    from datasets import load_dataset

    from rlhf_recipes.data.load import load_demonstrations, load_pairs, load_prompts

    files = {split: str(made["folder"] / f"{split}.parquet") for split in (*dataset.PREFS, *dataset.SFT)}
    for group in (dataset.PREFS, dataset.SFT):
        loaded = load_dataset("parquet", data_files={s: files[s] for s in group}, cache_dir=str(tmp_path / "cache"))
        assert {split: len(rows) for split, rows in loaded.items()} == {s: made["funnel"]["written"][s] for s in group}
        assert loaded[group[0]][0]["prompt"][0].keys() == {"role", "content"}

    def node(*overrides):
        return compose("dpo", "data=cai_pairs", f"data.path={made['folder']}", *overrides).data

    written = made["funnel"]["written"]
    pairs = load_pairs(node())
    assert (len(pairs.train), len(pairs.test)) == (written["train_prefs"], written["test_prefs"])
    assert not any(pairs.report["dropped"].values())
    p = {row["chosen"][0]["content"]: row["p"] for s in dataset.PREFS[:2] for row in rows_of(made["folder"], s)}
    assert all(row["p"] == p[row["chosen"][0]["content"]] and row["p"] > 0.6 for row in (*pairs.train, *pairs.test))
    assert all(row["family"] in (*TAGS, "plain") for row in pairs.train)
    assert "p" in pairs.to_datasets()[0].column_names
    good = load_demonstrations(node("data.train_split=train_sft", "data.test_split=test_sft"))
    assert (len(good.train), len(good.test)) == (written["train_sft"], written["test_sft"])
    asked = load_prompts(node())
    assert {row["prompt_id"] for row in asked.train} == {row["prompt_id"] for row in pairs.train}
    looked_at = load_pairs(node("data.train_split=disputed", "data.test_split=null", "data.test_size=2"))
    halves = looked_at.report["dropped"]["tie"]  # principles that contradict each other half and half: p is 1/2
    assert halves and len(looked_at.train) + len(looked_at.test) + halves == written["disputed"]


def test_contrastive_without_a_judge(compose, tmp_path):
    from datasets import load_dataset

    from rlhf_recipes.data.load import load_pairs

    prompts = prompts_of(36, ("tie", "worse", "mute"))
    _, generator, grader, shards, found = make(tmp_path / "run", prompts, ["contrastive"], judged=False)
    assert not grader.asked and len(generator.asked) == 72
    assert found["funnel"]["routes"] == {"accepted": 36} and found["funnel"]["unfit"] == {}
    sides = {pair["first"]: pair["second"] for record in records_of(shards) for pair in record["pairs"]}
    rows = [row for split in dataset.PREFS[:2] for row in rows_of(tmp_path / "run", split)]
    assert {row["chosen"][0]["content"]: row["rejected"][0]["content"] for row in rows} == sides
    assert all(row[key] is None for row in rows for key in ("p", "judge", "spread", "mass", "flip", "position_gap"))
    assert all(row["source"] == "contrastive" and row["by_principle"] == "{}" for row in rows)
    files = {name: str(tmp_path / "run" / f"{name}.parquet") for name in (*dataset.PREFS[:2], *dataset.SFT)}
    for group in (dataset.PREFS[:2], dataset.SFT):
        loaded = load_dataset("parquet", data_files={s: files[s] for s in group}, cache_dir=str(tmp_path / "cache"))
        assert [len(loaded[split]) for split in group] == [found["funnel"]["written"][split] for split in group]
    assert rows_of(tmp_path / "run", "ties") == rows_of(tmp_path / "run", "disputed") == []
    pairs = load_pairs(compose("dpo", "data=cai_pairs", f"data.path={tmp_path / 'run'}").data)
    assert (
        all(row["p"] is None for row in (*pairs.train, *pairs.test)) and "p" not in pairs.to_datasets()[0].column_names
    )


def test_revisions_start_from_the_last_that_is_fit(tmp_path):
    prompts = prompts_of(6, ("dip", "fine", "truncated"))
    _, generator, _, shards, found = make(tmp_path / "run", prompts, ["revision"], revise={"n_revisions": 3})
    drawn = Counter()
    for record in records_of(shards):
        (pair,), revisions = record["pairs"], [step["revision"] for step in record["steps"]]
        if record["draft"]["unfit"]:  # no pair can come of it: nothing more is asked
            assert not revisions and pair["unfit"] == record["draft"]["unfit"]
            continue
        drawn.update(step["principle"] for step in record["steps"])
        assert [step["unfit"] for step in record["steps"]] == [
            None,
            "length" if record["family"] == "dip" else None,
            None,
        ]
        assert pair["first"] == revisions[2] and pair["second"] == record["draft"]["text"]
        assert (pair["unfit"], pair["principle"]) == (None, record["steps"][2]["principle"])
        before = [record["draft"]["text"], revisions[0], revisions[0 if record["family"] == "dip" else 1]]
        for n, text in enumerate(before, 1):
            for kind in ("critique", "revision"):
                request = next(
                    r for r in generator.requests if (r.prompt_id, r.step) == (record["prompt_id"], f"{kind}.{n}")
                )
                shown = request.messages[-1]["content"]
                assert f"\n\nReply:\n> {text}\n" in shown  # a clean context: the last reply alone
                assert sum(other in shown for other in {*before, *revisions}) == 1
                assert (record["steps"][n - 1]["critique"] in shown) == (kind == "revision")
    assert len(drawn) > 6  # a principle for every step
    assert found["funnel"]["revisions"] == {"made": 12, "unfit": {"length": 2}}
    rows = [row for split in dataset.PREFS[:2] for row in rows_of(tmp_path / "run", split)]
    assert rows and all(
        row["critique"] in [s["critique"] for r in records_of(shards) for s in r["steps"][2:]] for row in rows
    )


def test_nothing_fit(tmp_path):
    *_, found = make(tmp_path / "run", prompts_of(8, ("short",)))
    assert found["funnel"]["unfit"] == {"length": 16} and found["funnel"]["routes"] == {}
    assert set(found["funnel"]["written"].values()) == {0} and found["funnel"]["yield"].value == 0
    assert found["funnel"]["chosen_is_longer"].value is None
    assert all(rows_of(tmp_path / "run", split) == [] for split in (*dataset.PREFS, *dataset.SFT))


# dataset.write on records that were not made by a Maker.


def record(name, split="train", *pairs, prompt=None, family=None):
    words = prompt or text_of(random.Random(f"prompt {name}"), 30)
    turns = words if isinstance(words, list) else [{"role": "user", "content": words}]
    return {"prompt_id": name, "family": family, "split": split, "prompt": turns, "steps": [], "pairs": list(pairs)}


def pair(first, second=None, p=0.9, route="accepted", unfit=None):
    verdict = {"by_principle": {}, "spread": 0.0, "position_gap": 0.0, "flip": False, "mass": 1.0, "p": p}
    second = second or text_of(random.Random(f"second of {first}"), 20)
    made = {"source": "on_policy", "first": first, "second": second, "principle": None, "unfit": unfit}
    return made | verdict | {"route": None if unfit else route, "speaks_to_judge": False}


def written(folder, *records):
    """(funnel, {split: [(prompt_id, chosen)]}) of the records, in two shards."""
    provenance = {"constitution": "c", "generator": "g", "judge": "j", "seed": 1}
    shards = [folder / "a.jsonl", folder / "b.jsonl"]
    half = len(records) // 2
    for shard, part in zip(shards, (records[:half], records[half:]), strict=True):
        shard.write_text("".join(json.dumps(each) + "\n" for each in part))
    funnel = dataset.write(shards, folder, provenance)["funnel"]
    assert sum(funnel["unfit"].values()) + sum(funnel["routes"].values()) == funnel["pairs"]
    rows = {s: [(r["prompt_id"], r["chosen"][0]["content"]) for r in rows_of(folder, s)] for s in dataset.PREFS}
    return funnel, rows


def reply(name, count=30):
    return text_of(random.Random(f"reply {name}"), count)


def test_near_duplicates_are_those_of_chosen_replies(tmp_path):
    twin = reply("twin")
    funnel, rows = written(
        tmp_path,
        record("train, dropped", "train", pair(twin)),
        record("train, rejected alike", "train", pair(reply(1), twin)),
        record("test, kept", "test", pair(f"{twin} bato", p=0.9)),
        record("test, chosen is the second", "test", pair(reply(2), twin, p=0.1)),
        record("tie stays", "train", pair(twin, p=0.5, route="tie")),
        record("unanswered is none", "train", pair(twin, p=None, route="unanswered")),
        record("unfit is unfit", "train", pair(twin, unfit="length")),
        record("two of one prompt", "train", pair(reply(3)), pair(reply(3), reply(4))),
    )
    assert funnel["unfit"] == {"near_duplicate": 2, "length": 1}
    assert [name for name, _ in rows["train_prefs"]] == ["train, rejected alike", *["two of one prompt"] * 2]
    assert [name for name, _ in rows["test_prefs"]] == ["test, kept"] and len(rows["ties"]) == 1
    assert funnel["written"]["train_sft"] == 2  # a reply is to be imitated once


def test_leakage_is_of_whole_conversations(tmp_path):
    def chat(*texts):
        return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]

    asked = text_of(random.Random("asked"), 40)
    instructions = {"role": "system", "content": text_of(random.Random("system"), 200)}
    funnel, rows = written(
        tmp_path,
        record("test", "test", pair(reply(1)), prompt=[instructions, *chat(asked)]),
        record("same test prompt", "test", pair(reply(2)), prompt=chat(asked)),
        record("leak", "train", pair(reply(3)), pair(reply(4), route="disputed"), prompt=chat(f"{asked} Thanks.")),
        record("same system turn", "train", pair(reply(5)), prompt=[instructions, *chat(reply(6, 40))]),
        record("yes 1", "test", pair(reply(7)), prompt=chat(reply(8, 40), reply(9, 40), "Yes, please.")),
        record("yes 2", "train", pair(reply(10)), prompt=chat(reply(11, 40), reply(12, 40), "Yes, please.")),
        # What leaks is gone before replies are compared.
        record("like the leaked reply", "train", pair(reply(3))),
    )
    assert funnel["unfit"] == {"leakage": 2}
    assert [name for name, _ in rows["train_prefs"]] == ["same system turn", "yes 2", "like the leaked reply"]
    assert len(rows["test_prefs"]) == 3 and not rows["disputed"]


def test_closers_are_capped(tmp_path):
    ends = [record(f"e{n}", "train", pair(f"{reply(n)}. {CLOSING}")) for n in range(9)]
    dropped = [record("twin", "test", pair(f"{reply(0)}. {CLOSING}"))]
    few = [record(f"f{n}", "train", pair(f"{reply(f'f{n}')}. That is all for today, then.")) for n in range(3)]
    short = [record(f"s{n}", "train", pair(f"{reply(f's{n}')}. Thank you.")) for n in range(9)]
    funnel, rows = written(tmp_path, *ends, *dropped, *few, *short)
    assert funnel["unfit"] == {"near_duplicate": 1, "closer": 6}
    assert [n for n, text in rows["train_prefs"] if text.endswith(CLOSING)] == ["e1", "e2"]  # and the test split's
    many = [record(f"m{n}", "train", pair(f"{reply(f'm{n}')}.")) for n in range(500 - len(ends))]
    funnel, rows = written(tmp_path, *ends, *many)
    assert funnel["unfit"] == {"closer": 4}  # one in a hundred may: 5 of 500


# A run that is killed.

RUN = {"count": 40, "revise": {"n_revisions": 1}, "shard_size": 8}
KILLS, LATE_KILLS = 16, 4


def killed_run(folder, delay):
    print("ready", flush=True)
    make(
        folder,
        prompts_of(RUN["count"]),
        log=folder.parent / "asked",
        delay=delay,
        note=lambda what: print(what, flush=True),
        shard_size=RUN["shard_size"],
    )


def test_a_killed_run_continues_to_the_same_bytes(tmp_path, clean_env, light_python):
    env = {**clean_env, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), clean_env.get("PYTHONPATH", "")])}

    def started(folder, delay):
        command = [light_python, "-m", Path(__file__).stem, str(folder), str(delay)]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)

    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    whole.parent.mkdir()
    broken.parent.mkdir()
    killed_run(whole, 0.0)
    unique = {
        entry["key"] for path in whole.rglob("*.jsonl") if path.name != "records.jsonl" for entry in answers_of(path)
    }

    rng, delay = random.Random(17), 0.032
    waits = [rng.uniform(0, 0.15) for _ in range(KILLS)]
    assert sum(waits) < delay * len(unique) / 8  # the first kills all come well before the answers are complete
    late = [rng.uniform(0, 0.5) for _ in range(LATE_KILLS)]
    kills = 0
    for wait, line in [*((w, "ready\n") for w in waits), *((w, "writing\n") for w in late)]:
        process = started(broken, delay if line == "ready\n" else 0)
        while (said := process.stdout.readline()) not in (line, ""):
            pass
        assert said == line
        time.sleep(wait)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
    last = started(broken, 0)
    last.communicate()
    assert last.returncode == 0 and kills >= KILLS
    assert contents(broken) == contents(whole)

    answers = [e["key"] for path in broken.rglob("*.jsonl") if path.name != "records.jsonl" for e in answers_of(path)]
    assert len(answers) == len(set(answers)) == len(unique) and set(answers) == unique
    # Only what was under way when the run was killed is asked again: a group each time.
    asked = Counter((broken.parent / "asked").read_text().split())
    again = sum(asked.values()) - len(asked)
    print(f"\n{kills} kills, {len(unique)} answers, {again} asked again")
    assert set(asked) == unique and again <= KILLS * 4


if __name__ == "__main__":
    killed_run(Path(sys.argv[1]), float(sys.argv[2]))


class Echo:
    """Answers with what it was told last."""

    name, places = "echo", 0

    def answer(self, requests, known, what):
        yield [(each, {"text": each.messages[-1]["content"], "finished": True, "prompt_tokens": 1, "tokens": 1})
               for each in requests if each.key not in known]  # fmt: skip


def test_works_in_step_may_end_one_before_another(tmp_path):
    def counts(name, questions):
        heard = []
        for number in range(questions):
            said = [{"role": "user", "content": f"{name}{number}"}]
            heard += yield Ask(Echo(), "count", [Request(name, f"count.{number}", said)])
        return [each["text"] for each in heard]

    works = [counts(name, questions) for name, questions in (("a", 2), ("b", 0), ("c", 1), ("d", 3))]
    journal = Journal(tmp_path / "answers.jsonl")
    assert in_step(works, journal) == [["a0", "a1"], [], ["c0"], ["d0", "d1", "d2"]]
    assert len(journal.answers) == 6
