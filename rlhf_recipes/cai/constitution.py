"""A constitution: written principles, each a request for a critique, one for a revision, and a question to a judge.

It is data: `conf/constitution/<name>.yaml`, or any file of the same shape with `constitution=local
constitution.path=<file>`. Bai et al. 2022 (arXiv:2212.08073) draw one of 16 such principles for every step.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_recipes.errors import Refusal, first_line, nearest
from rlhf_recipes.run_folder import refuse_growth

FRAMINGS = ("positive", "negative")
FIELDS = {
    "principles": ("id", "source", "framing", "critique", "revision", "judgement"),
    "examples": ("principle", "prompt", "reply", "critique", "revision"),
    "systems": ("good", "bad"),
}


@dataclass(frozen=True)
class Principle:
    """One rule: `critique` and `revision` ask a model for these, `judgement` asks which of two replies is better."""

    id: str
    source: str
    framing: str
    critique: str
    revision: str
    judgement: str


@dataclass(frozen=True)
class Example:
    """A worked example of critique and revision under the principle with the id `principle`."""

    principle: str
    prompt: str
    reply: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Constitution:
    """Principles, examples, and the system prompts under which contrastive pairs are written.

    Attributes:
        sha256: of the content; in every row's provenance.
    """

    name: str
    version: str
    principles: list[Principle]
    examples: list[Example]
    good: str
    bad: str
    sha256: str

    def draw(self, count: int, *seed: Any) -> list[Principle]:
        """`count` different principles (all, where there are no more), decided by `seed` alone."""
        rng = random.Random("/".join(map(str, seed)))
        return rng.sample(self.principles, min(count, len(self.principles)))

    def summary(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "name": self.name,
            "version": self.version,
            "principles": len(self.principles),
            "sha256": self.sha256,
        }

    def principle(self, name: str) -> Principle:
        return next(each for each in self.principles if each.id == name)


def load(node: DictConfig) -> Constitution:
    """The constitution of a config node, or of the file that its `path` names.

    Raises:
        Refusal: a part is missing, blank or of a wrong type; names the file or key.
    """
    content = OmegaConf.to_container(node, resolve=True)
    where = "constitution"
    if path := content.pop("path", None):
        where = path
        content = _read(path)
    keys = ("name", "version", *FIELDS)
    for key in content:
        if key not in keys:
            raise Refusal(f"{where}: {key}: no such key{nearest(str(key), keys)}")
    for key in keys:
        if not content.get(key) or not str(content[key]).strip():
            raise Refusal(f"{where}: {key}: missing or empty. conf/constitution/general.yaml shows the shape.")
    for key in ("name", "version"):
        if isinstance(content[key], list | dict):
            raise Refusal(f"{where}: {key}: must be text or a number.")
    principles = [Principle(**_texts(where, "principles", i, p)) for i, p in _listed(where, content, "principles")]
    examples = [Example(**_texts(where, "examples", i, e)) for i, e in _listed(where, content, "examples")]
    systems = _texts(where, "systems", None, content["systems"])
    ids = [principle.id for principle in principles]
    for i, principle in enumerate(principles):
        if ids.index(principle.id) != i:
            raise Refusal(f"{where}: principles[{i}].id={principle.id}: used twice. Rename one.")
        if principle.framing not in FRAMINGS:
            raise Refusal(f"{where}: principles[{i}].framing={principle.framing}: not one of {', '.join(FRAMINGS)}.")
    for i, example in enumerate(examples):
        if example.principle not in ids:
            raise Refusal(
                f"{where}: examples[{i}].principle={example.principle}: no such principle"
                f"{nearest(example.principle, ids)}"
            )
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Constitution(
        str(content["name"]), str(content["version"]), principles, examples, systems["good"], systems["bad"], digest
    )


def _read(path: str) -> dict:
    file = Path(path).expanduser()
    if not file.is_file():
        raise Refusal(f"constitution.path={path}: no such file. Give a YAML file.")
    try:
        refuse_growth(file.read_text(encoding="utf-8"))
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise Refusal(f"{path}: cannot be read ({first_line(error)}). Mend it.") from error
    except Exception as error:  # PyYAML's errors share no base with what it may raise besides
        at = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise Refusal(f"{path}{f':{at.line + 1}' if at else ''}: not valid YAML ({problem}). Mend it.") from error
    if not isinstance(content, dict):
        raise Refusal(f"{path}: must be a mapping with name, version and principles.")
    return content


def _listed(where: str, content: dict, key: str):
    if not isinstance(content[key], list):
        raise Refusal(f"{where}: {key}: must be a list. conf/constitution/general.yaml shows the shape.")
    return enumerate(content[key])


def _texts(where: str, key: str, index: int | None, values: Any) -> dict[str, str]:
    """The fields of one entry, every one of them text that is not blank."""
    at = key if index is None else f"{key}[{index}]"
    if not isinstance(values, dict):
        raise Refusal(f"{where}: {at}: must be a mapping with {', '.join(FIELDS[key])}.")
    for name in values:
        if name not in FIELDS[key]:
            raise Refusal(f"{where}: {at}.{name}: no such key{nearest(str(name), FIELDS[key])}")
    for name in FIELDS[key]:
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise Refusal(f"{where}: {at}.{name}: must be text, and not blank.")
    return {name: values[name].strip() for name in FIELDS[key]}
