"""Does the doctor see what is wrong, and nothing where nothing is? Good and bad runs of the embedded model.

    python tests/benchmarks/doctor_runs.py --folder runs --seeds 1 2 3
    python tests/benchmarks/doctor_runs.py --folder runs --seeds 1 2 3 --ppo learned/outputs/ppo

A bad run has one fault, and the rule that should name it. Printed are a line for each run and a table: of each rule,
the bad runs that it named among those made for it, and the good runs in which it said anything. Runs that are finished
are kept: interrupted, the same command continues. A run takes one to three minutes on one thread (OMP_NUM_THREADS=1).

`--ppo` reads finished PPO runs again from their logs, as good ones: those of ppo_learns.py take half an hour each.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
CLINIC = HERE.parents[1] / "rlhf_recipes" / "assets" / "clinic" / "pairs.jsonl"
SHORT = ["quantization=none", "trainer.max_length=120", "trainer.save_strategy=no", "trainer.logging_steps=1",
         "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1"]  # fmt: skip
PAIRS = [*SHORT, "data.eval_size=40", "trainer.max_steps=20"]
POLICY = [*PAIRS, "trainer.learning_rate=3e-4"]
REWARD = [*PAIRS, "trainer.learning_rate=5e-4", "trainer.max_steps=36"]
LONGER = ["trainer.max_length=160", "data.eval_size=54", "trainer.learning_rate=1e-3", "trainer.max_steps=24"]
BRIEF = ["data.eval_size=8", "trainer.max_steps=6"]  # where the log says it all
PPO = ["quantization=none", "trainer.num_mini_batches=1", "trainer.per_device_train_batch_size=8",
       "trainer.gradient_accumulation_steps=1", "trainer.max_completion_length=16", "trainer.max_steps=8",
       "trainer.learning_rate=3e-3", "trainer.lam=0.95", "trainer.missing_eos_penalty=null",
       "trainer.kl_coef=0.0", "trainer.kl_brake=null", "trainer.entropy_floor=null", "trainer.save_strategy=no",
       "trainer.per_device_eval_batch_size=8", "data.eval_size=8"]  # fmt: skip

# name -> recipe, overrides
GOOD = {
    "dpo": ("dpo", POLICY),
    "reward": ("reward", REWARD),
    # What a sum of log-probabilities shows at once, an average over tokens shows later.
    "simpo": ("simpo", [*POLICY, *LONGER]),
    "orpo": ("orpo", [*POLICY, *LONGER, "trainer.beta=1.0"]),
}
# name -> rule, recipe, overrides, what else is done to it
BAD = {
    "overflow": ("not_finite", "dpo", [*POLICY, *BRIEF, "trainer.learning_rate=1e20", "doctor=strict"], None),
    "dead_on_cpu": ("dead_gradients", "dpo", [*POLICY, *BRIEF, "quantization=nf4"], "dead_gradients"),
    "rate_of_zero": ("dead_gradients", "dpo", [*POLICY, *BRIEF, "trainer.learning_rate=0.0"], None),
    "policy_elsewhere": ("wrong_reference", "dpo", [*POLICY, *BRIEF, "trainer.max_steps=2"], "move_policy"),
    "own_reference": ("wrong_reference", "dpo", [*POLICY, *BRIEF], "no_reference"),
    "far_too_high_rate": ("likelihood_displacement", "dpo", [*POLICY, "trainer.learning_rate=3e-3",
                          "trainer.max_steps=16"], None),
    "simpo_too_high_rate": ("likelihood_displacement", "simpo", [*POLICY, "trainer.learning_rate=3e-3"], None),
    "longer_labels": ("length_drift", "reward", [*REWARD, "data=local", "data.path=longer.jsonl"], None),
    "all_longer": ("length_drift", "dpo", [*POLICY, "data=local", "data.path=all_longer.jsonl", "trainer.max_steps=4"],
                   None),
    "no_penalty": ("kl_runaway", "ppo", [*PPO, "reward_funcs=doctor_runs:letters_e"], None),
    "one_word": ("collapse", "ppo", [*PPO, "reward_funcs=doctor_runs:same_word", "trainer.max_steps=24"], None),
    "equal_rewards": ("reward_saturation", "ppo", [*PPO, "reward_funcs=doctor_runs:nothing", "trainer.max_steps=5"],
                      None),
    "far_margins": ("reward_saturation", "dpo", [*POLICY, "data.train_size=6", "data.eval_size=8", "trainer.beta=2.0",
                    "trainer.learning_rate=1e-3", "trainer.max_steps=30"], None),
    "flipped_labels": ("reward_against_preference", "dpo", [*POLICY, "data=local", "data.path=flipped.jsonl"], None),
    "by_heart": ("over_fitting", "reward", [*REWARD, "data=local", "data.path=random.jsonl", "data.train_size=6",
                 "data.eval_size=24"], None),
    "random_labels": ("label_noise", "reward", [*REWARD, "data=local", "data.path=random.jsonl"], None),
    "cut_replies": ("no_eos", "sft", [*SHORT, *BRIEF, "trainer.max_length=72", "data.too_long=truncate"], None),
    "eight_tokens": ("no_eos", "ppo", [*PPO, "reward_funcs=doctor_runs:letters_e", "trainer.max_completion_length=8",
                     "trainer.learning_rate=1e-5"], None),
    "few_rows": ("too_little_data", "dpo", [*POLICY, *BRIEF, "data.train_size=6", "trainer.learning_rate=5e-6"], None),
}  # fmt: skip


# ---- Rewards that are easy to please


def letters_e(completions, **_) -> list[float]:
    """The share of the letters that are an e."""
    texts = [re.sub("[^a-z]", "", turns[0]["content"].lower()) for turns in completions]
    return [text.count("e") / max(len(text), 1) for text in texts]


def same_word(completions, **_) -> list[float]:
    """The share of the words that are the most frequent one."""
    words = [turns[0]["content"].split() for turns in completions]
    return [max(Counter(each).values(), default=0) / max(len(each), 1) for each in words]


def nothing(completions, **_) -> list[float]:
    return [0.5] * len(completions)


# ---- Data with a fault, in the training rows alone unless said


def write_data(folder: Path) -> None:
    pairs = [json.loads(line) for line in CLINIC.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    faults = {
        "flipped": lambda pair: pair["split"] == "train",
        "random": lambda pair: pair["split"] == "train" and draw.random() < 0.5,
        "longer": lambda pair: pair["split"] == "train" and len(pair["chosen"]) < len(pair["rejected"]),
        "all_longer": lambda pair: len(pair["chosen"]) < len(pair["rejected"]),
    }
    for name, swap in faults.items():
        rows = [
            {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if swap(pair) else pair for pair in pairs
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# ---- Faults of the trainer


def move_policy() -> None:
    """The policy starts somewhere else than its reference."""
    import torch

    from rlhf_recipes import models

    def moved(trainer, parent):
        keep(trainer, parent)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)

    keep, models.keep_adapter_in_float32 = models.keep_adapter_in_float32, moved


def no_reference() -> None:
    """The policy's own log-probabilities pass for the reference's."""
    from trl.trainer import dpo_trainer

    dpo_trainer.use_adapter = lambda *_, **__: contextlib.nullcontext()


def dead_gradients() -> None:
    """bitsandbytes may repack its weights: on a CPU with AVX512-BF16."""
    from rlhf_recipes import models

    models.keep_gradients_on_cpu = lambda model: None


# ---- Running and counting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keep the runs here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the good runs")
    parser.add_argument("--bad-seeds", type=int, nargs="+", default=[1], help="of the bad runs")
    parser.add_argument("--only", nargs="+", default=[*GOOD, *BAD], help="names of runs")
    parser.add_argument("--ppo", type=Path, help="a folder of finished PPO runs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_data(options.folder)
    os.environ["PYTHONPATH"] = str(HERE)
    trainers = [f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "reward")]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rlhf_recipes.models", "peft", "matplotlib.figure", *trainers])
    rows = []
    for name in options.only:
        good = name in GOOD
        rule, recipe, overrides, fault = (None, *GOOD[name], None) if good else BAD[name]
        for seed in options.seeds if good else options.bad_seeds:
            folder = options.folder / f"{name}_{seed}"
            begin = time.monotonic()
            if not (folder / "result.json").is_file():
                seeded = [*overrides, f"trainer.seed={seed}", f"hydra.run.dir={folder.name}", "overwrite=true"]
                process = server.Process(target=launch, args=(recipe, seeded, str(options.folder), fault))
                process.start()
                process.join()
            if (folder / "result.json").is_file():
                rows.append((name, seed, rule, examined(folder)))
                print(describe(*rows[-1], time.monotonic() - begin), flush=True)
            else:
                print(f"{name} {seed}: did not finish, see {folder}.log", flush=True)
    for folder in sorted(options.ppo.iterdir()) if options.ppo else []:
        if (folder / "result.json").is_file():
            rows.append((folder.name, "", None, examined(folder)))
            print(describe(*rows[-1], 0.0), flush=True)
    print(table(rows))


def launch(recipe: str, overrides: list[str], cwd: str, fault: str | None) -> None:
    """What `python -m rlhf_recipes.recipes.<recipe> <overrides>` does, with a fault put in."""
    from importlib import import_module

    os.chdir(cwd)
    sys.argv = [recipe, *overrides]
    name = next(text.partition("=")[2] for text in overrides if text.startswith("hydra.run.dir="))
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if fault:
        globals()[fault]()
    import_module(f"rlhf_recipes.recipes.{recipe}").main()


def examined(folder: Path, until: int | None = None) -> dict:
    """The report of a finished run by the rules as they are, from its files; `until` a step: what they say while it
    trains, when nothing is held out."""
    from omegaconf import OmegaConf

    from rlhf_recipes.config import build
    from rlhf_recipes.run_folder import read_result
    from rlhf_recipes.training import doctor
    from rlhf_recipes.training.doctor_record import Record

    result = read_result(folder)
    config = OmegaConf.load(folder / "config.yaml")
    args = build(config.trainer, "trainer", output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return doctor.examine(
        Record(
            result["recipe"],
            [row for row in log if "loss" in row and (until is None or row["step"] <= until)],
            args,
            log[-1]["max_steps"],
            result.get("doctor", {}).get("facts", {}),
            *((result["before"], result["metrics"], result.get("stopped")) if until is None else ()),
        )
    )


def describe(name: str, seed, rule: str | None, report: dict, seconds: float) -> str:
    seen = [f"{finding['rule']} ({finding['level']})" for finding in report["findings"]]
    right = rule in [finding["rule"] for finding in report["findings"]] if rule else not seen
    return f"{'ok  ' if right else 'MISS'} {name} {seed}: {', '.join(seen) or 'healthy'} [{seconds:.0f} s]"


def table(rows: list[tuple]) -> str:
    from rlhf_recipes.training.doctor_record import HEALTHY
    from rlhf_recipes.training.doctor_rules import RULES

    good = [report for _, _, rule, report in rows if rule is None]
    lines = ["| rule | bad runs named | good runs with an alarm |", "| --- | --- | --- |"]
    for rule in (rule.__name__ for rule in RULES):
        made = [report for _, _, wanted, report in rows if wanted == rule]
        named, alarms = (
            sum(any(finding["rule"] == rule for finding in report["findings"]) for report in reports)
            for reports in (made, good)
        )
        lines.append(f"| {rule.replace('_', ' ')} | {named} of {len(made)} | {alarms} of {len(good)} |")
    healthy = sum(report["verdict"] == HEALTHY for report in good)
    return "\n".join([*lines, f"{healthy} of {len(good)} good runs healthy."])


if __name__ == "__main__":
    main()
