"""Students: THE TABLE (table) and what a row says (row), cutting one from its teacher, feature pairs, a picture."""

from flaxkd.students.cutting import (
    config,
    cost,
    give_adapter,
    image_flops,
    shapes,
    take,
    take_adapter,
    teacher_path,
    view,
)
from flaxkd.students.pairs import PAIRINGS, feature_pairs
from flaxkd.students.row import CHOSEN, Published, Student, read, write
from flaxkd.students.table import CLASH, STUDENTS, TABLE, diagram, get, of

__all__ = [
    "CHOSEN",
    "CLASH",
    "PAIRINGS",
    "STUDENTS",
    "TABLE",
    "Published",
    "Student",
    "config",
    "cost",
    "diagram",
    "feature_pairs",
    "get",
    "give_adapter",
    "image_flops",
    "of",
    "read",
    "shapes",
    "take",
    "take_adapter",
    "teacher_path",
    "view",
    "write",
]
