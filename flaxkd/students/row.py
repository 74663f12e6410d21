"""A row of the table of students: what a student keeps of its teacher, in Python and as a file.

Which rows there are, is said in table.py. What follows from a row: cutting.py and pairs.py.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flaxkd.machine import files
from flaxkd.pretrained.families import FAMILIES, Family


class Published(NamedTuple):
    """A student as its publisher released it."""

    name: str  # in flaxkd
    title: str  # the publisher's
    source: str | None = None  # hub id of the weights
    inner: tuple[str, str] | None = None  # (student, teacher) modules compared besides the shared blocks


Layers = tuple[int, ...] | dict[int, tuple[int, ...] | None]
ALL = None  # transformer blocks of an attention
CHOSEN = ("student.json", "student.png", "student.txt")  # of a student that a run chose, in its workdir
RESNET = "resnet"  # all that is left of a mid block: mid_block.resnets.0
MIDS = {True: {0: ALL, 1: ALL}, False: {}, RESNET: {0: ()}}


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A row of the table. Layer i of a block is its resnet i, with its attention i if there is one.

    The layers of a block are a tuple if they are kept whole; else a dict, {layer: the kept transformer blocks of its
    attention, or ALL}. Raises ValueError for a row that no configuration of diffusers can express.
    """

    down: dict[int, Layers]  # teacher's down block: its kept layers, in order
    mid: bool | str | tuple[int, ...]  # True: whole; False: removed; RESNET; or the kept transformer blocks
    up: dict[int, Layers]
    published: dict[str, Published]  # by pairing
    families: tuple[str, ...] = ("sd1", "sd2")  # whose UNets it can be cut from; their numbers of layers agree
    basis: str = "published"  # what of the row is published, estimated or chosen here

    def __post_init__(self):
        if wrong := list(_faults(self)):
            raise ValueError(f"{self.names[0]} can be cut from no UNet:\n  " + "\n  ".join(wrong))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(published.name for published in self.published.values())

    @property
    def family(self) -> Family:
        """The first of its families, for what they all share."""
        return FAMILIES[self.families[0]]

    @functools.cached_property
    def blocks(self) -> dict[str, tuple[str, dict[int, tuple[int, ...] | None]]]:
        """{the student's block: (the teacher's block, {its kept layer: kept transformer blocks, or ALL})}.

        Layer 0 of the mid block is resnet 0 with attention 0, and layer 1 is resnet 1."""
        whole = lambda kept: kept if isinstance(kept, dict) else dict.fromkeys(kept, ALL)
        path = lambda name, blocks: {
            f"{name}.{i}": (f"{name}.{block}", whole(kept)) for i, (block, kept) in enumerate(blocks.items())
        }
        mid = {0: self.mid, 1: ALL} if isinstance(self.mid, tuple) else MIDS[self.mid]
        mid = {"mid_block": ("mid_block", mid)} if mid else {}
        return path("down_blocks", self.down) | mid | path("up_blocks", self.up)


def _faults(student: Student) -> Iterator[str]:
    down, up, family = student.down, student.up, student.family
    outer, stages = list(range(len(down))), list(range(family.stages))
    if not isinstance(student.mid, tuple) and student.mid not in MIDS:
        yield f"mid = {student.mid!r} is none of True, False, {RESNET!r} and transformer blocks"
        return
    if not outer or list(down) != outer or list(up) != stages[-len(outer) :]:
        yield f"down blocks {list(down)} and up blocks {list(up)} are not the outer ones of {len(stages)}"
        return
    for side, blocks, most in (("down", down, family.layers), ("up", up, family.layers + 1)):
        for block, kept in blocks.items():
            if not kept or not _ascend(kept, most):
                yield f"{side} block {block} keeps the layers {list(kept)}, not some of 0 to {most - 1} in order"
    for block, kept in down.items():
        twin = stages[-1] - block
        if len(up[twin]) != len(kept) + 1:
            few = f"down block {block} keeps {len(kept)} layers and up block {twin} keeps {len(up[twin])}"
            yield f"{few}: diffusers has exactly one more in the up block"
    for block, layers in student.blocks.values():
        for layer, kept in layers.items():
            if kept is not ALL and not _ascend(kept):
                yield f"{block}.attentions.{layer} keeps the transformer blocks {list(kept)}, which are not in order"


def _ascend(numbers: Iterable, below: float = math.inf) -> bool:
    """Whether these are whole numbers from 0, each larger than the one before."""
    found = list(numbers)
    return all(type(i) is int and 0 <= i < below for i in found) and found == sorted(set(found))


def first(k: int) -> tuple[int, ...]:
    """The first k transformer blocks of an attention."""
    return tuple(range(k))


# The fields of a student's file: of a row, and of the one name that it has.
FIELDS = {"name": str, "title": str, "pairing": str, "families": list, "down": dict, "mid": (bool, str, list),
          "up": dict, "basis": str}  # fmt: skip


def write(student: Student, path: os.PathLike) -> None:
    """Writes a row as a file for `get`. Raises ValueError for one with several names, or an inner feature pair."""
    (pairing, published), *more = student.published.items()
    if more or published.inner:
        raise ValueError(f"{' = '.join(student.names)} is in the table, and its pairings do not fit in a file")
    row = {"name": published.name, "title": published.title, "pairing": pairing}
    row |= {field: getattr(student, field) for field in FIELDS if field not in row}
    files.write_json(path, row)


def read(path: os.PathLike) -> Student:
    """The student in a JSON file, as `write` writes it. Raises FileNotFoundError or ValueError with the file's name."""
    row = files.read_json(path)
    try:
        if not isinstance(row, dict) or row.keys() != FIELDS.keys():
            raise ValueError(f"it needs the keys {', '.join(FIELDS)}, and has {', '.join(map(str, row))}")
        for field, kind in FIELDS.items():
            if not isinstance(row[field], kind):
                raise ValueError(f"{field} = {row[field]!r} is of another type than in the files that flaxkd writes")
        if not row["families"] or not FAMILIES.keys() >= {*row["families"]}:
            raise ValueError(f"families = {row['families']} (known: {', '.join(FAMILIES)})")
        return Student(
            down=_blocks(row["down"]),
            mid=tuple(row["mid"]) if isinstance(row["mid"], list) else row["mid"],
            up=_blocks(row["up"]),
            published={row["pairing"]: Published(row["name"], row["title"])},
            families=tuple(row["families"]),
            basis=row["basis"],
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no file of a student: {error}") from error


def _blocks(path: dict) -> dict[int, Layers]:
    """The blocks of a path as JSON has them: keys are texts there, and tuples lists."""
    layers = lambda kept: {int(i): kept[i] if kept[i] is ALL else tuple(kept[i]) for i in kept}
    return {int(i): layers(kept) if isinstance(kept, dict) else tuple(kept) for i, kept in path.items()}
