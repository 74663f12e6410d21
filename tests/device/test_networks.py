"""The miniature on this machine's device, beside the same on its CPU in float32: networks, loss and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd import pretrained, students, tasks
from flaxkd.machine import sharding
from flaxkd.models.attention import DotProductAttention
from flaxkd.pretrained import Folder, families
from tests import tiny
from tests.device import HERE, THERE, apart
from tests.test_configs import load

pytestmark = pytest.mark.device

# (dtype of the compute, precision of products in float32, relative error at most). "default" may be TF32 or bfloat16.
COMPUTES = [("float32", "highest", 1e-4), ("float32", "default", 5e-3), ("bfloat16", "default", 5e-2)]
CAPTIONS = ["red apple", "flag: Peru", "cat face", "blue heart"]
FOLDER = Folder.open()  # reads nothing yet


def samples(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


# {name: (part, its method, () -> arguments)}
CALLS = {
    "unet": ("unet", None, lambda: (samples(4, 16, 16, 4), np.array([1, 300, 600, 999]), samples(4, 32, 128))),
    "text_encoder": ("text_encoder", None, lambda: (FOLDER.tokenize(CAPTIONS)["input_ids"],)),
    "encoder of the vae": ("vae", "encode", lambda: (np.tanh(samples(4, 64, 64, 3)),)),
    "decoder of the vae": ("vae", "decode", lambda: (samples(4, 16, 16, 4),)),
}


@functools.cache
def network(name: str, dtype: str, precision: str, device):
    part, method, arguments = CALLS[name]
    module, method = FOLDER.module(part, jnp.dtype(dtype)), {"method": method} if method else {}
    with jax.default_device(device), jax.default_matmul_precision(precision):
        call = jax.jit(lambda params, *arguments: module.apply({"params": params}, *arguments, **method))
        return jax.device_get(call(FOLDER.params(part, jnp.dtype(dtype)), *arguments()))


@pytest.mark.parametrize(("dtype", "precision", "most"), COMPUTES)
@pytest.mark.parametrize("name", CALLS)
def test_a_network_is_that_of_the_cpu(name, dtype, precision, most):
    assert apart(network(name, dtype, precision, THERE), network(name, "float32", "highest", HERE)) < most


def test_flops_are_counted_beside_any_device():
    config = FOLDER.config("unet")
    with jax.default_device(THERE):
        parameters, flops = students.cost(config)
    assert parameters == sum(x.size for x in jax.tree.leaves(FOLDER.shapes("unet"))) and flops > parameters


@functools.cache
def distillation(dtype: str, precision: str, device):
    """(loss, gradient) of the quick start's step, for the same noise and timesteps everywhere."""
    task = tasks.make(load("small"), FOLDER, jnp.dtype(dtype), sharding.make_mesh(1, 1, [device]))
    batch = {"moments": samples(4, 16, 16, 8)} | FOLDER.tokenize(CAPTIONS)
    with jax.default_device(HERE):
        inputs = jax.device_get(task.prepare(jax.random.key(0), batch))
    with jax.default_device(device), jax.default_matmul_precision(precision):
        loss = jax.jit(jax.value_and_grad(lambda trained, *rest: task.loss(trained, *rest)[0]))
        return jax.device_get(loss(task.trained, task.frozen, {}, inputs))


@pytest.mark.parametrize(("dtype", "precision", "most"), COMPUTES)
def test_a_distillation_has_the_loss_and_the_gradient_of_the_cpu(dtype, precision, most):
    ours, true = distillation(dtype, precision, THERE), distillation("float32", "highest", HERE)
    assert apart(ours[0], true[0]) < most
    assert apart(ours[1], true[1]) < 4 * most


# Two stages of 4,096 and 1,024 tokens, 4 heads of 8 channels: the kernel of long attention, on a device that has one.
LONG = {"sample_size": 64, "block_out_channels": (32, 32), "layers_per_block": 1, "attention_head_dim": 4}
LONG |= {"norm_num_groups": 4, "cross_attention_dim": 16, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
LONG |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}


@functools.cache
def long_attention(dtype: str, device):
    """A call of a UNet's prediction and gradient, which returns numpy arrays."""
    config = families.SD15 | LONG
    attend = DotProductAttention(sharding.make_mesh(1, 1, [device]))
    module = families.build("unet", config, jnp.dtype(dtype), attend=attend)
    params = tiny.weights(pretrained.shapes("unet", config), 0)
    inputs = samples(2, 64, 64, 4), np.array([1, 900]), samples(2, 16, 16)

    def squares(params):
        y = module.apply({"params": params}, *inputs).astype(jnp.float32)
        return jnp.mean(y**2), y

    precision = "highest" if dtype == "float32" else "default"
    program = jax.jit(jax.value_and_grad(squares, has_aux=True))

    def call():
        with jax.default_device(device), jax.default_matmul_precision(precision):
            return jax.device_get(program(params))

    return call


def test_long_attention_in_a_network_is_that_of_the_cpu_and_repeats_bit_for_bit():
    ours, true = long_attention("bfloat16", THERE), long_attention("float32", HERE)()
    first, second = ours(), ours()
    assert apart(first[0], true[0]) < 5e-2
    assert apart(first[1], true[1]) < 4 * 5e-2
    different = [
        a.shape for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True) if not np.array_equal(a, b)
    ]
    assert not different, f"{len(different)} of {len(jax.tree.leaves(first))} arrays differ in a second run"
