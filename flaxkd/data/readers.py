"""Large image sets as chunks. Any process can read any chunk, from start to end.

    source                      content                                              chunk
    FOLDER/*.tar                WebDataset tars, as written by img2dataset           a tar
    FOLDER/*.parquet            pictures in a column                                 some row groups of a file
    FOLDER/state.json           Hugging Face data set, from `save_to_disk`           an Arrow file
    FOLDER/**/metadata.jsonl    or .csv: a row each, with file_name, text, ...       a range of rows
    FOLDER/**/*.jpg             next to a .txt, .caption or .json of the same name   a range of files
    FOLDER/*.zip                a folder as one of the last two                      a range of its files
    NAME or NAME/CONFIG         TFDS data set, stored as ArrayRecord                 a range of records

A folder may be `gs://`. A single file or a pattern (`gs://bucket/0*.tar`) also works, and a tar may be compressed. The
chunks depend on the source alone, so its cache is the same for any number of hosts. Nothing is decoded here.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from flaxkd.data import folders, metadata, openmoji, sources, tables, tars
from flaxkd.data.chunks import BROKEN, Chunk, Item, ranges
from flaxkd.machine import files as machine_files

ROWS = 8192  # of a chunk that is a range; a tar or an Arrow file is never split
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def _tars(files: list[epath.Path], column: str | None, rows: int) -> list[Chunk]:
    return [Chunk(str(file), lambda file=file: tars.items(file, column)) for file in files]


def _trees(files: list[epath.Path], column: str | None, rows: int) -> list[Chunk]:
    found = [chunk for file in files for chunk in _tree(file, column, rows)]
    return found or ranges(0, rows, str(files[0]), found.__getitem__)


def _arrows(files: list[epath.Path], column: str | None, rows: int) -> list[Chunk]:
    return tables.arrow(files, column)


# Files that hold many pictures: their endings, and how they become chunks. The first kind found in a folder counts:
# img2dataset leaves a Parquet file of metadata beside each tar. A zip counts where nothing else does.
KINDS: dict[tuple[str, ...], Callable[[list[epath.Path], str | None, int], list[Chunk]]] = {
    TARS: _tars,
    (".parquet", ".pq"): tables.parquet,
    (".arrow", ".feather"): _arrows,
    (".zip",): _trees,
}


def open_chunks(source: str, *, split: str = "train", image_column: str | None = None, rows: int = ROWS) -> list[Chunk]:
    """The chunks of a source, ordered by name. Reads lists and footers, not pictures.

    split: of a source with several. image_column: of tables; None for one of `tables.IMAGES`. rows: per range.
    Raises FileNotFoundError, or ValueError if nothing in the source can be used, each with the remedy."""
    if source == openmoji.OpenMoji.name:
        openmoji.build(sources.default_data_dir())
        return _tfds(source, split, rows)
    path = epath.Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split, image_column, rows)
    if path.is_file():
        return _files([path], image_column, rows)
    if any(sign in path.name for sign in "*?["):
        if not (files := sorted(path.parent.glob(path.name))):
            raise FileNotFoundError(f"no file is called like {source}")
        return _files(files, image_column, rows)
    if re.fullmatch(r"[a-z]\w*(/[\w.-]+)?(:[\d.*]+)?", source):
        return _tfds(source, split, rows)
    raise FileNotFoundError(
        f"there is no {source}: give a folder of tars, Parquet files or pictures, a Hugging Face data set, a file, "
        "a pattern of files, or the name of a TFDS data set"
    )


def _folder(path: epath.Path, split: str, image_column: str | None, rows: int) -> list[Chunk]:
    present = {file.name for file in path.iterdir()}
    if sources.is_cache(path):
        raise ValueError(f"{path} is a cache of latents already: train with --config.data.source={path}")
    if not any(metadata.is_metadata(name) for name in present):
        if "state.json" in present:
            listed = machine_files.read_json(path / "state.json")
            try:
                names = [entry["filename"] for entry in listed["_data_files"]]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path / 'state.json'} names no _data_files: is it of save_to_disk?") from error
            return _files([path / name for name in names], image_column, rows)
        if split in present and (path / split).is_dir():
            return _folder(path / split, split, image_column, rows)
        if "dataset_dict.json" in present:
            names = machine_files.read_json(path / "dataset_dict.json").get("splits", [])
            raise ValueError(f"{path} has the splits {', '.join(names)}, not {split}: choose one with --split")
        for endings, chunks in KINDS.items():
            of_kind = lambda file, endings=endings: _ends(file, endings) and not metadata.is_metadata(file.name)
            files = sorted(filter(of_kind, path.iterdir())) or sorted(filter(of_kind, path.glob("*/*")))
            if chunks is _trees and files and len(folders.Listing(folders.open_tree(path))):
                logging.warning("%s has pictures, so its %s is not read", path, ", ".join(file.name for file in files))
            elif files:
                return _files([f for f in files if f.name.startswith(f"{split}-")] or files, image_column, rows)
    return _trees([path], image_column, rows)


def _ends(file: epath.Path, endings: tuple[str, ...]) -> bool:
    return file.name.lower().endswith(endings) and not file.name.startswith(".")


def _files(files: list[epath.Path], image_column: str | None, rows: int) -> list[Chunk]:
    for endings, chunks in KINDS.items():
        if all(_ends(file, endings) for file in files):
            return chunks(files, image_column, rows)
    known = [ending for endings in KINDS for ending in endings]
    raise ValueError(
        f"{files[0]}{' and others' if len(files) > 1 else ''}: the files of a source must all end in one of "
        f"{', '.join(known)}, not in {', '.join(sorted({file.suffix for file in files}))}"
    )


def _tree(path: epath.Path, image_column: str | None, rows: int) -> list[Chunk]:
    """Chunks of a folder or zip; none without pictures. A damaged zip becomes one chunk, which raises Broken."""
    try:
        listing = folders.Listing(folders.open_tree(path), image_column)
    except BROKEN as error:
        return [Chunk(str(path), lambda error=error: _raised(error))]
    return ranges(len(listing), rows, str(path), listing.__getitem__) if len(listing) else []


def _raised(error: Exception) -> Iterator[Item]:
    raise error
    yield


def _tfds(name: str, split: str, rows: int) -> list[Chunk]:
    import tensorflow_datasets as tfds

    where = str(sources.default_data_dir())
    try:
        builder = tfds.builder(name, data_dir=where)
        if not epath.Path(builder.data_path).exists():
            builder = tfds.builder(name, data_dir=where, file_format="array_record")
            builder.download_and_prepare()
    except tfds.core.registered.DatasetNotFoundError as error:
        raise FileNotFoundError(f"{name} is neither a path nor a data set that TFDS knows") from error
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if not images:
        raise ValueError(f"{name} has no picture among its {', '.join(features)}")
    try:  # Pictures stay encoded, as everywhere here. When decoding, TFDS warns that OpenCV is missing.
        records = builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding() for key in images})
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path} is not stored as ArrayRecord, the only format with random access without "
            f"TensorFlow: rebuild it with `tfds build {name} --file_format=array_record`"
        ) from error

    def load(i: int) -> Item:
        record = dict(records[i])
        return Item(f"{name} {split}, {i}", record.pop(images[0]), dict(_flat(record)))

    return ranges(len(records), rows, f"{name} {split}", load)


def _flat(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"captions": {"text": x}} as ("captions/text", x)."""
    for name, value in tree.items():
        yield from (_flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)])
