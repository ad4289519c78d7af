"""What preflight knows of one job; a list of them is `jobs` in preflight.json."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class JobReport:
    """What could not be looked at is None.

    Attributes:
        name: of a sweep's job or a pipeline's stage; "" for a run alone.
        recipe: its recipe.
        watch: what to know, sentences with what to do.
        stops: why it could not run, the same.
        settings: of the trainer, and the `steps`.
        model: `id` and `download_gib`.
        lora: `numbers` of the adapter, their `bytes` in a checkpoint, and what `disk.checkpoints` counts.
        rows: of `rows.examine`.
        example: of `rows.example`.
        memory: of `predict_memory.predict`, and `free_gib`.
        step: of `real_steps.measure`.
    """

    name: str
    recipe: str
    watch: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    lora: dict[str, int] | None = None
    rows: dict[str, Any] | None = None
    example: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    step: dict[str, Any] | None = None
