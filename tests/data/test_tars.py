"""Tars by webdataset's rule: no picture ever gets another's caption, and what is skipped is listed."""

import io
import tarfile

import pytest

from flaxkd.data import filters, readers
from flaxkd.data.chunks import Broken
from flaxkd.data.filters import Example, Recipe
from tests.data.image_sets import picture


def pack(members, mode="w"):
    """The bytes of a tar. members: (name, content); a number stands for a picture of that brightness."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tar:
        for name, inside in members:
            about = tarfile.TarInfo(name)
            if isinstance(inside, tarfile.TarInfo):
                about = inside
                inside = b""
            inside = picture(inside) if isinstance(inside, int) else inside
            inside = inside.encode() if isinstance(inside, str) else inside
            about.size = len(inside)
            tar.addfile(about, io.BytesIO(inside))
    return content.getvalue()


def read(path, column=None, **recipe):
    """({brightness: caption} of what is kept, [(name, reason)] of what is left out)."""
    (chunk,) = readers.open_chunks(str(path), image_column=column)
    kept, left = {}, []
    try:
        for item in chunk:
            found = filters.prepare(item, Recipe(resolution=8, **recipe))
            if isinstance(found, Example):
                kept[int(found.image[0, 0, 0])] = found.caption
            else:
                left.append((found.name.partition("/")[2], found.reason))
    except Broken as error:
        left.append((str(error), "broken"))
    return kept, left


TWICE, SECOND = "the same name twice in a sample", "a second picture in a sample"


@pytest.mark.parametrize(
    ("members", "kept", "left"),
    [
        (
            [(f"a.b/pic.v1.{i}.{e}", c) for i in (1, 2) for e, c in (("png", i), ("txt", f"text {i}"))],
            {1: "text 1", 2: "text 2"},
            [],
        ),
        ([("a.png", 1), ("a.seg.png", 2), ("a.txt", "one")], {1: "one"}, [("a.seg", "no caption")]),
        ([("a.left.png", 1), ("a.right.png", 2), ("a.txt", "one")], {}, ["no caption", "no caption", "no picture"]),
        ([("a.png", 1), ("a.webp", picture(2)), ("a.txt", "one")], {1: "one"}, [("a.webp", SECOND)]),
        ([("a.png", 1), ("a.txt", "one"), ("a.png", 2), ("a.txt", "two")], {}, [TWICE, TWICE]),
        ([("a.png", 1), ("a.png", 2), ("a.txt", "two")], {}, [TWICE, TWICE]),
        ([("a.png", 1), ("a.txt", "one"), ("b.npy", ""), ("a.png", 2), ("a.txt", "two")], {1: "one", 2: "two"}, []),
        ([("a.png", 1), ("b.png", 2), ("a.txt", "one"), ("b.txt", "two")], {}, ["no picture"] * 2 + ["no caption"] * 2),
        ([("pic.v1.1.png", 1), ("pic.v1.2.txt", "two")], {}, ["no caption", "no picture"]),
        ([("a.PNG", 1), ("a.Caption", "one")], {1: "one"}, []),
        ([("a.png", 1), ("a.json", '{"caption": "one"}'), ("a.txt", b"\x00\x01\x02")], {}, ["no caption"]),
        ([("a.png", 1), ("a.json", "[" * 50_000), ("a.txt", "one")], {1: "one"}, []),
        ([("./a.png", 1), ("._a.png", b"mac"), ("a.txt", "no")], {}, ["no caption", "no picture"]),
    ],
)
def test_a_picture_has_its_own_caption_or_none(tmp_path, members, kept, left):
    (tmp_path / "0.tar").write_bytes(pack(members))
    found, out = read(tmp_path / "0.tar")
    assert found == kept or (members[0][0] == "./a.png" and found == {1: "no"})
    if found == kept:
        assert sorted(entry if isinstance(left[0], tuple) else entry[1] for entry in out) == sorted(left)


def test_columns_of_a_sample_have_names(tmp_path):
    sample = [("a.left.png", 1), ("a.right.png", 2), ("a.blip.txt", "one"), ("a.txt", "raw")]
    (tmp_path / "0.tar").write_bytes(pack(sample))
    assert read(tmp_path / "0.tar", "right.png") == ({2: "raw"}, [])
    assert read(tmp_path / "0.tar", "left.png", caption_column="blip.txt") == ({1: "one"}, [])
    assert read(tmp_path / "0.tar", "top.png") == ({}, [("a.left", "no picture")])


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("TGZ", "w:gz"), ("tar.xz", "w:xz")])
def test_a_tar_of_a_folder_with_metadata(tmp_path, ending, mode):
    members = [(f"d/{i}.png", i) for i in range(4)]
    table = "file_name,text\n0.png,zero\n1.png,one\n3.png,three\n9.png,nine\n"
    path = tmp_path / f"0.{ending}"
    path.write_bytes(pack([*members, ("d/metadata.csv", table)], mode))
    kept, left = read(path)
    assert kept == {0: "zero", 1: "one", 3: "three"}
    assert sorted(reason for _, reason in left) == ["not listed", "unreadable picture"]
    path.write_bytes(pack([*members, ("d/metadata.csv", table)], mode)[:-900])
    kept, left = read(path)
    assert not kept and left[-1][1] == "broken"


def test_links_concatenated_tars_and_cut_ones(tmp_path):
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.LNKTYPE, "a.png"
    path = tmp_path / "0.tar"
    path.write_bytes(pack([("a.png", 1), ("a.txt", "one"), ("b.png", link), ("b.txt", "two")]))
    assert read(path) == ({1: "one"}, [("b", "a link in a tar")])
    first, second = (pack([("a.png", i), ("a.txt", f"text {i}")]) for i in (1, 2))
    path.write_bytes(first + second)
    assert read(path) == ({1: "text 1", 2: "text 2"}, [])
    path.write_bytes(first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512))  # no end
    assert read(path)[1][-1][1] == "broken"
    path.write_bytes(bytes(10240))
    assert read(path)[1] == [("ReadError: it has no files", "broken")]
