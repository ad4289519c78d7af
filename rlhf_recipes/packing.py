"""Sequences that begin alike go through a backbone (what a language model has below its head) as one row.

A causal model's hidden states of what they begin with are the same. So a row is the common start and the rest of each
of them, of which none sees another, at the positions that the tokens have in their own sequences.

Shapes: P rows of L tokens, B sequences of T tokens, H hidden states.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapreplace
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_recipes.errors import first_line

# Lengths are rounded up to it, so that shapes are few: oneDNN keeps memory for each.
SPAN = 32
# Of the states of sequences computed in both ways, relative to their norm: far above what bfloat16 rounds, far below
# what one token too many under the mask changes.
CLOSE = 0.05
# What knows a mask of our own; kernels for flash attention take none.
MASKED = ("eager", "sdpa")
ATTENTION = ("full_attention", "sliding_attention")
PADDING = -1


@dataclass
class Packed:
    """Rows of sequences.

    Attributes:
        ids_PL: token ids.
        positions_PL: of each token in its own sequence.
        part_PL: 0 the common start, n the rest of the n-th sequence that begins so, `PADDING`.
        index_BT: where in the flat (P L) the state of each token of each sequence lies; 0 for padding, which is on the
            right. The sequences are in the order of the rows.
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
        begun_PL = (self.positions_PL == 0).cumsum(1)  # what begins alike starts at 0, and so does padding
        seen = torch.ones(L, L, dtype=torch.bool, device=queries.device).tril() & ((keys == 0) | (keys == queries))
        seen &= begun_PL[:, :, None] == begun_PL[:, None, :]
        if window:
            seen &= self.positions_PL[:, :, None] - self.positions_PL[:, None, :] < window
        return seen[:, None]


def pack(
    alike: list[list[list[int]]], device: torch.device, width: int | None = None, rows: list[list[int]] | None = None
) -> Packed:
    """Lists of sequences, what those of a list begin with once.

    Args:
        width: T; None: that of the longest sequence.
        rows: indices of the lists of each row, as `find_rows` gives them; none: each is a row.
    """
    rows = rows or [[n] for n in range(len(alike))]
    ids: list[list[int]] = [[] for _ in rows]
    positions: list[list[int]] = [[] for _ in rows]
    parts: list[list[int]] = [[] for _ in rows]
    places: list[list[list[int]]] = [[] for _ in alike]  # of the states of each sequence in its row
    for number, row in enumerate(rows):
        for n in row:
            same, begin = count_shared(alike[n]), len(ids[number])
            ids[number] += alike[n][0][:same]
            positions[number] += range(same)
            parts[number] += [0] * same
            for part, sequence in enumerate(alike[n], 1):
                end, rest = len(ids[number]), len(sequence) - same
                places[n].append([*range(begin, begin + same), *range(end, end + rest)])
                ids[number] += sequence[same:]
                positions[number] += range(same, len(sequence))
                parts[number] += [part] * rest
    L = filled_up(max(map(len, ids)))
    T = width or max(len(each) for own in places for each in own)
    row_of = {n: number for number, row in enumerate(rows) for n in row}

    def tensor(lists: list[list[int]], length: int, padding: int = 0) -> Tensor:
        return torch.tensor([each + [padding] * (length - len(each)) for each in lists], device=device)

    index_BT = tensor([[row_of[n] * L + k for k in each] for n, own in enumerate(places) for each in own], T)
    return Packed(tensor(ids, L), tensor(positions, L), tensor(parts, L, PADDING), index_BT)


def find_rows(lengths: list[int], hidden_size: int, shared: int = 0) -> list[list[int]]:
    """Which of them are to lie in a row, rows about as long as each other; none where a row for each, padded, costs
    less.

    A token takes 24 H^2 operations in the matrices of a layer (of 12 H^2 weights), and 4 L H in attention, which a
    processor does at a third of their speed: a row costs L (2 H + L).

    Args:
        lengths: tokens of each.
        shared: with how many all of them begin, which a row has once.

    Returns:
        Indices, a list for each row.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def cost(rows: int, L: int) -> int:
        return rows * L * (2 * hidden_size + L)

    found: list[list[int]] = []
    least, own_tokens = cost(len(lengths), max(lengths)), sum(lengths) - shared * len(lengths)
    for count in range(1, len(lengths) + 1):
        even = max(max(lengths), shared + math.ceil(own_tokens / count))
        if cost(count, filled_up(even)) >= least:
            continue
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(shared, place) for place in range(count)]
        for i in longest_first:
            length, place = filled[0]
            rows[place].append(i)
            heapreplace(filled, (length + lengths[i] - shared, place))
        own = cost(count, filled_up(max(filled)[0]))
        if own < least:
            found, least = rows, own
    return found


def filled_up(length: int) -> int:
    """The length of a row of so many tokens."""
    return -(-length // SPAN) * SPAN


class Packing:
    """What a backbone is given with rows of several sequences.

    Before the first of them, sequences go through it in both ways: a model that answers otherwise when packed gets
    none.

    Attributes:
        refused: why it takes no such rows, or "".
        proven: whether sequences went through it in both ways.
    """

    def __init__(self, backbone: nn.Module):
        self.config, self.proven = backbone.config.get_text_config(), False
        self.refused = self._refusal(backbone)

    def _refusal(self, backbone: nn.Module) -> str:
        if (kind := self.config._attn_implementation) not in MASKED:
            return f"attention by {kind} takes no mask of pairs"
        if others := sorted(set(getattr(self.config, "layer_types", None) or ()) - set(ATTENTION)):
            return f"its layers mix tokens by {', '.join(others)}"
        if "position_ids" not in signature(backbone.forward).parameters:
            return "its tokens take no positions"
        return ""

    def inputs(self, packed: Packed, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the backbone's forward.

        Args:
            dtype: that attention computes in.
        """
        return {"input_ids": packed.ids_PL, "position_ids": packed.positions_PL,
                "attention_mask": self._mask(packed, dtype)}  # fmt: skip

    def _mask(self, packed: Packed, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """What is added to the scores of attention, for each kind of layer where there are several."""
        kinds = set(getattr(self.config, "layer_types", None) or ())
        window = getattr(self.config, "sliding_window", None)
        windows = {"full_attention": None, "sliding_attention": window}
        if len(kinds) > 1:
            return {kind: _added(packed.visible(windows[kind]), dtype) for kind in kinds}
        return _added(packed.visible(windows[kinds.pop()] if kinds else window), dtype)

    @torch.no_grad()
    def prove(self, states: Callable[..., Tensor], sequences: list[list[int]], backbone: nn.Module) -> None:
        """Compare the states of sequences, packed and each alone.

        Args:
            states: the backbone's last hidden states for arguments of its forward.
        """
        self.proven, device, training = True, backbone.device, backbone.training
        backbone.eval()
        try:
            packed = pack([sequences, sequences[:1]], device, rows=[[0, 1]])
            packed_LH = states(**self.inputs(packed, computed_in(backbone)))[0]
            for index_T, ids in zip(packed.index_BT, [*sequences, sequences[0]], strict=True):
                ids_1T = torch.tensor([ids], device=device)
                alone_TH = states(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))[0].float()
                off_TH = packed_LH[index_T[: len(ids)]].float() - alone_TH
                difference = (off_TH.norm(dim=1) / alone_TH.norm(dim=1)).max().item()
                if not difference < CLOSE:
                    self.refused = f"its hidden states are others when packed (by {difference:.1%})"
        except RuntimeError as error:  # of a kernel that takes no such mask
            self.refused = first_line(error)
        finally:
            backbone.train(training)


def left_pad(sequences: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions, (B, T) each; padding on the left aligns the ends."""
    T = max(map(len, sequences))
    ids_BT = torch.tensor([[pad_id] * (T - len(s)) + s for s in sequences], device=device)
    mask_BT = torch.tensor([[0] * (T - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0)


def right_pad(sequences: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T) each, padded on the right."""
    T = max(map(len, sequences))
    ids_BT = torch.tensor([s + [pad_id] * (T - len(s)) for s in sequences], device=device)
    return ids_BT, torch.tensor([[1] * len(s) + [0] * (T - len(s)) for s in sequences], device=device)


def count_shared(sequences: list[list[int]]) -> int:
    """Tokens with which all of the sequences begin."""
    low, high = min(sequences), max(sequences)  # what these two share, all that lie between them share
    return next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def find_stems(
    sequences: list[list[int]], least: int, most: int, tokens: float = math.inf
) -> tuple[list[list[int]], list[int]]:
    """Beginnings ("stems"), and for each sequence which of them is its; at least one token is left of each sequence.

    Sorted, sequences with a common beginning stand side by side. Of all ways to part them into runs, each with what
    all of the run share as its stem, this is the one that saves most tokens.

    Args:
        least: tokens of the stem of several sequences.
        most: sequences of a stem.
        tokens: that a stem and what is left of its sequences have together, where they are more than two.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    ordered = [sequences[i] for i in order]
    common = [0, *(min(count_shared([a, b]), len(a) - 1, len(b) - 1) for a, b in pairwise(ordered))]
    best = [(0, 0)]  # for the first n: tokens saved, and where their last run starts
    for end in range(1, len(ordered) + 1):
        found, width, length = [(best[-1][0], end - 1)], math.inf, len(ordered[end - 1])
        for start in range(end - 2, max(end - most, 0) - 1, -1):
            width, length = min(width, common[start + 1]), length + len(ordered[start])
            saved = (end - start - 1) * width
            if width < least or (length - saved > tokens and end - start > 2):
                break
            found.append((best[start][0] + saved, start))
        best.append(max(found))
    beginnings, member, end = [], [0] * len(order), len(order)
    while end:
        start = best[end][1]
        for i in order[start:end]:
            member[i] = len(beginnings)
        beginnings.append(ordered[start][: min(common[start + 1 : end], default=len(ordered[start]) - 1)])
        end = start
    return beginnings, member


def backbone_of(model: nn.Module) -> nn.Module:
    """What a model, with a LoRA or without, has below its head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def allow(model: nn.Module) -> Packing:
    """Let `inference` send sequences through this model as rows of several."""
    backbone = backbone_of(model)
    if not hasattr(backbone, "packing"):
        backbone.packing = Packing(backbone)
    return backbone.packing


def computed_in(backbone: nn.Module) -> torch.dtype:
    device = backbone.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else backbone.dtype


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen. SDPA would make it of a mask of booleans, and keep it, once for each layer."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)
