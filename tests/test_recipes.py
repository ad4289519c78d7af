"""Every recipe, two steps on the tiny model: what it trains, what it leaves alone, and what it leaves behind."""

import functools
import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import LIMIT, ROOT, TINY_ID
from safetensors.torch import load_file, save_file

from rlhf_recipes.methods import METHODS

# A chained run must not ask the hub about its base whenever it saves.
pytestmark = pytest.mark.filterwarnings("error:Unable to fetch remote file")
RECIPES = tuple(name for name, method in METHODS.items() if not method.samples)
# Far above what anyone would train with, so that two steps show in bfloat16.
STRONG = ("trainer.learning_rate=0.01", "trainer.warmup_steps=0")
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Can I come on day {n}?"}],
        "chosen": [{"role": "assistant", "content": "Yes, " + "of course. " * n}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for n in range(1, 5)
]
FRESH_PROCESS = """
import json, sys
import hydra
from peft import PeftModel
from transformers import AutoModelForCausalLM
import rlhf_recipes.config
from rlhf_recipes import inference, models

overrides, adapter, rows = json.load(sys.stdin)
with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
    cfg = hydra.compose("dpo", overrides)
base = models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)
policy = PeftModel.from_pretrained(base, adapter)
json.dump(inference.pair_logps(policy, models.load_tokenizer(cfg.model), rows), sys.stdout)
"""


# With int8, simpo's forward is that of orpo.
RUNS = [(r, q) for q in ("nf4", "int8", "none") for r in RECIPES if (r, q) != ("simpo", "int8")]


@pytest.fixture(scope="module")
def strongly(train, tmp_path_factory):
    """strongly(recipe, quantization): its run, made once."""

    @functools.cache
    def once(recipe, quantization):
        folder = tmp_path_factory.mktemp(f"{recipe}_{quantization}") / recipe
        drawn = (recipe, quantization) in (("sft", "none"), ("kto", "none"))  # dpo's and ppo's are by other tests
        return train(recipe, folder, f"quantization={quantization}", *STRONG, "trainer.save_steps=1", drawn=drawn)

    return once


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def trained(request, strongly):
    return strongly(*request.param)


@pytest.fixture(scope="module")
def chain(train, strongly, tmp_path_factory):
    """sft, then dpo on its adapter, side by side in one folder."""
    sft, folder = strongly("sft", "nf4"), tmp_path_factory.mktemp("chain")
    sft = replace(sft, dir=shutil.copytree(sft.dir, folder / "sft"))
    return sft, train("dpo", folder / "dpo", "model.adapter=sft", *STRONG)


def load_base(cfg, recipe):
    """The base as a later run or an evaluation loads it, prepared as the recipe's trainer prepares it."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.utils import peft_module_casting_to_bf16

    from rlhf_recipes import models

    if recipe == "reward":
        return models.load_base(cfg.model, cfg.quantization, AutoModelForSequenceClassification, num_labels=1)
    base = models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)
    if recipe in ("orpo", "simpo") and "_target_" in cfg.quantization:  # TRL: norms (int8: embeddings too) in float32
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        if cfg.quantization.get("load_in_4bit") and models.computes_in_bf16():
            peft_module_casting_to_bf16(base)
    return base


def held_out(cfg, tokenizer):
    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.load import load_pairs

    return fit(load_pairs(cfg.data), tokenizer, 1024).test


def measured(model, tokenizer, recipe, rows):
    from rlhf_recipes import inference

    of_pairs = inference.pair_rewards if recipe == "reward" else inference.pair_logps
    return torch.tensor([list(row.values()) for row in of_pairs(model, tokenizer, rows)], dtype=torch.float64)


def distance(a, b):
    return (a - b).abs().max().item()


def test_adapter_moves_and_base_does_not(trained):
    recipe = trained.result["recipe"]
    for name, weight in trained.weights.items():
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()
        if ".lora_B." in name:  # zero before training
            assert weight.abs().max() > 1e-4, name

    after = {n: p for n, p in trained.trainer.model.named_parameters() if "lora_" not in n and "modules_to" not in n}
    base = load_base(trained.cfg, recipe if recipe == "reward" else "sft")
    for name, before in base.named_parameters():
        if recipe == "reward" and name.startswith("score"):
            continue  # new in every load
        now = after.get(f"base_model.model.{name.replace('.weight', '.base_layer.weight')}")
        now = after[f"base_model.model.{name}"] if now is None else now
        assert now.dtype == before.dtype or now.is_floating_point(), name
        assert torch.equal(now.float(), before.float()), name  # bfloat16 widens to float32 without loss
        if getattr(before, "quant_state", None) is not None:
            assert torch.equal(now.quant_state.absmax, before.quant_state.absmax), name


def test_quantization_is_what_was_asked_for(trained):
    import bitsandbytes

    layer = trained.trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    classes = {"load_in_4bit": bitsandbytes.nn.Linear4bit, "load_in_8bit": bitsandbytes.nn.Linear8bitLt}
    asked = [kind for key, kind in classes.items() if trained.cfg.quantization.get(key)]
    assert type(layer) is (asked[0] if asked else torch.nn.Linear)
    assert layer.weight.dtype == {"nf4": torch.uint8}.get(
        trained.cfg.quantization.get("bnb_4bit_quant_type"), torch.int8 if asked else trained.trainer.model.dtype
    )


def test_run_folder(trained):
    result, folder = trained.result, trained.dir
    recipe = result["recipe"]
    assert {path.name for path in folder.iterdir()} == {
        "adapter", "README.md", "config.yaml", "curves.png", "doctor.png", "metrics.jsonl", "result.json"
    }  # fmt: skip
    assert (result["status"], result["base_model"], result["steps"], result["seed"]) == ("finished", TINY_ID, 2, 42)
    assert result["parent"] is None and result["resumed_from"] is None
    main = METHODS[recipe].main
    assert result["main"]["name"] == main
    assert result["main"]["after"] == result["metrics"][main] and result["main"]["before"] == result["before"][main]
    for estimate in [*result["metrics"].values(), *result["before"].values()]:
        assert estimate.n > 0 and estimate.low <= estimate.value <= estimate.high
    if recipe != "sft":
        assert "baseline_shorter_wins" in result["metrics"]
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert result["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
    assert result["counts"]["train"] == 8 and result["counts"]["test"] == 4
    assert 0 < result["peak_memory_gib"]["process"] < 16 and result["seconds"] > 0
    assert {"torch", "trl", "transformers", "peft"} <= result["versions"].keys()

    steps = [row for row in trained.log if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2] and all(row["max_steps"] == 2 for row in steps)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert "train_runtime" in trained.log[-1]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n") and result["device"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2 and config["model"]["id"] == TINY_ID and "output_dir" not in config
    assert recipe in (folder / "README.md").read_text(encoding="utf-8")


def test_no_machine_path_leaves_the_machine(trained):
    published = [trained.dir / "README.md", trained.dir / "result.json", *(trained.dir / "adapter").glob("*.json")]
    adapter_config = json.loads((trained.dir / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == TINY_ID
    assert adapter_config["task_type"] == ("SEQ_CLS" if trained.result["recipe"] == "reward" else "CAUSAL_LM")
    for path in published:
        text = path.read_text(encoding="utf-8")
        for mine in (str(trained.dir.parent), trained.cfg.model.path, str(ROOT), sys.prefix):
            assert mine not in text, path


def test_reload_reproduces_the_scores(trained):
    from peft import PeftModel

    from rlhf_recipes import models, packing

    recipe = trained.result["recipe"]
    tokenizer = models.load_tokenizer(trained.cfg.model)
    rows = held_out(trained.cfg, tokenizer) if METHODS[recipe].rows == "pairs" else PAIRS
    in_training = measured(trained.trainer.model, tokenizer, recipe, rows)
    loaded = PeftModel.from_pretrained(load_base(trained.cfg, recipe), trained.dir / "adapter")
    packing.allow(loaded)  # in int8 a token's numbers depend on what goes through with it
    again = measured(loaded, tokenizer, recipe, rows)
    assert distance(again, in_training) <= 1e-5
    with loaded.disable_adapter():
        assert distance(measured(loaded, tokenizer, recipe, rows), in_training) > 1e-2  # the adapter is what is loaded


@pytest.mark.parametrize("recipe", ("reward", "orpo"))  # a new score head; a trainer that does not seed by itself
def test_same_seed_same_adapter(train, strongly, tmp_path, recipe):
    """Whatever was drawn before: the seed decides about the new LoRA and the new score head."""
    runs = [strongly(recipe, "none").weights]
    for seed in (42, 43):
        torch.manual_seed(7)
        runs.append(train(recipe, tmp_path / str(seed), "quantization=none", *STRONG, f"trainer.seed={seed}").weights)
    first, again, other = runs
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_chain_is_one_adapter(chain):
    sft, dpo = chain
    files = sorted(str(path.relative_to(dpo.dir)) for path in dpo.dir.rglob("*.safetensors"))
    assert files == ["adapter/adapter_model.safetensors"]
    assert sft.weights.keys() == dpo.weights.keys()
    assert not any(torch.equal(sft.weights[name], dpo.weights[name]) for name in sft.weights)
    assert dpo.result["parent"] == {
        "run": "sft", "recipe": "sft", "adapter_sha256": sft.result["adapter_sha256"], "parent": None
    }  # fmt: skip


def test_chain_reference_is_the_frozen_parent(chain):
    from rlhf_recipes import models

    sft, dpo = chain
    tokenizer = models.load_tokenizer(dpo.cfg.model)
    rows = held_out(dpo.cfg, tokenizer)
    parent = measured(sft.trainer.model, tokenizer, "sft", rows)
    policy = dpo.trainer.model
    assert distance(measured(policy, tokenizer, "dpo", rows), parent) > 1e-2
    policy.set_adapter("ref")
    try:
        assert torch.equal(measured(policy, tokenizer, "dpo", rows), parent)
    finally:
        policy.set_adapter("default")
    # The policy starts at its reference: no margin, and the loss is log 2.
    first = dpo.log[0]
    assert first["rewards/margins"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_chain_reloads_in_a_fresh_process(chain, tiny_model_overrides, clean_env, warm_python, tmp_path):
    from rlhf_recipes import models

    _, dpo = chain
    tokenizer = models.load_tokenizer(dpo.cfg.model)
    rows = list(held_out(dpo.cfg, tokenizer))
    job = json.dumps([tiny_model_overrides, str(dpo.dir / "adapter"), rows])
    (tmp_path / "warm_fresh.py").write_text(FRESH_PROCESS)
    done = subprocess.run([warm_python, "-m", "warm_fresh"], input=job, capture_output=True, text=True, cwd=tmp_path,
                          env=clean_env, timeout=LIMIT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    fresh = torch.tensor([list(row.values()) for row in json.loads(done.stdout)], dtype=torch.float64)
    assert distance(fresh, measured(dpo.trainer.model, tokenizer, "dpo", rows)) <= 1e-5


def test_chain_of_chains(chain, train):
    _, dpo = chain
    simpo = train("simpo", dpo.dir.parent / "simpo", "model.adapter=dpo")
    parents, link = [], simpo.result["parent"]
    while link:
        parents.append((link["run"], link["recipe"]))
        link = link["parent"]
    assert parents == [("dpo", "dpo"), ("sft", "sft")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_continued_weights_are_not_rounded(chain, train, recipe):
    """At a learning rate of zero a continued adapter comes out bit for bit: TRL had rounded it to bfloat16."""
    sft, _ = chain
    still = train(recipe, sft.dir.parent / f"still_{recipe}", "model.adapter=sft", "trainer.learning_rate=0.0")
    assert all(torch.equal(weight, still.weights[name]) for name, weight in sft.weights.items())
    assert still.weights.keys() - sft.weights.keys() == (
        {"base_model.model.score.weight"} if recipe == "reward" else set()
    )
    rounded = {name: weight.bfloat16().float() for name, weight in sft.weights.items()}
    assert not any(torch.equal(weight, sft.weights[name]) for name, weight in rounded.items())


def test_chain_of_reward_models_keeps_the_score_head(chain, train):
    sft, _ = chain
    folder = sft.dir.parent
    first = train("reward", folder / "reward", "model.adapter=sft", *STRONG)
    assert first.result["parent"]["recipe"] == "sft"
    still = train("reward", folder / "reward_again", "model.adapter=reward", "trainer.learning_rate=0.0")
    assert all(torch.equal(weight, still.weights[name]) for name, weight in first.weights.items())


def test_reward_refuses_to_lose_its_score_head(train, tmp_path, monkeypatch):
    from rlhf_recipes import models

    def forgetful(model, tokenizer, folder, base):
        save(model, tokenizer, folder, base)
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        weights["base_model.model.score.weight"] = torch.zeros_like(weights["base_model.model.score.weight"])
        save_file(weights, path, metadata={"format": "pt"})

    save = models.save_adapter
    monkeypatch.setattr(models, "save_adapter", forgetful)
    with pytest.raises(RuntimeError, match="scores a held-out batch differently"):
        train("reward", tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_small_updates_survive_in_float32(chain, train, monkeypatch):
    """Two DPO steps at 5e-6: in bfloat16, as TRL leaves a QLoRA adapter, most of lora_A never moves."""
    from rlhf_recipes import models

    sft, _ = chain
    start = {name: weight.bfloat16().float() for name, weight in sft.weights.items() if ".lora_A." in name}
    arguments = ("model.adapter=sft", "trainer.learning_rate=5e-6", "trainer.warmup_steps=0")
    ours = train("dpo", sft.dir.parent / "float32", *arguments)
    parameters = [p for p in ours.trainer.model.parameters() if p.requires_grad]
    assert parameters and all(p.dtype == torch.float32 for p in parameters)
    monkeypatch.setattr(models, "keep_adapter_in_float32", lambda model, parent: None)
    theirs = train("dpo", sft.dir.parent / "bfloat16", *arguments)

    def moved(weights, origin):
        changes = torch.cat([(weights[name].float() != before).flatten() for name, before in origin.items()])
        return changes.float().mean().item()

    in_float32 = moved(ours.weights, {name: sft.weights[name] for name in start})
    in_bfloat16 = moved(theirs.weights, start)
    print(f"share of lora_A entries that moved: float32 {in_float32:.3f}, bfloat16 {in_bfloat16:.3f}")
    assert in_float32 > 0.9
    if theirs.trainer.args.bf16:
        assert in_bfloat16 < 0.5
