"""`config.keep`, a share of the teacher's parameters: the best known student of that size, in place of its name."""

from pathlib import Path

from flaxkd import students
from flaxkd.choosing.choice import choose
from flaxkd.data import sources
from flaxkd.machine import hosts
from flaxkd.pretrained import Folder, count
from flaxkd.students import Student

NEAR = 0.01  # shares that differ by no more are the same size


def settled(config, workdir: Path):
    """The configuration with the student that `config.keep` asks for; the same one without `keep`.

    It is a published row of that size, or the file in `workdir` that `ensure` makes. Raises as `Folder.open` does."""
    if config.keep is None:
        return config
    row = published(Folder.open(config.teacher, config.vae), config.keep)
    config = config.copy_and_resolve_references()
    config.student = row.names[0] if row else str(workdir.absolute() / students.CHOSEN[0])
    return config


def published(folder: Folder, keep: float) -> Student | None:
    """The row of the table whose share of this teacher's parameters is nearest to `keep`; None if none is near."""
    shares = {}
    for student in students.of(folder.family):
        try:
            config = students.config(student, folder.config("unet"))
        except ValueError:  # a row for deeper teachers
            continue
        shares[student] = count("unet", config) / folder.count("unet")
    near = [student for student in shares if abs(shares[student] - keep) <= NEAR]
    return min(near, key=lambda student: abs(shares[student] - keep), default=None)


def ensure(config, folder: Folder, pictures: sources.Source, dtype) -> None:
    """Makes the file of the student that `settled` names, unless it is there. The first process does it.

    All processes must call this. Raises ValueError as `choose` does."""
    if config.keep is None or config.student in students.STUDENTS:
        return
    path = Path(config.student)
    if not path.exists():
        if choice := choose(config, folder, pictures, dtype, config.keep):
            choice.write(path)
            print(f"{choice}\n\nwrote {path}, and beside it {', '.join(students.CHOSEN[1:])}", flush=True)
    hosts.wait("student")
