"""Masks for inpainting: of every kind, and a picture's own."""

import numpy as np

from flaxkd.data import masks


def test_masks_are_whole_or_a_part_of_the_picture():
    rng = np.random.default_rng(0)
    shares = np.array([masks.sample(rng, 24, 40).mean() for _ in range(400)])
    assert masks.sample(rng, 24, 40).shape == (24, 40)
    assert abs((shares == 1).mean() - masks.WHOLE) < 0.05
    parts = shares[shares < 1]
    assert parts.min() > 0 and np.quantile(parts, 0.1) < 0.15 and np.quantile(parts, 0.9) > 0.5


def test_a_mask_follows_from_the_pixels_alone():
    image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    found = masks.of_picture(image)
    assert found.shape == (masks.MASKS, 32, 32) and found.dtype == bool
    np.testing.assert_array_equal(found, masks.of_picture(image.copy()))
    assert (found != masks.of_picture(image[:, ::-1])).any()
