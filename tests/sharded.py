"""Recipes on gloo processes under FSDP2: `python -m sharded ASKED`, JSON: what a launcher says, arguments of each run.

Accelerate shards on accelerators alone: here a process group on the CPU passes for one of cards. Everything else is
its own: the plugin from the launcher's environment, `prepare`, the saving of checkpoints. Beside a run lies what rank
0 saw, `seen.json`. A first argument `stop=N` interrupts the run after the checkpoint of step N.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def pass_for_cards():
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    make = PartialState.__init__

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = made


def watch(seen):
    """Keep what the base takes on this rank, and what is measured."""
    from rlhf_recipes import inference, sharding

    def base_bytes(model):
        frozen = [p for name, p in model.named_parameters() if not p.requires_grad and "lora_" not in name]
        return sum(getattr(p, "_local_tensor", p).nbytes for p in frozen)

    prepare = sharding.prepare

    def prepared(trainer):
        seen["bytes"] = [base_bytes(trainer.model)]
        prepare(trainer)
        seen["bytes"].append(base_bytes(trainer.model))

    def measured(measure):
        def recorded(model, tokenizer, rows, *what, **how):
            found = measure(model, tokenizer, rows, *what, **how)
            kept = [{key: row[key] for key in ("prompt", "chosen", "rejected") if key in row} for row in rows]
            seen.setdefault("measured", []).append({"rows": kept, "found": found})
            return found

        return recorded

    sharding.prepare = prepared
    for name in ("pair_logps", "pair_rewards", "demonstration_logps"):
        setattr(inference, name, measured(getattr(inference, name)))
    inference.BATCH_TOKENS = 600  # several batches, an odd number of them


def stop_after(step):
    from transformers import TrainerCallback

    from rlhf_recipes.training import callbacks

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    add = callbacks.watch
    callbacks.watch = lambda trainer, run: (add(trainer, run), trainer.add_callback(Stop()))
    return add


def main(environment, runs):
    os.environ |= environment
    pass_for_cards()
    from rlhf_recipes import ranks
    from rlhf_recipes.training import callbacks

    ranks.leave = lambda: None  # the next run is of all, too

    for recipe, *arguments in runs:
        seen = {}
        watch(seen)
        stop = arguments[0].startswith("stop=") and int(arguments.pop(0).removeprefix("stop="))
        add = stop_after(stop) if stop else callbacks.watch
        sys.argv = [f"recipes/{recipe}.py", *arguments]
        try:
            runpy.run_module(f"rlhf_recipes.recipes.{recipe}", run_name="__main__")
        except SystemExit as end:
            assert stop and end.code == 130, end
        callbacks.watch = add
        name = next(word.partition("=")[2] for word in arguments if word.startswith("run_name="))
        if ranks.is_first() and not stop:
            Path(f"outputs/{recipe}/{name}/seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
