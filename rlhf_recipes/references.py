"""What a string names: a run, an adapter, a checkpoint, an ensemble, a model, a function, an id of the Hub.

    model.adapter  judge.adapter      find                 one adapter
    runs  parent                      find_policy          one adapter that answers
    reward_model  gold                find_reward_models   adapters that score, the members of an ensemble among them
    reward_funcs                      find_rewards         these, and models, functions and ids of the Hub
    checkpoints                       find_checkpoints     the adapters that a run kept of its steps

It is asked once, when a command starts; what is found, a `ModelRef`, is passed on.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes import adapter_files, places, run_folder
from rlhf_recipes.config import import_function, trainer_recipes
from rlhf_recipes.errors import Refusal
from rlhf_recipes.run_folder import read_config, read_json, read_result

ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_TEMPLATE = (
    "its tokenizer has no chat template to give it conversations as it was trained on them. Put that template beside "
    "it, as chat_template.jinja."
)
# Kinds of what is named: LoRA weights here; a folder that transformers reads; module:function; a repository.
ADAPTER, MODEL, FUNCTION, HUB = "adapter", "model", "function", "hub"


@dataclass(frozen=True)
class ModelRef:
    """What `key=reference` names.

    Attributes:
        reference: as typed; of an ensemble, the folder of the member.
        key: whose value it is, for refusals.
        kind: ADAPTER, MODEL, FUNCTION or HUB. All below but `function` is of adapters alone.
        adapter: the folder of its weights.
        base: id of the base model that it belongs to.
        task_type: PEFT's: SEQ_CLS of what scores, CAUSAL_LM of what answers.
        sha256: of its weights, None where it has none.
        recipe: what trained it; None of an adapter from elsewhere.
        started_from: what its run continued, as typed there; None for the base model.
        parent: lineage of what its run continued, or None.
        metrics: held-out metrics, as its run reports them.
        rewards: what its run was optimised against, of `identity`; None where its result does not say.
        step: of a checkpoint that `find_checkpoints` found, else None.
        function: what `module:function` names.
        anchored_to: its reference, where that is another run than it started from, as typed there.
        start_sha256: of the weights of its reference as it was trained, None where that is not known.
        named_base: what its files call its base, where that is another name and the user says that it is the same.
    """

    reference: str
    key: str
    kind: str = ADAPTER
    adapter: Path | None = None
    base: str | None = None
    task_type: str | None = None
    sha256: str | None = None
    recipe: str | None = None
    started_from: str | None = None
    parent: dict | None = None
    metrics: dict = field(default_factory=dict)
    rewards: list[str] | None = None
    step: int | None = None
    function: Callable | None = None
    named_base: str | None = None
    anchored_to: str | None = None
    start_sha256: str | None = None

    @property
    def name(self) -> str:
        """The name of its run, or of its folder."""
        return folder_of(self.adapter).name

    @property
    def lineage(self) -> dict[str, Any]:
        """What result.json and cards say of it and all that it comes from."""
        named = {"named_base": self.named_base} if self.named_base else {}
        named |= {"rewards": self.rewards} if self.rewards else {}
        found = {"run": self.reference, "recipe": self.recipe, "adapter_sha256": self.sha256, "parent": self.parent}
        return found | named

    @property
    def identity(self) -> str:
        """What tells it from others, whatever name it is given by: the hash of an adapter's weights; of a folder of
        transformers its last name, else what was typed."""
        return self.sha256 or (Path(self.reference).name if self.kind == MODEL else self.reference)

    @property
    def is_reward_model(self) -> bool:
        return self.recipe == "reward" if self.recipe else self.task_type == "SEQ_CLS"

    @property
    def start(self) -> Path | None:
        """Adapter folder of its reference: what it started from, unless it says otherwise; None for the base model."""
        reference = self.anchored_to or self.started_from
        return adapter_in(reference) if reference else None


def find(reference: str, key: str, base_model: str | None = None, adapter_base: str | None = None) -> ModelRef:
    """The adapter that a run folder or an adapter folder stands for.

    Args:
        base_model: the id that it must belong to.
        adapter_base: `model.adapter_base`; with `same`, whatever base it names is `base_model`.

    Raises:
        Refusal: none is there; its weights are not in safetensors; it would change the base or run code
            (`adapter_files`); it belongs to another base model; or its run does not say where it comes from.
    """
    adapter = adapter_in(reference)
    config = read_json(adapter / ADAPTER_CONFIG) if adapter else {}
    base = named = config.get("base_model_name_or_path")
    if adapter and base_model is not None and base != base_model:
        if adapter_base != "same":
            _refuse_other_base(reference, key, base, base_model)
        base = base_model
    if flaw := _flaw(reference):
        raise Refusal(f"{key}={reference}: {flaw}")
    home = folder_of(adapter)
    if base is None:
        raise Refusal(f"{key}={reference}: its {ADAPTER_CONFIG} names no base model. Add base_model_name_or_path.")
    if home.parent.name == run_folder.CHECKPOINTS and (run := _config_of(home.parents[1])):
        return _checkpoint(home, run, reference, key, base, named)
    result = read_result(home) or {}
    recipe, parent, metrics, anchor = (result.get(name) for name in ("recipe", "parent", "metrics", "reference"))
    anchor = anchor if isinstance(anchor, dict) else None
    sha256 = adapter_sha256(adapter)
    if not _is_lineage({"recipe": recipe, "adapter_sha256": sha256, "parent": parent}):
        raise Refusal(
            f"{key}={reference}: {home / run_folder.RESULT} does not say which runs it comes from (recipe, "
            "adapter_sha256 and parent of each). Restore it, or give the folder of the adapter alone."
        )
    return ModelRef(
        str(reference),
        key,
        adapter=adapter,
        base=base,
        named_base=named if named != base else None,
        task_type=config.get("task_type"),
        sha256=sha256,
        recipe=recipe,
        started_from=(parent or {}).get("run"),
        parent=parent,
        metrics=metrics if isinstance(metrics, dict) else {},
        rewards=names_in(result.get("rewards")),
        anchored_to=(anchor or {}).get("run"),
        start_sha256=(anchor or parent or {}).get("adapter_sha256"),
    )


def _checkpoint(
    adapter: Path, config: dict, reference: str, key: str, base: str, named: str | None, step: int | None = None
) -> ModelRef:
    """One of a run's: it comes from what the run comes from, which has a result only where it is finished.

    Args:
        config: of the run.
        named: what its files call its base.
    """
    home = adapter.parents[1]
    result = read_result(home) or {}
    started_from, anchored_to = config["model"].get("adapter"), config.get("reference")
    began = f"reference={anchored_to}" if anchored_to else f"model.adapter={started_from}"
    parent = result.get("parent")
    start = adapter_in(started_from) if started_from and not result and is_adapter(started_from) else None
    if start and start.parent.name != run_folder.CHECKPOINTS:  # of these a chain might have no end
        parent = find(started_from, "model.adapter").lineage
    return ModelRef(
        str(reference),
        key,
        adapter=adapter,
        base=base,
        named_base=named if named != base else None,
        task_type=read_json(adapter / ADAPTER_CONFIG).get("task_type"),
        sha256=adapter_sha256(adapter),
        recipe=trainer_recipes().get(config["trainer"].get("_target_")),
        started_from=started_from,
        anchored_to=anchored_to,
        parent=parent if _is_lineage(parent) else None,
        start_sha256=run_folder.inputs(home).get(began),
        rewards=names_in(result.get("rewards")),
        step=step,
    )


def find_policy(reference: str, key: str, base_model: str, adapter_base: str | None = None) -> ModelRef:
    """The adapter of a policy, for `runs` and `parent`.

    Raises:
        Refusal: as `find`; it is a reward model; or what it started from is gone, or was trained again.
    """
    return _in_role(find(reference, key, base_model, adapter_base), reward_model=False)


def find_reward_models(
    references: str | list[str] | None, key: str, base_model: str, adapter_base: str | None = None
) -> list[ModelRef]:
    """The reward models of `reward_model` or `gold`: none, one, or the members of an ensemble.

    Raises:
        Refusal: as `find` and `expand`; one is named twice, or none; or one is no reward model.
    """
    if references is None:
        return []
    given = [references] if isinstance(references, str) else list(map(str, references))
    folders = expand(given, key)
    if len(set(folders)) < len(folders) or not folders:
        raise Refusal(f"{key}={given}: must name one run or more, each once. Change the list.")
    return [_in_role(find(folder, key, base_model, adapter_base), reward_model=True) for folder in folders]


def find_rewards(
    references: str | list[str], base_model: str | None = None, adapter_base: str | None = None
) -> list[ModelRef]:
    """What `reward_funcs` names, with the members of an ensemble for its folder. No model is loaded.

    Args:
        base_model: with `model.adapter_base=same`, the base of adapters from elsewhere, whatever they call it. Runs of
            recipes/reward.py may have a base of their own.
        adapter_base: `model.adapter_base`.

    Raises:
        Refusal: as `find_reward` and `expand`; or nothing is named.
    """
    given = [references] if isinstance(references, str) else list(references)
    if not given:
        raise Refusal("reward_funcs: empty. Give a run of recipes/reward.py, or module:function.")
    return [find_reward(each, base_model, adapter_base) for each in expand(given, "reward_funcs")]


def find_reward(reference: str, base_model: str | None = None, adapter_base: str | None = None) -> ModelRef:
    """One of `reward_funcs`: a reward model (run, adapter, folder of transformers or id of the Hub), or a function.

    Args:
        base_model, adapter_base: see `find_rewards`.

    Raises:
        Refusal: it is none of these, or a run of another recipe.
    """
    key, folder = "reward_funcs", Path(reference)
    if folder.is_dir():
        result = read_result(folder)
        made_by = (result or {}).get("recipe", "reward")
        if made_by != "reward":
            raise Refusal(f"{key}={reference}: is a run of {made_by}. Give one of recipes/reward.py.")
        if adapter_in(reference):
            is_same = adapter_base == "same" and result is None
            return find(reference, key, base_model if is_same else None, adapter_base)
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            refuse_other_model(reference, key, config)
            if config.get("architectures") and not _has_template(folder):
                raise Refusal(f"{key}={reference}: {NO_TEMPLATE}")
            return ModelRef(reference, key, MODEL)
        raise Refusal(f"{key}={reference}: holds no model (is the run finished?). Give another.")
    if ":" in reference:
        return ModelRef(reference, key, FUNCTION, function=import_function(reference, key))
    if places.on_hub(reference, key, bare=True):
        return ModelRef(reference, key, HUB)
    raise Refusal(
        f"{key}={reference}: no such folder. Give a run of recipes/reward.py, a folder with a model, "
        "module:function, or an id of the Hub."
    )


def refuse_other_model(reference: str, key: str, config: dict) -> None:
    """Refuse a model of transformers, by its config.json, that does not score a text with one number.

    Raises:
        Refusal: it is no sequence classifier, or has several outputs.
    """
    names = config.get("architectures")
    if not names:
        return  # it says nothing of itself
    if not any("SequenceClassification" in name or "Reward" in name for name in names):
        raise Refusal(
            f"{key}={reference}: is a {names[0]}, which has no score head; a random one would be put on. Give a "
            "sequence-classification model."
        )
    labels = config.get("id2label")
    outputs = len(labels) if labels else config.get("num_labels", 2)  # what transformers takes where nothing says it
    if outputs != 1:
        raise Refusal(f"{key}={reference}: gives {outputs} values for a text, a reward model gives 1. Choose another.")


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings).get("chat_template"))


def find_checkpoints(reference: str, base_model: str) -> list[ModelRef]:
    """The whole checkpoints of a run, in the order of steps.

    Args:
        reference: a run folder, or the folder of its checkpoints.

    Raises:
        Refusal: there are none; one would change the base or run code; the run is of another base or of a reward
            model; or what it started from is gone, or was trained again.
    """
    key, home, config = "checkpoints", _home(reference), config_of(reference)
    finished = (home / run_folder.RESULT).is_file()
    folders = {
        int(folder.name.rpartition("-")[2]): folder
        for folder in (home / run_folder.CHECKPOINTS).glob("checkpoint-*")
        # trainer_state.json comes last: without it, the run was killed while the checkpoint was written
        if (folder / ADAPTER_CONFIG).is_file() and (finished or (folder / "trainer_state.json").is_file())
    }
    for folder in folders.values():
        given = (folder / WEIGHTS).is_file()
        if given and (flaw := adapter_files.flaw(read_json(folder / ADAPTER_CONFIG), folder / WEIGHTS)):
            raise Refusal(f"{key}={reference}: {folder.name}: {flaw}")
    if not folders:
        raise Refusal(
            f"{key}={reference}: holds no checkpoint. A run keeps them all with trainer.save_total_limit=null "
            "(trainer.save_steps says how often they are written). Train it again with that."
        )
    base = config["model"]["id"]
    if base != base_model:
        _refuse_other_base(reference, key, base, base_model)
    recipe = trainer_recipes().get(config["trainer"].get("_target_"))
    if recipe == "reward":
        raise Refusal(f"{key}={reference}: is a run of reward, not a policy. Give one of ppo or dpo, say.")
    found = [_checkpoint(each, config, reference, key, base, base, step) for step, each in sorted(folders.items())]
    return [_in_role(each, reward_model=False) for each in found]


def config_of(reference: str) -> dict:
    """The config of the run whose checkpoints are named.

    Raises:
        Refusal: it is no training.
    """
    config = _config_of(_home(reference))
    if config is None:
        raise Refusal(f"checkpoints={reference}: is no run of a training. Give a run folder such as outputs/ppo/main.")
    return config


def _config_of(home: Path) -> dict | None:
    """The config of a training by its folder; None where it is none."""
    config = read_config(home) if (home / run_folder.CONFIG).is_file() else {}
    return config if all(isinstance(config.get(group), dict) for group in ("model", "trainer")) else None


def names_in(found: Any) -> list[str] | None:
    """A list of texts, which a file may lack or hold wrongly."""
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else None


def expand(references: list[str], key: str) -> list[str]:
    """The references, with the jobs of a sweep (`reward=ensemble`) for its folder.

    Raises:
        Refusal: a job is not finished.
    """
    found = []
    for reference in references:
        jobs = jobs_of(reference)
        for job in jobs:
            if not (job / run_folder.RESULT).is_file():
                raise Refusal(f"{key}={reference}: {job.name} is not finished. Finish it, or list the others.")
        found += map(str, jobs or [reference])
    return found


def jobs_of(reference: str) -> list[Path]:
    """The jobs of a sweep in their order, of its folder; empty of anything else."""
    folder = Path(reference)
    if not folder.is_dir() or (folder / "adapter").is_dir() or (folder / ADAPTER_CONFIG).is_file():
        return []
    return sorted(path.parent for path in folder.glob(f"*/{run_folder.CONFIG}"))


def is_adapter(reference: str) -> bool:
    """Whether a string names an adapter that may be loaded."""
    return _flaw(reference) is None


def adapter_in(reference: str | Path) -> Path | None:
    """The adapter folder of a run folder, or the folder itself where it is one; else None."""
    folders = (Path(reference) / "adapter", Path(reference))
    return next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)


def folder_of(adapter: str | Path) -> Path:
    """The run folder of an adapter, or the adapter's own folder where it is in none."""
    return Path(adapter).parent if Path(adapter).name == "adapter" else Path(adapter)


def home_of(reference: str | Path) -> Path:
    """The run that an adapter, or a checkpoint, lies in; else the folder itself."""
    folder = folder_of(adapter_in(reference) or reference)
    return folder.parents[1] if folder.parent.name == run_folder.CHECKPOINTS else _home(str(folder))


def trained_with(adapter: str | Path) -> dict[str, Any] | None:
    """`model.chat_template_kwargs` of the run that an adapter, or a checkpoint, lies in; None where no run tells."""
    home = home_of(adapter)
    model = read_config(home).get("model") if run_folder.marked(home) else None
    return (model.get("chat_template_kwargs") or {}) if isinstance(model, dict) else None


def adapter_sha256(adapter: Path) -> str | None:
    """SHA-256 of the adapter's weights file; None where it has none."""
    weights = adapter / WEIGHTS
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def _flaw(reference: str) -> str | None:
    """Why a string names no adapter that may be loaded, and what to do; None where it does."""
    adapter = adapter_in(reference)
    if adapter is None:
        what = "has no adapter in it (is the run finished?)" if Path(reference).is_dir() else "does not exist"
        return f"{what}. Give a run folder such as outputs/sft/main."
    if not (adapter / WEIGHTS).is_file():
        pickled = (adapter / "adapter_model.bin").exists()
        what = "adapter_model.bin is a pickle, which can run code" if pickled else "the weights are missing"
        return f"has no {WEIGHTS}; {what}. Save the adapter as safetensors."
    return adapter_files.flaw(read_json(adapter / ADAPTER_CONFIG), adapter / WEIGHTS)


def _refuse_other_base(reference: str, key: str, base: str | None, base_model: str) -> None:
    node = key.removesuffix(".adapter") if key.endswith(".adapter") else "model"
    # A run of ours names the public id; others may name a packed copy, or a folder of another machine.
    foreign = not (folder_of(adapter_in(reference) or reference) / run_folder.RESULT).is_file()
    same = f" If these are the same weights under another name, add {node}.adapter_base=same." if foreign else ""
    raise Refusal(
        f"{key}={reference}: was trained on {base}, not on {node}.id={base_model}. Choose the model it belongs "
        f"to.{same}"
    )


def _in_role(found: ModelRef, reward_model: bool) -> ModelRef:
    """Refuse a reward model as a policy, a policy as a reward model, a run without what it started from, and a policy
    whose reference has other weights than those that it was trained against."""
    if found.is_reward_model != reward_model:
        what = "a reward model" if found.is_reward_model else "no reward model"
        is_one = f"a run of {found.recipe}" if found.recipe else what
        wanted = "a run of recipes/reward.py" if reward_model else "a policy; a reward model goes to reward_model="
        raise Refusal(f"{found.key}={found.reference}: is {is_one}, not {wanted}.")
    reference = found.anchored_to or found.started_from
    if reference and not is_adapter(reference):
        raise Refusal(
            f"{found.key}={found.reference}: started from {reference}, its reference, which is not there. "
            "Put that run back, or evaluate where both were trained."
        )
    before = None if reward_model else reference and found.start_sha256
    if before and (now := adapter_sha256(adapter_in(reference))) != before:
        raise Refusal(
            f"{found.key}={found.reference}: was trained against {reference}, whose weights are others since (SHA-256 "
            f"{before[:12]}, then {str(now)[:12]}). Put those back, or train this run again."
        )
    return found


def _is_lineage(found: Any) -> bool:
    """Whether it has what cards and later runs read of a run and all that it comes from."""
    while found is not None:
        if not isinstance(found, dict) or not {"recipe", "adapter_sha256", "parent"} <= found.keys():
            return False
        if any(not isinstance(found.get(key), str | None) for key in ("run", "recipe", "adapter_sha256")):
            return False
        found = found["parent"]
    return True


def _home(reference: str) -> Path:
    """The run whose checkpoints lie in the folder, or the folder itself."""
    folder = Path(reference)
    return folder.parent if folder.name == run_folder.CHECKPOINTS else folder
