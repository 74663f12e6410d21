"""diffusers computes with a GGUF file what flaxkd computes with the same rounded weights."""

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import GGUFQuantizationConfig, UNet2DConditionModel

from flaxkd.export import gguf
from flaxkd.pretrained import Folder, keys, ldm
from tests import tiny

WIDE = {"block_out_channels": (32,) * 4, "cross_attention_dim": 32, "layers_per_block": 1}  # rows of whole blocks


def test_diffusers_reads_a_file(tmp_path):
    text = tiny.SD["text_encoder"] | {"hidden_size": 32}
    source = tiny.write(tmp_path / "wide", tiny.SD | {"unet": tiny.SD["unet"] | WIDE, "text_encoder": text})
    held, _ = gguf.write(tmp_path / "wide.gguf", Folder.open(source), "Q4_0")
    assert held["Q4_0"].tensors > 20

    begin, folder, found = "model.diffusion_model.", Folder.open(source), {}
    for tensor in package.GGUFReader(tmp_path / "wide.gguf").tensors:
        x = package.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = np.asarray(x, np.float32).reshape(tensor.shape[::-1])
    found = {name.removeprefix(begin): x for name, x in found.items() if name.startswith(begin)}
    params = keys.from_tensors(ldm.to_diffusers("unet", found), folder.shapes("unet"), "the file")
    rng = np.random.default_rng(0)
    latents, states = (rng.standard_normal(shape, np.float32) for shape in ((2, 8, 8, 4), (2, 16, 32)))
    ours = jax.jit(folder.module("unet").apply)({"params": params}, latents, jnp.full(2, 500), states)

    theirs = UNet2DConditionModel.from_single_file(
        str(tmp_path / "wide.gguf"),
        config=str(source),
        subfolder="unet",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    with torch.no_grad():
        made = theirs(torch.tensor(latents).permute(0, 3, 1, 2), torch.full((2,), 500), torch.tensor(states)).sample
    # diffusers multiplies a block's scale and integers in float16; the rounding to four bits moves the output by 0.1.
    np.testing.assert_allclose(made.permute(0, 2, 3, 1).numpy(), ours, atol=5e-4)
