"""The one exception that speaks to the user, and how libraries' errors are read."""

import difflib
import traceback
from contextlib import contextmanager


class Refusal(ValueError):
    """What a command, a file or a setting may not be, on one line: *where = value: rule. What to do.*

    `where` is the key as typed, or the file with its row. The command line prints it and exits with 2; every other
    exception is a bug and keeps its traceback.
    """


@contextmanager
def users_function(where: str):
    """Around a call of a function that the user gave: what it raises is a refusal that names it and its line.

    Args:
        where: key and value as typed, `reward_funcs=module:function`.
    """
    try:
        yield
    except Exception as error:
        inside = traceback.extract_tb(error.__traceback__)[2:3]  # behind this frame and the caller's
        place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in inside)
        raise Refusal(
            f"{where}: raised {type(error).__name__}: {first_line(error).rstrip('.')}{place}. Mend the function; "
            "HYDRA_FULL_ERROR=1 shows the whole traceback."
        ) from error


def nearest(word: str, known) -> str:
    """`; did you mean 'beta'?`, or a full stop when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else "."


def first_line(error: BaseException) -> str:
    """The first line of its text that is not blank, or its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
