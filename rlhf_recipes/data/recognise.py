"""What a source holds: its format, which column is what, and how a preference is meant.

`data.format=auto` takes the format that the columns and the values of the first rows fit, and refuses where none or
two do.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_recipes.data import preference
from rlhf_recipes.data.columns import ALIASES, COLUMNS, Source, spelled
from rlhf_recipes.data.messages import Drop, as_messages, is_messages
from rlhf_recipes.data.row import MISSING, as_good, as_list, as_number, at
from rlhf_recipes.errors import Refusal

SAMPLE = 200  # rows that are looked at

PREFERENCES = ("pairs", "hh_rlhf", "preference", "ratings", "rankings", "trees")
FORMATS = ("auto", *PREFERENCES, "labelled", "messages")
PARTS = {
    "system": ("text", "word", "empty"),
    "input": ("text", "word", "number", "empty"),
    "history": ("messages", "lists", "empty"),
}
ASKED = ("text", "word", "messages")  # what a prompt may be
BESIDE = ("context", "history", "input")  # a prompt, or parts of the one that a conversation holds
# A label of this name is true of what is bad.
BAD = re.compile(
    "(?:is_|was_)?(?:rejected|wrong|incorrect|bad|harmful|unsafe|toxic|hallucinated|undesirable|disliked?|downvoted)|"
    "thumbs_down"
)
KNOWN = ("p", "margin", "family", "split")
NEEDED = {
    "pairs": ("chosen", "rejected"),
    "hh_rlhf": ("chosen", "rejected"),
    "preference": ("first", "second", "preference"),
    "ratings": ("prompt", "responses", "scores"),
    "rankings": ("prompt", "responses", "ranks"),
    "labelled": ("completion", "label"),
    "messages": ("messages",),
}
# In a list of objects: which key is the answer, which its score.
ANSWER_KEYS = ("response", "answer", "completion", "generation", "output", "text", "content", "message")
SCORE_KEYS = ("overall_score", "score", "rating", "reward")
REJECTED = re.compile(f"(?:rejected|dispreferred|non_preferred)(?:_(?:messages|{'|'.join(preference.NOUNS)}))?")
BETTER_WORSE = (
    *(
        ("chosen", "rejected"),
        ("preferred", "non_preferred"),
        ("preferred", "dispreferred"),
        ("preferred", "rejected"),
    ),
    *(("accepted", "rejected"), ("better", "worse"), ("winner", "loser"), ("winning", "losing"), ("good", "bad")),
    ("positive", "negative"),
)


@dataclass(frozen=True)
class Layout:
    """How the rows of a file are read.

    Attributes:
        format: one of `FORMATS`, but for auto and trees (which are rankings once they are joined).
        columns: our names -> the file's, a path (`input.messages`), or None.
        scale: how a preference is meant: `names`, `index` (0 the first), `one` (1 the first, 2 the second, 0 none),
            `probability` (that the first is better) or `signed` (below 0 the first is better).
        turned: whether a preference says which answer is the worse one, or whether the second is better; whether a
            label says which is bad.
        models: the columns of the names of the answers' models, where a preference says one of these; or None.
        watched: columns that are read nowhere and whose rows are left out, each with the reason.
        scores: the columns of the chosen and the rejected answer's own score, or None.
        unread: columns that are not read.
    """

    format: str
    columns: Mapping[str, str | None]
    scale: str = ""
    turned: bool = False
    models: tuple[str, str] | None = None
    watched: Mapping[str, str] = field(default_factory=dict)
    scores: tuple[str, str] | None = None
    unread: tuple[str, ...] = ()


def recognise(source: Source, data: Mapping[str, Any], sides: tuple[str, ...], labelled: bool) -> Layout:
    """The layout of a source.

    Args:
        source: its columns.
        data: the checked data node.
        sides: the answers that an example has: (chosen, rejected), (completion,) or none.
        labelled: whether answers labelled good or bad are wanted.

    Raises:
        Refusal: a column that is not there, no format or two that fit.
    """
    for key in COLUMNS:
        if source.typed(key) and source.typed(key) not in source.kinds:
            raise source.no_column(key)
    return _format(source, data, sides, labelled)


def of_prompts(source: Source, prompt: str) -> Layout:
    """The layout of rows of which the prompt alone is read, in this column, with what others hold of it."""
    return Layout("pairs", _columns(source, {"prompt": prompt}))


def same(source: Source, layout: Layout, data: Mapping[str, Any], sides: tuple[str, ...], labelled: bool) -> Layout:
    """The layout for a second source of the same data: the first one's format, by columns of its own; also its scale,
    unless the answers are counted from another number on.

    Raises:
        Refusal: a column that is not there.
    """
    found = {key: name for key, name in layout.columns.items() if name and key not in (*PARTS, *KNOWN)}
    if all(source.has(name) for name in found.values()):
        return replace(layout, columns=_columns(source, found))
    own = recognise(source, {**data, "format": layout.format}, sides, labelled)
    counted = [preference.markers(*(each.columns[key] or "" for key in ("first", "second"))) for each in (layout, own)]
    return replace(own, scale=layout.scale) if counted[0] == counted[1] else own


def said(layout: Layout) -> str:
    """What a file is read as and which columns say so, on one line."""
    columns = [f"{key} from {name}" if name != key else key for key, name in layout.columns.items() if name]
    notes = [*([preference.SAID[layout.scale]] if layout.scale else []), *["turned round"] * layout.turned]
    scale = f" ({', '.join(notes)})" if notes else ""
    scale = f" (by the name in {' or '.join(layout.models)})" if layout.models else scale
    return f"{layout.format}{scale}: {', '.join(columns)}"


def _format(source: Source, data: Mapping[str, Any], sides: tuple[str, ...], labelled: bool) -> Layout:
    wanted = data["format"]
    if wanted != "auto":
        return _told(source, wanted, data, sides)
    if not sides and (prompt := _own_prompt(source)) and source.kinds[prompt] != "empty":
        return of_prompts(source, prompt)
    fits = [
        fit
        for fit in (_pairs(source), _preference(source, data), _scored(source, "ratings"), _scored(source, "rankings"))
        if fit
    ]
    if not fits and "rejected" in sides and (fit := _other_end(source)):
        fits = [fit]
    if labelled or "rejected" not in sides:
        thumbs = _labelled(source)
        fits = [*([thumbs] if thumbs else []), *fits]
        if not labelled:
            conversation = source.find("messages", ("messages",))
            goes_on = any(fit.columns["prompt"] == conversation for fit in fits)
            if conversation and not thumbs and not goes_on:
                fits.append(Layout("messages", _columns(source, {"messages": conversation})))
            if not thumbs and (answered := _answered(source)):
                fits = [answered, *[fit for fit in fits if fit.format not in ("pairs", "messages")]]
    if len(fits) > 1:
        ways = " and ".join(f"{fit.format} ({', '.join(_taken(fit))})" for fit in fits)
        raise Refusal(
            f"{source.name}: its columns fit {ways}. Say which one is meant: data.format={fits[0].format} or "
            f"data.format={fits[1].format}"
        )
    if not fits:
        raise _nothing_fits(source, sides, labelled)
    return fits[0]


def _told(source: Source, wanted: str, data: Mapping[str, Any], sides: tuple[str, ...]) -> Layout:
    """The layout of a format that the user named."""
    prompt = _own_prompt(source) if not sides and wanted not in ("hh_rlhf", "messages") else None
    if prompt and source.kinds[prompt] != "empty":
        return Layout(wanted, _columns(source, {"prompt": prompt}))
    match wanted:
        case "pairs" if "rejected" not in sides and (answered := _answered(source)):
            return answered
        case "pairs" | "hh_rlhf":
            fit = _pairs(source, wanted)
        case "preference":
            fit = _preference(source, data, told=True)
        case "ratings" | "rankings":
            fit = _scored(source, wanted)
        case "labelled":
            fit = _labelled(source, told=True)
        case "messages":
            name = source.find("messages", ("messages",))
            fit = Layout("messages", _columns(source, {"messages": name})) if name else None
    if fit:
        return fit
    if wanted == "preference" and (marked := _marked(source)):
        raise _no_preference(source, marked)
    for key in NEEDED[wanted]:
        if not source.find(key, ("text", "messages", "texts", "objects", "numbers", "number", "word", "flag")):
            raise source.no_column(key)
    raise source.no_column("prompt")


def _columns(source: Source, found: Mapping[str, str | None]) -> dict[str, str | None]:
    """Every one of our names -> the source's column, or None."""
    columns = dict.fromkeys(COLUMNS) | dict(found)
    taken = [name for name in columns.values() if name]
    for key in KNOWN:
        name = _known(source, key)
        columns[key] = name if name not in taken else None
    if not (columns["chosen"] and columns["rejected"]):
        columns["p"] = None  # read of a better and a worse answer alone
    for key, kinds in PARTS.items():
        name = source.find(key, kinds, taken)
        if name and name not in taken and (source.kinds[name] in kinds or name == source.typed(key)):
            columns[key] = name
            taken.append(name)
    return columns


def _known(source: Source, key: str) -> str | None:
    """The column under the user's name or ours; of splits, which decide what is trained on, in any spelling of it."""
    name = source.named(key)
    if not name and key == source.columns.get(key) == "split":
        name = next((each for each in source.top if spelled(each) == key), None)
    return name


def _taken(layout: Layout) -> list[str]:
    return [layout.columns[key] for key in NEEDED[layout.format] if layout.columns.get(key)]


def _prompt(source: Source, taken: Collection[str | None] = ()) -> str | None:
    """The column of prompts, else of the conversations that the answers of a row go on with (LLaMA-Factory's)."""
    return _own_prompt(source, taken) or source.find("messages", ("messages",), taken)


def _own_prompt(source: Source, taken: Collection[str | None] = ()) -> str | None:
    """The column of prompts alone: beside a conversation none of `BESIDE` that holds something else than it asks."""
    conversation = source.find("messages", ("messages",), taken)
    parts = []
    if conversation and conversation not in taken and source.kinds[conversation] == "messages":
        names = [name for name in source.kinds if spelled(name) in BESIDE and name != conversation]
        parts = [name for name in names if not _is_asked(source, name, conversation)]
    return source.find("prompt", ASKED, (*taken, *parts))


def _is_asked(source: Source, name: str, conversation: str) -> bool:
    """Whether a column holds all that the user says in most conversations."""
    found = []
    for row in source.rows:
        text, turns = at(row, name), at(row, conversation)
        turns = as_list(turns) if isinstance(turns, str) else turns
        if text is MISSING or not is_messages(turns):
            continue
        with suppress(Refusal, Drop):  # told when the row is read
            said = as_messages(name, turns, Counter())
            users = [turn["content"].strip() for turn in said if turn["role"] == "user"]
            found.append(isinstance(text, str) and users == [text.strip()])
    return sum(found) * 2 > len(found)


def _pairs(source: Source, told: str = "") -> Layout | None:
    chosen, rejected = source.named("chosen"), source.named("rejected")
    if not (chosen and rejected) and told != "hh_rlhf":
        chosen, rejected = _better_worse(source) or (None, None)
    if not (chosen and rejected):
        return None
    if not told and preference.markers(chosen, rejected) and preference.decisive(source, (chosen, rejected)):
        return None  # which of the two is better, another column says
    if not told and not source.typed("chosen") and _marked(source) and preference.decisive(source, ()) == [chosen]:
        return None  # chosen is no answer, but says which of two is
    found = {"chosen": chosen, "rejected": rejected}
    prompt = source.named("prompt") or source.typed("prompt")
    if told == "hh_rlhf" or (not told and not prompt and _are_transcripts(source, chosen)):
        return Layout("hh_rlhf", _columns(source, found) | dict.fromkeys(PARTS))
    if not prompt and not _are_conversations(source, chosen):
        prompt = _prompt(source, (chosen, rejected))
        if not prompt:
            return None
    return Layout("pairs", _columns(source, {**found, "prompt": prompt}))


def _better_worse(source: Source) -> tuple[str, str] | None:
    """Two columns of answers whose names say which is the better one."""
    texts = source.answers([source.typed(key) for key in COLUMNS])
    nouns = "|".join(preference.NOUNS)
    for better, worse in BETTER_WORSE:
        for x in texts:
            around = re.fullmatch(rf"(?P<before>(?:{nouns})_|){better}(?P<after>_(?:{nouns})|)", spelled(x))
            for y in texts if around else ():
                if spelled(y) == f"{around['before']}{worse}{around['after']}":
                    return x, y
    return None


def _other_end(source: Source) -> Layout | None:
    """A conversation and, in a column of its own, the answer that is worse than its last turn (ms-swift's)."""
    conversation = source.find("messages", ("messages",))
    ends = [name for name in source.answers((conversation,)) if REJECTED.fullmatch(spelled(name))]
    if not (conversation and _are_conversations(source, conversation) and len(ends) == 1):
        return None
    return Layout("pairs", _columns(source, {"chosen": conversation, "rejected": ends[0]}))


def _are_transcripts(source: Source, name: str) -> bool:
    texts = [value for value in source.values[name] if value]
    return bool(texts) and all(isinstance(text, str) and re.match(r"\s*Human:", text) for text in texts)


def _are_conversations(source: Source, name: str) -> bool:
    """Whether the answers are whole conversations, whose prompt lies in them."""
    for value in source.values[name]:
        if isinstance(value, str) and value.startswith("["):
            value = as_list(value) or value
        if is_messages(value):
            return not isinstance(value, dict) and len(value) > 1
    return False


def _preference(source: Source, data: Mapping[str, Any], told: bool = False) -> Layout | None:
    """Two answers and a column that says which one is better."""
    sides = source.named("first"), source.named("second")
    if not all(sides):
        sides = source.typed("chosen"), source.typed("rejected")
    if not all(sides):
        sides = _marked(source) or (None, None)
    if not all(sides) and preference.decisive(source, ()):
        lists = [name for name in source.kinds if _are_two(source, name)]
        sides = (f"{lists[0]}.0", f"{lists[0]}.1") if len(lists) == 1 else sides
    if not all(sides):
        return None
    decides = preference.decisive(source, sides)
    if not decides:
        return None
    if len(decides) > 1 and preference.is_one_hot(source, decides):
        raise Refusal(
            f"{source.name}: {', '.join(decides)} say in several columns which of {sides[0]} and {sides[1]} is "
            f"better. Make one of them, with a, b or tie, and name it with data.columns.preference"
        )
    if len(decides) > 1:
        raise Refusal(
            f"{source.name}: {' and '.join(decides)} each say which answer is better. Name one with "
            f"data.columns.preference={decides[0]} data.ignore=[{','.join(decides[1:])}]"
        )
    first, second = sides
    prompt = source.named("prompt") or source.typed("prompt")
    if not prompt and not (first in source.values and _are_conversations(source, first)):
        prompt = _prompt(source, sides)
        if not prompt:
            return None
    found = {"first": first, "second": second, "preference": decides[0], "prompt": prompt}
    scale = preference.scale_of(source, decides[0], sides, data["preference"])
    models = preference.models_of(source, decides[0], sides) if scale == "names" else None
    turned = preference.is_turned(decides[0], sides)
    return Layout("preference", _columns(source, found), scale, turned, models=models)


def _marked(source: Source) -> tuple[str, str] | None:
    """Two columns of answers that are told apart by a letter or a number."""
    texts = source.answers([source.typed("prompt")])
    return next(((x, y) for x in texts for y in texts if preference.markers(x, y)), None)


def _are_two(source: Source, name: str) -> bool:
    """Whether each value of a column is a list of two texts."""
    return source.kinds[name] == "texts" and all(len(_as_list(value)) == 2 for value in source.values[name])


def _scored(source: Source, wanted: str) -> Layout | None:
    """A list of answers and their scores or ranks, in columns or in objects."""
    key = NEEDED[wanted][2]
    taken = [source.typed(each) for each in ("scores", "ranks")]
    responses = source.find("responses", ("texts", "objects", "object"), taken)
    prompt = _prompt(source, (responses,)) if responses else None
    if not prompt:
        return None
    scores = source.named(key) if source.kinds.get(source.named(key) or "") not in (None, "empty") else None
    if source.kinds[responses] in ("objects", "object"):  # a list of objects, or an object of lists
        inside = {**source.inner, **source.kinds}
        keys = [name.removeprefix(f"{responses}.") for name in inside if name.startswith(f"{responses}.")]
        text = next((each for each in ANSWER_KEYS if each in keys), None)
        names = SCORE_KEYS if key == "scores" else ALIASES["ranks"]
        score = next((each for each in names if each in keys), None)
        if not text or not (score or scores):
            return None
        answers, scores = f"{responses}.{text}", scores or f"{responses}.{score}"
    else:
        answers, scores = responses, scores or source.find(key, ("numbers",), (responses, prompt))
    if not scores:
        return None
    return Layout(wanted, _columns(source, {"prompt": prompt, "responses": answers, key: scores}))


def _as_list(value: Any) -> list:
    return as_list(value) or [] if isinstance(value, str) else value or []


def _labelled(source: Source, told: bool = False) -> Layout | None:
    """An answer and whether it is good."""
    completion = source.find("completion", ("text", "word", "messages", "number")) or source.find(
        "messages", ("messages",)
    )
    label = source.find("label", ("flag", "number", "word", "text"), (completion,))
    if not (completion and label):
        return None
    labels = [value for value in source.values[label] if value not in (None, "")]
    signs = {as_number(str(value)) for value in labels}
    is_signed = -1 in signs and signs <= {-1, 1}
    if not told and not is_signed and any(as_good(value) is None for value in labels):
        return None
    prompt = source.named("prompt") or (
        None if _are_conversations(source, completion) else _prompt(source, (completion,))
    )
    if not prompt and not _are_conversations(source, completion):
        return None
    columns = _columns(source, {"prompt": prompt, "completion": completion, "label": label})
    return Layout("labelled", columns, "good" if is_signed else "", bool(BAD.fullmatch(spelled(label))))


def _answered(source: Source) -> Layout | None:
    """A prompt and one answer."""
    completion = source.find("completion", ("text", "word", "messages", "number"))
    if not completion and not source.named("rejected"):
        completion = source.named("chosen")
    if not completion:
        return None
    prompt = source.named("prompt") or _prompt(source, (completion,))
    if not prompt and not _are_conversations(source, completion):
        return None
    return Layout("pairs", _columns(source, {"prompt": prompt, "completion": completion}))


def _nothing_fits(source: Source, sides: tuple[str, ...], labelled: bool) -> Refusal:
    if not sides:
        return source.no_column("prompt")
    conversation = source.find("messages", ("messages",))
    answered = _answered(source)
    if labelled and (answered or conversation):
        return source.no_column("label")
    if "rejected" in sides and (thumbs := _labelled(source)):
        return Refusal(
            f"{source.name}: each row holds one answer and whether it is good ({', '.join(_taken(thumbs))}), which "
            "makes no pair. Train on it with recipes/kto.py, or on the good ones with recipes/sft.py."
        )
    if "rejected" in sides and not source.named("chosen") and (conversation or answered):
        name = conversation or answered.columns["completion"]
        return Refusal(
            f"{source.name}: {name} holds one answer a row, and no other to compare it with. Train on it with "
            "recipes/sft.py, or name two answers with data.columns.chosen and data.columns.rejected."
        )
    if "rejected" in sides and not source.named("chosen") and (marked := _marked(source)):
        return _no_preference(source, marked)
    if source.find("responses", ("texts",)) and not source.named("chosen"):
        return source.no_column("prompt" if not _prompt(source) else "scores")
    needed = ("completion",) if sides == ("completion",) and not source.named("chosen") else ("chosen", "rejected")
    for key in needed:
        if not source.named(key):
            return source.no_column(key)
    return source.no_column("prompt")


def _no_preference(source: Source, sides: tuple[str, str]) -> Refusal:
    return Refusal(
        f"{source.name}: no column says which of {sides[0]} and {sides[1]} is better (found: "
        f"{', '.join(source.top):.200}). Name one with data.columns.preference=<its name>, or the answers with "
        "data.columns.chosen and data.columns.rejected."
    )
