"""Command lines from dataclasses, and the one way a command ends on bad input: one line, exit status 2."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from rora_theory.errors import InputError

Config = TypeVar("Config")


def parse(config: type[Config], argv: Sequence[str] | None = None, *, description: str) -> Config:
    """Parse ``argv`` into the dataclass ``config``; an unparsable one prints its reason and exits with status 2.

    Lists are separated by spaces (``--ranks 8 16 32``), names use hyphens, and ``--help`` is drawn from the
    attribute docstrings.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return tyro.cli(
        config,
        prog=f"python -m {spec.name}" if spec else None,
        args=argv,
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
    )


def run(main: Callable[[], None]) -> None:
    """Run ``main``; `InputError` and file errors become one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> NoReturn:
    """Print one line ``error: ...`` on stderr and exit with status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
