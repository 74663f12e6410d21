"""Samplers that follow the ODE of Karras et al. 2022 (arXiv:2206.00364) in sigma: Euler, Heun, DPM2, LMS.

    d(x) / d(sigma) = noise predicted at (x, sigma),   where x = latents / alpha = data + sigma * noise

flaxkd keeps the latents at unit variance, as in all other samplers: the UNet takes them without scaling.
"""

import numpy as np

from flaxkd.diffusion import sigmas, weights

ORDER = 4  # of LMS, diffusers' default


def euler(config, alphas_cumprod, steps, begin, *, ancestral: bool = False) -> weights.Schedule:
    """A straight line from the latents to the predicted data, as far as the noise has to fall:

    x = data + down / sigma * (x - data) + up * noise,  up^2 + down^2 = sigma'^2, up = 0 unless ancestral
    """
    timesteps, here, after = (array[begin:] for array in sigmas.single_step(config, alphas_cumprod, steps))
    down = after**2 / here if ancestral else after
    (alpha, sigma), (alpha_after, _) = sigmas.split(here), sigmas.split(after)
    return weights.make(
        timesteps,
        _start(config, begin, alpha, sigma),
        (alpha, sigma),
        noise=alpha_after * np.sqrt(after**2 - down**2) if ancestral else None,
        **weights.data(config, alpha, sigma),
        latents=alpha_after * down / sigma,
        predictions=alpha_after * (1 - down / here),
    )


def lms(config, alphas_cumprod, steps, begin) -> weights.Schedule:
    """Adams-Bashforth's method for uneven steps: the polynomial through the last ORDER noises, integrated exactly."""
    timesteps, here, after = sigmas.single_step(config, alphas_cumprod, steps)
    change = np.zeros((steps, ORDER))
    for i in range(steps):
        known = here[i - min(i, ORDER - 1) : i + 1][::-1]
        integrals = [basis.integ() for basis in weights.lagrange(known)]
        change[i, : len(known)] = [integral(after[i]) - integral(here[i]) for integral in integrals]
    rows = timesteps[begin:], here[begin:], here[begin:], after[begin:]
    return _follow(config, begin, *rows, change[begin:])


def heun(config, alphas_cumprod, steps, begin) -> weights.Schedule:
    """Karras et al. 2022, algorithm 1: a step of Euler's, then again with the mean of the noises at both its ends."""
    timesteps, here, after = (array[begin:] for array in sigmas.single_step(config, alphas_cumprod, steps))
    trial = (after - here)[:, None] * [1.0, 0.0]
    again = (after - here)[:, None] * [0.5, -0.5]  # from where the trial led
    return _twice(config, begin, timesteps, here, after, after, np.append(timesteps[1:], 0.0), trial, again)


def dpm2(config, alphas_cumprod, steps, begin) -> weights.Schedule:
    """DPM-Solver-2 of Karras et al. 2022: the noise at the geometric mean of two sigmas leads from one to the other."""
    timesteps, here, after = (array[begin:] for array in sigmas.single_step(config, alphas_cumprod, steps))
    if sigmas.ramp(config) == "use_karras_sigmas":
        timesteps = timesteps.round()
    middle = np.sqrt(here * after)  # 0 at the end, where the trial is the step
    between = sigmas.timestep_of(np.maximum(middle, 1e-10), sigmas.single_precision(config, alphas_cumprod))
    trial = (middle - here)[:, None] * [1.0, 0.0]
    again = np.stack([after - here, here - middle], axis=1)
    return _twice(config, begin, timesteps, here, middle, after, between, trial, again)


def _twice(config, begin, timesteps, here, middle, after, between, trial, again) -> weights.Schedule:
    """Two calls a step: at `here`, then at `middle`, where the trial led, and from there to `after`. One at the end."""
    both = lambda first, second: np.stack([first, second], axis=1).reshape(2 * len(here), *first.shape[1:])[:-1]
    called, left = both(here, middle), both(middle, after)
    return _follow(config, begin, both(timesteps, between), called, called, left, both(trial, again))


def _follow(config, begin, timesteps, called, here, after, change) -> weights.Schedule:
    """x = x + change @ noises, newest first. called: sigma at the UNet's calls. here, after: sigma of the latents."""
    (alpha, sigma), (alpha_after, _) = sigmas.split(called), sigmas.split(after)
    return weights.make(
        timesteps,
        _start(config, begin, alpha, sigma),
        (alpha, sigma),
        **weights.noise(config, alpha, sigma),
        latents=alpha_after / sigmas.split(here)[0],
        predictions=alpha_after[:, None] * change,
    )


def _start(config: dict, begin: int | None, alpha, sigma) -> tuple[float, float]:
    pure = 1.0 if config["timestep_spacing"] == "leading" else sigma.max()  # diffusers' init_noise_sigma
    return weights.start(begin, alpha, sigma, pure)
