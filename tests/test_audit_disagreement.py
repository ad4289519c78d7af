"""Agreement by hand and by the package, planted disagreement, and whether a reward model shows it."""

import json
import math
from dataclasses import asdict

import krippendorff
import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.audit import disagreement, judgements
from rlhf_recipes.data import formats

A, B = "answer a", "answer b"


def said(p, prompt="q", judge="j", principle=None, first=A, second=B, **more):
    asked = [{"role": "user", "content": f"about {prompt}"}]
    found = {"prompt_id": prompt, "prompt": asked, "first": first, "second": second, "p": p, "judge": judge}
    return found | {"principle": principle, "family": None, "flip": None} | more


def rows_of(prompts):
    """Pairs in which `A` is chosen."""
    sides = [[{"role": "assistant", "content": text}] for text in (A, B)]
    return [
        {"prompt_id": name, "prompt": [], "chosen": sides[0], "rejected": sides[1], "family": None, "p": None}
        for name in prompts
    ]


def figures(*args, **kwargs):
    return {each.key: each.estimate for each in disagreement.audit(*args, **kwargs)["figures"]}


def table(section, caption):
    return next(each for each in section["tables"] if each["caption"] == caption)


def why(*args, **kwargs):
    return [case["why"] for case in disagreement.cases(*args, **kwargs)]


def test_kappa_by_hand():
    # same choice on 3 of 4, no ties: 2 * .75 - 1
    assert disagreement.kappa([0.9, 0.8, 0.1, 0.7], [0.6, 0.9, 0.4, 0.2]) == pytest.approx(0.5)
    # a tie rate of 1/4 and of 1/2; agreement on 2 of 4; chance = 1/8 + (3/4)(1/2)/2 = 5/16
    assert disagreement.kappa([0.5, 0.9, 0.1, 0.9], [0.5, 0.9, 0.5, 0.2]) == pytest.approx(
        (1 / 2 - 5 / 16) / (11 / 16)
    )
    assert disagreement.kappa([0.9, 0.1], [0.9, 0.1]) == 1 and disagreement.kappa([0.9, 0.1], [0.1, 0.9]) == -1
    assert math.isnan(disagreement.kappa([0.5], [0.5])) and math.isnan(disagreement.kappa([], []))
    weighted = disagreement.kappa([0.9, 0.9], [0.9, 0.1], np.array([3.0, 1.0]))
    assert weighted == disagreement.kappa([0.9] * 4, [0.9] * 3 + [0.1])


def test_kappa_is_sklearns_with_both_orders():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    a, b = (rng.choice([0.2, 0.5, 0.9], size=60) for _ in range(2))
    both = [np.sign(np.concatenate([x, 1 - x]) - 0.5).astype(int) for x in (a, b)]
    assert disagreement.kappa(a, b) == pytest.approx(cohen_kappa_score(*both))


def test_alpha_by_hand():
    # in both orders 8 units, 16 values, 8 of each choice; 4 of 16 coincidences differ, 2 * 8 * 8 / (16 * 15) by chance
    opinions = [[0.9, 0.8], [0.9, 0.6], [0.1, 0.2], [0.9, 0.1]]
    found = disagreement.alpha(opinions, list("wxyz"), "nominal")
    assert found.value == pytest.approx(1 - 0.25 / (128 / 240))
    assert (found.n, found.clusters) == (4, 4) and found.low < found.value < found.high
    # values .9 .7 .1 .3: (p - q)^2 is .04 within, 1.6 / 6 on average over all pairs
    assert disagreement.alpha([[0.9, 0.7]], ["q"], "interval").value == pytest.approx(1 - 0.04 / (1.6 / 6))


def test_krippendorffs_published_example():
    # Krippendorff 2011, Computing Krippendorff's Alpha-Reliability: 4 observers, 12 units; nominal .743
    none = math.nan
    data = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, none, none, none],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, none, 3],
        [none, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, none],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, none],
    ]
    assert krippendorff.alpha(data, level_of_measurement="nominal") == pytest.approx(0.743, abs=5e-4)
    # by hand: 40 values in 11 units; see the coincidences of units 2, 6, 8 (2223, 1234, 1121)
    values = [[x for x in unit if not math.isnan(x)] for unit in zip(*data, strict=True)]
    values = [unit for unit in values if len(unit) > 1]
    differing = sum(a != b for unit in values for a in unit for b in unit)
    assert differing == 6 + 12 + 6
    observed = sum(sum(a != b for a in unit for b in unit) / (len(unit) - 1) for unit in values) / 40
    flat = [x for unit in values for x in unit]
    expected = sum(a != b for a in flat for b in flat) / (40 * 39)
    assert len(flat) == 40 and 1 - observed / expected == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_the_packages_with_both_orders():
    rng = np.random.default_rng(1)
    opinions = [rng.choice([0.1, 0.3, 0.5, 0.8], size=rng.integers(1, 5)).tolist() for _ in range(50)]
    width = max(map(len, opinions))
    padded = np.array([ps + [math.nan] * (width - len(ps)) for ps in opinions])
    both = np.concatenate([padded, 1 - padded]).round(9).T
    names = [str(n) for n in range(50)]
    interval = disagreement.alpha(opinions, names, "interval")
    assert interval.value == pytest.approx(krippendorff.alpha(both, level_of_measurement="interval"))
    nominal = disagreement.alpha(opinions, names, "nominal")
    choices = np.where(np.isnan(both), math.nan, np.sign(both - 0.5))
    assert nominal.value == pytest.approx(krippendorff.alpha(choices, level_of_measurement="nominal"))
    assert nominal.n == sum(len(ps) > 1 for ps in opinions)
    # the interval is of the same coefficient: resamples of alike prompts do not move it
    alike = disagreement.alpha([[0.9, 0.1, 0.9]] * 30, names[:30], "nominal")
    assert alike.low == pytest.approx(alike.high, abs=1e-9) == pytest.approx(alike.value)


def test_alpha_of_nothing():
    for level in ("nominal", "interval"):
        assert disagreement.alpha([], [], level).value is None
        assert disagreement.alpha([[0.9]], ["q"], level).value is None
        assert disagreement.alpha([[0.5, 0.5]] * 3, list("abc"), level).value is None
        assert disagreement.alpha([[0.9, 0.9]] * 3, list("abc"), level).value == 1


@pytest.mark.parametrize(
    ("opinions", "reason"),
    [
        ([said(0.9, flip=True)], ["order"]),
        ([said(0.9, flip=False)], []),
        ([said(0.54)], ["close"]),
        ([said(0.56)], []),
        ([said(0.99, principle="x"), said(0.65, principle="y")], ["principles"]),  # sd .17
        ([said(0.9, principle="x"), said(0.65, principle="y")], []),  # sd .125
        ([said(0.9), said(0.2, judge="k")], ["judges"]),
        ([said(0.9), said(0.6, judge="k")], []),
        ([said(0.9), said(0.8, judge="k", first=B, second=A)], ["judges"]),
        ([said(0.9), said(0.0, judge="human")], ["label"]),
        ([said(0.9), said(0.0, judge="data")], ["label"]),
        ([said(1.0, judge="data"), said(0.0, judge="human")], ["labels"]),
        ([said(0.9), said(0.5, judge="human")], ["close"]),  # a tie contradicts nobody
        ([said(0.9), said(0.2, judge="k"), said(1.0, judge="human")], ["judges", "label"]),
    ],
)
def test_a_pair_is_kept_for_its_reason(opinions, reason):
    assert why(opinions) == [reason]
    kept = disagreement.disputed(opinions)
    assert [case["why"] for case in kept] == ([reason] if reason else [])


def test_a_sure_reward_model_that_differs_is_a_reason():
    rows, opinions = rows_of(["q"]), [said(0.9)]

    def reasons(chosen, **limits):
        return why(opinions, rows, np.array([[chosen, chosen]]).T, np.zeros((2, 1)), limits)[0]

    assert reasons(-1.2) == ["reward_model"]  # sigmoid(1.2) = .77
    assert reasons(-1.0) == [] and reasons(1.2) == []  # .73; of the same mind
    assert reasons(-1.0, sure=0.7) == ["reward_model"]
    # the mean of the members counts: -3 and 1
    assert why(opinions, rows, np.array([[-3.0], [1.0]]), np.zeros((2, 1)), {"sure": 0.7}) == [["reward_model"]]
    # rows and judgements may name the answers in other orders
    assert why([said(0.1, first=B, second=A)], rows, [[-1.2]], [[0.0]]) == [["reward_model"]]


def test_limits_move_the_reasons():
    assert why([said(0.56)], limits={"close": 0.1}) == [["close"]]
    spread = [said(0.9, principle="x"), said(0.65, principle="y")]
    assert why(spread, limits={"spread": 0.1}) == [["principles"]]


def test_planted_disagreement_is_found_and_ranked():
    names = [f"q{n}" for n in range(40)]
    many = [said(0.9, name, judge, family="calm") for name in names for judge in ("j", "k")]
    planted = [said(p, "planted", judge, family="hot") for judge, p in (("j", 0.95), ("k", 0.05), ("human", 0.0))]
    lesser = [said(p, "lesser", judge, family="hot") for judge, p in (("j", 0.6), ("k", 0.4))]
    section = disagreement.audit([*many, *lesser, *planted])
    found = {each.key: each.estimate.value for each in section["figures"]}
    assert found["disputed"] == pytest.approx(2 / 42)
    kept = disagreement.disputed([*many, *lesser, *planted])
    assert [(case["prompt_id"], case["why"]) for case in kept] == [
        ("planted", ["judges", "label"]),
        ("lesser", ["judges"]),
    ]
    shown = section["examples"][0]["rows"][0]
    assert [text["text"] for text in shown["texts"]] == ["about planted", A, B]
    assert "j 0.95; k 0.05" in shown["note"] and "human 0.00" in shown["note"]
    family = {row[0]: row for row in table(section, "By family")["rows"]}
    assert (family["hot"][2].value, family["calm"][2].value) == (1.0, 0.0)
    who = table(section, "Share of other choices, by family")
    column = who["columns"].index("j and k")
    assert {row[0]: row[column].value for row in who["rows"]} == {"hot": 1.0, "calm": 0.0}
    matrix = table(section, "Cohen's kappa")
    assert matrix["columns"] == ["judge", "j", "k", "human"]
    assert matrix["rows"][0][1:] == [1.0, round(2 * 40 / 42 - 1, 3), -1.0]
    assert matrix["rows"][2][1:] == [-1.0, 1.0, 1.0]
    assert found["kappa_label"] == -1.0
    reasons = {row[0]: row[1] for row in table(section, "Why pairs are disputed")["rows"]}
    assert reasons["judges differ"] == 2 and reasons["a judge differs from the label"] == 1


@pytest.mark.slow
def test_flip_rates():
    opinions = [said(0.9, f"q{n}", "j", principle, flip=n < 3) for n in range(10) for principle in ("x", "y")]
    opinions += [said(0.9, f"q{n}", "k", flip=False) for n in range(10)]
    section = disagreement.audit(opinions)
    assert figures(opinions)["flip_rate"].value == pytest.approx(3 / 20)
    rows = {row[0]: row[2].value for row in table(section, "Winner changes with the order")["rows"]}
    assert rows == {"judge j": 0.3, "judge k": 0.0, "principle x": 0.3, "principle y": 0.3}


def divided_and_unanimous(rng, count=60):
    """Judgements of two judges; the first half of the pairs divides them."""
    names = [f"q{n}" for n in range(2 * count)]
    opinions = [said(0.9, name) for name in names]
    return names, [*opinions, *(said(0.1 if n < count else 0.9, name, "k") for n, name in enumerate(names))]


@pytest.mark.slow
def test_a_reward_model_that_shows_disagreement_and_one_that_hides_it():
    rng = np.random.default_rng(2)
    names, opinions = divided_and_unanimous(rng)
    rows, none = rows_of(names), np.zeros((1, 120))
    shows = np.where(np.arange(120) < 60, rng.uniform(-0.1, 0.1, 120), rng.uniform(2, 3, 120))[None]
    # against the opinions: its own disagreement makes no pair a divided one, or the measure would run in a circle
    found = figures(opinions, rows, -shows, none)
    assert found["margin_auroc"].value == 1.0 and found["unanimous_accuracy"].value == 0.0
    assert found["divided_confidence"].value < 0.03
    hides = rng.permutation(np.concatenate([np.linspace(1, 2, 60)] * 2))
    hides[60:] = rng.permutation(hides[:60])  # the same margins on both halves
    section = disagreement.audit(opinions, rows, hides[None], none)
    found = {each.key: each for each in section["figures"]}
    assert found["margin_auroc"].estimate.value == pytest.approx(0.5)
    same = found["divided_confidence"]
    assert same.estimate.value == pytest.approx(same.baseline.value)
    assert [each["name"] for each in section["plots"][0]["series"]] == ["unanimous", "divided"]
    assert any("cannot be told from a coin" in note for note in section["notes"])
    assert found["unanimous_accuracy"].estimate.value == 1.0


def test_alpha_over_judges_and_over_principles_are_apart():
    names = [f"q{n}" for n in range(20)]
    opinions = [said(p, name, judge, principle) for name in names for judge, principle, p in (
        ("j", "x", 0.9), ("j", "y", 0.2), ("k", "x", 0.9), ("k", "y", 0.2))]  # fmt: skip
    found = figures(opinions)
    assert found["alpha"].value == 1.0 and found["alpha_principles"].value < 0
    assert figures([each for each in opinions if each["judge"] == "j"])["alpha"].value is None


def test_one_opinion_a_pair_says_what_to_give():
    for opinions in ([], [said(0.9)], [said(0.52, f"q{n}") for n in range(5)]):
        section = disagreement.audit(opinions)
        assert "second judge" in section["skipped"] and section["figures"] == []
    assert "skipped" not in disagreement.audit([said(0.9, flip=False)])
    assert "skipped" not in disagreement.audit([said(0.9, principle="x"), said(0.9, principle="y")])


def test_one_pair_and_all_alike():
    section = disagreement.audit([said(0.9), said(0.9, judge="k")])
    json.dumps(section, allow_nan=False, default=asdict)
    assert section["examples"] == []
    ties = disagreement.audit([said(0.5), said(0.5, judge="human")])
    json.dumps(ties, allow_nan=False, default=asdict)
    assert {each.key: each.estimate.value for each in ties["figures"]}["alpha"] is None


@pytest.mark.slow
def test_the_same_again_to_the_last_bit():
    rng = np.random.default_rng(3)
    names = [f"q{n // 2}" for n in range(60)]
    opinions = [said(float(rng.random()), name, judge, principle, first=f"{A}{n}", flip=bool(rng.random() < 0.3))
                for n, name in enumerate(names) for judge in "jk" for principle in "xy"]  # fmt: skip
    one, two = (json.dumps(disagreement.audit(opinions), allow_nan=False, default=asdict) for _ in range(2))
    assert one == two
    assert disagreement.disputed(opinions) == disagreement.disputed(opinions)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"closer": 0.1}, r"^disagreement\.closer: no such limit; did you mean 'close'\?"),
        ({"close": "x"}, r"^disagreement\.close = 'x': must be a number from 0 to 0\.5"),
        ({"spread": True}, r"^disagreement\.spread = True"),
        ({"sure": 1.5}, r"^disagreement\.sure = 1\.5: must be a number from 0 to 1"),
    ],
)
def test_a_bad_limit(limits, says):
    with pytest.raises(ValueError, match=says):
        disagreement.cases([said(0.9)], limits=limits)


def test_scores_of_other_rows():
    with pytest.raises(ValueError, match=r"^chosen_MN = 2 pairs: 1 rows\."):
        disagreement.cases([said(0.9)], rows_of(["q"]), np.zeros((3, 2)), np.zeros((3, 2)))


def test_disputed_pairs_go_out_to_people_and_come_back(tmp_path):
    ids = {name: formats.prompt_id(said(0.9, name)["prompt"]) for name in ("q", "calm")}
    opinions = [said(0.9), said(0.1, judge="k"), said(0.9, "calm"), said(0.8, "calm", "k")]
    opinions = [each | {"prompt_id": ids[each["prompt_id"]]} for each in opinions]
    path = tmp_path / "label.jsonl"
    assert judgements.export(str(path), disagreement.disputed(opinions)) == 1
    row = json.loads(path.read_text())
    assert row["why"] == ["judges"] and {row["first"], row["second"]} == {A, B}
    row["label"] = "first" if row["first"] == A else "second"
    path.write_text(json.dumps(row) + "\n")
    labelled = [*opinions, *judgements.labels(str(path))]
    case = next(each for each in disagreement.cases(labelled) if each["prompt_id"] == ids["q"])
    assert case["p"] == {"human": 1.0, "j": 0.9, "k": pytest.approx(0.1)} and case["why"] == ["judges", "label"]
    assert figures(labelled)["kappa_label"].value == -1.0  # k against human


def test_a_judge_is_not_held_against_labels_of_its_own():
    opinions = [said(0.9 if n % 3 else 0.1, f"q{n}", judge) for n in range(30) for judge in ("j", "data")]
    found = figures(opinions)
    assert found["kappa_label"].value == 1 and found["alpha"].value is None  # the data is no judge
    assert "skipped" in disagreement.audit(opinions, own=frozenset("j"))  # one opinion, told twice
    opinions += [said(0.9, f"q{n}", "k") for n in range(30)]
    section = disagreement.audit(opinions, own=frozenset("j"))
    found = {each.key: each.estimate for each in section["figures"]}
    assert found["kappa_label"].value == pytest.approx(2 * 20 / 30 - 1)  # k, whom nobody asked for the labels
    assert found["alpha"] == figures([each for each in opinions if each["judge"] != "data"])["alpha"]
    assert "The labels of the data are the word of j: agreement with them shows nothing." in section["notes"]


def test_a_judge_of_one_pair_hides_no_worse_one():
    opinions = [said(p, f"q{n}", judge) for n in range(20) for judge, p in (("human", 0.9), ("llm", 0.9 * (n % 2)))]
    section = disagreement.audit([*opinions, said(0.1, "q0", "bob")])
    kappa = next(each for each in section["figures"] if each.key == "kappa_label")
    assert kappa.estimate.n == 20 and "Lowest: llm against human." in kappa.says
    assert "Of fewer than 20 prompts, and so not looked at for the worst: bob (1)." in section["notes"]


def test_a_judge_who_surely_disagrees_is_not_hidden_by_one_who_seems_to_disagree_more():
    """Of 24 pairs and of 400: the gate's limit lies above the whole interval of the second alone."""
    opinions = [said(0.9 if n % 2 else 0.1, f"q{n}", "human") for n in range(400)]
    opinions += [said(0.9 if n % 2 == (n % 10 < 4) else 0.1, f"q{n}", "many") for n in range(400)]
    opinions += [said(0.9 if n % 2 == (n % 3 < 1) else 0.1, f"q{n}", "few") for n in range(24)]
    kappa = next(each for each in disagreement.audit(opinions)["figures"] if each.key == "kappa_label")
    alone = next(
        each
        for each in disagreement.audit([each for each in opinions if each["judge"] != "few"])["figures"]
        if each.key == "kappa_label"
    )
    assert "Lowest: few against human." in kappa.says and kappa.estimate.value < alone.estimate.value
    assert kappa.estimate.high == stats.simultaneous(alone.estimate, 2, -1, 1).high
