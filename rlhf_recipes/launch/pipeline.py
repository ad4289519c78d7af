"""A pipeline's stages: check all of them first, run what is missing in processes of their own, summarise."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, locks, ranks, run, run_folder, signals
from rlhf_recipes.commands import as_typed, command
from rlhf_recipes.config_hash import config_sha256, other_setting
from rlhf_recipes.data.load import check
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.launch import cards, forks, keys, rounds
from rlhf_recipes.launch.refusals import SAID, WANTS_TRACEBACK, as_refusal
from rlhf_recipes.overrides import of_this_run, quoted
from rlhf_recipes.references import adapter_in

WIDTH = 110
SHOWN_ANSWERS = 4
SUMMARY = "summary.json"
NAME = r"\w[\w.-]*"  # no path
FILES = (run_folder.CONFIG, run_folder.PREFLIGHT, SUMMARY, rounds.FILE, rounds.PAGE)
# By Ctrl-C, exit status of a recipe, of a process that could not catch it; told to end.
INTERRUPTED = (130, -2, signals.EXIT)


@dataclass
class Stage:
    """One recipe of a pipeline: its folder, its command line, the hash of what it will compute."""

    name: str
    recipe: str
    dir: Path
    overrides: list[str]
    cfg: DictConfig
    config_sha256: str
    status: str = "pending"
    seconds: float = 0.0
    ran: bool = False
    said: str = ""  # what it was refused for

    def result(self) -> dict | None:
        return run_folder.read_result(self.dir)

    def written(self) -> tuple[int, int] | None:
        """What tells one result.json from another: each is a new file."""
        path = self.dir / run_folder.RESULT
        found = path.stat() if path.is_file() else None
        return found and (found.st_ino, found.st_mtime_ns)


@dataclass
class Plan:
    """The stages of a pipeline and the folder they share.

    Attributes:
        started: by the clock `time.monotonic`.
        launch: file of Accelerate's launcher, by which the stages start; None: each is one process.
    """

    dir: Path
    stages: list[Stage]
    lock: locks.Lock
    started: float
    launch: str | None = None

    def write(self) -> None:
        """summary.json, as far as the pipeline has come."""
        summary = {
            "stages": [
                {"name": s.name, "recipe": s.recipe, "status": s.status, "ran": s.ran, "seconds": s.seconds,
                 "result": str(s.dir / "result.json")}
                for s in self.stages
            ],
            "seconds": round(time.monotonic() - self.started, 1),
        }  # fmt: skip
        run_folder.write_atomically(self.dir / SUMMARY, json.dumps(summary, indent=2) + "\n")


def plan(cfg: DictConfig) -> Plan:
    """Compose every stage's config, so that a wrong override is refused before the first stage starts.

    Raises:
        Refusal: a stage has an unknown recipe or override, or was made with other settings, or from something else,
            before; the folder, or with `overwrite` that of a stage, holds foreign files; another process writes it.
    """
    started = time.monotonic()
    unread = [text for text in of_this_run() if text.startswith("loop.")]
    if unread and not cfg.rounds:
        raise Refusal(f"{unread[0]}: is read with rounds=<number> alone: it would change nothing.")
    _check_overrides("shared", cfg.shared)
    for key, given in cfg.loop.items():
        if OmegaConf.is_list(given):
            _check_overrides(f"loop.{key}", given)
    for each in cfg.next:
        config.check_value("next", each, str)
    if cfg.launch and not Path(cfg.launch).is_file():
        raise Refusal(f"launch={cfg.launch}: no such file. Give one of Accelerate's, conf/accelerate/ddp.yaml say.")
    here = run.relative(Path(cfg.output_dir))
    run_folder.refuse_foreign(here, only="pipeline")
    lock = locks.Lock(here)
    recipes = {path.stem for path in (config.CONF.parent / "recipes").glob("*.py")} - {"__init__"}
    entries = [*(cfg.stages or []), *(rounds.stages(cfg) if cfg.rounds else [])]
    if not entries:
        raise Refusal("stages=[]: nothing to run. Give a stage, or rounds=<number>.")
    for place, entry in enumerate(entries):
        _check_entry(entry, [each.name for each in entries[:place]], recipes)
    for text in cfg.shared:
        if not any(keys.takes(entry.recipe, text) for entry in entries):
            raise Refusal(f"shared: {text}: no stage has this key. Remove or mend it.")
    stages, told = [], _told(here)
    for entry in entries:
        shared = [text for text in cfg.shared if keys.takes(entry.recipe, text)]
        shared += ["overwrite=true"] if cfg.overwrite else []
        overrides = [quoted(text.replace("{dir}", str(here))) for text in [*shared, *entry.get("overrides", [])]]
        own = _compose(entry, overrides, here)
        if cfg.rounds and entry.name == rounds.name(1, "policy"):
            rounds.check_rollout(cfg.loop, own.trainer)
        sha256 = config_sha256(run.resolved(own))
        stage = Stage(entry.name, entry.recipe, here / entry.name, overrides, own, sha256)
        if result := None if cfg.overwrite else stage.result():
            _keep(stage, result, stages, told, cfg.run_name)
        if cfg.overwrite and entry.recipe != "publish":  # it replaces what its manifest lists
            run_folder.refuse_to_replace(stage.dir, config.flatten(run.resolved(own)))
        stages.append(stage)
    if not (cfg.preflight.only or cfg.launch or all(stage.status == "finished" for stage in stages)):
        forks.prepare(_environment("pipeline"))  # beside the preflight
    return Plan(here, stages, lock, started, cfg.launch)


def execute(plan: Plan, is_over: Callable[[], object] = bool) -> int:
    """Run the stages that have no result; the exit status of the first that fails, else 0.

    Args:
        is_over: asked after each stage that is finished, whether those after it are left out.
    """
    status = 0
    run_folder.mark(plan.dir, "pipeline")
    plan.write()
    for number, stage in enumerate(plan.stages, 1):
        label = f"{number}/{len(plan.stages)} {stage.name}"
        if stage.status == "finished":
            print(f"[{label}] finished before, kept: {stage.dir}", flush=True)
            if is_over():
                break
            continue
        line = shlex.join([*stage.overrides, f"hydra.run.dir={stage.dir}"])
        print(f"\n[{label}] {command(stage.recipe)} {line}", flush=True)
        before = stage.written()
        code, stage.seconds = _run(stage, label, plan.launch)
        stage.ran = True
        # A verdict has an exit status of its own: what makes a stage finished is its result, and not the one that was
        # to be replaced.
        result = stage.result() if stage.written() != before else None
        stage.status = "finished" if result else "interrupted" if code in INTERRUPTED else "failed"
        plan.write()
        if result:
            print(f"[{label}] {_said(result)}, {time.monotonic() - plan.started:.0f} s after the start", flush=True)
        status = status or code
        if code == signals.EXIT:
            signals.end(f"{stage.name} was interrupted.")
        if code in INTERRUPTED:
            raise KeyboardInterrupt
        if stage.status != "finished":
            print(f"[{label}] failed. The same command starts again here.", file=sys.stderr)
            return code or 1
        if is_over():
            break
    plan.write()
    return status


def print_summary(plan: Plan, next_commands: list[str], keep: str | None = None) -> None:
    """The table of the stages, four prompts answered before and after, the adapter, what to try next.

    Args:
        keep: of rounds, the policy to keep, whose adapter it is; None: the last one, or that which is shown.
    """
    results = [(stage, stage.result() if stage.status == "finished" else None) for stage in plan.stages]
    print("\n" + _table(results))
    evaluations = [result["evaluation"] for _, result in results if result and "evaluation" in result]
    if evaluations:
        print(_side_by_side(evaluations[-1]))
    adapters = [stage.dir / "adapter" for stage, result in results if result and stage.recipe != "reward"]
    adapters = [folder for folder in adapters if folder.is_dir()]
    if evaluations:  # what is shown above
        evaluated = evaluations[-1]["systems"][evaluations[-1]["recommended"]]["info"]["path"]
        adapters = [folder for folder in adapters if str(folder.parent) == evaluated] or adapters
    if keep:
        adapters = [folder for folder in [adapter_in(keep)] if folder]
    if adapters:
        print(f"adapter  {adapters[-1]}")
    print(f"summary  {plan.dir / SUMMARY}")
    for each in next_commands:
        print(f"next     {as_typed(each).replace('{dir}', shlex.quote(str(plan.dir)))}")
    sys.stdout.flush()


def _run(stage: Stage, label: str, launch: str | None) -> tuple[int, float]:
    begin = time.monotonic()
    module, arguments = f"rlhf_recipes.recipes.{stage.recipe}", [*stage.overrides, f"hydra.run.dir={stage.dir}"]
    scratch = tempfile.TemporaryDirectory()
    said = Path(scratch.name) / "said"
    environment = _environment(label) | {SAID: str(said)}
    if launch and stage.recipe != "publish":
        launcher = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--config_file", launch, "-m"]
        process = subprocess.Popen([*launcher, module, *arguments], env=cards.give_back(environment))
    else:
        process = forks.start(module, arguments, environment)
    try:
        code = process.wait()
    except KeyboardInterrupt as error:  # the child got it too: let it finish its line
        if isinstance(error, signals.TakenBack):  # or did not
            process.terminate()
        process.wait()
        code = signals.exit_status(error)
    finally:
        if process.poll() is None:
            process.terminate()
        stage.said = said.read_text(encoding="utf-8") if said.exists() else ""
        scratch.cleanup()
    return code, round(time.monotonic() - begin, 1)


def _environment(label: str) -> dict[str, str]:
    environment = {**ranks.alone_env(), "RLHF_RECIPES_STAGE": label}
    if not WANTS_TRACEBACK:
        environment.pop("HYDRA_FULL_ERROR", None)  # set by this process for itself
    return environment


def _compose(entry: DictConfig, overrides: list[str], here: Path) -> DictConfig:
    GlobalHydra.instance().clear()  # of the pipeline's own composition
    try:
        with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
            cfg = hydra.compose(entry.recipe, overrides=keys.chosen(entry.recipe, overrides))
        keys.check(cfg, entry.recipe)
        if "data" in cfg:
            check(cfg.data)
        if entry.recipe == "cai":
            _check_labeller(cfg, overrides, here)
        if cfg.get("judge_function"):
            config.import_function(cfg.judge_function, "judge_function")
        if cfg.get("publish"):  # a stage is finished when it has its result, published or not
            made = f"{'pairs' if entry.recipe == 'cai' else 'run'}={{dir}}/{entry.name}"
            raise Refusal(
                "publish=true: not in a pipeline, in which it is a stage of its own. Add {name: publish, recipe: "
                f"publish, overrides: [{made}, repo_id={cfg.repo_id}]}}."
            )
    except Exception as error:
        raise Refusal(f"stages.{entry.name}: {as_refusal(error, entry.recipe) or error}") from error
    return cfg


def _check_labeller(cfg: DictConfig, overrides: list[str], here: Path) -> None:
    """Refuse what recipes/cai.py would, before the stages that come first are run.

    Args:
        here: of the pipeline; whom a stage of it makes is not there yet.
    """
    from rlhf_recipes.cai import load, make_pairs, people

    make_pairs.check(cfg, overrides)
    if cfg.judge.kind == "people":
        people.check(cfg)
    named = [each for _, leaf in config.flatten(run.resolved(cfg)["judge"]) for each in _listed(leaf)]
    if not any(isinstance(each, str) and Path(each).is_relative_to(here) for each in named):
        load.find_judge(cfg)


def _listed(leaf: Any) -> list:
    return leaf if isinstance(leaf, list) else [leaf]


def _check_entry(entry: DictConfig, names: list[str], recipes: set[str]) -> None:
    shape = "{name: sft, recipe: sft, overrides: [...]}"
    if not isinstance(entry, DictConfig) or not {"name", "recipe"} <= entry.keys():
        raise Refusal(f"stages: each entry is {shape}, not {entry}.")
    for key in entry:
        if key not in ("name", "recipe", "overrides"):
            raise Refusal(f"stages.{entry.name}.{key}: there is no such key. An entry is {shape}.")
    config.check_value("stages.name", entry.name, str)
    config.check_value(f"stages.{entry.name}.recipe", entry.recipe, str)
    _check_overrides(f"stages.{entry.name}.overrides", entry.get("overrides", OmegaConf.create([])))
    if entry.recipe not in recipes:
        raise Refusal(f"stages.{entry.name}.recipe={entry.recipe}: no such recipe{nearest(entry.recipe, recipes)}")
    if not re.fullmatch(NAME, entry.name) or entry.name in FILES:
        raise Refusal(f"stages.name={entry.name}: is the stage's folder. Use letters, digits, '_', '-' and '.'.")
    if entry.name in names:
        raise Refusal(f"stages.{entry.name}: two stages have this name, which is their folder. Rename one.")


def _check_overrides(where: str, given: Any) -> None:
    """Refuse what is no list of texts; YAML makes a mapping of `key: value`."""
    config.check_value(where, OmegaConf.to_container(given) if OmegaConf.is_config(given) else given, list)
    for each in given:
        if not isinstance(each, str):
            pairs = each.items() if isinstance(each, DictConfig) else [("<key>", each)]
            meant = " ".join(f"{key}={value}" for key, value in pairs)
            raise Refusal(f"{where}: {each} must be key=value, a text. Write {meant}.")


def _keep(stage: Stage, result: dict, earlier: list[Stage], told: dict[str, dict], run_name: str) -> None:
    """Take a stage with a result for finished.

    Args:
        earlier: the stages before it.
        told: of `_told`.

    Raises:
        Refusal: it has other settings; an earlier stage that it was made from was made again since, or is to be; or
            what it read has changed.
    """
    given, again = run.resolved(stage.cfg), "make all stages again with overwrite=true."
    if result["config_sha256"] != stage.config_sha256:
        if found := other_setting(run_folder.read_config(stage.dir), given):
            key, old, new = found
            raise Refusal(
                f"stages.{stage.name}: {key}={new}: {stage.dir} was made with {key}={old}. Give that value to keep "
                f"it, choose another run_name, or {again}"
            )
        raise Refusal(f"run_name={run_name}: {stage.dir} was made with other settings. Choose another, or {again}")
    finished = {name for name, said in told.items() if said.get("status") == "finished"}
    since = (stage.dir.parent / SUMMARY).stat().st_mtime_ns if stage.name in told.keys() - finished else 0

    def is_another(each: Stage) -> bool:
        """Of what a start with overwrite=true was to replace, and did not come to: what it did come to."""
        made_again = (each.name in finished and told[each.name].get("ran")) or each.written()[1] >= since
        return bool(stage.written()[1] < since and made_again)

    gone = [each.dir for each in earlier if each.status != "finished" or is_another(each)]
    if other := _read_of_another(stage, given, gone):
        raise Refusal(f"stages.{stage.name}: {stage.dir} was made from another {other}. Remove it, or {again}")
    took = told[stage.name].get("seconds") if stage.name in finished else None
    stage.status, stage.seconds = "finished", took if isinstance(took, int | float) else result["seconds"]


def _read_of_another(stage: Stage, given: dict, gone: list[Path]) -> str | None:
    """The first `key=value` of a finished stage's config that has changed since it was read, or lies in a folder that
    is no longer what it was; None where all is there."""
    for key, leaf in config.flatten(given):
        for each in _listed(leaf):
            if isinstance(each, str) and any(Path(each).is_relative_to(folder) for folder in gone):
                return f"{key}={each}"
    return run_folder.changed_input(stage.dir, run.inputs_of(given))


def _told(here: Path) -> dict[str, dict]:
    """What summary.json says of each stage: `status` and `seconds` among others."""
    path = here / SUMMARY
    stages = run_folder.read_json(path).get("stages") if path.is_file() else None
    return {str(stage.get("name")): stage for stage in stages or [] if isinstance(stage, dict)}


def _said(result: dict) -> str:
    """The main metric of a result."""
    from rlhf_recipes.stats import format_estimate
    from rlhf_recipes.text import line

    main = result["main"]
    return f"{line(main['name'].replace('_', ' '))}: {format_estimate(main['after'])}"


def _table(results: list[tuple[Stage, dict | None]]) -> str:
    from rlhf_recipes.stats import format_estimate
    from rlhf_recipes.text import line

    rows = [["stage", "metric", "before", "after", "n", "seconds", "peak GiB"]]
    for stage, result in results:
        if result is None:
            rows.append([stage.name, stage.status, "", "", "", f"{stage.seconds:.0f}", ""])
            continue
        main = result["main"]
        peak = "/".join(f"{gib:.1f}" for gib in result["peak_memory_gib"].values())
        estimates = [format_estimate(main[when]) if main[when] else "" for when in ("before", "after")]
        name, n = line(main["name"].replace("_", " ")), line(main["after"].n)
        rows.append([stage.name, name, *estimates, n, f"{stage.seconds:.0f}", peak])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:], "[95 % interval, bootstrap over prompts]\n"])


def _side_by_side(evaluation: dict) -> str:
    """The first prompts of different families, not the best ones, as the parent and the last system answer them."""
    from rlhf_recipes.text import line

    parent, tuned = evaluation["parent"], evaluation["recommended"]
    by_family = {answer["family"]: answer for answer in reversed(evaluation["answers"])}
    column = WIDTH // 2 - 2
    lines = []
    for answer in list(by_family.values())[:SHOWN_ANSWERS]:
        lines += textwrap.wrap(f"▶ {line(answer['prompt'])}", WIDTH, max_lines=3, placeholder=" …")
        lines.append(f"{line(parent):<{column}}  │ {line(tuned)}")
        texts = [line(answer["systems"][name]["text"]) for name in (parent, tuned)]
        left, right = (textwrap.wrap(text, column, max_lines=8, placeholder=" …") or ["(empty)"] for text in texts)
        for i in range(max(len(left), len(right))):
            a, b = (side[i] if i < len(side) else "" for side in (left, right))
            lines.append(f"{a:<{column}}  │ {b}".rstrip())
        lines.append("")
    return "\n".join(lines)
