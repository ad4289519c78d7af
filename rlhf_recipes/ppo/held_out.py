"""What a policy that samples answers to held-out prompts: its reward, and how far it is from its reference.

Shapes: N tokens of the completions in a row, B episodes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_recipes import progress
from rlhf_recipes.ppo.roles import POLICY, Batch
from rlhf_recipes.ppo.rollout import EVALUATE, Completions, seed_of
from rlhf_recipes.ppo.scores import Scores
from rlhf_recipes.sampling import kl_estimates


class Trainer(Protocol):
    """What is measured by: a trainer that samples.

    Attributes:
        args, accelerator, state: of transformers' Trainer.
        scores: what an episode earns.
        reference: the role from which the policy's distance is measured.
    """

    args: Any
    accelerator: Any
    state: Any
    scores: Scores
    reference: str

    def complete(self, rows: list[dict], seeds: list[int]) -> tuple[list[list[int]], Completions]: ...
    def batch_of(self, prompts: list[list[int]], completions: list[list[int]]) -> Batch: ...
    def logps(self, role: str, batch: Batch) -> Tensor: ...
    def gather(self, values: Tensor) -> Tensor: ...


@torch.no_grad()
def measure(
    trainer: Trainer, data: Dataset, what: str, look: Callable[[Tensor, Completions], None] | None = None
) -> list[dict]:
    """One episode for each prompt: `reward`, `kl` (k1, nats) and `kl_k3`, its length and end; its seed is fixed.
    Several processes share the prompts.

    Args:
        look: is given the policy's log-probabilities, (N,), of each batch of completions.
    """
    args, found, line = trainer.args, [], progress.Line(what, len(data))
    size, world = args.per_device_eval_batch_size, args.world_size
    for start in range(0, len(data), size * world):
        everyones = [i % len(data) for i in range(start, start + size * world)]  # of equal size on each process
        indices = everyones[args.process_index * size :][:size] if world > 1 else everyones[: len(data) - start]
        rows = [data[i] for i in indices]
        prompts, completions = trainer.complete(rows, [seed_of(args.seed, EVALUATE, 0, i) for i in indices])
        with trainer.accelerator.autocast():
            parts = trainer.scores.rewards(rows, completions, trainer.state)
        batch = trainer.batch_of(prompts, completions.ids)
        logps_N, reference_N = (trainer.logps(role, batch) for role in (POLICY, trainer.reference))
        if look:
            look(logps_N, completions)
        k1, _, k3 = (batch.padded(k).sum(1).cpu() for k in kl_estimates(logps_N, reference_N))
        columns = completions.columns(parts) | {"kl": k1, "kl_k3": k3}
        rows_BF = trainer.gather(torch.stack([column.float() for column in columns.values()], 1))
        found += [dict(zip(columns, values, strict=True)) for values in rows_BF.tolist()]
        line.update(min(len(found), len(data)))
    return found[: len(data)]
