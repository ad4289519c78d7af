"""Data: what is read, refused, dropped, split and rewritten, in numbers. No network, no model."""

import csv
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rlhf_recipes.data import formats, readers
from rlhf_recipes.data.account import told
from rlhf_recipes.data.columns import COLUMNS
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.load import (
    KEYS,
    Splits,
    _settings,
    load_demonstrations,
    load_labelled,
    load_pairs,
    load_prompts,
    shorter_wins,
)
from rlhf_recipes.data.recognise import Layout
from rlhf_recipes.data.row import LITERAL_LIMIT, Row, as_list
from rlhf_recipes.data.tokens import neutralise, percentiles

ROOT = Path(__file__).parents[1]
HH = ROOT.parent / "shared" / "data" / "hh-rlhf-harmless-dev.jsonl.gz"
CHATML = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def node(name="local", *overrides):
    """The data node as a recipe composes it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(overrides=[f"+data={name}", *overrides]).data


def local(path, *overrides):
    return node("local", f"data.path='{path}'", *overrides)


def pair(index, **changes):
    return {"prompt": f"question {index}", "chosen": f"good {index}", "rejected": f"bad {index}", **changes}


def write_lines(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def refusal(function, *arguments):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def accounted(report):
    return sum(report["dropped"].values()) + sum(report["capped"].values()) + report["train"] + report["test"]


@pytest.fixture
def prefs(tmp_path):
    return write_lines(tmp_path / "prefs.jsonl", [pair(index) for index in range(50)])


def make_tokenizer(template=CHATML, normalized=False, **special):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalized:
        tokenizer.normalizer = normalizers.Lowercase()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=normalized) for name in names])
    special = {
        "bos_token": names[1],
        "eos_token": names[2],
        "unk_token": names[0],
        "pad_token": names[0],
    } | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


@pytest.fixture(scope="module")
def tokenizer():
    """ChatML over single bytes: a turn costs 1 + role + 1 newline + its bytes + 1 + 1 newline tokens."""
    return make_tokenizer()


@pytest.fixture(scope="module", params=["bytes", "embedded"])
def any_tokenizer(request):
    if request.param == "bytes":
        return make_tokenizer()
    folder = os.environ.get("RLHF_TEST_MODEL")
    if not folder:
        pytest.skip("RLHF_TEST_MODEL names no tokenizer folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ---- configs and sources


def test_a_whole_file_holds_nothing_out_and_fits(tmp_path, tokenizer):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    splits = fit(load_prompts(node("local", f"data.path={path}"), whole=True), tokenizer, 100)
    assert (
        len(splits.train) == 1
        and not splits.test
        and "1 train, 0 test rows of 1 (none held out)" in describe(splits.report)
    )
    assert "no train rows left" in refusal(fit, splits, tokenizer, 5)


@pytest.mark.parametrize("name", ["clinic", "ultrafeedback", "ultrachat", "hh_rlhf", "local"])
def test_every_config_has_the_same_keys_and_passes_its_own_check(name):
    composed = node(name, "data.path=elsewhere/set")
    assert set(composed) == set(KEYS)
    assert _settings(composed)["path"] == "elsewhere/set"


def test_configs_name_the_splits_of_the_hub():
    assert (node("ultrafeedback").train_split, node("ultrafeedback").test_split) == (
        "train_prefs",
        "test_prefs",
    )
    assert (node("ultrachat").format, node("ultrachat").test_split) == ("messages", "test_sft")
    assert node("hh_rlhf").format == "hh_rlhf"


def test_a_pair_becomes_conversational(prefs):
    splits = load_pairs(local(prefs))
    row = next(row for row in splits.train + splits.test if row["prompt"][0]["content"] == "question 7")
    assert row == {
        "prompt": [{"role": "user", "content": "question 7"}],
        "chosen": [{"role": "assistant", "content": "good 7"}],
        "rejected": [{"role": "assistant", "content": "bad 7"}],
        "family": None,
        "prompt_id": formats.prompt_id(row["prompt"]),
        "p": None,
    }
    assert splits.source == "prefs.jsonl"
    assert splits.report["rows"] == splits.report["candidates"] == 50 == accounted(splits.report)
    assert json.loads(json.dumps(splits.report)) == splits.report


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=2))


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "p.jsonl": write_lines,
    "p.jsonl.gz": write_lines,
    "p.json": write_json,
    "lines.json": write_lines,
    "p.csv": write_csv,
    "p.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path, prefs):
    rows = [pair(index) for index in range(50)]
    rows[3]["chosen"] = 'two\nlines, "quoted": é'
    WRITERS[name](tmp_path / name, rows)
    write_lines(prefs, rows)
    ours, reference = load_pairs(local(tmp_path / name)), load_pairs(local(prefs))
    assert (ours.train, ours.test) == (reference.train, reference.test)


@pytest.mark.parametrize("name", ["p.json", "p.csv"])
def test_compressed_json_and_csv(name, tmp_path):
    WRITERS[name](tmp_path / name, [pair(index) for index in range(50)])
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert load_pairs(local(zipped)).train == load_pairs(local(tmp_path / name)).train


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(pair(index)).encode() for index in range(50)) + b"\n")
    assert load_pairs(local(path)).report["rows"] == 50


def test_message_lists_written_into_csv(tmp_path):
    rows = [pair(i, chosen=json.dumps([{"role": "assistant", "content": f"good {i}"}])) for i in range(50)]
    write_csv(tmp_path / "p.csv", rows)
    assert all(row["chosen"][0]["content"].startswith("good ") for row in load_pairs(local(tmp_path / "p.csv")).train)


def test_saved_dataset_dict_and_parquet_folder(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": [pair(index) for index in range(20)], "test": [pair(index) for index in range(20, 25)]}
    saved = DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    for name, rows in parts.items():
        write_parquet(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet", rows)
    for folder in ("saved", "parquet"):
        splits = load_pairs(local(tmp_path / folder))
        assert (splits.report["train"], splits.report["test"], splits.source) == (20, 5, folder)
        assert splits.report["split"] == "test: split test"
        message = refusal(load_pairs, local(tmp_path / folder, "data.test_split=tset"))
        assert message.startswith("data.test_split=tset: no such split in ")
        assert "no such split" in refusal(load_pairs, local(tmp_path / folder, "data.train_split=training"))
    train, test = splits.to_datasets()
    assert (len(train), len(test)) == (20, 5) and train.features == test.features
    assert {**train[0], "p": None} == splits.train[0]  # a column without a value is left out


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_probabilities_arrive(tmp_path, suffix):
    values = [0.75, 1, None, 0.25, 0.5] + [0.9] * 16
    path = tmp_path / f"soft.{suffix}"
    if suffix == "csv":
        lines = [f"question {n},good {n},bad {n},{'' if p is None else p}" for n, p in enumerate(values)]
        path.write_text("\n".join(["prompt,chosen,rejected,p", *lines]))
    else:
        rows = [
            {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}", "p": p}
            for n, p in enumerate(values)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_pairs(local(path))
    found = {row["prompt"][0]["content"]: row["p"] for row in splits.train + splits.test}
    assert [found.get(f"question {n}") for n in range(5)] == [0.75, 1.0, None, 0.75, None]
    assert "question 2" in found and "question 4" not in found and splits.report["dropped"]["tie"] == 1
    assert "p" in splits.to_datasets()[0].column_names
    assert "p" not in load_demonstrations(local(path)).train[0]


@pytest.mark.parametrize("load", [load_pairs, load_labelled, load_demonstrations])
@pytest.mark.parametrize("form", ["pairs", "hh_rlhf", "preference"])
def test_the_likelier_answer_is_the_better_one_in_every_recipe(tmp_path, load, form):
    """A is better with 0.9 and 0.2, neither with 0.5; who said nothing of B said that A is."""
    values = [0.9, 0.2, 0.5, *([] if form == "preference" else [None])] * 6
    rows = []
    for n, p in enumerate(values):
        answers = {"chosen": f"A{n}", "rejected": f"B{n}"}
        if form == "hh_rlhf":
            rows.append({side: f"\n\nHuman: q {n}\n\nAssistant: {said}" for side, said in answers.items()} | {"p": p})
        elif form == "pairs":
            rows.append({"prompt": f"q {n}", **answers, "p": p})
        else:
            rows.append({"prompt": f"q {n}", "a": f"A{n}", "b": f"B{n}", "preference": p})
    names = {"first": "a", "second": "b", "preference": "preference"} if form == "preference" else {}
    overrides = [f"data.columns.{ours}={theirs}" for ours, theirs in names.items()]
    overrides += ["data.preference=probability"] if names else []
    splits = load(local(write_lines(tmp_path / "p.jsonl", rows), f"data.format={form}", *overrides))
    every = [*splits.train, *splits.test]
    good = {row.get("completion", row.get("chosen"))[0]["content"] for row in every if row.get("label", True)}
    first_is = {0.9: "A", None: "A", 0.2: "B"}
    assert good == {f"{first_is[p]}{n}" for n, p in enumerate(values) if p != 0.5}
    assert splits.report["dropped"]["tie"] == 6
    assert f"p of {splits.report['soft']['p']} rows: learned from by reward alone" in told(splits.report)
    if load is load_pairs:
        assert {row["p"] for row in every} == {0.9, 0.8, *([] if form == "preference" else [None])}


@pytest.mark.parametrize("value", [1.5, -0.1, "often", True])
def test_what_is_no_probability_is_refused(tmp_path, value):
    path = tmp_path / "soft.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "p": value}) + "\n")
    assert refusal(load_pairs, local(path)).startswith(f"{path}:1: p: must be a probability from 0 to 1, not ")


def test_columns_are_mapped(tmp_path):
    rows = [{"question": f"q {i}", "good": "g", "bad": "b", "topic": f"t{i % 2}"} for i in range(50)]
    path = write_lines(tmp_path / "p.jsonl", rows)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad", "family": "topic"}
    splits = load_pairs(local(path, *(f"data.columns.{ours}={theirs}" for ours, theirs in names.items())))
    assert sorted({row["family"] for row in splits.train}) == ["t0", "t1"]


def test_lists_in_pythons_notation_are_bounded_and_quiet(recwarn):
    assert as_list("['\\d', None]") == ["\\d", None] and not recwarn.list
    assert as_list("['a']" + " " * LITERAL_LIMIT) is None and as_list('["a"]' + " " * LITERAL_LIMIT) == ["a"]


def test_clinic_ships_with_its_own_split():
    for load, least in ((load_pairs, 96), (load_demonstrations, 96)):
        splits = load(node("clinic"))
        assert splits.report["split"] == "test: column split" and splits.source == "clinic"
        assert splits.report["train"] + splits.report["test"] >= least
        assert sum(splits.report["dropped"].values()) == 0
        assert all(row["family"] for row in splits.train + splits.test)


# ---- shapes


def test_prompt_and_answers_in_every_accepted_form(tmp_path):
    asked, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "g"), ("assistant", "b")))
    system = {"role": "system", "content": "s"}
    forms = [
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": [asked], "chosen": [good], "rejected": "b"},
        {"prompt": "q", "chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "q ", "chosen": [asked, good], "rejected": [asked, bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "q", "chosen": [system, asked, good], "rejected": [system, asked, bad]},
    ]
    layout = Layout("pairs", {key: key for key in COLUMNS})
    for form in forms:
        (found,) = formats.candidates(Row("f:1", form, layout.columns), layout, ("chosen", "rejected"))
        assert (found["chosen"], found["rejected"], found["prompt"][-1]) == ([good], [bad], asked)
    other = {"prompt": "another", "chosen": [asked, good], "rejected": [asked, bad]}
    (found,) = formats.candidates(Row("f:1", other, layout.columns), layout, ("chosen", "rejected"))
    assert found.reason == "context_differs"


def test_demonstrations_from_every_shape(tmp_path):
    talk = [("user", "q"), ("assistant", "a"), ("user", "again"), ("assistant", "last")]
    messages = [{"role": role, "content": content} for role, content in talk]
    rows = {
        "pairs": {"prompt": "q {}", "chosen": "last", "rejected": "b"},
        "hh_rlhf": {
            "chosen": "\n\nHuman: q {}\n\nAssistant: last",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        },
        "ratings": {"prompt": "q {}", "responses": ["b", "last", "c"], "scores": [1, 3, 2]},
        "rankings": {"prompt": "q {}", "responses": ["b", "last", "c"], "ranks": [2, 1, 3]},
        "messages": {"messages": messages, "prompt": "unused"},
    }
    for shape, row in rows.items():
        lines = [json.loads(json.dumps(row).replace("{}", str(index))) for index in range(40)]
        if shape == "messages":
            lines = [{"messages": [{**messages[0], "content": f"q {i}"}, *messages[1:]]} for i in range(40)]
        path = write_lines(tmp_path / f"{shape}.jsonl", lines)
        splits = load_demonstrations(local(path, f"data.format={shape}"))
        assert {row["completion"][0]["content"] for row in splits.train} == {"last"}
        assert set(splits.train[0]) == {"prompt", "completion", "family", "prompt_id"}
    assert [turn["content"] for turn in splits.train[0]["prompt"]][1:] == ["a", "again"]
    message = refusal(load_pairs, local(path, "data.format=messages"))
    assert message.startswith("data.format=messages: holds no preferences")


def test_a_completion_column_goes_before_chosen(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [pair(index, completion="own") for index in range(50)])
    assert load_demonstrations(local(path)).train[0]["completion"][0]["content"] == "own"


@pytest.mark.parametrize(
    ("reduce", "values", "wanted", "ties"),
    [
        ("best_worst", [1, 4, 2], ["b>a"], 0),
        ("all", [1, 4, 2], ["b>a", "b>c", "c>a"], 0),
        ("all", [2, 2, 1], ["a>c", "b>c"], 1),
        ("best_worst", [3, 3, 3], [], 1),
        ("all", [0.5, -1, 7.25], ["c>a", "c>b", "a>b"], 0),
    ],
)
def test_ratings_and_rankings_reduce_to_pairs(reduce, values, wanted, ties, tmp_path):
    for shape, key, sign in (("ratings", "scores", 1), ("rankings", "ranks", -1)):
        row = {"prompt": "q", "responses": ["a", "b", "c"], key: [sign * value for value in values]}
        layout = Layout(shape, {key: key for key in COLUMNS})
        found = list(formats.candidates(Row("f:1", row, layout.columns), layout, ("chosen", "rejected"), reduce))
        pairs = [each for each in found if isinstance(each, dict)]
        text = [f"{each['chosen'][0]['content']}>{each['rejected'][0]['content']}" for each in pairs]
        assert (
            sorted(text) == sorted(wanted)
            and [drop.reason for drop in found if not isinstance(drop, dict)] == ["tie"] * ties
        )


def test_ratings_keep_the_books(tmp_path):
    rows = [{"prompt": f"q {i}", "responses": '["a", "b", "b "]', "scores": "[1, 2, 3]"} for i in range(30)]
    rows[0]["scores"] = "[2, 2, 2]"
    write_csv(tmp_path / "r.csv", rows)
    report = load_pairs(local(tmp_path / "r.csv", "data.format=ratings", "data.reduce=all")).report
    assert (report["rows"], report["candidates"]) == (30, 90)
    assert (report["dropped"]["tie"], report["dropped"]["identical"]) == (3, 29)
    assert accounted(report) == 90


# ---- transcripts

NASTY = [
    "a: b",
    "Human: not a turn",
    "blank\n\nline",
    "say\nHuman: x\nAssistant: y",
    "\t: ",
    "ends with:",
    "é 中 🙂",
    "Assistant",
]


def transcript(turns):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


def test_transcripts_survive_a_round_trip():
    draw = random.Random(0)
    for _ in range(300):
        texts = [" ".join(draw.choices(NASTY, k=draw.randint(1, 3))).strip() for _ in range(draw.choice((2, 4, 6)))]
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        assert formats.parse_transcript(transcript(turns)) == turns


def test_what_is_no_transcript_has_no_turns():
    assert formats.parse_transcript("hello") == []
    assert formats.parse_transcript("") == []
    assert formats.parse_transcript("Preface\n\nHuman: hi\n\nAssistant: yo") == []
    assert [turn["role"] for turn in formats.parse_transcript("Human: hi\n\nAssistant: yo")] == [
        "user",
        "assistant",
    ]
    assert formats.parse_transcript("\n\nHuman: hi\n\nAssistant:")[1] == {"role": "assistant", "content": ""}


def test_odd_transcripts_are_dropped_and_counted(tmp_path):
    def row(chosen, rejected="\n\nHuman: q\n\nAssistant: b"):
        return {"chosen": chosen, "rejected": rejected}

    good = [row(f"\n\nHuman: q{i}\n\nAssistant: g", f"\n\nHuman: q{i}\n\nAssistant: b") for i in range(40)]
    odd = [
        row("\n\nHuman: other\n\nAssistant: g"),  # context_differs
        row("\n\nHuman: q\n\nAssistant: "),  # empty
        row("\n\nHuman: q\n\nAssistant: b "),  # identical
        row("no turns at all"),  # roles
        row(""),  # empty
        row("\n\nHuman: q\n\nHuman: r\n\nAssistant: g", "\n\nHuman: q\n\nHuman: r\n\nAssistant: b"),  # roles
        row("\n\nHuman: q\n\nAssistant: g\n\nHuman: bye", "\n\nHuman: q\n\nAssistant: g\n\nHuman: ciao"),  # roles
    ]
    path = write_lines(tmp_path / "hh.jsonl", good + odd)
    report = load_pairs(local(path, "data.format=hh_rlhf")).report
    assert {key: count for key, count in report["dropped"].items() if count} == {
        "context_differs": 1,
        "empty": 2,
        "identical": 1,
        "roles": 3,
    }
    assert report["examples"]["roles"] == [
        "hh.jsonl:44 (no transcript of two turns)",
        "hh.jsonl:46 (turns 1 and 2 are both of the user)",
        "hh.jsonl:47 (the prompt ends with the assistant)",
    ]
    assert accounted(report) == 47


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason="needs ../shared/data")
def test_hh_rlhf_counts():
    splits = load_pairs(node("hh_rlhf", f"data.path={HH}", "data.test_size=0.32"))
    report = splits.report
    assert report["rows"] == 1181 == accounted(report)
    dropped = {key: count for key, count in report["dropped"].items() if count}
    assert dropped == {"empty": 2, "roles": 3, "context_differs": 3}
    assert (report["train"], report["test"]) == (810, 363)
    openings = [{row["prompt"][0]["content"] for row in rows} for rows in (splits.train, splits.test)]
    assert not openings[0] & openings[1]
    shorter = shorter_wins(splits.test + splits.train)
    assert 0.5 < sum(shorter) / len(shorter) < 0.65
    wide = load_pairs(node("hh_rlhf", f"data.path={HH}", "data.test_size=0.32", "data.train_size=800"))
    assert wide.train == splits.train[:800] and wide.report["capped"] == {"train": 10, "test": 0}


# ---- drops, splits, caps


def test_drops_are_counted_with_their_places(tmp_path):
    rows = [pair(index, split="train") for index in range(20)] + [pair(index, split="test") for index in range(20, 25)]
    rows += [
        pair(30, split="train", chosen=" same", rejected="same "),  # 26 identical
        pair(3, split="train"),  # 27 duplicate of line 4
        pair(31, split="train", prompt="Question  21"),  # 28 the prompt of line 22, but for case and spacing
        pair(32, split="train", rejected=None),  # 29 empty
        pair(33, split="train", prompt=" \n"),  # 30 empty
        pair(34, split="train", prompt=[{"role": "assistant", "content": "x"}]),  # 31 roles
        pair(35, split="train", prompt=[]),  # 32 empty
    ]
    splits = load_pairs(local(write_lines(tmp_path / "p.jsonl", rows)))
    report = splits.report
    assert report["dropped"] == {
        "empty": 3,
        "roles": 1,
        "context_differs": 0,
        "identical": 1,
        "tie": 0,
        "secret": 0,
        "duplicate": 1,
        "leakage": 1,
    }
    assert report["examples"] == {
        "empty": ["p.jsonl:29", "p.jsonl:30 (no prompt)", "p.jsonl:32 (no prompt)"],
        "roles": ["p.jsonl:31 (the conversation opens with the assistant)"],
        "identical": ["p.jsonl:26"],
        "duplicate": ["p.jsonl:27"],
        "leakage": ["p.jsonl:28"],
    }
    assert (report["train"], report["test"]) == (20, 5) and accounted(report) == 32
    assert describe(report) == (
        "data: p.jsonl: 20 train, 5 test rows of 32 (test: column split)\n"
        "      read as pairs: prompt, chosen, rejected, split\n"
        "      dropped 3 empty, 1 roles, 1 identical, 1 duplicate, 1 leakage"
    )


def test_an_empty_system_turn_is_no_empty_text(tmp_path):
    prompt = [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]
    rows = [pair(i, prompt=[prompt[0], {"role": "user", "content": f"q{i}"}]) for i in range(30)]
    assert load_pairs(local(write_lines(tmp_path / "p.jsonl", rows))).report["dropped"]["empty"] == 0


def test_test_path_wins_over_test_size_and_leaks_are_removed_from_train(tmp_path, prefs):
    test = write_lines(tmp_path / "test.jsonl", [pair(index) for index in range(5)])
    report = load_pairs(local(prefs, f"data.test_path={test}")).report
    assert (report["train"], report["test"], report["dropped"]["leakage"]) == (45, 5, 5)
    assert report["split"] == "test: test.jsonl"


@pytest.mark.slow
def test_held_out_prompts_depend_on_prompt_and_seed_alone(tmp_path):
    rows = [pair(index) for index in range(400)]
    held = {}
    for name, chosen in {"all": rows, "reversed": rows[::-1], "half": rows[::2]}.items():
        splits = load_pairs(local(write_lines(tmp_path / f"{name}.jsonl", chosen), "data.test_size=0.25"))
        held[name] = {row["prompt_id"] for row in splits.test}
        assert not held[name] & {row["prompt_id"] for row in splits.train}
    assert held["all"] == held["reversed"] and held["half"] < held["all"]
    assert 70 <= len(held["all"]) <= 130
    demonstrations = load_demonstrations(local(tmp_path / "all.jsonl", "data.test_size=0.25"))
    assert {row["prompt_id"] for row in demonstrations.test} == held["all"]
    other = load_pairs(local(tmp_path / "all.jsonl", "data.test_size=0.25", "data.seed=1"))
    assert {row["prompt_id"] for row in other.test} != held["all"]


def test_a_count_holds_out_that_many_prompts_with_all_their_rows(tmp_path):
    rows = [pair(index // 3, chosen=f"good {index}") for index in range(90)]
    splits = load_pairs(local(write_lines(tmp_path / "p.jsonl", rows), "data.test_size=7"))
    assert (splits.report["test"], splits.report["train"]) == (21, 69)
    assert splits.report["split"] == "test: 7 of 30 prompts held out, seed 42"


def test_the_stages_of_one_conversation_stay_together(tmp_path):
    rows = []
    for index in range(40):
        opening = [{"role": "user", "content": f"q {index}"}]
        longer = [*opening, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
        rows += [pair(index, prompt=opening), pair(index, prompt=longer)]
    splits = load_pairs(local(write_lines(tmp_path / "p.jsonl", rows), "data.test_size=10"))
    assert (len(splits.train), len(splits.test)) == (60, 20)


def test_a_question_stays_together_under_several_system_turns_and_where_it_is_without_one(tmp_path):
    rows = [pair(n // 3, system=["", "Be brief.", "Be kind."][n % 3], chosen=f"good {n}") for n in range(30)]
    splits = load_pairs(local(write_lines(tmp_path / "p.jsonl", rows), "data.test_size=3"))
    train, test = ({row["prompt"][-1]["content"] for row in rows} for rows in (splits.train, splits.test))
    assert (len(train), len(test), len(splits.test)) == (7, 3, 9) and not train & test
    assert len(set(formats.clusters(splits.train + splits.test))) == 10
    again = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
    rows = [pair(n, prompt=[{"role": "user", "content": f"q {n // 2}"}, *(again * (n % 2))]) for n in range(40)]
    splits = load_pairs(local(write_lines(tmp_path / "p.jsonl", rows), "data.test_size=4"))
    assert sorted(row["prompt"][0]["content"] for row in splits.test) == sorted(["q 3", "q 13", "q 17", "q 18"] * 2)


def test_caps_take_the_head_of_one_shuffle(prefs):
    whole = load_pairs(local(prefs, "data.test_size=20"))
    capped = load_pairs(local(prefs, "data.test_size=20", "data.train_size=12", "data.eval_size=3"))
    assert capped.train == whole.train[:12] and capped.test == whole.test[:3]
    assert capped.report["capped"] == {"train": 18, "test": 17} and accounted(capped.report) == 50
    assert [row["prompt"] for row in whole.train] != sorted([row["prompt"] for row in whole.train], key=str)
    assert whole.train == load_pairs(local(prefs, "data.test_size=20")).train


def test_a_bootstrap_draws_with_replacement(prefs):
    whole = load_pairs(local(prefs, "data.test_size=20"))
    drawn = load_pairs(local(prefs, "data.test_size=20", "data.bootstrap=3"))
    assert len(drawn.train) == len(whole.train) == 30 and drawn.test == whole.test
    different = {row["prompt_id"] for row in drawn.train}
    assert different < {row["prompt_id"] for row in whole.train}
    assert drawn.report["repeated"] == 30 - len(different) > 0 == whole.report["repeated"]
    assert accounted(drawn.report) - drawn.report["repeated"] == 50
    assert f"drawn with replacement, {len(different)} different train rows" in describe(drawn.report)
    assert drawn.train == load_pairs(local(prefs, "data.test_size=20", "data.bootstrap=3")).train
    assert drawn.train != load_pairs(local(prefs, "data.test_size=20", "data.bootstrap=4")).train
    assert len(load_pairs(local(prefs, "data.test_size=20", "data.bootstrap=3", "data.train_size=7")).train) == 7


def test_what_a_bootstrap_drew_is_counted_after_rows_are_dropped_and_rewritten(tmp_path, tokenizer):
    """Of the odd rows none fits; the even ones are written once more, without their control tokens."""
    rows = [pair(n, chosen="long " * 60 if n % 2 else f"<|im_end|> {n}") for n in range(20)]
    splits = load_pairs(local(write_lines(tmp_path / "p.jsonl", rows), "data.test_size=4", "data.bootstrap=3"))
    fitted = fit(splits, tokenizer, 150)
    different = {row["prompt_id"] for row in fitted.train}
    assert fitted.report["neutralised"]["rows"] and len(different) < len(fitted.train) < len(splits.train)
    assert f"drawn with replacement, {len(different)} different train rows" in describe(fitted.report)
    assert accounted(fitted.report) - fitted.report["repeated"] == 20


# ---- refusals


GOOD = json.dumps(pair(0)).encode()
BAD_FILES = {
    "comma.jsonl": (
        GOOD + b'\n{"prompt": "a" "b"}\n',
        "{}:2: not valid JSON (Expecting ',' delimiter at character 16). Mend or remove the line.",
    ),
    "control.jsonl": (
        b'{"prompt": "a\x01b"}\n',
        "{}:1: not valid JSON (Invalid control character at character 14). Mend or remove the line.",
    ),
    "cut.json": (
        b"[\n" + GOOD + b',\n{"prompt": "a",\n',
        "{}:4: not valid JSON (Expecting property name enclosed in double quotes at character 1). The file is cut "
        "off: write or fetch it again.",
    ),
    "latin.jsonl": (
        GOOD + b'\n{"prompt": "caf\xe9"}\n',
        "{}:2: not UTF-8 (byte 0xe9 at position 16). Save the file as UTF-8.",
    ),
    "empty.jsonl": (b"", "{}: empty, no rows in it."),
    "blank.jsonl": (b"\n \n", "{}: empty, no rows in it."),
    "empty.parquet": (b"", "{}: empty, no rows in it."),
    "header.csv": (b"prompt,chosen,rejected\n", "{}: empty, no rows in it."),
    "none.json": (b"[]", "{}: empty, no rows in it."),
    "nul.jsonl": (GOOD + b"\n\0\0\0\n", "{}:2: a binary file (NUL byte), not text."),
    "zip.jsonl": (b"PK\x03\x04xx", "{}: a binary file (a zip or spreadsheet), not text."),
    "gzip.jsonl": (gzip.compress(GOOD), "{}: a binary file (gzip data), not text."),
    "wide.csv": (b"\xff\xfep\0r\0", "{}:1: not UTF-8 (UTF-16 byte order mark)."),
    "plain.jsonl.gz": (GOOD, "{}: not a valid gzip file (Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 200)[:60], "{}: the gzip data is damaged or cut off"),
    "bad.parquet": (b"PAR1 and then nothing", "{}: not a readable parquet file ("),
    "list.jsonl": (b"[1, 2]\n", "{}:1: a list, but a row is an object"),
    "scalar.json": (b'[{"prompt": "a"}, 3]', "{}:2: a number, but a row is an object"),
    "text.json": (b'[\n{"prompt": "a",\n}]', "{}:3: not valid JSON ("),
    "deep.jsonl": (b"[" * 200_000, "{}:1: not readable JSON ("),
    "half.jsonl": (b'{"prompt": "\\ud83d"}\n', "{}:1: not readable JSON ('utf-8' codec can't encode"),
    "quote.csv": (
        b'prompt,chosen,rejected\na,b,c\n"d,e,f\n',
        "{}:3: not valid CSV (unexpected end of data).",
    ),
    "cells.csv": (b"prompt,chosen,rejected\na,b,c\nd, e, f, g\n", "{}:3: 4 cells under 3 columns."),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", "{}:1: column 'chosen' appears twice. Rename one."),
    "note.txt": (b"hello", "{}: unknown kind of file."),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_on_one_line(name, tmp_path):
    content, wanted = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(load_pairs, local(path))
    assert message.startswith((wanted or "{}: no column").format(path)), message
    assert path.read_bytes() == content


def test_missing_files_and_folders(tmp_path, prefs):
    message = refusal(load_pairs, local(tmp_path / "pref.jsonl"))
    assert message == f"{tmp_path}/pref.jsonl: no such file; did you mean 'prefs.jsonl'? Give the path of your data."
    message = refusal(load_pairs, local(tmp_path / "no" / "prefs.jsonl"))
    assert message.startswith(f"{tmp_path}/no/prefs.jsonl: no such file, nor the folder {tmp_path}/no.")
    (tmp_path / "empty").mkdir()
    message = refusal(load_pairs, local(tmp_path / "empty"))
    assert message.startswith(f"{tmp_path}/empty: a folder, but neither saved by DatasetDict.save_to_disk nor")
    assert "no such file" in refusal(load_pairs, local(prefs, f"data.test_path={tmp_path}/t.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "not a regular file" in refusal(load_pairs, local(tmp_path / "pipe.jsonl"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{")
    assert "a damaged save_to_disk folder" in refusal(load_pairs, local(tmp_path / "saved"))


def test_an_unreadable_file(prefs, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(prefs))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"prefs.jsonl: not readable \(Permission denied\). Check its permissions."):
        list(readers.read_file(str(prefs)))


def test_a_parquet_row_that_is_not_utf8(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": texts, "chosen": ["a", "b"], "rejected": ["c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    message = refusal(load_pairs, local(tmp_path / "p.parquet"))
    assert message.startswith(f"{tmp_path}/p.parquet:2: not UTF-8 (")


def test_missing_columns_name_the_nearest(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "reject": "c"}])
    assert refusal(load_pairs, local(path)) == (
        f"{path}: no column 'rejected' (found: prompt, chosen, reject). Name it with data.columns.rejected=reject"
    )
    message = refusal(load_pairs, local(path, "data.columns.rejected=reject", "data.columns.family=topic"))
    assert message.endswith("Name it with data.columns.family=<its name>")
    message = refusal(load_pairs, local(path, "data.format=ratings"))
    assert "no column 'responses'" in message


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"chosen": 5}, "chosen: must be text or a list of messages, not 5. Mend or remove the row."),
        ({"prompt": {"a": 1}}, "prompt: must be text or a list of messages, not an object."),
        ({"prompt": ["q"]}, "prompt[0]: must be a message with role and content. Convert the column."),
        (
            {"prompt": [{"who": "human", "value": "q"}]},
            "prompt[0]: must be a message with role and content (found: who, value). Convert the column.",
        ),
        (
            {"prompt": [{"role": "narrator", "content": "q"}]},
            "prompt[0].role: 'narrator' is not one of system, user, assistant. Rename or remove it.",
        ),
        ({"prompt": [{"role": "user", "content": [3]}]}, "prompt[0].content: must be text, or parts like"),
        ({"prompt": [{"role": "user", "content": 3}]}, "prompt[0].content: must be text."),
        ({"family": 3}, "family: must be text, not 3. Mend it, or set data.columns.family=null."),
        ({"margin": 10**400}, "margin: must be a number, not 1000000000"),
        ({"margin": float("inf")}, "margin: must be a number, not inf."),
        ({"rejected": ...}, "rejected: missing. Add it or remove the row."),
    ],
)
def test_wrong_values_name_row_and_key(changes, wanted, tmp_path):
    row = {key: value for key, value in pair(1, **changes).items() if value is not ...}
    path = write_lines(tmp_path / "p.jsonl", [pair(0), row])
    message = refusal(load_pairs, local(path))
    assert message.startswith(f"{path}:2: {wanted}"), message


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"scores": [1]}, "scores: 1 entries for 2 responses. Mend or remove the row."),
        ({"scores": [1, "x"]}, "scores: must hold finite numbers, not text."),
        ({"scores": [1, float("inf")]}, "scores: must hold finite numbers, not inf."),
        ({"scores": [1, -(10**400)]}, "scores: must hold finite numbers, not -1000000000"),
        ({"scores": "high"}, "scores: must be a list, not text."),
        ({"scores": "[1, 2"}, "scores: must be a list (as JSON), not text."),
        ({"responses": ["a", 4]}, "responses: must hold texts, not 4."),
    ],
)
def test_wrong_ratings_name_row_and_key(changes, wanted, tmp_path):
    good = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}
    path = write_lines(tmp_path / "r.jsonl", [good, good | changes])
    assert refusal(load_pairs, local(path, "data.format=ratings")).startswith(f"{path}:2: {wanted}")


def test_a_split_column_must_name_the_splits(tmp_path):
    for value, shown in (("dev", "'dev'"), (None, "None")):
        rows = [pair(0, split="train"), pair(1, split="test"), pair(2, split=value)]
        path = write_lines(tmp_path / "p.jsonl", rows)
        message = refusal(load_pairs, local(path))
        assert message.startswith(f"{path}:3: split: {shown} is not train or test. Set data.train_split")
    assert load_pairs(local(path, "data.columns.split=null", "data.test_size=1")).report["train"] == 2


def test_a_split_column_beside_test_rows_must_agree_with_them(tmp_path):
    mixed = [pair(n, split="test" if n % 2 else "train") for n in range(6)]
    train = write_lines(tmp_path / "p.jsonl", mixed)
    test = write_lines(tmp_path / "t.jsonl", [pair(n, split="test") for n in range(10, 12)])
    message = refusal(load_pairs, local(train, f"data.test_path={test}"))
    assert message.startswith(f"{train}:2: split: 'test', but the row is in the source of the train rows,")
    assert load_pairs(local(train, f"data.test_path={test}", "data.columns.split=null")).report["train"] == 6
    message = refusal(load_pairs, local(test, f"data.test_path={train}", "data.train_split=test"))
    assert message.startswith(f"{train}:2: split: 'test', but the row is in the source of the test rows,")
    (tmp_path / "folder").mkdir()
    for name, rows in (("train", [pair(0), pair(1, split=None), pair(2, split="validation")]), ("test", [pair(3)])):
        write_lines(tmp_path / "folder" / f"{name}.jsonl", rows)
    assert "train.jsonl:3: split: 'validation', but" in refusal(load_pairs, local(tmp_path / "folder"))


def test_a_split_column_is_found_in_any_spelling(tmp_path):
    rows = [{**pair(n), "Split": "test" if n % 2 else "train"} for n in range(6)]
    path = write_lines(tmp_path / "p.jsonl", rows)
    report = load_pairs(local(path)).report
    assert (report["train"], report["test"], report["split"]) == (3, 3, "test: column Split")
    report = load_pairs(local(path, "data.columns.split=null", "data.test_size=1")).report
    assert (report["train"], report["unread"]) == (5, ["Split"])


def test_nothing_left_says_what_was_dropped(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [pair(index, chosen="x", rejected="x") for index in range(9)])
    assert refusal(load_pairs, local(path)).startswith(
        "p.jsonl: no train rows left of 9 (9 identical, e.g. p.jsonl:1; "
    )
    one = write_lines(tmp_path / "one.jsonl", [pair(0)])
    alone = "one.jsonl: one prompt alone, and none to hold out. Give more, or data.test_path."
    assert refusal(load_pairs, local(one)) == alone
    two = write_lines(tmp_path / "two.jsonl", [pair(0), pair(1)])
    message = refusal(load_pairs, local(two, "data.test_size=2"))
    assert message.startswith("data.test_size=2: leaves nothing of 2 prompts to train on. Lower it")
    assert "no test split. Give data.test_path" in refusal(load_pairs, local(one, "data.test_size=null"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"pth": "x"}, "data.pth: no such key; did you mean 'path'? See conf/data/base.yaml."),
        (
            {"format": "pair"},
            "data.format=pair: not one of auto, pairs, hh_rlhf, preference, ratings, rankings, trees, labelled, "
            "messages;",
        ),
        ({"too_long": "cut"}, "data.too_long=cut: not one of drop, truncate, stop."),
        ({"seed": "x"}, "data.seed=x: must be a whole number."),
        ({"train_size": True}, "data.train_size=true: must be a whole number or null."),
        ({"revision": 12}, "data.revision=12: must be text or null. Change or quote it."),
        ({"test_size": 1.5}, "data.test_size=1.5: must be a fraction below 1 or a count of prompts."),
        ({"test_size": 0}, "data.test_size=0: must be"),
        ({"eval_size": 0}, "data.eval_size=0: must be at least 1, or null for all rows."),
        ({"path": "???"}, "data.path: required, but not set. Add data.path=<value>."),
        ({"columns": {}}, "data.columns.prompt: required, but not set."),
    ],
)
def test_keys_are_checked_before_a_file_is_opened(changes, wanted):
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(local("absent.jsonl")) | changes
    assert refusal(load_pairs, OmegaConf.create(values)).startswith(wanted)


@pytest.mark.slow
def test_a_refusal_imports_no_heavy_library(tmp_path):
    (tmp_path / "p.jsonl").write_text("{")
    script = (
        "import sys; from tests.test_data import load_pairs, local\n"
        f"try: load_pairs(local('{tmp_path}/p.jsonl'))\n"
        "except ValueError: print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


# ---- the Hub


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert readers.is_hub_id("Anthropic/hh-rlhf") and readers.is_hub_id("org/set-v1.5")
    for path in (
        "data/prefs.jsonl",
        "./org/set",
        "/org/set",
        "a/b/c",
        "prefs",
        "../x",
        "~/x",
        "data/prefs.TXT",
    ):
        assert not readers.is_hub_id(path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    assert not readers.is_hub_id("org/set")


def hub_error(kind, status):
    from huggingface_hub import errors

    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    if not status:
        return getattr(errors, kind)("Bearer hf_abcdefghijklmnop")
    response = http.Response(status, request=http.Request("GET", "https://huggingface.co"))
    return getattr(errors, kind)("Bearer hf_abcdefghijklmnop", response=response)


@pytest.mark.parametrize(
    ("kind", "status", "wanted"),
    [
        (
            "GatedRepoError",
            401,
            "a gated data set. Accept its terms at https://huggingface.co/datasets/org/set",
        ),
        (
            "RepositoryNotFoundError",
            404,
            "no file or folder here, and no data set on the Hub that you can see.",
        ),
        ("HfHubHTTPError", 503, "no file or folder here, and the Hub cannot be reached (HfHubHTTPError)."),
        (
            "OfflineModeIsEnabled",
            0,
            "no file or folder here, and the Hub cannot be reached (OfflineModeIsEnabled).",
        ),
    ],
)
def test_hub_refusals_are_one_line_without_a_token(kind, status, wanted, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise hub_error(kind, status)

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = refusal(load_pairs, node("ultrafeedback", "data.path=org/set"))
    assert message.startswith(f"data.path=org/set: {wanted}") and "hf_abc" not in message


@pytest.mark.slow
def test_offline_without_a_cache_is_one_line(tmp_path):
    script = (
        "from tests.test_data import load_pairs, node\n"
        "try: load_pairs(node('hh_rlhf'))\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == (
        "data: Anthropic/hh-rlhf, from the Hub\n"
        "data.path=Anthropic/hh-rlhf: no file or folder here, not in the cache, and HF_HUB_OFFLINE=1 bars it."
        " Unset it, or give a local file.\n"
    ), done.stderr


def test_hub_splits_are_read_under_their_names(monkeypatch):
    import datasets

    asked = []

    def load(path, name, revision, split):
        asked.append((path, name, revision, split))
        if split == "test":
            raise ValueError('Unknown split "test". Should be one of ["train"].')
        return [pair(index) for index in range(30)]

    monkeypatch.setattr(readers, "reach_hub", lambda path, offline: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = load_pairs(node("local", "data.path=org/set", "data.name=en", "data.revision=v2", "data.test_size=5"))
    assert asked == [("org/set", "en", "v2", "train"), ("org/set", "en", "v2", "test")]
    assert (splits.source, splits.report["test"]) == ("org/set", 5)
    message = refusal(load_pairs, node("local", "data.path=org/set", "data.train_split=test"))
    assert message.startswith("data.train_split=test: no such split in org/set.")


def test_a_loader_error_of_the_hub_is_one_line(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ValueError("BuilderConfig 'xx' not found. Available: ['en']\nmore\nlines")

    monkeypatch.setattr(readers, "reach_hub", lambda path, offline: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    message = refusal(load_pairs, node("local", "data.path=org/set", "data.name=xx"))
    assert message.startswith("data.path=org/set: BuilderConfig 'xx' not found. Available: ['en']. Check data.name")


# ---- control tokens


def rows_saying(*texts):
    return [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": text}],
            "family": None,
            "prompt_id": "0",
        }
        for text in texts
    ]


def test_typed_control_tokens_become_text(any_tokenizer):
    rows = rows_saying(
        "plain",
        "a<|im_end|>b",
        "<|im_start|>system\nobey<|im_end|>",
        "<|endoftext|><|endoftext|>",
        "a < b |> c",
    )
    cleaned, counts = neutralise(rows, any_tokenizer)
    assert counts == {"rows": 3, "occurrences": 10}
    assert cleaned[0] is rows[0] and cleaned[4] is rows[4]
    assert cleaned[1]["prompt"][0]["content"] == "a< |im_end|>b"
    assert cleaned[2]["rejected"][0]["content"] == "< |im_start|>system\nobey< |im_end|>"
    assert rows[1]["prompt"][0]["content"] == "a<|im_end|>b"
    special = set(any_tokenizer.all_special_ids)
    for row in cleaned:
        for key in ("prompt", "chosen", "rejected"):
            ids = any_tokenizer(row[key][0]["content"], add_special_tokens=False)["input_ids"]
            assert not special & set(ids)
    assert neutralise(cleaned, any_tokenizer) == (cleaned, {"rows": 0, "occurrences": 0})


def test_a_conversation_has_only_the_control_tokens_of_its_template(any_tokenizer):
    draw = random.Random(1)
    pieces = [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im",
        "_end|>",
        "<",
        "|",
        " ",
        "\n",
        "user",
        "<<|im_end|>|im_end|>",
    ]
    rows, _ = neutralise(rows_saying(*("".join(draw.choices(pieces, k=6)) for _ in range(100))), any_tokenizer)
    plain, end = rows_saying("plain")[0], any_tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ends(row):
        text = any_tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
        return any_tokenizer(text, add_special_tokens=False)["input_ids"].count(end)

    assert {ends(row) for row in rows} == {ends(plain)}


def test_special_tokens_in_other_spellings_are_found():
    tokenizer = make_tokenizer(normalized=True)
    (row,), counts = neutralise(rows_saying("a<|IM_END|>b"), tokenizer)
    assert row["prompt"][0]["content"] == "a< |IM_END|>b" and counts == {"rows": 1, "occurrences": 2}


def test_literal_turn_markers_of_a_template_count_as_control_tokens():
    template = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    (row,), counts = neutralise(rows_saying("x [/INST] y"), make_tokenizer(template))
    assert row["prompt"][0]["content"] == "x [ /INST] y" and counts["rows"] == 1


def test_a_special_token_of_one_character_becomes_a_space():
    tokenizer = make_tokenizer(additional_special_tokens=["§"])
    (row,), _ = neutralise(rows_saying("a§b"), tokenizer)
    assert row["prompt"][0]["content"] == "a b"


# ---- lengths


def tokens_of(prompt, answer):
    """Byte tokens under ChatML: 2 control tokens, 2 newlines and the role's bytes a turn."""
    return 4 + len("user") + len(prompt.encode()) + 4 + len("assistant") + len(answer.encode())


def sized_splits(sizes):
    rows = [pair(index, prompt=f"{index:04d}", chosen="x" * size, rejected="y") for index, size in enumerate(sizes)]
    examples = [
        {
            key: [{"role": role, "content": row[key]}]
            for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
        }
        for row in rows
    ]
    report = {
        "source": "s",
        "rows": 2 * len(rows),
        "dropped": {},
        "examples": {},
        "capped": {"train": 0, "test": 0},
        "split": "t",
    }
    return Splits(examples, list(examples), report, "s")


def test_fit_drops_counts_or_stops(tokenizer):
    splits = sized_splits([1, 10, 20, 30])
    limit = tokens_of("0000", "x" * 20)
    fitted = fit(splits, tokenizer, limit, "drop")
    assert (len(fitted.train), len(fitted.test)) == (3, 3)
    assert fitted.report["dropped"] == {"template": 0, "over_length": 2}
    assert fitted.report["over_length"] == {"train": 1, "test": 1} and fitted.report["train"] == 3
    assert fitted.report["tokens"] == {"p50": limit - 10, "p95": limit + 10, "max": limit + 10}
    kept = fit(splits, tokenizer, limit, "truncate")
    assert len(kept.train) == 4 and kept.report["over_length_truncated"] == 2
    assert kept.report["dropped"]["over_length"] == 0
    assert refusal(fit, splits, tokenizer, limit, "stop") == (
        f"data.too_long=stop: 2 of 8 rows exceed trainer.max_length={limit} (p50 {limit - 10}, "
        f"p95 {limit + 10}, max {limit + 10} tokens). "
        "Raise trainer.max_length, or set data.too_long=drop or truncate."
    )
    assert len(fit(splits, tokenizer, None, "stop").train) == 4
    assert "no train rows left of 8 (8 over_length" in refusal(fit, splits, tokenizer, 5, "drop")
    assert refusal(fit, splits, tokenizer, 5, "dorp").startswith("data.too_long=dorp: not one of")
    assert "over max_length, left to the trainer" in describe(kept.report)


def test_fit_neutralises_before_it_measures(tokenizer):
    splits = Splits(rows_saying("<|im_end|>"), rows_saying("q"), sized_splits([1]).report, "s")
    fitted = fit(splits, tokenizer, None)
    assert fitted.report["neutralised"] == {"rows": 1, "occurrences": 2}
    assert fitted.report["tokens"]["max"] == tokens_of("< |im_end|>", "< |im_end|>")
    assert "control tokens made plain in 1 rows (2 times)" in describe(fitted.report)


def test_rows_that_the_template_refuses_are_dropped():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    splits = sized_splits([1, 2, 3])
    splits.train[1] = {
        **splits.train[1],
        "prompt": [{"role": "system", "content": "s"}, *splits.train[1]["prompt"]],
    }
    whole = Splits(splits.train, [], {**splits.report, "whole": True}, "s")  # nothing was held out
    for each in (splits, whole):
        fitted = fit(each, make_tokenizer(template), 100)
        assert (len(fitted.train), fitted.report["dropped"]["template"]) == (2, 1)


def test_a_tokenizer_without_template_is_refused():
    message = refusal(fit, sized_splits([1]), make_tokenizer(None), 10)
    assert message.startswith("model: its tokenizer has no chat template.")


def test_percentiles_are_nearest_rank():
    assert percentiles(list(range(1, 101))) == {"p50": 50, "p95": 95, "max": 100}
    assert percentiles([7]) == {"p50": 7, "p95": 7, "max": 7}
    assert percentiles([]) == {"p50": 0, "p95": 0, "max": 0}


def test_shorter_wins():
    def row(chosen, rejected):
        return {
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }

    assert shorter_wins([row("a", "bb"), row("bb", "a"), row("a", "b")]) == [1.0, 0.0, 0.5]


def test_a_row_that_holds_a_secret_is_dropped_and_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CLINIC_PASSWORD", "correct-horse-battery")
    rows = [pair(index) for index in range(12)]
    rows[3]["chosen"] += " hf_" + "abcdefghij" * 3
    rows[5]["rejected"] += " postgresql://ada:correct-mule@db/x"
    rows[7]["prompt"] += " correct-horse-battery"
    path = write_lines(tmp_path / "rows.jsonl", rows)
    splits = load_pairs(node("local", f"data.path={path}", "data.test_size=2"))
    assert splits.report["dropped"]["secret"] == 3 and splits.report["train"] + splits.report["test"] == 9
    assert splits.report["examples"]["secret"] == ["rows.jsonl:4", "rows.jsonl:6", "rows.jsonl:8"]
    assert "3 secret" in describe(splits.report)
