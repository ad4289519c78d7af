"""The models of conf/cai.yaml: local, or behind an endpoint."""

from omegaconf import DictConfig

from rlhf_recipes import references
from rlhf_recipes.cai.backend import Backend
from rlhf_recipes.models import template_kwargs
from rlhf_recipes.references import ModelRef


def find_judge_adapter(judge: DictConfig) -> ModelRef | None:
    """What `judge.adapter` of a local judge names.

    Raises:
        Refusal: there is none, or it was trained on another base model.
    """
    if judge.kind != "local" or not judge.adapter:
        return None
    return references.find(judge.adapter, "judge.adapter", judge.id, judge.adapter_base)


def load(cfg: DictConfig, parent: ModelRef | None, judge_adapter: ModelRef | None) -> tuple[Backend, Backend | None]:
    """Generator and judge of conf/cai.yaml, None for people; one model in memory where both are the same.

    Args:
        parent: what `model.adapter` names, of a local generator.
        judge_adapter: of `find_judge_adapter`.

    Raises:
        Refusal: a model or an endpoint's key cannot be found.
    """
    generator = load_one(cfg.model if cfg.generator.kind == "local" else cfg.generator, cfg, parent)
    if cfg.judge.kind == "people":
        return generator, None
    same = cfg.generator.kind == cfg.judge.kind == "local" and all(cfg.judge.get(k) == v for k, v in cfg.model.items())
    return generator, generator if same else load_one(cfg.judge, cfg, judge_adapter)


def load_one(node: DictConfig, cfg: DictConfig, adapter: ModelRef | None) -> Backend:
    if node.get("kind") == "server":
        from rlhf_recipes.cai.server import Server

        names = ("base_url", "model", "api_key_env", "concurrency", "timeout", "max_attempts")
        given = {name: node[name] for name in names}
        return Server(chat_template_kwargs=template_kwargs(node), role=str(node._key() or ""), **given)
    from rlhf_recipes.cai import local

    return local.load(node, cfg.quantization, adapter)
