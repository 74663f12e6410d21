"""Large image sets as chunks. Any process can read any chunk, from start to end.

    source                      content                                              chunk
    FOLDER/*.tar                WebDataset tars, as written by img2dataset           a tar
    FOLDER/*.parquet            pictures in a column                                 some row groups of a file
    FOLDER/state.json           Hugging Face data set, from `save_to_disk`           an Arrow file
    FOLDER/metadata.jsonl       a line each: file_name, text, ...; or metadata.csv   a range of lines
    FOLDER/**/*.jpg             next to a .txt or .json of the same name             a range of files
    NAME or NAME/CONFIG         TFDS data set, stored as ArrayRecord                 a range of records

A folder may be `gs://`. A single file or a pattern (`gs://bucket/0*.tar`) also works. The chunks depend on the source
alone, so its cache is the same for any number of hosts. Nothing is decoded here.
"""

import csv
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from flaxkd.data import openmoji, sources, tables
from flaxkd.data.chunks import Chunk, Item, ranges

ROWS = 8192  # of a chunk that is a range; a tar or an Arrow file is never split
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".tar", ".parquet", ".arrow")


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
    for name in (sources.METADATA, "metadata.csv"):
        if name in present:
            return _listed(path, path / name, rows)
    if "state.json" in present:
        listed = json.loads((path / "state.json").read_text())["_data_files"]
        return _files([path / entry["filename"] for entry in listed], image_column, rows)
    if split in present and (path / split).is_dir():
        return _folder(path / split, split, image_column, rows)
    if "dataset_dict.json" in present:
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} has the splits {', '.join(names)}, not {split}: choose one with --split")
    for ending in TABLES:  # tars first: img2dataset leaves a Parquet file of metadata beside each
        if files := sorted(path.glob(f"*{ending}")) or sorted(path.glob(f"*/*{ending}")):
            return _files([f for f in files if f.name.startswith(f"{split}-")] or files, image_column, rows)
    found = (epath.Path(root) / name for root, _, names in path.walk() for name in names)
    files = sorted(file for file in found if file.suffix.lower() in ENDINGS)
    return ranges(len(files), rows, str(path), lambda i: _beside(path, files[i]))


def _files(files: list[epath.Path], image_column: str | None, rows: int) -> list[Chunk]:
    kinds = {file.suffix for file in files}
    if kinds == {".tar"}:
        return [Chunk(str(file), lambda file=file: _tar(file)) for file in files]
    if kinds == {".parquet"}:
        return tables.parquet(files, image_column, rows)
    if kinds == {".arrow"}:
        return tables.arrow(files, image_column)
    raise ValueError(
        f"{files[0]}{' and others' if len(files) > 1 else ''}: the files of a source must all end in one of "
        f"{', '.join(TABLES)}, not in {', '.join(sorted(kinds))}"
    )


def _tar(path: epath.Path) -> Iterator[Item]:
    """WebDataset samples: neighbouring files of a tar, with equal names up to the first dot."""
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Strict) as tar:
        for key, files in itertools.groupby(_named(tar), lambda entry: entry[0]):
            image, about = None, {}
            for _, ending, content in files:
                if ending.endswith(ENDINGS):
                    image = image or content
                else:
                    about = _more(about, ending, content)
            yield Item(f"{path.name}/{key}", image, about)


class _Strict(tarfile.TarInfo):
    """Raises for a damaged or missing header, which tarfile alone takes for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # two blocks of zeros, the true end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"after {tar.offset:,} bytes: {error}") from error


def _named(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    """(key, .ending, content) of the useful files in a streamed tar."""
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        key, _, ending = name.partition(".")
        ending = f".{ending.lower()}"
        if member.isfile() and key and ending.endswith((*ENDINGS, ".txt", ".json")):
            yield f"{folder}{slash}{key}", ending, tar.extractfile(member).read()


def _more(about: dict, ending: str, content: bytes) -> dict:
    """`about` of a picture, extended by the content of its .txt or .json; the text of a .txt is named txt."""
    if ending.endswith(".txt"):
        return about | {"txt": content.decode(errors="replace")}
    try:
        known = json.loads(content)
    except ValueError:  # a filter or the caption then reports what is missing
        return about
    return {**known, **about} if isinstance(known, dict) else about


def _listed(folder: epath.Path, metadata: epath.Path, rows: int) -> list[Chunk]:
    """Chunks of the entries of a metadata file. A malformed entry becomes an item without a picture."""
    with metadata.open("r") as file:
        if metadata.suffix == ".csv":
            entries = list(csv.DictReader(file))
        else:
            entries = [line for line in file if line.strip()]

    def load(i: int) -> Item:
        try:
            about = entries[i] if isinstance(entries[i], dict) else json.loads(entries[i])
            return Item(about["file_name"], (folder / about["file_name"]).read_bytes, about)
        except (ValueError, KeyError, TypeError):
            return Item(f"{metadata.name}, entry {i + 1}", None, {})

    return ranges(len(entries), rows, str(metadata), load)


def _beside(folder: epath.Path, file: epath.Path) -> Item:
    about: dict = {}
    for ending in (".txt", ".json"):
        if (more := file.with_suffix(ending)).is_file():
            about = _more(about, ending, more.read_bytes())
    return Item(str(file.relative_to(folder)), file.read_bytes, about)


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
