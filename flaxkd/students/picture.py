"""Draws the students block by block, from the table: what each keeps of its teacher, and what is compared.

`python -m flaxkd.blocks` draws the README's picture.
"""

from pathlib import Path
from typing import NamedTuple

from flaxkd import students
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import count
from flaxkd.students import Student
from flaxkd.students.pairs import modules, origin, split, stages

# Lengths in units of the height of the largest block.
NAMES, GAP, ROW = 3.15, 0.46, 1.42  # width of the names, between blocks, between rows
WIDTHS = {"resnets": 0.19, "attentions": 0.19, "resample": 0.13}
SEAM, HALF = 0.035, 0.75  # between bars; height of a block relative to one with twice its latent rows

INK, FAINT, REMOVED = "#1b1f24", "#59636e", "#b9c0c8"
FILLS = {"resnets": "#46586b", "attentions": "#9fb6cd", "resample": "#dbe3eb"}
PUBLISHERS = {
    "segmind": ("Segmind", "#e8590c"),
    "bksdm": ("BK-SDM", "#1971c2"),
    "segmind_sdxl": ("Segmind", "#e8590c"),
    "koala": ("KOALA", "#2f9e44"),
}
WORDS = {"resnets": "resnet", "attentions": "transformer", "resample": "down- or upsampler"}


class Bar(NamedTuple):
    """A module of the teacher on the page, e.g. "up_blocks.1.resnets.2": it starts at `left`, at latent size `size`.

    halvings: how often the latents have been halved by then. parts: what is kept or removed of it, from above: the
    transformer blocks of an attention, else the module itself."""

    module: str
    left: float
    width: float
    size: int
    halvings: int
    parts: tuple[str, ...] = ("",)

    @property
    def kind(self) -> str:
        kind = split(self.module)[1].partition(".")[0]
        return "resample" if kind.endswith("samplers") else kind

    @property
    def height(self) -> float:
        return HALF**self.halvings


def layout(unet: UNetConfig) -> tuple[list[Bar], dict[str, float]]:
    """(bars, {module name: x of its output}): a block's output is in the gap after it, a layer's on its bar.

    What an attention is made of has no bar of its own, and its output is on that of the attention."""
    bars, outputs, left, halvings = [], {}, NAMES, 0
    blocks, inside = stages(unet), []
    for name in modules(unet):
        if name in blocks:
            outputs[name] = left - SEAM + GAP / 2
            left += GAP - SEAM
            halvings += blocks[name].resample * (1 if name.startswith("down") else -1)
        elif len(split(name)) > 2:
            inside.append(name)
        else:
            bar = Bar(name, left, 0.0, unet.sample_size >> halvings, halvings)
            parts = [part for part in inside if split(part)[-1].startswith("transformer_blocks.")]
            bar = bar._replace(width=WIDTHS[bar.kind], parts=tuple(parts) or (name,))
            bars.append(bar)
            outputs |= dict.fromkeys([name, *inside], left + bar.width / 2)
            left += bar.width + SEAM
            inside = []
    return bars, outputs


def kept(student: Student, teacher: dict) -> set[str]:
    """The teacher's modules that the student keeps. teacher: its unet/config.json."""
    return {origin(student, module) for module in modules(UNetConfig.from_dict(students.config(student, teacher)))}


class Comparison(NamedTuple):
    """A feature compared in one row: where the student has it, the teacher's module, and who compares them."""

    here: str  # the teacher's module that the student's was copied from
    there: str
    pairings: tuple[str, ...]


def comparisons(student: Student, teacher: dict) -> list[Comparison]:
    """This student's feature pairs, over all its published pairings. teacher: its unet/config.json."""
    found: dict[tuple[str, str], list[str]] = {}
    for pairing in student.published:
        for mine, theirs in students.feature_pairs(student, pairing, teacher):
            found.setdefault((origin(student, mine), theirs), []).append(pairing)
    return [Comparison(*pair, tuple(pairings)) for pair, pairings in found.items()]


def draw(out: Path, shown: tuple[Student, ...], teacher: dict, title: str, format: str | None = None) -> None:
    """Writes the picture: a row for the teacher, one for each student, and dotted lines through compared features.

    teacher: its unet/config.json. out: a path, or an open file with its `format`. Raises ValueError, as
    `students.config` does, if a student cannot be cut from that teacher."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unet = UNetConfig.from_dict(teacher)
    bars, outputs = layout(unet)
    right, top, bottom = bars[-1].left + bars[-1].width + GAP, -1.4, ROW * len(shown) + 1.25
    figure, axes = plt.subplots(figsize=(right * 0.82, (bottom - top) * 0.82))
    axes.set(xlim=(0, right), ylim=(bottom, top), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)

    counts = [count("unet", teacher), *(count("unet", students.config(student, teacher)) for student in shown)]
    heads(axes, unet, bars)
    for row, student in enumerate((None, *shown)):
        y = row * ROW
        label(axes, y, student, counts[row], counts[0], title)
        has = kept(student, teacher) if student else set(modules(unet))
        for bar in bars:
            for i, part in enumerate(bar.parts):
                draw_bar(axes, bar, y, part in has, i)

    lowest: dict[str, int] = {}
    for row, student in enumerate(shown, start=1):
        for compared in comparisons(student, teacher):
            y, x, line = row * ROW, outputs[compared.here], outputs[compared.there]
            lowest[compared.there] = row
            colors = [PUBLISHERS[pairing][1] for pairing in compared.pairings]
            if x != line:
                axes.plot([line, x], [y, y], color=colors[0], zorder=3, **DOTS)
            bead(axes, x, y, colors)
    for module, row in lowest.items():
        axes.plot([outputs[module]] * 2, [0, row * ROW], color=INK, zorder=2, **DOTS)
        bead(axes, outputs[module], 0, [INK])
    legend(axes, bottom - 0.3, [tuple(student.published) for student in shown])
    figure.savefig(out, dpi=150, facecolor="white", format=format)
    plt.close(figure)


DOTS = dict(linestyle=(0, (0.1, 2.1)), linewidth=1.7, dash_capstyle="round")


def heads(axes, unet: UNetConfig, bars: list[Bar]) -> None:
    """The names of the blocks, their channels and latent size, above the teacher."""
    for block, stage in stages(unet).items():
        own = [bar for bar in bars if bar.module.startswith(f"{block}.")]
        x = (own[0].left + own[-1].left + own[-1].width) / 2
        name = block.replace("_blocks.", " ").replace("_block", "")
        axes.text(x, -1.18, name, ha="center", va="center", fontsize=12.5, fontweight="bold", color=INK)
        size = f"{stage.channels}\n{own[0].size}×{own[0].size}"
        axes.text(x, -0.85, size, ha="center", va="center", fontsize=9.5, color=FAINT, linespacing=1.15)
    axes.text(0.12, -0.85, "channels\nlatent size", va="center", fontsize=9.5, color=FAINT, linespacing=1.15)


def label(axes, y: float, student: Student | None, count: int, whole: int, title: str) -> None:
    name = " = ".join(student.names) if student else "teacher"
    titles = [published.title for published in student.published.values()] if student else [title]
    share = f"({count / whole:.0%})" if student else "parameters"
    axes.text(0.12, y - 0.2, name, va="center", fontsize=13.5, fontweight="bold", color=INK)
    axes.text(0.12, y + 0.07, ", ".join(titles), va="center", fontsize=9.5, color=FAINT)
    axes.text(0.12, y + 0.29, f"{count:,} {share}", va="center", fontsize=10.5, color=INK)


def draw_bar(axes, bar: Bar, y: float, present: bool, part: int = 0) -> None:
    """A bar, or one of its parts, numbered from above."""
    from matplotlib.patches import Rectangle

    height = bar.height / len(bar.parts)
    corner = bar.left, y - bar.height / 2 + part * height
    style = dict(facecolor=FILLS[bar.kind], edgecolor=FILLS[bar.kind], linewidth=0.8)
    if not present:
        style = dict(facecolor="white", edgecolor=REMOVED, linewidth=1, linestyle=(0, (2.5, 1.8)))
    axes.add_patch(Rectangle(corner, bar.width, height, zorder=1 + present / 2, **style))


def bead(axes, x: float, y: float, colors: list[str]) -> None:
    """A dot, split evenly between its colors."""
    from matplotlib.patches import Wedge

    for i, color in enumerate(colors):
        start, span = 90 + i * 360 / len(colors), 360 / len(colors)
        style = dict(facecolor=color, edgecolor="white", linewidth=0.8)
        axes.add_patch(Wedge((x, y), 0.105, start, start + span, zorder=4, **style))


def legend(axes, y: float, pairings: list[tuple[str, ...]]) -> None:
    """pairings: those of each student."""
    x = 0.12
    axes.apply_aspect()  # else texts are measured on a page of another shape
    renderer = axes.figure.canvas.get_renderer()

    def say(words: str) -> None:
        nonlocal x
        text = axes.text(x + 0.1, y, words, va="center", fontsize=10.5, color=INK)
        end = text.get_window_extent(renderer).x1, 0
        x = axes.transData.inverted().transform(end)[0] + 0.4

    legend_bar = Bar("down_blocks.0.resnets", x, WIDTHS["resnets"], 8, halvings=3)
    for kind, width in WIDTHS.items():
        draw_bar(axes, legend_bar._replace(module=f"down_blocks.0.{kind}", left=x, width=width), y, True)
        x += width
        say(WORDS[kind])
    draw_bar(axes, legend_bar._replace(left=x), y, False)
    x += legend_bar.width
    say("removed")
    entries = {f"by {PUBLISHERS[name][0]}": (name,) for names in pairings for name in names}
    entries |= dict([("by both", names) for names in pairings if len(names) == 2][:1])
    for i, (words, names) in enumerate(entries.items()):
        bead(axes, x + 0.1, y, [PUBLISHERS[name][1] for name in names])
        x += 0.2
        say(words if i else f"compared {words}")
