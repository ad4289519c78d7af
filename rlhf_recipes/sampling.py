"""Drawing the next token, and completions of nothing but the model's own distribution.

Shapes: B sequences, T tokens, K completion tokens, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList


def draw(logits_BV: Tensor, generators: list[torch.Generator]) -> Tensor:
    """A token for each row from softmax(logits), shape (B, 1).

    argmax(logits - log E) with E ~ Exp(1) is such a draw (Gumbel-max). Each row has a generator of its own, so that
    what it draws depends on its seed alone, not on batch, process or what ran before.
    """
    noise_BV = torch.stack(
        [
            torch.empty_like(row_V).exponential_(generator=generator)
            for row_V, generator in zip(logits_BV, generators, strict=True)
        ]
    )
    return (logits_BV - noise_BV.log()).argmax(1, keepdim=True)


def complete(
    model, ids_BT: Tensor, mask_BT: Tensor, stops: list[int], pad_id: int, max_new_tokens: int,
    temperature: float = 0.0, processors: LogitsProcessorList | None = None,
) -> Tensor:  # fmt: skip
    """Prompts, padded on the left, and their completions, (B, T + K).

    `generate` fills what it is not given from the model's generation_config.json: penalties of repetition (Qwen2.5),
    min_p, suppressed and forced tokens, a least length. Samples of such a distribution would not estimate a KL of the
    model's, nor its greedy answers be its own, so a bare config stands in its place meanwhile.

    Args:
        stops: every token that ends a completion.
        temperature: 0 is greedy; otherwise the full distribution is sampled (no top-p, no top-k).
        processors: what they make of the logits is chosen from, greedily or by drawing.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    asked = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id, use_cache=True,
        do_sample=temperature > 0, temperature=temperature or None, top_k=0 if temperature else None,
        top_p=1.0 if temperature else None,
    )  # fmt: skip
    models_own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        return base.generate(
            input_ids=ids_BT, attention_mask=mask_BT, generation_config=asked, logits_processor=processors
        )
    finally:
        base.generation_config = models_own


def kl_estimates(logps: Tensor, reference_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k1, k2 and k3 of KL(pi, pi_ref) at sampled tokens (Schulman 2020, "Approximating KL Divergence").

    With r = pi_ref/pi: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (biased, of low variance), k3 = r - 1 - log r
    (unbiased, never negative).
    """
    log_r = reference_logps - logps
    return -log_r, log_r.square() / 2, log_r.exp() - 1 - log_r
