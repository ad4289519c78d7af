"""Five values of DPO's beta: one sweep against five runs of the same command.

    python tests/benchmarks/sweep_versus_runs.py --rounds 1

Clinic pairs, the embedded model in NF4; nothing is measured that a single run does not measure (sweep.prompts=0).
Printed are the seconds of both, their ratio, and whether the five adapters are the same bit for bit. Run it alone on
the machine.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BETAS = ("0.01", "0.03", "0.1", "0.3", "1.0")
SHARED = [
    "data.train_size=24",
    "data.eval_size=20",
    "trainer.learning_rate=1e-4",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=2",
    "trainer.precompute_ref_log_probs=true",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    ratios = []
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            run(folder, "sweep=dpo_beta", "sweep.prompts=0", *SHARED)
            sweep = time.monotonic() - begin
            begin = time.monotonic()
            for beta in BETAS:
                run(folder, f"trainer.beta={beta}", f"run_name=beta_{beta}", *SHARED)
            runs = time.monotonic() - begin
            outputs = Path(folder) / "outputs" / "dpo"
            same = [adapter(outputs / "dpo_beta" / f"beta={b}") == adapter(outputs / f"beta_{b}") for b in BETAS]
        ratios.append(sweep / runs)
        print(f"round {number}: sweep {sweep:.1f} s, five runs {runs:.1f} s; {sum(same)} of 5 adapters are the same")
    print(f"{datetime.date.today()} ratio {statistics.median(ratios):.2f}, {os.cpu_count()} CPUs")


def run(folder: str, *overrides: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-m", "rlhf_recipes.recipes.dpo", *overrides]
    subprocess.run(command, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def adapter(folder: Path) -> str:
    return json.loads((folder / "result.json").read_text())["adapter_sha256"]


if __name__ == "__main__":
    main()
