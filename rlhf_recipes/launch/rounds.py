"""Rounds of sample, label, train, check, as stages of a pipeline, and the gates between them.

Round k, with the policy p(k-1), the anchor p(0) and every label so far:

    label      p(k-1) answers prompts, a judge says which answers are better           recipes/cai.py
    reward     a reward model anew, on the labels of all rounds                        recipes/reward.py
    policy     p(k), trained from p(k-1) on them, with the anchor as its reference     recipes/<method>.py
    check      p(k) answers held-out prompts, the same judge labels them               recipes/cai.py
    evaluate   p(k) against the anchor: the judge, the reward model (the proxy), KL    recipes/evaluate.py
    last       p(k) against p(k-1), by the judge                                       recipes/evaluate.py
    audit      the reward model on what `check` made; prompts to label next            recipes/audit.py

The reference stays where the first round began and the pairs of all rounds are trained on, as in Xiong et al. 2023
(arXiv:2312.11456) and Dong et al. 2024 (arXiv:2405.07863): what a round may move is measured from one place.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, methods, run_folder, stats
from rlhf_recipes.data import readers
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.launch import rounds_page
from rlhf_recipes.stats import Estimate, format_estimate

FILE, PAGE = "rounds.json", "rounds.html"
# What may be the recipe of `policy`: a policy that learns from pairs or from a reward model.
LEARNS_FROM = ("pairs", "prompts")


@dataclass(frozen=True)
class Gate:
    """What must hold for the rounds to go on.

    Attributes:
        name: in words.
        found: the figure with its interval.
        limit: of conf/pipeline.yaml.
        key: of the limit.
        side: min, max, or far: a distance that must not be shown to be more.
        state: holds | fails.
        why: what it means where it fails, or that the figure is missing.
    """

    name: str
    found: Estimate
    limit: float
    key: str
    side: str
    state: str
    why: str

    @property
    def says(self) -> str:
        sign = ">=" if self.side == "min" else "<="
        return f"{self.name}: {format_estimate(self.found)} (n {self.found.n}), {self.key} {sign} {self.limit:g}"


def check(cfg: DictConfig) -> None:
    """Refuse rounds that cannot be.

    Raises:
        Refusal: an unknown method, or one whose reference would move; a count that is too small; no judge, or nothing
            to compare policies on; a folder of people's labels, which each stage has of its own.
    """
    loop, names = cfg.loop, [name for name, each in methods.METHODS.items() if each.rows in LEARNS_FROM]
    known = [name for name in names if name != "reward"]
    if loop.method not in known:
        raise Refusal(f"loop.method={loop.method}: not one of {', '.join(known)}{nearest(loop.method, known)}")
    if methods.of(loop.method).reference and not _has_reference(loop.method):
        raise Refusal(f"loop.method={loop.method}: its reference would be the last policy. Choose dpo or ppo.")
    for key in ("labels", "held_out"):
        if loop[key] < 1:
            raise Refusal(f"loop.{key}={loop[key]}: must be at least 1. Change it.")
    given = {key.lstrip("+"): value for key, _, value in (text.partition("=") for text in loop.judge)}
    if all(given.get(key) in (None, "", "null") for key in ("judge", "judge_function")):
        raise Refusal("loop.judge: names no judge. Give [judge_function=<module:function>], or judge=... of evaluate.")
    if (kind := given.get("judge")) in ("people", "reward", "function"):
        raise Refusal(
            f"loop.judge=[judge={kind}]: labels pairs, and compares no policies. Give judge=local, judge=server or "
            "judge_function=<module:function>."
        )
    for text in loop.label:
        if text.lstrip("+").startswith("judge.labels="):
            raise Refusal(f"loop.label: {text}: each stage has a run of recipes/label.py of its own. Leave it out.")
    _compared_on(loop)


def check_rollout(loop: DictConfig, trainer: DictConfig) -> None:
    """Refuse a first round with fewer prompts than the policy's trainer answers at a time.

    Raises:
        Refusal: the stages before it would be made for nothing.
    """
    parts = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    if methods.of(loop.method).samples and (needed := math.prod(trainer[key] for key in parts)) > loop.labels:
        raise Refusal(
            f"loop.labels={loop.labels}: a rollout of {loop.method} takes {needed} prompts ({' x '.join(parts)}). "
            f"Raise it, or lower these: 'loop.policy=[trainer.{parts[1]}=1,trainer.{parts[2]}=1]', say."
        )


def _has_reference(recipe: str) -> bool:
    return "reference" in OmegaConf.load(config.CONF / f"{recipe}.yaml")


def stages(cfg: DictConfig) -> list[DictConfig]:
    """The stages of all rounds, as entries of `stages`."""
    check(cfg)
    return [OmegaConf.create(entry) for k in range(1, cfg.rounds + 1) for entry in _round(cfg.loop, k)]


def _prompts(loop: DictConfig) -> list[str]:
    return [] if loop.prompts == "clinic" else ["data=local", f"data.path={loop.prompts}"]


def _compared_on(loop: DictConfig) -> list[str]:
    """The data of `evaluate` and `last`, which have pairs: held-out rows of what the prompts are from.

    Raises:
        Refusal: these are prompts alone, and `loop.evaluate` names no others.
    """
    if any(text.startswith(("data=", "data.path=")) for text in loop.evaluate):
        return []
    if prompts := _prompts(loop):
        _, first = next(readers.read_file(loop.prompts))
        if not {"chosen", "rejected"} <= first.keys():
            raise Refusal(
                f"loop.prompts={loop.prompts}: has no pairs (chosen and rejected) to compare the policies on. Say "
                "where they are compared: loop.evaluate=[data=local,data.path=<pairs>]."
            )
    return prompts


def _round(loop: DictConfig, k: int) -> list[dict[str, Any]]:
    anchor, last = loop.anchor, policy_of(loop, k - 1)
    own = {part: f"{{dir}}/{name(k, part)}" for part in ("label", "reward", "policy", "check", "audit")}
    pairs = ["data=cai_pairs", f"data.path={own['label']}"]
    by_people = "judge=people" in loop.label
    gate = [] if by_people else ["gate.fails=stop"]  # people meet none
    asked = [f"seed={k}", "sources=[on_policy]", *_prompts(loop), *gate, *loop.label]
    people = {part: [f"judge.labels={folder}_people"] if by_people else [] for part, folder in own.items()}
    before = ",".join(f"{{dir}}/{name(n, 'label')}" for n in range(1, k))
    first = [f"first={{dir}}/{name(k - 1, 'audit')}/label_next.jsonl"] if k > 1 else []
    sizes = [f"data.train_size={loop.labels}", f"data.eval_size={loop.held_out}"]
    reference = [f"reference={anchor}"] if _has_reference(loop.method) else []
    rewards = [f"reward_funcs={own['reward']}"] if methods.of(loop.method).rows == "prompts" else []
    compared = [f"runs=[{own['policy']}]", "exit_codes.worse=0", *_compared_on(loop), *loop.judge]
    audited = [f"reward_model={own['reward']}", f"data.test_path={own['check']}", f"model.adapter={own['policy']}"]
    made = [
        ("label", "cai", [f"model.adapter={last}", f"earlier=[{before}]", *first, *sizes, *asked, *people["label"]]),
        ("reward", "reward", [f"model.adapter={anchor}", *pairs, *loop.reward]),
        ("policy", loop.method, [f"model.adapter={last}", *reference, *rewards, *pairs, *loop.policy]),
        ("check", "cai", [f"model.adapter={own['policy']}", "data.train_size=1", sizes[1], *asked, *people["check"]]),
        ("evaluate", "evaluate", [f"parent={anchor}", f"reward_model={own['reward']}", *compared, *loop.evaluate]),
        ("last", "evaluate", [f"parent={last}", *compared, *loop.evaluate]),
        ("audit", "audit", [*audited, *pairs, f"deployment={loop.prompts}", *loop.audit]),
    ]
    return [
        {"name": name(k, part), "recipe": recipe, "overrides": overrides}
        for part, recipe, overrides in made
        if part != "last" or k > 1  # the anchor is the last policy of the first round
    ]


def name(k: int, part: str) -> str:
    """Of a stage, and so of its folder."""
    return f"round_{k}_{part}"


def policy_of(loop: DictConfig, k: int) -> str:
    return f"{{dir}}/{name(k, 'policy')}" if k else loop.anchor


class Rounds:
    """What the finished stages of the rounds say, read anew from their folders.

    Args:
        cfg: the pipeline's, with `rounds` and `loop`.
        folder: the pipeline's.
        stages: those of the pipeline, of which only finished ones are read: a run that is made again has others lying
            there. None: whatever has a result.
    """

    def __init__(self, cfg: DictConfig, folder: Path, stages: list | None = None):
        self.count, self.loop, self.dir, self.stages = cfg.rounds, cfg.loop, folder, stages

    def budget(self) -> str:
        """A line on the prompts whose samples somebody labels in a round, by the sizes that its stages have."""
        told, sizes = [], []
        for part in ("label", "check"):
            [data] = [stage.cfg.data for stage in self.stages if stage.name == name(1, part)]
            sizes += [data.train_size, data.eval_size]
            told.append(f"{data.train_size or 'all'} and {data.eval_size or 'all'} held out by {part}")
        most = "all" if None in sizes else f"at most {sum(sizes)}"
        return f"labels   of {most} prompts a round: {', '.join(told)}"

    def stop(self) -> dict[str, Any] | None:
        """The first gate that fails, with its round, after what is finished; None where all hold. Writes, too."""
        return self.write()["stopped"]

    def write(self) -> dict[str, Any]:
        """What `read` finds, in `rounds.json` and on the page."""
        found = self.read()
        text = json.dumps(found, indent=2, ensure_ascii=False, default=asdict)
        run_folder.write_atomically(self.dir / FILE, text + "\n")
        rounds_page.write(found, self.dir / PAGE)
        return found

    def read(self) -> dict[str, Any]:
        """`rounds`, each with its figures and gates as far as it has come; `stopped`, by a gate; `ended`, a stage that
        failed, and what it said; `keep`, the last policy of which every gate holds."""
        done, stopped, keep = [], None, self._typed(0)
        for k in range(1, self.count + 1):
            figures = self._figures(k)
            if not figures:
                break
            gates = self._gates(k, figures)
            done.append({"round": k, "policy": self._typed(k), **figures, "gates": gates})
            failed = next((gate for gate in gates if gate.state == "fails"), None)
            if failed:
                stopped = {"round": k, "gate": failed.name, "says": failed.says, "why": failed.why}
                break
            if self._result(k, "audit") is None:  # the last stage of a round
                break
            keep = self._typed(k)
        ends = [s for s in self.stages or [] if s.status == "failed" and s.name.startswith("round_")]
        ended = {"stage": ends[0].name, "says": ends[0].said or "it failed."} if ends else None
        return {"rounds": done, "stopped": stopped, "ended": ended, "keep": keep, "anchor": self._typed(0),
                "asked": self.count}  # fmt: skip

    def _typed(self, k: int) -> str:
        return policy_of(self.loop, k).replace("{dir}", str(self.dir))

    def _figures(self, k: int) -> dict[str, Any]:
        """What the stages of a round have measured; what is not finished is left out."""
        results = {part: self._result(k, part) for part in ("label", "check", "evaluate", "last", "audit")}
        figures: dict[str, Any] = {}
        if label := results["label"]:
            folder = self.dir / name(k, "label")
            figures |= {"disputed": _disputed(folder), "labels": [_cost(label, folder)]}
            people = (label.get("people") or {}).get("people") or {}
            lefts = [_off_centre(person["left"]) for person in people.values() if person["left"].low is not None]
            if lefts:
                figures["place"] = max(lefts, key=lambda found: found.low)
            begun = self._result(1, "label") or label
            if "gate" in label and "gate" in begun:  # people meet none
                figures["known"] = _change(label["gate"]["agreement"], begun["gate"]["agreement"].value)
        if check := results["check"]:
            figures["labels"] = [*figures.get("labels", []), _cost(check, self.dir / name(k, "check"))]
            if not check["funnel"]["written"]["test_prefs"]:
                figures["over_length"] = Estimate(None, None, None, 0)
        if evaluation := results["evaluate"]:
            figures |= _compared(evaluation, reward=True)
        last = results["last"] if k > 1 else evaluation
        if last:
            figures["against_last"] = _compared(last)["judge"]
        if audit := results["audit"]:
            figures["over_length"] = _over_length(audit)
        return figures

    def _result(self, k: int, part: str) -> dict[str, Any] | None:
        done = self.stages is None or any(s.name == name(k, part) and s.status == "finished" for s in self.stages)
        return run_folder.read_result(self.dir / name(k, part)) if done else None

    def _gates(self, k: int, figures: dict[str, Any]) -> list[Gate]:
        """Of the figures that are there. A comparison fails where its whole interval is beyond the limit: fewer rows
        stop nothing; the share of disputed pairs and the budget of KL fail by their value."""
        limits = self.loop.gates
        asked = [
            ("disputed", "disputed pairs of the labeller", "max_disputed", "max",
             "the labeller contradicts itself; look at disputed.parquet before anything learns from its labels"),
            ("place", "the left one of the chosen, by the person who is furthest from one half", "max_place", "far",
             "a person chooses by the place"),
            ("known", "labeller on pairs whose better answer is known, less its share in the first round",
             "min_known_change", "min", "the labeller is no longer the one that it was"),
            ("kl", "KL to the anchor, nats an answer", "max_kl", "max",
             "the policy has left the place in which its labels were given"),
            ("against_last", "win rate against the last policy", "min_win_rate", "min",
             "the round has made the policy worse"),
            ("over_length", "reward model over the best rule of length, on the new policy's answers",
             "min_over_length", "min", "what the reward model has learned no longer holds where the policy now is"),
        ]  # fmt: skip
        gates = []
        for key, words, limit, side, why in asked:
            if key in figures and limits[limit] is not None:
                state = "fails" if _misses(figures[key], limits[limit], side) else "holds"
                if figures[key].value is None:
                    why = f"there is nothing to tell by. Lift the gate with loop.gates.{limit}=null"
                gates.append(Gate(words, figures[key], limits[limit], f"loop.gates.{limit}", side, state, why))
        return gates


def _misses(found: Estimate, limit: float, side: str) -> bool:
    if found.value is None:
        return True
    if side == "max":
        return found.value > limit
    if side == "far":
        return (found.low or 0.0) > limit
    return (found.value if found.high is None else found.high) < limit


def _labelled(folder: Path) -> list[tuple[str, dict]]:
    """(prompt's id, pair) of the pairs with a label, in the data set or dropped from it afterwards."""
    from rlhf_recipes.cai import make_pairs

    records = [each for shard in sorted(folder.glob("shards/*/records.jsonl")) for each in make_pairs.read(shard)]
    pairs = [(record["prompt_id"], pair) for record in records for pair in record["pairs"]]
    return [(prompt_id, pair) for prompt_id, pair in pairs if pair["route"] not in (None, "unanswered")]


def _disputed(folder: Path) -> Estimate:
    """Share of the pairs with a label that were disputed, or whose better answer changed with the order."""
    labelled = _labelled(folder)
    told = [pair["route"] == "disputed" or pair["flip"] for _, pair in labelled]
    return stats.estimate(told, [prompt_id for prompt_id, _ in labelled]) if told else Estimate(None, None, None, 0)


def _off_centre(share: Estimate) -> Estimate:
    """How far a share is from one half, at either side."""
    low, high = sorted((abs(share.low - 0.5), abs(share.high - 0.5)))
    return Estimate(abs(share.value - 0.5), 0.0 if share.low <= 0.5 <= share.high else low, high, share.n)


def _change(found: Estimate, begun: float | None) -> Estimate:
    return found if begun is None else found.mapped(lambda share: share - begun)


def _cost(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of a run of cai: pairs with a label (by a judge, one of a prompt with best_worst), what the judge or people were
    asked, USD."""
    spent = result["spent"]
    if people := result.get("people"):
        asked = sum(each[what] for each in people["people"].values() for what in ("chosen", "ties", "skipped"))
        return {"pairs": people["pairs"], "questions": asked, "usd": spent["usd"]}
    return {"pairs": len(_labelled(folder)), "questions": spent["judged"], "usd": spent["usd"]}


def _compared(result: dict[str, Any], reward: bool = False) -> dict[str, Any]:
    """Of an evaluation of one run: `judge`, its win rate over the parent; `proxy`, its wins by the reward model, and
    `kl` in nats an answer."""
    evaluation = result["evaluation"]
    tuned = evaluation["recommended"]
    metrics = evaluation["systems"][tuned]["metrics"]
    found = {"judge": metrics["win_rate"], "kl": metrics["kl_k1"]}
    if reward:
        changes = [(row["systems"][tuned].get("change"), row["cluster"]) for row in evaluation["answers"]
                   if row["systems"][tuned].get("change") is not None]  # fmt: skip
        wins = [0.5 if not change else float(change > 0) for change, _ in changes]
        found["proxy"] = stats.estimate(wins, [cluster for _, cluster in changes])
    return found


def _over_length(result: dict[str, Any]) -> Estimate:
    gates = result["audit"]["verdict"]["gates"]
    gate = next((gate for gate in gates if gate["figure"] == "accuracy_over_length"), None)
    if gate is None:
        return Estimate(None, None, None, 0)
    return Estimate(gate["value"], gate["low"], gate["high"], gate["n"])


def describe(found: dict[str, Any]) -> str:
    """The rounds as a table, why they stopped or ended, which policy to keep; without a round why they ended alone."""
    rows = [["round", "judge", "proxy", "KL", "reward over length", "disputed", "labels"]]
    for each in found["rounds"]:
        shown = [format_estimate(each.get(key)) for key in ("judge", "proxy", "kl", "over_length", "disputed")]
        rows.append([str(each["round"]), *shown, str(sum(cost["pairs"] for cost in each.get("labels", [])))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if stopped := found["stopped"]:
        lines += ["", f"stopped  in round {stopped['round']} by {stopped['says']}: {stopped['why']}."]
    elif ended := found["ended"]:
        lines += ["", f"ended    at {ended['stage']}, not by a gate of the loop: {ended['says']}"]
    elif len(found["rounds"]) == found["asked"] and found["keep"] == found["rounds"][-1]["policy"]:
        lines += ["", "every gate holds; loop more with a higher rounds="]
    return "\n".join([*lines, f"keep     {found['keep']}"] if found["rounds"] else lines[2:])
