"""Prompts that the policy answers several times, so that people can choose between the answers."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from rlhf_recipes.cai.backend import Backend, Journal, Request, ask
from rlhf_recipes.data.load import Splits
from rlhf_recipes.labelling import pairs
from rlhf_recipes.labelling.pairs import Pair
from rlhf_recipes.run import ANSWERS


def answer(prompts: Splits, order: dict[str, int], policy: Backend, cfg: DictConfig, folder: Path) -> Iterator[Pair]:
    """Every two of the `samples` answers to each prompt; what was answered before is kept in the folder, and asked for
    no more.

    Args:
        order: of the prompts, by `prompt_id`.
        policy: of `cai.load.load_one`.
    """
    rows = sorted([*prompts.train, *prompts.test], key=lambda row: order[row["prompt_id"]])
    sampling = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p}
    asked = [
        Request(
            row["prompt_id"], f"sample.{n}", row["prompt"], **sampling,
            seed=_seed(cfg.seed, row["prompt_id"], n),
        )
        for row in rows
        for n in range(cfg.samples)
    ]  # fmt: skip
    answers = ask(policy, asked, Journal(folder / ANSWERS), "answers")
    texts = [each["text"] for each in answers]
    for place, row in enumerate(rows):
        own = texts[place * cfg.samples : (place + 1) * cfg.samples]
        for first, second in itertools.combinations(own, 2):
            yield pairs.make(row["prompt"], first, second, row["prompt_id"], family=row["family"])


def _seed(*parts: object) -> int:
    """31 bits, which every endpoint takes, of what is drawn for one answer, whatever else is asked."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4]) >> 1
