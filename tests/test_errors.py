"""What is one line, and what keeps its traceback."""

import errno
import os
import pickle

import pytest

from rlhf_recipes.errors import Refusal
from rlhf_recipes.evaluation import judges
from rlhf_recipes.launch.refusals import OneLine, as_refusal

PROMPTS = [{"prompt": [{"role": "user", "content": "Hm?"}], "prompt_id": str(i)} for i in range(2)]
ANSWERS = {"own": [{"text": "a"}, {"text": "b"}], "parent": [{"text": "c"}, {"text": "d"}]}


def unpack():
    first, second = (1, 2, 3)
    return first, second


BUGS = [
    (lambda: list(zip([1], [], strict=True)), "zip() argument 2 is shorter"),
    (unpack, "too many values to unpack"),
    (lambda: int("x"), "invalid literal for int()"),
    (lambda: {}["kto"], "KeyError: 'kto'"),
]


@pytest.mark.parametrize(("bug", "message"), BUGS)
@pytest.mark.parametrize("config_name", [None, "dpo"])
def test_a_bug_keeps_its_traceback_and_says_that_it_is_one(bug, message, config_name, capsys):
    with pytest.raises(SystemExit) as exit, OneLine(config_name):
        bug()
    said = capsys.readouterr().err
    assert exit.value.code == 1
    assert "Traceback" in said and message in said and "test_errors.py" in said
    assert said.splitlines()[-1].startswith("note: this is a bug of rlhf-recipes")


def test_what_a_library_raises_names_the_library(capsys):
    """It may be about a setting of the user's that nobody foresaw."""
    from omegaconf import OmegaConf

    with pytest.raises(SystemExit) as exit, OneLine():
        OmegaConf.create({"a": "${b}"}).a  # noqa: B018
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1
    assert last.startswith(
        "note: omegaconf raised it. If it does not speak of a setting or a file of yours, this is a"
    )


@pytest.mark.parametrize("config_name", [None, "dpo"])
def test_a_refusal_is_one_line(config_name, capsys):
    with pytest.raises(SystemExit) as exit, OneLine(config_name):
        raise Refusal("data.path=x.csv: no such file. Check the path.")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: data.path=x.csv: no such file. Check the path.\n"


def test_a_config_that_is_read_wrongly_inside_a_run_is_a_bug_and_a_command_that_is_wrong_is_none():
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError

    cfg = OmegaConf.create({"a": 1})
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(ConfigAttributeError) as raised:
        cfg.b  # noqa: B018
    assert as_refusal(raised.value) is None
    assert as_refusal(raised.value, "dpo")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_file_that_could_not_be_written_is_one_line(code):
    """Of an open file nobody tells the name."""
    said = as_refusal(OSError(code, os.strerror(code)))
    assert said and os.strerror(code) in said and said.endswith("free space, then run the same command again.")


def test_a_refusal_survives_pickling():
    """Launchers send it from one process to another."""
    sent = Refusal("model.id=x: no such model. Check it.")
    came = pickle.loads(pickle.dumps(sent))
    assert type(came) is Refusal and str(came) == str(sent)


def too_few(prompts, first, second):
    return [0.5]


def no_probability(prompts, first, second):
    return [0.5, 7]


def broken(prompts, first, second):
    return [1 / 0 for _ in prompts]


@pytest.mark.parametrize(
    ("judge", "rule"),
    [
        (too_few, r"judge_function=too_few: gave 1 probabilities for 2 pairs"),
        (no_probability, r"judge_function=no_probability: gave 7"),
        (broken, r"judge_function=broken: raised ZeroDivisionError: division by zero \(.*test_errors.py:\d+\)"),
        (len, r"judge_function=len: raised TypeError: len\(\) takes exactly one argument \(3 given\)\. Mend"),
    ],
)
def test_a_judge_function_is_refused_by_name(judge, rule):
    with pytest.raises(Refusal, match=rule):
        judges.by_function(judge, PROMPTS, ANSWERS, "own", "parent")
