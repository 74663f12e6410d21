"""A cache of an image set of any size, built chunk by chunk by any number of independent processes.

    OUT/plan.json                                       source and settings, written first
    OUT/train/moments-00012-of-01000.array_record       shard of chunk 12, in the format of records.py
    OUT/train/flipped-00012-of-01000.array_record       its mirrored pictures, if requested
    OUT/validation/moments-00012-of-01000.array_record  its pictures with held-out captions
    OUT/done/00012-of-01000.json                        chunk 12 is complete: its sizes, and what was left out
    OUT/skipped.jsonl                                   all faulty items, one per line
    OUT/train/cache.json, OUT/validation/cache.json     written last: the cache is complete

Process i of n takes chunks i, i + n, ... and skips the chunks listed in done/. The output does not depend on the number
of processes. Any of them may be killed, and the next run may use more or fewer.
"""

import collections
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flaxkd.data import batching, openmoji, records
from flaxkd.data.chunks import Broken, Chunk
from flaxkd.data.filters import Example, Left, Recipe, prepare
from flaxkd.machine import files
from flaxkd.machine.progress import COMPILING, Bar

SPLITS = ("train", "validation")


def build(
    chunks: list[Chunk],
    out: os.PathLike,
    recipe: Recipe,
    *,
    encode: Callable[[np.ndarray], Mapping[str, Any]],
    tokenize: Callable[[list[str]], Mapping[str, np.ndarray]],
    batch_size: int,
    fingerprint: str,
    encoded: Mapping[str, tuple] = records.MOMENTS,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
    progress: bool = True,
) -> dict | None:
    """Fills `out` with this process's chunks. Returns the result of `finish`: None while others' chunks are missing.

    encode: uint8[b, H, W, 3] -> {"moments": [b, h, w, 2c], ...}, always with b = batch_size; may be asynchronous, as in
    JAX. encoded: its fields, as in a `records.Layout`. tokenize: captions -> {field: int32[b, l]}. fingerprint: of
    both. threads: for decoding; None for one per core. Raises ValueError if `out` was begun with other settings or a
    split is empty, files.DiskFull, and OSError for an unreachable source. Finished chunks stay."""
    if not chunks:
        raise ValueError("the source has no pictures")
    out = epath.Path(out)
    names = "\n".join(chunk.name.rpartition("/")[2] for chunk in chunks)  # hosts may see it under different paths
    plan = {"format": records.FORMAT, "source": hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()[:16]}
    layout = records.layout_of(encoded, tokenize)
    plan |= {"parts": len(chunks), "encoder": fingerprint, "fields": layout.fields} | asdict(recipe)
    _claim(out, plan)
    done = _done(out)
    mine = range(process_index, len(chunks), process_count)
    left = [i for i in mine if _numbered(i, len(chunks)) not in done]
    words = "encoding" if process_count == 1 else f"process {process_index} of {process_count}"
    done = len(mine) - len(left)
    bar = Bar(len(mine), words, " chunks", first=COMPILING if left else "", initial=done, disable=not progress)
    count = _Counts(bar)
    with bar, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for i in left:
            results = batching.ahead(chunks[i], lambda item: prepare(item, recipe), pool, 2 * batch_size)
            with contextlib.closing(results):
                about = _fill(out, i, plan, chunks[i].name, layout, results, encode, tokenize, batch_size, count)
            files.write_json(out / "done" / f"{_numbered(i, len(chunks))}.json", about)
            bar.update()
        count.show()
    return finish(out, plan)


class _Counts:
    """Called for every picture: counts each kind, and shows the counts and the speed in the bar."""

    def __init__(self, bar: Bar):
        self.bar, self.of, self.start, self.shown = bar, collections.Counter(), None, 0.0

    def __call__(self, kind: str) -> None:
        self.of[kind] += 1
        if time.monotonic() - self.shown > 0.5:
            self.show()

    def show(self) -> None:
        kept, self.shown = self.of["train"] + self.of["validation"], time.monotonic()
        if self.start is None and kept:  # the first batch includes compiling, so it does not count
            self.start = (kept, self.shown)
            self.bar.begin()
        rate = (kept - self.start[0]) / max(self.shown - self.start[1], 1e-9) if self.start else 0.0
        left = ", ".join(f"{self.of[kind]:,} {kind}" for kind in ("filtered", "skipped"))
        self.bar.set_postfix_str(f"{rate:.1f} images/s, {kept:,} kept, {left}")


def _claim(out: epath.Path, plan: dict) -> None:
    claim = out / records.PLAN
    try:
        of_cache = not claim.is_file() or isinstance(files.read_json(claim), dict)
    except ValueError as error:
        remedy = "if the settings are the same, delete this file and run the same command again, else the folder"
        raise ValueError(f"{error} Or, {remedy}") from error
    if not of_cache:
        raise ValueError(f"{claim} is not of a cache: give another --out")
    for folder in (*SPLITS, "done"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    remedy = "Resume with the same settings, or give another --out."
    files.claim(claim, plan, differ="was begun with other settings", remedy=remedy)


def _numbered(i: int, n: int) -> str:
    return f"{i:05d}-of-{n:05d}"


def _done(out: epath.Path) -> set[str]:
    return {file.stem for file in (out / "done").iterdir() if not file.name.startswith(".")}


def _fill(
    out: epath.Path,
    i: int,
    plan: dict,
    name: str,
    layout: records.Layout,
    results: Iterator[Example | Left],
    encode: Callable,
    tokenize: Callable,
    batch_size: int,
    count: Callable[[str], None],
) -> dict:
    """Writes the shards of chunk i, and returns its record for done/."""
    about = {"part": name, "train": 0, "validation": 0, "filtered": collections.Counter(), "skipped": []}
    about["runs"] = {split: records.Runs() for split in SPLITS}
    kinds = [("train", "moments"), ("train", "flipped"), ("validation", "moments")]
    shards = {kind: out / kind[0] / records.shard_name(kind[1], i, plan["parts"]) for kind in kinds}
    if not plan["flip"]:
        del shards["train", "flipped"]

    def leave(left: Left) -> None:
        if left.kind == "filtered":
            about["filtered"][left.reason] += 1
        else:
            about["skipped"].append({"name": left.name, "reason": left.reason, "detail": left.detail})
        count(left.kind)

    def kept() -> Iterator[Example]:
        try:
            for result in results:
                if isinstance(result, Example):
                    yield result
                else:
                    leave(result)
        except Broken as error:  # items before the damage are kept
            leave(Left(name, "skipped", "broken from here on", str(error)))

    with contextlib.ExitStack() as stack:
        for file in shards.values():
            _clear(file)
        write = {kind: stack.enter_context(records.writer(file)) for kind, file in shards.items()}

        def store(batch: list[Example], straight: Mapping, flipped: Mapping | None) -> None:
            rows, bad = batching.halved(straight, len(batch))
            mirrored, worse = (rows, bad) if flipped is None else batching.halved(flipped, len(batch))
            ids, crops = tokenize([example.caption for example in batch]), [example.crop for example in batch]
            plain = records.fields_of(rows, ids, crops)
            other = records.fields_of(mirrored, ids, [crop.mirrored for crop in crops])
            for k, example in enumerate(batch):
                if k in bad or k in worse:
                    leave(Left(example.name, "skipped", "moments that float16 cannot hold"))
                    continue
                held = openmoji.caption_hash(example.caption) < plan["validation"]
                split = "validation" if held else "train"
                write[split, "moments"](layout.pack(plain[k], example.caption))
                if (split, "flipped") in write:
                    write[split, "flipped"](layout.pack(other[k], example.caption))
                about[split] += 1
                about["runs"][split].add(*example.crop.size)
                count(split)

        waiting = None  # the devices work on this batch while the next one is assembled
        for batch in batching.grouped(kept(), batch_size, lambda example: example.crop.size):
            images = batching.filled(np.stack([example.image for example in batch]), batch_size)
            begun = (batch, encode(images), encode(images[:, :, ::-1]) if plan["flip"] else None)
            if waiting:
                store(*waiting)
            waiting = begun
        if waiting:
            store(*waiting)
    return about


def _clear(file: epath.Path) -> None:
    """Removes half-written copies of this file, left by a killed process."""
    parent = file.parent if "://" in str(file) else Path(file.parent)  # whose glob leaves [letters] of the folder alone
    for stale in parent.glob(f".{file.name}.*"):
        stale.unlink()


def _read_part(file: epath.Path) -> dict:
    try:
        part = files.read_json(file)
        return {key: part[key] for key in ("part", *SPLITS, "runs", "filtered", "skipped")}
    except (ValueError, KeyError, TypeError) as error:
        remedy = "delete it and run the same command again, which makes this part anew"
        raise ValueError(f"{file} is damaged ({error}): {remedy}") from error


def finish(out: epath.Path, plan: dict) -> dict | None:
    """Writes cache.json and skipped.jsonl, and returns what was kept and left out; None until every chunk is done.

    Every process calls it, and the last one finds all chunks done. Raises ValueError if a split is empty."""
    n = plan["parts"]
    if not _done(out) >= {_numbered(i, n) for i in range(n)}:
        return None
    read = lambda i: _read_part(out / "done" / f"{_numbered(i, n)}.json")
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(read, range(n)))
    sizes = {split: sum(part[split] for part in parts) for split in SPLITS}
    filtered = sum((collections.Counter(part["filtered"]) for part in parts), collections.Counter())
    skipped = collections.Counter(entry["reason"] for part in parts for entry in part["skipped"])
    lines = [json.dumps({"part": part["part"], **entry}) + "\n" for part in parts for entry in part["skipped"]]
    files.write_text(out / "skipped.jsonl", "".join(lines))
    left = {"filtered": dict(filtered), "skipped": dict(skipped)}
    examples = {entry["reason"]: f"{entry['name']}, {entry['detail']}" for part in parts for entry in part["skipped"]}
    if empty := [split for split in SPLITS if not sizes[split]]:
        raise ValueError(
            f"no picture is left for {' and '.join(empty)} (train {sizes['train']:,}, validation "
            f"{sizes['validation']:,}, left out {left}; see {out / 'skipped.jsonl'}). Change the filters, or give a "
            "larger --validation for a small set, and another --out"
            + "".join(f"\n  {reason}, such as {example}" for reason, example in examples.items())
        )
    keys = ("format", "source", "encoder", "fields", "resolution", "buckets", "background", "caption_column")
    for split in reversed(SPLITS):  # train last: its file implies the other
        about = {key: plan[key] for key in keys} | {"flip": plan["flip"] and split == "train"}
        about |= {"size": sizes[split], "shards": n, "runs": records.joined(part["runs"][split] for part in parts)}
        files.write_json(out / split / "cache.json", about)
    return sizes | left
