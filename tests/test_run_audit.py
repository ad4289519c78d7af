"""What an audit makes of its inputs before and after the models: whose words labels are, and what is beside what."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from rlhf_recipes.audit import run_audit, scoring, uncertainty
from rlhf_recipes.data.load import load_pairs

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."} for i in range(20)]


def test_one_answer_in_twenty_is_unfamiliar_by_chance():
    """An answer in deployment has no other beside it: it is held against single held-out answers, not the larger of
    two."""
    rng = np.random.default_rng(0)

    def score(turns, part, features):
        return scoring.Scored(np.zeros((1, len(turns))), rng.normal(size=(len(turns), 6)))

    prompts = [
        {"prompt": [{"role": "user", "content": f"about {i}"}], "prompt_id": f"about {i}", "family": None}
        for i in range(2000)
    ]
    sampler = SimpleNamespace(answers=lambda adapter, rows, part: [{"text": "Yes."}] * len(rows))
    scored = run_audit.Scored(SimpleNamespace(score=score), np.zeros((1, 2)))
    ledger_KF = rng.normal(size=(400, 6))
    novelty_N2 = uncertainty.mahalanobis(ledger_KF, rng.normal(size=(4000, 6))).reshape(-1, 2)
    cfg = SimpleNamespace(seed=0, prompts=2000)
    found = run_audit._deployed(cfg, prompts, scored, sampler, ledger_KF, novelty_N2)
    features = found.coverage["features"]
    assert uncertainty.out_of_distribution(features["held_out"], features["deployment"]).value == pytest.approx(
        0.05, abs=0.012
    )
    listed = run_audit._label_next(found, 1, frozenset())
    assert listed[0]["why"] == "further from the train pairs than 100% of the held-out answers"
    labelled = {each["prompt"] for each in listed[:9]}
    others = run_audit._label_next(found, 1, labelled)
    assert len(listed) == len(others) == 256 and others[0]["prompt"] == listed[9]["prompt"]
    assert not {each["prompt"] for each in others} & labelled


def test_held_out_pairs_are_all_labelled_and_listed_where_nothing_else_is_known():
    rows = [
        {"prompt": [{"role": "user", "content": text}], "prompt_id": text, "family": None}
        for text in ("bake bread", "sort arrays", "book flights") * 5
    ]
    rows += [{**rows[0], "prompt": [{"role": "user", "content": f"question{i} about{i}"}]} for i in range(20)]
    found = run_audit.Candidates(rows, np.arange(35.0), np.zeros(35), {})
    assert len(run_audit._label_next(found, 1, {row["prompt_id"] for row in rows})) == 10


def run_folder(path, recipe, **config):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"rlhf_recipes: {recipe}\n" + OmegaConf.to_yaml(OmegaConf.create(config)))
    return path


def test_labels_are_the_words_of_the_run_that_made_them(tmp_path):
    people = run_folder(tmp_path / "people", "label", run_name="people")
    asked = run_folder(tmp_path / "asked", "cai", judge={"kind": "people", "labels": str(people)})

    def labelling(path, test_path=None):
        return run_audit._labelling(OmegaConf.create({"path": str(path), "test_path": test_path and str(test_path)}))

    assert labelling(people / "preferences.jsonl") == {people}
    assert labelling("clinic", test_path=asked) == {asked, people}
    assert labelling(tmp_path / "mine.jsonl") == labelling("org/name") == labelling("~no/\0") == set()
    assert run_audit._run_of(str(people / "judgements.jsonl")) == run_audit._run_of(str(people)) == people


def test_pairs_that_a_reward_model_may_have_learned_from_are_doubted(tmp_path, compose):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    cfg = compose("audit", "data=local", f"data.path={tmp_path}/pairs.jsonl", "reward_model=x")

    def doubts(*data, **report):
        members = []
        for other in data:
            home = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            run_folder(home, "reward", data=OmegaConf.to_container(cfg.data) | other)
            members.append(SimpleNamespace(adapter=home / "adapter"))
        found = run_audit._doubts(cfg, members, load_pairs(cfg.data).report | report)
        return [each.replace(f"{tmp_path}/", "") for each in found]

    assert doubts({}, {"train_size": 4, "bootstrap": 1, "path": f"{tmp_path}/./pairs.jsonl"}) == []
    [one] = doubts({"seed": 1}, {"seed": 1})
    assert " learned from data.seed=1 (here 42): pairs held out here may have been in that training" in one
    assert one.count(", ") == 2  # two runs, one reason
    assert "data.test_size=0.2 (here 0.1)" in doubts({"test_size": 0.2})[0]
    assert "data.path=clinic (here" in doubts({"path": "clinic"})[0]
    own_test = {"split": "test: test"}
    assert doubts({"seed": 1, "test_path": "other.jsonl"}, **own_test) == []
    leaking = own_test | {"dropped": {"leakage": 2}}
    assert "data.test_path=other.jsonl (here None)" in doubts({"seed": 1, "test_path": "other.jsonl"}, **leaking)[0]
    (tmp_path / "foreign").mkdir()
    [unknown] = run_audit._doubts(cfg, [SimpleNamespace(adapter=tmp_path / "foreign")], {"split": "", "dropped": {}})
    assert "foreign has no config that says which pairs it learned from" in unknown
