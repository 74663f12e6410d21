"""The diffusion process: noise schedules and targets (schedule), samplers (samplers), their loop (sampling)."""

from flaxkd.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    min_snr_weights,
    sample_timesteps,
    separate,
    target,
)

__all__ = [
    "NoiseSchedule",
    "add_noise",
    "alphas_cumprod",
    "min_snr_weights",
    "sample_timesteps",
    "separate",
    "target",
]
