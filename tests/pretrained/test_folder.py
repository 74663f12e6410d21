"""Pipeline folders: what diffusers wrote is read, what is written diffusers reads, errors say what to do."""

import json
import logging
import shutil
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxkd import pretrained
from flaxkd.pretrained import Folder, hub, keys

torch = pytest.importorskip("torch")

# Capitals, spaces, digits, apostrophes, nothing, accents, symbols, too many words.
PROMPTS = ["red apple", "Woman's  HAT, 12 o'clock", "", "Côte d'Ivoire \N{WHITE MEDIUM STAR}", "apple " * 40]


@pytest.fixture
def copy(tiny_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))


@pytest.fixture(scope="module")
def exported(tiny_pipeline, tmp_path_factory) -> tuple[Path, dict]:
    """A folder with a new UNet, all else from the tiny pipeline; and the parameters of that UNet."""
    _, params = Folder.open(tiny_pipeline).load("unet")
    params = jax.tree.map(lambda x: x + np.float32(0.5), params)
    config = Folder.open(tiny_pipeline).config("unet")
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    pretrained.save(
        out, source=Folder.open(tiny_pipeline), parts={"unet": (config, params)}, dtype=np.float32, card="# card\n"
    )
    return out, params


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{pretrained.PARTS[part].stem}.safetensors"


def same_trees(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize("part", pretrained.PARTS)
def test_load_gives_every_tensor_of_the_file(tiny_pipeline, part):
    module, params = Folder.open(tiny_pipeline).load(part)
    stored = load_file(weights(tiny_pipeline, part))
    ours = {key.removeprefix("text_model."): x for key, x in keys.to_tensors(params).items()}
    assert ours.keys() == {key.removeprefix("text_model.") for key in stored}
    assert all(np.array_equal(ours[key.removeprefix("text_model.")], stored[key]) for key in stored)
    assert all(x.flags.c_contiguous and x.dtype == np.float32 for x in jax.tree.leaves(params))
    assert isinstance(module, pretrained.PARTS[part][0])


def test_load_in_another_dtype_and_from_bfloat16(copy):
    path = weights(copy, "text_encoder")
    stored = {key: x.astype(ml_dtypes.bfloat16) for key, x in load_file(path).items()}
    save_file(stored, path)
    assert all(x.dtype == ml_dtypes.bfloat16 for x in Folder.open(copy).tensors("text_encoder").values())
    _, params = Folder.open(copy).load("text_encoder")
    module, half = Folder.open(copy).load("text_encoder", ml_dtypes.bfloat16)
    assert module.dtype == ml_dtypes.bfloat16
    assert same_trees(half, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))


def test_shards_and_half_precision_variant(copy):
    path = weights(copy, "unet")
    whole = load_file(path)
    names = sorted(whole)
    files = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for file, part in files.items():
        save_file({name: whole[name] for name in part}, path.parent / file)
    path.unlink()
    index = path.with_name(path.name + ".index.json")
    index.write_text(
        json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}})
    )
    assert same_trees(Folder.open(copy).tensors("unet"), whole)
    (path.parent / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        Folder.open(copy).tensors("unet")
    index.unlink()
    save_file(whole, path.parent / "diffusion_pytorch_model.fp16.safetensors")
    assert same_trees(Folder.open(copy).tensors("unet"), whole)


def test_a_pickle_is_refused_with_the_remedy(copy):
    path = weights(copy, "unet")
    torch.save(torch.nn.Linear(1, 1).state_dict(), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ValueError, match=r"pickle \(diffusion_pytorch_model\.bin\)") as error:
        Folder.open(copy).load("unet")
    assert "save_pretrained(" in str(error.value) and str(copy) in str(error.value)
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors"):
        Folder.open(copy).load("unet")


def test_a_truncated_file_names_itself(copy):
    path = weights(copy, "vae")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model\.safetensors cannot be read"):
        Folder.open(copy).tensors("vae")


def test_resolve_folders(tiny_pipeline, tmp_path, monkeypatch):
    assert hub.resolve(str(tiny_pipeline)) == tiny_pipeline
    monkeypatch.setattr(hub, "EMBEDDED", tiny_pipeline)
    assert hub.resolve(None) == tiny_pipeline
    monkeypatch.setenv("HOME", str(tiny_pipeline.parent))
    assert hub.resolve("~/pipeline") == tiny_pipeline
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        hub.resolve(tiny_pipeline / "unet")
    for absent in ("./models/mine", "/models/mine", "~/models", "a/b/c", "mine", str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            hub.resolve(absent)


def test_hub_id_without_network_fails_quickly_with_the_remedy():
    started = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve("someone/no-such-model")
    assert time.monotonic() - started < 5
    assert "hf download someone/no-such-model --local-dir DIR" in str(error.value)


def test_hub_id_asks_only_for_what_is_used(tiny_pipeline, monkeypatch):
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda hub_id, **kwargs: asked.update(kwargs) or str(tiny_pipeline),
    )
    assert hub.resolve("owner/name") == tiny_pipeline
    any_of = lambda name, patterns: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    wanted = lambda n: any_of(n, asked["allow_patterns"]) and not any_of(n, asked["ignore_patterns"])
    used = [str(path.relative_to(tiny_pipeline)) for path in tiny_pipeline.rglob("*.*") if path.is_file()]
    used += [
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert [name for name in used if not wanted(name)] == []
    stem = "unet/diffusion_pytorch_model"
    skipped = [f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", "v1-5.safetensors"]
    skipped += ["safety_checker/model.safetensors", "v1-5-pruned.ckpt"]
    assert [name for name in skipped if wanted(name)] == []


def test_token_ids_are_those_of_the_diffusers_pipeline(tiny_pipeline):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_pipeline / "tokenizer")
    expected = theirs(
        PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="np"
    ).input_ids
    ids = Folder.open(tiny_pipeline).tokenize(PROMPTS)
    assert ids.dtype == np.int32 and ids.shape == (len(PROMPTS), 16)
    assert np.array_equal(ids, expected)
    assert len(set(map(tuple, ids))) == len(PROMPTS)


def test_the_two_formats_of_a_tokenizer_agree(tiny_pipeline, exported, tmp_path):
    older = tmp_path / "tokenizer"  # as all folders on the hub from before transformers 5
    shutil.copytree(exported[0] / "tokenizer", older)
    (older / "tokenizer.json").unlink()
    ids = [
        Folder(folder).tokenize(PROMPTS)
        for folder in (tiny_pipeline, tmp_path)
    ]
    assert np.array_equal(*ids)


def test_a_saved_folder_loads_in_diffusers_with_every_tensor_equal(tiny_pipeline, exported, caplog, recwarn):
    from diffusers import StableDiffusionPipeline

    out, params = exported
    caplog.set_level(logging.WARNING)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    theirs = StableDiffusionPipeline.from_pretrained(out)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
    said = caplog.text + " ".join(str(w.message) for w in recwarn)
    assert not [
        word for word in ("newly initialized", "were not used", "MISSING", "UNEXPECTED") if word in said
    ]

    expected = keys.to_tensors(params)
    state = theirs.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)
    for part in ("vae", "text_encoder"):
        expected = load_file(weights(tiny_pipeline, part))
        state = getattr(theirs, part).state_dict()
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)
    assert theirs.scheduler.config.steps_offset == 1
    assert (
        theirs.tokenizer("red apple").input_ids
        == Folder.open(tiny_pipeline).tokenizer("red apple").input_ids
    )
    assert theirs.vae_scale_factor == 4
    assert (out / "README.md").read_text() == "# card\n"


def test_text_encoder_files_have_the_prefix_that_transformers_4_needs(exported):
    assert all(key.startswith("text_model.") for key in load_file(weights(exported[0], "text_encoder")))


def test_save_replaces_an_export_but_nothing_else(tiny_pipeline, exported, copy, tmp_path):
    out, _ = exported
    before = Folder.open(out).tensors("unet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photograph.png").touch()
    with pytest.raises(ValueError, match="not an earlier export"):
        pretrained.save(tmp_path / "mine", source=Folder.open(out), parts={})
    for parent in (copy, copy.parent):
        with pytest.raises(ValueError, match=r"not an earlier export|would replace"):
            pretrained.save(parent, source=Folder.open(copy), parts={})
    assert (tmp_path / "mine" / "photograph.png").exists() and (copy / "unet").exists()

    pretrained.save(copy, source=Folder.open(out), parts={})
    assert same_trees(Folder.open(copy).tensors("unet"), before)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy", "mine"]


def test_a_failed_save_leaves_the_earlier_export_as_it_was(exported, copy):
    out, params = exported
    before = Folder.open(copy).tensors("unet")
    config = Folder.open(out).config("unet")
    wrong = config | {"block_out_channels": [8, 16, 16, 32]}
    with pytest.raises(ValueError, match="mis-shaped"):
        pretrained.save(copy, source=Folder.open(out), parts={"unet": (wrong, params)})
    large = jax.tree.map(lambda x: x * np.float32(1e6), params)
    with pytest.raises(ValueError, match="too large for float16"):
        pretrained.save(copy, source=Folder.open(out), parts={"unet": (config, large)}, dtype=np.float16)
    assert same_trees(Folder.open(copy).tensors("unet"), before)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_an_unsupported_pipeline_is_refused(copy, tmp_path):
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline"):
        pretrained.save(tmp_path / "out", source=Folder.open(copy), parts={})
