"""Before the spend: what the run will cost, and whether the judge is worth asking."""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import ranks
from rlhf_recipes.cai.backend import Backend, Journal, Request
from rlhf_recipes.cai.judge import Judge, Pair, validate_judge
from rlhf_recipes.cai.make_pairs import price
from rlhf_recipes.config import CONF
from rlhf_recipes.data.fit import describe as describe_rows
from rlhf_recipes.data.load import load_pairs
from rlhf_recipes.errors import Refusal
from rlhf_recipes.stats import format_estimate

# Worked on before the estimate, to know the pace, or as many requests as an endpoint has places; their answers are
# thrown away.
TRIAL_REQUESTS, TRIAL_TOKENS = 8, 12
# An interactive run asks before it spends more than this.
ASK_MINUTES, ASK_USD = 60.0, 1.0
# For the estimate alone: characters of English a token; tokens of a template, a worked example, a judge's question.
CHARS_PER_TOKEN, TEMPLATE, SHOT, QUESTION = 4.0, 20, 90, 150


def load_gold(cfg: DictConfig) -> list[dict]:
    """Pairs whose better reply is known, from `gate.gold`: the train split of `data`, of which `data.train_size` says
    how many prompts are answered, not how many pairs are known; or a file's.

    Raises:
        Refusal: what `data.load_pairs` refuses.
    """
    if cfg.gate.gold == "data":
        node = OmegaConf.merge(cfg.data, {"train_size": None})
    else:
        node = OmegaConf.merge(OmegaConf.load(CONF / "data" / "base.yaml"), {"path": cfg.gate.gold})
    pairs = load_pairs(node)
    if cfg.gate.gold != "data":
        print(describe_rows(pairs.report, "gate.gold"), flush=True)
    return pairs.train[: cfg.gate.pairs]


def examine(judge: Judge, gold: list[dict], cfg: DictConfig, journal: Journal) -> dict[str, Any]:
    """Judge the gold pairs. Sets the judge's temperature where the pairs are enough to fit one.

    Returns:
        What `validate_judge` does, and `applied`: whether the labels to come have the temperature.
    """
    judge.learn_priors(journal)
    pairs = [
        Pair(row["prompt_id"], row["prompt"], row["chosen"][-1]["content"], row["rejected"][-1]["content"])
        for row in gold
    ]
    found = validate_judge(judge, gold, judge.compare(pairs, journal, "judge: gold pairs"), cfg.gate)
    enough = cfg.judging.min_calibration_pairs
    applied = judge.temperature is not None and enough is not None and len(gold) >= enough
    if applied:
        judge.temperature = found["temperature"]
    return found | {"applied": applied}


def describe(found: dict[str, Any]) -> str:
    """The gate's table and verdict, as the recipe prints it."""
    agreement, best = found["agreement"], found["best_baseline"]
    lines = [
        f"judge: agrees with the gold label on {format_estimate(agreement, percent=True)} of {agreement.n} pairs, "
        f"'{best}' on {format_estimate(found['baselines'][best], percent=True)}",
        *(
            f"       {'passed' if check['passed'] else 'FAILED':6}  {check['name']}: "
            f"{'none' if check['value'] is None else format(check['value'], '.3f')} (needed {check['needed']:g})"
            for check in found["checks"]
        ),
    ]
    return "\n".join(lines)


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The result's main entry: the best rule without a model, then the judge."""
    best = found["baselines"][found["best_baseline"]]
    return {"name": "judge_agreement", "before": best, "after": found["agreement"]}


def decide(found: dict[str, Any], judge: Judge, cfg: DictConfig) -> tuple[list[str], Judge | None]:
    """The kinds of pairs to make, and the judge, or None where the pairs are labelled by construction.

    Raises:
        Refusal: the judge failed, and `gate.fails=stop`.
    """
    if found["passed"] or cfg.gate.fails == "ignore":
        return list(cfg.sources), judge
    failed = "; ".join(check["name"] for check in found["checks"] if not check["passed"])
    if cfg.gate.fails == "stop":
        raise Refusal(
            f"gate: {judge.backend.name} fails it ({failed}). Take a better judge (judge=server judge.model=...), "
            "pairs that need none (gate.fails=contrastive), or its labels as they are (gate.fails=ignore)."
        )
    print(
        "       Its labels are not used: pairs are contrastive, a reply under the constitution's good system prompt "
        "against one\n       under its bad one. A better judge: judge=server judge.model=...",
        flush=True,
    )
    return ["contrastive"], None


def longest(cfg: DictConfig, sources: list[str], prompts: Iterable[dict], gold: list[dict]) -> dict[str, int]:
    """Tokens that the longest request to `generator` and `judge` may have, with its answer, about."""
    most = max((tokens(row["prompt"]) for row in prompts), default=0)
    generations, _ = _generations(cfg, sources, most)
    shown = [tokens(row["prompt"]) + tokens(row["chosen"]) + tokens(row["rejected"]) for row in gold]
    return {
        "generator": round(max(sum(each) for each in generations)),
        "judge": asked_of_judge(max([most + 2 * cfg.generate.max_new_tokens, *shown]), cfg.judging),
    }


def asked_of_judge(shown: float, judging: DictConfig) -> int:
    """Tokens of a question about a prompt and two replies that have `shown`, with the answer, about."""
    return round(shown + QUESTION + (judging.cot_tokens if judging.mode == "cot" else 0))


def tokens(messages: list[dict]) -> float:
    """Of a conversation, about."""
    return sum(len(turn["content"].encode("utf-8", "replace")) for turn in messages) / CHARS_PER_TOKEN + TEMPLATE


def _generations(cfg: DictConfig, sources: list[str], size: float) -> tuple[list[tuple[float, int]], int]:
    """(prompt tokens, most new tokens) of each request to the generator about a prompt of a size, and the pairs."""
    reply, revised = cfg.generate.max_new_tokens, cfg.revise.max_new_tokens
    shots = SHOT * cfg.revise.few_shot
    generations, pairs = [], 0
    if "revision" in sources:
        generations.append((size, reply))
        rounds = cfg.revise.n_revisions
        if cfg.revise.critique:
            generations += [(size + shots + reply, revised)] * rounds
        generations += [(size + shots + reply + revised * cfg.revise.critique, revised)] * rounds
        pairs += 1
    if "on_policy" in sources:
        generations += [(size, reply)] * cfg.generate.n_samples
        pairs += cfg.generate.n_samples * (cfg.generate.n_samples - 1) // 2
    if "contrastive" in sources:
        generations += [(size + 60, reply)] * 2
        pairs += 1
    return generations, pairs


def estimate(cfg: DictConfig, sources: list[str], prompts: Sequence[dict], generator: Backend, judge: Judge | None):
    """What making the pairs takes: `prompts`, `calls`, `prompt_tokens`, `completion_tokens` (at most), `minutes` at
    the pace of trial requests, as many at a time as will be, and `usd` where the endpoints are priced (else None)."""
    n = len(prompts)
    size = sum(len(turn["content"]) for row in prompts for turn in row["prompt"]) / max(n, 1) / CHARS_PER_TOKEN
    generations, pairs = _generations(cfg, sources, size + TEMPLATE)
    choices, question = _questions(cfg, judge, pairs, size)
    tokens_in, tokens_out = n * sum(g[0] for g in generations), n * sum(g[1] for g in generations)
    read, written = _pace(generator, prompts)
    own = isinstance(judge, Judge) and judge.backend is not generator
    # Reward models are of the generator's size, or taken for it; a function takes no time.
    judged = n * choices * question / (_pace(judge.backend, prompts)[0] if own else read)
    generated = tokens_in / read + tokens_out / written
    aside = own and generator.places and judge.backend.places  # both work at a time
    cost = [price(cfg.generator, tokens_in, tokens_out), price(cfg.judge, n * choices * question, 0)]
    return {
        "prompts": n,
        "calls": n * (len(generations) + choices),
        "prompt_tokens": round(tokens_in + n * choices * question),
        "completion_tokens": round(tokens_out),
        "minutes": round((max(generated, judged) if aside else generated + judged) / 60, 1),
        "usd": None if None in cost else round(sum(cost), 2),
    }


def _questions(cfg: DictConfig, judge: Judge | None, pairs: int, size: float) -> tuple[int, float]:
    """Questions to the judge about the pairs of a prompt of a size, and the tokens of each."""
    reply = cfg.generate.max_new_tokens
    if judge is None:
        return 0, 0.0
    if cfg.judge.kind == "function":
        return 2 * pairs, 0.0
    if cfg.judge.kind == "reward":  # of each reply, by each member; two of a pair of another kind
        replies = cfg.generate.n_samples if "on_policy" in cfg.sources else 0
        others = 2 * len(set(cfg.sources) - {"on_policy"})
        return replies + others, len(judge.backend.members) * (size + TEMPLATE + reply)
    return 2 * pairs * cfg.judging.principles_per_pair, size + TEMPLATE + 2 * reply + QUESTION


def confirm(spend: dict) -> None:
    """Print the estimate; a run at a terminal asks before a long or an expensive one, no other run asks anything.

    Raises:
        KeyboardInterrupt: the answer was no.
    """
    usd = f", {spend['usd']:.2f} USD" if spend["usd"] else ""
    print(
        f"estimate: {spend['prompts']:,} prompts, {spend['calls']:,} calls, {spend['prompt_tokens']:,} tokens read, "
        f"at most {spend['completion_tokens']:,} written, at most {spend['minutes']:,.1f} minutes{usd}",
        flush=True,
    )
    expensive = spend["minutes"] > ASK_MINUTES or (spend["usd"] or 0) > ASK_USD
    if ranks.by_first(lambda: expensive and sys.stdin.isatty() and not _is_yes(input("Go on? [y/N] "))):
        raise KeyboardInterrupt


def _is_yes(said: str) -> bool:
    return said.strip().lower() in ("y", "yes")


def _pace(backend: Backend, prompts: list[dict]) -> tuple[float, float]:
    """Tokens per second read and written, from a few requests with one and with several new tokens."""
    trial = [
        Request(row["prompt_id"], "trial", row["prompt"], max_new_tokens=1, temperature=1.0, seed=n)
        for n, row in enumerate(prompts[: backend.places or TRIAL_REQUESTS])
    ]
    seconds, tokens = [], []
    for new in (1, TRIAL_TOKENS):
        begin = time.monotonic()
        asked = [replace(request, max_new_tokens=new) for request in trial]
        answers = [answer for group in backend.answer(asked, (), "pace") for _, answer in group]
        seconds.append(time.monotonic() - begin)
        tokens.append((sum(a["prompt_tokens"] for a in answers), sum(a["tokens"] for a in answers)))
    more = max(tokens[1][1] - tokens[0][1], 1)
    return tokens[0][0] / max(seconds[0], 1e-3), more / max(seconds[1] - seconds[0], 1e-3)
