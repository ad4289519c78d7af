"""A recipe as its command runs it, seen from inside: `python inside.py dpo trainer.max_steps=2`.

Settings are in the environment: FACTS, the file for what is seen when the training is over; KILL, a moment of
tests/killed.py; RELOADS, how often `models.prove_reload` is asked; CARDS, how many are said to be visible.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def facts(trainer) -> dict:
    """Devices and kinds of the parameters, whether checkpointing is on, LoRA's B that did not move, GiB of the GPU."""
    import torch

    parameters = dict(trainer.model.named_parameters())
    seen = {
        "devices": sorted({parameter.device.type for parameter in parameters.values()}),
        "kinds": sorted({f"{type(p).__name__} {p.dtype}" for p in parameters.values()}),
        "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()),
        "still": [name for name, p in parameters.items() if ".lora_B.default." in name and not p.any()],
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        peaks["used_by_all"] = total - free
        seen["gib"] = {name: round(size / 2**30, 2) for name, size in peaks.items()}
    return seen


def main(recipe: str) -> None:
    if "CARDS" in os.environ:
        import torch

        several = int(os.environ["CARDS"])
        torch.cuda.device_count = lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "," * (several - 1)).split(","))
    if "KILL" in os.environ:
        import killed

        killed.arm(*os.environ["KILL"].rsplit(" ", 1))
    module, seen = import_module(f"rlhf_recipes.recipes.{recipe}"), {}
    if "RELOADS" in os.environ:
        from rlhf_recipes import models

        prove, seen["failed"] = models.prove_reload, 0

        def repeatedly(*args):
            for _ in range(int(os.environ["RELOADS"])):
                try:
                    prove(*args)
                except RuntimeError:
                    seen["failed"] += 1

        models.prove_reload = repeatedly
    if "FACTS" in os.environ:
        finish = module.finish

        def watched(run, trainer, **entries):
            Path(os.environ["FACTS"]).write_text(json.dumps(seen | facts(trainer)))
            return finish(run, trainer, **entries)

        module.finish = watched
    sys.argv = [module.__file__, *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    main(sys.argv[1])
