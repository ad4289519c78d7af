"""Preflight's prediction of the peak memory against what the run then took: six recipes at four sizes.

    python tests/benchmarks/preflight_predicts.py
    python tests/benchmarks/preflight_predicts.py --recipes dpo ppo --sizes small --folder kept

Every run takes two steps on rows of replies of the clinic set, one after another until they have the length that the
size asks for. `large` is SmolLM2-360M's shape with random weights: memory does not depend on what they are. Rows of
`varied` are as long as conversations of HH-RLHF, and a step takes four micro-batches of them.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RECIPES = ("sft", "reward", "dpo", "orpo", "simpo", "ppo")
# Sequences (pairs are two) of a micro-batch, tokens of the longest row.
SIZES = {"small": (2, 256), "medium": (4, 512), "large": (2, 512), "varied": (4, 512)}
ACCUMULATED = {"varied": 4}
# Tokens of a conversation of HH-RLHF: log-normal.
MEDIAN, SPREAD = 178, 0.7
LARGE = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}
STEPS = 2


def shortness(completions, **_) -> list[float]:
    return [-float(len(turns[0]["content"])) for turns in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    options = parser.parse_args()
    print("| recipe | size | predicted GiB | measured GiB | predicted / measured |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        for recipe in options.recipes:
            for size in options.sizes:
                overrides = [f"run_name={size}", *settings(recipe, size, folder)]
                result = folder / "outputs" / recipe / size / "result.json"
                if not result.exists():
                    run(recipe, overrides, folder)
                measured = peak(json.loads(result.read_text()))
                run(
                    recipe,
                    [*overrides, f"run_name={size}_preflight", "preflight=true", "preflight.measure=false"],
                    folder,
                )
                seen = json.loads((folder / "outputs" / recipe / f"{size}_preflight" / "preflight.json").read_text())
                predicted = seen["jobs"][0]["memory"]["peak_gib"]
                print(
                    f"| {recipe} | {size} | {predicted:.2f} | {measured:.2f} | {predicted / measured:.2f} |",
                    flush=True,
                )


def settings(recipe: str, size: str, folder: Path) -> list[str]:
    batch, tokens = SIZES[size]
    accumulated = ACCUMULATED.get(size, 1)
    rows = folder / f"{recipe}_{size}.jsonl"
    if not rows.exists():
        write_rows(rows, recipe, tokens, 8 * STEPS * batch * accumulated, varied=size == "varied")
    found = [f"data.path={rows}", "data=local", "data.test_size=4", f"trainer.per_device_train_batch_size={batch}"]
    found += [
        f"trainer.gradient_accumulation_steps={accumulated}",
        f"trainer.max_steps={STEPS}",
        "trainer.save_strategy=no",
    ]
    found += [f"model.path={large_model(folder)}"] if size == "large" else []
    if recipe != "ppo":
        return [*found, f"data.train_size={STEPS * batch * accumulated}", f"trainer.max_length={tokens}"]
    return [
        *found, f"max_prompt_length={tokens // 2}", f"trainer.max_completion_length={tokens // 4}",
        "trainer.value=separate", "trainer.missing_eos_penalty=null",
        "reward_funcs=preflight_predicts:shortness",
    ]  # fmt: skip


def write_rows(path: Path, recipe: str, tokens: int, count: int, varied: bool = False) -> None:
    """Rows of `tokens` tokens, about four characters each, or of up to so many; every prompt is another one."""
    clinic = HERE.parents[1] / "rlhf_recipes" / "assets" / "clinic" / "pairs.jsonl"
    replies = [json.loads(line)["chosen"] for line in clinic.read_text().splitlines()]
    replies = [reply if isinstance(reply, str) else reply[-1]["content"] for reply in replies]
    draw = random.Random(0)

    def text(length: int) -> str:
        words = " ".join(draw.sample(replies, 12)).split()
        return " ".join(words)[: 4 * length]

    whole = tokens // 2 if recipe == "ppo" else tokens
    lines = []
    for number in range(count):
        room = min(whole, max(120, int(draw.lognormvariate(math.log(MEDIAN), SPREAD)))) if varied else whole
        prompt = f"Case {number}. {text(room // 4 if recipe != 'ppo' else room - 60)}"
        size = room * 3 // 4 - 70
        lines.append({"prompt": prompt, "chosen": text(size), "rejected": text(size), "completion": text(size)})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def large_model(folder: Path) -> Path:
    """SmolLM2-360M's shape, with the embedded model's tokenizer."""
    path = folder / "large"
    if not (path / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from rlhf_recipes import embedded

        small = str(embedded.prepare())
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(small, **LARGE, head_dim=64)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        AutoTokenizer.from_pretrained(small).save_pretrained(path)
    return path


def run(recipe: str, overrides: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", f"rlhf_recipes.recipes.{recipe}", *overrides]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def peak(result: dict) -> float:
    """Of the device where there is one, else of the process."""
    peaks = result["peak_memory_gib"]
    return peaks.get("cuda", peaks["process"])


if __name__ == "__main__":
    main()
