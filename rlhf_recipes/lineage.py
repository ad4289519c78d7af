"""What a run, and every run that it continues, was optimised against, and who labelled what it learned from."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rlhf_recipes import run_folder
from rlhf_recipes.errors import Refusal
from rlhf_recipes.references import ModelRef, adapter_in, adapter_sha256, find, home_of, is_adapter, jobs_of, names_in
from rlhf_recipes.run_folder import read_config, read_result


def trained_on(found: ModelRef) -> frozenset[tuple[str | None, str]]:
    """(adapter's hash, `identity` of a reward) for each reward that the run, and every run that it continues, was
    optimised against, or that labelled its pairs.

    What no result says, of a checkpoint among others, is looked up in the run's config, as far as what that names is
    still there.
    """
    pairs = set()
    for node, config in _runs(found):
        rewards = names_in(node.get("rewards"))
        if rewards is None:
            rewards = [_identity(each) for each in rewarding(config)]
        rewards = [*rewards, *map(_identity, _labelling(config))]
        pairs |= {(node["adapter_sha256"], each) for each in rewards}
    return frozenset(pairs)


def labelled_by(found: ModelRef) -> frozenset[tuple[str | None, str]]:
    """(adapter's hash, judge) for each judge of recipes/cai.py that labelled what the run, and every run that it
    continues, was trained on, or what a reward model learned from that it was optimised against; as far as what their
    configs name is still there."""
    pairs = set()
    for node, config in _runs(found):
        configs = [config, *map(_config_beside, filter(adapter_in, rewarding(config)))]
        pairs |= {(node["adapter_sha256"], judge) for judge in filter(None, map(_judge_of, configs))}
    return frozenset(pairs)


def rewarding(config: dict) -> list[str]:
    """What `reward_funcs` of a run's config names, each member of an ensemble; without what weighs nothing."""
    given, trainer = config.get("reward_funcs"), config.get("trainer")
    given = [given] if isinstance(given, str) else names_in(given) or []
    named = [str(member) for each in given for member in jobs_of(each) or [each]]
    weights = (trainer.get("reward_weights") if isinstance(trainer, dict) else None) or [1.0] * len(named)
    return [each for each, weight in zip(named, weights, strict=False) if weight]


def _runs(found: ModelRef) -> Iterator[tuple[dict, dict]]:
    """What is known of a run, and of every run that it continues, with the config of each."""
    node, seen = {**found.lineage, "rewards": found.rewards}, set()
    while node and node.get("run") not in seen:
        seen.add(node.get("run"))
        config = _config_beside(node.get("run"))
        yield node, config
        start = config["model"].get("adapter") if isinstance(config.get("model"), dict) else None
        node = node["parent"] or (find(start, "model.adapter").lineage if start and is_adapter(start) else None)


def _judge_of(config: dict) -> str | None:
    """The judge that labelled the pairs of a run of recipes/cai.py, where those are the data of the config."""
    made, _ = _labels(config)
    return made.get("judge") if made.get("labelled_by") == "judge" else None


def _labelling(config: dict) -> list[str]:
    """The reward models that labelled the pairs of a run of recipes/cai.py, where those are the data of the config."""
    made, judge = _labels(config)
    if made.get("labelled_by") != "judge" or judge.get("kind") != "reward":
        return []
    given = judge.get("reward_model")
    return [
        str(member)
        for each in ([given] if isinstance(given, str) else names_in(given) or [])
        for member in jobs_of(each) or [each]
    ]


def _labels(config: dict) -> tuple[dict, dict]:
    """Result, and judge of the config, of the folder that is the data of a config; empty where it is no run."""
    data = config.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    with suppress(Refusal):  # a folder of the user's own may have a file of that name
        made = read_result(Path(path)) if isinstance(path, str) else None
        if made:
            judge = _config_beside(path).get("judge")
            return made, judge if isinstance(judge, dict) else {}
    return {}, {}


def _config_beside(reference: str | None) -> dict:
    """Config of the run that an adapter, or a checkpoint, lies in; empty where there is none."""
    if reference is None:
        return {}
    home = home_of(reference)
    return read_config(home) if (home / run_folder.CONFIG).is_file() else {}


def _identity(reference: str) -> str:
    """`ModelRef.identity` of what `reward_funcs` names, without loading anything."""
    adapter = adapter_in(reference)
    return (adapter and adapter_sha256(adapter)) or reference
