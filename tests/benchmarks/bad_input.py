"""Bad input by class of mistake: how many cases the tests have, and what each of them ended in.

    python tests/benchmarks/bad_input.py [--only runs]

Runs the tests that hold such cases and watches how they end: a recipe's process by its exit status and what it says, a
call within a test by the refusal that it raises, which a command prints on one line and exits with 2. A case is a
process, or a refusal by its text. Exits with 1 where a test fails or a case ends otherwise.
"""

import argparse
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS.parent))

from rlhf_recipes.errors import Refusal  # noqa: E402 - of this tree, wherever it is started

# Class of mistake -> the tests that have its cases; where several match, the longest decides.
CLASSES = {
    "keys, options, values": ("test_bad_input.py::test_keys", "test_bad_input.py::test_arguments", "test_settings.py",
                              "test_overrides.py", "test_conf.py", "test_cai_layout.py", "test_errors.py",
                              "test_tracker.py", "test_ranks.py", "test_cards.py"),
    "secrets in a config": ("test_bad_input.py::test_a_literal_secret", "test_secrets.py", "test_planted_secrets.py"),
    "code that nobody asked for": ("test_code.py", "test_holds.py", "test_attacks.py"),
    "files and rows": ("test_bad_input.py::test_data", "test_data.py", "test_readers.py", "test_texts.py",
                       "test_recognise.py", "test_hostile_rows.py", "test_limits.py", "test_account.py",
                       "test_cai_data.py", "test_kto.py"),
    "runs, adapters, checkpoints": ("test_bad_input.py", "test_run_folder.py", "test_references.py",
                                    "test_adapter_files.py", "test_kept_runs.py"),
    "models and templates": ("test_bad_input.py::test_nf4", "test_embedded.py", "test_template.py",
                             "test_cai_local.py", "test_preference.py"),
    "disks and folders": ("test_bad_input.py::test_a_place", "test_bad_input.py::test_a_read_only",
                          "test_bad_input.py::test_a_full", "test_faults.py"),
    "the Hub": ("test_bad_input.py::test_no_network", "test_bad_input.py::test_a_gated",
                "test_bad_input.py::test_a_data_set", "test_bad_input.py::test_a_model_that_is_nowhere", "test_hub.py",
                "test_hub_faults.py", "test_hub_ids.py"),
    "publishing": ("test_publish.py", "test_publish_files.py", "test_publish_private.py"),
    "servers": ("test_cai_server.py", "test_ppo_server.py", "test_hostile_servers.py"),
    "evaluate, rewards": ("test_bad_input.py::test_evaluate", "test_measure.py", "test_evaluation_summary.py",
                          "test_cai_reward.py", "test_ppo.py"),
    "audit, judges, labels": ("test_audit", "test_cai_judge.py", "test_label.py"),
    "pipelines, sweeps, preflight": ("test_bad_input.py::test_pipeline", "test_stages.py", "test_rounds.py",
                                     "test_sweep.py", "test_preflight.py"),
}  # fmt: skip
HAS_CASES = re.compile(r"refus|returncode == 2|raises\(")
ENDS = ("exit 2, one line", "exit 2, more", "exit 1", "refusal")


def class_of(test: str) -> str:
    fits = {len(start): name for name, starts in CLASSES.items() for start in starts if test.startswith(start)}
    return fits[max(fits)]


def is_one_line(stderr: str) -> bool:
    """Whether a process said one error, last of all, and showed no traceback."""
    lines = stderr.strip().splitlines() or [""]
    return [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in stderr


class Watch:
    """A plugin of pytest that leaves out what has no case of these classes, and notes the ends of the rest."""

    def __init__(self, wanted: list[str]):
        self.wanted, self.test, self.failed = wanted, "", 0
        self.ends: dict[str, Counter] = {name: Counter() for name in wanted}
        self.seen: set[tuple[str, str]] = set()
        self.others: list[str] = []

    def pytest_collection_modifyitems(self, items):
        items[:] = [
            item
            for item in items
            if HAS_CASES.search(inspect.getsource(item.function))
            and class_of(f"{item.path.name}::{item.name}") in self.wanted
        ]

    def pytest_runtest_setup(self, item):
        self.test = f"{item.path.name}::{item.name}"

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed

    def process(self, arguments: list, code: int, stderr: str) -> None:
        """A recipe's process has ended. What ended well, by a signal or by a gate is no case."""
        if any("rlhf_recipes.recipes." in str(each) for each in arguments) and code in (1, 2):
            end = "exit 1" if code == 1 else f"exit 2, {'one line' if is_one_line(stderr) else 'more'}"
            self.ends[class_of(self.test)][end] += 1
            if end != "exit 2, one line":
                self.others.append(f"{self.test}: exit {code}: {(stderr.strip().splitlines() or ['nothing'])[-1]}")

    def refusal(self, error: BaseException | None) -> None:
        if isinstance(error, Refusal) and (self.test, str(error)) not in self.seen:
            self.seen.add((self.test, str(error)))
            self.ends[class_of(self.test)]["refusal"] += 1


def attach(watch: Watch) -> None:
    """Have it told of every process that a test waits for, and of every exception that one expects."""
    communicate, leave = subprocess.Popen.communicate, pytest.RaisesExc.__exit__

    def communicated(process, *args, **kwargs):
        said = communicate(process, *args, **kwargs)
        watch.process(process.args if isinstance(process.args, list) else [], process.returncode, said[1] or "")
        return said

    def left(context, kind, error, trace):
        watch.refusal(error)
        return leave(context, kind, error, trace)

    subprocess.Popen.communicate, pytest.RaisesExc.__exit__ = communicated, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="classes whose name has this")
    asked = parser.parse_args()
    wanted = [name for name in CLASSES if asked.only in name]
    names = {test.partition("::")[0] for name in wanted for test in CLASSES[name]}
    files = sorted(str(file) for name in names for file in TESTS.glob(name if name.endswith(".py") else f"{name}*.py"))
    watch = Watch(wanted)
    attach(watch)
    pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), *files], plugins=[watch])
    total = sum(watch.ends.values(), Counter())
    print(f"\n| class of mistake | cases | {' | '.join(ENDS)} |\n| {' | '.join(['---'] * (len(ENDS) + 2))} |")
    for name, ends in {**watch.ends, "all": total}.items():
        print(f"| {name} | {ends.total()} | {' | '.join(str(ends[end]) for end in ENDS)} |")
    print(*watch.others, f"{watch.failed} tests failed.", sep="\n")
    sys.exit(int(watch.failed > 0 or total["exit 2, more"] > 0))


if __name__ == "__main__":
    main()
