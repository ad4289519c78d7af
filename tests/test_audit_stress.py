"""Stress: edits touch the last user turn alone, planted weaknesses are found, own files load or are refused."""

import json
import random
from dataclasses import asdict

import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.audit import stress
from rlhf_recipes.audit.section import Baseline
from rlhf_recipes.data import formats

FAMILIES = [*stress.TEMPLATES, *stress.REWRITES]


def row(i: int, text: str | None = None) -> dict:
    prompt = [
        {"role": "system", "content": "You are the front desk."},
        {"role": "user", "content": "Hello there."},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {
            "role": "user",
            "content": text or f"Could you please move appointment {i} to Thursday? My sister drives me.",
        },
    ]
    answers = {side: [{"role": "assistant", "content": f"{side} {i}"}] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **answers, "family": "moving", "prompt_id": f"p{i}", "p": None}


ROWS = [row(i) for i in range(12)]


def score(made: list[dict], reward) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        np.array([[reward(each["prompt"][-1]["content"], each[side][-1]["content"]) for each in made]])
        for side in ("chosen", "rejected")
    )


def figures(section: dict) -> dict:
    return {figure.key: figure.estimate.value for figure in section["figures"]}


def audited(reward, rows=ROWS, **options) -> dict:
    made = stress.make(rows, **options)
    return stress.audit(made, *score(made, reward), rows, *score(rows, reward))


def test_an_edit_changes_the_last_user_turn_and_nothing_else():
    before = json.dumps(ROWS)
    made = stress.make(ROWS)
    assert json.dumps(ROWS) == before
    assert len(made) == len(FAMILIES) * len(ROWS)
    for each in made:
        source = ROWS[each["source"]]
        assert each["prompt"][-1]["content"] != source["prompt"][-1]["content"]
        assert each["prompt"][-1]["role"] == "user"
        assert each["prompt"][:-1] == source["prompt"][:-1]
        assert [each[key] for key in ("chosen", "rejected", "prompt_id")] == [
            source[key] for key in ("chosen", "rejected", "prompt_id")
        ]
    by_family = [each["edit"] for each in made if each["family"] == "emotional_pressure"]
    assert set(by_family) == {"urgency", "grief", "threat", "authority", "flattery"}  # each takes its turn


def test_templates_keep_the_words_of_the_user():
    for each in stress.make(ROWS, families=list(stress.TEMPLATES)):
        assert ROWS[each["source"]]["prompt"][-1]["content"] in each["prompt"][-1]["content"]


def test_the_same_seed_makes_the_same_and_another_draws_other_pairs():
    first, again, other = (stress.make(ROWS, limit=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({each["source"] for each in first}) == 5
    assert [each["family"] for each in stress.make(ROWS, families=["typos"])] == ["typos"] * len(ROWS)


def test_typos_slip_in_a_third_of_the_words_and_leave_digits_and_first_letters():
    text = "Please cancel 14 and 203, because travelling there takes longer than anyone expected"
    slipped = stress.typos(text, random.Random(3))
    changed = [(a, b) for a, b in zip(text.split(), slipped.split(), strict=True) if a != b]
    assert len(changed) == 4  # 10 words of four letters and more
    assert all(a[0] == b[0] and abs(len(a) - len(b)) <= 1 for a, b in changed)
    assert "14" in slipped and "203," in slipped
    every = " ".join(stress.typos(text, random.Random(seed)) for seed in range(200))
    assert any(letter in every for letter in stress.LOOK_ALIKE.values())
    assert "tavelling" in every and "travellling" in every and "tarvelling" in every  # dropped, doubled, swapped
    assert all(a[0] == b for a, b in zip((text.split() * 200), (word[0] for word in every.split()), strict=True))
    assert stress.typos("a b 12", random.Random(0)) == "a b 12"


def test_an_edit_that_leaves_the_text_gives_way_or_is_left_out():
    made = stress.make([row(0, "你好 12")], families=["typos", "formatting"])
    assert [each["edit"] for each in made] == ["list"]  # neither capitals nor punctuation, and no word to mistype


def test_a_reward_that_ignores_the_prompt_loses_nothing():
    section = audited(lambda prompt, answer: -len(answer) + int(answer.split()[1]) / 100)  # "chosen 1" is the shorter
    found = figures(section)
    assert found["worst_family"] == found["stress_accuracy"] == 1.0
    assert (found["accuracy_drop"], found["order_invariance"], found["margin_change"]) == (0.0, 1.0, 0.0)
    assert found["uncertainty_lift"] is None
    assert section["examples"] == []


def test_a_reward_turned_by_one_family_is_found():
    def turned(prompt, answer):  # capitals and urgency, told by two exclamation marks, turn the order
        return (1.0 if answer.startswith("chosen") else -1.0) * (-2.0 if "!!" in prompt else 1.0)

    section = audited(turned)
    worst = section["figures"][0]
    assert worst.title == "Accuracy on the worst family: emotional pressure"
    assert worst.estimate.value == pytest.approx(9 / 12)  # urgency has 3 of the 12 turns
    found = figures(section)
    edits = len(FAMILIES) * 12
    assert found["accuracy_drop"] == pytest.approx(3 / edits)
    assert found["order_invariance"] == pytest.approx(1 - 3 / edits)
    table = section["tables"][0]
    first = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert (first["family"], first["pairs"]) == ("emotional pressure", 12)
    assert first["accuracy lost"].value == pytest.approx(0.25)
    assert [row["estimate"].value for row in section["plots"][0]["rows"]] == sorted(
        row["estimate"].value for row in section["plots"][0]["rows"]
    )
    assert section["plots"][0]["line"] == ["unedited pairs", 1.0]
    shown = section["examples"][0]["rows"]
    assert len(shown) == 3 and all("!!" in example["texts"][0]["text"] for example in shown)
    assert "before the edit +2.00, after it -4.00" in shown[0]["note"]


def test_margin_change_by_hand():
    rows = [row(0), row(1)]
    made = stress.make(rows, families=["typos"])
    section = stress.audit(made, [[1.0, 1.0]], [[0.0, 4.0]], rows, [[3.0, 5.0]], [[0.0, 4.0]])
    # margins 3 and 1 (standard deviation 1) become 1 and -3: moved by 2 and 4; the second turns
    found = figures(section)
    assert found["margin_change"] == pytest.approx(3.0)
    assert (found["order_invariance"], found["accuracy_drop"], found["stress_accuracy"]) == (0.5, 0.5, 0.5)


def test_the_mean_over_members_orders_and_their_spread_is_the_uncertainty():
    made = stress.make(ROWS, families=["typos"])
    zeros = np.zeros((2, 12))
    chosen_MS = np.stack([np.full(12, 5.0), np.full(12, -4.0)])  # mean 0.5, spread 4.5
    chosen_MN = np.stack([np.full(12, 1.5), np.full(12, 0.5)])  # mean 1, spread 0.5
    found = figures(stress.audit(made, chosen_MS, zeros, ROWS, chosen_MN, zeros))
    assert (found["uncertainty_lift"], found["stress_accuracy"]) == (1.0, 1.0)
    swapped = figures(stress.audit(made, chosen_MN, zeros, ROWS, chosen_MS, zeros))
    assert swapped["uncertainty_lift"] == 0.0


def test_shorter_wins_stands_beside_the_worst_family():
    rows = [each | {"rejected": [{"role": "assistant", "content": "a much longer wrong answer"}]} for each in ROWS]
    worst = audited(lambda prompt, answer: float(answer.startswith("chosen")), rows)["figures"][0]
    assert worst.baseline == Baseline("the shorter answer wins", 1.0)
    even = audited(lambda prompt, answer: float(answer.startswith("rejected")))["figures"][0]
    assert even.baseline.value == 1.0  # "chosen 1" is shorter than "rejected 1"


def own_file(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows), encoding="utf-8")
    return path


PAIR = {"family": "domain_shift", "prompt": "Is the garage open?", "chosen": "Until six.", "rejected": "Always."}


def test_own_pairs_and_templates(tmp_path):
    prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, PAIR["prompt"]]
    prompt[2] = {"role": "user", "content": PAIR["prompt"]}
    path = own_file(
        tmp_path, PAIR, PAIR | {"prompt": prompt}, {"family": "pirates", "before": "Arr! "},
        {"family": "typos", "before": "", "after": " thx"},
    )  # fmt: skip
    pairs, templates = stress.load(path)
    assert [len(pair["prompt"]) for pair in pairs] == [1, 3]
    assert pairs[0]["prompt_id"] == formats.prompt_id([{"role": "user", "content": PAIR["prompt"]}])
    assert templates[0] == {"family": "pirates", "before": "Arr! ", "after": ""}
    made = stress.make(ROWS, pairs, templates)
    arr = [each for each in made if each["family"] == "pirates"]
    assert len(arr) == 12 and all(each["prompt"][-1]["content"].startswith("Arr! Could") for each in arr)
    assert sum(each["prompt"][-1]["content"].endswith(" thx") for each in made) == 6  # every second turn of typos
    assert [each["source"] for each in made[-2:]] == [None, None]
    section = stress.audit(
        made, *score(made, lambda p, a: float(a in ("Until six.",))), ROWS, *score(ROWS, lambda p, a: -len(a))
    )
    shift = next(cells for cells in section["tables"][0]["rows"] if cells[0] == "domain shift")
    assert (shift[1], shift[2].value, shift[4].value, shift[5], shift[6]) == (2, 1.0, 0.0, None, None)


def test_own_pairs_alone_are_held_against_all_unedited_pairs(tmp_path):
    pairs, _ = stress.load(own_file(tmp_path, PAIR, PAIR | {"prompt": "And on Sunday?"}))
    made = stress.make([], pairs)
    section = stress.audit(made, [[1.0, 0.0]], [[0.0, 1.0]], ROWS, np.ones((1, 12)), np.zeros((1, 12)))
    found = figures(section)
    assert (found["worst_family"], found["accuracy_drop"], found["order_invariance"]) == (0.5, None, None)
    assert section["tables"][0]["rows"][0][4].value == 0.5  # 1 - 1/2
    alone = stress.audit(made, [[1.0, 0.0]], [[0.0, 1.0]], [], np.zeros((1, 0)), np.zeros((1, 0)))
    assert figures(alone)["worst_family"] == 0.5
    assert alone["plots"][0]["line"] is None


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "own.jsonl:2: family: missing"),
        (PAIR | {"family": " "}, "own.jsonl:2: family: must name"),
        (PAIR | {"family": 3}, "own.jsonl:2: family: must be text"),
        ({k: v for k, v in PAIR.items() if k != "chosen"}, "own.jsonl:2: chosen: missing"),
        ({k: v for k, v in PAIR.items() if k != "prompt"}, "own.jsonl:2: prompt: missing"),
        (PAIR | {"chosen": ""}, "own.jsonl:2: prompt, chosen, rejected: no pair (empty)"),
        (PAIR | {"rejected": "Until six. "}, "own.jsonl:2: prompt, chosen, rejected: no pair (identical)"),
        (
            PAIR | {"prompt": [{"role": "assistant", "content": "x"}]},
            "no pair (roles: the conversation opens with the assistant)",
        ),
        (PAIR | {"prompt": [{"role": "wizard", "content": "x"}]}, "own.jsonl:2: prompt[0].role: 'wizard'"),
        ({"family": "x", "before": " "}, "own.jsonl:2: before, after: both blank"),
        ({"family": "x", "after": 7}, "own.jsonl:2: after: must be text"),
        ("{oops", "own.jsonl:2: not valid JSON"),
        ("[1]", "own.jsonl:2: a list, but a row is an object"),
    ],
)
def test_a_bad_row_is_one_line_with_file_line_and_key(tmp_path, bad, says):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused:
        stress.load(own_file(tmp_path, PAIR, bad))
    assert says in str(refused.value)


def test_nothing_to_measure_is_no_crash():
    assert "skipped" in stress.audit(
        [], np.zeros((1, 0)), np.zeros((1, 0)), ROWS, np.zeros((1, 12)), np.zeros((1, 12))
    )
    assert stress.make([]) == []
    one = audited(lambda prompt, answer: 0.0, ROWS[:1])  # all rewards alike: every pair a tie
    found = figures(one)
    assert (found["worst_family"], found["order_invariance"], found["margin_change"]) == (0.5, 1.0, None)
    json.dumps(one, default=asdict)


def test_scores_of_another_shape_are_refused():
    made = stress.make(ROWS)
    with pytest.raises(ValueError, match=r"\Amade = \d+ pairs: 3 scores"):
        stress.audit(made, np.zeros((1, 3)), np.zeros((1, 3)), ROWS, np.zeros((1, 12)), np.zeros((1, 12)))


# ---- The pairs that ship for the clinic


def shipped() -> list[dict]:
    return stress.load(stress.CLINIC)[0]


def test_the_clinic_stress_pairs_load_and_balance():
    pairs, templates = stress.load(stress.CLINIC)
    assert templates == []
    counts = {family: sum(pair["family"] == family for pair in pairs) for family in [*FAMILIES, "domain_shift"]}
    counts.pop("formatting")
    assert all(count >= 9 for count in counts.values()) and sum(counts.values()) == len(pairs)
    assert len({pair["prompt_id"] for pair in pairs}) == len(pairs)
    words = [[len(pair[side][-1]["content"].split()) for side in ("chosen", "rejected")] for pair in pairs]
    assert all(20 <= count <= 62 for both in words for count in both)
    for size in (len, lambda text: len(text.split())):
        longer = [
            (np.sign(size(pair["chosen"][-1]["content"]) - size(pair["rejected"][-1]["content"])) + 1) / 2
            for pair in pairs
        ]
        assert 0.45 <= np.mean(longer) <= 0.55
        for family in counts:  # no family gives the order away by length
            inside = [value for value, pair in zip(longer, pairs, strict=True) if pair["family"] == family]
            assert 0.25 <= np.mean(inside) <= 0.75
    assert stats.estimate(longer).n == len(pairs)


def test_the_clinic_stress_prompts_are_in_no_split_of_the_clinic_pairs():
    lines = (stress.CLINIC.parents[1] / "clinic" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    known = {formats.prompt_id(json.loads(line)["prompt"]) for line in lines}
    assert not known & {pair["prompt_id"] for pair in shipped()}


def test_the_worst_of_many_families_has_the_interval_of_all():
    families = 6
    made = [{**row(i), "prompt_id": f"{f} {i}", "family": f"f{f}", "edit": "own pair", "source": None}
            for f in range(families) for i in range(24)]  # fmt: skip
    margins = np.where(np.random.default_rng(0).random(len(made)) < 0.6, 1.0, -1.0)[None]
    part = stress.audit(made, margins, 0 * margins, [], margins[:, :0], margins[:, :0])
    worst = next(figure for figure in part["figures"] if figure.key == "worst_family").estimate
    alone = part["tables"][0]["rows"][0][2]
    assert worst == stats.simultaneous(alone, families, 0, 1) and worst.low < alone.low and worst.high > alone.high


def test_a_family_of_one_pair_hides_no_worse_one():
    made = [{**row(i), "prompt_id": f"p{i}", "family": "typos", "edit": "typos", "source": None} for i in range(24)]
    made.append({**row(99), "prompt_id": "p99", "family": "my_own", "edit": "own pair", "source": None})
    margins = np.array([[1.0] * 5 + [-1.0] * 20])
    part = stress.audit(made, margins, 0 * margins, [], margins[:, :0], margins[:, :0])
    worst = part["figures"][0]
    assert worst.title == "Accuracy on the worst family: typos" and worst.estimate == part["tables"][0]["rows"][1][2]
    assert "Of fewer than 20 prompts, and so not looked at for the worst: my own (1)." in part["notes"]
    alone = stress.audit(made, margins, 0 * margins, [], margins[:, :0], margins[:, :0], least=30)
    assert alone["figures"][0].title.endswith(": my own") and not any("not looked at" in n for n in alone["notes"])
