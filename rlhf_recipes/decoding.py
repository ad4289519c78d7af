"""Decoding: the next token of all rows at a time, from the distribution that the model itself gives.

What generation_config.json says of penalties, suppressed tokens or least lengths is not looked at: samples of such a
distribution would not estimate a KL of the model's, nor its greedy answers be its own. A beginning that several rows
share ("stem") goes through the model once, and its keys and values are copied to what continues it, which may be a
longer stem. A row that has ended leaves the batch.

Shapes: B rows, T tokens, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf_recipes.packing import find_stems, left_pad

# A stem is worth a forward pass of its own where so many tokens are shared, and saved.
STEM_TOKENS = 16
# Of so many neighbours, sorted, a stem is looked for.
STEM_ROWS = 64
# Keys and values are moved to a larger buffer once in so many tokens.
ROOM = 64


class Decoder:
    """Forward passes of a causal language model that keep keys and values.

    Args:
        model: in evaluation mode, with adapters or without.
        pad_id: fills rows up on the left; nothing sees it.
    """

    def __init__(self, model, pad_id: int):
        self.model, self.pad_id = model, pad_id
        self.cache_keyword = cache_keyword(model)
        # Padding behind a stem takes places of a sliding window, so stems are for what fits into it, padding included.
        # A layer without attention (a recurrent state) cannot mask padding: its window of 0 allows no stem.
        self.window = min(
            math.inf if type(layer) is DynamicLayer else getattr(layer, "sliding_window", 0)
            for layer in DynamicCache(config=model.config).layers
        )

    def decode(
        self, prompts: list[list[int]], stops: list[int], max_new_tokens: int,
        choose: Callable[[Tensor, list[int]], Tensor],
    ) -> list[list[int]]:  # fmt: skip
        """What follows each of the prompts.

        Args:
            prompts: token ids.
            stops: every token that ends a row; it is the row's last.
            choose: the next tokens, (B,), of rows that go on, given their float32 logits (B, V) and the places of
                these rows among the prompts.
        """
        state = self.start(prompts, max_new_tokens)
        tokens: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        while True:
            chosen_B = choose(state.logits, active)
            going = []
            for place, (i, token) in enumerate(zip(active, chosen_B.tolist(), strict=True)):
                tokens[i].append(token)
                if token not in stops and len(tokens[i]) < max_new_tokens:
                    going.append(place)
            if not going:
                return tokens
            if len(going) < len(active):
                # The last rows take the places of those that leave; all others stay where they are.
                last = [place for place in going if place >= len(going)]
                going = [place if place in going else last.pop() for place in range(len(going))]
                state.keep(going)
                active, chosen_B = [active[place] for place in going], chosen_B[going]
            self.step(state, chosen_B[:, None], torch.ones_like(chosen_B[:, None]))

    def start(self, sequences: list[list[int]], room: int = 0) -> "State":
        """Stems, then what follows them, with logits of the last position of each sequence; `room` tokens are to
        come."""
        passes = _passes(sequences)
        if sum(max(map(len, parts)) for parts, _ in passes) + room > self.window:
            passes = [(sequences, [])]
        state = State(self.model.config, len(passes[0][0]), self.model.device)
        for parts, member in passes:
            if member:
                state.keep(member)
            self.step(state, *left_pad(parts, self.pad_id, self.model.device)[:2])
        return state

    def step(self, state: "State", ids_BT: Tensor, mask_BT: Tensor) -> None:
        state.mask_BT = torch.cat([state.mask_BT, mask_BT], 1)
        output = self.model(
            input_ids=ids_BT,
            attention_mask=state.mask_BT,
            position_ids=(state.mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_keyword: state.cache},
        )
        state.logits = output.logits[:, -1].float()


def cache_keyword(model) -> str:
    """What the model's forward calls keys and values: `cache` from transformers 5.24 on, which warns of the name
    before; a model of other code may have the one or the other."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(type(base).forward).parameters else "past_key_values"


class State:
    """What a batch has computed: keys and values, which of their places count (mask_BT), the last logits (B, V)."""

    def __init__(self, config, rows: int, device):
        self.cache = DynamicCache(config=config)
        self.cache.layers = [_Layer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.mask_BT = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.logits = None

    def keep(self, rows: list[int]) -> None:
        """Rows in this order; one may be named several times, which copies it."""
        index = torch.tensor(rows, device=self.mask_BT.device)
        self.cache.batch_select_indices(index)
        self.mask_BT = self.mask_BT[index]


class _Layer(DynamicLayer):
    """Keys and values, (B, heads, T, width) each, are the start of buffers with room for more tokens, and a row that
    leaves makes room for another: for a token nothing is copied that was there before it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        end = start + key_states.shape[2]
        for i, new in enumerate((key_states, value_states)):
            if end > self.buffers[i].shape[2]:
                grown = new.new_empty(*new.shape[:2], end + ROOM, new.shape[3])
                grown[:, :, :start] = self.buffers[i][:, :, :start]
                self.buffers[i] = grown
            self.buffers[i][:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        end, count = self.get_seq_length(), len(indices)
        if not end:
            return
        if count > len(self.keys):
            self.buffers = [buffer[indices] for buffer in self.buffers]
        else:
            moved = (indices != torch.arange(count, device=indices.device)).nonzero()[:, 0]
            for buffer in self.buffers:
                buffer[moved] = buffer[indices[moved]]
            self.buffers = [buffer[:count] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


def _passes(sequences: list[list[int]]) -> list[tuple[list[list[int]], list[int]]]:
    """What goes through the model one after another: parts of the sequences, and for each part the row of the pass
    before that it continues (none in the first)."""
    stems, member = find_stems(sequences, STEM_TOKENS, STEM_ROWS)
    rests = [ids[len(stems[g]) :] for ids, g in zip(sequences, member, strict=True)]
    padded, stem, rest = (len(parts) * max(map(len, parts)) for parts in (sequences, stems, rests))
    if len(stems) < len(sequences) and padded - stem - rest >= STEM_TOKENS:
        return [*_passes(stems), (rests, member)]
    return [(sequences, [])]
