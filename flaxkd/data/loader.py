"""Batches of a latent cache, by Grain: shuffled, endless, deterministic, with a position to save."""

import re
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from flaxkd.data import cache as caches


def batches(
    cache: Path,
    batch_size: int,
    seed: int,
    *,
    variants: str | None = None,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Endless iterator of {"moments": float32[b, h, w, 2c], "input_ids": int32[b, l]}.

    Every epoch has each example once, in an order of its own that depends on the seed alone; a batch may
    reach into the next epoch. If the cache has mirrored pictures, one of the two is drawn each time. If
    variants (a regular expression) is given, so is one of those whose captions differ only in what it matches.

    batch_size is the global one, of which a process reads its own `rows` (None: all), in their order: the global
    batch is the same for any number of processes. The position is `get_state()`, a dict that JSON can hold and
    that is the same for any rows, and `set_state(state)`.
    """
    about = caches.read_about(cache)
    size, flip = about["size"], about["flip"]
    records = _records(cache, about, "moments")
    mirrored = _records(cache, about, "flipped") if flip else None
    families = np.arange(size)[:, None] if variants is None else _families(records, variants)

    def choose(family: int, rng: np.random.Generator) -> int:
        index = int(rng.choice(families[family]))
        return index + size * int(flip and rng.integers(2))  # mirrored pictures count from `size` on

    def load(indices: np.ndarray) -> dict:
        mine = _own(indices, rows).tolist()
        return _stack([records[i] if i < size else mirrored[i - size] for i in mine])

    # Numbers are shuffled, not pictures: each process sees the whole batch's, and reads only its own rows.
    order = grain.MapDataset.range(len(families)).seed(seed).shuffle().repeat().random_map(choose)
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(order.batch(batch_size).map(load).to_iter_dataset(options))


def images(source, batch_size: int, seed: int, *, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
    """The same for the pictures of a source: {"images": uint8[b, r, r, 3]}, for training an autoencoder."""

    def load(indices: np.ndarray) -> dict:
        return {"images": np.stack([source[int(i)]["image"] for i in _own(indices, rows)])}

    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(order.batch(batch_size).map(load).to_iter_dataset(options))


def examples(cache: Path, n: int) -> dict:
    """The first n examples (all, if there are fewer) in one batch, with their captions.

    {"moments": float32[n, h, w, 2c], "input_ids": int32[n, l], "captions": list of n str}
    """
    about = caches.read_about(cache)
    records = _records(cache, about, "moments")
    found = [records[i] for i in range(min(n, about["size"]))]
    return {**_stack(found), "captions": [caches.unpack(record)["caption"] for record in found]}


def _own(indices: np.ndarray, rows: Sequence[int] | None) -> np.ndarray:
    return indices if rows is None else indices[np.asarray(rows)]


def _records(cache: Path, about: dict, kind: str) -> grain.sources.ArrayRecordDataSource:
    shards = about["shards"]
    files = [str(Path(cache) / caches.shard_name(kind, shard, shards)) for shard in range(shards)]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise FileNotFoundError(f"the cache lacks {', '.join(missing)}: delete {cache} and run again")
    records = grain.sources.ArrayRecordDataSource(files)
    if len(records) != about["size"]:
        size = about["size"]
        raise ValueError(f"{cache} has {len(records)} {kind}, its cache.json says {size}: delete the folder")
    return records


def _families(records, variants: str) -> list[list[int]]:
    """The numbers of the records, those together whose captions are equal without what `variants` matches."""
    families = {}
    for index in range(len(records)):
        caption = caches.unpack(records[index])["caption"]
        families.setdefault(re.sub(variants, "", caption), []).append(index)
    return list(families.values())


def _stack(records: list[bytes]) -> dict:
    found = [caches.unpack(record) for record in records]
    return {name: np.stack([example[name] for example in found]) for name in ("moments", "input_ids")}
