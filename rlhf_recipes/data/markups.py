"""How text marks who speaks: the tokens and headers of chat templates, and the names of transcripts.

for markup in MARKUPS:            # the first that fits is taken
    parsed = markup.parse(text)
"""

import re
from dataclasses import dataclass

from rlhf_recipes.data.messages import Drop, Messages
from rlhf_recipes.data.tokens import TEMPLATE_MARKER

# Who speaks, by the words that templates and transcripts have for it. A tool does not: no method takes its turns.
ROLE = {
    word: role
    for role, words in {
        "system": "system developer [system_prompt]",
        "user": "user human prompter prompt instruction input question q 用户 [inst]",
        "assistant": "assistant model bot chatbot ai gpt answer response output a 助手 [/inst]",
    }.items()
    for word in words.split()
}
PEOPLE = ("user", "human", "prompter", "用户", "system")  # who says something, where the others head a part of a task
BEGINS = (
    *("<s>", "<bos>", "<BOS_TOKEN>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<｜begin▁of▁sentence｜>", "[gMASK]", "<sop>", "]~!b[", "<|channel|>final<|message|>"),
)
ENDS = (
    *("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot|>", "<|end|>"),
    *("<|return|>", "<end_of_turn>", "<turn|>", "<eos>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", "<EOS_TOKEN>"),
    *("<|end_of_turn|>", "[|endofturn|]", "[e~[", "<seed:eos>", "<｜end▁of▁sentence｜>", "<|eom|>", "<eoh>", "<eoa>"),
    *("[/SYSTEM_PROMPT]", "<end_of_utterance>", "<|user|>"),  # GLM's turns end where the next begins
)
SYSTEM_INSIDE = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*(.*)", re.DOTALL)  # Llama 2: in the first user turn
# What templates write of their own: the dates of Llama 3 and gpt-oss, and how this heads the user's instructions; the
# sentence above Alpaca's fields, PKU's opening; a thought that was not had.
DATES = re.compile(r"Cutting Knowledge Date: [^\n]*\n(?:Today Date: [^\n]*\n?)?\n?")
OWN = re.compile(
    rf"{DATES.pattern}|# Instructions\n\n|"
    r"You are ChatGPT, a large language model trained by OpenAI\.\nKnowledge cutoff: .*",
    re.DOTALL,
)
OPENING = re.compile(r"Below is an instruction that describes a task[^\n]{0,200}|BEGINNING OF CONVERSATION:", re.I)
NO_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")
MOST_TURNS = 10_000
MOST_TOKENS = 4  # that a template writes in a row


@dataclass(frozen=True)
class Parsed:
    """Turns, and the text of a turn of the assistant at their end that nothing closed; None where there is none."""

    turns: Messages
    started: str | None

    def conversation(self) -> Messages:
        if self.started is None:
            return self.turns
        return [*self.turns, {"role": "assistant", "content": self.started.strip()}]


@dataclass(frozen=True)
class Markup:
    """How text marks the turns of a conversation.

    Attributes:
        name: what a line calls it.
        header: begins a turn; its one group is the word for who speaks.
        token: a chat template's own, which stands in no content: '' for a transcript. Contents between a template's
            tokens are taken exactly, others without the blanks around them.
        before: what may stand before the first turn, and then is the system message: `nothing`, `anything`, or
            anything where `both` speak or where a last empty turn of the assistant (`cue`) shows the transcript.
        spaced: whether headers follow a blank line.
        signs: one of these stands in every header; most texts have none, and are not searched for one.
    """

    name: str
    header: re.Pattern
    token: str = ""
    before: str = "nothing"
    spaced: bool = False
    signs: tuple[str, ...] = ("",)

    def parse(self, text: str, strict: bool = False) -> Parsed | Drop | None:
        """The turns; None where the text begins without one; a Drop where the template's tokens stand in contents.

        Args:
            text: a prompt, a conversation or an answer.
            strict: whether None, too, for what other markup reads better: turns of a transcript that do not
                alternate, headers of its kind that stand elsewhere.
        """
        if not any(sign in text for sign in self.signs):
            return None
        text = without_begins(text)
        every = []
        for head in self.header.finditer(text):
            every.append(head)
            if len(every) > MOST_TURNS:
                return Drop("unreadable", f"more than {MOST_TURNS:,} turns")
        heads = [head for head in every if not self.spaced or _after_blank_line(text, head.start())]
        if not heads:
            return None
        before = text[: heads[0].start()].strip()
        words = [head[1].lower() for head in heads]
        unknown = next((word for word in words if word not in ROLE), None)
        if unknown:
            return Drop("unreadable", f"{self.name} turn of '{unknown:.40}'")
        roles = [ROLE[word] for word in words]
        ends = [*(head.start() for head in heads[1:]), len(text)]
        said = [text[head.end() : end] for head, end in zip(heads, ends, strict=True)]
        if before and not self._may_stand_before(before, roles, said[-1]):
            return Drop("unreadable", f"{self.name} begins within the text") if self.token else None
        if strict and not self.token and (len(heads) < len(every) or not _alternate(words, roles)):
            return None
        return self._parsed(before, words, roles, said)

    def _may_stand_before(self, before: str, roles: list[str], last: str) -> bool:
        if TEMPLATE_MARKER.search(before):
            return False
        match self.before:
            case "both":
                return {"user", "assistant"} <= {*roles}
            case "cue":
                return "user" in roles and roles[-1] == "assistant" and not last.strip()
        return self.before == "anything"

    def _parsed(self, before: str, words: list[str], roles: list[str], said: list[str]) -> Parsed | Drop:
        turns = [{"role": "system", "content": before}] if before and not OPENING.fullmatch(before) else []
        closed, started = False, None
        for word, role, part in zip(words, roles, said, strict=True):
            content, end = without_ends(part)
            closed = bool(end)
            content = content if self.token not in ("", "[INST]") and closed else content.strip()
            if self.token:
                content = NO_THOUGHT.sub("", content, count=1) if role == "assistant" else content
                if self.token in content or (end and end in content):
                    return Drop("unreadable", f"{self.name} tokens within a turn of {role}")
            inside = SYSTEM_INSIDE.fullmatch(content) if "<<SYS>>" in content and role == "user" else None
            if inside:
                turns.append({"role": "system", "content": inside[1]})
                content = inside[2]
            if role == "system":
                own = (OWN if self.token else DATES).match(content)
                content = content[own.end() :].strip() if own else content
            if word == "input" and turns and turns[-1]["role"] == "user":
                turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
            elif content.strip() or role != "system":
                turns.append({"role": role, "content": content})
        if self.token and len(turns) > 1 and turns[-1] == {"role": "user", "content": ""}:
            turns.pop()  # its header ended the assistant's turn
        elif roles[-1] == "assistant" and not closed:
            turns.pop()
            part = said[-1] if self.token else said[-1].lstrip()
            started = NO_THOUGHT.sub("", part, count=1) if NO_THOUGHT.match(part) else part
        return Parsed(turns, started)


def _alternate(words: list[str], roles: list[str]) -> bool:
    """Whether the user begins and both speak in turn; heads of a task (`Question:`) are turns where both are there."""
    pairs = [(word, role) for word, role in zip(words, roles, strict=True) if word != "input"]
    asked = [role for _, role in pairs[pairs[0][1] == "system" if pairs else 0 :]]
    in_turn = all(role == ("user", "assistant")[index % 2] for index, role in enumerate(asked))
    return bool(asked) and in_turn and (words[0] in PEOPLE or len(asked) > 1)


def _after_blank_line(text: str, start: int) -> bool:
    """Whether a header that begins a line follows a blank one, or nothing at all."""
    above = text.rfind("\n", 0, max(start - 1, 0)) + 1
    return not text[above:start].strip() and (above > 0 or start == 0 or not text[:above].strip())


def without_begins(text: str) -> str:
    text = text.lstrip()
    for _ in range(MOST_TOKENS):
        if not text.startswith(BEGINS):
            break
        text = text[len(next(token for token in BEGINS if text.startswith(token))) :].lstrip()
    return text


def without_ends(text: str) -> tuple[str, str]:
    """The text without the tokens that end a turn, and the last one taken off ('' for none)."""
    taken, bare = "", text.rstrip()
    for _ in range(MOST_TOKENS):
        if not bare.endswith(ENDS):
            break
        taken = next(token for token in ENDS if bare.endswith(token))
        text = bare[: -len(taken)]
        bare = text.rstrip()
    return text, taken


def _lines(words: str, name: str, before: str = "nothing") -> tuple[Markup, Markup]:
    header = re.compile(rf"^[ \t]*(?:\*\*)?({words})(?:\*\*)?[ \t]?[:：](?:\*\*)?[ \t]?", re.IGNORECASE | re.MULTILINE)
    signs = (":", "：")
    spaced, close = (Markup(name, header, before=before, spaced=spaced, signs=signs) for spaced in (True, False))
    return spaced, close


def _template(
    name: str, token: str, header: str, before: str = "nothing", signs: tuple[str, ...] | None = None
) -> Markup:
    return Markup(name, re.compile(header), token, before, signs=signs or (token,))


# The first that fits is taken: templates before transcripts, and what is unmistakable first.
MARKUPS = (
    _template("ChatML", "<|im_start|>", r"<\|im_start\|> ?(\w+)(?:<\|im_sep\|>| ?\n|\Z)"),
    _template("Llama 3", "<|start_header_id|>", r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n{0,2}"),
    _template("Llama 4", "<|header_start|>", r"<\|header_start\|>(\w+)<\|header_end\|>\n{0,2}"),
    _template(
        "Llama 2 or Mistral",
        "[INST]",
        r"(?:<s>)?(?: |\n)?(\[/?INST\]|\[SYSTEM_PROMPT\]) ?",
        signs=("INST]", "[SYSTEM_PROMPT]"),
    ),
    _template("Gemma", "<start_of_turn>", r"<start_of_turn>(\w+)(?:\n|\Z)"),
    _template("Gemma 4", "<|turn>", r"<\|turn>(\w+)(?:\n|\Z)"),
    _template("DeepSeek", "<｜User｜>", r"<｜(User|Assistant)｜>", before="anything", signs=("<｜",)),
    _template(
        "Command R",
        "<|START_OF_TURN_TOKEN|>",
        r"<\|START_OF_TURN_TOKEN\|><\|(\w+)_TOKEN\|>(?:<\|START_RESPONSE\|>)?",
    ),
    _template("Granite", "<|start_of_role|>", r"<\|start_of_role\|>(\w+)(?:\{[^{}\n]*\})?<\|end_of_role\|>"),
    _template(
        "gpt-oss", "<|start|>", r"<\|start\|>(\w+)(?:(?:<\|channel\|>final)?<\|message\|>|(?<=assistant)(?=\s*\Z))"
    ),
    _template("Kimi", "<|im_middle|>", r"<\|im_(system|user|assistant)\|>[^<>\n]{0,60}<\|im_middle\|>"),
    _template("EXAONE", "[|user|]", r"\[\|(system|user|assistant)\|\]", signs=("[|",)),
    _template("Seed", "<seed:bos>", r"<seed:bos>(\w+)\n"),
    _template("MiniMax", "]~b]", r"\]~b\](\w+)[^\n]{0,60}\n"),
    _template("Nemotron", "<extra_id_1>", r"<extra_id_[01]>(System|User|Assistant)\n", signs=("<extra_id_",)),
    _template(
        "OpenChat",
        "<|end_of_turn|>",
        r"(?:(?<=<\|end_of_turn\|>)|\A)(?:GPT4 Correct |GPT4 |Math Correct |Code )(User|Assistant): ?",
        signs=("User:", "Assistant:"),
    ),
    _template(
        "Zephyr or Phi",
        "<|user|>",
        r"(?i)(?:<\|bom\|>)?<\|(system|user|assistant|prompter|human|bot|prompt|answer|"
        r"tools?|tool_\w+|functions?|observation|environment|ipython)\|>:? ?\n?",
        signs=("<|",),
    ),
    Markup(
        "transcripts (### headings)",
        re.compile(
            r"(?:#{2,4}|@@) ?(system|human|user|instruction|input|assistant|response|question|answer|output|bot|gpt)"
            r"(?: ?:[ \t]*|[ \t]*(?=\n))\n?",
            re.IGNORECASE,
        ),
        before="both",
        signs=("##", "@@"),
    ),
    Markup(
        "transcripts (<human>: <bot>:)",
        re.compile(r"<(human|user|bot|assistant|system)> ?: ?", re.IGNORECASE),
        before="both",
        signs=(">:", "> :"),
    ),
    Markup(
        "transcripts (USER: ASSISTANT:)",
        re.compile(r"(?:(?<=\s)|(?<=</s>)|\A)(SYSTEM|USER|ASSISTANT|HUMAN|BOT|GPT) ?: ?"),
        before="both",
        signs=(":",),
    ),
    *_lines(
        "human|user|assistant|ai|bot|chatbot|gpt|system|用户|助手", "transcripts (Human: Assistant:)", before="cue"
    ),
    *_lines("question|q|answer|a", "transcripts (Question: Answer:)"),
    *_lines("instruction|input|response|output", "transcripts (Instruction: Response:)"),
    # Llama's, whose turns follow each other on one line, or the date of its system message.
    Markup(
        "templates without their tokens",
        re.compile(r"(?:\A|(?<=\S)|(?<=\d{4}\n\n))(system|user|assistant)(?:\n\n|(?<=assistant)\Z)"),
        signs=("system\n", "user\n", "assistant"),
    ),
    Markup(
        "templates without their tokens",
        re.compile(r"^(system|user|assistant|model)[ \t]*\n", re.MULTILINE),
        signs=("system", "user", "assistant", "model"),
    ),
)
