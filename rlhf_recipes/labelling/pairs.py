"""What is labelled: pairs of replies from a file or a run of recipes/cai.py, or prompts that are answered first."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import run_folder, secrets
from rlhf_recipes.cai.people import WAITING, unfit
from rlhf_recipes.config import CONF
from rlhf_recipes.data import formats, readers, table
from rlhf_recipes.data.load import Splits, load_pairs, load_prompts
from rlhf_recipes.data.messages import Drop, Messages
from rlhf_recipes.data.row import Row
from rlhf_recipes.errors import Refusal

# Of a run of recipes/cai.py, whose judged pairs they are.
SPLITS = ("disputed", "ties", "train_prefs", "test_prefs")
LEFT_OUT = {
    "identical": "the same reply twice",
    "duplicate": "twice in the file",
    "empty": "without a text",
    "roles": "whose turns do not alternate",
    "context_differs": "whose replies answer different prompts",
    "tie": "without a better reply",
    "secret": "with a token or a password in it",
    "tools": "with calls of tools",
    "media": "with pictures or sound",
}


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt.

    Attributes:
        id: `formats.pair_id`.
        principle: the name of the rule that they are compared under, or None.
        question: its words, or None.
    """

    id: str
    prompt_id: str
    prompt: Messages
    first: str
    second: str
    family: str | None = None
    principle: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class Found:
    """What `pairs` names.

    Attributes:
        left_out: counts by `LEFT_OUT`, or another reason of `data.load_pairs`.
        prompts: without answers, or None.
        order: of the prompts as they stand in the file, by `prompt_id`.
    """

    pairs: list[Pair]
    left_out: Counter
    prompts: Splits | None = None
    order: dict[str, int] = field(default_factory=dict)

    def describe(self, source: str) -> str:
        """One line."""
        out = ", ".join(f"{count} {LEFT_OUT.get(why, why)}" for why, count in self.left_out.items())
        return f"pairs: {len(self.pairs)} of {source}" + (f"; left out: {out}" if out else "")


def find(cfg: DictConfig) -> Found:
    """Read what `cfg.pairs` names.

    Raises:
        Refusal: it is not there, of another kind, or no pair is left.
    """
    for split in cfg.splits:
        if split not in SPLITS:
            raise Refusal(f"splits=[{split}]: not one of {', '.join(SPLITS)}. Choose from these.")
    path = Path(cfg.pairs).expanduser()
    if path.is_dir():
        rows = _of_run(path, list(cfg.splits))
    elif not path.is_file():
        raise Refusal(f"pairs={cfg.pairs}: no such file or folder. Give a file, or a run of recipes/cai.py.")
    else:
        _, first = next(readers.read_file(str(path)))
        if {"chosen", "rejected"} <= first.keys():
            rows = _of_preferences(cfg.pairs)
        elif {"first", "second"} <= first.keys():
            rows = _of_answers(str(path))
        else:
            prompts = load_prompts(_data(cfg.pairs), whole=True)
            order = {row["prompt_id"]: place for place, row in enumerate(_in_order(prompts))}
            return Found([], Counter(), prompts, order)
    return collect(rows, cfg.pairs)


def collect(rows: Iterable[Pair | str], source: str) -> Found:
    """Every pair once; a row that is a reason to leave it out is counted.

    Raises:
        Refusal: none is left.
    """
    pairs: dict[str, Pair] = {}
    left_out: Counter = Counter()
    held = secrets.in_environment()
    for row in rows:
        why = row if isinstance(row, str) else _unfit(row, pairs, held)
        if why:
            left_out[why] += 1
        else:
            pairs[row.id] = row
    found = Found(list(pairs.values()), left_out)
    if not pairs:
        raise Refusal(f"{found.describe(source)}. Nothing is left to label. Give other pairs.")
    return found


def make(prompt: Messages, first: str, second: str, prompt_id: str | None = None, **more: str | None) -> Pair:
    name = prompt_id or formats.prompt_id(prompt)
    return Pair(formats.pair_id(name, first, second), name, prompt, first, second, **more)


def _unfit(pair: Pair, known: dict[str, Pair], held: Any) -> str | None:
    if pair.id in known:
        return "duplicate"
    return unfit(pair.prompt, pair.first, pair.second, held)


def _of_answers(path: str) -> Iterator[Pair | str]:
    """Rows with `prompt`, `first`, `second`, and where they have them `prompt_id`, `family`, `principle`, `question`:
    disputed.jsonl of an audit, say. What is chosen in them already is not shown."""
    rows = list(readers.read_file(path))
    for (where, values), prompt in zip(rows, table.prompts(rows), strict=True):
        row = Row(where, values, {key: key for key in ("prompt", "first", "second")})
        row.value("prompt")  # is there
        texts = [row.text(key) for key in ("first", "second")]
        fault = prompt if isinstance(prompt, Drop) else formats.prompt_fault(prompt) if prompt else Drop("empty")
        if fault:
            yield fault.reason
            continue
        named = {key: values.get(key) or None for key in ("prompt_id", "family", "principle", "question")}
        for key, value in named.items():
            if value is not None and not isinstance(value, str):
                raise Refusal(f"{where}: {key} = {value!r:.40}: must be text or null. Mend or remove it.")
        named["question"] = named["question"] or named["principle"]
        yield make(prompt, *texts, **named)


def _of_preferences(path: str) -> Iterator[Pair | str]:
    """Pairs whose better reply is said already, in the order of the file."""
    splits = load_pairs(_data(path), whole=True)
    for row in _in_order(splits):
        yield make(row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"], family=row["family"])
    yield from Counter(splits.report["dropped"]).elements()


def _of_run(folder: Path, splits: list[str]) -> Iterator[Pair | str]:
    recipe = run_folder.marked(folder)
    if recipe == "audit":
        raise Refusal(f"pairs={folder}: a run of audit. Give its file: {folder}/disputed.jsonl or label_next.jsonl.")
    if recipe != "cai":
        raise Refusal(f"pairs={folder}: no run of recipes/cai.py. Give one, or a file.")
    finished = run_folder.read_result(folder) is not None
    # More people may come to what has waited for the first ones.
    if (folder / WAITING).is_file() and not (finished and splits != OmegaConf.load(CONF / "label.yaml").splits):
        yield from _of_answers(str(folder / WAITING))
        return
    files = [folder / f"{split}.parquet" for split in splits]
    if not all(file.is_file() for file in files):
        raise Refusal(f"pairs={folder}: is not finished, no {files[0].name} in it. Finish it with the same command.")
    import pyarrow.parquet

    questions = {
        each["id"]: each["judgement"]
        for each in (run_folder.read_config(folder).get("constitution") or {}).get("principles") or []
    }
    for file in files:
        if not pyarrow.parquet.read_metadata(file).num_rows:
            continue
        for where, row in readers.read_file(str(file)):
            try:
                texts = [row[side][-1]["content"] for side in ("chosen", "rejected")]
                named = {key: row[key] for key in ("prompt_id", "family", "principle")}
                yield make(row["prompt"], *texts, **named, question=questions.get(row["principle"]))
            except (KeyError, TypeError, IndexError) as error:
                raise Refusal(f"{where}: not a pair of recipes/cai.py ({error!r:.80}). Make it again.") from error


def _data(path: str) -> DictConfig:
    """A data node that reads a file, whatever split its rows name."""
    return OmegaConf.merge(OmegaConf.load(CONF / "data" / "base.yaml"), {"path": path, "columns": {"split": None}})


def _in_order(splits: Splits) -> list[dict]:
    """The rows as they stand in the file: what comes first is labelled first."""
    rows = [(_place(place), row) for place, row in zip(splits.places["train"], splits.train, strict=True)]
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def _place(where: str) -> tuple[str, int]:
    """`pairs.jsonl:12`, `pairs.parquet: row 3`"""
    name = where.rstrip("0123456789")
    return name, int(where[len(name) :] or 0)
