"""curves.png: every figure in a run's metrics.jsonl, over its steps."""

import math
from pathlib import Path

import numpy as np

from flaxkd.drawing import figures
from flaxkd.training import metrics

PAIRS = "feature pairs"
# The first panels, in this order. Others follow in the order of the records.
FIRST = ("loss", "loss_noise", "loss_output", "loss_feature", "learning_rate", "grad_norm", "images_per_second")
POINTS = 400  # of a curve: more would be a solid bar


def draw(workdir: Path) -> None:
    """Draws curves.png: one panel per family of figures in metrics.jsonl, training and validation together.

    Values that are not finite are left out. Without any figure, there is no picture."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in metrics.read(workdir):
        for name, value in record.items():
            if name != "step" and math.isfinite(value):
                series.setdefault(name, []).append((record["step"], value))
    found: dict[str, list[str]] = {}
    for name in series:
        base = name.removeprefix("validation/")
        found.setdefault(PAIRS if base.startswith("feature/") else base, []).append(name)
    order = [*(name for name in FIRST if name in found), *(name for name in found if name not in (*FIRST, PAIRS))]
    if not found:
        return
    if PAIRS in found:  # the last one: its legend is below
        order.append(PAIRS)
        training = [name for name in found[PAIRS] if not name.startswith("validation/")]
        found[PAIRS] = training or found[PAIRS]  # the legend has no room for both
    figure, axes = figures.panels(len(order))
    for axis, title in zip(axes, order, strict=True):
        for i, name in enumerate(found[title]):
            validation = name.startswith("validation/")
            label = name.removeprefix("validation/").removeprefix("feature/") if title == PAIRS else None
            label = label or ("validation" if validation else "training")
            color = figures.LINES[i % len(figures.LINES) if title == PAIRS else int(validation)]
            plot(axis, *np.array(series[name]).T, label, color, dots=validation, band=title != PAIRS)
        axis.set_title(title.replace("images_per_second", "images/s"), fontsize=10)
        values = [value for name in found[title] for _, value in series[name]]
        figures.readable(axis, "y", values, log=title.startswith(("loss", "feature", "grad")))
        if title == "images_per_second":
            axis.set_ylim(bottom=0)
        figures.steps(axis)
        if title == PAIRS:
            axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
        elif len(found[title]) > 1:
            axis.legend(fontsize=7)
    figures.save(figure, Path(workdir) / "curves.png")


def plot(axis, steps: np.ndarray, values: np.ndarray, label: str, color: str, *, dots: bool, band: bool) -> None:
    """A curve; beyond POINTS the means of as many pieces, if wanted on a band from least to largest."""
    if len(steps) > POINTS:
        pieces = list(zip(np.array_split(steps, POINTS), np.array_split(values, POINTS), strict=True))
        if band:
            low, high = ([of(v) for _, v in pieces] for of in (np.min, np.max))
            axis.fill_between([np.mean(s) for s, _ in pieces], low, high, color=color, alpha=0.15, linewidth=0)
        steps, values = np.array([(np.mean(s), np.mean(v)) for s, v in pieces]).T
    marker = dict(marker="o", markersize=3) if (dots and len(steps) <= 50) or len(steps) == 1 else {}
    axis.plot(steps, values, label=label, color=color, linewidth=1.2 if dots else 1, **marker)
