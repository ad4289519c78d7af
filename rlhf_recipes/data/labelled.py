"""Labelled answers as KTO takes them: in micro-batches of different prompts, good and bad ones of equal weight.

KTO holds an answer against z, the KL of the policy to its reference, which TRL estimates in every micro-batch from
prompts that have got the answer of the row before, the first that of the last (Ethayarajh et al. 2024,
arXiv:2402.01306). Such an answer must be nobody's answer to that prompt, neither the row's own nor the
other half of its pair.
"""

import heapq
import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rlhf_recipes.data.fit import reordered
from rlhf_recipes.data.load import Splits
from rlhf_recipes.data.rows import Example, Rows, select
from rlhf_recipes.errors import Refusal

LOWEST, HIGHEST = 1.0, 4 / 3  # weight of the good answers over that of the bad ones: equation 8 of the paper


def micro_batches(splits: Splits, args) -> Splits:
    """Splits in an order whose micro-batches, taken one after another, hold no prompt twice and none a single row.

    The train rows are shuffled with the trainer's seed; those that find no place are left out and counted. Held-out
    rows that find none come last.

    Args:
        splits: of `load_labelled`, after `fit`.
        args: the trainer's, a `trl.KTOConfig`.

    Raises:
        Refusal: micro-batches of one, another order than the rows', or no train row left.
    """
    size = args.per_device_train_batch_size
    if args.loss_type == "kto" and size < 2:
        raise Refusal(
            f"trainer.per_device_train_batch_size={size}: KTO estimates its KL from the other answers of a "
            "micro-batch. Set at least 2, or trainer.loss_type=apo_zero_unpaired, which has no KL."
        )
    if args.loss_type == "kto" and args.train_sampling_strategy != "sequential":
        raise Refusal(
            f"trainer.train_sampling_strategy={args.train_sampling_strategy}: KTO's KL needs the rows in the order "
            "that they were put in. Leave it sequential."
        )
    train, _ = _placed(splits.train, size, args.seed)
    test = Rows.joined(*_placed(splits.test, size, args.seed))
    return reordered(splits, train, test, {"unplaced": len(splits.train) - len(train)})


def _placed(rows: Sequence[Example], size: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """The rows in micro-batches of different prompts, the last of which may be shorter; and those without a place.

    Each takes a row of the prompts of which most rows are left, so that few prompts with many rows are not all that
    remains.
    """
    draw = random.Random(seed)
    prompt_ids = rows.groups("prompt_id") if isinstance(rows, Rows) else [row["prompt_id"] for row in rows]
    waiting: dict[Any, list[int]] = {}
    for number in draw.sample(range(len(rows)), len(rows)):
        waiting.setdefault(prompt_ids[number], []).append(number)
    prompts = [(-len(left), draw.random(), prompt) for prompt, left in waiting.items()]
    heapq.heapify(prompts)
    batches, last = [], []
    while len(prompts) >= size:
        taken = [heapq.heappop(prompts) for _ in range(size)]
        batches.append([waiting[prompt].pop() for _, _, prompt in taken])
        for count, _, prompt in taken:
            if count < -1:
                heapq.heappush(prompts, (count + 1, draw.random(), prompt))
    if len(prompts) > 1:
        last = [waiting[prompt].pop() for _, _, prompt in prompts]
    draw.shuffle(batches)
    placed, others = chain(*batches, last), chain(*waiting.values())
    return select(rows, [*placed]), select(rows, [*others])


def balance(rows: Sequence[Example], args) -> str:
    """One line: how many answers are good and bad, and which weight brings them into balance where they are not.

    n_good w_good / (n_bad w_bad) should lie in [1, 4/3] (arXiv:2402.01306, equation 8).
    """
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    said = f"labels: {good} good, {bad} bad"
    if not good or not bad:
        return f"{said}: with one kind alone nothing says what the other is like. Give both."
    ratio = good * args.desirable_weight / (bad * args.undesirable_weight)
    if LOWEST <= round(ratio, 2) <= round(HIGHEST, 2):
        return said
    key, low, high = "desirable_weight", LOWEST / ratio, HIGHEST / ratio
    own = args.desirable_weight
    if ratio > HIGHEST:
        key, low, high, own = "undesirable_weight", ratio / HIGHEST, ratio / LOWEST, args.undesirable_weight
    return (
        f"{said}: the good ones weigh {ratio:.2f} times the bad ones, 1 to 1.33 is advised (arXiv:2402.01306, "
        f"equation 8): trainer.{key} from {own * low:.2f} to {own * high:.2f}"
    )
