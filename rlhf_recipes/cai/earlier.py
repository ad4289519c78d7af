"""What a run takes over of earlier ones: their pairs, and which prompts they have left to be answered."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes.cai import make_pairs
from rlhf_recipes.data import readers
from rlhf_recipes.data.load import Splits, load_prompts
from rlhf_recipes.data.rows import select
from rlhf_recipes.errors import Refusal
from rlhf_recipes.run_folder import read_result


@dataclass(frozen=True)
class Earlier:
    """A finished run of recipes/cai.py: `records.jsonl` of its shards; what its rows say of where they come from."""

    shards: list[Path]
    provenance: dict[str, Any]

    def prompt_ids(self) -> set[str]:
        return {record["prompt_id"] for shard in self.shards for record in make_pairs.read(shard)}


def find(folders: list[str]) -> list[Earlier]:
    """The runs that `earlier` names.

    Raises:
        Refusal: one is no finished run of cai that made pairs.
    """
    found = []
    for folder in folders:
        result = read_result(Path(folder)) or {}
        made = {"constitution": (result.get("constitution") or {}).get("sha256"), "seed": result.get("seed")}
        made |= {key: result.get(key) for key in ("generator", "judge")}
        shards = sorted(Path(folder).glob("shards/*/records.jsonl"))
        if result.get("recipe") != "cai" or "funnel" not in result or not shards:
            raise Refusal(
                f"earlier={folder}: is no finished run of recipes/cai.py with pairs. Finish it, or leave it out."
            )
        found.append(Earlier(shards, result.get("provenance") or made))
    return found


def prompts(cfg: DictConfig, earlier: list[Earlier]) -> Splits:
    """The prompts of `data`: where `data.train_size` leaves some out, what no earlier run has answered comes before
    what one has, and of each those of `first` before others.

    Raises:
        Refusal: as `load_prompts`; a row of `first` has no prompt, or nothing is left out.
    """
    size = cfg.data.train_size
    if cfg.first and size is None:
        raise Refusal(
            f"first={cfg.first}: is not read where all prompts are taken. Set data.train_size, or leave first out."
        )
    if size is None or not (cfg.first or earlier):
        return load_prompts(cfg.data)
    found = load_prompts(OmegaConf.merge(cfg.data, {"train_size": None}))
    listed = cfg.first and not (Path(cfg.first).is_file() and Path(cfg.first).stat().st_size == 0)  # an audit's may be
    wanted = {_asked(where, row) for where, row in readers.read_file(cfg.first)} if listed else set()
    answered = set().union(*(each.prompt_ids() for each in earlier))
    places, there = {}, set()
    for n, row in enumerate(found.train):
        asked = row["prompt"][-1]["content"]
        there |= {asked} & wanted
        places[n] = (row["prompt_id"] in answered, asked not in wanted)
    if listed:
        print(f"first: {len(there)} of {len(wanted)} prompts of {cfg.first} are in the data", flush=True)
    kept = sorted(places, key=places.get)[:size]
    capped = found.report["capped"] | {"train": len(places) - len(kept)}
    report = found.report | {"capped": capped, "train": len(kept)}
    own = {"train": [found.places["train"][n] for n in kept]} if found.places else {}
    return replace(found, train=select(found.train, kept), report=report, places=found.places | own)


def _asked(where: str, row: dict) -> str:
    """The last turn of a row's prompt."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    if not isinstance(prompt, str):
        raise Refusal(f"first: {where} has no prompt, a text or a list of messages. Give a file of prompts.")
    return prompt
