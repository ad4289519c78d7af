"""The forward pass of TRL's trainers of answers, without what nobody reads.

TRL's fused head scores, off a GPU, every position of a batch; a loss reads the answers'. Its batches are padded, and
its trainers of pairs compute the common start of the two answers twice; `packed_batches` does neither.

Shapes: B sequences, T tokens, N labels that count.
"""

import functools
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer import utils

from rlhf_recipes import packing
from rlhf_recipes.preference.packed_batches import PackedBatches

TILE = 8192  # words of the vocabulary
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def score_answers_alone(causal: nn.Module) -> None:
    """Put the positions alone through TRL's fused head whose label counts, in tiles of `TILE` words.

    TRL makes seven copies of a tile, of 32,768 words.

    Args:
        causal: a language model that TRL has given a fused head.
    """
    fused = causal.forward

    @functools.wraps(fused)
    def forward(*args, labels: Tensor | None = None, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head or labels is None:
            return fused(*args, labels=labels, fused_lm_head=fused_lm_head, **kwargs)
        labels_BT = labels[:, 1:]
        scored_BT = labels_BT != -100
        with _states_alone(causal, scored_BT):
            outputs = fused(*args, shift_labels=labels_BT[scored_BT][None], fused_lm_head=True, **kwargs)
        for name in PER_TOKEN:
            if (values_1N := outputs.get(name)) is not None:
                outputs[name] = values_1N.new_zeros(scored_BT.shape).masked_scatter(scored_BT, values_1N)
        return outputs

    causal.forward = forward


@contextmanager
def _states_alone(causal: nn.Module, scored_BT: Tensor):
    def leave_scored(module, args, output):
        output.last_hidden_state = output.last_hidden_state[:, :-1][scored_BT][None]
        return output

    hook, tile = causal.base_model.register_forward_hook(leave_scored), utils._CHUNKED_LOGPROB_CHUNK_SIZE
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(TILE, causal.config.get_text_config().vocab_size)
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = tile
        hook.remove()


def speed_up(trainer, wanted: bool) -> None:
    """Let a trainer score the answers alone, and compute no padding where that costs more, nor twice what pairs share.

    Args:
        trainer: of TRL, with a LoRA.
        wanted: `fast_forward` of the config; otherwise, and in TRL's own trainers of ORPO and SimPO, which build all
            logits, the forward stays TRL's.
    """
    _give_lengths(trainer)
    if not wanted or type(trainer).__module__.startswith("trl.experimental"):
        return
    model = trainer.model.get_base_model()
    packing.allow(model)  # where held-out rows are measured
    if not hasattr(model, "score"):  # a reward model has no words to score
        score_answers_alone(model)
    together = 2 if "chosen_ids" in trainer.train_dataset.column_names else 1
    trainer.add_callback(_Say(PackedBatches(model.base_model, together)))


def _give_lengths(trainer) -> None:
    """Tell `trainer.train_sampling_strategy=group_by_length` the tokens of both conversations of a pair; transformers
    finds those of a column `input_ids` alone."""
    args, columns = trainer.args, trainer.train_dataset.column_names
    sides = [column for column in ("chosen_ids", "rejected_ids") if column in columns]
    sides = sides or [column for column in ("chosen_input_ids", "rejected_input_ids") if column in columns]
    if args.train_sampling_strategy not in ("group_by_length", "batch_rebalance") or not sides:
        return

    def length(row: dict) -> dict[str, int]:
        prompt = len(row.get("prompt_ids") or ())  # stands before both
        return {args.length_column_name: sum(prompt + len(row[side]) for side in sides)}

    trainer.train_dataset, trainer.eval_dataset = (
        each.map(length) for each in (trainer.train_dataset, trainer.eval_dataset)
    )
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(args.length_column_name)


class _Say(TrainerCallback):
    """Which batches went through whole, when the training ends."""

    def __init__(self, packed: PackedBatches):
        self.packed = packed

    def on_train_end(self, args, state, control, **_):
        packed, whole = self.packed.batches["packed"], self.packed.batches["whole"]
        reason = self.packed.refused
        if self.packed.together > 1 and not reason:  # an answer by itself loses nothing by it
            reason = "the answers of their pairs share too little, or nothing"
        if whole and reason:
            print(f"fast_forward: {whole:,} of {packed + whole:,} batches went through whole: {reason}.", flush=True)
