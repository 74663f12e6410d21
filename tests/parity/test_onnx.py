"""ONNX files compute what flaxkd computes, and draw what it draws. Skipped without what the extra `onnx` has."""

import importlib.util
import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from convert import to_onnx
from flaxkd import Pipeline
from flaxkd.export import integers, onnx
from flaxkd.pretrained import Folder
from flaxkd.pretrained.keys import to_diffusers
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization
from tests import tiny
from tests.running import ROOT


def test_a_missing_package_is_named_before_any_work(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(SystemExit, match=r'needs onnxscript: pip install "flaxkd\[onnx\]"'):
        to_onnx.main(["--model", str(tiny_pipeline), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="height = 33 pixels is no multiple of 4"):
        onnx.write(tmp_path / "out", Folder.open(tiny_pipeline), height=33)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ValueError, match="is not an earlier export to ONNX"):
        onnx.write(tmp_path / "used", Folder.open(tiny_pipeline))
    assert not (tmp_path / "out").exists()


def test_inputs_have_the_names_that_runtimes_know(tiny_pipeline, tiny_xl):
    found = onnx.networks(Folder.open(tiny_pipeline), height=64)
    assert [*found] == ["unet", "vae_encoder", "vae_decoder", "text_encoder"]
    assert found["unet"].inputs["sample"] == ("float32", (4, 16, 8))
    assert found["vae_decoder"].inputs == {"latent_sample": ("float32", (4, 16, 8))}
    assert found["text_encoder"].outputs == ["last_hidden_state", "pooler_output"]
    wide = Folder.open(tiny_pipeline).config("unet") | {"in_channels": 9}
    assert onnx.networks(Folder.open(tiny_pipeline).replace({"unet": wide}, {}))["unet"].inputs["sample"][1] == (
        9,
        8,
        8,
    )
    xl = onnx.networks(Folder.open(tiny_xl))
    assert xl["unet"].inputs["text_embeds"] == ("float32", (12,)) and xl["unet"].inputs["time_ids"] == ("float32", (6,))
    assert xl["text_encoder_2"].outputs == [
        "text_embeds",
        "last_hidden_state",
        *(f"hidden_states.{i}" for i in range(4)),
    ]


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def run(runtime, folder, name: str, **inputs) -> list[np.ndarray]:
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # 4 would round activations
    session = runtime.InferenceSession(folder / name / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def nchw(x) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))


def test_networks_equal_flaxkds_and_draw_its_pictures(tiny_pipeline, tmp_path, runtime):
    out, folder = tmp_path / "out", Folder.open(tiny_pipeline)
    to_onnx.main(["--model", str(tiny_pipeline), "--out", str(out), "--steps", "3", "--sampler", "euler_ancestral"])
    rng = np.random.default_rng(0)
    close = lambda found, expected: np.testing.assert_allclose(found, expected, atol=2e-5)

    ids = tiny.ids(folder, ["red apple", "", "grinning face"])
    encoder, params = folder.load("text_encoder")
    states = np.asarray(encoder.apply({"params": params}, ids))
    close(run(runtime, out, "text_encoder", input_ids=ids)[0], states)

    latents = rng.standard_normal((3, 8, 8, 4), np.float32)
    unet, params = folder.load("unet")
    expected = unet.apply({"params": params}, latents, jnp.full(3, 500.5), states)
    (found,) = run(
        runtime, out, "unet", sample=nchw(latents), timestep=np.float32([500.5]), encoder_hidden_states=states
    )
    close(found, nchw(expected))

    vae, params = folder.load("vae")
    images = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    moments = vae.apply({"params": params}, images, method="encode")
    close(run(runtime, out, "vae_encoder", sample=nchw(images))[0], nchw(moments[..., :4]))
    decoded = vae.apply({"params": params}, latents, method="decode")
    close(run(runtime, out, "vae_decoder", latent_sample=nchw(latents))[0], nchw(decoded))

    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "OnnxStableDiffusionPipeline" and index["unet"] == ["diffusers", "OnnxRuntimeModel"]

    _, loop, openvino = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text("utf-8"), re.DOTALL)
    exec(compile(loop, "docs/export.md", "exec"), names := {})
    draw = lambda: names["draw"](out, ["red apple", "green apple"], ["blue"] * 2, seed=3, guidance=2.0)
    ours = Pipeline.from_pretrained(tiny_pipeline, np.float32)(
        ["red apple", "green apple"], negative_prompt="blue", num_inference_steps=3, sampler="euler_ancestral", seed=3,
        guidance_scale=2.0, progress=False,
    )  # fmt: skip
    ours = np.stack([np.asarray(x, np.int16) for x in ours])
    assert np.abs(draw() - ours).max() <= 1 and ours.std() > 5
    if importlib.util.find_spec("openvino"):
        exec(compile(openvino, "docs/export.md", "exec"), names)
        session = lambda file, _: names["Session"](file)
        names["onnxruntime"] = SimpleNamespace(SessionOptions=runtime.SessionOptions, InferenceSession=session)
        assert np.abs(draw() - ours).max() <= 1


def test_stable_diffusion_xl(tiny_xl, tmp_path, runtime):
    out, folder = tmp_path / "out", Folder.open(tiny_xl)
    onnx.write(out, folder)
    prompt = folder.conditions(["red apple", "green apple"], (32, 32))
    modules, params = zip(*(folder.load(part) for part in folder.parts), strict=True)
    modules, params = (dict(zip(folder.parts, each, strict=True)) for each in (modules, params))
    states = {name: np.asarray(x) for name, x in folder.family.condition(modules, params, prompt).items()}
    pooled, _, *layers = run(runtime, out, "text_encoder_2", input_ids=prompt["input_ids_2"])
    np.testing.assert_allclose(pooled, states["text_embeds"], atol=2e-5)
    np.testing.assert_allclose(layers[-2], states["encoder_hidden_states"][..., 16:], atol=2e-5)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    expected = modules["unet"].apply({"params": params["unet"]}, latents, jnp.full(2, 7.0), **states)
    states["time_ids"] = states["time_ids"].astype(np.float32)
    (found,) = run(runtime, out, "unet", sample=nchw(latents), timestep=np.float32([7]), **states)
    np.testing.assert_allclose(found, nchw(expected), atol=2e-5)


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_a_quantized_unet_holds_qwixs_integers_and_computes_what_flaxkd_does(tiny_pipeline, tmp_path, runtime, scheme):
    import onnx as reader

    out, folder = tmp_path / "out", Folder.open(tiny_pipeline)
    how = Quantization(scheme)
    layers = quantize.layers(folder.shapes("unet"), how)
    assert (32 in layers.values()) == (scheme == "w4")
    onnx.write(out, folder, scheme=scheme)

    graph = reader.load(out / "unet" / "model.onnx").graph
    made = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    assert len(made) == len(layers)
    held = {each.name: reader.numpy_helper.to_array(each) for each in graph.initializer}
    for path, rounded in quantize.integers(folder.stored("unet"), how):
        name, expected = to_diffusers((*path, "kernel"), np.asarray(rounded.qvalue))
        values, _ = made[f"module.{name}"].input
        assert np.array_equal(held[values].astype(np.int8), expected.astype(np.int8)) and f"module.{name}" not in held

    rng = np.random.default_rng(0)
    latents, states = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 16, 16), np.float32)
    unet, params = folder.load("unet")
    said = lambda params: nchw(unet.apply({"params": params}, latents, jnp.full(2, 500.0), states))
    (found,) = run(runtime, out, "unet", sample=nchw(latents), timestep=np.float32([500]), encoder_hidden_states=states)
    np.testing.assert_allclose(found, said(quantize.on_grid(params, how)), atol=2e-5)
    assert np.abs(said(params) - found).max() > 1e-3


def test_a_unet_is_written_as_it_was_trained(tiny_pipeline):
    folder = Folder.open(tiny_pipeline)
    assert integers.weights(folder, None) == {}
    names = integers.weights(folder.as_quantized(Quantization("w8", full=("conv_in",))), None)
    assert "conv_out.weight" in names and "conv_in.weight" not in names
    assert names["conv_out.weight"].values.shape == (4, 8, 3, 3) and names["conv_out.weight"].scales.shape == (4,)
    assert integers.weights(folder.as_quantized(Quantization("w8", on_grid=True)), None) == {}
    with pytest.raises(ValueError, match="rounded already, by w8"):
        integers.weights(folder.as_quantized(Quantization("w8", on_grid=True)), "w8")
    with pytest.raises(ValueError, match="--quantize w4: this UNet was trained to be rounded by w8"):
        integers.weights(folder.as_quantized(Quantization("w8")), "w4")
