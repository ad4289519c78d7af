"""PPO on transformers' training loop: a rollout where its batches begin, and policy and critic updated in each step.

Everything that the loop does is inherited: accumulation, the optimizer and its schedule, callbacks, logging,
checkpoints, Accelerate. On several processes each answers its own prompts, and gradients are summed over all.

Shapes: B episodes, K completion tokens, N completion tokens of a batch, R reward functions.
"""

import os
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import speed_metrics

from rlhf_recipes import models
from rlhf_recipes.data.template import bind, encode_prompt
from rlhf_recipes.errors import Refusal
from rlhf_recipes.inference import stop_ids
from rlhf_recipes.ppo import algorithm, held_out, rewards
from rlhf_recipes.ppo.actor_critic import ActorCritic
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.engines import Gone
from rlhf_recipes.ppo.experience import (
    MicroBatch,
    RolloutSampler,
    compare_policies,
    compute_advantages,
    fit_values,
    partition,
    warn_of_sampler,
    whiten_rewards,
)
from rlhf_recipes.ppo.roles import CRITIC, POLICY, REFERENCE, Batch, Roles
from rlhf_recipes.ppo.rollout import SAMPLES, TRAIN, Completions, sample, seed_of
from rlhf_recipes.ppo.scores import Scores
from rlhf_recipes.ppo.trl_private import BaseTrainer, create_model_from_path, get_config_model_id
from rlhf_recipes.sampling import kl_estimates


class PPOTrainer(BaseTrainer):
    """Proximal Policy Optimization (Schulman et al., arXiv:1707.06347) against rewards under a KL penalty.

    Args:
        model: a causal language model: its id, itself, or a `PeftModel` whose adapter is "default"; that adapter's
            frozen copy then is the reference.
        reward_funcs: one or a list of: a run of recipes/reward.py, a sequence-classification model (id, folder or
            itself), `module:function`, or a function with the arguments of TRL's (`prompts`, `completions`,
            `completion_ids`, `trainer_state` and the other columns), which returns a float for each completion, or
            None where it does not apply.
        args: default `PPOConfig()`.
        train_dataset: rows with `prompt`, text or messages.
        eval_dataset: the same, for `evaluate`; a dict of several is evaluated one by one.
        processing_class: the tokenizer; default: the one beside the model.
        reward_processing_classes: tokenizers of reward models of their own, where not the ones beside them.
        peft_config: the LoRA to add; without it and without a `PeftModel` the whole model is trained.
        quantization_config: for a `model` given by its id.

    Raises:
        Refusal: what these do not allow together, on one line.
    """

    _tag_names = ("trl", "ppo")
    _name = "PPO"
    _paper = MappingProxyType({"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"})

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        reference: Path | None = None,
    ):
        args = args or PPOConfig(output_dir="ppo")
        if not isinstance(train_dataset, Dataset) or "prompt" not in train_dataset.column_names:
            raise Refusal("train_dataset: must be a datasets.Dataset with a column `prompt`.")
        args.check_prompts(len(train_dataset))
        set_seed(args.seed)
        model = _loaded(model, args, quantization_config)
        processing_class = _tokenizer(processing_class, model, args)
        starts_from_adapter = isinstance(model, PeftModel)
        if starts_from_adapter and peft_config is not None:
            raise Refusal("peft_config: the model has an adapter, which is trained. Leave one of them out.")
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        models.keep_gradients_on_cpu(model)

        self.engines = args.engines()
        if self.engines and not isinstance(model, PeftModel):
            raise Refusal(
                "rollout=server: a server is given the policy's LoRA, and there is none. Give a peft_config."
            )
        self.roles, self.reference = Roles(model, args.value), REFERENCE
        self.roles.add_reference(starts_from_adapter, reference)
        self.reward_funcs = rewards.load_all(
            reward_funcs, reward_processing_classes, self.roles, processing_class, args
        )
        shared = next((f for f in self.reward_funcs if getattr(f, "adapter", None)), None)
        self.roles.add_critic(shared and shared.adapter, shared and shared.score)
        if args.disable_dropout:
            self.roles.disable_dropout()
        if args.bf16:
            models.compute_lora_in_bfloat16(model)
        self.scores = Scores(self.reward_funcs, args)
        self.eos_ids = stop_ids(self.roles.causal.generation_config, processing_class)

        self.kl = algorithm.KLController(args.kl_controller, args.kl_coef, args.kl_target, args.kl_horizon)
        self.stopped: str | None = None
        self.samples: list[dict] = []
        self._micro_batches: list[MicroBatch] = []
        self._rollout_log: dict[str, float] = {}
        self._last_good: dict[str, Tensor] = {}
        self._accumulated = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.actor_critic = ActorCritic(args, self.roles, self.accelerator)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or args.n_gpu > 1:
            raise Refusal("PPOTrainer: runs on one device, or on several with `accelerate launch` and plain DDP.")
        self.roles.value_head.to(args.device)
        for copy in self.roles.copies.values():
            copy.to(args.device)
        if args.gradient_checkpointing and CRITIC in self.roles.copies:
            self.roles.copies[CRITIC].gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    # ---- What the training loop asks for

    def get_train_dataloader(self) -> DataLoader:
        """Batches that each hold this process's prompts of a rollout, repeated for every micro-batch made of it."""
        args = self.args
        sampler = RolloutSampler(
            self.train_dataset,
            args.prompts_per_rollout * args.world_size,
            args.num_ppo_epochs * args.micro_batches_per_rollout,
            args.data_seed if args.data_seed is not None else args.seed,
            lambda: int(self.state.epoch or 0),
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.prompts_per_rollout,
            sampler=sampler,
            collate_fn=self.data_collator,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model=None):
        """Two groups by name: `requires_grad` tells which adapter is active, not what is trained."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": list(self.roles.policy_parameters.values()), "weight_decay": self.args.weight_decay},
                {"params": list(self.roles.value_parameters.values()), "weight_decay": self.args.weight_decay},
            ]
            if self.args.value_learning_rate is not None:
                groups[1]["lr"] = self.args.value_learning_rate
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def training_step(self, model, inputs: list[dict], num_items_in_batch=None) -> Tensor:
        """Policy, then critic, on one micro-batch; a rollout first where the last one is used up."""
        step, accumulated = divmod(self._micro_step(), self.args.gradient_accumulation_steps)
        if self._micro_step() % (self.args.num_ppo_epochs * self.args.micro_batches_per_rollout) == 0:
            self._micro_batches = self._roll_out(inputs)
        if accumulated == 0:
            self.actor_critic.drop_gradients()
            self._started = time.monotonic()
        self._accumulated = (accumulated + 1) % self.args.gradient_accumulation_steps
        position = step % self.args.num_mini_batches * self.args.gradient_accumulation_steps
        micro_batches = self._micro_batches[position : position + self.args.gradient_accumulation_steps]
        tokens = sum(m.batch.mask_BK.sum() for m in micro_batches)
        tokens = self.accelerator.reduce(tokens, "sum").item()
        self.model.train()
        first = step % self.args.steps_per_rollout == 0
        deviation = self._rollout_log["return/std"]
        loss = self.actor_critic.backward(micro_batches[accumulated], tokens, first, deviation)
        if self._accumulated == 0:
            if not self.actor_critic.sum_gradients() and not self.args.fp16:
                self._stop("the gradient is not finite", restore=True)
            if first and not self.stopped:
                self._govern()
            self.actor_critic.tally.add("seconds/update", torch.tensor([time.monotonic() - self._started]))
        return loss * self.args.world_size  # the log takes the mean over processes

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.stopped:  # a checkpoint of this step would be continued; `save_strategy=best` saves what it evaluates
            self.control.should_save = self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        if self.is_world_process_zero():
            warn_of_sampler(self._rollout_log)
        return output

    def _micro_step(self) -> int:
        return self.state.global_step * self.args.gradient_accumulation_steps + self._accumulated

    def _clip_grad_norm(self, model):
        """Policy and critic each by their own norm; the log shows the policy's.

        Accelerate's own clipping unscales all gradients each time, which a step in float16 allows once."""
        self.accelerator.unscale_gradients()
        norms = [
            nn.utils.clip_grad_norm_(parameters.values(), self.args.max_grad_norm)
            for parameters in (self.roles.policy_parameters, self.roles.value_parameters)
        ]
        return norms[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._rollout_log, **self.actor_critic.tally.drain(self.accelerator)}
        super().log(logs, start_time)

    # ---- Rollout

    @torch.no_grad()
    def _roll_out(self, rows: list[dict]) -> list[MicroBatch]:
        """Answer the prompts, score the answers, and compute the advantages."""
        args, begin = self.args, time.monotonic()
        rollout = self.state.global_step // args.steps_per_rollout
        first = args.process_index * len(rows)
        seeds = [seed_of(args.seed, TRAIN, rollout, first + i) for i in range(len(rows))]
        prompts, completions = self.complete(rows, seeds)
        sampled = time.monotonic()
        with self.accelerator.autocast():
            parts = self.scores.rewards(rows, completions, self.state)
        scores_B = self.scores.earned(parts, completions.finished, self.gather).to(args.device)

        micro_batches, micro = [], args.per_device_train_batch_size
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions.ids, strict=True)]
        for indices in partition(lengths, micro * args.gradient_accumulation_steps, micro):
            batch = self.batch_of([prompts[i] for i in indices], [completions.ids[i] for i in indices])
            keep = not micro_batches and args.disable_dropout
            logps, entropies, values = map(batch.padded, self.actor_critic.act(batch, keep))
            sampler_logps = batch.padded(torch.cat([completions.logps[i] for i in indices]))
            reference_logps = batch.padded(self.logps(self.reference, batch))
            k1, _, _ = kl_estimates(logps, reference_logps)
            token_rewards = algorithm.token_rewards(scores_B[indices], k1, batch.mask_BK, self.kl.coef)
            micro_batches.append(
                MicroBatch(batch, sampler_logps, logps, reference_logps, entropies, values, token_rewards)
            )
        if args.whiten_rewards:
            whiten_rewards(micro_batches, self._sum)
        if self.state.global_step == 0:
            self.roles.rescale_values(*fit_values(micro_batches, args.gamma, self._sum))
        self._rollout_log = compare_policies(micro_batches, self._sum)
        if self.engines:
            self.engines.hold(self._rollout_log["sampling/logp_difference"], args.max_logp_difference)
        self._rollout_log |= compute_advantages(micro_batches, args, self._sum)
        seconds = {"rollout": sampled - begin, "scoring": time.monotonic() - sampled}
        self._record(rows, completions, parts, seconds)
        return micro_batches

    def complete(self, rows: list[dict], seeds: list[int]) -> tuple[list[list[int]], Completions]:
        self.model.eval()
        prompts = [encode_prompt(self.processing_class, row["prompt"]) for row in rows]
        if self.engines:
            return prompts, self._sampled_elsewhere(prompts, seeds)
        merge = self.args.merge_to_sample
        merge = self.args.device.type == "cpu" if merge is None else merge
        with self.accelerator.autocast(), self.roles.merged() if merge else nullcontext():
            completions = sample(self.roles, self.processing_class, prompts, seeds, self.eos_ids, self.args)
        return prompts, completions

    def _sampled_elsewhere(self, prompts: list[list[int]], seeds: list[int]) -> Completions:
        args = self.args
        asked = {
            "max_tokens": args.max_completion_length, "temperature": args.temperature, "stop_token_ids": self.eos_ids,
        }  # fmt: skip
        save = partial(self.model.save_pretrained, selected_adapters=[POLICY], save_embedding_layers=False)
        vocabulary = self.roles.causal.get_input_embeddings().weight.shape[0]
        try:
            found = self.engines.sample(save, Path(args.output_dir), prompts, seeds, asked, vocabulary)
        except Gone as gone:
            raise Refusal(f"{gone} {self._saved()} Start it again, then run the same command.") from None
        ids = [each.ids for each in found]
        return Completions(
            ids,
            self.processing_class.batch_decode(ids, skip_special_tokens=True),
            [torch.tensor(each.logps, device=args.device) for each in found],
            [each.ids[-1] in self.eos_ids for each in found],
        )

    def _saved(self) -> str:
        """Keep the steps so far, in the middle of what comes after them."""
        step = self.state.global_step
        if not step:
            return "Nothing was trained."
        for each in (self, *self.callback_handler.callbacks):
            if stopped := getattr(each, "stopped", None):  # what is saved here would be continued
                return f"The training was over: {stopped}."
        if not Path(self.args.output_dir, f"checkpoint-{step}", "trainer_state.json").exists():
            self._save_checkpoint(self.model, trial=None)
        return f"Step {step} of {self.state.max_steps} is saved."

    def logps(self, role: str, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            return self.roles.answer_logps(role, batch, self.args.temperature)[1]

    def _record(self, rows: list[dict], completions: Completions, parts: dict[str, Tensor], seconds: dict) -> None:
        """Log the rollout of all processes."""
        columns = completions.columns(parts)
        episodes_BF = self._gathered(columns)
        self._rollout_log |= dict(zip(columns, episodes_BF.nanmean(0).tolist(), strict=True)) | {
            "reward_std": episodes_BF[:, 0].std(correction=0).item(),
            "kl_coef": self.kl.coef,
            **{f"seconds/{name}": value for name, value in seconds.items()},
            "tokens_per_second": sum(map(len, completions.ids)) * self.args.world_size / sum(seconds.values()),
        }
        which = range(min(SAMPLES, len(rows)))
        self.samples += completions.shown(which, rows, columns, self.state.global_step)

    def _govern(self) -> None:
        """After the forward passes of a rollout's first step, before its update: how far the policy is from its
        reference over the whole rollout. Steer the KL coefficient, brake where the policy has broken, else remember it
        as good."""
        args, kl, entropy = self.args, self._rollout_log["kl"], self._rollout_log["entropy"]
        if args.kl_brake is not None and kl > args.kl_brake * args.kl_target:
            self._stop(f"KL {kl:.1f} nats, over {args.kl_brake:g} times kl_target={args.kl_target:g}", restore=True)
        elif args.entropy_floor is not None and entropy < args.entropy_floor:
            self._stop(
                f"entropy {entropy:.4f} nats per token, under entropy_floor={args.entropy_floor:g}", restore=True
            )
        elif args.kl_controller == "limit" and kl >= args.kl_target:
            self._stop(f"KL {kl:.2f} nats reached kl_target={args.kl_target:g}", restore=False)
        else:
            self._last_good = {name: p.detach().cpu().clone() for name, p in self.roles.trained().items()}
        self.kl.update(kl)

    def _stop(self, why: str, restore: bool) -> None:
        """End the run after this step, which changes nothing; `restore`: with the weights of the last good rollout."""
        self.stopped = f"{why} at step {self.state.global_step}"
        self.control.should_training_stop = True
        self.actor_critic.drop_gradients()
        if self.args.fp16:  # a scaler skips a step whose gradients are not finite, and fails at one that has none
            for parameter in self.roles.trained().values():
                parameter.grad = torch.full_like(parameter, torch.inf)
        if restore:
            for name, weights in self._last_good.items():
                self.roles.trained()[name].data.copy_(weights)

    # ---- Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over held-out prompts of reward, KL (k1, k3), length, EOS rate; the seed of each prompt is fixed."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            return {
                key: value
                for name, part in data.items()
                for key, value in self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}").items()
            }
        start = time.time()
        episodes = self.measure(data)
        metrics = {
            f"{metric_key_prefix}_{name}": torch.tensor([e[name] for e in episodes]).nanmean().item()
            for name in episodes[0]
        }
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(episodes))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, data: Dataset, what: str = "Held out") -> list[dict]:
        """One episode for each prompt, as `held_out.measure` has it."""
        return held_out.measure(self, data, what, self._hold_engines if self.engines else None)

    def _hold_engines(self, logps_N: Tensor, completions: Completions) -> None:
        """Refuse servers whose log-probabilities are another model's."""
        drawn_N = torch.cat(completions.logps)
        apart = self._sum(torch.stack([(logps_N - drawn_N).abs().sum(), drawn_N.new_tensor(len(drawn_N))]))
        self.engines.hold((apart[0] / apart[1]).item(), self.args.max_logp_difference)

    # ---- Checkpoints

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The policy alone: an ordinary adapter (or model), and the tokenizer."""
        if not self.roles.shared:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            self.model.save_pretrained(output_dir, selected_adapters=[POLICY], save_embedding_layers=False)
            self.processing_class.save_pretrained(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the generators: the critic, the rollout in use, the controller, the statistics of the rewards."""
        super()._save_rng_state(output_dir)
        state = {
            "value": {name: p.detach() for name, p in self.roles.value_state().items()},
            "micro_batches": [{**vars(m), "batch": asdict(m.batch)} for m in self._micro_batches],
            "kl_coef": self.kl.coef,
            "scores": self.scores.state_dict(),
            "rollout_log": self._rollout_log,
            "last_good": self._last_good,
            "samples": self.samples,
        }
        torch.save(state, self._state_file(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.roles.shared:
            weights = load_peft_weights(resume_from_checkpoint, device="cpu")
            set_peft_model_state_dict(self.model, weights, adapter_name=POLICY)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        place = "cpu" if self.args.device.type == "cpu" else self.args.device  # torch knows no cpu:0 here
        state = torch.load(self._state_file(resume_from_checkpoint), map_location=place, weights_only=True)
        for name, parameter in self.roles.value_state().items():
            parameter.data.copy_(state["value"][name])
        self._micro_batches = [
            MicroBatch(**{**m, "batch": Batch.restored(m["batch"])}) for m in state["micro_batches"]
        ]
        self.kl.coef = state["kl_coef"]
        self.scores.load_state_dict(state["scores"])
        self._rollout_log, self.samples = state["rollout_log"], state["samples"]
        self._last_good = {name: weights.cpu() for name, weights in state["last_good"].items()}

    def _state_file(self, folder: str) -> str:
        return os.path.join(folder, f"ppo_{self.args.process_index}.pt")

    # ---- Small things

    def batch_of(self, prompts: list[list[int]], completions: list[list[int]]) -> Batch:
        with self.accelerator.autocast():
            rows = self.roles.find_rows([p + c for p, c in zip(prompts, completions, strict=True)])
        return Batch.of(prompts, completions, self.processing_class.pad_token_id, self.args.device, rows)

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.to(self.args.device)).cpu()

    def _gathered(self, columns: dict[str, Tensor]) -> Tensor:
        """Episodes of all processes, (B, columns)."""
        return self.gather(torch.stack([c.float() for c in columns.values()], 1))


def _loaded(model: "str | PreTrainedModel | PeftModel", args: PPOConfig, quantization_config):
    """The model, by its id where it is not loaded already."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise Refusal("quantization_config: the model is loaded already. Give its id, or leave this out.")
        return model
    quantization = {} if quantization_config is None else {"quantization_config": quantization_config}
    return create_model_from_path(model, **{**(args.model_init_kwargs or {}), **quantization})


def _tokenizer(given: PreTrainedTokenizerBase | None, model, args: PPOConfig) -> PreTrainedTokenizerBase:
    """The one given, or beside the model, with a padding token and what the chat template is told."""
    tokenizer = models.tokenizer_in(get_config_model_id(model.config)) if given is None else given
    if args.chat_template_kwargs:
        tokenizer = bind(tokenizer, args.chat_template_kwargs, "chat_template_kwargs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
