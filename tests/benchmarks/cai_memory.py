"""Whether making and writing AI preference pairs takes more memory for more prompts.

    python tests/benchmarks/cai_memory.py --prompts 1000 10000 100000

For each number of prompts a process of its own runs `PairMaker.shards` and `dataset.write` with stub models whose
answers take no time, on prompts that are read one shard at a time. Printed are the highest resident memory of that
process in MiB (Linux), its growth over the first, pairs, and seconds.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    first + second for first in "bdfgklmnprst" for second in ("ab", "elo", "iru", "ona", "ut", "yse", "ol", "ami")
]


class Prompts:
    """`count` prompts that exist while they are looked at; every tenth is of the test split."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, part: slice):
        return [self._row(n) for n in range(*part.indices(self.count))]

    def _row(self, n: int) -> dict:
        prompt = [{"role": "user", "content": text(n, 16)}]
        split = "test" if n % 10 == 0 else "train"
        return {"prompt_id": f"{n:08d}", "family": f"family {n % 5}", "split": split, "prompt": prompt}


class Generator:
    name, places = "stub generator", 0

    def answer(self, requests, known, what):
        left = [request for request in requests if request.key not in known]
        for n in range(0, len(left), 64):
            yield [(request, self.reply(request)) for request in left[n : n + 64]]

    def reply(self, request):
        return {"text": f"{text(request.key, 20)}.", "finished": True, "prompt_tokens": 9, "tokens": 9}


class Grader(Generator):
    name = "stub judge"

    def reply(self, request):
        first, second = re.findall(r"\nReply [AB]:\n> (\w+)", request.messages[-1]["content"])
        return {"logps": [-0.2, -1.8] if first > second else [-1.8, -0.2], "prompt_tokens": 9, "tokens": 0}


def text(seed, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def work(count: int) -> dict:
    """What one process finds."""
    from omegaconf import OmegaConf

    from rlhf_recipes.cai import constitution, dataset, judge, make_pairs
    from rlhf_recipes.config import CONF

    cfg = OmegaConf.load(CONF / "cai.yaml")
    cfg.revise.n_revisions = cfg.judging.principles_per_pair = 1
    cfg.revise.few_shot = 0
    principles = constitution.load(OmegaConf.load(CONF / "constitution" / "general.yaml"))
    critic = judge.Judge(Grader(), principles, cfg.judging, cfg.seed)
    maker = make_pairs.PairMaker(Generator(), critic, principles, ["revision", "on_policy"], cfg)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shards = maker.shards(Prompts(count), Path(folder) / "shards")
        made = memory()
        found = dataset.write(shards, Path(folder), maker.provenance())
    funnel = found["funnel"]
    return {
        "made": made,
        "written": memory(),
        "pairs": funnel["pairs"],
        "accepted": funnel["routes"]["accepted"],
        "seconds": time.monotonic() - begin,
    }


def memory() -> float:
    """Highest resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work)))
        return
    first = None
    print(
        f"{'prompts':>9} {'pairs':>9} {'accepted':>9} {'peak making':>13} {'peak writing':>13} {'growth':>11} seconds"
    )
    for count in args.prompts:
        command = [sys.executable, __file__, "--work", str(count)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        first = first or found["written"]
        print(
            f"{count:9,} {found['pairs']:9,} {found['accepted']:9,} {found['made']:9.1f} MiB "
            f"{found['written']:9.1f} MiB {found['written'] - first:+7.1f} MiB {found['seconds']:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
