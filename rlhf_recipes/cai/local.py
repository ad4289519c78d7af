"""A model in this process as generator and judge: batches of like length, shared beginnings computed once.

Shapes: B requests of a batch, T tokens, V vocabulary.

Few-shot examples stand at the start of every request of a step, a pair's conversation and replies before each of its
questions: such a beginning ("stem") goes through the model once, and its keys and values are copied to what continues
it, which may be a longer stem. Batches depend on the requests of a step and on the device alone, not on which of them
are answered already, so that a continued run rounds as an uninterrupted one, nor on the processes that share them.
"""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from rlhf_recipes import memory, models, modules, progress, ranks
from rlhf_recipes.cai.backend import THOUGHT, Answer, Message, Request
from rlhf_recipes.data.template import as_taken, render
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.decoding import STEM_ROWS, STEM_TOKENS, Decoder
from rlhf_recipes.errors import Refusal
from rlhf_recipes.inference import batches_in_one, stop_ids
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


def load(model: "DictConfig", quantization: "DictConfig", adapter: ModelRef | None) -> "Local":
    """The base in the asked quantization with the run's LoRA added, ready to generate.

    On a CPU the quantized weights are unpacked once instead of for every token, to the very numbers that they stand
    for in the compute dtype, and the LoRA is added to them, rounded to it; a GPU keeps them packed, and the LoRA
    beside them.
    """
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
        base = models.put_on(base, adapter.adapter, f"{adapter.key}={adapter.reference}")
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

    places = 0

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.stops = stop_ids(model.generation_config, tokenizer)
        self.decoder = Decoder(model, tokenizer.pad_token_id)

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
            logps_BV = self.decoder.start([list(ids) for ids in places]).logits.log_softmax(-1)

        def logp(ids: list[int], tail: list[int]) -> float:
            return sum(logps_BV[places[(*ids, *tail[:k])], token].item() for k, token in enumerate(tail))

        return [
            {"logps": [logp(row.ids, tail) for tail in row.tails], "prompt_tokens": len(row.ids), "tokens": 0}
            for row in batch
        ]

    def _generate(self, batch: list[_Row]) -> list[Answer]:
        first = batch[0].request
        draws = Draws([row.request.seed for row in batch], self.model.device, first.max_new_tokens)
        nucleus = TopPLogitsWarper(first.top_p) if first.top_p < 1 else lambda _, logits_BV: logits_BV  # it sorts V

        def choose(logits_BV: Tensor, rows: list[int]) -> Tensor:
            if not first.temperature:
                return logits_BV.argmax(1)
            return draws.draw(nucleus(None, logits_BV / first.temperature), rows)

        tokens = self.decoder.decode([row.ids for row in batch], self.stops, first.max_new_tokens, choose)
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


def _batches(rows: list[_Row], times: int) -> Iterator[list[_Row]]:
    """Rows that are generated alike, of like length, the longest first (an out-of-memory shows at once); of choices,
    those of one stem side by side."""

    def settings(row: _Row) -> tuple:
        return row.request.max_new_tokens, row.request.temperature, row.request.top_p

    for _, alike in groupby(sorted(rows, key=settings, reverse=True), key=settings):
        order = sorted(alike, key=lambda row: (row.ids, row.request.key))
        member = (
            find_stems([row.ids for row in order], STEM_TOKENS, STEM_ROWS)[1] if order[0].tails else range(len(order))
        )
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
