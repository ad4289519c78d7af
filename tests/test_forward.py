"""Answers alone through the head, what a pair shares once: the same losses and gradients as TRL's own forward."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, family

from rlhf_recipes.packing import PADDING, pack
from rlhf_recipes.preference import forward, packed_batches
from rlhf_recipes.preference.packed_batches import PackedBatches

WORDS = ("call", "the", "clinic", "pain", "today", "no", "Friday", "why")
WINDOWED = ("mistral", "phi3")  # whose window is that of all layers


def test_sequences_are_packed_by_hand():
    """1 2 | 3 and 1 2 | 4 5; then 6 against 7 8; then one that begins with the whole other; then three, and one."""
    rows = [[[1, 2, 3], [1, 2, 4, 5]], [[6], [7, 8]], [[1, 2], [1, 2, 9]], [[1, 2], [1, 3], [1, 4]], [[5, 6]]]
    packed = pack(rows, "cpu")
    assert packed.ids_PL[:, :6].tolist() == [
        [1, 2, 3, 4, 5, 0], [6, 7, 8, 0, 0, 0], [1, 2, 9, 0, 0, 0], [1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0]
    ]  # fmt: skip
    assert packed.positions_PL[:, :5].tolist() == [
        [0, 1, 2, 2, 3], [0, 0, 1, 0, 0], [0, 1, 2, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 0]
    ]  # fmt: skip
    assert packed.part_PL[:, :5].tolist() == [
        [0, 0, 1, 2, 2], [1, 2, 2, PADDING, PADDING], [0, 0, 2, PADDING, PADDING],
        [0, 1, 2, 3, PADDING], [0, 0, PADDING, PADDING, PADDING],
    ]  # fmt: skip
    L = packed.ids_PL.shape[1]
    assert packed.index_BT.tolist() == [
        [0, 1, 2, 0], [0, 1, 3, 4], [L, 0, 0, 0], [L + 1, L + 2, 0, 0],
        [2 * L, 2 * L + 1, 0, 0], [2 * L, 2 * L + 1, 2 * L + 2, 0],
        [3 * L, 3 * L + 1, 0, 0], [3 * L, 3 * L + 2, 0, 0], [3 * L, 3 * L + 3, 0, 0],
        [4 * L, 4 * L + 1, 0, 0],
    ]  # fmt: skip
    seen = [set(row.nonzero().flatten().tolist()) for row in packed.visible()[0, 0, :5]]
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 1, 3, 4}]
    near = [set(row.nonzero().flatten().tolist()) for row in packed.visible(2)[0, 0, :5]]
    assert near == [{0}, {0, 1}, {1, 2}, {1, 3}, {3, 4}]


def test_lists_that_share_nothing_lie_in_one_row_and_see_their_own_alone():
    packed = pack([[[1, 2, 3], [1, 2, 4]], [[6]], [[7], [8, 9]]], "cpu", rows=[[2, 0], [1]])
    assert packed.ids_PL[:, :8].tolist() == [[7, 8, 9, 1, 2, 3, 4, 0], [6, *[0] * 7]]
    assert packed.positions_PL[0, :7].tolist() == [0, 0, 1, 0, 1, 2, 2]
    L = packed.ids_PL.shape[1]
    assert packed.index_BT.tolist() == [[3, 4, 5], [3, 4, 6], [L, 0, 0], [0, 0, 0], [1, 2, 0]]
    seen = [set(row.nonzero().flatten().tolist()) for row in packed.visible()[0, 0, :9]]
    assert seen == [{0}, {1}, {1, 2}, {3}, {3, 4}, {3, 4, 5}, {3, 4, 6}, {7}, {8}]
    near = [set(row.nonzero().flatten().tolist()) for row in packed.visible(2)[0, 0, :7]]
    assert near == [{0}, {1}, {1, 2}, {3}, {3, 4}, {4, 5}, {4, 6}]


def batch(P=5, T=150):
    """Random pairs that share nothing, some, all of one answer, and all."""
    drawn = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(10, 500, (2 * P, T), generator=drawn)
    mask_BT = torch.ones_like(ids_BT)
    for row, (same, n, m) in enumerate(
        [(0, 150, 100), (70, 120, 150), (149, 149, 150), (100, 140, 110), (130, 130, 130)]
    ):
        ids_BT[row + P, :same] = ids_BT[row, :same]
        mask_BT[row, n:], mask_BT[row + P, m:] = 0, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": ids_BT.masked_fill(mask_BT == 0, -100)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "rows_of"),
    [
        ("sdpa", {2: [[0, 3], [1, 2, 4]]}),  # pairs
        ("eager", {2: [[0, 3], [1, 2, 4]]}),
        ("sdpa", {1: [[0, 2, 6], [3, 4, 7], [1, 5, 8, 9]]}),  # answers
    ],
)
@pytest.mark.parametrize("name", [*FAMILIES, *(f"{name} windowed" for name in WINDOWED)])
def test_states_and_gradients_are_those_of_two_rows(tmp_path, monkeypatch, name, attention, rows_of):
    from transformers import AutoModelForCausalLM

    [(together, wanted)] = rows_of.items()
    monkeypatch.setattr(packed_batches, "find_rows", lambda lengths, hidden_size: wanted)

    folder = family(name.partition(" ")[0], tmp_path / "model")
    settings = {"sliding_window": 40} if "windowed" in name else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, **settings
    )
    logits, gradients = one_pass(model)
    prefixes, rows = PackedBatches(model.base_model, together), []
    model.base_model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    packed_logits, packed_gradients = one_pass(model)
    assert prefixes.batches == {"packed": 1, "whole": 0} and rows == [len(wanted)]
    torch.testing.assert_close(packed_logits, logits, atol=1e-5, rtol=1e-4)
    assert (packed_gradients - gradients).norm() < 1e-5 * gradients.norm()


def one_pass(model):
    """(logits of the tokens, gradients in one row)"""
    model.train()
    model.zero_grad()
    outputs = model(**batch())
    outputs.loss.backward()
    tokens = batch()["attention_mask"].bool()
    return outputs.logits[tokens].detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_experts_are_balanced_over_the_tokens_of_both_rows():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=600, num_key_value_heads=1, num_local_experts=4, router_aux_loss_coef=1.0, **sizes
    )
    model = MixtralForCausalLM(config)
    model.config.output_router_logits = True
    logits, gradients = one_pass(model)
    balance = model(**batch(), output_router_logits=True).aux_loss
    prefixes = PackedBatches(model.base_model)
    packed_logits, packed_gradients = one_pass(model)
    assert prefixes.batches == {"packed": 1, "whole": 0}
    torch.testing.assert_close(packed_logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**batch(), output_router_logits=True).aux_loss, balance, atol=1e-6, rtol=1e-6)
    assert (packed_gradients - gradients).norm() < 1e-5 * gradients.norm()


def test_what_is_no_attention_is_found_by_running_it(tmp_path):
    """A backbone that mixes each token with the one before it, whichever that is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("smollm2", tmp_path / "model"), dtype=torch.float32)
    model.model.layers[0].register_forward_hook(lambda module, args, states_BTH: states_BTH + states_BTH.roll(1, 1))
    logits, _ = one_pass(model)
    prefixes = PackedBatches(model.base_model)
    assert torch.equal(one_pass(model)[0], logits)
    assert prefixes.batches == {"packed": 0, "whole": 1}
    assert prefixes.refused.startswith("its hidden states are others when packed (by ")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attention by flash_attention_2 takes no mask of pairs"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "its layers mix tokens by linear_attention"),
        ({"attention_dropout": 0.1}, "dropout would fall on both answers alike"),
    ],
)
def test_what_cannot_be_packed_goes_through_whole(settings, reason):
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=600, **sizes)
    backbone = LlamaModel(config)
    for key, value in settings.items():
        setattr(config, "_attn_implementation_internal" if key.startswith("attn") else key, value)
    assert PackedBatches(backbone).refused == reason


@pytest.mark.parametrize(
    ("together", "refused", "reason"),
    [(2, "", "the answers of their pairs share too little"), (2, "why", "why"), (1, "why", "why"), (1, "", None)],
)
def test_what_went_through_whole_is_said(capsys, together, refused, reason):
    batches = {"packed": 2, "whole": 3}
    forward._Say(SimpleNamespace(batches=batches, together=together, refused=refused)).on_train_end(None, None, None)
    said = capsys.readouterr().out
    assert said.startswith(f"fast_forward: 3 of 5 batches went through whole: {reason}") if reason else not said


def conversations():
    """(token ids, where an answer starts): two answers to some prompts, five to one, and one that stands alone."""
    drawn = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(10, 500, (count,), generator=drawn).tolist()

    for prompt, answers in ((70, (20, 50)), (20, (1, 40)), (90, (10, 20, 30, 20, 10)), (60, (40,))):
        ids = tokens(prompt)
        yield from ((ids + tokens(answer), prompt) for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3", "mistral windowed"])
def test_what_is_measured_of_answers_to_one_prompt(tmp_path, monkeypatch, name):
    """Log-probabilities, scores and what they are read from; in several batches, too."""
    from types import SimpleNamespace

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf_recipes import inference, packing

    folder = family(name.partition(" ")[0], tmp_path / "model")
    settings = {"sliding_window": 40} if "windowed" in name else {}
    torch.manual_seed(0)  # of the score head
    policy, reader = (
        auto.from_pretrained(folder, dtype=torch.float32, **settings, **more)
        for auto, more in (
            (AutoModelForCausalLM, {}),
            (AutoModelForSequenceClassification, {"num_labels": 1, "pad_token_id": 0}),
        )
    )
    encoded = list(conversations())
    monkeypatch.setattr(inference, "render", lambda tokenizer, conversation, **_: conversation)

    def measured():
        logps = inference.token_logps(policy, 0, encoded, "test")
        asked, tokenizer = [ids for ids, _ in encoded], SimpleNamespace(pad_token_id=0)
        scored = inference.rewards_and_features(reader, tokenizer, asked, "test")
        return torch.cat(logps), torch.tensor([r for r, _ in scored]), torch.tensor([f.tolist() for _, f in scored])

    tokens, expected = [], measured()
    for model in (policy, reader):
        packing.allow(model)
        model.get_input_embeddings().register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    for batch_tokens in (8192, 400):
        tokens.clear()
        monkeypatch.setattr(inference, "BATCH_TOKENS", batch_tokens)
        found = measured()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not policy.base_model.packing.refused and not reader.base_model.packing.refused
    assert sum(tokens) < 2 * 0.75 * sum(len(ids) for ids, _ in encoded)  # after a first pass in both ways


@pytest.mark.parametrize("recipe", ["reward", "dpo"])
def test_batches_of_like_length_where_they_are_asked_for(train, tmp_path, recipe):
    asked = ["trainer.train_sampling_strategy=group_by_length", "data.train_size=24", "quantization=none"]
    batches = [*train(recipe, tmp_path / "sorted", *asked).trainer.get_train_dataloader()]
    lengths = [pair for batch in batches for pair in batch["attention_mask"].sum(1).view(2, -1).sum(0).tolist()]
    groups = [lengths[start : start + 4] for start in range(0, 24, 4)]  # of two micro-batches of two
    assert len(lengths) == 24 and lengths[0] == max(lengths)
    in_order = [group == sorted(group, reverse=True) for group in groups]
    assert sum(in_order) >= len(groups) - 1  # the longest of all has changed places with the first


ONCE = "trainer.precompute_ref_log_probs=true"


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        *((recipe, []) for recipe in ("sft", "reward", "dpo", "kto", "orpo", "simpo")),
        ("dpo", [ONCE, "trainer.ld_alpha=0.5", "trainer.max_length=100", "data.too_long=truncate"]),
        ("dpo", [ONCE, "trainer.max_length=100", "data.too_long=truncate", "trainer.truncation_mode=keep_end"]),
        ("kto", [ONCE]),
    ],
)
def test_a_recipe_learns_the_same(train, tmp_path, capsys, recipe, more):
    """Losses, gradients and held-out figures of two steps in float32."""
    exact = ["quantization=none", "trainer.bf16=false", "trainer.logging_steps=1", "trainer.learning_rate=1e-3"]
    found = []
    for fast in ("true", "false"):
        done = train(recipe, tmp_path / fast, *exact, f"fast_forward={fast}", *more)
        logged = [row for row in done.trainer.state.log_history if "grad_norm" in row]
        steps = [row[key] for row in logged for key in ("loss", "grad_norm")]
        found.append([*steps, done.result["main"]["after"].value])
    assert len(found[0]) == 5 and found[0] == pytest.approx(found[1], rel=1e-5)
    # The ends of two answers begin where each of them is cut.
    assert ("went through whole" in capsys.readouterr().out) == ("trainer.truncation_mode=keep_end" in more)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["reward", "dpo", "kto", "orpo", "simpo", "sft"])
def test_losses_and_gradients_of_200_random_pairs(train, tmp_path, recipe):
    """Through the trainers of the recipe, batch after batch."""
    rows = tmp_path / "pairs.jsonl"
    drawn = random.Random(0)

    def words(least, most):
        return " ".join(drawn.choices(WORDS, k=drawn.randint(least, most)))

    asked = [words(2, 15) for _ in range(200)]  # some of them twice
    pairs = [{"prompt": asked[i % 200], "chosen": words(1, 10), "rejected": words(1, 10)} for i in range(240)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = ["quantization=none", "trainer.bf16=false", "data=local", f"data.path={rows}"]
    more += ["trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=20"]
    fast = train(recipe, tmp_path / "fast", *more, "data.train_size=200").trainer
    few = ["data.train_size=40", "trainer.max_steps=1"]  # it takes over the other's weights, and its batches
    plain = train(recipe, tmp_path / "plain", *more, *few, "fast_forward=false").trainer
    plain.model.load_state_dict(fast.model.state_dict())
    for batch in fast.get_train_dataloader():
        found = []
        for trainer in (fast, plain):
            trainer.model.train().zero_grad()
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            found.append((loss.item(), torch.cat(gradients), logged(trainer)))
        (loss, gradient, logps), (own_loss, own_gradient, own_logps) = found
        assert loss == pytest.approx(own_loss, rel=1e-5, abs=1e-5)
        assert logps == pytest.approx(own_logps, rel=1e-5)
        assert (gradient - own_gradient).norm() < 1e-5 * own_gradient.norm()


def logged(trainer):
    """Means over the batch of what TRL logs of answers, and does not subtract from each other."""
    metrics = trainer._metrics["train"]
    return [metrics[key].pop() for key in ("logps/chosen", "logps/rejected", "mean_reward") if metrics.get(key)]


def test_the_reference_is_computed_once(train, tmp_path, capsys):
    """Read by a run with another beta and seed; of another adapter, of rows that are cut, or damaged, computed. The
    held-out pairs are measured by it before training."""
    folder = tmp_path / ".reference"

    def said(name, *overrides):
        done = train("dpo", tmp_path / name, ONCE, "quantization=none", *overrides)
        said = capsys.readouterr()
        lines = said.out.splitlines()
        assert ("reference of the held-out answers: 8 read" in said.out) == ("Held out, before" not in said.err)
        return done, next(line for line in lines if line.startswith("reference of the train rows: "))

    first, line = said("first")
    kept = max(folder.iterdir(), key=lambda path: path.stat().st_size)  # the other is of the held-out pairs
    text = kept.read_text()
    assert line == "reference of the train rows: 8 computed, kept in .reference"
    read = "reference of the train rows: 8 read from .reference"
    assert said("again", "trainer.beta=0.5", "trainer.seed=1")[1] == read
    for broken in ("", text[:-9], text.replace("-", "", 1), text.replace('"key": "', '"key": "0')):
        kept.write_text(broken)
        done, line = said("mended", "overwrite=true")
        assert line.startswith("reference of the train rows: 8 computed") and kept.read_text() == text
    assert done.result["adapter_sha256"] == first.result["adapter_sha256"]
    for other in (["model.adapter=first"], ["trainer.max_length=100", "data.too_long=truncate"]):
        assert " read from " not in said("other", "overwrite=true", *other)[1]
