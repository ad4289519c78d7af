"""PPO whose completions come from vLLM: against a stand-in of its protocol around the tiny model."""

import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import vllm_standin
from safetensors.torch import load_file

from rlhf_recipes.errors import Refusal

SERVED = ("quantization=none", "model.dtype=float32", "reward_funcs=test_ppo_server:even", "trainer.rollout=server",
          "trainer.max_completion_length=6", "trainer.learning_rate=0.01", "preflight.measure=false")  # fmt: skip


def even(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Engine(vllm_standin.Engine):
    """It draws below `shift` of what it says; after `lives` completions it answers no more, and at `forgets` of them
    it is one that was started again.

    Attributes:
        loaded, dropped: names of adapters.
    """

    shift, lives, forgets = 0.0, None, None

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.loaded, self.dropped, self.answered = [], [], 0

    def load_lora_adapter(self, body):
        self.loaded.append(body["lora_name"])
        return super().load_lora_adapter(body)

    def unload_lora_adapter(self, body):
        self.dropped.append(body["lora_name"])
        return super().unload_lora_adapter(body)

    def completions(self, body):
        if self.answered == self.forgets:
            self.forgets = None
            self.adapters.clear()
            raise vllm_standin.Refused(404, f"The model `{body['model']}` does not exist.")
        if self.answered == self.lives:
            raise vllm_standin.Refused(503, "gone")
        self.answered += 1
        answer = super().completions(body)
        logprobs = answer["choices"][0]["logprobs"]
        logprobs["token_logprobs"] = [logp - self.shift for logp in logprobs["token_logprobs"]]
        return answer


@pytest.fixture
def serving(tiny_model, monkeypatch):
    """serving(): an `Engine` on the tiny model until the test ends."""
    running = []

    def serve(**attributes):
        engine = Engine(tiny_model)
        vars(engine).update(attributes)
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        running.append((engine, thread))
        return engine

    yield serve
    for engine, thread in running:
        engine.shutdown()
        engine.server_close()
        thread.join()


def url(*engines):
    return f"trainer.vllm_server_base_url=[{','.join(engine.url for engine in engines)}]"


def rows(run, *keys):
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [[row[key] for key in keys] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
def test_it_learns_the_same_from_served_completions(train, serving, tmp_path):
    """The stand-in draws as the recipe does: to rounding the run is the local one."""
    more = ["trainer.max_steps=4", "trainer.num_mini_batches=1"]
    engines = serving(), serving()
    served = train("ppo", tmp_path / "served", *SERVED, *more, url(*engines))
    local = train("ppo", tmp_path / "local", *SERVED, *more, "trainer.rollout=local")
    keys = ("reward", "kl", "loss", "grad_norm", "entropy", "completions/mean_length")
    assert rows(served, *keys) == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in rows(local, *keys)]
    ours, theirs = (load_file(run.dir / "adapter" / "adapter_model.safetensors") for run in (served, local))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-3, rtol=1e-2)
    apart = rows(served, "sampling/logp_difference", "sampling/importance_sampling_ratio/mean")
    assert all(0 < difference < 1e-4 and ratio == pytest.approx(1, abs=1e-4) for difference, ratio in apart)

    names = [body["lora_name"] for body in engines[0].bodies if "lora_path" in body]
    assert engines[0].loaded == engines[1].loaded == names and len(set(names)) == len(names) == 5  # before, 3, after
    assert engines[0].dropped == engines[1].dropped == names[:-1]
    asked = [body for engine in engines for body in engine.bodies if "prompt" in body]
    # The first serves the held-out prompts before the training and the first rollout.
    assert Counter(body["model"] for body in asked) == dict(zip(names, (8, 4, 4, 4, 4), strict=True))
    assert len({body["seed"] for body in asked}) == 4 + 16  # held-out prompts are asked twice
    assert engines[0].answered == engines[1].answered
    assert not list(served.dir.rglob("*policy-*"))


@pytest.mark.slow
def test_a_server_that_dies_is_waited_for_and_the_run_goes_on(train, serving, tmp_path):
    """At the second rollout; the one that answers again later was started anew and has forgotten the adapter."""
    more = ["trainer.max_steps=3", "trainer.num_mini_batches=1", "trainer.vllm_server_timeout=0.2"]
    more += ["trainer.save_steps=1"]
    whole = train("ppo", tmp_path / "whole", *SERVED, *more, url(serving()))
    with pytest.raises(Refusal) as refusal:
        train("ppo", tmp_path / "run", *SERVED, *more, url(dead := serving(lives=9)))
    assert re.fullmatch(
        rf"trainer\.vllm_server_base_url={dead.url.removesuffix('/v1')}: no answer for 0\.2 s \(trainer\.vllm_server_"
        r"timeout\)\. Step 1 of 3 is saved\. Start it again, then run the same command\.",
        str(refusal.value),
    )
    again = train("ppo", tmp_path / "run", *SERVED, *more, url(engine := serving(forgets=6)))
    assert engine.loaded[0] not in dead.loaded and len(engine.loaded) > len(set(engine.loaded))
    assert again.trainer.state.log_history[0]["reward"] == whole.trainer.state.log_history[0]["reward"]
    ours, theirs = (load_file(run.dir / "adapter" / "adapter_model.safetensors") for run in (again, whole))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "times"),
    [([], 2.0), (["trainer.vllm_importance_sampling_clip_max=1.5"], 1.5),
     (["trainer.vllm_importance_sampling_correction=false"], 1.0)],
)  # fmt: skip
def test_what_a_server_drew_less_often_counts_more(train, serving, tmp_path, more, times):
    """An engine that says each token was half as likely as under the policy."""
    more = [*more, "trainer.max_steps=1", "trainer.max_logp_difference=1"]
    exact = train("ppo", tmp_path / "exact", *SERVED, *more, url(serving()))
    half = train("ppo", tmp_path / "half", *SERVED, *more, url(serving(shift=0.693147181)))
    [(expected, ratio)], [(found, _)] = (rows(run, "grad_norm", "ratio/max") for run in (exact, half))
    assert ratio == 1 and found == pytest.approx(times * expected, rel=1e-3)


def test_another_model_is_refused_before_the_first_update(train, serving, tmp_path):
    engine = serving()
    with torch.no_grad():
        engine.model.lm_head.weight.mul_(30)
    with pytest.raises(Refusal, match=r"differ from the policy's by [\d.]+ nats a token \(trainer\.max_logp_diff"):
        train("ppo", tmp_path / "run", *SERVED, url(engine))
    assert len(engine.loaded) == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"rollout=server: vllm_server_base_url=None; give http://host:port of the vLLM server\."),
        ({"rollout": "local", "vllm_server_base_url": "http://a:1"}, r"rollout=local: .*; add trainer\.rollout"),
        ({"rollout": "vllm"}, r"rollout=vllm: not one of local, server\."),
        ({"vllm_server_base_url": "a:1"}, r"vllm_server_base_url=a:1: must be like http://localhost:8000\."),
        ({"vllm_server_base_url": "http://u:key@a:1"}, r"vllm_server_base_url=.* must be like"),
        ({"vllm_server_base_url": ["http://a:1", "http://a:1/v1"]}, r"vllm_server_base_url: http://a:1 stands"),
        ({"vllm_server_base_url": "http://a:1", "top_p": 0.9}, r"rollout=server: top_p=0\.9, top_k=0: importance"),
        ({"vllm_server_base_url": "http://a:1", "vllm_server_timeout": 0}, r"vllm_server_timeout=0: must be above 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(given, message, tmp_path):
    from rlhf_recipes.ppo import PPOConfig

    with pytest.raises(Refusal, match=f"^{message}"):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{"rollout": "server", **given})


def test_a_setting_of_ours_is_refused_as_it_is_typed(tmp_path):
    from omegaconf import OmegaConf

    from rlhf_recipes.config import build

    given = {"_target_": "rlhf_recipes.ppo.PPOConfig", "rollout": "server", "output_dir": str(tmp_path)}
    with pytest.raises(Refusal, match=r"^trainer\.rollout=server: vllm_server_base_url=None; give http"):
        build(OmegaConf.create(given), "trainer", use_cpu=True, bf16=False)


@contextmanager
def answering(pages, post=None):
    """A server of these pages, and of what `post(path, body, headers)` gives, status and text: its URL."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200 if self.path in pages else 404, pages.get(self.path, "nothing"))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(*post(self.path, body, self.headers))

        def answer(self, status, text):
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if text == "<html>" else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def listed(most):
    return json.dumps({"data": [{"id": "base", "parent": None, "max_model_len": most}]})


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({}, r"status 404: nothing\. See its log"),
        ({"/v1/models": "<html>"}, r"what it answers is no list of models"),
        ({"/v1/models": '{"data": []}'}, r"what it answers is no list of models"),
        ({"/v1/models": listed(20)}, r"its context has 20 tokens, a prompt with its completion up to 24\."),
        ({"/v1/models": listed(24), "/metrics": 'vllm:x{engine="0"} 1\nvllm:x{engine="1"} 1'}, r"has data-parallel"),
        ({"/v1/models": listed(24), "/metrics": 'vllm:x{engine="0"} 1'}, None),
        ({"/v1/models": listed(24)}, None),
        (None, r"no connection\. Start it: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve"),
    ],
)  # fmt: skip
def test_servers_are_looked_at_before_a_model_is_loaded(pages, message):
    from rlhf_recipes.ppo.engines import Engines

    with answering(pages or {}) as address:
        pass  # it is gone, and nothing listens there
    with answering(pages or {}) as other:
        address = address if pages is None else other
        if message is None:
            Engines([address], 1).look(24)
            return
        with pytest.raises(Refusal, match=f"^trainer.vllm_server_base_url={address}: {message}") as refusal:
            Engines([address], 1).look(24)
    assert "\n" not in str(refusal.value)


def test_the_key_of_a_server_is_sent_and_never_said(monkeypatch):
    from rlhf_recipes.ppo.engines import Engines

    with pytest.raises(
        Refusal, match=r"^PPO_KEY: not set, or not a key\. export PPO_KEY=<the key for 127\.0\.0\.1:1>"
    ):
        Engines(["http://127.0.0.1:1"], 1, "PPO_KEY")
    monkeypatch.setenv("PPO_KEY", "key-0123456789")
    seen = []

    def post(path, body, headers):
        seen.append(headers["Authorization"])
        return 401, f"wrong key {headers['Authorization']}"

    with answering({"/v1/models": listed(24)}, post) as address:
        engines = Engines([address], 1, "PPO_KEY")
        engines.look(24)
        with pytest.raises(Refusal, match="status 401: wrong key") as refusal:
            engines._post(address, "/v1/completions", {})
    assert seen == ["Bearer key-0123456789"] and "key-0123456789" not in str(refusal.value)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ((200, '{"choices": ['), None),
        ((429, "slowly"), None),
        ((500, "<html>"), None),
        ((404, "The model does not exist."), None),
        ((200, '{"choices": []}'), r"its completions lack token ids, or a log-probability of each\."),
        ((200, '{"choices": [{"token_ids": [5], "logprobs": null}]}'), r"its completions lack token ids"),
        ((200, '{"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [0.5]}}]}'), r"its completions lack"),
        ((200, '{"choices": [{"token_ids": [9], "logprobs": {"token_logprobs": [-1]}}]}'), r"wrote the token 9, "),
        ((200, '{"choices": [{"token_ids": [5], "logprobs": {"token_logprobs": [-1e400]}}]}'), r"its completions"),
        ((401, "no key"), r"status 401: no key\. See its log"),
        ("LoRA rank 16 is greater than max_lora_rank 8.", r"does not load .*rank 8\)\. It must see .*--max-lora-rank"),
    ],
)  # fmt: skip
def test_what_a_server_may_answer(first, message, tmp_path, monkeypatch):
    """To the first completion that is asked for, or (a text) to the adapter."""
    from rlhf_recipes.ppo import engines

    monkeypatch.setattr(engines, "PAUSE", 0.01)
    answers, loaded, weights = [first], [], iter((1, 1, 2))

    def post(path, body, headers):
        if path == "/v1/unload_lora_adapter":
            return 200, loaded.remove(body["lora_name"]) or "Success"
        if path == "/v1/load_lora_adapter":
            if isinstance(first, str):
                return 400, first
            loaded.append(body["lora_name"])
            return 200, "Success"
        good = {"token_ids": body["prompt"], "logprobs": {"token_logprobs": [-1.0] * len(body["prompt"])}}
        return answers.pop() if answers else (200, json.dumps({"choices": [good]}))

    def save(folder):
        folder.mkdir()
        (folder / "adapter").write_text(str(next(weights)))

    with answering({}, post) as address:
        served = engines.Engines([address], 5)
        asked = {"max_tokens": 4}
        if message:
            with pytest.raises(Refusal, match=f"^trainer.vllm_server_base_url={address}: {message}"):
                served.sample(save, tmp_path, [[7, 8]], [3], asked, 9)
            return
        for _ in range(3):
            assert served.sample(save, tmp_path, [[7, 8]], [3], asked, 9) == [engines.Sampled([7, 8], [-1.0, -1.0])]
        assert [path.name for path in tmp_path.iterdir()] == loaded[-1:] and loaded[-1].endswith("-v2")
        del served  # as at the end of the process
    assert not list(tmp_path.iterdir())
