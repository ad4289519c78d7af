"""A warm Python does what a cold one does."""

import json
import os
import signal
import subprocess
import sys

import pytest
import warm
from conftest import LIMIT

# What the libraries have read of the environment, and what else a process has of its own.
SAYS = """
import json, os, sys
from rlhf_recipes import run
from rlhf_recipes.launch import refusals
run.environment()
import datasets, torch
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _cache_manager, tqdm
from transformers.utils import hub, logging

read = [constants, datasets.config, hub, _cache_manager, sys.modules["huggingface_hub.utils.tqdm"]]
said = [
    {name: sorted(value) if isinstance(value, set | frozenset) else str(value) for name, value in vars(module).items()
     if name.isupper() and name not in ("SESSION_ID", "_CACHED_NO_EXIST")} for module in read  # of each process
]
said += [dict(os.environ), os.getcwd(), sys.path, sys.argv, __name__, refusals.WANTS_TRACEBACK, hf_api.api.endpoint]
print(json.dumps([*said, torch.get_num_threads(), logging.get_verbosity()]))
"""
ENDS = """
import atexit, os, signal, sys, time
atexit.register(print, "at exit")
print("in", flush=True)
how = sys.argv[1]
if how == "code":
    sys.exit(7)
if how == "text":
    sys.exit("said")
if how == "error":
    raise RuntimeError("said")
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@pytest.fixture
def python(warm_python, clean_env, tmp_path):
    """python(*arguments, code, cold=False, env=None): a started `python -m warm_module <arguments>` of this code."""

    def start(*arguments, code, cold=False, env=None):
        (tmp_path / "warm_module.py").write_text(code)
        return subprocess.Popen(
            [sys.executable if cold else warm_python, "-m", "warm_module", *arguments], cwd=tmp_path,
            env=clean_env | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    return start


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["warm_python", "light_python"])
def test_it_is_warm(kind, request, clean_env, tmp_path):
    """A cold one does the same, later: no other test would notice."""
    if (own := request.getfixturevalue(kind)) == sys.executable:
        pytest.skip("no fork survives here")
    (tmp_path / "warm_module.py").write_text("import sys; print('quick' in sys.modules)")
    done = subprocess.run([own, "-m", "warm_module"], cwd=tmp_path, env=clean_env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_it_has_read_the_same_environment(python, tmp_path):
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "x",
        "HF_TOKEN_PATH": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HYDRA_FULL_ERROR": "1", "PYTHONPATH": str(tmp_path / "code"),
    }  # fmt: skip
    fork, fresh = (python("a", "-b", code=SAYS, cold=cold, env=env).communicate() for cold in (False, True))
    assert json.loads(fork[0]) == json.loads(fresh[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "stdout", "stderr"),
    [
        ("code", 7, "in\nat exit\n", ""),
        ("text", 1, "in\nat exit\n", "said\n"),
        ("error", 1, "in\nat exit\n", "RuntimeError: said\n"),
        ("killed", -signal.SIGKILL, "in\n", ""),
    ],
)
def test_it_ends_alike(python, how, code, stdout, stderr):
    process = python(how, code=ENDS)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, stdout) and err.endswith(stderr)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it(python, number):
    process = python("signal", code=ENDS)
    assert process.stdout.readline() == "in\n"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=LIMIT)  # which ends when nobody has the pipes any more
    assert process.returncode == -number
    assert ("at exit" in out) == ("KeyboardInterrupt" in err) == (number == signal.SIGINT)


@pytest.mark.parametrize(
    ("argv", "env", "cold"),
    [
        ("-m rlhf_recipes.recipes.dpo -m a=1,2", {}, False),
        ("-P -m rlhf_recipes.recipes.dpo", {"HF_HOME": "other", "ANY": "thing"}, False),
        ("-m rlhf_recipes.recipes.dpo", {"OMP_NUM_THREADS": "7"}, True),
        ("-X dev -m rlhf_recipes.recipes.dpo", {}, True),
        ("-m pip download", {}, True),
        ("-c pass", {}, True),
    ],
)
def test_what_is_cold(argv, env, cold, monkeypatch):
    known = {"OMP_NUM_THREADS": "1", "HOME": "/"}
    monkeypatch.setattr(os, "environ", known | {"TOKENIZERS_PARALLELISM": "false"})
    assert warm._is_cold({"argv": argv.split(), "env": known | env}, known) == cold
