"""What files and answers of others get that no other test file tries; attacks.md lists every attack, and is held to.

Nothing here trains: an attack is met before that, or in a call of its own.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_adapter_files import ESCAPES, LIES, refused

from rlhf_recipes import run_folder

TESTS = Path(__file__).parent


# ---- the list


ROWS = re.compile(r"^\| (\w+) \| (.+?) \| ([\w ,]+) \| `(\w+\.py)::(\w+)` \|$", re.MULTILINE)
BY = ("config", "model", "adapter", "tokenizer", "row", "page", "server", "hub")
GETS = ("refused", "not run", "ended", "cut", "dropped", "escaped", "said", "nothing")


@pytest.mark.slow
def test_the_list_names_attacks_of_every_kind_and_tests_that_are_there():
    text = (TESTS / "attacks.md").read_text(encoding="utf-8")
    rows = ROWS.findall(text)
    assert len(rows) == sum(line.startswith("| ") for line in text.splitlines()) - 2, "a row that is not read"
    assert len(rows) >= 60 and len({row[:2] for row in rows}) == len(rows)
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

    from rlhf_recipes import model_files, models

    return {
        "config": model_files.load_config,
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


@pytest.mark.parametrize("what", ["config", "empty", "weights"])
@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 1e300},
        {"vocab_size": 10**300},
        {"text_config": {"head_dim": 10**9}},
    ],
)
def test_a_size_that_no_model_has_is_refused(compose, model, what, entries):
    """Before a list or a module is made for each layer."""
    folder = model(**entries)
    said = refused(loads()[what], compose("dpo", f"model.path={folder}").model)
    assert said.startswith(f"model.path={folder}: its config.json says ") and "more than any model has" in said


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


@pytest.mark.slow
def test_a_trainer_writes_into_its_run_s_folder_alone(compose):
    """transformers removes what is called checkpoint-*, whoever wrote it, in the folder that it is given."""
    from rlhf_recipes.launch import keys
    from rlhf_recipes.methods import METHODS

    for recipe, method in METHODS.items():
        rewards = ["reward_funcs=json:loads"] if method.samples else []
        said = refused(keys.check, compose(recipe, "trainer.output_dir=/somebody/project", *rewards), recipe)
        assert said.startswith("trainer.output_dir=/somebody/project: a trainer writes, and removes old checkpoints,")


def test_yaml_with_a_few_aliases_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a {b: 1}\nc: *a\nd: 'x *b* **c**'\n")
    assert run_folder.read_config(tmp_path) == {"a": {"b": 1}, "c": {"b": 1}, "d": "x *b* **c**"}


# ---- results


@pytest.mark.parametrize("value", ["<script>", [1], {"a": 1}, True, 10**400])
@pytest.mark.parametrize("key", ["value", "low", "high", "n", "clusters"])
def test_an_estimate_without_numbers_is_none(tmp_path, key, value):
    """Of a result.json: what computes with it would not say whose fault it is."""
    from rlhf_recipes.ppo import rewards
    from rlhf_recipes.stats import Estimate

    good = {"value": 0.5, "low": None, "high": 1, "n": 3, "clusters": 2}
    (tmp_path / "result.json").write_text(json.dumps({"mean_reward": good, "sd_reward": good | {key: value}}))
    found = run_folder.read_result(tmp_path)
    assert isinstance(found["mean_reward"], Estimate) and not isinstance(found["sd_reward"], Estimate)
    assert rewards._scale(found) is None


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
             "ended": {"stage": said, "says": said}, "keep": said, "anchor": said}  # fmt: skip
    for stopped in (found["stopped"], None):
        rounds_page.write(found | {"stopped": stopped}, tmp_path / "rounds.html")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "says"), [({}, "True [] 1"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False ['thread'] None")]
)
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


# ---- what is known of the packages


def test_advisories_are_named_or_accepted_with_a_reason(monkeypatch, capsys):
    import advisories

    flaw = {"id": "GHSA-1", "aliases": ["CVE-1"], "fix_versions": ["2.1", "3.0"]}
    other = {"id": "X", "fix_versions": []}
    report = {
        "dependencies": [{"name": "a", "version": "2.0", "vulns": [flaw, other]}, {"name": "b", "skip_reason": ""}]
    }
    monkeypatch.setattr(advisories, "ask", lambda: (report, ""))
    assert advisories.main() == 1
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        "advisories: a 2.0: GHSA-1, mended in 2.1, 3.0",
        "advisories: a 2.0: X, mended in no release",
    ]
    assert all(len(why) > 20 for why in advisories.ACCEPTED.values())
    monkeypatch.setattr(advisories, "ACCEPTED", {"CVE-1": "not called", "X": "not built"})
    assert advisories.main() == 0
    assert "2 accepted, see tests/advisories.py; nothing is known of b" in capsys.readouterr().out


def test_without_an_index_that_knows_nothing_fails(monkeypatch, capsys, tmp_path):
    import advisories

    monkeypatch.setattr(advisories, "TOOL", tmp_path / "none")
    done = subprocess.CompletedProcess([], 1, "", "x\nConnectionError: no")
    for found in (None, done):
        monkeypatch.setattr(advisories, "_run", lambda *_, found=found: found)
        assert advisories.main() == 0
        assert capsys.readouterr().out == "advisories: not looked at, pip-audit cannot be installed from here.\n"
    (tmp_path / "none").mkdir()
    assert advisories.main() == 0 and "does not answer (ConnectionError: no)" in capsys.readouterr().out
    done.stdout = json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}]})
    assert advisories.main() == 0
    assert capsys.readouterr().out == "advisories: not looked at, the index tells of none of 1 packages.\n"
