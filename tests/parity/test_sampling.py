"""Samplers are those of diffusers, with and without a picture to begin with."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd.diffusion import samplers, sampling
from tests.diffusion.stand_ins import (
    CONFIGS,
    GAIN,
    KINDS,
    LATENTS,
    LEADING,
    NEGATIVE,
    NOISE,
    OPTIONS,
    PARAMS,
    POSITIVE,
    STAND_INS,
    TABLE,
    model,
    noise_of,
    solve,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

ATOL_TIMESTEPS = 2e-3  # of fractional ones, which diffusers computes in float32
UNSCALED = ("pndm", "deis", "heun", "dpm2", "lms")  # see REFUSED of diffusion/test_sampling.py
REFUSED_CONFIGS = {("pndm", "defaults"), ("heun", "clipped_v"), *((kind, "zero_snr") for kind in UNSCALED)}
CASES = [(kind, config) for kind in KINDS for config in CONFIGS if (kind, config) not in REFUSED_CONFIGS]
# An option is tried where a class has it: only there does it change anything.
TRIED = [
    (kind, option)
    for kind in KINDS
    for option, values in OPTIONS.items()
    if values.keys() - {"prediction_type", "timestep_spacing", "final_sigmas_type"}
    <= samplers.SAMPLERS[kind].defaults.keys()
    and not (kind == "sde-dpmsolver++" and "algorithm_type" in values)
    and not (kind == "deis" and "sde" in values.get("algorithm_type", ""))
    and not (kind == "lms" and "sigma_min" in values)
]


def diffusers_scheduler(kind, config, steps):
    row = samplers.SAMPLERS[kind]
    scheduler = getattr(diffusers, row.scheduler).from_config(config | row.fixed)
    scheduler.set_timesteps(steps)
    return scheduler


def diffusers_solve(scheduler, noise_pred_fn, latents, begin=0, kept=None):
    """The loop of diffusers' pipelines, on latents that `begin` or init_noise_sigma has been applied to already.

    kept: (image_latents, noise, mask) of its inpainting."""
    name, drawn = type(scheduler).__module__, iter(NOISE)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(sys.modules[name], "randn_tensor"):
            patch.setattr(f"{name}.randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn)))
        timesteps = scheduler.timesteps[begin:]
        for i, t in enumerate(timesteps):
            noise_pred = noise_pred_fn(scheduler.scale_model_input(latents, t), t)
            latents = scheduler.step(noise_pred, t, latents).prev_sample
            if kept:
                image_latents, noise, mask = kept
                if i < len(timesteps) - 1:
                    image_latents = scheduler.add_noise(image_latents, noise, timesteps[i + 1 : i + 2])
                latents = (1 - mask) * image_latents + mask * latents
    return latents.numpy()


@pytest.mark.parametrize(
    ("kind", "config", "steps"),
    [(kind, config, steps) for i, (kind, config) in enumerate(CASES) for steps in ((5, 1), (25,), (2,))[i % 3]],
)
def test_equals_diffusers(kind, config, steps):
    scheduler = diffusers_scheduler(kind, CONFIGS[config], steps)
    schedule = samplers.schedule(kind, CONFIGS[config], steps)
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps, atol=ATOL_TIMESTEPS, rtol=1e-4)
    latents = torch.from_numpy(LATENTS) * scheduler.init_noise_sigma
    expected = diffusers_solve(scheduler, functools.partial(model, torch), latents)
    assert schedule.start[0] == 0
    # Without signal at the start, diffusers' Euler has latents as large as 4096, and so its float32 errors are.
    atol = 1e-3 if scheduler.init_noise_sigma > 1000 else 1e-4
    drawn = solve(schedule.start[1] * LATENTS, schedule, noise_of(schedule))
    np.testing.assert_allclose(drawn, expected, atol=atol, rtol=1e-5)  # DPM2 in 2 steps has latents of 26


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_consistency_model_of_diffusers_in_any_number_of_steps(prediction_type):
    config = CONFIGS["sd15"] | {"prediction_type": prediction_type}
    for steps in range(1, 51):
        scheduler = diffusers_scheduler("lcm", config, steps)
        schedule = samplers.schedule("lcm", config, steps)
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps)
        if steps in (1, 2, 4, 8, 26, 50):  # each compiles
            expected = diffusers_solve(scheduler, functools.partial(model, torch), torch.from_numpy(LATENTS))
            drawn = solve(LATENTS, schedule, NOISE[:steps] if steps < 50 else np.append(NOISE, NOISE[:1], 0))
            # At timestep 999 the noise of `model` is 15 times as large in the data.
            np.testing.assert_allclose(drawn, expected, atol=1e-4 if prediction_type == "epsilon" else 1e-5)


@pytest.mark.parametrize("steps", [2, 16])
@pytest.mark.parametrize(("kind", "option"), TRIED)
def test_options_equal_diffusers(kind, option, steps):
    config = LEADING | OPTIONS[option]
    scheduler = diffusers_scheduler(kind, config, steps)
    schedule = samplers.schedule(kind, config, steps)
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps, atol=ATOL_TIMESTEPS, rtol=1e-4)
    expected = diffusers_solve(
        scheduler, functools.partial(model, torch), torch.from_numpy(LATENTS) * scheduler.init_noise_sigma
    )
    drawn = solve(schedule.start[1] * LATENTS, schedule, noise_of(schedule))
    np.testing.assert_allclose(drawn, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.85, 0.3])
@pytest.mark.parametrize("config", ["leading", "linspace", "sd21"])
@pytest.mark.parametrize("kind", KINDS)
def test_image_to_image_equals_diffusers(kind, config, strength):
    """As its pipeline does it: strength 0.85 leaves 5 of 6 steps, 0.3 leaves 1, of PNDM one more."""
    scheduler = diffusers_scheduler(kind, CONFIGS[config], 6)
    begin = (6 - int(6 * strength)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    data = np.tanh(LATENTS[::-1]).copy()
    first = scheduler.timesteps[begin : begin + 1].repeat(2)
    latents = scheduler.add_noise(torch.from_numpy(data), torch.from_numpy(LATENTS), first)
    expected = diffusers_solve(scheduler, functools.partial(model, torch), latents, begin)
    schedule = samplers.schedule(kind, CONFIGS[config], 6, strength)
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps[begin:], atol=ATOL_TIMESTEPS, rtol=1e-4)
    start = schedule.start[0] * data + schedule.start[1] * LATENTS
    np.testing.assert_allclose(solve(start, schedule, noise_of(schedule)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("config", "steps", "strength"), [("leading", 6, None), ("sd21", 8, 0.75)])
def test_what_a_mask_keeps_equals_diffusers(kind, config, steps, strength):
    """As its pipeline does it for a UNet of 4 channels: from noise alone, and from noisy latents of the picture."""
    scheduler = diffusers_scheduler(kind, CONFIGS[config], steps)
    begin = (steps - int(steps * (strength or 1))) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    data, mask = np.tanh(LATENTS[::-1]).copy(), np.zeros((2, 4, 4, 1), np.float32)
    mask[:, 1:3] = 1
    kept = [torch.from_numpy(x) for x in (data, LATENTS, mask)]
    first = scheduler.timesteps[begin : begin + 1].repeat(2)
    start = scheduler.add_noise(*kept[:2], first) if strength else kept[1] * scheduler.init_noise_sigma
    expected = diffusers_solve(scheduler, functools.partial(model, torch), start, begin, kept)
    schedule = samplers.schedule(kind, CONFIGS[config], steps, strength)
    drawn = inpaint(data, LATENTS, mask, schedule, noise_of(schedule))
    np.testing.assert_array_equal(drawn[:, 0], data[:, 0])
    np.testing.assert_allclose(drawn, expected, atol=1e-4, rtol=0)


@jax.jit
def inpaint(data, noise, mask, schedule, added):
    carry = sampling.begin(schedule.start[0] * data + schedule.start[1] * noise)
    kept = sampling.Kept(data, noise, mask)
    return sampling.advance(functools.partial(model, jnp), carry, schedule, added, kept)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_text_to_image_is_the_pipeline_of_diffusers(kind, guidance):
    text = {
        name: torch.from_numpy(TABLE[said["input_ids"]].mean(1)) for name, said in (("+", POSITIVE), ("-", NEGATIVE))
    }

    def noise_pred(latents, t):
        positive, negative = (
            latents * t / 1000 + torch.tanh(latents + GAIN * text[sign][:, None, None]) / 9 for sign in "+-"
        )
        return negative + guidance * (positive - negative)

    scheduler = diffusers_scheduler(kind, LEADING, 6)
    latents = diffusers_solve(scheduler, noise_pred, torch.from_numpy(LATENTS) * scheduler.init_noise_sigma)
    expected = (np.kron(latents[..., :3] / 3, np.ones((2, 2, 1))) / 2 + 0.5).clip(0, 1)
    schedule = samplers.schedule(kind, LEADING, 6)
    arguments = PARAMS, POSITIVE, NEGATIVE, LATENTS, schedule, guidance
    images = sampling.text_to_image(*STAND_INS, *arguments, noise=noise_of(schedule))
    assert images.dtype == jnp.float32
    assert (expected % 1 > 0).mean() > 0.3  # the rest is clipped to 0 or 1, which would hide a difference
    np.testing.assert_allclose(images, expected, atol=1e-4)
