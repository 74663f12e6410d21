"""Grain batches of pictures or of cached latents: shuffled, endless and deterministic, with a position to save."""

import os
import re
from collections.abc import Sequence

import grain
import numpy as np
from etils import epath

from flaxkd.data import records, sources
from flaxkd.machine import files

OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class Pictures:
    """Examples {"images": uint8[r, r, 3]} of a source."""

    fields = ("images",)

    def __init__(self, source: sources.Source, fields: Sequence[str] = fields):
        """Reads all pictures once, since unreadable ones are left out: see `sources.readable`."""
        self.source, self.readable = source, sources.readable(source, range(len(source)))

    def batches(self, batch_size: int, seed: int, *, rows: Sequence[int] | None = None, **_) -> grain.DatasetIterator:
        """Endless iterator of batches, as `Records.batches` but without variants and mirrored pictures."""
        load = lambda indices: {"images": self._stack(_own(indices, rows))}
        order = _endless(len(self.readable), seed)
        return iter(order.batch(batch_size).map(load).to_iter_dataset(OPTIONS))

    def examples(self, n: int) -> dict[str, np.ndarray]:
        """The first n examples (all, if there are fewer) in one batch."""
        return {"images": self._stack(range(min(n, len(self.readable))))}

    def _stack(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.source[self.readable[i]]["image"] for i in indices])


class Records:
    """Examples {"moments": float32[h, w, 2c], "input_ids": int32[l]} of a cache of latents."""

    fields = ("moments", "input_ids")

    def __init__(self, cache: os.PathLike, fields: Sequence[str] = fields):
        self.cache, self.about, self.wanted = cache, records.read_about(cache), tuple(fields)

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
        may reach into the next epoch. If the cache has mirrored pictures (and flip is not False), each example is
        mirrored at random. variants: a regular expression. Examples whose captions differ only in what it matches
        count as one, and one of them is sampled each time.

        batch_size: of the global batch, which is the same for any number of processes. A process reads only its own
        `rows` of it (None: all), in their order. `get_state()` is the position, a JSON dict that is the same for any
        rows; `set_state(state)` restores it.
        """
        size, flip = self.about["size"], self.about["flip"] and flip is not False
        stored = open_records(self.cache, self.about, "moments")
        mirrored = open_records(self.cache, self.about, "flipped") if flip else None
        families = None if variants is None else _families(stored, variants)

        def choose(family: int, rng: np.random.Generator) -> int:
            index = family if families is None else int(rng.choice(families[family]))
            return index + size * int(flip and rng.integers(2))  # mirrored pictures are numbered from `size`

        def load(indices: np.ndarray) -> dict:
            mine = _own(indices, rows).tolist()
            return self._stack([stored[i] if i < size else mirrored[i - size] for i in mine])

        # Shuffles numbers, not pictures: each process sees those of the whole batch and reads only its own rows.
        order = _endless(size if families is None else len(families), seed)
        if flip or families is not None:  # otherwise it would cost a fifth of the time for nothing
            order = order.random_map(choose)
        return iter(order.batch(batch_size).map(load).to_iter_dataset(OPTIONS))

    def examples(self, n: int) -> dict[str, np.ndarray]:
        """The first n examples (all, if there are fewer) in one batch."""
        stored = open_records(self.cache, self.about, "moments")
        return self._stack([stored[i] for i in range(min(n, self.about["size"]))])

    def captions(self, n: int) -> list[str]:
        """The captions of the first n examples (all, if there are fewer)."""
        stored = open_records(self.cache, self.about, "moments")
        return [records.unpack(stored[i])["caption"] for i in range(min(n, self.about["size"]))]

    def _stack(self, chosen: list[bytes]) -> dict[str, np.ndarray]:
        views = [records.view(record) for record in chosen]
        # Each record goes straight into the batch: the cast to float32 is half the work, so it is done only once.
        batch = {"moments": np.empty((len(views), *views[0][0].shape), np.float32)}
        batch["input_ids"] = np.empty((len(views), *views[0][1].shape), np.int32)
        for i, (moments, input_ids) in enumerate(views):
            batch["moments"][i], batch["input_ids"][i] = moments, input_ids
        return {name: batch[name] for name in self.wanted}


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


def _families(stored, variants: str) -> list[list[int]]:
    """The numbers of the records, grouped by caption without the matches of `variants`."""
    families = {}
    for index in range(len(stored)):
        caption = records.unpack(stored[index])["caption"]
        families.setdefault(re.sub(variants, "", caption), []).append(index)
    return list(families.values())
