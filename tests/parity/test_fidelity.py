"""Measures of fidelity against torchmetrics."""

import numpy as np
import pytest

from flaxkd.evaluate import fidelity
from tests.evaluate.test_fidelity import pictures

torch = pytest.importorskip("torch")


def test_ssim_is_that_of_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = pictures(0)
    b = (0.7 * a + 0.3 * pictures(1)).astype(np.uint8)
    tensors = [torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in (a, b)]
    _, full = structural_similarity_index_measure(*tensors, data_range=255.0, return_full_image=True)
    inside = full[..., 5:-5, 5:-5].mean((1, 2, 3))  # it goes on over a padding, the paper does not
    np.testing.assert_allclose(fidelity.ssim(a, b), inside, atol=1e-6)
    np.testing.assert_allclose(fidelity.ssim(a, a), 1, atol=1e-12)
    with pytest.raises(ValueError, match="11 x 11 pixels, these pictures have 8 x 20"):
        fidelity.ssim(a[:, :8], b[:, :8])
