"""A student whose layers its teacher chose: LAPTOP-Diff (Zhang et al. 2024, arXiv:2404.11098).

Each unit is scored by the mean square change of the teacher's noise prediction when it alone is removed. Their sum
stands for the change when several are removed, so the best student of a size is the answer to a knapsack problem. How
far the sum is from the truth is measured on the student that was chosen.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flaxkd import students
from flaxkd.choosing import chart, scoring, solving, units
from flaxkd.choosing.units import Unit
from flaxkd.data import encoding, sources
from flaxkd.machine import files, hosts, progress, sharding
from flaxkd.models.attention import DotProductAttention
from flaxkd.pretrained import Folder
from flaxkd.students import Student
from flaxkd.tasks import finetune

GRAINS = 10**7  # of the teacher's FLOPs, to which a budget of FLOPs is exact


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A chosen student, and what led to it. Arrays have one number for each unit."""

    student: Student
    units: list[Unit]
    parameters: np.ndarray  # int64
    flops: np.ndarray  # float64, of a forward pass
    errors: np.ndarray  # float64, when the unit alone is removed
    removed: np.ndarray  # bool
    teacher: tuple[int, float]  # its parameters and FLOPs
    scale: float  # mean square of its noise predictions
    measured: float  # error of the student as cut
    beside: dict[str, tuple[float, float]]  # {another student: (its share of the parameters, its error as cut)}
    examples: int

    @property
    def expected(self) -> float:
        """The error of the student as cut, if the errors of units added up."""
        return float(self.errors @ self.removed)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the teacher's parameters and FLOPs, those that the student keeps."""
        gone = self.parameters @ self.removed, self.flops @ self.removed
        return tuple(1 - less / whole for less, whole in zip(gone, self.teacher, strict=True))

    @property
    def fates(self) -> list[str]:
        """What became of each unit: a row of chart.FATES. It may be gone as a part of a removed one."""
        gone = [unit for unit, removed in zip(self.units, self.removed, strict=True) if removed]
        inside = lambda unit: all(any(other.removes(module) for other in gone) for module in unit.modules)
        return ["removed" if unit in gone else "gone" if inside(unit) else "kept" for unit in self.units]

    def write(self, path: os.PathLike) -> None:
        """Writes the row, which `students.get` reads; and beside it the picture and the table, as .png and .txt."""
        path = Path(path)
        chart.draw(self, path.with_suffix(".png"))
        files.write_text(path.with_suffix(".txt"), str(self) + "\n")
        students.write(self.student, path)

    def __str__(self) -> str:
        wide = max((len(unit.name) for unit in self.units), default=0)
        lines = [f"{'unit':{wide}}{'parameters':>14}{'GFLOPs':>10}{'error':>12}"]
        columns = self.units, self.parameters, self.flops, self.errors, self.fates
        for unit, n, flops, error, fate in zip(*columns, strict=True):
            lines.append(f"{unit.name:{wide}}{n:14,}{flops / 1e9:10,.2f}{error:12.3e}  {fate}")
        parameters, flops = self.shares
        lines += [
            "",
            f"{self.student.names[0]} keeps {self.teacher[0] - self.parameters @ self.removed:,} parameters, "
            f"{parameters:.1%}, and {flops:.1%} of the FLOPs: {students.diagram(self.student)}",
            f"error as cut {self.measured:.4e}, the sum over its {self.removed.sum()} units {self.expected:.4e}: "
            f"{self.measured / self.expected if self.expected else 1:.2f} times as much",
            *(f"  beside it, {name} ({share:.1%}): {error:.4e}" for name, (share, error) in self.beside.items()),
            f"An error is the mean square change of the noise prediction over {self.examples:,} examples. The mean "
            f"square of the prediction itself is {self.scale:.3f}.",
        ]
        return "\n".join(lines)


def choose(config, folder: Folder, pictures: sources.Source, dtype, keep: float, *, of_flops: bool = False,
           examples: int = 256, beside: Sequence[str] = ()) -> Choice | None:  # fmt: skip
    """The student with the least error that keeps at most this share of its teacher's parameters, or FLOPs.

    config: for data, seed and attention, whatever it trains. folder: the teacher's. beside: names of other students
    to measure. All processes must call this; the first one computes, and the others get None.
    Raises ValueError if no student is that small, or none can be cut from the teacher."""
    family, teacher_config = folder.family, folder.config("unet")
    others = {name: students.get(name) for name in beside}
    shares = {name: students.config(student, teacher_config) for name, student in others.items()}
    found = units.of(family, teacher_config)
    obeyed = list(solving.rules(found, teacher_config))
    parameters, flops = units.parameters(found, teacher_config), units.flops(found, family, teacher_config)
    teacher = students.cost(teacher_config)
    prices, whole = (flops // (teacher[1] / GRAINS), GRAINS) if of_flops else (parameters, teacher[0])
    least = np.ceil(whole * (1 - keep) - 1e-6)
    try:
        solving.solve(np.zeros(len(found)), prices, least, obeyed)
    except ValueError as error:
        what = "FLOPs" if of_flops else "parameters"
        raise ValueError(f"no student of {folder.path} keeps as few as {keep:.1%} of its {what}: {error}") from error

    config = config.copy_and_resolve_references()
    config.student, config.keep, config.init = None, None, "teacher"
    mesh = sharding.local_mesh()
    task = finetune.task(config, folder, dtype, mesh)
    reader = encoding.open_data(task.batch, config, pictures, "train", folder, dtype)
    if not hosts.is_first():
        return None
    params, seen = scoring.inputs(config, folder, task, reader, dtype, mesh, examples)
    examples = sum(len(timesteps) for _, timesteps, _ in seen)
    row = lambda removed, **words: units.row(removed, family, teacher_config, **words)
    total = (2 + len(found) + len(others)) * len(seen)
    with progress.Bar(total, "units", unit=" batches", first=progress.COMPILING) as bar:
        attend = DotProductAttention(mesh, config.attention)
        trials = scoring.Trials(teacher_config, params, seen, dtype, bar, attend)
        errors = np.array([trials.of_unit(unit, row((unit,))) for unit in found])
        removed = solving.solve(errors, prices, least, obeyed)
        gone = [unit for unit, is_gone in zip(found, removed, strict=True) if is_gone]
        share = 1 - parameters @ removed / teacher[0]
        student = row(
            gone,
            name=f"chosen_{round(100 * share)}",
            title=f"Chosen, {share:.1%}",
            basis=f"chosen by its teacher on {examples} examples, seed {config.seed}",
        )
        measured = trials.of_student(student)
        compared = {name: (students.cost(shares[name])[0] / teacher[0], trials.of_student(other))
                    for name, other in others.items()}  # fmt: skip
    return Choice(student, found, parameters, flops, errors, removed, teacher, trials.scale, measured, compared,
                  examples)  # fmt: skip
