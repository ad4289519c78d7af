"""Pairs that reward models or a function label: what is chosen, set aside, kept, refused; whole and in shards."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from test_others_text import pairs_of

from rlhf_recipes import lineage
from rlhf_recipes.cai import load, make_pairs, report, scored
from rlhf_recipes.cai.judge import Pair
from rlhf_recipes.data.load import load_prompts
from rlhf_recipes.errors import Refusal

SMALL = (
    "data.train_size=6", "data.eval_size=3", "sources=[on_policy]", "generate.n_samples=3",
    "generate.pairs=best_worst",
    "generate.max_new_tokens=12", "filters.min_words=1", "filters.max_length_ratio=9", "gate.pairs=4",
    "gate.fails=ignore", "shard_size=4", "quantization=none",
)  # fmt: skip
TRAINED = ("data.train_size=8", "data.eval_size=4", "trainer.max_steps=2", "quantization=none", "lora.r=2")


@pytest.fixture(scope="module")
def here(run_recipe, terse, tmp_path_factory):
    """A folder with an ensemble of two reward models and a run of cai that it has labelled."""
    folder = tmp_path_factory.mktemp("reward")
    for seed in (0, 1):
        place = f"hydra.run.dir=outputs/reward/two/member_{seed}"
        done = run_recipe("reward", *TRAINED, *terse, f"trainer.seed={seed}", place, cwd=folder)
        assert done.returncode == 0, done
    done = run_recipe("cai", *SMALL, *terse, *judged(), cwd=folder)
    assert done.returncode == 0, done
    return folder


def judged(folder=""):
    return "judge=reward", f"judge.reward_model={folder}outputs/reward/two", "judge.max_disagreement=0.9"


def records(run):
    lines = [line for path in sorted(run.glob("shards/*/records.jsonl")) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def judge(deviations=(1.0, 1.0), margin=0.0, max_disagreement=0.8):
    """The judge of members whose runs report these deviations."""
    members = [
        SimpleNamespace(
            name=f"m{n}", reference=f"m{n}", sha256="a" * 64, metrics={"sd_reward": SimpleNamespace(value=sd)}
        )
        for n, sd in enumerate(deviations)
    ]
    backend = scored.Rewards(None, None, members)
    return scored.RewardJudge(backend, SimpleNamespace(margin=margin, max_disagreement=max_disagreement))


def ask(judge, rewards, pairs):
    """What it says of pairs whose replies have these rewards."""
    work = judge.comparing([Pair("p", [{"role": "user", "content": "?"}], *pair) for pair in pairs], "judge")
    asked = next(work)
    with pytest.raises(StopIteration) as ended:
        work.send([{"values": rewards[request.messages[-1]["content"]]} for request in asked.requests])
    return len(asked.requests), ended.value.value


def test_margins_are_on_one_scale_and_each_reply_is_scored_once():
    """By hand: the second member's rewards are ten times as wide."""
    count, [ab, ba, ac] = ask(
        judge((1.0, 10.0)),
        {"a": [1.0, 10.0], "b": [0.0, 0.0], "c": [2.0, -10.0]},
        [("a", "b"), ("b", "a"), ("a", "c")],
    )
    assert count == 3
    assert ab.p == pytest.approx(1 / (1 + np.exp(-5.5))) and ab.p + ba.p == pytest.approx(
        1
    )  # the mean deviation is 5.5
    assert ab.spread == 0 and ab.by_principle["m0"] == ab.by_principle["m1"]
    assert ac.spread == pytest.approx(1.5 / 1.5)  # -1 and 2 deviations apart


def test_within_the_margin_a_tie_and_beyond_agreement_disputed():
    far = {"a": [3.0, 3.0], "b": [0.0, 0.0], "c": [3.0, -1.0]}
    critic = judge(margin=1.0)
    _, [clear, split] = ask(critic, far, [("a", "b"), ("c", "b")])
    assert critic.unclear(clear, None) is None
    assert judge(margin=3.1).unclear(clear, None) == "tie"
    assert split.spread == 1 and judge().unclear(split, None) == "disputed"
    halves = {"a": [3.0, -3.0], "b": [0.0, 0.0], "c": [0.2, -0.2]}
    _, [half, lost] = ask(judge(), halves, [("a", "b"), ("c", "b")])
    assert half.p == 0.5 and judge(margin=0.5).unclear(half, None) == judge().unclear(half, None) == "disputed"
    assert judge(margin=0.5).unclear(lost, None) == "tie"  # no member sees more than that between them


def test_who_takes_the_left_is_disputed():
    by = scored.FunctionJudge(scored.Function(lambda prompts, first, second: [1.0] * len(first), "left"))
    limits = SimpleNamespace(tie_margin=0.05, accept_margin=0.1)
    work = by.comparing([Pair("p", [{"role": "user", "content": "?"}], "a", "b")], "judge")
    asked = next(work)
    answers = [answer for group in asked.backend.answer(asked.requests, (), "") for _, answer in group]
    with pytest.raises(StopIteration) as ended:
        work.send(answers)
    [said] = ended.value.value
    assert said.flip and said.p == 0.5 and by.unclear(said, limits) == "disputed"


def test_of_a_cycle_and_an_unfit_pair_the_furthest_is_left():
    def pair(first, second, p):
        return {"source": "on_policy", "first": first, "second": second, "p": p}

    revised = {"source": "revision", "first": "r", "second": "d", "p": 0.9}
    record = {"pairs": [revised, pair("a", "b", 0.6), pair("a", "c", 0.9), pair("b", "c", 0.8)]}
    make_pairs._keep_best_and_worst(record)
    assert record["pairs"] == [revised, pair("a", "c", 0.9)]
    record = {"pairs": [pair("a", "b", None), pair("a", "c", None)]}
    make_pairs._keep_best_and_worst(record)
    assert record["pairs"] == [pair("a", "b", None)]


def test_a_run_is_labelled_by_its_reward_models(here):
    run = here / "outputs" / "cai" / "main"
    result = json.loads((run / "result.json").read_text())
    assert result["judged_by"] == "reward" and result["labelled_by"] == "judge"
    assert result["judge"].count("outputs/reward/two/member_") == 2 and result["provenance"]["constitution"] is None
    assert result["gate"]["checks"][0]["name"] == "answers" and len(result["gate"]["checks"]) == 2
    found = records(run)
    assert len(found) == 9 and all(len(record["pairs"]) == 1 and not record["steps"] for record in found)
    judged = [pair for record in found for pair in record["pairs"] if pair["p"] is not None]
    assert judged and all(set(pair["by_principle"]) == {"member_0", "member_1"} for pair in judged)
    assert all((pair["spread"] > 0.9) == (pair["route"] == "disputed") for pair in judged if pair["route"] != "tie")
    card = (run / "README.md").read_text()
    assert "compared by reward models" in card and "order has no say" in card and "after a swap" not in card
    rewards = [
        entry for path in run.glob("shards/*/answers.jsonl") for line in path.read_text().splitlines()
        for entry in json.loads(line) if entry["step"] == "judge.reward"
    ]  # fmt: skip
    assert rewards and all(len(entry["answer"]["values"]) == 2 for entry in rewards)


def test_what_is_trained_on_such_pairs_was_optimised_against_their_judge(here, monkeypatch):
    monkeypatch.chdir(here)
    members = [f"outputs/reward/two/member_{n}" for n in (0, 1)]
    assert lineage._labelling({"data": {"path": "outputs/cai/main"}}) == members
    assert lineage._labelling({"data": {"path": members[0]}}) == []


def test_the_card_says_who_made_what_was_taken_over_and_what_p_is():
    made = pairs_of("s")
    made["funnel"]["earlier"], made["labelled_by"], made["gate"]["applied"] = (
        {"train_prefs": 480, "ties": 0},
        "judge",
        False,
    )
    made["earlier"] = [
        {"generator": "g", "judge": "j", "constitution": "c" * 64},
        {"generator": "h", "judge": None, "constitution": None},
    ]
    card = report.card(made)
    assert (
        "Of the rows 480 `train_prefs` are of earlier runs, of which nothing else is said here: written by g and "
        f"judged by j under a constitution of SHA-256 `{'c' * 16}`; written by h and labelled by construction.\n"
        in card
    )
    assert "`p` is as it was before it." in card
    made["gate"]["applied"], made["funnel"]["earlier"] = True, {"train_prefs": 0}
    card = report.card(made)
    assert "`p` is what is left after it." in card and "earlier runs" not in card


def test_killed_and_in_shards_it_comes_to_the_same(here, run_recipe, terse, tmp_path):
    command = [*SMALL, *terse, *judged(f"{here}/")]
    killed = run_recipe("cai", *command, "shards=1/2", cwd=tmp_path, kill="answered judge.reward")
    assert killed.returncode == -signal.SIGKILL, killed
    for shards in (["shards=1/2"], ["shards=2/2"], []):
        done = run_recipe("cai", *command, *shards, cwd=tmp_path)
        assert done.returncode == 0, done
    assert records(tmp_path / "outputs/cai/main") == records(here / "outputs/cai/main")


def test_pairs_of_earlier_runs_come_along_and_new_prompts_first(here, run_recipe, compose, terse, tmp_path):
    new = load_prompts(compose("cai").data).train[-1]
    old = records(here / "outputs/cai/main")[-1]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in (old, new)))
    earlier = f"{here}/outputs/cai/main"
    done = run_recipe(
        "cai", *SMALL, *terse, *judged(f"{here}/"), f"earlier=[{earlier}]", "first=first.jsonl", "seed=2", cwd=tmp_path
    )
    assert done.returncode == 0, done
    before, after = (json.loads((each / "funnel.json").read_text()) for each in
                     (here / "outputs/cai/main", tmp_path / "outputs/cai/main"))  # fmt: skip
    assert after["prompts"] == 9 and after["earlier"]["train_prefs"] <= before["written"]["train_prefs"]
    assert after["written"]["train_prefs"] >= after["earlier"]["train_prefs"]
    told, made = (json.loads((each / "result.json").read_text()) for each in
                  (here / "outputs/cai/main", tmp_path / "outputs/cai/main"))  # fmt: skip
    assert made["earlier"] == [told["provenance"]]
    ids = [[r["prompt_id"] for r in records(each) if r["split"] == "train"]
           for each in (here / "outputs/cai/main", tmp_path / "outputs/cai/main")]  # fmt: skip
    assert new["prompt_id"] in ids[1] and not set(ids[0]) & set(ids[1])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["judge.reward_model=outputs/reward/none"], "judge.reward_model=outputs/reward/none: does not exist"),
        (["model.id=tests/other"], "judge.reward_model=.*: was trained on tests/tiny, not on model.id=tests/other"),
        (["generate.n_samples=1"], "generate.n_samples=1: must be at least 2"),
        (["judge.margin=-0.1"], "judge.margin=-0.1: must be at least 0"),
        (["judge=function", "judge.function=no_such:better"], "judge.function=no_such:better: cannot be imported"),
    ],
)
def test_what_cannot_label_is_refused(here, compose, terse, monkeypatch, overrides, says):
    monkeypatch.chdir(here)
    given = [*SMALL, *terse, *(judged() if "judge=function" not in overrides else []), *overrides]
    with pytest.raises(Refusal, match=f"^{says}"):
        make_pairs.check(cfg := compose("cai", *given))
        load.find_judge(cfg)
