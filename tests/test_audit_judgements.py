"""Judgements from files, runs and rows; the file that people label, both ways."""

import gzip
import json

import pytest

from rlhf_recipes.audit import judgements
from rlhf_recipes.cai import dataset
from rlhf_recipes.data import formats

ROW = {"prompt": "Hi", "first": "a", "second": "b", "p": 0.8, "judge": "j"}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def case(prompt="Hi", first="a", second="b", **more):
    messages = [{"role": "user", "content": prompt}]
    found = {"prompt_id": formats.prompt_id(messages), "prompt": messages, "family": "f", "first": first}
    return found | {"second": second, "why": ["judges"]} | more


def test_a_row_with_the_least_and_with_all(tmp_path):
    least, most = judgements.load(
        written(
            tmp_path / "j.jsonl",
            ROW,
            {**ROW, "principle": "kind", "family": "f", "flip": True, "mine": 3},
        )
    )
    prompt = [{"role": "user", "content": "Hi"}]
    assert least == {
        "prompt_id": formats.prompt_id(prompt), "prompt": prompt, "first": "a", "second": "b", "p": 0.8,
        "judge": "j", "principle": None, "family": None, "flip": None,
    }  # fmt: skip
    assert (most["principle"], most["family"], most["flip"]) == ("kind", "f", True) and "mine" not in most


def test_an_id_of_the_users_own_hides_no_pair(tmp_path):
    """The data's pairs go by their prompts; an id says something only where there is none."""
    rows = [{**ROW, "prompt_id": "q1"}, {**ROW, "prompt_id": "q1", "prompt": None}]
    found = judgements.load(written(tmp_path / "j.jsonl", *rows))
    assert [each["prompt_id"] for each in found] == [formats.prompt_id([{"role": "user", "content": "Hi"}]), "q1"]


def test_gzip_and_csv_say_the_same(tmp_path):
    packed = tmp_path / "j.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        file.write(json.dumps({**ROW, "flip": False}) + "\n")
    table = tmp_path / "j.csv"
    table.write_text("prompt,first,second,p,judge,principle,flip\nHi,a,b,0.8,j,,false\n")
    assert judgements.load(str(packed)) == judgements.load(str(table))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first": None}, "first: missing"),
        ({"second": "  "}, "second = '  ': must be text"),
        ({"second": " a "}, "second: the same text as first"),
        ({"judge": None}, "judge: missing"),
        ({"judge": 3}, "judge = 3: must be text"),
        ({"p": None}, "p = None: must be a probability"),
        ({"p": 1.2}, "p = 1.2: must be a probability"),
        ({"p": True}, "p = True: must be a probability"),
        ({"p": float("nan")}, "p = nan: must be a probability"),
        ({"p": "much"}, "p = 'much': must be a probability"),
        ({"principle": 3}, "principle = 3: must be text"),
        ({"family": ["f"]}, "family = ['f']: must be text"),
        ({"flip": "maybe"}, "flip = 'maybe': must be true"),
        ({"flip": 1}, "flip = 1: must be true"),
        ({"flips": True}, "flips: unknown key; did you mean 'flip'?"),
        ({"prompt": None}, "prompt_id: missing, and no prompt"),
        ({"prompt": 3}, "prompt: must be text or a list"),
        ({"prompt_id": 3}, "prompt_id = 3: must be text"),
    ],
)
def test_a_bad_row_is_one_line_with_file_row_and_key(tmp_path, change, said):
    path = written(tmp_path / "j.jsonl", ROW, {**ROW, **change})
    with pytest.raises(ValueError) as error:
        judgements.load(path)
    assert str(error.value).startswith(f"{path}:2: {said}")
    assert "\n" not in str(error.value)


def test_no_file_and_no_run(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        judgements.load(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"a folder without train_prefs\.parquet"):
        judgements.load(str(tmp_path))


def test_a_run_gives_a_judgement_for_every_principle(tmp_path):
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    row = {
        "prompt": [{"role": "user", "content": "Hi"}], "prompt_id": "q", "family": "f", "chosen": said[:1],
        "rejected": said[1:], "judge": "J", "p": 0.7, "flip": True, "by_principle": json.dumps({"x": 0.9, "y": 0.5}),
    }  # fmt: skip
    writer = dataset.Writer(tmp_path)
    writer.add("train_prefs", row)
    writer.add("disputed", {**row, "judge": None, "p": None, "flip": None, "by_principle": "{}", "prompt_id": "r"})
    writer.close()
    found = judgements.load(str(tmp_path))
    assert [(j["prompt_id"], j["judge"], j["principle"], j["p"], j["flip"]) for j in found] == [
        ("q", "J", "x", 0.9, True),
        ("q", "J", "y", 0.5, True),
        ("r", "construction", None, 1.0, None),
    ]
    assert {(j["first"], j["second"], j["family"]) for j in found} == {("a", "b", "f")}


def test_other_parquet_is_no_run(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "train_prefs.parquet")
    with pytest.raises(ValueError, match=r"not a pair of recipes/cai\.py"):
        judgements.load(str(tmp_path))
    (tmp_path / "train_prefs.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        judgements.load(str(tmp_path))


def test_rows_are_judgements_of_the_data():
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    row = {"prompt": [], "prompt_id": "q", "chosen": said[:1], "rejected": said[1:], "family": None}
    hard, soft = judgements.from_pairs([{**row, "p": None}, {**row, "p": 0.6}])
    assert (hard["judge"], hard["first"], hard["second"], hard["p"], soft["p"]) == ("data", "a", "b", 1.0, 0.6)


def test_both_orders_of_a_pair_are_one_pair():
    one = {**ROW, "prompt_id": "q", "principle": None}
    found = judgements.by_pair([one, {**one, "first": "b ", "second": "a", "p": 0.4, "judge": "k"}])
    assert list(found) == [("q", "a", "b")]
    assert judgements.by_pair([{**one, "second": " a"}]) == {}
    said = found["q", "a", "b"]
    assert [p for p, _ in said] == [0.8, 0.6]
    assert judgements.by_judge([*said, (0.4, {**one, "principle": "x"}), (0.2, one)]) == {
        "j": {None: 0.5, "x": 0.4},
        "k": {None: 0.6},
    }


def test_export_then_import(tmp_path):
    path = tmp_path / "label.jsonl"
    many = [case(f"question {n}", "good", "bad") for n in range(40)]
    assert judgements.export(str(path), many) == 40
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(rows[0]) == ["id", "prompt_id", "family", "prompt", "first", "second", "label", "why"]
    assert len({row["id"] for row in rows}) == 40
    # a coin for each pair: 40 alike would be 2^-39
    assert {row["first"] for row in rows} == {"good", "bad"}
    before = path.read_bytes()
    judgements.export(str(path), many)
    assert path.read_bytes() == before  # nothing is labelled: written again, the same
    assert judgements.labels(str(path)) == []
    for row, label in zip(rows, ("first", "Second ", "tie"), strict=False):
        row["label"] = label
    written(path, *rows)
    found = judgements.labels(str(path))
    assert judgements.load(str(path)) == found
    assert [(j["judge"], j["p"], j["first"], j["family"]) for j in found] == [
        ("human", p, row["first"], "f") for p, row in zip((1.0, 0.0, 0.5), rows, strict=False)
    ]
    assert found[0]["prompt_id"] == many[0]["prompt_id"]


def test_the_order_shown_is_of_the_pair_and_the_seed_alone(tmp_path):
    def sides(cases, seed=0):
        judgements.export(str(tmp_path / "x.jsonl"), cases, seed)
        lines = (tmp_path / "x.jsonl").read_text().splitlines()
        return {row["id"]: row["first"] for row in map(json.loads, lines)}

    many = [case(f"question {n}") for n in range(20)]
    swapped = [{**c, "first": c["second"], "second": c["first"]} for c in many]
    assert sides(many) == sides(many[::-1])
    assert sides(many) == sides(swapped)
    assert sides(many) != sides(many, seed=1)


def test_labels_are_never_overwritten(tmp_path):
    path = tmp_path / "label.jsonl"
    judgements.export(str(path), [case(), case("Other")])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["label"] = "tie"
    written(path, *rows)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"has 1 labels, which are never overwritten\. Give another path"):
        judgements.export(str(path), [case()])
    assert path.read_bytes() == before
    for other in ('{"some": "file"}\n', "half a li"):
        path.write_text(other)
        with pytest.raises(ValueError):
            judgements.export(str(path), [case()])
        assert path.read_text() == other
    path.write_text("")
    assert judgements.export(str(path), [case()]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "A"}, "label = 'A': must be first, second, tie or null"),
        ({"label": 1}, "label = 1: must be first"),
        ({"label": ["first"]}, "label = ['first']: must be first"),
        ({"first": "edited"}, "id = "),
        ({"id": 7}, "id = 7: not of these answers"),
        ({"second": None}, "second: missing"),
    ],
)
def test_a_bad_label_is_one_line(tmp_path, change, said):
    path = tmp_path / "label.jsonl"
    judgements.export(str(path), [case(), case("Other")])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= change
    written(path, *rows)
    with pytest.raises(ValueError) as error:
        judgements.labels(str(path))
    assert str(error.value).startswith(f"{path}:2: {said}")
    assert "\n" not in str(error.value)


def test_a_label_file_without_its_columns_or_with_a_pair_twice(tmp_path):
    path = tmp_path / "label.jsonl"
    judgements.export(str(path), [case()])
    row = json.loads(path.read_text())
    with pytest.raises(ValueError, match=":1: label: missing"):
        judgements.labels(written(path, {k: v for k, v in row.items() if k != "label"}))
    with pytest.raises(ValueError, match=":1: id: missing"):
        judgements.labels(written(path, {k: v for k, v in row.items() if k != "id"}))
    with pytest.raises(ValueError, match=rf":2: id = {row['id']}: is in .*:1 too"):
        judgements.labels(written(path, row, {**row, "label": "first"}))
