"""SIGTERM and Ctrl-C: a run saves before it stops."""

import signal
import sys


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class stop_signals:
    """In this context, SIGTERM and Ctrl-C set `asked`; the loop reads it between steps. A second Ctrl-C interrupts."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        def ask(number, frame):
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True
            print(f"\n{signal.Signals(number).name}: saving, then stopping", file=sys.stderr, flush=True)

        self.before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
