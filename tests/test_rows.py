"""Rows in mapped files: a sequence like a list, whatever parts they lie in; and what is left of them on the disk."""

import os
import random
import resource
import subprocess
import sys

import numpy as np
import pytest

from rlhf_recipes.data import keys, rows
from rlhf_recipes.errors import Refusal

COUNT = 25


def example(n, **changed):
    prompt = [{"role": "system", "content": ""}] * (n % 2) + [{"role": "user", "content": f"frage {n} 🙂\n"}]
    answer = [{"role": "assistant", "content": "ä" * n}]
    labels = {"family": f"f{n % 3}" if n % 4 else None, "prompt_id": f"{n:016x}", "p": n / 50 if n % 5 else None}
    return {"prompt": prompt, "chosen": answer, "rejected": answer, **labels, **changed}


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(rows, "PART_ROWS", 4)
    examples = [example(n) for n in range(COUNT)]
    return rows.written(examples), examples


def test_rows_are_a_sequence(made):
    found, examples = made
    order = random.Random(0).choices(range(COUNT), k=60)
    parts = (
        (found, examples),
        (found[3:20:4], examples[3:20:4]),
        (found[::-1], examples[::-1]),
        (found[:0], []),
        (found.select(order), [examples[n] for n in order]),
        (found.select(order)[7:], [examples[n] for n in order[7:]]),
        (rows.Rows.joined(found[20:], found[:2]), examples[20:] + examples[:2]),
        (found + found[:1], [*examples, examples[0]]),
    )
    for ours, theirs in parts:
        assert ours == theirs and len(ours) == len(theirs) and [*ours] == theirs
    assert found[-1] == examples[-1] and found[np.int64(2)] == examples[2] and found.keys == list(examples[0])
    assert found != examples[:-1] and found != [*examples[:-1], example(0)] and found != 3
    assert [len(batch) for batch in found.batches(10)] == [10, 10, 5]
    assert (found.count("p"), found[:6].count("p"), found.count("margin")) == (20, 4, 0)
    with pytest.raises(IndexError):
        found[COUNT]


def test_some_are_written_once_more(made):
    found, examples = made
    shuffled = found.select([8, 3, 24, 3])
    changed = shuffled.replaced([2, 0], rows.written([example(24, family="x"), example(8, p=None)]))
    assert changed == [example(8, p=None), examples[3], example(24, family="x"), examples[3]]
    assert changed.select([3, 2]) == [examples[3], example(24, family="x")] and shuffled[2] == examples[24]
    assert changed.find(changed.select([2, 0])).tolist() == [2, 0]
    assert [*changed.to_dataset()] == [*changed]
    again = rows.written([*changed])
    assert again.digest(["prompt", "p"]) == changed.digest(["prompt", "p"]) != shuffled.digest(["prompt", "p"])


@pytest.mark.slow
def test_files_go_with_their_rows_and_folders_with_their_process(tmp_path):
    code = """import os; from rlhf_recipes.data.rows import written
rows = written([dict(prompt=[])]); print(rows.files[0].path, flush=True); {}"""

    def left(end):
        done = subprocess.run(
            [sys.executable, "-c", code.format(end)], env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.stdout.startswith(str(tmp_path)), done.stderr
        return sorted(path.name for path in tmp_path.glob("*/*"))

    assert len(left("os._exit(0)")) == 2  # the rows, and the lock
    assert left("del rows; os._exit(0)") == ["lock"]  # those of the killed one are gone, too
    assert left("None") == [] and not list(tmp_path.iterdir())


def test_no_room_is_one_line():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        with pytest.raises(
            Refusal, match=r"^TMPDIR=\S+: rows cannot be written \(File too large\)\. Free space, or set"
        ):
            rows.written(example(n, chosen=[{"role": "assistant", "content": "long " * 200}]) for n in range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 21, 22, 1000])
def test_the_order_is_that_of_random_sample(count):
    assert keys.drawn(count, 42).tolist() == random.Random(42).sample(range(count), count)


def test_the_first_of_the_same_examples_is_kept():
    known = keys.Keys()
    said = [3, 1, 3, 2, 1, 3]
    for line, n in enumerate(said, 1):
        known.add(f"a.jsonl:{line}", example(n, family=str(line)), None)
    assert known.are_first(np.arange(6)).tolist() == [True, True, False, True, False, False]
    assert known.are_first(np.array([5, 4, 3])).tolist() == [True] * 3
    assert known.share_prompts(np.arange(6), np.array([1])).tolist() == [n == 1 for n in said]
    assert [*known.places(np.array([4, 0]))] == ["a.jsonl:5", "a.jsonl:1"] and known.where(2) == "a.jsonl:3"
    with pytest.raises(Refusal, match=r"^b\.jsonl:1: half of a surrogate pair"):
        known.add("b.jsonl:1", example(1, chosen=[{"role": "assistant", "content": "\ud83d"}]), None)
