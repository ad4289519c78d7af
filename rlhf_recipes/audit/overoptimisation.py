"""Over-optimisation: where more of the proxy reward stops being more of the gold reward.

Two kinds of pressure, over d = sqrt(KL) to the start: picking the best of n samples by the proxy, and a policy trained
on it. A policy spends far more KL than best-of-n for the same gain (Gao, Schulman, Hilton 2022, arXiv:2210.10760), so
the two never share an axis.

Shapes: P prompts, S samples of a prompt, K points of a curve, R rows (prompts of all seeds), B resamples.
"""

import math
import re

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.audit import pressure, section
from rlhf_recipes.errors import Refusal

KEY, TITLE = "overoptimisation", "Over-optimisation"
QUESTION = "If we push harder on this reward, do the answers get better, or only the score?"
RESAMPLES = 1000
ROUNDING = 1e-9
FAR = 10  # a fitted peak beyond so many times the largest measured d counts as none
_NONE = stats.estimate([])


def checkpoint_to_keep(rows: list[dict], prompt_ids=None) -> dict:
    """The checkpoint of a run with the highest mean gold, by gold and never by the proxy.

    Args:
        rows: in the order of training, each `step` and, shape (P,), `kl_P` (nats), `proxy_P`, `gold_P` of the same
            prompts in the same order.

    Returns:
        `index` and `step`; `tied`: steps whose gold is not told apart from it (`stats.ahead`), itself
        included; `earliest` of them; `gap`: its gold minus the last checkpoint's, paired; `onset` (`step`, `d`) of
        the divergence: the first of two evaluations in a row whose gold is more than one standard error (of the
        paired difference) under the best so far while their proxy is above its proxy; None if there is none.
    """
    golds_KP = np.array([row["gold_P"] for row in rows], float)
    best = int(golds_KP.mean(1).argmax())
    gaps = [stats.difference(golds_KP[best], gold_P, prompt_ids, RESAMPLES) for gold_P in golds_KP]
    tied = [i for i, gap in enumerate(gaps) if i == best or not stats.ahead(gap, len(rows) - 1)]
    return {
        "index": best,
        "step": rows[best]["step"],
        "tied": [rows[i]["step"] for i in tied],
        "earliest": rows[tied[0]]["step"],
        "gap": gaps[-1],
        "onset": _onset(rows, golds_KP),
    }


def audit(best_of_n: list[dict] | None = None, checkpoints: list[dict] | None = None) -> dict:
    """Gold against proxy, for best-of-n and along the checkpoints of runs.

    Args:
        best_of_n: `name`, `proxy_PS`, `gold_PS` (lists or arrays), `gold_kind` (what the gold is, in words).
        checkpoints: `name`, `rows` (as in `checkpoint_to_keep`, the first is the start), optionally `gold_kind`,
            `proxy_kind`, and `optimised`, whether the run was trained on gold: what it lost is not measured then.

    Entries of one name with different `seed` are seeds of one thing: their prompts are put together. Either may have
    `prompt_ids` (P); without them, prompts are taken to be the same and in the same order in every entry. Gains are in
    standard deviations of the start's answers: for best-of-n over the samples of a prompt, for a run over prompts.

    Gates are about `best_of_n_gap`, of the first name, and about the least that any run gains and keeps,
    `policy_least_gain` and `policy_kept`.
    """
    if not best_of_n and not checkpoints:
        why = "Give what knows better: gold=<another reward model, module:function, or labels.jsonl>."
        return section.skipped(KEY, TITLE, QUESTION, why)
    parts = {"figures": [], "tables": [], "plots": [], "notes": []}
    for kind, entries in (("best_of_n", best_of_n), ("policy", checkpoints)):
        names = list(dict.fromkeys(entry["name"] for entry in entries or []))
        curves = [_measure(kind, name, [e for e in entries if e["name"] == name]) for name in names]
        for i, curve in enumerate(curves):
            _report(parts, curve, f"_{_slug(curve['name'])}" if i else "", curves[0] if i else None)
        if len(curves) > 1:
            parts["plots"].append(_compared(kind, curves, "all"))
        if kind == "policy" and curves:
            parts["figures"] += _of_all_runs(curves)
    return section.section(KEY, TITLE, QUESTION, **parts)


def _onset(rows: list[dict], golds_KP: np.ndarray) -> dict | None:
    proxies_K, top, fallen = [float(np.mean(row["proxy_P"])) for row in rows], 0, []
    for i, gold_P in enumerate(golds_KP):
        drop_P = golds_KP[top] - gold_P
        error = drop_P.std(ddof=1) / math.sqrt(len(drop_P)) if len(drop_P) > 1 else 0.0
        if drop_P.mean() <= 0:
            top, fallen = i, []
        elif drop_P.mean() > error and proxies_K[i] > proxies_K[top]:
            fallen.append(i)
        else:
            fallen = []
        if len(fallen) == 2:
            row = rows[fallen[0]]
            return {"step": row["step"], "d": math.sqrt(max(0.0, float(np.mean(row["kl_P"]))))}
    return None


def _samples(entry: dict) -> dict:
    """Gains of best-of-n over a random pick, each point of the curve for each prompt."""
    proxy_PS, gold_PS = (np.atleast_2d(np.asarray(entry[key], float)) for key in ("proxy_PS", "gold_PS"))
    size = proxy_PS.shape[1]
    ns = sorted({min(size, round(2 ** (k / 2))) for k in range(2 * math.ceil(math.log2(size)) + 1)})
    gold_PK, proxy_PK = pressure.best_of_n(proxy_PS, gold_PS, ns)
    scales = [_spread(math.sqrt(values.var(1, ddof=1).mean()) if size > 1 else 0) for values in (gold_PS, proxy_PS)]
    ceiling_PK = (pressure.best_of_n(gold_PS, gold_PS, ns)[0] - gold_PK[:, :1]) / scales[0]
    return {
        "labels": ns,
        "kl_RK": np.tile([pressure.kl_best_of_n(n) for n in ns], (len(gold_PK), 1)),
        "gold_RK": (gold_PK - gold_PK[:, :1]) / scales[0],
        "proxy_RK": (proxy_PK - proxy_PK[:, :1]) / scales[1],
        "ceiling_RK": ceiling_PK,
    }


def _policy(entry: dict) -> dict:
    """Gains of each checkpoint over the first, for each prompt."""
    rows = entry["rows"]
    sizes = {len(row[key]) for row in rows for key in ("kl_P", "proxy_P", "gold_P")}
    if len(rows) < 2 or len(sizes) != 1:
        text = f"checkpoints '{entry['name']}' = {len(rows)} rows of {sorted(sizes)} prompts: two rows or more of the"
        raise Refusal(f"{text} same prompts are needed. Score every checkpoint on every prompt.")
    kl, gold, proxy = (np.array([row[key] for row in rows], float).T for key in ("kl_P", "gold_P", "proxy_P"))
    if not all(np.isfinite(values).all() for values in (kl, gold, proxy)):
        raise Refusal(f"checkpoints '{entry['name']}' = nan or infinite: must be finite. Drop such prompts first.")
    gold, proxy = ((values - values[:, :1]) / _spread(values[:, 0].std()) for values in (gold, proxy))
    return {"labels": [row["step"] for row in rows], "kl_RK": kl, "gold_RK": gold, "proxy_RK": proxy}


def _spread(sd: float) -> float:
    return sd if sd > ROUNDING else 1.0


def _measure(kind: str, name: str, entries: list[dict]) -> dict:
    """The curve of one name over all its seeds, its fit with resamples of prompts, and the same for each seed."""
    parts = [(_samples if kind == "best_of_n" else _policy)(entry) for entry in entries]
    labels = [label for label in parts[0]["labels"] if all(label in part["labels"] for part in parts)]
    if not labels:
        raise Refusal(f"'{name}' = seeds without a common step: cannot be put together. Evaluate the same steps.")
    ids = []
    for part, entry in zip(parts, entries, strict=True):
        at = [part["labels"].index(label) for label in labels]
        part |= {key: part[key][:, at] for key in part if key != "labels"}
        rows = len(part["gold_RK"])
        if len(given := list(entry.get("prompt_ids") or range(rows))) != rows:
            raise Refusal(f"prompt_ids of '{name}' = {len(given)} ids: {rows} prompts. Give one for each.")
        ids.append(given)
    keys = [key for key in parts[0] if key != "labels"]
    pooled = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    curve = {"kind": kind, "name": name, "labels": labels, "ids": [i for given in ids for i in given], **pooled}
    curve |= {key: entries[0].get(key) for key in ("gold_kind", "proxy_kind")}
    curve["optimised"] = any(entry.get("optimised") for entry in entries)
    curve |= {"seeds": [], "fit": _fit(curve)}
    if len(entries) > 1:
        for i, (part, entry) in enumerate(zip(parts, entries, strict=True)):
            one = {"kind": kind, "name": name, "ids": ids[i], **part, "labels": labels}
            curve["seeds"].append(one | {"seed": entry.get("seed", i), "fit": _fit(one)})
    return curve


def _fit(curve: dict) -> dict:
    """`fit` of the mean curve, with its resamples over prompts: estimates, and the band on a fine axis."""
    d_K, gold_K = _distance(curve["kl_RK"].mean(0)), curve["gold_RK"].mean(0)
    found = pressure.fit(d_K, gold_K, curve["kind"]) | {"d": d_K, "gold": gold_K, "x": np.linspace(0, d_K.max(), 40)}
    if found["alpha"] is None:
        return found
    codes_R = np.unique(curve["ids"], return_inverse=True)[1]
    groups = int(codes_R.max()) + 1
    fitted_X = pressure.curve(found["x"], found["alpha"], found["beta"], curve["kind"])
    found |= {"n": len(codes_R), "clusters": groups, "y": fitted_X}
    if groups < 2:
        return found | {"draws": None, "peaked": None, "low": None, "high": None}
    draws_BG = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    weights_BR = draws_BG[:, codes_R] / draws_BG[:, codes_R].sum(1, keepdims=True)
    d_BK, gold_BK = _distance(weights_BR @ curve["kl_RK"]), weights_BR @ curve["gold_RK"]
    a_B, b_B = pressure.least_squares(d_BK, gold_BK, curve["kind"])
    peak_B = pressure.peak_of(a_B, b_B, curve["kind"])
    peak_B = np.where(peak_B > FAR * d_K.max(), np.inf, peak_B)
    heights_B = pressure.curve(np.where(np.isfinite(peak_B), peak_B, 0), a_B, b_B, curve["kind"])
    fits_BX = pressure.curve(found["x"], a_B[:, None], b_B[:, None], curve["kind"])
    low_X, high_X = np.nanquantile(fits_BX, (0.025, 0.975), axis=0)
    draws = {"alpha": a_B, "beta": b_B, "peak": peak_B, "height": np.where(np.isfinite(peak_B), heights_B, np.inf)}
    return found | {"draws": draws, "peaked": float(np.mean(peak_B < d_K.max())), "low": low_X, "high": high_X}


def _distance(kl):
    return np.sqrt(np.maximum(kl, 0))  # a mean of log-ratios can come out below 0


def _of_fit(found: dict, key: str) -> stats.Estimate:
    """An estimate of the fit; without an interval where some resamples have no peak."""
    if found[key] is None:
        return _NONE
    bounds = (None, None)
    if found["draws"] is not None:
        low, high = np.nanquantile(found["draws"][key], (0.025, 0.975), method="nearest")
        bounds = (float(low), float(high)) if np.isfinite([low, high]).all() else bounds
    return stats.Estimate(float(found[key]), *bounds, found["n"], found["clusters"])


def _mean(gains_R, ids) -> stats.Estimate:
    return stats.difference(gains_R, np.zeros(len(gains_R)), ids, RESAMPLES)  # `estimate` takes zeros for a share


def _best(curve: dict) -> int:
    """Index of the best point by gold."""
    return int(curve["gold_RK"].mean(0).argmax())


def _gap(curve: dict) -> stats.Estimate:
    """Gold of the best point minus that of the last. The best is picked anew in each resample: else a last point that
    is the best of the prompts at hand would be so for sure.

    No value where gold nowhere moves: of one point, or where gold or the proxy tells no two answers apart.
    """
    gold_RK = curve["gold_RK"]
    if np.abs(gold_RK).max(initial=0) < ROUNDING:
        return _NONE

    def lost(weights_R) -> float:
        golds_K = weights_R @ gold_RK / weights_R.sum()
        return float(golds_K.max() - golds_K[-1])

    return stats.resampled(lost, len(gold_RK), curve["ids"], RESAMPLES)


def _share_kept(curve: dict) -> stats.Estimate:
    """Gold gain of the last point over that of the best, picked as in `_gap`.

    No value without a gain that is told apart from none, the best having been picked, nor where the run was trained on
    gold.
    """
    gold_RK, ids = curve["gold_RK"], curve["ids"]
    gained = _mean(gold_RK[:, _best(curve)], ids)
    if curve["optimised"] or not stats.ahead(gained, len(curve["labels"]) - 1):
        return _NONE

    def share(weights_R) -> float:
        golds_K = weights_R @ gold_RK
        return float(golds_K[-1] / golds_K.max()) if golds_K.max() > 0 else math.nan

    return stats.resampled(share, len(gold_RK), ids, RESAMPLES)


def _of_all_runs(curves: list[dict]) -> list[section.Figure]:
    """What gates are about: `policy_least_gain` and `policy_kept`, the least of any run, and where they are several
    what each keeps."""
    ends = {c["name"]: _NONE if c["optimised"] else _mean(c["gold_RK"][:, -1], c["ids"]) for c in curves}
    kept = {curve["name"]: _share_kept(curve) for curve in curves}
    gain, share = "Gold gained at the end", "Share of the best gold gain left at the end"
    says = "Gold gain of the last checkpoint over that of the best one, which is picked anew in each resample."
    least_gain = _least("policy_least_gain", gain, ends, "sd", "Mean gold of the last checkpoint minus the start's.")
    of_each = [
        section.figure(f"policy_kept_{_slug(name)}", f"{share}: {name}", e, unit="%", better="higher", says=says)
        for name, e in kept.items()
    ]
    return [least_gain, _least("policy_kept", share, kept, "%", says, most=1), *(of_each if len(curves) > 1 else [])]


def _least(
    key: str, title: str, of_runs: dict[str, stats.Estimate], unit: str, says: str, most: float = math.inf
) -> section.Figure:
    """The least of several runs, whose interval is one of all at once; none of them is over `most`."""
    measured = {name: e for name, e in of_runs.items() if e.value is not None}
    name, least = stats.extreme(measured, "higher", high=most) if measured else (next(iter(of_runs)), _NONE)
    if len(of_runs) > 1:
        title, says = f"{title}, the least", f"{says} The least of all runs; the interval is one of all at once."
    return section.figure(key, f"{title}: {name}", least, unit=unit, better="higher", says=says)


def _report(parts: dict, curve: dict, suffix: str, first: dict | None) -> None:
    """Adds the figures, tables, plot and notes of one curve; `first` is the curve it is compared with."""
    kind, name, ids, found = curve["kind"], curve["name"], curve["ids"], curve["fit"]
    last, unit, x = curve["labels"][-1], "sd", "n" if kind == "best_of_n" else "step"
    gap, gain = _gap(curve), _mean(curve["gold_RK"][:, -1], ids)
    measured = found["peak"] is not None and found["peak"] < found["d"].max()
    law = f"R(d) = {pressure.FORMS[kind]}, d = √KL (arXiv:2210.10760)."
    peak = "α / (2β)" if kind == "best_of_n" else "exp(α/β − 1)"
    at = ""
    if kind == "best_of_n" and measured:
        peaks = (n for n in range(1, last + 1) if pressure.kl_best_of_n(n) >= found["peak"] ** 2)
        at = f" The peak is at n ≈ {next(peaks)}."
    start = "a random pick" if kind == "best_of_n" else "the start"

    def add(key, title, estimate, unit, better=None, baseline=None, says=""):
        title = f"{title}: {name}"
        figure = section.figure(
            f"{kind}_{key}{suffix}", title, estimate, unit=unit, better=better, baseline=baseline, says=says
        )
        parts["figures"].append(figure)

    add("gain", f"Gold gained at {x} = {last}", gain, unit, "higher", (start, 0.0),
        f"Mean gold at {x} = {last} minus that of {start}, in standard deviations of the start's gold.")  # fmt: skip
    lost = _NONE if curve["optimised"] else gap
    add("gap", "Gold lost after its best", lost, unit, "lower", ("no over-optimisation", 0.0),
        f"Highest mean gold (at {x} = {curve['labels'][_best(curve)]}) minus that at {x} = {last}, paired by prompt. "
        "The highest is picked on the same prompts, in each resample anew: chance alone makes it a little more than 0."
    )  # fmt: skip
    slope = "slope at the start" if kind == "best_of_n" else "gain at d = 1"
    add("alpha", f"α of the fit, {slope}", _of_fit(found, "alpha"), "", None, None, law)
    add("beta", "β, how fast gold bends down", _of_fit(found, "beta"), "", "lower", ("no bend", 0.0), law)
    near = found["peak"] is not None and found["peak"] <= FAR * found["d"].max()
    add("peak", "√KL at which gold peaks", _of_fit(found, "peak") if near else _NONE, "√nat", "higher", None,
        f"{peak} of {law} Measured up to {found['d'].max():.2f}.{at}")  # fmt: skip
    add("gain_at_peak", "Gold gained at the peak", _of_fit(found, "height") if measured else _NONE, unit, "higher",
        (start, 0.0), f"{law} Only where the peak lies within what was measured.")  # fmt: skip
    if first is not None and first["gold_RK"].shape == curve["gold_RK"].shape and first["ids"] == ids:
        over = stats.difference(curve["gold_RK"][:, -1], first["gold_RK"][:, -1], ids, RESAMPLES)
        add(f"gain_over_{_slug(first['name'])}", f"Gold gained at the end over '{first['name']}'", over, unit,
            "higher", ("no difference", 0.0), "Paired by prompt.")  # fmt: skip
    parts["tables"].append(_table(curve, x))
    parts["plots"].append(_plot(curve, measured))
    if curve["seeds"]:
        parts["tables"].append(_by_seed(curve, x))
        parts["plots"].append(_compared(kind, [one | {"name": f"seed {one['seed']}"} for one in curve["seeds"]], name))
    if kind == "policy" and not curve["optimised"]:
        parts["notes"].append(_keep(curve))
    parts["notes"] += _notes(curve, measured, gap)


def _keep(curve: dict) -> str:
    """Which checkpoint to keep, of all seeds together."""
    columns = {key: curve[f"{key}_RK"].T for key in ("kl", "proxy", "gold")}
    rows = [
        {"step": step} | {f"{key}_P": columns[key][k] for key in columns} for k, step in enumerate(curve["labels"])
    ]
    kept = checkpoint_to_keep(rows, curve["ids"])
    text = f"{curve['name']}: keep step {kept['step']}, the highest gold"
    others = [str(step) for step in kept["tied"] if step != kept["step"]]
    text += f"; not told apart from it: step {', '.join(others)}." if others else "."
    if _share_kept(curve).value is None:
        text += " Its gain is not told apart from none: there is none to lose."
    onset = kept["onset"]
    return text + (
        f" Gold falls while the proxy rises from step {onset['step']} (d = {onset['d']:.2f}) on."
        if onset else " At no point does gold fall for two evaluations while the proxy rises."
    )  # fmt: skip


def _table(curve: dict, x: str) -> dict:
    rows, best = [], _best(curve)
    for k, label in enumerate(curve["labels"]):
        if x == "n" and label & (label - 1) and k not in (best, len(curve["labels"]) - 1):
            continue  # powers of two are enough to read
        cells = [stats.format_estimate(_mean(curve[key][:, k], curve["ids"]), sign=True, digits=2)
                 for key in ("gold_RK", "proxy_RK", "ceiling_RK") if key in curve]  # fmt: skip
        kl = max(0.0, float(curve["kl_RK"][:, k].mean()))
        rows.append([f"{x} = {label}", round(kl, 3), round(math.sqrt(kl), 3), *cells])
    columns = [x, "KL (nats)", "d = √KL", "gold", "proxy"] + ["picked by gold itself"] * ("ceiling_RK" in curve)
    n = f"{len(curve['ids'])} rows of {len(set(curve['ids']))} prompts"
    note = f"Gains over the start in standard deviations of the start's answers; {n}."
    return section.table(f"{curve['name']}: gold and proxy", columns, rows, note)


def _by_seed(curve: dict, x: str) -> dict:
    rows = []
    for one in [*curve["seeds"], curve | {"seed": "all"}]:
        gap, gain = _gap(one), _mean(one["gold_RK"][:, -1], one["ids"])
        peak = one["fit"]["peak"]
        cells = [stats.format_estimate(e, sign=True, digits=2) for e in (gain, gap)]
        peak = "none" if peak is None else "beyond" if peak > one["fit"]["d"].max() else f"{peak:.2f}"
        rows.append([str(one["seed"]), *cells, f"{x} = {one['labels'][_best(one)]}", peak])
    columns = ["seed", "gold gained at the end", "lost after the best", "best", "peak (d)"]
    note = "Intervals are over prompts; how far the seeds lie apart is to be read down the column."
    return section.table(f"{curve['name']}: by seed", columns, rows, note)


def _plot(curve: dict, measured: bool) -> dict:
    found = curve["fit"]
    d = found["d"].tolist()
    series = []
    for name, key in (("gold", "gold_RK"), ("proxy", "proxy_RK")):
        at = [_mean(column, curve["ids"]) for column in curve[key].T]
        bands = [None, None] if at[0].low is None else [[e.low for e in at], [e.high for e in at]]
        series.append(section.curve(name, d, [e.value for e in at], *bands))
    if found["alpha"] is not None:
        bands = [None if found[bound] is None else found[bound].tolist() for bound in ("low", "high")]
        series.append(section.curve("gold, fitted", found["x"].tolist(), found["y"].tolist(), *bands, points=False))
    what = "best of n" if curve["kind"] == "best_of_n" else "checkpoints"
    caption = f"{curve['name']}, {what}: gain over the start, each in its own standard deviations"
    marks = [("peak", found["peak"])] if measured else []
    return section.lines(caption, "d = √KL (√nat)", "gain (sd)", series, marks)


def _compared(kind: str, curves: list[dict], of: str) -> dict:
    series = [section.curve(c["name"], c["fit"]["d"].tolist(), c["fit"]["gold"].tolist()) for c in curves]
    what = "best of n" if kind == "best_of_n" else "checkpoints"
    return section.lines(f"Gold of {of}, {what}", "d = √KL (√nat)", "gold gain (sd)", series)


def _notes(curve: dict, measured: bool, gap: stats.Estimate) -> list[str]:
    name, found, notes = curve["name"], curve["fit"], []
    last = f"d = {found['d'].max():.2f}"
    if found["alpha"] is None:
        notes.append(f"{name}: fewer than two different KL above 0, so no law is fitted.")
    elif found["peak"] is None:
        notes.append(f"{name}: β ≤ 0, the gold curve does not bend down: no peak in sight up to {last}.")
    elif not measured:
        notes.append(f"{name}: gold has not peaked in what was measured, up to {last}; a later peak is extrapolated.")
    if found.get("peaked") is not None:
        notes.append(f"{name}: fitted to resamples of the prompts, {found['peaked']:.0%} peak before {last}.")
    if curve["optimised"]:
        notes.append(f"{name}: gold is what the run was trained on, so nothing here can show over-optimisation. Give "
                     "a reward model that learned from other pairs, or a person's labels.")  # fmt: skip
    elif gap.low is not None and gap.high > gap.low:
        notes.append(f"{name}: a loss of gold under about {gap.high - gap.low:.2f} sd could easily be missed "
                     f"with {gap.clusters} prompts.")  # fmt: skip
    if curve["kind"] == "best_of_n":
        notes.append(f"{name}: KL = ln n − (n−1)/n is an upper bound (arXiv:2401.01879); n = 1 is a random pick.")
    elif found["d"][0] > 0.1:
        notes.append(f"{name}: the first checkpoint is already at d = {found['d'][0]:.2f}; gains are over it.")
    said = [f"{key} is {curve[f'{key}_kind']}" for key in ("gold", "proxy") if curve[f"{key}_kind"]]
    if said:
        notes.append(f"{name}: {', '.join(said)}.")
    return notes


def _slug(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")
