"""What the two answers of a pair have in common goes through the model once.

A batch of TRL's preference trainers is [chosen; rejected], padded on the right. Rows i and i + P of it begin alike,
and a causal model's hidden states are the same there. So a pair becomes one row: the common start, the rest of the
chosen sequence, the rest of the rejected one, which does not see the chosen one. The states are put back where the
rows of the batch had them, and the backward of that adds the gradients of both rows. Collator, head, loss, metrics and
reference are the trainer's.

Shapes: P pairs, B = 2 P sequences of T tokens, L tokens of a row that holds a pair.
"""

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.errors import first_line

# Lengths are rounded up to it, so that shapes are few: oneDNN keeps memory for each.
SPAN = 32
# Of the states of a pair computed in both ways, relative to their norm: far above what bfloat16 rounds, far below what
# one token too many under the mask changes.
CLOSE = 0.05
# What knows a mask of our own; kernels for flash attention take none.
MASKED = ("eager", "sdpa")
ATTENTION = ("full_attention", "sliding_attention")


@dataclass
class Packed:
    """A batch of pairs, one row a pair.

    Attributes:
        ids_PL: token ids.
        positions_PL: of each token in its own sequence.
        part_PL: 0 the common start, 1 the rest of the first row, 2 the rest of the second, 3 padding.
        index_BT: where in the flat (P L) the state of each token of the batch lies; 0 for padding.
    """

    ids_PL: Tensor
    positions_PL: Tensor
    part_PL: Tensor
    index_BT: Tensor

    def visible(self, window: int | None = None) -> Tensor:
        """Which keys each query sees, (P, 1, L, L).

        Args:
            window: tokens that a layer looks back at, its own among them; None: all.
        """
        L = self.ids_PL.shape[1]
        queries, keys = self.part_PL[:, :, None], self.part_PL[:, None, :]
        seen = torch.ones(L, L, dtype=torch.bool, device=queries.device).tril() & ((keys == 0) | (keys == queries))
        if window:
            seen &= self.positions_PL[:, :, None] - self.positions_PL[:, None, :] < window
        return seen[:, None]


def pack(ids_BT: Tensor, mask_BT: Tensor) -> Packed:
    """Rows i and i + P of a batch that is padded on the right as one row.

    Args:
        mask_BT: 1 where a row has a token.
    """
    (B, T), device = ids_BT.shape, ids_BT.device
    first_PT, second_PT = ids_BT.chunk(2)
    n_P1, m_P1 = mask_BT.sum(1, keepdim=True).chunk(2)
    alike_PT = (first_PT == second_PT) & mask_BT[: B // 2].bool() & mask_BT[B // 2 :].bool()
    same_P1 = alike_PT.long().cumprod(1).sum(1, keepdim=True)
    ends_P1 = n_P1 + m_P1 - same_P1
    L = -(-ends_P1.max().item() // SPAN) * SPAN
    at_L = torch.arange(L, device=device)[None]
    in_first_PL = at_L < n_P1
    positions_PL = torch.where(in_first_PL, at_L, at_L - n_P1 + same_P1)
    part_PL = (at_L >= same_P1).long() + (at_L >= n_P1) + (at_L >= ends_P1)
    taken_PL = positions_PL.clamp(max=T - 1)
    ids_PL = torch.where(in_first_PL, first_PT.gather(1, taken_PL), second_PT.gather(1, taken_PL))
    at_T = torch.arange(T, device=device)[None]
    second_index_PT = torch.where(at_T < same_P1, at_T, at_T + n_P1 - same_P1)
    rows_P1 = torch.arange(B // 2, device=device)[:, None] * L
    index_BT = torch.cat([rows_P1 + at_T, rows_P1 + second_index_PT]).masked_fill(mask_BT == 0, 0)
    positions_PL = positions_PL.masked_fill(part_PL == 3, 0)
    return Packed(ids_PL.masked_fill(part_PL == 3, 0), positions_PL, part_PL, index_BT)


class SharedPrefixes:
    """Hooks on a backbone (what a language model has below its head), under which it packs batches of pairs.

    A batch that it cannot pack, or whose rows share too little, goes through whole. The first pair of all goes through
    in both ways: a model that answers otherwise when packed gets its batches whole.

    Attributes:
        batches: of training, how many were `packed`, and how many went through `whole`.
        refused: why none is packed, or "".
    """

    def __init__(self, backbone: nn.Module):
        self.config = backbone.config.get_text_config()
        self.batches = {"packed": 0, "whole": 0}
        self.refused = self._refusal(backbone)
        self._proven = False
        self._packed: list[Packed | None] = []
        backbone.register_forward_pre_hook(self._before, with_kwargs=True)
        backbone.register_forward_hook(self._after)

    def _refusal(self, backbone: nn.Module) -> str:
        if (kind := self.config._attn_implementation) not in MASKED:
            return f"attention by {kind} takes no mask of pairs"
        if others := sorted(set(getattr(self.config, "layer_types", None) or ()) - set(ATTENTION)):
            return f"its layers mix tokens by {', '.join(others)}"
        if "position_ids" not in signature(backbone.forward).parameters:
            return "its tokens take no positions"
        dropouts = (module for module in backbone.modules() if isinstance(module, nn.Dropout) and module.p)
        if next(dropouts, None) or getattr(self.config, "attention_dropout", 0):
            return "dropout would fall on both answers alike"
        return ""

    def _before(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]):
        given = _named(backbone, args, kwargs)
        packed = None if self.refused else self._pack(given)
        if packed and not self._proven:
            self._prove(backbone, given)
            packed = None if self.refused else packed
        self._packed.append(packed)
        if backbone.training:
            self.batches["packed" if packed else "whole"] += 1
        if not packed:
            return None
        given["input_ids"], given["position_ids"] = packed.ids_PL, packed.positions_PL
        given["attention_mask"] = self._mask(packed, _computed_in(backbone))
        return (), given

    def _after(self, backbone: nn.Module, args: tuple, output):
        if packed := self._packed.pop():
            states_PLH = output.last_hidden_state
            output.last_hidden_state = states_PLH.flatten(0, 1)[packed.index_BT]
        return output

    def _pack(self, given: dict[str, Any]) -> Packed | None:
        """The batch as pairs; None where it is of another kind, or nothing would be saved."""
        ids_BT, mask_BT = given.get("input_ids"), given.get("attention_mask")
        if ids_BT is None or not isinstance(mask_BT, Tensor) or mask_BT.shape != ids_BT.shape or len(ids_BT) % 2:
            return None
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        of_tokens = {key for key, value in tensors.items() if value.shape[:2] == ids_BT.shape}
        if of_tokens != {"input_ids", "attention_mask"} or given.get("past_key_values") is not None:
            return None
        if given.get("output_router_logits") or not mask_BT[:, 0].all():  # padded on the left
            return None
        packed = pack(ids_BT, mask_BT)
        return packed if packed.ids_PL.numel() < ids_BT.numel() else None

    def _mask(self, packed: Packed, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What is added to the scores of attention, for each kind of layer where there are several."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        windows = {"full_attention": None, "sliding_attention": window}
        if len(kinds) > 1:
            return {kind: _added(packed.visible(windows[kind]), dtype) for kind in kinds}
        return _added(packed.visible(windows[kinds.pop()] if kinds else window), dtype)

    @torch.no_grad()
    def _prove(self, backbone: nn.Module, given: dict[str, Any]) -> None:
        """Compare the states of the longest pair, packed and whole."""
        ids_BT, mask_BT = given["input_ids"], given["attention_mask"]
        P = len(ids_BT) // 2
        longest = (mask_BT.sum(1)[:P] + mask_BT.sum(1)[P:]).argmax().item()
        rows = [longest, longest + P]
        pair = {**given, "input_ids": ids_BT[rows], "attention_mask": mask_BT[rows]}
        packed = pack(pair["input_ids"], pair["attention_mask"])
        together = {"input_ids": packed.ids_PL, "position_ids": packed.positions_PL,
                    "attention_mask": self._mask(packed, _computed_in(backbone))}  # fmt: skip
        training, self._proven = backbone.training, True
        backbone.eval()
        try:  # without the hooks of the module itself
            whole_2TH = backbone.forward(**pair).last_hidden_state
            packed_LH = backbone.forward(**{**pair, **together}).last_hidden_state[0]
        except RuntimeError as error:  # of a kernel that takes no such mask
            self.refused = first_line(error)
            return
        finally:
            backbone.train(training)
        kept = pair["attention_mask"].bool()
        whole_NH, packed_NH = whole_2TH[kept].float(), packed_LH[packed.index_BT][kept].float()
        difference = ((packed_NH - whole_NH).norm(dim=1) / whole_NH.norm(dim=1)).max().item()
        if not difference < CLOSE:
            self.refused = f"its hidden states are others when packed (by {difference:.1%})"


def _named(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What its forward is given, by names alone."""
    of_forward = signature(backbone.forward)
    given = of_forward.bind_partial(*args, **kwargs).arguments
    for name, parameter in of_forward.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _computed_in(backbone: nn.Module) -> torch.dtype:
    device = backbone.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else backbone.dtype


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen. SDPA would make it of a mask of booleans, and keep it, once for each layer."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)
