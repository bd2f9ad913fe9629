"""Expose the modules of a package as attributes that are imported at first use, as in ``rt.laws.horizon``."""

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, names: Mapping[str, str] | None = None) -> tuple[Callable[[str], Any], Callable[[], Any]]:
    """Return ``__getattr__`` and ``__dir__`` for a package, which expose its modules and public names.

    Args:
      package: Name of the package, its ``__name__``.
      names: Public names and the module that defines each. A public name takes precedence over a module.
    """
    public = dict(names or {})

    # Called for names that the package does not have yet: import them on first use.
    def get_attribute(name: str) -> Any:
        if name in public:
            return getattr(importlib.import_module(public[name]), name)
        full_name = f"{package}.{name}"
        if name.startswith("_") or importlib.util.find_spec(full_name) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(full_name)

    def list_attributes() -> list[str]:
        module = sys.modules[package]
        submodules = (info.name for info in pkgutil.iter_modules(module.__path__))
        return sorted({*vars(module), *public, *submodules})

    return get_attribute, list_attributes
