"""Whatever rows and files hold: rows whose counts add up, or one line. tests/benchmarks/fuzz_data.py does more."""

from files_of_rows import check, files
from hypothesis import HealthCheck, given, settings


@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=files())
def test_rows_or_one_line(drawn, tmp_path):
    changes, ending, content, rows, are_whole, sample = drawn
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    check(changes, path, rows, are_whole, sample)
