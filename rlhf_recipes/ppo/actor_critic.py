"""Policy and critic on a micro-batch: what they say of it, and the gradients of their losses.

Shapes: B episodes, K completion tokens, N completion tokens of a batch, H hidden size.
"""

from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf_recipes.ppo import algorithm, gradients
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.experience import MicroBatch, Tally
from rlhf_recipes.ppo.roles import CRITIC, POLICY, Batch, Roles


class ActorCritic:
    """The two roles that are trained.

    Attributes:
        tally: what is to be logged of their losses.
    """

    def __init__(self, args: PPOConfig, roles: Roles, accelerator: Accelerator):
        self.args, self.roles, self.accelerator, self.tally = args, roles, accelerator, Tally()
        # Of a rollout's first micro-batch: the weights are the same when its update begins.
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def act(self, batch: Batch, keep: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies of the policy, and V, as its update will compute them; (N,) each.

        Args:
            keep: whether the update that follows shall find this forward pass, and not make it again.
        """
        self.roles.model.train(keep)  # gradient checkpointing asks for it
        with torch.set_grad_enabled(keep):
            forward = self._forward(batch, entropy=True)
        self.roles.model.eval()
        self._kept = forward if keep else self._kept
        hidden_NH, logps_N, entropy_N = (each.detach() for each in forward)
        if self.roles.separate:
            with self.roles.acting(CRITIC) as decoder, self.accelerator.autocast():
                hidden_NH = self.roles.answer_states(decoder, batch)
        return logps_N, entropy_N, self.roles.values(hidden_NH)

    def backward(self, micro: MicroBatch, tokens: float, first: bool, deviation: float) -> Tensor:
        """Add the gradients of one micro-batch, each token's weight 1/`tokens`; returns its part of the loss.

        Args:
            first: whether it is of the first step of its rollout.
            deviation: of the rollout's returns, the unit of the critic's clip.
        """
        args, batch = self.args, micro.batch
        kept, self._kept = self._kept, None
        with self.roles.acting(POLICY):
            hidden_NH, logps_N, entropy_N = kept or self._forward(batch, entropy=args.entropy_coef != 0)
            if first:
                micro.old_logps = batch.padded(logps_N.detach())
            objective_N, ratio_N, clipped_N = algorithm.policy_objective(
                logps_N, batch.packed(micro.old_logps), batch.packed(micro.advantages), args.cliprange, args.dual_clip
            )
            if args.rollout == "server" and args.vllm_importance_sampling_correction:
                weights_N = algorithm.importance_weights(
                    batch.packed(micro.old_logps), batch.packed(micro.sampler_logps),
                    args.vllm_importance_sampling_clip_max,
                )  # fmt: skip
                objective_N = objective_N * weights_N
                self.tally.add("sampling/importance_sampling_ratio/mean", weights_N)
                self.tally.extremes("sampling/importance_sampling_ratio", weights_N)
            if args.entropy_coef:
                objective_N = objective_N + args.entropy_coef * entropy_N
            policy_loss = -objective_N.sum() / tokens
            self.accelerator.backward(policy_loss)
        if self.roles.separate:
            with self.roles.acting(CRITIC) as decoder:
                with self.accelerator.autocast():
                    hidden_NH = self.roles.answer_states(decoder, batch)
                value_loss, values_clipped_N = self._backward_values(hidden_NH, micro, tokens, deviation)
        else:
            value_loss, values_clipped_N = self._backward_values(hidden_NH.detach(), micro, tokens, deviation)
        log_ratio_N = logps_N.detach() - batch.packed(micro.old_logps)
        self.tally.add("approx_kl", log_ratio_N.square() / 2)
        self.tally.add("clip_fraction/policy", clipped_N)
        self.tally.add("clip_fraction/value", values_clipped_N)
        self.tally.add("ratio/mean", ratio_N)
        self.tally.extremes("ratio", ratio_N)
        return (policy_loss + value_loss).detach()

    def sum_gradients(self) -> bool:
        """Sum them over processes, each of which has its share of the tokens; returns whether all are finite."""
        parameters = self.roles.trained().values()
        if self.args.world_size > 1:
            gradients.add_up(parameters, partial(self.accelerator.reduce, reduction="sum"))
        return all(p.grad is None or p.grad.isfinite().all() for p in parameters)

    def drop_gradients(self) -> None:
        """The critic's too, which the loop does not know; Accelerate's `zero_grad` waits for a step's last batch."""
        for parameter in self.roles.trained().values():
            parameter.grad = None

    def _backward_values(
        self, hidden_NH: Tensor, micro: MicroBatch, tokens: float, deviation: float
    ) -> tuple[Tensor, Tensor]:
        old_N, returns_N = micro.batch.packed(micro.old_values), micro.batch.packed(micro.returns)
        cliprange = self.args.cliprange_value
        if cliprange is not None:
            cliprange *= deviation
        losses_N, clipped_N = algorithm.value_loss(self.roles.values(hidden_NH), old_N, returns_N, cliprange)
        loss = losses_N.sum() / tokens
        self.accelerator.backward(loss)
        self.tally.add("loss/value", losses_N)
        return loss, clipped_N

    def _forward(self, batch: Batch, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Roles.answer_logps`, of the policy."""
        with self.accelerator.autocast():
            return self.roles.answer_logps(POLICY, batch, self.args.temperature, entropy)
