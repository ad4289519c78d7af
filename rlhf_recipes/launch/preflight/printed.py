"""What preflight prints: each entry of a list one line, whatever stands in it."""

import textwrap
from typing import Any

from rlhf_recipes.launch.preflight.report import JobReport
from rlhf_recipes.stats import format_estimate
from rlhf_recipes.text import line, shown

WIDTH, INDENT, BAR = 120, " " * 11, 40
SHOWN = 700  # characters of the example


def head(jobs: list) -> str:
    """How many jobs there are, and which."""
    names = [job.name for job in jobs if job.name]
    return line(f"preflight {jobs[0].recipe if not names else f'{len(jobs)} jobs: ' + ' · '.join(names)}")


def describe(seen: JobReport, before: list[JobReport]) -> str:
    """One job; what an earlier one has said is not said again."""
    alike = next((other for other in before if other.recipe == seen.recipe and other.settings), None)
    lines = [f"{seen.name} ({seen.recipe})"] if seen.name and not (alike and seen.settings) else []
    lines += _config(seen, alike) if seen.settings else []
    if seen.rows and all(seen.rows != other.rows for other in before):
        lines += _rows(seen.rows)
    if seen.example and all(seen.example != other.example for other in before):
        lines += _example(seen)
    if seen.memory and all(seen.memory["roles"] != (other.memory or {}).get("roles") for other in before):
        lines += _memory(seen.memory)
    if "seconds" in (seen.step or {}) and all(seen.step != other.step for other in before):
        lines += _step(seen)
    said = [remark for other in before for remark in other.watch]
    lines += [f"  !        {remark}" for remark in seen.watch if remark not in said]
    return _joined(lines + [f"  STOP     {reason}" for reason in seen.stops])


def summary(report: dict[str, Any]) -> str:
    """Disk, time of all jobs, and whether they may start."""
    disk, jobs = report["disk"], report["jobs"]
    lines = [f"disk      {disk['need_gib']:.2f} GiB needed, {disk['free_gib']:.1f} GiB free"]
    seconds = [_eta(seen) for seen in jobs]
    if len(jobs) > 1 and None not in seconds:
        lines.append(f"time      about {_duration(sum(seconds))} of training for {len(jobs)} jobs, one after another")
    stops = len(disk["stops"]) + sum(len(seen.stops) for seen in jobs)
    watch = len({remark for seen in jobs for remark in seen.watch})
    stands = "nothing stands in the way" if not stops else f"reasons to stop: {stops}"
    lines.append(f"preflight {stands}; remarks: {watch}")
    return _joined(lines)


def _joined(lines: list[str]) -> str:
    return "\n".join(map(line, lines))


def _config(seen: JobReport, alike: JobReport | None) -> list[str]:
    """The settings; of a job like an earlier one, those that differ."""
    settings = {key: value for key, value in seen.settings.items() if value is not None}
    if alike:
        changed = [f"{key} {value}" for key, value in settings.items() if value != alike.settings.get(key)]
        return [f"{seen.name}: as {alike.name}, {' · '.join(changed) or 'in all that is shown'}"]
    fetched = f", {seen.model['download_gib']:.1f} GiB to fetch" if seen.model["download_gib"] else ""
    return _paragraph(
        "config", [f"{seen.model['id']}{fetched}", *(f"{key} {value}" for key, value in settings.items())]
    )


def _rows(rows: dict) -> list[str]:
    tokens, over = rows["tokens"], rows["over_length"]
    dropped = [f"{count} {reason}" for reason, count in rows["dropped"].items()]
    said = [
        f"{rows['source']}: {rows['train']} train, {rows['test']} test ({rows['split']})",
        *rows["told"],
        *([f"left out {', '.join(dropped)}"] if dropped else []),
        f"tokens p50 {tokens['p50']}, p95 {tokens['p95']}, max {tokens['max']}, {tokens['train']:,} an epoch",
        f"over {rows['max_length']} tokens {over['rows']} of {over['of']}{over['fate']}",
        f"duplicates {rows['duplicate']}",
        f"train rows of test prompts {rows['leakage']}",
        f"test prompts near a train prompt {rows['near_duplicates']}",
        f"control tokens made plain {rows['neutralised']['occurrences']}",
    ]
    shares = (
        ("chosen_longer", "the longer reply is chosen"), ("both_refuse", "both replies refuse"),
        ("only_chosen_refuses", "only the chosen one refuses"), ("refuses", "replies that refuse"),
    )  # fmt: skip
    said += [f"{what} {format_estimate(rows[key], percent=True)}" for key, what in shares if key in rows]
    if "chosen_longer" in rows:
        correlation = format_estimate(rows["length_correlation"], digits=2, sign=True)
        said.append(f"correlation of label and length {correlation} (n {rows['chosen_longer'].n} pairs)")
    return _paragraph("rows", said)


def _paragraph(name: str, parts: list[str]) -> list[str]:
    first, *more = textwrap.wrap(" · ".join(map(line, parts)), WIDTH - len(INDENT), break_on_hyphens=False)
    return [f"  {name:<9}{first}", *(INDENT + rest for rest in more)]


def _example(seen: JobReport) -> list[str]:
    example = seen.example
    text = shown(example["text"])
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} […] {text[-SHOWN // 2 :]}"
    ends = example["ends"]
    eos = f", {' or '.join(example['eos'])} ends {format_estimate(ends, percent=True)} of {ends.n}" if ends else ""
    between = {
        "reward": "the token whose score is the reply's",
        "ppo": "what is sampled",
        "rloo": "what is sampled",
    }.get(seen.recipe, "what is trained")
    if seen.recipe == "orpo" and not seen.settings.get("disable_prompt_loss"):  # TRL's own trainer has no such setting
        between = "the reply (the likelihood is that of its prompt, too)"
    rows = [f"           │ {row}" for row in text.splitlines()]
    return [f"  example  between ⟦ and ⟧: {between}{eos}", *rows]


def _memory(memory: dict) -> list[str]:
    free = "" if memory["free_gib"] is None else f" of {memory['free_gib']:.1f} free"
    place = {"cpu": "main memory", "cuda": "GPU memory"}[memory["where"]]
    lines = [f"  memory   {memory['peak_gib']:.2f} GiB of {place} at the peak ({memory['when']}){free}, predicted"]
    most = max(memory["roles"].values())
    for role, gib in sorted(memory["roles"].items(), key=lambda item: -item[1]):
        lines.append(f"           {role:<15}{gib:7.2f}  {'█' * max(1, round(BAR * gib / most))}")
    return lines


def _step(seen: JobReport) -> list[str]:
    took, steps = seen.step, seen.settings["steps"]
    pace = f"{took['seconds']:.1f} s each, {steps} steps: about {_duration(_eta(seen))} of training"
    return _paragraph("steps", [pace, f"peak seen {took['peak_gib']:.2f} GiB"])


def _eta(seen: JobReport) -> float | None:
    took = seen.step or {}
    return took["seconds"] * seen.settings["steps"] if "seconds" in took else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
