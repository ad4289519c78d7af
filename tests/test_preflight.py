"""Preflight: what is counted of rows and of memory, real steps, and what stops a run, a sweep or a pipeline."""

import itertools
import json
import math
import os
import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from rlhf_recipes import config, memory, model_files, models, references
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.data.fit import fit
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.data.tokens import Sizes
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import cards
from rlhf_recipes.launch.preflight import disk, predict_memory, real_steps, rows
from rlhf_recipes.launch.preflight import job as examination
from rlhf_recipes.launch.preflight import look as preflight
from rlhf_recipes.launch.preflight.report import JobReport
from rlhf_recipes.launch.recipe import spelled_out
from rlhf_recipes.overrides import quoted
from rlhf_recipes.run import Run, resolved

GIB = 2**30


def pair(number, chosen, rejected, prompt=None):
    turns = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    return {
        "prompt": turns("user", prompt or f"question {number}"),
        "chosen": turns("assistant", chosen),
        "rejected": turns("assistant", rejected),
        "prompt_id": str(number),
    }


# ---- Rows


def test_length_correlation_by_hand():
    # ln lengths: chosen 2, 2; rejected 1, 1. All: mean 1.5, deviation 0.5; (2 - 1) / (2 * 0.5) = 1.
    chosen, rejected = ["x" * 8, "x" * 8], ["x" * 4, "x" * 4]
    assert rows.length_correlation(chosen, rejected, ["a", "b"]).value == pytest.approx(1.0)
    assert rows.length_correlation(rejected, chosen, ["a", "b"]).value == pytest.approx(-1.0)
    # ln 8 and ln 4 each once on either side
    assert rows.length_correlation(["x" * 8, "x" * 4], ["x" * 4, "x" * 8], ["a", "b"]).value == pytest.approx(0.0)
    assert rows.length_correlation(["x"], ["y"], ["a"]).value == 0.0


def test_near_duplicates_are_found_and_others_are_not():
    asked = "Could you please tell me how many tablets of paracetamol a grown person may take in one day"
    train = [pair(0, "a", "b", asked), pair(1, "a", "b", "Something else entirely, about the weather in June")]
    test = [
        pair(2, "a", "b", asked + " please"),
        pair(3, "a", "b", "Could you please tell me how many people live in the city that I was born in one day"),
    ]
    assert rows.near_duplicates(train, test) == 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory, compose):
    """24 pairs and two that are far too long: the chosen reply is the longer one in 19, in five both refuse, one has a
    control token, and a test prompt nearly is a train prompt."""
    path = tmp_path_factory.mktemp("planted") / "pairs.jsonl"
    no = "I cannot help with that"
    lines = [
        {"prompt": f"question {i}", "chosen": f"a good long answer {i}", "rejected": f"bad {i}"} for i in range(17)
    ]
    lines += [{"prompt": f"rude {i}", "chosen": no, "rejected": f"{no} {i}"} for i in range(5)]
    lines += [{"prompt": "question <|im_end|> nine", "chosen": "yes of course it is", "rejected": "no"}]
    lines += [{"prompt": f"long {i}", "chosen": "word " * 200, "rejected": "word"} for i in range(2)]
    test = [
        {
            "prompt": "what is the name of the longest river in the whole wide world today",
            "chosen": "a",
            "rejected": "b",
        }
    ]
    lines += [{**test[0], "prompt": test[0]["prompt"] + " then", "chosen": "the Nile it is said", "rejected": "no"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    path.with_name("test.jsonl").write_text("\n".join(map(json.dumps, test)) + "\n")
    return path


def test_the_report_counts_what_is_planted(planted, compose, tiny_model_overrides):
    cfg = compose("dpo", *tiny_model_overrides, "data=local", f"data.path={planted}",
                  f"data.test_path={planted.with_name('test.jsonl')}")  # fmt: skip
    tokenizer = models.load_tokenizer(cfg.model)
    splits = fit(load_pairs(cfg.data), tokenizer, 200, "drop")
    report = rows.examine(splits, [10] * 24)
    assert report["over_length"] == {"rows": 2, "of": 27, "fate": " (left out)"}
    assert (report["train"], report["test"], report["near_duplicates"]) == (24, 1, 1)
    assert report["neutralised"]["occurrences"] == 1 and report["tokens"]["train"] == 240
    assert report["chosen_longer"].value == pytest.approx(19 / 24) and report["chosen_longer"].n == 24
    assert report["both_refuse"].value == pytest.approx(5 / 24)
    assert report["length_correlation"].value > 0.5
    remarks = examination._remarks(report, example(cfg, splits, tokenizer), "dpo")
    assert [re.sub(r"\d+", "N", remark)[:40] for remark in remarks] == [
        "N% of the rows are over trainer.max_leng",
        "N of N test prompts nearly are train pro",
        "'the longer reply wins' is right for N% ",
        "both replies of N% of the pairs refuse: ",
    ]


def example(cfg, splits, tokenizer):
    args = models.training_args(cfg.trainer, Run(Path("x"), "dpo", {}))
    return rows.example("dpo", args, splits, tokenizer, cfg.model)


def test_the_example_marks_what_is_trained_and_eos_that_is_cut_off_is_missed(planted, compose, tiny_model_overrides):
    cfg = compose("dpo", *tiny_model_overrides, "data=local", f"data.path={planted}", "data.test_size=2")
    tokenizer = models.load_tokenizer(cfg.model)
    splits = fit(load_pairs(cfg.data), tokenizer, None)
    found = example(cfg, splits, tokenizer)
    text, first = found["text"], splits.train[0]
    assert first["chosen"][0]["content"] in text.partition("⟦")[2].partition("⟧")[0]
    assert first["prompt"][0]["content"] in text.partition("⟦")[0] and first["rejected"][0]["content"] not in text
    assert found["eos"] == ["<|im_end|>"] and found["ends"].value == 1.0
    sizes = splits.sizes["train"]
    cfg.trainer.max_length = int((sizes.whole - sizes.trained).min()) + 2  # two tokens of some answers, none of others
    assert example(cfg, splits, tokenizer)["ends"].value < 0.5


# ---- Memory


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("recipe", ["dpo", "reward"])
def test_a_backbone_counts_what_a_loaded_model_has(recipe, quantization, compose, tiny_model_overrides):
    from peft import get_peft_model

    cfg = compose(recipe, *tiny_model_overrides, f"quantization={quantization}")
    load = models.load_reward_model if recipe == "reward" else models.load_policy
    model, lora = load(cfg.model, cfg.quantization, cfg.lora, None)
    found = predict_memory.backbone(cfg, recipe)
    base = sum(weight.nbytes for weight in model.parameters())
    if recipe == "reward":
        base -= model.score.weight.nbytes  # counted with LoRA: it is trained
    scales = 0.03 * base if quantization != "none" else 256  # of the quantized weights, which lie beside them
    assert found.weights == pytest.approx(base, abs=scales)
    trained = sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)
    assert found.lora == trained


@pytest.mark.parametrize("recipe", ["reward", "dpo", "simpo", "kto"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_allocates_what_is_predicted(recipe, checkpointing, train, tmp_path, monkeypatch):
    """The live bytes of a step, counted by torch's profiler, against the roles that come and go."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from rlhf_recipes.training import account, callbacks

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profile.__enter__()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.profile.__exit__(None, None, None)
                events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
                live = peak = 0
                for event in sorted(events, key=lambda e: e.start_ns()):
                    live += event.nbytes()
                    peak = max(peak, live)
                self.peak = peak

    count = Count()
    watch = callbacks.watch
    monkeypatch.setattr(callbacks, "watch", lambda trainer, job: (watch(trainer, job), trainer.add_callback(count)))
    pairs = tmp_path / "pairs.jsonl"
    reply = "a good answer of some length, and then more of it, and more. " * 6
    pairs.write_text(
        "".join(json.dumps({"prompt": f"q {i}", "chosen": reply, "rejected": "x" + reply}) + "\n" for i in range(12))
    )
    sizes = []
    check = account.check
    monkeypatch.setattr(
        account, "check", lambda trainer, rows: (check(trainer, rows), sizes.append(rows.sizes["train"]))
    )
    settings = ["data=local", f"data.path={pairs}", "data.test_size=4", "trainer.gradient_accumulation_steps=1",
                "doctor=none", f"trainer.gradient_checkpointing={str(checkpointing).lower()}"]  # fmt: skip
    trained = train(recipe, tmp_path / "run", *settings)
    base = predict_memory.backbone(trained.cfg, recipe)
    longest = trained.result["counts"]["tokens"]["max"]
    batch = predict_memory.Batch(2 if recipe == "kto" else 4, longest)
    batch = examination._fast(batch, trained.trainer.args, sizes[0], base.config.hidden_size, steps=4)
    parts = predict_memory._step(base, batch, "cpu", trained.trainer.args)
    assert sum(parts.values()) == pytest.approx(count.peak, rel=0.2)


def test_the_steps_write_into_no_folder_of_the_job(compose, tiny_model_overrides):
    cfg = compose("dpo", *tiny_model_overrides)
    args = models.training_args(cfg.trainer, Run(Path("x"), "dpo", {}))
    own = ["output_dir=mine", "run_name=mine", "hydra.run.dir=mine", "data.path=mine", "trainer.beta=0.5"]
    given = real_steps._overrides("dpo", own, args, "/scratch")
    assert "trainer.beta=0.5" in given and given[-2] == "hydra.run.dir=/scratch/run"
    assert [each for each in given if "mine" in each] in ([], ["hydra.run.dir=mine"])  # the last one counts


def test_rows_are_those_of_the_micro_batch_that_fills_most(compose, tiny_model_overrides):
    """Pairs of 220 + 100 tokens and of 22 + 10: of the micro-batches of four, a long pair lies in a row with three
    short ones (416 tokens in all), unless long ones come together."""
    whole = np.array([[220, 220]] * 2 + [[22, 22]] * 14)
    sizes = Sizes(whole, np.array([[100, 100]] * 2 + [[10, 10]] * 14))
    cfg = compose("dpo", *tiny_model_overrides, "trainer.per_device_train_batch_size=4")
    args = models.training_args(cfg.trainer, Run(Path("x"), "dpo", {}))

    def rows_of(steps):
        found = examination._fast(predict_memory.Batch(8, 220), args, sizes, hidden_size=64, steps=steps)
        assert found.completion == 100
        return found.rows, found.row_tokens

    args.gradient_accumulation_steps = 1
    assert list(itertools.islice(real_steps.micro_batches([320] * 2 + [32] * 14, 4), 4)).count([32] * 4) == 2
    assert rows_of(steps=4) == (1, 416) and rows_of(steps=400) == (2, 352)
    args.train_sampling_strategy = "group_by_length"
    assert rows_of(steps=4) == (2, 352)
    halved = predict_memory.Batch(8, 220, rows=2, row_tokens=352).halved()
    assert halved.forward_tokens == 352 and halved.halved().forward_tokens == 176


def test_not_every_batch_of_most_tokens_fills_most(monkeypatch):
    """512 tokens of equal answers are 512; of 480 the longest decides: two rows of 320."""
    monkeypatch.setattr(real_steps, "micro_batches", lambda tokens, batch: iter([[128] * 4, [320, 64, 64, 32]]))
    args = SimpleNamespace(
        per_device_train_batch_size=4, gradient_accumulation_steps=1, train_sampling_strategy="random"
    )
    found = examination._in_rows(predict_memory.Batch(4, 320), args, [1] * 8, hidden_size=16, steps=2)
    assert (found.rows, found.row_tokens) == (2, 320)


def test_a_job_is_predicted_in_rows_unless_its_forward_is_the_trainer_s(
    compose, tiny_overrides, tmp_path, monkeypatch
):
    predict, seen = predict_memory.predict, []

    def watched(cfg, args, base, batch, **more):
        seen.append(batch.rows)
        return predict(cfg, args, base, batch, **more)

    monkeypatch.setattr(predict_memory, "predict", watched)
    for more in ([], ["fast_forward=false"]):
        look(compose, tmp_path / f"{len(more)}", *tiny_overrides, "quantization=none", *more)
    assert seen[0] and not seen[1]


def test_peaks_by_hand(compose, tiny_model_overrides):
    """Two layers, 1,000 tokens in the vocabulary; bfloat16 or float32 as the processor has it."""
    cfg = compose("dpo", *tiny_model_overrides, "quantization=none", "lora.r=4")
    args = models.training_args(cfg.trainer, Run(Path("x"), "dpo", {}))
    base = predict_memory.backbone(cfg, "dpo")
    shape = base.config
    d, f, half = shape.hidden_size, shape.intermediate_size, base.item // 2
    kept = half * (10 * d + 8 * f + 4 * base.keys + 2 * 7 * 4) + 8 * d + 4 * shape.num_attention_heads
    assert base.kept == kept
    seen = predict_memory.predict(cfg, args, base, predict_memory.Batch(64, 1000, shapes=3), libraries=GIB)
    expected = {
        "libraries": GIB + predict_memory.STARTED,
        "base": base.stored,
        "kernels": predict_memory.KERNEL_BYTES * 3 if base.item == 2 else 0,
        "LoRA": 4 * base.lora,
        "optimizer": 8 * base.lora,
        "gradients": 4 * base.lora,
        "activations": 1.45 * 64000 * 2.5 * kept,
        "logits": 1.45 * 4096 * (1000 * base.item + 29 * 1000),
    }
    expected = {role: size for role, size in expected.items() if size}
    assert seen["when"] == "step" and seen["where"] == "cpu"
    assert seen["roles"] == pytest.approx({role: size / GIB for role, size in expected.items()})
    assert seen["peak_gib"] == pytest.approx(sum(expected.values()) / GIB)


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "max").write_text("3000\n")
    (tmp_path / "current").write_text("1000\n")
    monkeypatch.setattr(memory, "CGROUP", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.free() == 2000
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 600\nactive_file 50\n")
    assert memory.free() == 2600  # the kernel takes from the files that it keeps before anything fails
    (tmp_path / "max").write_text("max\n")
    assert memory.free() > 2**20


# ---- Jobs


def look(compose, folder, *overrides, recipe="dpo", names=("",)):
    cfg = compose(recipe, *overrides, "preflight.measure=false")
    jobs = [examination.Job(name, recipe, cfg, list(overrides)) for name in names]
    preflight.look(jobs, folder, cfg.preflight)
    return json.loads((folder / preflight.FILE).read_text())


def test_what_does_not_fit_is_named_with_what_would(compose, tiny_overrides, tmp_path, monkeypatch, capsys):
    settings = [*tiny_overrides, "quantization=none", "trainer.per_device_train_batch_size=4096"]
    monkeypatch.setattr(memory, "free", lambda: 64 * GIB)
    first = look(compose, tmp_path / "a", *settings)["jobs"][0]["memory"]
    small = look(compose, tmp_path / "b", *settings[:-1], "trainer.per_device_train_batch_size=16")["jobs"][0][
        "memory"
    ]
    free = (first["peak_gib"] + small["peak_gib"]) / 2
    monkeypatch.setattr(memory, "free", lambda: free * GIB)
    with pytest.raises(ValueError, match="fails=warn") as refused:
        look(compose, tmp_path / "c", *settings)
    said = str(refused.value)
    assert "\n" not in said and f"{free:.1f} GiB are free" in said
    proposed = re.search(r"It fits with (.*)\. Or start", said).group(1).split()
    fitting = look(compose, tmp_path / "d", *settings, *proposed)["jobs"][0]["memory"]
    assert fitting["peak_gib"] <= free < first["peak_gib"]
    assert "trainer.gradient_accumulation_steps=" in said, "a smaller batch is made up for"
    report = look(compose, tmp_path / "e", *settings, "preflight.fails=warn")
    assert report["jobs"][0]["stops"] and "STOP" in capsys.readouterr().out
    for fails in ("stop", "warn"):  # there is nothing to start
        with pytest.raises(ValueError, match=r"It fits with [^:]*\.$"):
            look(compose, tmp_path / "g", *settings, "preflight.only=true", f"preflight.fails={fails}")
    monkeypatch.setattr(memory, "free", lambda: 1)
    with pytest.raises(ValueError, match="Choose a smaller model"):
        look(compose, tmp_path / "f", *settings)


LARGE = {  # as Qwen2.5-32B and Llama-3.1-70B are
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


@pytest.mark.parametrize(("model", "free", "cards"), [("32b", 24, 1), ("70b", 48, 1), ("70b", 32, 2), ("70b", 24, 4)])
def test_it_says_on_how_many_cards_a_large_model_fits(compose, tmp_path, monkeypatch, model, free, cards):
    """In NF4, one pair of 1,024 tokens a micro-batch, with checkpointing: counted, no card is here."""
    import torch
    from transformers import LlamaConfig

    LlamaConfig(**LARGE[model], tie_word_embeddings=False).save_pretrained(tmp_path)
    small = ("trainer.per_device_train_batch_size=1", "trainer.gradient_checkpointing=true")
    cfg = compose("dpo", f"model.path={tmp_path}", "model.id=tests/large", *small)
    args = config.build(cfg.trainer, "trainer", use_cpu=True, bf16=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    card = SimpleNamespace(total_memory=free * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
    monkeypatch.setattr(memory, "free", lambda: free * GIB)
    found, job = JobReport("", "dpo"), examination.Job("", "dpo", cfg, [])
    predict = partial(predict_memory.predict, cfg, libraries=0)
    base = predict_memory.backbone(cfg, "dpo")
    examination._memory(found, job, args, base, predict_memory.Batch(2, 1024), predict, elsewhere=False)
    if cards == 1:
        assert found.memory["peak_gib"] < free and not found.stops
        examination._memory(found, job, args, base, predict_memory.Batch(2, 1024), predict, False, at_once=4)
        assert f"{free / 4:.1f} GiB are free for each of 4 processes at a time" in found.stops[0]
    else:
        launch = "accelerate launch --config_file conf/accelerate/fsdp2_qlora.yaml recipes/dpo.py"
        assert f" Or in parts, on {cards} such cards: {launch} quantization=nf4_fsdp" in found.stops[0]


def test_a_model_that_the_counts_are_not_of_is_no_reason_to_stop(compose, tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "load_config", lambda model: SimpleNamespace(hidden_size=64))
    seen = look(compose, tmp_path, *tiny_overrides)["jobs"][0]
    assert seen["stops"] == [] and seen["memory"] is None and "no intermediate_size" in seen["watch"][0]


def test_a_job_that_is_refused_does_not_hide_the_others(compose, tiny_overrides, tmp_path, capsys):
    good = compose("dpo", *tiny_overrides, "preflight.measure=false")
    bad = compose("dpo", *tiny_overrides, "trainer.betaa=1")
    jobs = [examination.Job(name, "dpo", cfg, []) for name, cfg in (("bad", bad), ("good", good))]
    with pytest.raises(ValueError, match=r"preflight: bad: trainer\.betaa: .* did you mean 'beta'"):
        preflight.look(jobs, tmp_path, good.preflight)
    seen = json.loads((tmp_path / preflight.FILE).read_text())["jobs"]
    assert seen[0]["memory"] is None and seen[1]["memory"]["peak_gib"] > 0
    assert "reasons to stop: 1" in capsys.readouterr().out


def test_a_shape_is_one_whatever_the_rates_are(compose, tiny_overrides):
    def shape(*overrides, sizes=(3, 5)):
        return examination._shape(compose("dpo", *tiny_overrides, *overrides), "dpo", list(sizes))

    rates = ("trainer.beta=0.5", "trainer.learning_rate=1e-3", "trainer.seed=7", "run_name=x")
    assert shape() == shape(*rates, sizes=(5, 3))
    others = ("trainer.per_device_train_batch_size=1", "lora.r=8", "data.train_size=4", "fast_forward=false")
    assert len({shape(), *map(shape, others), shape(sizes=(3, 6))}) == 2 + len(others)


def test_packed_rows_are_those_that_their_tokens_fill():
    """A thousand of 100 tokens in rows of 1,000, eight a step: 12.5 steps, where each alone would take 125."""
    args = SimpleNamespace(max_steps=-1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                           num_train_epochs=1, packing=True, max_length=1000)  # fmt: skip
    assert real_steps.total_steps("sft", args, real_steps.rows_trained(args, [100] * 1000)) == 13


def test_what_lies_on_the_disk_is_what_is_saved():
    args = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 2, "num_train_epochs": 1}

    def counted(steps=100, **changes):
        return list(disk.checkpoints(SimpleNamespace(**args | changes), steps).values())

    assert counted() == [3, 0] and counted(save_total_limit=5) == [6, 0] and counted(save_strategy="no") == [0, 0]
    assert counted(save_total_limit=None) == [10, 10] and counted(save_strategy="epoch") == [1, 0]


def test_steps_are_those_of_the_run(train, tmp_path):
    trained = train("dpo", tmp_path / "run", "trainer.max_steps=-1", "data.train_size=7", "trainer.num_train_epochs=3")
    assert real_steps.total_steps("dpo", trained.trainer.args, 7) == trained.trainer.state.global_step == 6


def test_real_steps_are_measured_and_their_failure_is_one_line(
    compose, tiny_overrides, tmp_path, monkeypatch, clean_env, warm_python
):
    monkeypatch.setattr("os.environ", dict(clean_env))
    monkeypatch.setattr("sys.executable", warm_python)
    cfg = compose("dpo", *tiny_overrides)
    args = models.training_args(cfg.trainer, Run(Path("x"), "dpo", {}))
    splits = fit(load_pairs(cfg.data), models.load_tokenizer(cfg.model), args.max_length)
    sizes = [100 + i for i in range(len(splits.train))]
    took = real_steps.measure("dpo", tiny_overrides, args, splits, sizes)
    assert took["seconds"] > 0 and 0.3 < took["peak_gib"] < 8
    failed = real_steps.measure("dpo", [*tiny_overrides, "trainer.loss_type=[nonsense]"], args, splits, sizes)
    assert list(failed) == ["error"] and "\n" not in failed["error"] and "nonsense" in failed["error"]


def test_two_steps_are_never_published(compose, tiny_overrides):
    args = models.training_args(compose("dpo", *tiny_overrides).trainer, Run(Path("x"), "dpo", {}))
    told = real_steps._overrides("dpo", [*tiny_overrides, "publish=true", "repo_id=a/b", "data=hh_rlhf"], args, "f")
    assert not {"publish=true", "repo_id=a/b", "data=hh_rlhf"} & set(told) and "data=local" in told


def test_the_steps_read_their_rows_whatever_an_experiment_says(compose, tmp_path):
    (tmp_path / "experiment").mkdir()
    mine = {"data": {"format": "preference", "columns": {"first": "a"}, "train_split": "big", "bootstrap": 1},
            "publish": True, "repo_id": "a/b", "preflight": {"only": True}}  # fmt: skip
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\n{json.dumps(mine)}\n")
    told = real_steps._overrides("dpo", ["experiment=mine"], SimpleNamespace(), "f")
    told = [each for each in told if not each.startswith("hydra.")]
    cfg = compose("dpo", f"hydra.searchpath=[file://{tmp_path}]", *told)
    own = {"path": "f/train.jsonl", "test_path": "f/test.jsonl", "test_size": None, "text": "plain"}
    base = OmegaConf.load(config.CONF / "data/base.yaml")
    assert cfg.data == OmegaConf.merge(base, own, {"too_long": "truncate"})
    assert (cfg.publish, cfg.repo_id, cfg.preflight.only) == (False, None, False)


def test_a_failure_is_measured_again_and_a_success_is_not(compose, tiny_overrides, tmp_path, monkeypatch):
    answers = [{"error": "no network"}, {"seconds": 1.0, "peak_gib": 1.0}]
    monkeypatch.setattr(real_steps, "measure", lambda *_: answers.pop(0))
    cfg = compose("dpo", *tiny_overrides)
    jobs = [examination.Job("", "dpo", cfg, tiny_overrides)]
    with pytest.raises(ValueError, match="its first step fails: no network"):
        preflight.look(jobs, tmp_path, cfg.preflight)
    for _ in range(2):
        preflight.look(jobs, tmp_path, cfg.preflight)
    assert answers == []


def test_a_function_as_reward_is_found_after_ppo_was_imported():
    from rlhf_recipes.ppo.config import PPOConfig  # noqa: F401  a module named as one that ppo once had for itself

    (found,) = references.find_rewards("json:loads")
    assert found.function is json.loads


# ---- The command line


def test_preflight_true_is_spelled_out():
    given = ["trainer.beta=0.1", "preflight=true", "preflight.measure=false", "run_name=preflight=true"]
    quoted = 'run_name="preflight=true"'
    assert spelled_out(given) == ["trainer.beta=0.1", "preflight.only=true", given[2], quoted]


def test_preflight_alone_trains_nothing_and_says_the_next_command(run_recipe, tiny_overrides, tmp_path):
    here = "hydra.run.dir=outputs/dpo/main"
    done = run_recipe("dpo", *tiny_overrides, here, "preflight=true", "preflight.measure=false", cwd=tmp_path)
    assert done.returncode == 0, done
    assert [path.name for path in (tmp_path / "outputs/dpo/main").iterdir()] == ["preflight.json"]
    for word in ("config", "rows", "example", "memory", "disk", "nothing stands in the way", "next"):
        assert word in done.stdout, word
    assert "preflight" not in done.stdout.rpartition("next")[2] and done.stdout.endswith(f" {here}\n")
    started = run_recipe("dpo", *tiny_overrides, cwd=tmp_path)
    assert started.returncode == 0, "a preflight is no run that would have to be replaced"
    again = run_recipe("dpo", *tiny_overrides, "preflight=true", cwd=tmp_path)
    assert again.returncode == 2 and "holds a finished run" in again.stderr and len(again.stderr.splitlines()) == 1


def test_a_sweep_looks_at_all_jobs_first_and_measures_a_shape_once(run_recipe, tiny_overrides, tmp_path):
    grid = ["-m", *tiny_overrides, "quantization=none", "sweep.prompts=0", "run_name=s", "trainer.beta=0.1,0.5"]
    looked = run_recipe("dpo", *grid, "preflight=true", cwd=tmp_path)
    assert looked.returncode == 0, looked
    assert looked.stdout.count("real ones of") == 1 and "beta 0.5" in looked.stdout
    folder = tmp_path / "outputs/dpo/s"
    assert [path.name for path in folder.iterdir()] == ["preflight.json"]
    assert len(json.loads((folder / "preflight.json").read_text())["measured"]) == 1
    refused = run_recipe("dpo", *grid[:-1], "trainer.beta=0.1,abc", cwd=tmp_path)
    assert refused.returncode == 2 and "beta=abc" in refused.stderr, refused
    assert len(refused.stderr.splitlines()) == 1 and not (folder / "rows").exists()
    done = run_recipe("dpo", *grid, cwd=tmp_path)
    assert done.returncode == 0 and "real ones of" not in done.stdout, "what was measured is kept"
    assert done.stdout.index("nothing stands in the way") < done.stdout.index("dpo finished in")


def jobs_of(*overrides, hydra_overrides=()):
    """Of a sweep of dpo, as Hydra's own node says that it was started."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3", job_name="dpo"):
        launch = [each for each in overrides if "," not in each]
        with_task = OmegaConf.merge(hydra.compose("dpo", overrides=launch, return_hydra_config=True), {})
        OmegaConf.set_readonly(with_task.hydra, False)
        with_task.hydra.overrides.task = overrides
        with_task.hydra.overrides.hydra = ["hydra.mode=MULTIRUN", *hydra_overrides]
        with_task.hydra.job.config_name = "dpo"
        return list(preflight.sweep_jobs(with_task))


@pytest.mark.parametrize("sweep", ["dpo_beta", "dpo_optuna"])
def test_jobs_of_a_sweep_are_its_grid_or_the_corners_of_its_space(sweep, compose, tiny_overrides):
    jobs = jobs_of(f"sweep={sweep}", *tiny_overrides)
    names = [name for name, *_ in jobs]
    if sweep == "dpo_beta":
        assert names == [f"beta={beta}" for beta in ("0.01", "0.03", "0.1", "0.3", "1.0")]
        assert [cfg.trainer.beta for _, _, cfg, _ in jobs] == [0.01, 0.03, 0.1, 0.3, 1.0]
        assert "trainer.beta=0.03" in jobs[1][3] and tiny_overrides[0] in jobs[1][3]
    else:
        assert names == [f"beta={b},epsilon={e}" for b in ("0.01", "1.0") for e in ("0.0", "0.3")]


def test_jobs_of_a_sweep_are_those_that_hydra_runs(compose):
    """The last word on a key counts; two jobs never have one folder, and names that part them are proposed."""
    assert [name for name, *_ in jobs_of("sweep=dpo_beta", "trainer.beta=0.3")] == ["beta=0.3"]
    given = [
        "sweep=dpo_beta",
        "trainer.beta=0.2,0.4",
        "trainer.learning_rate=1e-5,5e-6",
        "run_name=of_${trainer.beta}",
    ]
    with pytest.raises(Refusal) as refused:
        jobs_of(*given)
    said, _, advice = str(refused.value).partition(" Add ")
    assert said == "trainer.learning_rate: jobs that differ in it would share the folder beta=0.2."
    (typed,) = shlex.split(advice.removesuffix("."))
    rates, betas = ("1e-05", "5e-06"), ("0.2", "0.4")
    jobs = [(name, cfg.run_name) for name, _, cfg, _ in jobs_of(*given, hydra_overrides=[quoted(typed)])]
    assert jobs == [(f"beta={beta},learning_rate={rate}", f"of_{beta}") for beta in betas for rate in rates]
    with pytest.raises(Refusal, match=r"^trainer\.beta=0\.2: is given twice\. Leave one out\.$"):
        jobs_of("sweep=dpo_beta", "trainer.beta=0.2,0.2")


@pytest.mark.parametrize(
    ("launcher", "sweeper", "at_once"),
    [
        ({"_target_": "BasicLauncher"}, {}, 1),
        ({"_target_": "JoblibLauncher", "n_jobs": 2}, {}, 2),
        ({"_target_": "JoblibLauncher", "n_jobs": -1}, {"n_jobs": 3}, 3),
        ({"_target_": "JoblibLauncher", "n_jobs": -1}, {"max_batch_size": None}, 5),
        ({"_target_": "LocalLauncher"}, {}, 5),
    ],
)
def test_jobs_of_a_sweep_share_what_is_free(monkeypatch, launcher, sweeper, at_once):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv(cards.BEFORE, raising=False)
    node = OmegaConf.create({"launcher": launcher, "sweeper": sweeper})
    assert preflight._at_once(node, 5, 1) == at_once
    monkeypatch.setenv(cards.BEFORE, "0,1")
    assert preflight._at_once(node, 5, 1) == math.ceil(at_once / 2) or at_once == 1


def test_a_report_that_is_damaged_is_named(tmp_path):
    (tmp_path / preflight.FILE).write_text('{"measured"')
    with pytest.raises(ValueError, match=rf"^{tmp_path}/preflight\.json: not valid JSON .* Restore it\.$"):
        preflight.look([SimpleNamespace(cfg=OmegaConf.create())], tmp_path, OmegaConf.create())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_sweep_looks_at_the_jobs_that_it_will_train(monkeypatch, tmp_path, overwrite):
    (tmp_path / "a").mkdir()
    cfg = OmegaConf.create({"trainer": {"beta": 0.1}})
    (tmp_path / "a" / "result.json").write_text(json.dumps({"config_sha256": config_sha256(resolved(cfg))}))
    looked = []
    monkeypatch.setattr(preflight, "look", lambda jobs, *_, **__: looked.extend(job.name for job in jobs))
    monkeypatch.setattr(preflight, "sweep_jobs", lambda _: [(name, "dpo", cfg, []) for name in "ab"])
    hydra = {"sweep": {"dir": str(tmp_path)}, "launcher": {"_target_": "BasicLauncher"}}
    preflight.before_sweep(OmegaConf.create({"overwrite": overwrite, "preflight": None, "hydra": hydra}))
    assert looked == (["a", "b"] if overwrite else ["b"])


def test_a_pipeline_looks_at_stages_whose_input_is_not_there_yet(run_recipe, tiny_model_overrides, tmp_path):
    stages = """stages=[{name:sft,recipe:sft,overrides:['data.train_size=8','trainer.max_steps=1']},
        {name:dpo,recipe:dpo,overrides:['model.adapter={dir}/sft','data.train_size=8']},
        {name:made,recipe:reward,overrides:['data=cai_pairs','data.path={dir}/cai/pairs']}]"""
    stages = "".join(line.strip() for line in stages.splitlines())
    shared = f"shared=[{','.join(map(repr, [*tiny_model_overrides, 'data.eval_size=4']))}]"
    done = run_recipe("pipeline", stages, shared, "preflight=true", "preflight.measure=false", cwd=tmp_path)
    assert done.returncode == 0, done
    assert (
        "cai/pairs is made by an earlier stage" in done.stdout and "adapter outputs/pipeline/main/sft" in done.stdout
    )
    assert [path.name for path in (tmp_path / "outputs/pipeline/main").iterdir()] == ["preflight.json"]
