"""What a large image set is made of: chunks, which are read one after the other, and the items in them."""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

# Damage, whoever finds it. These are no OSError, by which a failing disk or network would say so.
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


class Item(NamedTuple):
    """A picture as it was found. name: where, for people. image: encoded, or a function that reads it; None if there
    is none. about: what else is known of it, by the source's own names."""

    name: str
    image: bytes | Callable[[], bytes] | None
    about: Mapping[str, Any]


class Broken(Exception):
    """The rest of a chunk cannot be read, and never will be: a damaged or truncated file, not a failing network."""


@dataclass(frozen=True)
class Chunk:
    """A file, or a range of one: iterating reads its items. Raises Broken where the file is."""

    name: str
    load: Callable[[], Iterator[Item]]

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self.load()
        except BROKEN as error:
            raise Broken(f"{type(error).__name__}: {error}") from error
        except OSError as error:
            # Arrow says so of damage as well, without the number that an error of the system has. A bucket's client
            # may leave it out too, and then it has to be tried again.
            if error.errno is not None or "://" in self.name:
                raise
            raise Broken(f"{type(error).__name__}: {error}") from error


def pick(about: Mapping[str, Any], wanted: str | None, usual: Sequence[str]) -> Any:
    """The value called `wanted`, else by the first of the `usual` names that is there; None if there is none.

    Upper and lower case are one. Bytes become str, and of a list it is the first entry (COCO has five captions)."""
    names = {name.lower(): name for name in about}
    found = [names[name.lower()] for name in ([wanted] if wanted else usual) if name.lower() in names]
    value = about[found[0]] if found else None
    while not isinstance(value, str | bytes) and hasattr(value, "__len__"):
        value = value[0] if len(value) and not isinstance(value, Mapping) else None
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def ranges(size: int, rows: int, name: str, load: Callable[[int], Item]) -> list[Chunk]:
    """Chunks of `rows` items each, of a sequence of `size` whose item i is load(i). ValueError if it is empty."""
    if not size:
        raise ValueError(f"{name} has no pictures, tars or tables: is it the right folder?")
    starts = range(0, size, rows)
    chunk = lambda span: Chunk(f"{name}[{span.start}:{span.stop}]", lambda: map(load, span))
    return [chunk(range(start, min(start + rows, size))) for start in starts]
