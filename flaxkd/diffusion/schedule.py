"""The noise schedule of a diffusion model, from diffusers' `scheduler_config.json`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# diffusers' defaults
BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
MOST_TIMESTEPS = 100_000  # 1000 are usual; a typing error beyond it would fill the memory


def alphas_cumprod(scheduler_config: dict) -> np.ndarray:
    """The cumulative product of (1 - beta) over the training timesteps, float64[num_train_timesteps].

    `noisy_latents = sqrt(alphas_cumprod[t]) * latents + sqrt(1 - alphas_cumprod[t]) * noise`. Missing keys take
    diffusers' defaults: 1000 timesteps, `linear` from 0.0001 to 0.02. With `rescale_betas_zero_snr` the last value
    is exactly zero (Lin et al. 2023, arXiv:2305.08891, algorithm 1). Raises ValueError for other schedules, and for
    numbers that no schedule has.
    """
    schedule, start, end, steps = (scheduler_config.get(name, default) for name, default in BETAS.items())
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise ValueError(
            f"num_train_timesteps = {steps!r} in scheduler_config.json must be a whole number, 1 to {MOST_TIMESTEPS:,}"
        )
    for name, beta in (("beta_start", start), ("beta_end", end)):
        if type(beta) not in (int, float) or not 0 <= beta < 1:
            raise ValueError(f"{name} = {beta!r} in scheduler_config.json must be a number of at least 0 and below 1")
    if scheduler_config.get("trained_betas") is not None:
        raise ValueError("trained_betas is not supported: give beta_schedule, beta_start and beta_end instead")
    if schedule == "linear":
        betas = np.linspace(start, end, steps)
    elif schedule == "scaled_linear":  # Stable Diffusion's
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2"
        raise ValueError(f"beta_schedule = {schedule!r} is not supported (supported: {known})")
    product = np.cumprod(1 - betas)
    if scheduler_config.get("rescale_betas_zero_snr", False):
        root = np.sqrt(product)
        product = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return product


class NoiseSchedule(NamedTuple):
    """What training needs from a `scheduler_config.json`. alphas_cumprod: float32[num_train_timesteps]."""

    alphas_cumprod: np.ndarray
    prediction_type: str

    @classmethod
    def from_config(cls, scheduler_config: dict, prediction_type: str | None = None) -> "NoiseSchedule":
        """`prediction_type` overrides the file's. Raises ValueError for an unsupported one, and for "epsilon" with
        `rescale_betas_zero_snr`: at a timestep of noise alone there is nothing to learn, and nothing to draw from."""
        kind = prediction_type or scheduler_config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type = {kind!r} is not supported (supported: epsilon, v_prediction)")
        alphas = alphas_cumprod(scheduler_config).astype(np.float32)
        if kind == "epsilon" and not alphas.all():
            raise ValueError(
                "prediction_type = 'epsilon' does not go with rescale_betas_zero_snr, whose last timestep is noise "
                "alone: is it a model for v_prediction (--config.prediction_type=v_prediction)? Else set it to false "
                "in scheduler_config.json"
            )
        return cls(alphas, kind)


def _weights(schedule: NoiseSchedule, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at timesteps int[b], float32[b, 1, 1, 1]."""
    alphas = jnp.asarray(schedule.alphas_cumprod)[timesteps][:, None, None, None]
    return jnp.sqrt(alphas), jnp.sqrt(1 - alphas)


def add_noise(schedule: NoiseSchedule, latents, noise, timesteps) -> jax.Array:
    """The forward process q(x_t | x_0), float32[b, h, w, c] (Ho et al. 2020, arXiv:2006.11239, equation 4)."""
    alpha, sigma = _weights(schedule, timesteps)
    return alpha * latents + sigma * noise


def target(schedule: NoiseSchedule, latents, noise, timesteps) -> jax.Array:
    """The target of the UNet: the noise, or v (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
    if schedule.prediction_type == "epsilon":
        return noise
    alpha, sigma = _weights(schedule, timesteps)
    return alpha * noise - sigma * latents


def separate(schedule: NoiseSchedule, noisy_latents, noise_pred, timesteps) -> tuple[jax.Array, jax.Array]:
    """(latents, noise) that the output of a UNet says `noisy_latents` are made of: the inverse of `target`."""
    alpha, sigma = _weights(schedule, timesteps)
    noise_pred = noise_pred.astype(jnp.float32)
    if schedule.prediction_type == "epsilon":
        return (noisy_latents - sigma * noise_pred) / alpha, noise_pred
    return alpha * noisy_latents - sigma * noise_pred, sigma * noisy_latents + alpha * noise_pred


def min_snr_weights(schedule: NoiseSchedule, timesteps, gamma: float) -> jax.Array:
    """Loss weights float32[b] of Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556).

    min(snr, gamma) / snr, or for v, min(snr, gamma) / (snr + 1), as in diffusers. The signal-to-noise ratio snr is
    alphas_cumprod / (1 - alphas_cumprod). With `rescale_betas_zero_snr`, the last timestep has the weight 0."""
    alphas = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    snr = alphas / (1 - alphas)
    return jnp.minimum(snr, gamma) / (snr + 1 if schedule.prediction_type == "v_prediction" else snr)


def sample_timesteps(key, schedule: NoiseSchedule, count: int, gamma: float | None = None) -> jax.Array:
    """Timesteps int32[count], sampled uniformly, or in proportion to their Min-SNR weights for `gamma`.

    The second way gives the weighted loss up to a factor, and spends no compute on examples of little weight."""
    steps = len(schedule.alphas_cumprod)
    if gamma is None:
        return jax.random.randint(key, (count,), 0, steps)
    weights = min_snr_weights(schedule, jnp.arange(steps), gamma)
    return jax.random.choice(key, steps, (count,), p=weights / jnp.sum(weights)).astype(jnp.int32)
