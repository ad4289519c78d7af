"""Can one scalar reward explain the preferences? The cycles of `cycles`, beside the power of the test.

Two answers can never contradict each other, so the same graphs with every label drawn by a coin stand beside each
figure (Bronars 1987): data that passes where a coin would pass too has shown nothing.

Shapes: see `cycles`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit.cycles import (
    CLIP,
    EXACT,
    Graph,
    build,
    by_coin,
    count,
    deviance,
    hodge,
    measure,
    rings,
    triangles,
)
from rlhf_recipes.audit.judgements import Judgement, by_pair, clusters
from rlhf_recipes.audit.section import Figure, dots, example, examples, figure, section, skipped, table

TITLE = "Consistency"
QUESTION = "Could any single score for each answer explain these preferences, or do they run in circles?"
CONTEXTS, SHOWN, FITS = 12, 3, 20
NONE = stats.Estimate(None, None, None, 0)


def contradictory(judgements: Sequence[Judgement]) -> tuple[list[str], list[bool]]:
    """Of each pair that one judge labelled more than once under one principle, which alone can contradict, the cluster
    of its prompt and whether it was labelled both ways."""
    prompts, both, cluster = [], [], clusters(judgements)
    for (prompt, *_), said in by_pair(judgements).items():
        ways: dict[tuple, list[float]] = {}
        for p, judgement in said:
            ways.setdefault((judgement["judge"], judgement["principle"]), []).append(p)
        if any(len(ps) > 1 for ps in ways.values()):
            prompts.append(cluster[prompt])
            both.append(any(min(ps) < 0.5 < max(ps) for ps in ways.values()))
    return prompts, both


def audit(judgements: Sequence[Judgement], seed: int = 0) -> dict:
    """The section `consistency`; see `judgements` for what a judgement is."""
    if not judgements:
        return skipped("consistency", TITLE, QUESTION, "No judgements. Give preference pairs or a file of judgements.")
    graph = build(judgements)
    corners_T3 = triangles(graph)
    rings_P = rings(graph)
    testable_P = rings_P > 0
    found = measure(graph, corners_T3)
    rng = np.random.default_rng([seed, 1])
    # enough draws for about a thousand graphs of a few answers, one where the graphs are many themselves
    draws = int(np.clip(5000 // len(graph.p_E), 1, 100)) if testable_P.any() else 0
    coins = [by_coin(graph, rng) for _ in range(draws)]
    chance = [measure(coin, corners_T3) for coin in coins]
    figures = [*_cycle_figures(graph, found, chance, testable_P), *_fit_figures(graph, coins, corners_T3, rings_P)]
    figures.append(_contradictory_figure(judgements))
    contexts = _contexts(judgements)
    notes = _notes(graph, found, testable_P, contexts, judgements)
    shown = [*_by_answers(graph, found, chance, testable_P), *([_context_table(contexts)] if contexts else [])]
    plots = []
    if testable_P.any():
        line = ("labels by a coin", figures[0].baseline.value)
        rows = [(f"{row[0]} answers", row[2]) for row in shown[0]["rows"]]
        rows += [(name, each) for name, _, each, *_ in contexts if each.value is not None]
        plots.append(dots("Prompts that one reward can explain", rows, "share of prompts without a cycle", line))
    return section(
        "consistency", TITLE, QUESTION, figures=figures, tables=shown, plots=plots,
        examples=_examples(graph, found, judgements), notes=notes,
    )  # fmt: skip


def _zeta(graph: Graph, found: dict, testable_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's zeta of the prompts (places) whose answers are all compared without a tie."""
    n_P = count(graph.prompt_V, graph)
    whole = np.flatnonzero(testable_P & (found["strict"] == n_P * (n_P - 1) / 2))
    n, d = n_P[whole], found["cyclic"][whole]
    return whole, 1 - 24 * d / np.where(n % 2, n**3 - n, n**3 - 4 * n)


# key -> title, unit, better, definition
CYCLE_FIGURES = {
    "rationalisable": ("Prompts that one reward can explain", "%", "higher",
        "Share of the prompts whose compared answers form a ring (at least three answers) and whose preferences have "
        "no cycle with a strict edge (GARP; Afriat 1967, Varian 1982)."),
    "power": ("Chance that a coin would be caught", "%", "higher",
        "Share of the same graphs that have a cycle when every label is drawn by a coin (Bronars 1987). Near 0 the "
        "figure above says nothing."),
    "cyclic_triads": ("Circular triads", "%", "lower",
        "Share of three answers, all compared without a tie, with A over B, B over C, C over A; 1/4 by a coin "
        "(Kendall & Babington Smith 1940)."),
    "kendall_zeta": ("Kendall's coefficient of consistence", "", "higher",
        "1 - 24 d / (n^3 - n) for an odd number n of answers, 1 - 24 d / (n^3 - 4 n) for an even one, d the circular "
        "triads; mean over prompts whose answers are all compared without a tie. 1: none, 0: as many as can be."),
    "houtman_maks": ("Comparisons that one reward can keep", "%", "higher",
        "1 - (fewest strict preferences to drop until no cycle is left) / (all strict preferences), over the prompts "
        "above (Houtman & Maks 1985)."),
    "houtman_maks_weighted": ("The same, weighted by how sure they are", "%", "higher",
        "As above, each preference with its weight |logit p|."),
    "bottleneck": ("Strongest cycle", "", "lower",
        "tau*: the largest, over all cycles of all prompts, of the weakest |2p - 1| on the cycle. 0: no cycle; 1: "
        "every step of it was certain."),
    "efficiency": ("Efficiency", "%", "higher",
        "1 - tau* / (largest |2p - 1| of the prompt), mean over prompts: how much of the strength of the preferences "
        "is left when all cycles are forgiven (in the manner of Afriat's efficiency index)."),
}  # fmt: skip


def _share(parts_P: np.ndarray, wholes_P: np.ndarray, clusters_P: np.ndarray) -> stats.Estimate:
    """Sum of the parts over that of the wholes, over the prompts that have a whole; where none of it is a part, or all
    of it, Wilson's interval over prompts, since every resample is alike."""
    at = wholes_P > 0
    parts_P, wholes_P, clusters_P = parts_P[at], wholes_P[at], clusters_P[at]
    if not parts_P.any() or (parts_P == wholes_P).all():
        return stats.estimate(parts_P / wholes_P, clusters_P)
    return stats.ratio_of_sums(parts_P, wholes_P, clusters_P)


def _cycle_figures(graph: Graph, found: dict, chance: list[dict], testable_P: np.ndarray) -> list[Figure]:
    names = graph.clusters
    tested = np.flatnonzero(testable_P)

    def of_coins(value) -> tuple[str, float] | None:
        values = [x for each in chance if (x := value(each)) is not None]
        return ("labels by a coin", float(np.mean(values))) if values else None

    def share(part: str, whole: str, complement: bool) -> tuple[stats.Estimate, tuple[str, float] | None]:
        def parts(each):
            return each[whole] - each[part] if complement else each[part]

        def ratio(each):
            total = each[whole][tested].sum()
            return parts(each)[tested].sum() / total if total else None

        return _share(parts(found)[tested], found[whole][tested], names[tested]), of_coins(ratio)

    def efficiency(each):
        return 1 - each["bottleneck"][tested] / np.maximum(each["strongest"][tested], 1e-12)

    left = stats.mean(efficiency(found), names[tested])
    ok = stats.estimate(1 - found["violated"][tested], names[tested])
    by_chance = of_coins(lambda each: 1 - each["violated"][tested].mean())
    drawn = len(tested) * len(chance)
    caught = stats.Estimate(1 - by_chance[1], None, None, drawn, len(tested)) if by_chance else NONE
    whole, zeta = _zeta(graph, found, testable_P)
    zeta_chance = of_coins(lambda each: _zeta(graph, each, testable_P)[1].mean() if len(whole) else None)
    strongest = float(found["bottleneck"].max(initial=0))
    tau = stats.Estimate(strongest, None, None, len(graph.p_E), len(tested)) if len(tested) else NONE
    measured = {
        "rationalisable": (ok, by_chance),
        "power": (caught, None),
        "cyclic_triads": share("cyclic", "triads", False),
        "kendall_zeta": (stats.mean(zeta, names[whole]), zeta_chance),
        "houtman_maks": share("removed", "strict", True),
        "houtman_maks_weighted": share("removed_weight", "weight", True),
        "bottleneck": (tau, None),
        "efficiency": (left, of_coins(lambda each: efficiency(each).mean())),
    }
    return [
        figure(key, title, measured[key][0], unit=unit, better=better, baseline=measured[key][1], says=says)
        for key, (title, unit, better, says) in CYCLE_FIGURES.items()
    ]


def _fit_figures(graph: Graph, coins: list[Graph], corners_T3, rings_P) -> list[Figure]:
    tested = np.flatnonzero(rings_P > 0)
    names = graph.clusters[tested]
    split = hodge(graph, corners_T3)
    shares = {key: stats.ratio_of_sums(split[key][tested], split["total"][tested], names)
              for key in ("gradient", "curl", "harmonic")}  # fmt: skip
    corner_names = graph.clusters[graph.prompt_E[corners_T3[:, 0]]]
    around = stats.mean(np.abs(split["around_T"]), corner_names)
    # by a coin the log-odds are uncorrelated: the expected squared length of a projection is its rank's share
    free = rings_P[tested].sum() / max(count(graph.prompt_E, graph)[tested].sum(), 1)
    coin = ("labels by a coin", 1 - float(free)) if len(tested) else None
    g2, p_value, by_chance, df = NONE, NONE, None, int(rings_P.sum())
    if df:
        from scipy.stats import chi2

        g2 = stats.Estimate(deviance(graph), None, None, int(graph.n_E.sum()), len(graph.prompts))
        by_chance = ("labels by a coin", float(np.mean([deviance(each) for each in coins[:FITS]])))
        votes_E = graph.p_E * graph.n_E
        if np.abs(votes_E - np.round(votes_E)).max() < 1e-6:
            p_value = replace(g2, value=float(chi2.sf(g2.value, df)))
    return [
        figure("gradient_share", "Strength that a reward explains", shares["gradient"], unit="%", better="higher",
               baseline=coin, says="1 - |residual|^2 / |logit p|^2 of the best reward by least squares, weighted by "
               "the number of judgements (HodgeRank: Jiang et al. 2011). By a coin: the share of free parameters."),
        figure("curl_share", "Strength in triangles that run in a circle", shares["curl"], unit="%", better="lower",
               says="The part of the residual that runs around triangles of answers, as a share of |logit p|^2."),
        figure("harmonic_share", "Strength in longer rings", shares["harmonic"], unit="%", better="lower",
               says="The part of the residual that runs around rings of four and more answers only."),
        figure("curl", "Log-odds around a triangle", around, unit="nats", better="lower",
               says="Mean of |l_ij + l_jk + l_ki|, l = logit p; 0 where p comes from one reward. Labels of 0 or 1 "
               f"count as {CLIP:g} from there."),
        figure("bt_deviance", "Misfit of Bradley-Terry", g2, better="lower", baseline=by_chance,
               says=f"G^2 = 2 sum n (p log(p/q) + (1-p) log((1-p)/(1-q))) against the maximum-likelihood reward q, "
               f"with {df:,} degrees of freedom (pairs - answers + connected groups); about as large as these where "
               "the model holds and p counts votes, less where p is soft."),
        figure("bt_p_value", "Chance of a misfit this large", p_value,
               says="Upper tail of chi-squared, where every p is a share of votes (a soft label is none). A rough "
               "guide where pairs have one vote each."),
    ]  # fmt: skip


def _contradictory_figure(judgements: Sequence[Judgement]) -> Figure:
    prompts, both = contradictory(judgements)
    return figure(
        "contradictory_duplicates", "Pairs labelled both ways", stats.estimate(both, prompts), unit="%",
        better="lower", says="Of the pairs of answers that one judge, under one principle, labelled more than once, "
        f"the share labelled this way and that way; {len(both):,} of {len(by_pair(judgements)):,} pairs were labelled "
        "more than once, and only these can.",
    )  # fmt: skip


def _by_answers(graph: Graph, found: dict, chance: list[dict], testable_P: np.ndarray) -> list[dict]:
    if not testable_P.any():
        return []
    n_P = count(graph.prompt_V, graph).astype(int)
    names = graph.clusters
    rows = []
    for n in np.unique(n_P[testable_P]).tolist():
        at = np.flatnonzero(testable_P & (n_P == n))
        drawn = 1 - np.mean([each["violated"][at].mean() for each in chance])
        triads = _share(found["cyclic"][at], found["triads"][at], names[at])
        rows.append([n, len(at), stats.estimate(1 - found["violated"][at], names[at]), float(round(drawn, 3)), triads])
    columns = ["answers", "prompts", "rationalisable", "by a coin", "circular triads"]
    return [table("By the number of compared answers", columns, rows,
                  "All of 3, 4, 5, 6, 7 answers compared: a coin has no cycle in .75, .375, .117, .022, .0024."
                  )]  # fmt: skip


def _contexts(judgements: Sequence[Judgement]) -> list[tuple]:
    """(name, prompts, share rationalisable, share of circular triads, prompts with a cycle) by judge and principle."""
    judges = Counter(each["judge"] for each in judgements)
    principles = Counter(each["principle"] for each in judgements if each["principle"] is not None)
    found = []
    for key, names in (("judge", judges), ("principle", principles)):
        for name, _ in names.most_common(CONTEXTS) if len(names) > 1 else ():
            graph = build([each for each in judgements if each[key] == name])
            corners_T3, at = triangles(graph), np.flatnonzero(rings(graph) > 0)
            each = measure(graph, corners_T3)
            ids = graph.clusters[at]
            cyclic = {graph.prompts[n] for n in np.flatnonzero(each["violated"])}
            triads = _share(each["cyclic"][at], each["triads"][at], ids)
            found.append((f"{key} {name}", len(at), stats.estimate(1 - each["violated"][at], ids), triads, cyclic))
    return found


def _context_table(contexts: list[tuple]) -> dict:
    columns = ["judgements of", "prompts", "rationalisable", "circular triads"]
    return table("By judge and by principle", columns, [list(row[:4]) for row in contexts],
                 "Prompts: those whose answers form a ring. Each judge and principle on its own.")  # fmt: skip


def _notes(graph, found, testable_P, contexts, judgements) -> list[str]:
    tested, total = int(testable_P.sum()), len(graph.prompts)
    notes = []
    if tested:
        notes.append(f"{tested:,} of {total:,} prompts could contradict themselves; the others have two answers, or "
                     "no ring of comparisons, and can never fail.")  # fmt: skip
    else:
        notes.append(f"None of the {total:,} prompts has three answers that are compared in a ring: two answers can "
                     "never fail, so this data cannot show whether one reward explains it. Compare at least three "
                     "answers of a prompt with each other.")  # fmt: skip
    if found["bounded"].any():
        notes.append(f"{int(found['bounded'].sum())} knots have more than {EXACT} answers: there the share of kept "
                     "comparisons is a lower bound (Eades, Lin & Smyth 1993).")  # fmt: skip
    violated = {graph.prompts[n] for n in np.flatnonzero(found["violated"])}
    alone = [cyclic for name, *_, cyclic in contexts]
    if violated and contexts:
        pooled = violated - set().union(*alone)
        notes.append(f"{len(pooled):,} of the {len(violated):,} prompts with a cycle have none under any judge or "
                     "principle alone: there pooling makes the cycle (Condorcet 1785).")  # fmt: skip
    if tested and not violated and found["strict"].sum():
        notes.append("No cycle was found. The power above says how far that goes.")
    return notes


def _examples(graph: Graph, found: dict, judgements: Sequence[Judgement]) -> list[dict]:
    ranked = sorted(found["cycle_V"], key=lambda prompt: (-found["bottleneck"][prompt], prompt))[:SHOWN]
    ids = {graph.prompts[prompt] for prompt in ranked}
    asked = {each["prompt_id"]: each["prompt"] for each in judgements if each["prompt_id"] in ids}
    edges = {(int(i), int(j)): p for i, j, p in zip(graph.first_E, graph.second_E, graph.p_E, strict=True)}
    shown = []
    for prompt in ranked:
        cycle = found["cycle_V"][prompt]
        steps = [
            f"{a + 1} over {b + 1} with p = {edges[i, j] if i < j else 1 - edges[j, i]:.2f}"
            for (a, i), (b, j) in pairwise([*enumerate(cycle), (0, cycle[0])])
        ]
        texts = [("prompt", "\n".join(turn["content"] for turn in asked[graph.prompts[prompt]] or []))]
        texts = [each for each in texts if each[1]] + [(f"answer {n + 1}", graph.answers[v]) for n, v in
                                                       enumerate(cycle)]  # fmt: skip
        title = f"A circle of {len(cycle)} answers, weakest step |2p - 1| = {found['bottleneck'][prompt]:.2f}"
        shown.append(example(title, texts, "; ".join(steps)))
    return [examples("The strongest cycles", shown)] if shown else []
