"""A text-to-image model becomes an inpainting one that draws as before."""

import json

import numpy as np
import pytest

from convert import to_inpainting
from flaxkd.pretrained import Folder


def test_five_channels_of_zeros_are_added(tiny_pipeline, tmp_path, capsys):
    to_inpainting.main(["--model", str(tiny_pipeline), "--out", str(tmp_path / "out")])
    assert "--config.teacher=" in capsys.readouterr().out
    source, made = Folder.open(tiny_pipeline), Folder.open(tmp_path / "out")
    assert made.pipeline == "StableDiffusionInpaintPipeline" and made.beside == ("masks", "masked_latents")
    kernel = made.params("unet")["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, :4], source.params("unet")["conv_in"]["kernel"])
    assert kernel.shape[2] == 9 and not kernel[:, :, 4:].any()
    index = json.loads((made.path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    with pytest.raises(ValueError, match="is an inpainting model already"):
        to_inpainting.widened(made)
