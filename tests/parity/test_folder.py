"""Pipeline folders: what diffusers wrote is read, what is written diffusers reads."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxkd import pretrained
from flaxkd.pretrained import Folder, keys
from tests import tiny
from tests.pretrained.test_folder import weights
from tests.pretrained.test_writing import shifted

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Capitals, spaces, digits, apostrophes, nothing, accents, symbols, too many words.
PROMPTS = ["red apple", "Woman's  HAT, 12 o'clock", "", "Côte d'Ivoire \N{WHITE MEDIUM STAR}", "apple " * 40]


@pytest.fixture
def copy(diffusers_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(diffusers_pipeline, tmp_path / "copy"))


@pytest.fixture(scope="module")
def exported(diffusers_pipeline, tmp_path_factory) -> tuple[Path, dict]:
    return shifted(diffusers_pipeline, tmp_path_factory.mktemp("exported") / "pipeline")


@pytest.mark.parametrize("part", pretrained.FAMILIES["sd1"].parts)
def test_load_gives_every_tensor_of_the_file(diffusers_pipeline, part):
    module, params = Folder.open(diffusers_pipeline).load(part)
    stored = load_file(weights(diffusers_pipeline, part))
    ours = {key.removeprefix("text_model."): x for key, x in keys.to_tensors(params).items()}
    assert ours.keys() == {key.removeprefix("text_model.") for key in stored}
    assert all(np.array_equal(ours[key.removeprefix("text_model.")], stored[key]) for key in stored)
    assert all(x.flags.c_contiguous and x.dtype == np.float32 for x in jax.tree.leaves(params))
    assert isinstance(module, pretrained.PARTS[part][0])


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


def test_token_ids_are_those_of_the_diffusers_pipeline(diffusers_pipeline):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(diffusers_pipeline / "tokenizer")
    expected = theirs(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="np").input_ids
    ids = tiny.ids(Folder.open(diffusers_pipeline), PROMPTS)
    assert ids.dtype == np.int32 and ids.shape == (len(PROMPTS), 16)
    assert np.array_equal(ids, expected)
    assert len(set(map(tuple, ids))) == len(PROMPTS)


def test_the_two_formats_of_a_tokenizer_agree(diffusers_pipeline, exported, tmp_path):
    older = shutil.copytree(exported[0], tmp_path / "older")
    (older / "tokenizer" / "tokenizer.json").unlink()  # as all folders on the hub from before transformers 5
    ids = [tiny.ids(Folder(folder), PROMPTS) for folder in (diffusers_pipeline, older)]
    assert np.array_equal(*ids)


def test_a_saved_folder_loads_in_diffusers_with_every_tensor_equal(diffusers_pipeline, exported, caplog, recwarn):
    out, params = exported
    caplog.set_level(logging.WARNING)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(out)
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
    said = caplog.text + " ".join(str(w.message) for w in recwarn)
    assert not [word for word in ("newly initialized", "were not used", "MISSING", "UNEXPECTED") if word in said]

    expected = keys.to_tensors(params)
    state = theirs.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)
    for part in ("vae", "text_encoder"):
        expected = load_file(weights(diffusers_pipeline, part))
        state = getattr(theirs, part).state_dict()
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[key].numpy(), expected[key]) for key in expected)
    assert theirs.scheduler.config.steps_offset == 1
    assert theirs.tokenizer("red apple").input_ids == Folder.open(diffusers_pipeline).tokenizer("red apple").input_ids
    assert theirs.vae_scale_factor == 4
    assert (out / "README.md").read_text() == "# card\n"


def test_text_encoder_files_have_the_prefix_that_transformers_4_needs(exported):
    assert all(key.startswith("text_model.") for key in load_file(weights(exported[0], "text_encoder")))


def test_skipped_layers_are_those_of_diffusers(diffusers_pipeline):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(diffusers_pipeline)
    object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)  # as until transformers 5
    with torch.no_grad():
        expected, _ = theirs.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=1)
    folder = Folder.open(diffusers_pipeline, clip_skip=1)
    text_encoder, params = folder.load("text_encoder")
    states = text_encoder.apply({"params": params}, tiny.ids(folder, PROMPTS))
    np.testing.assert_allclose(states, expected.numpy(), atol=2e-5)


# Fields as in configurations on the hub, which diffusers reads as another spelling of the same network.
SPELLINGS = {
    **{"only_cross_attention": [False] * 4, "cross_attention_dim": [16] * 4, "attention_head_dim": [2] * 4},
    **{"down_block_types": [f"UNetRes{kind}" for kind in tiny.UNET["down_block_types"]], "act_fn": "SiLU"},
    **{"upcast_attention": None, "use_linear_projection": None, "class_embeddings_concat": None},
    **{"resnet_out_scale_factor": 3.0, "cross_attention_norm": "group_norm", "resnet_skip_time_act": True},
    **{"mid_block_only_cross_attention": True, "addition_embed_type_num_heads": 8, "dropout": 0.1},
    **{"sample_size": [8, 8], "time_embedding_dim": 32},
    **{"decay": 0.9999, "optimization_step": 100, "quantization_config": None},
}


@pytest.mark.filterwarnings("ignore:.*fields that diffusers does not know")
def test_a_unet_is_the_same_in_every_spelling_that_diffusers_reads(copy):
    def theirs() -> np.ndarray:
        unet = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet").eval()
        sample, states = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 64).reshape(1, 4, 16)
        with torch.no_grad():
            return unet(sample, torch.tensor([500]), states).sample.numpy()

    path = copy / "unet" / "config.json"
    before, plain = theirs(), Folder.open(copy).module("unet").config
    path.write_text(json.dumps(json.loads(path.read_text()) | SPELLINGS))
    np.testing.assert_array_equal(theirs(), before)
    assert Folder.open(copy).module("unet").config == plain
