"""Shared by the charts of all commands: colors, panels, axes with numbers to read, and how a chart becomes a file."""

import math
from collections.abc import Iterable
from pathlib import Path

from flaxkd.machine import files

INK = "#1b1f24"
ROUND = [1, 2, 5, 10]  # between ticks
LINES = ["#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#1b7c83", "#bc4c00", "#218bff"]


def panels(n: int, height: float = 3.2) -> tuple:
    """(pyplot figure, its n axes in reading order), at most three side by side. height: of one, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, n)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, list(axes.flat[:n])


def readable(axis, along: str, values: Iterable[float], log: bool = True) -> None:
    """Few ticks with plain numbers (0.02) along "x" or "y" of an axis with these values.

    log: a logarithmic scale, if all values are positive and the largest is at least twice the smallest."""
    from matplotlib import ticker

    of = getattr(axis, f"{along}axis")
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values, default=0), max(values, default=0)
    locator = ticker.MaxNLocator(6, steps=ROUND)
    if log and low > 0 and high / low >= 2:
        getattr(axis, f"set_{along}scale")("log")
        decades = math.log10(high / low)
        subs = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
        locator = ticker.LogLocator(subs=subs, numticks=8)
        of.set_minor_locator(ticker.NullLocator())
    of.set_major_locator(locator)
    of.set_major_formatter(ticker.StrMethodFormatter("{x:.10g}"))


def steps(axis, label: str = "step") -> None:
    """An x-axis of whole numbers, such as optimizer steps."""
    from matplotlib import ticker

    low, high = axis.get_xlim()
    if high - low < 1:  # of a single step
        axis.set_xlim(low - 1, high + 1)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=ROUND, integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axis.set_xlabel(label, fontsize=8)


def save(figure, path: Path) -> None:
    """Writes a pyplot figure as a PNG, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    with files.whole(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
