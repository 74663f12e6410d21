"""WebDataset tars, as img2dataset writes them; also compressed, and tars of a folder with a metadata file.

As in webdataset, neighbouring files with one key are a sample; a key is a file's path up to the first dot of its name.
A picture's caption has the picture's own name. Whatever a sample leaves open is skipped and listed, never guessed.
"""

import collections
import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from flaxkd.data import folders, metadata
from flaxkd.data.chunks import BROKEN, Item
from flaxkd.data.pictures import is_picture

TWICE = "the same name twice in a sample"


class Member(NamedTuple):
    """A file of a tar. part: of tars in one file. key, ending: its name up to the first dot, and from there on.
    content: b"" of a file of no use, None of a link."""

    name: str
    part: int
    key: str
    ending: str
    content: bytes | None


def items(path: epath.Path, image_column: str | None) -> Iterator[Item]:
    """The items of a tar. image_column: ending of the pictures, such as "left.jpg"; None for any.

    Pictures without any text wait for the end: if the tar has a metadata file, it is read again, else they are given
    as they are. Raises tarfile.TarError and others of `chunks.BROKEN` where the tar is damaged."""
    bare: list[str] = []
    lists: dict[str, bytes] = {}
    alone = lambda why: (Item(f"{path.name}/{name}", None, {}, ("no caption", why)) for name in bare)
    try:
        for _, run in itertools.groupby(_members(path), lambda member: (member.part, member.key)):
            run = list(run)
            lists |= {member.name: member.content for member in run if metadata.is_metadata(member.name)}
            for name, item in _sample(path.name, run, image_column):
                if item.image is None or item.about or item.fault:
                    yield item
                else:
                    bare.append(name)
    except BROKEN:
        yield from alone("the tar is damaged before its end")
        raise
    if not lists:
        yield from alone("no file goes with it")
        return
    try:
        tree = folders.Tree(str(path), sorted({*bare, *lists}), lambda name: lists[name] or b"", str)
        listed = folders.Listing(tree, image_column).listed
    except ValueError as error:
        yield from alone(str(error))
        return
    twice = {name for name, n in collections.Counter(bare).items() if n > 1}
    wanted = {entry.file: entry for entry in listed if not entry.fault and entry.file not in twice}
    for member in _members(path):
        if (entry := wanted.get(member.name)) and member.content:
            yield Item(f"{path.name}/{member.name}", member.content, entry.about)
    for entry in listed:
        if entry.file not in wanted:
            fault = entry.fault or (TWICE, "")
            yield Item(f"{path.name}/{entry.file or entry.place}", None, entry.about or {}, fault)


def _sample(tar: str, run: list[Member], image_column: str | None) -> Iterator[tuple[str, Item]]:
    """(file name, item) of all pictures of a sample, and of texts without one. run: neighbours with one key."""
    pictures = [member for member in run if is_picture(member.name)]
    texts = [member for member in run if member.ending.endswith(folders.BESIDE)]
    item = lambda member, *rest: (member.name, Item(f"{tar}/{posixpath.splitext(member.name)[0]}", *rest))
    all_endings = [member.ending.lstrip(".") for member in run]
    if twice := sorted({ending for ending in all_endings if all_endings.count(ending) > 1}):
        yield from (item(member, None, {}, (TWICE, ", ".join(twice))) for member in pictures or texts[:1])
        return
    if links := [member.name for member in (*pictures, *texts) if member.content is None]:
        detail = f"{', '.join(links)}: a link, its content is elsewhere"
        yield from (item(member, None, {}, ("a link in a tar", detail)) for member in pictures or texts[:1])
        return
    remedy = f"the sample has {', '.join(all_endings)}: name one by --image-column and --caption-column"
    if image_column:
        about, fault = folders.fields({member.ending: member.content for member in texts})
        found = [member for member in pictures if member.ending.lstrip(".") == image_column.lower().lstrip(".")]
        for member in found or (pictures + texts)[:1]:
            fault = fault if found else ("no picture", remedy)
            yield item(member, member.content if found else None, about, fault)
        return
    stem = lambda member: member.ending.rpartition(".")[0]
    own = {name: [text for text in texts if stem(text) == name] for name in map(stem, texts)}
    taken = set()
    for member in pictures:
        if stem(member) in taken:
            detail = f"another of its name was taken; {remedy}"
            yield member.name, Item(f"{tar}/{member.name}", None, {}, ("a second picture in a sample", detail))
            continue
        taken.add(stem(member))
        about, fault = folders.fields(
            {f".{text.ending.rpartition('.')[2]}": text.content for text in own.get(stem(member), ())}
        )
        if texts and stem(member) not in own:
            fault = ("no caption", remedy)
        if not stem(member):  # captions by other hands, as KEY.blip.txt: a field each, for --caption-column
            more = [text for text in texts if stem(text) and not any(stem(text) == stem(other) for other in pictures)]
            about = folders.fields({text.ending: text.content for text in more})[0] | about
        yield item(member, member.content, about, fault)
    for name, left in own.items():
        if name not in taken and (not pictures or "" not in taken):
            yield item(left[0], None, {}, ("no picture", remedy if pictures else "a text alone"))


class _Strict(tarfile.TarInfo):
    """Raises for a damaged or missing header, which tarfile alone takes for the end of the tar.

    Blocks of zeros end a tar, but another may follow, as `cat a.tar b.tar` makes it."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            found = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.ended = True
            raise
        except tarfile.EmptyHeaderError:
            if getattr(tar, "ended", False) or tar.offset == 0:
                raise
            raise tarfile.ReadError(f"cut off after {tar.offset:,} bytes") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"after {tar.offset:,} bytes: {error}") from error
        tar.parts = getattr(tar, "parts", 0) + getattr(tar, "ended", False)
        tar.ended = False
        return found


def _members(path: epath.Path) -> Iterator[Member]:
    part, files = 0, 0
    with (
        path.open("rb") as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=_Strict, ignore_zeros=True, errorlevel=1) as tar,
    ):
        for about in tar:
            part, files = tar.parts, files + 1
            folder, slash, last = about.name.removeprefix("./").rpartition("/")
            key, dot, ending = last.partition(".")
            if not (key and dot) or about.isdir() or "__MACOSX" in folder:
                continue
            ending = f".{ending.lower()}"
            name = f"{folder}{slash}{last}"
            content: bytes | None = b""
            if is_picture(name) or ending.endswith(folders.BESIDE) or metadata.is_metadata(name):
                content = tar.extractfile(about).read() if about.isreg() else None
            yield Member(name, part, f"{folder}{slash}{key}", ending, content)
    if not files:
        raise tarfile.ReadError("it has no files")
