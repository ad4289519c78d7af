"""ORPO and SimPO on TRL's DPOTrainer: its rows, its batches and its fused head, other losses, and no reference.

Shapes: P pairs, B = 2 P sequences, the chosen ones first, T tokens. Log-probabilities are in nats.
"""

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_recipes.methods import METHODS
from rlhf_recipes.preference.losses import average_logps, log_odds_ratio, nll_loss, simpo_loss


class ORPOTrainer(DPOTrainer):
    """Negative log-likelihood of the chosen answer less beta log sigma of `losses.log_odds_ratio`, means of a batch.

    Its args are an `ORPOConfig`.
    """

    _tag_names, _name = ("trl", "orpo"), "ORPO"
    _paper = MappingProxyType(
        {"title": "ORPO: Monolithic Preference Optimization without Reference Model", "id": METHODS["orpo"].paper}
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        drop_reference(self)

    def _compute_loss(self, model, inputs, return_outputs):
        answer_BT = inputs["completion_mask"]
        P = len(answer_BT) // 2
        liked_BT = answer_BT.clone()  # tokens of the likelihood
        if not self.args.disable_prompt_loss:
            liked_BT[:P] = inputs["attention_mask"][:P]
        outputs = forward(self, model, inputs, liked_BT)
        chosen_P, rejected_P = average_logps(outputs.log_probs, answer_BT[:, 1:]).chunk(2)
        nll = nll_loss(outputs.log_probs[:P], liked_BT[:P, 1:])
        log_odds_P = log_odds_ratio(chosen_P, rejected_P)
        ratio_P = logsigmoid(log_odds_P)
        loss = nll - self.beta * ratio_P.mean()
        log_batch(self, inputs, outputs, chosen_P, rejected_P)
        log_means(self, nll_loss=nll, log_odds_ratio=ratio_P, log_odds_chosen=log_odds_P)
        return with_balance(self, loss, outputs, return_outputs)


class SimPOTrainer(DPOTrainer):
    """`losses.simpo_loss` of the average log-probabilities, and cpo_alpha times the chosen answer's negative
    log-likelihood, means of a batch.

    Its args are a `SimPOConfig`.
    """

    _tag_names, _name = ("trl", "simpo"), "SimPO"
    _paper = MappingProxyType(
        {"title": "SimPO: Simple Preference Optimization with a Reference-Free Reward", "id": METHODS["simpo"].paper}
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        drop_reference(self)

    def _compute_loss(self, model, inputs, return_outputs):
        answer_BT = inputs["completion_mask"]
        P = len(answer_BT) // 2
        outputs = forward(self, model, inputs, answer_BT)
        chosen_P, rejected_P = average_logps(outputs.log_probs, answer_BT[:, 1:]).chunk(2)
        loss_P = simpo_loss(chosen_P, rejected_P, self.beta, self.args.simpo_gamma, self.args.label_smoothing)
        nll = nll_loss(outputs.log_probs[:P], answer_BT[:P, 1:])
        loss = loss_P.mean()
        if self.args.cpo_alpha:
            loss = loss + self.args.cpo_alpha * nll
        log_batch(self, inputs, outputs, chosen_P, rejected_P)
        log_means(self, nll_loss=nll)
        return with_balance(self, loss, outputs, return_outputs)


def drop_reference(trainer: DPOTrainer) -> None:
    """Free what TRL has made to compare the policy with: the frozen copy "ref" of an adapter that is continued."""
    trainer.ref_model = None
    if "ref" in getattr(trainer.model, "peft_config", ()):
        trainer.model.delete_adapter("ref")


def forward(trainer: DPOTrainer, model, inputs: dict[str, Tensor], scored_BT: Tensor) -> FusedCausalLMOutput:
    """One pass of the policy over both answers of each pair, by TRL's fused head.

    Args:
        inputs: a batch of TRL's DataCollatorForPreference.
        scored_BT: marks the tokens whose log-probabilities are wanted.

    Returns:
        Fields of shape (B, T - 1): of the tokens from the second on, 0 where not scored.
    """
    kwargs = {key: value for key, value in inputs.items() if key != "completion_mask"}
    if trainer.aux_loss_enabled:
        kwargs["output_router_logits"] = True
    labels_BT = inputs["input_ids"].masked_fill(scored_BT == 0, -100)
    return model(**kwargs, labels=labels_BT, use_cache=False, fused_lm_head=True)


def with_balance(trainer: DPOTrainer, loss: Tensor, outputs, return_outputs: bool):
    """The loss, as `_compute_loss` returns it, with the balance of experts where the model has any."""
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * outputs.aux_loss
        log_means(trainer, aux_loss=outputs.aux_loss)
    return (loss, outputs) if return_outputs else loss


def log_batch(trainer: DPOTrainer, inputs: dict[str, Tensor], outputs, chosen_P: Tensor, rejected_P: Tensor) -> None:
    """What TRL logs of pairs, under its names: rewards are beta times, and logps are, the average log-probabilities;
    the rest is of the tokens of the answers."""
    chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
    rewards_P, others_P = trainer.beta * chosen_P, trainer.beta * rejected_P
    log_means(
        trainer,
        **{
            "rewards/chosen": rewards_P,
            "rewards/rejected": others_P,
            "rewards/accuracies": (rewards_P > others_P).float(),
            "rewards/margins": rewards_P - others_P,
            "logps/chosen": chosen_P,
            "logps/rejected": rejected_P,
        },
    )
    answer_BT = inputs["completion_mask"][:, 1:]
    P = len(answer_BT) // 2
    of_tokens = {
        "entropy": (outputs.entropy, slice(None)),
        "logits/chosen": (outputs.mean_logits, slice(None, P)),
        "logits/rejected": (outputs.mean_logits, slice(P, None)),
        "mean_token_accuracy": (outputs.is_top1, slice(None, P)),
    }
    sums = [
        torch.stack([(values * answer_BT)[rows].sum().float(), answer_BT[rows].sum().float()])
        for values, rows in of_tokens.values()
    ]
    totals = trainer.accelerator.gather(torch.stack(sums)[None]).sum(0)
    for name, (total, count) in zip(of_tokens, totals.tolist(), strict=True):
        metrics(trainer)[name].append(total / count)
    if trainer.model.training:
        trainer._total_train_tokens += trainer.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
    metrics(trainer)["num_tokens"] = [trainer._total_train_tokens]


def log_means(trainer: DPOTrainer, **values: Tensor) -> None:
    """The mean of each over the pairs of all processes, into what TRL averages until it logs."""
    for name, each in values.items():
        metrics(trainer)[name].append(trainer.accelerator.gather_for_metrics(each.detach()).mean().item())


def metrics(trainer: DPOTrainer) -> dict[str, list]:
    return trainer._metrics["train" if trainer.model.training else "eval"]
