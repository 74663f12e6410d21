"""Students: THE TABLE (table), how one is cut from its teacher (cutting), what is compared (pairs), a picture of it."""

from flaxkd.students.cutting import config, cost, shapes, take, teacher_path
from flaxkd.students.pairs import PAIRINGS, feature_pairs
from flaxkd.students.table import CLASH, STUDENTS, TABLE, Student, diagram, get

__all__ = [
    "CLASH",
    "PAIRINGS",
    "STUDENTS",
    "TABLE",
    "Student",
    "config",
    "cost",
    "diagram",
    "feature_pairs",
    "get",
    "shapes",
    "take",
    "teacher_path",
]
