"""Pictures are encoded once: what the train step reads are the moments of their latents and the token ids of their
captions, made on the accelerator before the first step and kept for every later run with the same inputs.
"""

import functools
import hashlib
from pathlib import Path

import jax
import numpy as np

from flaxkd import hosts, pretrained, sharding
from flaxkd.data import cache, sources

BATCH = 16  # images per device


def fingerprint(source: Path) -> str:
    """Of all in a pipeline folder that decides over moments and token ids: autoencoder and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted([*(source / "vae").iterdir(), *(source / "tokenizer").iterdir()]):
        if path.suffix in (".json", ".txt", ".safetensors"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@functools.partial(jax.jit, static_argnames="vae")
def moments(vae, params, images) -> jax.Array:
    """Moments float[b, h, w, 2c] of pictures uint8[b, H, W, 3], by an autoencoder."""
    return vae.apply({"params": params}, images.astype(np.float32) / 127.5 - 1, method="encode")


def ensure(config, pictures: sources.Source, split: str, source: Path, dtype, tokenizer) -> Path:
    """The cache of the pictures of a split ("train" or "validation"); made, with progress, if it is not there.

    source: the pipeline folder whose autoencoder encodes, in `dtype`. Every process encodes its share of the files on
    its own devices, and all wait for the last; if their FLAXKD_CACHE is not one folder, each then makes its own whole.
    """
    mesh = sharding.local_mesh()
    vae = pretrained.build("vae", pretrained.read_config(source, "vae"), dtype)
    data = sharding.batch(mesh)
    if config.data.resolution % vae.config.factor:
        raise ValueError(
            f"data.resolution = {config.data.resolution} pixels is no multiple of {vae.config.factor}, the size of a "
            "latent of this autoencoder"
        )

    @functools.cache
    def params():  # read only if there is something to encode
        return jax.device_put(pretrained.load(source, "vae", dtype)[1], sharding.replicated(mesh))

    def encode(images: np.ndarray) -> np.ndarray:
        return np.asarray(moments(vae, params(), jax.device_put(images, data)))

    made = cache.ensure(
        pictures,
        sources.cache_home() / "latents",
        encode=encode,
        tokenize=lambda captions: pretrained.tokenize(tokenizer, captions),
        batch_size=BATCH * mesh.size,
        fingerprint=f"{fingerprint(source)}-{np.dtype(dtype).name}",
        flip=config.data.random_flip and split == "train",
        progress=hosts.is_first(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        wait=lambda: hosts.wait(f"shares of {split}"),
    )
    hosts.wait(f"latents of {split}")  # or a device would wait for a host that still encodes
    return made
