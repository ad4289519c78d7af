r"""Text that is not what it seems: messages written as text, prompts in answers, transcripts, rendered templates.

    reading = look(sample)            # the first few hundred rows of a source: how its texts are read
    found = reading.read(raw, where)  # every row: a Raw (the same object where nothing is to do), or a Drop
    reading.refuse_if_most(source)    # after the last row
    reading.lines()                   # what was read as what; what was left as text, and how often

A source is read in one way, decided by what most of its looked-at rows hold, so that one odd row means what it did:

| most rows hold                                            | what happens                                          |
| --------------------------------------------------------- | ----------------------------------------------------- |
| message lists as JSON, Python's or numpy's repr           | parsed; the spelling of their messages is the caller's |
| lists of texts as JSON, in the prompt and every answer    | their turns, or the text where each has one           |
| texts as Python shows bytes or a list of one; in quotes,  |                                                       |
| as JSON has them, in the prompt and every answer          | parsed                                                |
| a prompt of three words or more that begins every answer  | cut off from the answers                              |
| a rendered chat template                                  | turns; its tokens are taken off the answers           |
| a transcript (`Human:`, `USER:`, `### Instruction:`, ...) | turns; an empty turn of the assistant at its end goes |
| answers that end with the token that ends a turn          | it is taken off                                       |
| answers that begin with the assistant's name              | it is taken off                                       |
| a template, a list or a user's turn that nothing parses   | refused: `data.text=plain` takes texts as they are    |

What fewer rows hold stays text and is counted. Two things are left out: `missing`, the words that libraries write for
an empty cell (`nan`, `None`, `null`) as a prompt, or as an answer among answers of more than three words beside
another that is no short word either (a label `None` stays); and `unreadable`, a row in a source of templates or
lists whose own does not parse: as text it would teach the markup. Started turns of the assistant that a prompt ends
with (`Assistant: Sure,`) are put in front of the answers.
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlhf_recipes.data.markups import ENDS, MARKUPS, NO_THOUGHT, Markup, Parsed, without_begins, without_ends
from rlhf_recipes.data.messages import Drop
from rlhf_recipes.data.raw import (
    FEW,
    SHOWN,
    STRUCTURE,
    Raw,
    Text,
    answer_text,
    like_messages,
    list_in,
    messages_in,
    prompt_text,
    rest_after,
    texts_of,
    unquoted,
    with_text,
)
from rlhf_recipes.data.row import LITERAL_LIMIT
from rlhf_recipes.data.tokens import TEMPLATE_MARKER
from rlhf_recipes.errors import Refusal

LOOKED_AT = 300  # rows
CHARACTERS, HEAD = 2_000_000, 20_000  # that decide, in all and of each text

MISSING = ("nan", "NaN", "NAN", "None", "NONE", "null", "NULL", "Null", "<NA>", "NA", "NaT", "#N/A", "undefined")
_MISSING = rf"(?P<missing>(?:{'|'.join(map(re.escape, MISSING))})\s*+\Z)"
_MARKUP = rf"(?P<markup>(?:<s>)?(?!</?s>)(?:{TEMPLATE_MARKER.pattern}))"  # <s> alone is HTML's
_LISTED = rf"(?P<structure>{STRUCTURE.pattern})|{_MARKUP}"
_FRAME = r"(?:\#{1,4} ?|\*\*|<|\[)?"
_COLON = r"(?:\*\*|>|\])? ?[:：]"
PROMPT_START = re.compile(
    rf"\s*+(?:{_LISTED}|{_MISSING}|(?P<transcript>{_FRAME}(?i:human|user|instruction|用户){_COLON}))"
)
ANSWER_START = re.compile(
    rf"\s*+(?:{_LISTED}|{_MISSING}|(?P<speaker_name>{_FRAME}(?i:assistant|ai|bot|chatbot|response|gpt|助手){_COLON})|"
    rf"(?P<user_speaks>{_FRAME}(?i:human|user|用户){_COLON})|"
    rf"(?P<heading>{_FRAME}(?i:answer|output|a|model){_COLON}))"
)
LABEL = re.compile(rf"\s*+{_FRAME}(?i:assistant|ai|bot|chatbot|response|gpt|助手){_COLON}(?:\*\*)?[ \t]*\n?")
USER_HEADING = re.compile(r"###? ?(?:Human|User|Instruction) ?:")
FIRST = 24  # characters at which a text that is only text is told
SIGNS = " \t\r\n[]{<>#*"  # what such a text seldom begins or ends with

KINDS = {
    "structure": "hold messages written as text",
    "markup": "hold tokens of a chat template",
    "transcript": "have a prompt that begins like a transcript",
    "prompt_in_answer": "have answers that begin with their prompt",
    "speaker_name": "have an answer that begins with the assistant's name",
    "user_speaks": "have an answer in which the user speaks",
    "heading": "have an answer that begins with a heading such as 'Answer:'",
    "missing": "have a short answer such as 'None' or 'nan', as a label may be",
    "unlike": "are not written as the others",
    "escaped": "have line breaks written as a backslash and an n",
}
REFUSED = ("structure", "markup", "transcript", "prompt_in_answer", "speaker_name", "user_speaks")


@dataclass
class Reading:
    """How the texts of a source are read, and what else was seen in them.

    Attributes:
        notes: what is read as what, a phrase each.
        counts: rows by what was seen and left as text (`KINDS`).
        places: the first of each.
        rows: how many were read.
    """

    notes: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    listed: frozenset[str] = frozenset()
    in_turns: bool = False
    quoted: frozenset[str] = frozenset()
    cut: bool = False
    markup: Markup | None = None
    in_prompts: bool = False
    ended: bool = False
    labelled: bool = False
    short: bool = False
    _unlike: bool = False

    def read(self, raw: Raw, where: str = "") -> Raw | Drop:
        """The row with its texts read as the source's are; the same object where that changes nothing."""
        self.rows += 1
        found = raw
        if self.notes:
            self._unlike = False
            found = self._read(raw)
            if isinstance(found, Drop):
                return found
            if self._unlike:
                self._count("unlike", where)
        kinds = _suspicions(found)
        if kinds:
            if "missing" in kinds:
                missing = _missing(found, self.short)
                if missing:
                    return missing
            for kind in kinds:
                self._count(kind, where)
        return found

    def refuse_if_most(self, source: str) -> None:
        """Refuse a source most of whose rows hold what is not what it seems, and what nothing here reads.

        Raises:
            Refusal: names the kind, the share, the first place and the override.
        """
        for kind in REFUSED:
            if self.counts[kind] * 2 > self.rows:
                place = f" (first: {self.places[kind]})" if self.places[kind] else ""
                raise Refusal(
                    f"{source}: {self.counts[kind]} of {self.rows} rows {KINDS[kind]}, which cannot be read as "
                    f"turns{place}. Give the messages themselves, or set data.text=plain to take texts as they are."
                )

    def lines(self) -> list[str]:
        """What was read as what, and what was left as text; nothing for plain texts."""
        lines = [*self.notes]
        if lines:
            lines[-1] += " (data.text=plain takes texts as they are)"
        for kind, said in KINDS.items():
            if self.counts[kind]:
                place = f", the first: {self.places[kind]}" if self.places[kind] else ""
                lines.append(f"{self.counts[kind]} of {self.rows} rows {said}: left as text{place}")
        return lines

    def _count(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        self.places.setdefault(kind, where)

    def _read(self, raw: Raw) -> Raw | Drop:
        found: Raw | Drop = raw
        for wanted, step in (
            (self.listed, self._parse_lists),
            (self.in_turns, _zip_turns),
            (self.quoted, self._unquote),
            (self.cut, self._cut_prompts),
            (self.markup, self._parse_markup),
            (self.ended, _take_ends),
            (self.labelled, _take_labels),
        ):
            found = step(found) if wanted else found
            if isinstance(found, Drop):
                return found
        return raw if found == raw else found

    def _parse_lists(self, raw: Raw) -> Raw | Drop:
        prompt = self._list(raw.prompt) if "prompt" in self.listed else raw.prompt
        answers = tuple(map(self._list, raw.answers)) if "answers" in self.listed else raw.answers
        dropped = next((each for each in (prompt, *answers) if isinstance(each, Drop)), None)
        return dropped or Raw(prompt, answers)

    def _list(self, text: Text) -> Text | Drop:
        if not isinstance(text, str) or not text.strip():
            return text
        messages = messages_in(text)
        if messages is None and like_messages(text):
            return Drop("unreadable", "messages written as text that do not parse")
        self._unlike |= messages is None
        return text if messages is None else messages

    def _unquote(self, raw: Raw) -> Raw:
        answers = tuple(_taken(answer, unquoted) for answer in raw.answers)
        self._unlike |= any(one == other for one, other in zip(answers, raw.answers, strict=True))
        is_written = "prompt" in self.quoted and prompt_text(raw.prompt)
        return Raw(_taken(raw.prompt, unquoted) if is_written else raw.prompt, answers)

    def _cut_prompts(self, raw: Raw) -> Raw:
        prompt = prompt_text(raw.prompt)
        rests = [rest_after(prompt, answer_text(answer)) for answer in raw.answers]
        self._unlike |= None in rests
        answers = [
            answer if rest is None else with_text(answer, rest)
            for answer, rest in zip(raw.answers, rests, strict=True)
        ]
        return replace(raw, answers=tuple(answers))

    def _parse_markup(self, raw: Raw) -> Raw | Drop:
        prompt, started = raw.prompt, ""
        text = prompt_text(prompt)
        if self.in_prompts and text.strip():
            parsed = self.markup.parse(text)
            if isinstance(parsed, Drop):
                return parsed
            if parsed is None:
                self._unlike = True
            elif not parsed.turns:
                return Drop("unreadable", f"{self.markup.name} without a turn of the user")
            else:
                prompt, started = parsed.turns, parsed.started or ""
                started = started if started.strip() else ""
        answers = []
        for answer in raw.answers:
            said = self._answer(answer, started)
            if isinstance(said, Drop):
                return said
            answers.append(said)
        return Raw(prompt, tuple(answers))

    def _answer(self, answer: Text, started: str) -> Text | Drop:
        text = answer_text(answer)
        if not text.strip():
            return answer
        text = without_begins(without_ends(text)[0]) if self.markup.token else text
        parsed = self.markup.parse(text)
        if isinstance(parsed, Drop):
            return parsed
        turns = parsed.conversation() if parsed else []
        if turns and not (self.in_prompts and turns[0]["role"] == "system" and not self.markup.token):
            if len(turns) != 1 or turns[0]["role"] != "assistant":
                return turns if isinstance(answer, str) else answer
            text = turns[0]["content"]
        else:
            self._unlike |= not self.in_prompts
        text = started + text
        return with_text(answer, (NO_THOUGHT.sub("", text, count=1) if self.markup.token else text).strip())


def look(rows: Sequence[Raw]) -> Reading:
    """How the texts of a source are read, from its first rows.

    Args:
        rows: a few hundred; more are not looked at.
    """
    reading = Reading()
    sample, size = [], 0
    for raw in rows[:LOOKED_AT]:
        sample.append(raw)
        size += sum(min(len(text), HEAD) for text in texts_of(raw))
        if size > CHARACTERS:
            break
    for part, cells in (
        ("prompt", [raw.prompt for raw in sample]),
        ("answers", [answer for raw in sample for answer in raw.answers]),
    ):
        cells = [cell for cell in cells if isinstance(cell, list) or (cell and len(cell) <= LITERAL_LIMIT)]
        if _most(isinstance(cell, str) and messages_in(cell) is not None for cell in cells):
            reading.listed |= {part}
    if reading.listed:
        what = {"prompt": "prompts", "answers": "answers"}
        reading.notes.append(f"{' and '.join(what[part] for part in sorted(reading.listed, reverse=True))}")
        reading.notes[-1] += " are messages written as text: parsed"
        sample = _kept(map(reading._parse_lists, sample))
    if _most(_in_turns(raw) for raw in sample):
        reading.in_turns = True
        reading.notes.append("prompts and answers are lists of texts: read as turns")
        sample = _kept(map(_zip_turns, sample))
    if _most(_is_quoted(raw) for raw in sample):
        in_prompts = _most(unquoted(prompt_text(raw.prompt)) != prompt_text(raw.prompt) for raw in sample)
        reading.quoted = frozenset({"answers", *["prompt"] * in_prompts})
        what = "prompts and answers" if in_prompts else "answers"
        reading.notes.append(f"{what} are texts as Python or JSON writes them down: parsed")
        sample = _kept(map(reading._unquote, sample))
    if _most(_begin_with_prompt(raw) for raw in sample):
        reading.cut = True
        reading.notes.append("answers begin with their prompt: it is cut off")
        sample = _kept(map(reading._cut_prompts, sample))
    reading.markup, reading.in_prompts = _markup(sample)
    if reading.markup:
        part = "prompts" if reading.in_prompts else "answers"
        how = "read as turns" + ", its tokens taken off" * bool(reading.markup.token)
        kind = "rendered by a chat template " * bool(reading.markup.token)
        name = f"({reading.markup.name})" if kind else f"{reading.markup.name}"
        reading.notes.append(f"{part} are {kind}{name}: {how}")
        sample = _kept(map(reading._parse_markup, sample))
    answers = [[answer_text(answer) for answer in raw.answers] for raw in sample]
    if _most(any(without_ends(text)[1] for text in texts) for texts in answers):
        reading.ended = True
        reading.notes.append("answers end with a token that ends a turn: it is taken off")
    if _most(any(map(LABEL.match, texts)) for texts in answers):
        reading.labelled = True
        reading.notes.append("answers begin with the assistant's name: it is taken off")
    words = [len(text.split()) for texts in answers for text in texts if text.strip() not in ("", *MISSING)]
    reading.short = bool(words) and statistics.median(words) <= FEW
    reading._unlike = False
    return reading


def _most(found) -> bool:
    found = [bool(each) for each in found]
    return sum(found) * 2 > len(found)


def _kept(found) -> list[Raw]:
    return [each for each in found if isinstance(each, Raw)]


def _in_turns(raw: Raw) -> list[list[str]] | None:
    """The turns of prompt and answers where all are lists of as many texts."""
    lists = [list_in(text) for text in (raw.prompt, *raw.answers)]
    return lists if raw.answers and None not in lists and len({*map(len, lists)}) == 1 else None


def _zip_turns(raw: Raw) -> Raw:
    """One turn each: their texts. More: every answer as the conversation that it had with the prompt's turns."""
    lists = _in_turns(raw)
    if lists is None:
        return raw
    asked, *answered = lists
    if len(asked) == 1:
        return Raw(asked[0], tuple(answers[0] for answers in answered))
    conversations = [
        [
            {"role": role, "content": text}
            for pair in zip(asked, answers, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        for answers in answered
    ]
    return Raw(None, tuple(conversations))


def _is_quoted(raw: Raw) -> bool:
    """Whether every answer is a text written down; one in quotes may be a quotation, if its prompt is none too."""
    texts = texts_of(raw)
    answers = bool(raw.answers) and all(unquoted(text) != text for text in texts[1:])
    return answers and (all(map(SHOWN.match, texts[1:])) or unquoted(texts[0]) != texts[0])


def _begin_with_prompt(raw: Raw) -> bool:
    prompt = prompt_text(raw.prompt)
    return bool(raw.answers) and all(rest_after(prompt, answer_text(answer)) is not None for answer in raw.answers)


def _markup(sample: list[Raw]) -> tuple[Markup | None, bool]:
    """The markup of most prompts (and whether it is theirs), else of most answers."""
    prompts = [prompt_text(raw.prompt) for raw in sample]
    answers = [answer_text(answer) for raw in sample for answer in raw.answers if isinstance(answer, str)]
    for markup in MARKUPS:
        if _is_in_most(markup, prompts):
            return markup, True
    for markup in MARKUPS:
        if _is_in_most(markup, answers, whole=True):
            return markup, False
    return None, False


def _is_in_most(markup: Markup, texts: list[str], whole: bool = False) -> bool:
    """Whether more than half of the texts have it: no more are looked at than settle it."""
    without = 0
    for text in texts:
        without += not _is_in(markup, text, whole)
        if without * 2 >= len(texts):
            return False
    return bool(texts)


def _is_in(markup: Markup, text: str, whole: bool = False) -> bool:
    parsed = markup.parse(text[:HEAD], strict=True)
    if not isinstance(parsed, Parsed):
        return False
    turns = parsed.conversation() if whole else parsed.turns
    if whole and not markup.token:
        return len(turns) > 1 and turns[-1]["role"] == "assistant"
    return bool(turns)


def _take_ends(raw: Raw) -> Raw:
    return replace(raw, answers=tuple(_taken(answer, lambda text: without_ends(text)[0]) for answer in raw.answers))


def _take_labels(raw: Raw) -> Raw:
    return replace(raw, answers=tuple(_taken(answer, lambda text: LABEL.sub("", text, 1)) for answer in raw.answers))


def _taken(answer: Text, take) -> Text:
    text = answer_text(answer)
    rest = take(text)
    return answer if rest == text else with_text(answer, rest)


def _suspicions(raw: Raw) -> list[str]:
    """What a row's texts hold that may not be what it seems."""
    prompt = prompt_text(raw.prompt)
    kinds = _seen(prompt, PROMPT_START)
    begin = prompt.strip()[:FIRST] or "\0"
    repeats = bool(raw.answers)
    escaped = broken = False
    for answer in raw.answers:
        text = answer_text(answer)
        escaped, broken = escaped or "\\n" in text, broken or "\n" in text
        kinds = kinds + _seen(text, ANSWER_START)
        if (
            "\nHuman:" in text
            or "\nUser:" in text
            or "\nUSER:" in text
            or ("###" in text and USER_HEADING.search(text))
        ):
            kinds = [*kinds, "user_speaks"]
        repeats = repeats and text.lstrip().startswith(begin) and rest_after(prompt, text) is not None
    kinds = [*kinds, *["prompt_in_answer"] * repeats, *["escaped"] * (escaped and not broken)]
    return list(dict.fromkeys(kinds))


def _seen(text: str, start: re.Pattern) -> list[str]:
    """What a text's beginning, its end and its tokens say; a glance decides for most texts."""
    kinds = []
    head = text[:FIRST]
    if ":" in head or "：" in head or head[:1] in SIGNS or len(text) < FIRST:
        begins = start.match(text)
        if begins and (begins.lastgroup != "structure" or like_messages(text)):
            kinds.append(begins.lastgroup)
    if ("<|" in text and TEMPLATE_MARKER.search(text)) or (text[-1:] in SIGNS and text.rstrip().endswith(ENDS)):
        kinds.append("markup")
    return kinds


def _missing(raw: Raw, short: bool) -> Drop | None:
    """A Drop where an empty cell was written out as a word; None where the word may be an answer."""
    if prompt_text(raw.prompt).strip() in MISSING:
        return Drop("missing", f"prompt is '{prompt_text(raw.prompt).strip()}'")
    texts = [answer_text(answer).strip() for answer in raw.answers]
    missing = [text for text in texts if text in MISSING]
    others = [text for text in texts if text and text not in MISSING]
    if not missing or short or any(len(text.split()) <= FEW for text in others):
        return None
    return Drop("missing", f"an answer is '{missing[0]}'")
