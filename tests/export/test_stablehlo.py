"""Exported programs draw what flaxkd draws, by the loader in the documents, which has no flaxkd."""

import ast
import json
import re

import jax
import numpy as np
import pytest

from convert import to_stablehlo
from flaxkd import Pipeline
from flaxkd.export import stablehlo
from flaxkd.models import attention
from flaxkd.pretrained import Folder
from tests.running import ROOT

PROMPTS = ["red apple", "green apple"]


@pytest.fixture(scope="module")
def draw():
    page = (ROOT / "docs" / "export.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    tree = ast.parse(code)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    names = (getattr(node, "module", None) or node.names[0].name for node in tree.body if node is not function)
    assert {name.split(".")[0] for name in names} == {"json", "pathlib", "jax", "numpy", "safetensors", "tokenizers"}
    assert function.end_lineno - function.lineno <= 22
    exec(compile(code, "docs/export.md", "exec"), names := {})
    return names["draw"]


def about(out) -> dict:
    return json.loads((out / stablehlo.SPEC).read_text())


def same_pictures(found: np.ndarray, expected: list) -> None:
    expected = np.stack([np.asarray(x, np.int16) for x in expected])
    assert np.abs(found - expected).max() <= 1 and expected.std() > 5


@pytest.mark.slow
def test_the_loader_draws_what_the_pipeline_draws(tiny_pipeline, tmp_path, draw, capsys):
    out = tmp_path / "out"
    flags = ["--steps", "2", "--sampler", "lcm", "--height", "40", "--width", "24", "--guidance", "1.5"]
    to_stablehlo.main(["--model", str(tiny_pipeline), "--out", str(out), *flags])
    assert "text_to_image.jax_export" in capsys.readouterr().out
    expected = Pipeline.from_pretrained(tiny_pipeline, np.float32)(
        PROMPTS, negative_prompt="blue", num_inference_steps=2, sampler="lcm", seed=7, guidance_scale=1.5, height=40,
        width=24, progress=False,
    )  # fmt: skip
    same_pictures(draw(out, PROMPTS, ["blue"] * 2, seed=7), expected)
    fixed = about(out)
    assert (fixed["steps"], fixed["sampler"], fixed["height"], fixed["jax"]) == (2, "lcm", 40, jax.__version__)
    assert fixed["programs"]["text_to_image"]["inputs"]["noise"] == "float32[b, 2, 10, 6, 4]"
    assert fixed["programs"]["decode"]["outputs"] == "float32[b, 40, 24, 3]"
    assert fixed["programs"]["unet"]["inputs"]["encoder_hidden_states"] == "float32[b, 16, 16]"
    loop = jax.export.deserialize(bytearray((out / "text_to_image.jax_export").read_bytes()))
    assert loop.platforms == ("cpu", "cuda", "tpu")


def test_without_guidance_there_is_no_negative_prompt(tiny_pipeline):
    found = lambda guidance: stablehlo.programs(Folder.open(tiny_pipeline), stablehlo.Settings(guidance=guidance), None)
    programs, defaults, _ = found(1.0)
    assert {*programs["text_to_image"].inputs} == {*defaults, "latents"} == {"input_ids", "latents"}
    programs, defaults, fixed = found(None)
    assert {*programs["text_to_image"].inputs} - {"input_ids", "latents"} == {"negative_input_ids", "guidance"}
    assert defaults["guidance"] == 7.5 and fixed["steps"] == 25


def test_stable_diffusion_xl_takes_two_texts_and_a_size_and_few_steps_their_guidance(tiny_xl):
    folder, (b,) = Folder.open(tiny_xl), jax.export.symbolic_shape("b")
    _, defaults, _ = stablehlo.programs(folder, stablehlo.Settings(), np.float32)
    assert defaults["negative_input_ids_2"] == [-1] * 16 and defaults["time_ids"] == [32, 32, 0, 0, 32, 32]
    few = {"unet": folder.config("unet") | {"time_cond_proj_dim": 8}}
    folder = folder.replace(few, {})
    programs, defaults, _ = stablehlo.programs(folder, stablehlo.Settings(sampler="lcm"), np.float32)
    assert {*defaults} == {"input_ids", "input_ids_2", "time_ids", "guidance"}
    states = {"encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"}
    assert {*programs["unet"].inputs} == {"latents", "timesteps"} | states
    loop = programs["text_to_image"]
    assert {*loop.inputs} == {*defaults, "latents", "noise"}
    inputs = {name: jax.ShapeDtypeStruct((b, *x.shape), x.dtype) for name, x in loop.inputs.items()}
    made = jax.eval_shape(loop.function, {part: folder.shapes(part) for part in loop.parts}, inputs)
    assert made.shape == (b, 32, 32, 3)


def test_attention_has_the_form_of_its_platform(monkeypatch):
    monkeypatch.setattr(attention, "LONG", 64)
    b, anywhere = jax.export.symbolic_shape("b")[0], stablehlo.AttentionAnywhere()
    q, k = (jax.ShapeDtypeStruct((b, n, 2, 4), np.float32) for n in (16, 8))
    made = jax.export.export(jax.jit(anywhere), platforms=stablehlo.PLATFORMS)(q, k, k)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, n, 2, 4), np.float32) for n in (16, 8, 8))
    np.testing.assert_allclose(made.call(q, k, v), attention.plain(q, k, v), atol=1e-6)
    lowered = lambda platform: jax.export.export(jax.jit(anywhere), platforms=[platform])(q, k, v).mlir_module()
    assert "stablehlo.while" in lowered("cpu") and "stablehlo.while" not in lowered("cuda")


def test_what_cannot_be_exported_is_refused_before_any_compute(tiny_pipeline, tmp_path):
    folder = Folder.open(tiny_pipeline)
    (tmp_path / "used" / "file").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"is not an earlier export to programs\.json"):
        stablehlo.write(tmp_path / "used", folder)
    wide = folder.replace({"unet": folder.config("unet") | {"in_channels": 9}}, {})
    with pytest.raises(ValueError, match="is an inpainting model"):
        stablehlo.write(tmp_path / "out", wide)
    with pytest.raises(ValueError, match="width = 33 pixels is no multiple of 4"):
        stablehlo.write(tmp_path / "out", folder, stablehlo.Settings(width=33))
    assert not (tmp_path / "out").exists()
