"""How a command ends before its time: Ctrl-C and SIGTERM, what a cluster sends, are one line and a run that goes on."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

LINE = "stopped; the same command goes on from here"

Ending = Callable[[str, str | None], None]
"""Told how a run ended, ``interrupted`` or ``failed``, and the error."""

_open: list[Ending] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def status(stop: BaseException) -> int:
    """The exit status of a command that was stopped: 128 and the signal's number, as shells have it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def opened(ending: Ending) -> None:
    """Have ``ending`` called where this command ends early, until `closed`."""
    _open.append(ending)


def closed(ending: Ending) -> None:
    """The run has ended by itself."""
    if ending in _open:
        _open.remove(ending)


def count() -> int:
    """How many runs are open."""
    return len(_open)


def end_all(how: str, error: str | None = None, *, but: int = 0) -> None:
    """Tell every open run how it ended, but for the first ``but``."""
    while len(_open) > but:
        _open.pop()(how, error)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the main thread while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
