"""The equation, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

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


def test_tokens_are_compared_by_their_direction(predictions):
    student, teacher, target = predictions
    _, metrics = kd_loss(student, teacher, target, PAIRS, WEIGHT, normalize="token")
    a, b = student.features["up_blocks.0"], teacher.features["up_blocks.1"]
    cosines = np.sum(a * b, -1) / np.sqrt(np.sum(a * a, -1) * np.sum(b * b, -1))
    np.testing.assert_allclose(metrics["feature/up_blocks.0"], np.mean(2 - 2 * cosines), rtol=1e-5)
    student.features["down_blocks.0"] *= 0
    _, metrics = kd_loss(student, teacher, target, PAIRS, WEIGHT, normalize="token")
    np.testing.assert_allclose(metrics["feature/down_blocks.0"], 1.0, rtol=1e-5)  # a token of zeros has no direction


def test_normalised_pairs_do_not_depend_on_the_scale_of_the_features(predictions):
    student, teacher, target = predictions
    terms = []
    for scale in (1.0, 100.0):
        big = [Prediction(p.noise_pred, {k: scale * v for k, v in p.features.items()}) for p in (student, teacher)]
        terms.append(kd_loss(*big, target, PAIRS, WEIGHT, normalize=True)[1]["feature/up_blocks.0"])
    np.testing.assert_allclose(*terms, rtol=1e-5)
    s, t = student.features["up_blocks.0"], teacher.features["up_blocks.1"]
    np.testing.assert_allclose(terms[0], np.mean((s - t) ** 2) / np.mean(t**2), rtol=1e-5)


def test_noise_weights_weigh_examples(predictions):
    student, teacher, target = predictions
    weights, weight = jnp.array([2.0, 0.0]), ConfigDict(dict(noise=0.5, output=0.0, feature=0.0))
    half, metrics = kd_loss(student, teacher, target, (), weight, noise_weights=weights)
    loss = np.mean((student.noise_pred[0] - target[0]) ** 2)
    np.testing.assert_allclose((half, metrics["loss"], metrics["loss_noise"]), (loss / 2, loss / 2, loss), rtol=1e-6)


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
