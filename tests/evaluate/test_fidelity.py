"""Every measure against scipy or numpy; and what equal networks and pictures give."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn

from flaxkd import diffusion, students
from flaxkd.evaluate import candidates, fidelity
from flaxkd.machine import sharding
from flaxkd.models.layers import emit
from flaxkd.pretrained import families
from flaxkd.pretrained.families import text_states

SCHEDULE = diffusion.NoiseSchedule.from_config(
    dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
)
PAIRS = (("mid_block", "mid_block"), ("up_blocks.0", "up_blocks.1"))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return emit(self, jnp.tanh(nn.Dense(4, name="dense")(x)))


class UNet(nn.Module):
    """Says something of latents, timestep and text, and has features."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x, timesteps, encoder_hidden_states):
        x = x + encoder_hidden_states.mean((1, 2))[:, None, None, None] + timesteps[:, None, None, None] / 1000
        for name in self.names:
            x = Block(name=name)(x)
        return x


class Text(nn.Module):
    @nn.compact
    def __call__(self, input_ids):
        return nn.Embed(8, 4, name="embed")(input_ids)


def network(seed, names):
    unet, text = UNet(names), Text()
    ids = np.random.default_rng(0).integers(0, 8, (5, 3)).astype(np.int32)
    key = jax.random.key(seed)
    text_params = text.init(key, ids)["params"]
    unet_params = unet.init(key, np.zeros((1, 4, 4, 4)), np.zeros(1), np.zeros((1, 3, 4)))["params"]
    modules, params = {"unet": unet, "text_encoder": text}, {"unet": unet_params, "text_encoder": text_params}
    return fidelity.Network(modules, text_states, params, {"input_ids": ids})


@pytest.fixture(scope="module")
def measured():
    student = network(1, ("mid_block", "up_blocks.0"))
    teacher = network(2, ("mid_block", "up_blocks.0", "up_blocks.1"))
    latents = np.random.default_rng(3).standard_normal((5, 4, 4, 4), np.float32)
    mesh = sharding.local_mesh()
    assert mesh.size == 4

    def measure(student, pairs, batch_size=4):
        return fidelity.errors(
            student, teacher, latents, SCHEDULE, pairs, bins=2, seed=0, batch_size=batch_size, mesh=mesh
        )

    return student, teacher, latents, measure


def test_errors_are_those_of_the_networks(measured):
    student, teacher, latents, measure = measured
    values = measure(student, PAIRS)
    assert {x.shape for x in values.values()} == {(2, 5)}  # the last batch is filled up, and that is cut off
    rng = np.random.default_rng([0, 1])  # the second bin, by hand
    noise = rng.standard_normal(latents.shape, np.float32)
    timesteps = rng.integers(500, 1000, 5)
    alphas = SCHEDULE.alphas_cumprod[timesteps][:, None, None, None]
    noisy = np.sqrt(alphas) * latents + np.sqrt(1 - alphas) * noise
    said = []
    for side in (student, teacher):
        states = side.params["text_encoder"]["embed"]["embedding"][side.inputs["input_ids"]]
        x = noisy + states.mean((1, 2))[:, None, None, None]
        x = x + timesteps[:, None, None, None] / 1000
        features = {}
        for name in side.modules["unet"].names:
            dense = side.params["unet"][name]["dense"]
            features[name] = x = np.tanh(x @ dense["kernel"] + dense["bias"])
        said.append((x, features))
    (own, features), (others, whole) = said
    mean = lambda x: np.mean(np.square(x), (1, 2, 3))
    expected = {
        "loss_noise": mean(own - noise),
        "loss_output": mean(own - others),
        "teacher/loss_noise": mean(others - noise),
        "feature/up_blocks.0": mean(features["up_blocks.0"] - whole["up_blocks.1"]),
        "square/up_blocks.0": mean(whole["up_blocks.1"]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(values[name][1], value, rtol=1e-4, err_msg=name)
    found = fidelity.summary(values)
    assert found["loss_output"] == pytest.approx(values["loss_output"].mean())
    assert found["by_timestep"]["loss_noise"][1] == pytest.approx(expected["loss_noise"].mean(), rel=1e-4)
    ratio = values["feature/up_blocks.0"].sum() / values["square/up_blocks.0"].sum()
    assert found["features"]["up_blocks.0"] == pytest.approx(ratio)
    assert found["feature"] == pytest.approx(np.mean(list(found["features"].values())))
    assert fidelity.summary(values, "teacher/").keys() == {"loss_noise", "by_timestep"}


def test_the_batch_does_not_matter_and_the_teacher_is_equal_to_itself(measured):
    student, teacher, _, measure = measured
    once, again = measure(student, PAIRS), measure(student, PAIRS, batch_size=8)
    for name in once:
        np.testing.assert_allclose(once[name], again[name], rtol=1e-5, err_msg=name)
    found = fidelity.summary(measure(teacher, (("mid_block", "mid_block"),)))
    assert found["loss_output"] == found["feature"] == 0 < found["loss_noise"]


def test_bins_cover_all_timesteps():
    assert fidelity.timestep_bins(1000, 3).tolist() == [0, 333, 667, 1000]
    with pytest.raises(ValueError, match=r"bins = 0.*1 to 1000"):
        fidelity.timestep_bins(1000, 0)


@pytest.mark.parametrize("name", ["bk_small", "sd_tiny"])
def test_a_student_is_known_by_its_parameters(name):
    teacher = families.SD15 | dict(block_out_channels=[32, 32, 64, 64])
    unet_config = students.config(students.get(name), teacher)
    kind, pairs = fidelity.relation(unet_config | {"sample_size": 32}, teacher, "bksdm")
    assert name in kind.split(" = ")
    assert pairs == students.feature_pairs(students.get(name), "bksdm")


@pytest.mark.parametrize(("name", "terms"), [("ssd_1b", 26), ("vega", 26), ("koala_1b", 16), ("koala_700m", 15)])
def test_a_student_of_sdxl_is_known_by_its_depths(name, terms):
    unet_config = students.config(students.get(name), families.SDXL)
    kind, pairs = fidelity.relation(unet_config, families.SDXL, "segmind_sdxl")
    assert kind == name and len(pairs) == terms
    kind, pairs = fidelity.relation(families.SDXL, families.SDXL, "segmind_sdxl")
    assert kind == "same network" and len(pairs) == 7


def test_a_student_from_a_file_is_known_by_the_run_that_names_it(tmp_path):
    layers = {0: (0,), 1: (0,), 2: (0, 1), 3: (0,)}, True, {0: (0, 2), 1: (0, 1, 2), 2: (0, 2), 3: (0, 2)}
    student = students.Student(*layers, {"bksdm": students.Published("mine", "My own")})
    students.write(student, tmp_path / "mine.json")
    (tmp_path / "config.json").write_text(json.dumps({"student": str(tmp_path / "mine.json")}))
    unet_config = students.config(student, families.SD15)
    assert fidelity.relation(unet_config, families.SD15, "bksdm") == (None, ())
    kind, pairs = fidelity.relation(unet_config, families.SD15, "bksdm", candidates.rows_of(tmp_path))
    assert kind == "mine" and ("down_blocks.2", "down_blocks.2") in pairs
    (tmp_path / "mine.json").unlink()
    assert candidates.rows_of(tmp_path) == candidates.rows_of(None) == students.TABLE


def test_the_teacher_and_a_stranger_are_known_too():
    teacher = families.SD15 | dict(block_out_channels=[32, 32, 64, 64])
    kind, pairs = fidelity.relation(teacher, teacher, "segmind")
    assert kind == "same network" and len(pairs) == 9 and pairs[4] == ("mid_block", "mid_block")
    assert fidelity.relation(teacher | dict(block_out_channels=[32] * 4), teacher, "segmind") == (None, ())


def pictures(seed, n=3, height=24, width=20):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def test_psnr():
    a = pictures(0)
    b = np.where(a < 128, a + 3, a - 3).astype(np.uint8)
    np.testing.assert_allclose(fidelity.psnr(a, b), 20 * np.log10(255 / 3))
    assert fidelity.psnr(a, a).tolist() == [fidelity.PSNR_LIMIT] * 3


def test_latents_are_averaged_over_cells():
    latents = np.random.default_rng(0).standard_normal((2, 8, 6, 4)).astype(np.float32)
    features = fidelity.latent_features(latents).reshape(2, 4, 4, 4)
    np.testing.assert_allclose(features[:, 1, 0], latents[:, 2:4, 0:1].mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(features[:, 3, 3], latents[:, 6:8, 4:6].mean((1, 2)), atol=1e-6)
    with pytest.raises(ValueError, match="2 x 6 are smaller"):
        fidelity.latent_features(latents[:, :2])


@pytest.mark.parametrize("n", [200, 6])  # the second covariance is singular
def test_frechet_is_the_equation_with_scipys_root(n):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((8, 8))
    a, b = rng.standard_normal((200, 8)), rng.standard_normal((n, 8)) @ mix + 0.5
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert fidelity.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert fidelity.frechet(b, a) == pytest.approx(fidelity.frechet(a, b))
    assert fidelity.frechet(b, b) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="there are 1 and 200"):
        fidelity.frechet(a[:1], a)
