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
        rewards = [*rewarding(config), *_labelling(config)]
        configs = [config, *map(_config_beside, filter(adapter_in, rewards))]
        pairs |= {(node["adapter_sha256"], judge) for each in configs for judge in _judges_of(each)}
    return frozenset(pairs)


def rewarding(config: dict) -> list[str]:
    """What `reward_funcs` of a run's config names, each member of an ensemble; without what weighs nothing."""
    given, trainer = config.get("reward_funcs"), config.get("trainer")
    given = [given] if isinstance(given, str) else names_in(given) or []
    named = [str(member) for each in given for member in jobs_of(each) or [each]]
    weights = (trainer.get("reward_weights") if isinstance(trainer, dict) else None) or [1.0] * len(named)
    return [each for each, weight in zip(named, weights, strict=False) if weight]


def scoring(judge: dict) -> list[str]:
    """What `judge.reward_model` names, each member of an ensemble."""
    given = judge.get("reward_model")
    given = [given] if isinstance(given, str) else names_in(given) or []
    return [str(member) for each in given for member in jobs_of(each) or [each]]


def _runs(found: ModelRef) -> Iterator[tuple[dict, dict]]:
    """What is known of a run, and of every run that it continues, with the config of each."""
    node, seen = {**found.lineage, "rewards": found.rewards}, set()
    while node and node.get("run") not in seen:
        seen.add(node.get("run"))
        config = _config_beside(node.get("run"))
        yield node, config
        start = config["model"].get("adapter") if isinstance(config.get("model"), dict) else None
        node = node["parent"] or (find(start, "model.adapter").lineage if start and is_adapter(start) else None)


def _judges_of(config: dict) -> list[str]:
    """The judges that labelled the pairs of runs of recipes/cai.py, where those are the data of the config."""
    return [made["judge"] for made, _ in _labels(config) if made.get("judge")]


def _labelling(config: dict) -> list[str]:
    """The reward models that labelled the pairs of runs of recipes/cai.py, where those are the data of the config."""
    judges = [own.get("judge") for _, own in _labels(config)]
    rewards = [judge for judge in judges if isinstance(judge, dict) and judge.get("kind") == "reward"]
    return [name for judge in rewards for name in scoring(judge)]


def _labels(config: dict) -> list[tuple[dict, dict]]:
    """(result, config) of the run of recipes/cai.py that is the data of a config, and of each whose own pairs it has
    taken over (`earlier`): of those that a judge has labelled."""
    data = config.get("data")
    made = _made(data.get("path") if isinstance(data, dict) else None)
    runs = [made, *map(_made, names_in(made[1].get("earlier")) or [])]
    return [(result, own) for result, own in runs if result.get("labelled_by") == "judge"]


def _made(folder: str | None) -> tuple[dict, dict]:
    """Result and config of a run's folder; empty where it is none."""
    with suppress(Refusal):  # a folder of the user's own may have a file of that name
        if isinstance(folder, str) and (result := read_result(Path(folder))):
            return result, _config_beside(folder)
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
