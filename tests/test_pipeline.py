"""What a pipeline keeps, refuses and says; its stages are stood in for."""

import json
import shutil

import pytest
from conftest import weights, write_adapter
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from rlhf_recipes import run, run_folder
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import keys, pipeline

ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "clusters": 9}
STAGES = "stages=[{name:sft,recipe:sft},{name:dpo,recipe:dpo,overrides:['model.adapter={dir}/sft']}]"
SFT_DIR, DPO_DIR = "outputs/pipeline/main/sft", "outputs/pipeline/main/dpo"


@pytest.fixture
def planned(compose, tmp_path, monkeypatch):
    """planned(*overrides): the plan of a pipeline in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.forks, "prepare", lambda environment: None)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"runtime": {"output_dir": "unread"}}))

    def plan(*overrides):
        cfg = compose("pipeline", *overrides)
        keys.check(cfg, "pipeline")
        made = pipeline.plan(cfg)
        made.lock.release()
        return made

    return plan


def finish(stage, name="old figure"):
    """What a stage leaves that is finished, as far as a pipeline reads it."""
    given = run.resolved(stage.cfg)
    main = {"name": name, "before": None, "after": ESTIMATE}
    result = {"main": main, "seconds": 1, "peak_memory_gib": {"process": 1.0}, "config_sha256": stage.config_sha256}
    shutil.rmtree(stage.dir, ignore_errors=True)
    write_adapter(stage.dir, recipe=stage.recipe, **result)
    inputs = f"{run_folder.INPUTS}: {json.dumps(run.inputs_of(given))}\n"
    run_folder.mark(stage.dir, stage.recipe, inputs + OmegaConf.to_yaml(OmegaConf.create(given)))


def test_a_stage_is_kept_while_what_it_was_made_from_is_there(planned, tmp_path):
    for stage in planned(STAGES).stages:
        finish(stage)
    assert [stage.status for stage in planned(STAGES).stages] == ["finished", "finished"]
    with pytest.raises(
        Refusal, match=rf"^stages\.dpo: trainer\.beta=0\.7: {DPO_DIR} was made with trainer\.beta=0\.1"
    ):
        planned(STAGES.replace("/sft'", "/sft','trainer.beta=0.7'"))

    other = rf"^stages\.dpo: {DPO_DIR} was made from another model\.adapter={SFT_DIR}\. Remove it, or make all"
    (tmp_path / SFT_DIR / "adapter" / "adapter_model.safetensors").write_bytes(weights() + b"other")
    with pytest.raises(Refusal, match=other):
        planned(STAGES)
    shutil.rmtree(tmp_path / SFT_DIR)
    with pytest.raises(Refusal, match=other):
        planned(STAGES)
    shutil.rmtree(tmp_path / DPO_DIR)
    assert [stage.status for stage in planned(STAGES).stages] == ["pending", "pending"]


def test_an_old_result_is_not_that_of_a_stage_that_failed(planned, monkeypatch, capsys):
    """As where it is refused before it has set the old run aside."""
    for stage in planned(STAGES).stages:
        finish(stage)
    monkeypatch.setattr(pipeline, "_run", lambda *_: (2, 0.1))
    plan = planned(STAGES, "overwrite=true")
    assert pipeline.execute(plan) == 2
    pipeline.print_summary(plan, [])
    said = capsys.readouterr().out
    assert "old figure" not in said and "adapter " not in said
    written = json.loads((plan.dir / pipeline.SUMMARY).read_text())["stages"]
    assert [(stage["status"], stage["ran"]) for stage in written] == [("failed", True), ("pending", False)]

    monkeypatch.setattr(pipeline, "_run", lambda stage, *_: (finish(stage, "new figure") or 0, 0.1))
    plan = planned(STAGES, "overwrite=true")
    assert pipeline.execute(plan) == 0
    pipeline.print_summary(plan, [])
    said = capsys.readouterr().out
    assert "old figure" not in said and "new figure" in said and f"adapter  {DPO_DIR}/adapter" in said


def test_what_was_not_made_again_is_not_kept_beside_what_was(planned, monkeypatch):
    """An evaluation does not record what it read: that it is older is known of the start that was to replace it."""
    stages = "stages=[{name:sft,recipe:sft},{name:judged,recipe:evaluate,overrides:['runs=[{dir}/sft]']}]"
    for stage in planned(stages).stages:
        finish(stage)

    def killed_in(name):
        def ran(stage, *_):
            if stage.name == "sft":
                finish(stage)
            if stage.name == name:
                raise MemoryError
            return 0, 0.1

        return ran

    for last in ("judged", "sft"):  # before its own result, and before it is told that the first one is finished
        monkeypatch.setattr(pipeline, "_run", killed_in(last))
        with pytest.raises(MemoryError):
            pipeline.execute(planned(stages, "overwrite=true"))
        other = rf"^stages\.judged: .*/judged was made from another runs={SFT_DIR}\. Remove it"
        with pytest.raises(Refusal, match=other):
            planned(stages)
        finish(planned(stages, "overwrite=true").stages[1])
        kept = planned(stages)
        assert [stage.status for stage in kept.stages] == ["finished", "finished"]
        pipeline.execute(kept)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stages=[{name:1,recipe:sft}]"], "stages.name=1: must be text."),
        (["stages=[{name:a,recipe:null}]"], "stages.a.recipe=null: must be text."),
        (["stages=[{name:a,recipe:sft,overrides:null}]"], "stages.a.overrides=null: must be a list [a,b]."),
        (["stages=[{name:a,recipe:sft,overrides:'seed=6'}]"], "stages.a.overrides=seed=6: must be a list [a,b]."),
        (
            ["stages=[{name:a,recipe:sft,overrides:[{data.eval_size:6}]}]"],
            "stages.a.overrides: {'data.eval_size': 6} must be key=value, a text. Write data.eval_size=6.",
        ),
        (["stages=[{name:a,recipe:sft,overrides:[6]}]"], "stages.a.overrides: 6 must be key=value, a text. Write"),
        (["stages=[]", "shared=[{data.eval_size:6}]"], "shared: {'data.eval_size': 6} must be key=value"),
        (["stages=[]", "rounds=1", "loop.judge=[7]"], "loop.judge: 7 must be key=value"),
        (["stages=[]", "rounds=1", "loop.audit=[{prompts:7}]"], "loop.audit: {'prompts': 7} must be key=value"),
        (["stages=[]", "next=[{open:page}]"], "next={'open': 'page'}: must be text."),
        (["stages=[]", "rounds=-1"], "rounds=-1: must be at least 0."),
        (["stages=[]", "loop.gates.max_kl=nan"], "loop.gates.max_kl=nan: must be at least 0 and finite."),
        (["stages=[]", "loop.gates.max_disputed=30"], "loop.gates.max_disputed=30: must be at least 0 and at most 1."),
        (["stages=[]", "loop.gates.min_known_change=-2"], "loop.gates.min_known_change=-2: must be at least -1"),
    ],
)
def test_what_no_pipeline_is_made_of(planned, overrides, says):
    with pytest.raises(Refusal) as refused:
        planned(*overrides)
    assert str(refused.value).startswith(says)


def loop(label, judge="judge_function=json:loads"):
    """Rounds on the stage sft."""
    quoted = ",".join(f"'{text}'" for text in label)
    return STAGES, f"loop.label=[{quoted}]", f"loop.judge=['{judge}']", "loop.anchor='{dir}/sft'"


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (["judge=function", "judge.function=nosuch:f"], "judge.function=nosuch:f: cannot be imported"),
        (["judge=function", "judge.function=json:loads", "generate.n_samples=1"], "generate.n_samples=1: must be at"),
        (
            ["judge=function", "judge.function=json:loads", "judging.votes=true"],
            "judging.votes=True: is not read with",
        ),
        (["judge=reward", "judge.reward_model=nosuch"], "judge.reward_model=nosuch: does not exist"),
        (["judge=people", "judging.mode=cot"], "judging.mode=cot: is not read with judge=people. Leave it out."),
    ],
)
def test_a_labeller_that_cannot_be_is_refused_before_the_first_stage(planned, label, says):
    with pytest.raises(Refusal) as refused:
        planned("rounds=1", *loop(label))
    assert str(refused.value).startswith(f"stages.round_1_label: {says}")


def test_a_labeller_whom_a_stage_makes_is_not_there_yet(planned):
    made = ["judge=reward", "judge.reward_model={dir}/round_1_reward"]
    for label in (made, ["judge=people"]):
        assert len(planned("rounds=2", *loop(label)).stages) == 2 + 6 + 7
    with pytest.raises(Refusal, match=r"^stages\.round_1_evaluate: judge_function=nosuch:f: cannot be imported"):
        planned("rounds=1", *loop(made, "judge_function=nosuch:f"))


def test_settings_of_the_rounds_are_refused_without_rounds(planned, monkeypatch):
    monkeypatch.setattr(pipeline, "of_this_run", lambda: ["rounds=1", "loop.labels=64"])
    with pytest.raises(
        Refusal, match=r"^loop\.labels=64: is read with rounds=<number> alone: it would change nothing"
    ):
        planned("stages=[]", "loop.labels=64")
    assert planned("rounds=1", "loop.labels=64", *loop(["judge=people"])).stages


def test_a_gate_may_be_lifted(planned):
    planned(STAGES, *(f"loop.gates.{key}=null" for key in ("max_kl", "max_disputed", "min_known_change")))


def test_no_stage_is_no_pipeline(planned):
    with pytest.raises(Refusal, match=r"^stages=\[\]: nothing to run\. Give a stage, or rounds=<number>\.$"):
        planned("stages=[]")


def test_what_an_earlier_start_has_left(planned):
    folder = planned(STAGES).dir
    run_folder.mark(folder, "pipeline")
    for damaged in ("", "[]", "{"):
        (folder / pipeline.SUMMARY).write_text(damaged)
        with pytest.raises(Refusal, match=rf"^{folder}/summary\.json: .* Restore it\.$"):
            planned(STAGES)
    for left in ('{"seconds": 1}', '{"stages": [1, {"name": "sft"}]}'):
        (folder / pipeline.SUMMARY).write_text(left)
        planned(STAGES)
    finish(planned(STAGES).stages[0])
    told = {"stages": [{"name": "sft", "status": "finished", "seconds": 7.5}]}  # its start and end included
    (folder / pipeline.SUMMARY).write_text(json.dumps(told))
    assert planned(STAGES).stages[0].seconds == 7.5


def test_what_is_shared_goes_to_the_stages_that_have_it(planned):
    stages = "stages=[{name:sft,recipe:sft},{name:ship,recipe:publish,overrides:['run={dir}/sft','repo_id=me/it']}]"
    sft, ship = planned(stages, "shared=['doctor=strict','data.seed=1','run_name=mine']").stages
    assert {"doctor=strict", "data.seed=1", "run_name=mine"} <= set(sft.overrides)
    assert "run_name=mine" in ship.overrides and not {"doctor=strict", "data.seed=1"} & set(ship.overrides)
    with pytest.raises(Refusal, match=r"^shared: docter=strict: no stage has this key\."):
        planned(stages, "shared=['docter=strict']")


def test_rounds_of_ppo_have_the_prompts_of_a_rollout(planned):
    rounds_of_ppo = [
        "experiment=pipeline/rounds",
        "rounds=1",
        "loop.method=ppo",
        "loop.policy=['trainer.max_steps=4']",
    ]
    with pytest.raises(Refusal, match=r"^loop\.labels=24: a rollout of ppo takes 64 prompts \(per_device_train_batch"):
        planned(*rounds_of_ppo)
    assert planned(
        *rounds_of_ppo, "loop.policy=['trainer.gradient_accumulation_steps=1','trainer.num_mini_batches=1']"
    )
