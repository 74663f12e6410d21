"""Drawing: DPM-Solver++ (2M) and DDIM with classifier-free guidance, the whole loop one compiled program.

A sampler is data. `plan` computes, once and in float64, what diffusers' scheduler objects compute between the
calls of the UNet; `solve` is the only loop, a linear recurrence that knows no sampler by name. To change the
sampler is to change the arrays, so that equal numbers of steps share one compiled program. To add one, write its
function of weights and its entry in `_SAMPLERS`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flaxkd import diffusion


class Plan(NamedTuple):
    """The steps of a sampler, each field [steps], int32 timesteps and float32 weights. A step of `solve` is

    data    = clip(data_latents * latents + data_noise_pred * noise_pred, -limit, limit)
    latents = latents * latents + noise_pred * noise_pred + data * data + data_before * data_before

    where a field weighs the array of its name, `data` is the predicted clean latents and `data_before` is that
    of the step before.
    """

    timesteps: np.ndarray
    data_latents: np.ndarray
    data_noise_pred: np.ndarray
    limit: np.ndarray  # infinity: `data` is not clipped
    latents: np.ndarray
    noise_pred: np.ndarray
    data: np.ndarray
    data_before: np.ndarray


def plan(kind: str, scheduler_config: dict, steps: int) -> Plan:
    """The plan of `steps` calls of the UNet that diffusers' scheduler makes of the same configuration.

    kind: "dpmsolver++" is `DPMSolverMultistepScheduler.from_config(scheduler_config)` (Lu et al. 2022,
    arXiv:2211.01095, algorithm 2), "ddim" is `DDIMScheduler.from_config(scheduler_config)` with eta 0 (Song et
    al. 2020, arXiv:2010.02502, equation 12). scheduler_config: a `scheduler_config.json`, whichever class wrote
    it. As in diffusers, a key that it lacks has the default of the class that reads it (`timestep_spacing` is
    "linspace" for "dpmsolver++" but "leading" for "ddim", `clip_sample` and `set_alpha_to_one` are true), and
    keys that only other schedulers have are ignored. Both start from unit Gaussian latents.

    Raises ValueError for an unknown kind, for options with which diffusers would draw something else (it lists
    them all), and for a number of steps that the training timesteps cannot hold.
    """
    if kind not in _SAMPLERS:
        raise ValueError(f"sampler {kind!r} is unknown (known: {', '.join(_SAMPLERS)})")
    weigh, defaults, supported = _SAMPLERS[kind]
    config = {**defaults, **scheduler_config}
    wrong = [
        f"{name} = {config[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in supported.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise ValueError(f"{kind} does not support this scheduler configuration: {'; '.join(wrong)}")
    alphas = diffusion.alphas_cumprod(config)
    if steps < 1:
        raise ValueError(f"steps = {steps}: a sampler takes at least one step")
    timesteps, weights = weigh(config, alphas, steps)
    weights = {name: np.float32(np.broadcast_to(value, timesteps.shape)) for name, value in weights.items()}
    return Plan(timesteps.astype(np.int32), **weights)


def _check(timesteps: np.ndarray, train_steps: int) -> np.ndarray:
    if timesteps.max() >= train_steps or timesteps.min() < 0 or (np.diff(timesteps) >= 0).any():
        raise ValueError(
            f"{len(timesteps)} steps do not fit the {train_steps} training timesteps (they would run from "
            f"{timesteps[0]} to {timesteps[-1]} with repetitions or outside the range): take fewer steps"
        )
    return timesteps


def _trailing(train_steps: int, steps: int) -> np.ndarray:
    # Rounding gives `arange` one value too many for some numbers of steps (61, 103): the timestep -1, cut off.
    return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(int)[:steps] - 1


def _data(config: dict, alpha, sigma) -> dict[str, np.ndarray]:
    """The weights of the predicted data, where noisy_latents = alpha * data + sigma * noise."""
    if config["prediction_type"] == "v_prediction":  # v = alpha * noise - sigma * data
        return {"data_latents": alpha, "data_noise_pred": -sigma}
    if not alpha.all():
        raise ValueError(
            "rescale_betas_zero_snr starts from pure noise: it needs prediction_type 'v_prediction'"
        )
    return {"data_latents": 1 / alpha, "data_noise_pred": -sigma / alpha}


def _ddim(config: dict, alphas_cumprod: np.ndarray, steps: int) -> tuple[np.ndarray, dict]:
    """latents = alpha' * data + sigma' * noise, at the timestep T // steps below, whatever the spacing is."""
    train_steps = len(alphas_cumprod)
    stride = train_steps // max(1, min(steps, train_steps))
    timesteps = {
        "leading": np.arange(steps)[::-1] * stride + config["steps_offset"],
        "linspace": np.linspace(0, train_steps - 1, steps).round()[::-1].astype(int),
        "trailing": _trailing(train_steps, steps),
    }[config["timestep_spacing"]]
    timesteps = _check(timesteps, train_steps)
    last = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0]
    after = np.where(timesteps >= stride, alphas_cumprod[np.maximum(timesteps - stride, 0)], last)
    alpha, sigma = np.sqrt(alphas_cumprod[timesteps]), np.sqrt(1 - alphas_cumprod[timesteps])
    # The noise is the one predicted, not the one that the clipped data would imply, as in diffusers.
    v = config["prediction_type"] == "v_prediction"  # noise = sigma * latents + alpha * v
    return timesteps, {
        **_data(config, alpha, sigma),
        "limit": config["clip_sample_range"] if config["clip_sample"] else np.inf,
        "latents": np.sqrt(1 - after) * (sigma if v else 0.0),
        "noise_pred": np.sqrt(1 - after) * (alpha if v else 1.0),
        "data": np.sqrt(after),
        "data_before": 0.0,
    }


def _dpm_solver(config: dict, alphas_cumprod: np.ndarray, steps: int) -> tuple[np.ndarray, dict]:
    """Second order in the log signal-to-noise ratio lambda, first order in the first and the last step:

    latents = sigma' / sigma * latents + (alpha' - sigma' * alpha / sigma) * ((1 + r) * data - r * data_before)
    r = (lambda' - lambda) / (2 * (lambda - lambda_before)), or 0 for the first order.
    """
    train_steps = len(alphas_cumprod)
    timesteps = {
        "leading": np.arange(1, steps + 1)[::-1] * (train_steps // (steps + 1)) + config["steps_offset"],
        "linspace": np.linspace(0, train_steps - 1, steps + 1).round()[:0:-1].astype(int),
        "trailing": _trailing(train_steps, steps),
    }[config["timestep_spacing"]]
    timesteps = _check(timesteps, train_steps)
    if config["rescale_betas_zero_snr"]:
        alphas_cumprod = np.append(alphas_cumprod[:-1], 2.0**-24)  # diffusers': lambda stays finite
    here = alphas_cumprod[timesteps]
    alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
    alpha_after, sigma_after = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    step = np.diff(np.log(alpha / sigma))
    r = np.zeros(steps)
    r[1:-1] = step[1:] / (2 * step[:-1])  # the step to sigma 0 is infinite in lambda, so it is of first order
    weight = alpha_after - sigma_after * alpha / sigma
    return timesteps, {
        **_data(config, alpha, sigma),
        "limit": np.inf,
        "latents": sigma_after / sigma,
        "noise_pred": 0.0,
        "data": (1 + r) * weight,
        "data_before": -r * weight,
    }


_OFF = (False, None)
_DEFAULTS = {
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
_SUPPORTED = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "thresholding": _OFF,
}
# kind: (weights, the defaults of diffusers' class, the values of its options that the weights are right for)
_SAMPLERS: dict[str, tuple[Callable, dict, dict]] = {
    "dpmsolver++": (
        _dpm_solver,
        {**_DEFAULTS, "timestep_spacing": "linspace"},
        {
            **_SUPPORTED,
            "solver_order": (2,),
            "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads other schedulers' values as ours
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
            "lower_order_final": (True, False),  # no difference at order 2 with a last sigma of zero
            "final_sigmas_type": ("zero",),
            "lambda_min_clipped": (-np.inf,),
            "variance_type": (None,),
            "use_karras_sigmas": _OFF,
            "use_exponential_sigmas": _OFF,
            "use_beta_sigmas": _OFF,
            "use_lu_lambdas": _OFF,
            "use_flow_sigmas": _OFF,
        },
    ),
    "ddim": (
        _ddim,
        {
            **_DEFAULTS,
            "timestep_spacing": "leading",
            "set_alpha_to_one": True,
            "clip_sample": True,
            "clip_sample_range": 1.0,
        },
        _SUPPORTED,
    ),
}


def solve(noise_pred_fn: Callable, latents: jax.Array, plan: Plan) -> jax.Array:
    """Follows `plan` from noise to data: float32[...] -> float32[...]. One `lax.scan`, traceable.

    noise_pred_fn: (latents float32[...], timestep int32[]) -> float[...], the UNet's output (noise or v).
    """

    def step(carry, now: Plan):
        latents, data_before = carry
        noise_pred = noise_pred_fn(latents, now.timesteps).astype(jnp.float32)
        data = jnp.clip(now.data_latents * latents + now.data_noise_pred * noise_pred, -now.limit, now.limit)
        latents = (
            now.latents * latents
            + now.noise_pred * noise_pred
            + now.data * data
            + now.data_before * data_before
        )
        return (latents, data), None

    latents = jnp.asarray(latents, jnp.float32)
    (latents, _), _ = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), jax.tree.map(jnp.asarray, plan))
    return latents


@functools.partial(jax.jit, static_argnames=("unet", "vae", "text_encoder"))
def text_to_image(
    unet: nn.Module,
    vae: nn.Module,
    text_encoder: nn.Module,
    params: dict,
    input_ids: jax.Array,
    negative_ids: jax.Array,
    latents: jax.Array,
    plan: Plan,
    guidance: jax.Array | float,
) -> jax.Array:
    """Images float32[b, H, W, 3] in [0, 1] of prompts int32[b, l], by classifier-free guidance.

        noise_pred = negative + guidance * (positive - negative)        Ho & Salimans 2022, arXiv:2207.12598

    One program, compiled once per modules, shapes and number of steps; `plan` and `guidance` are traced.

    unet, vae, text_encoder: the modules, static. params: {"unet", "vae", "text_encoder"}, best on the device
    already. negative_ids: int32[b, l], the token ids of what not to draw, or of "". latents: float32[b, h, w, 4],
    unit Gaussian. guidance: 1 is none, 7.5 is usual. Values below 1 follow the equation too, where diffusers
    ignores `negative_ids`.
    """
    ids = jnp.concatenate([negative_ids, input_ids])
    encoder_hidden_states = text_encoder.apply({"params": params["text_encoder"]}, ids)

    def guided(latents, timestep):
        both = jnp.concatenate([latents, latents])  # one call on a doubled batch
        noise_pred = unet.apply(
            {"params": params["unet"]}, both, jnp.full(len(both), timestep), encoder_hidden_states
        )
        negative, positive = jnp.split(noise_pred.astype(jnp.float32), 2)
        return negative + guidance * (positive - negative)

    latents = solve(guided, latents, plan)
    images = vae.apply({"params": params["vae"]}, latents / vae.config.scaling_factor, method="decode")
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
