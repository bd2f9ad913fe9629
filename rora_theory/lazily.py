"""Modules of a package as its attributes, imported when they are first asked for: ``rt.theory.laws``."""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, names: Mapping[str, str] | None = None) -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """A package's ``__getattr__`` and ``__dir__``: its modules, and names that stand in one of them.

    Args:
      package: ``__name__`` of the package.
      names: public names and the module that each is in; such a name goes before a module's.
    """
    public = dict(names or {})

    def get(name: str) -> Any:
        if name in public:
            return getattr(importlib.import_module(public[name]), name)
        full = f"{package}.{name}"
        if name.startswith("_") or importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(full)

    def listed() -> list[str]:
        module = sys.modules[package]
        inner = (each.name for each in pkgutil.iter_modules(module.__path__))
        return sorted({*vars(module), *public, *inner})

    return get, listed
