"""What tests/benchmarks/conformance.py says of a stack is what its last run has found, and what it asks composes."""

import json
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import conformance
import conformance_cells as cells

from rlhf_recipes.launch import keys
from rlhf_recipes.methods import METHODS

VERSIONS = dict.fromkeys(("python", *conformance.LIBRARIES), "1.0")
# In place of the cells: the second one dies, once without a word, once with one.
WORKER = """
import json, os, sys
from pathlib import Path
for name in sys.argv[3:]:
    Path("at").write_text(name)
    if name.startswith("dies"):
        print("Segmentation fault", flush=True)
        os._exit(3)
    failed = "reload: log-probabilities differ by 1" if name.startswith("says") else ""
    with open("cells.jsonl", "a") as file:
        file.write(json.dumps({"cell": name, "failed": failed, "warned": []}) + "\\n")
    if failed:
        os._exit(1)
"""


def test_the_table_is_that_of_the_last_run():
    page = conformance.README.read_text(encoding="utf-8")
    assert conformance.read() and conformance.with_table(page, conformance.read()) == page


def test_what_was_run_is_in_the_ranges_and_the_tested_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    ranges["python"] = Requirement(f"python{project['requires-python']}").specifier
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for record in conformance.read():
        for name, version in record["versions"].items():
            assert ranges[name].contains(version, prereleases=True), (record["stack"], name, version)
            if record["stack"] == "constraints" and name in pins:
                assert version.partition("+")[0] == pins[name], f"{name}: make conformance"


@pytest.mark.slow
def test_every_recipe_that_trains_has_its_cells(compose):
    assert tuple(METHODS) == conformance.RECIPES
    for recipe in conformance.RECIPES:
        name, given = cells.overrides(f"{recipe} int8 chained 2", "tiny")
        keys.check(compose(name, *given), name)


def test_a_failure_is_shown_by_name_and_what_was_not_run_by_number():
    found = {"sft nf4 fresh 1": "passed", "sft nf4 fresh 2": "resume: a|b <i>"}
    record = {"stack": "newest", "model": "tiny", "date": "2026-11-29", "versions": VERSIONS, "cells": found}
    said = conformance.table([record | {"warned": ["`old` is deprecated"]}])
    assert "| `sft` | 1 of 2, 10 not run |" in said and "| `dpo` | not run |" in said
    assert "- newest, tiny model: `sft nf4 fresh 2`: resume: a\\|b \\<i\\>" in said
    assert "- newest, tiny model: \\`old\\` is deprecated" in said
    assert "Failed: none." in conformance.table([record | {"cells": {}, "warned": []}])


def test_what_is_done_is_not_done_again_but_by_other_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "FILE", tmp_path / "found.json")
    record = conformance.Record("newest", "tiny", VERSIONS)
    record.note("a", "passed", [])
    record.note("b", "moved: see /root/x/y.py", ["gone in 6"])
    again = conformance.Record("newest", "tiny", VERSIONS)
    assert again.pending(["a", "b", "c"], again=False) == ["c"]
    assert again.pending(["a", "b", "c"], again=True) == ["c", "b"]
    assert "/root" not in (tmp_path / "found.json").read_text()
    assert re.search(r'(?m)^   "a": "passed",$', (tmp_path / "found.json").read_text())  # a cell a line
    other = conformance.Record("newest", "tiny", VERSIONS | {"torch": "2.0"})
    assert other.pending(["a", "b"], again=False) == ["a", "b"]
    other.note("a", "passed", [])
    assert [len(each["cells"]) for each in json.loads((tmp_path / "found.json").read_text())] == [1]


def test_an_environment_of_another_checkout_is_made_anew(tmp_path):
    """In place of both Pythons: where the package is, and what else they are asked."""
    python, asked = tmp_path / "bin" / "python", tmp_path / "asked"
    python.parent.mkdir()
    (tmp_path / "installed").touch()
    for where, made in ((ROOT, False), (tmp_path, True), (None, True)):
        place = f"echo {where}/rlhf_recipes/__init__.py" if where else "exit 1"
        python.write_text(f'#!/bin/sh\nif [ "$1" = -I ]; then {place}; else echo "$2" >> {asked}; fi\n')
        python.chmod(0o755)
        asked.write_text("")
        assert conformance.install(tmp_path, str(python)) == python
        assert asked.read_text().split() == (["venv", "pip"] if made else [])


def test_a_cell_that_its_process_dies_in_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(conformance, "WORKER", tmp_path / "worker.py")
    names = ["first", "dies", "says", "last"]
    found = list(conformance.run_cells(sys.executable, tmp_path, "tiny", 1, names, time.monotonic() + 60))
    assert [name for name, *_ in found] == names
    assert [failed for _, failed, _ in found] == [
        "", "the process ended with 3: Segmentation fault", "reload: log-probabilities differ by 1", "",
    ]  # fmt: skip
