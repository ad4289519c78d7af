"""What chat templates are told: every rendering is told the same, whoever asks for it, and on whatever day."""

import ast
import json
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY_ID, write_adapter
from omegaconf import OmegaConf

from rlhf_recipes import models, references, run, run_folder
from rlhf_recipes.audit import run_audit
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.data.load import LOADERS
from rlhf_recipes.data.template import as_taken, bind, dated, folded, keep
from rlhf_recipes.errors import Refusal
from rlhf_recipes.inference import encode
from rlhf_recipes.launch import keys
from rlhf_recipes.publish import card

TURNS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<eot>' }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
PLAIN = TURNS + BEGIN
# An answer has an empty thought before it; the generation prompt has one where the model is told not to think.
THINKING = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think></think>' }}{% endif %}{{ m['content'] + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ '(' + date_string + ')' }}" + PLAIN
)
CLOCK = '{{ strftime_now("%Y-%m-%d") }}' + PLAIN
# A system turn is refused, or left out; roles must alternate.
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)
SILENT = "{% for m in messages if m['role'] != 'system' %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
ASKED = [{"role": "user", "content": "hi"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERED = [{"role": "assistant", "content": "yes"}]


def tokenizer_of(template):
    """Single bytes, with the template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<eot>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, pad_token="<pad>", eos_token="<eot>", unk_token="<pad>"
    )


def asked(tokenizer, turns=ASKED):
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


@pytest.fixture
def saved(tmp_path):
    """saved(template): overrides for a model of which only a tokenizer is there."""

    def made(template):
        tokenizer_of(template).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
        return [f"model.path={tmp_path / 'model'}", f"model.id={TINY_ID}", "model.pad_token=null"]

    return made


RENDERED = {
    "nothing": (PLAIN, {}, "[user]hi<eot>[assistant]"),
    "no thoughts": (THINKING, {"enable_thinking": False}, "[user]hi<eot>[assistant]<think></think>"),
    "thoughts": (THINKING, {"enable_thinking": True}, "[user]hi<eot>[assistant]"),
    "left to it": (THINKING, {"enable_thinking": None}, "[user]hi<eot>[assistant]"),
    "today": (DATED, {}, "(26 Jul 2024)[user]hi<eot>[assistant]"),
    "a day": (DATED, {"date_string": "1 May 2025"}, "(1 May 2025)[user]hi<eot>[assistant]"),
    "clock": (CLOCK, {}, "2024-07-26[user]hi<eot>[assistant]"),
    "a list": ("{{ names|join('+') }}" + PLAIN, {"names": ["a", '"b']}, 'a+"b[user]hi<eot>[assistant]'),
}


@pytest.mark.parametrize("case", RENDERED)
def test_a_template_is_told_in_every_rendering_and_from_what_is_saved(case, tmp_path):
    from transformers import PreTrainedTokenizerFast

    template, told, expected = RENDERED[case]
    given = tokenizer_of(template)
    before = None if "strftime_now" in template else asked(given)
    bound = bind(given, told)
    assert asked(bound) == asked(bind(bound, told)) == expected
    bound.save_pretrained(tmp_path)
    keep(bound, tmp_path)
    there = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert asked(there) == asked(dated(there)) == expected
    assert asked(there, [*ASKED, *ANSWERED]) == asked(bound, [*ASKED, *ANSWERED])
    assert before in (None, asked(given))  # whose tokenizer it is keeps it as it was
    if told.get("enable_thinking") is False:
        assert there.apply_chat_template(ASKED, tokenize=False, enable_thinking=True) == "[user]hi<eot>"


def test_what_is_not_said_is_told(capsys):
    for template in (PLAIN, THINKING, DATED, CLOCK):
        bind(tokenizer_of(template), {})
    bind(tokenizer_of(THINKING), {"enable_thinking": None})
    bind(tokenizer_of(DATED), {"date_string": "1 May 2025"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) <= 3  # once a process
    assert all("enable_thinking=false" in line or "26 Jul 2024 in place of today" in line for line in lines)


REFUSED = {
    "enable_thinkin": (THINKING, "no such name; did you mean 'enable_thinking'? It reads enable_thinking. Leave it"),
    "thinking": (PLAIN, "no such name. Leave it out: model.chat_template_kwargs.thinking=null."),
    "content": (PLAIN, "no such name."),
    "messages": (PLAIN, "is given to every template"),
    "tools": (PLAIN, "is given to every template"),
    "tokenize": (PLAIN, "is given to every template"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_template_does_not_read_is_refused(key, saved, compose):
    template, told = REFUSED[key]
    with pytest.raises(Refusal) as raised:
        models.load_tokenizer(compose("dpo", *saved(template), f"model.chat_template_kwargs.{key}=1").model)
    assert str(raised.value).startswith(f"model.chat_template_kwargs.{key}: ") and told in str(raised.value)


def test_a_tokenizer_without_padding_is_refused_in_one_line(compose, saved, tmp_path):
    overrides = saved(PLAIN)
    path = tmp_path / "model" / "tokenizer_config.json"
    told = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("pad_token", "eos_token")}
    path.write_text(json.dumps(told))
    with pytest.raises(Refusal, match=r"^model.pad_token=null: the tokenizer of .* has neither a padding nor an EOS"):
        models.load_tokenizer(compose("dpo", *overrides).model)


def test_tags_that_only_trainers_know_are_no_obstacle():
    template = THINKING.replace("{{ m['content']", "{% generation %}{{ m['content']").replace(
        "'<eot>' }}", "'<eot>' }}{%- endgeneration -%}"
    )
    assert asked(bind(tokenizer_of(template), {"enable_thinking": False})).endswith("<think></think>")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "dpo", "reward", "orpo", "simpo", "kto", "ppo"])
def test_what_is_trained_begins_as_what_is_sampled(recipe, compose, saved, tmp_path):
    """Token by token: the prompt that is sampled from opens the trained row, and only the answer is trained."""
    from rlhf_recipes import methods
    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.labelled import micro_batches
    from rlhf_recipes.launch.preflight import rows

    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = ["data=local", f"data.path={path}", "data.test_size=2", "trainer.per_device_train_batch_size=2"]
    few += ["trainer.gradient_accumulation_steps=1", *(["reward_funcs=json:loads"] if recipe == "ppo" else [])]
    cfg = compose(recipe, *saved(THINKING), "model.chat_template_kwargs.enable_thinking=false", *few)
    args = models.training_args(cfg.trainer, run.Run(tmp_path / recipe, recipe, {}))
    tokenizer = models.load_tokenizer(cfg.model)
    splits = fit(LOADERS[methods.of(recipe).rows](cfg.data), tokenizer, None)
    assert splits.report["prompt_cut"] == 0
    splits = micro_batches(splits, args) if recipe == "kto" else splits
    trainer = rows._trainer(recipe, args, splits, tokenizer, str(tmp_path / "made"))
    ids, trained = rows._first(next(iter(trainer.get_train_dataloader())), trainer)
    prompt, _ = encode(tokenizer, splits.train[0]["prompt"], None)
    assert tokenizer.decode(prompt).endswith("[assistant]<think></think>")
    assert ids[: len(prompt)] == prompt
    if recipe not in ("reward", "ppo"):
        assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt)) and len(ids) > len(prompt)


def test_no_call_goes_round_the_one_that_is_told():
    """`render` alone asks for a rendering, and every tokenizer that is loaded is told."""
    names, found = ("apply_chat_template", "AutoTokenizer"), set()
    for path in [*(ROOT / "rlhf_recipes").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if any(name in text for name in names) else ():
            named = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if named in names:
                found.add((named, path.name))
    # `embedded` unpacks a tokenizer; of lm_eval a setting is called so.
    assert found == {
        ("apply_chat_template", "template.py"),
        ("apply_chat_template", "tasks.py"),
        ("AutoTokenizer", "models.py"),
        ("AutoTokenizer", "embedded.py"),
    }


TOLD = {"qwen3_0_6b": {"enable_thinking": False}, "qwen3_4b": {"enable_thinking": False}}
TOLD |= {"qwen3_8b": {"enable_thinking": False}, "llama3_1_8b": {"date_string": "26 Jul 2024"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")))
def test_the_files_of_models_say_what_their_template_is_told(name, compose):
    cfg = compose("cai", f"model={name}")
    keys.check(cfg, "cai")
    assert models.template_kwargs(cfg.model) == models.template_kwargs(cfg.judge) == TOLD.get(name, {})


def test_a_run_that_tells_nothing_computes_what_it_did(compose):
    config = run.resolved(compose("dpo"))
    del (before := json.loads(json.dumps(config)))["model"]["chat_template_kwargs"]
    told = run.resolved(compose("dpo", "model.chat_template_kwargs.enable_thinking=false"))
    assert config_sha256(config) == config_sha256(before) != config_sha256(told)


@pytest.mark.parametrize("recipe", ["dpo", "reward"])
def test_the_snippet_of_a_card_tells_it_too(recipe):
    told = {"enable_thinking": False, "date_string": None, "a=exit()": "b"}
    config = {"model": {"chat_template_kwargs": told}, "quantization": {}}
    base = {"id": "org/base", "revision": None}
    facts = SimpleNamespace(repo_id="me/mine", dtype="float32", merged=False, base=base)
    calls = [
        {option.arg: ast.unparse(option.value) for option in node.keywords}
        for node in ast.walk(ast.parse(card.snippet(SimpleNamespace(recipe=recipe, config=config), facts)))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "apply_chat_template"
    ]
    assert [call.get("enable_thinking") for call in calls] == ["False"]
    assert set(calls[0]) <= {"enable_thinking", "add_generation_prompt", "return_tensors", "return_dict"}


# ---- runs that were told otherwise


@pytest.fixture
def trained(tmp_path):
    """trained(told): the adapter folder of a run; None: of a run from before the key."""

    def made(told, adapter="adapter"):
        model = {"id": TINY_ID} | ({} if told is None else {"chat_template_kwargs": told})
        run_folder.mark(tmp_path / "run", "dpo", OmegaConf.to_yaml({"model": model}))
        return tmp_path / "run" / adapter

    return made


@pytest.mark.parametrize(
    ("told", "reward", "refused"),
    [
        ({"enable_thinking": False}, False, None),
        ({"enable_thinking": True}, False, "enable_thinking=true"),
        (None, False, "enable_thinking=null"),
        (None, True, None),  # a whole conversation is the same
    ],
)
def test_what_a_run_was_trained_with_is_what_it_is_measured_with(told, reward, refused, trained, saved, compose):
    cfg = compose("evaluate", *saved(THINKING), "model.chat_template_kwargs.enable_thinking=false")
    for adapter in (trained(told), trained(told, "checkpoints/checkpoint-2")):
        if refused is None:
            models.check_templates(cfg.model, [adapter], reward)
        else:
            with pytest.raises(Refusal, match=f"was trained with model.chat_template_kwargs.{refused}. Give that"):
                models.check_templates(cfg.model, [adapter], reward)


def test_what_answers_for_an_audit_was_trained_so(trained, saved, compose, tmp_path):
    for name in ("run", "reward"):
        write_adapter(tmp_path / name, recipe="reward" if name == "reward" else "dpo", parent=None)
    given = [f"reward_model={tmp_path / 'reward'}", f"model.adapter={tmp_path / 'run'}"]
    cfg = compose("audit", *saved(THINKING), *given, "model.chat_template_kwargs.enable_thinking=false")
    trained({"enable_thinking": False})
    run_audit.find(cfg)
    trained({"enable_thinking": True})
    with pytest.raises(Refusal, match=r"run: was trained with model\.chat_template_kwargs\.enable_thinking=true"):
        run_audit.find(cfg)


def test_an_adapter_from_elsewhere_tells_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {chat_template_kwargs: {a: 1}}\n")
    assert references.trained_with(tmp_path) is None


# ---- system turns


@pytest.mark.parametrize(
    ("template", "takes_it"), [(PLAIN, True), (NO_SYSTEM, False), (SILENT, False)], ids=["takes", "refuses", "drops"]
)
def test_a_system_text_is_folded_where_the_template_takes_none(template, takes_it):
    tokenizer = tokenizer_of(template)
    shots = [*ASKED, *ANSWERED, {"role": "user", "content": "and now?"}]
    messages = as_taken(tokenizer, [SYSTEM, *shots])
    assert messages == ([SYSTEM, *shots] if takes_it else [{"role": "user", "content": "Be brief.\n\nhi"}, *shots[1:]])
    assert "Be brief." in asked(tokenizer, messages)  # and roles alternate, or it would be refused
    assert as_taken(tokenizer, shots) is shots


def test_a_system_text_without_a_user_turn_behind_it_is_one():
    assert folded([SYSTEM]) == [{"role": "user", "content": "Be brief."}]
    assert folded([SYSTEM, *ANSWERED]) == [{"role": "user", "content": "Be brief."}, *ANSWERED]
