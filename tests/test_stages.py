"""A pipeline of two stages on the tiny model: kept, continued, refused, failed."""

import json
import os
import re
import shutil
import signal

import pytest
from conftest import LIMIT, wait_for, write_pairs

RUN = "outputs/pipeline/{}"


def command(tiny_overrides, *stages, run_name="main"):
    """The overrides of a pipeline; a stage is (name, recipe, *overrides)."""
    entries = [f"{{name:{n},recipe:{r},overrides:[{','.join(map(repr, o))}]}}" for n, r, *o in stages]
    shared = ",".join(repr(override) for override in [*tiny_overrides, "quantization=none"])
    return [f"shared=[{shared}]", f"stages=[{','.join(entries)}]", f"run_name={run_name}", "preflight.measure=false"]


SFT = ("sft", "sft")
DPO = ("dpo", "dpo", "model.adapter={dir}/sft")


def summary(folder):
    written = json.loads((folder / "summary.json").read_text())
    assert written["seconds"] >= 0
    return [(stage["name"], stage["status"], stage["ran"]) for stage in written["stages"]]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "summary.json"}


@pytest.fixture(scope="module")
def finished(run_recipe, tiny_overrides, tmp_path_factory):
    """(working folder, run folder, what the run printed) of a pipeline that ran to its end."""
    here = tmp_path_factory.mktemp("pipeline")
    done = run_recipe("pipeline", *command(tiny_overrides, SFT, DPO), cwd=here)
    assert done.returncode == 0, done
    return here, here / RUN.format("main"), done


@pytest.fixture
def after_sft(finished, tmp_path):
    """after_sft(run_name): a working folder whose pipeline has finished its first stage."""

    def copied(run_name):
        shutil.copytree(finished[1] / "sft", tmp_path / RUN.format(run_name) / "sft")
        return tmp_path, tmp_path / RUN.format(run_name)

    return copied


def test_it_runs_every_stage(finished):
    _, folder, done = finished
    assert summary(folder) == [("sft", "finished", True), ("dpo", "finished", True)]
    for stage in json.loads((folder / "summary.json").read_text())["stages"]:
        assert stage["result"] == f"{RUN.format('main')}/{stage['name']}/result.json" and stage["seconds"] > 0
    sft, dpo = (json.loads((folder / name / "result.json").read_text()) for name in ("sft", "dpo"))
    assert dpo["parent"]["run"] == f"{RUN.format('main')}/sft"
    assert dpo["parent"]["adapter_sha256"] == sft["adapter_sha256"] != dpo["adapter_sha256"]
    assert "[1/2 sft]" in done.stdout
    assert re.search(r"\n\[2/2 dpo\] preference accuracy: 0\.\d.*, [1-9]\d* s after the start\n", done.stdout)
    assert "[2/2 dpo] dpo step 2/2" in done.stderr and "ETA" in done.stderr
    table = done.stdout[done.stdout.index("stage ") :]
    assert "perplexity" in table and "preference accuracy" in table
    assert f"adapter  {RUN.format('main')}/dpo/adapter" in table


def test_again_it_keeps_what_is_finished(finished, run_recipe, tiny_overrides):
    here, folder, _ = finished
    before = times(folder)
    done = run_recipe("pipeline", *command(tiny_overrides, SFT, DPO), cwd=here)
    assert done.returncode == 0, done
    assert times(folder) == before
    assert summary(folder) == [("sft", "finished", False), ("dpo", "finished", False)]
    for number, name in enumerate(("sft", "dpo"), 1):
        assert f"[{number}/2 {name}] finished before, kept: {RUN.format('main')}/{name}" in done.stdout


def test_other_settings_are_refused(finished, run_recipe, tiny_overrides):
    here, folder, _ = finished
    before = times(folder)
    done = run_recipe("pipeline", *command(tiny_overrides, SFT, (*DPO, "trainer.beta=0.2")), cwd=here)
    assert done.returncode == 2 and times(folder) == before
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: stages.dpo: trainer.beta=0.2: {RUN.format('main')}/dpo was made with ")


def test_after_ctrl_c_it_continues(after_sft, start_recipe, run_recipe, tiny_overrides):
    here, folder = after_sft("stopped")
    line = command(tiny_overrides, SFT, (*DPO, "trainer.max_steps=6", "trainer.save_steps=2"), run_name="stopped")
    process = start_recipe("pipeline", *line, cwd=here, holds="checkpoint-4/trainer_state.json")
    wait_for(here / "held", process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "Interrupted" in stderr and "Traceback" not in stderr, stderr
    assert summary(folder) == [("sft", "finished", False), ("dpo", "interrupted", True)]

    done = run_recipe("pipeline", *line, cwd=here)
    assert done.returncode == 0, done
    assert f"Continuing {RUN.format('stopped')}/dpo from step 2." in done.stdout
    assert summary(folder) == [("sft", "finished", False), ("dpo", "finished", True)]
    result = json.loads((folder / "dpo" / "result.json").read_text())
    assert result["steps"] == 6 and result["resumed_from"] == "checkpoint-2"


def test_a_stage_does_not_outlive_the_pipeline(after_sft, start_recipe, tiny_overrides):
    here, folder = after_sft("terminated")
    long = (*DPO, "trainer.max_steps=2000", "trainer.save_steps=2")
    process = start_recipe("pipeline", *command(tiny_overrides, SFT, long, run_name="terminated"), cwd=here)
    wait_for(folder / "dpo" / "checkpoints" / "checkpoint-2", process)
    process.terminate()  # this process alone, not its group
    process.communicate(timeout=LIMIT)  # to the end of the child, which holds the same pipes
    assert process.returncode == 75


def test_a_stage_that_fails_stops_it(after_sft, run_recipe, tiny_overrides):
    """The data of the second stage comes late, that of the third never."""
    here, folder = after_sft("failed")
    local = ("data=local", "data.test_size=4")
    line = command(
        tiny_overrides,
        SFT,
        (*DPO, *local, "data.path=late.jsonl"),
        ("orpo", "orpo", *local, "data.path=never.jsonl"),
        run_name="failed",
    )
    refused = run_recipe("pipeline", *line, cwd=here)
    assert refused.returncode == 2 and "error: preflight: dpo: late.jsonl: no such file" in refused.stderr, refused
    line.append("preflight.fails=warn")
    done = run_recipe("pipeline", *line, cwd=here)
    assert done.returncode == 2, done
    assert "error: late.jsonl: no such file" in done.stderr and "Traceback" not in done.stderr
    assert "[2/3 dpo] failed. The same command starts again here." in done.stderr
    assert summary(folder) == [("sft", "finished", False), ("dpo", "failed", True), ("orpo", "pending", False)]

    write_pairs(here / "late.jsonl")
    done = run_recipe("pipeline", *line, cwd=here)
    assert done.returncode == 2, done
    assert summary(folder) == [("sft", "finished", False), ("dpo", "finished", True), ("orpo", "failed", True)]


def test_it_may_end_with_a_dry_run_of_publishing(after_sft, run_recipe, tiny_overrides):
    """What the stages share goes to those that have its group; publishing has neither model nor data."""
    here, folder = after_sft("published")
    publish = ("publish", "publish", "run={dir}/sft", "folder={dir}/publish/files", "license=mit", "force=true")
    line = command(tiny_overrides, SFT, publish, run_name="published")
    done = run_recipe("pipeline", *line, cwd=here)
    assert done.returncode == 0, done
    assert summary(folder) == [("sft", "finished", False), ("publish", "finished", True)]
    table = done.stdout[done.stdout.index("stage ") :]
    assert "round trip difference" in table and f"adapter  {RUN.format('published')}/sft/adapter" in table
    assert (folder / "publish" / "files" / "adapter_model.safetensors").is_file()
    assert f"next      python -m rlhf_recipes.recipes.publish run={RUN.format('published')}/sft " in done.stdout
    assert " license=mit force=true repo_id=" in done.stdout
    again = run_recipe("pipeline", *line, cwd=here)
    assert again.returncode == 0 and "[2/2 publish] finished before, kept" in again.stdout, again
