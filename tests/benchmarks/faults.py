"""Every fault in every recipe: what is finished is never lost, and the same command ends with the same bits.

    python tests/benchmarks/faults.py --json faults.json                       # all of it
    python tests/benchmarks/faults.py --json faults.json --minutes 3           # a slice; the same command goes on
    python tests/benchmarks/faults.py --json faults.json --only killed edited --recipes dpo cai
    python tests/benchmarks/faults.py --json faults.json --minutes 0           # the table of what was done

Each recipe runs on the tiny model of the tests, as a fork of a Python that has imported the libraries, once
undisturbed and then with one fault after another; each time the same command is given again, and what it comes to is
compared with the undisturbed run: weights (cai: rows) and held-out figures bit for bit, and the names of all files. A
kill is one of up to five of a run. Counted are faults that were tried, those after which exit status and lines were as
documented and the run came to its end, and those after which it ended with the same bits.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
LIMIT = 120  # seconds that no run takes
CHAIN = 5  # kills of a run
STEPS = ("quantization=none", "data=local", "data.path=rows.jsonl", "data.train_size=12", "data.eval_size=4",
         "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1", "trainer.max_steps=6",
         "trainer.save_steps=1", "trainer.logging_steps=1", "trainer.learning_rate=1e-3")  # fmt: skip
SAMPLED = ("reward_funcs=warm_processes:short", "trainer.max_completion_length=6", "trainer.normalize_rewards=true")
RECIPES = {
    "sft": (*STEPS, "lora.lora_dropout=0.1"),
    "reward": (*STEPS, "lora.lora_dropout=0.1", "trainer.disable_dropout=false"),
    "dpo": STEPS,
    "orpo": STEPS,
    "simpo": STEPS,
    "kto": STEPS,
    "ppo": (*STEPS, *SAMPLED, "trainer.num_ppo_epochs=2", "trainer.kl_controller=adaptive"),
    "rloo": (*STEPS, *SAMPLED, "trainer.num_generations=2", "trainer.num_iterations=2",
             "trainer.per_device_train_batch_size=4"),
    "cai": ("quantization=none", "data=local", "data.path=rows.jsonl", "data.train_size=4", "data.eval_size=2",
            "constitution=clinic", "gate.pairs=2", "gate.fails=ignore", "generate.max_new_tokens=8",
            "revise.max_new_tokens=8", "filters.min_words=1", "filters.max_length_ratio=9", "shard_size=3",
            "judging.principles_per_pair=1"),
}  # fmt: skip
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second", "step_time")
FOUND = ("main", "before", "metrics", "steps", "adapter_sha256", "funnel", "gate")  # of result.json


class Lost(Exception):
    """What happened in place of what is documented."""


class Impossible(Exception):
    """This machine, or this recipe, cannot have the fault."""


@dataclass
class Ended:
    """A run that came to an end, whichever."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that says why, of what is no progress."""
        return next((each for each in self.err.splitlines() if each.startswith(("error: ", "Ended", "Interr"))), "")

    @property
    def is_over(self) -> bool:
        """Whether the run is finished, by this start or before it."""
        return self.code == 0 or (self.code == 2 and "holds a finished run" in self.line)

    def expect(self, is_so: bool, what: str) -> None:
        if not is_so or "Traceback" in self.err:
            raise Lost(f"{what}: exit {self.code}; {self.out[-300:]} | {self.err[-1500:]}")


class Room:
    """A folder in which recipes run, and what they come to undisturbed.

    Attributes:
        whole: of each recipe, its `seconds`, the `operations` on files and what it `found`.
    """

    def __init__(self, folder: Path, python: Path, model: list[str], env: dict[str, str], whole: dict[str, dict]):
        self.folder, self.python, self.model, self.whole = folder, python, model, whole
        self.env = {**env, "PYTHONPATH": os.pathsep.join([str(TESTS), env.get("PYTHONPATH", "")])}

    def start(self, recipe: str, run: str, *more: str, fault: str = "") -> subprocess.Popen:
        module = ["killed", fault, recipe] if fault else [f"rlhf_recipes.recipes.{recipe}"]
        command = [*self.model, *RECIPES[recipe], *more, f"hydra.run.dir={run}"]
        return subprocess.Popen(
            [self.python, "-m", *module, *command], cwd=self.folder, env=self.env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, recipe: str, run: str, *more: str, fault: str = "") -> Ended:
        return ended(self.start(recipe, run, *more, fault=fault))

    def begun(self, recipe: str, run: str) -> Path:
        """The folder of a run that was killed when half of it was done."""
        fault = "answered sample.2" if recipe == "cai" else "step 4"
        done = self.run(recipe, run, fault=fault)
        done.expect(done.code == -signal.SIGKILL, "killed in the middle")
        return self.folder / run

    def goes_on(self, recipe: str, run: str) -> Ended:
        done = self.run(recipe, run)
        done.expect(done.is_over, "the same command")
        return done

    def found(self, recipe: str, run: str) -> dict[str, str]:
        """What must be the same: hashes of weights or rows, of figures, and the names of all files."""
        folder = self.folder / run
        result = json.loads((folder / "result.json").read_text())
        files = [*folder.glob("*.parquet"), *folder.glob("*/adapter_model.safetensors"), *folder.glob("shards/*/rec*")]
        figures = [{key: result.get(key) for key in FOUND}]
        if (folder / "metrics.jsonl").exists():
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            figures += [{k: v for k, v in r.items() if k not in TIMES and not k.startswith("seconds/")} for r in rows]
        # Who is killed while the checkpoints of a finished run go leaves some of them.
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoints" not in str(path))
        return {
            "bits": digest(*(path.read_bytes() for path in sorted(files))),
            "figures": digest(json.dumps(figures, sort_keys=True).encode()),
            "files": " ".join(names),
        }

    def undisturbed(self, recipe: str) -> dict:
        if recipe not in self.whole:
            self.run(recipe, "first")  # what it reads first is then in memory
            begin = time.monotonic()
            done = self.run(recipe, "whole", fault="nothing 0")
            seconds = time.monotonic() - begin
            done.expect(done.code == 0, "undisturbed")
            count = int((self.folder / "operations").read_text())
            self.whole[recipe] = {
                "seconds": round(seconds, 2), "operations": count, "found": self.found(recipe, "whole"),
            }  # fmt: skip
            for name in ("first", "whole"):
                shutil.rmtree(self.folder / name)
        return self.whole[recipe]


def digest(*contents: bytes) -> str:
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()[:16]


def ended(process: subprocess.Popen, after: float = LIMIT, then: Callable[[], object] | None = None) -> Ended:
    """Its end; what is called where it has not come after so many seconds."""
    try:
        out, err = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        if then is None:
            process.kill()
            raise Lost(f"no end after {after} s") from None
        then()
        out, err = process.communicate(timeout=LIMIT)
    return Ended(process.returncode, out, err)


def holder(folder: Path) -> int | None:
    """The process that holds a run's folder."""
    try:
        return int(folder.with_name(f".{folder.name}.lock").read_text().split()[1])
    except (OSError, LookupError, ValueError):
        return None


def signalled(room: Room, recipe: str, run: str, rng: random.Random, number: int, times: int) -> Ended | None:
    """The end of a run that is sent signals at a random moment; None where not all of them came in time."""
    sent = []

    def send() -> None:
        for _ in range(times):
            if process_id := holder(room.folder / run):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, number)
                    sent.append(number)
                    time.sleep(rng.choice((0, 0.002, 0.01, 0.1)))  # who is told once is soon gone

    done = ended(room.start(recipe, run), rng.uniform(0.2, 1) * room.whole[recipe]["seconds"], send)
    return done if len(sent) == times and done.code != 0 else None


# ---- The faults. Each tries some on a run, and returns how many; the caller gives the same command once more.


def killed(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """SIGKILL at a random moment."""

    def kill() -> Ended:
        process = room.start(recipe, run)
        return ended(process, rng.uniform(0.05, room.whole[recipe]["seconds"]), process.kill)

    return chain(kill)


def killed_at_a_file(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """SIGKILL at the n-th change of a file."""
    most = room.whole[recipe]["operations"]
    return chain(lambda: room.run(recipe, run, fault=f"operation {rng.randint(1, most)}"))


def chain(kill: Callable[[], Ended]) -> int:
    """How many kills of one run came before its end, of up to CHAIN."""
    for tried in range(CHAIN):
        done = kill()
        if done.code != -signal.SIGKILL:
            done.expect(done.is_over, "a run that is killed")
            return tried
    return CHAIN


def told(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """SIGTERM."""
    done = signalled(room, recipe, run, rng, signal.SIGTERM, 1)
    if done:
        done.expect(done.code == 75 and done.line.startswith("Ended by SIGTERM"), "SIGTERM")
    return int(done is not None)


def interrupted_twice(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """Ctrl-C, and again."""
    done = signalled(room, recipe, run, rng, signal.SIGINT, 2)
    if done:
        lines = [each for each in done.err.splitlines() if each and " · " not in each]
        done.expect(done.code == 130 and len(lines) == 1 and done.line.startswith("Interrupted."), "Ctrl-C twice")
    return int(done is not None)


def no_room_for_a_file(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """A full disk: no file grows beyond a limit."""
    done = room.run(recipe, run, fault=f"limit {rng.choice((100, 1_000, 10_000, 50_000, 100_000))}")
    if done.code == 0:
        return 0
    done.expect(done.code == 2 and done.line.startswith("error: "), "a full disk")
    return 1


def read_only(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """A folder that is read-only when the run goes on."""
    place = room.folder / Path(run).parent
    if Path(run).parent == Path() or not os.path.ismount(place):
        raise Impossible
    room.begun(recipe, run)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    done = room.run(recipe, run)
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    done.expect(done.code == 2 and "Read-only file system" in done.line, "a read-only folder")
    return 1


def half_a_checkpoint(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """A file of the newest checkpoint is cut off (cai: the last answers are)."""
    folder = room.begun(recipe, run)
    if recipe == "cai":
        journal = max(folder.glob("shards/*/answers.jsonl"))
        os.truncate(journal, journal.stat().st_size - rng.randint(1, 200))
        return 1
    newest = max((folder / "checkpoints").glob("checkpoint-*"))
    kinds, named = (".pt", ".pth", ".safetensors"), ("trainer_state.json", "adapter_config.json")
    files = [path for path in sorted(newest.iterdir()) if path.suffix in kinds or path.name in named]
    cut = rng.choice(files)
    os.truncate(cut, rng.randrange(cut.stat().st_size - 8))
    done = room.run(recipe, run, fault="step 5")
    said = f"{newest.relative_to(room.folder)}: is skipped, "
    done.expect(said in done.err and f"from step {int(newest.name[11:]) - 1}." in done.out, f"half a {cut.name}")
    return 1


def half_a_parent(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """The weights that a run would continue are cut off."""
    weights = room.folder / "parent" / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    os.truncate(weights, rng.randrange(len(before)))
    done = room.run(recipe, run, "model.adapter=parent")
    weights.write_bytes(before)
    done.expect(done.code == 2 and "is cut off or damaged" in done.line, "half a parent")
    done.expect(not (room.folder / run).exists(), "a folder is left")
    return 1


def edited(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """The folder was edited by hand: what cannot be meant is refused, and goes on when it is put back."""
    folder = room.begun(recipe, run)
    config = folder / "config.yaml"
    before = config.read_text()
    for text in ("", before.replace("seed: 42", "seed: 43"), before.partition("\n")[2]):
        config.write_text(text)
        done = room.run(recipe, run)
        done.expect(done.code == 2 and done.line.startswith("error: "), "an edited config.yaml")
    config.write_text(before)
    tried = 4
    (folder / "notes.md").write_text("mine")
    if recipe != "cai":
        (folder / "metrics.jsonl").unlink()
        newest = max((folder / "checkpoints").glob("checkpoint-*"))
        for harm in (lambda: (newest / "optimizer.pt").unlink(), lambda: shutil.rmtree(newest)):
            harm()
            done = room.run(recipe, run, fault="step 4")
            done.expect(f"from step {int(newest.name[11:]) - 1}." in done.out, "an edited checkpoint")
            tried += 1
    room.goes_on(recipe, run)
    if (folder / "notes.md").read_text() != "mine":
        raise Lost("the user's note")
    (folder / "notes.md").unlink()
    return tried


def two_starts(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """The same command twice at once."""
    first = room.start(recipe, run)
    time.sleep(rng.uniform(0, 0.5) * room.whole[recipe]["seconds"])
    both = [room.start(recipe, run), first]
    both = sorted((ended(process) for process in both), key=lambda done: done.code)
    refused = "is being written by" in both[1].line or "holds a finished run" in both[1].line
    both[1].expect([done.code for done in both] == [0, 2] and refused, "two starts")
    return 1


def changed_rows(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """The file of the data changed between start and resume."""
    room.begun(recipe, run)
    rows = room.folder / "rows.jsonl"
    before = rows.read_text()
    lines = before.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    rows.write_text("".join(lines[:number] + lines[number + 1 :]))
    done = room.run(recipe, run)
    rows.write_text(before)
    done.expect(done.code == 2 and "data.path=rows.jsonl: has changed since" in done.line, "rows that changed")
    return 1


def no_number(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """A gradient of NaN: the weights stay numbers."""
    from safetensors.numpy import load_file

    done = room.run(recipe, run, fault=f"no number in {rng.randint(1, 5)}")
    done.expect(done.code == 0 and "gradient is not finite" in done.out, "a gradient of NaN")
    weights = load_file(room.folder / run / "adapter" / "adapter_model.safetensors")
    done.expect(all((each == each).all() for each in weights.values()), "weights that are no numbers")
    return 1


def no_memory(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """A device without memory for a step."""
    done = room.run(recipe, run, fault=f"memory in {rng.randint(2, 5)}")
    done.expect(done.code == 2 and "out of GPU memory" in done.line and "needed about" in done.line, "no memory")
    return 1


def little_memory(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """Too little main memory (RLIMIT_AS)."""
    done = room.run(recipe, run, fault=f"more {rng.choice((1, 10, 30, 60, 100, 150, 200))}")
    if done.code == 0:
        return 0
    done.expect(done.code == 2 and "out of main memory" in done.line, "too little memory")
    return 1


def clock_back(room: Room, recipe: str, run: str, rng: random.Random) -> int:
    """The clock is set back by a day between two checkpoints; killed two steps later, no newer one is lost."""
    step = rng.randint(2, 3)
    done = room.run(recipe, run, fault=f"clock back at {step}")
    done.expect(done.code == -signal.SIGKILL, "a clock")
    kept = sorted(path.name for path in (room.folder / run / "checkpoints").glob("checkpoint-*"))
    done.expect(kept == [f"checkpoint-{step}", f"checkpoint-{step + 1}"], f"a clock that is set back: {kept}")
    return 1


TRAINED = (half_a_parent, no_number, no_memory, clock_back)
FAULTS: dict[str, Callable[[Room, str, str, random.Random], int]] = {
    each.__name__: each
    for each in (
        killed, killed_at_a_file, told, interrupted_twice, no_room_for_a_file, read_only, half_a_checkpoint,
        half_a_parent, edited, two_starts, changed_rows, no_number, no_memory, little_memory, clock_back,
    )
}  # fmt: skip
KILLS = ("killed", "killed_at_a_file")


def case(room: Room, recipe: str, fault: str, number: int) -> dict:
    """One run with faults: how many were `tried`, `survived` and left the bits `equal`; and what went wrong."""
    if recipe == "cai" and FAULTS[fault] in TRAINED and fault != "half_a_parent":
        raise Impossible
    place, run = room.folder / "disk", f"{fault}_{number}"
    with mounted(place) if fault == "read_only" else contextlib.nullcontext(False) as is_mounted:
        run = f"disk/{run}" if is_mounted else run
        tried, said = 0, ""
        try:
            room.undisturbed(recipe)
            tried = FAULTS[fault](room, recipe, run, random.Random(f"{recipe} {fault} {number}"))
            if fault == "no_number":
                return {"tried": tried, "survived": tried, "equal": 0}
            room.goes_on(recipe, run)
            found, whole = room.found(recipe, run), room.whole[recipe]["found"]
            said = ", ".join(f"{key}: {found[key]} is not {whole[key]}" for key in whole if found[key] != whole[key])
            equal = all(found[key] == whole[key] for key in ("bits", "figures"))
            return {"tried": tried, "survived": tried, "equal": tried * equal, "said": said}
        except Impossible:
            raise
        except Exception as error:  # of this program, too: the others go on
            return {"tried": max(tried, 1), "survived": 0, "equal": 0, "said": f"{type(error).__name__} {error}"}
        finally:
            shutil.rmtree(room.folder / run, ignore_errors=True)
            for left in room.folder.glob(".*.lock"):
                left.unlink()


@contextlib.contextmanager
def mounted(place: Path):
    """A file system of its own, where this user may mount one."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)]
    try:
        yield shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


def table(cells: dict[str, dict], recipes: list[str]) -> str:
    """A row for each fault: tried, survived, equal."""
    lines = [f"| fault | {' | '.join(recipes)} |", f"| --- |{' --- |' * len(recipes)}"]
    for fault, function in FAULTS.items():
        found = [cells.get(f"{recipe} {fault}") for recipe in recipes]
        shown = [f"{c['tried']} {c['survived']} {c['equal']}" if c and c["tried"] else "–" for c in found]
        lines.append(f"| {function.__doc__.splitlines()[0]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("faults.json"), help="what was done, which is not done again"
    )
    parser.add_argument("--kills", type=int, default=50, help="at a moment, and as many at a file, for each recipe")
    parser.add_argument("--tries", type=int, default=3, help="of every other fault")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no other run is begun")
    parser.add_argument("--only", nargs="+", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it starts with &
    kept = json.loads(options.json.read_text()) if options.json.exists() else {"whole": {}, "cells": {}, "wrong": []}
    cells, until = kept["cells"], time.monotonic() + 60 * options.minutes
    todo = [(recipe, fault) for fault in options.only for recipe in options.recipes]
    for each in todo:
        cells.setdefault(" ".join(each), {"cases": 0, "tried": 0, "survived": 0, "equal": 0})
    with prepared(kept["whole"]) if options.minutes else contextlib.nullcontext() as room:
        while todo and time.monotonic() < until:
            recipe, fault = min(todo, key=lambda each: cells[" ".join(each)]["cases"])
            cell = cells[f"{recipe} {fault}"]
            most = options.kills if fault in KILLS else options.tries
            if cell["tried"] >= most or cell["cases"] >= 4 * most:
                todo.remove((recipe, fault))
                continue
            try:
                found = case(room, recipe, fault, cell["cases"])
            except Impossible:
                todo.remove((recipe, fault))
                continue
            if said := found.pop("said", ""):
                kept["wrong"].append(f"{recipe} {fault} {cell['cases']}: {said}")
                print(kept["wrong"][-1], flush=True)
            cell["cases"] += 1
            for key, count in found.items():
                cell[key] += count
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores; tried, survived, equal\n")
    print(table(cells, options.recipes))
    print(f"\n{sum(cell['cases'] for cell in cells.values())} runs; what went wrong: {len(kept['wrong'])}")


@contextlib.contextmanager
def prepared(whole: dict[str, dict]):
    """The room, with the tiny model, rows, and a run to continue."""
    sys.path.insert(0, str(TESTS))
    import conftest
    import warm

    with tempfile.TemporaryDirectory(prefix="rlhf-recipes-faults-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "room").mkdir()
        (folder / "tmp").mkdir()
        (folder / "hf_home").mkdir()

        class Folder:
            mktemp = staticmethod(lambda _: folder)

        model = conftest.build_terse(conftest.tiny_model.__wrapped__(Folder), folder / "terse")
        env = {**conftest.offline(folder / "hf_home"), "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
               "TMPDIR": str(folder / "tmp")}  # fmt: skip
        python = stack.enter_context(warm.offer(folder / "warm", env))
        room = Room(folder / "room", python, [f"model.path={model}", f"model.id={conftest.TINY_ID}"], env, whole)
        shutil.copy(conftest.CLINIC / "pairs.jsonl", room.folder / "rows.jsonl")
        done = room.run("sft", "parent", "trainer.max_steps=1")
        done.expect(done.code == 0, "a run to continue")
        yield room


if __name__ == "__main__":
    main()
