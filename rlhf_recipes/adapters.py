"""Several adapters on one base model, switched on in turn."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from rlhf_recipes import inference as m
from rlhf_recipes import models
from rlhf_recipes.config import part_of
from rlhf_recipes.references import folder_of

BASE = "base"


@dataclass
class System:
    """A run under evaluation.

    Attributes:
        name: how tables call it: recipe, and the run's name where it differs.
        adapter: its folder, None for the base model.
        recipe: the recipe that made it.
        reference: adapter folder of what it started from, None for the base model.
        step: of a checkpoint, else None.
        rewards: of `lineage.trained_on`.
        judges: of `lineage.labelled_by`.
        sha256: of its weights as it was found, None for the base model.
    """

    name: str
    adapter: str | None = None
    recipe: str | None = None
    reference: str | None = None
    step: int | None = None
    rewards: frozenset = frozenset()
    judges: frozenset = frozenset()
    sha256: str | None = None


class Policies:
    """One base model with the adapters of all systems and of their references on it.

    Args:
        fast: whether what sequences begin with goes through it once: `fast_forward` of the config.

    Attributes:
        scores: whether it gives log-probabilities of given tokens.
    """

    scores = True

    def __init__(self, model: DictConfig, quantization: DictConfig, systems: list[System], fast: bool = False):
        from transformers import AutoModelForCausalLM

        from rlhf_recipes import packing

        self.folders = list(dict.fromkeys(f for s in systems for f in (s.reference, s.adapter)))
        self.model = models.load_frozen(model, quantization, AutoModelForCausalLM)
        for folder in filter(None, self.folders):
            self.model = models.put_on(self.model, folder, folder, self._name(folder))
        if fast:
            packing.allow(self.model)

    def _name(self, folder: str) -> str:
        return f"adapter{self.folders.index(folder)}"

    @contextmanager
    def using(self, folder: str | None):
        """The model as the adapter of `folder`, or as the base."""
        if folder is None:
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext():
                yield self.model
        else:
            self.model.set_adapter(self._name(folder))
            yield self.model

    def generate(self, folder: str | None, tokenizer, prompts: list, how: m.Sampling, what: str, part=(0, 1)) -> list:
        """As of `inference.generate`."""
        with self.using(folder) as model:
            return m.generate(model, tokenizer, prompts, how, what, part)

    def token_logps(self, folder: str | None, tokenizer, encoded: list[tuple[list[int], int]], what: str) -> list:
        """As of `inference.token_logps`."""
        with self.using(folder) as model:
            return m.token_logps(model, tokenizer.pad_token_id, encoded, what)

    def pair_logps(self, folder: str | None, tokenizer, rows: list[dict], kept: slice = m.WHOLE) -> list[dict]:
        with self.using(folder) as model:
            return m.pair_logps(model, tokenizer, rows, f"{short_name(folder)}: pairs", kept=kept)

    def neutral(self, system: System, tokenizer, texts: list[str]) -> list[list[float]]:
        """[negative log-likelihood, tokens] of each paragraph."""
        with self.using(system.adapter) as model:
            return [[-logp, tokens] for logp, tokens in m.text_logps(model, tokenizer, texts, f"{system.name}: text")]

    def answers(self, system: System, parent: System, tokenizer, prompts: list[dict], cfg: DictConfig) -> list[dict]:
        """An answer to each prompt, with k1 and k3 of another answer sampled at temperature 1; None for those that are
        not of this part (`cfg.shards`)."""
        asked, part = [row["prompt"] for row in prompts], part_of(cfg.shards)
        how = m.Sampling(cfg.max_new_tokens, cfg.temperature, cfg.seed)
        shown = self.generate(system.adapter, tokenizer, asked, how, f"{system.name}: answers", part)
        answered = [answer for answer in shown if answer]
        if system is parent:
            for answer in answered:
                answer |= {"k1": 0.0, "k3": 0.0}
            return shown
        how = replace(how, temperature=1.0)
        sampled = self.generate(system.adapter, tokenizer, asked, how, f"{system.name}: samples", part)
        encoded = [(answer["ids"], answer["start"]) for answer in sampled if answer]
        own = self.token_logps(system.adapter, tokenizer, encoded, f"{system.name}: KL")
        reference = self.token_logps(parent.adapter, tokenizer, encoded, f"{system.name}: KL, parent")
        for answer, p, q in zip(answered, own, reference, strict=True):
            answer["k1"], answer["k3"] = m.kl_terms(p, q)
        return shown


class RewardModels:
    """One base model with the adapters of several reward models on it, each with its own score head.

    Args:
        fast: as of `Policies`.
    """

    def __init__(self, model: DictConfig, quantization: DictConfig, folders: list[Path], fast: bool = False):
        from transformers import AutoModelForSequenceClassification

        from rlhf_recipes import packing

        self.folders = list(dict.fromkeys(folders))
        base = models.load_frozen(model, quantization, AutoModelForSequenceClassification, num_labels=1)
        self.model = base
        for n, folder in enumerate(self.folders):
            self.model = models.put_on(self.model, folder, str(folder), f"member{n}")
        if fast:
            packing.allow(self.model)
        self.text_config = base.config.get_text_config()
        self.pad_ids = [models.pad_id_beside(each, self.text_config.pad_token_id) for each in self.folders]

    def using(self, folder: Path):
        """The model as the reward model of this folder, which reads where that was trained."""
        n = self.folders.index(folder)
        self.model.set_adapter(f"member{n}")
        self.text_config.pad_token_id = self.pad_ids[n]
        return self.model


def short_name(folder: str | None) -> str:
    return BASE if folder is None else folder_of(folder).name
