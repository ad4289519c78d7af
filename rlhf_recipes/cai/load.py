"""The models of conf/cai.yaml: local, or behind an endpoint."""

from omegaconf import DictConfig

from rlhf_recipes.cai.backend import Backend


def load(cfg: DictConfig) -> tuple[Backend, Backend]:
    """Generator and judge of conf/cai.yaml; one model in memory where both are the same.

    Raises:
        Refusal: a model or an endpoint's key cannot be found.
    """
    generator = load_one(cfg.model if cfg.generator.kind == "local" else cfg.generator, cfg)
    same = cfg.generator.kind == cfg.judge.kind == "local" and all(cfg.judge[k] == v for k, v in cfg.model.items())
    return generator, generator if same else load_one(cfg.judge, cfg)


def load_one(node: DictConfig, cfg: DictConfig) -> Backend:
    if node.get("kind") == "server":
        from rlhf_recipes.cai.server import Server

        names = ("base_url", "model", "api_key_env", "concurrency", "timeout", "max_attempts")
        return Server(**{name: node[name] for name in names})
    from rlhf_recipes.cai import local

    return local.load(node, cfg.quantization)
