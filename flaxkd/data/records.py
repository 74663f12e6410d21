"""VAE moments and token ids of a source, computed once and kept as ArrayRecord: the train step never encodes.

A cache is a folder with

    moments-00000-of-00001.array_record   records of `pack`, in the order of the source
    flipped-00000-of-00001.array_record   the same for mirrored pictures, only if requested
    unreadable-00000-of-00001.json        pictures of a shard that cannot be read and are left out, if there are any
    cache.json                            sizes and fingerprints, written last: the cache is complete

Every file is written under a temporary name and renamed when complete. A killed build resumes at the unfinished
shard. Processes that build the same cache at once write the same files. Processes that know of each other split
the shards between them.

`ensure` builds one cache at the start of a training. large.py builds two, train and validation, of a set of any size.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from flaxkd.data import pictures
from flaxkd.machine import files
from flaxkd.machine.progress import COMPILING, Bar

FORMAT = 1  # increase it when the records change
SHARD = 8192  # records per file; 64 KiB each at 512 pixels
# One record per group: random access reads nothing else. To a compressor moments are mostly noise: zstd would save a
# fifth of the disk, and take a third of the reading time.
OPTIONS = "group_size:1,uncompressed"
PLAN = "plan.json"  # in a folder filled by large.py


def ensure(
    source,
    folder: Path,
    *,
    encode: Callable[[np.ndarray], np.ndarray],
    tokenize: Callable[[list[str]], np.ndarray],
    batch_size: int,
    fingerprint: str,
    flip: bool = False,
    progress: bool = True,
    shard_size: int = SHARD,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Path:
    """Returns the cache of a source, a folder inside `folder`. Builds it if it is missing.

    source: see sources.Source. encode: uint8[b, r, r, 3] -> VAE moments float32[b, h, w, 2c], always called
    with b = batch_size. tokenize: captions -> int32[b, l]. fingerprint: of the encoder and the tokenizer.
    flip: also keep mirrored pictures. shard_size: records per file. process_index, process_count: every process
    builds its share of the files and calls `wait` once, which returns when all have called it. It then builds any
    files still missing: none, if all processes see the same folder.
    Unreadable pictures are left out, and named in one warning. Raises ValueError if the source is empty, none of its
    pictures can be read, or a moment is not finite in float16.
    """
    if len(source) == 0:
        raise ValueError("the source has no pictures")
    inputs = {"format": FORMAT, "source": source.fingerprint, "encoder": fingerprint, "flip": flip}
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
                faults: list[str] = []
                batches = _encoded(source, indices, encode, tokenize, batch_size, kind == "flipped", faults)
                with writer(file) as write:
                    for examples in batches:
                        for example in examples:
                            write(pack(*example))
                        bar.update(len(examples))
                    if faults:
                        files.write_json(cache / f"unreadable-{shard:05d}-of-{shards:05d}.json", faults)

    make(wanted[process_index::process_count], "encoding")
    wait()
    if missing := [f for f in wanted if not (cache / shard_name(*f, shards)).exists()]:
        make(missing, "encoding the shares of other processes")
    faults = _unreadable(cache)
    pictures.report_unreadable(faults, len(source), progress)
    about = {**inputs, "size": len(source) - len(faults), "shards": shards, "shard_size": shard_size}
    files.write_json(cache / "cache.json", about)
    return cache


def _unreadable(cache: Path) -> list[str]:
    return [fault for file in sorted(cache.glob("unreadable-*.json")) for fault in files.read_json(file)]


def shard_name(kind: str, shard: int, shards: int) -> str:
    """File name of a shard. kind: "moments" or "flipped"."""
    return f"{kind}-{shard:05d}-of-{shards:05d}.array_record"


def read_about(cache: Path) -> dict:
    """cache.json as a dict. Raises FileNotFoundError if the folder is no complete cache, ValueError if damaged."""
    file = epath.Path(cache) / "cache.json"
    if not file.is_file():
        raise FileNotFoundError(f"{cache} is not a complete cache: it has no cache.json; build it again")
    try:
        about = files.read_json(file)
        if not isinstance(about["size"], int) or not isinstance(about["shards"], int) or about["format"] != FORMAT:
            raise ValueError(f"{file} is of format {about['format']}, not {FORMAT}")
        return about | {"flip": bool(about["flip"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be used ({error}): delete {cache} and build the cache again") from error


def pack(moments: np.ndarray, input_ids: np.ndarray, caption: str) -> bytes:
    """One record: sizes h, w, 2c, l; moments [h, w, 2c] as float16; ids [l] as int32; caption in UTF-8."""
    sizes = np.array([*moments.shape, len(input_ids)], "<i4")
    parts = sizes, moments.astype("<f2"), input_ids.astype("<i4")
    return b"".join(part.tobytes() for part in parts) + caption.encode()


def view(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(moments float16[h, w, 2c], input_ids int32[l]) of a record of `pack`, without a copy."""
    *shape, length = np.frombuffer(record, "<i4", 4).tolist()
    size = math.prod(shape)
    moments = np.frombuffer(record, "<f2", size, 16).reshape(shape)
    return moments, np.frombuffer(record, "<i4", length, 16 + 2 * size)


def unpack(record: bytes) -> dict:
    """{"moments": float32[h, w, 2c], "input_ids": int32[l], "caption": str} of a record of `pack`."""
    moments, input_ids = view(record)
    return {
        "moments": moments.astype(np.float32),
        "input_ids": input_ids.astype(np.int32),
        "caption": record[16 + moments.nbytes + input_ids.nbytes :].decode(),
    }


def filled(images: np.ndarray, batch_size: int) -> np.ndarray:
    """The pictures uint8[n, r, r, 3], n <= batch_size, padded to batch_size by repeating the last.

    An encoder then compiles for one shape only."""
    return np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])


def halved(moments, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n of moments [b, h, w, 2c] as float16, and the indices of those with non-finite values."""
    with np.errstate(over="ignore"):
        moments = np.asarray(moments)[:n].astype(np.float16)
    return moments, np.flatnonzero(~np.isfinite(moments).all(axis=(1, 2, 3)))


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
) -> Iterator[list]:
    """Lists of (moments, input_ids, caption), batch by batch. The next batch is read while one is encoded.

    Unreadable pictures are left out and added to `faults`."""
    starts = range(indices.start, indices.stop, batch_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def read(start: int) -> list:
            stop = min(start + batch_size, indices.stop)
            return [pool.submit(source.__getitem__, i) for i in range(start, stop)]

        following = read(starts[0])
        for start in starts:
            examples, numbers = [], []
            for i, future in enumerate(following, start):
                try:
                    examples.append(future.result())
                    numbers.append(i)
                except pictures.Unreadable as error:
                    faults.append(str(error))
            if start + batch_size < indices.stop:
                following = read(start + batch_size)
            if not examples:
                continue
            images = np.stack([example["image"] for example in examples])
            images = images[:, :, ::-1] if mirrored else images
            moments, bad = halved(encode(filled(images, batch_size)), len(images))
            if bad.size:
                where = f"picture {numbers[bad[0]]}, {examples[bad[0]]['caption']!r}"
                raise ValueError(f"{where}: its moments are not finite in float16; check the VAE's weights")
            captions = [example["caption"] for example in examples]
            yield list(zip(moments, np.asarray(tokenize(captions), np.int32), captions, strict=True))
