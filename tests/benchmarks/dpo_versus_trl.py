"""Training on pairs against TRL, on the same rows: dpo, orpo, simpo, reward; held-out pairs; a sweep over beta.

    python tests/benchmarks/dpo_versus_trl.py --pairs hh-rlhf.jsonl.gz --rows dpo kept orpo --rounds 3

Pairs of at most 512 tokens (those of the clinic, or HH-RLHF's), batch 4, one epoch of --steps steps, LoRA r 16 on all
linear layers, the embedded model in float32 without quantization. What a row compares takes turns, and each is the
whole command as a user would type it; TRL has no command of ORPO and SimPO, so a script by hand stands for it. Printed
are medians of seconds and of the peak of the process, what the floor of each would be, and the ratios. Run it alone on
the machine.

    dpo        recipes/dpo.py / trl dpo
    kept       a second run of recipes/dpo.py, whose reference is kept / trl dpo
    orpo, simpo, reward
    held-out   log-probabilities of the pairs, `fast_forward` / without
    sweep      recipes/dpo.py sweep=dpo_beta, five jobs / five times trl dpo
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = ("dpo", "kept", "orpo", "simpo", "reward", "held-out", "sweep")
BATCH, LENGTH, HELD_OUT, SWEPT = 4, 512, 8, "swept"
TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "max_length": LENGTH,
    "learning_rate": 5e-6,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}
FLOAT32 = ["quantization=none", "model.dtype=float32", "trainer.bf16=false", "preflight.measure=false"]
BY_HAND = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

method, folder, pairs, training = *sys.argv[1:4], json.loads(sys.argv[4])
config, trainer_class, own = {
    "orpo": (ORPOConfig, ORPOTrainer, {"beta": 0.1}),
    "simpo": (CPOConfig, CPOTrainer, {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0}),
}[method]
trainer = trainer_class(
    model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    args=config(
        output_dir="by_hand", use_cpu=not torch.cuda.is_available(), bf16=False, report_to="none", **own, **training
    ),
    train_dataset=Dataset.from_list([json.loads(line) for line in open(pairs)]),
    processing_class=AutoTokenizer.from_pretrained(folder),
    peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model("by_hand")
"""
MEASURE = """
import json, sys
from rlhf_recipes import run
run.environment()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from rlhf_recipes import inference, packing

folder, pairs, fast = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
if fast == "true":
    packing.allow(model)
inference.pair_logps(model, AutoTokenizer.from_pretrained(folder), [json.loads(line) for line in open(pairs)])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", help="a file of HH-RLHF's transcripts; without: pairs of the clinic")
    options = parser.parse_args()
    from rlhf_recipes import embedded

    model = str(embedded.prepare())
    # Every candidate gets all cores; TRL's command would otherwise run on one.
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    env = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        encoded = write_pairs(here / "pairs", options.pairs and str(Path(options.pairs).resolve()), options.steps)
        median = statistics.median(len(ids) for pair in encoded for ids, _ in pair)
        print(f"{datetime.date.today()}, {platform.machine()}, {threads} threads")
        print(f"{len(encoded)} pairs, tokens of a conversation: median {median:.0f}", flush=True)
        candidates = {row: commands(row, model, here) for row in options.rows}
        if "kept" in candidates:  # the first run, which keeps it
            measure(candidates["kept"]["ours"], env, here)
        timings = {row: {name: [] for name in of_row} for row, of_row in candidates.items()}
        for number in range(1, options.rounds + 1):
            known = {}  # one run of a command for all rows that it stands in
            for row, of_row in candidates.items():
                for name, command in of_row.items():
                    key = tuple(command)
                    known[key] = known.get(key) or measure(command, env, here)
                    timings[row][name].append(known[key])
                report(f"round {number}", row, {name: runs[-1:] for name, runs in timings[row].items()}, encoded)
        for row in candidates:
            report(f"median of {options.rounds}", row, timings[row], encoded)


def write_pairs(folder: Path, transcripts: str | None, steps: int) -> list[list[tuple[list[int], int]]]:
    """So many batches of pairs that fit, and some to hold out, in TRL's conversational format.

    Returns:
        (token ids, where the answer starts) of both conversations of each pair that is trained.
    """
    from hydra import compose, initialize_config_module

    import rlhf_recipes.config  # noqa: F401  registers the nodes that the groups start from
    from rlhf_recipes import inference, models
    from rlhf_recipes.data.load import load_pairs

    overrides = ["data=hh_rlhf", f"data.path={transcripts}"] if transcripts else []
    with initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
        cfg = compose("dpo", overrides=overrides)
    tokenizer, loaded = models.load_tokenizer(cfg.model), load_pairs(cfg.data)
    kept, encoded = [], []
    for row in [*loaded.train, *loaded.test]:
        both = [inference.encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        if max(len(ids) for ids, _ in both) <= LENGTH:
            kept.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
            encoded.append(both)
    folder.mkdir()
    count = min(BATCH * steps, len(kept) - HELD_OUT)
    for name, part in (("train", kept[:count]), ("test", kept[count : count + HELD_OUT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return encoded[:count]


def commands(row: str, model: str, folder: Path) -> dict[str, list[str]]:
    pairs = folder / "pairs" / "train.jsonl"
    flags = [part for key, value in TRAINING.items() for part in (f"--{key}", str(value))]
    recipe = row if row in ("orpo", "simpo", "reward") else "dpo"
    ours = [
        sys.executable, "-m", f"rlhf_recipes.recipes.{recipe}", "data=local", f"data.path={pairs}", "overwrite=true",
        f"data.test_path={pairs.with_name('test.jsonl')}", *FLOAT32,
        *(f"trainer.{key}={str(value).lower()}" for key, value in TRAINING.items()),
    ]  # fmt: skip
    trls = [
        str(Path(sys.executable).with_name("trl")), recipe, "--model_name_or_path", model, "--dataset_name",
        str(pairs.parent), "--output_dir", "trl", "--dtype", "float32", "--bf16", "False", "--use_peft",
        "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0.0", "--lora_target_modules", "all-linear",
        "--use_cpu", "True", "--report_to", "none", *flags,
        *(["--lora_task_type", "SEQ_CLS"] if recipe == "reward" else []),
    ]  # fmt: skip
    if row == "held-out":
        by = [sys.executable, str(script(folder, "measure.py", MEASURE)), model, str(pairs)]
        return {"ours": [*by, "true"], "without": [*by, "false"]}
    if row == "kept":
        return {"ours": [*ours, "trainer.precompute_ref_log_probs=true"], "trl": trls}
    if row == "sweep":
        return {"ours": [*ours, "sweep=dpo_beta", "sweep.prompts=0", f"hydra.sweep.dir={SWEPT}/betas"], "trl": trls}
    if row in ("orpo", "simpo"):
        return {"ours": ours, "by hand": [sys.executable, str(script(folder, "by_hand.py", BY_HAND)), recipe, model,
                                          str(pairs), json.dumps(TRAINING)]}  # fmt: skip
    return {"ours": ours, "trl": trls}


def script(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def measure(command: list[str], env: dict, folder: Path) -> tuple[float, float]:
    """Wall seconds, and the peak of the process in GiB."""
    shutil.rmtree(folder / SWEPT, ignore_errors=True)  # nothing is kept for another sweep
    begin = time.monotonic()
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        output.seek(0)
        if status:
            raise SystemExit(f"{' '.join(command)}\n{output.read()}")
    return seconds, usage.ru_maxrss / 2**20


def flops(row: str, encoded: list[list[tuple[list[int], int]]]) -> tuple[float, float]:
    """TFLOP of an epoch, ours and theirs: two for each weight of a product and token, four T for each width of
    attention; backward through frozen weights as much as forward.

    Ours: the tokens of a pair's row, and the answers through the head. Theirs: both rows, padded, and all through the
    head; of held-out pairs unpadded, and the answers.
    """
    layers, width, inner, words, keys = 30, 576, 1536, 49152, 192  # of SmolLM2-135M
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    passes = {"dpo": 3, "sweep": 3, "kept": 3, "held-out": 1}.get(row, 2)  # reference, forward, backward
    own_passes = 2 if row == "kept" else passes
    head = 0 if row == "reward" else words * width

    def cost(tokens: int, length: int, scored: int) -> float:
        return 2 * weights * tokens + 4 * layers * width * tokens * length + 2 * head * scored

    ours = theirs = 0.0
    for batch in (encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH)):
        longest = max(len(ids) for pair in batch for ids, _ in pair)
        padded = 2 * len(batch) * longest
        if row != "held-out":
            theirs += cost(padded, longest, padded)
        for (chosen, start), (rejected, other) in batch:
            answers = len(chosen) + len(rejected) - start - other
            if row == "held-out":
                theirs += sum(cost(len(ids), len(ids), 0) for ids in (chosen, rejected)) + cost(0, 0, answers)
            shared = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
            tokens = len(chosen) + len(rejected) - shared
            ours += cost(tokens, tokens, answers)
    if row == "sweep":  # the reference once
        return (5 * 2 + 1) * ours / 1e12, 5 * passes * theirs / 1e12
    return own_passes * ours / 1e12, passes * theirs / 1e12


def report(what: str, row: str, timings: dict[str, list[tuple[float, float]]], encoded: list) -> None:
    times = 5 if row == "sweep" else 1  # of TRL's command
    (ours, own_peak), (theirs, peak) = (map(statistics.median, zip(*runs, strict=True)) for runs in timings.values())
    own_flops, flops_there = flops(row, encoded)
    print(
        f"{what:11} {row:9} {ours:7.1f} s / {times * theirs:7.1f} s = {ours / (times * theirs):.2f}   "
        f"{own_peak:.2f} / {peak:.2f} GiB = {own_peak / peak:.2f}   "
        f"{own_flops:.1f} / {flops_there:.1f} TFLOP = {own_flops / flops_there:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
