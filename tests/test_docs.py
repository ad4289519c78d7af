"""What README, the manual, the figures, docstrings and configs show: commands that work as far as their config goes,
names and links of what is there."""

import argparse
import contextlib
import functools
import re
import runpy
import shlex
import tomllib

import pytest
from conftest import ROOT, rendered
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rlhf_recipes import config
from rlhf_recipes.launch import keys, pipeline
from rlhf_recipes.launch.recipe import spelled_out

COMMAND = re.compile(
    r"(?:srun )?(?:(?:\.venv/bin/)?python|(?:accelerate launch|torchrun)(?: \S+)*?)"
    r" (?:recipes/(\w+)\.py|-m rlhf_recipes\.recipes\.(\w+))(?: |$)|rlhf-(\w+)(?: |$)"
)
BENCHMARK = re.compile(r"python (tests/benchmarks/\w+\.py)(?: |$)")
EXTRAS = re.compile(r'pip install -e "\.\[(\w+)\]"$')
RECIPES = {file.stem for file in (ROOT / "recipes").glob("*.py")} - {"__init__"}
READMES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "recipes/README.md", "tests/benchmarks/README.md")
}
README, ALL = READMES["README.md"], "\n".join(READMES.values())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def texts():
    """(where, text) of everything that shows commands, without comment signs."""
    yield from READMES.items()
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
    if command.startswith("accelerate launch "):
        from accelerate.commands.launch import launch_command_parser

        file = launch_command_parser().parse_args(shlex.split(COMMAND.match(command)[0])[2:]).config_file
        assert file is None or (ROOT / file).is_file(), f"there is no file {file}"
    composes(compose, recipe, tuple(overrides), sweep, " --help" in command or " --cfg" in command)


@functools.cache  # the same command is shown at several places
def composes(compose, recipe, overrides, sweep, shown_alone):
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


LAYERS = {"HuggingFaceTB/SmolLM2-135M-Instruct": 30, "Qwen/Qwen3-0.6B": 28, "Qwen/Qwen3-4B": 36}


@pytest.mark.slow
def test_shown_pipelines_train_layers_that_their_models_have(compose, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.forks, "prepare", lambda environment: None)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"runtime": {"output_dir": "unread"}}))
    shown = {tuple(parsed(param.values[0])[1]) for param in commands() if parsed(param.values[0])[0] == "pipeline"}
    assert any("model=" in override for overrides in shown for override in overrides)
    for overrides in shown:
        cfg = compose("pipeline", *(each for each in overrides if not each.startswith("launch=")))
        planned = pipeline.plan(cfg)
        planned.lock.release()
        for stage in planned.stages:
            if layers := OmegaConf.select(stage.cfg, "lora.layers_to_transform"):
                assert max(layers) < LAYERS[stage.cfg.model.id], (overrides, stage.name)


def test_there_is_much_to_check():
    assert len(commands()) > 30
    wheres = {param.id.partition(":")[0] for param in commands()}
    assert {*READMES, "conf/dpo.yaml", "conf/data/local.yaml", "recipes/dpo.py"} <= wheres
    assert "conf/experiment/pipeline/demo.yaml" in wheres


@pytest.mark.slow
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
        "python recipes/unheard_of.py",
        "rlhf-dpo data.seed=x",
        "python recipes/dpo.py outputs/sft/main",
        "accelerate launch --config_file conf/accelerate/dpp.yaml recipes/dpo.py",
    ],
)
def test_a_wrong_command_would_be_seen(compose, wrong):
    with pytest.raises(Exception) as caught:  # hydra's, ours, or an assertion
        check(compose, wrong)
    assert str(caught.value)


@pytest.mark.slow
def test_inline_overrides_compose(compose):
    """`key=value` in running text belongs to one recipe at least."""
    shown = {code for code in re.findall(r"`([^`\n]+)`", ALL) if re.fullmatch(r"[a-z_]+(\.\w+)*=[^\s<>]+", code)}
    assert len(shown) > 3

    def takes(recipe, override):
        with contextlib.suppress(Exception):
            return compose(recipe, override)

    recipes = sorted(RECIPES)
    for override in sorted(shown):
        taker = next((recipe for recipe in recipes if takes(recipe, override)), None)
        assert taker, f"{override} composes with no recipe"
        recipes.remove(taker)
        recipes.insert(0, taker)  # the likeliest for the next one


@pytest.mark.slow
def test_dotted_keys_exist(compose):
    """`trainer.simpo_gamma` and the like are arguments of a class, or keys of a node."""
    from rlhf_recipes.typecheck import parameters

    shown = set(re.findall(r"`((?:trainer|lora|quantization|data|model)\.[a-z_.]+)(?:=[^`]*)?`", ALL))
    known = {f"model.{key}" for key in config.ModelConfig.__dataclass_fields__}
    for recipe in sorted(RECIPES - {"audit", "cai", "label", "evaluate", "publish", "pipeline"}):
        cfg = compose(recipe, "data.path=x")
        known |= {key for key, _ in config.flatten(OmegaConf.to_container(cfg, resolve=False))}
        for node in ("trainer", "lora", "quantization"):
            target = type(config.build(cfg[node], node, use_cpu=True, bf16=False))
            known |= {f"{node}.{name}" for name in parameters(target)}
    assert len(shown) > 3 and shown <= known, shown - known


class Parsed(Exception):
    """The options were taken."""


@pytest.mark.parametrize(
    "command", sorted({line for text in READMES.values() for line in lines(text) if BENCHMARK.match(line)})
)
def test_a_shown_benchmark_takes_its_options(command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser):
        raise Parsed(parse(parser, shlex.split(command)[2:]))  # an option that is none exits

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / BENCHMARK.match(command)[1]), run_name="__main__")


def test_every_benchmark_has_its_figures():
    programs = {file.name for file in (ROOT / "tests/benchmarks").iterdir() if file.suffix in (".py", ".png")}
    shown = READMES["tests/benchmarks/README.md"]
    assert {name for name in programs if name not in shown} == set()


def test_make_targets_exist():
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    shown = {name for line in lines(ALL) for name in re.findall(r"^make ([a-z]+)", line)}
    assert {"demo", "test"} <= shown <= targets


def test_extras_and_markers_exist(request):
    shown = {name for line in lines(ALL) for name in EXTRAS.findall(line)}
    assert {"eval", "sweep"} <= shown <= set(PROJECT["optional-dependencies"])
    markers = {marker.partition(":")[0] for marker in request.config.getini("markers")}
    shown = {name for line in lines(ALL) for name in re.findall(r'^pytest -m "not (\w+)"$', line)}
    assert shown and shown <= markers


def test_imports_work():
    shown = {line for line in lines(ALL) if line.startswith("from rlhf_recipes")}
    assert shown
    for line in shown:
        exec(line, {})


@pytest.mark.parametrize("name", READMES)
def test_every_line_of_a_shell_block_is_a_command_that_is_tested(name):
    shell = "".join(re.findall(r"```bash\n(.*?)```", READMES[name], re.S))
    shown = re.sub(r"\\\n\s*", "", shell).splitlines()
    tested = [line for line in shown if COMMAND.match(line) or BENCHMARK.match(line) or line.startswith("make ")]
    assert shown and shown == tested


def headings(name):
    """Their anchors, as GitHub makes them."""
    found = re.findall(r"(?m)^#+ (.+)$", re.sub(r"```.*?```", "", READMES[name], flags=re.S))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    found = rendered(READMES[name])
    inside = [link for link in [*found.links, *found.images] if not link.startswith("https://")]
    assert inside
    for link in inside:
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_file(), link
        assert not anchor or anchor in headings(target.relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("name", READMES)
def test_files_that_are_named_exist(name):
    assert named_files(READMES[name])
    assert {path for path in named_files(READMES[name]) if not (ROOT / path).exists()} == set()


def test_files_that_docstrings_and_configs_name_exist():
    shown = {path for _, text in texts() for path in named_files(text)}
    assert {path for path in shown if not (ROOT / path).exists()} == set()


def named_files(text):
    shown = set(re.findall(r"(?<![\w/.-])(?:recipes|conf|rlhf_recipes|tests)/[\w./-]*\w/?", text))
    return shown | set(re.findall(r"\b(?:pyproject\.toml|constraints\.txt)\b", text))


def test_the_figures_have_a_row_for_each_section():
    figures = READMES["tests/benchmarks/README.md"]
    sections = re.findall(r"(?m)^## (.+)$", figures)
    assert sorted(re.findall(r"(?m)^\| \[([^]]+)\]\(#", figures)) == sorted(sections)


def test_what_lists_all_names_all():
    sweeps = {file.stem for file in (ROOT / "conf/sweep").glob("*.yaml")} - {"base"}
    listed = re.search(r"`sweep=` ([\w,\s]+);", READMES["recipes/README.md"])[1]
    assert set(re.split(r",\s", listed)) == sweeps
    extras = re.search(r"\| each extra alone beside it: ([^|]+) \|", READMES["tests/benchmarks/README.md"])[1]
    assert set(re.findall(r"`(\w+)`", extras)) == PROJECT["optional-dependencies"].keys()


def test_readme_is_short():
    assert len(README.splitlines()) < 230


def test_console_scripts_are_the_recipes():
    assert PROJECT["scripts"] == {f"rlhf-{name}": f"rlhf_recipes.recipes.{name}:main" for name in RECIPES}


def tree():
    """{path: what stands beside it} of README's tree; a line that begins further in continues the one above."""
    block = next(text for text in re.findall(r"```\w*\n(.*?)```", README, re.S) if "rlhf_recipes/" in text.split())
    rooms, folder, path = {}, "", ""
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        if depth > 2:
            rooms[path] += " " + line.strip()
            continue
        name, _, said = line.strip().partition(" ")
        folder = folder if depth else name
        path = folder + name if depth else name
        rooms[path] = said.strip()
    return rooms


def test_the_tree_lists_what_is_there():
    """Each line names a file or folder, that of a folder also what is in it, before a colon; each module and room of
    the package has its line."""
    rooms = tree()
    absent = [path for path in rooms if not (ROOT / path).exists()]
    for path, said in rooms.items():
        names, colon, _ = said.partition(":")
        for name in names.split() if colon and path.endswith("/") else []:
            if not (ROOT / path / name).exists() and not (ROOT / path / f"{name}.py").exists():
                absent.append(f"{path}{name}")
    assert not absent
    package = [file.relative_to(ROOT / "rlhf_recipes") for file in (ROOT / "rlhf_recipes").rglob("*.py")]
    expected = {f"{file.parts[0]}/" if file.parts[1:] else file.name for file in package} - {"__init__.py"}
    expected = {f"rlhf_recipes/{name}" for name in expected}
    assert expected <= set(rooms), expected - set(rooms)


def test_contributing_names_what_is_there():
    """`RULES` and the like stand in a module that the same point names."""
    for point in README.partition("## Contributing")[2].split("\n- ")[1:]:
        modules = [(ROOT / path).read_text() for path in re.findall(r"`(rlhf_recipes/[\w/]+\.py)`", point)]
        for name in re.findall(r"`([A-Z_]+)`", point):
            assert re.search(rf"(?m)^{name}\b", "\n".join(modules)), name
