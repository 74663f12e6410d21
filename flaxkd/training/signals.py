"""A run that is asked to stop saves first."""

import signal
import sys


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


class stop_signals:
    """Within it, SIGTERM and Ctrl-C set `asked`, which the loop reads between steps; a second Ctrl-C interrupts."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        def ask(number, frame):
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True
            print(f"\n{signal.Signals(number).name}: saving, then leaving", file=sys.stderr, flush=True)

        self.before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
