"""The source has what the wheel needs, the wheel has all that a recipe needs, and runs from an empty folder."""

import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the source distribution of a copy of this tree, and of the wheel that is built from it."""
    source, built = (tmp_path_factory.mktemp("release") / name for name in ("source", "dist"))
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source], check=True)
    return built


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Folder into which the wheel is installed."""
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    (wheel,) = built.glob("rlhf_recipes-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    return target


def test_the_source_has_nothing_else(built):
    (source,) = built.glob("rlhf_recipes-*.tar.gz")
    with tarfile.open(source) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {name.partition("/")[0] for name in names} - {""} == {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "SECURITY.md", "conf",
        "constraints.txt", "pyproject.toml", "recipes", "rlhf_recipes", "rlhf_recipes.egg-info", "setup.cfg",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".pyc", ".whl")) or "__pycache__" in name]


def test_it_has_every_file(installed):
    kept = {"conf": "rlhf_recipes/conf", "recipes": "rlhf_recipes/recipes", "rlhf_recipes": "rlhf_recipes"}
    expected = {
        f"{place}/{file.relative_to(ROOT / top)}"
        for top, place in kept.items()
        for file in (ROOT / top).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    there = {str(file.relative_to(installed)) for file in installed.rglob("*") if file.is_file()}
    assert expected <= there, expected - there
    assert "rlhf_recipes/evaluation/page.html.jinja" in there and "rlhf_recipes/assets/clinic/pairs.jsonl" in there
    assert {"rlhf_recipes/audit/page.html.jinja", "rlhf_recipes/style.css"} <= there
    assert "rlhf_recipes/assets/stress/clinic.jsonl" in there
    assert not any(name.startswith(("tests/", "conf/", "recipes/")) for name in there)


def test_a_recipe_runs_from_it_in_an_empty_folder(installed, clean_env, tmp_path):
    code = """
import runpy, sys
sys.argv = ["dpo", *sys.argv[1:]]
try:
    runpy.run_module("rlhf_recipes.recipes.dpo", run_name="__main__")
finally:
    import rlhf_recipes.conf
    from rlhf_recipes.data.sources import CLINIC
    print(rlhf_recipes.conf.__file__, CLINIC, "torch" in sys.modules, sep="\\n", file=sys.stderr)
"""
    env = {**clean_env, "PYTHONPATH": str(installed)}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "python recipes/dpo.py" in done.stdout
    assert any(line.startswith("data:") and "clinic" in line for line in done.stdout.splitlines())
    conf, clinic, torch = done.stderr.splitlines()
    assert conf.startswith(str(installed)) and clinic.startswith(str(installed)) and torch == "False"
    assert list(tmp_path.iterdir()) == []

    done = run("modle=x")
    assert done.returncode == 2 and done.stderr.startswith("error: modle: there is no such key; did you mean 'model'?")
    done = run("trainer=sft")
    assert done.returncode == 2 and "is not for dpo" in done.stderr
    done = run("data.test_size=0", "data.columns.split=null")  # the clinic's file is found, then refused
    assert done.returncode == 2 and "data.test_size=0" in done.stderr
