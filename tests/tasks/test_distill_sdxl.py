"""The distillation task on Stable Diffusion XL: its batch, its dropped captions, its loss, its refusals."""

import jax
import numpy as np
import pytest

from configs import default
from flaxkd import tasks
from flaxkd.pretrained import Folder, families


def config(**changes):
    c = default.get_config()
    c.student, c.batch_size, c.data.resolution, c.pairing = "bk_sdxl_small", 4, 32, "bksdm"
    c.learning_rate = dict(schedule="constant_schedule", value=1e-3)
    for name, value in changes.items():
        setattr(c, name, value)
    return c


def test_a_batch_has_both_rows_of_ids_and_the_sizes(tiny_xl):
    task = tasks.make(config(caption_dropout=0.5), Folder.open(tiny_xl), np.float32)
    assert {name: x.shape for name, x in task.batch.items()} == {
        "moments": (8, 8, 8), "input_ids": (16,), "input_ids_2": (16,), "time_ids": (6,),
    }  # fmt: skip
    batch = task.random_batch(64, seed=0)
    inputs = task.prepare(jax.random.key(0), batch)
    dropped = (np.asarray(inputs.conditions["input_ids"]) == families.MISSING).all(1)
    assert 16 < dropped.sum() < 48
    for name in ("input_ids", "input_ids_2"):
        np.testing.assert_array_equal(inputs.conditions[name][~dropped], batch[name][~dropped])
        assert (np.asarray(inputs.conditions[name])[dropped] == families.MISSING).all()
    np.testing.assert_array_equal(inputs.conditions["time_ids"], batch["time_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_skip": 1}, "clip_skip = 1: a folder of Stable Diffusion XL cannot keep it"),
        ({"student": "sd_small"}, "can only be cut from a whole UNet like that of Stable Diffusion 1.x"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_xl, changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(config(**changes), Folder.open(tiny_xl), np.float32)


def test_a_text_encoder_that_is_not_there_cannot_be_trained(tiny_pipeline):
    with pytest.raises(ValueError, match="has no text_encoder_2"):
        tasks.make(config(student="sd_tiny", train=("unet", "text_encoder_2")), Folder.open(tiny_pipeline), np.float32)
