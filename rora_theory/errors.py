"""Exceptions whose message is a complete answer to the user, and helpers to write such messages."""

import reprlib


class InputError(ValueError):
    """A wrong argument, file or record, refused before work starts.

    The message is one line that names the argument or the file, states what is wrong with it and how to fix it. Command
    lines print it with options in place of arguments and exit with status 2.
    """


class FailedError(Exception):
    """Work that failed although the input was valid. Command lines print its one line and exit with status 1."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of Python, NumPy, JAX or PyTorch says that memory ran out."""
    return isinstance(error, MemoryError) or any(mark in str(error)[:200] for mark in _OUT_OF_MEMORY)


def shown(value: object) -> str:
    """Return the representation of a value for a message: on one line, shortened if it is long or deeply nested."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to convert integers of thousands of digits
        return f"an {type(value).__name__} too long to print"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException, where: object = "") -> str:
    """Return the first sentence of an error's message without the place that it names.

    Args:
      error: Error with a message of the form ``PLACE: problem. How to fix it.``
      where: Place that the message names.

    Examples:
      >>> reason_of(InputError("run.json: is not JSON. Pass a JSON file."), "run.json")
      'is not JSON'
    """
    return str(error).removeprefix(f"{where}: ").partition(". ")[0].rstrip(".")


# JAX's status, and PyTorch's messages for a GPU and a CPU.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
