"""The equation, against numpy; and the noise schedule, against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flaxkd import diffusion
from flaxkd.tasks.inputs import prepare
from flaxkd.tasks.losses import Prediction, kd_loss, mse

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
WEIGHT = ConfigDict(dict(noise=1.0, output=0.5, feature=0.25))
PAIRS = (("down_blocks.0", "down_blocks.0"), ("up_blocks.0", "up_blocks.1"))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def predictions():
    student = Prediction(
        normal(1, 2, 4, 4, 4), {"down_blocks.0": normal(2, 2, 2, 2, 8), "up_blocks.0": normal(3, 2, 4, 4, 8)}
    )
    teacher = Prediction(
        normal(4, 2, 4, 4, 4),
        {
            "down_blocks.0": normal(5, 2, 2, 2, 8),
            "up_blocks.1": 3 * normal(6, 2, 4, 4, 8),
            "up_blocks.0": normal(9, 1),
        },
    )
    return student, teacher, normal(7, 2, 4, 4, 4)


def test_loss_is_the_equation(predictions):
    student, teacher, target = predictions
    loss, metrics = kd_loss(student, teacher, target, PAIRS, WEIGHT)
    noise = np.mean((student.noise_pred - target) ** 2)
    output = np.mean((student.noise_pred - teacher.noise_pred) ** 2)
    down = np.mean((student.features["down_blocks.0"] - teacher.features["down_blocks.0"]) ** 2)
    up = np.mean((student.features["up_blocks.0"] - teacher.features["up_blocks.1"]) ** 2)
    np.testing.assert_allclose(loss, noise + 0.5 * output + 0.25 * (down + up), rtol=1e-6)
    expected = {"loss": loss, "loss_noise": noise, "loss_output": output, "loss_feature": down + up}
    expected |= {"feature/down_blocks.0": down, "feature/up_blocks.0": up}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_a_student_equal_to_its_teacher_has_only_the_noise_term(predictions):
    _, teacher, target = predictions
    same = (("up_blocks.1", "up_blocks.1"),)
    _, metrics = kd_loss(teacher, teacher, target, same, WEIGHT)
    assert metrics["loss_output"] == metrics["loss_feature"] == 0
    assert metrics["loss"] == metrics["loss_noise"] > 0


def test_normalised_pairs_do_not_depend_on_the_scale_of_the_features(predictions):
    student, teacher, target = predictions
    terms = []
    for scale in (1.0, 100.0):
        big = [
            Prediction(p.noise_pred, {k: scale * v for k, v in p.features.items()})
            for p in (student, teacher)
        ]
        terms.append(kd_loss(*big, target, PAIRS, WEIGHT, normalize=True)[1]["feature/up_blocks.0"])
    np.testing.assert_allclose(*terms, rtol=1e-5)
    s, t = student.features["up_blocks.0"], teacher.features["up_blocks.1"]
    np.testing.assert_allclose(terms[0], np.mean((s - t) ** 2) / np.mean(t**2), rtol=1e-5)


def test_noise_weights_weigh_examples(predictions):
    student, _, target = predictions
    weights = jnp.array([2.0, 0.0])
    loss, metrics = kd_loss(student, None, target, (), WEIGHT, noise_weights=weights)
    np.testing.assert_allclose(loss, np.mean((student.noise_pred[0] - target[0]) ** 2), rtol=1e-6)
    assert metrics.keys() == {"loss", "loss_noise"}


def test_the_loss_is_float32_of_bfloat16_predictions():
    a, b = jnp.full((1, 64), 256, jnp.bfloat16), jnp.full((1, 64), 1, jnp.bfloat16)
    assert mse(a, b).dtype == jnp.float32
    assert mse(a, b) == 255.0**2  # bfloat16 would round it to 65,024


def test_unequal_shapes_and_missing_features_are_errors(predictions):
    student, teacher, target = predictions
    with pytest.raises(ValueError, match=r"cannot compare \(2, 1\) with \(2, 4\)"):
        mse(jnp.zeros((2, 1)), jnp.zeros((2, 4)))
    with pytest.raises(KeyError, match=r"mid_block"):
        kd_loss(student, teacher, target, (("mid_block", "mid_block"),), WEIGHT)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_forward_process_equals_diffusers(kind):
    torch = pytest.importorskip("torch")
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler.from_config(SD | {"prediction_type": kind})
    schedule = diffusion.NoiseSchedule.from_config(SD | {"prediction_type": kind})
    latents, noise, timesteps = normal(0, 5, 2, 2, 4), normal(1, 5, 2, 2, 4), np.array([0, 1, 250, 600, 999])
    tensors = [torch.tensor(x) for x in (latents, noise, timesteps)]
    np.testing.assert_allclose(
        diffusion.add_noise(schedule, latents, noise, timesteps), scheduler.add_noise(*tensors), atol=2e-6
    )
    velocity = scheduler.get_velocity(*tensors)
    np.testing.assert_allclose(
        diffusion.target(schedule, latents, noise, timesteps),
        noise if kind == "epsilon" else velocity,
        atol=2e-6,
    )
    snr = compute_snr(scheduler, tensors[2]).numpy()
    expected = np.minimum(snr, 5.0) / (
        snr if kind == "epsilon" else snr + 1
    )  # as train_text_to_image.py has it
    np.testing.assert_allclose(diffusion.min_snr_weights(schedule, timesteps, 5.0), expected, rtol=2e-4)


def inputs(**options):
    batch = {"moments": np.concatenate([np.ones((4096, 1, 1, 4)), np.full((4096, 1, 1, 4), -60.0)], -1),
             "input_ids": np.full((4096, 3), 7)}  # fmt: skip
    settings = dict(
        scaling_factor=0.5,
        empty_ids=np.array([1, 2, 2]),
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
    ids = np.asarray(inputs(caption_dropout=0.25)[0].input_ids)
    empty = (ids == [1, 2, 2]).all(1)
    assert ((ids == 7).all(1) | empty).all()
    assert abs(empty.mean() - 0.25) < 0.03


def test_noise_offset_shifts_whole_channels():
    plain, shifted = inputs()[0].target, inputs(noise_offset=0.5)[0].target
    np.testing.assert_allclose(np.var(plain), 1.0, atol=0.05)
    np.testing.assert_allclose(np.var(shifted), 1.25, atol=0.06)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type = 'sample' is not supported"):
        diffusion.NoiseSchedule.from_config(SD, "sample")
