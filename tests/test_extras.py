"""The packages of the extras `audit` and `label` serve these alone: everything else works where they are not
installed."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from rlhf_recipes.launch import keys

HIDDEN = {module for _, packages in keys.EXTRAS.values() for module in packages.values()}
# Found by no import and by no `find_spec`, as if they were not there. At its end a process says what it has loaded.
HIDE = f"""
import atexit, os, sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def find_others(name, *rest):
    return None if name in {HIDDEN} else find_spec(name, *rest)


PathFinder.find_spec = find_others
if "RLHF_TEST_MODULES" in os.environ:
    atexit.register(lambda: print(*sys.modules))
"""
IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys

import rlhf_recipes

assert importlib.util.find_spec("sklearn") is None and importlib.util.find_spec("fastapi") is None
names = [module.name for module in pkgutil.walk_packages(rlhf_recipes.__path__, "rlhf_recipes.")]
for name in [*names, *sys.argv[1:]]:
    if not name.startswith("rlhf_recipes.audit") and name != "rlhf_recipes.labelling.app":
        importlib.import_module(name)
print("rlhf_recipes.evaluation.measure" in sys.modules, "torch" in sys.modules)
"""


@pytest.fixture
def base_env(clean_env, tmp_path):
    """The environment of a process in which none of the packages is installed."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    return {**clean_env, "PYTHONPATH": str(tmp_path / "hide")}


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def test_no_other_room_imports_them():
    files = [*(ROOT / "rlhf_recipes").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    for room, (_, packages) in keys.EXTRAS.items():
        rooms = {file.parent.name for file in files if imported(file) & set(packages.values())}
        assert rooms == {{"label": "labelling"}.get(room, room)}


def test_the_extras_install_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
    dev = re.search(r"rlhf-recipes\[(.*?)\]", " ".join(project["optional-dependencies"]["dev"]))[1].split(",")
    for name, (_, packages) in keys.EXTRAS.items():
        extra = {re.match(r"[\w-]+", each)[0] for each in project["optional-dependencies"][name]}
        assert extra == set(packages) and not extra & base and name in dev
    assert re.search(r"^\$\(VENV\)/demo: WHAT := \.\[audit\]$", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_every_other_module_is_imported_without_them(base_env, tmp_path):
    recipes = [f"rlhf_recipes.recipes.{file.stem}" for file in (ROOT / "recipes").glob("[a-z]*.py")]
    recipes.remove("rlhf_recipes.recipes.audit")
    command = [sys.executable, "-c", IMPORT_ALL, *recipes]
    done = subprocess.run(command, cwd=tmp_path, env=base_env, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize(
    ("recipe", "arguments", "said"),
    [
        ("audit", ["reward_model=x"], 'The audit needs scikit-learn. pip install "rlhf-recipes[audit]".'),
        (
            "pipeline",
            ["experiment=pipeline/demo"],
            'stages.audit: The audit needs scikit-learn. pip install "rlhf-recipes[audit]".',
        ),
        ("label", ["pairs=x"], 'The page needs fastapi. pip install "rlhf-recipes[label]".'),
    ],
)
def test_what_needs_them_is_refused_before_anything_loads(recipe, arguments, said, base_env, light_python, tmp_path):
    """A pipeline's, before its first stage."""
    command = [light_python, "-m", f"rlhf_recipes.recipes.{recipe}", *arguments]
    env = {**base_env, "RLHF_TEST_MODULES": "said"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "hydra" in loaded and "torch" not in loaded


@pytest.mark.parametrize("package", keys.AUDIT_PACKAGES)
def test_the_package_that_is_missing_is_named(package, compose, monkeypatch):
    monkeypatch.setattr(keys, "_installed", lambda module: module != keys.AUDIT_PACKAGES[package])
    cfg = compose("audit", "reward_model=x")
    with pytest.raises(ValueError, match=rf'^The audit needs {package}\. pip install "rlhf-recipes\[audit\]"\.$'):
        keys.check(cfg, "audit")
    keys.check(compose("evaluate", "runs=[x]"), "evaluate")
