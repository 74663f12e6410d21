"""Quantization by qwix: THE TABLE of schemes, a UNet that computes by one of them, and weights on its grid.

The parameters of a quantized network keep their names, shapes and dtypes. They are rounded at every call, and gradients
pass as if they were not: quantization-aware training (QAT). Checkpoints, averages and exports know nothing of it.

Quantized are linear layers and convolutions. Attention's own products, q k^T and the one with v, have no weights and
stay in full precision, since few formats can express them and kernels never do.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]


class Scheme(NamedTuple):
    """dtypes by qwix's names. bits: of a weight. tile: inputs of a linear layer that share a scale; None: all of them.

    A convolution has one scale for each output channel: qwix has no tiles there. reach: a scale is reach x the largest
    weight / (the largest integer + 1/2). At 1, a largest weight below 0 would lie halfway between two integers, and
    each compiler would choose. Less cuts the largest weights, and the others are finer: the error of w4 in two of the
    miniature's sd_small is 14.0 and 11.3 % at 0.999, 12.7 and 11.1 at 0.9, 12.6 and 12.0 at 0.8, 17.5 and 15.4 at 0.7.

    calibration: of activations. "minmax" has a zero point too: SiLU ends at -0.28, and nearly half of the integers for
    numbers of both signs would be unused. unrounded: ends of names of layers that see activations as they are, such as
    the residual stream. On 128 pictures, w8a8 with neither errs by 2.3 %, with the first by 2.0, with both by 1.0."""

    weights: str
    bits: int
    activations: str | None = None  # scaled anew at every call, for each example of a convolution or row of a product
    tile: int | None = None
    reach: float = 0.999
    calibration: str = "absmax"
    unrounded: tuple[str, ...] = ()


SCHEMES = {
    "w8": Scheme("int8", 8),
    "w8a8": Scheme("int8", 8, "int8", calibration="minmax", unrounded=("conv_shortcut",)),
    "w4": Scheme("int4", 4, tile=32, reach=0.85),
    "fp8": Scheme("float8_e4m3fn", 8, "float8_e4m3fn"),
}

# Ends of names of layers in full precision: few weights, and much of the error.
FULL = ("conv_in", "conv_out", r"time_embedding\.linear_\d", "time_emb_proj")


class Quantization(NamedTuple):
    """How a UNet is quantized."""

    scheme: str  # a row of SCHEMES
    full: tuple[str, ...] = FULL  # ends of the names of layers in full precision, as regular expressions
    on_grid: bool = False  # the weights were rounded for good: the network computes with them as they are

    @classmethod
    def read(cls, content: Mapping[str, Any] | None, file: str) -> "Quantization | None":
        """That of a JSON object, as `_asdict` makes it; None for none. Raises ValueError that names the file."""
        if not content:
            return None
        try:
            found = cls(**content)
            found = found._replace(full=tuple(found.full))
        except TypeError:
            raise ValueError(f"{file}: {content!r} does not say how a UNet is quantized") from None
        if found.scheme not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise ValueError(f"{file}: the quantization {found.scheme!r} is unknown (known: {known}): update flaxkd")
        return found


def layers(params: dict, how: Quantization) -> dict[Path, int | None]:
    """{path of each quantized layer: inputs that share a scale, None for all}. params: of a UNet, or their shapes.

    A linear layer whose inputs are no multiple of the tile is not tiled. Raises ValueError for an entry of `full` that
    names no layer."""
    scheme = SCHEMES[how.scheme]
    kernels = {path[:-1]: x.shape for path, x in flatten_dict(params).items() if path[-1] == "kernel"}
    kept = set()
    for end in how.full:
        named = {path for path in kernels if _ends(path, end)}
        if not named:
            raise ValueError(
                f"full_precision: {end!r} names no layer of this UNet. It is the end of a name, such as "
                f"{'.'.join([*kernels][len(kernels) // 2])}, or a regular expression for it"
            )
        kept |= named
    tile = lambda shape: scheme.tile if scheme.tile and len(shape) == 2 and shape[0] % scheme.tile == 0 else None
    return {path: tile(shape) for path, shape in kernels.items() if path not in kept}


def _ends(path: Path, end: str) -> bool:
    """Whether a layer's name has this end, a regular expression for whole names of modules."""
    return re.fullmatch(rf"(?:.*\.)?(?:{end})", ".".join(path)) is not None


def wrapped(unet, params: dict, how: Quantization | None):
    """The module with its layers quantized; unchanged for None, or where the weights are on the grid already.

    params: its parameters, or their shapes. Raises ValueError, as `layers` does."""
    if how is None or how.on_grid:
        return unet
    provider, unet = prepared(unet, params, how)
    import qwix

    return qwix.quantize_model(unet, provider)


def prepared(unet, params: dict, how: Quantization) -> tuple:
    """(qwix's provider, the module that it is for)."""
    import qwix  # two seconds of import, for quantized networks alone

    scheme, alike = SCHEMES[how.scheme], {}
    for path, tile in layers(params, how).items():
        sees = None if any(_ends(path, end) for end in scheme.unrounded) else scheme.activations
        alike.setdefault((tile, sees), []).append(re.escape("/".join(path)))
    rules = [
        qwix.QtRule(
            module_path="|".join(paths),
            weight_qtype=scheme.weights,
            act_qtype=sees,
            tile_size=tile,
            weight_calibration_method=f"absmax,{scheme.reach}",
            act_calibration_method=scheme.calibration,
            additional_qt_config={"disable_gradient_clipping": True},
        )
        for (tile, sees), paths in alike.items()
    ]
    # JAX keeps the trace of a jitted function such as jnp.matmul by the shapes that it was traced with. With it, a
    # network would compute what another one was traced for: a teacher in int8, or a student without. So none is used.
    return qwix.QtProvider(rules, disable_jit=True), unet.clone(attend=AsItIs(unet.attend))


@dataclasses.dataclass(frozen=True)
class AsItIs:
    """Attention, under jit: without, its loops are unrolled. No rule is for its products, so any trace is right."""

    attend: Callable

    def __call__(self, *args, **kwargs):
        with jax.disable_jit(False):
            return self.attend(*args, **kwargs)


def integers(params: dict, how: Quantization) -> Iterator[tuple[Path, Any]]:
    """(path of a quantized layer, its kernel as qwix.QArray) for each: `qvalue` in the kernel's shape and the scheme's
    dtype, `scale` float32[..., out], whose first axis has a number for each tile of inputs. Dequantized, they are the
    weights that `wrapped` computes with.

    Raises ValueError, as `layers` does."""
    import qwix

    tree, scheme = flatten_dict(params), SCHEMES[how.scheme]
    for path, tile in layers(params, how).items():
        x = np.asarray(tree[(*path, "kernel")], np.float32)
        scales = {"channelwise_axes": [x.ndim - 1], "tiled_axes": {0: tile} if tile else {}}
        yield path, qwix.quantize(x, scheme.weights, calibration_method=f"absmax,{scheme.reach}", **scales)


def on_grid(params: dict, how: Quantization) -> dict:
    """The parameters of a UNet rounded as `wrapped` rounds them, in their own dtype, as numpy arrays.

    A float16 holds an integer times a scale within 0.05 %. Raises ValueError, as `layers` does."""
    import qwix

    tree = flatten_dict(params)
    for path, found in integers(params, how):
        tree[(*path, "kernel")] = np.asarray(qwix.dequantize(found)).astype(tree[(*path, "kernel")].dtype)
    return unflatten_dict(tree)


def size(params: dict, how: Quantization | None) -> int:
    """Bytes of a file of these parameters: quantized weights by their bits, scales and all else in float16.

    params: arrays or shapes."""
    found = {} if how is None else layers(params, how)
    total = 0
    for (*path, name), x in flatten_dict(params).items():
        numbers = int(np.prod(x.shape))
        if name == "kernel" and tuple(path) in found:
            tile = found[tuple(path)]
            scales = x.shape[-1] * (x.shape[0] // tile if tile else 1)
            total += numbers * SCHEMES[how.scheme].bits // 8 + 2 * scales
        else:
            total += 2 * numbers
    return total
