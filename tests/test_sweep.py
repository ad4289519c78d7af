"""A sweep of two jobs on the tiny model: its table, what is kept, what fails, what a kill costs; who is the best."""

import copy
import csv
import json
import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import quick
import warm
from conftest import wait_for
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_evaluation_summary import fake

from rlhf_recipes import stats
from rlhf_recipes.evaluation import frontier, measure, sweeps
from rlhf_recipes.launch import sweep
from rlhf_recipes.run import write_atomically

NODE = OmegaConf.create({"objective": "auto", "max_kl": None, "max_length_ratio": None})
BETAS = "trainer.beta=0.1,0.5"


@pytest.fixture(scope="module")
def command(tiny_overrides):
    """Overrides of a sweep without its grid."""
    return ["-m", *tiny_overrides, "quantization=none", "run_name=betas", "trainer.learning_rate=1e-2",
            "trainer.precompute_ref_log_probs=true", "sweep.prompts=3", "sweep.max_new_tokens=4",
            "preflight.measure=false"]  # fmt: skip


@pytest.fixture(scope="module")
def swept(run_recipe, command, tmp_path_factory):
    """(working folder, sweep folder, what the command printed)."""
    here = tmp_path_factory.mktemp("sweep")
    done = run_recipe("dpo", *command, BETAS, cwd=here, env={warm.DRAWN: "1"})
    assert done.returncode == 0, done
    return here, here / "outputs/dpo/betas", done


def table(folder):
    return list(csv.DictReader((folder / "sweep.csv").open()))


def without_seconds(folder):
    return [
        {key: value for key, value in row.items() if "seconds" not in key and "gib" not in key}
        for row in table(folder)
    ]


def test_a_sweep_is_a_table_a_page_and_a_picture(swept):
    _, folder, done = swept
    rows = table(folder)
    assert [(row["job"], row["trainer.beta"], row["status"]) for row in rows] == [
        ("0", "0.1", "finished"), ("1", "0.5", "finished")
    ]  # fmt: skip
    for row in rows:
        assert int(row["accuracy_log_ratio_n"]) == 4 and int(row["kl_k1_n"]) == 3
        assert float(row["kl_k1_low"]) <= float(row["kl_k1"]) <= float(row["kl_k1_high"])
        assert float(row["seconds"]) > 0 and len(row["adapter_sha256"]) == 64
    assert rows[0]["adapter_sha256"] != rows[1]["adapter_sha256"]
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "dpo 0" in (folder / "report.html").read_text() and "dpo 1" in (folder / "report.html").read_text()
    assert "2 of 2 jobs finished. Best by preference accuracy, log-ratio: dpo" in done.stdout


def test_jobs_share_their_work_and_end_as_alone(swept, command, run_recipe, tmp_path):
    """A job's adapter is that of the same run outside of a sweep, bit for bit."""
    _, folder, done = swept
    shared = list((folder / "shared").iterdir())
    assert len([path for path in shared if path.name.startswith("before-")]) == 1
    assert done.stderr.count("Held out, before") == 1 and done.stderr.count("Held out, after") == 2
    assert done.stderr.count("base: answers") == 1, "the parent is measured once"
    assert [done.stdout.count(f"reference of the train rows: 8 {how}") for how in ("computed", "read")] == [1, 1]
    alone = run_recipe("dpo", *command[1:], "trainer.beta=0.5", cwd=tmp_path)
    assert alone.returncode == 0, alone
    result = json.loads((tmp_path / "outputs/dpo/betas/result.json").read_text())
    assert result["adapter_sha256"] == table(folder)[1]["adapter_sha256"]


def test_what_is_finished_is_kept_and_a_failure_is_a_row(swept, command, run_recipe, tmp_path):
    _, folder, _ = swept
    copied = tmp_path / "outputs/dpo/betas"
    shutil.copytree(folder, copied)
    before = {path: path.stat().st_mtime_ns for path in copied.glob("*/result.json")}
    again = run_recipe("dpo", *command, f"{BETAS},abc", "preflight.fails=warn", cwd=tmp_path)
    assert again.returncode == 1 and again.stdout.count("finished before, kept") == 2
    assert {path: path.stat().st_mtime_ns for path in copied.glob("*/result.json")} == before
    assert without_seconds(copied)[:2] == without_seconds(folder)
    failed = table(copied)[2]
    assert failed["status"] == "failed" and "trainer.beta=abc" in failed["reason"]
    assert "error: 2: trainer.beta=abc" in again.stderr and "Traceback" not in again.stderr
    assert "2 of 3 jobs finished" in again.stdout


def test_another_grid_does_not_overwrite(swept, command, run_recipe, tmp_path):
    """It is refused before a job starts."""
    _, folder, _ = swept
    copied = tmp_path / "outputs/dpo/betas"
    shutil.copytree(folder, copied)
    other = run_recipe("dpo", *command, "trainer.beta=0.2,0.5", cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.startswith("error: run_name=betas: outputs/dpo/betas/0 holds a fini")
    for kept in ("0/result.json", "rows/0.json", "sweep.csv"):
        assert (copied / kept).read_text() == (folder / kept).read_text()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finished_run_that_is_not_replaced_keeps_its_row(compose, tiny_overrides, tmp_path, one_of_two, overwrite):
    """As where a search meets it, whose jobs nobody knows before."""
    after = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    row = {"job": "0", "overrides": [], "status": "finished", "recipe": "dpo", "seconds": 1.0, "system": None,
           "main": {"name": "preference_accuracy", "after": after}, "seconds_in_all": 2.0}  # fmt: skip
    for name, kept in {"rows/0.json": row, "0/result.json": {"config_sha256": "another"}}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(kept))

    def main(cfg):
        raise MINE

    one_of_two(0)
    cfg = compose("dpo", *tiny_overrides, f"overwrite={str(overwrite).lower()}")
    assert sweep.run_job(main, cfg) == -math.inf
    found = json.loads((tmp_path / "rows/0.json").read_text())
    assert found["status"] == "failed" if overwrite else found == row | {"later_failure": "ValueError: mine"}


def test_a_job_of_several_tasks_is_one_run(swept, command, run_recipe, tmp_path):
    """submitit starts the tasks, each with half of every batch; the sweep has one row of them."""
    _, folder, _ = swept
    tasks = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    halves = "trainer.per_device_train_batch_size=1"
    done = run_recipe("dpo", *command, "trainer.beta=0.1", halves, *tasks, cwd=tmp_path)
    assert done.returncode == 0, done
    together = tmp_path / "outputs/dpo/betas"
    assert [row["status"] for row in table(together)] == ["finished"]
    results = [json.loads((each / "0/result.json").read_text()) for each in (together, folder)]
    assert results[0]["world_size"] == 2 and results[0]["global_batch"] == results[1]["global_batch"]
    losses = [
        [json.loads(row)["loss"] for row in (each / "0/metrics.jsonl").read_text().splitlines() if '"loss"' in row]
        for each in (together, folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


MINE, GONE = ValueError("mine"), RuntimeError("[gloo/transport/tcp/pair.cc:547] closed")


@pytest.fixture
def one_of_two(monkeypatch, tmp_path):
    """one_of_two(rank): this process has a job of two processes, in a sweep in `tmp_path`."""

    def become(rank):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("RLHF_RECIPES_STAGE", "")
        node = {"sweep": {"dir": str(tmp_path), "subdir": "0"}, "overrides": {"task": []}, "job": {"num": 0}}
        monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(node))
        monkeypatch.setattr(sweep.keys, "check", lambda cfg: None)

    return become


@pytest.mark.parametrize(
    ("rank", "error", "other", "reason"),
    [
        (0, MINE, None, "ValueError: mine"),
        (1, MINE, None, "ValueError: mine"),
        (0, GONE, None, "rank 0: another of the 2 processes has ended"),
        (0, GONE, "out of memory", "out of memory"),
        (1, GONE, None, "an earlier try"),
    ],
)
def test_the_process_that_fails_writes_the_row(
    compose, tiny_overrides, tmp_path, monkeypatch, one_of_two, rank, error, other, reason
):
    """Before it ends, which may end the others; what another has written in this try is the reason."""
    path = tmp_path / "rows" / "0.json"
    earlier = {"job": "0", "overrides": [], "status": "failed", "seconds_in_all": 1.0, "reason": "an earlier try"}
    path.parent.mkdir()
    path.write_text(json.dumps(earlier))

    def main(cfg):
        if other:
            path.write_text(json.dumps({**earlier, "reason": other}))
        raise error

    one_of_two(rank)
    sweep.run_job(main, compose("dpo", *tiny_overrides))
    assert json.loads(path.read_text())["reason"].startswith(reason)


def test_the_second_process_reads_the_row_that_the_first_has_written(
    compose, tiny_overrides, tmp_path, monkeypatch, one_of_two
):
    """However long that takes: they wait for each other before the table is made, and after it."""
    after = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    result = {"recipe": "reward", "main": {"name": "preference_accuracy", "after": after}, "seconds": 1.0,
              "peak_memory_gib": {"process": 1.0}, "adapter_sha256": "a"}  # fmt: skip
    row = {**result, "job": "0", "overrides": [], "status": "finished", "peak_memory_gib": 1.0, "system": None}
    waits = []

    def first_has_written():
        waits.append((tmp_path / "sweep.csv").exists())
        write_atomically(tmp_path / "rows" / "0.json", json.dumps(row), by_any=True)

    one_of_two(1)
    (tmp_path / "rows").mkdir()
    monkeypatch.setattr(sweep.run, "finished", lambda folder, cfg: result)
    monkeypatch.setattr(sweep, "_measure", lambda *_: None)
    monkeypatch.setattr(sweep.ranks, "barrier", first_has_written)
    assert sweep.run_job(None, compose("dpo", *tiny_overrides)) == 0.5
    assert len(waits) == 2


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_killed_sweep_goes_on_to_the_same_table(swept, command, start_recipe, run_recipe, tmp_path, launcher):
    _, folder, _ = swept
    alone = ["hydra.launcher.n_jobs=1"] if launcher == "joblib" else []  # with the threads of the other launchers
    command = [*command, BETAS, f"hydra/launcher={launcher}", *alone]
    process = start_recipe("dpo", *command, cwd=tmp_path)
    wait_for(tmp_path / "outputs/dpo/betas/rows/0.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = run_recipe("dpo", *command, cwd=tmp_path)
    assert done.returncode == 0, done
    assert without_seconds(tmp_path / "outputs/dpo/betas") == without_seconds(folder)


def test_optuna_proposes_what_is_kept(command, run_recipe, tmp_path):
    command = [override for override in command if not override.startswith(("-m", "run_name", "sweep.prompts"))]
    command += ["sweep=dpo_optuna", "hydra.sweeper.n_trials=2", "sweep.prompts=0"]
    first = run_recipe("dpo", *command, cwd=tmp_path)
    assert first.returncode == 0, first
    rows = table(tmp_path / "outputs/dpo/dpo_optuna")
    betas = [float(row["trainer.beta"]) for row in rows]
    assert len(set(betas)) == 2 and all(0.01 <= beta <= 1 for beta in betas)
    again = run_recipe("dpo", *command, cwd=tmp_path)
    assert again.stdout.count("finished before, kept") == 2, again


def test_a_loss_is_no_objective(run_recipe, command, tmp_path):
    done = run_recipe("dpo", *command, BETAS, "sweep.objective=eval_loss", cwd=tmp_path)
    assert done.returncode == 2 and "depends on beta itself" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_sweeps_are_joined_as_they_were_measured(swept, run_recipe, tmp_path):
    _, folder, _ = swept
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name)
    done = run_recipe("evaluate", "sweeps=[a,b]", "run_name=joined", cwd=tmp_path)
    assert done.returncode == 0, done
    joined = tmp_path / "outputs/evaluate/joined"
    assert [(row["sweep"], row["job"]) for row in table(joined)] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    assert "a 0" in done.stdout and "b 1" in done.stdout
    result = json.loads((joined / "result.json").read_text())
    assert result["best"] and result["main"]["after"]["n"] == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.settings.update(seed=1), "different settings"),
        (lambda m: m.pairs.pop(), "different pairs"),
        (lambda m: setattr(m, "parent", "other"), "different parent"),
        (lambda m: m.info["base"].update(adapter_sha256="b" * 64), r"base had other weights \(SHA-256 None and bbbb"),
    ],
)
def test_what_was_measured_differently_is_not_compared(change, said):
    other = copy.deepcopy(fake(8, 8))
    change(other)
    with pytest.raises(ValueError, match=said):
        measure.merge([fake(8, 8), other])


@pytest.fixture
def written(tmp_path):
    """written(name, skills): the folder of a sweep whose jobs have answers of these skills. Pictures are sketched."""

    def write(name, skills, **rows):
        folder = tmp_path / name
        (folder / "rows").mkdir(parents=True)
        everything = fake(40, 60, skill={"base": 0.25, **skills})
        for job in skills:
            (folder / job).mkdir()
            write_atomically(folder / job / "measurements.json", json.dumps(asdict(only(everything, job))))
            row = {"job": job, "overrides": [f"trainer.beta={job}"], "status": "finished", "recipe": "dpo",
                   "seconds": 1.0, "seconds_in_all": 2.0, "peak_memory_gib": 1.0, "system": job}  # fmt: skip
            write_atomically(folder / "rows" / f"{job}.json", json.dumps(row | rows.get(job, {})))
        return folder

    with quick.pictures_sketched():
        yield write


def only(measurements, job):
    kept = copy.deepcopy(measurements)
    kept.systems = ["base", job]
    kept.judgements = {}
    kept.info = {name: kept.info[name] for name in ("base", job)}
    kept.neutral = {name: kept.neutral[name] for name in ("base", job)}
    for row in kept.pairs + kept.answers:
        row["systems"] = {name: row["systems"][name] for name in ("base", job)}
    return kept


@pytest.mark.slow
def test_the_best_beats_those_that_it_is_not_equal_to(written):
    folder = written("s", {"0.1": 0.9, "0.3": 0.88, "1.0": 0.1})
    found = sweeps.rebuild([folder], folder, NODE)
    assert found["objective"] == "win_rate"
    assert {found["best"], *found["equal"]} == {"dpo 0.1", "dpo 0.3"}
    assert "not told apart from it: dpo 0." in sweeps.describe(found, folder)
    assert found["optimised"] == [] and "no proof of a gain" not in sweeps.describe(found, folder)
    path = folder / "0.3" / "measurements.json"
    measured = json.loads(path.read_text())
    measured["info"]["0.3"]["optimised"] = ["reward/main"]
    write_atomically(path, json.dumps(measured))
    found = sweeps.rebuild([folder], folder, NODE)
    assert "no proof of a gain: dpo 0.3." in sweeps.describe(found, folder)


@pytest.mark.slow
def test_a_job_over_the_budget_is_never_the_best(written):
    folder = written("s", {"1.0": 0.3, "0.1": 0.95})
    free = sweeps.rebuild([folder], folder, NODE)
    assert free["best"] == "dpo 0.1"
    kl = {row["job"]: row["metrics"]["kl_k1"].value for row in free["rows"]}
    assert kl["0.1"] > kl["1.0"], kl
    limited = sweeps.rebuild([folder], folder, OmegaConf.merge(NODE, {"max_kl": (kl["0.1"] + kl["1.0"]) / 2}))
    assert limited["best"] == "dpo 1.0"
    none = sweeps.rebuild([folder], folder, OmegaConf.merge(NODE, {"max_kl": -1e9}))
    assert none["best"] is None and "None is named the best" in sweeps.describe(none, folder)
    path = folder / "0.1" / "measurements.json"
    measured = json.loads(path.read_text())
    for answer in measured["answers"]:
        answer["systems"]["0.1"]["k1"] = float("nan")
    write_atomically(path, json.dumps(measured))
    unknown = sweeps.rebuild([folder], folder, OmegaConf.merge(NODE, {"max_kl": 1e9}))
    assert unknown["best"] == "dpo 1.0" and unknown["equal"] == []


@pytest.mark.slow
def test_a_broken_job_is_never_the_best(written):
    folder = written("s", {"1.0": 0.3, "0.1": 0.95}, **{"0.1": {"doctor": "broken"}})
    found = sweeps.rebuild([folder], folder, NODE)
    assert found["best"] == "dpo 1.0" and found["equal"] == []
    assert f"next      python recipes/evaluate.py 'runs=[{folder}/1.0]'" in sweeps.describe(found, folder)


@pytest.mark.slow
def test_two_sweeps_with_jobs_of_one_name(written, tmp_path):
    folders = [written("a", {"0.1": 0.9}), written("b", {"0.1": 0.3})]
    found = sweeps.rebuild(folders, tmp_path, NODE)
    assert found["best"] == f"{folders[0]} 0.1" and [row["system"] for row in found["rows"]][1] == f"{folders[1]} 0.1"


def test_jobs_on_other_data_have_a_table_alone(written):
    folder = written("s", {"0.1": 0.9, "0.3": 0.5})
    path = folder / "0.3" / "measurements.json"
    other = json.loads(path.read_text())
    other["settings"]["data"] = "elsewhere"
    write_atomically(path, json.dumps(other))
    found = sweeps.rebuild([folder], folder, NODE)
    assert found["best"] is None and [row["value"] is not None for row in found["rows"]] == [True, True]
    assert "different models or data" in sweeps.describe(found, folder) and not (folder / "report.html").exists()


def test_reward_models_are_compared_by_what_they_are_about(tmp_path):
    """They have no answers to measure: intervals that overlap are equal."""
    (tmp_path / "rows").mkdir()
    for job, value in (("1e-5", 0.55), ("1e-4", 0.80), ("1e-3", 0.75)):
        after = {"value": value, "low": value - 0.06, "high": value + 0.06, "n": 200}
        row = {"job": job, "overrides": [f"trainer.learning_rate={job}"], "status": "finished", "recipe": "reward",
               "main": {"name": "preference_accuracy", "after": after}, "seconds": 1.0,
               "peak_memory_gib": 1.0}  # fmt: skip
        write_atomically(tmp_path / "rows" / f"{job}.json", json.dumps(row))
    found = sweeps.rebuild([tmp_path], tmp_path, NODE)
    assert (found["best"], found["equal"]) == ("1e-4", ["1e-3"])
    said = sweeps.describe(found, tmp_path)
    assert "80.0 % [74.0, 86.0]" in said
    assert "frontier" not in said and not (tmp_path / "frontier.png").exists()
    assert [row["preference_accuracy"] for row in table(tmp_path)] == ["0.55", "0.8", "0.75"]


def test_no_rows_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no rows of a sweep"):
        sweeps.read(tmp_path)


def test_pareto():
    points = [(1.0, 5.0), (2.0, 4.0), (0.0, 3.0), (3.0, 6.0), (3.0, 7.0), (4.0, 6.5)]
    assert frontier.pareto(points) == [(0.0, 3.0), (1.0, 5.0), (3.0, 7.0)]


def test_a_job_whose_kl_is_not_finite_has_no_point(tmp_path):
    kls = stats.Estimate(4.0, 3.0, 5.0, 9), stats.Estimate(None, None, None, 0)
    rows = [
        {"job": str(n), "recipe": "dpo", "system": str(n), "value": 1.0, "metrics": {"kl_k1": kl, "reward": kls[0]}}
        for n, kl in enumerate(kls)
    ]
    frontier.plot(rows, "reward", "0", tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_jobs_are_sorted_by_their_numbers(tmp_path):
    names = ["beta=10", "beta=2", "beta=0.1", "beta=1e-3"]
    assert sorted(names, key=sweeps._natural) == ["beta=1e-3", "beta=0.1", "beta=2", "beta=10"]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(sweeps.config.CONF / "sweep").glob("[!b]*.yaml")))
def test_shipped_sweeps_compose_and_name_their_jobs(name, compose):
    text = OmegaConf.load(sweeps.config.CONF / "sweep" / f"{name}.yaml")
    recipe = name.partition("_")[0]
    assert compose(recipe, f"sweep={name}", *(["reward_funcs=x"] if recipe == "ppo" else [])).run_name == name
    for key in text.hydra.sweeper.params:
        assert f"${{{key}}}" in OmegaConf.to_container(text)["hydra"]["sweep"]["subdir"]
