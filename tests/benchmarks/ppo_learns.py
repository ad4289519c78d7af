"""Does the default PPO learn? The embedded model, half an hour for each run, several seeds.

    python tests/benchmarks/ppo_learns.py --plot ppo_learns.png
    python tests/benchmarks/ppo_learns.py --value separate --folder runs

Its reward is a run of recipes/reward.py on the clinic pairs; of `trainer` only `max_steps` and seed are set. Printed
are the mean rewards of the held-out prompts before and after with their 95 % intervals, their paired change, the KL to
the reference, and the minutes. Run it alone on the machine.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 16  # two for each rollout
REWARD_MODEL = ["trainer.learning_rate=5e-4", "trainer.per_device_train_batch_size=2", "data.eval_size=40"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--value", choices=("head", "separate"), help="another critic than the default")
    parser.add_argument("--plot", type=Path, help="write the curves here")
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    options = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        run("reward", "main", REWARD_MODEL, folder)
        for seed in range(options.seeds):
            name = "_".join(filter(None, ("seed", options.value, str(seed))))
            overrides = [
                "reward_funcs=outputs/reward/main",
                f"trainer.max_steps={options.steps}",
                f"trainer.seed={seed}",
            ]
            overrides += [f"trainer.value={options.value}"] if options.value else []
            run("ppo", name, overrides, folder)
            curves[seed] = describe(seed, folder / "outputs" / "ppo" / name)
    if options.plot:
        plot(curves, options.plot)


def run(recipe: str, name: str, overrides: list[str], folder: Path) -> None:
    """A run that was interrupted goes on."""
    if not (folder / "outputs" / recipe / name / "result.json").exists():
        command = [sys.executable, "-m", f"rlhf_recipes.recipes.{recipe}", f"run_name={name}", *overrides]
        threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, cwd=folder, check=True)


def describe(seed: int, folder: Path) -> list[dict]:
    """Print a line; return the first row of the log of each rollout."""
    from rlhf_recipes.run_folder import read_result
    from rlhf_recipes.stats import format_estimate

    result = read_result(folder)
    before, after = result["main"]["before"], result["main"]["after"]
    change, kl = result["metrics"]["reward_change"], result["metrics"]["kl"]
    risen = "risen" if change.low > 0 else "not shown to rise"
    print(
        f"{datetime.date.today()} seed {seed}: {format_estimate(before)} -> {format_estimate(after)}, "
        f"change {format_estimate(change)}, {risen}; KL {format_estimate(kl)}; n {after.n}; "
        f"{result['seconds'] / 60:.1f} minutes; {result['stopped'] or 'to its end'}",
        flush=True,
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("ratio/max") == 1]


def plot(curves: dict[int, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), dpi=100, layout="constrained")
    panels = (
        ("reward", "Mean reward of the answers"),
        ("kl", "KL to the reference, nats"),
        ("completions/eos_rate", "Share of answers that end"),
    )
    for panel, (key, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for seed, rows in curves.items():
            panel.plot(range(1, len(rows) + 1), [row[key] for row in rows], label=f"seed {seed}", linewidth=1.2)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("rollout of 64 episodes")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
