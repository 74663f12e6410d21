"""What speeds up a CPU: the compiler's options, convolutions as XLA does them fast, and memory that is kept."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flaxkd.machine import compiler, cpu, sharding
from flaxkd.models.layers import Conv


@pytest.fixture
def forgotten():
    cpu.compiler_options.cache_clear()
    yield
    cpu.compiler_options.cache_clear()


def test_the_options_are_for_a_cpu(forgotten):
    assert sharding.compiler_options() == sharding.compiler_options("cpu") == cpu.OPTIONS
    assert sharding.compiler_options("tpu") == sharding.compiler_options("gpu") == {}
    assert sharding.compiler_options("cpu", remat=True) == cpu.OPTIONS and sharding.compiler_options("tpu", True) == {}


def test_the_options_for_rematerialisation_are_for_a_gpu(monkeypatch):
    """Known to this XLA: if a newer one renames them, remat saves nothing on an H100, in silence."""
    assert sharding.compiler_options("gpu", remat=True) == compiler.REMAT_ON_GPU != {}
    monkeypatch.setattr(compiler, "REMAT_ON_GPU", {"xla_gpu_of_another_jaxlib": True})
    assert sharding.compiler_options("gpu", remat=True) == {}


def test_options_that_xla_does_not_know_are_left_out(forgotten, monkeypatch):
    monkeypatch.setattr(cpu, "OPTIONS", {"xla_cpu_of_another_jaxlib": "1"})
    assert sharding.compiler_options() == {}


def gradients(module: nn.Conv):
    """(kernel, x, dy) -> y and its gradients by the first two."""

    def function(kernel, x, dy):
        y, backward = jax.vjp(lambda kernel, x: module.apply({"params": {"kernel": kernel}}, x), kernel, x)
        return y, *backward(dy)

    return function


def test_in_a_loop_too_a_convolution_has_the_form_that_is_fast():
    cpu.compiler_options()
    k, x, dy = jnp.ones((3, 3, 4, 6)), jnp.ones((2, 3, 4, 5, 4)), jnp.ones((2, 3, 4, 5, 6))
    function = gradients(Conv(6, use_bias=False))
    loop = lambda k, x, dy: jax.lax.scan(lambda total, of: (total, function(k, *of)), 0, (x, dy))
    text = jax.jit(loop).lower(k, x, dy).compile().as_text()
    assert "while" in text and set(re.findall(r"dim_labels=(\S+?)[,\s]", text)) == {"b01f_01io->b01f"}


@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, -1), (0, 0)), ((1, 1), (0, 1))])
def test_a_small_map_is_convolved_as_it_was_asked_for(padding):
    """The rule holds for every program of the process, not only for flaxkd's networks."""
    cpu.compiler_options()
    x = jnp.arange(2 * 2 * 2 * 3, dtype=jnp.bfloat16).reshape(2, 2, 2, 3)
    kernel = jnp.arange(2 * 3 * 4, dtype=jnp.bfloat16).reshape(2, 1, 3, 4)
    axes = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=axes, precision="highest", preferred_element_type=jnp.float32
    )
    y = jax.jit(convolve)(x, kernel)
    image = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*edge, 0) for edge in padding), (0, 0, 0)])
    image, kernel = (np.asarray(z, np.float32) for z in (image, kernel))
    rows = image.shape[1] - 1
    expected = image[:, :rows] @ kernel[0, 0] + image[:, 1:] @ kernel[1, 0]
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)


def test_a_small_map_is_multiplied():
    cpu.compiler_options()
    k, x, dy = jnp.ones((3, 3, 4, 6)), jnp.ones((3, 2, 2, 4)), jnp.ones((3, 2, 2, 6))
    program = lambda platform: (
        jax.jit(gradients(Conv(6, use_bias=False))).trace(k, x, dy).lower(lowering_platforms=(platform,)).as_text()
    )
    assert "stablehlo.convolution" not in program("cpu") and program("tpu").count("stablehlo.convolution") == 3


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
from flaxkd.machine import cpu
if sys.argv[1] == "kept":
    cpu.keep_memory()
double, x = jax.jit(lambda x: 2 * x), jnp.ones((64, 2**18))  # 64 MiB, or 16,384 pages
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(double(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_memory_stays_with_the_process_from_step_to_step():
    faults = lambda how: int(subprocess.check_output([sys.executable, "-c", MEMORY, how], text=True))
    assert faults("given back") > 1000
    # Of ten processes, one or two did not keep the memory of this program, for reasons not found.
    assert any(faults("kept") < 1000 for _ in range(6))
