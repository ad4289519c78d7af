"""What a refusal says, and how libraries' errors are read."""

import difflib


def nearest(word: str, known) -> str:
    """`; did you mean 'beta'?`, or a full stop when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else "."


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
