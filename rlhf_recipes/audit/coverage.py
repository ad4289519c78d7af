"""Coverage: what a reward model was taught on, by kind of prompt and kind of answer, against where it will be used.

The ledger counts answers (both of a pair) in cells of prompt family x answer style. Families are those of the rows, or
clusters of the prompts named by their typical words; styles come from plain rules (`style_of`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import section
from rlhf_recipes.data import formats
from rlhf_recipes.errors import Refusal
from rlhf_recipes.text_metrics import refuses

KEY, TITLE = "coverage", "Coverage"
QUESTION = "Which kinds of prompts and answers did people or judges compare, and which never?"
ENOUGH = 30  # answers in a cell; fewer bound a share of one half no better than about +- 18 points
STYLES = ("refusal", "list", "asks back", "short", "medium", "long")
LIST = re.compile(r"^\s*(?:[-*•+]|\d{1,2}[.)]|#{1,6})\s+\S", re.MULTILINE)
SHOWN = 20
MOST_FAMILIES = 12
DUPLICATE = 0.6  # share of common words above which two prompts ask the same
_NONE = stats.estimate([])


def length_bounds(texts: list[str]) -> tuple[float, float]:
    """Word counts that part the texts into thirds: short up to the first, long above the second."""
    counts = [len(text.split()) for text in texts] or [0]
    return tuple(float(x) for x in np.quantile(counts, (1 / 3, 2 / 3)))


def style_of(text: str, bounds: tuple[float, float]) -> str:
    """One of STYLES, by the first rule that holds: opens with a refusal; has two lines or more that begin like a list
    or a heading; ends with a question; else by its number of words (`length_bounds`)."""
    if refuses(text):
        return "refusal"
    if len(LIST.findall(text)) >= 2:
        return "list"
    if text.rstrip(" \t\n\"'”’)*_").endswith("?"):
        return "asks back"
    words = len(text.split())
    return "short" if words <= bounds[0] else "medium" if words <= bounds[1] else "long"


def cluster(prompts: list[str], seed: int = 0) -> tuple[list[str], Callable[[list[str]], list[str]]]:
    """Families of prompts, named by their three most typical words, and a function that assigns further prompts.

    TF-IDF of words, its 50 leading directions (latent semantic analysis), k-means; k from 2 to 12 with the highest
    silhouette on at most 1,000 prompts. Fewer than 20 different prompts make one family.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    space = _space(prompts, seed) if len(set(prompts)) >= 20 else None
    if space is None:
        return ["all prompts"] * len(prompts), lambda more: ["all prompts"] * len(more)
    embed, tfidf, words = space
    points = embed(prompts)
    some = points[np.sort(np.random.default_rng(seed).permutation(len(points))[:1000])]
    fits = {}
    for k in range(2, min(MOST_FAMILIES, len(np.unique(some.round(6), axis=0)) - 1) + 1):
        labels = KMeans(k, n_init=4, random_state=seed).fit_predict(some)
        if len(set(labels)) > 1:
            fits[k] = silhouette_score(some, labels)
    if not fits:
        return ["all prompts"] * len(prompts), lambda more: ["all prompts"] * len(more)
    found = KMeans(max(fits, key=fits.get), n_init=4, random_state=seed).fit(points)
    names, weights = [], tfidf(prompts)
    usual = np.asarray(weights.mean(0)).ravel()
    for code in range(found.n_clusters):
        typical = np.asarray(weights[np.flatnonzero(found.labels_ == code)].mean(0)).ravel() - usual
        name = ", ".join(words[i] for i in np.argsort(-typical, kind="stable")[:3] if typical[i] > 0) or "other"
        names.append(name if name not in names else f"{name} ({code + 1})")
    return [names[i] for i in found.labels_], _nearest(embed, found.cluster_centers_, names)


def assign(prompts: list[str], families: list[str], seed: int = 0) -> Callable[[list[str]], list[str]]:
    """A function that assigns further prompts to given families, by the nearest mean in the space of `cluster`."""
    names = sorted(set(families))
    space = _space(prompts, seed) if len(names) > 1 else None
    if space is None:
        most = Counter(families).most_common(1)[0][0]
        return lambda more: [most] * len(more)
    points, codes = space[0](prompts), np.array([names.index(family) for family in families])
    return _nearest(space[0], np.stack([points[codes == i].mean(0) for i in range(len(names))]), names)


def exposure_gap(deployed: Counter, ledger: Counter) -> tuple[float, dict[str, float]]:
    """KL(q || p) in nats of families in deployment (q) to those in the ledger (p), and q / p of each. One half is
    added to every count: a family that the ledger lacks costs much, but not infinitely much."""
    names = sorted({*deployed, *ledger})
    q, p = (_smooth(np.array([counts[name] for name in names], float)) for counts in (deployed, ledger))
    return float(q @ np.log(q / p)), dict(zip(names, (q / p).tolist(), strict=True))


def worth_labelling(prompts: list[str], novelty, uncertainty, families: list[str], k: int = 10) -> list[dict]:
    """The k prompts whose label would teach most, most telling first.

    Score: mean of the ranks (0 to 1) by uncertainty and by novelty; either may be None. Each pick is the best prompt
    of the families that have the fewest picks, and never shares `DUPLICATE` of its words with an earlier one. Fewer
    than k where only near duplicates are left.

    Returns:
        `index`, `prompt`, `family`, `score`, `novelty`, `uncertainty`.
    """
    from rlhf_recipes.text_metrics import jaccard

    if not prompts:
        return []
    ranks = [_ranks(values) for values in (uncertainty, novelty) if values is not None]
    scores = np.mean(ranks, axis=0) if ranks else np.zeros(len(prompts))
    left, picked, taken = list(np.argsort(-scores, kind="stable")), [], Counter()
    while left and len(picked) < k:
        fewest = min(taken[families[i]] for i in left)
        at = next(i for i in left if taken[families[i]] == fewest)
        left.remove(at)
        if any(jaccard(prompts[at], one["prompt"]) >= DUPLICATE for one in picked):
            continue
        taken[families[at]] += 1
        numbers = {"novelty": novelty, "uncertainty": uncertainty}
        numbers = {key: None if values is None else float(values[at]) for key, values in numbers.items()}
        found = {"index": int(at), "prompt": prompts[at], "family": families[at], "score": float(scores[at])}
        picked.append(found | numbers)
    return picked


class _Ledger:
    """Which answers were compared: both of each of N pairs, the chosen one first.

    Attributes:
        families: of the pairs; `given` by the rows, or else clusters of the prompts. `place` assigns further prompts.
        cells: (family, style) of the 2N answers; `counts` of all cells, the largest family first, none left out.
    """

    def __init__(self, rows: list[dict], families: list[str] | None, seed: int):
        self.clusters = formats.clusters(rows)
        self.families, self.given, self.place = _families(rows, [_text(r["prompt"]) for r in rows], families, seed)
        self.names = [name for name, _ in Counter(self.families).most_common()]
        answers = [row[side][-1]["content"] for row in rows for side in ("chosen", "rejected")]
        self.bounds = length_bounds(answers)
        self.cells = [(self.families[i // 2], style_of(text, self.bounds)) for i, text in enumerate(answers)]
        self.counts = Counter({(family, style): 0 for family in self.names for style in STYLES})
        self.counts.update(self.cells)


def audit(
    train_rows: list[dict],
    deployment_prompts: list | None = None,
    families: list[str] | None = None,
    features: dict | None = None,
    generated: list[dict] | None = None,
    seed: int = 0,
) -> dict:
    """The ledger of what was compared.

    Args:
        deployment_prompts: texts or lists of messages, where the model is to be used.
        families: of the rows, one each; None takes the rows' own, or clusters where no row has one.
        features: `held_out` and `deployment`, novelties (`uncertainty.mahalanobis`) of answers that were held out of
            the reward model's training, and of answers in deployment.
        generated: answers that a policy gives, each `prompt` (text or messages) and `text`.
    """
    if not train_rows:
        return section.skipped(KEY, TITLE, QUESTION, "Give the pairs that the reward model was trained on.")
    ledger = _Ledger(train_rows, families, seed)
    figures, tables, notes = _compared(ledger)
    found, more, says = _deployment(deployment_prompts, ledger, seed)
    made, never, told = _generated(generated, ledger)
    ood = _NONE
    if features is not None:
        from rlhf_recipes.audit.uncertainty import out_of_distribution

        ids = [_cluster(row["prompt"]) for row in generated or []]
        ids = ids if len(ids) == len(features["deployment"]) else None
        ood = out_of_distribution(features["held_out"], features["deployment"], ids)
    figures += [
        *found,
        section.figure("out_of_distribution", "Deployment answers out of distribution", ood, unit="%", better="lower",
                       baseline=("held-out answers", 0.05),
                       says="Share with a Mahalanobis novelty above the 95 % quantile of held-out answers."),
        *made,
    ]  # fmt: skip
    shown = ledger.names[:SHOWN]
    plot = section.grid(f"Compared answers by family and style (fewer than {ENOUGH} stand out)", shown, list(STYLES),
                        [[ledger.counts[family, style] for style in STYLES] for family in shown], ENOUGH)  # fmt: skip
    if len(ledger.names) > SHOWN:
        notes.append(f"The plot shows the {SHOWN} largest of {len(ledger.names)} families.")
    notes += says + told
    return section.section(
        KEY, TITLE, QUESTION, figures=figures, tables=tables + more + never, plots=[plot], notes=notes
    )


def _compared(ledger: _Ledger) -> tuple[list, list, list]:
    """Figures, tables and notes on the ledger itself."""
    counts, names = ledger.counts, ledger.names
    empty = [cell for cell, count in counts.items() if not count]
    filled = sum(count >= ENOUGH for count in counts.values())
    reachable = min(1.0, len(ledger.cells) // ENOUGH / len(counts))

    def figure(key, title, value, **more):
        number = _plain(value, len(ledger.cells), len(set(ledger.clusters)))
        return section.figure(key, title, number, **more)

    figures = [
        figure("cells_covered", f"Cells with {ENOUGH} answers or more", filled / len(counts), unit="%",
               better="higher", baseline=("at best, with as many answers", reachable),
               says=f"{filled} of {len(counts)} cells of family × style."),
        figure("entropy", "Evenness of the ledger", _evenness(list(counts.values())), better="higher",
               baseline=("spread evenly", 1.0), says="−Σ p ln p over cells, divided by ln of their number."),
        figure("cells_empty", "Cells never seen", float(len(empty)), better="lower", baseline=("spread evenly", 0.0)),
    ]  # fmt: skip
    tables = [_by_style(ledger), *_named("Never seen: styles that no compared answer of a family has", empty, names)]
    return figures, tables, [
        "Styles are rules, first match: refusal, list or headings, ends with a question, then thirds of length "
        f"(up to {ledger.bounds[0]:.0f} words, up to {ledger.bounds[1]:.0f}, longer).",
        "Families are those of the rows." if ledger.given else
        f"Families are {len(names)} clusters of the prompts (TF-IDF, k-means), named by their typical words: they "
        "part topics, not intents.",
    ]  # fmt: skip


def _text(prompt) -> str:
    """What the user says: a text as it is, or all user turns of a conversation."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt if message["role"] == "user")


def _cluster(prompt) -> str:
    """What resampling takes a prompt for: a text for itself, a conversation for its opening."""
    return prompt if isinstance(prompt, str) else formats.opening_id(prompt)


def _space(prompts: list[str], seed: int):
    """(texts -> points, texts -> TF-IDF, words), or None where no two prompts share a word."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    vectoriser = TfidfVectorizer(
        preprocessor=_plain_words, token_pattern=r"[^\W\d_]{3,}", stop_words="english", min_df=2, max_df=0.5,
        max_features=5000, sublinear_tf=True,
    )  # fmt: skip
    try:
        weights = vectoriser.fit_transform(prompts)
    except ValueError:  # nothing but stop words, or no word twice
        return None
    if min(weights.shape) < 3:
        return None
    directions = TruncatedSVD(min(50, min(weights.shape) - 1), random_state=seed).fit(weights)
    words = vectoriser.get_feature_names_out()
    return lambda texts: normalize(directions.transform(vectoriser.transform(texts))), vectoriser.transform, words


def _plain_words(text: str) -> str:
    return re.sub(r"(?:n't|'(?:s|m|d|re|ve|ll))\b", "", text.lower().replace("’", "'"))  # "don't" is a stop word


def _nearest(embed: Callable, centres, names: list[str]) -> Callable[[list[str]], list[str]]:
    def place(prompts: list[str]) -> list[str]:
        if not prompts:
            return []
        points = embed(prompts)
        distances = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
        return [names[i] for i in distances.argmin(1)]

    return place


def _families(rows: list[dict], prompts: list[str], families, seed: int) -> tuple[list[str], bool, Callable]:
    """Family of each row, whether they were given, and a function that places further prompts."""
    if families is not None and len(families) != len(rows):
        raise Refusal(f"families = {len(families)} names: {len(rows)} rows. Give one for each row.")
    families = [row.get("family") for row in rows] if families is None else list(families)
    if all(family is None for family in families):
        names, place = cluster(prompts, seed)
        return names, False, place
    families = ["no family" if family is None else str(family) for family in families]
    return families, True, assign(prompts, families, seed)


def _smooth(counts: np.ndarray) -> np.ndarray:
    return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))


def _ranks(values) -> np.ndarray:
    """0 for the smallest to 1 for the largest, ties in the middle."""
    from scipy.stats import rankdata

    return (rankdata(values) - 1) / max(1, len(values) - 1)


def _evenness(counts: list[int]) -> float | None:
    p = np.array([count for count in counts if count], float)
    p /= p.sum()
    return float(-(p @ np.log(p)) / math.log(len(counts))) + 0.0 if len(counts) > 1 else None


def _plain(value, n: int, clusters: int) -> stats.Estimate:
    """A count or a score of the rows at hand: no interval."""
    return stats.Estimate(value, None, None, n, clusters)


def _by_style(ledger: _Ledger) -> dict:
    """How often an answer of a style is the chosen one: a preference for a style shows here first."""
    rows = []
    for style in STYLES:
        at = [i for i, cell in enumerate(ledger.cells) if cell[1] == style]
        won = stats.estimate([i % 2 == 0 for i in at], [ledger.clusters[i // 2] for i in at])
        rows.append([style, len(at), won if at else None])
    columns = ["style", "n", "chosen"]
    return section.table("Answers by style, and how often they are the chosen one", columns, rows, "A coin has 50 %.")


def _named(caption: str, cells: list[tuple[str, str]], names: list[str]) -> list[dict]:
    """A table of cells by name, empty where there are none."""
    rows = [[name, ", ".join(style for family, style in cells if family == name)] for name in names]
    rows = [row for row in rows if row[1]]
    return [section.table(caption, ["family", "styles"], rows)] if rows else []


def _deployment(prompts, ledger: _Ledger, seed: int) -> tuple[list, list, list]:
    """Figures, tables and notes on how deployment differs from the ledger."""
    compared, gap, ratio, chance, says, tables = Counter(ledger.families), _NONE, _NONE, None, "", []
    notes = ["No deployment prompts were given: whether the ledger fits its use is not measured."]
    if prompts:
        placed = ledger.place([_text(prompt) for prompt in prompts])
        names = sorted(compared)
        codes = np.array([names.index(family) for family in placed])
        p = _smooth(np.array([compared[name] for name in names], float))

        def divergence(weights) -> float:
            q = _smooth(np.bincount(codes, weights, len(names)))
            return float(q @ np.log(q / p))

        gap = stats.resampled(divergence, len(codes), [_cluster(prompt) for prompt in prompts])
        _, ratios = exposure_gap(Counter(placed), compared)
        top = max(ratios, key=ratios.get)
        ratio, says = _plain(ratios[top], len(codes), len(codes)), f"Largest for '{top}'. Counts are smoothed by ½."
        draws = np.random.default_rng(seed).multinomial(len(codes), p, 200)
        chance = float(np.mean([q @ np.log(q / p) for q in map(_smooth, draws.astype(float))]))
        tables = [_exposure(Counter(placed), compared, ratios)]
        notes = [
            f"Deployment prompts go to the family of the nearest mean prompt. With {len(codes)} of them a ledger of "
            f"the same mix has a gap of {chance:.3f} nats by chance."
        ]
    figures = [
        section.figure("exposure_gap", "Gap between deployment and the ledger", gap, unit="nats", better="lower",
                       baseline=chance and ("the same mix, by chance", chance),
                       says="KL(q deployment ‖ p ledger) over families, counts smoothed by ½."),
        section.figure("exposure_ratio", "Largest deployment share over ledger share", ratio, better="lower",
                       baseline=("the same mix", 1.0), says=says),
    ]  # fmt: skip
    return figures, tables, notes


def _exposure(deployed: Counter, ledger: Counter, ratios: dict) -> dict:
    rows = []
    for name in sorted(ratios, key=lambda name: -ratios[name]):
        shares = [f"{100 * counts[name] / counts.total():.1f} %" for counts in (deployed, ledger)]
        rows.append([name, deployed[name], *shares, round(ratios[name], 2)])
    columns = ["family", "n", "deployment", "ledger", "ratio"]
    return section.table("Where it is used against what was compared", columns, rows, "Smoothed ratio, largest first.")


def _generated(generated, ledger: _Ledger) -> tuple[list, list, list]:
    """Cells that a policy's answers never reach, and those that it reaches though none was ever compared."""
    if not generated:
        note = "No generated answers were given: which styles the policy never gives is not measured."
        found, tables, notes, unseen = _NONE, [], [note], _NONE
    else:
        placed = ledger.place([_text(row["prompt"]) for row in generated])
        cells = [(family, style_of(row["text"], ledger.bounds)) for family, row in zip(placed, generated, strict=True)]
        reached, met = Counter(cells), set(placed)
        never = [cell for cell in ledger.counts if cell[0] in met and not reached[cell]]
        found, notes = _plain(float(len(never)), len(cells), len({_cluster(row["prompt"]) for row in generated})), []
        ids = [_cluster(row["prompt"]) for row in generated]
        unseen = stats.estimate([not ledger.counts[cell] for cell in cells], ids)
        tables = _named("Never generated: styles that no answer to a family has", never, ledger.names)
        tables += _named("Generated, but never compared", [c for c in reached if not ledger.counts[c]], ledger.names)
    return [
        section.figure("never_generated", "Cells that the policy never answers in", found, better="lower",
                       says="Of the families among the generated answers' prompts."),
        section.figure("generated_unseen", "Generated answers in cells never compared", unseen, unit="%",
                       better="lower", baseline=("a full ledger", 0.0)),
    ], tables, notes  # fmt: skip
