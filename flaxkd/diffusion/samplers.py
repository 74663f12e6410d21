"""Samplers as data: what diffusers' schedulers compute between calls of the UNet, computed once, in float64.

A `Schedule` holds arrays of weights. `sampling.solve` is the only loop, and knows no sampler by name: another sampler
is other arrays. To add one, write its function of weights and its row in `_SAMPLERS`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flaxkd import diffusion

PAST = 4  # earlier noise_preds that a step may use


class Schedule(NamedTuple):
    """The steps of a sampler; all fields but the first are float32[steps]. A step of `sampling.solve` is

    data    = clip(data_latents * latents + data_noise_pred * noise_pred, -limit, limit)
    latents = latents * latents + noise_pred * noise_pred + noise_preds_before @ noise_preds_before
              + data * data + data_before * data_before + noise * noise

    Each field weighs the array of its name. `data` is the predicted clean latents, `data_before` that of the step
    before, `noise_preds_before` the UNet's outputs in the last steps, newest first, and `noise` fresh noise.
    """

    start: np.ndarray  # [2]: the first latents are start[0] * clean latents + start[1] * noise
    timesteps: np.ndarray  # Euler's are fractional
    data_latents: np.ndarray
    data_noise_pred: np.ndarray
    limit: np.ndarray  # infinity: `data` is not clipped
    latents: np.ndarray
    noise_pred: np.ndarray
    noise_preds_before: np.ndarray  # [steps, PAST]
    data: np.ndarray
    data_before: np.ndarray
    noise: np.ndarray | None  # None: the sampler adds no noise between steps


def schedule(kind: str, scheduler_config: dict, steps: int, strength: float | None = None) -> Schedule:
    """The schedule of diffusers' scheduler with the same configuration, for `steps` inference steps.

    kind, and its class in diffusers, made by `from_config(scheduler_config)`:
        "dpmsolver++"      DPMSolverMultistepScheduler: 2M, Lu et al. 2022, arXiv:2211.01095, algorithm 2
        "ddim"             DDIMScheduler with eta 0, Song et al. 2020, arXiv:2010.02502, equation 12
        "pndm"             PNDMScheduler without Runge-Kutta, Liu et al. 2022, arXiv:2202.09778, equation 12; from
                           two steps on, it calls the UNet `steps` + 1 times, and the fields are as long
        "euler"            EulerDiscreteScheduler, Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn
        "euler_ancestral"  EulerAncestralDiscreteScheduler, the same with fresh noise in each step (k-diffusion)
    scheduler_config: a `scheduler_config.json`, written by any class. As in diffusers, a missing key takes the
    default of the class that reads it (`timestep_spacing` is "linspace" for "dpmsolver++" and "euler" but
    "leading" for the others, `skip_prk_steps` is false), and keys of other schedulers are ignored.
    strength: None starts from noise alone, text to image. A number in (0, 1] is diffusers' strength for image to
    image: only the last int(steps * strength) steps remain, and start from noisy latents of the image.

    Raises ValueError for an unknown kind, for options with which diffusers would draw something else (all are
    listed), for a number of steps that the training timesteps cannot hold, and for a strength that leaves no step.
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
    alphas_cumprod = diffusion.alphas_cumprod(config)
    if not 1 <= steps <= len(alphas_cumprod):
        raise ValueError(f"steps = {steps}: a sampler takes 1 to {len(alphas_cumprod)} steps")
    return weigh(config, alphas_cumprod, steps, None if strength is None else _begin(steps, strength))


def _begin(steps: int, strength: float) -> int:
    """The number of initial steps that image to image skips."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength = {strength}: the share of the steps to take is above 0 and at most 1")
    if (taken := int(steps * strength)) < 1:
        least = math.ceil(1 / strength)
        raise ValueError(f"strength = {strength} leaves none of {steps} steps: raise it, or take {least}")
    return steps - taken


def _schedule(timesteps, start, **weights) -> Schedule:
    """The fields as float32[steps]. Missing ones are 0, and their arrays drop out."""
    fields = dict.fromkeys(Schedule._fields[2:], 0.0) | {"limit": np.inf, "noise": None} | weights
    shape = lambda name: (len(timesteps), PAST) if name == "noise_preds_before" else (len(timesteps),)
    spread = lambda name, x: None if x is None else np.float32(np.broadcast_to(x, shape(name)))
    fields = {name: spread(name, x) for name, x in fields.items()}
    return Schedule(start=np.float32(start), timesteps=np.float32(timesteps), **fields)


def _start(begin: int | None, alpha, sigma, pure=1.0) -> tuple[float, float]:
    """The start: noise alone, with standard deviation `pure`, or the first noisy latents of a shortened schedule."""
    return (0.0, pure) if begin is None else (alpha[0], sigma[0])


def _check(timesteps: np.ndarray, train_steps: int) -> np.ndarray:
    if timesteps.max() >= train_steps or timesteps.min() < 0 or (np.diff(timesteps) >= 0).any():
        raise ValueError(
            f"{len(timesteps)} steps do not fit the {train_steps} training timesteps (they would run from "
            f"{timesteps[0]:g} to {timesteps[-1]:g} with repetitions or outside the range): take fewer steps"
        )
    return timesteps


def _trailing(train_steps: int, steps: int) -> np.ndarray:
    # For some numbers of steps (61, 103), rounding gives `arange` one value too many: timestep -1, cut off here.
    return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(int)[:steps] - 1


def _spaced(config: dict, train_steps: int, steps: int) -> np.ndarray:
    """Timesteps from noise to data; those of "linspace" are not rounded."""
    timesteps = {
        "leading": np.arange(steps)[::-1] * (train_steps // steps) + config["steps_offset"],
        "linspace": np.linspace(0, train_steps - 1, steps)[::-1],
        "trailing": _trailing(train_steps, steps),
    }[config["timestep_spacing"]]
    return _check(timesteps, train_steps)


def _below(config: dict, alphas_cumprod: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """alphas_cumprod at timesteps. The last timestep may be below 0, at the data."""
    last = 1.0 if config["set_alpha_to_one"] else alphas_cumprod[0]
    return np.where(timesteps >= 0, alphas_cumprod[np.maximum(timesteps, 0)], last)


def _finite(config: dict, alphas_cumprod: np.ndarray) -> np.ndarray:
    """Keeps the ratio of noise to signal finite with `rescale_betas_zero_snr`, as diffusers does."""
    return np.append(alphas_cumprod[:-1], 2.0**-24) if config["rescale_betas_zero_snr"] else alphas_cumprod


def _data(config: dict, alpha, sigma) -> dict[str, np.ndarray]:
    """The weights of the predicted data, where noisy_latents = alpha * data + sigma * noise."""
    if config["prediction_type"] == "v_prediction":  # v = alpha * noise - sigma * data
        return {"data_latents": alpha, "data_noise_pred": -sigma}
    if not alpha.all():
        raise ValueError("rescale_betas_zero_snr needs prediction_type 'v_prediction': it starts at no signal")
    return {"data_latents": 1 / alpha, "data_noise_pred": -sigma / alpha}


def _ddim(config, alphas_cumprod, steps, begin) -> Schedule:
    """latents = alpha' * data + sigma' * noise, at the timestep T // steps lower, whatever the spacing."""
    stride = len(alphas_cumprod) // steps
    timesteps = _spaced(config, len(alphas_cumprod), steps).round().astype(int)[begin:]
    after = _below(config, alphas_cumprod, timesteps - stride)
    alpha, sigma = np.sqrt(alphas_cumprod[timesteps]), np.sqrt(1 - alphas_cumprod[timesteps])
    # As in diffusers, the noise is the predicted one, not the one implied by the clipped data.
    v = config["prediction_type"] == "v_prediction"  # noise = sigma * latents + alpha * v
    return _schedule(
        timesteps,
        _start(begin, alpha, sigma),
        **_data(config, alpha, sigma),
        limit=config["clip_sample_range"] if config["clip_sample"] else np.inf,
        latents=np.sqrt(1 - after) * (sigma if v else 0.0),
        noise_pred=np.sqrt(1 - after) * (alpha if v else 1.0),
        data=np.sqrt(after),
    )


# Weights of the noise_pred of this step and of those before, by step number. The second step repeats the first one,
# with the mean of both its ends. Its own noise_pred is not remembered: later steps skip over it.
_PLMS = np.array([
    [24, 0, 0, 0, 0], [12, 12, 0, 0, 0], [36, 0, -12, 0, 0], [46, -32, 0, 10, 0], [55, -59, 37, 0, -9],
    [55, -59, 37, -9, 0],  # and from here on
]) / 24  # fmt: skip


def _pndm(config, alphas_cumprod, steps, begin) -> Schedule:
    """DDIM's step with a noise_pred extrapolated from the last four:

    latents = alpha' / alpha * latents + (sigma' - alpha' * sigma / alpha) * (noise_preds mixed by _PLMS)
    """
    stride = len(alphas_cumprod) // steps
    timesteps = _spaced(config, len(alphas_cumprod), steps).round().astype(int)
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
    weights = dict(latents=latents, noise_pred=mixed[:, 0], noise_preds_before=mixed[:, 1:])
    return _schedule(timesteps, _start(begin, alpha, sigma), **weights)


def _dpm_solver(config, alphas_cumprod, steps, begin) -> Schedule:
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
    timesteps = _check(timesteps, train_steps)[begin:]
    here = _finite(config, alphas_cumprod)[timesteps]
    alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
    alpha_after, sigma_after = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    step = np.diff(np.log(alpha / sigma))
    r = np.zeros(len(timesteps))
    r[1:-1] = step[1:] / (2 * step[:-1])  # the step to sigma 0 is infinite in lambda, hence of first order
    weight = alpha_after - sigma_after * alpha / sigma
    return _schedule(
        timesteps,
        _start(begin, alpha, sigma),
        **_data(config, alpha, sigma),
        latents=sigma_after / sigma,
        data=(1 + r) * weight,
        data_before=-r * weight,
    )


def _euler(config, alphas_cumprod, steps, begin, *, ancestral=False) -> Schedule:
    """A straight line from the latents to the predicted data, as far as the noise has to fall.

    Here diffusers uses latents / alpha. Their noise has the standard deviation ratio = sigma / alpha:

    latents = data + down / ratio * (latents - data) + up * noise,  up^2 + down^2 = ratio'^2

    flaxkd keeps the latents at unit variance, as in all other samplers: the UNet takes them without scaling."""
    timesteps = _spaced(config, len(alphas_cumprod), steps)[begin:]
    finite = _finite(config, alphas_cumprod)
    ratio = np.interp(timesteps, np.arange(len(finite)), np.sqrt((1 - finite) / finite))
    after = np.append(ratio[1:], 0.0)
    down = after**2 / ratio if ancestral else after
    alpha, alpha_after = 1 / np.sqrt(1 + ratio**2), 1 / np.sqrt(1 + after**2)
    sigma = ratio * alpha
    pure = 1.0 if config["timestep_spacing"] == "leading" else sigma[0]  # diffusers' init_noise_sigma
    return _schedule(
        timesteps,
        _start(begin, alpha, sigma, pure),
        noise=alpha_after * np.sqrt(after**2 - down**2) if ancestral else None,
        **_data(config, alpha, sigma),
        latents=alpha_after * down / sigma,
        data=alpha_after * (1 - down / ratio),
    )


_OFF = (False, None)
_DEFAULTS = {"prediction_type": "epsilon", "steps_offset": 0, "rescale_betas_zero_snr": False}
_LINSPACE = _DEFAULTS | {"timestep_spacing": "linspace"}
_LEADING = _DEFAULTS | {"timestep_spacing": "leading"}
_SUPPORTED = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
_SIGMAS = {"final_sigmas_type": ("zero",)}
_SIGMAS |= dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), _OFF)
# kind: (weights, the defaults of diffusers' class, the option values for which the weights are right)
_SAMPLERS: dict[str, tuple[Callable, dict, dict]] = {
    "dpmsolver++": (
        _dpm_solver,
        _LINSPACE,
        {
            **_SUPPORTED,
            **dict.fromkeys(("thresholding", "use_lu_lambdas", "use_flow_sigmas"), _OFF),
            "solver_order": (2,),
            **_SIGMAS,
            "algorithm_type": ("dpmsolver++", "deis"),  # diffusers maps other schedulers' values to ours
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
            "lower_order_final": (True, False),  # the same at order 2 with a last sigma of zero
            "lambda_min_clipped": (-np.inf,),
            "variance_type": (None,),
        },
    ),
    "ddim": (
        _ddim,
        _LEADING | {"set_alpha_to_one": True, "clip_sample": True, "clip_sample_range": 1.0},
        _SUPPORTED | {"thresholding": _OFF},
    ),
    "pndm": (
        _pndm,
        _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        # diffusers' class does not rescale: it would draw with betas the model was not trained on
        _SUPPORTED | {"skip_prk_steps": (True,), "rescale_betas_zero_snr": _OFF},
    ),
    "euler": (
        _euler,
        _LINSPACE,
        _SUPPORTED | _SIGMAS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    ),
    "euler_ancestral": (functools.partial(_euler, ancestral=True), _LINSPACE, _SUPPORTED),
}
KINDS = tuple(_SAMPLERS)
