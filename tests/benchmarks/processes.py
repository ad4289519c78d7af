"""Several processes on one machine: whether any dies where all write or read at once, and how much faster two are.

    python tests/benchmarks/processes.py                                   # about 20 minutes on two cores
    python tests/benchmarks/processes.py --quick                           # under 5
    python tests/benchmarks/processes.py --only rows --rows 10000 100000   # one part of it

Counted are starts (Run.start and create: all four processes at once, over what is there) and ends (an adapter is
saved, read again by all, and result.json written) that do not come to their end, and whole trainings of two processes
on the tiny model of the tests, by torchrun. Timed are a step on 200,000 rows by one process and by two, and DPO on the
embedded model with a global batch of 8, by one process with one thread and by two with one thread each: seconds of the
training loop and of the held-out work. Run it alone on the machine, which needs two cores.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTS, ENDS, TRAININGS, ROWS = 100, 60, 10, 200_000
PARTS = ("folders", "trainings", "rows", "faster")
WORDS = "Can I move my appointment to another day without paying for the one that I will miss? " * 3
PAIRS = ["data.train_size=32", "data.eval_size=32", "trainer.max_steps=4", "trainer.max_length=256"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three whole trainings and 10,000 rows")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rows", nargs="+", type=int, help="how many are tokenised")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="that tokenise them")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # what one of the processes does
    options = parser.parse_args()
    if options.worker:
        {"folders": folders, "dpo": dpo}[options.worker[0]](Path(options.worker[1]))
        return
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores", flush=True)
    trainings, rows = (3, [10_000]) if options.quick else (TRAININGS, [ROWS])
    figures = {}
    with tempfile.TemporaryDirectory() as room:
        if "folders" in options.only:
            figures["four processes"] = started(4, "folders", room)
            print(f"four processes: {figures['four processes']}", flush=True)
        if {"trainings", "rows"} & {*options.only}:
            trainings = trainings if "trainings" in options.only else 0
            rows = (options.rows or rows) if "rows" in options.only else []
            figures["command line"] = by_command_line(trainings, rows, options.processes, Path(room))
            print(f"by the command line: {figures['command line']}", flush=True)
        if "faster" in options.only:
            one, two = (started(n, "dpo", room) for n in (1, 2))
            figures |= {"one": one, "two": two, "faster": {key: round(one[key] / two[key], 2) for key in one}}
            print(*(f"{name}: {figures[name]}" for name in ("one", "two", "faster")), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"date": str(datetime.date.today()), **figures}, indent=2) + "\n")


def started(processes: int, what: str, room: str) -> dict:
    """What so many processes, with one thread each, report."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--worker", what, f"{room}/{what}"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def composed(recipe: str, *overrides: str):
    import hydra

    import rlhf_recipes.config  # noqa: F401  registers the nodes that the groups start from

    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name=recipe):
        return hydra.compose(recipe, overrides=[*overrides])


def folders(room: Path) -> None:
    """Starts over what is there, whole or half written, and ends that all read."""
    from omegaconf import OmegaConf
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf_recipes import model_files, models, ranks
    from rlhf_recipes.run import Run

    cfg, count = composed("dpo", "overwrite=true"), {"starts": 0, "ends": 0, "died": 0}
    cfg.output_dir = str(room / "run")
    shape = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
                        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(shape), LoraConfig(r=64, target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(model_files.folder_or_id(cfg.model))
    os.chdir(ranks.by_first(lambda: str(room.mkdir() or room)))
    while count["starts"] < STARTS:
        try:
            run = Run.start(cfg, "dpo")
            run.create()
            count["starts"] += 1
            if count["ends"] < ENDS:
                models.save_adapter(model, tokenizer, run.adapter, OmegaConf.create({"id": "x", "revision": None}))
                PeftModel.from_pretrained(LlamaForCausalLM(shape), str(run.adapter))
                run.write_result(run.record())
                json.loads((run.dir / "result.json").read_text())
                count["ends"] += 1
            elif run.lock:
                run.lock.release()
        except Exception as error:
            print(f"rank {ranks.rank()}: {type(error).__name__}: {error}", file=sys.stderr)
            raise
    if ranks.is_first():
        print(json.dumps(count))
    ranks.leave()


def by_command_line(number: int, counts: list[int], processes: list[int], room: Path) -> dict:
    """Whole trainings of two processes, each in a folder of its own; and a step on many rows, by so many processes."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest
    import warm

    class Folder:
        mktemp = staticmethod(lambda _: room)

    tiny = [f"model.path={conftest.tiny_model.__wrapped__(Folder)}", "model.id=tests/tiny",
            "trainer.per_device_train_batch_size=2", "data.eval_size=4"]  # fmt: skip
    env, found = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}, []
    with warm.offer(room / "warm", env) as python:

        def trained(processes: int, name: str, *overrides: str) -> dict:
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
            command = [python, "-m", *launcher, "rlhf_recipes.recipes.dpo", *tiny, *overrides, f"run_name={name}"]
            done = subprocess.run(command, cwd=room, env=env, capture_output=True, text=True)
            print(done.stderr if done.returncode else "", end="", flush=True)
            result = room / "outputs" / "dpo" / name / "result.json"
            return json.loads(result.read_text()) if done.returncode == 0 else {}

        for n in range(number):
            found.append(trained(2, f"run{n}", "data.train_size=8", "trainer.max_steps=2"))
        many = ["data=local", f"data.path={room}/rows.jsonl", "data.test_size=4", "trainer.max_steps=1"]
        results = {}
        for rows in counts:
            with (room / "rows.jsonl").open("w") as file:
                for n in range(rows):
                    row = {"prompt": f"{n}: {WORDS}", "chosen": f"{WORDS} {n}", "rejected": f"No, {n} {WORDS}"}
                    file.write(json.dumps(row) + "\n")
            for n in processes:
                seen = trained(n, f"rows{rows}_{n}", *many)
                took = {"seconds": seen["seconds"], "GiB": seen["peak_memory_gib"]["process"]} if seen else "died"
                results[f"{rows} rows, {n} processes"] = took
                print(f"{rows} rows, {n} processes: {took}", flush=True)
    return {"trainings": number, "died": found.count({}), **results}


def dpo(room: Path) -> None:
    """Seconds of the training loop, and of both rounds of the held-out work."""
    from rlhf_recipes.recipes import dpo as recipe

    from rlhf_recipes import inference, ranks

    cfg = composed("dpo", *PAIRS, f"trainer.per_device_train_batch_size={8 // ranks.world_size()}",
                   "trainer.gradient_accumulation_steps=1")  # fmt: skip
    cfg.output_dir = f"{room}/{ranks.world_size()}"
    seconds, measure = [], inference.pair_logps

    def timed(*args):
        ranks.barrier()
        begin = time.monotonic()
        found = measure(*args)
        seconds.append(time.monotonic() - begin)
        return found

    inference.pair_logps = timed
    recipe.main.__wrapped__(cfg)
    log = [json.loads(line) for line in Path(cfg.output_dir, "metrics.jsonl").read_text().splitlines()]
    trained = next(row["train_runtime"] for row in reversed(log) if "train_runtime" in row)
    if ranks.is_first():
        print(json.dumps({"training": round(trained, 1), "held out": round(sum(seconds), 1)}))
    ranks.leave()


if __name__ == "__main__":
    main()
