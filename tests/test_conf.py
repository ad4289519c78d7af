"""Every config that ships composes, and its keys and types are those of the classes behind it."""

import difflib
import os
import subprocess

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from rlhf_recipes import config
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import keys, rounds
from rlhf_recipes.launch.refusals import PARTS
from rlhf_recipes.methods import METHODS

CONF = ROOT / "conf"
TRAINING = tuple(METHODS)
RECIPES = (*TRAINING, "cai", "evaluate", "audit", "label", "publish", "pipeline")
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml") if file.stem not in PARTS)
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name not in ("accelerate", "experiment", "__pycache__")
}
EXPERIMENTS = sorted(
    str(file.relative_to(CONF / "experiment").with_suffix("")) for file in CONF.rglob("experiment/**/*.yaml")
)
# The keys that a user must give.
OPEN = {
    "pipeline": {"stages"},
    "ppo": {"reward_funcs"},
    "rloo": {"reward_funcs"},
    "audit": {"reward_model"},
    "label": {"pairs"},
}
OPEN_OPTIONS = {
    ("data", "local"): {"data.path"},
    ("data", "cai_pairs"): {"data.path"},
    ("constitution", "local"): {"constitution.path"},
    ("generator", "server"): {"generator.model"},
    ("judge", "server"): {"judge.model"},
    ("judge", "reward"): {"judge.reward_model"},
    ("judge", "function"): {"judge.function"},
}


def groups_of(recipe):
    defaults = OmegaConf.load(CONF / f"{recipe}.yaml").defaults
    return [next(iter(entry)) for entry in defaults if OmegaConf.is_dict(entry) and next(iter(entry)) in GROUPS]


def choices(recipe):
    """One option of each group at a time, until each has had its turn: what one sets, no other refers to. Of sweep/
    its own alone, and of trainer/, as `Run.start` insists.

    Of groups that all recipes have, dpo takes every option; others take some, each recipe those behind the last one's.
    """
    own = {"trainer": [recipe], "sweep": [name for name in GROUPS["sweep"] if name.partition("_")[0] == recipe]}
    options = {group: own.get(group, GROUPS[group]) for group in groups_of(recipe)}
    counts = [len(each) for group, each in options.items() if recipe == "dpo" or group not in ("data", "model")]
    turns, first = max(counts, default=0), 4 * RECIPES.index(recipe)
    return [
        (recipe, {group: each[n % len(each)] for group, each in options.items() if each})
        for n in range(first, first + turns)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "chosen"), [choice for r in RECIPES for choice in choices(r)])
def test_every_option_composes_and_fits_its_class(compose, monkeypatch, recipe, chosen):
    monkeypatch.setattr(keys, "_installed", lambda package: True)  # trackers that few have
    cfg = compose(recipe, *(f"{group}={option}" for group, option in chosen.items()))
    missing = OmegaConf.missing_keys(cfg)
    assert missing == OPEN.get(recipe, set()).union(*(OPEN_OPTIONS.get(each, set()) for each in chosen.items()))
    for key in missing:
        OmegaConf.update(cfg, key, ["a"] if key in ("runs", "stages") else "a")
    keys.check(cfg, recipe)
    for node in ("trainer", "lora", "quantization"):
        if "_target_" in cfg.get(node, {}):
            # A machine without bfloat16 needs what models.training_args derives.
            config.build(cfg[node], node, use_cpu=True, bf16=False)
    if "data" in cfg:
        from rlhf_recipes.data.load import check

        check(cfg.data)


def test_every_recipe_has_its_files():
    entries = {file.stem for file in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert entries == set(RECIPES) == {file.stem for file in CONF.glob("*.yaml")} - {"run"}
    assert set(GROUPS["trainer"]) == set(TRAINING)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_its_recipe(compose, experiment):
    recipe = experiment.partition("/")[0]
    cfg = compose(recipe, f"experiment={experiment}")
    assert not OmegaConf.missing_keys(cfg)
    keys.check(cfg, recipe)
    for stage in [*cfg.get("stages", []), *(rounds.stages(cfg) if cfg.get("rounds") else [])]:
        shared = [text for text in cfg.shared if keys.takes(stage.recipe, text)]
        overrides = [text.replace("{dir}", "outputs/demo") for text in [*shared, *stage.get("overrides", [])]]
        keys.check(compose(stage.recipe, *overrides), stage.recipe)


def test_an_experiment_changes_no_other_config(compose):
    """In a process that reads each file once."""
    compose("cai", "experiment=cai/demo")
    shipped = OmegaConf.load(CONF / "cai.yaml")
    assert compose("cai", "constitution=general").generate == shipped.generate


@pytest.mark.parametrize(
    ("recipe", "key", "right", "wrong"),
    [
        ("dpo", "overwrite", [True], [1, "yes", None]),
        ("dpo", "run_name", ["a"], [5, True, None, []]),
        ("dpo", "sweep.prompts", [0, 8], [1.5, True, "8", None]),
        ("dpo", "sweep.max_kl", [None, 3, 2.5], [True, "3"]),
        ("dpo", "preflight.fails", ["warn"], ["Warn", True, None]),
        ("evaluate", "temperature", [0, 0.7], [False, "0.7", None]),
        ("evaluate", "prompts", [None, 8], [8.5, True]),
        ("evaluate", "runs", [[], ["a"]], ["a", None, {}]),
        ("evaluate", "checkpoints", [None, "a", ["a"]], [1]),
        ("evaluate", "thresholds.max_kl", [None, 3, 2.5], [True, "3"]),
        ("evaluate", "thresholds.worst_case", [False], [None, 0]),
        ("cai", "filters.min_words", [5, 5.5], [None, True]),
        ("publish", "revision", ["main"], [None, 1]),
    ],
)
def test_a_key_takes_the_type_of_its_default(recipe, key, right, wrong):
    taken = keys.rule(key, keys.defaults(recipe)[key])
    for value in right:
        config.check_value(key, value, taken)
    for value in wrong:
        with pytest.raises(Refusal, match=f"^{key}="):
            config.check_value(key, value, taken)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_key_without_a_type_of_its_own_is_listed(recipe):
    """A default of null, or one that the user must give, says nothing of what the key takes."""
    defaults = keys.defaults(recipe)
    untyped = {key for key, value in defaults.items() if value in (None, "???")}
    assert untyped and all(keys.rule(key, None) for key in untyped)


OF_KINDS = [(group, kind) for group in keys.KINDS for kind in GROUPS[group]]


@pytest.mark.parametrize(("group", "kind"), OF_KINDS)
def test_so_is_one_of_a_generator_or_a_judge(group, kind):
    """But for what may be nearly anything."""
    own = keys.of_kind(group, kind)
    assert f"{group}.kind" in own
    free = ("judge.lora_targets", "judge.chat_template_kwargs")
    assert not [key for key, value in own.items() if not (keys.rule(key, value) or key in free)]


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("dpo", ["+sweep.max_kll=3"], "sweep.max_kll: recipes/dpo.py has no such key; did you mean 'sweep.max_kl'?"),
        ("sft", ["+preflight.failes=warn"], "preflight.failes: recipes/sft.py has no such key; did you mean 'prefl"),
        ("cai", ["+judge.margn=0.5"], "judge.margn: recipes/cai.py has no such key"),
        ("cai", ["+generator.temprature=0"], "generator.temprature: recipes/cai.py has no such key"),
        ("reward", ["+reward.membrs=3"], "reward.membrs: recipes/reward.py has no such key; did you mean 'reward.mem"),
        ("cai", ["judge.kind=servr"], "judge.kind=servr: not one of local, server"),
        ("cai", ["judge.adapter=3"], "judge.adapter=3: must be text or null."),
        ("dpo", ["sweep.generator={model: m, timeout: null}"], "sweep.generator.timeout=null: must be a number."),
        *(
            ("cai", ["judge=server", "judge.model=m", f"judge.{given}"], f"judge.{given}: must be {rule}")
            for given, rule in {
                "concurrency=abc": "a whole number", "concurrency=2.5": "a whole number", "timeout=null": "a number",
                "prompt_price=free": "a number or null", "concurrency=0": "at least 1", "base_url=1": "text or a list",
            }.items()
        ),
    ],
)  # fmt: skip
def test_a_group_of_ours_takes_its_own_keys_alone(compose, recipe, overrides, says):
    with pytest.raises(Refusal) as caught:
        keys.check(compose(recipe, *overrides), recipe)
    assert str(caught.value).startswith(says)


def test_what_a_chat_template_reads_is_not_ours(compose):
    given = [
        f"{group}.{key}" for group in keys.KINDS for key in ("model=m", "chat_template_kwargs.enable_thinking=no")
    ]
    keys.check(compose("cai", "generator=server", "judge=server", *given), "cai")


def test_every_listed_key_is_there():
    known = {key for recipe in RECIPES for key in keys.defaults(recipe)}
    known |= {key for group, kind in OF_KINDS for key in keys.of_kind(group, kind)}
    for key in keys.KEYS:
        assert any(name == key or f"{name.rpartition('.')[0]}.*" == key for name in known), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("qwen3_0_6b", "Qwen/Qwen3-0.6B"),
        ("qwen3_4b", "Qwen/Qwen3-4B"),
        ("qwen3_8b", "Qwen/Qwen3-8B"),
        ("llama3_1_8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("mistral_7b", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("gemma3_4b", "google/gemma-3-4b-it"),
        ("smollm2_135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("smollm2_135m_hub", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_models(compose, name, model_id):
    cfg = compose("dpo", f"model={name}")
    assert cfg.model.id == model_id and cfg.lora.target_modules == cfg.model.lora_targets
    assert cfg.model.path == ("embedded" if name == "smollm2_135m" else None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAINING)
def test_every_argument_is_overridable_without_plus(compose, recipe):
    """All of the class's own names, with the values that the class would use itself."""
    from rlhf_recipes.typecheck import parameters

    target = config.build(compose(recipe).trainer, "trainer", use_cpu=True, bf16=False)
    names = parameters(type(target))
    assert len(names) > 100
    plain = {name: getattr(target, name, None) for name in names}
    texts = [
        f"trainer.{name}={value}"
        for name, value in plain.items()
        if isinstance(value, bool | int | float) and f"{value}".lower() not in ("nan", "inf")
    ]
    assert len(texts) > 50
    node = compose(recipe, *texts).trainer
    assert {text.partition("=")[0].removeprefix("trainer.") for text in texts} <= set(node)
    nested = compose(recipe, "trainer.lr_scheduler_kwargs={num_cycles: 2}", "trainer.lr_scheduler_kwargs.x=1").trainer
    assert nested.lr_scheduler_kwargs == {"num_cycles": 2, "x": 1}
    built = config.build(compose(recipe, "trainer.weight_decay=0.1").trainer, "trainer", use_cpu=True, bf16=False)
    assert built.weight_decay == 0.1


def test_lora_and_quantization_take_what_their_classes_take(compose):
    cfg = compose(
        "dpo", "lora.use_rslora=true", "lora.init_lora_weights=pissa_niter_4", "quantization.llm_int8_threshold=5"
    )
    lora = config.build(cfg.lora, "lora", task_type="CAUSAL_LM")
    assert lora.use_rslora and lora.init_lora_weights == "pissa_niter_4"
    assert config.build(cfg.quantization, "quantization").llm_int8_threshold == 5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.beta=oops", "trainer.beta=oops: trl.DPOConfig takes float here, not the str 'oops'."),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: trl.DPOConfig takes int here, not the float '1.5'."),
        ("trainer.beta=null", "trainer.beta=null: trl.DPOConfig takes float here, not null."),
        (
            "trainer.lr_schedular_type=linear",
            "trainer.lr_schedular_type: trl.DPOConfig has no such field; did you mean 'lr_",
        ),
        ("lora.r=abc", "lora.r=abc: peft.LoraConfig takes int here, not the str 'abc'."),
        ("lora.rank=8", "lora.rank: peft.LoraConfig has no such field"),
        ("lora.target_modules=[1]", "lora.target_modules=[1]: peft.LoraConfig takes "),
        ("lora.init_lora_weights=pissy", "lora.init_lora_weights=pissy: peft.LoraConfig takes "),
        (
            "quantization.load_in_4bit=oops",
            "quantization.load_in_4bit=oops: transformers.BitsAndBytesConfig takes bool",
        ),
        (
            "quantization.load_in_4bits=true",
            "quantization.load_in_4bits: transformers.BitsAndBytesConfig has no such field; d",
        ),
        ("trainer._target_=trl.DPOConfigg", "trainer._target_=trl.DPOConfigg: cannot be imported"),
    ],
)
def test_what_the_class_does_not_take_is_refused(compose, override, says):
    cfg = compose("dpo", override)
    where = override.partition(".")[0]
    with pytest.raises(ValueError) as caught:
        config.build(cfg[where], where)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_thresholds_in_the_file_are_those_of_the_code(compose):
    from rlhf_recipes.audit import gates
    from rlhf_recipes.evaluation import verdict

    assert dict(compose("evaluate").thresholds) == verdict.THRESHOLDS
    assert dict(compose("audit").thresholds) == gates.THRESHOLDS


# ---- the recipes themselves


@pytest.fixture(scope="module")
def helper(light_python, clean_env, tmp_path_factory):
    """helper(recipe, cwd): its `--help`, by a Python that has imported no large library, and must not do so."""
    folder = tmp_path_factory.mktemp("helper")
    (folder / "warm_help.py").write_text("""
import runpy, sys
try:
    runpy.run_module(f"rlhf_recipes.recipes.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
finally:
    loaded = {"torch", "trl", "transformers", "datasets"} & set(sys.modules)
    assert not loaded, loaded
""")

    def helped(recipe, cwd):
        command = [light_python, "-m", "warm_help", recipe, "--help"]
        env = {**clean_env, "PYTHONPATH": str(folder)}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)

    return helped


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_help_has_examples_and_imports_no_torch(helper, recipe, tmp_path):
    done = helper(recipe, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"python recipes/{recipe}.py") >= 2
    for group in groups_of(recipe):
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{group}:"))
        assert line.partition(":")[2].strip(), "no options are listed"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short_and_linear(recipe):
    text = (ROOT / "recipes" / f"{recipe}.py").read_text()
    assert len(text.splitlines()) < 80
    assert text.count("\ndef ") == 1 and "class " not in text
    assert text.startswith('"""') and text.split('"""')[1].count(f"python recipes/{recipe}.py") >= 2


@pytest.mark.parametrize("other", ["orpo", "simpo"])
def test_preference_recipes_differ_in_the_method_alone(other):
    """The docstring, the decorator and the run's name, the trainer's import and name, the reward, DPO's reference and
    which end it cuts."""
    dpo, that = ((ROOT / "recipes" / f"{name}.py").read_text().split('"""', 2)[2] for name in ("dpo", other))
    changed = [
        line[1:].strip()
        for line in difflib.unified_diff(dpo.splitlines(), that.splitlines(), n=0, lineterm="")
        if line[0] in "+-" and line[:3] not in ("+++", "---") and line[1:].strip()
    ]
    method = (
        "Trainer",
        "trainer_class",
        f'("{other}")',
        '("dpo")',
        f'Run.start(cfg, "{other}")',
        'Run.start(cfg, "dpo")',
        "preference_metrics",
        "if run.shared and",
        "their reference, to beta",
        "pairs = fit(",
        "reference",
        "Held out, before",
        "pairs.test,",
    )
    assert changed and all(any(word in line for word in method) for line in changed), changed
    assert len(changed) <= 26
