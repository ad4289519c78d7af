"""Sampling: completions of the policy, with the log-probability of every token, and what is known of them.

Shapes: B episodes, K completion tokens, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from rlhf_recipes.decoding import Decoder
from rlhf_recipes.ppo.roles import Roles
from rlhf_recipes.sampling import Draws
from rlhf_recipes.text_metrics import distinct_2

TRAIN, EVALUATE = 0, 1  # streams of random numbers
SAMPLES = 4  # completions of each rollout to show


@dataclass
class Completions:
    """Sampled answers.

    Attributes:
        ids: tokens of each, EOS included.
        texts: the same without control tokens.
        logps: log-probabilities of these tokens when they were sampled, a tensor for each.
        finished: whether it ended with EOS.
    """

    ids: list[list[int]]
    texts: list[str]
    logps: list[Tensor]
    finished: list[bool]

    def columns(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is known of each, (B,); the first is its reward.

        Args:
            parts: what `Scores.rewards` returned.
        """
        distinct = [torch.nan if d is None else d for d in map(distinct_2, self.texts)]
        return {name: values.float() for name, values in parts.items()} | {
            "completions/mean_length": torch.tensor([float(len(ids)) for ids in self.ids]),
            "completions/eos_rate": torch.tensor([float(finished) for finished in self.finished]),
            "completions/distinct_2": torch.tensor(distinct, dtype=torch.float),
        }

    def shown(self, which: Iterable[int], rows: list[dict], columns: dict[str, Tensor], step: int) -> list[dict]:
        """Some of them, with their prompts and what is known of them."""
        return [
            {
                "step": step,
                "prompt": rows[i]["prompt"],
                "completion": self.texts[i].strip(),
                **{name: round(values[i].item(), 4) for name, values in columns.items()},
            }
            for i in which
        ]


class Sampler:
    """Draws every next token and remembers its log-probability.

    Each episode has a seed of its own: that makes a resumed run, and a run on two processes, draw the same.
    Log-probabilities are those of the whole distribution at temperature T, before top-k and top-p.
    """

    def __init__(self, seeds: list[int], device, tokens: int, temperature: float, top_k: int, top_p: float):
        self.draws, self.temperature = Draws(seeds, device, tokens), temperature
        self.filters = LogitsProcessorList()
        if top_k > 0:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.logps: list[list[float]] = [[] for _ in seeds]

    def choose(self, logits_BV: Tensor, rows: list[int]) -> Tensor:
        """The next tokens of these of the episodes, (B,)."""
        logits_BV = logits_BV / self.temperature
        chosen_B = self.draws.draw(self.filters(None, logits_BV), rows)
        logps_B = logits_BV.gather(1, chosen_B[:, None])[:, 0] - logits_BV.logsumexp(1)
        for row, logp in zip(rows, logps_B.tolist(), strict=True):
            self.logps[row].append(logp)
        return chosen_B


def seed_of(seed: int, stream: int, rollout: int, episode: int) -> int:
    """A seed of its own for every episode.

    Args:
        seed: of the run.
        stream: TRAIN or EVALUATE.
    """
    return hash((seed, stream, rollout, episode)) % 2**63


def sample(
    roles: Roles, tokenizer, prompts: list[list[int]], seeds: list[int], eos_ids: list[int], args
) -> Completions:
    """One completion of each prompt under the policy.

    Args:
        seeds: one for each episode.
        args: `max_completion_length`, `temperature`, `top_k`, `top_p`, `local_rollout_forward_batch_size`.
    """
    found, size, device = Completions([], [], [], []), args.local_rollout_forward_batch_size, roles.head.weight.device
    decoder = Decoder(roles.causal, tokenizer.pad_token_id)
    with roles.exact_head():
        for start in range(0, len(prompts), size):
            some = slice(start, start + size)
            sampler = Sampler(
                seeds[some], device, args.max_completion_length, args.temperature, args.top_k, args.top_p
            )
            found.ids += decoder.decode(prompts[some], eos_ids, args.max_completion_length, sampler.choose)
            found.logps += [torch.tensor(logps_K, device=device) for logps_K in sampler.logps]
    found.texts = tokenizer.batch_decode(found.ids, skip_special_tokens=True)
    found.finished = [ids[-1] in eos_ids for ids in found.ids]
    return found
