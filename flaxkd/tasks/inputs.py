"""Inputs and targets of the UNets. Noise, timesteps and dropped captions are all sampled here."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxkd import diffusion
from flaxkd.models.vae import sample_latents
from flaxkd.pretrained import Folder


class Inputs(NamedTuple):
    """What both UNets see, and their target. The batch is the first axis of every leaf."""

    noisy_latents: jax.Array  # float32[b, h, w, 4]
    timesteps: jax.Array  # int32[b]
    conditions: dict[str, jax.Array]  # what `Family.condition` reads: token ids int32[b, l], perhaps time_ids
    target: jax.Array  # float32[b, h, w, 4]
    noise_weights: jax.Array  # float32[b]


def batch(config, folder: Folder) -> dict[str, jax.ShapeDtypeStruct]:
    """One example of what `prepare` reads: `Task.batch`."""
    (h, w, c), length, family = folder.latent_shape(config.data.resolution), folder.text_length, folder.family
    return {
        "moments": jax.ShapeDtypeStruct((h, w, 2 * c), jnp.float32),
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
        "snr_gamma": config.snr_gamma,
        "timestep_sampling": config.timestep_sampling,
    }


def prepare(key, batch, *, schedule: diffusion.NoiseSchedule, scaling_factor: float, missing: Mapping[str, np.ndarray],
            caption_dropout: float, noise_offset: float, snr_gamma: float | None,
            timestep_sampling: str = "uniform", among: np.ndarray | None = None) -> Inputs:  # fmt: skip
    """Samples latents, noise, timesteps and dropped captions for a batch {"moments", "input_ids", ...}.

    missing: {field: int32[1, l]}, the token ids of a dropped caption, as `Folder.tokenize([None])` has them. among:
    the timesteps to choose from, all alike; None: all, as `timestep_sampling` says."""
    moments, conditions = batch["moments"], {name: x for name, x in batch.items() if name != "moments"}
    b = moments.shape[0]
    key_latents, key_noise, key_offset, key_timesteps, key_dropout = jax.random.split(key, 5)
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    latents = sample_latents(jax.random.normal(key_latents, shape), moments, scaling_factor)
    noise = jax.random.normal(key_noise, shape)
    if noise_offset:  # a shift of whole channels lets a UNet learn very dark and very bright pictures
        noise += noise_offset * jax.random.normal(key_offset, (b, 1, 1, latents.shape[-1]))
    weighted = timestep_sampling == "uniform" and snr_gamma is not None
    if among is None:
        timesteps = diffusion.sample_timesteps(key_timesteps, schedule, b, None if weighted else snr_gamma)
    else:
        timesteps = jax.random.choice(key_timesteps, jnp.asarray(among, jnp.int32), (b,))
    if caption_dropout:
        dropped = jax.random.bernoulli(key_dropout, caption_dropout, (b, 1))
        conditions |= {name: jnp.where(dropped, jnp.asarray(ids), conditions[name]) for name, ids in missing.items()}
    return Inputs(
        diffusion.add_noise(schedule, latents, noise, timesteps),
        timesteps,
        conditions,
        diffusion.target(schedule, latents, noise, timesteps),
        diffusion.min_snr_weights(schedule, timesteps, snr_gamma) if weighted else jnp.ones(b, jnp.float32),
    )
