"""Six families of models through every recipe, two steps each: what is trained is what is measured is what is sampled,
token by token.
"""

import contextlib
import functools
import json
import shutil
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick
from families import FAMILIES, family

from rlhf_recipes.errors import Refusal

# The last three are held out, one of them a longer conversation.
PROMPTS = [[{"role": "user", "content": f"May I come on day {n}?"}] for n in range(7)]
PROMPTS[5] = [*PROMPTS[5], {"role": "assistant", "content": "Which hour?"}, {"role": "user", "content": "At 5."}]
ROWS = [
    {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": f"Yes, come at {n}."}],
        "rejected": [{"role": "assistant", "content": f"No. Not at {n}, and not later."}],
        "split": "train" if n < 4 else "test",
    }
    for n, prompt in enumerate(PROMPTS)
]
SIDES = ("chosen", "rejected")
DATA = ["data=local", "data.path=../pairs.jsonl"]
TRAINED = [*DATA, "trainer.max_steps=2", "trainer.per_device_train_batch_size=2",
           "trainer.gradient_accumulation_steps=1", "trainer.save_strategy=no"]  # fmt: skip
RECIPES = {
    **dict.fromkeys(("sft", "reward", "dpo", "orpo", "simpo", "kto"), TRAINED),
    "ppo": [*TRAINED, "reward_funcs=reward", "trainer.max_completion_length=4", "trainer.num_ppo_epochs=1"],
    "cai": [*DATA, "constitution=clinic", "gate.pairs=2", "gate.fails=contrastive", "generate.max_new_tokens=4",
            "generate.temperature=0.0", "sources=[revision]", "revise.max_new_tokens=4", "filters.min_words=1",
            "filters.max_length_ratio=9", "judging.principles_per_pair=2"],
    "evaluate": [*DATA, "runs=[dpo]", "reward_model=reward", "prompts=3", "max_new_tokens=4", "exit_codes.worse=0"],
    "publish": ["run=dpo", "folder=published", "license=apache-2.0", "force=true"],
}  # fmt: skip
NEEDS = {"ppo": ["reward"], "evaluate": ["dpo", "reward"], "publish": ["dpo"]}
# The trainers of orpo and simpo are DPO's but for the loss: one family shows that their tokens are, too.
RUNS = [(n, r) for n in FAMILIES for r in RECIPES if r not in ("orpo", "simpo") or n == next(iter(FAMILIES))]
# What the template is told beside the conversation, as in the family's files in conf/model.
KWARGS = {"llama3": {"date_string": "26 Jul 2024"}, "qwen3": {"enable_thinking": False}}


@dataclass
class Seen:
    """Tokens, as they went through one run of a recipe.

    Attributes:
        trained, measured: (ids, where the answer starts in them).
        sampled: (ids of a prompt, those of its completion).
        read: (ids, the place at which a reward model reads its score).
        asked: (messages, prefix of the answer, ids) of cai's generator and judge.
    """

    trained: list = field(default_factory=list)
    measured: list = field(default_factory=list)
    sampled: list = field(default_factory=list)
    read: list = field(default_factory=list)
    asked: list = field(default_factory=list)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name): the folder of the family, with its model in `model`; made once."""
    root = tmp_path_factory.mktemp("families")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def made(name):
        if not (root / name).is_dir():
            family(name, root / name / "model")
        return root / name

    return made


@pytest.fixture(scope="module")
def ran(models, compose, libraries):
    """ran(name, recipe): what was seen of the recipe's run on the family's model; what it needs is run before."""
    known = {}

    def once(name, recipe):
        if (name, recipe) not in known:
            for before in NEEDS.get(recipe, []):
                once(name, before)
            model = [] if recipe == "publish" else overrides(name)
            cfg = compose(recipe, *model, *RECIPES[recipe])
            cfg.output_dir = recipe
            module = import_module(f"rlhf_recipes.recipes.{recipe}")
            with contextlib.chdir(models(name)), watched(module) as seen:
                module.main.__wrapped__(cfg)
            known[name, recipe] = seen
        return known[name, recipe]

    return once


def overrides(name):
    told = [f"model.chat_template_kwargs.{key}={json.dumps(value)}" for key, value in KWARGS.get(name, {}).items()]
    return ["model.path=model", f"model.id=tests/{name}", "model.dtype=float32", "quantization=none", *told]


@contextlib.contextmanager
def watched(module):
    """What goes through the functions by which recipes train, measure, sample and read."""
    from rlhf_recipes import inference
    from rlhf_recipes.cai.local import Local
    from rlhf_recipes.decoding import Decoder
    from rlhf_recipes.ppo.roles import Batch
    from rlhf_recipes.publish import round_trip

    seen = Seen()

    def token_logps(model, pad_id, encoded, what):
        seen.measured += [(tuple(ids), start) for ids, start in encoded]
        return originals.token_logps(model, pad_id, encoded, what)

    def decode(decoder, prompts, *args):
        answers = originals.decode(decoder, prompts, *args)
        seen.sampled += [(tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        return answers

    def read_positions(ids_BT, mask_BT, pad_id):
        at_B = originals.read_positions(ids_BT, mask_BT, pad_id)
        for ids, mask, at in zip(ids_BT, mask_BT, at_B.tolist(), strict=True):
            seen.read.append((tuple(ids[mask == 1].tolist()), int(mask[:at].sum())))
        return at_B

    def encode(local, request, messages):
        row = originals.encode(local, request, messages)
        if not request.options:  # a choice's options are tokenised behind the question
            seen.asked.append((messages, request.prefix, tuple(row.ids)))
        return row

    def finish(run, trainer, **kwargs):
        if run.recipe != "ppo":  # whose rows have no answers
            seen.trained += rows_of(trainer)
        return originals.finish(run, trainer, **kwargs)

    def batch(cls, prompts, completions, *args):
        seen.trained += [((*p, *c), len(p)) for p, c in zip(prompts, completions, strict=True)]
        return originals.batch(prompts, completions, *args)

    originals = SimpleNamespace(
        token_logps=inference.token_logps, decode=Decoder.decode, read_positions=inference.read_positions,
        encode=Local._encode, finish=getattr(module, "finish", None), batch=Batch.of,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "token_logps", token_logps)
        patch.setattr(inference, "read_positions", read_positions)
        patch.setattr(Decoder, "decode", decode)
        patch.setattr(Local, "_encode", encode)
        patch.setattr(Batch, "of", classmethod(batch))
        patch.setattr(module, "finish", finish, raising=False)
        patch.setattr(round_trip, "in_fresh_process", round_trip.measure)
        with quick.pictures_sketched():
            yield seen


def rows_of(trainer):
    """(ids, where they are trained from) of the rows of an epoch; of a reward model, where it is trained to read."""
    pad_id = trainer.model.config.get_text_config().pad_token_id
    for batch in trainer.get_train_dataloader():
        for side in ("", "chosen_", "rejected_"):
            if f"{side}input_ids" not in batch:
                continue
            ids_BT, present_BT = batch[f"{side}input_ids"], batch[f"{side}attention_mask"] == 1
            if f"{side}labels" in batch:
                trained_BT = batch[f"{side}labels"] != -100
            else:
                trained_BT = batch.get("completion_mask", 0 * ids_BT) == 1
            for ids, present, trained in zip(ids_BT, present_BT, trained_BT, strict=True):
                kept, marks = tuple(ids[present].tolist()), trained[present].tolist()
                if any(marks):
                    assert all(marks[marks.index(True) :])
                # transformers pools at the last token that is not the padding token
                yield kept, marks.index(True) if any(marks) else last_but(kept, pad_id)


def last_but(ids, pad_id):
    return max(place for place, token in enumerate(ids) if token != pad_id)


class Spoken:
    """What a family's own tokenizer and template make of conversations."""

    def __init__(self, name, folder):
        from transformers import AutoTokenizer

        own = FAMILIES[name]
        self.tokenizer, self.kwargs = AutoTokenizer.from_pretrained(folder), KWARGS.get(name, {})
        self.pad_id = self.tokenizer.convert_tokens_to_ids(own.pad or own.eos)
        self.folds = name == "mistral"  # whose template has no system turn: its text opens the first of the user
        self.stops = set(self.tokenizer.convert_tokens_to_ids([*own.stops, own.eos]))

    def prompt(self, turns):
        if self.folds and turns[0]["role"] == "system":
            turns = [{**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]
        return tuple(self._render(turns, add_generation_prompt=True))

    def whole(self, row, side="chosen"):
        """(ids, where the answer starts), an answer that begins with its own words and ends with a stop token."""
        prompt, ids = self.prompt(row["prompt"]), tuple(self._render(row["prompt"] + row[side]))
        answer, said = ids[len(prompt) :], row[side][0]["content"]
        assert ids[: len(prompt)] == prompt
        end = next(place for place, token in enumerate(answer) if token in self.stops)
        assert self.tokenizer.decode(answer[:end]).strip() == said
        return ids, len(prompt)

    def wholes(self, split, sides=SIDES):
        return {self.whole(row, side) for row in ROWS if row["split"] == split for side in sides}

    def prompts(self, *splits):
        return {self.prompt(row["prompt"]) for row in ROWS if row["split"] in splits}

    def read(self, split):
        return {(ids, last_but(ids, self.pad_id)) for ids, _ in self.wholes(split)}

    def completed(self, prompt, drawn):
        """(ids, where the answer starts) of a prompt and what was drawn, up to its first stop token."""
        end = next((place + 1 for place, token in enumerate(drawn) if token in self.stops), len(drawn))
        return prompt + drawn[:end], len(prompt)

    def _render(self, turns, **more):
        return self.tokenizer.apply_chat_template(turns, return_dict=False, **self.kwargs, **more)


@pytest.fixture(scope="module")
def spoken(models):
    return functools.cache(lambda name: Spoken(name, models(name) / "model"))


def check_policy(seen, spoken, sides):
    """What is trained of the train rows is what is measured of the held-out ones."""
    assert set(seen.trained) == spoken.wholes("train", sides)
    assert set(seen.measured) == spoken.wholes("test", sides)


def check_reward(seen, spoken):
    assert set(seen.trained) == spoken.read("train")
    assert set(seen.read) == spoken.read("test")


def check_ppo(seen, spoken):
    """What is drawn behind prompts as they are trained elsewhere is what is trained; the reward model reads where it
    was trained."""
    assert {prompt for prompt, _ in seen.sampled} == spoken.prompts("train", "test")
    assert set(seen.trained) <= {spoken.completed(*each) for each in seen.sampled}
    assert {ids[:start] for ids, start in seen.trained} >= spoken.prompts("train")
    assert seen.read and all(at == last_but(ids, spoken.pad_id) for ids, at in seen.read)


def check_evaluate(seen, spoken):
    measured = {each for each in seen.measured if each[1] > 1}  # but for neutral text
    drawn = {spoken.completed(*each) for each in seen.sampled}
    assert {prompt for prompt, _ in seen.sampled} == spoken.prompts("test")
    assert spoken.wholes("test") < measured <= spoken.wholes("test") | drawn
    assert spoken.read("test") < set(seen.read)
    assert all(at == last_but(ids, spoken.pad_id) for ids, at in seen.read)


def check_cai(seen, spoken):
    """What is asked of the model is what it is trained on: the generation prompt, and what an answer begins with."""
    assert any(turns[0]["role"] == "system" for turns, _, _ in seen.asked)
    for turns, prefix, ids in seen.asked:
        behind = spoken.tokenizer(prefix, add_special_tokens=False)["input_ids"]
        assert ids[: len(ids) - len(behind)] == spoken.prompt(turns)
    assert {ids for _, _, ids in seen.asked} >= spoken.prompts("train", "test")


def check_publish(seen, spoken):
    from rlhf_recipes.publish import round_trip

    probes = [{"prompt": prompt, "chosen": reply} for prompt, reply in round_trip.conversations()]
    assert set(seen.measured) == {spoken.whole(row) for row in probes}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), RUNS)
def test_trained_measured_and_sampled_alike(ran, spoken, name, recipe):
    check = {"reward": check_reward, "ppo": check_ppo, "cai": check_cai, "evaluate": check_evaluate,
             "publish": check_publish}.get(recipe)  # fmt: skip
    seen, own = ran(name, recipe), spoken(name)
    if check:
        check(seen, own)
    else:
        check_policy(seen, own, ("chosen",) if recipe == "sft" else SIDES)


CONVERSATIONS = [row["prompt"] + row[side] for row in ROWS for side in SIDES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gemma3", "<eos>"),
        ("mistral", None),
        ("mistral", "<unk>"),
        ("phi3", None),
        ("phi3", "<unk>"),
        ("smollm2", None),
    ],
)
def test_a_reward_model_scores_alike_wherever_it_is_read(ran, models, spoken, compose, name, other):
    """As transformers pools the padded rows that it was trained on: by evaluate and audit, and by PPO, which may pad
    with another token (`other`)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import inference
    from rlhf_recipes import models as loading
    from rlhf_recipes.adapters import RewardModels
    from rlhf_recipes.ppo import PPOConfig, rewards
    from rlhf_recipes.ppo.roles import Roles

    ran(name, "reward")
    cfg = compose("evaluate", *overrides(name), *([f"model.pad_token='{other}'"] if other else []))
    with contextlib.chdir(models(name)):
        readers = RewardModels(cfg.model, cfg.quantization, [Path("reward/adapter")])
        tokenizer, model = loading.load_tokenizer(cfg.model), readers.using(Path("reward/adapter"))
        found = inference.rewards_and_features(model, tokenizer, CONVERSATIONS, "test")
        head = model.get_base_model().score.modules_to_save["member0"].weight[0].detach()
        policy = loading.load_base(cfg.model, cfg.quantization, AutoModelForCausalLM)
        policy = get_peft_model(policy, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
        args = PPOConfig("ppo_args", use_cpu=True, bf16=False, report_to="none")
        reward = rewards.load("reward", Roles(policy, "head"), tokenizer, None, args)
    own = spoken(name)
    rows = [own.whole(row, side)[0] for row in ROWS for side in SIDES]
    T = max(map(len, rows))
    ids_BT = torch.tensor([[*ids, *[own.pad_id] * (T - len(ids))] for ids in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in rows])
    model.get_base_model().config.pad_token_id = own.pad_id
    with torch.inference_mode():
        trained = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].tolist()
    assert [score for score, _ in found] == pytest.approx(trained, abs=1e-5)
    assert [float(features @ head.numpy()) for _, features in found] == pytest.approx(trained, abs=1e-5)
    prompts, replies = ([row["prompt"] for row in ROWS for _ in SIDES], [row[side] for row in ROWS for side in SIDES])
    assert reward(prompts, replies, 3) == pytest.approx(trained, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["</s>", "<unk>", None])
def test_a_classifier_of_others_is_read_where_its_config_says(models, spoken, pad):
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_recipes.ppo import rewards

    own = spoken("mistral")
    model = AutoModelForSequenceClassification.from_pretrained(models("mistral") / "model", num_labels=1).eval()
    model.config.pad_token_id = own.tokenizer.convert_tokens_to_ids(pad) if pad else None
    with torch.inference_mode():
        expected = [model(torch.tensor([own.whole(row)[0]])).logits.item() for row in ROWS]
    reward = rewards.load(model, None, None, own.tokenizer, None)
    found = reward([row["prompt"] for row in ROWS], [row["chosen"] for row in ROWS], 3)
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 6},
        {"suppress_tokens": list(range(100, 600))},
        {"begin_suppress_tokens": list(range(100, 600))},
        {"forced_eos_token_id": 7},
        {"bad_words_ids": [[n] for n in range(100, 600)]},
        {"do_sample": True, "temperature": 0.1, "min_p": 0.9, "typical_p": 0.1, "top_k": 1, "top_p": 0.1},
        {"num_beams": 3},
        {"max_length": 9},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_models_generation_config_bends_no_sample(models, spoken, settings):
    """Greedy, drawn, and drawn by PPO, answers are those of the bare distribution; afterwards the config is there."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from rlhf_recipes import inference
    from rlhf_recipes.ppo import rollout
    from rlhf_recipes.ppo.roles import Roles

    own = spoken("gemma3")
    model = AutoModelForCausalLM.from_pretrained(models("gemma3") / "model").eval()
    args = SimpleNamespace(
        max_completion_length=8, temperature=1.0, top_k=0, top_p=1.0, local_rollout_forward_batch_size=64
    )
    prompts = [row["prompt"] for row in ROWS]

    def answers(**settings):
        model.generation_config = GenerationConfig(eos_token_id=[1, 5], **settings)
        kept = model.generation_config.to_dict()
        found = [
            [each["ids"] for each in inference.generate(model, own.tokenizer, prompts, how, "test")]
            for how in (inference.Sampling(8, 0.0, 1), inference.Sampling(8, 1.0, 1))
        ]
        ids = [list(own.prompt(turns)) for turns in prompts]
        with torch.inference_mode():
            drawn = rollout.sample(Roles(model, "separate"), own.tokenizer, ids, list(range(len(ids))), [1, 5], args)
        assert model.generation_config.to_dict() == kept
        return [*found, drawn.ids, [logps.tolist() for logps in drawn.logps]]

    assert answers(**settings) == answers()


@pytest.mark.slow
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("name", ["gemma3", "phi3", "smollm2", "mistral"])
def test_every_look_at_the_end_of_a_reply_knows_what_generation_stops_at(
    models, spoken, compose, tmp_path, name, written
):
    """The preflight, which loads no model, and whoever has one; also where only config.json says it."""
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import inference, model_files
    from rlhf_recipes import models as loading
    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.load import load_pairs
    from rlhf_recipes.launch.preflight import rows
    from rlhf_recipes.run import Run

    folder = shutil.copytree(models(name) / "model", tmp_path / "model")
    if not written:
        (folder / "generation_config.json").unlink()
    path = models(name).parent / "pairs.jsonl"
    cfg = compose("reward", f"model.path={folder}", f"model.id=tests/{name}", "data=local", f"data.path={path}")
    tokenizer = loading.load_tokenizer(cfg.model)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stops = inference.stop_ids(model.generation_config, tokenizer)
    assert inference.stop_ids(model_files.load_generation_config(cfg.model), tokenizer) == stops
    if written:
        assert set(stops) == spoken(name).stops
    args = loading.training_args(cfg.trainer, Run(Path("x"), "reward", {}))
    splits = fit(load_pairs(cfg.data), tokenizer, None)
    found = rows.example("reward", args, splits, tokenizer, cfg.model)
    assert found["eos"] == tokenizer.convert_ids_to_tokens(stops) and found["ends"].value == 1.0
    ids, _ = spoken(name).whole(ROWS[0])
    read = found["text"].partition("⟦")[2].partition("⟧")[0]
    assert read == tokenizer.decode([ids[last_but(ids, spoken(name).pad_id)]])


def test_what_is_one_models_own_is_not_carried_to_another(compose):
    cfg = compose("dpo")
    assert (cfg.model.path, cfg.model.pad_token) == ("embedded", "<|endoftext|>")
    cfg = compose("dpo", "model.id=org/other")
    assert (cfg.model.path, cfg.model.pad_token) == (None, None)
    cfg = compose("dpo", "model.id=org/other", "model.path=there", "model.pad_token='<pad>'")
    assert (cfg.model.path, cfg.model.pad_token) == ("there", "<pad>")

    given = ["model.path=there", "model.revision=main", "model.pad_token='<pad>'", "model.trust_remote_code=true"]
    judge = compose("cai", *given).judge
    assert [judge.path, judge.revision, judge.pad_token, judge.trust_remote_code] == ["there", "main", "<pad>", True]
    judge = compose("cai", *given, "judge.id=org/other").judge
    assert [judge.path, judge.revision, judge.pad_token, judge.trust_remote_code] == [None, None, None, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_pads_with_its_own_token(models, compose, name):
    from rlhf_recipes import models as loading

    folder, own = models(name) / "model", FAMILIES[name]
    tokenizer = loading.load_tokenizer(compose("dpo", f"model.path={folder}", f"model.id=tests/{name}").model)
    assert tokenizer.pad_token == (own.pad or own.eos) and len(tokenizer) == 600
    given = compose("dpo", f"model.path={folder}", "model.pad_token='<|none|>'").model
    with pytest.raises(
        Refusal, match=r"^model.pad_token=<\|none\|>: is no token of .*, which pads with .* Add model.pad"
    ):
        loading.load_tokenizer(given)
