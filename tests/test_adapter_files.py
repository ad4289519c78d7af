"""What an adapter's files may not hold: a weight of the base, what rewrites it, runs, fetches, never ends or lies."""

import json
import re
import struct
from pathlib import Path

import pytest
from conftest import TINY_ID, write_adapter

from rlhf_recipes import adapter_files, references
from rlhf_recipes.launch.refusals import as_refusal

ESCAPES = "\x1b]0;pwned\x07\x1b[2J\u202eno\x9b1m"


def refused(call, *args):
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    said = as_refusal(caught.value)
    assert said and len(said) < 600 and not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", said), said
    return said


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
LORA = {f"{Q}A.weight": (4, 8), f"{Q}B.weight": (8, 4)}
NORM = "base_model.model.model.norm.weight"


def tensors(shapes, **changes):
    """The bytes of a safetensors file of zeros; `changes` go into the header of its first tensor."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for each in shape:
            size *= each
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    next(iter(header.values())).update(changes)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + bytes(end)


def bought(folder, content=None, **config):
    """A run that somebody sends: `content` are its weights."""
    write_adapter(folder, recipe="dpo", parent=None)
    given = {"base_model_name_or_path": TINY_ID, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(given | config))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(content or tensors(LORA))
    return str(folder)


LAYER = Q.removesuffix(".lora_")
OWN = {
    "a norm": (LORA | {NORM: (8,)}, {}, NORM),
    "an embedding": (
        LORA | {"base_model.model.model.embed_tokens.weight": (9, 8)},
        {},
        "base_model.model.model.embed_t",
    ),
    "a bias": ({f"{LAYER}.base_layer.bias": (8,)}, {"bias": "all"}, f"{LAYER}.base_layer.bias"),
    "one beside other kinds": ({f"{LAYER}.hada_w1_a": (8, 4), NORM: (8,)}, {"peft_type": "LOHA"}, NORM),
    "one with escapes": (LORA | {f"x{ESCAPES}": (8,)}, {}, "x␛]0;pwned"),
}


def is_refused(folder, says):
    """However it is named."""
    for find, given, key in (
        (lambda: references.find(folder, "model.adapter", TINY_ID), folder, "model.adapter"),
        (lambda: references.find_policy(folder, "runs", TINY_ID), folder, "runs"),
        (lambda: references.find(f"{folder}/adapter", "judge.adapter"), f"{folder}/adapter", "judge.adapter"),
    ):
        assert refused(find).startswith(f"{key}={given}: {says}")


@pytest.mark.parametrize("case", OWN)
def test_an_adapter_is_no_more_than_an_adapter(tmp_path, case):
    shapes, config, name = OWN[case]
    is_refused(bought(tmp_path / "sent", tensors(shapes), **config), f"holds {name}")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"init_lora_weights": "PiSSA_niter_4"}, "init_lora_weights=PiSSA_niter_4 changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora changes the base"),
        ({"layer_replication": [[0, 2]] * 99}, "layer_replication=[[0, 2], [0, 2]"),
        ({"kasa_config": {"beta": 1}}, "kasa_config={'beta': 1} changes the base"),
        ({"peft_type": "OSF"}, "peft_type=OSF: is no kind of adapter that is put beside a base."),
    ],
)
def test_what_rewrites_the_base_is_refused(tmp_path, config, says):
    is_refused(bought(tmp_path / "sent", **config), says)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "XLORA", "adapters": {"a": "evil/adapter"}}, "peft_type=XLORA: is no kind of adapter that"),
        ({"peft_type": ESCAPES}, "peft_type=␛]0;pwned"),
        ({"peft_type": ["LORA"]}, "peft_type=['LORA']: is no kind of adapter that"),
        ({"megatron_config": {}, "megatron_core": "os"}, "its megatron_config names a module that PEFT would import."),
    ],
)
def test_what_fetches_or_imports_is_refused(tmp_path, config, says):
    is_refused(bought(tmp_path / "sent", **config), says)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{"target_modules": "(.+)+Z"}, {"rank_pattern": {"(.+)+Z": 4}}, {"modules_to_save": ["(.+)+Z"]}]
)
def test_an_expression_without_end_is_refused(tmp_path, monkeypatch, config):
    monkeypatch.setattr(adapter_files, "PATTERN_SECONDS", 0.1)
    is_refused(bought(tmp_path / "sent", **config), "its expressions for names of modules take more than 0.1 s.")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_what_is_no_expression_is_refused(tmp_path, key):
    says = f"{key}: (( is no regular expression (missing ), unterminated subpattern at position 1). List the modules"
    is_refused(bought(tmp_path / "sent", **{key: "(("}), says)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 10**7}, "names the rank 10000000, and its matrices have up to 4."),
        ({"rank_pattern": {"q_proj": 10**7}}, "names the rank 10000000, and its matrices have up to 4."),
        ({"r": "4"}, "r=4: its ranks must be whole numbers."),
        # of a module that has no matrix in the file
        (
            {"r": 10**7, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
            "names the rank 10000000, and its matrices have up to 4.",
        ),
        (
            {"r": 10**7, "rank_pattern": {"q_proj": 4}, "target_modules": "q_proj|v_proj"},
            "names the rank 10000000, and its matrices have up to 4.",
        ),
    ],
)
def test_a_rank_that_no_matrix_has_is_refused(tmp_path, config, says):
    is_refused(bought(tmp_path / "sent", **config), says)


def test_an_adapter_of_a_training_is_one(tmp_path):
    """What is written by PEFT: a score head, whole modules, rows of an embedding, other kinds."""
    saved = {"base_model.model.lm_head.weight": (9, 8), "base_model.model.model.norm.weight": (8,)}
    row = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)}
    for shapes, config in (
        (LORA, {"target_modules": r".*\.(?:q|v)_proj", "rank_pattern": {"model.layers.0.self_attn.q_proj": 4}}),
        (LORA, {"r": 16, "rank_pattern": {"q_proj": 4}}),
        (LORA, {"r": 16, "rank_pattern": {".*_proj": 4}, "target_modules": ["layers.0.self_attn.q_proj", "v_proj"]}),
        (LORA | {"base_model.model.score.weight": (1, 8)}, {"task_type": "SEQ_CLS"}),
        (LORA | saved, {"modules_to_save": ["lm_head", "norm"]}),
        (LORA | row, {"trainable_token_indices": [0]}),
        (LORA | {f"{Q}magnitude_vector": (8,)}, {"use_dora": True, "r": 2, "rank_pattern": {"q_proj": 4}}),
        ({f"{Q[:-5]}hada_w1_a": (8, 4)}, {"peft_type": "LOHA"}),
        ({"base_model.vera_A": (4, 8), f"{Q[:-5]}vera_lambda_b": (8,)}, {"peft_type": "VERA"}),
    ):
        (tmp_path / "w").write_bytes(tensors(shapes))
        given = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "layer_replication": None} | config
        assert adapter_files.flaw(given, tmp_path / "w") is None, config


def test_a_checkpoint_is_looked_at_as_an_adapter_is(tmp_path):
    folder = Path(bought(tmp_path / "ppo"))
    config = {"model": {"id": TINY_ID}, "trainer": {"_target_": "rlhf_recipes.ppo.PPOConfig"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "adapter").rename(tmp_path / "kept")
    (folder / "checkpoints").mkdir()
    (tmp_path / "kept").rename(folder / "checkpoints" / "checkpoint-2")
    assert [each.step for each in references.find_checkpoints(str(folder), TINY_ID)] == [2]
    (folder / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(tensors(LORA | {NORM: (8,)}))
    said = refused(references.find_checkpoints, str(folder), TINY_ID)
    assert said.startswith(f"checkpoints={folder}: checkpoint-2: holds {NORM}")


LIES = {
    "a header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "a header of nothing": struct.pack("<Q", 0),
    "a header that is no JSON": struct.pack("<Q", 4) + b"[[[[",
    "a shape of petabytes": tensors(LORA, shape=[2**30, 2**20]),
    "a tensor behind the end": tensors(LORA, data_offsets=[0, 2**40]),
    "a tensor before the beginning": tensors(LORA, data_offsets=[-64, 64]),
    "tensors in one another": tensors(LORA, data_offsets=[0, 256]),
    "a type that is none": tensors(LORA, dtype="PICKLE"),
    "a shape that is a text": tensors(LORA, shape="os.system"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_of_weights_that_lies(tmp_path, lie):
    folder = bought(tmp_path / "sent", LIES[lie])
    said = refused(references.find, folder, "model.adapter", TINY_ID)
    assert (
        said == f"{folder}/adapter/adapter_model.safetensors: is cut off or damaged. Copy it again, or train it again."
    )


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """made(name, change, task_type): a LoRA adapter of the tiny model whose tensors are changed."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def make(name, change, task_type="CAUSAL_LM"):
        scores = task_type == "SEQ_CLS"
        auto, head = (AutoModelForSequenceClassification, {"num_labels": 1}) if scores else (AutoModelForCausalLM, {})
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task_type)
        folder = tmp_path_factory.mktemp(name) / name
        get_peft_model(auto.from_pretrained(tiny_model, **head), lora).save_pretrained(folder)
        weights = folder / "adapter_model.safetensors"
        save_file(change(load_file(weights)), weights, {"format": "pt"})
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": TINY_ID}))
        return folder

    return make


def _renamed(tensors):
    return {name.replace("model.model.layers", "model.model.decoder.layers"): each for name, each in tensors.items()}


def _one_missing(tensors):
    del tensors[f"{Q}A.weight"]
    return tensors


PLACES = {
    "of another model": (_renamed, r"base_model\.model\.model\.decoder\.\S+ has no place in this model\."),
    "without a matrix": (_one_missing, rf"has no {Q}A\.weight, which this model takes\."),
    "of other sizes": (lambda tensors: {name: each[:, :3].contiguous() for name, each in tensors.items()},
                       "has weights of other sizes than this model takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_an_adapter_that_fits_no_module_is_not_the_base(made, compose, tiny_model, tiny_model_overrides, case):
    """PEFT leaves what it lacks as it began, which is the base, and tells nobody."""
    from types import SimpleNamespace

    from rlhf_recipes import adapters, models
    from rlhf_recipes.cai import local
    from rlhf_recipes.ppo import rewards

    change, says = PLACES[case]
    policy, scorer = made("policy", change), made("scorer", change, "SEQ_CLS")
    cfg = compose("dpo", *tiny_model_overrides, "quantization=none", "model.dtype=float32")
    parent = references.find(str(policy), "model.adapter", TINY_ID)
    args = SimpleNamespace(model_init_kwargs=None, device="cpu")
    roles = SimpleNamespace(shared=False, causal=SimpleNamespace(public_id=TINY_ID, name_or_path=str(tiny_model)))
    for call, where in (
        (lambda: adapters.Policies(cfg.model, cfg.quantization, [adapters.System("p", str(policy))]), policy),
        (lambda: adapters.RewardModels(cfg.model, cfg.quantization, [scorer]), scorer),
        (lambda: models.load_policy(cfg.model, cfg.quantization, cfg.lora, parent), f"model.adapter={policy}"),
        (lambda: models.load_reward_model(cfg.model, cfg.quantization, cfg.lora, parent), f"model.adapter={policy}"),
        (lambda: local.load(cfg.model, cfg.quantization, parent), f"model.adapter={policy}"),
        (lambda: rewards.load(str(scorer), roles, None, None, args), f"reward_funcs={scorer}"),
    ):
        assert re.match(f"{where}: {says}", refused(call))


def test_an_adapter_that_fits_is_put_on(made, compose, tiny_model_overrides):
    """Beside another, too, and a reward model without a score head is none."""
    from rlhf_recipes import adapters

    one, other = (made(name, lambda tensors: tensors) for name in ("one", "other"))
    cfg = compose("evaluate", *tiny_model_overrides, "quantization=none", "model.dtype=float32")
    several = [adapters.System(str(n), str(folder)) for n, folder in enumerate([one, other])]
    assert list(adapters.Policies(cfg.model, cfg.quantization, several).model.peft_config) == ["adapter1", "adapter2"]
    headless = made("headless", lambda t: {k: v for k, v in t.items() if "score" not in k}, "SEQ_CLS")
    says = f"{headless}: has no base_model.model.score.weight, which this model takes."
    assert refused(adapters.RewardModels, cfg.model, cfg.quantization, [headless]).startswith(says)


def test_what_peft_would_do_with_a_weight_of_the_base(tiny_model, tmp_path):
    """Why it is refused: it stays with the base when the adapter is off."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    shapes = {f"{Q}A.weight": (4, 64), f"{Q}B.weight": (64, 4), NORM: (64,)}
    folder = bought(tmp_path / "sent", tensors(shapes), task_type="CAUSAL_LM")
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    policy = PeftModel.from_pretrained(base, f"{folder}/adapter")
    with policy.disable_adapter():
        assert not policy(ids).logits.equal(before)
