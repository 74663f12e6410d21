"""The quantized weights of a UNet as integers and scales, by diffusers' names: what files of few bits hold."""

from typing import NamedTuple

import numpy as np

from flaxkd.export.workdir import rounding, scheme_of
from flaxkd.pretrained import Folder
from flaxkd.pretrained.keys import to_diffusers
from flaxkd.weights import quantize


class Weight(NamedTuple):
    """A weight as a runtime has it: values times scales. block: neighbours of a row that share a scale; 0: the row."""

    values: np.ndarray
    scales: np.ndarray
    block: int


def weights(folder: Folder, scheme: str | None) -> dict[str, Weight]:
    """{diffusers' name: weight} of all quantized weights of its UNet; scheme: None for the one it was trained with.

    Raises ValueError as `rounding` and `quantize.layers` do."""
    found, scheme = {}, scheme_of(folder, scheme)
    if scheme is None:
        return found
    for path, rounded in quantize.integers(folder.stored("unet"), rounding(folder, scheme)):
        name, values = to_diffusers((*path, "kernel"), np.asarray(rounded.qvalue))
        _, scales = to_diffusers((*path, "kernel"), np.asarray(rounded.scale, np.float32))
        tiled = scales.shape[1] > 1
        found[name] = Weight(values, scales if tiled else scales.ravel(), tiled and values.shape[1] // scales.shape[1])
    return found
