"""Pictures one file each, in a folder or a zip: listed in a metadata file, or each next to its caption.

    DIR/metadata.jsonl, .csv, .tsv, .parquet   a row a picture: its name in the file's folder, its caption
    DIR/a.jpg with a.txt, a.caption or a.json  a caption beside a picture, also as a.jpg.txt

A metadata file counts for its folder and those below, up to the next one.
"""

import collections
import errno
import functools
import os
import posixpath
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from flaxkd.data import metadata, text
from flaxkd.data.chunks import Item, first
from flaxkd.data.pictures import is_picture

BESIDE = (".txt", ".caption", ".json")  # in any case; a .txt and a .caption are the field of that name


class Tree(NamedTuple):
    """Files below a folder, or in a zip. files: their names below it, with slashes, sorted."""

    name: str
    files: list[str]
    read: Callable[[str], bytes]
    stamp: Callable[[str], str]  # equal only for equal contents, as far as can be told without reading them


def open_tree(path: epath.Path) -> Tree:
    """The files of a folder or zip. Raises zipfile.BadZipFile for a damaged zip."""
    if path.is_dir():
        read, stamp = lambda name: (path / name).read_bytes(), lambda name: _stamp(path / name)
        return Tree(str(path), sorted(_walk(path)), read, stamp)
    try:
        archive = zipfile.ZipFile(path.open("rb") if "://" in os.fspath(path) else os.fspath(path))
        found = [about for about in archive.infolist() if not about.is_dir()]
        twice = {name for name, n in collections.Counter(about.filename for about in found).items() if n > 1}
        _check_directory(
            archive, [about for about in found if about.filename in twice or not is_picture(about.filename)]
        )
    except Exception as error:  # of many kinds, as the damaged field may be
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the latter: an offset below 0
            raise
        raise zipfile.BadZipFile(f"{type(error).__name__}: {error}") from error
    by_name = {about.filename: about for about in found}

    def read(name: str) -> bytes:
        if name in twice:
            raise ValueError(f"{name} is in {path.name} more than once")
        return archive.read(name)

    stamp = lambda name: f"{by_name[name].file_size}\0{by_name[name].CRC}" if name in by_name else "gone"
    return Tree(str(path), sorted(by_name), read, stamp)


def _check_directory(archive: zipfile.ZipFile, doubtful: list[zipfile.ZipInfo]) -> None:
    """Raises BadZipFile if a zip's directory is damaged: it has no checksum, but every name is in the zip twice."""
    archive.fp.seek(-min(archive.fp.seek(0, 2), 22 + 2**16), 2)
    tail = archive.fp.read()
    (entries,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\5\6") + 10)
    if entries not in (len(archive.infolist()), 2**16 - 1):  # the latter stands for more
        raise zipfile.BadZipFile(f"it has {entries} files, its directory lists {len(archive.infolist())}")
    for about in doubtful:
        if not about.flag_bits & 1:  # encrypted
            archive.open(about).close()


def of_split(path: epath.Path, split: str) -> epath.Path:
    """The folder of a split, where a folder has one each and no metadata of its own."""
    inside = path / split
    listed = path.is_dir() and any(metadata.is_metadata(file.name) for file in path.iterdir())
    return inside if not listed and inside.is_dir() else path


def _stamp(file: epath.Path) -> str:
    try:
        about = os.stat(file)
    except (OSError, ValueError):
        return "gone"
    return f"{about.st_size}\0{about.st_mtime_ns}"


def _walk(root: epath.Path) -> Iterator[str]:
    """The files below a folder. Symbolic links are followed, but no folder is entered twice."""
    if "://" in os.fspath(root):
        for folder, _, names in root.walk():
            yield from (str((epath.Path(folder) / name).relative_to(root)) for name in names)
        return
    seen, linked = set(), [os.fspath(root)]
    while linked:  # real folders first: a linked one keeps its own name where it has one
        folders = [linked.pop(0)]
        while folders:
            folder = folders.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if os.path.isdir(entry.path):  # False for a link to itself, where entry.is_dir() raises
                        (linked if entry.is_symlink() else folders).append(entry.path)
                    else:
                        yield os.path.relpath(entry.path, root).replace(os.sep, "/")


class Listed(NamedTuple):
    """A picture of a tree: place in what lists it ("" for one beside its caption), name, fields, and any fault."""

    place: str
    file: str | None
    about: dict[str, Any] | None  # None: still to be read, from files beside it
    fault: tuple[str, str] | None = None


class Listing:
    """All pictures of a tree as a sequence of `Item`."""

    def __init__(self, tree: Tree, image_column: str | None = None):
        """image_column: of metadata files; None for one of `metadata.FILES`. Raises ValueError for a damaged list."""
        self.tree = tree
        present = set(tree.files)
        lists = sorted(filter(metadata.is_metadata, tree.files), key=metadata.order, reverse=True)
        self.lists = {posixpath.dirname(name): name for name in lists}
        columns = (image_column,) if image_column else (*metadata.FILES, "image")
        self.listed: list[Listed] = []
        for folder, name in sorted(self.lists.items()):
            where = posixpath.join(tree.name, name)
            for row in metadata.rows(where, tree.read(name)):
                self.listed.append(self._row(row, folder, where, columns, present))
        named = {entry.file for entry in self.listed}
        for file in tree.files:
            if is_picture(file) and file not in named:
                owner = self._owner(file)
                fault = owner and ("not listed", f"{owner} does not name it")
                self.listed.append(Listed("", file, {} if owner else None, fault))
        self._beside = self._captions()

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, i: int) -> Item:
        entry = self.listed[i]
        about, fault = entry.about, entry.fault
        if about is None:
            about, fault = self._read_beside(entry.file)
        name = entry.file or entry.place
        return Item(name, functools.partial(self.tree.read, entry.file) if entry.file else None, about, fault)

    def _row(self, row: metadata.Row, folder: str, where: str, columns: tuple, present: set[str]) -> Listed:
        place = f"{where}, {row.place}"
        if row.fault:
            return Listed(place, None, row.about, ("no picture", row.fault))
        names = {str(name).lower(): name for name in row.about}
        column = next((names[name.lower()] for name in columns if name.lower() in names), None)
        value = first(row.about[column]) if column is not None else None
        if isinstance(value, dict):
            value = value.get("path")
        if not isinstance(value, str) or not value.strip():
            detail = f"{columns[0]!r} is missing or empty; it has {', '.join(map(str, row.about)) or 'nothing'}"
            return Listed(place, None, row.about, ("no picture", detail))
        spellings = [posixpath.normpath(posixpath.join(folder, name)) for name in (value, value.replace("\\", "/"))]
        file = next((name for name in spellings if name in present), None)
        if file is None and not self.exists(file := spellings[0]):
            detail = f"there is no file {posixpath.join(self.tree.name, file)}"
            return Listed(place, file, row.about, ("unreadable picture", detail))
        return Listed(place, file, row.about)

    def exists(self, file: str) -> bool:
        """Whether a file outside the tree is there; nothing is outside a zip."""
        try:
            return Path(self.tree.name).is_dir() and (Path(self.tree.name) / file).is_file()
        except (OSError, ValueError):  # a name too long, or with a zero byte
            return False

    def _owner(self, file: str) -> str | None:
        """The metadata file that counts for a picture."""
        folder = posixpath.dirname(file)
        while folder not in self.lists:
            if not folder:
                return None
            folder = posixpath.dirname(folder)
        return self.lists[folder]

    def _captions(self) -> dict[str, list[str]]:
        """{"a" or "a.jpg": files with its captions}, those of a whole file name too."""
        found: dict[str, list[str]] = {}
        for file in self.tree.files:
            stem, ending = posixpath.splitext(file)
            if ending.lower() in BESIDE:
                found.setdefault(stem, []).append(file)
        return found

    def _read_beside(self, picture: str) -> tuple[dict, tuple[str, str] | None]:
        files = self._beside.get(picture) or self._beside.get(posixpath.splitext(picture)[0], [])
        try:
            return fields({posixpath.splitext(file)[1]: self.tree.read(file) for file in files})
        except Exception as error:  # whatever an archive raises for a damaged or locked entry
            return {}, ("no caption", f"{', '.join(files)}: {type(error).__name__}: {error}")


def fields(texts: dict[str, bytes]) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The fields of a picture, and any fault, from the files beside it, {ending: content}.

    A text becomes the field of its ending, such as `txt`, and goes before a field of that name in a .json."""
    about: dict[str, Any] = {}
    known: dict[str, Any] = {}
    faults = {}
    for ending, content in texts.items():
        name = ending.lower().lstrip(".")
        try:
            found = text.decode(content)
            if name.endswith("json"):
                more = text.parse(found)
                known |= more if isinstance(more, dict) else {}
            else:
                about[name] = found
        except ValueError as error:
            faults[ending] = error
    if about and all(ending.lower().endswith("json") for ending in faults):
        faults = {}  # a caption is there; a filter reports a score that is missing
    detail = "; ".join(f"{ending}: {error}" for ending, error in faults.items())
    return known | about, ("no caption", detail) if faults else None
