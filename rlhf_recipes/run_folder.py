"""Whose a run's folder is: what of it may be replaced, and what is only set aside.

A folder is a run's if its config.yaml begins with `rlhf_recipes: <recipe>`, a key that nobody else writes. Of such a
folder only what a run writes is ever removed, by name; whatever else lies there is refused. A run that is replaced is
first renamed to `.replaced/<run>` beside it, and goes when the other one has its result. What is read of a folder and
damaged is refused by the name of the file.
"""

import fnmatch
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes import ranks
from rlhf_recipes.errors import Refusal, first_line

MARK = "rlhf_recipes"
INPUTS = "inputs_sha256"  # of config.yaml, behind the mark: what the run read when it began
CONFIG, RESULT, PREFLIGHT = "config.yaml", "result.json", "preflight.json"
PUBLISHED = "published.json"  # the manifest of what was published into a folder
CHECKPOINTS = "checkpoints"
# What recipes write into the folder of a run.
FILES = (
    CONFIG, RESULT, PREFLIGHT, "README.md", "metrics.jsonl", "samples.jsonl", "curves.png", "doctor.png",
    "measurements.json", "probe.json",
    "gate.jsonl", "funnel.json", "funnel.png", "ledger.json", "train_prefs.parquet", "test_prefs.parquet",
    "train_sft.parquet", "test_sft.parquet", "ties.parquet", "disputed.parquet",
    "report.html", "sweep.csv", "frontier.png",
    "audit.json", "label_next.jsonl", "disputed.jsonl", "to_label.jsonl",
    "answers.jsonl", "choices.jsonl", "judgements.jsonl", "preferences.jsonl",
    ".*.tmp",
)  # fmt: skip
FOLDERS = ("adapter", "scores", "shards")
CHECKPOINT = re.compile(r"checkpoint-\d+")
# Of PPO's policy, as a server is given it.
VERSION = re.compile(r"policy-[0-9a-f]{8}-v\d+|\.policy-[0-9a-f]{8}\.part")
# Beside them: TRL's card, and what TensorBoard reads, which stays.
CARD, LOGS = "README.md", "runs"
# Of an unfinished run these alone are worth nothing: they are written again.
WORTHLESS = (CONFIG, PREFLIGHT, "metrics.jsonl", "samples.jsonl", ".*.tmp")
# What a start that was killed had begun to write into the folder of a run, a sweep or a pipeline; what is no run's may
# have other such names.
BEGUN = re.compile(r"\.(config\.yaml|(preflight|result|summary|rounds)\.json)\.\d+\.tmp")
# Last parts of keys that take a path.
PLACES = (
    "adapter", "path", "test_path", "runs", "parent", "checkpoints", "reward_model", "reward_funcs", "ppo_run",
    "judgements", "gold", "deployment", "stress", "sweeps", "run", "pairs", "evaluation", "resume_from_checkpoint",
    "earlier", "first", "reference",
)  # fmt: skip
# Of YAML: what may be an alias, which stands for what was written elsewhere, and entries that a file may come to.
ALIAS, MOST_ENTRIES = re.compile(r"(?m)(?:^|[\s\[{,:-])\*[^\s,\]}]"), 100_000


def write_atomically(path: Path, text: str, by_any: bool = False) -> None:
    """The file has the old text or the whole of the given one, never a part of it. Of several processes the first
    writes, or with `by_any` each."""
    if not (by_any or ranks.is_first()):
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # jobs of a sweep may write side by side
    scratch.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair is no UTF-8
    os.replace(scratch, path)


def read_result(run_dir: Path) -> dict | None:
    """result.json of a run folder, or None.

    Raises:
        Refusal: it cannot be read as one.
    """
    path = run_dir / RESULT
    return read_json(path) if path.is_file() else None


def read_json(path: Path, kind: type = dict) -> Any:
    """A file that holds one JSON object, or with `kind` a list; estimates in it as `stats.Estimate`.

    Raises:
        Refusal: it holds none.
    """
    from rlhf_recipes.stats import Estimate  # numpy, which `--help` does without

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=Estimate.of)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path}: not valid JSON ({first_line(error)}). Restore it.") from error
    if not isinstance(content, kind):
        raise Refusal(f"{path}: is no JSON {'object' if kind is dict else 'list'}. Restore it.")
    return content


def read_config(run_dir: Path) -> dict:
    """config.yaml of a run folder without its mark.

    Raises:
        Refusal: it cannot be read, or is no mapping.
    """
    path = run_dir / CONFIG
    try:
        refuse_growth(path.read_text(encoding="utf-8"))
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's and omegaconf's share no base
        raise Refusal(f"{path}: cannot be read ({first_line(error)}). Restore it.") from error
    if not isinstance(config, dict):
        raise Refusal(f"{path}: is no mapping. Restore it.")
    config.pop(MARK, None)
    config.pop(INPUTS, None)
    return config


def refuse_growth(written: str) -> None:
    """Refuse YAML whose aliases make it much more than it is: nine that each stand ten times for the one before are a
    thousand million entries once they are copied, as OmegaConf does.

    Raises:
        ValueError: it comes to more than `MOST_ENTRIES`, or an alias stands in what it stands for.
        yaml.YAMLError: it is no YAML.
    """
    if not ALIAS.search(written):
        return
    import yaml

    sizes, opened, total = {}, [], 0
    for event in yaml.parse(written, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"line {event.start_mark.line + 1}: an alias of what it stands in, or of nothing")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            sizes.pop(event.anchor, None)
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, begin = opened.pop()
            sizes[anchor] = total - begin
        if total > MOST_ENTRIES:
            raise ValueError(f"its aliases come to more than {MOST_ENTRIES:,} entries")


def inputs(run_dir: Path) -> dict[str, str]:
    """What a run read when it began, `key=value` -> SHA-256: the second line of its config.yaml, or nothing."""
    try:
        with (run_dir / CONFIG).open(encoding="utf-8") as file:
            _, second = file.readline(), file.readline()
        name, _, text = second.partition(": ")
        kept = json.loads(text) if name == INPUTS else {}
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError):
        return {}


def changed_input(run_dir: Path, read: Mapping[str, str | None]) -> str | None:
    """The first `key=value` of what is read, `key=value` -> SHA-256, that a run read otherwise; None where none is."""
    kept = inputs(run_dir)
    return next((named for named, sha256 in read.items() if kept.get(named, sha256) != sha256), None)


def mark(folder: Path, recipe: str, config: str = "") -> None:
    """Write config.yaml: the mark, and a run's config as YAML; what a start that was killed had begun to write goes.

    Whoever calls it holds the folder's lock; in a folder below others may write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in filter(_is_begun, _children(folder)):
        path.unlink()
    if config or marked(folder) != recipe:
        write_atomically(folder / CONFIG, f"{MARK}: {recipe}\n{config}")


def marked(folder: Path) -> str | None:
    """The recipe whose run a folder is, or None."""
    path = folder / CONFIG
    if path.is_symlink() or not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        found = re.fullmatch(rf"{MARK}: (\w+)\n?", file.readline(100))
    return found and found[1]


def refuse_foreign(folder: Path, only: str | None = None) -> None:
    """Refuse a folder that is no run's and holds something.

    Args:
        only: `sweep`, `pipeline` or `publish`, which write beside what is there, in a folder of their own kind alone;
            in it lie runs, or what was published.

    Raises:
        Refusal: names what it holds.
    """
    where = f"hydra.{'sweep' if only == 'sweep' else 'run'}.dir={folder}"
    if folder.is_symlink():
        raise Refusal(f"{where}: is a symbolic link. Name the folder that it points to ({folder.resolve()}).")
    recipe = marked(folder)
    if only and recipe not in (None, only):
        raise Refusal(f"{where}: is the folder of a run of {recipe}. Choose another run_name.")
    for path in _children(folder) if recipe is None else []:
        made_here = only and (marked(path) or (path / PUBLISHED).is_file())
        if path.name != PREFLIGHT and not (made_here or _is_begun(path) or _is_empty(path)):
            raise Refusal(f"{where}: holds {path.name} and is no run folder. Choose an empty or a new one.")
    if folder.resolve() == Path.cwd():  # it could not be set aside under the feet of this process
        raise Refusal(f"{where}: is the current folder. Name one below it.")


def refuse_to_replace(folder: Path, leaves: list[tuple[str, Any]]) -> None:
    """Refuse to replace a run in whose folder lies what no run writes, or what the command itself reads; and one that
    is finished where no place is to set it aside.

    Args:
        leaves: (key, value) of the command's config.

    Raises:
        Refusal: names the file, or the key.
    """
    refuse_foreign(folder)
    for name in _foreign(folder):
        raise Refusal(
            f"{folder}: holds {name}, which no run writes, and would be replaced. Move it, or choose another run_name."
        )
    aside = replaced(folder)
    for name in _foreign(aside) if (folder / RESULT).exists() else []:
        raise Refusal(f"{aside}: holds {name}, which no run writes, and {folder} would be set aside there. Move it.")
    for key, value in _inputs(leaves):
        if _lies_in(value, folder):
            raise Refusal(f"{key}={value}: lies in {folder}, which would be replaced. Choose another run_name.")


def clear(folder: Path) -> None:
    """Make room for a run: what is worth something is set aside, the rest removed by name.

    Where something was set aside already, the folder holds the beginning of what replaces it, which is removed.

    Raises:
        Refusal: it is finished, and what it has replaced cannot be removed.
    """
    aside = replaced(folder)
    if (folder / RESULT).exists() and (reason := _drop(aside)):
        raise Refusal(f"{aside}: {reason}, and {folder} would be set aside there. Move it.")
    worth = [path for path in _children(folder) if not _is_named(path, WORTHLESS)]
    if aside.exists() or all(_is_empty(path) for path in worth):
        _remove(folder)
        return
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)
    print(f"{folder}: what was there is kept in {aside} until this run is finished.", flush=True)


def replaced(folder: Path) -> Path:
    """Where a run lies that is being replaced: too deep to be taken for a job of the sweep in the folder above."""
    return folder.parent / ".replaced" / folder.name


def drop_replaced(folder: Path) -> None:
    """Remove what a finished run has replaced; what no run writes stays, and is said."""
    aside = replaced(folder)
    if reason := _drop(aside):
        print(f"{aside}: is kept, {reason}.", file=sys.stderr, flush=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    found = [path for path in _children(folder / CHECKPOINTS) if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def drop_scratch(folder: Path) -> None:
    """Remove what a process that was killed had begun to write: files of `write_atomically` that took no place."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file() and not path.is_symlink():
            path.unlink()


def strip(checkpoint: Path, kept: tuple[str, ...]) -> None:
    """Remove all of a checkpoint but the files named `kept`."""
    for path in _children(checkpoint):
        if _is_folder(path):
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a run, and their folder if nothing else is in it.

    Args:
        folder: the run's.
    """
    for path in checkpoints(folder):
        if not path.is_symlink():
            shutil.rmtree(path)
    for path in _children(folder / CHECKPOINTS):
        if VERSION.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    (folder / CHECKPOINTS / CARD).unlink(missing_ok=True)
    _rmdir(folder / CHECKPOINTS)


def _remove(folder: Path) -> None:
    """Remove by name what a run writes, and the folder where nothing else is in it."""
    drop_checkpoints(folder)
    own = [path for path in _children(folder / CHECKPOINTS) if _is_own_checkpoint(path)]
    for path in own + [path for path in _children(folder) if _is_own(path) and path.name != CHECKPOINTS]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    _rmdir(folder / CHECKPOINTS)
    _rmdir(folder)


def _drop(aside: Path) -> str | None:
    """Remove a run that was set aside; why it is still there, or None."""
    if not aside.is_dir():
        return None
    try:
        _remove(aside)
        reason = f"it holds {', '.join(_foreign(aside))}"
    except OSError as error:
        reason = f"{error.filename} cannot be removed ({error.strerror})"
    if aside.exists():
        return reason
    _rmdir(aside.parent)
    return None


def _rmdir(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if _is_folder(folder) else []


def _foreign(folder: Path) -> list[str]:
    """What lies in a run's folder and is written by no run; links are none of its."""
    found = [path.name for path in _children(folder) if not _is_own(path)]
    below = _children(folder / CHECKPOINTS)
    return found + [f"{CHECKPOINTS}/{path.name}" for path in below if not _is_own_checkpoint(path)]


def _is_begun(path: Path) -> bool:
    return BEGUN.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def _is_own(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name in (*FOLDERS, CHECKPOINTS)
    return _is_named(path, FILES)


def _is_named(path: Path, names: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, name) for name in names)


def _is_own_checkpoint(path: Path) -> bool:
    if path.is_dir():
        own = path.name == LOGS or CHECKPOINT.fullmatch(path.name) or VERSION.fullmatch(path.name)
        return bool(own) and not path.is_symlink()
    return path.name == CARD and not path.is_symlink()


def _is_empty(path: Path) -> bool:
    """Whether a path is a folder without any file below."""
    return _is_folder(path) and all(_is_folder(each) for each in path.rglob("*"))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _inputs(leaves: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Those that may be paths, and the entries of lists one by one: with a slash, or under a key that takes a path, so
    that `trainer.loss_type=simpo` is no folder of this name, nor `data.columns.first=first`."""
    single = [(key, each) for key, leaf in leaves for each in (leaf if isinstance(leaf, list) else [leaf])]
    texts = [(key, each) for key, each in single if isinstance(each, str) and key != "run_name"]
    places = {key for key, _ in texts if key.rpartition(".")[2] in PLACES and not key.startswith("data.columns.")}
    return [(key, each) for key, each in texts if "/" in each or key in places]


def _lies_in(value: str, folder: Path) -> bool:
    try:
        path = Path(value).expanduser()
        return value != "" and path.exists() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long for a path, say: a text
        return False
