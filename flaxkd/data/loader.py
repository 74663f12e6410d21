"""Grain batches of pictures or of cached latents: shuffled, endless and deterministic, with a position to save.

A batch has pictures of one size. Where a cache has several (buckets.py), each batch is of one bucket.
"""

import collections
import functools
import os
import re
from collections.abc import Sequence

import grain
import jax
import numpy as np
from etils import epath

from flaxkd.data import records, sources
from flaxkd.machine import files

OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
WIDE = {"float16": "float32"}  # dtype of a record: that of a batch, where it is another


class Pictures:
    """Examples {"images": uint8[r, r, 3]} of a source."""

    fields = ("images",)

    def __init__(self, source: sources.Source, fields: Sequence[str] = fields):
        """Reads all pictures once, since unreadable ones are left out: see `sources.readable`.

        Raises ValueError for pictures of several sizes."""
        if len(source.sizes) > 1:
            raise ValueError("data.buckets: a task that reads pictures takes squares alone; buckets are for latents")
        self.source, self.readable = source, sources.readable(source, range(len(source)))

    def batches(self, batch_size: int, seed: int, *, rows: Sequence[int] | None = None, **_) -> grain.DatasetIterator:
        """Endless iterator of batches, as `Records.batches` but without variants and mirrored pictures."""
        load = lambda indices: {"images": self._stack(_own(indices, rows))}
        order = _endless(len(self.readable), seed)
        return iter(order.batch(batch_size).map(load).to_iter_dataset(OPTIONS))

    def examples(self, n: int) -> list[dict[str, np.ndarray]]:
        """The first n examples (all, if there are fewer), in one batch."""
        return [{"images": self._stack(range(min(n, len(self.readable))))}]

    def shapes(self, n: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The batches of n examples that `batches` may give, as shapes."""
        return _shapes(self.examples(1), n)

    def _stack(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.source[self.readable[i]]["image"] for i in indices])


class Records:
    """Examples {"moments": float32[h, w, 2c], and int32: "input_ids" [l], perhaps "input_ids_2" [l], "time_ids" [6]}
    of a cache of latents; for inpainting also the fields of masks.py."""

    def __init__(self, cache: os.PathLike, fields: Sequence[str] | None = None):
        """fields: the wanted ones, None for all. Raises ValueError for those that the cache does not have."""
        self.cache, self.about = cache, records.read_about(cache)
        self.layout = self.about["layout"]
        self.wanted = tuple(self.layout.fields if fields is None else fields)
        if missing := [name for name in self.wanted if name not in self.layout.fields]:
            raise ValueError(
                f"the records of {cache} have {', '.join(self.layout.fields)}, and {', '.join(missing)} is needed too: "
                "build the cache again with `python -m flaxkd.cache` and this teacher"
            )

    def batches(
        self,
        batch_size: int,
        seed: int,
        *,
        variants: str | None = None,
        flip: bool | None = None,
        rows: Sequence[int] | None = None,
    ) -> grain.DatasetIterator:
        """Endless iterator of batches {name: array with the batch as first axis}.

        Every epoch has each example once. Its order depends on the seed alone and changes from epoch to epoch; a batch
        may reach into the next epoch. Buckets have epochs of their own, and as many batches as fit their sizes. If the
        cache has mirrored pictures (and flip is not False), each example is mirrored at random. variants: a regular
        expression. Examples of a bucket whose captions differ only in what it matches count as one, and one of them is
        sampled each time.

        batch_size: of the global batch, which is the same for any number of processes. A process reads only its own
        `rows` of it (None: all), in their order. `get_state()` is the position, a JSON dict that is the same for any
        rows; `set_state(state)` restores it.
        """
        size, flip = self.about["size"], self.about["flip"] and flip is not False
        stored = open_records(self.cache, self.about, "moments")
        mirrored = open_records(self.cache, self.about, "flipped") if flip else None
        buckets = self._buckets()
        if variants is not None:
            buckets = [self._families(stored, numbers, variants) for numbers in buckets]

        def choose(bucket: Sequence, i: int, rng: np.random.Generator) -> int:
            index = int(bucket[i] if variants is None else rng.choice(bucket[i]))
            return index + size * int(flip and rng.integers(2))  # mirrored pictures are numbered from `size`

        # Shuffles numbers, not pictures: each process sees those of the whole batch and reads only its own rows.
        def order(bucket: Sequence) -> grain.MapDataset:
            numbers = _endless(len(bucket), seed)
            if flip or variants is not None:
                return numbers.random_map(functools.partial(choose, bucket)).batch(batch_size)
            return numbers.batch(batch_size).map(bucket.__getitem__)  # at once: it takes a fifth of the time less

        def load(indices: np.ndarray) -> dict:
            mine = _own(indices, rows).tolist()
            return self._stack([stored[i] if i < size else mirrored[i - size] for i in mine])

        orders = [order(bucket) for bucket in buckets]
        mixed = orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [len(bucket) for bucket in buckets])
        return iter(mixed.map(load).to_iter_dataset(OPTIONS))

    def examples(self, n: int) -> list[dict[str, np.ndarray]]:
        """The first n examples (all, if there are fewer), in one batch for each bucket. Buckets have equal shares."""
        stored = open_records(self.cache, self.about, "moments")
        return [self._stack([stored[i] for i in numbers]) for numbers in self._first(n)]

    def captions(self, n: int) -> list[str]:
        """The captions of these examples, in their order."""
        stored = open_records(self.cache, self.about, "moments")
        return [self.layout.caption(stored[i]) for numbers in self._first(n) for i in numbers]

    def shapes(self, n: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The batches of n examples that `batches` may give, as shapes."""
        stored = open_records(self.cache, self.about, "moments")
        return _shapes([self._stack([stored[numbers[0]]]) for numbers in self._buckets()], n)

    def sizes(self) -> set[tuple[int, ...]]:
        """The shapes of its moments."""
        return {batch["moments"].shape[1:] for batch in self.shapes(1)}

    def _buckets(self) -> list[np.ndarray]:
        """The numbers of the records of each size, int[n], ascending."""
        found, start = collections.defaultdict(list), 0
        for height, width, number in self.about["runs"]:
            found[height, width].append(np.arange(start, start + number))
            start += number
        return [np.concatenate(found[size]) for size in sorted(found)]

    def _first(self, n: int) -> list[np.ndarray]:
        """The numbers of the first n records, for each bucket: as large a share of each as of the others."""
        buckets = self._buckets()
        place = np.concatenate([(np.arange(len(bucket)) + 0.5) / len(bucket) for bucket in buckets])
        chosen = np.argsort(place, kind="stable")[:n]
        ends = np.cumsum([len(bucket) for bucket in buckets])
        counts = np.bincount(np.searchsorted(ends, chosen, "right"), minlength=len(buckets))
        return [bucket[:count] for bucket, count in zip(buckets, counts, strict=True) if count]

    def _families(self, stored, numbers: np.ndarray, variants: str) -> list[list[int]]:
        """The numbers of the records, grouped by caption without the matches of `variants`."""
        families = {}
        for index in numbers.tolist():
            families.setdefault(re.sub(variants, "", self.layout.caption(stored[index])), []).append(index)
        return list(families.values())

    def _stack(self, chosen: list[bytes]) -> dict[str, np.ndarray]:
        """A batch. Raises ValueError for records that are not as cache.json says."""
        try:
            views = [self.layout.view(record) for record in chosen]
            batch = {}
            for name in self.wanted:
                first = views[0][name]
                # Each record goes straight into the batch: the cast to float32 is half the work, so it is done once.
                batch[name] = np.empty((len(views), *first.shape), WIDE.get(first.dtype.name, first.dtype.name))
                for i, view in enumerate(views):
                    batch[name][i] = view[name]
            return batch
        except ValueError as error:
            raise ValueError(
                f"the records of {self.cache} are not as its cache.json says ({error}): delete the folder and build "
                "the cache again"
            ) from error


class Pairs:
    """Examples of two caches in turn: the rows 0, 2, ... of a batch are of the first, the rows 1, 3, ... of the second.

    Each has epochs of its own, so the smaller one begins again sooner."""

    def __init__(self, first: Records, second: Records):
        """Raises ValueError for pictures of several sizes: both halves of a batch must have the same."""
        self.readers = first, second
        if len({size for reader in self.readers for size in reader.sizes()}) > 1:
            raise ValueError("data.buckets: prior preservation takes squares alone")

    def batches(self, batch_size: int, seed: int, *, rows: Sequence[int] | None = None, flip: bool | None = None, **_):
        """Endless iterator of batches, as `Records.batches` but without variants. batch_size: an even number.

        A process reads whole batches, and gives its own `rows` of them."""
        halves = [reader.batches(batch_size // 2, seed + i, flip=flip) for i, reader in enumerate(self.readers)]
        return Turns(halves, rows)

    def examples(self, n: int) -> list[dict[str, np.ndarray]]:
        """n examples (an even number), the first ones of each cache in turn and over again, in one batch."""
        halves = [reader.examples(n // 2)[0] for reader in self.readers]
        return [_in_turn(*(jax.tree.map(lambda x: x[np.arange(n // 2) % len(x)], half) for half in halves))]

    def shapes(self, n: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The batches of n examples that `batches` may give, as shapes."""
        return self.readers[0].shapes(n)


class Turns:
    """The iterator of `Pairs`. Its position is that of both halves."""

    def __init__(self, halves: Sequence[grain.DatasetIterator], rows: Sequence[int] | None):
        self.halves, self.rows = halves, rows

    def __iter__(self) -> "Turns":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return {name: _own(x, self.rows) for name, x in _in_turn(*map(next, self.halves)).items()}

    def get_state(self) -> dict:
        return {"halves": [half.get_state() for half in self.halves]}

    def set_state(self, state: dict) -> None:
        for half, position in zip(self.halves, state["halves"], strict=True):
            half.set_state(position)


def _in_turn(first: dict, second: dict) -> dict[str, np.ndarray]:
    """A batch of the rows of two batches, one of each in turn."""
    return {name: np.stack([x, second[name]], 1).reshape(-1, *x.shape[1:]) for name, x in first.items()}


def _shapes(batches: list[dict], n: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Batches as shapes, with n examples."""
    return [jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), batch) for batch in batches]


def _endless(size: int, seed: int) -> grain.MapDataset:
    """The numbers below `size`, in another order in each epoch.

    Not without end: Grain's length of that, divided by a batch of one, is a number that Python's len() cannot hold."""
    return grain.MapDataset.range(size).seed(seed).shuffle().repeat(2**62 // max(size, 1))


def _own(indices: np.ndarray, rows: Sequence[int] | None) -> np.ndarray:
    return indices if rows is None else indices[np.asarray(rows)]


class Shards(grain.sources.ArrayRecordDataSource):
    """The records of shards, with random access. Raises ValueError that names a damaged shard."""

    def __init__(self, paths: list[str]):
        try:
            super().__init__(paths)
        except (RuntimeError, ValueError, IndexError) as error:
            broken = [path for path in paths if not _opens(path)]
            raise _damaged(broken[0] if broken else paths[0], error) from error

    def __getitem__(self, index: int) -> bytes:
        try:
            return super().__getitem__(index)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(self.paths[self._reader_idx_and_position(index)[0]], error) from error


def _opens(path: str) -> bool:
    try:
        grain.sources.ArrayRecordDataSource([path])
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def _damaged(shard: str, error: Exception) -> ValueError:
    shard = os.path.realpath(shard)  # not the name that files.plain gave it
    return ValueError(
        f"the shard {shard} is damaged ({error}): delete {os.path.dirname(shard)} and make the cache again; of a cache "
        f"of `python -m flaxkd.cache`, this shard, its part in done/ and the two cache.json are enough"
    )


def open_records(cache: os.PathLike, about: dict, kind: str) -> grain.sources.ArrayRecordDataSource:
    """The "moments" or "flipped" records of a cache, with random access. about: its cache.json.

    Raises FileNotFoundError for a missing shard, and ValueError for a damaged one or a wrong number of records."""
    folder = epath.Path(cache)  # may be gs://
    names = [records.shard_name(kind, shard, about["shards"]) for shard in range(about["shards"])]
    present = {file.name for file in folder.iterdir()}  # listed once: every lookup on a bucket is a request
    if missing := [str(folder / name) for name in names if name not in present]:
        raise FileNotFoundError(f"the cache lacks {', '.join(missing)}: delete {cache} and run again")
    place = folder if "://" in str(folder) else files.plain(folder)
    found = Shards([str(place / name) for name in names])
    if len(found) != about["size"]:
        size = about["size"]
        raise ValueError(f"{cache} has {len(found)} {kind}, its cache.json says {size}: delete the folder")
    return found
