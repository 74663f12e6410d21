"""Pictures in tables: Parquet, and Arrow files as `save_to_disk` of Hugging Face's datasets writes them.

The picture column holds bytes, the path of a file, the Image type of `datasets` (both of them), or a list of these.
Whatever is read is validated first: pyarrow itself trusts offsets and ends the process where they point outside.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from flaxkd.data.chunks import BROKEN, Chunk, Item, first
from flaxkd.data.metadata import FILES

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "images", *FILES)  # usual names of the column
END_OF_STREAM = b"\xff" * 4 + bytes(4)
ROWS = 64  # per read; more would fill memory with pictures


def parquet(files: list[epath.Path], column: str | None, rows: int) -> list[Chunk]:
    """Chunks of Parquet files: successive row groups of one file, until they have `rows` rows.

    column: of the pictures; None for one of `IMAGES`. A file with a damaged footer becomes one chunk, which raises
    Broken."""
    chunks = []
    with ThreadPoolExecutor(16) as pool:  # a footer takes a while to read from a bucket
        for file, sizes in zip(files, pool.map(_row_groups, files), strict=True):
            if sizes is None:
                chunks.append(_chunk(file, None, 0, column))
                continue
            groups, start, count = [], 0, 0
            for i, size in enumerate(sizes):
                groups, count = [*groups, i], count + size
                if count >= rows or i == len(sizes) - 1:
                    chunks.append(_chunk(file, groups, start, column))
                    groups, start, count = [], start + count, 0
    return chunks


def arrow(files: list[epath.Path], column: str | None) -> list[Chunk]:
    """One chunk per Arrow file: it is a stream, without a footer that shows where to split it."""
    return [Chunk(str(file), lambda file=file: _items(file, _batches_of_arrow(file), 0, column)) for file in files]


def _chunk(file: epath.Path, groups: list[int] | None, start: int, column: str | None) -> Chunk:
    name = str(file) if groups is None else f"{file}, row groups {groups[0]} to {groups[-1]}"
    return Chunk(name, lambda: _items(file, _batches_of_parquet(file, groups), start, column))


def _row_groups(file: epath.Path) -> list[int] | None:
    """Rows of each row group; None if the footer is damaged."""
    try:
        with file.open("rb") as opened:
            about = pq.ParquetFile(opened).metadata
            return [about.row_group(i).num_rows for i in range(about.num_row_groups)]
    except (*BROKEN, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the file is missing or access is denied
            raise
        return None


def _batches_of_parquet(file: epath.Path, groups: list[int] | None) -> Iterator[pa.RecordBatch]:
    with file.open("rb") as opened:
        yield from pq.ParquetFile(opened, page_checksum_verification=True).iter_batches(ROWS, groups)


def _batches_of_arrow(file: epath.Path) -> Iterator[pa.RecordBatch]:
    """The batches of a stream, or of a file (as Feather), which is a stream between a mark and a footer.

    pyarrow takes a stream that is cut off, or zeros within, for its end: such a file raises ArrowInvalid."""
    with file.open("rb") as opened:
        opened.seek(-min(8, opened.seek(0, 2)), 2)
        tail, expected, count = opened.read(), None, 0
        opened.seek(0)
        if b"ARROW1" in (opened.read(6), tail[-6:]):
            expected = pa.ipc.open_file(opened).num_record_batches
            opened.seek(8)
        else:
            opened.seek(0)
        for batch in pa.ipc.open_stream(opened):
            count += 1
            batch.validate(full=True)
            yield from (batch.slice(at, ROWS) for at in range(0, batch.num_rows, ROWS))
        if count != expected and (expected is not None or opened.read(1) or tail != END_OF_STREAM):
            raise pa.ArrowInvalid(f"its stream ends after {count} batches, before the file does")


def _items(file: epath.Path, batches: Iterator, start: int, column: str | None) -> Iterator[Item]:
    number = itertools.count(start)
    for batch in batches:
        batch.validate(full=True)
        image_of = _image_column(file, batch.schema.names, column)
        for row in batch.to_pylist():
            image = _image(row.pop(image_of), file.parent)
            yield Item(f"{file.name}, row {next(number)}", image, row)


def _image(value: Any, folder: epath.Path) -> bytes | Callable[[], bytes] | None:
    """A picture from what its column holds; paths begin in `folder`."""
    if isinstance(value, list) and value and all(isinstance(x, int) and 0 <= x < 256 for x in value):
        return bytes(value)  # as numpy's uint8 become
    value = first(value)
    if isinstance(value, dict):
        names = {name.lower(): name for name in value}
        value = next((value[names[name]] for name in ("bytes", "path") if name in names and value[names[name]]), None)
    if isinstance(value, str) and value:
        return functools.partial(_read, folder, value)
    return value or None


def _read(folder: epath.Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def _image_column(file: epath.Path, names: list[str], column: str | None) -> str:
    wanted = [column] if column else IMAGES
    found = {name.lower(): name for name in reversed(names)}
    for name in wanted:
        if name.lower() in found:
            return found[name.lower()]
    raise ValueError(
        f"{file} has the columns {', '.join(names)}, and none is called {' or '.join(wanted)}: name the one with "
        "pictures by --image-column. For a table of URLs, such as LAION's own, img2dataset downloads the pictures"
    )
