"""A labelling from its start to its end: whose it is, what is shown, what is said and written when it stops."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes.cai.load import refuse_unread
from rlhf_recipes.commands import command
from rlhf_recipes.errors import Refusal
from rlhf_recipes.labelling import agreement, plan, server, written
from rlhf_recipes.labelling.choices import Choices, Session
from rlhf_recipes.labelling.pairs import Pair
from rlhf_recipes.overrides import of_this_run
from rlhf_recipes.overrides import written as typed
from rlhf_recipes.run import CHOICES, Run
from rlhf_recipes.signals import TakenBack
from rlhf_recipes.text import line

NAME = re.compile(r"\w(?:[\w .@+-]{0,38}[\w.])?")
TAKEN = ("data",)  # what an audit calls the labels that pairs come with


def check(cfg: DictConfig) -> list[str]:
    """Who labels.

    Raises:
        Refusal: a name that is none, twice there or taken; shares of more than all pairs; a single sample; or a
            setting that the generator does not read.
    """
    names = [cfg.annotator] if isinstance(cfg.annotator, str) else list(cfg.annotator)
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN:
            raise Refusal(
                f"annotator={name}: must be a name of up to 40 letters and digits, not data. Choose another."
            )
        if names.count(name) > 1:
            raise Refusal(f"annotator={name}: is there twice. Leave one out.")
    if not names:
        raise Refusal("annotator=[]: nobody labels. Give a name.")
    if cfg.twice + cfg.swapped > 1:
        raise Refusal(
            f"twice={cfg.twice} swapped={cfg.swapped}: no pair is shown three times. Give 1 together at most."
        )
    if cfg.samples < 2:
        raise Refusal(f"samples={cfg.samples}: makes no pair of answers. Give 2 at least.")
    refuse_unread(cfg, "label")
    return names


def collect(run: Run, cfg: DictConfig, pairs: list[Pair], people: list[str]) -> None:
    """Show the page until nothing is left or it is interrupted.

    Raises:
        Refusal: pairs that were labelled in this run are not there any more.
        KeyboardInterrupt: Ctrl-C, with what is left; every choice is kept.
    """
    choices = Choices(run.dir / CHOICES)
    _refuse_lost(choices, pairs, cfg.pairs)
    choices.turn(pairs)
    clusters = agreement.clusters_of(pairs)

    def changed() -> None:
        written.write(run.dir, pairs, choices)

    changed()
    sessions = {
        name: Session(name, plan.items(pairs, name, cfg.twice, cfg.swapped, cfg.seed), choices, changed)
        for name in people
    }
    try:
        if any(session.left for session in sessions.values()):
            server.serve(cfg.host, cfg.port, sessions, lambda said: print(said, flush=True))
    except TakenBack:
        raise
    except KeyboardInterrupt:
        if any(session.left for session in sessions.values()):
            print(f"\n{line_by_line(agreement.describe(choices, clusters))}", flush=True)
            raise KeyboardInterrupt(_interrupted(sessions)) from None
    figures = agreement.figures(choices, clusters)
    run.write_result(run.record(main=_main(choices, clusters), labels={"pairs": len(pairs), **figures}))
    print(f"\n{line_by_line(agreement.describe(choices, clusters))}\n{_next(run)}", flush=True)


def line_by_line(text: str) -> str:
    return "\n".join(map(line, text.split("\n")))


def _refuse_lost(choices: Choices, pairs: list[Pair], source: str) -> None:
    there = {pair.id for pair in pairs}
    lost = {each["pair"] for made in choices.kept.values() for each in made.values()} - there
    if lost:
        raise Refusal(
            f"pairs={source}: lacks {len(lost)} of the pairs that this run has labelled. Give what it had, or choose "
            "another run_name."
        )


def _main(choices: Choices, clusters: Mapping[str, str]) -> dict[str, Any]:
    return {"name": "same_choice_again", "before": None, "after": agreement.of_everybody(choices, clusters)}


def _interrupted(sessions: dict[str, Session]) -> str:
    said = ", ".join(f"{line(name)} {each.done} of {len(each.items)}" for name, each in sessions.items())
    return f"Labelled: {said}; every choice is kept. It goes on with: {command('label')} {shlex.join(of_this_run())}"


def _next(run: Run) -> str:
    preferences, judgements = run.dir / written.PREFERENCES, run.dir / written.JUDGEMENTS
    return "\n".join(
        (
            f"  pairs     {line(preferences)}\n  words     {line(judgements)}",
            f"  next      {command('dpo')} data=local {typed('data.path', str(preferences))}",
            f"            {command('audit')} reward_model=<run> {typed('judgements', [str(judgements)])}",
        )
    )
