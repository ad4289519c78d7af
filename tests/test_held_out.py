"""What a policy that samples answers to held-out prompts, by each of two processes."""

from types import SimpleNamespace

import pytest
import torch

from rlhf_recipes.ppo import held_out, rewards
from rlhf_recipes.ppo.rollout import Completions
from rlhf_recipes.stats import Estimate


class OneOfTwo:
    """A trainer that is one of two processes: it remembers what it is asked, and what the other has is the same."""

    reference, state = "base", None
    scores = SimpleNamespace(rewards=lambda rows, *_: {"reward": torch.ones(len(rows))})
    accelerator = SimpleNamespace(autocast=torch.no_grad)

    def __init__(self, process):
        self.args = SimpleNamespace(per_device_eval_batch_size=2, world_size=2, process_index=process, seed=0)
        self.asked, self.seeds = [], []

    def complete(self, rows, seeds):
        self.asked.append([row["n"] for row in rows])
        self.seeds.append(list(seeds))
        return [[0]] * len(rows), Completions([[1, 2]] * len(rows), ["a"] * len(rows), [], [True] * len(rows))

    def batch_of(self, prompts, completions):
        return SimpleNamespace(padded=lambda values_N: values_N.view(len(prompts), 2))

    def logps(self, role, batch):
        return torch.zeros(4)

    def gather(self, values):
        return torch.cat([values, values])


def test_processes_share_the_prompts():
    """Five of them, two each at a time: in the last turn some are answered once more, so that all have as many."""
    first, second = OneOfTwo(0), OneOfTwo(1)
    found = [held_out.measure(each, [{"n": n} for n in range(5)], "test") for each in (first, second)]
    assert first.asked == [[0, 1], [4, 0]] and second.asked == [[2, 3], [1, 2]]
    assert first.seeds[1][1] == first.seeds[0][0]  # by the prompt's place
    assert [len(each) for each in found] == [5, 5] and found[0][0]["kl"] == 0 and found[0][0]["reward"] == 1


def test_a_reward_model_with_equal_rewards_has_no_scale():
    metrics = {"mean_reward": Estimate(0.3, None, None, 9), "sd_reward": Estimate(5e-17, None, None, 9)}
    assert rewards._scale(metrics) is None
    assert rewards._scale(metrics | {"sd_reward": Estimate(0.5, None, None, 9)}) == pytest.approx((0.3, 0.5))
