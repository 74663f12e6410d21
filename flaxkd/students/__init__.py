"""Students: THE TABLE (table), cutting one from its teacher (cutting), feature pairs (pairs), a picture (picture)."""

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
