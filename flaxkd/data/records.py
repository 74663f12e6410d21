"""VAE moments, token ids and sizes of a source, computed once and kept as ArrayRecord: the train step never encodes.

A cache is a folder with

    moments-00000-of-00001.array_record   records of a `Layout`, in the order of the source, or in batches of one size
    flipped-00000-of-00001.array_record   the same for mirrored pictures, only if requested
    unreadable-00000-of-00001.json        pictures of a shard that cannot be read and are left out, if there are any
    runs-00000-of-00001.json              which records of a shard are of which size, if there are several: see `Runs`
    cache.json                            fields, sizes and fingerprints, written last: the cache is complete

Every file is written under a temporary name and renamed when complete. A killed build resumes at the unfinished
shard. Processes that build the same cache at once write the same files. Processes that know of each other split
the shards between them.

`ensure` builds one cache at the start of a training. large.py builds two, train and validation, of a set of any size.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from flaxkd.data import batching, pictures
from flaxkd.machine import files
from flaxkd.machine.progress import COMPILING, Bar

FORMAT = 2  # increase it when the records change
SHARD = 8192  # records per file; 64 KiB each at 512 pixels
# One record per group: random access reads nothing else. To a compressor moments are mostly noise: zstd would save a
# fifth of the disk, and take a third of the reading time.
OPTIONS = "group_size:1,uncompressed"
PLAN = "plan.json"  # in a folder filled by large.py

MOMENTS = {"moments": ("float16", (None, None, None))}  # h, w, 2c
TIME_IDS = {"time_ids": ("int32", (6,))}  # of pictures.Crop
FORMAT_1 = MOMENTS | {"input_ids": ("int32", (None,))}  # what records had, before cache.json said so


class Layout:
    """The fields of a record, in its order: {name: (dtype, shape)}. None in a shape: a size that each record states.

    A record is the sizes it states as int32, the fields one after another, and the caption in UTF-8; little-endian.
    This is the only description of a record: cache.json has it as `fields`. Raises ValueError or TypeError for what is
    no description."""

    def __init__(self, fields: Mapping[str, tuple[str, Sequence[int | None]]]):
        self.fields = {name: (dtype, tuple(shape)) for name, (dtype, shape) in dict(fields).items()}
        shapes = [shape for _, shape in self.fields.values()]
        if not all(n is None or (type(n) is int and n > 0) for shape in shapes for n in shape):
            raise ValueError(f"no shapes: {shapes}")
        self.dtypes = {name: np.dtype(dtype).newbyteorder("<") for name, (dtype, _) in self.fields.items()}
        self.head = 4 * sum(shape.count(None) for shape in shapes)  # bytes
        self._places = functools.cache(self._find)

    def pack(self, example: Mapping[str, np.ndarray], caption: str) -> bytes:
        """A record. Raises ValueError for an array of another shape than the layout says."""
        arrays, stated = [], []
        for name, (_, shape) in self.fields.items():
            arrays.append(np.asarray(example[name], self.dtypes[name]))
            for size, known in zip(arrays[-1].shape, shape, strict=True):
                if known is None:
                    stated.append(size)
                elif known != size:
                    raise ValueError(f"{name} has the shape {arrays[-1].shape}, must be {shape}")
        return b"".join(part.tobytes() for part in (np.array(stated, "<i4"), *arrays)) + caption.encode()

    def view(self, record: bytes) -> dict[str, np.ndarray]:
        """The fields of a record, without a copy. Raises ValueError for a record that is too short."""
        places, _ = self._places(record[: self.head])
        return {name: np.frombuffer(record, dtype, size, at).reshape(shape) for name, dtype, size, at, shape in places}

    def caption(self, record: bytes) -> str:
        return record[self._places(record[: self.head])[1] :].decode()

    def _find(self, head: bytes) -> tuple[list[tuple], int]:
        """(name, dtype, number of elements, first byte, shape) of each field in a record, and where its caption begins.

        head: the sizes it states. Few records differ in them."""
        stated, at, places = iter(np.frombuffer(head, "<i4", self.head // 4).tolist()), self.head, []
        for name, (_, shape) in self.fields.items():
            shape = [next(stated) if known is None else known for known in shape]
            places.append((name, self.dtypes[name], math.prod(shape), at, shape))
            at += math.prod(shape) * self.dtypes[name].itemsize
        return places, at


def layout_of(encoded: Mapping[str, tuple], tokenize: Callable[[list[str]], Mapping[str, np.ndarray]]) -> Layout:
    """That of the records which `ensure` and large.py write. encoded: the fields that come from pixels."""
    return Layout({**encoded} | {name: ("int32", ids.shape[1:]) for name, ids in tokenize([""]).items()} | TIME_IDS)


class Runs(list):
    """Neighbouring records of one size as [height, width, number], in the order of the records. In pixels."""

    def add(self, height: int, width: int, number: int = 1) -> None:
        if self and self[-1][:2] == [height, width]:
            self[-1][2] += number
        else:
            self.append([height, width, number])


def ensure(
    source,
    folder: Path,
    *,
    encode: Callable[[np.ndarray], Mapping[str, Any]],
    tokenize: Callable[[list[str]], Mapping[str, np.ndarray]],
    batch_size: int,
    fingerprint: str,
    encoded: Mapping[str, tuple] = MOMENTS,
    flip: bool = False,
    progress: bool = True,
    shard_size: int = SHARD,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Returns the cache of a source, a folder inside `folder`. Builds it if it is missing.

    source: see sources.Source. encode: uint8[b, H, W, 3] -> {"moments": float32[b, h, w, 2c] of the VAE, ...}, always
    called with b = batch_size. encoded: its fields, as in a `Layout`. tokenize: captions -> {field: int32[b, l]}.
    fingerprint: of the encoder and the tokenizers. flip: also keep mirrored pictures. shard_size: records per file.
    process_index, process_count: every process builds its share of the files and calls `wait` once, which returns when
    all have called it. It then builds any files still missing: none, if all processes see the same folder.
    Unreadable pictures are left out, and named in one warning. Raises ValueError if the source is empty, none of its
    pictures can be read, or a moment is not finite in float16.
    """
    if len(source) == 0:
        raise ValueError("the source has no pictures")
    layout = layout_of(encoded, tokenize)
    inputs = {"format": FORMAT, "source": source.fingerprint, "encoder": fingerprint, "flip": flip}
    inputs["fields"] = layout.fields
    cache = Path(folder) / hashlib.sha256(json.dumps([inputs, shard_size]).encode()).hexdigest()[:20]
    if (cache / "cache.json").exists():
        wait()
        pictures.report_unreadable(_unreadable(cache), len(source), progress)
        return cache
    cache.mkdir(parents=True, exist_ok=True)
    kinds = ("moments", "flipped") if flip else ("moments",)
    shards = -(-len(source) // shard_size)
    wanted = [(kind, shard) for kind in kinds for shard in range(shards)]

    def make(shares: list[tuple[str, int]], desc: str) -> None:
        sizes = [min(shard_size, len(source) - shard * shard_size) for _, shard in shares]
        with Bar(sum(sizes), desc, " pictures", first=COMPILING, disable=not progress) as bar:
            for (kind, shard), size in zip(shares, sizes, strict=True):
                file = cache / shard_name(kind, shard, shards)
                if file.exists():  # from a killed build or a parallel process
                    bar.skip(size)
                    continue
                indices = range(shard * shard_size, shard * shard_size + size)
                faults, runs = [], Runs()
                batches = _encoded(source, indices, encode, tokenize, batch_size, kind == "flipped", faults)
                with writer(file) as write:
                    for examples in batches:
                        for fields, example in examples:
                            write(layout.pack(fields, example["caption"]))
                        runs.add(*example["crop"].size, len(examples))
                        bar.update(len(examples))
                    if faults:
                        files.write_json(cache / f"unreadable-{shard:05d}-of-{shards:05d}.json", faults)
                    if len(source.sizes) > 1:
                        files.write_json(cache / f"runs-{shard:05d}-of-{shards:05d}.json", runs)

    make(wanted[process_index::process_count], "encoding")
    wait()
    if missing := [f for f in wanted if not (cache / shard_name(*f, shards)).exists()]:
        make(missing, "encoding the shares of other processes")
    faults = _unreadable(cache)
    pictures.report_unreadable(faults, len(source), progress)
    about = {**inputs, "size": len(source) - len(faults), "shards": shards, "shard_size": shard_size}
    if len(source.sizes) > 1:
        about["runs"] = joined(files.read_json(file) for file in sorted(cache.glob("runs-*")))
    files.write_json(cache / "cache.json", about)
    return cache


def _unreadable(cache: Path) -> list[str]:
    return [fault for file in sorted(cache.glob("unreadable-*.json")) for fault in files.read_json(file)]


def joined(parts: Iterable[list]) -> Runs:
    """The runs of several shards as one."""
    runs = Runs()
    for part in parts:
        for run in part:
            runs.add(*run)
    return runs


def shard_name(kind: str, shard: int, shards: int) -> str:
    """File name of a shard. kind: "moments" or "flipped"."""
    return f"{kind}-{shard:05d}-of-{shards:05d}.array_record"


def read_about(cache: Path) -> dict:
    """cache.json as a dict, with its `Layout` as "layout" and its `Runs` as "runs".

    Raises FileNotFoundError if the folder is no complete cache, ValueError if damaged."""
    file = epath.Path(cache) / "cache.json"
    if not file.is_file():
        raise FileNotFoundError(f"{cache} is not a complete cache: it has no cache.json; build it again")
    try:
        about = files.read_json(file)
        if not isinstance(about["size"], int) or not isinstance(about["shards"], int):
            raise ValueError("its numbers are no integers")
        if about["format"] not in (1, FORMAT):
            raise ValueError(f"it is of format {about['format']}, not {FORMAT}")
        fields = FORMAT_1 if about["format"] == 1 else about["fields"]
        runs = joined([about.get("runs", [[0, 0, about["size"]]])])  # sizes do not matter if there is one
        if sum(number for *_, number in runs) != about["size"] or min(number for *_, number in runs) < 1:
            raise ValueError("its runs are not those of all its records")
        return about | {"flip": bool(about["flip"]), "layout": Layout(fields), "runs": runs}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be used ({error}): delete {cache} and build the cache again") from error


@contextlib.contextmanager
def writer(file: os.PathLike) -> Iterator[Callable[[bytes], None]]:
    """A function that appends a record to the shard `file`. The file appears after the block: see `files.whole`."""
    with files.whole(file) as path:
        records = ArrayRecordWriter(str(path), OPTIONS)
        try:
            yield records.write
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                records.close()
            raise
        records.close()  # it writes in the background: some errors surface only here


def _encoded(
    source, indices: range, encode, tokenize, batch_size: int, mirrored: bool, faults: list[str]
) -> Iterator[list[tuple[dict, dict]]]:
    """Lists of (fields of a record, example of the source), of one size each. Pictures are read ahead meanwhile.

    Unreadable pictures are left out and added to `faults`."""

    def read(i: int) -> tuple[int, Any]:
        try:
            return i, source[i]
        except pictures.Unreadable as error:
            return i, error

    def readable(found: Iterator) -> Iterator[tuple[int, dict]]:
        for i, example in found:
            if isinstance(example, pictures.Unreadable):
                faults.append(str(example))
            else:
                yield i, example

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with contextlib.closing(batching.ahead(indices, read, pool, 2 * batch_size)) as found:
            for batch in batching.grouped(readable(found), batch_size, lambda entry: entry[1]["crop"].size):
                numbers, examples = zip(*batch, strict=True)
                images = np.stack([example["image"] for example in examples])
                images = images[:, :, ::-1] if mirrored else images
                rows, bad = batching.halved(encode(batching.filled(images, batch_size)), len(images))
                if bad.size:
                    where = f"picture {numbers[bad[0]]}, {examples[bad[0]]['caption']!r}"
                    raise ValueError(f"{where}: its moments are not finite in float16; check the VAE's weights")
                crops = [example["crop"].mirrored if mirrored else example["crop"] for example in examples]
                fields = fields_of(rows, tokenize([example["caption"] for example in examples]), crops)
                yield list(zip(fields, examples, strict=True))


def fields_of(rows: Mapping[str, np.ndarray], ids: Mapping[str, np.ndarray], crops: Sequence[pictures.Crop]) -> list:
    """The fields {name: array} of each record, from those of a batch. rows: those that come from pixels."""
    batch = {**rows, **ids, "time_ids": [crop.time_ids for crop in crops]}
    return [{name: values[k] for name, values in batch.items()} for k in range(len(crops))]
