"""Files of rows that lead elsewhere, into other memory, or to gigabytes: one line, or no more memory than a row."""

import json
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from test_adapter_files import ESCAPES, refused

from rlhf_recipes.data import readers

MIB = 2**20


def save_to_disk(folder, names=("data-00000-of-00001.arrow",), splits=None, spoil=lambda data: data):
    """What `DatasetDict.save_to_disk` writes of a split, or of one Dataset; `names` are those in its state.json."""
    import io

    import pyarrow as pa

    table = pa.table({"prompt": ["a" * 10, "b" * 10, "c" * 10]})
    written = io.BytesIO()
    with pa.ipc.new_stream(written, table.schema) as writer:
        writer.write_table(table)
    place = folder / "train" if splits else folder
    place.mkdir(parents=True)
    if splits:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    (place / "state.json").write_text(json.dumps(state))
    features = {"prompt": {"dtype": "string", "_type": "Value"}}
    (place / "dataset_info.json").write_text(json.dumps({"features": features}))
    (place / "data-00000-of-00001.arrow").write_bytes(spoil(written.getvalue()))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "splits", "says"),
    [
        (["../../private.arrow"], None, "state.json: ../../private.arrow: must be inside the folder."),
        (["/etc/hostname"], None, "state.json: /etc/hostname: must be inside the folder."),
        ([f"../{ESCAPES}"], ["train"], "must be inside the folder."),
        (["s3://elsewhere/data.arrow"], ["train"], "s3://elsewhere/data.arrow: must be inside the folder."),
        ([], ["../../private"], "dataset_dict.json: ../../private: must be inside the folder."),
    ],
)
def test_a_saved_data_set_names_no_file_elsewhere(tmp_path, names, splits, says):
    from rlhf_recipes.data import folders

    assert says in refused(folders.find, save_to_disk(tmp_path / "set", names, splits))


def test_a_saved_data_set_reads_no_memory_beside_its_own(tmp_path):
    from rlhf_recipes.data import folders

    assert [row["prompt"][0] for _, row in folders.find(save_to_disk(tmp_path / "good")).rows("train")] == [
        "a",
        "b",
        "c",
    ]
    ends = struct.pack("<4i", 0, 10, 20, 30), struct.pack("<4i", 0, 10, 2**30, 30)
    folder = save_to_disk(tmp_path / "bad", spoil=lambda data: data.replace(*ends))
    assert refused(folders.find, folder).startswith(f"{folder}: a damaged save_to_disk folder (ArrowInvalid")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "nested.parquet", "late.nested.parquet", "arrow"])
def test_a_text_that_many_rows_repeat_is_unpacked_in_parts(tmp_path, monkeypatch, kind):
    """Kilobytes on the disk, gigabytes as a thousand rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(readers, "LINE_LIMIT", 2 * MIB)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array(["a" * MIB]))
    path = tmp_path / f"rows.{kind}"
    if kind == "arrow":
        with pa.ipc.new_file(path, pa.schema([("prompt", texts.type)])) as writer:
            writer.write_batch(pa.record_batch([texts], names=["prompt"]))
    else:
        late = "late" in kind  # than the first rows
        nested = pa.ListArray.from_arrays(pa.array([0] * 3000 * late + [*range(401)], pa.int32()), texts)
        table = pa.table({"prompt": nested if "nested" in kind else texts})
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**26)
    assert path.stat().st_size < 2 * MIB
    tracemalloc.start()
    try:
        assert sum(len(text) == MIB for _, row in readers.read_file(str(path))
                   for text in (row["prompt"] if "nested" in kind else [row["prompt"]])) == 400  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * MIB
    monkeypatch.setattr(readers, "LINE_LIMIT", MIB // 2)
    first = 3001 if "late" in kind else 1
    assert re.search(rf":{first}: (a row|rows) of more than 0 MiB", refused(list, readers.read_file(str(path))))


def test_parquet_that_lies_about_its_size_is_not_kept(tmp_path, monkeypatch):
    """What a group of rows unpacks to is looked at once more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(readers, "LINE_LIMIT", MIB)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a" * (3 * MIB)]}), path, compression="zstd", use_dictionary=False)
    told, data = pq.read_metadata(path).row_group(0).total_byte_size, path.read_bytes()
    varint = bytearray()
    for place in range(5):  # of thrift: seven bits a byte, doubled for the sign
        varint.append(((2 * told) >> (7 * place) & 127) | (128 if (2 * told) >> (7 * place + 7) else 0))
        if varint[-1] < 128:
            break
    small = bytes([2 | 128, *[128] * (len(varint) - 2), 0])  # 1, as long
    assert bytes(varint) in data
    path.write_bytes(data.replace(bytes(varint), small))
    assert pq.read_metadata(path).row_group(0).total_byte_size == 1
    assert re.search(r":1: (a row|rows) of more than 1 MiB", refused(list, readers.read_file(str(path))))


def test_a_type_of_arrow_s_that_is_a_pickle_is_not_made(tmp_path):
    import pickle

    import pyarrow as pa

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    told = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload())}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=told)])
    with pa.ipc.new_file(tmp_path / "rows.arrow", schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a"])], schema=schema))
    assert [row for _, row in readers.read_file(str(tmp_path / "rows.arrow"))] == [{"prompt": "a"}]
    assert not (tmp_path / "ran").exists()


def test_a_picture_that_a_row_names_is_not_fetched(monkeypatch):
    """By an address, or a path of this machine; at any depth. JSON, which `datasets` keeps as text, is read."""
    from datasets import Dataset, Features, Image, Json, List, Value

    opened = []
    monkeypatch.setattr(Image, "decode_example", lambda self, value, **_: opened.append(value))
    picture = {"bytes": None, "path": "http://127.0.0.1:9/internal?x=1"}
    turn = {"role": "user", "content": "a", "image": picture}
    row = {"image": picture, "messages": [turn], "more": {"deep": [picture]}, "note": {"a": 1}}
    text = Value("string")
    turns = List({"role": text, "content": text, "image": Image()})
    kinds = Features({"image": Image(), "messages": turns, "more": {"deep": List(Image())}, "note": Json()})
    data = Dataset.from_dict({key: [value] for key, value in row.items()}, features=kinds)
    [(where, read)] = readers.numbered("x", readers.undecoded(data))
    assert (where, read) == ("x:1", row) and opened == []
