"""What a recipe tells its user to type next."""

import pytest

from rlhf_recipes import commands


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(commands.TYPED, raising=False)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("recipes/dpo.py", "python recipes/audit.py"),
        ("../checkout/recipes/dpo.py", "python ../checkout/recipes/audit.py"),
        ("dpo.py", "python audit.py"),
        ("/site-packages/rlhf_recipes/recipes/dpo.py", "python -m rlhf_recipes.recipes.audit"),  # python -m
    ],
)
def test_the_next_command_is_spelled_like_the_running_one(program, expected, monkeypatch):
    monkeypatch.setenv(commands.TYPED, "")  # so that what `remember` sets is undone
    monkeypatch.delenv(commands.TYPED)
    commands.remember(program)
    assert commands.command("audit") == expected
    assert commands.as_typed("open x; python recipes/audit.py run={dir}") == f"open x; {expected} run={{dir}}"


def test_a_console_script_is_named_alone_where_the_shell_finds_it(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "rlhf-dpo"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    for path, expected in ((str(script.parent), "rlhf-audit"), ("/nowhere", str(script.with_name("rlhf-audit")))):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv(commands.TYPED, "")
        monkeypatch.delenv(commands.TYPED)
        commands.remember(str(script))
        assert commands.command("audit") == expected


def test_the_stages_of_a_pipeline_spell_it_like_the_pipeline(monkeypatch):
    monkeypatch.setenv(commands.TYPED, "rlhf-{}")  # what a child inherits
    commands.remember("/site-packages/rlhf_recipes/recipes/dpo.py")
    assert commands.command("audit") == "rlhf-audit"
