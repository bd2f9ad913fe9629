"""Run-time type checks of all tests: shapes by jaxtyping, types by beartype, int accepted for float (PEP 484).

jaxtyping's wrapper compares the shapes of several arguments, which takes time. A function without array annotations
has no shapes to compare, so beartype alone checks its types. The wrapper is created at the first call. Functions inside
other functions are not checked.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))

_with_shapes = jaxtyping.jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """Replace ``jaxtyping.jaxtyped``, which the import hook adds to each function and class."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn) and not getattr(fn, "__no_type_check__", False):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    if isinstance(fn, (classmethod, staticmethod)):
        return type(fn)(jaxtyped(fn.__func__, typechecker=typechecker))
    if not inspect.isfunction(fn):
        return _with_shapes(fn, typechecker=typechecker)
    # A function inside another one is a new object at each call of the outer one, and would get new checks each time.
    if "<locals>" in fn.__qualname__:
        return fn
    has_array = any(map(_has_array, fn.__annotations__.values()))
    if has_array:
        return _checked(fn, functools.partial(_with_shapes, typechecker=typechecker))
    return _checked(fn, lambda fn: typechecker(_resolved(fn)))


def _checked(fn: Callable[..., Any], make: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its checks, which are built at the first call."""
    checked: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable or getattr(fn, "__no_type_check__", False):
            return fn(*args, **kwargs)
        if not checked:
            checked.append(make(fn))
        return checked[0](*args, **kwargs)

    return wrapped


def _resolved(fn: types.FunctionType) -> types.FunctionType:
    """Evaluate the function's annotations, except those that only type checkers import, as jaxtyping does."""
    twin = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__kwdefaults__, twin.__qualname__, twin.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    annotations = {}
    for name, annotation in fn.__annotations__.items():
        twin.__annotations__ = {name: annotation}
        with contextlib.suppress(Exception):
            annotations |= get_type_hints(twin, include_extras=True)
    twin.__annotations__ = annotations
    return twin


def _has_array(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return "[" in annotation
    if annotation is jaxtyping.PyTree or (inspect.isclass(annotation) and issubclass(annotation, AbstractArray)):
        return True
    return any(map(_has_array, get_args(annotation)))
