"""A pipeline on disk is one object, and one table tells its kind."""

import json
import shutil

import jax
import numpy as np
import pytest

from convert import from_diffusers
from flaxkd import export
from flaxkd.pretrained import ARCHITECTURES, FAMILIES, Folder, families, fresh


@pytest.mark.parametrize(("name", "family"), [("sd15", "sd1"), ("sd21", "sd2"), ("sd21_base", "sd2")])
def test_a_folder_knows_its_family_and_sizes(tmp_path, name, family):
    architecture = ARCHITECTURES[name]
    folder = fresh.skeleton(tmp_path, architecture)
    assert folder.family is FAMILIES[family] and folder.parts == ("unet", "vae", "text_encoder")
    size = architecture.unet["sample_size"]
    assert (folder.factor, folder.scaling_factor, folder.resolution) == (8, 0.18215, 8 * size)
    assert folder.latent_shape() == (size, size, 4) and folder.latent_shape(512) == (64, 64, 4)
    ids = folder.tokenize(["a picture", ""])
    assert folder.text_length == 77 and {name: x.shape for name, x in ids.items()} == {"input_ids": (2, 77)}
    assert ARCHITECTURES[folder.family.shown].title.startswith(folder.family.title[: -len(".x")])


@pytest.mark.parametrize(
    ("index", "unet"),
    [
        ({"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}, {}),
        ({"_class_name": "KandinskyPipeline"}, {}),
        ({}, {}),
        ({"_class_name": "StableDiffusionInstructPix2PixPipeline"}, {"in_channels": 8}),
    ],
)
def test_another_kind_of_pipeline_is_in_no_row(index, unet):
    row = ARCHITECTURES["sd15"]
    usual = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    assert families.of(usual, row.unet, row.configs["vae"]) is FAMILIES["sd1"]
    inpainting = usual | {"_class_name": "StableDiffusionInpaintPipeline"}
    assert families.of(inpainting, row.unet | {"in_channels": 9}, row.configs["vae"]) is FAMILIES["sd1"]
    assert families.of(index, row.unet | unet, row.configs["vae"]) is None


def test_the_text_conditions_the_unet(tiny_pipeline):
    folder = Folder(tiny_pipeline)
    text_encoder, params = folder.load("text_encoder")
    ids = folder.tokenize(["red apple", "grinning face"])
    condition = folder.family.condition({"text_encoder": text_encoder}, {"text_encoder": params}, ids)
    states = text_encoder.apply({"params": params}, ids["input_ids"])
    assert condition.keys() == {"encoder_hidden_states"}
    np.testing.assert_array_equal(condition["encoder_hidden_states"], states)


def test_parts_can_be_replaced_without_a_file(tiny_pipeline):
    folder = Folder(tiny_pipeline)
    config = folder.config("unet") | {"layers_per_block": 1, "mid_block_type": None}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), families.shapes("unet", config))
    other = folder.replace({"unet": config}, {"unet": lambda: zeros})
    module, params = other.load("unet", np.float16)
    assert module.config.mid_block_type is None and other.count("unet") < folder.count("unet")
    assert {(x.dtype, float(x.max())) for x in jax.tree.leaves(params)} == {(np.dtype("float16"), 0.0)}
    assert folder.config("unet") != config  # the first folder stays as it was


def test_a_workdir_is_a_folder_with_the_parts_of_its_newest_checkpoint(tiny_pipeline, tmp_path):
    workdir = tmp_path / "run"
    from_diffusers.convert(str(tiny_pipeline), workdir)
    folder = export.open_model(workdir)
    assert folder.step() == 0 and folder.weights.keys() == {"unet", "vae", "text_encoder"}
    whole = Folder(tiny_pipeline).params("unet")
    jax.tree.map(np.testing.assert_array_equal, folder.params("unet"), whole)
    shutil.copytree(tiny_pipeline, workdir / export.EXPORT)
    assert export.open_model(workdir).path == workdir / export.EXPORT


def test_a_configuration_that_is_cut_off_names_its_file(tiny_pipeline, tmp_path):
    folder = Folder(shutil.copytree(tiny_pipeline, tmp_path / "copy"))
    path = folder.path / "unet" / "config.json"
    path.write_text(json.dumps(folder.config("unet"))[:40])
    with pytest.raises(ValueError, match=r"unet/config\.json is not JSON .* copied whole"):
        folder.module("unet")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"unet/config\.json is missing: .* not a whole pipeline folder"):
        folder.module("unet")


@pytest.mark.slow
def test_the_published_architectures_have_their_published_sizes():
    count = lambda row: {part: families.count(part, row.configs[part]) for part in FAMILIES[row.family].parts}
    assert {name: count(row) for name, row in ARCHITECTURES.items()} == {
        "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
        "sd21_base": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
        "sd21": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
        "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    }
    assert families.published("CompVis/stable-diffusion-v1-4") is ARCHITECTURES["sd15"]
    assert families.published(None) is families.published("somebody/else") is None


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"block_out_channels": [320, 10**30, 1280, 1280]}, "numbers from 0 to 1,048,576"),
        ("unet", {"block_out_channels": [320, 640, 1280, []]}, "supported: tuple"),
        ("unet", {"norm_eps": float("nan")}, "numbers from 0"),
        ("unet", {"norm_num_groups": 7}, "no unet can be built .*groups"),
        ("vae", {"layers_per_block": -1}, "numbers from 0"),
        ("text_encoder", {"num_attention_heads": 5}, "no text_encoder can be built"),
    ],
)
def test_sizes_that_no_network_has_are_refused_before_any_memory_is_taken(part, changes, message):
    config = ARCHITECTURES["sd15"].configs[part] | changes
    with pytest.raises(ValueError, match=message):
        families.shapes(part, config)
