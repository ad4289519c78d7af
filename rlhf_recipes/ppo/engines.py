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

from rlhf_recipes import ranks
from rlhf_recipes.endpoint import ANSWER_BYTES, TOLD, Endpoint, Failure
from rlhf_recipes.errors import Refusal

KEY = "trainer.vllm_server_base_url"
SERVE = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve <model.id> --enable-lora --max-loras 2 --max-lora-rank <lora.r or "
    "more>"
)
IN_FLIGHT = 256  # requests at a time, for each engine; what it has no room for waits there
ANSWER_SECONDS = 600.0  # that an engine which is there may take for an answer
LOOK_SECONDS = 10.0  # the same, before the run
METRICS_BYTES = 2**24
PAUSE = 1.0  # seconds between two attempts
LAST_SECONDS = 5.0  # for each request of a process that ends
LOWEST, HIGHEST = -1e4, 0.01  # of a log-probability: vLLM writes -9999 for none, and rounding may be above 0
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
        api_key_env: environment variable that holds the key of all; None: they want none.

    Attributes:
        compared: whether their log-probabilities were held against the policy's.

    Raises:
        Refusal: the variable is not set.
    """

    def __init__(self, urls: list[str], timeout: float, api_key_env: str | None = None):
        self.timeout, self.compared, self._vocabulary = timeout, False, 0
        self._engines = {url: Endpoint(url, api_key_env, ANSWER_SECONDS) for url in urls}
        # A run that goes on where another ended finds that one's names taken.
        self._name, self._version, self._digest = f"policy-{secrets.token_hex(4)}", 0, ""
        self._published: list[Path] = []
        weakref.finalize(self, _withdraw, self._engines, self._published)

    def look(self, tokens: int) -> None:
        """Ask every engine what it serves.

        Args:
            tokens: of the longest prompt with its completion.

        Raises:
            Refusal: one is not there, is no vLLM, has a context too small, or is several behind one URL.
        """
        ranks.by_first(lambda: [self._look(url, tokens) for url in self._engines])

    def _look(self, url: str, tokens: int) -> None:
        engine = self._engines[url]
        try:
            models = engine.ask("/v1/models", timeout=LOOK_SECONDS)["data"]
            most = next(model for model in models if not model.get("parent")).get("max_model_len") or tokens
            short = most < tokens
        except Failure as failure:
            if failure.status:
                raise _Refused(url, failure) from None
            if not failure.unread:
                raise Refusal(f"{KEY}={url}: {failure}. Start it: {SERVE}.") from None
            models = None
        except (TypeError, LookupError, AttributeError, StopIteration):
            models = None
        if models is None:
            raise Refusal(f"{KEY}={url}: what it answers is no list of models. Give the address of a vLLM.")
        if short:
            raise Refusal(
                f"{KEY}={url}: its context has {most} tokens, a prompt with its completion up to {tokens}. Start it "
                f"with --max-model-len {tokens}, or lower max_prompt_length or trainer.max_completion_length."
            )
        with suppress(Failure):
            if 'engine="1"' in engine.ask("/metrics", words=True, most=METRICS_BYTES, timeout=LOOK_SECONDS):
                raise Refusal(
                    f"{KEY}={url}: has data-parallel replicas, of which one alone would load the adapter. Start each "
                    "as a server of its own, and give a list of their URLs."
                )

    def sample(
        self, save: Callable[[Path], None], folder: Path, prompts: list[list[int]], seeds: list[int], asked: dict,
        vocabulary: int,
    ) -> list[Sampled]:  # fmt: skip
        """One completion of each prompt of this process; the others have as many.

        Args:
            save: writes the policy's adapter into a folder.
            folder: where it is published; the engines see it under the same path.
            seeds: one for each prompt.
            asked: `max_tokens`, `temperature`, `stop_token_ids`.
            vocabulary: token ids that the policy has.

        Raises:
            Gone: on every process.
            Refusal: an engine does not take the adapter, or a request, or writes other tokens.
        """
        self._vocabulary = vocabulary
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

    def hold(self, difference: float, most: float) -> None:
        """Refuse engines that are another model, by their first completions.

        Args:
            difference: between their log-probabilities and the policy's, in nats a token.
            most: of it that is allowed.

        Raises:
            Refusal: it is more.
        """
        if self.compared:
            return
        if not difference <= most:  # NaN neither
            raise Refusal(
                f"trainer.rollout=server: its log-probabilities differ from the policy's by {difference:.3f} nats a "
                f"token (trainer.max_logp_difference={most:g}). It must serve model.id in "
                "the precision that is trained (a 4-bit base is another model: quantization=none), and where "
                "trainer.temperature is not 1 with --logprobs-mode processed_logprobs."
            )
        self.compared = True
        if ranks.is_first():
            print(f"rollout=server: {difference:.1g} nats a token between server and policy.", flush=True)

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
        for url in self._engines:
            self._load(url)
        self._digest = digest
        while len(self._published) > 1:
            _withdraw(self._engines, [self._published.pop(0)])

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
        urls = list(self._engines)
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
            good &= all(type(logp) in (int, float) and LOWEST <= logp <= HIGHEST for logp in logps)
        except (TypeError, LookupError):
            good = False
        if not good:
            raise Refusal(
                f"{KEY}={url}: its completions lack token ids, or a log-probability of each. Give the address of a "
                "vLLM that knows return_token_ids (0.10.2 or later)."
            )
        if max(ids) >= self._vocabulary:
            raise Refusal(
                f"{KEY}={url}: wrote the token {max(ids)}, and model.id has {self._vocabulary}. Serve the model of "
                "model.id."
            )
        return Sampled(ids, [float(logp) for logp in logps])

    def _post(self, url: str, path: str, body: dict) -> Any:
        """The answer; asked again while the engine is away, or has more to do than it takes.

        Raises:
            Gone: for longer than `timeout`.
            _Refused: it does not take the request.
        """
        since, words = time.monotonic(), path.endswith("_adapter")
        while True:
            try:
                return self._engines[url].ask(path, body, words=words, most=ANSWER_BYTES * 16)
            except Failure as failure:
                if failure.final:
                    raise _Refused(url, failure) from None
            if time.monotonic() - since > self.timeout:
                raise Gone(f"{KEY}={url}: no answer for {self.timeout:g} s (trainer.vllm_server_timeout).")
            time.sleep(min(PAUSE, self.timeout / 4))


class _Refused(Refusal):
    """An engine's own words: it does not take a request."""

    def __init__(self, url: str, failure: Failure):
        self.status, self.told = failure.status, failure.told[:TOLD].rstrip(".")
        said = f"{failure}: {self.told}" if self.told else failure
        super().__init__(f"{KEY}={url}: {said}. See its log, and that it was started with: {SERVE}.")


def _withdraw(engines: dict[str, Endpoint], adapters: list[Path]) -> None:
    """Let the engines drop adapters that nobody will ask for, and remove them."""
    for adapter in adapters:
        for engine in engines.values():
            with suppress(Failure):
                asked = {"lora_name": adapter.name}
                engine.ask("/v1/unload_lora_adapter", asked, words=True, timeout=LAST_SECONDS)
        shutil.rmtree(adapter, ignore_errors=True)
