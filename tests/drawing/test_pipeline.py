"""What a call of the pipeline changes in its networks."""

import numpy as np
import pytest

from flaxkd import Pipeline
from flaxkd.pretrained import Folder


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
