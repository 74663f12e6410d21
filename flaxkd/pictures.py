"""Pictures of a run: grids of drawn images with labels, and curves of everything in metrics.jsonl."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flaxkd import metrics

GAP, MARGIN = 6, 10  # pixels
INK, PAPER, LINES = "#1b1f24", "#ffffff", ["#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#57606a"]


def grid(
    columns: Mapping[str, np.ndarray],
    rows: Sequence[str],
    path: Path,
    *,
    scale: int | None = None,
    info: Mapping[str, str] | None = None,
) -> None:
    """Writes a labelled grid. columns: {title: uint8[n, H, W, 3]}; rows: n prompts; scale: enlargement of pixels,

    None for what brings a picture to at least 128 pixels. info: texts to write into the PNG."""
    height, width = next(iter(columns.values())).shape[1:3]
    scale = scale or max(1, -(-128 // height))
    height, width = height * scale, width * scale
    font, small = (ImageFont.load_default(size) for size in (15, 13))
    label = 190
    size = (2 * MARGIN + label + len(columns) * (width + GAP), 2 * MARGIN + 24 + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(columns.items()):
        left = MARGIN + label + i * (width + GAP)
        title = end_of(draw, title, width, font)
        draw.text((left + width / 2, MARGIN + 8), title, INK, font, anchor="mm")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize(
                (width, height), Image.NEAREST if scale > 1 else Image.LANCZOS
            )
            top = MARGIN + 24 + j * (height + GAP)
            sheet.paste(tile, (left, top))
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline="#d0d7de")
    for j, prompt in enumerate(rows):
        top = MARGIN + 24 + j * (height + GAP)
        text = wrap(draw, prompt, label - 12, small)
        draw.multiline_text((MARGIN, top + height / 2), text, INK, small, anchor="lm")
    sheet.info |= info or {}
    save(sheet, path)


def wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def end_of(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> str:
    """As much of the end of a text as fits into `width` pixels: of a path, that is what tells it from others."""
    cut = text
    while draw.textlength(cut, font) > width and len(cut) > 2:
        cut = f"…{cut[2:]}"
    return cut


def curves(workdir: Path) -> None:
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
    figure, axes = plt.subplots(
        rows, columns, figsize=(5 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            steps, values = zip(*series[name], strict=True)
            validation = name.startswith("validation/")
            label = (
                name.removeprefix("validation/").removeprefix("feature/")
                if title == "feature pairs"
                else name
            )
            if title == "feature pairs" and validation:
                continue  # the legend holds as many pairs as it can: training's
            style = dict(marker="o", markersize=3, linewidth=1.2) if validation else dict(linewidth=1)
            color = (
                plt.get_cmap("tab10")(i % 10) if title == "feature pairs" else LINES[1 if validation else 0]
            )
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
            below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)  # or it hides the curves
            axis.legend(fontsize=7, **(below if title == "feature pairs" else {}))
    save_figure(figure, Path(workdir) / "curves.png")


def save_figure(figure, path: Path) -> None:
    """A figure of matplotlib's pyplot as a PNG, whole or not at all, and closed."""
    import matplotlib.pyplot as plt

    scratch = path.with_name(f".{path.name}")
    figure.savefig(scratch, dpi=110)
    plt.close(figure)
    scratch.rename(path)


def save(image: Image.Image, path: Path) -> None:
    """A PNG with the texts of `image.info`, written whole or not at all: somebody may be looking at the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    for name, value in image.info.items():
        if isinstance(value, str):
            texts.add_text(name, value)
    scratch = path.with_name(f".{path.name}")
    image.save(scratch, "PNG", pnginfo=texts)
    scratch.rename(path)
