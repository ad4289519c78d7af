"""Merged weights: base + B A (alpha / r) in one set of matrices, and how far they are from the adapter on its base."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes.errors import Refusal
from rlhf_recipes.publish import contents


def write(source: contents.Source, folder: Path) -> None:
    """Merge the run's adapter into its base and save whole weights in safetensors.

    A 4-bit base is de-quantized first, so that the adapter meets the weights that it was trained on, not those from
    before their rounding. The sum is taken in float32 and rounded once, to the dtype of the computation; on the CPU,
    since a GPU that trains a model in 4 bits may have no room for it in 32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_recipes import models

    node = OmegaConf.create({**source.config["model"], "adapter": None})
    auto, options = AutoModelForCausalLM, {}
    if source.recipe == "reward":
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
    base = models.load_base(node, OmegaConf.create(source.config["quantization"]), auto, **options)
    if getattr(base, "is_quantized", False):
        base = base.dequantize()
    merged = models.put_on(base.to("cpu", torch.float32), source.adapter, str(source.adapter)).merge_and_unload()
    merged.to(models.compute_dtype(node)).save_pretrained(folder)
    for name in (contents.WEIGHTS, contents.ADAPTER_CONFIG):
        (folder / name).unlink(missing_ok=True)


def report(drift: float, reward: bool, limit: float) -> dict[str, Any]:
    """What the card says of merged weights.

    Raises:
        Refusal: they are too far from what was trained and measured.
    """
    unit = "units of the score (nats of log-odds)" if reward else "nats per reply token"
    if not drift <= limit:
        raise Refusal(
            f"merged=true: merged weights differ from the adapter on its base by {drift:.4f} {unit}, more than "
            f"max_merge_drift={limit}. Publish the adapter, or raise the limit."
        )
    return {"drift": drift, "limit": limit, "unit": unit}
