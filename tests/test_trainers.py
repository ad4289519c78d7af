"""Trainers that can be trusted: a recipe adds nothing to TRL's arithmetic, and it learns where TRL alone does not."""

import importlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, TINY_ID, skip_without

from rlhf_recipes.methods import METHODS, TRLS_OWN

TRAINERS = {
    "sft": "trl.SFTTrainer",
    "reward": "trl.RewardTrainer",
    "dpo": "trl.DPOTrainer",
    "orpo": "trl.experimental.orpo.ORPOTrainer",
    "simpo": "trl.experimental.cpo.CPOTrainer",
    "kto": "trl.KTOTrainer",
}
# What conf/trainer/<recipe>.yaml says, written out by hand.
ARGUMENTS = {
    "sft": ("trl.SFTConfig", {"learning_rate": 2e-4, "completion_only_loss": True}),
    "reward": ("trl.RewardConfig", {"learning_rate": 1e-4, "center_rewards_coefficient": 0.01}),
    "dpo": ("trl.DPOConfig", {"learning_rate": 5e-6, "beta": 0.1}),
    "orpo": ("trl.experimental.orpo.ORPOConfig", {"learning_rate": 8e-6, "beta": 0.1}),
    "simpo": (
        "trl.experimental.cpo.CPOConfig",
        {"learning_rate": 5e-6, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    ),
    "kto": ("trl.KTOConfig", {"learning_rate": 1e-5, "beta": 0.1}),
}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes repacks 4-bit weights on a CPU only")


def imported(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def by_hand(recipe, quantization, tiny_model, cfg, folder):
    """TRL's own trainer after two steps, built without anything of ours but the rows."""
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
        set_seed,
    )

    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.labelled import micro_batches
    from rlhf_recipes.data.load import LOADERS

    config, own = ARGUMENTS[recipe]
    cpu = not torch.cuda.is_available()
    bf16 = torch.cuda.is_bf16_supported() if not cpu else torch.cpu._is_avx512_bf16_supported()
    args = imported(config)(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_length=1024,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=bf16,
        use_cpu=cpu,
        gradient_checkpointing=not cpu,
        **own,
    )
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    auto, extra = AutoModelForCausalLM, {}
    if recipe == "reward":
        auto, extra = AutoModelForSequenceClassification, {"num_labels": 1}
    dtype = torch.bfloat16 if bf16 else torch.float32
    if quantization == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "score"],
        )
    if not cpu:
        extra["device_map"] = {"": 0}
    model = auto.from_pretrained(tiny_model, dtype=dtype, **extra)
    model.config.pad_token_id = tokenizer.pad_token_id
    if recipe == "reward":
        model.score.float()
    rows = fit(LOADERS[METHODS[recipe].rows](cfg.data), tokenizer, 1024)
    if recipe == "kto":
        rows = micro_batches(rows, args)
    train_dataset, _ = rows.to_datasets()
    trainer = imported(TRAINERS[recipe])(
        model=model,
        args=args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="SEQ_CLS" if recipe == "reward" else "CAUSAL_LM",
        ),
    )
    trainer.train()
    return trainer


def skip_what_trl_cannot_do(recipe, quantization):
    from rlhf_recipes import models

    skip_without(ARGUMENTS[recipe][0])
    if (recipe, quantization) == ("reward", "nf4") and not models.computes_in_bf16():
        pytest.skip("TRL rounds the score head to bfloat16, which its forward in float32 does not take")


@pytest.fixture(scope="module")
def ends_with_eos(tiny_model, tmp_path_factory):
    """The tiny model with a template that ends an answer with EOS: TRL's ORPO and CPO add one behind a line break."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("ends_with_eos") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    last = "loop.last and message['role'] == 'assistant'"
    tokenizer.chat_template = CHATML.replace("'<|im_end|>' + '\n'", f"'<|im_end|>' + ('' if {last} else '\n')")
    assert tokenizer.chat_template != CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_trl(tmp_path_factory):
    """by_trl(recipe, quantization, model, cfg): of `by_hand`, made once."""
    known = {}

    def once(recipe, quantization, model, cfg):
        if (recipe, quantization) not in known:
            known[recipe, quantization] = by_hand(recipe, quantization, model, cfg, tmp_path_factory.mktemp("by_trl"))
        return known[recipe, quantization]

    return once


@pytest.mark.parametrize("quantization", ("nf4", "none"))
@pytest.mark.parametrize("recipe", TRAINERS)
def test_parity_with_trl(train, by_trl, tiny_model, ends_with_eos, tmp_path, recipe, quantization):
    """With TRL's own forward, loss and gradient norm of the first step are TRL's, of orpo and simpo those of TRL's own
    trainers, which are one switch away; tests/test_preference.py holds ours against them, and tests/test_forward.py
    our forward.

    The loss is equal to the last bit. So is the norm, but where TRL keeps a QLoRA adapter in bfloat16 and we in
    float32: its gradients are rounded to 8 bits, each by up to 2^-9 and again with every accumulated batch.
    """
    skip_what_trl_cannot_do(recipe, quantization)
    model = ends_with_eos if recipe in ("orpo", "simpo") else tiny_model
    overrides = [f"quantization={quantization}", f"model.path={model}", "fast_forward=false"]
    if ARGUMENTS[recipe][0] in TRLS_OWN:
        overrides += [f"trainer._target_={ARGUMENTS[recipe][0]}"]
    ours = train(recipe, tmp_path / "ours", *overrides)
    theirs = by_trl(recipe, quantization, model, ours.cfg)
    rounded = {p.dtype for p in theirs.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert rounded == (quantization == "nf4" and recipe in ("sft", "reward", "dpo", "kto"))
    first, reference = ours.log[0], theirs.state.log_history[0]
    print(recipe, quantization, {key: first[key] / reference[key] - 1 for key in ("loss", "grad_norm")})
    assert first["step"] == reference["step"] == 1
    assert first["loss"] == reference["loss"]
    assert first["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2**-8 if rounded else 0, abs=0)
    second, reference = ours.log[1], theirs.state.log_history[1]
    assert second["loss"] == pytest.approx(reference["loss"], rel=1e-3 if rounded else 0, abs=0)


@pytest.mark.parametrize("recipe", ("sft", "reward", "dpo", "kto"))
def test_parity_is_exact_without_our_float32(train, by_trl, tiny_model, tmp_path, monkeypatch, recipe):
    """The float32 adapter is the only thing that a recipe adds: without it the norm is TRL's to the last bit too."""
    from rlhf_recipes import models

    skip_what_trl_cannot_do(recipe, "nf4")
    monkeypatch.setattr(models, "keep_adapter_in_float32", lambda model, parent: None)
    ours = train(recipe, tmp_path / "ours", "fast_forward=false")
    theirs = by_trl(recipe, "nf4", tiny_model, ours.cfg)
    for row, reference in zip(ours.log[:2], theirs.state.log_history[:2], strict=True):
        assert (row["loss"], row["grad_norm"]) == (reference["loss"], reference["grad_norm"])


# Without checkpoints: a state dict unpacks the weights again.
EVALUATED = (
    "trainer.eval_strategy=steps",
    "trainer.eval_steps=1",
    "trainer.save_strategy=no",
    "trainer.warmup_steps=0",
)


def still(weights):
    """The layers whose LoRA did not move: B starts at zero."""
    zero = [name for name, weight in weights.items() if ".lora_B." in name and not weight.any()]
    return {name.split(".lora_B.")[0].rpartition(".")[2] for name in zero}


@on_cpu
@pytest.mark.filterwarnings("error:bitsandbytes::gemv_4bit")  # torch's hint that the packed kernel is in use
@pytest.mark.parametrize("recipe", TRAINERS)
def test_learns_in_4_bit_after_evaluation(train, tmp_path, recipe):
    trained = train(recipe, tmp_path / "run", *EVALUATED)
    assert len([row for row in trained.log if "eval_loss" in row]) == 2
    assert still(trained.weights) == set()


@on_cpu
@pytest.mark.filterwarnings("ignore:bitsandbytes::gemv_4bit")
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the packed kernel needs AVX512-BF16")
def test_bitsandbytes_still_loses_gradients(train, tmp_path, monkeypatch):
    """Why `models.keep_gradients_on_cpu` is there; when this fails, bitsandbytes is mended and it can go."""
    from rlhf_recipes import models

    monkeypatch.setattr(models, "keep_gradients_on_cpu", lambda model: None)
    trained = train("sft", tmp_path / "run", *EVALUATED, "trainer.max_steps=1")
    assert still(trained.weights) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_a_base_loads_no_tokenizer_that_was_loaded(compose, tiny_model_overrides, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_recipes import models

    def pads(*overrides):
        cfg = compose("dpo", *tiny_model_overrides, "quantization=none", *overrides)
        return models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM).config.pad_token_id

    assert models.load_tokenizer(compose("dpo", *tiny_model_overrides).model).pad_token_id == 0
    assert pads("model.pad_token='<|im_end|>'") == 2  # of one that nobody has loaded
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    assert pads() == 0


def test_trainer_arguments_follow_the_hardware(compose, tmp_path):
    """Precision and checkpointing are derived where nothing is said, and obeyed where something is."""
    from rlhf_recipes import models
    from rlhf_recipes.run import Run

    run = Run(tmp_path, "sft", {})
    args = models.training_args(compose("sft").trainer, run)
    assert args.use_cpu != torch.cuda.is_available()
    assert args.bf16 == models.computes_in_bf16()
    assert args.gradient_checkpointing == torch.cuda.is_available()
    assert args.report_to in ("none", []) and args.output_dir == str(tmp_path / "checkpoints")
    given = compose("sft", "trainer.bf16=false", "trainer.gradient_checkpointing=true", f"model.id={TINY_ID}")
    args = models.training_args(given.trainer, run)
    assert (args.bf16, args.gradient_checkpointing) == (False, True)


@pytest.mark.parametrize(
    ("cuda", "bf16", "dtype"),
    [(True, True, "bfloat16"), (True, False, "float16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_the_base_has_the_precision_of_its_trainer(compose, tmp_path, monkeypatch, cuda, bf16, dtype):
    """On a GPU without bfloat16 both are float16: a base in float32 would take twice the memory."""
    from rlhf_recipes import models
    from rlhf_recipes.run import Run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(models, "computes_in_bf16", lambda: bf16)
    assert models.compute_dtype(compose("ppo").model) == getattr(torch, dtype)
    monkeypatch.setattr(models.config, "build", lambda node, where, **derived: SimpleNamespace(seed=0, **derived))
    args = models.training_args(None, Run(tmp_path, "ppo", {}))
    assert getattr(args, "fp16", False) == (dtype == "float16")
