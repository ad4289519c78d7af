"""A stage that is a fork cannot be told from one that was started."""

import subprocess
import sys

import pytest

# What a stage prints of itself, and how it ends.
STAGE = """
import atexit, multiprocessing, os, signal, sys, threading, time
how = sys.argv[1]
print(how, sys.argv[1:], os.path.basename(sys.argv[0]), __name__, os.getcwd(), sorted(os.environ.items()))
print(multiprocessing.current_process().name, multiprocessing.get_start_method(), sys.path)
print([signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)])
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
if how == "reads":
    print(sys.stdin.read(), os.read(0, 9))
elif how == "exits":
    sys.exit(3)
elif how == "says":
    sys.exit("why")
elif how == "raises":
    raise ValueError("a bug")
elif how == "is interrupted":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
elif how == "aborts":
    sys.stdout.flush()
    os.abort()
elif how == "hooks":
    sys.excepthook = lambda kind, error, trace: print("hooked", error, file=sys.stderr)
    raise ValueError("a bug")
elif how in ("is told", "is killed"):
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGTERM if how == "is told" else signal.SIGKILL)
"""
# The pipeline's part: start each of them, by a fork or anew.
STARTS = """
import os, signal, sys
from rlhf_recipes.launch import forks

def main(way, *ends):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has the background ignore it
    forks.PRELOADED = "json"
    for how in ends:
        if way == "anew":
            forks.DEVICES = ("/dev/null",)
        print("started", how, flush=True)
        started = forks.start("stage", [how], {**os.environ, "HOW": how})
        print("ended", started.wait(), started.poll(), type(started).__name__ == "Fork", flush=True)
        print("ended", how, file=sys.stderr, flush=True)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""
ENDS = ("reads", "exits", "says", "raises", "hooks", "is interrupted", "is told", "is killed", "aborts")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """By a fork and anew: what the same stages left."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "stage.py").write_text(STAGE)
    (folder / "starts.py").write_text(STARTS)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "HOME": str(folder)}
    command = [sys.executable, "-P", "-m", "starts"]
    return [
        subprocess.run([*command, way, *ENDS], input="typed", capture_output=True, text=True, env=env, cwd=folder)
        for way in ("fork", "anew")
    ]


@pytest.mark.slow
def test_a_fork_says_and_ends_as_what_is_started_anew(ended):
    fork, anew = ended
    assert fork.returncode == anew.returncode == 0, fork.stderr
    assert fork.stdout.count(" True\n") == anew.stdout.count(" False\n") == len(ENDS)  # each was what it says
    assert fork.stdout.replace(" True\n", " False\n") == anew.stdout
    assert fork.stderr == anew.stderr
    statuses = [line.split()[1] for line in anew.stdout.splitlines() if line.startswith("ended")]
    assert statuses == ["0", "3", "1", "1", "1", "-2", "-15", "-9", "-6"]
