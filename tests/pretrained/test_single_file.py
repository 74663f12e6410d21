"""Single files as on civitai: read, or refused by name."""

import json
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import to_inpainting
from flaxkd import export, pretrained, students
from flaxkd.data import encoding
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.export import single_file as writer
from flaxkd.pretrained import ARCHITECTURES, FAMILIES, Folder, ldm, single_file, tensors
from tests import tiny
from tests.pretrained import full_size


@pytest.fixture(scope="module")
def file(tiny_pipeline, tmp_path_factory):
    """A tiny Stable Diffusion 1.x in one file, as flaxkd writes it."""
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    writer.write(path, Folder(tiny_pipeline))
    return path


def rewrite(file, out, change=lambda tensors: tensors, header=lambda header: header):
    """The file with other tensors or another header."""
    _, metadata = tensors.header(file)
    save_file({k: np.ascontiguousarray(x) for k, x in change(load_file(file)).items()}, out, metadata=header(metadata))
    return out


def same(a: Folder, b: Folder, parts=pretrained.FAMILIES["sd1"].parts) -> bool:
    equal = lambda x, y: x.dtype == y.dtype and np.array_equal(x, y)
    return all(jax.tree.all(jax.tree.map(equal, a.stored(part), b.stored(part))) for part in parts)


def test_a_whole_pipeline_is_in_one_file(file, tiny_pipeline, tmp_path):
    folder, whole = Folder.open(file), Folder(tiny_pipeline)
    assert same(folder, whole) and folder.family is whole.family and folder.path == file
    assert np.array_equal(tiny.ids(folder, tiny.CAPTIONS), tiny.ids(whole, tiny.CAPTIONS))
    assert Pipeline.from_pretrained(file).scheduler_config == whole.config("scheduler")
    back = Folder.open(pretrained.save(tmp_path / "back", source=folder, parts={}))
    assert same(back, whole) and np.array_equal(tiny.ids(back, tiny.CAPTIONS), tiny.ids(whole, tiny.CAPTIONS))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_else_such_files_hold_changes_nothing(file, tmp_path, dtype):
    def change(found):
        found = {key: x.astype(dtype) for key, x in found.items()}
        found |= {f"model_ema.{key.replace('.', '')}": x for key, x in found.items() if "conv_in" in key}
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(16)[None]
        found["cond_stage_model.logit_scale"] = np.float32(4.6).reshape(1)
        found |= {"first_stage_model.loss.logvar": np.zeros(1), "model_ema.num_updates": np.zeros(1, np.int32)}
        return found | {"alphas_cumprod": np.zeros(1000), "betas": np.zeros(1000), "global_step": np.array(840000)}

    folder = Folder.open(rewrite(file, tmp_path / "much.safetensors", change))
    assert all(x.dtype == dtype for part in folder.parts for x in jax.tree.leaves(folder.stored(part)))
    wanted = jax.tree.map(lambda x: x.astype(dtype), Folder.open(file).stored("unet"))
    assert jax.tree.all(jax.tree.map(np.array_equal, folder.stored("unet"), wanted))


@pytest.mark.parametrize("gaps", [False, True])
def test_a_student_without_a_header_is_read_from_its_tensors(monkeypatch, tmp_path, gaps):
    """Of full size, since narrower networks have other numbers of groups and heads."""
    vae, text = full_size.tensors("vae", "sd15"), full_size.tensors("text_encoder", "sd15")
    for student in (None, "sd_small", "bk_small", "sd_tiny"):
        config, unet = full_size.unet("sd15", student)
        found = ldm.to_ldm("unet", unet, gaps=gaps) | ldm.to_ldm("vae", vae) | ldm.to_ldm("text_encoder", text)
        monkeypatch.setattr(tensors, "header", lambda path, found=found: (found, {}))
        configs, _ = single_file.read(tmp_path / "model.safetensors")
        assert pretrained.PARTS["unet"].config.from_dict(configs["unet"]) == (
            pretrained.PARTS["unet"].config.from_dict(config)
        )
        assert (
            configs["vae"] == ARCHITECTURES["sd15"].configs["vae"]
            and configs["scheduler"]["prediction_type"] == "epsilon"
        )
        assert configs["text_encoder"] == ARCHITECTURES["sd15"].configs["text_encoder"]
    assert configs["unet"]["mid_block_type"] is None and configs["unet"]["layers_per_block"] == 1


@pytest.mark.parametrize(
    ("header", "step", "yaml", "row"),
    [
        ({}, 0, None, "sd21"),
        ({}, 875000, None, "sd21_base"),
        ({"modelspec.prediction_type": "epsilon"}, 0, None, "sd21_base"),
        ({"modelspec.prediction_type": "v"}, 875000, None, "sd21"),
        ({}, 0, "model: {params: {}}", "sd21_base"),
        ({}, 0, 'parameterization: "v"', "sd21"),
    ],
)
def test_what_a_stable_diffusion_2_predicts(file, tmp_path, monkeypatch, header, step, yaml, row):
    path = tmp_path / "model.safetensors"
    save_file({"global_step": np.array(step)}, path)
    if yaml is not None:
        path.with_suffix(".yaml").write_text(yaml)
    found = ldm.to_ldm("unet", full_size.unet("sd21", None)[1])
    found |= ldm.to_ldm("vae", full_size.tensors("vae", "sd21"))
    text = full_size.tensors("text_encoder", "sd21")
    last = {k.replace(".22.", ".23."): x for k, x in text.items() if ".22." in k}  # not used, but in the files
    found |= ldm.to_ldm("text_encoder", text | last, prefix=ldm.OPEN_CLIP)
    found |= {"cond_stage_model.model.text_projection": full_size.hollow((1024, 1024)), "global_step": np.array(step)}
    monkeypatch.setattr(tensors, "header", lambda path: (found, header))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        configs, readers = single_file.read(path)
    assert {part: configs[part] for part in ("unet", "vae", "text_encoder", "scheduler")} == {
        part: ARCHITECTURES[row].configs[part] for part in ("unet", "vae", "text_encoder", "scheduler")
    }
    assert [str(x.message) for x in said if "prediction_type=epsilon" in str(x.message)] == (
        [str(said[0].message)] if not header and not step and yaml is None else []
    )
    assert readers["tokenizer"]()("a photo of a cat", padding="max_length")["input_ids"][:8] == [
        *(49406, 320, 1125, 539, 320, 2368, 49407), 0,
    ]  # fmt: skip


@pytest.mark.parametrize("student", [None, "ssd_1b", "vega", "koala_1b", "koala_700m"])
def test_an_sdxl_without_a_header_is_read_from_its_tensors(monkeypatch, tmp_path, student):
    parts = {part: full_size.tensors(part, "sdxl") for part in ("vae", "text_encoder", "text_encoder_2")}
    config, parts["unet"] = full_size.unet("sdxl", student)
    prefixes, found = FAMILIES["sdxl"].single_file, {}
    for part, named in parts.items():
        found |= ldm.to_ldm(part, named, prefix=prefixes.get(part))
    monkeypatch.setattr(tensors, "header", lambda path: (found, {}))
    configs, readers = single_file.read(tmp_path / "model.safetensors")
    made, wanted = (pretrained.PARTS["unet"].config.from_dict(c) for c in (configs["unet"], config))
    assert (made.down, made.mid, made.up) == (wanted.down, wanted.mid, wanted.up)
    published = ARCHITECTURES["sdxl"].configs
    assert student or configs["unet"] == published["unet"]
    same = ("vae", "text_encoder", "text_encoder_2", "scheduler")
    assert {part: configs[part] for part in same} == {part: published[part] for part in same}
    assert configs["model_index"]["_class_name"] == "StableDiffusionXLPipeline"
    ids = [readers[name]()("a cat", padding="max_length")["input_ids"] for name in ("tokenizer", "tokenizer_2")]
    assert [row[:4] for row in ids] == [[49406, 320, 2368, 49407]] * 2 and [row[-1] for row in ids] == [49407, 0]
    found |= {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}  # marks of models trained for it
    scheduler = single_file.read(tmp_path / "model.safetensors")[0]["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]


def test_an_sdxl_is_in_one_file(tiny_xl, tmp_path):
    whole, file = Folder(tiny_xl), tmp_path / "xl.safetensors"
    assert writer.write(file, whole) == []  # no program knows one of its widths
    folder = Folder.open(file)
    assert folder.family is whole.family and same(folder, whole, whole.parts) and folder.zeros
    ids = [each.tokenize(["red apple"]) for each in (folder, whole)]
    assert all(np.array_equal(ids[0][field], ids[1][field]) for field in ("input_ids", "input_ids_2"))


def test_an_autoencoder_alone_is_scaled_as_the_one_it_replaces(monkeypatch, tiny_pipeline, tmp_path):
    """SDXL's and SD 1.x's have the same tensors."""
    save_file({"x": np.zeros(1)}, tmp_path / "vae.safetensors")
    monkeypatch.setattr(tensors, "header", lambda path: (ldm.to_ldm("vae", full_size.tensors("vae", "sdxl")), {}))
    scaling = {"scaling_factor": 0.13025, "force_upcast": True}
    assert single_file.read_vae(tmp_path / "vae.safetensors", {})[0]["scaling_factor"] == 0.18215
    config, _ = single_file.read_vae(tmp_path / "vae.safetensors", scaling)
    assert {name: config[name] for name in scaling} == scaling
    own = Folder(tiny_pipeline).scaling_factor
    assert Folder.open(tiny_pipeline, tmp_path / "vae.safetensors").scaling_factor == own


def test_the_tokenizer_of_clip_needs_no_file(file, tmp_path):
    from flaxkd.pretrained import clip_tokenizer

    tokenizer = clip_tokenizer.make(**clip_tokenizer.options(open_clip=False))
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    ids = tokenizer("A photo, of a cat's 12", padding="max_length", max_length=77)["input_ids"]
    assert ids[:11] == [49406, 320, 1125, 267, 539, 320, 2368, 568, 272, 273, 49407] and set(ids[11:]) == {49407}
    bare = rewrite(file, tmp_path / "bare.safetensors", header=lambda h: {
        "flaxkd": json.dumps({k: x for k, x in json.loads(h["flaxkd"]).items() if k != "tokenizer"})})  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"tokenizer has neither tokenizer\.json nor"):
        _ = Folder.open(bare).tokenizer
    pretrained.writing.write_tokenizer(Folder.open(file), tmp_path)
    assert np.array_equal(tiny.ids(Folder.open(bare), tiny.CAPTIONS), tiny.ids(Folder.open(file), tiny.CAPTIONS))
    pretrained.save(tmp_path / "back", source=Folder.open(bare), parts={})
    assert Folder(tmp_path / "back").text_length == 16


def without(*prefixes):
    return lambda found: {key: x for key, x in found.items() if not key.startswith(prefixes)}


def only(prefix, cut=True):
    return lambda found: {
        key.removeprefix(prefix) if cut else key: x for key, x in found.items() if key.startswith(prefix)
    }


def channels(n):
    return lambda found: found | {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((8, n, 3, 3), np.float32)}


def test_an_inpainting_model_is_one_too(tiny_pipeline, tmp_path):
    source = Folder(tiny_pipeline)
    config, params = to_inpainting.widened(source)
    writer.write(tmp_path / "file.safetensors", source.replace({"unet": config}, {"unet": lambda: params}))
    folder = Folder.open(tmp_path / "file.safetensors")
    assert folder.family is FAMILIES["sd1"] and folder.pipeline == "StableDiffusionInpaintPipeline"
    assert folder.stored("unet")["conv_in"]["kernel"].shape == (3, 3, 9, 8)


def added(*keys):
    return lambda found: found | {key: np.zeros((1, 1), np.float32) for key in keys}


def instead(*keys):
    return lambda found: {key: np.zeros((1, 1), np.float32) for key in keys}


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
REFUSED = {
    "depth": (channels(5), r"takes 5 channels \(from a depth map\)"),
    "instruct": (channels(8), r"takes 8 channels \(InstructPix2Pix\)"),
    "two text encoders": (added("conditioner.embedders.1.model.ln_final.weight"), "is SDXL's refiner, or another"),
    "unclip": (added(f"{UNET}label_emb.0.0.weight"), "is SDXL's refiner, or another model that takes more than a cap"),
    "edm": (added("edm_mean"), "a model such as Playground 2.5"),
    "lora": (instead("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "a LoRA"),
    "peft": (instead("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"), "a LoRA"),
    "controlnet": (instead("control_model.input_hint_block.0.weight"), "a ControlNet"),
    "textual inversion": (instead("emb_params"), "a textual inversion"),
    "sd3": (instead(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"), "a transformer such as SD3 or Flux"),
    "vae": (only(VAE), "an autoencoder alone: give it as --vae"),
    "vae with its prefix": (only(VAE, cut=False), "an autoencoder alone: give it as --vae"),
    "unet": (only(UNET), "a UNet alone"),
    "unet with its prefix": (only(UNET, cut=False), "a UNet alone"),
    "text encoder": (only(f"{TEXT}transformer."), "a text encoder alone"),
    "no text encoder": (without(TEXT), "without a text encoder"),
    "no unet": (without(UNET), "without a UNet"),
    "no vae": (without(VAE), r"holds no autoencoder: give one with --vae"),
    "something": (instead("model.0.weight"), r"no checkpoint by LDM's names \(its first tensors: model\.0\.weight\)"),
    "nothing": (instead(), "no checkpoint by LDM's names"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(file, tmp_path, name):
    change, said = REFUSED[name]
    path = rewrite(file, tmp_path / "other.safetensors", change, lambda header: {"format": "pt"})
    with pytest.raises(ValueError, match=said) as error:
        Folder.open(path)
    assert str(path) in str(error.value) and (
        "Stable Diffusion 1.x, 2.x and XL" in str(error.value) or name == "no vae"
    )


def test_a_network_of_unusual_width_says_what_would_help(file, tmp_path):
    path = rewrite(file, tmp_path / "tiny.safetensors", header=lambda header: {})
    with pytest.raises(ValueError, match=r"does not follow from its tensors: a width of 8 channels") as error:
        Folder.open(path)
    assert f'from_single_file("{path}"' in str(error.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.pth", "model.pkl"])
def test_pickles_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\3\4 a pickle")
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*as it can run code") as error:
        Folder.open(tmp_path / name)
    assert f'from_single_file("{tmp_path / name}"' in str(error.value)
    (tmp_path / "renamed.safetensors").write_bytes(b"PK\3\4 a pickle in a zip archive")
    with pytest.raises(ValueError, match=r"renamed\.safetensors is a pickle by another name"):
        Folder.open(tmp_path / "renamed.safetensors")


@pytest.mark.parametrize("shape", [(), (0,), (4,), (3, 3, 3)])
def test_tensors_of_odd_shapes_are_told(tmp_path, shape):
    names = [f"{UNET}input_blocks.0.0.weight", f"{UNET}input_blocks.1.0.out_layers.3.weight"]
    names += [f"{TEXT}model.token_embedding.weight", f"{TEXT}model.transformer.resblocks.0.attn.in_proj_weight"]
    names += [
        f"{VAE}decoder.conv_in.weight",
        f"{VAE}encoder.mid.attn_1.q.weight",
        f"{UNET}input_blocks.1.1.proj_in.weight",
    ]
    save_file({name: np.zeros(shape, np.float32) for name in names}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"configuration of .*odd\.safetensors does not follow from its tensors"):
        Folder.open(tmp_path / "odd.safetensors")
    save_file({name: np.zeros(1) for name in names}, tmp_path / "odd.safetensors", metadata={"flaxkd": "[1"})
    with pytest.raises(ValueError, match=r"odd\.safetensors has damaged configurations in its header"):
        Folder.open(tmp_path / "odd.safetensors")


def test_files_that_are_no_models(file, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read: .* downloaded whole"):
        Folder.open(path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"model\.gguf is no model: give a pipeline folder"):
        Folder.open(tmp_path / "model.gguf")
    for absent in (tmp_path / "gone.safetensors", "gone.safetensors", "nowhere/of/gone.ckpt"):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*gone"):
            Folder.open(absent)


def test_another_autoencoder(file, tiny_pipeline, tmp_path):
    other = tiny.weights(pretrained.shapes("vae", Folder(tiny_pipeline).config("vae")), 9)
    config = Folder(tiny_pipeline).config("vae") | {"scaling_factor": 0.5}
    pipeline = pretrained.save(tmp_path / "pipeline", source=Folder(tiny_pipeline), parts={"vae": (config, other)})
    writer.write(tmp_path / "whole.safetensors", Folder(pipeline))
    rewrite(tmp_path / "whole.safetensors", tmp_path / "alone.safetensors", only(VAE))
    none = rewrite(file, tmp_path / "none.safetensors", without(VAE), lambda header: {
        "flaxkd": json.dumps({k: x for k, x in json.loads(header["flaxkd"]).items() if k != "vae"})})  # fmt: skip
    for model in (tiny_pipeline, file, none):
        weights = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
        for vae in (
            pipeline,
            pipeline / "vae",
            weights,
            tmp_path / "whole.safetensors",
            tmp_path / "alone.safetensors",
        ):
            folder = Folder.open(model, vae)
            assert folder.scaling_factor == 0.5 and same(folder, Folder(pipeline), ("vae",)) and folder.vae == str(vae)
            assert same(folder, Folder(tiny_pipeline), ("unet", "text_encoder"))
    prints = [encoding.fingerprint(Folder.open(m, v)) for m in (tiny_pipeline, file) for v in (None, pipeline)]
    assert len({*prints}) == 4 and prints[3] == encoding.fingerprint(Folder.open(file, tmp_path / "whole.safetensors"))
    export.write_record(tmp_path, Folder.open(none, tmp_path / "alone.safetensors"), {"unet": {}})
    _, source = export.read_record(tmp_path)
    assert (source.path, source.vae) == (none, str(tmp_path / "alone.safetensors")) and source.scaling_factor == 0.5
    assert export.read_record(tmp_path, vae=tiny_pipeline)[1].scaling_factor == Folder(tiny_pipeline).scaling_factor
    with pytest.raises(FileNotFoundError, match=r"no config\.json and no vae/config\.json"):
        Folder.open(file, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        Folder.open(file, tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no autoencoder of Stable Diffusion"):
        Folder.open(file, none)
    with pytest.raises(ValueError, match="is a pickle"):
        (tmp_path / "vae.pt").write_bytes(b"PK")
        Folder.open(file, tmp_path / "vae.pt")


def test_who_reads_which_student():
    for name, gaps, able in (
        (None, False, ["comfyui", "a1111", "sd.cpp"]),
        ("sd_small", False, ["comfyui"]),
        ("bk_small", False, ["comfyui"]),
        ("sd_tiny", False, ["comfyui"]),
        ("sd_tiny", True, ["sd.cpp"]),
        ("sd_small", True, []),
    ):
        for row in (ARCHITECTURES["sd15"], ARCHITECTURES["sd21"]):
            config = students.config(students.get(name), row.unet) if name else row.unet
            assert writer.readers(config, gaps) == able
    assert writer.readers(ARCHITECTURES["sd15"].unet | {"block_out_channels": [32, 64, 64, 64]}) == []
    sdxl = ARCHITECTURES["sdxl"].unet
    assert writer.readers(sdxl) == ["comfyui", "a1111", "sd.cpp"]
    for name in ("ssd_1b", "vega", "koala_1b", "koala_700m", "bk_sdxl_base", "bk_sdxl_small"):
        able = [] if name.startswith("bk") else ["comfyui", *["sd.cpp"] * (name in ("ssd_1b", "vega"))]
        assert writer.readers(students.config(students.get(name), sdxl)) == able, name


def test_a_program_that_cannot_build_the_unet_is_named(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"stable-diffusion\.cpp has no UNet like this one; it is read by: none"):
        writer.write(tmp_path / "a.safetensors", Folder(tiny_pipeline), program="sd.cpp")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        writer.write(tmp_path / "a.ckpt", Folder(tiny_pipeline))
    assert not list(tmp_path.iterdir())
