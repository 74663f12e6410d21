"""Drawing: text to image and image to image with classifier-free guidance, the whole loop one compiled program.

The arrays of a schedule make the sampler (`samplers.schedule`): samplers with equal numbers of steps share one compiled
program.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from flaxkd.diffusion.weights import PAST, Schedule
from flaxkd.machine import sharding


def solve(noise_pred_fn: Callable, latents: jax.Array, schedule: Schedule, noise: jax.Array | None = None) -> jax.Array:
    """Follows `schedule` from noise to data: float32[...] -> float32[...]. One `lax.scan`, traceable.

    noise_pred_fn: (latents float32[...], timestep float32[]) -> float[...], the UNet's output (noise or v).
    latents: as `schedule.start` says. noise: float32[steps, ...], unit Gaussian, for a sampler that adds some between
    its steps, else None. Raises ValueError if only one of the two has it.
    """
    if (schedule.noise is None) != (noise is None):
        needs = "draws no noise" if schedule.noise is None else f"needs noise of shape [{len(schedule.noise)}, ...]"
        raise ValueError(f"this sampler {needs} between its steps: noise is {getattr(noise, 'shape', None)}")

    def step(carry, now: tuple[Schedule, jax.Array | None]):
        latents, before = carry
        now, noise = now
        noise_pred = noise_pred_fn(latents, now.timesteps).astype(jnp.float32)
        prediction = now.prediction_latents * latents + now.prediction_noise_pred * noise_pred
        predictions = (jnp.clip(prediction, -now.limit, now.limit), *before)
        latents = now.latents * latents + now.noise_pred * noise_pred
        latents += sum(now.predictions[i] * x for i, x in enumerate(predictions))
        if noise is not None:
            latents += now.noise * noise
        return (latents, predictions[:-1]), None

    latents = jnp.asarray(latents, jnp.float32)
    nothing = jnp.zeros_like(latents)
    steps = jax.tree.map(jnp.asarray, (schedule._replace(start=None), noise))  # all but the start is by step
    (latents, *_), _ = jax.lax.scan(step, (latents, (nothing,) * PAST), steps)
    return latents


@sharding.jit(static_argnames=("modules", "condition"))
def text_to_image(
    modules: FrozenDict[str, nn.Module],
    condition: Callable,
    params: dict,
    input_ids: jax.Array,
    negative_ids: jax.Array,
    latents: jax.Array,
    schedule: Schedule,
    guidance: jax.Array | float,
    image_latents: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Images float32[b, H, W, 3] in [0, 1] of prompts int32[b, l], by classifier-free guidance.

        noise_pred = negative + guidance * (positive - negative)        Ho & Salimans 2022, arXiv:2207.12598

    One program, compiled once per modules, shapes, number of steps, and whether the last two arguments are given;
    `schedule` and `guidance` are traced.

    modules: the networks of a pipeline, static. condition: that of its family, static (see pretrained/families.py).
    params: {part: tree}, preferably on the device. negative_ids: int32[b, l], the token ids of what not to draw, or
    of "". latents: float32[b, h, w, 4], unit Gaussian. guidance: 1 is none, 7.5 is usual. Values below 1 follow the
    equation too, where diffusers ignores `negative_ids`. image_latents: float32[b, h, w, 4] of `image_to_latents`,
    from which a schedule with a strength begins (SDEdit, Meng et al. 2021, arXiv:2108.01073). noise: float32[steps, b,
    h, w, 4] as in `solve`.
    """
    # One call on a doubled batch, the two of a picture side by side: where the batch is split over devices, each then
    # has its own, and nothing is sent.
    pairs = lambda negative, positive: jnp.stack([negative, positive], 1).reshape(-1, *positive.shape[1:])
    ids = pairs(negative_ids, input_ids)
    states = condition(modules, params, ids)

    def guided(latents, timestep):
        both = pairs(latents, latents)
        timesteps = jnp.full(len(both), timestep)
        noise_pred = modules["unet"].apply({"params": params["unet"]}, both, timesteps, **states)
        noise_pred = noise_pred.astype(jnp.float32).reshape(-1, 2, *latents.shape[1:])
        negative, positive = noise_pred[:, 0], noise_pred[:, 1]
        return negative + guidance * (positive - negative)

    of_data, of_noise = schedule.start
    latents = of_noise * latents if image_latents is None else of_data * image_latents + of_noise * latents
    latents = solve(guided, latents, schedule, noise)
    vae = modules["vae"]
    images = vae.apply({"params": params["vae"]}, latents / vae.config.scaling_factor, method="decode")
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)


@sharding.jit(static_argnames=("vae",))
def image_to_latents(vae: nn.Module, params: dict, images: jax.Array) -> jax.Array:
    """Latents float32[b, h, w, 4] of images float32[b, H, W, 3] in [0, 1]: the mean of their posterior, scaled.

    diffusers draws a sample around it, which Stable Diffusion's autoencoder makes hardly any different. params: of
    the autoencoder alone."""
    mean, _ = jnp.split(vae.apply({"params": params}, 2 * images - 1, method="encode"), 2, axis=-1)
    return mean * vae.config.scaling_factor
