"""Pictures in tables: Parquet, and the Arrow files of Hugging Face's `save_to_disk`.

The picture column holds bytes, or the Image type of `datasets`: bytes or the path of a file.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from flaxkd.data.chunks import BROKEN, Chunk, Item

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")  # usual names of the column
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
        yield from pq.ParquetFile(opened).iter_batches(ROWS, groups)


def _batches_of_arrow(file: epath.Path) -> Iterator[pa.RecordBatch]:
    with file.open("rb") as opened, pa.ipc.open_stream(opened) as stream:
        for batch in stream:
            yield from (batch.slice(at, ROWS) for at in range(0, batch.num_rows, ROWS))


def _items(file: epath.Path, batches: Iterator, start: int, column: str | None) -> Iterator[Item]:
    number = itertools.count(start)
    for batch in batches:
        image_of = _image_column(file, batch.schema.names, column)
        for row in batch.to_pylist():
            image = row.pop(image_of)
            if isinstance(image, dict):
                where = image.get("path")
                image = image.get("bytes") or ((file.parent / where).read_bytes if where else None)
            yield Item(f"{file.name}, row {next(number)}", image, row)


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
