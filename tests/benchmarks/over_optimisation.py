"""Does gold peak while the proxy climbs, and does the worst case of an ensemble move the peak?

    python tests/benchmarks/over_optimisation.py --seeds 0 1 2 --folder runs --plot over_optimisation.png

Gold is a rule: courtesy. An answer earns a point for each different courteous word, up to three, and loses half a
point for each one further or said again. For every seed the embedded model answers the clinic's prompts, gold labels
pairs of its answers, a quarter of the train labels is flipped, and four reward models learn from them
(`reward=ensemble`). Then two PPO runs without a KL penalty: against one of them, and against the worst case of the
four; gold is logged beside. Last, `recipes/audit.py` holds the best of n by both, and the checkpoints of both runs,
against gold, one page for each seed; the seeds together are printed and drawn.
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

import numpy as np

HERE = Path(__file__).parent
WORDS = "please|thank|thanks|sorry|welcome|glad|happy|appreciate|kindly|help|understand|certainly|pleasure|assist"
NAMES = {"single": "one reward model", "worst": "worst case of four"}
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
    "trainer.num_mini_batches=1",
    "trainer.per_device_train_batch_size=8",
    "trainer.gradient_accumulation_steps=3",
    f"trainer.max_completion_length={TOKENS}",
    "trainer.learning_rate=1e-3",
    "trainer.lr_scheduler_type=linear",
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
    parser.add_argument("--plot", type=Path, help="write the curves here")
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
        runs = [f"outputs/ppo/{name}_{seed}" for name in NAMES]
        given = [f"reward_model=outputs/reward/rm_{seed}", "data=local", f"data.path=pairs_{seed}.jsonl"]
        given += [f"checkpoints=[{','.join(runs)}]"]
        run("audit", f"seed_{seed}", [*given, *AUDIT], options.folder)
    together(options.seeds, options.folder, options.plot)


def label(seed: int) -> list[dict]:
    """Pairs of the model's answers to the clinic's prompts, by gold; a quarter of the train labels flipped."""
    import hydra

    from rlhf_recipes import config, inference, models, run
    from rlhf_recipes.data.load import load_prompts

    run.environment()
    from transformers import AutoModelForCausalLM

    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("evaluate")
    policy = models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)
    tokenizer = models.load_tokenizer(cfg.model)
    splits, dice, rows = load_prompts(cfg.data), random.Random(seed), []
    for split, prompts in (("train", splits.train), ("test", splits.test)):
        asked = [row["prompt"] for row in prompts for _ in range(SAMPLES)]
        how = inference.Sampling(TOKENS, temperature=1.0, seed=seed)
        answers = inference.generate(policy, tokenizer, asked, how, f"{split} answers")
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


def together(seeds: list[int], folder: Path, path: Path | None) -> None:
    """Gold against proxy over all seeds, from the answers and scores that the audits kept."""
    from rlhf_recipes.audit import overoptimisation
    from rlhf_recipes.stats import format_estimate

    best, runs = [], []
    for seed in seeds:
        answers, rewards_MC = kept(folder, seed, "best-of-n")
        shape = (-1, int(setting("samples")))
        golds = np.reshape(scored(answers), shape)
        alike = {"seed": seed, "prompt_ids": [f"{seed}: {i}" for i in range(len(golds))]}
        for name, proxy in (
            ("one reward model", rewards_MC[0]),
            ("worst case of four", worst(rewards_MC, rewards_MC)),
        ):
            best.append({"name": name, "proxy_PS": proxy.reshape(shape), "gold_PS": golds, **alike})
        for of, name in NAMES.items():
            rows, start = [], None
            for step in range(0, int(setting("max_steps")) + 1, int(setting("save_steps"))):
                answers, rewards_MC = kept(folder, seed, f"ppo-{of}_{seed}.{step}")
                start = rewards_MC if start is None else start
                proxy = rewards_MC[0] if of == "single" else worst(rewards_MC, start)
                kl = [answer["k1"] for answer in answers]
                rows.append({"step": step, "kl_P": kl, "proxy_P": proxy, "gold_P": scored(answers)})
            runs.append({"name": name, "rows": rows, **alike})
    section = overoptimisation.audit(best, runs)
    for figure in section["figures"]:
        print(f"{figure.key}: {format_estimate(figure.estimate)}  {figure.title}", flush=True)
    for table in section["tables"]:
        print(table["caption"], *(" | ".join(map(said, row)) for row in table["rows"]), sep="\n  ", flush=True)
    print("\n".join(section["notes"]), flush=True)
    if path:
        draw([plot for plot in section["plots"] if "gain over the start" in plot["caption"]], path)


def said(cell) -> str:
    from rlhf_recipes.stats import Estimate, format_estimate

    return format_estimate(cell) if isinstance(cell, Estimate) else str(cell)


def setting(key: str) -> str:
    return next(each for each in (*PPO, *AUDIT) if each.split("=")[0].endswith(key)).partition("=")[2]


def kept(folder: Path, seed: int, part: str) -> tuple[list[dict], "np.ndarray"]:
    """Answers of a part of a seed's audit, and their rewards by the four models, (M, C)."""
    scores = folder / "outputs" / "audit" / f"seed_{seed}" / "scores"
    answers = json.loads((scores / f"{part}.answers.json").read_text())["answers"]
    return answers, np.array([np.load(scores / f"{part}.{m}.npz")["rewards"] for m in range(4)])


def scored(answers: list[dict]) -> list[float]:
    return gold([[{"role": "assistant", "content": answer["text"]}] for answer in answers])


def worst(rewards_MC, reference_MK):
    from rlhf_recipes import ensemble

    return ensemble.combine(ensemble.standardise(rewards_MC, reference_MK), "min")


def draw(plots: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, plot in zip(figure.subplots(2, 2).flat, plots, strict=True):
        for series, colour in zip(plot["series"], ("#c9731a", "#2b7bba", "#7d858c"), strict=False):
            axes.plot(series["x"], series["y"], "." if series["points"] else "-", color=colour, label=series["name"])
            if series["low"]:
                axes.fill_between(series["x"], series["low"], series["high"], color=colour, alpha=0.15, linewidth=0)
        axes.set_title(plot["caption"].partition(": gain")[0], fontsize=10)
        axes.set_xlabel(plot["xlabel"])
        axes.set_ylabel(plot["ylabel"])
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
