"""How much the teacher's noise prediction changes without some of it, on inputs as its student will see them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd import pretrained, students
from flaxkd.choosing.units import Unit
from flaxkd.data import encoding
from flaxkd.machine import progress, sharding
from flaxkd.pretrained import Folder
from flaxkd.students import Student
from flaxkd.students.pairs import split
from flaxkd.tasks.losses import predict
from flaxkd.training.task import Task

# What a transformer block adds to its input comes through these. Where they are zero, the block is the identity.
RESIDUAL = ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")


def inputs(config, folder: Folder, task: Task, reader, dtype, mesh, examples: int) -> tuple[dict, list]:
    """(the teacher's parameters on the devices, batches of (noisy latents, timesteps, condition) for its UNet).

    task: of the teacher without a student. reader: of its training data. Every example has one noise and one timestep,
    by `config.seed`. There are at least `examples`, in batches of encoding.BATCH a device."""
    n = encoding.BATCH * mesh.size
    batches = reader.batches(n, config.seed, variants=config.data.variants, flip=config.data.random_flip)
    params = jax.tree.map(lambda x: x.astype(dtype), task.assemble(task.trained, task.frozen))
    params = jax.device_put(params, sharding.replicated(mesh))
    encoders = {part: folder.module(part, dtype) for part in folder.family.encoders}

    @sharding.jit()
    def seen(params, key, batch):
        ready = task.prepare(key, batch)
        return ready.noisy_latents, ready.timesteps, folder.family.condition(encoders, params, ready.conditions)

    keys = jax.random.split(jax.random.key(config.seed), -(-examples // n))
    return params["unet"], [seen(params, key, jax.device_put(next(batches), sharding.batch(mesh))) for key in keys]


@sharding.jit(static_argnames="unet")
def noise_pred(unet, params, noisy_latents, timesteps, condition) -> jax.Array:
    return predict(unet, params, noisy_latents, timesteps, condition).noise_pred.astype(np.float32)


def without(params: dict, unit: Unit) -> dict:
    """The teacher's parameters, with zeros that make a transformer block the identity: the same program runs them."""
    [module], flat = unit.modules, flatten_dict(params)
    zeros = lambda x: jnp.zeros_like(x, device=x.sharding)  # elsewhere it would be another program
    for name in RESIDUAL:
        path = split(f"{module}.{name}")
        flat |= {(*path, leaf): zeros(flat[(*path, leaf)]) for leaf in ("kernel", "bias")}
    return unflatten_dict(flat)


class Trials:
    """The teacher's noise predictions for some inputs, and how far others are from them.

    teacher_config: `unet/config.json`. params: of the teacher, on the devices. seen: batches, as `inputs` makes them.
    bar: counts batches."""

    def __init__(self, teacher_config: dict, params: dict, seen: list, dtype, bar: progress.Bar, attend: Any):
        self.teacher_config, self.params, self.seen, self.bar = teacher_config, params, seen, bar
        self.build: Callable = lambda config: pretrained.build("unet", config, dtype, attend=attend)
        self.compiled: set = set()
        self.expected = self._predictions(teacher_config, params)

    @property
    def scale(self) -> float:
        """The mean square of the teacher's noise predictions."""
        return float(np.mean([np.mean(np.square(x)) for x in self.expected]))

    def of_unit(self, unit: Unit, student: Student) -> float:
        """The error without a unit alone. student: the row that lacks it."""
        if unit.residual:
            return self._error(self.teacher_config, without(self.params, unit))
        return self.of_student(student)

    def of_student(self, student: Student) -> float:
        """The mean square difference between the noise predictions of a student as cut and of its teacher."""
        config = students.config(student, self.teacher_config)
        return self._error(config, students.view(student, self.params, pretrained.shapes("unet", config)))

    def _error(self, config: dict, params: dict) -> float:
        pairs = zip(self._predictions(config, params), self.expected, strict=True)
        return float(np.mean([np.mean(np.square(x - y)) for x, y in pairs]))

    def _predictions(self, config: dict, params: dict) -> list[np.ndarray]:
        unet, found = self.build(config), []
        for batch in self.seen:
            if unet in self.compiled:
                found.append(np.asarray(noise_pred(unet, params, *batch)))
            else:
                with self.bar.during(progress.COMPILING):
                    found.append(np.asarray(noise_pred(unet, params, *batch)))
                self.compiled.add(unet)
            self.bar.update()
        return found
