import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxkd import sampling
from flaxkd.models.clip import CLIPTextConfig, CLIPTextModel
from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.models.vae import AutoencoderKL, VAEConfig

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
KINDS = ("dpmsolver++", "ddim")
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)


def model(xp, latents, t):
    """A nonlinear stand-in for the UNet in torch or jax (`xp`). Pure noise is predicted as such: unit scale."""
    return latents * (t / 1000) + 0.3 * (1 - t / 1000) * xp.cos(3 * latents + t / 150)


solve = jax.jit(functools.partial(sampling.solve, functools.partial(model, jnp)))


def diffusers_scheduler(kind, config, steps):
    diffusers = pytest.importorskip("diffusers")
    name = {"dpmsolver++": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler"}[kind]
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def diffusers_solve(scheduler, noise_pred_fn, latents):
    for t in scheduler.timesteps:
        latents = scheduler.step(noise_pred_fn(latents, t), t, latents).prev_sample
    return latents.numpy()


@pytest.mark.parametrize("steps", [1, 2, 5, 25])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers(kind, config, steps):
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler(kind, CONFIGS[config], steps)
    plan = sampling.plan(kind, CONFIGS[config], steps)
    np.testing.assert_array_equal(plan.timesteps, scheduler.timesteps)
    expected = diffusers_solve(scheduler, functools.partial(model, torch), torch.from_numpy(LATENTS))
    np.testing.assert_allclose(solve(LATENTS, plan), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_never_asks_for_a_negative_timestep(kind, steps):
    plan = sampling.plan(kind, CONFIGS["trailing"], steps)
    assert plan.timesteps.shape == (steps,) and plan.timesteps[-1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_model_is_solved_exactly(kind):
    """If the noise predicted is that in the latents, every number of steps ends at the data."""
    data, noise = LATENTS
    plan = sampling.plan(kind, {**LEADING, "set_alpha_to_one": True}, 7)
    alpha = (1 / plan.data_latents[0]).item()
    sigma = np.sqrt(1 - alpha**2, dtype=np.float32)
    latents = sampling.solve(lambda latents, t: jnp.asarray(noise), alpha * data + sigma * noise, plan)
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
    ("heun", {}, "'heun' is unknown .*ddim"),
]


@pytest.mark.parametrize(("kind", "option", "message"), REFUSED)
def test_refuses_what_would_differ_from_diffusers(kind, option, message):
    with pytest.raises(ValueError, match=message):
        sampling.plan(kind, {**SD15, **option}, 5)


def test_ignores_options_of_other_schedulers():
    plan = sampling.plan("ddim", {**SD15, "use_karras_sigmas": True, "solver_order": 3}, 5)
    jax.tree.map(np.testing.assert_array_equal, plan, sampling.plan("ddim", SD15, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_refuses_impossible_steps(kind, steps):
    with pytest.raises(ValueError, match=f"{steps}"):
        sampling.plan(kind, LEADING, steps)


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
STAND_INS = UNet(), VAE(), TextEncoder()
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

    latents = diffusers_solve(diffusers_scheduler(kind, LEADING, 6), noise_pred, torch.from_numpy(LATENTS))
    expected = (np.kron(latents[..., :3] / 3, np.ones((2, 2, 1))) / 2 + 0.5).clip(0, 1)
    plan = sampling.plan(kind, LEADING, 6)
    images = sampling.text_to_image(*STAND_INS, PARAMS, POSITIVE, NEGATIVE, LATENTS, plan, guidance)
    assert images.dtype == jnp.float32
    assert (expected % 1 > 0).mean() > 0.3  # the rest is clipped to 0 or 1, which would hide a difference
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_one_program_for_all_samplers_and_guidances():
    before = len(TRACES)
    for kind, guidance in (("ddim", 2.0), ("dpmsolver++", 5.0)):
        plan = sampling.plan(kind, LEADING, 9)
        sampling.text_to_image(*STAND_INS, PARAMS, POSITIVE, NEGATIVE, LATENTS, plan, guidance)
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
    draw = functools.partial(sampling.text_to_image, unet, vae, text_encoder)
    images = jax.eval_shape(draw, params, ids, ids, latents, sampling.plan("ddim", LEADING, 4), 7.5)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), jnp.float32)
