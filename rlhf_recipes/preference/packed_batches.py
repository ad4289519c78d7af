"""Batches of TRL's trainers of answers go through the model without most of their padding.

Sequences lie in one row where that costs less than padding each, and what the two answers of a pair have in common is
there once: rows i and i + B / 2 of a batch of pairs, [chosen; rejected]. The states are put back where the rows of the
batch had them, and the backward of that adds the gradients of both. Collator, head, loss, metrics and reference are
those of the trainer.

Shapes: B sequences of T tokens, padded on the right.
"""

from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from rlhf_recipes import packing
from rlhf_recipes.packing import Packed, count_shared, find_rows, pack


class PackedBatches:
    """Hooks on a backbone under which it packs batches.

    A batch that it cannot pack, or that would be no smaller, goes through whole.

    Args:
        together: rows of a batch that begin alike: 2, pairs; 1, answers each by itself.

    Attributes:
        batches: of training, how many were `packed`, and how many went through `whole`.
    """

    def __init__(self, backbone: nn.Module, together: int = 2):
        self.packing, self.together = packing.allow(backbone), together
        self.batches = {"packed": 0, "whole": 0}
        dropouts = (module for module in backbone.modules() if isinstance(module, nn.Dropout) and module.p)
        self._drops = bool(next(dropouts, None) or getattr(self.packing.config, "attention_dropout", 0))
        self._packed: list[Packed | None] = []
        backbone.register_forward_pre_hook(self._before, with_kwargs=True)
        backbone.register_forward_hook(self._after)

    @property
    def refused(self) -> str:
        """Why none is packed, or ""."""
        drops = "dropout would fall on both answers alike" if self._drops and self.together > 1 else ""
        return self.packing.refused or drops

    def _before(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]):
        given = _named(backbone, args, kwargs)
        alike = [] if self.refused else _alike(given, self.together)
        if alike and not self.packing.proven:  # by every process, whose layers may lie with the others
            longest = max(alike, key=lambda each: sum(map(len, each)))
            # without the hooks of the module itself
            self.packing.prove(lambda **own: backbone.forward(**own).last_hidden_state, longest, backbone)
        width = self.packing.config.hidden_size
        packed = _pack(alike, given["input_ids"], width) if alike and not self.refused else None
        self._packed.append(packed)
        if backbone.training:
            self.batches["packed" if packed else "whole"] += 1
        if not packed:
            return None
        return (), given | self.packing.inputs(packed, packing.computed_in(backbone))

    def _after(self, backbone: nn.Module, args: tuple, output):
        if packed := self._packed.pop():
            output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[packed.index_BT]
            if (logits := output.get("router_logits")) is not None:
                output.router_logits = tuple(each[packed.index_BT.flatten()] for each in logits)
        return output


def _alike(given: dict[str, Any], together: int) -> list[list[list[int]]]:
    """The ids of the rows of each pair of a batch, or of each row; none of a batch of another kind."""
    ids_BT, mask_BT = given.get("input_ids"), given.get("attention_mask")
    if ids_BT is None or not isinstance(mask_BT, Tensor) or mask_BT.shape != ids_BT.shape or len(ids_BT) % together:
        return []
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    of_tokens = {key for key, value in tensors.items() if value.shape[:2] == ids_BT.shape}
    cached = any(given.get(name) is not None for name in ("past_key_values", "cache"))
    if of_tokens != {"input_ids", "attention_mask"} or cached or len(ids_BT) < 2:
        return []
    if not mask_BT[:, 0].all():  # padded on the left
        return []
    rows = [ids[:n] for ids, n in zip(ids_BT.tolist(), mask_BT.sum(1).tolist(), strict=True)]
    count = len(rows) // together
    return [rows[i::count] for i in range(count)]


def _pack(alike: list[list[list[int]]], ids_BT: Tensor, hidden_size: int) -> Packed | None:
    """Their sequences in the order of the batch; None where nothing would be saved."""
    shared = [count_shared(each) for each in alike]
    lengths = [same + sum(len(ids) - same for ids in each) for same, each in zip(shared, alike, strict=True)]
    packed = pack(alike, ids_BT.device, ids_BT.shape[1], find_rows(lengths, hidden_size))
    if packed.ids_PL.numel() >= ids_BT.numel():
        return None
    packed.index_BT = packed.index_BT.unflatten(0, (len(alike), -1)).transpose(0, 1).flatten(0, 1)
    return packed


def _named(backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What its forward is given, by names alone."""
    of_forward = signature(backbone.forward)
    given = of_forward.bind_partial(*args, **kwargs).arguments
    for name, parameter in of_forward.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given
