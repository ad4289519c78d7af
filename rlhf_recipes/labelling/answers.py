"""Prompts that the policy answers several times, so that people can choose between the answers."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from rlhf_recipes.cai.backend import Backend, Journal, Request, ask
from rlhf_recipes.data.load import Splits
from rlhf_recipes.inference import draw_seed
from rlhf_recipes.labelling import pairs
from rlhf_recipes.labelling.pairs import Pair
from rlhf_recipes.run import ANSWERS


def answer(prompts: Splits, policy: Backend, cfg: DictConfig, folder: Path) -> Iterator[Pair]:
    """Every two of the `samples` answers to each prompt, in the order of the file; what was answered before is kept in
    the folder, and asked for no more.

    Args:
        policy: of `cai.load.load_one`.
    """
    rows = pairs.in_order(prompts)
    sampling = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p}
    asked = [
        Request(
            row["prompt_id"], f"sample.{n}", row["prompt"], **sampling,
            seed=draw_seed(cfg.seed, place * cfg.samples + n) % 2**31,  # which every endpoint takes
        )
        for place, row in enumerate(rows)
        for n in range(cfg.samples)
    ]  # fmt: skip
    answers = ask(policy, asked, Journal(folder / ANSWERS), "answers")
    texts = [each["text"] for each in answers]
    for place, row in enumerate(rows):
        own = texts[place * cfg.samples : (place + 1) * cfg.samples]
        for first, second in itertools.combinations(own, 2):
            yield pairs.make(row["prompt"], first, second, row["prompt_id"], family=row["family"])
