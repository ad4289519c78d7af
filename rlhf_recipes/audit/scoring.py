"""Scores of an ensemble of reward models: one base, an adapter with a score head for each member, each on in turn.

What was scored is kept in the run's folder, `scores/<part>.<member>.npz`: an interrupted audit goes on where it was.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from rlhf_recipes import ranks
from rlhf_recipes.adapters import RewardModels
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.references import ModelRef

Message = dict[str, str]


@dataclass
class Scored:
    """Scores of C conversations by M members.

    Attributes:
        rewards_MC: float64.
        features_CF: what the first member's score head read, float32; None where nobody asked.
    """

    rewards_MC: np.ndarray
    features_CF: np.ndarray | None = None


class Ensemble:
    """Reward models on one base. The base is loaded when the first conversation is scored.

    Args:
        members: of `references.find_reward_models`.
        keep: folder for what was scored.
        fast: as of `adapters.RewardModels`.
    """

    def __init__(
        self,
        model: DictConfig,
        quantization: DictConfig,
        tokenizer,
        members: list[ModelRef],
        keep: Path,
        fast: bool = False,
    ):
        self.settings, self.tokenizer, self.members, self.keep = (model, quantization), tokenizer, members, keep
        self.fast = fast
        self._models = None

    def score(
        self,
        conversations: list[list[Message]],
        part: str,
        features: bool = False,
        first_alone: bool = False,
        kept: slice = slice(None),
    ) -> Scored:
        """Rewards of whole conversations, each the prompt's turns and one of the assistant.

        Args:
            part: names them in progress lines and in the folder.
            first_alone: by the first member.
            kept: of the tokens of each: `Splits.kept`.
        """
        rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in conversations]
        turns = [row["prompt"] + row["completion"] for row in neutralise(rows, self.tokenizer)[0]]
        cut = f"{kept} " if kept != slice(None) else ""
        asked = cut + hashlib.sha256(json.dumps(turns).encode()).hexdigest()
        count = 1 if first_alone else len(self.members)
        if not turns:
            return Scored(np.zeros((count, 0)), np.zeros((0, 0), dtype=np.float32))
        found = [self._member(m, turns, part, asked, features and m == 0, kept) for m in range(count)]
        return Scored(np.array([each["rewards"] for each in found]), found[0].get("features"))

    def _member(self, m: int, turns: list, part: str, asked: str, features: bool, kept: slice) -> dict:
        from rlhf_recipes import inference

        path, key = self.keep / f"{part.replace(' ', '_')}.{m}.npz", f"{self.members[m].sha256} {asked}"
        known = ranks.by_first(lambda: _read(path) if path.is_file() else {})
        if str(known.get("key")) == key and (not features or "features" in known):
            return known
        what = f"{part}, reward model {m + 1}/{len(self.members)}" if len(self.members) > 1 else part
        scored = inference.rewards_and_features(self._model(m), self.tokenizer, turns, what, kept)
        found = {"key": np.array(key), "rewards": np.array([score for score, _ in scored], dtype=np.float64)}
        if features:
            found["features"] = np.array([each for _, each in scored], dtype=np.float32)
        ranks.by_first(_write, path, found)
        return found

    def _model(self, m: int):
        if self._models is None:
            self._models = RewardModels(*self.settings, [member.adapter for member in self.members], self.fast)
        return self._models.using(self.members[m].adapter)


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    np.savez(scratch, **found)
    scratch.replace(path)


def _read(path: Path) -> dict[str, np.ndarray]:
    """What was kept of a member's scores.

    Raises:
        Refusal: the file is damaged.
    """
    try:
        with np.load(path) as file:
            known = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Refusal(f"{path}: cannot be read ({first_line(error)}). Remove it: it is scored again.") from error
    if not {"key", "rewards"} <= known.keys():
        raise Refusal(f"{path}: holds no scores. Remove it: it is scored again.")
    return known
