"""Runnable experiments, one a file: `python -m sims.NAME --help`."""

import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = "Interrupted."
STOPPED = f"{INTERRUPTED} Run the same command again to resume."
"""Last line of a command that Ctrl-C or SIGTERM ended. Without an open run folder, INTERRUPTED alone."""


def stop(number: int, _: Any = None) -> NoReturn:
    """Answer a signal while a command is imported: print one line and exit, as there is nothing to save yet."""
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(128 + number)


# The first import of `python -m sims.NAME` and of `rora`, before those that take seconds; `cli.run` ends it.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "rora":
    for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(_number) is _default:
            signal.signal(_number, stop)
