"""The page of an audit: complete, self-contained, escaped, the same each time."""

import itertools
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_recipes import stats
from rlhf_recipes.audit import page, verdict
from rlhf_recipes.audit.section import curve, dots, example, examples, figure, grid, lines, section, skipped, table
from rlhf_recipes.stats import Estimate

EVIL = '</svg></style><script>alert("x")</script>&<b>$\\frac$ <|im_end|>'
FAMILIES = ("booking", "triage", "medication", "billing", "consent and records of minors and their guardians", "grief")


def share(p: float, n: int, seed: int = 0) -> Estimate:
    return stats.estimate(np.random.default_rng(seed).random(n) < p)


def nothing(n: int = 0) -> Estimate:
    return Estimate(None, None, None, n)


def number(value: float, spread: float, n: int = 400) -> Estimate:
    return Estimate(value, value - spread, value + spread, n, n)


def counted(value: float, n: int) -> Estimate:
    return Estimate(value, None, None, n, n)


def sections() -> list[dict]:
    """Every kind of figure, plot, table and example that a part may hold."""
    x = [0.0, 0.4, 0.8, 1.2, 1.6, 2.0]
    proxy, gold = [0, 0.5, 0.9, 1.2, 1.45, 1.7], [0, 0.35, 0.52, 0.55, 0.44, 0.2]
    return [
        section(
            "preference",
            "Preference accuracy",
            "Does the reward model prefer the answers that people chose, and does it know more than a simple rule?",
            figures=[
                figure("accuracy", "Accuracy on held-out pairs", share(0.71, 420), unit="%", better="higher",
                       baseline=("the shorter answer", 0.58), says="Share of pairs whose margin is above 0."),
                figure("accuracy_over_length", "Accuracy over the better rule of length",
                       Estimate(0.13, 0.08, 0.18, 420, 420), unit="%",
                       better="higher", baseline=("the rule itself", 0.0)),
                figure("chosen_longer", "Chosen answer is the longer", share(0.42, 420, 1), unit="%",
                       says="Share of pairs; 50 % would say that length carries nothing."),
                figure("shorter_wins", "Accuracy of the shorter answer", share(0.58, 420, 1), unit="%"),
            ],
            plots=[
                dots("Accuracy by family (pairs in brackets)",
                     [(f, share(0.5 + 0.06 * i, 70 - 9 * i, i)) for i, f in enumerate(FAMILIES)]
                     + [("none", nothing())],
                     "pairs ranked as labelled, %", ("the shorter answer", 0.58)),
            ],
            tables=[
                table("By size of the margin", ["Margin", "Accuracy", "Mean length", "Pairs"],
                      [["below 0.5", share(0.55, 140, 3), 23.4, 140], ["0.5 to 1", share(0.7, 140, 4), 21, 140],
                       ["above 1", share(0.92, 140, 5), None, 140]], note="Thirds of the pairs."),
            ],
            examples=[
                examples("The pairs it gets most wrong", [
                    example(f"Pair {i}: margin −2.{i}", [("chosen, reward −1.1", "Take it with food. " * 8),
                            ("rejected, reward 1.0", "Sure! " + "It will be fine. " * 12)], "Family: medication.")
                    for i in range(3)
                ])
            ],
            notes=["With 420 pairs a difference of less than 5 points cannot be seen."],
        ),
        section(
            "calibration", "Calibration", "When it says 80 %, is it right in 80 % of cases?",
            figures=[
                figure("ece", "Calibration error", number(0.061, 0.02), unit="%", better="lower", says="15 bins."),
                figure("error_after", "Calibration error, tempered", number(0.021, 0.015), unit="%", better="lower"),
                figure("brier", "Brier score", number(0.193, 0.011), better="lower", baseline=("a coin", 0.25)),
                figure("slope", "Calibration slope", number(0.74, 0.12)),
            ],
            plots=[
                lines("Reliability", "probability it gives", "share that is right",
                      [curve("as it is", [0.52, 0.6, 0.7, 0.8, 0.95], [0.5, 0.55, 0.66, 0.7, 0.86],
                             [0.42, 0.48, 0.6, 0.62, 0.8], [0.58, 0.62, 0.72, 0.78, 0.92]),
                       curve("temperature 1.31", [0.52, 0.58, 0.66, 0.75, 0.9], [0.5, 0.57, 0.66, 0.74, 0.88]),
                       curve("perfect", [0.5, 1.0], [0.5, 1.0], points=False)]),
            ],
        ),
        skipped("uncertainty", "Uncertainty meter", "Does it know when it does not know?",
                "One reward model has no spread. Train an ensemble with recipes/reward.py reward=ensemble."),
        section(
            "stress", "Stress route", "Does the order of two answers survive a change of the prompt?",
            figures=[
                figure("worst_family", "Worst family: typing errors", share(0.47, 60, 9), unit="%", better="higher",
                       baseline=("a coin", 0.5)),
                figure("accuracy_drop", "Accuracy lost", number(0.12, 0.05, 300), unit="%", better="lower"),
            ],
        ),
        section(
            "probes", "Hacking probes", "Which tricks raise the reward although the answer is no better?",
            figures=[
                figure("worst_probe", "Most successful trick: length padding", share(0.81, 120, 2), unit="%"),
                figure("length_r2", "Reward that length explains", number(0.08, 0.03), better="lower"),
                figure("length_matched_gap", "Accuracy at equal length less all", number(-0.01, 0.06), unit="%"),
            ],
            plots=[dots("How often the edited answer wins", [(f"trick {i}", share(0.1 * i, 60, i)) for i in range(8)],
                        "edited answer wins, %", ("no effect", 0.5))],
        ),
        section(
            "coverage", "Coverage ledger", "Which prompts and answers has the data seen, and which never?",
            figures=[
                figure("cells_covered", "Cells with at least 30 pairs", counted(0.42, 24), unit="%", better="higher"),
                figure("exposure_gap", "Exposure gap", counted(0.31, 800), unit="nats", better="lower"),
                figure("out_of_distribution", "Out of distribution", nothing(), unit="%"),
            ],
            plots=[grid("Pairs by family and style", list(FAMILIES), ["short", "long", "list", "refusal"],
                        [[120, 80, 31, 0], [64, 12, 30, 5], [44, 38, 0, 0], [90, 61, 7, 2], [29, 30, 31, 0],
                         [1234, 0, 0, 0]], 30)],
        ),
        section(
            "consistency", "Consistency", "Can one number for each answer explain the choices?",
            figures=[
                figure("rationalisable", "Prompts without a cycle", share(0.9, 50), unit="%"),
                figure("contradictory_duplicates", "Pairs labelled both ways", counted(0.002, 420), unit="%"),
                figure("cyclic_triads", "Circular triples", nothing(), unit="%", baseline=("random", 0.25)),
            ],
        ),
        section(
            "overoptimisation", "Over-optimisation", "How far can it be optimised before the true quality falls?",
            figures=[
                figure("best_of_n_gap", "Gold lost after its best: clinic", number(0.35, 0.1, 64), unit="sd",
                       better="lower"),
                figure("policy_least_gain", "Gold gained at the end: clinic", nothing(), unit="sd"),
                figure("policy_kept", "Share of the best gold gain left at the end: clinic", nothing(), unit="%"),
            ],
            plots=[
                lines("Best of n: gold and proxy", "√KL, √nats", "mean score",
                      [curve("proxy: the reward model that is audited here", x, proxy, [y - 0.1 for y in proxy],
                             [y + 0.1 for y in proxy]),
                       curve("gold", x, gold, [y - 0.08 for y in gold], [y + 0.08 for y in gold]),
                       curve("fit d(α − βd)", list(np.linspace(0, 2, 60)), list(np.linspace(0, 2, 60) * 0.5),
                             points=False)],
                      [("peak of gold", 1.05), ("keep checkpoint 120", 1.2)]),
            ],
        ),
    ]  # fmt: skip


def audit(parts: list[dict] | None = None, thresholds: dict | None = None) -> dict:
    parts = sections() if parts is None else parts
    decided = verdict.decide(parts, thresholds or {})
    label = [{"prompt": f"Can I take two tablets at once? ({i})", "family": "medication", "why": "the members differ"}
             for i in range(10)]  # fmt: skip
    return {
        "title": "Audit of the clinic reward model",
        "subject": {"Reward model": "outputs/reward/clinic", "Data": "clinic pairs, held out"},
        "counts": {"Pairs": 420, "Prompts": 405, "Reward models": 1},
        "verdict": decided,
        "paragraph": verdict.paragraph(parts, decided, label),
        "sections": parts,
        "label_next": label,
        "settings": {"seed": 17, "resamples": 1000, "data": {"name": "clinic", "split": None}, "rate": math.nan},
    }


def written(found: dict, tmp_path) -> str:
    page.write_page(found, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    return written(audit(), tmp_path_factory.mktemp("audit"))


def plain(html: str) -> str:
    """The words of a piece of the page."""
    html = re.sub(r"<(style|svg)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("\u00a0", " ").split())


def test_verdict_comes_first(report):
    heading = plain(re.search(r"<h1>(.*?)</h1>", report, re.DOTALL)[1])
    assert heading == "! Use with caution: of 26 checks 5 pass, 4 fail, 6 are undecided and 11 were not measured."
    assert (
        report.index("<h1>") < report.index('id="summary"') < report.index('id="checks"') < report.index('id="part-')
    )
    assert "<strong>What to collect next.</strong>" in report


def test_checks_are_listed_worst_first_with_state_value_limit_and_source(report):
    rows = [plain(row) for row in re.findall(r"<tr role=.*?</tr>", report[report.index('id="checks"') :], re.DOTALL)]
    checks = rows[1 : 1 + len(verdict.GATES)]
    states = [
        next(f"{page.SYMBOLS[s]} {s}" for s in verdict.STATES if f"{page.SYMBOLS[s]} {s}" in row) for row in checks
    ]
    order = [f"{page.SYMBOLS[state]} {state}" for state in verdict.STATES]
    assert states == sorted(states, key=order.index) and set(states) == set(order)
    trick = next(row for row in checks if row.startswith("Wins of the most successful trick"))
    assert all(
        part in trick for part in ("80.8 % [73.3, 87.5] n 120", "at most 55 %", "house rule", "Add pairs in which")
    )
    missing = next(row for row in checks if row.startswith("Disagreement of the reward models"))
    assert "Train an ensemble" in missing


def test_every_figure_is_there_with_value_interval_n_and_baseline(report):
    parts = {part["key"]: part for part in sections()}
    for key, part in parts.items():
        section_html = report[report.index(f'id="part-{key}"') :]
        words = plain(section_html[: section_html.index("</section>")])
        assert plain(part["question"]) in words
        for f in part["figures"]:
            assert f.title in words
            if f.estimate.value is not None:
                assert page._estimate(f.estimate, f.unit == "%").partition(" [")[0] in words
            assert f"{f.estimate.n:,}" in words
    words = plain(report)
    assert "Brier score lower is better 0.193 [0.182, 0.204] 400 0.250 a coin" in words
    assert "One reward model has no spread." in words
    assert "– not measured: Out of distribution." in words
    assert "With 420 pairs a difference of less than 5 points cannot be seen." in words


def test_no_number_is_left_unprintable(report):
    assert not re.search(r"\b(nan|inf|None|NaN|Infinity)\b", plain(report))
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', report)


def test_nothing_is_loaded_from_elsewhere(report):
    loading = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", report)
    assert all(target.startswith("#") for target in loading)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", report)


def test_links_lead_somewhere_and_ids_are_unique(report):
    ids = re.findall(r' id="([^"]+)"', report)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r' href="#([^"]+)"', report)) | set(re.findall(r'labelledby="([^"]+)"', report)) <= set(ids)


def test_headings_do_not_skip_a_level(report):
    levels = [int(level) for level in re.findall(r"<h(\d)", report)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


class Balance(HTMLParser):
    """Fails where tags do not close in order; what is open is left in `open`."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def balanced(html: str) -> bool:
    parser = Balance()
    parser.feed(html)
    parser.close()
    return parser.open == []


def test_a_screen_reader_finds_its_way(report):
    assert balanced(report)
    assert report.startswith('<!doctype html>\n<html lang="en">')
    assert all(f"<{tag}" in report for tag in ("header", "main", "nav aria-labelledby"))
    assert all('scope="' in tag for tag in re.findall(r"<th(?![a-z])[^>]*>", report))
    figures = re.findall(r"<figure>.*?</figure>", report, re.DOTALL)
    assert len(figures) == 4
    assert all(re.search(r'role="img" aria-label="[^"]{60,}"', figure) for figure in figures)
    assert "gold: 0.000: 0.000 [−0.080, 0.080]" in report and "peak of gold at 1.05" in report
    assert "booking 50.0 % [" in report


def test_thin_cells_of_a_grid_say_so_in_words(report):
    words = plain(re.search(r'<table class="grid">.*?</table>', report, re.DOTALL)[0])
    assert "12 of 24 cells have at least 30, 5 have fewer, 7 none." in words
    assert "booking 120 80 31 0 none" in words and "triage 64 12 few 30 5 few" in words and "1,234" in words


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "<|im_start|>system\nsay yes\x00\x1b[31m\x85",
        "w" * 4000,
        "לא \u202e abc " * 20,
        "\ud800 lone",
        "_",
        "",
        "$x_1$",
    ],
)
def test_hostile_text_stays_text(text, tmp_path):
    parts = [
        section(
            text or "empty", text, text,
            figures=[figure("a", text, share(0.6, 50), unit=text, baseline=(text, 0.5), says=text)],
            tables=[table(text, [text, text], [[text, text], [text, share(0.5, 9)]], text)],
            plots=[dots(text, [(text, share(0.5, 9)), (text, share(0.4, 9))], text, (text, 0.5)),
                   lines(text, text, text, [curve(text, [0, 1], [0, 1]), curve(text, [0, 1], [1, 0])], [(text, 0.5)]),
                   grid(text, [text], [text], [[3]], 30)],
            examples=[examples(text, [example(text, [(text, text)], text)])], notes=[text],
        ),
        skipped("b", text, text, text),
    ]  # fmt: skip
    found = audit(parts) | {"title": text, "subject": {text: text}, "counts": {text: 3}, "settings": {text: [text]}}
    found["label_next"] = [{"prompt": text, "family": text, "why": text}]
    found["paragraph"] = verdict.paragraph(parts, found["verdict"], found["label_next"])
    html = written(found, tmp_path)
    assert "<script" not in html and "<b>" not in html and "</svg></style>" not in html
    assert balanced(html)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", html)
    if text == EVIL:
        assert "&lt;script&gt;" in html


def test_long_lists_and_texts_are_cut_and_the_page_stays_small(tmp_path):
    long = "An answer that goes on and on. " * 400
    rows = [example(f"Pair {i}", [("chosen", long), ("rejected", long)], "note") for i in range(200)]
    names = [(f"family {i}", share(0.5, 30, i)) for i in range(90)]
    part = section(
        "preference", "Preference", "?", figures=[], examples=[examples("All", rows)],
        plots=[dots("Names", names, "x")], tables=[table("Many", ["a", "b"], [[f"row {i}", i] for i in range(500)])],
    )  # fmt: skip
    html = written(audit([part]), tmp_path)
    assert len(html.encode()) < 500_000
    assert f"The first {page.SHOWN_EXAMPLES} of 200." in html and "more characters)" in html
    assert html.count("<details>") == page.SHOWN_EXAMPLES
    assert f"the first {page.DRAWN_ROWS} of 90" in html and f"The first {page.SHOWN_ROWS} of 500 rows." in html


@pytest.mark.parametrize(
    "plot",
    [
        dots("none", [], "x"),
        dots("none", [("a", nothing())], "x"),
        lines("none", "x", "y", []),
        lines("none", "x", "y", [curve("a", [], [])]),
        lines("none", "x", "y", [curve("a", [0.0, math.nan], [math.nan, 1.0])]),
        grid("none", [], [], [], 30),
    ],
)
def test_an_empty_plot_is_left_out(plot, tmp_path):
    html = written(audit([section("preference", "Preference", "?", figures=[], plots=[plot])]), tmp_path)
    assert "<figure>" not in html and 'class="grid"' not in html and balanced(html)


def test_points_without_a_number_are_left_out_of_a_curve(tmp_path):
    bad = curve("a", [0.0, 1.0, 2.0], [0.5, math.inf, 0.7], [0.4, 0.1, math.nan], [0.6, 0.2, 0.9])
    part = section("preference", "P", "?", figures=[], plots=[lines("c", "x", "y", [bad], [("end", math.nan)])])
    assert "a: 0.000: 0.500, 2.00: 0.700." in written(audit([part]), tmp_path)


def test_two_plots_that_are_alike_do_not_share_ids(tmp_path):
    plots = [dots("same", [("a", share(0.5, 30))], "x")] * 2
    parts = [section(key, key, "?", figures=[], plots=plots) for key in ("preference", "stress")]
    ids = re.findall(r' id="([^"]+)"', written(audit(parts), tmp_path))
    assert len(ids) == len(set(ids))


def test_nothing_measured_still_makes_a_page(tmp_path):
    html = written(audit([]) | {"label_next": [], "subject": {}, "counts": {}, "settings": {}}, tmp_path)
    assert "Do not trust it yet: of 26 checks none passes, none fails and 26 were not measured." in plain(html)
    off = dict.fromkeys(verdict.THRESHOLDS)
    assert "every check is switched off" in plain(written(audit([], off), tmp_path))


def test_the_same_audit_gives_the_same_page(report, tmp_path):
    assert written(audit(), tmp_path) == report
