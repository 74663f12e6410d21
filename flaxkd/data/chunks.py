"""A large image set consists of chunks. Each chunk is read in order and yields items."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from flaxkd.data import text

# Damage, as any of the libraries reports it; a damaged length asks for too much memory. A failing disk or network
# raises OSError, which is not among these.
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, MemoryError)


class Item(NamedTuple):
    """A picture as found in its source. name: its location, for messages. image: encoded bytes, or a function that
    reads them; None if there is none. about: its other fields, under the source's own names.
    fault: (reason, detail) if it cannot be used, such as a picture whose caption is not known for certain."""

    name: str
    image: bytes | Callable[[], bytes] | None
    about: Mapping[str, Any]
    fault: tuple[str, str] | None = None


class Broken(Exception):
    """The rest of a chunk can never be read: the file is damaged or truncated. A failing network is an OSError."""


@dataclass(frozen=True)
class Chunk:
    """A file, or a range of one. Iteration reads its items, and raises Broken where the file is damaged."""

    name: str
    load: Callable[[], Iterator[Item]]

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self.load()
        except BROKEN as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        except OSError as error:
            # Arrow raises OSError for damage too, without the errno of a system error. A bucket's client may also omit
            # the errno: such a read has to be retried.
            if error.errno is not None or "://" in self.name:
                raise
            raise Broken(f"{type(error).__name__}: {error}") from error


def pick(about: Mapping[str, Any], wanted: str | None, usual: Sequence[str]) -> Any:
    """The value named `wanted`, or without it the value under the first of the `usual` names found; else None.

    Names ignore case. Bytes become str, and a list gives its first entry (COCO has five captions). Raises ValueError
    for bytes that are no text."""
    names = {name.lower(): name for name in about}
    found = [names[name.lower()] for name in ([wanted] if wanted else usual) if name.lower() in names]
    value = first(about[found[0]]) if found else None
    return text.decode(value) if isinstance(value, bytes) else value


def first(value: Any) -> Any:
    """The first entry of a list, of lists as well; None of an empty one. Anything else is returned as it is."""
    while not isinstance(value, str | bytes | Mapping) and hasattr(value, "__len__"):
        value = value[0] if len(value) else None
    return value


def ranges(size: int, rows: int, name: str, load: Callable[[int], Item]) -> list[Chunk]:
    """Chunks of `rows` items from a sequence of `size` items, where load(i) is item i. ValueError if it is empty."""
    if not size:
        raise ValueError(f"{name} has no pictures, tars or tables: is it the right folder?")
    starts = range(0, size, rows)
    chunk = lambda span: Chunk(f"{name}[{span.start}:{span.stop}]", lambda: map(load, span))
    return [chunk(range(start, min(start + rows, size))) for start in starts]
