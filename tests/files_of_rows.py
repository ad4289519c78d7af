"""Files of rows as people have them and as they break: strategies of hypothesis, and what must hold of each.

settings, name, content = draw(files())
check(settings, path)
"""

import csv
import gzip
import io
import json
import random
import time
from unittest import mock

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlhf_recipes.config import CONF
from rlhf_recipes.data import load, recognise
from rlhf_recipes.errors import Refusal

SECONDS = 10  # of the processor, that a file may take
LOADERS = (load.load_pairs, load.load_labelled, load.load_demonstrations, load.load_prompts)
NODE = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "base.yaml"))

ODD = [
    *(
        "",
        " \n",
        "nan",
        "None",
        "null",
        "0",
        "1",
        "a",
        "b",
        "tie",
        "true",
        "7.5",
        "[]",
        "{}",
        "[1, 2",
        "\\",
        '"',
        "a,b;c",
    ),
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n",
    "\n\nHuman: Open?\n\nAssistant: Yes.\n\nHuman: Till when?\n\nAssistant: Ten.",
    '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]',
    "[{'from': 'human', 'value': 'Hi'}]",
    "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Ho </s>",
    "Assistant: well",
    "<think>so</think> done",
    "\u202e\u0000\ufeff",
]
TEXTS = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.integers(0, 9999).map("What about number {}, then?".format),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 7), st.floats(), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "a"]), inner),
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "system",
        "input",
        "history",
        "context",
        "tools",
        "images",
        "label",
        "labels",
        "winner",
        "preference",
        "better_response_id",
        "margin",
        "p",
        "family",
        "split",
        "score_chosen",
        "score_rejected",
        "source",
        "id",
        "messages",
        "conversations",
        "model",
        "question",
    ]
)


def turn(role, text):
    return {"role": role, "content": text}


@st.composite
def conversations(draw, least=2):
    texts = draw(st.lists(TEXTS, min_size=least, max_size=4))
    turns = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    spelling = draw(st.sampled_from(("openai", "sharegpt", "parts")))
    if spelling == "sharegpt":
        return [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns]
    if spelling == "parts":
        return [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    return turns


@st.composite
def rows_of(draw, shape, names, inside):
    """One row of a shape, well formed: with two answers of these names, or answers in objects."""
    match shape:
        case "pairs":
            return {"prompt": draw(TEXTS), "chosen": draw(TEXTS), "rejected": draw(TEXTS)}
        case "implicit":
            return {"chosen": draw(conversations()), "rejected": draw(conversations())}
        case "hh_rlhf":
            asked, *answers = draw(TEXTS), draw(TEXTS), draw(TEXTS)
            said = [f"\n\nHuman: {asked}\n\nAssistant: {answer}" for answer in answers]
            return dict(zip(("chosen", "rejected"), said, strict=True))
        case "preference":
            verdict = draw(st.sampled_from((*names, "tie", None)))
            return {"prompt": draw(TEXTS), names[0]: draw(TEXTS), names[1]: draw(TEXTS), "winner": verdict}
        case "ratings" | "rankings":
            texts = draw(st.lists(TEXTS, min_size=1, max_size=4))
            scores = draw(st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=len(texts), max_size=len(texts)))
            key = "scores" if shape == "ratings" else "ranks"
            if inside:
                held = [
                    {"response": t, "score" if shape == "ratings" else "rank": s}
                    for t, s in zip(texts, scores, strict=True)
                ]
                return {"instruction": draw(TEXTS), "completions": held}
            return {"prompt": draw(TEXTS), "responses": texts, key: scores}
        case "labelled":
            return {
                "prompt": draw(TEXTS),
                "completion": draw(TEXTS),
                "label": draw(st.sampled_from((True, False, None))),
            }
        case "alpaca":
            return {"instruction": draw(TEXTS), "input": draw(TEXTS), "output": draw(TEXTS), "system": draw(TEXTS)}
        case "messages":
            return {"messages": draw(conversations())}


SHAPES = ("pairs", "implicit", "hh_rlhf", "preference", "ratings", "rankings", "labelled", "alpaca", "messages")
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".jsonl.zst")


@st.composite
def files(draw, most=60):
    """Settings of a data node; ending, content and rows of a file; whether their texts stand in it as they are; how
    many rows are looked at first."""
    shape = draw(st.sampled_from(SHAPES))
    names = draw(st.sampled_from((("response_0", "response_1"), ("answer_a", "answer_b"), ("output1", "output2"))))
    some = draw(st.lists(rows_of(shape, names, draw(st.booleans())), min_size=1, max_size=6))
    seed = draw(st.integers(0, 2**31))
    count = random.Random(seed).choice((1, 2, 5, *[most] * 6))
    odd = draw(st.lists(st.tuples(st.one_of(st.sampled_from(sorted(some[0])), NAMES), VALUES), max_size=4))
    ending = draw(st.sampled_from(ENDINGS))
    changes = {
        "format": draw(
            st.sampled_from(("auto", "auto", "auto", *("pairs", "preference", "ratings", "labelled", "messages")))
        ),
        "text": draw(st.sampled_from(("auto", "plain"))),
        "reduce": draw(st.sampled_from(("all", "best_worst"))),
        "test_size": draw(st.sampled_from((0.1, 1, 3))),
    }
    rows = many(some, odd, count, random.Random(seed))
    content = written(rows, ending)
    damage = draw(st.sampled_from(("", "", "", "", "cut", "flip", "bom", "utf-16", "latin-1")))
    return (
        changes,
        ending,
        damaged(content, damage, random.Random(seed)),
        rows,
        not damage and "json" in ending,
        draw(st.sampled_from((4, recognise.SAMPLE))),
    )


def many(some, odd, count, rng):
    """`count` rows like some, numbered so that they differ; a few with a key of `odd` put in, or one taken away."""
    rows = []
    for number in range(count):
        row = json.loads(json.dumps(rng.choice(some)).replace("number ", f"number {number} and "))
        if odd and rng.random() < 0.1:
            key, value = rng.choice(odd)
            row[key] = value
        if odd and rng.random() < 0.02:
            row.pop(rng.choice(sorted(row)), None)
        rows.append(row)
    return rows


def written(rows, ending) -> bytes:
    """The rows as a file of this ending; parquet holds what it cannot type as JSON text."""
    if ending in (".csv", ".tsv"):
        names = list(dict.fromkeys(key for row in rows for key in row))
        stream = io.StringIO()
        table = csv.writer(stream, delimiter="\t" if ending == ".tsv" else ",")
        table.writerow(names)
        for row in rows:
            cells = (row.get(name) for name in names)
            table.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])
        return stream.getvalue().encode("utf-8", "surrogatepass")
    if ending == ".parquet":
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}
        try:
            return _parquet(columns)
        except (pyarrow.ArrowException, OverflowError):
            return _parquet({name: list(map(json.dumps, cells)) for name, cells in columns.items()})
    if ending == ".json":
        return json.dumps(rows).encode()
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending.endswith(".gz"):
        return gzip.compress(content)
    return pyarrow.compress(content, "zstd", asbytes=True) if ending.endswith(".zst") else content


def _parquet(columns) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def damaged(content: bytes, how: str, rng) -> bytes:
    if how == "cut":
        return content[: rng.randrange(len(content) + 1)]
    if how == "flip" and content:
        at = rng.randrange(len(content))
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if how == "bom":
        return b"\xef\xbb\xbf" + content
    if how in ("utf-16", "latin-1"):
        return content.decode("utf-8", "replace").encode(how, "replace")
    return content


def check(changes: dict, path, rows: list, are_whole: bool, sample: int) -> int:
    """Load a file with every loader: a refusal on one line or rows whose counts add up and whose texts went in.

    Returns:
        The rows that were read.
    """
    read, node = 0, OmegaConf.create({**NODE, **changes, "path": str(path)})
    held = "\n".join(_texts(rows)) if are_whole and changes["text"] == "plain" else None
    for loader in LOADERS:
        began = time.process_time()
        try:
            with mock.patch.object(recognise, "SAMPLE", sample):
                splits = loader(node)
        except Refusal as refusal:
            assert "\n" not in str(refusal), refusal
        else:
            report = splits.report
            left_out = sum(report["dropped"].values()) + sum(report["capped"].values())
            kept = len(splits.train) + len(splits.test)
            assert report["candidates"] == left_out + kept - report["repeated"], report
            assert report["candidates"] >= report["rows"]
            read += report["rows"]
            for example in (*splits.train, *splits.test) if held is not None else ():
                for said in _contents(example):
                    assert all(part in held for part in said.split("\n\n")), said
        assert time.process_time() - began < SECONDS, path
    return read


def _contents(example):
    return [turn["content"] for value in example.values() if isinstance(value, list) for turn in value]


def _texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
    elif value is not None:
        yield str(value)
