"""The reward model's soft labels: the formula, and TRL's own loss where every label is certain."""

import pytest
import torch
from torch.nn.functional import logsigmoid

LABELS = [1.0, 0.8, 0.6, None]


@pytest.fixture
def trainer(tiny_model, tmp_path):
    """A trainer of four pairs with the labels given; None: without the column."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl import RewardConfig, RewardTrainer

    from rlhf_recipes.training.reward_trainer import SoftLabelRewardTrainer

    def made(labels, trl=False, margins=None, **settings):
        set_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        turns = {side: [[{"role": role, "content": f"{side} {n}"}] for n in range(4)] for side, role in roles.items()}
        numbers = {"p": labels, "margin": margins}
        rows = Dataset.from_dict(turns | {key: values for key, values in numbers.items() if values})
        args = RewardConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=1, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
            **settings,
        )  # fmt: skip
        kind = RewardTrainer if trl else SoftLabelRewardTrainer
        return kind(model=model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    return made


def loss_and_delta(trainer):
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    return loss, (chosen - rejected), (chosen + rejected)


@pytest.mark.parametrize("centering", [None, 0.01])
def test_the_loss_is_the_cross_entropy_of_the_label(trainer, centering):
    loss, delta, total = loss_and_delta(trainer(LABELS, center_rewards_coefficient=centering))
    p = torch.tensor([1.0 if label is None else label for label in LABELS])
    expected = -(p * logsigmoid(delta) + (1 - p) * logsigmoid(-delta)).mean() + (centering or 0) * (total**2).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss.item() != pytest.approx(-logsigmoid(delta).mean().item(), abs=1e-4)


@pytest.mark.parametrize("labels", [None, [1.0] * 4])
def test_certain_labels_give_the_loss_and_the_gradient_of_trl(trainer, labels):
    ours, theirs = trainer(labels), trainer(None, trl=True)
    ours.train(), theirs.train()
    for key in ("loss", "grad_norm"):
        assert ours.state.log_history[0][key] == theirs.state.log_history[0][key]


@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_margin_is_what_the_difference_has_to_exceed(trainer, labels):
    margins = [0.5, 3.0, None, 1.0]
    loss, delta, _ = loss_and_delta(trainer(labels, margins=margins))
    p = torch.tensor([1.0 if label is None else label for label in labels or [None] * 4])
    delta = delta - torch.tensor([margin or 0.0 for margin in margins])
    expected = -(p * logsigmoid(delta) + (1 - p) * logsigmoid(-delta)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    if labels is None:
        margins[2] = 0.0
        assert loss.item() == loss_and_delta(trainer(None, trl=True, margins=margins))[0].item()


def test_a_label_of_one_half_pulls_both_replies_together(trainer):
    loss, delta, _ = loss_and_delta(trainer([0.5] * 4))
    expected = -0.5 * (logsigmoid(delta) + logsigmoid(-delta)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and loss.item() >= 0.6931


def test_soft_labels_change_what_is_learned(trainer):
    soft, hard = trainer([0.6] * 4), trainer([1.0] * 4)
    soft.train(), hard.train()
    assert soft.state.log_history[0]["grad_norm"] < 0.5 * hard.state.log_history[0]["grad_norm"]
