"""The numbers that each setting can work with."""

import math
from dataclasses import dataclass

from rlhf_recipes.config import flatten
from rlhf_recipes.errors import Refusal


@dataclass(frozen=True)
class Range:
    """The numbers that a setting can work with; NaN is never one.

    Attributes:
        beside: numbers outside that have a meaning of their own.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    beside: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        inside = (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )
        return number in self.beside or (inside and not math.isnan(number))

    def __str__(self) -> str:
        ends = {name: getattr(self, name) for name in ("at_least", "above", "below", "at_most")}
        said = [
            f"{name.replace('_', ' ')} {end}" for name, end in ends.items() if end not in (None, math.inf, -math.inf)
        ]
        said += ["finite"] if self.below == math.inf else []
        return " and ".join(said) + "".join(f", or {number:g}" for number in self.beside)


COUNT, NATURAL = Range(at_least=1), Range(at_least=0)
POSITIVE, NOT_NEGATIVE = Range(above=0, below=math.inf), Range(at_least=0, below=math.inf)
SHARE, PART = Range(at_least=0, at_most=1), Range(at_least=0, below=1)
SAMPLED, CHANGE = Range(above=0, at_most=1), Range(at_least=-1, at_most=1)  # change: of a share
DISTANCE = Range(at_least=0, at_most=0.5)  # of a probability from 1/2
FINITE = Range(above=-math.inf, below=math.inf)
EXIT_STATUS = Range(at_least=0, at_most=255)  # the shell's: of 256 it would see 0
# Keys whose number cannot work, or does nothing, outside of its range.
RANGES = {
    "trainer.per_device_train_batch_size": COUNT,
    "trainer.per_device_eval_batch_size": COUNT,
    "trainer.gradient_accumulation_steps": COUNT,
    "trainer.precompute_ref_batch_size": COUNT,
    "trainer.max_steps": Range(at_least=1, beside=(-1,)),
    "trainer.num_train_epochs": POSITIVE,
    "trainer.max_length": Range(at_least=2),  # a token of the prompt and one of the answer
    "trainer.max_completion_length": COUNT,
    "trainer.learning_rate": POSITIVE,
    "trainer.weight_decay": NOT_NEGATIVE,
    "trainer.adam_beta1": PART,
    "trainer.adam_beta2": PART,
    "trainer.adam_epsilon": NOT_NEGATIVE,
    "trainer.max_grad_norm": NATURAL,  # 0: none is clipped
    "trainer.warmup_steps": NOT_NEGATIVE,
    "trainer.logging_steps": POSITIVE,
    "trainer.save_steps": POSITIVE,
    "trainer.eval_steps": POSITIVE,
    "trainer.save_total_limit": COUNT,
    "trainer.dataset_num_proc": COUNT,
    "trainer.dataloader_num_workers": NATURAL,
    "trainer.seed": Range(at_least=0, below=2**32),
    "trainer.data_seed": Range(at_least=0, below=2**32),
    "trainer.pad_to_multiple_of": COUNT,
    "trainer.neftune_noise_alpha": POSITIVE,
    "trainer.label_smoothing_factor": PART,
    # Of the losses of pairs and of labelled answers: beta 0 is a constant loss, and one below learns the reverse.
    "trainer.beta": POSITIVE,
    "trainer.label_smoothing": PART,
    "trainer.ld_alpha": SHARE,
    "trainer.discopop_tau": POSITIVE,
    "trainer.cpo_alpha": NOT_NEGATIVE,
    "trainer.desirable_weight": NOT_NEGATIVE,
    "trainer.undesirable_weight": NOT_NEGATIVE,
    "trainer.center_rewards_coefficient": NOT_NEGATIVE,
    # Of PPO.
    "trainer.value_learning_rate": NOT_NEGATIVE,
    "trainer.temperature": POSITIVE,
    "trainer.top_p": SAMPLED,
    "trainer.top_k": NATURAL,
    "trainer.num_ppo_epochs": COUNT,
    "trainer.num_mini_batches": COUNT,
    "trainer.local_rollout_forward_batch_size": COUNT,
    "trainer.cliprange": POSITIVE,
    "trainer.cliprange_value": POSITIVE,
    "trainer.dual_clip": Range(above=1),
    "trainer.gamma": SHARE,
    "trainer.lam": SHARE,
    "trainer.kl_coef": NOT_NEGATIVE,
    "trainer.kl_target": POSITIVE,
    "trainer.kl_horizon": COUNT,
    "trainer.kl_brake": Range(above=0),
    "trainer.entropy_floor": NATURAL,
    "trainer.uwo_coef": NOT_NEGATIVE,
    "trainer.soft_punish_cache": COUNT,
    "trainer.missing_eos_penalty": NOT_NEGATIVE,
    # Of RLOO.
    "trainer.num_generations": Range(at_least=2),  # the others are the baseline
    "trainer.num_iterations": COUNT,
    "trainer.steps_per_generation": COUNT,
    "trainer.generation_batch_size": COUNT,
    "trainer.epsilon": POSITIVE,
    "trainer.epsilon_high": POSITIVE,
    "lora.r": COUNT,
    "lora.lora_alpha": Range(above=0),
    "lora.lora_dropout": PART,
    "lora.rank_pattern.*": COUNT,
    "lora.alpha_pattern.*": Range(above=0),
    "lora.layers_to_transform": NATURAL,
    "data.seed": NATURAL,
    "data.bootstrap": NATURAL,
    "max_prompt_length": COUNT,
    "max_length": Range(at_least=2),
    "max_new_tokens": COUNT,
    "scored_pairs": COUNT,
    "prompts": COUNT,
    "samples": COUNT,
    "ledger_pairs": COUNT,
    "stress_pairs": NATURAL,
    "probe_pairs": NATURAL,
    "credit_pairs": NATURAL,
    "twice": SHARE,
    "swapped": SHARE,
    "port": Range(at_least=0, at_most=65535),
    "top_p": SAMPLED,
    "temperature": NOT_NEGATIVE,
    "seed": NATURAL,
    "sweep.prompts": NATURAL,
    "sweep.max_new_tokens": COUNT,
    "generate.temperature": NOT_NEGATIVE,
    "generate.top_p": SAMPLED,
    "revise.temperature": NOT_NEGATIVE,
    "revise.top_p": SAMPLED,
    "revise.few_shot": NATURAL,
    "generator.concurrency": Range(at_least=1, at_most=1000),
    "generator.timeout": POSITIVE,
    "generator.max_attempts": COUNT,
    "judge.concurrency": Range(at_least=1, at_most=1000),
    "judge.timeout": POSITIVE,
    "judge.max_attempts": COUNT,
    "judging.min_option_mass": SHARE,
    "judging.asked_again": SHARE,
    "judging.tie_margin": DISTANCE,
    "judging.cot_tokens": COUNT,
    "gate.min_parsed": SHARE,
    "gate.min_swap_consistency": SHARE,
    "route.accept_margin": DISTANCE,
    "route.tie_margin": DISTANCE,
    "route.max_spread": NOT_NEGATIVE,
    "filters.min_words": NATURAL,
    "filters.max_words": COUNT,
    "filters.max_length_ratio": Range(at_least=1),
    "lm_eval.batch_size": COUNT,
    "lm_eval.limit": COUNT,
    "lm_eval.num_fewshot": NATURAL,
    "exit_codes.*": EXIT_STATUS,
    # Of a pipeline.
    "rounds": NATURAL,
    "loop.exit_codes.*": EXIT_STATUS,
    "loop.gates.min_win_rate": SHARE,
    "loop.gates.max_kl": NOT_NEGATIVE,
    "loop.gates.min_over_length": CHANGE,
    "loop.gates.max_disputed": SHARE,
    "loop.gates.max_place": SHARE,
    "loop.gates.min_known_change": CHANGE,
}
# Limits of the verdicts of an evaluation and of an audit, by the numbers that each can work with.
THRESHOLDS = {
    NATURAL: "min_prompts",
    SHARE: "min_win_rate min_judge_consistency min_judge_answers max_disputed_wins min_accuracy min_stress_accuracy "
    "max_probe_share min_gold_kept max_length_r2 min_uncertainty_auroc min_uncertainty_lift max_calibration_error "
    "min_disagreement_auroc max_flip_rate max_contradictory max_cyclic_triads max_chosen_longer min_chosen_longer "
    "min_cells_covered max_out_of_distribution",
    CHANGE: "min_accuracy_gain max_repetition_increase max_harmless_refusal_increase max_harmful_refusal_drop "
    "max_eos_drop max_task_drop min_gain_over_baseline min_length_matched_change min_gain_at_80 min_alpha min_kappa",
    NOT_NEGATIVE: "max_kl max_perplexity_ratio max_length_ratio min_length_ratio max_best_of_n_gap max_exposure_gap "
    "min_slope max_slope",
    FINITE: "min_gold_gain",
}
RANGES |= {f"thresholds.{name}": allowed for allowed, names in THRESHOLDS.items() for name in names.split()}
# Where a class, or a recipe without one, takes another range: with lambda 0, ORPO's loss is the likelihood of the
# chosen answers; with beta 0, RLOO has no penalty; an audit picks the best of two answers at least, or of none.
RANGES_OF = {
    target: {"trainer.beta": NOT_NEGATIVE}
    for target in (
        "rlhf_recipes.preference.ORPOConfig",
        "trl.experimental.orpo.ORPOConfig",
        "rlhf_recipes.ppo.RLOOConfig",
    )
} | {"audit": {"samples": Range(at_least=2, beside=(0,))}}


def check(node: dict, target: str | None) -> None:
    """Refuse a number out of its range.

    Args:
        node: the config as plain containers.
        target: the class behind `trainer`, or the recipe that has none.

    Raises:
        Refusal: the first, naming its key as typed.
    """
    ranges = RANGES | RANGES_OF.get(target, {})
    for key, value in flatten(node):
        allowed = ranges.get(key) or ranges.get(key.rpartition(".")[0] + ".*")
        for number in value if isinstance(value, list) else [value]:
            if allowed and type(number) in (int, float) and number not in allowed:
                raise Refusal(f"{key}={value}: must be {allowed}. Change it.")
