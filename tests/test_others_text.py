"""Text that others wrote never acts: chat tokens in what a model reads, and what cards, terminal and pages show."""

from dataclasses import asdict

import pytest

from rlhf_recipes.cai import prompt_templates
from rlhf_recipes.data.tokens import neutralise
from rlhf_recipes.stats import Estimate

# Of the families that served judges come from: what their servers parse inside of a message.
CHAT_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>",
    "<|reserved_special_token_200|>", "<|turn>", "<|turn>user", "<turn|>", "<|channel>", "<channel|>", "<|\"|>",
    "<|tool_call>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<unused99>", "<0x0A>", "<s>", "</s>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]",
    "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[ARGS]", "[THINK]", "[/THINK]", "[IMG]", "[control_8]", "[inst]",
    "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜tool▁calls▁begin｜>", "]~b]", "]~b]user", "]~b]]~b]ai", "]~!b[",
    "[e~[", "]!p~[", "]<]start of image[>[", "<seed:bos>", "<seed:tool_call>", "<tool_call>", "</tool_call>",
    "<tool_response>", "<think>", "</think>", "<function=get_weather>", "<parameter=city>", "<arg_key>", "[gMASK]",
    "<sop>", "<|observation|>", "<reserved_106>", "<extra_id_1>", "<|start_of_role|>", "[|system|]", "[|endofturn|]",
    "<|channel|>analysis<|message|>", "[BOS]", "[CLS]", "[unused9]", "[UNUSED_TOKEN_146]", "<beginning_of_sentence>",
    "<IMG_CONTEXT>", "<fim_prefix>", "<mask>", "<|START_OF_TURN_TOKEN|>", "<|tool_call_argument_begin|>",
    "[TOOL_CALLS](http://x)", "[INST](x)",
)  # fmt: skip
ORDINARY = (
    "if a < b and c > d: x <= 3, y >= 4, z <- 5, a -> b, a <-> b, <=>, <>, 1 << 2 >> 3, <3",
    "see [1] and [12], (A) or (B), [A], [B], [text](https://a.example), [FAQ](https://a.example), [x], [ ], []",
    "list[int], a[i][j], [C@@H](O)[nH], [NH2], C[OH], |x| + |y|, a || b, ~/home, [~, `x = {'a': [1]}`, A|B",
    "Dr Osei: 3 × 5 mg? “Ja”, naïve 你好 🙂, 5 < 6 > 4, the end is < 70, R: x[i]~b[j]",
)


@pytest.mark.parametrize("token", CHAT_TOKENS)
@pytest.mark.parametrize("around", ["{}", "a{}b", "{}{}", "({})", "x [1] {} < 2", "<{}>", "[{}]", "**{}**", "{}\n{}"])
def test_a_chat_token_is_broken_in_what_a_served_judge_reads(token, around):
    text = around.replace("{}", token)
    for broken in (
        prompt_templates.quote(text),
        prompt_templates.plain([{"role": "user", "content": text}])[0]["content"],
    ):
        assert token not in broken
        assert "".join(broken.replace(">", "").split()) == "".join(text.replace(">", "").split())
        again = prompt_templates.plain([{"role": "user", "content": broken}])[0]["content"]
        assert again == broken, "broken once for all"
    assert prompt_templates.chat_tokens(text) >= around.count("{}")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_quoted_as_it_is(text):
    assert prompt_templates.quote(text) == f"> {text}" and prompt_templates.chat_tokens(text) == 0


def test_code_stays_readable():
    assert prompt_templates.quote("<div>x</div> List<int> <at>") == "> < div>x< /div> List< int> < at>"
    assert prompt_templates.quote("<a href='x y'> [NOTE] [/B]") == "> <a href='x y'> [ NOTE] [/B]"
    assert prompt_templates.chat_tokens("<div>x</div>", "[NOTE]", "plain") == 3


def test_chat_tokens_in_pairs_are_counted(tmp_path):
    """By the maker of pairs, in what it puts to a judge; broken or not, the data set's card says how many."""
    import json

    from rlhf_recipes.cai import dataset

    verdict = {"by_principle": {}, "spread": 0.0, "position_gap": 0.0, "flip": False, "mass": 1.0, "p": 0.9}
    pair = {"source": "on_policy", "principle": None, "unfit": None, "route": "accepted", "speaks_to_judge": False}
    pairs = [{**pair, **verdict, "first": "one <tool_call> [INST]", "second": "two"},
             {**pair, **verdict, "first": "a < b", "second": "[1]"}]  # fmt: skip
    record = {"prompt_id": "p", "family": None, "split": "train", "steps": [], "pairs": pairs}
    prompts = ({"prompt": [{"role": "user", "content": text}]} for text in ("what?", "<|turn>user"))
    shard = tmp_path / "records.jsonl"
    shard.write_text("".join(json.dumps({**record, **prompt, "prompt_id": str(prompt)}) + "\n" for prompt in prompts))
    made = dataset.write([shard], tmp_path, dict.fromkeys(("constitution", "generator", "judge")) | {"seed": 1})
    assert made["funnel"]["neutralised"] == {"rows": 3, "occurrences": 2 + 3 + 1}


def make_tokenizer(added, template=None, special=()):
    """Bytes in ChatML, and added tokens as tokenizers of the families mark them: not special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template or chatml, eos_token=names[2], pad_token=names[0]
    )


def saying(text):
    turns = {"prompt": [("system", text), ("user", text), ("assistant", text), ("user", "and?")]}
    turns |= {"chosen": [("assistant", text)], "rejected": [("assistant", "no")]}
    return {key: [{"role": role, "content": each} for role, each in said] for key, said in turns.items()}


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<|fim_prefix|>", "[TOOL_RESULTS]",
        "]~b]", "<|\"|>", "<seed:think>", "[gMASK]", "▁<PRE>")  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_added_tokens_that_are_not_special_are_broken_in_prompts(tag):
    tokenizer = make_tokenizer(TAGS)
    row = saying(f"a{tag}b{tag}")
    (plain,), counts = neutralise([row], tokenizer)
    token = tokenizer.convert_tokens_to_ids(tag)
    for turn in plain["prompt"]:
        assert token not in tokenizer(turn["content"])["input_ids"]
        assert turn["content"].replace(" ", "") == f"a{tag}b{tag}" or turn["content"] == "and?"
    assert plain["chosen"] == row["chosen"], "what is trained: the user may want to teach it"
    assert counts == {"rows": 1, "occurrences": 6}
    assert neutralise([plain], tokenizer) == ([plain], {"rows": 0, "occurrences": 0})


def test_special_tokens_are_broken_everywhere():
    tokenizer = make_tokenizer(TAGS, special=["<think_hard>", "word"])
    for token in ("<|im_end|>", "<think_hard>", "word"):
        (plain,), counts = neutralise([saying(f"a {token} b")], tokenizer)
        assert counts == {"rows": 1, "occurrences": 4}
        assert token not in plain["chosen"][0]["content"] and token not in plain["prompt"][0]["content"]


@pytest.mark.parametrize(
    "added", ["  ", "    ", "\n\n", "\t\t", "lisinopril", "Grüße", "<", "[", "|", "->", "[C@@H]", "[nH]", "</", "…"]
)
def test_blanks_and_words_that_were_added_stay(added):
    """Runs of blanks of Phi, GPT-NeoX and StarCoder; words of a domain; signs of code and chemistry."""
    tokenizer = make_tokenizer([added])
    rows = [saying(f"a{added}b {added} c")]
    assert neutralise(rows, tokenizer) == (rows, {"rows": 0, "occurrences": 0})
    assert neutralise(rows, tokenizer)[0][0] is rows[0]


def test_tags_that_a_template_writes_as_letters():
    """No token of the tokenizer, yet its template parses them in messages."""
    template = (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}{{ '<|turn>' + m.role + '\n' + c + "
        "'<turn|>\n' }}{% endfor %}{{ ']~b]ai <tool_response>' }}{% if 1 < 2 and 3 > 2 %}{% endif %}"
    )
    tokenizer = make_tokenizer([], template)
    for marker in ("<|turn>", "<turn|>", "]~b]"):
        (plain,), counts = neutralise([saying(f"a{marker}b")], tokenizer)
        assert counts["occurrences"] == 4 and marker not in plain["chosen"][0]["content"]
    for tag in ("</think>", "<tool_response>"):
        (plain,), counts = neutralise([saying(f"a{tag}b")], tokenizer)
        assert counts["occurrences"] == 3 and plain["chosen"][0]["content"] == f"a{tag}b"
        assert plain["prompt"][0]["content"] == f"a{tag[0]} {tag[1:]}b"
    rows = [saying("1 < 2 and 3 > 2")]
    assert neutralise(rows, tokenizer)[0][0] is rows[0]


def test_the_line_about_the_data_counts_them():
    from rlhf_recipes.data.fit import describe, fit
    from rlhf_recipes.data.load import Splits

    report = {"source": "s", "rows": 1, "dropped": {}, "examples": {}, "capped": {"train": 0, "test": 0}, "split": "t"}
    splits = Splits([saying("a<tool_call>b")], [saying("plain")], report, "s")
    fitted = fit(splits, make_tokenizer(TAGS), None)
    assert fitted.report["neutralised"] == {"rows": 1, "occurrences": 3}
    assert "control tokens made plain in 1 rows (3 times)" in describe(fitted.report)


# ---- cards

HOSTILE = (
    "x\x1b]0;pwned\x07\x1b[2J\x9b1m\n\n# Title\r\n---\n[click](http://evil.example) ![i](http://evil.example/i.png) "
    "<img src=x onerror=alert(1)> <b>b</b> www.evil.example a@evil.example http://evil.example \u202elive\u202c \\| "
    "[y](z) | `c` **s** __u__ ~~d~~ $$m$$ \ud800\u2028- item\n```\nend"
)
ESTIMATE = Estimate(0.6, 0.5, 0.7, 20, 20)


def result_of(said="said", recipe="sft"):
    """result.json of a dpo run of a parent, with `said` wherever a text may stand."""
    older = {"run": said, "recipe": said, "adapter_sha256": said * 12, "parent": None}
    finding = dict.fromkeys(("level", "rule", "step", "saw", "means", "change"), said)
    return {
        "recipe": "dpo", "status": "finished", "base_model": said, "seed": said, "steps": said, "seconds": 3.0,
        "device": said, "versions": {said: said}, "peak_memory_gib": {said: 1.0}, "before": {said: ESTIMATE},
        "metrics": {said: ESTIMATE}, "main": {"name": said, "before": ESTIMATE, "after": ESTIMATE},
        "doctor": {"verdict": said, "findings": [finding]}, "adapter_sha256": said * 12,
        "parent": {"run": said, "recipe": recipe, "adapter_sha256": said * 12, "parent": older},
    }  # fmt: skip


def config_of(said="said"):
    return {
        "data": {"path": said, "columns": {said: said}, "train_split": said, "test_split": said},
        "trainer": {"run_name": said, "lr_scheduler_kwargs": {said: [said]}}, "lora": {}, "quantization": {},
        "reward_funcs": said, "model": {"chat_template_kwargs": {said: said}},
    }  # fmt: skip


def body(card):
    return card.split("\n---\n", 1)[1]


def assert_harmless(card, plain):
    """It renders as the same card with plain words does, and its metadata has the same keys."""
    import re

    import yaml
    from conftest import rendered

    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]", card)
    assert len(body(card).splitlines()) == len(body(plain).splitlines())
    page, other = rendered(body(card)), rendered(body(plain))
    assert page.tags == other.tags
    assert (page.links, page.images) == (other.links, other.images) and not any("evil" in link for link in page.links)
    assert not page.autolinks
    assert [len(row) for row in page.cells] == [len(row) for row in other.cells]
    assert "pwned" in page.text and "click" in page.text, "shown, not hidden"
    heads = [yaml.safe_load(each.split("---\n", 2)[1]) for each in (card, plain)]
    assert heads[0].keys() == heads[1].keys() and str(heads[0]).count("{") == str(heads[1]).count("{")
    outside = re.sub(r"(?s)```python\n.*?\n```|(?<!\\)`[^`\n]*`", "", body(card))
    assert not [raw for raw in ("<img", "](http://evil", "<b>", "\n# Title", "\n- item") if raw in outside]


def test_a_run_s_card_says_what_others_wrote_and_does_nothing_of_it():
    from rlhf_recipes.training import card

    made = [card.write(result_of(said, recipe), config_of(said)) for said, recipe in ((HOSTILE, HOSTILE), ("s", "x"))]
    assert_harmless(*made)
    assert "→ adapter (`" in made[0] and "→ **dpo** (`" in made[0]
    assert "sft (`" in card.write(result_of("s", "sft"), config_of("s"))


def test_an_unknown_recipe_in_a_lineage_is_an_adapter():
    from rlhf_recipes.training import card

    for recipe in ("[x](http://evil)", "cai", None, 7, ["dpo"], {"a": 1}, "DPO"):
        result = {
            "recipe": "dpo",
            "adapter_sha256": "1" * 64,
            "parent": {"recipe": recipe, "adapter_sha256": "2" * 64},
        }
        assert card.chain("base", result) == f"`base` → adapter (`{'2' * 12}`) → **dpo** (`{'1' * 12}`)"
    for parent in ({"recipe": "sft"}, {"recipe": "sft", "adapter_sha256": None, "parent": None}):
        assert card.chain("base", {"recipe": "dpo", "parent": parent}) == "`base` → sft (`–`) → **dpo** (`–`)"


@pytest.mark.parametrize("kind", ["run", "pairs"])
@pytest.mark.parametrize("proof", [None, "broken"])
def test_a_published_card(kind, proof, monkeypatch):
    from pathlib import Path

    from rlhf_recipes.publish import card, contents

    def written(said, recipe):
        terms = {"license": said, "license_name": said, "license_link": said}
        base = {"id": said, "revision": said, "same": None, "origin": said, "drift": None, **terms}
        verdict = {"verdict": said, "reasons": [said, said]}
        entry = {"parent": said, "verdict": verdict, "metrics": {"win_rate": ESTIMATE}}
        facts = card.Facts(said, base, entry, dtype="float32", fingerprint="f" * 64)
        made = {"constitution": {"name": said, "version": said, "sha256": said}, "labelled_by": said}
        pairs = contents.Source("pairs", Path("nowhere"), {}, made)
        monkeypatch.setattr(contents.Source, "pairs", pairs)
        result = result_of(said, recipe) if kind == "run" else pairs_of(said)
        source = contents.Source(kind, Path("nowhere"), config_of(said), result)
        return card.write(source, facts, proof and said)

    assert_harmless(written(HOSTILE, HOSTILE), written("s", "x"))


def pairs_of(said="said"):
    """result.json of a cai run, with `said` wherever a text may stand."""
    worth = dict.fromkeys(("agreement", "swap_consistency", "kappa"), ESTIMATE)
    worth |= {"best_baseline": said, "baselines": {said: ESTIMATE}, "temperature": 1.0}
    worth["calibration_error"] = {"before": 0.1, "after": 0.1, "n": said}
    counts = dict.fromkeys(("pairs", "accepted", "tie", "disputed", "unfit"), said)
    return {
        "recipe": "cai", "constitution": {"name": said, "version": said, "principles": said, "sha256": said},
        "funnel": {
            "written": {"train_prefs": 1, "test_prefs": 1, "train_sft": 0, "test_sft": 0}, "pairs": said,
            "routes": {"tie": 1}, "unfit": {"no_op": 1}, "by_principle": {said: {"revised": said}},
            "chosen_is_longer": ESTIMATE, "speaks_to_judge": said, "neutralised": {"rows": said, "occurrences": said},
            "earlier": {"train_prefs": said},
        },
        "earlier": [{"generator": said, "judge": said, "constitution": said}],
        "ledger": {f"{said}/on_policy": counts}, "gate": worth, "labelled_by": "construction", "generator": said,
        "judge": said, "seed": said,
        "spent": {"usd": 1.0, "tokens_per_second": 1.0, "calls": 1, "prompt_tokens": 1, "completion_tokens": 1},
    }  # fmt: skip


def test_a_data_set_s_card():
    from rlhf_recipes.cai import report

    made = report.card(pairs_of(HOSTILE)), report.card(pairs_of("s"))
    assert_harmless(*made)
    older = pairs_of("s")
    older["funnel"].pop("neutralised")
    assert "chat token" in made[1] and "chat token" not in report.card(older)


# ---- the terminal: what is printed of a hostile text is what is printed of `text.line` of it

PRINTED = "x\x1b]0;pwned\x07\x1b]52;c;cm0=\x07\x1b[2J\x9b1m\r\nerror: all is well\u2028\u202elive \ud800_$y$\b"


def assert_printed(make):
    """make(said): what is printed about a text."""
    import re

    from rlhf_recipes import text

    plain = text.line(PRINTED)
    printed = make(PRINTED)
    assert printed == make(plain)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\ud800-\udfff]", printed)
    assert "pwned" in printed and "\nerror" not in printed


def test_the_lines_about_the_data():
    from rlhf_recipes.data.fit import describe

    def make(said):
        report = {"source": said, "train": 1, "test": 1, "rows": 2, "dropped": {"empty": 1}, "split": said}
        return describe(report | {"capped": {"train": 0, "test": 0}})

    assert_printed(make)


def test_preflight():
    from types import SimpleNamespace

    from rlhf_recipes.launch.preflight import printed as preflight_report
    from rlhf_recipes.launch.preflight.report import JobReport

    def make(said):
        model = {"id": said, "download_gib": 0}
        seen = JobReport(said, "dpo", [said], [said], {said: said}, model)
        example = {"text": said.replace("\r\n", " ").replace("\u2028", " "), "ends": ESTIMATE, "eos": [said]}
        tokens = {"p50": 1, "p95": 1, "max": 1, "train": 1}
        rows = {"source": said, "train": 1, "test": 1, "split": said, "tokens": tokens, "max_length": 9,
                "over_length": {"rows": 0, "of": 1, "fate": said}, "duplicate": 0, "leakage": 0, "near_duplicates": 0,
                "neutralised": {"rows": 0, "occurrences": 0}, "told": [said], "dropped": {said: 1}}  # fmt: skip
        seen.example, seen.rows = example, rows
        report = {"disk": {"need_gib": 1, "free_gib": 2, "stops": []}, "jobs": [seen]}
        jobs = [SimpleNamespace(name=said, recipe="dpo")]
        return "\n".join(
            [preflight_report.head(jobs), preflight_report.describe(seen, []), preflight_report.summary(report)]
        )

    assert_printed(make)


def test_an_example_of_preflight_keeps_its_lines():
    from rlhf_recipes.launch.preflight import printed as preflight_report
    from rlhf_recipes.launch.preflight.report import JobReport

    example = {"text": "one\r\ntwo\x1b[2J\n  STOP     three", "ends": None, "eos": []}
    rows = preflight_report._example(JobReport("job", "dpo", example=example))
    assert rows[1:] == ["           │ one", "           │ two␛[2J", "           │   STOP     three"]


def test_the_summary_of_an_audit(tmp_path):
    from types import SimpleNamespace

    from rlhf_recipes.audit import report

    def make(said):
        gate = SimpleNamespace(title=said, name=said, unit="%", state="fail", **vars(ESTIMATE))
        audit = {"verdict": {"gates": [gate], "headline": said, "counts": {"fail": 1}}, "counts": {"reward models": 1}}
        return report.describe(SimpleNamespace(dir=tmp_path / said[:3], seconds=lambda: 1.0), audit, True)

    assert_printed(make)


def hostile_measurements(said):
    from test_evaluation_summary import fake

    measured = fake(prompts=12, pairs=24, skill={"base": 0.2, f"{said} 1": 0.8})
    for row in measured.pairs + measured.answers + measured.reward_models["reward"]:
        row["family"] = f"{said} {row['family'][0]}"
    for row in measured.answers:
        row["prompt"] = said
        row["systems"][f"{said} 1"]["text"] = said
    measured.reward_models = {said: measured.reward_models["reward"]}
    measured.settings = {said: {said: said}}
    values = {name: [1.0, 0.0, 1.0] for name in measured.systems}
    measured.tasks = {said: {"metric": said, "ids": ["a", "b", "c"], "values": values}}
    return measured


def test_the_table_of_an_evaluation():
    from rlhf_recipes.evaluation import summary
    from rlhf_recipes.evaluation import table as terminal

    assert_printed(lambda said: terminal.as_text(summary.summarise(hostile_measurements(said))))


def test_the_summary_of_a_pipeline(tmp_path):
    from types import SimpleNamespace

    from rlhf_recipes.launch import pipeline

    def make(said):
        answers = [{"family": said, "prompt": said, "systems": {said: {"text": said}, "b": {"text": said}}}]
        evaluation = {"parent": said, "recommended": "b", "answers": answers}
        result = {"main": {"name": said, "before": ESTIMATE, "after": ESTIMATE}, "peak_memory_gib": {said: 1.0}}
        table = pipeline._table([(SimpleNamespace(name="sft", seconds=1.0), result)])
        return f"{table}\n{pipeline._side_by_side(evaluation)}"

    assert_printed(make)


def sweep_row(said):
    metrics = dict.fromkeys(("reward", "kl_k1", "length_ratio"), ESTIMATE)
    row = {
        "job": said,
        "overrides": [f"trainer.run_name={said}", f"+{said}==1"],
        "status": "finished",
        "metrics": metrics,
    }
    return row | {"recipe": "dpo", "folder": said, "seconds": 1.0, "value": 0.6, "doctor": said}


def test_the_summary_of_a_sweep(tmp_path):
    from rlhf_recipes.evaluation import sweeps

    def make(said):
        table = {"rows": [sweep_row(said), sweep_row("b")], "objective": "reward", "best": said, "equal": [said],
                 "optimised": [said]}  # fmt: skip
        return sweeps.describe(table | {"drawn": True}, tmp_path)

    assert_printed(make)


@pytest.mark.parametrize("said", [PRINTED, "=HYPERLINK(1)", "+1+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1"])
def test_a_table_for_spreadsheets_has_no_formula(said):
    import csv
    import io

    from rlhf_recipes.evaluation import sweeps

    text = sweeps._csv([sweep_row(said), sweep_row("b")])
    rows = list(csv.reader(io.StringIO(text)))
    for cell in (cell for row in rows for cell in row):
        assert not cell.lstrip().startswith(("=", "+", "-", "@")), cell
    assert len(text.splitlines()) == len(rows) == 3 and "\x1b" not in text
    assert "0.6" in rows[1] and rows[1][0] == rows[1][1]


def test_the_summary_of_a_run(capsys, tmp_path):
    from rlhf_recipes.run import Run
    from rlhf_recipes.training.finish import _print_summary

    def make(said):
        run = Run(tmp_path / said[:4], "ppo", {})
        result = {"main": {"name": said, "before": ESTIMATE, "after": ESTIMATE}, "peak_memory_gib": {}, "seconds": 1.0}
        result |= {"stopped": said, "samples": [{"completion": said, "reward": 1.0}]}
        finding = dict.fromkeys(("level", "rule", "step", "saw", "means", "change"), said)
        _print_summary(run, result | {"doctor": {"verdict": said, "findings": [finding]}})
        return capsys.readouterr().out

    assert_printed(make)


def test_the_progress_line(capsys, monkeypatch):
    from rlhf_recipes import progress

    def make(said):
        monkeypatch.setenv("RLHF_RECIPES_STAGE", said.replace("\x00", ""))
        progress.Line(said, 1).update(1, said)
        return capsys.readouterr().err.partition("s each")[0].rpartition("·")[0]

    monkeypatch.setattr(progress.os, "environ", {**progress.os.environ})
    assert_printed(make)


def test_the_line_about_reward_models(capsys):
    from rlhf_recipes.ppo import rewards

    def make(said):
        rewards.scales([rewards.LearnedReward(said, None, None, None)], "min")
        return capsys.readouterr().out

    assert_printed(make)


def test_a_server_s_refusal():
    """What an endpoint says of a request comes as one line in which nothing acts."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from rlhf_recipes import text
    from rlhf_recipes.cai.backend import Request
    from rlhf_recipes.cai.server import Server
    from rlhf_recipes.launch.refusals import as_refusal

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            body = PRINTED.encode("utf-8", "replace")
            self.send_response(422)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    endpoint = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=endpoint.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    backend = Server(base_url=url, model="m", api_key_env=None, concurrency=1, timeout=5.0, max_attempts=1)
    try:
        with pytest.raises(ValueError) as caught:
            list(backend.answer([Request("p", "s", [{"role": "user", "content": "Hi"}], max_new_tokens=2)], (), "w"))
    finally:
        endpoint.shutdown()
        endpoint.server_close()
    printed = text.line(as_refusal(caught.value, "cai"))
    assert "422" in printed and "pwned" in printed and "all is well" in printed
    assert len(printed.splitlines()) == 1 and "\x1b" not in printed and "\u202e" not in printed


# ---- pages and pictures


@pytest.mark.slow
def test_the_page_of_an_evaluation(tmp_path):
    import re

    from rlhf_recipes.evaluation import page, summary

    for said in (HOSTILE, "_", "$\\frac{$", '"><script>alert(1)</script>'):
        page.write_page(summary.summarise(hostile_measurements(said)), tmp_path / "report.html")
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)
        assert "<img" not in html and "<script" not in html and "<b>" not in html
        assert not re.search(r'<[^<>]*"[^<>]*"?>\s*alert', html)
    assert "&lt;script&gt;" in html and 'aria-label="Preference accuracy.' in html


@pytest.mark.slow
def test_the_page_of_an_audit(tmp_path):
    import re

    from test_audit_page import audit, curve, dots, example, examples, figure, lines, section, share, table

    from rlhf_recipes.audit import page

    part = section(
        HOSTILE, HOSTILE, HOSTILE, figures=[figure("a", HOSTILE, share(0.6, 50), unit=HOSTILE, says=HOSTILE)],
        tables=[table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE)], notes=[HOSTILE],
        plots=[dots(HOSTILE, [(HOSTILE, share(0.5, 9))], HOSTILE, (HOSTILE, 0.5)),
               lines(HOSTILE, HOSTILE, HOSTILE, [curve(HOSTILE, [0, 1], [0, 1])], [(HOSTILE, 0.5)])],
        examples=[examples(HOSTILE, [example(HOSTILE, [(HOSTILE, HOSTILE)], HOSTILE)])],
    )  # fmt: skip
    page.write_page(audit([part]) | {"title": HOSTILE, "subject": {HOSTILE: HOSTILE}}, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)
    assert "<img" not in html and "<b>" not in html and "pwned" in html


@pytest.mark.slow
@pytest.mark.parametrize("said", [HOSTILE, "$\\frac{$", "_", "a$b$c^{", ""])
def test_pictures_draw_any_name(said, tmp_path):
    from types import SimpleNamespace

    from rlhf_recipes.evaluation import frontier
    from rlhf_recipes.training import doctor_plot
    from rlhf_recipes.training.curves import plot_curves
    from rlhf_recipes.training.doctor_record import Record

    plot_curves([{"step": 1, "loss": 1.0}], tmp_path / "curves.png", said)
    args = SimpleNamespace(beta=0.1, kl_target=1.0)
    doctor_plot.plot(Record("sft", [{"step": 1, "loss": 1.0}], args, 1), [], tmp_path / "doctor.png", said)
    rows = [sweep_row(said) | {"system": said, "recipe": said}, sweep_row("b") | {"system": "b"}]
    frontier.plot(rows, "reward", said, tmp_path / "frontier.png")
    for name in ("curves", "doctor", "frontier"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


# ---- whole runs


@pytest.mark.slow
def test_a_run_on_hostile_data_with_a_hostile_parent(train, tmp_path, capfd):
    """What it prints and its card, searched; the parent's result.json says what it likes."""
    import json
    import re

    from conftest import rendered

    parent = train("sft", tmp_path / "parent", "quantization=none")
    result = parent.result
    older = {"run": HOSTILE, "recipe": HOSTILE, "adapter_sha256": HOSTILE, "parent": None}
    (tmp_path / "parent" / "result.json").write_text(
        json.dumps(result | {"recipe": HOSTILE, "parent": older}, default=asdict)
    )
    said = HOSTILE.replace("\ud800", "")
    rows = [{"prompt": f"{said} <tool_call> {i}", "chosen": f"good {said} {i}", "rejected": f"bad {i}", "family": said,
             said: said} for i in range(24)]  # fmt: skip
    path = tmp_path / "a\x1b[2J\u202eb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capfd.readouterr()
    run = train(
        "dpo", tmp_path / "run", "quantization=none", "model.adapter=parent", "data=local", "data.test_size=6",
        f'data.path="{path.name}"', "trainer.max_length=1024", "data.too_long=truncate",
    )  # fmt: skip
    out, err = capfd.readouterr()
    obeyed = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
    assert not re.search(obeyed, out + err) and "data: a␛[2J" in out and "control tokens" not in out
    card = (run.dir / "README.md").read_text(encoding="utf-8")
    assert not re.search(obeyed, card) and "→ adapter (`" in card and "→ **dpo** (`" in card
    page = rendered(body(card))
    assert page.links == ["https://arxiv.org/abs/2305.18290"] and not page.images and not page.autolinks
    assert "img" not in page.tags and page.tags.count("h1") == 1 and "b.jsonl" in page.text


def test_a_refusal_names_hostile_columns_on_one_line(tmp_path, compose):
    import json

    from rlhf_recipes import text
    from rlhf_recipes.data.load import load_pairs
    from rlhf_recipes.launch.refusals import as_refusal

    said = HOSTILE.replace("\ud800", "")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({said: "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(ValueError) as caught:
        load_pairs(compose("dpo", "data=local", f"data.path={path}").data)
    printed = text.line(as_refusal(caught.value, "dpo"))
    assert "no column 'prompt' (found: x␛]0;pwned␇␛[2J" in printed and len(printed.splitlines()) == 1
