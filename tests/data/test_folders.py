"""Folders and zips of pictures, with captions beside them or in metadata of any folder."""

import errno
import json
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flaxkd.data import filters, readers, sources
from flaxkd.data.chunks import Broken
from flaxkd.data.filters import Example, Recipe
from tests.data.image_sets import picture


def fill(folder, files):
    """files: {name: text, bytes or a number, for a picture of that brightness}."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = picture(content) if isinstance(content, int) else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read(path, **options):
    """({brightness: caption} of what is kept, {name: reason} of what is left out)."""
    kept, left = {}, {}
    for chunk in readers.open_chunks(str(path), **options):
        try:
            found = [filters.prepare(item, Recipe(resolution=8)) for item in chunk]
        except Broken as error:
            left[chunk.name] = str(error)
            continue
        kept |= {int(x.image[0, 0, 0]): x.caption for x in found if isinstance(x, Example)}
        left |= {x.name: x.reason for x in found if not isinstance(x, Example)}
    return kept, left


def trained(path, **options):
    """The same of a training: both splits."""
    found = [sources.open_source(str(path), split, resolution=8, **options) for split in ("train", "validation")]
    return {int(source[i]["image"][0, 0, 0]): source[i]["caption"] for source in found for i in range(len(source))}


def zipped(folder):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as out:
        for file in sorted(folder.rglob("*")):
            out.write(file, file.relative_to(folder.parent))
    return folder.with_suffix(".zip")


BESIDE = {
    "1.png": 1,
    "1.txt": "one",
    "2.PNG": 2,
    "2.caption": "two",
    "3.png": 3,
    "3.TXT": "three",
    "a/4.v1.png": 4,
    "a/4.v1.png.txt": "four",
    "a/4.v2.png": 5,
    "a/4.v2.json": '{"text": "five"}',
    "._1.png": b"mac",
}
METADATA = {
    "a/metadata.csv": "file_name;text\n1.png;one\nsub/2.png;two\n",
    "a/1.png": 1,
    "a/sub/2.png": 2,
    "b/metadata.jsonl": '{"file_name": "3.png", "text": "three"}\n',
    "b/3.png": 3,
    "c/4.png": 4,
    "c/4.txt": "four",
    "b/5.png": 5,
    "b/5.txt": "not in its metadata",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("files", "kept", "left"),
    [
        (BESIDE, {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}, []),
        (METADATA, {1: "one", 2: "two", 3: "three", 4: "four"}, ["not listed"]),
    ],
)
def test_captions_beside_or_in_lists(tmp_path, files, kept, left, packed):
    folder = fill(tmp_path / "set", files)
    path = zipped(folder) if packed else folder
    found, out = read(path)
    assert found == kept and [*out.values()] == left
    assert trained(path) == kept


def test_metadata_as_parquet_and_other_columns(tmp_path):
    fill(tmp_path, {f"{i}.png": i for i in range(3)})
    table = pa.table({"FILE": [f"{i}.png" for i in range(3)], "en": ["zero", "one", "two"]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    assert read(tmp_path)[1] == {f"{i}.png": "no caption" for i in range(3)}
    assert trained(tmp_path, caption_column="en") == {0: "zero", 1: "one", 2: "two"}
    with pytest.raises(ValueError, match=r"row 0: 'text' is missing .* it has FILE, en: .*data.caption_column"):
        trained(tmp_path)
    with pytest.raises(ValueError, match="'other' is missing or empty; it has FILE, en"):
        trained(tmp_path, image_column="other")


def test_symbolic_links(tmp_path):
    real = fill(tmp_path / "real", {"1.png": 1, "1.txt": "one"})
    source = fill(tmp_path / "source", {"2.png": 2, "2.txt": "two", "inside/3.png": 3, "inside/3.txt": "three"})
    (source / "more").symlink_to(real)
    (source / "again").symlink_to(real)
    (source / "inside" / "loop").symlink_to(source)
    (real / "back").symlink_to(source / "more")
    (source / "4.png").symlink_to(real / "1.png")
    (source / "4.txt").symlink_to(real / "1.txt")
    (source / "5.png").symlink_to(tmp_path / "gone")
    (source / "5.txt").symlink_to("5.txt")
    kept, left = read(source)
    assert kept == {1: "one", 2: "two", 3: "three"} and list(left) == ["5.png"]
    assert sum(len(list(chunk)) for chunk in readers.open_chunks(str(source))) == 5


def test_every_fault_of_a_training_folder_is_named_at_once(tmp_path, caplog):
    lines = [{"file_name": f"{i}.png", "text": f"thing {i}"} for i in range(30)]
    folder = fill(tmp_path, {f"{i}.png": i for i in range(30)})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text + '{no\n{"text": "x"}\n{"file_name": "gone.png", "text": "y"}\n')
    with pytest.raises(
        ValueError, match=r"line 31: not JSON[^\n]*\n.*line 32: 'file_name'.*\n.*line 33: there is no file"
    ):
        sources.open_source(str(folder), "train")
    (folder / "metadata.jsonl").write_text(text)
    for i in (3, 7, 11):
        (folder / f"{i}.png").write_bytes(picture(i)[:60])
    assert len(trained_readable(folder)) == 27
    assert all(f"{i}.png cannot be read" in caplog.text for i in (3, 7, 11))


def trained_readable(folder):
    found = [sources.open_source(str(folder), split, resolution=8) for split in ("train", "validation")]
    return [i for source in found for i in sources.readable(source, range(len(source)))]


def test_damaged_and_locked_zips(tmp_path):
    whole = zipped(fill(tmp_path / "set", BESIDE))
    content = whole.read_bytes()
    whole.write_bytes(content[:-30])
    assert "BadZipFile" in read(whole)[1][str(whole)]
    with pytest.raises(ValueError, match=r"set\.zip is damaged"):
        trained(whole)
    at = content.index(b"IHDR", content.index(b"2.PNG"))
    whole.write_bytes(content[:at] + b"XXXX" + content[at + 4 :])
    kept, left = read(whole)
    assert set(kept) == {1, 3, 4, 5} and left == {"set/2.PNG": "unreadable picture"}
    name = content.index(b"set/1.png", content.index(b"PK\x01\x02"))
    whole.write_bytes(content[:name] + b"set/3.png" + content[name + 9 :])
    assert "differ" in read(whole)[1][str(whole)]


def test_a_plan_of_another_command_does_not_make_a_cache(tmp_path):
    folder = fill(tmp_path, {"1.png": 1, "1.txt": "one", "2.png": 2, "2.txt": "two"})
    (folder / "plan.json").write_text('[{"topology": "v5e-8"}]')
    assert trained(folder) == {1: "one", 2: "two"} == read(folder)[0]
    (folder / "plan.json").write_text('{"rows": []}')
    assert trained(folder) == {1: "one", 2: "two"}
    (folder / "plan.json").write_text('{"encoder": "", "parts": 3}')
    with pytest.raises(FileNotFoundError, match="is not finished"):
        trained(folder)


def test_a_folder_with_train_and_test(tmp_path):
    files = {"train/1.png": 1, "train/1.txt": "one", "train/2.png": 2, "train/2.txt": "two"}
    folder = fill(tmp_path, files | {"test/3.png": 3, "test/3.txt": "three"})
    assert trained(folder) == {1: "one", 2: "two"} == read(folder)[0]


def test_names_that_a_disk_cannot_hold(tmp_path):
    names = ["x" * 5000, "a\0b.png", ".", "\ud800.png", "sub\\2.png"]
    fill(tmp_path, {"1.png": 1, "sub/2.png": 2})
    lines = [{"file_name": name, "text": "t"} for name in (*names, "1.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kept, left = read(tmp_path)
    assert set(kept) == {1, 2} and len(left) == 4
    with pytest.raises(FileNotFoundError, match="line 1: there is no file"):
        trained(tmp_path)


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "AVIF", "TIFF", "JPEG2000"])
def test_every_format_is_decoded(tmp_path, kind):
    endings = {"JPEG2000": "jp2"}
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / f"a.{endings.get(kind, kind.lower())}", kind)
    (tmp_path / "a.txt").write_text("grey")
    kept, _ = read(tmp_path)
    assert [*kept.values()] == ["grey"] and abs(next(iter(kept)) - 90) <= 2


def test_a_picture_that_would_fill_the_memory(tmp_path):
    """A PNG of 60,000 x 60,000 pixels in a few bytes, as its header says."""
    content = picture(1)
    size = content.index(b"IHDR") + 4
    fill(tmp_path, {"1.png": content[:size] + (60_000).to_bytes(4, "big") * 2 + content[size + 8 :], "1.txt": "bomb"})
    fill(tmp_path, {"2.png": 2, "2.txt": "two", "3.heic": b"ftypheic", "3.txt": "three"})
    kept, left = read(tmp_path)
    assert kept == {2: "two"} and left == {"1.png": "unreadable picture", "3.heic": "unreadable picture"}
    assert os.path.getsize(tmp_path / "1.png") < 1000


def test_a_failing_disk_is_no_damaged_picture(tmp_path, monkeypatch):
    """What is said of a picture is kept, and a network may be back the next time."""
    fill(tmp_path, {"a.png": 10, "a.txt": "red apple", "b.png": 20, "b.txt": "cat face"})

    def broken(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(sources.pictures, "opened", broken)
    with pytest.raises(OSError, match="Stale file handle"):
        read(tmp_path)
    found = [sources.open_source(str(tmp_path), split, resolution=8) for split in ("train", "validation")]
    with pytest.raises(OSError, match="Stale file handle"):
        next(source for source in found if len(source))[0]
