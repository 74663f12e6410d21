"""The command that makes a cache of a large image set, with a real autoencoder, and what a training takes it for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from flaxkd import cache
from flaxkd.data import encoding, loader, sources
from flaxkd.machine import files, sharding
from flaxkd.pretrained import Folder, hub
from tests.data.image_sets import CAPTIONS, N, listed, picture, tars, write_tar

DATA = dict(resolution=32, buckets=None, random_flip=False, background="white", caption_column=None)
TRAINING = ConfigDict(dict(data=DATA))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_pipeline):
    """The cache of a folder of tars, one of them no tar, and the folder."""
    folder = tmp_path_factory.mktemp("made")
    tars(folder / "tars")
    (folder / "tars" / "00003.tar").write_bytes(b"no tar")
    out = folder / "cache"
    arguments = ["--source", folder / "tars", "--teacher", tiny_pipeline, "--out", out, "--validation", 0.2]
    cache.main(list(map(str, arguments)))
    return out


def opened(folder, split, source, config=TRAINING):
    """The cache as `train.run` comes to it."""
    pictures = sources.open_source(str(folder), split, resolution=config.data.resolution)
    return encoding.ensure(config, pictures, split, Folder.open(source), sharding.compute_dtype())


def test_a_training_reads_it_like_its_own(made, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path))
    folder = listed(tmp_path / "pictures")
    found, own = {}, {}
    for split in ("train", "validation"):
        assert opened(made, split, tiny_pipeline) == made / split
        for entry, where in ((found, made), (own, folder)):
            reader = loader.Records(opened(where, split, tiny_pipeline))
            (batch,) = reader.examples(N)
            pairs = zip(batch["moments"], batch["input_ids"], strict=True)
            entry |= dict(zip(reader.captions(N), pairs, strict=True))
    assert set(found) == set(own) == set(CAPTIONS)
    for caption in CAPTIONS:
        np.testing.assert_allclose(found[caption][0], own[caption][0], atol=0.02, rtol=0.01)
        np.testing.assert_array_equal(found[caption][1], own[caption][1])
    batch = next(loader.Records(opened(made, "train", tiny_pipeline)).batches(8, seed=0, flip=False))
    assert batch["moments"].shape == (8, 8, 8, 8) and batch["input_ids"].shape == (8, 16)


def test_what_does_not_fit_a_training_is_refused(made, tiny_pipeline):
    for key, value, message in [
        ("resolution", 64, "has pictures of 32 pixels, data.resolution is 64"),
        (
            "buckets",
            ((32, 32), (32, 48)),
            r"has pictures of the sizes \(\(32, 32\),\), .*`python -m flaxkd.cache --buckets`",
        ),
        ("background", "black", "was made with background 'white', data.background is 'black'"),
        ("caption_column", "alt", r"was made with caption_column None, .* `python -m flaxkd.cache --caption-column`"),
        ("random_flip", True, r"has no mirrored pictures.*`python -m flaxkd.cache --flip`"),
    ]:
        config = TRAINING.copy_and_resolve_references()
        config.data[key] = value
        with pytest.raises(ValueError, match=message):
            opened(made, "train", tiny_pipeline, config)
    with pytest.raises(ValueError, match="was made with another autoencoder or tokenizer"):
        opened(made, "train", hub.EMBEDDED)
    with pytest.raises(ValueError, match="has latents and no pictures"):
        sources.open_source(str(made), "train")[0]


def test_what_it_says(made, tiny_pipeline, tmp_path, capsys):
    arguments = ["--source", str(made.parent / "tars"), "--teacher", str(tiny_pipeline), "--out", str(made)]
    arguments += ["--validation", "0.2"]
    cache.main(arguments)  # all is there
    said = capsys.readouterr()
    assert "4 chunks" in said.out and "20 pictures to train on, 4 to validate" in said.out
    assert "skipped 1: broken from here on, listed in skipped.jsonl" in said.out and f"data.source={made}" in said.out
    assert "encoding: 4/4 chunks (100%)" in said.err
    for other, message in [
        (["--flip"], "flip: False there, True here"),
        (["--buckets", "((32, 32), (32, 42))"], "--buckets = 42 pixels is no multiple of 4"),
        (["--buckets", "((32, 32), (32, 48))"], "buckets: None there"),
        (["--resolution", "30"], "--resolution = 30 pixels is no multiple of 4"),
        (["--source", "gone/"], "there is no gone/"),
        (["--source", str(tmp_path)], "has no pictures, tars or tables"),
    ]:
        with pytest.raises(SystemExit, match=message):
            cache.main([*arguments, *other])
    with pytest.raises(SystemExit):
        cache.main(["--source", "x"])
    assert "give --source and --out, --draw N and --out, or --bench DIR" in capsys.readouterr().err
    cache.main(["--bench", str(made), "--seconds", "0.1"])
    assert "images/s in batches of 256" in capsys.readouterr().out


def test_a_cache_for_stable_diffusion_xl(tiny_xl, tmp_path):
    """Both rows of token ids, and sizes of pictures that were 24 x 8 pixels; its autoencoder is in float32."""
    out, folder = tmp_path / "cache", Folder.open(tiny_xl)
    (tmp_path / "tars").mkdir()
    samples = [(str(i), {"png": picture(i, (24, 8)), "txt": caption.encode()}) for i, caption in enumerate(CAPTIONS)]
    write_tar(tmp_path / "tars" / "0.tar", samples)
    arguments = ["--source", tmp_path / "tars", "--teacher", tiny_xl, "--out", out, "--validation", 0.2]
    cache.main([*map(str, arguments), "--dtype", "bfloat16", "--buckets", "((32, 32), (32, 64))"])
    config = TRAINING.copy_and_resolve_references()
    config.data.buckets = ((32, 32), (32, 64))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    batch = {"moments": shape(8, 8, 8), "input_ids": shape(16), "input_ids_2": shape(16), "time_ids": shape(6)}
    pictures = sources.open_source(str(out), "train")
    reader = encoding.open_data(batch, config, pictures, "train", folder, jnp.bfloat16)
    assert reader.about["encoder"].endswith("-float32") and reader.about["buckets"] == [[32, 32], [32, 64]]
    (found,) = reader.examples(3)
    assert found.keys() == batch.keys() and found["moments"].shape == (3, 8, 16, 8)
    np.testing.assert_array_equal(found["time_ids"], [[8, 24, 0, 16, 32, 64]] * 3)
    for name, ids in folder.tokenize(reader.captions(3)).items():
        np.testing.assert_array_equal(found[name], ids)
    with pytest.raises(ValueError, match=r"a task's batch names \('depths',\), but a reader has .*'input_ids_2'"):
        encoding.open_data({"depths": shape(6)}, config, pictures, "train", folder, jnp.bfloat16)


@pytest.mark.slow
def test_a_set_that_the_teacher_draws(tiny_pipeline, tmp_path, capsys):
    """A stopped one goes on to the same pictures; it is a data set; other settings are refused before any compute."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\ngreen apple\nblue heart\n")
    flags = ["--teacher", str(tiny_pipeline), "--draw", "4", "--steps", "2", "--prompts", str(prompts)]
    flags += ["--out", str(tmp_path / "set")]
    cache.main(flags)
    assert "4 pictures of 3 prompts" in capsys.readouterr().out
    lines = files.read_jsonl(tmp_path / "set" / "metadata.jsonl")
    assert [line["text"] for line in lines] == ["red apple", "green apple", "blue heart", "red apple"]
    content = {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.png")}
    assert len({*content.values()}) == 4
    (tmp_path / "set" / "000002.png").unlink()
    (tmp_path / "set" / "metadata.jsonl").unlink()
    cache.main(flags)
    assert content == {path.name: path.read_bytes() for path in (tmp_path / "set").glob("*.png")}
    source = sources.open_source(str(tmp_path / "set"), "train", resolution=32)
    assert {*source.captions} <= {"red apple", "green apple", "blue heart"}
    with pytest.raises(SystemExit, match=r"pictures drawn with other settings:\n  seed: 0 there, 1 here"):
        cache.main([*flags, "--seed", "1"])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metadata.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match=r"foreign has metadata.jsonl that flaxkd did not draw: choose another --out"):
        cache.main([*flags, "--out", str(foreign)])
    assert (foreign / "metadata.jsonl").read_text() == "mine"
    with pytest.raises(SystemExit, match="--draw is 0, must be at least 1"):
        cache.main([*flags, "--draw", "0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draw", "1", "--flip", "--min-size", "9"], "--flip, --min-size: not of --draw"),
        (["--draw", "1", "--prompts", "p.txt", "--caption-column", "long"], "--caption-column: not beside --prompts"),
        (["--source", "set", "--steps", "3", "--seed", "1"], "--steps, --seed: of --draw"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cache.main(["--out", "nowhere", *arguments])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
