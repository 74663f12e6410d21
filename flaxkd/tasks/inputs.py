"""Inputs and targets of the UNets. Noise, timesteps and dropped captions are all sampled here."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxkd import diffusion
from flaxkd.data import masks
from flaxkd.models.vae import sample_latents
from flaxkd.pretrained import Folder


class Inputs(NamedTuple):
    """What both UNets see, and their target. The batch is the first axis of every leaf."""

    noisy_latents: jax.Array  # float32[b, h, w, 4]
    timesteps: jax.Array  # int32[b]
    conditions: dict[str, jax.Array]  # what `Family.condition` reads: token ids int32[b, l], perhaps time_ids, beside
    target: jax.Array  # float32[b, h, w, 4]
    noise_weights: jax.Array  # float32[b]
    of_class: jax.Array | None = None  # float32[b], 1 for pictures of a subject's class; None: there are none


def batch(config, folder: Folder) -> dict[str, jax.ShapeDtypeStruct]:
    """One example of what `prepare` reads: `Task.batch`."""
    (h, w, c), length, family = folder.latent_shape(config.data.resolution), folder.text_length, folder.family
    masked = {
        "masks": jax.ShapeDtypeStruct((masks.MASKS, h, w, 1), jnp.uint8),
        "masked_latents": jax.ShapeDtypeStruct((masks.MASKS, h, w, c), jnp.float32),
    }
    return {
        "moments": jax.ShapeDtypeStruct((h, w, 2 * c), jnp.float32),
        **{field: masked[field] for field in folder.beside},
        **{field: jax.ShapeDtypeStruct((length,), jnp.int32) for field in family.captions.values()},
        **({"time_ids": jax.ShapeDtypeStruct((6,), jnp.int32)} if family.sizes else {}),
    }


def options(config, folder: Folder) -> dict:
    """The keyword arguments of `prepare`."""
    return {
        "schedule": diffusion.NoiseSchedule.from_config(folder.config("scheduler"), config.prediction_type),
        "scaling_factor": folder.scaling_factor,
        "missing": folder.tokenize([None]),
        "caption_dropout": config.caption_dropout,
        "noise_offset": config.noise_offset,
        "input_perturbation": config.input_perturbation,
        "snr_gamma": config.snr_gamma,
        "timestep_sampling": config.timestep_sampling,
    }


def beside(key, masks, masked_latents, scaling_factor: float) -> jax.Array:
    """float32[b, h, w, 1 + c], what an inpainting UNet sees beside the noisy latents: one of each picture's masks, 1
    where it draws, and the scaled latents of the rest of the picture. As diffusers orders them.

    masks: uint8[b, k, h, w, 1]; masked_latents: float32[b, k, h, w, c], unscaled."""
    one = jax.random.randint(key, (len(masks), 1, 1, 1, 1), 0, masks.shape[1])
    chosen = (jnp.take_along_axis(x, one, axis=1)[:, 0] for x in (masks, scaling_factor * masked_latents))
    return jnp.concatenate([x.astype(jnp.float32) for x in chosen], axis=-1)


def prepare(key, batch, *, schedule: diffusion.NoiseSchedule, scaling_factor: float, missing: Mapping[str, np.ndarray],
            caption_dropout: float, noise_offset: float, snr_gamma: float | None,
            input_perturbation: float = 0.0, timestep_sampling: str = "uniform",
            among: np.ndarray | None = None) -> Inputs:  # fmt: skip
    """Samples latents, noise, timesteps and dropped captions for a batch {"moments", "input_ids", ...}.

    missing: {field: int32[1, l]}, the token ids of a dropped caption, as `Folder.tokenize([None])` has them. among:
    the timesteps to choose from, all alike; None: all, as `timestep_sampling` says."""
    pixels = {name: batch[name] for name in ("moments", *masks.FIELDS) if name in batch}
    conditions = {name: x for name, x in batch.items() if name not in pixels}
    moments = pixels.pop("moments")
    b = moments.shape[0]
    key_latents, key_noise, key_offset, key_timesteps, key_dropout = jax.random.split(key, 5)
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    latents = sample_latents(jax.random.normal(key_latents, shape), moments, scaling_factor)
    noise = jax.random.normal(key_noise, shape)
    if noise_offset:  # a shift of whole channels lets a UNet learn very dark and very bright pictures
        noise += noise_offset * jax.random.normal(key_offset, (b, 1, 1, latents.shape[-1]))
    if pixels:  # with a key of its own: all else is as without masks
        conditions["beside"] = beside(jax.random.fold_in(key, 5), **pixels, scaling_factor=scaling_factor)
    weighted = timestep_sampling == "uniform" and snr_gamma is not None
    if among is None:
        timesteps = diffusion.sample_timesteps(key_timesteps, schedule, b, None if weighted else snr_gamma)
    else:
        timesteps = jax.random.choice(key_timesteps, jnp.asarray(among, jnp.int32), (b,))
    if caption_dropout:
        dropped = jax.random.bernoulli(key_dropout, caption_dropout, (b, 1))
        conditions |= {name: jnp.where(dropped, jnp.asarray(ids), conditions[name]) for name, ids in missing.items()}
    added = noise
    if input_perturbation:  # more noise than the target has: at drawing, the UNet sees its own errors
        added += input_perturbation * jax.random.normal(jax.random.fold_in(key_noise, 1), shape)
    return Inputs(
        diffusion.add_noise(schedule, latents, added, timesteps),
        timesteps,
        conditions,
        diffusion.target(schedule, latents, noise, timesteps),
        diffusion.min_snr_weights(schedule, timesteps, snr_gamma) if weighted else jnp.ones(b, jnp.float32),
    )
