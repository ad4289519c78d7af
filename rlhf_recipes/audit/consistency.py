"""Can one scalar reward explain the preferences? Cycles, how strong they are, and what a fitted reward leaves over.

Answers to one prompt are nodes; i -> j where p_ij > 1/2, p averaged over a judge's principles and then over judges; a
tie (p = 1/2) is an edge both ways. The preferences of a prompt are rationalisable by one reward if and only if no
directed cycle has a strict edge (the axiom GARP: Afriat 1967, Varian 1982). Two answers can never fail it, so the
power of the test stands beside it: the same graphs with every label drawn by a coin (Bronars 1987).

Shapes: V answers, E compared pairs, P prompts, T triangles (three answers, all of them compared).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit.judgements import Judgement, by_judge, by_pair
from rlhf_recipes.audit.section import dots, example, examples, figure, section, skipped, table

TITLE = "Consistency"
QUESTION = "Could any single score for each answer explain these preferences, or do they run in circles?"
EXACT = 16  # answers in one knot for which the fewest contradictions are searched exhaustively: 2^16 subsets
CLIP = 1e-6  # from 0 and 1, where the log-odds have no end
CONTEXTS, SHOWN = 12, 3
NONE = {"value": None, "low": None, "high": None, "n": 0, "clusters": 0}


@dataclass(frozen=True)
class Graph:
    """The compared answers of all prompts, side by side.

    Attributes:
        first_E, second_E: the answers of each pair, as places in `answers`; first < second.
        p_E: probability that the first is the better.
        n_E: judgements that it is the mean of.
        prompt_V: the prompt of each answer, as a place in `prompts`.
    """

    prompts: list[str]
    answers: list[str]
    prompt_V: np.ndarray
    first_E: np.ndarray
    second_E: np.ndarray
    p_E: np.ndarray
    n_E: np.ndarray

    @property
    def prompt_E(self) -> np.ndarray:
        return self.prompt_V[self.first_E]


def build(judgements: Sequence[Judgement]) -> Graph:
    """The graph of the judgements: judges count alike, and so do the principles of each."""
    prompts: dict[str, int] = {}
    answers: dict[tuple[str, str], int] = {}
    edges = []
    for (prompt, *texts), said in by_pair(judgements).items():
        prompts.setdefault(prompt, len(prompts))
        i, j = (answers.setdefault((prompt, text), len(answers)) for text in texts)
        p = float(np.mean([np.mean(list(each.values())) for each in by_judge(said).values()]))
        edges.append((i, j, p, len(said)) if i < j else (j, i, 1 - p, len(said)))
    first, second, p, n = zip(*edges, strict=True) if edges else ((), (), (), ())
    return Graph(
        list(prompts), [text for _, text in answers], np.array([prompts[prompt] for prompt, _ in answers], int),
        np.array(first, int), np.array(second, int), np.round(np.array(p, float), 12), np.array(n, float),
    )  # fmt: skip


def rings(graph: Graph) -> np.ndarray:
    """Independent rings of the compared pairs of each prompt, E - V + components, shape (P,): without one, whatever
    the labels are, no cycle can be."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    shape = (len(graph.answers),) * 2
    links = coo_array((np.ones(len(graph.p_E)), (graph.first_E, graph.second_E)), shape=shape)
    _, label_V = connected_components(links, directed=False)
    parts_P = _count(graph.prompt_V[np.unique(label_V, return_index=True)[1]], graph)
    return (_count(graph.prompt_E, graph) - _count(graph.prompt_V, graph) + parts_P).astype(int)


def triangles(graph: Graph) -> np.ndarray:
    """Edges (i, j), (j, k), (i, k) of all i < j < k that are compared with each other, shape (T, 3)."""
    later: dict[int, dict[int, int]] = {}
    for edge, (i, j) in enumerate(zip(graph.first_E.tolist(), graph.second_E.tolist(), strict=True)):
        later.setdefault(i, {})[j] = edge
    found = [
        (ij, jk, ends[k])
        for ends in later.values()
        for j, ij in ends.items()
        for k, jk in later.get(j, {}).items()
        if k in ends
    ]
    return np.array(found, int).reshape(-1, 3)


def measure(graph: Graph, triangles_T3: np.ndarray) -> dict[str, np.ndarray]:
    """Of each prompt, shape (P,):

    `violated`: some cycle has a strict edge. `triads`, `cyclic`: triangles without a tie, and those of them that run
    in a circle. `strict`, `removed`: strict edges, and the fewest whose removal leaves no violation (Houtman & Maks
    1985); `weight`, `removed_weight`: the same weighted by |logit p|. `bounded`: knots of more than `EXACT` answers,
    whose removals are an upper bound. `strongest`: the largest |2p - 1|. `bottleneck`: tau*, the largest over cycles
    of the smallest |2p - 1| on them. And `cycle_V`, a dict from prompt to the answers of such a cycle, in order.
    """
    import networkx as nx

    strength_E, weight_E = np.abs(2 * graph.p_E - 1), np.abs(_log_odds(graph.p_E))
    strict_E = strength_E > 0
    up_E = graph.p_E > 0.5
    winner_E, loser_E = np.where(up_E, graph.first_E, graph.second_E), np.where(up_E, graph.second_E, graph.first_E)
    ab, bc, ac = up_E[triangles_T3].T if len(triangles_T3) else np.zeros((3, 0), bool)
    whole_T = strict_E[triangles_T3].all(1)
    prompt_T = graph.prompt_E[triangles_T3[:, 0]]
    at = graph.prompt_E
    found = {
        "triads": _count(prompt_T[whole_T], graph),
        "cyclic": _count(prompt_T[whole_T & (ab == bc) & (ab != ac)], graph),
        "strict": _count(at[strict_E], graph),
        "weight": np.bincount(at, weight_E * strict_E, len(graph.prompts)),
        "strongest": np.zeros(len(graph.prompts)),
    }
    np.maximum.at(found["strongest"], at, strength_E)
    for key in ("violated", "removed", "removed_weight", "bounded", "bottleneck"):
        found[key] = np.zeros(len(graph.prompts))

    ties = list(zip(winner_E[~strict_E].tolist(), loser_E[~strict_E].tolist(), strict=True))
    arrows = nx.DiGraph(list(zip(winner_E.tolist(), loser_E.tolist(), strict=True)))
    arrows.add_edges_from((j, i) for i, j in ties)
    knot_V = np.arange(len(graph.answers))
    for knot in nx.strongly_connected_components(arrows):
        knot_V[list(knot)] = min(knot)
    inside = np.flatnonzero(strict_E & (knot_V[winner_E] == knot_V[loser_E]))  # strict edges on some cycle
    inside = inside[np.argsort(knot_V[winner_E[inside]], kind="stable")]
    alike_V = np.arange(len(graph.answers))
    for tied in nx.connected_components(nx.Graph(ties)):
        alike_V[list(tied)] = min(tied)
    cycle_V: dict[int, list[int]] = {}
    for edges in np.split(inside, np.flatnonzero(np.diff(knot_V[winner_E[inside]])) + 1) if len(inside) else ():
        prompt = int(at[edges[0]])
        wins, losses = winner_E[edges], loser_E[edges]
        found["violated"][prompt] = 1
        for key, weights in (("removed", np.ones(len(edges))), ("removed_weight", weight_E[edges])):
            cost, exact = contradictions(alike_V[wins], alike_V[losses], weights)
            found[key][prompt] += cost
        found["bounded"][prompt] += not exact
        tau, cycle = bottleneck(wins, losses, strength_E[edges])
        if tau > found["bottleneck"][prompt]:
            found["bottleneck"][prompt], cycle_V[prompt] = tau, cycle
    return found | {"cycle_V": cycle_V}


def contradictions(winner_E: np.ndarray, loser_E: np.ndarray, weight_E: np.ndarray) -> tuple[float, bool]:
    """Least weight of edges that any ranking contradicts (minimum feedback arc set), and whether that is exact.

    An edge from an answer to itself (a strict preference between answers that ties make equal) always counts. Exact up
    to `EXACT` answers, over which were ranked first: f(S + v) = min_v f(S) + weight of v's wins over S; else the
    ranking of Eades, Lin & Smyth (1993), whose cost is an upper bound.
    """
    names, places = np.unique(np.concatenate([winner_E, loser_E]), return_inverse=True)
    n = len(names)
    weight_VV = np.zeros((n, n))
    np.add.at(weight_VV, (places[: len(winner_E)], places[len(winner_E) :]), weight_E)
    certain = float(np.trace(weight_VV))
    np.fill_diagonal(weight_VV, 0)
    if n > EXACT:
        order = _eades_lin_smyth(weight_VV)
        return certain + float(np.tril(weight_VV[np.ix_(order, order)], -1).sum()), False
    wins_VS = np.zeros((n, 1))  # of v over the answers in the subset S, a bit mask
    for u in range(n):
        wins_VS = np.concatenate([wins_VS, wins_VS + weight_VV[:, u, None]], axis=1)
    masks = np.arange(1 << n)
    sizes = np.array([0])
    for _ in range(n):
        sizes = np.concatenate([sizes, sizes + 1])
    least_S = np.full(1 << n, np.inf)
    least_S[0] = 0
    for size in range(n):
        layer = masks[sizes == size]
        for v in range(n):
            before = layer[layer >> v & 1 == 0]
            after = before | 1 << v
            least_S[after] = np.minimum(least_S[after], least_S[before] + wins_VS[v, before])
    return certain + float(least_S[-1]), True


def _eades_lin_smyth(weight_VV: np.ndarray) -> list[int]:
    """A ranking, best first: sinks go to the end, sources to the front, then whoever wins most net of losses."""
    left, front, back = list(range(len(weight_VV))), [], []
    while left:
        among = weight_VV[np.ix_(left, left)]
        wins, losses = among.sum(1), among.sum(0)
        if (wins == 0).any():
            back.append(left.pop(int(np.argmax(wins == 0))))
        elif (losses == 0).any():
            front.append(left.pop(int(np.argmax(losses == 0))))
        else:
            front.append(left.pop(int(np.argmax(wins - losses))))
    return front + back[::-1]


def bottleneck(winner_E: np.ndarray, loser_E: np.ndarray, strength_E: np.ndarray) -> tuple[float, list[int]]:
    """(tau*, a cycle): the largest over cycles of their smallest strength, and the answers of a cycle that has it.

    Cycles are there above a threshold if and only if some strongly connected component has two answers, so tau* is
    found by bisection over the strengths. (0, []) without a cycle of strict edges alone.
    """
    import networkx as nx

    def above(strength: float):
        keep = strength_E >= strength
        return nx.DiGraph(list(zip(winner_E[keep].tolist(), loser_E[keep].tolist(), strict=True)))

    steps = np.unique(strength_E)
    low, high = -1, len(steps)  # a cycle at steps[low], none at steps[high]
    while high - low > 1:
        middle = (low + high) // 2
        arrows = above(steps[middle])
        cyclic = any(len(knot) > 1 for knot in nx.strongly_connected_components(arrows))
        low, high = (middle, high) if cyclic else (low, middle)
    if low < 0:
        return 0.0, []
    arrows = above(steps[low])
    for i in np.flatnonzero(strength_E == steps[low]):
        winner, loser = int(winner_E[i]), int(loser_E[i])
        if nx.has_path(arrows, loser, winner):
            path = nx.shortest_path(arrows, loser, winner)
            return float(steps[low]), [winner, *path[:-1]]
    raise AssertionError("a cycle above the threshold has no edge at it")


def hodge(graph: Graph, triangles_T3: np.ndarray) -> dict[str, np.ndarray]:
    """Log-odds l_E = logit p split by least squares into three parts, orthogonal under the weights n_E; squared
    lengths of each prompt, shape (P,): `total` = `gradient` + `curl` + `harmonic`.

    gradient: min_r sum n_ij (r_i - r_j - l_ij)^2; curl: what runs around triangles; harmonic: what runs around longer
    rings (HodgeRank: Jiang, Lim, Yao & Ye 2011). And `around_T`, l_ij + l_jk - l_ik of each triangle, in nats.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import lsqr

    l_E, n_E = _log_odds(graph.p_E), graph.n_E
    r_V = _potential(graph, n_E, n_E * l_E)
    gradient_E = r_V[graph.first_E] - r_V[graph.second_E]
    rest_E = l_E - gradient_E
    curl_E = np.zeros(len(l_E))
    count = len(triangles_T3)
    if count and np.abs(rest_E).max() > 1e-9:
        signs = np.tile([1.0, 1.0, -1.0], count)
        rows = np.repeat(np.arange(count), 3)
        around = csr_array((signs / np.sqrt(n_E[triangles_T3.ravel()]), (rows, triangles_T3.ravel())),
                           shape=(count, len(l_E)))  # fmt: skip
        turned_T = lsqr(around.T, np.sqrt(n_E) * rest_E, atol=1e-12, btol=1e-12, iter_lim=2000)[0]
        curl_E = around.T @ turned_T / np.sqrt(n_E)
    parts = {"total": l_E, "gradient": gradient_E, "curl": curl_E, "harmonic": rest_E - curl_E}
    squares = {name: np.bincount(graph.prompt_E, n_E * x**2, len(graph.prompts)) for name, x in parts.items()}
    ij, jk, ik = l_E[triangles_T3].T if count else np.zeros((3, 0))
    return squares | {"around_T": ij + jk - ik}


def deviance(graph: Graph) -> float:
    """G^2 = 2 sum n_ij (p log(p / q) + (1 - p) log((1 - p) / (1 - q))), q = sigmoid(r_i - r_j) at the maximum of the
    likelihood: what a Bradley-Terry reward leaves unexplained. Each judgement counts as one observation, a soft one
    too. Degrees of freedom: the sum of `rings`."""
    p_E, n_E = graph.p_E, graph.n_E
    r_V = np.zeros(len(graph.answers))
    for _ in range(60):
        q_E = 0.5 * (1 + np.tanh((r_V[graph.first_E] - r_V[graph.second_E]) / 2))
        # labels that a reward separates push it without end: a small ridge, and steps of at most 2 nats
        step_V = _potential(graph, n_E * np.maximum(q_E * (1 - q_E), 1e-9), n_E * (p_E - q_E), r_V, 1e-6)
        r_V += np.clip(step_V, -2, 2)
        if np.abs(step_V).max(initial=0) < 1e-9:
            break
    q_E = np.clip(0.5 * (1 + np.tanh((r_V[graph.first_E] - r_V[graph.second_E]) / 2)), 1e-12, 1 - 1e-12)
    both = [x * np.log(np.where(x > 0, x, 1) / y) for x, y in ((p_E, q_E), (1 - p_E, 1 - q_E))]
    return float(2 * (n_E * (both[0] + both[1])).sum())


def _potential(graph: Graph, weight_E, push_E, start_V=None, ridge: float = 1e-10) -> np.ndarray:
    """x_V with (L + ridge) x = divergence of push_E - ridge start_V, L the Laplacian of the weights."""
    from scipy.sparse import coo_array, eye_array
    from scipy.sparse.linalg import spsolve

    i, j, count = graph.first_E, graph.second_E, len(graph.answers)
    values = np.concatenate([weight_E, weight_E, -weight_E, -weight_E])
    rows, columns = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
    laplacian = coo_array((values, (rows, columns)), shape=(count, count)).tocsc()
    pushed_V = np.bincount(i, push_E, count) - np.bincount(j, push_E, count)
    if start_V is not None:
        pushed_V = pushed_V - ridge * start_V
    return np.atleast_1d(spsolve(laplacian + ridge * eye_array(count, format="csc"), pushed_V))


def by_coin(graph: Graph, rng: np.random.Generator) -> Graph:
    """The same comparisons as strong as they are, each won by either answer with probability 1/2."""
    return replace(graph, p_E=np.where(rng.random(len(graph.p_E)) < 0.5, graph.p_E, 1 - graph.p_E))


def contradictory(judgements: Sequence[Judgement]) -> tuple[list[str], list[bool], int]:
    """Of each compared pair its prompt and whether one judge under one principle labelled it both ways; and how many
    pairs were labelled more than once like that, which alone can contradict."""
    prompts, both, repeated = [], [], 0
    for (prompt, *_), said in by_pair(judgements).items():
        ways: dict[tuple, list[float]] = {}
        for p, judgement in said:
            ways.setdefault((judgement["judge"], judgement["principle"]), []).append(p)
        prompts.append(prompt)
        both.append(any(min(ps) < 0.5 < max(ps) for ps in ways.values()))
        repeated += any(len(ps) > 1 for ps in ways.values())
    return prompts, both, repeated


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
    chance = [measure(by_coin(graph, rng), corners_T3) for _ in range(int(np.clip(5000 // len(graph.p_E), 1, 100)))]
    if not testable_P.any():
        chance = []
    figures = [*_cycle_figures(graph, found, chance, testable_P), *_fit_figures(graph, corners_T3, rings_P)]
    figures.append(_contradictory_figure(judgements))
    contexts = _contexts(judgements)
    notes = _notes(graph, found, testable_P, contexts, judgements)
    shown = [*_by_answers(graph, found, chance, testable_P), *([_context_table(contexts)] if contexts else [])]
    plots = []
    if testable_P.any():
        line = ("labels by a coin", figures[0]["baseline"]["value"])
        rows = [(f"{row[0]} answers", row[2]) for row in shown[0]["rows"]]
        rows += [(name, each) for name, _, each, *_ in contexts if each["value"] is not None]
        plots.append(dots("Prompts that one reward can explain", rows, "share of prompts without a cycle", line))
    return section(
        "consistency", TITLE, QUESTION, figures=figures, tables=shown, plots=plots,
        examples=_examples(graph, found, judgements), notes=notes,
    )  # fmt: skip


def _count(prompts: np.ndarray, graph: Graph) -> np.ndarray:
    return np.bincount(prompts, minlength=len(graph.prompts)).astype(float)


def _log_odds(p):
    clipped = np.clip(p, CLIP, 1 - CLIP)
    return np.log(clipped / (1 - clipped))


def _zeta(graph: Graph, found: dict, testable_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kendall's zeta of the prompts (places) whose answers are all compared without a tie."""
    n_P = _count(graph.prompt_V, graph)
    whole = np.flatnonzero(testable_P & (found["strict"] == n_P * (n_P - 1) / 2))
    n, d = n_P[whole], found["cyclic"][whole]
    return whole, 1 - 24 * d / np.where(n % 2, n**3 - n, n**3 - 4 * n)


def _cycle_figures(graph: Graph, found: dict, chance: list[dict], testable_P: np.ndarray) -> list[dict]:
    names = np.array(graph.prompts, dtype=object)
    tested = np.flatnonzero(testable_P)

    def of_coins(value) -> tuple[str, float] | None:
        values = [x for each in chance if (x := value(each)) is not None]
        return ("labels by a coin", float(np.mean(values))) if values else None

    def mean(values) -> dict:
        return stats.ratio_of_sums(values, np.ones(len(values)), names[tested])

    def share(part: str, whole: str, complement: bool) -> tuple[dict, tuple[str, float] | None]:
        def parts(each):
            return each[whole] - each[part] if complement else each[part]

        def ratio(each):
            total = each[whole][tested].sum()
            return parts(each)[tested].sum() / total if total else None

        return stats.ratio_of_sums(parts(found)[tested], found[whole][tested], names[tested]), of_coins(ratio)

    def efficiency(each):
        return 1 - each["bottleneck"][tested] / np.maximum(each["strongest"][tested], 1e-12)

    ok = stats.estimate(1 - found["violated"][tested], names[tested])
    by_chance = of_coins(lambda each: 1 - each["violated"][tested].mean())
    drawn = {"n": len(tested) * len(chance), "clusters": len(tested)}
    caught = NONE | {"value": 1 - by_chance[1], **drawn} if by_chance else NONE
    triads, triads_chance = share("cyclic", "triads", False)
    kept, kept_chance = share("removed", "strict", True)
    heavy, heavy_chance = share("removed_weight", "weight", True)
    whole, zeta = _zeta(graph, found, testable_P)
    zeta_chance = of_coins(lambda each: _zeta(graph, each, testable_P)[1].mean() if len(whole) else None)
    strongest = {"value": float(found["bottleneck"].max(initial=0)), "n": len(graph.p_E), "clusters": len(tested)}
    tau = NONE | strongest if len(tested) else NONE
    return [
        figure("rationalisable", "Prompts that one reward can explain", ok, unit="%", better="higher",
               baseline=by_chance, says="Share of the prompts whose compared answers form a ring (at least three "
               "answers) and whose preferences have no cycle with a strict edge (GARP; Afriat 1967, Varian 1982)."),
        figure("power", "Chance that a coin would be caught", caught, unit="%", better="higher",
               says="Share of the same graphs that have a cycle when every label is drawn by a coin (Bronars 1987). "
               "Near 0 the figure above says nothing."),
        figure("cyclic_triads", "Circular triads", triads, unit="%", better="lower", baseline=triads_chance,
               says="Share of three answers, all compared without a tie, with A over B, B over C, C over A; 1/4 by a "
               "coin (Kendall & Babington Smith 1940)."),
        figure("kendall_zeta", "Kendall's coefficient of consistence", stats.ratio_of_sums(
               zeta, np.ones(len(zeta)), names[whole]), better="higher", baseline=zeta_chance,
               says="1 - 24 d / (n^3 - n) for an odd number n of answers, 1 - 24 d / (n^3 - 4 n) for an even one, d "
               "the circular triads; mean over prompts whose answers are all compared without a tie. 1: none, 0: as "
               "many as can be."),
        figure("houtman_maks", "Comparisons that one reward can keep", kept, unit="%", better="higher",
               baseline=kept_chance, says="1 - (fewest strict preferences to drop until no cycle is left) / (all "
               "strict preferences), over the prompts above (Houtman & Maks 1985)."),
        figure("houtman_maks_weighted", "The same, weighted by how sure they are", heavy, unit="%", better="higher",
               baseline=heavy_chance, says="As above, each preference with its weight |logit p|."),
        figure("bottleneck", "Strongest cycle", tau, better="lower",
               says="tau*: the largest, over all cycles of all prompts, of the weakest |2p - 1| on the cycle. 0: no "
               "cycle; 1: every step of it was certain."),
        figure("efficiency", "Efficiency", mean(efficiency(found)), unit="%", better="higher",
               baseline=of_coins(lambda each: efficiency(each).mean()),
               says="1 - tau* / (largest |2p - 1| of the prompt), mean over prompts: how much of the strength of the "
               "preferences is left when all cycles are forgiven (in the manner of Afriat's efficiency index)."),
    ]  # fmt: skip


def _fit_figures(graph: Graph, corners_T3: np.ndarray, rings_P: np.ndarray) -> list[dict]:
    tested = np.flatnonzero(rings_P > 0)
    names = np.array(graph.prompts, dtype=object)[tested]
    split = hodge(graph, corners_T3)
    shares = {key: stats.ratio_of_sums(split[key][tested], split["total"][tested], names)
              for key in ("gradient", "curl", "harmonic")}  # fmt: skip
    corner_names = np.array(graph.prompts, dtype=object)[graph.prompt_E[corners_T3[:, 0]]]
    around = stats.ratio_of_sums(np.abs(split["around_T"]), np.ones(len(corners_T3)), corner_names)
    # by a coin the log-odds are uncorrelated: the expected squared length of a projection is its rank's share
    free = rings_P[tested].sum() / max(_count(graph.prompt_E, graph)[tested].sum(), 1)
    coin = ("labels by a coin", 1 - float(free)) if len(tested) else None
    g2 = p_value = NONE
    df = int(rings_P.sum())
    if df:
        from scipy.stats import chi2

        value = deviance(graph)
        counts = {"n": len(graph.p_E), "clusters": len(graph.prompts)}
        g2, p_value = NONE | {"value": value} | counts, NONE | {"value": float(chi2.sf(value, df))} | counts
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
        figure("bt_deviance", "Misfit of Bradley-Terry", g2, better="lower",
               baseline=("degrees of freedom", float(df)) if df else None,
               says="G^2 = 2 sum n (p log(p/q) + (1-p) log((1-p)/(1-q))) against the maximum-likelihood reward q; "
               "about its degrees of freedom (pairs - answers + connected groups) where the model holds."),
        figure("bt_p_value", "Chance of a misfit this large", p_value,
               says="Upper tail of chi-squared; soft labels count as one observation each, so it is a rough guide: "
               "few judgements a pair make it unreliable."),
    ]  # fmt: skip


def _contradictory_figure(judgements: Sequence[Judgement]) -> dict:
    prompts, both, repeated = contradictory(judgements)
    return figure(
        "contradictory_duplicates", "Pairs labelled both ways", stats.estimate(both, prompts), unit="%",
        better="lower", says="Share of the compared pairs of answers that the same judge, under the same principle, "
        f"labelled once this way and once that way; {repeated:,} of {len(both):,} pairs were labelled more than once, "
        "and only these can.",
    )  # fmt: skip


def _by_answers(graph: Graph, found: dict, chance: list[dict], testable_P: np.ndarray) -> list[dict]:
    if not testable_P.any():
        return []
    n_P = _count(graph.prompt_V, graph).astype(int)
    names = np.array(graph.prompts, dtype=object)
    rows = []
    for n in np.unique(n_P[testable_P]).tolist():
        at = np.flatnonzero(testable_P & (n_P == n))
        drawn = 1 - np.mean([each["violated"][at].mean() for each in chance])
        triads = stats.ratio_of_sums(found["cyclic"][at], found["triads"][at], names[at])
        rows.append([n, len(at), stats.estimate(1 - found["violated"][at], names[at]), float(round(drawn, 3)), triads])
    columns = ["answers", "prompts", "rationalisable", "by a coin", "circular triads"]
    return [table("By the number of compared answers", columns, rows,
                  "All of 3, 4, 5, 6, 7 answers compared: a coin has no cycle in .75, .375, .117, .022, .0024.")]  # fmt: skip


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
            ids = np.array(graph.prompts, dtype=object)[at]
            cyclic = {graph.prompts[n] for n in np.flatnonzero(each["violated"])}
            triads = stats.ratio_of_sums(each["cyclic"][at], each["triads"][at], ids)
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
