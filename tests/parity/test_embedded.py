"""The teacher in the package is a pipeline for diffusers."""

import pytest

from flaxkd.pretrained import hub

diffusers = pytest.importorskip("diffusers")

FOLDER = hub.EMBEDDED


def test_diffusers_loads_and_draws_without_being_told_a_dtype():
    """The weights are stored in half precision; networks of two precisions would not fit together."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert len({part.dtype for part in parts}) == 1
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("blue heart", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and image.std() > 0.01
