"""What makes a reply, a critique or a pair unfit to train on: cheap rules, each of which is counted.

The rules come from what went wrong elsewhere: revisions that open with "Sure, here is", closers that a small model
copies into everything, critiques handed in as revisions, pairs of two refusals (Razin et al. 2024, arXiv:2410.08847).
"""

import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache

from omegaconf import DictConfig

from rlhf_recipes.cai.prompt_templates import MARKER, visible
from rlhf_recipes.text_metrics import PHRASE_REPEATS, jaccard, ngrams, refuses, words

_REVISED = "new|final|revised|rewritten|improved|corrected|edited|updated|better|reworded|rephrased"
_REPLY = "reply|response|answer|version|revision|rewrite"
# A first line that only announces the reply: "Sure! Here is the revised reply:", "**Revised version:**", "Reply:".
# What is written for the person ("Here is a reply you can send:", "Short answer: no.") is the reply itself.
PREAMBLE = re.compile(
    r"\A[\s*_#-]*"
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely|understood|thanks|thank you)\b[^\n:]{0,40}?[,.!-]+\s*)?"
    r"(?:(?:(?:as requested|based on [^\n:,]{0,60}),\s*)?(?:here(?:['’]s| is)|below is|the following is|this is)\b"
    rf"(?![^\n:]*\byou (?:can|could|may|might)\b)[^\n:]{{0,60}}\b(?:{_REPLY}|(?:{_REVISED}) (?:one|draft|message))\b"
    r"[^\n:]{0,60}(?:\**:|[.!]?\**\s*\n)|"
    rf"(?:(?:my|the|your|a|{_REVISED}) )*(?:{_REPLY})\**\s*:)\**\s*",
    re.IGNORECASE,
)
# Speaks about the task, or is a critique where a reply is due.
META = re.compile(
    r"\b(?:the (?:previous|original|first|revised|given|above) (?:reply|response|answer)|"
    r"the assistant(?:['’]s)? (?:reply|response|answer)|as an? (?:editor|critic)|(?:this|the|your) critique|"
    r"(?:this|my|the) (?:revision|revised version|rewritten version)|"
    r"i(?:['’]ve| have) (?:revised|rewritten|reworded|rephrased|edited)|"
    r"the (?:reply|response) (?:is|was|does|did|should|could|fails|lacks|gives|ignores|leaves|sounds|needs)|"
    r"write the reply alone|quoted line by line|answer with the letter)\b",
    re.IGNORECASE,
)
ROLE_LEAK = re.compile(
    r"^\W{0,4}(?:human|user|person|assistant|system|critique ?request|revision ?request|critique|revision|task|"
    r"conversation|reply(?: [ab])?|options)\**\s*:|(?-i:\b(?:Human|Assistant): )|^> |" + MARKER.pattern,
    re.IGNORECASE | re.MULTILINE,
)
# Phrases that address a judge, or imitate the question that it is asked. The letters A and B: as capitals alone. The
# first begin with a word, so most places of a text are passed over by one look.
INJECTED_WORDS = (
    r"(?:ignore|disregard|forget)\b.{0,40}\b(?:instruction|prompt|rule|above|previous)",
    r"(?:choose|select|pick|prefer|vote for|print|say)\b[^.\n]{0,30}\b(?:this (?:reply|answer)|(?-i:[AB]))\b",
    r"(?:this|other|first|second|best|better|which|two) (?:reply|replies|response|responses)\b",
    r"(?:the|a|second) judge\b|(?:grader|evaluator|verdict)\b|system (?:message|prompt|notice|override)\b",
    r"(?:reply|replies|response|option|letter|better:|winner:) (?-i:[ABC])\b|options?\s*:",
    r"(?:answer|antwort)\b(?: is| ist)?\W{0,6}(?:[(\[\"]|(?-i:[AB]\b))",
    r"(?-i:[AB]\s(?:\b[AB]\s){3})|(?:decode|rot13)\b|0x[0-9a-f]{16}",
)
INJECTED_SIGNS = (
    r"^[^\w\n]{0,8}(?:human|user|assistant|system|judge)\b[^\n:]{0,20}(?::|$)",
    r"(?-i:[(\[]\s*[AB]\s*[)\]])",
    r"\"(?:role|winner|choice|verdict)\"\s*:|\{[{%]|\$\{|\{\w*\} \{",
    r"(?:%[0-9a-f]{2}){4}|&(?:#\d+|lt);",
    r"<\s*\|[^|\n]{1,30}\|\s*>|" + MARKER.pattern,
)
INJECTION = re.compile(
    rf"\b(?:{'|'.join(INJECTED_WORDS)})|{'|'.join(INJECTED_SIGNS)}", re.IGNORECASE | re.DOTALL | re.MULTILINE
)
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]\ufe0f?")
EMOJI_RUN = re.compile(rf"(?:{EMOJI.pattern}\s*){{3}}")
STUCK = re.compile(r"([^\W\d_]|[!?])\1{9}")  # "nooooooooooo"


def strip_preamble(text: str) -> str:
    """The text without a first line that only announces it, and without quotation marks around the whole."""
    stripped = PREAMBLE.sub("", text, count=1).strip()
    for begin, end in ('""', "“”"):
        inside = stripped[1:-1]
        if len(stripped) > 1 and stripped[0] == begin and stripped[-1] == end and not {begin, end} & set(inside):
            stripped = inside.strip()
    return stripped


def unfit_reply(text: str, finished: bool, limits: DictConfig) -> str | None:
    """Why a reply is not fit to be learned or compared, or None."""
    count = len(words(text))
    if not finished:
        return "truncated"
    if not limits.min_words <= count <= limits.max_words:
        return "length"
    if ROLE_LEAK.search(text):
        return "role_leak"
    if META.search(text) or PREAMBLE.match(text):
        return "preamble"
    if degenerates(text):
        return "repetition"
    if not text.isascii() and (EMOJI_RUN.search(text) or len(EMOJI.findall(text)) > 0.02 * count + 1):
        return "repetition"
    return None


def degenerates(text: str) -> bool:
    """It repeats a phrase, fewer than half of its sequences of four words are different, or a letter is stuck."""
    grams = Counter(ngrams(text, 4))
    often = max(grams.values(), default=0) >= PHRASE_REPEATS
    return often or len(grams) < 0.5 * grams.total() or STUCK.search(text) is not None


def unfit_revision(before: str, critique: str, revision: str) -> str | None:
    """Why a revision changes nothing or is no reply, or None."""
    if jaccard(before, revision) >= 0.95:
        return "no_op"
    if critique and jaccard(critique, revision) >= 0.6:
        return "critique_copied"
    return None


def unfit_pair(first: str, second: str, limits: DictConfig) -> str | None:
    """Why two replies, each fit, make no pair, or None."""
    if jaccard(first, second) >= 0.95:
        return "no_op"
    if refuses(first) and refuses(second):
        return "both_refuse"
    sizes = [max(len(words(text)), 1) for text in (first, second)]
    if abs(math.log(sizes[0] / sizes[1])) > math.log(limits.max_length_ratio):
        return "length_imbalance"
    return None


def speaks_to_judge(*texts: str) -> bool:
    """Whether any of the texts has a phrase that could be meant for a judge, as it stands or without disguise."""
    return any(map(_speaks, texts))


@lru_cache(256)  # a prompt is asked about once for each pair of its replies
def _speaks(text: str) -> bool:
    plain = unicodedata.normalize("NFKC", visible(text))
    return any(INJECTION.search(spelling) for spelling in {text, plain})


def closer(text: str) -> str | None:
    """The last sentence in lower case, of four words and more: what a model repeats when it has learned a phrase."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    last = " ".join(words(sentences[-1])) if len(sentences) > 1 else ""
    return last if last.count(" ") >= 3 else None
