"""Which of the processes of one run this is, and how they speak to each other.

A launcher starts the same command several times, side by side: `torchrun`, `accelerate launch` and submitit say who
each process is in torchrun's variables, a bare `srun` in Slurm's. Rank 0 decides, writes and prints; the others
compute. With one process nothing here imports torch or does anything.
"""

import functools
import os
import pickle
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rlhf_recipes.errors import Refusal

# What a launcher sets, beginnings of names: a child process that inherits it would take itself for a rank.
LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_", "TORCH_NCCL_", "ACCELERATE_", "FSDP_", "FORK_LAUNCHED"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_"),
)
# Of messages between processes: one may work alone for long, and the end of a process is seen without it.
PATIENCE = timedelta(days=7)
SECONDS = 1800  # of what the processes compute together: `ddp_timeout` of transformers
ENDED, LAST_SECONDS = "rlhf_recipes/ended", 30  # that the first waits until all know why it ends

_group = None  # for messages; it works on the CPU, whatever the model is trained on


@dataclass(frozen=True)
class Place:
    """Of one process among those of its run.

    Attributes:
        rank: among all, from 0.
        world_size: number of all.
        local_rank: among those of its machine, from 0.
        local_world_size: number of those of its machine.
        nodes: number of machines.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    nodes: int = 1


def place() -> Place:
    """As the launcher says it in the environment; the only process where there is no launcher.

    `srun` says it in the variables of its step: those of the job (SLURM_NTASKS) hold in a batch script, too, which is
    one process.

    Raises:
        Refusal: a variable is missing beside the others, or is no number that can be.
    """
    if os.environ.get("RANK") or os.environ.get("WORLD_SIZE"):
        rank, size = _number("RANK"), _number("WORLD_SIZE", least=1)
        local, beside = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", size, least=1)
        found = Place(rank, size, local, beside, _number("GROUP_WORLD_SIZE", -(-size // beside), least=1))
    elif os.environ.get("SLURM_STEP_NUM_TASKS"):
        size = _number("SLURM_STEP_NUM_TASKS", least=1)
        tasks = _tasks_of_nodes(os.environ.get("SLURM_STEP_TASKS_PER_NODE") or str(size))
        beside = tasks[min(_number("SLURM_NODEID", 0), len(tasks) - 1)]
        found = Place(_number("SLURM_PROCID"), size, _number("SLURM_LOCALID"), beside, len(tasks))
    else:
        return Place()
    if found.rank >= found.world_size or found.local_rank >= found.local_world_size:
        raise Refusal(
            f"RANK={found.rank}: of {found.world_size} processes, as LOCAL_RANK={found.local_rank} of "
            f"{found.local_world_size}, cannot be. Start the command with one launcher, or unset these variables."
        )
    return found


def rank() -> int:
    return place().rank


def world_size() -> int:
    return place().world_size


def local_rank() -> int:
    return place().local_rank


def local_world_size() -> int:
    return place().local_world_size


def nodes() -> int:
    return place().nodes


def is_first() -> bool:
    """Whether this process is the one that decides, writes and prints."""
    return rank() == 0


def join(seconds: float = SECONDS) -> None:
    """Meet the other processes: torch's process group, on gloo without an accelerator, and one of gloo for messages.

    It waits until all are there. What must be set before torch is imported must be set before.

    Args:
        seconds: how long one waits for the others in what they compute together.
    """
    global _group
    if world_size() == 1 or _group:
        return
    import torch
    from accelerate import PartialState

    on_cuda = torch.cuda.is_available()
    if not torch.distributed.is_initialized():
        _export()
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
    PartialState(cpu=not on_cuda)
    _group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes, at the end of what they do together: this one is alone from here on."""
    global _group
    if _group:
        import torch

        _group = None
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - alone_env().keys():
        del os.environ[name]


def barrier() -> None:
    """Wait until every process is here."""
    gather([])


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank.

    Args:
        value: can be pickled; that of the other ranks is not looked at.
    """
    if world_size() == 1:
        return value
    import torch

    join()
    held = [value if is_first() else None]
    torch.distributed.broadcast_object_list(held, src=0, group=_group)
    return held[0]


def by_first(function: Callable, *args, **kwargs) -> Any:
    """What rank 0's call gives, on every rank; the others call nothing and wait for it. What it refuses, all do.

    Args:
        function: its value can be pickled.
    """
    if world_size() == 1:
        return function(*args, **kwargs)
    value, refused = from_first(_outcome(function, *args, **kwargs) if is_first() else None)
    if refused:
        raise Refusal(refused)
    return value


def _outcome(function: Callable, *args, **kwargs) -> tuple[Any, str | None]:
    """What a call gives, or why it is refused."""
    try:
        return function(*args, **kwargs), None
    except Refusal as error:
        return None, str(error)


def gather(items: list) -> list:
    """The items of every rank, in the order of ranks, on every rank.

    Args:
        items: can be pickled.
    """
    if world_size() == 1:
        return items
    import torch

    join()
    found = [None] * world_size()
    torch.distributed.all_gather_object(found, items, group=_group)
    return [item for part in found for item in part]


def share(items: list) -> list[tuple[int, Any]]:
    """This rank's part, each item with its place: `dict(gather(...))` of (place, result) has them all.

    Items are taken in rounds, side by side: where they lie by their length, those of a round take as long. In each
    round every rank has one, in the last that of rank 0 where there are too few: a sharded model works with all.
    """
    size = world_size()
    places = [start + rank() if start + rank() < len(items) else start for start in range(0, len(items), size)]
    return [(place, items[place]) for place in places]


def once_a_machine(function: Callable) -> Callable:
    """Decorate a function that the first process of every machine calls, for all processes of that machine.

    What it gives can be pickled, and what lies in files is there for as long as the first process has it.
    """

    @functools.wraps(function)
    def called(*args, **kwargs):
        if world_size() == 1:
            return function(*args, **kwargs)
        machine, own = socket.gethostname(), None
        if local_rank() == 0:
            own = _outcome(function, *args, **kwargs)
        found = dict(gather([(machine, pickle.dumps(own))] if own else []))
        value, refused = own or pickle.loads(found[machine])
        barrier()  # all have opened what the first may remove next
        if refused:
            raise Refusal(refused)
        return value

    return called


def end(code: int) -> int | None:
    """Say that this process ends before all is done.

    Args:
        code: its exit status.

    Returns:
        None where it is the first of all to say so: it tells why. Else the exit status of the first, and the others'
        reasons follow from its.
    """
    try:
        if world_size() == 1:
            return None
        import torch

        join()
        store = torch.distributed.distributed_c10d._get_default_store()
        first, by = store.compare_set(ENDED, "", f"{code} {rank()}").split()
        store.add(f"{ENDED}/asked", 1)
        if is_first() and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:  # the store goes with this process
            torch.distributed.destroy_process_group()  # whoever waits for it looks why
            begin = time.monotonic()
            while store.add(f"{ENDED}/asked", 0) < world_size() and time.monotonic() < begin + LAST_SECONDS:
                time.sleep(0.05)
    except (
        RuntimeError,
        ValueError,
    ):  # the store went with the process that held it; or there is no telling who is who
        return None
    return None if int(by) == rank() else int(first)


def is_parted(error: BaseException) -> bool:
    """Whether an error says that another of the processes has ended."""
    return "gloo/transport" in str(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def alone_env() -> dict[str, str]:
    """The environment without what a launcher says, for a child process that is no rank."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}


def launcher_set(name: str) -> bool:
    """Whether a variable is the launcher's own word: it is none that the launcher was started with.

    Both torchrun and accelerate set OMP_NUM_THREADS=1 where the user says nothing.
    """
    if not os.environ.get("LOCAL_WORLD_SIZE"):
        return False
    import psutil

    try:
        return name not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return False


def _number(name: str, default: int | None = None, least: int = 0) -> int:
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        said = "is not set, though other variables of a launcher are" if not text else f"is no number from {least}"
        raise Refusal(f"{name}={text}: {said}. Start the command with torchrun, accelerate launch or srun alone.")
    return int(text)


def _tasks_of_nodes(text: str) -> list[int]:
    """Slurm's `8(x2),4` as 8, 8, 4."""
    if not re.fullmatch(r"[1-9]\d*(\(x\d+\))?(,[1-9]\d*(\(x\d+\))?)*", text):
        raise Refusal(f"SLURM_STEP_TASKS_PER_NODE={text}: is no list of numbers. Start the command with srun.")
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _export() -> None:
    """Say in torchrun's variables, which torch and accelerate read, what Slurm says in its own."""
    here = place()
    os.environ |= {
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.world_size),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(here.local_world_size),
        "GROUP_WORLD_SIZE": str(here.nodes),
    }
    # The first machine of the step, `gpu[03-07],gpu12`; a port that other steps on it do not take.
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    step = int(os.environ.get("SLURM_JOB_ID", 0)) + int(os.environ.get("SLURM_STEP_ID", 0))
    os.environ.setdefault("MASTER_ADDR", first[1] + (first[2] or "") if here.nodes > 1 else "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(20000 + step % 20000))
