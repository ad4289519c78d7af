"""What was measured of several systems, from which `summary` makes an evaluation."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import Refusal
from rlhf_recipes.run_folder import read_json, write_atomically

FILE = "measurements.json"


@dataclass
class Measurements:
    """Log-probabilities are sums in nats, KL is nats per answer; rows of all systems are of the same prompts.

    Attributes:
        parent: the system that the others are held against.
        systems: names, the parent among them.
        info: name -> `recipe`, `path`, `adapter_sha256`, `method_reward`, of a checkpoint `step`, and `optimised`, the
            names of those reward models that score and that it was trained on; `labelled_by`, the judges that labelled
            its pairs.
        pairs: a row for each held-out pair: its labels, and in `systems` the log-probabilities by each.
        answers: a row for each prompt: its labels, and in `systems` the answer of each.
        judgements: name -> what a judge said of its answers against the parent's.
        reward_models: name -> its scores of the pairs.
        neutral: name -> (negative log-likelihood, tokens) of each neutral paragraph.
        tasks: lm-eval task -> `metric`, `ids` of its examples, and the `values` of each system.
        fixed: answers to instructions of a file, and what a judge said of them against the file's (`fixed_answers`).
        settings: under which all of it was measured.
        fingerprint: in a sweep's measurements.json, of the adapter, the parent, the reward models and
            the settings.
    """

    parent: str
    systems: list[str]
    info: dict[str, dict] = field(default_factory=dict)
    pairs: list[dict] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)
    judgements: dict[str, list[dict]] = field(default_factory=dict)
    reward_models: dict[str, list[dict]] = field(default_factory=dict)
    neutral: dict[str, list] = field(default_factory=dict)
    tasks: dict[str, dict] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_atomically(folder / FILE, json.dumps(asdict(self), ensure_ascii=False))


def read(folder: Path) -> Measurements:
    """Those that a run's folder holds.

    Raises:
        Refusal: the file is not there, or cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise Refusal(f"{path}: no such file. Restore it, or make the run again with overwrite=true.")
    return Measurements(**read_json(path))


def find(folder: Path) -> Measurements | None:
    """The same; None where there is no file."""
    return read(folder) if (folder / FILE).is_file() else None
