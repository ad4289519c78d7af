"""The local backend against a plain loop of `model.generate`, on critiques of clinic replies.

    python tests/benchmarks/cai_local.py --requests 64 --rounds 3

The embedded model, greedy, 48 tokens, the layout of a critique request under conf/constitution/clinic.yaml. The plain
loop takes the requests in the order given, as many in a batch as the backend; in 4 bits (quantization=nf4) its model
runs on the 4-bit kernels, as models.load_base leaves it. With quantization=none both sides have the same weights and
kernels: what remains is the work of batches, shared beginnings and rows that leave. The sides take turns after a short
warm-up. Printed are seconds, tokens per second of answers, their ratio, and the share of requests with the same tokens
on both sides: all of them in float32; in bfloat16 the rounding of a batch can flip a token. Run it alone on the
machine.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import hydra

from rlhf_recipes import run

RECIPE, TOKENS = "cai", 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="model.dtype; default: what the recipes take here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    run.environment()  # as for a recipe: threads
    machine = f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads"
    print(f"{datetime.date.today()}, {machine}, {options.requests} requests, model.dtype={options.dtype}", flush=True)
    figures = {name: compare(name, options) for name in ("nf4", "none")}
    if options.json:
        written = {"date": str(datetime.date.today()), "machine": machine, "requests": options.requests}
        options.json.write_text(json.dumps({**written, "dtype": options.dtype, **figures}, indent=2) + "\n")


def compare(quantization: str, options: argparse.Namespace) -> dict:
    """Both sides under one quantization: what is printed of them."""
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import models
    from rlhf_recipes.cai import local

    cfg = compose(quantization, options.dtype)
    requests = critiques(cfg, options.requests)
    backend = local.load(cfg.model, cfg.quantization, None)
    backend.tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))  # the tokens themselves are compared
    model = models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM).eval()
    rows = [backend._encode(request, request.messages) for request in requests]
    sizes = [len(batch) for batch in local._batches(rows, 1)]
    sides = {
        "model.generate": lambda count: plain_loop(model, backend, [row.ids for row in rows[:count]], sizes),
        "local": lambda count: answers(backend, requests[:count]),
    }
    for side in sides.values():
        side(2)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    said: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            said[name] = side(len(requests))
            seconds[name].append(time.perf_counter() - begin)
    return report(quantization, sizes, seconds, said)


def compose(quantization: str, dtype: str):
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name=RECIPE):
        overrides = ["model=smollm2_135m", f"model.dtype={dtype}", f"quantization={quantization}"]
        return hydra.compose(RECIPE, overrides=[*overrides, "constitution=clinic"])


def critiques(cfg, count: int) -> list:
    """What the recipe asks first of a clinic set's worse replies, each under a principle drawn for it."""
    from rlhf_recipes.cai import constitution, prompt_templates
    from rlhf_recipes.cai.backend import Request
    from rlhf_recipes.data.load import load_pairs, load_prompts

    law = constitution.load(cfg.constitution)
    prompts = load_prompts(cfg.data)
    replies = {row["prompt_id"]: row["rejected"][0]["content"] for row in load_pairs(cfg.data).train}
    return [
        Request(
            row["prompt_id"],
            "critique.1",
            prompt_templates.critique(
                law,
                row["prompt"],
                replies[row["prompt_id"]],
                law.draw(1, cfg.seed, "revise", row["prompt_id"], 1)[0],
                cfg.revise.few_shot,
            ),
            max_new_tokens=TOKENS,
        )
        for row in prompts.train[:count]
    ]


def answers(backend, requests: list) -> list[str]:
    found = {
        request.key: answer["text"] for group in backend.answer(requests, (), "local") for request, answer in group
    }
    return [found[request.key] for request in requests]


def plain_loop(model, backend, sequences: list[list[int]], sizes: list[int]) -> list[str]:
    """The tokens of each answer, as text, by batches of these sizes in the order given."""
    import torch

    from rlhf_recipes.packing import left_pad

    pad, rest, said = backend.tokenizer.pad_token_id, sequences, []
    for size in sizes:
        batch, rest = rest[:size], rest[size:]
        if not batch:
            break
        ids_BT, mask_BT, _ = left_pad(batch, pad, model.device)
        with torch.inference_mode():
            out_BT = model.generate(
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=TOKENS, do_sample=False,
                eos_token_id=backend.stops, pad_token_id=pad,
            )  # fmt: skip
        for ids in out_BT[:, ids_BT.shape[1] :].tolist():
            end = next((n + 1 for n, token in enumerate(ids) if token in backend.stops), len(ids))
            said.append(" ".join(map(str, ids[:end])))
    return said


def report(quantization: str, sizes: list[int], seconds: dict[str, list[float]], said: dict[str, list[str]]) -> dict:
    """Medians over the rounds, printed and returned."""
    plain, ours = said.values()
    same = statistics.fmean(a == b for a, b in zip(plain, ours, strict=True))
    ratios = [theirs / own for theirs, own in zip(*seconds.values(), strict=True)]
    figures = {
        name: {"seconds": round(statistics.median(taken), 2),
               "tokens_per_second": round(sum(len(text.split()) for text in said[name]) / statistics.median(taken), 1)}
        for name, taken in seconds.items()
    }  # fmt: skip
    print(f"\nquantization={quantization}, batches of {', '.join(map(str, sizes))}, median of {len(ratios)}")
    for name, row in figures.items():
        print(f"{name:15} {row['seconds']:8.2f} s  {row['tokens_per_second']:8.1f} tokens/s")
    print(f"{statistics.median(ratios):.2f} times the plain loop ({min(ratios):.2f} to {max(ratios):.2f}), "
          f"same tokens in {same:.1%} of the requests", flush=True)  # fmt: skip
    return {**figures, "ratio": round(statistics.median(ratios), 3), "same": same, "batches": sizes, "rounds": seconds}


if __name__ == "__main__":
    sys.exit(main())
