"""Answers of endpoints that drip, swell or are of another shape; a Hub whose files have names that lead elsewhere."""

import json
import re
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_limits
from test_adapter_files import ESCAPES, bought, refused
from test_limits import endpoint, refusal  # noqa: F401  a fixture

from rlhf_recipes.data import readers

# ruff: noqa: F811

MIB = 2**20
HI = [{"role": "user", "content": "Hi"}]


def drips(handler, head=False):
    """An answer a byte at a time, for as long as a client of this test can wait."""
    for _ in range(40):
        time.sleep(0.05)
        yield b"X-Slow: 1\r\n" if head else b" "
    yield b"" if head else json.dumps(test_limits.completion()).encode()


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_answer_that_drips_is_not_waited_for(endpoint, part):
    """Each byte is in time; httpx's limit begins anew with it."""

    def answer(handler):
        if part == "body":
            return 200, {}, drips(handler)
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        for chunk in drips(handler, head=True):
            handler.wfile.write(chunk)
        return 200, {}, []

    endpoint.answer = answer
    assert "no answer in time (timeout=0.3)" in refusal(endpoint, timeout=0.3, max_attempts=1)


@pytest.mark.slow
def test_gzip_in_gzip_is_read_no_further(endpoint):
    import gzip

    once = test_limits.bomb(50 * MIB)
    endpoint.answer = lambda handler: (200, {"Content-Encoding": "gzip, gzip"}, [gzip.compress(once, 9)])
    tracemalloc.start()
    try:
        assert re.search(r"more than \d\.\d MiB", refusal(endpoint))
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
    finally:
        tracemalloc.stop()


def served(told):
    """The part of `Served` that reads answers, at an endpoint that gives this one."""
    from rlhf_recipes.evaluation.served_policies import Served

    made = object.__new__(Served)
    made.host, made.names, made.model = "host", {None: "base"}, "base"
    made._told = lambda *_, **__: told
    made._completions = lambda folder, bodies, what: [(0, made._choice(told), {})]
    return made


CHOICE = {"text": "a", "token_ids": [5]}


@pytest.mark.parametrize(
    "choice",
    [
        None, 7, "a", [CHOICE], {}, {"text": 7}, {"text": None}, CHOICE | {"token_ids": "5"},
        CHOICE | {"token_ids": [-1]}, CHOICE | {"token_ids": [10**30]}, CHOICE | {"token_ids": [True]},
        CHOICE | {"token_ids": [5.0]}, CHOICE | {"token_ids": {"a": 1}},
    ],
)  # fmt: skip
def test_a_completion_of_another_shape_is_one_line(choice):
    from rlhf_recipes import inference

    made = served({"choices": [choice]})
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "a")
    made.stops, made._encode = [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "encode", lambda *_: ([1], 1))
        how = SimpleNamespace(max_new_tokens=1, temperature=0.0, seed=1)
        said = refused(made.generate, None, tokenizer, [HI], how, "test")
    assert said.startswith("host: ") and said.endswith("See that generator.base_url is right.")


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), None, True, 0.5, [], {}])
def test_a_log_probability_of_a_prompt_that_is_none_is_one_line(value):
    listed = [None, {"6": {"logprob": value}}]
    made = served({"choices": [CHOICE | {"prompt_logprobs": listed}]})
    said = refused(made.token_logps, None, None, [([5, 6], 1)], "test")
    assert said == "host: log-probabilities of other tokens than were sent. See its log."


@pytest.mark.parametrize("data", [7, "ab", {"id": "a"}, [7, None, "a"], None])
def test_a_list_of_models_that_is_none_is_empty(data):
    assert served({"data": data})._cards() == {}


def test_what_an_endpoint_calls_an_adapter_is_shown_as_text(tmp_path, capsys):
    from rlhf_recipes.evaluation import served_policies

    folder = Path(bought(tmp_path / "dpo")) / "adapter"
    made = served({})

    def told(*_, **__):
        raise served_policies._Rejected("no")

    made._told = told
    cards = {"a": {"root": 7}, "b": {"root": "x\0"}, ESCAPES: {"root": str(folder)}}
    assert made._adapter(str(folder), cards) == ESCAPES
    out = capsys.readouterr().out
    assert "pwned" in out and "\x1b" not in out and "\u202e" not in out


# ---- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import hub_server

    with hub_server.spoken_to(monkeypatch, tmp_path) as started:
        yield started


@pytest.mark.parametrize("name", ["../../../../../evil.json", "{}/evil.json", "a/../../../../../../evil.json"])
def test_a_file_name_of_the_hub_leads_nowhere(name, tmp_path, hub):
    """What is downloaded lies in the cache, whatever a repository calls its files."""
    from rlhf_recipes.publish import upload

    cache = tmp_path / "deep" / "er" / "cache"
    cache.parent.mkdir(parents=True)
    hub.put("evil/x", None, **{name.format(tmp_path): b"{}", "good.json": b"{}"})
    target = SimpleNamespace(repo_id="evil/x", repo_type="model")
    with suppress(Exception):  # huggingface_hub's own, of no one kind
        upload.download(target, "main", cache, ["good.json", name.format(tmp_path)])
    assert hub.seen["tree"] or hub.seen["info"]
    assert not [path for path in tmp_path.rglob("evil.json") if not path.is_relative_to(cache)]


@pytest.mark.parametrize(
    "place", ["{}/private.jsonl", "{}/*.jsonl", "http://127.0.0.1:9/x.jsonl", "zip://*::/{}/x.zip"]
)
def test_a_card_on_the_hub_names_no_file_of_this_machine(place, tmp_path, hub, monkeypatch):
    import datasets

    (tmp_path / "private.jsonl").write_text('{"prompt": "private"}\n')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False, raising=False)
    configs = json.dumps([{"config_name": "default", "data_files": place.format(tmp_path)}])
    card = f"---\nconfigs: {configs}\n---\n# A set\n".encode()
    hub.put("evil/set", None, kind="dataset", **{"README.md": card, "train.jsonl": b'{"prompt": "theirs"}\n'})
    said = refused(readers.Hub("evil/set", None, None).rows, "train")
    assert said.startswith("data.path=evil/set: its card names files elsewhere (")
    assert datasets.data_files.resolve_pattern.__name__ == "resolve_pattern"
