"""How near a student is to its teacher on held-out captions: errors of the UNet and of its pictures.

`errors` compares predictions and features on the same noisy latents. `psnr` and `ssim` compare pictures drawn from the
same noise. `frechet` compares two sets of pictures. `python -m flaxkd.evaluate` combines them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict

from flaxkd import diffusion, students
from flaxkd.machine import progress, sharding
from flaxkd.models.unet import UNetConfig
from flaxkd.tasks.losses import mse, predict

PSNR_LIMIT = 100.0  # dB, for equal pictures: infinity has no mean
GRID = 4  # cells per side, in which latents are averaged for `frechet_latent`: 64 numbers per picture


class Network(NamedTuple):
    """A predictor: the modules {"unet", encoders}, their parameters by the same names, and its captions."""

    modules: Mapping[str, nn.Module]
    condition: Callable  # of the family: (modules, params, inputs) -> keyword arguments of the UNet
    params: dict
    inputs: dict[str, np.ndarray]  # of `Folder.conditions`, n rows each


Rows = tuple[students.Student, ...]


def student_of(unet_config: dict, teacher_config: dict, rows: Rows = students.TABLE) -> students.Student | None:
    """The row by which a UNet was cut from the teacher; None if it was not. rows: which it may be, likely first."""
    own = _stages(unet_config)
    if own == _stages(teacher_config):
        return None
    for student in rows:
        try:
            cut = _stages(students.config(student, teacher_config))
        except ValueError:  # this row cannot be cut from this teacher, so it is another row
            continue
        if own == cut:
            return student
    return None


def relation(
    unet_config: dict, teacher_config: dict, pairing: str, rows: Rows = students.TABLE
) -> tuple[str | None, tuple]:
    """(relation of a UNet to the teacher, its feature pairs), derived from the stages of the two `config.json`.

    The relation is "sd_small = bk_base" and so on for one of `rows`; "same network", with every block
    as a pair; or None without pairs, for a UNet that cannot have been cut from this teacher.
    """
    own, whole = _stages(unet_config), _stages(teacher_config)
    if own == whole:
        down, mid, up = own[:3]
        blocks = [f"down_blocks.{i}" for i in range(len(down))] + ["mid_block"] * (mid is not None)
        blocks += [f"up_blocks.{i}" for i in range(len(up))]
        return "same network", tuple((name, name) for name in blocks)
    if student := student_of(unet_config, teacher_config, rows):
        return " = ".join(student.names), students.feature_pairs(student, pairing, teacher_config)
    return None, ()


def _stages(unet_config: dict) -> tuple:
    config = UNetConfig.from_dict(unet_config)
    return config.down, config.mid, config.up, config.in_channels, config.cross_attention_dim


@sharding.jit(static_argnames=("modules", "pairs"))
def compare(modules, params, inputs, noisy_latents, timesteps, target, pairs) -> dict[str, jax.Array]:
    """Mean squares per example, {name: float32[b]}: student and teacher on the same noisy latents.

    modules: ((modules, condition) of the student, the same of the teacher). params, inputs: also (student, teacher).
    noisy_latents, target: float32[b, h, w, 4]. timesteps: int32[b]. pairs: ((student module, teacher module), ...).
    The names are "loss_noise" and "loss_output" as in `losses.kd_loss`, "teacher/loss_noise", and for each pair
    "feature/<student module>" and "square/<student module>", the mean square of the teacher's own feature.
    """
    said = []
    for (own, condition), p, read in zip(modules, params, inputs, strict=True):
        said.append(predict(own["unet"], p["unet"], noisy_latents, timesteps, condition(own, p, read)))
    student, teacher = said
    each = jax.vmap(mse)
    values = {
        "loss_noise": each(student.noise_pred, target),
        "loss_output": each(student.noise_pred, teacher.noise_pred),
        "teacher/loss_noise": each(teacher.noise_pred, target),
    }
    for s, t in pairs:
        values[f"feature/{s}"] = each(student.features[s], teacher.features[t])
        values[f"square/{s}"] = each(teacher.features[t], jnp.zeros_like(teacher.features[t]))
    return values


def timestep_bins(train_steps: int, bins: int) -> np.ndarray:
    """Edges int[bins + 1] of equal ranges of timesteps. ValueError unless 1 <= bins <= train_steps."""
    if not 1 <= bins <= train_steps:
        raise ValueError(f"bins = {bins}: the {train_steps} training timesteps allow 1 to {train_steps} bins")
    return np.linspace(0, train_steps, bins + 1).round().astype(int)


def errors(
    student: Network,
    teacher: Network,
    latents: np.ndarray,
    schedule: diffusion.NoiseSchedule,
    pairs: Iterable[tuple[str, str]],
    *,
    bins: int,
    seed: int,
    batch_size: int,
    mesh,
    desc: str = "predicting",
) -> dict[str, np.ndarray]:
    """The measurements of `compare`, {name: float64[bins, n]}: every example once in each bin of timesteps.

    latents: float32[n, h, w, 4], scaled. Noise and timesteps (uniform within a bin) depend on `seed` alone, so all
    models get the same inputs. batch_size: a multiple of the number of devices in `mesh`, which split a batch.
    """
    edges, n = timestep_bins(len(schedule.alphas_cumprod), bins), len(latents)
    data = sharding.batch(mesh)
    modules = tuple((FrozenDict(network.modules), network.condition) for network in (student, teacher))
    params = student.params, teacher.params
    found: dict[str, list] = {}
    with progress.Bar(bins * n, desc, " predictions", first=progress.COMPILING) as bar:
        for k in range(bins):
            rng = np.random.default_rng([seed, k])
            noise = rng.standard_normal(latents.shape, np.float32)
            timesteps = rng.integers(edges[k], edges[k + 1], n).astype(np.int32)
            noisy_latents = np.asarray(diffusion.add_noise(schedule, latents, noise, timesteps))
            target = np.asarray(diffusion.target(schedule, latents, noise, timesteps))
            for start in range(0, n, batch_size):
                here = np.arange(start, start + batch_size).clip(max=n - 1)  # the last batch is padded
                put = lambda x, here=here: jax.device_put(x[here], data)
                values = compare(
                    modules,
                    params,
                    (jax.tree.map(put, student.inputs), jax.tree.map(put, teacher.inputs)),
                    put(noisy_latents),
                    put(timesteps),
                    put(target),
                    tuple(pairs),
                )
                real = min(batch_size, n - start)
                for name, value in jax.device_get(values).items():
                    found.setdefault(name, []).append(value[:real].astype(np.float64))
                bar.update(real)
    return {name: np.concatenate(parts).reshape(bins, n) for name, parts in found.items()}


def summary(values: dict[str, np.ndarray], whose: str = "") -> dict:
    """Means over examples and bins of the result of `errors`, as JSON numbers.

    {"loss_noise", "loss_output", "feature", "features": {module: float}, "by_timestep": {name: [a number per bin]}}.
    A feature's error is relative: its mean square over that of the teacher's feature. "feature" is the mean over the
    pairs, absent without pairs. whose: "teacher/" for the teacher's own row, which has "loss_noise" alone.
    """
    names = ["loss_noise"] if whose else ["loss_noise", "loss_output"]
    found = {name: float(values[whose + name].mean()) for name in names}
    found["by_timestep"] = {name: values[whose + name].mean(1).tolist() for name in names}
    modules = [] if whose else [n.partition("/")[2] for n in values if n.startswith("feature/")]
    if modules:
        of = lambda axis: [values[f"feature/{m}"].sum(axis) / values[f"square/{m}"].sum(axis) for m in modules]
        found["features"] = {m: float(x) for m, x in zip(modules, of(None), strict=True)}
        found["feature"] = float(np.mean(list(found["features"].values())))
        found["by_timestep"]["feature"] = np.mean(of(1), axis=0).tolist()
    return found


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio float64[n] of pictures uint8[n, H, W, 3], in dB: 10 log10(255^2 / mean square).

    At most PSNR_LIMIT, the value for equal pictures."""
    squares = np.square(a.astype(np.float64) - b.astype(np.float64)).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(squares, 255**2 / 10 ** (PSNR_LIMIT / 10)))


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity float64[n] of pictures uint8[n, H, W, 3], 1 for equal ones.

    Wang et al. 2004 ("Image quality assessment: from error visibility to structural similarity"): a Gaussian window
    of 11 pixels and standard deviation 1.5, K = 0.01 and 0.03, only where the window lies inside; mean over R, G, B.
    Raises ValueError for pictures smaller than the window."""
    height, width = a.shape[1:3]
    if min(height, width) < 11:
        raise ValueError(f"SSIM needs at least 11 x 11 pixels, these pictures have {height} x {width}")
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    rows, columns = (
        np.stack([np.pad(window, (i, size - 11 - i)) for i in range(size - 10)]) for size in (height, width)
    )
    blur = lambda x: rows @ x @ columns.T
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def one(x, y) -> float:  # one picture at a time: a thousand would not fit in memory
        x, y = (image.astype(np.float64).transpose(2, 0, 1) for image in (x, y))
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        return float(np.mean(above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))

    return np.array([one(x, y) for x, y in zip(a, b, strict=True)])


def latent_features(latents: np.ndarray) -> np.ndarray:
    """Latents [n, h, w, c] averaged over the cells of a grid: float64[n, GRID * GRID * c].

    Whole latents have more numbers (16,384 at 512 pixels) than there are pictures to estimate a covariance from.
    Raises ValueError for latents smaller than the grid."""
    n, h, w, c = latents.shape
    if min(h, w) < GRID:
        raise ValueError(f"latents of {h} x {w} are smaller than the grid of {GRID} x {GRID} cells")
    rows, columns = (np.arange(GRID) * size // GRID for size in (h, w))
    counts = np.outer(np.diff([*rows, h]), np.diff([*columns, w]))[None, :, :, None]
    sums = np.add.reduceat(np.add.reduceat(latents.astype(np.float64), rows, axis=1), columns, axis=2)
    return (sums / counts).reshape(n, GRID * GRID * c)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features float[n, d] and float[m, d].

        |mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))          Heusel et al. 2017, arXiv:1706.08500

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2), which stays exact for a singular
    covariance. On features of an autoencoder this is not FID. Like FID, it depends on the number of pictures: compare
    equal numbers only. Raises ValueError for fewer than two of either."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 pictures, there are {len(a)} and {len(b)}")
    a, b = np.float64(a), np.float64(b)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    overlap = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return max(float(distance), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
