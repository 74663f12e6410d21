"""Which timesteps a sampler visits, and the noise there: sigma, the ratio of noise to signal (Karras et al. 2022).

    noisy_latents = (data + sigma * noise) / sqrt(1 + sigma^2)

float64, from noise to data. What diffusers rounds to whole timesteps is rounded here.
"""

import numpy as np
from scipy import special

from flaxkd.diffusion import weights

RHO = 7.0  # of Karras et al. 2022, equation 5
BETA = 0.6  # both parameters in Lee et al. 2024, arXiv:2407.12173


def split(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(weight of the data, weight of the noise) in latents of unit variance."""
    alpha = 1 / np.sqrt(1 + sigma**2)
    return alpha, sigma * alpha


def of_training(config: dict, alphas_cumprod: np.ndarray) -> np.ndarray:
    """sigma at each training timestep, rising."""
    kept = weights.finite(config, alphas_cumprod)
    return np.sqrt((1 - kept) / kept)


# -- Timesteps -------------------------------------------------------------------------------------------------------


def spaced(config: dict, train_steps: int, steps: int) -> np.ndarray:
    """Timesteps from noise to data; those of "linspace" are not rounded."""
    timesteps = {
        "leading": np.arange(steps)[::-1] * (train_steps // steps) + config["steps_offset"],
        "linspace": np.linspace(0, train_steps - 1, steps)[::-1],
        "trailing": _trailing(train_steps, train_steps, steps),
    }[config["timestep_spacing"]]
    return _check(timesteps, train_steps)


def _multistep(config: dict, train_steps: int, last: int, steps: int) -> np.ndarray:
    """The same as diffusers' multistep solvers take them. last: of the timesteps, the noisiest has last - 1."""
    timesteps = {
        "leading": np.arange(1, steps + 1)[::-1] * (last // (steps + 1)) + config["steps_offset"],
        "linspace": np.linspace(0, last - 1, steps + 1).round()[:0:-1].astype(int),
        "trailing": _trailing(train_steps, last, steps),
    }[config["timestep_spacing"]]
    return _check(timesteps, train_steps)


def _trailing(train_steps: int, last: int, steps: int) -> np.ndarray:
    # For some numbers of steps (61, 103), rounding gives `arange` one value too many: timestep -1, cut off here.
    return np.round(np.arange(last, 0, -train_steps / steps)).astype(int)[:steps] - 1


def _check(timesteps: np.ndarray, train_steps: int) -> np.ndarray:
    if timesteps.max() >= train_steps or timesteps.min() < 0 or (np.diff(timesteps) >= 0).any():
        raise ValueError(
            f"{len(timesteps)} steps do not fit the {train_steps} training timesteps (they would run from "
            f"{timesteps[0]:g} to {timesteps[-1]:g} with repetitions or outside the range): take fewer steps"
        )
    return timesteps


# -- Sigmas ----------------------------------------------------------------------------------------------------------


def _karras(high: float, low: float, steps: int) -> np.ndarray:
    return np.linspace(high ** (1 / RHO), low ** (1 / RHO), steps) ** RHO


def _exponential(high: float, low: float, steps: int) -> np.ndarray:
    return np.exp(np.linspace(np.log(high), np.log(low), steps))


def _beta(high: float, low: float, steps: int) -> np.ndarray:
    return low + special.betaincinv(BETA, BETA, 1 - np.linspace(0, 1, steps)) * (high - low)


# {option of a scheduler_config.json: its sigmas from the highest to the lowest}
RAMPS = {
    "use_karras_sigmas": _karras,
    "use_lu_lambdas": _exponential,  # Lu et al. 2022, arXiv:2206.00927
    "use_exponential_sigmas": _exponential,
    "use_beta_sigmas": _beta,
}


def ramp(config: dict) -> str | None:
    """The option of RAMPS that is on, or None. Raises ValueError for several."""
    found = [name for name in RAMPS if config.get(name)]
    if len(found) > 1:
        raise ValueError(f"the scheduler configuration has {' and '.join(found)}: only one of them can be on")
    return found[0] if found else None


def _respaced(config: dict, name: str, high: float, low: float, steps: int) -> np.ndarray:
    """Between `high` and `low`, or the limits of the configuration."""
    if name != "use_lu_lambdas":  # which takes no limits
        high = high if config.get("sigma_max") is None else config["sigma_max"]
        low = low if config.get("sigma_min") is None else config["sigma_min"]
    if not 0 < low <= high:
        raise ValueError(f"sigma_min = {low:g} and sigma_max = {high:g}: they must be above 0, and in this order")
    return RAMPS[name](high, low, steps)


def timestep_of(sigma: np.ndarray, training: np.ndarray) -> np.ndarray:
    """The fractional timesteps of sigmas, by their logarithms. training: `single_precision`."""
    return np.interp(np.log(sigma), np.log(training), np.arange(len(training)))


def single_precision(config: dict, alphas_cumprod: np.ndarray) -> np.ndarray:
    """`of_training` in float32, as diffusers computes it: its rounding makes the first timestep 999, or cut to 998."""
    kept = np.float32(weights.finite(config, alphas_cumprod))
    return np.sqrt((1 - kept) / kept)


def single_step(config: dict, alphas_cumprod: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(timesteps, sigmas, sigma after each step) of Euler's kind: respaced between the sigmas of its timesteps."""
    training = of_training(config, alphas_cumprod)
    timesteps = spaced(config, len(training), steps)
    found = np.interp(timesteps, np.arange(len(training)), training)
    if name := ramp(config):
        found = _respaced(config, name, found[0], found[-1], steps)
        timesteps = timestep_of(found, single_precision(config, alphas_cumprod))
    last = training[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return timesteps, found, np.append(found[1:], last)


def multistep(config: dict, alphas_cumprod: np.ndarray, steps: int, *, own_last: bool) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, sigmas[steps + 1]) of DPM-Solver's kind: respaced between the first and last sigma of training.

    own_last: respaced sigmas that do not end at 0 end at their own lowest, not at that of training."""
    training = of_training(config, alphas_cumprod)
    lambdas = -np.log(training[::-1])
    last = len(training) - int(np.searchsorted(lambdas, config.get("lambda_min_clipped", -np.inf)))
    timesteps = _multistep(config, len(training), last, steps)
    lowest = training[0]
    if name := ramp(config):
        single = single_precision(config, alphas_cumprod)
        found = _respaced(config, name, float(single[-1]), float(single[0]), steps)
        timesteps = timestep_of(found, single)
        # As each class of diffusers does it: UniPC and DEIS, which end at their own sigma, round for all schedules.
        whole = own_last or config.get("beta_schedule") != "squaredcos_cap_v2"
        rounds = whole and name in ("use_karras_sigmas", "use_lu_lambdas")
        timesteps = timesteps.round() if rounds else np.trunc(timesteps)
        lowest = found[-1] if own_last else single[0]
    else:
        found = training[timesteps]
    return timesteps, np.append(found, lowest if config["final_sigmas_type"] == "sigma_min" else 0.0)
