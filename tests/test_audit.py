"""The audit as a recipe: an ensemble of two on the tiny model, all it can be given, what it leaves and refuses."""

import json
import math
import os
import shutil
import signal
from importlib import resources

import numpy as np
import pytest
import warm
from conftest import TINY_ID, snapshot, wait_for, write_adapter
from omegaconf import OmegaConf

from rlhf_recipes import references
from rlhf_recipes.audit import answers, scoring
from rlhf_recipes.audit.verdict import STATES
from rlhf_recipes.data import formats
from rlhf_recipes.errors import Refusal

pytestmark = pytest.mark.slow
SMALL = ["ledger_pairs=4", "stress_pairs=2", "probe_pairs=2", "credit_pairs=1", "prompts=3", "samples=4",
         "max_new_tokens=6", "quantization=none"]  # fmt: skip
GOLD = """
def words(completions, prompts, **_):
    assert len(prompts) == len(completions)
    return [len(turns[-1]["content"].split()) for turns in completions]
"""


@pytest.fixture(scope="module")
def here(run_recipe, tiny_overrides, tmp_path_factory):
    """A folder with an ensemble of two, a PPO run with its checkpoints, prompts, judgements and a gold."""
    folder = tmp_path_factory.mktemp("audit")
    alike = [*tiny_overrides, "quantization=none", "preflight.measure=false", "trainer.save_steps=1"]
    done = run_recipe("reward", *alike, "reward=ensemble", "reward.member=0,1", cwd=folder)
    assert done.returncode == 0, done
    assert "next      python -m rlhf_recipes.recipes.audit reward_model=outputs/reward/ensemble" in done.stdout
    done = run_recipe("ppo", *alike, "reward_funcs=[outputs/reward/ensemble/member_0,gold:words]",
                      "trainer.reward_weights=[1.0,0.0]", "trainer.max_completion_length=6", "trainer.value=head",
                      "trainer.num_ppo_epochs=1", "trainer.save_total_limit=null", cwd=write_gold(folder))  # fmt: skip
    assert done.returncode == 0, done
    asked = ["May I come today?", "My bill is wrong, who looks into it?", "Where can I park a van near you?"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    judged = [
        {"prompt": "q", "first": "x", "second": "y", "p": p, "judge": j} for j, p in (("one", 0.9), ("two", 0.2))
    ]
    (folder / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    question = {"subset": "Math", "prompt": "1 + 1?", "chosen": ["2"], "rejected": ["3", "4", "5"]}
    rows = [question | {"id": str(n), "prompt": f"{n} + 1?"} for n in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_gold(folder):
    (folder / "gold.py").write_text(GOLD)
    return folder


@pytest.fixture(scope="module")
def everything(tiny_model_overrides):
    return [*tiny_model_overrides, *SMALL, "data.train_size=8", "data.eval_size=6", "benchmark=questions.jsonl",
            "reward_model=outputs/reward/ensemble", "deployment=prompts.jsonl", "judgements=[judged.jsonl]",
            "gold=gold:words", "checkpoints=outputs/ppo/main", "ppo_run=outputs/ppo/main"]  # fmt: skip


@pytest.fixture(scope="module")
def audited(run_recipe, everything, here):
    """(what it printed, its folder, audit.json)."""
    done = run_recipe("audit", *everything, cwd=here, env={warm.DRAWN: "1"})
    assert done.returncode == 0, done
    folder = here / "outputs" / "audit" / "main"
    return done, folder, json.loads((folder / "audit.json").read_text())


def figures(audit):
    return {(s["key"], f["key"]): f for s in audit["sections"] for f in s["figures"]}


def test_members_differ_in_seed_rank_and_pairs(here):
    first, second = (here / "outputs" / "reward" / "ensemble" / f"member_{m}" for m in (0, 1))
    ranks = [json.loads((each / "adapter" / "adapter_config.json").read_text())["r"] for each in (first, second)]
    assert ranks == [16, 8]
    configs = [OmegaConf.load(each / "config.yaml") for each in (first, second)]
    assert [(each.data.bootstrap, each.trainer.seed, each.lora.lora_alpha) for each in configs] == [
        (0, 0, 32),
        (1, 1, 16),
    ]
    found = references.find_reward_models(str(first.parent), "reward_model", TINY_ID)
    assert [each.adapter for each in found] == [first / "adapter", second / "adapter"]


def test_every_part_is_measured(audited):
    done, _, audit = audited
    assert "deployment: prompts.jsonl: 3 prompts of 3 rows; dropped none\n" in done.stdout, done
    assert [section["key"] for section in audit["sections"]] == [
        "preference", "calibration", "uncertainty", "stress", "probes", "overoptimisation", "coverage",
        "disagreement", "consistency", "credit", "benchmark",
    ]  # fmt: skip
    assert not [section["key"] for section in audit["sections"] if "skipped" in section]
    found = figures(audit)
    assert found["preference", "accuracy"]["estimate"]["n"] == 6
    assert found["benchmark", "score"]["estimate"]["n"] == 3
    assert found["overoptimisation", "best_of_n_gain"]["estimate"]["clusters"] == 3
    assert found["overoptimisation", "best_of_n_gap"]["title"].endswith(": mean of the ensemble")  # what the gate asks
    assert found["uncertainty", "accuracy_mean"]["estimate"]["value"] is not None
    assert found["credit", "advantage_first_share"]["estimate"]["value"] is not None
    assert {gate["state"] for gate in audit["verdict"]["gates"]} <= set(STATES)
    assert len(audit["label_next"]) == 3 and audit["label_next"][0]["prompt"].endswith("?")


def test_it_ends_with_a_page_and_the_way_to_it(audited):
    done, folder, audit = audited
    assert audit["verdict"]["headline"] in done.stdout and "page      outputs/audit/main/report.html" in done.stdout
    page = (folder / "report.html").read_text()
    assert audit["title"] in page and "<script" not in page
    result = json.loads((folder / "result.json").read_text())
    assert result["audit"]["verdict"] == audit["verdict"] and result["main"]["name"] == "preference_accuracy"
    assert len((folder / "label_next.jsonl").read_text().splitlines()) == 3
    assert json.loads((folder / "disputed.jsonl").read_text().splitlines()[0])["label"] is None
    assert "'judgements=[outputs/label/main/judgements.jsonl]' run_name=labelled" in done.stdout


def test_a_checkpoint_is_held_against_gold(audited, here):
    _, _, audit = audited
    found = answers.find_run(str(here / "outputs" / "ppo" / "main"), TINY_ID)
    assert [step for step, _ in found.steps] == [1, 2]
    kept = sorted((here / "outputs" / "ppo" / "main" / "checkpoints" / "checkpoint-1").iterdir())
    assert [path.name for path in kept] == ["adapter_config.json", "adapter_model.safetensors"]
    assert figures(audit)["overoptimisation", "policy_gain"]["estimate"]["clusters"] == 3
    rows = [json.loads(line) for line in (here / "outputs/ppo/main/metrics.jsonl").read_text().splitlines()]
    assert all("rewards/words" in row and "advantage/last_share" in row for row in rows if "kl" in row)


def test_scores_are_those_of_the_reward_models(audited, here, compose, tiny_model_overrides):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from rlhf_recipes import inference, models
    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.load import load_pairs

    _, folder, _ = audited
    cfg = compose("audit", *tiny_model_overrides, "quantization=none", "data.eval_size=6", "reward_model=x")
    tokenizer = models.load_tokenizer(cfg.model)
    rows = fit(load_pairs(cfg.data), tokenizer, cfg.max_length).test
    for member in (0, 1):
        base = models.load_base(cfg.model, cfg.quantization, AutoModelForSequenceClassification, num_labels=1)
        model = PeftModel.from_pretrained(base, str(here / f"outputs/reward/ensemble/member_{member}/adapter"))
        known = inference.pair_rewards(model, tokenizer, rows)
        with np.load(folder / "scores" / f"held-out_pairs.{member}.npz") as kept:
            expected = [row[side] for row in known for side in ("chosen", "rejected")]
            assert kept["rewards"].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
            if member == 0:  # the score head of what it read is the score
                head = dict(model.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
                again = kept["features"] @ head.detach().float().numpy()[0]
                np.testing.assert_allclose(again, kept["rewards"], rtol=2e-2)  # bfloat16


def test_a_run_is_held_against_what_it_was_trained_on(audited, compose, tiny_model_overrides, here, monkeypatch):
    """outputs/ppo/main was paid by the first member; what others were paid by is read from their configs."""
    _, _, audit = audited
    (section,) = [section for section in audit["sections"] if section["key"] == "overoptimisation"]
    assert [note for note in section["notes"] if note.endswith("proxy is reward model 1.")]
    monkeypatch.chdir(here)
    cfg = compose("audit", *tiny_model_overrides, "reward_model=outputs/reward/ensemble")
    members = references.find_reward_models("outputs/reward/ensemble", "reward_model", TINY_ID)

    def proxy(reward_funcs, asked="trained", **trainer):
        run = here / "paid"
        run.mkdir(exist_ok=True)
        OmegaConf.save({"model": {}, "trainer": trainer, "reward_funcs": reward_funcs}, run / "config.yaml")
        cfg.proxy = asked
        return answers._proxy(cfg, str(run), members)

    first, second = (f"outputs/reward/ensemble/member_{m}" for m in (0, 1))
    assert proxy(second) == proxy([second, "gold:words"], reward_weights=[1.0, 0.0]) == 1
    assert proxy("outputs/reward/ensemble", reward_ensemble="min") == "min"
    assert proxy([second, first, "gold:words"], reward_ensemble="uwo", reward_weights=[1.0, 1.0, 0.0]) == "uwo"
    assert proxy([first, second], reward_ensemble="sum") == proxy("gold:words") == proxy("gone") == "mean"
    assert proxy(second, asked="uwo") == "uwo"


def test_a_killed_audit_scores_nothing_twice_and_ends_as_another_bit_for_bit(
    start_recipe, run_recipe, everything, audited, here
):
    _, folder, audit = audited
    killed = here / "outputs" / "audit" / "killed"
    process = start_recipe("audit", *everything, "run_name=killed", cwd=here, holds="killed/scores/.stress.1")
    wait_for(here / "held", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {path: mtime for path, mtime in times(killed).items() if path.endswith(".npz")}
    assert before
    done = run_recipe("audit", *everything, "run_name=killed", cwd=here, cold=True)
    assert done.returncode == 0 and "Continuing outputs/audit/killed from what was scored." in done.stdout, done
    assert {path: times(killed)[path] for path in before} == before
    assert json.loads((killed / "audit.json").read_text()) == audit
    assert (killed / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "scores").iterdir()}


def test_a_finished_audit_is_not_overwritten(audited, run_recipe, everything, here):
    _, folder, _ = audited
    before = snapshot(folder)
    done = run_recipe("audit", *everything, cwd=here)
    assert done.returncode == 2 and "outputs/audit/main holds a finished run" in done.stderr
    assert snapshot(folder) == before


def test_labels_of_people_are_gold_too(audited, run_recipe, everything, here):
    """Of other rows than the reward models learned from, which is said."""
    asked = [each for each in everything if not each.startswith(("gold=", "checkpoints=", "deployment="))]
    shutil.copy(resources.files("rlhf_recipes") / "assets/clinic/pairs.jsonl", here / "mine.jsonl")
    asked += ["data=local", "data.path=mine.jsonl"]
    done = run_recipe("audit", *asked, "gold=labels.jsonl", "run_name=labels", cwd=here)
    assert (
        done.returncode == 2
        and "answers have no label. They are in outputs/audit/labels/to_label.jsonl" in done.stderr
    )
    rows = [json.loads(line) for line in (here / "outputs/audit/labels/to_label.jsonl").read_text().splitlines()]
    (here / "labels.jsonl").write_text("".join(json.dumps(row | {"gold": len(row["answer"])}) + "\n" for row in rows))
    done = run_recipe("audit", *asked, "gold=labels.jsonl", "run_name=labels", cwd=here)
    assert done.returncode == 0, done
    doubt = "learned from data.path=clinic (here mine.jsonl): pairs held out here may have been in that training"
    assert doubt in done.stdout and doubt in (here / "outputs/audit/labels/audit.json").read_text()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "reward_model: required, but not set. Add reward_model=<value>"),
        (["reward_model=there"], "reward_model=there: does not exist. Give a run folder such as outputs/sft/main."),
        (["reward_model=policy"], "reward_model=policy: is a run of dpo, not a run of recipes/reward.py."),
        (["reward_model=other"], "reward_model=other: was trained on another/base, not on model.id=tests/tiny."),
        (["reward_model=[rm,rm]"], "reward_model=['rm', 'rm']: must name one run or more, each once."),
        (["reward_model=half"], "reward_model=half: b is not finished. Finish it, or list the others."),
        (["reward_model=rm", "gold=rm"], "gold=rm: is the reward model itself. Give one that learned from other"),
        (["reward_model=rm", "gold=no_module:score"], "gold=no_module:score: cannot be imported"),
        (["reward_model=rm", "gold=gold:words", "samples=0"], "gold=gold:words: says nothing with samples=0 and no"),
        (["reward_model=rm", "checkpoints=policy"], "checkpoints: need gold=<another reward model, module:function"),
        (["reward_model=rm", "gold=gold:words", "checkpoints=policy"], "checkpoints=policy: is no run of a training."),
        (["reward_model=rm", "judgements=[bad.jsonl]"], "bad.jsonl:1: judge: missing."),
        (["reward_model=rm", "stress=bad.jsonl"], "bad.jsonl:1: family"),
        (["reward_model=rm", "stress=none.jsonl"], "none.jsonl"),
        (["reward_model=rm", "deployment=none.jsonl"], "none.jsonl"),
        (["reward_model=rm", "+thresholds.min_accuracyy=1"], "thresholds.min_accuracyy"),
        (["reward_model=rm", "ppo_run=rm"], "rm: no metrics.jsonl in it. Give the folder of a run of recipes/ppo.py."),
        (["reward_model=rm", "proxy=max"], "proxy=max: not one of first, mean, min, uwo, trained."),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_a_model_loads(run_recipe, tmp_path, overrides, says):
    write_adapter(tmp_path / "rm", recipe="reward")
    write_adapter(tmp_path / "policy", recipe="dpo")
    write_adapter(tmp_path / "other", base="another/base", recipe="reward")
    for name in ("a", "b"):
        write_adapter(tmp_path / "half" / name, recipe="reward")
        (tmp_path / "half" / name / "config.yaml").write_text("run_name: x\n")
    (tmp_path / "half" / "b" / "result.json").unlink()
    (write_gold(tmp_path) / "bad.jsonl").write_text('{"prompt": "q", "first": "a", "second": "b", "p": 3}\n')
    done = run_recipe("audit", f"model.id={TINY_ID}", *overrides, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done
    assert "Traceback" not in done.stderr and not [path for path in tmp_path.rglob("outputs/**/*") if path.is_file()]


ASKED = {"prompt": "Open?", "answer": "Yes.", "gold": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": None}, "prompt: missing"),
        ({"prompt": 3}, "prompt: must be text or a list"),
        ({"prompt": [{"content": "Open?"}]}, "prompt[0]: must be a message with role and content"),
        ({"answer": 3}, "answer: must be text"),
        ({"gold": math.nan}, "gold: must be a number, not nan"),
        ({"gold": math.inf}, "gold: must be a number, not inf"),
        ({"gold": True}, "gold: must be a number, not true or false"),
        ({"gold": 9}, "gold = 9: {path}:1 says 1 of the same answer. Remove one of the two."),
    ],
)
def test_a_label_that_is_none_is_one_line_with_file_row_and_key(tmp_path, row, says):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(ASKED | each) + "\n" for each in ({}, {}, row)))
    with pytest.raises(Refusal) as refused:
        answers._labels(str(path))
    assert str(refused.value).startswith(f"{path}:3: {says.format(path=path)}") and "\n" not in str(refused.value)


def test_what_has_no_label_is_asked_for_at_once_and_once(tmp_path, capsys):
    path = tmp_path / answers.TO_LABEL
    assert answers._labels(str(path)) == {} and "no labels yet." in capsys.readouterr().out
    rows = [{"prompt_id": formats.prompt_id(turns), "prompt": turns} for turns in ([user("Open?")], [user("Shut?")])]
    for _ in range(2):  # the second time nothing is asked for again
        gold = answers.Labels(answers._labels(str(path)), path)
        assert (
            np.isnan(gold(rows, ["Yes.", ""], "best-of-n")).all() and np.isnan(gold(rows, ["No.", ""], "later")).all()
        )
        with pytest.raises(Refusal, match=r"^gold: 3 answers have no label\. They are in .*: put a number"):
            gold.refuse_missing()
        asked = [json.loads(each) for each in path.read_text().splitlines()]
        assert [(each["prompt"][0]["content"], each["answer"]) for each in asked] == [
            ("Open?", "Yes."), ("Shut?", ""), ("Open?", "No.")]  # fmt: skip
    path.write_text("".join(json.dumps(row | {"gold": n}) + "\n" for n, row in enumerate(asked)))
    gold = answers.Labels(answers._labels(str(path)), path)
    assert gold(rows, ["No.", ""], "later").tolist() == [2, 1]
    gold.refuse_missing()


def user(text):
    return {"role": "user", "content": text}


def test_a_missing_member_is_named(here, run_recipe, everything, tmp_path):
    shutil.copytree(here / "outputs", tmp_path / "outputs")
    shutil.rmtree(tmp_path / "outputs" / "audit")
    shutil.rmtree(tmp_path / "outputs" / "reward" / "ensemble" / "member_1" / "adapter")
    done = run_recipe("audit", *everything[:-5], cwd=tmp_path)
    assert done.returncode == 2 and "member_1: has no adapter in it" in done.stderr, done


def test_what_was_kept_and_is_damaged_is_refused_by_name(tmp_path):
    cfg = OmegaConf.create({"max_new_tokens": 1, "seed": 0, "model": {"id": TINY_ID}})
    sampler = answers.Sampler(cfg, None, None, [], tmp_path)
    path = tmp_path / "p.answers.json"
    path.write_text('{"key": ')
    with pytest.raises(Refusal, match=rf"^{path}: not valid JSON \(.*\)\. Restore it\.$"):
        sampler.answers(None, [{"prompt": []}], "p")
    path = tmp_path / "p.0.npz"
    np.savez(path, key=np.array("k"), rewards=np.zeros(2))
    assert scoring._read(path)["rewards"].tolist() == [0, 0]
    for damage in (path.read_bytes()[:40], b"", b"not one"):
        path.write_bytes(damage)
        with pytest.raises(Refusal, match=rf"^{path}: cannot be read \(.*\)\. Remove it: it is scored again\.$"):
            scoring._read(path)
    np.savez(path, other=np.zeros(2))
    with pytest.raises(Refusal, match=rf"^{path}: holds no scores\."):
        scoring._read(path)
