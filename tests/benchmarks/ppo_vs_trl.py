"""The ppo recipe against TRL 1.12, the last with a PPO trainer, on the same work.

    python tests/benchmarks/ppo_vs_trl.py --rounds 2 --json figures.json

The embedded model in bfloat16, or in float32 on a processor that would emulate that, LoRA r 16 on all linear layers, a
reward model on the same base, clinic prompts, batch 8, 48 tokens, 2 PPO epochs. TRL gets a virtual environment of its
own, and the reward model with its adapter merged, as reward model and as critic. The candidates take turns; the first
update of each process is left out. Printed are medians of seconds per update and peak memory, then the ratios. Run it
alone on the machine.
"""

import argparse
import datetime
import itertools
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

ROOT = Path(__file__).parents[2]
BATCH, EPOCHS, TOKENS = 8, 2, 48
CORES = len(os.sched_getaffinity(0))  # that this process may use
TRAINING = {"learning_rate": 3e-5, "kl_coef": 0.05, "num_ppo_epochs": EPOCHS, "missing_eos_penalty": 1.0}

OURS = """
import time
from transformers import TrainerCallback
from rlhf_recipes.training import callbacks

class Clock(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print("CLOCK", time.monotonic(), flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.num_ppo_epochs == 0:
            print("CLOCK", time.monotonic(), flush=True)

watch = callbacks.watch
callbacks.watch = lambda trainer, job: (watch(trainer, job), trainer.add_callback(Clock()))

from rlhf_recipes.recipes.ppo import main
main()
"""

TRL = """
import json, sys, time
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

class Clock(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print("CLOCK", time.monotonic(), flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        print("CLOCK", time.monotonic(), flush=True)

model, reward, prompts, micro, dtype, arguments = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
rows = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
data = Dataset.from_list([{"input_ids": ids} for ids in rows])
classifier = lambda: AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=dtype)
trainer = PPOTrainer(
    args=PPOConfig(output_dir="trl", use_cpu=True, report_to="none", save_strategy="no", gradient_checkpointing=False,
        bf16=dtype == torch.bfloat16, temperature=1.0, stop_token="eos", num_sample_generations=0,
        per_device_train_batch_size=micro, **arguments),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
    ref_model=None, reward_model=classifier(), value_model=classifier(),
    train_dataset=data, eval_dataset=data,
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[Clock()],
)
trainer.train()
"""

MERGE = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model, adapter, folder, dtype = sys.argv[1:]
base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=getattr(torch, dtype))
merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
merged.config.pad_token_id = AutoTokenizer.from_pretrained(adapter).pad_token_id
merged.save_pretrained(folder)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8, help="episodes of a forward pass; the batch is 8")
    parser.add_argument("--updates", type=int, default=5, help="of each process; the first is not counted")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--venv", type=Path, help="where TRL 1.12 is or shall be installed; default: a temporary one")
    options = parser.parse_args()
    from rlhf_recipes import embedded, models

    dtype = "bfloat16" if models.computes_in_bf16() else "float32"
    model = str(embedded.prepare())
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(CORES),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trl = install_trl(options.venv or folder / "venv")
        prompts = write_prompts(folder, options.updates)
        reward = [
            sys.executable,
            "-m",
            "rlhf_recipes.recipes.reward",
            "quantization=none",
            f"model.dtype={dtype}",
            "data.train_size=16",
            "data.eval_size=4",
        ]
        run([*reward, "trainer.learning_rate=1e-3"], env, folder)
        run([sys.executable, "-c", MERGE, model, "outputs/reward/main/adapter", "merged", dtype], env, folder)
        candidates = commands(trl, model, prompts, options.micro_batch, dtype)
        measured = {name: [] for name in candidates}
        for number in range(options.rounds):
            for name, command in candidates.items():
                measured[name].append(measure(command, env, folder))
                print(f"round {number + 1}, {name}: {measured[name][-1]}", flush=True)
    figures = report(measured, options.micro_batch, dtype)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def install_trl(venv: Path) -> str:
    """Python of an environment with TRL 1.12 and, for the rest, the versions that this project is tested with."""
    python = venv / "bin" / "python"
    if not python.exists():
        pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("trl==")]
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        (venv / "constraints.txt").write_text("\n".join(pinned))
        install = [python, "-m", "pip", "install", "--quiet", "-c", venv / "constraints.txt", "trl==1.12.0", "peft"]
        subprocess.run(install, check=True)
    return str(python)


def write_prompts(folder: Path, updates: int) -> list:
    from rlhf_recipes.data.sources import CLINIC

    rows = [json.loads(line) for line in (CLINIC / "pairs.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in rows if row["split"] == "train"][: BATCH * updates]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "test.jsonl").write_text(json.dumps({"prompt": "When do you open on Sunday?"}) + "\n")
    return prompts


def commands(trl: str, model: str, prompts: list, micro: int, dtype: str) -> dict[str, list[str]]:
    shared = {**TRAINING, "gradient_accumulation_steps": BATCH // micro}
    ours = {
        **shared,
        "num_mini_batches": 1,
        "per_device_train_batch_size": micro,
        "max_steps": len(prompts) // BATCH * EPOCHS,
        "max_completion_length": TOKENS,
        "save_strategy": "no",
    }
    recipe = [
        sys.executable, "-c", OURS, "quantization=none", f"model.dtype={dtype}", "data=local",
        "data.path=prompts.jsonl", "data.test_path=test.jsonl",
        "reward_funcs=outputs/reward/main", "overwrite=true", *(f"trainer.{k}={v}" for k, v in ours.items()),
    ]  # fmt: skip
    theirs = {**shared, "response_length": TOKENS, "total_episodes": len(prompts)}
    return {
        "value=separate": [*recipe, "trainer.value=separate"],
        "value=head": recipe,
        "TRL 1.12": [trl, "-c", TRL, json.dumps([model, "merged", prompts, micro, dtype, theirs])],
    }


def measure(command: list[str], env: dict, folder: Path) -> dict[str, float]:
    """Median seconds of an update but the first, and peak GiB of the process."""
    output, peak = run(command, env, folder)
    clock = [float(moment) for moment in re.findall(r"CLOCK ([\d.]+)", output)]
    updates = [after - before for before, after in itertools.pairwise(clock)]
    return {"seconds": round(statistics.median(updates[1:]), 2), "gib": round(peak, 2), "updates": len(updates) - 1}


def run(command: list[str], env: dict, folder: Path) -> tuple[str, float]:
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read()
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}\n{text}")
    return text, usage.ru_maxrss / 2**20


def report(measured: dict[str, list[dict[str, float]]], micro: int, dtype: str) -> dict:
    machine = f"{platform.machine()}, {CORES} cores"
    median = {
        name: {key: statistics.median(row[key] for row in rows) for key in ("seconds", "gib")}
        for name, rows in measured.items()
    }
    print(f"\n{datetime.date.today()}, {machine}, {dtype}, micro-batch {micro}, median of {len(measured['TRL 1.12'])}")
    ratios = {}
    for name, row in median.items():
        ratios[name] = {key: round(row[key] / median["TRL 1.12"][key], 3) for key in row}
        print(f"{name:15} {row['seconds']:6.2f} s/update  {row['gib']:.2f} GiB  "
              f"time {ratios[name]['seconds']:.2f}, memory {ratios[name]['gib']:.2f} of TRL 1.12")  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "dtype": dtype,
        "measured": measured,
        "median": median,
        "ratios": ratios,
    }


if __name__ == "__main__":
    main()
