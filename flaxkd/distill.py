"""Distillation: the loss of BK-SDM and of Segmind's distill-sd, and the task that the trainer runs on it.

The same task without a student trains a whole UNet (and text encoder) on the noise alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxkd import blank, diffusion, pretrained, students
from flaxkd.models.attention import DotProductAttention
from flaxkd.models.layers import FEATURES, features
from flaxkd.models.vae import sample_latents
from flaxkd.training.step import Task


class Prediction(NamedTuple):
    """What a UNet says of noisy latents. noise_pred: float[b, h, w, 4]; features: {module name: float[...]}."""

    noise_pred: jax.Array
    features: dict[str, jax.Array]


def mse(a, b, weights=None) -> jax.Array:
    """Mean of squares in float32, of equal shapes (broadcasting would hide a wrong pair). weights: [b] or None."""
    if a.shape != b.shape:
        raise ValueError(f"cannot compare {a.shape} with {b.shape}")
    squares = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
    if weights is not None:
        squares = squares * weights.reshape(-1, *[1] * (a.ndim - 1))
    return jnp.mean(squares)


def kd_loss(student: Prediction, teacher: Prediction | None, target, pairs, weight, *, noise_weights=None,
            normalize: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The distillation loss (Kim et al. 2023, arXiv:2305.15798, equations 1 to 4; distill-sd's README).

        L = w_noise   mean|target - noise_S|^2
          + w_output  mean|noise_T - noise_S|^2
          + w_feature sum_l mean|f_T^l - f_S^l|^2

    target: float32[b, h, w, 4], the noise or v. teacher: None if there is none; then L is its first term.
    pairs: ((student module, teacher module), ...). weight: has `.noise`, `.output`, `.feature`.
    noise_weights: float32[b] for the first term (Min-SNR), or None. normalize: divides each term of the sum by
    mean|f_T^l|^2, so that no block outweighs the others by its scale alone (LAPTOP-Diff, arXiv:2404.11098).
    Returns (L, {"loss", "loss_noise", "loss_output", "loss_feature", "feature/<student module>", ...}), float32
    scalars. Raises KeyError naming a module that captured nothing, ValueError for a pair of unequal shapes.
    """
    loss_noise = mse(student.noise_pred, target, noise_weights)
    if teacher is None:
        return loss_noise, {"loss": loss_noise, "loss_noise": loss_noise}
    terms = {s: mse(student.features[s], teacher.features[t]) for s, t in pairs}
    if normalize:
        terms = {
            s: terms[s] / mse(teacher.features[t], jnp.zeros_like(teacher.features[t])) for s, t in pairs
        }
    loss_output = mse(student.noise_pred, teacher.noise_pred)
    loss_feature = sum(terms.values(), jnp.zeros(()))
    loss = weight.noise * loss_noise + weight.output * loss_output + weight.feature * loss_feature
    metrics = {
        "loss": loss,
        "loss_noise": loss_noise,
        "loss_output": loss_output,
        "loss_feature": loss_feature,
    }
    return loss, metrics | {f"feature/{s}": term for s, term in terms.items()}


def predict(unet, params, noisy_latents, timesteps, states) -> Prediction:
    """What a UNet says, with all its features (those that nobody reads cost nothing under jit). Traceable.

    noisy_latents: float[b, h, w, 4]; timesteps: int32[b]; states: float[b, l, d], of the text encoder."""
    noise_pred, captured = unet.apply(
        {"params": params}, noisy_latents, timesteps, states, mutable=[FEATURES]
    )
    return Prediction(noise_pred, features(captured))


class Inputs(NamedTuple):
    """What both UNets see, and what they should say. The leaves have the batch as first axis."""

    noisy_latents: jax.Array  # float32[b, h, w, 4]
    timesteps: jax.Array  # int32[b]
    input_ids: jax.Array  # int32[b, l]
    target: jax.Array  # float32[b, h, w, 4]
    noise_weights: jax.Array  # float32[b]


def prepare(key, batch, *, schedule: diffusion.NoiseSchedule, scaling_factor: float, empty_ids: np.ndarray,
            caption_dropout: float, noise_offset: float, snr_gamma: float | None,
            timestep_sampling: str = "uniform") -> Inputs:  # fmt: skip
    """Draws latents, noise, timesteps and which captions are dropped for {"moments", "input_ids"}."""
    moments, input_ids = batch["moments"], batch["input_ids"]
    b = moments.shape[0]
    key_latents, key_noise, key_offset, key_timesteps, key_dropout = jax.random.split(key, 5)
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    latents = sample_latents(jax.random.normal(key_latents, shape), moments, scaling_factor)
    noise = jax.random.normal(key_noise, shape)
    if noise_offset:  # a shift of whole channels, so that very dark and very bright pictures can be learnt
        noise += noise_offset * jax.random.normal(key_offset, (b, 1, 1, latents.shape[-1]))
    weighted = timestep_sampling == "uniform" and snr_gamma is not None
    timesteps = diffusion.draw_timesteps(key_timesteps, schedule, b, None if weighted else snr_gamma)
    if caption_dropout:
        dropped = jax.random.bernoulli(key_dropout, caption_dropout, (b, 1))
        input_ids = jnp.where(dropped, jnp.asarray(empty_ids), input_ids)
    return Inputs(
        diffusion.add_noise(schedule, latents, noise, timesteps),
        timesteps,
        input_ids,
        diffusion.target(schedule, latents, noise, timesteps),
        diffusion.min_snr_weights(schedule, timesteps, snr_gamma) if weighted else jnp.ones(b, jnp.float32),
    )


def task(config, source, dtype, tokenizer, mesh=None, load=pretrained.load) -> Task:
    """The task that a configuration describes. source: the teacher's pipeline folder; dtype: of the compute.

    mesh: the devices that it will run on, for the kernels that are theirs; None: any, without.
    load(source, part) -> (module, params): where the weights come from, which may be tracers (see plan.py).

    Without `config.student` the teacher's own UNet is trained on the noise alone. `config.train` names the parts
    that learn: ("unet",) or ("unet", "text_encoder")."""
    unknown = set(config.train) - {"unet", "text_encoder"}
    if unknown or "unet" not in config.train:
        raise ValueError(
            f"train = {tuple(config.train)}: the parts are 'unet' and, with it, 'text_encoder'; or 'vae'"
        )
    if config.timestep_sampling not in ("uniform", "min_snr"):
        raise ValueError(
            f"timestep_sampling = {config.timestep_sampling!r} is neither 'uniform' nor 'min_snr'"
        )
    if config.timestep_sampling == "min_snr" and config.snr_gamma is None:
        raise ValueError(
            "timestep_sampling = 'min_snr' draws by the weights of snr_gamma: give it, 5.0 is usual"
        )
    teacher_config = pretrained.read_config(source, "unet")
    teacher_module, teacher_params = load(source, "unet")
    text_encoder, text_params = load(source, "text_encoder")
    unet_config = teacher_config
    if config.student:
        student = students.get(config.student)
        unet_config = students.config(student, teacher_config)
    attend = DotProductAttention(mesh, config.attention)
    unet = pretrained.build("unet", unet_config, dtype, remat=config.remat, attend=attend)
    shapes = pretrained.shapes(unet, "unet")

    params, frozen, pairs = {"unet": teacher_params}, {}, ()
    if config.student:
        pairs = students.feature_pairs(student, config.pairing)
        params = {"unet": students.take(student, teacher_params, shapes)}
        frozen["teacher"] = teacher_params
        teacher_module = teacher_module.clone(dtype=dtype, attend=attend)
    if config.init == "random":
        params["unet"] = blank.initial(shapes, config.seed, blank.ZERO)
    elif config.init != "teacher":
        raise ValueError(f"init = {config.init!r} is unknown (known: 'teacher', 'random')")
    (params if "text_encoder" in config.train else frozen)["text_encoder"] = text_params
    text_encoder = text_encoder.clone(dtype=dtype)
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)

    schedule = diffusion.NoiseSchedule.from_config(
        pretrained.read_config(source, "scheduler"), config.prediction_type
    )
    scaling_factor = pretrained.build("vae", pretrained.read_config(source, "vae")).config.scaling_factor
    empty_ids = pretrained.tokenize(tokenizer, [""])[0]

    def draw(key, batch):
        return prepare(
            key,
            batch,
            schedule=schedule,
            scaling_factor=scaling_factor,
            empty_ids=empty_ids,
            caption_dropout=config.caption_dropout,
            noise_offset=config.noise_offset,
            snr_gamma=config.snr_gamma,
            timestep_sampling=config.timestep_sampling,
        )

    def loss(params, frozen, inputs: Inputs):
        text = params.get("text_encoder", frozen.get("text_encoder"))
        states = text_encoder.apply({"params": text}, inputs.input_ids)
        seen = inputs.noisy_latents, inputs.timesteps, states
        teacher = predict(teacher_module, frozen["teacher"], *seen) if config.student else None
        return kd_loss(
            predict(unet, params["unet"], *seen),
            teacher,
            inputs.target,
            pairs,
            config.weight,
            noise_weights=inputs.noise_weights,
            normalize=config.normalize_features,
        )

    configs = {part: pretrained.read_config(source, part) for part in config.train} | {"unet": unet_config}
    return Task(params, frozen, draw, loss, configs)
