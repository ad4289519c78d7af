"""Memory of this process: how glibc keeps what a step frees, and the peak that a run reports.

By default glibc maps every buffer over 32 MiB from the kernel and hands it back when it is freed, page faults and all:
on a CPU, where logits are that large, a third of a training step. Kept for the next step instead, the heap grows with
the variety of shapes. Keeping inside a step and returning between steps is fast and small; what is little is kept from
step to step. Where a GPU computes, its own allocator does this, and glibc's is left as it is.
"""

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

from rlhf_recipes import ranks

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
LITTLE = 2**26  # bytes
_left = {"resident": 0}  # bytes, when memory was last returned
# Where a container says how much memory it may have, and has: version 2, version 1.
CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def on_gpu() -> bool:
    """Whether what this process computes is computed on a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def keep_freed_memory() -> None:
    """Reuse the buffers of a step within the step. `MALLOC_MMAP_MAX_` in the environment leaves glibc as it is."""
    libc = None if on_gpu() else _glibc()
    if libc and "MALLOC_MMAP_MAX_" not in os.environ:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the kernel back what no buffer uses, once the process has grown by more than a little since it last did."""
    if resident() >= _left["resident"] + LITTLE:
        _return()


def _return() -> None:
    libc = None if on_gpu() else _glibc()
    if libc:
        libc.malloc_trim(0)
        _left["resident"] = resident()


def peak_gib() -> dict[str, float]:
    """Peak resident memory of this process and, with CUDA, peak allocated device memory, in GiB."""
    import resource

    import torch

    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is bytes on macOS, KiB on Linux
    peak = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peak["cuda"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


def resident() -> int:
    """Bytes of this process in main memory."""
    import psutil

    return psutil.Process().memory_info().rss


def free() -> int:
    """Bytes that a process of a training could take: of its GPU where there is one, else its share of main memory,
    within the container's limit."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    left = [psutil.virtual_memory().available]
    for limit, used in CGROUP:
        with suppress(OSError, ValueError):  # no such version of cgroups, or the word "max"
            left.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + _reclaimable(Path(used)))
    return min(left) // ranks.local_world_size()


def _reclaimable(used: Path) -> int:
    """Bytes that a container's use counts and the kernel gives up first: of files that nobody reads any more."""
    with suppress(OSError, ValueError):
        lines = (line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        return sum(int(size) for name, size in lines if name == "inactive_file")
    return 0


def make_room() -> None:
    """Free what nothing refers to any more; on a GPU, what this process keeps for itself, too."""
    gc.collect()
    _return()
    if on_gpu():
        sys.modules["torch"].cuda.empty_cache()


def forget_peak() -> None:
    """Make room, and count the peak from here, as the next job of a sweep needs it. Where the system cannot forget a
    peak (it is no Linux), the process's stays that of all jobs so far."""
    make_room()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set size
    if on_gpu():
        sys.modules["torch"].cuda.reset_peak_memory_stats()


def _glibc():
    """The C library where it is glibc (musl and macOS have no mallopt), else None."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "malloc_trim") else None
    except OSError:
        return None
