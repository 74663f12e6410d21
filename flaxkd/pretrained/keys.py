"""One rule between the names of diffusers' (and transformers') tensors and the paths of Flax parameters.

The modules of `flaxkd.models` have diffusers' names, dots and numbers included (`down_blocks.0`, `to_out.0`). A
key splits into a path at every dot, except before a number. Only the leaf and the order of axes change:

    module        key                        path                           axes
    convolution   conv_in.weight [o,i,h,w]   ("conv_in", "kernel")          [h,w,i,o]
    linear        to_q.weight [o,i]          ("to_q", "kernel")             [i,o]
    embedding     token_embedding.weight     ("token_embedding", "embedding")  unchanged
    norm          norm1.weight [c]           ("norm1", "scale")             unchanged
    any           conv_in.bias [o]           ("conv_in", "bias")            unchanged

flaxkd transposes weights nowhere else. folder.py reads the files.
"""

import collections
import re
from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

LISTED = 20  # names of each kind in an error message; a wrong folder would list hundreds


def to_flax(key: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The path of a diffusers tensor among the parameters, and a view of it with its axes in Flax's order.

    Raises ValueError for a tensor that is neither a weight of 1, 2 or 4 axes nor a bias."""
    *path, leaf = re.split(r"\.(?!\d)", key)
    if leaf == "bias" and array.ndim == 1:
        return (*path, "bias"), array
    if leaf == "weight" and path and array.ndim == 2 and path[-1].endswith("_embedding"):
        return (*path, "embedding"), array
    if leaf == "weight" and array.ndim in (1, 2, 4):
        name, axes = {4: ("kernel", (2, 3, 1, 0)), 2: ("kernel", (1, 0)), 1: ("scale", (0,))}[array.ndim]
        return (*path, name), array.transpose(axes)
    raise ValueError(f"{key} with shape {array.shape} is neither a weight of 1, 2 or 4 axes nor a bias")


def to_diffusers(path: tuple[str, ...], array: np.ndarray) -> tuple[str, np.ndarray]:
    """The inverse of `to_flax`: the key of a parameter, and a view of it with its axes in PyTorch's order."""
    key, axes = _key(path, array.ndim)
    return key, array.transpose(axes)


def from_tensors(tensors: dict[str, np.ndarray], like: dict, what: str) -> dict:
    """Makes the parameters of a module from the tensors of its file.

    tensors: {diffusers key: array}. like: nested dict of anything with `.shape`, as from `families.shapes`.
    what: the name of the module in the error message. Returns a nested dict with the structure of `like`. Its
    leaves are views of the tensors in their own dtypes. Names from older and newer libraries are understood
    (`_current`), also behind the prefixes of wrappers (`_bare`), and tensors of no layer are left out (`_harmless`).
    Raises one ValueError that lists all missing, unexpected, mis-shaped and non-floating-point (for example
    quantised) tensors."""
    expected = {}
    for path, leaf in flatten_dict(like).items():
        key, axes = _key(path, len(leaf.shape))
        expected[key] = tuple(leaf.shape[axis] for axis in axes)
    bare = _bare(tensors, expected, what)
    found, unexpected = {}, []
    for key in sorted(tensors, key=lambda key: bare[key] not in expected):  # a current name goes before an old one
        current = _current(bare[key], expected)
        if current in expected and current not in found:
            found[current] = _squeezed(tensors[key], expected[current])
        elif current in expected or not _harmless(current, expected):
            unexpected.append(f"{key} {list(tensors[key].shape)}")
    missing = [f"{key} {list(shape)}" for key, shape in expected.items() if key not in found]
    misshaped = [
        f"{key} is {list(array.shape)}, must be {list(expected[key])}"
        for key, array in found.items()
        if array.shape != expected[key]
    ]
    integers = [
        f"{key} is {array.dtype}" for key, array in found.items() if not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "mis-shaped": misshaped,
        "no floating point": integers,
    }
    if any(kinds.values()):
        lines = "".join(_lines(kind, names) for kind, names in kinds.items() if names)
        raise ValueError(f"the tensors of {what} are not those that its config.json describes:{lines}")
    return unflatten_dict(dict(to_flax(key, array) for key, array in found.items()))


def check_finite(params: dict, what: str, remedy: str) -> None:
    """Raises ValueError that names the tensors of `what` with numbers that are NaN or infinite."""
    flat = {path: x for path, x in flatten_dict(params).items() if isinstance(x, np.ndarray)}
    wrong = [to_diffusers(path, x)[0] for path, x in flat.items() if not np.isfinite(x).all()]
    if wrong:
        lines = _lines("not finite", wrong)
        raise ValueError(f"{what} has numbers that are NaN or infinite. {remedy}:{lines}")


def to_tensors(params: dict) -> dict[str, np.ndarray]:
    """The parameters of a module under diffusers' names, as C-contiguous arrays, ready for safetensors."""
    pairs = (to_diffusers(path, np.asarray(array)) for path, array in flatten_dict(params).items())
    return {key: np.ascontiguousarray(array) for key, array in pairs}


def _key(path: tuple[str, ...], ndim: int) -> tuple[str, tuple[int, ...]]:
    """The diffusers key of a parameter with `ndim` axes, and the axes of the parameter in PyTorch's order."""
    *module, leaf = path
    same = leaf in ("bias", "scale", "embedding")
    axes = tuple(range(ndim)) if same else {4: (3, 2, 0, 1), 2: (1, 0)}[ndim]
    return ".".join([*module, "bias" if leaf == "bias" else "weight"]), axes


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _current(key: str, expected: Mapping[str, tuple]) -> str:
    """The expected name of a tensor stored under `key`, or `key` itself.

    Autoencoders from before diffusers 0.18 name their attention differently. Text encoders saved by transformers 5
    lack the prefix found in all files on the hub."""
    module, _, leaf = key.rpartition(".")
    block, _, name = module.rpartition(".")
    old = f"{block}.{_OLD_ATTENTION.get(name)}.{leaf}"
    return next((name for name in (key, old, f"text_model.{key}") if name in expected), key)


def _squeezed(array: np.ndarray, shape: tuple) -> np.ndarray:
    """A linear layer that is stored as a 1x1 convolution, as in some old autoencoders."""
    return array[:, :, 0, 0] if array.shape[2:] == (1, 1) and len(shape) == 2 else array


# What DistributedDataParallel, torch.compile and FSDP put into names, at any depth: no layer is called so.
_WRAPPER = re.compile(r"(?<![^.])(?:module|_\w+)\.")

# What a training saves beside a network: its averages, its losses, other networks of the pipeline, the rest of CLIP.
_BESIDE = {
    *("ema", "ema_model", "model_ema", "unet_ema", "shadow_params"),
    *("loss", "lpips", "discriminator", "perceptual_loss", "optimizer", "lr_scheduler"),
    *("unet", "vae", "text_encoder", "first_stage_model", "cond_stage_model", "safety_checker"),
    *("vision_model", "visual_projection", "text_projection"),
}


def _bare(keys: Iterable[str], expected: Mapping[str, tuple], what: str) -> dict[str, str]:
    """{key: its name without wrappers and without the prefix of the network, such as "model.diffusion_model."}.

    That prefix is the one before most of the expected names. Raises ValueError if there are two."""
    bare = {key: _WRAPPER.sub("", key) for key in keys}
    votes = collections.Counter()
    for name in bare.values():
        words = name.split(".")
        ends = (n for n in range(len(words)) if _current(".".join(words[n:]), expected) in expected)
        if (n := next(ends, None)) is not None:
            votes["".join(f"{word}." for word in words[:n])] += 1
    rank = lambda prefix: (prefix.partition(".")[0] not in _BESIDE, votes[prefix], prefix == "")
    best = sorted(votes, key=rank)[-2:]
    if len(best) == 2 and best[-1] and rank(best[0]) == rank(best[1]):
        raise ValueError(f"{what} holds its network twice, with the prefixes {best[0]} and {best[1]}: keep one of them")
    return {key: name.removeprefix(best[-1]) if best else name for key, name in bare.items()}


def _harmless(key: str, expected: Mapping[str, tuple]) -> bool:
    """Whether a tensor is of no layer of the network, so that leaving it out changes nothing.

    Such are names without a module (counters and schedules of the training, CLIP's logit_scale), the table 0, 1, 2, ...
    that transformers saved until 4.30, all of `_BESIDE`, and the layers of a text encoder above the last one that
    its configuration has (clip skip)."""
    layer = re.match(r"(?:text_model\.)?(encoder\.layers\.)(\d+\.)", key)
    below = layer and {name for name in expected if name.startswith(f"text_model.{layer[1]}")}
    above = below and not any(name.startswith(f"text_model.{layer[1]}{layer[2]}") for name in below)
    return "." not in key or key.endswith("position_ids") or key.split(".")[0] in _BESIDE or bool(above)


def _lines(kind: str, names: list[str]) -> str:
    names = sorted(names)
    rest = [f"... and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return f"\n  {kind} ({len(names)}):" + "".join(f"\n    {name}" for name in names[:LISTED] + rest)
