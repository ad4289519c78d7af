"""README.md of what is published: metadata that the Hub reads, the snippet that loads it, what was measured, limits.

Whatever data, a config, a result.json or a server says goes through `text.markdown` or `text.code`, in the metadata
`text.line`.
"""

import importlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from rlhf_recipes import methods
from rlhf_recipes.cai import report
from rlhf_recipes.config import CONF, flatten
from rlhf_recipes.data.readers import is_hub_id
from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation.definitions import METRICS
from rlhf_recipes.publish.contents import PAGE, Source, targets
from rlhf_recipes.publish.upload import MARK
from rlhf_recipes.stats import Estimate, format_estimate
from rlhf_recipes.text import code, line, markdown
from rlhf_recipes.training.card import chain, device, examined, measured, recipe_of, without_folder

PROVEN = "Proven by a round trip"


@dataclass
class Facts:
    """What a card says beyond what its run left.

    Attributes:
        repo_id: on the Hub, or a placeholder.
        base: of `base_model.describe`.
        evaluation: of `checks.evaluation`; None without one.
        merged: of `merge.report`; None for an adapter.
        dtype: of the numbers; None for a data set.
        fingerprint: SHA-256 of what is published.
    """

    repo_id: str
    base: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    merged: dict[str, Any] | None = None
    dtype: str | None = None
    fingerprint: str = ""


def write(source: Source, facts: Facts, proof: dict | str | None) -> str:
    """The card.

    Args:
        proof: what the round trip found; None before it; a sentence where it failed.
    """
    return (_data_card if source.key == "pairs" else _model_card)(source, facts, proof)


def is_proven(card: str, fingerprint: str) -> bool:
    """Whether a card on the Hub says that exactly these files came back as they went."""
    return PROVEN in card and fingerprint in card


def _model_card(source: Source, facts: Facts, proof: dict | str | None) -> str:
    result, base = source.result, facts.base
    what = "Merged weights" if facts.merged else "LoRA adapter"
    parts = [
        f"# {what}: {source.recipe} on {markdown(base['id'])}",
        f"{methods.of(source.recipe).cited}, trained with TRL by rlhf-recipes.",
        _proof(proof, facts),
        "## Use",
        f"```python\n{snippet(source, facts)}```",
        "## Held-out metrics",
        f"{_before(result)} {measured(result)}",
        examined(result.get("doctor")).rstrip(),
        _evaluated(facts.evaluation),
        _merged(facts.merged),
        "## Chain",
        chain(f"{base['id']}{'@' + base['revision'][:12] if base['revision'] else ''}", result),
        _base(base),
        _constitution(source),
        "## Settings",
        _settings(source.config),
        _hardware(result),
        "![The training](curves.png)" if (source.dir / "curves.png").is_file() else "",
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(source, facts)),
    ]
    head = f"---\n{_metadata(source, facts, broken=isinstance(proof, str)).to_yaml()}\n---\n"
    return head + "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _metadata(source: Source, facts: Facts, broken: bool):
    from huggingface_hub import ModelCardData

    reward, base = source.recipe == "reward", facts.base
    data = source.config["data"]["path"]
    terms = {key: line(base[key]) for key in ("license", "license_name", "license_link") if base[key]}
    return ModelCardData(
        base_model=line(base["id"]),
        base_model_relation="finetune" if facts.merged else "adapter",
        datasets=[data] if _is_on_the_hub(data) else None,
        library_name="transformers" if facts.merged else "peft",
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=[MARK, "trl", *([] if facts.merged else ["lora"]), source.recipe, *(["broken"] if broken else [])],
        model_name=line(f"{source.recipe} on {base['id'].rpartition('/')[2]}"),
        eval_results=_eval_results(source),
        **terms,
    )


def _eval_results(source: Source) -> list:
    """The held-out metrics in the form that the Hub shows; n, interval and the value before as arguments."""
    from huggingface_hub import EvalResult

    task = "text-classification" if source.recipe == "reward" else "text-generation"
    data = source.config["data"]
    name = code(without_folder(data["path"]))
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=f"{name} (held-out prompts)",
            dataset_split=data["test_split"] and line(data["test_split"]),
            metric_type=line(key),
            metric_name=line(key.replace("_", " ")),
            metric_value=round(after.value, 6),
            metric_args={
                "n": after.n,
                "low": _rounded(after.low),
                "high": _rounded(after.high),
                "before": _rounded(source.result["before"][key].value),
            },
        )
        for key, after in source.result["metrics"].items()
        if after.value is not None and not key.startswith("baseline_")
    ]


def snippet(source: Source, facts: Facts) -> str:
    """Plain peft and transformers: the base as it was trained on, what is published, one use of it."""
    reward, here = source.recipe == "reward", json.dumps(facts.repo_id)
    auto, name = "AutoModelForCausalLM", "policy"
    if reward:
        auto, name = "AutoModelForSequenceClassification", "reward_model"
    options = [*(["num_labels=1"] if reward else []), f"dtype=torch.{facts.dtype}"]
    if facts.merged:
        lines = ["import torch", f"from transformers import {auto}, AutoTokenizer", ""]
        lines += [f"{name} = {auto}.from_pretrained({here}, {', '.join(options)})"]
    else:
        quantization = _quantization(source.config["quantization"], facts.dtype)
        more = ", BitsAndBytesConfig" if quantization else ""
        lines = ["import torch", "from peft import PeftModel"]
        lines += [f"from transformers import {auto}, AutoTokenizer{more}", "", *quantization]
        base = facts.base
        options = [*([f"revision={json.dumps(base['revision'])}"] if base["revision"] else []), *options]
        options += ["quantization_config=quantization"] if quantization else []
        lines += [f"base = {auto}.from_pretrained(", f"    {json.dumps(base['id'])},"]
        lines += [*(f"    {option}," for option in options), ")", f"{name} = PeftModel.from_pretrained(base, {here})"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({here})"]
    if reward and not facts.merged:  # merged weights come with a config that says it
        lines += ["# A score is read at the last token that is not padding."]
        lines += ["reward_model.config.get_text_config().pad_token_id = tokenizer.pad_token_id"]
    told = source.config["model"].get("chat_template_kwargs") or {}
    # What is no name stands in a config that somebody made up: it would be code here.
    named = {key: value for key, value in told.items() if str(key).isidentifier() and value is not None}
    options = "".join(f", {key}={value!r}" for key, value in named.items())
    return "\n".join([*lines, "", *(_scoring(options) if reward else _answering(options))]) + "\n"


def _quantization(node: dict[str, Any], dtype: str) -> list[str]:
    """The lines that quantize the base as `models.build_quantization` does."""
    if "_target_" not in node:
        return []
    given = {key: _literal(value) for key, value in node.items() if key != "_target_" and value is not None}
    if node.get("load_in_4bit"):
        given.setdefault("bnb_4bit_compute_dtype", f"torch.{dtype}")
    given.setdefault("llm_int8_skip_modules", '["lm_head", "score"]')
    return ["quantization = BitsAndBytesConfig(", *(f"    {key}={value}," for key, value in given.items()), ")"]


def _literal(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float) else json.dumps(value)


def _answering(options: str) -> list[str]:
    """Lines that answer a message; `options`: what else the chat template is told."""
    return [
        'messages = [{"role": "user", "content": "Can I move my appointment to Friday?"}]',
        "inputs = tokenizer.apply_chat_template(",
        f'    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{options}',
        ")",
        "answer = policy.generate(**inputs.to(policy.device), max_new_tokens=64)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _scoring(options: str) -> list[str]:
    """Lines that score a conversation."""
    return [
        "messages = [",
        '    {"role": "user", "content": "Can I move my appointment to Friday?"},',
        '    {"role": "assistant", "content": "Yes. Which time on Friday suits you?"},',
        "]",
        f'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True{options})',
        "with torch.no_grad():",
        "    score = reward_model(**inputs.to(reward_model.device)).logits[0, 0]",
        "print(score.item())  # higher is better; only differences mean something",
    ]


def _proof(proof: dict | str | None, facts: Facts) -> str:
    """What stands at the top: a reader must not take what is not proven for what is."""
    if proof is None:
        return "> **Not proven.** These files were not yet loaded again after their upload. Do not use this revision."
    if isinstance(proof, str):
        said = markdown(proof)
        return f"> **Broken.** What was downloaded is not what was uploaded: {said} Do not use this revision."
    return (
        f"**{PROVEN}**: downloaded into an empty cache and loaded in a fresh process, {found(proof)}. Fingerprint: "
        f"`{facts.fingerprint}`."
    )


def found(proof: dict[str, Any]) -> str:
    """What a round trip found, in words."""
    if "largest" not in proof:
        return f"{proof['files']} files and {proof['n']} rows are as they were"
    return (
        f"{proof['files']} files have the same hashes, and {proof['n']} {proof['what']} are within "
        f"{_short(proof['largest'])} {proof['unit']} of what they were ({_short(proof['allowed'])} is allowed)"
    )


def _before(result: dict) -> str:
    parent = result["parent"]
    start = f"the {recipe_of(parent)} run that it continues" if parent else "the base model"
    head = " with a score head that was not trained" if result["recipe"] == "reward" else ""
    return f"Before: {start}{head}. On rows that were held out of the training."


def _evaluated(entry: dict | None) -> str:
    if not entry:
        return ""
    reasons = " ".join(markdown(reason) for reason in entry["verdict"]["reasons"])
    rows = [
        f"| {METRICS[key][0]} | {_with_unit(e, METRICS[key][1])} | {markdown(e.n)} |"
        for key, e in entry["metrics"].items()
        if key in METRICS and e.value is not None
    ]
    table = ["| metric | value | n |", "| --- | --- | --- |", *rows] if rows else []
    parent, verdict = markdown(entry["parent"]), markdown(entry["verdict"]["verdict"])
    return "\n".join(
        [
            f"## Evaluation\n\nAgainst {parent}: **{verdict}**. {reasons} "
            f"The page with all answers: [{PAGE}]({PAGE}).\n",
            *table,
        ]
    )


def _with_unit(estimate: Estimate, unit: str) -> str:
    shown = format_estimate(estimate, percent=unit == "%", digits=1 if unit == "%" else 2)
    return f"{shown} {unit}".rstrip() if unit != "%" else shown


def _merged(merged: dict | None) -> str:
    if not merged:
        return ""
    return (
        "## Merge\n\nThe adapter was merged into its base, de-quantized. On 32 replies of the clinic set the merged "
        "weights differ from the adapter on the base that it was trained on by "
        f"{_short(merged['drift'])} {merged['unit']} on average ({merged['limit']} is allowed)."
    )


def _base(base: dict[str, Any]) -> str:
    at = f"at revision `{code(base['revision'])}`" if base["revision"] else "at its newest revision"
    said = [f"Base: `{code(base['id'])}` {at}, under {markdown(base['license'])}."]
    if base["origin"]:
        said.append(f"It was trained on these weights: {markdown(base['origin'])}.")
    if base.get("drift") is not None:
        said.append(
            "They are not the weights of this name on the Hub: with those, 32 log-probabilities or scores differ by "
            f"{_short(base['drift'])} on average (nats per token, or units of the score)."
        )
    if base["same"] is None:
        said.append("The weights that it was trained on were not compared with those on the Hub.")
    return " ".join(said)


def _constitution(source: Source) -> str:
    if source.pairs_changed:
        return (
            "The pairs that it was trained on were made by recipes/cai.py, and others lie in their folder since: the "
            "constitution that they were made under is not known."
        )
    pairs = source.pairs
    if pairs is None:
        return ""
    said, by = pairs.result["constitution"], markdown(pairs.result["labelled_by"])
    made = (
        f"Its pairs were made under the constitution *{markdown(said['name'])}* (version {markdown(said['version'])}, "
        f"`constitution.yaml`, SHA-256 `{code(said['sha256'])}`), labelled by {by}."
    )
    return " ".join(filter(None, (made, report.of_earlier(pairs.result))))


def _settings(config: dict[str, Any]) -> str:
    """Every setting that is not the default of the class behind it."""
    rows = []
    for group in ("reward_funcs", "trainer", "lora", "quantization", "data"):
        node = config.get(group)
        defaults = _defaults(group, node) if isinstance(node, dict) else {}
        for key, value in flatten({group: node}) if node is not None else []:
            plain = key.removeprefix(f"{group}.")
            if value is not None and plain != "_target_" and (plain not in defaults or defaults[plain] != value):
                shown = json.dumps(without_folder(value), ensure_ascii=False)
                rows.append(f"| `{code(key)}` | `{code(shown)}` |")
    head = ["What differs from the default of the class behind it:", "", "| key | value |", "| --- | --- |"]
    return "\n".join([*head, *rows])


def _defaults(group: str, node: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> default: of the class that a node builds, if conf/ names it; of conf/data/base.yaml for `data`."""
    if group == "data":
        return dict(flatten(OmegaConf.to_container(OmegaConf.load(CONF / "data" / "base.yaml"))))
    if node.get("_target_") not in targets(group):
        return {}
    module, _, name = node["_target_"].rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):  # of TRL's experimental part, which may lose it: all settings are shown
        return {}
    return {p.name: p.default for p in inspect.signature(target).parameters.values()}


def _hardware(result: dict) -> str:
    peak = ", ".join(markdown(f"{gib} GiB {where}") for where, gib in result["peak_memory_gib"].items())
    versions = ", ".join(markdown(f"{name} {version}") for name, version in result["versions"].items())
    return (
        f"Seed {markdown(result['seed'])}, {markdown(result['steps'])} steps, {result['seconds']:.0f} s on "
        f"{device(result)}, peak {peak}. Versions: {versions}."
    )


def _limits(source: Source, facts: Facts) -> list[str]:
    main = source.result["main"]
    n, low, high = main["after"].n, main["after"].low, main["after"].high
    few = ", too few to decide much" if n < 100 else ""
    limits = [
        f"Measured on {n} held-out rows of the data that it was trained on{few}. Other topics, languages and lengths "
        "were not looked at."
    ]
    if low is not None and low <= main["before"].value <= high:
        name = markdown(main["name"].replace("_", " "))
        limits.append(f"The interval of the {name} includes the value before the training.")
    if source.recipe == "reward":
        limits.append("A score means nothing alone: compare scores of replies to the same prompt.")
        limits.append("A policy that is trained against it for long will find what it rewards by mistake.")
    else:
        if not facts.evaluation:
            limits.append("Its answers were not compared with those of its parent: only held-out numbers were.")
        limits.append("It can be wrong, and refuse or comply where it should not. Nobody has tested it for safety.")
    if "_target_" in source.config["quantization"] and not facts.merged:
        limits.append("It was trained on a quantized base. On an unquantized one its numbers differ.")
    limits.append("The terms of the base model and of the data apply.")
    return limits


def _data_card(source: Source, facts: Facts, proof: dict | str | None) -> str:
    """The card that recipes/cai.py wrote, with licence, proof and snippet."""
    from huggingface_hub import DatasetCard

    card = DatasetCard(report.card(without_folder(source.result)))
    card.data.license = line(facts.base["license"])
    for key in ("license_name", "license_link"):
        if facts.base[key]:
            card.data[key] = line(facts.base[key])
    if isinstance(proof, str):
        card.data.tags.append("broken")
    title, about, rest = card.text.strip().split("\n\n", 2)
    constitution = source.result["constitution"]
    load = f'load_dataset({json.dumps(facts.repo_id)}, "prefs")'
    use = f"from datasets import load_dataset\n\npairs = {load}\nprint(pairs)\n"
    limits = [
        "The text is a language model's, and so are the labels or the rule behind them: nobody has read all of it.",
        f"The constitution is `constitution.yaml`, SHA-256 `{code(constitution['sha256'])}`.",
        "The terms of the generator's base model and of the prompts apply.",
    ]
    parts = [title, about, _proof(proof, facts), f"## Use\n\n```python\n{use}```", rest]
    parts += ["## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)]
    return f"---\n{card.data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _is_on_the_hub(data: str) -> bool:
    """Whether `data.path` is the id of a data set, rather than a file or folder of somebody's machine."""
    try:
        return is_hub_id(data)
    except Refusal:  # in a folder that is here, and gone
        return False


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _short(value: float) -> str:
    return f"{value:.2g}" if value else "0"
