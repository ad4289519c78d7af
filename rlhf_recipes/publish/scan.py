"""What a file must not hold when it leaves this machine: secrets, and names of places and people.

Every byte is looked at: text by lines, rows of parquet one by one, anything else by the printable text in it.
"""

import functools
import getpass
import html
import json
import re
import struct
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from rlhf_recipes import secrets
from rlhf_recipes.errors import Refusal
from rlhf_recipes.publish.contents import VOCABULARY
from rlhf_recipes.text import line

# A home or temporary folder of somebody's machine.
FOLDERS = re.compile(
    r"(?<![\w./])/(?:home|Users|root|tmp|mnt|scratch|workspace)/[\w.@-]+|(?<!\w)[A-Za-z]:\\+Users\\+\w+"
)
NOBODY = ("root", "user", "ubuntu", "admin", "runner", "jovyan", "nobody", "app")  # names that tell nothing
# What runs or fetches something in a page.
ACTIVE = ("script", "iframe", "object", "embed", "base", "link", "form", "applet")
FETCHES = ("src", "srcset", "href", "xlink:href", "action", "formaction", "poster", "data", "background")
SCRIPT = re.compile(r"(?:javascript|vbscript):", re.IGNORECASE)
BLOCK = 8  # bytes; whatever is longer than twice this has one of them to itself
PNG = b"\x89PNG\r\n\x1a\n"
# What matplotlib writes, and text that is not compressed.
CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"sRGB", b"cHRM", b"pHYs", b"tIME", b"tEXt", b"IDAT", b"IEND")


def files(folder: Path, force: bool, seen: dict[str, str], digests: dict[str, str]) -> None:
    """Refuse what must not leave this machine. `force` lets folders and user names pass.

    Args:
        seen: path -> hash of what was looked at before; what is passed is added.
        digests: path -> hash of every file below `folder`.

    Raises:
        Refusal: names file and line, and the kind of what was found, never the thing itself.
    """
    known = _known()
    here = [str(path) for path in (Path.home(), Path.cwd(), Path(tempfile.gettempdir())) if len(path.parts) > 2]
    for name, digest in digests.items():
        if seen.get(name) == digest:
            continue
        vocabulary = Path(name).name in VOCABULARY
        needles = {value: variable for value, variable in known.items() if not (vocabulary and _is_word(value))}
        for row, text in _texts(name, folder / name):
            if found := secret(text, needles):
                at = _at(name, row, text, found[0])
                raise Refusal(f"{at}: holds {found[1]}. Remove it from the run's files.")
            if not (force or vocabulary) and (found := _private(text, here)):
                at, remedy = _at(name, row, text, found[0]), "or publish it all the same with force=true"
                raise Refusal(f"{at}: holds {found[1]}. Remove it from the run's files, {remedy}.")
        seen[name] = digest


def secret(text: str, known: dict[str, str]) -> tuple[int, str] | None:
    """Where, and what `secrets.find` says, given the secrets of the environment."""
    if match := secrets.search(text):
        return match.start(), secrets.TOKEN
    value = next((value for value in known if value in text), None)
    return value and (text.index(value), f"the value of the environment variable {known[value]}")


def _at(name: str, row: int | None, text: str, position: int) -> str:
    number = text.count("\n", 0, position) + 1 if row is None else row
    return f"{name}:{number}" if number else name


def _known() -> dict[str, str]:
    """The secrets of the environment as they are, and as JSON, YAML and HTML write them."""
    found = {}
    for value, variable in secrets.in_environment().items():
        forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], html.escape(value),
                 value.replace("'", "''"))  # fmt: skip
        found |= dict.fromkeys(forms, variable)
    return found


def _is_word(value: str) -> bool:
    """Whether a vocabulary may hold it by itself: `changeme` is a token of many."""
    return value.isalpha() and len(value) < 16


def _private(text: str, folders: list[str]) -> tuple[int, str] | None:
    """Where, and what says whose machine it was."""
    places = [text.index(folder) for folder in folders if folder in text]
    if found := FOLDERS.search(text):
        places.append(found.start())
    if places:
        return min(places), "a path of this or another machine"
    found = _user() and _user().search(text)
    return found and (found.start(), "your user name")


@functools.cache
def _user() -> re.Pattern | None:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # none, as in a container
        return None
    return None if len(name) < 4 or name in NOBODY else re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")


def _texts(name: str, file: Path) -> Iterator[tuple[int | None, str]]:
    """(row from 1, text) of what can be read in a file; None for a text of lines, 0 where there is neither."""
    if file.suffix == ".png":
        _refuse_no_picture(name, file)
    if file.suffix == ".parquet":
        yield from _rows(name, file)
    if file.suffix in (".png", ".parquet", ".safetensors", ".model"):
        yield from ((0, text) for text in _printable(file))
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".html":
        _Page(name).feed(text)
    yield None, text
    if file.suffix == ".json" and file.name not in VOCABULARY:  # escapes may hide what is in it
        try:
            yield 0, "\n".join(_strings(json.loads(text)))
        except ValueError as error:
            raise Refusal(f"{name}: is not valid JSON. Restore it.") from error


class _Page(HTMLParser):
    """Refuses a page that runs or fetches something: ours do neither.

    Raises:
        Refusal: names the element or the attribute.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def handle_starttag(self, tag, attrs):
        active = [key for key, value in attrs if key.startswith("on") or SCRIPT.match((value or "").strip())]
        fetched = [key for key, value in attrs if key in FETCHES and not (value or "").startswith(("#", "data:"))]
        if tag in ACTIVE or active or (fetched and tag != "a"):
            what = f"<{tag}>" if tag in ACTIVE else f"{(active or fetched)[0]} of <{tag}>"
            raise Refusal(
                f"{self.name}: holds {line(what)[:40]}, as no page of ours does. Make it again (recipes/evaluate.py)."
            )


def _strings(value) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value


def _rows(name: str, file: Path) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, json.dumps(row, ensure_ascii=False, default=str)
    except pa.ArrowException as error:
        raise Refusal(f"{name}: is no parquet file. Run recipes/cai.py again.") from error


def _printable(file: Path) -> Iterator[str]:
    """The printable ASCII of a binary file in pieces that are longer than a block, and are together where they touch.

    Numbers have such bytes by chance; that eight in a row fill a block is rare, and what `secrets` looks for does.
    """
    import numpy as np

    margin = 2**12  # longer than any secret: it is looked at twice rather than cut
    with file.open("rb") as opened:
        rest = b""
        while read := opened.read(2**24):
            data = rest + read
            bytes_N = np.frombuffer(data, np.uint8)
            plain_N = ((bytes_N - 32) < 95) | ((bytes_N - 9) < 5)  # unsigned: what is below wraps around
            full = np.flatnonzero(np.packbits(plain_N) == 255)
            for blocks in np.split(full, np.flatnonzero(np.diff(full) > 2) + 1) if len(full) else ():
                start, end = max(0, int(blocks[0]) * BLOCK - 2 * BLOCK), int(blocks[-1] + 3) * BLOCK
                yield data[start:end].decode("latin-1")
            rest = data[-margin:]


def _refuse_no_picture(name: str, file: Path) -> None:
    """Refuse what has the name of a PNG and is none, or holds more than the picture.

    Raises:
        Refusal: it does.
    """
    data = file.read_bytes()
    place, kind = len(PNG), b""
    while data.startswith(PNG) and place + 12 <= len(data) and kind != b"IEND":
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind not in CHUNKS:
            break
        place += 12 + size
    if kind != b"IEND" or place != len(data):
        raise Refusal(f"{name}: is no picture as PNG, or holds more than one. Remove it from the run's files.")
