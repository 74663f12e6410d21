"""Pictures are encoded once: what the train step reads are the moments of their latents and the token ids of their
captions, made on the accelerator before the first step and kept for every later run with the same inputs.
"""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from flaxkd import pretrained
from flaxkd.data import records, sources
from flaxkd.machine import files, hosts, sharding

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


def encoder_fingerprint(source: Path, dtype) -> str:
    """The same and the precision, as a cache notes them."""
    return f"{fingerprint(source)}-{np.dtype(dtype).name}"


def resolution(source: Path) -> int:
    """Pixels of a side that the UNet of a pipeline folder was made for."""
    unet, vae = (
        pretrained.build(part, pretrained.read_config(source, part)).config for part in ("unet", "vae")
    )
    return unet.sample_size * vae.factor


@sharding.jit(static_argnames="vae")
def moments(vae, params, images) -> jax.Array:
    """Moments float[b, h, w, 2c] of pictures uint8[b, H, W, 3], by an autoencoder."""
    return vae.apply({"params": params}, images.astype(np.float32) / 127.5 - 1, method="encode")


def encoder(source: Path, dtype, mesh) -> Callable[[np.ndarray], jax.Array]:
    """uint8[b, H, W, 3] -> moments float[b, h, w, 2c], by the autoencoder of a pipeline folder, in `dtype`.

    b is a multiple of the devices of `mesh`, all of which work. The weights are read at the first call."""
    vae = pretrained.build("vae", pretrained.read_config(source, "vae"), dtype)
    data = sharding.batch(mesh)

    @functools.cache
    def params():
        return jax.device_put(pretrained.load(source, "vae", dtype)[1], sharding.replicated(mesh))

    return lambda images: moments(vae, params(), jax.device_put(images, data))


def check_resolution(source: Path, resolution: int, name: str) -> None:
    """Raises ValueError, by the name of the option, unless pictures of so many pixels are whole latents."""
    factor = pretrained.build("vae", pretrained.read_config(source, "vae")).config.factor
    if resolution % factor:
        raise ValueError(
            f"{name} = {resolution} pixels is no multiple of {factor}, the size of a latent of this autoencoder"
        )


def ensure(config, pictures: sources.Source, split: str, source: Path, dtype, tokenizer) -> os.PathLike:
    """The cache of the pictures of a split ("train" or "validation"); made, with progress, if it is not there.

    source: the pipeline folder whose autoencoder encodes, in `dtype`. Every process encodes its share of the files on
    its own devices, and all wait for the last; if their FLAXKD_CACHE is not one folder, each then makes its own whole.
    Raises ValueError if a cache that was made before does not fit the folder or the configuration."""
    check_resolution(source, config.data.resolution, "data.resolution")
    if pictures.cache is not None:
        check_made_before(config, pictures.cache, split, source)
        return pictures.cache
    mesh = sharding.local_mesh()
    made = records.ensure(
        pictures,
        files.cache_home() / "latents",
        encode=encoder(source, dtype, mesh),
        tokenize=lambda captions: pretrained.tokenize(tokenizer, captions),
        batch_size=BATCH * mesh.size,
        fingerprint=encoder_fingerprint(source, dtype),
        flip=config.data.random_flip and split == "train",
        progress=hosts.is_first(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        wait=lambda: hosts.wait(f"shares of {split}"),
    )
    hosts.wait(f"latents of {split}")  # or a device would wait for a host that still encodes
    return made


def check_made_before(config, made: os.PathLike, split: str, source: Path) -> None:
    """Raises ValueError unless a cache of flaxkd.cache has what the configuration asks for."""
    about = records.read_about(made)
    if about["resolution"] != config.data.resolution:
        raise ValueError(
            f"{made} has pictures of {about['resolution']} pixels, data.resolution is {config.data.resolution}: set it "
            "to what the cache has, or make another cache"
        )
    encoder, _, _ = about["encoder"].partition("-")  # the rest is the precision, which is a choice
    if encoder != fingerprint(source):
        raise ValueError(
            f"{made} was made with another autoencoder or tokenizer than {source} has: make a cache with "
            "`python -m flaxkd.cache --teacher` and this teacher"
        )
    if config.data.random_flip and split == "train" and not about["flip"]:
        raise ValueError(
            f"{made} has no mirrored pictures, which data.random_flip asks for: set it to False, or make a cache with "
            "`python -m flaxkd.cache --flip`"
        )
