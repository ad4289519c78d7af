"""A model that lies in parts, one on each card (FSDP2): what may train so, and what its ranks do together.

A launcher asks for it (conf/accelerate/fsdp2_qlora.yaml). The base is then read and quantized tensor by tensor and
kept in main memory, and no card holds more of it than its part, the layer at hand, the embeddings and the head.
"""

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rlhf_recipes import methods
from rlhf_recipes.errors import Refusal

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

DDP = "Launch with conf/accelerate/ddp.yaml, the whole model on every card"


def is_on() -> bool:
    """Whether the launcher asks for it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check(cfg: DictConfig, recipe: str) -> None:
    """Refuse what cannot run in parts, before a model loads.

    Raises:
        Refusal: the launcher asks for DeepSpeed, for FSDP's first version or for a form of checkpoint that one process
            could not read; or for parts of what is used whole.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise Refusal(
            "distributed_type=DEEPSPEED: its ZeRO-3 gives no rank the adapter whole, to be measured and saved, and "
            "its other stages save nothing beside LoRA. Launch with conf/accelerate/fsdp2_qlora.yaml, or ddp.yaml."
        )
    if not is_on():
        return
    if os.environ.get("FSDP_VERSION") != "2":
        raise Refusal(
            "fsdp_version=1: packs LoRA in float32 and a base of another type into one tensor. Set fsdp_version: 2, "
            "as in conf/accelerate/fsdp2_qlora.yaml."
        )
    if os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
        raise Refusal(
            "fsdp_state_dict_type: checkpoints must be readable by one process. Set FULL_STATE_DICT, as in "
            "conf/accelerate/fsdp2_qlora.yaml."
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise Refusal(
            "fsdp_cpu_ram_efficient_loading=true: transformers does not do so with quantized models. Set false, as in "
            "conf/accelerate/fsdp2_qlora.yaml."
        )
    if recipe not in methods.METHODS:
        raise Refusal(f"distributed_type=FSDP: recipes/{recipe}.py does not train. {DDP}.")
    if methods.of(recipe).samples:
        raise Refusal(
            f"distributed_type=FSDP: {recipe.upper()} samples token by token, and every token would gather the whole "
            f"base again. {DDP}, and where none has room for it choose dpo."
        )
    quantization, trainer = cfg.quantization, cfg.trainer
    if quantization.get("load_in_8bit"):
        raise Refusal("quantization=int8: FSDP shards no integers. Use quantization=nf4_fsdp, or none.")
    if quantization.get("load_in_4bit") and not quantization.get("bnb_4bit_quant_storage"):
        raise Refusal(
            "quantization=nf4: packs integers, which FSDP leaves whole on every card. Use quantization=nf4_fsdp."
        )
    if trainer.get("precompute_ref_log_probs"):
        raise Refusal(
            "trainer.precompute_ref_log_probs=true: TRL does it before the model is sharded, on the CPU. Leave it out."
        )
    if cfg.doctor == "strict":
        raise Refusal("doctor=strict: keeps the last good weights whole, and here they lie in parts. Use doctor=warn.")


def check_packed(quantization, dtype: "torch.dtype") -> None:
    """Refuse weights that FSDP would convert as if they were numbers.

    Args:
        quantization: transformers.BitsAndBytesConfig, or None.
        dtype: that the run computes in.

    Raises:
        Refusal: `quantization` packs them in another 16-bit dtype.
    """
    packed = getattr(quantization, "bnb_4bit_quant_storage", dtype)
    if is_on() and packed != dtype and packed.itemsize == dtype.itemsize == 2:
        names = [str(each).removeprefix("torch.") for each in (packed, dtype)]
        raise Refusal(
            f"quantization.bnb_4bit_quant_storage={names[0]}: the run computes in {names[1]}, to which FSDP would "
            f"convert the packed weights. Give quantization.bnb_4bit_quant_storage={names[1]}."
        )


@contextmanager
def quantized_on_card():
    """Quantize on this process's card, a tensor at a time, what lies on the CPU before and after: there bitsandbytes
    takes seconds for a large tensor, and 64 bytes for each of its numbers."""
    import torch

    if not (is_on() and torch.cuda.is_available()):
        yield
        return
    from bitsandbytes import functional

    quantize = functional.quantize_4bit

    def on_card(tensor, *args, **kwargs):
        packed, state = quantize(tensor.cuda(), *args, **kwargs)
        state.to("cpu")
        return packed.cpu(), state

    functional.quantize_4bit = on_card
    try:
        yield
    finally:
        functional.quantize_4bit = quantize


def prepare(trainer) -> None:
    """Shard the trainer's model, where that is asked for: what `trainer.train` would do first, so that the held-out
    rows are measured on it before.

    Its state for checkpoints is that of the trained weights alone: the base is never gathered.
    """
    if not is_on():
        return
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from torch.distributed.fsdp import MixedPrecisionPolicy

    accelerator, plugin = trainer.accelerator, trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy:  # that of accelerate would round gradients, and losses that are sums of a forward pass
        plugin.mixed_precision_policy = MixedPrecisionPolicy(policy.param_dtype, reduce_dtype=torch.float32)
        trainer.model.forward = convert_outputs_to_fp32(trainer.model.forward)  # as without FSDP
    trainer.create_optimizer()
    prepared = accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model, trainer.optimizer = prepared
    trainer.model_wrapped = trainer.model
    prepare_more = accelerator.prepare

    def prepare_once(*given, **kwargs):
        return prepared if given[0] is prepared[0] else prepare_more(*given, **kwargs)

    accelerator.prepare = prepare_once
    accelerator.get_state_dict = lambda model, unwrap=True: trained_state(model)


def trained_state(model: "PeftModel") -> "dict[str, torch.Tensor] | None":
    """The trained weights, whole and on the CPU, by their names in the model's state; every rank takes part.

    None where the model does not lie in parts: then its own state will do.
    """
    if not is_on():
        return None
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: _whole(parameter.detach()).cpu() for name, parameter in trained}


def take_apart(model: "PeftModel") -> None:
    """Give back what a forward pass leaves whole for the backward pass that does not follow: embeddings and head."""
    if is_on():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _whole(tensor: "torch.Tensor") -> "torch.Tensor":
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
