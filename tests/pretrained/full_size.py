"""Tensors of full size without memory, by diffusers' names: zeros in every shape."""

import functools
import re

import numpy as np
from flax.traverse_util import flatten_dict

from flaxkd import pretrained, students
from flaxkd.pretrained import ARCHITECTURES, keys


def hollow(shape) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), tuple(shape))


@functools.cache
def tensors(part: str, architecture: str) -> dict[str, np.ndarray]:
    leaves = flatten_dict(pretrained.shapes(part, ARCHITECTURES[architecture].configs[part])).items()
    return dict(keys.to_diffusers(path, hollow(leaf.shape)) for path, leaf in leaves)


def unet(architecture: str, student: str | None) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, tensors) of a UNet. A student's are its teacher's, counted anew: tracing it would take seconds."""
    config, whole = ARCHITECTURES[architecture].unet, tensors("unet", architecture)
    if student is None:
        return config, whole
    row, cut = students.get(student), {}
    blocks = {source: (block, layers) for block, (source, layers) in row.blocks.items()}
    for key, x in whole.items():
        inside = re.match(r"((?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.(\d+)\.(.+)", key)
        if inside is None:
            cut[key] = x
            continue
        source, kind, layer, leaf = inside.groups()
        block, layers = blocks.get(source, ("", {}))
        if kind.endswith("samplers"):
            if block and int(block.rpartition(".")[2]) < len(row.down) - 1:
                cut[f"{block}.{kind}.{layer}.{leaf}"] = x
        elif int(layer) in layers and (leaf := _within(kind, leaf, layers[int(layer)])):
            cut[f"{block}.{kind}.{list(layers).index(int(layer))}.{leaf}"] = x
    return students.config(row, config), cut


def _within(kind: str, leaf: str, kept: tuple[int, ...] | None) -> str | None:
    """The leaf with its transformer block counted anew; None for what is not kept of an attention."""
    if kind == "resnets" or kept is None:
        return leaf
    inside = re.match(r"transformer_blocks\.(\d+)\.(.+)", leaf)
    if inside is None:
        return leaf if kept else None
    return f"transformer_blocks.{kept.index(int(inside[1]))}.{inside[2]}" if int(inside[1]) in kept else None


def shapes(tensors: dict) -> dict:
    return {key: tuple(x.shape) for key, x in tensors.items()}
