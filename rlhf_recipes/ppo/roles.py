"""Four roles on one backbone: policy, critic, reference and reward models are adapters that take turns.

With LoRA there is one set of base weights, which nothing changes: the policy is the adapter "default", the critic the
adapter "critic" and a head, the reference a frozen copy of the adapter that the policy started from (or no adapter at
all), each reward model a frozen adapter and a score head. Without LoRA, reference and critic are copies of the model.

Shapes: B sequences, T tokens, K completion tokens of the longest, N completion tokens of all, H hidden size; P rows of
L tokens, in each of which lies a sequence or, packed, several.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from rlhf_recipes import packing, ranks
from rlhf_recipes.errors import Refusal
from rlhf_recipes.packing import Packed
from rlhf_recipes.ppo.trl_private import ChunkedLogProbFunction, disable_dropout_in_model
from rlhf_recipes.sampling import float32_head, in_place_of

POLICY, CRITIC, REFERENCE = "default", "critic", "reference"
VOCABULARY_CHUNK = 8192
# Factors on the logits that some architectures have and `token_logps` does not.
LOGIT_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


@dataclass
class Batch:
    """Prompts and completions.

    Attributes:
        ids_BT: token ids of what goes through the backbone, (P, L) where several episodes share a row.
        rows_N, columns_N: where the hidden states lie that predict the completion tokens.
        tokens_N: the completion tokens.
        mask_BK: 1 where an episode has a completion token.
        shared: rows of several episodes.
    """

    ids_BT: Tensor
    rows_N: Tensor
    columns_N: Tensor
    tokens_N: Tensor
    mask_BK: Tensor
    shared: Packed | None = None

    @classmethod
    def of(
        cls, prompts: list[list[int]], completions: list[list[int]], pad_id: int, device,
        rows: list[list[int]] | None = None,
    ) -> "Batch":  # fmt: skip
        """`rows`: as for `lay_out`."""
        both = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        ids_PL, index_BT, packed = lay_out(both, pad_id, device, rows)
        K = max(map(len, completions))
        mask_BK = torch.tensor([[1.0] * len(c) + [0.0] * (K - len(c)) for c in completions], device=device)
        episodes_N, offsets_N = mask_BK.nonzero(as_tuple=True)
        before_N = torch.tensor([len(p) - 1 for p in prompts], device=device)[episodes_N] + offsets_N
        index_N, L = index_BT[episodes_N, before_N], ids_PL.shape[1]
        tokens_N = torch.tensor([token for c in completions for token in c], device=device)
        return cls(ids_PL, index_N // L, index_N % L, tokens_N, mask_BK, packed)

    @classmethod
    def restored(cls, state: dict) -> "Batch":
        """The inverse of `dataclasses.asdict`."""
        shared = state.get("shared")
        return cls(**{**state, "shared": shared and Packed(**shared)})

    def padded(self, values_N: Tensor) -> Tensor:
        """Values of the completion tokens as (B, K), 0 where there is none."""
        return values_N.new_zeros(self.mask_BK.shape).masked_scatter(self.mask_BK.bool(), values_N)

    def packed(self, values_BK: Tensor) -> Tensor:
        """The inverse of `padded`: (N,)."""
        return values_BK[self.mask_BK.bool()]


class Roles:
    """The backbone and who acts on it."""

    def __init__(self, model: nn.Module, value: str):
        self.model, self.shared = model, isinstance(model, PeftModel)
        self.causal = model.get_base_model() if self.shared else model
        self.decoder, self.head = self.causal.get_decoder(), self.causal.get_output_embeddings()
        config = self.causal.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        if any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SCALES):
            raise Refusal(f"model: {config.model_type} scales its logits, which PPO does not. Choose another model.")
        if isinstance(self.head, BaseTunerLayer):
            raise Refusal("lora.target_modules: PPO computes log-probabilities from lm_head's weight. Leave it out.")
        self.separate = value == "separate"
        self.policy_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.value_head = nn.Linear(config.hidden_size, 1).to(self.head.weight.device)
        nn.init.zeros_(self.value_head.weight)
        # Set by the first rollout, then left: at the mean of the returns its gradient is noise, which Adam scales up.
        nn.init.zeros_(self.value_head.bias.requires_grad_(False))
        self.copies: dict[str, nn.Module] = {}

    def add_reference(self, starts_from_adapter: bool, anchor: Path | None = None) -> None:
        """Freeze what the policy is before it trains. `starts_from_adapter`: else it is the model without LoRA;
        `anchor`: or the adapter in a folder."""
        if anchor is not None:
            weights = load_peft_weights(str(anchor), device="cpu")
            self._add_adapter(REFERENCE, PeftConfig.from_pretrained(str(anchor)), weights, where=f"reference={anchor}")
        elif not self.shared:
            self.copies[REFERENCE] = copy.deepcopy(self.causal).requires_grad_(False).eval()
        elif starts_from_adapter:
            self._add_adapter(REFERENCE, self.model.peft_config[POLICY], self._weights(POLICY))

    def add_critic(self, reward_adapter: str | None, score: nn.Module | None) -> None:
        """Give the critic its weights: the reward model's where one shares the backbone (Huang et al.,
        arXiv:2403.17031), else the policy's and a head of zeros."""
        if self.separate and self.shared:
            source = reward_adapter or POLICY
            self._add_adapter(CRITIC, self.model.peft_config[source], self._weights(source))
            if score is not None:
                self.value_head.weight.data.copy_(score.weight)
        elif self.separate:
            self.copies[CRITIC] = copy.deepcopy(self.decoder).requires_grad_(True)
        adapter = {name: p for name, p in self.model.named_parameters() if f".{CRITIC}." in name}
        own = dict(self.copies[CRITIC].named_parameters(prefix="critic")) if CRITIC in self.copies else {}
        self.value_parameters = {**adapter, **own, "value_head.weight": self.value_head.weight}

    def add_reward(self, folder: Path, name: str) -> nn.Module:
        """Put a frozen reward model's adapter on the backbone; returns its score head.

        Raises:
            Refusal: it has no score head, or weights that this backbone has no place for.
        """
        weights = load_peft_weights(str(folder), device="cpu")
        score = [key for key in weights if key.endswith("score.weight")]
        if not score:
            raise Refusal(f"reward_funcs={folder}: has no score head. Give a run of recipes/reward.py.")
        weight = weights.pop(score[0]).float()
        self._add_adapter(name, PeftConfig.from_pretrained(str(folder)), weights, where=f"reward_funcs={folder}")
        head = nn.Linear(weight.shape[1], 1, bias=False, device=self.head.weight.device).requires_grad_(False)
        head.weight.copy_(weight)
        return head

    def disable_dropout(self) -> None:
        """In every adapter and copy, and in attention, which takes its rate from an attribute."""
        for model in (self.model, *self.copies.values()):
            disable_dropout_in_model(model)
            for module in model.modules():
                if isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0

    def value_state(self) -> dict[str, nn.Parameter]:
        """All that V is made of beside the backbone."""
        return {**self.value_parameters, "value_head.bias": self.value_head.bias}

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that a step moves."""
        return {**self.policy_parameters, **self.value_parameters}

    def find_rows(self, sequences: list[list[int]]) -> list[list[int]]:
        """See `packing.find_rows`; none where the backbone takes no such rows (`packing.allow`)."""
        own = getattr(self.decoder, "packing", None)
        if own is None or own.refused:
            return []
        shared = packing.count_shared(sequences)
        rows = packing.find_rows(list(map(len, sequences)), self.head.weight.shape[1], shared)
        several = [[sequences[i] for i in row] for row in rows if len(row) > 1]
        if several and not own.proven:
            # A window is met by long ones alone; else short ones tell as much, and cost less.
            several.sort(key=lambda row: len(row[-1]))
            longest = -1 if getattr(own.config, "sliding_window", None) else 0
            own.prove(self._last_states, several[longest][-2:], self.decoder)
            if own.refused and ranks.is_first():
                print(f"fast_forward: episodes go through whole: {own.refused}.", flush=True)
        return [] if own.refused else rows

    def _last_states(self, **given) -> Tensor:
        return self.decoder(**given, use_cache=False).last_hidden_state

    def states(self, decoder: nn.Module, ids_PL: Tensor, packed: Packed | None) -> Tensor:
        """Hidden states of the rows that `lay_out` made, (P, L, H)."""
        given = {"input_ids": ids_PL}
        if packed is not None:
            given = self.decoder.packing.inputs(packed, packing.computed_in(decoder))
        return decoder(**given, use_cache=False).last_hidden_state

    def answer_states(self, decoder: nn.Module, batch: Batch) -> Tensor:
        """The hidden states that predict the completion tokens, (N, H)."""
        return self.states(decoder, batch.ids_BT, batch.shared)[batch.rows_N, batch.columns_N]

    def answer_logps(
        self, role: str, batch: Batch, temperature: float, entropy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states that predict the completion tokens, (N, H), and what `token_logps` makes of them."""
        with self.acting(role) as decoder:
            hidden_NH = self.answer_states(decoder, batch)
            return hidden_NH, *self.token_logps(role, hidden_NH, batch.tokens_N, temperature, entropy)

    @contextmanager
    def acting(self, role: str):
        """The decoder that plays `role`. A backward pass belongs inside: checkpointed activations are computed again
        there, under whichever adapter is active."""
        if not self.shared:
            yield self.copies.get(role, self.decoder) if role == CRITIC else self._causal(role).get_decoder()
        elif role == REFERENCE and REFERENCE not in self.model.peft_config:
            with self.model.disable_adapter():
                yield self.decoder
        else:
            self.model.set_adapter(role)
            try:
                yield self.decoder
            finally:
                self.model.set_adapter(POLICY)

    def exact_head(self):
        """Logits in float32 meanwhile."""
        return in_place_of(self.head, float32_head(self.head))

    @contextmanager
    def merged(self):
        """The policy on unpacked copies of the base weights, which are gone afterwards: a 4-bit weight is not unpacked
        for every token. In float32 its LoRA is added into them, and a layer is one product instead of three; in 16
        bits it stays beside them, since most of what it adds is under half a unit in a weight's last place: the
        samples would be the base's. The base itself, which the other roles share, is never merged into. Layers that
        are more than a linear one and a plain LoRA stay as they are."""
        rounds = torch.is_autocast_enabled(self.head.weight.device.type)
        changed = []
        for layer in self.causal.modules():
            if not (isinstance(layer, LoraLayer) and _is_plain(layer)):
                continue
            base = layer.get_base_layer()
            weight, module = dequantize_module_weight(base), base
            if weight.dtype == torch.float32 and not rounds:
                weight, module = weight + layer.get_delta_weight(POLICY).to(weight), layer
            module.forward = partial(_linear, weight=weight, bias=base.bias)
            changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward

    def token_logps(self, role: str, hidden_NH: Tensor, tokens_N: Tensor, temperature: float, entropy: bool = False):
        """Log-probabilities of the tokens at `temperature`, and the entropies (nats) or None; (N,) each.

        From float32 logits, whatever the precision around."""
        head = self.head if self.shared else self._causal(role).get_output_embeddings()
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logps_N, entropy_N, *_ = ChunkedLogProbFunction.apply(
                hidden_NH.float(),
                head.weight,
                head.bias,
                tokens_N,
                temperature,
                VOCABULARY_CHUNK,
                self.softcap,
                1.0,
                ("entropy",) if entropy else (),
            )
        return logps_N, entropy_N

    def values(self, hidden_NH: Tensor) -> Tensor:
        """V of the states whose hidden states these are, float32, whatever the precision around."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.value_head(hidden_NH.float())[:, 0]

    @torch.no_grad()
    def rescale_values(self, slope: float, offset: float) -> None:
        """From here on V is `slope` times what it was, plus `offset`."""
        self.value_head.weight.mul_(slope)
        self.value_head.bias.mul_(slope).add_(offset)

    def _causal(self, role: str) -> nn.Module:
        return self.copies[REFERENCE] if role == REFERENCE else self.causal

    def _weights(self, adapter: str) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)

    def _add_adapter(self, name: str, config: PeftConfig, weights: dict[str, Tensor], where: str = "model") -> None:
        config = copy.deepcopy(config)
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
        self.model.add_adapter(name, config)
        places = self._weights(name)
        for key in weights.keys() ^ places.keys():
            raise Refusal(f"{where}: {key} is in one of adapter and model only. They do not belong together.")
        set_peft_model_state_dict(self.model, weights, adapter_name=name)
        self.model.set_adapter(POLICY)


def _is_plain(layer: LoraLayer) -> bool:
    base, special = layer.get_base_layer(), POLICY in layer.lora_variant or layer.lora_bias.get(POLICY)
    return isinstance(base, nn.Linear) and base.weight.dtype != torch.int8 and POLICY in layer.lora_A and not special


def _linear(x: Tensor, *, weight: Tensor, bias: Tensor | None, **_) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def lay_out(
    sequences: list[list[int]], pad_id: int, device, rows: list[list[int]] | None = None
) -> tuple[Tensor, Tensor, Packed | None]:
    """Rows for the backbone.

    Args:
        rows: indices of the sequences of each, as `Roles.find_rows` gives them; none: each sequence is one, padded on
            the right, so that a causal model needs no mask.

    Returns:
        Token ids (P, L), where in the flat (P L) the state of each token of each sequence lies (B, T), and what `pack`
        made of several in a row.
    """
    if not rows:
        ids_BT, _ = packing.right_pad(sequences, pad_id, device)
        return ids_BT, torch.arange(ids_BT.numel(), device=device).view_as(ids_BT), None
    packed = packing.pack([[sequences[i] for i in row] for row in rows], device)
    order = torch.tensor([i for row in rows for i in row], device=device)
    return packed.ids_PL, packed.index_BT[order.argsort()], packed
