"""Layers that the UNet and the autoencoder share, named as diffusers names them.

Layout is NHWC. Shape letters, here and everywhere in flaxkd: b batch, h w rows and columns, c channels,
l text tokens, d text width, n tokens of an attention.

Every module ends in `emit`, which captures its output under the name that a PyTorch forward hook on the same
module has (`down_blocks.0.resnets.1`): see `features`.
"""

import typing

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flaxkd.models.attention import DotProductAttention, dot_product_attention

FEATURES = "features"


def emit(module: nn.Module, x: jax.Array, of: str | None = None) -> jax.Array:
    """Captures `x` as the output of `module`, or of its submodule `of`. Free unless `features` is mutable."""
    # The leaf needs a name that no submodule has; the reducer keeps the value itself where `sow` keeps a tuple.
    name = f"{of}.output" if of else "output"
    module.sow(FEATURES, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return x


def features(variables: dict) -> dict[str, jax.Array]:
    """The captured outputs by module name, `{"down_blocks.0": [b, h, w, c], ...}`, of a mutable `apply`."""
    flat = flatten_dict(variables.get(FEATURES, {}))
    return {".".join(path).removesuffix("output").removesuffix("."): x for path, x in flat.items()}


def read_config(cls, config: dict, neutral: dict[str, tuple | None] | None, *, what: str):
    """Makes the dataclass `cls` from a `config.json`, and nothing that the file asks for is silently left out.

    `neutral`: the other fields that the file may have, each with the values at which it changes nothing (None for any
    value); None for a model whose further fields say nothing about its arithmetic. Lists become tuples.
    Raises ValueError naming every field that is unknown, out of range or of another type.
    """
    fields, wrong, read = typing.get_type_hints(cls), [], {}
    for name, value in config.items():
        if name in fields:
            kind = fields[name]
            value = frozen(value)
            default = getattr(cls, name)
            leaf = type(default[0]) if isinstance(default, tuple) else int
            if not isinstance(value, kind | int if kind is float else kind) or not _all(leaf, value):
                wrong.append(f"{name} = {value!r} (supported: {getattr(kind, '__name__', kind)})")
            elif not _all_in_range(value):
                wrong.append(f"{name} = {value!r} (supported: numbers from 0 to {LARGEST:,})")
            read[name] = value
        elif neutral is None or name.startswith("_"):
            continue
        elif name not in neutral and value:
            wrong.append(f"{name} = {value!r} (unknown field)")
        elif (same := neutral.get(name)) is not None and value not in same and not (value is None and False in same):
            wrong.append(f"{name} = {value!r} (supported: {', '.join(map(repr, same))})")
    if wrong:
        raise ValueError(f"this {what} config.json asks for what flaxkd does not support:\n  " + "\n  ".join(wrong))
    return cls(**read)


LARGEST = 2**20  # of all sizes in a configuration: a typing error beyond it would fill the memory


def _all(kind: type, value) -> bool:
    """Whether a tuple has leaves, and all of a kind; True for what is no tuple."""
    if not isinstance(value, tuple):
        return True
    leaf = lambda x: _all(kind, x) if isinstance(x, tuple) else isinstance(x, kind) and type(x) is not bool
    return bool(value) and all(map(leaf, value))


def _all_in_range(value) -> bool:
    if isinstance(value, tuple):
        return all(map(_all_in_range, value))
    return not isinstance(value, int | float) or 0 <= value <= LARGEST  # NaN is not


def one(value):
    """The number that all entries of a list are, such as a field given for each block; else the value itself."""
    same = isinstance(value, list | tuple) and value and not isinstance(value[0], list) and value.count(value[0])
    return value[0] if same and same == len(value) else value


def lower(value):
    return value.lower() if isinstance(value, str) else value


def flag(value):
    """False for null, as in Python."""
    return bool(value) if value in (None, 0, 1) else value


def respell(config: dict, spellings: dict) -> dict:
    """The configuration with one spelling of each value. spellings: {field: its function of the value}."""
    return {name: spellings[name](value) if name in spellings else value for name, value in config.items()}


def frozen(value):
    """Lists to tuples at every depth: a Linen module's configuration must be hashable."""
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def GroupNorm(groups: int, eps: float, **kwargs) -> nn.GroupNorm:
    return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, **kwargs)  # E[x^2] - E[x]^2 loses digits


def LayerNorm(eps: float = 1e-5, **kwargs) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, **kwargs)


def Conv(features: int, kernel: int = 3, stride: int = 1, padding=None, **kwargs) -> nn.Conv:
    """A square convolution with PyTorch's padding: the same number of rows on both sides, 'same' by default."""
    padding = (kernel - 1) // 2 if padding is None else padding
    return nn.Conv(features, (kernel, kernel), (stride, stride), padding, **kwargs)


class ResnetBlock2D(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), float[b, h, w, c]; `temb` float[b, e] or None."""

    out_channels: int
    groups: int
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, temb=None):
        h = nn.silu(GroupNorm(self.groups, self.eps, dtype=self.dtype, name="norm1")(x))
        h = Conv(self.out_channels, dtype=self.dtype, name="conv1")(h)
        if temb is not None:
            time = nn.Dense(self.out_channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))
            h = h + time[:, None, None, :]
        h = nn.silu(GroupNorm(self.groups, self.eps, dtype=self.dtype, name="norm2")(h))
        h = Conv(self.out_channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.out_channels:
            x = Conv(self.out_channels, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return emit(self, x + h)


class Downsample2D(nn.Module):
    """Halves rows and columns, float[b, h, w, c] -> [b, h/2, w/2, c].

    `padding` is 1 in the UNet and 0 in the autoencoder, where 0 pads one row below and one column to the right."""

    padding: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        padding = self.padding or ((0, 1), (0, 1))
        return emit(self, Conv(x.shape[-1], stride=2, padding=padding, dtype=self.dtype, name="conv")(x))


class Upsample2D(nn.Module):
    """Nearest-neighbour resize, then a convolution, float[b, h, w, c] -> [b, h', w', c].

    `shape` (h', w') is that of the skip connection which follows: twice the input, or one less for odd sizes."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, shape=None):
        b, h, w, c = x.shape
        if shape is None or tuple(shape) == (2 * h, 2 * w):
            x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        else:
            rows, columns = (jnp.arange(new) * old // new for new, old in zip(shape, (h, w), strict=True))
            x = x[:, rows][:, :, columns]  # as PyTorch does; `jax.image.resize` rounds otherwise
        return emit(self, Conv(c, dtype=self.dtype, name="conv")(x))


class Attention(nn.Module):
    """Multi-head attention of `x` float[b, n, c] over `context` float[b, m, d], or over itself: float[b, n, c]."""

    heads: int
    bias: bool = False
    upcast: bool = False
    dtype: jnp.dtype = jnp.float32
    attend: DotProductAttention = dot_product_attention

    @nn.compact
    def __call__(self, x, context=None):
        channels = x.shape[-1]

        def project(source, name):
            y = nn.Dense(channels, use_bias=self.bias, dtype=self.dtype, name=name)(source)
            return y.reshape(*y.shape[:2], self.heads, -1)

        context = x if context is None else context
        query, key, value = project(x, "to_q"), project(context, "to_k"), project(context, "to_v")
        y = self.attend(query, key, value, upcast=self.upcast).reshape(x.shape)
        return emit(self, nn.Dense(channels, dtype=self.dtype, name="to_out.0")(y))
