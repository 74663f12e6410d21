"""What a call of the pipeline changes in its networks."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flaxkd import Pipeline
from flaxkd.pretrained import Folder, lora_writing
from flaxkd.weights import lora


def test_skipped_layers_change_the_text_encoder_of_that_call_alone(tiny_pipeline):
    pipeline, folder = Pipeline.from_pretrained(tiny_pipeline, np.float32), Folder.open(tiny_pipeline, clip_skip=1)
    ids = folder.tokenize(["red apple", ""])
    states = lambda modules, params: folder.family.condition(modules, params, ids)["encoder_hidden_states"]
    skipped = pipeline._skip_layers(1)
    module, params = folder.load("text_encoder")
    expected = states({"text_encoder": module}, {"text_encoder": params})
    np.testing.assert_array_equal(states(skipped.modules, skipped.params), expected)
    whole = states(pipeline.modules, pipeline.params)
    assert np.abs(whole - expected).max() > 0.1 and pipeline._skip_layers(None) is pipeline
    with pytest.raises(ValueError, match=r"clip_skip = 2: .* has 2 layers, and 0 to 1 can be skipped"):
        pipeline("red apple", clip_skip=2, num_inference_steps=1)


def test_lora_files_are_merged_replaced_and_unloaded(tiny_pipeline, tmp_path):
    folder = Folder.open(tiny_pipeline)
    new = {part: lora.layers(lora.init(folder.shapes(part), "attention", 2, 0)) for part in ("unet", "text_encoder")}
    parts = {part: lora.tree({m: (a, b + 1) for m, (a, b) in pairs.items()}) for part, pairs in new.items()}
    file = lora_writing.write(tmp_path / "toy.safetensors", parts, "kohya", {})
    module = ("text_model", "encoder", "layers.0", "self_attn", "q_proj")
    kernel = lambda p: np.asarray(flatten_dict(p.params["text_encoder"])[*module, "kernel"])
    change = lora.delta(*lora.layers(parts["text_encoder"])[module])

    base = Pipeline.from_pretrained(tiny_pipeline, np.float32)
    with_it = Pipeline.from_pretrained(tiny_pipeline, np.float32, lora=[f"{file}:0.5"])
    assert with_it.name == f"{tiny_pipeline} + toy.safetensors:0.5"
    np.testing.assert_allclose(kernel(with_it) - kernel(base), 0.5 * change, atol=1e-6)
    twice = with_it.with_lora(file, f"{file}:0.25")  # in place of the one it has
    assert twice.name == f"{tiny_pipeline} + toy.safetensors + toy.safetensors:0.25"
    np.testing.assert_allclose(kernel(twice) - kernel(base), 1.25 * change, atol=1e-6)
    unloaded = twice.with_lora()
    assert unloaded.name == base.name
    for part in ("unet", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, unloaded.params[part], base.params[part])
