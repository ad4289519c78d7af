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
