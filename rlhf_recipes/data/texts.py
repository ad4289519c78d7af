r"""Text that is not what it seems: messages written as text, prompts repeated in answers, transcripts, rendered templates.

    reading = look(sample)            # the first few hundred rows of a source: how its texts are read
    found = reading.read(raw, where)  # every row: a Raw (the same object where nothing is to do), or a Drop
    reading.refuse_if_most(source)    # after the last row
    reading.lines()                   # what was read as what; what was left as text, and how often

A source is read in one way, decided by what most of its looked-at rows hold, so that one odd row means what it did:

| most rows hold                                            | what happens                                          |
| --------------------------------------------------------- | ----------------------------------------------------- |
| message lists as JSON, Python's or numpy's repr           | parsed; the spelling of their messages is the caller's |
| lists of texts as JSON, in the prompt and every answer    | their turns, or the text where each has one           |
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

import ast
import json
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_recipes.data.tokens import TEMPLATE_MARKER
from rlhf_recipes.errors import Refusal

LOOKED_AT = 300  # rows
LONG = 100_000  # characters: longer rows are read, but do not decide
LITERAL_LIMIT = 2**20  # characters of a list in Python's notation, whose parser takes a hundred times their memory
FEW = 3  # words of an answer that may be a label

Messages = list[dict[str, Any]]
Text = str | Messages | None


@dataclass(frozen=True)
class Raw:
    """One row after its columns are mapped.

    Attributes:
        prompt: text, messages, or None where the answers are whole conversations.
        answers: text or messages each.
    """

    prompt: Text
    answers: tuple[Text, ...]


@dataclass(frozen=True)
class Drop:
    """Why a row gives no example: the name of the reason, and what of the row it is."""

    reason: str
    detail: str
