"""recipes/cai.py as a user runs it: to its end, killed and continued, wrongly called; what the next recipes get."""

import json
import signal
from types import SimpleNamespace

import pytest
import warm

from rlhf_recipes.cai import make_pairs
from rlhf_recipes.errors import Refusal

SMALL = (
    "constitution=clinic",
    "data.train_size=6",
    "data.eval_size=3",
    "gate.pairs=4",
    "gate.fails=ignore",
    "generate.max_new_tokens=16",
    "revise.max_new_tokens=16",
    "filters.min_words=1",
    "filters.max_length_ratio=9",
    "judging.principles_per_pair=2",
    "shard_size=4",
    "quantization=none",
)


@pytest.fixture(scope="module")
def finished(run_recipe, terse, tmp_path_factory):
    """The folder in which `cai` ran to its end, and what it printed."""
    folder = tmp_path_factory.mktemp("cai")
    done = run_recipe("cai", *SMALL, *terse, cwd=folder, env={warm.DRAWN: "1"})
    assert done.returncode == 0, done
    return folder, done


def answers(folder):
    lines = [line for path in sorted(folder.rglob("answers.jsonl")) for line in path.read_text().splitlines()]
    return [entry for line in lines for entry in json.loads(line)]


def test_a_run_says_what_became_of_every_pair(finished):
    folder, done = finished
    run = folder / "outputs" / "cai" / "main"
    result = json.loads((run / "result.json").read_text())
    funnel = result["funnel"]
    assert funnel["prompts"] == 9 and funnel["pairs"] == 18 and result["labelled_by"] == "judge"
    assert sum(funnel["unfit"].values()) + sum(funnel["routes"].values()) == 18
    assert result["main"]["name"] == "judge_agreement" and result["main"]["after"]["n"] == 4
    assert json.loads((run / "funnel.json").read_text()) == funnel
    for said in ("estimate: 9 prompts", "cai finished in", "set aside", "  next      "):
        assert said in done.stdout, done
    assert (run / "funnel.png").stat().st_size > 5000
    card = (run / "README.md").read_text()
    assert result["constitution"]["sha256"][:16] in card and str(folder) not in card
    asked = answers(run) + [
        entry for line in (run / "gate.jsonl").read_text().splitlines() for entry in json.loads(line)
    ]
    assert {entry["step"].partition(".")[0] for entry in asked} >= {"draft", "critique", "revision", "sample"}
    assert len({entry["key"] for entry in asked}) == len(asked)
    assert result["spent"]["calls"] == len(asked)
    assert result["spent"]["completion_tokens"] == sum(entry["answer"]["tokens"] for entry in asked)


def test_jobs_with_shards_of_their_own_are_joined_to_the_same(finished, run_recipe, terse, tmp_path):
    """Two jobs as of an array, then the command without `shards`: it makes nothing itself."""
    for part, count in (("1/2", 5), ("2/2", 4)):
        done = run_recipe("cai", *SMALL, *terse, f"shards={part}", cwd=tmp_path)
        assert done.returncode == 0 and "when all 2 are done" in done.stdout, done
        assert f"estimate: {count} prompts" in done.stdout, done
    here, whole = tmp_path / "outputs/cai", finished[0] / "outputs/cai/main"
    made = [sorted(path.name for path in (here / f"main.{k}-of-2/shards").iterdir()) for k in (1, 2)]
    assert made == [["00000", "00002"], ["00001"]]
    done = run_recipe("cai", *SMALL, *terse, cwd=tmp_path)
    assert done.returncode == 0 and "shard 1/3" not in done.stdout + done.stderr, done
    assert "estimate: " not in done.stdout, done
    for file in ("funnel.json", "ledger.json", "train_prefs.parquet", "test_prefs.parquet", "train_sft.parquet"):
        assert (here / "main" / file).read_bytes() == (whole / file).read_bytes(), file
    assert json.loads((here / "main/result.json").read_text())["spent"]["calls"] == len(answers(whole)) + len(
        [entry for line in (whole / "gate.jsonl").read_text().splitlines() for entry in json.loads(line)]
    )
    done = run_recipe("cai", *SMALL, *terse, "seed=7", "overwrite=true", cwd=tmp_path)
    assert done.returncode == 2 and "main.1-of-2: was made with other settings" in done.stderr


@pytest.mark.parametrize("shards", ["3/2", "0/2", "2/", "a/b"])
def test_parts_that_cannot_be_are_refused(compose, shards):
    with pytest.raises(Refusal, match=f"^shards={shards}: must be k/n"):
        make_pairs.check(compose("cai", f"shards={shards}"))


SERVED, SCORED = ("generator=server", "generator.model=m"), ("judge=reward", "judge.reward_model=x")
BY_FUNCTION = ("judge=function", "judge.function=json:loads")


@pytest.mark.parametrize(
    ("chosen", "unread"),
    [
        (SERVED, "model.adapter=x"),
        (SERVED, "max_prompt_length=16"),
        (SERVED, "data.too_long=stop"),
        (SCORED, "route.tie_margin=0.01"),
        (BY_FUNCTION, "route.max_spread=0.2"),
        (BY_FUNCTION, "judging.min_calibration_pairs=10"),
    ],
)
def test_a_setting_that_is_not_read_is_refused(compose, chosen, unread):
    with pytest.raises(Refusal, match=rf"^{unread}: is not read with {chosen[0]}\. Leave it out\.$"):
        make_pairs.check(compose("cai", *chosen, unread))
    make_pairs.check(compose("cai", *SERVED, *BY_FUNCTION, "experiment=cai/demo", "route.tie_margin=0.01"))


BY_PEOPLE, ON_POLICY = ("judge=people",), ("sources=[on_policy]",)


@pytest.mark.parametrize(
    ("chosen", "unread"),
    [
        (BY_FUNCTION, "judging.votes=True"),
        (SCORED, "judging.principles_per_pair=2"),
        (SCORED, "gate.min_swap_consistency=0.5"),
        (BY_PEOPLE, "judging.min_calibration_pairs=10"),
        (BY_PEOPLE, "gate.pairs=9"),
        (("judge=local",), "judging.votes=True"),
        (("judging.mode=logprob",), "judging.cot_tokens=9"),
        (ON_POLICY, "revise.n_revisions=4"),
        (("sources=[revision]",), "generate.n_samples=4"),
    ],
)
def test_a_setting_that_is_not_read_is_refused_where_it_was_typed(compose, chosen, unread):
    """An experiment may have it: it says it for whoever judges."""
    cfg = compose("cai", *chosen, unread)
    with pytest.raises(Refusal) as caught:
        make_pairs.check(cfg, [*chosen, f"+{unread}"])
    assert str(caught.value) == f"{unread}: is not read with {chosen[0]}. Leave it out."
    make_pairs.check(cfg, chosen)
    key = unread.partition("=")[0]
    make_pairs.check(compose("cai", *chosen), [*chosen, f"{key}=as it is"])  # its default, said


def test_a_setting_that_is_read_is_taken_where_it_was_typed(compose):
    for read in (
        ["judging.mode=cot", "judging.cot_tokens=9"],
        [*SCORED, "judging.min_calibration_pairs=10"],
        ["revise.n_revisions=4", "generate.n_samples=3"],
        [*BY_FUNCTION, "gate.min_swap_consistency=0.5", "experiment=cai/demo"],
        ["judge=server", "judge.model=m", "judging.votes=true"],
    ):
        make_pairs.check(compose("cai", *read), read)


def test_what_comes_first_is_counted_or_refused(compose, tmp_path, capsys):
    from rlhf_recipes.cai import earlier

    with pytest.raises(
        Refusal, match=r"^first=absent\.jsonl: is not read where all prompts are taken\. Set data\.tra"
    ):
        earlier.prompts(compose("cai", "first=absent.jsonl"), [])
    known = earlier.prompts(compose("cai"), []).train[-1]["prompt"][-1]["content"]
    path = tmp_path / "first.jsonl"
    path.write_text("".join(json.dumps({"prompt": asked}) + "\n" for asked in (known, "nobody has this")))
    [row] = earlier.prompts(compose("cai", f"first={path}", "data.train_size=1"), []).train
    assert row["prompt"][-1]["content"] == known
    assert f"first: 1 of 2 prompts of {path} are in the data\n" in capsys.readouterr().out
    # what an earlier run has answered is no news, listed or not
    answered = [SimpleNamespace(prompt_ids=lambda: {row["prompt_id"]})]
    cfg = compose("cai", f"first={path}", "data.train_size=99")
    before, after = ([each["prompt_id"] for each in earlier.prompts(cfg, runs).train] for runs in ([], answered))
    assert before[0] == row["prompt_id"] and len(before) == 99 and after[:98] == before[1:]
    assert row["prompt_id"] not in after


def test_a_judge_is_refused_before_a_generator_is_loaded(compose, monkeypatch):
    from rlhf_recipes import models
    from rlhf_recipes.cai import load

    def refuses(*_):
        raise Refusal("not these")

    served = load.load_one
    monkeypatch.setattr(models, "check_rewards", refuses)
    monkeypatch.setattr(load, "load_one", lambda node, *_: served(node, *_) if node.get("kind") else pytest.fail())
    for judge, told in (
        (SCORED, "not these"),
        (("judge=server", "judge.model=m", "judge.api_key_env=NONE_X"), "NONE_X"),
    ):
        with pytest.raises(Refusal, match=told):
            load.load(compose("cai", *judge), None, None, None)


def test_critique_and_revision_follow_one_principle(finished):
    folder, _ = finished
    steps = []
    for path in sorted((folder / "outputs/cai/main/shards").rglob("records.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert len(record["steps"]) == (0 if record["draft"]["unfit"] else 2)
            assert [pair["source"] for pair in record["pairs"]] == ["revision", "on_policy"]
            steps += record["steps"]
    assert len(steps) > 4 and all(step["critique"] and step["revision"] for step in steps)
    assert len({step["principle"] for step in steps}) > 1


def test_a_finished_run_is_kept(finished, run_recipe, terse):
    folder, _ = finished
    again = run_recipe("cai", *SMALL, *terse, cwd=folder)
    assert again.returncode == 2 and "holds a finished run" in again.stderr


@pytest.mark.slow
def test_killed_at_any_step_it_ends_with_the_same_records(finished, run_recipe, terse, tmp_path):
    """SIGKILL when a step has its first new answer, four times; nothing that was answered is asked again."""
    run = tmp_path / "outputs" / "cai" / "main"
    for step in ("draft", "revision.1", "sample.2", "judge"):
        killed = run_recipe("cai", *SMALL, *terse, cwd=tmp_path, kill=f"answered {step}")
        assert killed.returncode == -signal.SIGKILL, killed
        assert any(entry["step"].startswith(step) for entry in answers(run))
    done = run_recipe("cai", *SMALL, *terse, cwd=tmp_path)
    assert done.returncode == 0 and "Continuing outputs/cai/main from what was answered." in done.stdout, done
    expected = finished[0] / "outputs" / "cai" / "main"
    for path in sorted(expected.glob("shards/*/records.jsonl")):
        assert (run / path.relative_to(expected)).read_bytes() == path.read_bytes()
    keys = [entry["key"] for entry in answers(run)]
    assert sorted(keys) == sorted(entry["key"] for entry in answers(expected))


def test_another_config_does_not_continue_it(run_recipe, terse, tmp_path):
    run = tmp_path / "outputs" / "cai" / "main"
    killed = run_recipe("cai", *SMALL, *terse, cwd=tmp_path, kill="answered judge")
    assert killed.returncode == -signal.SIGKILL, killed
    done = run_recipe("cai", *SMALL, *terse, "seed=7", cwd=tmp_path)
    assert done.returncode == 2 and "holds an interrupted run with seed=42" in done.stderr, done
    assert (run / "gate.jsonl").exists()


def test_the_gate_alone(run_recipe, terse, tmp_path):
    done = run_recipe("cai", *SMALL, *terse, "gate.only=true", "gate.gold=data", cwd=tmp_path)
    assert done.returncode == 0, done
    result = json.loads((tmp_path / "outputs/cai/main/result.json").read_text())
    assert "funnel" not in result and result["gate"]["agreement"]["n"] == 4
    assert not (tmp_path / "outputs/cai/main/shards").exists()


def test_a_judge_that_fails_labels_nothing(run_recipe, terse, tmp_path):
    """The random model fails the gate: by default the pairs are contrastive and without p; `stop` makes none."""
    run = tmp_path / "outputs" / "cai" / "main"
    stopped = run_recipe("cai", *SMALL, *terse, "gate.fails=stop", cwd=tmp_path)
    assert stopped.returncode == 2 and "error: gate: tests/tiny fails it (" in stopped.stderr, stopped
    assert not (run / "shards").exists() and (run / "gate.jsonl").exists()
    done = run_recipe("cai", *SMALL, *terse, "gate.fails=contrastive", "overwrite=true", cwd=tmp_path)
    assert done.returncode == 0 and "Its labels are not used" in done.stdout, done
    result = json.loads((run / "result.json").read_text())
    assert result["labelled_by"] == "construction" and not result["gate"]["passed"]
    pairs = [
        p
        for path in run.rglob("records.jsonl")
        for line in path.read_text().splitlines()
        for p in json.loads(line)["pairs"]
    ]
    assert len(pairs) == 9 and {pair["source"] for pair in pairs} == {"contrastive"}
    assert all(pair["p"] is None and pair["route"] in (None, "accepted") for pair in pairs)
    assert "nobody has looked whether it is better" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sources=[revison]"], "sources=[revison]: not one of revision, on_policy, contrastive; did you mean 'revis"),
        (["sources=[]"], "sources=[]: makes no pairs."),
        (["generate.n_samples=1"], "generate.n_samples=1: must be at least 2."),
        (["judging.mode=thinking"], "judging.mode=thinking: not one of logprob, cot"),
        (["gate.fails=never"], "gate.fails=never: not one of contrastive, stop, ignore"),
        (["gate.gold=absent.jsonl"], "absent.jsonl"),
        (["constitution=clinc"], "constitution=clinc: there is no such option; did you mean 'clinic'?"),
        (["constitution=local", "constitution.path=absent.yaml"], "constitution.path=absent.yaml: no such file."),
        (["constitution=local", "constitution.path=broken.yaml"], "broken.yaml:3: not valid YAML"),
        (["judge=server"], "judge.model: required, but not set."),
        (["judge.adapter=absent"], "judge.adapter=absent: does not exist."),
        (["generator.kindd=server"], "generator.kindd: there is no such key; did you mean 'generator.kind'?"),
        (["judging.min_option_mas=1"], "judging.min_option_mas: there is no such key"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(run_recipe, tmp_path, overrides, says):
    (tmp_path / "broken.yaml").write_text("name: x\nversion: [1\n")
    done = run_recipe("cai", *overrides, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done
    assert not (tmp_path / "outputs" / "cai" / "main").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("filters.min_words=500", "filters.min_words=500: is over filters.max_words. Change one."),
        ("generate.temperature=0", "generate.temperature=0: the samples of on_policy would be alike."),
    ],
)
def test_what_could_make_no_pair_is_refused(compose, override, says):
    with pytest.raises(ValueError) as caught:
        make_pairs.check(compose("cai", override))
    assert str(caught.value).startswith(says)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, compose):
    """A run folder with eight train and four test prompts, written by dataset.write."""
    from rlhf_recipes.cai import dataset

    folder = tmp_path_factory.mktemp("pairs") / "run"
    (folder / "shards").mkdir(parents=True)
    verdict = {"by_principle": {"a": 0.8}, "spread": 0.0, "position_gap": 0.0, "flip": False, "mass": 1.0}
    lines = []
    for n in range(12):
        words = " ".join(f"{chr(97 + n)}{word}" for word in ("one", "two", "three", "four", "five", "six"))
        pair = {"source": "on_policy", "first": f"{words} good", "second": f"{words} bad", "principle": None,
                "unfit": None, "p": 0.8, **verdict, "speaks_to_judge": False, "route": "accepted"}  # fmt: skip
        lines.append(json.dumps({
            "prompt_id": f"p{n}", "family": "f", "split": "train" if n < 8 else "test", "steps": [], "pairs": [pair],
            "prompt": [{"role": "user", "content": f"{words}?"}],
        }))  # fmt: skip
    shard = folder / "shards" / "records.jsonl"
    shard.write_text("\n".join(lines) + "\n")
    made = dataset.write([shard], folder, {"constitution": "c", "generator": "g", "judge": "j", "seed": 1})
    assert made["funnel"]["written"] | {"train_prefs": 8, "test_prefs": 4} == made["funnel"]["written"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "orpo", "simpo", "kto"])
def test_later_recipes_train_on_the_pairs(train, pairs, tmp_path, recipe):
    trained = train(recipe, tmp_path / recipe, "data=cai_pairs", f"data.path={pairs}", "data.train_size=8")
    assert (trained.result["counts"]["train"], trained.result["counts"]["test"]) == (8, 4)
    assert trained.result["status"] == "finished"
    if recipe == "reward":
        assert trained.trainer.train_dataset["margin"][:8] == [[0.8, 0.0]] * 8


def test_ppo_takes_the_prompts(pairs, compose):
    from rlhf_recipes.data.load import load_demonstrations, load_prompts

    splits = load_prompts(compose("ppo", "data=cai_pairs", f"data.path={pairs}", "reward_funcs=x:y").data)
    assert (len(splits.train), len(splits.test)) == (8, 4)
    node = compose(
        "sft", "data=cai_pairs", f"data.path={pairs}", "data.train_split=train_sft", "data.test_split=test_sft"
    )
    assert len(load_demonstrations(node.data).train) == 8
