"""Work for a child process that exceeds its limits."""

import signal


def work(kind):
    """Yield 1 and 2, and exceed the named limit between them."""
    yield 1
    if kind == "time":
        while True:
            pass
    if kind == "memory":
        yield len(bytearray(1 << 40))
    if kind == "signal":
        signal.raise_signal(signal.SIGKILL)
    if kind == "fault":
        raise KeyError("fault")
    yield 2
