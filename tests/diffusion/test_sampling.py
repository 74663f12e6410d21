import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict

from flaxkd.diffusion import samplers, sampling
from flaxkd.models.clip import CLIPTextConfig, CLIPTextModel
from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.models.vae import AutoencoderKL, VAEConfig
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
SCHEDULERS = {
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}
KINDS = tuple(SCHEDULERS)
REFUSED_CONFIGS = {("pndm", "defaults"), ("pndm", "zero_snr")}  # see REFUSED
CASES = [(kind, config) for kind in KINDS for config in CONFIGS if (kind, config) not in REFUSED_CONFIGS]
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
NOISE = np.random.default_rng(2).standard_normal((25, *LATENTS.shape)).astype(np.float32)


def model(xp, latents, t):
    """A nonlinear stand-in for the UNet in torch or jax (`xp`). Pure noise is predicted as such: unit scale."""
    return latents * (t / 1000) + 0.3 * (1 - t / 1000) * xp.cos(3 * latents + t / 150)


solve = jax.jit(functools.partial(sampling.solve, functools.partial(model, jnp)))


def noise_of(schedule):
    return None if schedule.noise is None else NOISE[: len(schedule.noise)]


def diffusers_scheduler(kind, config, steps):
    scheduler = getattr(pytest.importorskip("diffusers"), SCHEDULERS[kind]).from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def diffusers_solve(scheduler, noise_pred_fn, latents, begin=0):
    """The loop of diffusers' pipelines, on latents that `begin` or init_noise_sigma has been applied to already."""
    import torch

    name, drawn = type(scheduler).__module__, iter(NOISE)
    with pytest.MonkeyPatch.context() as patch:
        if "ancestral" in name:
            patch.setattr(f"{name}.randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn)))
        for t in scheduler.timesteps[begin:]:
            noise_pred = noise_pred_fn(scheduler.scale_model_input(latents, t), t)
            latents = scheduler.step(noise_pred, t, latents).prev_sample
    return latents.numpy()


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
@pytest.mark.parametrize(("kind", "config"), CASES)
def test_equals_diffusers(kind, config, steps):
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler(kind, CONFIGS[config], steps)
    schedule = samplers.schedule(kind, CONFIGS[config], steps)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps)
    latents = torch.from_numpy(LATENTS) * scheduler.init_noise_sigma
    expected = diffusers_solve(scheduler, functools.partial(model, torch), latents)
    assert schedule.start[0] == 0
    # Without signal at the start, diffusers' Euler has latents as large as 4096, and so its float32 errors are.
    atol = 1e-3 if scheduler.init_noise_sigma > 1000 else 1e-4
    drawn = solve(schedule.start[1] * LATENTS, schedule, noise_of(schedule))
    np.testing.assert_allclose(drawn, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("strength", [1.0, 0.85, 0.3])
@pytest.mark.parametrize("config", ["leading", "linspace", "sd21"])
@pytest.mark.parametrize("kind", KINDS)
def test_image_to_image_equals_diffusers(kind, config, strength):
    """As its pipeline does it: strength 0.85 leaves 5 of 6 steps, 0.3 leaves 1, of PNDM one more."""
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler(kind, CONFIGS[config], 6)
    begin = 6 - int(6 * strength)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    data = np.tanh(LATENTS[::-1]).copy()
    first = scheduler.timesteps[begin : begin + 1].repeat(2)
    latents = scheduler.add_noise(torch.from_numpy(data), torch.from_numpy(LATENTS), first)
    expected = diffusers_solve(scheduler, functools.partial(model, torch), latents, begin)
    schedule = samplers.schedule(kind, CONFIGS[config], 6, strength)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps[begin:])
    start = schedule.start[0] * data + schedule.start[1] * LATENTS
    np.testing.assert_allclose(solve(start, schedule, noise_of(schedule)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan"), 0.1])
def test_refuses_a_strength_that_leaves_no_step(strength):
    with pytest.raises(ValueError, match=f"strength = {strength}"):
        samplers.schedule("ddim", LEADING, 6, strength)


@pytest.mark.parametrize(("kind", "noise"), [("ddim", NOISE[:6]), ("euler_ancestral", None)])
def test_noise_between_the_steps_is_given_where_it_is_needed(kind, noise):
    with pytest.raises(ValueError, match=r"this sampler (draws no|needs) noise"):
        sampling.solve(functools.partial(model, jnp), LATENTS, samplers.schedule(kind, LEADING, 6), noise)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_never_asks_for_a_negative_timestep(kind, steps):
    schedule = samplers.schedule(kind, CONFIGS["trailing"], steps)
    assert len(schedule.timesteps) == steps + (kind == "pndm") and schedule.timesteps[-1] > 0


@pytest.mark.parametrize("kind", KINDS[:-1])  # the last adds noise that is not the one in the latents
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
    ("dpmsolver++", {"use_karras_sigmas": True}, "use_karras_sigmas = True"),
    ("dpmsolver++", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type = 'sde-dpmsolver\\+\\+'"),
    ("dpmsolver++", {"solver_order": 3, "final_sigmas_type": "x"}, "solver_order = 3.*final_sigmas_type"),
    ("ddim", {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
    ("ddim", {"trained_betas": [0.1, 0.2]}, "trained_betas"),
    ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "v_prediction"),
    ("pndm", {"skip_prk_steps": False}, "skip_prk_steps = False"),
    ("pndm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
    ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
    ("euler", {"timestep_type": "continuous"}, "timestep_type = 'continuous'"),
    ("euler_ancestral", {"prediction_type": "sample"}, "prediction_type = 'sample'"),
    ("heun", {}, "'heun' is unknown .*ddim.*euler_ancestral"),
]


@pytest.mark.parametrize(("kind", "option", "message"), REFUSED)
def test_refuses_what_would_differ_from_diffusers(kind, option, message):
    with pytest.raises(ValueError, match=message):
        samplers.schedule(kind, {**SD15, **option}, 5)


def test_ignores_options_of_other_schedulers():
    schedule = samplers.schedule("ddim", {**SD15, "use_karras_sigmas": True, "solver_order": 3}, 5)
    jax.tree.map(np.testing.assert_array_equal, schedule, samplers.schedule("ddim", SD15, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_refuses_impossible_steps(kind, steps):
    with pytest.raises(ValueError, match=f"{steps}"):
        samplers.schedule(kind, LEADING, steps)


TRACES = []


class TextEncoder(nn.Module):
    @nn.compact
    def __call__(self, input_ids):
        return nn.Embed(16, 4, name="token_embedding")(input_ids)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, sample, timesteps, encoder_hidden_states):
        TRACES.append(sample.shape)
        text = encoder_hidden_states.mean(1)[:, None, None] * self.param("gain", nn.initializers.ones, ())
        return (
            sample * timesteps[:, None, None, None].astype(jnp.float32) / 1000 + jnp.tanh(sample + text) / 9
        )


class VAE(nn.Module):
    config: VAEConfig = VAEConfig(scaling_factor=3.0)

    def decode(self, latents):
        return latents[..., :3].repeat(2, axis=1).repeat(2, axis=2)


TABLE = np.random.default_rng(1).standard_normal((16, 4)).astype(np.float32)
GAIN = np.float32(0.8)
MODULES = FrozenDict({"unet": UNet(), "vae": VAE(), "text_encoder": TextEncoder()})
STAND_INS = MODULES, families.text_states
PARAMS = {"unet": {"gain": GAIN}, "vae": {}, "text_encoder": {"token_embedding": {"embedding": TABLE}}}
POSITIVE, NEGATIVE = np.array([[1, 2, 3], [4, 5, 6]], np.int32), np.array([[7, 8, 9], [7, 8, 9]], np.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.5])
def test_text_to_image_is_the_pipeline_of_diffusers(kind, guidance):
    torch = pytest.importorskip("torch")
    text = {name: torch.from_numpy(TABLE[ids].mean(1)) for name, ids in (("+", POSITIVE), ("-", NEGATIVE))}

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


def test_text_to_image_takes_the_real_modules():
    widths = dict(norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8)
    unet = UNet2DCondition(UNetConfig(block_out_channels=(8, 8, 8, 8), **widths))
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    key, latents, ids = jax.random.key(0), jnp.zeros((2, 8, 8, 4)), jnp.zeros((2, 5), jnp.int32)
    params = {
        "unet": jax.eval_shape(unet.init, key, latents, ids[:, 0], jnp.zeros((2, 5, 8)))["params"],
        "vae": jax.eval_shape(vae.init, key, jnp.zeros((2, 32, 32, 3)))["params"],
        "text_encoder": jax.eval_shape(text_encoder.init, key, ids)["params"],
    }
    modules = FrozenDict({"unet": unet, "vae": vae, "text_encoder": text_encoder})
    draw = functools.partial(sampling.text_to_image, modules, families.text_states)
    images = jax.eval_shape(draw, params, ids, ids, latents, samplers.schedule("ddim", LEADING, 4), 7.5)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), jnp.float32)
