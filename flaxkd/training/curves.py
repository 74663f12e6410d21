"""curves.png: every figure in a run's metrics.jsonl, over its steps."""

from pathlib import Path

from flaxkd.drawing import figures
from flaxkd.training import metrics


def draw(workdir: Path) -> None:
    """Draws curves.png: one panel per family of figures in metrics.jsonl, training and validation together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series: dict[str, list[tuple[int, float]]] = {}
    for record in metrics.read(workdir):
        for name, value in record.items():
            if name != "step":
                series.setdefault(name, []).append((record["step"], value))
    panels: dict[str, list[str]] = {}
    for name in series:
        base = name.removeprefix("validation/")
        panels.setdefault("feature pairs" if base.startswith("feature/") else base, []).append(name)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            steps, values = zip(*series[name], strict=True)
            validation = name.startswith("validation/")
            label = name.removeprefix("validation/").removeprefix("feature/") if title == "feature pairs" else name
            if title == "feature pairs" and validation:
                continue  # the legend has room for training's pairs alone
            style = dict(marker="o", markersize=3, linewidth=1.2) if validation else dict(linewidth=1)
            color = plt.get_cmap("tab10")(i % 10) if title == "feature pairs" else figures.LINES[1 if validation else 0]
            axis.plot(steps, values, label=label if validation or title == "feature pairs" else "training",
                      color=color, **style)  # fmt: skip
        positive = all(value > 0 for name in names for _, value in series[name])
        if positive and title.startswith(("loss", "feature", "grad")):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if len(names) > 1 and axis.get_legend_handles_labels()[0]:
            below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # else it hides the curves
            axis.legend(fontsize=7, **(below if title == "feature pairs" else {}))
    figures.save(figure, Path(workdir) / "curves.png")
