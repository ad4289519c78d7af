"""What conformance.py starts in a folder, as one process or by torchrun as two: cells, one after another.

    python tests/benchmarks/conformance_cells.py <model> <seconds> <cell> ...

A cell is "<recipe> <quantization> <fresh or chained> <processes>", or one of RUNS, which cells start from. Each leaves
a line in cells.jsonl when it is done, and its name in `at` before: who dies in it is named. After so many seconds none
is begun.

A recipe trains three steps on short rows in float32. Checked are: the run and its losses; that LoRA has moved, in a
chain away from the run that it continues; that the saved adapter on a base loaded anew gives held-out pairs the
log-probabilities (of a reward model: the scores) of the trained one; the card; that what a kill after the second step
would have left goes on to the same bits. A run's own pictures are not drawn.
"""

import gc
import json
import math
import os
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import quick

DONE, AT, PAIRS = "cells.jsonl", "at", "pairs.jsonl"
STEPS, KILLED = 3, 2  # how many, and after which of them a copy is continued
NATS = 1e-5
RUNS = {"parent": "sft", "judge": "reward"}
MODELS = {"tiny": ["model.path=model", "model.id=tests/tiny"], "embedded": []}
SHARED = [
    "model.dtype=float32", "trainer.bf16=false", "data=local", f"data.path={PAIRS}", f"trainer.max_steps={STEPS}",
    f"trainer.save_steps={KILLED}", "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "trainer.warmup_steps=0",
    "trainer.per_device_train_batch_size=2",
]  # fmt: skip
SAMPLED = ["reward_funcs=judge", "trainer.max_completion_length=6"]
OWN = {"ppo": [*SAMPLED, "trainer.num_mini_batches=1"], "rloo": [*SAMPLED, "trainer.num_generations=2"]}


class Mismatch(Exception):
    """A run is not what it should be; its text says how."""


def overrides(name: str, model: str) -> tuple[str, list[str]]:
    """Recipe and overrides of a cell, or of one of RUNS."""
    if name in RUNS:
        return RUNS[name], [*MODELS[model], *SHARED, "quantization=none", "trainer.gradient_accumulation_steps=2"]
    recipe, quantization, start, processes = name.split()
    own = [f"quantization={quantization}", f"trainer.gradient_accumulation_steps={2 // int(processes)}"]
    own += ["model.adapter=parent"] if start == "chained" else []
    return recipe, [*MODELS[model], *SHARED, *OWN.get(recipe, []), *own]


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Mismatch(otherwise)


@contextmanager
def watched(module, copy_to: Path | None):
    """A list that gets the trainer; what lies in the run folder when the checkpoint of KILLED is written is copied."""
    from transformers import TrainerCallback

    from rlhf_recipes import ranks
    from rlhf_recipes.training import callbacks

    class Copy(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == KILLED:
                ranks.barrier()  # every rank has written its state
                ranks.by_first(shutil.copytree, run.dir, copy_to)

    def watch(trainer, started):
        nonlocal run
        run = started
        add(trainer, started)
        seen.append(trainer)
        if copy_to:
            trainer.add_callback(Copy())

    run, seen, add = None, [], callbacks.watch
    callbacks.watch = watch
    try:
        yield seen
    finally:
        callbacks.watch = add


def train(recipe: str, given: list[str], folder: Path, copy_to: Path | None = None):
    """The config and the trainer of a recipe that has run into the folder."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    import rlhf_recipes.config  # noqa: F401  registers the nodes that the groups start from

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name=recipe):
        cfg = hydra.compose(recipe, overrides=given)
    cfg.output_dir = str(folder)
    module = import_module(f"rlhf_recipes.recipes.{recipe}")
    with watched(module, copy_to) as seen:
        module.main.__wrapped__(cfg)
    return cfg, seen[0]


class Cell:
    """One of them while it runs; `at` is the check under way."""

    def __init__(self, name: str, model: str):
        self.recipe, self.overrides = overrides(name, model)
        self.processes = 1 if name in RUNS else int(name.split()[-1])
        self.chained = "model.adapter=parent" in self.overrides
        self.folder = Path(name) if name in RUNS else Path("cell")
        self.half = Path("half")
        self.at = "start"

    def run(self, checks: tuple[str, ...] = ("train", "moved", "reload", "card", "resume")) -> None:
        from rlhf_recipes import ranks

        for folder in (self.folder, self.half):
            ranks.by_first(shutil.rmtree, folder, ignore_errors=True)
        for self.at in checks:
            getattr(self, self.at)()

    def train(self) -> None:
        copy_to = None if self.folder.name in RUNS else self.half
        self.cfg, self.trainer = train(self.recipe, self.overrides, self.folder, copy_to)
        self.result = result = json.loads((self.folder / "result.json").read_text())
        said = {key: result[key] for key in ("status", "steps", "world_size")}
        expect(said == {"status": "finished", "steps": STEPS, "world_size": self.processes}, f"result.json: {said}")
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        expect(len(losses) == STEPS and all(map(math.isfinite, losses)), f"losses: {losses}")

    def moved(self) -> None:
        now, before = weights(self.folder), weights(Path("parent")) if self.chained else {}
        broken = [name for name, weight in now.items() if not weight.isfinite().all()]
        expect(not broken, f"not finite: {', '.join(broken[:3])}")
        still = [
            name
            for name, weight in now.items()
            if ".lora_B." in name and (weight.equal(before[name]) if name in before else not weight.any())
        ]
        expect(not still, f"{len(still)} of {len(now)} have not moved: {', '.join(still[:3])}")

    def reload(self) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from rlhf_recipes import models

        tokenizer = models.load_tokenizer(self.cfg.model)
        trained = self.measured(self.trainer.model, tokenizer)
        expect(all(map(math.isfinite, trained)), f"log-probabilities of the trained model: {trained[:4]}")
        kind, head = (
            (AutoModelForSequenceClassification, {"num_labels": 1})
            if self.recipe == "reward"
            else (AutoModelForCausalLM, {})
        )
        base = models.load_base(self.cfg.model, self.cfg.quantization, kind, **head)
        loaded = self.measured(PeftModel.from_pretrained(base, str(self.folder / "adapter")), tokenizer)
        apart = max(abs(a - b) for a, b in zip(trained, loaded, strict=True))
        expect(apart <= NATS, f"log-probabilities differ by {apart:.2g}")

    def measured(self, model, tokenizer) -> list[float]:
        from rlhf_recipes import inference, packing

        rows = [row for row in map(json.loads, Path(PAIRS).read_text().splitlines()) if row["split"] == "test"]
        packing.allow(model)  # in 8 bits a token's numbers depend on what goes through with it
        measure = inference.pair_rewards if self.recipe == "reward" else inference.pair_logps
        return [value for row in measure(model, tokenizer, rows) for value in row.values()]

    def card(self) -> None:
        text = (self.folder / "README.md").read_text(encoding="utf-8")
        wanted = (f"base_model: {self.cfg.model.id}", f"- {self.recipe}\n", "PeftModel.from_pretrained", "| before |")
        missing = [each for each in wanted if each not in text]
        expect(not missing, f"README.md lacks {', '.join(map(repr, missing))}")

    def resume(self) -> None:
        del self.trainer
        gc.collect()
        train(self.recipe, self.overrides, self.half)
        result = json.loads((self.half / "result.json").read_text())
        expect(result["resumed_from"] == f"checkpoint-{KILLED}", f"resumed from {result['resumed_from']}")
        if result["adapter_sha256"] != self.result["adapter_sha256"]:
            whole, half = weights(self.folder), weights(self.half)
            apart = max((half[name] - weight).abs().max().item() for name, weight in whole.items())
            raise Mismatch(f"weights of the continued run differ by {apart:.2g}")


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def tell(name: str, **found) -> None:
    with open(DONE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"cell": name, **found}, ensure_ascii=False) + "\n")


def attempt(name: str, model: str) -> str:
    """What has failed, by the check; "" where nothing has."""
    from rlhf_recipes import locks
    from rlhf_recipes.errors import first_line

    cell = Cell(name, model)
    try:
        cell.run(("train", "moved") if name in RUNS else ("train", "moved", "reload", "card", "resume"))
    except Mismatch as error:
        return f"{cell.at}: {error}"
    except (Exception, SystemExit) as error:
        sys.excepthook(type(error), error, error.__traceback__)  # whole in the log
        return f"{cell.at}: {type(error).__name__}: {first_line(error)}"
    finally:
        locks.release_all()
    return ""


def main(model: str, seconds: str, *names: str) -> None:
    begin = time.monotonic()
    from rlhf_recipes import ranks, run

    run.environment()
    run.environment = lambda: None  # it would silence what shall be heard
    quick.compose_once()
    quick.settle()
    for name in names:
        if ranks.from_first(time.monotonic() - begin > float(seconds)):
            break
        if ranks.is_first():
            Path(AT).write_text(name)
        with quick.pictures_sketched(), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", FutureWarning)
            failed = attempt(name, model)
        if failed and ranks.world_size() > 1:
            tell(name, failed=failed, warned=[])
            sys.stdout.flush()
            os._exit(1)  # the other process waits for what this one will not do
        if ranks.is_first():
            warned = {str(each.message).splitlines()[0][:200] for each in heard if each.category is FutureWarning}
            tell(name, failed=failed, warned=sorted(warned))
        gc.collect()
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
