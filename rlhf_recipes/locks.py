"""Who writes a run's folder at the moment: one process, and others are refused."""

import atexit
import errno
import os
import socket
import weakref
from contextlib import suppress
from pathlib import Path

from rlhf_recipes.errors import Refusal

# How some network file systems answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
LOCK_SECONDS = 1.0  # a process that was just killed may leave a child that lives on for a moment


class Lock:
    """Says to other processes that this one writes a run's folder, until the object or the process is gone.

    The file `.<name>.lock` beside the folder holds host and process id.

    Attributes:
        release: ends it.

    Raises:
        Refusal: another process holds it.
    """

    def __init__(self, folder: Path):
        from filelock import FileLock, Timeout

        path = folder.with_name(f".{folder.name}.lock")
        made = [above for above in path.parents if not above.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        # One for the process: a job of a sweep that is started again does not wait for what it left behind.
        lock = FileLock(path, timeout=LOCK_SECONDS, thread_local=False, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            holder = " ".join(path.read_text(errors="replace").split()[:4]) or "another process"
            raise Refusal(
                f"{folder}: is being written by {holder}. Wait for it or end it, or choose another run_name."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self.release = lambda: None
            said = f"this file system has no locks ({error.strerror})"
            print(f"{folder}: {said}. Start no second command that writes it.", flush=True)
            return
        self.release = weakref.finalize(self, _release, lock, path, made)
        atexit.register(self.release)  # before filelock's own, which lets go of locks and leaves their files
        _locks.add(self)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()  # of this process


def release_all() -> None:
    """Let go of every folder, before libraries end what they began: that may end the process at once, where another
    one of its run is gone."""
    for lock in list(_locks):
        lock.release()


def _release(lock, path: Path, made: list[Path]) -> None:
    if lock.lock_counter == 1:
        path.unlink(missing_ok=True)  # while it is held: whoever has opened it meanwhile sees that it has no name
    lock.release()
    for folder in made:  # of what was refused nothing is left
        with suppress(OSError):  # not empty
            folder.rmdir()
