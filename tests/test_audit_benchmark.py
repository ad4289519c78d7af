"""RewardBench 2's rules on rewards computed by hand, and files of its shape."""

import json
import math

import numpy as np
import pytest

from rlhf_recipes.audit import benchmark
from rlhf_recipes.errors import Refusal


def question(name, subset, right=1, wrong=3):
    chosen, rejected = [f"right {n}" for n in range(right)], [f"wrong {n}" for n in range(wrong)]
    return benchmark.Question(name, subset, f"prompt of {name}", chosen, rejected)


ASKED = [
    *(question(name, "Math") for name in "123"),
    *(question(f"tied:{n}", "Ties", 2, 1) for n in (7, 8)),
    *(question(f"ref:{n}", "Ties", 1, 1) for n in (7, 8)),
]
REWARDS = [[2, 1, 0, -1], [2, 2, 1, 0], [0, 1, -1, -1], [3, 2, 1], [5, 4.5, 1], [2.5, 0.5], [2, 3]]
# Right alone 1, beside another 1/2, wrong 0.
MATH = (1 + 0.5 + 0) / 3
# 7: within 1, apart 1 and 2, both 1, so neither is above within; tanh(1/1 - 1) = 0. 8: within 1/2, apart 3.5 and -1.
TIES = (0.3 + 0.3 + 0.3 + 0.2 + 0.01 * math.tanh(-1 / 0.5 - 1)) / 2


def test_each_subset_has_its_rule_and_all_are_their_mean():
    found = benchmark.audit("reward_bench_2", ASKED, np.concatenate(REWARDS), 3)
    [figure], [table] = found["figures"], found["tables"]
    assert [(row[0], row[1].value, row[2]) for row in table["rows"]] == [
        ("Math", pytest.approx(MATH), 3),
        ("Ties", pytest.approx(TIES), 4),
    ]
    assert [row[3] for row in table["rows"]] == ["71.6 %", "34.0 %"] and "Qwen3-0.6B" in table["columns"][3]
    e = figure.estimate
    assert (e.value, e.n, e.clusters) == (pytest.approx((MATH + TIES) / 2), 7, 5)
    assert e.low < e.value < e.high
    assert found["notes"][0].startswith("3 of 10 questions are longer than max_length")
    own = benchmark.audit("mine.jsonl", ASKED[:1], REWARDS[0], 0)
    assert own["tables"][0]["columns"] == ["subset", "score", "questions"] and own["notes"] == []


def test_right_answers_of_one_reward_are_as_close_as_can_be():
    """within 0: the last term is 1, as in the benchmark's code; apart 0 too: it is 0."""
    asked = [question("tied:1", "Ties", 2, 1), question("ref:1", "Ties", 1, 1)]
    for rewards, score in (([2, 2, 1, 5, 1], 1.01), ([2, 2, 2, 5, 1], 0.3)):
        [row] = benchmark.audit("mine", asked, rewards, 0)["tables"][0]["rows"]
        assert row[1].value == pytest.approx(score)


def test_a_question_that_is_too_long_is_left_out_with_its_partner(monkeypatch):
    monkeypatch.setattr(benchmark, "render", lambda _, turns, **given: "".join(turn["content"] for turn in turns))
    asked = [
        question("1", "Math"),
        question("tied:7", "Ties", 2),
        question("ref:7", "Ties"),
        question("ref:8", "Ties"),
    ]
    kept = benchmark.fitting(asked, None, len("prompt of 1right 0"))
    assert [each.id for each in kept] == ["1"]
    assert [each.id for each in benchmark.fitting(asked, None, 99)] == ["1", "tied:7", "ref:7"]
    assert benchmark.audit("mine", [], [], 4)["skipped"].startswith("All 4 questions are longer")


def test_a_file_of_its_shape_is_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    row = {"id": "1", "subset": "Math", "prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3", "4", "5"]}
    row |= {"models": ["x"], "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "additional_metadata": {}}
    path.write_text(json.dumps(row) + "\n")
    [read] = benchmark.load(str(path))
    assert read == benchmark.Question("1", "Math", "1 + 1?", ["2"], ["3", "4", "5"])
    assert read.conversations[1] == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chosen": []}, "mine.jsonl:2: chosen is no list of answers. Give id, subset, prompt, chosen and rejected."),
        ({"rejected": [1]}, "mine.jsonl:2: rejected is no list of answers."),
        ({"subset": None}, "mine.jsonl:2: subset is no text."),
        ({"chosen": ["2", "two"]}, "mine.jsonl:2: several right answers, which the subset Ties alone has."),
        ({"subset": "Ties"}, "mine.jsonl:2: id=1: of the subset Ties it must be like tied:7 or ref:7."),
        (None, "nowhere.jsonl: "),
    ],
)
def test_what_is_no_question_is_refused_by_its_row(tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    row = {"id": "1", "subset": "Math", "prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3"]}
    rows = [row, row | (changes or {})]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    name = "nowhere.jsonl" if changes is None else "mine.jsonl"
    with pytest.raises(Refusal) as caught:
        benchmark.load(name)
    assert str(caught.value).startswith(f"benchmark={name}: {says}") and "\n" not in str(caught.value)
