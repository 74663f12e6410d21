"""A data set as a sequence of pictures with captions: the OpenMoji drawings, or your own folder. A cache of
`python -m flaxkd.cache` also opens as a source, with latents in place of pictures.

An image folder has a file metadata.jsonl with one JSON object per line: `file_name` (relative to the folder)
and `text` (the caption), as in Hugging Face's imagefolder. Pictures become squares as in diffusers' training
scripts: the shorter side is resized (bilinear), then the center is cropped.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from flaxkd.data import openmoji, records
from flaxkd.machine import files

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Source:
    """A sequence of {"image": uint8[resolution, resolution, 3], "caption": str}.

    fingerprint: equal if and only if the pictures, the captions and the resolution are the same.
    cache: a prebuilt cache of moments, or None. With one there are no pictures, and `load` raises ValueError.
    """

    size: int
    load: Callable[[int], dict]
    fingerprint: str
    cache: os.PathLike | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"picture {index} of {self.size}")
        return self.load(index)


def default_data_dir() -> Path:
    """The folder of TFDS data sets: $TFDS_DATA_DIR, else `tfds` under `files.cache_home()`."""
    chosen = os.environ.get("TFDS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else files.cache_home() / "tfds"


def open_source(name: str, split: str, data_dir: str | Path | None = None, resolution: int = 64) -> Source:
    """Opens "openmoji" (built on first use), the image folder `name`, or a folder of `python -m flaxkd.cache`.

    split: "train" or "validation", by a hash of the caption. data_dir: of TFDS, `default_data_dir()` if None.
    resolution: pixels per side. Raises FileNotFoundError or ValueError that names the faulty line.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}, must be 'train' or 'validation'")
    if name == openmoji.OpenMoji.name:
        return _openmoji(split, Path(data_dir) if data_dir else default_data_dir(), resolution)
    if (made := epath.Path(name).expanduser() / records.PLAN).is_file():
        return _made_before(made.parent, split)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set {name!r}: give 'openmoji' or a folder with {METADATA}")
    return _image_folder(folder, split, resolution)


def square(image: Image.Image, resolution: int) -> np.ndarray:
    """Shorter side resized to `resolution` (bilinear), center cropped: uint8[resolution, resolution, 3]."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = image.size
    if (width, height) != (resolution, resolution):
        short = min(width, height)
        width, height = resolution * width // short, resolution * height // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - resolution) / 2), round((height - resolution) / 2)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image)


def _made_before(folder: epath.Path, split: str) -> Source:
    if not (folder / split / "cache.json").is_file():
        raise FileNotFoundError(f"{folder} is not finished: run the same `python -m flaxkd.cache` again to resume")
    about = records.read_about(folder / split)

    def load(index: int) -> dict:
        raise ValueError(f"{folder} has latents and no pictures, but pictures are needed: give the original data")

    return Source(about["size"], load, about["source"], folder / split)


def _openmoji(split: str, data_dir: Path, resolution: int) -> Source:
    import tensorflow_datasets as tfds

    builder = openmoji.build(data_dir)
    # Decoded in `load`: TFDS would warn at every start that OpenCV is missing.
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    digest = hashlib.sha256(f"openmoji {split} {resolution}".encode())
    for file in sorted(Path(builder.data_path).glob(f"*-{split}.array_record*")):
        digest.update(file.read_bytes())

    def load(index: int) -> dict:
        record = records[index]
        with Image.open(io.BytesIO(record["image"])) as image:
            return {"image": square(image, resolution), "caption": record["caption"].decode()}

    return Source(len(records), load, digest.hexdigest())


def _image_folder(folder: Path, split: str, resolution: int) -> Source:
    entries = _in_split(read_metadata(folder), split, folder)
    digest = hashlib.sha256(f"image_folder {resolution}".encode())
    for _, file, caption in entries:
        stat = file.stat()  # size and time stand for the contents: reading a million pictures takes hours
        digest.update(f"{file.relative_to(folder)}\0{caption}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())

    def load(index: int) -> dict:
        line, file, caption = entries[index]
        try:
            with Image.open(file) as image:
                return {"image": square(image, resolution), "caption": caption}
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{folder / METADATA}, line {line}: {file.name} cannot be read as a picture ({error}); "
                "replace the file or remove the line"
            ) from error

    return Source(len(entries), load, digest.hexdigest())


def read_metadata(folder: Path) -> list[tuple[int, Path, str]]:
    """(line number, picture, caption) of every line of the folder's metadata.jsonl; blank lines are skipped.

    Raises FileNotFoundError if it or a picture is missing, and ValueError with the number of a malformed line.
    """
    metadata = folder / METADATA
    if not metadata.is_file():
        raise FileNotFoundError(
            f'{folder} has no {METADATA}: one line per picture, {{"file_name": "a.png", "text": "caption"}}'
        )
    entries = []
    for line, text in enumerate(metadata.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{metadata}, line {line}"
        try:
            entry = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: a {type(entry).__name__}, must be an object with file_name and text")
        for key in ("file_name", "text"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise ValueError(f"{where}: {key!r} is missing or empty; the line has {sorted(entry)}")
        file = folder / entry["file_name"]
        if not file.is_file():
            raise FileNotFoundError(f"{where}: there is no file {file}")
        entries.append((line, file, entry["text"].strip()))
    if not entries:
        raise ValueError(f"{metadata} is empty")
    return entries


def _in_split(entries: list, split: str, folder: Path) -> list:
    """The entries of a split. In a small folder the lowest hash goes to validation, so no split is empty."""
    captions = {caption for _, _, caption in entries}
    validation = {caption for caption in captions if openmoji.split_of(caption) == "validation"}
    if len(captions) < 2:
        raise ValueError(f"{folder / METADATA} has one caption only: give at least two, one to hold out")
    if not validation:
        validation = {min(captions, key=openmoji.caption_hash)}
    if validation == captions:
        validation.remove(max(captions, key=openmoji.caption_hash))
    return [entry for entry in entries if (entry[2] in validation) == (split == "validation")]
