"""Rows and files of all formats, well formed, odd and damaged: what the loaders make of them.

    python tests/benchmarks/fuzz_data.py --files 20000

Prints files, rows and seconds, and each failure with its file once: a traceback, counts that do not add up, a text
that nobody wrote, more than ten seconds. Exits with 1 where there is one.
"""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from files_of_rows import check, files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=100, help="at most so many in a file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    count, rows, read, slowest, failures, began = 0, 0, 0, 0.0, {}, time.monotonic()

    @seed(args.seed)
    @settings(max_examples=args.files, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(drawn=files(most=args.rows))
    def run(drawn):
        nonlocal count, rows, read, slowest
        changes, ending, content, held, are_whole, sample = drawn
        path = folder / f"{count}{ending}"
        path.write_bytes(content)
        count, rows, start = count + 1, rows + len(held), time.monotonic()
        try:
            read += check(changes, path, held, are_whole, sample)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            failures.setdefault((type(error).__name__, Path(at.filename).name, at.lineno), (path, changes, error))
        else:
            path.unlink()
        slowest = max(slowest, time.monotonic() - start)

    run()
    seconds = time.monotonic() - began
    print(f"{count:,} files of {rows:,} rows, {read:,} of them read by the four loaders")
    print(f"{seconds:,.0f} s, the slowest file {slowest:.1f} s, {len(failures)} kinds of failure")
    for (kind, file, line), (path, changes, error) in failures.items():
        print(f"{kind} at {file}:{line}: {path} {changes}: {str(error)[:300]}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
