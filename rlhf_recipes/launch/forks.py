"""Modules as forks of a process that has imported torch, transformers, TRL and PEFT: ready in 0.1 s instead of 8 s.

The standard library's fork server makes them. Each is, to who started it and to itself, what `python -P -m <module>`
would be: environment, folder, input and outputs, signals, exit status, what it prints. What a fork would do in another
way starts anew: CUDA and Metal do not survive a fork.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import types
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import NoReturn

from rlhf_recipes.launch.cards import DEVICES

PRELOADED = "rlhf_recipes.launch.preloaded"


class Fork:
    """A fork, as `subprocess.Popen` shows a process."""

    def __init__(self, process: multiprocessing.Process):
        self._process = process

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


def prepare(environment: dict[str, str]) -> None:
    """Have the libraries imported, beside what this process does, for forks that start in about this environment."""
    if _survives():
        with suppress(OSError), _in(environment):
            _context()
            forkserver.ensure_running()


def start(module: str, arguments: list[str], environment: dict[str, str]) -> Fork | subprocess.Popen:
    """Start `python -P -m module arguments`."""
    if _survives():
        with suppress(OSError, EOFError):  # the server is gone, or there is no room for its socket
            return _fork(module, arguments, environment)
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], env=environment)


def _survives() -> bool:
    return sys.platform == "linux" and not any(Path(device).exists() for device in DEVICES)


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def _fork(module: str, arguments: list[str], environment: dict[str, str]) -> Fork:
    # What asks for its name takes any other for a worker.
    process = _context().Process(target=_be, args=(module, arguments, environment), name="MainProcess")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with _in(environment):  # a server that starts keeps it, and reads of it what the libraries read
        process.start()
    return Fork(process)


@contextmanager
def _in(environment: dict[str, str]):
    own = dict(os.environ)
    _become(environment)
    try:
        yield
    finally:
        _become(own)


def _become(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _be(module: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """The fork: run the module to its end, and end as Python does."""
    import numpy

    multiprocessing.set_start_method(None, force=True)  # for what it starts itself, as everywhere
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has closed it
    sys.argv = [module, *arguments]
    sys.modules["__main__"] = types.ModuleType("__main__")
    _become(environment)
    numpy.random.seed()
    status = 0
    try:
        runpy._run_module_as_main(module)  # what -m is
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        error = error.with_traceback(error.__traceback__.tb_next)  # without this frame
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if status == -signal.SIGINT:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(status)
