"""Base and adapters as an endpoint serves them, in place of a model in this process: vLLM, or what speaks as it does.

An adapter is a model of the endpoint's. It is served from the start (`--enable-lora --lora-modules NAME=FOLDER`) or
loaded now (POST /v1/load_lora_adapter), under a name that ends in the hash of its weights. Prompts are rendered here
and sent as token ids. Log-probabilities of given tokens are `prompt_logprobs`; an engine without them (llama.cpp)
answers, and of given texts nothing is measured.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import endpoint, model_files, models, ranks
from rlhf_recipes import inference as m
from rlhf_recipes.adapters import Policies, System
from rlhf_recipes.cai.load import load_one
from rlhf_recipes.cai.reading import log_probability
from rlhf_recipes.config import part_of
from rlhf_recipes.endpoint import TOLD, Endpoint, Failure
from rlhf_recipes.errors import Refusal
from rlhf_recipes.progress import Line
from rlhf_recipes.references import adapter_sha256, folder_of
from rlhf_recipes.text import line

LONGEST_WAIT = 60.0  # seconds; an endpoint that asks for more is asked again all the same
TOKEN_BYTES = 2**10  # of each token, its text, id and log-probability in JSON
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


def look(cfg: DictConfig, prompts: list[list[dict]] = ()) -> "Served | None":
    """Ask the endpoint, where one generates, whether it can do what will be asked of it, before anything else takes
    its time; no adapter is loaded.

    Args:
        prompts: that it will answer.

    Raises:
        Refusal: see `Served`.
    """
    if not is_asked(cfg):
        return None
    tokenizer = models.load_tokenizer(cfg.model)
    lengths = [len(m.encode(tokenizer, prompt, None)[0]) + cfg.max_new_tokens + 1 for prompt in prompts]
    return Served(cfg, tokenizer, [], lengths)


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
        Refusal: the base or an adapter is not served, the tokenizer is another, the context is too small, or
            log-probabilities come without token ids.
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
        self.concurrency, self.max_attempts = node.concurrency, node.max_attempts
        self.endpoint = Endpoint(node.base_url.rstrip("/"), node.api_key_env, node.timeout)
        self.stops = m.stop_ids(model_files.load_generation_config(cfg.model), tokenizer)
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
            ids = self._written(choice)
            written = tokenizer.decode(ids, skip_special_tokens=True) if ids else choice["text"]
            results[i] = {
                "ids": encoded[i] + ids,
                "start": len(encoded[i]),
                "text": written.strip(),
                "tokens": len(ids) or _count(usage.get("completion_tokens")),
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
                own = [log_probability(listed[place][str(ids[place])]["logprob"]) for place in range(start, len(ids))]
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
            Refusal: the base is not served, reads less than the longest text, or has another tokenizer; or it gives
                them, and no token ids of an answer, without which its KL would be that of no tokens.
        """
        cards = self._cards()
        base = cards.get(self.model)
        if base is None:
            raise Refusal(f"generator.model={self.model}: not served at {self.host}, which has {', '.join(cards)}.")
        if base.get("parent"):
            raise Refusal(f"generator.model={self.model}: is an adapter there. Give its base, {base['parent']}.")
        meta = base.get("meta")
        most = _count(base.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None))
        if most and most < longest:
            raise Refusal(
                f"{self.name}: reads {most} tokens, and the longest text with its answer has {longest}. Serve it with "
                f"a context of {longest} (vLLM: --max-model-len), or lower max_new_tokens or max_length."
            )
        ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
        # Each engine reads its own key of these.
        asked = {"prompt": SAMPLE, "content": SAMPLE, "add_special_tokens": False, "add_special": False}
        try:
            root = self.endpoint.base_url.removesuffix("/v1")
            told = self._told(f"{root}/tokenize", {"model": self.model, **asked})
        except _Rejected as error:
            raise Refusal(f"{error}. It needs /tokenize, as vLLM, SGLang and llama.cpp have it.") from None
        if told.get("tokens") != ids:
            raise Refusal(
                f"{self.name}: its tokenizer is not that of model.id, and texts are sent as token ids. Serve the "
                "model of model.id, or set that to the one that is served."
            )
        try:
            body = {
                "model": self.model,
                "prompt": ids,
                "max_tokens": 1,
                "prompt_logprobs": 0,
                "return_token_ids": True,
            }
            choice = self._choice(self._told("/completions", body))
        except _Rejected:
            choice = {}
        listed = choice.get("prompt_logprobs")
        scores = isinstance(listed, list) and len(listed) == len(ids)
        if scores and not self._written(choice):
            raise Refusal(
                f"{self.name}: its completions lack token ids, so no KL. Serve the model by a vLLM that knows "
                "return_token_ids (0.10.2 or later)."
            )
        return scores

    def _named(self, folders: list[str]) -> dict[str | None, str]:
        """What the endpoint calls the base and the adapters of these folders."""
        cards = self._cards()
        return {None: self.model} | {folder: self._adapter(folder, cards) for folder in folders}

    def _cards(self) -> dict[str, dict]:
        """The models that are served, by name."""
        try:
            told = self._told("/models")
        except _Rejected as error:
            raise Refusal(f"{error}. See that generator.base_url is right; mostly it ends in /v1.") from None
        data = told.get("data")
        cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
        return {str(card.get("id")): card for card in cards}

    def _adapter(self, folder: str, cards: dict[str, dict]) -> str:
        """What the endpoint calls an adapter, which is loaded there unless it is served."""
        path = Path(folder).resolve()
        name = f"{folder_of(folder).name}-{str(adapter_sha256(path))[:12]}"
        if name in cards:
            return name
        try:
            self._told("/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, words=True, attempts=1)
        except _Rejected as error:
            served = [each for each, card in cards.items() if _lies_at(card.get("root"), path)]
            if served:
                said = f"  answers   of {folder} by {served[0]}, as it was when the endpoint loaded it"
                print(line(said), flush=True)
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
            futures = [
                (i, pool.submit(self._told, "/completions", body, most=_most_bytes(body))) for i, body in bodies
            ]
            try:
                for i, future in futures:
                    told = future.result()
                    usage = told.get("usage")
                    answered.append((i, self._choice(told), usage if isinstance(usage, dict) else {}))
                    line.update(len(answered))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return answered

    def _choice(self, told: dict) -> dict:
        choices = told.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not (isinstance(first, dict) and isinstance(first.get("text"), str)):
            raise Refusal(f"{self.host}: no completion in its answer. See that generator.base_url is right.")
        return first

    def _written(self, choice: dict) -> list[int]:
        """The token ids of an answer; none from an endpoint that gives none."""
        ids = choice.get("token_ids") or []
        if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 2**31 for each in ids):
            raise Refusal(
                f"{self.host}: what its answer calls token ids are none. See that generator.base_url is right."
            )
        return ids

    def _told(self, path: str, body: dict | None = None, attempts: int | None = None, **how) -> dict:
        """What the endpoint answers, as JSON; {} for words.

        Raises:
            Refusal: no answer, or an error; `_Rejected` where the endpoint is there and does not do what is asked.
        """
        attempts, chance = attempts or self.max_attempts, random.Random(str(body))
        for attempt in range(1, attempts + 1):
            try:
                told = self.endpoint.ask(path, body, **how)
                return told if isinstance(told, dict) else {}
            except Failure as failed:
                failure = failed.with_traceback(None)
            if failure.final or failure.unread or attempt == attempts:
                break
            time.sleep(endpoint.pause(attempt, min(failure.wait, LONGEST_WAIT), chance))
        if failure.status:
            raise _Rejected(f"{self.host}: status {failure.status}, {failure.told[:TOLD]}")
        if failure.unread:
            raise Refusal(f"{self.host}: {path} answers no JSON. See that generator.base_url is right.")
        advice = "See that it runs and that generator.base_url is right"
        raise Refusal(
            f"{self.host}: {failure}. {'Raise generator.timeout or lower concurrency' if failure.late else advice}."
        )


class _Rejected(Refusal):
    """The endpoint does not do what is asked."""


def _count(value: Any) -> int | None:
    """A whole number that is no less than 0, and None of anything else that an endpoint may write there."""
    return value if type(value) is int and value >= 0 else None


def _lies_at(root: Any, path: Path) -> bool:
    """Whether what an endpoint writes of a model's place is this one."""
    return isinstance(root, str) and "\0" not in root and Path(root).resolve() == path


def _most_bytes(body: dict) -> int:
    """An answer has an entry for each token that is written, and where asked for, for each of the prompt."""
    listed = len(body["prompt"]) if "prompt_logprobs" in body else 0
    return endpoint.ANSWER_BYTES + TOKEN_BYTES * (body["max_tokens"] + listed)
