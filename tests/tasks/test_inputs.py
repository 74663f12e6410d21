"""What a batch becomes: noisy latents, timesteps, captions and weights."""

import jax
import numpy as np

from flaxkd import diffusion
from flaxkd.tasks.inputs import prepare
from tests.tasks.test_losses import SD


def inputs(**options):
    batch = {"moments": np.concatenate([np.ones((4096, 1, 1, 4)), np.full((4096, 1, 1, 4), -60.0)], -1),
             "input_ids": np.full((4096, 3), 7)}  # fmt: skip
    settings = dict(
        scaling_factor=0.5,
        missing={"input_ids": np.array([[1, 2, 2]])},
        caption_dropout=0.0,
        noise_offset=0.0,
        snr_gamma=None,
    )
    schedule = diffusion.NoiseSchedule.from_config(SD)
    return prepare(jax.random.key(0), batch, schedule=schedule, **(settings | options)), schedule


def test_prepare_scales_latents_and_covers_all_timesteps():
    drawn, schedule = inputs()
    alpha = np.sqrt(schedule.alphas_cumprod[drawn.timesteps])[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    np.testing.assert_allclose(drawn.noisy_latents, alpha * 0.5 + sigma * drawn.target, atol=1e-5)
    assert drawn.timesteps.min() == 0 and drawn.timesteps.max() == 999
    assert abs(float(drawn.timesteps.mean()) - 499.5) < 15
    assert (drawn.noise_weights == 1).all()


def test_timesteps_are_weighted_by_min_snr_or_drawn_by_it():
    weighted = inputs(snr_gamma=0.1)[0]
    drawn = inputs(snr_gamma=0.1, timestep_sampling="min_snr")[0]
    np.testing.assert_array_equal(weighted.timesteps, inputs()[0].timesteps)  # uniform, as without weights
    assert (drawn.noise_weights == 1).all()
    share = np.histogram(drawn.timesteps, 10, (0, 1000))[0] / 4096
    by_weight = np.histogram(weighted.timesteps, 10, (0, 1000), weights=weighted.noise_weights)[0]
    np.testing.assert_allclose(share, by_weight / by_weight.sum(), atol=0.03)
    assert share[9] > 10 * share[2]


def test_caption_dropout_puts_the_empty_caption_in_a_share_of_rows():
    ids = np.asarray(inputs(caption_dropout=0.25)[0].conditions["input_ids"])
    empty = (ids == [1, 2, 2]).all(1)
    assert ((ids == 7).all(1) | empty).all()
    assert abs(empty.mean() - 0.25) < 0.03


def test_input_perturbation_is_in_what_the_unet_sees_alone():
    plain, perturbed = inputs()[0], inputs(input_perturbation=0.5)[0]
    np.testing.assert_array_equal(plain.target, perturbed.target)
    sigma = np.sqrt(1 - inputs()[1].alphas_cumprod[plain.timesteps])[:, None, None, None]
    added = (perturbed.noisy_latents - plain.noisy_latents) / sigma
    np.testing.assert_allclose(np.std(added), 0.5, atol=0.02)
    assert abs(np.corrcoef(np.ravel(added), np.ravel(plain.target))[0, 1]) < 0.05


def test_noise_offset_shifts_whole_channels():
    plain, shifted = inputs()[0].target, inputs(noise_offset=0.5)[0].target
    np.testing.assert_allclose(np.var(plain), 1.0, atol=0.05)
    np.testing.assert_allclose(np.var(shifted), 1.25, atol=0.06)
