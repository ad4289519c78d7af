"""People label: what is shown to whom, what is on disk, who may ask, and what reads it."""

import json
import os
import re
import signal
import socket
import threading
import time
import urllib.parse
import urllib.request
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from rlhf_recipes import overrides
from rlhf_recipes.audit import judgements
from rlhf_recipes.config import CONF
from rlhf_recipes.data import formats
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.labelling import agreement, labels, pairs, plan, server, written
from rlhf_recipes.labelling.choices import Choices, Session
from rlhf_recipes.labelling.guard import Guard

EVIL = "<script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>"


def a_pair(number: int = 0, **more) -> pairs.Pair:
    return pairs.make(user(f"Question {number}?"), f"first answer {number}", f"second answer {number}", **more)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def some(count: int) -> list[pairs.Pair]:
    return [a_pair(number) for number in range(count)]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answers(count: int) -> list[dict]:
    """Rows of a file to label."""
    return [{"prompt": p.prompt, "first": p.first, "second": p.second, "family": "desk"} for p in some(count)]


def session(folder, count=4, name="anna", twice=0.0, swapped=0.0, of=None) -> Session:
    shown = of or some(count)
    choices = Choices(folder / "choices.jsonl")
    items = plan.items(shown, name, twice, swapped, seed=1)
    return Session(name, items, choices, lambda: written.write(folder, shown, choices))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path):
    return load_pairs(OmegaConf.merge(OmegaConf.load(CONF / "data" / "base.yaml"), {"path": str(path)}))


# What is shown


def test_places_are_random_and_repetitions_come_later_in_the_right_places():
    shown = plan.items(some(200), "anna", 0.1, 0.1, seed=3)
    new = {item.pair.id: place for place, item in enumerate(shown) if item.show == plan.NEW}
    assert [item.pair for item in shown if item.show == plan.NEW] == some(200)
    assert 70 < sum(item.first_left for item in shown if item.show == plan.NEW) < 130
    for show, same in ((plan.AGAIN, True), (plan.SWAPPED, False)):
        again = [(place, item) for place, item in enumerate(shown) if item.show == show]
        assert len(again) == 20
        for place, item in again:
            assert place - new[item.pair.id] > plan.APART
            assert (shown[new[item.pair.id]].first_left == item.first_left) is same
    assert plan.items(some(200), "anna", 0.1, 0.1, seed=3) == shown
    assert plan.items(some(200), "ben", 0.1, 0.1, seed=3) != shown
    assert plan.items(some(200), "anna", 0.1, 0.1, seed=4) != shown


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_few_pairs_have_repetitions_where_there_is_room(count):
    shown = plan.items(some(count), "anna", 0.05, 0.05, seed=0)
    assert len({item.key for item in shown}) == len(shown) == count + min(2, max(0, count - max(1, count // 3)))
    assert plan.items(some(count), "anna", 0, 0, seed=0) == [each for each in shown if each.show == plan.NEW]


def test_files_of_each_kind(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Open?"}]
    rows = [
        {"prompt": prompt, "first": "a", "second": "b", "principle": "kind", "question": "Which is kinder?"},
        {"prompt": "Hi", "first": "a", "second": " a "},
        {"prompt": prompt, "first": "b", "second": "a"},
        {"prompt": "Hi", "first": "", "second": "a"},
        {"prompt": "Key?", "first": "It is hf_" + "aB3" * 12, "second": "No."},
    ]
    found = pairs.find(config(write_rows(tmp_path / "a.jsonl", *rows)))
    assert [(p.prompt, p.first, p.question) for p in found.pairs] == [(prompt, "a", "Which is kinder?")]
    assert found.left_out == {"identical": 1, "duplicate": 1, "empty": 1, "secret": 1}
    chosen = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
    found = pairs.find(config(write_rows(tmp_path / "p.jsonl", *chosen)))
    assert [p.first for p in found.pairs] == [f"good {n}" for n in range(30)]
    asked = [{"prompt": f"Q{n}", "family": None, "why": "far"} for n in range(30)]
    found = pairs.find(config(write_rows(tmp_path / "label_next.jsonl", *asked)))
    assert not found.pairs and [found.order[formats.prompt_id(user(each["prompt"]))] for each in asked] == [*range(30)]


def test_every_row_is_shown_or_counted(tmp_path):
    def row(asked, chosen, rejected, other=None):
        return {
            "chosen": f"\n\nHuman: {asked}\n\nAssistant: {chosen}",
            "rejected": f"\n\nHuman: {other or asked}\n\nAssistant: {rejected}",
        }

    good = [row(f"Q{n}", "A", "B") for n in range(20)]
    odd = [
        row("Q\n\nAssistant: A", "B", "C"),
        row("Q", "A", "B", other="R"),
        row("Q", "", "B"),
        row("Q", "hf_" + "aB3" * 12, "B"),
        good[0],
    ]
    found = pairs.find(config(write_rows(tmp_path / "hh.jsonl", *good, *odd)))
    assert found.left_out == {"roles": 1, "context_differs": 1, "empty": 1, "secret": 1, "duplicate": 1}
    assert len(found.pairs) == 20
    assert "1 whose turns do not alternate, 1 whose replies answer different prompts" in found.describe("hh.jsonl")


def test_the_disputed_pairs_of_an_audit_and_of_cai(tmp_path):
    from rlhf_recipes.cai import dataset
    from rlhf_recipes.run_folder import mark

    case = {"prompt_id": "q", "prompt": user("Hi"), "family": None, "why": ["judges"]}
    judgements.export(str(tmp_path / "disputed.jsonl"), [{**case, "first": "a", "second": "b"}])
    [pair] = pairs.find(config(tmp_path / "disputed.jsonl")).pairs
    assert pair.prompt_id == "q" and pair.id == json.loads((tmp_path / "disputed.jsonl").read_text())["id"]
    run = tmp_path / "cai"
    mark(
        run,
        "cai",
        OmegaConf.to_yaml({"constitution": {"principles": [{"id": "kind", "judgement": "Which is kind?"}]}}),
    )
    writer = dataset.Writer(run)
    row = {"prompt": case["prompt"], "prompt_id": "q", "principle": "kind"}
    sides = {"chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "d"}]}
    writer.add("disputed", row | sides)
    writer.close()
    [pair] = pairs.find(config(run)).pairs
    assert (pair.first, pair.second, pair.principle, pair.question) == ("c", "d", "kind", "Which is kind?")
    write_rows(run / "to_label.jsonl", *({"prompt": "Hi", "first": "a", "second": f"b{n}"} for n in range(4)))
    assert len(pairs.find(config(run)).pairs) == 4  # it waits for people
    (run / "result.json").write_text("{}")
    assert len(pairs.find(config(run)).pairs) == 4  # more people may come
    assert pairs.find(config(run, splits=["disputed"])).pairs == [pair]


def config(path, **more):
    return OmegaConf.merge(OmegaConf.load(CONF / "label.yaml"), {"pairs": str(path), **more})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"annotator": "data"}, "annotator=data: must be a name"),
        ({"annotator": "../x"}, "annotator=../x: must be a name"),
        ({"annotator": ["anna", "anna"]}, "annotator=anna: is there twice"),
        ({"annotator": []}, r"annotator=\[\]: nobody labels"),
        ({"twice": 0.6, "swapped": 0.6}, "twice=0.6 swapped=0.6: no pair is shown three times"),
        ({"samples": 1}, "samples=1: makes no pair"),
    ],
)
def test_what_no_labelling_can_be_made_of(given, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        labels.check(config("x", **given))


def test_people_are_asked_for_the_pairs_of_a_whole_run_alone(compose):
    from rlhf_recipes.cai import people

    with pytest.raises(ValueError, match=r"^gate\.only=true: asks a model what it is worth"):
        people.check(compose("cai", "judge=people", "gate.only=true"))
    with pytest.raises(ValueError, match=r"^shards=1/2: people label the whole run"):
        people.check(compose("cai", "judge=people", "shards=1/2"))


def test_people_have_labelled_a_run_when_they_have_labelled_all_that_waits(compose, tmp_path):
    """Not when they are done with fewer pairs, of a run that was smaller then."""
    from rlhf_recipes.cai import people

    (tmp_path / "result.json").write_text(json.dumps({"labels": {"pairs": 1}}))
    judge = people.People(compose("cai", "judge=people", f"judge.labels={tmp_path}"), None, {})
    judge.waiting = {"a": {}}
    assert judge.finished()
    judge.waiting = {"a": {}, "b": {}}
    assert not judge.finished()


SECRET = "hf_" + "aB3" * 12


def test_what_waits_for_people_is_what_they_are_shown(compose, tmp_path):
    from rlhf_recipes.cai import people
    from rlhf_recipes.cai.backend import in_step
    from rlhf_recipes.cai.judge import Pair

    rule = SimpleNamespace(draw=lambda *_: [SimpleNamespace(id="kind", judgement="Which is kinder?")])
    made = [
        Pair("plain", user("Hi"), "Good day.", "What?"), Pair("reply", user("Key?"), f"It is {SECRET}", "No."),
        Pair("prompt", user(f"Is {SECRET} mine?"), "Yes.", "No."), Pair("empty", user("Hi"), "", "What?"),
        Pair("identical", user("Hi"), "What?", " What?"),
    ]  # fmt: skip

    def judge():
        asked = compose("cai", "judge=people", f"judge.labels={tmp_path}")
        found = people.People(asked, rule, {pair.prompt_id: None for pair in made})
        return found, *in_step([found.comparing(made, "")], None)

    waits, said = judge()
    waits.write(tmp_path / "to_label.jsonl")
    assert not waits.finished() and len(waits.waiting) == 1 and {each.p for each in said} == {None}
    found = pairs.find(config(tmp_path / "to_label.jsonl"))
    at_work = session(tmp_path, of=found.pairs)
    at_work.choose(at_work.current().key, at_work.current().stands("first"), "")
    (tmp_path / "result.json").write_text(json.dumps({"labels": {"pairs": len(found.pairs)}}))
    done, said = judge()
    assert done.finished() and [each.p for each in said] == [1.0, None, None, None, None]


@pytest.mark.parametrize(
    ("said", "flip", "route"),
    [
        ({"anna": 1.0, "ben": 0.0}, None, "disputed"),
        ({"anna": 1.0, "ben": 0.0}, False, "disputed"),
        ({"anna": 0.5, "ben": 0.5}, None, "tie"),
        ({"anna": 0.5}, True, "disputed"),
        ({"anna": 1.0, "ben": 1.0}, None, "accepted"),
    ],
)
def test_who_contradict_each_other_dispute_a_pair_and_who_see_no_difference_tie(compose, tmp_path, said, flip, route):
    from rlhf_recipes.cai import make_pairs, people
    from rlhf_recipes.cai.backend import in_step
    from rlhf_recipes.cai.judge import Pair
    from rlhf_recipes.launch import rounds

    asked = {"prompt_id": "p", "first": "Yes.", "second": "No."}
    rows = [asked | {"p": p, "judge": who, "flip": flip} for who, p in said.items()]
    write_rows(tmp_path / "judgements.jsonl", *rows)
    rule = SimpleNamespace(draw=lambda *_: [SimpleNamespace(id="kind", judgement="Which is kinder?")])
    cfg = compose("cai", "judge=people", f"judge.labels={tmp_path}")
    judge = people.People(cfg, rule, {})
    [[verdict]] = in_step([judge.comparing([Pair("p", user("Hi"), "Yes.", "No.")], "")], None)
    maker = make_pairs.PairMaker(None, judge, rule, ["on_policy"], cfg)
    assert maker._route({"source": "on_policy"}, verdict) == route
    shard = tmp_path / "shards" / "00000"
    shard.mkdir(parents=True)
    record = {"prompt_id": "p", "pairs": [vars(verdict) | {"route": route}]}
    make_pairs.write_records(shard / "records.jsonl", [record])
    assert rounds._disputed(tmp_path).value == (route == "disputed")


def test_a_run_without_a_pair_for_people_is_refused(compose, tmp_path, monkeypatch):
    from rlhf_recipes.cai import people

    monkeypatch.setattr(people, "gate", SimpleNamespace(confirm=lambda _: None, estimate=lambda *_: None))
    monkeypatch.setattr(people, "PairMaker", lambda *_: None)
    cfg = compose("cai", "judge=people", f"judge.labels={tmp_path}")
    with pytest.raises(ValueError, match=r"^judge=people: no pair of replies is left to label"):
        people.make(SimpleNamespace(dir=tmp_path), cfg, None, None, [], [])


def test_what_there_is_nothing_to_label_in(tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "config.yaml").write_text("rlhf_recipes: audit\n")
    same = write_rows(tmp_path / "same.jsonl", {"prompt": "Hi", "first": "a", "second": "a"})
    for path, said in (
        (tmp_path / "none.jsonl", "no such file or folder"),
        (tmp_path, "no run of recipes/cai.py"),
        (tmp_path / "audit", "disputed.jsonl or label_next.jsonl"),
        (same, "Nothing is left to label"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            pairs.find(config(path))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^splits=\[train\]: not one of"):
        pairs.find(config(same, splits=["train"]))


def test_one_row_is_enough_of_each_kind(tmp_path):
    both = {"first": "a", "second": "b"}
    for row in (both, {"chosen": "a", "rejected": "b"}):
        [pair] = pairs.find(config(write_rows(tmp_path / "a.jsonl", {"prompt": "Hi", **row}))).pairs
        assert (pair.prompt, pair.first, pair.second) == (user("Hi"), "a", "b")
    alike = [{"prompt": "Hi", "chosen": f"a{n}", "rejected": "b"} for n in range(3)]
    found = pairs.find(config(write_rows(tmp_path / "a.jsonl", *alike)))
    assert [pair.first for pair in found.pairs] == ["a0", "a1", "a2"] and not found.left_out.total()
    found = pairs.find(config(write_rows(tmp_path / "a.jsonl", {"prompt": "Hi"})))
    assert [row["prompt"] for row in found.prompts.train] == [user("Hi")] and found.order.keys() == {
        formats.prompt_id(user("Hi"))
    }


def test_what_is_shown_is_what_is_trained_on(tmp_path):
    asked = [
        {"system": "In French.", "history": [["a", "b"]], "prompt": "Hi"},
        {"prompt": [{"role": "system", "content": "In Dutch."}, *user("Hi")]},
        {"prompt": "Sum up:", "input": "We open at ten."},
    ]
    for row in asked:
        path = write_rows(tmp_path / "a.jsonl", {**row, "first": "Bonjour", "second": "Hello"})
        [pair] = pairs.find(config(path)).pairs
        rows = [{**row, "prompt": row["prompt"], "first": f"Bonjour {n}", "second": "Hello", "preference": "first"}
                for n in range(2)]  # fmt: skip
        data = OmegaConf.merge(OmegaConf.load(CONF / "data" / "base.yaml"),
                               {"path": write_rows(tmp_path / "b.jsonl", *rows)})  # fmt: skip
        assert pair.prompt == load_pairs(data, whole=True).train[0]["prompt"]
    said = json.dumps([*user("a"), {"role": "assistant", "content": "b"}, *user("c")])
    (tmp_path / "a.csv").write_text(f'prompt,first,second\n"{said.replace(chr(34), chr(34) * 2)}",x,y\n')
    [pair] = pairs.find(config(tmp_path / "a.csv")).pairs
    assert [turn["content"] for turn in pair.prompt] == ["a", "b", "c"]


def test_what_cannot_be_shown_is_counted_or_refused(tmp_path):
    both = {"first": "a", "second": "b"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    rows = [
        {"prompt": "Hi"}, {"prompt": [*user("a"), call]}, {"prompt": picture}, {"prompt": "Hi", "images": ["x.png"]},
        {"prompt": [*user("a"), {"role": "assistant", "content": "z"}]},
    ]  # fmt: skip
    found = pairs.find(config(write_rows(tmp_path / "a.jsonl", *({**row, **both} for row in rows))))
    assert len(found.pairs) == 1 and found.left_out == {"tools": 1, "media": 2, "roles": 1}
    for row, said in (
        ({"prompt": "Hi", "passage": "A long text."}, "column 'passage' holds a part of the prompt and is not read"),
        ({"prompt": "Hi", "request": "In French."}, "column 'request' holds a part of the prompt and is not read"),
        ({"prompt": picture[:0] + user("a") + user("b"), "input": "c d e"}, ":1: input: cannot be joined to a prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            pairs.find(config(write_rows(tmp_path / "a.jsonl", {**row, **both})))
    path = write_rows(tmp_path / "b.jsonl", {"prompt": picture, **both, "p": 1.0, "judge": "x"})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: prompt: media: turn 1 holds .*\. Remove it or the row\.$"):
        judgements.load(path)
    path = write_rows(tmp_path / "b.jsonl", {"system": "S", "prompt": "Hi", **both, "p": 1.0, "judge": "x"})
    [said] = judgements.load(path)
    assert said["prompt"] == [{"role": "system", "content": "S"}, *user("Hi")]
    assert said["prompt_id"] == formats.prompt_id(said["prompt"])


# What is on disk


def test_a_choice_is_synced_before_it_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    at_work = session(tmp_path)
    assert at_work.choose(at_work.current().key, "left", "clear", 1.5)
    assert synced == [(tmp_path / "choices.jsonl").stat().st_size]
    [kept] = lines(tmp_path / "choices.jsonl")
    assert (kept["annotator"], kept["show"], kept["note"], kept["seconds"]) == ("anna", "new", "clear", 1.5)
    assert kept["choice"] == kept["left"]


def test_an_item_that_is_not_the_current_one_is_not_chosen_in(tmp_path):
    at_work = session(tmp_path)
    first = at_work.current().key
    assert at_work.choose(first, "tie", "") and not at_work.choose(first, "left", "")
    assert not at_work.choose("", "left", "") and at_work.done == 1


def test_undo_shows_the_pair_again_with_its_note_and_outlives_the_process(tmp_path):
    at_work = session(tmp_path)
    assert not at_work.undo()
    seen = [at_work.current().key]
    at_work.choose(seen[0], "left", "because")
    seen.append(at_work.current().key)
    at_work.choose(seen[1], "skip", "")
    assert at_work.undo() and at_work.undo() and at_work.note == "because"
    assert at_work.current().key == seen[0] and session(tmp_path).done == 0
    assert lines(tmp_path / "preferences.jsonl") == []


def test_a_line_that_a_kill_cut_short_is_dropped_and_a_damaged_one_refused(tmp_path):
    at_work = session(tmp_path)
    at_work.choose(at_work.current().key, "left", "")
    path = tmp_path / "choices.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    again = session(tmp_path)
    assert again.done == 1
    again.choose(again.current().key, "right", "")
    assert len(lines(path)) == 2 and session(tmp_path).done == 2
    path.write_bytes(b'{"annotator": "anna"}\n' + whole)
    with pytest.raises(ValueError, match=r"choices.jsonl:1: is no choice\. Remove the line"):
        session(tmp_path)


def test_a_last_line_that_an_editor_left_open_counts(tmp_path):
    at_work = session(tmp_path)
    for _ in range(2):
        at_work.choose(at_work.current().key, "left", "")
    path = tmp_path / "choices.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    again = session(tmp_path)
    assert again.done == 2
    again.choose(again.current().key, "tie", "")
    assert [each["item"] for each in lines(path)] == [item.key for item in again.items[:3]]


def test_what_somebody_appends_while_the_page_runs_stays(tmp_path):
    path = tmp_path / "choices.jsonl"
    at_work = session(tmp_path)
    at_work.choose(at_work.current().key, "left", "")
    [first] = lines(path)
    for cut in (b"", b'{"annotator": "an'):
        path.write_text(json.dumps(first) + "\n")
        with path.open("ab") as file:
            file.write(cut)
        at_work = session(tmp_path)
        with path.open("a") as file:
            file.write(json.dumps({**first, "annotator": "ben"}))
        at_work.choose(at_work.current().key, "tie", "")
        at_work.choose(at_work.current().key, "tie", "")
        assert [each["annotator"] for each in lines(path)] == ["anna", "ben", "anna", "anna"]
        assert session(tmp_path).done == 3


def on_the_page(monkeypatch, path, folder, do=lambda _: None) -> dict:
    """What one person does of a file, as the command shows it; the figures of the result."""
    monkeypatch.setattr(server, "serve", lambda host, port, sessions, say: do(sessions["anna"]))
    kept: list[dict] = []
    run = SimpleNamespace(dir=folder, record=lambda **entries: entries, write_result=kept.append)
    cfg = config(path, twice=0, swapped=0)
    labels.collect(run, cfg, pairs.find(cfg).pairs, ["anna"])
    return kept[0]["labels"]["people"].get("anna", {})


def test_sides_that_change_places_in_the_file_turn_no_label(tmp_path, monkeypatch):
    def choose(session):
        for _ in range(2):
            item = session.current()
            session.choose(item.key, item.stands("first"), "")

    def better() -> list[str]:
        return [row[row["preference"]] for row in lines(tmp_path / "preferences.jsonl")]

    def swapped(rows):
        return [{**row, "first": row["second"], "second": row["first"]} for row in rows]

    rows, path = answers(3), tmp_path / "a.jsonl"
    begun = on_the_page(monkeypatch, write_rows(path, *rows), tmp_path, choose)
    assert better() == ["first answer 0", "first answer 1"]
    more = {"prompt": "Another?", "first": "x", "second": "y"}
    write_rows(path, more, *swapped(rows))
    assert on_the_page(monkeypatch, path, tmp_path)["left"] == begun["left"]
    assert better() == ["first answer 0", "first answer 1"]
    on_the_page(monkeypatch, path, tmp_path, lambda session: session.undo())
    assert better() == ["first answer 0"]

    def again(session):
        while session.left > 1:
            session.choose(session.current().key, session.current().stands("second"), "")

    on_the_page(monkeypatch, path, tmp_path, again)
    assert better() == ["y", "first answer 0", "first answer 1"]
    on_the_page(monkeypatch, write_rows(path, more, *rows), tmp_path)
    assert better() == ["y", "first answer 0", "first answer 1"]
    without = [
        {key: value for key, value in each.items() if key != "first"} for each in lines(tmp_path / "choices.jsonl")
    ]
    write_rows(tmp_path / "choices.jsonl", *without)
    on_the_page(monkeypatch, path, tmp_path)
    assert better()[1:] == ["first answer 0", "second answer 1"]  # as the lines say


def test_a_reply_stands_where_it_stood_when_the_sides_change_places():
    turned = [pairs.make(pair.prompt, pair.second, pair.first) for pair in some(20)]
    one, other = (plan.items(shown, "anna", 0.1, 0.1, seed=3) for shown in (some(20), turned))
    assert [item.in_places() for item in one] == [item.in_places() for item in other]


def test_notes_stay_with_their_pairs_when_the_file_grows(tmp_path):
    shown = some(3)
    at_work = session(tmp_path, of=shown)
    for note in ("of 0", "of 1"):
        at_work.choose(at_work.current().key, "left", note)
    at_work = session(tmp_path, of=[a_pair(9), *shown])
    assert at_work.current().pair == a_pair(9)
    seen = []
    for number in (1, 0):
        assert at_work.undo() and at_work.current().pair == shown[number]
        seen.append(at_work.note)
    assert seen == ["of 1", "of 0"]
    at_work.choose(at_work.current().key, "left", at_work.note)
    assert at_work.current().pair == shown[1] and at_work.note == "of 1"
    at_work.choose(at_work.current().key, "left", at_work.note)
    assert at_work.current().pair == a_pair(9) and at_work.note == ""


def test_what_they_wrote_is_read_as_preferences_and_as_judgements(tmp_path):
    shown = some(20)
    for name, other in (("anna", 0), ("ben", 3), ("cy", 0)):
        at_work = session(tmp_path, name=name, swapped=0.1, of=shown)
        while item := at_work.current():
            number = shown.index(item.pair)
            wanted = "skip" if number == 7 else "tie" if number == 8 else "second" if number < other else "first"
            at_work.choose(item.key, item.stands(wanted), "")
    splits = read(tmp_path / "preferences.jsonl")
    rows = [*splits.train, *splits.test]
    assert splits.report["format"] == "preference" and splits.report["dropped"]["tie"] == 1
    assert "unread" not in splits.report or set(splits.report["unread"]) <= {"people", "prompt_id"}
    assert len(rows) == 18 and all(row["chosen"][0]["content"].startswith("first") for row in rows)
    said = judgements.load(str(tmp_path / "judgements.jsonl"))
    assert {each["judge"] for each in said} == {"anna", "ben", "cy"} and said == judgements.load(str(tmp_path))
    assert len(said) == 3 * (19 + 2) and sum(each["flip"] is False for each in said) == 3 * 2 * 2
    assert sum(each["p"] == 0.0 for each in said) >= 3
    between = agreement.between(Choices(tmp_path / "choices.jsonl"), agreement.clusters_of(shown))
    assert between["anna", "cy"].value == 1.0 and between["anna", "ben"].value == 16 / 19


def test_somebody_who_always_picks_the_left_is_seen(tmp_path):
    at_work = session(tmp_path, 40, twice=0.1, swapped=0.2)
    while item := at_work.current():
        at_work.choose(item.key, "left", "")
    clusters = agreement.clusters_of(some(40))
    found = agreement.of_one(at_work.made.values(), clusters)
    assert found["left"].value == 1.0 and found["left"].low > 0.8 and found["left"].n == 52
    assert found["same_swapped"].value == 0.0 and found["same_swapped"].n == 8
    assert found["same_again"].value == 4 / 12
    flips = [each["flip"] for each in judgements.load(str(tmp_path / "judgements.jsonl")) if each["flip"] is not None]
    assert flips == [True] * 16
    said = agreement.describe(Choices(tmp_path / "choices.jsonl"), clusters)
    assert re.fullmatch(
        r"anna: .*the same choice again 33\.3 % \[.*\] of 12, .*; the left one 100\.0 % \[.*\] of 52", said
    )


def test_intervals_are_over_prompts(tmp_path):
    shown = [
        pairs.make(user(f"Question {number}?"), "a" * (1 + one), "b" * (1 + other))
        for number in range(2) for one in range(2) for other in range(3)
    ]  # fmt: skip
    for name in ("anna", "ben"):
        at_work = session(tmp_path, name=name, twice=0.4, of=shown)
        while item := at_work.current():
            at_work.choose(item.key, "left", "")
    choices, clusters = Choices(tmp_path / "choices.jsonl"), agreement.clusters_of(shown)
    found = agreement.figures(choices, clusters)
    figures = [found["between"]["anna and ben"], labels._main(choices, clusters)["after"]]
    figures += [found["people"]["anna"][key] for key in ("left", "same_again")]
    assert [(each.n, each.clusters) for each in figures] == [(12, 2), (10, 2), (17, 2), (5, 2)]


def test_two_people_on_one_pair_are_one_cluster():
    line = {"pair": a_pair().id, "choice": "first", "left": "first", "seconds": None}
    made = {show: {**line, "show": show} for show in (plan.NEW, plan.AGAIN)}
    said = labels._main(SimpleNamespace(kept={"anna": made, "ben": made}), agreement.clusters_of([a_pair()]))["after"]
    assert (said.n, said.clusters) == (2, 1)


# Who may ask


@pytest.fixture
def asked(tmp_path):
    """A client that knows the token, and what it asks."""
    from fastapi.testclient import TestClient

    from rlhf_recipes.labelling import app

    guard = Guard.of("127.0.0.1", ["anna", "ben"])
    shown = [pairs.make(user(EVIL), EVIL, "b\x1b[31m", question=EVIL), *some(3)]
    sessions = {name: session(tmp_path, name=name, of=shown) for name in guard.tokens}
    over = []
    built = app.build(guard, sessions, 8000, over.append)
    client = TestClient(built, base_url="http://127.0.0.1:8000", follow_redirects=False)
    return client, guard.tokens["anna"], sessions["anna"], over


def choose(client, token, item, **headers):
    form = {"token": token, "item": item.key, "place": "left", "note": "n"}
    return client.post("/choose", data=form, headers={"origin": "http://127.0.0.1:8000", **headers})


def test_the_page_is_text_alone_and_says_nothing_of_models(asked):
    client, token, *_ = asked
    page = client.get("/", params={"token": token})
    body = page.text.replace(page.text[page.text.index("<script nonce") : page.text.index("</script>")], "")
    assert (
        page.status_code == 200 and "<script>" not in page.text and "<img" not in page.text and "\x1b" not in page.text
    )
    assert "&lt;script&gt;alert(1)" in body and body.count("onerror=alert(2)&gt;") == 3
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert page.text.count(f'nonce="{nonce}"') == 2
    assert page.headers["cache-control"] == "no-store" and page.headers["referrer-policy"] == "same-origin"
    assert nonce not in client.get("/").text


def test_only_the_printed_address_is_answered(asked):
    client, token, *_ = asked
    assert client.get("/").status_code == 403 and client.get("/", params={"token": "x"}).status_code == 403
    assert client.get("/", params={"token": token}, headers={"host": "evil.example"}).status_code == 421
    assert client.get("/", params={"token": token}, headers={"host": "127.0.0.1.evil.example:8000"}).status_code == 421
    assert client.post("/choose", params={"token": token}, data={}).status_code == 403  # no cookie
    for path in ("/docs", "/openapi.json", "/choices.jsonl"):
        assert client.get(path).status_code == 403
    page = client.get("/", params={"token": token}, headers={"host": "localhost:9000"})  # as through a tunnel
    cookie = page.headers["set-cookie"]
    assert page.status_code == 200 and "HttpOnly" in cookie and "SameSite=strict" in cookie
    client.cookies.clear()
    assert client.get("/", params={"token": token}).status_code == 200 and client.get("/").status_code == 200
    assert client.get("/docs").status_code == 404


def test_a_post_needs_the_cookie_the_forms_token_and_the_origin(asked):
    client, token, at_work, _ = asked
    item = at_work.current()
    assert choose(client, token, item).status_code == 403  # without the cookie
    client.get("/", params={"token": token})
    for other in ({"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9000"}):
        assert choose(client, token, item, **other).status_code == 403
    assert (
        client.post("/choose", data={"token": token, "item": item.key, "place": "left"}).status_code == 403
    )  # no Origin
    for wrong in ("", "x", *(own for own in [client.cookies.get("label_8000")[:-1]])):
        assert choose(client, wrong, item).status_code == 403
    assert at_work.done == 0
    assert choose(client, token, item).status_code == 303 and at_work.done == 1
    big = client.post(
        "/choose", data={"token": token, "note": "n" * 100_000}, headers={"origin": "http://127.0.0.1:8000"}
    )
    assert big.status_code == 413
    bad = {"token": token, "item": at_work.current().key, "place": "first"}
    assert client.post("/choose", data=bad, headers={"origin": "http://127.0.0.1:8000"}).status_code == 400
    assert at_work.done == 1


def test_it_ends_when_nothing_is_left_and_not_before(asked):
    client, token, at_work, over = asked
    client.get("/", params={"token": token})
    form, headers = {"token": token}, {"origin": "http://127.0.0.1:8000"}
    assert client.post("/finish", data=form, headers=headers).status_code == 303 and not over
    while item := at_work.current():
        choose(client, token, item)
    assert "That was the last pair." in client.get("/").text
    assert client.post("/undo", data=form, headers=headers).status_code == 303 and at_work.left == 1
    choose(client, token, at_work.current())
    assert "Thank you." in client.post("/finish", data=form, headers=headers).text and over == ["anna"]


def test_other_hosts_are_answered_by_address_and_own_name_alone():
    guard = Guard.of("0.0.0.0", ["anna"])
    assert guard.knows_host("192.168.1.7:80") and guard.knows_host("[fe80::1]:80") and guard.knows_host("localhost")
    assert not guard.knows_host("evil.example:80") and not guard.knows_host("") and not guard.knows_host("[:::80")
    assert not Guard.of("127.0.0.1", ["anna"]).knows_host("192.168.1.7:80")
    assert guard.tokens["anna"] not in repr(guard)


def test_another_host_is_warned_of(tmp_path):
    said, sessions = [], {"anna": session(tmp_path, of=some(2))}
    finished = threading.Event()

    def finish():
        while len(said) < 2:
            time.sleep(0.01)
        at = Browser(re.sub(r"//[^:]+:", "//127.0.0.1:", re.search(r"http://\S+", said[1])[0]))
        for _ in range(2):
            at.post("/choose", place="tie", item=at.item())
        at.post("/finish")
        finished.set()

    threading.Thread(target=finish, daemon=True).start()
    server.serve("0.0.0.0", 0, sessions, said.append)
    assert finished.wait(60) and sessions["anna"].left == 0
    assert said[0].startswith("warning: host=0.0.0.0: whoever is on this network")


def test_a_port_that_is_taken_and_a_host_that_is_none_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^port={port}: cannot be had \(.*\)\. Choose another, or port=0"):
            server.serve("127.0.0.1", port, {}, print)
    with pytest.raises(ValueError, match=r"^port=0 host=192\.0\.2\.1: cannot be had"):
        server.serve("192.0.2.1", 0, {}, print)


# The command


def test_the_command_that_goes_on_names_the_folder_that_was_typed(monkeypatch):
    typed = SimpleNamespace(task=["pairs=a.jsonl"], hydra=["hydra.run.dir=my work", "hydra.mode=RUN"])
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: SimpleNamespace(overrides=typed))
    monkeypatch.setattr(overrides, "HydraConfig", hydra)
    assert labels._interrupted({}).endswith(" pairs=a.jsonl 'hydra.run.dir=my work'")


def test_two_ties_and_a_first_are_first():
    """By the mean, as the manual says, and not by most people."""
    said = {name: {"x": {"pair": a_pair().id, "choice": choice, "show": plan.NEW}}
            for name, choice in (("anna", "tie"), ("ben", "tie"), ("cy", "first"))}  # fmt: skip
    [row] = written.preferences([a_pair()], SimpleNamespace(kept=said))
    assert row["preference"] == "first"


def address(process) -> str:
    """What it prints, once it listens."""
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_a_kill_loses_nothing_and_the_same_command_goes_on(tmp_path, start_recipe, light_python):
    write_rows(tmp_path / "a.jsonl", *answers(6))
    command = ("label", "pairs=a.jsonl", "annotator=anna", "twice=0", "swapped=0")
    first = start_recipe(*command, cwd=tmp_path, python=light_python)
    at = Browser(address(first))
    for _ in range(3):
        at.post("/choose", place="left", item=at.item())
    kill(tmp_path, first)
    folder = tmp_path / "outputs" / "label" / "main"
    assert len(lines(folder / "choices.jsonl")) == len(lines(folder / "judgements.jsonl")) == 3
    second = start_recipe(*command, cwd=tmp_path, python=light_python)
    told = address(second)
    at = Browser(told)
    assert "3 of 6 labelled, 3 left" in at.page
    at.post("/choose", place="right", item=at.item())
    os.killpg(second.pid, signal.SIGINT)  # as Ctrl-C
    out, err = second.communicate()
    assert second.returncode == 130, err
    assert re.fullmatch(
        r"Labelled: anna 4 of 6; every choice is kept\. It goes on with: python -m rlhf_recipes\.recipes\.label "
        r"pairs=a\.jsonl annotator=anna twice=0 swapped=0\n", err,
    )  # fmt: skip
    token = told.partition("token=")[2]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_text("latin-1")]
    third = start_recipe(*command, cwd=tmp_path, python=light_python)
    at = Browser(address(third))
    for _ in range(2):
        at.post("/choose", place="left", item=at.item())
    at.post("/finish")
    out, err = third.communicate()
    assert third.returncode == 0, err
    assert "data.path=outputs/label/main/preferences.jsonl" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["labels"]["pairs"] == 6 and result["labels"]["people"]["anna"]["chosen"] == 6
    write_rows(tmp_path / "a.jsonl", *answers(5))
    lost = start_recipe(*command, cwd=tmp_path, python=light_python)
    assert "lacks 1 of the pairs that this run has labelled" in lost.communicate()[1] and lost.returncode == 2


def kill(cwd, process, run="main"):
    """The recipe itself, whose process id its lock says; who asked for it ends with it."""
    number = re.search(r"process (\d+)", (cwd / "outputs" / "label" / f".{run}.lock").read_text())[1]
    os.kill(int(number), signal.SIGKILL)
    process.communicate()


class Browser:
    """What a browser does, without one."""

    def __init__(self, address: str):
        self.base, _, self.token = address.partition("/?token=")
        self.cookie = f"label_{self.base.rpartition(':')[2]}={self.token}"
        self.page = self._ask("/")

    def item(self) -> str:
        return re.search(r'name="item" value="([^"]+)"', self.page)[1]

    def post(self, path: str, **fields) -> None:
        self.page = self._ask(path, urllib.parse.urlencode({"token": self.token, **fields}).encode())

    def _ask(self, path: str, body: bytes | None = None) -> str:
        headers = {"Cookie": self.cookie, "Origin": self.base}
        with urllib.request.urlopen(urllib.request.Request(self.base + path, body, headers)) as answer:
            return answer.read().decode()
