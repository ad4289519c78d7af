"""rlhf-recipes: preference fine-tuning recipes on Hugging Face TRL, composed with Hydra."""

__version__ = "0.1.0"
