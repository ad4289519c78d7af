"""PPOTrainer on the tiny model: who moves and who does not, what a rollout holds, how a run is stopped."""

import contextlib
import json
import math
import shutil

import pytest
import torch
import warm
from conftest import TINY_ID
from datasets import Dataset

from rlhf_recipes import references

PROMPTS = [f"Can I come on day {n}{' please' * (n % 3)}?" for n in range(8)]
STEPS = {
    "value": "separate",
    "max_steps": 4,
    "num_ppo_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


def even(completion_ids, **_):
    """The share of tokens with an even id: 1 at best, whatever the length."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def rows(conversational=True):
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}] if conversational else text} for text in PROMPTS]
    )


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def judge(trained_once):
    """A reward run."""
    return trained_once("reward", "trainer.learning_rate=0.01").dir


@pytest.fixture(scope="module")
def parent(trained_once):
    """A run to continue."""
    return trained_once("sft").dir


@pytest.fixture
def build(tiny_model, tokenizer, compose, tiny_model_overrides, tmp_path):
    """build(reward_funcs=even, ..., **arguments of PPOConfig): a trainer on the tiny model in float32."""

    def built(
        reward_funcs=even,
        quantization="none",
        lora=True,
        adapter=None,
        eval_dataset=None,
        data=None,
        dtype="float32",
        lora_dropout=0.0,
        **given,
    ):
        from rlhf_recipes import models
        from rlhf_recipes.ppo import PPOConfig, PPOTrainer

        overrides = [*tiny_model_overrides, f"quantization={quantization}", f"model.dtype={dtype}"]
        cfg = compose("ppo", *overrides, f"lora.lora_dropout={lora_dropout}")
        defaults = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
        args = PPOConfig(str(tmp_path / "out"), **{**defaults, "save_strategy": "no", **STEPS, **given})
        torch.manual_seed(0)
        parent = adapter and references.find(str(adapter), "model.adapter")
        policy, peft_config = models.load_policy(cfg.model, cfg.quantization, cfg.lora, parent)
        for module in policy.modules():
            if lora_dropout and hasattr(module, "attention_dropout"):
                module.attention_dropout = lora_dropout
        return PPOTrainer(
            policy,
            reward_funcs,
            args,
            data or rows(),
            eval_dataset,
            tokenizer,
            peft_config=peft_config if lora else None,
        )

    return built


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def weights(trainer):
    copies = {f"{n}.{k}": p for n, c in trainer.roles.copies.items() for k, p in c.named_parameters()}
    own = {**dict(trainer.model.named_parameters()), **copies, "value_head": trainer.roles.value_head.weight}
    return {name: p.detach().clone() for name, p in own.items()}


def adapters(trainer):
    return set(trainer.model.peft_config)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("value", ["separate", "head"])
def test_policy_and_critic_move_and_nobody_else(build, judge, parent, quantization, value):
    trainer = build(str(judge), quantization, adapter=parent, value=value)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}

    assert adapters(trainer) == {"default", "reference", "reward_0", *(["critic"] if value == "separate" else [])}
    expected = {name for name in before if ".default." in name or ".critic." in name or name == "value_head"}
    assert moved == expected
    assert ("critic" in str(moved)) == (value == "separate")


def test_first_ratio_is_one_and_first_kl_zero(build):
    trainer = build(num_mini_batches=2, per_device_train_batch_size=1, temperature=0.7, top_k=50)
    trainer.train()
    assert logged(trainer, "ratio/min")[0] == logged(trainer, "ratio/max")[0] == 1
    assert logged(trainer, "kl")[0] == logged(trainer, "kl_k3")[0] == 0
    assert logged(trainer, "ratio/max")[1] != 1  # the second mini-batch meets a policy that has moved
    assert logged(trainer, "sampling/logp_difference")[0] < 1e-4  # the sampler's, with a cache, in float32
    assert len(trainer.state.log_history) == 5


def test_what_the_log_says_of_a_rollout(build):
    trainer = build(max_steps=1, missing_eos_penalty=1.0)
    trainer.train()
    row = trainer.state.log_history[0]
    assert len(trainer.samples) == 4 and trainer.samples[0]["prompt"] in rows()["prompt"]
    assert row["reward"] == pytest.approx(sum(s["reward"] for s in trainer.samples) / 4, abs=1e-4)
    assert row["completions/mean_length"] <= 8 and row["entropy"] == pytest.approx(6.9, abs=0.1)  # ln 1000
    seconds = {"seconds/rollout", "seconds/scoring", "seconds/update", "tokens_per_second"}
    of_rollout = {"kl_coef", "reward_std", "explained_variance", "advantage/mean", "advantage/std"}
    of_texts = {"completions/eos_rate", "completions/distinct_2"}
    of_update = {"clip_fraction/policy", "clip_fraction/value", "approx_kl", "loss/value", "grad_norm"}
    assert seconds | of_rollout | of_texts | of_update <= row.keys()


def test_what_an_episode_earns(build):
    """Rewards 1 and 3, mean 2, deviation 1; the second completion lacks EOS and uses 7 of 8 tokens, 4 of which are for
    a soft landing."""
    from rlhf_recipes.ppo.rollout import Completions

    completions = Completions([[5, 2], [5] * 7], ["a", "b"], [], [True, False])

    def earned(scale=1.0, **given):
        trainer = build(lambda **_: [1.0 * scale, 3.0 * scale], **given)
        parts = trainer.scores.rewards(list(rows())[:2], completions, trainer.state)
        return trainer.scores.earned(parts, completions.finished, trainer.gather).tolist()

    assert earned() == [-1, 1]
    assert earned(missing_eos_penalty=2.5) == [-1, -1.5]
    assert earned(soft_punish_cache=4) == [-1, 0.25]  # (8 - 4 - 7) / 4 = -0.75
    assert earned(reward_clip_range=(-2, 0.5)) == [-1, 0.5]
    assert earned(normalize_rewards=True, missing_eos_penalty=0.5) == pytest.approx([-1, 0.5])
    for scale in (0.01, 100.0):  # a reward has no zero and no unit: half a deviation is half a deviation
        assert earned(scale, missing_eos_penalty=0.5) == pytest.approx([-scale, scale / 2])


def test_an_ensemble_is_put_on_one_scale(build, judge, tmp_path, capsys):
    """Copies of one reward model whose runs report other means and deviations: the worst case is the larger mean's."""
    from rlhf_recipes.ppo.rollout import Completions

    for name, mean in (("a", 0.5), ("b", 1.5), ("silent", None)):
        shutil.copytree(judge / "adapter", tmp_path / name / "adapter")
        interval = {"low": None, "high": None, "n": 1, "clusters": 1}
        told = {"mean_reward": {"value": mean} | interval, "sd_reward": {"value": 2.0} | interval} if mean else {}
        (tmp_path / name / "result.json").write_text(json.dumps({"recipe": "reward", "metrics": told}))
    two = [{"role": "user", "content": text} for text in PROMPTS[:2]]
    completions = Completions([[5, 2], [5] * 7], ["a", "b"], [], [True, False])

    def parts(*names, **given):
        trainer = build([str(tmp_path / name) for name in names], **given)
        return trainer.scores.rewards([{"prompt": [turn]} for turn in two], completions, trainer.state)

    raw = parts("a")["reward"]
    worst = parts("a", "b", reward_ensemble="min")
    torch.testing.assert_close(worst["reward"], (raw - 1.5) / 2)
    torch.testing.assert_close(worst["reward_disagreement"], torch.full((2,), 0.25))
    torch.testing.assert_close(worst["rewards/a"], raw)  # the log has each as it is
    torch.testing.assert_close(parts("a", "b")["reward"], 2 * raw)
    assert not capsys.readouterr().out
    torch.testing.assert_close(parts("silent", "b", reward_ensemble="mean")["reward"], (raw + (raw - 1.5) / 2) / 2)
    assert "the run of silent does not say the mean and deviation" in capsys.readouterr().out


def test_the_folder_of_an_ensemble_names_its_members(judge, tmp_path, monkeypatch):
    for name in ("member_0", "member_1"):
        shutil.copytree(judge, tmp_path / "ensemble" / name)
    monkeypatch.chdir(tmp_path)
    both = ["ensemble/member_0", "ensemble/member_1"]
    assert [each.reference for each in references.find_rewards("ensemble")] == both
    found = references.find_rewards(["ensemble", "json:loads"])
    assert [each.reference for each in found] == [*both, "json:loads"]
    (tmp_path / "ensemble" / "member_1" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"^reward_funcs=ensemble: member_1 is not finished\."):
        references.find_rewards("ensemble")


@pytest.mark.parametrize("value", ["separate", "head"])
@pytest.mark.parametrize("given", [{}, {"missing_eos_penalty": 1.0}, {"reward_weights": [-5.0]}], ids=str)
def test_the_critic_starts_no_worse_than_a_constant(build, judge, value, given):
    trainer = build(str(judge), value=value, **given)
    micro_batches = trainer._roll_out(list(rows())[:4])
    assert trainer._rollout_log["explained_variance"] > -1e-6
    again = trainer.actor_critic.act(micro_batches[0].batch)[2]
    torch.testing.assert_close(again, micro_batches[0].batch.packed(micro_batches[0].old_values))


def test_the_critics_clip_is_in_deviations_of_the_returns(build, monkeypatch):
    from rlhf_recipes.ppo import algorithm

    value_loss, cliprange = algorithm.value_loss, []
    monkeypatch.setattr(algorithm, "value_loss", lambda *given: cliprange.append(given[3]) or value_loss(*given))

    def found(scale, given):
        build(lambda completion_ids, **_: [scale * r for r in even(completion_ids)], max_steps=1, **given).train()
        return cliprange[-1]

    given = {"kl_coef": 0.0, "cliprange_value": 0.2}
    assert found(100.0, given) == pytest.approx(100 * found(1.0, given), rel=1e-4) != 0
    assert found(1.0, given | {"cliprange_value": None}) is None


def test_dropout_is_off_everywhere(build, judge):
    """In the critic's and the reward model's adapters too, and in attention."""
    trainer = build(str(judge), lora_dropout=0.1)
    rates = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert {"default", "critic", "reward_0"} == adapters(trainer) and rates and set(rates) == {0.0}
    assert {m.attention_dropout for m in trainer.model.modules() if hasattr(m, "attention_dropout")} == {0.0}


def test_rows_are_made_where_they_cost_less():
    from rlhf_recipes.packing import find_rows

    def found(shared, lengths, hidden_size=64):
        return find_rows(lengths, hidden_size, shared)

    assert found(0, [32, 32, 32, 32]) == []
    assert found(16, [40, 24, 40, 24]) == [[0, 2, 1, 3]]  # 80 tokens, filled up to 96; each padded, 160
    assert found(0, [96, 32, 32, 32]) == [[0], [1, 2, 3]]  # nothing in common, and yet less padding
    assert found(64, [320, 320], hidden_size=16) == []  # attention over 576 costs more than 64 tokens
    assert found(64, [320, 320], hidden_size=4096) == [[0, 1]]
    # Three rows of 128 cost less than two of 192 or one of 320.
    assert found(0, [128, 96, 32, 64, 32], hidden_size=16) == [[0], [1, 4], [3, 2]]


@pytest.mark.parametrize("value", ["separate", "head"])
def test_the_fast_way_is_the_plain_way(build, judge, parent, value, monkeypatch):
    """Several episodes in a row, and the first forward pass kept: losses, rewards and weights are those of episodes
    padded and a pass for each use."""
    from rlhf_recipes import packing

    def trained(fast):
        trainer = build(str(judge), adapter=parent, value=value, learning_rate=1e-3, entropy_coef=0.01,
                        num_mini_batches=2, per_device_train_batch_size=4, gradient_accumulation_steps=1)  # fmt: skip
        shapes, states, act = [], trainer.roles.states, trainer.actor_critic.act
        trainer.roles.states = lambda decoder, ids_PL, packed: (
            shapes.append(ids_PL.shape) or states(decoder, ids_PL, packed)
        )
        if fast:
            packing.allow(trainer.model)
        else:
            trainer.actor_critic.act = lambda batch, keep=False: act(batch)
        trainer.train()
        return trainer, shapes

    (fast, fast_shapes), (plain, plain_shapes) = trained(True), trained(False)
    passes = 4 * (2 if value == "separate" else 1)  # of the steps, each of a micro-batch
    assert len(plain_shapes) - len(fast_shapes) == 1 and len(plain_shapes) >= passes + 6
    assert {shape[0] for shape in plain_shapes} == {4} and {shape[0] for shape in fast_shapes} < {1, 2, 3}
    for key in ("loss", "reward", "kl", "entropy", "loss/value", "explained_variance", "grad_norm", "ratio/max"):
        assert logged(fast, key) == pytest.approx(logged(plain, key), rel=1e-5, abs=1e-6), key
    assert logged(fast, "ratio/min")[0] == logged(fast, "ratio/max")[0] == 1
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(fast)[name], weight, atol=2e-4, rtol=1e-3)
    assert fast.roles.decoder.packing.proven and not fast.roles.decoder.packing.refused


@pytest.mark.parametrize("value", ["separate", "head"])
def test_micro_batches_do_not_change_the_update(build, value):
    results = []
    for size in (1, 2, 4):
        trainer = build(
            value=value, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size
        )
        trainer.train()
        results.append(weights(trainer))
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(other[name], weight, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_gradient_checkpointing_changes_nothing(build, lora):
    results = []
    for checkpointing in (False, True):
        trainer = build(lora=lora, max_steps=2, gradient_checkpointing=checkpointing, learning_rate=1e-3)
        trainer.train()
        assert trainer.roles.causal.is_gradient_checkpointing == checkpointing
        results.append(weights(trainer))
    assert all(torch.equal(weight, results[1][name]) for name, weight in results[0].items())


def test_without_lora_the_whole_model_trains(build, judge, tmp_path):
    trainer = build(str(judge), lora=False, learning_rate=1e-3)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if not name.startswith("reference.")}
    trainer.save_model(str(tmp_path / "saved"))
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], p) for name, p in trainer.model.state_dict().items())


def test_the_saved_policy_is_an_ordinary_adapter(build, tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = build()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "saved").eval()
    ids = torch.tensor([[1, 5, 9, 30]])
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(policy(ids).logits, trainer.model(ids).logits)


def test_the_critic_starts_as_the_reward_model(build, judge):
    """V of the last state is the reward model's score of a text that ends there."""
    trainer = build(str(judge))
    ids = trainer.processing_class.apply_chat_template(
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}], return_dict=False
    )
    with torch.no_grad(), trainer.roles.acting("critic") as decoder:
        value = trainer.roles.values(decoder(torch.tensor([ids])).last_hidden_state[0, -1:])
    score = trainer.reward_funcs[0](
        [[{"role": "user", "content": "hello"}]], [[{"role": "assistant", "content": "there"}]], 1
    )
    assert value.item() == pytest.approx(score[0], abs=1e-6) and score[0] != 0


def test_the_reward_model_scores_as_it_does_alone(build, judge, compose, tiny_model_overrides, tokenizer):
    """On the policy's backbone, and as a model of its own for a policy without LoRA."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from rlhf_recipes import inference, models

    prompts = [row["prompt"] for row in rows()]
    answers = [[{"role": "assistant", "content": f"Yes, on day {n}. <|im_end|>"}] for n in range(8)]
    cfg = compose("ppo", *tiny_model_overrides, "quantization=none", "model.dtype=float32")
    base = models.load_base(cfg.model, cfg.quantization, AutoModelForSequenceClassification, num_labels=1)
    alone = PeftModel.from_pretrained(base, judge / "adapter")
    typed = [[{**turn, "content": turn["content"].replace("<|im", "< |im")} for turn in answer] for answer in answers]
    expected = inference.rewards(alone, tokenizer, [p + a for p, a in zip(prompts, typed, strict=True)])
    for trainer in (build(str(judge)), build(str(judge / "adapter")), build(alone, lora=False)):
        assert trainer.reward_funcs[0](prompts, answers, 3) == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_text(build, tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    other = tokenizer.train_new_from_iterator(PROMPTS, 300)
    config = LlamaConfig(
        vocab_size=len(other), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, pad_token_id=other.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "judge")
    other.save_pretrained(tmp_path / "judge")
    trainer = build(str(tmp_path / "judge"), max_steps=2)
    trainer.train()
    assert trainer.stopped is None and logged(trainer, "reward_std")[0] > 0

    prompts, answers = (
        rows()["prompt"][:2],
        [[{"role": "assistant", "content": text}] for text in ("Yes.", "No, never")],
    )
    texts = [other.apply_chat_template(p + a, return_tensors="pt") for p, a in zip(prompts, answers, strict=True)]
    expected = [model(**text).logits.item() for text in texts]
    assert trainer.reward_funcs[0](prompts, answers, 2) == pytest.approx(expected, abs=1e-5)


def test_sampling_from_merged_copies_is_the_same_policy(build):
    def sampled(merge, lora):
        trainer = build(max_steps=2, merge_to_sample=merge)
        if lora:
            for name, parameter in trainer.roles.policy_parameters.items():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
        before = weights(trainer)
        completions = trainer.complete(list(rows()), list(range(8)))[1]
        assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
        return completions

    plain, merged, untrained = sampled(False, True), sampled(True, True), sampled(True, False)
    assert plain.ids == merged.ids != untrained.ids
    for a, b in zip(plain.logps, merged.logps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_sample_depends_on_its_seed_alone(build):
    trainer, data = build(), list(rows())
    together = trainer.complete(data, list(range(8)))[1]
    alone = [trainer.complete([data[i]], [i])[1].ids[0] for i in range(8)]
    assert together.ids == alone
    trainer.args.local_rollout_forward_batch_size = 3
    in_turns = trainer.complete(data, list(range(8)))[1]
    assert in_turns.ids == together.ids and in_turns.texts == together.texts and len(in_turns.logps) == 8
    assert together.ids != trainer.complete(data, list(range(1, 9)))[1].ids


def test_what_is_penalised_is_the_policy_not_its_sampler(build, capsys):
    """A sampler that rounds elsewhere: neither the penalty nor the ratio of a second mini-batch knows it."""
    trainer = build(num_mini_batches=2, per_device_train_batch_size=1, kl_coef=1.0)
    complete = trainer.complete

    def rounded(*given):
        prompts, completions = complete(*given)
        completions.logps = [logps + 0.5 for logps in completions.logps]
        return prompts, completions

    trainer.complete = rounded
    micro_batches = trainer._roll_out(list(rows())[:4])
    for m in micro_batches:
        torch.testing.assert_close(m.old_logps, m.reference_logps)
        assert m.rewards[:, :-1].abs().max() < 1e-6
    assert any(m.rewards[:, -1].abs().max() > 0 for m in micro_batches)
    assert trainer._rollout_log["kl"] == pytest.approx(0, abs=1e-5)
    assert trainer._rollout_log["sampling/logp_difference"] == pytest.approx(0.5, abs=1e-5)
    assert trainer._rollout_log["sampling/kl"] == pytest.approx(0.5 + math.exp(-0.5) - 1, abs=1e-5)  # k3 at -0.5
    trainer.train()
    assert "sampling: the last samples are 0.1 nats a token from the policy" in capsys.readouterr().out
    build(max_steps=4).train()
    assert "sampling:" not in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_bfloat16_the_sampler_is_the_policy(build, quantization):
    """After steps of a small rate, which are lost where a LoRA is added to weights of 16 bits."""
    trainer = build(quantization=quantization, dtype="bfloat16", bf16=True, merge_to_sample=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.roles.policy_parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2e-4, generator=generator)
    trainer._roll_out(list(rows())[:4])
    log = trainer._rollout_log
    assert log["kl_k3"] > 0
    assert log["sampling/kl"] < 0.1 * log["kl_k3"] / log["completions/mean_length"]


def test_logits_are_float32_whatever_the_precision(build):
    trainer = build(dtype="bfloat16", bf16=True)
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, head = torch.arange(64), trainer.roles.head.weight
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = trainer.roles.token_logps("default", hidden, tokens, 1.0)
        with trainer.roles.exact_head():
            sampled = trainer.roles.head(hidden)
    exact = torch.nn.functional.linear(hidden.double(), head.double()).log_softmax(-1)
    for found in (logps, sampled.log_softmax(-1)[range(64), tokens]):
        torch.testing.assert_close(found.double(), exact[range(64), tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_samples_follow_the_distribution():
    from rlhf_recipes.ppo.rollout import Sampler

    logits, draws = torch.tensor([0.0, 1.0, 2.0, 3.0]), 20_000
    sampler = Sampler(list(range(draws)), torch.device("cpu"), 1, temperature=0.5, top_k=3, top_p=1.0)
    chosen = sampler.choose(logits.expand(draws, -1), range(draws))
    kept = torch.tensor([-torch.inf, 1, 2, 3]) / 0.5
    torch.testing.assert_close(torch.bincount(chosen, minlength=4) / draws, kept.softmax(0), atol=0.01, rtol=0)
    logps = torch.tensor(sampler.logps)[:, 0]  # of the whole distribution
    torch.testing.assert_close(logps, (logits / 0.5).log_softmax(0)[chosen])


def test_pad_equal_to_eos_is_no_trouble(build):
    trainer = build(max_steps=2)
    trainer.train()
    expected = weights(trainer)
    trainer = build(max_steps=2)
    trainer.processing_class.pad_token = trainer.processing_class.eos_token
    trainer.train()
    for name, weight in weights(trainer).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-5)


def test_plain_prompts_and_columns(build):
    seen = []

    def reward(prompts, completions, completion_ids, trainer_state, note):
        seen.append((prompts, completions, note, trainer_state.global_step))
        return [None, 1.0, 2, 0.5][: len(prompts)]

    def zero(completions, **_):
        return [0.0] * len(completions)

    data = rows(conversational=False).add_column("note", PROMPTS)
    trainer = build([reward, zero, zero], data=data, max_steps=2, reward_weights=[1.0, 1.0, 0.5])
    trainer.train()
    prompts, completions, note, step = seen[0]
    assert prompts == note and all(isinstance(text, str) for text in completions) and step == 0
    assert trainer.state.log_history[0]["rewards/reward"] == pytest.approx(3.5 / 3)
    assert trainer.state.log_history[0]["rewards/zero_1"] == trainer.state.log_history[0]["rewards/zero_2"] == 0
    assert trainer.state.log_history[0]["reward"] == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
    ("answer", "message"),
    [([1.0], "gave 1 rewards for 4"), ([1.0, 2.0, float("nan"), 1.0], "gave nan"), ([None] * 4, "returned None")],
)
def test_a_reward_that_is_none_is_refused(build, answer, message):
    with pytest.raises(ValueError, match=message):
        build(lambda **_: answer).train()


def test_the_arguments_tell_the_chat_template(build, judge, tokenizer):
    """Of prompts, and of what a reward model on the policy's backbone reads."""
    from rlhf_recipes.data.template import encode_prompt

    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    trainer = build(str(judge), chat_template_kwargs={"mood": "calm"})
    prompt, answer = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "there"}]
    for ids in (encode_prompt(trainer.processing_class, prompt), trainer.reward_funcs[0]._encode(prompt, answer)):
        assert tokenizer.decode(ids).startswith("calm<|im_start|>")


def test_too_few_prompts_are_refused(build):
    with pytest.raises(ValueError, match="8 prompts, but a rollout takes 12"):
        build(gradient_accumulation_steps=6)


def test_the_brake_restores_the_last_good_policy(build):
    trainer = build(max_steps=40, learning_rate=0.5, kl_target=0.05, kl_coef=0.0, num_ppo_epochs=1)
    good = []
    govern = trainer._govern

    def watched():
        govern()
        good.append({n: p.detach().clone() for n, p in trainer.roles.policy_parameters.items()})

    trainer._govern = watched
    trainer.train()
    assert "over 5 times kl_target=0.05" in trainer.stopped
    assert trainer.state.global_step == len(good) < 40
    assert logged(trainer, "kl")[-1] > 0.25 > logged(trainer, "kl")[-2]
    # The weights behind the last rollout that was within bounds.
    assert all(torch.equal(p, good[-2][n]) for n, p in trainer.roles.policy_parameters.items())


def test_a_step_that_is_not_finite_is_not_taken(build):
    trainer = build(max_steps=6)
    backward = trainer.actor_critic.backward

    def broken(micro, *others):
        if trainer.state.global_step == 3:
            micro.advantages = micro.advantages * torch.nan
        return backward(micro, *others)

    trainer.actor_critic.backward = broken
    trainer.train()
    assert trainer.stopped == "the gradient is not finite at step 3" and trainer.state.global_step == 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_collapsed_entropy_ends_the_run(build, tmp_path):
    """And its step is not saved: who is killed before the result is written meets the brake again."""
    trainer = build(entropy_floor=6.95, save_strategy="steps", save_steps=1)  # above ln 1000
    before = weights(trainer)
    trainer.train()
    assert "under entropy_floor=6.95" in trainer.stopped
    assert trainer._saved() == f"The training was over: {trainer.stopped}."  # where the rollout's server is gone
    assert trainer.state.global_step == 1 and not list((tmp_path / "out").glob("checkpoint-*"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())


def test_limit_keeps_what_was_reached(build):
    trainer = build(max_steps=40, kl_controller="limit", kl_target=0.3, kl_coef=0.0)
    trainer.train()
    assert "reached kl_target=0.3" in trainer.stopped and trainer.state.global_step < 40
    episodes = trainer.measure(rows())
    assert sum(e["kl_k3"] for e in episodes) / len(episodes) > 0.05


def test_limit_asks_the_whole_rollout(build):
    """8 nats in the first mini-batch and 0 in the second are 4, under a limit of 6."""
    trainer = build(num_mini_batches=2, max_steps=2, kl_controller="limit", kl_target=6.0)
    logps, seen = trainer.logps, []

    def shifted(role, batch):
        seen.append(role)
        return logps(role, batch) - (seen.count("reference") <= 2) * (role == "reference")

    trainer.logps = shifted
    trainer.train()
    assert trainer.stopped is None and logged(trainer, "kl")[0] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("stops", [False, True])
def test_float16_unscales_once(build, stops, monkeypatch):
    """As on a GPU without bfloat16: a GradScaler, both norms, and a step that is dropped."""
    trainer = build(max_steps=3, entropy_floor=9.0 if stops else None, learning_rate=1e-3)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.native_amp = trainer.args.fp16 = True
    accelerator.autocast = contextlib.nullcontext
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    before = weights(trainer)
    norms, clip = [], trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: norms.append(clip(model)) or norms[-1]
    trainer.train()
    after = weights(trainer)
    if stops:
        assert "under entropy_floor" in trainer.stopped
        assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    else:
        monkeypatch.undo()
        plain = build(max_steps=3, entropy_floor=None, learning_rate=1e-3)
        plain.train()
        assert [float(norm) for norm in norms] == pytest.approx(logged(plain, "grad_norm"))
        assert all(torch.equal(weight, after[name]) for name, weight in weights(plain).items())


def test_evaluate_reports_and_leaves_the_run_alone(build):
    plain = build()
    plain.train()
    trainer = build(eval_dataset={"a": rows(), "b": rows()}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert all(torch.equal(weight, weights(trainer)[name]) for name, weight in weights(plain).items())
    metrics = trainer.evaluate()
    for key in ("reward", "kl", "kl_k3", "completions/mean_length", "completions/eos_rate"):
        assert metrics[f"eval_a_{key}"] == metrics[f"eval_b_{key}"]
    assert len(logged(trainer, "eval_a_reward")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", "head"])
def test_it_learns(build, value):
    """To prefer even tokens, whose embeddings differ from odd ones' in one direction, on prompts that it never saw."""
    prompts = [{"prompt": f"Can I come on day {n}?"} for n in range(64)]
    trainer = build(
        value=value, data=Dataset.from_list(prompts), max_steps=60, learning_rate=3e-3, kl_coef=0.01,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, per_device_eval_batch_size=64,
    )  # fmt: skip
    trainer.roles.head.weight.data[::2, 0] += 0.3
    trainer.roles.head.weight.data[1::2, 0] -= 0.3
    held_out = Dataset.from_list([{"prompt": f"What about {n}?"} for n in range(64)])
    before = trainer.evaluate(held_out)["eval_reward"]
    trainer.train()
    after = trainer.evaluate(held_out)
    assert trainer.stopped is None
    assert before < 0.2 and after["eval_reward"] > 0.9 and after["eval_kl"] < 6


def test_recipe(run_recipe, judge, tiny_overrides, tmp_path):
    """The command line: a run of its own kind, whose table of samples is in result.json."""
    overrides = [*tiny_overrides, "trainer.max_completion_length=8", "trainer.num_ppo_epochs=1"]
    done = run_recipe("ppo", *overrides, f"reward_funcs={judge}", cwd=tmp_path, env={warm.DRAWN: "1"})
    assert done.returncode == 0, done
    folder = tmp_path / "outputs" / "ppo" / "main"
    result = json.loads((folder / "result.json").read_text())
    assert result["main"]["name"] == "reward" and result["metrics"]["kl"]["n"] == 4
    assert [result["before"]["kl"][key] for key in ("value", "low", "high")] == [0, 0, 0]
    assert result["stopped"] is None and len(result["samples"]) == 4
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == TINY_ID
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples[-4:] == result["samples"] and {"prompt", "completion", "reward"} <= samples[0].keys()
    assert "outputs/ppo/main" in done.stdout and (folder / "curves.png").is_file()
