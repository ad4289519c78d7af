"""The formulas of PPO against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_recipes.ppo import algorithm
from rlhf_recipes.ppo.experience import MicroBatch, compute_advantages, fit_values
from rlhf_recipes.sampling import kl_estimates


def same(values):
    return values


def one(value):
    return torch.tensor([float(value)], dtype=torch.float64)


def objective(ratio, advantage, **kwargs):
    value, _, clipped = algorithm.policy_objective(one(math.log(ratio)), one(0), one(advantage), 0.2, **kwargs)
    return value.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (3.0, 4.0, 4.8, 1),  # min(12, 1.2 * 4)
        (1.3, -3.0, -3.9, 0),  # min(-3.9, 1.2 * -3 = -3.6): the clip is a pessimistic bound
        (0.5, -3.0, -2.4, 1),  # min(-1.5, 0.8 * -3)
        (0.5, 3.0, 1.5, 0),  # min(1.5, 0.8 * 3)
        (1.1, 2.0, 2.2, 0),
    ],
)
def test_clipped_objective(ratio, advantage, expected, clipped):
    assert objective(ratio, advantage) == pytest.approx((expected, clipped))


def test_dual_clip_bounds_bad_actions_alone():
    assert objective(10.0, -1.0)[0] == pytest.approx(-10)
    assert objective(10.0, -1.0, dual_clip=3.0)[0] == pytest.approx(-3)
    assert objective(10.0, 1.0, dual_clip=3.0)[0] == pytest.approx(1.2)


def test_no_gradient_where_the_clip_decides():
    for ratio, advantage, gradient in ((3.0, 4.0, 0.0), (1.3, -3.0, -3.9), (0.5, -3.0, 0.0)):
        logp = one(math.log(ratio)).requires_grad_()
        algorithm.policy_objective(logp, one(0), one(advantage), 0.2)[0].sum().backward()
        assert logp.grad.item() == pytest.approx(gradient)  # d(ratio A)/d logp = ratio A


def test_bradley_terry_of_the_reward_model():
    """What the rewards mean: P = sigmoid(r+ - r-), loss -log P, gradients -(1-P) and +(1-P)."""
    chosen, rejected = one(1.0).requires_grad_(), one(1.5).requires_grad_()
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).sum()
    loss.backward()
    assert math.exp(-loss.item()) == pytest.approx(0.3775, abs=5e-5)
    assert loss.item() == pytest.approx(0.9741, abs=5e-5)
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.6225, 0.6225), abs=5e-5)


def test_gae_by_hand():
    """gamma 0.9, lam 0.5. Episode 1: four tokens, rewards 0 0 0 1, values 0.5 0.4 0.3 0.2.

    delta_3 = 1 - 0.2 = 0.8;                  A_3 = 0.8
    delta_2 = 0.9 * 0.2 - 0.3 = -0.12;        A_2 = -0.12 + 0.45 * 0.8 = 0.24
    delta_1 = 0.9 * 0.3 - 0.4 = -0.13;        A_1 = -0.13 + 0.45 * 0.24 = -0.022
    delta_0 = 0.9 * 0.4 - 0.5 = -0.14;        A_0 = -0.14 + 0.45 * -0.022 = -0.1499

    Episode 2: two tokens, rewards -0.1 2, values 0.5 1; what lies behind them counts for nothing.

    delta_1 = 2 - 1 = 1; A_1 = 1;  delta_0 = -0.1 + 0.9 * 1 - 0.5 = 0.3; A_0 = 0.3 + 0.45 = 0.75
    """
    rewards = torch.tensor([[0, 0, 0, 1.0], [-0.1, 2, 7, 7]])
    values = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.5, 1, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1.0], [1, 1, 0, 0]])
    advantages, returns = algorithm.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    expected = torch.tensor([[-0.1499, -0.022, 0.24, 0.8], [0.75, 1, 0, 0]])
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_score_lies_on_the_last_token():
    kl, mask = torch.tensor([[1.0, 2, 3], [4, 5, 6]]), torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    rewards = algorithm.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.2, 9.7], [19.6, 0, 0]]))


def test_undiscounted_returns_add_up_to_what_was_earned():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    _, returns = algorithm.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns[:, 0], (rewards * mask).sum(1))


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1.02), (0.0, 0.98), (-1.0, 0.98), (6.6, 1.01)])
def test_adaptive_controller(kl, factor):
    """K_beta = 1 / horizon = 0.1 a rollout, the error clipped to 0.2 (Ziegler et al., section 2.2)."""
    controller = algorithm.KLController("adaptive", coef=0.1, target=6.0, horizon=10)
    for _ in range(10):
        controller.update(kl)
    assert controller.coef == pytest.approx(0.1 * factor**10)


@pytest.mark.parametrize("kind", ["fixed", "limit"])
def test_other_controllers_leave_the_coefficient(kind):
    controller = algorithm.KLController(kind, coef=0.1, target=6.0, horizon=10)
    controller.update(100.0)
    assert controller.coef == 0.1


def test_kl_estimators_against_the_closed_form():
    """KL(N(0.1, 1), N(0, 1)) = 0.1^2 / 2 = 0.005, from a million draws."""
    draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    logps, reference = -((draws - 0.1) ** 2) / 2, -(draws**2) / 2
    k1, k2, k3 = kl_estimates(logps, reference)
    assert k1.mean().item() == pytest.approx(0.005, abs=4 * 0.1 / 1000)  # deviation of k1: 0.1
    assert k2.mean().item() == pytest.approx(0.005, rel=0.02)
    assert k3.mean().item() == pytest.approx(0.005, rel=0.02)
    assert k3.min() >= 0 > k1.min()
    assert k3.std() < k1.std() / 5


def episodes(rewards_BK, values_BK):
    """Micro-batches of 8 as a rollout leaves them: no padding, and a policy that is its reference and its sampler."""
    zero, batch = torch.zeros(8, rewards_BK.shape[1]), SimpleNamespace(mask_BK=torch.ones(8, rewards_BK.shape[1]))
    parts = zip(values_BK.split(8), rewards_BK.split(8), strict=True)
    return [MicroBatch(batch, zero, zero, zero, zero, values, rewards) for values, rewards in parts]


def at_the_end(scores_B, tokens):
    return torch.nn.functional.pad(scores_B[:, None], (tokens - 1, 0))


def explained(rewards_BK, values_BK, lam):
    args = SimpleNamespace(gamma=1.0, lam=lam)
    return compute_advantages(episodes(rewards_BK, values_BK), args, same)["explained_variance"]


@pytest.mark.slow
def test_values_that_know_nothing_explain_nothing():
    """64 episodes of 128 tokens, V constant in each and independent of the reward: 1 - var(G - V) / var(G) of what was
    earned to the end. Against lambda-returns, which are mostly V itself, it would be +0.8."""
    generator = torch.Generator().manual_seed(0)
    scores, constants = (torch.randn(64, generator=generator) for _ in range(2))
    rewards, values = at_the_end(scores, 128), constants[:, None].expand(64, 128)
    truth = 1 - ((scores - constants).var() / scores.var()).item()
    assert truth < -0.3
    for lam in (0.95, 1.0):
        assert explained(rewards, values, lam) == pytest.approx(truth, abs=1e-4)
    assert explained(rewards, scores[:, None].expand(64, 128), 0.95) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [-2.0, 2.0])
def test_no_token_is_good_for_being_early(mean):
    """Rewards of mean -2 or +2 and deviation 1, lam 0.95, V that starts from zeros: without a fit three quarters of
    the variance of the advantages would be the distance from the end."""
    scores = mean + torch.randn(512, generator=torch.Generator().manual_seed(0))
    micro_batches = episodes(at_the_end(scores, 128), torch.zeros(512, 128))
    fitted = fit_values(micro_batches, 1.0, same)
    assert fitted == pytest.approx((0, scores.mean().item()), abs=1e-5)
    compute_advantages(micro_batches, SimpleNamespace(gamma=1.0, lam=0.95), same)
    advantages = torch.cat([m.advantages for m in micro_batches])
    assert (advantages.mean(0).var() / advantages.var()).item() < 0.01


def test_a_critic_on_another_scale_is_fitted():
    """Returns are 3 V - 1 and noise; a fit never leaves values that are worse than a constant."""
    generator = torch.Generator().manual_seed(0)
    values, noise = torch.randn(64, 5, generator=generator), torch.randn(64, generator=generator)
    scores = 3 * values[:, -1] - 1 + 0.1 * noise
    slope, offset = algorithm.linear_fit(values[:, -1], scores, torch.ones(64), same)
    assert (slope, offset) == pytest.approx((3, -1), abs=0.05)
    micro_batches = episodes(at_the_end(scores, 5), -values)
    slope, offset = fit_values(micro_batches, 1.0, same)
    fitted = torch.cat([m.old_values for m in micro_batches])
    torch.testing.assert_close(fitted, -slope * values + offset)
    assert (fitted - scores[:, None]).square().mean() < scores.var()


def test_value_loss_is_clipped():
    losses, clipped = algorithm.value_loss(
        torch.tensor([1.5, 0.1]), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]), 0.2
    )
    # V 1.5 counts as 1.2: (1.2 - 2)^2 / 2 = 0.32; V 0.1 is within 0.2 of 0: (0.1 - 1)^2 / 2 = 0.405
    torch.testing.assert_close(losses, torch.tensor([0.32, 0.405]))
    assert clipped.tolist() == [1, 0]
    assert algorithm.value_loss(torch.tensor([1.5]), torch.tensor([1.0]), torch.tensor([2.0]), None)[0].item() == 0.125


def test_whitening_ignores_what_is_masked():
    values, mask = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(algorithm.whiten(values, mask, same), torch.tensor([-1.0, 1.0, 0.0]))
    torch.testing.assert_close(algorithm.whiten(values, mask, same, shift_mean=False), torch.tensor([1.0, 3.0, 0.0]))


def test_shares_of_the_advantages():
    advantages = torch.tensor([[1.0, -1.0, 0.0, 2.0], [0.0, 3.0, 9.0, 9.0], [0.0, 0.0, 0.0, 7.0]])
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    first, last, uniform = algorithm.shares(advantages, mask, tokens=1).T.tolist()
    assert first[:2] == [0.25, 0.0] and last[:2] == [0.5, 1.0] and uniform[:2] == [0.25, 0.5]
    assert all(math.isnan(each[2]) for each in (first, last, uniform))  # nothing to share out
    assert algorithm.shares(advantages, mask, tokens=10)[1].tolist() == [1.0, 1.0, 1.0]


def test_ensembles():
    rewards, weights = torch.tensor([[1.0, 3.0], [2.0, torch.nan]]), torch.tensor([1.0, 2.0])
    combined = {how: algorithm.combine_rewards(rewards, weights, how, 0.5).tolist() for how in algorithm.ENSEMBLES}
    assert combined["sum"] == [7.0, 2.0]
    assert combined["mean"] == [3.5, 2.0]
    assert combined["min"] == [1.0, 2.0]
    assert combined["uwo"] == [3.5 - 0.5 * 6.25, 2.0]  # variance of 1 and 6: 2.5 squared
    watched = torch.tensor([1.0, 0.0])
    assert {algorithm.combine_rewards(rewards, watched, how, 0.5)[0].item() for how in algorithm.ENSEMBLES} == {1.0}
    with pytest.raises(ValueError, match="every function returned None"):
        algorithm.combine_rewards(torch.tensor([[torch.nan]]), torch.ones(1), "sum", 0.5)


def test_running_moments_are_those_of_all_values():
    moments, values = algorithm.RunningMoments(), torch.randn(30, generator=torch.Generator().manual_seed(0))
    for part in values.split([7, 1, 22]):
        moments.update(part)
    assert (moments.mean, moments.variance) == pytest.approx((values.mean().item(), values.var(correction=0).item()))
    assert moments.normalise(values).std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_importance_weights_are_cut_off_above():
    weights = algorithm.importance_weights(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -3.0, -1.0]), 3.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 3.0, math.exp(-2)]))
