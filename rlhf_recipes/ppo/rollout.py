"""Sampling: completions of the policy, with the log-probability of every token.

Shapes: B episodes, K completion tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from rlhf_recipes.inference import left_pad
from rlhf_recipes.ppo.roles import Roles
from rlhf_recipes.sampling import Draws, complete


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


class Sampler(LogitsProcessor):
    """Draws every next token and remembers its log-probability.

    Each episode has a seed of its own: that makes a resumed run, and a run on two processes, draw the same.
    Log-probabilities are those of the whole distribution at temperature T, before top-k and top-p.
    """

    def __init__(self, seeds: list[int], device, tokens: int, temperature: float, top_k: int, top_p: float):
        self.draws, self.rows = Draws(seeds, device, tokens), list(range(len(seeds)))
        self.temperature = temperature
        self.filters = LogitsProcessorList()
        if top_k > 0:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.filters.append(TopPLogitsWarper(top_p))
        self.logps: list[Tensor] = []

    def __call__(self, input_ids, scores):
        logits_BV = scores.float() / self.temperature
        choice_B1 = self.draws.draw(self.filters(input_ids, logits_BV), self.rows)
        self.logps.append((logits_BV.gather(1, choice_B1) - logits_BV.logsumexp(1, keepdim=True))[:, 0])
        return torch.full_like(logits_BV, -torch.inf).scatter(1, choice_B1, 0.0)


def sample(
    roles: Roles, tokenizer, prompts: list[list[int]], seeds: list[int], eos_ids: list[int], args
) -> Completions:
    """One completion of each prompt under the policy.

    Args:
        seeds: one for each episode.
        args: `max_completion_length`, `temperature`, `top_k`, `top_p`, `local_rollout_forward_batch_size`.
    """
    found, size = Completions([], [], [], []), args.local_rollout_forward_batch_size
    for start in range(0, len(prompts), size):
        some = slice(start, start + size)
        for field, each in vars(_sample_together(roles, tokenizer, prompts[some], seeds[some], eos_ids, args)).items():
            getattr(found, field).extend(each)
    return found


def _sample_together(roles: Roles, tokenizer, prompts, seeds, eos_ids, args) -> Completions:
    device = roles.head.weight.device
    ids_BT, mask_BT, _ = left_pad(prompts, tokenizer.pad_token_id, device)
    sampler = Sampler(seeds, device, args.max_completion_length, args.temperature, args.top_k, args.top_p)
    with roles.exact_head():
        out_BT = complete(
            roles.causal, ids_BT, mask_BT, eos_ids, tokenizer.pad_token_id, args.max_completion_length,
            processors=LogitsProcessorList([sampler]),
        )  # fmt: skip
    logps_BK = torch.stack(sampler.logps, 1)
    completions = Completions([], [], [], [])
    for row, tokens in enumerate(out_BT[:, ids_BT.shape[1] :].tolist()):
        end = next((n for n, token in enumerate(tokens) if token in eos_ids), None)
        length = len(tokens) if end is None else end + 1
        completions.ids.append(tokens[:length])
        completions.logps.append(logps_BK[row, :length])
        completions.finished.append(end is not None)
    completions.texts = tokenizer.batch_decode(completions.ids, skip_special_tokens=True)
    return completions
