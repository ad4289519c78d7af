"""How long the figures of an audit take, and how much memory, once the scores are there.

    python tests/benchmarks/audit_speed.py --pairs 2500 10000

Invented pairs: a train and a held-out set of each size, four reward models and two judges that err at random. Scores
come from a table instead of models; all else is what `recipes/audit.py` does, each size in a process of its own.
"""

import argparse
import datetime
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

MEMBERS, FEATURES = 4, 576
FAMILIES = ("bills", "bookings", "moves", "pain", "anger", "questions", "access", "secrets")
WORDS = [f"word{n}" for n in range(2000)]


class Scores:
    """In place of `scoring.Ensemble`: a noisy reward for each member, a function of the text alone."""

    def __init__(self, *_):
        self.noise = np.random.default_rng(0).normal(size=(MEMBERS, 4096))
        self.features = np.random.default_rng(1).normal(size=(4096, FEATURES)).astype(np.float32)

    def score(self, conversations, part, features=False, first_alone=False, kept=slice(None)):
        from rlhf_recipes.audit.scoring import Scored

        texts = [turns[-1]["content"] for turns in conversations]
        slots = [hash(text) % 4096 for text in texts]
        better = np.array([text.startswith("good") for text in texts], dtype=float)
        rewards = better + self.noise[: 1 if first_alone else MEMBERS, slots]
        return Scored(rewards, self.features[slots] if features else None)


def pairs(count: int, kind: str) -> list[dict]:
    dice, rows = random.Random(kind), []
    for n in range(count):
        said = [" ".join(dice.choices(WORDS, k=dice.randint(20, 60))) + ". " + kind for _ in range(3)]
        turns = [{"role": "user", "content": said[0]}]
        chosen, rejected = ([{"role": "assistant", "content": f"{how} {text}"}]
                            for how, text in (("good", said[1]), ("bad", said[2])))  # fmt: skip
        rows.append({"prompt": turns, "chosen": chosen, "rejected": rejected, "family": dice.choice(FAMILIES),
                     "prompt_id": f"{kind}{n}", "p": None})  # fmt: skip
    return rows


def judged(rows: list[dict]) -> list[dict]:
    from rlhf_recipes.audit import judgements

    dice, found = random.Random(2), judgements.from_pairs(rows)
    return [{**each, "judge": judge, "p": min(1.0, max(0.0, dice.gauss(0.7, 0.25)))}
            for judge in ("one", "two") for each in found]  # fmt: skip


def measure(count: int, line) -> None:
    import hydra

    from rlhf_recipes import config
    from rlhf_recipes.audit import page, run_audit, verdict
    from rlhf_recipes.data.load import Splits
    from rlhf_recipes.data.tokens import Sizes
    from rlhf_recipes.run import Run

    run_audit.Ensemble = Scores
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("audit", ["reward_model=x"])
    test = pairs(count, "test")
    short = np.ones((count, 2), dtype=int)
    report = {"split": "", "dropped": {}}
    splits = Splits(pairs(count, "train"), test, report, "invented", sizes={"test": Sizes(short, short)})
    given = run_audit.Sources([], ([], []), None, judged(test), None, [], None)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run_audit.take(cfg, given, splits, None, Run(Path(folder), "audit", {}))
        decided = verdict.decide(found.sections, {})
        audit = {"title": "t", "subject": {}, "counts": {}, "verdict": decided, "sections": found.sections,
                 "paragraph": verdict.paragraph(found.sections, decided, found.label_next),
                 "label_next": found.label_next, "settings": {}}  # fmt: skip
        page.write_page(audit, Path(folder) / "report.html")
        size = (Path(folder) / "report.html").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line.put((count, time.monotonic() - begin, before / 1024, peak / 1024, size / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[2500, 10_000])
    fresh, line = multiprocessing.get_context("spawn"), multiprocessing.get_context("spawn").Queue()
    for count in parser.parse_args().pairs:
        process = fresh.Process(target=measure, args=(count, line))
        process.start()
        pairs_, seconds, before, peak, page = line.get()
        process.join()
        print(f"{datetime.date.today()} {pairs_:,} pairs: {seconds:.0f} s, {before:.0f} MiB with the rows, "
              f"{peak:.0f} MiB at most, a page of {page:.0f} kB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
