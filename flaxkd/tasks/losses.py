"""A UNet's prediction for noisy latents, and its distance from the targets: the equation of distillation."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxkd.models.layers import FEATURES, features


class Prediction(NamedTuple):
    """A UNet's prediction for noisy latents. noise_pred: float[b, h, w, 4]; features: {module name: float[...]}."""

    noise_pred: jax.Array
    features: dict[str, jax.Array]


def predict(unet, params, noisy_latents, timesteps, condition: Mapping) -> Prediction:
    """A UNet's prediction, with all its features (unread ones cost nothing under jit). Traceable.

    noisy_latents: float[b, h, w, 4]; timesteps: int32[b]; condition: the keyword arguments that `Family.condition`
    makes from captions."""
    noise_pred, captured = unet.apply({"params": params}, noisy_latents, timesteps, **condition, mutable=[FEATURES])
    return Prediction(noise_pred, features(captured))


def mse(a, b, weights=None) -> jax.Array:
    """Mean squared error in float32, for equal shapes (broadcasting would hide a wrong pair). weights: [b] or None."""
    if a.shape != b.shape:
        raise ValueError(f"cannot compare {a.shape} with {b.shape}")
    errors = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
    if weights is not None:
        errors = errors * weights.reshape(-1, *[1] * (a.ndim - 1))
    return jnp.mean(errors)


def squares(a, b) -> jax.Array:
    """The mean squared error of each example, float32[b], of a and b [b, ...] of equal shapes."""
    return jax.vmap(mse)(a, b)


def pseudo_huber(a, b, c: float | None) -> jax.Array:
    """mean(sqrt((a - b)^2 + c^2) - c) in float32, for equal shapes: quadratic below c, linear above; None is `mse`."""
    if c is None or a.shape != b.shape:
        return mse(a, b)
    squares = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32))
    # The same number as by the difference, which would lose what is far below c.
    return jnp.mean(squares / (jnp.sqrt(squares + c**2) + c))


def relative_mse(student, teacher) -> jax.Array:
    """`mse` over the teacher's mean square: scale gives no feature more weight (LAPTOP-Diff, arXiv:2404.11098)."""
    return mse(student, teacher) / mse(teacher, jnp.zeros_like(teacher))


def token_mse(student, teacher) -> jax.Array:
    """The squared distance of tokens float[..., c] of unit length, from 0 to 4, on the mean (PPCL, arXiv:2511.16156).

    A token is a position; both sides lose their lengths, so that neither scale nor a few large tokens count for more.
    As in OPPO-Mente-Lab/Qwen-Image-Pruning, src/transformer_qwenimage_attn.py."""
    unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))
    return student.shape[-1] * mse(unit(student.astype(jnp.float32)), unit(teacher.astype(jnp.float32)))


# {config.normalize_features: what a pair of features adds to the loss}
FEATURE_TERMS = {False: mse, True: relative_mse, "token": token_mse}


def kd_loss(student: Prediction, teacher: Prediction, target, pairs, weight, *, noise_weights=None,
            normalize: bool | str = False) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The distillation loss (Kim et al. 2023, arXiv:2305.15798, equations 1 to 4; distill-sd's README).

        L = w_noise   mean|target - noise_S|^2
          + w_output  mean|noise_T - noise_S|^2
          + w_feature sum_l mean|f_T^l - f_S^l|^2

    target: float32[b, h, w, 4], the noise or v.
    pairs: ((student module, teacher module), ...). weight: has `.noise`, `.output`, `.feature`.
    noise_weights: float32[b] for the first term (Min-SNR), or None. normalize: a name in FEATURE_TERMS, the form of the
    terms of the sum; they are as above for False.
    Returns (L, {"loss", "loss_noise", "loss_output", "loss_feature", "feature/<student module>", ...}), float32
    scalars. Raises KeyError that names a module without a feature, ValueError for a pair of unequal shapes.
    """
    loss_noise = mse(student.noise_pred, target, noise_weights)
    term = FEATURE_TERMS[normalize]
    terms = {s: term(student.features[s], teacher.features[t]) for s, t in pairs}
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
