"""The page and the curves: complete, self-contained, escaped."""

import re
from html.parser import HTMLParser

import pytest
from test_evaluation_summary import by_ensemble, by_hand, fake, steps, with_tasks

from rlhf_recipes import stats
from rlhf_recipes.evaluation import checkpoints, fixed_answers, page, summary
from rlhf_recipes.training.curves import _series, plot_curves

EVIL = '<script>alert("x")</script>&<b>$\\frac$'


def written(evaluation, tmp_path) -> str:
    page.write_page(evaluation, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    return written(summary.summarise(fake()), tmp_path_factory.mktemp("page"))


def test_verdict_comes_first_in_a_sentence(report):
    heading = re.sub(r"<[^>]+>", "", re.search(r"<h1>(.*?)</h1>", report, re.DOTALL)[1])
    assert heading == "✓ Ship dpo: better than base, and within every limit."
    assert report.index("<h1>") < report.index("<table>")


def test_every_verdict_has_a_headline():
    for decision, standing in page.SAYS:
        evaluation = {"parent": "base", "recommended": "dpo"}
        evaluation["systems"] = {"dpo": {"verdict": {"verdict": decision, "standing": standing}}}
        assert "dpo" in page._headline(evaluation) and "base" in page._headline(evaluation)


def test_numbers_have_intervals_and_marks_in_words(report):
    cell = re.search(r"Win rate against the parent.*?</tr>", report, re.DOTALL)[0]
    assert all(part in cell for part in ("72.5", "[64.2, 80.0]", "n 120", "✓ better"))
    assert "✗ worse" in report


def test_nothing_is_loaded_from_elsewhere(report):
    loading = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", report)
    assert all(target.startswith(("#", "data:")) for target in loading)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", report)


def test_nothing_is_run_or_fetched_where_it_is_published(report, tmp_path):
    from rlhf_recipes.publish import contents, scan

    for html in (
        "<script>x()</script>", "<svg onload='x()'></svg>", "<a href=' javascript:x()'>a</a>", "<img src='//x.com/a'>",
        "<link href='https://x.com/a.css'>", "<iframe></iframe>", "<image xlink:href='http://x.com/a.svg'/>",
    ):  # fmt: skip
        (tmp_path / "evaluation.html").write_text(html)
        with pytest.raises(ValueError, match=r"^evaluation.html: holds .*, as no page of ours does\."):
            scan.files(tmp_path, False, {}, contents.hashes(tmp_path))
    (tmp_path / "evaluation.html").write_text(report)
    scan.files(tmp_path, True, {}, contents.hashes(tmp_path))


def test_every_figure_is_described_and_ids_are_unique(report):
    figures = re.findall(r"<figure>.*?</figure>", report, re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        assert re.search(r'role="img" aria-label="[^"]{40,}"', figure)
        assert page.INK not in figure and "currentColor" in figure
    ids = re.findall(r' id="([^"]+)"', report)
    assert len(ids) == len(set(ids))


def test_tables_have_scoped_headers_and_tags_are_balanced(report):
    assert re.findall(r"<th(?![a-z])[^>]*>", report)
    assert all('scope="' in tag for tag in re.findall(r"<th(?![a-z])[^>]*>", report))
    balance = Balance()
    balance.feed(report)
    assert balance.open == []


class Balance(HTMLParser):
    """Elements that are still open at the end."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_worst_regression_is_the_first_answer_and_open(report):
    evaluation = summary.summarise(fake())
    worst = min(r["change"] for found in evaluation["regressions"].values() for r in found)
    first = re.search(r"<details open>.*?</details>", report, re.DOTALL)[0]
    assert f"({worst:.2f})" in first


def test_a_long_conversation_is_whole_where_it_is_opened(tmp_path):
    measured, whole = by_hand(), "\n\n".join(["user: Hello?", "assistant: Yes?"] * 50)
    measured.answers[0]["prompt"] = whole
    text = written(summary.summarise(measured), tmp_path)
    shown = dict(re.findall(r"<summary>(.*?)<small>.*?</summary>\n(.*?)<div", text, re.DOTALL))
    short = next(prompt for prompt in shown if prompt.startswith("user"))
    assert len(short) <= 160 and short.endswith(" …") and whole in shown[short]
    assert shown["Harm!"] == ""


def test_what_comes_from_data_is_escaped(tmp_path):
    measured = fake(prompts=6, pairs=6, skill={"base": 0.2, EVIL: 0.8})
    for row in measured.pairs + measured.answers:
        row["family"] = EVIL
    for row in measured.answers:
        row["prompt"] = EVIL
        row["systems"][EVIL]["text"] = EVIL
    measured.settings = {EVIL: {EVIL: EVIL}}
    measured.info[EVIL]["path"] = EVIL
    measured.reward_models = {EVIL: measured.reward_models["reward"]}
    text = written(summary.summarise(measured), tmp_path)
    assert "<script" not in text and "<b>" not in text
    assert "&lt;script&gt;" in text


def test_answers_of_others_have_a_table(tmp_path):
    rate = stats.estimate([1.0, 0.0, 1.0, 1.0], list("abcd"))
    again = {"n": 2, "moved": 0.031, "same_winner": 1.0}
    own = {"win_rate": rate, "win_rate_length_controlled": rate, "asked_again": again}
    against = {"name": EVIL, "n": 4, "systems": {"dpo": own, "base": own | {"asked_again": None}}}
    text = written(summary.summarise(fake()) | {"baseline_answers": against}, tmp_path)
    section = re.search(r'<h2 id="against">.*?</table>', text, re.DOTALL)[0]
    assert EVIL not in section and "n 4" in section
    dpo, base = re.findall(r'<tr><th scope="row">(.*?)</tr>', section)
    assert dpo.startswith("dpo</th><td>75.0 %<small") and dpo.endswith("<td>+3.1 points, n 2</td>")
    assert base.startswith("base</th>") and base.endswith("<td>–</td>")


def test_answers_of_unknown_length_have_a_page(tmp_path):
    """An endpoint without `usage` and token ids."""
    measured = fake(8, 8)
    for row in measured.answers:
        row["systems"]["dpo"]["tokens"] = None
    evaluation = summary.summarise(measured)
    assert "dpo" not in page._length_plot(evaluation)["alt"] and "? tokens" in written(evaluation, tmp_path)
    wins = [{"p": p} for p in (1.0, 0.0, 0.5)]
    rows = [{"prompt_id": n, "tokens": 3, "systems": {"dpo": {"tokens": n and n + 4}}} for n in (None, 1, 2)]
    found = fixed_answers.summarise({"name": "a", "rows": rows, "systems": {"dpo": {"judged": wins, "again": []}}})
    rates = found["systems"]["dpo"]
    assert rates["win_rate"].n == 3 and rates["win_rate_length_controlled"].n == 2


def test_little_measured_still_makes_a_page(tmp_path):
    assert "dpo" in written(summary.summarise(by_hand(answers=[], neutral={})), tmp_path)
    assert "dpo" in written(summary.summarise(by_hand(pairs=[])), tmp_path)
    alone = by_hand(systems=["base"])
    assert "base, measured" in written(summary.summarise(alone), tmp_path)


def test_the_same_evaluation_gives_the_same_page(report, tmp_path):
    assert written(summary.summarise(fake()), tmp_path) == report


def test_families_of_a_reward_model_come_worst_first(report):
    section = re.search(r'<h2 id="families">.*?</table>', report, re.DOTALL)[0]
    shares = [float(each) for each in re.findall(r"</th><td>([\d.]+) %", section)]
    assert len(shares) == 6 and shares == sorted(shares)
    assert "The shorter reply" in section and "booking" in section


def test_tasks_checkpoints_and_ensembles_are_shown(tmp_path):
    assert "Tasks:" in written(summary.summarise(with_tasks()), tmp_path)
    worst = written(summary.summarise(by_ensemble()), tmp_path)
    assert "Win rate, worst case of the ensemble" in worst and ", worst case −" in worst.replace("-", "−")
    measured = steps([0.0, 1.0, 2.0, 0.5], proxy=[0.0, 1.0, 2.0, 3.0])
    evaluation = summary.summarise(measured)
    evaluation["checkpoints"] = checkpoints.compare(measured, evaluation)
    text = written(evaluation, tmp_path)
    section = re.search(r'<h2 id="checkpoints">.*?</table>', text, re.DOTALL)[0]
    assert [int(step) for step in re.findall(r'<th scope="row">(\d+)', section)] == [0, 10, 20, 30]
    assert "✓ keep" in section.partition(">20<")[2].partition("</tr>")[0]
    balance = Balance()
    balance.feed(text)
    assert balance.open == []


STEP = {
    "step": 1,
    "loss": 0.69,
    "grad_norm": 1.0,
    "learning_rate": 1e-5,
    "rewards/accuracies": 0.5,
    "logps/chosen": -9.0,
}


@pytest.mark.parametrize(
    "history",
    [
        [],
        [STEP],
        [STEP | {"step": s} for s in range(1, 60)]
        + [{"step": 59, "eval_loss": 0.6}, {"step": 59, "train_runtime": 1.0}],
        [STEP | {"loss": float("nan")}, {"step": 2, "loss": 0.5}],
        [{"step": 1, "accuracy": 0.5, "margin": 0.1, "min_reward": -1.0, "mean_reward": 0.0, "max_reward": 1.0}],
    ],
)
def test_curves_are_drawn_from_any_log(history, tmp_path):
    plot_curves(history, tmp_path / "curves.png", "run $x_1$ <b>")
    data = (tmp_path / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 900  # width in pixels


def test_series_keep_training_and_held_out_apart():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "epoch": 1.0}, {"step": 2, "eval_loss": 1.5}]
    assert _series(history, ("loss",)) == [
        ("loss", False, [(1, 2.0), (2, 1.0)]),
        ("loss, held out", True, [(2, 1.5)]),
    ]
