"""The latent cache and the loader, with a stand-in for the VAE."""

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from flaxkd.data import encoding, loader, pictures, records, sources


def encode(images):
    """Stands for the VAE: float32[b, 2, 2, 6], different left and right."""
    b, height, width, _ = images.shape
    small = images.reshape(b, 2, height // 2, 2, width // 2, 3).mean((2, 4)) / 255
    return np.concatenate([small, -small], -1).astype(np.float32)


def tokenize(captions):
    ids = np.array([[len(c), *c.encode()[:4].ljust(4)] for c in captions], np.int32)
    return {"input_ids": ids, "input_ids_2": ids[:, :3] + 1}


def numbered(size, fingerprint="numbers"):
    """A source whose picture i has the brightness i, and twice that on the right."""

    def load(i):
        image = np.full((8, 8, 3), i, np.uint8)
        image[:, 4:] = 2 * i
        return {"image": image, "caption": f"picture {i}", "crop": pictures.center((9, 10 + i), (8, 8))}

    return sources.Source(size, load, fingerprint)


def ensure(source, folder, encode=encode, **changes):
    moments = lambda images: {"moments": encode(images)}
    options = {"encode": moments, "tokenize": tokenize, "batch_size": 4, "fingerprint": "vae"}
    return records.ensure(source, folder, **{**options, "progress": False, **changes})


def order(batch):
    """Which pictures of `numbered` a batch has."""
    return np.rint(batch["moments"][:, 0, 0, 0] * 255).astype(int).tolist()


def test_record_round_trip():
    layout = records.layout_of(records.MOMENTS, tokenize)
    moments = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float16)
    example = {"moments": moments, **{name: ids[0] for name, ids in tokenize(["piñata"]).items()}}
    example["time_ids"] = np.array([900, 1200, 0, 170, 512, 512])
    again = records.Layout(json.loads(json.dumps(layout.fields)))
    assert again.fields == layout.fields
    record = layout.pack(example, "piñata")
    found = again.view(record)
    assert {name: (array.dtype.name, array.shape) for name, array in found.items()} == {
        "moments": ("float16", (4, 3, 8)),
        "input_ids": ("int32", (5,)),
        "input_ids_2": ("int32", (3,)),
        "time_ids": ("int32", (6,)),
    }
    for name, array in found.items():
        np.testing.assert_array_equal(array, example[name])
    assert again.caption(record) == "piñata"
    with pytest.raises(ValueError, match=r"time_ids has the shape \(5,\), must be \(6,\)"):
        layout.pack(example | {"time_ids": np.arange(5)}, "")


def write_format_1(folder):
    """A cache as flaxkd wrote it when its records were moments, one row of ids and the caption."""
    moments, ids = encode(numbered(5)[3]["image"][None])[0], tokenize(["picture 3"])["input_ids"][0]
    sizes = np.array([*moments.shape, len(ids)], "<i4")
    with records.writer(folder / records.shard_name("moments", 0, 1)) as write:
        write(b"".join(x.tobytes() for x in (sizes, moments.astype("<f2"), ids.astype("<i4"))) + b"picture 3")
    (folder / "cache.json").write_text('{"format": 1, "size": 1, "shards": 1, "flip": false}')
    return moments, ids


def test_a_cache_of_the_first_format_is_read_for_the_fields_it_has(tmp_path):
    moments, ids = write_format_1(tmp_path)
    reader = loader.Records(tmp_path, ("moments", "input_ids"))
    (batch,) = reader.examples(9)
    np.testing.assert_allclose(batch["moments"][0], moments, atol=1e-4)
    np.testing.assert_array_equal(batch["input_ids"][0], ids)
    assert reader.captions(9) == ["picture 3"] and next(reader.batches(2, seed=0)).keys() == batch.keys()
    with pytest.raises(ValueError, match=r"have moments, input_ids, and input_ids_2, time_ids is needed .* again with"):
        loader.Records(tmp_path, ("moments", "input_ids", "input_ids_2", "time_ids"))


def test_cache_holds_what_the_encoder_says_and_is_reused(tmp_path):
    source, calls = numbered(11), []

    def counted(images):
        calls.append(images.shape)
        return encode(images)

    folder = ensure(source, tmp_path, encode=counted, shard_size=6)
    assert calls == [(4, 8, 8, 3)] * 4  # 6 + 5 pictures: always full batches
    (found,) = loader.Records(folder).examples(99)
    want = [source[i] for i in range(11)]
    captions = loader.Records(folder).captions(99)
    assert captions == [example["caption"] for example in want]
    np.testing.assert_allclose(found["moments"], encode(np.stack([e["image"] for e in want])), atol=1e-4)
    for name, ids in tokenize(captions).items():
        np.testing.assert_array_equal(found[name], ids)
    np.testing.assert_array_equal(found["time_ids"][3], [9, 13, 0, 2, 8, 8])  # 9 x 13 pixels, resized to 8 x 11
    assert loader.Records(folder, ["moments"]).examples(3)[0]["moments"].shape == (3, 2, 2, 6)
    assert ensure(source, tmp_path, encode=counted, shard_size=6) == folder and len(calls) == 4
    others = {
        ensure(source, tmp_path, fingerprint="another vae", shard_size=6),
        ensure(numbered(11, "other pictures"), tmp_path, shard_size=6),
        ensure(source, tmp_path, flip=True, shard_size=6),
    }
    assert len(others | {folder}) == 4
    assert sorted(path.name for path in folder.iterdir()) == [
        "cache.json",
        "moments-00000-of-00002.array_record",
        "moments-00001-of-00002.array_record",
    ]


def test_a_killed_build_goes_on_where_it_stopped(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build_slowly, args=(tmp_path,))
    process.start()
    deadline = time.time() + 60
    while not list(tmp_path.glob("*/moments-00001*")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder,) = tmp_path.iterdir()
    with pytest.raises(FileNotFoundError, match=r"no cache.json"):
        loader.Records(folder).examples(1)
    calls = []

    def counted(images):
        calls.append(1)
        return encode(images)

    assert ensure(numbered(40), tmp_path, shard_size=4, encode=counted) == folder
    assert 0 < len(calls) <= 8  # of 10 shards, two at least were kept
    assert loader.Records(folder).captions(40) == [f"picture {i}" for i in range(40)]


def _build_slowly(folder):
    ensure(numbered(40), folder, shard_size=4, encode=lambda images: time.sleep(0.2) or encode(images))


def test_processes_that_build_the_same_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_slowly, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert loader.Records(folder).captions(40) == [f"picture {i}" for i in range(40)]
    assert len(list(folder.iterdir())) == 11


def test_moments_that_float16_cannot_hold_are_refused(tmp_path):
    def overflowing(images):
        return np.where(images.mean((1, 2, 3)) > 8, 1e6, 0)[:, None, None, None] * np.ones((1, 2, 2, 6))

    with pytest.raises(ValueError, match="picture 6, 'picture 6': its moments are not finite"):
        ensure(numbered(9), tmp_path, encode=overflowing)
    assert not list(tmp_path.rglob("*.array_record"))
    with pytest.raises(ValueError, match="no pictures"):
        ensure(numbered(0), tmp_path)


def test_batches_are_shuffled_endless_and_deterministic(tmp_path):
    folder = ensure(numbered(20), tmp_path)
    iterator = loader.Records(folder).batches(6, seed=0)
    first = [next(iterator) for _ in range(10)]  # three epochs
    assert first[0]["moments"].shape == (6, 2, 2, 6) and first[0]["moments"].dtype == np.float32
    assert first[0]["input_ids"].shape == (6, 5) and first[0]["input_ids"].dtype == np.int32
    drawn = [i for batch in first for i in order(batch)]
    epochs = [drawn[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != list(range(20)) and epochs[0] != epochs[1]
    again = loader.Records(folder).batches(6, seed=0)
    assert [i for _ in range(10) for i in order(next(again))] == drawn
    assert order(next(loader.Records(folder).batches(6, seed=1))) != drawn[:6]
    assert len(order(next(loader.Records(folder).batches(50, seed=0)))) == 50  # more than the cache has


@pytest.mark.parametrize("flip", [False, True])
def test_the_position_is_restored(tmp_path, flip):
    folder = ensure(numbered(20), tmp_path, flip=flip)
    iterator = loader.Records(folder).batches(6, seed=3)
    for _ in range(5):
        next(iterator)
    state = json.dumps(iterator.get_state())
    want = [next(iterator) for _ in range(5)]
    other = loader.Records(folder).batches(6, seed=3)
    other.set_state(json.loads(state))
    for batch in want:
        found = next(other)
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])


def test_the_global_batch_does_not_depend_on_the_number_of_processes(tmp_path):
    folder = ensure(numbered(20), tmp_path, flip=True)
    whole = loader.Records(folder).batches(8, seed=0)
    rows = [[0, 4], [1, 5], [2, 6], [3, 7]]  # as a mesh may deal them out, which need not be in order
    parts = [loader.Records(folder).batches(8, seed=0, rows=own) for own in rows]
    for _ in range(6):
        batch = next(whole)
        for own, part in zip(rows, parts, strict=True):
            for name, found in next(part).items():
                np.testing.assert_array_equal(found, batch[name][own])
    assert {json.dumps(part.get_state()) for part in parts} == {json.dumps(whole.get_state())}


@pytest.mark.parametrize("shared", [True, False])
def test_processes_share_the_encoding_out_and_need_no_common_folder(tmp_path, shared):
    calls, all_are_there = [0, 0], threading.Barrier(2)

    def build(i):
        def counted(images):
            calls[i] += 1
            return encode(images)

        folder = tmp_path / ("both" if shared else str(i))
        options = dict(shard_size=4, encode=counted, flip=True, process_index=i, process_count=2)
        return ensure(numbered(12), folder, wait=lambda: all_are_there.wait(60), **options)

    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(build, range(2)))
    batches = [next(loader.Records(folder).batches(6, seed=0)) for folder in folders]
    for name in batches[0]:
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    assert calls == ([3, 3] if shared else [6, 6])  # of six files


def test_mirrored_pictures_are_drawn_half_the_time(tmp_path):
    plain = loader.Records(ensure(numbered(20), tmp_path)).batches(10, seed=0)
    flipped = loader.Records(ensure(numbered(20), tmp_path, flip=True)).batches(10, seed=0)

    def mirrored(batch):
        left, right = batch["moments"][:, 0, 0, 0], batch["moments"][:, 0, 1, 0]
        return (left > right)[left != right]

    assert not np.concatenate([mirrored(next(plain)) for _ in range(10)]).any()
    share = np.concatenate([mirrored(next(flipped)) for _ in range(40)]).mean()
    assert 0.4 < share < 0.6


def test_of_variants_an_epoch_draws_one(tmp_path):
    iterator = loader.Records(ensure(numbered(20), tmp_path)).batches(2, seed=0, variants=r"\d$")
    epochs = [order(next(iterator)) for _ in range(200)]
    assert all(sorted(i // 10 for i in epoch) == [0, 1] for epoch in epochs)  # "picture " and "picture 1"
    assert {i for epoch in epochs for i in epoch} == set(range(20))


def test_a_damaged_cache_is_refused(tmp_path):
    folder = ensure(numbered(5), tmp_path)
    about = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**about, "size": 6}))
    with pytest.raises(ValueError, match=r"has 5 moments, its cache.json says 6"):
        loader.Records(folder).batches(2, seed=0)
    (folder / records.shard_name("moments", 0, 1)).unlink()
    with pytest.raises(FileNotFoundError, match="the cache lacks"):
        loader.Records(folder).examples(1)


def test_unreadable_pictures_are_left_out_and_named_at_once(tmp_path, caplog):
    def damaged(size, bad):
        good = numbered(size)

        def load(i):
            if i in bad:
                raise pictures.Unreadable(f"{i}.png cannot be read")
            return good.load(i)

        return sources.Source(size, load, f"{bad}")

    source = damaged(20, {0, 5, 6, 7, 8, 19})
    folder = ensure(source, tmp_path, shard_size=4, flip=True, progress=True)
    assert loader.Records(folder).captions(99) == [f"picture {i}" for i in range(20) if i not in {0, 5, 6, 7, 8, 19}]
    assert len(next(loader.Records(folder).batches(14, seed=0))["moments"]) == 14
    (said,) = [record.getMessage() for record in caplog.records]
    assert "6 of 20 pictures are left out" in said and all(f"{i}.png cannot" in said for i in (0, 5, 6, 7, 8, 19))
    assert ensure(source, tmp_path, shard_size=4, flip=True, progress=True) == folder and len(caplog.records) == 2
    with pytest.raises(ValueError, match=r"no picture is left, all 3 are unreadable:\n0.png"):
        ensure(damaged(3, {0, 1, 2}), tmp_path)
    batches = loader.Pictures(source).batches(14, seed=0)
    assert sorted(next(batches)["images"][:, 0, 0, 0].tolist()) == [*range(1, 5), *range(9, 19)]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"size": 5}', '{"size": "x', '{"format": 9, "size": 5, "shards": 1}']
)
def test_a_cut_off_cache_json_is_named(tmp_path, content):
    folder = ensure(numbered(5), tmp_path)
    (folder / "cache.json").write_text(content)
    with pytest.raises(ValueError, match=r"cache.json.*: delete .* and build the cache again"):
        loader.Records(folder)


@pytest.mark.parametrize("damage", [lambda x: x[:70_000], lambda x: x[:100], lambda x: x[:300] + bytes(400) + x[700:]])
def test_a_damaged_shard_is_named(tmp_path, damage):
    folder = ensure(numbered(20), tmp_path)
    (shard,) = folder.glob("moments*")
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=rf"the shard {shard} is damaged .*delete"):
        loader.Records(folder).examples(20)


def test_large_pictures_are_encoded_fewer_at_a_time():
    counts = {size: encoding.at_a_time([(64, 64), (size, size)]) for size in (64, 512, 768, 1024, 4096)}
    assert counts == {64: 16, 512: 16, 768: 7, 1024: 4, 4096: 1}
