"""The one exception that means: the caller's input is wrong, and here is what would be accepted."""

import reprlib


class InputError(ValueError):
    """A wrong argument, file or record, refused before work starts.

    The message is one line: what is wrong, where (file, line or key), what was found, what is accepted. Command
    lines print it as it is and exit with status 2.
    """


class FailedError(Exception):
    """Work that did not come to its end though the input was good: of a command one line, exit status 1."""


def shown(value: object) -> str:
    """A found value as a message shows it: on one line, cut where it is long or deep."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return f"one {type(value).__name__} too long to write"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
