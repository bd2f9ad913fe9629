"""List the packages of the optional extras, and replace one that is not installed by a placeholder.

A module that imports such a package does it as follows, so that the module itself can be imported without the package,
and a command can print its help::

    try:
        import tokenizers
    except ImportError as error:
        tokenizers = extras.missing(error)
"""

import importlib
import os
from typing import Any

from rora_theory.errors import InputError, first_line

PACKAGES: dict[str, tuple[str, ...]] = {
    "finetune": (
        *("datasets", "gguf", "google", "huggingface_hub", "jinja2", "orbax", "pyarrow"),
        *("safetensors", "sentencepiece", "tokenizers", "transformers"),
    ),
    "torch": ("datasets", "peft", "torch", "transformers"),
    "cluster": ("ray",),
    "logging": ("tensorboardX", "wandb"),
}
"""Import names of the packages in each extra of `pyproject.toml`."""


def missing_message(error: BaseException) -> str | None:
    """Return the line that names the missing extra, or None if the error is not about a package of an extra.

    Examples:
      >>> missing_message(ModuleNotFoundError("No module named 'ray'", name="ray"))
      "ray is not installed. Install the extra 'cluster': pip install 'rora-theory[cluster]'"
    """
    if not isinstance(error, ImportError):
        return None
    package = (error.name or "").partition(".")[0]
    for extra, names in PACKAGES.items():
        if package in names:
            # If a package is installed but cannot be loaded, report its own reason.
            problem = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
            return f"{package} {problem}. Install the extra {extra!r}: pip install 'rora-theory[{extra}]'"
    return None


def missing(error: ImportError) -> Any:
    """Return a placeholder for a package that could not be imported, or for a name from it.

    Its attributes are placeholders too, it can be a base class or an annotation, and calling it raises `InputError`.

    Raises:
      ImportError: The error itself, if it is not about a package of an extra.
    """
    message = missing_message(error)
    if message is None:
        raise error
    return _Placeholder(
        "Missing", (Exception,), {"_message": message}
    )  # an exception type may be used in an except clause


def import_extra(module: str) -> Any:
    """Import a module of an extra where it is needed.

    Raises:
      InputError: The package is not installed or cannot be imported.
    """
    # transformers would print a note that PyTorch is missing, which tokenizers and chat templates do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(missing_message(error) or first_line(error)) from error


class _Placeholder(type):
    """Metaclass of the classes that `missing` returns."""

    _message: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # Python and typing look these up on any class
            raise AttributeError(name)
        return cls

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise InputError(cls._message)
