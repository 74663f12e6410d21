"""A data set as a sequence of pictures with captions: the OpenMoji drawings, or your own folder. A cache of
`python -m flaxkd.cache` also opens as a source, with latents in place of pictures.

A folder (or a zip of one) has its captions in metadata.jsonl, as Hugging Face's imagefolder, or beside the pictures:
see folders.py. Pictures become squares as in diffusers' training scripts: the shorter side is resized (bilinear), then
the center is cropped. With buckets (buckets.py) they become rectangles, each of the nearest size, in the same way.
"""

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from etils import epath
from PIL import Image

from flaxkd.data import filters, folders, openmoji, pictures, records
from flaxkd.data.pictures import Unreadable
from flaxkd.machine import files, hosts
from flaxkd.machine.progress import Bar

METADATA = "metadata.jsonl"
SUBJECT = Path(__file__).parents[1] / "assets" / "subject"  # five pictures of one thing, for DreamBooth's miniature


@dataclass(frozen=True)
class Source:
    """A sequence of {"image": uint8[H, W, 3], "caption": str, "crop": pictures.Crop}.

    load: raises Unreadable for a damaged picture. fingerprint: equal if and only if the pictures, the captions and the
    sizes are the same. cache: a prebuilt cache of moments, or None. With one there are no pictures, and `load`
    raises ValueError. captions: all of them; None: as `load` has them.
    """

    size: int
    load: Callable[[int], dict]
    fingerprint: str
    cache: os.PathLike | None = None
    captions: list[str] | None = None
    sound: bool = False  # every picture is known to be readable
    sizes: tuple[tuple[int, int], ...] = ()  # (height, width) in pixels; several: each picture has one of them

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"picture {index} of {self.size}")
        return self.load(index)

    def all_captions(self) -> list[str]:
        """The captions of all pictures. Loads every picture of a source that does not list them."""
        return self.captions or [picture["caption"] for picture in self]


def readable(source: Source, indices: Iterable[int]) -> list[int]:
    """The indices whose pictures can be read. Names the others in one warning; ValueError if none is left."""

    def fault(index: int) -> str | None:
        try:
            source[index]
        except Unreadable as error:
            return str(error)
        return None

    indices = list(indices)
    if source.sound:
        return indices
    faults = []
    with (
        Bar(len(indices), "checking", " pictures", leave=False, disable=not hosts.is_first()) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for found in pool.map(fault, indices):
            faults.append(found)
            bar.update()
    pictures.report_unreadable([fault for fault in faults if fault], len(indices))
    return [index for index, fault in zip(indices, faults, strict=True) if not fault]


def default_data_dir() -> Path:
    """The folder of TFDS data sets: $TFDS_DATA_DIR, else `tfds` under `files.cache_home()`."""
    chosen = os.environ.get("TFDS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else files.cache_home() / "tfds"


def open_source(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    resolution: int = 64,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    background: str = "white",
    caption_column: str | None = None,
    image_column: str | None = None,
    caption: str | None = None,
) -> Source:
    """Opens "openmoji" (built on first use), the image folder or zip `name`, or a folder of `python -m flaxkd.cache`.

    split: "train" or "validation", by a hash of the caption. data_dir: of TFDS, `default_data_dir()` if None.
    resolution: pixels per side. sizes: several (height, width) in place of its squares, see buckets.py. background:
    color behind transparent pixels. caption_column, image_column: of metadata; None for the usual names. caption: of
    all pictures of a folder or zip, which needs no captions then and is not split: few pictures of one subject. Raises
    FileNotFoundError or ValueError that names the faulty lines.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}, must be 'train' or 'validation'")
    pictures.color(background)
    sizes = tuple(sizes or [(resolution, resolution)])
    if name == SUBJECT.name and not Path(name).exists():
        name = str(SUBJECT)
    if caption and (name == openmoji.OpenMoji.name or is_cache(epath.Path(name).expanduser())):
        raise ValueError(f"data.caption = {caption!r}: {name} has captions of its own; give a folder of pictures")
    if name == openmoji.OpenMoji.name:
        return _openmoji(split, Path(data_dir) if data_dir else default_data_dir(), sizes)
    path = epath.Path(name).expanduser()
    if is_cache(path):
        return _made_before(path, split)
    if (path / "cache.json").is_file() and is_cache(path.parent):
        raise ValueError(f"{path} is one split of a cache: give {path.parent}")
    if not (path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip")):
        other = f"; for a {path.suffix}, run `python -m flaxkd.cache --source {name}` first" if path.is_file() else ""
        raise FileNotFoundError(f"no data set {name!r}: give 'openmoji' or a folder with {METADATA}{other}")
    path = folders.of_split(path, "train")
    return _image_folder(path, split, sizes, background, caption_column, image_column, caption)


def is_cache(folder: os.PathLike) -> bool:
    """Whether a folder is one of `python -m flaxkd.cache`, finished or not: by what it holds, not by names alone."""
    folder = epath.Path(folder)
    if (folder / "train" / "cache.json").is_file():
        return True
    plan = folder / records.PLAN
    if not plan.is_file():
        return False
    if (folder / "done").is_dir():
        return True
    try:
        content = files.read_json(plan)
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and {"encoder", "parts"} <= content.keys()


def _made_before(folder: epath.Path, split: str) -> Source:
    if not (folder / split / "cache.json").is_file():
        raise FileNotFoundError(f"{folder} is not finished: run the same `python -m flaxkd.cache` again to resume")
    about = records.read_about(folder / split)

    def load(index: int) -> dict:
        raise ValueError(f"{folder} has latents and no pictures, but pictures are needed: give the original data")

    return Source(about["size"], load, about["source"], folder / split)


def _openmoji(split: str, data_dir: Path, sizes: tuple) -> Source:
    import tensorflow_datasets as tfds

    builder = openmoji.build(data_dir)
    # Decoded in `load`: TFDS would warn at every start that OpenCV is missing.
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    digest = hashlib.sha256(f"openmoji {split} {sizes}".encode())
    for file in sorted(Path(builder.data_path).glob(f"*-{split}.array_record*")):
        digest.update(file.read_bytes())

    def load(index: int) -> dict:
        record = records[index]
        with Image.open(io.BytesIO(record["image"])) as image:
            image, crop = pictures.fit(image, sizes)
            return {"image": image, "caption": record["caption"].decode(), "crop": crop}

    return Source(len(records), load, digest.hexdigest(), sound=True, sizes=sizes)


def _image_folder(
    folder: epath.Path,
    split: str,
    sizes: tuple,
    background: str,
    caption_column: str | None,
    image_column: str | None,
    caption: str | None,
) -> Source:
    tree, entries, left = _entries(folder, caption_column, image_column, caption)
    if left and split == "train":  # said once, though both splits are opened
        logging.warning("%d pictures are left out:\n%s", len(left), pictures.shown(left))
    entries = entries if caption else _in_split(entries, split, folder)
    # size and time stand for the contents: reading a million pictures takes hours
    digest = hashlib.sha256(f"image_folder 3 {sizes} {pictures.color(background)}".encode())
    for _, file, caption in entries:
        digest.update(f"{file}\0{caption}\0{tree.stamp(file)}\n".encode(errors="surrogatepass"))

    def load(index: int) -> dict:
        place, file, caption = entries[index]
        try:
            with pictures.opened(tree.read(file)) as image:
                image, crop = pictures.fit(image, sizes, background)
                return {"image": image, "caption": caption, "crop": crop}
        except Exception as error:  # any kind: decoders raise all sorts of errors on damaged pictures
            if pictures.passing(error):
                raise
            where, line = (f"{place}: ", " or remove the line") if place else (f"{folder}: ", "")
            raise Unreadable(
                f"{where}{file} cannot be read as a picture ({type(error).__name__}: {error}); replace the file{line}"
            ) from error

    captions = [caption for _, _, caption in entries]
    return Source(len(entries), load, digest.hexdigest(), captions=captions, sizes=sizes)


def _entries(folder: epath.Path, caption_column: str | None, image_column: str | None, caption: str | None) -> tuple:
    """The tree of a folder or zip, (place, picture, caption) of its pictures, and a line for each one left out: those
    without a caption beside them, and those that the metadata do not name.

    Raises ValueError, or FileNotFoundError for missing pictures alone, that names all faulty lines of the metadata."""
    try:
        tree = folders.open_tree(folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{folder} is damaged ({error}): download or pack it again") from error
    if caption and (found := [("", file, caption) for file in tree.files if pictures.is_picture(file)]):
        return tree, found, []
    listing = folders.Listing(tree, image_column)
    if not len(listing):
        packed = [file for file in tree.files if file.lower().endswith((".tar", ".gz", ".tgz", ".parquet", ".arrow"))]
        remedy = f"; for {packed[0]}, run `python -m flaxkd.cache --source {folder}` first" if packed else ""
        raise FileNotFoundError(
            f'{folder} has no {METADATA}: one line per picture, {{"file_name": "a.png", "text": "caption"}}, '
            f"and no picture with a caption beside it{remedy}"
        )
    with ThreadPoolExecutor(16) as pool:
        items = list(pool.map(listing.__getitem__, range(len(listing))))
    found, faulty, left = [], [], []
    for entry, item in zip(listing.listed, items, strict=True):
        _, detail = item.fault or ("", "")
        caption = None
        if not item.fault:
            try:
                caption = filters.caption_of(item.about, caption_column)
                detail = f"{caption_column or 'text'!r} is missing or empty; it has {', '.join(map(str, item.about))}"
                detail += ": name the column with captions by --config.data.caption_column" if item.about else "nothing"
            except ValueError as error:
                detail = f"its caption is not text ({error})"
        if caption is not None:
            found.append((entry.place, entry.file, caption))
        elif entry.place:
            faulty.append((item.fault, f"{entry.place}: {detail}"))
        else:
            left.append(f"{item.name}: {detail}")
    if faulty:
        missing = all(fault and fault[0] == "unreadable picture" for fault, _ in faulty)
        raise (FileNotFoundError if missing else ValueError)(pictures.shown([text for _, text in faulty]))
    if not found:
        raise ValueError(f"{folder}: none of its {len(left):,} pictures has a caption: {pictures.shown(left)}")
    return tree, found, left


def _in_split(entries: list, split: str, folder: Path) -> list:
    """The entries of a split. In a small folder the lowest hash goes to validation, so no split is empty."""
    captions = {caption for _, _, caption in entries}
    validation = {caption for caption in captions if openmoji.split_of(caption) == "validation"}
    if len(captions) < 2:
        raise ValueError(f"{folder} has one caption only: give at least two, one to hold out; or data.caption, for all")
    if not validation:
        validation = {min(captions, key=openmoji.caption_hash)}
    if validation == captions:
        validation.remove(max(captions, key=openmoji.caption_hash))
    return [entry for entry in entries if (entry[2] in validation) == (split == "validation")]
