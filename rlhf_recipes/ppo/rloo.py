"""RLOO by TRL's trainer, with PPO's rewards, its sampler and its roles on one backbone.

Shapes: B completions, R reward functions.
"""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import trl
from datasets import Dataset
from peft import set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor

from rlhf_recipes import models
from rlhf_recipes.data.template import encode_prompt
from rlhf_recipes.errors import Refusal
from rlhf_recipes.ppo import held_out, rewards
from rlhf_recipes.ppo.algorithm import ENSEMBLES
from rlhf_recipes.ppo.roles import POLICY, REFERENCE, Batch, Roles
from rlhf_recipes.ppo.rollout import SAMPLES, TRAIN, Completions, sample, seed_of
from rlhf_recipes.ppo.scores import Scores

TRLS_REFERENCE = "ref"
# Arguments that change how completions are drawn, by TRL's own sampling alone, and their values without effect.
OF_TRLS_SAMPLING = {
    "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None, "cache_implementation": None,
    "use_vllm": False, "use_transformers_continuous_batching": False,
}  # fmt: skip


@dataclass
class RLOOConfig(trl.RLOOConfig):
    """Arguments of `RLOOTrainer` beside those of `trl.RLOOConfig`: PPOConfig's for rewards and sampling."""

    reward_ensemble: str = field(
        default="sum", metadata={"help": "What becomes of several rewards: `sum`, or `mean`, `min`, `uwo`; see PPO."}
    )
    uwo_coef: float = field(default=0.5, metadata={"help": "`uwo` is the mean less this times the variance."})
    normalize_rewards: bool = field(
        default=False, metadata={"help": "Rewards less the mean of all so far, in their deviations."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "In deviations of the rewards, of a completion that does not end with EOS."}
    )
    soft_punish_cache: int | None = field(
        default=None, metadata={"help": "Tokens over which a completion that fills up loses one deviation; see PPO."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Completions that each process draws at a time."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reward_ensemble not in ENSEMBLES:
            raise Refusal(f"reward_ensemble={self.reward_ensemble}: not one of {', '.join(ENSEMBLES)}.")

    def check_prompts(self, count: int) -> None:
        """Refuse `count` prompts that do not fill a rollout.

        Raises:
            Refusal: names what to lower.
        """
        needed = self.generation_batch_size // self.num_generations
        if count < needed:
            raise Refusal(
                f"train_dataset: {count} prompts, but a rollout takes {needed} (per_device_train_batch_size x "
                "steps_per_generation x processes / num_generations). Lower these, or give more prompts."
            )

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that each process answers; one that is answered several times counts as often."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that use one rollout; 1 where a step takes several."""
        return max(1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)


class RLOOTrainer(trl.RLOOTrainer):
    """REINFORCE with the mean of a prompt's other completions as the baseline (Ahmadian et al., arXiv:2402.14740).

    Loss, advantages and the KL penalty are TRL's. Rewards are `PPOTrainer`'s (runs of recipes/reward.py as adapters on
    the policy's base, ensembles, functions), and so is sampling, unless an argument asks for TRL's own: every
    completion has a seed of its own. In the log `kl` is of a completion, as PPO's is, not of a token.

    Args:
        reward_funcs: as for `PPOTrainer`.

    Raises:
        Refusal: what these do not allow together, on one line.
    """

    def __init__(self, model, reward_funcs, args: RLOOConfig, train_dataset, eval_dataset=None, *,
                 processing_class, peft_config=None, callbacks=None):  # fmt: skip
        args.check_prompts(len(train_dataset))
        weights, args.reward_weights = args.reward_weights, None  # TRL sees one reward: what a completion earns
        models.keep_gradients_on_cpu(model)
        super().__init__(
            model=model,
            reward_funcs=[_earned],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            peft_config=peft_config,
        )
        args.reward_weights = weights
        self.roles = Roles(self.model, "head")
        self.reference = TRLS_REFERENCE if TRLS_REFERENCE in getattr(self.model, "peft_config", {}) else REFERENCE
        functions = rewards.load_all(reward_funcs, None, self.roles, processing_class, args)
        self.scores = Scores(functions, args)
        self.samples: list[dict] = []

    # ---- What TRL's trainer asks for

    def _tokenize_prompts(self, prompts: list):
        return [encode_prompt(self.processing_class, prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        if any(getattr(self.args, key) != plain for key, plain in OF_TRLS_SAMPLING.items()):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        training, first = self.model.training, self.args.process_index * len(prompt_ids)
        rollout = self._step // (self.args.steps_per_generation * self.num_iterations)
        seeds = [seed_of(self.args.seed, TRAIN, rollout, first + i) for i in range(len(prompt_ids))]
        completions = self._sample(prompt_ids, seeds)
        self.model.train(training)
        return completions.ids

    @torch.no_grad()
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """What the completions of all processes earn, (B, 1)."""
        texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
        finished = [ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        sampled = Completions(completion_ids_list, texts, [], finished)
        with self.accelerator.autocast():
            parts = self.scores.rewards(inputs, sampled, self.state)
        earned_B = self.scores.earned(parts, finished, self.gather, learn=self.model.training)
        columns = sampled.columns(parts)
        found = self._metrics["train" if self.model.training else "eval"]
        for name, values in zip(columns, self.gather(torch.stack(list(columns.values()), 1)).T, strict=True):
            if name == "reward":
                found["plain_reward"].append(values.nanmean().item())
                found["plain_reward_std"].append(values[~values.isnan()].std(correction=0).item())
            elif name != "completions/mean_length":  # which TRL has logged
                found[name].append(values.nanmean().item())
        if self.model.training:
            which = range(0, len(inputs), max(1, len(inputs) // SAMPLES))[:SAMPLES]  # of several prompts
            self.samples += sampled.shown(which, inputs, columns, self.state.global_step)
        return self.gather(earned_B)[:, None].to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """PPO's names for what both log, and its KL, of a completion."""
        found = self._metrics["train" if self.model.training else "eval"]
        if "plain_reward" in found:
            found["earned"], found["earned_std"] = found.pop("reward"), found.pop("reward_std")
            found["reward"], found["reward_std"] = found.pop("plain_reward"), found.pop("plain_reward_std")
            lengths = found["completions/mean_length"]
            if "kl" in found:
                found["kl"] = [kl * length for kl, length in zip(found["kl"], lengths, strict=True)]
            for name in [name for name in found if name.startswith(f"rewards/{_earned.__name__}/")]:
                del found[name]
        super().log(logs, start_time)

    # ---- Evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As TRL's. The generator from which training draws the order of a rollout, and dropout, stays where it is."""
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def measure(self, data: Dataset, what: str = "Held out") -> list[dict]:
        """One episode for each prompt, as `held_out.measure` has it."""
        return held_out.measure(self, data, what)

    def complete(self, rows: list[dict], seeds: list[int]) -> tuple[list[list[int]], Completions]:
        prompts = [encode_prompt(self.processing_class, row["prompt"]) for row in rows]
        return prompts, self._sample(prompts, seeds)

    def batch_of(self, prompts: list[list[int]], completions: list[list[int]]) -> Batch:
        return Batch.of(prompts, completions, self.processing_class.pad_token_id, self.args.device)

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]], seeds: list[int]) -> Completions:
        self.model.eval()
        merge = self.roles.shared and self.args.device.type == "cpu"
        with self.accelerator.autocast(), self.roles.merged() if merge else nullcontext():
            return sample(self.roles, self.processing_class, prompts, seeds, self.eos_token_ids, self.args)

    def logps(self, role: str, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            return self.roles.answer_logps(role, batch, self.args.temperature)[1]

    # ---- Checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The policy alone: an ordinary adapter, and the tokenizer."""
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.model.save_pretrained(output_dir, selected_adapters=[POLICY], save_embedding_layers=False)
            self.processing_class.save_pretrained(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the generators: the rollout in use, the statistics of the rewards."""
        super()._save_rng_state(output_dir)
        state = {
            "micro_step": self._step,
            "inputs": self._buffered_inputs,
            "scores": self.scores.state_dict(),
            "samples": self.samples,
        }
        torch.save(state, self._state_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        set_peft_model_state_dict(self.model, weights, adapter_name=POLICY)
        place = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch knows no cpu:0 here
        state = torch.load(self._state_file(resume_from_checkpoint), map_location=place, weights_only=True)
        self._step, self._buffered_inputs = state["micro_step"], state["inputs"]
        self.scores.load_state_dict(state["scores"])
        self.samples = state["samples"]

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"rloo_{self.args.process_index}.pt")

    # ---- Small things

    def gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.float().to(self.args.device)).cpu()


def _earned(**_) -> list[float]:
    """In the place of the reward that TRL's trainer is given; `_calculate_rewards` has those of ours."""
    raise NotImplementedError
