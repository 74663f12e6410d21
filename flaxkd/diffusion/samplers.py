"""THE TABLE of samplers: what diffusers' schedulers compute between calls of the UNet, computed once, in float64.

A `Schedule` holds arrays of weights. `sampling.solve` is the only loop, and knows no sampler by name: another sampler
is other arrays. To add one, write its function of weights (ddim.py, karras.py or dpm_solver.py) and its row here.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from flaxkd import diffusion
from flaxkd.diffusion import consistency, ddim, dpm_solver, karras, sigmas
from flaxkd.diffusion.schedule import MOST_TIMESTEPS
from flaxkd.diffusion.weights import PAST, Schedule

__all__ = ["DEFAULT", "KINDS", "OWN_STEPS", "PAST", "SAMPLERS", "STEPS", "Schedule"]
__all__ += ["few_steps", "most_guidance", "name_of", "own", "schedule", "usual_steps"]

DEFAULT = "dpmsolver++"  # of a model whose own sampler is not in the table
STEPS = 25  # of all commands, with a sampler that does not have its own number
# In the scheduler_config.json of a model that has learnt a number of steps. diffusers ignores names with an underscore.
OWN_STEPS = "_num_inference_steps"
BORNE = 2.0  # the most guidance on top of the one that a model of few steps has learnt


class Sampler(NamedTuple):
    """A row: kind of sampler, and its class in diffusers."""

    weights: Callable[[dict, np.ndarray, int, int | None], Schedule]  # (config, alphas_cumprod, steps, begin)
    scheduler: str  # diffusers' class
    defaults: dict[str, Any]  # of the options that the class reads, besides those of the betas
    supported: dict[str, tuple]  # the values for which the weights are right, of options where not all are
    fixed: Mapping[str, Any] = MappingProxyType({})  # options that this row sets, whatever the file says
    steps: int = STEPS  # that are usual
    guidance: float = math.inf  # the most that its models bear


def schedule(kind: str | None, scheduler_config: dict, steps: int, strength: float | None = None) -> Schedule:
    """The schedule of diffusers' scheduler with the same configuration, for `steps` inference steps.

    kind, and its class in diffusers, made by `from_config(scheduler_config)`:
        "dpmsolver++"      DPMSolverMultistepScheduler: Lu et al. 2022, arXiv:2211.01095, algorithm 2; `solver_order`,
                           `algorithm_type` and `solver_type` of the configuration are followed
        "sde-dpmsolver++"  the same with algorithm_type "sde-dpmsolver++": with fresh noise in each step
        "unipc"            UniPCMultistepScheduler, Zhao et al. 2023, arXiv:2302.04867
        "deis"             DEISMultistepScheduler, Zhang & Chen 2022, arXiv:2204.13902
        "ddim"             DDIMScheduler with eta 0, Song et al. 2020, arXiv:2010.02502, equation 12
        "ddpm"             DDPMScheduler, Ho et al. 2020, arXiv:2006.11239, with fresh noise in each step
        "pndm"             PNDMScheduler without Runge-Kutta, Liu et al. 2022, arXiv:2202.09778, equation 12; from
                           two steps on, it calls the UNet `steps` + 1 times, and the fields are as long
        "euler"            EulerDiscreteScheduler, Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn
        "euler_ancestral"  EulerAncestralDiscreteScheduler, the same with fresh noise in each step (k-diffusion)
        "heun"             HeunDiscreteScheduler, Karras et al. 2022, algorithm 1; 2 * `steps` - 1 calls
        "dpm2"             KDPM2DiscreteScheduler, DPM-Solver-2 of Karras et al. 2022; 2 * `steps` - 1 calls
        "lms"              LMSDiscreteScheduler of order 4 (k-diffusion)
        "lcm"              LCMScheduler, for a model trained to draw in few steps; up to `original_inference_steps`
        None               that of the configuration's own class: see `own`
    A suffix spaces the sigmas: "dpmsolver++:karras", ":exponential", ":beta" or ":lu", for samplers that can; without
    one, the configuration says (`use_karras_sigmas` and so on).
    scheduler_config: a `scheduler_config.json`, written by any class. As in diffusers, a missing key takes the
    default of the class that reads it (`timestep_spacing` is "linspace" for most but "leading" for "ddim", "ddpm" and
    "pndm", `skip_prk_steps` is false), and keys of other schedulers are ignored.
    strength: None starts from noise alone, text to image. A number in (0, 1] is diffusers' strength for image to
    image: only the last int(steps * strength) steps remain, and start from noisy latents of the image.

    Raises ValueError for an unknown kind, for options with which diffusers would draw something else (all are
    listed, and the samplers that can follow them), for a number of steps that the training timesteps cannot hold, and
    for a strength that leaves no step.
    """
    kind = own(scheduler_config) if kind is None else name_of(kind)
    try:
        return _schedule(kind, scheduler_config, steps, strength)
    except _Unsupported as error:
        able = _able(scheduler_config)
        raise ValueError(f"{error}. Samplers that can draw with it: {', '.join(able) or 'none'}") from None


class _Unsupported(ValueError):
    """A sampler that cannot follow a scheduler configuration."""


def _schedule(kind: str, scheduler_config: dict, steps: int, strength: float | None) -> Schedule:
    name, _, spacing = kind.partition(":")
    row = SAMPLERS[name]
    fixed = {**row.fixed} | ({option: option == SPACINGS[spacing] for option in sigmas.RAMPS} if spacing else {})
    known = row.defaults.keys() | _BETAS
    config = row.defaults | {key: value for key, value in scheduler_config.items() if key in known} | fixed
    wrong = [
        f"{name} = {config[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in row.supported.items()
        if config[name] not in values
    ]
    wrong += [
        f"{name} = {config[name]!r} (supported: {_KINDS[type(default)][0]})"
        for name, default in row.defaults.items()
        if name not in row.supported and not _KINDS[type(default)][1](config[name])
    ]
    if wrong:
        raise _Unsupported(f"{kind} does not support this scheduler configuration: {'; '.join(wrong)}")
    alphas_cumprod = diffusion.alphas_cumprod(config)
    if not 1 <= steps <= len(alphas_cumprod):
        raise ValueError(f"steps = {steps}: a sampler takes 1 to {len(alphas_cumprod)} steps")
    begin = None if strength is None else _begin(steps, strength)
    try:
        return row.weights(config, alphas_cumprod, steps, begin)
    except dpm_solver.Unsolvable as error:
        raise _Unsupported(f"{kind} does not support this scheduler configuration: {error}") from None


def name_of(kind: str) -> str:
    """`kind`, if it is a sampler's name, with or without a suffix. Raises ValueError."""
    name, colon, spacing = kind.partition(":")
    if name not in SAMPLERS:
        raise ValueError(f"sampler {kind!r} is unknown (known: {', '.join(KINDS)})")
    able = [suffix for suffix, option in SPACINGS.items() if option in SAMPLERS[name].defaults]
    if colon and spacing not in able:
        known = ", ".join(f"{name}:{suffix}" for suffix in able) or f"{name} without a suffix"
        raise ValueError(f"sampler {kind!r} is unknown (known: {known})")
    return kind


def usual_steps(kind: str | None, scheduler_config: dict) -> int:
    """The steps that a sampler takes unless told otherwise. kind: None for the configuration's own.

    Raises ValueError for a configuration with an own number that is none."""
    if (learnt := _learnt(kind, scheduler_config)) is not None:
        return learnt
    kind = name_of(kind) if kind else _written(scheduler_config)[1]
    return SAMPLERS[kind.partition(":")[0]].steps if kind else STEPS


def few_steps(scheduler_config: dict) -> int | None:
    """The number of steps that a model of few steps has learnt to take; None for a model of any number of steps."""
    steps = usual_steps(None, scheduler_config)
    return steps if steps < STEPS or _learnt(None, scheduler_config) is not None else None


def most_guidance(kind: str, scheduler_config: dict) -> float:
    """The most guidance that a model bears with this sampler."""
    return SAMPLERS[kind.partition(":")[0]].guidance if _learnt(kind, scheduler_config) is None else BORNE


def _learnt(kind: str | None, scheduler_config: dict) -> int | None:
    """The number of steps that a model has learnt to take with its own sampler; None with others, or without one."""
    steps = scheduler_config.get(OWN_STEPS)
    if steps is None or kind not in (None, _written(scheduler_config)[1]):
        return None
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise ValueError(f"{OWN_STEPS} = {steps!r} in scheduler_config.json must be a whole number of at least 1")
    return steps


def own(scheduler_config: dict) -> str:
    """The kind of the class that wrote a `scheduler_config.json`; DEFAULT if it names none.

    Raises ValueError for a class outside the table, with the samplers that can draw with its configuration."""
    written, found = _written(scheduler_config)
    if found is None:
        able = ", ".join(_able(scheduler_config)) or "none"
        raise ValueError(
            f"the sampler of the model's scheduler_config.json, {str(written)[:80]}, is not supported. "
            f"Samplers that can draw with it: {able}"
        )
    return found


def _written(scheduler_config: dict) -> tuple[str | None, str | None]:
    """(the class that wrote a `scheduler_config.json`, its kind; None outside the table)."""
    written = scheduler_config.get("_class_name")
    written = written[-1] if isinstance(written, list) and written else written
    if written is None:
        return None, DEFAULT
    return written, next((kind for kind, row in SAMPLERS.items() if row.scheduler == written), None)


def _able(scheduler_config: dict) -> list[str]:
    """The kinds that can follow a configuration."""
    found = []
    for kind in KINDS:
        try:
            _schedule(kind, scheduler_config, 2, None)
            found.append(kind)
        except ValueError:
            pass
    return found


def _begin(steps: int, strength: float) -> int:
    """The number of initial steps that image to image skips."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength = {strength}: the share of the steps to take is above 0 and at most 1")
    if (taken := int(steps * strength)) < 1:
        least = math.ceil(1 / strength)
        raise ValueError(f"strength = {strength} leaves none of {steps} steps: raise it, or take {least}")
    return steps - taken


_number = lambda x: type(x) in (int, float) and x == x  # NaN is not
# {type of a default: (what a value may be, in words, and whether it is that)}
_KINDS = {
    bool: ("true or false", lambda x: x in (False, True, None)),
    int: ("a whole number", lambda x: type(x) is int and abs(x) <= MOST_TIMESTEPS),
    float: ("a number", _number),
    str: ("a text", lambda x: isinstance(x, str)),
    tuple: ("whole numbers", lambda x: isinstance(x, list | tuple) and all(type(each) is int for each in x)),
    type(None): ("a number or null", lambda x: x is None or _number(x)),
}
_OFF = (False, None)
_BETAS = {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas"}
_DEFAULTS = {"prediction_type": "epsilon", "steps_offset": 0, "rescale_betas_zero_snr": False}
_LINSPACE = _DEFAULTS | {"timestep_spacing": "linspace"}
_LEADING = _DEFAULTS | {"timestep_spacing": "leading"}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}
_SUPPORTED = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
# diffusers' class does not rescale: it would draw with betas the model was not trained on
_UNSCALED = _SUPPORTED | {"rescale_betas_zero_snr": _OFF}
_RAMPS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_RAMPS |= {"sigma_min": None, "sigma_max": None}
_KARRAS_DEFAULTS = _LINSPACE | _RAMPS | {"beta_start": 0.00085, "beta_end": 0.012}  # of Heun's and DPM2's class
_MULTISTEP = _LINSPACE | _RAMPS | {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_MULTISTEP |= {"thresholding": False, "use_flow_sigmas": False}
_SOLVED = {"thresholding": _OFF, "use_flow_sigmas": _OFF, "solver_order": (1, 2, 3)}
_ENDS = {"final_sigmas_type": ("zero", "sigma_min")}
# Names of other classes' solvers, which diffusers takes for a class's own
_SOLVERS = {"solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")}
_DPM_SOLVER = Sampler(
    dpm_solver.dpm_solver,
    "DPMSolverMultistepScheduler",
    _MULTISTEP
    | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "use_lu_lambdas": False}
    | {"lambda_min_clipped": -np.inf, "variance_type": None},
    _SUPPORTED
    | _SOLVED
    | _ENDS
    | _SOLVERS
    | {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    },
)
SAMPLERS = {
    "dpmsolver++": _DPM_SOLVER,
    "sde-dpmsolver++": _DPM_SOLVER._replace(fixed={"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler(
        dpm_solver.unipc,
        "UniPCMultistepScheduler",
        _MULTISTEP | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": (), "solver_p": None},
        _SUPPORTED | _SOLVED | _ENDS | _SOLVERS | {"solver_p": (None,)},
    ),
    "deis": Sampler(
        dpm_solver.deis,
        "DEISMultistepScheduler",
        _MULTISTEP | {"algorithm_type": "deis", "solver_type": "logrho"},
        _UNSCALED | _SOLVED | _SOLVERS | {"algorithm_type": ("deis", "dpmsolver", "dpmsolver++")},
    ),
    "ddim": Sampler(
        ddim.ddim,
        "DDIMScheduler",
        _LEADING | _CLIPPED | {"set_alpha_to_one": True},
        _SUPPORTED | {"thresholding": _OFF},
    ),
    "ddpm": Sampler(
        ddim.ddpm,
        "DDPMScheduler",
        _LEADING | _CLIPPED | {"variance_type": "fixed_small"},
        _SUPPORTED | {"thresholding": _OFF, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None)},
    ),
    "pndm": Sampler(
        ddim.pndm,
        "PNDMScheduler",
        _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        _UNSCALED | {"skip_prk_steps": (True,)},
    ),
    "euler": Sampler(
        karras.euler,
        "EulerDiscreteScheduler",
        _LINSPACE | _RAMPS | {"final_sigmas_type": "zero", "interpolation_type": "linear", "timestep_type": "discrete"},
        _SUPPORTED | _ENDS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    ),
    "euler_ancestral": Sampler(
        functools.partial(karras.euler, ancestral=True), "EulerAncestralDiscreteScheduler", _LINSPACE, _SUPPORTED
    ),
    "heun": Sampler(
        karras.heun,
        "HeunDiscreteScheduler",
        _KARRAS_DEFAULTS | {"clip_sample": False},
        _UNSCALED | {"clip_sample": _OFF},
    ),
    "dpm2": Sampler(karras.dpm2, "KDPM2DiscreteScheduler", _KARRAS_DEFAULTS, _UNSCALED),
    "lms": Sampler(
        karras.lms, "LMSDiscreteScheduler", _LINSPACE | _RAMPS, _UNSCALED | {"sigma_min": (None,), "sigma_max": (None,)}
    ),
    "lcm": Sampler(
        consistency.lcm,
        "LCMScheduler",
        _DEFAULTS
        | _CLIPPED
        | {"clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0}
        | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"prediction_type": _SUPPORTED["prediction_type"], "thresholding": _OFF},
        steps=4,
        guidance=BORNE,
    ),
}
KINDS = tuple(SAMPLERS)
_FEW = [f"{row.steps} with {kind}" for kind, row in SAMPLERS.items() if row.steps != STEPS]
USUAL = f"of the sampler; default: {STEPS}, {', '.join(_FEW)}"  # help of a flag
SPACINGS = {name.split("_")[1]: name for name in sigmas.RAMPS}  # {"karras": "use_karras_sigmas", ...}
