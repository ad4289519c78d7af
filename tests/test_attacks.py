"""What files and answers of others get that no other test file tries; attacks.md lists every attack, and is held to.

Nothing here trains: an attack is met before that, or in a call of its own.
"""

import ast
import json
import re
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_limits
from conftest import ROOT, TINY_ID, write_adapter
from test_limits import asked, endpoint, refusal  # noqa: F401  a fixture

from rlhf_recipes import adapter_files, references, run_folder
from rlhf_recipes.data import readers
from rlhf_recipes.launch.refusals import as_refusal

# ruff: noqa: F811

MIB = 2**20
TESTS = Path(__file__).parent
ESCAPES = "\x1b]0;pwned\x07\x1b[2J\u202eno\x9b1m"


def refused(call, *args):
    """The one line that a call is refused with."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    said = as_refusal(caught.value)
    assert said and len(said) < 600 and not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", said), said
    return said


# ---- the list


ROWS = re.compile(r"^\| (\w+) \| (.+?) \| ([\w ,]+) \| `(\w+\.py)::(\w+)` \|$", re.MULTILINE)
BY = ("config", "model", "adapter", "tokenizer", "row", "page", "server", "hub")
GETS = ("refused", "not run", "ended", "cut", "dropped", "escaped", "said", "nothing")


def test_the_list_names_attacks_of_every_kind_and_tests_that_are_there():
    text = (TESTS / "attacks.md").read_text(encoding="utf-8")
    rows = ROWS.findall(text)
    assert len(rows) == sum(line.startswith("| ") for line in text.splitlines()) - 2, "a row that is not read"
    assert len(rows) >= 60 and len({attack for _, attack, *_ in rows}) == len(rows)
    assert all(sum(by == each for by, *_ in rows) >= 5 for each in BY) and {by for by, *_ in rows} == set(BY)
    assert {word for _, _, gets, *_ in rows for word in gets.split(", ")} == set(GETS)
    there = {}
    for _, _, _, file, test in rows:
        if file not in there:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            there[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in there[file], f"{file}::{test}"
    counted = {by: sum(row[0] == by for row in rows) for by in BY}
    assert ", ".join(f"{by} {count}" for by, count in counted.items()) in text, counted
    assert (ROOT / "SECURITY.md").read_text(encoding="utf-8").count("(tests/attacks.md)") == 1


# ---- adapters


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
LORA = {f"{Q}A.weight": (4, 8), f"{Q}B.weight": (8, 4)}
NORM = "base_model.model.model.norm.weight"


def tensors(shapes, **changes):
    """The bytes of a safetensors file of zeros; `changes` go into the header of its first tensor."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for each in shape:
            size *= each
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    next(iter(header.values())).update(changes)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + bytes(end)


def bought(folder, content=None, **config):
    """A run that somebody sends: `content` are its weights."""
    write_adapter(folder, recipe="dpo", parent=None)
    given = {"base_model_name_or_path": TINY_ID, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(given | config))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(content or tensors(LORA))
    return str(folder)


BAD_ADAPTERS = {
    "a weight of the base": ({}, tensors(LORA | {NORM: (8,)}), f"holds {NORM}, which would be put in place of the ba"),
    "the embedding": (
        {}, tensors(LORA | {"base_model.model.model.embed_tokens.weight": (9, 8)}), "holds base_model.model.model.emb"
    ),
    "a bias of the base": (
        {"bias": "all"}, tensors({f"{Q[:-5]}base_layer.bias": (8,)}), "holds base_model.model.model.layers.0.self_att"
    ),
    "a weight in the name of another kind": ({"peft_type": "LOHA"}, tensors({NORM: (8,)}), f"holds {NORM}, which"),
    "a start that takes the base apart": (
        {"init_lora_weights": "PiSSA_niter_4"}, None, "init_lora_weights=PiSSA_niter_4 changes the base"
    ),
    "layers that are doubled": ({"layer_replication": [[0, 2]] * 9}, None, "layer_replication=[[0, 2], [0, 2]"),
    "a base that is cut": ({"kasa_config": {"beta": 1}}, None, "kasa_config={'beta': 1} changes the base"),
    "others that it fetches": (
        {"peft_type": "XLORA", "adapters": {"a": "evil/adapter"}}, None, "peft_type=XLORA: is no kind of adapter that"
    ),
    "a kind that is none": ({"peft_type": ESCAPES}, None, "peft_type=␛]0;pwned"),
    "a kind that is no text": ({"peft_type": ["LORA"]}, None, "peft_type=['LORA']: is no kind"),
    "a module that PEFT imports": ({"megatron_config": {}, "megatron_core": "os"}, None, "its megatron_config names"),
    "an expression without end": (
        {"target_modules": "(.+)+Z"}, None, "its expressions for names of modules take more than 0.2 s"
    ),
    "one among ranks": ({"rank_pattern": {"(.+)+Z": 4}}, None, "its expressions for names of modules take more"),
    "one among modules": ({"modules_to_save": ["(.+)+Z"]}, None, "its expressions for names of modules take more"),
    "no expression": ({"exclude_modules": "(("}, None, "exclude_modules: (( is no regular expression (missing ),"),
    "a rank of gigabytes": ({"r": 10**7}, None, "names the rank 10000000, and its matrices have up to 4."),
    "one of a module": ({"rank_pattern": {"q_proj": 10**7}}, None, "names the rank 10000000, and its matrices have"),
    "a rank that is none": ({"r": "4"}, None, "r=4: its ranks must be whole numbers."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_an_adapter_is_no_more_than_an_adapter(tmp_path, monkeypatch, case):
    """However it is named, and before a model loads."""
    monkeypatch.setattr(adapter_files, "PATTERN_SECONDS", 0.2)
    config, content, says = BAD_ADAPTERS[case]
    folder = bought(tmp_path / "sent", content, **config)
    for call, key in (
        (lambda: references.find(folder, "model.adapter", TINY_ID), "model.adapter"),
        (lambda: references.find_policy(folder, "runs", TINY_ID), "runs"),
        (lambda: references.find(f"{folder}/adapter", "judge.adapter"), "judge.adapter"),
    )[: 1 if "PATTERN" in says or "expressions" in says else 3]:
        assert refused(call).startswith(f"{key}={folder}{'/adapter' * ('judge' in key)}: {says}")


def test_an_adapter_of_a_training_is_one(tmp_path):
    """What is written by PEFT: a score head, whole modules, rows of an embedding, other kinds."""
    saved = {"base_model.model.lm_head.weight": (9, 8), "base_model.model.model.norm.weight": (8,)}
    row = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 8)}
    for shapes, config in (
        (LORA, {"target_modules": r".*\.(?:q|v)_proj", "rank_pattern": {"model.layers.0.self_attn.q_proj": 4}}),
        (LORA | {"base_model.model.score.weight": (1, 8)}, {"task_type": "SEQ_CLS"}),
        (LORA | saved, {"modules_to_save": ["lm_head", "norm"]}),
        (LORA | row, {"trainable_token_indices": [0]}),
        (LORA | {f"{Q}magnitude_vector": (8,)}, {"use_dora": True, "r": 2, "rank_pattern": {"q_proj": 4}}),
        ({f"{Q[:-5]}hada_w1_a": (8, 4)}, {"peft_type": "LOHA"}),
        ({"base_model.vera_A": (4, 8), f"{Q[:-5]}vera_lambda_b": (8,)}, {"peft_type": "VERA"}),
    ):
        (tmp_path / "w").write_bytes(tensors(shapes))
        given = {"peft_type": "LORA", "r": 4, "init_lora_weights": True, "layer_replication": None} | config
        assert adapter_files.flaw(given, tmp_path / "w") is None, config


def test_a_checkpoint_is_looked_at_as_an_adapter_is(tmp_path):
    folder = Path(bought(tmp_path / "ppo"))
    config = {"model": {"id": TINY_ID}, "trainer": {"_target_": "rlhf_recipes.ppo.PPOConfig"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "adapter").rename(tmp_path / "kept")
    (folder / "checkpoints").mkdir()
    (tmp_path / "kept").rename(folder / "checkpoints" / "checkpoint-2")
    assert [each.step for each in references.find_checkpoints(str(folder), TINY_ID)] == [2]
    (folder / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(tensors(LORA | {NORM: (8,)}))
    said = refused(references.find_checkpoints, str(folder), TINY_ID)
    assert said.startswith(f"checkpoints={folder}: checkpoint-2: holds {NORM}")


LIES = {
    "a header of an exabyte": struct.pack("<Q", 2**60) + b"{}",
    "a header of nothing": struct.pack("<Q", 0),
    "a header that is no JSON": struct.pack("<Q", 4) + b"[[[[",
    "a shape of petabytes": tensors(LORA, shape=[2**30, 2**20]),
    "a tensor behind the end": tensors(LORA, data_offsets=[0, 2**40]),
    "a tensor before the beginning": tensors(LORA, data_offsets=[-64, 64]),
    "tensors in one another": tensors(LORA, data_offsets=[0, 256]),
    "a type that is none": tensors(LORA, dtype="PICKLE"),
    "a shape that is a text": tensors(LORA, shape="os.system"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_of_weights_that_lies(tmp_path, lie):
    folder = bought(tmp_path / "sent", LIES[lie])
    said = refused(references.find, folder, "model.adapter", TINY_ID)
    assert (
        said == f"{folder}/adapter/adapter_model.safetensors: is cut off or damaged. Copy it again, or train it again."
    )


def test_what_peft_would_do_with_a_weight_of_the_base(tiny_model, tmp_path):
    """Why it is refused: it stays with the base when the adapter is off."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    shapes = {f"{Q}A.weight": (4, 64), f"{Q}B.weight": (64, 4), NORM: (64,)}
    folder = bought(tmp_path / "sent", tensors(shapes), task_type="CAUSAL_LM")
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    policy = PeftModel.from_pretrained(base, f"{folder}/adapter")
    with policy.disable_adapter():
        assert not policy(ids).logits.equal(before)


# ---- models and tokenizers


@pytest.fixture
def model(tiny_model, tmp_path):
    """model(file, **entries): the tiny model in a folder of its own, with other entries in a JSON file of it."""
    import shutil

    def made(file="config.json", **entries):
        folder = tmp_path / "sent-model"
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))
        return folder

    return made


def loads():
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM

    from rlhf_recipes import models

    return {
        "config": models.load_config,
        "empty": models.without_weights,
        "weights": lambda node: models.load_base(node, OmegaConf.create(), AutoModelForCausalLM),
    }


@pytest.mark.parametrize("what", ["config", "empty", "weights"])
@pytest.mark.parametrize("kind", ["attn", "experts"])
def test_a_kernel_that_a_model_names_is_not_fetched(compose, model, what, kind):
    folder = model(**{f"{kind}_implementation": "evil/kernel"})
    said = refused(loads()[what], compose("dpo", f"model.path={folder}").model)
    assert said == (
        f"model.path={folder}: its config.json names a kernel on the Hub, code that would be run here "
        f"({kind}_implementation: evil/kernel). Take it out."
    )


def test_a_kernel_that_a_reward_model_names_is_not_fetched(model):
    from rlhf_recipes.ppo import rewards

    folder = str(model(attn_implementation="evil/kernel"))
    args = SimpleNamespace(model_init_kwargs=None, device="cpu")
    assert refused(rewards._load_classifier, folder, args).startswith(
        f"reward_funcs={folder}: its config.json names a k"
    )


def test_a_model_that_trusts_itself_is_not_trusted(compose, model):
    own = {"AutoConfig": "own.OwnConfig"}
    folder = model(model_type="own", auto_map=own, trust_remote_code=True)
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    cfg = compose("dpo", f"model.path={folder}", "model.id=tests/own")
    assert "brings Python code of its own" in refused(loads()["config"], cfg.model)


@pytest.mark.parametrize("lie", ["a header of an exabyte", "a shape of petabytes", "a type that is none"])
def test_weights_of_a_model_that_lie(compose, model, lie):
    folder = model()
    (folder / "model.safetensors").write_bytes(LIES[lie])
    said = refused(loads()["weights"], compose("dpo", f"model.path={folder}").model)
    assert said.startswith(f"model.path={folder}: its weights are cut off or damaged (")


@pytest.fixture
def tokenizer():
    from test_others_text import make_tokenizer

    return lambda template: make_tokenizer([], template)


HI = [{"role": "user", "content": "Hi"}]
FAILING = {
    "divides by 0": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "adds a number to a text": ("{{ 'a' + 1 }}", "TypeError"),
    "calls itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "counts to 10^12": ("{% for i in range(10 ** 12) %}{% endfor %}", "OverflowError"),
    "formats what is not there": ("{{ '%d' % 'a' }}", "TypeError"),
    "refuses with escapes": (f"{{{{ raise_exception({json.dumps(ESCAPES)}) }}}}", "pwned"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_template_that_fails_drops_rows_and_is_no_bug(tokenizer, case):
    from jinja2 import TemplateError

    from rlhf_recipes.data import template
    from rlhf_recipes.data.fit import fit
    from rlhf_recipes.data.load import Splits

    written, says = FAILING[case]
    with pytest.raises(TemplateError, match=says):
        template.render(tokenizer(written), HI)
    row = {"prompt": HI, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [HI[0] | {"content": "b"}]}
    report = {"source": "s", "rows": 1, "dropped": {}, "examples": {}, "capped": {"train": 0, "test": 0}, "split": "t"}
    said = refused(fit, Splits([row], [row], report, "s"), tokenizer(written), None)
    assert says in said


def test_a_template_of_ours_that_is_called_wrongly_stays_a_bug(tokenizer):
    from rlhf_recipes.data import template

    with pytest.raises(TypeError):
        template.render(tokenizer("{{ 1 }}"), HI, nonsense={}, return_tensors=3, chat_template=5)


def test_templates_without_a_default_are_refused(tokenizer):
    from rlhf_recipes.data import template

    several = tokenizer("{{ 1 }}")
    several.chat_template = {"tool_use": "{{ 1 }}", f"rag{ESCAPES}": "{{ 2 }}"}
    assert "and none is the default. Name one of them default." in refused(template.bind, several, {})
    several.chat_template["default"] = "{{ 3 }}"
    assert template.render(template.bind(several, {}), HI, tokenize=False) == "3"


# ---- configs and cards that are YAML


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)


@pytest.mark.parametrize("written", [BOMB, "a: &a {b: *a}\n", "a: &a [*a]\n"])
def test_yaml_that_grows_is_not_read(tmp_path, compose, written):
    """Of a run, a constitution and a data set's card."""
    from rlhf_recipes.cai import constitution
    from rlhf_recipes.data import folders
    from rlhf_recipes.publish import contents

    (tmp_path / "config.yaml").write_text(written)
    (tmp_path / "README.md").write_text(f"---\nconfigs: []\n{written}---\n")
    (tmp_path / "train.jsonl").write_text("{}\n")
    for call in (
        lambda: run_folder.read_config(tmp_path),
        lambda: constitution.load(compose("cai", "constitution=local", f"constitution.path={tmp_path}/config.yaml")
                                  .constitution),
        lambda: folders.find(str(tmp_path)),
        lambda: contents._read("run=x", tmp_path / "config.yaml"),
    ):  # fmt: skip
        assert re.search(
            r"\((its aliases come to more than 100,000 entries|line \d: an alias of what it)", refused(call)
        )


def test_yaml_with_a_few_aliases_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a {b: 1}\nc: *a\nd: 'x *b* **c**'\n")
    assert run_folder.read_config(tmp_path) == {"a": {"b": 1}, "c": {"b": 1}, "d": "x *b* **c**"}


# ---- rows


def save_to_disk(folder, names=("data-00000-of-00001.arrow",), splits=None, spoil=lambda data: data):
    """What `DatasetDict.save_to_disk` writes of a split, or of one Dataset; `names` are those in its state.json."""
    import io

    import pyarrow as pa

    table = pa.table({"prompt": ["a" * 10, "b" * 10, "c" * 10]})
    written = io.BytesIO()
    with pa.ipc.new_stream(written, table.schema) as writer:
        writer.write_table(table)
    place = folder / "train" if splits else folder
    place.mkdir(parents=True)
    if splits:
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    (place / "state.json").write_text(json.dumps(state))
    features = {"prompt": {"dtype": "string", "_type": "Value"}}
    (place / "dataset_info.json").write_text(json.dumps({"features": features}))
    (place / "data-00000-of-00001.arrow").write_bytes(spoil(written.getvalue()))
    return str(folder)


@pytest.mark.parametrize(
    ("names", "splits", "says"),
    [
        (["../../private.arrow"], None, "state.json: ../../private.arrow: must be inside the folder."),
        (["/etc/hostname"], None, "state.json: /etc/hostname: must be inside the folder."),
        ([f"../{ESCAPES}"], ["train"], "must be inside the folder."),
        (["s3://elsewhere/data.arrow"], ["train"], "s3://elsewhere/data.arrow: must be inside the folder."),
        ([], ["../../private"], "dataset_dict.json: ../../private: must be inside the folder."),
    ],
)
def test_a_saved_data_set_names_no_file_elsewhere(tmp_path, names, splits, says):
    from rlhf_recipes.data import folders

    assert says in refused(folders.find, save_to_disk(tmp_path / "set", names, splits))


def test_a_saved_data_set_reads_no_memory_beside_its_own(tmp_path):
    from rlhf_recipes.data import folders

    assert [row["prompt"][0] for _, row in folders.find(save_to_disk(tmp_path / "good")).rows("train")] == [
        "a",
        "b",
        "c",
    ]
    ends = struct.pack("<4i", 0, 10, 20, 30), struct.pack("<4i", 0, 10, 2**30, 30)
    folder = save_to_disk(tmp_path / "bad", spoil=lambda data: data.replace(*ends))
    assert refused(folders.find, folder).startswith(f"{folder}: a damaged save_to_disk folder (ArrowInvalid")


@pytest.mark.parametrize("kind", ["parquet", "nested.parquet", "arrow"])
def test_a_text_that_many_rows_repeat_is_unpacked_in_parts(tmp_path, monkeypatch, kind):
    """Kilobytes on the disk, gigabytes as a thousand rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(readers, "LINE_LIMIT", 2 * MIB)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array(["a" * MIB]))
    path = tmp_path / f"rows.{kind}"
    if kind == "arrow":
        with pa.ipc.new_file(path, pa.schema([("prompt", texts.type)])) as writer:
            writer.write_batch(pa.record_batch([texts], names=["prompt"]))
    else:
        nested = pa.ListArray.from_arrays(pa.array(range(401), pa.int32()), texts)
        table = pa.table({"prompt": nested if kind.startswith("nested") else texts})
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**26)
    assert path.stat().st_size < 2 * MIB
    tracemalloc.start()
    try:
        assert sum(len(row["prompt"][0] if kind.startswith("nested") else row["prompt"]) == MIB
                   for _, row in readers.read_file(str(path))) == 400  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * MIB
    monkeypatch.setattr(readers, "LINE_LIMIT", MIB // 2)
    assert re.search(r":1: (a row|rows) of more than 0 MiB", refused(list, readers.read_file(str(path))))


def test_parquet_that_lies_about_its_size_is_not_kept(tmp_path, monkeypatch):
    """What a group of rows unpacks to is looked at once more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(readers, "LINE_LIMIT", MIB)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a" * (3 * MIB)]}), path, compression="zstd", use_dictionary=False)
    told, data = pq.read_metadata(path).row_group(0).total_byte_size, path.read_bytes()
    varint = bytearray()
    for place in range(5):  # of thrift: seven bits a byte, doubled for the sign
        varint.append(((2 * told) >> (7 * place) & 127) | (128 if (2 * told) >> (7 * place + 7) else 0))
        if varint[-1] < 128:
            break
    small = bytes([2 | 128, *[128] * (len(varint) - 2), 0])  # 1, as long
    assert bytes(varint) in data
    path.write_bytes(data.replace(bytes(varint), small))
    assert pq.read_metadata(path).row_group(0).total_byte_size == 1
    assert re.search(r":1: (a row|rows) of more than 1 MiB", refused(list, readers.read_file(str(path))))


def test_a_type_of_arrow_s_that_is_a_pickle_is_not_made(tmp_path):
    import pickle

    import pyarrow as pa

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    told = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload())}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=told)])
    with pa.ipc.new_file(tmp_path / "rows.arrow", schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a"])], schema=schema))
    assert [row for _, row in readers.read_file(str(tmp_path / "rows.arrow"))] == [{"prompt": "a"}]
    assert not (tmp_path / "ran").exists()


# ---- servers


def drips(handler, head=False):
    """An answer a byte at a time, for as long as a client of this test can wait."""
    for _ in range(40):
        time.sleep(0.05)
        yield b"X-Slow: 1\r\n" if head else b" "
    yield b"" if head else json.dumps(test_limits.completion()).encode()


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_answer_that_drips_is_not_waited_for(endpoint, part):
    """Each byte is in time; httpx's limit begins anew with it."""

    def answer(handler):
        if part == "body":
            return 200, {}, drips(handler)
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
        for chunk in drips(handler, head=True):
            handler.wfile.write(chunk)
        return 200, {}, []

    endpoint.answer = answer
    assert "no answer in time (timeout=0.3)" in refusal(endpoint, timeout=0.3, max_attempts=1)


def test_gzip_in_gzip_is_read_no_further(endpoint):
    import gzip

    once = test_limits.bomb(50 * MIB)
    endpoint.answer = lambda handler: (200, {"Content-Encoding": "gzip, gzip"}, [gzip.compress(once, 9)])
    tracemalloc.start()
    try:
        assert re.search(r"more than \d\.\d MiB", refusal(endpoint))
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
    finally:
        tracemalloc.stop()


def served(told):
    """The part of `Served` that reads answers, at an endpoint that gives this one."""
    from rlhf_recipes.evaluation.served_policies import Served

    made = object.__new__(Served)
    made.host, made.names, made.model = "host", {None: "base"}, "base"
    made._told = lambda *_, **__: told
    made._completions = lambda folder, bodies, what: [(0, made._choice(told), {})]
    return made


CHOICE = {"text": "a", "token_ids": [5]}


@pytest.mark.parametrize(
    "choice",
    [
        None, 7, "a", [CHOICE], {}, {"text": 7}, {"text": None}, CHOICE | {"token_ids": "5"},
        CHOICE | {"token_ids": [-1]}, CHOICE | {"token_ids": [10**30]}, CHOICE | {"token_ids": [True]},
        CHOICE | {"token_ids": [5.0]}, CHOICE | {"token_ids": {"a": 1}},
    ],
)  # fmt: skip
def test_a_completion_of_another_shape_is_one_line(choice):
    from rlhf_recipes import inference

    made = served({"choices": [choice]})
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "a")
    made.stops, made._encode = [], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "encode", lambda *_: ([1], 1))
        how = SimpleNamespace(max_new_tokens=1, temperature=0.0, seed=1)
        said = refused(made.generate, None, tokenizer, [HI], how, "test")
    assert said.startswith("host: ") and said.endswith("See that generator.base_url is right.")


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), None, True, 0.5, [], {}])
def test_a_log_probability_of_a_prompt_that_is_none_is_one_line(value):
    listed = [None, {"6": {"logprob": value}}]
    made = served({"choices": [CHOICE | {"prompt_logprobs": listed}]})
    said = refused(made.token_logps, None, None, [([5, 6], 1)], "test")
    assert said == "host: log-probabilities of other tokens than were sent. See its log."


@pytest.mark.parametrize("data", [7, "ab", {"id": "a"}, [7, None, "a"], None])
def test_a_list_of_models_that_is_none_is_empty(data):
    assert served({"data": data})._cards() == {}


def test_what_an_endpoint_calls_an_adapter_is_shown_as_text(tmp_path, capsys):
    from rlhf_recipes.evaluation import served_policies

    folder = Path(bought(tmp_path / "dpo")) / "adapter"
    made = served({})

    def told(*_, **__):
        raise served_policies._Rejected("no")

    made._told = told
    cards = {"a": {"root": 7}, "b": {"root": "x\0"}, ESCAPES: {"root": str(folder)}}
    assert made._adapter(str(folder), cards) == ESCAPES
    out = capsys.readouterr().out
    assert "pwned" in out and "\x1b" not in out and "\u202e" not in out


# ---- the Hub


@pytest.mark.parametrize("name", ["../../../../../evil.json", "{}/evil.json", "a/../../../../../../evil.json"])
def test_a_file_name_of_the_hub_leads_nowhere(name, tmp_path, monkeypatch):
    """What is downloaded lies in the cache, whatever a repository calls its files."""
    import hub_server
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from rlhf_recipes.publish import upload

    hub = hub_server.start()
    monkeypatch.setenv("NO_PROXY", "*")
    for key, value in (
        ("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
    ):  # fmt: skip
        monkeypatch.setattr(constants, key, value)
    monkeypatch.setattr(upload, "WAIT_SECONDS", 0.0)
    close_session()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    hub.put("evil/x", None, **{name.format(tmp_path): b"{}", "good.json": b"{}"})
    target = SimpleNamespace(repo_id="evil/x", repo_type="model")
    try:
        upload.download(target, "main", tmp_path / "deep" / "er" / "cache", ["good.json", name.format(tmp_path)])
    except Exception as error:  # huggingface_hub's own, of no one kind
        assert not isinstance(error, AssertionError)
    finally:
        close_session()
        hub.shutdown()
        hub.server_close()
    assert hub.seen["resolve"] or hub.seen["tree"] or hub.seen["info"]
    outside = [path for path in tmp_path.rglob("evil.json") if "cache" not in path.parts]
    assert not outside and not Path("evil.json").exists()


# ---- pages


def test_no_template_of_a_page_lets_markup_through():
    """`drawing.rendered` escapes every value; nothing turns that off but figures of our own."""
    files = sorted((ROOT / "rlhf_recipes").rglob("*.jinja"))
    assert len(files) >= 4
    for file in files:
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", file.read_text(encoding="utf-8")), file
    code = {file: file.read_text(encoding="utf-8") for file in (ROOT / "rlhf_recipes").rglob("*.py")}
    assert [file.name for file, text in code.items() if "import Markup" in text] == ["drawing.py"]
    assert [file.name for file, text in code.items() if "jinja2.Environment(" in text] == ["drawing.py"]


def test_the_page_of_the_rounds_shows_text(tmp_path):
    from rlhf_recipes.launch import rounds_page
    from rlhf_recipes.stats import Estimate

    said = f'"><script>alert(1)</script><img src=x onerror=alert(2)>{ESCAPES}'
    share = Estimate(0.6, 0.5, 0.7, 20, 20)
    gate = {"words": said, "found": share, "limit": 0.5, "key": said, "side": said, "state": "fails", "why": said}
    each = {"round": 1, "policy": said, "judge": share, "kl": share, "gates": [SimpleNamespace(**gate)], "labels": []}
    found = {"rounds": [each], "asked": 2, "stopped": {"round": 1, "gate": said, "why": said, "words": said},
             "keep": said, "anchor": said}  # fmt: skip
    rounds_page.write(found, tmp_path / "rounds.html")
    html = (tmp_path / "rounds.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)


# ---- what phones home


QUIET = """
import os, sys
from importlib import import_module
for name in ("sft", "dpo", "ppo", "cai", "evaluate", "audit", "label", "publish", "pipeline"):
    import_module(f"rlhf_recipes.recipes.{name}")
from rlhf_recipes import run
assert not {"huggingface_hub", "transformers", "torch", "trl"} & set(sys.modules), "imported before it is said"
run.environment()
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
sent = []
_telemetry._start_telemetry_thread = lambda: sent.append("thread")
_telemetry.send_telemetry("trl/x")
print(constants.HF_HUB_DISABLE_TELEMETRY, sent, os.environ.get("DO_NOT_TRACK"))
"""


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "True [] 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False ['thread'] None"),
     ({"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "0"}, "True [] 1")],
)  # fmt: skip
def test_nothing_phones_home_unless_the_user_says_so(clean_env, given, says):
    """The libraries read it when they are imported: it is set before."""
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    env = {key: value for key, value in clean_env.items() if key not in names} | given
    done = subprocess.run([sys.executable, "-c", QUIET], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == says, done.stderr


def test_no_tracker_is_told_unless_it_is_chosen(compose):
    """transformers would call every tracker that is installed; TRL's default names none either way."""
    from rlhf_recipes.methods import METHODS

    for recipe in METHODS:
        assert compose(recipe).trainer.report_to == "none"
