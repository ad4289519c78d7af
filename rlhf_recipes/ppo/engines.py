"""`trainer.rollout=server`: completions from vLLM, which loads the policy's adapter whenever it has changed.

The adapter is all that travels: saved where both can read it, under a name that no other version has, and loaded by
one request. The base that the roles share is never merged into nor sent. An engine is another program and rounds
otherwise: its log-probabilities are for comparison and importance weights alone, the policy's own come from a forward
pass here.
"""

import hashlib
import secrets
import shutil
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes import ranks, text
from rlhf_recipes.errors import Refusal

KEY = "trainer.vllm_server_base_url"
SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve <model.id> --enable-lora --max-loras 2 --max-lora-rank <lora.r or "
    "more>"
)
IN_FLIGHT = 256  # requests at a time, for each engine; what it has no room for waits there
ANSWER_SECONDS = 600.0  # that an engine which is there may take for an answer
PAUSE = 1.0  # seconds between two attempts
LAST_SECONDS = 5.0  # for each request of a process that ends
HIGHEST = 0.01  # a log-probability may be above 0 by rounding
# Else the engine would take these from the model's generation_config.json.
WHOLE_DISTRIBUTION = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


class Gone(Exception):
    """An engine was waited for long enough."""


@dataclass
class Sampled:
    """Token ids of an answer, its end included, and the engine's log-probability of each."""

    ids: list[int]
    logps: list[float]


class Engines:
    """vLLM servers that sample from the policy: each has its adapter, and answers its part of the prompts.

    Of several processes the first asks, for all.

    Args:
        urls: of each, http://host:port.
        timeout: seconds that one is waited for which does not answer.

    Attributes:
        compared: whether their log-probabilities were held against the policy's.

    Raises:
        Refusal: the openai package is missing.
    """

    def __init__(self, urls: list[str], timeout: float):
        try:
            import openai
        except ImportError:
            raise Refusal('trainer.rollout=server needs openai. pip install "rlhf-recipes[server]".') from None

        self.timeout, self.compared = timeout, False
        # Redirects would send prompts to whatever address an answer names.
        self._clients = {
            url: openai.OpenAI(
                base_url=url, api_key="none", max_retries=0, timeout=openai.Timeout(ANSWER_SECONDS, connect=10.0),
                http_client=openai.DefaultHttpxClient(follow_redirects=False),
            )
            for url in urls
        }  # fmt: skip
        # A run that goes on where another ended finds that one's names taken.
        self._name, self._version, self._digest = f"policy-{secrets.token_hex(4)}", 0, ""
        self._published: list[Path] = []
        weakref.finalize(self, _withdraw, self._clients, self._published)

    def look(self, tokens: int) -> None:
        """Ask every engine what it serves.

        Args:
            tokens: of the longest prompt with its completion.

        Raises:
            Refusal: one is not there, is no vLLM, has a context too small, or is several behind one URL.
        """
        ranks.by_first(lambda: [self._look(url, tokens) for url in self._clients])

    def _look(self, url: str, tokens: int) -> None:
        import openai

        client = self._clients[url].with_options(timeout=10.0)
        try:
            models = client.get("/v1/models", cast_to=object)["data"]
            most = next(model for model in models if not model.get("parent")).get("max_model_len") or tokens
            short = most < tokens
        except openai.APIStatusError as error:
            raise _refused(url, error) from None
        except openai.APIConnectionError:
            raise Refusal(f"{KEY}={url}: no connection. Start it: {SERVE}.") from None
        except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError, StopIteration):
            raise Refusal(f"{KEY}={url}: what it answers is no list of models. Give the address of a vLLM.") from None
        if short:
            raise Refusal(
                f"{KEY}={url}: its context has {most} tokens, a prompt with its completion up to {tokens}. Start it "
                f"with --max-model-len {tokens}, or lower max_prompt_length or trainer.max_completion_length."
            )
        with suppress(openai.OpenAIError):
            if 'engine="1"' in client.get("/metrics", cast_to=str):
                raise Refusal(
                    f"{KEY}={url}: has data-parallel replicas, of which one alone would load the adapter. Start each "
                    "as a server of its own, and give a list of their URLs."
                )

    def sample(
        self, save: Callable[[Path], None], folder: Path, prompts: list[list[int]], seeds: list[int], asked: dict
    ) -> list[Sampled]:
        """One completion of each prompt of this process; the others have as many.

        Args:
            save: writes the policy's adapter into a folder.
            folder: where it is published; the engines see it under the same path.
            seeds: one for each prompt.
            asked: `max_tokens`, `temperature`, `stop_token_ids`.

        Raises:
            Gone: on every process.
            Refusal: an engine does not take the adapter, or a request.
        """
        everyones = ranks.gather(list(zip(prompts, seeds, strict=True)))

        def attempt() -> tuple[list[Sampled], str]:
            try:
                self._publish(save, folder.resolve())
                return self._ask_all(everyones, asked), ""
            except Gone as gone:
                return [], str(gone)

        found, gone = ranks.by_first(attempt)
        if gone:
            raise Gone(gone)
        return found[ranks.rank() * len(prompts) :][: len(prompts)]

    def _publish(self, save: Callable[[Path], None], folder: Path) -> None:
        """Let every engine load the adapter where it is another than the last, which they then drop."""
        part = folder / f".{self._name}.part"
        shutil.rmtree(part, ignore_errors=True)
        save(part)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(part.iterdir()))).hexdigest()
        if digest == self._digest:
            shutil.rmtree(part)
            return
        self._version += 1
        self._published.append(part.rename(folder / f"{self._name}-v{self._version}"))
        for url in self._clients:
            self._load(url)
        self._digest = digest
        while len(self._published) > 1:
            _withdraw(self._clients, [self._published.pop(0)])

    def _load(self, url: str) -> None:
        adapter = self._published[-1]
        try:
            self._post(url, "/v1/load_lora_adapter", {"lora_name": adapter.name, "lora_path": str(adapter)})
        except _Refused as error:
            if "already been loaded" in error.told:  # the answer was lost, or another thread was faster
                return
            raise Refusal(
                f"{KEY}={url}: does not load the policy's adapter (status {error.status}: {error.told}). It must see "
                f"{adapter.parent} as this process does, and be started with: {SERVE}."
            ) from None

    def _ask_all(self, prompts: list[tuple[list[int], int]], asked: dict) -> list[Sampled]:
        urls = list(self._clients)
        pool = ThreadPoolExecutor(min(len(prompts), IN_FLIGHT * len(urls)))
        try:
            tasks = [
                pool.submit(self._ask, urls[i % len(urls)], {"prompt": prompt, "seed": seed, **asked})
                for i, (prompt, seed) in enumerate(prompts)
            ]
            return [task.result() for task in tasks]
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, url: str, body: dict) -> Sampled:
        body = {
            "model": self._published[-1].name,
            "logprobs": 0,
            "return_token_ids": True,
            **WHOLE_DISTRIBUTION,
            **body,
        }
        try:
            answer = self._post(url, "/v1/completions", body)
        except _Refused as error:
            if error.status != 404:
                raise
            self._load(url)  # it was started again, and knows no adapter
            answer = self._post(url, "/v1/completions", body)
        try:
            choice = answer["choices"][0]
            ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            good = 0 < len(ids) == len(logps) <= body["max_tokens"]
            good &= all(type(token) is int and token >= 0 for token in ids)
            good &= all(type(logp) in (int, float) and logp <= HIGHEST for logp in logps)
        except (TypeError, LookupError):
            good = False
        if not good:
            raise Refusal(
                f"{KEY}={url}: its completions lack token ids, or a log-probability of each. Give the address of a "
                "vLLM that knows return_token_ids (0.10.2 or later)."
            )
        return Sampled(ids, [float(logp) for logp in logps])

    def _post(self, url: str, path: str, body: dict) -> Any:
        """The answer; asked again while the engine is away, or has more to do than it takes.

        Raises:
            Gone: for longer than `timeout`.
            _Refused: it does not take the request.
        """
        import openai

        cast, since = str if path.endswith("_adapter") else object, time.monotonic()
        while True:
            try:
                return self._clients[url].post(path, body=body, cast_to=cast)
            except openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in (408, 409, 429):
                    raise _refused(url, error) from None
            except (openai.OpenAIError, ValueError):  # no connection, no answer in time, half a JSON
                pass
            if time.monotonic() - since > self.timeout:
                raise Gone(f"{KEY}={url}: no answer for {self.timeout:g} s (trainer.vllm_server_timeout).")
            time.sleep(min(PAUSE, self.timeout / 4))


class _Refused(Refusal):
    """An engine's own words: it does not take a request."""

    def __init__(self, url: str, status: int, told: str):
        super().__init__(f"{KEY}={url}: status {status}: {told}. See its log, and that it was started with: {SERVE}.")
        self.status, self.told = status, told


def _refused(url: str, error: Any) -> _Refused:
    told = error.body.get("message") if isinstance(error.body, dict) else None
    told = told if isinstance(told, str) else error.response.text
    return _Refused(url, error.status_code, " ".join(text.line(told).split())[:200].rstrip("."))


def _withdraw(clients: dict[str, Any], adapters: list[Path]) -> None:
    """Let the engines drop adapters that nobody will ask for, and remove them."""
    import openai

    for adapter in adapters:
        for client in clients.values():
            with suppress(openai.OpenAIError):
                client.with_options(timeout=LAST_SECONDS).post(
                    "/v1/unload_lora_adapter", body={"lora_name": adapter.name}, cast_to=str
                )
        shutil.rmtree(adapter, ignore_errors=True)
