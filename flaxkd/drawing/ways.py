"""A teacher's ways from noise to picture: its latents at the ends of a few phases, drawn once and kept for training.

    FLAXKD_CACHE/ways/NAME/    a cache as data/records.py describes it, whose records are of `layout`

A way depends on its caption, the seed and its number alone: a killed run goes on at the unfinished file, and every
later run with the same teacher and settings reads what is there.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.core import FrozenDict

from flaxkd.data import encoding, loader, records, sources
from flaxkd.diffusion import sampling
from flaxkd.diffusion.weights import Schedule
from flaxkd.drawing import resumable
from flaxkd.machine import files, hosts, progress, sharding
from flaxkd.pretrained import Folder

SHARD = 256  # ways in a file, the most that a killed run loses
KIND = "moments"  # of the files: that of the reader in data/loader.py


class How(NamedTuple):
    """What ways are drawn with."""

    resolution: int  # pixels a side
    seed: int
    scheduler: dict  # scheduler_config.json of the teacher
    schedule: Schedule  # [phases, steps of a phase]
    guidance: tuple[float, float]  # sampled between the two for each way


def fields(folder: Folder, resolution: int, phases: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One example of what is read.

    ways: latents before the first phase, which are noise, and after each. guidance: of the teacher."""
    shape, size = folder.latent_shape(resolution), (resolution, resolution)
    conditions = folder.conditions([""], size)
    return {
        "ways": jax.ShapeDtypeStruct((phases + 1, *shape), np.float32),
        "guidance": jax.ShapeDtypeStruct((1,), np.float32),
        **{name: jax.ShapeDtypeStruct(x.shape[1:], np.int32) for name, x in conditions.items()},
    }


def layout(folder: Folder, resolution: int, phases: int) -> records.Layout:
    """The fields of a record. Latents are kept in float16, as the moments of pictures are."""
    known = fields(folder, resolution, phases)
    dtypes = {name: x.dtype.name for name, x in known.items()} | {"ways": "float16"}
    return records.Layout({name: (dtypes[name], x.shape) for name, x in known.items()})


def read(folder: Folder, pictures: sources.Source, n: int, how: How, dtype) -> loader.Records:
    """A reader of n ways, of captions of these pictures. Draws those that are missing, and shows progress.

    folder: of the teacher. dtype: of the compute. The first process draws."""
    captions = captions_of(pictures, n, how.seed)
    weights = {part: folder.params(part, dtype) for part in ("unet", *folder.family.encoders)}
    known = {"weights": resumable.fingerprint(weights), "captions": resumable.digest(captions), "n": n}
    known |= {"seed": how.seed, "resolution": how.resolution, "scheduler": how.scheduler, "guidance": how.guidance}
    known |= {"steps": how.schedule.timesteps.tolist(), "dtype": np.dtype(dtype).name, "format": records.FORMAT}
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]
    place = files.cache_home() / "ways" / name
    make = lambda: None if (place / "cache.json").is_file() else _make(place, folder, weights, captions, how, dtype)
    if hosts.is_first():
        make()
    hosts.wait(f"ways {name}")
    make()  # where processes do not share a cache
    return loader.Records(place)


def captions_of(pictures: sources.Source, n: int, seed: int) -> list[str]:
    """n captions: each once in an order of the seed, and then again. Of a large cache, those of the first n records."""
    known = pictures.captions
    if pictures.cache is not None:
        known = loader.Records(pictures.cache).captions(n)
    size = len(pictures if known is None else known)
    rounds = [np.random.default_rng([seed, i]).permutation(size) for i in range(-(-n // size))]
    order = np.concatenate(rounds)[:n].tolist()
    return [pictures[i]["caption"] if known is None else known[i] for i in order]


def _make(place: Path, folder: Folder, weights: dict, captions: Sequence[str], how: How, dtype) -> None:
    place.mkdir(parents=True, exist_ok=True)
    n, mesh = len(captions), sharding.local_mesh()
    shards, of_records = -(-n // SHARD), layout(folder, how.resolution, len(how.schedule.timesteps))
    modules = FrozenDict({part: folder.module(part, dtype) for part in weights})
    params = sharding.put(weights, sharding.replicated(mesh))
    with progress.Bar(n, "drawing the teacher's ways", " ways", first=progress.COMPILING) as bar:
        for shard in range(shards):
            numbers = range(shard * SHARD, min((shard + 1) * SHARD, n))
            file = place / records.shard_name(KIND, shard, shards)
            if file.is_file():
                bar.skip(len(numbers))
                continue
            with records.writer(file) as write:
                for i, way in _drawn(folder, modules, params, captions, numbers, how, mesh):
                    write(of_records.pack(way, captions[i]))
                    bar.update()
    about = {"format": records.FORMAT, "size": n, "shards": shards, "flip": False, "fields": of_records.fields}
    files.write_json(place / "cache.json", about)


def _drawn(folder: Folder, modules, params, captions, numbers: range, how: How, mesh) -> Iterator[tuple[int, dict]]:
    """(number, fields of its record) of these ways."""
    size = how.resolution, how.resolution
    each = encoding.at_a_time([size]) * mesh.size
    put = lambda tree: jax.device_put(tree, sharding.batch(mesh))
    for start in range(0, len(numbers), each):
        chosen = list(numbers[start : start + each])
        full = chosen + chosen[-1:] * (each - len(chosen))  # one compiled program
        inputs = folder.conditions([captions[i] for i in full], size)
        rngs = [np.random.default_rng([how.seed, i]) for i in full]
        shape = folder.latent_shape(how.resolution)
        # As it is kept: the teacher begins where the student will.
        noise = np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]).astype(np.float16)
        guidance = np.float32([rng.uniform(*how.guidance) for rng in rngs])
        ends = sampling.ends(
            modules,
            folder.family.condition,
            params,
            put(inputs),
            put(folder.conditions([None] * each, size)),
            put(noise.astype(np.float32)),
            how.schedule,
            put(guidance),
        )
        ways = np.concatenate([noise[:, None], np.asarray(ends).astype(np.float16)], axis=1)
        _check(ways)
        for k, i in enumerate(chosen):
            yield i, {"ways": ways[k], "guidance": guidance[k : k + 1]} | {name: x[k] for name, x in inputs.items()}


def _check(ways: np.ndarray) -> None:
    if not np.isfinite(ways).all():
        raise ValueError("the teacher's latents are not finite in float16: give --config.dtype=float32")
