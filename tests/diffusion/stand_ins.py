"""Configurations of schedulers, and small functions and modules in the place of networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict

from flaxkd.diffusion import samplers, sampling
from flaxkd.models.unet import UNetConfig
from flaxkd.models.vae import VAEConfig
from flaxkd.pretrained import families

SD15 = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5, whole
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
LEADING = {**SD15, "timestep_spacing": "leading"}
CONFIGS = {
    "sd15": SD15,
    "leading": LEADING,
    "linspace": {**SD15, "timestep_spacing": "linspace"},
    "trailing": {**SD15, "timestep_spacing": "trailing"},
    "sd21": {**LEADING, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "v_linspace": {**SD15, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    "clipped": {k: v for k, v in LEADING.items() if k != "clip_sample"},  # DDIM's default is to clip
    "clipped_v": {
        **LEADING,
        "prediction_type": "v_prediction",
        "clip_sample": True,
        "clip_sample_range": 0.7,
    },
    "alpha_to_one": {**LEADING, "set_alpha_to_one": True, "steps_offset": 0},
    "defaults": {"clip_sample": False},
    "short": {**LEADING, "num_train_timesteps": 400, "beta_schedule": "linear", "beta_end": 0.02},
    "cosine": {**LEADING, "beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        **SD15,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "unipc": {**LEADING, "_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 2},
}
# Options of the classes that have them; others ignore them, as flaxkd does.
OPTIONS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
    "beta": {"use_beta_sigmas": True, "timestep_spacing": "trailing"},
    "limits": {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.5},
    "lu": {"use_lu_lambdas": True},
    "first": {"solver_order": 1, "timestep_spacing": "linspace"},
    "third": {"solver_order": 3},
    "third_v": {"solver_order": 3, "prediction_type": "v_prediction", "lower_order_final": False}
    | {"final_sigmas_type": "sigma_min"},
    "heun": {"solver_type": "heun", "euler_at_final": True, "final_sigmas_type": "sigma_min"},
    "bh1": {"solver_type": "bh1", "solver_order": 3, "disable_corrector": [0, 2], "final_sigmas_type": "sigma_min"},
    "in_noise": {"predict_x0": False, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
    "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
    "sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "prediction_type": "v_prediction"},
    "sde_heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_karras_sigmas": True},
    "sde_noise": {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    "clipped_lambda": {"lambda_min_clipped": -2.0},
    "large": {"variance_type": "fixed_large", "clip_sample": True, "clip_sample_range": 0.9},
}
KINDS = samplers.KINDS
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
NOISE = np.random.default_rng(2).standard_normal((49, *LATENTS.shape)).astype(np.float32)


def model(xp, latents, t):
    """A nonlinear stand-in for the UNet in torch or jax (`xp`). Pure noise is predicted as such: unit scale."""
    return latents * (t / 1000) + 0.3 * (1 - t / 1000) * xp.cos(3 * latents + t / 150)


solve = jax.jit(functools.partial(sampling.solve, functools.partial(model, jnp)))


def noise_of(schedule):
    return None if schedule.noise is None else NOISE[: len(schedule.noise)]


TRACES = []


class TextEncoder(nn.Module):
    @nn.compact
    def __call__(self, input_ids):
        return nn.Embed(16, 4, name="token_embedding")(input_ids)


class UNet(nn.Module):
    config: UNetConfig = UNetConfig()

    @nn.compact
    def __call__(self, sample, timesteps, encoder_hidden_states):
        TRACES.append(sample.shape)
        text = encoder_hidden_states.mean(1)[:, None, None] * self.param("gain", nn.initializers.ones, ())
        return sample * timesteps[:, None, None, None].astype(jnp.float32) / 1000 + jnp.tanh(sample + text) / 9


class VAE(nn.Module):
    config: VAEConfig = VAEConfig(scaling_factor=3.0)

    def decode(self, latents):
        return latents[..., :3].repeat(2, axis=1).repeat(2, axis=2)


TABLE = np.random.default_rng(1).standard_normal((16, 4)).astype(np.float32)
GAIN = np.float32(0.8)
MODULES = FrozenDict({"unet": UNet(), "vae": VAE(), "text_encoder": TextEncoder()})
STAND_INS = MODULES, families.text_states
PARAMS = {"unet": {"gain": GAIN}, "vae": {}, "text_encoder": {"token_embedding": {"embedding": TABLE}}}
POSITIVE = {"input_ids": np.array([[1, 2, 3], [4, 5, 6]], np.int32)}
NEGATIVE = {"input_ids": np.array([[7, 8, 9], [7, 8, 9]], np.int32)}
