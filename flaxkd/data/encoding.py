"""Pictures are encoded once. The train step reads the moments of their latents, the token ids of their captions and
their sizes, computed on the accelerator before the first step and reused by every later run with the same inputs.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flaxkd.data import buckets, filters, loader, masks, records, sources
from flaxkd.machine import files, hosts, sharding
from flaxkd.pretrained import Folder, families

BATCH = 16  # images per device, at most
# Their pixels, at most. As compiled for a CPU in float32, Stable Diffusion's encoder needs 6 GiB of temporaries for 16
# pictures of 512 pixels, and 33 for 16 of 1024.
PIXELS = BATCH * 512**2


def at_a_time(sizes: Iterable[tuple[int, int]]) -> int:
    """The images that a device encodes, or draws, at a time. sizes: (height, width) in pixels."""
    return max(1, min(BATCH, PIXELS // max(height * width for height, width in sizes)))


def open_data(batch: Iterable[str], config, pictures: sources.Source, split: str, folder: Folder, dtype):
    """The examples of a split, as a reader of loader.py with the fields of a task's `batch`.

    folder: the teacher's. Its autoencoder and tokenizer encode, in `dtype`. Raises ValueError for fields that no
    reader has, and like `ensure`."""
    fields = tuple(batch)
    if {*fields} <= {*loader.Pictures.fields}:
        return loader.Pictures(pictures, fields)
    known = (*encoded(folder), *folder.family.captions.values(), "time_ids")
    if {*fields} <= {*known}:
        return loader.Records(ensure(config, pictures, split, folder, dtype), fields)
    raise ValueError(f"a task's batch names {fields}, but a reader has {loader.Pictures.fields} or {known}")


def fingerprint(folder: Folder) -> str:
    """Hash of everything in a pipeline folder that determines moments and token ids: autoencoder and tokenizer."""
    digest = hashlib.sha256()
    for part in (*(families.TOKENIZERS[field] for field in folder.family.captions.values()), "vae"):
        if part in folder.readers:
            for name, content in _contents(folder, part):
                digest.update(name.encode())
                digest.update(content)
            continue
        where = folder.place(part)
        for path in sorted(where.iterdir()):
            if path.suffix in (".json", ".txt", ".safetensors"):
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _contents(folder: Folder, part: str) -> Iterator[tuple[str, bytes]]:
    """The same of a part that is in no folder of diffusers: of a single file, or another autoencoder."""
    if part != "vae":
        yield "tokenizer.json", folder.readers[part]().backend_tokenizer.to_str().encode()
    else:
        yield "config.json", json.dumps(folder.config(part), sort_keys=True).encode()
        for key, array in sorted(folder.tensors(part).items()):
            yield key, np.ascontiguousarray(array).tobytes()


def encoder_fingerprint(folder: Folder, dtype) -> str:
    """`fingerprint` with the precision, as recorded in a cache. dtype: as for `encoder`."""
    return f"{fingerprint(folder)}-{np.dtype(folder.dtype('vae', dtype)).name}"


@sharding.jit(static_argnames="vae")
def moments(vae, params, images) -> jax.Array:
    """Moments float[b, h, w, 2c] of pictures uint8[b, H, W, 3], from an autoencoder."""
    return vae.apply({"params": params}, images.astype(np.float32) / 127.5 - 1, method="encode")


@sharding.jit(static_argnames="vae")
def masked_latents(vae, params, images, masks) -> jax.Array:
    """Unscaled latents float[b, h, w, c] of pictures uint8[b, H, W, 3] that are grey where masks bool[b, H, W] are
    True: the mean of their posterior."""
    seen = jnp.where(masks[..., None], 0, images.astype(np.float32) / 127.5 - 1)
    return jnp.split(vae.apply({"params": params}, seen, method="encode"), 2, axis=-1)[0]


def encoded(folder: Folder) -> dict[str, tuple]:
    """The fields of a record that come from pixels, as in a `records.Layout`."""
    return records.MOMENTS | {name: masks.FIELDS[name] for name in folder.beside}


def encode(vae, params, images: np.ndarray, fields: Iterable[str], put: Callable) -> dict[str, jax.Array]:
    """{field: array [b, ...]} of pictures uint8[b, H, W, 3]. fields: those of `encoded`. put: onto the devices."""
    on_devices = put(images)
    found = {"moments": moments(vae, params, on_devices)}
    if "masks" not in fields:
        return found
    drawn, factor = np.stack([masks.of_picture(image) for image in images]), vae.config.factor
    latents = [masked_latents(vae, params, on_devices, put(drawn[:, k])) for k in range(masks.MASKS)]
    return found | {
        "masks": drawn[:, :, ::factor, ::factor, None].astype(np.uint8),
        "masked_latents": jnp.stack(latents, axis=1),
    }


def encoder(folder: Folder, dtype, mesh) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """uint8[b, H, W, 3] -> {field of `encoded`: array [b, ...]}, by the autoencoder of a pipeline folder.

    It computes in `dtype`, or as `Folder.dtype` says. b is a multiple of the number of devices in `mesh`, which split
    the batch. The first call reads the weights."""
    vae, data = folder.module("vae", dtype), sharding.batch(mesh)

    @functools.cache
    def params():
        return jax.device_put(folder.params("vae", dtype), sharding.replicated(mesh))

    return lambda images: encode(vae, params(), images, encoded(folder), lambda x: jax.device_put(x, data))


def ensure(config, pictures: sources.Source, split: str, folder: Folder, dtype) -> os.PathLike:
    """The cache of a split's pictures ("train" or "validation"). Builds a missing cache, and shows progress.

    folder: its autoencoder encodes, in `dtype`. Every process encodes its share of the files on its own devices, then
    waits for the others. If they do not share one FLAXKD_CACHE folder, each then completes its own cache.
    Raises ValueError if a prebuilt cache does not fit the folder or the configuration."""
    check_sizes(folder, config.data.resolution, sizes(config), "data.")
    if pictures.cache is not None:
        check_made_before(config, pictures.cache, split, folder)
        return pictures.cache
    mesh = sharding.local_mesh()
    made = records.ensure(
        pictures,
        files.cache_home() / "latents",
        encode=encoder(folder, dtype, mesh),
        encoded=encoded(folder),
        tokenize=folder.tokenize,
        batch_size=at_a_time(sizes(config)) * mesh.size,
        fingerprint=encoder_fingerprint(folder, dtype),
        flip=config.data.random_flip and split == "train",
        progress=hosts.is_first(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        wait=lambda: hosts.wait(f"shares of {split}"),
    )
    hosts.wait(f"latents of {split}")  # otherwise a device would wait for a host that is still encoding
    return made


def sizes(config) -> tuple[tuple[int, int], ...]:
    """The (height, width) in pixels of a training's pictures."""
    return buckets.sizes(config.data.buckets, config.data.resolution)


def check_sizes(folder: Folder, resolution: int, sizes: Iterable[tuple[int, int]], group: str) -> None:
    """Raises ValueError unless each side of these pictures holds a whole number of latents.

    group: before the name of an option, such as "data." or "--"."""
    folder.check_resolution(resolution, f"{group}resolution")
    for side in sorted({side for size in sizes for side in size}):
        folder.check_resolution(side, f"{group}buckets")


def check_made_before(config, made: os.PathLike, split: str, folder: Folder) -> None:
    """Raises ValueError unless a cache built by flaxkd.cache fits the configuration and the folder."""
    about = records.read_about(made)
    if about["resolution"] != config.data.resolution:
        raise ValueError(
            f"{made} has pictures of {about['resolution']} pixels, data.resolution is {config.data.resolution}: change "
            "the setting, or build another cache"
        )
    there = buckets.sizes(about.get("buckets"), about["resolution"])
    if there != sizes(config):
        raise ValueError(
            f"{made} has pictures of the sizes {there}, data.buckets asks for {sizes(config)}: change the setting, or "
            "build another cache with `python -m flaxkd.cache --buckets`"
        )
    for key, here in (("background", config.data.background), ("caption_column", config.data.caption_column)):
        there = about.get(key, getattr(filters.Recipe, key))  # a cache of an earlier version has neither
        if here not in (there, None):
            raise ValueError(
                f"{made} was made with {key} {there!r}, data.{key} is {here!r}: change the setting, or build another "
                f"cache with `python -m flaxkd.cache --{key.replace('_', '-')}`"
            )
    encoder, _, _ = about["encoder"].partition("-")  # the rest is the precision, which may differ
    if encoder != fingerprint(folder):
        raise ValueError(
            f"{made} was made with another autoencoder or tokenizer than {folder.path} has: build a cache "
            "for this teacher with `python -m flaxkd.cache --teacher`"
        )
    if config.data.random_flip and split == "train" and not about["flip"]:
        raise ValueError(
            f"{made} has no mirrored pictures, which data.random_flip needs: set it to False, or build a cache with "
            "`python -m flaxkd.cache --flip`"
        )
