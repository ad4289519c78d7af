"""Credit: sentences lose nothing, credits add up to the last bit, a planted sentence gets what it earns."""

import itertools
import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from rlhf_recipes.audit import credit
from rlhf_recipes.audit.section import Baseline

CLINIC = Path(__file__).parents[1] / "rlhf_recipes" / "assets" / "clinic" / "pairs.jsonl"


def row(i: int, chosen: str, rejected: str = "No.") -> dict:
    messages = {"chosen": chosen, "rejected": rejected}
    sides = {side: [{"role": "assistant", "content": text}] for side, text in messages.items()}
    return {"prompt": [{"role": "user", "content": f"Question {i}?"}], **sides, "prompt_id": f"p{i}"}


def scored(made, reward) -> list[list[float]]:
    return [[reward(each["completion"][-1]["content"]) for each in made]]


def audited(rows, reward, **options) -> dict:
    made = credit.make(rows, **options)
    return credit.audit(made, scored(made, reward), rows)


def figures(section: dict) -> dict:
    return {figure.key: figure.estimate.value for figure in section["figures"]}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ("Dr. Osei is in. Mr. Bell, too.", ["Dr. Osei is in. ", "Mr. Bell, too."]),
        ("No. Please stay.", ["No. ", "Please stay."]),
        ("Room no. 5 is free. Come in.", ["Room no. 5 is free. ", "Come in."]),
        ("Bring it, e.g. a card. Or both.", ["Bring it, e.g. a card. ", "Or both."]),
        ("At 3 p.m. on Tuesday. At 9 a.m. Then go.", ["At 3 p.m. on Tuesday. ", "At 9 a.m. ", "Then go."]),
        ("It costs 3.50 at most. Fine?", ["It costs 3.50 at most. ", "Fine?"]),
        ("J. R. Smith called. He is fine.", ["J. R. Smith called. ", "He is fine."]),
        ("1. Ring us.\n2. Wait here. 3. Sit.", ["1. Ring us.\n", "2. Wait here. ", "3. Sit."]),
        ("- one\n- two\n\n* three", ["- one\n", "- two\n\n", "* three"]),
        ("“Go.” He went. (Really.) Yes.", ["“Go.” ", "He went. ", "(Really.) ", "Yes."]),
        ("Well... maybe not. So be it…  Fine.", ["Well... maybe not. ", "So be it…  ", "Fine."]),
        ("你好。再见！好", ["你好。", "再见！", "好"]),
        ("Hello! :) And bye. 🙂", ["Hello! ", ":) And bye. 🙂"]),
        ("...\n\nFirst words. ---", ["...\n\nFirst words. ---"]),
        ("z.B. Montag. Dann Dienstag.", ["z.B. Montag. ", "Dann Dienstag."]),
        ("no stop at all", ["no stop at all"]),
        ("   ", ["   "]),
        ("", []),
    ],
)
def test_sentences(text, pieces):
    assert credit.split(text) == pieces


def test_splitting_loses_nothing_of_any_text():
    rng = random.Random(0)
    parts = ["Dr.", "a", "B", " ", "\n", ". ", "! ", "…", "”", "1. ", "3", "e.g. ", "。", "\t", "(", "é", "🙂", "\r\n"]
    texts = ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(3000)]
    texts += [json.loads(line)["chosen"] for line in CLINIC.read_text(encoding="utf-8").splitlines()]
    for text in texts:
        pieces = credit.split(text)
        assert "".join(pieces) == text
        assert len(pieces) <= credit.SENTENCES
        if len(pieces) > 1:
            assert all(any(letter.isalnum() for letter in piece) for piece in pieces)


def test_many_sentences_are_joined_evenly():
    pieces = credit.split(" ".join(f"S{i}." for i in range(30)))
    assert len(pieces) == 12 and {piece.count(".") for piece in pieces} == {2, 3}
    assert [piece.count(".") for piece in credit.split("A b. C d. E f. G h.", most=2)] == [2, 2]


def test_the_parts_of_an_answer():
    made = credit.make([row(0, "A one. B two. C three.")])
    texts = [each["completion"][-1]["content"] for each in made]
    assert texts == ["", "A one.", "A one. B two.", "A one. B two. C three.", "B two. C three.", "C three.",
                     "A one. C three."]  # fmt: skip
    assert {each["side"] for each in made} == {"chosen"}  # "No." is one sentence
    assert len(credit.make([row(0, "A one. B two. C three. D four. E five.")])) == 3 * 5 - 2


def test_the_whole_answer_stays_as_it_is():
    made = credit.make([row(0, " A one.  B two. \n")])
    whole = next(each for each in made if each["kept"] == (0, 1))
    assert whole["completion"][-1]["content"] == " A one.  B two. \n"


def rewards_of(S: int, draw) -> dict:
    return {kept: draw() for kept in credit._subsets(S)}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_credits_add_up_to_the_last_bit_in_any_order(scale):
    rng = random.Random(1)
    for _ in range(500):
        S = rng.randrange(2, 13)
        mixed = rewards_of(S, lambda: rng.gauss(0, 1) * scale * 10 ** rng.randrange(-9, 1))
        credits, _, total = credit.attribute(mixed)
        shuffled = credits.tolist()
        rng.shuffle(shuffled)
        assert math.fsum(credits) == sum(shuffled) == total
        whole = mixed[tuple(range(S))] - mixed[()]
        assert total == pytest.approx(whole, abs=1e-12 * max(map(abs, mixed.values())))


def test_float32_rewards_are_taken_as_they_are():
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = rewards_of(5, lambda: float(np.float32(rng.normal())))
        _, without_S, total = credit.attribute(drawn)
        assert total == drawn[(0, 1, 2, 3, 4)] - drawn[()]
        assert without_S[2] == drawn[(0, 1, 2, 3, 4)] - drawn[(0, 1, 3, 4)]


def test_two_sentences_by_hand_are_the_shapley_value():
    drawn = {(): 1.0, (0,): 2.0, (1,): 5.0, (0, 1): 4.0}
    credits, without, total = credit.attribute(drawn)
    assert credits.tolist() == [0.0, 3.0]  # ((2-1) + (4-5)) / 2, ((4-2) + (5-1)) / 2
    assert (without.tolist(), total) == ([-1.0, 2.0], 3.0)
    orders = list(itertools.permutations((0, 1)))
    shapley = [0.0, 0.0]
    for order in orders:
        for place, s in enumerate(order):
            before = tuple(sorted(order[:place]))
            shapley[s] += (drawn[tuple(sorted((*before, s)))] - drawn[before]) / len(orders)
    assert credits.tolist() == shapley


def test_an_additive_reward_is_given_back():
    worth = [0.5, -2.0, 0.25, 3.0]
    drawn = {kept: 7.0 + sum(worth[s] for s in kept) for kept in credit._subsets(4)}
    credits, without, total = credit.attribute(drawn)
    assert credits.tolist() == without.tolist() == worth
    assert total == sum(worth)


def test_the_planted_sentence_gets_all_the_credit():
    rows = [row(i, f"Hello {i}. We help. The magic word is here. Bye now.") for i in range(6)]
    section = audited(rows, lambda text: 2.0 * ("magic" in text))
    found = figures(section)
    assert (found["first_share"], found["last_share"], found["credit_concentration"]) == (0.0, 0.0, 1.0)
    assert found["leave_one_out_agreement"] == pytest.approx(1.0)
    assert section["figures"][0].baseline == Baseline("uniform", 0.25)
    assert [line[2].value for line in section["tables"][0]["rows"]] == [0.0, 1.0, 0.0]
    assert [line[3].value for line in section["tables"][0]["rows"]] == [0.25, 0.5, 0.25]
    example = section["examples"][0]["rows"][0]
    assert {"name": "+2.00 (left out: +2.00)", "text": "The magic word is here."} in example["texts"]
    assert example["note"] == "The credits add up to +2.00."


@pytest.mark.parametrize(("opening", "key"), [("Hello", "first_share"), ("Bye", "last_share")])
def test_openings_and_closings_are_told_apart(opening, key):
    rows = [row(i, "Hello there. It is open. Come in. Bye now.", "Hello you. We are closed. Bye.") for i in range(4)]
    found = figures(audited(rows, lambda text: float(opening in text)))
    other = {"first_share": "last_share", "last_share": "first_share"}[key]
    assert (found[key], found[other]) == (1.0, 0.0)


def test_what_is_said_twice_is_missed_by_leave_one_out_alone():
    rows = [row(0, "We care. We open at nine. We care.")]
    made = credit.make(rows)
    section = credit.audit(made, scored(made, lambda text: float("care" in text)), rows)
    found = figures(section)
    assert (found["first_share"], found["last_share"]) == (0.5, 0.5)
    credits, without, _ = credit.attribute(
        {each["kept"]: float("care" in each["completion"][-1]["content"]) for each in made}
    )
    assert (credits.tolist(), without.tolist()) == ([0.5, 0.0, 0.5], [0.0, 0.0, 0.0])
    assert found["leave_one_out_agreement"] is None


def test_two_sentences_leave_nothing_between():
    rng = random.Random(0)
    rows = [row(i, "One here. Two here.") for i in range(200)]
    made = credit.make(rows, limit=200)
    section = credit.audit(made, [[rng.gauss(0, 1) for _ in made]], rows)
    assert section["tables"][0]["rows"][1][2].value == 0.0


def test_members_are_averaged_and_prompts_are_clusters():
    rows = [row(i, "One here. Two here.") for i in range(5)]
    made = credit.make(rows)
    first = scored(made, lambda text: 2.0 * ("One" in text))[0]
    second = scored(made, lambda text: 2.0 * ("Two" in text))[0]
    section = credit.audit(made, np.array([first, second]), rows)
    assert figures(section)["first_share"] == 0.5
    assert section["figures"][0].estimate.clusters == 5
    assert credit.make(rows, limit=2, seed=1) == credit.make(rows, limit=2, seed=1)
    assert len({each["source"] for each in credit.make(rows, limit=2)}) == 2


def test_nothing_to_share_is_no_crash():
    assert "skipped" in credit.audit([], np.zeros((1, 0)), [])
    flat = audited([row(0, "One here. Two here.")], lambda text: 3.0)
    assert flat["figures"] == [] and "the same whatever" in flat["notes"][0]
    one = audited([row(0, "One here. Two here.")], len)
    assert one["figures"][0].estimate.low is None
    json.dumps([flat, one], default=asdict)
    with pytest.raises(ValueError, match=r"\Amade = 4 rows: 2 scores\. Pass one for each\.\Z"):
        credit.audit(credit.make([row(0, "One here. Two here.")]), [[1.0, 2.0]], [])


# ---- PPO


def write_run(folder: Path, steps: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)), encoding="utf-8")
    return folder


def step(explained: float, seconds: float, **more) -> dict:
    return {"explained_variance": explained, "seconds/rollout": seconds, "loss": seconds} | more


def test_a_ppo_run_is_read_by_rollout(tmp_path):
    steps = [
        step(0.0, 1.5),
        step(0.0, 1.5),
        step(0.2, 1.6),
        step(0.5, 1.7),
        step(0.5, 1.7),
        step(0.5, 1.8),
        {"eval": 1},
    ]
    run = credit.read_run(write_run(tmp_path, steps))
    assert run == {"explained_variance": [0.0, 0.2, 0.5, 0.5], "advantage": {}}
    section = credit.audit([], np.zeros((1, 0)), [], run)
    assert figures(section) == {"value_explained_variance": 0.5}  # of the second half
    assert section["figures"][0].baseline.value == 0.0
    assert any("no record of its advantages" in note for note in section["notes"])


def test_logged_advantages_are_shown(tmp_path):
    shares = {"advantage/first_share": 0.1, "advantage/last_share": 0.6, "advantage/uniform_share": 0.25}
    run = credit.read_run(write_run(tmp_path, [step(0.1, 1.0, **shares), step(0.2, 2.0, **shares)]))
    section = credit.audit([], np.zeros((1, 0)), [], run)
    assert figures(section)["advantage_last_share"] == 0.6
    assert section["figures"][1].baseline == Baseline("uniform", 0.25)
    assert section["notes"] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no metrics.jsonl in it"),
        ("{oops", "metrics.jsonl:1: not valid JSON"),
        ('{"loss": 1}', "no explained_variance in it"),
        ('{"explained_variance": NaN}', "no explained_variance in it"),
    ],
)
def test_a_run_that_is_none_is_one_line(tmp_path, text, says):
    if text:
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused:
        credit.read_run(tmp_path)
    assert says in str(refused.value)
