"""Files in the shapes that libraries write them: read, or refused on one line that names the shape. No model."""

import csv
import functools
import gzip
import io
import json
import random
import struct

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf
from test_data import ROOT, pair, refusal

from rlhf_recipes.data import arrow_rows, folders, readers
from rlhf_recipes.data.fit import describe
from rlhf_recipes.data.load import load_pairs

ROWS = [pair(index) for index in range(3)]
ROWS[1]["chosen"] = 'two\nlines; "quoted", with | and \t and é'
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
CELLS = [list(row.values()) for row in ROWS]
BY_NUMBER = {str(index): row for index, row in enumerate(ROWS)}


@functools.cache
def defaults():
    return OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "data" / "base.yaml"))


def local(path, **changes):
    """The data node of a path, without Hydra."""
    return {**defaults(), "path": str(path), **changes}


def zstd(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows=ROWS, **dialect):
    text = io.StringIO(newline="")
    writer = csv.writer(text, **dialect)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def spaced(delimiter):
    quoted = [", ".join(f'"{cell}"' for cell in row).replace(", ", f"{delimiter} ") for row in [["a, b", "c"]] * 2]
    return f"prompt{delimiter} chosen\n" + "\n".join(quoted)


def stream(rows=ROWS):
    sink = pyarrow.BufferOutputStream()
    data = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue().to_pybytes()


def feather(rows=ROWS):
    sink = pyarrow.BufferOutputStream()
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def parquet(rows=ROWS):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def parquet_twice():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["prompt", "prompt"]), sink)
    return sink.getvalue().to_pybytes()


VIEWER = {
    "features": [{"feature_idx": 0, "name": "prompt"}],
    "rows": [{"row_idx": index, "row": row, "truncated_cells": []} for index, row in enumerate(ROWS)],
    "num_rows_total": 3,
}
# what one file of either ending holds -> the same three rows
JSON_SHAPES = {
    "lines": lines(),
    "lines, a list each": lines([ROWS[:2], ROWS[2:]]),
    "list": json.dumps(ROWS),
    "list over lines": json.dumps(ROWS, indent=1),
    "list, a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "list, comma first": "[" + "\n,".join(map(json.dumps, ROWS)) + "\n]",
    "objects over lines": "\n\n".join(json.dumps(row, indent=4) for row in ROWS),
    "objects over lines after one on a line": "\n".join(json.dumps(r, indent=i or None) for i, r in enumerate(ROWS)),
    "objects joined": "".join(map(json.dumps, ROWS)),
    "carriage returns alone": "\r".join(map(json.dumps, ROWS)),
    "dict of columns": json.dumps(COLUMNS),
    "to_json()": json.dumps({name: dict(zip("012", column, strict=True)) for name, column in COLUMNS.items()}),
    "orient=index": json.dumps(BY_NUMBER, indent=2),
    "orient=split": json.dumps({"columns": list(COLUMNS), "index": [0, 1, 2], "data": CELLS}),
    "orient=tight": json.dumps(
        {"index": [0], "columns": list(COLUMNS), "data": CELLS, "index_names": [None], "column_names": [None]}
    ),
    "orient=table": json.dumps({"schema": {"fields": [{"name": "prompt"}]}, "data": ROWS}),
    "wrapped": json.dumps({"version": "1.0", "data": ROWS}, indent=1),
    "wrapped twice": json.dumps({"dataset": {"rows": ROWS}}),
    "one split": json.dumps({"train": ROWS}),
    "the viewer": json.dumps(VIEWER),
    "the viewer's rows": lines(VIEWER["rows"]),
}


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("shape", JSON_SHAPES)
def test_every_shape_of_json_is_read(shape, ending, tmp_path):
    path = tmp_path / f"p.{ending}"
    path.write_text(JSON_SHAPES[shape])
    assert [row for _, row in readers.read_file(str(path))] == ROWS


def test_conversations_in_several_groups_of_rows_are_read(tmp_path, monkeypatch):
    """As `datasets` and `recipes/cai.py` write them; a group ends in the midst of what is unpacked at a time."""
    monkeypatch.setattr(arrow_rows, "BATCH", 3)
    rows = [{"prompt": [{"role": "user", "content": f"question {n % 2}"}] * (n % 3), "n": n} for n in range(10)]
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    assert [row for _, row in readers.read_file(str(path))] == rows


FILES = {
    "semicolon.csv": table(delimiter=";"),
    "tab.csv": table(delimiter="\t"),
    "bar.csv": table(delimiter="|", lineterminator="\n"),
    "comma.tsv": table(),
    "tab.tsv": table(delimiter="\t"),
    "single.csv": table(quotechar="'", quoting=csv.QUOTE_ALL),
    "backslash.csv": table(quoting=csv.QUOTE_ALL, escapechar="\\", doublequote=False),
    "hint.csv": "sep=;\r\n" + table(delimiter=";"),
    "space.csv": table(quoting=csv.QUOTE_ALL).replace('","', '", "'),
    "space.tsv.gz": gzip.compress(table(delimiter="\t", quoting=csv.QUOTE_ALL).replace('"\t"', '"\t "').encode()),
    "index.csv": table([{"": str(index), **row} for index, row in enumerate(ROWS)]),
    "unnamed.csv": table([{"": "", **row} for row in ROWS], delimiter=";"),
    "trailing.csv": table([{**row, "": ""} for row in ROWS], delimiter=";"),
    "long.csv": table(ROWS + [pair(i, chosen="a;b;c\n" * 30) for i in range(3, 90)], delimiter=";"),
    "rows.ndjson": lines(),
    "rows.jsonl.zst": zstd(lines().encode()),
    "two frames.jsonl.zst": zstd(lines(ROWS[:1]).encode()) + zstd(lines(ROWS[1:]).encode()),
    "rows.csv.zst": zstd(table().encode()),
    "rows.json.zst": zstd(json.dumps(ROWS).encode()),
    "rows.arrow": stream(),
    "rows.feather": feather(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_dialect_and_packing_is_read(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name].encode() if isinstance(FILES[name], str) else FILES[name])
    assert [row for _, row in readers.read_file(str(path))][:3] == ROWS


def test_text_of_a_table_stays_as_it_is(tmp_path):
    """A space, a quote or another delimiter that belongs to the text is no sign of a dialect."""
    rows = [pair(1, chosen=' "Yes", he said; no | yes', rejected=" Paris"), pair(2, chosen='C:\\"x\\"', rejected=" a")]
    (tmp_path / "p.csv").write_text(table(rows), newline="")
    assert [row for _, row in readers.read_file(str(tmp_path / "p.csv"))] == rows
    (tmp_path / "p.csv").write_text("prompt\none, two; three\n" * 1 + "four\n")
    assert refusal(list, readers.read_file(str(tmp_path / "p.csv"))).endswith(
        "p.csv:2: 2 cells under 1 columns. Quote cells that hold commas."
    )


def test_lines_and_rows_are_named_in_every_shape(tmp_path):
    for shape, wheres in {
        "lines": [1, 2, 3],
        "objects over lines": [1, 7, 13],
        "list over lines": [1, 2, 3],
        "dict of columns": [1, 2, 3],
    }.items():
        (tmp_path / "p.jsonl").write_text(JSON_SHAPES[shape])
        found = [where for where, _ in readers.read_file(str(tmp_path / "p.jsonl"))]
        assert found == [f"{tmp_path}/p.jsonl:{number}" for number in wheres], shape


ONE = json.dumps(ROWS[0])
REFUSED = {
    "values.json": (json.dumps(CELLS), '{}: lists of lists (pandas\' orient="values"), without names of columns.'),
    "splits.json": (json.dumps({"train": ROWS, "test": ROWS}), "{}: one object of the splits train, test. Write a"),
    "names.json": (json.dumps({"a": ROWS[0], "b": ROWS[1]}), "{}: an object of 2 objects with the same keys"),
    "uneven.json": (json.dumps({"prompt": ["a", "b"], "chosen": ["c"]}), "{}: one object of columns of different"),
    "split.json": (json.dumps({"columns": ["a", "b"], "data": [[1]]}), '{}: pandas\' orient="split", but not a cell'),
    "cut.jsonl": (ONE + "\n" + ONE[:-9] + "\n" + ONE + "\n", "{}:2: not valid JSON ("),
    "cut at a comma.jsonl": ('{"prompt": "a",\n' + ONE + "\n", "{}:1: not valid JSON (Expecting property name"),
    "cut list.json": (json.dumps(ROWS, indent=1)[:-3], "{}:16: not valid JSON ("),
    "commas.jsonl": (f"{ONE},\n{ONE},\n", "{}:1: not valid JSON (Extra data at character"),
    "twice.jsonl": (json.dumps(ONE), "{}:1: a text that is JSON itself (encoded twice), but a row is an object"),
    "keys.jsonl": (
        ONE + '\n{"prompt": "a", "chosen": "b", "info": {"n": 1, "n": 1}}',
        "{}:2: not readable JSON (key 'n' appears twice). Mend or remove the line.",
    ),
    "messages.jsonl": ('[{"role": "user", "content": "a"}]\n' * 2, "{}:1: a list, but a row is an object"),
    "viewer.json": (
        json.dumps({"rows": [{"row_idx": 0, "row": ROWS[0], "truncated_cells": ["prompt"]}]}),
        "{}:1: the Hub's viewer cut ['prompt']. Download the data set.",
    ),
    "half.jsonl": ('{"a": 1}{"b": "\\ud83d"}', "{}:1: not readable JSON ("),
    "ragged.csv": ("prompt;chosen\na;b\nc;d;e\n", "{}:3: 3 cells under 2 columns. Quote cells that hold semicolons."),
    "unnamed.csv": ("prompt,chosen,\na,b,c\n", "{}:2: text under column 3, which has no name. Name it in the first"),
    "cut.jsonl.zst": (zstd(lines().encode() * 99)[:-20], "{}: not valid or cut off (Truncated compressed stream)."),
    "plain.jsonl.zst": (lines(), "{}: not valid or cut off (ZSTD decompress failed"),
    "packed.jsonl": (zstd(b"{}"), "{}: a binary file (zstandard data), not text."),
    "pointer.parquet": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "{}: a Git LFS pointer, not the data.",
    ),
    "pointer.jsonl.gz": ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "{}: a Git LFS pointer, not the"),
    "page.jsonl": ("\n<!DOCTYPE html><html>", "{}: a web page, not data. Download the file itself."),
    "cut.arrow": (stream()[:-40], "{}: not a readable Arrow file ("),
    "offsets.arrow": (
        stream().replace(struct.pack("<4i", 0, 10, 20, 30), struct.pack("<4i", 0, 10, 2**30, 30)),
        "{}: not a readable Arrow file (",
    ),
    "text.feather": ("prompt,chosen", "{}: not a readable Arrow file ("),
    "twice.parquet": (parquet_twice(), "{}: column 'prompt' appears twice. Rename one."),
    "empty.arrow": ("", "{}: empty, no rows in it."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_data_is_named(name, tmp_path):
    content, wanted = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert refusal(list, readers.read_file(str(path))).startswith(wanted.format(path))


def test_a_broken_line_ends_the_reading_there(tmp_path, monkeypatch):
    """Only what goes on beyond its line is read whole, and no more of it than the limit."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"\n' + "x" * 100)
    monkeypatch.setattr(readers, "JSON_LIMIT", 60)
    assert ":1: not valid JSON (" in refusal(list, readers.read_file(str(tmp_path / "p.jsonl")))
    (tmp_path / "p.jsonl").write_text("[\n" + "1,\n" * 100)
    assert "of JSON, which is read whole. Write it as .jsonl" in refusal(
        list, readers.read_file(str(tmp_path / "p.jsonl"))
    )


# ---- folders


def make(folder, files):
    """A folder of files: rows as their ending says, or the text of a file."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, str):
            path.write_text(rows)
        else:
            write = {"parquet": parquet, "csv": table, "arrow": stream}.get(name.rpartition(".")[2], lines)
            made = write([pair(index) for index in rows])
            path.write_bytes(made.encode() if isinstance(made, str) else made)
    return folder


def card(*configs):
    return f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\n# A set\n"


FILES_OF_CARD = [{"split": "train", "path": "data/tr*"}, {"split": "validation", "path": ["data/val.parquet"]}]
ALL = {"train": range(20), "test": range(20, 25), "validation": range(20, 24)}
# files; overrides; (train, test) rows; the report's split line; files that are not read
FOLDERS = {
    "two files": (
        {"train.jsonl": range(20), "test.csv": range(20, 25), "README.md": "# none\n"},
        {}, (20, 5), "test: split test", [],
    ),
    "parts": (
        {"data/train-00000-of-00002.parquet": range(10), "data/train-00001-of-00002.parquet": range(10, 20),
         "data/validation-00000-of-00001-b42a775f407cee45.parquet": range(20, 24)},
        {}, (20, 4), "test: split validation", [],
    ),
    "numbers": (
        {"train_2.jsonl": range(10), "train_10.jsonl": range(10, 20), "Held-Out.jsonl": range(20, 24)},
        {}, (20, 4), "test: split held_out", [],
    ),
    "both": (
        {f"{name}.jsonl": rows for name, rows in ALL.items()},
        {}, (20, 5), "test: split test; split validation is not used", ["validation.jsonl"],
    ),
    "chosen": (
        {f"{name}.jsonl": rows for name, rows in ALL.items()},
        {"test_split": "validation"}, (20, 4), "test: split validation; split test is not used", ["test.jsonl"],
    ),
    "held out": (
        {f"{name}.jsonl": rows for name, rows in ALL.items()},
        {"test_split": None, "test_size": 2}, (18, 2),
        "test: 2 of 20 prompts held out, seed 42; split test is not used; split validation is not used",
        ["test.jsonl", "validation.jsonl"],
    ),
    "whole names": (
        {"train.jsonl": range(20), "train_sft.jsonl": range(30, 40), "trainer.json": "{}", "testing.csv": range(5)},
        {"test_size": 2}, (18, 2), "test: 2 of 20 prompts held out, seed 42",
        ["testing.csv", "train_sft.jsonl", "trainer.json"],
    ),
    "prefix": (
        {"prefs_train.jsonl": range(20), "prefs_dev.jsonl": range(20, 24)}, {}, (20, 4), "test: split dev", [],
    ),
    "alone": (
        {"prefs.csv": range(20), "dataset_infos.json": "{}"},
        {"test_size": 2}, (18, 2), "test: 2 of 20 prompts held out, seed 42", [],
    ),
    "spark": (
        {"part-00000-aa-c000.parquet": range(10), "part-00001-bb-c000.parquet": range(10, 20), "_SUCCESS": ""},
        {"test_size": 2}, (18, 2), "test: 2 of 20 prompts held out, seed 42", [],
    ),
    "folders": (
        {"train/0000.parquet": range(10), "train/0001.parquet": range(10, 20), "test/0000.parquet": range(20, 25)},
        {}, (20, 5), "test: split test", [],
    ),
    "saved apart": (
        {"train/data-00000-of-00001.arrow": range(20), "train/state.json": "{}",
         "test/data-00000-of-00001.arrow": range(20, 25)},
        {}, (20, 5), "test: split test", [],
    ),
    "card": (
        {"README.md": card({"config_name": "default", "data_files": FILES_OF_CARD}), "data/tr1.parquet": range(10),
         "data/tr2.parquet": range(10, 20), "data/val.parquet": range(20, 24), "data/notes.json": "{}"},
        {}, (20, 4), "test: split validation", ["data/notes.json"],
    ),
    "card of many": (
        {"README.md": card({"config_name": "en", "data_files": "en/*.jsonl"}, {"config_name": "de", "data_dir": "de"}),
         "en/a.jsonl": range(9), "de/train.jsonl": range(20), "de/val.jsonl": range(20, 24)},
        {"name": "de"}, (20, 4), "test: split val", [],
    ),
    "folder by name": (
        {"en/train.jsonl": range(9), "de/train.jsonl": range(20), "de/dev.jsonl": range(20, 24)},
        {"name": "de"}, (20, 4), "test: split dev", [],
    ),
    "prefix of one": (
        {"prefs_train.jsonl": range(20), "test.jsonl": range(20, 25)}, {}, (20, 5), "test: split test", [],
    ),
    "prefs of a run": (
        {"README.md": card(*({"config_name": kind, "data_files": [{"split": "train", "path": f"train_{kind}.parquet"}]}
                             for kind in ("prefs", "sft"))),
         **{f"{split}_{kind}.parquet": ALL[split] for split in ("train", "test") for kind in ("prefs", "sft")}},
        {"train_split": "train_prefs", "test_split": "test_prefs"}, (20, 5), "test: split test_prefs", [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_any_kind(case, tmp_path):
    files, changes, wanted, split, unread = FOLDERS[case]
    splits = load_pairs(local(make(tmp_path / "set", files), **changes))
    report = splits.report
    assert ((report["train"], report["test"]), report["split"], report.get("unread_files", [])) == (
        wanted,
        split,
        unread,
    )
    assert ("; not read: " in describe(report)) == bool(unread)


CONFIGS = card({"config_name": "en", "data_files": "en.jsonl"}, {"config_name": "de", "data_files": "de.jsonl"})
REFUSED_FOLDERS = {
    "other names": ({"train_sft.jsonl": [1], "train_gen.jsonl": [1]}, {},
                    "data.train_split=train: no such split in {}. It has: train_gen, train_sft. Set data.train_split"),
    "another name": ({"train_sft.jsonl": [1]}, {}, "data.train_split=train: no such split in {}. It has: train_sft."),
    "several": ({"a.jsonl": [1], "b.jsonl": [1]}, {}, "data.train_split=train: no such split in {}. It has: a, b."),
    "typed": ({"train.jsonl": [1], "validation.jsonl": [2]}, {"test_split": "tset"},
              "data.test_split=tset: no such split in {}. It has: train, validation. Set"),
    "two kinds": ({"train.jsonl": [1], "train.csv": [1]}, {}, "{}: split train is there more than once: train.csv,"),
    "packed too": ({"train.jsonl": [1], "train.jsonl.gz": ""}, {}, "{}: split train is there more than once: "),
    "two sets of parts": ({"train-00000-of-00001.jsonl": [1], "train-00000-of-00002.jsonl": [1]}, {},
                          "{}: split train is there more than once: "),
    "a part missing": ({"train-00001-of-00002.jsonl": [1]}, {}, "{}: split train: 1 of 2 parts of train are here."),
    "configurations": ({"README.md": CONFIGS, "en.jsonl": [1], "de.jsonl": [1]}, {},
                       "{}: several configurations: en, de. Name one with data.name, or give a file."),
    "train of one": ({"README.md": CONFIGS, "train.jsonl": [1], "en.jsonl": [1]}, {}, "{}: several configurations"),
    "prefix alone": ({"train_val.jsonl": [1]}, {}, "data.train_split=train: no such split in {}. It has: train_val."),
    "folders": ({"en/train.jsonl": [1], "de/train.jsonl": [1]}, {}, "{}: several configurations: de, en."),
    "no such": ({"README.md": CONFIGS, "en.jsonl": [1]}, {"name": "enn"},
                "data.name=enn: no such configuration in {}; did you mean 'en'? It has: en, de."),
    "none": ({"train.jsonl": [1]}, {"name": "en"}, "data.name=en: no such configuration in {}. It has none: set"),
    "outside": ({"train.jsonl": [1]}, {"name": "../x"}, "data.name=../x: must be inside the folder."),
    "card outside": ({"README.md": card({"data_files": "../*.jsonl"}), "train.jsonl": [1]}, {},
                     "{}/README.md: data_files: ../*.jsonl: must be inside the folder."),
    "card absolute": ({"README.md": card({"data_files": [{"split": "train", "path": "/etc/*.json"}]})}, {},
                      "{}/README.md: data_files: /etc/*.json: must be inside the folder."),
    "card of elsewhere": ({"README.md": card({"data_files": "hf://datasets/a/b/*.csv"})}, {},
                          "{}/README.md: data_files: hf://datasets/a/b/*.csv: must be inside the folder."),
    "card without files": ({"README.md": card({"data_files": "data/*.parquet"})}, {},
                           "{}: none of the files that README.md names for train is here. Fetch them."),
    "card that is none": ({"README.md": "---\nconfigs: [\n---\n", "train.jsonl": [1]}, {},
                          "{}/README.md: its head is not valid YAML ("),
    "card of another shape": ({"README.md": "---\nconfigs: 3\n---\n", "train.jsonl": [1]}, {},
                              "{}/README.md: configs: must be a list of config_name and data_files."),
    "pointers": ({"train.jsonl": "version https://git-lfs.github.com/spec/v1\n"}, {},
                 "{}/train.jsonl: a Git LFS pointer, not the data. Run `git lfs pull` where it was cloned."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_what_a_folder_lacks_is_named(case, tmp_path):
    files, changes, wanted = REFUSED_FOLDERS[case]
    folder = make(tmp_path / "set", files)
    assert refusal(load_pairs, local(folder, **changes)).startswith(wanted.format(folder))


def test_the_test_path_is_a_file_or_a_folder(tmp_path):
    make(
        tmp_path,
        {"rows.jsonl": range(20), "t/val.jsonl": range(20, 24), "t/train.jsonl": [1], "u/x.csv": range(30, 33)},
    )
    for path, rows in (("t", 4), ("u", 3), ("u/x.csv", 3)):
        splits = load_pairs(local(tmp_path / "rows.jsonl", test_path=str(tmp_path / path)))
        assert (splits.report["test"], splits.report["split"]) == (rows, f"test: {path.rpartition('/')[2]}")
    whole = load_pairs(local(tmp_path / "t", test_path=f"{tmp_path}/u")).report
    assert (whole["split"], whole.get("unread_files", [])) == ("test: u; split val is not used", ["val.jsonl"])
    several = str(make(tmp_path / "v", {"a.csv": [1], "b.csv": [1]}))
    assert "no such split in" in refusal(load_pairs, local(tmp_path / "rows.jsonl", test_path=several))


def test_splits_of_the_hub_go_by_the_same_names(monkeypatch):
    import datasets

    def load(path, name, revision, split):
        if not split.startswith(tuple(there)):
            raise ValueError(f'Unknown split "{split}". Should be one of {there}.')
        data = datasets.Dataset.from_list([pair(i) for i in (range(20) if "train" in split else range(20, 24))])
        data.info.splits = dict.fromkeys(there)
        return data

    monkeypatch.setattr(readers, "reach_hub", lambda path, offline: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    there = ["train", "dev", "validation"]
    report = load_pairs(local("org/set")).report
    assert report["split"] == "test: split validation; split dev is not used"
    assert report.get("unread_files", []) == ["org/set[dev]"]
    report = load_pairs(local("org/set", train_split="train[:50%]+train", test_split="dev[:9]")).report
    assert report["split"] == "test: split dev[:9]; split validation is not used"
    assert "It has: train, dev, validation." in refusal(load_pairs, local("org/set", test_split="tset"))

    def several(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample")

    monkeypatch.setattr(datasets, "load_dataset", several)
    assert "several configurations: en, de. Name one" in refusal(load_pairs, local("org/set"))


# ---- anything at all


def mangled(draw, data):
    """Bytes cut off, doubled, changed, or in another encoding."""
    at = draw.randrange(len(data) + 1)
    odd = [b"\0", b"\xff", b'"', b"\n", b"[", b"]", b"{", b"}", b",", b";", b"\t", b"\r", b"\\", b" ", b"1", data]
    ways = {
        "cut": lambda: data[:at],
        "doubled": lambda: data + data,
        "inserted": lambda: data[:at] + draw.choice(odd) + data[at:],
        "replaced": lambda: data[:at] + draw.choice(odd) + data[at + 1 :],
        "changed": lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
        "encoded": lambda: data.decode("latin-1").encode(draw.choice(["utf-16", "utf-8", "utf-8-sig", "utf-32-le"])),
    }
    return ways[draw.choice(list(ways))]()


CSV_ODDITIES = [",,,", '"', "\r", "a;b,c\n1;2", '"a" b,c\n', "sep=;\na;b", "'a','b'\n'", "\ufeffa,b\n1,2", "a\\,b\n"]


def sources():
    """(ending, bytes) of everything above."""
    named = {f"{number}.jsonl": text for number, text in enumerate([*JSON_SHAPES.values(), *CSV_ODDITIES])}
    named |= {f"{number}.csv": text for number, text in enumerate(CSV_ODDITIES)} | {"p.parquet": parquet()} | FILES
    named |= {name: content for name, (content, _) in REFUSED.items()}
    return [(readers.ending(name), each.encode() if isinstance(each, str) else each) for name, each in named.items()]


def read_mangled(path, seed, count):
    """(files read, files refused); whatever else is raised is raised."""
    draw, everything, read = random.Random(seed), sources(), 0
    for number in range(count):
        ending, data = draw.choice(everything)
        data = mangled(draw, data)
        if ending in readers.TEXT_KINDS and draw.random() < 0.3:
            packed = draw.choice([".gz", ".zst"])
            ending, data = ending + packed, gzip.compress(data) if packed == ".gz" else zstd(data)
            data = draw.choice([data, mangled(draw, data)])
        file = path / f"{number}{draw.choice(readers.KINDS) if draw.random() < 0.1 else ending}"
        file.write_bytes(data)
        try:
            for where, row in readers.read_file(str(file)):
                assert isinstance(row, dict) and where.startswith(f"{file}:")
            read += 1
        except readers.Refusal as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error), (number, str(error))
        file.unlink()
    return read, count - read


@pytest.mark.slow
def test_whatever_a_file_holds_it_is_rows_or_one_line(tmp_path):
    read, refused = read_mangled(tmp_path, 0, 1000)
    assert read > 100 and refused > 100


def test_a_folder_is_never_searched_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST_FILES", 5)
    assert "more than 5 files" in refusal(folders.find, str(make(tmp_path, {f"{i}.csv": [1] for i in range(6)})))
