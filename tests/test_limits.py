"""What an endpoint, a data file and a chat template may take: bytes, lines, seconds; and numbers that are none."""

import functools
import gzip
import json
import math
import signal
import ssl
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import rlhf_recipes.endpoint
from rlhf_recipes.cai import make_pairs, reading, server
from rlhf_recipes.cai.backend import Journal, Request, ask
from rlhf_recipes.data import readers, template
from rlhf_recipes.data.fit import fit
from rlhf_recipes.data.load import Splits
from rlhf_recipes.launch.refusals import as_refusal

MIB = 2**20


class Handler(BaseHTTPRequestHandler):
    """Answers every POST with `server.answer(self)`: status, headers, chunks of the body."""

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.paths.append(self.path)
        status, headers, chunks = self.server.answer(self)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(chunk)
            self.server.sent += len(chunk)

    def log_message(self, *args):
        pass


def start_endpoint():
    endpoint = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.daemon_threads, endpoint.paths, endpoint.sent = True, [], 0
    endpoint.handle_error = lambda *args: None  # a client that hangs up is part of the tests
    endpoint.url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    threading.Thread(target=endpoint.serve_forever, args=(0.01,), daemon=True).start()
    return endpoint


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(rlhf_recipes.endpoint, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)  # 40 ms, and nothing for http
    started = start_endpoint()
    yield started
    started.shutdown()
    started.server_close()


def completion(content="fine", usage=None, **choice):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}, **choice}
    return {"choices": [choice], "usage": usage or {"prompt_tokens": 7, "completion_tokens": 3}}


def says(endpoint, written):
    """Let it answer with an object, or with JSON as text: what Python's json would not write, a server may."""
    text = written if isinstance(written, str) else json.dumps(written)
    endpoint.answer = lambda handler: (200, {}, [text.encode()])


def asked(endpoint, options=(), **settings):
    return server.Server(base_url=endpoint.url, model="m", **{"timeout": 30, "max_attempts": 2, **settings}), [
        Request("p", "judge" if options else "draft", [{"role": "user", "content": "Hi"}], "", options, 5)
    ]


def answer_of(endpoint, tmp_path, options=()):
    """What the journal remembers, in this process and in the next."""
    backend, requests = asked(endpoint, options)
    [answer] = ask(backend, requests, Journal(tmp_path / "answers.jsonl"), "test")
    assert Journal(tmp_path / "answers.jsonl").answers == {requests[0].key: answer}
    return answer


def refusal(endpoint, options=(), **settings):
    backend, requests = asked(endpoint, options, **settings)
    with pytest.raises(ValueError) as raised:
        list(backend.answer(requests, (), "test"))
    said = as_refusal(raised.value, None)
    assert said and "\n" not in str(raised.value) and len(said) < 400
    return said


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("same_host", [True, False])
def test_a_redirect_is_not_followed(endpoint, status, same_host):
    other = start_endpoint()
    other.answer = lambda handler: (200, {}, [json.dumps(completion("stolen")).encode()])
    port = endpoint.server_port if same_host else other.server_port
    where = f"http://user:word@127.0.0.1:{port}/internal/admin?x=1"
    endpoint.answer = lambda handler: (status, {"Location": where}, [])
    said = refusal(endpoint)
    other.shutdown()
    other.server_close()
    assert other.paths == [] and endpoint.paths == ["/v1/chat/completions"]
    assert f"status {status}, it points to http://127.0.0.1:{port}, which is not followed" in said
    assert "base_url" in said and "admin" not in said and "word" not in said


@pytest.mark.parametrize(
    ("location", "named"),
    [
        ("/v2/chat", "http://127.0.0.1:"),
        ("//[", "somewhere else"),
        ("http://x:99999999/", "somewhere else"),
        ("mailto:a@b", "somewhere else"),
        ("http://a\x1b[2Jb/", "somewhere else"),
        (None, "somewhere else"),
    ],
)
def test_a_redirect_to_nowhere_is_one_line_too(endpoint, location, named):
    endpoint.answer = lambda handler: (307, {} if location is None else {"Location": location}, [])
    said = refusal(endpoint)
    assert f"status 307, it points to {named}" in said and "\x1b" not in said


@functools.cache
def bomb(size):
    """A completion of `size` characters, as gzip."""
    return gzip.compress(json.dumps(completion("a" * size)).encode(), 9)


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("packed", [True, False])
def test_an_answer_over_the_limit_is_not_read(endpoint, status, packed):
    if packed:
        body = [bomb(50 * MIB)]
        assert len(body[0]) < MIB
    else:
        body = [b'{"choices": [{"message": {"content": "', *[b"a" * MIB] * 50]
    endpoint.answer = lambda handler: (status, {"Content-Encoding": "gzip"} if packed else {}, body)
    backend, requests = asked(endpoint)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"more than \d\.\d MiB") as raised:
            list(backend.answer(requests, (), "test"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(raised.value) and "base_url" in str(raised.value)
    assert peak < 12 * MIB
    assert len(endpoint.paths) == 1  # the same would come again
    assert packed or endpoint.sent < 25 * MIB


def test_the_limit_grows_with_what_is_asked_for(endpoint):
    tokens = [
        {
            "token": "x" * 64,
            "logprob": -1.25,
            "bytes": [120] * 64,
            "top_logprobs": [{"token": "A" * 64, "logprob": -12.345678, "bytes": [65] * 64}] * 20,
        }
    ] * server.CHOICE_TOKENS
    content = [*tokens[1:], {**tokens[0], "token": "A", "top_logprobs": [{"token": "A", "logprob": -0.1}]}]
    says(endpoint, completion("A", logprobs={"content": content}))
    backend, requests = asked(endpoint, ("A", "B"))
    [[(_, answer)]] = list(backend.answer(requests, (), "test"))
    assert answer["logps"] == pytest.approx([-0.1, -1.1])
    most = reading.most_bytes
    assert most(8192) > 4 * MIB > most(8) and most(8, 20) > most(8)


NO_COUNT = [
    '"many"',
    "NaN",
    "null",
    "-3",
    "true",
    "1e400",
    "-Infinity",
    "1" + "0" * 300,
    "[7]",
    '{"a": 1}',
    "2.5",
    '""',
]


@pytest.mark.parametrize("value", NO_COUNT)
def test_a_count_that_is_no_number_is_none(endpoint, tmp_path, value):
    says(endpoint, json.dumps(completion(usage={"prompt_tokens": "?", "completion_tokens": 3})).replace('"?"', value))
    assert answer_of(endpoint, tmp_path) == {"text": "fine", "finished": True, "prompt_tokens": 0, "tokens": 3}


@pytest.mark.parametrize("usage", ["many", 7, [7], True, ["prompt_tokens"]])
def test_usage_that_is_no_object_counts_nothing(endpoint, tmp_path, usage):
    says(endpoint, completion(usage=usage))
    assert answer_of(endpoint, tmp_path) == {"text": "fine", "finished": True, "prompt_tokens": 0, "tokens": 0}


@pytest.mark.parametrize("value", ['"x"', "NaN", "null", "true", "1e400", "2.5", "1" + "0" * 400, "[]", '"-0.5"'])
def test_a_log_probability_that_is_none_is_one_line(endpoint, value):
    listed = [{"token": "A", "logprob": "?"}, {"token": "B", "logprob": -1.0}]
    written = completion("A", logprobs={"content": [{"token": "A", "logprob": 0.0, "top_logprobs": listed}]})
    says(endpoint, json.dumps(written).replace('"?"', value))
    assert "no chat completion in its answer" in refusal(endpoint, ("A", "B"))


@pytest.mark.parametrize("value", ["-1e400", "-Infinity", "-1" + "0" * 300, "-9999"])
def test_a_log_probability_of_minus_infinity_is_the_lowest(endpoint, tmp_path, value):
    listed = [{"token": "A", "logprob": 0.0}, {"token": "B", "logprob": "?"}]
    written = completion("A", logprobs={"content": [{"token": "A", "logprob": 0.0, "top_logprobs": listed}]})
    says(endpoint, json.dumps(written).replace('"?"', value))
    assert answer_of(endpoint, tmp_path, ("A", "B"))["logps"] == [0.0, reading.LOWEST]


WRONG = {
    "no list": {"choices": {"message": {"content": "x"}}},
    "a text": {"choices": "fine"},
    "a text in it": {"choices": ["fine"]},
    "null": {"choices": [None]},
    "a list in it": {"choices": [["message"]]},
    "no message": {"choices": [{"text": "fine"}]},
    "a message that is a text": {"choices": [{"message": "fine"}]},
    "a number": completion(7),
    "an object": completion({"text": "fine"}),
    "true": completion(True),
    "a part that is a text": completion(["fine"]),
    "a part without a text": completion([{"type": "text"}]),
    "a part with a number": completion([{"type": "text", "text": 7}]),
    "a list": [1, 2],
    "deep": '{"choices":' + "[" * 200_000 + "]" * 200_000 + "}",
    "a number of 5,000 digits": json.dumps(completion(usage={"prompt_tokens": "?"})).replace('"?"', "1" * 5000),
}


@pytest.mark.parametrize("shape", WRONG)
def test_an_answer_of_another_shape_is_one_line(endpoint, shape):
    says(endpoint, WRONG[shape])
    assert "no chat completion in its answer" in refusal(endpoint)


def test_parts_of_text_are_text(endpoint, tmp_path):
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    says(endpoint, completion([thought, {"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]))
    assert answer_of(endpoint, tmp_path)["text"] == "fine"


def test_half_a_surrogate_pair_in_an_answer_is_kept_as_text(endpoint, tmp_path):
    says(endpoint, json.dumps(completion("cut \ud83d")))
    assert answer_of(endpoint, tmp_path)["text"] == "cut ?"


@pytest.mark.parametrize("told", ["nan", "-1e400", "-5", "1e-400", "Thu, 01 Jan 1970 00:00:00 GMT", "x" * 5000, "1_0"])
def test_a_pause_that_is_no_number_is_none(told):
    assert rlhf_recipes.endpoint.retry_after({"retry-after": told}) in (0.0, 10.0)


@pytest.mark.parametrize("told", ["1e400", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 -0000", "1e308"])
def test_a_pause_of_ages_ends_the_run(endpoint, told):
    endpoint.answer = lambda handler: (429, {"Retry-After": told}, [])
    assert "asks for a pause of" in refusal(endpoint, max_attempts=6)
    assert len(endpoint.paths) == 1


def test_what_a_refusal_says_is_one_plain_line_without_secrets(endpoint, monkeypatch):
    secret = "correct-horse-battery-7"
    monkeypatch.setenv("DATABASE_PASSWORD", secret)
    told = f"\x1b]0;pwned\x07\x1b[2Jno\r\n\u2028model \u202e{secret} glpat-abcdefghij0123456789\x9b31m"
    endpoint.answer = lambda handler: (400, {"Content-Type": "text/plain; charset=utf-8"}, [told.encode()])
    said = refusal(endpoint)
    assert "does not take the request" in said and "no model" in said and secret not in said and "glpat" not in said
    assert not any(character in said for character in "\x1b\x07\x9b\u202e\u2028\r\n")


def old_journal(path, answer):
    entries = [{"prompt_id": "p", "step": "draft", "key": "k", "answer": answer}]
    path.write_text(json.dumps(entries) + "\n" + json.dumps([{**entries[0], "key": "l", "answer": GOOD}]) + "\n")
    return path


GOOD = {"text": "t", "finished": True, "prompt_tokens": 2, "tokens": 1}


@pytest.mark.parametrize("bad", ["many", None, math.nan, math.inf, -5, True, [1], 10**400])
def test_counts_in_a_journal_that_are_no_numbers_do_not_end_a_run(tmp_path, compose, bad):
    path = old_journal(tmp_path / "answers.jsonl", {**GOOD, "prompt_tokens": bad})
    cfg = compose("cai")
    maker = make_pairs.PairMaker(None, None, None, [], cfg)
    spent = maker.spent(path, [tmp_path / "records.jsonl"])
    assert (spent["calls"], spent["prompt_tokens"], spent["completion_tokens"]) == (4, 4, 4)
    assert Journal(path).answers["k"] == {**GOOD, "prompt_tokens": 0}


@pytest.mark.parametrize(
    "bad",
    [
        {**GOOD, "text": ["a"]},
        {**GOOD, "text": None},
        {"logps": [math.nan, 0.0], "prompt_tokens": 0, "tokens": 0},
        {"logps": ["x", 0.0], "prompt_tokens": 0, "tokens": 0},
        {"prompt_tokens": 0, "tokens": 0},
        "text",
        None,
    ],
)
def test_an_answer_in_a_journal_that_is_none_is_asked_for_again(tmp_path, bad):
    path = old_journal(tmp_path / "answers.jsonl", bad)
    before = path.read_bytes()
    assert Journal(path).answers == {"l": GOOD}
    assert path.read_bytes() == before


def test_looking_at_a_journal_removes_nothing(tmp_path):
    path = old_journal(tmp_path / "answers.jsonl", GOOD)
    with path.open("ab") as file:
        file.write(b'[{"prompt_id": "p", "st')  # killed here, or another process is about to write the rest
    before = path.read_bytes()
    journal = Journal(path)
    assert journal.answers == {"k": GOOD, "l": GOOD} and path.read_bytes() == before
    request = Request("p", "draft", [{"role": "user", "content": "Hi"}])
    journal.write([(request, GOOD)])
    assert Journal(path).answers.keys() == {"k", "l", request.key}


@pytest.mark.parametrize("damage", [b"\0\0\0", b"[1]", b'[{"key": "k"}]', b"{}x", b'"a"', b"\xff", b"7"])
def test_a_damaged_line_is_named_and_stays(tmp_path, compose, damage):
    path = old_journal(tmp_path / "answers.jsonl", GOOD)
    with path.open("ab") as file:
        file.write(damage + b"\n")
    before = path.read_bytes()
    for read in (Journal, lambda path: make_pairs.PairMaker(None, None, None, [], compose("cai")).spent(path, [])):
        with pytest.raises(ValueError, match=r"answers\.jsonl:3: is damaged\. Remove the line") as raised:
            read(path)
        assert as_refusal(raised.value, None)
    (tmp_path / "records.jsonl").write_bytes(b"{}\n" + b"\0\0\n")
    with pytest.raises(ValueError, match=r"records\.jsonl:2: is damaged\. Remove the file"):
        list(make_pairs.read(tmp_path / "records.jsonl"))
    assert path.read_bytes() == before


# ---- data


def packed(path, chunks):
    """The chunks in a file, as its ending says."""
    import pyarrow

    zstd = None if path.suffix != ".zst" else "zstd"
    is_gzip = path.suffix == ".gz"
    with gzip.open(path, "wb", 6) if is_gzip else pyarrow.output_stream(path, compression=zstd) as file:
        for chunk in chunks:
            file.write(chunk)
    return path


ROW = b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
HUGE = [b"a" * MIB] * 12
BOMBS = {
    "rows.jsonl": ([ROW, b'{"prompt": "', *HUGE, b'"}\n', ROW], ":2: a line of more than 8 MiB"),
    "rows.jsonl.gz": ([ROW, b'{"prompt": "', *HUGE, b'"}\n', ROW], ":2: a line of more than 8 MiB"),
    "rows.jsonl.zst": ([ROW, b'{"prompt": "', *HUGE, b'"}\n', ROW], ":2: a line of more than 8 MiB"),
    "first.jsonl.gz": ([*HUGE], ":1: a line of more than 8 MiB"),
    "nul.jsonl.gz": ([bytes(MIB)] * 12, ":1: a line of more than 8 MiB"),
    "line.csv.gz": ([b"prompt,chosen\n", *HUGE, b",a\n"], ":2: a line of more than 8 MiB"),
    "cell.csv": (
        [b"prompt,chosen\n", b"p,a\n", b'"', *[b"a" * 9_999 + b"\n"] * 1_200],
        ":3: a row of more than 8 MiB",
    ),
    "cell.csv.gz": ([b"prompt,chosen\n", b'"', *[b"a" * 9_999 + b"\n"] * 1_200], ":2: a row of more than 8 MiB"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_line_or_row_over_the_limit_is_named_and_not_read(tmp_path, monkeypatch, name):
    assert readers.LINE_LIMIT == 64 * MIB
    monkeypatch.setattr(readers, "LINE_LIMIT", 8 * MIB)
    chunks, says = BOMBS[name]
    path = packed(tmp_path / name, chunks)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as raised:
            for _ in readers.read_file(str(path)):
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(raised.value).startswith(f"{path}{says}") and "\n" not in str(raised.value)
    assert as_refusal(raised.value, None)
    assert peak < 36 * MIB  # what is read is held two times, a cell of CSV with four bytes a character


@pytest.mark.parametrize("name", ["list.json", "list.json.gz", "rows.json", "one.json.gz", "list.jsonl.zst"])
def test_json_that_is_read_whole_has_a_limit(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "JSON_LIMIT", MIB)
    rows = {"list": [b"[", *[ROW.rstrip() + b",\n"] * 30_000, ROW, b"]"], "rows": [ROW] * 30_000, "one": [b"[", *HUGE]}
    path = packed(tmp_path / name, rows[name.partition(".")[0]])
    with pytest.raises(
        ValueError, match=r"jsonl?(\.gz|\.zst)?: more than 1 MiB of JSON, which is read whole\. .*\.jsonl"
    ):
        list(readers.read_file(str(path)))
    monkeypatch.setattr(readers, "JSON_LIMIT", 2 * MIB)
    if name != "one.json.gz":
        assert len(list(readers.read_file(str(path)))) >= 30_000


def test_a_line_at_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LINE_LIMIT", len(ROW))
    assert len(list(readers.read_file(str(packed(tmp_path / "rows.jsonl", [ROW, ROW, ROW.rstrip()]))))) == 3
    table = [b"prompt,chosen\n", b'"a\nb",c\n', b'"a\nb",d\n'] * 1
    monkeypatch.setattr(readers, "LINE_LIMIT", 14)
    assert len(list(readers.read_file(str(packed(tmp_path / "rows.csv", table))))) == 2


def test_parquet_of_huge_rows_is_not_read(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())]), compression="zstd") as writer:
        writer.write_table(pa.table({"prompt": ["a"] * 10}))
        writer.write_table(pa.table({"prompt": ["a" * (65 * MIB)]}))
    assert path.stat().st_size < MIB
    with pytest.raises(ValueError, match=r"rows\.parquet:11: rows of more than 64 MiB\."):
        list(readers.read_file(str(path)))


@pytest.mark.parametrize("format", ["file", "stream"])
@pytest.mark.parametrize("kind", ["text", "dictionary"])
def test_arrow_of_huge_rows_is_not_unpacked(tmp_path, format, kind):
    import pyarrow as pa

    prompts = [pa.array(["a"] * 10), pa.array(["a" * (65 * MIB)])]
    prompts = [each.dictionary_encode() for each in prompts] if kind == "dictionary" else prompts
    packed = pa.ipc.IpcWriteOptions(compression="zstd", emit_dictionary_deltas=False)
    path = tmp_path / "rows.arrow"
    with (pa.ipc.new_file if format == "file" else pa.ipc.new_stream)(
        path, pa.schema([("prompt", prompts[0].type)]), options=packed
    ) as writer:
        for each in prompts if kind == "text" or format == "stream" else prompts[1:]:  # a file has one dictionary
            writer.write_batch(pa.record_batch([each], names=["prompt"]))
    assert path.stat().st_size < MIB
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(ValueError, match=r"rows\.arrow:\d+: rows of more than 64 MiB\.") as raised:
            list(readers.read_file(str(path)))
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < MIB
    assert kind == "dictionary" or ":11:" in str(raised.value)


# ---- chat templates

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ANSWER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer(tiny_model, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(template, "SECONDS", 0.5)
    return AutoTokenizer.from_pretrained(tiny_model)


def splits_of(count):
    rows = [
        {"prompt": ANSWER[:1], "chosen": ANSWER[1:], "rejected": [{"role": "assistant", "content": f"No {i}"}]}
        for i in range(count)
    ]
    labels = {"family": None, "prompt_id": "0", "p": None}
    report = {"source": "s", "rows": count, "dropped": {}, "examples": {}, "split": "s"}
    return Splits([row | labels for row in rows], [row | labels for row in rows[:2]], report, "s")


def renders(tokenizer):
    """Every place that renders."""
    from types import SimpleNamespace

    from rlhf_recipes import inference
    from rlhf_recipes.cai.local import Local
    from rlhf_recipes.data.template import encode_prompt
    from rlhf_recipes.ppo.rewards import LearnedReward

    request = Request("p", "draft", ANSWER[:1], "", (), 5)
    return {
        "fit": lambda: fit(splits_of(1200), tokenizer, None),
        "cai": lambda: Local._encode(SimpleNamespace(tokenizer=tokenizer, _ids=len), request, ANSWER[:1]),
        "measure": lambda: inference.encode(tokenizer, ANSWER[:1], ANSWER[1:]),
        "prompt": lambda: inference.encode(tokenizer, ANSWER[:1], None),
        "reward": lambda: LearnedReward("r", tokenizer, None, None)._encode(ANSWER[:1], ANSWER[1:]),
        "ppo": lambda: encode_prompt(tokenizer, ANSWER[:1]),
    }


@pytest.mark.parametrize("place", ["fit", "cai", "measure", "prompt", "reward", "ppo"])
def test_a_rendering_without_end_ends(tokenizer, place):
    render = renders(tokenizer)[place]
    render()
    tokenizer.chat_template = ENDLESS
    begin = time.thread_time()
    with pytest.raises(ValueError, match=r"chat template of .*: takes more than 0\.5 s") as raised:
        render()
    assert time.thread_time() - begin < 5 and as_refusal(raised.value, None) and "\n" not in str(raised.value)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_many_rows_may_take_longer_than_one(tokenizer, monkeypatch):
    """The limit is that of one conversation."""
    monkeypatch.setattr(template, "SECONDS", 0.05)
    said = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    tokenizer.chat_template = f"{{% for a in range(3000) %}}{{% endfor %}}{said}"
    assert fit(splits_of(1200), tokenizer, None).report["tokens"]["max"] > 0


def test_a_rendering_leaves_timers_and_handlers_as_they_were(tokenizer):
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        template.render(tokenizer, ANSWER, tokenize=False)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 1000
        signal.raise_signal(signal.SIGALRM)
        assert seen == ["alarm"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_it_renders_without_a_limit(tokenizer):
    found = []
    thread = threading.Thread(target=lambda: found.append(template.render(tokenizer, ANSWER, tokenize=False)))
    thread.start()
    thread.join()
    assert "Hello" in found[0]


def test_a_machine_that_is_busy_is_waited_for(tokenizer, monkeypatch):
    """What counts is the time that this thread computes."""
    monkeypatch.setattr(template, "SECONDS", 0.1)
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: time.sleep(0.3) or "done")
    assert template.render(tokenizer, ANSWER) == "done"
