"""Draws a choice: the error of every unit when it alone is removed, in all and for its size."""

from pathlib import Path

import numpy as np

from flaxkd.drawing import figures

KEPT, REMOVED, WORDS = "#1971c2", "#e8590c", "#59636e"


def draw(choice, path: Path) -> None:
    """Writes a PNG with a row for each place and a mark for each unit there.

    On the left is what the output loses without a unit, on the right how much that is for each million parameters, in
    which the budget is counted. The axis is logarithmic. choice: a Choice with units."""
    places = list(dict.fromkeys(unit.place for unit in choice.units))
    figure, axes = figures.panels(2, height=1.4 + 0.3 * len(places))
    millions = choice.parameters / 1e6
    panels = {
        "error without this unit alone": choice.errors,
        "error for each million parameters": choice.errors / millions,
    }
    rows = np.array([places.index(unit.place) for unit in choice.units])
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for gone, color, word in ((False, KEPT, "kept"), (True, REMOVED, "removed")):
            mine = choice.removed == gone
            style = dict(facecolors="white" if gone else color, edgecolors=color, s=34, linewidths=1.4, zorder=3)
            axis.scatter(values[mine], rows[mine], label=f"{word} ({mine.sum()})", **style)
        for unit, value, row in zip(choice.units, values, rows, strict=True):
            axis.annotate(unit.label, (value, row), (0, 4.5), textcoords="offset points", ha="center", fontsize=6.5,
                          color=WORDS)  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_ylim(len(places) - 0.5, -0.8)
        axis.set_yticks(range(len(places)), places if axis is axes[0] else [""] * len(places))
        figures.readable(axis, "x", values)
    axes[0].legend(fontsize=8, loc="best")
    share, ratio = choice.shares[0], choice.measured / choice.expected if choice.expected else 1
    figure.suptitle(
        f"{choice.student.names[0]}: {share:.1%} of the parameters; error as cut {choice.measured:.3g}, "
        f"{ratio:.2f} times the sum of its units",
        fontsize=11, color=figures.INK,
    )  # fmt: skip
    figures.save(figure, path)
