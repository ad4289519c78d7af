"""Base and adapters as an endpoint serves them, in place of a model in this process: vLLM, or what speaks as it does.

An adapter is a model of the endpoint's. It is served from the start (`--enable-lora --lora-modules NAME=FOLDER`) or
loaded now (POST /v1/load_lora_adapter), under a name that ends in the hash of its weights. Prompts are rendered here
and sent as token ids. Log-probabilities of given tokens are `prompt_logprobs`; an engine without them (llama.cpp)
answers, and of given texts nothing is measured.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import inference as m
from rlhf_recipes import models, ranks, text
from rlhf_recipes.adapters import Policies, System
from rlhf_recipes.cai.load import load_one
from rlhf_recipes.config import part_of
from rlhf_recipes.errors import Refusal
from rlhf_recipes.progress import Line
from rlhf_recipes.references import adapter_sha256, folder_of
from rlhf_recipes.secrets import redact

# What tokenizers cut differently.
SAMPLE = "Olá, 你好 🙂\n\n  def f(x): return 12345.678 * x  # don't"


def is_asked(cfg: DictConfig) -> bool:
    """Whether an endpoint generates, not a model in this process."""
    return cfg.get("generator") is not None and cfg.generator.kind == "server"


def quantization(cfg: DictConfig) -> str | dict:
    """What the systems are computed with, for the settings of measurements."""
    if is_asked(cfg):
        return f"as {load_one(cfg.generator, cfg, None).name} serves it"
    return "none" if "_target_" not in cfg.quantization else dict(cfg.quantization)


def refuse_unscored(cfg: DictConfig, policies: "Served") -> None:
    """An endpoint without log-probabilities of given texts needs another measure of what is better.

    Raises:
        Refusal: there is none.
    """
    if policies.scores:
        return
    if cfg.thresholds.metric == "preference_accuracy" or not (
        cfg.get("judge") or cfg.judge_function or cfg.reward_model
    ):
        raise Refusal(
            f"generator.base_url={cfg.generator.base_url}: gives no log-probabilities of a prompt (prompt_logprobs), "
            "so no preference accuracy. Give a judge or reward_model, or serve the model by vLLM."
        )


class Served(Policies):
    """What `Policies` is, by the models of an endpoint.

    Args:
        cfg: with `generator`, `model`, and the `tasks` of an evaluation.
        systems: whose adapters, and those of whose references, are asked for.
        lengths: tokens of all that will be read, answers included.

    Attributes:
        name: the base, as the endpoint calls it, and the endpoint.
        scores: whether log-probabilities of given tokens are to be had.

    Raises:
        Refusal: the base or an adapter is not served, the tokenizer is another, or the context is too small.
    """

    def __init__(self, cfg: DictConfig, tokenizer, systems: list[System], lengths: list[int]):
        if cfg.get("tasks"):
            raise Refusal("tasks: the harness scores a model in this process. Leave them out, or generator=local.")
        if models.template_kwargs(cfg.generator):
            raise Refusal("generator.chat_template_kwargs: prompts are rendered here. Set model.chat_template_kwargs.")
        node, checked = cfg.generator, load_one(cfg.generator, cfg, None)
        if not isinstance(node.base_url, str):
            raise Refusal("generator.base_url: of several endpoints one alone would be given the adapters. Give one.")
        self.model, self.name, self.host = node.model, checked.name, checked.host
        self.concurrency, self.base_url = node.concurrency, node.base_url.rstrip("/")
        self.stops = m.stop_ids(models.load_generation_config(cfg.model), tokenizer)
        # Without a key something must be sent, which is none's secret.
        self.key = os.environ[node.api_key_env].strip() if node.api_key_env else "no key"
        self.client = _client(node, self.key)
        self.scores = ranks.by_first(self._look, tokenizer, max(lengths, default=0))
        asked = [folder for s in systems for folder in ((s.reference, s.adapter) if self.scores else (s.adapter,))]
        self.names = ranks.by_first(self._named, [folder for folder in dict.fromkeys(asked) if folder])
        if ranks.is_first():
            lacks = (
                "" if self.scores else "; it gives no log-probabilities of a prompt, so no accuracy, KL, perplexity"
            )
            print(f"  answers   by {self.name}, and KL to the base as it is served there{lacks}", flush=True)

    def generate(self, folder: str | None, tokenizer, prompts: list, how: m.Sampling, what: str, part=(0, 1)) -> list:
        first, parts = part
        encoded = {i: m.encode(tokenizer, prompts[i], None)[0] for i in range(first, len(prompts), parts)}
        # The whole distribution, whatever the model's generation_config.json, which vLLM reads, says.
        whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        asked = {
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "stop_token_ids": self.stops,
            **whole,
        }
        bodies = {i: {"prompt": ids, "seed": m.draw_seed(how.seed, i), **asked} for i, ids in encoded.items()}
        results: list[dict | None] = [None] * len(prompts)
        for i, choice, usage in self._completions(folder, bodies, what):
            ids = choice.get("token_ids")
            written = tokenizer.decode(ids, skip_special_tokens=True) if ids else choice["text"]
            results[i] = {
                "ids": encoded[i] + (ids or []),
                "start": len(encoded[i]),
                "text": written.strip(),
                "tokens": len(ids) if ids else usage.get("completion_tokens"),
                "finished": choice.get("finish_reason") == "stop",
            }
        return results

    def token_logps(self, folder: str | None, tokenizer, encoded: list[tuple[list[int], int]], what: str) -> list:
        import torch

        bodies = {
            i: {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
            for i, (ids, _) in enumerate(encoded)
        }
        results: list[Any] = [None] * len(encoded)
        for i, choice, _ in self._completions(folder, bodies, what):
            (ids, start), listed = encoded[i], choice.get("prompt_logprobs") or []
            try:
                own = [listed[place][str(ids[place])]["logprob"] for place in range(start, len(ids))]
            except (LookupError, TypeError):
                raise Refusal(f"{self.host}: log-probabilities of other tokens than were sent. See its log.") from None
            results[i] = torch.tensor(own, dtype=torch.float64)
        return results

    def pair_logps(self, folder: str | None, tokenizer, rows: list[dict], kept: slice = m.WHOLE) -> list[dict]:
        return m.pair_logps(folder, tokenizer, rows, f"{self.names[folder]}: pairs", self._sums(tokenizer), kept)

    def neutral(self, system: System, tokenizer, texts: list[str]) -> list[list[float]]:
        encoded = [(tokenizer(each)["input_ids"], 1) for each in texts]
        sums = self._sums(tokenizer)(system.adapter, tokenizer.pad_token_id, encoded, f"{system.name}: text")
        return [[-logp, tokens] for logp, tokens in sums]

    def answers(self, system: System, parent: System, tokenizer, prompts: list[dict], cfg: DictConfig) -> list:
        """As of `Policies`; without `k1` and `k3` where the endpoint gives no log-probabilities of given tokens."""
        if self.scores:
            return super().answers(system, parent, tokenizer, prompts, cfg)
        how = m.Sampling(cfg.max_new_tokens, cfg.temperature, cfg.seed)
        asked = [row["prompt"] for row in prompts]
        return self.generate(system.adapter, tokenizer, asked, how, f"{system.name}: answers", part_of(cfg.shards))

    def _sums(self, tokenizer):
        def sums(folder: str | None, pad_id: int, encoded: list, what: str) -> list[tuple[float, int]]:
            return [
                (logps_K.sum().item(), len(logps_K)) for logps_K in self.token_logps(folder, tokenizer, encoded, what)
            ]

        return sums

    def _look(self, tokenizer, longest: int) -> bool:
        """Whether the endpoint gives log-probabilities of a prompt.

        Raises:
            Refusal: the base is not served, reads less than the longest text, or has another tokenizer.
        """
        cards = self._cards()
        base = cards.get(self.model)
        if base is None:
            raise Refusal(f"generator.model={self.model}: not served at {self.host}, which has {', '.join(cards)}.")
        if base.get("parent"):
            raise Refusal(f"generator.model={self.model}: is an adapter there. Give its base, {base['parent']}.")
        most = base.get("max_model_len") or (base.get("meta") or {}).get("n_ctx")
        if most and most < longest:
            raise Refusal(
                f"{self.name}: reads {most} tokens, and the longest text with its answer has {longest}. Serve it with "
                f"a context of {longest} (vLLM: --max-model-len), or lower max_new_tokens or max_length."
            )
        ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        # Each engine reads its own key of these.
        asked = {"prompt": SAMPLE, "content": SAMPLE, "add_special_tokens": False, "add_special": False}
        try:
            told = self._post(f"{self.base_url.removesuffix('/v1')}/tokenize", {"model": self.model, **asked})
        except _Rejected as error:
            raise Refusal(f"{error}. It needs /tokenize, as vLLM, SGLang and llama.cpp have it.") from None
        if told.get("tokens") != ids:
            raise Refusal(
                f"{self.name}: its tokenizer is not that of model.id, and texts are sent as token ids. Serve the "
                "model of model.id, or set that to the one that is served."
            )
        try:
            body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
            choice = self._choice(self._post("/completions", body))
        except _Rejected:
            choice = {}
        return len(choice.get("prompt_logprobs") or []) == len(ids)

    def _named(self, folders: list[str]) -> dict[str | None, str]:
        """What the endpoint calls the base and the adapters of these folders."""
        cards = self._cards()
        return {None: self.model} | {folder: self._adapter(folder, cards) for folder in folders}

    def _cards(self) -> dict[str, dict]:
        """The models that are served, by name."""
        try:
            told = self._told(self.client, "get", "/models")
        except _Rejected as error:
            raise Refusal(f"{error}. See that generator.base_url is right; mostly it ends in /v1.") from None
        return {str(card.get("id")): card for card in told.get("data") or [] if isinstance(card, dict)}

    def _adapter(self, folder: str, cards: dict[str, dict]) -> str:
        """What the endpoint calls an adapter, which is loaded there unless it is served."""
        path = Path(folder).resolve()
        name = f"{folder_of(folder).name}-{str(adapter_sha256(path))[:12]}"
        if name in cards:
            return name
        try:
            self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, once=True)
        except _Rejected as error:
            served = [
                card["id"] for card in cards.values() if card.get("root") and Path(card["root"]).resolve() == path
            ]
            if served:
                print(f"  answers   of {folder} by {served[0]}, as it was when the endpoint loaded it", flush=True)
                return served[0]
            raise Refusal(
                f"{folder}: not served at {self.host} ({error}). Serve it with --enable-lora --lora-modules "
                f"{name}={folder}, or start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1."
            ) from None
        return name

    def _completions(self, folder: str | None, bodies: dict[int, dict], what: str):
        """(place, first choice, usage) of each request, asked `concurrency` at a time, the longest first: a context
        that is too small shows at once."""
        common = {"model": self.names[folder], "return_token_ids": True, "add_special_tokens": False}
        order = sorted(bodies, key=lambda i: -len(bodies[i]["prompt"]))
        yield from ranks.by_first(self._all, [(i, bodies[i] | common) for i in order], what)

    def _all(self, bodies: list[tuple[int, dict]], what: str) -> list[tuple[int, dict, dict]]:
        line, answered = Line(what, len(bodies)), []
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [(i, pool.submit(self._post, "/completions", body)) for i, body in bodies]
            try:
                for i, future in futures:
                    told = future.result()
                    answered.append((i, self._choice(told), told.get("usage") or {}))
                    line.update(len(answered))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return answered

    def _choice(self, told: dict) -> dict:
        choices = told.get("choices")
        if not (isinstance(choices, list) and choices and isinstance(choices[0].get("text"), str)):
            raise Refusal(f"{self.host}: no completion in its answer. See that generator.base_url is right.")
        return choices[0]

    def _post(self, path: str, body: dict, once: bool = False) -> dict:
        client = self.client.with_options(max_retries=0) if once else self.client
        return self._told(client, "post", path, body=body)

    def _told(self, client, method: str, path: str, **given) -> dict:
        """What the endpoint answers, as JSON; {} for words.

        Raises:
            Refusal: no answer, or an error; `_Rejected` where the endpoint is there and does not do what is asked.
        """
        import openai

        try:
            told = getattr(client, method)(path, cast_to=object, **given)
        except openai.APITimeoutError:
            raise Refusal(f"{self.host}: no answer in time. Raise generator.timeout or lower concurrency.") from None
        except openai.APIConnectionError:
            raise Refusal(
                f"{self.host}: no connection. See that it runs and that generator.base_url is right."
            ) from None
        except openai.APIStatusError as error:
            said = redact(" ".join(text.line(error.response.text.replace(self.key, "<secret>")).split()))[:200]
            raise _Rejected(f"{self.host}: status {error.status_code}, {said}") from None
        except ValueError:
            raise Refusal(f"{self.host}: {path} answers no JSON. See that generator.base_url is right.") from None
        return told if isinstance(told, dict) else {}


class _Rejected(Refusal):
    """The endpoint does not do what is asked."""


def _client(node: DictConfig, key: str):
    import openai

    return openai.OpenAI(
        base_url=node.base_url,
        api_key=key,
        max_retries=node.max_attempts - 1,
        timeout=node.timeout,
        http_client=openai.DefaultHttpxClient(follow_redirects=False),
    )
