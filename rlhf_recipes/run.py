"""One run, one folder: refuse to overwrite, continue what was interrupted, leave results that explain themselves.

A run folder holds `config.yaml` (resolved), `checkpoints/` while it runs, `metrics.jsonl` (ppo: `samples.jsonl` too),
`curves.png`, `doctor.png`, `adapter/`, `README.md` and, when the run is finished, `result.json`.
"""

import hashlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import compiling, last_checkpoint, locks, memory, places, ranks, run_folder
from rlhf_recipes.config import flatten, in_sweep, trainer_recipes
from rlhf_recipes.config_hash import computed, config_sha256, other_setting
from rlhf_recipes.errors import Refusal
from rlhf_recipes.lineage import rewarding, scoring
from rlhf_recipes.references import ADAPTER_CONFIG, WEIGHTS, ModelRef, adapter_in, adapter_sha256, find, names_in
from rlhf_recipes.run_folder import read_config, read_json, write_atomically

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
# What an interrupted cai, audit or label goes on from: the first file or folder of many that it keeps.
GATE, SCORES, CHOICES, ANSWERS = "gate.jsonl", "scores", "choices.jsonl", "answers.jsonl"
KEPT = {
    GATE: "what was answered",
    SCORES: "what was scored",
    CHOICES: "what was chosen",
    ANSWERS: "what was answered",
}
# To what these have finished more may be added: other people label too.
GROWING = ("label",)
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
        parent: what `model.adapter` names, whose adapter this run continues, or None.
        shared: in a sweep, the folder of what its jobs have in common, or None.
        inputs: `key=value` -> SHA-256 of the rows, adapters and constitution here that a training, cai or label reads.
        lock: keeps other processes from writing the folder; None where this is not the first of several processes.
    """

    dir: Path
    recipe: str
    config: dict
    checkpoint: str | None = None
    parent: ModelRef | None = None
    shared: Path | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    lock: locks.Lock | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.dir / "adapter"

    @classmethod
    def start(cls, cfg: DictConfig, recipe: str) -> "Run":
        """Find what is there of this run, or refuse. It writes and removes nothing but the lock: what may still be
        refused after it costs nobody a file; `create` follows when all is loaded. Of several processes the first
        decides for all.

        Raises:
            Refusal: the folder holds a finished run, an interrupted one with another config or of other rows, or
                foreign files; another job of its sweep has read other rows; another process writes it; it would be
                replaced and something that the command reads lies in it; `model.adapter` names no adapter, or one that
                was trained on another base model; or `trainer` belongs to another recipe, or asks for float16
                without a GPU.
        """
        hide_gpus([cfg])
        environment()
        config = resolved(cfg)
        if (config.get("trainer") or {}).get("fp16"):
            _refuse_fp16_without_gpu()
        ranks.join((config.get("trainer") or {}).get("ddp_timeout") or ranks.SECONDS)
        _refuse_other_trainer(config, recipe)
        folder, model = relative(Path(cfg.output_dir)), config["model"]
        given = model.get("adapter")
        run = cls(
            folder,
            recipe,
            config,
            parent=find(given, "model.adapter", model["id"], model.get("adapter_base")) if given else None,
            shared=folder.parent / SHARED if in_sweep() else None,
        )
        run.checkpoint = ranks.by_first(run._found, cfg)
        return run

    def _found(self, cfg: DictConfig) -> str | None:
        """The checkpoint to continue from; the folder is this process's from here on."""
        self.hold()
        has_result = (self.dir / run_folder.RESULT).exists()
        finished = has_result and not (self.recipe in GROWING and cfg.resume == "auto")
        if finished and not cfg.overwrite:
            raise Refusal(
                f"run_name={cfg.run_name}: {self.dir} holds a finished run. Choose another run_name, or replace it "
                "with overwrite=true."
            )
        self.inputs = inputs_of(self.config) if "trainer" in self.config or self.recipe in ("cai", "label") else {}
        if self.shared and not cfg.overwrite:
            _refuse_other_rows_than_beside(self)
        found = None
        # What has begun to replace another run is continued like any other.
        replaces = run_folder.replaced(self.dir).is_dir() and not has_result
        if cfg.resume == "auto" and not finished and (not cfg.overwrite or replaces):
            kept = [self.dir / name for name in KEPT if (self.dir / name).exists()]
            found = str(kept[0]) if kept else last_checkpoint.find(self.dir)
        if found and (other := _other_config(self) or _other_world(self.dir, found) or _other_inputs(self)):
            if not cfg.overwrite:
                raise Refusal(other)
            found = None
        if found:
            where = KEPT.get(Path(found).name) or f"step {found.rpartition('-')[2]}"
            print(f"Continuing {self.dir} from {where}.", flush=True)
        else:
            run_folder.refuse_to_replace(self.dir, flatten(self.config))
        return found

    def hold(self, only: str | None = None) -> None:
        """Refuse a folder that is not this run's to write, and keep others from writing it.

        Args:
            only: see `run_folder.refuse_foreign`.

        Raises:
            Refusal: it holds foreign files, or another process writes it.
        """
        run_folder.refuse_foreign(self.dir, only)
        self.lock = locks.Lock(self.dir)

    def create(self) -> None:
        """Make the folder this run's: what it does not continue is set aside, and config.yaml is written.

        Raises:
            Refusal: as `start`, for what has come into the folder meanwhile.
        """
        ranks.by_first(self._create)

    def _create(self) -> None:
        if not self.checkpoint:
            run_folder.refuse_to_replace(self.dir, flatten(self.config))
            run_folder.clear(self.dir)
            if self.config.get("overwrite"):  # the same command goes on with this run, whatever it replaces
                run_folder.replaced(self.dir).mkdir(parents=True, exist_ok=True)
        run_folder.drop_scratch(self.dir)
        self.write_config()

    def parts(self) -> list[Path]:
        """The folders that jobs with `shards=k/n` of this run have made, each beside it.

        Raises:
            Refusal: one of them was made with other settings, or of other inputs.
        """
        name = re.compile(re.escape(self.dir.name) + r"\.\d+-of-\d+")
        found = [path for path in sorted(self.dir.parent.glob("*-of-*")) if name.fullmatch(path.name)]
        for part in found:
            begun = run_folder.marked(part)
            if begun and computed(read_config(part)) != computed(self.config):
                raise Refusal(
                    f"{part}: was made with other settings than {self.dir}. Remove it, or give its settings."
                )
            if named := run_folder.changed_input(part, self.inputs):
                raise Refusal(f"{named}: has changed since {part} read it. Put it back, or remove that folder.")
        return found

    def all_parts(self) -> list[Path]:
        """The same in the order of k, all of them finished; none where no job has made one.

        Raises:
            Refusal: they are not all there, or are parts of different n.
        """
        counts = sorted({int(part.name.rpartition("-")[2]) for part in self.parts()})
        if not counts:
            return []
        if len(counts) > 1:
            raise Refusal(
                f"{self.dir}.*-of-*: parts of {counts[0]} jobs and of {counts[1]}. Remove those that are not to be "
                "joined."
            )
        parts = [Path(f"{self.dir}.{k}-of-{counts[0]}") for k in range(1, counts[0] + 1)]
        for k, part in enumerate(parts, 1):
            if not (part / run_folder.RESULT).is_file():
                raise Refusal(
                    f"shards={k}/{counts[0]}: has not finished, no result.json in {part}. Give the command with it, "
                    f"or remove {self.dir}.*-of-{counts[0]} to do without parts."
                )
        return parts

    def cached(self, rows: Iterable[dict], measure: Callable[[], list]) -> list:
        """What `measure` finds of the model before it is trained; jobs of a sweep that start alike are measured once.

        Args:
            rows: what it is measured on.
            measure: its result is JSON-able.

        Raises:
            Refusal: what another job has kept of it cannot be read.
        """
        if self.shared is None:
            return measure()
        same = {key: self.config[key] for key in ("model", "quantization", "lora")}
        trainer = self.config["trainer"]
        same |= {key: trainer.get(key) for key in ("seed", "bf16", "fp16")}
        if self.config.get("data", {}).get("too_long") == "truncate":
            same |= {key: trainer.get(key) for key in ("max_length", "truncation_mode")}
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True).encode())
        path = self.shared / f"before-{digest.hexdigest()[:16]}.json"
        if not ranks.by_first(path.exists):
            measured = measure()
            ranks.by_first(path.parent.mkdir, parents=True, exist_ok=True)
            write_atomically(path, json.dumps(measured))
        return ranks.by_first(read_json, path, list)

    def record(self, **entries) -> dict:
        """What result.json says of every recipe, and `entries`."""
        return {
            "recipe": self.recipe,
            "status": "finished",
            "base_model": self.config.get("model", {}).get("id"),
            **entries,
            "seconds": self.seconds(),
            "peak_memory_gib": _largest(ranks.gather([memory.peak_gib()])),
            "device": device_name(),
            "world_size": ranks.world_size(),
            "nodes": ranks.nodes(),
            "config_sha256": config_sha256(self.config),
            "versions": versions(),
        }

    def write_config(self) -> None:
        """config.yaml, as what it was resolved to, under the mark of a run's folder and what it read."""
        inputs = f"{run_folder.INPUTS}: {json.dumps(self.inputs)}\n" if self.inputs else ""
        run_folder.mark(self.dir, self.recipe, inputs + OmegaConf.to_yaml(OmegaConf.create(self.config)))

    def write_result(self, result: dict) -> None:
        """The last file that a recipe writes: a run with it is a finished run, and takes the place of another."""
        ranks.by_first(self._write_result, result)

    def _write_result(self, result: dict) -> None:
        text = json.dumps(result, indent=2, ensure_ascii=False, default=asdict)
        write_atomically(self.dir / run_folder.RESULT, text + "\n")
        if "trainer" in self.config:
            _end_checkpoints(self)
        run_folder.drop_replaced(self.dir)
        if self.lock:
            self.lock.release()

    def seconds(self) -> float:
        return round(time.monotonic() - self.started, 1)


def resolved(cfg: DictConfig) -> dict:
    """The config as plain containers, without the folder of this machine that Hydra puts into it."""
    node = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "output_dir"])
    return OmegaConf.to_container(node, resolve=True)


def relative(folder: Path) -> Path:
    """The folder as seen from here where it lies below, so that no result names a machine's folders."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _end_checkpoints(run: Run) -> None:
    """Drop them, or keep the adapter of each where the user asked for all: `trainer.save_total_limit=null`."""
    if run.config["trainer"].get("save_total_limit", 0) is not None:
        run_folder.drop_checkpoints(run.dir)
        return
    for checkpoint in run_folder.checkpoints(run.dir):
        run_folder.strip(checkpoint, (ADAPTER_CONFIG, WEIGHTS))
        path = checkpoint / ADAPTER_CONFIG
        if path.exists():  # where it was trained is no name that another machine knows
            adapter = {**read_json(path), "base_model_name_or_path": run.config["model"]["id"]}
            write_atomically(path, json.dumps(adapter, indent=2, sort_keys=True) + "\n")


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


def finished(folder: Path, cfg: DictConfig) -> dict | None:
    """result.json of a run that is done already with this config; None where it is not, or is to be replaced."""
    result = None if cfg.overwrite else run_folder.read_result(folder)
    return result if result and result.get("config_sha256") == config_sha256(resolved(cfg)) else None


def hide_gpus(configs: list[DictConfig]) -> None:
    """Where every config has `trainer.use_cpu=true`, this process sees no GPU: libraries put a model on one that they
    see, and precision and memory would be the GPU's.

    Raises:
        Refusal: it has looked at one already; CUDA does not look again.
    """
    if not all("trainer" in cfg and cfg.trainer.get("use_cpu") for cfg in configs):
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if memory.on_gpu():
        raise Refusal(
            "trainer.use_cpu=true: an earlier job of this process has used a GPU. Give jobs on a CPU a command of "
            "their own."
        )


def _refuse_fp16_without_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise Refusal("trainer.fp16=true: needs a CUDA GPU, and none is used here: it would do nothing. Leave it out.")


def environment() -> None:
    """Set what must be set before torch and trl are imported; what the user has set stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ or ranks.launcher_set("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(_threads(cores))  # accelerate would set 1
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        os.environ.setdefault("DO_NOT_TRACK", "1")  # of trackers, and of engines that a reward function starts
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer is used before and after forks
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # reports that a new score head is new
    if not sys.stderr.isatty():  # bars are for people; a log gets the progress lines
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)  # libraries talking among themselves
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names a kernel that training must not use
    compiling.when_called()


def _threads(cores: int) -> int:
    """Of one process: all cores, unless several jobs of a sweep, or several processes of a job, share them."""
    launcher = HydraConfig.get().launcher if in_sweep() else {}
    jobs = launcher.get("n_jobs", 1)  # joblib's; -1: as many as there are cores
    jobs = (cores if jobs < 0 else jobs) * ranks.local_world_size()
    return launcher.get("cpus_per_task") or max(1, cores // jobs)


def _other_config(run: Run) -> str | None:
    """Why the interrupted run in the folder is not this one; None where it is."""
    if not (found := other_setting(read_config(run.dir), run.config)):
        return None
    key, stored, given = found
    return (
        f"{key}={given}: {run.dir} holds an interrupted run with {key}={stored}. Give that value to continue it, "
        "choose another run_name, or start afresh with overwrite=true."
    )


def _other_world(folder: Path, checkpoint: str) -> str | None:
    """Why a checkpoint of another number of processes is not continued: each has its share of every batch, and its
    own generators; None where it is not one."""
    saved, given = last_checkpoint.processes_of(Path(checkpoint)), ranks.world_size()
    if saved in (None, given):
        return None
    return (
        f"WORLD_SIZE={given}: {folder} holds an interrupted run of {saved} processes, whose batches were others. "
        f"Start it with {saved}, choose another run_name, or start afresh with overwrite=true."
    )


def inputs_of(config: dict) -> dict[str, str]:
    """`key=value` -> SHA-256, of rows, adapters and a constitution that lie here; the package's own rows are its
    version's."""

    def at(key: str):
        group, _, name = key.rpartition(".")
        node = config.get(group) if group else config
        return node.get(name) if isinstance(node, dict) else None

    files = {key: at(key) for key in ("data.path", "data.test_path", "gate.gold", "constitution.path", "first")}
    ours = (None, "clinic")
    found = {
        f"{key}={path}": places.sha256(str(path))
        for key, path in files.items()
        if path not in ours and (key, path) != ("gate.gold", "data")
    }
    found |= {f"earlier={each}": places.sha256(str(Path(each) / "shards")) for each in names_in(at("earlier")) or []}
    adapters = [(key, at(key)) for key in ("model.adapter", "reference", "judge.adapter")]
    adapters += [("judge.reward_model", each) for each in scoring(config.get("judge") or {})]
    for key, reference in [*adapters, *(("reward_funcs", each) for each in rewarding(config))]:
        adapter = adapter_in(reference) if reference else None
        found[f"{key}={reference}"] = adapter and adapter_sha256(adapter)
    return {named: sha256 for named, sha256 in found.items() if sha256}


def _other_inputs(run: Run) -> str | None:
    """Why the interrupted run in the folder cannot go on with what the command reads; None where it can."""
    if not (named := run_folder.changed_input(run.dir, run.inputs)):
        return None
    return (
        f"{named}: has changed since {run.dir} began, which was interrupted. Put it back to continue, choose another "
        "run_name, or start afresh with overwrite=true."
    )


def _refuse_other_rows_than_beside(run: Run) -> None:
    """What the jobs of a sweep come to is compared: all of them read the same.

    Raises:
        Refusal: a job that has begun read something else under the same name.
    """
    for beside in sorted(path.parent for path in run.dir.parent.glob(f"*/{run_folder.CONFIG}")):
        named = run_folder.changed_input(beside, run.inputs) if beside != run.dir else None
        if named and ((beside / run_folder.RESULT).exists() or run_folder.checkpoints(beside)):
            raise Refusal(
                f"{named}: has changed since the job {beside.name} of this sweep read it, so that their figures "
                "could not be compared. Put it back, or start another sweep with another run_name."
            )


def _largest(peaks: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(each[key] for each in peaks) for key in peaks[0]}


def _refuse_other_trainer(config: dict, recipe: str) -> None:
    given, recipes = config.get("trainer", {}).get("_target_"), trainer_recipes()
    if recipes.get(given, recipe) != recipe:
        takes = next(target for target, of in reversed(recipes.items()) if of == recipe)
        raise Refusal(f"trainer: {given} is not for {recipe}, which takes {takes}. Use trainer={recipe}.")
