"""Text that others wrote never acts: chat tokens in what a model reads, and what cards, terminal and pages show."""

import pytest

from rlhf_recipes.cai import layout
from rlhf_recipes.data.tokens import neutralise

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
    for broken in (layout.quote(text), layout.plain([{"role": "user", "content": text}])[0]["content"]):
        assert token not in broken
        assert "".join(broken.replace(">", "").split()) == "".join(text.replace(">", "").split())
        again = layout.plain([{"role": "user", "content": broken}])[0]["content"]
        assert again == broken, "broken once for all"
    assert layout.chat_tokens(text) >= around.count("{}")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_quoted_as_it_is(text):
    assert layout.quote(text) == f"> {text}" and layout.chat_tokens(text) == 0


def test_code_stays_readable():
    assert layout.quote("<div>x</div> List<int> <at>") == "> < div>x< /div> List< int> < at>"
    assert layout.quote("<a href='x y'> [NOTE] [/B]") == "> <a href='x y'> [ NOTE] [/B]"
    assert layout.chat_tokens("<div>x</div>", "[NOTE]", "plain") == 3


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
    from rlhf_recipes import data

    report = {"source": "s", "rows": 1, "dropped": {}, "capped": {"train": 0, "test": 0}, "split": "t"}
    splits = data.Splits([saying("a<tool_call>b")], [saying("plain")], report, "s")
    fitted = data.fit(splits, make_tokenizer(TAGS), None)
    assert fitted.report["neutralised"] == {"rows": 1, "occurrences": 3}
    assert "control tokens made plain in 1 rows (3 times)" in data.describe(fitted.report)


# ---- cards

HOSTILE = (
    "x\x1b]0;pwned\x07\x1b[2J\x9b1m\n\n# Title\r\n---\n[click](http://evil.example) ![i](http://evil.example/i.png) "
    "<img src=x onerror=alert(1)> <b>b</b> www.evil.example a@evil.example http://evil.example \u202elive\u202c \\| "
    "[y](z) | `c` **s** __u__ ~~d~~ $$m$$ \ud800\u2028- item\n```\nend"
)
ESTIMATE = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 20, "clusters": 20}


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
        "reward_funcs": said,
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
    from rlhf_recipes import card

    made = [card.write(result_of(said, recipe), config_of(said)) for said, recipe in ((HOSTILE, HOSTILE), ("s", "x"))]
    assert_harmless(*made)
    assert "→ adapter (`" in made[0] and "→ **dpo** (`" in made[0]
    assert "sft (`" in card.write(result_of("s", "sft"), config_of("s"))


def test_an_unknown_recipe_in_a_lineage_is_an_adapter():
    from rlhf_recipes import card

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

    from rlhf_recipes.hub import card, contents

    def written(said, recipe):
        terms = {"license": said, "license_name": said, "license_link": said}
        base = {"id": said, "revision": said, "same": None, "origin": said, "drift": None, **terms}
        verdict = {"verdict": said, "reasons": [said, said]}
        entry = {"parent": said, "verdict": verdict, "metrics": {"win_rate": ESTIMATE}}
        facts = {"repo_id": said, "base": base, "evaluation": entry, "merged": None, "dtype": "float32"}
        made = {"constitution": {"name": said, "version": said, "sha256": said}, "labelled_by": said}
        pairs = contents.Source("pairs", Path("nowhere"), {}, made)
        monkeypatch.setattr(contents.Source, "pairs", pairs)
        result = result_of(said, recipe) if kind == "run" else pairs_of(said)
        source = contents.Source(kind, Path("nowhere"), config_of(said), result)
        return card.write(source, facts | {"fingerprint": "f" * 64}, proof and said)

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
        },
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
