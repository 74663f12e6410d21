"""Draws the students block by block, from the table: what each keeps of its teacher, and what is compared.

`python -m flaxkd.blocks` draws the README's picture.
"""

from pathlib import Path
from typing import NamedTuple

from flaxkd import students
from flaxkd.models.unet import Stage, UNetConfig
from flaxkd.pretrained import ARCHITECTURES, count
from flaxkd.students import PAIRINGS, TABLE, Student

SHOWN = ARCHITECTURES["sd15"]  # the teacher of the README's picture

# Lengths in units of the height of the largest block.
NAMES, GAP, ROW = 3.15, 0.46, 1.42  # width of the names, between blocks, between rows
WIDTHS = {"resnets": 0.19, "attentions": 0.19, "resample": 0.13}
SEAM, HALF = 0.035, 0.75  # between bars; height of a block relative to one with twice its latent rows

INK, FAINT, REMOVED = "#1b1f24", "#59636e", "#b9c0c8"
FILLS = {"resnets": "#46586b", "attentions": "#9fb6cd", "resample": "#dbe3eb"}
PUBLISHERS = {"segmind": ("Segmind", "#e8590c"), "bksdm": ("BK-SDM", "#1971c2")}
WORDS = {"resnets": "resnet", "attentions": "transformer", "resample": "down- or upsampler"}


class Bar(NamedTuple):
    """A module of the teacher on the page, e.g. "up_blocks.1.resnets.2": it starts at `left`, at latent size `size`.

    halvings: how often the latents have been halved by then."""

    module: str
    left: float
    width: float
    size: int
    halvings: int

    @property
    def kind(self) -> str:
        return _path(self.module)[1].partition(".")[0]

    @property
    def height(self) -> float:
        return HALF**self.halvings


def stages(unet: UNetConfig) -> dict[str, Stage]:
    """{module name: block} in the order they run."""
    blocks = {f"down_blocks.{i}": stage for i, stage in enumerate(unet.down)}
    blocks |= {"mid_block": unet.mid} if unet.mid else {}
    return blocks | {f"up_blocks.{i}": stage for i, stage in enumerate(unet.up)}


def modules(unet: UNetConfig) -> dict[str, list[str]]:
    """{block: its modules}, both in the order they run."""
    found = {}
    for block, stage in stages(unet).items():
        mid = block == "mid_block"  # it starts with a resnet; attention precedes each of the others
        names = ["resnets.0"] if mid else []
        for i, depth in enumerate(stage.depths):
            attention = [f"attentions.{i}"] * bool(depth)
            names += [*attention, f"resnets.{i + 1}"] if mid else [f"resnets.{i}", *attention]
        found[block] = [f"{block}.{name}" for name in names + ["resample"] * stage.resample]
    return found


def layout(unet: UNetConfig) -> tuple[list[Bar], dict[str, float]]:
    """(bars, {module name: x of its output}): a block's output is in the gap after it, a layer's on its bar."""
    bars, outputs, left, halvings = [], {}, NAMES, 0
    for block, names in modules(unet).items():
        for name in names:
            bar = Bar(name, left, 0.0, unet.sample_size >> halvings, halvings)
            bar = bar._replace(width=WIDTHS[bar.kind])
            bars.append(bar)
            outputs[name] = outputs[f"{name}.proj_out"] = left + bar.width / 2
            left += bar.width + SEAM
        outputs[block] = left - SEAM + GAP / 2
        left += GAP - SEAM
        if stages(unet)[block].resample:
            halvings += 1 if block.startswith("down") else -1
    return bars, outputs


def origin(student: Student, module: str) -> str:
    """The teacher's module that the student's was copied from."""
    path = students.teacher_path(student, (*_path(module), "output"))
    return ".".join(path).removesuffix(".output")


def _path(module: str) -> tuple[str, ...]:
    """A number belongs to the word before it: "up_blocks.3.attentions.2" -> ("up_blocks.3", "attentions.2")."""
    path: list[str] = []
    for word in module.split("."):
        if word.isdigit():
            path[-1] += f".{word}"
        else:
            path.append(word)
    return tuple(path)


def kept(student: Student) -> set[str]:
    """The teacher's modules that the student keeps."""
    unet = UNetConfig.from_dict(students.config(student, ARCHITECTURES[student.family.shown].unet))
    return {origin(student, name) for names in modules(unet).values() for name in names}


class Comparison(NamedTuple):
    """A feature compared in one row: where the student has it, the teacher's module, and who compares them."""

    here: str  # the teacher's module that the student's was copied from
    there: str
    pairings: tuple[str, ...]


def comparisons(student: Student) -> list[Comparison]:
    """This student's feature pairs, over all its published pairings."""
    found: dict[tuple[str, str], list[str]] = {}
    for pairing in student.published:
        for mine, theirs in students.feature_pairs(student, pairing):
            found.setdefault((origin(student, mine), theirs), []).append(pairing)
    return [Comparison(*pair, tuple(pairings)) for pair, pairings in found.items()]


def draw(
    out: Path,
    shown: tuple[Student, ...] = TABLE,
    teacher: dict = SHOWN.unet,
    title: str = SHOWN.title,
    format: str | None = None,
) -> None:
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
        has = kept(student) if student else {bar.module for bar in bars}
        for bar in bars:
            draw_bar(axes, bar, y, bar.module in has)

    lowest: dict[str, int] = {}
    for row, student in enumerate(shown, start=1):
        for compared in comparisons(student):
            y, x, line = row * ROW, outputs[compared.here], outputs[compared.there]
            lowest[compared.there] = row
            colors = [PUBLISHERS[pairing][1] for pairing in compared.pairings]
            if x != line:
                axes.plot([line, x], [y, y], color=colors[0], zorder=3, **DOTS)
            bead(axes, x, y, colors)
    for module, row in lowest.items():
        axes.plot([outputs[module]] * 2, [0, row * ROW], color=INK, zorder=2, **DOTS)
        bead(axes, outputs[module], 0, [INK])
    legend(axes, bottom - 0.3)
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


def draw_bar(axes, bar: Bar, y: float, present: bool) -> None:
    from matplotlib.patches import Rectangle

    style = dict(facecolor=FILLS[bar.kind], edgecolor=FILLS[bar.kind], linewidth=0.8)
    if not present:
        style = dict(facecolor="white", edgecolor=REMOVED, linewidth=1, linestyle=(0, (2.5, 1.8)))
    axes.add_patch(Rectangle((bar.left, y - bar.height / 2), bar.width, bar.height, zorder=1, **style))


def bead(axes, x: float, y: float, colors: list[str]) -> None:
    """A dot, split evenly between its colors."""
    from matplotlib.patches import Wedge

    for i, color in enumerate(colors):
        start, span = 90 + i * 360 / len(colors), 360 / len(colors)
        style = dict(facecolor=color, edgecolor="white", linewidth=0.8)
        axes.add_patch(Wedge((x, y), 0.105, start, start + span, zorder=4, **style))


def legend(axes, y: float) -> None:
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
    entries = {f"output compared by {PUBLISHERS[name][0]}": (name,) for name in PAIRINGS}
    for words, names in (entries | {"by both": tuple(PAIRINGS)}).items():
        bead(axes, x + 0.1, y, [PUBLISHERS[name][1] for name in names])
        x += 0.2
        say(words)
