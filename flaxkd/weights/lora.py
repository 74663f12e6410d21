"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as trees beside the parameters of a network.

An adapter has the shape of the parameters. At the path of each adapted module it holds, in float32,

    module         kernel          lora_A, kernel     lora_B, kernel
    linear         [i, o]          [i, r]             [r, o]
    convolution    [h, w, i, o]    [h, w, i, r]       [1, 1, r, o]

which is what `pretrained.keys.to_flax` makes of `MODULE.lora_A.weight` and `MODULE.lora_B.weight`. One rule for all:
kernel + scale * A @ B, over the last axis. Networks know nothing of it.
"""

import re
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Path = tuple[str, ...]

_ATTENTION = (r"attn\d\.to_([qkv]|out\.0)", r"self_attn\.(q|k|v|out)_proj")
_FEED_FORWARD = (*_ATTENTION, r"ff\.net\.(0\.proj|2)", r"proj_in", r"proj_out", r"mlp\.fc\d")
_CONVOLUTIONS = (*_FEED_FORWARD, r"conv[12]", r"conv_shortcut", r"time_emb_proj", r"(down|up)samplers\.\d\.conv")

# Patterns for the ends of module names, of UNets and of text encoders.
TARGETS = {
    "attention": _ATTENTION,  # of diffusers' scripts
    "feed_forward": _FEED_FORWARD,  # and what is around attention: kohya's default
    "convolutions": _CONVOLUTIONS,  # and resnets and samplers: kohya's with conv_dim ("LoCon")
    "lcm": _CONVOLUTIONS,  # the same set, of LCM-LoRA
    "all": (r".*",),
}


def modules(shapes: dict, targets: str | Sequence[str]) -> list[Path]:
    """The paths of the modules with a kernel that `targets` name: rows of TARGETS, or ends of module names.

    shapes: the parameters of a part, as arrays or shapes. An end is a regular expression: "to_q" is every to_q, and
    r"up_blocks\\..*to_q" those of up blocks. Raises ValueError for a target that names no module."""
    targets = [targets] if isinstance(targets, str) else list(targets)
    known = [path[:-1] for path in flatten_dict(shapes) if path[-1] == "kernel"]
    found = set()
    for target in targets:
        end = re.compile(rf"(?:.*\.)?(?:{'|'.join(TARGETS.get(target, (target,)))})")
        named = {path for path in known if end.fullmatch(".".join(path))}
        if not named:
            raise ValueError(
                f"targets: {target!r} names no module of this part. Known are {', '.join(TARGETS)}, and ends of its "
                f"module names, such as {'.'.join(known[len(known) // 2])}"
            )
        found |= named
    return [path for path in known if path in found]


def init(shapes: dict, targets: str | Sequence[str], rank: int, seed: int) -> dict:
    """A new adapter, as numpy arrays: A ~ N(0, 1 / rank^2), peft's "gaussian", and B = 0, so that it changes nothing.

    The numbers of a module depend on the seed and its name alone. Raises ValueError, as `modules` does."""
    kernels, adapter = flatten_dict(shapes), {}
    for path in modules(shapes, targets):
        *inputs, outputs = kernels[(*path, "kernel")].shape
        rng = np.random.default_rng([seed, zlib.crc32(".".join(path).encode())])
        adapter[(*path, "lora_A", "kernel")] = rng.standard_normal((*inputs, rank), np.float32) / np.float32(rank)
        adapter[(*path, "lora_B", "kernel")] = np.zeros((*(1 for _ in inputs[1:]), rank, outputs), np.float32)
    return unflatten_dict(adapter)


def layers(adapter: dict) -> dict[Path, tuple]:
    """{path of a module: its (A, B)}."""
    found = flatten_dict(adapter, is_leaf=lambda path, tree: "lora_A" in tree)
    return {path: (pair["lora_A"]["kernel"], pair["lora_B"]["kernel"]) for path, pair in found.items()}


def scaled(adapter: dict, scale: float) -> dict:
    """The adapter whose A @ B is `scale` times as large: the scale goes into B."""
    return tree({path: (a, b * np.float32(scale)) for path, (a, b) in layers(adapter).items()})


def tree(pairs: Mapping[Path, tuple]) -> dict:
    """The inverse of `layers`: the adapter of {path of a module: (A, B)}."""
    named = lambda pair: {f"lora_{name}": {"kernel": x} for name, x in zip("AB", pair, strict=True)}
    return unflatten_dict({path: named(pair) for path, pair in pairs.items()})


def nearest(difference: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(A, B, share of the squared norm that A @ B keeps) of the nearest product of this rank to a change of a kernel.

    By singular values, their roots on both sides, as numpy arrays in float32. rank: at most that of the matrix."""
    matrix = difference.reshape(-1, difference.shape[-1]).astype(np.float64)
    rank = min(rank, *matrix.shape)
    wide = matrix.shape[0] > matrix.shape[1]
    small = matrix.T if wide else matrix  # its smaller side first: that squared has the vectors of one side
    squares, vectors = (x[..., ::-1] for x in np.linalg.eigh(small @ small.T))
    roots = np.sqrt(np.sqrt(np.maximum(squares[:rank], np.finfo(np.float64).tiny)))
    left, right = vectors[:, :rank] * roots, (vectors[:, :rank] / roots).T @ small
    a, b = (right.T, left.T) if wide else (left, right)
    kept = squares[:rank].sum() / max(squares.sum(), np.finfo(np.float64).tiny)
    b = b.reshape(*(1,) * (difference.ndim - 2), *b.shape)
    return a.reshape(*difference.shape[:-1], rank).astype(np.float32), b.astype(np.float32), float(kept)


def delta(a, b):
    """A @ B over the last axis, in the shape of the kernel: numpy's of numpy arrays, else JAX's, in full float32."""
    with jax.default_matmul_precision("highest"):  # for TPUs and GPUs
        return a @ b


def merge(params: dict, adapter: dict, scale=1.0, dtype=None) -> dict:
    """The parameters with scale * A @ B added to every adapted kernel.

    The sums are made in float32, and then cast to `dtype` (None: the kernel's own). A kernel in bfloat16 would round a
    small change away: keep those to be adapted in float32. The other leaves are those of `params` themselves. Raises
    ValueError that lists every adapted module that `params` lack or have in another shape."""
    merged, wrong = flatten_dict(params), []
    for module, (a, b) in sorted(layers(adapter).items()):
        path = (*module, "kernel")
        if path not in merged:
            wrong.append(f"{'.'.join(module)}: there is no such module")
        elif (shape := (*a.shape[:-1], b.shape[-1])) != merged[path].shape:
            wrong.append(f"{'.'.join(module)}: {shape} of the adapter, {merged[path].shape} of the network")
        else:
            kernel = merged[path]
            merged[path] = (kernel.astype(np.float32) + scale * delta(a, b)).astype(dtype or kernel.dtype)
    if wrong:
        found = "\n  ".join(wrong)
        raise ValueError(f"{len(wrong)} modules of this adapter do not fit the network:\n  {found}")
    return unflatten_dict(merged)
