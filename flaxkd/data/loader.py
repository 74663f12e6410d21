"""Batches of a latent cache, by Grain: shuffled, endless, deterministic, with a position to save."""

import re
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from etils import epath

from flaxkd.data import records as caches


def batches(
    cache: Path,
    batch_size: int,
    seed: int,
    *,
    variants: str | None = None,
    flip: bool | None = None,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Endless iterator of {"moments": float32[b, h, w, 2c], "input_ids": int32[b, l]}.

    Every epoch has each example once, in an order of its own that depends on the seed alone; a batch may
    reach into the next epoch. If the cache has mirrored pictures (and flip is not False), one of the two is
    drawn each time. If variants (a regular expression) is given, so is one of those whose captions differ only
    in what it matches.

    batch_size is the global one, of which a process reads its own `rows` (None: all), in their order: the global
    batch is the same for any number of processes. The position is `get_state()`, a dict that JSON can hold and
    that is the same for any rows, and `set_state(state)`.
    """
    about = caches.read_about(cache)
    size, flip = about["size"], about["flip"] and flip is not False
    records = _records(cache, about, "moments")
    mirrored = _records(cache, about, "flipped") if flip else None
    families = None if variants is None else _families(records, variants)

    def choose(family: int, rng: np.random.Generator) -> int:
        index = family if families is None else int(rng.choice(families[family]))
        return index + size * int(flip and rng.integers(2))  # mirrored pictures count from `size` on

    def load(indices: np.ndarray) -> dict:
        mine = _own(indices, rows).tolist()
        return _stack([records[i] if i < size else mirrored[i - size] for i in mine])

    # Numbers are shuffled, not pictures: each process sees the whole batch's, and reads only its own rows.
    order = grain.MapDataset.range(size if families is None else len(families)).seed(seed).shuffle().repeat()
    if flip or families is not None:  # else it would cost a fifth of the time for nothing
        order = order.random_map(choose)
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
    folder = epath.Path(cache)  # which may be gs://
    names = [caches.shard_name(kind, shard, about["shards"]) for shard in range(about["shards"])]
    present = {file.name for file in folder.iterdir()}  # asked once: on a bucket every question is a request
    if missing := [str(folder / name) for name in names if name not in present]:
        raise FileNotFoundError(f"the cache lacks {', '.join(missing)}: delete {cache} and run again")
    records = grain.sources.ArrayRecordDataSource([str(folder / name) for name in names])
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
    views = [caches.view(record) for record in records]
    # From each record straight into the batch: the cast to float32 is half the work, and not done twice.
    batch = {"moments": np.empty((len(views), *views[0][0].shape), np.float32)}
    batch["input_ids"] = np.empty((len(views), *views[0][1].shape), np.int32)
    for i, (moments, input_ids) in enumerate(views):
        batch["moments"][i], batch["input_ids"][i] = moments, input_ids
    return batch
