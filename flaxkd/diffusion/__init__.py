"""The diffusion process: noise schedules and targets (schedule), samplers (samplers), their loop (sampling)."""

from flaxkd.diffusion.schedule import (
    NoiseSchedule,
    add_noise,
    alphas_cumprod,
    draw_timesteps,
    min_snr_weights,
    target,
)

__all__ = ["NoiseSchedule", "add_noise", "alphas_cumprod", "draw_timesteps", "min_snr_weights", "target"]
