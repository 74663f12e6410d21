"""Convolutions and their gradients on a CPU, in the form that pays there, against PyTorch's."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from flaxkd.machine import cpu
from flaxkd.models.layers import Conv

torch = pytest.importorskip("torch")


def gradients(module: nn.Conv):
    """(kernel, x, dy) -> y and its gradients by the first two."""

    def function(kernel, x, dy):
        y, backward = jax.vjp(lambda kernel, x: module.apply({"params": {"kernel": kernel}}, x), kernel, x)
        return y, *backward(dy)

    return function


@pytest.mark.parametrize(
    ("h", "w", "kernel", "stride", "padding"),
    [(2, 2, 3, 1, 1), (2, 2, 1, 1, 0), (1, 1, 3, 1, 1), (1, 2, 3, 1, 1), (2, 2, 3, 2, 1),
     (5, 6, 3, 1, 1), (5, 6, 3, 2, 1), (6, 6, 3, 2, 0), (5, 6, 1, 1, 0)],
)  # fmt: skip
def test_a_convolution_is_that_of_torch(h, w, kernel, stride, padding):
    cpu.compiler_options()
    rng = np.random.default_rng(0)
    k, x = (rng.standard_normal(shape, np.float32) for shape in ((kernel, kernel, 4, 6), (3, h, w, 4)))
    to_torch = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)
    theirs = torch.from_numpy(k).permute(3, 2, 0, 1).requires_grad_(), to_torch(x).requires_grad_()
    y = torch.nn.functional.conv2d(theirs[1], theirs[0], stride=stride, padding=padding)
    dy = rng.standard_normal(tuple(y.permute(0, 2, 3, 1).shape), np.float32)
    y.backward(to_torch(dy))
    expected = y.permute(0, 2, 3, 1), theirs[0].grad.permute(2, 3, 1, 0), theirs[1].grad.permute(0, 2, 3, 1)
    ours = jax.jit(gradients(Conv(6, kernel, stride, padding, use_bias=False)))(k, x, dy)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=1e-5)
