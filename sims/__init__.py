"""Runnable experiments, one a file: `python -m sims.NAME --help`."""

import os
import signal
import sys
from typing import Any, NoReturn


def stop(*_: Any) -> NoReturn:
    """Answer Ctrl-C while a command is imported: one line, and out; nothing is begun that could be put away."""
    os.write(2, b"stopped\n")
    os._exit(130)


# The first import of `python -m sims.NAME`, before those that take seconds; `cli.run` ends it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
