"""What a GPU does differently, without one: CUDA is said to be there, and tensors are counted, not computed."""

import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_recipes import inference, memory, model_files, models
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch.preflight import predict_memory
from rlhf_recipes.run import Run

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """gpu(gib): a card with so much memory."""

    def there(gib):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        card = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)

    return there


class Operations(TorchDispatchMode):
    """Counts them, and the numbers of the largest tensor that one of them makes."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **kwargs or {})
        self.count += 1
        self.largest = max(self.largest, made.numel() if isinstance(made, torch.Tensor) else 0)
        return made


class Asked(Exception):
    """With what it was."""


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    device = torch.device("cuda", 0)


# ---- Devices


@pytest.mark.parametrize(
    ("launcher", "device"),
    [
        ({}, 0),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, 3),
    ],
)
def test_a_process_loads_onto_its_own_gpu(gpu, compose, monkeypatch, launcher, device):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))]:
        monkeypatch.delenv(name)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    gpu(80)

    def read(model, load, device_map=None, **kwargs):
        if device_map:
            raise Asked(device_map)
        return SimpleNamespace(get_text_config=lambda: None)  # of config.json

    monkeypatch.setattr(model_files, "read", read)
    with pytest.raises(Asked) as asked:
        models._load_base(compose("dpo", "model.path=here").model, {}, SimpleNamespace(from_pretrained=None))
    assert asked.value.args == ({"": device},)


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_run_on_the_cpu_sees_no_gpu(compose, monkeypatch, tmp_path, use_cpu):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.chdir(tmp_path)
    Run.start(compose("dpo", f"trainer.use_cpu={use_cpu}"), "dpo")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if use_cpu else "0")


def test_a_run_on_the_cpu_is_refused_where_a_gpu_is_in_use(compose, gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.chdir(tmp_path)
    gpu(80)
    with pytest.raises(Refusal, match=r"^trainer\.use_cpu=true: .* a command of their own\.$"):
        Run.start(compose("dpo", "trainer.use_cpu=true"), "dpo")


@pytest.mark.parametrize("there", [True, False])
def test_the_allocator_of_the_host_is_left_alone_on_a_gpu(gpu, monkeypatch, there):
    called = []
    libc = SimpleNamespace(mallopt=lambda *_: called.append("mallopt"), malloc_trim=lambda _: called.append("trim"))
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    if there:
        gpu(80)
    memory.keep_freed_memory()
    monkeypatch.setattr(memory, "_left", {"resident": 0})
    memory.return_freed_memory()
    assert called == ([] if there else ["mallopt", "mallopt", "trim"])


def test_little_memory_is_kept_for_the_next_step(monkeypatch):
    """It is returned when the process has grown by 64 MiB since that was last done."""
    returned, sizes = [], iter([100, 50, 80, 113, 114, 60, 120, 124, 62])  # before and after, where it is
    libc = SimpleNamespace(malloc_trim=lambda _: returned.append(True))
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    monkeypatch.setattr(memory, "_left", {"resident": 0})
    monkeypatch.setattr(memory, "resident", lambda: next(sizes) * 2**20)
    found = []
    for _ in range(6):
        memory.return_freed_memory()
        found.append(len(returned))
    assert found == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_bitsandbytes_repacks_on_a_cpu_alone(device):
    layer = SimpleNamespace(support_avx512bf16_for_cpu=True)
    models.keep_gradients_on_cpu(SimpleNamespace(device=torch.device(device), modules=lambda: [layer]))
    assert layer.support_avx512bf16_for_cpu == (device == "cuda")


def test_a_gpu_is_left_to_the_process_that_proves(monkeypatch):
    from rlhf_recipes.publish import round_trip

    called = []
    monkeypatch.setattr(memory, "make_room", lambda: called.append("room"))
    done = subprocess.CompletedProcess([], 1, stderr="no more of it")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: called.append("child") or done)
    with pytest.raises(Refusal):
        round_trip.in_fresh_process({})
    assert called == ["room", "child"]


def test_merged_weights_are_computed_in_main_memory(compose, monkeypatch, tmp_path):
    from rlhf_recipes.publish import merge

    def to(*args):
        raise Asked(*args)

    monkeypatch.setattr(models, "load_base", lambda *_, **__: SimpleNamespace(is_quantized=False, to=to))
    config = {key: dict(compose("dpo")[key]) for key in ("model", "quantization")}
    with pytest.raises(Asked) as asked:
        merge.write(SimpleNamespace(config=config, recipe="dpo"), tmp_path)
    assert asked.value.args == ("cpu", torch.float32)


@pytest.mark.slow
def test_a_reward_model_in_float16_scores(tiny_model, compose):
    """Its head is float32, as it is trained; what it reads is not."""
    cfg = compose("reward", f"model.path={tiny_model}", "model.id=tests/tiny")
    tokenizer = models.load_tokenizer(cfg.model)
    said = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("Yes.", "No!")]
    scores = {}
    for dtype in ("float16", "float32"):
        cfg.model.dtype = dtype
        torch.manual_seed(0)
        model, _ = models.load_reward_model(cfg.model, {}, cfg.lora, None)
        scores[dtype] = inference.rewards(model, tokenizer, said)
    assert scores["float16"] == pytest.approx(scores["float32"], abs=5e-3) != [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_reward_model_in_16_bits_learns_where_nothing_casts(tiny_model, compose, dtype):
    """A processor without bfloat16 arithmetic trains without autocast."""
    from peft import get_peft_model

    cfg = compose("reward", f"model.path={tiny_model}", "model.id=tests/tiny", f"model.dtype={dtype}")
    base, lora = models.load_reward_model(cfg.model, {}, cfg.lora, None)
    model = get_peft_model(base, lora)
    models.keep_adapter_in_float32(SimpleNamespace(model=model, args=SimpleNamespace(bf16=False)), None)
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert model.base_model.model.score.modules_to_save.default.weight.grad.abs().sum() > 0


# ---- Sampling


def test_all_rows_are_drawn_in_one_call_and_each_from_its_own_seed():
    from rlhf_recipes.sampling import Draws

    device, logits_BV = torch.device("cpu"), torch.randn(64, 1000)
    counts = {}
    for B in (1, 64):
        draws = Draws(list(range(B)), device, tokens=3)
        with Operations() as counted:
            found = [draws.draw(logits_BV[:B], list(range(B))).tolist() for _ in range(3)]
        counts[B] = counted.count
    assert counts[1] == counts[64] < 40
    assert len({tuple(tokens) for tokens in found}) == 3
    some = Draws([7, 9], device, tokens=3)  # in another batch, from which one leaves
    assert some.draw(logits_BV[[7, 9]], [0, 1]).tolist() == [found[0][7], found[0][9]]
    assert some.draw(logits_BV[[9]], [1]).tolist() == [found[1][9]]


def test_the_inverse_of_the_cumulative_distribution_by_hand():
    from rlhf_recipes.sampling import quantile

    logits_BV = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(6, 4)
    at_B = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert quantile(logits_BV, at_B).tolist() == [0, 0, 2, 2, 3, 3]
    even_B = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    drawn_B = quantile(torch.linspace(-3, 3, 50).expand(10000, 50), even_B)
    shares_V = drawn_B.bincount(minlength=50) / 10000
    torch.testing.assert_close(shares_V, torch.linspace(-3, 3, 50).softmax(0), atol=1e-4, rtol=0)


def test_a_gpu_has_no_second_head(monkeypatch):
    """A product of bfloat16 leaves float32; no tensor of the weights' size is made."""
    from rlhf_recipes.sampling import float32_head, in_place_of

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return product(a.float().double(), b.float().double()).float()

    head = torch.nn.Linear(64, 5000, bias=True, dtype=torch.bfloat16)
    x_BTH = torch.randn(2, 3, 64).bfloat16()
    expected = torch.nn.functional.linear(x_BTH.float(), head.weight.float(), head.bias.float())
    on_gpu = SimpleNamespace(weight=head.weight.data.as_subclass(OnCuda), bias=head.bias)
    product = torch.mm
    with Operations() as counted:
        exact = float32_head(on_gpu)
    assert counted.largest < head.weight.numel()
    monkeypatch.setattr(torch, "mm", mm)
    with in_place_of(head, exact):
        torch.testing.assert_close(head(x_BTH).as_subclass(torch.Tensor), expected, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(head)


# ---- Batches and memory


def model_on(device, weights):
    """What `_batches` asks of a model: a base of so many bytes, and an adapter."""
    parameters = [("q_proj.weight", SimpleNamespace(nbytes=weights)), ("lora_A", SimpleNamespace(nbytes=8 * GIB))]
    return SimpleNamespace(device=torch.device(device), named_parameters=lambda: parameters)


@pytest.mark.parametrize(
    ("device", "gib", "rows"), [("cuda", 80, 184), ("cuda", 24, 40), ("cuda", 12, 20), ("cpu", 80, 20)]
)
def test_a_large_gpu_takes_large_batches(gpu, device, gib, rows):
    """8,192 tokens of answers of 400 for each 8 GiB beside 6 GiB of weights; an adapter changes no batch."""
    if device == "cuda":
        gpu(gib)
    encoded = [([0] * 400, 0)] * 1000
    _, first = next(inference._batches(encoded, "test", model_on(device, 6 * GIB)))
    assert len(first) == rows


LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.slow
def test_an_8b_is_loaded_weight_by_weight_onto_a_gpu(gpu, compose, tmp_path):
    """Of 16 GB in bfloat16, 6 in NF4: the packed weights, and two of the largest. It trains on a card of 16 GB."""
    from transformers import LlamaConfig

    LlamaConfig(**LLAMA_8B, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    model = [f"model.path={tmp_path}", "model.id=x"]
    asked = {q: compose("dpo", *model, f"quantization={q}") for q in ("nf4", "none")}
    args = models.training_args(asked["nf4"].trainer, Run(tmp_path, "dpo", {}))
    args.gradient_checkpointing = True
    gpu(15.9)
    predicted = {}
    for quantization, cfg in asked.items():
        base = predict_memory.backbone(cfg, "dpo")
        predicted[quantization] = predict_memory.predict(cfg, args, base, predict_memory.Batch(2, 1024), 0)
    trls_own = compose("orpo", *model, "trainer._target_=trl.experimental.orpo.ORPOConfig")
    theirs = predict_memory.backbone(trls_own, "orpo")
    nf4, none = predicted["nf4"], predicted["none"]
    scales = (1 + 4 / 256) / 64  # bytes for a number
    head_and_embeddings, largest = 2 * 2 * 128256 * 4096, 2 * 14336 * 4096
    beside = predict_memory.CONTEXT + (4 + 8) * base.lora
    loaded = beside + base.linear * (1 / 2 + scales) + head_and_embeddings + 2 * largest
    assert nf4["phases"]["loading"] == pytest.approx(loaded / GIB, rel=0.001)
    assert nf4["peak_gib"] < 12
    assert theirs.weights == pytest.approx(base.linear * (1 / 2 + scales) + 2 * head_and_embeddings, rel=0.001)
    assert none["phases"]["loading"] == pytest.approx((beside + base.stored) / GIB)


# ---- PPO on several GPUs


@pytest.mark.slow
def test_gradients_are_summed_in_few_calls():
    from rlhf_recipes.ppo import gradients

    parameters = {str(i): torch.nn.Parameter(torch.zeros(16, 64 + i)) for i in range(300)}
    parameters["half"] = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    parameters["large"] = torch.nn.Parameter(torch.zeros(gradients.BUCKET // 2))
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = None if i == 5 else torch.full_like(parameter, i)
    sizes = []

    def reduce(values):
        sizes.append(values.nbytes)
        return 2 * values

    gradients.add_up(parameters.values(), reduce)
    assert len(sizes) == 3 and sum(sizes) == sum(p.nbytes for p in parameters.values())
    for i, parameter in enumerate(parameters.values()):
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.eq(0 if i == 5 else 2 * i).all()


def test_buckets_hold_up_to_their_size():
    from rlhf_recipes.ppo.gradients import buckets

    tensors = [torch.zeros(n) for n in (3, 3, 3, 20, 1, 9)]
    found = [[len(tensor) for tensor in bucket] for bucket in buckets(tensors, 40)]
    assert found == [[3, 3, 3], [20], [1, 9]]
