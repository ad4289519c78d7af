"""What is done to text of others before it is shown: by hand for the rules, by a renderer for Markdown."""

import re
import time

import pytest
from conftest import rendered

from rlhf_recipes import text

ESC, BEL, CSI = "\x1b", "\x07", "\x9b"
# What a terminal obeys: title, clipboard, clear, colour, the one-byte CSI, backspace over what was printed.
TERMINAL = f"{ESC}]0;pwned{BEL}{ESC}]52;c;cm0gLXJm{BEL}{ESC}[2J{ESC}[1;1H{ESC}[31m{CSI}2Kok\b\b{ESC}P1{ESC}\\"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BIDI = "\u202eevil\u202c \u2066x\u2069 \u200f\u061c"
HALF = "\ud83d half"
# What Markdown obeys: of each what it would make.
MARKDOWN = (
    "[click](http://evil.example)", "![x](http://evil.example/x.png)", "<img src=x onerror=alert(1)>", "<b>bold</b>",
    "<http://evil.example>", "http://evil.example/a", "HTTPS://evil.example", "www.evil.example", "WWW.evil.example",
    "ftp://evil.example", "mail evil@evil.example", "mailto:evil@evil.example", "[a]: http://evil.example", "[a][b]",
    "*em*", "**strong**", "_em_", "__strong__", "***", "---", "===", "# Title", "## Title", "> quote", "- item",
    "+ item", "* item", "1. item", "2) item", "1.", "-", "    code", "\tcode", "`code`", "``` fence", "~~~ fence",
    "~~gone~~", "a | b", "\\| [x](http://evil.example)", "\\", "\\\\", "\\[x](http://evil.example)", "&lt;b&gt;",
    "&#60;b&#62;", "a\\\n# Title", "x\n\n# Title", "x\r# Title", "x\u2028# Title", "x\n---\n",
    "$$\\href{http://evil.example}{x}$$", "\\(x\\)", "<!-- x", "--> x", "<details><summary>", "</td></table>",
    "[x]\\(y)", "!\\[x](y)", "<a\nhref=x>",
)  # fmt: skip


@pytest.mark.parametrize("hostile", [TERMINAL, BIDI, HALF, "a\rb", "a\r\nb\n\tc"])
def test_a_terminal_obeys_nothing(hostile):
    plain = text.shown(hostile)
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", plain
    )
    assert plain.encode("utf-8") and len(plain) == len(hostile) - hostile.count("\r\n")
    assert text.shown(plain) == plain


def test_shown_by_hand():
    assert text.shown("\x1b[31m\x00\x7f\x9b") == "␛[31m␀␡␛"
    assert text.shown("a\r\nb\n\tc \u202ed \ud800") == "a\nb\n\tc \ufffdd \ufffd"
    assert text.shown("Grüße, 你好 🙂 – naïve\u200d") == "Grüße, 你好 🙂 – naïve\u200d"
    assert text.shown(None) == "None" and text.shown(3) == "3" and text.shown({"a": "\x1b"}) == "{'a': '\\x1b'}"


def test_a_line_is_one_line():
    for end in ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\n\n"):
        assert text.line(f"a{end}b") == "a b", repr(end)
    assert len(text.line(TERMINAL + MARKDOWN[0]).splitlines()) == 1


@pytest.mark.slow
def test_long_texts_take_no_time():
    for hostile in ("x" * 500_000, "\x1b" * 300_000, "\r\n" * 300_000, "_" * 300_000, "9" * 300_000 + ".",
                    "\\" * 300_000, "://" * 100_000, "www." * 100_000, "@" * 300_000):  # fmt: skip
        for make in (text.shown, text.line, text.markdown, text.code, text.cell):
            begin = time.process_time()
            make(hostile)
            assert time.process_time() - begin < 2, (make, hostile[:8])


@pytest.mark.parametrize("hostile", MARKDOWN)
@pytest.mark.parametrize("place", ["{}", "before {} after", "**{}**", "# {}", "- {}"])
def test_markdown_makes_nothing_of_it(hostile, place):
    """What is rendered has the elements that a plain word has there, and says what was typed."""
    source = place.format(text.markdown(hostile))
    page, plain = rendered(source), rendered(place.format("word"))
    assert page.tags == plain.tags, source
    assert page.text.replace(text.JOINER, "").split() == place.strip("#*- ").format(hostile).split()
    assert not page.autolinks, source


@pytest.mark.parametrize("hostile", MARKDOWN)
@pytest.mark.parametrize("make", [text.markdown, lambda each: f"`{text.code(each)}`"])
def test_a_cell_of_a_table_stays_one(hostile, make):
    source = f"| a | b | c |\n| --- | --- | --- |\n| one | {make(hostile)} | three |\n"
    page = rendered(source)
    assert page.tags == rendered(source.replace(make(hostile), make("word"))).tags, source
    assert page.cells[0] == ["a", "b", "c"] and page.cells[1][0] == "one" and page.cells[1][2] == "three"
    # GitHub's parser takes the pipe of `\\|` for the end of the cell: one that ends none has an odd number before it.
    cell = make(hostile)
    assert all(len(run) % 2 for run in re.findall(r"(\\*)\|", cell)), cell


def test_markdown_by_hand():
    assert text.markdown("org/model-1_b v1.5 (q8), 50 % & more") == "org/model-1_b v1.5 (q8), 50 % &amp; more"
    assert text.markdown("1.5 points, -3, a_b, #1 of 2") == "1.5 points, -3, a_b, #1 of 2"
    assert text.markdown("<b>|[x]`") == r"&lt;b&gt;\|\[x\]\`"
    assert text.markdown("see https://a.b") == f"see https{text.JOINER}://a.b"
    assert text.code("a|b `c`") == r"a\|b 'c'" and text.code("a\\|b") == r"a\\\|b" and text.code("a\nb") == "a b"
    assert text.code("") == text.markdown("") == "–"


def test_a_cell_of_a_spreadsheet_is_no_formula():
    for formula in ("=1+1", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "=", "＝1"):
        assert text.cell(formula).startswith("'"), formula
    for plain in ("-0.5", "+3", "1e-5", "-1e-5", "word", "a=b", "", "-inf"):
        assert text.cell(plain) == plain
    assert text.cell(-0.5) == -0.5 and text.cell(None) is None
    assert text.cell("a\nb\x1b") == "a b␛"
