"""The formats of rows (`data.format`), turned into prompt and answers in TRL's conversational format.

A row gives candidates: an example (`prompt`, and for each side a list of one message), or a `Drop`: why it gives none.
What is wrong with a column or a type is a `Refusal` with row and key.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from typing import Any

from rlhf_recipes.data import preference
from rlhf_recipes.data.messages import Drop, Messages
from rlhf_recipes.data.raw import Raw, says_much
from rlhf_recipes.data.recognise import Layout
from rlhf_recipes.data.row import Row, at, is_blank
from rlhf_recipes.data.texts import Reading
from rlhf_recipes.errors import Refusal

SIDES = ("chosen", "rejected", "completion")
PROMPT_TURNS = re.compile("s?(ua)*u")  # roles by their first letter
TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")

Candidate = dict[str, Any] | Drop


def candidates(
    row: Row, layout: Layout, sides: tuple[str, ...], reduce: str = "best_worst", reading: Reading | None = None
) -> Iterator[Candidate]:
    """What one row gives: an example per pair of answers, or why there is none.

    Args:
        row: the row, under the layout's columns.
        layout: how the file is read.
        sides: the answers an example has: (chosen, rejected), (completion,) or none; from labelled rows (completion,)
            takes the good ones, and anything else both kinds, with their `label`.
        reduce: `data.reduce`, for ratings and rankings.
        reading: how the source's texts are read; None: letter by letter.
    """
    try:
        row.watch(layout.watched)
        found = _from_format(row, layout, sides, reduce, reading)
    except Drop as drop:
        yield drop
        return
    yield from ((_fault(each) or each) if isinstance(each, dict) else each for each in found)


def asked(row: Row, layout: Layout, reading: Reading | None = None) -> Messages:
    """The prompt of a row that has a column of it, in whatever order its turns are; [] where nothing is in it.

    Raises:
        Drop: why it cannot be read.
    """
    row.watch(layout.watched)
    return prompt_in(row, _read(row, layout, (), reading).prompt)


def prompt_fault(prompt: Messages) -> Drop | None:
    """Why nothing can be trained on whose prompt this is, or None."""
    return _fault({"prompt": prompt})


def raw(row: Row, layout: Layout, sides: tuple[str, ...]) -> Raw | None:
    """Prompt and answers of a row as they lie in the file; None for a format that has a reading of its own."""
    if layout.format in ("hh_rlhf", "messages"):
        return None
    prompt = row.texts("prompt", row.optional("prompt"))
    match layout.format:
        case _ if _is_prompt(row, layout, sides):
            return Raw(prompt, ())
        case "preference":
            columns = ["first", "second"]
        case "ratings" | "rankings":
            return Raw(prompt, tuple(row.texts("responses", each) for each in row.items("responses")))
        case _:
            columns = _side_columns(row, layout, sides)
    return Raw(prompt, tuple(row.texts(column, row.value(column)) for column in columns))


def _is_prompt(row: Row, layout: Layout, sides: tuple[str, ...]) -> bool:
    """Whether a prompt is wanted and lies in its column, not in whole conversations."""
    if sides or layout.format in ("hh_rlhf", "messages") or not row.has("prompt"):
        return False
    return not is_blank(row.value("prompt")) or not any(map(row.has, ("chosen", "completion", "first")))


def _read(row: Row, layout: Layout, sides: tuple[str, ...], reading: Reading | None) -> Raw:
    found = raw(row, layout, sides)
    are_texts = all(isinstance(each, str | list | None) for each in (found.prompt, *found.answers))
    if reading is not None and are_texts:  # what is neither is refused under its key
        found = reading.read(found, row.where)
    if isinstance(found, Drop):
        raise found
    return found


def _from_format(
    row: Row, layout: Layout, sides: tuple[str, ...], reduce: str, reading: Reading | None
) -> list[Candidate]:
    if _is_prompt(row, layout, sides):
        prompt = prompt_in(row, _read(row, layout, sides, reading).prompt)
        return [{"prompt": prompt} if prompt else Drop("empty")]
    if not sides and layout.format != "messages":
        answered = _asking(row, layout, reduce, reading)
        return [{"prompt": each["prompt"]} if isinstance(each, dict) else each for each in answered]
    match layout.format:
        case "pairs":
            return [_from_sides(row, layout, sides, reading)]
        case "preference":
            return [_from_preference(row, layout, sides, reading)]
        case "hh_rlhf":
            return [_from_transcripts(row, sides)]
        case "labelled":
            return [_from_label(row, layout, sides, reading)]
        case "messages":
            return [_from_conversation(row, sides)]
        case "ratings":
            return _from_scores(row, layout, "scores", reduce, sides, reading)
        case "rankings":
            return _from_scores(row, layout, "ranks", reduce, sides, reading)


def _asking(row: Row, layout: Layout, reduce: str, reading: Reading | None) -> list[Candidate]:
    """An example with the prompt that lies in the answers, whichever of them is good."""
    match layout.format:
        case "preference":
            found = _read(row, layout, ("completion",), reading)
            return [_example(row, Raw(found.prompt, found.answers[:1]), ["first"], ("completion",))]
        case "labelled":
            return [_from_sides(row, layout, ("completion",), reading)]
        case _:
            return _from_format(row, layout, ("completion",), reduce, reading)


def _side_columns(row: Row, layout: Layout, sides: tuple[str, ...]) -> list[str]:
    """A demonstration's completion is its own column, else the chosen answer of a pair."""
    if layout.format == "labelled":
        return ["completion"]
    use_chosen = layout.format == "hh_rlhf" or not row.has("completion")
    return ["chosen" if side == "completion" and use_chosen else side for side in sides or ("completion",)]


def _from_sides(row: Row, layout: Layout, sides: tuple[str, ...], reading: Reading | None) -> Candidate:
    found = _read(row, layout, sides, reading)
    return _example(row, found, _side_columns(row, layout, sides), sides)


def _example(row: Row, found: Raw, columns: list[str], sides: tuple[str, ...]) -> Candidate:
    """Sides are text, [assistant], or whole conversations, whose shared context then is the prompt."""
    answers = zip(columns, found.answers, strict=True)
    conversations = [row.turns(column, value, "assistant") for column, value in answers]
    if not all(conversations):
        return Drop("empty")
    is_whole = any(len(turns) > 1 for turns in conversations)
    prompt = prompt_in(row, found.prompt, is_whole)
    whole = next((turns[:-1] for turns in conversations if len(turns) > 1), [])
    contexts = [turns[:-1] or prompt or whole for turns in conversations]
    if not all(contexts):
        if not row.has("prompt"):
            row.value("prompt")
        return Drop("empty", "no prompt")
    if any(_stripped(context) != _stripped(contexts[0]) for context in contexts):
        return Drop("context_differs", _first_difference(contexts))
    if prompt and not _agrees(prompt, contexts[0]):
        return Drop("context_differs", "the prompt is not what the conversations begin with")
    return {
        "prompt": _with_system(row, contexts[0]) if is_whole else prompt,
        **{side: turns[-1:] for side, turns in zip(sides, conversations, strict=True)},
    }


def prompt_in(row: Row, value: Any, is_whole: bool = False) -> Messages:
    """The prompt with what other columns hold of it; where it lies in whole conversations, as it is."""
    turns = row.turns("prompt", value, "user") if value is not None else []
    if not any(turn["content"].strip() for turn in turns):
        turns = []
    if not is_whole:
        return _joined(row, turns)
    added, earlier = _input(row), row.history("history")
    if earlier or (added.strip() and added.strip() not in {turn["content"].strip() for turn in turns}):
        raise _not_joined(row, "history" if earlier else "input", "a prompt that lies in whole conversations")
    return turns


def _joined(row: Row, turns: Messages) -> Messages:
    """A prompt with what other columns hold of it and it does not: earlier turns before it, a text below it, the
    system's."""
    added, earlier = _input(row), row.history("history")
    if earlier and (
        _stripped(turns[: len(earlier)]) == _stripped(earlier) or _holds(turns, *(turn["content"] for turn in earlier))
    ):
        row.held[row.columns["history"]] += 1
        earlier = []
    if _holds(turns, added):
        row.held[row.columns["input"]] += 1
    elif added.strip():
        if len(turns) > 1 or (turns and turns[0]["role"] != "user"):
            raise _not_joined(row, "input", "a prompt of several turns")
        turns = [{"role": "user", "content": "\n\n".join([*(turn["content"] for turn in turns), added])}]
    return _with_system(row, [*earlier, *turns] if turns else [])


def _input(row: Row) -> str:
    added = row.optional("input")
    if added in (None, [], {}):
        return ""
    if isinstance(added, bool) or not isinstance(added, str | int | float):
        raise row.wrong("input", "must be text", added)
    return str(added)


def _holds(turns: Messages, *texts: str) -> bool:
    """Whether the turns say these texts already, which are no few words that any prompt may have."""
    said = "\n".join(turn["content"] for turn in turns)
    return says_much(" ".join(texts)) and all(text.strip() in said for text in texts)


def _not_joined(row: Row, key: str, to: str) -> Refusal:
    name = row.columns[key]
    return Refusal(
        f"{row.where}: {name}: cannot be joined to {to}. Remove it, or leave it unread: data.ignore=[{name}]"
    )


def _with_system(row: Row, turns: Messages) -> Messages:
    said = row.text("system") if row.has("system") else ""
    if not said.strip() or not turns:
        return turns
    if turns[0]["role"] == "system":
        if turns[0]["content"].strip() != said.strip():
            raise _not_joined(row, "system", "a prompt with another system turn")
        return turns
    if _holds(turns[:1], said):
        row.held[row.columns["system"]] += 1
        return turns
    return [{"role": "system", "content": said}, *turns]


def _first_difference(contexts: list[Messages]) -> str:
    for i, turns in enumerate(zip(*map(_stripped, contexts), strict=False)):
        if any(turn != turns[0] for turn in turns):
            return f"turn {i + 1} differs"
    return f"{' and '.join(str(len(each)) for each in contexts)} turns"


def _from_preference(row: Row, layout: Layout, sides: tuple[str, ...], reading: Reading | None) -> Candidate:
    """Two answers, of which a column says which is the better one."""
    columns = layout.columns["first"], layout.columns["second"]
    models = tuple(at(row.values, name) for name in layout.models or ())
    try:
        p = preference.better(row.value("preference"), layout.scale, columns, models or (None, None))
    except (TypeError, ValueError) as error:
        rule = (
            f"names neither {columns[0]} nor {columns[1]}. Write one of them, tie, or null to leave the row out."
            if layout.scale == "names"
            else f"does not say which is better ({preference.SAID[layout.scale]}). Mend or remove the row, or set "
            "data.preference."
        )
        name = layout.columns["preference"]
        raise Refusal(f"{row.where}: {name}: {row.value('preference')!r:.40} {rule}") from error
    if p is None:
        return Drop("unlabelled")
    p = 1 - p if layout.turned else p
    if p == 0.5:
        return Drop("tie")
    found = _read(row, layout, sides, reading)
    order = ((0, "first"), (1, "second")) if p > 0.5 else ((1, "second"), (0, "first"))
    taken = order[: len(sides)]
    answers = Raw(found.prompt, tuple(found.answers[i] for i, _ in taken))
    example = _example(row, answers, [column for _, column in taken], sides)
    if isinstance(example, dict) and p not in (0, 1):
        example["p"] = max(p, 1 - p)
    return example


def _from_label(row: Row, layout: Layout, sides: tuple[str, ...], reading: Reading | None) -> Candidate:
    label = row.good("label") if layout.scale != "good" else _sign(row, "label")
    if label is None:
        return Drop("unlabelled")
    label = label != layout.turned
    found = _from_sides(row, layout, ("completion",), reading)
    if sides != ("completion",):
        return found if isinstance(found, Drop) else {**found, "label": label}
    return found if label else Drop("labelled_bad")  # no demonstration


def _sign(row: Row, key: str) -> bool | None:
    number = row.number(key, "must be 1 or -1", -1, 1)
    if number == 0:
        raise row.wrong(key, "must be 1 or -1", 0)
    return number > 0 if number is not None else None


def _agrees(prompt: Messages, context: Messages) -> bool:
    """Whether the prompt column is the context, or its first or last user turn (as in UltraFeedback)."""
    asked = [turn for turn in _stripped(context) if turn[0] == "user"]
    return _stripped(prompt) in (_stripped(context), asked[:1], asked[-1:])


def _stripped(messages: Messages) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in messages]


def _from_transcripts(row: Row, sides: tuple[str, ...]) -> Candidate:
    columns = ["chosen" if side == "completion" else side for side in sides]
    texts = [row.text(column) for column in columns]
    conversations = [parse_transcript(text) for text in texts]
    if any(len(turns) < 2 for turns in conversations):
        return Drop("roles", "no transcript of two turns") if all(text.strip() for text in texts) else Drop("empty")
    contexts = [turns[:-1] for turns in conversations]
    if any(context != contexts[0] for context in contexts):
        return Drop("context_differs", _first_difference(contexts))
    return {
        "prompt": contexts[0],
        **{side: turns[-1:] for side, turns in zip(sides, conversations, strict=True)},
    }


def parse_transcript(text: str) -> Messages:
    r"""Turns of an HH-RLHF transcript, each stripped at its ends; [] for text that is no transcript.

    Only `\n\nHuman:` and `\n\nAssistant:` start a turn; colons, blank lines, these words elsewhere stay.
    """
    before, *parts = TRANSCRIPT_TURN.split(text)
    if before.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _from_conversation(row: Row, sides: tuple[str, ...]) -> Candidate:
    turns = row.conversation("messages")
    if not sides:
        asked = turns[:-1] if turns[-1:] and turns[-1]["role"] == "assistant" else turns
        return {"prompt": _joined(row, asked) if asked else []}
    if len(turns) < 2:
        return Drop("roles", f"one turn, of the {turns[0]['role']}") if turns else Drop("empty")
    return {"prompt": _joined(row, turns[:-1]), "completion": turns[-1:]}


def _from_scores(
    row: Row, layout: Layout, key: str, reduce: str, sides: tuple[str, ...], reading: Reading | None
) -> list[Candidate]:
    """Pairs of answers by score (high is best) or rank (1 is best): all k(k-1)/2, or best with worst.

    Answers without a score take part in none.
    """
    found = _read(row, layout, sides, reading)
    prompt = prompt_in(row, found.prompt)
    scores = row.numbers(key, len(found.answers))
    rated = [i for i, score in enumerate(scores) if score is not None]
    if len(found.answers) < len(sides):
        return [Drop("unpaired", f"{len(found.answers)} {row.columns['responses']}")]
    if len(rated) < len(sides):
        return [Drop("unrated", f"{len(rated)} of {len(scores)} rated")]
    goodness = {i: -scores[i] if key == "ranks" else scores[i] for i in rated}
    order = sorted(rated, key=lambda i: -goodness[i])  # stable: the first of equals leads
    turns = {i: row.turns("responses", found.answers[i] or "", "assistant")[-1:] for i in rated}
    if len(sides) == 1:
        return [{"prompt": prompt, sides[0]: turns[order[0]]} if prompt else Drop("empty")]
    compared = combinations(order, 2) if reduce == "all" else [(order[0], order[-1])]
    return [
        Drop("tie")
        if goodness[better] == goodness[worse]
        else {"prompt": prompt, "chosen": turns[better], "rejected": turns[worse]}
        if prompt
        else Drop("empty")
        for better, worse in compared
    ]


def _fault(example: dict[str, Any]) -> Drop | None:
    """Why an example cannot be trained on, or None."""
    answers = [example[side][0] for side in SIDES if side in example]
    said = [turn for turn in [*example["prompt"], *answers] if turn["role"] != "system"]
    for i, turn in enumerate(said):
        if not turn["content"].strip():
            return Drop("empty", f"turn {i + 1}, of the {turn['role']}" if i < len(example["prompt"]) else "")
    roles = [turn["role"] for turn in example["prompt"]]
    if not PROMPT_TURNS.fullmatch("".join(role[0] for role in roles)):
        return Drop("roles", _wrong_order(roles))
    if any(turn["role"] != "assistant" for turn in answers):
        other = next(turn["role"] for turn in answers if turn["role"] != "assistant")
        return Drop("roles", f"the answer is a turn of the {other}")
    if len({turn["content"].strip() for turn in answers}) < len(answers):
        return Drop("identical")
    return None


def _wrong_order(roles: list[str]) -> str:
    asked = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in asked:
        return f"turn {roles.index('system', len(roles) - len(asked)) + 1} is of the system"
    if asked[:1] == ["assistant"]:
        return "the conversation opens with the assistant"
    for i, (one, two) in enumerate(pairwise(asked)):
        if one == two:
            return f"turns {i + 1} and {i + 2} are both of the {one}"
    return "the prompt ends with the assistant" if asked else "no turn of the user"


def prompt_id(prompt: Messages) -> str:
    """16 hex digits that tell prompts apart, whatever their case, spacing and Unicode form."""
    turns = [f"{turn['role']}: {unicodedata.normalize('NFKC', turn['content']).casefold()}" for turn in prompt]
    text = "\n".join(" ".join(turn.split()) for turn in turns)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def pair_id(prompt_id: str, first: str, second: str) -> str:
    """16 hex digits of two answers to a prompt, whichever comes first."""
    text = "\0".join((prompt_id, *sorted((first.strip(), second.strip()))))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def opening_id(prompt: Messages) -> str:
    """`prompt_id` of the first user turn alone: shared by the stages of a conversation, and under any system turn."""
    return prompt_id([next(turn for turn in prompt if turn["role"] == "user")])


def clusters(rows: Iterable[dict]) -> list[str]:
    """What every interval resamples in place of rows: the stages of one conversation are not independent, nor is one
    question under several system turns, so the `opening_id`, by which `data.split` holds out too; of a prompt of one
    turn its `prompt_id`.

    A row that was made of another has that one's as its `cluster`. Where one greeting opens all conversations they are
    told apart by what follows.
    """
    found, prompts = [], []
    for row in rows:
        turns = row.get("prompt")
        opens = isinstance(turns, list) and len(turns) > 1 and any(turn["role"] == "user" for turn in turns)
        found.append(row.get("cluster") or (opening_id(turns) if opens else row["prompt_id"]))
        prompts.append(row.get("cluster") or row["prompt_id"])
    return prompts if len(set(found)) == 1 else found
