"""Uncertainty: combinations by hand, risk-coverage by hand, planted errors."""

import json
import math
import zlib
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_recipes.audit import uncertainty as u
from rlhf_recipes.data.load import Splits
from rlhf_recipes.data.tokens import Sizes

CUT = 8  # pairs that are longer than what is scored


def pairs(n, family=None):
    def turn(role, i):
        return [{"role": role, "content": f"{role} {i}"}]

    return [
        {"prompt": turn("user", i), "chosen": turn("assistant", i), "rejected": turn("assistant", -i),
         "prompt_id": str(i), "family": family and family[i % len(family)]}
        for i in range(n)
    ]  # fmt: skip


def ensemble(members=4, n=400, seed=0):
    """Members that differ much exactly where they are often wrong: half of the pairs are hard."""
    rng = np.random.default_rng(seed)
    hard = np.arange(n) % 2 == 0
    margins = np.where(hard, 0.2, 2.0) + rng.normal(size=(members, n)) * np.where(hard, 2.0, 0.3)
    chosen = rng.normal(size=(members, n)) * 0.1
    return chosen, chosen - margins


def figures(section):
    return {figure.key: figure.estimate for figure in section["figures"]}


@pytest.mark.parametrize(("rewards", "uwo"), [((1.0, 1.2, 2.6), 1.347), ((1, 1.1, 1.2), 1.097)])
def test_combinations_by_hand(rewards, uwo):
    assert u.combine(rewards, "uwo", 0.5) == pytest.approx(uwo, abs=5e-4)
    assert u.combine(rewards, "min") == 1
    assert u.combine(rewards, "mean") == pytest.approx(sum(rewards) / 3)
    assert u.combine(rewards, "std") ** 2 == pytest.approx(sum((r - sum(rewards) / 3) ** 2 for r in rewards) / 3)
    assert u.combine(rewards, "uwo", 0) == u.combine(rewards, "mean")


def test_combinations_keep_the_other_axes():
    rewards = np.arange(24.0).reshape(2, 3, 4)
    assert u.combine(rewards, "min").tolist() == rewards[0].tolist()
    assert u.combine(rewards, "uwo", 1.0).tolist() == (rewards[0] + 6 - 36).tolist()
    with pytest.raises(ValueError, match="how = max: must be one of mean, min, uwo, std"):
        u.combine(rewards, "max")


def test_members_are_put_on_one_scale():
    rewards = np.random.default_rng(0).normal(size=(1, 50))
    both = np.concatenate([rewards, 7 * rewards - 30])
    scaled = u.standardise(both, both)
    np.testing.assert_allclose(scaled[0], scaled[1], atol=1e-12)
    assert (scaled.mean(1), scaled.std(1)) == (pytest.approx([0, 0], abs=1e-12), pytest.approx([1, 1]))
    assert u.standardise(both[:, :, None], both).shape == (2, 50, 1)
    assert u.standardise([[3.0]], [[2.0, 2.0]]) == 1  # no spread: only centred


def test_mahalanobis_is_the_brute_force_inverse():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 5)), rng.normal(size=(7, 5))
    scatter = sum(np.outer(e, e) for e in train)
    inverse = np.linalg.inv(scatter + 0.01 * np.trace(scatter) / 5 * np.eye(5))
    expected = [math.sqrt(e @ inverse @ e) for e in test]
    np.testing.assert_allclose(u.mahalanobis(train, test, 0.01), expected, rtol=1e-9)
    np.testing.assert_allclose(u.mahalanobis(1e3 * train, 1e3 * test, 0.01), expected, rtol=1e-9)
    # one feature: e / sqrt(sum of squares)
    assert u.mahalanobis([[3.0], [4.0]], [[10.0]], 0) == pytest.approx([2])
    with pytest.raises(ValueError, match="from one reward model"):
        u.mahalanobis(train, test[:, :4])


def test_novelty_rises_off_the_training_distribution():
    rng = np.random.default_rng(0)
    spread = np.array([5, 5, 0.1, 0.1])
    train, held_out, same = (rng.normal(size=(500, 4)) * spread for _ in range(3))
    novel = u.mahalanobis(train, rng.normal(size=(500, 4)))
    held_out, same = u.mahalanobis(train, held_out), u.mahalanobis(train, same)
    assert u.out_of_distribution(held_out, same).low < 0.05 < u.out_of_distribution(held_out, same).high
    assert u.out_of_distribution(held_out, novel).value > 0.9
    assert u.out_of_distribution([], novel).value is None


def test_risk_and_coverage_by_hand():
    uncertainties, wrong = [0.1, 0.4, 0.2, 0.3], [False, True, True, False]
    kept, lost = u.coverage_curve(uncertainties, wrong)
    assert (kept.tolist(), lost.tolist()) == ([1, 2, 3, 4], [0, 1, 1, 2])
    assert u.aurc(uncertainties, wrong) == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert u.accuracy_at(uncertainties, wrong, 0.75) == pytest.approx(2 / 3)
    assert u.accuracy_at(uncertainties, wrong, 1) == 0.5
    assert u.aurc([0, 0, 0, 0], wrong) == pytest.approx(0.5)  # knows nothing: the error rate
    assert u.aurc(wrong, wrong) == pytest.approx((1 / 3 + 2 / 4) / 4)  # the oracle
    weights = np.array([2, 0, 1, 1.0])  # as if drawn: rows 0, 0, 2, 3
    assert u.aurc(uncertainties, wrong, weights) == pytest.approx((0 + 0 + 1 * 1 / 3 + 1 / 4) / 4)


def test_abstaining_bounds_what_is_answered_wrong():
    # 9 pairs, delta .2: the 8th smallest of -margin
    assert u.abstain_margin([5, 4, 3, 2, 1, 0.5, -1, -2, -3], 0.2) == 2
    assert u.abstain_margin([1, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert u.abstain_margin([1, 2]) == math.inf
    rng, shares = np.random.default_rng(0), []
    for _ in range(300):
        tau = u.abstain_margin(rng.normal(0.5, 1, 60), 0.1)
        shares.append(np.mean(rng.normal(0.5, 1, 200) < -tau))
    assert 0.07 < np.mean(shares) <= 0.102


def test_an_ensemble_that_knows_its_errors():
    rows = pairs(400, ("hard", "easy"))
    chosen, rejected = ensemble()
    novelty = np.random.default_rng(1).random((400, 2))
    section = u.audit(rows, chosen, rejected, novelty)
    found = figures(section)
    assert found["auroc_std"].low > 0.7
    assert found["auroc_novelty"].low < 0.5 < found["auroc_novelty"].high
    assert found["accuracy_at_80_gain"].low > 0.02
    assert found["aurc"].high < 1 - found["accuracy_mean"].value
    assert found["spearman"].low > 0 and found["accuracy_gain"].value > 0
    assert 0 < found["diversity"].value < 1 and abs(found["error_correlation"].value) < 0.6
    assert found["abstain_wrong"].low <= 0.1 and 0 < found["abstain_coverage"].value < 1
    gained = found["auroc_std"].value - found["auroc_margin"].value
    assert found["auroc_gain"].value == pytest.approx(gained)
    accuracy, family = section["tables"]
    assert accuracy["rows"][4][1] == accuracy["rows"][6][1]  # UWO with lambda 0 is the mean
    assert [row[0] for row in family["rows"]] == ["hard", "easy"]
    oracle = section["plots"][0]["series"][-2]
    assert oracle["y"][0] == 0 and oracle["y"][-1] == pytest.approx(1 - found["accuracy_mean"].value)
    assert len(section["examples"][0]["rows"]) == 3
    assert json.dumps(section, default=asdict) == json.dumps(u.audit(rows, chosen, rejected, novelty), default=asdict)


def test_copies_are_not_diverse_and_scales_do_not_matter():
    chosen, rejected = (scores[:1].repeat(3, 0) for scores in ensemble())
    scale, offset = np.array([[1], [10], [3]]), np.array([[0], [5], [1]])
    found = figures(u.audit(pairs(400), chosen * scale + offset, rejected * scale + offset))
    assert found["diversity"].value == pytest.approx(0, abs=1e-6)
    assert found["error_correlation"].value == pytest.approx(1)
    assert found["accuracy_min"].value == found["accuracy_mean"].value == found["accuracy"].value


def test_one_member_still_has_its_margin():
    chosen, rejected = ensemble(1)
    section = u.audit(pairs(400), chosen, rejected)
    found = figures(section)
    assert found["auroc_margin"].value > 0.5 and found["aurc_margin"].value is not None
    for key in ("accuracy_mean", "auroc_std", "auroc_gain", "aurc", "spearman", "diversity"):
        assert found[key].value is None
    assert "train an ensemble" in section["notes"][0]
    assert set(found) == set(figures(u.audit(pairs(400), *ensemble())))


def test_what_few_errors_show_counts_as_few():
    noise = np.random.default_rng(0).normal(size=(3, 100))
    found = figures(u.audit(pairs(100), np.where(np.arange(100) < 2, -9, 9) + noise, np.zeros((3, 100))))
    for key in ("auroc_std", "auroc_margin", "auroc_gain", "accuracy_at_80_gain"):
        assert found[key].value is not None and (found[key].n, found[key].clusters) == (100, 2), key


def test_degenerate_input():
    assert "skipped" in u.audit([], np.zeros((2, 0)), np.zeros((2, 0)))
    for members, n in ((1, 1), (3, 1), (3, 5)):
        for value in (0.0, 1.0, -1.0):
            section = u.audit(pairs(n), np.full((members, n), value), np.zeros((members, n)), np.zeros((n, 2)))
            json.dumps(section, allow_nan=False, default=asdict)
    with pytest.raises(ValueError, match=r"both must be \(M, 2\)"):
        u.audit(pairs(2), np.zeros((1, 3)), np.zeros((1, 3)))


@pytest.mark.slow
def test_members_weigh_alike_in_every_part_of_an_audit(monkeypatch, tmp_path):
    """One of the two scores thirty times as wide: the ensemble's mean is right equally often in every section, and how
    far the members differ does not depend on whose scale is wide."""
    from rlhf_recipes.audit import run_audit, scoring

    asked = {}

    def take(scales):
        class Stub:
            def __init__(self, *_):
                self.members = [None, None]

            def score(self, turns, part, features=False, first_alone=False, kept=slice(None)):
                asked[part] = kept, {turn[0]["content"] for turn in turns}
                texts = ["".join(turn["content"] for turn in each) for each in turns]
                noise = np.array([[zlib.crc32(f"{m} {text}".encode()) / 2**32 for text in texts] for m in (0, 1)])
                rewards = (noise + 0.2 * np.array([each[-1]["content"].startswith("good") for each in turns])) * scales
                return scoring.Scored(rewards, np.stack([noise[0], noise[0] ** 2, np.ones(len(turns))], 1))

        monkeypatch.setattr(run_audit, "Ensemble", Stub)
        rows = [
            {"prompt": [{"role": "user", "content": f"Question {i}?"}], "prompt_id": f"{i}", "family": "f", "p": None}
            | {side: [{"role": "assistant", "content": f"{says} {i}. And so on."}]
               for side, says in (("chosen", "good"), ("rejected", "poor"))}
            for i in range(48)
        ]  # fmt: skip
        cfg = SimpleNamespace(model=None, quantization=None, seed=0, ledger_pairs=8, stress_pairs=6, probe_pairs=4,
                              credit_pairs=2, prompts=4, samples=0, deployment=None,
                              max_length=64, fast_forward=True, data=SimpleNamespace(seed=0),
                              thresholds={})  # fmt: skip
        sources = run_audit.Sources([], ([], []), None, [], None, [], None)
        lengths = np.array([[200 if i < CUT else 40] * 2 for i in range(48)])
        pairs = Splits(
            rows[:24], rows, {"split": "", "dropped": {}}, "", sizes={"test": Sizes(lengths, lengths)}, kept=slice(64)
        )
        found = run_audit.take(cfg, sources, pairs, None, SimpleNamespace(dir=tmp_path))
        parts = {part["key"]: part for part in found.sections}
        return {key: figures(part) for key, part in parts.items()}, parts["calibration"]["tables"][0]["rows"][0][1]

    (alike, _), (wide, calibrated) = take(np.ones((2, 1))), take(np.array([[1.0], [30.0]]))
    assert wide["preference"]["accuracy"].value == wide["uncertainty"]["accuracy_mean"].value
    assert wide["preference"]["accuracy"].value == pytest.approx(alike["preference"]["accuracy"].value)
    half = [i for i in range(48) if not run_audit._in_first_half(f"{i}")]
    assert calibrated.endswith(" %") and 0 < len(half) < 48
    for key in ("auroc_std", "accuracy_mean"):
        assert wide["uncertainty"][key].value == pytest.approx(alike["uncertainty"][key].value)
    cut = {f"Question {i}?" for i in range(CUT)}  # and so no rows to edit: nobody would see an edit beyond the cut
    assert {part: kept for part, (kept, _) in asked.items() if kept != slice(None)} == dict.fromkeys(
        ("held-out pairs", "train pairs"), slice(64)
    )
    assert cut < asked["held-out pairs"][1] and not cut & (asked["probes"][1] | asked["credit"][1])
    for part, key in (("stress", "uncertainty_lift"), ("stress", "worst_family"), ("probes", "worst_probe")):
        assert wide[part][key].value == pytest.approx(alike[part][key].value), key
