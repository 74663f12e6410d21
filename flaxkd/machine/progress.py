"""Progress of what takes long: a bar in a terminal, and a line now and then where stderr is a file or a pipe."""

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Iterator

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines where there is no terminal
COMPILING = "compiling"
BAR = "{said}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{left}, {speed}{postfix}]"
LINE = "{said}{n_fmt}/{total_fmt}{unit} ({percentage:.0f}%), {elapsed} elapsed, {left} left, {speed}{postfix}"


class Bar(tqdm):
    """A bar over `total` units; with None, words and a clock. Its rate is that of the units alone.

    The clock of the rate starts with the first update: compilation comes before it. The time of `during` does not
    count as the units' either. The time left includes it, at the share it has had since the first update.

    first: said until the first update, such as COMPILING. leave: whether the bar stays when it is closed."""

    def __init__(self, total: int | None, words: str = "", unit: str = " steps", *, first: str = "", initial: int = 0,
                 leave: bool = True, disable: bool = False):  # fmt: skip
        self.live = sys.stderr.isatty() or "ipykernel" in sys.modules  # a notebook shows a bar as a terminal does
        self.words, self.doing, self.since = words, first, time.monotonic()
        self.began: tuple[float, int] | None = None  # the rate's clock: its start, and the units done before
        self.paused = 0.0  # seconds of `during` since then
        self.shown = self.since if total is not None and first != COMPILING else -EVERY
        every = 0.5 if self.live else EVERY
        form = "{said}{elapsed}" if total is None else BAR if self.live else LINE
        super().__init__(total=total, unit=unit, initial=initial, leave=leave, disable=disable, bar_format=form,
                         dynamic_ncols=self.live, mininterval=every, miniters=1, maxinterval=EVERY,
                         file=None if self.live else _Lines(sys.stderr))  # fmt: skip
        self.over = threading.Event()
        if not disable:
            threading.Thread(target=_clock, args=(weakref.ref(self), self.over), daemon=True).start()

    @property
    def format_dict(self) -> dict:
        if not hasattr(self, "unit"):  # disabled
            return super().format_dict
        said = ", ".join(filter(None, (self.words, self.doing)))
        left, one = self.left(), self.unit.strip().removesuffix("s")
        left = "?" if left is None else self.format_interval(left)
        if (rate := self.rate()) is None:
            speed = f"? {one}s/s"
        else:
            speed = f"{1 / rate:,.1f} s/{one}" if rate < 1 else f"{rate:,.{0 if rate >= 100 else 1}f} {one}s/s"
        return super().format_dict | {"said": said and f"{said}: ", "speed": speed, "left": left}

    def rate(self) -> float | None:
        """Units a second, without what came before the first update and without `during`; None if not known yet."""
        if self.began is None or self.n <= self.began[1]:
            return None
        now = time.monotonic()
        paused = self.paused + (now - self.since if self.doing else 0)
        return (self.n - self.began[1]) / max(now - self.began[0] - paused, 1e-9)

    def left(self) -> float | None:
        """Seconds until all is done, at the pace since the first update; None if not known yet."""
        if self.total is None or self.began is None or self.n <= self.began[1]:
            return None
        return (self.total - self.n) * (time.monotonic() - self.began[0]) / (self.n - self.began[1])

    def update(self, n: int = 1) -> None:
        super().update(n)
        if self.began is None:
            self.begin()

    def begin(self) -> None:
        """Starts the clock of the rate. The first update does it, which is right where a unit is short."""
        self.began, self.doing = (time.monotonic(), self.n), ""

    def skip(self, n: int) -> None:
        """Counts n units that were done before, and cost no time now."""
        self.n += n
        if self.began is not None:
            self.began = (self.began[0], self.began[1] + n)

    def describe(self, words: str) -> None:
        """Says what the units are of."""
        self.words = words
        self.refresh()

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """In this context something other than a unit is at work. It is said, and its time is not the units'."""
        before, self.doing, self.since = self.doing, what, time.monotonic()
        if what == COMPILING != before:
            self.shown = -EVERY
        self.refresh()
        try:
            yield
        finally:
            if self.began is not None:
                self.paused += time.monotonic() - self.since
            self.doing = before

    def refresh(self, *args, **kwargs) -> None:
        """Without a terminal, a line in EVERY seconds at most: the caller need not count."""
        if self.live or time.monotonic() - self.shown >= EVERY:
            self.shown = time.monotonic()
            super().refresh(*args, **kwargs)

    def close(self) -> None:
        if hasattr(self, "over"):
            self.over.set()
        super().close()


def _clock(bar: weakref.ref, over: threading.Event) -> None:
    """Refreshes the bar while nothing is counted, so that its clock goes on."""
    while not over.wait(1.0):
        if (shown := bar()) is None:
            return
        if shown.doing or shown.total is None:
            shown.refresh()
        del shown


class _Lines:
    """stderr where it is no terminal: what tqdm writes becomes lines. It may be gone, which ends no work."""

    def __init__(self, file):
        self.file, self.encoding = file, getattr(file, "encoding", None)

    def write(self, text: str) -> None:
        if text := text.replace("\x1b[A", "").strip():  # without carriage returns, and moves between bars
            with contextlib.suppress(OSError, ValueError):
                self.file.write(f"{text}\n")
                self.file.flush()

    def flush(self) -> None:
        """Every line is flushed when it is written."""


def write(line: str) -> None:
    """Prints a line on stderr, above the bars."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(line, file=sys.stderr)
