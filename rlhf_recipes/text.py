"""Text that others wrote, made harmless for the place where it is shown: a terminal, a page, a card, a spreadsheet."""

import html
import re

# C0 and C1 but for tab and line feed; marks that turn the direction of what follows; half of a surrogate pair.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
# `_` within a word means nothing. `$` begins a formula on the Hub.
MARKDOWN = re.compile(r"[`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
BLOCK = re.compile(r"^(?:\d{1,9}(?=[.)](?:\s|$))|(?=[#=+-]))")  # an item of a list, a heading, a rule
# Renderers make links of bare addresses, some of them after they have read the entities: WORD JOINER, which is not
# seen, keeps the parts of one apart.
JOINER = "\u2060"
ADDRESS = re.compile(r"(?=://)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)
FORMULA = tuple("=+-@＝＋－＠")


def shown(text: object) -> str:
    """For a terminal or a page: control characters as the pictures of what they are (ESC is ␛), lines as they are."""
    return CONTROL.sub(_picture, str(text).replace("\r\n", "\n"))


def line(text: object) -> str:
    """The same on one line."""
    return shown(LINE_ENDS.sub(" ", str(text)))


def markdown(text: object) -> str:
    """For a paragraph, a heading or a table cell of a card: one line in which nothing is markup, HTML or a link."""
    plain = html.escape(line(text).strip(), quote=False).replace("\\", "&#92;")
    return BLOCK.sub(r"\g<0>\\", ADDRESS.sub(JOINER, MARKDOWN.sub(r"\\\g<0>", plain))) or "–"


def code(text: object) -> str:
    """For a card, between two backticks, in a table cell too: there a pipe needs an odd number of backslashes."""
    return re.sub(r"(?<!\\)(\\*+)\|", r"\1\1\\|", line(text).replace("`", "'")) or "–"


def cell(value: object) -> object:
    """For a CSV file: text in one line that no spreadsheet takes for a formula; what is no text as it is."""
    if not isinstance(value, str):
        return value
    plain = line(value)
    return f"'{plain}" if plain.lstrip().startswith(FORMULA) and not _is_number(plain) else plain


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _picture(character: re.Match) -> str:
    code = ord(character[0])
    if code > 0x9F:
        return "\ufffd"
    return "\u2421" if code == 0x7F else chr(0x2400 + code % 0x80)
