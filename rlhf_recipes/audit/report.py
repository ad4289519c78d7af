"""What an audit leaves: audit.json, report.html, what people shall label, and the words on the terminal."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import ranks
from rlhf_recipes.audit import judgements, page, verdict
from rlhf_recipes.audit.run_audit import SHOWN, Findings, Sources
from rlhf_recipes.commands import command
from rlhf_recipes.data.load import Splits
from rlhf_recipes.overrides import written
from rlhf_recipes.references import folder_of
from rlhf_recipes.run import Run
from rlhf_recipes.run_folder import write_atomically
from rlhf_recipes.stats import Estimate, format_estimate
from rlhf_recipes.text import line

WIDTH = 110
WEAKEST = 5


def build(cfg: DictConfig, sources: Sources, pairs: Splits, found: Findings) -> dict[str, Any]:
    """audit.json: what was audited, the sections, the gates and the verdict in plain words."""
    decided = verdict.decide(found.sections, dict(cfg.thresholds))
    names = [str(folder_of(each.adapter)) for each in sources.reward_models]
    subject = {
        "Reward model" if len(names) == 1 else f"Ensemble of {len(names)}": ", ".join(names),
        "Base model": cfg.model.id,
        "Pairs": f"{pairs.source}, {len(pairs.train)} to train and {len(pairs.test)} held out",
    }
    if sources.deployment:
        subject["Deployment"] = f"{Path(cfg.deployment).name}, {len(sources.deployment)} prompts"
    if sources.gold:
        subject["Gold"] = sources.gold.kind
    if sources.questions:
        subject["Benchmark"] = f"{cfg.benchmark}, {len(sources.questions)} questions"
    keys = ("max_length", "ledger_pairs", "stress_pairs", "probe_pairs", "credit_pairs", "prompts", "samples", "seed")
    return {
        "title": f"Audit of {' and '.join(names) if len(names) < 3 else f'an ensemble of {len(names)} reward models'}",
        "subject": subject,
        "counts": {"held-out pairs": len(pairs.test), "train pairs": len(pairs.train), "reward models": len(names)},
        "verdict": decided,
        "paragraph": verdict.paragraph(found.sections, decided, found.label_next[:SHOWN]),
        "sections": found.sections,
        "label_next": found.label_next[:SHOWN],
        "settings": {key: cfg[key] for key in keys},
        "adapters": {name: each.sha256 for name, each in zip(names, sources.reward_models, strict=True)},
        "data": pairs.report,
    }


def finish(run: Run, audit: dict[str, Any], found: Findings) -> None:
    """Write everything, result.json last, and print the verdict, the weakest figures and what to do next."""
    write_atomically(run.dir / "audit.json", json.dumps(audit, indent=2, ensure_ascii=False, default=asdict) + "\n")
    if ranks.is_first():
        page.write_page(audit, run.dir / "report.html")
    asked = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.label_next]
    write_atomically(run.dir / "label_next.jsonl", "".join(asked))
    if found.disputed:
        judgements.export(run.dir / "disputed.jsonl", found.disputed)
    figures = {(s["key"], f.key): f for s in audit["sections"] for f in s["figures"]}
    accuracy = figures["preference", "accuracy"]
    rule = {"value": accuracy.baseline.value, "low": None, "high": None, "n": accuracy.estimate.n}
    main = {"name": "preference_accuracy", "before": rule, "after": accuracy.estimate}
    kept = {"verdict": audit["verdict"], "adapters": audit["adapters"], "counts": audit["data"]}
    run.write_result(run.record(main=main, audit=kept, page=str(run.dir / "report.html")))
    print(describe(run, audit, bool(found.disputed)), flush=True)


def describe(run: Run, audit: dict[str, Any], disputed: bool) -> str:
    """The gates that do not pass, the paragraph's verdict, and where everything lies."""
    gates = [gate for gate in audit["verdict"]["gates"] if gate.state in ("fail", "unclear")]
    lines = ["", audit["verdict"]["headline"], ""]
    for gate in gates[:WEAKEST]:
        name = ": ".join(filter(None, (gate.title, gate.name)))
        found = Estimate(gate.value, gate.low, gate.high, gate.n)
        shown = format_estimate(found, percent=gate.unit in ("%", "points"))
        lines.append(line(f"  {gate.state:<8} {name}: {shown}")[:WIDTH])
    if len(gates) > WEAKEST:
        lines.append(f"           and {len(gates) - WEAKEST} more that fail or are unclear")
    counts = ", ".join(f"{count} {state}" for state, count in audit["verdict"]["counts"].items() if count)
    lines += ["", f"audit finished in {run.seconds():.0f} s: {counts}."]
    lines += [f"  page      {run.dir / 'report.html'}", f"  figures   {run.dir / 'audit.json'}"]
    lines.append(f"  label     {run.dir / 'label_next.jsonl'}")
    if disputed:
        path = run.dir / "disputed.jsonl"
        lines.append(f"  disputed  {path}: for people to label first, second or tie")
        lines.append(f"  next      {command('label')} {written('pairs', str(path))}; then this command again with its")
        lines.append("            'judgements=[outputs/label/main/judgements.jsonl]' run_name=labelled")
    elif audit["counts"]["reward models"] == 1:
        lines.append(f"  next      {command('reward')} reward=ensemble: one reward model does not know its errors")
    return "\n".join(map(line, lines))
