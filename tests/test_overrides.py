"""Names of files and folders through our command line, Hydra's grammar and a shell."""

import random
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf_recipes.launch.recipe import spelled_out
from rlhf_recipes.overrides import SIMPLE, quoted, written


def read(typed):
    """The value that Hydra reads; of a sweep, the values of its jobs as a tuple."""
    override = OverridesParser.create().parse_override(quoted(typed))
    if not override.is_sweep_override():
        return override.value()
    return tuple(
        OverridesParser.create().parse_override(f"k={each}").value() for each in override.sweep_string_iterator()
    )


NAMES = [
    "outputs/dpo/dpo_beta/beta=0.1", "my runs/a", "a(1)", "C:/x", "a#b", "~/x", "a{b}", "a[b]", "-x", "it's", 'a"b',
    "a\\b", "ends\\", '\\"', "é/ü", "a;b&c", "<x>", "x=", "a==b", "$HOME", "a|b*?", "..", "a%20b@c+d",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_typed(name):
    assert read(f"run={name}") == name
    assert read(f"+run={name}") == name
    if not set("[]{}\\") & set(name):  # they have a meaning in a list
        assert read(f"runs=[{name},b]") == [name, "b"]


@pytest.mark.parametrize("name", [*NAMES, "a,b", "null", "True", "5", "1e-3", " lead", "two  spaces", "inf", ".5"])
def test_what_is_printed_can_be_pasted(name):
    assert read(*shlex.split(written("run", name))) == name
    assert read(*shlex.split(written("runs", [name, "b"]))) == [name, "b"]


def test_plain_names_are_printed_plainly():
    assert written("run", "outputs/dpo/dpo_beta/beta=0.1") == "run=outputs/dpo/dpo_beta/beta=0.1"
    assert written("runs", ["outputs/dpo/main"]) == "'runs=[outputs/dpo/main]'"


def test_a_comma_parts_jobs_and_members_but_not_a_name_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("kl=1,clip=2", "a,b"):
        (tmp_path / name).mkdir()
    assert read("model.adapter=a/beta=0.1,a/beta=0.3") == ("a/beta=0.1", "a/beta=0.3")
    assert read("run=kl=1,clip=2") == "kl=1,clip=2" and read("run=a,b") == "a,b"
    assert read("runs=[kl=1,clip=2,a,b,c]") == ["kl=1,clip=2", "a,b", "c"]
    assert read("run=kl=1,clip=2,a,b") == ("kl=1,clip=2", "a,b")


@pytest.mark.parametrize(
    "typed",
    [
        "-m", "--cfg=job", "run_name=x", "trainer.beta=0.1,0.2", "data=a,b", "runs=[a,b]", "lora.rank_pattern={q: 8}",
        "trainer.loss_type=[sigmoid,sft]", "x=${y}", "run='a b'", 'run="a=b"', "x=null", "x=choice(1,2)", "~tracker",
        "x=",
        # what is wrong with it, Hydra says
        "x=,b=", "x={a:1", "x=[a", "x='a", "x", "lora.rank_pattern={q=8}",
    ],
)  # fmt: skip
def test_what_hydra_takes_or_explains_is_left_to_it(typed):
    assert quoted(typed) == typed


def test_the_command_line():
    given = ["preflight=true", "run=a/beta=0.1", "-m"]
    assert spelled_out(given) == ["preflight.only=true", 'run="a/beta=0.1"', "-m"]


def test_what_hydra_is_not_asked_about_it_takes():
    drawn, parser = random.Random(0), OverridesParser.create()
    for _ in range(200):
        value = "".join(drawn.choices("ab1_./:@%+-9eEtrufnlis", k=drawn.randint(1, 7)))
        typed = f"{drawn.choice(['a', 'trainer.b_1', '+a', '++_.b2'])}={value}"
        assert SIMPLE.fullmatch(typed)
        assert parser.parse_override(typed).input_line == quoted(typed) == typed
