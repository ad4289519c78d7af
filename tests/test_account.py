"""What a trainer holds is what was counted, under templates of several families; and what a template leaves out."""

import contextlib
import json
from pathlib import Path

import pytest
from conftest import CHATML, ROOT, skip_without

from rlhf_recipes import inference, methods, models
from rlhf_recipes.data.fit import describe, fit
from rlhf_recipes.data.labelled import micro_batches
from rlhf_recipes.data.load import LOADERS, Splits
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch.preflight import rows as preflight_rows
from rlhf_recipes.methods import METHODS
from rlhf_recipes.run import Run
from rlhf_recipes.training import account

LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim "
    "+ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
)
OPENS_THOUGHT = CHATML.replace(
    "<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
ENDS = {CHATML: "<|im_end|>\n", LLAMA: "<|end|>", GEMMA: "</turn>\n", ENDLESS: "", OPENS_THOUGHT: "<|im_end|>\n"}
LIMIT = 110
LENGTHS = [(20, 20), (20, 800), (800, 20), (20, 30)]  # characters of prompt and answer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """As the trainers get them: some to keep, some answers to cut, some prompts that leave no room for one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for number in range(40):
        prompt, answer = LENGTHS[number % 4]
        said = {"prompt": "ask ", "chosen": "yes ", "rejected": "no "}
        sizes = {"prompt": prompt, "chosen": answer, "rejected": answer // 2}
        lines.append({side: f"{number} " + (word * sizes[side])[: sizes[side]].strip() for side, word in said.items()})
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


@pytest.fixture
def made(compose, libraries, tiny_model_overrides, pairs, tmp_path):
    """made(recipe, template, *overrides): (the trainer as preflight makes it, the fitted rows, the tokenizer)."""

    def make(recipe, template, *overrides):
        keys = ["data=local", f"data.path={pairs}", "data.test_size=8", "data.too_long=truncate"]
        samples = METHODS[recipe].samples
        length = "max_prompt_length" if samples else "trainer.max_length"
        small = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1"]
        needed = ["reward_funcs=[x]"] if samples else []
        needed += ["trainer.num_generations=2"] if recipe == "rloo" else []
        cfg = compose(recipe, *tiny_model_overrides, *keys, *small, *needed, f"{length}={LIMIT}", *overrides)
        args = models.training_args(cfg.trainer, Run(Path("x"), recipe, {}))
        tokenizer = models.load_tokenizer(cfg.model)
        tokenizer.chat_template = template
        limit = LIMIT if samples else args.max_length
        mode = getattr(args, "truncation_mode", "keep_start")
        splits = fit(LOADERS[METHODS[recipe].rows](cfg.data), tokenizer, limit, cfg.data.too_long, mode)
        splits = micro_batches(splits, args) if recipe == "kto" else splits
        trainer = preflight_rows._trainer(recipe, args, splits, tokenizer, str(tmp_path), cfg.trainer._target_)
        return trainer, splits, tokenizer

    return make


def kept(splits, count=1):
    """The rows that preflight's trainer has: all to train, `count` held out."""
    sizes = {"train": splits.sizes["train"], "test": splits.sizes["test"][:count]}
    return Splits(splits.train, splits.test[:count], splits.report, splits.source, sizes=sizes)


@pytest.mark.parametrize("recipe", METHODS)
def test_the_trainer_holds_what_was_counted(made, recipe):
    for template, end in ENDS.items():
        trainer, splits, tokenizer = made(recipe, template)
        answers = not METHODS[recipe].samples
        assert (splits.report["dropped"].get("no_answer_left", 0) > 0) == answers
        assert splits.report["over_length_truncated"] > 0
        account.check(trainer, kept(splits))
        text = preflight_rows._marked(
            tokenizer, *preflight_rows._first(next(iter(trainer.get_train_dataloader())), trainer)
        )
        row = next(row for row in splits.train if row["prompt"][0]["content"] in text)
        if answers:
            assert row == splits.train[0]
        if answers and recipe != "reward":
            said = (row.get("chosen") or row["completion"])[0]["content"]
            before, _, trained = text.removesuffix("⟧").partition("⟦")
            whole = splits.sizes["train"].longest[0] <= LIMIT
            assert said not in before and trained
            trained = trained.lstrip(" ")  # a blank that the prompt ends with is one token with what follows
            assert trained == said + end if whole else said.startswith(trained)
        trainer.train_dataset = trainer.train_dataset.select(range(1, len(trainer.train_dataset)))
        with pytest.raises(RuntimeError, match=r"^train rows: the trainer holds \d+ rows, \d+ were counted\.$"):
            account.check(trainer, kept(splits))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("dpo", ["trainer.truncation_mode=keep_end"]),
        ("sft", ["trainer.truncation_mode=keep_end"]),
        ("sft", ["trainer.packing=true"]),
        ("sft", ["trainer.packing=true", "trainer.packing_strategy=wrapped"]),
        ("sft", ["trainer.completion_only_loss=false"]),
        ("orpo", ["trainer.max_length=null"]),
        ("orpo", ["trainer._target_=trl.experimental.orpo.ORPOConfig", "trainer.max_length=null"]),
        ("simpo", ["trainer._target_=trl.experimental.cpo.CPOConfig"]),
        ("reward", ["trainer.max_length=null"]),
    ],
)
def test_settings_that_change_what_is_kept_are_counted_with(made, recipe, overrides):
    skip_without(next((each.partition("=")[2] for each in overrides if "_target_" in each), ""))
    trainer, splits, _ = made(recipe, CHATML, *overrides)
    account.check(trainer, kept(splits))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [(recipe, []) for recipe, method in METHODS.items() if not method.samples]
    + [("dpo", ["trainer.truncation_mode=keep_end"])],
)
def test_what_is_measured_is_cut_as_what_is_trained(made, monkeypatch, recipe, overrides):
    _, splits, tokenizer = made(recipe, CHATML, *overrides)
    rows, seen = splits.train, []

    def sums(model, pad_id, encoded, what):
        seen.extend(encoded)
        return [(0.0, len(ids) - start) for ids, start in encoded]

    if recipe == "reward":
        monkeypatch.setattr(inference, "_rows", lambda model, sequences: seen.extend((ids, 0) for ids in sequences))
        monkeypatch.setattr(inference, "measuring", contextlib.nullcontext)
        monkeypatch.setattr(inference, "_batches", lambda *_, **__: [])
        monkeypatch.setattr(inference, "_everyones", lambda results: [(0.0, None) for _ in results])
        inference.pair_rewards(None, tokenizer, rows, kept=splits.kept)
    else:
        measured = inference.demonstration_logps if "completion" in rows[0] else inference.pair_logps
        measured(None, tokenizer, rows, sums=sums, kept=splits.kept)
    mode = "keep_end" if overrides else "keep_start"
    assert (splits.sizes["train"].longest > LIMIT).any()
    held = splits.sizes["train"].cut(LIMIT, mode)
    assert [len(ids) for ids, _ in seen] == held.whole.flatten().tolist()
    if recipe != "reward":  # the first of all tokens is predicted by none
        trained = held.trained.clip(max=held.whole - 1).flatten().tolist()
        assert [len(ids) - start for ids, start in seen] == trained


@pytest.mark.parametrize("target", methods.TRLS_OWN)
def test_a_second_eos_is_found(made, monkeypatch, target):
    """TRL's own trainers of ORPO and CPO add it behind the line break of ChatML."""
    skip_without(target)
    recipe, _ = methods.TRLS_OWN[target]
    monkeypatch.setitem(methods.TRLS_OWN, target, (recipe, {"trainer": target.replace("Config", "Trainer")}))
    trainer, splits, _ = made(recipe, CHATML, f"trainer._target_={target}")
    with pytest.raises(RuntimeError, match=r"^train rows: the trainer holds \d+ (trained )?tokens, \d+ were counted"):
        account.check(trainer, kept(splits))


def test_the_recipe_uses_the_trainer_of_its_method():
    for method in METHODS.values():
        recipe = (ROOT / "recipes" / f"{method.name}.py").read_text(encoding="utf-8")
        looked_up = f'trainer_class("{method.name}", cfg.trainer._target_)(\n'
        has_another = method.name in {name for name, _ in methods.TRLS_OWN.values()}
        assert (looked_up if has_another else f"{method.trainer.rpartition('.')[2]}(\n") in recipe


# ---- What the template says

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system, please') }}{% endif %}" + CHATML
WITHOUT_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
WITHOUT_THOUGHTS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
SHOUTS = CHATML.replace("message['content']", "message['content'] | upper")
SYSTEM = {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why"}]}
THOUGHT = {"chosen": "<think>so</think>yes", "rejected": "<think>or</think>no"}
HALF_A_THOUGHT = {"chosen": "so</think>\nyes"}  # behind a generation prompt that opens it
DIALOGUE = {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"},
                       {"role": "user", "content": "d"}]}  # fmt: skip


def numbered(said, number):
    """Text, or the user turns of a conversation, that no other row has."""
    if isinstance(said, str):
        return f"{said} {number}"
    return [turn | {"content": f"{turn['content']} {number}"} if turn["role"] == "user" else turn for turn in said]


@pytest.fixture
def fitted(compose, tiny_model_overrides, tmp_path):
    """fitted(template, change, count): the fitted rows of 10, of which `count` are changed."""

    def fit_rows(template, change, count, text="auto"):
        path = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"ask {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(10)]
        for n, row in enumerate(rows[:count]):
            row |= {key: numbered(said, n) for key, said in change.items()}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = compose("dpo", *tiny_model_overrides, "data=local", f"data.path={path}", "data.test_size=0.3")
        tokenizer = models.load_tokenizer(cfg.model)
        tokenizer.chat_template = template
        splits = LOADERS["pairs"](cfg.data)
        splits.report["text"] = text
        return fit(splits, tokenizer, None)

    return fit_rows


@pytest.mark.parametrize(
    ("template", "change", "count", "said"),
    [
        (NO_SYSTEM, SYSTEM, 1, "dropped 1 template, e.g. rows.jsonl:1 (turn 1, system: No system, please)"),
        (WITHOUT_SYSTEM, SYSTEM, 2, "the template leaves out or rewrites the text in a prompt of 2 rows"),
        (WITHOUT_THOUGHTS, THOUGHT, 3, "the template leaves out or rewrites the thoughts in an answer of 3 rows"),
        (
            WITHOUT_THOUGHTS,
            HALF_A_THOUGHT,
            3,
            "the template leaves out or rewrites the thoughts in an answer of 3 rows",
        ),
        (OPENS_THOUGHT, {}, 0, "the template begins the answers of 10 rows otherwise than its generation prompt"),
        (CHATML, THOUGHT, 9, "dropped none; tokens"),
    ],
)
def test_what_a_template_does_to_rows_is_counted_and_said(fitted, template, change, count, said):
    assert said in describe(fitted(template, change, count).report)


@pytest.mark.parametrize(
    ("template", "change", "said"),
    [
        (
            NO_SYSTEM,
            SYSTEM,
            r"rows.jsonl: the model's chat template refuses 10 rows, e.g. rows.jsonl:\d+ \(turn 1, system: No s",
        ),
        (
            WITHOUT_SYSTEM,
            SYSTEM,
            "rows.jsonl: the chat template leaves out or rewrites the text in a prompt of 10 of 10",
        ),
        (
            WITHOUT_THOUGHTS,
            THOUGHT,
            "leaves out or rewrites the thoughts in an answer of 10 of 10 rows.*data.text=plain",
        ),
        (SHOUTS, {}, "leaves out or rewrites the text in an answer of 10 of 10 rows"),
    ],
)
def test_a_template_that_does_so_to_most_rows_is_refused(fitted, template, change, said):
    with pytest.raises(Refusal, match=said):
        fitted(template, change, 10)
    if "plain" in said:
        assert "thoughts in an answer of 10 rows" in describe(fitted(template, change, 10, text="plain").report)


def test_thoughts_of_earlier_turns_are_left_out_by_design(fitted):
    early = CHATML.replace(
        "message['content']", "(message['content'] if loop.last else message['content'].split('>')[-1])"
    )
    assert "the thoughts in a prompt of 9 rows" in describe(fitted(early, DIALOGUE, 9).report)
