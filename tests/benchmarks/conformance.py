"""Every training recipe, in each quantization, fresh and chained, by one process and by two: does a stack still do it?

    python tests/benchmarks/conformance.py                                  # in this environment; what is done stays
    python tests/benchmarks/conformance.py --model tiny --recipes dpo ppo --minutes 3
    python tests/benchmarks/conformance.py --newest --python python3.13     # on the newest releases that go together
    python tests/benchmarks/conformance.py --table                          # conformance.json into README.md

What a cell does and checks is said in conformance_cells.py. --newest installs the project, with no constraints and no
pre-release, in an environment of its own under --folder, which is made where it is not there, and anew where it has
another checkout. conformance.json has a record for each stack and model, a cell a line: "passed", or the check that
failed and why. A cell that has failed is tried again by --again; other versions of a library begin their record anew.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from conformance_cells import AT, DONE, MODELS, PAIRS, RUNS  # noqa: E402

FILE, README, WORKER = HERE / "conformance.json", HERE / "README.md", HERE / "conformance_cells.py"
RECIPES = ("sft", "reward", "dpo", "orpo", "simpo", "kto", "ppo", "rloo")
QUANTIZATIONS, STARTS, PROCESSES = ("nf4", "int8", "none"), ("fresh", "chained"), (1, 2)
STACKS = ("constraints", "newest")
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "hydra-core")
VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps({{"python": platform.python_version(), **{{name: version(name) for name in {LIBRARIES}}}}}))
"""
PLACE = "from importlib.util import find_spec; print(find_spec('rlhf_recipes').origin)"
PASSED = "passed"
SILENT = 900  # seconds in which no cell ends: it hangs
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
BEGIN, END = "<!-- by conformance.py -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--quantization", nargs="+", choices=QUANTIZATIONS, default=QUANTIZATIONS)
    parser.add_argument("--start", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--processes", nargs="+", type=int, choices=PROCESSES, default=PROCESSES)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no cell is begun")
    parser.add_argument("--again", action="store_true", help="what has failed, too")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "conformance", help="of the runs, a log")
    parser.add_argument("--newest", action="store_true", help="an environment of the newest releases")
    parser.add_argument("--python", default=sys.executable, help="of that environment")
    parser.add_argument("--table", action="store_true", help="write the table into README.md, and stop")
    asked = parser.parse_args()
    if asked.table:
        README.write_text(with_table(README.read_text(encoding="utf-8"), read()), encoding="utf-8")
        return
    stack, until = STACKS[asked.newest], time.monotonic() + 60 * asked.minutes
    folder = asked.folder.absolute() / f"{stack}-{asked.model}"
    folder.mkdir(parents=True, exist_ok=True)
    python = install(asked.folder.absolute() / "newest", asked.python) if asked.newest else sys.executable
    versions = json.loads(subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True).stdout)
    prepare(folder, asked.model)
    wanted = [
        f"{recipe} {quantization} {start} {processes}"
        for processes in asked.processes
        for quantization in asked.quantization
        for start in asked.start
        for recipe in asked.recipes
    ]
    record = Record(stack, asked.model, versions)
    names = record.pending(wanted, asked.again)
    for processes in sorted({1, *asked.processes}):
        needed = [name for name in RUNS if not (folder / name / "result.json").exists()] if processes == 1 else []
        of_these = [name for name in names if name.endswith(f" {processes}")]
        for name, failed, warned in run_cells(python, folder, asked.model, processes, needed + of_these, until):
            print(f"{name}: {failed or PASSED}", flush=True)
            if name not in RUNS:
                record.note(name, failed or PASSED, warned)
    print(f"{stack}, {asked.model} model: {record.said()}")


# ---- What has been found


def read() -> list[dict]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []


class Record:
    """What one stack has come to with one model, in conformance.json."""

    def __init__(self, stack: str, model: str, versions: dict[str, str]):
        self.others = [each for each in read() if (each["stack"], each["model"]) != (stack, model)]
        found = [each for each in read() if each not in self.others and each["versions"] == versions]
        new = {"stack": stack, "model": model, "date": "", "versions": versions, "warned": [], "cells": {}}
        self.found = found[0] if found else new

    def pending(self, wanted: list[str], again: bool) -> list[str]:
        """Those that are not done; what has failed comes last."""
        cells = self.found["cells"]
        return [n for n in wanted if n not in cells] + [n for n in wanted if again and cells.get(n, PASSED) != PASSED]

    def note(self, name: str, said: str, warned: list[str]) -> None:
        self.found["cells"][name] = without_folders(said)
        self.found["warned"] = sorted({*self.found["warned"], *map(without_folders, warned)})
        self.found["date"] = str(datetime.date.today())
        order = sorted(
            [*self.others, self.found], key=lambda each: (STACKS.index(each["stack"]), each["model"] != "embedded")
        )
        beside = FILE.with_suffix(".new")
        beside.write_text(json.dumps(order, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(FILE)

    def said(self) -> str:
        cells = self.found["cells"].values()
        return f"{sum(each == PASSED for each in cells)} of {len(cells)} cells passed"


# ---- Running


def install(environment: Path, python: str) -> Path:
    """Python of an environment with the newest releases and this checkout, which is made where there is none."""
    done, own = environment / "installed", environment / "bin" / "python"
    found = place_in(own) if done.exists() and own.exists() else None
    if found != (ROOT / "rlhf_recipes").resolve():
        print(f"Installing into {environment}{f', which has {found}' if found else ''} ...", flush=True)
        subprocess.run([python, "-m", "venv", "--clear", environment], check=True)
        pip = [own, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade"]
        subprocess.run([*pip, "--editable", ROOT], check=True)
        done.touch()
    return own


def place_in(python: Path) -> Path | None:
    """The folder of the package that is installed for a Python; None: it has none."""
    found = subprocess.run([python, "-I", "-c", PLACE], capture_output=True, text=True)
    return None if found.returncode else Path(found.stdout.strip()).parent.resolve()


def prepare(folder: Path, model: str) -> None:
    """Rows and, where it is asked for, the tiny model of the tests, of which all cells of a folder are."""
    rows = []
    for n in range(16):
        pair = {"chosen": f"Yes, come at {n}.", "rejected": f"No. Not at {n}, and not later."}
        answers = {side: [{"role": "assistant", "content": text}] for side, text in pair.items()}
        asked = [{"role": "user", "content": f"May I come on day {n}?"}]
        rows.append({"prompt": asked, **answers, "split": "train" if n < 12 else "test"})
    (folder / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if model == "tiny" and not (folder / "model" / "tokenizer.json").exists():
        sys.path.insert(0, str(HERE.parent))
        import conftest

        class Folder:
            mktemp = staticmethod(lambda _: folder)

        conftest.tiny_model.__wrapped__(Folder)


def run_cells(
    python: Path, folder: Path, model: str, processes: int, names: list[str], until: float
) -> Iterator[tuple[str, str, list[str]]]:
    """Each cell that ends, what has failed in it ("": nothing), and what libraries have warned of.

    They share a process, or two; where it dies, another goes on behind the cell that it died in.
    """
    while names and time.monotonic() < until:
        for file in (folder / AT, folder / DONE):
            file.unlink(missing_ok=True)
        seconds = min(until - time.monotonic(), 1e6)
        worker = [WORKER, model, f"{seconds:.0f}", *names]
        with (folder / "log").open("a") as log:
            process = subprocess.Popen(
                [python, *(TORCHRUN if processes > 1 else []), *worker], cwd=folder, env=environment(processes),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        ended = set()
        for name, failed, warned in lines(process, folder / DONE):
            ended.add(name)
            yield name, failed, warned
        died = (folder / AT).read_text() if process.returncode and (folder / AT).exists() else ""
        if died and died not in ended:
            ended.add(died)
            yield died, f"the process ended with {process.returncode}: {last_line(folder / 'log')}", []
        if not ended and process.returncode:
            sys.exit(f"no cell was begun: {last_line(folder / 'log')}\nAll of it: {folder / 'log'}")
        if not process.returncode and names[-1] not in ended:
            return  # no time is left
        names = [name for name in names if name not in ended]


def environment(processes: int) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1"}
    if processes > 1:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return {**os.environ, **own}


def lines(process: subprocess.Popen, file: Path) -> Iterator[tuple[str, str, list[str]]]:
    """What is written into the file until the process ends; one that is silent for long is killed."""
    read, heard, told = 0, time.monotonic(), set()
    while True:
        over = process.poll() is not None
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        for line in filter(None, text[read : text.rfind("\n") + 1].split("\n")):
            found = json.loads(line)
            if found["cell"] not in told:  # of two processes both may say so
                told.add(found["cell"])
                yield found["cell"], found["failed"], found["warned"]
            heard = time.monotonic()
        read = max(read, text.rfind("\n") + 1)
        if over:
            return
        if time.monotonic() - heard > SILENT and not over:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.2)


def last_line(log: Path) -> str:
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return said[-1][:200] if said else "nothing was said"


# ---- The table


def with_table(page: str, records: list[dict]) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{rest.partition(END)[2]}"


def table(records: list[dict]) -> str:
    """Versions, how many cells of a recipe passed of those that were run, and each that failed by name."""
    of_each = len(QUANTIZATIONS) * len(STARTS) * len(PROCESSES)
    stacks = {"constraints": "`constraints.txt`", "newest": "newest"}
    heads = [f"{stacks[each['stack']]}, {each['model']} model" for each in records]
    rows = [["", *heads], ["---"] * (len(records) + 1), ["date", *(each["date"] for each in records)]]
    rows += [[name, *(each["versions"][name] for each in records)] for name in ("python", *LIBRARIES)]
    for recipe in RECIPES:
        cells = [[said for name, said in each["cells"].items() if name.split()[0] == recipe] for each in records]
        rows.append([f"`{recipe}`", *(counted(own, of_each) for own in cells)])
    rows.append(["all", *(counted([*each["cells"].values()], of_each * len(RECIPES)) for each in records)])
    failed, warned = [], []
    for head, each in zip(heads, records, strict=True):
        bad = sorted((name, said) for name, said in each["cells"].items() if said != PASSED)
        failed += [f"- {head}: `{name}`: {plain(said)}" for name, said in bad]
        warned += [f"- {head}: {plain(said)}" for said in each["warned"]]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text += "\n\nFailed:\n\n" + "\n".join(failed) if failed else "\n\nFailed: none."
    return text + ("\n\nLibraries warned of what will be gone:\n\n" + "\n".join(warned) if warned else "")


def counted(cells: list[str], of: int) -> str:
    if not cells:
        return "not run"
    rest = f", {of - len(cells)} not run" if len(cells) < of else ""
    return f"{cells.count(PASSED)} of {len(cells)}{rest}"


def plain(said: str) -> str:
    """As text of a page: what a library says is no markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", said)


def without_folders(said: str) -> str:
    """What a library says of this machine's folders is nobody's."""
    return re.sub(r"(?<!\w)/\S*/", "…/", said)


if __name__ == "__main__":
    main()
