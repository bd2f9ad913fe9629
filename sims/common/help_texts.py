"""Help of the options: attribute docstrings as one paragraph each.

tyro keeps the line breaks of an attribute docstring, which fall in the middle of a sentence on a narrow terminal.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from typing import Any

import tyro
from tyro.constructors import StructConstructorSpec, StructFieldSpec, StructTypeInfo

registry = tyro.constructors.ConstructorRegistry()
"""Rules for `tyro.cli`."""


@registry.struct_rule
def describe_dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Describe the fields of a dataclass to tyro.

    Args:
      info: Type, which may be any.

    Returns:
      The fields with their defaults and help; None for other types and for generic dataclasses, such as tyro's own.
    """
    is_generic = bool(getattr(info.type, "__parameters__", False))
    if is_generic or not dataclasses.is_dataclass(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    fields = []
    # Default of each field: that of the parent's instance, of the field, or a new one of its factory.
    for field in dataclasses.fields(info.type):
        default: Any = tyro.MISSING_NONPROP
        if isinstance(info.default, info.type):  # a nested dataclass whose defaults its parent sets
            default = getattr(info.default, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        # A nested dataclass that is its own factory has no default here: tyro takes those of its fields.
        elif field.default_factory is not dataclasses.MISSING and field.default_factory is not field.type:
            default = field.default_factory()
        help_text = functools.partial(_help_of, info.type, field.name)
        fields.append(StructFieldSpec(field.name, hints[field.name], default, help_text))
    return StructConstructorSpec(info.type, tuple(fields))


def _help_of(config: type, name: str) -> str | None:
    return next((texts[name] for texts in map(_attribute_docstrings, config.__mro__) if name in texts), None)


@functools.cache
def _attribute_docstrings(config: type) -> dict[str, str]:
    """Return the docstrings that follow the fields in the source of a class, each on one line."""
    if not dataclasses.is_dataclass(config):
        return {}
    try:
        source = inspect.getsource(config)
    except (OSError, TypeError):  # a class that was made without source
        return {}
    (definition,) = ast.parse(textwrap.dedent(source)).body
    texts = {}
    # The docstring of a field is the string expression right after it.
    for field, text in itertools.pairwise(typing.cast(ast.ClassDef, definition).body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts
