"""Does a config value fit the annotation of the argument it is meant for?"""

import enum
import functools
import inspect
import types
import typing
from typing import Any


@functools.cache
def parameters(target: type) -> dict[str, Any]:
    """Argument name -> resolved annotation, else the type of its default, else `Any`."""
    hints = {}
    for annotated in (target, target.__init__):
        try:
            hints |= typing.get_type_hints(annotated)
        except (NameError, TypeError):  # peft's __init__ names types that only its modules know
            continue
    arguments = inspect.signature(target).parameters.values()
    taken = [a for a in arguments if a.name != "self" and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    return {a.name: hints.get(a.name, _of_default(a.default)) for a in taken}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` (None, bool, number, str, list or dict) is acceptable for `hint`.

    An int is a float, a str may name an enum member, and classes that YAML cannot express accept anything.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        # peft documents patterns among them: "pissa_niter_[number of iters]"
        patterns = tuple(arg.partition("[")[0] for arg in args if isinstance(arg, str) and "[" in arg)
        return value in args or (isinstance(value, str) and bool(patterns) and value.startswith(patterns))
    if origin is typing.Annotated:
        return fits(value, args[0])
    if origin is list and isinstance(value, list):
        return all(fits(item, args[0]) for item in value)
    hint = origin or hint
    if hint in (type(None), None):
        return value is None
    if hint is Any or not isinstance(hint, type):
        return True
    if issubclass(hint, bool):
        return isinstance(value, bool)
    if issubclass(hint, enum.Enum):
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, list, dict):
        return isinstance(value, hint)
    if hint in (tuple, set):
        return isinstance(value, list)
    return value is not None


def _of_default(default: Any) -> Any:
    return type(default) if isinstance(default, bool | int | float | str) else Any
