"""THE TABLE of students: which of its teacher's layers each one keeps, and how it was published.

Only `TABLE` is written by hand. The rest follows from it: a student's `config.json` and weights (cutting.py), its
feature pairs (pairs.py), its size and cost. `python -m flaxkd.students` prints it for every family.
"""

import dataclasses
import difflib
from typing import NamedTuple

from flaxkd.pretrained.families import FAMILIES, Family


class Published(NamedTuple):
    """A student as its publisher released it."""

    name: str  # in flaxkd
    title: str  # the publisher's
    source: str  # hub id of the weights
    inner: tuple[str, str] | None = None  # (student, teacher) modules compared besides the shared blocks


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A row of the table. Layer i of a block is its resnet i, with its attention i if there is one."""

    down: dict[int, tuple[int, ...]]  # teacher's down block: its kept layers, in order
    mid: bool  # whether the mid block is kept, always whole
    up: dict[int, tuple[int, ...]]
    published: dict[str, Published]  # by pairing
    families: tuple[str, ...] = ("sd1", "sd2")  # whose UNets it can be cut from; their numbers of layers agree

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(published.name for published in self.published.values())

    @property
    def family(self) -> Family:
        """The first of its families, for what they all share."""
        return FAMILIES[self.families[0]]


# Kim et al. 2023 (BK-SDM, arXiv:2305.15798) cut Stable Diffusion this way, and so does Segmind's distill-sd.
# An up block keeps its layers 0 and 2. The last layer takes the skip from the outer stage. In blocks 1 and 2
# that skip has another width, and only this layer fits. Layer 1 is the redundant one.
TABLE = (
    #       down block: layers kept                mid    up block: layers kept
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  True,  {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "segmind": Published("sd_small", "Segmind SD-Small", "segmind/small-sd"),
        "bksdm":   Published("bk_base",  "BK-SDM-Base",      "nota-ai/bk-sdm-base")}),
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  False, {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "bksdm":   Published("bk_small", "BK-SDM-Small",     "nota-ai/bk-sdm-small")}),
    Student({0: (0,), 1: (0,), 2: (0,)          }, False, {           1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        # distill_training.py: the student's innermost block learns all the teacher's inner stage does.
        "segmind": Published("sd_tiny",  "Segmind SD-Tiny",  "segmind/tiny-sd",
                             ("down_blocks.2", "up_blocks.0")),
        # kd_train_text_to_image.py: before the last residual and before the downsampler, absent in the student.
        "bksdm":   Published("bk_tiny",  "BK-SDM-Tiny",      "nota-ai/bk-sdm-tiny",
                             ("down_blocks.2.attentions.0.proj_out",
                              "down_blocks.2.attentions.1.proj_out"))}),
)  # fmt: skip

STUDENTS = {name: student for student in TABLE for name in student.names}

CLASH = "mind that Segmind's SD-Small is sd_small = bk_base (with a mid block), and BK-SDM-Small is bk_small"


def get(name: str) -> Student:
    """The student of that name, Segmind's or BK-SDM's. Raises ValueError with close matches."""
    if name not in STUDENTS:
        raise ValueError(unknown("student", name, STUDENTS) + f"; {CLASH}")
    return STUDENTS[name]


def unknown(what: str, name: str, known) -> str:
    """The error message for an unknown name, with close matches among the known ones."""
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


def diagram(student: Student | None) -> str:
    """The teacher's blocks in a line: a digit for a kept layer, a dot for a removed one (None: all kept)."""
    family = (student or TABLE[0]).family

    def path(kept, layers):
        keeps = lambda block, i: kept is None or i in kept.get(block, ())
        blocks = range(family.stages)
        return " ".join("".join(str(i) if keeps(b, i) else "." for i in range(layers)) for b in blocks)

    down, mid, up = (student.down, student.mid, student.up) if student else (None, True, None)
    return f"{path(down, family.layers)} | {'mid' if mid else '...'} | {path(up, family.layers + 1)}"
