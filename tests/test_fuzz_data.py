"""Whatever rows and files hold: rows whose counts add up, or one line. tests/benchmarks/fuzz_data.py does more."""

from files_of_rows import check, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_recipes.data.texts import MARKUPS


@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=files())
def test_rows_or_one_line(drawn, tmp_path):
    changes, ending, content, rows, are_whole, sample = drawn
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    check(changes, path, rows, are_whole, sample)


@settings(max_examples=15, derandomize=True, database=None, deadline=None)
@given(texts=st.tuples(*(st.from_regex(markup.header) for markup in MARKUPS)))
def test_what_marks_a_turn_has_a_sign_of_its_markup(texts):
    for markup, text in zip(MARKUPS, texts, strict=True):
        assert any(sign in text for sign in markup.signs), (markup.name, text)
