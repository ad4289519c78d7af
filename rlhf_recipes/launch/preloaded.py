"""What a fork of `forks` finds imported. Nothing is computed here: a thread of OpenMP would not survive the fork."""

import gc
import importlib
from contextlib import suppress

from rlhf_recipes import run

LIBRARIES = (
    "bitsandbytes",
    "datasets",
    "matplotlib.pyplot",
    "peft",
    "peft.tuners.lora.bnb",
    "transformers.models.llama.modeling_llama",
    "trl.experimental.cpo",
    "trl.experimental.orpo",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.sft_trainer",
)

run.environment()
for _library in LIBRARIES:
    with suppress(Exception):  # whoever needs it says what is wrong with it
        importlib.import_module(_library)
gc.freeze()  # shared by the forks until one of them writes into it
