"""Text that others wrote, made harmless for the place where it is shown: a terminal, one line of it, Markdown."""

import html
import re

# C0 and C1 but for tab and line feed; marks that turn the direction of what follows; half of a surrogate pair.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
# `_` within a word means nothing.
MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def shown(text: object) -> str:
    """For a terminal or a page: control characters as the pictures of what they are (ESC is ␛), lines as they are."""
    return CONTROL.sub(_picture, str(text).replace("\r\n", "\n"))


def line(text: object) -> str:
    """The same on one line."""
    return shown(LINE_ENDS.sub(" ", str(text)))


def markdown(text: object) -> str:
    """For a paragraph, a heading or a table cell of a card: one line in which nothing is markup, HTML or a link."""
    plain = MARKDOWN.sub(r"\\\g<0>", html.escape(line(text), quote=False))
    return re.sub(r"^([#>+-]|\d+[.)])(?=\s)", r"\\\1", plain.replace("://", "&#58;//").replace("www.", "www&#46;"))


def code(text: object) -> str:
    """For a card, between two backticks in a table cell."""
    return line(text).replace("`", "'").replace("|", "\\|")


def _picture(character: re.Match) -> str:
    code = ord(character[0])
    if code > 0x9F:
        return "\ufffd"
    return "\u2421" if code == 0x7F else chr(0x2400 + code % 0x80)
