"""Samplers that step from one training timestep to another: DDIM, DDPM, PNDM."""

import numpy as np

from flaxkd.diffusion import sigmas, weights


def _below(config: dict, alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """alphas_cumprod at timesteps. The last timestep may be below 0, at the data."""
    last = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0]
    return np.where(timesteps >= 0, alphas_cumprod[np.maximum(timesteps, 0)], last)


def ddim(config: dict, alphas_cumprod: np.ndarray, steps: int, begin: int | None) -> weights.Schedule:
    """latents = alpha' * data + sigma' * noise, at the timestep T // steps lower, whatever the spacing."""
    stride = len(alphas_cumprod) // steps
    timesteps = sigmas.spaced(config, len(alphas_cumprod), steps).round().astype(int)[begin:]
    after = _below(config, alphas_cumprod, timesteps - stride)
    alpha, sigma = np.sqrt(alphas_cumprod[timesteps]), np.sqrt(1 - alphas_cumprod[timesteps])
    # As in diffusers, the noise is the predicted one, not the one implied by the clipped data.
    v = config["prediction_type"] == "v_prediction"  # noise = sigma * latents + alpha * v
    return weights.make(
        timesteps,
        weights.start(begin, alpha, sigma),
        (alpha, sigma),
        **weights.data(config, alpha, sigma),
        limit=weights.limit(config),
        latents=np.sqrt(1 - after) * (sigma if v else 0.0),
        noise_pred=np.sqrt(1 - after) * (alpha if v else 1.0),
        predictions=np.sqrt(after),
    )


def ddpm(config: dict, alphas_cumprod: np.ndarray, steps: int, begin: int | None) -> weights.Schedule:
    """The mean of q(x_t' | x_t, data) and fresh noise, Ho et al. 2020, equations 6 and 7, at the next timestep.

    latents = alpha' * beta / (1 - a) * data + sqrt(a / a') * (1 - a') / (1 - a) * latents + sqrt(variance) * noise,
    beta = 1 - a / a', where a is alphas_cumprod. The variance is (1 - a') / (1 - a) * beta, or beta if it is "large".
    """
    timesteps = sigmas.spaced(config, len(alphas_cumprod), steps).round().astype(int)[begin:]
    here = alphas_cumprod[timesteps]
    levels = np.sqrt(here), np.sqrt(1 - here)
    after = np.append(here[1:], 1.0)
    beta = 1 - here / after
    variance = beta if config["variance_type"] == "fixed_large" else (1 - after) / (1 - here) * beta
    return weights.make(
        timesteps,
        weights.start(begin, *levels),
        levels,
        **weights.data(config, *levels),
        limit=weights.limit(config),
        latents=np.sqrt(here / after) * (1 - after) / (1 - here),
        predictions=np.sqrt(after) * beta / (1 - here),
        noise=np.sqrt(variance) * (timesteps > 0),
    )


# Weights of the noise_pred of this step and of those before, by step number. The second step repeats the first one,
# with the mean of both its ends. Its own noise_pred is not remembered: later steps skip over it.
_PLMS = np.array([
    [24, 0, 0, 0, 0], [12, 12, 0, 0, 0], [36, 0, -12, 0, 0], [46, -32, 0, 10, 0], [55, -59, 37, 0, -9],
    [55, -59, 37, -9, 0],  # and from here on
]) / 24  # fmt: skip


def pndm(config: dict, alphas_cumprod: np.ndarray, steps: int, begin: int | None) -> weights.Schedule:
    """DDIM's step with a noise_pred extrapolated from the last four:

    latents = alpha' / alpha * latents + (sigma' - alpha' * sigma / alpha) * (noise_preds mixed by _PLMS)
    """
    stride = len(alphas_cumprod) // steps
    timesteps = sigmas.spaced(config, len(alphas_cumprod), steps).round().astype(int)
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])[begin:]
    again = np.arange(len(timesteps)) == 1  # from a stride above to the timestep itself
    here, after = timesteps + stride * again, timesteps - stride * ~again
    here, after = alphas_cumprod[here], _below(config, alphas_cumprod, after)
    alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
    latents, noise_pred = np.sqrt(after) / alpha, np.sqrt(1 - after) - np.sqrt(after) * sigma / alpha
    if config["prediction_type"] == "v_prediction":  # noise = sigma * latents + alpha * v
        latents, noise_pred = latents + noise_pred * sigma, noise_pred * alpha
    mixed = noise_pred[:, None] * _PLMS[np.minimum(np.arange(len(timesteps)), len(_PLMS) - 1)]
    # The second step starts where the first one did: the inverse of the first step takes the latents back there.
    latents[1:2] /= latents[0]
    mixed[1:2, 1] -= latents[1:2] * noise_pred[0]
    start, levels = weights.start(begin, alpha, sigma), (alphas_cumprod[timesteps], 1 - alphas_cumprod[timesteps])
    levels = tuple(map(np.sqrt, levels))
    return weights.make(timesteps, start, levels, prediction_noise_pred=1.0, latents=latents, predictions=mixed)
