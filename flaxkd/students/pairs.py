"""Feature pairs: the compared modules of student and teacher. A publisher's choice of pairs is a pairing."""

from flaxkd.students.table import Student, unknown

# The kinds of blocks a publisher compares, wherever teacher and student both have the block.
PAIRINGS = {"segmind": ("down_blocks", "mid_block", "up_blocks"), "bksdm": ("down_blocks", "up_blocks")}


def feature_pairs(student: Student, pairing: str) -> tuple[tuple[str, str], ...]:
    """The (student module, teacher module) pairs with compared outputs, in the order they run.

    pairing: "segmind" (9 terms for sd_small, 6 for sd_tiny) or "bksdm" (8 for bk_base and bk_small, 6 for
    bk_tiny), whatever the student's name: the blocks both sides have, and the table's `inner` pair.
    Raises ValueError for any other pairing.
    """
    if pairing not in PAIRINGS:
        raise ValueError(unknown("feature pairing", pairing, PAIRINGS))

    def shared(kind, kept):
        # The last block of a path does not resample: a block is shared if it is last in both or in neither.
        both = [(i, j) for i, j in enumerate(kept) if (i == len(kept) - 1) == (j == student.family.stages - 1)]
        return [(f"{kind}.{i}", f"{kind}.{j}") for i, j in both if kind in PAIRINGS[pairing]]

    mid = [("mid_block", "mid_block")] if student.mid and "mid_block" in PAIRINGS[pairing] else []
    inner = [p.inner for key, p in student.published.items() if key == pairing and p.inner]
    return (*shared("down_blocks", student.down), *inner, *mid, *shared("up_blocks", student.up))
