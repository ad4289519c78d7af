"""The doctor: each rule on a history that it must see and on a near miss, and what a run does with the findings."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from rlhf_recipes import config
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.launch import keys as launch_keys
from rlhf_recipes.methods import METHODS
from rlhf_recipes.stats import Estimate
from rlhf_recipes.training import doctor, doctor_plot, doctor_rules
from rlhf_recipes.training.doctor_record import Finding, Record, points

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import doctor_runs

STEPS = 24


def arguments(**changed):
    """As the trainers have them."""
    return SimpleNamespace(
        **{
            "beta": 0.1,
            "learning_rate": 1e-4,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "simpo_gamma": 1.0,
            "kl_target": 6.0,
            "kl_coef": 0.05,
            "steps_per_rollout": 2,
            "prompts_per_rollout": 8,
            "max_completion_length": 32,
            "fp16": False,
            **changed,
        }
    )


def rows(steps=STEPS, every=1, **series):
    """Log rows: a number for each key, or a function of the share of the run that is done, 0 to 1."""
    found = []
    for step in range(every, steps + 1, every):
        # A wobble that no trend explains: real batches differ.
        wobble = 0.01 * math.sin(7.0 * step)
        values = {key: value((step - 1) / (steps - 1)) + wobble if callable(value) else value for key, value in
                  series.items()}  # fmt: skip
        found.append({"loss": 0.5, "grad_norm": 1.0, "step": step, "dead_gradients": 0.0, **values})
    return found


def estimate(value, half=0.05, n=54):
    return Estimate(value, value - half, value + half, n, n)


HELD_OUT = {
    "preference_accuracy": (0.5, 0.8),
    "accuracy_change": (0.0, 0.3),
    "length_bias": (0.0, 0.1),
    "reward_margin": (0.0, 2.0),
    "chosen_logp_change": (0.0, -1.0),
    "chosen_logp_change_per_token": (0.0, -0.02),
    "rejected_logp_change_per_token": (0.0, -0.2),
    "baseline_shorter_wins": (0.4, 0.4),
}
OF_LABELS = {
    "auroc": (0.5, 0.8),
    "auroc_change": (0.0, 0.3),
    "reward_margin": (0.0, 2.0),
    "chosen_logp_change_per_token": (0.0, -0.02),
    "rejected_logp_change_per_token": (0.0, -0.2),
    "baseline_length": (0.4, 0.4),
}
OF_ANSWERS = {
    "reward": (0.2, 0.5),
    "reward_change": (0.0, 0.3),
    "kl": (0.0, 5.0),
    "completion_tokens": (30.0, 31.0),
    "eos_rate": (0.5, 0.5),
}


def record(recipe="dpo", log=None, args=None, facts=None, stopped=None, held_out=True, half=0.05, **changed):
    """A healthy run, and what `changed` says of its held-out metrics: name=(before, after), or after=estimate."""
    of_recipe = {"ppo": OF_ANSWERS, "rloo": OF_ANSWERS, "kto": OF_LABELS, "sft": {"perplexity": (50.0, 20.0)}}.get(
        recipe, HELD_OUT
    )
    both = {**of_recipe, **changed} if held_out else {}
    healthy = {
        "dpo": {"rewards/chosen": lambda t: 0.2 * t, "rewards/margins": lambda t: t, "entropy": 3.0,
                "rewards/accuracies": lambda t: 0.5 + 0.4 * t},
        "ppo": {"reward": lambda t: t, "reward_std": 0.2, "kl": lambda t: 5 * t, "kl_k3": lambda t: 5 * t,
                "entropy": 3.0, "completions/mean_length": 30.0, "completions/eos_rate": 0.5,
                "completions/distinct_2": 0.95},
        "rloo": {"reward": lambda t: t, "reward_std": 0.2, "kl": lambda t: 5 * t, "entropy": 3.0,
                 "completions/mean_length": 30.0, "completions/eos_rate": 0.5, "completions/distinct_2": 0.95},
        "reward": {"accuracy": lambda t: 0.5 + 0.4 * t, "margin": lambda t: t},
        "sft": {"entropy": lambda t: 3 - 2.5 * t},
        "kto": {"rewards/chosen": lambda t: 0.2 * t, "rewards/margins": lambda t: t, "kl": 0.1, "entropy": 3.0},
    }.get(recipe, {"logps/chosen": -2.0, "rewards/margins": lambda t: t, "rewards/accuracies": 0.8})  # fmt: skip
    log = rows(**{**healthy, **(log or {})}) if not isinstance(log, list) else log
    sides = [{key: pair[side] if isinstance(pair[side], Estimate) else estimate(pair[side], half if side else 0.0)
              for key, pair in both.items()} for side in (0, 1)]  # fmt: skip
    facts = facts or {"reply_tokens": 40.0, "ends_with_eos": 1.0}
    return Record(recipe, log, args or arguments(), STEPS, facts, *sides, stopped)


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("held_out", [True, False])
def test_a_good_run_is_healthy(recipe, held_out):
    report = doctor.examine(record(recipe, held_out=held_out))
    assert (report["verdict"], report["findings"]) == ("healthy", [])


def drop(at):
    """Rewards of DPO whose chosen replies lose `at` nats a token, by the end: beta 0.1, 40 tokens."""
    return {"rewards/chosen": lambda t: -0.1 * 40 * at * min(1.0, 1.5 * t), "rewards/margins": lambda t: t}


def fallen(**series):
    """PPO of 24 rollouts, whose figures stay as they are where the series end."""
    log = record("ppo", log={key: values[-1] for key, values in series.items()}).rows
    for key, values in series.items():
        for row, value in zip(log, values, strict=False):
            row[key] = value
    return record("ppo", log, arguments(steps_per_rollout=1), held_out=False)


def still(recipe):
    return record(recipe, log={"rewards/margins": 0.0})


def gone(row):
    """Without what TRL leaves out where no micro-batch had both labels."""
    return {key: value for key, value in row.items() if key not in ("rewards/chosen", "rewards/margins")}


def left_out(steps):
    """A log in which those steps are left out, their gradient being NaN."""
    return [
        {
            **row,
            "grad_norm": math.nan if row["step"] in steps else 1.0,
            "steps_left_out": sum(step <= row["step"] for step in steps),
        }
        for row in record().rows
    ]


def unmoved(recipe, **changed):
    """Weights before and after are the same."""
    return record(recipe, **{key: (estimate(0.5),) * 2 for key in (OF_ANSWERS if recipe == "ppo" else HELD_OUT)},
                  **changed)  # fmt: skip


def far(recipe="dpo", **args):
    """Margins that grow to 30."""
    return record(recipe, log={"rewards/margins": lambda t: 30 * t}, args=arguments(**args))


NO_TARGET = arguments()  # as TRL's RLOO has none
del NO_TARGET.kl_target
STOPPED_KL = "KL 31.0 nats, over 5 times kl_target=6 at step 12"
OTHER_FACTS = {"reply_tokens": 40.0}
ANCHORED = {"reply_tokens": 40.0, "ends_with_eos": 1.0, "anchored": True}
NOISE = {"rewards/accuracies": 0.5}
# rule, level, a run that it must see, near misses
CASES = {
    "a gradient that is nan": (
        "not_finite", "broken", record(log={"grad_norm": math.nan}),
        [record(log=[*record().rows[:-1], {**record().rows[-1], "grad_norm": math.inf}], args=arguments(fp16=True))],
    ),
    # as with trainer.logging_nan_inf_filter=false
    "a loss that is nan": ("not_finite", "broken", record(log={"loss": math.nan}), []),
    "a gradient that is nan in each second step": ("not_finite", "broken", record(log=left_out(range(2, 24, 2))), []),
    "a gradient that is nan for good, its steps left out": (
        "not_finite", "broken", record(log=left_out(range(21, 25))),
        [record(log=left_out([]))],
    ),
    "steps that are left out": ("not_finite", "watch", record(log=left_out([7, 23, 24])), []),
    "the trainer's brake for gradients": (
        "not_finite", "broken", record("ppo", stopped="the gradient is not finite at step 3"),
        [record("ppo", stopped="KL 6.20 nats reached kl_target=6 at step 12")],
    ),
    "what the doctor itself stopped for": (
        "dead_gradients", "broken", record(log={"dead_gradients": 0.71}, stopped="doctor: dead gradients at step 4"),
        [record("ppo", log={"dead_gradients": 0.71}, stopped=STOPPED_KL)],
    ),
    "some tensors without gradients": (
        "dead_gradients", "broken", record(log={"dead_gradients": 0.71}),
        # a step whose batch missed a layer
        [record(log=[{**row, "dead_gradients": 0.0 if row["step"] % 2 else 0.5} for row in record().rows])],
    ),
    "some without gradients in the first step": (
        "dead_gradients", "broken",
        record(log=[{**row, "dead_gradients": 0.71 if row["step"] == 1 else 0.0} for row in record().rows]),
        [record(log=[{**row, "dead_gradients": 0.2 if row["step"] == 1 else 0.0} for row in record().rows])],
    ),
    "no gradient in the first rollout, whose rewards differ": (
        "dead_gradients", "broken",
        record("ppo", log=[{**row, "dead_gradients": float(row["step"] == 1)} for row in record("ppo").rows]),
        # Completions that score alike have no advantage: TRL counts the groups of RLOO of which that is so.
        [record(recipe, log=[{**row, **alike, "grad_norm": 0.0, "dead_gradients": 1.0} if row["step"] in steps else row
                             for row in record(recipe).rows])
         for recipe, alike in (("ppo", {"reward_std": 0.0}), ("rloo", {"frac_reward_zero_std": 1.0}))
         for steps in ((1,), (21, 22, 23, 24))],
    ),
    "few tensors without gradients": ("dead_gradients", "watch", record(log={"dead_gradients": 0.02}), []),
    "no gradient at all": (
        "dead_gradients", "broken", record(log={"grad_norm": 0.0}),
        [record(log=[{**row, "grad_norm": 0.0} if row["step"] % 4 else row for row in record().rows]),
         record(log=[{**row, "grad_norm": 0.0, "dead_gradients": 1.0, "rewards/margins": 200.0} if row["step"] > 3
                     else row for row in record().rows])],  # reward saturation
    ),
    "nothing moved": (
        "dead_gradients", "broken",
        unmoved("dpo"),
        [record(accuracy_change=(0.0, 0.0)), unmoved("ppo", log={"reward_std": 0.0}),
         # the weights before the first step are kept
         unmoved("dpo", stopped="doctor: not finite at step 1"),
         unmoved("dpo", log={"grad_norm": math.nan, "steps_left_out": STEPS}),
         unmoved("ppo", stopped="entropy 1.0000 nats per token, under entropy_floor=2 at step 0")],
    ),
    "another reference": (
        "wrong_reference", "broken",
        record(log={"rewards/chosen": 0.9, "rewards/margins": 0.5}),
        [record(log={"rewards/chosen": 0.02}),
         record(log=[row for row in record(log={"rewards/chosen": 0.9}).rows if row["step"] > 1])],
    ),
    "another reference of PPO": (
        "wrong_reference", "broken", record("ppo", log={"kl_k3": 0.5}), [record("ppo", log={"kl_k3": 0.2})]
    ),
    "right at once": (
        "wrong_reference", "broken",
        record(log={"rewards/accuracies": 1.0, "rewards/chosen": 0.0}, args=arguments(per_device_train_batch_size=8)),
        [record(log={"rewards/accuracies": 1.0, "rewards/chosen": 0.0}),  # four pairs by luck
         record(log={"rewards/accuracies": 0.9, "rewards/chosen": 0.0},
                args=arguments(per_device_train_batch_size=8))],
    ),
    "its own reference": (
        "wrong_reference", "broken", record(log={"rewards/margins": 0.0}),
        [record(log=[row for row in record(log={"rewards/margins": 0.0}).rows if row["step"] <= 3]),
         record(log=[{**row, "rewards/margins": math.nan if row["step"] > 1 else 0.0} for row in still("dpo").rows])],
    ),
    "displacement in the log": (
        "likelihood_displacement", "watch", record(log=drop(0.3), held_out=False),
        [record(log=drop(0.14), held_out=False), record(log=drop(0.3))],  # held-out pairs know better
    ),
    "far displacement in the log": (
        "likelihood_displacement", "broken", record(log=drop(1.0), held_out=False), []
    ),
    "displacement of a policy that starts elsewhere than its reference": (
        "likelihood_displacement", "watch",
        record(log={"rewards/chosen": lambda t: -4 - 1.2 * min(1.0, 1.5 * t)}, held_out=False, facts=ANCHORED),
        [record(log={"rewards/chosen": -4.0}, held_out=False, facts=ANCHORED)],
    ),
    "displacement with TRL's losses of sums": (
        "likelihood_displacement", "watch",
        record("simpo", {"logps/chosen": lambda t: -80 - 12 * t}, arguments(loss_type="hinge"), held_out=False),
        [record("simpo", {"logps/chosen": lambda t: -80 - 4 * t}, arguments(loss_type="hinge"), held_out=False)],
    ),
    "displacement of SimPO in the log": (
        "likelihood_displacement", "watch",
        record("simpo", log={"logps/chosen": lambda t: -2 - 0.5 * t}, held_out=False),
        [record("simpo", log={"logps/chosen": lambda t: -2 - 0.15 * t}, held_out=False),
         record("simpo", log={"logps/chosen": lambda t: -2 + 0.5 * math.sin(40 * t)}, held_out=False)],
    ),
    "displacement held out": (
        "likelihood_displacement", "watch", record(chosen_logp_change_per_token=(0.0, -0.2)),
        [record(chosen_logp_change_per_token=(0.0, -0.18)), record(chosen_logp_change_per_token=(0.0, 0.2))],
    ),
    "far displacement held out": (
        "likelihood_displacement", "broken", record("orpo", chosen_logp_change_per_token=(0.0, -0.8)), []
    ),
    "longer passes for better": (
        "length_drift", "watch", record(length_bias=(0.0, 0.3)),
        [record(length_bias=(0.0, 0.24)), record(length_bias=(0.4, 0.3)), record(length_bias=(0.0, -0.24))],
    ),
    "shorter passes for better": ("length_drift", "watch", record("reward", length_bias=(0.1, -0.5)), []),
    "length tells the labels": (
        "length_drift", "watch", record(baseline_shorter_wins=(0.1, 0.1)), [record(baseline_shorter_wins=(0.25, 0.25))]
    ),
    "longer completions": (
        "length_drift", "watch", record("ppo", completion_tokens=(20.0, 31.0)),
        [record("ppo", completion_tokens=(21.0, 31.0))],
    ),
    "longer completions in the log": (
        "length_drift", "watch",
        record("ppo", log=rows(48, **{"completions/mean_length": lambda t: 10 + 15 * t}), held_out=False),
        [record("ppo", log=rows(48, **{"completions/mean_length": lambda t: 20 + 10 * t}), held_out=False)],
    ),
    "kl of the last rollouts": (
        "kl_runaway", "watch", record("ppo", log={"kl": 13.0, "kl_k3": 0.0}, held_out=False),
        [record("ppo", log={"kl": lambda t: 26.0 * (t > 0.95), "kl_k3": 0.0}, held_out=False)],
    ),
    "kl of rloo": (
        "kl_runaway", "watch", record("rloo", {"kl": lambda t: 21.0 * (t > 0)}, NO_TARGET, held_out=False),
        [record("rloo", {"kl": lambda t: 19.0 * (t > 0)}, NO_TARGET, held_out=False)],
    ),
    "kl held out": ("kl_runaway", "broken", record("ppo", kl=(0.0, 31.0)), [record("ppo", kl=(0.0, 11.9))]),
    "the trainer's brake for the KL": (
        "kl_runaway", "broken", record("ppo", stopped=STOPPED_KL),
        [record("ppo", stopped="KL 6.20 nats reached kl_target=6 at step 12")],
    ),
    "less entropy": (
        "collapse", "watch", record(log={"entropy": lambda t: 3 - 2 * min(1, 2 * t)}),
        [record(log={"entropy": lambda t: 3 - t})],
    ),
    "no entropy": ("collapse", "broken", record(log={"entropy": lambda t: 3 * (t < 0.5)}), []),
    "no entropy after four rows": (
        "collapse", "broken", record(log=rows(steps=8, entropy=lambda t: 3 * (t < 0.5))),
        [record(log=rows(steps=7, entropy=lambda t: 3 * (t < 0.5)))],
    ),
    "no entropy from within the first quarter on": (
        "collapse", "broken", fallen(entropy=[3.05, 2.97, 2.74, 0.68, 0.32, 0.11]),
        # the first of rows that differ as much may be high by luck
        [fallen(entropy=[3.05, 1.6]), fallen(entropy=[4.0, 0.8] * 9 + [1.5])],
    ),
    "one length from within the first quarter on": (
        "length_drift", "watch", fallen(**{"completions/mean_length": [12.0, 9.0, 4.0, 2.0, 3.0]}),
        [fallen(**{"completions/mean_length": [12.0, 11.0, 9.0, 7.0]})],
    ),
    "equal rewards after a start of equal rewards": (
        "reward_saturation", "watch", fallen(reward_std=[0.0, 0.0, 0.0, 0.52, 0.53, 0.7, 0.74, 0.0]),
        [fallen(reward_std=[0.0, 0.0, 0.0, 0.52, 0.53, 0.7, 0.74, 0.01])],
    ),
    "repetition": (
        "collapse", "broken",
        record("ppo", log=rows(48, **{"completions/distinct_2": lambda t: 0.95 - 0.94 * min(1, 2 * t)})),
        [record("ppo", log=rows(48, **{"completions/distinct_2": lambda t: 0.95 - 0.3 * t}))],
    ),
    "the trainer's brake for the entropy": (
        "collapse", "broken", record("ppo", stopped="entropy 0.0040 nats per token, under entropy_floor=0.01"), []
    ),
    "margins without end": (
        "reward_saturation", "watch", record("reward", log={"margin": lambda t: 30 * t}),
        [record("reward", log={"margin": lambda t: 7 * t}),
         record("simpo", log={"rewards/margins": lambda t: 8.5 * t})],  # gamma is 1
    ),
    "margins without end, of a loss that is flat there": (
        "reward_saturation", "watch", far(loss_type=["sigmoid"]),
        [far(loss_type=["sigmoid_norm"]), far(loss_type=["sigmoid", "ipo"]), far(loss_type=["sigmoid", "sft"]),
         far(loss_type=["robust"], label_smoothing=0.1), far(f_divergence_type="forward_kl"),
         far("simpo", loss_type="simpo", cpo_alpha=0.1)],
    ),
    "margins without end, of good and bad answers": (
        "reward_saturation", "watch", record("kto", log={"rewards/margins": lambda t: 30 * t}),
        [record("kto", log={"rewards/margins": lambda t: 14 * t})],
    ),
    "answers labelled the other way round": (
        "reward_against_preference", "broken", record("kto", auroc_change=(0.0, -0.2)),
        [record("kto", auroc_change=(0.0, -0.04))],
    ),
    "few labelled answers": (
        "too_little_data", "watch", record("kto", auroc_change=(0.0, 0.04)), [record("kto")],
    ),
    "good answers that lose likelihood": (
        "likelihood_displacement", "watch", record("kto", log=drop(0.3), held_out=False),
        [record("kto", log=drop(0.14), held_out=False)],
    ),
    "a policy that is its own reference, in windows of one label": (
        "wrong_reference", "broken",
        record("kto", log=[gone(row) if row["step"] % 3 else row for row in still("kto").rows]),
        [record("kto", log=[gone(row) for row in record("kto").rows])],
    ),
    "rewards all alike": (
        "reward_saturation", "broken", record("ppo", log={"reward_std": 0.0}),
        [record("ppo", log=[{**row, "reward_std": 0.2 * (row["step"] % 8 == 1)} for row in record("ppo").rows])],
    ),
    "rewards ever more alike": (
        "reward_saturation", "watch", record("ppo", log=rows(48, reward_std=lambda t: 0.5 * (t < 0.6) + 0.02)),
        [record("ppo", log=rows(48, reward_std=lambda t: 0.5 - 0.4 * t))],
    ),
    "worse pairs": (
        "reward_against_preference", "broken", record(accuracy_change=(0.0, -0.1)),
        [record(accuracy_change=(0.0, -0.04))],
    ),
    "worse answers": ("reward_against_preference", "broken", record("ppo", reward_change=(0.0, -0.2)), []),
    "by heart": (
        "over_fitting", "watch",
        record("reward", log={"accuracy": lambda t: 0.7 + 0.3 * min(1, 2 * t) - 0.01}, accuracy_change=(0.0, 0.02),
               args=arguments(per_device_train_batch_size=8)),
        [record("reward", log={"accuracy": 1.0}, args=arguments(per_device_train_batch_size=8)),  # and held out too
         record("reward", log={"accuracy": 1.0}, accuracy_change=(0.0, 0.02),
                args=arguments(gradient_accumulation_steps=1)),  # of 12 pairs
         record("reward", log={"accuracy": 0.95}, accuracy_change=(0.0, 0.02),
                args=arguments(per_device_train_batch_size=8))],
    ),
    "worse perplexity": (
        "over_fitting", "broken", record("sft", perplexity=(50.0, 51.0)), [record("sft", perplexity=(50.0, 49.0))]
    ),
    "labels at random": (
        "label_noise", "watch", record(log=NOISE),
        [record(log={"rewards/accuracies": 0.6}), record(log=NOISE, held_out=False),
         record(log=NOISE, chosen_logp_change_per_token=(0.0, 0.01), rejected_logp_change_per_token=(0.0, -0.01)),
         record(log=NOISE, args=arguments(gradient_accumulation_steps=1))],  # 36 pairs
    ),
    "labels at random for a reward model": (
        "label_noise", "watch",
        record("reward", log={"accuracy": 0.5}, reward_margin=(estimate(0.0, 0.02), estimate(0.0, 0.2))),
        [record("reward", log={"accuracy": 0.5}, reward_margin=(estimate(0.0, 0.02), estimate(0.0, 0.025)))],
    ),
    "replies cut off": (
        "no_eos", "broken", record(facts={**OTHER_FACTS, "ends_with_eos": 0.0}),
        [record(facts={**OTHER_FACTS, "ends_with_eos": 0.3}), record(facts=OTHER_FACTS)],
    ),
    "most replies cut off": ("no_eos", "watch", record("sft", facts={**OTHER_FACTS, "ends_with_eos": 0.2}), []),
    "unlearned to end": (
        "no_eos", "broken", record("ppo", eos_rate=(estimate(0.5, 0.1), estimate(0.02, 0.02))),
        [record("ppo", eos_rate=(estimate(0.07, 0.06), estimate(0.0, 0.03)))],
    ),
    "never an end": (
        "no_eos", "watch", record("ppo", log={"completions/eos_rate": 0.0}, held_out=False),
        [record("ppo", log=[{**row, "completions/eos_rate": 0.01 * (row["step"] == 17)} for row in record("ppo").rows],
                held_out=False),
         record("ppo", log={"completions/eos_rate": 0.0}, held_out=False, args=arguments(prompts_per_rollout=4))],
    ),
    "no effect on pairs": (
        "too_little_data", "watch", record(accuracy_change=(0.0, 0.04)), [record(accuracy_change=(0.0, 0.06))]
    ),
    "no effect on answers": (
        "too_little_data", "watch", record("ppo", reward_change=(0.0, -0.04)),
        [record("ppo", reward_change=(0.0, 0.1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rule_sees_it_and_not_the_near_miss(case):
    name, level, sick, near = CASES[case]
    found = [finding for finding in doctor.examine(sick)["findings"] if finding["rule"] == name]
    assert [finding["level"] for finding in found] == [level]
    said = doctor.line(found[0])
    assert "\n" not in said and all(found[0][key] for key in ("saw", "means", "change"))
    for number, miss in enumerate(near):
        seen = {finding["rule"]: finding["saw"] for finding in doctor.examine(miss)["findings"]}
        assert name not in seen, (number, seen)


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in doctor_rules.RULES} == {case[0] for case in CASES.values()}


def test_rows_that_change_alike_have_no_interval():
    alike = record(accuracy_change=(estimate(0.0, 0.0), estimate(0.5, 0.0, n=2)))
    (found,) = doctor.examine(alike)["findings"]
    assert found["means"] == "2 rows are too few for an interval"


def test_the_worst_decides_and_comes_first():
    report = doctor.examine(record(accuracy_change=(0.0, 0.0), chosen_logp_change_per_token=(0.0, -0.9)))
    assert report["verdict"] == "broken"
    assert [finding["level"] for finding in report["findings"]] == ["broken", "watch"]
    assert doctor.examine(record(log=[]))["verdict"] == "healthy"
    json.dumps(report, allow_nan=False)


def test_no_rule_reads_the_loss_of_another_beta():
    """The loss says nothing between betas: whatever its level, the findings are the same."""
    sick = record(accuracy_change=(0.0, 0.0))
    for loss in (0.01, 0.69, 30.0):
        log = [{**row, "loss": loss} for row in sick.rows]
        assert doctor.examine(record(log=log, accuracy_change=(0.0, 0.0))) == doctor.examine(sick)


@pytest.mark.parametrize(
    ("recipe", "enough", "rules"),
    [("dpo", 8, ["collapse", "reward_saturation"]), ("reward", 8, ["reward_saturation"]),
     ("ppo", 16, ["collapse", "reward_saturation"]), ("sft", 8, [])],
)  # fmt: skip
def test_what_a_short_log_cannot_tell_is_said(recipe, enough, rules):
    """PPO's steps are two a rollout."""
    whole = record(recipe).rows
    log = [{**whole[min(i, len(whole) - 1)], "step": i + 1} for i in range(enough)]
    assert doctor.examine(record(recipe, log=log))["unasked"] == {}
    short = doctor.examine(record(recipe, log=log[:-2]))
    assert list(short["unasked"]) == rules
    said = "not asked: {}, for which 8 rows of the log or rollouts are needed"
    names = " and ".join(rule.replace("_", " ") for rule in rules)
    assert doctor.said(short) == ["healthy", *([said.format(names)] if rules else [])]


def test_what_a_log_never_tells_is_said():
    """TRL's KTOTrainer logs no accuracy, its RLOOTrainer no KL with a beta of 0; `sigmoid_norm` has another margin
    than it logs."""
    assert doctor.said(doctor.examine(record("kto", log=record("kto").rows[:6]))) == [
        "healthy",
        "not asked: collapse and reward saturation, for which 8 rows of the log or rollouts are needed; over fitting "
        "and label noise, for which the log has no rewards/accuracies",
    ]
    other = doctor.examine(record(args=arguments(loss_type=["sigmoid_norm"])))
    assert doctor.said(other) == ["healthy", "not asked: reward saturation, which has no limit with this loss"]
    assert doctor.examine(record("orpo", log={"entropy": 3.0}))["unasked"] == {}, "it never saturates"
    alone = record("rloo", args=NO_TARGET, held_out=False)
    for row in alone.rows:
        del row["kl"]
    assert doctor.examine(alone)["unasked"] == {"kl_runaway": "for which the log has no kl"}
    alone.before, alone.after = {"kl": estimate(0.0)}, {"kl": estimate(1.0)}
    assert doctor.examine(alone)["unasked"] == {}


def test_a_rule_that_has_found_something_was_asked():
    alike = rows(steps=6, **{"reward": 0.5, "reward_std": 0.0, "entropy": 3.0, "kl": 0.0})
    report = doctor.examine(record("ppo", log=alike, args=arguments(steps_per_rollout=1)))
    assert report["findings"][0]["rule"] == "reward_saturation" and list(report["unasked"]) == ["collapse"]


def test_rollouts_count_once():
    log = [{"loss": 0.0, "step": step, "kl": float((step - 1) // 2)} for step in range(1, 9)]
    assert points(record("ppo", log=log), "kl") == [(1, 0.0), (3, 1.0), (5, 2.0), (7, 3.0)]


@pytest.mark.slow
def test_overrides_that_are_named_compose(compose):
    """What a finding tells the user to type is a key of that recipe, with a value that it takes."""
    typed = re.compile(r"\b((?:trainer|data|lora|quantization)(?:\.\w+)?=(?:\[[^]]*\]|[^\s,;:<]+))")
    records = [each for _, _, sick, near in CASES.values() for each in (sick, *near)]
    named = {
        (seen.recipe, override)
        for seen in records
        for finding in doctor.examine(seen)["findings"]
        for override in typed.findall(finding["change"])
    }
    assert len(named) > 10
    for recipe, override in sorted(named):
        cfg = compose(recipe, override, *(["reward_funcs=a"] if METHODS[recipe].samples else []))
        config.build(cfg.trainer, "trainer", use_cpu=True, bf16=False)


# ---- In a run

LONG = (
    "quantization=none",
    "trainer.max_steps=8",
    "trainer.logging_steps=1",
    "trainer.learning_rate=1e-3",
    "trainer.lr_scheduler_type=constant",
    "data.train_size=40",
)


def broken_from(step):
    def rule(record):
        """Broken from a step on."""
        if record.rows[-1]["step"] >= step:
            return Finding("broken", "a cough", "a cold", "trainer.learning_rate=0.0")
        return None

    rule.__name__ = "cough"
    return rule


def test_what_a_run_leaves(train, tmp_path, capsys):
    done = train("dpo", tmp_path / "run", *LONG, drawn=True)
    report, said = done.result["doctor"], capsys.readouterr().out
    log, facts = [row for row in done.log if "loss" in row], report.pop("facts")
    assert report == doctor.examine(
        Record("dpo", log, done.trainer.args, 8, facts, done.result["before"], done.result["metrics"])
    )
    assert facts["ends_with_eos"] == 1 and facts["reply_tokens"] > 10
    # Four held-out pairs show nothing.
    assert report["verdict"] != "healthy" and "too_little_data" in [each["rule"] for each in report["findings"]]
    assert all(f"  doctor    {each}\n" in said for each in doctor.said(report))
    assert (done.dir / "doctor.png").read_bytes().startswith(b"\x89PNG\r\n")
    card = (done.dir / "README.md").read_text(encoding="utf-8")
    assert f"Verdict: **{report['verdict']}**." in card and "| watch | too_little_data | 8 |" in card
    late = [row for row in done.log if "loss" in row and row["step"] > doctor_rules.WARM_STEPS]
    assert all(row["dead_gradients"] == 0 for row in late)
    assert "stopped" not in done.result
    # As tests/benchmarks/ read it again: to its end, and to a step at which nothing is held out.
    assert doctor_runs.examined(done.dir) == report
    early = doctor_runs.examined(done.dir, until=7)
    assert (early["verdict"], early["findings"], [*early["unasked"]]) == (
        "healthy", [], ["collapse", "reward_saturation"]
    )  # fmt: skip


def test_nobody_is_asked(train, tmp_path, capsys):
    done = train("dpo", tmp_path / "run", "quantization=none", "doctor=none")
    assert "doctor" not in done.result and not (done.dir / "doctor.png").exists()
    assert "doctor" not in capsys.readouterr().out
    assert "## Doctor" not in (done.dir / "README.md").read_text(encoding="utf-8")
    assert all("dead_gradients" not in row for row in done.log)


@pytest.mark.parametrize("recipe", ["dpo", "simpo", "orpo", "kto", "sft"])
def test_replies_that_are_cut_off_are_seen(train, tmp_path, capsys, recipe):
    keys = ("completion",) if recipe == "sft" else ("chosen", "rejected")
    data = [{"prompt": f"question {i}", **{key: f"{key} " * (99 + i) for key in keys}} for i in range(16)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    arguments = ("quantization=none", "data=local", "data.path=long.jsonl", "data.too_long=truncate")
    done = train(recipe, tmp_path / "cut", *arguments, "trainer.max_length=128")
    found = {finding["rule"]: finding for finding in done.result["doctor"]["findings"]}
    assert found["no_eos"]["saw"].startswith("0% of the training replies")
    assert ("  doctor    not asked: collapse" in capsys.readouterr().out) == (recipe != "sft")  # of so few steps


@pytest.mark.parametrize("logging", [1, 2])
def test_strict_stops_with_the_last_good_weights(train, tmp_path, monkeypatch, logging):
    """Broken at step 6. The last good row, 5 (or 4), tells of the weights before its step: those of step 4 (or 3)."""
    good = 6 - logging - 1
    whole = train("dpo", tmp_path / "good", *LONG, f"trainer.max_steps={good}", "trainer.save_strategy=no")
    monkeypatch.setattr(doctor, "RULES", (broken_from(6),))
    arguments = (*LONG, f"trainer.logging_steps={logging}", "trainer.save_strategy=no")
    warned = train("dpo", tmp_path / "warned", *arguments)
    assert warned.result["steps"] == 8 and "stopped" not in warned.result
    done = train("dpo", tmp_path / "strict", *arguments, "doctor=strict")
    assert done.result["steps"] == 6 and done.result["stopped"] == "doctor: cough at step 6"
    assert done.result["doctor"]["verdict"] == "broken"
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in done.weights.items())
    assert not all(torch.equal(weight, warned.weights[name]) for name, weight in done.weights.items())
    assert done.result["metrics"] == whole.result["metrics"]


def test_a_resumed_run_has_the_same_verdict(train, tmp_path, monkeypatch):
    """Interrupted at step 4, behind the checkpoint of step 3, whose last good weights are those of step 1."""
    from rlhf_recipes.training import callbacks

    monkeypatch.setattr(doctor, "RULES", (*doctor_rules.RULES, broken_from(4)))
    arguments = (*LONG, "trainer.logging_steps=2", "trainer.save_steps=3", "doctor=strict")
    whole = train("dpo", tmp_path / "whole", *arguments)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks.Progress, "on_step_end", interrupt)
        train("dpo", tmp_path / "again", *arguments)
    again = train("dpo", tmp_path / "again", *arguments)
    assert again.result["resumed_from"] == "checkpoint-3"
    for key in ("doctor", "steps", "adapter_sha256", "metrics", "stopped"):
        assert again.result[key] == whole.result[key], key
    assert whole.result["steps"] == 4


def test_strict_stops_a_run_that_really_breaks(train, tmp_path, capsys):
    """A rate at which the first real step is the last: what is kept are the weights before it."""
    done = train("dpo", tmp_path / "run", *LONG, "trainer.learning_rate=1e20", "trainer.save_steps=3", "doctor=strict")
    assert done.result["steps"] < 8 and done.result["stopped"] == f"doctor: not finite at step {done.result['steps']}"
    assert done.result["doctor"]["findings"][0]["rule"] == "not_finite"
    assert "dead_gradients" not in [finding["rule"] for finding in done.result["doctor"]["findings"]]
    assert all(weight.isfinite().all() and weight.abs().max() < 1 for weight in done.weights.values())
    said = capsys.readouterr().out
    assert said.count("\ndoctor: broken: not finite (step") == said.count("\ndoctor: watch: not finite (step") == 1


def test_dead_tensors_are_counted(train, tmp_path, monkeypatch):
    """Layers whose gradients vanish on the way: as bitsandbytes does on a CPU, unless `keep_gradients_on_cpu`."""
    from rlhf_recipes import models

    def cut(trainer, parent):
        keep(trainer, parent)
        for name, parameter in trainer.model.named_parameters():
            if "layers.0" in name and parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)

    keep = models.keep_adapter_in_float32
    monkeypatch.setattr(models, "keep_adapter_in_float32", cut)
    done = train("dpo", tmp_path / "run", *LONG)
    found = {finding["rule"]: finding for finding in done.result["doctor"]["findings"]}
    assert found["dead_gradients"]["level"] == "broken" and found["dead_gradients"]["saw"].startswith("50%")


@pytest.mark.slow
def test_the_doctor_computes_nothing(compose):
    from rlhf_recipes import run

    def sha(*overrides):
        return config_sha256(run.resolved(compose("dpo", *overrides)))

    assert sha() == sha("doctor=none") == sha("doctor=warn") != sha("doctor=strict")
    config = run.resolved(compose("dpo"))
    del config["doctor"]
    assert config_sha256(config) == sha()  # of a run from before there was the key


def test_words_are_checked(compose):
    with pytest.raises(ValueError, match="doctor=sometimes: not one of warn, strict, none"):
        launch_keys.check(compose("dpo", "doctor=sometimes"), "dpo")


def test_text_of_a_finding_cannot_break_the_card():
    from rlhf_recipes.training import card

    nasty = "a|b `c` <script>\n# Title"
    finding = {
        "rule": "cough",
        "level": "broken",
        "step": 3,
        "saw": nasty,
        "means": nasty,
        "change": "data.path=<yours>",
    }
    text = card.examined({"verdict": "broken", "findings": [finding]})
    assert "<script>" not in text and "\n# Title" not in text and "data.path=&lt;yours&gt;" in text
    assert text.count("\n| ") == 3 and card.examined(None) == ""
    short = card.examined({"verdict": "healthy", "findings": [], "unasked": {"collapse": "for which <8> rows"}})
    assert "Verdict: **healthy**. Not asked: collapse, for which &lt;8&gt; rows" in short


def test_length_bias_is_the_difference_of_two_accuracies():
    """By hand: 3 pairs whose chosen reply is the longer, 2 of them right; 2 pairs with the shorter, 1 right."""
    from rlhf_recipes.training.metrics import accuracy_metrics

    def pair(number, chosen, rejected):
        return {
            "prompt_id": str(number),
            "chosen": [{"content": "x" * chosen}],
            "rejected": [{"content": "x" * rejected}],
        }

    pairs = [pair(0, 9, 5), pair(1, 9, 5), pair(2, 9, 5), pair(3, 5, 9), pair(4, 5, 9)]
    found = accuracy_metrics(pairs, [1.0, 2.0, -1.0, 1.0, -1.0], [0.0] * 5)
    assert found["length_bias"].value == pytest.approx(2 / 3 - 1 / 2)
    assert found["preference_accuracy"].value == pytest.approx(0.6)
    assert found["accuracy_change"].value == pytest.approx(0.1) and found["accuracy_change"].n == 5
    blind = accuracy_metrics(pairs[:3], [1.0, 1.0, -1.0], [0.0] * 3)
    assert blind["length_bias"].value == 0  # one side alone says nothing
    many = [pair(n, 9, 5) if n > 1 else pair(n, 5, 9) for n in range(63)]
    carried = accuracy_metrics(many, [1.0 if n > 1 else -1.0 for n in range(63)], [0.0] * 63)
    assert (
        carried["length_bias"].value == 1 and carried["length_bias"].clusters == 2
    )  # by two pairs, which decide nothing


@pytest.mark.slow
def test_page_draws_every_recipe(tmp_path):
    whole = [record(recipe) for recipe in ("dpo", "orpo", "ppo", "sft", "kto")]
    for number, seen in enumerate([*whole, record("reward", log=[]), record("simpo", held_out=False)]):
        path = tmp_path / f"{number}.png"
        doctor_plot.plot(seen, doctor.examine(seen)["findings"], path, "run $x_1$ <b>")
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_picture_has_the_limits_of_the_rules():
    log = rows(steps=40, entropy=lambda t: 3 * (t < 0.1))

    def panel(title, seen):
        return next(each for each in doctor_plot.panels(seen) if each.title == title)

    low = panel("Entropy", record(log=log)).low
    assert low == pytest.approx(doctor_rules.COLLAPSING * log[0]["entropy"])
    assert panel("Reward margin", record("simpo")).high == 8.0, "from gamma on"
    assert panel("Reward margin", record(args=arguments(loss_type=["ipo"]))).high is None


def test_every_rule_is_drawn():
    drawn = {rule for recipe in ("dpo", "ppo") for panel in doctor_plot.panels(record(recipe)) for rule in panel.rules}
    assert drawn == {rule.__name__ for rule in doctor_rules.RULES}


def test_labels_of_one_kind_are_no_error():
    """Held-out answers that are all good rank nothing: their figures have no value."""
    from rlhf_recipes.training.metrics import label_metrics

    rows = [{"prompt_id": f"p{n}", "completion": [{"content": "yes"}], "label": True, "pair": None} for n in range(30)]
    before = label_metrics(rows, [(-5.0, 4)] * 30, [(-5.0, 4)] * 30)
    after = label_metrics(rows, [(-9.0 - n % 2, 4) for n in range(30)], [(-5.0, 4)] * 30)
    seen = record("kto", held_out=False)
    seen.before, seen.after = before, after
    assert after["auroc"].value is None
    assert [finding["rule"] for finding in doctor.examine(seen)["findings"]] == ["likelihood_displacement"]


def test_it_is_on_by_default():
    for recipe in METHODS:
        assert yaml.safe_load((config.CONF / f"{recipe}.yaml").read_text())["doctor"] == "warn"
