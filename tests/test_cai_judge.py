"""A judge's soft label and its worth: exact properties, planted faults, the gate."""

import math
import zlib

import numpy as np
import pytest
from omegaconf import OmegaConf

from rlhf_recipes.cai import constitution, gate, judge, prompt_templates, scored
from rlhf_recipes.cai.backend import Journal
from rlhf_recipes.cai.judge import Judge, Pair
from rlhf_recipes.evaluation import fixed_answers, page
from rlhf_recipes.evaluation.measurements import Measurements

USER = [{"role": "user", "content": "a question"}]


class Stub:
    """Answers every question with log-probabilities that `odds(first, second, asked)` gives."""

    name, places = "stub", 0

    def __init__(self, odds, mass=1.0):
        self.odds, self.mass, self.asked = odds, mass, []

    def answer(self, requests, known, what):
        for request in requests:
            self.asked.append(request)
            if request.options:
                text = request.messages[0]["content"]
                a, b = (text.partition(f"Reply {name}:\n> ")[2].partition("\n\n")[0] for name in "AB")
                odds = self.odds(a, b, text)
                p = 1 / (1 + math.exp(-odds))
                logps = None if self.mass is None else [math.log(p * self.mass), math.log((1 - p) * self.mass)]
                yield [(request, {"logps": logps, "prompt_tokens": 1, "tokens": 0})]
            else:
                yield [(request, {"text": "A thought.", "finished": True, "prompt_tokens": 1, "tokens": 3})]


@pytest.fixture
def cfg(compose):
    return compose("cai", "constitution=clinic")


@pytest.fixture
def make(cfg, tmp_path):
    """A judge on a stub, and the journal of its answers."""

    def made(odds, mass=1.0, prior=True, **settings):
        settings = {"prior_correction": prior, **settings}
        judging = OmegaConf.merge(cfg.judging, settings)
        critic = Judge(Stub(odds, mass), constitution.load(cfg.constitution), judging, seed=3)
        journal = Journal(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl")
        critic.learn_priors(journal)
        return critic, journal

    return made


def erratic(a, b, text):
    """Log-odds without any rule, the same for the same question."""
    return (zlib.crc32(repr((a, b, text)).encode()) % 1000) / 200 - 2.5


def pairs(count=40):
    return [Pair(f"p{n}", USER, f"reply {n} {'x' * (n % 7)}", f"other {n} {'y' * (n % 5)}") for n in range(count)]


def swapped(each):
    return Pair(each.prompt_id, each.prompt, each.second, each.first)


@pytest.mark.parametrize("mode", ["logprob", "cot"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_both_orders_sum_to_one_and_a_reply_equals_itself(make, mode, temperature):
    critic, journal = make(erratic, mode=mode)
    critic.temperature = temperature
    there = critic.compare(pairs(), journal, "")
    back = critic.compare([swapped(each) for each in pairs()], journal, "")
    for a, b in zip(there, back, strict=True):
        assert a.p + b.p == pytest.approx(1, abs=1e-12) and a.flip == b.flip
        assert a.spread == pytest.approx(b.spread) and a.position_gap == pytest.approx(b.position_gap)
    assert len({round(a.p, 6) for a in there}) > (5 if mode == "logprob" else 2)
    same = critic.compare([Pair("p", USER, "alike", "alike")], journal, "")
    assert same[0].p == 0.5


@pytest.mark.parametrize("prior", [True, False])
def test_a_planted_position_bias_is_measured_and_removed(make, prior):
    """Both replies alike to the judge, but for 0.3 of probability for place A: sigma(s_AB) - sigma(s_BA) = 0.3."""
    bias = math.log(0.65 / 0.35)
    critic, journal = make(lambda a, b, text: bias, prior=prior)
    found = critic.compare(pairs(), journal, "")
    assert np.mean([each.p for each in found]) == pytest.approx(0.5, abs=1e-12)
    gap = 0.0 if prior else 0.3  # taken off before, or seen
    assert np.mean([each.position_gap for each in found]) == pytest.approx(gap, abs=1e-9)


def test_the_prior_is_that_of_each_principle(make, cfg):
    """A judge that likes A under one principle alone still says what it thinks of the replies."""
    odd = cfg.constitution.principles[2].judgement
    critic, journal = make(lambda a, b, text: 1.5 * (odd in text) + 0.8 * (("reply" in a) - ("reply" in b)),
                           principles_per_pair=10)  # fmt: skip
    assert critic.priors == pytest.approx({p.id: 1.5 * (p.judgement == odd) for p in critic.constitution.principles})
    for found in critic.compare(pairs(5), journal, ""):
        assert found.p == pytest.approx(1 / (1 + math.exp(-0.8)))
        assert found.spread == pytest.approx(0, abs=1e-9) and not found.flip and len(found.by_principle) == 10


def test_principles_are_averaged_as_probabilities(make, cfg):
    """Log-odds +3 under one of two principles, -1 under the other: p = (sigma(3) + sigma(-1)) / 2 = 0.6108."""
    first = cfg.constitution.principles[0].judgement
    critic, journal = make(
        lambda a, b, text: (3 if first in text else -1) * (("reply" in a) - ("reply" in b)), principles_per_pair=10
    )
    critic.constitution.principles[2:] = []
    (found,) = critic.compare(pairs(1), journal, "")
    assert found.p == pytest.approx(0.6107577, abs=1e-6)
    assert found.spread == pytest.approx((0.9525741 - 0.2689414) / 2, abs=1e-6)


def test_a_chain_of_thought_is_clamped_and_comes_before_the_letters(make):
    critic, journal = make(lambda a, b, text: 9.0 * (("reply" in a) - ("reply" in b)), mode="cot")
    assert [each.p for each in critic.compare(pairs(3), journal, "")] == pytest.approx([0.6] * 3)
    asked = [request for request in critic.backend.asked if request.options]
    assert all([turn["role"] for turn in r.messages] == ["user", "assistant", "user"] for r in asked)
    assert all(r.messages[1]["content"] == "A thought." for r in asked)


@pytest.mark.parametrize("mass", [None, 0.3])
def test_no_letter_is_no_answer(make, mass):
    critic, journal = make(erratic, mass=mass)
    assert [each.p for each in critic.compare(pairs(3), journal, "")] == [None] * 3


def test_a_flip_is_a_winner_that_changes_with_the_order(make):
    critic, journal = make(lambda a, b, text: 0.5, prior=False)
    assert all(each.flip for each in critic.compare(pairs(3), journal, ""))
    critic, journal = make(lambda a, b, text: 0.5 + ("reply" in a) - ("reply" in b), prior=False)
    assert not any(each.flip for each in critic.compare(pairs(3), journal, ""))


def test_equal_questions_are_asked_once_and_answers_outlive_the_judge(make, tmp_path):
    critic, journal = make(erratic)
    critic.compare(pairs(3) + pairs(3), journal, "")
    asked = len(critic.backend.asked)
    assert asked == len({request.key for request in critic.backend.asked})
    again = Journal(journal.path)
    assert critic.compare(pairs(3), again, "") == critic.compare(pairs(3), journal, "")
    assert len(critic.backend.asked) == asked


def gold(count=120, seed=0):
    """Chosen replies that are longer on 60 % of the pairs."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        sizes = (30, 20) if rng.random() < 0.6 else (20, 30)
        chosen, rejected = (f"{word}{n} " + "w" * size for word, size in zip(("good", "bad"), sizes, strict=True))
        rows.append({"prompt_id": f"p{n}", "prompt": USER, "chosen": said(chosen), "rejected": said(rejected)})
    return rows


def said(text):
    return [{"role": "assistant", "content": text}]


def examined(make, cfg, odds, **settings):
    critic, journal = make(odds, **settings)
    return gate.examine(critic, gold(), cfg, journal), critic


def test_a_judge_that_knows_passes(make, cfg):
    found, critic = examined(make, cfg, lambda a, b, text: 1.2 * (("good" in a) - ("good" in b)))
    assert found["passed"] and found["agreement"].value == 1 and found["kappa"].value == 1
    assert found["best_baseline"] == "the longer wins" and 0.5 < found["baselines"]["the longer wins"].value < 0.7
    assert gate.decide(found, critic, cfg) == (list(cfg.sources), critic)
    assert gate.headline(found)["before"] == found["baselines"]["the longer wins"]


@pytest.mark.parametrize(
    ("odds", "fails"),
    [
        (lambda a, b, text: 1.2 * np.sign(len(a) - len(b)), "gain over 'the longer wins', lower bound"),
        (lambda a, b, text: 5.0, "same winner after a swap"),
        (erratic, "gain over 'the longer wins', lower bound"),
    ],
)
def test_a_judge_that_knows_nothing_fails(make, cfg, odds, fails, capsys):
    found, critic = examined(make, cfg, odds, prior=False)
    assert not found["passed"] and fails in [check["name"] for check in found["checks"] if not check["passed"]]
    assert "FAILED" in gate.describe(found)
    assert gate.decide(found, critic, cfg) == (["contrastive"], None)
    assert gate.decide(found, critic, OmegaConf.merge(cfg, {"gate": {"fails": "ignore"}}))[1] is critic
    with pytest.raises(ValueError, match=r"^gate: stub fails it \(.*gate\.fails=contrastive"):
        gate.decide(found, critic, OmegaConf.merge(cfg, {"gate": {"fails": "stop"}}))


def test_a_judge_that_does_not_answer_fails(make, cfg):
    found, _ = examined(make, cfg, erratic, mass=0.2)
    assert not found["passed"] and found["parsed"].value == 0 and found["agreement"].value == 0.5
    assert found["kappa"].value == 0


def test_kappa_of_a_judge_that_is_always_wrong_is_minus_one(make, cfg):
    found, _ = examined(make, cfg, lambda a, b, text: ("bad" in a) - ("bad" in b))
    kappa = found["kappa"]
    assert kappa.value == -1 and kappa.low == -1 and -1 < kappa.high < -0.8 and kappa.n == 120


def test_a_temperature_is_found_and_used_where_there_are_pairs_enough(make, cfg):
    """Log-odds three times too large on pairs of which 70 % are right: T near 9 / logit(0.7)."""
    right = {n: n // 2 % 10 < 7 for n in range(120)}  # in both halves of the prompts

    def odds(a, b, text):
        a_is_good = "good" in a
        n = int(a.split()[0].removeprefix("good").removeprefix("bad")) if a[0] in "gb" else 0
        return 9.0 if a_is_good == right.get(n, True) else -9.0

    found, critic = examined(make, cfg, odds, prior=False)
    assert found["temperature"] == pytest.approx(9 / math.log(0.7 / 0.3), rel=0.05) and critic.temperature == 1.0
    assert found["calibration_error"]["before"] == pytest.approx(0.3, abs=0.01)
    assert found["calibration_error"]["after"] < 0.2 and found["brier"]["after"].value < 0.25
    few = OmegaConf.merge(cfg, {"judging": {"min_calibration_pairs": 100}})
    critic, journal = make(odds, prior=False)
    used = gate.examine(critic, gold(), few, journal)
    assert used["temperature"] == critic.temperature and used["applied"] and not found["applied"]
    by = scored.FunctionJudge(scored.Function(lambda prompts, *_: [0.9] * len(prompts), "f"))
    assert not gate.examine(by, gold(), few, journal)["applied"]  # whose probabilities are taken as they are


def test_calibration_error_of_a_calibrated_judge_is_small():
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.05, 0.95, 5000)
    p = np.where(rng.random(5000) < truth, truth, 1 - truth)  # of "the first is better", where the first is
    assert judge.calibration_error(p) <= 0.02
    assert judge.fit_temperature(p) == pytest.approx(1.0, abs=0.1)
    assert judge.calibration_error(np.full(100, 0.9)) == pytest.approx(0.1)


def test_the_estimate_counts_the_calls_that_are_made(cfg, tmp_path):
    from rlhf_recipes.cai import make_pairs

    cfg = OmegaConf.merge(cfg, {"generate": {"n_samples": 3}, "revise": {"n_revisions": 2}})
    rows = [
        {"prompt_id": f"p{n}", "family": None, "split": "train", "prompt": [{"role": "user", "content": f"ask {n}"}]}
        for n in range(5)
    ]

    class Writer(Stub):
        """Fit to be judged, and different each time."""

        def answer(self, requests, known, what):
            for group in super().answer(requests, known, what):
                (request, answer), *_ = group
                if "text" in answer:
                    name = f"word{request.key[:6]}"
                    answer["text"] = f"{name} a{name} b{name} c{name} d{name} e{name} f{name}"
                yield [(request, answer)]

    backend = Writer(erratic)
    critic = Judge(backend, constitution.load(cfg.constitution), cfg.judging, 0)
    sources = list(make_pairs.SOURCES)
    spend = gate.estimate(cfg, sources, rows, backend, critic)
    backend.asked.clear()
    maker = make_pairs.PairMaker(backend, critic, critic.constitution, sources, cfg)
    made = maker.records(rows, Journal(tmp_path / "a.jsonl"), "")
    assert spend["prompts"] == 5 and spend["calls"] == len(backend.asked) == 5 * (5 + 3 + 2 + 5 * 8)
    assert all(not pair["unfit"] for record in made for pair in record["pairs"]), made
    assert spend["usd"] == 0 and spend["minutes"] >= 0


def test_what_is_left_to_make_is_of_this_part_and_has_no_records(cfg, tmp_path):
    from rlhf_recipes.cai.make_pairs import PairMaker

    rows = [{"prompt_id": str(n)} for n in range(9)]
    (tmp_path / "00001").mkdir()
    (tmp_path / "00001" / "records.jsonl").touch()
    for shards, left in ((None, "0145678"), ("2/2", "67"), ("1/2", "01458"), ("2/3", "8")):
        some = OmegaConf.merge(cfg, {"shard_size": 2, "shards": shards})
        made = PairMaker(None, None, None, [], some).left(rows, tmp_path)
        assert "".join(row["prompt_id"] for row in made) == left


def test_the_longest_request_is_of_the_longest_prompt(cfg):
    rows = [{"prompt": [{"role": "user", "content": "x" * count}]} for count in (4, 400, 40)]
    cfg = OmegaConf.merge(cfg, {"generate": {"max_new_tokens": 200}, "revise": {"max_new_tokens": 100, "few_shot": 1}})
    prompt = 400 / 4 + gate.TEMPLATE
    assert gate.longest(cfg, ["on_policy", "revision"], rows, []) == {
        "generator": prompt + gate.SHOT + 200 + 100 + 100,  # a revision, after a reply and a critique
        "judge": prompt + 2 * 200 + gate.QUESTION,
    }
    gold = [{**rows[0], "chosen": [{"content": "é" * 4000}], "rejected": [{"content": ""}]}]
    assert gate.longest(cfg, ["on_policy"], rows, gold)["judge"] == 2001 + 3 * gate.TEMPLATE + gate.QUESTION


def test_the_cost_of_a_priced_endpoint_is_said(compose):
    from rlhf_recipes.cai.make_pairs import price

    server = ("generator=server", "generator.model=m", "judge=server", "judge.model=m")
    cfg = compose("cai", *server, "generator.prompt_price=2", "generator.completion_price=10")
    assert price(cfg.generator, 1e6, 5e5) == 7.0
    assert price(cfg.judge, 1e6, 0) is None


def test_layout_names_the_options_that_are_read(cfg):
    asked = prompt_templates.judgement(USER, "one", "two", constitution.load(cfg.constitution).principles[0])[-1][
        "content"
    ]
    assert all(f"({letter}) Reply {letter}" in asked for letter in prompt_templates.LETTERS)


def test_a_judge_compares_with_the_answers_of_others_and_is_asked_again(make, cfg):
    """One that likes the system's texts by 0.8, and by 0.7 under the draws of the second asking; of the same text it
    is not asked."""
    odds, asking = {0: math.log(4), 1: math.log(7 / 3)}, [0]

    def own(text):
        return odds[asking[-1]] / 2 * (1 if text.startswith("own") else -1)

    critic, journal = make(lambda a, b, text: own(a) - own(b))

    def again(number):
        asking.append(number)
        return Judge.again(critic, number)

    rows = [
        {"prompt_id": f"p{n}", "prompt": USER, "output": "same" if n == 0 else f"other {n}", "tokens": 2,
         "systems": {"dpo": {"text": "same" if n == 0 else f"own {n}", "tokens": 2, "finished": True}}}
        for n in range(6)
    ]  # fmt: skip
    found = Measurements("base", ["dpo"], fixed={"name": "a.json", "rows": rows})
    asked_before = len(critic.backend.asked)
    critic.again = again
    judging = OmegaConf.create({"tie_margin": 0.0, "asked_again": 0.5})
    judged = fixed_answers.compare(critic, found, journal, judging).fixed["systems"]["dpo"]
    assert [each["p"] for each in judged["judged"]] == pytest.approx([0.5, *[0.8] * 5])
    assert [each["p"] for each in judged["again"]] == pytest.approx([0.5, 0.7, 0.7])
    assert [each["asked"] for each in judged["judged"]] == [False, *[True] * 5]
    principles = cfg.judging.principles_per_pair
    assert len(critic.backend.asked) - asked_before == 2 * principles * (5 + 2)
    [row] = page._against_rows(fixed_answers.summarise(found.fixed | {"systems": {"dpo": judged}}))
    assert row["name"] == "dpo" and row["cells"][0][0] == "75.0 %" and row["cells"][2] == ("-6.7 points, n 3", "")
