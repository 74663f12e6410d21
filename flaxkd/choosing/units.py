"""Units: what can be taken from a teacher on its own, at what price, and the student that lacks some of them.

A unit is a set of the teacher's modules that go together, since diffusers can express no network without one of them
alone: a transformer block; a layer of a down block with one of its twin up block; the mid block, or all of it but its
first resnet; the inner stage, as sd_tiny lacks it. Everything else here follows from the names of modules.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from flaxkd import students
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import FAMILIES, shapes
from flaxkd.pretrained.families import Family
from flaxkd.students import Published, Student
from flaxkd.students.pairs import stages
from flaxkd.students.row import ALL, RESNET

MID, ATTENTION = "mid_block", "mid_block.attentions.0"


class Unit(NamedTuple):
    """Modules of the teacher that are removed together. place and label: its row and its mark in a picture."""

    place: str
    label: str
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.place}: {self.label}"

    @property
    def residual(self) -> bool:
        """Whether it is a transformer block: without what it adds, it is the identity."""
        return "transformer_blocks" in self.modules[0]

    def removes(self, module: str) -> bool:
        """Whether a module of the teacher, or a parameter, goes with this unit."""
        return any(f"{module}.".startswith(f"{gone}.") for gone in self.modules)

    def inside(self, module: str) -> bool:
        """Whether all of this unit is a part of a module of the teacher."""
        return all(gone.startswith(f"{module}.") for gone in self.modules)


def of(family: Family, teacher_config: dict) -> list[Unit]:
    """The units of a teacher, in the order they run. teacher_config: `unet/config.json`.

    Raises ValueError if no student can be cut from the teacher, as `students.config` does."""
    unet = UNetConfig.from_dict(teacher_config)
    students.config(row((), family, teacher_config), teacher_config)
    found = [*_layers(unet, _tensors(teacher_config)), *_around_mid(unet), *_transformer_blocks(unet)]
    return [unit for unit in found if unit.residual or _fits(unit, family, teacher_config)]


def _fits(unit: Unit, family: Family, teacher_config: dict) -> bool:
    try:
        students.config(row((unit,), family, teacher_config), teacher_config)
    except ValueError:
        return False
    return True


def _tensors(teacher_config: dict) -> dict[str, tuple[int, ...]]:
    """{parameter: its shape}."""
    flat = flatten_dict(shapes("unet", teacher_config))
    return {".".join(path): x.shape for path, x in flat.items()}


def _layers(unet: UNetConfig, tensors: dict[str, tuple[int, ...]]) -> Iterator[Unit]:
    """A layer of each down block with one of its twin, whose neighbours then fit each other.

    The last layer of a down block and layer 1 of an up block can always go, as from BK-SDM. Others can, where what
    stays has the same shapes."""
    both = lambda block, i: (f"{block}.resnets.{i}", f"{block}.attentions.{i}")

    def can_go(block: str, n: int, always: int) -> list[int]:
        inside = lambda module: {name.removeprefix(module): x for name, x in tensors.items() if name.startswith(module)}
        layers = [[inside(f"{module}.") for module in both(block, i)] for i in range(n)]
        without = lambda i: layers[:i] + layers[i + 1 :]
        return [i for i in range(n) if without(i) == without(always)]

    for block, stage in enumerate(unet.down):
        twin, n = len(unet.down) - 1 - block, len(stage.depths)
        for i in can_go(f"down_blocks.{block}", n, n - 1):
            for j in can_go(f"up_blocks.{twin}", n + 1, 1):
                modules = *both(f"down_blocks.{block}", i), *both(f"up_blocks.{twin}", j)
                yield Unit(f"down {block} and up {twin}, layers", f"{i}+{j}", modules)


def _around_mid(unet: UNetConfig) -> Iterator[Unit]:
    """The mid block, also without its first resnet or with the inner stage, whether they can go or not."""
    last = len(unet.down) - 1
    if unet.mid.depths:
        yield Unit("mid block", "all but resnet 0", (ATTENTION, f"{MID}.resnets.1"))
    yield Unit("mid block", "all", (MID,))
    inner = f"down_blocks.{last}", MID, "up_blocks.0", f"down_blocks.{last - 1}.downsamplers.0"
    yield Unit(f"down {last}, mid block and up 0", "all", inner)


def _transformer_blocks(unet: UNetConfig) -> Iterator[Unit]:
    """Those of every attention that has several: one must stay."""
    for block, stage in stages(unet).items():
        if block == MID and unet.down[-1].depths[0] is None:
            continue  # its depth is that of the last down block in diffusers' configuration, which has none
        place = block.replace("_blocks.", " ").replace("_block", " block")
        for i, depth in enumerate(stage.depths):
            for k in range(depth or 0) if depth != 1 else ():
                name = f"{block}.attentions.{i}.transformer_blocks.{k}"
                yield Unit(f"{place}, attention {i}, transformer blocks", str(k), (name,))


def row(removed: Iterable[Unit], family: Family, teacher_config: dict, name: str = "chosen", title: str = "Chosen",
        basis: str = "chosen here") -> Student:  # fmt: skip
    """The row of the student that lacks these units. It is compared as the first of its family's rows is.

    Raises ValueError if no configuration of diffusers can express it."""
    unet, removed = UNetConfig.from_dict(teacher_config), tuple(removed)
    gone = lambda module: any(unit.removes(module) for unit in removed)

    def inside(attention: str, depth: int | None) -> tuple[int, ...] | None:
        kept = tuple(k for k in range(depth or 0) if not gone(f"{attention}.transformer_blocks.{k}"))
        return ALL if len(kept) == (depth or 0) else kept

    def path(name: str, blocks: list) -> dict:
        found = {}
        for i, stage in enumerate(blocks):
            block, depths = f"{name}.{i}", dict(enumerate(stage.depths))
            layers = {j: inside(f"{block}.attentions.{j}", depth) for j, depth in depths.items()
                      if not gone(f"{block}.resnets.{j}")}  # fmt: skip
            if not gone(block):
                found[i] = tuple(layers) if set(layers.values()) <= {ALL} else layers
        return found

    mid = inside(ATTENTION, unet.mid.depths[0]) if unet.mid and unet.mid.depths else ALL
    mid = False if gone(MID) else RESNET if gone(f"{MID}.resnets.1") else True if mid is ALL else mid
    pairing = next(iter(students.of(family)[0].published))
    families = tuple(name for name, each in FAMILIES.items() if each is family)
    return Student(path("down_blocks", unet.down), mid, path("up_blocks", unet.up),
                   {pairing: Published(name, title)}, families, basis)  # fmt: skip


def parameters(units: Iterable[Unit], teacher_config: dict) -> np.ndarray:
    """The parameters that go with each unit: int64[units]. Those of units that fit together add up."""
    sizes = {name: math.prod(shape) for name, shape in _tensors(teacher_config).items()}
    return np.array([sum(n for name, n in sizes.items() if unit.removes(name)) for unit in units], np.int64)


def flops(units: list[Unit], family: Family, teacher_config: dict) -> np.ndarray:
    """The FLOPs of a forward pass that go with each unit, as `students.cost` counts them: float64[units].

    A network is lowered for each kind of unit, which takes seconds. The transformer blocks of a block are alike, and
    those of the mid block like those of the last down block. They are counted without the mid block: diffusers'
    configuration cannot express all of them with it."""
    mid = Unit("mid block", "all", (MID,))
    last = f"down_blocks.{len(teacher_config['down_block_types']) - 1}"
    known: dict[str, float] = {}

    def cost(*removed: Unit) -> float:
        cut = students.config(row(removed, family, teacher_config), teacher_config)
        spelt = str(cut)  # the layers of a block cost the same, whichever of them go
        if spelt not in known:
            known[spelt] = students.cost(cut)[1]
        return known[spelt]

    def alike(unit: Unit) -> Unit:
        block = unit.modules[0].partition(".attentions")[0].replace(MID, last)
        return next(other for other in units if other.residual and other.inside(block))

    return np.array([cost(mid) - cost(mid, alike(unit)) if unit.residual else cost() - cost(unit) for unit in units])
