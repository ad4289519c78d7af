"""Where judges, principles, labels and the reward model disagree: the pairs are kept, not averaged away.

A choice is first, second or tie. Which of two answers comes first means nothing, so every coefficient counts each
pair in both orders: chance agreement then comes from ties alone, and without ties Cohen's kappa is 2 a - 1 for the
agreement a. A judge's p is the mean over its principles.

Shapes: N pairs, M members of an ensemble of reward models, C = 3 choices.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import gates
from rlhf_recipes.audit.judgements import DATA, LABELS, Judgement, Pair, by_judge, by_pair, clusters
from rlhf_recipes.audit.section import Figure, curve, dots, example, examples, figure, lines, section, skipped, table
from rlhf_recipes.errors import Refusal, nearest

TITLE = "Disagreement"
QUESTION = "Where do judges, principles and people disagree, and does the reward model show it?"
# close: |p - 1/2| below it. spread: standard deviation of p over principles above it. sure: the reward model's
# sigmoid(|margin|) from which on its disagreement counts.
LIMITS = {"close": 0.05, "spread": 0.15, "sure": 0.75}
REASONS = {
    "order": "the winner changes with the order",
    "close": "p is close to 1/2",
    "principles": "principles differ",
    "judges": "judges differ",
    "label": "a judge differs from the label",
    "labels": "human and data labels differ",
    "reward_model": "the reward model is sure of the other answer",
}
SHOWN, COMPARED, CURVE = 5, 6, 21
# Krippendorff 2004, Reliability in Content Analysis, chapter 11
READING = "1 is agreement, 0 is chance; .80 and more is called reliable, .667 to .80 tentative (Krippendorff 2004)."

Case = dict[str, Any]


def cases(
    judgements: Sequence[Judgement],
    rows=None,
    chosen_MN=None,
    rejected_MN=None,
    limits=None,
    own: frozenset[str] = frozenset(),
) -> list[Case]:
    """What was said of each compared pair.

    Args:
        rows: the N pairs that the scores are of; their labels are taken from `judgements` alone.
        limits: overrides of `LIMITS`.
        own: judges whose words the labels of the data are: beside theirs, these are no second opinion.

    Returns:
        Dicts with `prompt_id`, `cluster`, `prompt`, `family`, `first`, `second`, `judges` (p of the first answer by
        judge and principle), `p` (by judge), `flips` (by judge, where known), `margin` (reward of the first less that
        of the second, mean over members; None without a score), `why` (`REASONS`) and `opinions`, how many were asked.

    Raises:
        Refusal: an unknown limit, or scores that are not of these rows.
    """
    limits = _limits(limits)
    margins, cluster = _margins(rows, chosen_MN, rejected_MN), clusters(judgements)
    found = []
    for pair, said in by_pair(judgements).items():
        judges = by_judge(said)
        p = {judge: fmean(each.values()) for judge, each in judges.items()}
        flips = {}
        for _, each in said:
            if each["flip"] is not None:
                flips[each["judge"]] = flips.get(each["judge"], False) or each["flip"]
        one = next((each for _, each in said if each["prompt"]), said[0][1])
        case = {
            **dict(zip(("prompt_id", "first", "second"), pair, strict=True)),
            "cluster": cluster[pair[0]], "prompt": one["prompt"],
            "family": next((each["family"] for _, each in said if each["family"]), None),
            "judges": judges, "p": p, "flips": flips, "margin": margins.get(pair),
            # Both orders of one judge are two opinions.
            "opinions": len(flips) + sum(
                len(each) for judge, each in judges.items() if judge != DATA or not judges.keys() & own),
        }  # fmt: skip
        found.append(case | {"why": [name for name, holds in _reasons(case, limits).items() if holds]})
    return found


def disputed(judgements: Sequence[Judgement], rows=None, chosen_MN=None, rejected_MN=None) -> list[Case]:
    """The cases (see `cases`) with a reason to keep them, those with the most reasons and the widest opinions first:
    what `judgements.export` writes for people to label."""
    return _ranked(cases(judgements, rows, chosen_MN, rejected_MN))


def audit(
    judgements: Sequence[Judgement],
    rows=None,
    chosen_MN=None,
    rejected_MN=None,
    limits=None,
    own: frozenset[str] = frozenset(),
    least: int = gates.THRESHOLDS["min_prompts"],
) -> dict:
    """The section `disagreement`; other arguments and errors as in `cases`.

    Args:
        least: prompts of a judge who may be the one that agrees least with the label (`gates.decidable`).
    """
    found = cases(judgements, rows, chosen_MN, rejected_MN, limits, own)
    if not any(case["opinions"] > 1 for case in found):
        return skipped(
            "disagreement", TITLE, QUESTION, "Every pair has one opinion, so nothing can disagree. Give "
            "judgements=[<a file, or a run of cai>] by a second judge or by people, by several principles, or in both "
            "orders.",
        )  # fmt: skip
    kept, prompts = _ranked(found), [case["cluster"] for case in found]
    label, few = _label_figure(found, own, least)
    figures = [
        figure("disputed", "Disputed pairs", stats.estimate([bool(case["why"]) for case in found], prompts), unit="%",
               better="lower", says="Share of the compared pairs kept for one of the reasons in the table."),
        *_alphas(found),
        label,
        figure("flip_rate", "Winner changes with the order", _flip_rate(found), unit="%", better="lower",
               says="Share of pairs, each with each judge asked in both orders, whose better answer is another one "
               "after the swap. A judge without a view flips on about half."),
        *_reward_model_figures(found),
    ]  # fmt: skip
    return section(
        "disagreement", TITLE, QUESTION, figures=figures, tables=_tables(found), plots=_plots(found),
        examples=[examples("The most disputed pairs", [_example(case) for case in kept[:SHOWN]])] if kept else [],
        notes=[*_notes(found, kept), *few],
    )  # fmt: skip


def kappa(a_N: Sequence[float], b_N: Sequence[float], weights_N=None) -> float:
    """Cohen's kappa of the choices behind two judges' p, (a - e) / (1 - e), each pair in both orders; nan where all
    are ties. With tie rates s and t the chance agreement is e = s t + (1 - s)(1 - t) / 2."""
    a_N, b_N = _choices(a_N), _choices(b_N)
    weights_N = np.ones(len(a_N)) if weights_N is None else weights_N
    if not weights_N.sum():
        return math.nan
    agree, s, t = (np.average(x, weights=weights_N) for x in (a_N == b_N, a_N == 0, b_N == 0))
    chance = s * t + (1 - s) * (1 - t) / 2
    return float((agree - chance) / (1 - chance)) if chance < 1 else math.nan


def alpha(opinions: Sequence[Sequence[float]], prompts: Sequence[str], level: str) -> stats.Estimate:
    """Krippendorff's alpha = 1 - D_o / D_e as an estimate over prompts; units with one opinion are left out.

    Args:
        opinions: of each pair the p of everybody asked.
        level: nominal (the choices, by the package `krippendorff`) | interval (p itself, (p - q)^2, in closed form:
            D_o sums m / (m - 1) sum_i (p_i - mean)^2 over units of m opinions, D_e all (p - 1/2)^2).
    """
    several = [n for n, ps in enumerate(opinions) if len(ps) > 1]
    opinions, prompts = [list(opinions[n]) for n in several], [prompts[n] for n in several]
    if not several:
        return stats.estimate([])
    if level == "interval":
        m_N = np.array([len(ps) for ps in opinions], float)
        within_N = np.array([m * np.var(ps) * m / (m - 1) for m, ps in zip(m_N, opinions, strict=True)])
        around_N = np.array([sum((p - 0.5) ** 2 for p in ps) for ps in opinions])

        def interval(weights_N):
            values, around = 2 * (weights_N @ m_N), weights_N @ around_N
            return float(1 - (values - 1) / values * (weights_N @ within_N) / around) if around > 1e-12 else math.nan

        return stats.resampled(interval, len(opinions), prompts)
    counts_NC = np.array([[(_choices(ps) == choice).sum() for choice in (1, 0, -1)] for ps in opinions], float)
    m_N = counts_NC.sum(1)
    met_NCC = counts_NC[:, :, None] * counts_NC[:, None, :] - counts_NC[:, :, None] * np.eye(3)
    met_NCC = (met_NCC + met_NCC[:, ::-1, ::-1]) / (m_N - 1)[:, None, None]

    def nominal(weights_N):
        met_CC = np.tensordot(weights_N, met_NCC, 1)
        n_C = met_CC.sum(0)
        expected_CC = (np.outer(n_C, n_C) - np.diag(n_C)) / max(n_C.sum() - 1, 1)
        by_chance = expected_CC.sum() - np.trace(expected_CC)
        return float(1 - (met_CC.sum() - np.trace(met_CC)) / by_chance) if by_chance > 0 else math.nan

    found = stats.resampled(nominal, len(opinions), prompts)
    if found.value is None:
        return found
    import krippendorff

    both = np.concatenate([counts_NC, counts_NC[:, ::-1]]).astype(int)
    return replace(found, value=float(krippendorff.alpha(value_counts=both, level_of_measurement="nominal")))


def _limits(limits: Mapping | None) -> dict[str, float]:
    for key, value in (limits or {}).items():
        if key not in LIMITS:
            raise Refusal(f"disagreement.{key}: no such limit{nearest(str(key), LIMITS)} Rename or remove it.")
        top = 1.0 if key == "sure" else 0.5
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
            raise Refusal(f"disagreement.{key} = {value!r:.40}: must be a number from 0 to {top:g}. Change it.")
    return LIMITS | dict(limits or {})


def _margins(rows, chosen_MN, rejected_MN) -> dict[Pair, float]:
    if rows is None or chosen_MN is None or rejected_MN is None:
        return {}
    margin_MN = np.atleast_2d(np.asarray(chosen_MN, float) - np.asarray(rejected_MN, float))
    if margin_MN.shape[1] != len(rows):
        raise Refusal(f"chosen_MN = {margin_MN.shape[1]} pairs: {len(rows)} rows. Pass scores of the same rows.")
    found: dict[Pair, float] = {}
    for row, margin in zip(rows, margin_MN.mean(0).tolist(), strict=True):
        chosen, rejected = (row[side][-1]["content"].strip() for side in ("chosen", "rejected"))
        ordered = (chosen, rejected) if chosen <= rejected else (rejected, chosen)
        found[(row["prompt_id"], *ordered)] = margin if ordered[0] == chosen else -margin
    return found


def _choices(ps: Sequence[float]) -> np.ndarray:
    """1 for the first answer, -1 for the second, 0 for a tie."""
    return np.sign(np.round(np.asarray(ps, float) - 0.5, 9))


def _differ(a: float, b: float) -> bool:
    """Whether one says first and the other second; a tie differs from neither."""
    return float(_choices([a])[0] * _choices([b])[0]) < 0


def _reasons(case: Case, limits: dict[str, float]) -> dict[str, bool]:
    p = case["p"]
    differing = [sum(name in LABELS for name in two) for two in combinations(p, 2) if _differ(p[two[0]], p[two[1]])]
    sure = case["margin"] is not None and stats.sigmoid(abs(case["margin"])) >= limits["sure"]
    return {
        "order": any(case["flips"].values()),
        "close": any(abs(value - 0.5) < limits["close"] for value in p.values()),
        "principles": any(pstdev(each.values()) > limits["spread"] for each in case["judges"].values()),
        "judges": 0 in differing,
        "label": 1 in differing,
        "labels": 2 in differing,
        "reward_model": sure and _differ(fmean(p.values()), stats.sigmoid(case["margin"])),
    }


def _every_p(case: Case, but: str | None = None) -> list[float]:
    """p of every judge but one under each of its principles."""
    return [p for judge, each in case["judges"].items() if judge != but for p in each.values()]


def _ranked(found: list[Case]) -> list[Case]:
    def rank(case: Case):
        ps = _every_p(case)
        return -len(case["why"]), min(ps) - max(ps), case["prompt_id"], case["first"], case["second"]

    return sorted((case for case in found if case["why"]), key=rank)


def _divided(case: Case) -> bool:
    """Disputed whatever the reward model says."""
    return any(reason != "reward_model" for reason in case["why"])


def _alphas(found: list[Case]) -> list[Figure]:
    """Over judges, of whom the data is none, and, apart, over the principles of each judge."""
    by_judges = [(case["cluster"], [p for judge, p in case["p"].items() if judge != DATA]) for case in found]
    by_principles = [
        (case["cluster"], list(each.values())) for case in found for each in case["judges"].values() if len(each) > 1
    ]
    figures = []
    for key, who, units in (("alpha", "judges", by_judges), ("alpha_principles", "principles", by_principles)):
        prompts, opinions = [prompt for prompt, _ in units], [ps for _, ps in units]
        for suffix, level, of in (("", "nominal", "choices"), ("_p", "interval", "probabilities")):
            figures.append(figure(
                f"{key}{suffix}", f"Agreement of {who} on {of}", alpha(opinions, prompts, level), better="higher",
                baseline=("chance", 0.0), says=f"Krippendorff's alpha, {level}, over pairs with two or more {who}, "
                f"each pair in both orders. {READING}"))  # fmt: skip
    return figures


def _both(found: list[Case], one: str, other: str) -> tuple[list[str], list[float], list[float]]:
    """Prompts and both judges' p of the pairs that both judged."""
    shared = [case for case in found if one in case["p"] and other in case["p"]]
    return [c["cluster"] for c in shared], [c["p"][one] for c in shared], [c["p"][other] for c in shared]


def _kappa_estimate(prompts: list[str], a: list[float], b: list[float]) -> stats.Estimate:
    return stats.resampled(lambda weights_N: kappa(a, b, weights_N), len(a), prompts)


def _judges(found: list[Case]) -> list[str]:
    """Labels last, the others by how many pairs they judged."""
    counts = Counter(judge for case in found for judge in case["p"])
    return sorted(counts, key=lambda judge: (judge in LABELS, -counts[judge], judge))


def _label_figure(found: list[Case], own: frozenset[str], least: int) -> tuple[Figure, list[str]]:
    """The figure, and which judges are not looked at for it."""
    names = _judges(found)
    label = next((name for name in LABELS if name in names), None)
    told = [judge for judge in names if label == DATA and judge in own]
    asked = [judge for judge in names if label and judge not in (*LABELS, *told)]
    found_of = {judge: _kappa_estimate(*_both(found, judge, label)) for judge in asked}
    found_of, few = gates.decidable({judge: each for judge, each in found_of.items() if each.value is not None}, least)
    name, lowest = stats.extreme(found_of, "higher", -1, 1) if found_of else (None, stats.estimate([]))
    of = f" Lowest: {name} against {label}." if name else ""
    of += " The interval is one of all judges at once." if len(found_of) > 1 else ""
    if told:
        few.append(f"The labels of the data are the word of {', '.join(told)}: agreement with them shows nothing.")
    return figure("kappa_label", "Agreement of judges with the label", lowest, better="higher",
                  baseline=("chance", 0.0), says="Cohen's kappa (a - e) / (1 - e) of the judge that agrees least with "
                  f"the label, each pair in both orders.{of}"), few  # fmt: skip


def _flip_rate(found: list[Case]) -> stats.Estimate:
    flips = [(case["cluster"], flip) for case in found for flip in case["flips"].values()]
    return stats.estimate([flip for _, flip in flips], [prompt for prompt, _ in flips])


def _scored(found: list[Case]) -> list[Case]:
    """Cases with a margin on which more than one opinion was asked."""
    return [case for case in found if case["margin"] is not None and case["opinions"] > 1]


def _by_opinion(scored: list[Case]) -> tuple[list[Case], list[Case]]:
    """Those on which opinions divide, and the unanimous ones."""
    divided, unanimous = [], []
    for case in scored:
        (divided if _divided(case) else unanimous).append(case)
    return divided, unanimous


def _confidence(part: list[Case]) -> stats.Estimate:
    """Mean |P - 1/2| of the reward model."""
    values = [abs(float(stats.sigmoid(case["margin"])) - 0.5) for case in part]
    return stats.mean(values, [case["cluster"] for case in part])


def _reward_model_figures(found: list[Case]) -> list[Figure]:
    scored = _scored(found)
    divided, unanimous = _by_opinion(scored)
    sure, agreed = _confidence(divided), _confidence(unanimous).value
    baseline = None if agreed is None else ("unanimous pairs", agreed)
    shows = stats.estimate([])
    if divided and unanimous:
        shows = stats.auroc([abs(case["margin"]) for case in scored], [not _divided(case) for case in scored],
                            [case["cluster"] for case in scored])  # fmt: skip
    right = []
    for case in unanimous:
        choice = _choices([fmean(case["p"].values())])[0]
        right.append((np.sign(case["margin"]) * choice + 1) / 2)
    return [
        figure("margin_auroc", "Reward model shows disagreement", shows, better="higher", baseline=("a coin", 0.5),
               says="Chance that |margin| is larger on a unanimous pair than on a divided one (AUROC). 1/2: the "
               "reward model is as sure where opinions divide, and hides it (Zhang et al. 2024, arXiv:2410.14632)."),
        figure("divided_confidence", "Reward model's confidence on divided pairs", sure, better="lower",
               baseline=baseline, says="Mean |P - 1/2|, P = sigmoid(margin): 0 knows that it does not know, 1/2 is "
               "certain."),
        figure("unanimous_accuracy", "Reward model right on unanimous pairs", stats.estimate(
               right, [case["cluster"] for case in unanimous]), unit="%", better="higher", baseline=("a coin", 0.5),
               says="Share of the pairs on which all opinions agree where the margin has their sign."),
    ]  # fmt: skip


def _tables(found: list[Case]) -> list[dict]:
    prompts = [case["cluster"] for case in found]
    why = [
        [text, sum(name in case["why"] for case in found), stats.estimate([name in c["why"] for c in found], prompts)]
        for name, text in REASONS.items()
    ]
    tables = [table("Why pairs are disputed", ["reason", "pairs", "share"], why, "A pair may have several reasons.")]
    names, pairs = _judges(found), {}
    for one, other in combinations(names, 2):
        shared = _both(found, one, other)
        if shared[0]:
            pairs[one, other] = shared
    if pairs:
        cells = {two: kappa(*shared[1:]) for two, shared in pairs.items()}
        matrix = []
        for a in names:
            row = [1.0 if a == b else cells.get((a, b), cells.get((b, a))) for b in names]
            matrix.append([a, *(None if x is None or math.isnan(x) else round(x, 3) for x in row)])
        tables.append(table("Cohen's kappa", ["judge", *names], matrix, "0 is chance, 1 is agreement."))
        listed = sorted(pairs, key=lambda two: (np.nan_to_num(cells[two], nan=2.0), two))[:COMPARED]
        tables.append(table("Who disagrees with whom", ["judges", "pairs", "same choice", "kappa"], [
            [" and ".join(two), len(pairs[two][0]), stats.estimate(
                _choices(pairs[two][1]) == _choices(pairs[two][2]), pairs[two][0]),
             stats.format_estimate(_kappa_estimate(*pairs[two]))]
            for two in listed], f"The {COMPARED} that agree least." if len(pairs) > COMPARED else ""))  # fmt: skip
    else:
        listed = []
    flips = _flip_table(found)
    return [*tables, *([flips] if flips["rows"] else []), *_family_tables(found, listed)]


def _flip_table(found: list[Case]) -> dict:
    of: dict[str, list[tuple[str, bool]]] = {}
    for case in found:
        for judge, flip in case["flips"].items():
            for name in (f"judge {judge}", *(f"principle {x}" for x in case["judges"][judge] if x is not None)):
                of.setdefault(name, []).append((case["cluster"], flip))
    rows = [[name, len(each), stats.estimate([f for _, f in each], [p for p, _ in each])]
            for name, each in sorted(of.items())]  # fmt: skip
    return table("Winner changes with the order", ["asked", "pairs", "flips"], rows,
                 "A pair judged under several principles flips for all of them or for none.")  # fmt: skip


def _families(found: list[Case]) -> dict[str, list[Case]]:
    of: dict[str, list[Case]] = {}
    for case in found:
        of.setdefault(case["family"] or "none", []).append(case)
    return dict(sorted(of.items())) if len(of) > 1 else {}


def _family_tables(found: list[Case], listed: list[tuple[str, str]]) -> list[dict]:
    summary, who = [], []
    for family, part in _families(found).items():
        prompts = [case["cluster"] for case in part]
        opinions = [_every_p(case, DATA) for case in part]
        summary.append([family, len(part), stats.estimate([bool(c["why"]) for c in part], prompts), _flip_rate(part),
                        stats.format_estimate(alpha(opinions, prompts, "nominal"))])  # fmt: skip
        row = [family]
        for two in listed[:3]:
            shared = _both(part, *two)
            row.append(stats.estimate(_choices(shared[1]) != _choices(shared[2]), shared[0]))
        who.append(row)
    if not summary:
        return []
    first = table("By family", ["family", "pairs", "disputed", "flips", "alpha"], summary,
                  "Alpha: of the choices of all judges and principles.")  # fmt: skip
    columns = ["family", *(" and ".join(two) for two in listed[:3])]
    return [first, table("Share of other choices, by family", columns, who)] if listed else [first]


def _plots(found: list[Case]) -> list[dict]:
    plots = []
    divided, unanimous = _by_opinion(_scored(found))
    if divided and unanimous:
        levels, curves = np.linspace(0, 1, CURVE), []
        for name, part in (("unanimous", unanimous), ("divided", divided)):
            margins = np.quantile([abs(case["margin"]) for case in part], levels)
            curves.append(curve(name, margins.tolist(), levels.tolist()))
        plots.append(lines("How sure the reward model is where opinions agree and where they divide", "|margin|, nats",
                           "share of pairs below", curves))  # fmt: skip
    shares = [(family, stats.estimate([bool(c["why"]) for c in part], [c["cluster"] for c in part]))
              for family, part in _families(found).items()]  # fmt: skip
    if shares:
        overall = fmean(bool(case["why"]) for case in found)
        plots.append(dots("Disputed pairs by family", shares, "share disputed", ("all", overall)))
    return plots


def _example(case: Case) -> dict:
    asked = "\n".join(turn["content"] for turn in case["prompt"] or [])
    texts = [("prompt", asked)] if asked else []
    said = [
        f"{judge}{f' under {principle}' if principle else ''} {p:.2f}"
        for judge, each in case["judges"].items()
        for principle, p in each.items()
    ]
    if case["margin"] is not None:
        said.append(f"reward model {float(stats.sigmoid(case['margin'])):.2f}")
    why = ", ".join(REASONS[reason] for reason in case["why"])
    texts += [("answer 1", case["first"]), ("answer 2", case["second"])]
    return example(why[0].upper() + why[1:], texts, f"Probability that answer 1 is better: {'; '.join(said)}.")


def _notes(found: list[Case], kept: list[Case]) -> list[str]:
    asked = sum(case["opinions"] > 1 for case in found)
    notes = [f"{asked:,} of {len(found):,} pairs have more than one opinion; {len(kept):,} are disputed."]
    if not any(len(case["p"]) > 1 for case in found):
        notes.append("There is one judge, so nothing says how far another would agree. Give judgements of a second.")
    scored = _scored(found)
    divided = sum(map(_divided, scored))
    if not scored:
        notes.append("No pair with several opinions has a reward, so whether the reward model hides disagreement is "
                     "not known.")  # fmt: skip
    elif 0 < divided < len(scored):
        # Hanley & McNeil 1982 at an area of 1/2
        few = 1.96 * math.sqrt((len(scored) + 1) / (12 * divided * (len(scored) - divided)))
        notes.append(f"With {divided:,} divided and {len(scored) - divided:,} unanimous pairs an AUROC within "
                     f"{few:.2f} of 1/2 cannot be told from a coin.")  # fmt: skip
    return notes
