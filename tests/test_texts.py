"""Text that is not what it seems: what is read as what, what stays text, what is refused."""

import gzip
import json
import time

import pytest
from conftest import ROOT

from rlhf_recipes.data.formats import parse_transcript
from rlhf_recipes.data.raw import LITERAL_LIMIT, Raw
from rlhf_recipes.data.texts import Drop, look
from rlhf_recipes.errors import Refusal

TOPICS = ("the lamp", "a kite", "our well", "the ferry", "some glue")


def turns(*said, system=None):
    """System message, then user and assistant in turn."""
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [{"role": "system", "content": system}, *found] if system else found


def chat(topic):
    return turns(f"Who mends {topic}?", "We do:\n\n- here", f"What does {topic} cost?", system="Be brief.")


def answers(topic):
    return (f"For {topic} we ask: four coins.", f"No idea about {topic}!")


def read(rows):
    reading = look(rows)
    return reading, [reading.read(row, f"rows:{number}") for number, row in enumerate(rows, 1)]


def rendered(begin, turn, names, end, cue):
    """A chat template: what begins a text, `turn` with role, content and end, names of roles, and the cue."""

    def render(messages):
        parts = [turn.format(role=names[each["role"]], content=each["content"], end=end) for each in messages]
        return begin + "".join(parts)

    return render, cue, end


def names(system="system", user="user", assistant="assistant"):
    return {"system": system, "user": user, "assistant": assistant}


def llama_2(messages):
    text = ""
    for each in messages:
        match each["role"]:
            case "system":
                text = f"<<SYS>>\n{each['content']}\n<</SYS>>\n\n"
            case "user":
                text = text if text.endswith("\n\n") else f"{text}<s>[INST] "
                text = f"<s>[INST] {text}" if text.startswith("<<SYS>>") else text
                text += f"{each['content']} [/INST]"
            case "assistant":
                text += f" {each['content']} </s>"
    return text


HEAD = "<|start_header_id|>{role}<|end_header_id|>\n\n"
TEMPLATES = {
    "ChatML": rendered(
        "",
        "<|im_start|>{role}\n{content}{end}\n",
        names(),
        "<|im_end|>",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "Llama 3": rendered(
        "<|begin_of_text|>", HEAD + "{content}{end}", names(), "<|eot_id|>", HEAD.format(role="assistant")
    ),
    "Llama 3 without its tokens": rendered("", "{role}\n\n{content}", names(), "", "assistant\n\n"),
    "Llama 2": (llama_2, "", " </s>"),
    "Gemma 4": rendered(
        "<bos>", "<|turn>{role}\n{content}{end}\n", names(assistant="model"), "<turn|>", "<|turn>model\n"
    ),
    "Zephyr": rendered("", "<|{role}|>\n{content}{end}\n", names(), "</s>", "<|assistant|>\n"),
    "Tulu": rendered("<|endoftext|>", "<|{role}|>\n{content}\n", names(), "<|endoftext|>", "<|assistant|>\n"),
    "GLM": rendered("[gMASK]<sop>", "<|{role}|>\n{content}", names(), "<|user|>", "<|assistant|>"),
    "DeepSeek": rendered(
        "<｜begin▁of▁sentence｜>",
        "{role}{content}",
        names("", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜Assistant｜>",
    ),
    "Command R": rendered(
        "<BOS_TOKEN>",
        "<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{content}{end}",
        names("SYSTEM", "USER", "CHATBOT"),
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "OpenChat": rendered(
        "<s>",
        "GPT4 Correct {role}: {content}{end}",
        names("User", "User", "Assistant"),
        "<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
    "gpt-oss": rendered(
        "",
        "<|start|>{role}<|message|>{content}{end}",
        names("developer"),
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ),
}
TRANSCRIPTS = {
    "HH": ("\n\n{}: {}", "Human", "Assistant", "\n\nAssistant:"),
    "HH, blanks": ("\n \n {} : {}\n", "Human", "Assistant", "\n \n Assistant :"),
    "lines": ("{}: {}\n", "User", "Bot", "Bot:"),
    "bold": ("**{}:** {}\n\n", "User", "Assistant", "**Assistant:** "),
    "guanaco": ("### {}: {}", "Human", "Assistant", "### Assistant:"),
    "vicuna": ("{}: {} ", "USER", "ASSISTANT", "ASSISTANT:"),
    "openchatkit": ("<{}>: {}\n", "human", "bot", "<bot>:"),
    "stackexchange": ("{}: {}\n\n", "Question", "Answer", "Answer: "),
    "chinese": ("{}：{}\n", "用户", "助手", "助手："),
}


@pytest.mark.parametrize(
    ("asked", "said", "is_read"),
    [
        (str, lambda text: str(text.encode()), True),
        (str, lambda text: str([text]), True),
        (json.dumps, json.dumps, True),
        (lambda text: str(text.encode()), lambda text: str(text.encode()), True),
        (str, json.dumps, False),  # quotations
        (json.dumps, str, False),
        (str, lambda text: json.dumps([text]), False),  # lists that were asked for
        (str, lambda text: str([text, text]), False),
    ],
)
def test_texts_that_were_written_down_are_read(asked, said, is_read):
    plain = [Raw(f"What does {topic} cost,\nand why?", answers(topic)) for topic in TOPICS]
    rows = [Raw(asked(raw.prompt), tuple(map(said, raw.answers))) for raw in plain]
    reading, found = read([*rows, plain[0]])
    assert found == [*(plain if is_read else rows), plain[0]]
    assert [note.endswith("as Python or JSON writes them down: parsed") for note in reading.notes] == [True] * is_read
    assert reading.counts == ({"unlike": 1} if is_read else {})


def test_line_breaks_that_were_written_down_are_said():
    rows = [Raw(f"List {topic}.", (f"one\\ntwo {topic}", "none at all")) for topic in TOPICS]
    code = Raw("Print it.", ('print("a\\n")\nprint("b")', "no idea at all"))
    reading, found = read([*rows, code])
    assert found == [*rows, code] and reading.counts == {"escaped": 5}


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("tokens", [True, False])
def test_the_dates_of_llama_are_no_system_message(tokens, system):
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    head, end = (HEAD, "<|eot_id|>") if tokens else ("{role}\n\n", "")
    said = [head.format(role=role) + text + end for role, text in (("system", dates + system), ("user", "Who {}?"))]
    rows = [
        Raw("".join(said).format(topic) + head.format(role="assistant").rstrip(), answers(topic)) for topic in TOPICS
    ]
    reading, found = read(rows)
    assert found == [Raw(turns(f"Who {topic}?", system=system), answers(topic)) for topic in TOPICS]
    assert not reading.counts


@pytest.mark.parametrize("shape", ["prompt and rest", "prompt and whole", "whole", "header in the answer"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rendered_template_gives_back_its_turns(name, shape):
    render, cue, end = TEMPLATES[name]
    said = [chat(topic)[name == "OpenChat" :] for topic in TOPICS]  # which has no system message
    rows = []
    for topic, messages in zip(TOPICS, said, strict=True):
        prompt = render(messages)
        ended = [cue + answer + end for answer in answers(topic)]
        rows.append(
            {
                "prompt and rest": Raw(prompt + cue, tuple(each.removeprefix(cue) for each in ended)),
                "prompt and whole": Raw(prompt + cue, tuple(prompt + each for each in ended)),
                "whole": Raw(None, tuple(prompt + each for each in ended)),
                "header in the answer": Raw(prompt, tuple(ended)),
            }[shape]
        )
    reading, found = read(rows)
    reading.refuse_if_most("rows")
    wanted = [Raw(messages, answers(topic)) for topic, messages in zip(TOPICS, said, strict=True)]
    if shape == "whole":
        wanted = [Raw(None, tuple([*raw.prompt, *turns("", answer)[1:]] for answer in raw.answers)) for raw in wanted]
    assert found == wanted
    assert reading.notes and not reading.counts


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_in_the_prompt_gives_its_turns(name):
    turn, user, assistant, cue = TRANSCRIPTS[name]
    rows, wanted = [], []
    for topic in TOPICS:
        messages = chat(topic)[1:]
        prompt = "".join(
            turn.format(assistant if each["role"] == "assistant" else user, each["content"]) for each in messages
        )
        rows.append(Raw(prompt + cue, tuple(f" {answer}" for answer in answers(topic))))
        wanted.append(Raw(messages, answers(topic)))
    reading, found = read(rows)
    assert found == wanted
    assert "transcript" in reading.lines()[0] and "data.text=plain" in reading.lines()[0]
    whole = [Raw(None, tuple(row.prompt + answer for answer in row.answers)) for row in rows]
    assert [raw.answers[0] for raw in read(whole)[1]] == [
        [*raw.prompt, *turns("", raw.answers[0])[1:]] for raw in wanted
    ]


ALPACA = (
    "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
CASES = {
    "alpaca": (ALPACA.format("Mend {0}.", ""), "Done: {0}", turns("Mend {0}."), "Done: {0}"),
    "alpaca with input": (
        ALPACA.format("Mend it.", "### Input:\n{0}\n\n"),
        "Done: {0}",
        turns("Mend it.\n\n{0}"),
        "Done: {0}",
    ),
    "vicuna's preamble": (
        "A chat with an assistant. USER: Mend {0} ASSISTANT:",
        "Done: {0}</s>",
        turns("Mend {0}", system="A chat with an assistant."),
        "Done: {0}",
    ),
    "a preamble and a cue": (
        "A talk with an AI.\n\nHuman: Mend {0}\nAI:",
        " Done: {0}",
        turns("Mend {0}", system="A talk with an AI."),
        "Done: {0}",
    ),
    "PKU": ("BEGINNING OF CONVERSATION: USER: Mend {0} ASSISTANT:", "Done: {0}", turns("Mend {0}"), "Done: {0}"),
    "a heading in the answer": (
        "### Human: Mend {0}### Assistant:",
        "In parts:\n### Question: {0}\n### Answer: four",
        turns("Mend {0}"),
        "In parts:\n### Question: {0}\n### Answer: four",
    ),
    "no cue": ("User: Mend {0}", "Assistant: Done, {0}", turns("Mend {0}"), "Done, {0}"),
    "a started answer": ("Human: Mend {0}\n\nAssistant: Sure,", " done: {0}", turns("Mend {0}"), "Sure, done: {0}"),
    "prompt in answers": ("What is {0}?\n\nAnswer:", "What is {0}?\n\nAnswer: It is {0}.", None, "It is {0}."),
    "prompt glued to answers": ("What of {0}?", "What of {0}?It is {0}.", None, "It is {0}."),
    "prompt in code": ("def mend({0}):\n", "def mend({0}):\n    return {0}", None, "    return {0}"),
    "end tokens": ("What is {0}?", "It is {0}.<|endoftext|>", None, "It is {0}."),
    "a name": ("What is {0}?", "Assistant: It is {0}.", None, "It is {0}."),
    "a heading name": ("What is {0}?", "### Response:\nIt is {0}.", None, "It is {0}."),
    "texts in lists": ('["What is {0}?"]', '["It is {0}."]', "What is {0}?", "It is {0}."),
    # what must stay as it is
    "plain": ("What is {0}?", "It is {0}.", None, None),
    "a word repeated": ("Bread", "Bread is what {0} needs.", None, None),
    "a longer word": ("What is the car", "What is the cargo of {0}?", None, None),
    "context and question": ("Context: {0} costs 4.\n\nQuestion: what?\n\nAnswer:", "4 coins for {0}", None, None),
    "colons": ("Rome: what is {0}?", "Note: it is {0}.\nStep 1: mend.", None, None),
    "JSON asked for": ("Write {0} as JSON", '{{"content": "{0}", "value": 4}}', None, None),
    "code": ("Write <b>{0}</b>", "<s>{0}</s> a[0] < 3 [1] <div>", None, None),
    "a dialogue on a page": ("Go on:\nANNA: hi {0}\nBEN: hi", "ANNA: so, {0}!", None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_most_rows_hold_is_read_as_what_it_is(case):
    prompt, answer, turned, said = CASES[case]
    rows = [Raw(prompt.format(topic), (answer.format(topic), answer.format(topic) + " Or not.")) for topic in TOPICS]
    if answer.endswith(("</s>", "<|endoftext|>", "]", ">")) and said:
        rows = [Raw(row.prompt, row.answers[:1] * 2) for row in rows]
    reading, found = read(rows)
    reading.refuse_if_most("rows")
    if said is None:
        assert all(new is row for new, row in zip(found, rows, strict=True)) and not reading.lines()
        return
    for topic, raw, row in zip(TOPICS, found, rows, strict=True):
        wanted = row.prompt if turned is None else json.loads(json.dumps(turned).replace("{0}", topic))
        assert (raw.prompt, raw.answers[0]) == (wanted, said.format(topic))


def as_json(messages):
    return json.dumps(messages, indent=1)


def as_numpy(messages):
    return "[" + "\n ".join(map(str, messages)) + "]"


def as_array(messages):
    return "array([" + ",\n       ".join(map(str, messages)) + "], dtype=object)"


@pytest.mark.parametrize("write", [as_json, str, as_numpy, as_array])
def test_messages_written_as_text_are_parsed(write):
    said = [turns(f"What's {topic}? 'a' \"b\" {{}} }}\n {{ \\d", f"It is\n{topic}, é.") for topic in TOPICS]
    rows = [Raw(write(each[:1]), (write(each[1:]), write(each))) for each in said]
    reading, found = read(rows)
    assert found == [Raw(each[:1], (each[1:], each)) for each in said]
    assert reading.notes == ["prompts and answers are messages written as text: parsed"]
    assert isinstance(reading.read(Raw(rows[0].prompt[:-3], rows[0].answers)), Drop)
    assert reading.read(Raw("Plain?", ("Yes.", "No."))) == Raw("Plain?", ("Yes.", "No."))
    assert reading.counts == {"unlike": 1}


def test_turns_in_lists_of_texts_become_conversations():
    rows = [Raw(json.dumps(["a?", f"{topic}?"]), (json.dumps(["b", topic]),)) for topic in TOPICS]
    assert read(rows)[1][0] == Raw(None, (turns("a?", "b", "the lamp?", "the lamp"),))


SOME = {
    "markup": Raw("<|im_start|>user\nMend it<|im_end|>\n", ("a b c d", "e f g h")),
    "transcript": Raw("Human: Mend it\n\nAssistant:", ("a b c d", "e f g h")),
    "prompt_in_answer": Raw("What is it?", ("What is it? A kite.", "What is it? A well.")),
    "speaker_name": Raw("What is it?", ("Assistant: A kite.", "It is a well.")),
    "user_speaks": Raw("What is it?", ("A kite.\n\nHuman: Thanks", "It is a well.")),
    "heading": Raw("What is it?", ("Answer: a kite.", "It is a well.")),
    "structure": Raw(str(turns("a", "b"))[:-1], ("a b c d", "e f g h")),
    "missing": Raw("Yes or no?", ("None", "No")),
}
PLAIN = [Raw(f"What of {topic}?", answers(topic)) for topic in TOPICS]


@pytest.mark.parametrize("kind", SOME)
def test_what_few_rows_hold_stays_text_and_is_counted(kind):
    reading, found = read([*PLAIN, SOME[kind]])
    assert found[-1] is SOME[kind] and reading.counts == {kind: 1}
    assert reading.lines()[0].startswith("1 of 6 rows") and reading.lines()[0].endswith("rows:6")
    reading.refuse_if_most("rows")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("<|hello|>Mend {0}<|over|>", "a b c d"),  # a family that nobody knows
        ("<|im_start|>tool\n{0}<|im_end|>\n<|im_start|>assistant\n", "a b c d"),
        ("[{{'role': 'user', 'content': '{0}'", "a b c d"),
        ("Human: a {0}\n\nHuman: b\n\nAssistant:", "a b c d"),
        ("Mend {0}", "A kite.\nUser: Thanks"),
    ],
)
def test_what_most_rows_hold_and_nothing_reads_is_refused(prompt, answer):
    rows = [Raw(prompt.format(topic), (answer, "e f g h")) for topic in TOPICS]
    reading, _ = read([*rows, *PLAIN[:4]])
    with pytest.raises(Refusal, match=r"^rows.jsonl: 5 of 9 rows .*rows:1.*data\.text=plain"):
        reading.refuse_if_most("rows.jsonl")


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Raw("What is it?", ("nan", "It is a kite of ours.")), False),
        (Raw("What is it?", ("null", "None")), False),
        (Raw("nan", ("a b c d", "e f g h")), False),
        (Raw(turns("What is it?"), (turns("", "nan")[1:], "It is a kite of ours.")), False),
        (Raw("What is it?", ("None", "A kite")), True),  # a label beside another
        (Raw("What is it?", ("None of these.", "nano")), True),
    ],
)
def test_an_empty_cell_written_out_as_a_word_is_missing(row, kept):
    _, found = read([*PLAIN, row])
    assert (found[-1] is row) if kept else found[-1].reason == "missing"


def test_none_is_an_answer_where_answers_are_labels():
    rows = [Raw(f"Which is {topic}?", ("None", "Left")) for topic in TOPICS] + [Raw("Which?", ("None", "nan"))]
    _, found = read(rows)
    assert all(new is row for new, row in zip(found, rows, strict=True))


def test_one_odd_row_changes_nothing_and_is_kept_or_left_out():
    render, cue, end = TEMPLATES["ChatML"]
    rows = [Raw(render(chat(topic)) + cue, tuple(each + end for each in answers(topic))) for topic in TOPICS]
    run_on = Raw(rows[0].prompt, ("Four.<|im_end|>\n<|im_start|>user\nThanks<|im_end|>", "Five."))
    reading, found = read([PLAIN[0], *rows, run_on])
    assert found[0] == PLAIN[0] and reading.counts == {"unlike": 1}
    assert found[1] == Raw(chat("the lamp"), answers("the lamp"))
    assert found[-1] == Drop("unreadable", "ChatML begins within the text")


def test_messages_of_one_turn_are_looked_into():
    rows = [
        Raw(turns(f"\n\nHuman: Mend {topic}\n\nAssistant:"), (turns("", f"{topic} is mended.<|im_end|>")[1:],))
        for topic in TOPICS
    ]
    assert read(rows)[1][0] == Raw(turns("Mend the lamp"), (turns("", "the lamp is mended.")[1:],))


UNITS = (" ", " \n", "<|", "</s>", "<s>", "[{'role': '", "'\\", "}\n{", "\n\nHuman: ", "### ", "USER: ", "[INST]")


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_a_long_odd_text_takes_time_in_proportion(unit):
    text, began = unit * (200_000 // len(unit)), time.process_time()
    for row in (Raw(text, (f"x{text}",)), Raw(None, (f"[{{'role': 'user', 'content': '{text}",))):
        read([row] * 2)
        for raw in (Raw("Human: a\n\nAssistant:", ("b",)), Raw("<|im_start|>user\na<|im_end|>\n", ("b",))):
            look([raw]).read(row)
    assert time.process_time() - began < 20  # the square of it takes minutes


def test_a_list_too_long_for_python_s_parser_is_left_out():
    rows = [Raw(str(turns(f"Mend {topic}")), ("a b c d",)) for topic in TOPICS]
    long = Raw(str(turns("a" * LITERAL_LIMIT)), ("a b c d",))
    assert read([*rows, long])[1][-1] == Drop("unreadable", "messages written as text that do not parse")


@pytest.mark.parametrize("name", ["clinic/pairs", "clinic/demonstrations", "stress/clinic"])
def test_our_own_rows_are_plain(name):
    lines = (ROOT / "rlhf_recipes" / "assets" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    sides = ("chosen", "rejected", "completion")
    raws = [Raw(row["prompt"], tuple(row[side] for side in sides if side in row)) for row in rows]
    reading, found = read(raws)
    assert all(new is raw for new, raw in zip(found, raws, strict=True)) and not reading.lines()


def test_real_preferences_raise_no_alarm(shared_data):
    """Rows of HH-RLHF, as transcripts and parsed: nothing is refused, dropped or changed but as hh_rlhf reads it."""
    with gzip.open(shared_data / "hh-rlhf-harmless-dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    said = [[parse_transcript(row[side]) for side in ("chosen", "rejected")] for row in rows]
    reading, found = read([Raw(None, (row["chosen"], row["rejected"])) for row in rows])
    assert [list(raw.answers) for raw in found] == said
    parsed = [Raw(chosen[:-1], (chosen[-1:], rejected[-1:])) for chosen, rejected in said]
    again, found = read(parsed)
    assert all(new is raw for new, raw in zip(found, parsed, strict=True)) and not again.notes
    # Some annotators' assistants do speak for the human.
    assert set(reading.counts) == set(again.counts) == {"user_speaks"} and again.counts.total() < 0.02 * len(rows)
