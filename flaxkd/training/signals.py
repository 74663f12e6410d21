"""SIGTERM, Ctrl-C and a closed terminal (SIGHUP): a run saves before it stops."""

import contextlib
import os
import signal

STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class stop_signals:
    """In this context, STOPPING set `asked`; the loop reads it between steps. A second Ctrl-C interrupts.

    A signal that the run was started to ignore, as SIGHUP under nohup, stays ignored."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        def ask(number, frame):
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True
            with contextlib.suppress(OSError):  # the terminal may be gone; print could be at work already
                os.write(2, f"\n{signal.Signals(number).name}: saving, then stopping\n".encode())

        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, ask) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
