"""The server backend against a loopback endpoint that speaks the protocol, fails on demand and counts; a real one."""

import email.utils
import json
import math
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import LIMIT

import rlhf_recipes.endpoint
from rlhf_recipes.cai import fingerprint, flight, reading, server
from rlhf_recipes.cai.backend import Journal, Request, ask
from rlhf_recipes.launch.refusals import as_refusal

KEY = "key-0123456789-never-shown"
FAULTS = ("rate", "error", "hang", "garbage", "no choices", "html", "lost")
LATIN = "Olá, 你好 🙂"


class Endpoint(ThreadingHTTPServer):
    """POST /v1/chat/completions; what a test sets decides how it answers.

    `fault(text, attempt)` of the last message's text gives None, a status or one of FAULTS; `choice(body)` the fields
    of the first choice; `continues` what must be said for a last turn of the assistant to be continued, None: nothing
    helps. It counts, by text: `asked`, and `answered` of them with 200; not whether it continues a turn; and all
    `connections`.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.open = threading.Lock(), threading.Event()
        self.asked, self.answered, self.bodies, self.keys = Counter(), Counter(), [], set()
        self.in_flight = self.most_in_flight = self.connections = 0
        self.fault = lambda text, attempt: None
        self.choice = lambda body: says(f"answer to {body['messages'][-1]['content']}")
        self.serve = lambda: None
        self.calls = lambda body: body["model"]  # what it calls the model
        self.models = None  # its list at /v1/models
        self.usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        self.fault_headers, self.told, self.continues, self.ends = {}, "no", None, "nesday"

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        listed = self.server.models if self.path == "/v1/models" else None
        written = json.dumps({"object": "list", "data": listed}).encode()
        self.send_response(404 if listed is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def do_POST(self):
        endpoint = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if body["messages"] == list(server.BEGUN):
            told = {key: body[key] for key in server.CONTINUES[0] if key in body}
            return self.respond(None, body, says(endpoint.ends if told == endpoint.continues else "Monday, Tuesday,"))
        with endpoint.lock:
            endpoint.asked[text] += 1
            attempt = endpoint.asked[text]
            endpoint.bodies.append(body)
            endpoint.keys.add(self.headers["Authorization"])
            endpoint.in_flight += 1
            endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
        try:
            fault = endpoint.fault(text, attempt) if self.path == "/v1/chat/completions" else 404
            if fault is None:
                endpoint.serve()
        finally:
            with endpoint.lock:
                endpoint.in_flight -= 1
                endpoint.answered[text] += fault is None
        self.respond(fault, body)

    def respond(self, fault, body, choice=None):
        if fault == "hang":
            self.server.open.wait(60)
        if fault in ("hang", "lost"):
            self.close_connection = True
            return
        good = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": self.server.calls(body),
            "usage": self.server.usage,
        }
        good["choices"] = [{"index": 0, **(choice or self.server.choice(body))}] if fault is None else []
        status = {None: 200, "garbage": 200, "no choices": 200, "html": 200, "rate": 429, "error": 500}.get(
            fault, fault
        )
        # Hosted endpoints show a wrong key in their message.
        told = {
            "error": {
                "message": f"{self.server.told}: {self.headers['Authorization']}",
                "type": "invalid_request_error",
            }
        }
        written = json.dumps(good if status == 200 else told)
        written = {"garbage": '{"choices": [{"mess', "html": "<h1>Welcome</h1>"}.get(fault, written).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/json")
        self.send_header("Content-Length", str(len(written)))
        for name, value in self.server.fault_headers.items() if status != 200 else ():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(written)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoints(monkeypatch):
    """Starts as many as are asked for."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(rlhf_recipes.endpoint, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)  # 40 ms, and nothing for http
    started = []

    def start(count):
        for each in [Endpoint() for _ in range(count)]:
            started.append((each, threading.Thread(target=each.serve_forever, args=(0.01,), daemon=True)))
            started[-1][1].start()
        return [each for each, _ in started]

    yield start
    for each, thread in started:
        each.open.set()
        each.shutdown()
        thread.join()
        each.server_close()
    assert threads() == []


@pytest.fixture
def endpoint(endpoints):
    return endpoints(1)[0]


@pytest.fixture
def pauses(monkeypatch):
    """Seconds that the backend was to wait; it waits for none of them."""
    asked, wait = [], threading.Event.wait

    def paused(event, seconds=None):
        own = sys._getframe(1).f_code.co_filename == server.__file__  # other threads of this process wait too
        return asked.append(seconds) if own and seconds is not None else wait(event, seconds)

    monkeypatch.setattr(threading.Event, "wait", paused)
    return asked


def says(text, finish="stop", content=None):
    logprobs = {} if content is None else {"logprobs": {"content": content}}
    return {"message": {"role": "assistant", "content": text}, "finish_reason": finish, **logprobs}


def token(text, *listed):
    """One entry of `logprobs.content`, its most likely token sampled."""
    top = [
        {"token": name, "logprob": math.log(p) if p else -math.inf, "bytes": list(name.encode())} for name, p in listed
    ]
    return {"token": text, "logprob": 0.0, "bytes": list(text.encode()), "top_logprobs": top}


def backend(endpoint, **changes):
    return server.Server(**{"base_url": endpoint and endpoint.url, "model": "some/model", "timeout": 30, **changes})


def generations(count):
    return [
        Request(f"p{i}", "answer", [{"role": "user", "content": f"{LATIN} {i}"}], "", (), 32, 0.7, 0.9, i)
        for i in range(count)
    ]


def choices(count):
    return [
        Request(f"p{i}", "judge", [{"role": "user", "content": f"which, {i}?"}], "The answer is (", ("A", "B"))
        for i in range(count)
    ]


def answers(asked, requests, known=()):
    """Request key -> answer; no request is answered twice."""
    pairs = [pair for group in asked.answer(requests, known, "test") for pair in group]
    assert len({request.key for request, _ in pairs}) == len(pairs)
    return {request.key: answer for request, answer in pairs}


def logps_of(endpoint, content, text="(A)"):
    endpoint.choice = lambda body: says(text, content=content)
    [request] = choices(1)
    return answers(backend(endpoint), [request])[request.key]["logps"]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "endpoint"]


def test_every_request_is_answered_once_whatever_fails(endpoint, tmp_path):
    requests = generations(210)
    texts = [request.messages[-1]["content"] for request in requests]
    kinds = {text: FAULTS[i // 10 % len(FAULTS)] for i, text in enumerate(texts) if i % 10 == 0}
    endpoint.fault = lambda text, attempt: kinds.get(text) if attempt == 1 else None
    got = ask(backend(endpoint, timeout=5), requests, Journal(tmp_path / "journal.jsonl"), "test")
    assert [answer["text"] for answer in got] == [f"answer to {text}" for text in texts]
    assert endpoint.answered == Counter(texts)
    assert endpoint.asked == Counter(texts) + Counter(kinds.keys())


def test_the_endpoint_always_has_as_many_requests_as_it_may(endpoint):
    together = threading.Barrier(8)  # nobody is served before eight are there
    endpoint.serve = lambda: together.wait(60)
    requests = generations(15 * 8)
    assert len(answers(backend(endpoint, concurrency=8), requests)) == len(requests)
    assert endpoint.most_in_flight == 8


def test_connections_are_used_again(endpoint):
    asked = backend(endpoint, concurrency=4)
    for _ in range(3):
        assert len(answers(asked, generations(40))) == 40
    assert endpoint.connections <= 4


def test_a_generation_is_asked_and_read_as_the_protocol_says(endpoint):
    request = generations(4)[3]
    endpoint.choice = lambda body: says(LATIN, finish="length")
    asked = backend(endpoint)
    assert asked.name == "some/model at 127.0.0.1"
    assert answers(asked, [request]) == {
        request.key: {"text": LATIN, "finished": False, "prompt_tokens": 7, "tokens": 3}
    }
    assert endpoint.bodies == [
        {
            "model": "some/model",
            "messages": request.messages,
            "max_tokens": 32,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 3,
        }
    ]


def test_an_answer_without_text_and_counts_is_one(endpoint):
    endpoint.usage, endpoint.choice = None, lambda body: says(None)
    [answer] = answers(backend(endpoint), generations(1)).values()
    assert answer == {"text": "", "finished": True, "prompt_tokens": 0, "tokens": 0}


def test_what_is_known_is_not_asked(endpoint, capsys):
    requests = generations(10)
    known = {request.key for request in requests[:7]}
    assert answers(backend(endpoint), requests, known).keys() == {request.key for request in requests[7:]}
    assert sum(endpoint.asked.values()) == 3
    assert "test 10/10" in capsys.readouterr().err


def test_pauses_double_up_to_a_cap_and_are_the_same_in_every_run(endpoint, pauses, monkeypatch):
    monkeypatch.setattr(rlhf_recipes.endpoint, "BACKOFF_SECONDS", 1.0)
    endpoint.fault = lambda text, attempt: "error" if attempt % 10 else None
    [request] = generations(1)
    for _ in range(2):
        answers(backend(endpoint, max_attempts=10), [request])
    assert pauses[:9] == pauses[9:] and len(set(pauses[:9])) == 9
    assert all(0 <= pause <= min(30, 2**i) for i, pause in enumerate(pauses[:9]))
    assert max(pauses) > 8


@pytest.mark.parametrize("status", ["rate", 503])
@pytest.mark.parametrize("told", ["41", "41.0", "date"])
def test_a_pause_that_the_endpoint_asks_for_is_made(endpoint, pauses, status, told):
    date = email.utils.formatdate(time.time() + 41, usegmt=True)
    endpoint.fault_headers = {"Retry-After": date if told == "date" else told}
    endpoint.fault = lambda text, attempt: status if attempt == 1 else None
    assert len(answers(backend(endpoint), generations(1))) == 1
    assert len(pauses) == 1 and pauses[0] <= 41.1
    assert pauses[0] > (0 if told == "date" else 40.9)  # a date is as far away as it is


@pytest.mark.parametrize("told", ["soon", "", "-5", "nan"])
def test_a_pause_that_cannot_be_read_is_none(endpoint, pauses, told):
    endpoint.fault_headers = {"Retry-After": told}
    endpoint.fault = lambda text, attempt: "rate" if attempt == 1 else None
    assert len(answers(backend(endpoint), generations(1))) == 1
    assert 0 <= pauses[0] <= 0.01


@pytest.mark.parametrize("told", ["7200", "inf"])
def test_a_pause_of_hours_is_not_made(endpoint, pauses, told):
    endpoint.fault_headers = {"Retry-After": told}
    endpoint.fault = lambda text, attempt: "rate"
    with pytest.raises(ValueError, match=r"status 429 .*asks for a pause"):
        answers(backend(endpoint), generations(1))
    assert not pauses


def test_variants_of_an_option_are_added_up(endpoint):
    lead_in = token("The", ("The", 0.9), ("A", 0.1))
    here = token(" (A", (" (A", 0.5), ("B", 0.2), ("A", 0.125), ("**B**", 0.05), ("a", 0.05), ("AB", 0.05))
    later = token("B", ("B", 1.0))
    assert logps_of(endpoint, [lead_in, here, later]) == pytest.approx([math.log(0.625), math.log(0.25)])
    body = endpoint.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["temperature"], body["max_tokens"]) == (True, 20, 0, 8)
    assert body["messages"] == choices(1)[0].messages  # the prefix is not among them


def test_an_option_that_is_not_listed_lies_below_the_lowest(endpoint):
    here = token("A", ("A", 0.75), ("The", 0.25))
    assert logps_of(endpoint, [here]) == pytest.approx([math.log(0.75), math.log(0.25) - 1])


def test_a_log_probability_of_minus_infinity_stays_a_number(endpoint):
    here = token("A", ("A", 1.0), ("B", 0.0), (" B", 0.0))
    assert logps_of(endpoint, [here]) == pytest.approx([0, -9999 + math.log(2)])


def test_log_probabilities_without_a_letter_give_nothing(endpoint):
    tokens = [token("Well", ("Well", 0.9), ("A", 0.1)), token(",", (",", 1.0))]
    assert logps_of(endpoint, tokens, text="Well,") is None


def test_malformed_log_probabilities_are_garbage(endpoint):
    endpoint.choice = lambda body: says("A", content=[{"token": "A", "top_logprobs": [{"token": "A"}]}])
    with pytest.raises(ValueError, match="no chat completion in its answer"):
        answers(backend(endpoint, max_attempts=2), choices(1))


VOTES = {
    "A": [0.99, 0.01],
    " (B)": [0.01, 0.99],
    "The answer is **A**.": [0.99, 0.01],
    "B. Since (B) is": [0.01, 0.99],
    "I prefer neither": None,
    "A or B": None,
    "a": None,
    "ABBA": None,
    "Answer_B": [0.01, 0.99],
    "": None,
}


@pytest.mark.parametrize("text", VOTES)
def test_a_vote_is_read_from_the_text(text):
    expected = VOTES[text]
    read = reading.vote(text, ("A", "B"))
    assert read == (expected and pytest.approx([math.log(p) for p in expected]))


@pytest.mark.parametrize("continues", [None, *server.CONTINUES])
@pytest.mark.parametrize("ends", ["nesdays, and", "Monday, Tuesday, Wednesday"])
def test_an_answer_is_begun_where_the_endpoint_continues_it(endpoint, capsys, continues, ends):
    endpoint.continues, endpoint.ends = continues, ends
    listed = [token("The", ("The", 0.5), ("A", 0.3), ("B", 0.2)), token("B", ("B", 0.9), ("A", 0.1))]
    endpoint.choice = lambda body: says("The B", content=listed)
    asked, [request] = backend(endpoint), choices(1)
    expected = (0.1, 0.9) if continues is None else (0.3, 0.2)
    for requests in ([request], choices(3)[1:]):
        for answer in answers(asked, requests).values():
            assert answer["logps"] == pytest.approx([math.log(p) for p in expected])
    begun = [{"role": "assistant", "content": request.prefix}] if continues is not None else []
    for body in endpoint.bodies:
        assert body["messages"][1:] == begun and body["max_tokens"] == (1 if begun else 8)
        assert {key: body[key] for key in server.CONTINUES[0] if key in body} == (continues or {})
    said = [line for line in capsys.readouterr().err.splitlines() if "an answer that is begun for it" in line]
    assert len(said) == 1 and said[0].startswith(asked.host)
    assert ("does not continue" in said[0]) is (continues is None)


def test_options_that_are_not_among_the_likely_words_after_a_prefix_are_no_answer(endpoint):
    endpoint.continues = {}
    assert logps_of(endpoint, [token("The", ("The", 0.5), ("An", 0.3))]) is None


@pytest.mark.parametrize("status", [400, 422])
def test_an_endpoint_that_refuses_log_probabilities_is_asked_for_votes(endpoint, monkeypatch, capsys, status):
    def fault(text, attempt):
        return status if "logprobs" in endpoint.bodies[-1] else None

    endpoint.fault = fault
    endpoint.choice = lambda body: says("(B)")
    got = answers(backend(endpoint, concurrency=1), choices(20))
    assert all(answer["logps"] == pytest.approx([math.log(0.01), math.log(0.99)]) for answer in got.values())
    assert capsys.readouterr().err.count("gives no log-probabilities") == 1
    assert set(endpoint.answered.values()) == {1}
    assert sum(endpoint.asked.values()) == 22  # 20 and 5 log-probabilities are refused once, then remembered


def test_an_endpoint_that_lists_five_is_asked_for_five(endpoint):
    endpoint.fault = lambda text, attempt: 400 if endpoint.bodies[-1].get("top_logprobs", 0) > 5 else None
    endpoint.choice = lambda body: says("A", content=[token("A", ("A", 0.75), ("B", 0.25))])
    got = answers(backend(endpoint, concurrency=1), choices(5))
    assert all(answer["logps"] == pytest.approx([math.log(0.75), math.log(0.25)]) for answer in got.values())
    assert [body["top_logprobs"] for body in endpoint.bodies] == [20, *[5] * 5]


def test_an_endpoint_that_ignores_log_probabilities_is_asked_once(endpoint, capsys):
    endpoint.choice = lambda body: says("A" if "3" in body["messages"][-1]["content"] else "No idea.")
    requests = choices(5)
    got = answers(backend(endpoint), requests)
    assert [got[request.key]["logps"] is None for request in requests] == [True, True, True, False, True]
    assert endpoint.asked == endpoint.answered and sum(endpoint.asked.values()) == 5
    assert capsys.readouterr().err.count("gives no log-probabilities") == 1


REFUSED = {400: "does not take the request", 401: "CAI_KEY", 403: "CAI_KEY", 404: "some/model", 418: "base_url"}


@pytest.mark.parametrize("kind", [generations, choices])
@pytest.mark.parametrize("status", REFUSED)
def test_what_waiting_does_not_help_is_refused_in_one_line_without_the_key(endpoint, monkeypatch, kind, status):
    monkeypatch.setenv("CAI_KEY", f"{KEY}\n")
    endpoint.fault = lambda text, attempt: status
    with pytest.raises(ValueError) as raised:
        answers(backend(endpoint, api_key_env="CAI_KEY", concurrency=1), kind(3))
    line = as_refusal(raised.value, None)
    assert f"127.0.0.1:{endpoint.server_port}: status {status}" in line and REFUSED[status] in line
    assert "\n" not in str(raised.value) and len(line) < 300
    assert KEY not in line + "".join(traceback.format_exception(raised.value))
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert sum(endpoint.asked.values()) == (3 if status == 400 and kind is choices else 1)


def test_without_a_key_none_is_sent_and_none_is_named(endpoint):
    endpoint.fault = lambda text, attempt: 401
    with pytest.raises(ValueError, match=r"requests without a key\. Check api_key_env"):
        answers(backend(endpoint), generations(1))
    assert endpoint.keys == {None}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("rate", "status 429"),
        ("error", "status 500"),
        ("hang", r"no answer in time \(timeout=0\.2\)"),
        ("garbage", "no chat completion in its answer"),
        ("no choices", "no chat completion in its answer"),
        ("html", "no chat completion in its answer"),
        ("lost", "no connection"),
    ],
)
def test_after_the_last_attempt_one_line_says_why_and_nothing_answered_is_lost(endpoint, tmp_path, fault, told):
    requests = generations(6)
    bad = requests[4].messages[-1]["content"]
    endpoint.fault = lambda text, attempt: fault if text == bad else None
    journal = Journal(tmp_path / "journal.jsonl")
    # Only the hang waits for so short a time: on a busy machine a good answer may take longer.
    asked = backend(endpoint, concurrency=1, max_attempts=2, timeout=0.2 if fault == "hang" else 30)
    if fault == "hang":
        journal.write([(request, {"text": "known"}) for request in requests[:4]])
    with pytest.raises(
        ValueError, match=rf"127\.0\.0\.1:\d+: {told} \(attempt 2\)\. .* run the same command"
    ) as raised:
        ask(asked, requests, journal, "test")
    assert "\n" not in str(raised.value) and as_refusal(raised.value, None)
    end = time.monotonic() + LIMIT
    while endpoint.asked[bad] < 2 and time.monotonic() < end:  # it may come to read them after the client has left
        time.sleep(0.01)
    assert endpoint.asked[bad] == 2
    assert Journal(journal.path).answers.keys() == {request.key for request in requests[:4]}

    endpoint.fault = lambda text, attempt: None
    assert len(ask(backend(endpoint), requests, Journal(journal.path), "test")) == 6
    assert max(endpoint.answered.values()) == 1


def test_an_endpoint_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(rlhf_recipes.endpoint, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    nobody = server.Server(base_url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(ValueError, match=r"^127\.0\.0\.1:9: no connection \(attempt 6\)\. See that it runs"):
        answers(nobody, generations(3))
    assert threads() == []


def test_a_path_that_is_not_there_names_the_url(endpoint):
    with pytest.raises(ValueError, match="Check model and base_url"):
        answers(backend(endpoint, base_url=endpoint.url.removesuffix("/v1")), generations(1))


@pytest.mark.parametrize("leave", ["close", "throw", "collected"])
def test_a_caller_that_stops_early_leaves_no_thread(endpoint, leave):
    endpoint.fault = lambda text, attempt: None if text.endswith(" 0") else "hang"
    asked = backend(endpoint, timeout=300).answer(generations(50), (), "test")
    [[(request, _)]] = [next(asked)]
    assert request.prompt_id == "p0" and len(threads()) == 16
    if leave == "close":
        asked.close()
    elif leave == "throw":
        with pytest.raises(OSError):
            asked.throw(OSError("disk full"))
    del asked
    assert threads() == []
    assert sum(endpoint.asked.values()) <= 1 + 16


def test_after_a_caller_that_stopped_the_backend_answers_the_next(endpoint):
    asked, requests = backend(endpoint), generations(20)
    group = next(asked.answer(requests, (), "test"))
    known = {request.key for request, _ in group}
    assert answers(asked, requests, known).keys() == {request.key for request in requests} - known
    assert len(answers(asked, choices(3))) == 3


def test_ctrl_c_while_nothing_comes_ends_it(endpoint):
    def fault(text, attempt):
        os.kill(os.getpid(), signal.SIGINT)
        return "hang"

    endpoint.fault = fault
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            answers(backend(endpoint, concurrency=1, timeout=300), generations(5))
    finally:
        signal.signal(signal.SIGINT, before)
    assert threads() == []


def test_a_caller_that_pauses_pauses_the_rest(endpoint):
    requests = generations(400)
    asked = backend(endpoint, concurrency=4).answer(requests, (), "test")
    group = next(asked)
    seen = -1
    while seen != sum(endpoint.asked.values()):
        seen = sum(endpoint.asked.values())
        time.sleep(0.3)
    # Each of the four may find room and fill it before it sees that there is none.
    assert seen <= len(group) + (flight.BACKLOG + 2) * 4
    assert len(group) + sum(map(len, asked)) == 400
    assert endpoint.most_in_flight <= 4


def test_a_prompt_stays_with_its_endpoint_of_several(endpoints):
    several = endpoints(3)
    urls = [each.url for each in several]
    asked = backend(None, base_url=urls, concurrency=100)
    assert asked.name == "some/model at 127.0.0.1" and asked.host.count("127.0.0.1:") == 3
    together = threading.Barrier(100)  # all are under way: none has time for another's
    for each in several:
        each.serve = lambda: together.wait(LIMIT)
    shares = []
    for requests in (choices(100), [replace(request, seed=1) for request in choices(100)]):
        answers(asked, requests)
        shares.append([frozenset(each.answered) for each in several])
    assert shares[0] == shares[1] and min(map(len, shares[0])) > 15


@pytest.mark.parametrize("how", ["lost", "error", "html"])
def test_an_endpoint_that_fails_is_left_out_and_used_again(endpoints, monkeypatch, capsys, how):
    bad, good = endpoints(2)
    monkeypatch.setattr(flight, "LOOK_SECONDS", 0.0)
    by_bad, by_good, mended, again = [], [], threading.Event(), threading.Event()
    bad.fault = lambda text, attempt: None if len(by_bad) < 30 or mended.is_set() else how

    def serve_badly():
        by_bad.append(1)
        if mended.is_set():
            again.set()

    def serve():
        by_good.append(1)
        if len(by_good) > 100:
            mended.set()
        if len(by_good) > 200:
            again.wait(LIMIT)

    bad.serve, good.serve = serve_badly, serve
    requests = generations(400)
    assert answers(backend(None, base_url=[bad.url, good.url]), requests).keys() == {each.key for each in requests}
    answered = bad.answered + good.answered
    del answered[fingerprint.QUESTION[0]["content"]]
    assert set(answered.values()) == {1}
    assert sum(bad.answered.values()) > 31
    said = capsys.readouterr().err
    assert said.count(f"127.0.0.1:{bad.server_port}: ") == 2 and "answers, and is used again" in said
    assert re.search(
        rf":{bad.server_port}: .* times in a row\)\. It is left out, its prompts go to the others\.", said
    )


def test_when_no_endpoint_is_left_the_run_ends_in_one_line(endpoints):
    several = endpoints(2)
    for each in several:
        each.fault = lambda text, attempt: "error"
    with pytest.raises(ValueError, match=r"status 500 \(attempt 6\)\. .* run the same command"):
        answers(backend(None, base_url=[each.url for each in several]), generations(40))


LIKED = [token(" (A", (" (A", 0.7), ("B", 0.3))]
MODELS = [{"id": "some/model", "max_model_len": 4096}]


def spoilt(name, value):
    return lambda endpoint: setattr(endpoint, name, value)


# What is wrong from the second start on; what is said; whether before a prompt is paid for.
WRONG = {
    "html": (spoilt("fault", lambda text, attempt: "html"), "no chat completion in its answer", True),
    "half a JSON": (
        spoilt("fault", lambda text, attempt: "garbage" if text == "which, 4?" else None),
        "no chat completion in its answer",
        False,
    ),
    "another name": (spoilt("calls", lambda body: "other/7b"), "calls its model other/7b, not some/model", True),
    "another version": (spoilt("calls", lambda body: "some/model-2"), "some/model, then some/model-2", True),
    "another name later": (
        spoilt("calls", lambda body: "other/7b" if "which" in body["messages"][-1]["content"] else body["model"]),
        "serves another model than before (some/model, then other/7b)",
        False,
    ),
    "tokens not asked for": (
        spoilt("choice", lambda body: says("(A)", content=[token("A", ("B", 0.6), ("The", 0.4))])),
        "log-probabilities of other tokens than it wrote",
        True,
    ),
    "another model": (
        spoilt("choice", lambda body: says("(A)", content=[token(" (A", (" (A", 0.55), ("B", 0.45))])),
        "serves another model than this run began with (15% of the probability of token 1",
        True,
    ),
    "no log-probabilities": (spoilt("choice", lambda body: says("(A)")), "gives no log-probabilities of", True),
    "log-probabilities refused": (
        lambda endpoint: vars(endpoint).update(
            fault=lambda text, attempt: 400 if "logprobs" in endpoint.bodies[-1] else None,
            choice=lambda body: says("(A)"),
        ),
        "gives no log-probabilities of answers",
        True,
    ),
    "too small a context": (
        spoilt("models", [{**MODELS[0], "max_model_len": 512}]),
        "the longest request with its answer may have 600 tokens, its context at 127.0.0.1",
        True,
    ),
    "not served": (spoilt("models", [{"id": "other/7b"}]), "serves other/7b", True),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_an_endpoint_does_wrong_is_one_line_and_costs_nothing(endpoint, tmp_path, wrong):
    spoil, told, before = WRONG[wrong]
    good = {"models": MODELS, "choice": lambda body: says("(A)", content=LIKED), "fault": lambda text, attempt: None}
    good["calls"] = endpoint.calls
    requests = choices(6)

    def run(some):
        asked = backend(endpoint, concurrency=1, max_attempts=2)
        fingerprint.check({"judge": asked}, {"judge": 600}, Journal(tmp_path / "gate.jsonl"))
        return ask(asked, some, Journal(tmp_path / "answers.jsonl"), "test")

    vars(endpoint).update(good)
    run(requests[:3])
    spoil(endpoint)
    with pytest.raises(ValueError) as raised:
        run(requests)
    assert told in str(raised.value) and as_refusal(raised.value, None) and "\n" not in str(raised.value)
    prompts = {request.messages[-1]["content"] for request in requests}
    paid = endpoint.asked.keys() & prompts
    assert len(paid) == 3 if before else len(paid) > 3
    vars(endpoint).update(good)
    assert [answer["logps"][0] for answer in run(requests)] == [pytest.approx(math.log(0.7))] * 6
    assert {endpoint.answered[text] for text in prompts} == ({1} if wrong != "another name later" else {1, 2})


def test_a_model_that_was_swapped_is_refused_each_time_it_answers(endpoint, capsys):
    """Whoever of several threads hears its other name first."""
    asked = backend(endpoint)
    fingerprint.check({"generator": asked}, {"generator": 1})
    [at], endpoint.calls = asked.connected(), lambda body: "some/model-2"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"serves another model than before \(some/model, then some/model-2\)\."):
            answers(asked, generations(1))
        [at] = asked.connected()
        assert not asked.is_back(at)
    said = "serves another model (some/model, then some/model-2), and stays left out."
    assert capsys.readouterr().err.count(said) == 2
    endpoint.calls = lambda body: body["model"]
    assert asked.is_back(at) and answers(asked, generations(1))


def test_a_tenth_of_failures_for_an_hour_ends_nothing(endpoint, pauses, tmp_path):
    """An answer takes 10 s of a clock of its own, a pause as long as it is."""

    def fault(text, attempt):
        hour = sum(pauses) + 10 * sum(endpoint.answered.values()) < 3600
        return "error" if hour and int(Request("", "", [], text, seed=attempt).key, 16) % 10 == 0 else None

    endpoint.fault = fault
    requests = generations(400)
    got = ask(backend(endpoint, concurrency=4), requests, Journal(tmp_path / "answers.jsonl"), "test")
    assert len(got) == 400 and set(endpoint.answered.values()) == {1}
    assert 20 < sum(endpoint.asked.values()) - 400 < 80


THOUGHTS = {
    "in the text": says("<think>\nThe person asks"),
    "begun by the template": says("The person asks ...\n</think>\n\nYes."),
    "in place of a text": {"message": {"content": None, "reasoning": "The person"}, "finish_reason": "length"},
    "under its older name": {"message": {"content": "", "reasoning_content": "The"}, "finish_reason": "length"},
}
OFF = {"enable_thinking": False}


@pytest.mark.parametrize("kind", THOUGHTS)
@pytest.mark.parametrize("requests", [generations(3), choices(3)], ids=["generation", "choice"])
def test_a_model_that_thinks_aloud_is_asked_again_without(endpoint, kind, requests):
    said = says("A", content=[token("A", ("A", 0.9), ("B", 0.1))])
    endpoint.choice = lambda body: said if body.get("chat_template_kwargs") == OFF else THOUGHTS[kind]
    found = answers(backend(endpoint, concurrency=1), requests).values()
    assert all(answer.get("text") == "A" or answer["logps"][0] > answer["logps"][1] for answer in found)
    assert ["chat_template_kwargs" in body for body in endpoint.bodies] == [False, True, True, True]


@pytest.mark.parametrize(
    ("told", "status", "asked"),
    [({}, None, 2), ({}, 400, 4), ({"enable_thinking": True}, None, 1), ({"enable_thinking": False}, None, 1)],
    ids=["all the same", "not passed on", "told to", "told not to, in vain"],
)
def test_a_model_that_thinks_all_the_same_is_refused(endpoint, told, status, asked):
    endpoint.choice = lambda body: says("<think>")
    endpoint.fault = lambda text, attempt: status if endpoint.bodies[-1].get("chat_template_kwargs") == OFF else None
    with pytest.raises(ValueError, match=r"some/model thinks aloud .* set chat_template_kwargs of this judge"):
        answers(backend(endpoint, chat_template_kwargs=told), choices(1))
    assert len(endpoint.bodies) == asked
    assert [body.get("chat_template_kwargs", {}) for body in endpoint.bodies] == [told, *[OFF] * (asked - 1)]


def test_thoughts_that_the_endpoint_takes_out_are_no_answer(endpoint):
    answer = {"message": {"content": "Yes.", "reasoning": "The person asks"}, "finish_reason": "stop"}
    endpoint.choice = lambda body: answer
    [found] = answers(backend(endpoint), generations(1)).values()
    assert found["text"] == "Yes." and len(endpoint.bodies) == 1


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_system_text_is_folded_where_the_endpoint_takes_no_system_turn(endpoint, status):
    turns = [{"role": "system", "content": "Be brief."}, *generations(1)[0].messages]
    requests = [Request(f"p{n}", "critique.1", turns, max_new_tokens=5, seed=n) for n in range(3)]
    endpoint.told = "System role not supported"
    endpoint.fault = lambda text, attempt: status if endpoint.bodies[-1]["messages"][0]["role"] == "system" else None
    found = answers(backend(endpoint, concurrency=1), requests)
    assert found.keys() == {request.key for request in requests}
    folded = [{"role": "user", "content": f"Be brief.\n\n{LATIN} 0"}]
    assert [body["messages"] for body in endpoint.bodies] == [turns, *[folded] * 3]


def test_an_answer_cannot_be_begun_by_us(endpoint):
    request = Request("p", "answer", [{"role": "user", "content": "Hi"}], prefix="Sure", max_new_tokens=5)
    with pytest.raises(ValueError, match="prefix"):
        answers(backend(endpoint), [request])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url: must be like http://localhost:8000/v1"),
        ({"base_url": "http://localhost:port/v1"}, "base_url: must be like"),
        ({"base_url": "http:///v1"}, "base_url: must be like"),
        ({"base_url": f"http://user:{KEY}@localhost/v1"}, "api_key_env"),
        ({"base_url": f"http://localhost/v1?key={KEY}"}, "api_key_env"),
        ({"base_url": ["http://localhost/v1", f"http://user:{KEY}@localhost/v1"]}, "api_key_env"),
        ({"base_url": ["http://localhost/v1", "http://localhost/v1/"]}, "base_url: names an endpoint twice"),
        ({"base_url": ["http://a/v1", "http://a/v1"], "role": "judge"}, "judge.base_url: names an endpoint twice"),
        ({"base_url": []}, "base_url: must be like"),
        ({"api_key_env": "CAI_UNSET"}, "CAI_UNSET: not set, or not a key. export CAI_UNSET="),
        ({"api_key_env": "CAI_BAD"}, "CAI_BAD: not set, or not a key"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"max_attempts": 0}, "max_attempts"),
    ],
)
def test_settings_are_refused_in_one_line_without_the_key(monkeypatch, changes, told):
    monkeypatch.delenv("CAI_UNSET", raising=False)
    monkeypatch.setenv("CAI_BAD", f"{KEY}\nX-Header: 1")
    with pytest.raises(ValueError) as raised:
        server.Server(**{"base_url": "http://localhost:8000/v1", "model": "m", **changes})
    assert told in str(raised.value) and KEY not in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture
def real_server(tiny_model, clean_env, warm_python, monkeypatch, tmp_path):
    """URL of `transformers serve` with the tiny model."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "warm_serve.py").write_text("from transformers.cli.transformers import main\nmain()\n")
    options = ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [warm_python, "-m", "warm_serve", "serve", str(tiny_model), *options],
            cwd=tmp_path, env=clean_env, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        end = time.monotonic() + LIMIT
        while not (listens := re.search(r"running on (http://\S+)", (tmp_path / "log").read_text())):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield f"{listens[1]}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_a_real_server_answers(real_server, tiny_model, capsys):
    asked = server.Server(base_url=real_server, model=str(tiny_model), concurrency=2)
    texts = answers(asked, generations(4))
    assert all(0 < answer["tokens"] <= 32 < answer["prompt_tokens"] for answer in texts.values())
    assert all(isinstance(answer["text"], str) for answer in texts.values())
    assert any(answer["text"] for answer in texts.values())
    # It ignores the argument, and a model of random weights names no letter.
    votes = answers(asked, choices(2))
    assert [answer["logps"] for answer in votes.values()] == [None, None]
    assert capsys.readouterr().err.count("gives no log-probabilities") == 1
    with pytest.raises(ValueError, match=r"status 400, it does not take the request: .*pinned"):
        answers(server.Server(base_url=real_server, model="another/model"), generations(1))


def test_a_key_that_an_endpoint_repeats_is_not_shown(monkeypatch):
    """Whatever it looks like, and whatever its variable is called."""
    monkeypatch.setenv("OF_THE_DESK", "quiet horse")
    told = rlhf_recipes.endpoint.Endpoint("http://127.0.0.1:9/v1", "OF_THE_DESK").plain("who is\nquiet horse?")
    assert told == "who is <secret>?"
