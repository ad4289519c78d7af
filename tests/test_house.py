"""How the house stands: nothing imports upward, no circle, and a package's face is its docstring."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("rlhf_recipes", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# From the top; a room imports from those below its own line alone.
FLOORS = (
    ("recipes",),
    ("launch",),
    ("audit", "publish", "labelling"),
    ("evaluation",),
    ("cai", "ppo", "preference", "adapters", "training"),
    ("models", "inference"),
    ("data", "run"),
)


def statements(nodes):
    """All of them, in their blocks, too."""
    for node in nodes:
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(node, block, []))


def imports(module, tree):
    """(imported module, line) of everything of ours that a file imports, in functions and for type checkers, too."""
    for node in statements(tree.body):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{FILES[module]}:{node.lineno}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            found = found[:-1] if all(each in FILES for each in found[:-1]) else found
        else:
            continue
        yield from ((name, node.lineno) for name in found if name in FILES and name != module)


@functools.cache
def graph():
    return {
        module: list(imports(module, ast.parse(path.read_text(encoding="utf-8")))) for module, path in FILES.items()
    }


def room(module):
    """The folder of the package that a module lies in, or its own name on the ground."""
    parts = module.split(".")
    return "recipes" if parts[0] == "recipes" else parts[1] if len(parts) > 1 else ""


def in_order(edges):
    """None, or the circle that stands in the way of an order."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])


def test_the_checker_finds_a_circle_that_is_planted():
    assert in_order({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert in_order({"a": {"b", "c"}, "b": {"c"}}) is None
    assert ("rlhf_recipes.run", 1) in list(imports("rlhf_recipes.models", ast.parse("from rlhf_recipes import run")))


@pytest.mark.slow
def test_no_file_imports_itself_by_way_of_others():
    assert in_order({module: {name for name, _ in found} for module, found in graph().items()}) is None


def test_no_room_imports_itself_by_way_of_others():
    rooms = {}
    for module, found in graph().items():
        rooms.setdefault(room(module), set()).update({room(name) for name, _ in found} - {room(module)})
    assert in_order(rooms) is None


def test_no_import_runs_upward():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    ground = len(FLOORS)
    upward = [
        f"{FILES[module].relative_to(ROOT)}:{line} imports {name}"
        for module, found in graph().items()
        for name, line in found
        if room(name) != room(module) and floor.get(room(name), ground) < floor.get(room(module), ground)
    ]
    assert upward == []


@pytest.mark.parametrize("module", [name for name, path in FILES.items() if path.name == "__init__.py"])
def test_a_package_s_face_is_its_docstring_and_names(module):
    text = FILES[module].read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip()
    assert len(text.splitlines()) < 40
    assert not [node for node in tree.body if isinstance(node, ast.ClassDef)]
