"""THE TABLE of tasks, the kinds of training. All commands get the task of a configuration from `make`."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from flaxkd.pretrained import PARTS, Folder
from flaxkd.tasks import adapters, autoencoder, distill, few_step, finetune, phased
from flaxkd.training.task import Task


class Row(NamedTuple):
    make: Callable[..., Task]  # (config, folder, dtype, mesh) -> Task
    trains: frozenset[str]  # the parts that `config.train` may name
    students: tuple[bool, ...] = (True, False)  # whether it is the row for a run with a student, and for one without


UNETS = frozenset({"unet", "text_encoder", "text_encoder_2"})
TASKS = {
    "distill": Row(distill.task, UNETS, (True,)),
    "finetune": Row(finetune.task, UNETS, (False,)),
    "autoencoder": Row(autoencoder.task, frozenset({"vae"})),
    "few_step": Row(few_step.task, frozenset({"unet"})),
    "phased": Row(phased.task, frozenset({"unet"})),
}


def make(config, folder: Folder, dtype, mesh=None) -> Task:
    """The task of a configuration. `config.task` is a row of TASKS, or "module:function" outside this package.

    None is the row that trains the parts of `config.train`, with a student or without. folder: the teacher's. dtype: of
    the compute. mesh: the devices it will run on. With `config.lora`, adapters are trained in place of whole parts.
    Raises ValueError if the task is not found or refuses the configuration."""
    if adapters.wanted(config):
        task = _find(config)(config, adapters.teacher(config, folder), dtype, mesh)
        return adapters.adapted(task, config, folder, dtype)
    return _find(config)(config, folder, dtype, mesh)


def _find(config) -> Callable[..., Task]:
    """The maker of the task. Raises ValueError."""
    parts = frozenset(config.train)
    fits = lambda row: parts and parts <= row.trains and bool(config.student) in row.students
    name = config.task or next((name for name, row in TASKS.items() if fits(row)), None)
    if name in TASKS:
        return TASKS[name].make
    if name is None:
        known = "; ".join(f"{', '.join(x for x in PARTS if x in row.trains)} ({n})" for n, row in TASKS.items())
        raise ValueError(f"train = {tuple(config.train)}: parts that are trained together are {known}")
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"task = {name!r} is not in the table ({', '.join(TASKS)}), and cannot be imported ({error}): give "
            "module:function, with a module that Python can import from here"
        ) from error
