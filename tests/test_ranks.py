"""Who a process is, as launchers say it, and what one process does of what several do: nothing."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from rlhf_recipes import ranks, run
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch.preflight import real_steps
from rlhf_recipes.training import doctor_record

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The environment as it is without one, restored whatever `_export` writes."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        for name in [*TORCHRUN, *SRUN, "MASTER_ADDR", "MASTER_PORT"]:
            os.environ.pop(name, None)
        yield


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 1, 0, 1, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, 0, 1, 1)),
        (TORCHRUN, (9, 16, 1, 8, 2)),
        # `accelerate launch` with one process sets LOCAL_RANK nowhere; submitit's export says no number of machines.
        ({"ACCELERATE_MIXED_PRECISION": "no"}, (0, 1, 0, 1, 1)),
        ({**TORCHRUN, "GROUP_WORLD_SIZE": ""}, (9, 16, 1, 8, 2)),
        (SRUN, (9, 16, 1, 8, 2)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "12,4"}, (9, 16, 1, 4, 2)),
        # `srun accelerate launch`: what is nearer to this process counts.
        ({**SRUN, **TORCHRUN, "RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 1, 8, 2)),
        # A batch script: its job has 16 tasks, and it is none of them.
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, (0, 1, 0, 1, 1)),
    ],
)
def test_place(env, place):
    os.environ |= env
    found = ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.local_world_size(), ranks.nodes()
    assert found == place and ranks.is_first() == (place[0] == 0)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "1"}, "WORLD_SIZE=: is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK=: is not set"),
        ({**TORCHRUN, "RANK": "one"}, "RANK=one: is no number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1: is no number"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: is no number from 1"),
        ({**TORCHRUN, "RANK": "16"}, "RANK=16: of 16 processes"),
        ({**TORCHRUN, "LOCAL_RANK": "8"}, "LOCAL_RANK=8 of 8"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=: is not set"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE=many: is no list"),
    ],
)
def test_what_no_launcher_says_is_refused(env, said):
    os.environ |= env
    with pytest.raises(Refusal) as caught:
        ranks.place()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_srun_is_said_in_the_variables_of_torchrun():
    os.environ |= SRUN
    ranks._export()
    assert {name: os.environ[name] for name in TORCHRUN} == TORCHRUN
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "20009")


def test_a_child_is_no_rank():
    os.environ |= {**TORCHRUN, **SRUN, "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "0"}
    child = ranks.alone_env()
    assert child["CUDA_VISIBLE_DEVICES"] == "0"
    os.environ.clear()
    os.environ |= child
    assert ranks.place() == ranks.Place() and "MASTER_PORT" not in child and "TORCHELASTIC_RUN_ID" not in child


def test_shares_are_all_of_it_in_its_order():
    items, parts = list("abcdefg"), []
    for rank in range(3):
        os.environ |= {**TORCHRUN, "WORLD_SIZE": "3", "RANK": str(rank), "LOCAL_RANK": "0"}
        parts += ranks.share(items)
    assert [item for _, item in sorted(dict(parts).items())] == items and len(parts) == 9  # three rounds of three


@pytest.mark.parametrize(("launcher", "threads"), [({}, "4"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, launcher, threads):
    """torchrun sets one thread where its own environment says nothing; what the user says stays."""
    monkeypatch.setattr(psutil.Process, "environ", lambda _: launcher)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    os.environ |= {**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    run.environment()
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_what_counts_steps_and_rows_counts_processes():
    args = SimpleNamespace(
        max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    assert [real_steps.total_steps("dpo", args, 64, processes) for processes in (1, 16)] == [16, 1]
    record = doctor_record.Record("dpo", [], args, 16, {}, {}, {})
    assert doctor_record.pairs_a_step(record) == 4
    os.environ |= TORCHRUN
    assert doctor_record.pairs_a_step(record) == 64


def test_one_process_needs_no_torch():
    script = (
        "import sys\nfrom rlhf_recipes import ranks as r\nr.join()\nr.barrier()\n"
        "assert r.from_first([1]) == [1] and r.gather([2]) == [2] and r.share('ab') == [(0, 'a'), (1, 'b')]\n"
        "r.leave()\nassert 'torch' not in sys.modules and 'accelerate' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))
