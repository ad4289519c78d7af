"""README.md of a run: its model card; hub/card.py writes that of what is published.

Whatever a config, a result.json or data says goes through `text.markdown` or `text.code`, in the metadata `text.line`.
"""

import json
from pathlib import PureWindowsPath  # takes both kinds of slashes

from rlhf_recipes import methods
from rlhf_recipes.config import flatten
from rlhf_recipes.stats import format_estimate
from rlhf_recipes.text import code, line, markdown
from rlhf_recipes.training import doctor

LOAD = {
    "reward": """model = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels=1)
reward_model = PeftModel.from_pretrained(model, {adapter!r})
# A score is read at the last token that is not padding.
model.config.get_text_config().pad_token_id = AutoTokenizer.from_pretrained({adapter!r}).pad_token_id""",
    "policy": """model = AutoModelForCausalLM.from_pretrained({base!r})
policy = PeftModel.from_pretrained(model, {adapter!r})""",
}


def write(result: dict, config: dict) -> str:
    """The card of a finished run, from its result and resolved config."""
    from huggingface_hub import ModelCardData

    recipe, base = result["recipe"], result["base_model"]
    head = ModelCardData(
        base_model=line(base),
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-classification" if recipe == "reward" else "text-generation",
        tags=["lora", "trl", "rlhf-recipes", recipe],
    )
    auto = "AutoModelForSequenceClassification" if recipe == "reward" else "AutoModelForCausalLM"
    snippet = LOAD["reward" if recipe == "reward" else "policy"].format(base=base, adapter="<this adapter>")
    groups = ("reward_funcs", "trainer", "lora", "quantization", "data")
    shown = {group: config[group] for group in groups if group in config}
    shown["model"] = {"chat_template_kwargs": config["model"].get("chat_template_kwargs") or {}}
    settings = [
        f"| `{code(key)}` | `{code(json.dumps(without_folder(value), ensure_ascii=False))}` |"
        for key, value in flatten(shown)
        if value is not None and not key.endswith(("_target_", ".report_to"))
    ]
    place = device(result)
    body = f"""# LoRA adapter: {recipe} on {markdown(base)}

{methods.of(recipe).cited}, trained with TRL by rlhf-recipes.

```python
from peft import PeftModel
from transformers import {auto}{", AutoTokenizer" if recipe == "reward" else ""}

{snippet}
```

## Held-out metrics

{measured(result)}

{examined(result.get("doctor"))}## Chain

{chain(base, result)}

## Settings

| key | value |
| --- | --- |
{chr(10).join(settings)}

Seed {markdown(result["seed"])}, {markdown(result["steps"])} steps, {result["seconds"]:.0f} s on {place}. Versions:
{", ".join(markdown(f"{name} {version}") for name, version in result["versions"].items())}.
"""
    return f"---\n{head.to_yaml()}\n---\n\n{body}"


def device(result: dict) -> str:
    """What a run was trained on, and how many processes had a share in it where it was not one."""
    said, processes = markdown(result["device"]), result.get("world_size", 1)
    if processes == 1:
        return said
    nodes, batch = (markdown(result.get(key)) for key in ("nodes", "global_batch"))
    return f"{said} ({markdown(processes)} processes, machines: {nodes}, rows a step: {batch})"


def measured(result: dict) -> str:
    """The table of the held-out metrics."""
    before = result["before"]
    rows = [
        f"| {markdown(name.replace('_', ' '))} | {format_estimate(before[name])} | {format_estimate(after)} | "
        f"{markdown(after.n)} |"
        for name, after in result["metrics"].items()
    ]
    head = ["Brackets are 95 % intervals (bootstrap over prompts).", "", "| metric | before | after | n |"]
    return "\n".join([*head, "| --- | --- | --- | --- |", *rows])


def examined(report: dict | None) -> str:
    """The section about what the doctor saw; nothing where it was not asked."""
    if not report:
        return ""
    keys = ("level", "rule", "step", "saw", "means", "change")
    cells = [[markdown(finding[key]) for key in keys] for finding in report["findings"]]
    rows = [f"| {' | '.join(row)} |" for row in cells]
    head = ["", "| level | rule | step | seen | means | what changes it |", "| --- | --- | --- | --- | --- | --- |"]
    verdict = f"Verdict: **{markdown(report['verdict'])}**."
    if report.get("unasked"):
        verdict += f" {markdown(doctor.not_asked(report).capitalize())}."
    return "\n".join(["## Doctor", "", verdict, *(head if rows else []), *rows, "", ""])


def chain(base: str, result: dict) -> str:
    """`base -> sft -> dpo`, the runs with the first characters of their adapters' hashes; below, what an adapter from
    elsewhere calls the base."""
    links, parent, said = [f"**{recipe_of(result)}** ({_digest(result)})"], result.get("parent"), []
    if isinstance(anchor := result.get("reference"), dict):
        said.append(f"\n\nReference: {recipe_of(anchor)} ({_digest(anchor)}), not what it started from.")
    while parent:
        links.append(f"{recipe_of(parent)} ({_digest(parent)})")
        if parent.get("named_base"):
            said.append(
                f"\n\n{_digest(parent)} names the base `{code(str(parent['named_base']))}`. That it is the same is "
                "the word of whoever ran this: its modules were compared, weights only where both were there."
            )
        parent = parent.get("parent")
    return " → ".join([f"`{code(base)}`", *reversed(links)]) + "".join(said)


def recipe_of(run: dict) -> str:
    """The recipe of a run, from its result or a lineage; `adapter` for what is no training of this package."""
    recipe = str(run.get("recipe"))
    return recipe if recipe in methods.METHODS else "adapter"


def _digest(run: dict) -> str:
    return f"`{code(str(run.get('adapter_sha256') or '')[:12])}`"


def without_folder(value):
    """A file of this machine by its name alone; anything else as it is."""
    if isinstance(value, dict):
        return {key: without_folder(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folder(each) for each in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name
    return value
