"""Whether the whole recipe takes more memory for more prompts, and how long it takes beside its models.

    python tests/benchmarks/cai_memory.py --prompts 1000 10000 100000 --plot cai_memory.png

For each number of prompts a process of its own runs `recipes/cai.py` on a file of them, from reading it to the data
set's card, with a stub engine as generator and judge: 64 places each, answers that take no time, prompts that go on
each by itself. Seven calls a prompt (draft, critique, revision, two samples, one question to the judge in both orders
for each of two pairs that are fit). Printed and drawn are the highest resident memory of that process (Linux), pairs,
seconds, and seconds of processor, which other work on the machine changes less; what the stub takes is in them.
"""

import argparse
import json
import random
import re
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
SMALL = (
    "constitution=general", "data=local", "data.path=prompts.jsonl", "data.train_size=null", "data.test_size=0.1",
    "data.eval_size=null", "gate.pairs=20", "gate.fails=ignore", "revise.n_revisions=1", "revise.few_shot=0",
    "judging.principles_per_pair=1",
)  # fmt: skip
WORDS = [
    first + second for first in "bdfgklmnprst" for second in ("ab", "elo", "iru", "ona", "ut", "yse", "ol", "ami")
]


class Engine:
    name, model, places, concurrency = "stub generator", "stub", 64, 64

    def connected(self):
        return [SimpleNamespace(base_url="stub", is_out=False, close=lambda: None)]

    def listed(self, endpoint):
        return []

    def introduced(self, endpoint):
        return {"text": "", "served": {"model": None, "tokens": [["A", {"A": 0.0}]]}}

    def answer(self, requests, known, what):
        yield [(request, self.reply(request)) for request in requests if request.key not in known]

    def taken(self, endpoint, request):
        return self.reply(request)

    def reply(self, request):
        return {"text": f"{text(request.key, 20)}.", "finished": True, "prompt_tokens": 9, "tokens": 9}


class Grader(Engine):
    name = "stub judge"

    def reply(self, request):
        if not request.options:
            return super().reply(request)
        first, second = re.findall(r"\nReply [AB]:\n> ?(\S*)", request.messages[-1]["content"])
        return {"logps": [-0.2, -1.8] if first > second else [-1.8, -0.2], "prompt_tokens": 9, "tokens": 0}


def text(seed, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def work(path: Path) -> None:
    """One process: the recipe on prompts.jsonl of the working directory; what it took goes to a file."""
    from rlhf_recipes.cai import load
    from rlhf_recipes.cai.judge import Judge

    load.load = lambda cfg, parent, named, principles: (Engine(), Judge(Grader(), principles, cfg.judging, cfg.seed))
    sys.argv = ["cai.py", *SMALL]
    begin = time.monotonic()
    runpy.run_path(str(ROOT / "recipes" / "cai.py"), run_name="__main__")
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"peak": used.ru_maxrss / 1024, "seconds": time.monotonic() - begin}  # MiB
    path.write_text(json.dumps(found | {"processor": used.ru_utime + used.ru_stime}))


def measure(count: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "prompts.jsonl").open("w") as file:
            for n in range(count):
                file.write(json.dumps({"prompt": text(n, 16), "family": f"family {n % 5}"}) + "\n")
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--work", str(found)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        funnel = json.loads((Path(folder) / "outputs/cai/main/funnel.json").read_text())
        return {"prompts": count, **json.loads(found.read_text()), "pairs": funnel["pairs"], **funnel["routes"]}


def draw(rows: list[dict], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=110, layout="constrained")
    for axis, key, name in zip(
        figure.subplots(1, 2), ("peak", "seconds"), ("peak memory, MiB", "seconds"), strict=True
    ):
        axis.plot([row["prompts"] for row in rows], [row[key] for row in rows], "o-", color="#4a8f6d")
        axis.set_xscale("log")
        axis.set_yscale("log" if key == "seconds" else "linear")
        if key == "peak":
            axis.set_ylim(0, 1.2 * max(row[key] for row in rows))
        axis.set_xlabel("prompts")
        axis.set_title(name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--plot")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    rows = []
    print(f"{'prompts':>9} {'pairs':>9} {'accepted':>9} {'peak':>9} {'growth':>9} seconds processor")
    for count in args.prompts:
        row = measure(count)
        rows.append(row)
        print(
            f"{count:9,} {row['pairs']:9,} {row['accepted']:9,} {row['peak']:6.1f} MiB "
            f"{row['peak'] - rows[0]['peak']:+6.1f} MiB {row['seconds']:7.0f} {row['processor']:9.0f}",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2))
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
