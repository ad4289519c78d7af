"""Where a string points: to a file or folder here, or to a repository on the Hub.

Asked here alone, so that a path that is mistyped or not there yet is never fetched from whoever owns its name there.
"""

import functools
import hashlib
import os
import re
from pathlib import Path

from rlhf_recipes import text
from rlhf_recipes.errors import Refusal, nearest

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BARE_ID = re.compile(r"[\w-][\w.-]*")  # of the Hub's first models (gpt2); nobody can take such a name
# Of a folder of data: rows lie in files that end so, as deep, in no more of them.
ROWS = re.compile(r".+\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|feather)(\.gz|\.zst)?", re.IGNORECASE)
DEEPEST, MOST_FILES = 4, 10_000
# Of a folder that a library or a recipe has written: what it says of the rows, and of how they were made.
NO_ROWS = (
    "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "config.json", "metadata.json",
    "result.json", "preflight.json", "funnel.json", "ledger.json", "measurements.json", "probe.json", "published.json",
)  # fmt: skip


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


def sha256(path: str) -> str | None:
    """Hash of the content of a file, or of the files of rows in a folder with their names; None of anything else, and
    of what cannot be read."""
    place = Path(os.path.expanduser(path))
    try:
        if place.is_file():
            return _digest(place)
        found = hashlib.sha256()
        for file in _files_of_rows(place):
            found.update(f"{file.relative_to(place)} {_digest(file)}\n".encode("utf-8", "surrogateescape"))
        return found.hexdigest() if place.is_dir() else None
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return None


def _files_of_rows(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(each for each in folders if not each.startswith((".", "_")) and depth + 1 < DEEPEST)
        names = [name for name in sorted(names) if ROWS.fullmatch(name) and name[0] not in "._"]
        found += [Path(place, name) for name in names if name not in NO_ROWS]
        if len(found) > MOST_FILES:
            return []
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
