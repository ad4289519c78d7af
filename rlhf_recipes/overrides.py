"""`key=value` between what people type, what Hydra's grammar takes, and what a shell can be given.

In a value without quotes Hydra's grammar has no words for `=`, `(`, `{`, `#`, `~`, quotes, and letters outside ASCII.
Folders have such names: a job of a sweep is `beta=0.1`.
"""

import os
import re
import shlex

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# What `quoted` and Hydra take for the text that it is.
PLAIN = re.compile(r"(?!(?i:null|true|false|nan|inf)$)([A-Za-z_/]|\.\.?/)[A-Za-z0-9_./:@%+=-]*")
# A key and a word: what most people type, and Hydra's parser, which takes milliseconds for each, need not be asked.
SIMPLE = re.compile(r"\+{0,2}[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*=[A-Za-z0-9_./:@%+-]+")
OPENING = ("[", "{", "'", '"')
NESTED = re.compile(r"[\[\]{}]")


def quoted(typed: str) -> str:
    """One argument of the command line, with quotes where Hydra's grammar has no words for its value.

    A comma parts the jobs of a sweep, or the members of a list, unless it belongs to a name that is there.
    """
    key, equals, value = typed.partition("=")
    comma = "," in value and os.path.exists(value)
    if not equals or typed.startswith("-") or (_taken(typed) and not comma):
        return typed
    listed = value.startswith("[") and value.endswith("]") and not NESTED.search(value[1:-1])
    if value.startswith(OPENING) and not listed and not os.path.exists(value):
        return typed  # Hydra says what is wrong with it
    names = _names(value[1:-1] if listed else value)
    text = ",".join(name if "," not in name and _taken(f"{key}={name}") else _quote(name) for name in names)
    given = f"{key}=[{text}]" if listed else f"{key}={text}"
    return given if all(names) and _taken(given) else typed


def written(key: str, value: str | list[str]) -> str:
    """`key=value` as a shell and our command line take it."""
    names = [
        name if PLAIN.fullmatch(name) else _quote(name) for name in ([value] if isinstance(value, str) else value)
    ]
    return shlex.quote(f"{key}={names[0]}" if isinstance(value, str) else f"{key}=[{','.join(names)}]")


def of_this_run() -> list[str]:
    """What was typed for this run, its folder too, so that the same command can be said again; [] outside of Hydra."""
    if not HydraConfig.initialized():
        return []
    overrides = HydraConfig.get().overrides
    return [*overrides.task, *(each for each in overrides.hydra if each.startswith("hydra.run.dir="))]


def _taken(typed: str) -> bool:
    if SIMPLE.fullmatch(typed):
        return True
    try:
        OverridesParser.create().parse_override(typed)
    except HydraException:
        return False
    return True


def _names(value: str) -> list[str]:
    """What commas part, but for those of names that are there."""
    parts, names = value.split(","), []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if os.path.exists(",".join(parts[:n]))), 1)
        names.append(",".join(parts[:count]))
        parts = parts[count:]
    return names


def _quote(name: str) -> str:
    """In the quotes of Hydra's grammar, where backslashes count before a quote alone."""
    escaped = re.sub(r"(\\*)(\"|\Z)", lambda found: found[1] * 2 + (r"\"" if found[2] else ""), name)
    return f'"{escaped}"'
