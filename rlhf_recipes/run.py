"""One run, one folder: refuse to overwrite, continue what was interrupted, leave results that explain themselves.

A run folder holds `config.yaml` (resolved), `checkpoints/` while it runs, `metrics.jsonl` (ppo: `samples.jsonl` too),
`curves.png`, `doctor.png`, `adapter/`, `README.md` and, when the run is finished, `result.json`.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import memory
from rlhf_recipes.config import CONF, flatten, in_sweep

if TYPE_CHECKING:
    from rlhf_recipes.callbacks import Doctor

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "huggingface_hub",
)
# Where a run lies and whether it may continue say nothing about what it computes.
_NOT_COMPUTED = ("run_name", "resume", "overwrite", "sweep", "preflight")
# What an interrupted cai or audit goes on from: the first file or folder of many that it keeps.
GATE, SCORES = "gate.jsonl", "scores"
KEPT = {GATE: "what was answered", SCORES: "what was scored"}
# What a finished run keeps of a checkpoint.
KEPT_OF_CHECKPOINT = ("adapter_config.json", "adapter_model.safetensors")
# In a sweep's folder: what its jobs have in common.
SHARED = "shared"


@dataclass
class Run:
    """A started run.

    Attributes:
        dir: the run folder.
        recipe: name of the recipe.
        config: the resolved config as plain containers.
        checkpoint: folder of the last complete checkpoint to continue from, or None.
        parent: result.json of the run whose adapter this one continues, or None.
        shared: in a sweep, the folder of what its jobs have in common, or None.
        doctor: the callback that watches the training, or None.
    """

    dir: Path
    recipe: str
    config: dict
    checkpoint: str | None = None
    parent: dict | None = None
    shared: Path | None = None
    doctor: "Doctor | None" = None
    started: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.dir / "adapter"

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)


def start(cfg: DictConfig, recipe: str) -> Run:
    """Find what is there of this run, or refuse. It writes and removes nothing: what may still be refused after it
    costs nobody a file; `claim` follows when all is loaded.

    Raises:
        ValueError: the folder holds a finished run, an interrupted one with another config, or foreign files;
            `model.adapter` names no adapter, or one that was trained on another base model; or `trainer` belongs to
            another recipe.
    """
    environment()
    config = resolved(cfg)
    _refuse_other_trainer(config, recipe)
    run = Run(
        relative(Path(cfg.output_dir)),
        recipe,
        config,
        parent=config["model"].get("adapter") and parent_of(config["model"]["adapter"], config["model"]["id"]),
        shared=relative(Path(cfg.output_dir)).parent / SHARED if in_sweep() else None,
    )
    _refuse_foreign(run.dir)
    if cfg.overwrite:
        return run
    if (run.dir / "result.json").exists():
        raise ValueError(
            f"run_name={cfg.run_name}: {run.dir} holds a finished run. Choose another run_name, or replace it with "
            "overwrite=true."
        )
    run.checkpoint = last_checkpoint(run.checkpoints) if cfg.resume == "auto" else None
    kept = [run.dir / name for name in KEPT if (run.dir / name).exists()]
    if cfg.resume == "auto" and kept:
        run.checkpoint = str(kept[0])
    if run.checkpoint:
        _refuse_other_config(run)
        where = KEPT.get(Path(run.checkpoint).name) or f"step {run.checkpoint.rpartition('-')[2]}"
        print(f"Continuing {run.dir} from {where}.", flush=True)
    return run


def once(run: Run, rows: list[dict], measure: Callable[[], Any]) -> Any:
    """What `measure` finds of the model before it is trained; all jobs of a sweep that start alike are measured once.

    Args:
        rows: what it is measured on.
        measure: its result is JSON-able.
    """
    if run.shared is None:
        return measure()
    same = {"rows": rows, **{key: run.config[key] for key in ("model", "quantization", "lora")}}
    same |= {key: run.config["trainer"].get(key) for key in ("seed", "bf16", "fp16")}
    path = run.shared / f"before-{hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(measure()))
    return json.loads(path.read_text())


def claim(run: Run) -> None:
    """Make the folder this run's: what it does not continue goes, and config.yaml is written."""
    if not run.checkpoint:
        remove(run.dir)
    run.dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run.dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(run.config)))


def resolved(cfg: DictConfig) -> dict:
    """The config as plain containers, without the folder of this machine that Hydra puts into it."""
    node = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "output_dir"])
    return OmegaConf.to_container(node, resolve=True)


def relative(folder: Path) -> Path:
    """The folder as seen from here where it lies below, so that no result names a machine's folders."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to continue from: one that was written to its end (`trainer_state.json` comes last), and
    not the last step of all where that lies inside an epoch, since transformers would train one step too many."""
    steps = sorted((int(c.name.rpartition("-")[2]), c) for c in folder.glob("checkpoint-*") if c.is_dir())
    for _, checkpoint in reversed(steps):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            if state["global_step"] < state["max_steps"] or state["epoch"] % 1 == 0:
                return str(checkpoint)
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)  # killed while it was written: nothing can be read from it
    return None


def finish(run: Run, trainer, *, main: str, before: dict, metrics: dict, counts: dict, **entries) -> float:
    """Write curves, the doctor's page, card and result.json of a training, end its checkpoints, print the summary.

    Args:
        trainer: after training; its log history becomes curves.png.
        main: the metric that the run is about.
        before: metrics before training, name -> estimate (`value`, `low`, `high`, `n`).
        metrics: the same after training.
        counts: report of the data.
        entries: what else result.json says of this recipe.

    Returns:
        The value of the main metric, which makes the recipe an objective for sweeps.
    """
    from rlhf_recipes import card, doctor, doctor_page
    from rlhf_recipes.evaluation.page import plot_curves

    title = f"{run.recipe} · {run.dir.name}"
    if run.doctor:
        seen = run.doctor.record(before, metrics)
        entries["doctor"] = {**doctor.examine(seen), "facts": seen.facts}
        doctor_page.plot(seen, entries["doctor"]["findings"], run.dir / "doctor.png", title)
        if run.doctor.stopped:
            entries["stopped"] = run.doctor.stopped
    result = record(
        run,
        main={"name": main, "before": before[main], "after": metrics[main]},
        before=before,
        metrics=metrics,
        counts=counts,
        seed=trainer.args.seed,
        steps=trainer.state.global_step,
        resumed_from=run.checkpoint and Path(run.checkpoint).name,
        adapter_sha256=adapter_sha256(run.adapter),
        parent=run.parent and run.parent["lineage"],
        **entries,
    )
    plot_curves(trainer.state.log_history, run.dir / "curves.png", title)
    write_atomically(run.dir / "README.md", card.write(result, run.config))
    write_result(run, result)
    _end_checkpoints(run)
    _print_summary(run, result)
    return metrics[main]["value"]


def _end_checkpoints(run: Run) -> None:
    """Drop them, or keep the adapter of each where the user asked for all: `trainer.save_total_limit=null`."""
    if run.config["trainer"].get("save_total_limit", 0) is not None:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        for path in checkpoint.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in KEPT_OF_CHECKPOINT:
                path.unlink()
        path = checkpoint / "adapter_config.json"
        if path.exists():  # where it was trained is no name that another machine knows
            adapter = {**json.loads(path.read_text()), "base_model_name_or_path": run.config["model"]["id"]}
            write_atomically(path, json.dumps(adapter, indent=2, sort_keys=True) + "\n")


def record(run: Run, **entries) -> dict:
    """What result.json says of every recipe, and `entries`."""
    return {
        "recipe": run.recipe,
        "status": "finished",
        "base_model": run.config.get("model", {}).get("id"),
        **entries,
        "seconds": run.seconds(),
        "peak_memory_gib": memory.peak_gib(),
        "device": device_name(),
        "config_sha256": config_sha256(run.config),
        "versions": versions(),
    }


def write_result(run: Run, result: dict) -> None:
    """The last file that a recipe writes: a run with a result is a finished run."""
    write_atomically(run.dir / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def config_sha256(config: dict) -> str:
    """Hash of what a run computes: the config without its place and name."""
    return hashlib.sha256(json.dumps(_computed(config), sort_keys=True, default=str).encode()).hexdigest()


def _computed(config: dict) -> dict:
    """The config without what says nothing about the result: unless it is strict, the doctor only reads."""
    watched = () if config.get("doctor") == "strict" else ("doctor",)
    published = ("publish", "repo_id") if "publish" in config else ()
    return {key: value for key, value in config.items() if key not in (*_NOT_COMPUTED, *watched, *published)}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("rlhf-recipes", *LIBRARIES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def write_atomically(path: Path, text: str) -> None:
    """The file has the old text or the whole of the given one, never a part of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # jobs of a sweep may write side by side
    scratch.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair is no UTF-8
    os.replace(scratch, path)


def resolve_adapter(reference: str) -> Path:
    """The adapter folder that a run folder or an adapter folder stands for.

    Raises:
        ValueError: neither is there.
    """
    folder = Path(reference)
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    what = "has no adapter in it (is the run finished?)" if folder.is_dir() else "does not exist"
    raise ValueError(f"model.adapter={reference}: {what}. Give a run folder such as outputs/sft/main.")


def folder_of(adapter: str | Path) -> Path:
    """The run folder of an adapter, or the adapter's own folder where it is in none."""
    return Path(adapter).parent if Path(adapter).name == "adapter" else Path(adapter)


def read_result(run_dir: Path) -> dict | None:
    """result.json of a run folder, or None."""
    path = run_dir / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def environment() -> None:
    """Set what must be set before torch and trl are imported; what the user has set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(cores)))  # accelerate would set 1
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer is used before and after forks
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # reports that a new score head is new
    if not sys.stderr.isatty():  # bars are for people; a log gets the progress lines
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # libraries talking among themselves
    memory.keep_freed_memory()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names a kernel that training must not use


def _threads(cores: int) -> int:
    """Of one job: all cores, unless a sweep's launcher runs several jobs on them."""
    launcher = HydraConfig.get().launcher if in_sweep() else {}
    jobs = launcher.get("n_jobs", 1)  # joblib's; -1: as many as there are cores
    return launcher.get("cpus_per_task") or max(1, cores // (cores if jobs < 0 else jobs))


def parent_of(reference: str, base_model: str) -> dict:
    """The adapter that a run or folder stands for, and its `lineage`: run, recipe, hash and parents.

    Raises:
        ValueError: there is none, or it was trained on another base model.
    """
    adapter = resolve_adapter(reference)
    base = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if base != base_model:
        raise ValueError(
            f"model.adapter={reference}: was trained on {base}, not on model.id={base_model}. Choose the model it "
            "belongs to."
        )
    result = read_result(folder_of(adapter)) or {}
    lineage = {
        "run": str(reference),
        "recipe": result.get("recipe"),
        "adapter_sha256": adapter_sha256(adapter),
        "parent": result.get("parent"),
    }
    return {"adapter": str(adapter), "lineage": lineage}


def adapter_sha256(adapter: Path) -> str | None:
    """SHA-256 of the adapter's weights file."""
    weights = adapter / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def _refuse_other_config(run: Run) -> None:
    stored = dict(flatten(_computed(OmegaConf.to_container(OmegaConf.load(run.dir / "config.yaml")))))
    given = dict(flatten(_computed(run.config)))
    for key in sorted(stored.keys() | given.keys()):
        if stored.get(key) != given.get(key):
            raise ValueError(
                f"{key}={given.get(key)}: {run.dir} holds an interrupted run with {key}={stored.get(key)}. Give that "
                "value to continue it, choose another run_name, or start afresh with overwrite=true."
            )


def remove(folder: Path) -> None:
    """Delete a run folder.

    Raises:
        ValueError: it is none.
    """
    _refuse_foreign(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _refuse_foreign(folder: Path) -> None:
    """A run's folder holds a config.yaml with `run_name`, or nothing but the folder that a trainer makes first."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    config = folder / "config.yaml"
    text = config.read_text(errors="replace") if config.is_file() else ""
    if not (names <= {"checkpoints", "preflight.json"} or "\nrun_name:" in f"\n{text}"):
        raise ValueError(
            f"hydra.run.dir={folder}: holds {sorted(names)[0]} and is no run folder. Choose an empty or a new one."
        )


def _refuse_other_trainer(config: dict, recipe: str) -> None:
    given = config.get("trainer", {}).get("_target_")
    targets = {file.stem: OmegaConf.load(file).get("_target_") for file in (CONF / "trainer").glob("*.yaml")}
    if given != targets.get(recipe) and given in targets.values():
        raise ValueError(f"trainer: {given} is not for {recipe}, which takes {targets[recipe]}. Use trainer={recipe}.")


def _print_summary(run: Run, result: dict) -> None:
    from rlhf_recipes import doctor
    from rlhf_recipes.stats import format_estimate
    from rlhf_recipes.text import line

    main, where = result["main"], line(run.dir)
    peak = ", ".join(f"{gib} GiB {where}" for where, gib in result["peak_memory_gib"].items())
    print(f"\n{run.recipe} finished in {result['seconds']:.0f} s, peak {peak}.")
    name, before, after = line(main["name"].replace("_", " ")), main["before"], main["after"]
    print(f"  {name}: {format_estimate(before)} -> {format_estimate(after)}")
    if result.get("stopped"):
        print(f"  stopped   {line(result['stopped'])}")
    if result.get("doctor"):
        findings = [doctor.line(finding) for finding in result["doctor"]["findings"]]
        print("\n".join(f"  doctor    {said}" for said in findings or [result["doctor"]["verdict"]]))
    for sample in result.get("samples", []):
        said = textwrap.shorten(line(sample["completion"]), 80, placeholder=" …")
        print(f"  sample    {sample['reward']:+.3f}  {said or '(empty)'}")
    print(f"  adapter   {where}/adapter\n  curves    {where}/curves.png\n  result    {where}/result.json")
    print(f"  next      {line(next_command(run))}", flush=True)


def next_command(run: Run) -> str:
    """The command that usually follows this recipe."""
    if run.recipe == "sft":
        return f"python recipes/dpo.py model.adapter={run.dir}"
    if run.recipe == "reward":
        return f"python recipes/audit.py reward_model={run.dir}"
    return f"python recipes/evaluate.py 'runs=[{run.dir}]'"
