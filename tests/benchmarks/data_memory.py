"""Seconds and memory of pairs from a file to what a trainer takes, beside `datasets.load_dataset` of the same file.

    python tests/benchmarks/data_memory.py --rows 10000 200000 1000000 [--only read ready fitted load_dataset]

Each row of the .jsonl is a pair of about 300 words (prompt and two answers of 400 characters each); each figure is of
a process of its own:

- read: `load_pairs`;
- ready: `load_pairs` and `Splits.to_datasets`;
- fitted: `load_pairs`, `fit` with a tokenizer whose tokens are words, and `Splits.to_datasets`;
- load_dataset: `datasets.load_dataset("json", ...)` alone, its cache empty.

Printed are seconds, those of CPU time, rows for each of these, the highest resident memory and the highest private
memory (RssAnon, looked at every 20 ms; pages of mapped files are no part of it), and by how many bytes a row both grow
over the first number of rows. Linux.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WORDS = [
    first + second for first in "bdfgklmnprst" for second in ("ab", "elo", "iru", "ona", "ut", "yse", "ol", "ami")
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIB = 2**20
SIDES = ("prompt", "chosen", "rejected")


def write(path: Path, count: int) -> None:
    rng = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            row = {side: f"{side} {n} " + " ".join(rng.choices(WORDS, k=92)) for side in SIDES}
            file.write(json.dumps(row) + "\n")


def tokenizer():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<|unknown|>", "<|im_start|>", "<|im_end|>"]
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*names, *SIDES, *WORDS])}, names[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, chat_template=CHATML, unk_token=names[0], eos_token=names[2], pad_token=names[0]
    )


def work(what: str, path: str) -> dict:
    """What one process takes, after its libraries are there."""
    import datasets
    from omegaconf import OmegaConf

    from rlhf_recipes.config import CONF
    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.load import load_pairs

    node = OmegaConf.merge(OmegaConf.load(CONF / "data" / "base.yaml"), {"path": path, "test_size": 0.01})
    words = tokenizer() if what == "fitted" else None
    private = Private()
    begin, used = time.monotonic(), time.process_time()
    if what == "load_dataset":
        with tempfile.TemporaryDirectory() as cache:
            rows = len(datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache))
    else:
        splits = load_pairs(node)
        if what == "fitted":
            splits = fit(splits, words, 512)
        if what != "read":
            splits.to_datasets()
        rows = len(splits.train) + len(splits.test)
    spent = {"seconds": time.monotonic() - begin, "cpu": time.process_time() - used}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": rows, **spent, "resident": peak, "private": private.highest()}


class Private:
    """Looks at the process's private memory until it is asked."""

    def __init__(self):
        self._most, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._end.wait(0.02):
            said = Path("/proc/self/status").read_text(encoding="ascii").partition("RssAnon:")[2]
            self._most = max(self._most, 1024 * int(said.split()[0]))

    def highest(self) -> int:
        self._end.set()
        self._thread.join()
        return self._most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["read", "ready", "fitted", "load_dataset"]
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(*args.work)))
        return
    first: dict[str, dict] = {}
    print("| | rows | s | CPU s | rows per CPU s | peak MiB | private MiB | bytes a row more | of it private |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.rows:
            path = Path(folder) / f"{count}.jsonl"
            write(path, count)
            for what in args.only:
                command = [sys.executable, __file__, "--work", what, str(path)]
                found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])
                less = first.setdefault(what, found)
                more = ["", ""]
                if found is not less:
                    more = [f"{(found[k] - less[k]) / (count - args.rows[0]):.0f}" for k in ("resident", "private")]
                spent = f"{found['seconds']:.1f} | {found['cpu']:.1f} | {count / found['cpu']:,.0f}"
                print(
                    f"| {what} | {count:,} | {spent} "
                    f"| {found['resident'] / MIB:.0f} | {found['private'] / MIB:.0f} | {' | '.join(more)} |",
                    flush=True,
                )
            path.unlink()


if __name__ == "__main__":
    main()
