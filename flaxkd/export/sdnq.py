"""A pipeline folder of diffusers whose UNet has few bits a weight, in the layout of the package sdnq.

diffusers loads it as any other, where sdnq is installed; neither is needed to write it. A quantized layer has its
integers as `weight`, those of 4 bits two to a byte, and what they are multiplied with as `scale`. `quantization_config`
in config.json says which layers these are. Source: quantizer.py and packed_int/pack.py of sdnq 0.2.8.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from flaxkd.export.integers import Weight, weights
from flaxkd.export.workdir import rounding, scheme_of
from flaxkd.machine import files
from flaxkd.pretrained import Folder, families, save
from flaxkd.pretrained.folder import CONFIGS
from flaxkd.pretrained.writing import cast, check_replaceable
from flaxkd.weights import quantize


def write(out: Path, folder: Folder, scheme: str | None = None, dtype=None, *, source_dtype=None) -> Path:
    """Writes a pipeline to a new folder, or in place of an earlier export; returns `out`.

    scheme: a row of quantize.SCHEMES; None for the one it was trained for. dtype: of the UNet's other weights,
    source_dtype: of the other networks; None: unchanged. Raises ValueError without a scheme, and as `integers.weights`
    and `pretrained.save` do."""
    out = Path(out).absolute()
    check_replaceable(out, folder)
    found, scheme = weights(folder, scheme), scheme_of(folder, scheme)
    if scheme is None:
        raise ValueError("this UNet was not trained to be rounded: say how, such as --quantize w8")
    with files.whole_folder(out) as new:
        save(new, source=folder.as_quantized(rounding(folder, scheme)), parts={}, source_dtype=source_dtype)
        config = new / "unet" / CONFIGS["unet"]
        file = config.with_name(f"{families.PARTS['unet'].stem}.safetensors")
        tensors = load_file(file)
        files.write_json(config, files.read_json(config) | {"quantization_config": _config(tensors, found, scheme)})
        kept = cast({name: x for name, x in tensors.items() if name not in found}, dtype, "unet")
        save_file(kept | _packed(found, quantize.SCHEMES[scheme].bits), file, metadata={"format": "pt"})
    return out


def _config(tensors: Mapping[str, np.ndarray], found: Mapping[str, Weight], scheme: str) -> dict[str, Any]:
    """SDNQConfig's arguments. Its names are those of weights; -1 is one scale for each output channel."""
    return {
        "quant_method": "sdnq",
        "weights_dtype": quantize.SCHEMES[scheme].weights,
        "quant_conv": True,
        "group_size": -1,
        "modules_quant_config": {name: {"group_size": x.block} for name, x in found.items() if x.block},
        "modules_to_not_convert": [name for name, x in tensors.items() if x.ndim > 1 and name not in found],
    }


def _packed(found: Mapping[str, Weight], bits: int) -> dict[str, np.ndarray]:
    tensors = {}
    for name, (values, scales, block) in found.items():
        if bits == 4:  # from 0, the first of two in the lower half
            low, high = (values.astype(np.int8) + 8).astype(np.uint8).reshape(-1, 2).T
            tensors[name] = low | high << 4
        else:
            tensors[name] = values
        ones = [1] if block else [1] * (values.ndim - 1)
        tensors[name.removesuffix("weight") + "scale"] = scales.reshape(*scales.shape, *ones)
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}  # a file holds memory as it lies
