"""The next command, as its user would type it: `python recipes/dpo.py`, `rlhf-dpo` or `python -m …`."""

import os
import re
import shlex
import shutil
from pathlib import Path

TYPED = "RLHF_RECIPES_TYPED"  # an environment variable, for the stages of a pipeline print what its user would type
SHOWN = re.compile(r"python recipes/(\w+)\.py")


def remember(program: str) -> None:
    """Keep how the running command was started.

    Args:
        program: `sys.argv[0]`; of `python -m` it is the module's whole path.
    """
    path = Path(program)
    if path.name.startswith("rlhf-"):
        known = shutil.which(path.name)
        there = known and Path(known).resolve() == path.resolve()
        typed = "rlhf-{}" if there else str(path.with_name("rlhf-{}"))
    elif path.suffix == ".py" and not path.is_absolute():
        typed = f"python {path.with_name('{}.py')}"
    else:
        typed = "python -m rlhf_recipes.recipes.{}"
    os.environ.setdefault(TYPED, typed)


def command(recipe: str) -> str:
    """How the user who started this process would start `recipe`."""
    return os.environ.get(TYPED, "python recipes/{}.py").replace("{}", recipe)


def launched(recipe: str, config_file: str | Path) -> str:
    """How that user would start `recipe` in several processes.

    Args:
        config_file: of Accelerate's launcher.
    """
    program = re.match(r"python (\S+\.py)$", command(recipe))
    started = program.group(1) if program else f"-m rlhf_recipes.recipes.{recipe}"
    return f"accelerate launch --config_file {shlex.quote(str(config_file))} {started}"


def as_typed(shown: str) -> str:
    """A line of documentation with its `python recipes/<name>.py` as the user would type it."""
    return SHOWN.sub(lambda found: command(found.group(1)), shown)
