"""The models of conf/cai.yaml: local, behind an endpoint, reward models; and a function."""

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, references
from rlhf_recipes.cai.backend import Backend
from rlhf_recipes.cai.constitution import Constitution
from rlhf_recipes.cai.judge import Judge
from rlhf_recipes.models import template_kwargs
from rlhf_recipes.references import ModelRef

# What a judge's node names: an adapter, reward models, a function; None of a model without an adapter.
Named = ModelRef | list[ModelRef] | Callable | None


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
    generator = load_one(cfg.model if cfg.generator.kind == "local" else cfg.generator, cfg, parent)
    if cfg.judge.kind == "people":
        return generator, None
    if cfg.judge.kind in ("reward", "function"):
        from rlhf_recipes import models
        from rlhf_recipes.cai import scored

        if cfg.judge.kind == "function":
            return generator, scored.FunctionJudge(scored.Function(named, cfg.judge.function))
        models.check_rewards(cfg.model, named)
        return generator, scored.RewardJudge(scored.Rewards(cfg.model, cfg.quantization, named), cfg.judge)
    same = cfg.generator.kind == cfg.judge.kind == "local" and all(cfg.judge.get(k) == v for k, v in cfg.model.items())
    backend = generator if same else load_one(cfg.judge, cfg, named)
    return generator, Judge(backend, principles, cfg.judging, cfg.seed)


def load_one(node: DictConfig, cfg: DictConfig, adapter: ModelRef | None) -> Backend:
    if node.get("kind") == "server":
        from rlhf_recipes.cai.server import Server

        names = ("base_url", "model", "api_key_env", "concurrency", "timeout", "max_attempts")
        given = {name: node[name] for name in names}
        return Server(chat_template_kwargs=template_kwargs(node), role=str(node._key() or ""), **given)
    from rlhf_recipes.cai import local

    return local.load(node, cfg.quantization, adapter)
