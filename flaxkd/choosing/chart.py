"""Draws a choice: the error of every unit when it alone is removed, in all and for its size."""

from pathlib import Path

import numpy as np

from flaxkd.drawing import figures

WORDS = "#59636e"
CLOSE = 25  # pixels between two marks whose labels would touch
FATES = {  # what became of a unit: (color, filled, words)
    "kept": ("#1971c2", True, "kept"),
    "removed": ("#e8590c", False, "removed"),
    "gone": ("#b9c0c8", False, "part of a removed one"),
}


def draw(choice, path: Path) -> None:
    """Writes a PNG with a row for each place and a mark for each unit there.

    On the left is what the output loses without a unit, on the right how much that is for each million parameters, in
    which the budget is counted. The axis is logarithmic. choice: a Choice with units."""
    places = list(dict.fromkeys(unit.place for unit in choice.units))
    figure, axes = figures.panels(2, height=1.4 + 0.36 * len(places))
    millions = choice.parameters / 1e6
    panels = {
        "error without this unit alone": choice.errors,
        "error for each million parameters": choice.errors / millions,
    }
    fates = np.array(choice.fates)
    rows = np.array([places.index(unit.place) for unit in choice.units])
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        for fate, (color, filled, words) in FATES.items():
            mine = fates == fate
            style = dict(facecolors=color if filled else "white", edgecolors=color, s=34, linewidths=1.4, zorder=3)
            axis.scatter(values[mine], rows[mine], label=f"{words} ({mine.sum()})", **style)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(len(places) - 0.4, -0.6)
        axis.set_yticks(range(len(places)), places if axis is axes[0] else [""] * len(places))
        figures.readable(axis, "x", values)
        for row in range(len(places)):
            here = [i for i in np.argsort(values) if rows[i] == row]
            for side, height in ((here[::2], 7), (here[1::2], -8)):  # neighbours are above and below the line
                annotate(axis, [choice.units[i].label for i in side], values[side], row, height)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    share, ratio = choice.shares[0], choice.measured / choice.expected if choice.expected else 1
    figure.suptitle(
        f"{choice.student.names[0]}: {share:.1%} of the parameters; error as cut {choice.measured:.3g}, "
        f"{ratio:.2f} times the sum of its units",
        fontsize=11, color=figures.INK,
    )  # fmt: skip
    figures.save(figure, path)


def annotate(axis, labels: list[str], values: np.ndarray, row: int, height: int) -> None:
    """Writes labels at marks of ascending values, `height` points above the row. Two that would touch lean apart."""
    at = axis.transData.transform(np.stack([values, np.full(len(values), row)], axis=-1))[:, 0]
    close = [False, *(np.diff(at) < CLOSE), False]
    for label, value, before, after in zip(labels, values, close, close[1:], strict=False):
        leans = {(True, False): "left", (False, True): "right"}.get((before, after), "center")
        style = dict(textcoords="offset points", ha=leans, va="center", fontsize=6.5, color=WORDS)
        axis.annotate(label, (value, row), (0, height), **style)
