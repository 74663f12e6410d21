"""Aspect-ratio buckets: which picture goes where, what it says of its crop, and batches of one size each."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from flaxkd.data import buckets, loader, pictures, records, sources
from flaxkd.data.filters import Recipe
from tests.data import image_sets
from tests.data.test_large import make

SIZES = ((64, 64), (64, 96), (96, 64))


def test_the_preset_is_scaled_to_multiples_of_64_pixels():
    whole = buckets.sizes("sdxl", 1024)
    assert len(whole) == 9 and whole[:3] == ((1024, 1024), (1152, 896), (896, 1152)) and whole[-1] == (640, 1536)
    assert buckets.sizes("sdxl", 512) == (
        (512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (768, 320), (320, 768)
    )  # fmt: skip
    assert buckets.sizes(None, 64) == ((64, 64),) == buckets.sizes([[64, 64], [64, 64]], 512)
    for wrong in ("sdxxl", (), ((64, 64), 32), ((64, 0),), ((64.0, 64.0),), 64):
        with pytest.raises(ValueError, match=r"buckets = .*sdxl"):
            buckets.sizes(wrong, 64)


def test_the_nearest_aspect_ratio_and_the_first_of_two():
    nearest = lambda height, width: buckets.nearest((height, width), SIZES)
    assert nearest(7, 7) == nearest(100, 122) == (64, 64) and nearest(100, 123) == (64, 96)
    assert nearest(1, 9000) == (64, 96) and nearest(9000, 1) == (96, 64)
    assert buckets.nearest((5, 5), SIZES[1:]) == (64, 96) and buckets.nearest((5, 5), SIZES[:0:-1]) == (96, 64)


@pytest.mark.parametrize(
    ("size", "orientation", "time_ids", "left"),  # width x height as stored; left of the mirrored picture
    [
        ((200, 200), 1, (200, 200, 0, 0, 64, 64), 0),
        ((1, 1), 1, (1, 1, 0, 0, 64, 64), 0),
        ((301, 100), 1, (100, 301, 0, 48, 64, 96), 48),
        ((199, 100), 1, (100, 199, 0, 16, 64, 96), 15),  # 127 pixels after it was resized
        ((50, 500), 1, (500, 50, 272, 0, 96, 64), 0),
        ((301, 100), 6, (301, 100, 48, 0, 96, 64), 0),
        ((5000, 3), 1, (3, 5000, 0, 53285, 64, 96), 53285),
    ],
)
def test_a_picture_says_how_it_was_cropped(size, orientation, time_ids, left):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels.save(content, "PNG", exif=exif)
    image, crop = pictures.fit(pictures.opened(content.getvalue()), SIZES)
    assert tuple(crop.time_ids) == time_ids and crop.time_ids.dtype == np.int32 and image.shape == (*time_ids[4:], 3)
    assert tuple(crop.mirrored.time_ids) == (*time_ids[:3], left, *time_ids[4:]) and crop.mirrored.mirrored == crop
    if max(size) < 5000:
        upright = pixels if orientation == 1 else pixels.transpose(Image.Transpose.ROTATE_270)
        whole = np.asarray(upright.resize(crop.resized[::-1], Image.Resampling.BILINEAR))
        top, left = crop.corner
        np.testing.assert_array_equal(image, whole[top : top + image.shape[0], left : left + image.shape[1]])


# -- Caches ----------------------------------------------------------------------------------------------------------

SMALL = ((8, 8), (8, 16), (16, 8))
SHAPES = ((8, 8), (9, 17), (8, 8), (30, 9))  # (height, width) of the pictures i, i + 4, ...


def encode(images):
    """Stands for the VAE: float32[b, H / 4, W / 4, 6], different left and right."""
    b, height, width, _ = images.shape
    small = images.reshape(b, height // 4, 4, width // 4, 4, 3).mean((2, 4)) / 255
    return np.concatenate([small, -small], -1).astype(np.float32)


def shaped(n):
    """A source whose picture i has the brightness i and one of SHAPES."""

    def load(i):
        image, crop = pictures.fit(Image.new("RGB", SHAPES[i % 4][::-1], (i, i, i)), SMALL)
        return {"image": image, "caption": f"picture {i}", "crop": crop}

    return sources.Source(n, load, "shapes", sizes=SMALL)


def ensure(n, folder, encode=encode, **changes):
    moments = lambda images: {"moments": encode(images)}
    options = {"encode": moments, "tokenize": image_sets.tokenize, "batch_size": 4, "fingerprint": "vae"}
    return records.ensure(shaped(n), folder, **{**options, "progress": False, **changes})


def order(batch):
    """Which pictures of `shaped` a batch has. Raises AssertionError unless they are in the bucket of their shape."""
    numbers = np.rint(batch["moments"][:, 0, 0, 0] * 255).astype(int)
    sizes = {(8, 8): (8, 8), (9, 17): (8, 16), (30, 9): (16, 8)}
    for i, moments, time_ids in zip(numbers, batch["moments"], batch["time_ids"], strict=True):
        size = sizes[SHAPES[i % 4]]
        assert moments.shape[:2] == (size[0] // 4, size[1] // 4)
        assert (*time_ids[:2],) == SHAPES[i % 4] and (*time_ids[4:],) == size
    return numbers.tolist()


def test_every_picture_is_in_one_bucket_and_full_batches_are_encoded(tmp_path):
    calls = []
    folder = ensure(43, tmp_path, shard_size=30, encode=lambda images: calls.append(images.shape) or encode(images))
    assert {shape[0] for shape in calls} == {4} and len(calls) == 12  # shards of 15 + 8 + 7 and 7 + 3 + 3
    reader = loader.Records(folder)
    assert sorted(i for batch in reader.examples(99) for i in order(batch)) == list(range(43))
    assert reader.captions(99) == [f"picture {i}" for batch in reader.examples(99) for i in order(batch)]
    assert [len(order(batch)) for batch in reader.examples(8)] == [4, 2, 2]  # shares of 22, 11 and 10
    assert [batch["moments"].shape for batch in reader.shapes(6)] == [(6, 2, 2, 6), (6, 2, 4, 6), (6, 4, 2, 6)]
    assert json.loads((folder / "cache.json").read_text())["runs"][0] == [8, 8, 4]
    calls.clear()
    assert ensure(43, tmp_path, shard_size=30, encode=lambda images: calls.append(1)) == folder and not calls


def test_batches_have_one_size_and_epochs_have_each_example_once(tmp_path):
    reader = loader.Records(ensure(40, tmp_path))  # 20, 10 and 10
    batches = [order(next(iterator)) for iterator in [reader.batches(5, seed=0)] for _ in range(40)]
    of_shape = collections.defaultdict(list)
    for batch in batches:
        of_shape[SHAPES[batch[0] % 4]] += batch
    assert {shape: len(found) for shape, found in of_shape.items()} == {(8, 8): 100, (9, 17): 50, (30, 9): 50}
    for found in of_shape.values():
        size = len(found) // 5
        epochs = [found[at : at + size] for at in range(0, len(found), size)]
        assert all(len({*epoch}) == size for epoch in epochs) and epochs[0] != epochs[1]
    shapes = [SHAPES[batch[0] % 4] for batch in batches]
    assert all(len({*shapes[at : at + 4]}) == 3 for at in range(0, 40, 4))  # interleaved
    again = reader.batches(5, seed=0)
    assert [order(next(again)) for _ in range(40)] == batches
    assert len(order(next(loader.Records(ensure(4, tmp_path)).batches(50, seed=0)))) == 50  # more than a bucket has


@pytest.mark.parametrize("flip", [False, True])
def test_the_position_is_restored_and_processes_read_their_rows(tmp_path, flip):
    reader = loader.Records(ensure(40, tmp_path, flip=flip))
    whole, rows = reader.batches(4, seed=1), [[0, 2], [1, 3]]
    parts = [reader.batches(4, seed=1, rows=own) for own in rows]
    for step in range(12):
        batch = next(whole)
        for own, part in zip(rows, parts, strict=True):
            for name, found in next(part).items():
                np.testing.assert_array_equal(found, batch[name][own])
        if step == 5:
            state = json.dumps(whole.get_state())
            assert {json.dumps(part.get_state()) for part in parts} == {state}
            resumed = reader.batches(4, seed=1)
            resumed.set_state(json.loads(state))
        elif step > 5:
            for name, found in next(resumed).items():
                np.testing.assert_array_equal(found, batch[name])


def test_mirrored_records_have_their_own_time_ids(tmp_path):
    def odd(i):  # 13 pixels wide after it was resized, of which 8 are kept: 2 on the left, 3 on the right
        image, crop = pictures.fit(Image.new("RGB", (13, 8), (i, i, i)), SMALL[:1])
        return {"image": image, "caption": f"picture {i}", "crop": crop}

    moments = lambda images: {"moments": encode(images)}
    options = {"encode": moments, "tokenize": image_sets.tokenize, "batch_size": 4, "fingerprint": "vae"}
    source = sources.Source(6, odd, "odd", sizes=SMALL[:1])
    folder = records.ensure(source, tmp_path, **options, flip=True, progress=False)
    lefts = {int(x) for batches in [loader.Records(folder).batches(6, 0)] for _ in range(4)
             for x in next(batches)["time_ids"][:, 3]}  # fmt: skip
    assert lefts == {2, 3}
    with pytest.raises(ValueError, match="a task that reads pictures takes squares alone"):
        loader.Pictures(shaped(4))


def test_a_large_set_with_buckets_resumes(tmp_path):
    """Pictures of three shapes in tars; a killed run leaves what an unbroken one does."""
    folder = tmp_path / "source"
    folder.mkdir()
    for tar in range(3):
        image_sets.write_tar(
            folder / f"{tar:05}.tar",
            [(f"{i:09}", {"png": image_sets.picture(i, SHAPES[i % 4][::-1]), "txt": f"picture {i}".encode()})
             for i in range(8 * tar, 8 * tar + 8)],
        )  # fmt: skip
    recipe, calls = Recipe(resolution=8, buckets=SMALL, validation=0.2, flip=True), []

    def killed(images):
        calls.append(images.shape)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode(images)

    make(folder, tmp_path / "straight", recipe, encode=encode)
    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "out", recipe, encode=killed)
    made = make(folder, tmp_path / "out", recipe, encode=killed)
    assert image_sets.files(tmp_path / "out") == image_sets.files(tmp_path / "straight")
    assert {shape[1:3] for shape in calls} == {*SMALL} and made["train"] == 20
    readers = [loader.Records(tmp_path / "out" / split) for split in ("train", "validation")]
    captions = [caption for reader in readers for caption in reader.captions(99)]
    assert sorted(captions) == sorted(image_sets.CAPTIONS)
    assert [batch["moments"].shape[1:3] for batch in readers[0].examples(99)] == [(2, 2), (2, 4), (4, 2)]
    with pytest.raises(ValueError, match=r"buckets: .* there, None here"):
        make(folder, tmp_path / "out", Recipe(resolution=8, validation=0.2, flip=True))
