"""Feature pairs: the compared modules of student and teacher. A publisher's choice of pairs is a pairing."""

import re
from collections.abc import Iterator

from flaxkd.models.unet import Stage, UNetConfig
from flaxkd.pretrained.families import ARCHITECTURES
from flaxkd.students.cutting import config, teacher_path
from flaxkd.students.row import Student
from flaxkd.students.table import unknown

# The modules that a publisher compares, as a pattern of their names, wherever the student has them.
PAIRINGS = {
    "segmind": r"(down|up)_blocks\.\d|mid_block",
    "bksdm": r"(down|up)_blocks\.\d",
    # distill_sdxl.py at sub_block (segmind/SSD-1B@3bf633b)
    "segmind_sdxl": r"(down|up)_blocks\.\d\.(resnets|attentions)\.\d|mid_block",
    # "self-attention-based": what attn1 makes, before the residual. Lee et al. 2023 (KOALA, arXiv:2312.04005)
    "koala": r".*\.transformer_blocks\.\d+\.attn1",
}


def feature_pairs(student: Student, pairing: str, teacher_config: dict | None = None) -> tuple[tuple[str, str], ...]:
    """The (student module, teacher module) pairs with compared outputs, in the order they run.

    pairing: "segmind" (9 terms for sd_small, 6 for sd_tiny), "bksdm" (8 for bk_base and bk_small, 6 for bk_tiny),
    "segmind_sdxl" (26 for ssd_1b and vega) or "koala" (30 for koala_1b, 21 for koala_700m), whatever the student's
    name. Each module is paired with the one it was copied from, blocks as long as both sides have them; and the table
    has an `inner` pair. teacher_config: `unet/config.json`, for its numbers of transformer blocks; None: as published.
    Raises ValueError for any other pairing, and as `config` does.
    """
    if pairing not in PAIRINGS:
        raise ValueError(unknown("feature pairing", pairing, PAIRINGS))
    teacher_config = teacher_config or ARCHITECTURES[student.family.shown].unet
    whole, cut = (UNetConfig.from_dict(each) for each in (teacher_config, config(student, teacher_config)))
    here, there = stages(cut), stages(whole)
    published = student.published.get(pairing)
    inner = dict([published.inner] if published and published.inner else [])

    def compared(module: str, source: str) -> bool:
        # The last block of a path does not resample: a block is shared if it is last in both or in neither.
        shared = module not in here or here[module].resample == there[source].resample
        return shared and bool(re.fullmatch(PAIRINGS[pairing], module))

    pairs = ((module, origin(student, module)) for module in modules(cut))
    return tuple((module, inner.get(module, source)) for module, source in pairs
                 if module in inner or compared(module, source))  # fmt: skip


def origin(student: Student, module: str) -> str:
    """The teacher's module that the student's was copied from."""
    return ".".join(teacher_path(student, split(module)))


def split(module: str) -> tuple[str, ...]:
    """A number belongs to the word before it: "up_blocks.3.attentions.2" -> ("up_blocks.3", "attentions.2")."""
    return tuple(re.findall(r"[^.]+(?:\.\d+)*", module))


def stages(unet: UNetConfig) -> dict[str, Stage]:
    """{module name: block} in the order they run."""
    blocks = {f"down_blocks.{i}": stage for i, stage in enumerate(unet.down)}
    blocks |= {"mid_block": unet.mid} if unet.mid else {}
    return blocks | {f"up_blocks.{i}": stage for i, stage in enumerate(unet.up)}


def modules(unet: UNetConfig) -> Iterator[str]:
    """The names of blocks, resnets, attentions and what is inside of these, in the order their outputs are made."""
    for block, stage in stages(unet).items():
        mid = block == "mid_block"  # it starts with a resnet; attention precedes each of the others
        yield from [f"{block}.resnets.0"] if mid else ()
        for i, depth in enumerate(stage.depths):
            resnet, attention = f"{block}.resnets.{i + mid}", f"{block}.attentions.{i}"
            inside = [] if depth is None else [*_inside(attention, depth), attention]
            yield from [*inside, resnet] if mid else [resnet, *inside]
        if stage.resample:
            yield f"{block}.{'down' if block.startswith('down') else 'up'}samplers.0"
        yield block


def _inside(attention: str, depth: int) -> Iterator[str]:
    yield f"{attention}.proj_in"
    for i in range(depth):
        block = f"{attention}.transformer_blocks.{i}"
        yield from (f"{block}.attn1", f"{block}.attn2", f"{block}.ff", block)
    yield f"{attention}.proj_out"
