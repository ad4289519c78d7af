"""Small random models of six families: each with its architecture, special tokens, stop tokens and chat template.

What differs between families and matters to a recipe is that of the real ones; the templates say it in few words.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

CLINIC = Path(__file__).parents[1] / "rlhf_recipes" / "assets" / "clinic" / "pairs.jsonl"
VOCABULARY = 600  # byte-level: 256 characters, the special tokens, and what is left as merges
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Alternation, which is also why the first turn cannot be a system's.
ALTERNATE = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """What of a family a recipe meets.

    Attributes:
        config: the class of its config.
        special: its special tokens, in the order of their ids.
        template: its chat template.
        bos, eos, pad: of the tokenizer; None: it has none.
        stops: `eos_token_id` of its generation_config.json, as tokens.
        begins: whether the tokenizer puts BOS before a text.
        tags: tokens of their own that are not special.
        settings: arguments of the config beside the sizes.
        generation: what else its generation_config.json says.
    """

    config: str
    special: tuple[str, ...]
    template: str
    eos: str
    stops: tuple[str, ...]
    bos: str | None = None
    pad: str | None = None
    begins: bool = False
    tags: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    generation: dict = field(default_factory=dict)


FAMILIES = {
    # Every conversation opens with a system turn that dates it. It pads with EOS, which ends turns, having no other.
    "llama3": Family(
        config="LlamaConfig",
        special=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        template=(
            "{% set day = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
            "{% set own = messages[0].role == 'system' %}{% set turns = messages[1:] if own else messages %}"
            "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' }}"
            "{{ (messages[0].content | trim if own else '') + '<|eot_id|>' }}"
            "{% for m in turns %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
            "{{ '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        begins=True,
        settings={"tie_word_embeddings": True, "eos_token_id": [1, 5, 6]},
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    # The last answer opens with a block of thoughts, empty where there are none; the prompt does so where thinking is
    # turned off.
    "qwen3": Family(
        config="Qwen3Config",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=(
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
            "{% set parts = m.content.split('</think>') if m.role == 'assistant' else [m.content] %}"
            "{% if m.role == 'assistant' and loop.last %}"
            "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') }}"
            "{{ '\n</think>\n\n' }}{% endif %}"
            "{{ (parts[-1].lstrip('\n') if parts | length > 1 else m.content) + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
            "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
            "{% endif %}"
        ),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        tags=("<think>", "</think>"),
        settings={"tie_word_embeddings": True},
        generation={"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05},
    ),
    # No system turn: what it says opens the first user turn. A turn ends with a token that is not the tokenizer's EOS.
    "gemma3": Family(
        config="Gemma3TextConfig",
        special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        template=(
            "{% set own = messages[0].role == 'system' %}{% set turns = messages[1:] if own else messages %}"
            + ALTERNATE
            + "{{ bos_token }}{% for m in turns %}"
            "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
            "{{ messages[0].content + '\n\n' if own and loop.first else '' }}"
            "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        stops=("<eos>", "<end_of_turn>"),
        begins=True,
        settings={
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "head_dim": 8,
            "eos_token_id": [1, 5],
        },
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
    # User and assistant take turns, and no system does; no generation prompt; an answer ends with EOS, which is also
    # what is set as padding.
    "mistral": Family(
        config="MistralConfig",
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        template=(
            "{% set turns = messages %}" + ALTERNATE + "{{ bos_token }}{% for m in messages %}"
            "{{ '[INST] ' + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content | trim + eos_token }}"
            "{% endfor %}"
        ),
        bos="<s>",
        eos="</s>",
        stops=("</s>",),
        begins=True,
        settings={"sliding_window": None},
    ),
    # A conversation that is over ends with EOS behind the end of its turn; the tokenizer pads with EOS.
    "phi3": Family(
        config="Phi3Config",
        special=("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        template=(
            "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
            "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
        ),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
        settings={"sliding_window": None},
    ),
    # A system turn is added where there is none; padding is EOS, behind which turns have a line break.
    "smollm2": Family(
        config="LlamaConfig",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=(
            "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
            + CHATML
        ),
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",
        stops=("<|im_end|>",),
        settings={"tie_word_embeddings": True},
    ),
}


def family(name, folder):
    """Write config, weights and tokenizer of a small random model of the family; always the same.

    Returns:
        The folder.
    """
    import torch
    import transformers

    own, folder = FAMILIES[name], Path(folder)
    tokenizer = _tokenizer(own)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in _named(own).items()}
    config = getattr(transformers, own.config)(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.2,  # as initialised by default, so narrow a model repeats its last token
        **{f"{key}_token_id": ids.get(key) for key in ("bos", "eos", "pad")} | own.settings,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for token in own.tags:  # of logit 0: it does not think aloud
            model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = {"eos_token_id": tokenizer.convert_tokens_to_ids(list(own.stops)), **own.generation}
    (folder / "generation_config.json").write_text(json.dumps(written))
    return folder


def _named(own):
    return {key: token for key in ("bos", "eos", "pad") if (token := getattr(own, key))}


def _tokenizer(own):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(own.tags),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in own.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CLINIC.read_text(encoding="utf-8").splitlines(), trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in own.tags])
    if own.begins:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{own.bos} $A", pair=f"{own.bos} $A $B", special_tokens=[(own.bos, bpe.token_to_id(own.bos))]
        )
    named = {f"{key}_token": token for key, token in _named(own).items()}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=own.template, **named)
