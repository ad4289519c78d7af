"""Settings that cannot work or would do nothing, seen in the config alone.

What the tables say of the libraries was read in TRL 1.16, PEFT 0.21 and transformers 5.23; tests/test_settings.py
compares them with the installed source.
"""

import functools
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import methods, ranks, references
from rlhf_recipes.adapter_files import REWRITES_BASE
from rlhf_recipes.config import CONF
from rlhf_recipes.errors import Refusal, nearest
from rlhf_recipes.launch import ranges
from rlhf_recipes.run_folder import read_json

PPO, RLOO = "rlhf_recipes.ppo.PPOConfig", "rlhf_recipes.ppo.RLOOConfig"


@dataclass(frozen=True)
class Reads:
    """Where a class reads an argument.

    Attributes:
        default: the class's own; at it nothing is lost where it is not read.
        by: the argument that decides whether it is read; "": nothing does, it is read in no run of ours.
        values: those of `by` at which it is read; None: it is left out, too.
        instead: what to do, where no value of `by` would help.
    """

    default: Any
    by: str = ""
    values: tuple = ()
    instead: str = ""


DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# `loss_type` of each class, whose every loss TRL looks up at the first step.
LOSSES = {
    "trl.DPOConfig": DPO_LOSSES,
    "trl.KTOConfig": ("kto", "apo_zero_unpaired"),
    "rlhf_recipes.preference.ORPOConfig": ("orpo",),
    "rlhf_recipes.preference.SimPOConfig": ("simpo",),
    "trl.experimental.cpo.CPOConfig": ("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
    "trl.SFTConfig": ("nll", "dft"),
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# DPO's losses of a difference of their scores.
OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
WARMED_UP = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
OF_MODEL = "The model comes from `model` and `quantization`: set it there."
SHARED = {
    "warmup_steps": Reads(0, "lr_scheduler_type", WARMED_UP),
    "eval_steps": Reads(None, "eval_strategy", ("steps",)),
    "model_init_kwargs": Reads(None, instead=OF_MODEL),
    "trust_remote_code": Reads(False, instead="Use model.trust_remote_code."),
    "resume_from_checkpoint": Reads(None, instead="A run continues from its own last checkpoint (resume=auto)."),
}
NO_SMOOTHER = {"label_smoothing_factor": Reads(0.0, instead="It belongs to recipes/sft.py. Leave it out.")}
REFERENCE = {
    "precompute_ref_batch_size": Reads(None, "precompute_ref_log_probs", (True,)),
    "ref_model_mixup_alpha": Reads(0.6, "sync_ref_model", (True,)),
    "ref_model_sync_steps": Reads(512, "sync_ref_model", (True,)),
}
OF_DPO = "It belongs to recipes/dpo.py. Leave it out."
# Arguments of DPO's losses and of its reference, which ORPO and SimPO have none of.
NO_REFERENCE = {
    key: Reads(default, instead=OF_DPO)
    for key, default in {
        "precompute_ref_log_probs": False, "precompute_ref_batch_size": None, "sync_ref_model": False,
        "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512, "loss_weights": None, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False,
        "discopop_tau": 0.05,
    }.items()
}  # fmt: skip
BEYOND = ("max_completion_length", "is_encoder_decoder", "generate_during_eval")
# The config of TRL's own trainer of a method, and what it takes beyond ours.
ONLY_TRLS = {
    "rlhf_recipes.preference.ORPOConfig": ("trl.experimental.orpo.ORPOConfig", (*BEYOND, "padding_value")),
    "rlhf_recipes.preference.SimPOConfig": ("trl.experimental.cpo.CPOConfig", (*BEYOND, "alpha")),
}
DECODER = {
    "max_completion_length": Reads(None, instead="It is for encoder-decoders. Use trainer.max_length."),
    "is_encoder_decoder": Reads(None, instead="The model's config says it. Leave it out."),
}
READ = {
    "trl.SFTConfig": SHARED | {
        "label_smoothing_factor": Reads(0.0, "loss_type", ("nll",)),
        "packing_strategy": Reads("bfd", "packing", (True,)),
    },
    "trl.RewardConfig": SHARED | NO_SMOOTHER,
    "trl.DPOConfig": SHARED | NO_SMOOTHER | REFERENCE | {
        "label_smoothing": Reads(0.0, "loss_type", ("aot", "aot_unpaired", "exo_pair", "robust")),
        "discopop_tau": Reads(0.05, "loss_type", ("discopop",)),
        "beta": Reads(0.1, "loss_type", tuple(name for name in DPO_LOSSES if name != "sft")),
        "ld_alpha": Reads(None, "loss_type", tuple(name for name in DPO_LOSSES if name != "sft")),
        "f_divergence_type": Reads("reverse_kl", "loss_type", OF_SCORES),
        "f_alpha_divergence_coef": Reads(0.5, "f_divergence_type", ("alpha_divergence",)),
    },
    "trl.KTOConfig": SHARED | NO_SMOOTHER | REFERENCE,
    "rlhf_recipes.preference.ORPOConfig": SHARED | NO_SMOOTHER | NO_REFERENCE | {
        "label_smoothing": Reads(0.0, instead="ORPO's loss has none. Leave it out."),
    },
    "rlhf_recipes.preference.SimPOConfig": SHARED | NO_SMOOTHER | NO_REFERENCE,
    "trl.experimental.cpo.CPOConfig": SHARED | NO_SMOOTHER | DECODER | {
        "label_smoothing": Reads(0.0, "loss_type", ("sigmoid", "simpo", "alphapo")),
        "simpo_gamma": Reads(0.5, "loss_type", ("simpo", "alphapo")),
        "cpo_alpha": Reads(1.0, "loss_type", ("sigmoid", "hinge", "ipo", "simpo")),
    },
    "trl.experimental.orpo.ORPOConfig": SHARED | NO_SMOOTHER | DECODER,
    PPO: {key: SHARED[key] for key in ("warmup_steps", "eval_steps")} | NO_SMOOTHER | {
        "resume_from_checkpoint": SHARED["resume_from_checkpoint"],
        "chat_template_kwargs": Reads(None, instead="Use model.chat_template_kwargs, which every recipe reads."),
        "kl_horizon": Reads(10, "kl_controller", ("adaptive",)),
        "uwo_coef": Reads(0.5, "reward_ensemble", ("uwo",)),
        "vllm_server_timeout": Reads(240.0, "rollout", ("server",)),
        "vllm_importance_sampling_correction": Reads(True, "rollout", ("server",)),
        "vllm_importance_sampling_clip_max": Reads(3.0, "rollout", ("server",)),
        "max_logp_difference": Reads(0.1, "rollout", ("server",)),
        "merge_to_sample": Reads(None, "rollout", ("local", None)),
        "local_rollout_forward_batch_size": Reads(64, "rollout", ("local", None)),
    },
    RLOO: SHARED | NO_SMOOTHER | {
        "chat_template_kwargs": Reads(None, instead="Use model.chat_template_kwargs, which every recipe reads."),
        "uwo_coef": Reads(0.5, "reward_ensemble", ("uwo",)),
        "ref_model_mixup_alpha": Reads(0.6, "sync_ref_model", (True,)),
        "ref_model_sync_steps": Reads(512, "sync_ref_model", (True,)),
        "log_unique_prompts": Reads(False, "log_completions", (True,)),
        "num_completions_to_print": Reads(None, "log_completions", (True,)),
        "transformers_continuous_batching_config": Reads(None, "use_transformers_continuous_batching", (True,)),
        "num_generations_eval": Reads(None, "eval_strategy", ("steps", "epoch")),
    },
}  # fmt: skip


def check(cfg: DictConfig, recipe: str | None) -> None:
    """Refuse numbers out of range, arguments that nothing reads, and starts of LoRA that rewrite the base.

    Args:
        recipe: its name; None where it is not known.

    Raises:
        Refusal: the first offence, naming its key as typed.
    """
    kept = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "output_dir"])
    node = OmegaConf.to_container(kept, resolve=True)
    trainer = node.get("trainer") or {}
    for key in ("model", "judge"):
        said = node[key].get("adapter_base") if isinstance(node.get(key), dict) else None
        if said not in (None, "same"):
            raise Refusal(f"{key}.adapter_base={said}: must be same, or left out.")
    ranges.check(node, trainer.get("_target_") or recipe)
    if trainer:
        _refuse_losses(trainer)
        _refuse_unread(trainer, recipe)
        _refuse_clashes(trainer)
        _refuse_lora(node["lora"], trainer, recipe, quantized="_target_" in node["quantization"])
        _refuse_lora_beside_adapter(node)


def _losses(trainer: dict) -> list[str]:
    given = trainer.get("loss_type") or LOSSES[trainer["_target_"]][0]
    return given if isinstance(given, list) else [given]


def _refuse_losses(trainer: dict) -> None:
    target = trainer.get("_target_")
    known, theirs = LOSSES.get(target), ONLY_TRLS.get(target, ("",))[0]
    for name in _losses(trainer) if known else []:
        if name in known:
            continue
        here = f"trainer.loss_type={name}: not one of {', '.join(known)}"
        if name in LOSSES.get(theirs, ()):
            raise Refusal(f"{here}; TRL's own trainer has it: add trainer._target_={theirs}.")
        raise Refusal(f"{here}{nearest(str(name), known)}")


def _refuse_unread(trainer: dict, recipe: str | None) -> None:
    """An argument that differs from its default, and would change nothing."""
    ours = _written("trainer", recipe) if recipe in methods.METHODS else {}
    common = _written("trainer", "common")
    for key, reads in READ.get(trainer.get("_target_"), {}).items():
        if key not in trainer or trainer[key] in (reads.default, ours.get(key), common.get(key)):
            continue
        if not reads.by:
            raise Refusal(f"trainer.{key}={trainer[key]}: is read by nothing here. {reads.instead}")
        given = _losses(trainer) if reads.by == "loss_type" else [trainer.get(reads.by)]
        if not any(each in reads.values for each in given):
            readers = " or ".join(_shown(value) for value in reads.values if value is not None)
            others = "" if given == [None] else f", not with {_shown(given)}"
            raise Refusal(
                f"trainer.{key}={_shown(trainer[key])}: is read with trainer.{reads.by}={readers} alone{others}: it "
                "would change nothing. Leave it out, or choose one that reads it."
            )


def _refuse_clashes(trainer: dict) -> None:
    """What TRL refuses, or divides by zero on, when the model is loaded already."""
    target, given = trainer.get("_target_"), trainer.get
    if target in ("trl.DPOConfig", "trl.KTOConfig", RLOO) and given("sync_ref_model"):
        raise Refusal("trainer.sync_ref_model=true: TRL cannot move the reference of a LoRA. Leave it out.")
    if given("chat_template_path"):
        raise Refusal(
            f"trainer.chat_template_path={given('chat_template_path')}: rows are counted and shown with the model's "
            "own template. Put that file into a folder with the model, as chat_template.jinja, and give model.path."
        )
    if given("packing") and given("truncation_mode") == "keep_end":
        raise Refusal("trainer.truncation_mode=keep_end: packing keeps the start of what is too long. Choose one.")
    theirs, keys = ONLY_TRLS.get(target, ("", ()))
    for key in keys:
        if key in trainer:
            raise Refusal(
                f"trainer.{key}={_shown(trainer[key])}: only TRL's own trainer has it. Leave it out, or add "
                f"trainer._target_={theirs}."
            )
    if target in ONLY_TRLS and given("truncation_mode", "keep_start") != "keep_start":
        raise Refusal(f"trainer.truncation_mode={given('truncation_mode')}: must be keep_start here. Leave it out.")
    if target == "trl.DPOConfig":
        losses, smoothing = _losses(trainer), given("label_smoothing", 0.0)
        others = sorted(set(losses) - {*OF_SCORES, "sft"})
        divergence = given("f_divergence_type") or "reverse_kl"
        if divergence not in DIVERGENCES:
            raise Refusal(
                f"trainer.f_divergence_type={divergence}: not one of {', '.join(DIVERGENCES)}"
                f"{nearest(str(divergence), DIVERGENCES)}"
            )
        if divergence != "reverse_kl" and others:
            raise Refusal(f"trainer.f_divergence_type={divergence}: the loss {others[0]} has none. Leave one out.")
        if given("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
            raise Refusal("trainer.use_weighting=true: the losses aot and aot_unpaired have no weights. Leave it out.")
        if "exo_pair" in losses and smoothing == 0:
            raise Refusal(
                "trainer.label_smoothing=0.0: the loss exo_pair takes its logarithm. Give a small one, 0.001 say."
            )
        if "robust" in losses and isinstance(smoothing, float) and smoothing >= 0.5:
            raise Refusal(
                f"trainer.label_smoothing={smoothing}: the loss robust divides by 1 - 2 label_smoothing. Choose one "
                "below 0.5."
            )
    if target in (PPO, RLOO):
        _refuse_scores(trainer)
    if target == PPO:
        _refuse_ppo(trainer)
    if target == RLOO:
        _refuse_rloo(trainer)


def _refuse_scores(trainer: dict) -> None:
    """What would make all episodes of a rollout earn the same."""
    ends, weights = trainer.get("reward_clip_range"), trainer.get("reward_weights")
    if isinstance(ends, list) and (len(ends) != 2 or not ends[0] < ends[1]):
        raise Refusal(f"trainer.reward_clip_range={ends}: must be [lowest,highest]. Change it.")
    cache, longest = trainer.get("soft_punish_cache"), trainer.get("max_completion_length", 256)
    if cache is not None and cache > longest:
        raise Refusal(
            f"trainer.soft_punish_cache={cache}: punishes every completion, for it is over "
            f"trainer.max_completion_length={longest}. Lower it."
        )
    if weights and not any(weights):
        raise Refusal(f"trainer.reward_weights={weights}: none counts. Give one of them another number than 0.")


def _refuse_rloo(trainer: dict) -> None:
    given, accumulated = trainer.get, trainer["gradient_accumulation_steps"]
    if given("use_vllm"):
        raise Refusal(
            "trainer.use_vllm=true: TRL would merge the LoRA into the base, which the reward models share. Leave it "
            "out; recipes/ppo.py samples from a vLLM server (trainer.rollout=server)."
        )
    batch, several = trainer["per_device_train_batch_size"], trainer["num_generations"]
    steps, whole = given("steps_per_generation") or accumulated, given("generation_batch_size")
    completions = whole or batch * steps * ranks.world_size()
    if completions % several:
        raise Refusal(
            f"trainer.num_generations={several}: the {completions} completions of a rollout "
            "(per_device_train_batch_size x steps_per_generation x processes) are no multiple of it. Change one."
        )
    steps = whole // (batch * ranks.world_size()) if whole else steps
    if given("num_iterations", 1) == 1 and steps <= accumulated:
        for key in ("epsilon", "epsilon_high"):
            if given(key) not in (None, 0.2):
                raise Refusal(
                    f"trainer.{key}={given(key)}: a rollout is used for one step, in which the ratio is 1: nothing is "
                    "clipped. Leave it out, or raise trainer.num_iterations."
                )


def _refuse_ppo(trainer: dict) -> None:
    if "vf_coef" in trainer:  # TRL's, whose critic had it: Adam takes no notice of the scale of a loss
        raise Refusal(
            "trainer.vf_coef: the critic shares no weights with the policy. Use trainer.value_learning_rate."
        )
    one_step = (trainer.get("num_ppo_epochs", 4), trainer.get("num_mini_batches", 1)) == (1, 1)
    for key, default in {"cliprange": 0.2, "dual_clip": None}.items():
        if one_step and trainer.get(key, default) != default:
            raise Refusal(
                f"trainer.{key}={trainer[key]}: a rollout is used for one step, in which the ratio is 1: nothing is "
                "clipped. Leave it out, or raise trainer.num_ppo_epochs or trainer.num_mini_batches."
            )
    unread = trainer.get("kl_controller", "fixed") == "fixed" and trainer.get("kl_brake", 5.0) is None
    if unread and trainer.get("kl_target", 10.0) != 10.0:
        raise Refusal(
            f"trainer.kl_target={trainer['kl_target']}: is read by neither kl_controller=fixed nor kl_brake=null. "
            "Leave it out, or choose trainer.kl_controller=adaptive."
        )


def _refuse_lora(lora: dict, trainer: dict, recipe: str | None, quantized: bool) -> None:
    targets = lora.get("target_modules")
    heads = [each for each in targets if str(each).endswith("lm_head")] if isinstance(targets, list) else []
    if heads and trainer["_target_"] not in methods.TRLS_OWN:  # whose trainers run the head as a module
        raise Refusal(
            f"lora.target_modules: recipes/{recipe}.py reads the weights of {heads[0]} past a LoRA on it, which would "
            "not be trained. Leave it out."
        )
    start = str(lora.get("init_lora_weights", True)).lower()
    key = f"lora.init_lora_weights={lora.get('init_lora_weights')}"
    plain = "Leave it out, or choose gaussian or orthogonal."
    if start.startswith(REWRITES_BASE):
        raise Refusal(
            f"{key}: takes its start out of the base's weights, and the base as it is is the reference and what the "
            f"adapter is published on. {plain}"
        )
    if start == "eva":
        raise Refusal(f"{key}: starts from activations that no recipe collects; it would start like any LoRA. {plain}")
    r = lora.get("r", 8)
    if start == "orthogonal" and isinstance(r, int) and r % 2:
        raise Refusal(f"lora.r={r}: must be even with {key}. Change it.")
    if start == "mica" and quantized:
        raise Refusal(f"{key}: needs the base's weights in full. Add quantization=none.")
    bias = lora.get("bias", "none")
    if bias != "none":
        raise Refusal(
            f"lora.bias={bias}: trains biases of the base, which the reference and whatever is compared stand on. "
            "Leave it out."
        )
    if lora.get("inference_mode"):
        raise Refusal("lora.inference_mode=true: nothing would be trained. Leave it out.")
    task = "SEQ_CLS" if recipe == "reward" else "CAUSAL_LM"
    if lora.get("task_type", task) != task:
        raise Refusal(f"lora.task_type={lora['task_type']}: recipes/{recipe}.py trains {task}. Leave it out.")


def _refuse_lora_beside_adapter(node: dict) -> None:
    """The adapter that is continued keeps its own shape, whatever `lora` says."""
    reference = (node.get("model") or {}).get("adapter")
    adapter = reference and references.adapter_in(reference)
    if not adapter:
        return
    defaults = _written("lora", "all_linear")
    own = read_json(adapter / references.ADAPTER_CONFIG)
    for key, value in node["lora"].items():
        if key in ("_target_", "target_modules") and isinstance(value, str):  # words for modules that it lists
            continue
        if value != defaults.get(key) and _unordered(value) != _unordered(own.get(key)):
            members = " (reward.rank and reward.alpha of an ensemble)" if "rank" in (node.get("reward") or {}) else ""
            raise Refusal(
                f"lora.{key}={value}{members}: model.adapter={reference} is continued as it is, with {own.get(key)}. "
                "Give that, or leave it out."
            )


@functools.cache
def _written(group: str, name: str) -> dict[str, Any]:
    """A file below conf/, its references as they are."""
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=False)


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
