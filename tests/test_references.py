"""What a string names: each kind once, and each refusal under the key that was typed."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from conftest import TINY_ID, weights, write_adapter
from omegaconf import OmegaConf

from rlhf_recipes import lineage, references, run_folder
from rlhf_recipes.evaluation import measure
from rlhf_recipes.launch.refusals import as_refusal
from rlhf_recipes.references import ADAPTER, FUNCTION, HUB, MODEL, ModelRef

SHA = hashlib.sha256(weights()).hexdigest()  # of write_adapter's
OF_SFT = {"run": "sft", "recipe": "sft", "adapter_sha256": SHA, "parent": None}
SCALE = {"mean_reward": {"value": 0.5}}


def write_weights(folder, **config):
    """An adapter without a run around it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": TINY_ID, **config}))
    (folder / "adapter_model.safetensors").write_bytes(weights())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: runs of sft, of dpo and ppo on it, and of reward; an ensemble; an adapter from elsewhere."""
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "sft", recipe="sft", parent=None)
    write_adapter(tmp_path / "dpo", recipe="dpo", parent=OF_SFT, steps=4)
    write_adapter(tmp_path / "reward", recipe="reward", parent=None, metrics=SCALE)
    for name in ("b", "a"):
        write_adapter(tmp_path / "ensemble" / name, recipe="reward")
        (tmp_path / "ensemble" / name / "config.yaml").write_text("run_name: x\n")
    write_weights(tmp_path / "bought", task_type="SEQ_CLS")
    write_adapter(tmp_path / "ppo", recipe="ppo", parent=OF_SFT, steps=4)
    trainer = {"_target_": "rlhf_recipes.ppo.PPOConfig"}
    config = {"model": {"id": TINY_ID, "adapter": "sft"}, "trainer": trainer, "reward_funcs": ["reward"]}
    (tmp_path / "ppo" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    for step in (10, 2):
        write_weights(tmp_path / "ppo" / "checkpoints" / f"checkpoint-{step}")
    return tmp_path


def refusal(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value) and as_refusal(caught.value)
    return str(caught.value)


def test_a_run_folder_is_its_adapter(here):
    found = references.find("dpo", "model.adapter", TINY_ID)
    assert found == ModelRef(
        "dpo", "model.adapter", ADAPTER, Path("dpo/adapter"), TINY_ID, None, SHA, "dpo",
        "sft", OF_SFT, start_sha256=SHA,
    )  # fmt: skip
    assert found.lineage == {"run": "dpo", "recipe": "dpo", "adapter_sha256": SHA, "parent": OF_SFT}
    assert (found.name, str(found.start), found.is_reward_model) == ("dpo", "sft/adapter", False)


def test_the_folder_of_an_adapter_is_the_same_adapter(here):
    by_run, by_folder = (references.find(each, "runs", TINY_ID) for each in ("dpo", "dpo/adapter"))
    assert by_folder.adapter == by_run.adapter and by_folder.lineage == by_run.lineage | {"run": "dpo/adapter"}


def test_an_adapter_from_elsewhere_has_no_run(here):
    found = references.find("bought", "reward_model", TINY_ID)
    assert (found.recipe, found.parent, found.start, found.metrics, found.name) == (None, None, None, {}, "bought")
    assert found.is_reward_model and found.sha256 == SHA


def test_a_checkpoint_is_an_adapter_with_its_step(here):
    for reference in ("ppo", "ppo/checkpoints"):
        found = references.find_checkpoints(reference, TINY_ID)
        assert [(each.step, str(each.adapter)) for each in found] == [
            (step, f"ppo/checkpoints/checkpoint-{step}") for step in (2, 10)
        ]
        assert {(each.recipe, str(each.start), each.sha256) for each in found} == {("ppo", "sft/adapter", SHA)}
    assert references.find("ppo/checkpoints/checkpoint-2", "runs", TINY_ID).sha256 == SHA


def test_a_checkpoint_that_is_named_is_that_of_its_run(here):
    """It is measured against what its run started from, whichever key names it."""
    rewrite(here / "ppo/result.json", rewards=["b" * 64])
    (here / "ppo/checkpoints/checkpoint-2/trainer_state.json").write_text("{}")
    for rewards, parent in ((["b" * 64], OF_SFT), (None, OF_SFT)):
        first = references.find_checkpoints("ppo", TINY_ID)[0]
        assert (first.started_from, first.rewards, first.parent) == ("sft", rewards, parent)
        given = "ppo/checkpoints/checkpoint-2"
        found = references.find_policy(given, "runs", TINY_ID)
        # of a curve are those that `checkpoints` names
        assert found == dataclasses.replace(first, reference=given, key="runs", step=None)
        assert [(each.name, each.reference) for each in measure.find([given], "base", TINY_ID)] == [
            ("base", None),
            ("ppo/checkpoint-2", "sft/adapter"),
        ]
        (here / "ppo/result.json").unlink(missing_ok=True)  # of a run that is not finished
    (here / "ppo/config.yaml").write_text("model: mine\ntrainer: {}\n")
    found = references.find(given, "runs", TINY_ID)
    assert (found.recipe, found.start) == (None, None)


def test_checkpoints_are_refused_whose_start_was_trained_again(here):
    path = here / "ppo" / "config.yaml"
    config = path.read_text()

    def began_from(sha256):
        read = json.dumps({"model.adapter=sft": sha256})
        path.write_text(f"# of a run\n{run_folder.INPUTS}: {read}\n{config}")

    began_from(SHA)
    assert len(references.find_checkpoints("ppo", TINY_ID)) == 2
    began_from("0" * 64)
    says = "checkpoints=ppo: was trained against sft, whose weights are others since"
    assert refusal(references.find_checkpoints, "ppo", TINY_ID).startswith(says)


def test_the_folder_of_an_ensemble_is_its_members(here):
    both = ["ensemble/a", "ensemble/b"]
    found = references.find_reward_models("ensemble", "gold", TINY_ID)
    assert [each.reference for each in found] == both and {each.recipe for each in found} == {"reward"}
    assert [each.reference for each in references.find_rewards(["ensemble", "reward"])] == [*both, "reward"]
    assert references.expand(["sft", "nowhere", "json:loads"], "runs") == ["sft", "nowhere", "json:loads"]
    assert references.find_reward_models(None, "reward_model", TINY_ID) == []
    (here / "ensemble" / "rows").mkdir()  # a sweep's own, no job
    assert references.jobs_of("ensemble") == [Path(each) for each in both]


def test_what_rewards_is_an_adapter_a_model_a_function_or_an_id(here):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text("{}")
    given = ["reward", "bought", "model", "json:loads", "org/name", "gpt2"]
    found = references.find_rewards(given)
    assert [each.kind for each in found] == [ADAPTER, ADAPTER, MODEL, FUNCTION, HUB, HUB]
    assert [each.reference for each in found] == given and {each.key for each in found} == {"reward_funcs"}
    assert found[3].function is json.loads and found[0].metrics == SCALE


def test_the_proxy_of_a_run_is_its_reward_model_or_none(here):
    assert measure.find_proxy("ppo", TINY_ID).name == "reward"
    assert measure.find_proxy("ppo", "org/other") is None
    for rewards in ("sft", "nowhere", "json:loads", ["reward", "bought"], "ensemble", None):
        OmegaConf.save({"model": {}, "trainer": {}, "reward_funcs": rewards}, here / "ppo" / "config.yaml")
        assert measure.find_proxy("ppo", TINY_ID) is None


@pytest.mark.parametrize(
    ("policy", "scorer", "parent", "optimised"),
    [
        ("ppo", "reward", None, True),
        ("ppo/adapter", "reward/adapter", None, True),  # by the folder of the adapter
        ("ppo", "copied", None, True),  # the same weights under another name
        ("ppo", "ensemble", None, True),  # which contains it
        ("ppo", "other", None, False),
        ("later", "reward", None, True),  # what continues the run
        ("later", "reward", "ppo", False),  # and of the two the earlier one is the parent: nothing was optimised since
        ("recorded", "gone", None, True),  # the result says so, whatever its config names
        ("sft", "reward", None, False),
        ("checkpoints", "reward", None, True),
    ],
)
def test_who_was_trained_on_the_reward_that_judges(here, policy, scorer, parent, optimised):
    def weigh(folder, name):
        (here / folder / "adapter" / "adapter_model.safetensors").write_bytes(weights(name))

    for name in ("copied", "other", "gone"):
        write_adapter(here / name, recipe="reward", parent=None)
    of_ppo = {"run": "ppo", "recipe": "ppo", "adapter_sha256": SHA, "parent": OF_SFT}
    write_adapter(here / "later", recipe="dpo", parent=of_ppo)
    gone = hashlib.sha256(weights("gone")).hexdigest()
    write_adapter(here / "recorded", recipe="ppo", parent=OF_SFT, rewards=[gone])
    weigh("gone", "gone")
    weigh("other", "other")
    for folder in ("reward", "copied", "ensemble/a"):
        weigh(folder, "a reward")
    weigh("ensemble/b", "b")
    if policy == "checkpoints":
        systems = measure.find([], "base", TINY_ID, "ppo")
    else:
        systems = measure.find([policy], parent or "base", TINY_ID)
    scorers = measure.find_scorer(scorer, TINY_ID)
    found = measure._optimised(systems[-1], systems[0], scorers)
    assert found == ({"optimised": [scorers[0].name]} if optimised else {})


@pytest.mark.parametrize(
    ("policy", "parent", "by", "judges"),
    [
        ("dpo", None, "judge", ["a judge"]),
        ("dpo/adapter", None, "judge", ["a judge"]),
        ("later", None, "judge", ["a judge"]),  # what continues the run
        ("later", "dpo", "judge", []),  # and that is the parent
        ("ppo", None, "judge", ["a judge"]),  # by way of its reward model
        ("dpo", None, "construction", []),
        ("sft", None, "judge", []),
    ],
)
def test_who_was_trained_on_what_a_judge_labelled(here, policy, parent, by, judges):
    (here / "cai").mkdir()
    (here / "cai" / "result.json").write_text(json.dumps({"recipe": "cai", "judge": "a judge", "labelled_by": by}))
    of_dpo = {"run": "dpo", "recipe": "dpo", "adapter_sha256": SHA, "parent": OF_SFT}
    write_adapter(here / "later", recipe="sft", parent=of_dpo)
    for folder, more in (("dpo", {}), ("reward", {}), ("ppo", {"reward_funcs": "reward", "data": {"path": "org/x"}})):
        OmegaConf.save({"model": {}, "trainer": {}, "data": {"path": "cai"}} | more, here / folder / "config.yaml")
    systems = measure.find([policy], parent or "base", TINY_ID)
    assert measure._optimised(systems[-1], systems[0], []) == ({"labelled_by": judges} if judges else {})


def test_pairs_that_were_taken_over_count_as_those_of_their_judge(here):
    """A function labelled `two`, nobody `three`; both have the pairs of `one`, by a reward model that learned from
    `zero`."""

    def made(name, judge, by, earlier=()):
        (here / name).mkdir()
        (here / name / "result.json").write_text(
            json.dumps({"recipe": "cai", "judge": judge["kind"], "labelled_by": by})
        )
        OmegaConf.save({"judge": judge, "earlier": list(earlier)}, here / name / "config.yaml")

    scored = {"kind": "reward", "reward_model": "reward"}
    made("zero", {"kind": "local"}, "judge")
    OmegaConf.save({"data": {"path": "zero"}}, here / "reward" / "config.yaml")
    made("one", scored, "judge")
    made("two", {"kind": "function", "function": "m:f"}, "judge", ["one"])
    made("three", scored, "construction", ["one", "gone"])
    for data, judges in (("two", {"function", "reward", "local"}), ("three", {"reward", "local"})):
        OmegaConf.save({"model": {}, "trainer": {}, "data": {"path": data}}, here / "dpo" / "config.yaml")
        found = references.find("dpo", "runs")
        assert lineage.trained_on(found) == {(SHA, SHA)}
        assert lineage.labelled_by(found) == {(SHA, judge) for judge in judges}


def test_gold_that_a_run_was_trained_on_is_known(here):
    from rlhf_recipes.audit import answers

    assert answers.find_run("ppo", TINY_ID).rewards == {SHA}
    config = OmegaConf.load("ppo/config.yaml")
    config.reward_funcs, config.trainer.reward_weights = ["json:loads", "reward"], [1.0, 0.0]
    OmegaConf.save(config, here / "ppo" / "config.yaml")
    assert answers.find_run("ppo", TINY_ID).rewards == {"json:loads"}
    # by the folder of a checkpoint, too, which has no result; and whatever stands in a config of somebody else's
    assert {each for _, each in lineage.trained_on(references.find("ppo/checkpoints/checkpoint-2", "runs"))} == {
        "json:loads"
    }
    for broken in ({"a": 1}, [1, None], None, 3):
        OmegaConf.save({"model": {"id": TINY_ID, "adapter": "ppo"}, "trainer": {}, "reward_funcs": broken},
                       here / "ppo" / "config.yaml")  # fmt: skip
        assert lineage.trained_on(references.find("ppo", "runs")) == frozenset()


RUN = "Give a run folder such as outputs/sft/main."
REFUSED = {
    "nothing there": (
        lambda: references.find("nowhere", "judge.adapter"),
        f"judge.adapter=nowhere: does not exist. {RUN}",
    ),
    "no adapter in it": (
        lambda: references.find("ensemble", "model.adapter"),
        f"model.adapter=ensemble: has no adapter in it (is the run finished?). {RUN}",
    ),
    "another base": (
        lambda: references.find("sft", "model.adapter", "org/a"),
        f"model.adapter=sft: was trained on {TINY_ID}, not on model.id=org/a. Choose the model it belongs to.",
    ),
    "another base of the judge": (
        lambda: references.find("sft", "judge.adapter", "org/a"),
        f"judge.adapter=sft: was trained on {TINY_ID}, not on judge.id=org/a. Choose the model it belongs to.",
    ),
    "another base of a run": (
        lambda: measure.find(["sft"], "base", "org/a"),
        f"runs=sft: was trained on {TINY_ID}, not on model.id=org/a. Choose the model it belongs to.",
    ),
    "a reward model as a policy": (
        lambda: references.find_policy("reward", "parent", TINY_ID),
        "parent=reward: is a run of reward, not a policy; a reward model goes to reward_model=.",
    ),
    "a policy as gold": (
        lambda: references.find_reward_models("sft", "gold", TINY_ID),
        "gold=sft: is a run of sft, not a run of recipes/reward.py.",
    ),
    "a policy as a reward": (
        lambda: references.find_rewards("sft"),
        "reward_funcs=sft: is a run of sft. Give one of recipes/reward.py.",
    ),
    "a reward that is not there": (
        lambda: references.find_rewards("a/b/c"),
        "reward_funcs=a/b/c: no such folder. Give a run of recipes/reward.py, a folder with a model, "
        "module:function, or an id of the Hub.",
    ),
    "a function that is not there": (
        lambda: references.find_rewards("json:lods"),
        "reward_funcs=json:lods: cannot be imported",
    ),
    "no rewards": (lambda: references.find_rewards([]), "reward_funcs: empty."),
    "one reward model twice": (
        lambda: references.find_reward_models(["reward", "reward"], "reward_model", TINY_ID),
        "reward_model=['reward', 'reward']: must name one run or more, each once. Change the list.",
    ),
    "no reward model": (
        lambda: references.find_reward_models([], "reward_model", TINY_ID),
        "reward_model=[]: must name one run or more, each once. Change the list.",
    ),
    "no checkpoints": (
        lambda: references.find_checkpoints("sft", TINY_ID),
        "checkpoints=sft: is no run of a training.",
    ),
    "checkpoints on another base": (
        lambda: references.find_checkpoints("ppo", "org/a"),
        f"checkpoints=ppo: was trained on {TINY_ID}, not on model.id=org/a. Choose the model it belongs to.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_has_the_key_that_was_typed(here, case):
    call, says = REFUSED[case]
    assert refusal(call).startswith(says)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGED = {
    "pickled weights": (
        lambda dpo: (dpo / "adapter/adapter_model.safetensors").rename(dpo / "adapter/adapter_model.bin"),
        "runs=dpo: has no adapter_model.safetensors; adapter_model.bin is a pickle, which can run code.",
    ),
    "code": (
        lambda dpo: rewrite(dpo / "adapter/adapter_config.json", megatron_config={}),
        "runs=dpo: its megatron_config names a module that PEFT would import.",
    ),
    "no base": (
        lambda dpo: rewrite(dpo / "adapter/adapter_config.json", base_model_name_or_path=None),
        f"runs=dpo: was trained on None, not on model.id={TINY_ID}.",
    ),
    "half a file": (lambda dpo: (dpo / "result.json").write_text('{"recipe": '), "dpo/result.json: not valid JSON ("),
    "parents that are none": (
        lambda dpo: rewrite(dpo / "result.json", parent={"run": 3}),
        "runs=dpo: dpo/result.json does not say which runs it comes from (recipe, adapter_sha256 and parent of each).",
    ),
    "a name that is none": (
        lambda dpo: rewrite(dpo / "result.json", parent=OF_SFT | {"run": 3}),
        "runs=dpo: dpo/result.json does not say which runs it comes from",
    ),
    "its reference gone": (
        lambda dpo: (dpo.parent / "sft").rename(dpo.parent / "moved"),
        "runs=dpo: started from sft, its reference, which is not there. Put that run back",
    ),
    "its reference trained again": (
        lambda dpo: rewrite(dpo / "result.json", parent=OF_SFT | {"adapter_sha256": "0" * 64}),
        f"runs=dpo: was trained against sft, whose weights are others since (SHA-256 000000000000, then {SHA[:12]}).",
    ),
    "its other reference trained again": (
        lambda dpo: rewrite(dpo / "result.json", reference={"run": "ppo", "adapter_sha256": "0" * 64}),
        "runs=dpo: was trained against ppo, whose weights are others since",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_is_refused_in_one_line(here, case):
    change, says = DAMAGED[case]
    change(here / "dpo")
    assert refusal(references.find_policy, "dpo", "runs", TINY_ID).startswith(says)


def test_an_adapter_without_a_base_is_refused_where_any_base_would_do(here):
    rewrite(here / "reward/adapter/adapter_config.json", base_model_name_or_path=None)
    assert refusal(references.find_rewards, "reward").startswith(
        "reward_funcs=reward: its adapter_config.json names no"
    )


def test_an_unfinished_member_is_refused_by_name(here):
    (here / "ensemble" / "b" / "result.json").unlink()
    for call, key in (
        (lambda: references.find_rewards("ensemble"), "reward_funcs"),
        (lambda: references.find_reward_models("ensemble", "gold", TINY_ID), "gold"),
    ):
        assert refusal(call) == f"{key}=ensemble: b is not finished. Finish it, or list the others."


def test_a_run_keeps_what_it_continues(here, compose, tiny_model_overrides):
    """`model.adapter` is looked up when the run starts; what is passed on does not follow the folder."""
    from rlhf_recipes.run import Run

    run = Run.start(compose("simpo", *tiny_model_overrides, "model.adapter=dpo"), "simpo")
    (here / "dpo" / "adapter" / "adapter_model.safetensors").write_bytes(weights("others"))
    assert run.parent == references.ModelRef(
        "dpo", "model.adapter", adapter=run.parent.adapter, base=TINY_ID, sha256=SHA, recipe="dpo",
        started_from="sft", parent=OF_SFT, start_sha256=SHA,
    )  # fmt: skip


def test_what_a_sweep_keeps_is_read_or_refused(tmp_path):
    """The measurements before a training, which the jobs of a sweep share."""
    from rlhf_recipes.run import Run

    config = {key: {} for key in ("model", "quantization", "lora")} | {"trainer": {"seed": 0}}
    run = Run(tmp_path / "job", "dpo", config, shared=tmp_path / "shared")
    assert run.cached([{"prompt": "p"}], lambda: [1.5]) == [1.5]
    assert run.cached([{"prompt": "p"}], lambda: [2.5]) == [1.5] and run.cached([], lambda: [3.5]) == [3.5]
    (path,) = [each for each in (tmp_path / "shared").iterdir() if "1.5" in each.read_text()]
    for text, says in (("[1.", "not valid JSON ("), ("{}", "is no JSON list. Restore it.")):
        path.write_text(text)
        assert refusal(run.cached, [{"prompt": "p"}], list).startswith(f"{path}: {says}")
