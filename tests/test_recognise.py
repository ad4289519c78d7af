"""Formats found by columns and values: shapes of files that people bring, and the presets. No model, no network.

A shape is one row, filled in for each number: `{i}` in its texts, and the i-th of `each(...)`. What it gives is
written as `u: prompt | better > worse`,
     of the first row that gives anything; `order` says of each example whether the answer
that begins with Yes is the better one. What is refused shows words of its line (`!`), and `typed` overrides that the
line names and that are then typed.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlhf_recipes.data.account import told
from rlhf_recipes.data.fit import describe
from rlhf_recipes.data.load import load_demonstrations, load_labelled, load_pairs, load_prompts
from rlhf_recipes.data.recognise import FORMATS, SAMPLE
from rlhf_recipes.errors import Refusal

LOAD = {"dpo": load_pairs, "kto": load_labelled, "sft": load_demonstrations, "ppo": load_prompts}
Q, YES, NO = "Open at {i}?", "Yes, from {i} on.", "No idea about {i}."
PAIR = "u: Open at 0? | Yes, from 0 on. > No idea about 0."
SECOND = "u: Open at 1? | Yes, from 1 on. > No idea about 1."
TURNED = "u: Open at 0? | No idea about 0. > Yes, from 0 on."
ONE = "u: Open at 0? | Yes, from 0 on."
ASKED = "u: Open at 0?"


class each(tuple):
    """A value for each row."""

    def __new__(cls, *values):
        return super().__new__(cls, values)


def user(text=Q):
    return {"role": "user", "content": text}


def bot(text=YES):
    return {"role": "assistant", "content": text}


def gpt(text=YES):
    return {"from": "gpt", "value": text}


def human(text=Q):
    return {"from": "human", "value": text}


def filled(shape: Any, i: int) -> Any:
    if isinstance(shape, each):
        return filled(shape[i % len(shape)], i)
    if isinstance(shape, dict):
        return {key: filled(value, i) for key, value in shape.items()}
    if isinstance(shape, list):
        return [filled(value, i) for value in shape]
    return shape.replace("{i}", str(i)) if isinstance(shape, str) else shape


@dataclass
class Case:
    id: str
    shape: dict
    gives: str
    kind: str = "dpo"
    format: str = "pairs"
    set: str = ""
    typed: str = ""
    order: str = ""
    dropped: dict = field(default_factory=dict)
    says: str = ""
    rows: int = 4


def case(id, shape, gives, kind="dpo", **more):
    return pytest.param(Case(id, shape, gives, kind, **more), id=f"{kind} {id}")


@pytest.fixture(scope="module")
def base():
    return composed("local")


def composed(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(overrides=[f"+data={name}"]).data


def loaded(kind, node, folder, shape, rows=4, overrides="", test=None):
    files = {"path": shape} | ({"test_path": test} if test else {})
    for key, each_shape in files.items():
        text = "".join(json.dumps(filled(each_shape, i + 10 * (key != "path"))) + "\n" for i in range(rows))
        (folder / f"{key}.jsonl").write_text(text)
    paths = {key: str(folder / f"{key}.jsonl") for key in files}
    words = [word.removeprefix("data.") for word in overrides.split()]
    return LOAD[kind](OmegaConf.merge(node, {"test_size": 1, **paths}, OmegaConf.from_dotlist(words)))


def examples(splits):
    rows = [*splits.train, *splits.test]
    return sorted(rows, key=lambda row: [turn["content"] for turn in row["prompt"][::-1]])


def written(row):
    prompt = " / ".join(f"{turn['role'][0]}: {turn['content']}" for turn in row["prompt"])
    sides = [row[side][0]["content"] for side in ("chosen", "rejected", "completion") if side in row]
    label = f" = {row['label']}" if "label" in row else ""
    return " | ".join([prompt, *([" > ".join(sides) + label] if sides else [])])


def refusal(*arguments, **more):
    with pytest.raises(Refusal) as caught:
        loaded(*arguments, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TWO = {"prompt": Q, "response_a": YES, "response_b": NO}
COUNTED = {"prompt": Q, "response_0": YES, "response_1": NO}
FROM_ONE = {"prompt": Q, "response_1": YES, "response_2": NO}
SIDES = {"prompt": Q, "chosen": YES, "rejected": NO}
WHOLE = {"chosen": [user(), bot()], "rejected": [user(), bot(NO)]}
LISTS = {"prompt": Q, "responses": [NO, YES]}
DEMO = {"prompt": Q, "completion": YES}
TURNS = {"messages": [user(), bot()]}
OPENAI = {
    "input": {"messages": [user()], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [bot()],
    "non_preferred_output": [bot(NO)],
}
SYSTEM = f"s: Be brief. / {PAIR}"
CALLS = {"role": "assistant", "content": YES, "tool_calls": [{"function": {"name": "hours"}}]}

SEEN = [{"type": "image"}, {"type": "text", "text": Q}]

CASES = [
    # ---- pairs
    case("plain", SIDES, PAIR),
    case("question", {"question": Q, "chosen": YES, "rejected": NO}, PAIR, says="prompt from question"),
    case("accepted", {"prompt": Q, "accepted": YES, "rejected": NO}, PAIR),
    case("better and worse", {"query": Q, "worse_answer": NO, "better_answer": YES}, PAIR),
    case("winner and loser", {"question": Q, "loser": NO, "winner": YES}, PAIR),
    case("chosen_response", {"instruction": Q, "chosen_response": YES, "rejected_response": NO,
         "chosen_model": "x-7b"},
         PAIR, says="not read: chosen_model"),
    case("columns typed", {"a": Q, "b": YES, "c": NO}, PAIR,
         set="data.columns.prompt=a data.columns.chosen=b data.columns.rejected=c"),
    case("a column mistyped", SIDES, "!no column 'chosn'", set="data.columns.chosen=chosn",
         typed="data.columns.chosen=chosen"),
    case("two more columns", {**SIDES, "source": "web", "n_words": 12}, PAIR, says="not read: source, n_words"),
    case("a path", {"data": {"ask": Q}, "chosen": YES, "rejected": NO}, PAIR, set="data.columns.prompt=data.ask"),
    # ---- a prompt of several columns
    case("system", {"system": "Be brief.", "question": Q, "chosen": YES, "rejected": NO}, SYSTEM),
    case("system_prompt", {**SIDES, "system_prompt": "Be brief."}, SYSTEM),
    case("no system", {**SIDES, "system": each("", None)}, PAIR),
    case("system null", {**SIDES, "system": "Be brief."}, PAIR, set="data.columns.system=null",
         says="not read: system"),
    case("system ignored", {**SIDES, "system": "Be brief."}, PAIR, set="data.ignore=[system]"),
    case("another system", {**SIDES, "prompt": [{"role": "system", "content": "Be long."}, user()],
         "system": "Be brief."},
         "!cannot be joined to a prompt with another system turn", typed="data.ignore=[system]"),
    case("instruction, input", {"instruction": "Shorten it.", "input": "Note {i}.", "chosen": YES, "rejected": NO},
         "u: Shorten it.\n\nNote 0. | Yes, from 0 on. > No idea about 0."),
    case("context below a question", {"context": "A library.", "question": Q, "chosen": YES, "rejected": NO},
         "u: Open at 0?\n\nA library. | Yes, from 0 on. > No idea about 0."),
    case("history", {**SIDES, "history": [["Hello there.", "Hello to you."]]},
         f"u: Hello there. / a: Hello to you. / {PAIR}"),
    case("context before a prompt", {**SIDES, "context": [user("Hi."), bot("Hello.")]},
         f"u: Hi. / a: Hello. / {PAIR}"),
    case("a passage", {**SIDES, "passage": "The library opens {i}."}, "!holds a part of the prompt and is not read",
         typed="data.columns.input=passage"),
    case("a persona", {**SIDES, "persona": "A clerk of {i} years."}, "!'persona' holds a part",
         typed="data.ignore=[persona]"),
    case("a system that is no text", {**SIDES, "system": [user("Be brief.")]}, "!'system' holds a part of the prompt",
         typed="data.ignore=[system]"),
    case("an input that is no text", {**SIDES, "notes": [user("Note.")]}, "!notes: must be text, not a list",
         set="data.columns.input=notes"),
    case("a passage ignored", {**SIDES, "passage": "The library opens {i}."}, PAIR, set="data.ignore=[passage]"),
    case("a prompt twice", {**OPENAI, "prompt": Q}, "!'input' holds a part of the prompt",
         typed="data.ignore=[input]"),
    case("an instruction beside a question", {"instruction": "Answer in French.", "question": Q, "answer": YES},
         "!'instruction' holds a part of the prompt", "sft", typed="data.columns.input=instruction"),
    case("a question beside a prompt", {**SIDES, "prompt": "Answer in French.", "question": Q},
         "!'question' holds a part of the prompt", typed="data.columns.input=question"),
    case("a question in its prompt", {**SIDES, "question": "at {i}?", "problem": "P{i}"}, PAIR,
         says="not read: question, problem"),
    case("a question in its conversation", {**TURNS, "question": Q}, ONE, "sft", format="messages",
         says="not read: question"),
    case("a prompt that its conversation lacks", {**TURNS, "prompt": "Answer in French."},
         "!'prompt' holds a part of the prompt", "sft", typed="data.ignore=[prompt]"),
    # ---- conversations in both sides
    case("implicit prompt", WHOLE, PAIR),
    case("prompt null", {"prompt": None, **WHOLE}, PAIR),
    case("prompt blank", {"prompt": "", **WHOLE}, PAIR),
    case("implicit prompt, ShareGPT", {"chosen": [human(), gpt()], "rejected": [human(), gpt(NO)]}, PAIR),
    case("prompt too", {"prompt": Q, "prompt_id": "x1", **WHOLE, "messages": [user(), bot()], "score_chosen": each(8,
         1),
                        "score_rejected": 1}, PAIR,
         says="by the file's own scores (score_chosen, score_rejected), 2 of 4 pairs are ties and 0 the other way"),
    case("contexts that differ", {"chosen": [user(), bot()], "rejected": [user(each(Q, "Else {i}?")), bot(NO)]}, PAIR,
         dropped={"context_differs": 2}),
    case("transcripts", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {YES}",
         "rejected": f"\n\nHuman: {Q}\n\nAssistant: {NO}"},
         PAIR, format="hh_rlhf"),
    case("a conversation and a worse end", {**TURNS, "rejected_response": NO}, PAIR,
         says="chosen from messages, rejected from rejected_response"),
    case("a longer one, and another", {"messages": [user("Hi."), bot("Hm?"), user(), bot()],
         "rejected_messages": [user("Hi."), bot("Hm?"), user(), bot(NO)]},
         "u: Hi. / a: Hm? / u: Open at 0? | Yes, from 0 on. > No idea about 0."),
    case("a conversation that is to go on, and a worse end", {"messages": [user()], "rejected": NO},
         "!no other to compare it with"),
    case("a conversation and a worse end", {**TURNS, "rejected_response": NO}, ONE, "sft", format="messages",
         says="not read: rejected_response"),
    case("a worse end by word", {**TURNS, "bad_end": NO}, PAIR,
         set="data.columns.chosen=messages data.columns.rejected=bad_end"),
    # ---- spellings of messages
    case("OpenAI", OPENAI, PAIR, says="not read: input.parallel_tool_calls"),
    case("LLaMA-Factory", {"conversations": [human()], "chosen": gpt(), "rejected": gpt(NO)}, PAIR),
    case("LLaMA-Factory, system", {"conversations": [human()], "chosen": gpt(), "rejected": gpt(NO),
                                   "system": "Be brief.", "tools": ""}, SYSTEM),
    case("one message each", {"prompt": user(), "chosen": bot(), "rejected": bot(NO)}, PAIR),
    case("LLaMA-Factory, context", {"conversations": [human()], "chosen": gpt(), "rejected": gpt(NO),
                                    "context": "A library."},
         "u: Open at 0?\n\nA library. | Yes, from 0 on. > No idea about 0."),
    case("columns of keys", {"prompt": Q, **{side: {"role": ["user", "assistant"], "content": [Q, text]}
                                            for side, text in (("chosen", YES), ("rejected", NO))}}, PAIR),
    case("columns of keys of two lengths", {**SIDES, "chosen": {"role": ["user", "assistant"], "content": [Q]}},
         "!2 of role and 1 of content for one conversation"),
    case("parts", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Open "}, {"type": "text",
         "text": "at {i}?"}]}],
                   "chosen": [{"role": "assistant", "content": [{"type": "text", "text": YES}]}], "rejected": NO},
                   PAIR),
    case("developer", {**SIDES, "prompt": [{"role": "developer", "content": "Be brief."}, user()]}, SYSTEM),
    case("prompter", {**SIDES, "prompt": [{"role": "Prompter", "content": Q}]}, PAIR),
    case("an unknown role", {**SIDES, "prompt": [{"role": "narrator", "content": Q}]},
         "!'narrator' is not one of system, user, assistant"),
    case("a name", {**SIDES, "prompt": [{**user(), "name": "Ann"}]}, PAIR, says="not read: name (of messages)"),
    case("names", {**SIDES, "prompt": [{**user(), **dict.fromkeys("abcdefgh", 1)}]}, PAIR,
         says=f"not read: {', '.join(f'{name} (of messages)' for name in 'abcdefgh')}"),
    case("JSON", {"prompt": json.dumps([user()]), "chosen": json.dumps([bot()]), "rejected": json.dumps([bot(NO)])},
         PAIR),
    case("opens with the assistant", {**SIDES, "prompt": [each(bot("Hello."), user("Hello.")), each(user(),
         bot("Hm?")), user()]},
         "u: Hello. / a: Hm? / u: Open at 1? | Yes, from 1 on. > No idea about 1.", dropped={"roles": 2}),
    # ---- tools, pictures
    case("a call in some rows", {**SIDES, "chosen": each([CALLS], [bot()])}, SECOND,
         dropped={"tools": 2}),
    case("calls in most", {**SIDES, "chosen": [CALLS]}, "!4 of 4 rows call tools",
         typed="data.ignore=[tools,tool_calls]"),
    case("tools beside", {**SIDES, "tools": [{"name": "hours"}]}, "!tools is not read",
         typed="data.ignore=[tools,tool_calls]"),
    case("no tools beside", {**SIDES, "tools": each([], None)}, PAIR),
    case("OpenAI, tools", {**OPENAI, "input": {"messages": [user()], "tools": [{"type": "function"}]}},
         "!input.tools is not read",
         typed="data.ignore=[tools,tool_calls]"),
    case("turns of a tool", {**SIDES, "prompt": each([user(), {"role": "tool", "content": "9"}, user()], [user()])},
         SECOND, dropped={"tools": 2}),
    case("pictures", {**SIDES, "images": each(["a.png"], [])}, SECOND,
         dropped={"media": 2}),
    case("pictures ignored", {**SIDES, "image": {"bytes": "AA"}}, PAIR, set="data.ignore=[image]"),
    case("a picture in a turn", {**SIDES, "prompt": [{"role": "user", "content": SEEN}]},
         "!hold pictures or sound"),
    case("a picture in a turn ignored", {**SIDES, "prompt": [{"role": "user", "content": SEEN}]},
         PAIR, set="data.ignore=[image]"),
    # ---- which is better, in words
    case("a or b", {**TWO, "winner": each("a", "b")}, PAIR, format="preference", order="+-+-"),
    case("ties", {**TWO, "winner": each("model_a", "tie", "model_b", "tie (bothbad)")}, PAIR, format="preference",
         order="+-", dropped={"tie": 2}),
    case("Response A", {**TWO, "better": each("Response A", "B", "response_b", None)}, PAIR, format="preference",
         order="+--",
         dropped={"unlabelled": 1}),
    case("an unknown verdict", {**TWO, "winner": each("a", "unsure")},
         "!'unsure' names neither response_a nor response_b"),
    case("names of models", {**TWO, "model_a": "x-7b", "model_b": "y-1b", "winner": each("y-1b", "x-7b", "tie")},
         TURNED, format="preference", order="-+-", dropped={"tie": 1},
         says="by the name in model_a or model_b"),
    case("verdicts in chosen", {**TWO, "chosen": each("A", "B")}, PAIR, format="preference", order="+-+-"),
    case("verdicts in chosen and rejected", {**TWO, "chosen": each("a", "b"), "rejected": each("b", "a")}, PAIR,
         format="preference", order="+-+-"),
    case("numbers in chosen", {**TWO, "chosen": each(1, 0)}, TURNED,
         format="preference", order="-+-+"),
    case("arena", {"model_a": "x", "model_b": "y", "winner": each("model_b", "model_a"), "conversation_a": [user(),
         bot()],
                   "conversation_b": [user(), bot(NO)], "language": "English"}, TURNED,
         format="preference", order="-+-+"),
    case("one column for each winner", {**TWO, "winner_model_a": each(1, 0, 0), "winner_model_b": each(0, 1, 0),
                                        "winner_tie": each(0, 0, 1)},
                                        "!say in several columns which of response_a and response_b"),
    case("of the worse one", {**TWO, "worse": each("a", "response_b")}, TURNED, format="preference", order="-+-+",
         says="(by name, turned round)"),
    case("its name", {**TWO, "loser": each("a", "b")}, TURNED, format="preference", order="-+-+",
         set="data.columns.preference=loser"),
    case("better, and worse", {**TWO, "better": each("a", "b"), "worse": each("b", "a")}, PAIR, format="preference",
         order="+-+-", says="not read: worse"),
    # ---- which is better, in numbers
    case("an id of the worse one", {"prompt": Q, "answer_1": YES, "answer_2": NO, "rejected_id": each(1, 2)}, TURNED,
         format="preference", order="-+-+", says="(1 the first, 2 the second, turned round)"),
    case("whether the second is better", {**TWO, "b_is_better": each(True, False)}, TURNED, format="preference",
         order="-+-+"),
    case("whether the second is better, named", {**TWO, "response_b_is_better": each(True, False)}, TURNED,
         format="preference", order="-+-+", set="data.columns.preference=response_b_is_better"),
    case("whether the second is worse", {**TWO, "is_b_worse": each(True, False)}, PAIR, format="preference",
         order="+-+-"),
    case("whether another is better", {**TWO, "c_is_better": each(True, False)}, "!may say several things",
         set="data.columns.preference=c_is_better"),
    case("pairs that stand the other way round", {**SIDES, "is_swapped": each(True, False)},
         "!'is_swapped' may say which answer is the better one",
         typed="data.format=preference data.columns.first=chosen data.columns.second=rejected "
         "data.columns.preference=is_swapped data.preference=index"),
    case("whether the rejected one is better", {**SIDES, "rejected_is_better": each(False, True)},
         "!'rejected_is_better' may say which answer is the better one",
         typed="data.format=preference data.columns.first=chosen data.columns.second=rejected "
         "data.columns.preference=rejected_is_better"),
    case("the rejected one is better", {**SIDES, "rejected_is_better": each(False, True)}, PAIR, order="+-+-",
         format="preference", set="data.format=preference data.columns.first=chosen data.columns.second=rejected "
         "data.columns.preference=rejected_is_better"),
    *(case(f"scores of which the lower is better: {name}", {**LISTS, name: [0.9, 0.1]},
           "!data.columns.scores=<its name>")
      for name in ("losses", "error_scores", "order")),
    case("own scores as text", {**SIDES, "chosen_score": "1", "rejected_score": each("5", "1", None)}, PAIR,
         says="by the file's own scores (chosen_score, rejected_score), 1 of 3 pairs are ties and 2 the other"),
    # ---- parts of a prompt that it holds already
    case("a context in its prompt", {**SIDES, "prompt": f"We close at {{i}}.\n\n{Q}", "context": "We close at {i}."},
         "u: We close at 0.\n\nOpen at 0? | Yes, from 0 on. > No idea about 0.",
         says="context of 4 rows stands in their prompt: not joined to it again"),
    case("a system text in its prompt", {**SIDES, "prompt": f"Be brief, please.\n{Q}", "system": "Be brief, please."},
         "u: Be brief, please.\nOpen at 0? | Yes, from 0 on. > No idea about 0.", says="system of 4 rows stands in"),
    case("earlier turns in their prompt", {**SIDES, "prompt": [user("Hi."), bot("Hm?"), user()], "history": [["Hi.",
         "Hm?"]]}, "u: Hi. / a: Hm? / u: Open at 0? | Yes, from 0 on. > No idea about 0.",
         says="history of 4 rows stands in"),
    case("a word that its prompt has too", {"instruction": "Is at a verb? {i}", "input": "at", "chosen": YES,
         "rejected": NO}, "u: Is at a verb? 0\n\nat | Yes, from 0 on. > No idea about 0."),
    case("facts in their prompt", {**SIDES, "prompt": f"We close at {{i}}. {Q}", "facts": "We close at {i}."},
         "u: We close at 0. Open at 0? | Yes, from 0 on. > No idea about 0.", says="not read: facts"),
    *(case(f"{name} beside a prompt", {**SIDES, name: "We close at {i}, and open at noon."},
           f"!'{name}' holds a part of the prompt", typed=f"data.columns.input={name}")
      for name in ("facts", "documents", "guidelines", "dialogue")),
    # ---- demonstrations, and whether they are good
    *(case(f"{name} of demonstrations", {**DEMO, name: each(*values)},
           f"!'{name}' may say whether an answer is {what}", "sft", typed=typed)
      for name, values, what, typed in (
          ("accepted", (True, False), "good", "data.columns.label=accepted"),
          ("is_correct", (1, 0), "good", "data.columns.label=is_correct"),
          ("quality", ("good", "bad"), "good", "data.columns.label=quality"),
          ("toxic", (False, True), "bad", "data.columns.label=toxic"),
      )),
    *(case(f"a label of what is bad, {kind}", {**DEMO, "downvoted": each(False, True)}, gives, kind, format="labelled",
           set="data.columns.label=downvoted", dropped=dropped,
           says="labelled (turned round): prompt, completion, label from downvoted")
      for kind, gives, dropped in (("sft", ONE, {"labelled_bad": 2}), ("kto", f"{ONE} = True", {}))),
    case("advice of a prompt", {"context": "Open.", "question": Q, "answers": {"text": ["four"]}},
         "!data.columns.completion=<its name>", "sft"),
    case("advice of objects", {"conversation": [{"human": Q, "assistant": YES}]},
         "!data.columns.completion=<its name>", "sft"),
    case("a quality that is no verdict", {**DEMO, "quality": each("new", "old")}, ONE, "sft",
         says="not read: quality"),
    case("an id", {**COUNTED, "better_response_id": each(1, 0)}, TURNED,
         format="preference", order="-+-+"),
    case("two ids", {**COUNTED, "better_response_id": each(1, 0, 0), "safer_response_id": 1},
         "!better_response_id and safer_response_id each say which answer is better",
         typed="data.columns.preference=better_response_id data.ignore=[safer_response_id]"),
    case("0 and 1 of 0 and 1", {**COUNTED, "label": each(1, 0)}, TURNED,
         format="preference", order="-+-+"),
    case("1 and 2", {"instruction": Q, "input": "", "output_1": YES, "output_2": NO, "preference": each(1, 2)}, PAIR,
         format="preference", order="+-+-"),
    case("1 and 2 of a and b", {**TWO, "choice": each(2, 1)}, TURNED,
         format="preference", order="-+-+"),
    case("0 and 1 that may say two things", {**TWO, "label": each(0, 1)},
         "!may say several things of response_a and response_b"),
    case("an index by word", {**TWO, "label": each(0, 1)}, PAIR, format="preference", set="data.preference=index",
         order="+-+-"),
    case("an index of 1 and 2 by word", {**FROM_ONE, "label": each(0, 1)}, PAIR,
         format="preference", set="data.preference=index", order="+-+-", says="(0 the first, 1 the second)"),
    case("a number that no float holds", {**TWO, "winner": 10**400}, "!inf are on no scale that is known"),
    case("one among others", {**TWO, "winner": each(-1, 10**400)}, "!does not say which is better",
         set="data.preference=signed"),
    case("p beside a verdict", {**TWO, "winner": each("a", "b"), "p": 0.6}, PAIR, format="preference", order="+-+-",
         says="not read: p"),
    case("a probability by word", {**TWO, "preference": each(0.9, 0.2, 0.5)}, PAIR, format="preference",
         set="data.preference=probability", order="+-+", dropped={"tie": 1}),
    case("true or false", {**TWO, "a_is_better": each(True, False)}, PAIR, format="preference", order="+-+-"),
    case("SHP", {"history": Q, "human_ref_A": YES, "human_ref_B": NO, "labels": each(1, 0)}, PAIR, format="preference",
         order="+-+-"),
    case("-3 to 3", {"context": [user()], "response1": YES, "response2": NO, "overall_preference": each(-3, 2, 0,
         -1)}, PAIR,
         format="preference", order="+-+", dropped={"tie": 1}),
    case("-3 to 3 by another name", {**TWO, "preference": each(-3, 2)},
         "!signed (below 0 the first, above 0 the second)"),
    case("-3 to 3 by word", {**TWO, "preference": each(-3, 2)}, PAIR, format="preference",
         set="data.preference=signed",
         order="+-+-"),
    case("1 to 7", {**TWO, "preference": each(1, 7, 4)}, "!1, 4, 7 are on no scale that is known"),
    case("an index into a list", {**LISTS, "better_index": each(0, 1)}, TURNED,
         format="preference", order="-+-+"),
    case("paths", {"info": {"post": Q}, "summaries": [{"text": YES}, {"text": NO}], "choice": each(0, 1)}, PAIR,
         format="preference", order="+-+-", set="data.columns.prompt=info.post data.columns.first=summaries.0.text "
         "data.columns.second=summaries.1.text data.columns.preference=choice"),
    case("no verdict", COUNTED, "!no column says which of response_0 and response_1 is better"),
    case("a score each", {**TWO, "score_a": each(1, 2), "score_b": 1},
         "!no column says which of response_a and response_b is better"),
    # ---- a verdict beside pairs
    case("a verdict beside answers typed", {**COUNTED, "better_response_id": each(0, 1)}, PAIR, format="preference",
         set="data.columns.chosen=response_0 data.columns.rejected=response_1", order="+-+-"),
    case("a verdict of any name", {**COUNTED, "gold": each(0, 1)},
         "!column 'gold' may say which answer is the better one",
         set="data.columns.chosen=response_0 data.columns.rejected=response_1",
         typed="data.format=preference data.columns.first=response_0 data.columns.second=response_1 "
         "data.columns.preference=gold"),
    case("a label beside pairs", {**SIDES, "label": each(0, 1)},
         "!column 'label' may say which answer is the better one",
         typed="data.format=preference data.columns.first=chosen data.columns.second=rejected "
         "data.columns.preference=label data.preference=index"),
    case("a winner beside pairs", {**SIDES, "winner": each("chosen", "rejected")}, "!column 'winner' may say which",
         typed="data.format=preference data.columns.first=chosen data.columns.second=rejected "
         "data.columns.preference=winner"),
    case("a winner beside pairs ignored", {**SIDES, "winner": each("chosen", "rejected")}, PAIR,
         set="data.ignore=[winner]"),
    case("always the same winner", {**SIDES, "winner": "chosen"}, PAIR, says="not read: winner"),
    case("p", {**SIDES, "p": each(0.1, 0.9)}, TURNED, order="-+-+",
         says="2 pairs turned round, whose p is below 0.5"),
    case("margin", {**SIDES, "margin": 2.5}, PAIR, says="margin of 4 rows"),
    # ---- lists of answers
    case("ratings", {**LISTS, "scores": [1, 4.5]}, PAIR, format="ratings"),
    case("ratings as text", {**LISTS, "ratings": each(["1", "N/A"], ["1", "5"])}, SECOND,
         format="ratings", dropped={"unrated": 2}),
    case("ratings null", {**LISTS, "scores": each(None, [1, 5], [None, 5], [1, 5])}, SECOND,
         format="ratings", dropped={"unrated": 2}),
    case("no ratings", {**LISTS, "scores": [None, None]}, "!4 of 4 rows have no score"),
    case("objects", {"instruction": Q, "completions": [{"response": NO, "overall_score": 2, "model": "x"},
         {"response": YES, "overall_score": 8, "model": "y"}]},
         PAIR, format="ratings", says="not read: completions.model"),
    case("an object of lists", {"prompt": Q, "responses": {"text": [NO, YES], "score": [1, 4]}}, PAIR,
         format="ratings"),
    case("JSON of objects", {"prompt": Q, "responses": json.dumps([{"text": NO, "score": 1}, {"text": YES,
         "score": 4}])},
         PAIR, format="ratings"),
    case("scores deeper", {"prompt": Q, "responses": [{"text": NO, "by": {"ann": 1}}, {"text": YES,
         "by": {"ann": 3}}]}, PAIR,
         format="ratings",
         set="data.format=ratings data.columns.responses=responses.text data.columns.scores=responses.by.ann"),
    case("messages in lists", {"prompt": Q, "responses": [bot(NO), bot()], "scores": [1, 4]}, PAIR, format="ratings"),
    case("all pairs", {"prompt": Q, "responses": [NO, YES, "Yes, since {i}."], "scores": [1, 4, 4]}, PAIR,
         format="ratings", set="data.reduce=all", order="++++++++", dropped={"tie": 4}),
    case("rankings", {**LISTS, "ranks": [2, 1]}, PAIR, format="rankings"),
    case("rankings in objects", {"prompt": Q, "answers": [{"answer": NO, "rank": 2.0}, {"answer": YES, "rank": 1.0}]},
         PAIR, format="rankings"),
    case("ratings and rankings", {**LISTS, "scores": [1, 4], "ranks": [2, 1]}, "!its columns fit ratings",
         typed="data.format=ratings"),
    case("pairs and ratings", {**SIDES, "generations": [NO, YES], "ratings": [1, 4]}, "!its columns fit pairs",
         typed="data.format=pairs"),
    case("answers alone", LISTS, "!no column 'scores'"),
    case("one answer", {"prompt": Q, "responses": each([YES], [NO, YES]), "scores": each([1], [1, 4])},
         SECOND, format="ratings", dropped={"unpaired": 2}),
    case("two lengths", {**LISTS, "scores": [1]}, "!1 entries for 2 responses"),
    # ---- answers labelled good or bad
    case("labels", {**DEMO, "label": each(True, False)}, f"{ONE} = True", "kto", format="labelled"),
    case("thumbs", {"question": Q, "answer": YES, "thumbs_up": each("up", None, "down")}, f"{ONE} = True", "kto",
         format="labelled",
         dropped={"unlabelled": 1}),
    case("1 and -1", {**DEMO, "label": each(-1, 1)}, f"{ONE} = False", "kto", format="labelled"),
    case("chosen and rejected", {**DEMO, "label": each("rejected", "chosen")}, f"{ONE} = False", "kto",
         format="labelled"),
    case("1, 0 and -1", {**DEMO, "label": each(-1, 0, 1)}, "!no column 'label'", "kto"),
    case("LLaMA-Factory", {"messages": [user(), bot()], "label": each(True, False)}, f"{ONE} = True", "kto",
         format="labelled"),
    case("kto_tag", {"instruction": Q, "input": "", "output": YES, "kto_tag": each(True, False)}, f"{ONE} = True",
         "kto",
         format="labelled"),
    case("pairs", SIDES, f"{ONE} = True", "kto"),
    case("a preference", {**TWO, "winner": "b"}, "u: Open at 0? | No idea about 0. = True", "kto",
         format="preference"),
    case("demonstrations", DEMO, "!no column 'label'", "kto"),
    case("stars", {**DEMO, "rating": each(1, 5)}, "!no column 'label'", "kto"),
    case("labels for pairs", {**DEMO, "label": each(True, False)},
         "!which makes no pair. Train on it with recipes/kto.py"),
    case("demonstrations for pairs", DEMO, "!completion holds one answer a row"),
    case("conversations for pairs", TURNS, "!messages holds one answer a row"),
    # ---- demonstrations
    case("prompt, completion", DEMO, ONE, "sft"),
    case("prompt, response", {"prompt": Q, "response": YES}, ONE, "sft"),
    case("input, output", {"input": Q, "output": YES}, ONE, "sft"),
    case("Alpaca", {"instruction": "Shorten it.", "input": "Note {i}.", "output": YES},
         "u: Shorten it.\n\nNote 0. | Yes, from 0 on.", "sft"),
    case("Alpaca, system, history", {"instruction": Q, "input": "", "output": YES, "system": "Be brief.",
         "history": [["Hi.", "Hello."]]},
         f"s: Be brief. / u: Hi. / a: Hello. / {ONE}", "sft"),
    case("Dolly", {"instruction": Q, "context": "A library.", "response": YES, "category": "qa"},
         "u: Open at 0?\n\nA library. | Yes, from 0 on.", "sft", says="not read: category"),
    case("messages", TURNS, ONE, "sft", format="messages"),
    case("ShareGPT", {"conversations": [human(), gpt()]}, ONE, "sft", format="messages"),
    case("ShareGPT, system", {"conversations": [human(), gpt()], "system": "Be brief."}, f"s: Be brief. / {ONE}",
         "sft", format="messages"),
    case("prompt beside messages", {"prompt": Q, "prompt_id": "x", **TURNS}, ONE, "sft", format="messages",
         says="not read: prompt, prompt_id"),
    case("messages, context, history", {**TURNS, "context": "A library.", "history": [["Hi.", "Hello."]]},
         "u: Hi. / a: Hello. / u: Open at 0?\n\nA library. | Yes, from 0 on.", "sft", format="messages"),
    case("messages that say input and output", {"input": Q, "output": YES, **TURNS}, ONE, "sft",
         says="not read: messages"),
    case("the last has no weight", {"messages": [user(), {**bot(), "weight": each(0, 1)}]},
         "u: Open at 1? | Yes, from 1 on.", "sft",
         format="messages", dropped={"unweighted": 2}),
    case("labels", {**DEMO, "label": each(True, False)}, ONE, "sft", format="labelled", dropped={"labelled_bad": 2}),
    case("feedback", {**DEMO, "feedback": each("thumbs_down", "thumbs_up")}, "u: Open at 1? | Yes, from 1 on.", "sft",
         format="labelled",
         dropped={"labelled_bad": 2}),
    case("labels of one kind", {**DEMO, "label": True}, ONE, "sft", format="labelled"),
    case("labels beside messages", {**TURNS, "label": each(True, False)}, ONE, "sft", format="labelled",
         dropped={"labelled_bad": 2}),
    case("labels of three kinds", {**DEMO, "label": each("great", "poor", "fine")},
         "!column 'label' may say whether an answer is good", "sft",
         typed="data.ignore=[label]"),
    case("pairs", SIDES, ONE, "sft"),
    case("ratings", {**LISTS, "scores": [1, 4]}, ONE, "sft", format="ratings"),
    case("prompt, chosen", {"prompt": Q, "chosen": YES}, ONE, "sft"),
    case("pairs and messages", {**WHOLE, **TURNS}, "!its columns fit pairs", "sft", typed="data.format=pairs"),
    # ---- prompts alone
    case("prompt", {"prompt": Q}, ASKED, "ppo"),
    case("instruction, input", {"instruction": "Shorten it.", "input": "Note {i}.", "output": YES},
         "u: Shorten it.\n\nNote 0.", "ppo"),
    case("system", {"system": "Be brief.", "question": Q}, f"s: Be brief. / {ASKED}", "ppo"),
    case("messages", TURNS, ASKED, "ppo", format="messages"),
    case("messages of the user", {"messages": [user()]}, ASKED, "ppo", format="messages"),
    case("messages, context", {**TURNS, "context": "A library."}, "u: Open at 0?\n\nA library.", "ppo",
         format="messages"),
    case("LLaMA-Factory, context", {"conversations": [human()], "chosen": gpt(), "rejected": gpt(NO),
                                    "context": "A library."},
         "u: Open at 0?\n\nA library.", "ppo", set="data.format=pairs"),
    case("implicit prompt", WHOLE, ASKED, "ppo"),
    case("prompt null", {"prompt": None, **WHOLE}, ASKED, "ppo"),
    case("a preference", {**TWO, "winner": "b"}, ASKED, "ppo"),
    case("-3 to 3", {"context": [user()], "response1": YES, "response2": NO, "overall_preference": 2}, ASKED, "ppo"),
    case("arena", {"winner": each("tie", "model_a"), "conversation_a": [user(), bot()],
                   "conversation_b": [user(), bot(NO)]}, ASKED, "ppo", format="preference"),
    case("labels beside messages", {**TURNS, "label": each(False, None)}, ASKED, "ppo", format="labelled"),
    case("OpenAI", OPENAI, ASKED, "ppo"),
    case("LLaMA-Factory", {"conversations": [human()], "chosen": gpt(), "rejected": gpt(NO)}, ASKED, "ppo"),
    case("an article", {"prompt": "Sum it up.", "article": "The library opens {i}."},
         "!'article' holds a part of the prompt", "ppo", typed="data.columns.input=article"),
    case("one column", {"text": Q}, "!no column 'prompt'", "ppo", typed="data.columns.prompt=text"),
    case("pictures", {"prompt": Q, "images": ["a.png"]}, "!hold pictures or sound", "ppo"),
]  # fmt: skip


def test_there_are_many_shapes():
    assert len(CASES) >= 80 and len({param.id for param in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_shape_is_read_or_refused(case, base, tmp_path):
    if not case.gives.startswith("!"):
        splits = loaded(case.kind, base, tmp_path, case.shape, case.rows, case.set)
        rows, report = examples(splits), splits.report
        assert (report["format"], written(rows[0])) == (case.format, case.gives)
        assert {key: count for key, count in report["dropped"].items() if count} == case.dropped
        assert sum(report["dropped"].values()) + report["train"] + report["test"] == report["candidates"]
        assert case.says in " ".join(told(report))
        if case.order:
            assert "".join("-+"[row["chosen"][0]["content"].startswith("Yes")] for row in rows) == case.order
        return
    line = refusal(case.kind, base, tmp_path, case.shape, rows=case.rows, overrides=case.set)
    assert case.gives[1:] in line
    for name in re.findall(r"data\.columns\.(?:prompt|chosen|rejected|completion)=([^\s<.;,]+)", line):
        value = filled(case.shape, 0).get(name, "two words")
        assert not isinstance(value, str | int | float) or " " in str(value), f"{name} holds no answers"
    if case.typed:
        assert case.typed in line.replace(" (or another)", "") and loaded(
            case.kind, base, tmp_path, case.shape, overrides=f"{case.set} {case.typed}"
        )


@pytest.mark.parametrize(
    ("shape", "test", "gives", "says"),
    [
        ({"question": Q, "chosen": YES, "rejected": NO}, SIDES, "u: Open at 10?",
        "its test rows as pairs: prompt, chosen"),
        (SIDES, {**SIDES, "system": "Be brief."}, "s: Be brief. / u: Open at 10?",
        "its test rows as pairs: prompt, system"),
        (SIDES, {**SIDES, "source": "web"}, "u: Open at 10?", "not read: source"),
        (SIDES, WHOLE, "u: Open at 10?", "its test rows as pairs: chosen, rejected"),
        (SIDES, {**SIDES, "prompt": f"\n\nHuman: {Q}\n\nAssistant:"}, "u: Open at 10?", "test: "),
        ({**TWO, "winner": "a"}, TWO, "!no column says which of response_a and response_b is better", ""),
        ({**TWO, "winner": "a"}, {**TWO, "response_a": NO, "response_b": YES, "loser": "a"},
        "u: Open at 10? | Yes, from 10 on.", "preference from loser"),
        ({**COUNTED, "better_response_id": each(0, 1)}, {"prompt": Q, "answer_1": YES, "answer_2": NO, "better_id": 1},
        "u: Open at 10? | Yes, from 10 on.", "(1 the first, 2 the second)"),
        (SIDES, DEMO, "!test_path.jsonl: no column 'chosen'", ""),
        (SIDES, {**SIDES, "winner": each("chosen", "rejected")}, "!test_path.jsonl: column 'winner' may say which",
        ""),
    ],
)  # fmt: skip
def test_test_rows_may_have_other_columns(base, tmp_path, shape, test, gives, says):
    if gives.startswith("!"):
        assert gives[1:] in refusal("dpo", base, tmp_path, shape, test=test)
        return
    splits = loaded("dpo", base, tmp_path, shape, test=test)
    assert written(sorted(splits.test, key=written)[0]).startswith(gives)
    assert says in " ".join(told(splits.report))


def test_what_is_ignored_and_not_there_is_said(base, tmp_path):
    shape = {**SIDES, "prompt": [{**user(), "name": "Ann"}], "info": {"id": 3}}
    splits = loaded("dpo", base, tmp_path, shape, overrides="data.ignore=[sistem,name,id,info.id]")
    assert "data.ignore: there is no sistem" in told(splits.report)


RATED = {"prompt": Q, "completions": [{"response": YES, "score": 5}, {"response": NO, "score": 1}]}
NAMED = {**RATED, "completions": [{**rated, "model": "x"} for rated in RATED["completions"]]}


@pytest.mark.parametrize(
    ("kind", "early", "late", "says"),
    [
        ("dpo", SIDES, {**SIDES, "lang": "en"}, "not read: lang"),
        ("dpo", {**SIDES, "lang": None}, {**SIDES, "lang": "en"}, "not read: lang"),
        ("dpo", SIDES, {**SIDES, "system": "Be kind"}, "read as pairs: prompt, system, chosen, rejected"),
        ("dpo", SIDES, {**SIDES, "p": 0.8}, "p of 30 rows"),
        ("dpo", SIDES, {**SIDES, "margin": 2}, "margin of 30 rows"),
        ("dpo", SIDES, {**SIDES, "images": ["a.png"]}, "dropped 30 media"),
        ("dpo", RATED, NAMED, "not read: completions.model"),
        ("dpo", SIDES, {**SIDES, "passage": "Some long text"}, "!column 'passage' holds a part of the prompt"),
        ("dpo", {**SIDES, "passage": ""}, {**SIDES, "passage": "Some text"}, "!column 'passage' holds a part"),
        ("dpo", {**SIDES, "better": "chosen"}, {**SIDES, "better": "rejected"}, "!column 'better' may say which"),
        ("dpo", SIDES, {**SIDES, **dict.fromkeys("abcdefgh", "x")}, "not read: a, b, c, d, e, f, g, h"),
        ("dpo", {**FROM_ONE, "label": 1}, {**FROM_ONE, "label": 0}, "!may say several things of response_1"),
        ("dpo", {**TWO, "winner": 1}, {**TWO, "winner": 2}, "(1 the first, 2 the second)"),
        ("kto", {**DEMO, "label": -1}, {**DEMO, "label": 1}, "read as labelled (1 good, -1 bad)"),
        ("kto", {**DEMO, "label": 1}, {**DEMO, "label": -1}, "read as labelled (1 good, -1 bad)"),
        ("sft", DEMO, {**DEMO, "label": False}, "!label: missing"),
    ],
)  # fmt: skip
def test_what_later_rows_alone_show_is_accounted_for(base, tmp_path, kind, early, late, says):
    rows = [filled(early if i < SAMPLE else late, i) for i in range(SAMPLE + 30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = OmegaConf.merge(base, {"test_size": 1, "path": str(path)})
    if says.startswith("!"):
        with pytest.raises(Refusal, match=re.escape(says[1:])):
            LOAD[kind](node)
        return
    splits = LOAD[kind](node)
    assert says in describe(splits.report)
    assert splits.report["rows"] == len(rows)


@pytest.mark.slow
def test_a_file_whose_rows_have_a_name_each_is_read(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**filled(SIDES, i), f"id_{i}": i}) + "\n" for i in range(2000)))
    splits = LOAD["dpo"](OmegaConf.merge(base, {"test_size": 1, "path": str(path)}))
    assert splits.report["unread"] == [f"id_{i}" for i in range(2000)]
    assert "not read: id_0, id_1" in describe(splits.report) and "id_19 and 1980 others" in describe(splits.report)


def manual():
    """{format: its rows in the manual, conf/data/base.yaml}"""
    text = (ROOT / "conf/data/base.yaml").read_text().partition("# What a row holds")[2].partition("format: auto")[0]
    shown: dict[str, list] = {}
    for line in re.sub(r"\n#    +", " ", text).splitlines():
        if heading := re.match(r"# (\w+): ", line):
            rows = shown.setdefault(heading[1], [])
        elif line.startswith("#   {"):
            rows.append(json.loads(line.removeprefix("#   ")))
    return shown


def again(rows, i):
    """Rows with other questions, and other names of messages."""
    text = re.sub(r"\b(Open|open|Shut)\b", rf"\1 {i}", json.dumps(rows))
    return json.loads(re.sub(r'(_id": ")', rf"\g<1>{i}", text))


@pytest.mark.parametrize("format", manual())
def test_the_manual_shows_three_rows_of_a_format(format, base, tmp_path):
    """Each is read as it, found and told; trees, which are rankings when they are joined, all three together."""
    rows = manual()[format]
    assert len(rows) == 3
    for group in [rows] if format == "trees" else [[row] for row in rows]:
        kind = (
            "kto"
            if format == "labelled"
            else "sft"
            if {"messages", "output", "conversations"} & {*group[0]}
            else "dpo"
        )
        shape = each(*(row for i in range(3) for row in again(group, i)))
        for said in ("auto", format):
            splits = loaded(kind, base, tmp_path, shape, len(shape), f"data.format={said}")
            assert splits.report["format"] == ("rankings" if format == "trees" else format)
            assert len(examples(splits)) == 3 and not sum(splits.report["dropped"].values())


def test_the_manual_shows_every_format():
    assert {*manual(), "auto"} == {*FORMATS}


# ---- trees


def message(name, parent, text, rank=None, **more):
    role = "prompter" if len(name) % 2 else "assistant"
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en", **more}


TREE = [
    message("a", None, "Open today?"),
    message("a1", "a", "No idea, sorry.", 1),
    message("a2", "a", "Yes, from ten on.", 0),
    message("a2x", "a2", "And on Sunday?"),
    message("a2xy", "a2x", "On Sunday, closed."),
    message("b", None, "Shut today?", lang="de"),
    message("b1", "b", "Yes, all day.", 0),
    message("b2", "b", "Who knows, really.", 2),
    message("b3", "b", "Spam, spam, spam.", 1, deleted=True),
    message("b3x", "b3", "Why that?"),
    message("c1", "gone", "To whom?"),
]
NESTED = {
    "message_tree_id": "a{i}",
    "prompt": {"role": "prompter", "text": Q, "lang": "en", "replies": [
        {"role": "assistant", "text": NO, "rank": 1, "replies": []},
        {"role": "assistant", "text": YES, "rank": 0, "replies": [{"role": "prompter", "text": "Sure?",
        "replies": []}]},
    ]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "format", "gives", "dropped"),
    [
        ("dpo", "auto", ["u: Open today? | Yes, from ten on. > No idea, sorry.",
                         "u: Shut today? | Yes, all day. > Who knows, really."], {"unpaired": 1}),
        ("sft", "trees", ["u: Open today? / a: Yes, from ten on. / u: And on Sunday? | On Sunday, closed.",
                          "u: Open today? | Yes, from ten on.", "u: Shut today? | Yes, all day."], {}),
        ("ppo", "auto", ["u: Open today?", "u: Open today? / a: Yes, from ten on. / u: And on Sunday?",
        "u: Shut today?"], {}),
    ],
)  # fmt: skip
def test_trees_are_prompts_with_ranked_replies(base, tmp_path, kind, format, gives, dropped):
    rows = iter(TREE)
    splits = loaded(kind, base, tmp_path, each(*rows), len(TREE), f"data.format={format} data.columns.family=lang")
    report = splits.report
    assert sorted(map(written, [*splits.train, *splits.test])) == gives
    assert {key: count for key, count in report["dropped"].items() if count} == {**dropped, "deleted": 2, "orphan": 1}
    assert sum(report["dropped"].values()) + report["train"] + report["test"] == report["candidates"] == report["rows"]
    assert {row["family"] for row in [*splits.train, *splits.test]} == {"en", "de"}
    assert "11 messages of trees are 3 prompts and their replies" in told(report)


def test_trees_may_be_nested(base, tmp_path):
    splits = loaded("dpo", base, tmp_path, NESTED)
    assert written(examples(splits)[0]) == PAIR and splits.report["dropped"]["unpaired"] == 4
    assert "no column 'chosen'" in refusal("dpo", base, tmp_path, DEMO | {"x": 1}, overrides="data.format=pairs")
    line = refusal("dpo", base, tmp_path, SIDES, overrides="data.format=trees")
    assert "rows need message_id, parent_id, role and text" in line


# ---- presets: invented rows of the shape that the page in the file's header shows

SHOWN = {
    "helpsteer3": ({
        "domain": "general", "language": "english", "context": [user()], "response1": YES, "response2": NO,
        "overall_preference": each(-2, 1, 0), "individual_preference": [{"score": -2, "reasoning": "r",
        "feedback1": "f"}],
    }, "preference", "+-+", "general", {"tie": 1}),
    "shp": ({
        "post_id": "x1", "domain": "askbaking_train", "upvote_ratio": 0.9, "history": Q, "c_root_id_A": "a",
        "c_root_id_B": "b",
        "created_at_utc_A": 1, "created_at_utc_B": 2, "score_A": 4, "score_B": 9, "human_ref_A": YES,
        "human_ref_B": NO,
        "labels": each(1, 0), "seconds_difference": 1.0, "score_ratio": 2.5,
    }, "preference", "+-+-", "askbaking_train", {}),
    "nectar": ({
        "prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["web"],
        "good_natured": True,
        "answers": [{"answer": NO, "model": "x", "rank": 2.0}, {"answer": YES, "model": "y", "rank": 1.0}],
    }, "rankings", "++++", None, {}),
    "pku_saferlhf": ({
        "prompt": Q, "response_0": YES, "response_1": NO, "prompt_source": "x", "response_0_source": "y",
        "response_1_source": "y",
        "is_response_0_safe": True, "is_response_1_safe": False, "response_0_harm_category": {"Theft": False},
        "response_1_harm_category": {"Theft": True}, "response_0_severity_level": 0, "response_1_severity_level": 2,
        "better_response_id": each(0, 1), "safer_response_id": 0, "response_0_sha256": "ab", "response_1_sha256": "cd",
    }, "preference", "+-+-", None, {}),
    "orca_dpo_pairs": ({"system": "", "question": Q, "chosen": YES, "rejected": NO}, "pairs", "++++", None, {}),
    "oasst": (each(*[
        {**message(f"{i}{end}", parent and f"{i}", text, rank), "user_id": "u", "created_date": "d", "review_count": 3,
         "review_result": True, "deleted": False, "synthetic": False, "model_name": None,
         "detoxify": {"toxicity": 0.1},
         "message_tree_id": f"{i}", "tree_state": "ready_for_export", "emojis": None, "labels": None,
         "role": "assistant" if parent else "prompter"}
        for i in range(4)
        for end, parent, text, rank in (("", None, f"Open at {i}?", None), ("y", "i", f"Yes, from {i} on.", 0), ("n",
        "i", "No idea.", 1))
    ]), "rankings", "++++", "en", {}),
    "ultrafeedback": ({
        "prompt": Q, "prompt_id": "x", **WHOLE, "messages": [user(), bot()], "score_chosen": 8.0,
        "score_rejected": 2.0,
    }, "pairs", "++++", None, {}),
    "ultrafeedback_ratings": ({
        "source": "flan", "instruction": Q, "models": ["x", "y"], "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "completions": [
            {"response": text, "overall_score": score, "model": "x", "principle": "honesty",
            "custom_system_prompt": "Be true.",
             "annotations": {"honesty": {"Rating": "4"}}, "critique": "Fine.", "fine-grained_score": 4.0}
            for text, score in ((NO, 2.5), (YES, 8.0))
        ],
    }, "ratings", "++++", "flan", {}),
    "chatbot_arena": ({
        "question_id": "x", "model_a": "x", "model_b": "y", "winner": each("model_a", "model_b", "tie",
        "tie (bothbad)"),
        "judge": "arena_user_1", "conversation_a": [user(), bot()], "conversation_b": [user(), bot(NO)], "turn": 1,
        "anony": True,
        "language": "English", "tstamp": 1.5, "openai_moderation": {"flagged": False},
        "toxic_chat_tag": {"t5": {"flagged": False}},
    }, "preference", "+-", "English", {"tie": 2}),
    "hh_rlhf": ({
        side: f"\n\nHuman: {Q}\n\nAssistant: {text}" for side, text in (("chosen", YES), ("rejected", NO))
    }, "hh_rlhf", "++++", None, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_a_preset_reads_rows_of_its_shape(name, base, tmp_path):
    shape, format, order, family, dropped = SHOWN[name]
    rows = 12 if name == "oasst" else 4
    splits = loaded("dpo", composed(name), tmp_path, shape, rows)
    found = examples(splits)
    assert "".join("-+"[row["chosen"][0]["content"].startswith("Yes")] for row in found) == order
    assert splits.report["format"] == format and {row["family"] for row in found} == {family}
    assert {key: count for key, count in splits.report["dropped"].items() if count} == dropped
    assert splits.report.get("unread", []) == (["prompt_id", "messages"] if name == "ultrafeedback" else [])
    assert "ignored_nothing" not in splits.report
    assert written(found[0]) == (PAIR if name != "oasst" else PAIR.replace("about 0.", "").replace("idea ", "idea."))


def test_every_preset_of_the_hub_is_read():
    hub = {
        file.stem for file in (ROOT / "conf/data").glob("*.yaml") if re.search(r"(?m)^path: \w.*/", file.read_text())
    }
    assert hub - {"ultrachat"} == set(SHOWN)
    for name in SHOWN:
        header = (ROOT / f"conf/data/{name}.yaml").read_text()
        path = re.search(r"(?m)^path: (.+)$", header)[1]
        assert f"https://huggingface.co/datasets/{path}" in header


def test_a_preset_may_be_told_to_learn_from_another_column(tmp_path):
    shape = {**SHOWN["pku_saferlhf"][0], "safer_response_id": 1}
    splits = loaded(
        "dpo", composed("pku_saferlhf"), tmp_path, shape, overrides="data.columns.preference=safer_response_id"
    )
    assert all(row["chosen"][0]["content"].startswith("No") for row in splits.train)
    assert splits.report["unread"] == ["better_response_id"]
