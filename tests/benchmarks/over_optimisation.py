"""Does gold peak while the proxy climbs, and does the worst case of an ensemble move the peak?

    python tests/benchmarks/over_optimisation.py --seeds 0 1 2 --folder runs

Gold is a rule: courtesy. An answer earns a point for each different courteous word, up to three, and loses half a
point for each one further or said again. For every seed the embedded model answers the clinic's prompts, gold labels
pairs of its answers, a quarter of the train labels is flipped, and four reward models learn from them
(`reward=ensemble`). Then two PPO runs without a KL penalty: against one of them, and against the worst case of the
four; gold is logged beside. Last, `recipes/audit.py` holds the best of n by both, and the checkpoints of both runs,
against gold, one page for each seed.
"""

import argparse
import datetime
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WORDS = "please|thank|thanks|sorry|welcome|glad|happy|appreciate|kindly|help|understand|certainly|pleasure|assist"
SAMPLES, PAIRS, TOKENS, FLIPPED = 6, 2, 24, 0.25
REWARD = [
    "trainer.learning_rate=5e-4",
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=2",
    "trainer.save_strategy=no",
    "sweep.prompts=0",
    "preflight.measure=false",
    "data.eval_size=48",
]
PPO = [
    "trainer.value=head",
    "trainer.num_ppo_epochs=1",
    "trainer.per_device_train_batch_size=8",
    "trainer.gradient_accumulation_steps=3",
    f"trainer.max_completion_length={TOKENS}",
    "trainer.learning_rate=1e-3",
    "trainer.lam=1.0",
    "trainer.value_learning_rate=2e-5",
    "trainer.missing_eos_penalty=null",
    "trainer.kl_coef=0",
    "trainer.kl_brake=null",
    "trainer.max_steps=16",
    "trainer.save_steps=2",
    "trainer.save_total_limit=null",
    "trainer.per_device_eval_batch_size=8",
    "data.eval_size=8",
]

AUDIT = [
    "gold=over_optimisation:gold",
    "samples=64",
    "prompts=16",
    f"max_new_tokens={TOKENS}",
    "data.eval_size=32",
    "ledger_pairs=4",
    "stress=null",
    "stress_pairs=0",
    "probe_pairs=0",
    "credit_pairs=0",
]


def gold(completions, **_) -> list[float]:
    """Different courteous words up to three, less half of those that are further or repeated."""
    found = [re.findall(rf"\b(?:{WORDS})\b", turns[0]["content"].lower()) for turns in completions]
    return [min(len(set(words)), 3) - 0.5 * (len(words) - min(len(set(words)), 3)) for words in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="what is finished there is not run again")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        pairs = options.folder / f"pairs_{seed}.jsonl"
        if not pairs.exists():
            pairs.write_text("".join(json.dumps(row) + "\n" for row in label(seed)))
        local = ["data=local", f"data.path={pairs.name}"]
        run("reward", f"rm_{seed}", ["reward=ensemble", *local, *REWARD], options.folder, "member_3")
    for seed in options.seeds:
        models = f"outputs/reward/rm_{seed}"
        for name, proxy, count in (("single", f"{models}/member_0", 1), ("worst", models, 4)):
            rewards = [f"reward_funcs=[{proxy},over_optimisation:gold]", f"trainer.seed={seed}"]
            how = [f"trainer.reward_weights={[1.0] * count + [0.0]}", "trainer.reward_ensemble=min"]
            run("ppo", f"{name}_{seed}", [*PPO, *rewards, *how], options.folder)
            describe(name, seed, options.folder / "outputs" / "ppo" / f"{name}_{seed}")
    for seed in options.seeds:
        runs = [f"outputs/ppo/{name}_{seed}" for name in ("single", "worst")]
        given = [f"reward_model=outputs/reward/rm_{seed}", "data=local", f"data.path=pairs_{seed}.jsonl"]
        given += [f"checkpoints=[{','.join(runs)}]"]
        run("audit", f"seed_{seed}", [*given, *AUDIT], options.folder)
        tell(seed, options.folder / "outputs" / "audit" / f"seed_{seed}" / "audit.json")


def label(seed: int) -> list[dict]:
    """Pairs of the model's answers to the clinic's prompts, by gold; a quarter of the train labels flipped."""
    import hydra

    from rlhf_recipes import config, data, models, run
    from rlhf_recipes.evaluation import measure

    run.environment()
    from transformers import AutoModelForCausalLM

    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("evaluate")
    policy = models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)
    tokenizer = models.load_tokenizer(cfg.model)
    splits, dice, rows = data.load_prompts(cfg.data), random.Random(seed), []
    for split, prompts in (("train", splits.train), ("test", splits.test)):
        asked = [row["prompt"] for row in prompts for _ in range(SAMPLES)]
        answers = measure.generate(
            policy, tokenizer, asked, max_new_tokens=TOKENS, temperature=1.0, seed=seed, what=f"{split} answers"
        )
        texts = [answer["text"] for answer in answers]
        scores = gold([[{"role": "assistant", "content": text}] for text in texts])
        for n, prompt in enumerate(prompts):
            own = list(zip(scores, texts, strict=True))[n * SAMPLES : (n + 1) * SAMPLES]
            different = [(a, b) for i, a in enumerate(own) for b in own[:i] if a[0] != b[0] and a[1] and b[1]]
            for pair in dice.sample(different, min(PAIRS, len(different))):
                worse, better = sorted(pair)
                if split == "train" and dice.random() < FLIPPED:
                    worse, better = better, worse
                rows.append(
                    {"prompt": prompt["prompt"], "chosen": [_said(better)], "rejected": [_said(worse)], "split": split}
                )
    return rows


def _said(answer: tuple[float, str]) -> dict:
    return {"role": "assistant", "content": answer[1]}


def run(recipe: str, name: str, overrides: list[str], folder: Path, last: str = ".") -> None:
    if not (folder / "outputs" / recipe / name / last / "result.json").exists():
        command = [sys.executable, "-m", f"rlhf_recipes.recipes.{recipe}", f"run_name={name}", *overrides]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE)}, cwd=folder, check=True)


def describe(name: str, seed: int, folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [f"{r['kl']:.1f}: {r['reward']:+.2f} {r['rewards/gold']:+.2f}" for r in rows if "rewards/gold" in r]
    print(f"{datetime.date.today()} {name}, seed {seed}; KL: proxy, gold  " + "  ".join(said), flush=True)


def tell(seed: int, path: Path) -> None:
    from rlhf_recipes.stats import format_estimate

    parts = {part["key"]: part for part in json.loads(path.read_text())["sections"]}
    for figure in parts["overoptimisation"]["figures"]:
        print(f"seed {seed}, {figure['title']}: {format_estimate(figure['estimate'])}", flush=True)
    print("\n".join(f"seed {seed}, {note}" for note in parts["overoptimisation"]["notes"]), flush=True)


if __name__ == "__main__":
    main()
