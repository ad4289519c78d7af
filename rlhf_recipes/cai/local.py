"""A model in this process as generator and judge: batches of like length, shared beginnings computed once.

Shapes: B requests of a batch, T tokens, V vocabulary.

Few-shot examples stand at the start of every request of a step, a pair's conversation and replies before each of its
questions: such a beginning ("stem") goes through the model once, and its keys and values are copied to what continues
it, which may be a longer stem. Batches depend on the requests of a step and on the device alone, not on which of them
are answered already, so that a continued run rounds as an uninterrupted one, nor on the processes that share them.
"""

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TopPLogitsWarper
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf_recipes import memory, models, modules, progress, ranks
from rlhf_recipes.cai.backend import THOUGHT, Answer, Message, Request
from rlhf_recipes.data.template import as_taken, render
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.errors import Refusal
from rlhf_recipes.inference import batches_in_one, left_pad, stop_ids
from rlhf_recipes.packing import count_shared, find_stems
from rlhf_recipes.references import ModelRef
from rlhf_recipes.sampling import Draws, float32_head, in_place_of

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of one batch, completions and padding included: keys and values of so many are in memory at a time. On a GPU
# both are for each of `inference.batches_in_one`.
BATCH_TOKENS = 16_384
BATCH_ROWS = 64
# A stem is worth a forward pass of its own where so many tokens are shared, and saved.
STEM_TOKENS = 16
# Keys and values are moved to a larger buffer once in so many tokens.
ROOM = 64


def load(model: "DictConfig", quantization: "DictConfig", adapter: ModelRef | None) -> "Local":
    """The base in the asked quantization with the run's LoRA added, ready to generate.

    On a CPU the quantized weights are unpacked once instead of for every token, to the very numbers that they stand
    for in the compute dtype, and the LoRA is added to them, rounded to it; a GPU keeps them packed, and the LoRA
    beside them.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    modules.refuse_other_model(model)
    if adapter:
        models.check_named_bases(model, [adapter.adapter])
        models.check_templates(model, [adapter.adapter])
    base = models.load_base(model, quantization, AutoModelForCausalLM)
    packed = getattr(base, "is_quantized", False)
    if packed and base.device.type == "cpu":
        base, packed = base.dequantize(), False
    name = model.id
    if adapter:
        base = PeftModel.from_pretrained(base, str(adapter.adapter))
        if not packed:
            base = base.merge_and_unload()
        name = f"{model.id} + {adapter.reference} ({adapter.sha256[:12]})"
    return Local(base.eval(), models.load_tokenizer(model), name)


@dataclass
class _Row:
    """What is computed of one request: its tokens, and for a choice those of each option after them."""

    request: Request
    ids: list[int]
    tails: list[list[int]]


class Local:
    """`backend.Backend` on a loaded causal language model.

    Args:
        model: in evaluation mode.
        name: model and adapter, for provenance.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.stops = stop_ids(model.generation_config, tokenizer)
        # Padding behind a stem takes places of a sliding window, so stems are for what fits into it, padding included.
        # A layer without attention (a recurrent state) cannot mask padding: its window of 0 allows no stem.
        self.window = min(
            math.inf if type(layer) is DynamicLayer else getattr(layer, "sliding_window", 0)
            for layer in DynamicCache(config=model.config).layers
        )

    def answer(
        self, requests: list[Request], known: Container[str], what: str
    ) -> Iterator[list[tuple[Request, Answer]]]:
        asked, _ = neutralise([{"prompt": request.messages} for request in requests], self.tokenizer)
        rows = [self._encode(r, each["prompt"]) for r, each in zip(requests, asked, strict=True)]
        line = progress.Line(what, len(rows), sum(request.key in known for request in requests))
        done = line.first
        todo = [
            batch
            for batch in _batches(rows, batches_in_one(self.model))
            if any(row.request.key not in known for row in batch)
        ]
        for number, own in ranks.share(todo):
            for place, answers in sorted(dict(ranks.gather([(number, self._answers(own))])).items()):
                yield [(row.request, answer) for row, answer in zip(todo[place], answers, strict=True)]
                done += sum(row.request.key not in known for row in todo[place])
            line.update(done)
            memory.return_freed_memory()
        vars(self).pop("_exact", None)  # a CPU's copy of the weights

    def _answers(self, batch: list["_Row"]) -> list[Answer]:
        with torch.inference_mode(), torch.autocast(self.model.device.type, enabled=False):
            answers = self._choose(batch) if batch[0].tails else self._generate(batch)
        if any(THOUGHT.search(answer.get("text", "")) for answer in answers):
            raise Refusal(
                f"{self.name}: thinks aloud before it answers (<think>). Set model.chat_template_kwargs."
                "enable_thinking=false (of a judge that is another model: judge.chat_template_kwargs), or choose "
                "a model that does not."
            )
        return answers

    def _encode(self, request: Request, messages: list[Message]) -> _Row:
        messages = as_taken(self.tokenizer, messages)
        text = render(self.tokenizer, messages, add_generation_prompt=True, tokenize=False)
        whole = [self._ids(text + request.prefix + option) for option in request.options]
        if not whole:
            return _Row(request, self._ids(text + request.prefix), [])
        # First tokens that all options share tell nothing: they belong to the question. One token at least is left.
        shared = min(count_shared(whole), *(len(ids) - 1 for ids in whole))
        return _Row(request, whole[0][:shared], [ids[shared:] for ids in whole])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _choose(self, batch: list[_Row]) -> list[Answer]:
        """log P(option | question) in nats: the sum over its tokens, most often one, each given all before it."""
        places: dict[tuple[int, ...], int] = {}  # of what comes before each of these tokens
        for row in batch:
            for tail in row.tails:
                for k in range(len(tail)):
                    places.setdefault((*row.ids, *tail[:k]), len(places))
        with in_place_of(self._head, self._exact):
            logps_BV = self._start([list(ids) for ids in places], 0).logits.log_softmax(-1)

        def logp(ids: list[int], tail: list[int]) -> float:
            return sum(logps_BV[places[(*ids, *tail[:k])], token].item() for k, token in enumerate(tail))

        return [
            {"logps": [logp(row.ids, tail) for tail in row.tails], "prompt_tokens": len(row.ids), "tokens": 0}
            for row in batch
        ]

    def _generate(self, batch: list[_Row]) -> list[Answer]:
        """A token for every row at a time; a row that has ended leaves the batch."""
        first = batch[0].request
        state = self._start([row.ids for row in batch], first.max_new_tokens)
        draws = Draws([row.request.seed for row in batch], self.model.device, first.max_new_tokens)
        nucleus = TopPLogitsWarper(first.top_p) if first.top_p < 1 else lambda _, logits_BV: logits_BV  # it sorts V
        tokens: list[list[int]] = [[] for _ in batch]
        active = list(range(len(batch)))
        while True:
            if first.temperature:
                logits_BV = nucleus(None, state.logits / first.temperature)
                chosen_B1 = draws.draw(logits_BV, active)
            else:
                chosen_B1 = state.logits.argmax(1, keepdim=True)
            going = []
            for place, (i, token) in enumerate(zip(active, chosen_B1[:, 0].tolist(), strict=True)):
                tokens[i].append(token)
                if token not in self.stops and len(tokens[i]) < first.max_new_tokens:
                    going.append(place)
            if not going:
                break
            if len(going) < len(active):
                # The last rows take the places of those that leave; all others stay where they are.
                last = [place for place in going if place >= len(going)]
                going = [place if place in going else last.pop() for place in range(len(going))]
                state.keep(going)
                active, chosen_B1 = [active[place] for place in going], chosen_B1[going]
            self._step(state, chosen_B1, torch.ones_like(chosen_B1))
        return [
            {
                "text": self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "finished": ids[-1] in self.stops,
                "prompt_tokens": len(row.ids),
                "tokens": len(ids),
            }
            for row, ids in zip(batch, tokens, strict=True)
        ]

    @property
    def _head(self) -> torch.nn.Module:
        head = self.model.get_output_embeddings()
        return getattr(head, "base_layer", head)  # a LoRA beside it keeps what it adds

    @cached_property
    def _exact(self) -> Callable[[Tensor], Tensor]:
        """The head for many choices: the difference of two judgements is often less than bfloat16 tells apart."""
        return float32_head(self._head)

    def _start(self, sequences: list[list[int]], room: int) -> "_State":
        """Stems, then what follows them, with logits of the last position of each sequence; `room` tokens are to
        come."""
        passes = _passes(sequences)
        if sum(max(map(len, parts)) for parts, _ in passes) + room > self.window:
            passes = [(sequences, [])]
        state = _State(self.model.config, len(passes[0][0]), self.model.device)
        for parts, member in passes:
            if member:
                state.keep(member)
            self._step(state, *left_pad(parts, self.tokenizer.pad_token_id, self.model.device)[:2])
        return state

    def _step(self, state: "_State", ids_BT: Tensor, mask_BT: Tensor) -> None:
        state.mask_BT = torch.cat([state.mask_BT, mask_BT], 1)
        output = self.model(
            input_ids=ids_BT,
            attention_mask=state.mask_BT,
            position_ids=(state.mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.logits = output.logits[:, -1].float()


class _State:
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


def _batches(rows: list[_Row], times: int) -> Iterator[list[_Row]]:
    """Rows that are generated alike, of like length, the longest first (an out-of-memory shows at once); of choices,
    those of one stem side by side."""

    def settings(row: _Row) -> tuple:
        return row.request.max_new_tokens, row.request.temperature, row.request.top_p

    for _, alike in groupby(sorted(rows, key=settings, reverse=True), key=settings):
        order = sorted(alike, key=lambda row: (row.ids, row.request.key))
        member = _stems([row.ids for row in order])[1] if order[0].tails else range(len(order))
        groups: dict[int, list[_Row]] = {}
        for g, row in zip(member, order, strict=True):
            groups.setdefault(g, []).append(row)
        by_length = sorted(groups.values(), key=lambda group: -max(len(row.ids) for row in group))
        order = [row for group in by_length for row in group]
        while order:
            length, size = 0, 0
            for row in order[: times * BATCH_ROWS]:
                length = max(length, len(row.ids) + row.request.max_new_tokens)
                if size and (size + 1) * length > times * BATCH_TOKENS:
                    break
                size += 1
            yield order[:size]
            order = order[size:]


def _passes(sequences: list[list[int]]) -> list[tuple[list[list[int]], list[int]]]:
    """What goes through the model one after another: parts of the sequences, and for each part the row of the pass
    before that it continues (none in the first)."""
    stems, member = _stems(sequences)
    rests = [ids[len(stems[g]) :] for ids, g in zip(sequences, member, strict=True)]
    padded, stem, rest = (len(parts) * max(map(len, parts)) for parts in (sequences, stems, rests))
    if len(stems) < len(sequences) and padded - stem - rest >= STEM_TOKENS:
        return [*_passes(stems), (rests, member)]
    return [(sequences, [])]


def _stems(sequences: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    return find_stems(sequences, STEM_TOKENS, BATCH_ROWS)
