"""What a training reports of its held-out rows: shares have Wilson's interval where all are alike, means a point."""

import pytest

from rlhf_recipes.training import metrics


def rows(count):
    reply = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return [{"prompt_id": str(i), "chosen": reply("long"), "rejected": reply("no")} for i in range(count)]


def logps(chosen, rejected, count=4):
    return [{"chosen_logp": chosen, "rejected_logp": rejected, "chosen_tokens": 4, "rejected_tokens": 2}] * count


def test_a_policy_that_has_not_moved_has_no_margin_and_a_coins_accuracy():
    before = logps(-8.0, -6.0)
    found = metrics.preference_metrics(rows(4), before, before, "log_ratio")
    for key in ("reward_margin", "chosen_logp_change", "rejected_logp_change", "chosen_logp_change_per_token"):
        assert (found[key].value, found[key].low, found[key].high) == (0.0, 0.0, 0.0), key
    assert found["preference_accuracy"].value == 0.5


def test_margins_by_hand():
    before, after = logps(-8.0, -6.0), logps(-7.0, -9.0)
    found = metrics.preference_metrics(rows(4), after, before, "log_ratio")
    assert found["reward_margin"].value == pytest.approx(1.0 - -3.0)
    assert found["chosen_logp_change_per_token"].value == pytest.approx(1 / 4)
    accuracy = found["preference_accuracy"]
    assert accuracy.value == 1.0 and accuracy.low == pytest.approx(0.510, abs=1e-3), "Wilson's, n = 4"
    # -7 / 4 against -9 / 2
    average = metrics.preference_metrics(rows(4), after, before, "average_logp")
    assert average["reward_margin"].value == pytest.approx(-1.75 + 4.5)


def test_changes_are_from_the_start_and_margins_from_the_reference():
    """The reference is another run: of four pairs the start ranks all right, what is trained none."""
    reference, start, after = logps(-8.0, -8.0), logps(-9.0, -12.0), logps(-10.0, -9.0)
    found = metrics.preference_metrics(rows(4), after, reference, "log_ratio", start)
    assert found["accuracy_change"].value == -1.0
    assert found["reward_margin"].value == pytest.approx(-2.0 - -1.0)
    assert found["chosen_logp_change"].value == pytest.approx(-10.0 - -9.0)
    assert found["rejected_logp_change_per_token"].value == pytest.approx((-9.0 - -12.0) / 2)
    still = metrics.preference_metrics(rows(4), start, reference, "log_ratio", start)
    assert (still["accuracy_change"].value, still["chosen_logp_change"].value) == (0.0, 0.0)
    assert still["reward_margin"].value == pytest.approx(-1.0 - -4.0)


def test_the_spread_of_rewards_is_that_of_all_replies():
    """Rewards 3, 1, 1, -1: mean 1, population deviation sqrt 2."""
    scores = [{"chosen": 3.0, "rejected": 1.0}, {"chosen": 1.0, "rejected": -1.0}]
    found = metrics.reward_metrics(rows(2), scores, scores)["sd_reward"]
    assert found.value == pytest.approx(2**0.5) and found.low <= found.value <= found.high


def test_scores_that_are_all_one_are_no_share():
    scores = [{"chosen": 1.0, "rejected": 1.0}] * 4
    found = metrics.reward_metrics(rows(4), scores, scores)
    assert (found["mean_reward"].low, found["mean_reward"].high) == (1.0, 1.0)
    assert (found["sd_reward"].value, found["sd_reward"].high) == (0.0, 0.0)
    assert (found["reward_margin"].low, found["reward_margin"].high) == (0.0, 0.0)
