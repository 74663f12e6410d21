"""Shared by the charts of all commands: colors, and how a matplotlib figure becomes a file."""

from pathlib import Path

from flaxkd.machine import files

INK, LINES = "#1b1f24", ["#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#57606a"]


def save(figure, path: Path) -> None:
    """Writes a pyplot figure as a PNG, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    with files.whole(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
