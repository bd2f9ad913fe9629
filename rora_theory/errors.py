"""The one exception that means: the caller's input is wrong, and here is what would be accepted."""


class InputError(ValueError):
    """A wrong argument, file or record, refused before work starts.

    The message is one line: what is wrong, where (file, line or key), what was found, what is accepted. Command
    lines print it as it is and exit with status 2.
    """
