"""Folders of Stable Diffusion XL: two text encoders, missing prompts, an autoencoder in float32, shared parts."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd import pretrained
from flaxkd.models.clip import end_of_text
from flaxkd.pretrained import FAMILIES, Folder, families, fresh, hub
from tests import tiny


@pytest.fixture(scope="module")
def folder(tiny_xl) -> Folder:
    return Folder.open(tiny_xl)


def test_a_folder_has_two_text_encoders_and_five_parts_in_all(folder):
    assert folder.family is FAMILIES["sdxl"] and folder.guidance == 5.0
    assert folder.parts == ("unet", "vae", "text_encoder", "text_encoder_2")
    inputs = folder.conditions(["red apple", None], (32, 48))
    assert {name: x.shape for name, x in inputs.items()} == {
        "input_ids": (2, 16),
        "input_ids_2": (2, 16),
        "time_ids": (2, 6),
    }
    first, second = inputs["input_ids"][0], inputs["input_ids_2"][0]
    end = folder.tokenizer.eos_token_id
    words = list(first).index(end) + 1
    np.testing.assert_array_equal(first[:words], second[:words])
    assert set(first[words:]) == {end} and set(second[words:]) == {0}  # "!", the second one's padding
    assert inputs["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert (inputs["input_ids"][1] == families.MISSING).all() and (inputs["input_ids_2"][1] == families.MISSING).all()


def test_a_folder_may_say_that_a_missing_prompt_is_the_empty_one(folder):
    other = folder.replace({"model_index": folder.index | {families.ZEROS: False}}, {})
    assert folder.zeros and not other.zeros
    for name, ids in other.tokenize([None]).items():
        np.testing.assert_array_equal(ids, folder.tokenize([""])[name])


def test_the_text_length_ends_in_the_pooled_state():
    ids = np.array([[5, 3, 9, 9], [5, 9, 0, 0], [9, 3, 2, 2]])
    assert end_of_text(ids, 9).tolist() == [2, 1, 0] == end_of_text(ids, 2).tolist()  # 2: in old files, the largest id
    assert end_of_text(ids, 3).tolist() == [1, 0, 1]


def test_the_autoencoder_computes_in_float32_where_its_configuration_asks(folder):
    asks = folder.config("vae")
    assert asks["force_upcast"] and folder.dtype("vae", jnp.bfloat16) == jnp.float32
    module, params = folder.load("vae", jnp.bfloat16)
    assert module.dtype == jnp.float32 and {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    other = folder.replace({"vae": asks | {"force_upcast": False}}, {})  # as that of sdxl-vae-fp16-fix
    assert other.dtype("vae", jnp.bfloat16) == jnp.bfloat16 == folder.dtype("unet", jnp.bfloat16)


def test_an_autoencoder_of_stable_diffusion_1_computes_as_ever(tiny_pipeline):
    folder = Folder.open(tiny_pipeline)
    folder = folder.replace({"vae": folder.config("vae") | {"force_upcast": True}}, {})
    assert folder.dtype("vae", jnp.bfloat16) == jnp.bfloat16


def test_skipped_layers_leave_the_pooled_state_alone(folder):
    deeper = folder.config("text_encoder") | {"num_hidden_layers": 4}
    shapes = families.shapes("text_encoder", deeper)
    folder = folder.replace({"text_encoder": deeper}, {"text_encoder": lambda: tiny.weights(shapes, 5)})
    inputs = folder.conditions(["red apple"], (32, 32))

    def condition(folder):
        modules = {part: folder.module(part) for part in folder.family.encoders}
        params = {part: folder.params(part) for part in folder.family.encoders}
        return folder.family.condition(modules, params, inputs), params

    (usual, params), (skipped, _) = condition(folder), condition(folder.skip_layers(1))
    np.testing.assert_array_equal(usual["text_embeds"], skipped["text_embeds"])
    assert np.abs(usual["encoder_hidden_states"] - skipped["encoder_hidden_states"]).max() > 0.1
    # The states of skipped layers are those before the last layer of an encoder that never had the skipped ones.
    short = folder.config("text_encoder") | {"num_hidden_layers": 3}
    shorter = folder.replace({"text_encoder": short}, {"text_encoder": lambda: params["text_encoder"]})
    states = condition(shorter)[0]["encoder_hidden_states"][..., :16]
    np.testing.assert_array_equal(states, skipped["encoder_hidden_states"][..., :16])


def test_a_new_pipeline_takes_the_parts_that_are_the_teachers(tiny_pipeline, tmp_path):
    base = Folder.open(tiny_pipeline)
    architecture = tiny.XL | {part: fresh.TEACHER for part in ("vae", "text_encoder", "vocab_size")}
    made = fresh.write(tmp_path / "new", architecture, [], 0, base)
    assert made.family is FAMILIES["sdxl"]
    for part in ("vae", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, made.params(part), base.params(part))
    for name, ids in made.tokenize(tiny.CAPTIONS).items():
        assert ids.shape == (5, 16) and (name != "input_ids" or np.array_equal(ids, tiny.ids(base, tiny.CAPTIONS)))
    assert not np.any(made.params("unet")["conv_out"]["kernel"])  # random, and nearly the identity


def test_a_folder_may_share_parts_with_another_one(tiny_xl, tmp_path):
    whole, lean = Folder.open(tiny_xl), tmp_path / "lean"
    shutil.copytree(tiny_xl, tmp_path / "whole")
    shutil.copytree(tiny_xl, lean)
    shared = dict.fromkeys(("vae", "tokenizer", "scheduler"), "../whole")
    for name in shared:
        shutil.rmtree(lean / name)
    (lean / "model_index.json").write_text(json.dumps(whole.index | {"_shared": shared}))
    folder = Folder.open(lean)
    jax.tree.map(np.testing.assert_array_equal, folder.params("vae"), whole.params("vae"))
    assert folder.config("scheduler") == whole.config("scheduler")
    assert np.array_equal(tiny.ids(folder, tiny.CAPTIONS), tiny.ids(whole, tiny.CAPTIONS))
    saved = Folder.open(pretrained.save(tmp_path / "out", source=folder, parts={}))  # what is written is whole
    assert "_shared" not in saved.index and (saved.path / "vae" / "config.json").is_file()


def test_a_miniature_has_a_name(tiny_xl, monkeypatch):
    monkeypatch.setitem(hub.MINIATURES, "miniature_xl", tiny_xl)
    assert hub.resolve("miniature_xl") == tiny_xl and hub.embedded(tiny_xl) == (True, "miniature_xl")
    assert hub.embedded(hub.EMBEDDED) == (True, None) and hub.embedded(tiny_xl.parent) == (False, None)


def test_a_refiner_is_in_no_row(folder):
    index = folder.index | {"text_encoder": [None, None], "tokenizer": [None, None]}
    refiner = dataclasses.replace(folder, configs={"model_index": index})
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline of unet, vae, text_encoder_2: .*refiners"):
        _ = refiner.family
