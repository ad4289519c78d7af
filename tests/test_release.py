"""What a release says of itself: one version everywhere, a citation, a container that is nobody's root."""

import re
import tomllib

import yaml
from conftest import ROOT
from container import copy, instructions, left_out

import rlhf_recipes
from rlhf_recipes import secrets

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"(?m)^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text())[1]
    assert {rlhf_recipes.__version__, latest, citation["version"]} == {PROJECT["version"]}


def test_the_citation_has_what_its_format_asks_for():
    """Citation File Format 1.2.0: cff-version, message, title and at least one author."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    assert (citation["title"], citation["license"]) == (PROJECT["name"], PROJECT["license"])
    assert citation["authors"] == PROJECT["authors"]


def test_the_changelog_is_in_its_shape():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for version in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        assert re.match(r"\[Unreleased\]\n|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d\n", version)
        assert version.startswith("[Unreleased]") or {*re.findall(r"(?m)^### (.+)$", version)} <= kinds


def test_the_container_runs_as_nobodys_root_and_knows_no_secret():
    steps = instructions((ROOT / "Dockerfile").read_text())
    kinds = [step for step, _ in steps]
    assert [given for step, given in steps if step == "USER"] == ["1000"]
    assert not {"COPY", "RUN"} & {*kinds[kinds.index("USER") :]}, "what is made by 1000 can be changed by 1000"
    assert not [given for step, given in steps if step == "COPY" and "--chown" in given]
    assert steps[-1] == ("CMD", '["make", "demo"]')
    settings = [given for step, given in steps if step in ("ARG", "ENV")]
    assert not [given for given in settings if re.search(r"TOKEN|KEY|SECRET|PASSWORD", given)]
    assert not secrets.search((ROOT / "Dockerfile").read_text())


def test_no_more_than_what_it_copies_reaches_a_build(tmp_path):
    copied = {
        source
        for step, given in instructions((ROOT / "Dockerfile").read_text())
        if step == "COPY"
        for source in given.split()[:-1]
    }
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    for name in [".git/config", ".env", "outputs/dpo/result.json", ".venv/bin/python", "build/x.py"]:
        assert left_out(name, ignored), name
    (tmp_path / ".dockerignore").write_text("\n".join(ignored))
    for name in ["a.py", "kept/a.json", ".env", ".git/config", "kept/.cache/x", "kept/__pycache__/a.pyc"]:
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    copy(tmp_path, "tests", tmp_path / "image")
    there = {str(file.relative_to(tmp_path / "image")) for file in (tmp_path / "image").rglob("*") if file.is_file()}
    assert there == {"a.py", "kept/a.json"}
