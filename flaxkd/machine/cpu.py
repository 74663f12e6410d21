"""What speeds up a CPU: the compiler's options, the form of convolutions, and memory that is kept.

The rest of flaxkd knows nothing of it, and nothing here changes a result by more than rounding. Figures are for two
cores and float32. "The miniature" is the distillation step of sd_small with the embedded teacher. docs/log.md has what
was measured, and what did not help.
"""

import ctypes
import functools
import sys

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from flaxkd.machine import compiler

# YNNPACK fuses reductions with their inputs; convolutions stay XLA's own, which are faster. Measured: the miniature's
# step with 16 images takes 412 ms with the default options and 381 with these, with 4 images there is no difference; a
# call of SD1.5's UNet with 2 latents takes 18.6 and 13.7 s.
OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
SMALL = 2 * 2  # positions; a convolution of so small a map is a matrix product over gathered patches
NHWC = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # and HWIO
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of malloc.h


@functools.cache
def compiler_options() -> dict[str, str]:
    """For `jax.jit`; empty if this XLA does not know them. The first call also installs `_convolution` as lowering."""
    try:
        from jax._src.lax.convolution import _conv_general_dilated_lower as default
    except ImportError:  # a private name of JAX: without it, convolutions are slower
        pass
    else:
        rule = functools.partial(_convolution, default)
        mlir.register_lowering(jax.lax.conv_general_dilated_p, rule, platform="cpu")
    return compiler.known(OPTIONS)


def _convolution(default, ctx, lhs, rhs, **params):
    """Lowers a convolution, or the gradient of one, for a CPU. default: JAX's own rule for all platforms."""
    numbers = params["dimension_numbers"]
    if lhs.type.rank != 4 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return default(ctx, lhs, rhs, **params)
    ones = {*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"]} == {1}
    h, w = (ctx.avals_in[0].shape[axis] for axis in numbers.lhs_spec[2:])
    if ones and h * w <= SMALL:
        form = functools.partial(_patches, params)
    elif numbers == NHWC:
        return default(ctx, lhs, rhs, **params)
    else:
        named = {name: params[name] for name in NAMED}
        form = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=NHWC, **named)
    return mlir.lower_fun(functools.partial(_as_nhwc, form, numbers), multiple_results=False)(ctx, lhs, rhs)


NAMED = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision", "preferred_element_type")


def _as_nhwc(form, numbers, x, kernel):
    """`form` with axes in the order NHWC and HWIO, which XLA's fast convolution needs.

    XLA reorders axes itself, but never within a loop, where a gradient therefore runs the slow convolution: 3x3x320x320
    over a map of 32x32 takes 3,239 ms in `lax.scan` and 111 ms outside."""
    lhs, rhs, out = numbers
    y = form(x.transpose(lhs[0], *lhs[2:], lhs[1]), kernel.transpose(*rhs[2:], rhs[1], rhs[0]))
    order = out[0], *out[2:], out[1]
    return y.transpose([order.index(axis) for axis in range(4)])


def _patches(params, x, kernel):
    """float[b, h, w, c] by float[kh, kw, c, d] as a matrix product, for maps too small to keep XLA's threads busy.

    Measured: the miniature's step with 4 images takes 183 ms without it and 150 with it, with 16 images 523 and 381.
    SD1.5 has no such map at 512 pixels."""
    kh, kw, _, d = kernel.shape
    edges = [(0, 0), *params["padding"], (0, 0)]  # below 0 it crops, in gradients
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in edges])
    b, h, w, _ = x.shape
    h, w = h - kh + 1, w - kw + 1
    x = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(kh) for j in range(kw)], axis=-1)
    kinds = {name: params[name] for name in ("precision", "preferred_element_type")}
    return jnp.matmul(x.reshape(b * h * w, -1), kernel.reshape(-1, d), **kinds).reshape(b, h, w, d)


def keep_memory() -> None:
    """Lets each training step reuse the memory of the step before. Call it before there are devices.

    glibc returns large blocks to the system, which then faults them in again page by page. It keeps them for the main
    thread alone; XLA computes there once dispatch is synchronous. Processes that wait for each other are left alone.
    Measured: the miniature's step with 16 images takes 392 ms without it and 307 with it; a call of SD1.5's UNet takes
    as long as before."""
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
