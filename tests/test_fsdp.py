"""A model in parts on two processes (FSDP2), by accelerate's own prepare: it trains like one that is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

FILE = ROOT / "conf/accelerate/fsdp2_qlora.yaml"
EXACT = ("model.dtype=float32", "trainer.bf16=false")
STEPS = (
    "data.train_size=8",
    "data.eval_size=6",
    "trainer.max_steps=2",
    "trainer.gradient_accumulation_steps=1",
    "trainer.learning_rate=1e-2",
    "trainer.logging_steps=1",
    "trainer.save_steps=1",
)
RUNS = {
    "none": ("dpo", "quantization=none"),
    "nf4": ("dpo", "quantization=nf4_fsdp"),
    "reward": ("reward", "quantization=nf4_fsdp"),
}


def launcher_environment():
    """What `accelerate launch --config_file conf/accelerate/fsdp2_qlora.yaml` says to its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(FILE), "recipes/dpo.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def trained(clean_env, tiny_model_overrides, tmp_path_factory):
    """{name: (run in parts, run of one process)}, folders: a batch has the same four rows, two on a process or all."""
    here = tmp_path_factory.mktemp("fsdp")
    runs = {
        name: [recipe, *tiny_model_overrides, quantization, *STEPS, *EXACT, f"run_name={name}"]
        for name, (recipe, quantization) in RUNS.items()
    }
    parts = [[*run, "trainer.per_device_train_batch_size=2"] for run in runs.values()]
    parts.insert(1, [parts[1][0], "stop=1", *parts[1][1:]])  # what is interrupted is continued
    parts[0].append("trainer.save_strategy=no")
    whole = [[*run, "trainer.per_device_train_batch_size=4"] for run in runs.values()]
    env = {**clean_env, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    fsdp = {**env, **launcher_environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    processes = []
    for folder, environments, given in (("one", [env], whole), ("parts", _ranks(fsdp), parts)):
        (here / folder).mkdir()
        for number, environment in enumerate(environments):
            log = (here / folder / f"{number}.log").open("w")
            words = [sys.executable, "-m", "sharded", json.dumps(given)]
            processes.append(subprocess.Popen(words, cwd=here / folder, env=environment, stdout=log, stderr=log))
    codes = [process.wait(timeout=240) for process in processes]
    logs = "\n".join(f"--- {log}\n{log.read_text()}" for log in sorted(here.glob("*/*.log")))
    assert codes == [0, 0, 0], logs
    return {
        name: [here / folder / "outputs" / recipe / name for folder in ("parts", "one")]
        for name, (recipe, _) in RUNS.items()
    }


def _ranks(environment):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**environment, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "grad_norm" in row]


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_trains_like_one_that_is_whole(trained, name):
    parts, one = trained[name]
    assert [row[0] for row in rows_of(parts)] == [1, 2]
    for (_, *found), (_, *expected) in zip(rows_of(parts), rows_of(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    before, after = seen(parts)["bytes"]
    assert 0.45 * before < after < 0.55 * before, "a rank has half of the base"
    for found, expected in zip(seen(parts)["measured"], seen(one)["measured"], strict=True):
        assert [[*each.values()] for each in found["found"]] == [
            pytest.approx([*each.values()], abs=1e-4) for each in expected["found"]
        ]


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
