"""Load and save: tokenizer, 4-bit base, LoRA, the adapter a run continues. Precision follows the hardware."""

import copy
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config, memory, model_files, modules, ranks, sharding
from rlhf_recipes.adapter_files import HEADS
from rlhf_recipes.data import template
from rlhf_recipes.errors import Refusal, first_line
from rlhf_recipes.references import ModelRef, adapter_in, folder_of, trained_with
from rlhf_recipes.run import Run
from rlhf_recipes.text import line

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

OF_ANOTHER = "Choose the model it belongs to, or leave it out."
# Of the jobs of a sweep that share a process.
_bases: dict[tuple[type, str], "PreTrainedModel"] = {}
# Padding tokens of the tokenizers that this process has loaded: to load one of a large vocabulary takes a second.
_pads: dict[tuple[str | None, ...], int] = {}


def training_args(node: DictConfig, run: Run) -> "TrainingArguments":
    """The TRL config of `trainer`, with what follows from hardware and run folder where the user set nothing.

    Without an accelerator: `use_cpu`, bfloat16 only where the processor computes in it, and no gradient
    checkpointing (main memory is plentiful, a second forward is not).

    Seeds the generators as well, as TRL does before it loads a model: a new score head is random.
    """
    import torch
    from transformers import set_seed

    derived = {"output_dir": str(run.checkpoints), "disable_tqdm": True}
    derived["run_name"] = "/".join(run.dir.parts[-2:])  # in a tracker
    if not torch.cuda.is_available():
        derived |= {"use_cpu": True, "bf16": computes_in_bf16(), "gradient_checkpointing": False}
    elif not computes_in_bf16():
        derived |= {"bf16": False, "fp16": True}
    args = config.build(node, "trainer", **derived)
    set_seed(args.seed)
    return args


def check(model: DictConfig, quantization: DictConfig, lora: DictConfig, scores: bool = False) -> None:
    """Refuse what the classes behind `quantization` and `lora` refuse, and modules that the model does not have.

    It comes before a weight is fetched or a row tokenised.

    Args:
        scores: whether it is to score texts.

    Raises:
        Refusal: an unknown key, a wrong type, `model.dtype` is none, `model.attn_implementation` is code of the Hub,
            `model.path` is another model than `model.id`, transformers has no class for it, `lora` names a module or a
            layer that is not in the model, or `model.adapter` does not fit the model.
    """
    if "/" in (model.attn_implementation or "") and not model.get("trust_remote_code"):
        raise Refusal(
            f"model.attn_implementation={model.attn_implementation}: is a kernel on the Hub, code that would be run "
            "here. Choose sdpa, eager or another of the library's own, or, if you know it, add "
            "model.trust_remote_code=true."
        )
    modules.refuse_other_model(model)
    dtype = compute_dtype(model)
    asked = build_quantization(quantization, dtype)
    _refuse_other_kind(model, scores, asked)
    sharding.check_packed(asked, dtype)
    built = config.build(lora, "lora")
    if model.get("adapter"):
        adapters = list(filter(None, [adapter_in(model.adapter)]))  # a stage before may have yet to make it
        check_named_bases(model, adapters)
        for adapter in adapters:
            if said := _told_otherwise(model, adapter):
                print(f"model.adapter={model.adapter}: was trained with {said}; this run is not.", flush=True)
    elif modules.named(built):
        modules.check(model, built, without_weights(model))


def _refuse_other_kind(model: DictConfig, scores: bool, quantization) -> None:
    """By its config.json; `quantization`: of `build_quantization`."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
    )

    shape = model_files.read(model, AutoConfig.from_pretrained)
    wanted = {"causal language model": MODEL_FOR_CAUSAL_LM_MAPPING}
    wanted |= {"sequence classifier": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING} if scores else {}
    for what, classes in wanted.items():
        if type(shape) not in classes and not (model.get("trust_remote_code") and hasattr(shape, "auto_map")):
            raise Refusal(
                f"{model_files.where(model)}: is of a kind that this transformers has no {what} of "
                f"({shape.model_type}). Choose another model."
            )
    packed = getattr(shape, "quantization_config", None) or {}
    if packed.get("quant_method") != "bitsandbytes":
        return
    same = any(packed.get(key) and getattr(quantization, key, False) for key in ("load_in_4bit", "load_in_8bit"))
    if scores or not same:
        kind = packed.get("bnb_4bit_quant_type", "fp4") if packed.get("load_in_4bit") else "int8"
        what = "a score head would be packed, too" if scores else "quantization would not be applied"
        raise Refusal(
            f"{model_files.where(model)}: is packed by its own files ({line(str(kind))}); {what}. Give the unpacked "
            "model, which quantization=nf4 packs."
        )


def without_weights(model: DictConfig) -> "PreTrainedModel":
    """The causal language model as its config describes it, on the device `meta`.

    Raises:
        Refusal: it cannot be found or fetched.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = model_files.read(model, AutoConfig.from_pretrained)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=model.get("trust_remote_code") is True)


def check_named_bases(model: DictConfig, adapters: Iterable[str | Path]) -> dict:
    """Compare adapters that name another base (`model.adapter_base=same`) with the model.

    Returns:
        For result.json: `named_bases`, by the folder of each adapter; nothing where none names another.

    Raises:
        Refusal: see `modules.compare`.
    """
    named = modules.other_bases(model, adapters) if model.get("adapter_base") == "same" else {}
    if not named:
        return {}
    modules.compare(model, named, without_weights(model), model_files.folder_or_id(model))
    return {"named_bases": named}


def check_templates(model: DictConfig, adapters: Iterable[str | Path], reward: bool = False) -> None:
    """Refuse adapters whose run had another `model.chat_template_kwargs`: what a run was trained with is what it is
    measured with.

    Args:
        reward: they score conversations; how a prompt ends is nothing to them.

    Raises:
        Refusal: what they were trained on would not be rendered alike.
    """
    for adapter in adapters:
        if said := _told_otherwise(model, adapter, reward):
            raise Refusal(
                f"{folder_of(adapter)}: was trained with {said}. Give that, to measure it as it was trained."
            )


def check_rewards(model: DictConfig, rewards: Sequence[ModelRef]) -> None:
    """`check_named_bases` of adapters; `check_templates` of those that read what the policy says with its tokenizer,
    adapters on its base."""
    check_named_bases(model, [each.adapter for each in rewards if each.named_base])
    check_templates(model, [each.adapter for each in rewards if each.base == model.id], reward=True)


def _told_otherwise(model: DictConfig, adapter: str | Path, reward: bool = False) -> str:
    """What an adapter's run has set in `model.chat_template_kwargs` and the model has not, as overrides; "" where that
    changes no rendering."""
    theirs, ours = trained_with(adapter), template_kwargs(model)
    if theirs is None or theirs == ours:
        return ""
    tokenizer, theirs = load_tokenizer(model), {**dict.fromkeys(ours), **theirs}
    if template.alike(tokenizer, template.bind(tokenizer, theirs, _where(model)), prompts=not reward):
        return ""
    other = {key: value for key, value in theirs.items() if value != ours.get(key)}
    return " ".join(f"{_where(model)}.{key}={json.dumps(value)}" for key, value in other.items())


def computes_in_bf16() -> bool:
    """Whether the device that will be used has bfloat16 arithmetic of its own."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_tokenizer(model: DictConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer with a padding token; its chat template is told `model.chat_template_kwargs`.

    Raises:
        Refusal: the model cannot be found or fetched; its tokenizer has no chat template, no padding token or not
            that one; or the template does not read what it is told.
    """
    from transformers import AutoTokenizer

    tokenizer = model_files.read(model, AutoTokenizer.from_pretrained)
    where = f"{'judge' if 'kind' in model else 'model'}.pad_token"
    if model.pad_token and model.pad_token not in tokenizer.get_vocab():
        own = tokenizer.pad_token or tokenizer.eos_token
        raise Refusal(
            f"{where}={model.pad_token}: is no token of {model.path or model.id}, which pads with {own}. Add "
            f"{where}=null."
        )
    if model.pad_token:
        tokenizer.pad_token = model.pad_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise Refusal(
            f"{where}=null: the tokenizer of {model.path or model.id} has neither a padding nor an EOS token, and no "
            "batch can be made without one. Name a token of its vocabulary that no text has."
        )
    count = getattr(model_files.load_config(model), "vocab_size", None)
    if count and tokenizer.pad_token_id >= count:
        raise Refusal(
            f"{where}={tokenizer.pad_token}: is token {tokenizer.pad_token_id} of the tokenizer of "
            f"{model.path or model.id}, whose model has {count}, from 0 on. Name one that the model has."
        )
    if tokenizer.chat_template is None:
        raise Refusal(f"model.id={model.id}: its tokenizer has no chat template. Choose an instruction-tuned model.")
    _pads[_of_tokenizer(model)] = tokenizer.pad_token_id
    return template.bind(tokenizer, template_kwargs(model), _where(model))


def _pad_id(model: DictConfig) -> int:
    """That of `load_tokenizer`, which nobody may have called yet."""
    return _pads[key] if (key := _of_tokenizer(model)) in _pads else load_tokenizer(model).pad_token_id


def _of_tokenizer(model: DictConfig) -> tuple[str | None, ...]:
    """What tells the tokenizers of models apart."""
    path = model_files.folder_or_id(model)
    return str(Path(path).resolve()) if Path(path).is_dir() else path, model.revision, model.pad_token


def _where(model: DictConfig) -> str:
    """The key of what the chat template is told; a judge that is another model has a node of its own."""
    return f"{'judge' if 'kind' in model else 'model'}.chat_template_kwargs"


def template_kwargs(model: DictConfig) -> dict:
    """What the chat template is told beside the messages, as plain containers."""
    node = model.get("chat_template_kwargs")
    return OmegaConf.to_container(node, resolve=True) if node else {}


def tokenizer_in(folder: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model that is no `model`: of a reward model, of what was published."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return template.dated(tokenizer) if tokenizer.chat_template else tokenizer


def pad_id_beside(adapter: Path, otherwise: int | None) -> int | None:
    """The padding token of the tokenizer that lies beside an adapter: with which it was trained, and so what a reward
    model does not read.

    Args:
        otherwise: that of the base, where none lies there.
    """
    from transformers import AutoTokenizer

    if not (Path(adapter) / "tokenizer_config.json").is_file():
        return otherwise
    own = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False).pad_token_id
    return otherwise if own is None else own


def load_policy(
    model: DictConfig, quantization: DictConfig, lora: DictConfig, parent: ModelRef | None
) -> tuple["PreTrainedModel | PeftModel", "LoraConfig | None"]:
    """The causal language model to train, and the LoRA that the trainer shall add to it.

    Args:
        parent: what `model.adapter` names; the model then carries that adapter as "default", trainable, and the
            second value is None: TRL keeps a frozen copy of it as the reference.
    """
    from transformers import AutoModelForCausalLM

    base = load_base(model, quantization, AutoModelForCausalLM)
    if parent:
        return continue_adapter(base, parent), None
    return base, config.build(lora, "lora", task_type="CAUSAL_LM")


def load_reward_model(
    model: DictConfig, quantization: DictConfig, lora: DictConfig, parent: ModelRef | None
) -> tuple["PreTrainedModel | PeftModel", "LoraConfig | None"]:
    """A sequence classifier with one output, r(x, y), read at the last token; see `load_policy` for the pair.

    Args:
        parent: what `model.adapter` names; its LoRA starts from that policy's (InstructGPT starts its reward model
            from SFT, arXiv:2203.02155, section 3.5); the score head is new unless the adapter brings one.
    """
    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = load_base(model, quantization, AutoModelForSequenceClassification, num_labels=1)
    base.score.register_forward_pre_hook(_in_its_precision)
    # SEQ_CLS trains and saves the score head; under another task type it stays as random as it was made.
    peft_config = config.build(lora, "lora", task_type="SEQ_CLS")
    if not parent:
        return base, peft_config
    if parent.task_type == peft_config.task_type:
        return continue_adapter(base, parent), None
    continued = PeftConfig.from_pretrained(parent.adapter)
    continued.task_type, continued.inference_mode = peft_config.task_type, False
    continued.base_model_name_or_path = base.name_or_path
    reward_model = get_peft_model(base, continued)
    read_adapter(reward_model, parent)
    return reward_model, None


def _in_its_precision(head, inputs: tuple) -> tuple:
    """A score head is trained in float32, beside a base in 16 bits, where nothing casts on a processor without
    bfloat16 arithmetic."""
    return tuple(each.to(head.weight.dtype) for each in inputs)


def load_base(model: DictConfig, quantization: DictConfig, auto_class: type, **kwargs) -> "PreTrainedModel":
    """The frozen base in the asked quantization, on the device that is there.

    The jobs of a sweep on a CPU read and quantize it once; each gets a copy.
    """
    import torch

    if config.in_sweep() and not torch.cuda.is_available():
        node = {"model": {**model, "adapter": None}, "quantization": {**quantization}, **kwargs}
        key = (auto_class, json.dumps(OmegaConf.to_container(OmegaConf.create(node)), sort_keys=True))
        if key not in _bases:
            if len(_bases) > 1:  # a policy and a reward model
                _bases.pop(next(iter(_bases)))
            _bases[key] = _load_base(model, quantization, auto_class, **kwargs)
        return copy.deepcopy(_bases[key])
    return _load_base(model, quantization, auto_class, **kwargs)


def load_frozen(model: DictConfig, quantization: DictConfig, auto_class: type, **kwargs) -> "PreTrainedModel":
    """`load_base` for what is only read. A CPU with room for it unpacks 4-bit weights once, not in every pass, to the
    very numbers that they stand for in the compute dtype."""
    base = load_base(model, quantization, auto_class, **kwargs)
    size = base.num_parameters() * base.dtype.itemsize
    if getattr(base, "is_loaded_in_4bit", False) and base.device.type == "cpu" and 2 * size < memory.free():
        base = base.dequantize()
    return base


def _load_base(model: DictConfig, quantization: DictConfig, auto_class: type, **kwargs) -> "PreTrainedModel":
    import torch
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if sharding.is_on():
        kwargs["device_map"] = {"": "cpu"}
    elif torch.cuda.is_available():
        # A task of Slurm's may see its own device alone.
        kwargs["device_map"] = {"": ranks.local_rank() % torch.cuda.device_count()}
    if model.attn_implementation:
        kwargs["attn_implementation"] = model.attn_implementation
    model_files.load_config(model)  # refuses what its config.json would run
    dtype = compute_dtype(model)
    quantization_config = build_quantization(quantization, dtype)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    kwargs["dtype"] = dtype
    with sharding.quantized_on_card():
        # a score head is trained, or comes with an adapter
        base = model_files.read_weights(model, auto_class, HEADS if kwargs.get("num_labels") == 1 else (), **kwargs)
    memory.keep_freed_memory()  # of steps; what the loading has freed goes back
    base.config.get_text_config().pad_token_id = _pad_id(model)
    if kwargs.get("num_labels") == 1 and not hasattr(base, "score"):
        raise Refusal(
            f"model.id={model.id}: transformers gives {base.config.model_type} no score head that reads the last "
            "token. Choose another model."
        )
    if kwargs.get("num_labels") == 1 and base.score.weight.dtype != torch.float32:
        base.score.float()  # trained in full: rounded to bfloat16 it would not move at a usual learning rate
    keep_gradients_on_cpu(base)
    base.public_id = model.id  # what adapters say they belong to, wherever these weights were read from
    return base


def build_quantization(node: DictConfig, dtype):
    """transformers.BitsAndBytesConfig of `quantization`, or None for `quantization=none`."""
    if "_target_" not in node:
        return None
    # Score and language-model heads stay in full precision: one is trained, the other is the largest source of error.
    derived = {"llm_int8_skip_modules": ["lm_head", "score"]}
    if node.get("load_in_4bit"):
        derived["bnb_4bit_compute_dtype"] = dtype
    return config.build(node, "quantization", **derived)


def compute_dtype(model: DictConfig):
    """torch dtype of weights and computation; `auto` is bfloat16 where the hardware computes in it, else float16 on a
    GPU, whose trainers scale their losses then, and float32 on a CPU."""
    import torch

    if model.dtype == "auto":
        if computes_in_bf16():
            return torch.bfloat16
        return torch.float16 if torch.cuda.is_available() else torch.float32
    dtype = getattr(torch, model.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise Refusal(f"model.dtype={model.dtype}: not a torch dtype. Use auto, bfloat16, float16 or float32.")
    return dtype


def keep_gradients_on_cpu(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU.

    After an eval-mode forward without gradients on a processor with AVX512-BF16, `Linear4bit` repacks its weights
    for a kernel that has no backward: the LoRA of the layers before it (q, k, v, gate, up) gets no gradient, the
    rest gets the residual stream's alone, and the loss stays plausible (bitsandbytes 0.50).
    """
    if model.device.type != "cpu":
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_adapter_in_float32(trainer, parent: ModelRef | None) -> None:
    """Undo TRL's rounding of QLoRA adapters to bfloat16.

    bfloat16 has 8 bits of mantissa: a weight of 0.01 cannot move by less than 3e-5, while Adam's steps at DPO's
    learning rates are 5e-6. Computation stays in bfloat16 (autocast); only the master weights are float32.

    Args:
        trainer: as made, before it trains.
        parent: what `model.adapter` names; its weights are read again, or the policy would start beside its reference.
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if trainer.args.bf16:
        compute_lora_in_bfloat16(trainer.model)
    if parent:
        read_adapter(trainer.model, parent)


def compute_lora_in_bfloat16(model) -> None:
    """Under autocast alone: PEFT would cast the input of each LoRA layer to float32, and autocast cast it back."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False


def put_on(
    model: "PreTrainedModel | PeftModel", adapter: str | Path, where: str, name: str = "default", train: bool = False
) -> "PeftModel":
    """The model with an adapter on it, all of whose weights are where their names say.

    Args:
        where: its key and value, or its folder.
        train: whether its weights are to be trained.

    Raises:
        Refusal: some have no place in this model, or are lacking: PEFT leaves out the ones, and the others as a new
            adapter has them, and so, at worst, the base as it is.
    """
    from peft import PeftModel

    adapter, given = str(adapter), {"adapter_name": name, "is_trainable": train}
    with _in_one_line(where):
        if not isinstance(model, PeftModel):
            model = PeftModel.from_pretrained(model, adapter, **given)  # which tells nobody what it left out
        loaded = model.load_adapter(adapter, **given)
    lacks = [key for key in loaded.missing_keys if name in key.split(".")]
    extra, lacks = ([key.replace(f".{name}", "") for key in keys] for keys in (loaded.unexpected_keys, lacks))
    _refuse_names(where, extra, lacks)
    return model


@contextmanager
def _in_one_line(where: str):
    """What PEFT raises where an adapter does not fit."""
    try:
        yield
    except KeyError as error:
        if not str(error.args[0]).startswith("base_model."):
            raise
        _refuse_names(where, lacks=[error.args[0]])
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise Refusal(f"{where}: {first_line(error)} {OF_ANOTHER}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise Refusal(f"{where}: has weights of other sizes than this model takes. {OF_ANOTHER}") from error


def _refuse_names(where: str, extra: Iterable[str] = (), lacks: Iterable[str] = ()) -> None:
    for name in sorted(extra):
        raise Refusal(f"{where}: {line(name)} has no place in this model. {OF_ANOTHER}")
    for name in sorted(lacks):
        raise Refusal(f"{where}: has no {line(name)}, which this model takes. {OF_ANOTHER}")


def continue_adapter(base: "PreTrainedModel", parent: ModelRef) -> "PeftModel":
    """The base with a run's LoRA on it, trainable under the name that TRL expects ("default")."""
    policy = put_on(base, parent.adapter, f"{parent.key}={parent.reference}", train=True)
    # Under the public name PEFT asks the hub for its config at every checkpoint, whether or not there is a network.
    policy.peft_config["default"].base_model_name_or_path = base.name_or_path
    return policy


def read_adapter(model: "PeftModel", parent: ModelRef) -> None:
    """Put a run's saved weights into the adapter "default"; what the run does not bring, a score head, stays.

    Raises:
        Refusal: the run brings weights that this model has no place for, or lacks some of its LoRA.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(parent.adapter), device="cpu")
    present = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    lacks = [name for name in present.keys() - weights.keys() if ".lora_" in name]
    where = f"{parent.key}={parent.reference}"
    _refuse_names(where, weights.keys() - present.keys(), lacks)
    with _in_one_line(where):
        set_peft_model_state_dict(model, {**present, **weights}, adapter_name="default")


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, base: DictConfig) -> None:
    """Write the trained adapter alone, under the base model's public name, so that it loads on any machine.

    Of several processes the first writes, and all wait for it.
    """
    state = sharding.trained_state(model)  # of all
    ranks.by_first(_save_adapter, model, state, tokenizer, folder, base)


def _save_adapter(model: "PeftModel", state: dict | None, tokenizer, folder: Path, base: DictConfig) -> None:
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the run folder has the real one
    path = folder / "adapter_config.json"
    adapter_config = json.loads(path.read_text())
    adapter_config |= {"base_model_name_or_path": base.id, "revision": base.revision}
    path.write_text(json.dumps(adapter_config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    template.keep(tokenizer, folder)


def prove_reload(model: "PeftModel", folder: Path, score) -> None:
    """Load the saved adapter, score head included, beside the trained one: both must score alike, bit for bit.

    Beside a model in parts nothing can be loaded: there every tensor must be alike.

    Args:
        score: returns scores of a held-out batch under the active adapter.

    Raises:
        RuntimeError: they differ, so what was saved is not what was trained.
    """
    if state := sharding.trained_state(model):
        same = ranks.by_first(_holds, folder, model, state)
    else:
        trained = score()
        model.load_adapter(str(folder), adapter_name="reloaded")
        model.set_adapter("reloaded")
        same = score() == trained
        model.set_adapter("default")
        model.delete_adapter("reloaded")
    if not same:
        raise RuntimeError(
            f"{folder}: the saved reward model scores a held-out batch differently from the trained one."
        )


def _holds(folder: Path, model: "PeftModel", state: dict) -> bool:
    """Whether a saved adapter is the trained weights, and nothing else."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    trained = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    saved = load_peft_weights(str(folder), device="cpu")
    return saved.keys() == trained.keys() and all(saved[name].equal(trained[name]) for name in saved)
