"""Caches of large image sets: every kind of source, what is left out, and that nothing is lost when a run dies."""

import dataclasses
import errno
import json
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flaxkd.data import loader, readers, records, sources
from flaxkd.data.chunks import Broken
from flaxkd.data.filters import Recipe
from flaxkd.machine.files import DiskFull
from tests.data.image_sets import (
    N,
    check_complete,
    contents,
    encode,
    files,
    img2dataset_parquet,
    listed,
    make,
    picture,
    saved_to_disk,
    tars,
    write_tar,
)


def test_mirrored_pictures(tmp_path):
    out = tmp_path / "out"
    make(tars(tmp_path / "source"), out, Recipe(resolution=8, validation=0.2, flip=True))
    check_complete(out)
    plain, flipped = contents(out), contents(out, kind="flipped")
    assert list(plain) == list(flipped)
    for caption in plain:
        np.testing.assert_array_equal(plain[caption][0][:, ::-1], flipped[caption][0])
    drawn = lambda flip: [
        next(loader.Records(out / "train").batches(20, seed, flip=flip))["moments"] for seed in range(4)
    ]
    mirrored = lambda batch: int((np.abs(batch[:, 0, 0, 0]) < np.abs(batch[:, 0, 1, 0])).sum())
    assert 0 < sum(map(mirrored, drawn(None))) < 2 * 20 and sum(map(mirrored, drawn(False))) == 0


def test_filters(tmp_path):
    """Scores are 0, 0.5, ...; originals of odd numbers were small, though img2dataset has made them larger."""
    about = lambda i: {
        "AESTHETIC_SCORE": i / 2,
        "original_width": 4 + 100 * (i % 2 == 0),
        "original_height": 99,
    }
    source = tars(tmp_path / "source", about=about)
    recipe = Recipe(resolution=8, validation=0.2, min_aesthetic=4, min_size=64, caption_column="key")
    made = make(source, tmp_path / "out", recipe)
    assert made["filtered"] == {"aesthetic score below 4": 8, "shorter side below 64 pixels": 8}
    captions = set(contents(tmp_path / "out")) | set(contents(tmp_path / "out", "validation"))
    assert captions == {f"{i:09}" for i in range(8, N, 2)}
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""  # what is left out by wish is only counted
    made = make(source, tmp_path / "large", Recipe(resolution=8, validation=0.2, min_size=5))
    assert made["filtered"] == {"shorter side below 5 pixels": 12}
    with pytest.raises(ValueError, match=r"no picture is left for train and validation .*'no aesthetic score': 24"):
        make(listed(tmp_path / "plain"), tmp_path / "none", Recipe(resolution=8, min_aesthetic=4))


def test_what_is_at_fault_is_left_out_and_listed(tmp_path):
    folder = tars(tmp_path / "source")
    whole = (folder / "00001.tar").read_bytes()
    header = whole.index(b"000000012.png")
    # Of its fifth sample; that the fourth was whole is only known when another begins.
    (folder / "00001.tar").write_bytes(whole[:header] + b"\xff" * 300 + whole[header + 300 :])
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:5000])  # within its third sample
    (folder / "00003.tar").write_bytes(b"no tar at all")
    (folder / "00004.tar").write_bytes(b"")
    samples = [
        ("a", {"png": picture(3)[:50], "txt": b"cut off"}),
        ("b", {"png": b"no picture", "txt": b"text"}),
        ("c", {"txt": b"alone"}),
        ("d", {"png": picture(4), "txt": b" \n"}),
        ("e", {"png": picture(5), "json": b"{not json"}),
        ("f", {"png": picture(6), "json": {"caption": None}}),
        ("g", {"png": picture(60, (40, 8)), "json": {"caption": "picture 60"}}),
    ]
    write_tar(folder / "00005.tar", samples)
    made = make(folder, tmp_path / "out")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert made["skipped"] == {
        "broken from here on": 4,
        "unreadable picture": 2,
        "no picture": 1,
        "no caption": 3,
    }
    broken = [os.path.basename(entry["part"]) for entry in skipped if entry["reason"] == "broken from here on"]
    assert broken == ["00001.tar", "00002.tar", "00003.tar", "00004.tar"]
    names = {entry["name"]: entry["reason"] for entry in skipped if "/00005.tar" in entry["part"]}
    assert list(names) == [f"00005.tar/{key}" for key in "abcdef"]
    captions = set(contents(tmp_path / "out")) | set(contents(tmp_path / "out", "validation"))
    assert captions == {f"picture {i}" for i in (*range(11), 16, 60)}


def test_damaged_tables_and_lists(tmp_path):
    folder = img2dataset_parquet(tmp_path / "source")
    whole = (folder / "00000.parquet").read_bytes()
    (folder / "00001.parquet").write_bytes(whole[:-100])
    (folder / "00002.parquet").write_bytes(whole[:200] + b"\0" * 400 + whole[600:])
    made = make(folder, tmp_path / "out")
    assert made["train"] >= 19 and made["skipped"]["broken from here on"] >= 2
    folder = saved_to_disk(tmp_path / "arrow")
    file = folder / "train" / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:1500])
    made = make(folder, tmp_path / "out2")
    assert made["skipped"] == {"broken from here on": 1} and made["train"] + made["validation"] >= 12
    folder = listed(tmp_path / "listed")
    (folder / "3.png").unlink()
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write('{not json\n[1]\n{"text": "no name"}\n')
    made = make(folder, tmp_path / "out3")
    assert made["skipped"] == {"unreadable picture": 1, "no picture": 3}
    assert made["train"] + made["validation"] == N - 1


def test_a_failing_disk_is_not_a_broken_part(tmp_path, monkeypatch):
    """It may work again, and then the part is wanted."""
    source = tars(tmp_path / "source")

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", fail)
        with pytest.raises(OSError, match="Input/output error"):
            make(source, tmp_path / "out")
    make(source, tmp_path / "out")
    check_complete(tmp_path / "out")


def test_it_goes_on_where_it_was_killed(tmp_path):
    source, calls = tars(tmp_path / "source"), []
    make(source, tmp_path / "straight")

    def killed(images):
        calls.append(1)
        if len(calls) == 5:  # of 6: within the third part
            raise KeyboardInterrupt
        return encode(images)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(source, out, encode=killed)
    assert len(list((out / "done").iterdir())) == 2
    assert not [path for path in out.rglob("*") if path.name.startswith(".") or "00002" in path.name[:15]]
    with pytest.raises(FileNotFoundError, match="is not finished"):
        sources.open_source(str(out), "train")
    (out / "train" / ".moments-00002-of-00003.array_record.4f3c").write_bytes(b"what SIGKILL leaves")
    make(source, out, encode=killed)
    assert len(calls) == 7
    assert files(out) == files(tmp_path / "straight")
    make(source, out, encode=killed)
    assert len(calls) == 7
    with pytest.raises(ValueError, match=r"min_size: None there, 9 here\n.*another --out"):
        make(source, out, Recipe(resolution=8, validation=0.2, min_size=9))


def test_the_cache_does_not_depend_on_the_number_of_processes(tmp_path):
    source, out = tars(tmp_path / "source", size=4), tmp_path / "out"
    make(source, tmp_path / "alone")
    assert make(source, out, process_index=1, process_count=3) is None
    assert make(source, out, process_index=2, process_count=3) is None
    made = make(source, out, process_index=1, process_count=2)  # another number, after the first process died
    assert made is None and len(list((out / "done").iterdir())) == 5
    assert make(source, out, process_index=0, process_count=2) == make(source, tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the disk that is always full is Linux's")
def test_a_full_disk_stops_it_and_it_goes_on_later(tmp_path, monkeypatch):
    source, out = tars(tmp_path / "source"), tmp_path / "out"
    full = lambda path, options: real("/dev/full" if "00001-of" in path else path, options)
    real = records.ArrayRecordWriter
    with monkeypatch.context() as patch:
        patch.setattr(records, "ArrayRecordWriter", full)
        with pytest.raises(DiskFull, match=f"no space is left in {out}/.* make room, and run the same command"):
            make(source, out)
    assert [path.stem for path in (out / "done").iterdir()] == ["00000-of-00003"]
    assert not [path for path in out.rglob(".*")]
    make(source, out)
    check_complete(out)


def test_moments_that_float16_cannot_hold_are_listed(tmp_path):
    overflowing = lambda images: encode(images) * np.where(images[:, 0, 0, :1] == 7, 1e9, 1)[:, None, None]
    made = make(tars(tmp_path / "source"), tmp_path / "out", encode=overflowing)
    assert made["skipped"] == {"moments that float16 cannot hold": 1}
    assert '"name": "00000.tar/000000007"' in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_a_split_that_would_be_empty(tmp_path):
    with pytest.raises(ValueError, match=r"left for validation \(train 24, validation 0.*larger --validation"):
        make(tars(tmp_path / "source"), tmp_path / "out", Recipe(resolution=8, validation=0.0))


class Bucket(MemoryFileSystem):
    """Stands for gcsfs."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012 - one for all instances, as in its parent
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


def test_source_and_cache_in_a_bucket(tmp_path):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    make(tars(tmp_path / "source"), tmp_path / "out")
    bucket = fsspec.filesystem("gcs")
    bucket.put(str(tmp_path / "source"), "gs://b/source", recursive=True)
    made = make("gs://b/source/", "gs://b/out")
    assert made == {"train": 20, "validation": 4, "filtered": {}, "skipped": {}}
    bucket.get("gs://b/out", str(tmp_path / "back"), recursive=True)
    shards = lambda folder: {name: content for name, content in files(folder).items() if not name.startswith("done")}
    assert len(shards(tmp_path / "out")) == 10 and shards(tmp_path / "back") == shards(tmp_path / "out")
    assert sources.open_source("gs://b/out", "train").size == 20


def test_when_nothing_is_left_it_says_why(tmp_path):
    table = pa.table({"image": [picture(i) for i in range(6)], "en_text": [f"thing {i}" for i in range(6)]})
    pq.write_table(table, tmp_path / "0.parquet")
    message = r"'no caption': 6.*\n  no caption, such as 0.parquet, row 5, it has en_text: name one by --caption-column"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "0.parquet", tmp_path / "out")
    recipe = Recipe(resolution=8, validation=0.3, caption_column="en_text", background="black")
    made = make(tmp_path / "0.parquet", tmp_path / "again", recipe)
    assert made["train"] + made["validation"] == 6
    about = json.loads((tmp_path / "again" / "train" / "cache.json").read_text())
    assert (about["background"], about["caption_column"]) == ("black", "en_text")
    with pytest.raises(ValueError, match="background: 'black' there, 'white' here"):
        make(tmp_path / "0.parquet", tmp_path / "again", dataclasses.replace(recipe, background="white"))


@pytest.mark.parametrize("values", ["path", "bytes", "struct", "list", "list of structs", "numbers", "large"])
def test_picture_columns_of_tables(tmp_path, values):
    contents = [picture(i) for i in range(N)]
    column = {
        "path": [f"{i}.png" for i in range(N)],
        "bytes": contents,
        "struct": [{"bytes": None, "path": f"{i}.png"} for i in range(N)],
        "list": [[content] for content in contents],
        "list of structs": [[{"bytes": content, "path": None}] for content in contents],
        "numbers": pa.array([list(content) for content in contents], pa.list_(pa.uint8())),
        "large": pa.array(contents, pa.large_binary()),
    }[values]
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(contents[i])
    table = pa.table({"image": column, "text": pa.array([f"picture {i}" for i in range(N)]).dictionary_encode()})
    pq.write_table(table, tmp_path / "0.parquet")
    with pa.ipc.new_file(str(tmp_path / "0.feather"), table.schema) as out:
        out.write_table(table, max_chunksize=5)
    for source in ("0.parquet", "0.feather"):
        assert make(tmp_path / source, tmp_path / f"out{source}")["skipped"] == {}
        check_complete(tmp_path / f"out{source}")


def test_a_damaged_arrow_file_does_not_end_the_process(tmp_path):
    """Bytes that are there twice shift all offsets: pyarrow itself reads beyond its memory then."""
    folder = saved_to_disk(tmp_path / "set")
    file = folder / "train" / "data-00000-of-00002.arrow"
    whole = file.read_bytes()
    for at in (*range(200, 240, 4), 600, 1000):
        file.write_bytes(whole[:at] + whole[at : at + 200] + whole[at:])
        first, second = readers.open_chunks(str(folder))
        with pytest.raises(Broken):
            list(first)
        assert len(list(second)) == 12
    for end in (len(whole) - 8, len(whole) - 2000):  # cut off where a batch ends, and within one
        file.write_bytes(whole[:end])
        with pytest.raises(Broken):
            list(readers.open_chunks(str(folder))[0])


def test_a_damaged_record_of_a_finished_part_is_named(tmp_path):
    source, out = tars(tmp_path / "source"), tmp_path / "out"
    make(source, out)
    (out / "done" / "00001-of-00003.json").write_text("")
    with pytest.raises(ValueError, match=r"00001-of-00003.json is damaged .* run the same command again"):
        make(source, out)
    (out / "plan.json").write_text("")
    with pytest.raises(ValueError, match=r"plan.json is not JSON.*delete this file"):
        make(source, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plan.json").write_text("[]")
    with pytest.raises(ValueError, match="is not of a cache: give another --out"):
        make(source, tmp_path / "other")
    assert len(list((tmp_path / "other").iterdir())) == 1
