"""A stand-in for vLLM (0.32): its OpenAI-compatible protocol around a small model, with real log-probabilities.

It serves what this project asks of an engine: models and their adapters (`--lora-modules`, or loaded while it runs),
chats, completions of texts and token ids, log-probabilities of a prompt; and it refuses as vLLM does.
"""

import json
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from rlhf_recipes.sampling import Draws


class Refused(Exception):
    """An answer that is an error: status and message."""


class Engine(ThreadingHTTPServer):
    """`vllm serve FOLDER --served-model-name NAME --enable-lora` on loopback.

    What is drawn hangs on a request's seed alone, as `sampling.Draws` draws it.

    Args:
        lora_modules: name -> folder of the adapters that are served from the start.
        runtime_lora: VLLM_ALLOW_RUNTIME_LORA_UPDATING.
        prompt_logprobs, token_ids: False: the key is ignored, as by engines that have none.

    Attributes:
        asked: how often each path and model was asked.
        bodies: of every POST.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, folder, name="tiny", max_model_len=2048, lora_modules=None, runtime_lora=True, prompt_logprobs=True,
        token_ids=True,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.folder, self.name, self.max_model_len = str(folder), name, max_model_len
        self.runtime_lora, self.prompt_logprobs, self.token_ids = runtime_lora, prompt_logprobs, token_ids
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.adapters: dict[str, str] = {}
        self.lock, self.asked, self.bodies = threading.Lock(), Counter(), []
        for lora_name, path in (lora_modules or {}).items():
            self.load_lora_adapter({"lora_name": lora_name, "lora_path": str(path)})

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the tests

    def models(self, body):
        base = {"id": self.name, "root": self.folder, "parent": None, "max_model_len": self.max_model_len}
        loras = [{"id": name, "root": path, "parent": self.name} for name, path in self.adapters.items()]
        cards = [{"object": "model", "created": 1, "owned_by": "vllm", **card} for card in (base, *loras)]
        return {"object": "list", "data": cards}

    def load_lora_adapter(self, body):
        from peft import PeftModel

        name, path, again = body.get("lora_name"), body.get("lora_path"), body.get("load_inplace", False)
        if not (name and path):
            raise Refused(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters and not again:
            raise Refused(
                400,
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
            )
        if not (Path(path) / "adapter_config.json").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        if name in self.adapters:
            self.model.delete_adapter(name)
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
        self.model.eval()
        self.adapters[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_lora_adapter(self, body):
        name = body.get("lora_name")
        if name not in self.adapters:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.")
        self.adapters.pop(name)
        self.model.delete_adapter(name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def chat_completions(self, body):
        continues = body.get("continue_final_message", False)
        begins = body.get("add_generation_prompt", True)
        if continues and begins:
            raise Refused(400, "Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        ids = self.tokenizer.apply_chat_template(
            body["messages"],
            add_generation_prompt=begins,
            continue_final_message=continues,
            return_dict=False,
            **body.get("chat_template_kwargs", {}),
        )
        new, logps_KV = self.generated(ids, body)
        listed = [
            self.top(logps_V, token, body.get("top_logprobs", 0)) for token, logps_V in zip(new, logps_KV, strict=True)
        ]
        choice = {
            "message": {"role": "assistant", "content": self.text(new)},
            "logprobs": {"content": listed} if body.get("logprobs") else None,
        }
        return self.answer("chat.completion", len(ids), len(new), [choice | self.rest(ids, new, body)])

    def completions(self, body):
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        choices, read, written = [], 0, 0
        for each in prompts:
            special = body.get("add_special_tokens", True)
            ids = self.tokenizer(each, add_special_tokens=special)["input_ids"] if isinstance(each, str) else each
            new, logps_KV = self.generated(ids, body)
            read, written = read + len(ids), written + len(new)
            logprobs = None
            if body.get("logprobs") is not None:
                own = [logps_V[token].item() for token, logps_V in zip(new, logps_KV, strict=True)]
                logprobs = {"tokens": [self.tokenizer.decode(token) for token in new], "token_logprobs": own}
            choices.append({"text": self.text(new), "logprobs": logprobs} | self.rest(ids, new, body))
        return self.answer("text_completion", read, written, choices)

    def tokenize(self, body):
        ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        return {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": None}

    def rest(self, ids, new, body):
        """What a choice of either endpoint has."""
        stopped = bool(new) and new[-1] in self.stops(body)
        rest = {"finish_reason": "stop" if stopped else "length", "prompt_logprobs": None}
        if self.token_ids and body.get("return_token_ids"):
            rest |= {"token_ids": new, "prompt_token_ids": ids}
        if self.prompt_logprobs and body.get("prompt_logprobs") is not None:
            logps_TV = self.logps(ids)
            rest["prompt_logprobs"] = [None]
            for logps_V, token in zip(logps_TV[:-1], ids[1:], strict=True):
                rank, text = int((logps_V > logps_V[token]).sum()) + 1, self.tokenizer.decode(token)
                own = {"logprob": logps_V[token].item(), "rank": rank, "decoded_token": text}
                rest["prompt_logprobs"].append({str(token): own})
        return rest

    def answer(self, kind, read, written, choices):
        choices = [{"index": n, **choice} for n, choice in enumerate(choices)]
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {"id": "1", "object": kind, "created": 1, "model": self.name, "choices": choices, "usage": usage}

    def stops(self, body):
        own = self.model.generation_config.eos_token_id
        return [*(own if isinstance(own, list) else [own]), *(body.get("stop_token_ids") or [])]

    def generated(self, ids, body):
        """Tokens that continue the prompt, and the log-probabilities (V,) that each was drawn from."""
        most = body.get("max_tokens") or 16
        if len(ids) + most > self.max_model_len:
            raise Refused(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {most} "
                f"output tokens and your prompt contains at least {self.max_model_len - most + 1} input tokens.",
            )
        draws, new, logps_KV = Draws([body.get("seed") or 0], "cpu", most), [], []
        temperature = body.get("temperature", 1.0)
        while len(new) < most and not (new and new[-1] in self.stops(body)):
            logps_KV.append(self.logps([*ids, *new])[-1])
            logps_1V = logps_KV[-1][None]
            new.append(int(draws.draw(logps_1V / temperature, [0]) if temperature else logps_1V.argmax(1)))
        return new, logps_KV

    def logps(self, ids):
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def top(self, logps_V, token, count):
        def entry(token):
            text = self.tokenizer.decode(token)
            return {"token": text, "logprob": logps_V[token].item(), "bytes": [*text.encode()]}

        return entry(token) | {"top_logprobs": [entry(each) for each in logps_V.topk(count).indices.tolist()]}

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @contextmanager
    def using(self, name):
        """The model as the one that a request names."""
        if name != self.name and name not in self.adapters:
            raise Refused(404, f"The model `{name}` does not exist.")
        if name != self.name:
            self.model.set_adapter(name)
        with self.model.disable_adapter() if self.adapters and name == self.name else nullcontext():
            yield


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.respond({"/v1/models": self.server.models}, {})

    def do_POST(self):
        engine, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        paths = {"/v1/chat/completions": engine.chat_completions, "/v1/completions": engine.completions}
        paths["/tokenize"] = engine.tokenize
        if engine.runtime_lora:
            paths["/v1/load_lora_adapter"] = engine.load_lora_adapter
            paths["/v1/unload_lora_adapter"] = engine.unload_lora_adapter
        self.respond(paths, body)

    def respond(self, paths, body):
        engine, status = self.server, 200
        with engine.lock:
            engine.asked[self.path, body.get("model")] += 1
            engine.bodies.append(body)
            try:
                if self.path not in paths:
                    raise Refused(404, "Not Found")
                with engine.using(body["model"]) if "model" in body else nullcontext():
                    answer = paths[self.path](body)
            except Refused as error:
                status, message = error.args
                kind = "NotFoundError" if status == 404 else "BadRequestError"
                answer = {"error": {"message": message, "type": kind, "param": None, "code": status}}
        written = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        if not isinstance(answer, str):  # vLLM gives words no type
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder, **how):
    """An `Engine` that answers until the block ends."""
    with Engine(folder, **how) as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield engine
        finally:
            engine.shutdown()
            thread.join()
