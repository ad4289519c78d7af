"""Sampling: completions of the policy, with the log-probability of every token.

Shapes: B episodes, K completion tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from rlhf_recipes.decoding import Decoder
from rlhf_recipes.ppo.roles import Roles
from rlhf_recipes.sampling import Draws


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
