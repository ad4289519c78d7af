"""What an episode earns at its last token: the rewards of all functions as one, centred, less its penalties.

Shapes: B episodes, R reward functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_recipes.errors import Refusal
from rlhf_recipes.ppo import algorithm, rewards
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.rollout import Completions
from rlhf_recipes.ppo.trl_private import get_soft_overlong_punishment


class Scores:
    """Rewards of completions, and what is made of them.

    A reward has no zero and no unit of its own. So the mean of the first rollout is subtracted (Ziegler et al.,
    arXiv:1909.08593, and InstructGPT, arXiv:2203.02155, start from a mean of 0 too): else every token would have an
    advantage for being early or late alone. Penalties are in standard deviations of the rewards so far.
    """

    def __init__(self, functions: list[Callable], args: PPOConfig):
        self.functions, self.args = functions, args
        self.weights_R = torch.tensor(args.reward_weights or [1.0] * len(functions))
        if len(self.weights_R) != len(functions):
            raise Refusal(f"reward_weights: {len(self.weights_R)} for {len(functions)} reward_funcs. Give as many.")
        self.scales_R2 = rewards.scales(functions, args.reward_ensemble)
        self.overlong = args.soft_punish_cache and get_soft_overlong_punishment(
            args.max_completion_length, args.soft_punish_cache
        )
        self.moments = algorithm.RunningMoments()
        self.first_mean: float | None = None

    def rewards(self, rows: list[dict], completions: Completions, state) -> dict[str, Tensor]:
        """`reward` of each episode, and its parts, on the CPU."""
        args, texts = self.args, completions.texts
        if not isinstance(rows[0]["prompt"], str):
            texts = [[{"role": "assistant", "content": text.strip()}] for text in texts]
        columns = [
            rewards.call(f, rows, texts, completions.ids, state, args.per_device_train_batch_size)
            for f in self.functions
        ]
        rewards_BR = torch.tensor([[torch.nan if r is None else float(r) for r in column] for column in columns]).T
        mean_R, sd_R = self.scales_R2.T
        scaled_BR = (rewards_BR - mean_R) / sd_R
        parts = {"reward": algorithm.combine_rewards(scaled_BR, self.weights_R, args.reward_ensemble, args.uwo_coef)}
        if len(columns) > 1:
            for name, rewards_B in zip(rewards.names(self.functions), rewards_BR.T, strict=True):
                parts[f"rewards/{name}"] = rewards_B
            parts["reward_disagreement"] = scaled_BR[:, self.weights_R != 0].std(1, correction=0)
        if self.overlong:
            parts["overlong_penalty"] = torch.tensor(self.overlong(completion_ids=completions.ids))
        return parts

    def earned(
        self, parts: dict[str, Tensor], finished: list[bool], gather: Callable[[Tensor], Tensor], learn: bool = True
    ) -> Tensor:
        """What each episode of a rollout earns, (B,).

        Args:
            parts: what `rewards` returned.
            gather: joins a tensor of all processes.
            learn: whether these rewards count for those that come after. Those of an evaluation do not: they are seen
                by the mean and deviation of the rollouts so far or, where there is none yet, by their own.
        """
        args, rewards_B = self.args, parts["reward"]
        moments = self.moments if learn or self.moments.count else algorithm.RunningMoments()
        if learn or not moments.count:
            moments.update(gather(rewards_B))
        first_mean = moments.mean if self.first_mean is None else self.first_mean
        if learn:
            self.first_mean = first_mean
        if args.normalize_rewards:
            scores_B, deviation = moments.normalise(rewards_B), 1.0
        else:
            scores_B, deviation = rewards_B - first_mean, moments.deviation
        penalties_B = -parts.get("overlong_penalty", torch.zeros_like(scores_B))
        if args.missing_eos_penalty is not None:
            penalties_B = penalties_B + args.missing_eos_penalty * ~torch.tensor(finished)
        scores_B = scores_B - deviation * penalties_B
        return scores_B if args.reward_clip_range is None else scores_B.clamp(*args.reward_clip_range)

    def state_dict(self) -> dict:
        return {"moments": vars(self.moments), "first_mean": self.first_mean}

    def load_state_dict(self, state: dict) -> None:
        self.moments, self.first_mean = algorithm.RunningMoments(**state["moments"]), state["first_mean"]
