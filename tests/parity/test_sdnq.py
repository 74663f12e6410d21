"""diffusers computes with a folder of sdnq's what flaxkd computes with the same rounded weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from flaxkd.export import sdnq
from flaxkd.pretrained import Folder
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization


@pytest.mark.parametrize("scheme", ["w8", "w4", "fp8"])
def test_diffusers_loads_a_folder_as_any_other(tiny_pipeline, tmp_path, monkeypatch, scheme):
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")  # minutes, to compute the same
    pytest.importorskip("sdnq")
    folder = Folder.open(tiny_pipeline)
    out = sdnq.write(tmp_path / "out", folder, scheme)
    theirs = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    layers = quantize.layers(folder.shapes("unet"), Quantization(scheme))
    assert sum(hasattr(module, "sdnq_dequantizer") for module in theirs.modules()) == len(layers)

    unet, params = folder.load("unet")
    rng = np.random.default_rng(0)
    latents, states = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 16, 16), np.float32)
    rounded = {"params": quantize.on_grid(params, Quantization(scheme))}
    ours = jax.jit(unet.apply)(rounded, latents, jnp.full(2, 500.0), states)
    with torch.no_grad():
        said = theirs(torch.tensor(latents).permute(0, 3, 1, 2), 500, torch.tensor(states)).sample
    np.testing.assert_allclose(said.permute(0, 2, 3, 1).numpy(), ours, atol=2e-5)
