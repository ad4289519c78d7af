"""Does a config value fit the annotation of the argument it is meant for?"""

import enum
import inspect
import types
import typing
from typing import Any


def parameters(target: type) -> dict[str, Any]:
    """Argument name -> resolved annotation (`Any` where it cannot be resolved)."""
    names = [p for p in inspect.signature(target).parameters if p not in ("self", "args", "kwargs")]
    try:
        hints = typing.get_type_hints(target) | typing.get_type_hints(target.__init__)
    except (NameError, TypeError):
        hints = {}
    return {name: hints.get(name, Any) for name in names}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` (None, bool, number, str, list or dict) is acceptable for `hint`.

    An int is a float, a str may name an enum member, and classes that YAML cannot express accept anything.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is typing.Annotated:
        return fits(value, args[0])
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
