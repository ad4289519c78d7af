"""Cycles by hand and by brute force, planted cycles, and what a coin would reach."""

import json
import math
from dataclasses import asdict
from itertools import combinations, permutations

import networkx as nx
import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.audit import consistency, cycles


def said(first, second, p, prompt="q", judge="j", principle=None):
    return {
        "prompt_id": prompt, "prompt": [{"role": "user", "content": f"about {prompt}"}], "first": first,
        "second": second, "p": p, "judge": judge, "principle": principle, "family": None, "flip": None,
    }  # fmt: skip


def tournament(rng, n, prompt="q", ties=0.0, missing=0.0):
    return [
        said(f"a{i:02}", f"a{j:02}", 0.5 if rng.random() < ties else float(rng.random()), prompt)
        for i, j in combinations(range(n), 2)
        if rng.random() >= missing
    ]


def from_rewards(rewards, prompt="q"):
    return [
        said(f"a{i}", f"a{j}", 1 / (1 + math.exp(rewards[j] - rewards[i])), prompt)
        for i, j in combinations(range(len(rewards)), 2)
    ]


def measured(judgements):
    graph = cycles.build(judgements)
    return graph, cycles.measure(graph, cycles.triangles(graph))


def figures(judgements):
    return {each.key: each for each in consistency.audit(judgements)["figures"]}


def value(judgements, key):
    return figures(judgements)[key].estimate.value


CIRCLE = [said("a", "b", 0.9), said("b", "c", 0.8), said("c", "a", 0.7)]


def test_three_answers_in_a_circle():
    found = figures(CIRCLE)
    values = {key: each.estimate.value for key, each in found.items()}
    assert values["rationalisable"] == 0 and values["cyclic_triads"] == 1
    assert values["kendall_zeta"] == 0  # 1 - 24 / (27 - 3)
    assert values["houtman_maks"] == pytest.approx(2 / 3)
    weights = [math.log(p / (1 - p)) for p in (0.9, 0.8, 0.7)]
    assert values["houtman_maks_weighted"] == pytest.approx(1 - weights[2] / sum(weights))
    assert values["bottleneck"] == pytest.approx(0.4)  # 2 * .7 - 1
    assert values["efficiency"] == pytest.approx(1 - 0.4 / 0.8)
    around = sum(weights)
    assert values["curl"] == pytest.approx(around)
    # the residual is a third of what runs around, on each of the three edges
    share = 3 * (around / 3) ** 2 / sum(w * w for w in weights)
    assert values["curl_share"] == pytest.approx(share)
    assert values["gradient_share"] == pytest.approx(1 - share)
    assert values["harmonic_share"] == pytest.approx(0, abs=1e-12)
    assert found["rationalisable"].baseline.value == pytest.approx(0.75, abs=0.15)
    assert found["power"].estimate.value == pytest.approx(1 - found["rationalisable"].baseline.value)


def test_three_answers_in_a_row():
    found = figures([said("a", "b", 0.9), said("b", "c", 0.8), said("a", "c", 0.7)])
    values = {key: each.estimate.value for key, each in found.items()}
    for key in ("rationalisable", "kendall_zeta", "houtman_maks", "houtman_maks_weighted", "efficiency"):
        assert values[key] == 1, key
    assert values["cyclic_triads"] == values["bottleneck"] == 0


def test_no_cycle_in_few_triads_is_no_certainty():
    rows = [said(a, b, 0.9, f"p{n}") for n in range(20) for a, b in ("ab", "bc", "ac")]
    rings_of_four = [said(a, b, 0.9, f"r{n}") for n in range(29) for a, b in ("ab", "bc", "cd", "ad")]
    found = figures([*rows, *rings_of_four])["cyclic_triads"].estimate
    assert (found.value, found.low, found.n, found.clusters) == (0, 0, 20, 20)  # a ring of four has no triad
    assert found.high == pytest.approx(stats.Z95**2 / (20 + stats.Z95**2))  # Wilson 1927


def test_four_answers_by_hand():
    # d beats all; a, b, c run in a circle: one circular triad of four
    judgements = [*CIRCLE, *(said("d", other, 0.95) for other in "abc")]
    values = {key: each.estimate.value for key, each in figures(judgements).items()}
    assert values["cyclic_triads"] == 0.25
    assert values["kendall_zeta"] == pytest.approx(1 - 24 / (64 - 16))
    assert values["houtman_maks"] == pytest.approx(5 / 6)
    assert values["efficiency"] == pytest.approx(1 - 0.4 / 0.9)


def test_zeta_of_five_answers_that_all_win_twice():
    # the regular tournament of 5: d = 5 circular triads, as many as can be
    judgements = [said(f"a{i}", f"a{(i + k) % 5}", 0.9) for i in range(5) for k in (1, 2)]
    assert value(judgements, "cyclic_triads") == 0.5
    assert value(judgements, "kendall_zeta") == pytest.approx(0)


def test_a_ring_of_four_is_harmonic():
    found = figures([said(a, b, 0.8) for a, b in ("ab", "bc", "cd", "da")])
    assert found["harmonic_share"].estimate.value == pytest.approx(1)
    assert found["gradient_share"].estimate.value == pytest.approx(0)
    assert found["gradient_share"].baseline.value == pytest.approx(3 / 4)
    assert found["cyclic_triads"].estimate.value is None
    assert found["kendall_zeta"].estimate.value is None
    assert found["bottleneck"].estimate.value == pytest.approx(0.6)


def test_curl_and_harmonic_of_a_ring_with_one_triangle():
    # b-c-d-e-b is a ring of four, a-b-c a triangle upon it: both parts are there, and everything adds up
    rng = np.random.default_rng(4)
    judgements = [said(a, b, float(rng.random())) for a, b in ("ab", "ac", "bc", "cd", "de", "be")]
    judgements += [said("a", "b", 0.6), said("c", "d", 0.3)]  # two judgements: twice the weight
    graph = cycles.build(judgements)
    corners = cycles.triangles(graph)
    assert len(corners) == 1
    split = cycles.hodge(graph, corners)
    assert split["total"] == pytest.approx(split["gradient"] + split["curl"] + split["harmonic"])
    assert min(split["curl"][0], split["harmonic"][0]) > 1e-3
    # by weighted least squares on the potential, and on the potential with the triangle's flow
    odds = np.log(graph.p_E / (1 - graph.p_E))
    root = np.sqrt(graph.n_E)
    ends = np.zeros((len(odds), len(graph.answers)))
    ends[np.arange(len(odds)), graph.first_E], ends[np.arange(len(odds)), graph.second_E] = 1, -1
    flow = np.zeros((len(odds), 1))
    flow[corners[0], 0] = np.array([1, 1, -1]) / graph.n_E[corners[0]]
    left = []
    for columns in (ends, np.hstack([ends, flow])):
        solved = np.linalg.lstsq(root[:, None] * columns, root * odds, rcond=None)[0]
        left.append(float((graph.n_E * (odds - columns @ solved) ** 2).sum()))
    assert split["curl"][0] + split["harmonic"][0] == pytest.approx(left[0])
    assert split["harmonic"][0] == pytest.approx(left[1])


def test_one_reward_leaves_nothing_over():
    rng = np.random.default_rng(0)
    judgements = [each for n in range(30) for each in from_rewards(rng.normal(size=5) * 2, f"q{n}")]
    values = {key: each.estimate.value for key, each in figures(judgements).items()}
    assert values["gradient_share"] == pytest.approx(1) and values["curl"] == pytest.approx(0, abs=1e-8)
    assert values["curl_share"] == pytest.approx(0, abs=1e-12)
    assert values["rationalisable"] == values["efficiency"] == 1 and values["bottleneck"] == 0
    assert values["bt_deviance"] == pytest.approx(0, abs=1e-6)


def test_deviance_by_hand():
    # a circle of p = .8: all rewards are equal, q = 1/2
    circle = [said("a", "b", 0.8), said("b", "c", 0.8), said("c", "a", 0.8)]
    assert value(circle, "bt_deviance") == pytest.approx(6 * (0.8 * math.log(1.6) + 0.2 * math.log(0.4)))
    assert value(circle, "bt_p_value") is None  # soft labels are no votes
    # a circle of three votes: G^2 = 6 log 2 with pairs - answers + 1 = 1 degree of freedom
    votes = [said(*pair, 1.0) for pair in ("ab", "bc", "ca")]
    assert value(votes, "bt_deviance") == pytest.approx(6 * math.log(2))
    assert value(votes, "bt_p_value") == pytest.approx(math.erfc(math.sqrt(6 * math.log(2) / 2)))
    # separated by a reward: nothing is left over
    assert value([said(*pair, 1.0) for pair in ("ab", "bc", "ac")], "bt_deviance") == pytest.approx(0, abs=1e-3)


def test_deviance_of_counted_votes():
    # a over b 3 of 4, b over c 6 of 8, a over c 1 of 2: as many observations as votes; the optimum by a grid
    counted = [("a", "b", 3, 4), ("b", "c", 6, 8), ("a", "c", 1, 2)]
    votes = [said(a, b, float(n < wins)) for a, b, wins, of in counted for n in range(of)]

    def misfit(x, y):  # r_a - r_b, r_b - r_c
        q = [1 / (1 + math.exp(-z)) for z in (x, y, x + y)]
        return 2 * sum(
            wins * math.log(wins / of / g) + (of - wins) * math.log((of - wins) / of / (1 - g))
            for (*_, wins, of), g in zip(counted, q, strict=True)
        )

    best = min(misfit(x / 200, y / 200) for x in range(0, 300) for y in range(0, 300))
    assert best > 1
    assert value(votes, "bt_deviance") == pytest.approx(best, abs=1e-4)


def test_ties():
    # a over b, b as good as c, c as good as a: a cycle with one strict edge
    judgements = [said("a", "b", 0.8), said("b", "c", 0.5), said("c", "a", 0.5)]
    values = {key: each.estimate.value for key, each in figures(judgements).items()}
    assert values["rationalisable"] == 0 and values["houtman_maks"] == 0
    assert values["bottleneck"] == 0 and values["efficiency"] == 1  # any strength would forgive it
    assert values["cyclic_triads"] is None
    assert value([said(*pair, 0.5) for pair in ("ab", "bc", "ca")], "rationalisable") == 1


def garp(edges, ties):
    """Whether no cycle has a strict edge: a strict edge whose loser reaches its winner is on one."""
    arrows = nx.DiGraph([*edges, *ties, *((j, i) for i, j in ties)])
    return not any(nx.has_path(arrows, j, i) for i, j in edges)


def test_houtman_maks_of_tournaments_equals_all_rankings():
    rng = np.random.default_rng(1)
    for n in (3, 4, 5, 6, 7):
        for _ in range(6 if n < 7 else 2):
            judgements = tournament(rng, n)
            graph, found = measured(judgements)
            weight = np.zeros((n, n))
            for i, j, p in zip(graph.first_E, graph.second_E, graph.p_E, strict=True):
                weight[(i, j) if p > 0.5 else (j, i)] = abs(math.log(p / (1 - p)))
            orders = [np.array(order) for order in permutations(range(n))]
            worst = [
                min(np.tril(w[np.ix_(order, order)], -1).sum() for order in orders)
                for w in ((weight > 0).astype(float), weight)
            ]
            assert [found["removed"][0], found["removed_weight"][0]] == pytest.approx(worst)
            assert found["violated"][0] == (worst[0] > 0)


def test_houtman_maks_with_ties_equals_all_subsets():
    rng = np.random.default_rng(2)
    violations = 0
    for _ in range(40):
        judgements = tournament(rng, 5, ties=0.25, missing=0.15)
        graph, found = measured(judgements)
        strict, ties = [], []
        for i, j, p in zip(graph.first_E.tolist(), graph.second_E.tolist(), graph.p_E, strict=True):
            (ties if p == 0.5 else strict).append((i, j) if p >= 0.5 else (j, i))
        fewest = next(
            k
            for k in range(len(strict) + 1)
            if any(garp(set(strict) - set(gone), ties) for gone in combinations(strict, k))
        )
        assert found["removed"][0] == fewest
        assert found["violated"][0] == (fewest > 0)
        violations += fewest > 0
    assert 10 < violations < 40


def test_the_bottleneck_equals_all_simple_cycles():
    rng = np.random.default_rng(3)
    cyclic = 0
    for _ in range(40):
        graph, found = measured(tournament(rng, 6, missing=0.2))
        strength = {}
        for i, j, p in zip(graph.first_E.tolist(), graph.second_E.tolist(), graph.p_E, strict=True):
            strength[(i, j) if p > 0.5 else (j, i)] = abs(2 * p - 1)
        weakest = [
            min(strength[edge] for edge in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
            for cycle in nx.simple_cycles(nx.DiGraph(list(strength)))
        ]
        assert found["bottleneck"][0] == pytest.approx(max(weakest, default=0.0))
        if weakest:
            cyclic += 1
            cycle = found["cycle_V"][0]
            steps = [strength[edge] for edge in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
            assert min(steps) == pytest.approx(max(weakest))
    assert 10 < cyclic < 40


def test_a_planted_cycle_is_found_and_shown():
    rng = np.random.default_rng(5)
    judgements = [each for n in range(50) for each in from_rewards(rng.normal(size=4), f"q{n}")]
    judgements += [said(a, b, p, "planted") for a, b, p in (("x", "y", 0.95), ("y", "z", 0.85), ("z", "x", 0.9))]
    judgements += [said("w", other, 0.7, "planted") for other in "xyz"]
    section = consistency.audit(judgements)
    found = {each.key: each.estimate for each in section["figures"]}
    assert found["bottleneck"].value == pytest.approx(0.7)
    assert found["rationalisable"].value == pytest.approx(50 / 51)
    shown = section["examples"][0]["rows"]
    assert len(shown) == 1
    assert {text["text"] for text in shown[0]["texts"]} == {"about planted", "x", "y", "z"}
    for step in ("with p = 0.95", "with p = 0.85", "with p = 0.90"):
        assert step in shown[0]["note"]


def test_a_large_knot_has_a_bound():
    rng = np.random.default_rng(6)
    n = cycles.EXACT + 2
    order = list(range(n))
    _, found = measured(tournament(rng, n))
    assert found["bounded"][0] == 1
    exact = measured(tournament(rng, 12))
    # on what both can do, the bound is no better than the exact, and better than half of all edges
    weight = np.zeros((12, 12))
    for i, j, p in zip(exact[0].first_E, exact[0].second_E, exact[0].p_E, strict=True):
        weight[(i, j) if p > 0.5 else (j, i)] = 1
    ranking = cycles._eades_lin_smyth(weight)
    assert sorted(ranking) == order[:12]
    bound = np.tril(weight[np.ix_(ranking, ranking)], -1).sum()
    assert exact[1]["removed"][0] <= bound < 33
    notes = consistency.audit(tournament(np.random.default_rng(6), n))["notes"]
    assert any("lower bound" in note for note in notes)
    # a ranking without contradictions is found by it
    assert cycles._eades_lin_smyth(np.triu(np.ones((20, 20)), 1)) == list(range(20))


@pytest.mark.parametrize(("n", "share"), [(3, 0.75), (4, 0.375), (5, 0.1171875), (6, 720 / 2**15)])
def test_random_tournaments_are_as_often_acyclic_as_they_should_be(n, share):
    rng = np.random.default_rng(n)
    prompts = 400
    graph, found = measured([each for k in range(prompts) for each in tournament(rng, n, f"q{k}")])
    se = math.sqrt(share * (1 - share) / prompts)
    coin = cycles.measure(cycles.by_coin(graph, rng), cycles.triangles(graph))
    for each in (found, coin):
        assert abs(1 - each["violated"].mean() - share) < 3 * se
        assert abs(each["cyclic"].sum() / each["triads"].sum() - 0.25) < 0.02


def test_two_answers_can_never_fail_and_it_says_so():
    section = consistency.audit([said("a", "b", 0.9, f"q{n}") for n in range(20)])
    found = {each.key: each.estimate for each in section["figures"]}
    assert "skipped" not in section
    assert all(each.value is None for each in found.values())
    assert "two answers can never fail" in section["notes"][0]
    # three answers in a row, not in a ring: neither can they
    chain = consistency.audit([said("a", "b", 0.9), said("b", "c", 0.9)])
    assert chain["figures"][0].estimate.value is None
    # beside prompts that can, they are not counted
    mixed = [*CIRCLE, *(said("a", "b", 0.9, f"p{n}") for n in range(5))]
    assert figures(mixed)["rationalisable"].estimate.n == 1
    assert consistency.audit(mixed)["notes"][0].startswith("1 of 6 prompts")


def test_contradictory_duplicates():
    pairs = [said("a", "b", 1.0, f"q{n}") for n in range(8)]
    again = [said("b", "a", 1.0, "q0"), said("a", "b", 1.0, "q1"), said("b", "a", 1.0, "q2", judge="other")]
    again += [said("b", "a", 0.5, "q3")]
    figure = figures([*pairs, *again])["contradictory_duplicates"]
    # q0 of q0, q1, q3; another judge is disagreement, not contradiction, and a tie is neither
    assert figure.estimate.value == 1 / 3 and figure.estimate.n == 3
    assert "3 of 8 pairs were labelled more than once" in figure.says


def test_pooling_makes_a_cycle_that_no_principle_has():
    # Condorcet: each principle ranks the three answers, the means run in a circle
    orders = {"x": "abc", "y": "bca", "z": "cab"}
    judgements = [
        said(i, j, 0.9 if order.index(i) < order.index(j) else 0.1, principle=name)
        for name, order in orders.items()
        for i, j in combinations("abc", 2)
    ]
    judgements += [{**each, "prompt_id": "r", "principle": "x"} for each in CIRCLE]
    section = consistency.audit(judgements)
    assert section["figures"][0].estimate.value == 0
    table = next(each for each in section["tables"] if each["caption"] == "By judge and by principle")
    assert [(row[0], row[2].value) for row in table["rows"]] == [
        ("principle x", 0.5),
        ("principle y", 1.0),
        ("principle z", 1.0),
    ]
    assert any("1 of the 2 prompts with a cycle have none" in note for note in section["notes"])


def test_judges_count_alike_whatever_they_were_asked():
    judgements = [said("a", "b", 0.9, principle=str(n)) for n in range(5)] + [said("a", "b", 0.2, judge="k")]
    assert cycles.build(judgements).p_E.tolist() == pytest.approx([0.55])


def test_nothing_and_the_same_again():
    assert "Give preference pairs" in consistency.audit([])["skipped"]
    rng = np.random.default_rng(7)
    judgements = [each for n in range(10) for each in tournament(rng, 4, f"q{n}", ties=0.1)]
    one, two = (json.dumps(consistency.audit(judgements), allow_nan=False, default=asdict) for _ in range(2))
    assert one == two
