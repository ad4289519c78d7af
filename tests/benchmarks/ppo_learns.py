"""Does PPO learn? The embedded model, ten minutes for each run, several seeds, two rewards.

    python tests/benchmarks/ppo_learns.py --seeds 3 --plot ppo_learns.png

`vowels`: the share of words that begin with a vowel. Its optimum is 1, and no length reaches it. `reward model`: a run
of recipes/reward.py on the clinic pairs. Printed are the mean rewards of held-out prompts before and after with their
95 % intervals, their paired change, the KL to the reference, and the minutes. Run it alone on the machine.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
EPISODES = 48
TRAINING = [
    "trainer.value=head",
    # Every gradient from samples of the policy as it is: at few episodes, a second pass over them moves at random.
    "trainer.num_ppo_epochs=1",
    "trainer.per_device_train_batch_size=8",
    f"trainer.gradient_accumulation_steps={EPISODES // 8}",
    "trainer.max_completion_length=32",
    "trainer.learning_rate=4e-4",
    # The whole reward comes at the end, and there is no time to learn a critic: no bootstrapping from it.
    "trainer.lam=1.0",
    "trainer.value_learning_rate=2e-5",
    "trainer.missing_eos_penalty=null",
    # A share moves by tenths: at the default of 0.05 a nat would cost half of one.
    "trainer.kl_coef=0.01",
    "trainer.kl_controller=limit",
    "trainer.kl_target=6",
    "trainer.per_device_eval_batch_size=27",
    "trainer.save_strategy=no",
]
REWARDS = {"vowels": ["reward_funcs=ppo_learns:vowels"], "reward model": ["reward_funcs=outputs/reward/main"]}
UPDATES = {"vowels": 16, "reward model": 12}  # ten minutes: a reward model adds five seconds to each
REWARD_MODEL = ["trainer.learning_rate=5e-4", "trainer.per_device_train_batch_size=2", "data.eval_size=40"]


def vowels(completions, **_) -> list[float]:
    """The share of words that begin with a vowel; 0 for an answer without words."""
    words = [re.findall(r"[a-z]+", turns[0]["content"].lower()) for turns in completions]
    return [sum(word[0] in "aeiou" for word in each) / max(len(each), 1) for each in words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, help=f"rollouts of {EPISODES} episodes (default: {UPDATES})")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--plot", type=Path, help="write the curves here")
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    options = parser.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONPATH": str(HERE)}
    curves = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        if "reward model" in options.rewards:
            run("reward", "main", REWARD_MODEL, env, folder)
        for reward in options.rewards:
            for seed in range(options.seeds):
                name = f"{reward.replace(' ', '_')}_{seed}"
                steps = f"trainer.max_steps={options.updates or UPDATES[reward]}"
                seeded = [f"trainer.seed={seed}", steps, "data.eval_size=54"]
                run("ppo", name, [*TRAINING, *REWARDS[reward], *seeded], env, folder)
                result = Path(folder) / "outputs" / "ppo" / name
                curves[reward, seed] = describe(reward, seed, result)
    if options.plot:
        plot(curves, options.plot)


def run(recipe: str, name: str, overrides: list[str], env: dict, folder: Path | str) -> None:
    if not (Path(folder) / "outputs" / recipe / name / "result.json").exists():
        command = [sys.executable, "-m", f"rlhf_recipes.recipes.{recipe}", f"run_name={name}", *overrides]
        subprocess.run(command, env=env, cwd=folder, check=True)


def describe(reward: str, seed: int, folder: Path) -> list[dict]:
    """Print a line; return the rows of the log, one for each rollout."""
    from rlhf_recipes.run_folder import read_result
    from rlhf_recipes.stats import format_estimate

    result = read_result(folder)
    before, after = result["main"]["before"], result["main"]["after"]
    change = result["metrics"]["reward_change"]
    risen = "risen" if change.low > 0 else "not shown to rise"
    print(
        f"{datetime.date.today()} {reward}, seed {seed}: "
        f"{format_estimate(before)} -> {format_estimate(after)}, change {format_estimate(change)}, {risen}; "
        f"KL {format_estimate(result['metrics']['kl'])}; n {after.n}; {result['seconds'] / 60:.1f} minutes; "
        f"{result['stopped'] or 'to its end'}",
        flush=True,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def plot(curves: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    rewards = list(dict.fromkeys(reward for reward, _ in curves))
    figure = Figure(figsize=(9, 2.6 * len(rewards)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rewards), 2, squeeze=False)
    for (reward, seed), rows in curves.items():
        row = axes[rewards.index(reward)]
        for panel, key, title in (
            (row[0], "reward", f"{reward}: mean reward"),
            (row[1], "kl", "KL to the reference, nats"),
        ):
            panel.plot([r["step"] for r in rows], [r[key] for r in rows], label=f"seed {seed}", linewidth=1.2)
            panel.set_title(title, loc="left", fontsize=10)
            panel.set_xlabel(f"rollouts of {EPISODES} episodes")
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
