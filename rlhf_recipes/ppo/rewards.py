"""Where rewards come from: reward models on the policy's backbone, reward models of their own, functions."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_recipes import inference, model_files, models, packing, places
from rlhf_recipes.adapter_files import HEADS
from rlhf_recipes.data.template import as_taken, render
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.ensemble import SMALLEST
from rlhf_recipes.errors import Refusal, first_line, users_function
from rlhf_recipes.ppo.roles import Roles, lay_out
from rlhf_recipes.references import (
    ADAPTER,
    FUNCTION,
    HUB,
    NO_TEMPLATE,
    ModelRef,
    find_reward,
    refuse_other_model,
)
from rlhf_recipes.text import line


@dataclass
class LearnedReward:
    """A sequence classifier, read where it was trained: see `inference.read_positions`.

    Attributes:
        name: for the log.
        tokenizer: its own; conversations reach it as text.
        read: token ids of B sequences -> scores_B, float32.
        adapter: the adapter's name where it shares the policy's backbone, else None.
        score: the head where it shares the policy's backbone, else None.
        scale: mean and standard deviation of its rewards of held-out replies, as its run reports them, else None.
    """

    name: str
    tokenizer: object
    read: Callable[[list[list[int]]], Tensor]
    adapter: str | None = None
    score: nn.Module | None = None
    scale: tuple[float, float] | None = None

    def __call__(self, prompts: list, completions: list, micro_batch: int) -> list[float]:
        encoded = [self._encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), micro_batch):
            indices = order[start : start + micro_batch]
            for i, score in zip(indices, self.read([encoded[i] for i in indices]).tolist(), strict=True):
                scores[i] = score
        return scores

    def _encode(self, prompt, completion) -> list[int]:
        """Control tokens that the policy spells in letters stay letters."""
        plain = isinstance(prompt, str)
        turns = {
            "prompt": [{"role": "user", "content": prompt}] if plain else prompt,
            "completion": [{"role": "assistant", "content": completion}] if plain else completion,
        }
        row = neutralise([turns], self.tokenizer)[0][0]
        if plain:
            text = row["prompt"][0]["content"] + row["completion"][0]["content"]
            return [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
        return render(self.tokenizer, as_taken(self.tokenizer, row["prompt"]) + row["completion"], return_dict=False)


def load_all(references, tokenizers, roles: Roles, tokenizer, args) -> list[Callable]:
    """What `reward_funcs` names, one or a list of what `load` takes.

    Args:
        tokenizers: one or a list of `reward_processing_classes`.

    Raises:
        Refusal: as `load`; none is named, or not as many tokenizers.
    """
    references = references if isinstance(references, list) else [references]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(references)
    if not references or len(tokenizers) != len(references):
        raise Refusal("reward_funcs: at least one, and as many reward_processing_classes if these are given.")
    return [load(each, roles, tokenizer, own, args) for each, own in zip(references, tokenizers, strict=True)]


def load(reference, roles: Roles, tokenizer, reward_tokenizer, args) -> Callable:
    """What `reward_funcs` names, as something to call.

    Args:
        reference: a run of recipes/reward.py (or an adapter folder), a sequence-classification model (its id, folder
            or itself), `module:function`, what `references.find_reward` makes of one of these, or a function.
        reward_tokenizer: for a model of its own; None: the one beside it.

    Raises:
        Refusal: it is none of these.
    """
    if callable(reference) and not isinstance(reference, nn.Module):
        return reference
    if isinstance(reference, nn.Module):
        return _own_model(reference, reference.config._name_or_path, reward_tokenizer)
    found = reference if isinstance(reference, ModelRef) else find_reward(reference)
    if found.kind == FUNCTION:
        return found.function
    if found.kind == HUB:
        _look_at(found)
    if found.kind != ADAPTER:
        model = _load_classifier(found.reference, args)
        return _with_template(_own_model(model, found.reference, reward_tokenizer), found)
    base, adapter, scale = found.base, str(found.adapter), _scale(found.metrics)
    if roles.shared and base in (getattr(roles.causal, "public_id", None), roles.causal.name_or_path):
        name = f"reward_{sum(key.startswith('reward_') for key in roles.model.peft_config)}"
        score = roles.add_reward(found.adapter, name)
        pad_id = models.pad_id_beside(found.adapter, tokenizer.pad_token_id)
        return replace(_on_backbone(roles, name, score, tokenizer, found.name, pad_id), scale=scale)
    base = roles.causal.name_or_path if base == getattr(roles.causal, "public_id", None) else base
    try:
        classifier = _load_classifier(base, args, HEADS)
    except Refusal as refusal:
        same = "" if found.recipe else " If it is model.id under another name, add model.adapter_base=same."
        _, _, why = str(refusal).partition(": ")
        raise Refusal(
            f"reward_funcs={found.reference}: its base model, {base}, cannot be had: {why}{same}"
        ) from refusal
    model = models.put_on(classifier, adapter, f"reward_funcs={found.reference}")
    text_config = model.get_base_model().config.get_text_config()
    text_config.pad_token_id = models.pad_id_beside(found.adapter, text_config.pad_token_id)
    return replace(_with_template(_own_model(model, adapter, reward_tokenizer, found.name), found), scale=scale)


def scales(functions: list[Callable], ensemble: str) -> Tensor:
    """Mean and standard deviation of each function's rewards, (0, 1) where it is not known; shape (R, 2).

    A reward is identified up to an offset and a scale of its own: the worst of several as they come is that with the
    lowest offset (Coste et al. 2023, arXiv:2310.02743, standardise too). A `sum` takes rewards as they are.
    """
    if ensemble == "sum":
        return torch.tensor([(0.0, 1.0)] * len(functions))
    unknown = [f.name for f in functions if isinstance(f, LearnedReward) and not f.scale]
    if unknown:
        who = line(", ".join(unknown))
        print(
            f"reward_ensemble={ensemble}: the run of {who} does not say the mean and deviation of its rewards; they "
            "are taken as they are"
        )
    return torch.tensor([getattr(function, "scale", None) or (0.0, 1.0) for function in functions])


def name_of(function: Callable) -> str:
    kind = type(function).__name__
    return function.name if isinstance(function, LearnedReward) else getattr(function, "__name__", kind)


def names(functions: list[Callable]) -> list[str]:
    """Their names, numbered where several are called alike."""
    found = [name_of(function) for function in functions]
    return [f"{name}_{i}" if found.count(name) > 1 else name for i, name in enumerate(found)]


def call(
    function: Callable, rows: list[dict], completions: list, completion_ids: list, state, micro_batch: int
) -> list:
    """Rewards of the completions, None where the function does not apply.

    Raises:
        Refusal: not a list of as many finite numbers.
    """
    prompts = [row["prompt"] for row in rows]
    if isinstance(function, LearnedReward):
        return function(prompts, completions, micro_batch)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    with users_function(f"reward_funcs={name_of(function)}"):
        rewards = function(
            prompts=prompts, completions=completions, completion_ids=completion_ids, trainer_state=state, **columns
        )
    if inspect.isawaitable(rewards):
        raise Refusal(f"reward_funcs={name_of(function)}: is asynchronous. Give a plain function.")
    if len(rewards) != len(rows):
        raise Refusal(f"reward_funcs={name_of(function)}: gave {len(rewards)} rewards for {len(rows)} completions.")
    for reward in rewards:
        if reward is not None and not torch.isfinite(torch.tensor(float(reward))):
            raise Refusal(f"reward_funcs={name_of(function)}: gave {reward}. Give finite numbers, or None to abstain.")
    return rewards


def _on_backbone(
    roles: Roles, adapter: str, score: nn.Module, tokenizer, name: str, pad_id: int | None
) -> LearnedReward:
    device = roles.head.weight.device

    def read(sequences):
        at_B = inference.read_positions(*packing.right_pad(sequences, _fill(pad_id), device), pad_id)
        ids_PL, index_BT, packed = lay_out(sequences, _fill(pad_id), device, roles.find_rows(sequences))
        with roles.acting(adapter) as decoder:
            states_NH = roles.states(decoder, ids_PL, packed).flatten(0, 1)
        return _score(score, states_NH[index_BT.gather(1, at_B[:, None])[:, 0]])

    return LearnedReward(name, tokenizer, read, adapter, score)


def _own_model(model, path: str, tokenizer, name: str | None = None) -> LearnedReward:
    tokenizer = tokenizer or models.tokenizer_in(path)
    model = model.requires_grad_(False).eval()
    models.keep_gradients_on_cpu(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, score = base.base_model, getattr(base, "score", None)
    pad_id = base.config.get_text_config().pad_token_id

    def read(sequences):
        ids_BT, mask_BT = packing.right_pad(sequences, _fill(pad_id), model.device)
        if score is None:
            return model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float()
        hidden_BTH = decoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        at_B = inference.read_positions(ids_BT, mask_BT, pad_id)
        return _score(score, hidden_BTH[torch.arange(len(at_B), device=at_B.device), at_B])

    return LearnedReward(name or path.rsplit("/", 1)[-1], tokenizer, read)


def _fill(pad_id: int | None) -> int:
    return max(pad_id or 0, 0)  # some configs say -1


def _score(score: nn.Module, hidden_BH: Tensor) -> Tensor:
    """The head, in its own precision whatever the one around."""
    with torch.autocast(hidden_BH.device.type, enabled=False):
        return score(hidden_BH.to(next(score.parameters()).dtype))[:, 0].float()


def _with_template(reward: LearnedReward, found: ModelRef) -> LearnedReward:
    if reward.tokenizer.chat_template is None:
        raise Refusal(f"{found.key}={found.reference}: {NO_TEMPLATE}")
    return reward


def _look_at(found: ModelRef) -> None:
    """What `find_reward` sees in a folder, of a repository, before its weights are fetched."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(found.reference, trust_remote_code=False)
    except (OSError, ValueError):  # `_load_classifier` says it
        return
    refuse_other_model(found.reference, found.key, config.to_dict())


def _load_classifier(path: str, args, heads: tuple[str, ...] = ()):
    """`heads`: of `model_files.whole`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if places.on_hub(path, "reward_funcs", bare=True):
        places.say_from_hub("reward model", path)
    elif not Path(path).is_dir():
        raise Refusal(f"reward_funcs={path}: no such folder, and no id of the Hub. Check it.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model_files.refuse_sizes(config.to_dict(), "reward_funcs", path)
        model_files.refuse_kernels(config, "reward_funcs", path)
        given = {"trust_remote_code": False, **(args.model_init_kwargs or {}), "output_loading_info": True}
        loaded = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **given)
        return model_files.whole(loaded, f"reward_funcs={path}", heads).to(args.device)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise Refusal(f"reward_funcs={path}: brings Python code of its own, which is not run (auto_map).") from error
    except OSError as error:
        raise Refusal(
            f"reward_funcs={path}: neither a run, nor module:function, nor a model ({first_line(error)})"
        ) from error


def _scale(metrics: dict) -> tuple[float, float] | None:
    mean, sd = (getattr(metrics.get(name), "value", None) for name in ("mean_reward", "sd_reward"))
    return (mean, sd) if mean is not None and sd and sd > SMALLEST * abs(mean) else None
