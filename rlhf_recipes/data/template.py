"""A chat template, a program that came with the model: what it is told, and its rendering in bounded time."""

import copy
import functools
import inspect
import json
import re
import traceback
from datetime import date
from pathlib import Path
from typing import Any

from rlhf_recipes import signals, text
from rlhf_recipes.errors import Refusal, first_line, nearest

SECONDS = 10.0  # of computing, for one conversation
TODAY = date(2024, 7, 26)  # in every template: the day that Llama 3's fall back on
WHY_DATED = "so that a run goes on, and is measured, on another day with the same prompts"
CLOCK = re.compile(r"""\bstrftime_now\(\s*(["'])([^"']*)\1\s*\)""")
# TRL's trainers and transformers know these tags, plain jinja2 does not.
GENERATION = re.compile(r"{%[+-]?\s*(?:end)?generation\s*[+-]?%}")
# What transformers gives to every template.
GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "tools", "documents"}
FILE = "chat_template.jinja"
FAILURES = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
PROBE = "system-7f3a"  # a text that no template writes of itself

Message = dict[str, str]


def bind(tokenizer, kwargs: dict[str, Any], where: str = "model.chat_template_kwargs"):
    """The tokenizer with `kwargs` in every rendering of its template, whoever asks for one: TRL, lm_eval, we; `dated`.

    Args:
        kwargs: by the names that the template reads; None leaves one to the template.
        where: their key, for refusals.

    Raises:
        Refusal: the template reads no such name.
    """
    template = _text(tokenizer)
    given = {key: value for key, value in kwargs.items() if value is not None}
    if given:
        _check(given, template, where)
    if "strftime_now" in template and "date_string" in template and "date_string" not in given:
        given["date_string"] = TODAY.strftime("%d %b %Y")
        _say(f"{where}.date_string: {given['date_string']} in place of today, {WHY_DATED}.")
    if "enable_thinking" in template and "enable_thinking" not in kwargs:
        _say(
            f"{where}: the template lets the model think aloud before it answers, and is not told whether to. Add "
            f"{where}.enable_thinking=false; true, where the answers in the data have thoughts."
        )
    told = copy.copy(tokenizer if "date_string" in given else dated(tokenizer))
    told.apply_chat_template = functools.partial(type(tokenizer).apply_chat_template, told, **given)
    return told


def dated(tokenizer):
    """The tokenizer with `TODAY` in the place of a date that its template asks the clock for."""
    template = _text(tokenizer)
    pinned = CLOCK.sub(lambda call: _literal(TODAY.strftime(call[2])), template)
    if pinned == template:
        return tokenizer
    _say(f"{tokenizer.name_or_path}: its chat template gets {TODAY:%d %b %Y} in place of today, {WHY_DATED}.")
    other = copy.copy(tokenizer)
    other.chat_template = pinned
    return other


def _text(tokenizer) -> str:
    """The template that is rendered, of several the default.

    Raises:
        Refusal: there are several, and none is.
    """
    given = tokenizer.chat_template
    if isinstance(given, dict) and "default" not in given:
        raise Refusal(
            f"{text.line(tokenizer.name_or_path)}: its tokenizer has the chat templates "
            f"{text.line(', '.join(map(str, given)))}, and none is the default. Name one of them default."
        )
    return tokenizer.get_chat_template()


def bound(tokenizer) -> dict[str, Any]:
    """What `bind` has given the tokenizer."""
    return getattr(tokenizer.apply_chat_template, "keywords", {})


def alike(tokenizer, other, prompts: bool = True) -> bool:
    """Whether two tokenizers render a conversation alike, and, with `prompts`, the generation prompt."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    asked = [(turns[:2], False)] + ([(turns[:1], True), (turns, True)] if prompts else [])
    one, two = (
        [render(each, said, add_generation_prompt=begins, tokenize=False) for said, begins in asked]
        for each in (tokenizer, other)
    )
    return one == two


def keep(tokenizer, folder: Path) -> None:
    """Make what the tokenizer was given the default of the template that it has saved in the folder: whoever loads it
    from there renders as it was trained."""
    path, lines = folder / FILE, ""
    for key, value in bound(tokenizer).items():
        lines += f"{{% if {key} is not defined %}}{{% set {key} = {_literal(value)} %}}{{% endif %}}\n"
    if lines:
        path.write_text(lines + path.read_text(encoding="utf-8"), encoding="utf-8")


def as_taken(tokenizer, messages: list[Message]) -> list[Message]:
    """The conversation, `folded` where the template refuses a system turn, or leaves out what it says."""
    from jinja2 import TemplateError

    if messages[0]["role"] != "system":
        return messages
    turns = [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}]
    try:
        takes_it = PROBE in render(tokenizer, turns, add_generation_prompt=True, tokenize=False)
    except TemplateError:
        takes_it = False
    return messages if takes_it else folded(messages)


def folded(messages: list[Message]) -> list[Message]:
    """The conversation with its system text at the head of the first user turn; roles alternate where they did."""
    if messages[0]["role"] != "system":
        return messages
    system, *turns = messages
    if not turns or turns[0]["role"] != "user":
        return [{**system, "role": "user"}, *turns]
    return [{**turns[0], "content": f"{system['content']}\n\n{turns[0]['content']}"}, *turns[1:]]


def render(tokenizer, conversation: list, **kwargs) -> Any:
    """`tokenizer.apply_chat_template`, which ends after `SECONDS`.

    transformers renders in jinja2's sandbox: a template reaches no file and no attribute of Python's, but may loop. A
    rendering is ended in the main thread of a system that has timers; a single operation on a large text is not
    interrupted, nor is the memory limited that it takes.

    Raises:
        Refusal: it takes longer.
        jinja2.TemplateError: it refuses the conversation, or fails: divides by 0, adds a number to a text.
    """
    what = f"the chat template of {text.line(tokenizer.name_or_path)}"
    says = f"{what}: takes more than {SECONDS:g} s for a conversation. Mend it, or choose another model."
    with signals.ended(SECONDS, says):
        try:
            return tokenizer.apply_chat_template(conversation, **kwargs)
        except FAILURES as error:
            from jinja2 import TemplateError

            if isinstance(error, TemplateError | Refusal) or not _in_template(error):
                raise
            raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from error


def encode_prompt(tokenizer, prompt: str | list) -> list[int]:
    """Token ids of a prompt, text or messages, at whose end an answer begins.

    Raises:
        Refusal, jinja2.TemplateError: as `render`.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return render(tokenizer, prompt, add_generation_prompt=True, return_dict=False)


def _in_template(error: Exception) -> bool:
    """Whether the template's own code raised it, which jinja2 shows as a file of this name."""
    return any(frame.filename == "<template>" for frame in traceback.extract_tb(error.__traceback__))


def _check(given: dict[str, Any], template: str, where: str) -> None:
    """Refuse names that the template does not read: they would change nothing.

    Raises:
        Refusal: for the first.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta
    from transformers import PreTrainedTokenizerBase

    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        read = meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template)))
    except TemplateSyntaxError:
        return  # transformers says it, with the first rendering
    own = sorted(name for name in read - GIVEN if not name.endswith("_token"))
    for key in given:
        if key in arguments or key in GIVEN:
            raise Refusal(f"{where}.{key}: is given to every template by the recipes. Take it out.")
        if key not in read:
            reads = f" It reads {', '.join(own)}." if own else ""
            out = f"{where}.{key}=null" if where.startswith("model") else f"{where}={{}}"
            raise Refusal(
                f"{where}.{key}: the chat template reads no such name{nearest(key, own)}{reads} Leave it out: {out}."
            )


def _literal(value: Any) -> str:
    """As jinja2 writes it, which spells true, false and text like JSON."""
    return json.dumps(value, ensure_ascii=False)


@functools.cache
def _say(what: str) -> None:
    """Once a process: a tokenizer is loaded again with its model."""
    print(text.line(what), flush=True)
