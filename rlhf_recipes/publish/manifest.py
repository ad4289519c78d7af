"""What an earlier publication of ours put into a folder or a repo: `published.json`, published with it.

    {"published_by": "rlhf-recipes", "files": {path: SHA-256 of every other file}}

Only what it lists, with these very hashes, is replaced or removed. While a folder is being filled, `before` lists the
files that may still be there from the publication before, so that whatever a killed process leaves can be replaced.
"""

import json
import os
import shutil
from pathlib import Path

from rlhf_recipes import run_folder
from rlhf_recipes.errors import Refusal
from rlhf_recipes.publish import contents

MANIFEST, SCRATCH = run_folder.PUBLISHED, ".published.json.tmp"
BY = "rlhf-recipes"


def write(folder: Path) -> None:
    """The manifest of what lies in a folder, put into it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(_text({"files": contents.hashes(folder)}), encoding="utf-8")


def listed(folder: Path) -> dict[str, set[str]]:
    """Path -> the hashes with which a folder's manifest lists it; nothing where there is no manifest of ours."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["published_by"] != BY:
            return {}
        found = {path: {digest} for path, digest in content["files"].items()}
        for path, digests in content.get("before", {}).items():
            found.setdefault(path, set()).update(digests)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or somebody else's
        return {}


def refuse_foreign(folder: Path) -> None:
    """Refuse a place for a dry run that holds anything but an earlier publication as it was made.

    Raises:
        Refusal: it does, or is a file or a link.
    """
    if folder.is_symlink():
        raise Refusal(f"folder={folder}: is a symbolic link. Name the folder itself.")
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"folder={folder}: is a file. Name a folder.")
    ours = listed(folder)
    for path in _below(folder):
        name = path.relative_to(folder).as_posix()
        if name == SCRATCH or (name == MANIFEST and ours and path.is_file() and not path.is_symlink()):
            continue
        if name not in ours:
            hint = f"no part of what {MANIFEST} lists" if ours else "and no publication of ours"
            raise Refusal(f"folder={folder}: holds {name}, {hint}. Name an empty folder.")
        if path.is_symlink() or not path.is_file() or contents.sha256(path) not in ours[name]:
            raise Refusal(
                f"folder={folder}: {name} was changed since it was published, and is not replaced. Move it away, or "
                "name an empty folder."
            )


def replace(folder: Path, staged: Path) -> None:
    """Make the files of `folder` those of `staged`, which has a manifest; `refuse_foreign` has found no others there.

    Raises:
        Refusal: somebody has put something there meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refuse_foreign(folder)
    before, sent = listed(folder), contents.hashes(staged)
    files = {path: digest for path, digest in sent.items() if path != MANIFEST}
    under_way = {"files": files, "before": {path: sorted(digests) for path, digests in before.items()}}
    _put(folder, MANIFEST, _text(under_way).encode())
    for path in files:
        _put(folder, path, staged / path)
    for path in (contents.hashes(folder).keys() & before.keys()) - files.keys():
        (folder / path).unlink()
    _put(folder, MANIFEST, staged / MANIFEST)


def _put(folder: Path, path: str, content: bytes | Path) -> None:
    """The file is the old one or the whole of the given one, whenever the process ends."""
    scratch, to = folder / SCRATCH, folder / path
    scratch.unlink(missing_ok=True)
    if isinstance(content, bytes):
        scratch.write_bytes(content)
    else:
        shutil.copyfile(content, scratch)
    to.parent.mkdir(parents=True, exist_ok=True)
    os.replace(scratch, to)


def _below(folder: Path) -> list[Path]:
    """All that lies in a folder but folders; links are not followed."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [Path(place) / name for name in files]
        found += [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
    return sorted(found)


def _text(content: dict) -> str:
    return json.dumps({"published_by": BY, **content}, indent=1, ensure_ascii=False) + "\n"
