"""A run loses nobody's files: not those beside it, not those of another process, not its own before it is replaced."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIMIT, snapshot, wait_for, write_adapter, write_checkpoint, write_pairs
from conftest import weights as other_weights

from rlhf_recipes import locks, places, ranks, references, run_folder
from rlhf_recipes.config import flatten
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.launch import publish_after
from rlhf_recipes.run import Run, inputs_of


@pytest.fixture
def refused(run_recipe):
    """refused(recipe, *overrides, cwd): the one line of a recipe that must leave every file as it is."""

    def refuse(recipe, *overrides, cwd):
        before = snapshot(cwd)
        done = run_recipe(recipe, *overrides, cwd=cwd)
        lines = done.stderr.splitlines()
        assert done.returncode == 2 and len(lines) == 1, done
        after = snapshot(cwd)
        assert {after[name] for name in after.keys() - before.keys()} <= {"folder"}
        return lines[0].removeprefix("error: ")

    return refuse


def finished(folder, recipe="dpo", **result):
    """A folder that passes for a finished run."""
    write_adapter(folder, recipe=recipe, status="finished", **result)
    run_folder.mark(folder, recipe, "run_name: main\n")
    return folder


# ---- folders of others


def test_another_trainers_project(refused, tmp_path):
    project = tmp_path / "project"
    for name, text in (("src/thesis.tex", "mine"), (".git/HEAD", "ref"), ("config.yaml", "run_name: my-run\n")):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    for overrides in ([], ["overwrite=true"]):
        line = refused("dpo", "hydra.run.dir=project", *overrides, cwd=tmp_path)
        assert line == ("hydra.run.dir=project: holds .git and is no run folder. Choose an empty or a new one.")


def test_nothing_but_another_frameworks_checkpoints(refused, tmp_path):
    (tmp_path / "project" / "checkpoints" / "epoch3").mkdir(parents=True)
    (tmp_path / "project" / "checkpoints" / "epoch3" / "model.pt").write_text("mine")
    line = refused("dpo", "hydra.run.dir=project", cwd=tmp_path)
    assert line.startswith("hydra.run.dir=project: holds checkpoints and is no run folder.")


@pytest.mark.parametrize("name", ["checkpoints/epoch3/model.pt", "adapter_v2/weights", "notes.md", "a/result.json"])
def test_what_no_run_writes_is_not_replaced(refused, tmp_path, name):
    """`a/` is a run below the other: run_name=exp and run_name=exp/a."""
    folder = finished(tmp_path / "outputs" / "dpo" / "exp")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    line = refused("dpo", "run_name=exp", "overwrite=true", cwd=tmp_path)
    shown = "checkpoints/epoch3" if name.startswith("checkpoints") else name.partition("/")[0]
    assert line == (
        f"outputs/dpo/exp: holds {shown}, which no run writes, and would be replaced. Move it, or choose another "
        "run_name."
    )


def test_a_run_below_an_interrupted_one(refused, tmp_path):
    run_folder.mark(tmp_path / "outputs" / "dpo" / "exp", "dpo")
    finished(tmp_path / "outputs" / "dpo" / "exp" / "a")
    assert refused("dpo", "run_name=exp", cwd=tmp_path).startswith("outputs/dpo/exp: holds a, which no run writes")


@pytest.mark.parametrize(
    ("recipe", "key", "value", "override"),
    [
        ("dpo", "model.adapter", "outputs/dpo/main", "model.id=tests/tiny"),
        ("dpo", "data.path", "outputs/dpo/main/metrics.jsonl", "data=local"),
        ("dpo", "data.path", "outputs/../outputs/dpo/main/metrics.jsonl", "data=local"),
        ("audit", "judgements", "outputs/audit/main/disputed.jsonl", "reward_model=[x]"),
        ("audit", "gold", "outputs/audit/main/to_label.jsonl", "reward_model=[x]"),
    ],
)
def test_what_the_command_reads_is_not_replaced(refused, tmp_path, recipe, key, value, override):
    folder = finished(tmp_path / "outputs" / recipe / "main", recipe=recipe, adapter_sha256="0", parent=None)
    for name in ("metrics.jsonl", "disputed.jsonl", "to_label.jsonl"):
        (folder / name).write_text("{}\n")
    given = f"{key}=[{value}]" if key == "judgements" else f"{key}={value}"
    line = refused(recipe, given, override, "overwrite=true", cwd=tmp_path)
    assert line == f"{key}={value}: lies in outputs/{recipe}/main, which would be replaced. Choose another run_name."


def test_a_word_that_is_the_folders_name_is_no_input(started):
    finished(Path("sigmoid"))
    cfg = started("trainer.loss_type=sigmoid", "run_name=x").config
    run_folder.refuse_to_replace(Path("sigmoid"), flatten(cfg))
    with pytest.raises(ValueError, match=r"model\.adapter=sigmoid: lies in sigmoid"):
        run_folder.refuse_to_replace(Path("sigmoid"), flatten({**cfg, "model": {"adapter": "sigmoid"}}))


def test_links_are_neither_followed_nor_passed_over(refused, tmp_path):
    there = finished(tmp_path / "elsewhere")
    (tmp_path / "outputs" / "dpo").mkdir(parents=True)
    (tmp_path / "outputs" / "dpo" / "main").symlink_to(there)
    line = refused("dpo", "overwrite=true", cwd=tmp_path)
    assert line.startswith("hydra.run.dir=outputs/dpo/main: is a symbolic link. Name the folder that it points to")
    (there / "checkpoints").symlink_to(tmp_path / "outputs")
    line = refused("dpo", "hydra.run.dir=elsewhere", "overwrite=true", cwd=tmp_path)
    assert line.startswith("elsewhere: holds checkpoints, which no run writes")


def test_the_current_folder_is_no_run_folder(refused, tmp_path):
    assert refused("dpo", "hydra.run.dir=.", cwd=tmp_path) == (
        "hydra.run.dir=.: is the current folder. Name one below it."
    )


def test_a_pipeline_keeps_to_its_folder(refused, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "summary.json").write_text("mine")
    stages = "stages=[{name:sft,recipe:sft}]"
    line = refused("pipeline", stages, "hydra.run.dir=project", cwd=tmp_path)
    assert line.startswith("hydra.run.dir=project: holds summary.json and is no run folder.")
    for name in (str(tmp_path / "project"), "../project", "a/b", ".", "config.yaml"):
        line = refused("pipeline", f"stages=[{{name:{name},recipe:sft}}]", "overwrite=true", cwd=tmp_path)
        assert line.startswith(f"stages.name={name}: is the stage's folder.")


def test_a_pipeline_that_is_made_again_replaces_no_foreign_file(refused, tmp_path):
    stage = finished(tmp_path / "outputs" / "pipeline" / "main" / "a", recipe="sft")
    (stage / "notes.md").write_text("mine")
    line = refused("pipeline", "stages=[{name:a,recipe:sft}]", "overwrite=true", cwd=tmp_path)
    assert line.startswith("outputs/pipeline/main/a: holds notes.md, which no run writes")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("report.html", "mine", "holds report.html and is no run folder."),
        ("config.yaml", "rlhf_recipes: dpo\n", "is the folder of a run of dpo."),
    ],
)
def test_a_sweep_keeps_to_its_folder(refused, tmp_path, name, text, says):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_text(text)
    line = refused("dpo", "sweep=dpo_beta", "hydra.sweep.dir=project", cwd=tmp_path)
    assert line.startswith(f"hydra.sweep.dir=project: {says}")


# ---- two processes


def _hold(folder, held, told):
    lock = locks.Lock(Path(folder))
    held.put(os.getpid())
    told.get()
    del lock


@pytest.fixture
def holder(tmp_path):
    """A process that writes a run's folder."""
    context = multiprocessing.get_context("spawn")
    held, told = context.Queue(), context.Queue()
    process = context.Process(target=_hold, args=(str(tmp_path / "main"), held, told))
    process.start()
    assert held.get(timeout=LIMIT) == process.pid
    yield process, told
    process.kill()
    process.join()


@pytest.mark.slow
def test_the_second_start_says_who_holds_the_folder(holder, tmp_path):
    process, _ = holder
    with pytest.raises(ValueError, match="main: is being written by") as refusal:
        locks.Lock(tmp_path / "main")
    assert f"is being written by process {process.pid} on {socket.gethostname()}." in str(refusal.value)


def test_who_was_killed_holds_nothing(holder, tmp_path):
    process, _ = holder
    process.kill()
    process.join()
    stale = tmp_path / ".main.lock"
    assert stale.read_text() == f"process {process.pid} on {socket.gethostname()}\n"
    lock = locks.Lock(tmp_path / "main")
    assert stale.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    del lock
    assert not stale.exists()


def test_who_has_ended_leaves_no_lock(holder, tmp_path):
    process, told = holder
    told.put("end")
    process.join(60)
    assert list(tmp_path.iterdir()) == []
    locks.Lock(tmp_path / "main")


HOLDS = """
import pathlib, weakref
weakref.finalize(weakref.WeakSet, print)
from rlhf_recipes import locks
held = locks.Lock(pathlib.Path("main"))
"""


def test_what_is_held_at_the_end_is_let_go(tmp_path):
    """By a process in which somebody wanted to be told of the end before, as torch does."""
    subprocess.run([sys.executable, "-c", HOLDS], cwd=tmp_path, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    import filelock

    def acquire(self):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    locks.Lock(tmp_path / "main").release()
    assert "main: this file system has no locks (No locks available)." in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_command_twice(start_recipe, run_recipe, tiny_overrides, tmp_path):
    """The first one goes on to its end, undisturbed; the second, while it lasts, changes nothing."""
    command = [*tiny_overrides, "quantization=none", "trainer.max_steps=3", "trainer.logging_steps=1"]
    first = start_recipe("dpo", *command, cwd=tmp_path, holds="main/.metrics.jsonl")
    folder = tmp_path / "outputs" / "dpo" / "main"
    lock = tmp_path / "outputs" / "dpo" / ".main.lock"
    wait_for(tmp_path / "held", first)
    holder = int(re.match(r"process (\d+) on", lock.read_text())[1])
    for more in ([], ["overwrite=true"]):
        second = run_recipe("dpo", *command, *more, cwd=tmp_path)
        assert second.returncode == 2 and f"is being written by process {holder} on" in second.stderr, second
        assert len(second.stderr.splitlines()) == 1
    assert first.poll() is None and not (folder / "result.json").exists()
    (tmp_path / "held").unlink()
    assert first.wait(LIMIT) == 0
    steps = [json.loads(line).get("step") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3] and (folder / "result.json").exists() and not lock.exists()


# ---- one's own run


@pytest.fixture
def started(compose, tmp_path):
    """started(*overrides): `Run.start` of dpo in a folder of its own; its lock goes with the run."""

    def start(*overrides):
        return Run.start(compose("dpo", *overrides), "dpo")

    with contextlib.chdir(tmp_path):
        yield start


def test_an_unreadable_checkpoint_is_skipped_with_a_line(started, monkeypatch, capsys):
    run = started()
    run.create()
    for step in (100, 200, 300):
        write_checkpoint(run.dir, step)
    before = snapshot(run.dir)
    read, folder = Path.read_text, run.dir
    del run

    def fails(self, *args, **kwargs):
        if self.name == "trainer_state.json" and self.parent.name != "checkpoint-100":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", fails)
    again = started()
    assert again.checkpoint == str(folder / "checkpoints" / "checkpoint-100")
    assert capsys.readouterr().err.splitlines() == [
        f"outputs/dpo/main/checkpoints/checkpoint-{step}: is skipped, Input/output error." for step in (300, 200)
    ]
    again.create()
    assert snapshot(folder) == before


@pytest.mark.parametrize("state", [None, '{"global_step": 3', "{}", "[]", '{"global_step": "x", "max_steps": 1}'])
def test_a_checkpoint_without_its_end_is_skipped(started, state, capsys):
    run = started()
    run.create()
    write_checkpoint(run.dir, 3)
    half = write_checkpoint(run.dir, 6, state)
    run = started() if (run := None) is None else None
    assert run.checkpoint == "outputs/dpo/main/checkpoints/checkpoint-3" and half.is_dir()
    assert "checkpoint-6: is skipped" in capsys.readouterr().err


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda half: cut_off(half / "adapter_model.safetensors"), "its adapter_model.safetensors is cut off"),
        (lambda half: (half / "adapter_model.safetensors").write_bytes(b""), "its adapter_model.safetensors is cut"),
        (lambda half: cut_off(half / "optimizer.pt"), "its optimizer.pt is cut off or damaged."),
        (lambda half: cut_off(half / "rng_state.pth"), "its rng_state.pth is cut off or damaged."),
        (lambda half: (half / "adapter_config.json").write_text("{"), "its adapter_config.json is cut off or damaged"),
        (lambda half: (half / "optimizer.pt").unlink(), "it has no state of the optimizer."),
        (lambda half: (half / "rng_state.pth").unlink(), "it has no state of the generators."),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_skipped(started, harm, says, capsys):
    """Whatever its trainer_state.json says: transformers goes on with what is there."""
    run = started()
    run.create()
    write_checkpoint(run.dir, 3)
    harm(write_checkpoint(run.dir, 6))
    del run
    assert started().checkpoint == "outputs/dpo/main/checkpoints/checkpoint-3"
    assert f"checkpoint-6: is skipped, {says}" in capsys.readouterr().err


def test_what_was_half_written_goes_when_the_run_goes_on(started):
    run = started()
    run.create()
    write_checkpoint(run.dir, 3)
    scratch = run.dir / ".metrics.jsonl.4711.tmp"
    scratch.write_text('{"loss"')
    del run
    run = started()
    assert run.checkpoint and scratch.exists()
    run.create()
    assert not scratch.exists()


# ---- what a run reads


@pytest.mark.slow
def test_rows_that_changed_are_refused_by_name(started):
    """Between the start and the start that would continue it; a file that is the same again is none."""
    rows = write_pairs(Path("mine.jsonl"))
    given = ("data=local", "data.path=mine.jsonl", "model.id=tests/tiny", "model.adapter=parent")
    weights = write_adapter(Path("parent")) / "adapter" / "adapter_model.safetensors"
    run = started(*given)
    run.create()
    write_checkpoint(run.dir, 3)
    assert "inputs_sha256" not in run_folder.read_config(run.dir)
    del run
    before = rows.read_text()
    for changed, named, other in (
        (rows, "data.path=mine.jsonl", rows.read_bytes() + b" "),
        (weights, "model.adapter=parent", other_weights("others")),
    ):
        kept = changed.read_bytes()
        changed.write_bytes(other)
        with pytest.raises(ValueError, match=f"^{named}: has changed since outputs/dpo/main began, which was inter"):
            started(*given)
        run = started(*given, "overwrite=true")
        assert run.checkpoint is None
        del run
        changed.write_bytes(kept)
    rows.unlink()
    write_pairs(rows)
    assert rows.read_text() == before and started(*given).checkpoint


def test_what_is_published_without_a_training(started, compose):
    """With `publish=true`: the run that an earlier try has finished, by this config, of these rows."""
    rows = write_pairs(Path("mine.jsonl"))
    given = ("data=local", "data.path=mine.jsonl", "publish=true", "repo_id=ada/x")
    run = started(*given[:2])
    run.create()
    assert not publish_after.finished(compose("dpo", *given))
    run.write_result({"recipe": "dpo", "config_sha256": config_sha256(run.config)})
    assert publish_after.finished(compose("dpo", *given))
    for other in ("trainer.beta=0.3", "overwrite=true"):
        assert not publish_after.finished(compose("dpo", *given, other))
    rows.write_text(rows.read_text() + "\n")
    assert not publish_after.finished(compose("dpo", *given))


def test_what_a_run_of_cai_reads_is_the_same_to_its_end_and_in_its_parts(compose, tmp_path):
    def start(folder="main", shards="null"):
        cfg = compose(
            "cai", "judge=reward", "judge.reward_model=two", "constitution=local", "constitution.path=mine.yaml",
            "gate.gold=gold.jsonl", "first=first.jsonl", "earlier=[one]", f"shards={shards}",
        )  # fmt: skip
        cfg.output_dir = f"outputs/cai/{folder}"
        return Run.start(cfg, "cai")

    with contextlib.chdir(tmp_path):
        weights = write_adapter(Path("two/a")) / "adapter" / "adapter_model.safetensors"
        Path("two/a/config.yaml").touch()
        Path("one/shards/00000").mkdir(parents=True)
        shard = Path("one/shards/00000/records.jsonl")
        files = {"constitution.path": "mine.yaml", "gate.gold": "gold.jsonl", "first": "first.jsonl"}
        read = {f"{key}={name}": Path(name) for key, name in files.items()}
        read |= {"judge.reward_model=two/a": weights, "earlier=one": shard}
        for path in read.values():
            path.write_bytes(other_weights("old"))
        for folder, shards in (("main.1-of-2", "1/2"), ("main", "null")):
            run = start(folder, shards)
            run.create()
            (run.dir / "gate.jsonl").touch()
        assert run.checkpoint is None and [str(part) for part in run.parts()] == ["outputs/cai/main.1-of-2"]
        del run
        for named, path in read.items():
            path.write_bytes(other_weights("new"))
            with pytest.raises(ValueError, match=rf"^{named}: has changed since outputs/cai/main began"):
                start()
            whole = Run(Path("outputs/cai/main"), "cai", {}, inputs=inputs_of(start("other").config))
            whole.config = run_folder.read_config(whole.dir)
            with pytest.raises(ValueError, match=rf"^{named}: has changed since outputs/cai/main\.1-of-2 read it"):
                whole.parts()
            path.write_bytes(other_weights("old"))
        assert start().checkpoint == "outputs/cai/main/gate.jsonl"
        assert inputs_of({"judge": {"adapter": "two/a"}}).keys() == {"judge.adapter=two/a"}


def test_jobs_of_a_sweep_read_the_same_rows(started, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.run.in_sweep", lambda: True)
    rows = write_pairs(Path("mine.jsonl"))
    given = ("data=local", "data.path=mine.jsonl")
    first = started(*given)
    first.create()
    write_checkpoint(first.dir, 3)
    rows.write_text(rows.read_text() + "\n")
    refusal = "^data.path=mine.jsonl: has changed since the job main of this sweep read it, so that their figures"
    with pytest.raises(ValueError, match=refusal):
        started(*given, "run_name=other")
    write_pairs(rows)
    started(*given, "run_name=other")


def test_a_folder_of_rows_is_what_its_files_hold(tmp_path):
    (tmp_path / "train").mkdir()
    rows = write_pairs(tmp_path / "train" / "0.jsonl")
    (tmp_path / "notes.md").write_text("mine")
    before = places.sha256(str(tmp_path))
    (tmp_path / "notes.md").write_text("others")
    os.utime(rows, (0, 0))
    assert before and places.sha256(str(tmp_path)) == before
    rows.rename(tmp_path / "train" / "1.jsonl")
    assert places.sha256(str(tmp_path)) not in (None, before)
    assert places.sha256(str(tmp_path / "nothing")) is None


def test_a_checkpoint_of_more_processes_is_not_continued_by_one(started):
    """Each process has left the state of its generators."""
    run = started()
    run.create()
    kept = write_checkpoint(run.dir, 3)
    del run
    run = started()
    assert run.checkpoint == str(kept)
    del run
    (kept / "rng_state.pth").rename(kept / "rng_state_0.pth")
    shutil.copy(kept / "rng_state_0.pth", kept / "rng_state_1.pth")
    refusal = r"^WORLD_SIZE=1: outputs/dpo/main holds an interrupted run of 2 processes, .* Start it with 2, choose"
    with pytest.raises(ValueError, match=refusal):
        started()
    assert started("overwrite=true").checkpoint is None


def test_weights_without_a_result_are_set_aside(started, tmp_path, capsys):
    """The adapters that `save_total_limit=null` keeps have no trainer_state.json, and result.json was lost."""
    run = started()
    run.create()
    for step in (100, 200):
        write_checkpoint(run.dir, step, state=None)
    kept = {name: content for name, content in snapshot(run.dir).items() if "adapter" in name}
    del run
    run = started()
    assert run.checkpoint is None
    run.create()
    aside = Path("outputs/dpo/.replaced/main")
    assert kept.items() <= snapshot(aside).items()
    assert (
        f"outputs/dpo/main: what was there is kept in {aside} until this run is finished." in capsys.readouterr().out
    )
    run.write_result({"recipe": "dpo"})
    assert os.listdir("outputs/dpo") == ["main"]


def test_a_run_is_replaced_when_the_other_has_its_result(started, tmp_path):
    """Killed in between, the old run is whole; the same command goes on, and another one may not."""
    old = finished(Path("outputs/dpo/main"))
    (old / "curves.png").write_bytes(b"a picture")
    before = snapshot(old)
    run = started("overwrite=true")
    assert snapshot(old) == before
    run.create()
    aside = Path("outputs/dpo/.replaced/main")
    assert snapshot(aside) == before and os.listdir(old) == ["config.yaml"]
    write_checkpoint(old, 5)
    del run  # killed

    again = started("overwrite=true")
    assert again.checkpoint == "outputs/dpo/main/checkpoints/checkpoint-5"
    again.create()
    assert snapshot(aside) == before
    del again

    other = started("overwrite=true", "trainer.beta=0.3")  # begins anew; the old run stays where it is
    assert other.checkpoint is None
    other.create()
    assert snapshot(aside) == before and os.listdir(old) == ["config.yaml"]
    other.write_result({"recipe": "dpo"})
    assert not aside.parent.exists() and sorted(os.listdir(old)) == ["config.yaml", "result.json"]


def test_a_run_that_was_to_replace_nothing_goes_on_with_the_same_command(started):
    run = started("overwrite=true")
    run.create()
    kept = write_checkpoint(run.dir, 5)
    del run  # killed
    again = started("overwrite=true")
    assert again.checkpoint == str(kept)
    again.create()
    again.write_result({"recipe": "dpo"})
    assert os.listdir("outputs/dpo") == ["main"]


def test_a_labelling_that_has_ended_goes_on_or_is_replaced_by_word_alone(compose, tmp_path):
    def start(*overrides):
        given = ("pairs=prompts.jsonl", "model.id=tests/tiny", "model.adapter=parent")
        return Run.start(compose("label", *given, *overrides), "label")

    with contextlib.chdir(tmp_path):
        weights = write_adapter(Path("parent")) / "adapter" / "adapter_model.safetensors"
        run = start()
        run.create()
        (run.dir / "choices.jsonl").write_text("")
        run.write_result({"recipe": "label"})
        del run
        assert start().checkpoint == "outputs/label/main/choices.jsonl"
        with pytest.raises(ValueError, match=r"^run_name=main: outputs/label/main holds a finished run\."):
            start("resume=never")
        assert start("overwrite=true").checkpoint is None
        note = Path("outputs/label/.replaced/main/notes.md")
        note.parent.mkdir(parents=True)
        note.touch()
        with pytest.raises(ValueError, match=r"^outputs/label/\.replaced/main: holds notes\.md"):
            start("overwrite=true")
        note.unlink()
        weights.write_bytes(other_weights("others"))  # half of the answers would be another policy's
        with pytest.raises(ValueError, match=r"^model\.adapter=parent: has changed since outputs/label/main began"):
            start()


def test_a_run_that_never_began_is_begun_again(started):
    run = started()
    run.create()
    (run.dir / "metrics.jsonl").write_text("{}\n")
    (run.dir / "checkpoints").mkdir()
    del run
    run = started()
    run.create()
    assert os.listdir(run.dir) == ["config.yaml"] and not run_folder.replaced(run.dir).exists()


@pytest.mark.parametrize("name", ["config.yaml", "preflight.json", "summary.json", "rounds.json"])
def test_a_start_that_was_killed_at_its_first_file_is_given_again(started, name):
    scratch = Path(f"outputs/dpo/main/.{name}.4711.tmp")
    scratch.parent.mkdir(parents=True)
    scratch.write_text("rlhf_rec")
    for only in ("sweep", "pipeline", "publish"):
        run_folder.refuse_foreign(scratch.parent, only)
    started().create()
    assert os.listdir(scratch.parent) == ["config.yaml"]
    for only in ("sweep", "pipeline", "publish"):  # in whose folders others write at the time
        folder, written = Path(only), Path(only, "main", scratch.name)
        for path in (folder / scratch.name, folder / ".notes.4711.tmp", written):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        run_folder.mark(folder, only)
        assert sorted(os.listdir(folder)) == [".notes.4711.tmp", "config.yaml", "main"] and written.exists()


def test_what_only_looks_like_a_start_that_was_killed(tmp_path):
    (tmp_path / "mine").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link/.config.yaml.4711.tmp").symlink_to(tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.notes.4711.tmp").touch()
    for name in ("link", "other"):
        with pytest.raises(ValueError, match="and is no run folder"):
            run_folder.refuse_foreign(tmp_path / name)


def test_what_comes_into_the_folder_meanwhile_is_seen(started):
    run = started()
    run.create()
    del run
    run = started()
    Path("outputs/dpo/main/notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md, which no run writes"):
        run.create()


def test_what_no_run_writes_stays_with_what_was_replaced(started, capsys):
    finished(Path("outputs/dpo/main"))
    run = started("overwrite=true")
    run.create()
    note = Path("outputs/dpo/.replaced/main/notes.md")
    note.write_text("mine")
    run.write_result({"recipe": "dpo"})
    assert os.listdir(note.parent) == ["notes.md"]
    assert capsys.readouterr().err == "outputs/dpo/.replaced/main: is kept, it holds notes.md.\n"
    before = snapshot(run.dir)  # which cannot be set aside there, and is finished
    for replace in (lambda: started("overwrite=true"), lambda: run_folder.clear(run.dir)):
        with pytest.raises(ValueError, match=r"^outputs/dpo/\.replaced/main: (it )?holds notes\.md.* Move it\.$"):
            replace()
        assert snapshot(run.dir) == before


def test_finished_checkpoints_go_by_name(tmp_path):
    write_checkpoint(tmp_path, 3)
    logs = tmp_path / "checkpoints" / "runs" / "Nov28" / "events.out.tfevents.1"
    logs.parent.mkdir(parents=True)
    logs.write_text("scalars")
    run_folder.drop_checkpoints(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["runs"] and logs.read_text() == "scalars"


@pytest.mark.slow
def test_a_run_can_be_replaced(train, tmp_path):
    """Nothing that it writes, and nothing that it keeps of its checkpoints, is foreign to it."""
    train("sft", tmp_path / "sft", "quantization=none", "trainer.save_total_limit=null")
    with contextlib.chdir(tmp_path):
        run_folder.refuse_to_replace(Path("sft"), [])
    trained = train("sft", tmp_path / "sft", "quantization=none", "overwrite=true")
    assert os.listdir(tmp_path) == ["sft"]
    assert trained.result["status"] == "finished"


# ---- what comes from elsewhere


@pytest.mark.parametrize(
    "result",
    [
        '{"recipe": "sft", "parent": {"recipe": "x"}}',
        '{"recipe": "sft", "parent": "none"}',
        '{"recipe": ["sft"], "parent": null}',
        '{"recipe": "sft", "parent": {"recipe": "x", "adapter_sha256": 5, "parent": null}}',
    ],
)
def test_a_parent_that_says_nothing_of_its_own(refused, tmp_path, result):
    write_adapter(tmp_path / "foreign")
    (tmp_path / "foreign" / "result.json").write_text(result)
    line = refused("dpo", "model.adapter=foreign", "model.id=tests/tiny", cwd=tmp_path)
    assert line.startswith("model.adapter=foreign: foreign/result.json does not say which runs it comes from")


@pytest.mark.parametrize(("text", "says"), [("{", "not valid JSON"), ("[]", "is no JSON object")])
@pytest.mark.parametrize("name", ["result.json", "adapter/adapter_config.json"])
def test_a_parents_file_that_cannot_be_read(refused, tmp_path, name, text, says):
    write_adapter(tmp_path / "foreign")
    (tmp_path / "foreign" / name).write_text(text)
    line = refused("dpo", "model.adapter=foreign", "model.id=tests/tiny", cwd=tmp_path)
    assert line.startswith(f"foreign/{name}: {says}")


def test_a_pickled_adapter_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "foreign")
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors; adapter_model\.bin is a pickle"):
        references.find(str(folder), "model.adapter")
    (folder / "adapter" / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors; the weights are missing\."):
        references.find(str(folder), "model.adapter")


def test_the_second_of_several_processes_creates_nothing(started, monkeypatch):
    old = finished(Path("outputs/dpo/main"))
    before = snapshot(old)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "join", lambda *_: None)
    monkeypatch.setattr(ranks, "from_first", lambda _: (None, None))
    run = started("overwrite=true")
    run.create()
    assert run.lock is None and snapshot(old) == before


def test_ctrl_c_leaves_no_lock(start_recipe, tiny_overrides, tmp_path):
    process = start_recipe("dpo", *tiny_overrides, "trainer.max_steps=5000", "quantization=none", cwd=tmp_path)
    lock = tmp_path / "outputs" / "dpo" / ".main.lock"
    wait_for(lock.parent / "main" / "config.yaml", process)  # the lock is there before
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and not lock.exists()


def test_a_row_file_of_pairs_is_an_input(tmp_path):
    """A path inside is found in whatever key it stands; texts that are none do no harm."""
    folder = finished(tmp_path / "main")
    inside = write_pairs(folder / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"^a\.b=.*lies in"):
        run_folder.refuse_to_replace(folder, [("x", "/a" * 5000), ("y", "/nul\0"), ("path", ""), ("a.b", str(inside))])


def test_what_was_published_is_not_recorded_in_the_run_itself(refused, tmp_path):
    folder = finished(tmp_path / "outputs" / "dpo" / "main")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "result.json").write_text("mine")
    given = ["run=outputs/dpo/main", "folder=published"]
    line = refused("publish", *given, "hydra.run.dir=outputs/dpo/main", cwd=tmp_path)
    assert (
        line
        == f"hydra.run.dir={folder.relative_to(tmp_path)}: is the folder of a run of dpo. Choose another run_name."
    )
    line = refused("publish", *given, "hydra.run.dir=project", cwd=tmp_path)
    assert line.startswith("hydra.run.dir=project: holds result.json and is no run folder.")


def test_a_publication_that_was_interrupted_goes_on_in_its_folder(tmp_path):
    """The demo publishes into `files/` of the record's own folder."""
    (tmp_path / "publish" / "files").mkdir(parents=True)
    (tmp_path / "publish" / "files" / "published.json").write_text("{}")
    run_folder.refuse_foreign(tmp_path / "publish", only="publish")
    with pytest.raises(ValueError, match="holds files and is no run folder"):
        run_folder.refuse_foreign(tmp_path / "publish")


def test_an_adapter_that_names_a_module_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "foreign")
    (folder / "adapter" / "adapter_config.json").write_text('{"megatron_config": {}, "megatron_core": "antigravity"}')
    with pytest.raises(ValueError, match="its megatron_config names a module that PEFT would import"):
        references.find(str(folder), "model.adapter")


def test_a_kernel_of_the_hub_is_code(refused, tmp_path, tiny_overrides):
    line = refused("dpo", *tiny_overrides, "model.attn_implementation=org/kernel", "quantization=none", cwd=tmp_path)
    assert line.startswith(
        "model.attn_implementation=org/kernel: is a kernel on the Hub, code that would be run here."
    )
