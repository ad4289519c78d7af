"""Where a string points: to a file or folder here, or to a repository on the Hub.

Asked here alone, so that a path that is mistyped or not there yet is never fetched from whoever owns its name there.
"""

import functools
import os
import re
from pathlib import Path

from rlhf_recipes import text
from rlhf_recipes.errors import Refusal, nearest

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BARE_ID = re.compile(r"[\w-][\w.-]*")  # of the Hub's first models (gpt2); nobody can take such a name


def on_hub(reference: str, key: str, bare: bool = False) -> bool:
    """Whether a string names a repository on the Hub, `org/name`, and nothing here.

    Args:
        key: whose value it is, for the refusal.
        bare: `name` alone is an id, too.

    Raises:
        Refusal: it would, but `org` is a folder or file here: a path, then, to what is not there.
    """
    if os.path.lexists(os.path.expanduser(reference)):
        return False
    if not HUB_ID.fullmatch(reference):
        return bare and BARE_ID.fullmatch(reference) is not None
    first, _, name = reference.partition("/")
    if os.path.lexists(first):
        kind, inside = ("folder", sorted(os.listdir(first))) if Path(first).is_dir() else ("file", [])
        raise Refusal(
            f"{key}={reference}: {first} is a {kind} here, and there is no {reference}"
            f"{text.line(nearest(name, inside))} Mend the path; for what has that name on the Hub, start from another "
            "folder."
        )
    return True


@functools.cache
def say_from_hub(what: str, repo: str) -> None:
    """Say, once a process, that something is read from the Hub (or from its cache) and not from here."""
    print(f"{what}: {text.line(repo)}, from the Hub", flush=True)
