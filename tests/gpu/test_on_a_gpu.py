"""What only a GPU can show, the most telling first: README.md beside this file says how to run it and read it.

`SMALL=1` tries the suite itself on a CPU: the tiny model in place of the 8B shape, and nothing is asked of a GPU.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SMALL = os.environ.get("SMALL") == "1"
OUT = Path(os.environ.get("OUT") or ROOT / "gpu-out")
LIMIT, BEGIN = float(os.environ.get("LIMIT", 2400 if SMALL else 480)), time.monotonic()
GIB = 2**30
CARD_GIB = 24  # on which an 8B is said to train

pytestmark = pytest.mark.skipif(not (SMALL or torch.cuda.is_available()), reason="needs a GPU, or SMALL=1")
on_a_gpu = pytest.mark.skipif(SMALL, reason="says nothing on a CPU")


# ---- The record, the time, the processes


def note(name: str, **found) -> None:
    """Keep what was found: gpu.json is whole after every test, however the suite ends."""
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "gpu.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    known[name] = {**known.get(name, {}), **found, "at": round(time.monotonic() - BEGIN)}
    file.write_text(json.dumps(known, indent=1) + "\n")


def left() -> float:
    return LIMIT - (time.monotonic() - BEGIN)


@contextmanager
def limited(name: str, seconds: float):
    """A test has its own limit, and what is left of the suite's; one that could not end in time is not begun."""
    if left() < seconds / 2:
        note(name, skipped="no time left")
        pytest.skip(f"{left():.0f} s are left of {LIMIT:.0f}")

    def late(*_):
        note(name, failed="over its limit")
        pytest.fail(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, max(left(), 1)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def in_time(request):
    limit = request.node.get_closest_marker("gpu").kwargs["limit"]  # seconds of an H100
    with limited(request.node.name, 5 * limit if SMALL else limit):
        yield


@dataclass
class Ran:
    """A process that has ended, the run that it has left in `folder`, and what was seen inside, beside it."""

    folder: Path
    code: int
    said: str
    seconds: float

    def read(self, name: str) -> dict:
        file = self.folder / name
        return json.loads(file.read_text()) if file.is_file() else {}

    @cached_property
    def facts(self) -> dict:
        return self.read("../facts.json")

    @cached_property
    def result(self) -> dict:
        return self.read("result.json")

    @cached_property
    def log(self) -> list[dict]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    def seconds_of(self, *phases: str) -> dict[str, list[float]]:
        return {phase: [round(row[phase], 2) for row in self.log if phase in row] for phase in phases}

    def note(self, name: str, **more) -> "Ran":
        """Keep it, and go on only if it ended well."""
        shown = ("loss", "grad_norm", "kl", "reward", "tokens_per_second", "train_runtime")
        log = [{k: v for k, v in row.items() if k in shown or k.startswith("seconds/")} for row in self.log]
        doctor = (self.result.get("doctor") or {}).get("verdict")
        peak = self.result.get("peak_memory_gib")
        failure = {"said": self.said[-2000:]} if self.code else {}
        note(name, exit=self.code, seconds=self.seconds, peak_gib=peak, **self.facts, doctor=doctor, log=log[-3:],
             **failure, **more)  # fmt: skip
        assert self.code == 0, self.said[-4000:]
        return self


@pytest.fixture(scope="session")
def work():
    """The folder in which all runs; a function that rewards long answers lies in it."""
    with tempfile.TemporaryDirectory() as folder:
        counted = "[len(completion[0]['content'].split()) / 64 for completion in completions]"
        (Path(folder) / "words.py").write_text(f"def count(completions, **_):\n    return {counted}\n")
        yield Path(folder)


@pytest.fixture(scope="session")
def command(work):
    """command(label, *words, **environment): python with these words, to its end. {folder} in them is that of its run;
    a variable of None is taken away."""

    def ended(label: str, *words, **environment) -> Ran:
        begin, base = time.monotonic(), work / "runs" / label.replace(" ", "_")
        env = {**os.environ, "FACTS": str(base / "facts.json"), "OMP_NUM_THREADS": "2", **environment}
        base.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, *(str(word).replace("{folder}", str(base / "run")) for word in words)],
            cwd=work,
            env={name: value for name, value in env.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=max(5, left()))
        except subprocess.TimeoutExpired:
            said = "no time left"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ran(base / "run", process.returncode, said, round(time.monotonic() - begin, 1))

    return ended


def of(recipe: str, *overrides: str) -> list:
    """The words of a training recipe, watched from inside."""
    return [HERE / "inside.py", recipe, *overrides, "run_name=run", "hydra.run.dir={folder}"]


# ---- Models


@pytest.fixture(scope="session")
def make_model(tiny_model, work):
    """make_model(folder, **shape): a Llama with random weights in bfloat16, and the tiny model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_rows(work, tokenizer)

    def made(folder: Path, auto=LlamaForCausalLM, **shape) -> Path:
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = LlamaConfig(max_position_embeddings=8192, **tokens, **shape)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cpu" if SMALL else "cuda"):
                model = auto(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
        return folder

    return made


TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LLAMA_1B = TINY if SMALL else {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_8B = TINY if SMALL else {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LONG = 128 if SMALL else 1024
ANSWER = 16 if SMALL else 128


@pytest.fixture(scope="session")
def tiny(tiny_model_overrides):
    """Two steps on the tiny model."""
    return [*tiny_model_overrides, "data.train_size=8", "data.eval_size=4", "trainer.max_steps=2",
            "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2",
            "trainer.logging_steps=1"]  # fmt: skip


@pytest.fixture(scope="session")
def large(make_model, work):
    """An 8B shape as overrides."""
    begin = time.monotonic()
    folder = make_model(work / "8b", **LLAMA_8B)
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    note("8B made", seconds=round(time.monotonic() - begin, 1), gib=round(sum(files) / GIB, 2))
    return [f"model.path={folder}", "model.id=tests/8b"]


def write_rows(folder: Path, tokenizer) -> None:
    """long.jsonl, pairs of up to LONG tokens, half of them prompt; prompts.jsonl, prompts of about ANSWER. A template
    takes some sixty."""
    text = "The front desk answers, asks what is urgent, and books the visit that the caller needs. " * 60
    ids = tokenizer(text)["input_ids"]
    half, prompt = (tokenizer.decode(ids[:count]) for count in (LONG // 2 - 40, max(8, ANSWER - 60)))
    pairs = [
        {"prompt": f"{i}. {half}", "chosen": f"Yes, {i}. {half}", "rejected": f"No, {i}. {half}"} for i in range(24)
    ]
    prompts = [{"prompt": f"{i}. {prompt}"} for i in range(48)]
    for name, rows in (("long", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- 1 Small runs side by side: every recipe, every precision


NF4 = ("sft", "reward", "dpo", "orpo", "simpo", "kto", "ppo")
# As on a GPU without bfloat16. A scaler begins by skipping steps.
FLOAT16 = ["model.dtype=float16", "trainer.fp16=true", "trainer.bf16=false", "trainer.max_steps=6"]
FLOAT32 = ["quantization=none", "model.dtype=float32", "trainer.bf16=false", "trainer.max_steps=3"]
KEPT = ["trainer.save_steps=1", "trainer.max_steps=4", "trainer.learning_rate=1e-3"]
CASES = {
    **{f"{recipe} nf4": (recipe, []) for recipe in NF4},
    **{f"{recipe} float16": (recipe, FLOAT16) for recipe in ("dpo", "reward", "ppo")},
    **{f"{recipe} int8": (recipe, ["quantization=int8"]) for recipe in ("dpo", "reward")},
    **{f"{recipe} float32 gpu": (recipe, FLOAT32) for recipe in ("sft", "dpo")},
    **{f"{recipe} float32 cpu": (recipe, [*FLOAT32, "trainer.use_cpu=true"]) for recipe in ("sft", "dpo")},
    **{f"{recipe} whole": (recipe, KEPT) for recipe in ("dpo", "ppo")},
}


@pytest.fixture(scope="session")
def ran(request, command, tiny):
    """ran(case): of the small runs that the chosen tests ask for, side by side, one that has ended."""
    pool, futures = ThreadPoolExecutor(1 if SMALL else 6), {}

    def start(case: str) -> Future:
        if case not in futures:
            recipe, overrides = CASES[case]
            futures[case] = pool.submit(command, case, *of(recipe, *tiny, *episodes(recipe), *overrides), RELOADS="20")
        return futures[case]

    for item in request.session.items:
        for case in getattr(getattr(item, "callspec", None), "params", {}).get("cases", ()):
            start(case)
    yield lambda case: start(case).result()
    pool.shutdown(cancel_futures=True)


def episodes(recipe: str) -> list[str]:
    return ["reward_funcs=words:count", "trainer.max_completion_length=16"] if recipe == "ppo" else []


@pytest.mark.gpu(limit=60)
def test_versions():
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    libraries = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "pyarrow")
    package = find_spec("rlhf_recipes").origin
    note("versions", card=card and card.name, gib=card and round(card.total_memory / GIB, 1), cuda=torch.version.cuda,
         cores=os.cpu_count(), package=package, **{name: version(name) for name in libraries})  # fmt: skip
    assert SMALL or card


@pytest.mark.gpu(limit=120)
@pytest.mark.parametrize(
    "cases", [(case,) for case in CASES if case.rpartition(" ")[2] in ("nf4", "float16", "int8")], ids=" ".join
)
def test_a_recipe_trains(ran, cases):
    """It ends; LoRA moves, under checkpointing; nothing is on the CPU; the peak is the GPU's."""
    (case,) = cases
    if SMALL and "float16" in case:
        pytest.skip("accelerate takes fp16 on a GPU alone")
    found = ran(case).note(case)
    assert found.facts["still"] == []
    assert all(row["loss"] == row["loss"] for row in found.log if "loss" in row)
    assert max(row.get("dead_gradients", 0) for row in found.log) == 0 or "float16" in case
    assert found.facts["devices"] == (["cpu"] if SMALL else ["cuda"])
    assert found.facts["checkpointing"] == (not SMALL)
    assert SMALL or found.result["peak_memory_gib"]["cuda"] > 0
    if "nf4" in case:
        assert any("Params4bit" in kind for kind in found.facts["kinds"])
    if "float16" in case:
        assert not any("bfloat16" in kind for kind in found.facts["kinds"])


# ---- 2 The same numbers as on a CPU


@pytest.mark.gpu(limit=60)
@pytest.mark.parametrize("cases", [(f"{r} float32 gpu", f"{r} float32 cpu") for r in ("sft", "dpo")], ids=" ".join)
def test_a_gpu_agrees_with_a_cpu(ran, cases):
    """Losses and gradient norms of three steps in float32; `trainer.use_cpu=true` leaves the GPU alone."""
    gpu, cpu = (ran(case).note(case) for case in cases)
    assert cpu.facts["devices"] == ["cpu"] and "cuda" not in cpu.result["peak_memory_gib"]
    far = [
        abs(a[key] / b[key] - 1)
        for a, b in zip(gpu.log, cpu.log, strict=True)
        for key in ("loss", "grad_norm")
        if key in a
    ]
    note(cases[0], largest_relative_difference=max(far))
    assert len(far) == 6 and max(far) < 1e-4


@pytest.mark.gpu(limit=30)
@on_a_gpu
def test_a_weight_is_quantized_to_the_same_bits():
    from bitsandbytes import functional

    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = {
        d: functional.quantize_4bit(weight.to(d), quant_type="nf4", compress_statistics=True) for d in ("cpu", "cuda")
    }
    whole = {device: functional.dequantize_4bit(*pair).float().cpu() for device, pair in packed.items()}
    note("quantized", packed_alike=(packed["cpu"][0] == packed["cuda"][0].cpu()).float().mean().item(),
         largest_difference=(whole["cpu"] - whole["cuda"]).abs().max().item())  # fmt: skip
    assert (whole["cpu"] - whole["cuda"]).abs().max() < 2**-6 * weight.abs().max()


# ---- 3 Killed, reloaded, published


@pytest.mark.gpu(limit=120)
@pytest.mark.parametrize("cases", [("dpo whole",), ("ppo whole",)], ids=" ".join)
def test_a_killed_run_goes_on(ran, command, tiny, cases):
    recipe, overrides = CASES[cases[0]]
    words = of(recipe, *tiny, *episodes(recipe), *overrides)
    assert command(f"{recipe} killed", *words, KILL="step 3").code == -signal.SIGKILL
    continued = command(f"{recipe} killed", *words).note(f"{recipe} continued")
    assert continued.result["resumed_from"] == "checkpoint-2"
    whole = ran(cases[0]).note(cases[0])
    far = max((weight - whole.weights[name]).abs().max().item() for name, weight in continued.weights.items())
    note(f"{recipe} continued", largest_difference=far)
    assert far < 1e-5


@pytest.mark.gpu(limit=60)
@pytest.mark.parametrize("cases", [("reward nf4",), ("reward int8",)], ids=" ".join)
def test_a_reload_scores_alike_twenty_times(ran, cases):
    """Bit for bit: else a run of hours ends in an error of ours."""
    found = ran(cases[0])
    note(cases[0], reloads_that_differ=found.facts.get("failed"))
    assert found.facts["failed"] == 0


@pytest.mark.gpu(limit=120)
@pytest.mark.parametrize("cases", [("dpo nf4", "reward nf4")], ids=" ".join)
def test_what_was_trained_is_published(ran, command, cases):
    """A round trip on the GPU, one with merged weights, and one where only a CPU is left."""
    ways = {"adapter": ([], {}), "merged": (["merged=true"], {}), "on a CPU": ([], {"CUDA_VISIBLE_DEVICES": ""})}

    def published(case: str) -> list[Ran]:
        run, chosen = ran(case).folder, ways if case == cases[0] else ("adapter", "on a CPU")
        asked = of("publish", f"run={run}", "folder={folder}_files", "license=apache-2.0")
        return [
            command(f"published {case} {way}", *asked, *ways[way][0], **ways[way][1], FACTS=None) for way in chosen
        ]

    with ThreadPoolExecutor(1 if SMALL else 2) as pool:
        found = [each for some in pool.map(published, cases) for each in some]
    for each in found:
        note(each.folder.parent.name, exit=each.code, seconds=each.seconds, said=each.said[-600:])
    assert [each.code for each in found] == [0] * 5


# ---- 4 Several cards, one process


@pytest.mark.gpu(limit=60)
@on_a_gpu
@pytest.mark.parametrize("recipe", ["dpo", "orpo"])
def test_of_two_visible_cards_one_is_taken(command, tiny, recipe):
    found = command(f"{recipe} of two", *of(recipe, *tiny), CARDS="2", CUDA_VISIBLE_DEVICES=None).note(
        f"{recipe} of two"
    )
    assert "2 cards are visible" in found.said and found.facts["devices"] == ["cuda"]


@pytest.mark.gpu(limit=90)
@on_a_gpu
def test_fsdp2_with_one_rank(command, tiny):
    launcher = ROOT / "conf" / "accelerate" / "fsdp2_qlora.yaml"
    words = ["-m", "accelerate.commands.launch", "--config_file", launcher, "--num_processes", "1"]
    found = command("fsdp2", *words, *of("dpo", *tiny, "quantization=nf4_fsdp")).note("fsdp2")
    assert any(weight.any() for name, weight in found.weights.items() if "lora_B" in name)


# ---- 5 An 8B


SIDES = {"dpo": 4, "orpo": 4, "simpo": 4}


@pytest.fixture(scope="session")
def side_by_side(command, large, request):
    """The trainings of pairs on the 8B, started together: their peaks are their own, their seconds are not."""
    items = [item for item in request.session.items if item.name.startswith("test_an_8b_trains")]
    chosen = {item.callspec.params["recipe"] for item in items}
    words = {
        r: of(r, *large, *pairs(), f"trainer.per_device_train_batch_size={SIDES[r]}") for r in SIDES if r in chosen
    }
    with ThreadPoolExecutor(3) as pool:
        yield {recipe: pool.submit(command, f"8B {recipe}", *each) for recipe, each in words.items()}


def pairs() -> list[str]:
    return ["data=local", "data.path=long.jsonl", "data.test_size=2", f"trainer.max_length={LONG}",
            "trainer.max_steps=3", "trainer.gradient_accumulation_steps=1", "trainer.logging_steps=1",
            "trainer.save_strategy=no"]  # fmt: skip


@pytest.mark.gpu(limit=150)
@pytest.mark.parametrize("recipe", SIDES)
def test_an_8b_trains_in_the_memory_that_is_predicted(side_by_side, compose, large, recipe):
    """Four pairs of 1,024 tokens in NF4: GiB against preflight's, and against a card of 24."""
    found = side_by_side[recipe].result()
    predicted = predict(compose, recipe, large, SIDES[recipe])
    found.note(f"8B {recipe}", predicted=predicted, train_seconds=found.seconds_of("train_runtime"))
    if not SMALL:
        measured = found.facts["gib"]["allocated"] + predicted["context"]
        assert measured < 1.05 * predicted["peak"] < 1.5 * measured
        assert found.facts["gib"]["reserved"] + predicted["context"] < CARD_GIB


def predict(compose, recipe: str, large: list[str], batch: int) -> dict[str, float]:
    """GiB of the phases that preflight predicts."""
    from rlhf_recipes import models
    from rlhf_recipes.launch.preflight import predict_memory
    from rlhf_recipes.run import Run

    cfg = compose(recipe, *large, f"trainer.max_length={LONG}", f"trainer.per_device_train_batch_size={batch}")
    args = models.training_args(cfg.trainer, Run(Path("x"), recipe, {}))
    base = predict_memory.backbone(cfg, recipe)
    seen = predict_memory.predict(cfg, args, base, predict_memory.Batch(2 * batch, LONG, completion=LONG // 2), 0)
    # The two rows that are held out are fewer than the batches that many would make.
    phases = {name: round(gib, 2) for name, gib in seen["phases"].items() if name != "held-out"}
    return {"peak": max(phases.values()), "context": predict_memory.CONTEXT / GIB, **phases}


CRITICS = {
    "head": ["trainer.value=head"],
    "separate": ["trainer.value=separate"],
    "merged": ["trainer.value=head", "trainer.merge_to_sample=true"],
}


@pytest.mark.gpu(limit=100)
@pytest.mark.parametrize("critic", CRITICS)
def test_ppo_on_an_8b(command, large, critic):
    """16 episodes of 128 + 128 tokens, two rollouts, alone on the card: seconds by phase, tokens a second, GiB."""
    found = command(f"8B ppo {critic}", *of("ppo", *large, *rollouts(2), *CRITICS[critic], "reward_funcs=words:count"))
    found.note(f"8B ppo {critic}", **found.seconds_of("seconds/rollout", "seconds/scoring", "seconds/update"))
    assert SMALL or found.facts["gib"]["reserved"] < (CARD_GIB if critic != "merged" else 40)


def rollouts(count: int) -> list[str]:
    return ["data=local", "data.path=prompts.jsonl", "data.test_size=2", "trainer.per_device_train_batch_size=4",
            "trainer.gradient_accumulation_steps=4", "trainer.num_ppo_epochs=1", f"trainer.max_steps={count}",
            "trainer.num_mini_batches=1", "trainer.save_strategy=no",
            f"trainer.max_completion_length={ANSWER}"]  # fmt: skip


@pytest.mark.gpu(limit=120)
def test_ppo_against_trl(command, make_model, work, monkeypatch):
    """The same shapes in bfloat16 on a 1B, by us and by TRL 1.12, which trains a whole model as its critic."""
    from transformers import LlamaForSequenceClassification

    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    from ppo_vs_trl import TRL

    wheel = next((ROOT / ".whl" / "anchor").glob("trl-*.whl"), None)
    if not wheel:
        pytest.skip("make gpu-wheels fetches TRL 1.12")
    ZipFile(wheel).extractall(work / "anchor")
    policy = make_model(work / "1b", **LLAMA_1B)
    classifier = make_model(work / "1b_reward", LlamaForSequenceClassification, **LLAMA_1B, num_labels=1)
    model = [f"model.path={policy}", "model.id=tests/1b", "quantization=none", "model.dtype=bfloat16"]
    ours = command("1B ours", *of("ppo", *model, *rollouts(3), f"reward_funcs={classifier}"))
    ours.note("1B ours", **ours.seconds_of("seconds/rollout", "seconds/scoring", "seconds/update"))
    rows = [json.loads(line) for line in (work / "prompts.jsonl").read_text().splitlines()]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    arguments = {"num_ppo_epochs": 1, "num_mini_batches": 1, "gradient_accumulation_steps": 4,
                 "total_episodes": len(rows), "response_length": ANSWER, "learning_rate": 3e-6}  # fmt: skip
    given = json.dumps([str(policy), str(classifier), prompts, 4, "bfloat16", arguments])
    script = TRL if SMALL else TRL.replace("use_cpu=True, ", "")
    search = os.pathsep.join(filter(None, [str(work / "anchor"), os.environ.get("PYTHONPATH")]))
    theirs = command("1B TRL", "-c", script, given, PYTHONPATH=search, TRL_EXPERIMENTAL_SILENCE="1")
    clock = [float(moment) for moment in re.findall(r"CLOCK ([\d.]+)", theirs.said)]
    updates = [round(after - before, 2) for before, after in itertools.pairwise(clock)]
    note("1B TRL", exit=theirs.code, seconds_of_updates=updates, said=theirs.said[-800:] if theirs.code else "")
    assert theirs.code == 0 and updates, theirs.said[-3000:]


@contextmanager
def timed(seconds: dict, name: str):
    if not SMALL:
        torch.cuda.synchronize()
    begin = time.monotonic()
    yield
    if not SMALL:
        torch.cuda.synchronize()
    seconds[name] = round(time.monotonic() - begin, 3)


@pytest.mark.gpu(limit=100)
def test_an_8b_answers_and_judges(compose, large, monkeypatch):
    """Tokens a second of evaluate's answers and log-probabilities, and of cai's answers and choices, in small batches
    and in those that the card has room for; then a draw for many rows."""
    from rlhf_recipes import inference
    from rlhf_recipes.cai import local
    from rlhf_recipes.cai.backend import Request
    from rlhf_recipes.sampling import Draws

    cfg, seconds, tokens = compose("cai", *large), {}, {}
    with timed(seconds, "load"):
        backend = local.load(cfg.model, cfg.quantization, None)
    rows = 4 if SMALL else 160
    asked = [
        [{"role": "user", "content": f"{i}. Which day suits the caller best, and why that one?"}] for i in range(rows)
    ]
    times = inference.batches_in_one(backend.model)
    for count in dict.fromkeys((1, times)):
        for module in (inference, local):
            monkeypatch.setattr(module, "batches_in_one", lambda model, count=count: count)
        how = inference.Sampling(max_new_tokens=ANSWER // 2, temperature=1.0, seed=0)
        with timed(seconds, f"answers, {count} in one"):
            found = inference.generate(backend.model, backend.tokenizer, asked, how, "answers")
        tokens[f"answers, {count} in one"] = sum(each["tokens"] for each in found)
        encoded = [([5] * LONG, LONG // 2)] * (rows // 4)
        with timed(seconds, f"log-probabilities, {count} in one"):
            inference.token_logps(backend.model, 0, encoded, "log-probabilities")
        tokens[f"log-probabilities, {count} in one"] = LONG * len(encoded)
        requests = [
            Request(str(i), "answer", m, max_new_tokens=ANSWER // 2, temperature=1.0, seed=i)
            for i, m in enumerate(asked)
        ]
        with timed(seconds, f"cai answers, {count} in one"):
            found = [answer for group in backend.answer(requests, (), "cai") for _, answer in group]
        tokens[f"cai answers, {count} in one"] = sum(each["tokens"] for each in found)
        requests = [Request(str(i), "judge", m, options=("A", "B")) for i, m in enumerate(asked)]
        with timed(seconds, f"cai choices, {count} in one"):
            list(backend.answer(requests, (), "cai"))
        tokens[f"cai choices, {count} in one"] = 2 * len(requests)
    device = backend.model.device
    for B in (16, 256):
        draws, logits_BV = Draws(list(range(B)), device, 20), torch.randn(B, LLAMA_8B["vocab_size"], device=device)
        with timed(seconds, f"draw, {B} rows, 20 times"):
            for _ in range(20):
                draws.draw(logits_BV, list(range(B)))
    per_second = {name: round(count / seconds[name], 1) for name, count in tokens.items()}
    note("8B answers", batches_in_one=times, seconds=seconds, tokens_per_second=per_second)
    assert all(per_second.values())
