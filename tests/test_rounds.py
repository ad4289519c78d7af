"""Rounds of a pipeline: which stages they are, which gate stops them, killed and continued on a tiny model."""

import contextlib
import itertools
import json
import shutil
import signal
from importlib import import_module
from pathlib import Path

import pytest
import quick
from conftest import TINY_ID, write_adapter

from rlhf_recipes import references
from rlhf_recipes.cai import gate
from rlhf_recipes.data.load import load_pairs, load_prompts
from rlhf_recipes.errors import Refusal
from rlhf_recipes.launch import pipeline, rounds
from rlhf_recipes.run_folder import read_result

PPO = (
    "reward_funcs=warm_processes:short", "trainer.max_completion_length=4", "trainer.num_mini_batches=1",
    "trainer.num_ppo_epochs=1",
)  # fmt: skip
LABELLER = '''"""Who labels: the shorter answer is better; `left` takes the first from the second round on."""

import os


def shorter(prompts, first, second):
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second)]


def left(prompts, first, second):
    return [1.0] * len(first) if "round_2" in os.environ["RLHF_RECIPES_STAGE"] else shorter(prompts, first, second)
'''


@pytest.fixture
def cfg(compose):
    return compose("pipeline", "experiment=pipeline/rounds", "rounds=2")


def write(folder, name, result):
    (folder / name).mkdir(parents=True, exist_ok=True)
    main = {"name": "figure", "before": None, "after": estimate(0.5)}
    common = {"recipe": "cai", "status": "finished", "main": main, "peak_memory_gib": {"process": 1.0}}
    (folder / name / "result.json").write_text(json.dumps({**common, **result}))


def estimate(value, half=0.1, n=40):
    if value is None:
        return {"value": None, "low": None, "high": None, "n": 0, "clusters": 0}
    return {"value": value, "low": value - half, "high": value + half, "n": n, "clusters": n}


def finish_round(folder, k, *, left=0.5, flips=0, known=0.9, wins=0.7, kl=3.0, over=0.1, checked=9, unanswered=0,
                 people=True):  # fmt: skip
    """What the stages of a round leave, as far as `rounds` reads it; kl=None: nobody could measure it. Of 20 pairs
    that are labelled the half is dropped from the data set, and not among its routes."""
    routes = {"accepted": 10 - flips // 2, "disputed": flips // 2, "unanswered": unanswered}
    funnel = {"routes": routes, "written": {"test_prefs": checked}}
    spent = {"judged": 0 if people else 50, "usd": 0.0}
    made = {"funnel": funnel, "spent": spent, "gate": {"agreement": estimate(known)}}
    said = {"chosen": 12, "ties": 3, "skipped": 5}
    both = {"anna": said | {"left": estimate(0.5)}, "ben": said | {"left": estimate(left)}}
    made["people"] = {"pairs": 20, "people": both} if people else None
    pairs = [{"route": "disputed" if n < flips else "accepted", "flip": n < flips} for n in range(20)]
    pairs += [{"route": "unanswered", "flip": False}] * unanswered
    records = [json.dumps({"prompt_id": str(n), "pairs": [pair]}) + "\n" for n, pair in enumerate(pairs)]
    for part in ("label", "check"):
        shard = folder / rounds.name(k, part) / "shards" / "00000"
        shard.mkdir(parents=True)
        (shard / "records.jsonl").write_text("".join(records))
        write(folder, rounds.name(k, part), made)
    path = str(folder / rounds.name(k, "policy"))
    metrics = {"metrics": {"win_rate": estimate(wins), "kl_k1": estimate(kl)}, "info": {"path": path}}
    answers = [{"cluster": n, "systems": {"new": {"change": 1.0 if n < 6 else -1.0}}} for n in range(10)]
    evaluation = {"recommended": "new", "parent": "old", "systems": {"new": metrics}, "answers": answers}
    for part in ("evaluate", *(["last"] if k > 1 else [])):
        write(folder, rounds.name(k, part), {"evaluation": evaluation})
    gate = {"figure": "accuracy_over_length", **estimate(over)}
    write(folder, rounds.name(k, "audit"), {"audit": {"verdict": {"gates": [gate]}}})


def test_rounds_are_stages_that_anybody_may_run(cfg):
    entries = {entry.name: entry for entry in rounds.stages(cfg)}
    assert list(entries)[:7] == [*(f"round_1_{part}" for part in
        ("label", "reward", "policy", "check", "evaluate", "audit")), "round_2_label"]  # fmt: skip
    first, second = entries["round_1_policy"].overrides, entries["round_2_policy"].overrides
    assert "model.adapter={dir}/sft" in first and "model.adapter={dir}/round_1_policy" in second
    assert "reference={dir}/sft" in first and "reference={dir}/sft" in second
    label = entries["round_2_label"].overrides
    assert "earlier=[{dir}/round_1_label]" in label and "first={dir}/round_1_audit/label_next.jsonl" in label
    assert "parent={dir}/round_1_policy" in entries["round_2_last"].overrides
    cfg.loop.method = "ppo"
    ppo = {entry.name: entry for entry in rounds.stages(cfg)}["round_2_policy"]
    assert ppo.recipe == "ppo" and "reward_funcs={dir}/round_2_reward" in ppo.overrides
    assert "reference={dir}/sft" in ppo.overrides


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loop.method=dpoo", "loop.method=dpoo: not one of .*did you mean 'dpo'"),
        ("loop.method=kto", "loop.method=kto: not one of"),
        ("loop.labels=0", "loop.labels=0: must be at least 1"),
        ("loop.judge=[]", "loop.judge: names no judge"),
        ("loop.judge=['judge=null']", "loop.judge: names no judge"),
        ("loop.judge=['judge=people']", "loop.judge=.judge=people.: labels pairs, and compares no policies"),
        ("loop.label=['judge=people','judge.labels=mine']", "loop.label: judge.labels=mine: each stage has"),
    ],
)
def test_rounds_that_cannot_be_are_refused(compose, override, says):
    with pytest.raises(Refusal, match=f"^{says}"):
        rounds.stages(compose("pipeline", "experiment=pipeline/rounds", "rounds=2", override))


def test_policies_are_compared_on_held_out_rows_of_the_prompts_file(compose, tmp_path):
    """And not on the shipped ones, where the prompts are somebody's own."""
    pairs, alone = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}."} for n in range(40)]
    for path, keys in ((pairs, rows[0]), (alone, ["prompt"])):
        path.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows))

    def node(path, part, *evaluate):
        cfg = compose("pipeline", "experiment=pipeline/rounds", "rounds=2", f"loop.prompts={path}")
        cfg.loop.evaluate = evaluate
        [entry] = [entry for entry in rounds.stages(cfg) if entry.name == part]
        return compose(entry.recipe, *(text.replace("{dir}", str(tmp_path)) for text in entry.overrides)).data

    for part in ("round_1_evaluate", "round_2_evaluate", "round_2_last"):
        assert node(pairs, part, "prompts=8").path == str(pairs)
        assert node(alone, part, "data=clinic").path == "clinic"
        assert node("clinic", part).path == "clinic"
    answered = {row["prompt_id"] for row in load_prompts(node(pairs, "round_2_label")).train}
    held_out = {row["prompt_id"] for row in load_pairs(node(pairs, "round_2_evaluate")).test}
    assert len(answered) == 24 and held_out and not answered & held_out
    with pytest.raises(Refusal, match=rf"^loop\.prompts={alone}: has no pairs .* loop\.evaluate=\[data=local,data"):
        node(alone, "round_1_evaluate", "data.eval_size=4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "gate", "keep"),
    [
        ({}, None, "round_2_policy"),
        ({"flips": 9}, "loop.gates.max_disputed", "round_1_policy"),
        ({"left": 0.95}, "loop.gates.max_place", "round_1_policy"),
        ({"left": 0.05}, "loop.gates.max_place", "round_1_policy"),
        ({"left": 0.75}, None, "round_2_policy"),
        ({"known": 0.6}, "loop.gates.min_known_change", "round_1_policy"),
        ({"known": 0.85}, None, "round_2_policy"),
        ({"kl": None}, "loop.gates.max_kl", "round_1_policy"),  # of an endpoint that gives none
        ({"kl": 30.0}, "loop.gates.max_kl", "round_1_policy"),
        ({"wins": 0.3}, "loop.gates.min_win_rate", "round_1_policy"),
        ({"wins": 0.45}, None, "round_2_policy"),  # not shown to be worse
        ({"over": -0.2}, "loop.gates.min_over_length", "round_1_policy"),
        ({"checked": 0, "over": 0.5}, None, "round_2_policy"),
    ],
)
def test_the_gate_that_fails_stops_and_names_what_to_keep(cfg, tmp_path, second, gate, keep):
    finish_round(tmp_path, 1)
    finish_round(tmp_path, 2, **second)
    loop = rounds.Rounds(cfg, tmp_path)
    drawn = second == {"kl": None}  # alike, whatever stops it
    with contextlib.nullcontext() if drawn else quick.pictures_sketched():
        stopped = loop.stop()
    assert (stopped and stopped["round"]) == (2 if gate else None)
    assert not gate or gate in stopped["says"]
    missing = f"there is nothing to tell by. Lift the gate with {gate}=null"
    assert not gate or (stopped["why"] == missing) == drawn
    written = json.loads((tmp_path / rounds.FILE).read_text())
    assert written["keep"] == f"{tmp_path}/{keep}" and len(written["rounds"]) == 2
    said = rounds.describe(loop.read())
    assert f"keep     {tmp_path}/{keep}" in said and ("stopped  in round 2" in said) == bool(gate)
    page = (tmp_path / rounds.PAGE).read_text()
    assert "<svg" in page and ("Stopped in round 2" in page) == bool(gate)


def test_no_pair_to_check_on_stops_before_the_audit(cfg, tmp_path):
    finish_round(tmp_path, 1, checked=0)
    shutil.rmtree(tmp_path / rounds.name(1, "audit"))
    stopped = rounds.Rounds(cfg, tmp_path).stop()
    assert stopped["round"] == 1 and "min_over_length" in stopped["says"]
    assert stopped["why"] == "there is nothing to tell by. Lift the gate with loop.gates.min_over_length=null"


def test_no_round_holds_before_its_last_stage(cfg, tmp_path):
    """Neither after its labels alone, nor where the gate is lifted that the last stage would answer."""
    cfg.rounds, cfg.loop.gates.min_over_length = 1, None
    finish_round(tmp_path, 1, checked=0)
    for gone in (["audit", "evaluate"], ["check"]):
        for part in gone:
            shutil.rmtree(tmp_path / rounds.name(1, part))
        found = rounds.Rounds(cfg, tmp_path).read()
        assert found["keep"] == f"{tmp_path}/sft"
        assert "every gate holds" not in rounds.describe(found)


@pytest.mark.parametrize("people", [True, False])
def test_a_pair_that_nobody_answered_is_no_label(cfg, tmp_path, people):
    """And one that is labelled costs, though it is dropped afterwards."""
    finish_round(tmp_path, 1, flips=8, unanswered=20, people=people)
    done = rounds.Rounds(cfg, tmp_path).read()["rounds"][0]
    assert (done["disputed"].value, done["disputed"].n) == (0.4, 20)
    assert [(cost["pairs"], cost["questions"]) for cost in done["labels"]] == [(20, 2 * 20 if people else 50)] * 2


def test_kl_that_nobody_could_measure(cfg, tmp_path):
    """An endpoint may tell no log-probabilities of a prompt."""
    cfg.loop.gates.max_kl = None
    finish_round(tmp_path, 1, kl=None)
    assert rounds.Rounds(cfg, tmp_path).stop() is None
    assert "KL –" in (tmp_path / rounds.PAGE).read_text()


def test_a_labeller_that_fails_its_gate_stops_unless_it_is_told_not_to(cfg):
    for told in ([], ["gate.fails=ignore"]):
        cfg.loop.label = ["judge=function", *told]
        for entry in rounds.stages(cfg):
            if entry.recipe == "cai":
                assert [each for each in entry.overrides if each.startswith("gate.")] == ["gate.fails=stop", *told]


def test_known_pairs_of_the_data_are_as_many_and_the_same_at_every_check(compose, cfg, tmp_path):
    cfg.loop.label = ["judge=function", "judge.function=json:loads", "gate.gold=data"]
    entries = [entry for entry in rounds.stages(cfg) if entry.recipe == "cai"]
    found = [
        gate.load_gold(compose("cai", *(text.replace("{dir}", str(tmp_path)) for text in entry.overrides)))
        for entry in entries
    ]
    assert len(found) == 4 and len(found[0]) > 24  # more than loop.labels
    assert all([row["prompt_id"] for row in gold] == [row["prompt_id"] for row in found[0]] for gold in found)


@pytest.fixture
def ended(cfg, compose, tmp_path, monkeypatch, capsys):
    """ended(status): (exit status, what it prints) of the pipeline whose stages all have a status; but that the stage
    `fails` and those after it have not run."""

    def own(entry):
        if entry.recipe == "cai":
            return compose("cai", *(text.replace("{dir}", str(tmp_path)) for text in entry.overrides))

    def fail(stage, *_):
        stage.said = "gate: it fails <it>."
        return 2, 0.1

    def end(status, fails=None):
        entries = rounds.stages(cfg)
        stages = [pipeline.Stage(e.name, e.recipe, tmp_path / e.name, [], own(e), "", status) for e in entries]
        for stage in itertools.dropwhile(lambda stage: stage.name != fails, stages):
            stage.status = "pending"
        plan = pipeline.Plan(tmp_path, stages, None, 0.0)
        recipe = import_module("rlhf_recipes.recipes.pipeline")
        monkeypatch.setattr(pipeline, "plan", lambda cfg: plan)
        monkeypatch.setattr(recipe.look, "before_pipeline", lambda *_: None)
        monkeypatch.setattr(pipeline, "_run", fail)
        monkeypatch.setattr(pipeline, "_side_by_side", lambda evaluation: "")
        with quick.pictures_sketched(), pytest.raises(SystemExit) as exited:
            recipe.main.__wrapped__(cfg)
        return exited.value.code, capsys.readouterr().out

    return end


def test_the_end_names_one_policy(ended, tmp_path):
    for k, kl in ((1, 3.0), (2, 30.0)):
        finish_round(tmp_path, k, kl=kl)
        write(tmp_path, rounds.name(k, "policy"), {})
        write_adapter(tmp_path / rounds.name(k, "policy"))
    code, said = ended("finished")
    assert code == 1 and "stopped  in round 2 by KL" in said
    assert f"adapter  {tmp_path}/round_1_policy/adapter\n" in said and f"keep     {tmp_path}/round_1_policy\n" in said
    assert f"page     {tmp_path}/rounds.html" in said and "round_2_policy/adapter" not in said


def test_the_end_names_nothing_that_was_not_made(ended):
    code, said = ended("pending")
    assert code == 2 and "page  " not in said and "keep  " not in said
    asked = "24 and 16 held out by label, 1 and 16 held out by check"
    assert said.startswith(f"labels   of at most 57 prompts a round: {asked}\n")
    assert said.endswith("\nended    at round_1_label, not by a gate of the loop: gate: it fails <it>.\n")


def test_the_end_at_a_stage_without_a_result_is_no_gate_of_the_loop(ended, tmp_path):
    """Of a labeller who fails the gate of `cai`, say."""
    finish_round(tmp_path, 1)
    for part in ("policy", "reward"):
        write(tmp_path, rounds.name(1, part), {})
    write_adapter(tmp_path / rounds.name(1, "policy"))
    code, said = ended("finished", fails="round_2_label")
    assert code == 2 and "ended    at round_2_label, not by a gate of the loop: gate: it fails <it>.\n" in said
    assert f"keep     {tmp_path}/round_1_policy\n" in said and f"page     {tmp_path}/rounds.html" in said
    assert json.loads((tmp_path / rounds.FILE).read_text())["ended"]["stage"] == "round_2_label"
    page = (tmp_path / rounds.PAGE).read_text()
    assert "<h1>Ended at round_2_label</h1>" in page and "not by a gate of the loop: gate: it fails &lt;it&gt;" in page


def test_what_a_stage_is_refused_for_is_known_to_the_pipeline(tmp_path):
    stage = pipeline.Stage("label", "label", tmp_path / "label", ["pairs=none.jsonl"], None, "")
    code, _ = pipeline._run(stage, "label", None)
    assert code == 2 and stage.said.startswith("pairs=none.jsonl: no such file or folder. Give a file, or a run of")


@pytest.mark.slow
def test_a_bad_labeller_is_stopped_as_soon_as_its_labels_are_there(cfg, tmp_path):
    """Nothing is trained on them: of the second round the labels alone are made."""
    finish_round(tmp_path, 1)
    finish_round(tmp_path, 2, flips=12)
    for part in ("check", "evaluate", "last", "audit"):
        shutil.rmtree(tmp_path / rounds.name(2, part))
    assert "max_disputed" in rounds.Rounds(cfg, tmp_path).stop()["says"]
    cfg.loop.gates.max_disputed = None  # lifted, it goes on
    assert rounds.Rounds(cfg, tmp_path).stop() is None


def listed(*overrides):
    return f"[{','.join(map(repr, overrides))}]"


def command(terse, count):
    training = listed(
        "trainer.max_steps=1", "trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=1"
    )
    label = listed(
        "judge=function", "judge.function=labeller:left", "generate.n_samples=3", "generate.pairs=best_worst",
        "generate.max_new_tokens=12", "filters.min_words=1", "filters.max_length_ratio=9", "gate.pairs=2",
        "gate.fails=ignore",
    )  # fmt: skip
    sft = listed("trainer.max_steps=1", "data.train_size=8", "data.eval_size=2")
    audit = listed(
        "prompts=4", "ledger_pairs=4", "stress_pairs=2", "probe_pairs=2", "credit_pairs=1", "stress=null",
        "max_new_tokens=8",
    )  # fmt: skip
    return [
        f"shared={listed(*terse, 'quantization=none')}",
        f"stages=[{{name:sft,recipe:sft,overrides:{sft}}}]", f"rounds={count}", "preflight.measure=false",
        "loop.labels=8", "loop.held_out=8", f"loop.label={label}",
        f"loop.judge={listed('judge_function=labeller:shorter')}", f"loop.reward={training}",
        f"loop.policy={training}", f"loop.audit={audit}",
        f"loop.evaluate={listed('data.eval_size=4', 'scored_pairs=2', 'max_new_tokens=8')}",
        "loop.gates.min_over_length=-1", "loop.gates.min_win_rate=0",
    ]  # fmt: skip


def test_killed_it_goes_on_and_stops_at_the_labeller_who_takes_the_left(run_recipe, terse, tmp_path):
    (tmp_path / "labeller.py").write_text(LABELLER)
    folder = tmp_path / "outputs" / "pipeline" / "main"
    killed = run_recipe("pipeline", *command(terse, 1), cwd=tmp_path, kill="stage round_1_policy")
    assert killed.returncode == -signal.SIGKILL, killed
    assert read_result(folder / "round_1_reward") and not read_result(folder / "round_1_policy")

    done = run_recipe("pipeline", *command(terse, 1), cwd=tmp_path)
    assert done.returncode == 0 and "round_1_reward] finished before, kept" in done.stdout, done
    policy = read_result(folder / "round_1_policy")
    sft = read_result(folder / "sft")
    assert policy["reference"]["adapter_sha256"] == sft["adapter_sha256"] == policy["parent"]["adapter_sha256"]
    found = json.loads((folder / rounds.FILE).read_text())
    assert not found["stopped"] and found["keep"].endswith("round_1_policy")
    assert {"disputed", "judge", "proxy", "kl", "over_length"} <= found["rounds"][0].keys()

    again = run_recipe("pipeline", *command(terse, 2), cwd=tmp_path)
    assert again.returncode == 1 and "stopped  in round 2 by disputed pairs" in again.stdout, again
    assert read_result(folder / "round_2_label") and not (folder / "round_2_reward").exists()
    assert "keep     outputs/pipeline/main/round_1_policy" in again.stdout


def test_the_reference_stays_where_it_is_told(train, tmp_path, monkeypatch):
    """Two runs of DPO in a row: the second starts from the first, and is measured from what that one started from."""
    import torch

    train("sft", tmp_path / "sft", "quantization=none", "lora.r=2", "trainer.learning_rate=0.1")
    faster = ("quantization=none", "trainer.learning_rate=0.05")
    train("dpo", tmp_path / "one", *faster, "model.adapter=sft")
    done = train("dpo", tmp_path / "two", *faster, "model.adapter=one", "reference=sft")
    weights = {name: value for name, value in done.trainer.model.state_dict().items() if ".ref." in name}
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert len(weights) == len(kept)
    assert all(torch.equal(value, kept[name.replace(".ref.", ".")]) for name, value in weights.items())
    assert done.result["reference"]["run"] == "sft" and done.result["parent"]["run"] == "one"
    # before the first step it is what it started from, and the reference is another
    assert done.result["before"]["reward_margin"].value != 0
    assert done.result["before"]["accuracy_change"].value == done.result["before"]["chosen_logp_change"].value == 0
    moved = {key: each.value - done.result["before"][key].value for key, each in done.result["metrics"].items()}
    assert moved["reward_margin"] == pytest.approx(moved["chosen_logp_change"] - moved["rejected_logp_change"])
    assert not [f for f in done.result["doctor"]["findings"] if f["rule"] == "wrong_reference"]
    assert "Reference: sft" in (tmp_path / "two" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert references.find_policy("two", "runs", TINY_ID).start == Path("sft/adapter")
    ppo = train("ppo", tmp_path / "ppo", "quantization=none", "model.adapter=one", "reference=sft", *PPO)
    weights = {name: value for name, value in ppo.trainer.model.state_dict().items() if ".reference." in name}
    assert weights and all(
        torch.equal(value, kept[name.replace(".reference.", ".")]) for name, value in weights.items()
    )
