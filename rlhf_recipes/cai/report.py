"""What a run of the recipe says at its end: the data set's card, the funnel as a picture, the summary."""

import textwrap
from pathlib import Path
from typing import Any

from rlhf_recipes import ranks
from rlhf_recipes.commands import command
from rlhf_recipes.data import folders
from rlhf_recipes.overrides import written
from rlhf_recipes.run import Run
from rlhf_recipes.run_folder import write_atomically
from rlhf_recipes.stats import format_estimate
from rlhf_recipes.text import code, line, markdown

# How routes and reasons are called where people read them.
WORDS = {
    "accepted": "accepted",
    "tie": "ties",
    "disputed": "disputed",
    "not_better": "revision not better",
    "unanswered": "judge gave no answer",
    "truncated": "not finished",
    "length": "too short or too long",
    "role_leak": "roles inside the text",
    "preamble": "speaks about the task",
    "repetition": "repeats itself",
    "no_op": "both replies alike",
    "critique_copied": "critique handed in as revision",
    "both_refuse": "both replies refuse",
    "length_imbalance": "lengths too different",
    "leakage": "prompt like one of the test split",
    "near_duplicate": "reply like an earlier one",
    "closer": "ends as too many do",
}
# What helps where most pairs ended so.
ADVICE = {
    "truncated": "Raise generate.max_new_tokens, or generate with a run of recipes/sft.py (model.adapter).",
    "unanswered": "Choose another judge.",
    "tie": "Choose another judge, or generate at a higher temperature.",
    "disputed": "Choose another judge.",
    "no_op": "Generate at a higher temperature.",
}
SHOWN = 3
# Judges that are no language model.
SCORED = {"reward": "reward models", "function": "a function"}


def card(result: dict[str, Any]) -> str:
    """README.md of the data set, with the metadata that `datasets.load_dataset` reads."""
    funnel = result["funnel"]
    written = funnel["written"]
    reasons = [(f"left out: {WORDS[name]}", n) for name, n in sorted(funnel["unfit"].items(), key=_by_count)]
    routes = [(WORDS[name], count) for name, count in sorted(funnel["routes"].items(), key=_by_count)]
    principles = [
        (name, *(c.get(key, 0) for key in ("revised", "accepted", "better")))
        for name, c in funnel["by_principle"].items()
    ]
    ledger = [
        (cell, *(c[key] for key in ("pairs", "accepted", "tie", "disputed", "unfit")))
        for cell, c in result["ledger"].items()
    ]
    parts = [
        "# AI preference pairs",
        " ".join(filter(None, (_made(result), of_earlier(result)))),
        "![The funnel](funnel.png)",
        "## What the labels are worth",
        _worth(result),
        "## What became of the pairs",
        _table("pairs | count", [("made", funnel["pairs"]), *reasons, *routes]),
        f"Rows: {', '.join(f'{markdown(count)} `{code(name)}`' for name, count in written.items())}. The longer reply "
        f"is the chosen one in {format_estimate(funnel['chosen_is_longer'], percent=True)} of the accepted pairs. "
        f"{markdown(funnel['speaks_to_judge'])} pairs hold a phrase that could be meant for a judge. {_typed(funnel)}",
        "## By family and kind of pair",
        _table("family / pairs | made | accepted | ties | disputed | unfit", ledger),
    ]
    if principles:
        parts += [
            "## By principle of the revision",
            _table("principle | revisions judged | accepted | judged better", principles),
        ]
    parts += [
        "## Columns",
        "`prompt`, `chosen`, `rejected` (`completion` in the sft splits): conversations. `p`: the judge's probability "
        f"that `chosen` is better, null where the label is by construction; {_columns(result)} `family`, "
        "`source`, `principle`, `draft`, `critique`, `revision`, `constitution` (SHA-256), `generator`, `judge`, "
        "`seed`: where the row comes from.",
        "## How it was made",
        f"Generator: {markdown(result['generator'])}. Judge: {markdown(result['judge'])}. Seed "
        f"{markdown(result['seed'])}. {_cost(result)}",
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"---\n{_metadata(written).to_yaml()}\n---\n\n{text}\n"


def _made(result: dict[str, Any]) -> str:
    """Who wrote and who judged, in a paragraph."""
    constitution, by = result["constitution"], result.get("judged_by")
    name, version, count = (markdown(constitution[key]) for key in ("name", "version", "principles"))
    under = f"the constitution *{name}* (version {version}, {count} principles, SHA-256 "
    under += f"`{code(constitution['sha256'][:16])}`)"
    bai = "Bai et al. 2022 ([arXiv:2212.08073](https://arxiv.org/abs/2212.08073))"
    if by not in SCORED or result["labelled_by"] != "judge":
        return (
            f"Replies written, critiqued and revised by language models, and judged by {_judges(result)}, under "
            f"{under}, after {bai}, by rlhf-recipes. The text is synthetic."
        )
    read = result["provenance"]["constitution"]
    revised = f", some of them revised under {under}, after {bai}" if read else ""
    return (
        f"Replies sampled from a language model{revised}, and compared by {SCORED[by]}, who read no constitution, by "
        "rlhf-recipes. The text is synthetic."
    )


def of_earlier(result: dict[str, Any]) -> str:
    """Which rows were taken over of earlier runs, and who made those; empty where none were."""
    counts = result.get("funnel", {}).get("earlier") or {}
    rows = ", ".join(f"{markdown(count)} `{code(split)}`" for split, count in counts.items() if count)
    if not rows:
        return ""
    made = []
    for each in result.get("earlier") or []:
        by = f"judged by {markdown(each['judge'])}" if each.get("judge") else "labelled by construction"
        if sha256 := each.get("constitution"):
            by += f" under a constitution of SHA-256 `{code(str(sha256)[:16])}`"
        made.append(f"written by {markdown(each.get('generator'))} and {by}")
    said = ": " + "; ".join(made) if made else ""
    return f"Of the rows {rows} are of earlier runs, of which nothing else is said here{said}."


def _columns(result: dict[str, Any]) -> str:
    """What the columns of the judge mean."""
    if result.get("judged_by") == "reward":
        return (
            "`by_principle` (the same by each member of an ensemble), `spread` (deviation over members of the "
            "margin, over the mean of its size); `position_gap`, `flip` and `mass` say nothing of a reward model."
        )
    if result.get("judged_by") == "function":
        return "`position_gap`, `flip`; `by_principle`, `spread` and `mass` say nothing of a function."
    return (
        "`by_principle`, `spread` (standard deviation over principles), `position_gap`, `flip`, `mass` (put on "
        "the two letters)."
    )


def _metadata(written: dict[str, int]) -> Any:
    """The card's head. A kind has the splits that hold rows: `datasets` takes one without for an error."""
    from huggingface_hub import DatasetCardData

    configs = []
    for kind in ("prefs", "sft"):
        splits = [split for split in ("train", "test") if written[f"{split}_{kind}"]]
        files = [{"split": split, "path": f"{split}_{kind}.parquet"} for split in splits]
        configs += [{"config_name": kind, "data_files": files}] if files else []
    tags = ["preference", "constitutional-ai", "rlhf-recipes", "synthetic"]
    return DatasetCardData(language="en", tags=tags, configs=configs)


def _table(columns: str, rows: list[tuple]) -> str:
    lines = [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    return "\n".join([f"| {columns} |", "| --- " * (columns.count("|") + 1) + "|", *lines])


def _typed(funnel: dict[str, Any]) -> str:
    typed = funnel.get("neutralised", {"rows": 0})
    if not typed["rows"]:
        return ""
    return (
        f"{markdown(typed['rows'])} pairs hold what looks like a chat token ({markdown(typed['occurrences'])} times): "
        "in these rows as it was written, broken up in what was put to a model."
    )


def draw_funnel(funnel: dict[str, Any], path: Path) -> None:
    """Bars from the prompts to the rows that were written; losses by reason beside them."""
    from matplotlib.figure import Figure

    unfit = sum(funnel["unfit"].values())
    bars = [("prompts", funnel["prompts"], "#7d8ba1"), ("pairs made", funnel["pairs"], "#7d8ba1")]
    bars += [(WORDS[n], c, "#d9a38f") for n, c in sorted(funnel["unfit"].items(), key=_by_count)]
    bars += [("fit to be judged", funnel["pairs"] - unfit, "#7d8ba1")]
    bars += [(WORDS[n], c, "#d9c58f") for n, c in sorted(funnel["routes"].items(), key=_by_count) if n != "accepted"]
    bars += [("accepted", funnel["routes"].get("accepted", 0), "#4a8f6d")]
    figure = Figure(figsize=(8, 0.6 + 0.3 * len(bars)), dpi=120, layout="constrained")
    axis = figure.subplots()
    names, counts, colors = zip(*reversed(bars), strict=True)
    drawn = axis.barh(names, counts, color=colors, height=0.7)
    axis.bar_label(drawn, [f"{count:,}" for count in counts], padding=4, fontsize=9)
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axis.tick_params(left=False, bottom=False, labelbottom=False, labelsize=9)
    axis.margins(x=0.12)
    axis.set_title(
        "From prompts to pairs: grey what is there, red and yellow what was set aside", loc="left", fontsize=10
    )
    figure.savefig(path)


def finish(run: Run, result: dict[str, Any]) -> float:
    """Write card, picture and result.json, print the summary.

    Returns:
        The share of the pairs that were accepted, or the judge's agreement where only that was asked.
    """
    result = run.record(seed=run.config["seed"], **result)
    if "funnel" not in result:
        run.write_result(result)
        print(f"  result    {line(run.dir / 'result.json')}", flush=True)
        if "shards" in result:
            jobs = result["shards"].partition("/")[2]
            print(f"  next      the command without shards=, when all {jobs} are done", flush=True)
        return result["main"]["after"].value
    if ranks.is_first():
        draw_funnel(result["funnel"], run.dir / "funnel.png")
    write_atomically(run.dir / "README.md", card(result))
    run.write_result(result)
    _print_summary(result, run.dir)
    return result["funnel"]["yield"].value


def _print_summary(result: dict[str, Any], folder: Path) -> None:
    funnel, where = result["funnel"], line(folder)
    set_aside = [f"{count} {WORDS[name]}" for name, count in sorted(funnel["unfit"].items(), key=_by_count)]
    routes = [f"{count} {WORDS[name]}" for name, count in sorted(funnel["routes"].items(), key=_by_count)]
    print(f"\ncai finished in {result['seconds']:.0f} s. {_cost(result)}")
    print(f"  pairs     {funnel['pairs']} of {funnel['prompts']} prompts: {', '.join(routes) or 'none fit'}")
    print(f"  set aside {', '.join(set_aside) or 'none'}")
    there = funnel["written"]["train_prefs"] and funnel["written"]["test_prefs"]
    for _, (_, row) in zip(range(SHOWN), folders.find(str(folder)).rows("train_prefs") if there else (), strict=False):
        print(f"  prompt    {_short(row['prompt'][-1]['content'])}")
        for side in ("chosen", "rejected"):
            print(f"    {side:9} {_short(row[side][-1]['content'])}")
    print(f"  data      {where}\n  card      {where}/README.md\n  result    {where}/result.json")
    if there:
        print(f"  next      {command('dpo')} data=cai_pairs {written('data.path', str(where))}", flush=True)
    else:
        most = max({**funnel["unfit"], **funnel["routes"]}.items(), key=lambda entry: entry[1])[0]
        print(
            f"  next      too few pairs to train on, most of them: {WORDS[most]}. {ADVICE.get(most, '')}", flush=True
        )


def _judges(result: dict[str, Any]) -> str:
    return "people" if result["labelled_by"] == "people" else "such models"


def _worth(result: dict[str, Any]) -> str:
    if result["labelled_by"] == "people":
        again, people = result["main"]["after"], markdown(len(result["people"]["people"]))
        return (
            f"People who labelled them: {people}. Of {markdown(again.n)} pairs that one of them was shown twice, "
            f"{format_estimate(again, percent=True)} got the same choice."
        )
    gate = result["gate"]
    found = format_estimate(gate["agreement"], percent=True)
    best, error = gate["baselines"][gate["best_baseline"]], gate["calibration_error"]
    swapped = format_estimate(gate["swap_consistency"], percent=True)
    order = f"Its winner stays the same when the replies change places on {swapped}."
    if not gate.get("ordered", True):
        order = "It scores each reply by itself, so that their order has no say."
    pairs, rule = markdown(gate["agreement"].n), markdown(gate["best_baseline"])
    text = (
        f"On {pairs} pairs whose better reply is known the judge agrees with the label on {found}; '{rule}' alone on "
        f"{format_estimate(best, percent=True)}. {order} Cohen's kappa "
        f"{format_estimate(gate['kappa'], digits=2)}. Calibration error {error['before']:.3f}, {error['after']:.3f} "
        f"after a temperature of {gate['temperature']:.2f} (n {markdown(error['n'])}, cross-fitted)."
    )
    if "applied" in gate and result["labelled_by"] == "judge":
        text += " `p` is what is left after it." if gate["applied"] else " `p` is as it was before it."
    if result["labelled_by"] == "construction":
        text += (
            " That is not enough: the pairs are labelled by construction, not by this judge. The chosen reply was "
            "written under the constitution's good system prompt, the rejected one under its bad one (RLCD, "
            "[arXiv:2307.12950](https://arxiv.org/abs/2307.12950)); nobody has looked whether it is better."
        )
    return text


def _cost(result: dict[str, Any]) -> str:
    spent = result["spent"]
    usd = f", {spent['usd']:.2f} USD" if spent["usd"] else ""
    pace = f" ({spent['tokens_per_second']:.0f} a second)" if spent["tokens_per_second"] else ""
    return (
        f"{spent['calls']:,} calls, {spent['prompt_tokens']:,} tokens read, {spent['completion_tokens']:,} written"
        f"{pace}{usd}."
    )


def _short(text: str) -> str:
    return textwrap.shorten(line(text), 90, placeholder=" …") or "(empty)"


def _by_count(entry: tuple[str, int]) -> tuple[int, str]:
    return -entry[1], entry[0]
