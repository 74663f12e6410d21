"""The way from noise to data cut into phases: samplers whose steps end at the same timesteps. tasks/phased.py trains a
UNet to take a phase in one step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flaxkd.diffusion import samplers, sampling
from flaxkd.diffusion.schedule import BETAS
from flaxkd.diffusion.weights import Schedule

SOLVER = "dpmsolver++"  # of the teacher's ODE


def scheduler_config(teacher: dict, prediction_type: str, phases: int) -> dict:
    """The scheduler_config.json of a model of this many phases, of diffusers' DDIMScheduler. teacher: its teacher's.

    Its spacing is "trailing": the first step begins at the last timestep of training, which is closest to noise."""
    return {
        "_class_name": "DDIMScheduler",
        **{name: teacher.get(name, default) for name, default in BETAS.items()},
        "rescale_betas_zero_snr": teacher.get("rescale_betas_zero_snr", False),
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # unused, but diffusers' pipelines warn of another
        "set_alpha_to_one": True,
        "clip_sample": False,
        samplers.OWN_STEPS: phases,
    }


def learner(config: dict) -> Schedule:
    """The steps that the UNet learns, one a phase: those of `scheduler_config`, with axes [phases, 1]."""
    return _cut(samplers.schedule("ddim", config, config[samplers.OWN_STEPS]), config[samplers.OWN_STEPS])


def teacher(config: dict, steps: int) -> Schedule:
    """The teacher's steps between the same timesteps, [phases, steps / phases]. config: `scheduler_config`.

    Raises ValueError for a number with which no step ends where a phase does."""
    phases = config[samplers.OWN_STEPS]
    if steps % phases:
        more = -(-steps // phases) * phases
        raise ValueError(f"few_step.ode_steps = {steps} is no multiple of few_step.phases = {phases}: take {more}")
    made, ends = _cut(samplers.schedule(SOLVER, config, steps), phases), learner(config).timesteps[:, 0]
    if not np.array_equal(made.timesteps[:, 0], ends):
        raise ValueError(
            f"few_step.ode_steps = {steps}: phases begin at the timesteps {ends.tolist()}, and these steps do not meet "
            f"them: take another multiple of few_step.phases = {phases}"
        )
    return made


def _cut(schedule: Schedule, phases: int) -> Schedule:
    split = lambda x: x.reshape(phases, -1, *x.shape[1:])
    return jax.tree.map(split, schedule._replace(start=None))


def follow(noise_pred_fn: Callable, noise: jax.Array, schedule: Schedule) -> jax.Array:
    """Where each phase ends, float32[phases, ...], from noise float32[...]. Traceable, and gradients flow through.

    noise_pred_fn: as for sampling.advance. schedule: of `learner` or `teacher`."""

    def phase(carry, steps):
        carry = sampling.advance(noise_pred_fn, carry, steps, None)
        return carry, carry[0]

    return jax.lax.scan(phase, sampling.begin(noise), jax.tree.map(jnp.asarray, schedule))[1]
