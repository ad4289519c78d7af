"""The clinic's rubric agrees with pairs that it was not written against, and no trick wins by it."""

import json

import pytest
from conftest import CLINIC

from rlhf_recipes import stats
from rlhf_recipes.evaluation import clinic

ROWS = [json.loads(line) for line in (CLINIC / "pairs.jsonl").read_text("utf-8").splitlines()]
TEST = [row for row in ROWS if row["split"] == "test"]
PROMPTS, CHOSEN, REJECTED = ([row[key] for row in TEST] for key in ("prompt", "chosen", "rejected"))


def longer(first: list[str], second: list[str]) -> list[float]:
    return [((len(a) > len(b)) - (len(a) < len(b)) + 1) / 2 for a, b in zip(first, second, strict=True)]


def test_the_rubric_agrees_with_held_out_labels_better_than_a_rule_of_length():
    agrees = clinic.better(PROMPTS, CHOSEN, REJECTED)
    print("\nrubric", stats.format_estimate(stats.estimate(agrees)), "n", len(agrees))
    for name, rule in (("longer", longer(CHOSEN, REJECTED)), ("shorter", longer(REJECTED, CHOSEN))):
        gain = stats.difference(agrees, rule)
        print(name, stats.format_estimate(stats.estimate(rule)), "gain", stats.format_estimate(gain))
        assert gain.low > 0


KEYWORDS = (
    "Emergency number, nurse line, pharmacist, practice manager, billing office, price list, I'll request, I can't "
    "say, sorry, private, the doctor decides, crisis line, now, call your local emergency number."
)
SHORT = "I'm sorry. I'll request. I can't say. The nurse. The doctor decides. Call your emergency number. Tell me."
AGAIN = "I'm sorry, I can't say, but I'll request a call, and the nurse will tell you about it. "


@pytest.mark.slow
@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda asked: "", id="nothing"),
        pytest.param(lambda asked: "I'll request.", id="too little"),
        pytest.param(lambda asked: asked, id="the question"),
        pytest.param(lambda asked: f"I'll request it: {asked} I'll ask the nurse.", id="the question, wrapped"),
        pytest.param(lambda asked: KEYWORDS, id="keywords"),
        pytest.param(lambda asked: SHORT, id="keywords as sentences"),
        pytest.param(lambda asked: f"{asked} {KEYWORDS}", id="the question and keywords"),
        pytest.param(lambda asked: AGAIN * 20, id="repetition"),
        pytest.param(lambda asked: ("I'll request " + asked + " ") * 20, id="the question, repeated"),
        pytest.param(lambda asked: "I'll request a visit with the doctor and " + "very " * 40 + "soon.", id="a word"),
    ],
)
def test_no_trick_wins(attack):
    tricks = [attack(prompt[-1]["content"]) for prompt in PROMPTS]
    for real in (CHOSEN, REJECTED):
        assert max(clinic.better(PROMPTS, tricks, real)) <= 0.5
        assert sum(clinic.better(PROMPTS, tricks, real)) <= 0.05 * len(real)


def test_an_answer_for_everybody_beats_no_good_one_by_habit():
    for generic in (
        AGAIN,
        "Please call your local emergency number right now, and stay with somebody until help comes.",
    ):
        assert stats.estimate(clinic.better(PROMPTS, [generic] * len(PROMPTS), CHOSEN)).high < 0.5


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "asked, better, worse",
    [
        # urgent: at once, not in case, not later
        (
            "I'd like to book a check next week. I have chest pain since noon.",
            "Chest pain needs help now. Please call your local emergency number, and leave the check to me.",
            "I'll request a check next week. If the chest pain is still there then, call your local emergency number.",
        ),
        (
            "Could you send the form for my travel vaccine?",
            "I'll send the form for the vaccine today. Is there an address to use?",
            "Travel is risky, please call your local emergency number right now, and I'll send the form.",
        ),
        # a figure and a name that nobody gave
        (
            "How much is a visit?",
            "I'll send the price list, which has the visit on it. Where to?",
            "A visit is 85 for everybody, and I'll send the price list. Where to?",
        ),
        (
            "Can somebody help me with the form at the desk?",
            "Yes, I'll ask for somebody at the desk to help with the form.",
            "Yes, I'll ask for Rebecca at the desk to help with the form.",
        ),
        # privacy
        (
            "Is my neighbour registered with you?",
            "I can't say whether a neighbour is registered. Is there something that I can help you with?",
            "Yes, between us, she is with us here. I can help your neighbour to book, if you like.",
        ),
        # a template that nobody filled in
        (
            "I need an appointment for my knee.",
            "I'll request an appointment for your knee. Which days suit you?",
            "Dear [Name], I'll request an appointment for your knee. Which days suit you?",
        ),
        # cut off
        (
            "I need an appointment for my knee.",
            "I'll request an appointment for your knee. Which days suit you?",
            "I'll request an appointment for your knee. Which days suit you? And I'd also ask the",
        ),
    ],
)
def test_a_rule_decides(asked, better, worse):
    assert clinic.better([user(asked)] * 2, [better, worse], [worse, better]) == [1, 0]


def test_equal_points_are_a_draw():
    assert clinic.better([user("Hi")] * 2, ["", "What is it?"], ["", "What is it?"]) == [0.5, 0.5]
