"""Drawing: text to image, image to image and inpainting with classifier-free guidance.

The arrays of a schedule make the sampler (`samplers.schedule`): all samplers, with any number of steps, share one
compiled program for a step. Whoever draws counts the steps: at full size one may take seconds.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from flaxkd.diffusion.weights import PAST, Schedule
from flaxkd.machine import sharding
from flaxkd.models.unet import guidance_embedding


class Kept(NamedTuple):
    """What stays of a picture where only a part of it is drawn."""

    latents: jax.Array  # float32[b, h, w, c], of the picture
    noise: jax.Array  # float32[b, h, w, c], unit Gaussian, the same in all steps
    mask: jax.Array  # float32[b, h, w, 1]: 1 is drawn, 0 stays


def solve(noise_pred_fn: Callable, latents: jax.Array, schedule: Schedule, noise: jax.Array | None = None) -> jax.Array:
    """Follows `schedule` from noise to data: float32[...] -> float32[...]. Traceable; arguments as in `advance`.

    latents: as `schedule.start` says."""
    return advance(noise_pred_fn, begin(latents), schedule, noise)[0]


def begin(latents: jax.Array) -> tuple:
    """What a step reads and renews: the latents float32[...], then predictions of the steps before."""
    latents = jnp.asarray(latents, jnp.float32)
    nothing = 0 * latents  # on the devices of the latents
    return latents, (nothing,) * PAST


def advance(
    noise_pred_fn: Callable, carry: tuple, schedule: Schedule, noise: jax.Array | None, kept: Kept | None = None
) -> tuple:
    """Takes the steps of `schedule`, all or some of them, from and to what `begin` returns. One `lax.scan`, traceable.

    noise_pred_fn: (latents float32[...], timestep float32[]) -> float[...], the UNet's output (noise or v).
    noise: float32[steps, ...], unit Gaussian, for a sampler that adds some between its steps, else None. Raises
    ValueError if only one of the two has it. kept: put back after every step, with as much noise as is left there
    (RePaint without its jumps back, Lugmayr et al. 2022, arXiv:2201.09865, equation 8).
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
        if kept is not None:
            there = now.kept[0] * kept.latents + now.kept[1] * kept.noise
            latents = kept.mask * latents + (1 - kept.mask) * there
        return (latents, predictions[:-1]), None

    steps = jax.tree.map(jnp.asarray, (schedule._replace(start=None), noise))  # all but the start is by step
    return jax.lax.scan(step, carry, steps)[0]


def text_to_image(
    modules: FrozenDict[str, nn.Module],
    condition: Callable,
    params: dict,
    inputs: Mapping[str, jax.Array],
    negative_inputs: Mapping[str, jax.Array],
    latents: jax.Array,
    schedule: Schedule,
    guidance: jax.Array | float | None,
    image_latents: jax.Array | None = None,
    mask: jax.Array | None = None,
    noise: jax.Array | None = None,
    tick: Callable[[], None] | None = None,
    token_weights: tuple[jax.Array, jax.Array] | None = None,
    empty_inputs: Mapping[str, jax.Array] | None = None,
    guidance_rescale: jax.Array | float | None = None,
    scan: bool = False,
) -> jax.Array:
    """Images float32[b, H, W, 3] in [0, 1] of b prompts, by classifier-free guidance.

        noise_pred = negative + guidance * (positive - negative)        Ho & Salimans 2022, arXiv:2207.12598

    Three programs: the states of the prompts, a step, the decoder. Each is compiled once per modules and shapes, and
    the step's also for whether the sampler adds noise; `schedule` and `guidance` are traced. Traceable as a whole
    without `tick`, also with an unknown b.

    modules: the networks of a pipeline, static. condition: that of its family, static (see pretrained/families.py).
    params: {part: tree}, preferably on the device. inputs: what `condition` reads of the prompts, token ids int32[b,
    l] and perhaps time_ids int32[b, 6] (`Folder.conditions`). negative_inputs: the same of what not to draw. latents:
    float32[b, h, w, 4], unit Gaussian. guidance: one, or float32[b] for each picture; 1 is none, 7.5 is usual. Values
    below 1 follow the equation too, where diffusers ignores `negative_inputs`. None is 1, at half the compute:
    `negative_inputs` are not seen. Nor are they by a UNet with a `time_cond_proj_dim`, whose input the guidance is.
    image_latents: float32[b, h, w, 4] of `image_to_latents`, from which a schedule with a strength begins (SDEdit,
    Meng et al. 2021, arXiv:2108.01073). mask: float32[b, h, w, 1], where to draw; the rest stays as in
    `image_latents`. None: everywhere. noise: float32[steps, b, h, w, 4] as in `solve`. tick: called when a step is
    done; what it raises ends the drawing. token_weights: float32[b, k, l] of the negative prompts and of the prompts,
    whose ids are then int32[b, k, l], k chunks that the UNet sees together; a state is moved away from that of
    `empty_inputs`, those of one empty prompt. guidance_rescale: how much of the standard deviation that guidance adds
    to a noise_pred is taken back, 0 to 1 (Lin et al. 2023, arXiv:2305.08891, equation 16); None: nothing. scan: take
    all steps by one `lax.scan`, without `tick`: where all is compiled as one program, the UNet is in it once.
    """
    channels = modules["unet"].config.time_cond_proj_dim
    alone = channels is not None or guidance is None
    states = _states(modules, condition, params, inputs, negative_inputs, token_weights, empty_inputs, alone=alone)
    if channels is not None:
        scales = jnp.broadcast_to(1.0 if guidance is None else guidance, latents.shape[:1])
        states, guidance = states | {"timestep_cond": guidance_embedding(scales, channels)}, None
    kept = None if mask is None else Kept(image_latents, latents, mask)
    of_data, of_noise = schedule.start
    latents = of_noise * latents if image_latents is None else of_data * image_latents + of_noise * latents
    carry = begin(latents)
    by_step = schedule._replace(start=None)
    steps = len(schedule.timesteps)
    for i, end in [(0, steps)] if scan else ((i, i + 1) for i in range(steps)):
        before, (now, added) = carry, jax.tree.map(lambda x, i=i, end=end: x[i:end], (by_step, noise))
        carry = _step(modules["unet"], params["unet"], states, guidance, guidance_rescale, carry, now, added, kept)
        if tick and i:  # one step late: the devices have the next one already
            jax.block_until_ready(before)
            tick()
    images = decode(modules["vae"], params["vae"], carry[0])
    if tick:
        jax.block_until_ready(images)
        tick()
    return images


def ends(modules, condition, params, inputs, negative_inputs, latents, schedule: Schedule, guidance) -> jax.Array:
    """The latents at the ends of a schedule's phases, float32[b, phases, h, w, c]. Arguments as for `text_to_image`.

    schedule: [phases, steps of a phase], of a sampler that begins at noise of unit variance and adds none."""
    states = _states(modules, condition, params, inputs, negative_inputs, None, None, alone=False)
    carry, found = begin(latents), []
    for k in range(len(schedule.timesteps)):
        steps = jax.tree.map(lambda x, k=k: x[k], schedule)
        carry = _step(modules["unet"], params["unet"], states, guidance, None, carry, steps, None, None)
        found.append(carry[0])
    return jnp.stack(found, axis=1)


def pairs(negative: jax.Array, positive: jax.Array) -> jax.Array:
    """One doubled batch [2b, ...] of two, for one call. The two of a picture are side by side: where the batch is split
    over devices, each then has its own, and nothing is sent."""
    return jnp.stack([negative, positive], 1).reshape(-1, *positive.shape[1:])


@sharding.jit(static_argnames=("modules", "condition", "alone"))
def _states(modules, condition, params, inputs, negative_inputs, token_weights, empty_inputs, *, alone) -> dict:
    """The keyword arguments of the UNet, for the doubled batch. alone: for the prompts without their negatives."""
    both = dict(inputs) if alone else jax.tree.map(pairs, dict(negative_inputs), dict(inputs))
    if token_weights is None:
        return condition(modules, params, both)
    weights = token_weights[1] if alone else pairs(*token_weights)
    n, k, length = weights.shape
    # A chunk is a prompt of its own; what has no chunks is the same for all of a picture.
    chunks = {name: x.reshape(-1, length) if x.ndim == 3 else jnp.repeat(x, k, axis=0) for name, x in both.items()}
    states, empty = condition(modules, params, chunks), condition(modules, params, empty_inputs)
    text, nothing = states.pop("encoder_hidden_states"), empty["encoder_hidden_states"]
    text = (text - nothing) * weights.reshape(-1, length, 1).astype(text.dtype) + nothing
    first = {name: x[::k] for name, x in states.items()}
    return first | {"encoder_hidden_states": text.reshape(n, k * length, -1)}


@sharding.jit(static_argnames=("unet",))
def _step(unet, params, states, guidance, guidance_rescale, carry, schedule, noise, kept) -> tuple:
    """The steps of the guided sampler in `schedule` and `noise`: one, or all of them."""

    def guided(latents, timestep):
        if guidance is None:
            return unet.apply({"params": params}, latents, jnp.full(latents.shape[0], timestep), **states)
        both = pairs(latents, latents)
        noise_pred = unet.apply({"params": params}, both, jnp.full(both.shape[0], timestep), **states)
        noise_pred = noise_pred.astype(jnp.float32).reshape(-1, 2, *latents.shape[1:])
        negative, positive = noise_pred[:, 0], noise_pred[:, 1]
        guided = negative + jnp.reshape(guidance, (-1, 1, 1, 1)) * (positive - negative)
        if guidance_rescale is None:
            return guided
        deviation = lambda x: jnp.std(x, axis=(1, 2, 3), keepdims=True)
        return guided * (1 + guidance_rescale * (deviation(positive) / deviation(guided) - 1))

    return advance(guided, carry, schedule, noise, kept)


@sharding.jit(static_argnames=("vae",))
def decode(vae: nn.Module, params: dict, latents: jax.Array) -> jax.Array:
    """Images float32[b, H, W, 3] in [0, 1] of latents float32[b, h, w, 4]. params: of the autoencoder alone."""
    images = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)


@sharding.jit(static_argnames=("factor",))
def mask_of_latents(mask: jax.Array, factor: int) -> jax.Array:
    """float32[b, h, w, 1] of bool[b, H, W]: a latent is drawn if its first pixel is, as in diffusers."""
    return mask[:, ::factor, ::factor, None].astype(jnp.float32)


@sharding.jit(static_argnames=("vae",))
def seen_beside(vae: nn.Module, params: dict, images: jax.Array, masks: jax.Array) -> jax.Array:
    """float32[b, h, w, 1 + c], what an inpainting UNet sees beside the noisy latents: the mask, and the latents of
    `images` float32[b, H, W, 3] in [0, 1] that are grey where `masks` bool[b, H, W] are True."""
    grey = jnp.where(masks[..., None], 0.5, images)
    latents = image_to_latents(vae, params, grey).astype(jnp.float32)
    return jnp.concatenate([mask_of_latents(masks, vae.config.factor), latents], axis=-1)


@sharding.jit(static_argnames=("vae",))
def image_to_latents(vae: nn.Module, params: dict, images: jax.Array) -> jax.Array:
    """Latents float32[b, h, w, 4] of images float32[b, H, W, 3] in [0, 1]: the mean of their posterior, scaled.

    diffusers draws a sample around it, which Stable Diffusion's autoencoder makes hardly any different. params: of
    the autoencoder alone."""
    mean, _ = jnp.split(vae.apply({"params": params}, 2 * images - 1, method="encode"), 2, axis=-1)
    return mean * vae.config.scaling_factor
