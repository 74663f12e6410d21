"""What long work prints goes on when nobody reads it any more: a closed pipe or terminal, a log on a full disk.

Short commands end then (command.py)."""

import contextlib
import os
import sys
from collections.abc import Iterator


class Lasting:
    """A text stream that drops what cannot be written, and otherwise is the one given."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # the second if it is closed
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """In this context, what is printed never ends a command."""
    before = sys.stdout, sys.stderr
    nowhere = lambda: open(os.devnull, "w", encoding="utf-8")  # for one closed by whoever started the command
    sys.stdout, sys.stderr = (Lasting(nowhere() if stream is None else stream) for stream in before)
    try:
        yield
    finally:
        for outlasted in (sys.stdout, sys.stderr):
            _settle(outlasted.stream)
        sys.stdout, sys.stderr = before


def _settle(stream) -> None:
    """Writes what is left; if that fails, drops it: else Python tries again at its end, and changes the exit status."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
