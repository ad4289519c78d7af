"""Record the runs of tests/kept/commands.json in tests/kept/runs, in place of those that are there.

    RECORD="cai simpo" python -m pytest tests/kept/record.py

They are worth what they are old: record again only what has to be added; it reads the others as they are.
"""

import json
import os
import shutil
import signal
import time

from conftest import build_terse
from test_kept_runs import COMMANDS, KEPT, reading

LARGEST_PAGE = 50_000
# Nothing reads them, nor what the jobs of a sweep share, a cache.
NOT_KEPT = ("*.png", "*.lock", "multirun.yaml", "preflight.json", "checkpoints/**/README.md")


def test_record(tiny_model, run_recipe, start_recipe, tmp_path):
    model = build_terse(tiny_model, tmp_path / "model")
    named = os.environ.get("RECORD", " ".join(COMMANDS)).split()
    for run in (KEPT / "runs").iterdir():
        if run.name not in named and len(named) < len(COMMANDS):
            shutil.copytree(run, tmp_path / run.name)
    for path in tmp_path.glob("*/**/tokenizer_config.json"):
        shutil.copy(KEPT / "tokenizer.json", path.parent)
    for folder in named:
        recipe, *overrides = COMMANDS[folder]
        if folder == "interrupted":
            kill(start_recipe(recipe, *overrides, cwd=tmp_path), tmp_path / folder)
        else:
            done = run_recipe(recipe, *overrides, cwd=tmp_path)
            assert done.returncode == 0, done
        for path in [path for name in NOT_KEPT for path in tmp_path.rglob(name)]:
            path.unlink()
        for path in tmp_path.rglob("*.html"):
            if path.stat().st_size > LARGEST_PAGE:
                path.unlink()
    shutil.rmtree(KEPT / "runs", ignore_errors=True)
    shutil.copytree(tmp_path, KEPT / "runs", ignore=shutil.ignore_patterns("model", "shared", "tokenizer.json"))
    shutil.copy(tmp_path / "sft" / "adapter" / "tokenizer.json", KEPT)  # every adapter has it
    (KEPT / "recorded.json").write_text(json.dumps(reading(model), indent=1) + "\n")


def kill(process, run):
    """SIGKILL when the first checkpoint is whole."""
    while not (run / "checkpoints" / "checkpoint-3" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
