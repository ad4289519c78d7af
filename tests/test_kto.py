"""KTO: labelled answers, the micro-batches that its KL needs, its loss against the paper's, its held-out figures."""

import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_recipes import run, stats
from rlhf_recipes.data import labelled
from rlhf_recipes.data.fit import fit
from rlhf_recipes.data.load import load_demonstrations, load_labelled, load_pairs, load_prompts
from rlhf_recipes.errors import Refusal
from rlhf_recipes.models import load_tokenizer
from rlhf_recipes.training.metrics import label_metrics, preference_metrics


def turn(text, role="assistant"):
    return [{"role": role, "content": text}]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def node(compose, path, *overrides, shape="labelled"):
    return compose("kto", "data=local", f"data.path='{path}'", f"data.format={shape}", *overrides).data


# ---- Rows


def test_labels_as_products_collect_them(compose, tmp_path):
    good = [True, 1, "true", "1", "thumbs_up", "Thumbs up", "👍", 1.0]
    bad = [False, 0, "false", "0", "thumbs_down", "down", "👎", 0.0]
    given = [*good, *bad, None, ""]
    rows = [{"prompt": f"q {i}", "completion": f"answer {i}", "label": label} for i, label in enumerate(given)]
    found = load_labelled(node(compose, write(tmp_path / "thumbs.jsonl", rows), "data.test_size=4"))
    kept = {row["completion"][0]["content"]: row["label"] for row in (*found.train, *found.test)}
    assert kept == {f"answer {i}": i < len(good) for i in range(len(good) + len(bad))}
    assert found.report["dropped"]["unlabelled"] == 2
    assert all(row["pair"] is None and "p" not in row for row in found.train)


@pytest.mark.parametrize("label", ["perhaps", 2, -2, 0.5, [True]])
def test_another_label_is_refused(compose, tmp_path, label):
    rows = [{"prompt": "q", "completion": "a", "label": label}]
    with pytest.raises(Refusal, match=r"thumbs.jsonl:1: label: must be true or false"):
        load_labelled(node(compose, write(tmp_path / "thumbs.jsonl", rows)))


def test_a_column_by_another_name(compose, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": f"q {i}", "completion": "a", "thumb": i % 2} for i in range(8)])
    with pytest.raises(Refusal, match=r"no column 'label'.*data\.columns\.label="):
        load_labelled(node(compose, path))
    found = load_labelled(node(compose, path, "data.columns.label=thumb", "data.test_size=2"))
    assert Counter(row["label"] for row in (*found.train, *found.test)) == {True: 4, False: 4}


def test_the_checks_of_every_other_row(compose, tmp_path):
    token = "ghp_" + "a1B2c3D4e5" * 4
    rows = [
        {"prompt": "q 1", "completion": "fine", "label": True, "split": "train"},
        {"prompt": "q 1", "completion": "fine", "label": True, "split": "train"},  # said twice
        {"prompt": "q 1", "completion": "fine", "label": False, "split": "train"},  # somebody disagrees
        {"prompt": "q 2", "completion": " ", "label": False, "split": "train"},
        {"prompt": "q 3", "completion": token, "label": False, "split": "train"},
        {"prompt": "Q  4", "completion": "fine", "label": True, "split": "train"},
        {"prompt": "q 4", "completion": "no", "label": False, "split": "test"},
    ]
    found = load_labelled(node(compose, write(tmp_path / "t.jsonl", rows)))
    dropped = {reason: count for reason, count in found.report["dropped"].items() if count}
    assert dropped == {"duplicate": 1, "empty": 1, "secret": 1, "leakage": 1}
    assert sorted(row["label"] for row in found.train) == [False, True] and len(found.test) == 1


def test_what_other_recipes_make_of_labels(compose, tmp_path):
    rows = [{"prompt": f"q {i}", "completion": f"a {i}", "label": i % 3 > 0} for i in range(12)]
    data = node(compose, write(tmp_path / "t.jsonl", rows), "data.test_size=3")
    shown = load_demonstrations(data)
    assert shown.report["dropped"]["labelled_bad"] == 4 and len(shown.train) + len(shown.test) == 8
    prompts = load_prompts(data)
    assert len(prompts.train) + len(prompts.test) == 12
    with pytest.raises(
        Refusal, match=r"data\.format=labelled: holds no preferences\. Choose one of auto, pairs, hh_rlhf"
    ):
        load_pairs(data)
    with pytest.raises(Refusal, match=r"data\.format=messages: holds no preferences.*labelled"):
        load_labelled(node(compose, tmp_path / "t.jsonl", shape="messages"))


def test_pairs_are_taken_apart(compose):
    """The same pairs as DPO's, whatever the cap, and the counts add up."""
    pairs = load_pairs(compose("dpo", "data.train_size=20", "data.eval_size=5").data)
    found = load_labelled(compose("kto", "data.train_size=40", "data.eval_size=10").data)
    for split in ("train", "test"):
        halves = getattr(found, split)
        assert [(row["completion"], row["label"]) for row in halves] == [
            (pair[side], side == "chosen") for pair in getattr(pairs, split) for side in ("chosen", "rejected")
        ]
        assert all(a["pair"] == b["pair"] for a, b in zip(halves[::2], halves[1::2], strict=True))
    report = found.report
    assert report["candidates"] == 2 * report["rows"] == 320
    left = sum(report["dropped"].values()) + sum(report["capped"].values())
    assert left + report["train"] + report["test"] == report["candidates"]
    train, _ = found.to_datasets()
    assert train["label"] == [True, False] * 20 and "p" not in train.column_names


# ---- Micro-batches


def batches(rows, size):
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("prompts", [8, 21, 50])
def test_no_prompt_twice_in_a_micro_batch_and_no_row_alone(prompts, most, size):
    draw = random.Random(1000 * prompts + 10 * most + size)
    rows = [
        {"prompt_id": str(n), "completion": k}
        for n in range(prompts)
        for k in range(most if most < 3 else draw.randint(1, most))
    ]
    placed, left = labelled._placed(rows, size, seed=3)
    assert sorted(map(id, (*placed, *left))) == sorted(map(id, rows))
    for batch in batches(placed, size):
        assert len({row["prompt_id"] for row in batch}) == len(batch)
        assert len(batch) > 1 or size == 1
    if prompts > size:  # enough of them: nothing is left but a row that would be alone
        assert len(left) == (len(rows) % size == 1)
    assert labelled._placed(rows, size, seed=3)[0] == placed != labelled._placed(rows, size, seed=4)[0]


def test_a_prompt_of_many_answers_leaves_some_out():
    rows = [{"prompt_id": "busy", "completion": k} for k in range(20)]
    rows += [{"prompt_id": str(n), "completion": 0} for n in range(6)]
    placed, left = labelled._placed(rows, 2, seed=0)
    assert len(placed) == 12 and all(row["prompt_id"] == "busy" for row in left)
    assert all({row["prompt_id"] for row in batch} > {"busy"} for batch in batches(placed, 2))


def arguments(**changed):
    usual = {"per_device_train_batch_size": 4, "loss_type": "kto", "train_sampling_strategy": "sequential", "seed": 1}
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, "max_length": 64}
    return SimpleNamespace(**usual | weights | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"per_device_train_batch_size": 1}, r"trainer\.per_device_train_batch_size=1: .* at least 2"),
        ({"train_sampling_strategy": "random"}, r"trainer\.train_sampling_strategy=random: .* Leave it sequential"),
    ],
)
def test_what_breaks_the_kl_is_refused(compose, tiny_model_overrides, changed, said):
    cfg = compose("kto", *tiny_model_overrides)
    found = fit(load_labelled(cfg.data), load_tokenizer(cfg.model), None)
    with pytest.raises(Refusal, match=said):
        labelled.micro_batches(found, arguments(**changed))
    free = labelled.micro_batches(found, arguments(**changed, loss_type="apo_zero_unpaired"))
    assert len(free.train) == len(found.train)  # which has no KL


@pytest.mark.parametrize(
    ("good", "bad", "weights", "advice"),
    [
        (50, 50, (1.0, 1.0), ""),
        (66, 50, (1.0, 1.0), ""),
        (50, 100, (2.0, 1.0), ""),
        (50, 100, (1.0, 1.0), "weigh 0.50 times.*trainer.desirable_weight from 2.00 to 2.67"),
        (100, 50, (1.0, 1.0), "weigh 2.00 times.*trainer.undesirable_weight from 1.50 to 2.00"),
        (50, 50, (3.0, 1.0), "weigh 3.00 times.*trainer.undesirable_weight from 2.25 to 3.00"),
        (50, 0, (1.0, 1.0), "Give both"),
    ],
)
def test_balance_is_said_in_one_line(good, bad, weights, advice):
    rows = [{"label": True}] * good + [{"label": False}] * bad
    said = labelled.balance(rows, arguments(desirable_weight=weights[0], undesirable_weight=weights[1]))
    assert said.startswith(f"labels: {good} good, {bad} bad") and "\n" not in said
    assert re.search(advice, said)
    assert said.endswith(" bad") == (not advice)


def completions(batch, prefix=""):
    """(prompt, completion) of each row of a micro-batch, as token ids."""
    rows = zip(
        batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], batch[f"{prefix}completion_mask"], strict=True
    )
    return [(tuple(ids[(seen == 1) & (own == 0)].tolist()), tuple(ids[own == 1].tolist())) for ids, seen, own in rows]


@pytest.mark.parametrize("truncated", [False, True])
def test_what_the_trainer_iterates_over(train, tmp_path, truncated):
    """Of its own dataloader, over two epochs: each mismatched answer is the row before's, and of another prompt."""
    rows = [
        {"prompt": f"question {n}", "chosen": f"good answer {n} {k}", "rejected": f"bad answer {n} {k}"}
        for n in range(13)
        for k in range(1 + n % 3)
    ]
    if truncated:  # a prompt that fills max_length, which TRL leaves out
        rows[0:0] = [{"prompt": "long " * 200, "chosen": "good", "rejected": "bad"}]
    arguments = ["data=local", f"data.path={write(tmp_path / 'pairs.jsonl', rows)}", "data.test_size=3",
                 "data.train_size=null", "quantization=none", "trainer.per_device_train_batch_size=3",
                 "trainer.max_length=128", f"data.too_long={'truncate' if truncated else 'drop'}"]  # fmt: skip
    done = train("kto", tmp_path / "run", *arguments)
    loader = done.trainer.get_train_dataloader()
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            own, mismatched = completions(batch), completions(batch, "KL_")
            prompts = [prompt for prompt, _ in own]
            assert len(own) >= 2 and len(set(prompts)) == len(prompts)
            assert [prompt for prompt, _ in mismatched] == prompts
            assert [answer for _, answer in mismatched] == [own[i - 1][1] for i in range(len(own))]
            seen += own
    assert len(seen) == 2 * done.result["counts"]["train"] and len(set(seen)) == len(seen) / 2
    labels = torch.cat([batch["label"] for batch in loader])
    assert 0 < labels[: len(labels) // 2].sum() < len(labels) // 2  # TRL's own order: the good ones first
    counts = done.result["counts"]
    left = sum(counts["dropped"].values()) + sum(counts["capped"].values())
    assert left + counts["train"] + counts["test"] == counts["candidates"] == 2 * len(rows)


def test_a_job_of_a_sweep_cuts_what_the_kl_joins(train, tmp_path, monkeypatch):
    """No row is too long; a long prompt with the answer of another may be."""
    rows = [
        {
            "prompt": f"{n} " + "why " * (12 if n % 2 else 1),
            "completion": "yes " * (1 if n % 2 else 12),
            "label": n % 3 > 0,
        }
        for n in range(24)
    ]
    arguments = ["data=local", "data.format=labelled", f"data.path={write(tmp_path / 'rows.jsonl', rows)}",
                 "data.test_size=4", "data.train_size=null", "quantization=none", "trainer.max_length=100",
                 "trainer.logging_steps=1", "trainer.learning_rate=0.01"]  # fmt: skip
    alone = train("kto", tmp_path / "alone", *arguments)
    assert alone.result["counts"]["train"] == 20
    monkeypatch.setattr(run, "in_sweep", lambda: True)
    job = train("kto", tmp_path / "job", *arguments)
    for done in (alone, job):
        widest = max(batch["KL_input_ids"].shape[1] for batch in done.trainer.get_train_dataloader())
        assert widest == done.trainer.args.max_length == 100
    lines = [map(json.loads, (done.dir / "metrics.jsonl").read_text().splitlines()) for done in (alone, job)]
    losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 2


# ---- The loss


def log_probability(model, prompt, completion):
    """Of a completion's tokens, by the textbook."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().log_softmax(-1)
    predicted = logits[0, len(prompt) - 1 : -1]
    return predicted.gather(1, torch.tensor(completion)[:, None]).sum().item()


def by_hand(model, rows, beta, good, bad):
    """Mean over a micro-batch of w (1 - sigmoid(+-beta (r - z))), arXiv:2402.01306, equation 7."""

    def log_ratio(prompt, completion):
        policy = log_probability(model, prompt, completion)
        with model.disable_adapter():
            return policy - log_probability(model, prompt, completion)

    mismatched = [log_ratio(row["prompt_ids"], rows[i - 1]["completion_ids"]) for i, row in enumerate(rows)]
    z = max(0.0, sum(mismatched) / len(rows))
    losses = []
    for row in rows:
        r = log_ratio(row["prompt_ids"], row["completion_ids"])
        value = beta * (r - z) if row["label"] else beta * (z - r)
        losses.append((good if row["label"] else bad) * (1 - 1 / (1 + math.exp(-value))))
    return sum(losses) / len(losses), z


def test_the_loss_is_the_papers(train, tmp_path):
    """At the first step the policy is its reference: half the weights. At the second, whatever the first has done."""
    own = ["quantization=none", "model.dtype=float32", "trainer.bf16=false", "trainer.learning_rate=0.02",
           "trainer.warmup_steps=0", "trainer.lr_scheduler_type=constant", "trainer.beta=0.5",
           "trainer.desirable_weight=1.5", "trainer.undesirable_weight=0.75",
           "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=2",
           "data.train_size=16"]  # fmt: skip
    one = train("kto", tmp_path / "one", *own, "trainer.max_steps=1")
    two = train("kto", tmp_path / "two", *own, "trainer.max_steps=2")
    rows = list(two.trainer.train_dataset)
    model = one.trainer.model.eval()
    weights = [1.5 if row["label"] else 0.75 for row in rows[:8]]
    assert two.log[0]["loss"] == pytest.approx(0.5 * sum(weights) / 8, rel=1e-5)
    halves = [by_hand(model, rows[start : start + 4], 0.5, 1.5, 0.75) for start in (8, 12)]
    loss = sum(loss for loss, _ in halves) / 2
    assert two.log[1]["loss"] == pytest.approx(loss, rel=1e-4)
    assert two.log[1]["kl"] == pytest.approx(sum(z for _, z in halves) / 2, rel=1e-3, abs=1e-4)
    still = 0.5 * sum(1.5 if row["label"] else 0.75 for row in rows[8:]) / 8
    assert abs(loss / still - 1) > 0.01 and max(z for _, z in halves) > 0.01  # the policy has moved


# ---- Held out


def held_out(labels, lengths=None, pairs=None):
    lengths = lengths or [3] * len(labels)
    return [
        {"prompt_id": f"p{i}", "completion": turn("x" * n), "label": bool(label), "pair": pairs and pairs[i]}
        for i, (label, n) in enumerate(zip(labels, lengths, strict=True))
    ]


def test_auroc_by_hand():
    """Good at 2, 1, 0 against bad at 1, 0: of 6 comparisons 3 won, 2 tied, 1 lost."""
    rows = held_out([1, 1, 1, 0, 0], lengths=[9, 1, 1, 5, 5])
    found = label_metrics(rows, [(2.0, 4), (1.0, 4), (0.0, 4), (1.0, 5), (0.0, 5)], [(0.0, 4)] * 5)
    assert found["auroc"].value == pytest.approx(4 / 6) and found["auroc"].n == 5
    assert found["auroc_change"].value == pytest.approx(4 / 6 - 1 / 2)
    assert found["auroc_change"].low == pytest.approx(found["auroc"].low - 1 / 2)
    assert found["baseline_length"].value == pytest.approx(2 / 6)
    assert found["reward_margin"].value == pytest.approx(1 - 1 / 2)
    assert found["chosen_logp_change_per_token"].value == pytest.approx(3 / 12)
    assert found["rejected_logp_change_per_token"].value == pytest.approx(1 / 10)
    assert "preference_accuracy" not in found
    before = label_metrics(rows, [(2.0, 4)] * 5, [(2.0, 4)] * 5)
    assert (before["auroc"].value, before["auroc"].low, before["auroc"].high) == (0.5, 0.5, 0.5)
    few = label_metrics(held_out([1] * 60 + [0] * 3), [(float(n), 4) for n in range(63)], [(0.0, 4)] * 63)
    carried = ("auroc", "auroc_change", "reward_margin", "baseline_length")
    assert {few[name].clusters for name in carried} == {3}  # by three bad answers, however many good ones


def test_one_label_alone_ranks_nothing():
    found = label_metrics(held_out([1, 1, 1]), [(1.0, 2)] * 3, [(0.0, 2)] * 3)
    assert found["auroc"].value is None and found["rejected_logp_change_per_token"].value is None
    assert stats.format_estimate(found["auroc"])


@pytest.mark.slow
def test_both_halves_of_a_pair_are_a_pair():
    """As DPO's figures on the same pairs; a half whose other was dropped counts among the labels alone."""
    draw = np.random.default_rng(0)
    pairs = [{"prompt_id": f"p{n}", "chosen": turn("x" * (n % 7)), "rejected": turn("x" * 3)} for n in range(30)]
    logps = [{"chosen_logp": c, "chosen_tokens": 4, "rejected_logp": r, "rejected_tokens": 5}
             for c, r in draw.normal(size=(30, 2))]  # fmt: skip
    start = [{**each, "chosen_logp": 0.0, "rejected_logp": 0.0} for each in logps]
    wanted = preference_metrics(pairs, logps, start, "log_ratio")
    rows = [{"prompt_id": pair["prompt_id"], "completion": pair[side], "label": side == "chosen", "pair": n + 1}
            for n, pair in enumerate(pairs) for side in ("chosen", "rejected")]  # fmt: skip
    own = [(each[f"{side}_logp"], each[f"{side}_tokens"]) for each in logps for side in ("chosen", "rejected")]
    alone = {"prompt_id": "q", "completion": turn("x"), "label": True, "pair": 99}
    for extra, names in (
        ([], wanted.keys() & label_metrics(rows, own, own).keys()),
        ([alone], {"preference_accuracy"}),
    ):
        found = label_metrics([*rows, *extra], [*own, *[(5.0, 1)] * len(extra)], [(0.0, 1)] * (60 + len(extra)))
        for name in names:
            for key in ("value", "low", "high"):
                assert getattr(found[name], key) == pytest.approx(getattr(wanted[name], key)), name
    assert {"preference_accuracy", "accuracy_change", "length_bias", "reward_margin", "baseline_shorter_wins"} <= (
        wanted.keys() & label_metrics(rows, own, own).keys()
    )


def test_labelled_answers_from_file_to_card(train, tmp_path, capsys):
    rows = [
        {"prompt": f"question {n}", "completion": f"answer {n} " * (1 + n % 3), "label": n % 3 != 0} for n in range(40)
    ]
    arguments = ["data=local", "data.format=labelled", f"data.path={write(tmp_path / 'thumbs.jsonl', rows)}",
                 "data.test_size=10", "data.train_size=null", "data.eval_size=null"]  # fmt: skip
    done = train("kto", tmp_path / "run", *arguments)
    said = capsys.readouterr().out
    assert re.search(r"labels: (19|20|21) good, (9|10|11) bad: the good ones weigh \d\.\d\d times", said)
    assert done.result["main"]["name"] == "auroc" and "preference_accuracy" not in done.result["metrics"]
    card = (done.dir / "README.md").read_text(encoding="utf-8")
    assert "Kahneman-Tversky Optimization ([arXiv:2402.01306]" in card and "| baseline length |" in card
