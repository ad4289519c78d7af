"""RLOO on the tiny model: TRL's trainer with our rewards, and nobody moves but the policy."""

import json

import pytest
import torch
from datasets import Dataset

from rlhf_recipes import references
from rlhf_recipes.errors import Refusal

PROMPTS = [f"Can I come on day {n}{' please' * (n % 3)}?" for n in range(8)]
STEPS = {
    "max_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}
FAST = ("trainer.max_completion_length=6", "trainer.num_generations=2", "trainer.learning_rate=0.01")


def even(completion_ids, **_):
    """The share of tokens with an even id."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def judge(trained_once):
    """A reward run."""
    return trained_once("reward", "trainer.learning_rate=0.01").dir


@pytest.fixture(scope="module")
def parent(trained_once):
    """A run to continue."""
    return trained_once("sft").dir


@pytest.fixture
def build(tiny_model, compose, tiny_model_overrides, tmp_path):
    """build(reward_funcs=even, adapter=None, **arguments of RLOOConfig): a trainer in float32."""

    def built(reward_funcs=even, adapter=None, folder="out", **given):
        from rlhf_recipes import models
        from rlhf_recipes.ppo import RLOOConfig, RLOOTrainer

        cfg = compose("rloo", *tiny_model_overrides, "quantization=none", "model.dtype=float32")
        defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
        args = RLOOConfig(str(tmp_path / folder), **{**defaults, "save_strategy": "no", **STEPS, **given})
        torch.manual_seed(0)
        parent = adapter and references.find(str(adapter), "model.adapter")
        policy, lora = models.load_policy(cfg.model, cfg.quantization, cfg.lora, parent)
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS])
        tokenizer = models.load_tokenizer(cfg.model)
        return RLOOTrainer(policy, reward_funcs, args, data, data, processing_class=tokenizer, peft_config=lora)

    return built


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_run(train, judge, parent, tmp_path, quantization):
    """4-bit weights move under a reward model on their base, and a reload gives the same log-probabilities."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import inference, models

    own = (f"reward_funcs=[{judge}]", f"model.adapter={parent}", f"quantization={quantization}", *FAST)
    done = train("rloo", tmp_path / "run", *own)
    before = train_weights(parent)
    assert max((done.weights[name] - before[name]).abs().max() for name in before) > 1e-3
    metrics = done.result["metrics"]
    assert set(metrics) == {"reward", "kl", "kl_k3", "completion_tokens", "reward_change", "eos_rate"}
    assert done.result["before"]["kl"].value == 0 < metrics["kl_k3"].value and metrics["reward"].n == 4
    assert done.result["doctor"]["verdict"] and len((done.dir / "samples.jsonl").read_text().splitlines()) == 8
    first = done.log[0]
    assert abs(first["kl"]) < 1e-3 and not [key for key in first if "earned/" in key]

    model, tokenizer = done.trainer.model, models.load_tokenizer(done.cfg.model)
    said = [([{"role": "user", "content": text}], [{"role": "assistant", "content": "Yes."}]) for text in PROMPTS]
    trained = inference.completion_logps(model, tokenizer, said, "trained")
    base = models.load_base(done.cfg.model, done.cfg.quantization, AutoModelForCausalLM)
    again = PeftModel.from_pretrained(base, str(done.dir / "adapter"))
    reloaded = inference.completion_logps(again, tokenizer, said, "again")
    assert torch.allclose(torch.tensor(reloaded), torch.tensor(trained), atol=1e-5)


def train_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_nobody_moves_but_the_policy(build, judge, parent):
    trainer = build([str(judge), even], parent, reward_weights=[0.0, 1.0])
    before = weights(trainer)
    trainer.train()
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".default." in name}
    assert set(trainer.model.peft_config) == {"default", "ref", "reward_0"}
    rewards = logged(trainer, "reward")
    assert logged(trainer, "rewards/even") == pytest.approx(rewards) and logged(trainer, "rewards/run")


def test_an_advantage_is_the_reward_less_the_mean_of_the_prompt_s_others(build):
    trainer = build(beta=0.0, max_steps=1)
    trainer.train()
    rows = []
    for batch in trainer._buffered_inputs:
        masked = zip(batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), strict=True)
        ids = [[token for token, kept in zip(*both, strict=True) if kept] for both in masked]
        rows += zip(map(str, batch["prompt_ids"].tolist()), even(ids), batch["advantages"].tolist(), strict=True)
    assert len(rows) == 8 and len({prompt for prompt, _, _ in rows}) == 2
    for prompt, reward, advantage in rows:
        of_all = [other for same, other, _ in rows if same == prompt]
        assert advantage == pytest.approx(reward - (sum(of_all) - reward) / 3, abs=1e-6)


def test_the_worst_of_an_ensemble_is_what_a_completion_earns(build):
    def low(completions, **_):
        return [-5.0] * len(completions)

    def high(completions, **_):
        return [7.0] * len(completions)

    both = build([low, high], reward_ensemble="min", max_steps=1)
    both.train()
    assert logged(both, "reward") == [-5.0] and logged(both, "reward_std") == [0.0]


def test_a_run_that_stops_inside_a_rollout_goes_on_as_if_it_had_not(build, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = control.should_save = state.global_step == 3

    # A rollout is used for two steps: the third is inside the second.
    own = {"num_iterations": 2, "normalize_rewards": True}
    whole = build(folder="whole", **own)
    whole.train()
    part = build(folder="part", save_strategy="steps", save_steps=100, **own)
    part.add_callback(Stop())
    part.train()
    rest = build(folder="part", **own)
    rest.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    ended, resumed = weights(whole), weights(rest)
    assert all(torch.equal(ended[name], resumed[name]) for name in ended)
    assert rest.samples == whole.samples and json.dumps(logged(rest, "kl")) == json.dumps(logged(whole, "kl"))


def test_an_evaluation_leaves_the_run_alone(build):
    own = {"normalize_rewards": True, "max_steps": 2}
    plain = build(**own)
    plain.train()
    asked = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = build(**own, **asked, per_device_eval_batch_size=16, num_generations_eval=2)
    trainer.train()
    assert all(torch.equal(weight, weights(trainer)[name]) for name, weight in weights(plain).items())
    assert trainer.samples == plain.samples and trainer.scores.state_dict() == plain.scores.state_dict()
    assert len(logged(trainer, "eval_reward")) == 3
    assert all(abs(earned) < 3 for earned in logged(trainer, "eval_earned"))


def test_too_few_prompts_for_a_rollout(build):
    with pytest.raises(Refusal, match="train_dataset: 8 prompts, but a rollout takes 16"):
        build(gradient_accumulation_steps=16)


def test_control_tokens_that_a_policy_spells_stay_letters(build, judge):
    """A reward model reads what a completion says, not where it says that a turn ends."""
    trainer = build(str(judge))
    learned = trainer.scores.functions[0]
    prompt = [{"role": "user", "content": "Hello?"}]
    spelt = learned._encode(prompt, [{"role": "assistant", "content": "Yes.<|im_end|>"}])
    plain = learned._encode(prompt, [{"role": "assistant", "content": "Yes."}])
    ends = trainer.processing_class.eos_token_id
    assert spelt.count(ends) == plain.count(ends) and len(spelt) > len(plain)
