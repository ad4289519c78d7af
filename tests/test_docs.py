"""Every command that README, docstrings and configs show is one that works, as far as its config goes."""

import re
import shlex

import pytest
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rlhf_recipes import config
from rlhf_recipes.launch import keys
from rlhf_recipes.launch.recipe import spelled_out

COMMAND = re.compile(r"(?:python recipes/(\w+)\.py|python -m rlhf_recipes\.recipes\.(\w+)|rlhf-(\w+))(?: |$)")
RECIPES = {file.stem for file in (ROOT / "recipes").glob("*.py")} - {"__init__"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def texts():
    """(where, text) of everything that shows commands, without comment signs."""
    yield "README.md", README
    for file in sorted((ROOT / "recipes").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        yield f"recipes/{file.name}", text.split('"""')[1] if '"""' in text else ""
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        yield str(file.relative_to(ROOT)), re.sub(r"(?m)^\s*(# ?|- )", "", text)


def lines(text):
    """Lines, with continued ones joined, and what stands between backticks within a line."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        yield line.strip().removeprefix("$ ")
        yield from re.findall(r"`([^`]+)`", line)


def commands():
    return [
        pytest.param(line, id=f"{where}: {line}")
        for where, text in texts()
        for line in dict.fromkeys(lines(text))
        if COMMAND.match(line)
    ]


def parsed(command):
    """(recipe, overrides, whether it is a sweep) of a shown command; a placeholder like <run> ends no shell word."""
    found = COMMAND.match(command)
    recipe = next(name for name in found.groups() if name)
    shown = re.sub(r"<[^<>]+>", "PLACEHOLDER", command[found.end() :])
    words = shlex.split(re.split(r"\s#\s", shown)[0].rstrip("#").replace("{dir}", "outputs/demo"))
    sweep = "-m" in words or "--multirun" in words
    overrides = [word for word in words if "=" in word]
    rest = set(words) - set(overrides) - {"-m", "--multirun", "--help", "--cfg", "job"}
    assert not rest, f"no override: {rest}"
    return recipe, spelled_out(overrides), sweep


def check(compose, command):
    recipe, overrides, sweep = parsed(command)
    assert recipe in RECIPES, f"there is no recipe {recipe}"
    shown_alone = " --help" in command or " --cfg" in command
    jobs = [[]]
    for override in OverridesParser.create().parse_overrides(overrides):
        assert sweep or not override.is_sweep_override(), f"{override.input_line} needs -m"
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [None]
        key = override.get_key_element()
        jobs = [[*job, f"{key}={v}" if v is not None else override.input_line] for job in jobs for v in values]
    for job in jobs:
        cfg = compose(recipe, *job)
        if not shown_alone:
            keys.check(cfg, recipe)
        for node in ("trainer", "lora", "quantization"):
            if "_target_" in cfg.get(node, {}):
                config.build(cfg[node], node, use_cpu=True, bf16=False)
        if "data" in cfg:
            from rlhf_recipes.data import load

            load.check(cfg.data)


def test_there_is_much_to_check():
    assert len(commands()) > 30
    wheres = {param.id.partition(":")[0] for param in commands()}
    assert {"README.md", "conf/dpo.yaml", "conf/data/local.yaml", "recipes/dpo.py"} <= wheres
    assert "conf/experiment/pipeline/demo.yaml" in wheres


@pytest.mark.parametrize("command", commands())
def test_a_shown_command_composes(compose, monkeypatch, command):
    monkeypatch.setattr(keys, "_installed", lambda package: True)  # trackers that few have
    check(compose, command)


@pytest.mark.parametrize(
    "wrong",
    [
        "python recipes/dpo.py modle=qwen3_4b",
        "python recipes/dpo.py trainer.betaa=1",
        "python recipes/dpo.py data=local",
        "python recipes/dpo.py trainer.beta=0.1,0.2",
        "python recipes/kto.py",
        "rlhf-dpo data.seed=x",
        "python recipes/dpo.py outputs/sft/main",
    ],
)
def test_a_wrong_command_would_be_seen(compose, wrong):
    with pytest.raises(Exception) as caught:  # hydra's, ours, or an assertion
        check(compose, wrong)
    assert str(caught.value)


def test_inline_overrides_compose(compose):
    """`key=value` in README's running text belongs to one recipe at least."""
    shown = {code for code in re.findall(r"`([^`\n]+)`", README) if re.fullmatch(r"[a-z_]+(\.\w+)*=[^\s<>]+", code)}
    assert len(shown) > 3
    for override in shown:
        fits = []
        for recipe in sorted(RECIPES):
            try:
                compose(recipe, override)
                fits.append(recipe)
            except Exception:
                continue
        assert fits, f"{override} composes with no recipe"


def test_dotted_keys_of_the_readme_exist(compose):
    """`trainer.simpo_gamma` and the like are arguments of a class, or keys of a node."""
    from rlhf_recipes.typecheck import parameters

    shown = set(re.findall(r"`((?:trainer|lora|quantization|data|model)\.[a-z_.]+)(?:=[^`]*)?`", README))
    known = set()
    for recipe in sorted(RECIPES - {"audit", "cai", "evaluate", "publish", "pipeline"}):
        cfg = compose(recipe, "data.path=x")
        known |= {key for key, _ in config.flatten(OmegaConf.to_container(cfg, resolve=False))}
        for node in ("trainer", "lora", "quantization"):
            target = type(config.build(cfg[node], node, use_cpu=True, bf16=False))
            known |= {f"{node}.{name}" for name in parameters(target)}
    assert len(shown) > 3 and shown <= known, shown - known


def test_make_targets_exist():
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    shown = {name for line in lines(README) for name in re.findall(r"^make ([a-z]+)", line)}
    assert {"demo", "test"} <= shown <= targets


def test_console_scripts_are_the_recipes():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {f"rlhf-{name}": f"rlhf_recipes.recipes.{name}:main" for name in RECIPES}


def test_the_tree_lists_what_is_there():
    """Each line of README's tree names a file or folder; each module of the package has its line."""
    block = next(text for text in re.findall(r"```\w*\n(.*?)```", README, re.S) if "rlhf_recipes/" in text.split())
    shown, folder = set(), {}
    for line in block.splitlines():
        bare = re.sub(r"[│├└─]", " ", line)
        if not bare.strip():
            continue
        depth, name = len(bare) - len(bare.lstrip()), bare.split()[0]
        parents = [folder[level] for level in sorted(folder) if level < depth]
        folder = {level: there for level, there in folder.items() if level < depth} | {depth: name}
        shown.add("".join(parents) + name)
    absent = [path for path in sorted(shown) if not (ROOT / path).exists()]
    assert not absent
    modules = {f"rlhf_recipes/{file.name}" for file in (ROOT / "rlhf_recipes").glob("*.py")} - {
        "rlhf_recipes/__init__.py"
    }
    assert modules <= shown, modules - shown
