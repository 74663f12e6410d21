"""THE TABLE of students: the layers of its teacher that each one keeps, and how it was published.

`TABLE` is all that is written down. The rest follows from it: a student's `config.json` and weights (cutting.py), its
feature pairs (pairs.py), its size and cost. `python -m flaxkd.students` prints it for every family.
"""

import dataclasses
import difflib
from typing import NamedTuple

from flaxkd.pretrained.families import FAMILIES, Family


class Published(NamedTuple):
    """A student as somebody published it."""

    name: str  # here
    title: str  # there
    source: str  # the weights on the hub
    inner: tuple[str, str] | None = None  # (student, teacher) modules compared beside the blocks shared


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A row of the table. Layer i of a block is its resnet i, with the attention i if there is one."""

    down: dict[int, tuple[int, ...]]  # down block of the teacher: the layers kept of it, in order
    mid: bool  # whether the mid block is kept; if so, whole
    up: dict[int, tuple[int, ...]]
    published: dict[str, Published]  # by pairing
    families: tuple[str, ...] = ("sd1", "sd2")  # whose UNets it can be cut from; they have equally many layers

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(published.name for published in self.published.values())

    @property
    def family(self) -> Family:
        """The first of its families, for what they have in common."""
        return FAMILIES[self.families[0]]


# Kim et al. 2023 (BK-SDM, arXiv:2305.15798) cut Stable Diffusion thus; Segmind's distill-sd does too.
# An up block keeps its layers 0 and 2: its last takes the skip from the stage outside, which has another
# width in blocks 1 and 2, so that no other layer fits there; layer 1 is the redundant one.
TABLE = (
    #       down block: layers kept                mid    up block: layers kept
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  True,  {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "segmind": Published("sd_small", "Segmind SD-Small", "segmind/small-sd"),
        "bksdm":   Published("bk_base",  "BK-SDM-Base",      "nota-ai/bk-sdm-base")}),
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  False, {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "bksdm":   Published("bk_small", "BK-SDM-Small",     "nota-ai/bk-sdm-small")}),
    Student({0: (0,), 1: (0,), 2: (0,)          }, False, {           1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        # distill_training.py: the student's innermost block learns all that the teacher's inner stage does.
        "segmind": Published("sd_tiny",  "Segmind SD-Tiny",  "segmind/tiny-sd",
                             ("down_blocks.2", "up_blocks.0")),
        # kd_train_text_to_image.py: before the downsampler, which the student lacks, and the last residual.
        "bksdm":   Published("bk_tiny",  "BK-SDM-Tiny",      "nota-ai/bk-sdm-tiny",
                             ("down_blocks.2.attentions.0.proj_out",
                              "down_blocks.2.attentions.1.proj_out"))}),
)  # fmt: skip

STUDENTS = {name: student for student in TABLE for name in student.names}

CLASH = "mind that Segmind's SD-Small is sd_small = bk_base (with a mid block), and BK-SDM-Small is bk_small"


def get(name: str) -> Student:
    """The student of that name, Segmind's or BK-SDM's. Raises ValueError with the names that come close."""
    if name not in STUDENTS:
        raise ValueError(unknown("student", name, STUDENTS) + f"; {CLASH}")
    return STUDENTS[name]


def unknown(what: str, name: str, known) -> str:
    """The message for a name that is not among those known, with the ones that come close."""
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


def diagram(student: Student | None) -> str:
    """The teacher's blocks in a line, a digit for a layer kept, a dot for one removed (None: all kept)."""
    family = (student or TABLE[0]).family

    def path(kept, layers):
        keeps = lambda block, i: kept is None or i in kept.get(block, ())
        blocks = range(family.stages)
        return " ".join("".join(str(i) if keeps(b, i) else "." for i in range(layers)) for b in blocks)

    down, mid, up = (student.down, student.mid, student.up) if student else (None, True, None)
    return f"{path(down, family.layers)} | {'mid' if mid else '...'} | {path(up, family.layers + 1)}"
