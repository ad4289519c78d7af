"""Uncertainty of a reward model: does it know where it is wrong, and does an ensemble know better?

Shapes: M members, N pairs, K answers, F features. Members are put on one scale by `standardise` before a minimum or a
variance over them means anything.
"""

import math

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import section
from rlhf_recipes.data.formats import clusters
from rlhf_recipes.ensemble import LAMBDA, combine, standardise
from rlhf_recipes.errors import Refusal

KEY, TITLE = "uncertainty", "Uncertainty"
QUESTION = "Does the reward model know when it does not know?"
LAMBDAS = (0.0, 0.05, 0.1, 0.5, 1.0)
DELTA = 0.1
COVERAGE = 0.8
_NONE = stats.estimate([])


def mahalanobis(train_NF, test_KF, ridge: float = 1e-3) -> np.ndarray:
    """Novelty of answers by their last-layer features e: U = sqrt(e' M^-1 e), M = lambda I + sum e e' over the answers
    that the reward model was trained on (AdvPO, Zhang et al. 2024, arXiv:2403.05171). Shape (K,).

    Not centred: U is the width of the confidence interval of a reward that is linear in e. lambda = ridge * trace / F,
    so that U does not depend on the scale of the features.
    """
    from scipy.linalg import cholesky, solve_triangular

    train_NF, test_KF = np.asarray(train_NF, float), np.asarray(test_KF, float)
    if train_NF.ndim != 2 or test_KF.ndim != 2 or train_NF.shape[1] != test_KF.shape[1] or not len(train_NF):
        raise Refusal(
            f"train, test = shapes {train_NF.shape}, {test_KF.shape}: must be (N, F) and (K, F), N > 0. "
            "Take both from one reward model."
        )
    gram_FF = train_NF.T @ train_NF
    mean = np.trace(gram_FF) / len(gram_FF)
    if mean == 0:
        raise Refusal("train = all zero: must have features. Take them from the layer under the reward head.")
    lower_FF = cholesky(gram_FF + ridge * mean * np.eye(len(gram_FF)), lower=True)
    return np.sqrt((solve_triangular(lower_FF, test_KF.T, lower=True) ** 2).sum(0))


def out_of_distribution(held_out, test, ids=None) -> dict:
    """Share of test novelties above the 95 % quantile of those of held-out answers from the training distribution; 5 %
    by chance. The held-out answers must not be among those that the novelty was fitted to."""
    held_out, test = np.asarray(held_out, float), np.asarray(test, float)
    if not len(held_out) or not len(test):
        return _NONE
    return stats.estimate(test > np.quantile(held_out, 0.95), ids)


def coverage_curve(uncertainties, wrong, weights=None) -> tuple[np.ndarray, np.ndarray]:
    """Pairs kept, least uncertain first, and wrong ones among them (cumulative, weighted), each shape (N,). Pairs of
    equal uncertainty share what is wrong evenly, so that their order does not matter."""
    uncertainties, wrong = np.asarray(uncertainties, float), np.asarray(wrong, float)
    weights = np.ones(len(wrong)) if weights is None else weights
    codes = np.unique(uncertainties, return_inverse=True)[1]
    held, lost = np.bincount(codes, weights), np.bincount(codes, weights * wrong)
    share = lost / np.where(held > 0, held, 1)
    order = np.argsort(codes, kind="stable")
    return np.cumsum(weights[order]), np.cumsum(weights[order] * share[codes[order]])


def aurc(uncertainties, wrong, weights=None) -> float:
    """Area under the risk-coverage curve: mean over N of the share wrong among the k least uncertain (Geifman et al.
    2019, arXiv:1805.08206). Dropping at random has the error rate; the oracle drops what is wrong first."""
    kept, lost = coverage_curve(uncertainties, wrong, weights)
    steps = np.diff(kept, prepend=0)
    return float((steps[steps > 0] * lost[steps > 0] / kept[steps > 0]).sum() / kept[-1])


def accuracy_at(uncertainties, wrong, coverage: float = COVERAGE, weights=None) -> float:
    """Accuracy on the share `coverage` of pairs that are least uncertain (linear between two pairs)."""
    kept, lost = (np.concatenate([[0], values]) for values in coverage_curve(uncertainties, wrong, weights))
    return float(1 - np.interp(coverage * kept[-1], kept, lost) / (coverage * kept[-1]))


def abstain_margin(margins, delta: float = DELTA) -> float:
    """tau such that a pair of the same distribution is wrong by tau or more with probability of at most delta: split
    conformal, the ceil((N + 1)(1 - delta))-th smallest of -margin, at least 0; infinite with too few pairs.

    Abstaining where |margin| <= tau leaves at most a share delta of all pairs answered wrong.
    """
    margins = np.asarray(margins, float)
    rank = math.ceil((len(margins) + 1) * (1 - delta) - 1e-9)
    return math.inf if rank > len(margins) else max(0.0, float(np.sort(-margins)[rank - 1]))


def audit(rows: list[dict], chosen_MN, rejected_MN, novelty_N2=None, reference_MK=None, seed: int = 0) -> dict:
    """What an ensemble of M reward models knows about its errors on N pairs.

    Args:
        novelty_N2: `mahalanobis` of chosen and rejected; the pair's is the larger.
        reference_MK: rewards that give each member its offset and scale; by default, those of both answers of `rows`.
    """
    chosen_MN, rejected_MN = (np.atleast_2d(np.asarray(scores, float)) for scores in (chosen_MN, rejected_MN))
    if chosen_MN.shape != rejected_MN.shape or chosen_MN.shape[1] != len(rows):
        raise Refusal(
            f"chosen, rejected = shapes {chosen_MN.shape}, {rejected_MN.shape}: both must be (M, {len(rows)}). "
            "Score every pair with every member."
        )
    if not rows:
        return section.skipped(KEY, TITLE, QUESTION, "Give test pairs and the rewards of one model or an ensemble.")
    reference_MK = np.concatenate([chosen_MN, rejected_MN], 1) if reference_MK is None else reference_MK
    chosen_MN, rejected_MN = standardise(chosen_MN, reference_MK), standardise(rejected_MN, reference_MK)
    members, ids = len(chosen_MN), clusters(rows)
    margins_MN = chosen_MN - rejected_MN
    mean_N = margins_MN.mean(0)
    wrong_N = mean_N <= 0
    ways = {"margin": ("−|margin| of one member", -np.abs(margins_MN[0]))}
    if members > 1:
        ways = {"std": ("spread of the members", margins_MN.std(0))} | ways
        ways["mean_margin"] = ("−|margin| of the mean", -np.abs(mean_N))
    if novelty_N2 is not None:
        ways["novelty"] = ("novelty (Mahalanobis)", np.asarray(novelty_N2, float).max(1))
    figures = [
        *_accuracies(chosen_MN, rejected_MN, ids),
        *_detection(ways, wrong_N, ids),
        *_spread(ways, mean_N, wrong_N, ids),
        *_diversity(margins_MN, len(set(ids))),
    ]
    abstain, note = _abstaining(mean_N, ids, seed)
    notes = [
        f"Members are centred and scaled by their own rewards; {int(wrong_N.sum())} of {len(rows)} pairs are ranked "
        "wrong (or tied) by their mean, and only those tell one uncertainty from another.",
        note,
    ]  # fmt: skip
    if members == 1:
        notes.insert(0, "One member only: train an ensemble (reward=ensemble) to measure how far its members differ.")
    return section.section(
        KEY, TITLE, QUESTION, figures=figures + abstain,
        tables=_tables(chosen_MN, rejected_MN, ways, wrong_N, rows, ids), plots=_plots(ways, wrong_N, margins_MN, ids),
        examples=_examples(rows, chosen_MN, rejected_MN, ways), notes=notes,
    )  # fmt: skip


def _right(margins) -> np.ndarray:
    return 0.5 * (1 + np.sign(margins))


def _margins(chosen_MN, rejected_MN, how: str, lam: float = LAMBDA) -> np.ndarray:
    return combine(chosen_MN, how, lam) - combine(rejected_MN, how, lam)


def _accuracies(chosen_MN, rejected_MN, ids) -> list[section.Figure]:
    first_N, several = _right(chosen_MN[0] - rejected_MN[0]), len(chosen_MN) > 1
    ways = {
        "mean": ("mean", "Mean of the members."),
        "min": ("worst case", "The least reward of any member."),
        "uwo": ("UWO", f"Mean − {LAMBDA} · variance over members (population; arXiv:2310.02743, eq. 5)."),
    }
    figures = [section.figure("accuracy", "Accuracy of the first member", stats.estimate(first_N, ids), unit="%",
                              better="higher", baseline=("a coin", 0.5), says="A tie counts one half.")]  # fmt: skip
    for how, (name, says) in ways.items():
        right_N = _right(_margins(chosen_MN, rejected_MN, how))
        found = stats.estimate(right_N, ids) if several else _NONE
        figures.append(section.figure(f"accuracy_{how}", f"Accuracy of the ensemble, {name}", found, unit="%",
                                      better="higher", baseline=("a member", _member(chosen_MN, rejected_MN)),
                                      says=says))  # fmt: skip
    gain = stats.difference(_right(_margins(chosen_MN, rejected_MN, "mean")), first_N, ids) if several else _NONE
    figures.append(section.figure("accuracy_gain", "Accuracy gained by the ensemble's mean over one member", gain,
                                  unit="%", better="higher", baseline=("one member", 0.0)))  # fmt: skip
    return figures


def _member(chosen_MN, rejected_MN) -> float:
    return float(_right(chosen_MN - rejected_MN).mean())


def _detection(ways: dict, wrong_N, ids) -> list[section.Figure]:
    """AUROC of every uncertainty for the errors of the ensemble's mean."""
    areas, figures = {key: stats.area(u_N, wrong_N) for key, (_, u_N) in ways.items()}, []
    texts = {
        "std": "standard deviation over members of the margin",
        "mean_margin": "minus the size of the mean margin",
        "margin": "minus the size of the first member's margin, which needs no ensemble",
        "novelty": "√(e′M⁻¹e), the larger of the two answers (arXiv:2403.05171), which needs no ensemble",
    }
    for key, text in texts.items():
        found = stats.of_rarer(stats.resampled(areas[key], len(ids), ids), wrong_N, ids) if key in ways else _NONE
        name = ways[key][0] if key in ways else {"novelty": "novelty"}.get(key, "spread of the members")
        figures.append(section.figure(f"auroc_{key}", f"Errors found by: {name}", found, better="higher",
                                      baseline=("a coin", 0.5),
                                      says=f"AUROC for pairs that the mean ranks wrong, of the {text}."))  # fmt: skip
    gain = _NONE
    if "std" in ways:
        gain = stats.resampled(lambda weights: areas["std"](weights) - areas["margin"](weights), len(ids), ids)
        gain = stats.of_rarer(gain, wrong_N, ids)
    figures.append(section.figure("auroc_gain", "AUROC gained by the spread over one member's margin", gain,
                                  better="higher", baseline=("no gain", 0.0), says="Paired."))  # fmt: skip
    return figures


def _spread(ways: dict, mean_N, wrong_N, ids) -> list[section.Figure]:
    """What the spread of the members (of one member: its margin) is good for."""
    size, figures = len(wrong_N), []
    for key, suffix in (("std", ""), ("margin", "_margin")):
        name = ways[key][0] if key in ways else "spread of the members"
        area = at = gain = _NONE
        if key in ways:
            u_N = ways[key][1]
            area = stats.resampled(lambda w, u=u_N: aurc(u, wrong_N, w), size, ids, resamples=500)
            at = stats.resampled(lambda w, u=u_N: accuracy_at(u, wrong_N, weights=w), size, ids, resamples=500)
            gain = stats.of_rarer(stats.resampled(
                lambda w, u=u_N: accuracy_at(u, wrong_N, weights=w) - 1 + float(w @ wrong_N / w.sum()), size, ids,
                resamples=500,
            ), wrong_N, ids)  # fmt: skip
        best = aurc(wrong_N, wrong_N)
        figures += [
            section.figure(f"aurc{suffix}", f"Risk over coverage: {name}", area, unit="%", better="lower",
                           baseline=("dropping at random", float(wrong_N.mean())),
                           says="AURC, mean share wrong among the k least uncertain pairs (arXiv:1805.08206); an "
                           f"oracle has {100 * best:.1f} %."),
            section.figure(f"accuracy_at_80{suffix}", f"Accuracy on the surest 80 %: {name}", at, unit="%",
                           better="higher", baseline=("all pairs", float(1 - wrong_N.mean()))),
            section.figure(f"accuracy_at_80_gain{suffix}", f"Accuracy gained by dropping 20 %: {name}", gain, unit="%",
                           better="higher", baseline=("dropping at random", 0.0)),
        ]  # fmt: skip
    rank = _NONE
    if "std" in ways and np.ptp(ways["std"][1]) > 0 and np.ptp(mean_N) > 0:
        from scipy.stats import rankdata

        a_N, b_N = rankdata(ways["std"][1]), rankdata(-mean_N)
        rank = stats.resampled(lambda w: stats.correlation(a_N, b_N, w), size, ids)
    says = "Spearman's rank correlation of the spread with −margin, how wrong a pair is (ranks of all pairs)."
    return [*figures, section.figure("spearman", "Spread against how wrong", rank, better="higher",
                                     baseline=("no relation", 0.0), says=says)]  # fmt: skip


def _diversity(margins_MN, clusters: int) -> list[section.Figure]:
    """How different the members are; plain numbers over pairs of members."""
    from scipy.stats import kendalltau

    wrong_MN, errors, taus = (margins_MN <= 0).astype(float), [], []
    members, ones = len(margins_MN), np.ones(margins_MN.shape[1])
    for i in range(members if len(ones) > 1 else 0):
        for j in range(i):
            errors.append(stats.correlation(wrong_MN[i], wrong_MN[j], ones))
            taus.append(float(kendalltau(margins_MN[i], margins_MN[j]).statistic))
    found = []
    for values in (errors, taus):
        values = [x for x in values if not math.isnan(x)]
        value = float(np.mean(values)) if values else None
        found.append(stats.Estimate(value, None, None, margins_MN.shape[1], clusters))
    correlation, tau = found
    return [
        section.figure("error_correlation", "Correlation of the members' errors", correlation, better="lower",
                       baseline=("copies of one member", 1.0), says="Mean over pairs of members."),
        section.figure("diversity", "Diversity of the members", tau.mapped(lambda x: 1 - x), better="higher",
                       baseline=("copies of one member", 0.0), says="Mean 1 − Kendall's τ of their margins."),
    ]  # fmt: skip


def _abstaining(mean_N, ids, seed: int) -> tuple[list[section.Figure], str]:
    """The abstain margin from one half of the prompts, tried on the other."""
    names = sorted(set(ids))
    half = set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist())
    in_half = np.array([i in half for i in ids])
    tau = abstain_margin(mean_N[in_half])
    margins, rest = mean_N[~in_half], [i for i in ids if i not in half]
    answered = np.abs(margins) > tau
    wrong, coverage, value = _NONE, _NONE, _NONE
    if math.isfinite(tau):
        wrong, coverage = stats.estimate(answered & (margins < 0), rest), stats.estimate(answered, rest)
        value = stats.Estimate(tau, None, None, int(in_half.sum()), len(half))
    error = float((margins < 0).mean()) if len(margins) else 0.0
    figures = [
        section.figure("abstain_margin", f"Margin below which to abstain (δ = {DELTA:.0%})", value, unit="sd",
                       says="Split conformal: the 1 − δ quantile of −margin on one half of the prompts."),
        section.figure("abstain_wrong", "Answered wrong when abstaining", wrong, unit="%", better="lower",
                       baseline=("never abstaining", error), says="Share of all pairs of the other half."),
        section.figure("abstain_coverage", "Answered when abstaining", coverage, unit="%", better="higher",
                       baseline=("never abstaining", 1.0), says="Share of all pairs of the other half."),
    ]  # fmt: skip
    note = f"Abstaining is set on {int(in_half.sum())} pairs and tried on {len(margins)}"
    return figures, note + (": too few for a bound." if not math.isfinite(tau) else ", split by prompt.")


def _tables(chosen_MN, rejected_MN, ways: dict, wrong_N, rows, ids) -> list[dict]:
    tables, base_N = [], _right(_margins(chosen_MN, rejected_MN, "mean"))
    if len(chosen_MN) > 1:
        lines = [
            [f"member {m + 1}", _right(c - r)] for m, (c, r) in enumerate(zip(chosen_MN, rejected_MN, strict=True))
        ]
        lines += [[f"{how} of all", _right(_margins(chosen_MN, rejected_MN, how))] for how in ("mean", "min")]
        lines += [[f"UWO, λ = {lam}", _right(_margins(chosen_MN, rejected_MN, "uwo", lam))] for lam in LAMBDAS]
        lines = [[name, stats.estimate(r_N, ids), stats.difference(r_N, base_N, ids)] for name, r_N in lines]
        note = "UWO = mean − λ · variance over members, population variance (arXiv:2310.02743)."
        tables.append(section.table("Accuracy", ["", "accuracy", "against the mean"], lines, note))
    families = sorted({row["family"] for row in rows if row["family"] is not None})
    lines = []
    for family in families:
        at = [i for i, row in enumerate(rows) if row["family"] == family]
        right = stats.estimate(1 - wrong_N[at].astype(float), [ids[i] for i in at])
        lines.append([family, len(at), right, *(round(float(ways[key][1][at].mean()), 3) for key in ways)])
    if lines:
        lines.sort(key=lambda line: line[2].value)
        columns = ["family", "n", "right", *(name for name, _ in ways.values())]
        tables.append(section.table("Mean uncertainty by family", columns, lines, "Worst accuracy first."))
    return tables


def _plots(ways: dict, wrong_N, margins_MN, ids) -> list[dict]:
    at = np.linspace(0.05, 1, 20)
    size = len(wrong_N)

    def risks(u_N) -> list[float]:
        return [1 - accuracy_at(u_N, wrong_N, c) for c in at]

    curves = [section.curve(name, at.tolist(), risks(u_N)) for name, u_N in ways.values()]
    curves.append(section.curve("oracle", at.tolist(), risks(wrong_N), points=False))
    curves.append(section.curve("at random", at.tolist(), risks(np.zeros(size)), points=False))
    plots = [section.lines("Share wrong among the surest pairs", "share of pairs kept", "share wrong", curves)]
    if len(margins_MN) > 1:
        named = [(f"member {m + 1}", stats.estimate(_right(row), ids)) for m, row in enumerate(margins_MN)]
        named.append(("mean of all", stats.estimate(_right(margins_MN.mean(0)), ids)))
        plots.append(section.dots("Accuracy of the members", named, "accuracy (%)", ("a coin", 0.5)))
    return plots


def _examples(rows, chosen_MN, rejected_MN, ways: dict) -> list[dict]:
    """The pairs on which members differ most."""
    if "std" not in ways or "chosen" not in rows[0]:
        return []
    found = []
    for i in np.argsort(-ways["std"][1], kind="stable")[:3]:
        texts = [("prompt", rows[i]["prompt"][-1]["content"]), ("chosen", rows[i]["chosen"][-1]["content"]),
                 ("rejected", rows[i]["rejected"][-1]["content"])]  # fmt: skip
        margins = ", ".join(f"{x:+.2f}" for x in chosen_MN[:, i] - rejected_MN[:, i])
        found.append(
            section.example(f"Prompt {rows[i]['prompt_id']}", texts, f"Margins of the members (sd): {margins}.")
        )
    return [section.examples("Where the members differ most", found)]
