"""Compared answers as a graph: cycles of preferences, how strong they are, and what a fitted reward leaves over.

i -> j where p_ij > 1/2, p averaged over a judge's principles and then over judges; a tie (p = 1/2) is an edge both
ways. The preferences of a prompt are rationalisable by one reward if and only if no directed cycle has a strict edge
(the axiom GARP: Afriat 1967, Varian 1982).

Shapes: V answers, E compared pairs, P prompts, T triangles (three answers, all of them compared).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit.judgements import Judgement, by_judge, by_pair, clusters

EXACT = 16  # answers in one knot for which the fewest contradictions are searched exhaustively: 2^16 subsets
CLIP = 1e-6  # from 0 and 1, where the log-odds have no end


@dataclass(frozen=True)
class Graph:
    """The compared answers of all prompts, side by side.

    Attributes:
        clusters: (P,) what resampling takes each prompt for, `formats.clusters`.
        first_E, second_E: the answers of each pair, as places in `answers`; first < second.
        p_E: probability that the first is the better.
        n_E: judgements that it is the mean of.
        prompt_V: the prompt of each answer, as a place in `prompts`.
    """

    prompts: list[str]
    clusters: np.ndarray
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
    cluster = clusters(judgements)
    return Graph(
        list(prompts), np.array([cluster[prompt] for prompt in prompts], dtype=object),
        [text for _, text in answers], np.array([prompts[prompt] for prompt, _ in answers], int),
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
    parts_P = count(graph.prompt_V[np.unique(label_V, return_index=True)[1]], graph)
    return (count(graph.prompt_E, graph) - count(graph.prompt_V, graph) + parts_P).astype(int)


def triangles(graph: Graph) -> np.ndarray:
    """Edges (i, j), (j, k), (i, k) of all i < j < k that are compared with each other, shape (T, 3)."""
    later: dict[int, dict[int, int]] = {}
    for edge, (i, j) in enumerate(zip(graph.first_E.tolist(), graph.second_E.tolist(), strict=True)):
        later.setdefault(i, {})[j] = edge
    found = []
    for ends in later.values():
        for j, ij in ends.items():
            found += [(ij, jk, ends[k]) for k, jk in later.get(j, {}).items() if k in ends]
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
        "triads": count(prompt_T[whole_T], graph),
        "cyclic": count(prompt_T[whole_T & (ab == bc) & (ab != ac)], graph),
        "strict": count(at[strict_E], graph),
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
    corners = len(triangles_T3)
    if corners and np.abs(rest_E).max() > 1e-9:
        signs = np.tile([1.0, 1.0, -1.0], corners)
        rows = np.repeat(np.arange(corners), 3)
        around = csr_array((signs / np.sqrt(n_E[triangles_T3.ravel()]), (rows, triangles_T3.ravel())),
                           shape=(corners, len(l_E)))  # fmt: skip
        turned_T = lsqr(around.T, np.sqrt(n_E) * rest_E, atol=1e-12, btol=1e-12, iter_lim=2000)[0]
        curl_E = around.T @ turned_T / np.sqrt(n_E)
    parts = {"total": l_E, "gradient": gradient_E, "curl": curl_E, "harmonic": rest_E - curl_E}
    squares = {name: np.bincount(graph.prompt_E, n_E * x**2, len(graph.prompts)) for name, x in parts.items()}
    ij, jk, ik = l_E[triangles_T3].T if corners else np.zeros((3, 0))
    return squares | {"around_T": ij + jk - ik}


def deviance(graph: Graph) -> float:
    """G^2 = 2 sum n_ij (p log(p / q) + (1 - p) log((1 - p) / (1 - q))), q = sigmoid(r_i - r_j) at the maximum of the
    likelihood: what a Bradley-Terry reward leaves unexplained. Each judgement counts as one observation, a soft one
    too. Degrees of freedom: the sum of `rings`."""
    p_E, n_E = graph.p_E, graph.n_E
    r_V = np.zeros(len(graph.answers))
    for _ in range(60):
        q_E = stats.sigmoid(r_V[graph.first_E] - r_V[graph.second_E])
        # labels that a reward separates push it without end: a small ridge, and steps of at most 2 nats
        step_V = _potential(graph, n_E * np.maximum(q_E * (1 - q_E), 1e-9), n_E * (p_E - q_E), r_V, 1e-6)
        r_V += np.clip(step_V, -2, 2)
        if np.abs(step_V).max(initial=0) < 1e-9:
            break
    q_E = np.clip(stats.sigmoid(r_V[graph.first_E] - r_V[graph.second_E]), 1e-12, 1 - 1e-12)
    both = [x * np.log(np.where(x > 0, x, 1) / y) for x, y in ((p_E, q_E), (1 - p_E, 1 - q_E))]
    return float(2 * (n_E * (both[0] + both[1])).sum())


def _potential(graph: Graph, weight_E, push_E, start_V=None, ridge: float = 1e-10) -> np.ndarray:
    """x_V with (L + ridge) x = divergence of push_E - ridge start_V, L the Laplacian of the weights."""
    from scipy.sparse import coo_array, eye_array
    from scipy.sparse.linalg import spsolve

    i, j, size = graph.first_E, graph.second_E, len(graph.answers)
    values = np.concatenate([weight_E, weight_E, -weight_E, -weight_E])
    rows, columns = np.concatenate([i, j, i, j]), np.concatenate([i, j, j, i])
    laplacian = coo_array((values, (rows, columns)), shape=(size, size)).tocsc()
    pushed_V = np.bincount(i, push_E, size) - np.bincount(j, push_E, size)
    if start_V is not None:
        pushed_V = pushed_V - ridge * start_V
    return np.atleast_1d(spsolve(laplacian + ridge * eye_array(size, format="csc"), pushed_V))


def by_coin(graph: Graph, rng: np.random.Generator) -> Graph:
    """The same comparisons as strong as they are, each won by either answer with probability 1/2."""
    return replace(graph, p_E=np.where(rng.random(len(graph.p_E)) < 0.5, graph.p_E, 1 - graph.p_E))


def count(prompts: np.ndarray, graph: Graph) -> np.ndarray:
    """How often each prompt appears among `prompts` (places), shape (P,)."""
    return np.bincount(prompts, minlength=len(graph.prompts)).astype(float)


def _log_odds(p):
    clipped = np.clip(p, CLIP, 1 - CLIP)
    return np.log(clipped / (1 - clipped))
