"""What a run exports is the averaged student, as diffusers sees it."""

import numpy as np
import pytest

from tests.running import EVERY, finish, state

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def test_the_export_loads_in_diffusers_with_the_averaged_weights(command, tmp_path):
    workdir = tmp_path / "run"
    finish(command(workdir, steps=EVERY))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(workdir / "diffusers", torch_dtype=torch.float32)
    assert pipeline.unet.config.mid_block_type is None and len(pipeline.unet.down_blocks) == 3
    kernel = state(workdir, EVERY)["ema"]["unet"]["conv_in"]["kernel"]
    weight = pipeline.unet.conv_in.weight.detach().numpy()
    np.testing.assert_array_equal(weight, np.asarray(kernel).transpose(3, 2, 0, 1).astype(np.float16))
