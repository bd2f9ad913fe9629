"""Experiments as commands, one per file: `python -m sims.NAME --help`."""

import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = "Interrupted."
STOPPED = f"{INTERRUPTED} Run the same command again to resume."
"""Last line of a command that Ctrl-C or SIGTERM ends; without an open run folder, it is `INTERRUPTED`."""


def stop(number: int, _: Any = None) -> NoReturn:
    """Handle a signal during the imports of a command, when there is nothing to save: print one line and exit.

    Args:
      number: Number of the signal.
    """
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(128 + number)


# This is the first import of `python -m sims.NAME` and of `rora`, before imports that take seconds. `cli.run_command`
# installs the handlers for the work itself.
if sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "rora":
    for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(_number) is _default:
            signal.signal(_number, stop)
