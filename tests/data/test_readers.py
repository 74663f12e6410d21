"""What a cache of a large image set can be made from."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flaxkd.data import openmoji, readers, sources
from flaxkd.data.filters import Recipe
from tests.data.image_sets import (
    CAPTIONS,
    N,
    check_complete,
    contents,
    encode,
    img2dataset_parquet,
    listed,
    make,
    picture,
    saved_to_disk,
    tars,
)


def parquet(folder):
    (folder / "data").mkdir(parents=True)
    images = [{"bytes": picture(i), "path": None} for i in range(N)]
    table = pa.table({"image": images, "TEXT": CAPTIONS})
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet", row_group_size=6)
    pq.write_table(table.slice(0, 3), folder / "data" / "test-00000-of-00001.parquet")
    return folder


def beside(folder):
    """As img2dataset's output format `files`."""
    (folder / "00000").mkdir(parents=True)
    for i in range(N):
        (folder / "00000" / f"{i:09}.png").write_bytes(picture(i))
        (folder / "00000" / f"{i:09}.txt").write_text(CAPTIONS[i])
    return folder


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (tars, 3),
        (parquet, 2),  # row groups of 6, in parts of 10 rows at least
        (img2dataset_parquet, 2),
        (saved_to_disk, 2),
        (listed, 3),
        (lambda folder: listed(folder, "metadata.csv"), 3),
        (beside, 3),
    ],
)
def test_every_kind_of_source_gives_the_same_cache(tmp_path, write, parts):
    made = make(write(tmp_path / "source"), tmp_path / "out")
    assert made == {"train": 20, "validation": 4, "filtered": {}, "skipped": {}}
    check_complete(tmp_path / "out")
    assert len(list((tmp_path / "out" / "done").iterdir())) == parts
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == ""


def test_a_data_set_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    openmoji.build(tmp_path, limit=40)
    made = make("openmoji", tmp_path / "out", Recipe(resolution=8, validation=0.3))
    source = sources.open_source("openmoji", "train", resolution=8)
    found = contents(tmp_path / "out") | contents(tmp_path / "out", "validation")
    assert made["train"] + made["validation"] == len(source) == len(found)
    for i in range(len(source)):
        want = encode(source[i]["image"][None])[0]
        np.testing.assert_allclose(found[source[i]["caption"]][0], want, atol=1e-3)


def test_one_file_or_a_pattern(tmp_path):
    folder = tars(tmp_path / "source")
    assert [p.name for p in readers.open_chunks(f"{folder}/0000[12].tar")] == [f"{folder}/0000{i}.tar" for i in (1, 2)]
    assert len(list(readers.open_chunks(str(folder / "00001.tar"))[0])) == 8
    for source, error, message in [
        (folder / "*.zip", FileNotFoundError, "no file is called like"),
        (folder / "0*", ValueError, r"end in one of \.tar, \.tar\.gz, .*\.zip, not in \.parquet, \.tar"),
        ("gone/", FileNotFoundError, "there is no gone/"),
        ("nonsuch", FileNotFoundError, "neither a path nor a data set that TFDS knows"),
        (saved_to_disk(tmp_path / "saved"), ValueError, "has the splits train, test, not validation"),
        (tmp_path / "saved" / "dataset_dict.json", ValueError, "not in .json"),
    ]:
        with pytest.raises(error, match=message):
            readers.open_chunks(str(source), split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures, tars or tables"):
        readers.open_chunks(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="has the columns url, and none is called image or"):
        make(folder / "00001.parquet", tmp_path / "out")
