"""What was measured of several systems, from which `summary` makes an evaluation."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Measurements:
    """Log-probabilities are sums in nats, KL is nats per answer; rows of all systems are of the same prompts.

    Attributes:
        parent: the system that the others are held against.
        systems: names, the parent among them.
        info: name -> `recipe`, `path`, `method_reward`, of a checkpoint `step`, and `optimised`, the names of those
            reward models that score and that it was trained on.
        pairs: a row for each held-out pair: its labels, and in `systems` the log-probabilities by each.
        answers: a row for each prompt: its labels, and in `systems` the answer of each.
        judgements: name -> what a judge said of its answers against the parent's.
        reward_models: name -> its scores of the pairs.
        neutral: name -> (negative log-likelihood, tokens) of each neutral paragraph.
        tasks: lm-eval task -> `metric`, `ids` of its examples, and the `values` of each system.
        settings: under which all of it was measured.
        fingerprint: in a sweep's measurements.json, of the adapter, the parent and the settings.
    """

    parent: str
    systems: list[str]
    info: dict[str, dict] = field(default_factory=dict)
    pairs: list[dict] = field(default_factory=list)
    answers: list[dict] = field(default_factory=list)
    judgements: dict[str, list[dict]] = field(default_factory=dict)
    reward_models: dict[str, list[dict]] = field(default_factory=dict)
    neutral: dict[str, list] = field(default_factory=dict)
    tasks: dict[str, dict] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
