"""Single files by LDM's names: diffusers loads what flaxkd writes, and its converters give the same names."""

import numpy as np
import pytest

from flaxkd import pretrained, students
from flaxkd.export import single_file
from flaxkd.pretrained import ARCHITECTURES, FAMILIES, Folder, ldm
from tests import tiny
from tests.pretrained import full_size

diffusers = pytest.importorskip("diffusers")
utils = pytest.importorskip("diffusers.loaders.single_file_utils")


def same(ours: dict, theirs: dict) -> bool:
    """Equal names and bits; with or without the prefix that transformers 5 leaves out."""
    ours, theirs = ({key.removeprefix("text_model."): np.asarray(x) for key, x in d.items()} for d in (ours, theirs))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)


def of_family(pipeline, family: str, out) -> Folder:
    """The pipeline, or one with the same widths of the other family."""
    folder = Folder.open(pipeline)
    if folder.family is FAMILIES[family]:
        return folder
    unet = folder.config("unet") | {"use_linear_projection": True}
    text = folder.config("text_encoder") | {"hidden_act": "gelu"}
    weights = tiny.weights(pretrained.shapes("unet", unet), 1), folder.params("text_encoder")
    parts = dict(zip(("unet", "text_encoder"), zip((unet, text), weights, strict=True), strict=True))
    return Folder.open(pretrained.save(out, source=folder, parts=parts))


@pytest.mark.parametrize(
    ("family", "student"), [("sd1", None), ("sd1", "sd_small"), ("sd1", "bk_small"), ("sd1", "sd_tiny"), ("sd2", None)]
)
def test_diffusers_loads_every_tensor_of_what_is_written(diffusers_pipeline, tmp_path, family, student):
    folder = of_family(diffusers_pipeline, family, tmp_path / family)
    if student:
        config = students.config(students.get(student), folder.config("unet"))
        params = tiny.weights(pretrained.shapes("unet", config), 7)
        folder = Folder.open(pretrained.save(tmp_path / student, source=folder, parts={"unet": (config, params)}))
    single_file.write(tmp_path / "model.safetensors", folder)
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        tmp_path / "model.safetensors", config=str(folder.path), local_files_only=True
    )
    back = Folder.open(tmp_path / "model.safetensors")
    for part in folder.parts:
        state = {key: x.numpy() for key, x in getattr(theirs, part).state_dict().items()}
        assert same(folder.tensors(part), state), part
        assert same(back.tensors(part), state), part
    assert np.array_equal(tiny.ids(back, tiny.CAPTIONS), tiny.ids(folder, tiny.CAPTIONS))


@pytest.mark.parametrize("student", [None, "bk_sdxl_small"])
def test_diffusers_loads_every_tensor_of_an_sdxl(tmp_path, student):
    """Whose text encoders differ in width: diffusers tells them so."""
    wider = {"text_encoder_2": tiny.XL["text_encoder_2"] | {"hidden_size": 24}}
    wider |= {"unet": tiny.XL["unet"] | {"cross_attention_dim": 16 + 24}}
    folder = Folder.open(tiny.write(tmp_path / "xl", tiny.XL | wider))
    if student:
        config = students.config(students.get(student), folder.config("unet"))
        params = tiny.weights(pretrained.shapes("unet", config), 7)
        folder = Folder.open(pretrained.save(tmp_path / student, source=folder, parts={"unet": (config, params)}))
    single_file.write(tmp_path / "model.safetensors", folder)
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(
        tmp_path / "model.safetensors", config=str(folder.path), local_files_only=True
    )
    for part in folder.parts:
        state = {key: x.numpy() for key, x in getattr(theirs, part).state_dict().items()}
        assert same(folder.tensors(part), state), part


FULL = [(a, s) for a in ("sd15", "sd21") for s in (None, "sd_small", "bk_small", "sd_tiny")]
FULL += [("sdxl", s) for s in (None, "ssd_1b", "vega", "koala_1b", "koala_700m")]


@pytest.mark.parametrize(("architecture", "student"), FULL)
def test_the_converter_of_diffusers_names_every_tensor_of_a_full_unet_alike(architecture, student):
    config, ours = full_size.unet(architecture, student)
    theirs = utils.convert_ldm_unet_checkpoint(ldm.to_ldm("unet", ours), {"layers_per_block": 2} | config)
    assert full_size.shapes(theirs) == full_size.shapes(ours)


def test_the_converter_of_diffusers_names_every_tensor_of_a_full_autoencoder_alike():
    ours = full_size.tensors("vae", "sd15")
    theirs = utils.convert_ldm_vae_checkpoint(ldm.to_ldm("vae", ours), ARCHITECTURES["sd15"].configs["vae"])
    assert full_size.shapes(theirs) == full_size.shapes(ours)
