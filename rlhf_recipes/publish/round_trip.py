"""The round trip: what was published, loaded in a fresh process, gives the numbers that it gave before.

A policy is asked for the log-probability of 32 replies, a reward model for their scores: the first test rows of the
clinic set, which is in the package, so that no row of anybody's data is published. A data set gives its rows.

    python -m rlhf_recipes.publish.round_trip <task>.json <answer>.json     # the fresh process
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_recipes import memory, ranks, secrets
from rlhf_recipes.errors import Refusal
from rlhf_recipes.text import line

PROBES = 32
# Of these many replies the effect of the adapter is measured: a scale, for which few are enough.
EFFECT_PROBES = 8
# Most that two processes may differ by: nats per reply token, or units of the score. On one machine, with as many
# threads, they do not differ at all; other kernels and other orders of a sum round otherwise, by 2^-24 (float32),
# 2^-11 (float16), 2^-8 (bfloat16) of a logit of about 20, averaged over a reply. What an adapter changes is often
# less: see `compare`.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
# Of what the adapter itself changes (policy), or of the spread of the scores (reward model).
SHARE = 0.1


def conversations() -> list[tuple[list[dict], list[dict]]]:
    """(prompt, completion) of the 32 probes."""
    from rlhf_recipes.data.sources import CLINIC

    rows = [json.loads(line) for line in (CLINIC / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if row["split"] == "test"][:PROBES]
    return [(row["prompt"], [{"role": "assistant", "content": row["chosen"]}]) for row in held_out]


def task(folder: Path, config: dict[str, Any], *, reward: bool, merged: bool = False) -> dict[str, Any]:
    """What `measure` needs: the folder of an adapter, or of merged weights, and the base that it belongs to."""
    model = {**config["model"], "adapter": None}
    return {"folder": str(folder), "reward": reward, "merged": merged, "model": model,
            "quantization": {} if merged else config["quantization"], "threads": machine()["threads"]}  # fmt: skip


def machine() -> dict[str, Any]:
    """What the last bits of a number depend on: where another process has the same, it finds the same."""
    import torch

    from rlhf_recipes import run

    versions = run.versions()
    return {
        "device": run.device_name(),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: versions.get(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """The 32 numbers.

    Returns:
        `values`: log-probabilities of the replies in nats, summed over their tokens, or scores; `scale`: tokens of
        each reply, or ones; `effect`: what the adapter changes against its base in nats per token, or the mean
        absolute deviation of the scores (None for merged weights); `dtype`, `quantization`, `probes` (their hash),
        `machine`.
    """
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_recipes import inference as m
    from rlhf_recipes import models

    node, asked = OmegaConf.create(task["model"]), conversations()
    tokenizer = models.tokenizer_in(task["folder"])
    auto, options = AutoModelForCausalLM, {}
    if task["reward"]:
        auto, options = AutoModelForSequenceClassification, {"num_labels": 1}
    dtype = models.compute_dtype(node)
    if task["merged"]:
        where = {"": 0} if torch.cuda.is_available() else None
        model = auto.from_pretrained(task["folder"], dtype=dtype, trust_remote_code=False, device_map=where)
    else:
        base = models.load_base(node, OmegaConf.create(task["quantization"]), auto, **options)
        model = models.put_on(base, task["folder"], task["folder"])

    def numbers(asked: list, what: str) -> tuple[list[float], list[int]]:
        if task["reward"]:
            return m.rewards(model, tokenizer, [prompt + reply for prompt, reply in asked], what), [1] * len(asked)
        logps = m.completion_logps(model, tokenizer, asked, what)
        return [logp for logp, _ in logps], [tokens for _, tokens in logps]

    values, scale = numbers(asked, "Round trip")
    found = {"values": values, "scale": scale, "effect": None, "dtype": str(dtype).removeprefix("torch."),
             "quantization": task["quantization"], "probes": probes_sha256(), "machine": machine()}  # fmt: skip
    if task["reward"]:
        mean = _mean(values)
        found["effect"] = _mean([abs(value - mean) for value in values])
    elif not task["merged"]:
        with model.disable_adapter():
            alone, _ = numbers(asked[:EFFECT_PROBES], "Base alone")
        few = {key: found[key][:EFFECT_PROBES] for key in ("values", "scale")}
        found["effect"] = drift(few, {"values": alone})
    return found


def probes_sha256() -> str:
    return hashlib.sha256(json.dumps(conversations()).encode()).hexdigest()


def compare(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """How far the two differ, and how far they may.

    max_i |a_i - b_i| / scale_i against the tolerance of the dtype, and against a tenth of what the adapter changes at
    all: an adapter that moves less than the tolerance must not pass when it is lost.

    Returns:
        `largest`, `allowed`, `n`, `unit`, `passed`.
    """
    differences = _differences(expected, found["values"])
    largest = max(differences, key=lambda x: x if x == x else math.inf)  # NaN is the largest of all
    allowed = min(TOLERANCE.get(expected["dtype"], min(TOLERANCE.values())), SHARE * expected["effect"])
    unit = "nats per token" if any(scale != 1 for scale in expected["scale"]) else "units of the score"
    return {"largest": largest, "allowed": allowed, "n": len(differences), "unit": unit, "passed": largest <= allowed}


def drift(expected: dict[str, Any], found: dict[str, Any]) -> float:
    """Mean |a_i - b_i| / scale_i: nats per token, or units of the score, which are nats of log-odds."""
    return _mean(_differences(expected, found["values"]))


def _differences(expected: dict[str, Any], values: list[float]) -> list[float]:
    return [abs(a - b) / s for a, b, s in zip(expected["values"], values, expected["scale"], strict=True)]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def rows(folder: Path, splits: list[str]) -> dict[str, list]:
    """Of each split of a data set: rows, and the hash of the first 32, as parquet has them."""
    import pyarrow.parquet as pq

    tables = {split: pq.read_table(folder / f"{split}.parquet") for split in splits}
    return {split: [t.num_rows, _rows_sha256(t.slice(0, PROBES).to_pylist())] for split, t in tables.items()}


def load_rows(folder: Path, splits: list[str]) -> dict[str, list]:
    """The same, as `datasets.load_dataset` reads them by the card's metadata."""
    from datasets import load_dataset

    found = {}
    for split in splits:
        name, _, kind = split.partition("_")
        loaded = load_dataset(str(folder), kind, split=name)
        found[split] = [loaded.num_rows, _rows_sha256(loaded.select(range(min(PROBES, loaded.num_rows))).to_list())]
    return found


def _rows_sha256(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own finds: without network, without secrets, with as many threads as this one, on the
    same GPU, of which this one lets go what it has loaded.

    Raises:
        Refusal: it fails; says with what.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "task.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(task))
        environment = _without_secrets(ranks.alone_env())
        # The client's own token lies in a file.
        environment |= {"HF_TOKEN_PATH": f"{scratch}/none", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        if "threads" in task:
            environment["OMP_NUM_THREADS"] = str(task["threads"])
        # -P: a module of the current folder, which may be one of data, is none of ours.
        command = [sys.executable, "-P", "-m", "rlhf_recipes.publish.round_trip", str(asked), str(answer)]
        memory.make_room()
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise Refusal(f"a fresh process cannot load it ({line(secrets.redact(said))})")
        return json.loads(answer.read_text())


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that neither name a secret nor hold one."""
    hidden = set(secrets.in_environment(environment).values())
    hidden |= {name for name in environment if secrets.NAMES & {*name.upper().split("_")}}
    return {name: value for name, value in environment.items()
            if name not in hidden and not secrets.VALUE.search(value)}  # fmt: skip


def _main(asked: str, answer: str) -> None:
    from rlhf_recipes import run

    run.environment()
    given = json.loads(Path(asked).read_text())
    if "splits" in given:
        found = load_rows(Path(given["folder"]), given["splits"])
    else:
        import torch

        torch.set_num_threads(given["threads"])
        found = measure(given)
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
