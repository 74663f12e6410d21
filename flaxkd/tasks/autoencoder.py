"""Training the autoencoder: from pixels to the UNet's latents and back to pixels."""

import jax
import jax.numpy as jnp
import numpy as np

from flaxkd.data import encoding
from flaxkd.models.vae import sample_latents
from flaxkd.pretrained import Folder
from flaxkd.training.task import Task


def task(config, folder: Folder, dtype, mesh=None) -> Task:
    """Trains the autoencoder of a pipeline folder on {"images": uint8[b, H, W, 3]}. dtype: of the compute."""
    vae, vae_config = folder.module("vae", dtype), folder.config("vae")

    def prepare(key, batch):
        images = batch["images"].astype(jnp.float32) / 127.5 - 1
        shape = (len(images), *folder.latent_shape(images.shape[1]))
        return images, jax.random.normal(key, shape, jnp.float32)

    def loss(trained, frozen, average, inputs):
        images, noise = inputs
        variables = {"params": trained["vae"]}
        moments = vae.apply(variables, images, method="encode")
        reconstruction = vae.apply(variables, sample_latents(noise, moments, 1.0), method="decode")
        return vae_loss(reconstruction, images, moments, config.kl_weight)

    def finish(trained, held_out):
        measured = scaling_factor(folder, trained["vae"], held_out["images"])
        return {"vae": vae_config | {"scaling_factor": measured}}

    pixels = config.data.resolution
    return Task(
        batch={"images": jax.ShapeDtypeStruct((pixels, pixels, 3), jnp.uint8)},
        trained={"vae": folder.params("vae")},
        frozen={},
        prepare=prepare,
        loss=loss,
        configs={"vae": vae_config},
        finish=finish,
    )


def vae_loss(reconstruction, images, moments, kl_weight: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = mean|e| + mean e^2 + (mean|e_rows| + mean|e_columns|) / 2 + kl_weight mean KL(posterior, unit Gaussian)

    e is the error of images float[b, H, W, 3] in [-1, 1]; e_rows and e_columns are its differences along rows and
    columns. They keep outlines sharp without the extra network of the perceptual loss of Rombach et al. 2022.
    moments: float[b, h, w, 2c]. Returns (L, metrics)."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    error = reconstruction.astype(jnp.float32) - images
    loss_absolute, loss_square = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    loss_edge = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2)) / 2
    loss_kl = jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / 2
    loss = loss_absolute + loss_square + loss_edge + kl_weight * loss_kl
    psnr = 10 * jnp.log10(4 / loss_square)  # in decibels; the images span a range of 2
    terms = {
        "loss_absolute": loss_absolute,
        "loss_square": loss_square,
        "loss_edge": loss_edge,
        "loss_kl": loss_kl,
    }
    return loss, {"loss": loss, **terms, "psnr": psnr}


def scaling_factor(folder: Folder, params: dict, images) -> float:
    """The factor that scales the latents of `images` uint8[b, H, W, 3] to unit variance.

    As in Rombach et al. 2022, section 4.3.1. folder: holds the autoencoder's configuration. params: its trained
    parameters."""
    vae, n = folder.module("vae"), encoding.BATCH  # pictures at a time: all of them may not fit
    moments = [np.asarray(encoding.moments(vae, params, images[i : i + n])) for i in range(0, len(images), n)]
    mean, _ = np.split(np.concatenate(moments), 2, axis=-1)
    return round(float(1 / np.std(mean)), 5)
