"""A column that says which of two answers is the better one: by name, index, probability or sign."""

import math
import re
from collections.abc import Sequence
from typing import Any

from rlhf_recipes.data.columns import COLUMNS, WORD, Source, kind, spelled
from rlhf_recipes.errors import Refusal

SCALES = ("auto", "index", "probability", "signed")
SAID = {
    "names": "by name",
    "index": "0 the first, 1 the second",
    "one": "1 the first, 2 the second",
    "probability": "the probability that the first is better",
    "signed": "below 0 the first is better",
    "good": "1 good, -1 bad",
}
# What tells the columns of two answers apart.
MARKERS = (("0", "1"), ("1", "2"), ("a", "b"), ("left", "right"), ("first", "second"), ("one", "two"))
NOUNS = (
    *("response", "answer", "completion", "output", "reply", "text", "message", "messages", "conversation", "summary"),
    *("generation", "candidate", "option", "story"),
)
# The names of columns that decide, and of those whose 0 and 1 are the places of the answers.
DECIDES = re.compile(
    r"(?:overall_|human_|annotator_|user_)?(?:better|best|winner|preferred|preference|pref|choice|vote|verdict|labels?)"
    r"(?:_(?:response|answer|completion|output|model|id|idx|index|position|label|strength|score|human|final))*"
    r"|chosen|selected|(?:chosen|safer|more_helpful|safer_response|chosen_response|selected|selected_response)_(?:id|idx|index|position)"
    r"|winner_.*|is_.*_(?:better|preferred)|(?:first|a|response_a|response_1)_is_better"
)
INDEX = re.compile(
    r".*_(?:id|idx|index|position)|(?:better|best|winner|choice|vote|chosen|selected|worse|worst|loser|rejected).*"
)
# Beside two answers: a column of the worse one, or of whether one of them is better or worse.
WORSE = re.compile(
    r"(?:.*_)?(?:worse|worst|loser|rejected|dispreferred|non_?preferred)"
    r"(?:_(?:response|answer|completion|output|model|id|idx|index|position|label))*"
)
OF_ONE = re.compile(r"(?P<which>.+)_is_(?:better|worse|preferred)|is_(?P<this>.+)_(?:better|worse|preferred)")
SIGNED = ("overall_preference", "preference_strength", "preference_score")  # HelpSteer's
TIES = ("tie", "both", "neither", "equal", "draw", "same", "none", "nopreference", "tiebothbad", "bothbad")
SHORT = ("word", "number", "flag", "text")


def decisive(source: Source, sides: tuple[str, ...]) -> list[str]:
    """The columns that say which answer is better: the user's, else those under the names that people give them."""
    if source.typed("preference"):
        return [source.typed("preference")]
    if source.columns.get("preference") is None:
        return []
    typed = [source.typed(key) for key in COLUMNS]
    names = [
        name
        for name in source.kinds
        if DECIDES.fullmatch(spelled(name)) and name not in (*sides, *typed) and source.kinds[name] in SHORT
    ]
    names = [name for name in names if is_verdict(source.values[name])]
    return names or [
        name for name in source.top if sides and name not in (*sides, *typed) and _is_opposite(source, name)
    ]


def _is_opposite(source: Source, name: str) -> bool:
    word = spelled(name)
    known = WORSE.fullmatch(word) or OF_ONE.fullmatch(word)
    return bool(known) and source.kinds[name] in SHORT and is_verdict(source.values[name])


def is_turned(name: str, sides: tuple[str, str]) -> bool:
    """Whether a column says of the first answer what others say of the second: which is the worse one, or whether the
    second is better."""
    word, counted = spelled(name), markers(*sides)
    of_one = OF_ONE.fullmatch(word)
    of_second = bool(of_one and _which(of_one, sides, counted) == 1)
    return bool(WORSE.fullmatch(word)) != of_second


def _which(of_one: re.Match, sides: tuple[str, str], counted: tuple[str, str] | None) -> int | None:
    """Of which answer a column of one of them speaks; None where its name does not say."""
    said = of_one["which"] or of_one["this"]
    names = [{spelled(side), word} for side, word in zip(sides, ("first", "second"), strict=True)]
    for own, marker in zip(names, counted or (), strict=False):
        own |= {marker, *(f"{noun}_{marker}" for noun in ("model", *NOUNS))}
    return next((place for place, own in enumerate(names) if said in own), None)


def is_verdict(values: Sequence[Any]) -> bool:
    return all(not isinstance(value, str) or len(value) <= WORD for value in values if value is not None)


def is_one_hot(source: Source, names: Sequence[str]) -> bool:
    """Whether columns of 0 and 1, told apart as answers are, share one verdict: each row has a 1 in one of them."""
    if not any(markers(x, y) for x in names for y in names):
        return False
    columns = [[_number(value) for value in source.values[name]] for name in names]
    rows = list(zip(*columns, strict=False))
    return all(set(row) <= {0.0, 1.0} and sum(row) == 1 for row in rows)


def models_of(source: Source, name: str, sides: tuple[str, str]) -> tuple[str, str] | None:
    """Two columns told apart as the answers are, one of which has the word that a preference says."""
    verdicts = source.values[name]
    words = [each for each in source.kinds if source.kinds[each] in ("word", "text") and each not in (name, *sides)]
    for x in words:
        for y in words:
            pairs = list(zip(verdicts, source.values[x], source.values[y], strict=False))
            if markers(x, y) and len(pairs) == len(verdicts) and any(v in (a, b) for v, a, b in pairs if v):
                return x, y
    return None


def may_be_verdicts(values: Sequence[Any], sides: tuple[str, str]) -> bool:
    """Whether all of these are 0 and 1, 1 and 2, or names of the sides."""
    for value in values:
        if value in (None, "", 0, 1, 2):
            continue
        try:
            better(value, "names", sides)
        except ValueError:
            return False
    return True


def markers(first: str, second: str) -> tuple[str, str] | None:
    """What tells two names apart: (0, 1), (a, b) ..., or None where that is something else."""
    x, y = (spelled(name).replace("_", "") for name in (first, second))
    for one, two in MARKERS:
        for base in (x.removesuffix(one) if x.endswith(one) else "", x.removeprefix(one) if x.startswith(one) else ""):
            if base and y in (base + two, two + base) and x in (base + one, one + base):
                return one, two
    return None


def scale_of(source: Source, name: str, sides: tuple[str, str], told: str) -> str:
    """How the values of a preference are meant.

    Returns:
        `names`; `index` (0 the first answer, 1 the second), `one` (1 the first, 2 the second, 0 a tie); `probability`
        (that the first is better); `signed` (below 0 the first is better).

    Raises:
        Refusal: numbers that may say several things.
    """
    values = [value for value in source.values[name] if value not in (None, "")]
    held = {kind([value]) for value in values}
    if told == "auto" and not held <= {"number", "flag"}:
        return "names"
    numbers = {_float(value) for value in values} if held <= {"number", "flag"} else set()
    counted = markers(*sides)
    if told == "index":
        return "one" if 2 in numbers or (counted == ("1", "2") and 0 not in numbers) else "index"
    if told != "auto":
        return told
    word = spelled(name)
    if "flag" in held:
        of_one = OF_ONE.fullmatch(word)
        scale = "probability" if of_one and _which(of_one, sides, counted) is not None else ""
    elif (
        numbers <= {0, 1, 2}
        and (2 in numbers or counted == ("1", "2"))
        and (0 not in numbers or counted == ("1", "2"))
    ):
        scale = "one" if 2 in numbers or 0 not in numbers else ""
    elif numbers <= {0, 1} and (INDEX.fullmatch(word) or counted == ("0", "1")):
        scale = "index"
    elif numbers <= {0, 1} and sides == ("human_ref_A", "human_ref_B"):
        scale = "probability"  # SHP's labels: 1 where A is the better one
    else:
        scale = "signed" if word in SIGNED else ""
    if scale:
        return scale
    shown = ", ".join(f"{number:g}" for number in sorted(numbers)[:5])
    ways = {
        "index (0 the first, 1 the second)": numbers <= {0, 1},
        "index (1 the first, 2 the second)": numbers <= {1, 2} and 2 in numbers,
        "probability (that the first is better: 1 the first, 0 the second)": all(0 <= x <= 1 for x in numbers),
        "signed (below 0 the first, above 0 the second)": any(x < 0 for x in numbers),
    }
    fit = [way for way, fits in ways.items() if fits]
    if not fit:
        raise Refusal(
            f"{source.name}: {name}: {shown} are on no scale that is known of {sides[0]} and {sides[1]}. Write "
            "numbers below 0 where the first is better, above 0 where the second is, 0 for a tie; or a probability."
        )
    raise Refusal(
        f"{source.name}: {name}: {shown} may say several things of {sides[0]} and {sides[1]}. Say which with "
        f"data.preference: {', or '.join(fit)}."
    )


def is_clear(source: Source, name: str, sides: tuple[str, str]) -> bool:
    """Whether the values of a preference say one thing alone."""
    try:
        return bool(scale_of(source, name, sides, "auto"))
    except Refusal:
        return False


def better(value: Any, scale: str, sides: tuple[str, str], models: tuple[Any, Any] = (None, None)) -> float | None:
    """The probability that the first answer is the better one: 1, 0, 0.5 for a tie, between for a soft label.

    Args:
        value: of a preference.
        scale: see `scale_of`.
        sides: the columns of the answers.
        models: what made each of them.

    Returns:
        None for a value that is null or blank.

    Raises:
        ValueError: no value of the scale.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if scale == "names" and models[0] != models[1] and value in models:
        return float(value == models[0])
    if scale == "names":
        return _named(str(value), sides)
    number = _float(value)
    places = {"index": {0: 1.0, 1: 0.0}, "one": {1: 1.0, 2: 0.0, 0: 0.5}}
    if scale in places and number in places[scale]:
        return places[scale][number]
    if scale == "signed" and math.isfinite(number):
        return 0.5 if number == 0 else float(number < 0)
    if scale == "probability" and 0 <= number <= 1:
        return number
    raise ValueError(value)


def _named(value: str, sides: tuple[str, str]) -> float:
    """A verdict in words: the name of a column, or what tells it from the other's (`a`, `model_b`, `response_2`)."""
    word = _squashed(value)
    if word in TIES:
        return 0.5
    names = [{_squashed(side)} for side in sides]
    counted = markers(*sides)
    for marker in MARKERS:
        if marker[0].isdigit() and counted and counted[0].isdigit() and marker != counted:
            continue  # 1 is the second of answers 0 and 1, and the first of 1 and 2
        for known, each in zip(names, marker, strict=True):
            known |= {each, *(f"{noun}{each}" for noun in ("model", "assistant", *NOUNS))}
    first, second = (word in known for known in names)
    if first == second:
        raise ValueError(value)
    return float(first)


def _number(value: Any) -> float | None:
    try:
        return _float(value)
    except (TypeError, ValueError):
        return None


def _float(value: Any) -> float:
    """As `float`; infinite for an integer that no float holds."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _squashed(text: str) -> str:
    """Letters and digits alone, in lower case."""
    return re.sub(r"[\W_]+", "", text.lower())
