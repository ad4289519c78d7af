"""Arguments of `PPOTrainer`."""

import re
from dataclasses import dataclass, field

from rlhf_recipes.errors import Refusal
from rlhf_recipes.ppo.algorithm import CONTROLLERS, ENSEMBLES
from rlhf_recipes.ppo.engines import Engines
from rlhf_recipes.ppo.trl_private import BaseConfig

VALUES = ("head", "separate")
ROLLOUTS = ("local", "server")
URL = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?")


@dataclass
class PPOConfig(BaseConfig):
    """Arguments of PPO beside transformers' own: TRL 1.12's names for what is PPO's, RLOO's for generation.

    An optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps` prompts on each process, as in
    any trainer: one mini-batch. A rollout is `num_mini_batches` of them, used `num_ppo_epochs` times.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Of the policy. TRL 1.12's default."})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the critic: its adapter and head. None: `learning_rate`."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Reward functions may want the columns."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two rows of the log."})

    model_init_kwargs: dict | None = field(default=None, metadata={"help": "For a `model` or a reward given by name."})
    chat_template_kwargs: dict | None = field(default=None, metadata={"help": "For the chat template."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "With dropout the ratio of the first step is not 1, and the KL is noise."}
    )

    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a completion."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of sampling; all log-probabilities are taken at this temperature too."}
    )
    top_p: float = field(default=1.0, metadata={"help": "1.0 and top_k=0 sample what the log-probabilities describe."})
    top_k: int = field(default=0, metadata={"help": "0: all tokens."})

    local_rollout_forward_batch_size: int = field(
        default=64,
        metadata={"help": "Prompts that each process answers at a time: they share a cache of keys and values."},
    )
    merge_to_sample: bool | None = field(
        default=None,
        metadata={
            "help": "Sample from unpacked copies of the base weights, in float32 with the LoRA added: faster, for two "
            "(or four) bytes a weight. None: on a CPU."
        },
    )

    rollout: str = field(
        default="local",
        metadata={
            "help": "Who answers the prompts: `local`, this process; `server`, vLLM at `vllm_server_base_url`, given "
            "the adapter whenever it has changed."
        },
    )
    vllm_server_base_url: str | list[str] | None = field(
        default=None, metadata={"help": "http://host:port of the vLLM server, or of each of several."}
    )
    vllm_server_api_key_env: str | None = field(
        default=None,
        metadata={
            "help": "Environment variable that holds the key of the servers (`vllm serve --api-key`), which is never "
            "written. None: they want none."
        },
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds that a server which does not answer is waited for."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Weigh tokens that a server drew by policy / server, truncated."}
    )
    vllm_importance_sampling_clip_max: float = field(
        default=3.0, metadata={"help": "Where these weights are truncated; those of each token."}
    )
    max_logp_difference: float = field(
        default=0.1,
        metadata={
            "help": "Nats a token, in the mean: a server that differs by more from the policy on its first "
            "completions is another model, and the run is refused."
        },
    )

    value: str = field(
        default="head",
        metadata={
            "help": "`head`: on the policy's hidden states, detached: no second forward and backward. `separate`: an "
            "adapter of its own, started from the first reward model that is an adapter on the same base."
        },
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in one pass over a rollout."})
    cliprange: float = field(default=0.2, metadata={"help": "Epsilon of the policy's ratio."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound of ratio * A where A < 0, e.g. 3. None: off."}
    )
    cliprange_value: float | None = field(
        default=0.2,
        metadata={
            "help": "How far a value may move from the rollout's, in standard deviations of the returns. None: off."
        },
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the rewards of a rollout to deviation 1."})

    kl_coef: float = field(default=0.05, metadata={"help": "Beta: weight of the KL penalty at every token."})
    kl_controller: str = field(
        default="fixed",
        metadata={"help": "`fixed`; `adaptive` steers the KL to `kl_target`; `limit` ends the run at `kl_target`."},
    )
    kl_target: float = field(default=10.0, metadata={"help": "Nats per completion."})
    kl_horizon: int = field(
        default=10,
        metadata={"help": "Rollouts: each moves the coefficient of `adaptive` by up to a fifth of 1 / kl_horizon."},
    )
    kl_brake: float | None = field(
        default=5.0, metadata={"help": "End the run where the KL exceeds so many times `kl_target`. None: never."}
    )
    entropy_floor: float | None = field(
        default=0.01, metadata={"help": "End the run where the entropy, nats per token, falls below. None: never."}
    )

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One for each function; 0: only logged. None: 1."}
    )
    reward_ensemble: str = field(
        default="sum",
        metadata={
            "help": "What becomes of several rewards: `sum`, or `mean`, `min` or `uwo` of an ensemble, each reward "
            "model in standard deviations of its rewards of held-out replies."
        },
    )
    uwo_coef: float = field(default=0.5, metadata={"help": "`uwo` is the mean less this times the variance."})
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Subtract the mean of all rewards so far and divide by their deviation. Without it that of the "
            "first rollout is subtracted."
        },
    )
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Of what an episode earns, its mean at the start 0; e.g. [-5, 5]. None: off."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Taken from what a completion earns that does not end with EOS, in standard deviations of the "
            "rewards so far."
        },
    )
    soft_punish_cache: int | None = field(
        default=None,
        metadata={
            "help": "Soft overlong punishment (arXiv:2503.14476, equation 13): what a completion earns falls by up to "
            "one standard deviation over the last so many tokens of `max_completion_length`. None: off."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, words in (
            ("value", VALUES), ("rollout", ROLLOUTS), ("kl_controller", CONTROLLERS), ("reward_ensemble", ENSEMBLES)
        ):  # fmt: skip
            if getattr(self, name) not in words:
                raise Refusal(f"{name}={getattr(self, name)}: not one of {', '.join(words)}.")
        for name in (
            "max_completion_length", "num_ppo_epochs", "num_mini_batches", "kl_horizon",
            "local_rollout_forward_batch_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise Refusal(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in (
            "temperature", "kl_target", "cliprange", "cliprange_value", "vllm_server_timeout",
            "vllm_importance_sampling_clip_max", "max_logp_difference",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise Refusal(f"{name}={getattr(self, name)}: must be above 0.")

        self._check_server()

    def _check_server(self) -> None:
        urls = self.server_urls
        if (self.rollout == "server") != bool(urls):
            wants = "give http://host:port of the vLLM server" if not urls else "add trainer.rollout=server"
            raise Refusal(f"rollout={self.rollout}: vllm_server_base_url={self.vllm_server_base_url}; {wants}.")
        for url in urls:
            if not URL.fullmatch(url):
                raise Refusal(f"vllm_server_base_url={url}: must be like http://localhost:8000.")
        if len(set(urls)) < len(urls):
            raise Refusal(f"vllm_server_base_url: {max(urls, key=urls.count)} stands there twice. Give each once.")
        if urls and (self.top_p != 1 or self.top_k != 0):
            raise Refusal(
                f"rollout=server: top_p={self.top_p:g}, top_k={self.top_k}: importance weights are of the whole "
                "distribution. Leave them at 1 and 0."
            )

    @property
    def server_urls(self) -> list[str]:
        """Of the vLLM servers, without the /v1 that some write at the end; none: samples are drawn here."""
        given = self.vllm_server_base_url or []
        return [url.rstrip("/").removesuffix("/v1") for url in ([given] if isinstance(given, str) else given)]

    def check_servers(self, prompt_tokens: int) -> None:
        """Ask the vLLM servers, where there are any, what they serve.

        Args:
            prompt_tokens: of the longest prompt.

        Raises:
            Refusal: see `Engines.look`.
        """
        if engines := self.engines():
            engines.look(prompt_tokens + self.max_completion_length)

    def engines(self) -> Engines | None:
        """The vLLM servers; None: samples are drawn here.

        Raises:
            Refusal: see `Engines`.
        """
        if not self.server_urls:
            return None
        return Engines(self.server_urls, self.vllm_server_timeout, self.vllm_server_api_key_env)

    def check_prompts(self, count: int) -> None:
        """Refuse `count` prompts that do not fill a rollout.

        Raises:
            Refusal: names what to lower.
        """
        needed = self.prompts_per_rollout * self.world_size
        if count < needed:
            raise Refusal(
                f"train_dataset: {count} prompts, but a rollout takes {needed} (per_device_train_batch_size x "
                "gradient_accumulation_steps x num_mini_batches x processes). Lower these, or give more prompts."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that use one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_batches_per_rollout(self) -> int:
        return self.num_mini_batches * self.gradient_accumulation_steps

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that each process answers."""
        return self.per_device_train_batch_size * self.micro_batches_per_rollout
