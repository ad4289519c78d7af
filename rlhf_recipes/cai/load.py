"""The models of conf/cai.yaml: local, behind an endpoint, reward models; and a function."""

from collections.abc import Callable, Iterable, Iterator

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, references
from rlhf_recipes.cai.backend import Backend
from rlhf_recipes.cai.constitution import Constitution
from rlhf_recipes.cai.judge import Judge
from rlhf_recipes.config import CONF
from rlhf_recipes.errors import Refusal
from rlhf_recipes.models import template_kwargs
from rlhf_recipes.references import ModelRef

# What a generator or a judge of a kind does not read.
UNREAD = {
    "generator=server": ("model.adapter", "max_prompt_length", "data.too_long"),
    "judge=reward": ("route.accept_margin", "route.tie_margin", "route.max_spread"),
    "judge=function": ("route.max_spread", "judging.min_calibration_pairs"),
}
# The same of what an experiment may set for whoever judges: it is refused where it was typed.
OF_A_MODEL = tuple(
    f"judging.{key}"
    for key in ("mode", "principles_per_pair", "votes", "prior_correction", "min_option_mass", "cot_tokens")
)
UNREAD_IF_TYPED = {
    "judge=local": ("judging.votes",),
    "judge=reward": (*OF_A_MODEL, "gate.min_swap_consistency"),
    "judge=function": OF_A_MODEL,
    "judge=people": (
        "judging",
        *(f"gate.{key}" for key in ("gold", "pairs", "min_parsed", "min_swap_consistency", "fails")),
    ),
}
# What a judge's node names: an adapter, reward models, a function; None of a model without an adapter.
Named = ModelRef | list[ModelRef] | Callable | None


def refuse_unread(cfg: DictConfig, recipe: str = "cai", typed: Iterable[str] = ()) -> None:
    """Refuse a setting other than its default that nothing reads, as generator, judge or kinds of pairs were chosen.

    Args:
        typed: overrides, `key=value`, as somebody gave them for this run.

    Raises:
        Refusal: names it as typed.
    """
    own = OmegaConf.load(CONF / f"{recipe}.yaml")
    own.data = OmegaConf.load(CONF / "data" / "base.yaml")
    keys = [text.lstrip("+").partition("=")[0] for text in typed]
    unread = [(choice, key) for choice, unread in UNREAD.items() if _chosen(cfg, choice) for key in unread]
    if recipe == "cai":
        unread += [(why, key) for why, groups in _unread_if_typed(cfg) for key in keys if _is_below(key, groups)]
    for why, key in unread:
        given = OmegaConf.select(cfg, key)
        if given is not None and given != OmegaConf.select(own, key):
            raise Refusal(f"{key}={given}: is not read with {why}. Leave it out.")


def _unread_if_typed(cfg: DictConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A choice, and the settings, or groups of them, that it leaves unread."""
    yield from ((choice, keys) for choice, keys in UNREAD_IF_TYPED.items() if _chosen(cfg, choice))
    if cfg.judging.mode == "logprob":
        yield "judging.mode=logprob", ("judging.cot_tokens",)
    sources = f"sources=[{','.join(cfg.sources)}]"
    if "revision" not in cfg.sources:
        yield sources, ("revise",)
    if "on_policy" not in cfg.sources:
        yield sources, ("generate.n_samples", "generate.pairs")


def _chosen(cfg: DictConfig, choice: str) -> bool:
    group, _, kind = choice.partition("=")
    return OmegaConf.select(cfg, f"{group}.kind") == kind


def _is_below(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def find_judge(cfg: DictConfig) -> Named:
    """What `judge.adapter`, `judge.reward_model` or `judge.function` names.

    Raises:
        Refusal: there is none, or it was trained on another base model.
    """
    judge = cfg.judge
    if judge.kind == "reward":
        given = judge.reward_model if isinstance(judge.reward_model, str) else OmegaConf.to_object(judge.reward_model)
        return references.find_reward_models(given, "judge.reward_model", cfg.model.id, cfg.model.adapter_base)
    if judge.kind == "function":
        return config.import_function(judge.function, "judge.function")
    return find_judge_adapter(judge)


def find_judge_adapter(judge: DictConfig) -> ModelRef | None:
    """What `judge.adapter` of a local judge names.

    Raises:
        Refusal: there is none, or it was trained on another base model.
    """
    if judge.kind != "local" or not judge.adapter:
        return None
    return references.find(judge.adapter, "judge.adapter", judge.id, judge.adapter_base)


def load(
    cfg: DictConfig, parent: ModelRef | None, named: Named, principles: Constitution
) -> tuple[Backend, "Judge | None"]:
    """Generator and judge of conf/cai.yaml, None for people; one model in memory where both are the same.

    Args:
        parent: what `model.adapter` names, of a local generator.
        named: of `find_judge`.

    Raises:
        Refusal: a model or an endpoint's key cannot be found.
    """
    kind = cfg.judge.kind
    # What may be refused of a judge that is no model of its own comes before the generator is loaded.
    judge = load_one(cfg.judge, cfg, named) if kind == "server" else None
    if kind == "reward":
        from rlhf_recipes import models

        models.check_rewards(cfg.model, named)
    generator = load_one(cfg.model if cfg.generator.kind == "local" else cfg.generator, cfg, parent)
    if kind == "people":
        return generator, None
    if kind in ("reward", "function"):
        from rlhf_recipes.cai import scored

        if kind == "function":
            return generator, scored.FunctionJudge(scored.Function(named, cfg.judge.function))
        return generator, scored.RewardJudge(scored.Rewards(cfg.model, cfg.quantization, named), cfg.judge)
    same = cfg.generator.kind == kind == "local" and all(cfg.judge.get(k) == v for k, v in cfg.model.items())
    backend = generator if same else judge or load_one(cfg.judge, cfg, named)
    return generator, Judge(backend, principles, cfg.judging, cfg.seed)


def load_one(node: DictConfig, cfg: DictConfig, adapter: ModelRef | None) -> Backend:
    if node.get("kind") == "server":
        from rlhf_recipes.cai.server import Server

        names = ("base_url", "model", "api_key_env", "concurrency", "timeout", "max_attempts")
        given = {name: node[name] for name in names}
        return Server(chat_template_kwargs=template_kwargs(node), role=str(node._key() or ""), **given)
    from rlhf_recipes.cai import local

    return local.load(node, cfg.quantization, adapter)
