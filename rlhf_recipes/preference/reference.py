"""The reference's log-probabilities of the rows that are trained: computed once, before training, and kept.

`trainer.precompute_ref_log_probs` asks for it. They depend on neither beta nor the seed, so that a second epoch, a
second run and every job of a sweep read them. TRL's own way, without `fast_forward`, goes through batches as they are
trained; this one goes through `inference`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trl.trainer.utils import use_adapter

from rlhf_recipes import inference, models, ranks, references
from rlhf_recipes.errors import Refusal
from rlhf_recipes.references import ModelRef
from rlhf_recipes.run import Run
from rlhf_recipes.run_folder import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset
    from omegaconf import DictConfig
    from peft import PeftModel
    from trl import DPOConfig, KTOConfig

    from rlhf_recipes.data.load import Splits

FOLDER = ".reference"
FROZEN = "ref"  # TRL's name of the adapter that is the reference
# Rows of a file: what an interrupted run has computed is kept, and so many are in memory as tokens.
ROWS = 4096
# Of TRL's datasets: the column of an answer, and that of its log-probability under the reference.
COLUMNS = {
    "chosen_ids": "ref_chosen_logps",
    "rejected_ids": "ref_rejected_logps",
    "completion_ids": "ref_logps",
    "KL_completion_ids": "ref_KL_logps",
}

Encoded = tuple[list[int], int]


def find(cfg: "DictConfig") -> ModelRef | None:
    """The run that `reference` names; None: the frozen copy of what the run starts from.

    Raises:
        Refusal: it is no policy of this base.
    """
    if not cfg.reference:
        return None
    return references.find_policy(cfg.reference, "reference", cfg.model.id, cfg.model.adapter_base)


def anchor(trainer, found: ModelRef | None) -> None:
    """Put another run's adapter in the place of TRL's copy of the start, frozen: a chain of rounds stays near the
    policy that the first one started from (Xiong et al. 2023, arXiv:2312.11456; Dong et al. 2024, arXiv:2405.07863).

    Raises:
        Refusal: TRL has read its own reference already.
    """
    if found is None:
        return
    if trainer.args.precompute_ref_log_probs:
        raise Refusal(
            f"{found.key}={found.reference}: not with trainer.precompute_ref_log_probs=true where TRL computes them "
            "(fast_forward=false, trainer.precompute_ref_batch_size). Leave that out."
        )
    model = trainer.model
    if FROZEN in model.peft_config:
        model.delete_adapter(FROZEN)
    models.put_on(model, found.adapter, f"{found.key}={found.reference}", FROZEN)
    # Under the public name PEFT asks the hub for its config at every checkpoint.
    model.peft_config[FROZEN].base_model_name_or_path = model.peft_config["default"].base_model_name_or_path
    model.set_adapter("default")


def pair_logps(trainer, found: ModelRef | None, before: list[dict], pairs: "Splits") -> list[dict]:
    """What the reference says of the held-out pairs: `before`, what the start says of them, unless it is another run;
    as of `inference.pair_logps`."""
    if found is None:
        return before
    with use_adapter(trainer.model, adapter_name=FROZEN):
        return inference.pair_logps(
            trainer.model, trainer.processing_class, pairs.test, "Held out, reference", kept=pairs.kept
        )


def take_over(args: "DPOConfig | KTOConfig", fast_forward: bool) -> bool:
    """Whether `keep` shall compute them, instead of the trainer that is made with `args`.

    TRL does where it is told its batches, and refuses a reference that moves.
    """
    taken = fast_forward and args.precompute_ref_log_probs
    taken = taken and not args.precompute_ref_batch_size and not args.sync_ref_model
    if taken:
        args.precompute_ref_log_probs = False
    return taken


def keep(trainer, run: Run, found: ModelRef | None = None) -> Callable[..., list[tuple[float, int]]]:
    """Give the trainer's rows what its reference says of them; and what says it of rows that are held out before
    training: `Kept.sums`, unless the reference is another run than the policy starts from."""
    kept = Kept(trainer, run)
    kept.add_columns()
    return inference.logp_sums if found else kept.sums


class Kept:
    """What the reference of a trainer says of rows, in files that runs beside each other share.

    Args:
        trainer: a DPOTrainer or KTOTrainer, with a LoRA.
    """

    def __init__(self, trainer, run: Run):
        self.trainer, self.model = trainer, _of_reference(trainer.model)
        self.folder = (run.shared.parent if run.shared else run.dir).parent / FOLDER

    def add_columns(self) -> None:
        """Give the trainer's rows the columns that it reads in place of a forward pass of the reference."""
        trainer = self.trainer
        trainer.train_dataset = self._with_columns(trainer.train_dataset, "train rows")
        if trainer.args.eval_strategy != "no":
            trainer.eval_dataset = self._with_columns(trainer.eval_dataset, "test rows")
        trainer.precompute_ref_logps = True

    def sums(self, model: "PeftModel", pad_id: int, encoded: list[Encoded], what: str) -> list[tuple[float, int]]:
        """`inference.logp_sums` of a policy that nothing has trained: it is the reference."""
        logps, read = self._logps(encoded, what)
        _say("held-out answers", len(encoded), len(encoded) if read else 0, self.folder)
        return [(logp, len(ids) - start) for logp, (ids, start) in zip(logps, encoded, strict=True)]

    def _with_columns(self, dataset: "Dataset", what: str) -> "Dataset":
        sides = [side for side in COLUMNS if side in dataset.column_names]
        found: dict[str, list[float]] = {COLUMNS[side]: [] for side in sides}
        args, known = self.trainer.args, 0
        for start in range(0, len(dataset), ROWS):
            rows = dataset.select(range(start, min(start + ROWS, len(dataset))))
            encoded = [_encoded(row["prompt_ids"], row[side], args) for row in rows for side in sides]
            logps, read = self._logps(encoded, f"Reference, {what}", getattr(args, "ld_alpha", None))
            known += len(rows) if read else 0
            for place, side in enumerate(sides):
                found[COLUMNS[side]] += logps[place :: len(sides)]
        _say(what, len(dataset), known, self.folder)
        for column, values in found.items():
            dataset = dataset.add_column(column, values)
        return dataset

    def _logps(self, encoded: list[Encoded], what: str, weight: float | None = None) -> tuple[list[float], bool]:
        """Log-probabilities of answers in nats, and whether they were kept.

        Args:
            weight: `ld_alpha`, of the tokens beyond the length of a pair's other answer (Liu et al. 2024,
                arXiv:2409.06411).
        """
        key = hashlib.sha256(json.dumps([self.model, encoded, weight]).encode()).hexdigest()
        path = self.folder / f"{key[:16]}.json"
        if kept := ranks.by_first(_read, path, key, len(encoded)):
            return kept, True
        model, pad_id = self.trainer.model, self.trainer.processing_class.pad_token_id
        with use_adapter(model, adapter_name=_adapter(model)):
            logps = inference.token_logps(model, pad_id, encoded, what)
        counts = [len(logps_K) for logps_K in logps]
        if weight is not None:
            counts = [min(pair) for pair in zip(counts[::2], counts[1::2], strict=True) for _ in pair]
        found = [(k[:n].sum() + (weight or 0) * k[n:].sum()).item() for k, n in zip(logps, counts, strict=True)]
        ranks.by_first(_write, path, key, found)
        return found, False


def _say(what: str, count: int, read: int, folder: Path) -> None:
    if ranks.is_first():
        parts = ((read, "read from"), (count - read, "computed, kept in"))
        print(f"reference of the {what}: {', '.join(f'{n:,} {how}' for n, how in parts if n)} {folder}", flush=True)


def _encoded(prompt: list[int], answer: list[int], args: "DPOConfig | KTOConfig") -> Encoded:
    """The tokens as TRL's collator cuts them, and where those start that are scored: none is without one before it."""
    ids, start = prompt + answer, len(prompt)
    if args.max_length is not None and len(ids) > args.max_length:
        if getattr(args, "truncation_mode", "keep_start") == "keep_end":
            start -= len(ids) - args.max_length
            ids = ids[-args.max_length :]
        else:
            ids = ids[: args.max_length]
    return ids, min(max(start, 1), len(ids))


def _adapter(model: "PeftModel") -> str | None:
    """TRL's frozen copy of an adapter that is continued, or the base alone."""
    return FROZEN if FROZEN in model.peft_config else None


def _of_reference(model: "PeftModel") -> str:
    """Hash of what computes the reference: its weights, as they lie here, in which precision, and how."""
    import torch

    config = model.get_base_model().config
    how = {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "name_or_path")}
    how |= {"device": model.device.type, "attention": config._attn_implementation, "torch": torch.__version__}
    if adapter := _adapter(model):
        how |= {"adapter": {**model.peft_config[adapter].to_dict(), "base_model_name_or_path": None}}
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if ".default." not in name:  # the policy's own
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, key: str, count: int) -> list[float] | None:
    """What was kept under this key; None where nothing was, or anything else than was written."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        logps = kept["logps"]
        if kept["key"] != key or kept["sha256"] != _checked(logps) or len(logps) != count:
            return None
        return logps if all(isinstance(each, float) and math.isfinite(each) for each in logps) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: str, logps: list[float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"key": key, "sha256": _checked(logps), "logps": logps}))


def _checked(logps: list[float]) -> str:
    return hashlib.sha256(json.dumps(logps).encode()).hexdigest()
