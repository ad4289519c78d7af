"""People label what a model answers: a run of cai whose judge they are, and prompts that are answered first."""

import html
import json
import re

import pytest
from test_cai import SMALL
from test_label import Browser, address, kill, lines, write_rows

from rlhf_recipes.audit import judgements

pytestmark = pytest.mark.slow


def label(at: Browser, word: str | None = None, most: int = 1000) -> int:
    """Choose the longer reply, or always the same, of so many pairs or all; how many there were."""
    count = 0
    while count < most and "That was the last pair" not in at.page:
        left, right = map(
            html.unescape, re.findall(r'<div class="text" dir="auto">([^<]*)</div>\s*</section>', at.page)[-2:]
        )
        at.post("/choose", place=word or ("left" if len(left) > len(right) else "right"), item=at.item())
        count += 1
    return count


def test_a_run_of_cai_waits_for_people_and_goes_on(run_recipe, start_recipe, light_python, terse, tmp_path):
    read = [each for each in SMALL if not each.startswith(("gate.", "judging.", "revise."))]
    command = ("cai", *read, *terse, "judge=people", "sources=[on_policy]")
    done = run_recipe(*command, cwd=tmp_path)
    waiting = lines(tmp_path / "outputs" / "cai" / "main" / "to_label.jsonl")
    assert done.returncode == 75 and len(waiting) > 3, done
    told = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"{len(waiting)} pairs wait for people, who label them with: python -m rlhf_recipes\.recipes\.label "
        r"pairs=outputs/cai/main run_name=cai_main\. Then this command goes on\.", told,
    )  # fmt: skip
    assert all(row["question"] and row["principle"] for row in waiting)
    again = run_recipe(*command, cwd=tmp_path)
    assert again.returncode == 75 and again.stderr.splitlines()[-1] == told
    assert "estimate: " in done.stdout and "estimate: " not in again.stdout
    asked = ("label", "pairs=outputs/cai/main", "run_name=cai_main", "twice=0", "swapped=0")
    process = start_recipe(*asked, cwd=tmp_path, python=light_python)
    at = Browser(address(process))
    assert waiting[0]["question"] in html.unescape(at.page)
    assert label(at, most=1) == 1
    kill(tmp_path, process, "cai_main")
    assert run_recipe(*command, cwd=tmp_path).returncode == 75  # not all of it
    process = start_recipe(*asked, cwd=tmp_path, python=light_python)
    at = Browser(address(process))
    at.post("/choose", place="skip", item=at.item())
    label(at)
    at.post("/finish")
    assert process.wait(60) == 0
    done = run_recipe(*command, cwd=tmp_path)
    assert done.returncode == 0, done
    result = json.loads((tmp_path / "outputs" / "cai" / "main" / "result.json").read_text())
    assert result["labelled_by"] == "people" and result["funnel"]["routes"]["unanswered"] == 1
    assert "judged by people" in (tmp_path / "outputs" / "cai" / "main" / "README.md").read_text()
    said = judgements.load(str(tmp_path / "outputs" / "cai" / "main"))
    assert {each["judge"] for each in said} == {"people"} and all(each["p"] == 1.0 for each in said)
    records = [row for path in sorted(tmp_path.rglob("records.jsonl")) for row in lines(path)]
    routes = [pair["route"] for record in records for pair in record["pairs"] if pair["route"]]
    assert sorted(routes) == ["accepted"] * (len(waiting) - 1) + ["unanswered"]
    for pair in (pair for record in records for pair in record["pairs"] if pair["route"] == "accepted"):
        first, second = len(pair["first"]), len(pair["second"])
        assert first == second or (pair["p"] > 0.5) == (first > second)


def test_prompts_are_answered_first_and_answers_are_kept(start_recipe, terse, tmp_path):
    asked = [
        {"prompt": f"Can I come on day {n}?", "family": None, "why": "far from the train pairs"} for n in range(4)
    ]
    write_rows(tmp_path / "label_next.jsonl", *asked)
    command = (
        "label",
        "pairs=label_next.jsonl",
        *terse,
        "quantization=none",
        "max_new_tokens=12",
        "twice=0",
        "swapped=0",
    )
    process = start_recipe(*command, cwd=tmp_path)
    at = Browser(address(process))
    assert "Can I come on day 0?" in at.page and "tests/tiny" not in at.page
    label(at, most=1)
    kill(tmp_path, process)
    folder = tmp_path / "outputs" / "label" / "main"
    kept = (folder / "answers.jsonl").read_bytes()
    process = start_recipe(*command, cwd=tmp_path)
    at = Browser(address(process))
    assert "1 of 4 labelled, 3 left" in at.page and "Can I come on day 1?" in at.page
    label(at, "left")
    at.post("/finish")
    assert process.wait(60) == 0 and (folder / "answers.jsonl").read_bytes() == kept
    rows = lines(folder / "preferences.jsonl")
    assert [row["prompt"][0]["content"] for row in rows] == [row["prompt"] for row in asked]
