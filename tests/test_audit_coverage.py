"""Coverage: counts by hand, planted families, what to label next."""

import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from rlhf_recipes.audit import coverage as v

WORDS = {
    "cooking": ["recipe", "oven", "flour", "butter", "onion", "simmer", "sauce", "garlic", "bake", "dough"],
    "code": ["python", "function", "compile", "loop", "variable", "debugger", "array", "pointer", "syntax", "stack"],
    "travel": ["flight", "hotel", "passport", "beach", "luggage", "airport", "itinerary", "museum", "visa", "train"],
}


def plant(each=40, seed=0):
    """Prompts of three topics, with the topic of each."""
    rng = np.random.default_rng(seed)
    topics = [topic for topic in WORDS for _ in range(each)]
    return ["how about " + " ".join(rng.choice(WORDS[t], 4, replace=False)) for t in topics], topics


def pair(prompt, chosen, rejected, family=None, prompt_id=None):
    def turn(role, text):
        return [{"role": role, "content": text}]

    texts = {"prompt": turn("user", prompt), "chosen": turn("assistant", chosen)}
    return texts | {"rejected": turn("assistant", rejected), "family": family, "prompt_id": prompt_id or prompt}


def words(n):
    return " ".join(["word"] * n)


def figures(section):
    return {figure.key: figure.estimate for figure in section["figures"]}


def tables(section):
    return {table["caption"]: table["rows"] for table in section["tables"]}


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("I can't help with that.", "refusal"),
        ("Try:\n- one\n- two", "list"),
        ("# A\ntext\n## B\ntext", "list"),
        ("1. one\n2) two", "list"),
        ("- one line alone", "short"),
        ("What did you have in mind?", "asks back"),
        ('He asked "why?"', "asks back"),
        (words(10), "short"),
        (words(11), "medium"),
        (words(20), "medium"),
        (words(21), "long"),
        ("", "short"),
    ],
)
def test_styles(text, style):
    assert v.style_of(text, (10, 20)) == style


def test_thirds_of_length():
    assert v.length_bounds([words(n) for n in (1, 2, 3, 4)]) == (2, 3)
    assert v.length_bounds([]) == (0, 0)


def test_the_exposure_gap_by_hand():
    # smoothed: q = (3.5, .5) / 4, p = (1.5, 2.5) / 4
    gap, ratios = v.exposure_gap(Counter(a=3), Counter(a=1, b=2))
    assert gap == pytest.approx(3.5 / 4 * math.log(3.5 / 1.5) + 0.5 / 4 * math.log(0.5 / 2.5))
    assert ratios == {"a": pytest.approx(3.5 / 1.5), "b": pytest.approx(0.2)}
    assert v.exposure_gap(Counter(a=7, b=3), Counter(a=7, b=3))[0] == 0
    assert v.exposure_gap(Counter(new=5), Counter(a=5))[1]["new"] == pytest.approx(11)


@pytest.mark.slow
def test_planted_families_are_found_and_named():
    prompts, topics = plant()
    names, place = v.cluster(prompts)
    assert len(set(names)) == 3
    assert len(set(zip(names, topics, strict=True))) == 3  # one name for one topic
    for name, topic in set(zip(names, topics, strict=True)):
        assert set(name.split(", ")) <= set(WORDS[topic])
    more, expected = plant(5, seed=9)
    by_topic = dict(zip(topics, names, strict=True))
    assert place(more) == [by_topic[topic] for topic in expected]
    assert v.cluster(prompts)[0] == names


@pytest.mark.slow
def test_contractions_name_no_family():
    prompts, _ = plant()
    names, _ = v.cluster([f"I don’t know, can't you say? {prompt}" for prompt in prompts])
    assert not {"don", "can", "know", "say"} & {word for name in names for word in name.split(", ")}


def test_further_prompts_go_to_given_families():
    prompts, topics = plant()
    more, expected = plant(5, seed=9)
    assert v.assign(prompts, topics)(more) == expected
    assert v.assign(["a", "b", "c"], ["x", "y", "y"])(["z"]) == ["y"]  # no words to go by: the largest


def test_the_ledger_by_hand():
    refusal, question = "I can't help with that.", "Which one?"
    rows = [pair(f"p{i}", question, refusal, "a") for i in range(30)]
    rows += [pair(f"q{i}", words(50), question, "b") for i in range(10)]
    section = v.audit(rows)
    counts = section["plots"][0]["counts"]
    assert section["plots"][0]["rows"] == ["a", "b"] and section["plots"][0]["columns"] == list(v.STYLES)
    assert counts == [[30, 0, 30, 0, 0, 0], [0, 0, 10, 0, 0, 10]]
    found = figures(section)
    assert found["cells_covered"].value == 2 / 12 and found["cells_covered"].n == 80
    assert found["cells_empty"].value == 8
    p = np.array([3, 3, 1, 1]) / 8
    assert found["entropy"].value == pytest.approx(-(p @ np.log(p)) / math.log(12))
    by_style = tables(section)["Answers by style, and how often they are the chosen one"]
    chosen = {row[0]: row[2] and row[2].value for row in by_style}
    assert chosen == {"refusal": 0, "list": None, "asks back": 0.75, "short": None, "medium": None, "long": 1}
    never = tables(section)["Never seen: styles that no compared answer of a family has"]
    assert never == [["a", "list, short, medium, long"], ["b", "refusal, list, short, medium"]]
    assert found["exposure_gap"].value is None and found["out_of_distribution"].value is None


@pytest.mark.slow
def test_deployment_against_the_ledger():
    prompts, _ = plant(30)
    rows = [pair(p, words(5), words(9), prompt_id=str(i)) for i, p in enumerate(prompts)]
    more, expected = plant(40, seed=5)
    travel = [p for p, topic in zip(more, expected, strict=True) if topic == "travel"]
    apart, alike = v.audit(rows, travel), v.audit(rows, more)
    gap, same = figures(apart)["exposure_gap"], figures(alike)["exposure_gap"]
    q, p = np.array([40.5, 0.5, 0.5]) / 41.5, np.full(3, 1 / 3)
    assert gap.value == pytest.approx(q @ np.log(q / p)) and gap.n == 40
    assert same.value == pytest.approx(0, abs=1e-12)
    assert figures(apart)["exposure_ratio"].value == pytest.approx(3 * 40.5 / 41.5)
    exposure = tables(apart)["Where it is used against what was compared"]
    assert exposure[0][1:4] == [40, "100.0 %", "33.3 %"] and set(exposure[0][0].split(", ")) <= set(WORDS["travel"])
    messages = [[{"role": "system", "content": "oven"}, {"role": "user", "content": text}] for text in travel]
    assert figures(v.audit(rows, messages))["exposure_gap"] == gap
    assert json.dumps(apart, default=asdict) == json.dumps(v.audit(rows, travel), default=asdict)


def test_out_of_distribution_and_generated_answers():
    rows = [pair(f"p{i}", words(3), words(9), "a", str(i)) for i in range(6)]
    features = {"held_out": np.linspace(0, 1, 101), "deployment": [0.5, 0.96, 2.0, 3.0]}
    generated = [{"prompt": "p", "text": "I can't help with that."}] * 3 + [{"prompt": "q", "text": words(3)}]
    section = v.audit(rows, features=features, generated=generated)
    found = figures(section)
    assert found["out_of_distribution"].value == 0.75
    assert found["never_generated"].value == 4
    assert found["generated_unseen"].value == 0.75
    assert tables(section)["Generated, but never compared"] == [["a", "refusal"]]
    never = tables(section)["Never generated: styles that no answer to a family has"]
    assert never == [["a", "list, asks back, medium, long"]]


def test_worth_labelling_is_uncertain_spread_and_without_duplicates():
    prompts = ["bake the bread", "bake the bread!", "sort an array", "book a flight", "boil some rice"]
    families = ["food", "food", "code", "travel", "food"]
    uncertainty, novelty = [9, 8, 1, 2, 7], [5, 5, 5, 5, 5]
    picks = v.worth_labelling(prompts, novelty, uncertainty, families, k=4)
    assert [pick["index"] for pick in picks] == [0, 3, 2, 4]
    assert picks[0]["uncertainty"] == 9 and picks[0]["family"] == "food"
    assert len(v.worth_labelling(prompts, None, uncertainty, families)) == 4  # the duplicate never
    assert [p["index"] for p in v.worth_labelling(prompts, [0, 0, 1, 0, 0], None, families, k=1)] == [2]
    assert len(v.worth_labelling(prompts, None, None, families, k=2)) == 2
    assert v.worth_labelling([], [], [], []) == []


def test_degenerate_input():
    assert "skipped" in v.audit([])
    for rows in ([pair("", "", "")], [pair("same", "a", "b", prompt_id="1")] * 25, [pair("the", "a", "b", "f")]):
        section = v.audit(rows, ["anything", ""], generated=[{"prompt": "x", "text": ""}])
        json.dumps(section, allow_nan=False, default=asdict)
        assert section["plots"][0]["counts"]
    with pytest.raises(ValueError, match=r"^families = 1 names: 2 rows\."):
        v.audit([pair("a", "b", "c")] * 2, families=["x"])
