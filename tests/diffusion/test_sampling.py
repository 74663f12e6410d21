"""Samplers and the loop that draws: what they refuse, and what they take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from flaxkd.diffusion import samplers, sampling
from flaxkd.models.clip import CLIPTextConfig, CLIPTextModel
from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.models.vae import AutoencoderKL, VAEConfig
from flaxkd.pretrained import families
from tests.diffusion.stand_ins import (
    CONFIGS,
    KINDS,
    LATENTS,
    LEADING,
    NEGATIVE,
    NOISE,
    PARAMS,
    POSITIVE,
    SD15,
    STAND_INS,
    TRACES,
    model,
)


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan"), 0.1])
def test_refuses_a_strength_that_leaves_no_step(strength):
    with pytest.raises(ValueError, match=f"strength = {strength}"):
        samplers.schedule("ddim", LEADING, 6, strength)


@pytest.mark.parametrize(("kind", "noise"), [("ddim", NOISE[:6]), ("euler_ancestral", None)])
def test_noise_between_the_steps_is_given_where_it_is_needed(kind, noise):
    with pytest.raises(ValueError, match=r"this sampler (draws no|needs) noise"):
        sampling.solve(functools.partial(model, jnp), LATENTS, samplers.schedule(kind, LEADING, 6), noise)


def test_a_model_says_in_how_many_steps_it_draws_with_its_own_sampler():
    few = LEADING | {"_class_name": "DDIMScheduler", samplers.OWN_STEPS: 4}
    assert [samplers.usual_steps(kind, few) for kind in (None, "ddim", "euler", "lcm")] == [4, 4, samplers.STEPS, 4]
    lcm, other = {"_class_name": "LCMScheduler"}, {"_class_name": "EulerDiscreteScheduler"}
    assert [samplers.few_steps(config) for config in (few, lcm, other, {}, {"_class_name": "Unknown"})] == [
        4,
        4,
        None,
        None,
        None,
    ]
    most = [samplers.most_guidance("ddim", config) for config in (few, LEADING)]
    assert most == [samplers.most_guidance("lcm", LEADING), np.inf]
    for wrong in (0, 2.5, "4", True, [4]):
        with pytest.raises(ValueError, match=r"_num_inference_steps = .* must be a whole number"):
            samplers.usual_steps(None, few | {samplers.OWN_STEPS: wrong})


CALLS = {"pndm": lambda n: n + 1, "heun": lambda n: 2 * n - 1, "dpm2": lambda n: 2 * n - 1}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lcm"])
@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_never_asks_for_a_negative_timestep(kind, steps):
    schedule = samplers.schedule(kind, CONFIGS["trailing"], steps)
    assert len(schedule.timesteps) == CALLS.get(kind, lambda n: n)(steps) and schedule.timesteps[-1] > 0


# The others add noise that is not the one in the latents, and DEIS ends at the lowest sigma of training.
QUIET = [kind for kind in KINDS if samplers.schedule(kind, LEADING, 2).noise is None and kind != "deis"]


@pytest.mark.parametrize("kind", QUIET)
def test_a_perfect_model_is_solved_exactly(kind):
    """If the noise predicted is that in the latents, every number of steps ends at the data."""
    data, noise = LATENTS
    schedule = samplers.schedule(kind, {**LEADING, "set_alpha_to_one": True, "steps_offset": 0}, 7, strength=1.0)
    alpha, sigma = schedule.start
    latents = sampling.solve(lambda latents, t: jnp.asarray(noise), alpha * data + sigma * noise, schedule)
    np.testing.assert_allclose(latents, data, atol=1e-4)


REFUSED = [
    ("ddim", {"thresholding": True}, "thresholding = True"),
    ("ddim", {"prediction_type": "sample"}, "prediction_type = 'sample'"),
    ("ddim", {"timestep_spacing": "loose"}, "timestep_spacing = 'loose'"),
    ("dpmsolver++", {"solver_order": 4, "final_sigmas_type": "x"}, "solver_order = 4.*final_sigmas_type"),
    ("dpmsolver++", {"algorithm_type": "dpmsolver"}, "'dpmsolver' cannot end at sigma 0.*can draw with it: .*ddim"),
    ("dpmsolver++", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas"),
    ("unipc", {"lower_order_final": False}, "lower_order_final = False cannot end at sigma 0"),
    ("unipc", {"predict_x0": False}, "predict_x0 = False cannot end at sigma 0"),
    ("euler", {"use_karras_sigmas": True, "sigma_min": 20.0}, "sigma_min = 20 and sigma_max = 14.6"),
    ("ddpm", {"variance_type": "learned_range"}, "variance_type = 'learned_range'"),
    ("heun", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
    ("ddim", {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
    ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "v_prediction"),
    ("pndm", {"skip_prk_steps": False}, "skip_prk_steps = False"),
    ("pndm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
    ("euler", {"timestep_type": "continuous"}, "timestep_type = 'continuous'"),
    ("euler_ancestral", {"prediction_type": "sample"}, "prediction_type = 'sample'"),
    ("dpm3", {}, "'dpm3' is unknown .*ddim.*euler_ancestral"),
    ("ddim:karras", {}, "'ddim:karras' is unknown .known: ddim without"),
    ("euler:lu", {}, "'euler:lu' is unknown .known: euler:karras, euler:exponential, euler:beta"),
    ("lcm", {"original_inference_steps": 4}, "steps = 5: the model was made for 4 at most"),
    ("lcm", {"original_inference_steps": 0}, "original_inference_steps = 0"),
    ("lcm", {"thresholding": True}, "thresholding = True"),
    (None, {"_class_name": "TCDScheduler"}, "TCDScheduler, is not supported. .*dpmsolver.., .*pndm"),
]


@pytest.mark.parametrize(("kind", "option", "message"), REFUSED)
def test_refuses_what_would_differ_from_diffusers(kind, option, message):
    with pytest.raises(ValueError, match=message):
        samplers.schedule(kind, {**SD15, **option}, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_draws_with_the_sampler_of_its_file(kind):
    config = {**SD15, "_class_name": samplers.SAMPLERS[kind].scheduler, **samplers.SAMPLERS[kind].fixed}
    jax.tree.map(np.testing.assert_array_equal, samplers.schedule(None, config, 5), samplers.schedule(kind, config, 5))


def test_a_suffix_spaces_the_sigmas():
    karras = samplers.schedule("euler", {**SD15, "use_karras_sigmas": True}, 5)
    jax.tree.map(np.testing.assert_array_equal, karras, samplers.schedule("euler:karras", SD15, 5))
    other = samplers.schedule("euler:karras", {**SD15, "use_beta_sigmas": True}, 5)
    jax.tree.map(np.testing.assert_array_equal, karras, other)


def test_ignores_options_of_other_schedulers():
    schedule = samplers.schedule("ddim", {**SD15, "use_karras_sigmas": True, "solver_order": 3}, 5)
    jax.tree.map(np.testing.assert_array_equal, schedule, samplers.schedule("ddim", SD15, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_refuses_impossible_steps(kind, steps):
    with pytest.raises(ValueError, match=f"{steps}"):
        samplers.schedule(kind, LEADING, steps)


def test_one_program_for_all_samplers_and_guidances():
    before = len(TRACES)
    for kind, guidance, steps in (
        ("ddim", 2.0, 9),
        ("dpmsolver++", 5.0, 9),
        ("euler", 3.0, 9),
        ("pndm", 7.5, 8),
    ):
        schedule = samplers.schedule(kind, LEADING, steps)
        sampling.text_to_image(*STAND_INS, PARAMS, POSITIVE, NEGATIVE, LATENTS, schedule, guidance)
    assert TRACES[before:] == [(4, 4, 4, 4)]  # the UNet is traced once, in the scan, on the doubled batch


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_counted_and_counting_changes_nothing(kind):
    schedule, ticks = samplers.schedule(kind, LEADING, 5), []
    arguments = *STAND_INS, PARAMS, POSITIVE, NEGATIVE, LATENTS, schedule, 3.0
    noise = None if schedule.noise is None else np.ones((len(schedule.noise), *LATENTS.shape), np.float32)
    images = sampling.text_to_image(*arguments, noise=noise, tick=lambda: ticks.append(1))
    assert len(ticks) == len(schedule.timesteps)
    np.testing.assert_array_equal(images, sampling.text_to_image(*arguments, noise=noise))


def test_text_to_image_takes_the_real_modules():
    widths = dict(norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8)
    unet = UNet2DCondition(UNetConfig(block_out_channels=(8, 8, 8, 8), **widths))
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    key, latents, ids = jax.random.key(0), jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 5), jnp.int32)
    params = {
        "unet": jax.eval_shape(unet.init, key, latents, ids[:, 0], jnp.zeros((2, 5, 8)))["params"],
        "vae": jax.eval_shape(vae.init, key, jnp.zeros((2, 32, 32, 3)))["params"],
        "text_encoder": jax.eval_shape(text_encoder.init, key, ids)["params"],
    }
    modules = FrozenDict({"unet": unet, "vae": vae, "text_encoder": text_encoder})
    draw = functools.partial(sampling.text_to_image, modules, families.text_states)
    images = jax.eval_shape(
        draw, params, {"input_ids": ids}, {"input_ids": ids}, latents, samplers.schedule("ddim", LEADING, 4), 7.5
    )
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_timesteps", 10**30),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", None),
        ("beta_end", 1.5),
        ("beta_start", float("nan")),
        ("beta_start", "0.1"),
        ("steps_offset", [1]),
        ("use_karras_sigmas", "yes"),
        ("sigma_min", {}),
    ],
)
def test_numbers_that_no_schedule_has_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        samplers.schedule("dpmsolver++", {key: value}, 5)
