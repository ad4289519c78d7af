"""A model in parts on two processes (FSDP2), by accelerate's own prepare: it trains like one that is whole."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, free_port
from omegaconf import OmegaConf

from rlhf_recipes import ranks, sharding
from rlhf_recipes.errors import Refusal

FILE = ROOT / "conf/accelerate/fsdp2_qlora.yaml"
EXACT = ("model.dtype=float32", "trainer.bf16=false")
STEPS = (
    "data.train_size=8",
    "data.eval_size=6",
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.learning_rate=1e-2",
    "trainer.warmup_steps=0",
    "trainer.logging_steps=1",
    "trainer.save_steps=1",
)
# Of a policy's LoRA and of a reward model's, which has its head, there are checkpoints.
WHOLE = ("quantization=none", *EXACT, "trainer.save_strategy=no")
# Recipe, overrides, and how near its numbers must come; `reward` computes in bfloat16 where the processor does.
RUNS = {
    "none": ("dpo", WHOLE, 1e-5),
    "nf4": ("dpo", ("quantization=nf4_fsdp", *EXACT), 1e-5),
    "reward": ("reward", ("quantization=nf4_fsdp",), 3e-2),
    "sft": ("sft", WHOLE, 1e-5),
    "orpo": ("orpo", WHOLE, 1e-5),
    "simpo": ("simpo", WHOLE, 1e-5),
    # The KL of `kto` is that of a micro-batch.
    "kto": ("kto", (*WHOLE, "trainer.loss_type=apo_zero_unpaired"), 1e-5),
}


def launcher_environment():
    """What `accelerate launch --config_file conf/accelerate/fsdp2_qlora.yaml` says to its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(FILE), "recipes/dpo.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def trained(clean_env, warm_python, tiny_model_overrides, tmp_path_factory):
    """{name: (run in parts, run of one process)}, folders: a batch has the same four rows, side by side or in turn."""
    here = tmp_path_factory.mktemp("fsdp")
    env = {**clean_env, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

    def start(folder, runs, asked, environments):
        (here / folder).mkdir(exist_ok=True)
        logs = [(here / folder / f"{len(runs)}.{number}.log").open("w") for number, _ in enumerate(environments)]
        words = [warm_python, "-m", "sharded", json.dumps([asked, runs])]
        return [
            subprocess.Popen(words, cwd=here / folder, env=each, stdout=log, stderr=log)
            for each, log in zip(environments, logs, strict=True)
        ]

    def end(processes):
        codes = [process.wait(timeout=LIMIT) for process in processes]
        logs = (f"--- {log}\n{log.read_text()}" for log in sorted(here.glob("*/*.log")))
        assert not any(codes), "\n".join(logs)

    runs = {
        name: [recipe, *tiny_model_overrides, *STEPS, *own, f"run_name={name}"]
        for name, (recipe, own, _) in RUNS.items()
    }
    one = start("one", [[*run, "trainer.gradient_accumulation_steps=2"] for run in runs.values()], {}, [env])
    nf4 = runs.pop("nf4")
    stopped = [nf4[0], "stop=1", *nf4[1:]]  # it is interrupted, and continued
    end(start("parts", [*runs.values(), stopped], launcher_environment(), _ranks(env)))
    end([*one, *start("parts", [nf4], launcher_environment(), _ranks(env))])
    return {
        name: [here / folder / "outputs" / recipe / name for folder in ("parts", "one")]
        for name, (recipe, *_) in RUNS.items()
    }


def _ranks(environment):
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**environment, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_trains_like_one_that_is_whole(trained, name):
    (parts, one), near = trained[name], RUNS[name][2]
    assert [row[0] for row in rows_of(parts)] == [1, 2]
    for (_, *found), (_, *expected) in zip(rows_of(parts), rows_of(one), strict=True):
        assert found == pytest.approx(expected, rel=near)
    before, after = seen(parts)["bytes"]
    assert 0.45 * before < after < 0.55 * before, "a rank has half of the base"
    for found, expected in zip(seen(parts)["measured"], seen(one)["measured"], strict=False):  # before and after
        for row, its in zip(found["found"], expected["found"], strict=True):
            assert row == pytest.approx(its, rel=near, abs=near)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "nf4"])
def test_one_process_reads_the_adapter(trained, compose, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import inference, models

    parts = trained[name][0]
    node = OmegaConf.load(parts / "config.yaml")
    base = models.load_base(node.model, node.quantization, AutoModelForCausalLM)
    model, tokenizer = PeftModel.from_pretrained(base, str(parts / "adapter")), models.load_tokenizer(node.model)
    before, after = seen(parts)["measured"]
    found = inference.pair_logps(model, tokenizer, after["rows"])
    for each, expected in zip(found, after["found"], strict=True):
        assert each == pytest.approx(expected, abs=1e-5)
    moved = max(abs(a["chosen_logp"] - b["chosen_logp"]) for a, b in zip(after["found"], before["found"], strict=True))
    assert moved > 1e-3


def test_the_base_is_read_tensor_by_tensor_on_the_cpu(tiny_model, clean_env, warm_python, tmp_path):
    """The 85 MB that it has in bfloat16 are never there at a time, whatever else a process takes (22 are in NF4)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 64, "num_attention_heads": 8}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **shape)).bfloat16()
    size = sum(parameter.nbytes for parameter in whole.parameters())
    whole.save_pretrained(tmp_path)
    for file in (*tiny_model.glob("tokenizer*"), *tiny_model.glob("chat_template*")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    del whole
    (tmp_path / "warm_loads.py").write_text(LOADS)
    command = [warm_python, "-m", "warm_loads", json.dumps(launcher_environment()), str(tmp_path), str(tiny_model)]
    done = subprocess.run(command, env=clean_env, cwd=tmp_path, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["device_map"] == {"": "cpu"}, "on a machine with a card, too"
    assert seen["dtype"] == "torch.bfloat16" and seen["nbytes"] == 256 * 512 / 2
    assert seen["peak"] < size


def test_a_card_quantizes_what_stays_on_the_cpu(monkeypatch):
    """No card is here: the CPU passes for it."""
    import torch
    from bitsandbytes import functional

    weight, sent = torch.randn(64, 64), []
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for key, value in launcher_environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: sent.append(tensor) or tensor)
    with sharding.quantized_on_card():
        again, its_state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    functional.quantize_4bit(weight, quant_type="nf4")
    assert len(sent) == 1 and sent[0] is weight
    assert again.equal(packed) and its_state == state


# By how much a process's own memory (no mapped file) grows at most while a base is read, the second of its life. Each
# of its weights is a piece of memory by itself, as those of a large base are: in glibc's heap the gaps that they leave
# may be too small for the next, which is chance.
LOADS = """
import ctypes, gc, json, os, sys, threading, time
from pathlib import Path

from hydra import compose, initialize_config_dir
from rlhf_recipes import memory, models
from rlhf_recipes.config import CONF
from transformers import AutoModelForCausalLM

def own():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def look():
    while not over.is_set():
        peak[0] = max(peak[0], own() - before)
        time.sleep(0.001)

def loaded(*args, **kwargs):
    given.update(kwargs)
    return load(*args, **kwargs)

def read(folder):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("dpo", ["quantization=nf4_fsdp", f"model.path={folder}", "model.id=tests/tiny"])
    return models.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)

os.environ |= json.loads(sys.argv[1])
memory.keep_freed_memory = lambda: None
M_MMAP_THRESHOLD = -3
getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(M_MMAP_THRESHOLD, 2**14)
load, given = AutoModelForCausalLM.from_pretrained, {}
AutoModelForCausalLM.from_pretrained = loaded
read(sys.argv[3])
gc.collect()
memory.return_freed_memory()
before, peak, over = own(), [0], threading.Event()
looking = threading.Thread(target=look)
looking.start()
packed = read(sys.argv[2]).model.layers[0].mlp.up_proj.weight
over.set()
looking.join()
seen = {"device_map": given["device_map"], "dtype": str(packed.dtype), "nbytes": packed.nbytes, "peak": peak[0]}
print(json.dumps(seen))
"""


REFUSED = [
    ("dpo", {}, ["quantization=nf4"], "quantization=nf4: packs integers.*quantization=nf4_fsdp"),
    ("dpo", {}, ["quantization=int8"], "quantization=int8: FSDP shards no integers.*nf4_fsdp"),
    ("dpo", {}, ["quantization=nf4_fsdp", "doctor=strict"], "doctor=strict: .*Use doctor=warn"),
    (
        "dpo",
        {},
        ["quantization=none", "trainer.precompute_ref_log_probs=true"],
        "precompute_ref_log_probs=true: .*Leave",
    ),
    ("ppo", {}, ["quantization=nf4_fsdp", "reward_funcs=x"], "PPO samples token by token.*conf/accelerate/ddp.yaml"),
    ("evaluate", {}, [], "recipes/evaluate.py does not train.*conf/accelerate/ddp.yaml"),
    ("dpo", {"FSDP_VERSION": "1"}, [], "fsdp_version=1: .*Set fsdp_version: 2"),
    ("dpo", {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, [], "fsdp_state_dict_type: .*Set FULL_STATE_DICT"),
    ("dpo", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, [], "fsdp_cpu_ram_efficient_loading=true: .*Set false"),
    ("dpo", {"ACCELERATE_USE_DEEPSPEED": "true"}, [], "distributed_type=DEEPSPEED: .*fsdp2_qlora.yaml, or ddp.yaml"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "environment", "overrides", "says"), REFUSED)
def test_what_cannot_run_in_parts_is_refused(compose, monkeypatch, recipe, environment, overrides, says):
    cfg = compose(recipe, *overrides)
    sharding.check(cfg, recipe)  # nobody asks for parts
    for key, value in {**launcher_environment(), **environment}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Refusal, match=says) as refused:
        sharding.check(cfg, recipe)
    assert "\n" not in str(refused.value)


def test_packed_weights_are_never_converted(monkeypatch):
    import torch
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    sharding.check_packed(packed, torch.float16)  # nobody asks for parts
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for dtype in (torch.bfloat16, torch.float32):
        sharding.check_packed(packed, dtype)
    sharding.check_packed(None, torch.float16)
    with pytest.raises(Refusal, match=r"_storage=bfloat16: the run computes in float16.*_storage=float16"):
        sharding.check_packed(packed, torch.float16)


def test_every_rank_takes_as_many_batches(monkeypatch):
    """A rank with one batch less would wait for the others in their last forward pass for ever."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    for count in range(1, 8):
        shares = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            shares.append(ranks.share([[number] for number in range(count)]))
        assert len({len(share) for share in shares}) == 1
        assert {number for share in shares for number, _ in share} == set(range(count))
