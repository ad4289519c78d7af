"""Errors of use on one line with an exit code; every other exception keeps its traceback."""

import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import OmegaConf

from rlhf_recipes import ranks, secrets, signals, text
from rlhf_recipes.config import CONF, flatten
from rlhf_recipes.errors import Refusal, first_line, nearest

WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


# Files of a config group that its other files build on: no choices by themselves.
PARTS = ("base", "common")


# Names a file for what a stage of a pipeline is refused for, which the pipeline says once more.
SAID = "RLHF_RECIPES_SAID"
# Begins what is said below a traceback.
NOTE = "note: "
BUG = "this is a bug of rlhf-recipes. Report it where you have rlhf-recipes from, with these lines and the command."
# How the system, and libraries (safetensors, torch), say that a file could not be written.
UNWRITTEN = ("No space left on device", "Disk quota exceeded", "File too large", "Read-only file system",
             "iostream error", "inline_container")  # fmt: skip


class OneLine:
    """Errors of use become one line on stderr and an exit code; every other exception its traceback. Of several
    processes the first that ends speaks, and the others end with its exit code.

    Args:
        config_name: the primary config, while Hydra composes it: what Hydra and OmegaConf say is then of the command.
            Inside a run, None: they say no more of it there, when `keys.check` has looked at the whole config.
    """

    def __init__(self, config_name: str | None = None):
        self.config_name = config_name

    def __enter__(self):
        if self.config_name:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines
        return self

    def __exit__(self, kind, error, trace):
        if error is None or isinstance(error, SystemExit) or WANTS_TRACEBACK:
            return False
        if isinstance(error, BrokenPipeError):  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE
        if isinstance(error, KeyboardInterrupt):
            code = signals.exit_status(error)
            _leave_the_word_to_the_first(code)
            below = "\n" if sys.stderr.isatty() else ""  # the progress line is still being written
            said = str(error) or "Interrupted. The same command continues from the last checkpoint."
            print(f"{below}{text.line(secrets.redact(said))}", file=sys.stderr)
            signals.end_at_once(code)
            sys.exit(code)
        print_error(error, self.config_name)


def print_error(error: Exception, config_name: str | None = None) -> NoReturn:
    """Print a refusal on one line and exit with 2, a bug with its traceback and exit with 1."""
    line = as_refusal(error, config_name)
    _leave_the_word_to_the_first(1 if line is None else 2)
    if line is None:
        print_bug(type(error), error, error.__traceback__)
        sys.exit(1)
    print(f"error: {line}", file=sys.stderr)
    if place := os.environ.get(SAID):
        with suppress(OSError):  # the pipeline has ended before
            Path(place).write_text(line, encoding="utf-8")
    sys.exit(2)


def _leave_the_word_to_the_first(code: int) -> None:
    signals.ignore()
    earlier = ranks.end(code)
    if earlier is not None:
        sys.exit(earlier)


def print_bug(kind, error, trace) -> None:
    """The traceback without secrets, which an exception's message may hold, and what to do with it."""
    lines = "".join(traceback.format_exception(kind, error, trace))
    print(text.shown(secrets.redact(lines)), end="", file=sys.stderr)
    library = _raised_in(trace)
    said = f"{library} raised it. If it does not speak of a setting or a file of yours, {BUG}" if library else BUG
    print(f"{NOTE}{said}", file=sys.stderr)


def _raised_in(trace) -> str | None:
    """The installed package whose code raised an exception; None where it was ours, or Python's own."""
    frames = traceback.extract_tb(trace)
    place = Path(frames[-1].filename).parts if frames else ()
    if "site-packages" not in place or Path(__file__).parents[1] in Path(frames[-1].filename).parents:
        return None
    return place[place.index("site-packages") + 1].removesuffix(".py")


def as_refusal(error: BaseException, config_name: str | None = None) -> str | None:
    """What an error of use says on one line, without secrets and control characters; None for any other error.

    Args:
        config_name: see `OneLine`.
    """
    said = _refusal(error, config_name)
    return said and text.line(" ".join(secrets.redact(said).split()))


def _refusal(error: BaseException, config_name: str | None) -> str | None:
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, Refusal):
        return str(error)
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, OverrideParseException) and "=" in error.override:
        return (
            f"Error parsing override '{error.override}'. Quote what its grammar has no words for, an item with '=' in "
            "a list say: key=['a=b']."
        )
    if config_name and isinstance(error, HydraException | OmegaConfBaseException):
        return _unknown_key(error, config_name) or _not_taken(error) or str(error)
    if ranks.is_parted(error):
        return (
            f"rank {ranks.rank()}: another of the {ranks.world_size()} processes has ended, killed or out of memory. "
            "What was saved is untouched; the same command continues from the last checkpoint."
        )
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}. What was saved before is untouched."
    if any(sign in str(error) for sign in UNWRITTEN):
        return (
            f"a file could not be written ({first_line(error).rstrip('.')}): the disk is full, read-only or over a "
            "quota. What was saved before is untouched; free space, then run the same command again."
        )
    return None


def _unknown_key(error: Exception, config_name: str | None) -> str | None:
    found = re.search(r"Could not override '([^']+)'", str(error))
    if not found:
        return None
    key = found.group(1)
    detail = str(error.__cause__ or "").splitlines()
    if detail and not re.search(r"is not in struct|not in '\w+Config'", detail[0]):
        return f"{key}: {detail[0]}."
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("rlhf_recipes.conf", version_base="1.3"):
        known = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
    leaves = [leaf for leaf, _ in flatten(known)]
    return f"{key}: there is no such key{nearest(key, leaves + list(known))} `--help` lists the keys."


def _not_taken(error: Exception) -> str | None:
    found = re.match(r"Error merging override (\S+)", str(error))
    reason = found and first_line(error.__cause__ or error)
    return found and f"{found.group(1)}: {reason}."


def _unknown_option(error: Exception) -> str:
    lines = str(error).splitlines()
    wanted = re.search(r"Could not find '((?:hydra/)?[^'/]+)/([^']+)'", str(error))
    if not wanted:
        return lines[0]
    group, option = wanted.groups()
    # The message lists the files of one folder; those of ours may lie deeper (experiment=pipeline/demo).
    shown = {line.strip() for line in lines if line.startswith("\t") and "provider=" not in line}
    options = sorted({*shown, *choices(group)} - {*PARTS})
    listed = ", ".join(options) or "none"
    return f"{group}={option}: there is no such option{nearest(option, options)} Options: {listed}."


def choices(group: str) -> list[str]:
    """What a group of ours has to choose from."""
    files = (str(file.relative_to(CONF / group).with_suffix("")) for file in (CONF / group).rglob("*.yaml"))
    return sorted({*files} - {*PARTS})
