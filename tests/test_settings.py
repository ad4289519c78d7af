"""Settings that cannot work or would do nothing are refused from the config alone; the tables are those of TRL."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import re
import sys
import textwrap

import pytest
from conftest import TINY_ID, skip_without, write_adapter
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rlhf_recipes import config, methods, references
from rlhf_recipes.commands import TYPED
from rlhf_recipes.config_hash import config_sha256
from rlhf_recipes.data import load
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import keys, ranges, settings
from rlhf_recipes.launch.recipe import recipe as launched
from rlhf_recipes.launch.settings import LOSSES, OF_SCORES, READ
from rlhf_recipes.overrides import quoted

PPO = ["reward_funcs=json:loads"]
SERVED = "trainer.rollout=server trainer.vllm_server_base_url=http://localhost:8000"
# Those that this TRL has.
TRLS_OWN = {
    target: row for target, row in methods.TRLS_OWN.items() if importlib.util.find_spec(target.rpartition(".")[0])
}
ORPO, CPO = (f"trainer._target_={target}" for target in methods.TRLS_OWN)


@pytest.fixture(scope="module")
def check(compose):
    """check(recipe, overrides): on a config that is composed once for each recipe."""
    composed = {}

    def checked(recipe, overrides):
        if recipe not in composed:
            composed[recipe] = compose(recipe, *(PPO if methods.of(recipe).samples else []))
        cfg = OmegaConf.merge(composed[recipe], OmegaConf.from_dotlist(overrides.split()))
        settings.check(cfg, recipe)

    return checked


@pytest.fixture(scope="module")
def refusal(check):
    def refused(recipe, overrides):
        with pytest.raises(Refusal) as caught:
            check(recipe, overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


@pytest.mark.parametrize(
    ("recipe", "overrides", "says"),
    [
        ("dpo", "lora.r=0", "lora.r=0: must be at least 1."),
        ("rloo", "trainer.num_generations=3", "trainer.num_generations=3: the 32 completions of a rollout"),
        ("rloo", "trainer.num_generations=1", "trainer.num_generations=1: must be at least 2."),
        ("rloo", "trainer.epsilon=0.1", "trainer.epsilon=0.1: a rollout is used for one step"),
        ("rloo", "trainer.use_vllm=true", "trainer.use_vllm=true: TRL would merge the LoRA into the base"),
        ("rloo", "trainer.sync_ref_model=true", "trainer.sync_ref_model=true: TRL cannot move the reference"),
        ("dpo", "lora.rank_pattern.q_proj=0", "lora.rank_pattern.q_proj=0: must be at least 1."),
        ("dpo", "lora.layers_to_transform=[0,-1]", "lora.layers_to_transform=[0, -1]: must be at least 0."),
        ("dpo", "lora.lora_dropout=1.0", "lora.lora_dropout=1.0: must be at least 0 and below 1."),
        ("dpo", "trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size=0: must be at least 1."),
        ("kto", "trainer.beta=-0.1", "trainer.beta=-0.1: must be above 0 and finite."),
        ("simpo", "trainer.beta=0", "trainer.beta=0: must be above 0 and finite."),
        ("orpo", "trainer.beta=-0.1", "trainer.beta=-0.1: must be at least 0 and finite."),
        ("dpo", "trainer.beta=.nan", "trainer.beta=nan: must be above 0 and finite."),
        ("audit", "exit_codes.do_not_trust=256", "exit_codes.do_not_trust=256: must be at least 0 and at most 255."),
        ("pipeline", "loop.exit_codes.stopped=-1", "loop.exit_codes.stopped=-1: must be at least 0 and at most 255."),
        ("dpo", "data.seed=-1", "data.seed=-1: must be at least 0."),
        ("dpo", "data.bootstrap=-1", "data.bootstrap=-1: must be at least 0."),
        ("dpo", "trainer.seed=4294967296", "trainer.seed=4294967296: must be at least 0 and below 4294967296."),
        ("sft", "trainer.max_length=0", "trainer.max_length=0: must be at least 2."),
        ("sft", "trainer.max_steps=0", "trainer.max_steps=0: must be at least 1, or -1."),
        ("reward", "trainer.num_train_epochs=0", "trainer.num_train_epochs=0: must be above 0 and finite."),
        ("reward", "trainer.learning_rate=.inf", "trainer.learning_rate=inf: must be above 0 and finite."),
        ("ppo", "trainer.temperature=0.0", "trainer.temperature=0.0: must be above 0 and finite."),
        ("ppo", "trainer.max_completion_length=0", "trainer.max_completion_length=0: must be at least 1."),
        ("evaluate", "max_new_tokens=0", "max_new_tokens=0: must be at least 1."),
        ("audit", "samples=1", "samples=1: must be at least 2, or 0."),
        ("audit", "thresholds.min_gold_gain=.nan", "thresholds.min_gold_gain=nan: must be finite."),
        ("audit", "ledger_pairs=0", "ledger_pairs=0: must be at least 1."),
        ("audit", "stress_pairs=-1", "stress_pairs=-1: must be at least 0."),
        ("cai", "filters.max_length_ratio=0", "filters.max_length_ratio=0: must be at least 1."),
        ("cai", "route.accept_margin=0.6", "route.accept_margin=0.6: must be at least 0 and at most 0.5."),
        ("cai", "route.tie_margin=-3", "route.tie_margin=-3: must be at least 0 and at most 0.5."),
        ("cai", "gate.min_parsed=98", "gate.min_parsed=98: must be at least 0 and at most 1."),
        # what the loss does not read
        ("dpo", "trainer.label_smoothing=0.1",
         "trainer.label_smoothing=0.1: is read with trainer.loss_type=aot or aot_unpaired or exo_pair or robust "
         "alone, not with sigmoid: it would change nothing."),
        ("dpo", "trainer.loss_type=[sft] trainer.beta=0.3", "trainer.beta=0.3: is read with trainer.loss_type=sigmoi"),
        ("dpo", "trainer.loss_type=[sft] trainer.f_divergence_type=forward_kl", "trainer.f_divergence_type=forward_k"),
        ("dpo", "trainer.f_alpha_divergence_coef=0.7", "trainer.f_alpha_divergence_coef=0.7: is read with trainer.f_"),
        ("dpo", "trainer.discopop_tau=0.1 trainer.loss_type=hinge", "trainer.discopop_tau=0.1: is read with trainer."),
        ("simpo", f"{CPO} trainer.loss_type=ipo trainer.label_smoothing=0.1", "trainer.label_smoothing=0.1: is read"),
        ("simpo", f"{CPO} trainer.loss_type=sigmoid trainer.simpo_gamma=0.7", "trainer.simpo_gamma=0.7: is read with"),
        ("simpo", f"{CPO} trainer.loss_type=alphapo trainer.cpo_alpha=0.1", "trainer.cpo_alpha=0.1: is read with tra"),
        ("simpo", "trainer.loss_type=ipo",
         f"trainer.loss_type=ipo: not one of simpo; TRL's own trainer has it: add {CPO}."),
        ("simpo", "trainer.alpha=0.2",
         f"trainer.alpha=0.2: only TRL's own trainer has it. Leave it out, or add {CPO}."),
        ("orpo", "trainer.padding_value=0",
         "trainer.padding_value=0: only TRL's own trainer has it. Leave it out, or add trainer._target_=trl."),
        ("orpo", "trainer.loss_type=sigmoid", "trainer.loss_type=sigmoid: not one of orpo."),
        ("orpo", "trainer.label_smoothing=0.1", "trainer.label_smoothing=0.1: is read by nothing here. ORPO's"),
        ("simpo", "trainer.precompute_ref_log_probs=true", "trainer.precompute_ref_log_probs=True: is read by"),
        ("orpo", "trainer.truncation_mode=keep_end", "trainer.truncation_mode=keep_end: must be keep_start here."),
        ("ppo", "trainer.chat_template_kwargs.a=1",
         "trainer.chat_template_kwargs={'a': 1}: is read by nothing here. Use model.chat_template_kwargs"),
        ("dpo", "trainer.label_smoothing_factor=0.1", "trainer.label_smoothing_factor=0.1: is read by nothing here."),
        ("sft", "trainer.loss_type=dft trainer.label_smoothing_factor=0.1", "trainer.label_smoothing_factor=0.1: is "),
        ("kto", "trainer.lr_scheduler_type=constant trainer.warmup_steps=10", "trainer.warmup_steps=10: is read with"),
        ("orpo", "trainer.eval_steps=10",
         "trainer.eval_steps=10: is read with trainer.eval_strategy=steps alone: it would change nothing."),
        ("dpo", "trainer.model_init_kwargs.a=1", "trainer.model_init_kwargs={'a': 1}: is read by nothing here. The"),
        ("ppo", "trainer.kl_horizon=100", "trainer.kl_horizon=100: is read with trainer.kl_controller=adaptive alone"),
        ("ppo", "trainer.max_logp_difference=1.0",
         "trainer.max_logp_difference=1.0: is read with trainer.rollout=server alone: it would"),
        ("ppo", "trainer.vllm_server_timeout=9.0", "trainer.vllm_server_timeout=9.0: is read with trainer.rollout=s"),
        ("ppo", f"{SERVED} trainer.merge_to_sample=true",
         "trainer.merge_to_sample=true: is read with trainer.rollout=local alone, not with server: it would"),
        ("ppo", "trainer.reward_clip_range=[5.0,-5.0]",
         "trainer.reward_clip_range=[5.0, -5.0]: must be [lowest,highest]. Change it."),
        ("rloo", "trainer.reward_clip_range=[1.0]", "trainer.reward_clip_range=[1.0]: must be [lowest,highest]."),
        ("rloo", "trainer.soft_punish_cache=64 trainer.max_completion_length=32",
         "trainer.soft_punish_cache=64: punishes every completion, for it is over trainer.max_completion_length=32."),
        ("ppo", "trainer.reward_weights=[0.0]", "trainer.reward_weights=[0.0]: none counts. Give one of them another"),
        ("rloo", "trainer.missing_eos_penalty=-1.0", "trainer.missing_eos_penalty=-1.0: must be at least 0"),
        ("ppo", "trainer.vf_coef=0.5", "trainer.vf_coef: the critic shares no weights with the policy. Use"),
        ("ppo", "trainer.num_mini_batches=1 trainer.cliprange=0.1", "trainer.cliprange=0.1: a rollout is used for"),
        ("ppo", "trainer.kl_brake=null trainer.kl_target=3.0", "trainer.kl_target=3.0: is read by neither"),
        # what TRL and PEFT refuse when the model is loaded
        ("dpo", "trainer.loss_type=[sigmoid,robus]", "trainer.loss_type=robus: not one of sigmoid, "),
        ("kto", "trainer.loss_type=bco", "trainer.loss_type=bco: not one of kto, apo_zero_unpaired"),
        ("dpo", "trainer.loss_type=exo_pair", "trainer.label_smoothing=0.0: the loss exo_pair takes its logarithm."),
        ("dpo", "trainer.loss_type=robust trainer.label_smoothing=0.5", "trainer.label_smoothing=0.5: the loss robus"),
        ("dpo", "trainer.loss_type=apo_zero trainer.f_divergence_type=forward_kl", "trainer.f_divergence_type=forwar"),
        ("dpo", "trainer.f_divergence_type=forward", "trainer.f_divergence_type=forward: not one of reverse_kl, "),
        ("dpo", "trainer.loss_type=aot trainer.use_weighting=true", "trainer.use_weighting=true: the losses aot and"),
        ("dpo", "trainer.sync_ref_model=true", "trainer.sync_ref_model=true: TRL cannot move the reference of a LoRA"),
        ("sft", "trainer.chat_template_path=t.jinja", "trainer.chat_template_path=t.jinja: rows are counted"),
        ("reward", "trainer.chat_template_path=org/model", "trainer.chat_template_path=org/model: rows are counted"),
        ("sft", "trainer.packing=true trainer.truncation_mode=keep_end", "trainer.truncation_mode=keep_end: packing"),
        # what would move the base
        ("dpo", "lora.init_lora_weights=pissa_niter_4", "lora.init_lora_weights=pissa_niter_4: takes its start out o"),
        ("sft", "lora.init_lora_weights=olora", "lora.init_lora_weights=olora: takes its start out of the base's"),
        ("reward", "lora.init_lora_weights=loftq", "lora.init_lora_weights=loftq: takes its start out of the base's"),
        ("orpo", "lora.init_lora_weights=corda", "lora.init_lora_weights=corda: takes its start out of the base's"),
        ("sft", "lora.init_lora_weights=eva", "lora.init_lora_weights=eva: starts from activations that no recipe"),
        ("sft", "lora.init_lora_weights=orthogonal lora.r=5", "lora.r=5: must be even with lora.init_lora_weights=or"),
        ("sft", "lora.init_lora_weights=mica", "lora.init_lora_weights=mica: needs the base's weights in full."),
        ("orpo", "lora.target_modules=[lm_head]", "lora.target_modules: recipes/orpo.py reads the weights of lm_head"),
        ("sft", "lora.target_modules=[q_proj,lm_head]", "lora.target_modules: recipes/sft.py reads the weights of"),
        ("dpo", "lora.bias=all", "lora.bias=all: trains biases of the base, which the reference and whatever is comp"),
        ("sft", "lora.bias=all", "lora.bias=all: trains biases of the base, which the reference and whatever is comp"),
        ("reward", "lora.bias=lora_only", "lora.bias=lora_only: trains biases of the base, which the reference and"),
        ("sft", "lora.inference_mode=true", "lora.inference_mode=true: nothing would be trained."),
        ("sft", "lora.task_type=SEQ_CLS", "lora.task_type=SEQ_CLS: recipes/sft.py trains CAUSAL_LM."),
    ],
)  # fmt: skip
def test_what_cannot_work_or_does_nothing_is_refused(refusal, recipe, overrides, says):
    assert refusal(recipe, overrides).startswith(says)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("orpo", "trainer.beta=0"),
        ("orpo", f"{ORPO} lora.target_modules=[lm_head]"),
        ("orpo", "trainer.disable_prompt_loss=false"),
        ("dpo", "trainer.loss_type=[robust,sft] trainer.label_smoothing=0.2 trainer.beta=0.3"),
        ("dpo", "trainer.loss_type=robust trainer.label_smoothing=0.0"),
        ("dpo", "trainer.loss_type=[sigmoid] trainer.label_smoothing=0"),
        ("simpo", "trainer.loss_type=simpo trainer.label_smoothing=0.1 trainer.cpo_alpha=0.1"),
        ("simpo", f"{CPO} trainer.loss_type=sigmoid"),  # what our file sets for SimPO is nobody's wish here
        ("simpo", f"{CPO} trainer.loss_type=alphapo trainer.alpha=0.2 trainer.simpo_gamma=0.7"),
        ("kto", "trainer.loss_type=apo_zero_unpaired trainer.desirable_weight=1.33"),
        ("sft", "trainer.lr_scheduler_type=constant trainer.max_steps=-1 trainer.max_grad_norm=0"),
        ("sft", "trainer.label_smoothing_factor=0.1 lora.init_lora_weights=orthogonal"),
        ("ppo", "trainer.num_ppo_epochs=1 trainer.num_mini_batches=2 trainer.cliprange=0.1"),
        ("ppo", "trainer.kl_controller=limit trainer.kl_brake=null trainer.kl_target=3.0"),
        ("reward", "lora.init_lora_weights=gaussian lora.r=5 trainer.max_length=null"),
        ("audit", "samples=0 stress_pairs=0 probe_pairs=0 credit_pairs=0"),
    ],
)
def test_what_works_is_taken(check, recipe, overrides):
    check(recipe, overrides)


def test_it_is_looked_at_with_the_keys(compose):
    with pytest.raises(Refusal, match="must be at least 1"):
        keys.check(compose("dpo", "lora.r=0"), "dpo")


@pytest.fixture
def command(monkeypatch, capsys):
    """command(recipe, *overrides): (exit status, stdout, stderr) of `--cfg job`, in this process."""
    for name, value in {"path": [*sys.path], "excepthook": sys.excepthook}.items():
        monkeypatch.setattr(sys, name, value)
    for name in ("HYDRA_FULL_ERROR", TYPED, "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", ConfigLoaderImpl.load_configuration)

    def run(name, *overrides):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"rlhf-{name}", *overrides, "--cfg", "job"])
        code = 0
        try:
            launched(name)(print)()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def groups(recipe):
    """(group, what is chosen of it) of a primary's defaults."""
    entries = OmegaConf.load(config.CONF / f"{recipe}.yaml").defaults
    return [pair for entry in entries if OmegaConf.is_dict(entry) for pair in entry.items() if "hydra" not in pair[0]]


RECIPES = ("sft", "reward", "dpo", "kto", "orpo", "simpo", "ppo", "rloo", "evaluate", "audit", "cai", "label")
GROUPS = [(recipe, *pair) for recipe in (*RECIPES, "pipeline") for pair in groups(recipe)]


@pytest.mark.parametrize(("recipe", "group", "default"), GROUPS)
def test_a_group_that_is_null(command, recipe, group, default):
    """Where that is the default, as `--cfg job` prints it, it may be said, too."""
    code, printed, said = command(recipe, f"{group}=null")
    if default is None:
        assert (code, printed, said) == command(recipe) and code == 0
        return
    names = {file.stem for file in (config.CONF / group).glob("*.yaml")} - {"base", "common"}
    listed = f"must be one of {', '.join(sorted(names))}, or left out." if names else "must be left out."
    assert (code, printed, said) == (2, "", f"error: {group}=null: {listed}\n")


@pytest.mark.parametrize(
    ("recipe", "override", "says"),
    [
        ("dpo", "+lora=null", "lora=null: must be one of all_linear, or left out."),
        ("dpo", "quantization=4", "quantization=4: must be one of int8, nf4, nf4_fsdp, none, or left out."),
        ("dpo", "quantization=nf4,null", "quantization=null: must be one of int8, nf4, nf4_fsdp, none, or left out."),
        ("dpo", "judge=null", "judge: recipes/dpo.py has no such group."),
        ("dpo", "hydra/launcher=null", "hydra/launcher=null: must be left out."),
        ("evaluate", "reward_model=null", None),
        *(("dpo", f"~{key}", f"~{key}: recipes/dpo.py reads it. Leave it out, or give it another value.") for key in
          ("lora", "quantization", "preflight", "fast_forward", "model", "run_name", "preflight.only", "output_dir",
           "lora=all_linear")),
        ("evaluate", "~seed", "~seed: recipes/evaluate.py reads it. Leave it out, or give it another value."),
        ("dpo", "~trainer.learning_rate", None),  # the class has a default
        ("evaluate", "~experiment", None),
        ("evaluate", "experiment=null", None),
    ],
)  # fmt: skip
def test_what_is_no_choice_of_a_group(command, recipe, override, says):
    code, _, said = command(recipe, override)
    assert (code, said) == ((2, f"error: {says}\n") if says else (0, ""))


@pytest.mark.parametrize(
    ("recipe", "override", "first"),
    [
        ("pipeline", "loop=null", "anchor"),
        ("pipeline", "loop.gates=null", "min_win_rate"),
        ("cai", "gate=null", "gold"),
        ("cai", "generate=null", "temperature"),
        ("evaluate", "thresholds=null", "metric"),
        ("evaluate", "thresholds=5", "metric"),
        ("evaluate", "exit_codes=null", "ship"),
        ("audit", "exit_codes=1", "trust"),
    ],
)
def test_a_mapping_is_set_key_by_key(compose, recipe, override, first):
    given = ["stages=[]"] if recipe == "pipeline" else []
    with pytest.raises(Refusal) as caught:
        keys.check(compose(recipe, override, *given), recipe)
    key = override.partition("=")[0]
    assert str(caught.value) == f"{override}: is a mapping. Set, or lift, each by its own key: {key}.{first}=<value>."


@pytest.mark.parametrize("name", [".replaced", "a/.replaced", ".x/b"])
def test_a_run_is_not_trained_where_others_are_set_aside(compose, name):
    with pytest.raises(Refusal, match=rf"^run_name={name}: a name that begins with a dot is for what is set aside\."):
        keys.check(compose("dpo", f"run_name={name}"), "dpo")
    keys.check(compose("dpo", "run_name=../b.c"), "dpo")


def test_null_is_said_as_it_is_typed(compose):
    with pytest.raises(Refusal, match=r"^lora\.r=null: peft\.LoraConfig takes int here, not null\.$"):
        config.build(compose("dpo", "lora.r=null").lora, "lora")


@pytest.mark.parametrize("override", ["stages=[{name:a,recipe:sft,overrides:[a=b]}]", "next=[a=b,{]"])
def test_what_hydra_cannot_parse(command, override):
    code, _, said = command("pipeline", override)
    quote = "Quote what its grammar has no words for, an item with '=' in a list say: key=['a=b']."
    assert (code, said) == (2, f"error: Error parsing override '{override}'. {quote}\n")


@pytest.mark.parametrize("group", ["lora", "preflight", "quantization"])
def test_a_group_that_a_file_makes_nothing(compose, group):
    cfg = compose("dpo")
    OmegaConf.update(cfg, group, None)
    with pytest.raises(Refusal, match=f"^{group}=null: is a mapping"):
        keys.check(cfg, "dpo")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.optim=galore_adamw_8bit", "trainer.optim=galore_adamw_8bit: galore-torch is not installed. pip in"),
        ("trainer.optim=adamw_torch_8bit", "trainer.optim=adamw_torch_8bit: torchao is not installed. pip install t"),
        ("trainer.optim=paged_adamw_32bit", "trainer.optim=paged_adamw_32bit: bitsandbytes is not installed. pip in"),
        ("trainer.optim=rmsprop_bnb", "trainer.optim=rmsprop_bnb: bitsandbytes is not installed. pip install bitsa"),
        ("trainer.use_liger_kernel=true", "trainer.use_liger_kernel=true: liger-kernel is not installed."),
        ("trainer.optim=adamw_torch_fused", None),
        ("trainer.optim=rmsprop", None),
    ],
)
def test_what_an_optimizer_needs_is_installed(compose, monkeypatch, override, says):
    monkeypatch.setattr(keys, "_installed", lambda package: False)
    cfg = compose("dpo", override, "quantization=none")
    if says is None:
        keys.check(cfg, "dpo")
        return
    with pytest.raises(Refusal) as caught:
        keys.check(cfg, "dpo")
    assert str(caught.value).startswith(says)


def test_the_packages_of_optimizers_are_those_of_transformers():
    """Those that are left out need none beside torch, or another machine."""
    from transformers.training_args import OptimizerNames

    plain = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    elsewhere = {"adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"}
    matched = {each.value for each in OptimizerNames if any(re.match(name, each.value) for name in keys.OPTIMIZERS)}
    assert {each.value for each in OptimizerNames} - matched == plain | elsewhere


def test_lora_of_an_adapter_that_is_continued(compose, check, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_adapter(tmp_path / "sft", recipe="sft")
    path = next(folder.rglob("adapter_config.json"))
    adapter = json.loads(path.read_text()) | {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    path.write_text(json.dumps(adapter))
    assert refusal("dpo", "model.adapter=sft lora.r=64") == (
        "lora.r=64: model.adapter=sft is continued as it is, with 8. Give that, or leave it out."
    )
    with pytest.raises(Refusal, match=r"lora.r=32 \(reward.rank and reward.alpha of an ensemble\): model.adapter=sft"):
        settings.check(compose("reward", "reward=ensemble", "reward.member=2", "model.adapter=sft"), "reward")
    assert refusal("dpo", "model.adapter=sft lora.target_modules=[q_proj]").startswith("lora.target_modules=[")
    check("dpo", "model.adapter=sft lora.r=8 lora.target_modules=[v_proj,q_proj]")
    check("dpo", "model.adapter=sft")


def test_ranges():
    assert 0 in ranges.NATURAL and -1 not in ranges.NATURAL and math.nan not in ranges.NATURAL
    assert math.inf not in ranges.POSITIVE and math.inf in ranges.NATURAL and 1e-30 in ranges.POSITIVE
    some = ranges.Range(at_least=1, beside=(-1,))
    assert -1 in some and 0 not in some


@pytest.mark.parametrize(
    "override",
    [
        *(
            "thresholds.max_eos_drop=5",
            "thresholds.min_win_rate=55",
            "thresholds.max_kl=.nan",
            "judging.tie_margin=0.9",
        ),
        *("judging.asked_again=2", "thresholds.min_accuracy=65", "route.tie_margin=0.9", "gate.min_parsed=98"),
    ],
)
def test_points_for_a_share_are_refused(override):
    with pytest.raises(Refusal, match=f"^{override.partition('=')[0]}=.*: must be at least "):
        ranges.check(OmegaConf.to_container(OmegaConf.from_dotlist([override])), None)


def test_every_limit_of_a_verdict_has_a_range(compose):
    limits = [name for recipe in ("evaluate", "audit") for name in compose(recipe).thresholds]
    other = {"metric", "length_controlled", "worst_case"}
    assert {f"thresholds.{name}" for name in limits if name not in other} <= ranges.RANGES.keys()
    for recipe in ("evaluate", "audit"):
        ranges.check({"thresholds": dict(compose(recipe).thresholds)}, None)


def test_every_range_is_of_a_key_that_is_there(compose):
    """A misspelled key in the table would check nothing."""
    from rlhf_recipes.typecheck import parameters

    recipes = ("sft", "reward", "dpo", "kto", "orpo", "simpo", "ppo", "rloo")
    known = {
        key for recipe in (*recipes, "evaluate", "audit", "cai", "label", "pipeline") for key in keys.defaults(recipe)
    }
    for recipe in recipes:
        cfg = compose(recipe, *(PPO if methods.of(recipe).samples else []))
        for node in ("trainer", "lora"):
            known |= {f"{node}.{name}" for name in parameters(config.guard.find_class(cfg[node]._target_, node))}
    known |= {key for group in keys.KINDS for key in keys.of_kind(group, "server")}
    known |= {f"data.{key}" for key in load.KEYS}
    known |= {key.rpartition(".")[0] for key in known}  # of all keys below one
    assert {key.removesuffix(".*") for key in ranges.RANGES} <= known


# ---- the tables, against the installed source


def branches(function, name):
    """What each `if name == "x"` of a function reads: x -> the names in its body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith(f"{name} == "):
            body = [each for statement in node.body for each in ast.walk(statement)]
            read = {ast.unparse(each) for each in body if isinstance(each, ast.Name | ast.Attribute)}
            found[node.test.comparators[0].value] = read
    return found


def readers(found, *names):
    return {loss for loss, read in found.items() if read & set(names)}


def test_the_losses_of_dpo_are_those_of_trl():
    from trl import DPOTrainer

    found = branches(DPOTrainer._compute_loss, "loss_type")
    table = READ["trl.DPOConfig"]
    assert set(found) == set(LOSSES["trl.DPOConfig"])
    assert readers(found, "self.label_smoothing") == set(table["label_smoothing"].values)
    assert readers(found, "self.args.discopop_tau") == set(table["discopop_tau"].values)
    assert readers(found, "self.beta") == set(table["beta"].values)
    assert readers(found, "delta_score", "chosen_scores") == set(OF_SCORES) == set(table["f_divergence_type"].values)
    whole = {"delta_score", "chosen_scores", "chosen_logratios", "chosen_logps"}  # all are sums that ld_alpha weighs
    assert readers(found, *whole) == set(table["ld_alpha"].values)
    divergences = branches(DPOTrainer._compute_loss, "self.f_divergence_type")
    assert set(divergences) == set(settings.DIVERGENCES)
    coefficient = readers(divergences, "self.f_alpha_divergence_coef")
    assert coefficient == set(table["f_alpha_divergence_coef"].values)


def test_the_losses_of_kto_are_those_of_trl():
    from trl import KTOTrainer

    source = inspect.getsource(KTOTrainer)
    assert all(f'"{name}"' in source for name in LOSSES["trl.KTOConfig"])
    assert set(branches(KTOTrainer._compute_loss, "self.loss_type")) == set(LOSSES["trl.KTOConfig"])


def test_the_losses_of_cpo_are_those_of_trl():
    skip_without("trl.experimental.cpo.CPOConfig")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    found = branches(CPOTrainer.cpo_loss, "self.loss_type")
    table = READ["trl.experimental.cpo.CPOConfig"]
    assert {*found, "alphapo"} == set(LOSSES["trl.experimental.cpo.CPOConfig"])
    assert {*readers(found, "self.label_smoothing"), "alphapo"} == set(table["label_smoothing"].values)
    assert {*readers(found, "self.simpo_gamma"), "alphapo"} == set(table["simpo_gamma"].values)
    alphapo = CPOConfig(loss_type="alphapo", cpo_alpha=0.7, use_cpu=True, bf16=False)
    assert alphapo.loss_type == "simpo" and alphapo.cpo_alpha == 0


def test_what_ours_of_pairs_leave_of_dpo_is_refused():
    """Every argument of DPO is of its rows and steps, which are ours, too, or of its losses and its reference."""
    from trl import DPOConfig
    from trl.trainer.base_config import _BaseConfig

    own = {field.name for field in dataclasses.fields(DPOConfig)} - {f.name for f in dataclasses.fields(_BaseConfig)}
    shared = {"model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc",
              "max_length", "truncation_mode", "padding_free", "pad_to_multiple_of", "activation_offloading",
              "pad_token"}  # fmt: skip
    assert own == shared | {"beta", "label_smoothing", "loss_type"} | set(settings.NO_REFERENCE)


def test_label_smoothing_factor_is_read_by_sft_alone():
    from trl import SFTTrainer

    trainers = [methods.trainer_class(recipe) for recipe in methods.METHODS if recipe != "sft"]
    trainers += [methods.trainer_class(recipe, target) for target, (recipe, _) in TRLS_OWN.items()]
    for trainer in trainers:
        modules = {each.__module__ for each in trainer.__mro__ if each.__module__.startswith(("trl", "rlhf"))}
        inherited = [inspect.getsource(sys.modules[name]) for name in modules]
        assert not any("label_smoother" in text for text in inherited)
    assert 'self.label_smoother is not None and self.args.loss_type == "nll"' in inspect.getsource(SFTTrainer)


def test_schedules_that_warm_up_are_those_of_transformers():
    import torch
    from transformers import SchedulerType, get_scheduler

    options = {"warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr": 0.0},
               "cosine_warmup_with_min_lr": {"min_lr": 0.0}}  # fmt: skip
    warmed = set()
    for name in (each.value for each in SchedulerType):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        get_scheduler(name, optimizer, 5, 10, scheduler_specific_kwargs=options.get(name))
        warmed |= {name} if optimizer.param_groups[0]["lr"] < 1 else set()
    assert warmed == set(settings.WARMED_UP)


def test_defaults_are_those_of_the_classes():
    for target, table in READ.items():
        if target in methods.TRLS_OWN and target not in TRLS_OWN:
            continue
        kind = config.guard.find_class(target, "trainer")
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        own = {key: reads.default for key, reads in table.items() if key in fields}
        assert own == {key: fields[key] for key in own}, target
        assert all(table[key].instead for key in table.keys() - own.keys())  # of another library's class
        assert {reads.by for reads in table.values()} - {""} <= set(fields)


# ---- what the model's config says


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("lora.target_modules=[q_proj,v_porj]", "lora.target_modules: {} has no module v_porj; did you mean 'v_pr"),
        ("model.lora_targets=[q_proj,query]", "model.lora_targets: {} has no module query. Its layers end in"),
        ("lora.target_modules=.*language.*", "lora.target_modules: {} has no module .*language.*"),
        ("lora.target_modules=(q_proj", "lora.target_modules: (q_proj is no regular expression ("),
        ("lora.target_modules=[q_proj,mlp]", "lora.target_modules: mlp is no layer that LoRA can be put on."),
        ("lora.exclude_modules=[o_prj]", "lora.exclude_modules: {} has no module o_prj; did you mean 'o_proj'?"),
        ("lora.modules_to_save=[embed_token]", "lora.modules_to_save: {} has no module embed_token; did you mean"),
        ("lora.rank_pattern={q_prj:4}", "lora.rank_pattern: {} has no module q_prj; did you mean 'q_proj'?"),
        ("lora.target_modules=[q_proj] lora.layers_to_transform=[0,2]",
         "lora.layers_to_transform: {} has layers 0 to 1, not 2."),
        ("lora.target_modules=[q_proj,layers.0.mlp.up_proj]", None),
        ("lora.target_modules=.*(q|v)_proj lora.rank_pattern.up_proj=4", None),
        ("lora.modules_to_save=[score,embed_tokens]", None),
        ("lora.target_modules=[q_proj,v_porj] model.adapter=sft", None),  # continued as it is: settings refuses it
    ],
)  # fmt: skip
def test_modules_that_the_model_does_not_have(compose, tiny_model_overrides, overrides, says):
    from rlhf_recipes import models

    cfg = compose("dpo", *tiny_model_overrides, "quantization=none", *map(quoted, overrides.split()))
    if says is None:
        models.check(cfg.model, cfg.quantization, cfg.lora)
        return
    with pytest.raises(Refusal) as caught:
        models.check(cfg.model, cfg.quantization, cfg.lora)
    assert str(caught.value).startswith(says.format(cfg.model.id))


def test_a_folder_is_the_model_of_its_id(compose, tiny_model):
    from rlhf_recipes import models

    cfg = compose("dpo", f"model.path={tiny_model}", "quantization=none")
    with pytest.raises(Refusal) as caught:
        models.check(cfg.model, cfg.quantization, cfg.lora)
    assert str(caught.value) == (
        f"model.path={tiny_model}: has hidden_size 64, and model.id={cfg.model.id} has 576. Say which "
        "model it is, for what is trained on it bears that name: model.id=<its public name>."
    )


CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize(
    ("model", "tokenizer", "says"),
    [
        (CLASSIFIER, {"chat_template": "{{ messages }}"}, None),
        (
            {"architectures": CLASSIFIER["architectures"]},
            {"chat_template": "x"},
            "gives 2 values for a text, a reward",
        ),
        (CLASSIFIER | {"id2label": {"0": "a", "1": "b", "2": "c"}}, {"chat_template": "x"}, "gives 3 values"),
        (CLASSIFIER | {"architectures": ["LlamaForCausalLM"]}, {"chat_template": "x"}, "is a LlamaForCausalLM, which"),
        (CLASSIFIER, {}, "its tokenizer has no chat template"),
        (CLASSIFIER, None, "its tokenizer has no chat template"),
    ],
)
def test_a_model_that_is_no_reward_model(tmp_path, model, tokenizer, says):
    (tmp_path / "config.json").write_text(json.dumps(model))
    if tokenizer is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if says is None:
        assert references.find_reward(str(tmp_path)).kind == references.MODEL
        return
    with pytest.raises(Refusal) as caught:
        references.find_reward(str(tmp_path))
    assert str(caught.value).startswith(f"reward_funcs={tmp_path}: {says}")
    if tokenizer == {}:
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        assert references.find_reward(str(tmp_path))


# ---- adapters that name another base


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """foreign(shapes, **config): an adapter from elsewhere in the current folder's `bought`."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)

    def made(shapes, **changes):
        folder = tmp_path / "bought"
        folder.mkdir()
        named = {"base_model_name_or_path": "somebody/tiny-bnb-4bit", "task_type": "CAUSAL_LM", "r": 4} | changes
        (folder / "adapter_config.json").write_text(json.dumps(named))
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
        return folder

    return made


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
FITTING = {f"{Q}A.weight": (4, 64), f"{Q}B.weight": (64, 4)}


def test_an_adapter_that_names_another_base_is_refused_unless_it_is_said_to_be_the_same(compose, foreign):
    from rlhf_recipes.cai.load import find_judge_adapter

    foreign(FITTING)
    for key, find in (("model.adapter", references.find), ("runs", references.find_policy)):
        with pytest.raises(Refusal) as caught:
            find("bought", key, TINY_ID)
        assert str(caught.value).endswith(
            "If these are the same weights under another name, add model.adapter_base=same."
        )
        found = find("bought", key, TINY_ID, "same")
        assert (found.base, found.named_base) == (TINY_ID, "somebody/tiny-bnb-4bit")
        assert found.lineage["named_base"] == "somebody/tiny-bnb-4bit"
    assert references.find_rewards("bought")[0].base == "somebody/tiny-bnb-4bit"
    assert references.find_rewards("bought", TINY_ID, "same")[0].named_base == "somebody/tiny-bnb-4bit"
    judge = compose("cai", "judge.adapter=bought", "model.adapter_base=same", f"model.id={TINY_ID}").judge
    assert find_judge_adapter(judge).base == TINY_ID
    assert "named_base" not in references.find("bought", "model.adapter", "somebody/tiny-bnb-4bit", "same").lineage


@pytest.mark.parametrize(
    ("shapes", "config", "says"),
    [
        (FITTING, {}, None),
        (FITTING, {"base_model_name_or_path": "/data/models/tiny"}, None),
        (FITTING, {"base_model_name_or_path": None}, None),
        ({f"{Q}A.weight": (4, 96), f"{Q}B.weight": (64, 4)}, {}, "of shape [4, 96], {} has in_features=64."),
        ({f"{Q}A.weight": (4, 64), f"{Q}B.weight": (32, 4)}, {}, "of shape [32, 4], {} has out_features=64."),
        ({f"{Q.replace('.1.', '.2.')}A.weight": (4, 64)}, {}, "of shape [4, 64], {} has no such module."),
        (FITTING, {"base_model_name_or_path": "base"}, None),
        (FITTING, {"base_model_name_or_path": "other"}, "the base of bought, has vocab_size 7, and {} has "),
    ],
)
def test_what_is_said_to_be_the_same_must_fit(
    compose, foreign, tiny_model, tiny_model_overrides, tmp_path, capsys, shapes, config, says
):
    from rlhf_recipes import models

    foreign(shapes, **config)
    ours = json.loads((tiny_model / "config.json").read_text())
    for name, changes in (("base", {}), ("other", {"vocab_size": 7})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(ours | changes))
    cfg = compose("dpo", *tiny_model_overrides, "model.adapter=bought", "model.adapter_base=same", "quantization=none")
    if says:
        with pytest.raises(Refusal) as caught:
            models.check(cfg.model, cfg.quantization, cfg.lora)
        assert str(caught.value).startswith("model.adapter_base=same: ") and says.format(TINY_ID) in str(caught.value)
        return
    models.check(cfg.model, cfg.quantization, cfg.lora)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "taken for tests/tiny as you say (model.adapter_base=same)" in out
    assert ("and the config of that base" in out) == (config.get("base_model_name_or_path") == "base")


@pytest.mark.parametrize("packed", ["nf4", "fp4", "int8", "whole"])
def test_the_weights_of_a_base_at_hand_are_compared(
    compose, foreign, tiny_model, tiny_model_overrides, capsys, packed
):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from rlhf_recipes import models

    ways = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
        "int8": {"load_in_8bit": True},
    }
    how = {"quantization_config": BitsAndBytesConfig(**ways[packed])} if packed in ways else {"dtype": torch.float16}
    foreign(FITTING, base_model_name_or_path="base")
    cfg = compose("dpo", *tiny_model_overrides, "model.adapter=bought", "model.adapter_base=same", "quantization=none")
    AutoModelForCausalLM.from_pretrained(tiny_model, **how).save_pretrained("base")
    models.check(cfg.model, cfg.quantization, cfg.lora)
    assert "8 of its matrices were compared" in capsys.readouterr().out

    trained = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    for parameter in trained.parameters():
        parameter.data += 0.01 * parameter.data.std(correction=0) * torch.randn_like(parameter)
    trained.save_pretrained("trained")
    AutoModelForCausalLM.from_pretrained("trained", **how).save_pretrained("base")
    with pytest.raises(Refusal, match=rf"base, the base of bought, has other weights than {TINY_ID}: model\.\S+ \("):
        models.check(cfg.model, cfg.quantization, cfg.lora)


def test_it_is_continued_and_written_for_the_real_base(foreign, train, tmp_path, capsys):
    from rlhf_recipes.evaluation import measure
    from rlhf_recipes.references import find

    shapes = {name.replace(".1.", f".{layer}."): shape for layer in (0, 1) for name, shape in FITTING.items()}
    foreign(shapes, peft_type="LORA", lora_alpha=8, target_modules=["q_proj"])
    same = ("model.adapter=bought", "model.adapter_base=same", "quantization=none")
    made = train("dpo", tmp_path / "outputs", *same)
    assert capsys.readouterr().out.count("taken for tests/tiny as you say (model.adapter_base=same)") == 1
    assert made.result["parent"]["named_base"] == "somebody/tiny-bnb-4bit"
    written = json.loads((made.dir / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == TINY_ID and written["target_modules"] == ["q_proj"]
    assert "names the base `somebody/tiny-bnb-4bit`. That it is the same is" in (made.dir / "README.md").read_text()
    assert find("outputs", "run", TINY_ID).named_base is None
    assert [each.name for each in measure.find(["bought", "outputs"], "base", TINY_ID, adapter_base="same")][1:]


def test_the_key_is_no_part_of_a_run_that_does_not_set_it(compose, refusal):
    from rlhf_recipes import run

    config = run.resolved(compose("dpo"))
    before = {**config, "model": {key: value for key, value in config["model"].items() if key != "adapter_base"}}
    assert config_sha256(config) == config_sha256(before)
    assert config_sha256(run.resolved(compose("dpo", "model.adapter_base=same"))) != config_sha256(config)
    assert refusal("dpo", "model.adapter_base=other").startswith(
        "model.adapter_base=other: must be same, or left out."
    )


def test_the_card_says_whose_word_it_is():
    from rlhf_recipes.training.card import chain

    parent = {"recipe": None, "adapter_sha256": "ab" * 32, "parent": None, "named_base": "x/y-bnb-4bit"}
    said = chain("org/base", {"recipe": "dpo", "adapter_sha256": "cd" * 32, "parent": parent})
    assert "`abababababab` names the base `x/y-bnb-4bit`. That it is the same is the word of whoever ran this" in said
    assert "names the base" not in chain("org/base", {"recipe": "dpo", "adapter_sha256": "cd", "parent": None})
