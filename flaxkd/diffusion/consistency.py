"""Consistency models: a network says where the ODE from any noisy latents ends (Song et al. 2023, arXiv:2303.01469).

In latents: LCM, Luo et al. 2023, arXiv:2310.04378. tasks/few_step.py trains one, and `lcm` draws with it.
"""

import numpy as np

from flaxkd.diffusion import weights
from flaxkd.diffusion.schedule import BETAS

SIGMA_DATA, SCALING = 0.5, 10.0  # of diffusers' scripts and scheduler


def timesteps(train_steps: int, ode_steps: int) -> np.ndarray:
    """The timesteps int[ode_steps] of the ODE, rising: those that the network learns, and no others."""
    return np.arange(1, ode_steps + 1) * (train_steps // ode_steps) - 1


def boundary(timesteps, scaling: float = SCALING) -> tuple:
    """(c_skip, c_out) of f(x, t) = c_skip * x + c_out * data(x, t), which is x at timestep 0 (Song et al., equation 5).

    scaling: diffusers' `timestep_scaling`. With 10, c_skip is below 1e-5 from timestep 19 on: f is the predicted data.
    """
    scaled = scaling * timesteps
    variance = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, scaled / variance**0.5


def scheduler_config(teacher: dict, prediction_type: str, ode_steps: int) -> dict:
    """The scheduler_config.json of a consistency model, of diffusers' LCMScheduler. teacher: its teacher's."""
    return {
        "_class_name": "LCMScheduler",
        **{name: teacher.get(name, default) for name, default in BETAS.items()},
        "rescale_betas_zero_snr": teacher.get("rescale_betas_zero_snr", False),
        "prediction_type": prediction_type,
        "original_inference_steps": ode_steps,
        "timestep_scaling": SCALING,
        "clip_sample": False,
    }


def lcm(config: dict, alphas_cumprod: np.ndarray, steps: int, begin: int | None) -> weights.Schedule:
    """latents = alpha' * f(latents) + sigma' * fresh noise, at some of the timesteps of training (LCM, algorithm 3)."""
    ode_steps = config["original_inference_steps"]
    if not 1 <= ode_steps <= len(alphas_cumprod):
        raise ValueError(f"original_inference_steps = {ode_steps}: it must be 1 to {len(alphas_cumprod)}")
    if steps > ode_steps:
        raise ValueError(f"steps = {steps}: the model was made for {ode_steps} at most (original_inference_steps)")
    chosen = np.floor(np.linspace(0, ode_steps, steps, endpoint=False)).astype(int)
    visited = timesteps(len(alphas_cumprod), ode_steps)[::-1][chosen][begin:]
    alpha, sigma = np.sqrt(alphas_cumprod[visited]), np.sqrt(1 - alphas_cumprod[visited])
    after, sigma_after = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    c_skip, c_out = boundary(visited, config["timestep_scaling"])
    return weights.make(
        visited,
        weights.start(begin, alpha, sigma),
        (alpha, sigma),
        **weights.data(config, alpha, sigma),
        limit=weights.limit(config),
        latents=after * c_skip,
        predictions=after * c_out,
        noise=sigma_after,
    )
