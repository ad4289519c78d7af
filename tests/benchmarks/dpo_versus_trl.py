"""The dpo recipe against what a user would pick instead, on the same work: TRL's command, and a script by hand.

    python tests/benchmarks/dpo_versus_trl.py --rounds 3

16 clinic pairs of at most 256 tokens, batch 2, 8 steps, LoRA r 16 on all linear layers, NF4, the embedded model. The
candidates take turns; printed are medians of wall seconds, seconds per step (the trainer's own train_runtime), what
the process takes apart from training, and peak memory, then the ratios. Run it alone on the machine.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 8
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_length": 256,
    "learning_rate": 5e-6,
    "beta": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}

BY_HAND = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

folder, pairs, training = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(output_dir="by_hand", use_cpu=not torch.cuda.is_available(), report_to="none", **training),
    train_dataset=Dataset.from_list([json.loads(line) for line in open(pairs)]),
    processing_class=AutoTokenizer.from_pretrained(folder),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("by_hand")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    from rlhf_recipes import embedded

    model = str(embedded.prepare())
    # Every candidate gets all cores; TRL's command would otherwise run on one.
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder) / "pairs")
        candidates = commands(model, pairs, Path(folder))
        timings = {name: [] for name in candidates}
        for number in range(rounds):
            for name, command in candidates.items():
                timings[name].append(
                    measure([part.replace("{round}", str(number)) for part in command], env, Path(folder))
                )
                print(f"round {number + 1}, {name}: {timings[name][-1]}", flush=True)
    report(timings)


def write_pairs(folder: Path) -> Path:
    """16 training pairs in TRL's conversational format, two more to hold out."""
    from rlhf_recipes.data.sources import CLINIC

    folder.mkdir()
    rows = [json.loads(line) for line in (CLINIC / "pairs.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"][:16]
    test = [row for row in rows if row["split"] == "test"][:2]
    for name, part in (("train", train), ("test", test)):
        lines = [
            {
                "prompt": row["prompt"],
                **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
            }
            for row in part
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def commands(model: str, pairs: Path, folder: Path) -> dict[str, list[str]]:
    script = folder / "by_hand.py"
    script.write_text(BY_HAND)
    trl_flags = [part for key, value in TRAINING.items() for part in (f"--{key}", str(value))]
    ours = [f"trainer.{key}={str(value).lower()}" for key, value in TRAINING.items()]
    return {
        "recipe": [
            sys.executable, "-m", "rlhf_recipes.recipes.dpo", "data=local", f"data.path={pairs}",
            f"data.test_path={pairs.with_name('test.jsonl')}", "run_name=round{round}", *ours,
        ],
        "by hand": [sys.executable, str(script), model, str(pairs), json.dumps(TRAINING)],
        "trl dpo": [
            str(Path(sys.executable).with_name("trl")), "dpo", "--model_name_or_path", model,
            "--dataset_name", str(pairs.parent),
            "--output_dir", "trl", "--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant",
            "--dtype", "bfloat16", "--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.0",
            "--lora_target_modules", "all-linear", "--use_cpu", "True", "--report_to", "none", *trl_flags,
        ],
    }  # fmt: skip


def measure(command: list[str], env: dict, folder: Path) -> dict[str, float]:
    """Wall seconds, seconds per step, seconds apart from training, peak GiB of the largest process."""
    begin = time.monotonic()
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - begin
        output.seek(0)
        text = output.read() + history(folder, command)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{text}")
    runtime = float(re.findall(r"train_runtime'?\"?: '?([0-9.e+-]+)", text)[-1])
    return {
        "wall": round(wall, 1),
        "step": round(runtime / STEPS, 3),
        "apart": round(wall - runtime, 1),
        "gib": round(usage.ru_maxrss / 2**20, 2),
    }


def history(folder: Path, command: list[str]) -> str:
    """metrics.jsonl of a recipe's run, where the trainer's own summary row lies."""
    names = [part.removeprefix("run_name=") for part in command if part.startswith("run_name=")]
    return (folder / "outputs" / "dpo" / names[0] / "metrics.jsonl").read_text() if names else ""


def report(timings: dict[str, list[dict[str, float]]]) -> None:
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, median of {len(timings['recipe'])}"
    )
    median = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in timings.items()
    }
    for name, row in median.items():
        print(
            f"{name:8}  {row['wall']:6.1f} s  {row['step']:6.3f} s/step  {row['apart']:5.1f} s apart from training"
            f"  {row['gib']:.2f} GiB"
        )
    for name in ("by hand", "trl dpo"):
        ratios = {key: median["recipe"][key] / median[name][key] for key in ("wall", "step")}
        added = median["recipe"]["apart"] - median[name]["apart"]
        print(f"recipe / {name}: wall {ratios['wall']:.3f}, step {ratios['step']:.3f}, apart {added:+.1f} s")


if __name__ == "__main__":
    main()
