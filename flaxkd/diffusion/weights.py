"""A sampler as data: the arrays of weights that `sampling.solve` follows, and what all samplers need to make them."""

import math
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

PAST = 4  # earlier predictions that a step may use


class Schedule(NamedTuple):
    """The steps of a sampler; all fields but the first are float32[calls]. A step of `sampling.solve` is

    prediction = clip(prediction_latents * latents + prediction_noise_pred * noise_pred, -limit, limit)
    latents    = latents * latents + noise_pred * noise_pred + predictions @ predictions + noise * noise

    On the right, each field weighs the array of its name. `prediction` is what the sampler extrapolates: the clean
    latents, the noise, or the UNet's output itself. `predictions` are this one and those of the steps before, newest
    first, and `noise` is fresh noise.
    """

    start: np.ndarray  # [2]: the first latents are start[0] * clean latents + start[1] * noise
    timesteps: np.ndarray  # some samplers' are fractional
    prediction_latents: np.ndarray
    prediction_noise_pred: np.ndarray
    limit: np.ndarray  # infinity: the prediction is not clipped
    latents: np.ndarray
    noise_pred: np.ndarray
    predictions: np.ndarray  # [calls, 1 + PAST]
    noise: np.ndarray | None  # None: the sampler adds no noise between steps
    kept: np.ndarray  # [calls, 2]: after each, what is kept of a picture is kept[0] * clean latents + kept[1] * noise


def make(timesteps, start, levels, *, predictions, noise=None, **weights) -> Schedule:
    """The fields as float32[calls]; missing weights are 0. predictions: float[calls] or float[calls, 1 to 1 + PAST].

    levels: the weights of data and noise in the latents of each call, float[calls] each."""
    n = len(timesteps)
    predictions = np.reshape(predictions, (n, -1))
    fields = dict(prediction_latents=0.0, prediction_noise_pred=0.0, limit=np.inf, latents=0.0, noise_pred=0.0)
    return Schedule(
        start=np.float32(start),
        timesteps=np.float32(timesteps),
        predictions=np.float32(np.pad(predictions, ((0, 0), (0, 1 + PAST - predictions.shape[1])))),
        noise=None if noise is None else np.float32(noise),
        kept=np.float32(np.stack([np.append(level[1:], end) for level, end in zip(levels, (1, 0), strict=True)], 1)),
        **{name: np.float32(np.broadcast_to(x, n)) for name, x in (fields | weights).items()},
    )


def start(begin: int | None, alpha, sigma, pure=1.0) -> tuple[float, float]:
    """The start: noise alone, with standard deviation `pure`, or the first noisy latents of a shortened schedule."""
    return (0.0, pure) if begin is None else (alpha[0], sigma[0])


def limit(config: dict) -> float:
    """Where the predicted data is clipped."""
    return config["clip_sample_range"] if config["clip_sample"] else np.inf


def finite(config: dict, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Keeps the ratio of noise to signal finite with `rescale_betas_zero_snr`, as diffusers does."""
    return np.append(alphas_cumprod[:-1], 2.0**-24) if config["rescale_betas_zero_snr"] else alphas_cumprod


def data(config: dict, alpha, sigma) -> dict[str, np.ndarray]:
    """The weights with which a prediction is the clean latents, where noisy_latents = alpha * data + sigma * noise."""
    if config["prediction_type"] == "v_prediction":  # v = alpha * noise - sigma * data
        return {"prediction_latents": alpha, "prediction_noise_pred": -sigma}
    if not np.all(alpha):
        raise ValueError("rescale_betas_zero_snr needs prediction_type 'v_prediction': it starts at no signal")
    return {"prediction_latents": 1 / alpha, "prediction_noise_pred": -sigma / alpha}


def noise(config: dict, alpha, sigma) -> dict[str, np.ndarray]:
    """The weights with which a prediction is the noise."""
    v = config["prediction_type"] == "v_prediction"
    return {"prediction_latents": sigma if v else 0.0, "prediction_noise_pred": alpha if v else 1.0}


def lagrange(nodes) -> list[Polynomial]:
    """For each node the polynomial that is 1 there and 0 at the others: Adams-Bashforth's weights are integrals."""
    factor = lambda node, other: Polynomial([-other, 1.0]) / (node - other)
    one = Polynomial([1.0])
    return [math.prod((factor(a, b) for j, b in enumerate(nodes) if j != i), start=one) for i, a in enumerate(nodes)]
