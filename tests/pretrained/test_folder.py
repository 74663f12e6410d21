"""Weights of pipeline folders: dtypes, shards and damaged files."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxkd import export, pretrained
from flaxkd.pretrained import Folder
from tests import tiny


@pytest.fixture
def copy(tiny_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{pretrained.PARTS[part].stem}.safetensors"


def same_trees(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


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
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    assert same_trees(Folder.open(copy).tensors("unet"), whole)
    (path.parent / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        Folder.open(copy).tensors("unet")
    index.unlink()
    save_file(whole, path.parent / "diffusion_pytorch_model.fp16.safetensors")
    assert same_trees(Folder.open(copy).tensors("unet"), whole)


def test_a_truncated_file_names_itself(copy):
    path = weights(copy, "vae")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model\.safetensors cannot be read"):
        Folder.open(copy).tensors("vae")


# -- Configurations as people have them ------------------------------------------------------------------------------


def change(folder: Path, file: str, **changes) -> Folder:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return Folder.open(folder)


@pytest.mark.parametrize(
    ("part", "changes", "plain"),
    [
        ("unet", {"only_cross_attention": [False] * 4}, {"only_cross_attention": False}),
        ("unet", {"sample_size": [8, 8], "upcast_attention": None}, {"sample_size": 8, "upcast_attention": False}),
        ("unet", {"cross_attention_dim": [16] * 4, "attention_head_dim": [2] * 4}, {"cross_attention_dim": 16}),
        ("unet", {"act_fn": "SiLU", "time_embedding_dim": 32}, {"act_fn": "silu", "time_embedding_dim": None}),
        ("unet", {"mid_block_only_cross_attention": False, "class_embed_type": None, "dropout": 0.1}, {"dropout": 0.1}),
        ("unet", {"center_input_sample": None, "resnet_out_scale_factor": None}, {}),
        ("unet", {"up_block_types": [f"UNetRes{kind}" for kind in tiny.UNET["up_block_types"]]},
         {"up_block_types": [*tiny.UNET["up_block_types"]]}),
        ("vae", {"sample_size": [32, 32], "force_upcast": None, "shift_factor": None}, {"sample_size": 32}),
        ("text_encoder", {"attention_dropout": 0.1, "anything": [1]}, {"anything": [1]}),
    ],
)  # fmt: skip
def test_other_spellings_are_the_same_network(copy, tmp_path, part, changes, plain):
    before = Folder.open(copy)
    before = before.module(part), before.params(part)
    folder = change(copy, f"{part}/config.json", **changes)
    module, params = folder.load(part)
    same = {"sample_size"} & {*changes} or module.config == before[0].config
    assert same and same_trees(params, before[1])
    assert {name: folder.config(part)[name] for name in plain} == plain


def test_unknown_fields_are_ignored_with_one_warning_and_not_written(copy, tmp_path):
    average = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 100, "power": 0.75}
    with pytest.warns(UserWarning, match=r"unet/config\.json has fields .* ignored: decay, inv_gamma"):
        folder = change(copy, "unet/config.json", **average, sample_size=[8, 8])
        pretrained.save(tmp_path / "out", source=folder, parts={})
    written = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert not {*average} & {*written} and written["sample_size"] == 8


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"only_cross_attention": [True, False, False, False]}, "only_cross_attention = "),
        ("unet", {"num_attention_heads": 8}, r"num_attention_heads = 8 \(supported: None\)"),
        ("unet", {"time_cond_proj_dim": "256"}, r"time_cond_proj_dim = '256' \(supported: int"),
        ("unet", {"time_embedding_dim": 64}, "time_embedding_dim = 64"),
        ("unet", {"norm_num_groups": None}, r"norm_num_groups = None \(supported: int\)"),
        ("unet", {"layers_per_block": "2"}, r"layers_per_block = '2' \(supported: int \| tuple\)"),
        ("unet", {"block_out_channels": ["8", 16, 16, 16]}, "block_out_channels = "),
        ("unet", {"_class_name": "UNet3DConditionModel"}, r"unet/config\.json is of the class UNet3DConditionModel"),
        ("vae", {"_class_name": "AutoencoderTiny"}, r"vae/config\.json is of the class AutoencoderTiny"),
        ("vae", {"scaling_factor": None}, r"scaling_factor = None \(supported: float\)"),
        ("text_encoder", {"model_type": "t5"}, "is of a t5: flaxkd knows CLIP"),
    ],
)
def test_what_changes_the_network_is_refused(copy, part, changes, message):
    with pytest.raises(ValueError, match=message):
        change(copy, f"{part}/config.json", **changes).load(part)


def test_the_size_of_pictures_may_be_missing_or_oblong(copy):
    folder = change(copy, "unet/config.json", sample_size=[6, 8])
    assert folder.size == (24, 32) and folder.latent_shape(32) == (8, 8, 4)
    with pytest.raises(ValueError, match=r"24 x 32 pixels, and squares are asked for"):
        assert folder.resolution
    for nothing in (None, [6, 8, 8]):
        folder = change(copy, "unet/config.json", sample_size=nothing)
        assert folder.latent_shape(32) == (8, 8, 4)
        with pytest.raises(ValueError, match=r"unet/config\.json does not say how large .* --height and --width"):
            assert folder.size


def test_the_configuration_of_a_whole_clip(copy, tmp_path):
    text = json.loads((copy / "text_encoder" / "config.json").read_text())
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 512, "text_config_dict": None}
    text |= {"architectures": None, "quantization_config": {"quant_method": "fp8"}}
    whole |= {"text_config": text, "vision_config": {"hidden_size": 24, "num_hidden_layers": 1}}
    params = Folder.open(copy).params("text_encoder")
    (copy / "text_encoder" / "config.json").write_text(json.dumps(whole))
    path = weights(copy, "text_encoder")
    vision = {"vision_model.encoder.layers.0.fc1.bias": np.zeros(24), "logit_scale": np.ones(1)}
    save_file(load_file(path) | vision, path)
    folder = Folder.open(copy)
    assert same_trees(folder.params("text_encoder"), params)
    out = pretrained.save(tmp_path / "out", source=folder, parts={})
    written = json.loads((out / "text_encoder" / "config.json").read_text())
    assert written["hidden_size"] == text["hidden_size"] and written["architectures"] == ["CLIPTextModel"]
    assert not {"text_config", "quantization_config"} & {*written}
    assert not [key for key in load_file(weights(out, "text_encoder")) if not key.startswith("text_model.")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark(copy, tmp_path, encoding):
    before = tiny.ids(Folder.open(copy), ["red apple"])
    for path in sorted(copy.rglob("*.json")):
        path.write_text(path.read_text("utf-8"), encoding)
    folder = Folder.open(copy)
    assert np.array_equal(tiny.ids(folder, ["red apple"]), before) and folder.count("unet") > 0
    for path in pretrained.save(tmp_path / "out", source=folder, parts={}).rglob("*.json"):
        assert json.loads(path.read_text("utf-8")) is not None, path


@pytest.mark.parametrize("damage", [lambda text: text[:40], lambda text: "", lambda text: "[1, 2]"])
@pytest.mark.parametrize(
    "file",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)
def test_every_damaged_json_names_itself(copy, file, damage):
    path = copy / file
    path.write_text(damage(path.read_text()))
    folder = Folder.open(copy)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        assert folder.family and folder.config("scheduler") and folder.tokenizer


# -- Pipelines and tokenizers as people have them --------------------------------------------------------------------


@pytest.mark.parametrize("name", [["my_pipeline", "MyPipeline"], "DiffusionPipeline", "FlaxStableDiffusionPipeline"])
def test_a_pipeline_of_another_name_and_the_same_parts(copy, tmp_path, name):
    folder = change(copy, "model_index.json", _class_name=name)
    assert folder.family.title == "Stable Diffusion 1.x"
    out = pretrained.save(tmp_path / "out", source=folder, parts={})
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": ["mine", "Mine"], "controlnet": ["diffusers", "ControlNetModel"]}, "Mine of .*controlnet"),
        ({"_class_name": "AltDiffusionPipeline", "text_encoder": ["alt", "Roberta"]}, "AltDiffusionPipeline"),
        ({"_class_name": "FluxPipeline", "unet": None, "transformer": ["diffusers", "Flux"]}, "FluxPipeline .*transf"),
    ],
)  # fmt: skip
def test_a_pipeline_of_other_parts_is_named(copy, changes, named):
    with pytest.raises(ValueError, match=rf"is a {named}.*: flaxkd knows") as error:
        assert change(copy, "model_index.json", **changes).family
    assert "channels" not in str(error.value)


@pytest.mark.parametrize(
    "missing",
    [["tokenizer_config.json"], ["tokenizer_config.json", "tokenizer.json"],
     ["tokenizer_config.json", "vocab.json", "merges.txt"]],
    ids=" ".join,
)  # fmt: skip
def test_a_tokenizer_without_some_of_its_files(copy, tmp_path, missing):
    whole, prompts = Folder.open(copy), ["red apple", "grinning face, " * 9]
    for name in missing:
        (copy / "tokenizer" / name).unlink()
    folder = Folder.open(copy)
    assert folder.text_length == 16 and np.array_equal(tiny.ids(folder, prompts), tiny.ids(whole, prompts))
    out = Folder(pretrained.save(tmp_path / "out", source=folder, parts={}))
    written = {path.name for path in (out.path / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= written
    assert out.tokenizer.model_max_length == 16 and np.array_equal(tiny.ids(out, prompts), tiny.ids(whole, prompts))


def test_half_a_tokenizer_is_refused(copy):
    for name in ("tokenizer.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer has neither tokenizer\.json nor vocab\.json with merges"):
        assert Folder.open(copy).tokenizer


def test_weights_that_are_not_finite_name_part_and_tensor(copy):
    path = weights(copy, "vae")
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][1] = np.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"/vae has numbers that are NaN(.|\n)*decoder\.conv_out\.bias"):
        Folder.open(copy).load("vae")


def test_skipped_layers_of_the_text_encoder(copy, tmp_path):
    folder = Folder.open(copy, clip_skip=1)
    assert folder.module("text_encoder").config.num_hidden_layers == 1
    layers = folder.params("text_encoder")["text_model"]["encoder"]
    assert list(layers) == ["layers.0"]
    whole = Folder.open(copy).params("text_encoder")["text_model"]
    assert same_trees(layers["layers.0"], whole["encoder"]["layers.0"])
    out = Folder(pretrained.save(tmp_path / "out", source=folder, parts={}))
    assert out.config("text_encoder")["num_hidden_layers"] == 1
    assert "text_model.encoder.layers.1.mlp.fc1.bias" not in out.tensors("text_encoder")
    for n in (2, -1):
        with pytest.raises(ValueError, match=rf"clip_skip = {n}: .* has 2 layers, and 0 to 1 can be skipped"):
            Folder.open(copy, clip_skip=n)


def test_the_export_record_keeps_the_skipped_layers(copy, tmp_path):
    folder = Folder.open(copy, clip_skip=1)
    export.write_record(tmp_path, folder, {"unet": folder.config("unet")})
    parts, source = export.read_record(tmp_path)
    assert parts.keys() == {"unet"} and source.module("text_encoder").config.num_hidden_layers == 1
    export.write_record(tmp_path, Folder.open(copy), {"unet": folder.config("unet")})
    assert export.read_record(tmp_path)[1].configs == {}


@pytest.mark.parametrize(("written", "guidance"), [({}, 7.5), ({"_guidance_scale": 4}, 4.0)])
def test_a_folder_has_a_guidance(tiny_pipeline, tmp_path, written, guidance):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("_guidance_scale", None)
    (folder / "model_index.json").write_text(json.dumps(index | written))
    assert Folder(folder).guidance == guidance
    assert Folder(folder, drawn_with=3.0).replace({}, {}).guidance == 3.0
    export.write_record(tmp_path, Folder(folder, drawn_with=2.5), {})
    assert export.open_model(tmp_path).guidance == 2.5


def test_a_guidance_that_is_no_number_is_refused(tiny_pipeline, tmp_path):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    (folder / "model_index.json").write_text(json.dumps({"_guidance_scale": "high"}))
    with pytest.raises(ValueError, match="_guidance_scale = 'high' is no number"):
        _ = Folder(folder).guidance
