"""torch's compiler is imported by who compiles.

bitsandbytes has torch compile four functions when it is imported: for devices without kernels of their own, and for
some of its optimizers. To import the compiler for them takes a quarter of the time in which a recipe starts.
"""

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MODULE = "bitsandbytes.backends.default.ops"


def when_called() -> None:
    """What bitsandbytes has compiled is compiled by its first call, if it is not imported yet."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == MODULE else None
        if spec and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        import torch

        compiled, torch.compile = torch.compile, _compiled_when_called
        try:
            super().exec_module(module)
        finally:
            torch.compile = compiled


def _compiled_when_called(function, **how):
    import torch

    compiled = functools.cache(lambda: torch.compile(function, **how))
    return lambda *args, **kwargs: compiled()(*args, **kwargs)
