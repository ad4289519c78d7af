"""In a real browser: people label by keyboard, and no page of ours runs, asks or fetches what others wrote into it."""

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed (Debian: apt-get install chromium)"),
]
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
HOSTILE = (
    '"><script>alert("s")</script><img src=http://example.invalid/i.png onerror=alert("i")>'
    "<svg/onload=alert('v')><a href='javascript:alert(1)'>x</a>[y](javascript:alert(2)) ![z](http://example.invalid/z.png)"
    "</style></title></textarea><iframe src=http://example.invalid></iframe><b onmouseover=alert('b')>"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def watched(browser, address: str):
    """A page on which nothing may happen but requests to its own address."""
    context = browser.new_context()
    opened, faults = context.new_page(), []
    own = address.partition("?")[0]

    def asked(route):
        if route.request.url.startswith((own, "data:")):
            return route.continue_()
        faults.append(route.request.url)
        return route.abort()

    opened.route("**/*", asked)
    opened.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    opened.on("popup", lambda other: faults.append(f"popup {other.url}"))
    opened.goto(address)
    yield opened
    opened.wait_for_timeout(50)
    context.close()
    assert not faults, faults


def acting(opened) -> list[str]:
    """Elements that run or fetch something, and are none of ours."""
    return opened.evaluate(
        """() => [...document.querySelectorAll("*")].filter((each) =>
            [...each.attributes].some((a) => a.name.startsWith("on") || /^\\s*javascript:/i.test(a.value) ||
                (["src", "href", "action", "formaction", "xlink:href"].includes(a.name)
                 && !/^(#|data:,|\\/(choose|undo|finish)?$)/.test(a.value)))
            || (each.tagName === "SCRIPT" && !each.nonce) || /^(IFRAME|OBJECT|EMBED|IMG)$/.test(each.tagName)
        ).map((each) => each.outerHTML.slice(0, 200))"""
    )


def hostile_evaluation(folder: Path) -> None:
    from test_others_text import hostile_measurements

    from rlhf_recipes.evaluation import page, summary

    page.write_page(summary.summarise(hostile_measurements(HOSTILE)), folder / "report.html")


def hostile_audit(folder: Path) -> None:
    from test_audit_page import audit, dots, example, examples, figure, grid, section, share, table

    from rlhf_recipes.audit import page

    said = HOSTILE
    part = section(
        said, said, said, figures=[figure("a", said, share(0.6, 50), unit=said, baseline=(said, 0.5), says=said)],
        tables=[table(said, [said], [[said]], said)], notes=[said],
        plots=[dots(said, [(said, share(0.5, 9))], said, (said, 0.5)), grid(said, [said], [said], [[3]], 30)],
        examples=[examples(said, [example(said, [(said, said)], said)])],
    )  # fmt: skip
    found = audit([part]) | {"title": said, "subject": {said: said}, "settings": {said: [said]}}
    found["label_next"] = [{"prompt": said, "family": said, "why": said}]
    page.write_page(found, folder / "report.html")


def hostile_cards(folder: Path) -> None:
    """As a viewer without a sanitizer of its own would show them."""
    from markdown_it import MarkdownIt
    from test_others_text import config_of, pairs_of, result_of

    from rlhf_recipes.cai import report
    from rlhf_recipes.training import card

    cards = [card.write(result_of(HOSTILE, "dpo"), config_of(HOSTILE)), report.card(pairs_of(HOSTILE))]
    html = "\n".join(MarkdownIt("gfm-like", {"linkify": False}).render(each.partition("\n---\n")[2]) for each in cards)
    links = re.sub(r'href="https?://[^"]*"', 'href="#"', re.sub(r'<img src="(curves|funnel)\.png"[^>]*>', "", html))
    (folder / "report.html").write_text(f"<!doctype html><meta charset=utf-8>{links}", encoding="utf-8")


def test_what_acts_is_noticed(browser, tmp_path):
    (tmp_path / "report.html").write_text(f"<!doctype html>{HOSTILE}")
    with pytest.raises(AssertionError) as noticed, watched(browser, (tmp_path / "report.html").as_uri()) as opened:
        assert len(acting(opened)) >= 5
    assert all(each in str(noticed.value) for each in ("dialog s", "dialog v", "http://example.invalid/i.png"))


@pytest.mark.parametrize("make", [hostile_evaluation, hostile_audit, hostile_cards])
def test_what_others_wrote_is_text_on_every_page(make, browser, tmp_path):
    make(tmp_path)
    with watched(browser, (tmp_path / "report.html").as_uri()) as opened:
        assert acting(opened) == []
        for each in opened.locator("summary").all():
            each.click()
        for each in opened.locator("a[href^='#']").all()[:5]:
            each.click()
        assert "alert(" in opened.locator("body").inner_text()


def test_ten_pairs_by_keyboard_a_kill_another_person_and_what_it_made(browser, tmp_path, start_recipe, light_python):
    from test_label import address, kill, lines, read

    from rlhf_recipes.audit import judgements

    rows = [{"prompt": f"{n} {HOSTILE}", "first": f"good {n}", "second": f"{HOSTILE} {n}"} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("label", "pairs=a.jsonl", "twice=0.1", "swapped=0.1")
    folder = tmp_path / "outputs" / "label" / "main"

    def better(opened) -> str:
        return "1" if "good" in opened.locator(".replies .text").first.inner_text() else "2"

    def press(opened, key: str) -> None:
        before = opened.title()
        opened.keyboard.press(key)
        opened.wait_for_function("before => document.title !== before", arg=before)

    first = start_recipe(*command, "annotator=anna", cwd=tmp_path, python=light_python)
    with watched(browser, address(first)) as opened:
        assert opened.title().startswith("1 of 12") and "token" not in opened.url and acting(opened) == []
        opened.keyboard.press("n")
        opened.keyboard.type("1 = clear")  # keys of a note are no choice
        opened.keyboard.press("Escape")
        for _ in range(4):
            press(opened, better(opened))
        press(opened, "=")
        press(opened, "u")
        press(opened, "s")
        assert opened.title().startswith("6 of 12")
    assert lines(folder / "choices.jsonl")[0]["note"] == "1 = clear"
    kill(tmp_path, first)
    second = start_recipe(*command, "annotator=[anna,ben]", cwd=tmp_path, python=light_python)
    told = [address(second), address(second)]
    with watched(browser, told[0]) as opened:
        assert opened.title().startswith("6 of 12")
        while opened.title() != "All labelled":
            press(opened, better(opened))
        opened.keyboard.press("Enter")
        opened.wait_for_selector("text=Thank you.")
    with watched(browser, told[1]) as opened:
        while opened.title() != "All labelled":
            opened.get_by_role("button", name="Reply 1").click()
            opened.wait_for_load_state()
        opened.get_by_role("button", name="Finish").click()
        opened.wait_for_selector("text=Thank you.")
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert re.search(r"anna: chose in 1\d, 0 ties, [12] skipped; the same choice again 100\.0 %", out)
    assert re.search(r"ben: .*with the places changed 0\.0 % .*; the left one 100\.0 %", out)
    assert "anna and ben: the same choice" in out
    told = judgements.load(str(folder / "judgements.jsonl"))
    assert {each["judge"] for each in told} == {"anna", "ben"}
    assert all(each["p"] == 1.0 for each in told if each["judge"] == "anna")
    splits = read(folder / "preferences.jsonl")
    assert {row["chosen"][0]["content"][:4] for row in (*splits.train, *splits.test)} <= {"good", HOSTILE[:4]}


def test_a_page_of_somebody_else_changes_nothing(browser, tmp_path, start_recipe, light_python):
    """It is shown by the same browser, which has the cookie, and posts a form to the page's address."""
    from test_label import address, answers, write_rows

    write_rows(tmp_path / "a.jsonl", *answers(3))
    process = start_recipe("label", "pairs=a.jsonl", cwd=tmp_path, python=light_python)
    told = address(process)
    context = browser.new_context()
    own = context.new_page()
    own.goto(told)
    item = own.locator("input[name=item]").first.get_attribute("value")
    form = f"<form method=post action='{told.partition('?')[0]}choose'><input name=item value='{item}'>"
    other = context.new_page()
    other.route(
        "http://evil.invalid/", lambda route: route.fulfill(
            content_type="text/html", body=f"{form}<input name=place value=left></form>"
            f"<iframe src='{told.partition('?')[0]}'></iframe>"),
    )  # fmt: skip
    other.goto("http://evil.invalid/")
    assert "Which reply" not in "".join(frame.content() for frame in other.frames[1:])
    other.evaluate("document.forms[0].submit()")
    other.wait_for_url("**/choose")
    assert "Open the address that the command has printed." in other.content()
    own.reload()
    assert "0 of " in own.locator("header").inner_text()
    context.close()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
