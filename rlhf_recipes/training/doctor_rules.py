"""The doctor's rules.

A rule is a function of a `Record` (the rows of the trainer's log, the held-out metrics before and after, a few facts)
that returns a `Finding` or None. While a run trains it sees the log alone; at the end it sees both. `RULES` lists them
all. Nothing here needs a model or a forward pass.

Log-probabilities and KL are in nats.
"""

import math
from collections.abc import Callable

from rlhf_recipes import stats
from rlhf_recipes.stats import Estimate
from rlhf_recipes.training.doctor_record import (
    BROKEN,
    BY_DOCTOR,
    MIN_PROMPTS,
    MIN_ROWS,
    WATCH,
    Finding,
    Record,
    above,
    accuracy_key,
    below,
    decides,
    ends,
    margin_key,
    margin_limit,
    pairs_a_step,
    points,
    since_start,
    surely_above,
    surely_below,
    width,
)

LEFT_OUT = 0.1  # of the steps; a float16 scaler that has found its scale leaves out one of 2,000
DEAD_SHARE = 0.25  # of the trained tensors; below, a layer that the data never reach explains it
WARM_STEPS = 3  # before a margin of exactly zero is odd: the first rate of a warm-up is zero
REFERENCE_NATS = 0.01  # a token, between a policy and its reference before the first update: here exactly 0
AT_ONCE, AT_ONCE_ACCURACY, AT_ONCE_PAIRS = 0.02, 0.95, 16  # share of the steps; 16 pairs right by luck: 2^-16
# Perplexity of the chosen replies times 1.15, evaluate.py's limit on any text, and times 2.
DISPLACED, DISPLACED_FAR = math.log(1.15), math.log(2)
LENGTH_GAP = 0.2  # of accuracy, between pairs whose chosen reply is the longer one and the others
LENGTH_RULE = 0.75  # share of the pairs that length alone ranks right
LENGTH_RATIOS = (0.5, 1.5)  # of completions, over the start's: evaluate.py's limits
KL_WATCH, KL_BROKEN, KL_ROLLOUTS = 2.0, 5.0, 3  # times trainer.kl_target; the trainer's own brake is 5
KL_TARGET = 10.0  # nats a completion, where a trainer has no kl_target
COLLAPSING, COLLAPSED = 0.5, 0.2  # of the entropy or of the distinct bigrams at the start
EQUAL_REWARDS = 0.1  # of the rewards' standard deviation at the start
FITTED, FITTED_PAIRS = 0.98, 16
NOISE_ACCURACY, NOISE_PAIRS, NOISE_MOVED, NOISE_WIDENED = 0.65, 48, 0.02, 1.5  # see label_noise
EOS_REPLIES = 0.25  # of the training replies keep their EOS
EOS_SHARE, EOS_EPISODES = 0.05, 60  # none of 60: under 5 % with 95 % confidence (rule of three)


def not_finite(record: Record) -> Finding | None:
    """A loss or a gradient that is NaN or infinite. In float16, whose scaler skips such steps at first, the gradient
    must be so in two rows running.

    Where such steps are left out (`steps_left_out`) each costs its batch and no weight. There the gradient must be so
    in MIN_ROWS rows running; or a tenth of all steps, MIN_ROWS at least, are left out.
    """
    left_out, steps = record.rows[-1].get("steps_left_out", 0), record.rows[-1]["step"]
    # transformers keeps NaN out of the loss, unless trainer.logging_nan_inf_filter=false
    losses = [] if left_out else [row["loss"] for row in record.rows if not math.isfinite(row["loss"])]
    rows = 2 if record.args.fp16 else MIN_ROWS if left_out else 1
    norms = [row["grad_norm"] for row in record.rows[-rows:] if not math.isfinite(row.get("grad_norm", 0.0))]
    if losses or len(norms) == rows or (record.stopped or "").startswith("the gradient is not finite"):
        saw = f"the {'loss' if losses else 'gradient'} is not finite"
        return Finding(BROKEN, saw, "no weight is worth keeping after it", _lower_rate(record))
    if left_out:
        level = BROKEN if left_out >= max(MIN_ROWS, LEFT_OUT * steps) else WATCH
        saw = f"{left_out} of {steps} steps were left out, whose gradient was not finite"
        return Finding(level, saw, "nothing is learned from their batches", _lower_rate(record))
    return None


def dead_gradients(record: Record) -> Finding | None:
    """Trained tensors whose gradient is exactly zero in the first step, or in every logged one; a gradient norm of
    exactly zero; or held-out figures that training left as they were, to the last bit.

    bitsandbytes on a CPU repacks 4-bit weights when it evaluates: the LoRA of q, k, v, gate and up then has none,
    until the LoRA of the layers behind them has moved and passes a little. A does not count while its B is zero, nor
    does a row whose gradient is NaN, whose completions score alike (without an advantage there is none), or whose
    pairs are so far apart that none is left.
    """
    taught, stopped = [row for row in record.rows if _teaches(record, row)], record.stopped or ""
    rows = taught if stopped.startswith(BY_DOCTOR) else [] if stopped else taught
    shares = [row["dead_gradients"] for row in rows if "dead_gradients" in row]
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row][-MIN_ROWS:]
    means = "these weights do not learn what they should, while the loss looks plausible"
    change = "quantization=none, or lora.target_modules=all-linear"
    if rows and rows[0]["step"] == 1 and rows[0].get("dead_gradients", 0.0) >= DEAD_SHARE:
        saw = f"{shares[0]:.0%} of the trained tensors had no gradient in the first step"
        return Finding(BROKEN, saw, means, change)
    if len(shares) >= MIN_ROWS and min(shares) > 0:
        level = BROKEN if min(shares) >= DEAD_SHARE else WATCH
        return Finding(level, f"{min(shares):.0%} of the trained tensors never had a gradient", means, change)
    if len(norms) == MIN_ROWS and max(norms) == 0:
        return Finding(BROKEN, f"the gradient norm is 0 in the last {MIN_ROWS} rows", means, change)
    held_out = {} if stopped else record.after
    if taught and held_out and all(e.value == record.before[key].value for key, e in held_out.items()):
        change = f"trainer.learning_rate={record.args.learning_rate * 10 or 1e-5:.0e}, or more steps"
        return Finding(BROKEN, "no held-out figure moved", "the adapter learned nothing", change)
    return None


def _teaches(record: Record, row: dict) -> bool:
    """Not where all completions of its rollout, or of each of its groups, score alike, where the mean margin of its
    pairs is saturated, or its gradient is NaN."""
    alike = row.get("reward_std") == 0 or row.get("frac_reward_zero_std") == 1
    limit = margin_limit(record)
    apart = limit is not None and row.get(margin_key(record), 0.0) > limit
    return not alike and not apart and math.isfinite(row.get("grad_norm", 0.0))


def wrong_reference(record: Record) -> Finding | None:
    """A policy starts as its reference: rewards and KL of the first step are zero, and only there.

    Not zero at first, or nearly every pair ranked right before anything can have been learned: the reference is
    another model. Margin exactly zero for good: policy and reference are one, or nothing trains.
    """
    if not record.method.reference or not record.rows or record.facts.get("anchored"):
        return None
    first, means = record.rows[0], "the reference is not the model that the policy started from"
    change = "model.adapter=<the run to start from>: its frozen copy is the reference"
    if record.method.samples:  # TRL's trainer logs no k3
        key, length = "kl_k3" if "kl_k3" in first else "kl", first.get("completions/mean_length")
    else:
        key, length = "rewards/chosen", record.args.beta * record.facts.get("reply_tokens", math.inf)
    apart = abs(first.get(key, 0.0)) / (length or math.inf)
    if first["step"] == 1 and apart > REFERENCE_NATS:
        return Finding(BROKEN, f"{apart:.2f} nats a token from the reference before the first update", means, change)
    if record.method.samples:
        return None
    margins = [row[margin_key(record)] for row in record.rows if margin_key(record) in row]  # NaN is not 0
    if record.rows[-1]["step"] > WARM_STEPS and margins and not any(margins):
        still = "the policy is its own reference" if first.get("grad_norm") else "nothing is trained"
        saw = f"margin exactly 0 for {record.rows[-1]['step']} steps"
        return Finding(BROKEN, saw, still, change)
    early = [row for row in record.rows if row["step"] <= max(1, AT_ONCE * record.max_steps)]
    if early and early[-1]["step"] * pairs_a_step(record) >= AT_ONCE_PAIRS:
        accuracy = sum(row.get("rewards/accuracies", 0.0) for row in early) / len(early)
        if accuracy >= AT_ONCE_ACCURACY:
            saw = f"{accuracy:.0%} of the pairs ranked right within {early[-1]['step']} steps"
            return Finding(BROKEN, saw, f"{means}, or the pairs leak their label", change)
    return None


def likelihood_displacement(record: Record) -> Finding | None:
    """The chosen replies themselves become less likely: (log pi(y_c) - log pi_start(y_c)) / |y_c| below -log 1.15, as
    if their perplexity had risen by 15 %; broken at twice the perplexity.

    A preference loss only needs the rejected ones to fall faster (Razin et al., arXiv:2410.08847).
    """
    if not record.method.preferences or record.recipe == "reward":
        return None
    held_out = record.after.get("chosen_logp_change_per_token")
    other = record.method.against_displacement.format(half_beta=record.args.beta / 2)
    change = f"{_lower_rate(record)}, or {other}"
    means = "probability moves to replies that are in neither column"
    if below(held_out, -DISPLACED):
        level = BROKEN if below(held_out, -DISPLACED_FAR) else WATCH
        before, after = (metrics["reward_margin"].value for metrics in (record.before, record.after))
        grew = "grew" if None not in (before, after) and after > before else "did not grow"
        saw = f"held-out chosen replies changed by {_nats(held_out)} a token while the margin {grew}"
        return Finding(level, saw, means, change)
    found = ends(displacements(record))
    if not decides(held_out) and found and surely_below(found[1], -DISPLACED, found[0].error):
        level = BROKEN if surely_below(found[1], -DISPLACED_FAR, found[0].error) else WATCH
        return Finding(level, f"chosen replies changed by {found[1].value:+.2f} nats a token", means, change)
    return None


def displacements(record: Record) -> list[tuple[int, float]]:
    """(step, change of the chosen replies' log-probability in nats a token) for each row of the log.

    DPO and KTO log beta (log pi - log pi_ref) of whole replies. Where the reference is another run than the start the
    change is from the mean of the first quarter, and so it is for SimPO and ORPO, which log log pi itself, averaged
    over tokens, of other replies in every row.
    """
    tokens, log_ratio = record.facts.get("reply_tokens", 0), record.method.reward == "log_ratio"
    if log_ratio:
        key, scale = "rewards/chosen", record.args.beta * tokens
    else:  # TRL's CPOTrainer sums over tokens with these two
        key, scale = "logps/chosen", tokens if getattr(record.args, "loss_type", "") in ("sigmoid", "hinge") else 1
    found = [(step, value / scale) for step, value in points(record, key)] if scale else []
    if log_ratio and not record.facts.get("anchored"):
        return found
    first = [value for _, value in found][: max(1, len(found) // 4)]
    return [(step, value - sum(first) / len(first)) for step, value in found]


def length_drift(record: Record) -> Finding | None:
    """Length in the place of quality.

    Pairs: accuracy where the chosen reply is the longer one differs from accuracy where it is the shorter by over 0.2,
    and by more than before; or length alone ranks three quarters of the held-out pairs right, so that whatever follows
    the data follows length (Singhal et al., arXiv:2310.03716). PPO: completions half or one and a half times as long
    as at the start.
    """
    bias, shorter = record.after.get("length_bias"), record.after.get("baseline_shorter_wins")
    biased = above(bias, LENGTH_GAP) or below(bias, -LENGTH_GAP)
    if biased and abs(bias.value) > abs(record.before["length_bias"].value):
        saw = f"accuracy where the longer reply is the chosen one, less where it is not: {_points(record, bias)}"
        means = f"{'longer' if bias.value > 0 else 'shorter'} passes for better"
        return Finding(WATCH, saw, means, _length_change(record))
    if above(shorter, LENGTH_RULE) or below(shorter, 1 - LENGTH_RULE):
        share = max(shorter.value, 1 - shorter.value)
        saw = f"length alone ranks {share:.0%} of the held-out pairs right"
        return Finding(WATCH, saw, "what follows these data follows length", _length_change(record))
    low, high = LENGTH_RATIOS
    found = since_start(points(record, "completions/mean_length"))
    change = f"trainer.{record.method.penalty} higher, or a reward that ignores length"
    before, after = record.before.get("completion_tokens"), record.after.get("completion_tokens")
    if decides(after) and (above(after, high * before.value) or below(after, low * before.value)):
        saw = f"held-out completions went from {before.value:.0f} to {after.value:.0f} tokens"
        return Finding(WATCH, saw, "the reward pays for length", change)
    if not decides(after) and found and (
        surely_above(found[1], high * found[0].value, high * found[0].error)
        or surely_below(found[1], low * found[0].value, low * found[0].error)
    ):  # fmt: skip
        saw = f"completions went from {found[0].value:.0f} to {found[1].value:.0f} tokens"
        return Finding(WATCH, saw, "the reward pays for length", change)
    return None


def _length_change(record: Record) -> str:
    other = record.method.against_length
    return f"{other}, or pairs of equal length" if other else "data.path=<pairs of equal length>"


def kl_runaway(record: Record) -> Finding | None:
    """What samples: the KL to the reference (k1, nats a completion), mean of the last three rollouts, or held out, is
    over twice `trainer.kl_target` (PPO's default where there is none); broken over five times. A policy of a billion
    parameters is over-optimised at 50 to 85 nats (Huang et al., arXiv:2403.17031).
    """
    if not record.method.samples:
        return None
    target, held_out = getattr(record.args, "kl_target", KL_TARGET), record.after.get("kl")
    last = [value for _, value in points(record, "kl")][-KL_ROLLOUTS:]
    mean = sum(last) / len(last) if len(last) == KL_ROLLOUTS else 0.0
    braked = (record.stopped or "").startswith("KL") and " over " in record.stopped
    if braked or mean > KL_WATCH * target or above(held_out, KL_WATCH * target):
        broken = braked or mean > KL_BROKEN * target or above(held_out, KL_BROKEN * target)
        saw = record.stopped if braked else f"KL {held_out.value if held_out else mean:.1f} nats a completion"
        means = f"the policy has left its reference (kl_target={target:g}), where no reward model has been"
        penalty = record.method.penalty
        change = f"trainer.{penalty}={max(getattr(record.args, penalty) * 4, 0.05):g}"
        change += ", or trainer.kl_controller=adaptive" if record.recipe == "ppo" else ""
        return Finding(BROKEN if broken else WATCH, saw, means, change)
    return None


def collapse(record: Record) -> Finding | None:
    """The entropy (nats a token) or the share of distinct bigrams falls under half of the start's; broken under a
    fifth. Supervised fine-tuning lowers the entropy by design and is left out."""
    if record.recipe == "sft":
        return None
    braked = (record.stopped or "").startswith("entropy")
    for key, name in (("entropy", "the entropy"), ("completions/distinct_2", "the share of distinct bigrams")):
        found = since_start(points(record, key))
        fallen = found and surely_below(found[1], COLLAPSING * found[0].value, COLLAPSING * found[0].error)
        if fallen or braked:
            broken = braked or surely_below(found[1], COLLAPSED * found[0].value, COLLAPSED * found[0].error)
            saw = record.stopped if braked else f"{name} fell from {found[0].value:.2f} to {found[1].value:.2f}"
            change = _lower_rate(record)
            change += f", or trainer.{record.method.penalty} higher" if record.method.samples else ""
            change += ", or trainer.entropy_coef=0.01" if record.recipe == "ppo" else ""
            return Finding(BROKEN if broken else WATCH, saw, "it says ever fewer things", change)
    return None


def reward_saturation(record: Record) -> Finding | None:
    """No signal is left. Preferences: the mean margin is so large that a pair's weight in the gradient, mostly
    1 - sigmoid(margin), is under 0.001. PPO: the completions of a rollout score alike, and advantages are noise."""
    limit = margin_limit(record)
    if limit is not None:
        found = ends(points(record, margin_key(record)))
        if found and surely_above(found[1], limit):
            saw = f"the mean reward margin is {found[1].value:.1f}"
            change = f"{_lower_rate(record)}, or fewer steps"
            return Finding(WATCH, saw, "pairs this far apart teach nothing more, and the policy moves on", change)
    series = points(record, "reward_std")
    last = [value for _, value in series[-max(MIN_ROWS, len(series) // 4) :]]
    if len(last) >= MIN_ROWS and not any(last):
        means = "with equal rewards every advantage is noise"
        if any(value for _, value in series):
            saw = f"all completions of the last {len(last)} rollouts score alike"
            return Finding(WATCH, saw, means, "fewer steps, or reward_funcs=<one that tells them apart>")
        return Finding(BROKEN, "all completions score alike", means, "reward_funcs=<one that tells them apart>")
    found = ends(series)
    if found and surely_below(found[1], EQUAL_REWARDS * found[0].value, EQUAL_REWARDS * found[0].error):
        saw = f"the rewards' deviation fell from {found[0].value:.3f} to {found[1].value:.3f}"
        return Finding(WATCH, saw, "the reward is used up, and what is left of it is noise", "fewer steps")
    return None


def reward_against_preference(record: Record) -> Finding | None:
    """The training reward rises (margins of the pairs; PPO: the mean reward) while the held-out change is below zero:
    Goodhart's law (Gao et al., arXiv:2210.10760). Broken; without the rise, a plain loss, the same."""
    held_out = record.after.get(record.method.change)
    if not below(held_out, 0.0):
        return None
    found = ends(points(record, "reward" if record.method.samples else margin_key(record)))
    rose = found and surely_above(found[1], found[0].value, found[0].error)
    what = record.method.main.replace("_", " ")
    saw = f"held-out {what} changed by {_points(record, held_out)}" + (" while the training's rose" if rose else "")
    means = "it learns what the held-out prompts do not reward" if rose else "training made it worse"
    weight, order = f"trainer.{record.method.penalty} higher", "chosen and rejected the right way round"
    change = weight if record.method.samples else order
    return Finding(BROKEN, saw, means, f"{_lower_rate(record)}, or {change}")


def over_fitting(record: Record) -> Finding | None:
    """Train accuracy 1 (0.98 in the last quarter of the log) and no shown gain on held-out pairs. Supervised
    fine-tuning: held-out perplexity has risen."""
    change = f"trainer.num_train_epochs={math.ceil(record.args.num_train_epochs / 2)}, or more data"
    perplexity = record.after.get("perplexity")
    if perplexity and above(perplexity, record.before["perplexity"].high):
        saw = f"held-out perplexity went from {record.before['perplexity'].value:.1f} to {perplexity.value:.1f}"
        return Finding(BROKEN, saw, "it learns the training text by heart", f"{_lower_rate(record)}, or {change}")
    gain = record.after.get(record.method.change)
    rows = [value for _, value in points(record, accuracy_key(record))]
    size = max(1, len(rows) // 4)
    if not record.method.preferences or not gain or not rows or (decides(gain) and gain.low > 0):
        return None
    pairs = size * record.rows[-1]["step"] / len(rows) * pairs_a_step(record)
    accuracy = sum(rows[-size:]) / size
    if accuracy >= FITTED and pairs >= FITTED_PAIRS:
        saw = f"train accuracy {accuracy:.2f}, held out {_points(record, gain)}"
        return Finding(WATCH, saw, "it learns the training pairs by heart", change)
    return None


def label_noise(record: Record) -> Finding | None:
    """The model moves and still ranks its training pairs no better than a coin with a slight bias.

    Fires where accuracy + 1.64 sqrt(1/4 / n) < 0.65 over the n pairs after the first quarter, and the held-out replies
    moved by over 0.02 nats a token (a reward model: the interval of its margin widened by half). 0.65 is what 35 % of
    flipped labels leave to a model that knows the right ones.
    """
    rows = [row for row in record.rows if accuracy_key(record) in row]
    rows = rows[len(rows) // 4 :]
    if not record.method.preferences or not record.after or not rows:
        return None
    share = len(rows) / len(record.rows)
    pairs = share * record.rows[-1]["step"] * pairs_a_step(record)
    accuracy = sum(row[accuracy_key(record)] for row in rows) / len(rows)
    if record.recipe == "reward":
        before, after = (width(metrics["reward_margin"]) for metrics in (record.before, record.after))
        moved = after > NOISE_WIDENED * before
    else:
        changes = [record.after[f"{side}_logp_change_per_token"].value for side in ("chosen", "rejected")]
        moved = max(map(abs, changes)) > NOISE_MOVED
    if not moved or pairs < NOISE_PAIRS or accuracy + 1.64 * math.sqrt(0.25 / pairs) >= NOISE_ACCURACY:
        return None
    saw = f"{accuracy:.0%} of {pairs:.0f} training pairs ranked right, though the model moved"
    change = ", or ".join(filter(None, ("cleaner labels", record.method.against_noise)))
    return Finding(WATCH, saw, "the labels contradict each other, or no model of this size can tell them", change)


def no_eos(record: Record) -> Finding | None:
    """A model that never sees an end never ends: hardly any training reply keeps its EOS (cut off at `max_length`, or
    left out by the chat template). PPO: no completion ended with it, or shown to be fewer than before."""
    share = record.facts.get("ends_with_eos")
    if share is not None and share < EOS_REPLIES:
        saw = f"{share:.0%} of the training replies end with EOS"
        change = "data.too_long=drop, or trainer.max_length higher"
        return Finding(BROKEN if share < EOS_SHARE else WATCH, saw, "it will not learn to stop", change)
    if not record.method.samples:
        return None
    before, after = record.before.get("eos_rate"), record.after.get("eos_rate")
    change = f"trainer.max_completion_length={record.args.max_completion_length * 2}, or trainer.missing_eos_penalty=1"
    if before and below(after, before.low) and after.value < EOS_SHARE:
        saw = f"completions that end: {before.value:.0%} before, {after.value:.0%} after"
        return Finding(BROKEN, saw, "it has unlearned to stop", change)
    rates = [value for _, value in points(record, "completions/eos_rate")]
    last = rates[-math.ceil(EOS_EPISODES / record.args.prompts_per_rollout) :]
    episodes = len(last) * record.args.prompts_per_rollout
    if rates and not any(last) and episodes >= EOS_EPISODES:
        saw = f"none of the last {episodes} completions ended within {record.args.max_completion_length} tokens"
        return Finding(WATCH, saw, "what is scored is cut-off text", change)
    return None


def too_little_data(record: Record) -> Finding | None:
    """The 95 % interval of the change on held-out rows, paired, includes no change, or fewer than 20 prompts are held
    out. A reward model's head is new: what it must beat is a coin, not what the random head happened to rank right."""
    gain = record.after.get(record.method.change)
    if gain and record.recipe == "reward":
        gain = record.after["preference_accuracy"].mapped(lambda accuracy: accuracy - 0.5)
    if not gain or gain.value is None or above(gain, 0.0) or below(gain, 0.0):
        return None
    unit, scale = ("", 1) if record.method.samples else (" points", 100)
    means = f"{gain.n} rows cannot show an effect below {scale * width(gain) / 2:.2g}{unit}"
    if not width(gain):  # all changed alike
        means = f"{gain.n} rows are too few for an interval"
    wanted = max(stats.needed(gain, 0.0) or 0, MIN_PROMPTS)
    more = f" (about {wanted:,} would show this one)" if wanted and wanted < 100_000 else ""
    change = f"more held-out rows{more}: data.eval_size, data.test_size; or more to train on: data.train_size"
    against = "against a coin" if record.recipe == "reward" else "change"
    return Finding(WATCH, f"{against} {_points(record, gain)}", means, change)


RULES: tuple[Callable[[Record], Finding | None], ...] = (
    not_finite,
    dead_gradients,
    wrong_reference,
    likelihood_displacement,
    length_drift,
    kl_runaway,
    collapse,
    reward_saturation,
    reward_against_preference,
    over_fitting,
    label_noise,
    no_eos,
    too_little_data,
)


def _lower_rate(record: Record) -> str:
    return f"trainer.learning_rate={record.args.learning_rate / 10:.0e}"


def _nats(estimate: Estimate) -> str:
    value, bracket, interval = stats.format_estimate(estimate, digits=2, sign=True).partition(" [")
    return f"{value} nats{bracket}{interval}"


def _points(record: Record, estimate: Estimate) -> str:
    """A change of accuracy in points of 100, or of a reward as it is."""
    if record.method.samples:
        return stats.format_estimate(estimate, sign=True)
    percent = estimate.mapped(lambda share: 100 * share)
    return stats.format_estimate(percent, digits=1, sign=True).replace(" [", " points [")
