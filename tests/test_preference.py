"""ORPO and SimPO: their losses by hand, on the tokens that are measured, and beside TRL's own trainers."""

import importlib
import math
import sys

import pytest
import torch
from conftest import CHATML, skip_without, stir, write_checkpoint

from rlhf_recipes import config, inference, methods, models
from rlhf_recipes.errors import Refusal
from rlhf_recipes.preference import losses
from rlhf_recipes.run import Run

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Can I come on day {n}?"}],
        "chosen": [{"role": "assistant", "content": "Yes, " + "of course. " * n}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for n in range(1, 5)
]
OWN = {recipe: target for target, (recipe, _) in methods.TRLS_OWN.items()}
SIDES = ("chosen", "rejected")
ALIKE = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
         "logps/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen")  # fmt: skip


# ---- the formulas


def test_averages_by_hand():
    """Three tokens of one sequence and one of the other are marked."""
    logps_BT = torch.tensor([[-1.0, -2.0, -6.0], [-4.0, -9.0, -9.0]])
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert losses.average_logps(logps_BT, mask_BT).tolist() == [-3.0, -4.0]
    assert losses.nll_loss(logps_BT, mask_BT).item() == 13 / 4  # a token counts alike wherever it is


def test_simpo_by_hand():
    """d = 2 (-1 - -1.5) - 0.5 = 0.5 and 2 (-2 - -1) - 0.5 = -2.5."""
    chosen_P, rejected_P = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    plain = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(2.5))]
    assert losses.simpo_loss(chosen_P, rejected_P, 2.0, 0.5).tolist() == pytest.approx(plain)
    smooth = [0.9 * plain[0] + 0.1 * math.log1p(math.exp(0.5)), 0.9 * plain[1] + 0.1 * math.log1p(math.exp(-2.5))]
    assert losses.simpo_loss(chosen_P, rejected_P, 2.0, 0.5, 0.1).tolist() == pytest.approx(smooth)


def test_odds_by_hand():
    """P = 0.8 and 0.5: odds 4 and 1; P = 0.2 and 0.6: odds 1/4 and 3/2."""
    chosen_P, rejected_P = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.6]).log()
    expected = [math.log(4), math.log(1 / 6)]
    assert losses.log_odds_ratio(chosen_P, rejected_P).tolist() == pytest.approx(expected, rel=1e-5)
    certain, unlikely = torch.tensor([-1e-6]), torch.tensor([-50.0])  # where one form or the other loses all digits
    assert losses.log_odds_ratio(certain, unlikely).item() == pytest.approx(50 + math.log(1e6), rel=1e-4)


# ---- the trainers


@pytest.fixture(scope="module")
def made(compose, tiny_model_overrides, tiny_model, tmp_path_factory):
    """made(recipe, *overrides): its trainer on PAIRS, in float32, with a LoRA that changes something."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("made")

    def make(recipe, *overrides, own=False, trainer=None, continued=False, pairs=PAIRS, template=CHATML):
        plain = ["quantization=none", "trainer.bf16=false", "trainer.per_device_train_batch_size=4",
                 "trainer.train_sampling_strategy=sequential", "trainer.report_to=none"]  # fmt: skip
        target = [f"trainer._target_={OWN[recipe]}"] if own else []
        cfg = compose(recipe, *tiny_model_overrides, *plain, *target, *overrides)
        trainer = trainer or methods.trainer_class(recipe, cfg.trainer._target_)
        rows, tokenizer = Dataset.from_list(pairs), models.load_tokenizer(cfg.model)
        tokenizer.chat_template = template
        model = stir(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
        lora = config.build(cfg.lora, "lora", task_type="CAUSAL_LM")
        made = trainer(
            model=get_peft_model(model, lora) if continued else model,
            args=models.training_args(cfg.trainer, Run(folder, recipe, {})),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
            peft_config=None if continued else lora,
        )
        torch.manual_seed(0)
        for weights in made.model.parameters():
            if weights.requires_grad:
                torch.nn.init.normal_(weights, std=0.05)
        return made

    return make


def step(trainer):
    """(loss, gradients in one row, what is logged) of the rows as one batch."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    logged = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    return loss.item(), gradients, {name: values[-1] for name, values in logged["train"].items()}


def expected(recipe, trainer):
    """The loss of PAIRS from what a run's result.json is made of."""
    args, found = trainer.args, inference.pair_logps(trainer.model, trainer.processing_class, PAIRS)
    averages = [torch.tensor([row[f"{side}_logp"] / row[f"{side}_tokens"] for row in found]) for side in SIDES]
    nll = -sum(row["chosen_logp"] for row in found) / sum(row["chosen_tokens"] for row in found)
    if recipe == "orpo":
        return nll - args.beta * torch.nn.functional.logsigmoid(losses.log_odds_ratio(*averages)).mean().item()
    loss = losses.simpo_loss(*averages, args.beta, args.simpo_gamma, args.label_smoothing).mean().item()
    return loss + args.cpo_alpha * nll


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("orpo", ["trainer.beta=0.5"]),
        ("simpo", []),
        ("simpo", ["trainer.cpo_alpha=0.3", "trainer.label_smoothing=0.1"]),
    ],
)
def test_what_is_trained_is_what_is_measured(made, recipe, overrides):
    trainer = made(recipe, *overrides)
    assert step(trainer)[0] == pytest.approx(expected(recipe, trainer), rel=1e-5)


@pytest.mark.parametrize("recipe", ["dpo", *OWN])
def test_a_pair_starts_where_the_first_of_its_answers_does(made, recipe):
    """The blank that the prompt ends with is one token with "of", and one of its own before what no merge knows."""
    said = {"chosen": "of course", "rejected": "不"}
    pairs = [{**PAIRS[0], **{side: [{"role": "assistant", "content": text}] for side, text in said.items()}}]
    ends_in_a_blank = (
        "{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    )
    trainer = made(recipe, pairs=pairs, template=ends_in_a_blank)
    (row,) = trainer.train_dataset
    (found,) = inference.pair_logps(trainer.model, trainer.processing_class, pairs)
    starts = [inference.encode(trainer.processing_class, pairs[0]["prompt"], pairs[0][side])[1] for side in SIDES]
    assert len(row["prompt_ids"]) == starts[0] == starts[1] - 1
    assert [found[f"{side}_tokens"] for side in SIDES] == [len(row[f"{side}_ids"]) for side in SIDES]


@pytest.mark.parametrize(
    ("recipe", "overrides", "only_ours"),
    [
        ("orpo", ["trainer.beta=0.5"], ["trainer.disable_prompt_loss=false"]),
        ("simpo", [], []),
        ("simpo", ["trainer.cpo_alpha=0.3", "trainer.label_smoothing=0.1", "trainer.simpo_gamma=0.7"], []),
    ],
)
def test_parity_with_trls_own(made, recipe, overrides, only_ours):
    """On the same tokens, the prompt's in ORPO's likelihood, too: losses, gradients, and what is logged."""
    skip_without(OWN[recipe])
    loss, gradients, logged = step(made(recipe, *overrides, *only_ours))
    theirs, their_gradients, they_logged = step(made(recipe, *overrides, own=True))
    assert loss == pytest.approx(theirs, rel=1e-5)
    assert (gradients - their_gradients).norm() <= 1e-5 * their_gradients.norm()
    assert they_logged.keys() <= logged.keys()
    for name in set(ALIKE) & they_logged.keys():
        # TRL's CPO makes no likelihood where it has no weight
        if name != "nll_loss" or recipe == "orpo" or overrides:
            assert logged[name] == pytest.approx(they_logged[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("recipe", OWN)
def test_where_trls_own_differ(made, recipe):
    """TRL's trainers as they are: one more end of turn behind each answer; and the likelihood of ORPO is of prompt and
    answer."""
    skip_without(OWN[recipe])
    module, _, name = OWN[recipe].replace("Config", "Trainer").rpartition(".")
    theirs, ours = made(recipe, own=True, trainer=getattr(importlib.import_module(module), name)), made(recipe)
    eos = theirs.processing_class.eos_token_id
    for row, measured in zip(theirs.train_dataset, ours.train_dataset, strict=True):
        for side in SIDES:
            assert row[f"{side}_input_ids"] == [*measured["prompt_ids"], *measured[f"{side}_ids"], eos]
    truth = expected(recipe, ours)
    differences = [step(trainer)[0] / truth - 1 for trainer in (theirs, ours)]
    print(recipe, "loss trained against measured, TRL's own and ours:", differences)
    assert abs(differences[0]) > 1e-3 and abs(differences[1]) < 1e-5


@pytest.mark.parametrize("recipe", OWN)
def test_no_reference_is_computed_or_kept(made, recipe):
    """Of an adapter that is continued, of which TRL's DPOTrainer copies one and runs it beside the policy."""
    for trained, passes, adapters in ((recipe, 1, ["default"]), ("dpo", 2, ["default", "ref"])):
        trainer, seen = made(trained, continued=True), []
        trainer.model.register_forward_pre_hook(lambda *inputs, seen=seen: seen.append(inputs))
        step(trainer)
        assert len(seen) == passes and list(trainer.model.peft_config) == adapters
        assert trainer.model.active_adapter == "default"


# ---- what is refused


@pytest.mark.parametrize("recipe", OWN)
def test_a_trl_without_its_own_is_said_in_a_line(compose, tmp_path, monkeypatch, recipe):
    """And nothing of the recipe needs them."""
    for module in ("trl.experimental.cpo", "trl.experimental.orpo"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    cfg, own = compose(recipe), compose(recipe, f"trainer._target_={OWN[recipe]}")
    assert isinstance(models.training_args(cfg.trainer, Run(tmp_path, recipe, {})).beta, float)
    assert methods.trainer_class(recipe, cfg.trainer._target_).__module__ == "rlhf_recipes.preference.trainers"
    with pytest.raises(Refusal) as caught:
        models.training_args(own.trainer, Run(tmp_path, recipe, {}))
    assert str(caught.value).startswith(f"trainer._target_={OWN[recipe]}: cannot be imported (")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("Check it, or leave it out.")


@pytest.mark.parametrize("recipe", OWN)
def test_a_run_of_trls_own_is_not_continued_by_ours(compose, tmp_path, monkeypatch, recipe):
    from omegaconf import OmegaConf

    from rlhf_recipes import run, run_folder

    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "main", 3)
    cfg, theirs = compose(recipe), compose(recipe, f"trainer._target_={OWN[recipe]}")
    run_folder.mark(tmp_path / "main", recipe, OmegaConf.to_yaml(OmegaConf.create(run.resolved(theirs))))
    cfg.output_dir = theirs.output_dir = "main"
    with pytest.raises(Refusal, match=r"main holds an interrupted run with trainer\._target_=trl\.") as caught:
        Run.start(cfg, recipe)
    assert "\n" not in str(caught.value)
    assert Run.start(theirs, recipe).checkpoint


@pytest.mark.parametrize("recipe", OWN)
def test_trls_own_of_another_method_is_refused(compose, recipe):
    other = next(name for name in OWN if name != recipe)
    with pytest.raises(Refusal, match=f"is not for {recipe}, which takes rlhf_recipes.preference"):
        Run.start(compose(recipe, f"trainer._target_={OWN[other]}"), recipe)


@pytest.mark.parametrize("recipe", OWN)
def test_runs_of_trls_own_are_read_with_and_without_them(monkeypatch, recipe):
    from rlhf_recipes.publish import card

    assert config.trainer_recipes()[OWN[recipe]] == recipe
    skip_without(OWN[recipe])
    assert card._defaults("trainer", {"_target_": OWN[recipe]})["beta"] == 0.1
    monkeypatch.setitem(sys.modules, OWN[recipe].rpartition(".")[0], None)
    assert card._defaults("trainer", {"_target_": OWN[recipe]}) == {}
