"""The memory of a training by role, predicted from shapes alone: no weight is read.

The peak is what stays (libraries, base, adapters, optimizer) and the largest of what comes and goes: the loading, a
forward and backward pass, the held-out measurements, and PPO's rollout. A decoder layer keeps for each token

    10 d h + 8 d + 8 f h + 4 k h + 2 m r h + 4 a    bytes, h = 1 in bfloat16, 2 in float32

with hidden size d, feed-forward width f, width k of keys and of values, LoRA of rank r on m linear layers, and a
attention heads: the norms' inputs in float32 (8 d) and outputs, queries and attention's output (10 d with the layer's
own input), keys and values, four vectors of the feed-forward part, and what LoRA's A gives. Trainers that keep the
residual stream in float32 (TRL's own ORPO and CPO on a quantized base) add 20 d. With gradient checkpointing only the
layer's input is kept, and one layer is computed again. These counts are those of every allocation of training steps on
models of eleven shapes; whole runs are compared by tests/benchmarks/preflight_predicts.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import config, methods, model_files, models, references
from rlhf_recipes.errors import Refusal

GIB = 2**30
# TRL's tile of logits (trl.kernels.chunked_logprob): tokens, and entries of the vocabulary; those with `fast_forward`,
# and in ppo.
TILE_TOKENS, TILE_ENTRIES, SMALL_TILE_ENTRIES = 4096, 32768, 8192
# Bytes for a number of the tile beside its buffer: a GPU's kernel works in place; elsewhere seven float32 copies and a
# mask come and go.
TILE_BYTES = {"cuda": 0, "cpu": 29}
# Bytes for each logit of a forward pass without gradients, and of sampling, which copies, draws and masks.
MEASURED_BYTES, SAMPLED_BYTES = 10, 24
# Bytes of optimizer state for each trained number; those not named keep two float32 moments.
STATE_BYTES = {"8bit": 2.0, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0}
# Code that is read from disk when it first runs, tokenizer and rows: bytes beside the libraries.
STARTED = 0.13 * GIB
# oneDNN compiles bfloat16 products for every shape of a batch and keeps 1,024 of them: bytes for a shape, shapes kept.
KERNEL_BYTES, KERNELS_KEPT = 0.02 * GIB, 50
# What a process takes of a GPU beside its tensors: CUDA's context with the kernels of torch and bitsandbytes, and the
# workspaces of cuBLAS.
CONTEXT = 0.6 * GIB
# What the heap takes for a byte of activations and logits: a buffer rarely fits the hole that another one left. The
# peak of a GPU counts allocated bytes alone.
HEAP = {"cuda": 1.0, "cpu": 1.45}


@dataclass(frozen=True)
class Backbone:
    """What memory depends on of a recipe's model, its quantization and its LoRA.

    Attributes:
        config: the model's.
        stored: bytes of the weights as they lie in their file.
        weights: bytes of the frozen base in memory.
        packed: those of them that are quantized.
        largest: bytes of the largest weight that is quantized, as it was; 0 where none is.
        linear: numbers in the layers that carry LoRA.
        lora: numbers in one adapter, score head included.
        kept: bytes that a decoder layer keeps for each token.
        item: bytes of a number in the compute dtype.
        logit_bytes: of its method.
        wide: whether the residual stream is float32.
        fast: whether `fast_forward` is on.
    """

    recipe: str
    config: Any
    stored: float
    weights: float
    packed: float
    largest: int
    linear: int
    lora: int
    kept: float
    item: int
    logit_bytes: int
    wide: bool
    fast: bool

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values, of a layer."""
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return size * (getattr(self.config, "num_key_value_heads", None) or heads)


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch: `sequences` (pairs are two) of `tokens` each.

    Attributes:
        shapes: lengths to which the micro-batches of the run are padded, how many different ones.
        completion: of PPO, how many of the tokens are sampled; where answers alone are scored, how many the longest
            has; 0: not known.
        prompts: of PPO, in a rollout.
        rows: in which sequences lie together, how many go through the model; 0: each is a row.
        row_tokens: of each of them.
    """

    sequences: int
    tokens: int
    shapes: int = 1
    completion: int = 0
    prompts: int = 0
    rows: int = 0
    row_tokens: int = 0

    @property
    def forward_tokens(self) -> int:
        """What goes through the model at once, padding included."""
        return self.rows * self.row_tokens if self.rows else self.sequences * self.tokens

    def halved(self) -> "Batch":
        """Of half as many sequences."""
        if self.rows > 1:
            return replace(self, sequences=self.sequences // 2, rows=-(-self.rows // 2))
        return replace(self, sequences=self.sequences // 2, row_tokens=self.row_tokens // 2)

    def shortened(self) -> "Batch":
        """Of sequences half as long."""
        return replace(self, tokens=self.tokens // 2, row_tokens=self.row_tokens // 2)


def backbone(cfg: DictConfig, recipe: str) -> Backbone:
    """Build the model without its weights.

    Raises:
        Refusal: the model cannot be found, or its config does not say what these counts need.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    shape = model_files.load_config(cfg.model)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(getattr(shape, name, None), int):
            raise Refusal(f"model.id={cfg.model.id}: its config has no {name}, so its memory cannot be predicted.")
    dtype, scores = models.compute_dtype(cfg.model), recipe == "reward"
    auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    shape.num_labels = 1
    with torch.device("meta"):
        model = auto.from_config(shape, dtype=dtype, trust_remote_code=cfg.model.trust_remote_code)
    stored = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    quantization = models.build_quantization(cfg.quantization, dtype)
    packed, unpacked, largest = _quantized(model, quantization)
    layers, lora, rank = _adapted(model, cfg, "SEQ_CLS" if scores else "CAUSAL_LM")
    logit_bytes = methods.of(recipe, cfg.trainer._target_).logit_bytes
    wide = logit_bytes > 0 and quantization is not None
    # TRL's own ORPO and CPO keep in float32 what is not quantized: embeddings, head, norms.
    unquantized = (stored - unpacked) * (4 / dtype.itemsize if wide else 1)
    d, f, half = shape.hidden_size, shape.intermediate_size, dtype.itemsize // 2
    found = Backbone(
        recipe=recipe,
        config=shape,
        stored=stored,
        weights=unquantized + packed,
        packed=packed,
        largest=largest,
        linear=sum(layer.weight.numel() for layer in layers),
        lora=lora,
        kept=0,
        item=dtype.itemsize,
        logit_bytes=logit_bytes,
        wide=wide,
        fast=bool(cfg.get("fast_forward")) and not methods.of(recipe).samples and not logit_bytes,
    )
    each = len(layers) / shape.num_hidden_layers
    kept = half * (10 * d + 8 * f + 4 * found.keys + 2 * each * rank) + 8 * d + 4 * shape.num_attention_heads
    return replace(found, kept=kept + 20 * d * wide)


def _quantized(model, quantization) -> tuple[float, int, int]:
    """Bytes of the weights that are quantized, as they then are and as they were, and of the largest as it was."""
    import torch

    if quantization is None:
        return 0.0, 0, 0
    skipped = set(quantization.llm_int8_skip_modules)
    layers = [
        m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not skipped & {*name.split(".")}
    ]
    numbers = sum(layer.weight.numel() for layer in layers)
    if quantization.load_in_8bit:
        packed = numbers + 4 * sum(layer.out_features for layer in layers)  # a float32 scale for each row
    else:  # a scale for 64 numbers: float32, or 8 bits and a float32 for 256 of them (arXiv:2305.14314, section 3)
        packed = numbers / 2 + numbers / 64 * (1 + 4 / 256 if quantization.bnb_4bit_use_double_quant else 4)
    before = [layer.weight.nbytes for layer in layers]
    return packed, sum(before), max(before, default=0)


def _adapted(model, cfg: DictConfig, task_type: str) -> tuple[list, int, int]:
    """The linear layers that get LoRA, the numbers of the adapter, score head included, and its rank."""
    import torch
    from peft import PeftConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    if cfg.model.adapter and Path(cfg.model.adapter).exists():  # else an earlier stage of the pipeline makes it
        lora = PeftConfig.from_pretrained(str(references.find(cfg.model.adapter, "model.adapter").adapter))
        lora.task_type, lora.inference_mode = task_type, False
    else:
        lora = config.build(cfg.lora, "lora", task_type=task_type)
    with torch.device("meta"):
        adapted = get_peft_model(model, lora, low_cpu_mem_usage=True)
    layers = [m.get_base_layer() for m in adapted.modules() if isinstance(m, LoraLayer)]
    return layers, sum(p.numel() for p in adapted.parameters() if p.requires_grad), lora.r


def predict(
    cfg: DictConfig, args, base: Backbone, batch: Batch, libraries: float, rewards: int = 0, cards: int = 1
) -> dict:
    """The peak and what it is made of.

    Args:
        args: the built `trainer`.
        batch: the largest micro-batch that the data have.
        libraries: bytes of the process before it loads a model.
        rewards: reward models that are adapters on the policy's base.
        cards: on how many GPUs the base and what is trained lie in parts (FSDP2); the peak is that of each.

    Returns:
        `peak_gib`; `where`, cpu or cuda; `when`, the phase of the peak; `roles`, role -> GiB at the peak; `phases`,
        phase -> GiB.
    """
    import torch

    recipe, where = base.recipe, "cuda" if torch.cuda.is_available() else "cpu"
    # On a CPU the file that a model was read from stays mapped, and counts as the process's.
    always = (
        {"libraries": libraries + STARTED, "base": base.stored + base.packed}
        if where == "cpu"
        else {"context": CONTEXT, "base": _part(base, cards)}
    )
    if where == "cpu" and base.item == 2:
        always["kernels"] = KERNEL_BYTES * min(batch.shapes, KERNELS_KEPT)
    trained = base.lora * (1 + (getattr(args, "value", "") == "separate")) / cards
    always["LoRA"] = 4.0 * trained
    always["optimizer"] = state_bytes(args.optim) * trained
    if cfg.model.adapter and methods.of(recipe).reference:
        always["reference"] = 4.0 * base.lora / cards
    if methods.of(recipe).samples:
        always["reward"] = 4.0 * base.lora * rewards
    phases = {
        # On a GPU weights are quantized one by one: the largest, and what the quantization makes of it.
        "loading": {"base": 2.0 * base.largest if where == "cuda" and cards == 1 else 0.0},
        "held-out": _held_out(base, batch, where),
        "step": {"gradients": 4.0 * trained, **_step(base, batch, where, args)},
    }
    if methods.of(recipe).samples:
        phases["rollout"] = _rollout(base, batch, where, args)
        if where == "cpu":  # a process gives back what it freed when the step is over, not before
            phases["step"]["merged weights"] = phases["rollout"]["merged weights"]
    for parts in phases.values():
        for role in parts.keys() & {"activations", "logits"}:
            parts[role] *= HEAP[where]
    totals = {phase: sum(always.values()) + sum(parts.values()) for phase, parts in phases.items()}
    when = max(totals, key=totals.__getitem__)
    roles = {role: always.get(role, 0) + phases[when].get(role, 0) for role in [*always, *phases[when]]}
    return {
        "peak_gib": totals[when] / GIB,
        "where": where,
        "when": when,
        "roles": {role: size / GIB for role, size in roles.items() if size},
        "phases": {phase: size / GIB for phase, size in totals.items()},
    }


def _part(base: Backbone, cards: int) -> float:
    """Bytes of the base on one of the cards that share it: its part, two layers that are put together at a time, and
    embeddings and head, which are whole at the end of a forward pass."""
    if cards == 1:
        return base.weights
    shape = base.config
    ends = shape.vocab_size * shape.hidden_size * base.item * (1 if shape.tie_word_embeddings else 2)
    return base.weights / cards + 2 * (base.weights - ends) / shape.num_hidden_layers + ends


def _step(base: Backbone, batch: Batch, where: str, args) -> dict[str, float]:
    """A forward and backward pass over the largest micro-batch."""
    tokens, layers = batch.forward_tokens, base.config.num_hidden_layers
    if base.logit_bytes:
        logits = base.logit_bytes * tokens * base.config.vocab_size
    elif base.recipe == "reward":
        logits = 0.0
    else:
        predicted = batch.sequences * (min(batch.completion, batch.tokens) or batch.tokens)
        buffer = SMALL_TILE_ENTRIES if base.fast or base.recipe == "ppo" else TILE_ENTRIES
        used = min(buffer, base.config.vocab_size)
        if base.fast:  # its tile is no wider than the vocabulary
            buffer = used
        item = 4 if base.recipe == "ppo" else base.item  # its logits are float32
        logits = min(predicted, TILE_TOKENS) * (buffer * item + used * TILE_BYTES[where])
    mask = batch.rows * batch.row_tokens**2 * base.item
    if not args.gradient_checkpointing:
        return {"activations": tokens * (layers + 0.5) * base.kept + mask, "logits": logits}
    inputs = layers * base.config.hidden_size * base.item * (1 + base.wide)
    again = 1.2 * base.kept  # a layer is computed again when the logits are gone
    if tokens * again > logits:
        return {"activations": tokens * (inputs + again) + mask}
    return {"activations": tokens * inputs + mask, "logits": logits}


def _held_out(base: Backbone, batch: Batch, where: str) -> dict[str, float]:
    """A forward pass without gradients: one layer's activations, and logits up to what evaluation.measure allows."""
    from rlhf_recipes import inference

    times = inference.batches_beside(base.weights) if where == "cuda" else 1
    if base.recipe == "reward":
        return {"activations": times * inference.BATCH_TOKENS * base.kept}
    if methods.of(base.recipe).samples:  # it answers, as in a rollout
        return {"activations": batch.sequences * batch.tokens * base.kept}
    row = 4 * batch.tokens * base.config.vocab_size
    limit = inference.LOGITS_BYTES_ON_CPU if where == "cpu" else times * inference.LOGITS_BYTES
    rows = max(1, min(limit // row, times * inference.BATCH_TOKENS // batch.tokens))
    return {"activations": rows * batch.tokens * base.kept, "logits": rows * row / 4 * MEASURED_BYTES}


def _rollout(base: Backbone, batch: Batch, where: str, args) -> dict[str, float]:
    """Sampling: the cache of keys and values, the weights merged for it, and the last position's logits."""
    prompts = min(batch.prompts, args.local_rollout_forward_batch_size)
    merge = getattr(args, "merge_to_sample", None)
    merged = merge if merge is not None else where == "cpu"
    cached = 2 * base.config.num_hidden_layers * base.keys * base.item
    return {
        "KV cache": prompts * batch.tokens * cached,
        "merged weights": base.linear * base.item * merged,
        "float32 head": 4.0 * base.config.vocab_size * base.config.hidden_size * (where == "cpu" and base.item == 2),
        "activations": prompts * (batch.tokens - batch.completion) * base.kept,
        "logits": prompts * base.config.vocab_size * SAMPLED_BYTES,
    }


def state_bytes(optim: str) -> float:
    return next((size for name, size in STATE_BYTES.items() if name in optim), 8.0)
