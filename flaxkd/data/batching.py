"""Pictures on their way to an encoder: read ahead, and in batches of one shape."""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


def ahead(items: Iterable, work: Callable, pool: ThreadPoolExecutor, depth: int) -> Iterator:
    """work(item) for every item, in order. One thread reads and the pool works, at most `depth` items ahead."""
    futures: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return futures.put(entry, timeout=0.1)

    def read() -> None:
        try:
            for item in items:
                put(pool.submit(work, item))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again in the consumer
            put(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while (entry := futures.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry.result()
    finally:
        stopped.set()
        reader.join()


def grouped(examples: Iterable, size: int, kind: Callable[[Any], Hashable]) -> Iterator[list]:
    """The examples in lists of `size` of one kind each; at the end what is left of each kind, in shorter lists.

    It holds less than a list of each kind at a time."""
    waiting = collections.defaultdict(list)
    for example in examples:
        batch = waiting[kind(example)]
        batch.append(example)
        if len(batch) == size:
            yield waiting.pop(kind(example))
    yield from waiting.values()


def filled(images: np.ndarray, batch_size: int) -> np.ndarray:
    """The pictures uint8[n, H, W, 3], n <= batch_size, padded to batch_size by repeating the last.

    An encoder then compiles for one number only."""
    return np.concatenate([images, np.repeat(images[-1:], batch_size - len(images), axis=0)])


def halved(encoded: Mapping[str, Any], n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The first n of {field: array [b, ...]}, floats as float16, and the indices of those with non-finite values."""
    rows = {name: np.asarray(array)[:n] for name, array in encoded.items()}
    with np.errstate(over="ignore"):
        rows = {name: x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float16) for name, x in rows.items()}
    bad = [~np.isfinite(x).reshape(n, -1).all(axis=1) for x in rows.values()]
    return rows, np.flatnonzero(np.any(bad, axis=0))
