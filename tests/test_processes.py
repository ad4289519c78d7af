"""Two processes on a CPU, by gloo, as launchers start them: they compute what one computes, and one of them writes."""

import json
import math
import re
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, build_terse, free_port, merged, wait_for

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
# What differs between processes that compute the same.
OWN = ("peak_memory_gib", "device", "world_size", "config_sha256")
PPO = ["trainer.max_completion_length=6", "trainer.num_ppo_epochs=2", "trainer.num_mini_batches=1",
       "reward_funcs=warm_processes:short", "trainer.max_steps=4", "trainer.normalize_rewards=true",
       "trainer.kl_controller=adaptive"]  # fmt: skip
TRAINED = {
    "sft": [], "reward": [], "dpo": [], "orpo": [], "simpo": [],
    "kto": ["trainer.loss_type=apo_zero_unpaired"],  # the KL of `kto` is that of a micro-batch
    "ppo": [*PPO, "trainer.value=separate"],
    "rloo": ["trainer.max_completion_length=6", "trainer.num_generations=2", "trainer.normalize_rewards=true",
             "reward_funcs=warm_processes:short", "trainer.max_steps=4"],
    "ppo_head": [*PPO, "trainer.value=head"],
}  # fmt: skip
NF4 = "dpo_nf4"
# They read what one process has trained.
READING = {
    "evaluate": ["runs=[../one/dpo,../one/ppo]", "reward_model=../one/reward", "judge=local", "prompts=4",
                 "judging.principles_per_pair=2", "judging.min_option_mass=0", "max_new_tokens=6", "temperature=0.7",
                 "exit_codes.worse=0"],
    "audit": ["reward_model=../one/reward", "gold=warm_processes:short", "ledger_pairs=4", "stress_pairs=2",
              "probe_pairs=2", "credit_pairs=1", "prompts=3", "samples=4", "max_new_tokens=6"],
    "cai": ["data.train_size=4", "gate.pairs=4", "gate.fails=ignore", "generate.max_new_tokens=8",
            "revise.max_new_tokens=8", "revise.n_revisions=1", "filters.min_words=1", "filters.max_length_ratio=9",
            "judging.principles_per_pair=1", "judging.min_option_mass=0", "shard_size=4"],
}  # fmt: skip


def jobs(model, processes):
    """Folder -> recipe and overrides: two steps of four rows each, in float32 but for one in 4 bits.

    What ORPO, KTO and PPO make of a row depends on its micro-batch: one process takes those of both in turn.
    """
    shared = [f"model.path={model}", "model.id=tests/tiny", "model.dtype=float32", "quantization=none",
              "data.train_size=8", "data.eval_size=4"]  # fmt: skip
    steps = ["trainer.max_steps=2", "trainer.logging_steps=1", "trainer.learning_rate=1e-3", "trainer.warmup_steps=0",
             "trainer.per_device_train_batch_size=2", "trainer.save_steps=2",
             f"trainer.gradient_accumulation_steps={2 // processes}"]  # fmt: skip
    made = {name: [name.removesuffix("_head"), *shared, *steps, *own] for name, own in TRAINED.items()}
    made |= {name: [name, *shared, *own] for name, own in READING.items()}
    return made | {NF4: ["dpo", *shared, *steps, "quantization=nf4"]}


# What starts two processes; PYTHON is the one process.
PYTHON = []
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--main_process_port", "0"]  # fmt: skip
OF_A_FILE = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "conf/accelerate/ddp.yaml"),
             "--num_processes", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def start(warm_python, clean_env):
    """start(launcher, arguments of python, cwd, env=None): its process."""

    def started(launcher, *arguments, cwd, env=None):
        env = merged(clean_env, {"PYTHONPATH": str(TESTS), **(env or {})})
        return subprocess.Popen(
            [warm_python, *launcher, *arguments], cwd=cwd, env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return started


@pytest.fixture
def recipe(start, tiny_overrides, tmp_path):
    """recipe(name, *overrides): by two processes on a command line; exit status, output, errors."""

    def ran(name, *overrides, launcher=TORCHRUN):
        process = start(launcher, "-m", f"rlhf_recipes.recipes.{name}", *tiny_overrides, *overrides, cwd=tmp_path)
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err

    return ran


@pytest.fixture(scope="module")
def folders(start, tiny_model, tmp_path_factory):
    """Folders in which one and two processes have run the same recipes, what was seen of each of the two, and what the
    two were asked."""
    room = tmp_path_factory.mktemp("processes")
    model = build_terse(tiny_model, room / "model")  # replies end
    for launcher, processes, name in ((PYTHON, 1, "one"), (ACCELERATE, 2, "two")):
        (room / name).mkdir()
        arguments = ["-m", "warm_processes", json.dumps(jobs(model, processes)), str(room / name)]
        process = start(launcher, *arguments, cwd=room / name)
        out, err = process.communicate(timeout=2 * LIMIT)
        assert process.returncode == 0, f"{out}\n{err}"
    seen = [json.loads((room / f"two.{rank}.json").read_text()) for rank in (0, 1)]
    return room / "one", room / "two", seen, jobs(model, 2)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def moved(adapter):
    return any("lora_B" in key and each.abs().max() > 1e-4 for key, each in adapter.items())


def log(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def differences(one, two, where="", absolute=1e-6):
    """Where two results differ by more than rounding."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in one.keys() | two.keys():
            if not (key in OWN or "second" in key or "sha256" in key):
                yield from differences(one.get(key), two.get(key), f"{where}.{key}", absolute)
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, pair in enumerate(zip(one, two, strict=True)):
            yield from differences(*pair, f"{where}.{number}", absolute)
    elif isinstance(one, float) and isinstance(two, int | float):
        if not math.isclose(one, two, rel_tol=1e-5, abs_tol=absolute) and one == one:
            yield f"{where}: {one} by one process, {two} by two"
    elif one != two:
        yield f"{where}: {one!r:.80} by one process, {two!r:.80} by two"


@pytest.mark.parametrize("name", TRAINED)
def test_every_step_is_that_of_one_process(folders, name):
    one, two = (log(folder / name) for folder in folders[:2])
    rounding = 1e-5 if name == "rloo" else 1e-6  # TRL pads a prompt to the longest of its process
    assert len(one) == len(two) >= 2
    for row, other in zip(one, two, strict=True):
        assert row["grad_norm"] > 0
        for key in ("loss", "grad_norm", "reward", "kl", "kl_coef", "entropy", "explained_variance"):
            if key in row:
                assert other[key] == pytest.approx(row[key], rel=1e-5, abs=rounding), (key, row["step"])
    first, second = (weights(folder / name) for folder in folders[:2])
    assert first.keys() == second.keys() and moved(first)
    for key, each in first.items():
        assert (second[key] - each).abs().max() < 1e-4, key


def test_weights_move_in_4_bits(folders):
    assert moved(weights(folders[1] / NF4))
    assert [row["loss"] for row in log(folders[1] / NF4)] == pytest.approx([math.log(2)] * 2, abs=0.05)


@pytest.mark.parametrize("name", [*TRAINED, *READING])
def test_the_result_is_that_of_one_process(folders, name):
    one, two = (json.loads((folder / name / "result.json").read_text()) for folder in folders[:2])
    assert (one["world_size"], one["nodes"]) == (1, 1) and (two["world_size"], two["nodes"]) == (2, 1)
    # What was trained differs by rounding, and so do the figures that count what it ranks higher.
    keys = ("before", "counts", "steps", "global_batch", "seed") if name in TRAINED else one
    assert list(differences({key: one[key] for key in keys}, {key: two[key] for key in keys})) == []


def test_one_process_writes(folders):
    first, second = (seen["writes"] for seen in folders[2])
    assert {f"{name}/result.json" for name in (*TRAINED, *READING)} <= {*first}
    own = re.compile(r"(\w+)/checkpoints/checkpoint-\d+/(rng_state|ppo|rloo)_1\.p(th|t)")  # the state of this rank
    assert [path for path in second if not own.fullmatch(path)] == []
    assert any(own.fullmatch(path) for path in second)


@pytest.mark.parametrize("name", ["evaluate", "audit"])
def test_one_process_resamples(folders, name):
    """What all of them have measured."""
    first, second = (seen["draws"] for seen in folders[2])
    assert second.get(name, 0) < first[name]


def test_nothing_is_left_behind(folders):
    for name in TRAINED:
        assert not (folders[1] / name / "checkpoints").exists()
    assert sorted(path.name for path in folders[1].iterdir()) == sorted(path.name for path in folders[0].iterdir())


def ended(err):
    """Rank -> exit status of each process that did not end well, as torchrun tells them."""
    return {int(rank): int(code) for rank, code in re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", err)}


@pytest.mark.parametrize(
    ("launcher", "name", "overrides", "said"),
    [
        (OF_A_FILE, "dpo", ["trainer.betaa=1"],
         "trainer.betaa: trl.DPOConfig has no such field; did you mean 'beta'?"),
        (TORCHRUN, "dpo", ["data.path=nowhere.jsonl"], "nowhere.jsonl: no such file."),
        (TORCHRUN, "dpo", ["run_name=foreign"], "hydra.run.dir=outputs/dpo/foreign: holds mine.txt"),
        (TORCHRUN, "ppo", [*PPO, "reward_funcs=warm_processes:refuses_on_rank_1"],
         "reward_funcs=refuses_on_rank_1: raised ValueError: not on this rank"),
        (TORCHRUN, "pipeline", ["experiment=pipeline/demo"], "WORLD_SIZE=2: pipeline is one process"),
        (TORCHRUN, "dpo", ["hydra.mode=MULTIRUN", "trainer.beta=0.1,0.2"], "WORLD_SIZE=2: a sweep is one process"),
    ],
)  # fmt: skip
def test_a_refusal_of_any_rank_ends_all_in_one_line(recipe, tmp_path, launcher, name, overrides, said):
    foreign = tmp_path / "outputs" / "dpo" / "foreign" / "mine.txt"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    code, _, err = recipe(name, *overrides, launcher=launcher)
    refused = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(refused) == 1 and refused[0].startswith(f"error: {said}"), err
    assert code == 1 and {2} <= {*ended(err).values()} <= {2, -15}, err  # -15: torchrun was faster
    assert [path.name for path in (tmp_path / "outputs" / "dpo").iterdir()] == ["foreign"]


def test_what_a_kill_of_one_rank_left_goes_on(folders, recipe, tmp_path):
    """To the same bits as the run that nobody killed."""
    name, *overrides = folders[3]["ppo"]
    overrides += ["reward_funcs=warm_processes:kills_rank_1_once"]
    code, _, err = recipe(name, *overrides)
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    # The other one ends by itself, not half a minute later by torchrun's SIGKILL; torchrun's SIGTERM may be faster.
    assert code == 1 and len(said) <= 1 and ended(err)[1] == -9 and ended(err).get(0, -15) in (2, -15), err
    assert not said or "another of the 2 processes has ended" in said[0]
    assert not (tmp_path / "outputs" / "ppo" / "main" / "result.json").exists()
    code, out, err = recipe(name, *overrides)
    assert code == 0 and out.count("Continuing outputs/ppo/main from step 2.") == 1, err
    results = [
        json.loads((each / "result.json").read_text()) for each in (tmp_path / "outputs/ppo/main", folders[1] / "ppo")
    ]
    assert results[0]["adapter_sha256"] == results[1]["adapter_sha256"]


def test_ctrl_c_is_said_once(start, tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "trainer.max_steps=5000", "quantization=none"]
    process = start(TORCHRUN, "-m", "rlhf_recipes.recipes.dpo", *overrides, cwd=tmp_path)
    folder = tmp_path / "outputs" / "dpo"
    wait_for(folder / "main" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT)
    assert err.count("Interrupted. The same command continues from the last checkpoint.") == 1, err
    assert "\nerror: " not in err and [path.name for path in folder.iterdir()] == ["main"], err


@pytest.mark.parametrize(("overrides", "code"), [([], 0), (["data.path=nowhere.jsonl"], 2)])
def test_bare_srun(start, tiny_overrides, tmp_path, overrides, code):
    """Slurm's own variables, and nothing that keeps what the processes tell each other when the first is gone."""
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    job["SLURM_JOB_ID"] = str(free_port() - 20_000)  # of which the port is made
    arguments = ["-m", "rlhf_recipes.recipes.dpo", *tiny_overrides, "trainer.max_steps=1", "quantization=none"]
    arguments += overrides
    ranks = ({"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01")
    processes = [start(PYTHON, *arguments, cwd=tmp_path, env=job | own) for own in ranks]
    (out, err), (other_out, other_err) = (process.communicate(timeout=LIMIT) for process in processes)
    assert [process.returncode for process in processes] == [code, code], err + other_err
    assert other_out == "" and out.count("dpo finished in") == (code == 0)
    assert (err + other_err).count("error: nowhere.jsonl: no such file.") == (code == 2)
